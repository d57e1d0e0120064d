// Products of experts for few rows: every row times the matrix of its expert, with bias and activation, in one
// pass over the weights of the experts that have rows. No torch headers; raw pointers and sizes.
//
//   out[r, c] = round(activation(bias[e, .] + weight[e, ., :] . x[source(r), :]))    for r in the range of e
//
// Two calls make an expert: up (with gate and activation), then down. A row's range is that of dispatch
// (offsets, counts), its source the token of its slot (order), or the row itself. Nothing else is touched:
// weights of experts without rows are not read, rows of no slot neither read nor written.
//
// A sum is float32. Element i of x belongs to stripe (i / V) % 32, V = 16 bytes of elements; each stripe adds
// its products by fma in the order of i (of i ^ 1 for elements of 2 bytes: the upper half of a word comes first,
// as in the bfloat16 dot products of x86), and the 32 stripes are folded 16, 8, 4, 2 and 1 apart. That order
// depends on nothing but the element type: neither on grid, layout, other rows, threads, nor backend. So every
// backend gives the same bits (a NaN is a NaN), with one exception: those dot products take a subnormal number, one
// below 2^-126, for zero, whether it is an element or a stripe's sum.
#pragma once
#include <cstdint>

#include "moe_route/activation.h"
#include "moe_route/dispatch.h"

namespace moe_route {

// Which rows of a weight make column c of the result.
enum class Pairing : int32_t {
  kNone,         // row c
  kHalves,       // gate: row c, up: row `out` + c
  kAlternating,  // gate: row 2 c, up: row 2 c + 1
};

struct ExpertProductArgs {
  const void* x = nullptr;           // [sources, in], contiguous
  const int64_t* order = nullptr;    // [capacity]: row r reads x[order[r] / k]; null: x[r]
  const int64_t* offsets = nullptr;  // [E + 1]
  const int64_t* counts = nullptr;   // [E]
  const void* weight = nullptr;      // [E, weight_rows(), in], or [E, in, weight_rows()] where `transposed`
  const void* bias = nullptr;        // [E, weight_rows()] or null
  void* out = nullptr;               // [capacity, out]
  const uint32_t* panels = nullptr;  // the weight as pack_expert_weight lays it out, or null; CPU only
  DType type = DType::kFloat32;      // of x, weight, bias and out: float32, bfloat16 or float16
  bool transposed = false;
  Pairing pairing = Pairing::kNone;
  Activation activation;
  int32_t experts = 0;
  int64_t sources = 0, k = 1, capacity = 0, in = 0, out_columns = 0;

  MOE_ROUTE_INLINE_MEMBER int64_t weight_rows() const {
    return pairing == Pairing::kNone ? out_columns : 2 * out_columns;
  }
  // The rows of `weight` that make column c; without a gate both are the same.
  MOE_ROUTE_INLINE_MEMBER int64_t gate_row(int64_t c) const {
    return pairing == Pairing::kAlternating ? 2 * c : c;
  }
  MOE_ROUTE_INLINE_MEMBER int64_t up_row(int64_t c) const {
    return pairing == Pairing::kNone ? c : pairing == Pairing::kHalves ? out_columns + c : 2 * c + 1;
  }
  // The row of x that row r reads, or -1 where its slot is not one: it counts as zeros.
  MOE_ROUTE_INLINE_MEMBER int64_t source(int64_t r) const {
    if (order == nullptr) return r < sources ? r : -1;
    const int64_t slot = order[r];
    return slot >= 0 && slot < sources * k ? slot / k : -1;
  }
};

// What stands between two grouped products that others compute: out[r, c] = round(activation(row r + bias[e, .])),
// for every row r below offsets[E], e its expert; float32 inside. Rows from there on are neither read nor written.
struct ExpertActivationArgs {
  const void* rows = nullptr;        // [capacity, row_columns()], contiguous
  const int64_t* offsets = nullptr;  // [E + 1]
  const void* bias = nullptr;        // [E, row_columns()] or null
  void* out = nullptr;               // [capacity, columns]
  DType type = DType::kFloat32;      // of rows, bias and out: float32, bfloat16 or float16
  Pairing pairing = Pairing::kNone;  // of the columns of a row, as of rows of a weight
  Activation activation;
  int32_t experts = 0;
  int64_t capacity = 0, columns = 0;

