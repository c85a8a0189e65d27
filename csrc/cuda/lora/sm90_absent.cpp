// Stands in for the sm_90a kernels in a binary that is built without that target.
#include <stdexcept>

#include "cuda/lora/lora.h"

namespace mtbert::cuda::sm90 {

bool built() { return false; }

void forward(const LoraForward&, bool) { throw std::logic_error("lora_forward: there are no sm_90a kernels"); }

void input(const LoraInput&) { throw std::logic_error("lora_input: there are no sm_90a kernels"); }

}  // namespace mtbert::cuda::sm90
