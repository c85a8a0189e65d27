// y = x W^T + bias + s B^T with s = scale * dropout(x) A^T, in one kernel of Hopper's instructions.
//
// A block computes tiles of 128 rows, 64 for each of its two multiplying warpgroups; one thread of the third loads x,
// W, A and B through a ring of stages. A cluster of two blocks shares W, A and B. The rows of s are computed beside
// the first tile that needs them, from the x in shared memory: without dropout as a product of its own, with dropout
// from fragments that are masked in registers while the product with W runs. The registers that hold s are the
// fragments of the product with B, so that s needs no shared memory, and the following tiles of the same rows and the
// same block of outputs use them again.
#pragma once

#include "cuda/lora/sm90_common.h"

namespace mtbert::cuda::sm90 {

struct ForwardArguments {
    TensorMap x;       // K, rows
    TensorMap weight;  // K, N
    TensorMap a;       // K, R, blocks
    TensorMap b;       // R, N
    TensorMap out;     // outputs of a block, blocks, rows
    const void* bias;
    void* s;
    const void* dropout_row;
    const void* step_pointer;
    DropoutKey key;  // threshold 0: no dropout
    float s_factor;  // what the sums of s are multiplied by
    int rows;
    int slices;  // of 64 along K
    int rank;    // in memory, where s has blocks * rank columns
    LoraRanks ranks;
    int blocks;
    Schedule schedule;
    bool s_given;      // s is read, A is not looked at
    bool bias_paired;  // the bias starts on a multiple of 4 bytes
};

// Whether a cluster computes s with this tile: with the first of its own, and with the first of rows and block of
// outputs.
MTBERT_DEVICE bool computes_s(const ForwardArguments& arguments, const Tile& tile, bool first_of_cluster) {
    return !arguments.s_given && (first_of_cluster || tile.first);
}

// The loading thread.
template <int kColumns, int kRank>
MTBERT_DEVICE void forward_load(const ForwardArguments& arguments, Shared shared, const Place& place) {
    const Memory memory = StaticMemory<kColumns, kRank>::get();
    const Schedule& schedule = arguments.schedule;
    const int cluster = schedule.cluster;
    const int everyone = (1 << cluster) - 1;
    const int weight_rows = kColumns / cluster, weight_part = place.rank * weight_rows;
    const int a_rows = kRank / cluster, a_part = place.rank * a_rows;
    Ring ring;
    // Asks for a part of a matrix that all blocks of the cluster need.
    const auto load_shared_part = [&](Shared target, const TensorMap& map, Shared full, auto... coordinates) {
        if (cluster == 1) {
            machine::tma_load(target, map, full, coordinates...);
        } else {
            machine::tma_load_multicast(target, map, full, everyone, coordinates...);
        }
    };
    const int begin = schedule.begin(place.cluster), end = schedule.end(place.cluster);
    for (int index = begin; index < end; ++index) {
        const Tile tile = schedule.tile(index, place.rank);
        const int weight_row = tile.block * schedule.block_columns + tile.column + weight_part;
        const bool with_a = computes_s(arguments, tile, index == begin);
        for (int slice = 0; slice <= arguments.slices; ++slice) {
            const Shared stage = shared + memory.stage(ring.stage);
            const Shared second = stage + memory.second() + weight_part * kRowBytes;
            const Shared full = shared + memory.full(ring.stage);
            machine::barrier_wait(shared + memory.empty(ring.stage), ring.phase ^ 1u);
            if (slice < arguments.slices) {
                machine::barrier_arrive_expect(full, product_bytes(memory, with_a));
                machine::tma_load(stage, arguments.x, full, slice * kDepth, tile.row);
                load_shared_part(second, arguments.weight, full, slice * kDepth, weight_row);
                if (with_a) {
                    load_shared_part(stage + memory.third() + a_part * kRowBytes, arguments.a, full, slice * kDepth,
                                     a_part, tile.block);
                }
            } else {
                machine::barrier_arrive_expect(full, second_item_bytes(memory));
                load_shared_part(second, arguments.b, full, 0, weight_row);
            }
            ring.advance(memory.stages);
        }
    }
}

// A warp of a multiplying warpgroup.
template <typename T, int kColumns, int kRank>
struct ForwardWarp {
    using Plan = StaticMemory<kColumns, kRank>;
    const ForwardArguments& arguments;
    const Shared shared;
    const Place place;
    const DropoutKey key;
    Ring ring{};
    float accumulator[kColumns / 2] = {};
    float low[kRank / 2] = {};               // the sums of s
    std::uint32_t s[kRank / kStep][4] = {};  // rounded, as fragments

    // Bytes to this warpgroup's rows of a tile.
    MTBERT_DEVICE int warpgroup_offset() const { return place.warp / 4 * kWarpgroupRows * kRowBytes; }

    MTBERT_DEVICE Shared wait_for_stage() const {
        machine::barrier_wait(shared + Plan::get().full(ring.stage), ring.phase);
        return shared + Plan::get().stage(ring.stage);
    }

