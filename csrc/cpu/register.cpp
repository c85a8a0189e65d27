// The Python functions of mtbert._C.cpu.
#include "cpu/cpu_ops.h"

namespace py = pybind11;

namespace mtbert {

void register_cpu(py::module_&) {}

}  // namespace mtbert
