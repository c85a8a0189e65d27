// z Phi(z), z = x + bias, with the exact normal distribution function, and its gradient.
#pragma once

#include "cpu/reduce.h"

namespace mtbert::MTBERT_ISA {

struct Normal {
    vf distribution;  // Phi(z)
    vf bell;          // exp(-z^2 / 2)
};

// Phi(-|z|) = exp(-z^2 / 2) t P(t) with t = 1 / (1 + 0.26 |z|), a form of Hastings' (1955); P is a minimax polynomial for
// the relative error (2.5e-8 up to |z| = 14), so that the tail is as exact as the centre.
MTBERT_INLINE Normal normal(vf z) {
    const vf magnitude = (vf)((vu)z & 0x7FFFFFFFu);
    const vf bell = exp2_nonpositive(magnitude * magnitude * splat(-0.5f * 1.44269504f));
    const vf t = splat(1.0f) / (splat(1.0f) + splat(0.26f) * magnitude);
    vf p = splat(0.030504788f);
    p = p * t + splat(-0.15282839f);
    p = p * t + splat(0.25149048f);
    p = p * t + splat(-0.15094813f);
    p = p * t + splat(0.16094733f);
    p = p * t + splat(0.051027883f);
    p = p * t + splat(0.10303021f);
    p = p * t + splat(0.10301676f);
    p = p * t + splat(0.10375906f);
    const vf tail = p * t * bell;
    return {z > vf{} ? splat(1.0f) - tail : tail, bell};
}

template <class T>
static void bias_gelu_forward_rows(void* context, std::int64_t begin, std::int64_t end) {
    const BiasGeluArguments& a = *static_cast<const BiasGeluArguments*>(context);
    for (std::int64_t t = begin; t < end; ++t) {
        const T* x = static_cast<const T*>(a.x) + t * a.columns;
        T* out = static_cast<T*>(a.out) + t * a.columns;
        for (std::int64_t c = 0; c < a.columns; c += W) {
            const std::int64_t n = a.columns - c;
            const vf z = load(x + c, n) + load(a.bias + c, n);
            store(out + c, z * normal(z).distribution, n);
        }
    }
}

static void bias_gelu_forward(const BiasGeluArguments& a) {
    parallel_for(a.rows, 16, a.threads,
                 a.dtype == DType::kFloat32 ? bias_gelu_forward_rows<float> : bias_gelu_forward_rows<bf16>,
                 const_cast<BiasGeluArguments*>(&a));
}

struct BiasGeluBackward {
    const BiasGeluArguments& a;
    Partials partials;
};

template <class T>
static void bias_gelu_backward_blocks(void* context, std::int64_t begin, std::int64_t end) {
    const BiasGeluBackward& backward = *static_cast<const BiasGeluBackward*>(context);
    const BiasGeluArguments& a = backward.a;
    for (std::int64_t block = begin; block < end; ++block) {
        float* sums = backward.partials.start(block);
        float* dbias = a.dbias == nullptr ? nullptr : sums;
        const std::int64_t last = (block + 1) * kRowBlock < a.rows ? (block + 1) * kRowBlock : a.rows;
        for (std::int64_t t = block * kRowBlock; t < last; ++t) {
            backward.partials.next_row(block, t);
            const T* x = static_cast<const T*>(a.x) + t * a.columns;
            const T* dout = static_cast<const T*>(a.dout) + t * a.columns;
            for (std::int64_t c = 0; c < a.columns; c += W) {
                const std::int64_t n = a.columns - c;
                const vf z = load(x + c, n) + load(a.bias + c, n);
                const Normal at = normal(z);
                const vf d = load(dout + c, n) * (at.distribution + z * at.bell * splat(0.39894228f));
                if (a.dx != nullptr) store(static_cast<T*>(a.dx) + t * a.columns + c, d, n);
                if (dbias != nullptr) add_to(dbias + c, d, n);
            }
        }
        backward.partials.flush(block);
    }
}

static void bias_gelu_backward(const BiasGeluArguments& a) {
    BiasGeluBackward backward{a, Partials::make(a.rows, a.dbias != nullptr, a.columns)};
    parallel_for(row_blocks(a.rows), 1, a.threads,
                 a.dtype == DType::kFloat32 ? bias_gelu_backward_blocks<float> : bias_gelu_backward_blocks<bf16>,
                 &backward);
    backward.partials.finish(0, a.dbias);
}

}  // namespace mtbert::MTBERT_ISA
