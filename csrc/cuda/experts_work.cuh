// Products of experts on CUDA: what both kernels share. The work list, which blocks read off dispatch's counts
// on the device; the sources of a group in shared memory; the loads that stream the weights past the caches.
//
// Rows of one expert are cut into groups of at most `at_once`, which share one reading of its weights. The grid
// is groups x tiles, where `groups` is what T, k and E allow at most. Blocks of groups that there are not
// return at once.
#pragma once
#include <cstdint>
#include <type_traits>

#include "elements.cuh"
#include "launch.h"
#include "moe_route/experts.h"

namespace moe_route::cuda::experts {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kBlocksAtOnce = 2;  // of a multiprocessor: 16 warps, 128 registers a thread
constexpr int kVectorBytes = 16;

struct Problem {
  ExpertProductArgs args;
  uint32_t tiles = 0;   // blocks of a group
  int32_t columns = 0;  // output columns of a tile
  int32_t at_once = 1;  // rows of a group: 1, 2, 4 or 8
  int32_t steps = 0;    // vectors of a stripe, those past the end of x included
  bool wide_x = false;  // rows of x may be read in whole vectors
  // Of weights [E, out, in], in bytes: of an expert, from a column's (first) row to the next column's, from the
  // first of two rows that are read together to the second, and from the end of a warp's row to its next.
  int64_t expert_bytes = 0, column_bytes = 0, pair_bytes = 0, turn_bytes = 0;
};

struct Group {
  int expert;
  int64_t first;  // row
  int rows;       // 0: there is no such group
};

// A thread's element of a Words<16> at a time.
template <class Type>
inline constexpr int kElements = kVectorBytes / Type::kBytes;

__device__ __forceinline__ int lane() { return threadIdx.x & 31; }
__device__ __forceinline__ int warp() { return threadIdx.x / 32; }

// Rows of an expert, cut at the end of what was allocated; none where its first row is before the beginning.
__device__ __forceinline__ int rows_of(const ExpertProductArgs& args, int expert) {
  const int64_t first = args.offsets[expert], left = args.capacity - first, counted = args.counts[expert];
  const int64_t rows = counted < left ? counted : left;
  return first >= 0 && rows > 0 ? static_cast<int>(rows) : 0;
}

// Group number `wanted`, every warp for itself: a lane looks at consecutive experts, and the one that has it
// looks again.
__device__ __forceinline__ Group find_group(const Problem& problem, int wanted) {
  const ExpertProductArgs& args = problem.args;
  const int each = (args.experts + 31) / 32, shift = __ffs(problem.at_once) - 1;
  const int begin = min(lane() * each, args.experts), end = min(begin + each, args.experts);
  int mine = 0;
#pragma unroll 4
  for (int e = begin; e < end; ++e) mine += (rows_of(args, e) + problem.at_once - 1) >> shift;
  int before = mine;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int below = __shfl_up_sync(kWarp, before, distance);
    if (lane() >= distance) before += below;
  }
  before -= mine;
  const bool has = wanted >= before && wanted < before + mine;
  const unsigned owner = __ballot_sync(kWarp, has);
  if (owner == 0) return {0, 0, 0};  // alike in a warp, and in a block
  int expert = 0, part = wanted - before;
  for (int e = begin; has && e < end; ++e) {
    const int groups = (rows_of(args, e) + problem.at_once - 1) >> shift;
    expert = e;
    if (part < groups) break;
    part -= groups;
  }
  expert = __shfl_sync(kWarp, expert, __ffs(owner) - 1);
  const int first = __shfl_sync(kWarp, part, __ffs(owner) - 1) * problem.at_once;
  return {expert, args.offsets[expert] + first, min(rows_of(args, expert) - first, problem.at_once)};
}

// 16 bytes that are read once: past the first-level cache, without keeping them there. Zeros where not `wanted`;
// nothing is read then. Volatile: the order of loads is the order of the source, which keeps them in flight.
__device__ __forceinline__ Words<16> stream(const void* from, bool wanted) {
  Words<16> words;
#if defined(__CUDA_ARCH__)
  asm volatile(
      "{\n"
      "  .reg .pred wanted;\n"
      "  setp.ne.s32 wanted, %5, 0;\n"
      "  mov.b32 %0, 0;\n  mov.b32 %1, 0;\n  mov.b32 %2, 0;\n  mov.b32 %3, 0;\n"
      "  @wanted ld.global.nc.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];\n"
      "}\n"
      : "=&r"(words.word[0]), "=&r"(words.word[1]), "=&r"(words.word[2]), "=&r"(words.word[3])
      : "l"(from), "r"(static_cast<int>(wanted)));
#else
  words = cuda::words(wanted ? *static_cast<const uint4*>(from) : uint4{0, 0, 0, 0});
#endif
  return words;
}

