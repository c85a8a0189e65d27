#include "fibre.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(MTBERT_EMULATION_SWITCH) && defined(__x86_64__)
asm(R"(
    .text
    .type mtbert_emulation_switch, @function
    .hidden mtbert_emulation_switch
    .globl mtbert_emulation_switch
mtbert_emulation_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size mtbert_emulation_switch, . - mtbert_emulation_switch
)");
#elif defined(MTBERT_EMULATION_SWITCH)
asm(R"(
    .text
    .type mtbert_emulation_switch, %function
    .hidden mtbert_emulation_switch
    .globl mtbert_emulation_switch
mtbert_emulation_switch:
    sub sp, sp, #160
    stp x19, x20, [sp, #0]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp, #0]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
    .size mtbert_emulation_switch, . - mtbert_emulation_switch
)");
#endif

// Saves the preserved registers on this stack, its pointer in *save, and goes on with those that lie at `load`.
extern "C" void mtbert_emulation_switch(void** save, void* load);

namespace mtbert::machine::host {
namespace {

// Accumulators, fragments and what the compiler spills; sanitizers put red zones around each.
constexpr std::size_t kStackBytes = 256 * 1024;

std::size_t page() { return static_cast<std::size_t>(sysconf(_SC_PAGESIZE)); }

}  // namespace

Stack::Stack() {
    void* memory = mmap(nullptr, kStackBytes + page(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) {
        throw std::bad_alloc();
    }
    memory_ = static_cast<char*>(memory);
    mprotect(memory_, page(), PROT_NONE);
}

Stack::~Stack() { munmap(memory_, kStackBytes + page()); }

void Stack::prepare(Context& context, void (*entry)()) {
    char* const bottom = memory_ + page();
    context.stack = bottom;
    context.stack_bytes = kStackBytes;
    context.fake_stack = nullptr;
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(bottom, kStackBytes);
#endif
    const auto entry_bits = reinterpret_cast<std::uintptr_t>(entry);
#if defined(MTBERT_EMULATION_SWITCH) && defined(__x86_64__)
    // Six registers, then where the switch returns to; with that taken off, the stack is as a call leaves it.
    char* const start = bottom + kStackBytes - 64;
    std::memset(start, 0, 64);
    std::memcpy(start + 48, &entry_bits, sizeof entry_bits);
    context.stack_pointer = start;
#elif defined(MTBERT_EMULATION_SWITCH)
    char* const start = bottom + kStackBytes - 160;
    std::memset(start, 0, 160);
    std::memcpy(start + 88, &entry_bits, sizeof entry_bits);  // the link register
    context.stack_pointer = start;
#else
    static_cast<void>(entry_bits);
    getcontext(&context.registers);
    context.registers.uc_stack.ss_sp = bottom;
    context.registers.uc_stack.ss_size = kStackBytes;
    context.registers.uc_link = nullptr;
    makecontext(&context.registers, entry, 0);
#endif
}

void switch_context(Context& from, Context& to) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&from.fake_stack, to.stack, to.stack_bytes);
#endif
#ifdef MTBERT_EMULATION_SWITCH
    mtbert_emulation_switch(&from.stack_pointer, to.stack_pointer);
#else
    swapcontext(&from.registers, &to.registers);
#endif
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

void started([[maybe_unused]] Context& from) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &from.stack, &from.stack_bytes);
#endif
}

}  // namespace mtbert::machine::host
