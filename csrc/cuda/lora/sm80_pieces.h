// How rows are shared out where a sum runs down them: in pieces, each of which lies in one slab (a run of p.slab
// rows, so that the work is even however the groups are cut) and in one group. The slabs and the groups are cuts
// of the same rows, so walking along them, each new piece has a larger slab + group: that is the piece's number.
// Numbers that are passed over belong to empty pieces. How many there are depends on the shape alone; which rows
// they hold is worked out on the device.
#pragma once

#include <cstdint>

#include "cuda/lora/machine.h"

namespace mtbert::cuda::sm80 {

struct Pieces {
    const std::int32_t* bounds;  // groups + 1 ascending offsets from 0 to rows; null: one group
    int groups;
    int slab;
    std::int64_t rows;
};

struct Piece {
    std::int64_t begin;
    std::int64_t end;  // not beyond begin: empty
};

inline std::int64_t count_pieces(std::int64_t rows, std::int64_t slab, std::int64_t groups) {
    return (rows + slab - 1) / slab + groups - 1;
}

MTBERT_DEVICE std::int64_t load_bound(const Pieces& p, int group) {
    return p.bounds == nullptr ? (group == 0 ? 0 : p.rows) : machine::load_global<std::int32_t>(p.bounds + group);
}

MTBERT_DEVICE Piece find_piece(const Pieces& p, int number) {
    // The last group with bounds[group] < (number - group + 1) slab, the end of the slab it would meet here: as
    // groups ascend, so does bounds[group] + group * slab.
    const std::int64_t limit = (static_cast<std::int64_t>(number) + 1) * p.slab;
    int group = 0, beyond = p.groups;
    while (beyond - group > 1) {
        const int middle = (group + beyond) / 2;
        if (load_bound(p, middle) + static_cast<std::int64_t>(middle) * p.slab < limit) {
            group = middle;
        } else {
            beyond = middle;
        }
    }
    const std::int64_t slab_end = limit - static_cast<std::int64_t>(group) * p.slab;
    const std::int64_t low = load_bound(p, group), high = load_bound(p, group + 1);
    const std::int64_t begin = low > slab_end - p.slab ? low : slab_end - p.slab;
    return {begin, high < slab_end ? high : slab_end};
}

// The numbers of a group's pieces, none of them empty.
struct PieceRange {
    int first;
    int last;  // below first: none
};
MTBERT_DEVICE PieceRange find_range(const Pieces& p, int group) {
    const std::int64_t low = load_bound(p, group), high = load_bound(p, group + 1);
    if (low >= high) {
        return {0, -1};
    }
    return {static_cast<int>(low / p.slab) + group, static_cast<int>((high - 1) / p.slab) + group};
}

}  // namespace mtbert::cuda::sm80
