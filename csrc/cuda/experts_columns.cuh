// Weights [E, in, out], as gpt-oss keeps them: consecutive columns lie side by side. A team of 8 lanes takes one
// stripe of the sums, a lane the columns of one vector (8 of 2 bytes). So a load of a team is 128 bytes of a
// row of the weight, and a lane has one load in flight for every element that its stripe takes at a time (4
// with more than 2 rows of x). The 32 teams of a block are the 32 stripes: the sums of 16 and 8 apart are folded
// inside the warps, those of 4, 2 and 1 apart in shared memory. The order of additions, and so every bit, is
// that of experts_rows.cuh.
#pragma once
#include "experts_work.cuh"

namespace moe_route::cuda::experts {

constexpr int kTeam = 8;  // lanes

// Rows of x that share a reading of the weights: registers do not hold the sums of more.
template <bool kWide>
inline constexpr int kMostTeamRows = kWide ? 4 : 2;

// Loads of a lane in flight: the sums of 4 rows leave registers for 4.
template <class Type, int kTokens>
inline constexpr int kLoadsAhead = kTokens == 4 ? 4 : kElements<Type>;

// Columns of the weight that a block takes.
template <class Type>
inline constexpr int kTileColumns = kTeam * kElements<Type>;

// The columns of the weight at which a tile's columns begin: with halves, 4 lanes have the gate and 4 the rest.
template <class Type>
__device__ __forceinline__ int64_t column_of(const ExpertProductArgs& args, int64_t tile, int member,
                                             int& there) {
  constexpr int kEach = kElements<Type>;
  if (args.pairing != Pairing::kHalves) {
    const int64_t column = tile * kTileColumns<Type> + member * kEach;
    there = static_cast<int>(args.weight_rows() - column);
    return column;
  }
  const int64_t column = tile * (kTileColumns<Type> / 2) + member % (kTeam / 2) * kEach;
  there = static_cast<int>(args.out_columns - column);
  return member < kTeam / 2 ? column : args.out_columns + column;
}

// Sums of the tile's column `column` for row t: those of 8 warps, folded 4, 2 and 1 apart. `partial` is
// [kWarps][columns * rows].
template <int kColumns, int kTokens>
__device__ __forceinline__ float folded(const float* partial, int column, int t) {
  float sums[kWarps];
#pragma unroll
  for (int w = 0; w < kWarps; ++w) sums[w] = partial[(w * kColumns + column) * kTokens + t];
#pragma unroll
  for (int apart = kWarps / 2; apart > 0; apart /= 2) {
#pragma unroll
    for (int w = 0; w < apart; ++w) sums[w] += sums[w + apart];
  }
  return sums[0];
}

template <class Type, bool kWide, int kTokens>
__device__ __forceinline__ void multiply_columns(const Problem& problem, const Group& group, int64_t tile) {
  constexpr int kEach = kElements<Type>, kColumns = kTileColumns<Type>;
  const ExpertProductArgs& args = problem.args;
  const int member = lane() % kTeam, stripe = lane() / kTeam * kWarps + warp();
  int there;
  const int64_t column = column_of<Type>(args, tile, member, there);
  const int64_t width = args.weight_rows(), row_bytes = width * Type::kBytes;
  const char* weight =
      static_cast<const char*>(args.weight) + (group.expert * args.in * width + column) * Type::kBytes;
  // The next row of the weight that the stripe takes: kEach in a row, element i of a vector of x each, then those
  // of the next step.
  int row = stripe * kEach;
  const int rows = there > 0 ? static_cast<int>(args.in) : 0;
  const char* next = weight + row * row_bytes;
  const auto load = [&](int i) {
    const bool wanted = row < rows;
    Words<16> loaded;
    if constexpr (kWide) {
      loaded = stream(next, wanted);
    } else {
      loaded = gather<Type>(next, wanted ? there : 0);
    }
    const int ahead = i + 1 < kEach ? 1 : (kStripes - 1) * kEach + 1;
    row += ahead;
    next += ahead * row_bytes;
    return loaded;
  };
  constexpr int kLoads = kLoadsAhead<Type, kTokens>;
  Words<16> ring[kLoads];
#pragma unroll
  for (int i = 0; i < kLoads; ++i) ring[i] = load(i);
  stage_sources<Type>(problem, group, kTokens);
  __syncthreads();
  constexpr int kWords = kVectorBytes / 4, kElementsOfWord = 4 / Type::kBytes;
  const uint32_t* staged = reinterpret_cast<const uint32_t*>(moe_route_shared) + stripe * kWords;
  const int vectors = problem.steps * kStripes;
  float sums[kEach * kTokens] = {};
#pragma unroll 1
  for (int step = 0; step < problem.steps; ++step) {
#pragma unroll
    for (int word = 0; word < kWords; ++word) {
      uint32_t x[kTokens];  // a vector of each would take too many registers
#pragma unroll
      for (int t = 0; t < kTokens; ++t) x[t] = staged[(t * vectors + step * kStripes) * kWords + word];
#pragma unroll
      for (int part = kElementsOfWord - 1; part >= 0; --part) {  // the upper half of a word first
        const Words<16>& weights = ring[(word * kElementsOfWord + part) % kLoads];
#pragma unroll
        for (int c = 0; c < kEach; ++c) {
          const float factor = Type::widen(weights.word, c);
#pragma unroll
          for (int t = 0; t < kTokens; ++t) {
            float& sum = sums[c * kTokens + t];
            sum = math::fma(factor, Type::widen(&x[t], part), sum);
          }
        }
      }
#pragma unroll
      for (int part = 0; part < kElementsOfWord; ++part) {
        const int i = word * kElementsOfWord + part;
        ring[i % kLoads] = load((i + kLoads) % kEach);
      }
    }
  }
#pragma unroll
  for (float& sum : sums) sum += 0.0f;  // no -0, whatever was padded
  fold<kEach * kTokens, 16, kTeam>(sums);
  // A lane now has a quarter of its team's sums: the lane's two upper bits say which.
  constexpr int kLeft = kEach * kTokens / 4;
  float* partial = reinterpret_cast<float*>(moe_route_shared + problem.at_once * vectors * kVectorBytes);
  float* mine = partial + (warp() * kColumns + member * kEach) * kTokens + lane() / kTeam * kLeft;
#pragma unroll
  for (int i = 0; i < kLeft; ++i) mine[i] = sums[i];
  __syncthreads();
  const bool gated = args.pairing != Pairing::kNone, halves = args.pairing == Pairing::kHalves;
  const int columns = gated ? kColumns / 2 : kColumns;
  for (int i = threadIdx.x; i < columns * group.rows; i += kThreads) {
    const int c = i % columns, row = i / columns;
    const int64_t out = tile * columns + c;
    if (out >= args.out_columns) continue;
    const int gate_at = halves || !gated ? c : 2 * c, up_at = !gated ? c : halves ? columns + c : 2 * c + 1;
    const float up = folded<kColumns, kTokens>(partial, up_at, row);
    const float gate = gated ? folded<kColumns, kTokens>(partial, gate_at, row) : 0.0f;
    finish<Type>(args, group.expert, group.first + row, out, gate, up);
  }
}

template <class Type, bool kWide>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce) multiply_columns(const Problem problem) {
  wait_for_earlier_kernels();
  const int group_number = static_cast<int>(blockIdx.x / problem.tiles);
  const int64_t tile = blockIdx.x - group_number * problem.tiles;
  const Group group = find_group(problem, group_number);
  if (group.rows == 0) return;
  for_rows<kMostTeamRows<kWide>>(group.rows, [&](auto tokens) {
    multiply_columns<Type, kWide, decltype(tokens)::value>(problem, group, tile);
  });
}

}  // namespace moe_route::cuda::experts
