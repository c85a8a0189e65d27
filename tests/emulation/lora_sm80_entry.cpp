// Entry points for test_lora_sm80.py: the sm_80 kernels of the LoRA products, launched as csrc/cuda/lora/sm80.cu
// launches them, on the emulated machine. Buffers are exactly as large as the arguments say, and matrix loads free
// of bank conflicts. Compiled with MTBERT_BFLOAT16_ONLY it holds the kernels of that type alone, which is enough
// to plant faults in; with MTBERT_EVERY_VARIANT all that a GPU gets.
#include <dlfcn.h>

#include <cstring>
#include <set>
#include <stdexcept>
#include <string>
#include <type_traits>

// Which of the faults that a test has planted in copies of the kernels is in force; 0: none. Sources do not know
// it.
int planted_fault = 0;

#include "cuda/lora/sm80_run.h"
#include "machine_host.h"

namespace {

using namespace mtbert;
using cuda::DType;

// The names of the kernels that were launched, as a compiler for the GPU mangles them too.
std::set<std::string> launched;

#ifdef MTBERT_EVERY_VARIANT
template <typename T>
using Made = cuda::sm80::Variants<T>;
#else
template <typename T>
struct Made : cuda::sm80::Cuts {
    template <int... kValues>
    using Choices = cuda::sm80::Choices<kValues...>;
    static constexpr bool kBF16 = std::is_same_v<T, machine::BF16>;
    using Wide = std::conditional_t<kBF16, Choices<16>, Choices<>>;
    using Small = std::conditional_t<kBF16, Choices<8, 16, 64>,
                                     std::conditional_t<cuda::sm80::kIsFloat<T>, Choices<16, 64>, Choices<32>>>;
    using Rank = Small;
    using Low = std::conditional_t<kBF16, Choices<16, 64, 192>, Choices<64>>;
};
#endif

// Wide tiles and long runs of rows for less than on a GPU.
template <typename T>
struct Sizes : Made<T> {
    static constexpr cuda::LoraCard kCard{4, 200};
    static constexpr std::int64_t kLowBlocks = 2, kGradABlocks = 4;
};

// What a call is about: int64 fields in the order of the tests' own structure.
struct Call {
    std::int64_t order;
    std::int64_t dtype;  // 0 bfloat16, 1 float16, 2 float32
    std::int64_t rows;
    std::int64_t inputs;
    std::int64_t outputs;
    std::int64_t blocks;
    std::int64_t rank;
    std::int64_t wide_stride;  // of x and dx
    std::int64_t out_stride;   // of y and dy
    std::int64_t groups;
    std::int64_t threshold;
    std::int64_t seed;
    std::int64_t step;
    std::int64_t site;
    std::int64_t ranks[3];
};

std::int64_t strided(std::int64_t rows, std::int64_t columns, std::int64_t stride) {
    return rows == 0 ? 0 : (rows - 1) * stride + columns;
}

template <typename P>
std::uintptr_t address(P pointer) {
    return reinterpret_cast<std::uintptr_t>(pointer);
}

class Machine {
   public:
    Machine(const Call& call) : emulator(call.order), call_(call) {}

    cuda::LoraShape shape(double scale, const void* dropout_row, const void* step) {
        constexpr DType kTypes[] = {DType::kBFloat16, DType::kFloat16, DType::kFloat32};
        const cuda::LoraMask mask{address(emulator.read<std::int32_t>("dropout_row", dropout_row, call_.rows, 4)),
                                  static_cast<std::uint64_t>(call_.seed),
                                  call_.step,
                                  address(emulator.read<std::int64_t>("step", step, 1, 8)),
                                  call_.site,
                                  call_.threshold};
        const DType dtype = kTypes[call_.dtype];
        const std::int64_t* const r = call_.ranks;
        return {call_.rows, call_.inputs, call_.outputs, call_.blocks, call_.rank, {r[0], r[1], r[2]},
                dtype,      scale,        mask,          0,            0};
    }

