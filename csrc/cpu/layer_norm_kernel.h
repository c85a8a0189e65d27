// LayerNorm of rows, and what comes before or after it: bias, dropout and residual connection, or embedding look-ups.
#pragma once

#include "cpu/philox_vector.h"
#include "cpu/reduce.h"

namespace mtbert::MTBERT_ISA {

// The lanes of a row's mask, or nothing where nothing is dropped.
class RowMask {
public:
    // lanes: room for columns rounded up to kLaneBlock.
    RowMask(const Mask& mask, std::uint16_t* lanes) : row_(mask.row), lanes_(lanes) {
        if (row_ == nullptr) return;
        stream_ = make_stream(mask.key);
        threshold_ = splat_u(stream_.threshold);
        scale_ = splat(stream_.scale);
    }
    void draw(std::int64_t t, std::int64_t columns) const {
        if (row_ != nullptr) draw_lanes(stream_, static_cast<std::uint32_t>(row_[t]), 0, columns, lanes_);
    }
    vf apply(std::int64_t c, vf value) const {
        return row_ == nullptr ? value : kept(keep_of_lanes(lanes_ + c, threshold_), value * scale_);
    }

private:
    const std::int32_t* row_;
    std::uint16_t* lanes_;
    Stream stream_;
    vu threshold_;
    vf scale_;
};

// Scratch of one thread: a row of floats (and one to spare), and the lanes of its mask.
struct RowScratch {
    float* values;
    float* more;
    std::uint16_t* lanes;

