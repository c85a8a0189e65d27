// A small product with all that the real kernels do to shared memory: c [M, N] = a [M, K] b [N, K]^T of 16-bit
// elements, tiles of 64 x 32 x 32, four warps of 16 rows each, cp.async into kStages buffers, swizzled rows of 64
// bytes, ldmatrix. M, N and K are arbitrary; rows are a_stride and b_stride elements apart, multiples of 8.
#pragma once

#include "cuda/lora/machine.h"

namespace mtbert::machine::mini {

constexpr int kTileM = 64;
constexpr int kTileN = 32;
constexpr int kTileK = 32;
constexpr int kStages = 3;
constexpr int kThreads = 128;
constexpr int kRowBytes = 2 * kTileK;
constexpr int kStageBytes = (kTileM + kTileN) * kRowBytes;
constexpr int kSharedBytes = kStages * kStageBytes;

// The byte of 16-byte piece `piece` (0 to 3) of a row. Two rows fill the banks once, so the pieces change places
// every two rows: eight rows of one piece then touch every bank once.
MTBERT_DEVICE int swizzled(int row, int piece) { return row * kRowBytes + 16 * (piece ^ (row / 2 % 4)); }

template <typename T>
MTBERT_DEVICE void load_rows(Shared target, const T* source, int rows, int first_row, int row_count, int k, int depth,
                             std::int64_t stride) {
    for (int i = thread_index(); i < rows * 4; i += kThreads) {
        const int row = i / 4, piece = i % 4;
        const int left = depth - (k + 8 * piece);
        const bool inside = first_row + row < row_count && left > 0;
        const int bytes = inside ? 2 * (left < 8 ? left : 8) : 0;
        const T* const from = inside ? source + (first_row + row) * stride + k + 8 * piece : source;
        copy_async16(target + swizzled(row, piece), from, bytes);
    }
}

template <typename T>
MTBERT_DEVICE void load_stage(Shared stage, const T* a, const T* b, int m, int n, int depth, std::int64_t a_stride,
                              std::int64_t b_stride, int step) {
    load_rows(stage, a, kTileM, block_index_x() * kTileM, m, step * kTileK, depth, a_stride);
    load_rows(stage + kTileM * kRowBytes, b, kTileN, host::place.block.y * kTileN, n, step * kTileK, depth, b_stride);
}

template <typename T>
MTBERT_KERNEL(kThreads, 1) void product(const T* a, const T* b, float* c, int m, int n, int depth,
                                        std::int64_t a_stride, std::int64_t b_stride) {
    const Shared shared = shared_start();
    const int steps = (depth + kTileK - 1) / kTileK;
    const int warp = warp_index(), lane = lane_index();
    for (int step = 0; step < kStages - 1; ++step) {
        if (step < steps) {
            load_stage(shared + step * kStageBytes, a, b, m, n, depth, a_stride, b_stride, step);
        }
        copy_async_commit();
    }
    float sums[kTileN / 8][4] = {};
    for (int step = 0; step < steps; ++step) {
        copy_async_wait<kStages - 2>();
        block_barrier();  // this step's tile is there, and the last step's is not needed any more
        const int next = step + kStages - 1;
        if (next < steps) {
            load_stage(shared + next % kStages * kStageBytes, a, b, m, n, depth, a_stride, b_stride, next);
        }
        copy_async_commit();
        const Shared a_tile = shared + step % kStages * kStageBytes;
        const Shared b_tile = a_tile + kTileM * kRowBytes;
        for (int half = 0; half < kTileK / 16; ++half) {
            std::uint32_t a_fragment[4];
            load_matrix_x4(a_fragment, a_tile + swizzled(warp * 16 + lane % 16, 2 * half + lane / 16));
            for (int tile = 0; tile < kTileN / 8; ++tile) {
                std::uint32_t b_fragment[2];
                load_matrix_x2(b_fragment, b_tile + swizzled(tile * 8 + lane % 8, 2 * half + lane / 8 % 2));
                multiply_add_16816<T>(sums[tile], a_fragment, b_fragment);
            }
        }
    }
    for (int tile = 0; tile < kTileN / 8; ++tile) {
        for (int i = 0; i < 4; ++i) {
            const int row = block_index_x() * kTileM + warp * 16 + lane / 4 + 8 * (i / 2);
            const int column = host::place.block.y * kTileN + tile * 8 + 2 * (lane % 4) + i % 2;
            if (row < m && column < n) {
                store_global(c + static_cast<std::int64_t>(row) * n + column, sums[tile][i]);
            }
        }
    }
}

}  // namespace mtbert::machine::mini
