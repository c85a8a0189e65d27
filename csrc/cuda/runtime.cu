#include "cuda/runtime.h"

#include <cuda_runtime.h>

#include <mutex>
#include <set>
#include <utility>

namespace mtbert::cuda {
namespace {

// While it lives, this thread may do what a capture forbids, such as to load code, and no capture takes note of it.
class RelaxedCapture {
   public:
    explicit RelaxedCapture(const char* operation) {
        check(cudaThreadExchangeStreamCaptureMode(&mode_), "cudaThreadExchangeStreamCaptureMode", operation);
    }
    ~RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
    RelaxedCapture(const RelaxedCapture&) = delete;
    RelaxedCapture& operator=(const RelaxedCapture&) = delete;

   private:
    cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

}  // namespace

void check(int status, const char* call, const char* operation) {
    if (status == cudaSuccess) {
        return;
    }
    const auto error = static_cast<cudaError_t>(status);
    cudaGetLastError();
    throw CudaError(std::string(cudaGetErrorName(error)) + ": " + cudaGetErrorString(error) + " (" + call + " in " +
                    operation + ")");
}

DeviceGuard::DeviceGuard(int device, const char* operation) {
    int current = -1;
    check(cudaGetDevice(&current), "cudaGetDevice", operation);
    if (current != device) {
        check(cudaSetDevice(device), "cudaSetDevice", operation);
        previous_ = current;
    }
}

DeviceGuard::~DeviceGuard() {
    if (previous_ >= 0) {
        cudaSetDevice(previous_);
    }
}

void check_pointer(std::uintptr_t pointer, std::size_t alignment, int device, const char* name,
                   const char* operation) {
    const std::string subject = std::string(operation) + ": " + name;
    if (pointer == 0) {
        throw std::invalid_argument(subject + " is a null pointer");
    }
    if (pointer % alignment != 0) {
        throw std::invalid_argument(subject + " is not aligned to " + std::to_string(alignment) + " bytes");
    }
    cudaPointerAttributes attributes{};
    check(cudaPointerGetAttributes(&attributes, reinterpret_cast<const void*>(pointer)), "cudaPointerGetAttributes",
          operation);
    if (attributes.type == cudaMemoryTypeUnregistered) {
        throw std::invalid_argument(subject + " is host memory, not memory of device " + std::to_string(device));
    }
    if (attributes.type == cudaMemoryTypeDevice && attributes.device != device) {
        throw std::invalid_argument(subject + " is on device " + std::to_string(attributes.device) +
                                    ", not on device " + std::to_string(device));
    }
}

int compute_capability(int device, const char* operation) {
    int major = 0;
    int minor = 0;
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute", operation);
    check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "cudaDeviceGetAttribute", operation);
    return 10 * major + minor;
}

void load_kernel(const void* kernel, int shared_bytes, int device, const char* operation) {
    // What every kernel may have without being allowed more.
    constexpr int kOrdinarySharedBytes = 48 * 1024;
    static std::mutex mutex;
    static std::set<std::pair<const void*, int>> loaded;
    const std::lock_guard<std::mutex> lock(mutex);
    if (loaded.count({kernel, device}) != 0) {
        return;
    }
    const RelaxedCapture relaxed(operation);
    cudaFuncAttributes attributes{};
    check(cudaFuncGetAttributes(&attributes, kernel), "cudaFuncGetAttributes", operation);
    if (shared_bytes > kOrdinarySharedBytes) {
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
              "cudaFuncSetAttribute", operation);
    }
    loaded.insert({kernel, device});
}

void zero(std::uintptr_t pointer, std::size_t bytes, std::uintptr_t stream, const char* operation) {
    check(cudaMemsetAsync(reinterpret_cast<void*>(pointer), 0, bytes, reinterpret_cast<cudaStream_t>(stream)),
          "cudaMemsetAsync", operation);
}

DriverInfo driver_info() {
    DriverInfo info{};
    cudaDriverGetVersion(&info.driver_version);
    cudaRuntimeGetVersion(&info.runtime_version);
    int count = 0;
    const cudaError_t status = cudaGetDeviceCount(&count);
    if (status != cudaSuccess) {
        cudaGetLastError();
        info.error = std::string(cudaGetErrorName(status)) + ": " + cudaGetErrorString(status);
        return info;
    }
    for (int device = 0; device < count; ++device) {
        cudaDeviceProp properties{};
        check(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties", "driver_info");
        info.devices.push_back({properties.name, properties.major, properties.minor, properties.multiProcessorCount,
                                properties.totalGlobalMem});
    }
    return info;
}

}  // namespace mtbert::cuda
