#include "cpu/threads.h"

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <dlfcn.h>
#include <link.h>
#include <pthread.h>

#include <cstring>
#endif

namespace mtbert {
namespace {

// One parallel_for: threads take chunks until none is left.
struct Loop {
    std::int64_t items;
    std::int64_t chunk;
    void (*work)(void*, std::int64_t, std::int64_t);
    void* context;
    std::atomic<std::int64_t> next{0};

    void run() {
        for (;;) {
            const std::int64_t begin = next.fetch_add(chunk, std::memory_order_relaxed);
            if (begin >= items) return;
            const std::int64_t end = begin + chunk < items ? begin + chunk : items;
            work(context, begin, end);
        }
    }
};

// Workers that sleep between loops. Used where no OpenMP runtime is loaded, and in a forked child, which has no other
// thread and whose OpenMP runtime does not know that.
class Pool {
public:
    void run(Loop& loop, int threads) {
        // One loop at a time: a second caller, or a nested call, works alone.
        std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
        if (!turn.owns_lock()) {
            loop.run();
            return;
        }
        {
            std::lock_guard<std::mutex> lock(mutex_);
            while (static_cast<int>(workers_.size()) < threads - 1) {
                const int index = static_cast<int>(workers_.size());
                workers_.emplace_back([this, index, seen = generation_]() mutable { serve(index, seen); });
                workers_.back().detach();
            }
            loop_ = &loop;
            wanted_ = threads - 1;
            pending_ = threads - 1;
            ++generation_;
        }
        wake_.notify_all();
        loop.run();
        std::unique_lock<std::mutex> lock(mutex_);
        done_.wait(lock, [this] { return pending_ == 0; });
        loop_ = nullptr;
    }

private:
    void serve(int index, std::uint64_t seen) {
        for (;;) {
            Loop* loop;
            {
                std::unique_lock<std::mutex> lock(mutex_);
                wake_.wait(lock, [&] { return generation_ != seen; });
                seen = generation_;
                if (index >= wanted_) continue;
                loop = loop_;
            }
            loop->run();
            std::lock_guard<std::mutex> lock(mutex_);
            if (--pending_ == 0) done_.notify_one();
        }
    }

    std::mutex turn_;
    std::mutex mutex_;
    std::condition_variable wake_;
    std::condition_variable done_;
    std::vector<std::thread> workers_;
    Loop* loop_ = nullptr;
    int wanted_ = 0;
    int pending_ = 0;
    std::uint64_t generation_ = 0;
};

// Never destroyed: workers may still sleep in it when the process ends.
std::atomic<Pool*> pool{nullptr};

Pool& own_pool() {
    Pool* current = pool.load();
    if (current == nullptr) {
        Pool* fresh = new Pool;
        if (pool.compare_exchange_strong(current, fresh)) return *fresh;
        delete fresh;
    }
    return *current;
}

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

std::atomic<bool> in_forked_child{false};

#if defined(__linux__)
void after_fork_in_child() {
    // The parent's workers do not exist here: forget its pool and start another when needed.
    in_forked_child = true;
    pool = nullptr;
}

// When the module is loaded, so that no fork goes unnoticed.
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, after_fork_in_child);

int find_openmp(dl_phdr_info* info, std::size_t, void* found) {
    const char* path = info->dlpi_name;
    const char* slash = path == nullptr ? nullptr : std::strrchr(path, '/');
    const char* name = slash == nullptr ? path : slash + 1;
    if (name == nullptr) return 0;
    for (const char* known : {"libgomp", "libiomp5", "libomp"}) {
        if (std::strncmp(name, known, std::strlen(known)) != 0) continue;
        void* library = dlopen(path, RTLD_NOW | RTLD_NOLOAD);
        if (library == nullptr) continue;
        void* symbol = dlsym(library, "GOMP_parallel");
        if (symbol != nullptr) {
            *static_cast<void**>(found) = symbol;
            return 1;
        }
    }
    return 0;
}
#endif

// PyTorch's matrix products leave their OpenMP threads spinning for a while; a second set of threads would fight them
// for the cores. So the same runtime is used, through the entry point that GCC compiles parallel regions to.
GompParallel openmp_parallel() {
#if defined(__linux__)
    static const GompParallel parallel = [] {
        void* found = nullptr;
        dl_iterate_phdr(find_openmp, &found);
        return reinterpret_cast<GompParallel>(found);
    }();
    return in_forked_child ? nullptr : parallel;
#else
    return nullptr;
#endif
}

struct Block {
    void* pointer = nullptr;
    std::size_t bytes = 0;
    ~Block() { std::free(pointer); }
};

}  // namespace

void parallel_for(std::int64_t items, std::int64_t chunk, int threads,
                  void (*work)(void*, std::int64_t, std::int64_t), void* context) {
    if (items <= 0) return;
    const std::int64_t chunks = (items + chunk - 1) / chunk;
    if (chunks < threads) threads = static_cast<int>(chunks);
    if (threads <= 1) {
        work(context, 0, items);
        return;
    }
    Loop loop{items, chunk, work, context, {}};
    if (const GompParallel parallel = openmp_parallel()) {
        parallel([](void* data) { static_cast<Loop*>(data)->run(); }, &loop, static_cast<unsigned>(threads), 0);
    } else {
        own_pool().run(loop, threads);
    }
}

void* thread_scratch(Scratch slot, std::size_t bytes) {
    static thread_local Block blocks[2];
    Block& block = blocks[static_cast<int>(slot)];
    if (block.bytes < bytes) {
        std::free(block.pointer);
        block.bytes = 0;
        const std::size_t rounded = (bytes + 4095) / 4096 * 4096;
        block.pointer = std::aligned_alloc(64, rounded);
        if (block.pointer == nullptr) throw std::bad_alloc();
        block.bytes = rounded;
    }
    return block.pointer;
}

const char* thread_source() { return openmp_parallel() != nullptr ? "openmp" : "own"; }

}  // namespace mtbert
