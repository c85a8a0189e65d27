// ds = scale * dy B and dB = dy^T s in one pass over dy.
//
// A block takes one piece of the rows and a run of the columns of one block of outputs. It walks along the columns in
// steps of 128 bytes, and in each step down as many rows as it has sums of ds for in registers (passes of 128), so that
// dB of the step is complete when it is written. Both sums read the same tile of dy, stored as columns of pieces: ds its
// rows, dB its transpose. ds is complete where the block has all columns, and a part otherwise; dB of a piece of more
// rows than that is added up in the block's own part of the workspace. Another kernel adds the parts, in the order of
// their numbers.
#pragma once

#include <cstdint>

#include "cuda/lora/lora.h"
#include "cuda/lora/machine.h"
#include "cuda/lora/sm80_pieces.h"
#include "cuda/lora/sm80_tile.h"

namespace mtbert::cuda::sm80 {

struct Low {
    const char* grad;
    const char* b;
    const char* s;      // not looked at where grad_b is null
    char* ds;           // of T, where there is one split
    float* part_ds;     // [splits, rows, blocks * rank] otherwise
    float* part_b;      // [pieces, blocks * outputs, rank]; or null
    Pieces pieces;
    std::int64_t grad_stride;  // bytes
    int outputs;               // of one block
    int blocks;
    int rank;
    LoraRanks ranks;
    int splits;
    int split_steps;
    float scale;
};

// How many times 128 rows a block takes together: as s and the sums of ds leave room for them.
constexpr int low_passes(std::int64_t rank, std::int64_t element_size) { return rank * element_size <= 64 ? 4 : 1; }

// kRank: the most columns of s of a block of outputs.
template <typename T, int kRank>
struct LowTile {
    static constexpr int kThreads = 256;
    static constexpr int kRows = 128;
    static constexpr int kStepBytes = 128;
    static constexpr int kColumns = kStepBytes / static_cast<int>(sizeof(T));
    static constexpr int kPieces = kStepBytes / kPieceBytes;
    static constexpr int kLowPieces = kRank / kPieceElements<T>;
    static constexpr int kBOffset = kPieces * kPitch<T, kRows>;  // after the tile of dy
    static constexpr int kStageBytes = kBOffset + kLowPieces * kPitch<T, kColumns>;
    static constexpr int kSBytes = kLowPieces * kPitch<T, kRows>;  // of one pass
    static constexpr int kPasses = low_passes(kRank, sizeof(T));
    static constexpr int kStages = kIsFloat<T> && kRank > 32 ? 2 : 3;
    static constexpr int kSharedBytes = kPasses * kSBytes + kStages * kStageBytes;
    static_assert(kSharedBytes <= 99 * 1024);
};

template <typename T, int kRank>
MTBERT_KERNEL(256, 1)
void low_kernel(const Low p) {
    using Tile = LowTile<T, kRank>;
    constexpr int kElement = static_cast<int>(sizeof(T)), kStages = Tile::kStages, kTiles = kRank / 8;
    constexpr int kPair = kPairElements<T>;
    // For dB the warps share out the tiles of 16 columns of dy, and what is left of them the tiles of 8 columns of
    // s.
    constexpr int kGradTiles = Tile::kColumns / 16, kShares = kTiles < 8 / kGradTiles ? kTiles : 8 / kGradTiles;
    constexpr int kShareTiles = kTiles / kShares;

    const int lane = machine::lane_index(), warp = machine::warp_index();
    const int g = lane / 4, q = lane % 4;
    int index = machine::block_index_x();
    const int split = index % p.splits;
    index /= p.splits;
    const int block = index % p.blocks, number = index / p.blocks;
    const Piece piece = find_piece(p.pieces, number);

    const int rank_bytes = p.rank * kElement, grad_bytes = p.outputs * kElement;
    const std::int64_t s_stride = static_cast<std::int64_t>(p.blocks) * rank_bytes;
    const int first_step = split * p.split_steps;
    const int all_steps = (grad_bytes + Tile::kStepBytes - 1) / Tile::kStepBytes;
    const int steps = all_steps - first_step < p.split_steps ? all_steps - first_step : p.split_steps;
    const std::int64_t first_output = static_cast<std::int64_t>(block) * p.outputs;
    const char* const b = p.b + first_output * rank_bytes;
    const std::int64_t first_line = static_cast<std::int64_t>(number) * p.blocks * p.outputs + first_output;  // of dB

    constexpr int kPasses = Tile::kPasses, kTogether = kPasses * Tile::kRows;
    const Shared s_tile = machine::shared_start(), start = s_tile + kPasses * Tile::kSBytes;
    for (std::int64_t first_row = piece.begin; first_row < piece.end; first_row += kTogether) {
        const bool is_first = first_row == piece.begin;
        const int rows_there = static_cast<int>(piece.end - first_row < kTogether ? piece.end - first_row : kTogether);
        const int passes = (rows_there + Tile::kRows - 1) / Tile::kRows;
        const char* const grad = p.grad + first_row * p.grad_stride + first_output * kElement;
        const char* const s = p.s + first_row * s_stride + block * rank_bytes;
        Ring<kStages, Tile::kStageBytes> reads, writes;
        const auto copy_s = [&] {
            for (int pass = 0; pass < passes; ++pass) {
                copy_columns<T, Tile::kRows, Tile::kLowPieces, Tile::kThreads>(
                    s_tile + pass * Tile::kSBytes, [&](PieceIndex at) {
                        const int byte = at.column * kPieceBytes, row = pass * Tile::kRows + at.slot;
                        return Source{s + row * s_stride + byte, row < rows_there && byte < rank_bytes};
                    });
            }
        };
        int copy_step = 0, copy_pass = 0;
        const auto copy_tile = [&] {
            if (copy_step < steps) {
                const Shared stage = start + writes.offset();
                const int first_byte = (first_step + copy_step) * Tile::kStepBytes;
                const int first_column = first_byte / kElement;
                copy_columns<T, Tile::kRows, Tile::kPieces, Tile::kThreads>(stage, [&](PieceIndex at) {
                    const int byte = first_byte + at.column * kPieceBytes, row = copy_pass * Tile::kRows + at.slot;
                    return Source{grad + row * p.grad_stride + byte, row < rows_there && byte < grad_bytes};
                });
                copy_columns<T, Tile::kColumns, Tile::kLowPieces, Tile::kThreads>(
                    stage + Tile::kBOffset, [&](PieceIndex at) {
                        const int byte = at.column * kPieceBytes, output = first_column + at.slot;
                        return Source{b + static_cast<std::int64_t>(output) * rank_bytes + byte,
                                      output < p.outputs && byte < rank_bytes};
                    });
            }
            machine::copy_async_commit();
            writes.advance();
            if (++copy_pass == passes) {
                copy_pass = 0;
                ++copy_step;
            }
        };

        if (!is_first) {
            machine::block_barrier();  // all warps are done with the rows before
        }
        if (p.part_b != nullptr) {
            copy_s();  // part of the first group
        }
        MTBERT_UNROLL
        for (int tile = 0; tile < kStages - 1; ++tile) {
            copy_tile();
        }

        // Rows 16 warp and on of ds, of every pass.
        float sums[kPasses][kTiles][4] = {};
        const auto add_low = [&](float (&sum)[kTiles][4], Shared stage) {
            MTBERT_UNROLL
            for (int pair = 0; pair < 2; ++pair) {
                std::uint32_t a[2][4];
                load_a_rows<T, Tile::kRows>(a[0], stage, 4 * pair, 16 * warp);
                load_a_rows<T, Tile::kRows>(a[1], stage, 4 * pair + 2, 16 * warp);
                MTBERT_UNROLL
                for (int i = 0; i < kTiles; ++i) {
                    std::uint32_t low[2][2];
                    load_b_pair<T, Tile::kColumns>(low, stage + Tile::kBOffset, i, pair * kPair);
                    multiply_add<T>(sum[i], a[0], low[0]);
                    multiply_add<T>(sum[i], a[1], low[1]);
                }
            }
        };
        const int grad_tile = warp % kGradTiles, share = warp / kGradTiles;
        const bool has_share = p.part_b != nullptr && share < kShares;
        const auto add_grad_b = [&](float (&product)[kShareTiles][4], Shared stage, Shared s_pass) {
            for (int slot = 0; slot < Tile::kRows; slot += kPair) {
                std::uint32_t a[2][4];
                load_a_transposed<T, Tile::kRows>(a[0], stage, grad_tile, slot);
                load_a_transposed<T, Tile::kRows>(a[1], stage, grad_tile, slot + kPair / 2);
                MTBERT_UNROLL
                for (int i = 0; i < kShareTiles; ++i) {
                    std::uint32_t low[2][2];
                    load_b_pair<T, Tile::kRows>(low, s_pass, share * kShareTiles + i, slot);
                    multiply_add<T>(product[i], a[0], low[0]);
                    multiply_add<T>(product[i], a[1], low[1]);
                }
            }
        };
        const auto store_grad_b = [&](const float (&product)[kShareTiles][4], int step) {
            MTBERT_UNROLL
            for (int half = 0; half < 2; ++half) {
                const int output = (first_step + step) * Tile::kColumns + grad_tile * 16 + g + 8 * half;
                if (output < p.outputs) {
                    const std::int64_t line = first_line + output;
                    MTBERT_UNROLL
                    for (int i = 0; i < kShareTiles; ++i) {
                        const int column = (share * kShareTiles + i) * 8 + 2 * q;
                        if (column < p.rank) {
                            float* const target = p.part_b + line * p.rank + column;
                            float first = product[i][2 * half], second = product[i][2 * half + 1];
                            if (!is_first) {
                                const auto before = machine::load_global<Words2>(target);
                                first += machine::bits_float(before.word[0]);
                                second += machine::bits_float(before.word[1]);
                            }
                            machine::store_global(target, float_words(first, second));
                        }
                    }
                }
            }
        };
        for (int step = 0; step < steps; ++step) {
            float product[kShareTiles][4] = {};
            MTBERT_UNROLL
            for (int pass = 0; pass < kPasses; ++pass) {
                if (pass == passes) {
                    break;
                }
                machine::copy_async_wait<kStages - 2>();
                machine::block_barrier();
                copy_tile();
                const Shared stage = start + reads.offset();
                add_low(sums[pass], stage);
                if (has_share) {
                    add_grad_b(product, stage, s_tile + pass * Tile::kSBytes);
                }
                reads.advance();
            }
            if (has_share) {
                store_grad_b(product, step);
            }
        }

        MTBERT_UNROLL
        for (int half = 0; half < 2 * kPasses; ++half) {
            const int row = half / 2 * Tile::kRows + 16 * warp + g + 8 * (half % 2);
            const float(&sum)[kTiles][4] = sums[half / 2];
            MTBERT_UNROLL
            for (int i = 0; i < kTiles; ++i) {
                const int column = 8 * i + 2 * q;
                if (row < rows_there && column < p.rank) {
                    const std::int64_t at = (first_row + row) * p.blocks * p.rank + block * p.rank + column;
                    // Zero where it only fills up the rank, whatever the sum.
                    const int left = p.ranks.of(block) - column;
                    const float first = left > 0 ? sum[i][half % 2 * 2] : 0.0f;
                    const float second = left > 1 ? sum[i][half % 2 * 2 + 1] : 0.0f;
                    if (p.splits > 1) {
                        const std::int64_t part = split * p.pieces.rows * p.blocks * p.rank;
                        machine::store_global(p.part_ds + part + at, float_words(first, second));
                    } else if constexpr (kIsFloat<T>) {
                        machine::store_global(p.ds + at * kElement, float_words(first * p.scale, second * p.scale));
                    } else {
                        const std::uint32_t word = machine::pack<T>(first * p.scale, second * p.scale);
                        machine::store_global(p.ds + at * kElement, word);
                    }
                }
            }
        }
    }
}

}  // namespace mtbert::cuda::sm80
