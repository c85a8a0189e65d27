// ds = scale * dy B and dB = dy^T s in one pass over dy.
//
// A block takes one piece of the rows and a run of the columns of one block of outputs; 128 rows at a time it
// walks along them in steps of 128 bytes. Both sums read the same tile of dy, stored as columns of pieces: ds its
// rows, dB its transpose. ds is complete where the block has all columns, and a part otherwise; dB of the piece is
// added up in the block's own part of the workspace, once for every 128 rows. Another kernel adds the parts, in
// the order of their numbers.
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
    static constexpr int kSBytes = kLowPieces * kPitch<T, kRows>;
    static constexpr int kStages = kIsFloat<T> && kRank > 32 ? 2 : 3;
    static constexpr int kSharedBytes = kSBytes + kStages * kStageBytes;
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

    const Shared s_tile = machine::shared_start(), start = s_tile + Tile::kSBytes;
    for (std::int64_t first_row = piece.begin; first_row < piece.end; first_row += Tile::kRows) {
        const bool is_first = first_row == piece.begin;
        const int rows_there =
            static_cast<int>(piece.end - first_row < Tile::kRows ? piece.end - first_row : Tile::kRows);
        const char* const grad = p.grad + first_row * p.grad_stride + first_output * kElement;
        const char* const s = p.s + first_row * s_stride + block * rank_bytes;
        Ring<kStages, Tile::kStageBytes> reads, writes;
        const auto copy_s = [&] {
            copy_columns<T, Tile::kRows, Tile::kLowPieces, Tile::kThreads>(s_tile, [&](PieceIndex at) {
                const int byte = at.column * kPieceBytes;
                return Source{s + at.slot * s_stride + byte, at.slot < rows_there && byte < rank_bytes};
            });
        };
        const auto copy_step = [&](int step) {
            if (step < steps) {
                const Shared stage = start + writes.offset();
                const int first_byte = (first_step + step) * Tile::kStepBytes, first_column = first_byte / kElement;
                copy_columns<T, Tile::kRows, Tile::kPieces, Tile::kThreads>(stage, [&](PieceIndex at) {
                    const int byte = first_byte + at.column * kPieceBytes;
                    return Source{grad + at.slot * p.grad_stride + byte, at.slot < rows_there && byte < grad_bytes};
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
        };

        if (!is_first) {
            machine::block_barrier();  // all warps are done with the rows before
        }
        if (p.part_b != nullptr) {
            copy_s();  // part of the first group
        }
        MTBERT_UNROLL
        for (int step = 0; step < kStages - 1; ++step) {
            copy_step(step);
        }

        // Rows 16 warp and on of ds.
        float sum[kTiles][4] = {};
        const auto add_low = [&](Shared stage) {
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
        const auto add_grad_b = [&](Shared stage, int step) {
            const int grad_tile = warp % kGradTiles, share = warp / kGradTiles;
            if (share >= kShares) {
                return;
            }
            float product[kShareTiles][4] = {};
            for (int slot = 0; slot < Tile::kRows; slot += kPair) {
                std::uint32_t a[2][4];
                load_a_transposed<T, Tile::kRows>(a[0], stage, grad_tile, slot);
                load_a_transposed<T, Tile::kRows>(a[1], stage, grad_tile, slot + kPair / 2);
                MTBERT_UNROLL
                for (int i = 0; i < kShareTiles; ++i) {
                    std::uint32_t low[2][2];
                    load_b_pair<T, Tile::kRows>(low, s_tile, share * kShareTiles + i, slot);
                    multiply_add<T>(product[i], a[0], low[0]);
                    multiply_add<T>(product[i], a[1], low[1]);
                }
            }
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
            machine::copy_async_wait<kStages - 2>();
            machine::block_barrier();
            copy_step(step + kStages - 1);
            const Shared stage = start + reads.offset();
            add_low(stage);
            if (p.part_b != nullptr) {
                add_grad_b(stage, step);
            }
            reads.advance();
        }

        MTBERT_UNROLL
        for (int half = 0; half < 2; ++half) {
            const int row = 16 * warp + g + 8 * half;
            MTBERT_UNROLL
            for (int i = 0; i < kTiles; ++i) {
                const int column = 8 * i + 2 * q;
                if (row < rows_there && column < p.rank) {
                    const std::int64_t at = (first_row + row) * p.blocks * p.rank + block * p.rank + column;
                    // Zero where it only fills up the rank, whatever the sum.
                    const int left = p.ranks.of(block) - column;
                    const float first = left > 0 ? sum[i][2 * half] : 0.0f;
                    const float second = left > 1 ? sum[i][2 * half + 1] : 0.0f;
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