    MTBERT_DEVICE void release_stage(int stage) const {
        release(shared, Plan::get(), stage, arguments.schedule.cluster, place.lane);
    }

    MTBERT_DEVICE void hold_all() {
        machine::hold(accumulator);
        machine::hold(low);
    }

    // accumulator += x W^T of a stage
    MTBERT_DEVICE void multiply_weight(Shared stage, bool first) {
        const std::uint64_t x = descriptor_rows((stage + warpgroup_offset()).address);
        const std::uint64_t weight = descriptor_rows((stage + Plan::get().second()).address);
        MTBERT_UNROLL
        for (int step = 0; step < kSteps; ++step) {
            machine::multiply_shared<T, false>(accumulator, x + kRowsStep * step, weight + kRowsStep * step,
                                               !first || step > 0);
        }
    }

    // low += x A^T of a stage
    MTBERT_DEVICE void multiply_a(Shared stage, bool first) {
        const std::uint64_t x = descriptor_rows((stage + warpgroup_offset()).address);
        const std::uint64_t a = descriptor_rows((stage + Plan::get().third()).address);
        MTBERT_UNROLL
        for (int step = 0; step < kSteps; ++step) {
            machine::multiply_shared<T, false>(low, x + kRowsStep * step, a + kRowsStep * step, !first || step > 0);
        }
    }

    // All slices of x W^T, and of x A^T where asked. One group of products stays under way while the next slice is
    // awaited.
    template <bool kWithA>
    MTBERT_DEVICE void sum_slices() {
        int previous = 0;
        for (int slice = 0; slice < arguments.slices; ++slice) {
            const Shared stage = wait_for_stage();
            machine::product_fence();
            multiply_weight(stage, slice == 0);
            if constexpr (kWithA) {
                multiply_a(stage, slice == 0);
            }
            machine::product_commit();
            machine::product_wait<1>();
            if (slice > 0) {
                release_stage(previous);
            }
            previous = ring.stage;
            ring.advance(Plan::kStages);
        }
        machine::product_wait<0>();
        release_stage(previous);
        hold_all();
    }

    // The same with a masked x for A: while the products with W run, the mask is drawn and applied to fragments of x.
    MTBERT_DEVICE void sum_slices_masked(std::uint32_t dropout_row) {
        const std::uint32_t limit = key.threshold << 16;
        std::uint32_t x[kSteps][4];
        int previous = 0;
        for (int slice = 0; slice < arguments.slices; ++slice) {
            const Shared stage = wait_for_stage();
            machine::product_fence();
            multiply_weight(stage, slice == 0);
            machine::product_commit();
            std::uint32_t mask[kSteps][4];
            MTBERT_UNROLL
            for (int step = 0; step < kSteps; ++step) {
                draw_mask(mask[step], key, dropout_row,
                          static_cast<std::uint32_t>(slice * (kDepth / kDropoutLanes) + step * (kStep / kDropoutLanes)),
                          place.lane);
            }
            // The previous slice's products with A have read their fragments, and its stage is free.
            machine::product_wait<1>();
            if (slice > 0) {
                release_stage(previous);
            }
            MTBERT_UNROLL
            for (int step = 0; step < kSteps; ++step) {
                machine::load_matrix_x4(x[step], stage + tile_offset(kWarpRows * place.warp + matrix_row(place.lane),
                                                                     2 * step + matrix_chunk(place.lane)));
                MTBERT_UNROLL
                for (int i = 0; i < 4; ++i) {
                    x[step][i] = apply_mask(x[step][i], mask[step][i], limit);
                }
                machine::hold(x[step]);
            }
            machine::product_fence();
            const std::uint64_t a = descriptor_rows((stage + Plan::get().third()).address);
            MTBERT_UNROLL
            for (int step = 0; step < kSteps; ++step) {
                machine::multiply_registers<T, false>(low, x[step], a + kRowsStep * step, slice > 0 || step > 0);
            }
            machine::product_commit();
            previous = ring.stage;
            ring.advance(Plan::kStages);
        }
        machine::product_wait<0>();
        MTBERT_UNROLL
        for (int step = 0; step < kSteps; ++step) {
            machine::hold(x[step]);
        }
        release_stage(previous);
        hold_all();
    }

    // The fragments of s from its sums: the registers of two neighbouring 8-column tiles are those of one first
    // operand. Columns beyond the block's rank become zero, whatever their sums.
    MTBERT_DEVICE void round_s(int rank) {
        MTBERT_UNROLL
        for (int step = 0; step < kRank / kStep; ++step) {
            MTBERT_UNROLL
            for (int i = 0; i < 4; ++i) {
                const int first = pair_accumulator(step, i, 0);
                const int left = rank - kStep * step - operand_column(place.lane, i);
                s[step][i] = machine::pack<T>(left > 0 ? low[first] * arguments.s_factor : 0.0f,
                                              left > 1 ? low[first + 1] * arguments.s_factor : 0.0f);
            }
        }
    }

