// What the .cu files of the sm_80 kernels share: each makes the variants of one element type.
#pragma once

#include "cuda/lora/lora.h"
#include "cuda/lora/machine.h"

namespace mtbert::cuda::sm80 {

template <typename T>
void forward_of(const LoraForward& arguments, bool s_given);
template <typename T>
void thin_of(const LoraForward& arguments);
template <typename T>
void low_of(const LoraLow& arguments);
template <typename T>
void input_of(const LoraInput& arguments);
template <typename T>
void grad_a_of(const LoraGradA& arguments);

// Enqueues a kernel of one parameter; throws CudaError. Loads it before its first launch on a device.
void enqueue(const void* kernel, std::int64_t blocks, int threads, int shared_bytes, void* parameter, int device,
             std::uintptr_t stream, const char* operation);

}  // namespace mtbert::cuda::sm80
