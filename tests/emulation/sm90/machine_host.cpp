#include "machine_host.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace mtbert::machine {

Emulator* emulator = nullptr;

namespace {

constexpr int kWarpgroupThreads = 128;
constexpr int kPieceBytes = 16;

// The 128-byte swizzle as the tables of the PTX ISA have it: of each 1024 bytes, 16-byte column c of 128-byte line l
// holds what would be in column c xor l without it.
std::uint32_t swizzled(std::uint32_t address) {
    const std::uint32_t line = address / 128 % 8;
    const std::uint32_t column = address / 16 % 8;
    return address - 16 * column + 16 * (column ^ line);
}

// The fields of a matrix descriptor.
struct Descriptor {
    std::uint32_t start, leading, stride;
    int base, mode;
    explicit Descriptor(std::uint64_t bits)
        : start(static_cast<std::uint32_t>(bits & 0x3FFF) << 4),
          leading(static_cast<std::uint32_t>(bits >> 16 & 0x3FFF) << 4),
          stride(static_cast<std::uint32_t>(bits >> 32 & 0x3FFF) << 4),
          base(static_cast<int>(bits >> 49 & 7)),
          mode(static_cast<int>(bits >> 62)) {}
};

}  // namespace

std::string Emulator::where(const Fibre& fibre) const {
    return "thread " + std::to_string(fibre.place.thread) + " of block " + std::to_string(fibre.place.block);
}

void Emulator::fail(const std::string& what) const {
    throw EmulationError(what + (running_ == nullptr ? "" : " (" + where(*running_) + ")"));
}

std::uint64_t Emulator::random() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return state_ >> 33;
}

// ---- Fibres. ----

void Emulator::enter() {
    Emulator& self = *emulator;
    Fibre& fibre = *self.running_;
    try {
        (*self.body_)();
    } catch (const std::exception& error) {
        if (self.error_.empty()) {
            self.error_ = error.what();
        }
    }
    fibre.finished = true;
    self.switch_to_scheduler();
}

void Emulator::switch_to_scheduler() { swapcontext(&running_->context, &scheduler_); }

void Emulator::block_until(const std::function<bool()>& ready) {
    if (ready()) {
        return;
    }
    running_->ready = ready;
    switch_to_scheduler();
}

void Emulator::launch(int clusters, int cluster_size, int threads, int shared_bytes,
                      const std::function<void()>& body) {
    emulator = this;
    for (int cluster = 0; cluster < clusters; ++cluster) {
        run_cluster(cluster, cluster_size, threads, shared_bytes, body);
    }
}

