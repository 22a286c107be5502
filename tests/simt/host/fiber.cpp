#include "host/fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// Only what a called function must preserve is saved: a switch is a call.
#if defined(__x86_64__)
extern "C" void sparseprune_simt_switch(void** save, void* load);
asm(R"(
.text
.p2align 4
.hidden sparseprune_simt_switch
.globl sparseprune_simt_switch
.type sparseprune_simt_switch,@function
sparseprune_simt_switch:
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
  popq %rcx
  jmpq *%rcx
.size sparseprune_simt_switch,.-sparseprune_simt_switch
)");
#elif defined(__aarch64__)
extern "C" void sparseprune_simt_switch(void** save, void* load);
asm(R"(
.text
.p2align 4
.hidden sparseprune_simt_switch
.globl sparseprune_simt_switch
.type sparseprune_simt_switch,%function
sparseprune_simt_switch:
  sub sp, sp, #160
  stp x19, x20, [sp]
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
  ldp x19, x20, [sp]
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
  br x30
.size sparseprune_simt_switch,.-sparseprune_simt_switch
)");
#endif

namespace sparseprune::simt {

namespace {

constexpr std::size_t kStackBytes = 128 * 1024;  // reserved; a kernel touches a few pages of it
constexpr std::size_t kStacksAtOnce = 128;

// Stacks are kept for the life of the process. The lowest page of each is not memory: an overflow is a segmentation fault.
char* stack_at(unsigned index) {
  static std::vector<char*> pools;
  while (index >= pools.size() * kStacksAtOnce) {
    void* p = mmap(nullptr, kStacksAtOnce * kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                   -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    char* const pool = static_cast<char*>(p);
    const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    for (std::size_t i = 0; i < kStacksAtOnce; ++i) {
      if (mprotect(pool + i * kStackBytes, page, PROT_NONE) != 0) throw std::bad_alloc();
    }
    pools.push_back(pool);
  }
  return pools[index / kStacksAtOnce] + index % kStacksAtOnce * kStackBytes;
}

Context* came_from = nullptr;  // of the switch under way, for AddressSanitizer

void raw_switch(Context& from, Context& to) {
#if defined(SIMT_UCONTEXT)
  swapcontext(&from.saved, &to.saved);
#else
  sparseprune_simt_switch(&from.stack_pointer, to.stack_pointer);
#endif
}

void finish_switch([[maybe_unused]] void* fake_stack) {
#if defined(__SANITIZE_ADDRESS__)
  const void* stack = nullptr;
  std::size_t bytes = 0;
  __sanitizer_finish_switch_fiber(fake_stack, &stack, &bytes);
  if (came_from->stack == nullptr) came_from->stack = stack, came_from->stack_bytes = bytes;  // the thread's own
#endif
}

}  // namespace

void switch_context(Context& from, Context& to) {
  came_from = &from;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&from.fake_stack, to.stack, to.stack_bytes);
#endif
  raw_switch(from, to);
  finish_switch(from.fake_stack);
}

void leave_context(Context& from, Context& to) {
  came_from = &from;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(nullptr, to.stack, to.stack_bytes);
#endif
  raw_switch(from, to);
  __builtin_unreachable();
}

void enter_context() {
  finish_switch(nullptr);
}

void prepare_context(Context& context, unsigned index, void (*entry)()) {
  char* const stack = stack_at(index);
  context.stack = stack;
  context.stack_bytes = kStackBytes;
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(stack + 4096, kStackBytes - 4096);
#endif
  // Tops a stack's size apart would share cache sets: they are spread over a page.
  char* const top = stack + kStackBytes - 64 - index % 32 * 128;
#if defined(SIMT_UCONTEXT)
  getcontext(&context.saved);
  context.saved.uc_stack.ss_sp = stack;
  context.saved.uc_stack.ss_size = static_cast<std::size_t>(top - stack);
  context.saved.uc_link = nullptr;
  makecontext(&context.saved, entry, 0);
#elif defined(__x86_64__)
  // From below: six registers, the entry, and a return address of 0, above which the ABI wants 16 bytes' alignment.
  std::uintptr_t frame[8] = {0, 0, 0, 0, 0, 0, reinterpret_cast<std::uintptr_t>(entry), 0};
  std::memcpy(top - sizeof frame, frame, sizeof frame);
  context.stack_pointer = top - sizeof frame;
#else
  std::uintptr_t frame[20] = {};
  frame[11] = reinterpret_cast<std::uintptr_t>(entry);  // x30
  std::memcpy(top - sizeof frame, frame, sizeof frame);
  context.stack_pointer = top - sizeof frame;
#endif
}

}  // namespace sparseprune::simt
