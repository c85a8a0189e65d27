// Stateless dropout on the GPU: the launcher.
#pragma once

#include <cstdint>

namespace mtbert::cuda {

enum class DType { kFloat32, kFloat16, kBFloat16 };

struct DropoutArguments {
    std::uintptr_t input;        // [rows, columns], rows input_stride elements apart, columns adjacent
    std::uintptr_t output;       // the same shape and dtype; may be the input itself
    std::uintptr_t dropout_row;  // int32 [rows]
    std::int64_t rows;
    std::int64_t columns;
    std::int64_t input_stride;
    std::int64_t output_stride;
    DType dtype;
    std::uint64_t seed;
    std::int64_t step;       // 0 to 2^32 - 1
    std::int64_t site;       // 0 to 2^32 - 1
    std::int64_t threshold;  // 0 to 65535
    int device;
    std::uintptr_t stream;  // a cudaStream_t; 0 is the default stream
};

// output = input * scale where the mask keeps, 0 where it drops, whatever the input holds there; the product is rounded
// once, from float32. The backward pass is the same call on the gradient.
void dropout(const DropoutArguments& arguments);

}  // namespace mtbert::cuda
