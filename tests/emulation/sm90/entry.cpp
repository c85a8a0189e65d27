// What the tests of the sm_90a kernels call: the kernels on the emulated machine, with the arguments that the
// launchers make, and the functions of sm90_layout.h one by one. Every function that can fail returns null or the
// error's text.
#include <stdexcept>
#include <string>

#include "cuda/lora/sm90_arguments.h"
#include "cuda/lora/sm90_limits.h"
#include "machine_host.h"

using namespace mtbert;
using namespace mtbert::cuda;
using namespace mtbert::cuda::sm90;
using machine::Emulator;
using machine::TensorMap;

namespace {

TensorMap make_map(std::uintptr_t matrix, Dimensions dimensions) {
    TensorMap map;
    map.matrix = reinterpret_cast<char*>(matrix);
    if (matrix % 16 != 0) {
        throw std::invalid_argument("TMA: the matrix is not aligned to 16 bytes");
    }
    for (const Dimension& dimension : dimensions) {
        map.size[map.rank] = dimension.size;
        map.box[map.rank] = dimension.box;
        if (dimension.size < 1 || dimension.box < 1 || dimension.box > 256) {
            throw std::invalid_argument("TMA: a size or a box that cannot be");
        }
        if (map.rank > 0) {
            map.stride[map.rank] = dimension.stride_bytes;
            if (dimension.stride_bytes % 16 != 0 || dimension.stride_bytes <= 0 ||
                dimension.stride_bytes >= std::int64_t{1} << 40) {
                throw std::invalid_argument("TMA: a stride that cannot be");
            }
        }
        ++map.rank;
    }
    return map;
}

template <typename Body>
const char* guarded(const Body& body) {
    static std::string text;
    try {
        body();
    } catch (const std::exception& error) {
        text = error.what();
        return text.c_str();
    }
    return nullptr;
}

// Calls f(integral constant) for the one of the constants that is equal to value.
template <int... kValues, typename F>
void choose(int value, const F& f) {
    const bool found = (... || (value == kValues && (f(std::integral_constant<int, kValues>{}), true)));
    if (!found) {
        throw std::invalid_argument("no such variant");
    }
}

#ifdef MTBERT_FEW_VARIANTS
#define MTBERT_COLUMNS 128
#define MTBERT_RANKS 16
template <typename F>
void choose_type(DType, const F& f) {
    f(machine::BF16{});
}
#else
#define MTBERT_COLUMNS 128, 192, 256
#define MTBERT_RANKS 16, 32, 64
template <typename F>
void choose_type(DType dtype, const F& f) {
    dtype == DType::kFloat16 ? f(machine::FP16{}) : f(machine::BF16{});
}
#endif

// How the emulator works (its constructor says what of it means what), and how the product is cut up.
struct Way {
    std::int64_t order;
    std::int64_t late;
    std::int64_t columns;
    std::int64_t cluster;
    std::int64_t multiprocessors;

    Cut cut() const {
        return Cut{static_cast<int>(columns), static_cast<int>(cluster), static_cast<int>(multiprocessors)};
    }
};

std::int64_t spread(std::int64_t rows, std::int64_t columns, std::int64_t stride) {
    return kElementBytes * (rows == 0 ? 0 : (rows - 1) * stride + columns);
}

void add_mask(Emulator& emulator, const LoraShape& shape) {
    if (shape.mask.threshold != 0) {
        emulator.memory("dropout_row", pointer(shape.mask.dropout_row), 4 * shape.rows, Emulator::kRead);
        if (shape.mask.step_pointer != 0) {
            emulator.memory("step", pointer(shape.mask.step_pointer), 8, Emulator::kRead);
        }
    }
}

}  // namespace

