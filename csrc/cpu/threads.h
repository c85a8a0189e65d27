// Work on several threads, and memory that a thread keeps.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mtbert {

// Calls work(context, begin, end) so that every item in [0, items) is covered once, in chunks of `chunk` items, on up to
// `threads` threads, and returns when all are done. Which thread takes a chunk is not fixed: an item's result must
// not depend on it.
void parallel_for(std::int64_t items, std::int64_t chunk, int threads,
                  void (*work)(void* context, std::int64_t begin, std::int64_t end), void* context);

// At least `bytes` bytes aligned to 64, kept for this thread's next call in the same slot; contents are undefined.
enum class Scratch { kItem, kCall };
void* thread_scratch(Scratch slot, std::size_t bytes);

// Which threads parallel_for uses: "openmp" (those of the runtime that PyTorch has loaded) or "own".
const char* thread_source();

}  // namespace mtbert
