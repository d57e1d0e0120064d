// dispatch on CUDA: the stable counting sort of dispatch.h in two launches, in which no block waits for
// another. The slots are cut into contiguous tiles, one a block of place_slots, and the tiles into spans.
//
//   count_spans  workspace [spans, E] int32 = slots of every expert in every span; rows padded to whole int4
//   place_slots  a block adds up that table (the spans before its own, and all) and counts the slots of its
//                span that come before its tile, scans the experts, and so knows the first row of its tile in
//                every expert. Its warps then rank a contiguous segment of the tile each: a slot's row is
//                that first row + slots of its expert in earlier segments + in earlier slots of its own.
//
// Where slots are few, place_slots alone: every block counts all slots. Where one block is enough, it is a
// small one, whose warps have counted all there is when each has counted its own segment. A row depends on
// the slots before it only, so any grid gives the same bits. Rows of no slot are shared out.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "launch.h"
#include "tunables.h"

namespace moe_route::cuda {
namespace {

constexpr unsigned kWarp = 0xffffffffu;
constexpr int kThreads = 512;
constexpr int kThreadsAlone = 128;           // of a block that is the only one
constexpr int64_t kSharedBytes = 96 * 1024;  // of a block, at most; devices since 8.0 have 99 KiB or more
constexpr int kIdsInFlight = 4;              // loads of a thread
constexpr int kCountsInFlight = 5;           // of four counts each

constexpr int64_t kRowsPerTile = 8192;

struct Problem {
  DispatchArgs args;
  uint32_t reciprocal = 0;    // of args.block: (2^32 - 1) / block
  int32_t tile = 0;           // slots of a tile
  int32_t tiles = 0;          // blocks of place_slots
  int32_t span = 0;           // tiles of a span
  int32_t spans = 0;          // blocks of count_spans
  int32_t segment = 0;        // slots of a ranking warp
  int32_t ranking_warps = 0;  // as many as shared memory has counters for
  int32_t quads = 0;          // groups of four experts
  int32_t columns = 0;        // quads added up at a time: a power of two, up to kThreads
};

// What a block of place_slots has to count beside the slots of its own tile.
enum class Others {
  kNone,   // there are none
  kSlots,  // all slots, and those before its tile
  kTable,  // what count_spans has written, and slots of its span before its tile
};

template <Others kOthers>
constexpr int kThreadsOf = kOthers == Others::kNone ? kThreadsAlone : kThreads;

// What place_slots keeps in shared memory. Experts are numbered by `at`: four neighbors lie apart, so that
// lanes with neighboring quads of the table meet different banks.
struct Shared {
  int* first;   // [4 * quads] slots of an expert before this tile, then the first row of the tile in it
  int* total;   // [4 * quads] slots of an expert
  int* cursor;  // [ranking warps, E] slots of an expert that come before what the warp looks at
  int quads;

  __device__ explicit Shared(const Problem& problem)
      : first(reinterpret_cast<int*>(shared_memory())),
        total(first + 4 * problem.quads),
        cursor(total + 4 * problem.quads),
        quads(problem.quads) {}
  __device__ __forceinline__ int at(int expert) const { return (expert & 3) * quads + (expert >> 2); }
};

int64_t shared_words(const Problem& problem) {
  return 8 * int64_t{problem.quads} + int64_t{problem.ranking_warps} * problem.args.experts;
}

__device__ __forceinline__ int lane() { return threadIdx.x & 31; }
__device__ __forceinline__ int warp() { return threadIdx.x / 32; }

__device__ __forceinline__ void clear_shared(int words, int threads) {
  uint4* all = reinterpret_cast<uint4*>(moe_route_shared);
  for (int i = threadIdx.x; 4 * i < words; i += threads) all[i] = {0, 0, 0, 0};
}

// Consecutive slots, read kIdsInFlight * step at a time: first + n * step for n = 0, 1, ... is a thread's own.
// Threads that agree on slots and step take the same number of turns.
template <class Id>
struct Slots {
  const Id* ids;
  int begin, count, experts;
  Id id[kIdsInFlight];

