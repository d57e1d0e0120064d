// dispatch on CUDA: the stable counting sort of dispatch.h in two launches, in which no block waits for
// another. The slots are cut into contiguous tiles, one a block of place_slots, and the tiles into spans.
//
//   count_spans  workspace [spans, E] int32 = slots of every expert in every span
//   place_slots  a block adds up that table (the spans before its own, and all) and counts the slots of its
//                span that come before its tile, scans the experts, and so knows the first row of its tile in
//                every expert. Its warps then rank a contiguous segment of the tile each: a slot's row is
//                that first row + slots of its expert in earlier segments + in earlier slots of its own.
//
// Where slots are few, place_slots alone: all slots are one span, which every block counts for itself. A row
// depends on the slots before it only, so any grid gives the same bits. Rows of no slot are shared out.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "launch.h"
#include "tunables.h"

namespace moe_route::cuda {
namespace {

constexpr unsigned kWarp = 0xffffffffu;
constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int64_t kSharedBytes = 96 * 1024;  // of a block, at most; devices since 8.0 have 99 KiB or more
constexpr int kIdsInFlight = 4;              // loads of a thread
constexpr int kCountsInFlight = 12;

constexpr int64_t kRowsPerTile = 8192;
constexpr int64_t kLongestSpan = int64_t{1} << 28;  // slots are numbered in 32 bits inside

struct Problem {
  DispatchArgs args;
  uint64_t reciprocal = 0;    // of args.block: (2^64 - 1) / block
  int32_t tile = 0;           // slots of a tile
  int32_t tiles = 0;          // blocks of place_slots
  int32_t span = 0;           // tiles of a span
  int32_t spans = 0;          // blocks of count_spans
  int32_t segment = 0;        // slots of a ranking warp
  int32_t ranking_warps = 0;  // as many as shared memory has counters for
  int32_t columns = 0;        // experts added up at a time: a power of two, 32..kThreads
};

// Slots of one expert: before this tile, and in all.
struct Counts {
  int64_t before, total;
};

// What place_slots keeps in shared memory.
struct Shared {
  int64_t* first_row;  // [E] of this tile in every expert
  int2* counted;       // [E] x: before this tile, y: all that were counted; where first_row will be
  Counts* partial;     // [kThreads] where several threads add up one column of the table, else none
  int* cursor;         // [ranking warps, E] slots of an expert that come before what the warp looks at