void Emulator::run_cluster(int cluster, int cluster_size, int threads, int shared_bytes,
                           const std::function<void()>& body) {
    constexpr int kRegisters = 65536;
    body_ = &body;
    const int start_registers = kRegisters / threads / 8 * 8;
    blocks_.assign(static_cast<std::size_t>(cluster_size), Block{});
    for (Block& block : blocks_) {
        block.shared.assign(static_cast<std::size_t>(shared_bytes), 0xFF);
        block.written.assign(static_cast<std::size_t>(shared_bytes), false);
        block.loading.assign(static_cast<std::size_t>(shared_bytes / kPieceBytes), 0);
        block.reading = block.loading;
        block.warps.resize(static_cast<std::size_t>(threads / kWarpLanes));
        block.warpgroups.resize(static_cast<std::size_t>(threads / kWarpgroupThreads));
        block.products.resize(block.warpgroups.size());
        block.registers.assign(block.warpgroups.size(), start_registers);
        block.free_registers = kRegisters - threads * start_registers;
    }
    fibres_.clear();
    loads_.clear();
    cluster_arrived_ = 0;
    for (int rank = 0; rank < cluster_size; ++rank) {
        for (int thread = 0; thread < threads; ++thread) {
            auto fibre = std::make_unique<Fibre>();
            fibre->place = {thread, rank, cluster * cluster_size + rank, cluster};
            fibre->stack = std::make_unique<char[]>(kStackBytes);
            fibre->store_groups.emplace_back();
            getcontext(&fibre->context);
            fibre->context.uc_stack.ss_sp = fibre->stack.get();
            fibre->context.uc_stack.ss_size = kStackBytes;
            fibre->context.uc_link = nullptr;
            makecontext(&fibre->context, &Emulator::enter, 0);
            fibres_.push_back(std::move(fibre));
        }
    }
    std::vector<Fibre*> turns;
    for (const auto& fibre : fibres_) {
        turns.push_back(fibre.get());
    }
    if (order_ == 1) {
        std::reverse(turns.begin(), turns.end());
    }
    for (bool left = true; left;) {
        left = false;
        bool moved = false;
        if (order_ > 1) {
            for (std::size_t i = turns.size() - 1; i > 0; --i) {
                std::swap(turns[i], turns[random() % (i + 1)]);
            }
        }
        for (Fibre* fibre : turns) {
            if (fibre->finished) {
                continue;
            }
            left = true;
            if (fibre->ready && !fibre->ready()) {
                continue;
            }
            fibre->ready = nullptr;
            moved = true;
            running_ = fibre;
            swapcontext(&scheduler_, &fibre->context);
            running_ = nullptr;
            if (!error_.empty()) {
                throw EmulationError(error_);
            }
        }
        if (left && !moved && !finish_something_late()) {
            std::string text = "deadlock:";
            int named = 0;
            for (const auto& fibre : fibres_) {
                if (!fibre->finished && fibre->place.thread % kWarpLanes == 0 && named++ < 8) {
                    text += " " + where(*fibre) + " waits;";
                }
            }
            throw EmulationError(text);
        }
    }
    if (!loads_.empty()) {
        throw EmulationError("a block ended before a load of TMA landed");
    }
    for (Block& block : blocks_) {
        for (Warpgroup& group : block.products) {
            if (!group.open.empty() || !group.groups.empty()) {
                throw EmulationError("a block ended before its products");
            }
        }
    }
    for (const auto& fibre : fibres_) {
        for (const auto& stores : fibre->store_groups) {
            if (!stores.empty()) {
                throw EmulationError("a block ended before TMA had read what it stores");
            }
        }
    }
}

bool Emulator::finish_something_late() {
    if (!loads_.empty()) {
        // Loads land in any order.
        const std::size_t index = order_ > 1 ? random() % loads_.size() : order_ == 1 ? loads_.size() - 1 : 0;
        const Load load = loads_[index];
        loads_.erase(loads_.begin() + static_cast<std::ptrdiff_t>(index));
        land(load);
        return true;
    }
    return false;
}

void Emulator::cluster_barrier() {
    const std::uint64_t generation = cluster_generation_;
    if (++cluster_arrived_ == static_cast<int>(fibres_.size())) {
        cluster_arrived_ = 0;
        ++cluster_generation_;
        for (Block& block : blocks_) {
            for (auto& barrier : block.barriers) {
                if (barrier.second.seen == Seen::kFenced) {
                    barrier.second.seen = Seen::kByAll;
                }
            }
        }
    } else {
        block_until([this, generation] { return cluster_generation_ != generation; });
    }
}

void Emulator::meet(Operation operation, bool warpgroup) {
    Block& block = mine();
    const int size = warpgroup ? kWarpgroupThreads : kWarpLanes;
    const int index = running_->place.thread / size;
    Meeting& meeting = (warpgroup ? block.warpgroups : block.warps)[static_cast<std::size_t>(index)];
    if (meeting.operations.empty()) {
        meeting.operations.resize(static_cast<std::size_t>(size));
    }
    if (meeting.arrived > 0) {
        for (const Operation& other : meeting.operations) {
            if (other.kind != Kind::kNone && !operation.same(other)) {
                fail(warpgroup ? "threads of a warpgroup are at different operations"
                               : "lanes of a warp are at different operations");
            }
        }
    }
    const std::uint64_t generation = meeting.generation;
    meeting.operations[static_cast<std::size_t>(running_->place.thread % size)] = operation;
    if (++meeting.arrived < size) {
        block_until([&meeting, generation] { return meeting.generation != generation; });
        return;
    }
    if (warpgroup) {
        if (operation.kind == Kind::kMore) {
            const int now = block.registers[static_cast<std::size_t>(index)];
            const int wanted = kWarpgroupThreads * (static_cast<int>(operation.argument) - now);
            block_until([&block, wanted] { return block.free_registers >= wanted; });
        }
        do_warpgroup(block, meeting, index);
    } else {
        do_warp(block, meeting, index);
    }
    for (Operation& other : meeting.operations) {
        other.kind = Kind::kNone;
    }
    meeting.arrived = 0;
    ++meeting.generation;
}

