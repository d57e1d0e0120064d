// Weights [E, out, in]: a warp streams two rows of the weight at a time, gate and up of a column or two columns
// without a gate. A lane is one stripe of the sums: it takes the vectors lane, lane + 32, ... of a row and
// multiplies them with the same vectors of x, in shared memory. Eight loads of 16 bytes a lane are in flight (four
// with 8 rows of x), the next rows' among them, whatever is added up or folded meanwhile.
#pragma once
#include "experts_work.cuh"

namespace moe_route::cuda::experts {

constexpr int kWeightRows = 2;  // of a warp at a time
constexpr int kDepth = 4;       // vectors of each in flight, at most; `steps` is a multiple

// The sums of 8 rows leave registers for half as many, and take four times as long to add up as those of 2.
template <int kTokens>
inline constexpr int kAhead = kTokens == 8 ? kDepth / 2 : kDepth;

// Columns of the result that they make.
template <bool kGated>
inline constexpr int kColumnsAtATime = kGated ? 1 : 2;

// Rows of x that share a reading of the weights; fewer where it is rare, for the compiler's time.
template <class Type, bool kWide>
inline constexpr int kMostRows = !kWide              ? 2
                                 : Type::kBytes == 4 ? 4
                                                     : 8;

// Where a lane's next vectors lie: it runs ahead of what is added up.
template <class Type, bool kGated, bool kWide>
struct RowLoader {
  const Problem& problem;
  int column, end;
  int step = 0;
  const char* next;  // in the first of the two rows

  __device__ __forceinline__ RowLoader(const Problem& problem, int expert, int first, int end)
      : problem(problem),
        column(first),
        end(end),
        next(static_cast<const char*>(problem.args.weight) + expert * problem.expert_bytes +
             first * problem.column_bytes + lane() * kVectorBytes) {}

  __device__ __forceinline__ void load(Words<16> (&to)[kWeightRows]) {
    const int there = static_cast<int>(problem.args.in) - (step * 32 + lane()) * kElements<Type>;
#pragma unroll
    for (int r = 0; r < kWeightRows; ++r) {
      const bool wanted = there > 0 && column + (kGated ? 0 : r) < end;
      const char* from = r == 0 ? next : next + problem.pair_bytes;
      if constexpr (kWide) {
        to[r] = stream(from, wanted);
      } else {
        to[r] = gather<Type>(from, wanted ? there : 0);
      }
    }
    next += 32 * kVectorBytes;
    if (++step < problem.steps) return;
    step = 0;
    column += kWarps * kColumnsAtATime<kGated>;
    next += problem.turn_bytes;
  }
};

template <class Type, bool kGated, bool kWide, int kTokens>
__device__ __forceinline__ void multiply_rows(const Problem& problem, const Group& group, int first,
                                              int end) {
  const ExpertProductArgs& args = problem.args;
  RowLoader<Type, kGated, kWide> loader(problem, group.expert, first, end);
  Words<16> ring[kAhead<kTokens>][kWeightRows];
#pragma unroll
  for (int d = 0; d < kAhead<kTokens>; ++d) loader.load(ring[d]);
  stage_sources<Type>(problem, group, kTokens);
  __syncthreads();
  const uint4* staged = reinterpret_cast<const uint4*>(moe_route_shared) + lane();
  const int vectors = problem.steps * kStripes;
#pragma unroll 1
  for (int column = first; column < end; column += kWarps * kColumnsAtATime<kGated>) {
    float sums[kWeightRows * kTokens] = {};
#pragma unroll 1
    for (int step = 0; step < problem.steps; step += kAhead<kTokens>) {
#pragma unroll
      for (int d = 0; d < kAhead<kTokens>; ++d) {
#pragma unroll
        for (int t = 0; t < kTokens; ++t) {
          const Words<16> x = words(staged[t * vectors + (step + d) * kStripes]);
#pragma unroll
          for (int i = 0; i < kElements<Type>; ++i) {
            constexpr int kUpperFirst = Type::kBytes == 2 ? 1 : 0;
            const float factor = Type::widen(x.word, i ^ kUpperFirst);
#pragma unroll
            for (int r = 0; r < kWeightRows; ++r) {
              float& sum = sums[r * kTokens + t];
              sum = math::fma(Type::widen(ring[d][r].word, i ^ kUpperFirst), factor, sum);
            }
          }
        }
        loader.load(ring[d]);
      }
    }
#pragma unroll
    for (float& sum : sums) sum += 0.0f;  // no -0, whatever was padded
    if constexpr (kGated) {
      fold<kTokens, 16>(sums);
      fold<kTokens, 16>(sums + kTokens);
      constexpr int kLanes = 32 / kTokens;  // with the same sum
      const int row = lane() / kLanes;
      if (lane() % kLanes == 0 && row < group.rows) {
        finish<Type>(args, group.expert, group.first + row, column, sums[0], sums[kTokens]);
      }
    } else {
      fold<kWeightRows * kTokens, 16>(sums);
      constexpr int kLanes = 32 / (kWeightRows * kTokens);
      const int which = lane() / kLanes, row = which % kTokens;
      const int c = column + which / kTokens;
      if (lane() % kLanes == 0 && row < group.rows && c < end) {
        finish<Type>(args, group.expert, group.first + row, c, 0.0f, sums[0]);
      }
    }
  }
}

template <class Type, bool kGated, bool kWide>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce) multiply_rows(const Problem problem) {
  wait_for_earlier_kernels();
  const int group_number = static_cast<int>(blockIdx.x / problem.tiles);
  const int tile = static_cast<int>(blockIdx.x - group_number * problem.tiles);
  const Group group = find_group(problem, group_number);
  if (group.rows == 0) return;
  const int start = tile * problem.columns;
  const int end = min(start + problem.columns, static_cast<int>(problem.args.out_columns));
  const int first = start + warp() * kColumnsAtATime<kGated>;
  for_rows<kMostRows<Type, kWide>>(group.rows, [&](auto tokens) {
    multiply_rows<Type, kGated, kWide, decltype(tokens)::value>(problem, group, first, end);
  });
}

}  // namespace moe_route::cuda::experts
