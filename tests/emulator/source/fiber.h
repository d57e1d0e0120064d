// Fibers: functions that run on stacks of their own and hand over to one another, all on one OS thread.
#pragma once
#include <cstddef>

#if !defined(__x86_64__) || defined(MOE_ROUTE_EMULATOR_UCONTEXT)
#define EMULATOR_UCONTEXT 1
#include <ucontext.h>
#else
#define EMULATOR_UCONTEXT 0
#endif

#include <vector>

#include "sanitizer.h"

namespace emulator {

// Equally long stacks in one mapping, with a page between them that faults: an overflow never reaches a
// neighbor.
class Stacks {
 public:
  static constexpr size_t kBytes = sanitizer::kAddress ? 256 * 1024 : 64 * 1024;
  static constexpr int kMost = 1024;  // threads of a block

  Stacks();
  ~Stacks();
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;

  char* stack(int index);  // its lowest address
  void forget_frames();    // of fibers that were dropped: AddressSanitizer would hold them against later ones

 private:
  size_t page_;
  char* mapping_;
  int in_use_ = 0;
};

class Fiber {
 public:
  Fiber() = default;
  ~Fiber() { forget(); }
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // The next hand-over to this fiber calls `entry`, which must first call arrive() and must not return.
  // `index` spreads the stacks over the sets of the cache.
  void prepare(char* stack, int index, void (*entry)());
  void hand_over(Fiber& to);         // returns when this fiber is handed back to
  [[noreturn]] void end(Fiber& to);  // hands over for good
  // Of the fiber that has no stack of ours the bounds are learned.
  static void arrive(Fiber& caller_of_all);

  // For ThreadSanitizer, nothing otherwise.
  void adopt();   // the calling OS thread becomes this fiber
  void forget();  // it was dropped where it stood
  // All that these fibers have done happens before all that they will do.
  static void order(const std::vector<const Fiber*>& fibers, void* token);

 private:
  void switch_to(Fiber& to, void** fake_stack);

#if EMULATOR_UCONTEXT
  ucontext_t context_;
#else
  void* stack_pointer_ = nullptr;
#endif
  const void* stack_ = nullptr;
  size_t stack_bytes_ = 0;
  void* fake_stack_ = nullptr;
  void* thread_ = nullptr;  // ThreadSanitizer's
  bool own_thread_ = false;
};

}  // namespace emulator
