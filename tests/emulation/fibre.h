// Fibres: stacks that the scheduler switches between by hand. A switch is a few nanoseconds on x86-64 and aarch64,
// where it saves what the calling convention asks a function to preserve; elsewhere (or with
// MTBERT_EMULATION_UCONTEXT) ucontext does it, with two system calls.
#pragma once

#include <cstddef>

#if (defined(__x86_64__) || defined(__aarch64__)) && !defined(MTBERT_EMULATION_UCONTEXT)
#define MTBERT_EMULATION_SWITCH 1
#else
#include <ucontext.h>
#endif

namespace mtbert::machine::host {

// Where a flow of control stands while another one runs. A default one is filled by the first switch away from it.
struct Context {
    void* stack_pointer = nullptr;
#ifndef MTBERT_EMULATION_SWITCH
    ucontext_t registers = {};
#endif
    // What AddressSanitizer has to be told; the bounds of a stack that the system gave are found at the first switch.
    const void* stack = nullptr;
    std::size_t stack_bytes = 0;
    void* fake_stack = nullptr;
};

// A stack with a page below it that faults.
class Stack {
   public:
    Stack();
    ~Stack();
    Stack(const Stack&) = delete;
    Stack& operator=(const Stack&) = delete;

    // A context that will run entry() from its beginning on this stack; entry must not return. What ran on the stack
    // before is forgotten.
    void prepare(Context& context, void (*entry)());

   private:
    char* memory_;
};

// Goes on in `to` and returns when something switches to `from`.
void switch_context(Context& from, Context& to);

// The first call of a fibre's entry(): `from` is the context that switched to it.
void started(Context& from);

}  // namespace mtbert::machine::host
