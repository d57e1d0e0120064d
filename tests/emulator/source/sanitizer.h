// Hooks of AddressSanitizer and ThreadSanitizer: nothing where they are off.
//
// ThreadSanitizer sees each CUDA thread as a thread. The emulator itself is not instrumented
// (CMakeLists.txt says EMULATOR_RACES instead), so what orders two accesses is what is said here: barriers
// and __syncwarp, and nothing else.
#pragma once
#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(EMULATOR_RACES)
#include <sanitizer/tsan_interface.h>
#endif

namespace emulator::sanitizer {

#if defined(__SANITIZE_ADDRESS__)
inline constexpr bool kAddress = true;
inline void poison(const void* address, size_t bytes) { __asan_poison_memory_region(address, bytes); }
inline void unpoison(const void* address, size_t bytes) { __asan_unpoison_memory_region(address, bytes); }
inline void start_switch(void** fake_stack, const void* stack, size_t bytes) {
  __sanitizer_start_switch_fiber(fake_stack, stack, bytes);
}
inline void finish_switch(void* fake_stack, const void** old_stack, size_t* old_bytes) {
  __sanitizer_finish_switch_fiber(fake_stack, old_stack, old_bytes);
}
#else
inline constexpr bool kAddress = false;
inline void poison(const void*, size_t) {}
inline void unpoison(const void*, size_t) {}
inline void start_switch(void**, const void*, size_t) {}
inline void finish_switch(void*, const void**, size_t*) {}
#endif

#if defined(EMULATOR_RACES)
inline constexpr bool kRaces = true;
inline void* this_thread() { return __tsan_get_current_fiber(); }
inline void* new_thread() { return __tsan_create_fiber(0); }
inline void forget_thread(void* thread) { __tsan_destroy_fiber(thread); }
inline void turn_to_thread(void* thread) { __tsan_switch_to_fiber(thread, __tsan_switch_to_fiber_no_sync); }
inline void release(void* token) { __tsan_release(token); }
inline void acquire(void* token) { __tsan_acquire(token); }
#else
inline constexpr bool kRaces = false;
inline void* this_thread() { return nullptr; }
inline void* new_thread() { return nullptr; }
inline void forget_thread(void*) {}
inline void turn_to_thread(void*) {}
inline void release(void*) {}
inline void acquire(void*) {}
#endif

}  // namespace emulator::sanitizer