// ---- Memory. ----

std::uint8_t* Emulator::at(Block& block, std::uint32_t address, int bytes, const char* what) {
    const std::int64_t offset = static_cast<std::int64_t>(address) - kSharedStart;
    if (offset < 0 || offset + bytes > static_cast<std::int64_t>(block.shared.size())) {
        fail(std::string(what) + " outside of shared memory, at " + std::to_string(offset));
    }
    if (bytes > 1 && address % static_cast<std::uint32_t>(std::min(bytes, kPieceBytes)) != 0) {
        fail(std::string(what) + " at a misaligned address of shared memory");
    }
    return block.shared.data() + offset;
}

void Emulator::read_shared(Block& block, std::uint32_t address, void* value, int bytes, const char* what) {
    const std::uint8_t* source = at(block, address, bytes, what);
    const std::size_t offset = address - kSharedStart;
    if (block.loading[offset / kPieceBytes] != 0) {
        fail(std::string(what) + " reads what a load under way writes");
    }
    if (!block.written[offset]) {
        fail(std::string(what) + " reads shared memory that was never written");
    }
    std::memcpy(value, source, static_cast<std::size_t>(bytes));
}

void Emulator::write_shared(Block& block, std::uint32_t address, const void* value, int bytes, int thread) {
    std::uint8_t* target = at(block, address, bytes, "a store");
    const std::size_t offset = address - kSharedStart;
    if (block.loading[offset / kPieceBytes] != 0) {
        fail("a store to what a load under way writes");
    }
    if (block.reading[offset / kPieceBytes] != 0) {
        fail("a store to what a product or a TMA store under way reads");
    }
    std::memcpy(target, value, static_cast<std::size_t>(bytes));
    std::fill_n(block.written.begin() + static_cast<std::ptrdiff_t>(offset), bytes, true);
    block.unfenced[static_cast<std::uint32_t>(offset / kPieceBytes)].insert(thread);
}

void Emulator::mark(std::vector<int>& map, std::uint32_t address, std::int64_t bytes, int by) {
    const std::size_t first = (address - kSharedStart) / kPieceBytes;
    for (std::size_t i = 0; i < static_cast<std::size_t>(bytes / kPieceBytes); ++i) {
        map[first + i] += by;
    }
}

void Emulator::global_at(const Block*, std::uintptr_t pointer, std::int64_t bytes, bool write) {
    for (Buffer& buffer : buffers_) {
        if (pointer >= buffer.begin &&
            pointer + static_cast<std::uintptr_t>(bytes) <= buffer.begin + static_cast<std::uintptr_t>(buffer.bytes)) {
            if (write && buffer.access != kWrite) {
                fail("a store to " + buffer.name + ", which is an input");
            }
            for (std::int64_t i = 0; write && i < bytes; ++i) {
                const std::size_t index = pointer - buffer.begin + static_cast<std::size_t>(i);
                if (buffer.written[index]) {
                    fail("a second store to byte " + std::to_string(index) + " of " + buffer.name);
                }
                buffer.written[index] = true;
            }
            return;
        }
    }
    fail("an access to memory outside of all buffers");
}

void Emulator::global(const void* pointer, void* value, int bytes, bool write) {
    const auto address = reinterpret_cast<std::uintptr_t>(pointer);
    if (address % static_cast<std::uintptr_t>(bytes) != 0) {
        fail("a misaligned access to global memory");
    }
    global_at(nullptr, address, bytes, write);
    if (write) {
        std::memcpy(const_cast<void*>(pointer), value, static_cast<std::size_t>(bytes));
    } else {
        std::memcpy(value, pointer, static_cast<std::size_t>(bytes));
    }
}

void Emulator::async_fence() {
    for (auto& piece : mine().unfenced) {
        piece.second.erase(running_->place.thread);
    }
}

// Shared memory goes with the block.
void Emulator::check_alive(int rank, const char* what) {
    for (const auto& fibre : fibres_) {
        if (fibre->place.rank == rank && !fibre->finished) {
            return;
        }
    }
    fail(std::string(what) + " a block that has ended");
}

// ---- mbarriers. ----