  __device__ explicit Shared(const Problem& problem)
      : first_row(reinterpret_cast<int64_t*>(moe_route_shared)),
        counted(reinterpret_cast<int2*>(moe_route_shared)),
        partial(reinterpret_cast<Counts*>(first_row + problem.args.experts)),
        cursor(reinterpret_cast<int*>(partial + (problem.columns < kThreads ? kThreads : 0))) {}
};

// Consecutive slots, numbered from 0 inside.
struct Stretch {
  int64_t begin;
  int count;
};

__device__ __forceinline__ int lane() { return threadIdx.x & 31; }
__device__ __forceinline__ int warp() { return threadIdx.x / 32; }

// Up to `tiles` tiles from tile `first` on, cut at the last slot; fewer than no slots where it lies before.
__device__ __forceinline__ Stretch stretch(const Problem& problem, int first, int tiles) {
  const int64_t begin = static_cast<int64_t>(first) * problem.tile, left = problem.args.slots - begin;
  const int64_t wanted = static_cast<int64_t>(tiles) * problem.tile;
  return {begin, static_cast<int>(left < wanted ? left : wanted)};
}

// use(i, expert) for slots i = first, first + step, ... of a stretch. expert is -1 for a slot that is skipped
// or past the end. Threads that agree on stretch and step make the same number of calls.
template <class Id, class Use>
__device__ __forceinline__ void for_each_slot(const Problem& problem, Stretch slots, int first, int step,
                                              Use use) {
  const Id* __restrict__ ids = static_cast<const Id*>(problem.args.ids) + slots.begin;
#pragma unroll 1
  for (int s = 0; s < slots.count; s += kIdsInFlight * step) {
    Id id[kIdsInFlight];
#pragma unroll
    for (int n = 0; n < kIdsInFlight; ++n) {
      const int i = s + n * step + first;
      id[n] = i < slots.count ? ids[i] : Id{-1};
    }
#pragma unroll
    for (int n = 0; n < kIdsInFlight; ++n) {
      const bool routed = id[n] >= 0 && id[n] < problem.args.experts;
      use(s + n * step + first, routed ? static_cast<int>(id[n]) : -1);
    }
  }
}

template <class Id>
__global__ void __launch_bounds__(kThreads) count_spans(const Problem problem) {
  int* counts = reinterpret_cast<int*>(moe_route_shared);
  const int experts = problem.args.experts;
  for (int e = threadIdx.x; e < experts; e += kThreads) counts[e] = 0;
  __syncthreads();
  const Stretch span = stretch(problem, blockIdx.x * problem.span, problem.span);
  for_each_slot<Id>(problem, span, threadIdx.x, kThreads, [&](int, int e) {
    if (e >= 0) atomicAdd(&counts[e], 1);
  });
  __syncthreads();
  int32_t* row = static_cast<int32_t*>(problem.args.workspace) + static_cast<int64_t>(blockIdx.x) * experts;
  for (int e = threadIdx.x; e < experts; e += kThreads) row[e] = counts[e];
}

// The slots of the span before the tile; where there is no table, all slots.
template <class Id, bool kTable>
__device__ __forceinline__ void count_span(const Problem& problem, const Shared& shared) {
  const int tile = blockIdx.x, first = kTable ? tile / problem.span * problem.span : 0;
  const Stretch slots = stretch(problem, first, kTable ? tile - first : problem.tiles);
  for_each_slot<Id>(problem, slots, threadIdx.x, kThreads, [&](int i, int e) {
    if (e < 0) return;
    if (kTable || i < tile * problem.tile) atomicAdd(&shared.counted[e].x, 1);
    if (!kTable) atomicAdd(&shared.counted[e].y, 1);
  });
}

// A warp's own slots.
template <class Id>
__device__ __forceinline__ void count_segment(const Problem& problem, const Shared& shared, Stretch segment) {
  int* counts = shared.cursor + warp() * problem.args.experts;
  for_each_slot<Id>(problem, segment, lane(), 32, [&](int, int e) {
    if (e >= 0) atomicAdd(&counts[e], 1);
  });
}

// The table's counts of expert `first` + column in the threads 0 .. columns - 1: spans before the own, and
// all. The other threads share the work: thread (group, column) adds up every groups-th span.
__device__ __forceinline__ Counts add_spans(const Problem& problem, const Shared& shared, int first) {
  const int column = threadIdx.x & (problem.columns - 1);
  const int group = threadIdx.x / problem.columns, groups = kThreads / problem.columns;
  const int experts = problem.args.experts, own = blockIdx.x / problem.span;
  const uint32_t* __restrict__ table = static_cast<const uint32_t*>(problem.args.workspace) + first + column;
  Counts sum = {0, 0};
#pragma unroll 1
  for (int span = group; span < problem.spans && first + column < experts;) {
    const int before_own = own - span;
    uint32_t n[kCountsInFlight], total = 0, before = 0;  // of so few spans: below 2^32
#pragma unroll
    for (int i = 0; i < kCountsInFlight; ++i, span += groups) {
      n[i] = span < problem.spans ? table[span * experts] : 0;
    }
#pragma unroll
    for (int i = 0; i < kCountsInFlight; ++i) {
      total += n[i];
      if (i * groups < before_own) before += n[i];
    }
    sum.total += total;
    sum.before += before;
  }
  if (groups == 1) return sum;
  shared.partial[threadIdx.x] = sum;
  __syncthreads();
  for (int g = 1; group == 0 && g < groups; ++g) {
    sum.total += shared.partial[g * problem.columns + column].total;
    sum.before += shared.partial[g * problem.columns + column].before;
  }
  return sum;
}

// Sum over the threads before this one; `all` is the sum over all. Threads from `threads` on, a multiple of
// 32, have 0.
__device__ __forceinline__ int64_t scan_block(int64_t mine, int threads, int64_t& all) {
  __shared__ int64_t sums[kWarps];
  int64_t inclusive = mine;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int64_t below = __shfl_up_sync(kWarp, inclusive, distance);
    if (lane() >= distance) inclusive += below;
  }
  if (lane() == 31) sums[warp()] = inclusive;
  __syncthreads();
  int64_t before = inclusive - mine;
  all = 0;
#pragma unroll 4
  for (int w = 0; w < threads / 32; ++w) {
    if (w < warp()) before += sums[w];
    all += sums[w];
  }
  __syncthreads();  // before the next scan writes
  return before;
}

// Turns a column of counts, one a warp, into the counts of the warps before.
__device__ __forceinline__ void scan_warps(const Problem& problem, const Shared& shared, int expert) {
  int* column = shared.cursor + expert;
  int counts[kWarps];  // all read before the first is written
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    counts[w] = w < problem.ranking_warps ? column[w * problem.args.experts] : 0;
  }
  int before = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (w < problem.ranking_warps) column[w * problem.args.experts] = before;
    before += counts[w];
  }
}

