// Dropout of rows; the backward pass is the same function on the gradient.
#pragma once

#include "cpu/philox_vector.h"
#include "cpu/threads.h"

namespace mtbert::MTBERT_ISA {

// Columns whose lanes are drawn at once, on the stack.
constexpr std::int64_t kDropoutTile = 1024;

template <class T>
static void dropout_rows(const DropoutArguments& a, std::int64_t begin, std::int64_t end) {
    const Stream stream = make_stream(a.mask.key);
    const vu threshold = splat_u(stream.threshold);
    const vf scale = splat(stream.scale);
    alignas(64) std::uint16_t lanes[kDropoutTile];
    for (std::int64_t t = begin; t < end; ++t) {
        const T* x = static_cast<const T*>(a.x) + t * a.columns;
        T* out = static_cast<T*>(a.out) + t * a.columns;
        for (std::int64_t first = 0; first < a.columns; first += kDropoutTile) {
            const std::int64_t count = a.columns - first < kDropoutTile ? a.columns - first : kDropoutTile;
            draw_lanes(stream, static_cast<std::uint32_t>(a.mask.row[t]), first / kDropoutLanes, count, lanes);
            for (std::int64_t c = 0; c < count; c += W) {
                const vf value = load(x + first + c, count - c) * scale;
                store(out + first + c, kept(keep_of_lanes(lanes + c, threshold), value), count - c);
            }
        }
    }
}

static void dropout(const DropoutArguments& arguments) {
    const std::int64_t rows_per_chunk = 1 + 32768 / (arguments.columns + 1);
    parallel_for(
        arguments.rows, rows_per_chunk, arguments.threads,
        [](void* context, std::int64_t begin, std::int64_t end) {
            const DropoutArguments& a = *static_cast<const DropoutArguments*>(context);
            if (a.dtype == DType::kFloat32) {
                dropout_rows<float>(a, begin, end);
            } else {
                dropout_rows<bf16>(a, begin, end);
            }
        },
        const_cast<DropoutArguments*>(&arguments));
}

}  // namespace mtbert::MTBERT_ISA