    // A launch as run_... of sm80_run.h wants it.
    auto launcher() {
        return [this](auto kernel, const cuda::sm80::LaunchPlan& plan, const auto& parameter) {
            if (plan.blocks == 0) {
                return;
            }
            Dl_info symbol{};
            if (dladdr(reinterpret_cast<const void*>(kernel), &symbol) != 0 && symbol.dli_sname != nullptr) {
                launched.insert(symbol.dli_sname);
            }
            emulator.launch(machine::Grid{static_cast<int>(plan.blocks), 1, 1}, plan.threads, plan.shared_bytes,
                            [&] { kernel(parameter); });
        };
    }

    void finish() {
        emulator.finish();
        const std::int64_t conflicts = emulator.counters().matrix_load_conflicts;
        if (conflicts != 0) {
            throw std::runtime_error("bank conflicts of matrix loads: " + std::to_string(conflicts));
        }
    }

    machine::Emulator emulator;

   private:
    const Call& call_;
};

// Calls body with a value of the element type.
template <typename Body>
void dispatch(const Call& call, const Body& body) {
#ifndef MTBERT_BFLOAT16_ONLY
    if (call.dtype == 1) {
        return body(machine::FP16{});
    }
    if (call.dtype == 2) {
        return body(float{});
    }
#endif
    if (call.dtype != 0) {
        throw std::runtime_error("no kernels of this type are here");
    }
    body(machine::BF16{});
}

}  // namespace

extern "C" const char* plant(std::int64_t fault) {
    planted_fault = static_cast<int>(fault);
    return nullptr;
}

// The kernels that were launched since the last question, a line each, and a zero byte.
extern "C" const char* take_launched(char* text, std::int64_t bytes) {
    return machine::guarded([&] {
        std::string names;
        for (const std::string& name : launched) {
            names += name + "\n";
        }
        if (static_cast<std::int64_t>(names.size()) >= bytes) {
            throw std::runtime_error("too many names");
        }
        std::memcpy(text, names.c_str(), names.size() + 1);
        launched.clear();
    });
}

// mode: 0 fused, 1 s is given, 2 s alone.
extern "C" const char* lora_forward(const Call* call, std::int64_t mode, double scale, const void* x,
                                    const void* weight, const void* bias, const void* a, const void* b, void* out,
                                    void* s, const void* dropout_row, const void* step) {
    return machine::guarded([&] {
        dispatch(*call, [&](auto element) {
            using T = decltype(element);
            Machine m(*call);
            const std::int64_t low = call->blocks * call->rank;
            cuda::LoraForward f{};
            f.shape = m.shape(scale, dropout_row, step);
            f.x = address(m.emulator.read<T>("x", x, strided(call->rows, call->inputs, call->wide_stride)));
            f.weight = address(m.emulator.read<T>("weight", weight, call->outputs * call->inputs));
            f.bias = address(m.emulator.read<T>("bias", bias, call->outputs, sizeof(T)));
            f.a = address(m.emulator.read<T>("a", a, low * call->inputs));
            f.b = address(m.emulator.read<T>("b", b, call->outputs * call->rank));
            f.out = address(m.emulator.write<T>("out", out, strided(call->rows, call->outputs, call->out_stride)));
            f.s = mode == 1 ? address(m.emulator.read<T>("s", s, call->rows * low))
                            : address(m.emulator.write<T>("s", s, call->rows * low));
            f.x_stride = call->wide_stride;
            f.out_stride = call->out_stride;
            if (mode == 2) {
                cuda::sm80::run_thin<T, Sizes<T>>(f, m.launcher());
            } else {
                cuda::sm80::run_forward<T, Sizes<T>>(f, mode == 1, m.launcher());
            }
            m.finish();
        });
    });
}

extern "C" const char* lora_input(const Call* call, const void* grad, const void* weight, const void* a,
                                  const void* ds, void* dx, const void* dropout_row, const void* step) {
    return machine::guarded([&] {
        dispatch(*call, [&](auto element) {
            using T = decltype(element);
            Machine m(*call);
            const std::int64_t low = call->blocks * call->rank;
            cuda::LoraInput f{};
            f.shape = m.shape(1.0, dropout_row, step);
            f.grad = address(m.emulator.read<T>("grad", grad, strided(call->rows, call->outputs, call->out_stride)));
            f.weight = address(m.emulator.read<T>("weight", weight, call->outputs * call->inputs));
            f.a = address(m.emulator.read<T>("a", a, low * call->inputs));
            f.ds = address(m.emulator.read<T>("ds", ds, call->rows * low));
            f.dx = address(m.emulator.write<T>("dx", dx, strided(call->rows, call->inputs, call->wide_stride)));
            f.grad_stride = call->out_stride;
            f.dx_stride = call->wide_stride;
            cuda::sm80::run_input<T, Sizes<T>>(f, m.launcher());
            m.finish();
        });
    });
}

