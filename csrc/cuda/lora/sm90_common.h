// What the sm_90a kernels share: the start and the end of a block, the dropout mask in fragments, the way of a tile
// from the accumulators to memory.
#pragma once

#include <type_traits>

#include "common/philox.h"
#include "cuda/lora/sm90_layout.h"
#include "cuda/lora/sm90_machine.h"

namespace mtbert::cuda::sm90 {

using machine::Shared;
using machine::TensorMap;

// Where a thread is. The warps of the loading warpgroup come first; `warp` counts those that multiply, and is
// negative in the others.
struct Place {
    int warp;
    int lane;
    int rank;     // of the block in its cluster
    int cluster;  // of all clusters
};

MTBERT_DEVICE Place find_place(int cluster_size) {
    return Place{machine::warp_index() - kWarpgroup / kWarp, machine::lane_index(), machine::cluster_rank(),
                 machine::block_index_x() / cluster_size};
}

// Makes the barriers of the ring; every thread of the cluster passes here before it uses one.
MTBERT_DEVICE Shared start_block(const Memory& memory, int cluster_size) {
    const Shared shared = machine::swizzled_shared_start();
    if (machine::thread_index() == 0) {
        if (shared.address % kAtomBytes != 0) {
            machine::fail();
        }
        for (int stage = 0; stage < memory.stages; ++stage) {
            machine::barrier_init(shared + memory.full(stage), 1);
            machine::barrier_init(shared + memory.empty(stage), empty_arrivals(cluster_size));
        }
        machine::barrier_init_fence();
    }
    machine::warp_barrier();
    machine::cluster_barrier();
    return shared;
}

// A block stays until the others of its cluster need its shared memory and its barriers no more. The loading lane's
// warp waits for it.
MTBERT_DEVICE void end_block() {
    machine::warp_barrier();
    machine::cluster_barrier();
}

// Hands a stage back to the loading warps of all blocks that write to it. The warp's reads of it are complete.
MTBERT_DEVICE void release(Shared shared, const Memory& memory, int stage, int cluster_size, int lane) {
    machine::warp_barrier();
    if (lane < cluster_size) {
        machine::barrier_arrive_at(shared + memory.empty(stage), lane);
    }
}

// The step of the run, where it is known on the device only.
MTBERT_DEVICE DropoutKey with_step(DropoutKey key, const void* step_pointer) {
    if (key.threshold != 0 && step_pointer != nullptr) {
        key.step = machine::load_global<machine::Words2>(step_pointer).word[0];
    }
    return key;
}

// The row of the mask that this lane draws for, of a warp whose first row is `row`. Rows beyond the last are not
// stored.
MTBERT_DEVICE std::uint32_t load_dropout_row(const void* dropout_row, int row, int rows, int lane) {
    const int mine = row + draw_row(lane);
    return machine::load_global<std::uint32_t>(static_cast<const char*>(dropout_row) +
                                               4 * static_cast<std::int64_t>(mine < rows ? mine : rows - 1));
}

// Four words of each lane of a quad, transposed: word i of lane q becomes word q of lane i.
MTBERT_DEVICE void transpose_quad(std::uint32_t (&word)[4], int lane) {
    MTBERT_UNROLL
    for (int distance = 1; distance <= 2; distance *= 2) {
        const bool upper = (lane & distance) != 0;
        MTBERT_UNROLL
        for (int low = 0; low < 4; ++low) {
            if ((low & distance) == 0) {
                const int high = low | distance;
                const std::uint32_t received = machine::shuffle_xor(upper ? word[low] : word[high], distance);
                word[low] = upper ? received : word[low];
                word[high] = upper ? word[high] : received;
            }
        }
    }
}

// The mask of 16 columns, from those of draw `group`: word[i] holds the two 16-bit lanes of register i of a fragment
// (operand_row and operand_column).
MTBERT_DEVICE void draw_mask(std::uint32_t (&word)[4], const DropoutKey& key, std::uint32_t dropout_row,
                             std::uint32_t group, int lane) {
    const Philox4 draw = dropout_draw(key, dropout_row, group + static_cast<std::uint32_t>(draw_group(lane)));
    MTBERT_UNROLL
    for (int i = 0; i < 4; ++i) {
        word[i] = draw.word[i];
    }
    transpose_quad(word, lane);
}

// A 16-bit lane is compared where it stands, in the high half: `limit` is the threshold there.
MTBERT_DEVICE bool kept_low(std::uint32_t word, std::uint32_t limit) { return word << 16 >= limit; }
MTBERT_DEVICE bool kept_high(std::uint32_t word, std::uint32_t limit) { return word >= limit; }

// Zero for what is dropped of two elements, whatever they are.
MTBERT_DEVICE std::uint32_t apply_mask(std::uint32_t pair, std::uint32_t word, std::uint32_t limit) {
    pair = kept_low(word, limit) ? pair : pair & 0xFFFF0000u;
    return kept_high(word, limit) ? pair : pair & 0x0000FFFFu;
}

// What a tile's accumulators are stored with: for register pair i of the accumulators' columns 8 i + 2 q and the
// next, the two elements of the bias as they lie in memory. Loaded early, they are there when the products end.
template <int kColumns>
struct Bias {
    std::uint32_t pair[kColumns / 8] = {};

