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

#include "dispatch_count.cuh"
#include "launch.h"
#include "tunables.h"

namespace moe_route::cuda {
namespace {

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
__device__ __forceinline__ int scan_warps(const Problem& problem, int* column) {
  int before = 0;
  const int step = 4 * problem.quads;
#pragma unroll 1
  for (int w = 0; w < problem.ranking_warps; w += kWarpsAtATime) {
    int counts[kWarpsAtATime];  // all read before the first is written
#pragma unroll
    for (int i = 0; i < kWarpsAtATime; ++i) counts[i] = column[i * step];
#pragma unroll
    for (int i = 0; i < kWarpsAtATime; ++i) {
      column[i * step] = before;
      before += counts[i];
    }
    column += kWarpsAtATime * step;
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
  if (problem.args.block == 1) return rows;
  const uint32_t n = static_cast<uint32_t>(rows), block = static_cast<uint32_t>(problem.args.block);
  uint32_t rest = n - __umulhi(n, problem.reciprocal) * block;
  if (rest >= block) rest -= block;
  return static_cast<int>(rest == 0 ? n : n - rest + block);
}

// First rows of the tile in all experts; returns the rows in use. A thread has the experts of one contiguous
// part. Block 0 writes the layout out.
template <Others kOthers>
__device__ __forceinline__ int lay_out(const Problem& problem, const Shared<kOthers>& shared) {
  constexpr int kBlock = kThreadsOf<kOthers>;
  const DispatchArgs& args = problem.args;
  const int part = (args.experts + kBlock - 1) / kBlock;
  const int begin = threadIdx.x * part, end = min(begin + part, args.experts);
  int rows = 0;
#pragma unroll 1
  for (int e = begin; e < end; ++e) {
    const int at = shared.at(e), counted = scan_warps(problem, shared.cursor + at);
    int total = counted;
    if (kOthers == Others::kSlots) total += shared.first[at] + shared.total[at];
    if (kOthers == Others::kTable)
      total = shared.total[at];
    else
      shared.total[at] = total;
    rows += padded(problem, total);
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
      shared.first[at] = kOthers == Others::kNone ? offset : shared.first[at] + offset;
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

// Of the lanes that are routed, those with the expert of this one. A vote a bit of the expert's index: the same
// short time whatever the ids.
template <int kBits>
__device__ __forceinline__ unsigned lanes_of_same(int expert, bool routed) {
  unsigned same = __ballot_sync(kWarp, routed);
#pragma unroll
  for (int bit = 0; bit < kBits; ++bit) {
    const int shifted = static_cast<int>(static_cast<unsigned>(expert) << (31 - bit));  // the bit as sign
    same &= ~(__ballot_sync(kWarp, shifted < 0) ^ static_cast<unsigned>(shifted >> 31));
  }
  return same;
}

template <class Id, int kBits, Others kOthers>
__device__ __forceinline__ void rank_segment(const Problem& problem, const Shared<kOthers>& shared,
                                             Slots<Id>& segment) {
  int* cursors = shared.cursor_of(warp());
  int64_t* inverse = problem.args.inverse + segment.begin;
  for_each_slot(segment, lane(), 32, [&](int i, int e) {
    if (i - lane() >= segment.count) return;  // alike in a warp
    const bool routed = e < segment.experts;
    const unsigned same = lanes_of_same<kBits>(e, routed);
    const int rank = __popc(same & ((1u << lane()) - 1)), at = shared.at(e);
    const int before = cursors[at], row = shared.first[at] + before + rank;
    __syncwarp();  // all have read before the first lane of an expert moves its cursor
    if (routed && rank == 0) cursors[at] = before + __popc(same);
    __syncwarp();
    if (routed) problem.args.order[row] = segment.begin + i;
    if (i < segment.count) inverse[i] = routed ? row : -1;
  });
}

template <class Id, int kBits, Others kOthers>
__global__ void __launch_bounds__(kThreadsOf<kOthers>, kOthers == Others::kNone ? 1 : 2)
    place_slots(const Problem problem) {
  constexpr int kBlock = kThreadsOf<kOthers>;
  const Shared<kOthers> shared(problem);
  const int own = blockIdx.x * problem.tile, slots = static_cast<int>(problem.args.slots);
  const int offset = warp() * problem.segment, left = min(problem.tile, slots - own) - offset;
  const bool ranks = warp() < problem.ranking_warps;
  Slots<Id> segment(problem, own + offset, ranks ? min(left, problem.segment) : 0);
  const auto clear_counters = [&] {  // while the first ids are on their way
    clear(shared.first, (2 + problem.ranking_warps) * problem.quads, kBlock);
    __syncthreads();
  };
  wait_for_earlier_kernels();
  segment.load(lane(), 32);
  if constexpr (kOthers == Others::kNone) {
    clear_counters();
  } else {
    OtherSlots<Id, kOthers> others(problem);
    clear_counters();
    others.count_into(problem, shared);
  }
  if constexpr (kOthers == Others::kTable) add_spans(problem, shared);
  int* counts = shared.cursor_of(warp());
  for_each_slot(segment, lane(), 32, [&](int, int e) { atomicAdd(&counts[shared.at(e)], 1); });
  if (segment.count > 32 * kIdsInFlight) segment.load(lane(), 32);  // others were loaded since
  __syncthreads();
  const int rows_in_use = lay_out<kOthers>(problem, shared);
  __syncthreads();
  rank_segment<Id, kBits>(problem, shared, segment);
  mark_tail<kBlock>(problem, rows_in_use);
}

constexpr int64_t kSharedBytes = 98 * 1024;  // of a block, at most; devices since 8.0 have 99 KiB or more
constexpr int64_t kRowsPerTile = 8192;
constexpr int32_t kFewExperts = 256;  // their ids have 8 bits
constexpr int32_t kExpertsAlone = 1024;

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
// place_slots up to as many again. An id costs about five times as much as a count: the sum is least here.
double best_spans(int64_t slots, int64_t experts) {
  return std::sqrt(10.0 * static_cast<double>(std::max<int64_t>(slots, 1)) / static_cast<double>(experts));
}

// Whole tiles: up to 1.5 times as many spans as would be best, and one.
int64_t tiles_of_span(int64_t tiles, int64_t slots, int64_t experts) {
  const double tiles_of_best = static_cast<double>(tiles) / best_spans(slots, experts);
  const int64_t span = std::max<int64_t>(1, std::llround(tiles_of_best));
  return std::max(span, ceil_div(tiles, tuned(Tunable::kDispatchSpans)));
}

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
  problem.table_quads = static_cast<int32_t>(ceil_div(experts, 4));
  problem.quads = static_cast<int32_t>(ceil_div(experts + 1, 4));
  problem.reciprocal = ~uint32_t{0} / static_cast<uint32_t>(args.block);
  problem.columns = 1;
  while (problem.columns < problem.table_quads && problem.columns < kThreads) problem.columns *= 2;
  return problem;
}

template <class Id, int kBits, Others kOthers>
void place(Problem problem, Stream stream) {
  constexpr int kBlock = kThreadsOf<kOthers>;
  const int64_t row = 16 * int64_t{problem.quads}, at_a_time = kWarpsAtATime;
  const int64_t wanted = std::max<int64_t>(1, ceil_div(problem.tile, 32 * at_a_time));
  const int64_t most = std::min<int64_t>(kBlock / 32, kSharedBytes / row - 2) / at_a_time;
  problem.ranking_warps = static_cast<int32_t>(at_a_time * std::min(wanted, most));
  problem.segment = static_cast<int32_t>(32 * ceil_div(problem.tile, 32 * problem.ranking_warps));
  const auto shared = static_cast<size_t>((2 + problem.ranking_warps) * row);
  launch("dispatch", place_slots<Id, kBits, kOthers>, problem.tiles, kBlock, shared, stream, problem);
}

template <class Id, int kBits>
void sort(const Problem& problem, Stream stream) {
  const int64_t slots = problem.args.slots;
  if (one_launch(slots)) {
    const bool few = slots <= tuned(Tunable::kDispatchAlone) && problem.args.experts <= kExpertsAlone;
    if (problem.tiles == 1 && few) return place<Id, kBits, Others::kNone>(problem, stream);
    return place<Id, kBits, Others::kSlots>(problem, stream);
  }
  launch("dispatch", count_spans<Id>, problem.spans, kThreads, 16 * static_cast<size_t>(problem.quads),
         stream, problem);
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

// Of the most spans that any device cuts the slots into.
int64_t dispatch_workspace_bytes(int64_t slots, int32_t experts) {
  if (one_launch(slots)) return 0;
  const auto most = static_cast<int64_t>(1.5 * best_spans(slots, experts)) + 2;
  const int64_t row = ceil_div(experts, 4) * static_cast<int64_t>(sizeof(int4));
  return std::min(most, tuned(Tunable::kDispatchSpans)) * row;
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