// Rows begin .. end - 1 of no slot at the end of an expert, each thread with an expert of its own; a block
// marks its share of the experts.
__device__ __forceinline__ void mark_gaps(const Problem& problem, int expert, int64_t begin, int64_t end) {
  const bool mine = begin < end && expert % problem.tiles == static_cast<int>(blockIdx.x);
  for (unsigned todo = __ballot_sync(kWarp, mine); todo != 0; todo &= todo - 1) {
    const int owner = __ffs(todo) - 1;
    const int64_t last = __shfl_sync(kWarp, end, owner);
#pragma unroll 1
    for (int64_t r = __shfl_sync(kWarp, begin, owner) + lane(); r < last; r += 32) {
      problem.args.order[r] = -1;
    }
  }
}

// Rows of no slot behind the last expert.
__device__ __forceinline__ void mark_tail(const Problem& problem, int64_t rows_in_use) {
  const int64_t mine = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t step = static_cast<int64_t>(problem.tiles) * kThreads;
#pragma unroll 1  // unrolled it would need a 64-bit division
  for (int64_t r = rows_in_use + mine; r < problem.args.capacity; r += step) problem.args.order[r] = -1;
}

// Rounded up to whole blocks. The product with the reciprocal is the quotient or one less; a 64-bit division
// would be a call, which costs every thread registers.
__device__ __forceinline__ int64_t padded(const Problem& problem, int64_t rows) {
  const int64_t block = problem.args.block;
  const int64_t quotient = static_cast<int64_t>(__umul64hi(static_cast<uint64_t>(rows), problem.reciprocal));
  int64_t rest = rows - quotient * block;
  if (rest >= block) rest -= block;
  return rest == 0 ? rows : rows - rest + block;
}

// First rows of the tile in all experts, a thread an expert; returns the rows in use. Block 0 writes the
// layout out.
template <bool kTable>
__device__ __forceinline__ int64_t lay_out(const Problem& problem, const Shared& shared) {
  const DispatchArgs& args = problem.args;
  int64_t next = 0;
#pragma unroll 1
  for (int first = 0; first < args.experts; first += problem.columns) {
    const int expert = first + threadIdx.x;
    const bool column = static_cast<int>(threadIdx.x) < problem.columns;  // alike in a warp
    const bool owner = column && expert < args.experts;
    const Counts listed = kTable ? add_spans(problem, shared, first) : Counts{0, 0};
    const int2 counted = owner ? shared.counted[expert] : int2{0, 0};
    const int64_t total = !owner ? 0 : kTable ? listed.total : counted.y;
    const int64_t rows = padded(problem, total);
    int64_t all;
    const int64_t offset = next + scan_block(rows, problem.columns, all);
    next += all;
    if (owner) {
      shared.first_row[expert] = offset + listed.before + counted.x;
      scan_warps(problem, shared, expert);
      if (blockIdx.x == 0) {
        args.offsets[expert] = offset;
        args.counts[expert] = total;
      }
    }
    if (column) mark_gaps(problem, expert, offset + total, offset + rows);
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) args.offsets[args.experts] = next;
  return next;
}

