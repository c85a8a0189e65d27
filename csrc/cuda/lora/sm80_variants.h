// Included by one .cu file for each element type.
#pragma once

#include "cuda/lora/sm80_launch.h"
#include "cuda/lora/sm80_run.h"

namespace mtbert::cuda::sm80 {

class Enqueue {
   public:
    Enqueue(const LoraShape& shape, const char* operation) : shape_(shape), operation_(operation) {}

    template <typename Parameter>
    void operator()(void (*kernel)(Parameter), const LaunchPlan& plan, Parameter parameter) const {
        enqueue(reinterpret_cast<const void*>(kernel), plan.blocks, plan.threads, plan.shared_bytes, &parameter,
                shape_.device, shape_.stream, operation_);
    }

   private:
    const LoraShape& shape_;
    const char* operation_;
};

template <typename T>
void forward_of(const LoraForward& arguments, bool s_given) {
    run_forward<T>(arguments, s_given, Enqueue(arguments.shape, "lora_forward"));
}
template <typename T>
void thin_of(const LoraForward& arguments) {
    run_thin<T>(arguments, Enqueue(arguments.shape, "lora_forward"));
}
template <typename T>
void low_of(const LoraLow& arguments) {
    run_low<T>(arguments, Enqueue(arguments.shape, "lora_low"));
}
template <typename T>
void input_of(const LoraInput& arguments) {
    run_input<T>(arguments, Enqueue(arguments.shape, "lora_input"));
}
template <typename T>
void grad_a_of(const LoraGradA& arguments) {
    run_grad_a<T>(arguments, Enqueue(arguments.shape, "lora_grad_a"));
}

#define MTBERT_SM80_VARIANTS(T)                                    \
    template void forward_of<T>(const LoraForward&, bool);         \
    template void thin_of<T>(const LoraForward&);                  \
    template void low_of<T>(const LoraLow&);                       \
    template void input_of<T>(const LoraInput&);                   \
    template void grad_a_of<T>(const LoraGradA&);

}  // namespace mtbert::cuda::sm80
