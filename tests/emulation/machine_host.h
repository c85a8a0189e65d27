// The host twin of csrc/cuda/lora/machine.h: runs a kernel's own source on the CPU, one fibre a CUDA thread, and
// stops at the first thing that a GPU would not forgive.
//
//     Emulator emulator(order);
//     const BF16* x = emulator.read<BF16>("x", host_x, count);     // device copies of exactly this size
//     float* y = emulator.write<float>("y", host_y, count);
//     emulator.launch(Grid{2, 3, 1}, threads, shared_bytes, [&] { kernel<BF16>(x, y, count); });
//     emulator.finish();                                            // y goes back to host_y
//
// An entry point for Python returns guarded([&] { ... }): null, or the text of the first error.
//
// What is an error, with the thread, the block and the operation in its text:
// - Global memory: outside of every buffer (the nearest one and the byte offset are named), misaligned, a store to a
//   buffer given for reading, a load of bytes that were never written (write and scratch buffers), and bytes that two
//   threads touch unordered with one of them writing. Threads of different blocks of one launch are never ordered;
//   launches are.
// - Shared memory: out of bounds, misaligned, read before it was written in this block, and the same kind of race. Only
//   block_barrier and warp_barrier order accesses (the header says why). load_matrix reads as all lanes of its warp.
// - copy_async16 counts as a write from its issue to the issuing thread's wait, where the bytes land (the latest moment
//   that PTX allows): touching its target before is an error, and after it the usual rules hold. Copies that were not
//   committed are waited for by nothing. A block may end while copies are under way.
// - Lanes of a warp at different operations, a lane that has returned while its warp goes on to a warp-level
//   operation, and shuffles from a lane outside of 0 to 31. These are the only ways to a deadlock here.
// - More than the limit of operations in a block (an endless loop that touches the machine).
//
// Not seen: reads of uninitialised registers and overruns of a thread's own arrays (build with the sanitizers for
// those), and what was compiled without this header.
#pragma once

#include <cstddef>
#include <memory>
#include <stdexcept>
#include <string>

#include "convert.h"
#include "cuda/lora/machine.h"

#ifndef MTBERT_EMULATION
#error "the whole translation unit has to be compiled with MTBERT_EMULATION"
#endif

namespace mtbert::machine {

namespace host {
class GlobalMemory;
}

struct Grid {
    int x = 1;
    int y = 1;
    int z = 1;
};

class EmulationError : public std::runtime_error {
    using std::runtime_error::runtime_error;
};

// What the launches of an emulator did so far; operations of a warp count once.
struct Counters {
    std::int64_t blocks = 0;
    std::int64_t block_barriers = 0;
    std::int64_t multiply_adds = 0;
    std::int64_t matrix_loads = 0;           // 8x8 matrices
    std::int64_t matrix_load_conflicts = 0;  // rows of a matrix that fell on banks which an earlier row of it uses
    std::int64_t shuffles = 0;
    std::int64_t async_copies = 0;  // per thread, with any number of bytes
    std::int64_t global_bytes_read = 0;
    std::int64_t global_bytes_written = 0;
};

class Emulator {
   public:
    // The order in which threads, warps and blocks take their turns: 0 forward (each runs as far as it can, the first
    // one first), 1 the same from the last, otherwise shuffled at every warp-level operation by a generator of that
    // seed.
    explicit Emulator(std::int64_t order = 0);
    ~Emulator();
    Emulator(const Emulator&) = delete;
    Emulator& operator=(const Emulator&) = delete;

    // Device buffers: pointers for the kernel. Each is aligned to `alignment` bytes and to no more, up to 256. The name
    // is what errors call it. A null pointer gives a null pointer (an argument left out).
    // read: holds data, may only be read.
    template <typename T>
    const T* read(const char* name, const void* data, std::int64_t count, int alignment = 16) {
        return data == nullptr ? nullptr
                               : static_cast<const T*>(
                                     buffer(name, data, nullptr, bytes_of<T>(count), false, true, alignment));
    }
    // write: must be written by a kernel before it is read; finish copies it back. What no kernel wrote keeps its
    // value.
    template <typename T>
    T* write(const char* name, void* data, std::int64_t count, int alignment = 16) {
        return data == nullptr ? nullptr
                               : static_cast<T*>(buffer(name, data, data, bytes_of<T>(count), true, false, alignment));
    }
    // update: holds data, may be read and written; finish copies it back.
    template <typename T>
    T* update(const char* name, void* data, std::int64_t count, int alignment = 16) {
        return data == nullptr ? nullptr
                               : static_cast<T*>(buffer(name, data, data, bytes_of<T>(count), true, true, alignment));
    }
    // scratch: a workspace; as write, but for the kernels alone.
    template <typename T>
    T* scratch(const char* name, std::int64_t count, int alignment = 16) {
        return static_cast<T*>(buffer(name, nullptr, nullptr, bytes_of<T>(count), true, false, alignment));
    }

    // Runs body() as the kernel: in every thread of every block. threads is a multiple of 32, at most 1024. Throws
    // EmulationError at the first error; the emulator is of no use after it.
    template <typename Body>
    void launch(Grid grid, int threads, int shared_bytes, const Body& body) {
        run(grid, threads, shared_bytes, [](const void* context) { (*static_cast<const Body*>(context))(); }, &body);
    }

    // Copies the write and update buffers back.
    void finish();

    const Counters& counters() const { return counters_; }

    // The most calls of the machine's functions that a block may make; 2^28 unless set.
    void limit_operations(std::int64_t limit) { limit_ = limit; }

