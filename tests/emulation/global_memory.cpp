#include "global_memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <new>
#include <stdexcept>

namespace mtbert::machine::host {
namespace {

// Each buffer stands alone in a stretch of addresses, so that a pointer that strays is still known to be its.
constexpr std::size_t kMargin = std::size_t{64} << 20;
constexpr std::size_t kRoom = 256;  // on either side, to place the data aligned to no more than what was asked for

}  // namespace

Buffer::~Buffer() {
    if (stretch != nullptr) {
        munmap(stretch, stretch_bytes);
    }
}

Buffer& GlobalMemory::add(const char* name, const void* data, void* back, std::size_t bytes, bool writable,
                          bool initialised, int alignment) {
    if (alignment < 1 || alignment > static_cast<int>(kRoom) || (alignment & (alignment - 1)) != 0) {
        throw std::invalid_argument(std::string(name) + ": alignment is " + std::to_string(alignment) +
                                    ", expected a power of two up to 256");
    }
    const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    const std::size_t inner = (bytes + 2 * kRoom + page - 1) / page * page;
    auto buffer = std::make_unique<Buffer>();
    void* const stretch =
        mmap(nullptr, inner + 2 * kMargin, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stretch == MAP_FAILED) {
        throw std::bad_alloc();
    }
    buffer->name = name;
    buffer->stretch = static_cast<char*>(stretch);
    buffer->stretch_bytes = inner + 2 * kMargin;
    if (mprotect(buffer->stretch + kMargin, inner, PROT_READ | PROT_WRITE) != 0) {
        throw std::bad_alloc();
    }
    buffer->data = buffer->stretch + kMargin + static_cast<std::size_t>(alignment);
    buffer->bytes = bytes;
    buffer->back = back;
    buffer->writable = writable;
    buffer->shadow = Shadow(name);
    buffer->shadow.reset(writable ? bytes : 0, initialised);
    if (data != nullptr) {
        std::memcpy(buffer->data, data, bytes);
    }
    buffers_.push_back(std::move(buffer));
    return *buffers_.back();
}

Buffer* GlobalMemory::find(const void* address, std::size_t bytes, std::size_t alignment, std::string& problem) {
    const auto* const place = static_cast<const char*>(address);
    const auto holds = [place](const Buffer& b) {
        return place >= b.stretch && place < b.stretch + b.stretch_bytes;
    };
    if (last_ == nullptr || !holds(*last_)) {
        last_ = nullptr;
        for (const auto& buffer : buffers_) {
            if (holds(*buffer)) {
                last_ = buffer.get();
            }
        }
    }
    if (last_ == nullptr) {
        problem = std::to_string(bytes) + " bytes " +
                  (address == nullptr ? "at a null pointer" : "at an address far from every buffer");
        return nullptr;
    }
    Buffer& b = *last_;
    const std::ptrdiff_t offset = place - b.data;
    const bool inside = offset >= 0 && static_cast<std::size_t>(offset) + bytes <= b.bytes;
    const bool aligned = reinterpret_cast<std::uintptr_t>(address) % alignment == 0;
    if (inside && aligned) {
        return &b;
    }
    problem = std::to_string(bytes) + " bytes at byte " + std::to_string(offset) + " of " + b.name;
    problem += inside ? ", not aligned to " + std::to_string(alignment)
                      : ", out of bounds: it has " + std::to_string(b.bytes);
    return nullptr;
}

void GlobalMemory::copy_back() const {
    for (const auto& buffer : buffers_) {
        if (buffer->back != nullptr) {
            std::memcpy(buffer->back, buffer->data, buffer->bytes);
        }
    }
}

}  // namespace mtbert::machine::host