  __device__ __forceinline__ Slots(const Problem& problem, int begin, int count)
      : ids(static_cast<const Id*>(problem.args.ids) + begin),
        begin(begin),
        count(count),
        experts(problem.args.experts) {}

  __device__ __forceinline__ void load(int first, int step) {
#pragma unroll
    for (int n = 0; n < kIdsInFlight; ++n) {
      const int i = first + n * step;
      id[n] = i < count ? ids[i] : Id{-1};
    }
  }
  // -1 for a slot that is skipped or past the end.
  __device__ __forceinline__ int expert(int n) const {
    const bool routed = static_cast<std::make_unsigned_t<Id>>(id[n]) < static_cast<unsigned>(experts);
    return routed ? static_cast<int>(id[n]) : -1;
  }
};

// use(i, expert) for the slots of `slots`; its first ids are loaded.
template <class Id, class Use>
__device__ __forceinline__ void for_each_slot(Slots<Id>& slots, int first, int step, Use use) {
#pragma unroll 1
  for (int s = 0; s < slots.count;) {
#pragma unroll
    for (int n = 0; n < kIdsInFlight; ++n) use(s + n * step + first, slots.expert(n));
    s += kIdsInFlight * step;
    if (s < slots.count) slots.load(s + first, step);
  }
}

template <class Id>
__global__ void __launch_bounds__(kThreads) count_spans(const Problem problem) {
  int* counts = reinterpret_cast<int*>(moe_route_shared);
  const int width = 4 * problem.quads, begin = blockIdx.x * problem.span * problem.tile;
  const int left = static_cast<int>(problem.args.slots) - begin;
  Slots<Id> span(problem, begin, min(left, problem.span * problem.tile));
  span.load(threadIdx.x, kThreads);
  clear_shared(width, kThreads);
  __syncthreads();
  for_each_slot(span, threadIdx.x, kThreads, [&](int, int e) {
    if (e >= 0) atomicAdd(&counts[e], 1);
  });
  __syncthreads();
  int4* row = static_cast<int4*>(problem.args.workspace) + static_cast<int64_t>(blockIdx.x) * problem.quads;
  for (int q = threadIdx.x; q < problem.quads; q += kThreads) row[q] = reinterpret_cast<int4*>(counts)[q];
}

// Adds the table's counts to `first` (spans before the own) and `total` (all). Thread (group, column) adds up
// every groups-th span of one quad of experts.
__device__ __forceinline__ void add_spans(const Problem& problem, const Shared& shared) {
  const int column = threadIdx.x & (problem.columns - 1);
  const int group = threadIdx.x / problem.columns, groups = kThreads / problem.columns;
  const int own = blockIdx.x / problem.span, quads = problem.quads;
  const int4* __restrict__ table = static_cast<const int4*>(problem.args.workspace);
  for (int q = column; q < quads; q += problem.columns) {
    int before[4] = {}, all[4] = {};
#pragma unroll 1
    for (int span = group; span < problem.spans; span += kCountsInFlight * groups) {
      int4 n[kCountsInFlight];
#pragma unroll
      for (int i = 0; i < kCountsInFlight; ++i) {
        const int row = span + i * groups;
        n[i] = row < problem.spans ? table[static_cast<int64_t>(row) * quads + q] : int4{0, 0, 0, 0};
      }
#pragma unroll
      for (int i = 0; i < kCountsInFlight; ++i) {
        const int count[4] = {n[i].x, n[i].y, n[i].z, n[i].w};
        const bool earlier = span + i * groups < own;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          all[j] += count[j];
          if (earlier) before[j] += count[j];
        }
      }
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      atomicAdd(&shared.first[j * quads + q], before[j]);
      atomicAdd(&shared.total[j * quads + q], all[j]);
    }
  }
}

// Slots of other tiles: what add_spans leaves, or all.
template <class Id, Others kOthers>
__device__ __forceinline__ void count_others(const Problem& problem, const Shared& shared) {
  const int own = blockIdx.x * problem.tile;
  constexpr bool kTable = kOthers == Others::kTable;
  const int begin = kTable ? blockIdx.x / problem.span * problem.span * problem.tile : 0;
  Slots<Id> slots(problem, begin, (kTable ? own : static_cast<int>(problem.args.slots)) - begin);
  slots.load(threadIdx.x, kThreads);
  for_each_slot(slots, threadIdx.x, kThreads, [&](int i, int e) {
    if (e < 0) return;
    if (kTable || i < own) atomicAdd(&shared.first[shared.at(e)], 1);
    if (!kTable) atomicAdd(&shared.total[shared.at(e)], 1);
  });
}

// Sum over the threads before this one; `all` is the sum over all.
template <int kBlock>
__device__ __forceinline__ int scan_block(int mine, int& all) {
  constexpr int kWarps = kBlock / 32;
  __shared__ int4 sums[kWarps / 4];
  int inclusive = mine;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int below = __shfl_up_sync(kWarp, inclusive, distance);
    if (lane() >= distance) inclusive += below;
  }
  if (lane() == 31) reinterpret_cast<int*>(sums)[warp()] = inclusive;
  __syncthreads();
  int before = inclusive - mine;
  all = 0;
#pragma unroll
  for (int w = 0; w < kWarps; w += 4) {
    const int4 four = sums[w / 4];
    const int sum[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (w + j < warp()) before += sum[j];
      all += sum[j];
    }
  }
  return before;
}

