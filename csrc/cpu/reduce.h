// Sums over rows that do not depend on the number of threads: rows go in blocks of a fixed size, each block has its own
// sums, and these are added in order.
#pragma once

#include "cpu/threads.h"
#include "cpu/vector.h"

namespace mtbert::MTBERT_ISA {

constexpr std::int64_t kRowBlock = 64;

MTBERT_INLINE std::int64_t row_blocks(std::int64_t rows) { return (rows + kRowBlock - 1) / kRowBlock; }

MTBERT_INLINE void add_to(float* target, vf value, std::int64_t n) { store(target, load(target, n) + value, n); }

// Sums of `kinds` kinds (one a wanted gradient) for each block of rows: memory [blocks, kinds, columns].
struct Partials {
    float* memory;
    std::int64_t blocks;
    std::int64_t kinds;
    std::int64_t columns;

    MTBERT_INLINE Partials make(std::int64_t rows, std::int64_t kinds, std::int64_t columns) {
        const std::int64_t blocks = row_blocks(rows);
        const std::size_t bytes = static_cast<std::size_t>(blocks * kinds * columns) * sizeof(float);
        return {static_cast<float*>(thread_scratch(Scratch::kCall, bytes)), blocks, kinds, columns};
    }

    // The sums of one block, zeroed.
    float* start(std::int64_t block) const {
        float* own = memory + block * kinds * columns;
        __builtin_memset(own, 0, static_cast<std::size_t>(kinds * columns) * sizeof(float));
        return own;
    }

    // Kind `kind` summed over the blocks.
    void finish(std::int64_t kind, float* target) const {
        if (target == nullptr) return;
        __builtin_memset(target, 0, static_cast<std::size_t>(columns) * sizeof(float));
        for (std::int64_t b = 0; b < blocks; ++b) {
            const float* own = memory + (b * kinds + kind) * columns;
            for (std::int64_t c = 0; c < columns; c += W) add_to(target + c, load(own + c, columns - c), columns - c);
        }
    }
};

// ---- the sum over rows on its own: the gradient of a bias

struct ColumnSums {
    const ColumnSumsArguments& a;
    Partials partials;
};

template <class T>
static void column_sums_blocks(void* context, std::int64_t begin, std::int64_t end) {
    const ColumnSums& sums = *static_cast<const ColumnSums*>(context);
    const ColumnSumsArguments& a = sums.a;
    for (std::int64_t block = begin; block < end; ++block) {
        float* own = sums.partials.start(block);
        const std::int64_t last = (block + 1) * kRowBlock < a.rows ? (block + 1) * kRowBlock : a.rows;
        for (std::int64_t t = block * kRowBlock; t < last; ++t) {
            const T* x = static_cast<const T*>(a.x) + t * a.columns;
            for (std::int64_t c = 0; c < a.columns; c += W) add_to(own + c, load(x + c, a.columns - c), a.columns - c);
        }
    }
}

static void column_sums(const ColumnSumsArguments& a) {
    ColumnSums sums{a, Partials::make(a.rows, 1, a.columns)};
    parallel_for(row_blocks(a.rows), 1, a.threads,
                 a.dtype == DType::kFloat32 ? column_sums_blocks<float> : column_sums_blocks<bf16>, &sums);
    sums.partials.finish(0, a.out);
}

}  // namespace mtbert::MTBERT_ISA
