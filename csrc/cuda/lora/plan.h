// Which kernel serves a LoRA product: a function of the architecture and the shape alone, so that equal calls give equal
// bits on every card of an architecture. No CUDA header is needed: the host compiler tests it.
//
// One kernel (fused) makes s = scale * dropout(x) A^T beside y, and draws the mask, as often as a thread block needs rows of
// s that it does not have. Two kernels (split) make it once, but read x twice and launch twice. By the model of
// bench/lora_model.py:
//
// sm_90: one kernel at every rank; its blocks keep s for the following tiles of the same rows.
// Others: every tile of 128 or 256 outputs makes s, so one kernel wins at low ranks, with few outputs and with few rows. The
// largest padded rank at which it is taken (0: never):
//
//                      outputs, all blocks:   up to 512   up to 1536   more
//     up to 2048 rows                                64           64     32
//     more rows, no dropout                          32           32      8
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

struct LoraPlan {
    LoraKernel forward;
    LoraKernel input;
};

// The table above.
constexpr std::int64_t kLoraFewOutputs = 512;
constexpr std::int64_t kLoraManyOutputs = 1536;
constexpr std::int64_t kLoraFewRows = 2048;
constexpr std::int64_t kLoraFusedRank[3][3] = {{64, 64, 32}, {32, 32, 8}, {32, 16, 0}};

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
