// The machine as the sm_80 kernels see it: every access to memory, every warp-level operation and every barrier of
// theirs is one of these functions. On a GPU (compute capability 8.0 or later) each is one or two instructions; where
// MTBERT_EMULATION is defined, tests/emulation/machine_host.h defines the same functions for the host, so that a test
// runs the kernels' own source, with checks, on a machine without a GPU. A kernel that keeps to this file therefore
// uses no inline assembly, no intrinsics, no threadIdx and no dereferenced pointer of its own.
//
// Instructions and the layouts of fragments: PTX ISA, "Matrix Fragments for mma.m16n8k16 / m16n8k8" and "ldmatrix".
//
// Memory is ordered between threads by block_barrier (all threads of the block) and warp_barrier (the lanes of a
// warp) alone. Shuffles, load_matrix and multiply_add wait for the whole warp but order no memory, so data that a
// lane wrote to shared memory needs a warp_barrier before another lane of its warp loads it, load_matrix included.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/philox.h"

#ifdef MTBERT_EMULATION
#define MTBERT_KERNEL(...) inline
#define MTBERT_DEVICE inline
#else
// template <...> MTBERT_KERNEL(threads, blocks_per_multiprocessor) void kernel(...): one dimension of threads a block.
#define MTBERT_KERNEL(...) __global__ __launch_bounds__(__VA_ARGS__)
#define MTBERT_DEVICE __device__ __forceinline__
#endif

namespace mtbert::machine {

constexpr int kWarpLanes = 32;

// Element types by their bits; a float is an element too, multiplied as TF32.
struct BF16 {
    std::uint16_t bits;
};
struct FP16 {
    std::uint16_t bits;
};

// Whole registers, for loads and stores of 8 and 16 bytes.
template <int kCount>
struct Words {
    std::uint32_t word[kCount];
};
using Words2 = Words<2>;
using Words4 = Words<4>;

// A byte address in the block's shared memory.
struct Shared {
    std::uint32_t address;
    MTBERT_DEVICE Shared operator+(int bytes) const {
        return Shared{address + static_cast<std::uint32_t>(bytes)};
    }
};

// What a load or a store moves at once.
template <typename V>
constexpr bool kIsMovable = std::is_trivially_copyable_v<V> &&
                            (sizeof(V) == 2 || sizeof(V) == 4 || sizeof(V) == 8 || sizeof(V) == 16);

MTBERT_DEVICE std::uint32_t float_bits(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}
MTBERT_DEVICE float bits_float(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

}  // namespace mtbert::machine

#ifdef MTBERT_EMULATION

#include "machine_host.h"

#else

namespace mtbert::machine {

// ---- Conversions: to the nearest, ties to even; NaN becomes 0x7FFF; beyond the largest finite value infinity. ----

MTBERT_DEVICE float to_float(float value) { return value; }
MTBERT_DEVICE float to_float(BF16 value) { return bits_float(static_cast<std::uint32_t>(value.bits) << 16); }
MTBERT_DEVICE float to_float(FP16 value) {
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
    return result;
}

template <typename T>
MTBERT_DEVICE T from_float(float value) {
    static_assert(std::is_same_v<T, BF16> || std::is_same_v<T, FP16> || std::is_same_v<T, float>);
    if constexpr (std::is_same_v<T, float>) {
        return value;
    } else {
        T result;
        if constexpr (std::is_same_v<T, BF16>) {
            asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
        } else {
            asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
        }
        return result;
    }
}

// Two 16-bit elements in one register, `low` in its low half.
template <typename T>
MTBERT_DEVICE std::uint32_t pack(float low, float high) {
    static_assert(std::is_same_v<T, BF16> || std::is_same_v<T, FP16>);
    std::uint32_t result;
    if constexpr (std::is_same_v<T, BF16>) {
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
    } else {
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
    }
    return result;
}

// The element in the low (half 0) or high (half 1) half of a register.
template <typename T>
MTBERT_DEVICE float unpack(std::uint32_t word, int half) {
    static_assert(std::is_same_v<T, BF16> || std::is_same_v<T, FP16>);
    return to_float(T{static_cast<std::uint16_t>(word >> (16 * half))});
}

// The bits of a float rounded to TF32's 10 bits of mantissa: to the nearest, ties away from zero; the low 13 bits are
// 0.
MTBERT_DEVICE std::uint32_t to_tf32(std::uint32_t bits) {
    std::uint32_t result;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(result) : "f"(bits_float(bits)));
    return result;
}

// ---- Where the thread is. ----

MTBERT_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
MTBERT_DEVICE int lane_index() { return static_cast<int>(threadIdx.x) % kWarpLanes; }
// A warp-level operation, so that the compiler knows the value to be one for all lanes.
MTBERT_DEVICE int warp_index() { return __shfl_sync(0xFFFFFFFFu, static_cast<int>(threadIdx.x) / kWarpLanes, 0); }
MTBERT_DEVICE int block_index_x() { return static_cast<int>(blockIdx.x); }

// ---- Barriers: all threads of the block that have not returned; all lanes of the warp. ----

MTBERT_DEVICE void block_barrier() { __syncthreads(); }
MTBERT_DEVICE void warp_barrier() { __syncwarp(); }

// ---- Memory: 2, 4, 8 or 16 bytes at an address that is a multiple of their number. ----

// The block's dynamic shared memory, aligned to 128 bytes.
MTBERT_DEVICE Shared shared_start() {
    extern __shared__ __align__(128) unsigned char mtbert_dynamic_shared[];
    return Shared{static_cast<std::uint32_t>(__cvta_generic_to_shared(mtbert_dynamic_shared))};
}

template <typename V>
MTBERT_DEVICE V load_shared(Shared source) {
    static_assert(kIsMovable<V>);
    V value;
    if constexpr (sizeof(V) == 2) {
        std::uint16_t half;
        asm volatile("ld.shared.u16 %0, [%1];" : "=h"(half) : "r"(source.address));
        std::memcpy(&value, &half, sizeof value);
    } else {
        std::uint32_t word[sizeof(V) / 4];
        if constexpr (sizeof(V) == 4) {
            asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word[0]) : "r"(source.address));
        } else if constexpr (sizeof(V) == 8) {
            asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(word[0]), "=r"(word[1]) : "r"(source.address));
        } else {
            asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                         : "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3])
                         : "r"(source.address));
        }
        std::memcpy(&value, word, sizeof value);
    }
    return value;
}

