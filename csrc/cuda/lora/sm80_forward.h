// y = x W^T + bias + s B^T, with s = scale * dropout(x) A^T computed on the way (fused) or given.
//
// A block computes a tile of one block of outputs: 64 rows and 128 columns with four warps, or 128 rows and 256 columns
// with eight (the wide tile). A warp has 64 rows and a quarter of the columns. W's rows are read in the order that gives
// lane (g, q) of the accumulators the neighbouring columns 8 q to 8 q + 7 of each 32 of its warp, so they are stored
// from registers as whole pieces.
//
// The sum runs in steps of 64 bytes through a ring of stages filled by asynchronous copies: first over K, then
// over the rank, where the panel of x holds s instead and that of W holds B. In the fused kernel every warp also
// multiplies the first of its four 16-row tiles, masked in registers, with A: the four warps of the same rows take
// different tiles first, so that each element's mask is drawn once in the block, and s is theirs to write for the
// last steps.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/lora/lora.h"
#include "cuda/lora/machine.h"
#include "cuda/lora/sm80_mask.h"
#include "cuda/lora/sm80_tile.h"

namespace mtbert::cuda::sm80 {

struct Forward {
    const char* x;
    const char* weight;
    const char* bias;  // or null
    const char* a;     // not looked at where s is given
    const char* b;
    char* out;
    char* s;
    std::int64_t x_stride;    // bytes
    std::int64_t out_stride;  // bytes
    std::int64_t rows;
    int inputs;   // K
    int outputs;  // of one block
    int blocks;
    int rank;
    LoraRanks ranks;
    float s_scale;  // of the scale and the mask's scale
    Mask mask;
};

// The shape of a kernel's tile and its shared memory: kRowWarps rows of warps and four columns of them.
template <typename T, int kRank, int kRowWarps, int kUnits>
struct ForwardTile {
    static constexpr int kThreads = 128 * kRowWarps;
    static constexpr int kRows = 64 * kRowWarps;
    static constexpr int kColumns = 128 * kUnits;
    static constexpr int kAOffset = kColumns * kPanelBytes;  // after W's panel
    static constexpr int kXOffset = kAOffset + kRank * kPanelBytes;
    static constexpr int kStageBytes = kXOffset + kRows * kPanelBytes;
    // At most 99 KiB: what a block may have on 8.6, 8.9 and 12.x.
    static constexpr int kStages = kUnits == 1 ? 4 : 3;
    static constexpr int kSharedBytes = kStages * kStageBytes;
    static_assert(kSharedBytes <= 99 * 1024);
    // All of s is in shared memory at once.
    static_assert(kRank * static_cast<int>(sizeof(T)) <= kStages * kPanelBytes);
    // So many blocks of a multiprocessor share its 65,536 registers.
    static constexpr int kBlocks = kUnits > 1 ? 1 : kRank > 16 ? 2 : 3;
};

// s of one 16-row tile: tiles of 8 columns in units of up to four, in which lane (g, q) holds neighbouring columns.
template <int kRank>
struct LowTiles {
    static constexpr int kTiles = kRank > 8 ? kRank / 8 : 1;
    static constexpr int kUnit = kTiles < 4 ? kTiles : 4;
    // The row of A that lane 4 g + q reads for tile 0: it stands for column g of the tile.
    MTBERT_DEVICE static int row(int g) { return 2 * kUnit * (g / 2) + g % 2; }
    // How many rows further it reads for another tile.
    MTBERT_DEVICE static int further(int tile) { return tile / kUnit * 8 * kUnit + 2 * (tile % kUnit); }
    // The first of the neighbouring columns that lanes of this q hold of a unit.
    MTBERT_DEVICE static int first_column(int unit, int q) { return unit * 8 * kUnit + 2 * kUnit * q; }

    // Makes columns that only fill up the rank zero, whatever their sums. left_from(column): how many columns from this
    // one on are a block's own.
    template <typename LeftFrom>
    MTBERT_DEVICE static void clear_padding(float (&sum)[kTiles][4], const LeftFrom& left_from) {
        MTBERT_UNROLL
        for (int unit = 0; unit < kTiles / kUnit; ++unit) {
            const int left = left_from(first_column(unit, machine::lane_index() % 4));
            MTBERT_UNROLL
            for (int tile = 0; tile < kUnit; ++tile) {
                MTBERT_UNROLL
                for (int i = 0; i < 4; ++i) {
                    float& value = sum[unit * kUnit + tile][i];
                    value = 2 * tile + i % 2 < left ? value : 0.0f;
                }
            }
        }
    }
};

// The values of a lane for one row of a unit, scaled and rounded to T: kWords registers of neighbouring columns.
template <typename T, int kUnit>
struct LowWords {
    static constexpr int kWords = 2 * kUnit * static_cast<int>(sizeof(T)) / 4;
    static constexpr int kTogether = kWords < 4 ? kWords : 4;
    std::uint32_t word[kWords];