// The lanes with the expert of this one; of no use where it is -1. A vote a bit of the expert's index: the
// same short time whatever the ids.
template <int kBits>
__device__ __forceinline__ unsigned lanes_of_same(int expert) {
  unsigned same = __ballot_sync(kWarp, expert >= 0);
#pragma unroll
  for (int bit = 0; bit < kBits; ++bit) {
    const bool set = expert >> bit & 1;
    const unsigned with = __ballot_sync(kWarp, set);
    same &= set ? with : ~with;
  }
  return same;
}

template <class Id, int kBits>
__device__ __forceinline__ void rank_segment(const Problem& problem, const Shared& shared, Stretch segment) {
  int* cursor = shared.cursor + warp() * problem.args.experts;
  int64_t* inverse = problem.args.inverse + segment.begin;
  for_each_slot<Id>(problem, segment, lane(), 32, [&](int i, int e) {
    if (i - lane() >= segment.count) return;  // alike in a warp
    const unsigned same = lanes_of_same<kBits>(e);
    const int rank = __popc(same & ((1u << lane()) - 1));
    int64_t row = -1;
    int before = 0;
    if (e >= 0) {
      before = cursor[e];
      row = shared.first_row[e] + before + rank;
      problem.args.order[row] = segment.begin + i;
    }
    __syncwarp();  // all have read before the first lane of an expert moves its cursor
    if (e >= 0 && rank == 0) cursor[e] = before + __popc(same);
    __syncwarp();
    if (i < segment.count) inverse[i] = row;
  });
}

template <class Id, int kBits, bool kTable>
__global__ void __launch_bounds__(kThreads, 2) place_slots(const Problem problem) {
  const int experts = problem.args.experts;
  const Shared shared(problem);
  for (int i = threadIdx.x; i < problem.ranking_warps * experts; i += kThreads) shared.cursor[i] = 0;
  for (int e = threadIdx.x; e < experts; e += kThreads) shared.counted[e] = {0, 0};
  __syncthreads();
  const bool ranks = warp() < problem.ranking_warps;
  Stretch segment = stretch(problem, blockIdx.x, 1);
  segment.begin += warp() * problem.segment;
  segment.count = min(segment.count - warp() * problem.segment, problem.segment);
  count_span<Id, kTable>(problem, shared);
  if (ranks) count_segment<Id>(problem, shared, segment);
  __syncthreads();
  const int64_t rows_in_use = lay_out<kTable>(problem, shared);
  __syncthreads();
  if (ranks) rank_segment<Id, kBits>(problem, shared, segment);
  mark_tail(problem, rows_in_use);
}

constexpr int32_t kFewExperts = 256;  // their ids have 8 bits

// Counting so few slots in every block costs less than a launch.
bool one_launch(int64_t slots) { return slots <= tuned(Tunable::kDispatchOneLaunch); }

// A block of place_slots reads spans * E counts and up to slots / spans ids, which cost about twice as much
// each: least where both cost the same.
int64_t most_spans(int64_t slots, int32_t experts) {
  const double best = std::sqrt(2.0 * static_cast<double>(slots) / experts);
  return std::clamp<int64_t>(static_cast<int64_t>(best), 1, tuned(Tunable::kDispatchSpans));
}

