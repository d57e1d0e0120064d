// Half a warp works on one row of logits: its vocabulary, and where a row's values live.
//
// Lane l of a team holds the experts 16 i + l. So a lane is one stripe of the contract's reduction tree
// (moe_route/math.h, docs/architecture.md), and folding 8, 4, 2 and 1 lanes apart gives the bits of the CPU.
//
// The two teams of a warp walk in step: every collective names the whole warp, so every branch around one is
// taken by both teams (`any`) with what only one of them wants predicated. A branch without collectives is
// free to part.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "moe_route/gate.h"
#include "moe_route/key.h"

namespace moe_route::cuda {
namespace {

inline constexpr int kTeam = 16;
inline constexpr int kTeamsPerWarp = 2;
inline constexpr unsigned kWarp = 0xffffffffu;

__device__ __forceinline__ int team_lane() { return static_cast<int>(threadIdx.x % kTeam); }
__device__ __forceinline__ bool any(bool mine) { return __any_sync(kWarp, mine); }

// One bit a lane of the own team.
__device__ __forceinline__ unsigned ballot(bool mine) {
  return __ballot_sync(kWarp, mine) >> (threadIdx.x & kTeam) & 0xffffu;
}
__device__ __forceinline__ unsigned lanes_below() { return (1u << team_lane()) - 1; }

template <class T>
__device__ __forceinline__ T from_lane(T mine, int lane) {
  return __shfl_sync(kWarp, mine, lane, kTeam);
}

// The same bits in every lane: each operation here is commutative.
template <class T, class Op>
__device__ __forceinline__ T fold(T mine, Op op) {
#pragma unroll
  for (int apart = kTeam / 2; apart > 0; apart /= 2) mine = op(mine, __shfl_xor_sync(kWarp, mine, apart));
  return mine;
}
template <class T>
__device__ __forceinline__ T fold_add(T mine) {
  return fold(mine, [](T a, T b) { return a + b; });
}
__device__ __forceinline__ int fold_or(int mine) {
  return fold(mine, [](int a, int b) { return a | b; });
}
__device__ __forceinline__ float fold_max(float mine) {
  return fold(mine, [](float a, float b) { return fmaxf(a, b); });
}
__device__ __forceinline__ float fold_min(float mine) {
  return fold(mine, [](float a, float b) { return fminf(a, b); });
}

// Numbers, without the standard library's device attributes.
__device__ __forceinline__ constexpr float infinity() { return __builtin_inff(); }
__device__ __forceinline__ constexpr float not_a_number() { return __builtin_nanf(""); }
inline constexpr float kSmallestNormal = 0x1p-126f;

// A row's values, one for each expert; those past the last expert are NaN: never chosen, score 0. Up to 512
// experts (256 at the full level) they are registers, above that (kVectors = 0) shared memory in which a lane
// touches its own stripe alone.
template <int kVectors>
struct Values {
  float lane_values[kVectors];
  __device__ __forceinline__ void place(float*) {}
  __device__ __forceinline__ float& operator[](int i) { return lane_values[i]; }
  __device__ __forceinline__ float operator[](int i) const { return lane_values[i]; }
};
template <>
struct Values<0> {
  float* lane_values;
  __device__ __forceinline__ void place(float* row) { lane_values = row + team_lane(); }
  __device__ __forceinline__ float& operator[](int i) { return lane_values[kTeam * i]; }
  __device__ __forceinline__ float operator[](int i) const { return lane_values[kTeam * i]; }
};

__host__ __device__ constexpr int vectors_of(int experts) { return (experts + kTeam - 1) / kTeam; }

// op(i, e) for every expert e = 16 i + lane of the calling lane, absent ones (e >= E) included.
template <int kVectors, class Op>
__device__ __forceinline__ void for_each_expert(int experts, Op op) {
  if constexpr (kVectors > 0) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) op(i, kTeam * i + team_lane());
  } else {
    for (int i = 0; i < vectors_of(experts); ++i) op(i, kTeam * i + team_lane());
  }
}

}  // namespace
}  // namespace moe_route::cuda