    template <int kTiles>
    MTBERT_DEVICE LowWords(const float (&sum)[kTiles][4], int unit, int half, float scale) {
        MTBERT_UNROLL
        for (int tile = 0; tile < kUnit; ++tile) {
            const float first = sum[unit * kUnit + tile][2 * half] * scale;
            const float second = sum[unit * kUnit + tile][2 * half + 1] * scale;
            if constexpr (kIsFloat<T>) {
                word[2 * tile] = machine::float_bits(first);
                word[2 * tile + 1] = machine::float_bits(second);
            } else {
                word[tile] = machine::pack<T>(first, second);
            }
        }
    }

    // store(bytes from the first, words), in pieces of up to 16 bytes.
    template <typename Store>
    MTBERT_DEVICE void each(Store&& store) const {
        MTBERT_UNROLL
        for (int first = 0; first < kWords; first += kTogether) {
            machine::Words<kTogether> words;
            MTBERT_UNROLL
            for (int i = 0; i < kTogether; ++i) {
                words.word[i] = word[first + i];
            }
            store(4 * first, words);
        }
    }
};

// kRank: the most columns of s of a block of outputs; 0 where s is given. A warp has kUnits times 32 columns.
template <typename T, int kRank, bool kDropout, int kRowWarps, int kUnits>
MTBERT_KERNEL(128 * kRowWarps, (ForwardTile<T, kRank, kRowWarps, kUnits>::kBlocks))
void forward_kernel(const Forward p) {
    using Tile = ForwardTile<T, kRank, kRowWarps, kUnits>;
    constexpr bool kFused = kRank > 0;
    constexpr int kElement = static_cast<int>(sizeof(T)), kStages = Tile::kStages;
    constexpr int kTiles = 4 * kUnits;  // of 8 columns
    // Where s has no more than 32 bytes a row, one product does for it.
    constexpr bool kShort = kFused && kRank * kElement <= kPanelBytes / 2;

    const int lane = machine::lane_index(), warp = machine::warp_index();
    const int g = lane / 4, q = lane % 4, warp_row = warp / 4, warp_column = warp % 4;

    // The tiles of the same rows follow each other, so that they run together and x is read from memory once.
    const int tiles = (p.outputs + Tile::kColumns - 1) / Tile::kColumns;
    const int tile = machine::block_index_x() % (p.blocks * tiles);
    const int block = tile / tiles;
    const int first_column = tile % tiles * Tile::kColumns;  // in the block of outputs
    const std::int64_t first_row =
        static_cast<std::int64_t>(machine::block_index_x() / (p.blocks * tiles)) * Tile::kRows;
    const std::int64_t first_output = static_cast<std::int64_t>(block) * p.outputs + first_column;
    const int rows_there = static_cast<int>(p.rows - first_row < Tile::kRows ? p.rows - first_row : Tile::kRows);
    const int columns_there = p.outputs - first_column;

    const int x_bytes = p.inputs * kElement, rank_bytes = p.rank * kElement;
    const int main_steps = (x_bytes + kPanelBytes - 1) / kPanelBytes;
    const int tail_steps = (rank_bytes + kPanelBytes - 1) / kPanelBytes;
    const std::int64_t s_stride = static_cast<std::int64_t>(p.blocks) * rank_bytes;
    const auto s = [&] { return p.s + first_row * s_stride + block * rank_bytes; };

    const Shared start = machine::shared_start();
    Ring<kStages, Tile::kStageBytes> reads, writes;
    PanelCopy<Tile::kRows, Tile::kThreads> x_copy(p.x + first_row * p.x_stride, p.x_stride, rows_there);
    PanelCopy<Tile::kColumns, Tile::kThreads> weight_copy(p.weight + first_output * x_bytes, x_bytes, columns_there);
    PanelCopy<kRank, Tile::kThreads> a_copy(p.a + static_cast<std::int64_t>(block) * p.rank * x_bytes, x_bytes,
                                            p.rank);
    int copy_byte = x_copy.piece() * kPieceBytes;  // of the thread's next piece in its row
    const auto copy_main = [&] {
        const Shared stage = start + writes.offset();
        const bool there = copy_byte < x_bytes;
        x_copy.step(stage + Tile::kXOffset, there);
        weight_copy.step(stage, there);
        if constexpr (kFused) {
            a_copy.step(stage + Tile::kAOffset, there);
        }
        copy_byte += kPanelBytes;
    };
    const auto copy_tail = [&](int step) {
        const Shared stage = start + writes.offset();
        const int byte = step * kPanelBytes;
        const bool there = byte + x_copy.piece() * kPieceBytes < rank_bytes;
        PanelCopy<Tile::kColumns, Tile::kThreads>(p.b + first_output * rank_bytes + byte, rank_bytes, columns_there)
            .step(stage, there);
        if constexpr (!kFused) {
            PanelCopy<Tile::kRows, Tile::kThreads>(s() + byte, s_stride, rows_there)
                .step(stage + Tile::kXOffset, there);
        }
    };
    // One group a step, an empty one after the last, so that the number of groups tells what has arrived.
    const auto copy_late = [&](int step) {
        if (step < main_steps) {
            copy_main();
        } else if (step < main_steps + tail_steps) {
            copy_tail(step - main_steps);
        }
        machine::copy_async_commit();
        writes.advance();
    };
    MTBERT_UNROLL
    for (int step = 0; step < kStages - 1; ++step) {
        copy_late(step);
    }

    // Tiles of 16 rows in the warp's own order: tile i of the accumulators is tile i ^ warp_column of its 64 rows.
    const auto row_of = [&](int i, int half) {
        return warp_row * 64 + half * 32 + tile_row(g) + (i ^ warp_column) * 2;
    };
    // Of the first of the lane's 8 columns of each unit.
    const int lane_column = warp_column * 32 * kUnits + 8 * q;
    float sum[4][kTiles][4];
    MTBERT_UNROLL
    for (int unit = 0; unit < kUnits; ++unit) {
        const int column = lane_column + 32 * unit;
        const bool has_bias = p.bias != nullptr && column < columns_there;
        const char* bias = p.bias + (first_output + column) * kElement;
        MTBERT_UNROLL
        for (int i = 0; i < 8; ++i) {
            const float value = has_bias ? machine::to_float(machine::load_global<T>(bias + i * kElement)) : 0.0f;
            MTBERT_UNROLL
            for (int row_tile = 0; row_tile < 4; ++row_tile) {
                sum[row_tile][4 * unit + i / 2][i % 2] = value;
                sum[row_tile][4 * unit + i / 2][2 + i % 2] = value;
            }
        }
    }
    constexpr int kLowTiles = LowTiles<kRank>::kTiles;
    float low_sum[kLowTiles][4] = {};
    DropoutKey key{};
    PanelDraws<T> draws;
    std::uint32_t mask_low = 0, mask_high = 0;
    if constexpr (kDropout) {
        key = load_key(p.mask);
        mask_low = load_dropout_row(p.mask, first_row + row_of(0, 0), p.rows);
        mask_high = load_dropout_row(p.mask, first_row + row_of(0, 1), p.rows);
        draws.draw(mask_low, mask_high, 0, key);
    }

    // Where this lane points in a stage. Column i of W's tile 0 of a unit stands for column tile_row(i) of it.
    const int weight_lane = panel_offset(warp_column * 32 * kUnits + tile_row(lane % 8), lane / 8);
    const int x_lane[2] = {Tile::kXOffset + lane_a_offset(warp_row * 64, 0),
                           Tile::kXOffset + lane_a_offset(warp_row * 64, 1)};
    const auto multiply_base = [&](Shared stage, auto products) {
        std::uint32_t weight[kTiles][4];
        MTBERT_UNROLL
        for (int i = 0; i < kTiles; ++i) {
            load_matrices<T>(weight[i], stage + weight_lane + i / 4 * 32 * kPanelBytes + i % 4 * kTileDistance);
        }
        MTBERT_UNROLL
        for (int i = 0; i < 4; ++i) {
            MTBERT_UNROLL
            for (int product = 0; product < products.value; ++product) {
                std::uint32_t a[4];
                load_matrices<T>(a, stage + x_lane[product] + (i ^ warp_column) * kTileDistance);
                MTBERT_UNROLL
                for (int j = 0; j < kTiles; ++j) {
                    const std::uint32_t b[2] = {weight[j][2 * product], weight[j][2 * product + 1]};
                    multiply_add<T>(sum[i][j], a, b);
                }
            }
        }
    };
    const auto multiply_low = [&](Shared stage) {
        using Low = LowTiles<kRank>;
        std::uint32_t low[4], high[4];
        const Shared rows = stage + Tile::kXOffset;
        load_piece<T>(low, rows + panel_offset(row_of(0, 0), q));
        load_piece<T>(high, rows + panel_offset(row_of(0, 1), q));
        if constexpr (kDropout) {
            draws.apply(low, high, key);
        }
        MTBERT_UNROLL
        for (int i = 0; i < kLowTiles; ++i) {
            std::uint32_t a[4];
            load_piece<T>(a, stage + Tile::kAOffset + panel_offset(Low::row(g), q) + Low::further(i) * kPanelBytes);
            multiply_pieces<T>(low_sum[i], low, high, a);
        }
    };
    const auto multiply_main = [&](int step) {
        const Shared stage = start + reads.offset();
        if constexpr (kFused) {
            multiply_low(stage);
        }
        if constexpr (kDropout) {
            // For the next step, to be worked out while the tensor cores are busy.
            draws.draw(mask_low, mask_high, (step + 1) * kPairElements<T>, key);
        }
        multiply_base(stage, std::integral_constant<int, 2>{});
        reads.advance();
    };
    // Each step waits for its own copies and refills the stage that all warps are done with. Two loops, so that
    // the longer one holds no more than it needs.
    int step = 0;
    for (; step < main_steps - (kStages - 1); ++step) {
        machine::copy_async_wait<kStages - 2>();
        machine::block_barrier();
        copy_main();
        machine::copy_async_commit();
        writes.advance();
        multiply_main(step);
    }
    for (; step < main_steps; ++step) {
        machine::copy_async_wait<kStages - 2>();
        machine::block_barrier();
        copy_late(step + kStages - 1);
        multiply_main(step);
    }

    if constexpr (kFused) {
        // s takes the places of x in the next stages. All warps are done with those, but for that of the last step.
        if constexpr (kRank * kElement > (kStages - 1) * kPanelBytes) {
            machine::block_barrier();
        }
        using Low = LowTiles<kRank>;
        constexpr int kUnit = Low::kUnit;
        Low::clear_padding(low_sum, [&](int column) { return p.ranks.of(block) - column; });
        MTBERT_UNROLL
        for (int unit = 0; unit < kLowTiles / kUnit; ++unit) {
            const int byte = Low::first_column(unit, q) * kElement;
            MTBERT_UNROLL
            for (int half = 0; half < 2; ++half) {
                const int row = row_of(0, half);
                const LowWords<T, kUnit> words(low_sum, unit, half, p.s_scale);
                words.each([&](int further, auto piece) {
                    const int at = byte + further;
                    if (at < tail_steps * kPanelBytes) {
                        const Shared panel = start + reads.further(at / kPanelBytes) + Tile::kXOffset;
                        const int place = panel_offset(row, at % kPanelBytes / kPieceBytes) + at % kPieceBytes;
                        machine::store_shared(panel + place, piece);
                    }
                    if (first_column == 0 && at < rank_bytes && row < rows_there) {
                        machine::store_global(s() + row * s_stride + at, piece);
                    }
                });
                if constexpr (kShort && kRank * kElement < kPanelBytes / 2) {
                    // What the product reads beyond the rank. B's panel is zero there too.
                    machine::store_shared(start + reads.offset() + Tile::kXOffset + panel_offset(row, 1) + 4 * q, 0u);
                }
            }
        }
    }
    for (; step < main_steps + tail_steps; ++step) {
        machine::copy_async_wait<kStages - 2>();
        machine::block_barrier();
        copy_late(step + kStages - 1);
        multiply_base(start + reads.offset(), std::integral_constant<int, kShort ? 1 : 2>{});
        reads.advance();
    }

    char* const out = p.out + first_row * p.out_stride + (first_output + lane_column) * kElement;
    MTBERT_UNROLL
    for (int unit = 0; unit < kUnits; ++unit) {
        if (lane_column + 32 * unit < columns_there) {
            MTBERT_UNROLL
            for (int i = 0; i < 4; ++i) {
                MTBERT_UNROLL
                for (int half = 0; half < 2; ++half) {
                    const int row = row_of(i, half);
                    if (row < rows_there) {
                        LowWords<T, 4>(sum[i], unit, half, 1.0f).each([&](int further, Words4 piece) {
                            machine::store_global(out + row * p.out_stride + 32 * unit * kElement + further, piece);
                        });
                    }
                }
            }
        }
    }
}

}  // namespace mtbert::cuda::sm80
