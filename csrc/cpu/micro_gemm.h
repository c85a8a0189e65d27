// Small matrix products out of the first caches: C [M, N] (+)= A [M, K] B [K, N], C in float32.
//
// A is read one element at a time and broadcast, with any strides, so it may as well be stored transposed; B's and C's
// rows are vectors. An element is a float, or (Bf16Pairs) two neighbours of K as bfloat16 in one 32-bit word: then K
// counts pairs, and the products are summed in float32 by the processor's dot product instruction.
#pragma once

#include "cpu/vector.h"

namespace mtbert::MTBERT_ISA {

struct Floats {
    static constexpr int kPack = 1;  // elements of K in one word
    MTBERT_INLINE vf multiply_add(vf a, vf b, vf c) { return a * b + c; }
};

#if defined(MTBERT_USE_BF16)
struct Bf16Pairs {
    static constexpr int kPack = 2;
    MTBERT_INLINE vf multiply_add(vf a, vf b, vf c) {
        return (vf)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
    }
};
#endif

struct Operand {
    const float* data;
    std::int64_t row;     // words from one row (m) to the next
    std::int64_t column;  // words from one k to the next
};

template <class Words, int M, int N>
static void micro_gemm(std::int64_t k_count, Operand a, const float* b, std::int64_t ldb, float* c, std::int64_t ldc,
                       bool accumulate) {
    vf sums[M][N];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) sums[m][n] = vf{};
    const float* a_k = a.data;
    for (std::int64_t k = 0; k < k_count; ++k) {
        vf b_k[N];
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) b_k[n] = load(b + n * W);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
            const vf a_mk = splat(a_k[m * a.row]);
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n) sums[m][n] = Words::multiply_add(a_mk, b_k[n], sums[m][n]);
        }
        a_k += a.column;
        b += ldb;
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) {
            float* target = c + m * ldc + n * W;
            store(target, accumulate ? load(target) + sums[m][n] : sums[m][n]);
        }
}

// Tiles that the registers hold: 32 of them with AVX512, 16 without.
constexpr int kMaxVectors = W == 16 ? 4 : 2;
constexpr int max_rows(int vectors) { return W == 16 ? (vectors == 4 ? 6 : 8) : (vectors == 2 ? 4 : 8); }

template <class Words, int N>
static void gemm_columns(std::int64_t m_count, std::int64_t k_count, Operand a, const float* b, std::int64_t ldb,
                         float* c, std::int64_t ldc, bool accumulate) {
    // Rows in tiles of nearly equal height: a last tile of one row would wait for each of its sums.
    constexpr int kMost = max_rows(N);
    std::int64_t tiles = (m_count + kMost - 1) / kMost;
    while (m_count > 0) {
        const std::int64_t height = (m_count + tiles - 1) / tiles;
        switch (height) {
            case 1: micro_gemm<Words, 1, N>(k_count, a, b, ldb, c, ldc, accumulate); break;
            case 2: micro_gemm<Words, 2, N>(k_count, a, b, ldb, c, ldc, accumulate); break;
            case 3: micro_gemm<Words, 3, N>(k_count, a, b, ldb, c, ldc, accumulate); break;
            case 4: micro_gemm<Words, 4, N>(k_count, a, b, ldb, c, ldc, accumulate); break;
            default:
                if constexpr (kMost > 4) {
                    switch (height) {
                        case 5: micro_gemm<Words, 5, N>(k_count, a, b, ldb, c, ldc, accumulate); break;
                        case 6: micro_gemm<Words, 6, N>(k_count, a, b, ldb, c, ldc, accumulate); break;
                        default:
                            if constexpr (kMost > 6) {
                                if (height == 7) {
                                    micro_gemm<Words, 7, N>(k_count, a, b, ldb, c, ldc, accumulate);
                                } else {
                                    micro_gemm<Words, 8, N>(k_count, a, b, ldb, c, ldc, accumulate);
                                }
                            }
                    }
                }
        }
        a.data += height * a.row;
        c += height * ldc;
        m_count -= height;
        --tiles;
    }
}

template <class Words>
static void gemm_tiles(std::int64_t m_count, std::int64_t n_count, std::int64_t k_count, Operand a, const float* b,
                       std::int64_t ldb, float* c, std::int64_t ldc, bool accumulate) {
    std::int64_t vectors = n_count / W;
    std::int64_t tiles = (vectors + kMaxVectors - 1) / kMaxVectors;
    while (vectors > 0) {
        const std::int64_t width = (vectors + tiles - 1) / tiles;
        if (width == 1) {
            gemm_columns<Words, 1>(m_count, k_count, a, b, ldb, c, ldc, accumulate);
        } else if (width == 2) {
            gemm_columns<Words, 2>(m_count, k_count, a, b, ldb, c, ldc, accumulate);
        } else {
            if constexpr (kMaxVectors > 2) {
                if (width == 3) {
                    gemm_columns<Words, 3>(m_count, k_count, a, b, ldb, c, ldc, accumulate);
                } else {
                    gemm_columns<Words, 4>(m_count, k_count, a, b, ldb, c, ldc, accumulate);
                }
            }
        }
        b += width * W;
        c += width * W;
        vectors -= width;
        --tiles;
    }
}

// Words of K that are summed in one go: long sums are added up from shorter ones, which lose less to rounding.
constexpr std::int64_t kMostWords = 128;

// n_count is a multiple of W.
template <class Words>
static void gemm(std::int64_t m_count, std::int64_t n_count, std::int64_t k_count, Operand a, const float* b,
                 std::int64_t ldb, float* c, std::int64_t ldc, bool accumulate = false) {
    for (std::int64_t k = 0; k < k_count; k += kMostWords) {
        const std::int64_t words = k_count - k < kMostWords ? k_count - k : kMostWords;
        gemm_tiles<Words>(m_count, n_count, words, a, b, ldb, c, ldc, accumulate || k > 0);
        a.data += words * a.column;
        b += words * ldb;
    }
}

}  // namespace mtbert::MTBERT_ISA
