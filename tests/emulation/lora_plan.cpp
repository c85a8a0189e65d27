// The choice of a kernel for the LoRA products, and the check for overlapping arguments, for tests on the host.
#include <cstdint>

#include "cuda/lora/plan.h"
#include "cuda/lora/regions.h"
#include "cuda/lora/sm90_layout.h"

using namespace mtbert::cuda;

// results: the forward kernel and the input's, as numbers of LoraKernel.
extern "C" const char* lora_plan_of(std::int64_t architecture, std::int64_t sm90, std::int64_t rows,
                                    std::int64_t outputs, std::int64_t rank, std::int64_t threshold,
                                    std::int64_t* results) {
    LoraShape shape{};
    shape.rows = rows;
    shape.outputs = outputs;
    shape.rank = rank;
    shape.mask.threshold = threshold;
    const LoraPlan plan = lora_plan({static_cast<int>(architecture), sm90 != 0}, shape);
    results[0] = static_cast<std::int64_t>(plan.forward);
    results[1] = static_cast<std::int64_t>(plan.input);
    return nullptr;
}

// results: whether the mma.sync kernels take wide tiles for a product, for `count` products of 16-bit elements; shapes:
// rows, columns of a block, blocks, rank where s is made (else 0), threshold of each.
extern "C" const char* lora_wide(const std::int64_t* shapes, std::int64_t count, std::int64_t* results) {
    for (std::int64_t i = 0; i < count; ++i, shapes += 5) {
        const std::int64_t low = shapes[3] > 0 ? lora_low_columns(shapes[3], shapes[4] != 0) : 0;
        results[i] = lora_takes_wide(kLoraCard, shapes[0], shapes[1], shapes[2], low) ? 1 : 0;
    }
    return nullptr;
}

// How the wgmma kernels cut `count` products: shapes: rows, columns of a block, blocks of each; results: the width of
// their tiles, then of all thread blocks the tiles, those that make s, and the most of both that one has.
extern "C" const char* lora_cuts(const std::int64_t* shapes, std::int64_t count, std::int64_t multiprocessors,
                                 std::int64_t* results) {
    for (std::int64_t i = 0; i < count; ++i, shapes += 3, results += 5) {
        const int blocks = static_cast<int>(shapes[2]), cluster = sm90::choose_cluster(shapes[0]);
        const int columns = sm90::choose_columns(shapes[0], shapes[1], blocks);
        const sm90::Schedule schedule = sm90::plan_schedule(shapes[0], shapes[1], blocks, columns, cluster,
                                                            static_cast<int>(multiprocessors));
        results[0] = columns;
        results[1] = results[2] = results[3] = results[4] = 0;
        for (int index = 0; index < schedule.clusters(); ++index) {
            std::int64_t tiles = 0, making = 0;
            for (int place = schedule.begin(index); place < schedule.end(index); ++place) {
                ++tiles;
                making += place == schedule.begin(index) || schedule.tile(place, 0).first ? 1 : 0;
            }
            results[1] += cluster * tiles;
            results[2] += cluster * making;
            results[3] = tiles > results[3] ? tiles : results[3];
            results[4] = making > results[4] ? making : results[4];
        }
    }
    return nullptr;
}

// regions: begin, rows, row_bytes and stride_bytes of `count` pairs of regions; results: whether they overlap.
extern "C" const char* lora_overlaps(const std::int64_t* regions, std::int64_t count, std::int64_t* results) {
    for (std::int64_t i = 0; i < count; ++i) {
        const auto region = [&](const std::int64_t* r) {
            return Region{"", static_cast<std::uintptr_t>(r[0]), r[1], r[2], r[3], 1};
        };
        results[i] = overlap(region(regions + 8 * i), region(regions + 8 * i + 4)) ? 1 : 0;
    }
    return nullptr;
}
