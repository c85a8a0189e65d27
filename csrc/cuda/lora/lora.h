// LoRA products (Hu et al. 2021) on the GPU: y = x W^T + bias + s B^T with s = scale * dropout(x) A^T, and the backward
// pass for a frozen W. These are the entry points; they check their arguments, choose a kernel and enqueue it.
//
// M rows, K inputs, N outputs in `blocks` equal blocks (1, or 3 for fused queries, keys and values), each with an adapter
// of its own. `rank` is the rank padded with zeros to 8, 16, 32 or 64, `ranks` what each block has of it: columns of s and
// ds beyond that are written as zeros, not computed, since a padded row's 0 times an infinite element would be NaN. All matrices are row-major with adjacent columns and
// of one element type; K and N are multiples of 8. Products are accumulated in float32; float32 operands are rounded to
// TF32 first. Nothing is added by atomic operations, so that equal inputs give equal bits.
#pragma once

#include <cstdint>

#include "common/philox.h"
#include "cuda/dropout.h"

namespace mtbert::cuda {

// The mask of dropout(x); threshold 0 is no dropout, and the rest is not looked at then.
struct LoraMask {
    std::uintptr_t dropout_row;   // int32 [M]
    std::uint64_t seed;
    std::int64_t step;            // 0 to 2^32 - 1; not looked at where step_pointer is given
    std::uintptr_t step_pointer;  // int64 on the device, or 0: read when the kernel runs, so that a CUDA graph can advance it
    std::int64_t site;            // 0 to 2^32 - 1
    std::int64_t threshold;       // 0 to 65535
};

// The ranks in one word, a byte each, as kernels take them: without an array, which could not stay in registers.
struct LoraRanks {
    std::uint32_t word;

    MTBERT_HOST_DEVICE constexpr int of(int block) const { return static_cast<int>(word >> 8 * block & 0xFFu); }
};

// What all calls share.
struct LoraShape {
    std::int64_t rows;     // M
    std::int64_t inputs;   // K
    std::int64_t outputs;  // N, of all blocks together
    std::int64_t blocks;   // J
    std::int64_t rank;     // R, padded
    std::int64_t ranks[3]; // of each block, 0 to R; of lora_forward and lora_low alone
    DType dtype;
    double scale;
    LoraMask mask;
    int device;
    std::uintptr_t stream;
};

inline LoraRanks lora_ranks(const LoraShape& shape) {
    LoraRanks ranks{0};
    for (int block = 0; block < shape.blocks; ++block) {
        ranks.word |= static_cast<std::uint32_t>(shape.ranks[block]) << 8 * block;
    }
    return ranks;
}

enum class LoraKernel {
    kAuto,     // by the architecture and the shape
    kSM80,     // fused, mma.sync
    kSM80Split,
    kSM90,     // fused, wgmma
    kSM90Split,  // s by a thin product first, then one product over [x | s] [W | B]^T
};

struct LoraForward {
    LoraShape shape;
    std::uintptr_t x;       // [M, K]
    std::uintptr_t weight;  // [N, K]
    std::uintptr_t bias;    // [N], or 0
    std::uintptr_t a;       // [J * R, K]
    std::uintptr_t b;       // [N, R]
    std::uintptr_t out;     // [M, N]
    std::uintptr_t s;       // [M, J * R], written: scale and the mask's scale are in it
    std::int64_t x_stride;
    std::int64_t out_stride;
    LoraKernel kernel;
};

// y and s of LoraForward.
void lora_forward(const LoraForward& arguments);

struct LoraLow {
    LoraShape shape;           // its mask is not looked at
    std::uintptr_t grad;       // dy [M, N]
    std::uintptr_t b;          // [N, R]
    std::uintptr_t s;          // [M, J * R] of the forward pass; 0 where grad_b is 0
    std::uintptr_t ds;         // [M, J * R], written: scale * dy B
    std::uintptr_t grad_b;     // float32 [G, N, R], written: dy^T s of each group of rows; or 0
    std::uintptr_t bounds;     // int32 [G + 1] on the device, from 0 to M; 0: one group of all rows
    std::int64_t groups;       // G
    std::uintptr_t workspace;  // lora_low_workspace(shape, groups) bytes
    std::int64_t grad_stride;
};

// One pass over dy.
void lora_low(const LoraLow& arguments);
std::int64_t lora_low_workspace(const LoraShape& shape, std::int64_t groups);

struct LoraInput {
    LoraShape shape;
    std::uintptr_t grad;    // dy [M, N]
    std::uintptr_t weight;  // [N, K]
    std::uintptr_t a;       // [J * R, K]
    std::uintptr_t ds;      // [M, J * R], as lora_low writes it
    std::uintptr_t dx;      // [M, K], written
    std::int64_t grad_stride;
    std::int64_t dx_stride;
    LoraKernel kernel;
};

// dx = dy W + dropout'(ds A).
void lora_input(const LoraInput& arguments);

struct LoraGradA {
    LoraShape shape;
    std::uintptr_t x;          // [M, K]
    std::uintptr_t ds;         // [M, J * R]
    std::uintptr_t grad_a;     // float32 [G, J * R, K], written: ds^T dropout(x) of each group of rows
    std::uintptr_t bounds;     // as in LoraLow
    std::int64_t groups;
    std::uintptr_t workspace;  // lora_grad_a_workspace(shape, groups) bytes
    std::int64_t x_stride;
};

// One pass over x.
void lora_grad_a(const LoraGradA& arguments);
std::int64_t lora_grad_a_workspace(const LoraShape& shape, std::int64_t groups);

// The kernels behind them: arguments are checked already, the device is current, M is not 0.
namespace sm80 {
void forward(const LoraForward& arguments, bool s_given);  // s_given: s is read instead of written
void thin(const LoraForward& arguments);                   // writes s alone
void low(const LoraLow& arguments);
void input(const LoraInput& arguments);
void grad_a(const LoraGradA& arguments);
// Bytes of LoraLow::workspace and LoraGradA::workspace, 0 where none is needed: functions of the shape alone. Behind
// lora_low_workspace and lora_grad_a_workspace, which check the shape.
std::int64_t low_workspace(const LoraShape& shape, std::int64_t groups);
std::int64_t grad_a_workspace(const LoraShape& shape, std::int64_t groups);
}  // namespace sm80

namespace sm90 {
bool built();  // whether this binary holds the sm_90a kernels; what they serve says sm90_limits.h
void forward(const LoraForward& arguments, bool s_given);
void input(const LoraInput& arguments);
}  // namespace sm90

}  // namespace mtbert::cuda
