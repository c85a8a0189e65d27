// The entry points of the LoRA products: arguments checked, kernel chosen, kernel called.
#include "cuda/lora/lora.h"

#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/lora/plan.h"
#include "cuda/lora/regions.h"
#include "cuda/lora/sm90_limits.h"
#include "cuda/runtime.h"

namespace mtbert::cuda {
namespace {

constexpr std::int64_t kWord = std::numeric_limits<std::uint32_t>::max();
// A row's number and the rows of a few tiles beyond it fit 32 bits.
constexpr std::int64_t kMostRows = (std::int64_t{1} << 31) - (std::int64_t{1} << 16);
// Products of a row's number, a stride and an element's size stay below 2^62.
constexpr std::int64_t kMostColumns = std::int64_t{1} << 24;
constexpr std::int64_t kMostStride = std::int64_t{1} << 28;
constexpr std::int64_t kMostGroups = 65535;
constexpr std::size_t kVector = 16;

std::int64_t element_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

const char* dtype_name(DType dtype) {
    return dtype == DType::kFloat32 ? "float32" : dtype == DType::kFloat16 ? "float16" : "bfloat16";
}

// What the kernels multiply by. A threshold out of its range is refused elsewhere.
float kept_scale(const LoraShape& shape) {
    const std::int64_t threshold = shape.mask.threshold;
    const bool dropout = 0 < threshold && threshold < 65536;
    return static_cast<float>(shape.scale * (dropout ? 65536.0 / static_cast<double>(65536 - threshold) : 1.0));
}

bool is_sm90(LoraKernel kernel) { return kernel == LoraKernel::kSM90 || kernel == LoraKernel::kSM90Split; }
bool is_split(LoraKernel kernel) { return kernel == LoraKernel::kSM80Split || kernel == LoraKernel::kSM90Split; }

// The arguments of one call: every failed check names the operation, the argument, what it is and what it should be.
class Arguments {
   public:
    Arguments(const char* operation, const LoraShape& shape) : operation_(operation), shape_(shape) {
        range(shape.rows, 0, kMostRows, "rows");
        multiple(shape.inputs, kMostColumns, "inputs");
        multiple(shape.outputs, kMostColumns, "outputs");
        range(shape.blocks, 1, 3, "blocks");
        require(shape.outputs % (shape.blocks * 8) == 0,
                "outputs is " + std::to_string(shape.outputs) + ", expected equal parts, multiples of 8, for blocks " +
                    std::to_string(shape.blocks));
        require(shape.rank == 8 || shape.rank == 16 || shape.rank == 32 || shape.rank == 64,
                "rank is " + std::to_string(shape.rank) + ", expected 8, 16, 32 or 64");
        require(std::isfinite(kept_scale(shape)), "scale is " + std::to_string(shape.scale) +
                                                      ", expected a finite number, with that of dropout in float32 too");
    }

    void device() const { range(shape_.device, 0, std::numeric_limits<int>::max(), "device"); }

    void require(bool condition, const std::string& message) const {
        if (!condition) {
            throw std::invalid_argument(std::string(operation_) + ": " + message);
        }
    }

    void range(std::int64_t value, std::int64_t low, std::int64_t high, const char* name) const {
        require(low <= value && value <= high, std::string(name) + " is " + std::to_string(value) + ", expected " +
                                                   std::to_string(low) + " to " + std::to_string(high));
    }

    void mask() {
        const LoraMask& mask = shape_.mask;
        range(mask.threshold, 0, 65535, "threshold");
        if (mask.threshold == 0) {
            return;
        }
        range(mask.site, 0, kWord, "site");
        input(vector("dropout_row", mask.dropout_row, shape_.rows, sizeof(std::int32_t)));
        if (mask.step_pointer != 0) {
            input(vector("step_pointer", mask.step_pointer, 1, sizeof(std::int64_t)));
        } else {
            range(mask.step, 0, kWord, "step");
        }
    }

    void ranks() const {
        for (int block = 0; block < shape_.blocks; ++block) {
            const std::int64_t rank = shape_.ranks[block];
            require(0 <= rank && rank <= shape_.rank,
                    "ranks[" + std::to_string(block) + "] is " + std::to_string(rank) + ", expected 0 to rank " +
                        std::to_string(shape_.rank));
        }
    }

    void groups(std::int64_t count, std::uintptr_t bounds) {
        range(count, 1, kMostGroups, "groups");
        if (bounds != 0) {
            input(vector("bounds", bounds, count + 1, sizeof(std::int32_t)));
        } else {
            require(count == 1, "bounds is a null pointer, expected one for groups " + std::to_string(count));
        }
    }

    // Rows of `columns` elements of the shape's dtype, `stride` elements apart.
    Region matrix(const char* name, std::uintptr_t pointer, std::int64_t rows, std::int64_t columns,
                  std::int64_t stride, const char* stride_name) const {
        const std::int64_t size = element_size(shape_.dtype);
        range(stride, columns, kMostStride, stride_name);
        require(stride * size % static_cast<std::int64_t>(kVector) == 0,
                std::string(stride_name) + " is " + std::to_string(stride) + ", expected a multiple of " +
                    std::to_string(static_cast<std::int64_t>(kVector) / size) + " for " + dtype_name(shape_.dtype));
        return {name, pointer, rows, columns * size, stride * size, kVector};
    }