void Emulator::barrier_init(std::uint32_t address, int arrivals) {
    Block& block = mine();
    at(block, address, 8, "an mbarrier");
    if (block.barriers.count(address) != 0) {
        fail("an mbarrier is initialised twice");
    }
    block.barriers[address] = Barrier{arrivals, arrivals, running_->place.thread};
}

void Emulator::barrier_init_fence() {
    for (auto& barrier : mine().barriers) {
        if (barrier.second.maker == running_->place.thread && barrier.second.seen == Seen::kByItsMaker) {
            barrier.second.seen = Seen::kFenced;
        }
    }
}

Emulator::Barrier& Emulator::barrier_at(Block& block, std::uint32_t address, const char* what) {
    const auto found = block.barriers.find(address);
    if (found == block.barriers.end()) {
        fail(std::string(what) + " where no mbarrier is");
    }
    if (found->second.seen != Seen::kByAll) {
        fail(std::string(what) + " at an mbarrier that was not fenced, or not behind a barrier of the cluster since");
    }
    return found->second;
}

void Emulator::barrier_arrive(std::uint32_t address, int rank, std::int64_t expected_bytes) {
    if (rank < 0 || rank >= static_cast<int>(blocks_.size())) {
        fail("an arrival at a block that is not in the cluster");
    }
    check_alive(rank, "an arrival at");
    Barrier& barrier = barrier_at(blocks_[static_cast<std::size_t>(rank)], address, "an arrival");
    if (barrier.pending == 0) {
        fail("more arrivals at an mbarrier than it expects");
    }
    --barrier.pending;
    barrier.bytes += expected_bytes;
    if (barrier.pending == 0 && barrier.bytes == 0) {
        barrier.pending = barrier.arrivals;
        ++barrier.phase;
    }
}

void Emulator::barrier_wait(std::uint32_t address, std::uint32_t parity) {
    const Barrier& barrier = barrier_at(mine(), address, "a wait");
    block_until([&barrier, parity] { return (barrier.phase & 1) != parity; });
}

// ---- TMA. ----

void Emulator::tma_load(std::uint32_t target, const TensorMap& map, std::uint32_t barrier, int blocks, int c0, int c1,
                        int c2) {
    if (map.matrix == nullptr) {
        fail("a load by a map that was not made");
    }
    if (2 * map.box[0] != 128 || map.box[1] > 256 || map.box[2] > 256) {
        fail("a load of a box that TMA or this emulation has not");
    }
    if (target % 1024 != 0) {
        fail("a load of swizzled rows that do not start on a multiple of 1024 bytes");
    }
    const Load load{&map, target, barrier, blocks, {c0, c1, c2}};
    for (std::size_t rank = 0; rank < blocks_.size(); ++rank) {
        if ((blocks >> rank & 1) == 0) {
            continue;
        }
        Block& block = blocks_[rank];
        at(block, target, 1, "a load");
        at(block, target + static_cast<std::uint32_t>(map.bytes()) - 1, 1, "a load");
        for (std::int64_t i = 0; i < map.bytes(); i += kPieceBytes) {
            const std::size_t piece = (target - kSharedStart + static_cast<std::size_t>(i)) / kPieceBytes;
            if (block.reading[piece] != 0) {
                fail("a load into what a product or a TMA store under way reads");
            }
            if (block.loading[piece] != 0) {
                fail("a load into what another load under way writes");
            }
        }
        mark(block.loading, target, map.bytes(), 1);
    }
    if (late_) {
        loads_.push_back(load);
    } else {
        land(load);
    }
}

