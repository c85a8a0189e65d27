// Attention within packed sequences, forward and backward, for rows of any length.
//
// One item is one head of one sequence; nothing of it depends on another item, so threads take items as they come.
// Queries go in blocks of at most 64, one query a vector lane; scores are kept as [keys, queries of the block], so that
// sums over keys need no work across lanes and a mask costs one comparison. The backward pass computes the
// probabilities and the mask again.
#pragma once

#include "cpu/attention_pack.h"
#include "cpu/philox_vector.h"
#include "cpu/threads.h"

namespace mtbert::MTBERT_ISA {

constexpr std::int64_t kQueryBlock = 64;

MTBERT_INLINE std::int64_t round_up(std::int64_t n, std::int64_t multiple) {
    return (n + multiple - 1) / multiple * multiple;
}

// Queries of one block: blocks are of nearly equal size.
MTBERT_INLINE std::int64_t query_block(std::int64_t length) {
    const std::int64_t blocks = (length + kQueryBlock - 1) / kQueryBlock;
    return round_up((length + blocks - 1) / blocks, 16);
}

// Hands out one thread's scratch memory, piece by piece, aligned to 64 bytes.
class Arena {
public:
    explicit Arena(float* memory) : memory_(memory) {}
    float* take(std::int64_t floats) {
        float* piece = memory_;
        memory_ += round_up(floats, 16);
        return piece;
    }

private:
    float* memory_;
};

// Which of the probabilities of one vector of queries are kept, eight keys at a time.
class KeyMask {
public:
    // rows: the mask's rows of the W queries.
    MTBERT_INLINE KeyMask make(const Stream* stream, const std::int32_t* rows) {
        KeyMask mask;
        mask.stream_ = stream;
        const vu row = load_as<vu>(rows);
        mask.even_ = (vq)row & 0xFFFFFFFFu;
        mask.odd_ = (vq)row >> 32;
        mask.threshold_ = splat_u(stream->threshold << 16);
        return mask;
    }

    MTBERT_INLINE void draw(const KeyMask& mask, std::uint32_t group, keep_t keep[kDropoutLanes]) {
        vq even[4], odd[4];
        draw_rows(*mask.stream_, mask.even_, group, even);
        draw_rows(*mask.stream_, mask.odd_, group, odd);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            const vu word = (vu)((even[i] & 0xFFFFFFFFu) | (odd[i] << 32));
            keep[2 * i] = at_least(word << 16, mask.threshold_);
            keep[2 * i + 1] = at_least(word, mask.threshold_);
        }
    }

private:
    const Stream* stream_;
    vq even_, odd_;
    vu threshold_;
};

// scores [length, ld] of one vector of queries: replaced by 2^(factor (score - greatest)); returns their sums.
MTBERT_INLINE vf exponentiate(float* scores, std::int64_t length, std::int64_t ld, float factor) {
    vf greatest = load(scores);
    for (std::int64_t j = 1; j < length; ++j) greatest = max_or_second(load(scores + j * ld), greatest);
    const vf slope = splat(factor);
    const vf offset = greatest * slope;
    vf total = {};
    for (std::int64_t group = 0; group < length; group += 32) {
        const std::int64_t end = group + 32 < length ? group + 32 : length;
        vf subtotal = {};
        for (std::int64_t j = group; j < end; ++j) {
            const vf p = exp2_nonpositive(load(scores + j * ld) * slope - offset);
            store(scores + j * ld, p);
            subtotal += p;
        }
        total += subtotal;
    }
    return total;
}

struct AttentionItem {
    std::int64_t first;   // token
    std::int64_t length;  // tokens
    std::int64_t head;
};

MTBERT_INLINE AttentionItem attention_item(const AttentionArguments& a, std::int64_t item) {
    const std::int64_t n = item / a.heads;
    return {a.cu_seqlens[n], a.cu_seqlens[n + 1] - a.cu_seqlens[n], item % a.heads};
}

MTBERT_INLINE void load_mask_rows(const AttentionArguments& a, std::int64_t first, std::int64_t count,
                                  std::int32_t rows[kQueryBlock]) {
    for (std::int64_t i = 0; i < kQueryBlock; ++i) rows[i] = i < count ? a.mask.row[first + i] : 0;
}

// Writes float rows [count, width], each times a factor, to rows `stride` elements apart.
template <class T>
static void write_rows(const float* source, std::int64_t count, std::int64_t width, const float* factors, T* target,
                       std::int64_t stride) {
    for (std::int64_t t = 0; t < count; ++t) {
        const vf factor = splat(factors == nullptr ? 1.0f : factors[t]);
        for (std::int64_t d = 0; d < width; d += W) store(target + d, load(source + d) * factor);
        source += width;
        target += stride;
    }
}

// ---- forward