// Turns a column of counts, one a warp, into the counts of the warps before; returns their sum.
template <int kWarps>
__device__ __forceinline__ int scan_warps(const Problem& problem, int* column) {
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
  return before;
}

// Rows begin .. end - 1 of no slot at the end of an expert, each thread with an expert of its own; a block
// marks its share of the experts.
__device__ __forceinline__ void mark_gaps(const Problem& problem, int expert, int begin, int end) {
  const bool mine = begin < end && expert % problem.tiles == static_cast<int>(blockIdx.x);
  for (unsigned todo = __ballot_sync(kWarp, mine); todo != 0; todo &= todo - 1) {
    const int owner = __ffs(todo) - 1, last = __shfl_sync(kWarp, end, owner);
#pragma unroll 1
    for (int r = __shfl_sync(kWarp, begin, owner) + lane(); r < last; r += 32) problem.args.order[r] = -1;
  }
}

// Rows of no slot behind the last expert.
template <int kBlock>
__device__ __forceinline__ void mark_tail(const Problem& problem, int rows_in_use) {
  const int64_t step = static_cast<int64_t>(problem.tiles) * kBlock;
#pragma unroll 1
  for (int64_t r = rows_in_use + static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x;
       r < problem.args.capacity; r += step) {
    problem.args.order[r] = -1;
  }
}

// Rounded up to whole blocks. The product with the reciprocal is the quotient or one less.
__device__ __forceinline__ int padded(const Problem& problem, int rows) {
  const uint32_t n = static_cast<uint32_t>(rows), block = static_cast<uint32_t>(problem.args.block);
  uint32_t rest = n - __umulhi(n, problem.reciprocal) * block;
  if (rest >= block) rest -= block;
  return static_cast<int>(rest == 0 ? n : n - rest + block);
}

