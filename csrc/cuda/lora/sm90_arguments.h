// The arguments of the sm_90a kernels, from those of a call: which tiles, and what TMA is told of every matrix. No
// CUDA function is called here, so that a test builds the same arguments for the emulated kernels; `make_map(matrix,
// dimensions)` makes a TensorMap.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "cuda/lora/lora.h"
#include "cuda/lora/sm90_forward.h"
#include "cuda/lora/sm90_input.h"

namespace mtbert::cuda::sm90 {

// A dimension of a matrix as TMA sees it, the innermost first: how many elements, how many bytes from one to the next
// (not looked at for the innermost), how many in a box.
struct Dimension {
    std::int64_t size;
    std::int64_t stride_bytes;
    int box;
};
using Dimensions = std::initializer_list<Dimension>;

// How a product is cut up; nothing of it changes the result.
struct Cut {
    int columns;
    int cluster;
    int multiprocessors;
};

// The rank as it is multiplied: 8 as 16, where TMA reads zeros beyond the matrices.
constexpr int multiplied_rank(std::int64_t rank) { return rank < kStep ? kStep : static_cast<int>(rank); }

inline const void* pointer(std::uintptr_t address) { return reinterpret_cast<const void*>(address); }

inline DropoutKey make_key(const LoraMask& mask) {
    return make_dropout_key(mask.seed, static_cast<std::uint32_t>(mask.step), static_cast<std::uint32_t>(mask.site),
                            static_cast<std::uint32_t>(mask.threshold));
}

// The rows of a matrix [rows, columns] with a stride, of which one row has none.
inline Dimension strided_rows(std::int64_t rows, std::int64_t columns, std::int64_t stride, int box) {
    return Dimension{rows, kElementBytes * (rows > 1 ? stride : columns), box};
}

template <typename MakeMap>
ForwardArguments make_arguments(const LoraForward& call, bool s_given, const Cut& cut, const MakeMap& make_map) {
    const LoraShape& shape = call.shape;
    const std::int64_t block_columns = shape.outputs / shape.blocks;
    const std::int64_t input_bytes = shape.inputs * kElementBytes, rank_bytes = shape.rank * kElementBytes;
    const int part = cut.columns / cut.cluster;
    ForwardArguments arguments{};
    arguments.x =
        make_map(call.x, Dimensions{{shape.inputs, 0, kDepth},
                                    strided_rows(shape.rows, shape.inputs, call.x_stride, kTileRows)});
    arguments.weight = make_map(call.weight, Dimensions{{shape.inputs, 0, kDepth}, {shape.outputs, input_bytes, part}});
    if (!s_given) {
        arguments.a = make_map(call.a, Dimensions{{shape.inputs, 0, kDepth},
                                                  {shape.rank, input_bytes, multiplied_rank(shape.rank) / cut.cluster},
                                                  {shape.blocks, shape.rank * input_bytes, 1}});
    }
    arguments.b = make_map(call.b, Dimensions{{shape.rank, 0, kDepth}, {shape.outputs, rank_bytes, part}});
    arguments.out = make_map(call.out, Dimensions{{block_columns, 0, kStoreColumns},
                                                  {shape.blocks, block_columns * kElementBytes, 1},
                                                  strided_rows(shape.rows, shape.outputs, call.out_stride, kWarpRows)});
    arguments.bias = pointer(call.bias);
    arguments.s = reinterpret_cast<void*>(call.s);
    arguments.dropout_row = pointer(shape.mask.dropout_row);
    arguments.step_pointer = pointer(shape.mask.step_pointer);
    arguments.key = make_key(shape.mask);
    arguments.s_factor =
        static_cast<float>(shape.scale * (65536.0 / static_cast<double>(65536 - shape.mask.threshold)));
    arguments.rows = static_cast<int>(shape.rows);
    arguments.slices = static_cast<int>(ceil_divide(shape.inputs, kDepth));
    arguments.rank = static_cast<int>(shape.rank);
    arguments.ranks = lora_ranks(shape);
    arguments.blocks = static_cast<int>(shape.blocks);
    arguments.schedule = plan_schedule(shape.rows, block_columns, arguments.blocks, cut.columns, cut.cluster,
                                       cut.multiprocessors);
    arguments.s_given = s_given;
    arguments.bias_paired = call.bias % (2 * kElementBytes) == 0;
    return arguments;
}

template <typename MakeMap>
InputArguments make_arguments(const LoraInput& call, const Cut& cut, const MakeMap& make_map) {
    const LoraShape& shape = call.shape;
    const std::int64_t ranks = shape.blocks * shape.rank;
    const std::int64_t input_bytes = shape.inputs * kElementBytes;
    const int part = kDepth / cut.cluster;
    InputArguments arguments{};
    arguments.grad =
        make_map(call.grad, Dimensions{{shape.outputs, 0, kDepth},
                                       strided_rows(shape.rows, shape.outputs, call.grad_stride, kTileRows)});
    arguments.weight =
        make_map(call.weight, Dimensions{{shape.inputs, 0, kStoreColumns}, {shape.outputs, input_bytes, part}});
    arguments.ds = make_map(call.ds, Dimensions{{ranks, 0, kDepth}, {shape.rows, ranks * kElementBytes, kTileRows}});
    arguments.a = make_map(call.a, Dimensions{{shape.inputs, 0, kStoreColumns}, {ranks, input_bytes, part}});
    arguments.dx = make_map(call.dx, Dimensions{{shape.inputs, 0, kStoreColumns},
                                                {1, input_bytes, 1},
                                                strided_rows(shape.rows, shape.inputs, call.dx_stride, kWarpRows)});
    arguments.dropout_row = pointer(shape.mask.dropout_row);
    arguments.step_pointer = pointer(shape.mask.step_pointer);
    arguments.key = make_key(shape.mask);
    arguments.rows = static_cast<int>(shape.rows);
    arguments.slices = static_cast<int>(ceil_divide(shape.outputs, kDepth));
    arguments.low_slices = static_cast<int>(ceil_divide(ranks, kDepth));
    arguments.low_steps = static_cast<int>(ceil_divide(ranks, kStep));
    arguments.schedule = plan_schedule(shape.rows, shape.inputs, 1, cut.columns, cut.cluster, cut.multiprocessors);
    return arguments;
}

}  // namespace mtbert::cuda::sm90