    // From a vector of `end` elements, or none, starting at `column`; zeros beyond its end. `paired`: its elements 2
    // i and 2 i + 1 share an aligned word.
    MTBERT_DEVICE void load(const void* vector, int column, int end, bool paired, int lane) {
        const int first = column + accumulator_column(lane, 0);
        const int left = end - first;
        const auto* source = static_cast<const char*>(vector) + kElementBytes * static_cast<std::int64_t>(first);
        // Two loops: in one, every load would be waited for before the next.
        if (paired) {
            MTBERT_UNROLL
            for (int i = 0; i < kColumns / 8; ++i) {
                if (8 * i < left) {
                    pair[i] = machine::load_global<std::uint32_t>(source + kElementBytes * 8 * i);
                }
            }
        } else {
            MTBERT_UNROLL
            for (int i = 0; i < kColumns / 8; ++i) {
                if (8 * i < left) {
                    const auto low = machine::load_global<std::uint16_t>(source + kElementBytes * 8 * i);
                    const auto high = machine::load_global<std::uint16_t>(source + kElementBytes * (8 * i + 1));
                    pair[i] = low | static_cast<std::uint32_t>(high) << 16;
                }
            }
        }
    }
};

struct NoBias {};

// Where a warp's part of a tile goes: the coordinates of the map are column, block of outputs, row.
struct Target {
    int row;  // the warp's first
    int block;
    int column;
    int rows;
    int columns;
};

// Rounds the accumulators, after the bias is added, and stores them: 64 columns at a time through this warp's
// buffers, each of which waits until TMA has read what it held.
template <typename T, int kStores, int kCount, typename AnyBias>
MTBERT_DEVICE void store_tile(const float (&accumulator)[kCount], Shared shared, const Memory& memory,
                              const Place& place, const TensorMap& map, const Target& target,
                              const AnyBias& bias) {
    constexpr int kBlocks = kCount / (kStoreColumns / 2);
    constexpr int kPairs = kStoreColumns / kPairColumns;
    static_assert(kBlocks % kStores == 0);
    MTBERT_UNROLL
    for (int block = 0; block < kBlocks; ++block) {
        const Shared buffer = shared + memory.store(place.warp, block % kStores);
        const int column = target.column + kStoreColumns * block;
        if (place.lane == 0) {
            machine::tma_store_wait_read<kStores - 1>();
        }
        machine::warp_barrier();
        MTBERT_UNROLL
        for (int pair = 0; pair < kPairs; ++pair) {
            std::uint32_t word[4];
            MTBERT_UNROLL
            for (int half = 0; half < 2; ++half) {
                const int first = kStoreColumns / 2 * block + 8 * pair + 4 * half;
                float value[4];
                MTBERT_UNROLL
                for (int k = 0; k < 4; ++k) {
                    value[k] = accumulator[first + k];
                    if constexpr (!std::is_same_v<AnyBias, NoBias>) {
                        value[k] += machine::unpack<T>(bias.pair[first / 4], k & 1);
                    }
                }
                word[2 * half] = machine::pack<T>(value[0], value[1]);
                word[2 * half + 1] = machine::pack<T>(value[2], value[3]);
            }
            machine::store_matrix_x4(
                buffer + tile_offset(matrix_row(place.lane), 2 * pair + matrix_chunk(place.lane)), word);
        }
        machine::async_fence();
        machine::warp_barrier();
        if (place.lane == 0) {
            if (target.row < target.rows && column < target.columns) {
                machine::tma_store(map, buffer, column, target.block, target.row);
            }
            machine::tma_store_commit();
        }
    }
}

}  // namespace mtbert::cuda::sm90
