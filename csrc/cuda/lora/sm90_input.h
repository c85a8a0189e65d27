// dx = dy W + dropout'(ds A), in one kernel of Hopper's instructions.
//
// Blocks, clusters and the ring are those of the forward kernel. The accumulators of a tile start as ds A, are masked
// and scaled in registers, and dy W is added on top. W and A are read as they lie in memory: their rows run along the
// sum. The mask of a tile is drawn while the products of the tile before run (of the first, while its loads are under
// way) and kept as one bit an element.
#pragma once

#include "cuda/lora/sm90_common.h"

namespace mtbert::cuda::sm90 {

struct InputArguments {
    TensorMap grad;    // N, rows
    TensorMap weight;  // K, N
    TensorMap ds;      // blocks * R, rows
    TensorMap a;       // K, blocks * R
    TensorMap dx;      // K, 1, rows
    const void* dropout_row;
    const void* step_pointer;
    DropoutKey key;  // threshold 0: no dropout
    int rows;
    int slices;      // of 64 along N
    int low_slices;  // of 64 along blocks * R
    int low_steps;   // of 16 along blocks * R
    Schedule schedule;
};

// The loading thread.
template <int kColumns>
MTBERT_DEVICE void input_load(const InputArguments& arguments, Shared shared, const Place& place) {
    const Memory memory = StaticMemory<kColumns, 0>::get();
    const Schedule& schedule = arguments.schedule;
    const int cluster = schedule.cluster;
    const int everyone = (1 << cluster) - 1;
    const int part_rows = kDepth / cluster, part = place.rank * part_rows;
    Ring ring;
    const int begin = schedule.begin(place.cluster), end = schedule.end(place.cluster);
    for (int index = begin; index < end; ++index) {
        const Tile tile = schedule.tile(index, place.rank);
        for (int slice = -arguments.low_slices; slice < arguments.slices; ++slice) {
            const bool low = slice < 0;
            const int depth = kDepth * (low ? slice + arguments.low_slices : slice);
            const TensorMap& first_map = low ? arguments.ds : arguments.grad;
            const TensorMap& second_map = low ? arguments.a : arguments.weight;
            const Shared stage = shared + memory.stage(ring.stage);
            const Shared full = shared + memory.full(ring.stage);
            machine::barrier_wait(shared + memory.empty(ring.stage), ring.phase ^ 1u);
            machine::barrier_arrive_expect(full, product_bytes(memory, false));
            machine::tma_load(stage, first_map, full, depth, tile.row);
            for (int block = 0; block < kColumns / kStoreColumns; ++block) {
                const Shared target = stage + memory.second() + block * kColumnBlockBytes + part * kRowBytes;
                const int column = tile.column + kStoreColumns * block;
                if (cluster == 1) {
                    machine::tma_load(target, second_map, full, column, depth + part);
                } else {
                    machine::tma_load_multicast(target, second_map, full, everyone, column, depth + part);
                }
            }
            ring.advance(memory.stages);
        }
    }
}

// A warp of a multiplying warpgroup.
template <typename T, int kColumns>
struct InputWarp {
    using Plan = StaticMemory<kColumns, 0>;
    static constexpr int kPairs = kColumns / kPairColumns;
    static constexpr int kWords = kPairs / 4;
    const InputArguments& arguments;
    const Shared shared;
    const Place place;
    const DropoutKey key;
    Ring ring{};
    float accumulator[kColumns / 2] = {};
    std::uint32_t kept[kWords] = {};  // a bit for every accumulator, as pair_shift orders them

    MTBERT_DEVICE Shared wait_for_stage() const {
        machine::barrier_wait(shared + Plan::get().full(ring.stage), ring.phase);
        return shared + Plan::get().stage(ring.stage);
    }

    MTBERT_DEVICE void release_stage(int stage) const {
        release(shared, Plan::get(), stage, arguments.schedule.cluster, place.lane);
    }

    // accumulator += one step of the products of a stage
    MTBERT_DEVICE void multiply(Shared stage, int step, bool accumulate) {
        const Shared first = stage + place.warp / 4 * kWarpgroupRows * kRowBytes;
        const Shared second = stage + Plan::get().second();
        machine::multiply_shared<T, true>(accumulator, descriptor_rows(first.address) + kRowsStep * step,
                                          descriptor_columns(second.address) + kColumnsStep * step, accumulate);
    }

    // The mask of the next 16 columns of a tile, pushed behind those of the columns before them.
    MTBERT_DEVICE void draw_pair(const Tile& tile, int pair, std::uint32_t dropout_row) {
        const std::uint32_t limit = key.threshold << 16;
        std::uint32_t word[4];
        draw_mask(word, key, dropout_row,
                  static_cast<std::uint32_t>(tile.column / kDropoutLanes + pair * (kPairColumns / kDropoutLanes)),
                  place.lane);
        MTBERT_UNROLL
        for (int i = kWords - 1; i > 0; --i) {
            kept[i] = kept[i] << 8 | kept[i - 1] >> 24;
        }
        kept[0] <<= 8;
        MTBERT_UNROLL
        for (int i = 0; i < 4; ++i) {
            kept[0] |= (kept_low(word[i], limit) ? 1u : 0u) << (2 * i);
            kept[0] |= (kept_high(word[i], limit) ? 1u : 0u) << (2 * i + 1);
        }
    }

    MTBERT_DEVICE std::uint32_t dropout_row(const Tile& tile) const {
        return load_dropout_row(arguments.dropout_row, tile.row + kWarpRows * place.warp, arguments.rows, place.lane);
    }