// One or two blocks a multiprocessor, never a part of a second round.
int32_t count_of_tiles(const DispatchArgs& args) {
  const int64_t processors = device_attribute(cudaDevAttrMultiProcessorCount);
  const int64_t marked = one_launch(args.slots) ? args.capacity / kRowsPerTile : 0;
  const int64_t wanted = std::max(args.slots / tuned(Tunable::kDispatchTile), marked);
  const bool two = args.slots >= 2 * processors * tuned(Tunable::kDispatchLongTile);
  return static_cast<int32_t>(std::clamp<int64_t>(wanted, 1, (two ? 2 : 1) * processors));
}

Problem plan(const DispatchArgs& args) {
  const auto ceil = [](int64_t n, int64_t d) { return (n + d - 1) / d; };
  const int64_t experts = args.experts;
  Problem problem;
  problem.args = args;
  problem.tiles = count_of_tiles(args);
  const int64_t tile = ceil(args.slots, problem.tiles);
  const int64_t span = ceil(problem.tiles, most_spans(args.slots, args.experts));
  if (tile * span > kLongestSpan) {
    throw std::runtime_error("moe_route: " + std::to_string(args.slots) +
                             " slots are too many for this device; dispatch them in parts");
  }
  problem.tile = static_cast<int32_t>(tile);
  problem.span = static_cast<int32_t>(span);
  problem.spans = static_cast<int32_t>(ceil(problem.tiles, problem.span));
  const int64_t counters = (kSharedBytes - 8 * experts) / (4 * experts);
  problem.ranking_warps = static_cast<int32_t>(std::min<int64_t>(kWarps, counters));
  problem.segment = static_cast<int32_t>(32 * ceil(problem.tile, 32 * problem.ranking_warps));
  problem.reciprocal = ~uint64_t{0} / static_cast<uint64_t>(args.block);
  problem.columns = 32;
  while (problem.columns < args.experts && problem.columns < kThreads) problem.columns *= 2;
  return problem;
}

template <class Id, int kBits>
void sort(const Problem& problem, Stream stream) {
  const int64_t experts = problem.args.experts;
  const size_t shared = experts * (sizeof(int64_t) + sizeof(int) * problem.ranking_warps) +
                        (problem.columns < kThreads ? kThreads * sizeof(Counts) : 0);
  if (one_launch(problem.args.slots)) {
    launch("dispatch", place_slots<Id, kBits, false>, problem.tiles, kThreads, shared, stream, problem);
  } else {
    launch("dispatch", count_spans<Id>, problem.spans, kThreads, experts * sizeof(int), stream, problem);
    launch("dispatch", place_slots<Id, kBits, true>, problem.tiles, kThreads, shared, stream, problem);
  }
}

template <class Id>
void sort(const Problem& problem, Stream stream) {
  if (problem.args.experts <= kFewExperts) return sort<Id, 8>(problem, stream);
  return sort<Id, 12>(problem, stream);
}

template <class Id, int kBits>
void load_sort() {
  load(count_spans<Id>);
  load(place_slots<Id, kBits, false>);
  load(place_slots<Id, kBits, true>);
}

template <class Id>
void load_sort(int32_t experts) {
  return experts <= kFewExperts ? load_sort<Id, 8>() : load_sort<Id, 12>();
}

}  // namespace

int64_t dispatch_workspace_bytes(int64_t slots, int32_t experts) {
  return one_launch(slots) ? 0 : most_spans(slots, experts) * experts * static_cast<int64_t>(sizeof(int32_t));
}

void dispatch(const DispatchArgs& args, Stream stream) {
  const Problem problem = plan(args);
  if (args.ids_type == DType::kInt64) return sort<int64_t>(problem, stream);
  sort<int32_t>(problem, stream);
}

void load_dispatch_kernels(int32_t experts) {
  load_sort<int32_t>(experts);
  load_sort<int64_t>(experts);
}

}  // namespace moe_route::cuda
