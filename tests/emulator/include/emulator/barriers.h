// Barriers of a block. Threads of one block must wait at one and the same barrier in the source; threads that
// have returned count as arrived, as on hardware.
#pragma once
#include <cstdint>
#include <source_location>

namespace emulator {

using Place = std::source_location;  // of a call in the kernel's source

enum class Vote : uint8_t { kNone, kCount, kAnd, kOr };
uint32_t block_barrier(Vote vote, bool predicate, const Place& place);
void yield();  // lets the other threads of the block run
// griddepcontrol.wait. Launches run one after the other here; of those that need not, it is seen whether they wait.
void wait_for_earlier_grids();

}  // namespace emulator

#define EMULATOR_PLACE const emulator::Place& place = emulator::Place::current()

inline void __syncthreads(EMULATOR_PLACE) { emulator::block_barrier(emulator::Vote::kNone, false, place); }
inline int __syncthreads_count(int predicate, EMULATOR_PLACE) {
  return static_cast<int>(emulator::block_barrier(emulator::Vote::kCount, predicate != 0, place));
}
inline int __syncthreads_and(int predicate, EMULATOR_PLACE) {
  return static_cast<int>(emulator::block_barrier(emulator::Vote::kAnd, predicate != 0, place));
}
inline int __syncthreads_or(int predicate, EMULATOR_PLACE) {
  return static_cast<int>(emulator::block_barrier(emulator::Vote::kOr, predicate != 0, place));
}
inline void __nanosleep(unsigned) { emulator::yield(); }
