// The choice of a kernel for the LoRA products, and the check for overlapping arguments, for tests on the host.
#include <cstdint>

#include "cuda/lora/plan.h"
#include "cuda/lora/regions.h"

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