    MTBERT_INLINE RowScratch make(std::int64_t columns) {
        const std::int64_t padded = (columns + kLaneBlock - 1) / kLaneBlock * kLaneBlock;
        float* memory =
            static_cast<float*>(thread_scratch(Scratch::kItem, static_cast<std::size_t>(3 * padded) * sizeof(float)));
        return {memory, memory + padded, reinterpret_cast<std::uint16_t*>(memory + 2 * padded)};
    }
};

struct Statistics {
    float mean;
    float rstd;
};

// Of values [columns] in scratch, whose padding may hold anything. Two passes, so that a large mean does not eat the
// variance; the second also mends what rounding left of the mean.
MTBERT_INLINE Statistics statistics(const float* values, std::int64_t columns, float eps) {
    vf total = {};
    for (std::int64_t c = 0; c < columns; c += W) total += load(values + c, columns - c);
    const float share = 1.0f / static_cast<float>(columns);
    const float mean = sum(total) * share;
    vf rest = {}, squares = {};
    for (std::int64_t c = 0; c < columns; c += W) {
        vf centred = load(values + c, columns - c) - splat(mean);
        if (columns - c < W) {
            for (int i = static_cast<int>(columns - c); i < W; ++i) centred[i] = 0.0f;
        }
        rest += centred;
        squares += centred * centred;
    }
    const float correction = sum(rest) * share;
    const float variance = sum(squares) * share - correction * correction;
    return {mean + correction, 1.0f / __builtin_sqrtf((variance > 0.0f ? variance : variance * 0.0f) + eps)};
}

// The gradient of LayerNorm's input for one row: normal [columns] holds the normalised values, scaled [columns] the
// output's gradient times the weight; dinput is written over scaled.
MTBERT_INLINE void input_gradient(const float* normal, float* scaled, std::int64_t columns, float rstd) {
    vf total = {}, products = {};
    for (std::int64_t c = 0; c < columns; c += W) {
        const vf g = load(scaled + c, columns - c);
        total += g;
        products += g * load(normal + c, columns - c);
    }
    const vf mean = splat(sum(total) / static_cast<float>(columns));
    const vf slope = splat(sum(products) / static_cast<float>(columns));
    for (std::int64_t c = 0; c < columns; c += W) {
        const std::int64_t n = columns - c;
        store(scaled + c, (load(scaled + c, n) - mean - load(normal + c, n) * slope) * splat(rstd), n);
    }
}

// ---- residual + dropout(x + linear_bias), then LayerNorm

// One row of the sum, into scratch.
template <class T>
MTBERT_INLINE void add_row(const AddLayerNormArguments& a, std::int64_t t, const RowMask& mask, float* values) {
    const T* x = static_cast<const T*>(a.x) + t * a.columns;
    const T* residual = static_cast<const T*>(a.residual) + t * a.columns;
    for (std::int64_t c = 0; c < a.columns; c += W) {
        const std::int64_t n = a.columns - c;
        vf branch = load(x + c, n);
        if (a.linear_bias != nullptr) branch += load(a.linear_bias + c, n);
        store(values + c, load(residual + c, n) + mask.apply(c, branch));
    }
}

template <class T>
static void add_layer_norm_forward_rows(void* context, std::int64_t begin, std::int64_t end) {
    const AddLayerNormArguments& a = *static_cast<const AddLayerNormArguments*>(context);
    const RowScratch scratch = RowScratch::make(a.columns);
    const RowMask mask(a.mask, scratch.lanes);
    for (std::int64_t t = begin; t < end; ++t) {
        mask.draw(t, a.columns);
        add_row<T>(a, t, mask, scratch.values);
        const Statistics s = statistics(scratch.values, a.columns, a.eps);
        a.mean[t] = s.mean;
        a.rstd[t] = s.rstd;
        T* out = static_cast<T*>(a.out) + t * a.columns;
        for (std::int64_t c = 0; c < a.columns; c += W) {
            const std::int64_t n = a.columns - c;
            const vf normal = (load(scratch.values + c) - splat(s.mean)) * splat(s.rstd);
            store(out + c, normal * load(a.weight + c, n) + load(a.bias + c, n), n);
        }
    }
}

static void add_layer_norm_forward(const AddLayerNormArguments& a) {
    parallel_for(a.rows, kRowBlock, a.threads,
                 a.dtype == DType::kFloat32 ? add_layer_norm_forward_rows<float> : add_layer_norm_forward_rows<bf16>,
                 const_cast<AddLayerNormArguments*>(&a));
}

struct AddLayerNormBackward {
    const AddLayerNormArguments& a;
    Partials partials;
};

template <class T>
static void add_layer_norm_backward_blocks(void* context, std::int64_t begin, std::int64_t end) {
    const AddLayerNormBackward& backward = *static_cast<const AddLayerNormBackward*>(context);
    const AddLayerNormArguments& a = backward.a;
    const RowScratch scratch = RowScratch::make(a.columns);
    const RowMask mask(a.mask, scratch.lanes);
    for (std::int64_t block = begin; block < end; ++block) {
        float* sums = backward.partials.start(block);
        float* dweight = a.dweight == nullptr ? nullptr : sums;
        if (a.dweight != nullptr) sums += a.columns;
        float* dbias = a.dbias == nullptr ? nullptr : sums;
        if (a.dbias != nullptr) sums += a.columns;
        float* dlinear_bias = a.dlinear_bias == nullptr ? nullptr : sums;
        const std::int64_t last = (block + 1) * kRowBlock < a.rows ? (block + 1) * kRowBlock : a.rows;
        for (std::int64_t t = block * kRowBlock; t < last; ++t) {
            backward.partials.next_row(block, t);
            mask.draw(t, a.columns);
            add_row<T>(a, t, mask, scratch.values);
            const T* dout = static_cast<const T*>(a.dout) + t * a.columns;
            for (std::int64_t c = 0; c < a.columns; c += W) {
                const std::int64_t n = a.columns - c;
                const vf g = load(dout + c, n);
                const vf normal = (load(scratch.values + c) - splat(a.mean[t])) * splat(a.rstd[t]);
                store(scratch.values + c, normal);
                store(scratch.more + c, g * load(a.weight + c, n));
                if (dweight != nullptr) add_to(dweight + c, g * normal, n);
                if (dbias != nullptr) add_to(dbias + c, g, n);
            }
            if (a.dx == nullptr && a.dresidual == nullptr && dlinear_bias == nullptr) continue;
            input_gradient(scratch.values, scratch.more, a.columns, a.rstd[t]);
            for (std::int64_t c = 0; c < a.columns; c += W) {
                const std::int64_t n = a.columns - c;
                const vf d = load(scratch.more + c);
                if (a.dresidual != nullptr) store(static_cast<T*>(a.dresidual) + t * a.columns + c, d, n);
                const vf branch = mask.apply(c, d);
                if (a.dx != nullptr) store(static_cast<T*>(a.dx) + t * a.columns + c, branch, n);
                if (dlinear_bias != nullptr) add_to(dlinear_bias + c, branch, n);
            }
        }
        backward.partials.flush(block);
    }
}

static void add_layer_norm_backward(const AddLayerNormArguments& a) {
    const std::int64_t kinds = (a.dweight != nullptr) + (a.dbias != nullptr) + (a.dlinear_bias != nullptr);
    AddLayerNormBackward backward{a, Partials::make(a.rows, kinds, a.columns)};
    parallel_for(row_blocks(a.rows), 1, a.threads,
                 a.dtype == DType::kFloat32 ? add_layer_norm_backward_blocks<float>
                                            : add_layer_norm_backward_blocks<bf16>,
                 &backward);
    std::int64_t kind = 0;
    float* const targets[] = {a.dweight, a.dbias, a.dlinear_bias};
    for (float* target : targets) {
        if (target != nullptr) backward.partials.finish(kind++, target);
    }
}

// ---- three look-ups, LayerNorm, dropout

template <class Table>
MTBERT_INLINE void look_up_row(const EmbeddingArguments& a, std::int64_t t, float* values) {
    const Table* word = static_cast<const Table*>(a.tables[0]) + a.indices[0][t] * a.columns;
    const Table* position = static_cast<const Table*>(a.tables[1]) + a.indices[1][t] * a.columns;
    const Table* type = static_cast<const Table*>(a.tables[2]) + a.indices[2][t] * a.columns;
    for (std::int64_t c = 0; c < a.columns; c += W) {
        const std::int64_t n = a.columns - c;
        store(values + c, load(word + c, n) + load(position + c, n) + load(type + c, n));
    }
}

template <class T, class Table>
static void embedding_forward_rows(void* context, std::int64_t begin, std::int64_t end) {
    const EmbeddingArguments& a = *static_cast<const EmbeddingArguments*>(context);
    const RowScratch scratch = RowScratch::make(a.columns);
    const RowMask mask(a.mask, scratch.lanes);
    for (std::int64_t t = begin; t < end; ++t) {
        mask.draw(t, a.columns);
        look_up_row<Table>(a, t, scratch.values);
        const Statistics s = statistics(scratch.values, a.columns, a.eps);
        a.mean[t] = s.mean;
        a.rstd[t] = s.rstd;
        T* out = static_cast<T*>(a.out) + t * a.columns;
        for (std::int64_t c = 0; c < a.columns; c += W) {
            const std::int64_t n = a.columns - c;
            const vf normal = (load(scratch.values + c) - splat(s.mean)) * splat(s.rstd);
            store(out + c, mask.apply(c, normal * load(a.weight + c, n) + load(a.bias + c, n)), n);
        }
    }
}

static void embedding_forward(const EmbeddingArguments& a) {
    const bool out32 = a.dtype == DType::kFloat32, table32 = a.table_dtype == DType::kFloat32;
    parallel_for(a.rows, kRowBlock, a.threads,
                 out32 ? (table32 ? embedding_forward_rows<float, float> : embedding_forward_rows<float, bf16>)
                       : (table32 ? embedding_forward_rows<bf16, float> : embedding_forward_rows<bf16, bf16>),
                 const_cast<EmbeddingArguments*>(&a));
}

struct EmbeddingBackward {
    const EmbeddingArguments& a;
    Partials partials;
    float* dsum;  // [rows, columns]: the gradient of the three look-ups' sum; nullptr where no table wants one
};

template <class T, class Table>
static void embedding_backward_blocks(void* context, std::int64_t begin, std::int64_t end) {
    const EmbeddingBackward& backward = *static_cast<const EmbeddingBackward*>(context);
    const EmbeddingArguments& a = backward.a;
    const RowScratch scratch = RowScratch::make(a.columns);
    const RowMask mask(a.mask, scratch.lanes);
    for (std::int64_t block = begin; block < end; ++block) {
        float* sums = backward.partials.start(block);
        float* dweight = a.dweight == nullptr ? nullptr : sums;
        if (a.dweight != nullptr) sums += a.columns;
        float* dbias = a.dbias == nullptr ? nullptr : sums;
        const std::int64_t last = (block + 1) * kRowBlock < a.rows ? (block + 1) * kRowBlock : a.rows;
        for (std::int64_t t = block * kRowBlock; t < last; ++t) {
            backward.partials.next_row(block, t);
            mask.draw(t, a.columns);
            look_up_row<Table>(a, t, scratch.values);
            const T* dout = static_cast<const T*>(a.dout) + t * a.columns;
            for (std::int64_t c = 0; c < a.columns; c += W) {
                const std::int64_t n = a.columns - c;
                const vf g = mask.apply(c, load(dout + c, n));
                const vf normal = (load(scratch.values + c) - splat(a.mean[t])) * splat(a.rstd[t]);
                store(scratch.values + c, normal);
                store(scratch.more + c, g * load(a.weight + c, n));
                if (dweight != nullptr) add_to(dweight + c, g * normal, n);
                if (dbias != nullptr) add_to(dbias + c, g, n);
            }
            if (backward.dsum == nullptr) continue;
            input_gradient(scratch.values, scratch.more, a.columns, a.rstd[t]);
            __builtin_memcpy(backward.dsum + t * a.columns, scratch.more,
                             static_cast<std::size_t>(a.columns) * sizeof(float));
        }
        backward.partials.flush(block);
    }
}

// Columns of the tables' gradients that one item adds up, token after token: no two items touch the same element.
constexpr std::int64_t kScatterColumns = 64;

static void scatter_columns(void* context, std::int64_t begin, std::int64_t end) {
    const EmbeddingBackward& backward = *static_cast<const EmbeddingBackward*>(context);
    const EmbeddingArguments& a = backward.a;
    for (std::int64_t item = begin; item < end; ++item) {
        const std::int64_t first = item * kScatterColumns;
        const std::int64_t count = a.columns - first < kScatterColumns ? a.columns - first : kScatterColumns;
        for (std::int64_t t = 0; t < a.rows; ++t) {
            const float* source = backward.dsum + t * a.columns + first;
            for (int table = 0; table < 3; ++table) {
                if (a.dtables[table] == nullptr) continue;
                float* target = a.dtables[table] + a.targets[table][t] * a.columns + first;
                for (std::int64_t c = 0; c < count; c += W) add_to(target + c, load(source + c, count - c), count - c);
            }
        }
    }
}

static void embedding_backward(const EmbeddingArguments& a) {
    const std::int64_t kinds = (a.dweight != nullptr) + (a.dbias != nullptr);
    const bool scatters = a.dtables[0] != nullptr || a.dtables[1] != nullptr || a.dtables[2] != nullptr;
    // The partial sums and the rows' gradients share one piece of memory.
    const std::int64_t sums = Partials::floats(a.rows, kinds, a.columns);
    const std::int64_t floats = sums + (scatters ? a.rows * a.columns : 0);
    float* memory =
        static_cast<float*>(thread_scratch(Scratch::kCall, static_cast<std::size_t>(floats) * sizeof(float)));
    EmbeddingBackward backward{
        a, Partials{memory, row_blocks(a.rows), kinds, a.columns}, scatters ? memory + sums : nullptr};
    const bool out32 = a.dtype == DType::kFloat32, table32 = a.table_dtype == DType::kFloat32;
    parallel_for(row_blocks(a.rows), 1, a.threads,
                 out32 ? (table32 ? embedding_backward_blocks<float, float> : embedding_backward_blocks<float, bf16>)
                       : (table32 ? embedding_backward_blocks<bf16, float> : embedding_backward_blocks<bf16, bf16>),
                 &backward);
    std::int64_t kind = 0;
    float* const targets[] = {a.dweight, a.dbias};
    for (float* target : targets) {
        if (target != nullptr) backward.partials.finish(kind++, target);
    }
    if (scatters) {
        parallel_for((a.columns + kScatterColumns - 1) / kScatterColumns, 1, a.threads, scatter_columns, &backward);
    }
}

}  // namespace mtbert::MTBERT_ISA
