// The dynamic shared memory of the block that an OS thread runs.
#pragma once
#include <cstddef>

namespace emulator {

// What hardware of compute capability 9.0 offers.
inline constexpr size_t kSharedWithoutAsking = 48 * 1024;
inline constexpr size_t kSharedPerBlock = 227 * 1024;
inline constexpr size_t kSharedPerMultiprocessor = 228 * 1024;
inline constexpr size_t kSharedReserved = 1024;

// Lends `bytes` of moe_route_shared to a block, filled with 0xFF (NaN, -1): a read before a write shows. What
// lies behind is poisoned under AddressSanitizer and holds a pattern otherwise, whose loss is an overrun.
class SharedMemory {
 public:
  explicit SharedMemory(size_t bytes);
  ~SharedMemory();
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;
  bool overrun() const;

 private:
  size_t bytes_;
};

}  // namespace emulator