// The first `there` elements of a vector that lies at any address; zeros behind them.
template <class Type>
__device__ __forceinline__ Words<16> gather(const void* from, int there) {
  Words<16> words = {};
#pragma unroll
  for (int i = 0; i < kElements<Type>; ++i) {
    if (i >= there) break;
    if constexpr (Type::kBytes == 4) {
      words.word[i] = static_cast<const uint32_t*>(from)[i];
    } else {
      const uint32_t half = static_cast<const uint16_t*>(from)[i];
      words.word[i / 2] |= i % 2 == 0 ? half : half << 16;
    }
  }
  return words;
}

template <class Type>
__device__ __forceinline__ float element(const void* from, int64_t at) {
  uint32_t word;
  if constexpr (Type::kBytes == 4) {
    word = static_cast<const uint32_t*>(from)[at];
  } else {
    word = static_cast<const uint16_t*>(from)[at];
  }
  return Type::widen(&word, 0);
}

template <class Type>
__device__ __forceinline__ void store_element(void* to, int64_t at, float value) {
  uint32_t word;
  Type::round(&word, &value, 1);
  if constexpr (Type::kBytes == 4) {
    static_cast<uint32_t*>(to)[at] = word;
  } else {
    static_cast<uint16_t*>(to)[at] = static_cast<uint16_t>(word);
  }
}

// x of a group's rows in shared memory, [rows, steps, 32] vectors: zeros behind the end of x, and for rows that
// there are not. A barrier must follow.
template <class Type>
__device__ __forceinline__ void stage_sources(const Problem& problem, const Group& group, int rows) {
  const ExpertProductArgs& args = problem.args;
  uint4* staged = reinterpret_cast<uint4*>(moe_route_shared);
  const int vectors = problem.steps * kStripes;
  for (int row = 0; row < rows; ++row) {
    const int64_t source = row < group.rows ? args.source(group.first + row) : -1;
    const char* from = static_cast<const char*>(args.x) + source * args.in * Type::kBytes;
    for (int v = threadIdx.x; v < vectors; v += kThreads) {
      const int there = source < 0 ? 0 : static_cast<int>(args.in) - v * kElements<Type>;
      uint4 value = {0, 0, 0, 0};
      if (there > 0) {
        const char* at = from + int64_t{v} * kVectorBytes;
        value = problem.wide_x ? *reinterpret_cast<const uint4*>(at) : vector(gather<Type>(at, there));
      }
      staged[row * vectors + v] = value;
    }
  }
}

template <class Type>
__device__ __forceinline__ float bias_of(const ExpertProductArgs& args, int expert, int64_t row) {
  if (args.bias == nullptr) return 0.0f;
  return element<Type>(args.bias, expert * args.weight_rows() + row);
}

// Bias, activation, rounding: column c of row r, from its sums. Without a gate, `gate` is of no use.
template <class Type>
__device__ __forceinline__ void finish(const ExpertProductArgs& args, int expert, int64_t r, int64_t c,
                                       float gate, float up) {
  up += bias_of<Type>(args, expert, args.up_row(c));
  float value;
  if (args.pairing == Pairing::kNone) {
    value = apply(args.activation, up);
  } else {
    value = apply_gated(args.activation, gate + bias_of<Type>(args, expert, args.gate_row(c)), up);
  }
  store_element<Type>(args.out, r * args.out_columns + c, value);
}

// Folds sums over lanes `Distance`, `Distance` / 2, ... 1 apart. While a lane has several, it gives half of them
// to its partner: the lane's bits, from `Distance` down, say which one it has in the end, the first bit the
// top half.
template <int Count, int Distance, int Last = 1>
__device__ __forceinline__ void fold(float* sums) {
  if constexpr (Count > 1) {
    const bool upper = (lane() & Distance) != 0;
#pragma unroll
    for (int i = 0; i < Count / 2; ++i) {
      const float low = sums[i], high = sums[i + Count / 2];
      sums[i] = (upper ? high : low) + __shfl_xor_sync(kWarp, upper ? low : high, Distance);
    }
  } else {
    sums[0] += __shfl_xor_sync(kWarp, sums[0], Distance);
  }
  if constexpr (Distance > Last) fold<(Count > 1 ? Count / 2 : 1), Distance / 2, Last>(sums);
}

// Runs body(integral_constant<rows>) with the least of 1, 2, 4, 8 that holds them all.
template <int kMost, class Body>
__device__ __forceinline__ void for_rows(int rows, Body body) {
  if constexpr (kMost >= 8) {
    if (rows > 4) return body(std::integral_constant<int, 8>{});
  }
  if constexpr (kMost >= 4) {
    if (rows > 2) return body(std::integral_constant<int, 4>{});
  }
  if (rows > 1) return body(std::integral_constant<int, 2>{});
  body(std::integral_constant<int, 1>{});
}

}  // namespace moe_route::cuda::experts
