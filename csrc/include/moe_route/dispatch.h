// Dispatch, permute, combine: moving token rows to their experts and back. No torch headers; raw pointers and
// sizes.
//
// dispatch is a stable counting sort of the T * k routed slots by expert. A slot whose id is negative or >= E
// is skipped. With `block` > 1 every expert's range starts at a multiple of `block` rows; rows between an
// expert's end and the next start belong to no slot.
//   offsets [E + 1]   row where expert e starts (offsets[E] = rows in use, padding included)
//   ends    [E]       int32: offsets[e + 1], as grouped matrix products take it
//   counts  [E]       real rows of expert e
//   order   [capacity]  slot (t * k + j) that row r serves, or -1 where it serves none
//   inverse [T * k]   row of a slot, or -1 if skipped
// Deterministic: inside an expert rows keep the order of their slots, whatever the number of threads.
// Rows are numbered in 32 bits: at most kMaxRows of them.
#pragma once
#include <cstdint>

#include "moe_route/gate.h"

namespace moe_route {

inline constexpr int64_t kMaxRows = int64_t{1} << 30;  // capacity of a dispatch

struct DispatchArgs {
  const void* ids = nullptr;  // [T, k] int32 or int64, contiguous
  DType ids_type = DType::kInt32;
  int64_t slots = 0;  // T * k
  int32_t experts = 0;
  int32_t block = 1;
  int64_t capacity = 0;  // rows of `order`, dispatch_capacity(slots, experts, block) to kMaxRows
  int64_t* offsets = nullptr;
  int32_t* ends = nullptr;
  int64_t* counts = nullptr;
  int64_t* order = nullptr;
  int64_t* inverse = nullptr;
  void* workspace = nullptr;  // CUDA only: see cuda.h
};

// Rows that always suffice: no expert wastes more than block - 1.
inline int64_t dispatch_capacity(int64_t slots, int64_t experts, int64_t block) {
  return slots + experts * (block - 1);
}

// rows[inverse[t * k + j]] = x[t]. Each source row is read once. Rows that serve no slot are set to zero, and
// so are those on which `order` and `inverse` disagree: every row is written, and written once.
struct PermuteArgs {
  const void* x = nullptr;           // [T, H], contiguous rows of `row_bytes`
  const int64_t* inverse = nullptr;  // [T, k]
  const int64_t* order = nullptr;    // [capacity], to find the rows that serve no slot
  void* rows = nullptr;              // [capacity, H]
  int64_t tokens = 0, k = 0, row_bytes = 0, capacity = 0;
};

// out[t] = residual[t] + sum_j weights[t, j] * rows[inverse[t, j]], accumulated in float32 (float64 for
// kFloat64 rows) in the order of j, rounded once. Slots with inverse -1 are skipped: their rows are never
// read. No atomics.
struct CombineArgs {
  const void* rows = nullptr;        // [capacity, H]
  const void* weights = nullptr;     // [T, k] float32, or float64 where `type` is kFloat64
  const int64_t* inverse = nullptr;  // [T, k]
  const void* residual = nullptr;    // [T, H] or null
  void* out = nullptr;               // [T, H]
  DType type = DType::kFloat32;      // of rows, residual and out
  int64_t tokens = 0, k = 0, hidden = 0, capacity = 0;
};

namespace cpu {
// Whole problems. `parallel(n, grain, body, context)` runs body(begin, end, context) over [0, n), in pieces
// of at least `grain`, on as many threads as the caller allows.
using ParallelBody = void (*)(int64_t begin, int64_t end, void* context);
using Parallel = void (*)(int64_t n, int64_t grain, ParallelBody body, void* context);
void dispatch(const DispatchArgs& args, Parallel parallel, int threads);
void permute(const PermuteArgs& args, Parallel parallel);
void combine(const CombineArgs& args, Parallel parallel);
}  // namespace cpu
}  // namespace moe_route
