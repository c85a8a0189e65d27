// From the arguments of lora.h to launches of the sm_80 kernels: which variant, how many blocks, what parameters.
// Host code that needs no CUDA header: a launch is a call of launch(kernel, LaunchPlan, parameters), and the tests
// give one that runs the kernel on the host. Everything here is a function of the shape alone, and no element's
// sum depends on the tile.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "cuda/lora/lora.h"
#include "cuda/lora/plan.h"
#include "cuda/lora/sm80_forward.h"
#include "cuda/lora/sm80_grad_a.h"
#include "cuda/lora/sm80_input.h"
#include "cuda/lora/sm80_low.h"
#include "cuda/lora/sm80_reduce.h"
#include "cuda/lora/sm80_thin.h"

namespace mtbert::cuda::sm80 {

struct LaunchPlan {
    std::int64_t blocks;
    int threads;
    int shared_bytes;
};

template <int... kValues>
using Choices = std::integer_sequence<int, kValues...>;

// How work is cut: for a large GPU, whatever the card, so that equal calls give equal bits. A test has less of it.
struct Cuts {
    static constexpr LoraCard kCard = kLoraCard;
    // The blocks that are wanted for ds and dB, and the most slabs of rows.
    static constexpr std::int64_t kLowBlocks = 128;
    // The blocks that are wanted for dA.
    static constexpr std::int64_t kGradABlocks = 256;
};

// The sizes that kernels are made for, ascending; a call takes the first that holds its own. A test makes fewer.
template <typename T>
struct Variants : Cuts {
    // Ranks of the fused forward kernel: with the wide tile, and with the narrow one.
    using Wide = std::conditional_t<kIsFloat<T>, Choices<>, Choices<8, kLoraWideRank>>;
    using Small = std::conditional_t<kIsFloat<T>, Choices<16, 64>, Choices<8, 16, 32, 64>>;
    using Rank = Small;                        // of ds and dB
    using Low = Choices<16, 32, 64, 96, 192>;  // J * R of s and dA
};

// Calls body(std::integral_constant<int, c>) for the first choice c that is not below value; false: there is none.
template <int... kValues, typename Body>
bool choose(Choices<kValues...>, std::int64_t value, const Body& body) {
    bool found = false;
    [[maybe_unused]] const auto consider = [&](auto choice) {
        if (!found && value <= choice.value) {
            found = true;
            body(choice);
        }
    };
    (consider(std::integral_constant<int, kValues>{}), ...);
    return found;
}

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

template <typename P>
P as_pointer(std::uintptr_t address) {
    return reinterpret_cast<P>(address);
}

inline Mask make_mask(const LoraMask& mask) {
    Mask result{};
    result.scale = 1.0f;
    if (mask.threshold != 0) {
        const auto threshold = static_cast<std::uint32_t>(mask.threshold);
        result.scale = make_dropout_key(0, 0, 0, threshold).scale;
        result.dropout_row = as_pointer<const std::int32_t*>(mask.dropout_row);
        result.step_pointer = as_pointer<const std::int64_t*>(mask.step_pointer);
        result.seed = mask.seed;
        result.step = static_cast<std::uint32_t>(mask.step);
        result.site = static_cast<std::uint32_t>(mask.site);
        result.threshold = threshold;
    }
    return result;
}

template <typename T, typename Sizes>
bool is_wide(std::int64_t rows, std::int64_t columns, std::int64_t blocks, std::int64_t low_columns) {
    return !kIsFloat<T> && lora_takes_wide(Sizes::kCard, rows, columns, blocks, low_columns);
}

// y, and s unless it is given.
template <typename T, typename Sizes = Variants<T>, typename Launch>
void run_forward(const LoraForward& f, bool s_given, const Launch& launch) {
    const LoraShape& shape = f.shape;
    Forward p{};
    p.x = as_pointer<const char*>(f.x);
    p.weight = as_pointer<const char*>(f.weight);
    p.bias = as_pointer<const char*>(f.bias);
    p.a = as_pointer<const char*>(f.a);
    p.b = as_pointer<const char*>(f.b);
    p.out = as_pointer<char*>(f.out);
    p.s = as_pointer<char*>(f.s);
    p.x_stride = f.x_stride * static_cast<std::int64_t>(sizeof(T));
    p.out_stride = f.out_stride * static_cast<std::int64_t>(sizeof(T));
    p.rows = shape.rows;
    p.inputs = static_cast<int>(shape.inputs);
    p.outputs = static_cast<int>(shape.outputs / shape.blocks);
    p.blocks = static_cast<int>(shape.blocks);
    p.rank = static_cast<int>(shape.rank);
    p.ranks = lora_ranks(shape);
    p.mask = make_mask(shape.mask);
    p.s_scale = static_cast<float>(shape.scale * p.mask.scale);
    const auto start = [&](auto tile, auto kernel) {
        using Tile = decltype(tile);
        const std::int64_t tiles = ceil_div(p.rows, Tile::kRows) * p.blocks * ceil_div(p.outputs, Tile::kColumns);
        launch(kernel, LaunchPlan{tiles, Tile::kThreads, Tile::kSharedBytes}, p);
    };
    const std::int64_t low_columns = s_given ? 0 : lora_low_columns(p.rank, p.mask.threshold != 0);
    const bool wide = is_wide<T, Sizes>(p.rows, p.outputs, p.blocks, low_columns);
    if (s_given) {
        if constexpr (!kIsFloat<T>) {
            if (wide) {
                return start(ForwardTile<T, 0, 2, 2>{}, &forward_kernel<T, 0, false, 2, 2>);
            }
        }
        return start(ForwardTile<T, 0, 1, 1>{}, &forward_kernel<T, 0, false, 1, 1>);
    }
    const auto fused = [&](auto rank, auto row_warps, auto units) {
        constexpr int kRank = rank.value, kRowWarps = row_warps.value, kUnits = units.value;
        const ForwardTile<T, kRank, kRowWarps, kUnits> tile;
        if (p.mask.threshold != 0) {
            start(tile, &forward_kernel<T, kRank, true, kRowWarps, kUnits>);
        } else {
            start(tile, &forward_kernel<T, kRank, false, kRowWarps, kUnits>);
        }
    };
    using One = std::integral_constant<int, 1>;
    using Two = std::integral_constant<int, 2>;
    if (!wide || !choose(typename Sizes::Wide{}, p.rank, [&](auto rank) { fused(rank, Two{}, Two{}); })) {
        choose(typename Sizes::Small{}, p.rank, [&](auto rank) { fused(rank, One{}, One{}); });
    }
}

// s alone.
template <typename T, typename Sizes = Variants<T>, typename Launch>
void run_thin(const LoraForward& f, const Launch& launch) {
    const LoraShape& shape = f.shape;
    Thin p{};
    p.x = as_pointer<const char*>(f.x);
    p.a = as_pointer<const char*>(f.a);
    p.s = as_pointer<char*>(f.s);
    p.x_stride = f.x_stride * static_cast<std::int64_t>(sizeof(T));
    p.rows = shape.rows;
    p.inputs = static_cast<int>(shape.inputs);
    p.low = static_cast<int>(shape.blocks * shape.rank);
    p.rank = static_cast<int>(shape.rank);
    p.ranks = lora_ranks(shape);
    p.mask = make_mask(shape.mask);
    p.s_scale = static_cast<float>(shape.scale * p.mask.scale);
    choose(typename Sizes::Low{}, p.low, [&](auto low) {
        using Tile = ThinTile<T, low.value>;
        const std::int64_t tiles = ceil_div(p.rows, Tile::kRows);
        launch(&thin_kernel<T, low.value>, LaunchPlan{tiles, Tile::kThreads, Tile::kSharedBytes}, p);
    });
}

// dx.
template <typename T, typename Sizes = Variants<T>, typename Launch>
void run_input(const LoraInput& f, const Launch& launch) {
    const LoraShape& shape = f.shape;
    Input p{};
    p.grad = as_pointer<const char*>(f.grad);
    p.weight = as_pointer<const char*>(f.weight);
    p.a = as_pointer<const char*>(f.a);
    p.ds = as_pointer<const char*>(f.ds);
    p.dx = as_pointer<char*>(f.dx);
    p.grad_stride = f.grad_stride * static_cast<std::int64_t>(sizeof(T));
    p.dx_stride = f.dx_stride * static_cast<std::int64_t>(sizeof(T));
    p.rows = shape.rows;
    p.inputs = static_cast<int>(shape.inputs);
    p.outputs = static_cast<int>(shape.outputs);
    p.low = static_cast<int>(shape.blocks * shape.rank);
    p.mask = make_mask(shape.mask);
    const auto start = [&](auto tile, auto kernel) {
        using Tile = decltype(tile);
        const std::int64_t tiles = ceil_div(p.rows, Tile::kRows) * ceil_div(p.inputs, Tile::kColumns);
        launch(kernel, LaunchPlan{tiles, Tile::kThreads, Tile::kSharedBytes}, p);
    };
    if constexpr (!kIsFloat<T>) {
        if (is_wide<T, Sizes>(p.rows, p.inputs, 1, 0)) {
            return start(InputTile<T, 2, 2>{}, &input_kernel<T, 2, 2>);
        }
    }
    start(InputTile<T, 1, 1>{}, &input_kernel<T, 1, 1>);
}

// How the work on ds and dB is cut, in slabs of rows and runs of columns: of the ways that give as many blocks as are
// wanted, the one whose parts are smallest. A slab leaves a part of outputs * rank floats of dB, a run of columns one of
// rows * rank of ds.
struct LowPlan {
    std::int64_t slab;
    std::int64_t pieces;
    std::int64_t split_steps;
    std::int64_t splits;
    std::int64_t part_b;   // floats of the workspace: 0 where the only part is dB itself
    std::int64_t part_ds;  // floats: 0 where the only part is ds itself
};
template <typename Sizes = Cuts>
LowPlan plan_low(const LoraShape& shape, std::int64_t groups) {
    constexpr std::int64_t kRows = 128, kStepBytes = 128;
    const std::int64_t size = shape.dtype == DType::kFloat32 ? 4 : 2;
    LowPlan plan{};
    const std::int64_t steps = ceil_div(shape.outputs / shape.blocks * size, kStepBytes);
    const std::int64_t least = std::max<std::int64_t>(1, ceil_div(shape.rows, kRows * Sizes::kLowBlocks));
    const std::int64_t most = std::max<std::int64_t>(least, low_passes(shape.rank, size));
    std::int64_t blocks = 0, smallest = 0;  // of the first way, and its parts in floats by the rank
    for (std::int64_t lines = least; lines <= most; ++lines) {
        const std::int64_t slabs = ceil_div(shape.rows, kRows * lines);
        const std::int64_t wanted = ceil_div(Sizes::kLowBlocks, slabs * shape.blocks);
        const std::int64_t split_steps = ceil_div(steps, std::min(steps, wanted));
        const std::int64_t splits = ceil_div(steps, split_steps);
        const std::int64_t parts =
            (slabs > 1 ? slabs * shape.outputs : 0) + (splits > 1 ? splits * shape.rows * shape.blocks : 0);
        if (lines == least || (slabs * splits >= blocks && parts < smallest)) {
            blocks = lines == least ? std::min(slabs * splits, ceil_div(Sizes::kLowBlocks, shape.blocks)) : blocks;
            smallest = parts;
            plan.slab = kRows * lines;
            plan.split_steps = split_steps;
            plan.splits = splits;
        }
    }
    plan.pieces = count_pieces(shape.rows, plan.slab, groups);
    plan.part_b = plan.pieces > 1 ? plan.pieces * shape.outputs * shape.rank : 0;
    plan.part_ds = plan.splits > 1 ? plan.splits * shape.rows * shape.blocks * shape.rank : 0;
    return plan;
}

constexpr std::int64_t kFloatBytes = 4;

// ds, and dB where it is wanted.
template <typename T, typename Sizes = Variants<T>, typename Launch>
void run_low(const LoraLow& f, const Launch& launch) {
    const LoraShape& shape = f.shape;
    const bool wants_b = f.grad_b != 0;
    const std::int64_t groups = wants_b ? f.groups : 1;  // for ds alone, rows are rows
    const LowPlan plan = plan_low<Sizes>(shape, groups);
    auto* const workspace = as_pointer<float*>(f.workspace);
    Low p{};
    p.grad = as_pointer<const char*>(f.grad);
    p.b = as_pointer<const char*>(f.b);
    p.s = as_pointer<const char*>(f.s);
    p.ds = as_pointer<char*>(f.ds);
    p.part_b = !wants_b ? nullptr : plan.part_b > 0 ? workspace : as_pointer<float*>(f.grad_b);
    p.part_ds = plan.part_ds > 0 ? workspace + (wants_b ? plan.part_b : 0) : nullptr;
    p.pieces = Pieces{wants_b ? as_pointer<const std::int32_t*>(f.bounds) : nullptr, static_cast<int>(groups),
                      static_cast<int>(plan.slab), shape.rows};
    p.grad_stride = f.grad_stride * static_cast<std::int64_t>(sizeof(T));
    p.outputs = static_cast<int>(shape.outputs / shape.blocks);
    p.blocks = static_cast<int>(shape.blocks);
    p.rank = static_cast<int>(shape.rank);
    p.ranks = lora_ranks(shape);
    p.splits = static_cast<int>(plan.splits);
    p.split_steps = static_cast<int>(plan.split_steps);
    p.scale = static_cast<float>(shape.scale);
    choose(typename Sizes::Rank{}, p.rank, [&](auto rank) {
        using Tile = LowTile<T, rank.value>;
        launch(&low_kernel<T, rank.value>,
               LaunchPlan{plan.pieces * p.blocks * plan.splits, Tile::kThreads, Tile::kSharedBytes}, p);
    });

    Reduce r{};
    r.pieces = p.pieces;
    r.scale = p.scale;
    r.splits = p.splits;
    std::int64_t blocks = 0;
    if (wants_b && plan.part_b > 0) {
        r.part = p.part_b;
        r.out = as_pointer<float*>(f.grad_b);
        r.elements = shape.outputs * shape.rank;
        r.group_blocks = static_cast<int>(ceil_div(r.elements, kReduceBlockElements));
        blocks += groups * r.group_blocks;
    }
    if (plan.part_ds > 0) {
        r.part_ds = p.part_ds;
        r.ds = p.ds;
        r.ds_elements = shape.rows * shape.blocks * shape.rank;
        blocks += ceil_div(r.ds_elements, 4 * kReduceThreads);
    }
    if (blocks > 0) {
        launch(&reduce_kernel<T>, LaunchPlan{blocks, kReduceThreads, kReduceSharedBytes}, r);
    }
}

// How the work on dA is cut: slabs of 64 rows at least.
struct GradAPlan {
    std::int64_t slab;
    std::int64_t pieces;
    std::int64_t chunks;
    std::int64_t part;  // floats of the workspace: 0 where the only part is dA itself
};
template <typename Sizes = Cuts>
GradAPlan plan_grad_a(const LoraShape& shape, std::int64_t groups) {
    constexpr std::int64_t kColumns = 128, kRows = 64;
    GradAPlan plan{};
    plan.chunks = ceil_div(shape.inputs, kColumns);
    plan.slab = kRows * std::max<std::int64_t>(1, ceil_div(shape.rows * plan.chunks, Sizes::kGradABlocks * kRows));
    plan.pieces = count_pieces(shape.rows, plan.slab, groups);
    plan.part = plan.pieces > 1 ? plan.pieces * shape.blocks * shape.rank * shape.inputs : 0;
    return plan;
}

// dA.
template <typename T, typename Sizes = Variants<T>, typename Launch>
void run_grad_a(const LoraGradA& f, const Launch& launch) {
    const LoraShape& shape = f.shape;
    const GradAPlan plan = plan_grad_a<Sizes>(shape, f.groups);
    GradA p{};
    p.x = as_pointer<const char*>(f.x);
    p.ds = as_pointer<const char*>(f.ds);
    p.part = as_pointer<float*>(plan.part > 0 ? f.workspace : f.grad_a);
    p.pieces = Pieces{as_pointer<const std::int32_t*>(f.bounds), static_cast<int>(f.groups),
                      static_cast<int>(plan.slab), shape.rows};
    p.x_stride = f.x_stride * static_cast<std::int64_t>(sizeof(T));
    p.inputs = static_cast<int>(shape.inputs);
    p.low = static_cast<int>(shape.blocks * shape.rank);
    p.mask = make_mask(shape.mask);
    choose(typename Sizes::Low{}, p.low, [&](auto low) {
        using Tile = GradATile<T, low.value>;
        launch(&grad_a_kernel<T, low.value>,
               LaunchPlan{plan.pieces * plan.chunks, Tile::kThreads, Tile::kSharedBytes}, p);
    });
    if (plan.part > 0) {
        Reduce r{};
        r.part = p.part;
        r.out = as_pointer<float*>(f.grad_a);
        r.pieces = p.pieces;
        r.elements = static_cast<std::int64_t>(p.low) * p.inputs;
        r.group_blocks = static_cast<int>(ceil_div(r.elements, kReduceBlockElements));
        launch(&reduce_kernel<T>, LaunchPlan{f.groups * r.group_blocks, kReduceThreads, kReduceSharedBytes}, r);
    }
}

}  // namespace mtbert::cuda::sm80
