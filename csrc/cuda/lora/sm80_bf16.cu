#include "cuda/lora/sm80_variants.h"

namespace mtbert::cuda::sm80 {

MTBERT_SM80_VARIANTS(machine::BF16)

}  // namespace mtbert::cuda::sm80
