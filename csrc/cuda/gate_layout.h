// How a launch of the gate is cut into blocks, and what lies where in a block's shared memory. Host code
// decides, the kernels read.
#pragma once
#include <cstdint>

#include "launch.h"
#include "moe_route/gate.h"

namespace moe_route::cuda {

// Offsets in bytes into a block's (one warp's) memory: the block's statistics row, then the warp's own, which
// begins with its Selection (gate_select.cuh).
struct GateLayout {
  static constexpr int kSelection = 1888;
  int logit_row = 0, value_row = 0, score_row = 0, member_row = 0;  // by expert
  int group_scores = 0;
  int block_row = 0;  // bytes of the block's statistics row; 0: it has none
  int tile = 0;       // where tiles lie in the warp's memory
  int shared_bytes = 0;
  bool bfloat16 = false;      // logits are; apart from their type, so that no jump table is made of it
  bool whole_planes = false;  // four entries of a steering plane may be read in one load
  bool whole_slots = false;   // eight ids or weights of a token may be written in two stores
  // Of the tables: elements of a row, and where a row's planes begin, by bit_index().
  int steering_rows = 0, steering_stride = 0, steering_plane[7] = {};
  int statistics_width = 0, statistics_plane[5] = {};
  uint32_t group_reciprocal = 0;  // 2^32 / (experts of a group), rounded up; 0 for one expert
  // Softmax whose sum over all experts cancels, unless a bias weighs; scores decide, not logits.
  bool softmax_of_chosen = false, compares_scores = false;
  bool softmax_of_all = false;  // ... and does not cancel
  // Are logits kept beside the values that selection compares, or looked up by id?
  bool keeps_logits = false;
  bool whole_tokens = false;     // a token's columns may be read in one load
  int groups = 0, segments = 0;  // rows of the statistics tables, 0 for no table
};

// 1, 2, 4, ... -> 0, 1, 2, ...
__host__ __device__ constexpr int bit_index(uint32_t bit) { return bit <= 1 ? 0 : 1 + bit_index(bit >> 1); }

// How much of the contract a launch needs; a kernel that can do less needs fewer registers, so more rows are
// in flight.
enum class Level : int {
  kPlain = 0,   // choose, weigh, count the chosen
  kScored = 1,  // and group limits, and what counts the scores of all experts: mass, entropy
  kSoft = 2,    // and steering by kSoftPlanes and row parameters
  kFull = 3,    // and all else: force, other planes, remap, given choices, SparseMixer, softcap, natural
};
inline constexpr uint32_t kSoftPlanes = kScale | kBias | kStd | kMagnitude;

// Most experts whose values a row keeps in registers; beside what the full level needs fewer fit.
constexpr int register_experts(Level level) { return level == Level::kFull ? 256 : 512; }

// Slots of the chosen that a lane holds.
constexpr int slots_of_lane(int values) { return values > 0 ? 1 : 2; }

// Most blocks that a multiprocessor holds: ptxas refuses to be asked for more.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 870)
constexpr int kMostBlocks = 16;
#elif defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1100)
constexpr int kMostBlocks = 24;
#else
constexpr int kMostBlocks = 32;
#endif

// Blocks (warps) that a multiprocessor is to hold at once: what its registers allow without a spill, on every
// architecture.
constexpr int blocks_at_once(int values, Level level, bool common) {
  constexpr int blocks[2][3][4] = {{{24, 20, 16, 8}, {20, 16, 12, 8}, {14, 10, 8, 8}},
                                   {{32, 32, 20, 8}, {24, 20, 14, 8}, {16, 12, 8, 8}}};
  if (values == 0) return 1;
  const int wanted = blocks[common ? 1 : 0][values <= 4 ? 0 : values <= 8 ? 1 : 2][static_cast<int>(level)];
  return wanted < kMostBlocks ? wanted : kMostBlocks;
}

struct GateLaunch {
  GateArgs args;
  GateLayout layout;
  Level level = Level::kFull;
  // The router that most models have, in rows of whole lanes: softmax over the chosen alone, without bias, scale
  // or groups. Levels below kFull have kernels that leave the rest of GateSpec out.
  bool common = false;
  bool tiles = false;  // ... and many rows: gate_tile.cuh
  int rows_per_block = 0;
  int64_t blocks = 0;
};

// Widths that have kernels for tiles, and bytes of one: 32 rows, and a list for each.
constexpr bool has_tiles(int values) { return values == 1 || values == 2 || values == 4 || values == 8; }
constexpr int tiles_at_once(int values) { return values <= 2 ? 12 : values == 4 ? 9 : 5; }
constexpr int tile_bytes(int experts) { return (32 * (experts + 4) + 25 * 2 * 32) * 4; }

// Enqueues the launch for rows of up to 32 * kValues experts; kValues = 0: for any number.
template <int kValues>
void launch_gate(const GateLaunch& gate, Stream stream);

// Loads the kernel that such a launch needs.
template <int kValues>
void load_gate(Level level);

}  // namespace moe_route::cuda
