// The Python module mtbert._C: the submodules cpu and, when it was built with nvcc, cuda, and a record of the build.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <string>

#include "common/philox.h"
#include "cpu/cpu_ops.h"
#ifdef MTBERT_WITH_CUDA
#include "cuda/cuda_ops.h"
#endif

namespace py = pybind11;

namespace {

py::list split(const std::string& text, char separator) {
    py::list parts;
    std::size_t begin = 0;
    while (begin < text.size()) {
        const std::size_t end = std::min(text.find(separator, begin), text.size());
        parts.append(text.substr(begin, end - begin));
        begin = end + 1;
    }
    return parts;
}

py::dict build_info() {
    py::dict info;
    info["version"] = MTBERT_VERSION;
    info["sources"] = MTBERT_SOURCES;
    info["compiler"] = MTBERT_COMPILER;
    info["processor"] = MTBERT_PROCESSOR;
    info["instruction_sets"] = split(MTBERT_INSTRUCTION_SETS, ' ');
    info["pybind11"] = PYBIND11_TOSTRING(PYBIND11_VERSION_MAJOR) "." PYBIND11_TOSTRING(PYBIND11_VERSION_MINOR);
#ifdef MTBERT_WITH_CUDA
    py::dict cuda;
    cuda["nvcc"] = MTBERT_NVCC;
    cuda["architectures"] = split(MTBERT_CUDA_TARGETS, ' ');
    info["cuda"] = cuda;
#else
    info["cuda"] = py::none();
#endif
    return info;
}

std::array<std::uint32_t, 4> philox4x32_10(std::array<std::uint32_t, 4> counter, std::array<std::uint32_t, 2> key) {
    const mtbert::Philox4 draw =
        mtbert::philox4x32_10(mtbert::Philox4{{counter[0], counter[1], counter[2], counter[3]}}, key[0], key[1]);
    return {draw.word[0], draw.word[1], draw.word[2], draw.word[3]};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "C++ and CUDA kernels of mtbert. Functions take pointers as integers and know no framework.";
    m.def("build_info", &build_info,
          "What this extension was built from and with: version, sources (sha256 of csrc/ and CMakeLists.txt), compiler,\n"
          "processor, instruction_sets, pybind11, and cuda ({nvcc, architectures}, or None when built without nvcc).");
    m.def("philox4x32_10", &philox4x32_10, py::arg("counter"), py::arg("key"),
          "One draw of the generator behind every dropout mask: four words for a counter of four and a key of two.");

    py::module_ cpu = m.def_submodule("cpu", "Operations on host memory.");
    mtbert::register_cpu(cpu);
#ifdef MTBERT_WITH_CUDA
    py::module_ cuda = m.def_submodule("cuda", "Operations on device memory.");
    mtbert::register_cuda(cuda);
#endif
}
