#define MTBERT_ISA avx512
#include "cpu/kernels.inc"

namespace mtbert {
const Kernels* kernels_avx512() { return &avx512::kernels; }
}  // namespace mtbert
