// Sums over rows that do not depend on the number of threads: rows go in blocks of a fixed size, each block has its own
// sums, and these are added in order.
#pragma once

#include "cpu/threads.h"
#include "cpu/vector.h"

namespace mtbert::MTBERT_ISA {

constexpr std::int64_t kRowBlock = 64;

MTBERT_INLINE std::int64_t row_blocks(std::int64_t rows) { return (rows + kRowBlock - 1) / kRowBlock; }

MTBERT_INLINE void add_to(float* target, vf value, std::int64_t n) { store(target, load(target, n) + value, n); }

// Sums of `kinds` kinds (one a wanted gradient) for each block of rows: memory [blocks, 2, kinds, columns]. The second
// half of a block's memory holds the sums of a few rows, which go into the first every kRowGroup rows: adding few
// numbers of like size at a time loses less to rounding.
struct Partials {
    static constexpr std::int64_t kRowGroup = 8;

    float* memory;
    std::int64_t blocks;
    std::int64_t kinds;
    std::int64_t columns;

    MTBERT_INLINE std::int64_t floats(std::int64_t rows, std::int64_t kinds, std::int64_t columns) {
        return row_blocks(rows) * 2 * kinds * columns;
    }

    MTBERT_INLINE Partials make(std::int64_t rows, std::int64_t kinds, std::int64_t columns) {
        const std::size_t bytes = static_cast<std::size_t>(floats(rows, kinds, columns)) * sizeof(float);
        return {static_cast<float*>(thread_scratch(Scratch::kCall, bytes)), row_blocks(rows), kinds, columns};
    }

    float* block_sums(std::int64_t block) const { return memory + block * 2 * kinds * columns; }

    // Zeroes a block; returns where its rows are to be added, [kinds, columns].
    float* start(std::int64_t block) const {
        __builtin_memset(block_sums(block), 0, static_cast<std::size_t>(2 * kinds * columns) * sizeof(float));
        return block_sums(block) + kinds * columns;
    }

    // Before each row t of a block.
    void next_row(std::int64_t block, std::int64_t t) const {
        if (t % kRowGroup == 0) flush(block);
    }

    // After the last row of a block.
    void flush(std::int64_t block) const {
        const std::int64_t count = kinds * columns;
        float* whole = block_sums(block);
        float* group = whole + count;
        for (std::int64_t c = 0; c < count; c += W) {
            add_to(whole + c, load(group + c, count - c), count - c);
            store(group + c, vf{}, count - c);
        }
    }

    // Kind `kind` summed over the blocks.
    void finish(std::int64_t kind, float* target) const {
        if (target == nullptr) return;
        __builtin_memset(target, 0, static_cast<std::size_t>(columns) * sizeof(float));
        for (std::int64_t b = 0; b < blocks; ++b) {
            const float* own = block_sums(b) + kind * columns;
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
        sums.partials.start(block);
        float* own = sums.partials.block_sums(block);
        const std::int64_t last = (block + 1) * kRowBlock < a.rows ? (block + 1) * kRowBlock : a.rows;
        for (std::int64_t first = block * kRowBlock; first < last; first += Partials::kRowGroup) {
            const std::int64_t count = last - first < Partials::kRowGroup ? last - first : Partials::kRowGroup;
            const T* x = static_cast<const T*>(a.x) + first * a.columns;
            for (std::int64_t c = 0; c < a.columns; c += W) {
                vf total = {};
                for (std::int64_t t = 0; t < count; ++t) total += load(x + t * a.columns + c, a.columns - c);
                add_to(own + c, total, a.columns - c);
            }
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
