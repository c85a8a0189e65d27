// s = scale * dropout(x) A^T alone, for all blocks of outputs at once: x is read once and each element's mask
// drawn once.
//
// A block computes 64 rows of s with eight warps: warp w rows 16 (w % 4) and on, and half w / 4 of every 128 bytes
// of the sum; the halves are added in the end, always in the same order.
#pragma once

#include <cstdint>

#include "cuda/lora/machine.h"
#include "cuda/lora/sm80_forward.h"
#include "cuda/lora/sm80_mask.h"
#include "cuda/lora/sm80_tile.h"

namespace mtbert::cuda::sm80 {

struct Thin {
    const char* x;
    const char* a;
    char* s;
    std::int64_t x_stride;  // bytes
    std::int64_t rows;
    int inputs;  // K
    int low;     // J * R
    int rank;    // R
    LoraRanks ranks;
    float s_scale;
    Mask mask;
};

// kLow: the most columns of s.
template <typename T, int kLow>
struct ThinTile {
    static constexpr int kThreads = 256;
    static constexpr int kRows = 64;
    static constexpr int kHalves = 2;  // panels of x in a stage, then as many of A
    static constexpr int kPanel = kRows * kPanelBytes;
    static constexpr int kAPanel = kLow * kPanelBytes;
    static constexpr int kStageBytes = kHalves * (kPanel + kAPanel);
    static constexpr int kStages = kLow > 64 ? 3 : 4;
    static constexpr int kSharedBytes = kStages * kStageBytes;
    static_assert(kSharedBytes <= 99 * 1024);
};

template <typename T, int kLow>
MTBERT_KERNEL(256, kLow > 64 ? 1 : 2)
void thin_kernel(const Thin p) {
    using Tile = ThinTile<T, kLow>;
    using Low = LowTiles<kLow>;
    constexpr int kElement = static_cast<int>(sizeof(T)), kStages = Tile::kStages;
    constexpr int kStepBytes = Tile::kHalves * kPanelBytes;

    const int lane = machine::lane_index(), warp = machine::warp_index();
    const int g = lane / 4, q = lane % 4, row_tile = warp % 4, half_sum = warp / 4;
    const std::int64_t first_row = static_cast<std::int64_t>(machine::block_index_x()) * Tile::kRows;
    const int rows_there = static_cast<int>(p.rows - first_row < Tile::kRows ? p.rows - first_row : Tile::kRows);
    const int x_bytes = p.inputs * kElement, low_bytes = p.low * kElement;
    const int steps = (x_bytes + kStepBytes - 1) / kStepBytes;

    const Shared start = machine::shared_start();
    Ring<kStages, Tile::kStageBytes> reads, writes;
    PanelCopy<Tile::kRows, Tile::kThreads> x_copy(p.x + first_row * p.x_stride, p.x_stride, rows_there);
    PanelCopy<kLow, Tile::kThreads> a_copy(p.a, x_bytes, p.low);
    int copy_byte = x_copy.piece() * kPieceBytes;
    const auto copy_step = [&](int step) {
        if (step < steps) {
            const Shared stage = start + writes.offset();
            MTBERT_UNROLL
            for (int half = 0; half < Tile::kHalves; ++half) {
                x_copy.step(stage + half * Tile::kPanel, copy_byte < x_bytes);
                a_copy.step(stage + Tile::kHalves * Tile::kPanel + half * Tile::kAPanel, copy_byte < x_bytes);
                copy_byte += kPanelBytes;
            }
        }
        machine::copy_async_commit();
        writes.advance();
    };
    MTBERT_UNROLL
    for (int step = 0; step < kStages - 1; ++step) {
        copy_step(step);
    }

    const auto row_of = [&](int half) { return half * 32 + tile_row(g) + row_tile * 2; };
    float sum[Low::kTiles][4] = {};
    const bool dropout = p.mask.threshold != 0;
    PanelDraws<T> draws;
    DropoutKey key{};
    std::uint32_t mask_low = 0, mask_high = 0;
    if (dropout) {
        key = load_key(p.mask);
        mask_low = load_dropout_row(p.mask, first_row + row_of(0), p.rows);
        mask_high = load_dropout_row(p.mask, first_row + row_of(1), p.rows);
    }
    for (int step = 0; step < steps; ++step) {
        if (dropout) {
            draws.draw(mask_low, mask_high, (Tile::kHalves * step + half_sum) * kPairElements<T>, key);
        }
        machine::copy_async_wait<kStages - 2>();
        machine::block_barrier();
        copy_step(step + kStages - 1);
        const Shared x_panel = start + reads.offset() + half_sum * Tile::kPanel;
        const Shared a_panel = start + reads.offset() + Tile::kHalves * Tile::kPanel + half_sum * Tile::kAPanel;
        std::uint32_t low[4], high[4];
        load_piece<T>(low, x_panel + panel_offset(row_of(0), q));
        load_piece<T>(high, x_panel + panel_offset(row_of(1), q));
        if (dropout) {
            draws.apply(low, high, key);
        }
        MTBERT_UNROLL
        for (int i = 0; i < Low::kTiles; ++i) {
            std::uint32_t a[4];
            load_piece<T>(a, a_panel + panel_offset(Low::row(g), q) + Low::further(i) * kPanelBytes);
            multiply_pieces<T>(sum[i], low, high, a);
        }
        reads.advance();
    }

    machine::block_barrier();  // the stages are free
    const Shared exchange = start + (row_tile * Low::kTiles * 32 + lane) * static_cast<int>(sizeof(Words4));
    constexpr int kNext = 32 * static_cast<int>(sizeof(Words4));
    static_assert(4 * Low::kTiles * kNext <= Tile::kSharedBytes);
    if (half_sum == 1) {
        MTBERT_UNROLL
        for (int i = 0; i < Low::kTiles; ++i) {
            Words4 words;
            MTBERT_UNROLL
            for (int j = 0; j < 4; ++j) {
                words.word[j] = machine::float_bits(sum[i][j]);
            }
            machine::store_shared(exchange + i * kNext, words);
        }
    }
    machine::block_barrier();
    if (half_sum == 0) {
        MTBERT_UNROLL
        for (int i = 0; i < Low::kTiles; ++i) {
            const auto words = machine::load_shared<Words4>(exchange + i * kNext);
            MTBERT_UNROLL
            for (int j = 0; j < 4; ++j) {
                sum[i][j] += machine::bits_float(words.word[j]);
            }
        }
        // A unit's neighbouring columns, eight at most, are of one block.
        Low::clear_padding(sum, [&](int column) {
            return column < p.low ? p.ranks.of(column / p.rank) - column % p.rank : 0;
        });
        MTBERT_UNROLL
        for (int unit = 0; unit < Low::kTiles / Low::kUnit; ++unit) {
            const int byte = Low::first_column(unit, q) * kElement;
            MTBERT_UNROLL
            for (int half = 0; half < 2; ++half) {
                if (row_of(half) < rows_there) {
                    char* const target = p.s + (first_row + row_of(half)) * low_bytes;
                    LowWords<T, Low::kUnit>(sum, unit, half, p.s_scale).each([&](int further, auto piece) {
                        if (byte + further < low_bytes) {
                            machine::store_global(target + byte + further, piece);
                        }
                    });
                }
            }
        }
    }
}

}  // namespace mtbert::cuda::sm80
