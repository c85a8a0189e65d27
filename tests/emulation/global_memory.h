// Device buffers of exact sizes, and the checks of every access to them.
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <vector>

#include "shadow.h"

namespace mtbert::machine::host {

struct Buffer {
    ~Buffer();

    std::string name;
    char* stretch = nullptr;  // addresses that fault, around those of the data
    std::size_t stretch_bytes = 0;
    char* data = nullptr;
    std::size_t bytes = 0;
    void* back = nullptr;  // where the data goes in the end, or null
    bool writable = false;
    Shadow shadow;  // of a writable buffer
};

class GlobalMemory {
   public:
    // Adds a buffer whose address is a multiple of alignment (a power of two up to 256) and of nothing larger up to
    // 256. data: its first contents, or null. Throws std::invalid_argument or std::bad_alloc.
    Buffer& add(const char* name, const void* data, void* back, std::size_t bytes, bool writable, bool initialised,
                int alignment);

    // The buffer that holds all of [address, address + bytes), with address a multiple of alignment; else null, and
    // what is wrong.
    Buffer* find(const void* address, std::size_t bytes, std::size_t alignment, std::string& problem);

    void copy_back() const;

   private:
    std::vector<std::unique_ptr<Buffer>> buffers_;
    Buffer* last_ = nullptr;
};

}  // namespace mtbert::machine::host
