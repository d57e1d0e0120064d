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

namespace cpu {
// On the calling thread and up to `threads` - 1 others.
void expert_product(const ExpertProductArgs& args, Parallel parallel, int threads);
void expert_activation(const ExpertActivationArgs& args, Parallel parallel);
}  // namespace cpu
}  // namespace moe_route
