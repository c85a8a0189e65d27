#include "machine_host.h"

#include <algorithm>
#include <cstring>
#include <mutex>
#include <vector>

#include "fibre.h"
#include "global_memory.h"
#include "shadow.h"

namespace mtbert::machine {

namespace host {

Place place;

namespace {

constexpr int kMostThreads = 1024;
constexpr int kMostWarps = kMostThreads / kWarpLanes;
// Not 0, so that an offset taken for an address is out of bounds, and a multiple of 128 only, as the kernels may
// assume.
constexpr std::uint32_t kSharedBase = 1024 + 128;
constexpr int kCopyBytes = 16;  // of a copy_async16

const char* name_of(const Operation& operation) {
    switch (operation.kind) {
        case Kind::kNone:
            return "nothing";
        case Kind::kBlockBarrier:
            return "block_barrier";
        case Kind::kWarpBarrier:
            return "warp_barrier";
        case Kind::kMatrices:
            return operation.argument == 4 ? "load_matrix_x4" : "load_matrix_x2";
        case Kind::kMatricesTransposed:
            return operation.argument == 4 ? "load_matrix_x4_transposed" : "load_matrix_x2_transposed";
        case Kind::kBF16:
            return "multiply_add_16816<BF16>";
        case Kind::kFP16:
            return "multiply_add_16816<FP16>";
        case Kind::kTF32:
            return "multiply_add_1688_tf32";
        case Kind::kShuffle:
            return "shuffle";
    }
    return "?";
}

bool same_operation(const Operation& a, const Operation& b) {
    const bool matrices = a.kind == Kind::kMatrices || a.kind == Kind::kMatricesTransposed;
    return a.kind == b.kind && (!matrices || a.argument == b.argument);
}

struct Copy {
    std::size_t offset;  // in shared memory
    const void* source;
    int bytes;
    int group;
};

struct Fibre {
    Context context;
    std::unique_ptr<Stack> stack;
    bool done = false;
    Operation operation;       // that it waits at
    std::vector<Copy> copies;  // under way, in the order of their issue
    int groups = 0;            // committed
};

struct Warp {
    bool done = false;
    bool at_barrier = false;
    std::uint32_t epoch = 0;
};

// Which of several comes next.
class Dice {
   public:
    explicit Dice(std::uint64_t seed) : state_(seed) {}
    int below(int count) {  // splitmix64 (Steele, Lea, Flood 2014)
        std::uint64_t z = state_ += 0x9E3779B97F4A7C15u;
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
        z = (z ^ z >> 27) * 0x94D049BB133111EBu;
        return static_cast<int>((z ^ z >> 31) % static_cast<std::uint64_t>(count));
    }
    void shuffle(int* items, int count) {
        for (int i = count - 1; i > 0; --i) {
            std::swap(items[i], items[below(i + 1)]);
        }
    }

   private:
    std::uint64_t state_;
};

// One launch at a time in a process; the fibres find it here.
class Machine {
   public:
    void begin_launch(GlobalMemory* memory, Counters* counters, std::int64_t order, std::int64_t limit,
                      int threads, int shared_bytes, void (*body)(const void*), const void* context);
    void run_grid(Grid grid);

    // Called by the fibres.
    void meet(const Operation& operation);
    void read_shared(std::uint32_t address, void* value, int bytes);
    void write_shared(std::uint32_t address, const void* value, int bytes);
    void read_global(const void* source, void* value, int bytes);
    void write_global(void* target, const void* value, int bytes);
    void copy_async(std::uint32_t target, const void* source, int bytes);
    void commit();
    void wait(int pending);
    void live();

   private:
    Fibre& fibre(int thread) { return fibres_[static_cast<std::size_t>(thread)]; }
    Who who(int thread, bool whole_warp = false) const {
        return Who{thread, whole_warp, block_epoch_, warps_[thread / kWarpLanes].epoch};
    }
    void count_operation();
    void run_block();
    void run_warp(int warp);
    void agree(int warp);
    void perform(int warp);
    void load_matrices(int warp);
    template <typename Element>
    void multiply_16816(int warp);
    void multiply_1688(int warp);
    void shuffle(int warp);
    std::size_t shared_offset(int thread, const char* operation, std::uint32_t address, int bytes);
    Buffer& global(const void* address, int bytes, int alignment, const char* operation);
    void check_read(const void* source, int bytes, int alignment, const char* operation);
    // Fails unless there is no problem.
    void demand(const std::string& problem, const char* operation) { demand(problem, place.thread, operation); }
    void demand(const std::string& problem, int thread, const char* operation);
    [[noreturn]] void fail(int thread, const std::string& text);