extern "C" {

const char* emulate_forward(const LoraForward* call, int s_given, const Way* way) {
    return guarded([&] {
        const LoraShape& shape = call->shape;
        if (const std::string refusal = forward_refusal(shape); !refusal.empty()) {
            throw std::invalid_argument(refusal);
        }
        const ForwardArguments arguments = make_arguments(*call, s_given != 0, way->cut(), make_map);
        Emulator emulator(way->order, way->late != 0);
        const auto input = [&](const char* name, std::uintptr_t matrix, std::int64_t rows, std::int64_t columns,
                               std::int64_t stride) {
            emulator.memory(name, pointer(matrix), spread(rows, columns, stride), Emulator::kRead);
        };
        input("x", call->x, shape.rows, shape.inputs, call->x_stride);
        input("weight", call->weight, shape.outputs, shape.inputs, shape.inputs);
        input("a", call->a, shape.blocks * shape.rank, shape.inputs, shape.inputs);
        input("b", call->b, shape.outputs, shape.rank, shape.rank);
        if (call->bias != 0) {
            input("bias", call->bias, 1, shape.outputs, shape.outputs);
        }
        const std::int64_t low = shape.blocks * shape.rank;
        emulator.memory("s", pointer(call->s), spread(shape.rows, low, low),
                        s_given != 0 ? Emulator::kRead : Emulator::kWrite);
        emulator.memory("out", pointer(call->out), spread(shape.rows, shape.outputs, call->out_stride),
                        Emulator::kWrite);
        add_mask(emulator, shape);
        choose_type(shape.dtype, [&](auto element) {
            choose<MTBERT_COLUMNS>(static_cast<int>(way->columns), [&](auto columns) {
                choose<MTBERT_RANKS>(multiplied_rank(shape.rank), [&](auto rank) {
                    constexpr int kColumns = columns, kRank = rank;
                    emulator.launch(arguments.schedule.clusters(), arguments.schedule.cluster, kThreads,
                                    StaticMemory<kColumns, kRank>::kTotal,
                                    [&] { forward_kernel<decltype(element), kColumns, kRank>(arguments); });
                });
            });
        });
    });
}

const char* emulate_input(const LoraInput* call, const Way* way) {
    return guarded([&] {
        const LoraShape& shape = call->shape;
        const InputArguments arguments = make_arguments(*call, way->cut(), make_map);
        Emulator emulator(way->order, way->late != 0);
        const std::int64_t low = shape.blocks * shape.rank;
        emulator.memory("grad", pointer(call->grad), spread(shape.rows, shape.outputs, call->grad_stride),
                        Emulator::kRead);
        emulator.memory("weight", pointer(call->weight), spread(shape.outputs, shape.inputs, shape.inputs),
                        Emulator::kRead);
        emulator.memory("a", pointer(call->a), spread(low, shape.inputs, shape.inputs), Emulator::kRead);
        emulator.memory("ds", pointer(call->ds), spread(shape.rows, low, low), Emulator::kRead);
        emulator.memory("dx", pointer(call->dx), spread(shape.rows, shape.inputs, call->dx_stride), Emulator::kWrite);
        add_mask(emulator, shape);
        choose_type(shape.dtype, [&](auto element) {
            choose<MTBERT_COLUMNS>(static_cast<int>(way->columns), [&](auto columns) {
                constexpr int kColumns = columns;
                emulator.launch(arguments.schedule.clusters(), arguments.schedule.cluster, kThreads,
                                StaticMemory<kColumns, 0>::kTotal,
                                [&] { input_kernel<decltype(element), kColumns>(arguments); });
            });
        });
    });
}

// ---- sm90_layout.h. ----

int layout_tile_offset(int row, int chunk) { return tile_offset(row, chunk); }
std::uint64_t layout_descriptor_rows(std::uint32_t address) { return descriptor_rows(address); }
std::uint64_t layout_descriptor_columns(std::uint32_t address) { return descriptor_columns(address); }
std::uint64_t layout_rows_step() { return kRowsStep; }
std::uint64_t layout_columns_step() { return kColumnsStep; }
int layout_accumulator(int lane, int i, int column) {
    return column != 0 ? accumulator_column(lane, i) : accumulator_row(lane, i);
}
int layout_operand(int lane, int i, int column) { return column != 0 ? operand_column(lane, i) : operand_row(lane, i); }
int layout_matrix(int lane, int chunk) { return chunk != 0 ? matrix_chunk(lane) : matrix_row(lane); }
int layout_draw(int lane, int group) { return group != 0 ? draw_group(lane) : draw_row(lane); }
int layout_pair_shift(int pairs, int pair) { return pair_shift(pairs, pair); }
int layout_pair_accumulator(int pair, int i, int e) { return pair_accumulator(pair, i, e); }

// stages, stores, stage_bytes, second, third, stores' start, barriers, total
void layout_memory(int columns, int third_rows, int* out) {
    const Memory memory = plan_memory(columns, third_rows);
    const int values[] = {memory.stages,  memory.stores,      memory.stage_bytes(), memory.second(),
                          memory.third(), memory.store(0, 0), memory.barriers(),    memory.total()};
    for (int value : values) {
        *out++ = value;
    }
}
void layout_places(int columns, int third_rows, int index, int* out) {
    const Memory memory = plan_memory(columns, third_rows);
    *out++ = memory.full(index);
    *out++ = memory.empty(index);
}
int layout_expected(int columns, int third_rows, int kind) {
    const Memory memory = plan_memory(columns, third_rows);
    return kind == 2 ? second_item_bytes(memory) : product_bytes(memory, kind == 1);
}
int layout_empty_arrivals(int cluster) { return empty_arrivals(cluster); }
void layout_registers(int* out) {
    *out++ = kStartRegisters;
    *out++ = kProducerRegisters;
    *out++ = kConsumerRegisters;
}

// The stage and the phase of item number `item` of a ring.
void layout_ring(int stages, int item, int* out) {
    Ring ring;
    for (int i = 0; i < item; ++i) {
        ring.advance(stages);
    }
    out[0] = ring.stage;
    out[1] = static_cast<int>(ring.phase);
}

// clusters, tiles, share
void layout_schedule(std::int64_t rows, std::int64_t block_columns, int blocks, int columns, int cluster,
                     int multiprocessors, int* out) {
    const Schedule schedule = plan_schedule(rows, block_columns, blocks, columns, cluster, multiprocessors);
    *out++ = schedule.clusters();
    *out++ = schedule.tiles;
    *out++ = schedule.share;
}
// The tile number `index` of a cluster's block: row, block of outputs, column, first; 0 where the cluster has no more.
int layout_tile(std::int64_t rows, std::int64_t block_columns, int blocks, int columns, int cluster,
                int multiprocessors, int cluster_index, int index, int rank, int* out) {
    const Schedule schedule = plan_schedule(rows, block_columns, blocks, columns, cluster, multiprocessors);
    const int place = schedule.begin(cluster_index) + index;
    if (place >= schedule.end(cluster_index)) {
        return 0;
    }
    const Tile tile = schedule.tile(place, rank);
    *out++ = tile.row;
    *out++ = tile.block;
    *out++ = tile.column;
    *out++ = tile.first ? 1 : 0;
    return 1;
}
int layout_choose_cluster(std::int64_t rows) { return choose_cluster(rows); }
int layout_choose_columns(std::int64_t rows, std::int64_t block_columns, int blocks) {
    return choose_columns(rows, block_columns, blocks);
}
}