void Emulator::land(const Load& load) {
    const TensorMap& map = *load.map;
    std::vector<std::uint8_t> box(static_cast<std::size_t>(map.bytes()), 0);
    std::size_t next = 0;
    for (int z = 0; z < map.box[2]; ++z) {
        for (int y = 0; y < map.box[1]; ++y) {
            const std::int64_t row = load.coordinate[1] + y, plane = load.coordinate[2] + z;
            const std::int64_t first = load.coordinate[0];
            const std::int64_t count = std::min<std::int64_t>(map.box[0], map.size[0] - first);
            if (row < map.size[1] && plane < map.size[2] && count > 0) {
                const char* source = map.matrix + first * 2 + row * map.stride[1] + plane * map.stride[2];
                global_at(nullptr, reinterpret_cast<std::uintptr_t>(source), 2 * count, false);
                std::memcpy(box.data() + next, source, static_cast<std::size_t>(2 * count));
            }
            next += static_cast<std::size_t>(2 * map.box[0]);
        }
    }
    for (std::size_t rank = 0; rank < blocks_.size(); ++rank) {
        if ((load.blocks >> rank & 1) == 0) {
            continue;
        }
        check_alive(static_cast<int>(rank), "a load into");
        Block& block = blocks_[rank];
        for (std::uint32_t i = 0; i < box.size(); i += kPieceBytes) {
            const std::size_t offset = swizzled(load.target + i) - kSharedStart;
            std::memcpy(block.shared.data() + offset, box.data() + i, kPieceBytes);
            std::fill_n(block.written.begin() + static_cast<std::ptrdiff_t>(offset), kPieceBytes, true);
        }
        mark(block.loading, load.target, map.bytes(), -1);
        Barrier& barrier = barrier_at(block, load.barrier, "a load lands");
        barrier.bytes -= map.bytes();
        if (barrier.pending == 0 && barrier.bytes == 0) {
            barrier.pending = barrier.arrivals;
            ++barrier.phase;
        }
    }
}

void Emulator::tma_store(const TensorMap& map, std::uint32_t source, int c0, int c1, int c2) {
    Block& block = mine();
    if (2 * map.box[0] != 128 || source % 1024 != 0) {
        fail("a TMA store of a box that this emulation has not, or from a misaligned address");
    }
    for (std::uint32_t i = 0; i < map.bytes(); i += kPieceBytes) {
        const auto piece = block.unfenced.find((source - kSharedStart + i) / kPieceBytes);
        if (piece != block.unfenced.end() && !piece->second.empty()) {
            fail("a TMA store of what was written without async_fence");
        }
    }
    mark(block.reading, source, map.bytes(), 1);
    Store store{&map, source, {c0, c1, c2}};
    if (!late_) {
        complete_store(block, store);
    }
    running_->store_groups.back().push_back(store);
}

void Emulator::complete_store(Block& block, Store& store) {
    if (store.done) {
        return;
    }
    store.done = true;
    const TensorMap& map = *store.map;
    std::uint32_t next = store.source;
    for (int z = 0; z < map.box[2]; ++z) {
        for (int y = 0; y < map.box[1]; ++y) {
            const std::int64_t row = store.coordinate[1] + y, plane = store.coordinate[2] + z;
            for (int x = 0; x < map.box[0]; x += kPieceBytes / 2, next += kPieceBytes) {
                std::uint8_t piece[kPieceBytes];
                read_shared(block, swizzled(next), piece, kPieceBytes, "a TMA store");
                const std::int64_t first = store.coordinate[0] + x;
                const std::int64_t count = std::min<std::int64_t>(kPieceBytes / 2, map.size[0] - first);
                if (row < map.size[1] && plane < map.size[2] && count > 0) {
                    char* target = map.matrix + first * 2 + row * map.stride[1] + plane * map.stride[2];
                    global_at(nullptr, reinterpret_cast<std::uintptr_t>(target), 2 * count, true);
                    std::memcpy(target, piece, static_cast<std::size_t>(2 * count));
                }
            }
        }
    }
}

void Emulator::tma_store_commit() { running_->store_groups.emplace_back(); }

void Emulator::tma_store_wait(int pending) {
    auto& groups = running_->store_groups;
    while (static_cast<int>(groups.size()) - 1 > pending) {
        for (Store& store : groups.front()) {
            complete_store(mine(), store);
            mark(mine().reading, store.source, store.map->bytes(), -1);
        }
        groups.pop_front();
    }
}

// ---- Operations of a warp. ----