extern "C" const char* lora_low(const Call* call, double scale, const void* grad, const void* b, const void* s,
                                void* ds, void* grad_b, const void* bounds) {
    return machine::guarded([&] {
        dispatch(*call, [&](auto element) {
            using T = decltype(element);
            Machine m(*call);
            const std::int64_t low = call->blocks * call->rank;
            cuda::LoraLow f{};
            f.shape = m.shape(scale, nullptr, nullptr);
            f.shape.mask = {};
            f.grad = address(m.emulator.read<T>("grad", grad, strided(call->rows, call->outputs, call->out_stride)));
            f.b = address(m.emulator.read<T>("b", b, call->outputs * call->rank));
            f.s = address(m.emulator.read<T>("s", s, call->rows * low));
            f.ds = address(m.emulator.write<T>("ds", ds, call->rows * low));
            f.grad_b = address(m.emulator.write<float>("grad_b", grad_b, call->groups * call->outputs * call->rank));
            f.bounds = address(m.emulator.read<std::int32_t>("bounds", bounds, call->groups + 1, 4));
            f.groups = call->groups;
            const cuda::sm80::LowPlan plan = cuda::sm80::plan_low<Sizes<T>>(f.shape, f.groups);
            f.workspace = address(m.emulator.scratch<float>("workspace", plan.part_b + plan.part_ds));
            f.grad_stride = call->out_stride;
            cuda::sm80::run_low<T, Sizes<T>>(f, m.launcher());
            m.finish();
        });
    });
}

// How a GPU cuts the work on ds and dB of `count` shapes, results: pieces of rows and runs of columns; shapes: rows,
// outputs, blocks, rank and bytes of an element of each.
extern "C" const char* lora_low_cuts(const std::int64_t* shapes, std::int64_t count, std::int64_t* results) {
    for (std::int64_t i = 0; i < count; ++i, shapes += 5, results += 2) {
        cuda::LoraShape shape{};
        shape.rows = shapes[0];
        shape.outputs = shapes[1];
        shape.blocks = shapes[2];
        shape.rank = shapes[3];
        shape.dtype = shapes[4] == 4 ? DType::kFloat32 : DType::kBFloat16;
        const cuda::sm80::LowPlan plan = cuda::sm80::plan_low(shape, 1);
        results[0] = plan.pieces;
        results[1] = plan.splits;
    }
    return nullptr;
}

extern "C" const char* lora_grad_a(const Call* call, const void* x, const void* ds, void* grad_a, const void* bounds,
                                   const void* dropout_row, const void* step) {
    return machine::guarded([&] {
        dispatch(*call, [&](auto element) {
            using T = decltype(element);
            Machine m(*call);
            const std::int64_t low = call->blocks * call->rank;
            cuda::LoraGradA f{};
            f.shape = m.shape(1.0, dropout_row, step);
            f.x = address(m.emulator.read<T>("x", x, strided(call->rows, call->inputs, call->wide_stride)));
            f.ds = address(m.emulator.read<T>("ds", ds, call->rows * low));
            f.grad_a = address(m.emulator.write<float>("grad_a", grad_a, call->groups * low * call->inputs));
            f.bounds = address(m.emulator.read<std::int32_t>("bounds", bounds, call->groups + 1, 4));
            f.groups = call->groups;
            const cuda::sm80::GradAPlan plan = cuda::sm80::plan_grad_a<Sizes<T>>(f.shape, f.groups);
            f.workspace = address(m.emulator.scratch<float>("workspace", plan.part));
            f.x_stride = call->wide_stride;
            cuda::sm80::run_grad_a<T, Sizes<T>>(f, m.launcher());
            m.finish();
        });
    });
}
