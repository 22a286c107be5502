// Fibers: a stack each, and a switch that costs a few nanoseconds. One operating system thread runs them all.
#pragma once

#include <cstddef>

#if !defined(__x86_64__) && !defined(__aarch64__)
#define SIMT_UCONTEXT
#endif
#if defined(SIMT_UCONTEXT)
#include <ucontext.h>
#endif

namespace sparseprune::simt {

// What a suspended fiber (or the thread that runs the fibers) needs in order to go on.
struct Context {
#if defined(SIMT_UCONTEXT)
  ucontext_t saved;
#else
  void* stack_pointer = nullptr;
#endif
  const void* stack = nullptr;  // lowest address; null: the thread's own
  std::size_t stack_bytes = 0;
  void* fake_stack = nullptr;  // AddressSanitizer's
};

// Suspends `from`, which is running, and continues `to`.
void switch_context(Context& from, Context& to);
// As switch_context; `from` is never continued.
[[noreturn]] void leave_context(Context& from, Context& to);
// A fiber that will run `entry`, which must not return, on stack `index`. What ran there before is forgotten.
void prepare_context(Context& context, unsigned index, void (*entry)());
// A new fiber's first act.
void enter_context();

}  // namespace sparseprune::simt
