// What the module takes from csrc/cpu/.
#pragma once

#include <pybind11/pybind11.h>

namespace mtbert {

void register_cpu(pybind11::module_& m);

}  // namespace mtbert
