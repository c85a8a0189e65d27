// The host twin of csrc/cuda/lora/sm90_machine.h and of what the sm_90a kernels use of machine.h: runs a kernel's own
// source on the CPU, one fibre a CUDA thread, all blocks of a cluster at once.
//
//     Emulator emulator(order, late);
//     emulator.memory("x", pointer, bytes, Emulator::kRead);       // every buffer of the host that the kernel touches
//     emulator.launch(clusters, cluster_size, shared_bytes, [&] { kernel<...>(arguments); });
//
// Asynchronous work is done at one of two times, because hardware may do it at any in between. `late` = false: at
// once (so that a load into a stage still in use spoils it). `late` = true: when it is waited for, or when nothing
// else can run (so that data used too early is not there yet; accumulators under way are NaN, register operands are
// read at the end).
//
// What is an error, with the thread and the block in its text: accesses outside of the buffers and of shared memory,
// or to an address misaligned for them; a second store to the same bytes of an output; a lane or a thread elsewhere
// than its warp or warpgroup; a deadlock, of barriers or registers; more arrivals at an mbarrier than it expects; a
// load by TMA into what a product or a TMA store under way reads; reading or writing what a load under way writes;
// reaching a block that ended; a TMA store of what was written without async_fence; products without product_fence
// after others were committed; shared memory that was never written where anything reads it.
//
// Operands of products are found by their descriptors alone, as the PTX ISA describes the canonical layouts; the
// layout that TMA leaves is computed from its own description. Nothing here uses sm90_layout.h.
#pragma once

#include <ucontext.h>

#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "../convert.h"
#include "cuda/lora/machine.h"

namespace mtbert::machine {

// A matrix as TMA is told of it: dimensions from the innermost, the box, the 128-byte swizzle.
struct TensorMap {
    char* matrix = nullptr;
    int rank = 0;
    std::int64_t size[3] = {1, 1, 1};
    std::int64_t stride[3] = {2, 0, 0};  // bytes
    int box[3] = {1, 1, 1};

    std::int64_t bytes() const { return std::int64_t{2} * box[0] * box[1] * box[2]; }
};

class EmulationError : public std::runtime_error {
    using std::runtime_error::runtime_error;
};

class Emulator {
   public:
    enum Access { kRead, kWrite };

    Emulator(std::int64_t order, bool late) : late_(late), order_(order), state_(static_cast<std::uint64_t>(order)) {}

    void memory(const char* name, const void* pointer, std::int64_t bytes, Access access) {
        buffers_.push_back({name, reinterpret_cast<std::uintptr_t>(pointer), bytes, access,
                            std::vector<bool>(access == kWrite ? static_cast<std::size_t>(bytes) : 0)});
    }

    // Runs body() in every thread of every block; the blocks of a cluster together, clusters one after the other.
    void launch(int clusters, int cluster_size, int threads, int shared_bytes, const std::function<void()>& body);

    // ---- What the machine's functions call. ----

    struct Place {
        int thread;
        int rank;     // of the block in its cluster
        int block;
        int cluster;
    };
    Place place() const { return running_->place; }

    enum class Kind { kNone, kShuffle, kWarpBarrier, kLoadMatrix, kStoreMatrix, kUniform,
                      kShared, kRegisters, kFence, kCommit, kWait, kFewer, kMore };
    struct Operation {
        Kind kind = Kind::kNone;
        std::int64_t argument = 0;
        std::uint32_t address = 0;
        std::uint32_t* words = nullptr;
        // Products.
        float* d = nullptr;
        int count = 0;
        const std::uint32_t* registers = nullptr;
        std::uint64_t a = 0, b = 0;
        bool transposed = false, accumulate = false;
        float (*convert)(std::uint16_t) = nullptr;

        bool same(const Operation& other) const {
            return kind == other.kind && argument == other.argument && count == other.count && a == other.a &&
                   b == other.b && transposed == other.transposed && accumulate == other.accumulate;
        }
    };
    // The running thread meets the others of its warp, or of its warpgroup; the last one does the work for all.
    void meet(Operation operation, bool warpgroup);

    void cluster_barrier();
    std::uint32_t shared_start() const { return kSharedStart; }
    void barrier_init(std::uint32_t address, int arrivals);
    void barrier_init_fence();
    void barrier_arrive(std::uint32_t address, int rank, std::int64_t expected_bytes);
    void barrier_wait(std::uint32_t address, std::uint32_t parity);
    void tma_load(std::uint32_t target, const TensorMap& map, std::uint32_t barrier, int blocks, int c0, int c1,
                  int c2);
    void tma_store(const TensorMap& map, std::uint32_t source, int c0, int c1, int c2);
    void tma_store_commit();
    void tma_store_wait(int pending);
    void async_fence();
    void global(const void* pointer, void* value, int bytes, bool write);
    [[noreturn]] void fail(const std::string& what) const;

