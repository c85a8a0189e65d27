// Philox4x32-10 on vectors: W / 2 draws at once, a word in the low half of each 64-bit lane (the high half is noise).
#pragma once

#include "cpu/vector.h"

namespace mtbert::MTBERT_ISA {

MTBERT_INLINE vq multiply_low_halves(vq a, vq b) {
#if defined(__AVX512F__)
    return (vq)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return (vq)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(MTBERT_SSE2)
    return (vq)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
    return (a & 0xFFFFFFFFu) * (b & 0xFFFFFFFFu);
#endif
}

// The parts of a mask that are the same for every row and column.
struct Stream {
    std::uint32_t key0[kPhiloxRounds];
    std::uint32_t key1[kPhiloxRounds];
    std::uint64_t site_product;  // of the first round
    std::uint32_t step;
    std::uint32_t threshold;
    float scale;
};

MTBERT_INLINE Stream make_stream(const DropoutKey& key) {
    Stream s;
    for (int r = 0; r < kPhiloxRounds; ++r) {
        s.key0[r] = key.seed_low + static_cast<std::uint32_t>(r) * kPhiloxWeyl0;
        s.key1[r] = key.seed_high + static_cast<std::uint32_t>(r) * kPhiloxWeyl1;
    }
    s.site_product = static_cast<std::uint64_t>(kPhiloxMultiplier1) * key.site;
    s.step = key.step;
    s.threshold = key.threshold;
    s.scale = key.scale;
    return s;
}

// Rounds 3 to 10.
MTBERT_INLINE void remaining_rounds(const Stream& s, vq c0, vq c1, vq c2, vq c3, vq word[4]) {
    const vq multiplier0 = splat_q(kPhiloxMultiplier0);
    const vq multiplier1 = splat_q(kPhiloxMultiplier1);
#pragma GCC unroll 8
    for (int r = 2; r < kPhiloxRounds; ++r) {
        const vq product0 = multiply_low_halves(multiplier0, c0);
        const vq product1 = multiply_low_halves(multiplier1, c2);
        c0 = (product1 >> 32) ^ c1 ^ splat_q(s.key0[r]);
        c1 = product1;
        c2 = (product0 >> 32) ^ c3 ^ splat_q(s.key1[r]);
        c3 = product0;
    }
    word[0] = c0;
    word[1] = c1;
    word[2] = c2;
    word[3] = c3;
}

// One row, W / 2 groups of eight columns. What is the same for all lanes in the first two rounds is done on scalars.
MTBERT_INLINE void draw_groups(const Stream& s, std::uint32_t row, vq group, vq word[4]) {
    const vq p0 = multiply_low_halves(splat_q(kPhiloxMultiplier0), group);
    const std::uint32_t c0 = static_cast<std::uint32_t>(s.site_product >> 32) ^ row ^ s.key0[0];
    const std::uint32_t c1 = static_cast<std::uint32_t>(s.site_product);
    const vq c2 = (p0 >> 32) ^ splat_q(s.step ^ s.key1[0]);
    const std::uint64_t q0 = static_cast<std::uint64_t>(kPhiloxMultiplier0) * c0;
    const vq q1 = multiply_low_halves(splat_q(kPhiloxMultiplier1), c2);
    remaining_rounds(s, (q1 >> 32) ^ splat_q(c1 ^ s.key0[1]), q1,
                     p0 ^ splat_q(static_cast<std::uint32_t>(q0 >> 32) ^ s.key1[1]), splat_q(q0), word);
}

// One group of eight columns, W / 2 rows.
MTBERT_INLINE void draw_rows(const Stream& s, vq row, std::uint32_t group, vq word[4]) {
    const std::uint64_t p0 = static_cast<std::uint64_t>(kPhiloxMultiplier0) * group;
    const vq c0 = row ^ splat_q(static_cast<std::uint32_t>(s.site_product >> 32) ^ s.key0[0]);
    const std::uint32_t c1 = static_cast<std::uint32_t>(s.site_product);
    const std::uint32_t c2 = static_cast<std::uint32_t>(p0 >> 32) ^ s.step ^ s.key1[0];
    const vq q0 = multiply_low_halves(splat_q(kPhiloxMultiplier0), c0);
    const std::uint64_t q1 = static_cast<std::uint64_t>(kPhiloxMultiplier1) * c2;
    remaining_rounds(s, splat_q(static_cast<std::uint32_t>(q1 >> 32) ^ c1 ^ s.key0[1]), splat_q(q1),
                     (q0 >> 32) ^ splat_q(static_cast<std::uint32_t>(p0) ^ s.key1[1]), q0, word);
}

// Columns that draw_lanes writes at once; its buffer has room for a multiple of them.
constexpr std::int64_t kLaneBlock = 4 * W;

// The 16-bit lanes of `columns` columns (rounded up to the block) of a row, in order, from group `first_group` on.
MTBERT_INLINE void draw_lanes(const Stream& s, std::uint32_t row, std::int64_t first_group, std::int64_t columns,
                              std::uint16_t* lanes) {
    // The lanes' order is the one that the unpack instructions below undo: they work within 128 bits.
    vq group;
    for (int i = 0; i < W / 2; ++i) group[i] = static_cast<std::uint64_t>(first_group + (i & 1) * (W / 4) + i / 2);
    for (std::int64_t c = 0; c < columns; c += kLaneBlock) {
        vq word[4];
        draw_groups(s, row, group, word);
        const vq low = (word[0] & 0xFFFFFFFFu) | (word[1] << 32);
        const vq high = (word[2] & 0xFFFFFFFFu) | (word[3] << 32);
#if defined(__AVX512F__)
        store_as(lanes + c, _mm512_unpacklo_epi64((__m512i)low, (__m512i)high));
        store_as(lanes + c + 32, _mm512_unpackhi_epi64((__m512i)low, (__m512i)high));
#elif defined(__AVX2__)
        store_as(lanes + c, _mm256_unpacklo_epi64((__m256i)low, (__m256i)high));
        store_as(lanes + c + 16, _mm256_unpackhi_epi64((__m256i)low, (__m256i)high));
#else
        const vq first = {low[0], high[0]};
        const vq second = {low[1], high[1]};
        store_as(lanes + c, first);
        store_as(lanes + c + 8, second);
#endif
        group += W / 2;
    }
}

MTBERT_INLINE keep_t keep_of_lanes(const std::uint16_t* lanes, vu threshold) {
    return at_least(__builtin_convertvector(load_as<vh>(lanes), vu), threshold);
}

}  // namespace mtbert::MTBERT_ISA
