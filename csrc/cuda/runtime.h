// What every CUDA operation shares: errors that carry the runtime's name for them, checks of arguments, and the guard of
// the current device. This header needs no CUDA header, so the Python glue is compiled by the host compiler alone.
//
// An operation enqueues its work on the given stream of the given device and returns: it never synchronises, and the
// caller's current device is restored. A bad argument throws std::invalid_argument (ValueError in Python); an error of
// the CUDA runtime throws CudaError (RuntimeError in Python).
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace mtbert::cuda {

class CudaError : public std::runtime_error {
    using std::runtime_error::runtime_error;
};

// Throws CudaError "cudaErrorNoDevice: no CUDA-capable device is detected (cudaSetDevice in dropout)" unless status is 0
// (cudaSuccess). The error is cleared, so that another library does not report it as its own.
void check(int status, const char* call, const char* operation);

// Makes a device current for the life of the object.
class DeviceGuard {
   public:
    DeviceGuard(int device, const char* operation);
    ~DeviceGuard();
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

   private:
    int previous_ = -1;  // -1: it was current already
};

// Throws std::invalid_argument unless the pointer is a multiple of alignment and the given device can read it.
// Needs the device to be current.
void check_pointer(std::uintptr_t pointer, std::size_t alignment, int device, const char* name, const char* operation);

// 10 * major + minor of a device's compute capability.
int compute_capability(int device, const char* operation);

// Before a kernel's first launch on a device: loads its code, which CUDA otherwise does at that launch, and allows it its
// dynamic shared memory; later calls do nothing. Also while a graph is captured, of which this is no part. Needs the
// device to be current.
void load_kernel(const void* kernel, int shared_bytes, int device, const char* operation);

// Enqueues zeros. Needs the stream's device to be current.
void zero(std::uintptr_t pointer, std::size_t bytes, std::uintptr_t stream, const char* operation);

struct DeviceProperties {
    std::string name;
    int major;
    int minor;
    int multiprocessors;
    std::size_t memory_bytes;
};

struct DriverInfo {
    int driver_version;   // 1000 * major + 10 * minor; 0 when no driver is installed
    int runtime_version;  // of the runtime linked into this extension
    std::vector<DeviceProperties> devices;
    std::string error;  // why there are no devices; empty when there are
};

// What the CUDA runtime sees. A missing driver or device is an answer, not an error.
DriverInfo driver_info();

}  // namespace mtbert::cuda
