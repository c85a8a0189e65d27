// The element types' conversions on the host, bit for bit as the GPU's cvt instructions: to the nearest, ties to even.
#pragma once

#include "cuda/lora/machine.h"

namespace mtbert::machine {

constexpr std::uint32_t kFloatSign = 0x80000000u;
constexpr std::uint32_t kFloatInfinity = 0x7F800000u;
constexpr std::uint16_t kHalfNaN = 0x7FFF;  // of both 16-bit types: what cvt.rn makes of any NaN

inline float to_float(float value) { return value; }

inline float to_float(BF16 value) { return bits_float(static_cast<std::uint32_t>(value.bits) << 16); }

inline float to_float(FP16 value) {
    const std::uint32_t sign = (value.bits & 0x8000u) << 16;
    const std::uint32_t magnitude = value.bits & 0x7FFFu;
    std::uint32_t result;
    if (magnitude >= 0x7C00u) {
        result = kFloatInfinity | (magnitude & 0x3FFu) << 13;
    } else if (magnitude >= 0x400u) {
        result = (magnitude << 13) + (112u << 23);  // the exponents' biases are 15 and 127
    } else {
        result = float_bits(static_cast<float>(magnitude) * 0x1p-24f);  // exact: a subnormal counts units of 2^-24
    }
    return bits_float(sign | result);
}

template <typename T>
T from_float(float value);

template <>
inline float from_float<float>(float value) {
    return value;
}

template <>
inline BF16 from_float<BF16>(float value) {
    const std::uint32_t bits = float_bits(value);
    if ((bits & ~kFloatSign) > kFloatInfinity) {
        return BF16{kHalfNaN};
    }
    // A carry out of the mantissa is the next exponent, and out of the largest one infinity.
    return BF16{static_cast<std::uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16)};
}

template <>
inline FP16 from_float<FP16>(float value) {
    const std::uint32_t bits = float_bits(value);
    const std::uint32_t sign = bits >> 16 & 0x8000u;
    const std::uint32_t magnitude = bits & ~kFloatSign;
    if (magnitude > kFloatInfinity) {
        return FP16{kHalfNaN};
    }
    std::uint32_t result;
    if (magnitude >= 143u << 23) {  // 2^16 and beyond; what lies between the largest half and it rounds below
        result = 0x7C00u;
    } else if (magnitude >= 113u << 23) {  // 2^-14: a normal half
        const std::uint32_t rebiased = magnitude - (112u << 23);
        result = (rebiased + 0xFFFu + (rebiased >> 13 & 1u)) >> 13;
    } else if (magnitude >= 102u << 23) {  // 2^-25, half of the smallest subnormal
        const std::uint32_t mantissa = (magnitude & 0x7FFFFFu) | 0x800000u;
        const std::uint32_t shift = 126u - (magnitude >> 23);  // 14 to 24: units of 2^-24 are left
        const std::uint32_t rest = mantissa & ((1u << shift) - 1u), half = 1u << (shift - 1u);
        result = mantissa >> shift;
        result += rest > half || (rest == half && (result & 1u) != 0) ? 1u : 0u;
    } else {
        result = 0;
    }
    return FP16{static_cast<std::uint16_t>(sign | result)};
}

template <typename T>
std::uint32_t pack(float low, float high) {
    static_assert(std::is_same_v<T, BF16> || std::is_same_v<T, FP16>);
    return from_float<T>(low).bits | static_cast<std::uint32_t>(from_float<T>(high).bits) << 16;
}

template <typename T>
float unpack(std::uint32_t word, int half) {
    static_assert(std::is_same_v<T, BF16> || std::is_same_v<T, FP16>);
    return to_float(T{static_cast<std::uint16_t>(word >> (16 * half))});
}

inline std::uint32_t to_tf32(std::uint32_t bits) {
    if ((bits & ~kFloatSign) > kFloatInfinity) {
        return 0x7FFFFFFFu & ~0x1FFFu;
    }
    return (bits + 0x1000u) & ~0x1FFFu;  // away from zero on a tie: the sign is apart from the magnitude
}

}  // namespace mtbert::machine
