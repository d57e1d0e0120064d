// permute on CUDA: a block reads a piece of a token's row once, kUnroll vectors a thread in flight, and
// writes it to the rows of the token's slots; then the same blocks clear the rows that serve no slot. Bound
// by memory: (1 + k) * T * row_bytes.
//
// Stores are left to the cache's own policy: the experts read the rows next, and whatever of them fits stays
// in the second-level cache until then.
#include <algorithm>
#include <cstdint>
#include <stdexcept>

#include "launch.h"
#include "rows.cuh"

namespace moe_route::cuda {
namespace {

constexpr int kUnroll = 4;
constexpr int kRowsCleared = 8;  // rows a block may have to clear for the work of a token

template <int Bytes>
__device__ __forceinline__ void copy_token(const PermuteArgs& args, const RowGrid& grid, const RowPart& part,
                                           int64_t token) {
  using V = Vector<Bytes>;
  const V* source = static_cast<const V*>(args.x) + token * grid.vectors + part.first;
  V* rows = static_cast<V*>(args.rows) + part.first;
  V piece[kUnroll];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) piece[u] = source[part.load(u)];
  const int lane = threadIdx.x & 31;
  for (int64_t group = 0; group < args.k; group += 32) {
    const int64_t slot = token * args.k + group + lane;
    const int64_t mine = group + lane < args.k ? args.inverse[slot] : -1;
    const bool serves = mine >= 0 && mine < args.capacity && args.order[mine] == slot;
    unsigned routed = __ballot_sync(kWarp, serves);
    for (; routed != 0; routed &= routed - 1) {
      V* row = rows + __shfl_sync(kWarp, mine, __ffs(routed) - 1) * grid.vectors;
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (part.has(u)) row[u * part.step] = piece[u];
      }
    }
  }
}

// Block b looks after rows b, b + blocks, ...: neighboring empty rows fall to different blocks. Every warp
// looks at the same 32 rows and clears its part of each empty one: every row that copy_token does not write.
template <int Bytes>
__device__ __forceinline__ void clear_empty_rows(const PermuteArgs& args, const RowGrid& grid) {
  using V = Vector<Bytes>;
  const int64_t blocks = gridDim.x, slots = args.tokens * args.k;
  for (int64_t first = blockIdx.x; first < args.capacity; first += 32 * blocks) {
    const int64_t r = first + (threadIdx.x & 31) * blocks;
    const int64_t slot = r < args.capacity ? args.order[r] : 0;
    const bool served = slot >= 0 && slot < slots && args.inverse[slot] == r;
    unsigned empty = __ballot_sync(kWarp, r < args.capacity && !served);
    for (; empty != 0; empty &= empty - 1) {
      V* row = static_cast<V*>(args.rows) + (first + (__ffs(empty) - 1) * blocks) * grid.vectors;
      for (int64_t v = threadIdx.x; v < grid.vectors; v += blockDim.x) row[v] = V{};
    }
  }
}

template <int Bytes>
__global__ void __launch_bounds__(kRowThreads) permute_rows(const PermuteArgs args, const RowGrid grid) {
  wait_for_earlier_kernels();
  const RowPart part = row_part(grid, kUnroll);
  for (int64_t token = part.token; token < args.tokens; token += grid.in_flight) {
    copy_token<Bytes>(args, grid, part, token);
  }
  clear_empty_rows<Bytes>(args, grid);
}

template <int Bytes>
void launch_permute(const PermuteArgs& args, Stream stream) {
  const int64_t rows = std::max(args.tokens, (args.capacity + kRowsCleared - 1) / kRowsCleared);
  const RowGrid grid = row_grid(rows, args.row_bytes / Bytes, kUnroll);
  launch("permute", permute_rows<Bytes>, grid.blocks(), grid.threads, 0, stream, args, grid);
}

}  // namespace

void permute(const PermuteArgs& args, Stream stream) {
  if (args.row_bytes == 0 || args.capacity == 0) return;
  switch (vector_bytes(args.row_bytes, args.x, args.rows)) {
    case 16:
      return launch_permute<16>(args, stream);
    case 8:
      return launch_permute<8>(args, stream);
    case 4:
      return launch_permute<4>(args, stream);
    case 2:
      return launch_permute<2>(args, stream);
    default:
      throw std::runtime_error("moe_route: permute needs rows and addresses that are multiples of two bytes");
  }
}

void load_permute_kernels() {
  load(permute_rows<16>), load(permute_rows<8>), load(permute_rows<4>), load(permute_rows<2>);
}

}  // namespace moe_route::cuda
