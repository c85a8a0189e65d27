// What Hopper adds to machine.h: clusters, mbarriers, bulk tensor copies (TMA), warpgroup products (wgmma) and the
// exchange of registers between warpgroups. Compute capability 9.0 only, compiled for sm_90a. Where MTBERT_EMULATION
// is defined, tests/emulation/sm90/machine_host.h defines the same functions for the host.
//
// Order of memory: a TMA load is seen by whoever waited for its mbarrier. Shared memory that ordinary stores wrote is
// seen by TMA after async_fence by the writing threads and a barrier. A product reads its shared memory, its
// accumulators and its register operands at any time between its issue and product_wait: until then nothing may write
// to (or, the accumulators, read from) them.
#pragma once

#include "cuda/lora/machine.h"
#include "cuda/lora/sm90_layout.h"

#ifdef MTBERT_EMULATION
#define MTBERT_GRID_CONSTANT
#else
#include <cuda.h>
#define MTBERT_GRID_CONSTANT __grid_constant__
#endif

// Whether this pass of the compiler knows the instructions.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(MTBERT_EMULATION)
#define MTBERT_SM90A_CODE 1
#endif

#ifndef MTBERT_EMULATION

namespace mtbert::machine {

// Where and how TMA moves boxes of a matrix: made on the host, a parameter of the kernel.
using TensorMap = CUtensorMap;

// ---- Blocks and clusters. ----

// The block's dynamic shared memory, on a multiple of the swizzle's 1024 bytes.
MTBERT_DEVICE Shared swizzled_shared_start() {
    extern __shared__ __align__(1024) unsigned char mtbert_swizzled_shared[];
    return Shared{static_cast<std::uint32_t>(__cvta_generic_to_shared(mtbert_swizzled_shared))};
}

// This block's place in its cluster.
MTBERT_DEVICE int cluster_rank() {
    std::uint32_t rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return static_cast<int>(rank);
}

// All threads of the cluster; what they wrote before is seen after.
MTBERT_DEVICE void cluster_barrier() {
    asm volatile(
        "barrier.cluster.arrive.release;\n"
        "barrier.cluster.wait.acquire;" ::
            : "memory");
}

// The registers of a thread from here on, for a whole warpgroup: fewer, or more, which waits until they are free.
template <int kCount>
MTBERT_DEVICE void fewer_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
MTBERT_DEVICE void more_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

// Ends the launch with an error.
MTBERT_DEVICE void fail() { __trap(); }

// ---- mbarriers: phases 0, 1, 2, ... each completes when all arrivals came and all expected bytes landed. ----

MTBERT_DEVICE void barrier_init(Shared barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier.address), "r"(arrivals) : "memory");
}
// After the initialisations, before a cluster_barrier: other blocks and TMA see them.
MTBERT_DEVICE void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// Arrives, and has the phase wait for so many bytes.
MTBERT_DEVICE void barrier_arrive_expect(Shared barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier.address), "r"(bytes)
                 : "memory");
}

// Arrives at the barrier at this address in block `rank` of the cluster. What TMA and the products have done is
// ordered by their own completion, so the default scope is enough (a release to the cluster would flush the caches
// every time).
MTBERT_DEVICE void barrier_arrive_at(Shared barrier, int rank) {
    asm volatile(
        "{\n"
        ".reg .b32 remote;\n"
        "mapa.shared::cluster.u32 remote, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
        "}" ::"r"(barrier.address),
        "r"(rank)
        : "memory");
}

// Waits until the phase of this parity has completed: returns at once unless it is the one under way.
MTBERT_DEVICE void barrier_wait(Shared barrier, std::uint32_t parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}" ::"r"(barrier.address),
        "r"(parity)
        : "memory");
}

// ---- TMA: one thread asks for a box; coordinates count elements, the first along the row. ----

MTBERT_DEVICE void tma_prefetch(const TensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Loads a box into shared memory; zeros stand for what lies outside of the matrix. Its bytes land at `barrier`.
MTBERT_DEVICE void tma_load(Shared target, const TensorMap& map, Shared barrier, int c0, int c1) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
            target.address),
        "l"(&map), "r"(barrier.address), "r"(c0), "r"(c1)
        : "memory");
}
MTBERT_DEVICE void tma_load(Shared target, const TensorMap& map, Shared barrier, int c0, int c1, int c2) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::
            "r"(target.address),
        "l"(&map), "r"(barrier.address), "r"(c0), "r"(c1), "r"(c2)
        : "memory");
}