   private:
    static constexpr std::uint32_t kSharedStart = 1024;
    static constexpr std::size_t kStackBytes = 96 * 1024;

    struct Buffer {
        std::string name;
        std::uintptr_t begin;
        std::int64_t bytes;
        Access access;
        std::vector<bool> written;
    };
    // When others may use it: the thread that made it has fenced it, and the cluster has met since.
    enum class Seen { kByItsMaker, kFenced, kByAll };
    struct Barrier {
        int arrivals;
        int pending;
        int maker;
        std::int64_t bytes = 0;
        std::uint64_t phase = 0;
        Seen seen = Seen::kByItsMaker;
    };
    struct Load {
        const TensorMap* map;
        std::uint32_t target, barrier;
        int blocks;
        int coordinate[3];
    };
    struct Store {
        const TensorMap* map;
        std::uint32_t source;
        int coordinate[3];
        bool done = false;
    };
    struct Fibre {
        Place place;
        ucontext_t context;
        std::unique_ptr<char[]> stack;
        std::function<bool()> ready;  // empty: can run
        bool finished = false;
        std::deque<std::vector<Store>> store_groups;  // the last is open
    };
    struct Meeting {
        int arrived = 0;
        std::uint64_t generation = 0;
        std::vector<Operation> operations;
    };
    struct Product {
        std::vector<Operation> threads;
        std::vector<std::uint32_t> bytes;  // addresses of 16-byte pieces that it reads
        std::vector<float> result;         // early: computed at once
    };
    struct Warpgroup {
        bool fenced = false;
        std::vector<Product> open;
        std::deque<std::vector<Product>> groups;
        // Accumulators under way: their values, and how many products use them.
        std::map<const float*, std::pair<std::vector<float>, int>> held;
    };
    struct Block {
        std::vector<std::uint8_t> shared;
        std::vector<bool> written;                          // by byte
        std::vector<int> loading;                           // by 16 bytes: loads under way into them
        std::vector<int> reading;                           // by 16 bytes: products and stores under way that read them
        std::map<std::uint32_t, std::set<int>> unfenced;    // by 16 bytes: threads that wrote, no fence since
        std::map<std::uint32_t, Barrier> barriers;
        std::vector<Meeting> warps;
        std::vector<Meeting> warpgroups;
        std::vector<Warpgroup> products;
        std::vector<int> registers;  // of a thread, by warpgroup
        int free_registers = 0;
    };

    Barrier& barrier_at(Block& block, std::uint32_t address, const char* what);
    void block_until(const std::function<bool()>& ready);
    void switch_to_scheduler();
    static void enter();
    void run_cluster(int cluster, int cluster_size, int threads, int shared_bytes, const std::function<void()>& body);
    bool finish_something_late();
    std::string where(const Fibre& fibre) const;
    std::uint64_t random();

    Block& mine() { return blocks_[static_cast<std::size_t>(running_->place.rank)]; }
    std::uint8_t* at(Block& block, std::uint32_t address, int bytes, const char* what);
    void read_shared(Block& block, std::uint32_t address, void* value, int bytes, const char* what);
    void write_shared(Block& block, std::uint32_t address, const void* value, int bytes, int thread);
    void check_alive(int rank, const char* what);
    void mark(std::vector<int>& map, std::uint32_t address, std::int64_t bytes, int by);
    void global_at(const Block*, std::uintptr_t pointer, std::int64_t bytes, bool write);

    void do_warp(Block& block, Meeting& meeting, int warp);
    void do_warpgroup(Block& block, Meeting& meeting, int warpgroup);
    void issue(Block& block, Warpgroup& group, const std::vector<Operation>& operations);
    void operands(Block& block, const Product& product, std::vector<float>& a, std::vector<float>& b,
                  std::vector<std::uint32_t>* pieces);
    void complete(Block& block, Warpgroup& group, Product& product);
    void land(const Load& load);
    void complete_store(Block& block, Store& store);

