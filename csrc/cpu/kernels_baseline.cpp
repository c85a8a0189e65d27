#define MTBERT_ISA baseline
#include "cpu/kernels.inc"

namespace mtbert {
const Kernels* kernels_baseline() { return &baseline::kernels; }
}  // namespace mtbert