void Emulator::do_warp(Block& block, Meeting& meeting, int warp) {
    std::vector<Operation>& lanes = meeting.operations;
    switch (lanes[0].kind) {
        case Kind::kShuffle: {
            std::uint32_t values[kWarpLanes];
            for (int lane = 0; lane < kWarpLanes; ++lane) {
                values[lane] = *lanes[static_cast<std::size_t>(lane)].words;
            }
            for (int lane = 0; lane < kWarpLanes; ++lane) {
                *lanes[static_cast<std::size_t>(lane)].words = values[lane ^ lanes[0].argument];
            }
            break;
        }
        case Kind::kLoadMatrix:
        case Kind::kStoreMatrix:
            // Matrix i, row r: the address of lane 8 i + r; its elements 2 p and 2 p + 1 in word i of lane 4 r + p.
            for (int matrix = 0; matrix < 4; ++matrix) {
                for (int row = 0; row < 8; ++row) {
                    const std::uint32_t address = lanes[static_cast<std::size_t>(8 * matrix + row)].address;
                    std::uint32_t words[4];
                    if (lanes[0].kind == Kind::kLoadMatrix) {
                        read_shared(block, address, words, kPieceBytes, "load_matrix");
                    }
                    for (int pair = 0; pair < 4; ++pair) {
                        std::uint32_t& word = lanes[static_cast<std::size_t>(4 * row + pair)].words[matrix];
                        lanes[0].kind == Kind::kLoadMatrix ? void(word = words[pair]) : void(words[pair] = word);
                    }
                    if (lanes[0].kind == Kind::kStoreMatrix) {
                        for (int lane = 4 * row; lane < 4 * row + 4; ++lane) {
                            write_shared(block, address, words, kPieceBytes, warp * kWarpLanes + lane);
                        }
                    }
                }
            }
            break;
        default:
            break;
    }
}

// ---- Operations of a warpgroup. ----

void Emulator::do_warpgroup(Block& block, Meeting& meeting, int warpgroup) {
    Warpgroup& group = block.products[static_cast<std::size_t>(warpgroup)];
    const Operation& first = meeting.operations[0];
    int& registers = block.registers[static_cast<std::size_t>(warpgroup)];
    switch (first.kind) {
        case Kind::kFewer:
        case Kind::kMore: {
            const int count = static_cast<int>(first.argument);
            if (count % 8 != 0 || count < 24 || count > 256 || (first.kind == Kind::kFewer) != (count <= registers)) {
                fail("a number of registers that cannot be");
            }
            block.free_registers += kWarpgroupThreads * (registers - count);
            registers = count;
            break;
        }
        case Kind::kFence:
            group.fenced = true;
            break;
        case Kind::kShared:
        case Kind::kRegisters:
            if (!group.fenced) {
                fail("a product without product_fence");
            }
            issue(block, group, meeting.operations);
            break;
        case Kind::kCommit:
            group.groups.push_back(std::move(group.open));
            group.open.clear();
            group.fenced = false;
            break;
        case Kind::kWait:
            while (static_cast<std::int64_t>(group.groups.size()) > first.argument) {
                for (Product& product : group.groups.front()) {
                    complete(block, group, product);
                }
                group.groups.pop_front();
            }
            break;
        default:
            break;
    }
}

