// dx = dy W + dropout'(ds A): the sum runs over the rank first, the accumulators are masked, then it runs over the
// outputs.
//
// A block computes a tile of dx of 64 rows and 128 columns with four warps, or of 128 rows and 256 columns with
// eight; a warp has 64 rows and a quarter of the columns. Each step of the sum is 64 bytes of the rows of ds or dy
// (a panel) and as many rows of A or W (columns). An element's mask is drawn once.
#pragma once

#include <cstdint>

#include "cuda/lora/machine.h"
#include "cuda/lora/sm80_mask.h"
#include "cuda/lora/sm80_tile.h"

namespace mtbert::cuda::sm80 {

struct Input {
    const char* grad;
    const char* weight;
    const char* a;
    const char* ds;
    char* dx;
    std::int64_t grad_stride;  // bytes
    std::int64_t dx_stride;    // bytes
    std::int64_t rows;
    int inputs;    // K
    int outputs;   // N, of all blocks
    int low;       // J * R
    Mask mask;
};

// kRowWarps rows of warps and four columns of them, with kUnits times 32 columns each.
template <typename T, int kRowWarps, int kUnits>
struct InputTile {
    static constexpr int kThreads = 128 * kRowWarps;
    static constexpr int kRows = 64 * kRowWarps;
    static constexpr int kColumns = 128 * kUnits;
    static constexpr int kSlots = kPairElements<T>;  // rows of W in a step
    static constexpr int kPieces = kColumns / kPieceElements<T>;
    static constexpr int kGradOffset = kPieces * kPitch<T, kSlots>;  // after W's columns
    static constexpr int kStageBytes = kGradOffset + kRows * kPanelBytes;
    static constexpr int kStages = 4;
    static constexpr int kSharedBytes = kStages * kStageBytes;
    static_assert(kSharedBytes <= 99 * 1024);
    static constexpr int kBlocks = kUnits > 1 ? 1 : 3;  // that share a multiprocessor's registers
};

template <typename T, int kRowWarps, int kUnits>
MTBERT_KERNEL(128 * kRowWarps, (InputTile<T, kRowWarps, kUnits>::kBlocks))
void input_kernel(const Input p) {
    using Tile = InputTile<T, kRowWarps, kUnits>;
    constexpr int kTiles = 4 * kUnits;  // of 8 columns
    constexpr int kElement = static_cast<int>(sizeof(T)), kStages = Tile::kStages, kSlots = Tile::kSlots;

    const int thread = machine::thread_index(), lane = machine::lane_index(), warp = machine::warp_index();
    const int g = lane / 4, q = lane % 4, warp_row = warp / 4, warp_column = warp % 4;

    const int tiles = (p.inputs + Tile::kColumns - 1) / Tile::kColumns;
    const int first_column = machine::block_index_x() % tiles * Tile::kColumns;
    const std::int64_t first_row = static_cast<std::int64_t>(machine::block_index_x() / tiles) * Tile::kRows;
    const int rows_there = static_cast<int>(p.rows - first_row < Tile::kRows ? p.rows - first_row : Tile::kRows);
    const int columns_there = p.inputs - first_column;
    const std::int64_t weight_bytes = static_cast<std::int64_t>(p.inputs) * kElement;  // a row of W or A

    // The sum: low_steps over the rank, then over the outputs.
    const int low_bytes = p.low * kElement, grad_bytes = p.outputs * kElement;
    const int low_steps = (low_bytes + kPanelBytes - 1) / kPanelBytes;
    const int all_steps = low_steps + (grad_bytes + kPanelBytes - 1) / kPanelBytes;

    const Shared start = machine::shared_start();
    Ring<kStages, Tile::kStageBytes> reads, writes;
    const PieceIndex mine = piece_index<kSlots, Tile::kPieces>(thread);
    // All pieces that a thread copies of a step are of one row: the slot is the same in each pass.
    constexpr int kPassPieces = Tile::kThreads / kSlots;
    static_assert(Tile::kThreads % (4 * kSlots) == 0);
    const int piece_bytes = mine.column * kPieceBytes;
    using Rows = PanelCopy<Tile::kRows, Tile::kThreads>;
    Rows grad_copy(p.ds + first_row * low_bytes, low_bytes, rows_there);
    const char* weight = p.a + mine.slot * weight_bytes + first_column * kElement + piece_bytes;
    int grad_left = low_bytes - Rows::piece() * kPieceBytes;  // bytes of the thread's row from its piece on
    int rows_left = p.low - mine.slot;                        // of W or A from the thread's row on
    const auto copy_step = [&](int step) {
        if (step == low_steps) {
            grad_copy = Rows(p.grad + first_row * p.grad_stride, p.grad_stride, rows_there);
            weight = p.weight + mine.slot * weight_bytes + first_column * kElement + piece_bytes;
            grad_left = grad_bytes - Rows::piece() * kPieceBytes;
            rows_left = p.outputs - mine.slot;
        }
        if (step < all_steps) {
            const Shared stage = start + writes.offset();
            grad_copy.step(stage + Tile::kGradOffset, grad_left > 0);
            MTBERT_UNROLL
            for (int pass = 0; pass < Tile::kPieces / kPassPieces; ++pass) {
                const int further = pass * kPassPieces;
                copy_piece(stage + (mine.column + further) * kPitch<T, kSlots> + mine.slot * kPieceBytes,
                           weight + further * kPieceBytes,
                           rows_left > 0 && piece_bytes < columns_there * kElement - further * kPieceBytes);
            }
            weight += kSlots * weight_bytes;
            grad_left -= kPanelBytes;
            rows_left -= kSlots;
        }
        machine::copy_async_commit();
        writes.advance();
    };
    MTBERT_UNROLL
    for (int step = 0; step < kStages - 1; ++step) {
        copy_step(step);
    }

    const auto row_of = [&](int i, int half) { return warp_row * 64 + half * 32 + tile_row(g) + i * 2; };
    const int warp_first = warp_column * 32 * kUnits;  // column, of the tile
    float sum[4][kTiles][4] = {};
    const int grad_lane[2] = {Tile::kGradOffset + lane_a_offset(warp_row * 64, 0),
                              Tile::kGradOffset + lane_a_offset(warp_row * 64, 1)};
    for (int step = 0; step < all_steps; ++step) {
        machine::copy_async_wait<kStages - 2>();
        machine::block_barrier();
        copy_step(step + kStages - 1);
        if (step == low_steps && p.mask.threshold != 0) {
            const DropoutKey key = load_key(p.mask);
            MTBERT_UNROLL
            for (int i = 0; i < 4; ++i) {
                const std::uint32_t low = load_dropout_row(p.mask, first_row + row_of(i, 0), p.rows);
                const std::uint32_t high = load_dropout_row(p.mask, first_row + row_of(i, 1), p.rows);
                MTBERT_UNROLL
                for (int j = 0; j < kTiles; j += 2) {
                    mask_accumulators(sum[i][j], sum[i][j + 1], low, high, first_column + warp_first + 8 * j, key);
                }
            }
        }
        const Shared stage = start + reads.offset();
        std::uint32_t b[kTiles][2][2];
        MTBERT_UNROLL
        for (int j = 0; j < kTiles; ++j) {
            load_b_pair<T, kSlots>(b[j], stage, warp_first / 8 + j, 0);
        }
        MTBERT_UNROLL
        for (int i = 0; i < 4; ++i) {
            MTBERT_UNROLL
            for (int product = 0; product < 2; ++product) {
                std::uint32_t a[4];
                load_matrices<T>(a, stage + grad_lane[product] + i * kTileDistance);
                MTBERT_UNROLL
                for (int j = 0; j < kTiles; ++j) {
                    multiply_add<T>(sum[i][j], a, b[j][product]);
                }
            }
        }
        reads.advance();
    }

    char* const target = p.dx + first_row * p.dx_stride + (first_column + warp_first) * kElement;
    MTBERT_UNROLL
    for (int i = 0; i < 4; ++i) {
        MTBERT_UNROLL
        for (int half = 0; half < 2; ++half) {
            const int row = row_of(i, half);
            char* const line = target + row * p.dx_stride;
            if constexpr (kIsFloat<T>) {
                MTBERT_UNROLL
                for (int j = 0; j < kTiles; ++j) {
                    const Words2 words = float_words(sum[i][j][2 * half], sum[i][j][2 * half + 1]);
                    if (row < rows_there && warp_first + 8 * j < columns_there) {
                        machine::store_global(line + (8 * j + 2 * q) * kElement, words);
                    }
                }
            } else {
                // A lane holds two columns of each tile; after the exchange all eight of every fourth.
                MTBERT_UNROLL
                for (int unit = 0; unit < kUnits; ++unit) {
                    Words4 words;
                    MTBERT_UNROLL
                    for (int j = 0; j < 4; ++j) {
                        const float(&tile)[4] = sum[i][4 * unit + j];
                        words.word[j] = machine::pack<T>(tile[2 * half], tile[2 * half + 1]);
                    }
                    transpose_quad(words.word);
                    const int column = 32 * unit + 8 * q;
                    if (row < rows_there && warp_first + column < columns_there) {
                        machine::store_global(line + column * kElement, words);
                    }
                }
            }
        }
    }
}

}  // namespace mtbert::cuda::sm80