    bool late_;
    std::int64_t order_;
    std::uint64_t state_;
    std::vector<Buffer> buffers_;
    std::vector<Block> blocks_;
    std::vector<std::unique_ptr<Fibre>> fibres_;
    std::deque<Load> loads_;
    Fibre* running_ = nullptr;
    ucontext_t scheduler_;
    const std::function<void()>* body_ = nullptr;
    std::string error_;
    int cluster_arrived_ = 0;
    std::uint64_t cluster_generation_ = 0;
};

// The emulator whose launch is under way.
extern Emulator* emulator;

using Operation = Emulator::Operation;
using Kind = Emulator::Kind;

// ---- The functions that kernels call; machine.h and sm90_machine.h document them. ----

inline void meet_warp(Kind kind, std::uint32_t* words, std::int64_t argument = 0, std::uint32_t address = 0) {
    Operation operation;
    operation.kind = kind;
    operation.words = words;
    operation.argument = argument;
    operation.address = address;
    emulator->meet(operation, false);
}
inline void meet_warpgroup(Kind kind, std::int64_t argument = 0) {
    Operation operation;
    operation.kind = kind;
    operation.argument = argument;
    emulator->meet(operation, true);
}

inline int thread_index() { return emulator->place().thread; }
inline int lane_index() { return thread_index() % kWarpLanes; }
inline int warp_index() {
    meet_warp(Kind::kUniform, nullptr);
    return thread_index() / kWarpLanes;
}
inline int block_index_x() { return emulator->place().block; }
inline int cluster_rank() { return emulator->place().rank; }
inline void warp_barrier() { meet_warp(Kind::kWarpBarrier, nullptr); }
inline void cluster_barrier() { emulator->cluster_barrier(); }
inline Shared swizzled_shared_start() { return Shared{emulator->shared_start()}; }
inline void fail() { emulator->fail("the kernel ended the launch"); }

template <int kCount>
void fewer_registers() {
    meet_warpgroup(Kind::kFewer, kCount);
}
template <int kCount>
void more_registers() {
    meet_warpgroup(Kind::kMore, kCount);
}

template <typename V>
V load_global(const void* source) {
    V value;
    emulator->global(source, &value, sizeof value, false);
    return value;
}
template <typename V>
void store_global(void* target, V value) {
    emulator->global(target, &value, sizeof value, true);
}

inline std::uint32_t shuffle_xor(std::uint32_t value, int lane_mask) {
    meet_warp(Kind::kShuffle, &value, lane_mask);
    return value;
}
inline void load_matrix_x4(std::uint32_t (&fragment)[4], Shared row) {
    meet_warp(Kind::kLoadMatrix, fragment, 0, row.address);
}
inline void store_matrix_x4(Shared row, const std::uint32_t (&fragment)[4]) {
    meet_warp(Kind::kStoreMatrix, const_cast<std::uint32_t*>(fragment), 0, row.address);
}

inline void barrier_init(Shared barrier, int arrivals) { emulator->barrier_init(barrier.address, arrivals); }
inline void barrier_init_fence() { emulator->barrier_init_fence(); }
inline void barrier_arrive_expect(Shared barrier, int bytes) {
    emulator->barrier_arrive(barrier.address, emulator->place().rank, bytes);
}
inline void barrier_arrive_at(Shared barrier, int rank) { emulator->barrier_arrive(barrier.address, rank, 0); }
inline void barrier_wait(Shared barrier, std::uint32_t parity) { emulator->barrier_wait(barrier.address, parity); }

inline void tma_prefetch(const TensorMap&) {}
inline void tma_load_multicast(Shared target, const TensorMap& map, Shared barrier, int blocks, int c0, int c1,
                               int c2 = 0) {
    emulator->tma_load(target.address, map, barrier.address, blocks, c0, c1, c2);
}
inline void tma_load(Shared target, const TensorMap& map, Shared barrier, int c0, int c1, int c2 = 0) {
    emulator->tma_load(target.address, map, barrier.address, 1 << emulator->place().rank, c0, c1, c2);
}
inline void tma_store(const TensorMap& map, Shared source, int c0, int c1, int c2) {
    emulator->tma_store(map, source.address, c0, c1, c2);
}
inline void tma_store_commit() { emulator->tma_store_commit(); }
template <int kPending>
void tma_store_wait_read() {
    emulator->tma_store_wait(kPending);
}
inline void async_fence() { emulator->async_fence(); }

inline void product_fence() { meet_warpgroup(Kind::kFence); }
inline void product_commit() { meet_warpgroup(Kind::kCommit); }
template <int kPending>
void product_wait() {
    meet_warpgroup(Kind::kWait, kPending);
}
template <int kCount>
void hold(float (&)[kCount]) {}
template <int kCount>
void hold(std::uint32_t (&)[kCount]) {}

template <typename T>
float convert(std::uint16_t bits) {
    return to_float(T{bits});
}

template <typename T, bool kTransposed, int kCount>
void multiply_shared(float (&d)[kCount], std::uint64_t a, std::uint64_t b, bool accumulate) {
    Operation operation;
    operation.kind = Kind::kShared;
    operation.d = d;
    operation.count = kCount;
    operation.a = a;
    operation.b = b;
    operation.transposed = kTransposed;
    operation.accumulate = accumulate;
    operation.convert = &convert<T>;
    emulator->meet(operation, true);
}
template <typename T, bool kTransposed, int kCount>
void multiply_registers(float (&d)[kCount], const std::uint32_t (&a)[4], std::uint64_t b, bool accumulate) {
    Operation operation;
    operation.kind = Kind::kRegisters;
    operation.d = d;
    operation.count = kCount;
    operation.registers = a;
    operation.b = b;
    operation.transposed = kTransposed;
    operation.accumulate = accumulate;
    operation.convert = &convert<T>;
    emulator->meet(operation, true);
}

}  // namespace mtbert::machine
