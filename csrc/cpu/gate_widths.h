// Which way of the gate serves a call, by instruction set: the one table of these choices.
//
// Three ways give the same bits: each row by itself (gate_row.h), sixteen rows side by side (gate_block.h, without a book
// of each row where all are steered alike), and sixteen rows of few experts from load to count (gate_few.h). MOE_ROUTE_ISA chooses the instruction set, and with it
// the row of the table. Side by side begins where calls of so many rows, timed in turns with the other way, took less
// time at 64, 128 and 256 experts; `moe-route bench --tokens N` times a call, tests/gate_cost.py counts it.
#pragma once
#include "moe_route/gate.h"

namespace moe_route::cpu {
namespace {

inline constexpr int64_t kNever = int64_t{1} << 62;

struct Widths {
  int64_t side_by_side;  // rows of a call from which on they go side by side
  int64_t few_rows;      // ... and from which on they go from load to count, if there are at most so many
  int few_experts;       // experts, and
  int few_slots;         // chosen of them
};

// What gate_few.h has instances for.
inline constexpr int kFewExperts = 32, kFewSlots = 4;

constexpr Widths widths_of(InstructionSet set) {
  switch (set) {
    case InstructionSet::kAvx2:
      return {10, 16, kFewExperts, kFewSlots};
    case InstructionSet::kAvx512:
    case InstructionSet::kAvx512Bf16:
      return {6, 16, kFewExperts, kFewSlots};
    default:  // rows cannot be turned into lanes (F::kTransposes)
      return {kNever, kNever, 0, 0};
  }
}

}  // namespace
}  // namespace moe_route::cpu
