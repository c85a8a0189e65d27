// Who touched which bytes last, and whether that is ordered before what happens now. Happens-before is kept as two
// epochs from one clock that only grows: a block's epoch begins with each of its block barriers, a warp's with each of
// its warp barriers. Two accesses are ordered if one thread made both, if they lie in different launches, in different
// epochs of one block, or, in one warp, in different epochs of the warp. Blocks of one launch are not ordered.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace mtbert::machine::host {

// When the launch and the block began; what was touched before the launch is ordered before all of it.
struct Beginnings {
    std::uint32_t launch = 0;
    std::uint32_t block = 0;
};

struct Who {
    int thread = 0;
    bool whole_warp = false;  // all lanes of the thread's warp at once
    std::uint32_t block_epoch = 0;
    std::uint32_t warp_epoch = 0;
};

class Shadow {
   public:
    // Accesses are of even sizes at even offsets, so two bytes share a record.
    static constexpr std::size_t kGrain = 2;

    // What the memory is called in errors; block_local: every block has its own, which begins without values.
    explicit Shadow(std::string name = {}, bool block_local = false)
        : name_(std::move(name)), block_local_(block_local) {}

    // Forgets everything. initialised: the memory holds values that no write is needed for.
    void reset(std::size_t bytes, bool initialised);

    // Each takes `bytes` bytes from byte `offset` on, which are in range, and returns what is wrong with the access,
    // or "".
    std::string read(const Beginnings& now, const Who& who, std::size_t offset, std::size_t bytes);
    std::string write(const Beginnings& now, const Who& who, std::size_t offset, std::size_t bytes);
    // A write that is under way until land() by the same thread.
    std::string begin(const Beginnings& now, const Who& who, std::size_t offset, std::size_t bytes);
    void land(const Who& who, std::size_t offset, std::size_t bytes);

   private:
    struct Touch {
        std::uint32_t block_epoch = 0;  // 0: never
        std::uint32_t warp_epoch = 0;
        std::uint16_t thread = 0;
        bool whole_warp = false;
    };
    struct Grain {
        Touch writer;                      // the last one
        Touch reader;                      // the last one since then; earlier ones are ordered before it, or it is ...
        bool many_warps = false;           // ... one of several in the same epoch of the block
        std::uint32_t many_blocks = 0;     // the launch in which blocks before the reader's read it too
        std::uint32_t pending_block = 0;   // the block in which a copy is under way to it
        std::uint16_t pending_thread = 0;
    };

    // The first moment whose accesses need an order: earlier ones were to other memory, or are ordered by the launch.
    std::uint32_t beginning(const Beginnings& now) const { return block_local_ ? now.block : now.launch; }
    bool ordered(const Beginnings& now, const Who& who, const Touch& touch) const;
    std::string check_write(const Beginnings& now, const Who& who, std::size_t grain) const;
    std::string pending(const Beginnings& now, std::size_t grain, const char* deed) const;
    std::string race(const Beginnings& now, std::size_t grain, const Touch& touch, const char* deed,
                     const char* earlier) const;
    std::string at(std::size_t grain) const;

    std::string name_;
    bool block_local_;
    std::vector<Grain> grains_;
    bool initialised_ = false;
};

}  // namespace mtbert::machine::host
