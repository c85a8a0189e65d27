// The three layouts in which the products of attention read their operands, out of rows of floats or bfloat16.
//
// A word is what micro_gemm.h calls an element of K: a float, or a pair of bfloat16.
#pragma once

#include "cpu/micro_gemm.h"

namespace mtbert::MTBERT_ISA {

// Rows as they are, [count, width / pack]: the left operand of a product over the width.
template <class Words, class T>
static void pack_rows(const T* source, std::int64_t stride, std::int64_t count, std::int64_t width, float* packed) {
    for (std::int64_t t = 0; t < count; ++t) {
        if constexpr (Words::kPack == 1) {
            for (std::int64_t d = 0; d < width; d += W) store(packed + d, load(source + d));
        } else {
            __builtin_memcpy(packed, source, static_cast<std::size_t>(width) * sizeof(bf16));
        }
        source += stride;
        packed += width / Words::kPack;
    }
}

#if defined(__AVX512F__)
// Transposes 16 x 16 words; tile[i] is row i on the way in, column i on the way out.
MTBERT_INLINE void transpose_tile(__m512i tile[16]) {
    __m512i t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
        t[2 * i] = _mm512_unpacklo_epi32(tile[2 * i], tile[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(tile[2 * i], tile[2 * i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        tile[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        tile[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        tile[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        tile[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
    // Now tile[4 i + j] holds column 4 c + j of rows 4 i to 4 i + 3 in its c-th quarter.
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
        const __m512i a = _mm512_shuffle_i32x4(tile[j], tile[4 + j], 0x44);
        const __m512i b = _mm512_shuffle_i32x4(tile[j], tile[4 + j], 0xEE);
        const __m512i c = _mm512_shuffle_i32x4(tile[8 + j], tile[12 + j], 0x44);
        const __m512i d = _mm512_shuffle_i32x4(tile[8 + j], tile[12 + j], 0xEE);
        t[j] = _mm512_shuffle_i32x4(a, c, 0x88);
        t[4 + j] = _mm512_shuffle_i32x4(a, c, 0xDD);
        t[8 + j] = _mm512_shuffle_i32x4(b, d, 0x88);
        t[12 + j] = _mm512_shuffle_i32x4(b, d, 0xDD);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) tile[i] = t[i];
}
#endif

// Words transposed, [width / pack, ld] with one lane a row, zeros from lane `count` on: the right operand of a product
// over the width.
template <class Words, class T>
static void pack_transposed(const T* source, std::int64_t stride, std::int64_t count, std::int64_t width,
                            std::int64_t ld, float* packed) {
#if defined(__AVX512F__)
    const std::int64_t words = width / Words::kPack;
    for (std::int64_t first = 0; first < ld; first += 16) {
        for (std::int64_t w = 0; w < words; w += 16) {
            __m512i tile[16];
            const std::int64_t here = words - w;
            for (int i = 0; i < 16; ++i) {
                const T* row = source + (first + i) * stride + w * Words::kPack;
                if (first + i >= count) {
                    tile[i] = _mm512_setzero_si512();
                } else if constexpr (Words::kPack == 1) {
                    tile[i] = (__m512i)load(row);
                } else {
                    // A width of 16 or 48 pairs up to half a vector.
                    tile[i] = here >= 16 ? load_as<__m512i>(row) : _mm512_zextsi256_si512(load_as<__m256i>(row));
                }
            }
            transpose_tile(tile);
            for (int i = 0; i < 16 && i < here; ++i) store_as(packed + (w + i) * ld + first, tile[i]);
        }
    }
#else
    static_assert(Words::kPack == 1, "pairs need AVX512");
    for (std::int64_t t = 0; t < ld; ++t) {
        if (t < count) {
            for (std::int64_t d = 0; d < width; d += W) {
                const vf row = load(source + t * stride + d);
                for (int i = 0; i < W; ++i) packed[(d + i) * ld + t] = row[i];
            }
        } else {
            for (std::int64_t d = 0; d < width; ++d) packed[d * ld + t] = 0.0f;
        }
    }
#endif
}

#if defined(MTBERT_USE_BF16)
// Two vectors of floats as words: lane i holds (low[i], high[i]) as bfloat16.
MTBERT_INLINE __m512i pair_words(vf low, vf high) {
    const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, halves);
}
#endif

// Words along the rows, [ceil(count / pack), width], a missing last row as zeros: the right operand of a product over
// the rows.
template <class Words, class T>
static void pack_pairs(const T* source, std::int64_t stride, std::int64_t count, std::int64_t width, float* packed) {
    if constexpr (Words::kPack == 1) {
        pack_rows<Words>(source, stride, count, width, packed);
    } else {
#if defined(MTBERT_USE_BF16)
        for (std::int64_t t = 0; t < count; t += 2) {
            for (std::int64_t d = 0; d < width; d += 16) {
                const __m512i low = _mm512_cvtepu16_epi32(load_as<__m256i>(source + d));
                __m512i word = low;
                if (t + 1 < count) {
                    const __m512i high = _mm512_cvtepu16_epi32(load_as<__m256i>(source + stride + d));
                    word = _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
                }
                store_as(packed + d, word);
            }
            source += 2 * stride;
            packed += width;
        }
#endif
    }
}

}  // namespace mtbert::MTBERT_ISA
