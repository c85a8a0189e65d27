// What every instruction set offers: one table of functions, and the arguments that they take.
#pragma once

#include <cstdint>

#include "common/philox.h"

namespace mtbert {

enum class DType { kFloat32, kBFloat16 };

// The longest row, and the mask's columns that one attention head takes.
constexpr std::int64_t kHeadColumns = 4096;
// The widest attention head; its width is a multiple of 16.
constexpr std::int64_t kMaxHeadDim = 128;

// A dropout mask; row == nullptr means that nothing is dropped.
struct Mask {
    const std::int32_t* row;  // [rows of the operation]
    DropoutKey key;
};

struct DropoutArguments {
    const void* x;  // [rows, columns]
    void* out;
    std::int64_t rows;
    std::int64_t columns;
    DType dtype;
    Mask mask;
    int threads;
};

struct ColumnSumsArguments {
    const void* x;  // [rows, columns]
    float* out;     // [columns]
    std::int64_t rows;
    std::int64_t columns;
    DType dtype;
    int threads;
};

struct AttentionArguments {
    const void* qkv;                 // [tokens, 3, heads, head_dim]
    const std::int32_t* cu_seqlens;  // [sequences + 1]
    std::int64_t tokens;
    std::int64_t sequences;
    std::int64_t heads;
    std::int64_t head_dim;  // a multiple of 16
    float scale;
    DType dtype;
    Mask mask;
    int threads;
    void* out;         // [tokens, heads, head_dim]; forward only
    const void* dout;  // backward only
    void* dqkv;        // backward only
};

struct FirstTokenAttentionArguments {
    const void* query;               // [sequences, heads, head_dim]
    const void* key_value;           // [tokens, 2, heads, head_dim]
    const std::int32_t* cu_seqlens;  // [sequences + 1]
    std::int64_t tokens;
    std::int64_t sequences;
    std::int64_t heads;
    std::int64_t head_dim;
    float scale;
    DType dtype;
    Mask mask;  // rows are sequences
    int threads;
    void* out;         // [sequences, heads, head_dim]; forward only
    const void* dout;  // backward only
    void* dquery;      // backward only
    void* dkey_value;  // backward only
};

// A gradient pointer of nullptr means that this gradient is not wanted.
struct AddLayerNormArguments {
    const void* x;  // [rows, columns]
    const void* residual;
    const float* linear_bias;  // [columns], or nullptr
    const float* weight;
    const float* bias;  // forward only
    float* mean;        // [rows]; written by forward, read by backward
    float* rstd;
    std::int64_t rows;
    std::int64_t columns;
    float eps;
    DType dtype;
    Mask mask;
    int threads;
    void* out;
    const void* dout;
    void* dx;
    void* dresidual;
    float* dweight;
    float* dbias;
    float* dlinear_bias;
};

struct BiasGeluArguments {
    const void* x;  // [rows, columns]
    const float* bias;
    std::int64_t rows;
    std::int64_t columns;
    DType dtype;
    int threads;
    void* out;
    const void* dout;
    void* dx;
    float* dbias;
};

// Word, position and token type tables, in this order.
struct EmbeddingArguments {
    const std::int32_t* indices[3];  // [rows]
    const void* tables[3];           // [anything, columns]
    const float* weight;
    const float* bias;
    float* mean;
    float* rstd;
    std::int64_t rows;
    std::int64_t columns;
    float eps;
    DType dtype;
    DType table_dtype;
    Mask mask;
    int threads;
    void* out;
    const void* dout;
    float* dtables[3];              // zeroed by the caller
    const std::int32_t* targets[3];  // [rows]: the row of dtables[i] that a token's gradient goes to; backward only
    float* dweight;
    float* dbias;
};

struct Kernels {
    const char* name;
    void (*dropout)(const DropoutArguments&);
    void (*column_sums)(const ColumnSumsArguments&);
    void (*attention_forward)(const AttentionArguments&);
    void (*attention_backward)(const AttentionArguments&);
    void (*first_token_attention_forward)(const FirstTokenAttentionArguments&);
    void (*first_token_attention_backward)(const FirstTokenAttentionArguments&);
    void (*add_layer_norm_forward)(const AddLayerNormArguments&);
    void (*add_layer_norm_backward)(const AddLayerNormArguments&);
    void (*bias_gelu_forward)(const BiasGeluArguments&);
    void (*bias_gelu_backward)(const BiasGeluArguments&);
    void (*embedding_forward)(const EmbeddingArguments&);
    void (*embedding_backward)(const EmbeddingArguments&);
};

const Kernels* kernels_baseline();
#ifdef MTBERT_X86
const Kernels* kernels_avx2();
const Kernels* kernels_avx512();
// nullptr where the compiler has no AVX512-BF16.
const Kernels* kernels_avx512bf16();
#endif

}  // namespace mtbert
