#include "shared_memory.h"

#include <algorithm>
#include <cstring>

#include "sanitizer.h"

namespace {
constexpr size_t kGuard = 4096;
constexpr unsigned char kGuardByte = 0xc9;
}  // namespace

// Named by csrc/cuda/launch.h.
alignas(128) thread_local unsigned char moe_route_shared[emulator::kSharedPerBlock + kGuard];

namespace emulator {

SharedMemory::SharedMemory(size_t bytes) : bytes_(bytes) {
  std::memset(moe_route_shared, 0xff, bytes);
  std::memset(moe_route_shared + bytes, kGuardByte, kGuard);
  sanitizer::poison(moe_route_shared + bytes, sizeof moe_route_shared - bytes);
}

SharedMemory::~SharedMemory() { sanitizer::unpoison(moe_route_shared, sizeof moe_route_shared); }

bool SharedMemory::overrun() const {
  if (sanitizer::kAddress) return false;  // would have been reported where it happened
  const unsigned char* guard = moe_route_shared + bytes_;
  return std::any_of(guard, guard + kGuard, [](unsigned char byte) { return byte != kGuardByte; });
}

}  // namespace emulator