    Region matrix(const char* name, std::uintptr_t pointer, std::int64_t rows, std::int64_t columns) const {
        const std::int64_t bytes = columns * element_size(shape_.dtype);
        return {name, pointer, rows, bytes, bytes, kVector};
    }

    static Region vector(const char* name, std::uintptr_t pointer, std::int64_t count, std::size_t size) {
        const auto bytes = static_cast<std::int64_t>(size);
        return {name, pointer, count, bytes, bytes, size};
    }

    // Adjacent bytes whose number need not be a multiple of anything: float32 results, a workspace.
    static Region block(const char* name, std::uintptr_t pointer, std::int64_t bytes) {
        return {name, pointer, 1, bytes, bytes, kVector};
    }

    void input(const Region& region) { add(region, inputs_); }
    void output(const Region& region) { add(region, outputs_); }

    // No output shares a byte with anything else. Needs no GPU.
    void check_overlap() const {
        for (std::size_t i = 0; i < outputs_.size(); ++i) {
            for (const Region& other : inputs_) {
                check_apart(outputs_[i], other);
            }
            for (std::size_t j = i + 1; j < outputs_.size(); ++j) {
                check_apart(outputs_[i], outputs_[j]);
            }
        }
    }

    // The device can reach all of them. Needs it to be current.
    void check_memory() const {
        for (const auto* regions : {&inputs_, &outputs_}) {
            for (const Region& region : *regions) {
                check_pointer(region.begin, region.alignment, shape_.device, region.name, operation_);
            }
        }
    }

    // That a kernel asked for by name is there and can serve. Needs no GPU. refusal: that of the sm_90a kernels.
    void check_kernel(LoraKernel asked, const std::string& refusal) const {
        if (is_sm90(asked)) {
            require(sm90::built(), "kernel is sm90, but the extension was built without sm_90a");
            require(refusal.empty(), refusal + " with kernel sm90");
        }
    }

    // The kernel for a call: the one asked for, if the device has it, or the planned one.
    LoraKernel kernel(LoraKernel asked, LoraKernel LoraPlan::*part, const std::string& refusal) const {
        const int architecture = compute_capability(shape_.device, operation_);
        const std::string capability = "device " + std::to_string(shape_.device) + " has compute capability " +
                                       std::to_string(architecture / 10) + "." + std::to_string(architecture % 10);
        require(architecture >= 80, capability + ", expected 8.0 or higher");
        if (asked == LoraKernel::kAuto) {
            return lora_plan({architecture, sm90::built() && refusal.empty()}, shape_).*part;
        }
        require(!is_sm90(asked) || architecture == 90, "kernel is sm90, but " + capability);
        return asked;
    }

   private:
    void multiple(std::int64_t value, std::int64_t most, const char* name) const {
        range(value, 8, most, name);
        require(value % 8 == 0, std::string(name) + " is " + std::to_string(value) + ", expected a multiple of 8");
    }

    void add(const Region& region, std::vector<Region>& regions) {
        if (region.empty()) {
            return;
        }
        require(region.begin != 0, std::string(region.name) + " is a null pointer");
        require(region.begin % region.alignment == 0,
                std::string(region.name) + " is not aligned to " + std::to_string(region.alignment) + " bytes");
        regions.push_back(region);
    }

    void check_apart(const Region& output, const Region& other) const {
        require(!overlap(output, other), std::string(output.name) + " overlaps " + other.name);
    }

