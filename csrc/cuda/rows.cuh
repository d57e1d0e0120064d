// Work over token rows, shared by permute and combine: which vectors a row is read and written in, and which
// part of which row a block takes.
//
// A row is cut into pieces of (threads of a block) * unroll vectors; a block takes one piece of one token's
// row at a time. Vectors are the widest, up to 16 bytes, that every address and the row length allow.
#pragma once
#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "launch.h"
#include "tunables.h"

namespace moe_route::cuda {

// Loaded and stored in one access.
template <int Bytes>
using Vector = std::conditional_t<
    Bytes == 16, uint4,
    std::conditional_t<Bytes == 8, uint2, std::conditional_t<Bytes == 4, uint32_t, uint16_t>>>;

// Largest power of two up to 16 that divides a row length and all addresses.
template <class... Pointers>
int vector_bytes(int64_t row_bytes, Pointers... pointers) {
  const uintptr_t bits =
      (static_cast<uintptr_t>(row_bytes) | ... | reinterpret_cast<uintptr_t>(pointers)) | 16;
  return static_cast<int>(bits & -bits);
}

constexpr unsigned kWarp = 0xffffffffu;
constexpr int kRowThreads = 256;    // largest block
constexpr int kFewRowThreads = 64;  // where larger blocks would leave multiprocessors idle

struct RowGrid {
  int64_t vectors = 0;    // of a row
  uint32_t pieces = 0;    // of a row
  int64_t in_flight = 0;  // tokens the grid covers at a time
  int threads = 0;

  int64_t blocks() const { return in_flight * pieces; }
};

// A grid for `rows` > 0 rows (tokens, or as much work as that many) of `vectors` > 0 vectors.
inline RowGrid row_grid(int64_t rows, int64_t vectors, int unroll) {
  const auto ceil = [](int64_t n, int64_t d) { return (n + d - 1) / d; };
  const int64_t processors = device_attribute(cudaDevAttrMultiProcessorCount);
  const bool few = rows < 2 * processors && rows * ceil(vectors, kRowThreads * unroll) < 2 * processors;
  const int64_t pieces = ceil(vectors, (few ? kFewRowThreads : kRowThreads) * unroll);
  RowGrid grid;
  grid.vectors = vectors;
  grid.pieces = static_cast<uint32_t>(pieces);
  // several rounds of resident blocks, to even out their ends
  const int64_t blocks = tuned(Tunable::kRowsBlocks) * processors;
  grid.in_flight = std::min(rows, std::max<int64_t>(1, blocks / pieces));
  grid.threads = static_cast<int>(32 * ceil(ceil(vectors, pieces * unroll), 32));
  return grid;
}

// The part of a row that this thread takes: `unroll` vectors, first, first + step, ...
struct RowPart {
  int64_t token, first;
  int64_t last;  // offset from `first` to the row's last vector, negative where the thread has none
  int step;

  __device__ __forceinline__ bool has(int u) const { return u * step <= last; }
  // Where to load vector u from, as an offset from `first`: past the end the last one, never to be stored.
  __device__ __forceinline__ int64_t load(int u) const { return has(u) ? u * step : last; }
};

__device__ __forceinline__ RowPart row_part(const RowGrid& grid, int unroll) {
  const uint32_t token = blockIdx.x / grid.pieces;
  const uint32_t piece = blockIdx.x - token * grid.pieces;
  const int step = static_cast<int>(blockDim.x);
  const int64_t first = static_cast<int64_t>(piece) * step * unroll + threadIdx.x;
  return {token, first, grid.vectors - 1 - first, step};
}

}  // namespace moe_route::cuda
