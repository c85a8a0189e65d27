// The sm_80 kernels behind lora.h: the element type is chosen here, the variant in sm80_run.h.
#include <cuda_runtime.h>

#include <limits>
#include <stdexcept>
#include <string>

#include "cuda/lora/lora.h"
#include "cuda/lora/sm80_launch.h"
#include "cuda/lora/sm80_run.h"
#include "cuda/runtime.h"

namespace mtbert::cuda::sm80 {
namespace {

// Calls body with a value of the element type.
template <typename Body>
void dispatch(DType dtype, const Body& body) {
    switch (dtype) {
        case DType::kFloat32:
            return body(float{});
        case DType::kFloat16:
            return body(machine::FP16{});
        case DType::kBFloat16:
            return body(machine::BF16{});
    }
}

}  // namespace

void enqueue(const void* kernel, std::int64_t blocks, int threads, int shared_bytes, void* parameter, int device,
             std::uintptr_t stream, const char* operation) {
    if (blocks > std::numeric_limits<std::int32_t>::max()) {
        throw std::invalid_argument(std::string(operation) + ": the shape needs " + std::to_string(blocks) +
                                    " blocks of threads, expected less than 2^31");
    }
    if (blocks == 0) {
        return;
    }
    load_kernel(kernel, shared_bytes, device, operation);
    void* parameters[] = {parameter};
    // cudaLaunchKernel returns its own status: cudaGetLastError after <<<>>> could blame this launch for another's.
    const dim3 grid(static_cast<unsigned>(blocks)), block(static_cast<unsigned>(threads));
    check(cudaLaunchKernel(kernel, grid, block, parameters, static_cast<std::size_t>(shared_bytes),
                           reinterpret_cast<cudaStream_t>(stream)),
          "cudaLaunchKernel", operation);
}

void forward(const LoraForward& arguments, bool s_given) {
    dispatch(arguments.shape.dtype, [&](auto element) { forward_of<decltype(element)>(arguments, s_given); });
}

void thin(const LoraForward& arguments) {
    dispatch(arguments.shape.dtype, [&](auto element) { thin_of<decltype(element)>(arguments); });
}

void low(const LoraLow& arguments) {
    dispatch(arguments.shape.dtype, [&](auto element) { low_of<decltype(element)>(arguments); });
}

void input(const LoraInput& arguments) {
    dispatch(arguments.shape.dtype, [&](auto element) { input_of<decltype(element)>(arguments); });
}

void grad_a(const LoraGradA& arguments) {
    dispatch(arguments.shape.dtype, [&](auto element) { grad_a_of<decltype(element)>(arguments); });
}

std::int64_t low_workspace(const LoraShape& shape, std::int64_t groups) {
    const LowPlan plan = plan_low(shape, groups);
    return kFloatBytes * (plan.part_b + plan.part_ds);
}

std::int64_t grad_a_workspace(const LoraShape& shape, std::int64_t groups) {
    return kFloatBytes * plan_grad_a(shape, groups).part;
}

}  // namespace mtbert::cuda::sm80