// First rows of the tile in all experts; returns the rows in use. A thread has the experts of one contiguous
// part. Block 0 writes the layout out.
template <Others kOthers>
__device__ __forceinline__ int lay_out(const Problem& problem, const Shared& shared) {
  constexpr int kBlock = kThreadsOf<kOthers>;
  const DispatchArgs& args = problem.args;
  const int part = (args.experts + kBlock - 1) / kBlock;
  const int begin = threadIdx.x * part, end = min(begin + part, args.experts);
  int rows = 0;
#pragma unroll 1
  for (int e = begin; e < end; ++e) {
    const int counted = scan_warps<kBlock / 32>(problem, shared.cursor + e);
    if (kOthers == Others::kNone) shared.total[shared.at(e)] = counted;
    rows += padded(problem, shared.total[shared.at(e)]);
  }
  int all;
  int offset = scan_block<kBlock>(rows, all);
#pragma unroll 1
  for (int n = 0; n < part; ++n) {  // as often in all threads, for mark_gaps
    const int e = begin + n;
    int real = 0, next = offset;
    if (e < end) {
      const int at = shared.at(e);
      real = shared.total[at];
      next += padded(problem, real);
      shared.first[at] += offset;
      if (blockIdx.x == 0) {
        args.offsets[e] = offset;
        args.ends[e] = next;
        args.counts[e] = real;
      }
    }
    if (args.block > 1) mark_gaps(problem, e, offset + real, next);
    offset = next;
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) args.offsets[args.experts] = all;
  return all;
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
__device__ __forceinline__ void rank_segment(const Problem& problem, const Shared& shared,
                                             Slots<Id>& segment) {
  int* cursor = shared.cursor + warp() * problem.args.experts;
  int64_t* inverse = problem.args.inverse + segment.begin;
  for_each_slot(segment, lane(), 32, [&](int i, int e) {
    if (i - lane() >= segment.count) return;  // alike in a warp
    const unsigned same = lanes_of_same<kBits>(e);
    const int rank = __popc(same & ((1u << lane()) - 1));
    int row = -1, before = 0;
    if (e >= 0) {
      before = cursor[e];
      row = shared.first[shared.at(e)] + before + rank;
      problem.args.order[row] = segment.begin + i;
    }
    __syncwarp();  // all have read before the first lane of an expert moves its cursor
    if (e >= 0 && rank == 0) cursor[e] = before + __popc(same);
    __syncwarp();
    if (i < segment.count) inverse[i] = row;
  });
}

template <class Id, int kBits, Others kOthers>
__global__ void __launch_bounds__(kThreadsOf<kOthers>, kOthers == Others::kNone ? 1 : 2)
    place_slots(const Problem problem) {
  constexpr int kBlock = kThreadsOf<kOthers>;
  const Shared shared(problem);
  const int own = blockIdx.x * problem.tile, slots = static_cast<int>(problem.args.slots);
  const int offset = warp() * problem.segment, left = min(problem.tile, slots - own) - offset;
  const bool ranks = warp() < problem.ranking_warps;
  Slots<Id> segment(problem, own + offset, ranks ? min(left, problem.segment) : 0);
  segment.load(lane(), 32);
  clear_shared(8 * problem.quads + problem.ranking_warps * problem.args.experts, kBlock);
  __syncthreads();
  if (kOthers != Others::kNone) count_others<Id, kOthers>(problem, shared);
  if (kOthers == Others::kTable) add_spans(problem, shared);
  int* counts = shared.cursor + warp() * problem.args.experts;
  for_each_slot(segment, lane(), 32, [&](int, int e) {
    if (e >= 0) atomicAdd(&counts[e], 1);
  });
  if (segment.count > 32 * kIdsInFlight) segment.load(lane(), 32);  // others were loaded since
  __syncthreads();
  const int rows_in_use = lay_out<kOthers>(problem, shared);
  __syncthreads();
  rank_segment<Id, kBits>(problem, shared, segment);
  mark_tail<kBlock>(problem, rows_in_use);
}

constexpr int32_t kFewExperts = 256;  // their ids have 8 bits

int64_t ceil_div(int64_t n, int64_t d) { return (n + d - 1) / d; }

// Counting so few slots in every block costs less than a launch.
bool one_launch(int64_t slots) { return slots <= tuned(Tunable::kDispatchOneLaunch); }

// One or two blocks a multiprocessor, never a part of a second round.
int64_t count_of_tiles(int64_t slots, int64_t marked) {
  const int64_t processors = device_attribute(cudaDevAttrMultiProcessorCount);
  const int64_t wanted = std::max(slots / tuned(Tunable::kDispatchTile), marked);
  const bool two = slots >= 2 * processors * tuned(Tunable::kDispatchLongTile);
  return std::clamp<int64_t>(wanted, 1, (two ? 2 : 1) * processors);
}

// A block of place_slots reads spans * E counts; one of count_spans counts slots / spans ids, and one of
// place_slots up to as many again. An id costs about five times as much as a count: the sum is least at
// sqrt(10 * slots / E) spans.
int64_t tiles_of_span(int64_t tiles, int64_t slots, int64_t experts) {
  const double best = std::sqrt(10.0 * static_cast<double>(slots) / static_cast<double>(experts));
  const int64_t span = std::max<int64_t>(1, std::llround(static_cast<double>(tiles) / best));
  return std::max(span, ceil_div(tiles, tuned(Tunable::kDispatchSpans)));
}

int64_t quads_of(int64_t experts) { return (experts + 3) / 4; }

Problem plan(const DispatchArgs& args) {
  const int64_t experts = args.experts;
  Problem problem;
  problem.args = args;
  const int64_t marked = one_launch(args.slots) ? args.capacity / kRowsPerTile : 0;
  const int64_t tiles = count_of_tiles(args.slots, marked), span = tiles_of_span(tiles, args.slots, experts);
  problem.tiles = static_cast<int32_t>(tiles);
  problem.tile = static_cast<int32_t>(ceil_div(args.slots, tiles));
  problem.span = static_cast<int32_t>(span);
  problem.spans = static_cast<int32_t>(ceil_div(tiles, span));
  problem.quads = static_cast<int32_t>(quads_of(experts));
  problem.reciprocal = ~uint32_t{0} / static_cast<uint32_t>(args.block);
  problem.columns = 1;
  while (problem.columns < problem.quads && problem.columns < kThreads) problem.columns *= 2;
  return problem;
}

template <class Id, int kBits, Others kOthers>
void place(Problem problem, Stream stream) {
  constexpr int kBlock = kThreadsOf<kOthers>;
  const int64_t counters = (kSharedBytes / 4 - 8 * int64_t{problem.quads}) / problem.args.experts;
  problem.ranking_warps = static_cast<int32_t>(std::min<int64_t>(kBlock / 32, counters));
  problem.segment = static_cast<int32_t>(32 * ceil_div(problem.tile, 32 * problem.ranking_warps));
  const size_t shared = 16 * static_cast<size_t>(ceil_div(shared_words(problem), 4));
  launch("dispatch", place_slots<Id, kBits, kOthers>, problem.tiles, kBlock, shared, stream, problem);
}

template <class Id, int kBits>
void sort(const Problem& problem, Stream stream) {
  const int64_t slots = problem.args.slots;
  if (problem.tiles == 1 && slots <= 4 * kThreadsAlone && problem.args.experts <= 8 * kThreadsAlone) {
    return place<Id, kBits, Others::kNone>(problem, stream);
  }
  if (one_launch(slots)) return place<Id, kBits, Others::kSlots>(problem, stream);
  launch("dispatch", count_spans<Id>, problem.spans, kThreads, 16 * static_cast<size_t>(problem.quads), stream,
         problem);
  place<Id, kBits, Others::kTable>(problem, stream);
}

template <class Id>
void sort(const Problem& problem, Stream stream) {
  if (problem.args.experts <= kFewExperts) return sort<Id, 8>(problem, stream);
  return sort<Id, 12>(problem, stream);
}

template <class Id, int kBits>
void load_sort() {
  load(count_spans<Id>);
  load(place_slots<Id, kBits, Others::kNone>);
  load(place_slots<Id, kBits, Others::kSlots>);
  load(place_slots<Id, kBits, Others::kTable>);
}

template <class Id>
void load_sort(int32_t experts) {
  return experts <= kFewExperts ? load_sort<Id, 8>() : load_sort<Id, 12>();
}

}  // namespace

int64_t dispatch_workspace_bytes(int64_t slots, int32_t experts) {
  if (one_launch(slots)) return 0;
  const int64_t tiles = count_of_tiles(slots, 0), span = tiles_of_span(tiles, slots, experts);
  return ceil_div(tiles, span) * quads_of(experts) * static_cast<int64_t>(sizeof(int4));
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