template <typename V>
MTBERT_DEVICE void store_shared(Shared target, V value) {
    static_assert(kIsMovable<V>);
    if constexpr (sizeof(V) == 2) {
        std::uint16_t half;
        std::memcpy(&half, &value, sizeof value);
        asm volatile("st.shared.u16 [%0], %1;" ::"r"(target.address), "h"(half) : "memory");
    } else {
        std::uint32_t word[sizeof(V) / 4];
        std::memcpy(word, &value, sizeof value);
        if constexpr (sizeof(V) == 4) {
            asm volatile("st.shared.u32 [%0], %1;" ::"r"(target.address), "r"(word[0]) : "memory");
        } else if constexpr (sizeof(V) == 8) {
            asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(target.address), "r"(word[0]), "r"(word[1])
                         : "memory");
        } else {
            asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(target.address), "r"(word[0]), "r"(word[1]),
                         "r"(word[2]), "r"(word[3])
                         : "memory");
        }
    }
}

template <typename V>
MTBERT_DEVICE V load_global(const void* source) {
    static_assert(kIsMovable<V>);
    const std::size_t address = __cvta_generic_to_global(source);
    V value;
    if constexpr (sizeof(V) == 2) {
        std::uint16_t half;
        asm volatile("ld.global.u16 %0, [%1];" : "=h"(half) : "l"(address));
        std::memcpy(&value, &half, sizeof value);
    } else {
        std::uint32_t word[sizeof(V) / 4];
        if constexpr (sizeof(V) == 4) {
            asm volatile("ld.global.u32 %0, [%1];" : "=r"(word[0]) : "l"(address));
        } else if constexpr (sizeof(V) == 8) {
            asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(word[0]), "=r"(word[1]) : "l"(address));
        } else {
            asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                         : "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3])
                         : "l"(address));
        }
        std::memcpy(&value, word, sizeof value);
    }
    return value;
}

