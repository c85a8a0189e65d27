// Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011) and the rule that
// turns one draw into eight dropout decisions. Host and device code include this one file, so both draw the same bits.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define MTBERT_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define MTBERT_HOST_DEVICE inline
#endif

// nvcc passes a .cu file to the host compiler too, which knows its own pragma only.
#ifdef __CUDA_ARCH__
#define MTBERT_UNROLL _Pragma("unroll")
#elif defined(__CUDACC__)
#define MTBERT_UNROLL
#else
#define MTBERT_UNROLL _Pragma("GCC unroll 16")
#endif

namespace mtbert {

// Four 32-bit words: a counter on the way in, a draw on the way out.
struct Philox4 {
    std::uint32_t word[4];
};

constexpr std::uint32_t kPhiloxMultiplier0 = 0xD2511F53u;
constexpr std::uint32_t kPhiloxMultiplier1 = 0xCD9E8D57u;
constexpr std::uint32_t kPhiloxWeyl0 = 0x9E3779B9u;
constexpr std::uint32_t kPhiloxWeyl1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;

// Columns that share one draw: eight 16-bit lanes.
constexpr int kDropoutLanes = 8;

MTBERT_HOST_DEVICE Philox4 philox4x32_10(Philox4 counter, std::uint32_t key0, std::uint32_t key1) {
    MTBERT_UNROLL
    for (int round = 0; round < kPhiloxRounds; ++round) {
        const std::uint64_t product0 = static_cast<std::uint64_t>(kPhiloxMultiplier0) * counter.word[0];
        const std::uint64_t product1 = static_cast<std::uint64_t>(kPhiloxMultiplier1) * counter.word[2];
        counter = Philox4{{
            static_cast<std::uint32_t>(product1 >> 32) ^ counter.word[1] ^ key0,
            static_cast<std::uint32_t>(product1),
            static_cast<std::uint32_t>(product0 >> 32) ^ counter.word[3] ^ key1,
            static_cast<std::uint32_t>(product0),
        }};
        key0 += kPhiloxWeyl0;
        key1 += kPhiloxWeyl1;
    }
    return counter;
}

// What a dropout mask is a function of, beside the row and the column.
struct DropoutKey {
    std::uint32_t seed_low;
    std::uint32_t seed_high;
    std::uint32_t step;
    std::uint32_t site;
    std::uint32_t threshold;  // round(65536 p), at most 65535: a lane below it is dropped
    float scale;              // 65536 / (65536 - threshold): what a kept element is multiplied by
};

MTBERT_HOST_DEVICE DropoutKey make_dropout_key(std::uint64_t seed, std::uint32_t step, std::uint32_t site,
                                               std::uint32_t threshold) {
    return DropoutKey{static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32), step, site, threshold,
                      65536.0f / static_cast<float>(65536u - threshold)};
}

// The draw for columns 8 * group to 8 * group + 7 of a row.
MTBERT_HOST_DEVICE Philox4 dropout_draw(const DropoutKey& key, std::uint32_t dropout_row, std::uint32_t group) {
    return philox4x32_10(Philox4{{group, dropout_row, key.site, key.step}}, key.seed_low, key.seed_high);
}

// Lane 0 to 7 of a draw: the low half of each word comes first.
MTBERT_HOST_DEVICE std::uint32_t dropout_lane(const Philox4& draw, int lane) {
    return (draw.word[lane >> 1] >> (16 * (lane & 1))) & 0xFFFFu;
}

}  // namespace mtbert