template <class Words>
static std::int64_t forward_scratch(std::int64_t length, std::int64_t width) {
    return 2 * (length + 1) * width + (2 * length + 2) * kQueryBlock + 2 * kQueryBlock * width + 8 * 16;
}

// Up to eight keys from j on of one vector of queries: change(n, probability) for the n-th, as words along the keys.
template <class Words, class Change>
MTBERT_INLINE void write_weights(const float* column, std::int64_t j, std::int64_t length, std::int64_t ld, float* weights,
                                 Change change) {
    const std::int64_t count = length - j < kDropoutLanes ? length - j : kDropoutLanes;
    const float* source = column + j * ld;
    float* target = weights + j / Words::kPack * ld;
    if constexpr (Words::kPack == 1) {
        for (int n = 0; n < count; ++n) store(target + n * ld, change(n, load(source + n * ld)));
    } else {
#if defined(MTBERT_USE_BF16)
#pragma GCC unroll 4
        for (int n = 0; n < kDropoutLanes; n += 2) {
            if (n >= count) break;
            const vf high = n + 1 < count ? change(n + 1, load(source + (n + 1) * ld)) : vf{};
            store_as(target + n / 2 * ld, pair_words(change(n, load(source + n * ld)), high));
        }
#endif
    }
}

template <class Words, class T>
static void attention_forward_item(const AttentionArguments& a, const Stream* stream, AttentionItem item) {
    const std::int64_t length = item.length, width = a.head_dim;
    const std::int64_t qkv_stride = 3 * a.heads * width, out_stride = a.heads * width;
    const T* q = static_cast<const T*>(a.qkv) + item.first * qkv_stride + item.head * width;
    const T* k = q + out_stride;
    const T* v = k + out_stride;
    T* out = static_cast<T*>(a.out) + item.first * out_stride + item.head * width;

    const std::int64_t block = query_block(length);
    const std::int64_t words = width / Words::kPack, key_words = (length + Words::kPack - 1) / Words::kPack;
    Arena arena(static_cast<float*>(
        thread_scratch(Scratch::kItem, static_cast<std::size_t>(forward_scratch<Words>(length, width)) * 4)));
    float* k_rows = arena.take(length * words);
    float* v_pairs = arena.take(key_words * width);
    float* q_transposed = arena.take(words * block);
    float* scores = arena.take(length * block);
    float* weights = Words::kPack == 1 ? scores : arena.take(key_words * block);
    float* product = arena.take(block * width);
    alignas(64) float factors[kQueryBlock];
    alignas(64) std::int32_t rows[kQueryBlock];

    pack_rows<Words>(k, qkv_stride, length, width, k_rows);
    pack_pairs<Words>(v, qkv_stride, length, width, v_pairs);
    for (std::int64_t first = 0; first < length; first += block) {
        const std::int64_t count = length - first < block ? length - first : block;
        const std::int64_t ld = round_up(count, W);
        pack_transposed<Words>(q + first * qkv_stride, qkv_stride, count, width, ld, q_transposed);
        gemm<Words>(length, ld, words, {k_rows, words, 1}, q_transposed, ld, scores, ld);
        if (stream != nullptr) load_mask_rows(a, item.first + first, count, rows);
        for (std::int64_t i = 0; i < ld; i += W) {
            const vf total = exponentiate(scores + i, length, ld, a.scale * 1.44269504f);
            store(factors + i, splat(stream == nullptr ? 1.0f : stream->scale) / total);
            // Dropped probabilities become zeros; the factor above waits until the product with v.
            const float* column = scores + i;
            if (stream == nullptr) {
                for (std::int64_t j = 0; j < length; j += kDropoutLanes) {
                    write_weights<Words>(column, j, length, ld, weights + i, [](int, vf p) { return p; });
                }
            } else {
                const KeyMask mask = KeyMask::make(stream, rows + i);
                for (std::int64_t j = 0; j < length; j += kDropoutLanes) {
                    keep_t keep[kDropoutLanes];
                    KeyMask::draw(mask, static_cast<std::uint32_t>((item.head * kHeadColumns + j) / kDropoutLanes), keep);
                    write_weights<Words>(column, j, length, ld, weights + i,
                                         [&](int n, vf p) { return kept(keep[n], p); });
                }
            }
        }
        gemm<Words>(count, width, key_words, {weights, 1, ld}, v_pairs, width, product, width);
        write_rows(product, count, width, factors, out + first * out_stride, out_stride);
    }
}

// ---- backward

template <class Words>
static std::int64_t backward_scratch(std::int64_t length, std::int64_t width) {
    return 5 * (length + 1) * width + 5 * (length + 1) * kQueryBlock + 5 * (kQueryBlock + 1) * width + 20 * 16;
}

