#include <string>

#include "cuda/cuda_ops.h"
#include "cuda/dropout.h"
#include "cuda/names.h"
#include "cuda/runtime.h"

namespace py = pybind11;

namespace mtbert {
namespace {

void dropout(std::uintptr_t input, std::uintptr_t output, std::uintptr_t dropout_row, std::int64_t rows,
             std::int64_t columns, std::int64_t input_stride, std::int64_t output_stride, const std::string& dtype,
             std::uint64_t seed, std::int64_t step, std::int64_t site, std::int64_t threshold, int device,
             std::uintptr_t stream) {
    const cuda::DropoutArguments arguments{input,         output,         dropout_row,        rows, columns,
                                           input_stride,  output_stride,  cuda::parse_dtype(dtype), seed, step,
                                           site,          threshold,      device,             stream};
    py::gil_scoped_release release;
    cuda::dropout(arguments);
}

py::dict driver_info() {
    cuda::DriverInfo info;
    {
        py::gil_scoped_release release;
        info = cuda::driver_info();
    }
    py::list devices;
    for (const cuda::DeviceProperties& device : info.devices) {
        py::dict entry;
        entry["name"] = device.name;
        entry["capability"] = py::make_tuple(device.major, device.minor);
        entry["multiprocessors"] = device.multiprocessors;
        entry["memory_bytes"] = device.memory_bytes;
        devices.append(entry);
    }
    py::dict result;
    result["driver_version"] = info.driver_version;
    result["runtime_version"] = info.runtime_version;
    result["devices"] = devices;
    result["error"] = info.error;
    return result;
}

}  // namespace

void register_cuda(py::module_& m) {
    using py::arg;
    m.def("dropout", &dropout, arg("input"), arg("output"), arg("dropout_row"), arg("rows"), arg("columns"),
          arg("input_stride"), arg("output_stride"), arg("dtype"), arg("seed"), arg("step"), arg("site"),
          arg("threshold"), arg("device"), arg("stream"),
          "Enqueue output = dropout(input) on a stream; never synchronises.\n\n"
          "input and output point to [rows, columns] of dtype (float32, float16 or bfloat16) with adjacent columns, rows\n"
          "input_stride and output_stride elements apart (output may be input); dropout_row to int32 [rows].\n"
          "ValueError for a bad argument, RuntimeError with the CUDA error's name otherwise.");
    m.def("driver_info", &driver_info,
          "driver_version and runtime_version (1000 * major + 10 * minor), devices ({name, capability, multiprocessors,\n"
          "memory_bytes}), and error: why there is no device, or ''.");
    register_lora(m);
}

}  // namespace mtbert