    GlobalMemory* memory_ = nullptr;
    Counters* counters_ = nullptr;
    std::int64_t order_ = 0;
    std::int64_t limit_ = 0;
    std::int64_t operations_ = 0;
    int threads_ = 0;
    void (*body_)(const void*) = nullptr;
    const void* context_ = nullptr;

    std::vector<char> shared_;
    Shadow shared_shadow_{"shared memory", true};
    std::uint32_t clock_ = 1;
    Beginnings now_;
    std::uint32_t block_epoch_ = 0;
    Warp warps_[kMostWarps];
    std::vector<Fibre> fibres_;
    Context scheduler_;
    bool in_fibre_ = false;
    std::string error_;
    Dice dice_{0};
    int lanes_[kWarpLanes];
};

std::mutex launching;

Machine& machine() {
    static Machine instance;
    return instance;
}

void fibre_entry() {
    machine().live();
    __builtin_unreachable();
}

// An error stops everything: the fibre that meets it is left where it stands, as are the others, and what their
// frames own is lost (a few strings).
void Machine::fail(int thread, const std::string& text) {
    const Grid& block = place.block;
    const std::string message = "thread " + std::to_string(thread) + " (warp " + std::to_string(thread / kWarpLanes) +
                                ", lane " + std::to_string(thread % kWarpLanes) + ") of block (" +
                                std::to_string(block.x) + ", " + std::to_string(block.y) + ", " +
                                std::to_string(block.z) + "): " + text;
    if (!in_fibre_) {
        throw EmulationError(message);
    }
    error_ = message;
    switch_context(fibre(place.thread).context, scheduler_);
    __builtin_unreachable();
}

void Machine::demand(const std::string& problem, int thread, const char* operation) {
    if (!problem.empty()) {
        fail(thread, std::string(operation) + ": " + problem);
    }
}

void Machine::count_operation() {
    if (++operations_ > limit_) {
        fail(place.thread, "the block does not end: more than " + std::to_string(limit_) + " operations");
    }
}

void Machine::begin_launch(GlobalMemory* memory, Counters* counters, std::int64_t order, std::int64_t limit,
                           int threads, int shared_bytes, void (*body)(const void*), const void* context) {
    memory_ = memory;
    counters_ = counters;
    order_ = order;
    limit_ = limit;
    threads_ = threads;
    body_ = body;
    context_ = context;
    shared_.resize(static_cast<std::size_t>(shared_bytes));
    shared_shadow_.reset(shared_.size(), false);
    dice_ = Dice(static_cast<std::uint64_t>(order));
    for (int lane = 0; lane < kWarpLanes; ++lane) {
        lanes_[lane] = order == 1 ? kWarpLanes - 1 - lane : lane;
    }
    while (static_cast<int>(fibres_.size()) < threads) {
        fibres_.emplace_back();
        fibres_.back().stack = std::make_unique<Stack>();
    }
    now_.launch = ++clock_;
    in_fibre_ = false;
    error_.clear();
}

void Machine::run_grid(Grid grid) {
    const int blocks = grid.x * grid.y * grid.z;
    std::vector<int> turns(static_cast<std::size_t>(blocks));
    for (int i = 0; i < blocks; ++i) {
        turns[static_cast<std::size_t>(i)] = order_ == 1 ? blocks - 1 - i : i;
    }
    if (order_ > 1) {
        dice_.shuffle(turns.data(), blocks);
    }
    place.grid = grid;
    place.threads = threads_;
    for (const int block : turns) {
        place.block = Grid{block % grid.x, block / grid.x % grid.y, block / grid.x / grid.y};
        run_block();
        ++counters_->blocks;
    }
}

void Machine::run_block() {
    now_.block = block_epoch_ = ++clock_;
    operations_ = 0;
    std::fill(shared_.begin(), shared_.end(), static_cast<char>(0xFF));  // NaN
    const int warps = threads_ / kWarpLanes;
    for (int warp = 0; warp < warps; ++warp) {
        warps_[warp] = Warp{false, false, clock_};
    }
    for (int thread = 0; thread < threads_; ++thread) {
        Fibre& f = fibre(thread);
        f.done = false;
        f.operation = Operation{};
        f.copies.clear();
        f.groups = 0;
        f.stack->prepare(f.context, fibre_entry);
    }
    while (true) {
        int ready[kMostWarps];
        int count = 0;
        bool waiting = false;
        for (int warp = 0; warp < warps; ++warp) {
            if (warps_[warp].at_barrier) {
                waiting = true;
            } else if (!warps_[warp].done) {
                ready[count++] = warp;
            }
        }
        if (count > 0) {
            run_warp(ready[order_ == 0 ? 0 : order_ == 1 ? count - 1 : dice_.below(count)]);
        } else if (waiting) {
            block_epoch_ = ++clock_;
            for (int warp = 0; warp < warps; ++warp) {
                warps_[warp].at_barrier = false;
            }
            ++counters_->block_barriers;
        } else {
            return;
        }
    }
}

// Lets every lane of the warp go to its next operation, and performs that.
void Machine::run_warp(int warp) {
    if (order_ > 1) {
        dice_.shuffle(lanes_, kWarpLanes);
    }
    for (const int lane : lanes_) {
        const int thread = warp * kWarpLanes + lane;
        Fibre& f = fibre(thread);
        if (f.done) {
            continue;
        }
        f.operation = Operation{};
        place.thread = thread;
        in_fibre_ = true;
        switch_context(scheduler_, f.context);
        in_fibre_ = false;
        if (!error_.empty()) {
            throw EmulationError(error_);
        }
    }
    agree(warp);
}

void Machine::agree(int warp) {
    int first = -1, gone = -1;
    for (int thread = warp * kWarpLanes; thread < (warp + 1) * kWarpLanes; ++thread) {
        const Fibre& f = fibre(thread);
        if (f.done) {
            gone = thread;
        } else if (first < 0) {
            first = thread;
        } else if (!same_operation(f.operation, fibre(first).operation)) {
            fail(thread, std::string("divergence: it is at ") + name_of(f.operation) + " and thread " +
                             std::to_string(first) + " of its warp at " + name_of(fibre(first).operation));
        }
    }
    if (first < 0) {
        warps_[warp].done = true;
        return;
    }
    const Operation& operation = fibre(first).operation;
    if (operation.kind == Kind::kBlockBarrier) {
        warps_[warp].at_barrier = true;
        return;
    }
    if (gone >= 0) {
        fail(gone, std::string("divergence: it has returned and thread ") + std::to_string(first) +
                       " of its warp is at " + name_of(operation));
    }
    perform(warp);
}

void Machine::perform(int warp) {
    switch (fibre(warp * kWarpLanes).operation.kind) {
        case Kind::kNone:
        case Kind::kBlockBarrier:
            break;
        case Kind::kWarpBarrier:
            warps_[warp].epoch = ++clock_;
            break;
        case Kind::kMatrices:
        case Kind::kMatricesTransposed:
            load_matrices(warp);
            break;
        case Kind::kBF16:
            multiply_16816<BF16>(warp);
            break;
        case Kind::kFP16:
            multiply_16816<FP16>(warp);
            break;
        case Kind::kTF32:
            multiply_1688(warp);
            break;
        case Kind::kShuffle:
            shuffle(warp);
            break;
    }
}

// PTX ISA, ldmatrix: the threads of a group of four receive one row, two elements each, which lies at the address that
// thread 8 i + row gave for matrix i; with .trans they receive a column.
void Machine::load_matrices(int warp) {
    const int first = warp * kWarpLanes;
    const Operation& operation = fibre(first).operation;
    const bool transposed = operation.kind == Kind::kMatricesTransposed;
    const char* const name = name_of(operation);
    for (int matrix = 0; matrix < operation.argument; ++matrix) {
        std::uint16_t element[8][8];
        std::uint32_t used[8];  // the address of the row that uses each eighth of the banks
        unsigned taken = 0;
        for (int row = 0; row < 8; ++row) {
            const int thread = first + 8 * matrix + row;
            const std::uint32_t address = fibre(thread).operation.address;
            const std::size_t offset = shared_offset(thread, name, address, 16);
            demand(shared_shadow_.read(now_, who(thread, true), offset, 16), thread, name);
            std::memcpy(element[row], shared_.data() + offset, 16);
            const std::uint32_t banks = address / 16 % 8;
            if ((taken >> banks & 1u) != 0 && used[banks] != address) {
                ++counters_->matrix_load_conflicts;
            }
            taken |= 1u << banks;
            used[banks] = address;
        }
        for (int lane = 0; lane < kWarpLanes; ++lane) {
            const int outer = lane / 4, inner = 2 * (lane % 4);
            const std::uint32_t low = transposed ? element[inner][outer] : element[outer][inner];
            const std::uint32_t high = transposed ? element[inner + 1][outer] : element[outer][inner + 1];
            static_cast<std::uint32_t*>(fibre(first + lane).operation.result)[matrix] = low | high << 16;
        }
    }
    counters_->matrix_loads += operation.argument;
}

// d += a b, each product exact in float32 (the factors have at most 11 bits of mantissa), summed in float32.
template <int kDepth>
void accumulate(float (&d)[16][8], const float (&a)[16][kDepth], const float (&b)[kDepth][8]) {
    for (int row = 0; row < 16; ++row) {
        for (int k = 0; k < kDepth; ++k) {
            for (int column = 0; column < 8; ++column) {
                d[row][column] += a[row][k] * b[k][column];
            }
        }
    }
}

// PTX ISA, the accumulator fragment of m16n8k16 and m16n8k8: c0 and c1 in row lane / 4, c2 and c3 eight rows below.
int accumulator_row(int lane, int i) { return lane / 4 + 8 * (i / 2); }
int accumulator_column(int lane, int i) { return 2 * (lane % 4) + i % 2; }

// PTX ISA, m16n8k16 with 16-bit elements: a0 a1 | a2 a3 | a4 a5 | a6 a7 are the four registers of a; the rows are
// lane / 4, eight more for a2 a3 and a6 a7; the columns 2 (lane % 4) and the next, eight more from a4 on. b0 b1 | b2
// b3 are the registers of b: rows 2 (lane % 4) and the next, eight more from b2 on; the column is lane / 4.
template <typename Element>
void Machine::multiply_16816(int warp) {
    const int first = warp * kWarpLanes;
    float a[16][16], b[16][8], d[16][8];
    for (int lane = 0; lane < kWarpLanes; ++lane) {
        const Operation& operation = fibre(first + lane).operation;
        for (int i = 0; i < 8; ++i) {
            a[lane / 4 + 8 * (i / 2 % 2)][2 * (lane % 4) + i % 2 + 8 * (i / 4)] =
                unpack<Element>(operation.a[i / 2], i % 2);
        }
        for (int i = 0; i < 4; ++i) {
            b[2 * (lane % 4) + i % 2 + 8 * (i / 2)][lane / 4] = unpack<Element>(operation.b[i / 2], i % 2);
            d[accumulator_row(lane, i)][accumulator_column(lane, i)] = static_cast<float*>(operation.result)[i];
        }
    }
    accumulate(d, a, b);
    for (int lane = 0; lane < kWarpLanes; ++lane) {
        for (int i = 0; i < 4; ++i) {
            static_cast<float*>(fibre(first + lane).operation.result)[i] =
                d[accumulator_row(lane, i)][accumulator_column(lane, i)];
        }
    }
    ++counters_->multiply_adds;
}

// PTX ISA, m16n8k8 with TF32: a0 to a3 in rows lane / 4 (a0, a2) and eight below (a1, a3), columns lane % 4 (a0, a1)
// and four more; b0 and b1 in rows lane % 4 and four more, column lane / 4. The low 13 bits of an operand do not
// count.
void Machine::multiply_1688(int warp) {
    const int first = warp * kWarpLanes;
    const auto operand = [](std::uint32_t bits) { return bits_float(bits & ~0x1FFFu); };
    float a[16][8], b[8][8], d[16][8];
    for (int lane = 0; lane < kWarpLanes; ++lane) {
        const Operation& operation = fibre(first + lane).operation;
        for (int i = 0; i < 4; ++i) {
            a[lane / 4 + 8 * (i % 2)][lane % 4 + 4 * (i / 2)] = operand(operation.a[i]);
            d[accumulator_row(lane, i)][accumulator_column(lane, i)] = static_cast<float*>(operation.result)[i];
        }
        for (int i = 0; i < 2; ++i) {
            b[lane % 4 + 4 * i][lane / 4] = operand(operation.b[i]);
        }
    }
    accumulate(d, a, b);
    for (int lane = 0; lane < kWarpLanes; ++lane) {
        for (int i = 0; i < 4; ++i) {
            static_cast<float*>(fibre(first + lane).operation.result)[i] =
                d[accumulator_row(lane, i)][accumulator_column(lane, i)];
        }
    }
    ++counters_->multiply_adds;
}

void Machine::shuffle(int warp) {
    const int first = warp * kWarpLanes;
    for (int lane = 0; lane < kWarpLanes; ++lane) {
        const Operation& operation = fibre(first + lane).operation;
        if (operation.argument < 0 || operation.argument >= kWarpLanes) {
            fail(first + lane, "shuffle: lane " + std::to_string(operation.argument) + " is not 0 to 31");
        }
        *static_cast<std::uint32_t*>(operation.result) = *fibre(first + operation.argument).operation.a;
    }
    ++counters_->shuffles;
}

// ---- What the fibres call ----

void Machine::live() {
    started(scheduler_);
    body_(context_);
    Fibre& f = fibre(place.thread);
    f.done = true;
    switch_context(f.context, scheduler_);
}

void Machine::meet(const Operation& operation) {
    count_operation();
    Fibre& f = fibre(place.thread);
    f.operation = operation;
    switch_context(f.context, scheduler_);
}

std::size_t Machine::shared_offset(int thread, const char* operation, std::uint32_t address, int bytes) {
    const std::int64_t offset = static_cast<std::int64_t>(address) - kSharedBase;
    const bool inside = offset >= 0 && offset + bytes <= static_cast<std::int64_t>(shared_.size());
    if (!inside || address % static_cast<std::uint32_t>(bytes) != 0) {
        fail(thread, std::string(operation) + ": " + std::to_string(bytes) + " bytes at byte " +
                         std::to_string(offset) + " of shared memory, " +
                         (inside ? "not aligned to " + std::to_string(bytes)
                                 : "out of bounds: the block has " + std::to_string(shared_.size())));
    }
    return static_cast<std::size_t>(offset);
}

void Machine::read_shared(std::uint32_t address, void* value, int bytes) {
    count_operation();
    const std::size_t offset = shared_offset(place.thread, "load_shared", address, bytes);
    const auto count = static_cast<std::size_t>(bytes);
    demand(shared_shadow_.read(now_, who(place.thread), offset, count), "load_shared");
    std::memcpy(value, shared_.data() + offset, count);
}

void Machine::write_shared(std::uint32_t address, const void* value, int bytes) {
    count_operation();
    const std::size_t offset = shared_offset(place.thread, "store_shared", address, bytes);
    const auto count = static_cast<std::size_t>(bytes);
    demand(shared_shadow_.write(now_, who(place.thread), offset, count), "store_shared");
    std::memcpy(shared_.data() + offset, value, count);
}

Buffer& Machine::global(const void* address, int bytes, int alignment, const char* operation) {
    std::string problem;
    Buffer* const buffer =
        memory_->find(address, static_cast<std::size_t>(bytes), static_cast<std::size_t>(alignment), problem);
    demand(problem, operation);
    return *buffer;
}

void Machine::check_read(const void* source, int bytes, int alignment, const char* operation) {
    Buffer& buffer = global(source, bytes, alignment, operation);
    if (buffer.writable) {
        const auto offset = static_cast<std::size_t>(static_cast<const char*>(source) - buffer.data);
        demand(buffer.shadow.read(now_, who(place.thread), offset, static_cast<std::size_t>(bytes)), operation);
    }
}

void Machine::read_global(const void* source, void* value, int bytes) {
    count_operation();
    check_read(source, bytes, bytes, "load_global");
    std::memcpy(value, source, static_cast<std::size_t>(bytes));
    counters_->global_bytes_read += bytes;
}

void Machine::write_global(void* target, const void* value, int bytes) {
    count_operation();
    Buffer& buffer = global(target, bytes, bytes, "store_global");
    const auto count = static_cast<std::size_t>(bytes);
    const auto offset = static_cast<std::size_t>(static_cast<const char*>(target) - buffer.data);
    if (!buffer.writable) {
        fail(place.thread, "store_global: byte " + std::to_string(offset) + " of " + buffer.name +
                               ", which was given for reading");
    }
    demand(buffer.shadow.write(now_, who(place.thread), offset, count), "store_global");
    std::memcpy(target, value, count);
    counters_->global_bytes_written += bytes;
}

void Machine::copy_async(std::uint32_t target, const void* source, int bytes) {
    static constexpr char kName[] = "copy_async16";
    count_operation();
    if (bytes < 0 || bytes > kCopyBytes) {
        fail(place.thread, std::string(kName) + ": " + std::to_string(bytes) + " bytes, expected 0 to 16");
    }
    const std::size_t offset = shared_offset(place.thread, kName, target, kCopyBytes);
    if (bytes > 0) {
        check_read(source, bytes, kCopyBytes, kName);
        counters_->global_bytes_read += bytes;
    } else if (reinterpret_cast<std::uintptr_t>(source) % kCopyBytes != 0) {
        fail(place.thread, std::string(kName) + ": the source is not aligned to 16");
    }
    demand(shared_shadow_.begin(now_, who(place.thread), offset, kCopyBytes), kName);
    fibre(place.thread).copies.push_back(Copy{offset, source, bytes, fibre(place.thread).groups});
    ++counters_->async_copies;
}

void Machine::commit() {
    count_operation();
    ++fibre(place.thread).groups;
}

void Machine::wait(int pending) {
    count_operation();
    Fibre& f = fibre(place.thread);
    std::size_t landed = 0;
    while (landed < f.copies.size() && f.copies[landed].group < f.groups - pending) {
        const Copy& copy = f.copies[landed++];
        char* const target = shared_.data() + copy.offset;
        std::memset(target, 0, kCopyBytes);
        if (copy.bytes > 0) {
            check_read(copy.source, copy.bytes, kCopyBytes, "copy_async_wait");
            std::memcpy(target, copy.source, static_cast<std::size_t>(copy.bytes));
        }
        shared_shadow_.land(who(place.thread), copy.offset, kCopyBytes);
    }
    f.copies.erase(f.copies.begin(), f.copies.begin() + static_cast<std::ptrdiff_t>(landed));
}

}  // namespace

void meet(const Operation& operation) { machine().meet(operation); }
void read_shared(std::uint32_t address, void* value, int bytes) { machine().read_shared(address, value, bytes); }
void write_shared(std::uint32_t address, const void* value, int bytes) {
    machine().write_shared(address, value, bytes);
}
void read_global(const void* source, void* value, int bytes) { machine().read_global(source, value, bytes); }
void write_global(void* target, const void* value, int bytes) { machine().write_global(target, value, bytes); }
void copy_async(std::uint32_t target, const void* source, int bytes) { machine().copy_async(target, source, bytes); }
void commit() { machine().commit(); }
void wait(int pending) { machine().wait(pending); }
std::uint32_t shared_base() { return kSharedBase; }

}  // namespace host

// ---- The emulator ----

Emulator::Emulator(std::int64_t order) : memory_(new host::GlobalMemory), order_(order) {}

Emulator::~Emulator() = default;

void* Emulator::buffer(const char* name, const void* data, void* back, std::size_t bytes, bool writable,
                       bool initialised, int alignment) {
    return memory_->add(name, data, back, bytes, writable, initialised, alignment).data;
}

void Emulator::run(Grid grid, int threads, int shared_bytes, void (*body)(const void*), const void* context) {
    if (threads < kWarpLanes || threads > host::kMostThreads || threads % kWarpLanes != 0) {
        throw EmulationError("a block of " + std::to_string(threads) +
                             " threads: expected a multiple of 32 up to 1024");
    }
    if (grid.x < 1 || grid.y < 1 || grid.z < 1 || grid.y > 65535 || grid.z > 65535 || shared_bytes < 0) {
        throw EmulationError("a launch with a grid of (" + std::to_string(grid.x) + ", " + std::to_string(grid.y) +
                             ", " + std::to_string(grid.z) + ") and " + std::to_string(shared_bytes) +
                             " bytes of shared memory");
    }
    const std::lock_guard<std::mutex> lock(host::launching);
    host::Machine& machine = host::machine();
    machine.begin_launch(memory_.get(), &counters_, order_, limit_, threads, shared_bytes, body, context);
    machine.run_grid(grid);
}

void Emulator::finish() { memory_->copy_back(); }

}  // namespace mtbert::machine
