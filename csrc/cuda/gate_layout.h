// How a launch of the gate is cut into blocks, and what lies where in a block's shared memory. Host code
// decides, the kernels read.
#pragma once
#include <cstdint>

#include "launch.h"
#include "moe_route/gate.h"

namespace moe_route::cuda {

inline constexpr int kGateThreads = 128;               // 8 rows in flight
inline constexpr int kGateThreadsAboveRegisters = 32;  // more experts: 2 rows fill the shared memory

// Offsets in bytes from the start of a team's memory. First comes the block's statistics row, then every
// team's memory.
struct GateLayout {
  static constexpr int kKeys = 0;                 // short list: 66 keys ...
  static constexpr int kValues = kKeys + 66 * 8;  // ... and 64 values
  static constexpr int kSlots = kValues + 64 * 4;
  int ids = 0, logits = 0, weights = 0, natural = 0;                // by slot
  int logit_row = 0, value_row = 0, score_row = 0, member_row = 0;  // by expert
  int group_scores = 0;
  int team = 0;       // bytes of one team
  int block_row = 0;  // bytes of the block's statistics row; 0: it has none
  int shared_bytes = 0;
  // Are logits kept beside the values that selection compares, or looked up by id?
  bool keeps_logits = false;
};

// How much of the contract a launch needs; a kernel that can do less needs fewer registers, so more rows are
// in flight.
enum class Level : int {
  kPlain = 0,   // choose, weigh, count the chosen
  kScored = 1,  // and group limits, and what counts the scores of all experts: mass, entropy
  kFull = 2,    // and everything else: steering, given choices, SparseMixer, natural counts
};

// Most experts whose values a row keeps in registers; beside what the full level needs fewer fit.
constexpr int register_experts(Level level) { return level == Level::kFull ? 256 : 512; }

// Blocks that a multiprocessor is to hold at once: what its registers allow without a spill.
constexpr int blocks_at_once(int vectors, Level level) {
  constexpr int up_to_64[] = {6, 5, 4}, up_to_128[] = {6, 4, 3}, up_to_256[] = {4, 3, 2}, more[] = {3, 2, 2};
  const int which = static_cast<int>(level);
  if (vectors == 0) return 1;
  return vectors <= 4    ? up_to_64[which]
         : vectors <= 8  ? up_to_128[which]
         : vectors <= 16 ? up_to_256[which]
                         : more[which];
}

struct GateLaunch {
  GateArgs args;
  GateLayout layout;
  Level level = Level::kFull;
  int64_t rows_per_block = 0;
  int64_t blocks = 0;
};

// Enqueues the launch for rows of up to 16 * kVectors experts; kVectors = 0: for any number.
template <int kVectors>
void launch_gate(const GateLaunch& gate, Stream stream);

// Loads the kernel that such a launch needs.
template <int kVectors>
void load_gate(Level level);

}  // namespace moe_route::cuda