    const char* operation_;
    const LoraShape& shape_;
    std::vector<Region> inputs_;
    std::vector<Region> outputs_;
};

void check_groups(std::int64_t groups, const char* operation, const LoraShape& shape) {
    Arguments(operation, shape).range(groups, 1, kMostGroups, "groups");
}

}  // namespace

void lora_forward(const LoraForward& given) {
    constexpr const char* kOperation = "lora_forward";
    const LoraShape& shape = given.shape;
    const std::int64_t low = shape.blocks * shape.rank;
    Arguments arguments(kOperation, shape);
    arguments.device();
    arguments.ranks();
    arguments.mask();
    const std::string refusal = sm90::forward_refusal(shape);
    arguments.check_kernel(given.kernel, refusal);
    const Region x = arguments.matrix("x", given.x, shape.rows, shape.inputs, given.x_stride, "x_stride");
    const Region out = arguments.matrix("out", given.out, shape.rows, shape.outputs, given.out_stride, "out_stride");
    arguments.input(x);
    arguments.input(arguments.matrix("weight", given.weight, shape.outputs, shape.inputs));
    arguments.input(arguments.matrix("a", given.a, low, shape.inputs));
    arguments.input(arguments.matrix("b", given.b, shape.outputs, shape.rank));
    if (given.bias != 0) {
        arguments.input(Arguments::vector("bias", given.bias, shape.outputs,
                                          static_cast<std::size_t>(element_size(shape.dtype))));
    }
    arguments.output(out);
    arguments.output(arguments.matrix("s", given.s, shape.rows, low));
    arguments.check_overlap();
    const DeviceGuard guard(shape.device, kOperation);
    arguments.check_memory();
    LoraForward call = given;
    call.kernel = arguments.kernel(given.kernel, &LoraPlan::forward, refusal);
    if (shape.rows == 0) {
        return;
    }
    const bool split = is_split(call.kernel);
    if (split) {
        sm80::thin(call);
    }
    is_sm90(call.kernel) ? sm90::forward(call, split) : sm80::forward(call, split);
}

void lora_low(const LoraLow& given) {
    constexpr const char* kOperation = "lora_low";
    const LoraShape& shape = given.shape;
    const std::int64_t low = shape.blocks * shape.rank;
    Arguments arguments(kOperation, shape);
    arguments.device();
    arguments.ranks();
    arguments.groups(given.groups, given.bounds);
    const std::int64_t grad_b_bytes = given.groups * shape.outputs * shape.rank * 4;
    arguments.input(arguments.matrix("grad", given.grad, shape.rows, shape.outputs, given.grad_stride, "grad_stride"));
    arguments.input(arguments.matrix("b", given.b, shape.outputs, shape.rank));
    arguments.output(arguments.matrix("ds", given.ds, shape.rows, low));
    if (given.grad_b != 0) {
        arguments.input(arguments.matrix("s", given.s, shape.rows, low));
        arguments.output(Arguments::block("grad_b", given.grad_b, grad_b_bytes));
    }
    if (shape.rows > 0) {
        arguments.output(
            Arguments::block("workspace", given.workspace, sm80::low_workspace(shape, given.groups)));
    }
    arguments.check_overlap();
    const DeviceGuard guard(shape.device, kOperation);
    arguments.check_memory();
    if (shape.rows > 0) {
        return sm80::low(given);
    }
    if (given.grad_b != 0) {
        zero(given.grad_b, static_cast<std::size_t>(grad_b_bytes), shape.stream, kOperation);
    }
}

std::int64_t lora_low_workspace(const LoraShape& shape, std::int64_t groups) {
    check_groups(groups, "lora_low_workspace", shape);
    return shape.rows == 0 ? 0 : sm80::low_workspace(shape, groups);
}

void lora_input(const LoraInput& given) {
    constexpr const char* kOperation = "lora_input";
    const LoraShape& shape = given.shape;
    const std::int64_t low = shape.blocks * shape.rank;
    Arguments arguments(kOperation, shape);
    arguments.device();
    arguments.mask();
    arguments.require(!is_split(given.kernel), "kernel is one of two steps, expected auto, sm80 or sm90");
    const std::string refusal = sm90::input_refusal(shape);
    arguments.check_kernel(given.kernel, refusal);
    arguments.input(arguments.matrix("grad", given.grad, shape.rows, shape.outputs, given.grad_stride, "grad_stride"));
    arguments.input(arguments.matrix("weight", given.weight, shape.outputs, shape.inputs));
    arguments.input(arguments.matrix("a", given.a, low, shape.inputs));
    arguments.input(arguments.matrix("ds", given.ds, shape.rows, low));
    arguments.output(arguments.matrix("dx", given.dx, shape.rows, shape.inputs, given.dx_stride, "dx_stride"));
    arguments.check_overlap();
    const DeviceGuard guard(shape.device, kOperation);
    arguments.check_memory();
    LoraInput call = given;
    call.kernel = arguments.kernel(given.kernel, &LoraPlan::input, refusal);
    if (shape.rows == 0) {
        return;
    }
    is_sm90(call.kernel) ? sm90::input(call) : sm80::input(call);
}

void lora_grad_a(const LoraGradA& given) {
    constexpr const char* kOperation = "lora_grad_a";
    const LoraShape& shape = given.shape;
    const std::int64_t low = shape.blocks * shape.rank;
    Arguments arguments(kOperation, shape);
    arguments.device();
    arguments.mask();
    arguments.groups(given.groups, given.bounds);
    const std::int64_t grad_a_bytes = given.groups * low * shape.inputs * 4;
    arguments.input(arguments.matrix("x", given.x, shape.rows, shape.inputs, given.x_stride, "x_stride"));
    arguments.input(arguments.matrix("ds", given.ds, shape.rows, low));
    arguments.output(Arguments::block("grad_a", given.grad_a, grad_a_bytes));
    if (shape.rows > 0) {
        arguments.output(
            Arguments::block("workspace", given.workspace, sm80::grad_a_workspace(shape, given.groups)));
    }
    arguments.check_overlap();
    const DeviceGuard guard(shape.device, kOperation);
    arguments.check_memory();
    if (shape.rows > 0) {
        return sm80::grad_a(given);
    }
    zero(given.grad_a, static_cast<std::size_t>(grad_a_bytes), shape.stream, kOperation);
}

std::int64_t lora_grad_a_workspace(const LoraShape& shape, std::int64_t groups) {
    check_groups(groups, "lora_grad_a_workspace", shape);
    return shape.rows == 0 ? 0 : sm80::grad_a_workspace(shape, groups);
}

}  // namespace mtbert::cuda
