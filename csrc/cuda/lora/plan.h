// Which kernel serves a LoRA product: a function of the architecture and the shape alone, so that equal calls give equal
// bits on every card of an architecture. No CUDA header is needed: the host compiler tests it.
//
// One kernel (fused) makes s = scale * dropout(x) A^T beside y, and draws the mask, as often as a thread block needs rows of
// s that it does not have. Two kernels (split) make it once, but read x twice and launch twice. By the model of
// bench/lora/model.py:
//
// sm_90: one kernel at every rank. A cluster of thread blocks takes neighbouring tiles and makes s, so draws the mask, once
// for all of them that are of the same rows and block of outputs.
// Others: every tile makes s, so one kernel wins at low ranks, with few outputs and with few rows. The
// largest padded rank at which it is taken (0: never):
//
//                      outputs, all blocks:   up to 512   up to 1536   more
//     up to 2048 rows                                64           64     16
//     more rows, no dropout                          32           16      8
//     more rows, dropout                             32           16      0
//
// The input's gradient is one kernel always: each of its elements is drawn for once.
#pragma once

#include <cstdint>

#include "cuda/lora/lora.h"

namespace mtbert::cuda {

// What a plan depends on beside the shape.
struct LoraTarget {
    int architecture;  // 10 * major + minor of the device's compute capability
    bool sm90;         // whether the binary holds the sm_90a kernels, and they serve the dtype
};

// The mma.sync kernels have two tiles: 128 rows and 256 columns (wide), or 64 and 128 (narrow). The busiest multiprocessor
// decides: how many tiles it has of each, and how long they take. In 16 bits a wide tile needs less traffic through shared
// memory for its products, a narrow one leaves less of the card idle and less beyond the columns.
struct LoraCard {
    std::int64_t multiprocessors;  // an A100's, whatever the card
    std::int64_t narrow_percent;   // time of a narrow tile's products, of a quarter of a wide one's: assumed
};
constexpr LoraCard kLoraCard{108, 110};
constexpr std::int64_t kLoraWideRank = 16;  // the most with which the fused kernel's registers suffice for wide tiles
// What a draw costs for each row of a tile that makes s, in columns of its product.
constexpr std::int64_t kLoraDrawColumns = 18;

// Columns' worth of work of a tile beside its own columns, where it makes s.
constexpr std::int64_t lora_low_columns(std::int64_t rank, bool dropout) {
    return rank + (dropout ? kLoraDrawColumns : 0);
}

// Whether a product of 16-bit elements is cut into wide tiles. low_columns: lora_low_columns where s is made, else 0.
constexpr bool lora_takes_wide(const LoraCard& card, std::int64_t rows, std::int64_t columns, std::int64_t blocks,
                               std::int64_t low_columns) {
    const std::int64_t wide = (rows + 127) / 128 * ((columns + 255) / 256) * blocks;
    const std::int64_t narrow = (rows + 63) / 64 * ((columns + 127) / 128) * blocks;
    const auto busiest = [&](std::int64_t tiles) { return (tiles + card.multiprocessors - 1) / card.multiprocessors; };
    return busiest(wide) * 2 * (256 + low_columns) * 100 <=
           busiest(narrow) * (128 + low_columns) * card.narrow_percent;
}

struct LoraPlan {
    LoraKernel forward;
    LoraKernel input;
};

// The table above.
constexpr std::int64_t kLoraFewOutputs = 512;
constexpr std::int64_t kLoraManyOutputs = 1536;
constexpr std::int64_t kLoraFewRows = 2048;
constexpr std::int64_t kLoraFusedRank[3][3] = {{64, 64, 16}, {32, 16, 8}, {32, 16, 0}};

constexpr LoraPlan lora_plan(const LoraTarget& target, const LoraShape& shape) {
    // sm_90a is code for compute capability 9.0 alone.
    if (target.sm90 && target.architecture == 90) {
        return {LoraKernel::kSM90, LoraKernel::kSM90};
    }
    const int column = shape.outputs <= kLoraFewOutputs ? 0 : shape.outputs <= kLoraManyOutputs ? 1 : 2;
    const int line = shape.rows <= kLoraFewRows ? 0 : shape.mask.threshold == 0 ? 1 : 2;
    const bool fused = shape.rank <= kLoraFusedRank[line][column];
    return {fused ? LoraKernel::kSM80 : LoraKernel::kSM80Split, LoraKernel::kSM80};
}

}  // namespace mtbert::cuda