// The same, into the same place of every block of the cluster whose bit is set, landing at the barrier of each.
MTBERT_DEVICE void tma_load_multicast(Shared target, const TensorMap& map, Shared barrier, int blocks, int c0, int c1) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
        " [%0], [%1, {%4, %5}], [%2], %3;" ::"r"(target.address),
        "l"(&map), "r"(barrier.address), "h"(static_cast<std::uint16_t>(blocks)), "r"(c0), "r"(c1)
        : "memory");
}
MTBERT_DEVICE void tma_load_multicast(Shared target, const TensorMap& map, Shared barrier, int blocks, int c0, int c1,
                                      int c2) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
        " [%0], [%1, {%4, %5, %6}], [%2], %3;" ::"r"(target.address),
        "l"(&map), "r"(barrier.address), "h"(static_cast<std::uint16_t>(blocks)), "r"(c0), "r"(c1), "r"(c2)
        : "memory");
}

// Stores a box from shared memory, without what lies outside of the matrix.
MTBERT_DEVICE void tma_store(const TensorMap& map, Shared source, int c0, int c1, int c2) {
    asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(&map),
                 "r"(source.address), "r"(c0), "r"(c1), "r"(c2)
                 : "memory");
}
// Ends a group: this thread's stores since the last one, maybe none.
MTBERT_DEVICE void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Waits until all but this thread's last kPending groups have read their shared memory.
template <int kPending>
MTBERT_DEVICE void tma_store_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// Orders this thread's ordinary accesses to shared memory before what TMA does after the next barrier.
MTBERT_DEVICE void async_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- Matrices to shared memory (stmatrix): lanes, rows and fragments as load_matrix_x4 has them. ----

MTBERT_DEVICE void store_matrix_x4(Shared row, const std::uint32_t (&fragment)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row.address),
                 "r"(fragment[0]), "r"(fragment[1]), "r"(fragment[2]), "r"(fragment[3])
                 : "memory");
}

// ---- Products of a warpgroup (wgmma): all its threads. d [64, N] += a [64, 16] b [N, 16]^T. ----

// Before the first product, and after registers that a product uses were written by anything else.
MTBERT_DEVICE void product_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// Ends a group: the products since the last one.
MTBERT_DEVICE void product_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most the last kPending groups are under way.
template <int kPending>
MTBERT_DEVICE void product_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// The compiler may not move uses of these registers across this place.
template <int kCount>
MTBERT_DEVICE void hold(float (&registers)[kCount]) {
    MTBERT_UNROLL
    for (int i = 0; i < kCount; ++i) {
        asm volatile("" : "+f"(registers[i])::"memory");
    }
}
template <int kCount>
MTBERT_DEVICE void hold(std::uint32_t (&registers)[kCount]) {
    MTBERT_UNROLL
    for (int i = 0; i < kCount; ++i) {
        asm volatile("" : "+r"(registers[i])::"memory");
    }
}

