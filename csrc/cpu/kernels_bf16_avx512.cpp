// The AVX512 kernels once more, with the processor's bfloat16 conversion and dot product where the compiler has them.
#if defined(__AVX512BF16__)
#define MTBERT_USE_BF16
#define MTBERT_ISA avx512bf16
#include "cpu/kernels.inc"
#else
#include "cpu/kernels.h"
#endif

namespace mtbert {

const Kernels* kernels_avx512bf16() {
#if defined(__AVX512BF16__)
    return &avx512bf16::kernels;
#else
    return nullptr;
#endif
}

}  // namespace mtbert
