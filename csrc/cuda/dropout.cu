#include "cuda/dropout.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <limits>
#include <string>

#include "common/philox.h"
#include "cuda/runtime.h"

namespace mtbert::cuda {
namespace {

constexpr int kThreads = 256;
constexpr std::size_t kVectorBytes = 16;
constexpr char kOperation[] = "dropout";

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) {
    return value;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float value) {
    return __float2half_rn(value);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
    return __float2bfloat16_rn(value);
}

// Eight neighbouring elements, moved in 16-byte pieces.
template <typename T>
struct alignas(kVectorBytes) Lanes {
    T value[kDropoutLanes];
};

// A thread serves the eight columns of one draw at a time, then strides over the grid. Index is 32 bits wide where the
// number of draws allows it: the division by groups is most of the address arithmetic. Vector: every group is whole and
// 16-byte aligned. The input may be the output: each element is read and written by one thread.
template <typename T, typename Index, bool kVector>
__global__ void __launch_bounds__(kThreads)
    dropout_kernel(const T* input, T* output, const std::int32_t* dropout_row, Index draws, Index groups,
                   std::int64_t columns, std::int64_t input_stride, std::int64_t output_stride, DropoutKey key) {
    const Index stride = static_cast<Index>(gridDim.x) * kThreads;
    for (Index index = static_cast<Index>(blockIdx.x) * kThreads + threadIdx.x; index < draws; index += stride) {
        const Index row = index / groups;
        const Index group = index - row * groups;
        const std::int64_t column = static_cast<std::int64_t>(group) * kDropoutLanes;
        const T* source = input + static_cast<std::int64_t>(row) * input_stride + column;
        T* target = output + static_cast<std::int64_t>(row) * output_stride + column;
        const Philox4 draw = dropout_draw(key, static_cast<std::uint32_t>(dropout_row[row]),
                                          static_cast<std::uint32_t>(group));
        if constexpr (kVector) {
            Lanes<T> lanes = *reinterpret_cast<const Lanes<T>*>(source);
            MTBERT_UNROLL
            for (int lane = 0; lane < kDropoutLanes; ++lane) {
                const bool kept = dropout_lane(draw, lane) >= key.threshold;
                lanes.value[lane] = from_float<T>(kept ? to_float(lanes.value[lane]) * key.scale : 0.0f);
            }
            *reinterpret_cast<Lanes<T>*>(target) = lanes;
        } else {
            MTBERT_UNROLL
            for (int lane = 0; lane < kDropoutLanes; ++lane) {
                if (column + lane < columns) {
                    const bool kept = dropout_lane(draw, lane) >= key.threshold;
                    target[lane] = from_float<T>(kept ? to_float(source[lane]) * key.scale : 0.0f);
                }
            }
        }
    }
}

template <typename T, typename Index, bool kVector>
void launch(const DropoutArguments& a, std::int64_t draws, std::int64_t groups) {
    const std::int64_t blocks = (draws + kThreads - 1) / kThreads;
    // The stride over the grid must not overflow Index: a quarter of its range, of which the kernel's loop adds one.
    const std::int64_t most = static_cast<std::int64_t>(std::numeric_limits<std::uint32_t>::max()) / 4 / kThreads;
    const dim3 grid(static_cast<unsigned>(std::min(blocks, most)));
    const auto* input = reinterpret_cast<const T*>(a.input);
    auto* output = reinterpret_cast<T*>(a.output);
    const auto* dropout_row = reinterpret_cast<const std::int32_t*>(a.dropout_row);
    Index draw_count = static_cast<Index>(draws);
    Index group_count = static_cast<Index>(groups);
    std::int64_t columns = a.columns;
    std::int64_t input_stride = a.input_stride;
    std::int64_t output_stride = a.output_stride;
    DropoutKey key = make_dropout_key(a.seed, static_cast<std::uint32_t>(a.step), static_cast<std::uint32_t>(a.site),
                                      static_cast<std::uint32_t>(a.threshold));
    void* parameters[] = {&input,   &output,       &dropout_row,   &draw_count, &group_count,
                          &columns, &input_stride, &output_stride, &key};
    // cudaLaunchKernel returns its own status: cudaGetLastError after <<<>>> could blame this launch for another's.
    check(cudaLaunchKernel(reinterpret_cast<const void*>(&dropout_kernel<T, Index, kVector>), grid, dim3(kThreads),
                           parameters, 0, reinterpret_cast<cudaStream_t>(a.stream)),
          "cudaLaunchKernel", kOperation);
}

template <typename T>
void dispatch(const DropoutArguments& a) {
    const std::int64_t groups = (a.columns + kDropoutLanes - 1) / kDropoutLanes;
    const std::int64_t draws = a.rows * groups;
    const auto aligned = [](std::uintptr_t pointer, std::int64_t stride) {
        return pointer % kVectorBytes == 0 && stride * static_cast<std::int64_t>(sizeof(T)) % kVectorBytes == 0;
    };
    const bool vector = a.columns % kDropoutLanes == 0 && aligned(a.input, a.input_stride) &&
                        aligned(a.output, a.output_stride);
    // Half of the unsigned range, so that index + stride stays inside it.
    const bool narrow = draws <= std::numeric_limits<std::int32_t>::max();
    if (narrow) {
        vector ? launch<T, std::uint32_t, true>(a, draws, groups) : launch<T, std::uint32_t, false>(a, draws, groups);
    } else {
        vector ? launch<T, std::uint64_t, true>(a, draws, groups) : launch<T, std::uint64_t, false>(a, draws, groups);
    }
}

void require(bool condition, const std::string& message) {
    if (!condition) {
        throw std::invalid_argument(std::string(kOperation) + ": " + message);
    }
}

void require_range(std::int64_t value, std::int64_t low, std::int64_t high, const char* name) {
    require(low <= value && value <= high, std::string(name) + " is " + std::to_string(value) + ", expected " +
                                               std::to_string(low) + " to " + std::to_string(high));
}

std::size_t element_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

void check_arguments(const DropoutArguments& a) {
    constexpr std::int64_t kWord = std::numeric_limits<std::uint32_t>::max();
    // Byte offsets stay below 2^60, far beyond any memory, so that their products cannot overflow.
    constexpr std::int64_t kMostRows = std::int64_t{1} << 31;
    constexpr std::int64_t kMostElements = std::int64_t{1} << 28;
    require_range(a.rows, 0, kMostRows, "rows");
    require_range(a.columns, 0, kMostElements, "columns");
    require_range(a.input_stride, a.rows > 1 ? a.columns : 0, kMostElements, "input_stride");
    require_range(a.output_stride, a.rows > 1 ? a.columns : 0, kMostElements, "output_stride");
    require_range(a.step, 0, kWord, "step");
    require_range(a.site, 0, kWord, "site");
    require_range(a.threshold, 0, 65535, "threshold");
    require_range(a.device, 0, std::numeric_limits<int>::max(), "device");
    require(a.input != a.output || a.rows <= 1 || a.input_stride == a.output_stride,
            "in place, input_stride and output_stride must be equal");
}

}  // namespace

void dropout(const DropoutArguments& arguments) {
    check_arguments(arguments);
    const DeviceGuard guard(arguments.device, kOperation);
    if (arguments.rows == 0 || arguments.columns == 0) {
        return;
    }
    const std::size_t size = element_size(arguments.dtype);
    check_pointer(arguments.input, size, arguments.device, "input", kOperation);
    check_pointer(arguments.output, size, arguments.device, "output", kOperation);
    check_pointer(arguments.dropout_row, sizeof(std::int32_t), arguments.device, "dropout_row", kOperation);
    switch (arguments.dtype) {
        case DType::kFloat32:
            return dispatch<float>(arguments);
        case DType::kFloat16:
            return dispatch<__half>(arguments);
        case DType::kBFloat16:
            return dispatch<__nv_bfloat16>(arguments);
    }
}

}  // namespace mtbert::cuda
