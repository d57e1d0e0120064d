// A warp works on one row of logits: its vocabulary, and where a row's values live.
//
// The warp's lower and upper halves take the first and the second half of the row's vectors of 16. Lane
// 16 h + s holds the experts 16 (values h + i) + s for i = 0, 1, ...: it is stripe s of the contract's
// reduction tree (csrc/cpu/gate_score.h, docs/architecture.md), so a sum runs down the lower half's stripes,
// is handed on to the upper half, runs down the rest and is folded 8, 4, 2 and 1 lanes apart: the bits of the
// CPU, in registers.
//
// All lanes know the same about a row, so every branch around a collective is taken by the whole warp.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "moe_route/gate.h"
#include "moe_route/key.h"

namespace moe_route::cuda {
namespace {

inline constexpr unsigned kWarp = 0xffffffffu;
inline constexpr int kLanes = 32;
inline constexpr int kStripes = 16;

// A block is one warp: what depends on the block alone is uniform, and the compiler knows it.
__device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x); }
__device__ __forceinline__ unsigned lanes_below() { return (1u << lane()) - 1; }
__device__ __forceinline__ unsigned ballot(bool mine) { return __ballot_sync(kWarp, mine); }

template <class T>
__device__ __forceinline__ T from_lane(T mine, int source) {
  return __shfl_sync(kWarp, mine, source);
}

// Numbers, without the standard library's device attributes.
__device__ __forceinline__ constexpr float infinity() { return __builtin_inff(); }
__device__ __forceinline__ constexpr float not_a_number() { return __builtin_nanf(""); }
inline constexpr float kSmallestNormal = 0x1p-126f;

// ---- a row's values -----------------------------------------------------------------------------

// Values that a lane holds of a row. Up to 512 experts they are registers, kValues of them; above that
// (kValues = 0) they lie in shared memory, in the order of the experts, and a lane touches its own alone.
__host__ __device__ constexpr int values_of_lane(int experts) { return (experts + kLanes - 1) / kLanes; }

template <int kValues>
__device__ __forceinline__ int first_expert(int experts) {
  const int values = kValues > 0 ? kValues : values_of_lane(experts);
  return (lane() & kStripes) * (values - 1) + lane();
}

// Keeps the compiler from working a number out again wherever it is used.
__device__ __forceinline__ int kept(int x) {
#ifdef __CUDA_ARCH__
  asm volatile("" : "+r"(x));
#endif
  return x;
}
template <class T>
__device__ __forceinline__ T* kept(T* x) {
#ifdef __CUDA_ARCH__
  asm volatile("" : "+l"(x));
#endif
  return x;
}

// One value for each expert; those past the last expert are NaN: never chosen, score 0.
template <int kValues>
struct Values {
  float of_lane[kValues];
  __device__ __forceinline__ void place(float*, int) {}
  __device__ __forceinline__ float& operator[](int i) { return of_lane[i]; }
  __device__ __forceinline__ float operator[](int i) const { return of_lane[i]; }
};
template <>
struct Values<0> {
  float* of_lane;
  __device__ __forceinline__ void place(float* row, int experts) { of_lane = row + first_expert<0>(experts); }
  __device__ __forceinline__ float& operator[](int i) { return of_lane[kStripes * i]; }
  __device__ __forceinline__ float operator[](int i) const { return of_lane[kStripes * i]; }
};

// op(i, e) for every expert e of the calling lane, absent ones (e >= E) included.
template <int kValues, class Op>
__device__ __forceinline__ void for_each_expert(int experts, Op op) {
  if constexpr (kValues > 0) {
    const int first = first_expert<kValues>(experts);
#pragma unroll
    for (int i = 0; i < kValues; ++i) op(i, first + kStripes * i);
  } else {
    const int first = first_expert<kValues>(experts);
    for (int i = 0; i < values_of_lane(experts); ++i) op(i, first + kStripes * i);
  }
}

// ---- folds, the same in every lane --------------------------------------------------------------

// Sums over the experts by the contract's tree: sum = add(i, sum) for each. `add` is called twice for a value.
template <int kValues, class Sum, class Add>
__device__ __forceinline__ Sum sum_over_experts(int experts, Add add) {
  Sum sum;
  for_each_expert<kValues>(experts, [&](int i, int) { sum = add(i, sum); });
  sum = sum.map([](float x) { return from_lane(x, lane() % kStripes); });  // the upper half goes on from here
  for_each_expert<kValues>(experts, [&](int i, int) { sum = add(i, sum); });
  return sum.folded();
}
// The 16 stripes of a half, each half its own: 8, 4, 2 and 1 lanes apart.
__device__ __forceinline__ float fold_stripes(float x) {
#pragma unroll
  for (int apart = kStripes / 2; apart > 0; apart /= 2) x = x + __shfl_xor_sync(kWarp, x, apart);
  return x;
}
// One sum, or two side by side, of which the second is folded by the half that has nothing to fold.
struct OneSum {
  float value = 0;
  template <class Op>
  __device__ __forceinline__ OneSum map(Op op) const {
    return {op(value)};
  }
  __device__ __forceinline__ OneSum folded() const { return {from_lane(fold_stripes(value), kLanes - 1)}; }
};
struct TwoSums {
  float first = 0, second = 0;
  template <class Op>
  __device__ __forceinline__ TwoSums map(Op op) const {
    return {op(first), op(second)};
  }
  __device__ __forceinline__ TwoSums folded() const {
    const float upper = __shfl_xor_sync(kWarp, second, kStripes);
    const float both = fold_stripes(lane() < kStripes ? upper : first);
    return {from_lane(both, kLanes - 1), from_lane(both, 0)};
  }
};

// n + 1 where x > y. A compiler that does not know the predicated addition takes one instruction more.
__device__ __forceinline__ void count_greater(int& n, float x, float y) {
#ifdef __CUDA_ARCH__
  asm("{.reg .pred p; setp.gt.f32 p, %1, %2; @p add.s32 %0, %0, 1;}" : "+r"(n) : "f"(x), "f"(y));
#else
  n += x > y ? 1 : 0;
#endif
}

__device__ __forceinline__ int fold_add(int mine) { return __reduce_add_sync(kWarp, mine); }
__device__ __forceinline__ int fold_or(int mine) {
  return static_cast<int>(__reduce_or_sync(kWarp, static_cast<unsigned>(mine)));
}

// The order of numbers as integers, and back; a NaN has no key here (moe_route/key.h). Zeros come back as +0.
__device__ __forceinline__ int32_t number_key(float x) {
  const int32_t bits = math::as_int(x + 0.0f);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}
__device__ __forceinline__ float number_of(int32_t key) {
  return math::as_float(key ^ ((key >> 31) & 0x7fffffff));
}
inline constexpr int32_t kNoKey = INT32_MIN;                // below every number's
inline constexpr int32_t kLowestKey = int32_t(0x807fffff);  // of -infinity

// Of numbers: the lanes' values hold no NaN.
__device__ __forceinline__ float fold_max(float mine) {
  return number_of(__reduce_max_sync(kWarp, number_key(mine)));
}
__device__ __forceinline__ float fold_min(float mine) {
  return number_of(__reduce_min_sync(kWarp, number_key(mine)));
}

}  // namespace
}  // namespace moe_route::cuda
