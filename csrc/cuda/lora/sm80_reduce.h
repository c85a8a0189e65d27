// Adds the parts that other kernels left: of a gradient of each group of rows, in the order of the pieces, and of
// ds.
#pragma once

#include <cstdint>

#include "cuda/lora/machine.h"
#include "cuda/lora/sm80_pieces.h"
#include "cuda/lora/sm80_tile.h"

namespace mtbert::cuda::sm80 {

struct Reduce {
    const float* part;  // [pieces, elements]
    float* out;         // [groups, elements]
    Pieces pieces;
    std::int64_t elements;     // a multiple of 64
    int group_blocks;          // blocks for one group's gradient; 0: there is none to add
    const float* part_ds;      // [splits, ds_elements]
    char* ds;                  // of T
    std::int64_t ds_elements;  // a multiple of 8
    int splits;
    float scale;
};

constexpr int kReduceThreads = 256;
constexpr int kReduceWarps = kReduceThreads / 32;
constexpr int kReduceBlockElements = 32 * 4;  // of a gradient: four for each lane; warps share out the pieces
constexpr int kReduceSharedBytes = kReduceThreads * kPieceBytes;

MTBERT_DEVICE void add_words(float (&sum)[4], const Words4& words) {
    MTBERT_UNROLL
    for (int i = 0; i < 4; ++i) {
        sum[i] += machine::bits_float(words.word[i]);
    }
}

MTBERT_DEVICE Words4 as_words(const float (&sum)[4]) {
    return Words4{{machine::float_bits(sum[0]), machine::float_bits(sum[1]), machine::float_bits(sum[2]),
                   machine::float_bits(sum[3])}};
}

template <typename T>
MTBERT_KERNEL(256, 4)
void reduce_kernel(const Reduce p) {
    const std::int64_t gradient_blocks = static_cast<std::int64_t>(p.group_blocks) * p.pieces.groups;
    float sum[4] = {};
    if (machine::block_index_x() < gradient_blocks) {
        const int lane = machine::lane_index(), warp = machine::warp_index();
        const int group = machine::block_index_x() / p.group_blocks;
        const std::int64_t element =
            static_cast<std::int64_t>(machine::block_index_x() % p.group_blocks) * kReduceBlockElements + 4 * lane;
        const bool there = element < p.elements;
        const PieceRange range = find_range(p.pieces, group);
        if (there) {
            for (int number = range.first + warp; number <= range.last; number += kReduceWarps) {
                add_words(sum, machine::load_global<Words4>(p.part + number * p.elements + element));
            }
        }
        const Shared mine = machine::shared_start() + machine::thread_index() * kPieceBytes;
        machine::store_shared(mine, as_words(sum));
        machine::block_barrier();
        if (warp == 0 && there) {
            MTBERT_UNROLL
            for (int other = 1; other < kReduceWarps; ++other) {
                add_words(sum, machine::load_shared<Words4>(mine + other * 32 * kPieceBytes));
            }
            machine::store_global(p.out + group * p.elements + element, as_words(sum));
        }
        return;
    }
    const std::int64_t element =
        ((machine::block_index_x() - gradient_blocks) * kReduceThreads + machine::thread_index()) * 4;
    if (element < p.ds_elements) {
        for (int split = 0; split < p.splits; ++split) {
            add_words(sum, machine::load_global<Words4>(p.part_ds + split * p.ds_elements + element));
        }
        MTBERT_UNROLL
        for (int i = 0; i < 4; ++i) {
            sum[i] *= p.scale;
        }
        char* const target = p.ds + element * static_cast<int>(sizeof(T));
        if constexpr (kIsFloat<T>) {
            machine::store_global(target, as_words(sum));
        } else {
            const Words2 words{{machine::pack<T>(sum[0], sum[1]), machine::pack<T>(sum[2], sum[3])}};
            machine::store_global(target, words);
        }
    }
}

}  // namespace mtbert::cuda::sm80
