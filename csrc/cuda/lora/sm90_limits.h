// What the sm_90a kernels of the LoRA products cannot do, with the reason. Plain functions of the shape: tests run them
// with the host compiler.
#pragma once

#include <cstdint>
#include <string>

#include "cuda/lora/lora.h"

namespace mtbert::cuda::sm90 {

// The least width and the height of a tile of the result, and how many the kernels count in 32 bits.
constexpr std::int64_t kLeastTile = 128;
constexpr std::int64_t kMostTiles = std::int64_t{1} << 30;

// Why a result of `columns` columns in `blocks` blocks of them cannot be computed: the argument, what it is and what is
// expected. Empty: it can.
inline std::string product_refusal(const LoraShape& shape, std::int64_t columns, std::int64_t blocks,
                                   const char* name) {
    if (shape.dtype == DType::kFloat32) {
        return "dtype is float32, expected float16 or bfloat16";
    }
    const auto tiles_of = [](std::int64_t size) { return (size + kLeastTile - 1) / kLeastTile; };
    const std::int64_t tiles = tiles_of(shape.rows) * tiles_of(columns / blocks) * blocks;
    if (tiles > kMostTiles) {
        return "rows " + std::to_string(shape.rows) + " and " + name + " " + std::to_string(columns) + " are " +
               std::to_string(tiles) + " tiles, expected at most " + std::to_string(kMostTiles);
    }
    // Rows are counted in 32 bits too, up to the end of the last tiles of a cluster.
    if (shape.rows > kMostTiles) {
        return "rows is " + std::to_string(shape.rows) + ", expected at most " + std::to_string(kMostTiles);
    }
    return {};
}

inline std::string forward_refusal(const LoraShape& shape) {
    return product_refusal(shape, shape.outputs, shape.blocks, "outputs");
}
inline std::string input_refusal(const LoraShape& shape) { return product_refusal(shape, shape.inputs, 1, "inputs"); }

}  // namespace mtbert::cuda::sm90
