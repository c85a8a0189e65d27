// dA = ds^T dropout(x), in one pass over x: the part of each piece of the rows.
//
// A block takes one piece and 128 columns of x. Tiles of x arrive in shared memory as columns of pieces; each
// thread masks the pieces that it copied itself, which are a draw each (two pieces with floats), before the others
// read them. Warp w then multiplies the transpose of its 16 columns with ds.
#pragma once

#include <cstdint>

#include "cuda/lora/machine.h"
#include "cuda/lora/sm80_mask.h"
#include "cuda/lora/sm80_pieces.h"
#include "cuda/lora/sm80_tile.h"

namespace mtbert::cuda::sm80 {

struct GradA {
    const char* x;
    const char* ds;
    float* part;  // [pieces, low, inputs]
    Pieces pieces;
    std::int64_t x_stride;  // bytes
    int inputs;             // K
    int low;                // J * R
    Mask mask;
};

// kLow: the most columns of ds.
template <typename T, int kLow>
struct GradATile {
    static constexpr int kThreads = 256;
    static constexpr int kColumns = 128;
    static constexpr int kSlots = kPairElements<T>;  // rows in a step
    static constexpr int kPieces = kColumns / kPieceElements<T>;
    static constexpr int kLowPieces = kLow / kPieceElements<T>;
    static constexpr int kLowOffset = kPieces * kPitch<T, kSlots>;  // after x
    static constexpr int kStageBytes = kLowOffset + kLowPieces * kPitch<T, kSlots>;
    static constexpr int kStages = kIsFloat<T> && kLow > 64 ? 3 : 4;
    static constexpr int kSharedBytes = kStages * kStageBytes;
    static_assert(kSharedBytes <= 99 * 1024);
};

template <typename T, int kLow>
MTBERT_KERNEL(256, kLow > 64 ? 1 : 2)
void grad_a_kernel(const GradA p) {
    using Tile = GradATile<T, kLow>;
    constexpr int kElement = static_cast<int>(sizeof(T)), kStages = Tile::kStages, kSlots = Tile::kSlots;
    constexpr int kTiles = kLow / 8;

    const int thread = machine::thread_index(), lane = machine::lane_index(), warp = machine::warp_index();
    const int g = lane / 4, q = lane % 4;
    const int chunks = (p.inputs + Tile::kColumns - 1) / Tile::kColumns;
    const int number = machine::block_index_x() / chunks;
    const int first_column = machine::block_index_x() % chunks * Tile::kColumns;
    const Piece piece = find_piece(p.pieces, number);
    const int x_bytes = p.inputs * kElement, low_bytes = p.low * kElement, first_byte = first_column * kElement;
    const int rows = static_cast<int>(piece.end - piece.begin);
    const int steps = (rows + kSlots - 1) / kSlots;  // none in an empty piece

    // Two pieces of one row of every step are the thread's: 8 columns of pieces apart, or neighbours with floats,
    // where two make one draw.
    constexpr int kUnits = kIsFloat<T> ? Tile::kPieces / 2 : Tile::kPieces;
    static_assert(kSlots * Tile::kPieces == 2 * Tile::kThreads);
    const PieceIndex mine = piece_index<kSlots, kUnits>(thread);
    const int my_piece[2] = {kIsFloat<T> ? 2 * mine.column : mine.column,
                             kIsFloat<T> ? 2 * mine.column + 1 : mine.column + Tile::kThreads / kSlots};
    const int slot_bytes = mine.slot * kPieceBytes;

    const Shared start = machine::shared_start();
    Ring<kStages, Tile::kStageBytes> reads, writes;
    const char* x = p.x + (piece.begin + mine.slot) * p.x_stride + first_byte;
    const char* ds = p.ds + piece.begin * low_bytes;
    int rows_left = rows;
    const auto copy_step = [&](int step) {
        if (step < steps) {
            const Shared stage = start + writes.offset();
            MTBERT_UNROLL
            for (int i = 0; i < 2; ++i) {
                const int byte = my_piece[i] * kPieceBytes;
                copy_piece(stage + my_piece[i] * kPitch<T, kSlots> + slot_bytes, x + byte,
                           mine.slot < rows_left && byte < x_bytes - first_byte);
            }
            copy_columns<T, kSlots, Tile::kLowPieces, Tile::kThreads>(stage + Tile::kLowOffset, [&](PieceIndex at) {
                const int byte = at.column * kPieceBytes;
                return Source{ds + at.slot * low_bytes + byte, at.slot < rows_left && byte < low_bytes};
            });
            x += kSlots * p.x_stride;
            ds += static_cast<std::int64_t>(kSlots) * low_bytes;
            rows_left -= kSlots;
        }
        machine::copy_async_commit();
        writes.advance();
    };
    MTBERT_UNROLL
    for (int step = 0; step < kStages - 1; ++step) {
        copy_step(step);
    }

    const bool dropout = p.mask.threshold != 0;
    DropoutKey key{};
    std::uint32_t next_row = 0;
    if (dropout) {
        key = load_key(p.mask);
        next_row = load_dropout_row(p.mask, piece.begin + mine.slot, piece.end);
    }
    float sum[kTiles][4] = {};
    for (int step = 0; step < steps; ++step) {
        const Shared stage = start + reads.offset();
        Philox4 draw[2] = {};
        if (dropout) {
            const auto group = static_cast<std::uint32_t>(first_column / kDropoutLanes + mine.column);
            draw[0] = dropout_draw(key, next_row, group);
            if constexpr (!kIsFloat<T>) {
                draw[1] = dropout_draw(key, next_row, group + Tile::kThreads / kSlots);
            }
            next_row = load_dropout_row(p.mask, piece.begin + (step + 1) * kSlots + mine.slot, piece.end);
        }
        machine::copy_async_wait<kStages - 2>();
        if (dropout) {
            MTBERT_UNROLL
            for (int i = 0; i < 2; ++i) {
                const Shared place = stage + my_piece[i] * kPitch<T, kSlots> + slot_bytes;
                auto words = machine::load_shared<Words4>(place);
                if constexpr (kIsFloat<T>) {
                    mask_floats(words.word, draw[0].word[2 * i], draw[0].word[2 * i + 1], key);
                } else {
                    mask_piece<T>(words.word, draw[i], key);
                }
                machine::store_shared(place, words);
            }
        }
        machine::block_barrier();
        copy_step(step + kStages - 1);
        std::uint32_t a[2][4];
        load_a_transposed<T, kSlots>(a[0], stage, warp, 0);
        load_a_transposed<T, kSlots>(a[1], stage, warp, kSlots / 2);
        MTBERT_UNROLL
        for (int i = 0; i < kTiles; ++i) {
            // Beside many accumulators, a branch that keeps the compiler from loading all of ds at once.
            if (kTiles > 12 && i % 8 == 0 && 8 * i >= p.low) {
                break;
            }
            std::uint32_t low[2][2];
            load_b_pair<T, kSlots>(low, stage + Tile::kLowOffset, i, 0);
            multiply_add<T>(sum[i], a[0], low[0]);
            multiply_add<T>(sum[i], a[1], low[1]);
        }
        reads.advance();
    }

    if (rows <= 0) {
        return;  // no one reads the part of an empty piece
    }
    MTBERT_UNROLL
    for (int half = 0; half < 2; ++half) {
        const int column = first_column + warp * 16 + g + 8 * half;
        if (column < p.inputs) {
            MTBERT_UNROLL
            for (int i = 0; i < kTiles; ++i) {
                MTBERT_UNROLL
                for (int j = 0; j < 2; ++j) {
                    const int row = 8 * i + 2 * q + j;
                    if (row < p.low) {
                        machine::store_global(
                            p.part + (static_cast<std::int64_t>(number) * p.low + row) * p.inputs + column,
                            machine::float_bits(sum[i][2 * half + j] * p.mask.scale));
                    }
                }
            }
        }
    }
}

}  // namespace mtbert::cuda::sm80