template <class Words, class T>
static void attention_backward_item(const AttentionArguments& a, const Stream* stream, AttentionItem item) {
    const std::int64_t length = item.length, width = a.head_dim;
    const std::int64_t qkv_stride = 3 * a.heads * width, out_stride = a.heads * width;
    const T* q = static_cast<const T*>(a.qkv) + item.first * qkv_stride + item.head * width;
    const T* k = q + out_stride;
    const T* v = k + out_stride;
    const T* dout = static_cast<const T*>(a.dout) + item.first * out_stride + item.head * width;
    T* dq = static_cast<T*>(a.dqkv) + item.first * qkv_stride + item.head * width;
    T* dk = dq + out_stride;
    T* dv = dk + out_stride;

    constexpr int kPack = Words::kPack;
    const std::int64_t block = query_block(length);
    const std::int64_t words = width / kPack, key_words = (length + kPack - 1) / kPack;
    Arena arena(static_cast<float*>(
        thread_scratch(Scratch::kItem, static_cast<std::size_t>(backward_scratch<Words>(length, width)) * 4)));
    float* k_rows = arena.take(length * words);
    float* v_rows = arena.take(length * words);
    float* k_pairs = kPack == 1 ? k_rows : arena.take(key_words * width);
    float* q_transposed = arena.take(words * block);
    float* dout_transposed = arena.take(words * block);
    float* q_pairs = arena.take(block / kPack * width);
    float* dout_pairs = arena.take(block / kPack * width);
    float* p = arena.take(length * block);            // probabilities, later the scores' gradient
    float* dp = arena.take(length * block);           // the gradient of the probabilities
    float* p_dropped = arena.take(length * block / kPack);           // words along the queries
    float* ds_queries = kPack == 1 ? p : arena.take(length * block / kPack);  // likewise
    float* ds_keys = kPack == 1 ? p : arena.take(key_words * block);          // words along the keys
    float* dk_sum = arena.take(length * width);
    float* dv_sum = arena.take(length * width);
    float* dq_sum = arena.take(block * width);
    alignas(64) std::int32_t rows[kQueryBlock];

    pack_rows<Words>(k, qkv_stride, length, width, k_rows);
    pack_rows<Words>(v, qkv_stride, length, width, v_rows);
    if constexpr (kPack == 2) pack_pairs<Words>(k, qkv_stride, length, width, k_pairs);
    for (std::int64_t first = 0; first < length; first += block) {
        const std::int64_t count = length - first < block ? length - first : block;
        const std::int64_t ld = round_up(count, W);
        const std::int64_t query_words = (count + kPack - 1) / kPack, word_ld = ld / kPack;
        const T* q_block = q + first * qkv_stride;
        const T* dout_block = dout + first * out_stride;
        pack_transposed<Words>(q_block, qkv_stride, count, width, ld, q_transposed);
        pack_transposed<Words>(dout_block, out_stride, count, width, ld, dout_transposed);
        pack_pairs<Words>(q_block, qkv_stride, count, width, q_pairs);
        pack_pairs<Words>(dout_block, out_stride, count, width, dout_pairs);
        gemm<Words>(length, ld, words, {k_rows, words, 1}, q_transposed, ld, p, ld);
        gemm<Words>(length, ld, words, {v_rows, words, 1}, dout_transposed, ld, dp, ld);
        if (stream != nullptr) load_mask_rows(a, item.first + first, count, rows);
        for (std::int64_t i = 0; i < ld; i += W) {
            const vf inverse = splat(1.0f) / exponentiate(p + i, length, ld, a.scale * 1.44269504f);
            vf delta = {};  // sum over keys of probability times its gradient
            const vf dropout_scale = splat(stream == nullptr ? 1.0f : stream->scale);
            for (std::int64_t group = 0; group < length; group += kDropoutLanes) {
                vf group_delta = {};
                const auto visit = [&](std::int64_t j, vf probability, vf gradient, vf dropped)
                    __attribute__((always_inline)) {
                    group_delta += probability * gradient;
                    store(p + j * ld + i, probability);
                    store(dp + j * ld + i, gradient);
                    if constexpr (kPack == 1) {
                        store(p_dropped + j * word_ld + i, dropped);
                    } else {
                        store(reinterpret_cast<bf16*>(p_dropped + j * word_ld) + i, dropped);
                    }
                };
                if (stream == nullptr) {
                    const std::int64_t end = group + kDropoutLanes < length ? group + kDropoutLanes : length;
                    for (std::int64_t j = group; j < end; ++j) {
                        const vf probability = load(p + j * ld + i) * inverse;
                        visit(j, probability, load(dp + j * ld + i), probability);
                    }
                } else {
                    keep_t keep[kDropoutLanes];
                    KeyMask::draw(KeyMask::make(stream, rows + i),
                                  static_cast<std::uint32_t>((item.head * kHeadColumns + group) / kDropoutLanes), keep);
                    const auto masked = [&](int n) __attribute__((always_inline)) {
                        const std::int64_t j = group + n;
                        const vf probability = load(p + j * ld + i) * inverse;
                        visit(j, probability, kept(keep[n], load(dp + j * ld + i) * dropout_scale),
                              kept(keep[n], probability * dropout_scale));
                    };
                    if (group + kDropoutLanes <= length) {
#pragma GCC unroll 8
                        for (int n = 0; n < kDropoutLanes; ++n) masked(n);
                    } else {
                        for (int n = 0; group + n < length; ++n) masked(n);
                    }
                }
                delta += group_delta;
            }
            const vf scale = splat(a.scale);
            const auto gradient = [&](std::int64_t j) __attribute__((always_inline)) {
                return load(p + j * ld + i) * (load(dp + j * ld + i) - delta) * scale;
            };
            if constexpr (kPack == 1) {
                for (std::int64_t j = 0; j < length; ++j) store(p + j * ld + i, gradient(j));
            } else {
#if defined(MTBERT_USE_BF16)
                for (std::int64_t j = 0; j < length; j += 2) {
                    const bool both = j + 1 < length;
                    const vf low = gradient(j), high = both ? gradient(j + 1) : vf{};
                    store_as(ds_keys + j / 2 * ld + i, pair_words(low, high));
                    store(reinterpret_cast<bf16*>(ds_queries + j * word_ld) + i, low);
                    if (both) store(reinterpret_cast<bf16*>(ds_queries + (j + 1) * word_ld) + i, high);
                }
#endif
            }
        }
        const bool more = first > 0;
        gemm<Words>(length, width, query_words, {p_dropped, word_ld, 1}, dout_pairs, width, dv_sum, width, more);
        gemm<Words>(length, width, query_words, {ds_queries, word_ld, 1}, q_pairs, width, dk_sum, width, more);
        gemm<Words>(count, width, key_words, {ds_keys, 1, ld}, k_pairs, width, dq_sum, width);
        write_rows(dq_sum, count, width, nullptr, dq + first * qkv_stride, qkv_stride);
    }
    write_rows(dk_sum, length, width, nullptr, dk, qkv_stride);
    write_rows(dv_sum, length, width, nullptr, dv, qkv_stride);
}

