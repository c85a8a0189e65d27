// What Python calls the dtypes.
#pragma once

#include <stdexcept>
#include <string>

#include "cuda/dropout.h"

namespace mtbert::cuda {

inline DType parse_dtype(const std::string& name) {
    if (name == "float32") return DType::kFloat32;
    if (name == "float16") return DType::kFloat16;
    if (name == "bfloat16") return DType::kBFloat16;
    throw std::invalid_argument("dtype is '" + name + "', expected float32, float16 or bfloat16");
}

}  // namespace mtbert::cuda
