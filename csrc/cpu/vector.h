// The compiler's vectors at the width of the instruction set that this file is compiled for. Everything stands in a
// namespace of its own per instruction set (MTBERT_ISA), and nothing here may instantiate a library template: the linker
// would be free to hand an AVX512 copy of it to the code for older processors.
#pragma once

#include <cstdint>

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 finds it in its own immintrin.h
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#define MTBERT_SSE2 1
#endif

#include "cpu/kernels.h"

#define MTBERT_INLINE static inline __attribute__((always_inline))

namespace mtbert::MTBERT_ISA {

#if defined(__AVX512F__)
constexpr int W = 16;  // floats in a vector
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(4 * W)));
typedef std::int32_t vi __attribute__((vector_size(4 * W)));
typedef std::uint32_t vu __attribute__((vector_size(4 * W)));
typedef std::uint64_t vq __attribute__((vector_size(4 * W)));
typedef std::uint16_t vh __attribute__((vector_size(2 * W)));  // W lanes of 16 bits

// bfloat16: the upper half of a float.
struct bf16 {
    std::uint16_t bits;
};

template <class T>
MTBERT_INLINE T load_as(const void* p) {
    T value;
    __builtin_memcpy(&value, p, sizeof value);
    return value;
}

template <class T>
MTBERT_INLINE void store_as(void* p, T value) {
    __builtin_memcpy(p, &value, sizeof value);
}

MTBERT_INLINE vf splat(float x) {
#if defined(__AVX512F__)
    return (vf)_mm512_set1_ps(x);
#elif defined(__AVX2__)
    return (vf)_mm256_set1_ps(x);
#else
    return x - vf{};
#endif
}
MTBERT_INLINE vu splat_u(std::uint32_t x) { return x + vu{}; }
MTBERT_INLINE vq splat_q(std::uint64_t x) { return x + vq{}; }

// The greater of two; the second where either is not a number.
MTBERT_INLINE vf max_or_second(vf a, vf b) {
#if defined(__AVX512F__)
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(MTBERT_SSE2)
    return (vf)_mm_max_ps((__m128)a, (__m128)b);
#else
    return a > b ? a : b;
#endif
}

MTBERT_INLINE float sum(vf v) {
    float lanes[W];
    __builtin_memcpy(lanes, &v, sizeof v);
#pragma GCC unroll 8
    for (int half = W / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    return lanes[0];
}

// ---- loads and stores of W elements, or of the first n of them (others are 0 / untouched)

MTBERT_INLINE vf load(const float* p) { return load_as<vf>(p); }
MTBERT_INLINE vf load(const bf16* p) {
    return (vf)(__builtin_convertvector(load_as<vh>(p), vu) << 16);
}

MTBERT_INLINE void store(float* p, vf v) { store_as(p, v); }
MTBERT_INLINE void store(bf16* p, vf v) {
#if defined(MTBERT_USE_BF16)
    store_as(p, _mm512_cvtneps_pbh((__m512)v));
#else
    const vu bits = (vu)v;
    vu rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    rounded = (v != v) ? ((bits >> 16) | 0x40u) : rounded;  // rounding could carry a NaN into infinity
    store_as(p, __builtin_convertvector(rounded, vh));
#endif
}

template <class T>
MTBERT_INLINE vf load(const T* p, std::int64_t n) {
    if (n >= W) return load(p);
    T part[W] = {};
    for (std::int64_t i = 0; i < n; ++i) part[i] = p[i];
    return load(part);
}

template <class T>
MTBERT_INLINE void store(T* p, vf v, std::int64_t n) {
    if (n >= W) {
        store(p, v);
        return;
    }
    T part[W];
    store(part, v);
    for (std::int64_t i = 0; i < n; ++i) p[i] = part[i];
}

// ---- masks

#if defined(__AVX512F__)
typedef __mmask16 keep_t;
MTBERT_INLINE keep_t at_least(vu a, vu b) { return _mm512_cmpge_epu32_mask((__m512i)a, (__m512i)b); }
MTBERT_INLINE vf kept(keep_t keep, vf v) { return (vf)_mm512_maskz_mov_ps(keep, (__m512)v); }
#else
typedef vi keep_t;
MTBERT_INLINE keep_t at_least(vu a, vu b) { return (vi)(a >= b); }
MTBERT_INLINE vf kept(keep_t keep, vf v) { return (vf)((vi)v & keep); }
#endif

// ---- exponential

// 2^z for z <= 0, to 1e-7 of the value; 0 below 2^-126. Not-a-number stays that. Minimax polynomial on [-1/2, 1/2].
MTBERT_INLINE vf exp2_nonpositive(vf z) {
    const vf shift = splat(12582912.0f + 127.0f);  // 1.5 * 2^23: the sum's low bits are round(z) + 127
    z = max_or_second(splat(-127.0f), z);
    const vf t = z + shift;
    const vf r = z - (t - shift);
    vf p = splat(0.00015345812f);
    p = p * r + splat(0.0013399931f);
    p = p * r + splat(0.009618489f);
    p = p * r + splat(0.055503288f);
    p = p * r + splat(0.24022647f);
    p = p * r + splat(0.6931472f);
    p = p * r + splat(1.0f);
    return p * (vf)((vu)t << 23);
}

}  // namespace mtbert::MTBERT_ISA