// ---- both

template <class Words, class T, bool kBackward>
static void attention_items(void* context, std::int64_t begin, std::int64_t end) {
    const AttentionArguments& a = *static_cast<const AttentionArguments*>(context);
    Stream stream;
    if (a.mask.row != nullptr) stream = make_stream(a.mask.key);
    const Stream* used = a.mask.row == nullptr ? nullptr : &stream;
    for (std::int64_t n = begin; n < end; ++n) {
        const AttentionItem item = attention_item(a, n);
        if (item.length == 0) continue;
        if constexpr (kBackward) {
            attention_backward_item<Words, T>(a, used, item);
        } else {
            attention_forward_item<Words, T>(a, used, item);
        }
    }
}

// Zeros for the tokens before the first and after the last sequence.
static void clear_outside(const std::int32_t* cu_seqlens, std::int64_t sequences, std::int64_t tokens, DType dtype,
                          void* target, std::int64_t token_elements) {
    const std::int64_t bytes = token_elements * (dtype == DType::kFloat32 ? 4 : 2);
    const std::int64_t first = cu_seqlens[0], last = cu_seqlens[sequences];
    char* base = static_cast<char*>(target);
    __builtin_memset(base, 0, static_cast<std::size_t>(first * bytes));
    __builtin_memset(base + last * bytes, 0, static_cast<std::size_t>((tokens - last) * bytes));
}

template <bool kBackward>
static void attention(const AttentionArguments& a) {
    clear_outside(a.cu_seqlens, a.sequences, a.tokens, a.dtype, kBackward ? a.dqkv : a.out,
                  (kBackward ? 3 : 1) * a.heads * a.head_dim);
    // A thread takes all heads of a sequence, whose rows share cache lines, unless sequences are few.
    const std::int64_t chunk = a.sequences >= 4 * a.threads ? a.heads : 1;
    void (*work)(void*, std::int64_t, std::int64_t);
    if (a.dtype == DType::kFloat32) {
        work = attention_items<Floats, float, kBackward>;
    } else {
#if defined(MTBERT_USE_BF16)
        work = attention_items<Bf16Pairs, bf16, kBackward>;
#else
        work = attention_items<Floats, bf16, kBackward>;
#endif
    }
    parallel_for(a.sequences * a.heads, chunk, a.threads, work, const_cast<AttentionArguments*>(&a));
}

}  // namespace mtbert::MTBERT_ISA
