// Parts of device memory as the arguments of an operation name them, and whether two of them share a byte.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mtbert::cuda {

// `rows` pieces of `row_bytes`, `stride_bytes` apart. With no rows it is nothing, and its address is not looked at.
struct Region {
    const char* name;
    std::uintptr_t begin;
    std::int64_t rows;
    std::int64_t row_bytes;
    std::int64_t stride_bytes;
    std::size_t alignment;

    constexpr bool empty() const { return rows == 0 || row_bytes == 0; }
    constexpr std::uintptr_t end() const {
        return empty() ? begin : begin + static_cast<std::uintptr_t>((rows - 1) * stride_bytes + row_bytes);
    }
};

// Whether two regions may share a byte. Exact for regions of one stride, as the columns of one matrix are; with
// different strides, regions whose address ranges meet count as overlapping.
constexpr bool overlap(const Region& a, const Region& b) {
    if (a.empty() || b.empty() || a.end() <= b.begin || b.end() <= a.begin) {
        return false;
    }
    const Region& first = a.begin <= b.begin ? a : b;
    const Region& second = a.begin <= b.begin ? b : a;
    if (a.stride_bytes != b.stride_bytes || first.rows == 1 || first.row_bytes > first.stride_bytes ||
        second.row_bytes > second.stride_bytes) {
        return true;
    }
    // Where a row of the second begins within the first's stride.
    const auto place = static_cast<std::int64_t>((second.begin - first.begin) %
                                                 static_cast<std::uintptr_t>(first.stride_bytes));
    return place < first.row_bytes || place + second.row_bytes > first.stride_bytes;
}

}  // namespace mtbert::cuda