// The operands' elements, a [64, 16] and b [n, 16], and the pieces of shared memory that hold them.
void Emulator::operands(Block& block, const Product& product, std::vector<float>& a, std::vector<float>& b,
                        std::vector<std::uint32_t>* pieces) {
    const Operation& operation = product.threads[0];
    const int columns = 2 * operation.count;
    a.assign(64 * 16, 0.0f);
    b.assign(static_cast<std::size_t>(columns) * 16, 0.0f);
    const auto element = [&](const Descriptor& descriptor, std::uint32_t offset) {
        const std::uint32_t address = swizzled(descriptor.start + offset);
        if (pieces != nullptr) {
            at(block, address, 2, "a product");
            if (block.loading[(address - kSharedStart) / kPieceBytes] != 0) {
                fail("a product reads what a load under way writes");
            }
            const std::uint32_t piece = address / kPieceBytes * kPieceBytes;
            if (pieces->empty() || pieces->back() != piece) {
                pieces->push_back(piece);
            }
        }
        std::uint16_t bits;
        read_shared(block, address, &bits, 2, "a product");
        return operation.convert(bits);
    };
    const auto check = [&](const Descriptor& descriptor) {
        // Only operands in whole atoms of 1024 bytes are known here, except for the step along the sum within one.
        if (descriptor.mode != 1 || descriptor.base != 0 || descriptor.stride != 1024) {
            fail("a descriptor that this emulation has not");
        }
    };
    if (operation.kind == Kind::kShared) {
        const Descriptor descriptor(operation.a);
        check(descriptor);
        for (std::uint32_t row = 0; row < 64; ++row) {
            for (std::uint32_t k = 0; k < 16; ++k) {
                a[row * 16 + k] = element(descriptor, row / 8 * descriptor.stride + row % 8 * 128 + 2 * k);
            }
        }
    } else {
        for (int thread = 0; thread < kWarpgroupThreads; ++thread) {
            const int warp = thread / 32, row = thread % 32 / 4, pair = thread % 4;
            const std::uint32_t* words = product.threads[static_cast<std::size_t>(thread)].registers;
            for (int i = 0; i < 4; ++i) {
                for (int half = 0; half < 2; ++half) {
                    // Rows r and r + 8 alternate; the second pair of registers is 8 columns on.
                    const int at_row = 16 * warp + row + (i == 1 || i == 3 ? 8 : 0);
                    const int k = 2 * pair + half + (i >= 2 ? 8 : 0);
                    a[static_cast<std::size_t>(at_row * 16 + k)] =
                        operation.convert(static_cast<std::uint16_t>(words[i] >> (16 * half)));
                }
            }
        }
    }
    const Descriptor descriptor(operation.b);
    check(descriptor);
    for (std::uint32_t column = 0; column < static_cast<std::uint32_t>(columns); ++column) {
        for (std::uint32_t k = 0; k < 16; ++k) {
            const std::uint32_t offset =
                operation.transposed
                    ? column / 64 * descriptor.leading + k / 8 * descriptor.stride + k % 8 * 128 + column % 64 * 2
                    : column / 8 * descriptor.stride + column % 8 * 128 + 2 * k;
            b[column * 16 + k] = element(descriptor, offset);
        }
    }
}

void Emulator::issue(Block& block, Warpgroup& group, const std::vector<Operation>& operations) {
    Product product;
    product.threads = operations;
    std::vector<float> a, b;
    operands(block, product, a, b, &product.bytes);
    std::sort(product.bytes.begin(), product.bytes.end());
    product.bytes.erase(std::unique(product.bytes.begin(), product.bytes.end()), product.bytes.end());
    for (const std::uint32_t piece : product.bytes) {
        ++block.reading[(piece - kSharedStart) / kPieceBytes];
    }
    // The accumulators are the product's own until it is waited for.
    for (const Operation& thread : operations) {
        auto& held = group.held[thread.d];
        if (held.second++ == 0) {
            held.first.assign(thread.d, thread.d + thread.count);
            if (late_) {
                std::fill_n(thread.d, thread.count, std::numeric_limits<float>::quiet_NaN());
            }
        }
    }
    if (!late_) {
        product.result = a;
        product.result.insert(product.result.end(), b.begin(), b.end());
    }
    group.open.push_back(std::move(product));
}

void Emulator::complete(Block& block, Warpgroup& group, Product& product) {
    std::vector<float> a, b;
    if (late_) {
        operands(block, product, a, b, nullptr);
    } else {
        a.assign(product.result.begin(), product.result.begin() + 64 * 16);
        b.assign(product.result.begin() + 64 * 16, product.result.end());
    }
    for (int thread = 0; thread < kWarpgroupThreads; ++thread) {
        const Operation& operation = product.threads[static_cast<std::size_t>(thread)];
        auto& held = group.held[operation.d];
        const int warp = thread / 32, row = thread % 32 / 4, pair = thread % 4;
        for (int i = 0; i < operation.count; ++i) {
            const std::size_t at_row = static_cast<std::size_t>(16 * warp + row + (i % 4 >= 2 ? 8 : 0));
            const std::size_t column = static_cast<std::size_t>(i / 4 * 8 + 2 * pair + i % 2);
            float sum = operation.accumulate ? held.first[static_cast<std::size_t>(i)] : 0.0f;
            for (std::size_t k = 0; k < 16; ++k) {
                sum += a[at_row * 16 + k] * b[column * 16 + k];
            }
            held.first[static_cast<std::size_t>(i)] = sum;
        }
        if (--held.second == 0) {
            std::copy(held.first.begin(), held.first.end(), operation.d);
            group.held.erase(operation.d);
        }
    }
    for (const std::uint32_t piece : product.bytes) {
        --block.reading[(piece - kSharedStart) / kPieceBytes];
    }
}

}  // namespace mtbert::machine