    // accumulator (+)= ds A of one slice: of as many steps as it has, known to the compiler, which otherwise would
    // have each product wait for the one before.
    template <int kCount>
    MTBERT_DEVICE void multiply_steps(Shared stage, bool accumulate) {
        machine::product_fence();
        MTBERT_UNROLL
        for (int step = 0; step < kCount; ++step) {
            multiply(stage, step, accumulate || step > 0);
        }
        machine::product_commit();
        machine::product_wait<0>();
        machine::hold(accumulator);
    }

    // accumulator = ds A
    MTBERT_DEVICE void multiply_low() {
        for (int slice = 0; slice < arguments.low_slices; ++slice) {
            const Shared stage = wait_for_stage();
            switch (arguments.low_steps - kSteps * slice) {
                case 1:
                    multiply_steps<1>(stage, slice > 0);
                    break;
                case 2:
                    multiply_steps<2>(stage, slice > 0);
                    break;
                case 3:
                    multiply_steps<3>(stage, slice > 0);
                    break;
                default:
                    multiply_steps<kSteps>(stage, slice > 0);
            }
            release_stage(ring.stage);
            ring.advance(Plan::kStages);
        }
    }

    MTBERT_DEVICE void mask_accumulator() {
        MTBERT_UNROLL
        for (int pair = 0; pair < kPairs; ++pair) {
            MTBERT_UNROLL
            for (int bit = 0; bit < 8; ++bit) {
                const int place_of_bit = pair_shift(kPairs, pair) + bit;
                float& value = accumulator[pair_accumulator(pair, bit >> 1, bit & 1)];
                value = (kept[place_of_bit / 32] >> (place_of_bit % 32) & 1u) != 0 ? value * key.scale : 0.0f;
            }
        }
        machine::hold(accumulator);
    }

    // The accumulators of a tile; with dropout also the mask of the next one, where there is one. The two cases are
    // apart as a whole: with accumulators that are masked or not, the compiler would have the products wait for each
    // other.
    template <bool kDropout>
    MTBERT_DEVICE void compute_tile(bool more, const Tile& next) {
        multiply_low();
        if constexpr (kDropout) {
            mask_accumulator();
        }
        const bool draw = kDropout && more;
        const std::uint32_t row = draw ? dropout_row(next) : 0;
        const int at_once = draw ? (kPairs + arguments.slices - 1) / arguments.slices : 0;
        int pair = 0;
        int previous = 0;
        for (int slice = 0; slice < arguments.slices; ++slice) {
            const Shared stage = wait_for_stage();
            machine::product_fence();
            MTBERT_UNROLL
            for (int step = 0; step < kSteps; ++step) {
                multiply(stage, step, true);
            }
            machine::product_commit();
            if constexpr (kDropout) {
                for (int count = 0; count < at_once && pair < kPairs; ++count) {
                    draw_pair(next, pair++, row);
                }
            }
            machine::product_wait<1>();
            if (slice > 0) {
                release_stage(previous);
            }
            previous = ring.stage;
            ring.advance(Plan::kStages);
        }
        machine::product_wait<0>();
        release_stage(previous);
        machine::hold(accumulator);
    }

    MTBERT_DEVICE void run() {
        const Schedule& schedule = arguments.schedule;
        const int begin = schedule.begin(place.cluster), end = schedule.end(place.cluster);
        const bool dropout = key.threshold != 0;
        if (dropout && begin < end) {
            const Tile tile = schedule.tile(begin, place.rank);
            const std::uint32_t row = dropout_row(tile);
            for (int pair = 0; pair < kPairs; pair += 4) {
                MTBERT_UNROLL
                for (int i = 0; i < 4; ++i) {
                    draw_pair(tile, pair + i, row);
                }
            }
        }
        for (int index = begin; index < end; ++index) {
            const Tile tile = schedule.tile(index, place.rank);
            const bool more = index + 1 < end;
            const Tile next = schedule.tile(more ? index + 1 : index, place.rank);
            if (dropout) {
                compute_tile<true>(more, next);
            } else {
                compute_tile<false>(more, next);
            }
            store_tile<T, Plan::kStores>(accumulator, shared, Plan::get(), place, arguments.dx,
                                         Target{tile.row + kWarpRows * place.warp, 0, tile.column, arguments.rows,
                                                schedule.block_columns},
                                         NoBias{});
        }
        if (place.lane == 0) {
            machine::tma_store_wait_read<0>();
        }
        machine::warp_barrier();
    }
};

template <typename T, int kColumns>
MTBERT_DEVICE void input_block(const InputArguments& arguments) {
    const int cluster = arguments.schedule.cluster;
    const Place place = find_place(cluster);
    if (machine::thread_index() == 0) {
        machine::tma_prefetch(arguments.grad);
        machine::tma_prefetch(arguments.weight);
        machine::tma_prefetch(arguments.dx);
    }
    const Shared shared = start_block(StaticMemory<kColumns, 0>::get(), cluster);
    if (place.warp < 0) {
        machine::fewer_registers<kProducerRegisters>();
        if (machine::thread_index() == 0) {
            input_load<kColumns>(arguments, shared, place);
        }
    } else {
        machine::more_registers<kConsumerRegisters>();
        const DropoutKey key = with_step(arguments.key, arguments.step_pointer);
        InputWarp<T, kColumns>{arguments, shared, place, key}.run();
    }
    end_block();
}

template <typename T, int kColumns>
MTBERT_KERNEL(kThreads, 1) void input_kernel(const MTBERT_GRID_CONSTANT InputArguments arguments) {
#ifdef MTBERT_SM90A_CODE
    input_block<T, kColumns>(arguments);
#else
    machine::fail();
#endif
}

}  // namespace mtbert::cuda::sm90