  MOE_ROUTE_INLINE_MEMBER int64_t row_columns() const {
    return pairing == Pairing::kNone ? columns : 2 * columns;
  }
  MOE_ROUTE_INLINE_MEMBER int64_t rows_in_use() const {
    const int64_t end = offsets[experts];
    return end < capacity ? end : capacity;
  }
  // The expert whose range ends first behind row r.
  MOE_ROUTE_INLINE_MEMBER int32_t expert_of(int64_t r) const {
    int32_t low = 0, high = experts - 1;
    while (low < high) {
      const int32_t middle = (low + high) / 2;
      if (offsets[middle + 1] > r) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    return low;
  }
};

inline constexpr int kStripes = 32;

// Elements of x that a stripe takes at a time.
inline int64_t elements_at_a_time(DType type) { return type == DType::kFloat32 ? 4 : 8; }

// The order of stripes that makes the tree of folds (16, 8, 4, 2 and 1 apart) one of neighbors: with bits reversed.
// So after turn t, as many folds are due as t ends in ones, and five sums wait at most.
constexpr int stripe_of(int turn) {  // its own inverse
  return (turn & 1) << 4 | (turn & 2) << 2 | (turn & 4) | (turn & 8) >> 2 | turn >> 4;
}

// A copy of weights for many rows of an expert: panels of kPanelColumns rows of a weight, word (4 bytes) after word of
// all of them, in the order in which sums are added up, stripe after stripe in turn. So a kernel keeps the sums of a
// panel in registers, reads memory in its order and gives the same bits as from the weights themselves.
//
//   panels[e, p, w, j] = word w of row j of panel p: rows 64 p .. 64 p + 63, or with kHalves 32 rows of the gate and the
//                        32 that they gate
//
// Rows behind the last, and elements behind `in`, are zeros.
inline constexpr int64_t kPanelColumns = 64;
inline constexpr int64_t kWordsAtATime = 4;  // 16 bytes

struct ExpertPanels {
  int64_t groups, words, columns,
      panels;  // 16 bytes and words of a row; columns of the result; panels of an expert

  ExpertPanels(DType type, int64_t in, int64_t out_columns, Pairing pairing)
      : groups((in + elements_at_a_time(type) - 1) / elements_at_a_time(type)),
        words(groups * kWordsAtATime),
        columns(pairing == Pairing::kNone ? kPanelColumns : kPanelColumns / 2),
        panels((out_columns + columns - 1) / columns) {
    for (int turn = 0; turn < kStripes; ++turn) {
      const int64_t its_groups = (groups - stripe_of(turn) + kStripes - 1) / kStripes;
      first_[turn + 1] = first_[turn] + its_groups * kWordsAtATime;
    }
  }

  int64_t panel_size() const { return words * kPanelColumns; }
  // The words of a turn begin there; up to kStripes.
  int64_t first_word(int turn) const { return first_[turn]; }
  // The first word of 16 bytes of a row.
  int64_t word_of_group(int64_t group) const {
    return first_[stripe_of(static_cast<int>(group % kStripes))] + group / kStripes * kWordsAtATime;
  }

 private:
  int64_t first_[kStripes + 1] = {};
};

struct ExpertPackArgs {
  const void* weight = nullptr;  // as in ExpertProductArgs
  uint32_t* panels = nullptr;    // [E, panels, words, kPanelColumns]
  DType type = DType::kFloat32;
  bool transposed = false;
  Pairing pairing = Pairing::kNone;
  int32_t experts = 0;
  int64_t in = 0, out_columns = 0;
};

namespace cpu {
// One or more of one type, one after the other, since each may read what those before it wrote. On the calling thread
// and up to `threads` - 1 others.
void expert_products(const ExpertProductArgs* products, int count, Parallel parallel, int threads);
void expert_activation(const ExpertActivationArgs& args, Parallel parallel);
void pack_expert_weight(const ExpertPackArgs& args, Parallel parallel);
}  // namespace cpu
}  // namespace moe_route
