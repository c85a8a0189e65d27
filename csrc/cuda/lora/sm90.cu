// The launchers of the sm_90a kernels. This file is compiled for sm_90a alone; without that target sm90_absent.cpp
// stands in.
#include <cuda.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <string>

#include "cuda/lora/sm90_arguments.h"
#include "cuda/runtime.h"

namespace mtbert::cuda::sm90 {
namespace {

constexpr char kForward[] = "lora_forward";
constexpr char kInput[] = "lora_input";

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

// The driver's function, without linking to the driver.
EncodeTiled find_encode(const char* operation) {
    constexpr char kName[] = "cuTensorMapEncodeTiled";
    constexpr unsigned kVersion = 12000;  // the first that has it
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found{};
#if CUDART_VERSION >= 12050
    check(cudaGetDriverEntryPointByVersion(kName, &function, kVersion, cudaEnableDefault, &found),
          "cudaGetDriverEntryPointByVersion", operation);
#else
    static_assert(CUDART_VERSION >= kVersion);
    check(cudaGetDriverEntryPoint(kName, &function, cudaEnableDefault, &found), "cudaGetDriverEntryPoint", operation);
#endif
    if (found != cudaDriverEntryPointSuccess || function == nullptr) {
        throw CudaError(std::string("the driver has no cuTensorMapEncodeTiled (") + operation + ")");
    }
    return reinterpret_cast<EncodeTiled>(function);
}

TensorMap make_map(DType dtype, std::uintptr_t matrix, Dimensions dimensions, const char* operation) {
    static const EncodeTiled encode = find_encode(operation);
    constexpr int kMostDimensions = 3;
    cuuint64_t sizes[kMostDimensions], strides[kMostDimensions];
    cuuint32_t boxes[kMostDimensions], steps[kMostDimensions];
    cuuint32_t rank = 0;
    for (const Dimension& dimension : dimensions) {
        sizes[rank] = static_cast<cuuint64_t>(dimension.size);
        boxes[rank] = static_cast<cuuint32_t>(dimension.box);
        steps[rank] = 1;
        if (rank > 0) {
            strides[rank - 1] = static_cast<cuuint64_t>(dimension.stride_bytes);
        }
        ++rank;
    }
    TensorMap map;
    const CUresult status = encode(
        &map, dtype == DType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, rank,
        reinterpret_cast<void*>(matrix), sizes, strides, boxes, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
        CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    // The runtime has the driver's numbers for the errors that this function gives.
    check(static_cast<int>(status), "cuTensorMapEncodeTiled", operation);
    return map;
}

int multiprocessors(int device, const char* operation) {
    int count = 0;
    check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute", operation);
    return count;
}

template <typename Arguments>
void launch(void (*kernel)(Arguments), Arguments& arguments, int shared_bytes, const LoraShape& shape,
            const char* operation) {
    load_kernel(reinterpret_cast<const void*>(kernel), shared_bytes, shape.device, operation);
    const Schedule& schedule = arguments.schedule;
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = static_cast<unsigned>(schedule.cluster);
    attribute.val.clusterDim.y = 1;
    attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(schedule.clusters() * schedule.cluster));
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = static_cast<std::size_t>(shared_bytes);
    config.stream = reinterpret_cast<cudaStream_t>(shape.stream);
    config.attrs = &attribute;
    config.numAttrs = 1;
    void* parameters[] = {&arguments};
    check(cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), parameters), "cudaLaunchKernelExC",
          operation);
}

template <typename T, int kColumns, int kRank>
void launch_forward(ForwardArguments& arguments, const LoraShape& shape) {
    launch(&forward_kernel<T, kColumns, kRank>, arguments, StaticMemory<kColumns, kRank>::kTotal, shape, kForward);
}

template <typename T, int kColumns>
void forward_by_rank(ForwardArguments& arguments, const LoraShape& shape) {
    switch (multiplied_rank(shape.rank)) {
        case 64:
            return launch_forward<T, kColumns, 64>(arguments, shape);
        case 32:
            return launch_forward<T, kColumns, 32>(arguments, shape);
        default:
            return launch_forward<T, kColumns, 16>(arguments, shape);
    }
}

template <typename T>
void forward_by_columns(ForwardArguments& arguments, const LoraShape& shape) {
    switch (arguments.schedule.columns) {
        case 256:
            return forward_by_rank<T, 256>(arguments, shape);
        case 192:
            return forward_by_rank<T, 192>(arguments, shape);
        default:
            return forward_by_rank<T, 128>(arguments, shape);
    }
}

template <typename T, int kColumns>
void launch_input(InputArguments& arguments, const LoraShape& shape) {
    launch(&input_kernel<T, kColumns>, arguments, StaticMemory<kColumns, 0>::kTotal, shape, kInput);
}

template <typename T>
void input_by_columns(InputArguments& arguments, const LoraShape& shape) {
    switch (arguments.schedule.columns) {
        case 256:
            return launch_input<T, 256>(arguments, shape);
        case 192:
            return launch_input<T, 192>(arguments, shape);
        default:
            return launch_input<T, 128>(arguments, shape);
    }
}

}  // namespace

bool built() { return true; }

void forward(const LoraForward& call, bool s_given) {
    const LoraShape& shape = call.shape;
    const Cut cut{choose_columns(shape.rows, shape.outputs / shape.blocks, static_cast<int>(shape.blocks)),
                  choose_cluster(shape.rows), multiprocessors(shape.device, kForward)};
    ForwardArguments arguments = make_arguments(call, s_given, cut, [&](std::uintptr_t matrix, Dimensions dimensions) {
        return make_map(shape.dtype, matrix, dimensions, kForward);
    });
    shape.dtype == DType::kFloat16 ? forward_by_columns<machine::FP16>(arguments, shape)
                                   : forward_by_columns<machine::BF16>(arguments, shape);
}

void input(const LoraInput& call) {
    const LoraShape& shape = call.shape;
    const Cut cut{choose_columns(shape.rows, shape.inputs, 1), choose_cluster(shape.rows),
                  multiprocessors(shape.device, kInput)};
    InputArguments arguments = make_arguments(call, cut, [&](std::uintptr_t matrix, Dimensions dimensions) {
        return make_map(shape.dtype, matrix, dimensions, kInput);
    });
    shape.dtype == DType::kFloat16 ? input_by_columns<machine::FP16>(arguments, shape)
                                   : input_by_columns<machine::BF16>(arguments, shape);
}

}  // namespace mtbert::cuda::sm90