    // Calls f(register of s, its address) for what this thread holds of s within the matrix.
    template <typename F>
    MTBERT_DEVICE void for_each_s(const Tile& tile, const F& f) {
        const std::int64_t stride = static_cast<std::int64_t>(arguments.blocks) * arguments.rank;
        MTBERT_UNROLL
        for (int step = 0; step < kRank / kStep; ++step) {
            MTBERT_UNROLL
            for (int i = 0; i < 4; ++i) {
                const int row = tile.row + kWarpRows * place.warp + operand_row(place.lane, i);
                const int column = kStep * step + operand_column(place.lane, i);
                if (row < arguments.rows && column < arguments.rank) {
                    f(s[step][i], static_cast<char*>(arguments.s) +
                                      kElementBytes * (row * stride + tile.block * arguments.rank + column));
                }
            }
        }
    }

    MTBERT_DEVICE void read_s(const Tile& tile) {
        MTBERT_UNROLL
        for (int step = 0; step < kRank / kStep; ++step) {
            MTBERT_UNROLL
            for (int i = 0; i < 4; ++i) {
                s[step][i] = 0;
            }
        }
        for_each_s(tile, [](std::uint32_t& word, char* source) { word = machine::load_global<std::uint32_t>(source); });
    }

    MTBERT_DEVICE void write_s(const Tile& tile) {
        for_each_s(tile, [](std::uint32_t& word, char* target) { machine::store_global(target, word); });
    }

    // accumulator += s B^T
    MTBERT_DEVICE void add_adapter() {
        const Shared stage = wait_for_stage();
        const std::uint64_t b = descriptor_rows((stage + Plan::get().second()).address);
        MTBERT_UNROLL
        for (int step = 0; step < kRank / kStep; ++step) {
            machine::hold(s[step]);
        }
        machine::product_fence();
        MTBERT_UNROLL
        for (int step = 0; step < kRank / kStep; ++step) {
            machine::multiply_registers<T, false>(accumulator, s[step], b + kRowsStep * step, true);
        }
        machine::product_commit();
        machine::product_wait<0>();
        machine::hold(accumulator);
        MTBERT_UNROLL
        for (int step = 0; step < kRank / kStep; ++step) {
            machine::hold(s[step]);
        }
        release_stage(ring.stage);
        ring.advance(Plan::kStages);
    }

    MTBERT_DEVICE void run() {
        const Schedule& schedule = arguments.schedule;
        const int begin = schedule.begin(place.cluster), end = schedule.end(place.cluster);
        for (int index = begin; index < end; ++index) {
            const Tile tile = schedule.tile(index, place.rank);
            const int row = tile.row + kWarpRows * place.warp;
            if (computes_s(arguments, tile, index == begin)) {
                if (key.threshold != 0) {
                    sum_slices_masked(load_dropout_row(arguments.dropout_row, row, arguments.rows, place.lane));
                } else {
                    sum_slices<true>();
                }
                round_s(arguments.ranks.of(tile.block));
                if (tile.first) {
                    write_s(tile);
                }
            } else {
                if (arguments.s_given && (index == begin || tile.first)) {
                    read_s(tile);
                }
                sum_slices<false>();
            }
            Bias<kColumns> bias;
            if (arguments.bias != nullptr) {
                const int first = tile.block * schedule.block_columns;
                bias.load(arguments.bias, first + tile.column, first + schedule.block_columns, arguments.bias_paired,
                          place.lane);
            }
            add_adapter();
            store_tile<T, Plan::kStores>(
                accumulator, shared, Plan::get(), place, arguments.out,
                Target{row, tile.block, tile.column, arguments.rows, schedule.block_columns}, bias);
        }
        if (place.lane == 0) {
            machine::tma_store_wait_read<0>();
        }
        machine::warp_barrier();
    }
};

template <typename T, int kColumns, int kRank>
MTBERT_DEVICE void forward_block(const ForwardArguments& arguments) {
    const Memory memory = StaticMemory<kColumns, kRank>::get();
    const int cluster = arguments.schedule.cluster;
    const Place place = find_place(cluster);
    if (machine::thread_index() == 0) {
        machine::tma_prefetch(arguments.x);
        machine::tma_prefetch(arguments.weight);
        machine::tma_prefetch(arguments.b);
        machine::tma_prefetch(arguments.out);
    }
    const Shared shared = start_block(memory, cluster);
    if (place.warp < 0) {
        machine::fewer_registers<kProducerRegisters>();
        if (machine::thread_index() == 0) {
            forward_load<kColumns, kRank>(arguments, shared, place);
        }
    } else {
        machine::more_registers<kConsumerRegisters>();
        const DropoutKey key = with_step(arguments.key, arguments.step_pointer);
        ForwardWarp<T, kColumns, kRank>{arguments, shared, place, key}.run();
    }
    end_block();
}

template <typename T, int kColumns, int kRank>
MTBERT_KERNEL(kThreads, 1) void forward_kernel(const MTBERT_GRID_CONSTANT ForwardArguments arguments) {
#ifdef MTBERT_SM90A_CODE
    forward_block<T, kColumns, kRank>(arguments);
#else
    machine::fail();
#endif
}

}  // namespace mtbert::cuda::sm90
