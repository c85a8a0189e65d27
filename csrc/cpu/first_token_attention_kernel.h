// Attention of one query a sequence, forward and backward: the first tokens of a last layer whose others nobody reads.
//
// One item is one head of one sequence. Nothing is reused here that could be kept in registers, so that everything is read
// once, as it lies in memory. The backward pass computes the probabilities and the mask again.
#pragma once

#include "cpu/attention_kernel.h"

namespace mtbert::MTBERT_ISA {

template <class T>
MTBERT_INLINE float dot(const T* a, const T* b, std::int64_t width) {
    vf totals[4] = {};  // adding few numbers at a time loses less to rounding
    for (std::int64_t d = 0; d < width; d += W) totals[d / W % 4] += load(a + d) * load(b + d);
    return sum((totals[0] + totals[1]) + (totals[2] + totals[3]));
}

// The sum of values [count], a multiple of W.
MTBERT_INLINE float sum_of(const float* values, std::int64_t count) {
    vf total = {};
    for (std::int64_t group = 0; group < count; group += 16 * W) {
        const std::int64_t end = group + 16 * W < count ? group + 16 * W : count;
        vf subtotal = {};
        for (std::int64_t j = group; j < end; j += W) subtotal += load(values + j);
        total += subtotal;
    }
    return sum(total);
}

// total [width] = the sum of weights [count] times rows [width], which are `stride` elements apart.
template <class T>
static void weighted_sum(const float* weights, const T* rows, std::int64_t stride, std::int64_t count,
                         std::int64_t width, float* total) {
    alignas(64) float part[kMaxHeadDim];
    for (std::int64_t d = 0; d < width; d += W) store(total + d, vf{});
    for (std::int64_t group = 0; group < count; group += 16) {
        const std::int64_t end = group + 16 < count ? group + 16 : count;
        for (std::int64_t d = 0; d < width; d += W) store(part + d, vf{});
        for (std::int64_t j = group; j < end; ++j) {
            const T* row = rows + j * stride;
            const vf weight = splat(weights[j]);
            for (std::int64_t d = 0; d < width; d += W) store(part + d, load(part + d) + weight * load(row + d));
        }
        for (std::int64_t d = 0; d < width; d += W) store(total + d, load(total + d) + load(part + d));
    }
}

// target [width] = factor * source
template <class T, class S>
MTBERT_INLINE void write_scaled(T* target, float factor, const S* source, std::int64_t width) {
    for (std::int64_t d = 0; d < width; d += W) store(target + d, splat(factor) * load(source + d));
}

// One head of one sequence of at least one token.
template <class T>
struct FirstTokenItem {
    std::int64_t length;
    std::int64_t width;
    std::int64_t stride;  // elements from one token's keys to the next one's
    const T* q;           // [width]
    const T* k;           // rows [width] from token to token
    const T* v;
    std::int64_t row;      // offset of this head of this sequence in [sequences, heads, head_dim]
    std::int64_t token;    // offset of the first key in [tokens, 2, heads, head_dim]
    std::int64_t rounded;  // the length, up to whole blocks of the mask's lanes

    MTBERT_INLINE FirstTokenItem make(const FirstTokenAttentionArguments& a, std::int64_t n, std::int64_t head) {
        FirstTokenItem item;
        const std::int64_t first = a.cu_seqlens[n], span = a.heads * a.head_dim;
        item.length = a.cu_seqlens[n + 1] - first;
        item.width = a.head_dim;
        item.stride = 2 * span;
        item.row = n * span + head * a.head_dim;
        item.token = first * item.stride + head * a.head_dim;
        item.q = static_cast<const T*>(a.query) + item.row;
        item.k = static_cast<const T*>(a.key_value) + item.token;
        item.v = item.k + span;
        item.rounded = round_up(item.length, kLaneBlock);
        return item;
    }