   private:
    template <typename T>
    static std::size_t bytes_of(std::int64_t count) {
        return static_cast<std::size_t>(count) * sizeof(T);
    }
    void* buffer(const char* name, const void* data, void* back, std::size_t bytes, bool writable, bool initialised,
                 int alignment);
    void run(Grid grid, int threads, int shared_bytes, void (*body)(const void*), const void* context);

    std::unique_ptr<host::GlobalMemory> memory_;
    Counters counters_;
    std::int64_t order_;
    std::int64_t limit_ = std::int64_t{1} << 28;
};

// For entry points: runs body and returns null, or the text of what it threw (valid until the next call).
template <typename Body>
const char* guarded(const Body& body) {
    static thread_local std::string text;
    try {
        body();
        return nullptr;
    } catch (const std::exception& error) {
        text = error.what();
    }
    return text.c_str();
}

// ---- The functions that kernels call; csrc/cuda/lora/machine.h documents them. ----

namespace host {

// Where the running thread is.
struct Place {
    int thread;
    int threads;
    Grid block;
    Grid grid;
};
extern Place place;

enum class Kind { kNone, kBlockBarrier, kWarpBarrier, kMatrices, kMatricesTransposed, kBF16, kFP16, kTF32, kShuffle };

// What a lane brings to an operation of its warp; the pointers are to the lane's own variables.
struct Operation {
    Kind kind = Kind::kNone;
    int argument = 0;             // matrices: how many; shuffle: the source lane
    std::uint32_t address = 0;    // matrices
    void* result = nullptr;       // matrices and shuffle: words; products: the accumulators
    const std::uint32_t* a = nullptr;
    const std::uint32_t* b = nullptr;
};

void meet(const Operation& operation);
void read_shared(std::uint32_t address, void* value, int bytes);
void write_shared(std::uint32_t address, const void* value, int bytes);
void read_global(const void* source, void* value, int bytes);
void write_global(void* target, const void* value, int bytes);
void copy_async(std::uint32_t target, const void* source, int bytes);
void commit();
void wait(int pending);
std::uint32_t shared_base();

template <int kCount>
void load_matrices(std::uint32_t (&fragment)[kCount], Shared row, Kind kind) {
    Operation operation;
    operation.kind = kind;
    operation.argument = kCount;
    operation.address = row.address;
    operation.result = fragment;
    meet(operation);
}

inline void multiply_add(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2], Kind kind) {
    Operation operation;
    operation.kind = kind;
    operation.result = d;
    operation.a = a;
    operation.b = b;
    meet(operation);
}

}  // namespace host

inline int thread_index() { return host::place.thread; }
inline int lane_index() { return host::place.thread % kWarpLanes; }
inline int block_index_x() { return host::place.block.x; }

inline void block_barrier() {
    host::Operation operation;
    operation.kind = host::Kind::kBlockBarrier;
    host::meet(operation);
}
inline void warp_barrier() {
    host::Operation operation;
    operation.kind = host::Kind::kWarpBarrier;
    host::meet(operation);
}

inline Shared shared_start() { return Shared{host::shared_base()}; }

template <typename V>
V load_shared(Shared source) {
    static_assert(kIsMovable<V>);
    V value;
    host::read_shared(source.address, &value, sizeof value);
    return value;
}
template <typename V>
void store_shared(Shared target, V value) {
    static_assert(kIsMovable<V>);
    host::write_shared(target.address, &value, sizeof value);
}
template <typename V>
V load_global(const void* source) {
    static_assert(kIsMovable<V>);
    V value;
    host::read_global(source, &value, sizeof value);
    return value;
}
template <typename V>
void store_global(void* target, V value) {
    static_assert(kIsMovable<V>);
    host::write_global(target, &value, sizeof value);
}

inline void copy_async16(Shared target, const void* source, int bytes) {
    host::copy_async(target.address, source, bytes);
}
inline void copy_async_commit() { host::commit(); }
template <int kPending>
void copy_async_wait() {
    static_assert(kPending >= 0);
    host::wait(kPending);
}

inline void load_matrix_x4(std::uint32_t (&fragment)[4], Shared row) {
    host::load_matrices(fragment, row, host::Kind::kMatrices);
}
inline void load_matrix_x2(std::uint32_t (&fragment)[2], Shared row) {
    host::load_matrices(fragment, row, host::Kind::kMatrices);
}
inline void load_matrix_x4_transposed(std::uint32_t (&fragment)[4], Shared row) {
    host::load_matrices(fragment, row, host::Kind::kMatricesTransposed);
}
inline void load_matrix_x2_transposed(std::uint32_t (&fragment)[2], Shared row) {
    host::load_matrices(fragment, row, host::Kind::kMatricesTransposed);
}

template <typename T>
void multiply_add_16816(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
    static_assert(std::is_same_v<T, BF16> || std::is_same_v<T, FP16>);
    host::multiply_add(d, a, b, std::is_same_v<T, BF16> ? host::Kind::kBF16 : host::Kind::kFP16);
}
inline void multiply_add_1688_tf32(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
    host::multiply_add(d, a, b, host::Kind::kTF32);
}

inline std::uint32_t shuffle(std::uint32_t value, int source_lane) {
    std::uint32_t result = value;
    host::Operation operation;
    operation.kind = host::Kind::kShuffle;
    operation.argument = source_lane;
    operation.result = &result;
    operation.a = &value;
    host::meet(operation);
    return result;
}
inline std::uint32_t shuffle_xor(std::uint32_t value, int lane_mask) {
    return shuffle(value, lane_index() ^ lane_mask);
}
inline int warp_index() {
    return static_cast<int>(shuffle(static_cast<std::uint32_t>(host::place.thread / kWarpLanes), 0));
}

}  // namespace mtbert::machine