template <typename V>
MTBERT_DEVICE void store_global(void* target, V value) {
    static_assert(kIsMovable<V>);
    const std::size_t address = __cvta_generic_to_global(target);
    if constexpr (sizeof(V) == 2) {
        std::uint16_t half;
        std::memcpy(&half, &value, sizeof value);
        asm volatile("st.global.u16 [%0], %1;" ::"l"(address), "h"(half) : "memory");
    } else {
        std::uint32_t word[sizeof(V) / 4];
        std::memcpy(word, &value, sizeof value);
        if constexpr (sizeof(V) == 4) {
            asm volatile("st.global.u32 [%0], %1;" ::"l"(address), "r"(word[0]) : "memory");
        } else if constexpr (sizeof(V) == 8) {
            asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(address), "r"(word[0]), "r"(word[1]) : "memory");
        } else {
            asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(word[0]), "r"(word[1]),
                         "r"(word[2]), "r"(word[3])
                         : "memory");
        }
    }
}

// ---- Copies from global to shared memory that go on while the thread works (cp.async). ----

// Copies the first `bytes` (0 to 16) bytes of 16 and makes the rest zero; with 0 bytes nothing is read. Both
// addresses are multiples of 16, with 0 bytes too.
MTBERT_DEVICE void copy_async16(Shared target, const void* source, int bytes) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(target.address),
                 "l"(__cvta_generic_to_global(source)), "r"(bytes)
                 : "memory");
}

// Ends a group: this thread's copies since the last one. A group may be empty.
MTBERT_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most the last kPending groups of this thread are under way. What has arrived is visible to this
// thread, and to others after a barrier.
template <int kPending>
MTBERT_DEVICE void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- 8x8 matrices of 16-bit elements from shared memory (ldmatrix): all lanes of the warp. ----

// Lane l gives the address of row l % 8 of matrix l / 8 (16 bytes, aligned to 16) and receives in fragment[i] elements
// 2 (l % 4) and 2 (l % 4) + 1 of row l / 4 of matrix i. The x2 forms look at the addresses of lanes 0 to 15.
MTBERT_DEVICE void load_matrix_x4(std::uint32_t (&fragment)[4], Shared row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                 : "r"(row.address)
                 : "memory");
}
MTBERT_DEVICE void load_matrix_x2(std::uint32_t (&fragment)[2], Shared row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(fragment[0]), "=r"(fragment[1])
                 : "r"(row.address)
                 : "memory");
}

// The same of the transposed matrices: elements 2 (l % 4) and 2 (l % 4) + 1 of column l / 4.
MTBERT_DEVICE void load_matrix_x4_transposed(std::uint32_t (&fragment)[4], Shared row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                 : "r"(row.address)
                 : "memory");
}
MTBERT_DEVICE void load_matrix_x2_transposed(std::uint32_t (&fragment)[2], Shared row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(fragment[0]), "=r"(fragment[1])
                 : "r"(row.address)
                 : "memory");
}

// ---- Products (mma.sync): all lanes of the warp. With g = lane / 4 and q = lane % 4, d holds rows g, g, g + 8, g + 8
// and columns 2 q, 2 q + 1, 2 q, 2 q + 1 of the 16 x 8 result. ----

// d += a b with a [16, 16] and b [16, 8] of T, two neighbours along the sum a register: a holds (row, column) (g, 2 q),
// (g + 8, 2 q), (g, 2 q + 8), (g + 8, 2 q + 8); b holds (2 q, g), (2 q + 8, g).
template <typename T>
MTBERT_DEVICE void multiply_add_16816(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
    static_assert(std::is_same_v<T, BF16> || std::is_same_v<T, FP16>);
    if constexpr (std::is_same_v<T, BF16>) {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    } else {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
}

// d += a b with a [16, 8] and b [8, 8] of TF32 (the low 13 bits of a register are not looked at): a holds (g, q),
// (g + 8, q), (g, q + 4), (g + 8, q + 4); b holds (q, g), (q + 4, g).
MTBERT_DEVICE void multiply_add_1688_tf32(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// ---- Shuffles: all lanes of the warp. ----

// The value of lane (this lane xor lane_mask).
MTBERT_DEVICE std::uint32_t shuffle_xor(std::uint32_t value, int lane_mask) {
    return __shfl_xor_sync(0xFFFFFFFFu, value, lane_mask);
}

}  // namespace mtbert::machine

#endif
