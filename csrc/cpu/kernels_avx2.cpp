#define MTBERT_ISA avx2
#include "cpu/kernels.inc"

namespace mtbert {
const Kernels* kernels_avx2() { return &avx2::kernels; }
}  // namespace mtbert
