// The glue between Python and the CUDA half of mtbert._C.
#pragma once

#include <pybind11/pybind11.h>

namespace mtbert {

// Adds the CUDA functions to the submodule mtbert._C.cuda.
void register_cuda(pybind11::module_& m);

// Its part for the LoRA products.
void register_lora(pybind11::module_& m);

}  // namespace mtbert
