#include <pybind11/stl.h>

#include <algorithm>
#include <iterator>
#include <string>
#include <vector>

#include "cuda/cuda_ops.h"
#include "cuda/lora/lora.h"
#include "cuda/lora/plan.h"
#include "cuda/lora/sm90_limits.h"
#include "cuda/names.h"

namespace py = pybind11;

namespace mtbert {
namespace {

using cuda::LoraKernel;
using Pointer = std::uintptr_t;
using Size = std::int64_t;

constexpr struct {
    const char* name;
    LoraKernel kernel;
} kKernels[] = {{"auto", LoraKernel::kAuto},
                {"sm80", LoraKernel::kSM80},
                {"sm80_split", LoraKernel::kSM80Split},
                {"sm90", LoraKernel::kSM90},
                {"sm90_split", LoraKernel::kSM90Split}};

LoraKernel parse_kernel(const std::string& name) {
    for (const auto& entry : kKernels) {
        if (name == entry.name) return entry.kernel;
    }
    throw std::invalid_argument("kernel is '" + name + "', expected auto, sm80, sm80_split, sm90 or sm90_split");
}

std::string kernel_name(LoraKernel kernel) {
    for (const auto& entry : kKernels) {
        if (kernel == entry.kernel) return entry.name;
    }
    return "";
}

cuda::LoraShape shape_of(Size rows, Size inputs, Size outputs, Size blocks, Size rank, const std::string& dtype,
                         double scale, const cuda::LoraMask& mask, int device, Pointer stream) {
    return {rows, inputs, outputs, blocks, rank, {}, cuda::parse_dtype(dtype), scale, mask, device, stream};
}

// The shape with a rank for each of its blocks.
cuda::LoraShape with_ranks(cuda::LoraShape shape, const std::vector<Size>& ranks, const char* operation) {
    if (static_cast<Size>(ranks.size()) != shape.blocks || ranks.size() > std::size(shape.ranks)) {
        throw std::invalid_argument(std::string(operation) + ": ranks has " + std::to_string(ranks.size()) +
                                    " elements, expected blocks, " + std::to_string(shape.blocks) + " of at most " +
                                    std::to_string(std::size(shape.ranks)));
    }
    std::copy(ranks.begin(), ranks.end(), std::begin(shape.ranks));
    return shape;
}

void lora_forward(Pointer x, Pointer weight, Pointer bias, Pointer a, Pointer b, Pointer out, Pointer s, Size rows,
                  Size inputs, Size outputs, Size blocks, Size rank, const std::vector<Size>& ranks, Size x_stride,
                  Size out_stride, const std::string& dtype, double scale, Pointer dropout_row,
                  std::uint64_t seed, Size step, Pointer step_pointer, Size site, Size threshold, int device, Pointer stream,
                  const std::string& kernel) {
    const cuda::LoraMask mask{dropout_row, seed, step, step_pointer, site, threshold};
    const cuda::LoraForward arguments{
        with_ranks(shape_of(rows, inputs, outputs, blocks, rank, dtype, scale, mask, device, stream), ranks,
                   "lora_forward"),
        x, weight, bias, a, b, out, s, x_stride, out_stride, parse_kernel(kernel)};
    py::gil_scoped_release release;
    cuda::lora_forward(arguments);
}

void lora_low(Pointer grad, Pointer b, Pointer s, Pointer ds, Pointer grad_b, Pointer bounds, Size groups,
              Pointer workspace, Size rows, Size inputs, Size outputs, Size blocks, Size rank,
              const std::vector<Size>& ranks, Size grad_stride, const std::string& dtype, double scale, int device,
              Pointer stream) {
    const cuda::LoraLow arguments{with_ranks(shape_of(rows, inputs, outputs, blocks, rank, dtype, scale, {}, device,
                                                      stream), ranks, "lora_low"),
                                  grad, b, s, ds, grad_b, bounds, groups, workspace, grad_stride};
    py::gil_scoped_release release;
    cuda::lora_low(arguments);
}

Size lora_low_workspace(Size rows, Size inputs, Size outputs, Size blocks, Size rank, const std::string& dtype,
                        Size groups) {
    return cuda::lora_low_workspace(shape_of(rows, inputs, outputs, blocks, rank, dtype, 1.0, {}, 0, 0), groups);
}

void lora_input(Pointer grad, Pointer weight, Pointer a, Pointer ds, Pointer dx, Size rows, Size inputs, Size outputs,
                Size blocks, Size rank, Size grad_stride, Size dx_stride, const std::string& dtype,
                Pointer dropout_row, std::uint64_t seed, Size step, Pointer step_pointer, Size site, Size threshold,
                int device, Pointer stream, const std::string& kernel) {
    const cuda::LoraMask mask{dropout_row, seed, step, step_pointer, site, threshold};
    const cuda::LoraInput arguments{shape_of(rows, inputs, outputs, blocks, rank, dtype, 1.0, mask, device, stream),
                                    grad, weight, a, ds, dx, grad_stride, dx_stride, parse_kernel(kernel)};
    py::gil_scoped_release release;
    cuda::lora_input(arguments);
}

void lora_grad_a(Pointer x, Pointer ds, Pointer grad_a, Pointer bounds, Size groups, Pointer workspace, Size rows,
                 Size inputs, Size outputs, Size blocks, Size rank, Size x_stride, const std::string& dtype,
                 Pointer dropout_row, std::uint64_t seed, Size step, Pointer step_pointer, Size site, Size threshold,
                 int device, Pointer stream) {
    const cuda::LoraMask mask{dropout_row, seed, step, step_pointer, site, threshold};
    const cuda::LoraGradA arguments{shape_of(rows, inputs, outputs, blocks, rank, dtype, 1.0, mask, device, stream),
                                    x, ds, grad_a, bounds, groups, workspace, x_stride};
    py::gil_scoped_release release;
    cuda::lora_grad_a(arguments);
}

Size lora_grad_a_workspace(Size rows, Size inputs, Size outputs, Size blocks, Size rank, const std::string& dtype,
                           Size groups) {
    return cuda::lora_grad_a_workspace(shape_of(rows, inputs, outputs, blocks, rank, dtype, 1.0, {}, 0, 0), groups);
}

py::dict lora_plan(int architecture, Size rows, Size inputs, Size outputs, Size blocks, Size rank,
                   const std::string& dtype, Size threshold) {
    const cuda::LoraMask mask{0, 0, 0, 0, 0, threshold};
    const cuda::LoraShape shape = shape_of(rows, inputs, outputs, blocks, rank, dtype, 1.0, mask, 0, 0);
    const auto plan = [&](const std::string& refusal) {
        return cuda::lora_plan({architecture, cuda::sm90::built() && refusal.empty()}, shape);
    };
    py::dict result;
    result["forward"] = kernel_name(plan(cuda::sm90::forward_refusal(shape)).forward);
    result["input"] = kernel_name(plan(cuda::sm90::input_refusal(shape)).input);
    return result;
}

}  // namespace

void register_lora(py::module_& m) {
    using py::arg;
    m.def("lora_forward", &lora_forward, arg("x"), arg("weight"), arg("bias"), arg("a"), arg("b"), arg("out"), arg("s"),
          arg("rows"), arg("inputs"), arg("outputs"), arg("blocks"), arg("rank"), arg("ranks"), arg("x_stride"),
          arg("out_stride"), arg("dtype"), arg("scale"), arg("dropout_row"), arg("seed"), arg("step"), arg("step_pointer"), arg("site"),
          arg("threshold"), arg("device"), arg("stream"), arg("kernel") = "auto",
          "Enqueue s = scale * dropout(x) a^T and out = x weight^T + bias + s b^T on a stream; never synchronises.\n\n"
          "x [M, K], weight [N, K], bias [N] (or 0), a [J * R, K], b [N, R], out [M, N] and s [M, J * R] are pointers to\n"
          "dtype (float32, which is multiplied as TF32, float16 or bfloat16) with adjacent columns; rows of x and out are\n"
          "x_stride and out_stride elements apart. M rows, K inputs, N outputs in J blocks, R the padded rank: 8, 16, 32 or\n"
          "64; each block of N / J outputs has its own R rows of a and R columns of s. ranks: of each block, 0 to R; columns\n"
          "of s beyond it are zero, whatever x holds, and rows of a and columns of b there have to be zero. dropout_row: int32 [M], not looked at\n"
          "where threshold is 0; step_pointer: an int64 on the device in place of step, or 0. kernel: auto, sm80, sm80_split,\n"
          "sm90 or sm90_split. ValueError for a bad argument, RuntimeError with the CUDA error's name otherwise.");
    m.def("lora_low", &lora_low, arg("grad"), arg("b"), arg("s"), arg("ds"), arg("grad_b"), arg("bounds"),
          arg("groups"), arg("workspace"), arg("rows"), arg("inputs"), arg("outputs"), arg("blocks"), arg("rank"),
          arg("ranks"), arg("grad_stride"), arg("dtype"), arg("scale"), arg("device"), arg("stream"),
          "Enqueue ds = scale * grad b and grad_b = grad^T s in one pass over grad.\n\n"
          "grad [M, N], rows grad_stride apart; b [N, R]; s and ds [M, J * R]; grad_b float32 [G, N, R], one of each group of\n"
          "rows, or 0, and then s is not read; ranks as in lora_forward, of ds; bounds: int32 [G + 1] on the device, ascending from 0 to M, or 0 for one group;\n"
          "workspace: lora_low_workspace bytes.");
    m.def("lora_low_workspace", &lora_low_workspace, arg("rows"), arg("inputs"), arg("outputs"), arg("blocks"),
          arg("rank"), arg("dtype"), arg("groups"), "Bytes of device memory that lora_low needs beside its results.");
    m.def("lora_input", &lora_input, arg("grad"), arg("weight"), arg("a"), arg("ds"), arg("dx"), arg("rows"),
          arg("inputs"), arg("outputs"), arg("blocks"), arg("rank"), arg("grad_stride"), arg("dx_stride"), arg("dtype"),
          arg("dropout_row"), arg("seed"), arg("step"), arg("step_pointer"), arg("site"), arg("threshold"),
          arg("device"), arg("stream"), arg("kernel") = "auto",
          "Enqueue dx = grad weight + dropout(ds a), dx [M, K], with the mask of the forward pass. ds as lora_low writes it.\n"
          "kernel: auto, sm80 or sm90.");
    m.def("lora_grad_a", &lora_grad_a, arg("x"), arg("ds"), arg("grad_a"), arg("bounds"), arg("groups"),
          arg("workspace"), arg("rows"), arg("inputs"), arg("outputs"), arg("blocks"), arg("rank"), arg("x_stride"),
          arg("dtype"), arg("dropout_row"), arg("seed"), arg("step"), arg("step_pointer"), arg("site"),
          arg("threshold"), arg("device"), arg("stream"),
          "Enqueue grad_a = ds^T dropout(x), float32 [G, J * R, K], one of each group of rows; bounds and groups as in lora_low;\n"
          "workspace: lora_grad_a_workspace bytes.");
    m.def("lora_grad_a_workspace", &lora_grad_a_workspace, arg("rows"), arg("inputs"), arg("outputs"), arg("blocks"),
          arg("rank"), arg("dtype"), arg("groups"),
          "Bytes of device memory that lora_grad_a needs beside its result.");
    m.def("lora_plan", &lora_plan, arg("architecture"), arg("rows"), arg("inputs"), arg("outputs"), arg("blocks"),
          arg("rank"), arg("dtype"), arg("threshold"),
          "The kernels that kernel='auto' takes on a device of an architecture (10 * major + minor): {forward, input}.");
}

}  // namespace mtbert