    // p [rounded]: the probabilities, zeros behind the last; not divided by their sum, which is returned.
    float probabilities(float scale, float* p) const {
        const vf lowest = splat(-__builtin_inff());
        for (std::int64_t j = length / W * W; j < rounded; j += W) store(p + j, lowest);
        for (std::int64_t j = 0; j < length; ++j) p[j] = dot(q, k + j * stride, width);
        vf greatest = lowest;
        for (std::int64_t j = 0; j < rounded; j += W) greatest = max_or_second(load(p + j), greatest);
        float lanes[W];
        store(lanes, greatest);
        float most = lanes[0];
        for (int i = 1; i < W; ++i) most = lanes[i] > most ? lanes[i] : most;
        const vf slope = splat(scale * 1.44269504f), top = splat(most);
        for (std::int64_t j = 0; j < rounded; j += W) {
            store(p + j, exp2_nonpositive((load(p + j) - top) * slope));
        }
        return sum_of(p, rounded);
    }
};

// Zeros where the mask drops a key; values [rounded].
MTBERT_INLINE void drop_keys(const Stream& stream, std::int32_t row, std::int64_t head, std::int64_t rounded,
                             std::uint16_t* lanes, float* values) {
    draw_lanes(stream, static_cast<std::uint32_t>(row), head * kHeadColumns / kDropoutLanes, rounded, lanes);
    const vu threshold = splat_u(stream.threshold);
    for (std::int64_t j = 0; j < rounded; j += W) {
        store(values + j, kept(keep_of_lanes(lanes + j, threshold), load(values + j)));
    }
}

template <class T>
static void first_token_forward_item(const FirstTokenAttentionArguments& a, const Stream* stream, std::int64_t n,
                                     std::int64_t head) {
    const FirstTokenItem<T> item = FirstTokenItem<T>::make(a, n, head);
    T* out = static_cast<T*>(a.out) + item.row;
    alignas(64) float total[kMaxHeadDim] = {};
    float factor = 0.0f;
    if (item.length > 0) {
        Arena arena(static_cast<float*>(thread_scratch(Scratch::kItem, static_cast<std::size_t>(2 * item.rounded + 32) * 4)));
        float* p = arena.take(item.rounded);
        factor = 1.0f / item.probabilities(a.scale, p);
        if (stream != nullptr) {
            drop_keys(*stream, a.mask.row[n], head, item.rounded, reinterpret_cast<std::uint16_t*>(arena.take(item.rounded)), p);
            factor *= stream->scale;
        }
        weighted_sum(p, item.v, item.stride, item.length, item.width, total);
    }
    write_scaled(out, factor, total, item.width);
}

template <class T>
static void first_token_backward_item(const FirstTokenAttentionArguments& a, const Stream* stream, std::int64_t n,
                                      std::int64_t head) {
    const FirstTokenItem<T> item = FirstTokenItem<T>::make(a, n, head);
    const T* dout = static_cast<const T*>(a.dout) + item.row;
    T* dq = static_cast<T*>(a.dquery) + item.row;
    T* dk = static_cast<T*>(a.dkey_value) + item.token;
    T* dv = dk + item.stride / 2;
    alignas(64) float total[kMaxHeadDim] = {};
    if (item.length > 0) {
        Arena arena(static_cast<float*>(thread_scratch(Scratch::kItem, static_cast<std::size_t>(3 * item.rounded + 48) * 4)));
        float* p = arena.take(item.rounded);
        float* kept_scale = arena.take(item.rounded);  // what the mask multiplies a key's probability by; then gradients
        float* products = arena.take(item.rounded);    // of probabilities and their gradients
        const float inverse = 1.0f / item.probabilities(a.scale, p);
        const vf factor = splat(stream == nullptr ? 1.0f : stream->scale);
        for (std::int64_t j = 0; j < item.rounded; j += W) store(kept_scale + j, factor);
        if (stream != nullptr) drop_keys(*stream, a.mask.row[n], head, item.rounded, reinterpret_cast<std::uint16_t*>(products), kept_scale);
        for (std::int64_t j = item.length / W * W; j < item.rounded; j += W) store(products + j, vf{});
        for (std::int64_t j = 0; j < item.length; ++j) {
            p[j] *= inverse;
            write_scaled(dv + j * item.stride, p[j] * kept_scale[j], dout, item.width);
            // Selected, not multiplied: a dropped key's value takes no part.
            const float whole = dot(dout, item.v + j * item.stride, item.width);
            kept_scale[j] = kept_scale[j] == 0.0f ? 0.0f : kept_scale[j] * whole;
            products[j] = p[j] * kept_scale[j];
        }
        const float along = sum_of(products, item.rounded);
        for (std::int64_t j = 0; j < item.length; ++j) {
            products[j] = p[j] * (kept_scale[j] - along) * a.scale;
            write_scaled(dk + j * item.stride, products[j], item.q, item.width);
        }
        weighted_sum(products, item.k, item.stride, item.length, item.width, total);
    }
    write_scaled(dq, 1.0f, total, item.width);
}

template <class T, bool kBackward>
static void first_token_items(void* context, std::int64_t begin, std::int64_t end) {
    const FirstTokenAttentionArguments& a = *static_cast<const FirstTokenAttentionArguments*>(context);
    Stream stream;
    if (a.mask.row != nullptr) stream = make_stream(a.mask.key);
    const Stream* used = a.mask.row == nullptr ? nullptr : &stream;
    for (std::int64_t n = begin; n < end; ++n) {
        for (std::int64_t head = 0; head < a.heads; ++head) {
            if constexpr (kBackward) {
                first_token_backward_item<T>(a, used, n, head);
            } else {
                first_token_forward_item<T>(a, used, n, head);
            }
        }
    }
}

template <bool kBackward>
static void first_token_attention(const FirstTokenAttentionArguments& a) {
    if constexpr (kBackward) {
        clear_outside(a.cu_seqlens, a.sequences, a.tokens, a.dtype, a.dkey_value, 2 * a.heads * a.head_dim);
    }
    // A thread takes all heads of a sequence, whose rows share cache lines.
    parallel_for(a.sequences, 1, a.threads,
                 a.dtype == DType::kFloat32 ? first_token_items<float, kBackward> : first_token_items<bf16, kBackward>,
                 const_cast<FirstTokenAttentionArguments*>(&a));
}

}  // namespace mtbert::MTBERT_ISA