namespace detail {

// The operand lists of the instructions, by the number of accumulators.
#define MTBERT_PLACES_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define MTBERT_PLACES_16 MTBERT_PLACES_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define MTBERT_PLACES_32                                                                                               \
    MTBERT_PLACES_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define MTBERT_PLACES_64                                                                                               \
    MTBERT_PLACES_32                                                                                                   \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, " \
    "%54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define MTBERT_PLACES_96                                                                                               \
    MTBERT_PLACES_64                                                                                                   \
    ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, " \
    "%86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define MTBERT_PLACES_128                                                                                              \
    MTBERT_PLACES_96                                                                                                   \
    ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, " \
    "%115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define MTBERT_OPERANDS_4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define MTBERT_OPERANDS_8(d, i) MTBERT_OPERANDS_4(d, i), MTBERT_OPERANDS_4(d, i + 4)
#define MTBERT_OPERANDS_16(d, i) MTBERT_OPERANDS_8(d, i), MTBERT_OPERANDS_8(d, i + 8)
#define MTBERT_OPERANDS_32(d, i) MTBERT_OPERANDS_16(d, i), MTBERT_OPERANDS_16(d, i + 16)
#define MTBERT_OPERANDS_64(d, i) MTBERT_OPERANDS_32(d, i), MTBERT_OPERANDS_32(d, i + 32)
#define MTBERT_OPERANDS_96(d, i) MTBERT_OPERANDS_64(d, i), MTBERT_OPERANDS_32(d, i + 64)
#define MTBERT_OPERANDS_128(d, i) MTBERT_OPERANDS_64(d, i), MTBERT_OPERANDS_64(d, i + 64)

// The numbers of the operands after the accumulators: both descriptors, whether to accumulate, b transposed; or four
// registers, a descriptor and the same two.
#define MTBERT_AFTER_8(f) f("8", "9", "10", "11", "12", "13", "14")
#define MTBERT_AFTER_16(f) f("16", "17", "18", "19", "20", "21", "22")
#define MTBERT_AFTER_32(f) f("32", "33", "34", "35", "36", "37", "38")
#define MTBERT_AFTER_64(f) f("64", "65", "66", "67", "68", "69", "70")
#define MTBERT_AFTER_96(f) f("96", "97", "98", "99", "100", "101", "102")
#define MTBERT_AFTER_128(f) f("128", "129", "130", "131", "132", "133", "134")
#define MTBERT_FROM_SHARED(p0, p1, p2, p3, p4, p5, p6) "%" p0 ", %" p1 ", done, 1, 1, 0, %" p3 ";\n}"
#define MTBERT_PREDICATE_SHARED(p0, p1, p2, p3, p4, p5, p6) "{\n.reg .pred done;\nsetp.ne.b32 done, %" p2 ", 0;\n"
#define MTBERT_FROM_REGISTERS(p0, p1, p2, p3, p4, p5, p6) \
    "{%" p0 ", %" p1 ", %" p2 ", %" p3 "}, %" p4 ", done, 1, 1, %" p6 ";\n}"
#define MTBERT_PREDICATE_REGISTERS(p0, p1, p2, p3, p4, p5, p6) "{\n.reg .pred done;\nsetp.ne.b32 done, %" p5 ", 0;\n"

#define MTBERT_PRODUCT(columns, count, name, type)                                                                     \
    template <bool kTransposed>                                                                                        \
    MTBERT_DEVICE void shared_##name(float(&d)[count], std::uint64_t a, std::uint64_t b, bool accumulate) {            \
        asm volatile(MTBERT_AFTER_##count(MTBERT_PREDICATE_SHARED)                                                     \
                     "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." type "." type " {" MTBERT_PLACES_##count  \
                     "}, " MTBERT_AFTER_##count(MTBERT_FROM_SHARED)                                                    \
                     : MTBERT_OPERANDS_##count(d, 0)                                                                   \
                     : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(static_cast<int>(kTransposed)));         \
    }                                                                                                                  \
    template <bool kTransposed>                                                                                        \
    MTBERT_DEVICE void registers_##name(float(&d)[count], const std::uint32_t(&a)[4], std::uint64_t b,                 \
                                        bool accumulate) {                                                             \
        asm volatile(MTBERT_AFTER_##count(MTBERT_PREDICATE_REGISTERS)                                                  \
                     "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." type "." type " {" MTBERT_PLACES_##count  \
                     "}, " MTBERT_AFTER_##count(MTBERT_FROM_REGISTERS)                                                 \
                     : MTBERT_OPERANDS_##count(d, 0)                                                                   \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)),          \
                       "n"(static_cast<int>(kTransposed)));                                                            \
    }
#define MTBERT_PRODUCTS(columns, count) \
    MTBERT_PRODUCT(columns, count, bf16, "bf16") MTBERT_PRODUCT(columns, count, fp16, "f16")
MTBERT_PRODUCTS(16, 8)
MTBERT_PRODUCTS(32, 16)
MTBERT_PRODUCTS(64, 32)
MTBERT_PRODUCTS(128, 64)
MTBERT_PRODUCTS(192, 96)
MTBERT_PRODUCTS(256, 128)
#undef MTBERT_PRODUCTS
#undef MTBERT_PRODUCT

}  // namespace detail

// a and b by their descriptors. kTransposed: b's neighbours in memory are columns of the product. Without
// `accumulate` d is overwritten.
template <typename T, bool kTransposed, int kCount>
MTBERT_DEVICE void multiply_shared(float (&d)[kCount], std::uint64_t a, std::uint64_t b, bool accumulate) {
    if constexpr (std::is_same_v<T, BF16>) {
        detail::shared_bf16<kTransposed>(d, a, b, accumulate);
    } else {
        detail::shared_fp16<kTransposed>(d, a, b, accumulate);
    }
}

// a from registers, fragments as multiply_add_16816 has them (warp w of the warpgroup holds rows 16 w to 16 w + 15).
template <typename T, bool kTransposed, int kCount>
MTBERT_DEVICE void multiply_registers(float (&d)[kCount], const std::uint32_t (&a)[4], std::uint64_t b,
                                      bool accumulate) {
    if constexpr (std::is_same_v<T, BF16>) {
        detail::registers_bf16<kTransposed>(d, a, b, accumulate);
    } else {
        detail::registers_fp16<kTransposed>(d, a, b, accumulate);
    }
}

}  // namespace mtbert::machine

#endif
