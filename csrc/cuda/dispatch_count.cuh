// dispatch on CUDA: the problem of a launch, a block's counters in shared memory, and counting slots into them.
#pragma once
#include <cstdint>
#include <type_traits>

#include "launch.h"
#include "moe_route/dispatch.h"

namespace moe_route::cuda {
namespace {

constexpr unsigned kWarp = 0xffffffffu;
constexpr int kThreads = 512;
constexpr int kThreadsAlone = 256;  // of a block that is the only one
constexpr int kIdsInFlight = 4;     // loads of a thread
constexpr int kCountsInFlight = 5;  // of four counts each
constexpr int kWarpsAtATime = 4;    // whose counters are added up

struct Problem {
  DispatchArgs args;
  uint32_t reciprocal = 0;    // of args.block: (2^32 - 1) / block
  int32_t tile = 0;           // slots of a tile
  int32_t tiles = 0;          // blocks of place_slots
  int32_t span = 0;           // tiles of a span
  int32_t spans = 0;          // blocks of count_spans
  int32_t segment = 0;        // slots of a ranking warp
  int32_t ranking_warps = 0;  // a multiple of kWarpsAtATime, as many as shared memory has counters for
  int32_t quads = 0;          // groups of four counters: one for each expert, one for slots of none
  int32_t table_quads = 0;    // without that last one, unless it shares its four
  int32_t columns = 0;        // of these added up at a time: a power of two, up to kThreads
};

// What a block of place_slots has to count beside the slots of its own tile.
enum class Others {
  kNone,   // there are none
  kSlots,  // all others, apart where they come before its tile
  kTable,  // what count_spans has written, and slots of its span before its tile
};

template <Others kOthers>
constexpr int kThreadsOf = kOthers == Others::kNone ? kThreadsAlone : kThreads;

// What place_slots keeps in shared memory: rows of counters, one for each expert and one for slots of none. With
// a table, four neighbors lie apart, so that lanes with neighboring quads of the table meet different banks.
template <Others kOthers>
struct Shared {
  int* first;   // slots before this tile, then the first row of the tile
  int* total;   // slots; kSlots: those behind this tile
  int* cursor;  // [ranking warps, ...] slots that come before what the warp looks at
  int quads;

  __device__ explicit Shared(const Problem& problem)
      : first(reinterpret_cast<int*>(shared_memory())),
        total(first + 4 * problem.quads),
        cursor(total + 4 * problem.quads),
        quads(problem.quads) {}
  __device__ __forceinline__ int at(int expert) const {
    return kOthers == Others::kTable ? (expert & 3) * quads + (expert >> 2) : expert;
  }
  __device__ __forceinline__ int* cursor_of(int warp) const { return cursor + warp * 4 * quads; }
};

__device__ __forceinline__ int lane() { return threadIdx.x & 31; }
__device__ __forceinline__ int warp() { return threadIdx.x / 32; }

__device__ __forceinline__ void clear(void* quads, int count, int threads) {
  for (int i = threadIdx.x; i < count; i += threads) static_cast<uint4*>(quads)[i] = {0, 0, 0, 0};
}

// Consecutive slots, read kIds * step at a time: first + n * step for n = 0, 1, ... is a thread's own. Threads
// that agree on slots and step take the same number of turns.
template <class Id, int kIds = kIdsInFlight>
struct Slots {
  const Id* ids;
  int begin, count, experts;
  Id id[kIds];

  __device__ __forceinline__ Slots(const Problem& problem, int begin, int count)
      : ids(static_cast<const Id*>(problem.args.ids) + begin),
        begin(begin),
        count(count),
        experts(problem.args.experts) {}

  __device__ __forceinline__ void load(int first, int step) {
#pragma unroll
    for (int n = 0; n < kIds; ++n) {
      const int i = first + n * step;
      id[n] = i < count ? ids[i] : Id{-1};
    }
  }
  // `experts` for a slot that is skipped or past the end.
  __device__ __forceinline__ int expert(int n) const {
    using Unsigned = std::make_unsigned_t<Id>;
    const Unsigned value = static_cast<Unsigned>(id[n]), none = static_cast<Unsigned>(experts);
    return static_cast<int>(value < none ? value : none);
  }
};

// use(i, expert) for the slots of `slots`; its first ids are loaded.
template <class Id, int kIds, class Use>
__device__ __forceinline__ void for_each_slot(Slots<Id, kIds>& slots, int first, int step, Use use) {
#pragma unroll 1
  for (int s = 0; s < slots.count;) {
#pragma unroll
    for (int n = 0; n < kIds; ++n) use(s + n * step + first, slots.expert(n));
    s += kIds * step;
    if (s < slots.count) slots.load(s + first, step);
  }
}

template <class Id>
__global__ void __launch_bounds__(kThreads) count_spans(const Problem problem) {
  int* counts = reinterpret_cast<int*>(shared_memory());
  const int begin = blockIdx.x * problem.span * problem.tile;
  const int left = static_cast<int>(problem.args.slots) - begin;
  Slots<Id> span(problem, begin, min(left, problem.span * problem.tile));
  wait_for_earlier_kernels();
  span.load(threadIdx.x, kThreads);
  clear(counts, problem.quads, kThreads);
  __syncthreads();
  for_each_slot(span, threadIdx.x, kThreads, [&](int, int e) { atomicAdd(&counts[e], 1); });
  __syncthreads();
  int4* row =
      static_cast<int4*>(problem.args.workspace) + static_cast<int64_t>(blockIdx.x) * problem.table_quads;
  for (int q = threadIdx.x; q < problem.table_quads; q += kThreads)
    row[q] = reinterpret_cast<int4*>(counts)[q];
}

// Adds the table's counts to `first` (spans before the own) and `total` (all). Thread (group, column) adds up
// every groups-th span of one quad of experts.
__device__ __forceinline__ void add_spans(const Problem& problem, const Shared<Others::kTable>& shared) {
  const int column = threadIdx.x & (problem.columns - 1);
  const int group = threadIdx.x / problem.columns, groups = kThreads / problem.columns;
  const int own = blockIdx.x / problem.span, quads = problem.table_quads;
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
      atomicAdd(&shared.first[j * shared.quads + q], before[j]);
      atomicAdd(&shared.total[j * shared.quads + q], all[j]);
    }
  }
}

// Slots of other tiles: of the span those before, which add_spans leaves; without a table, all.
template <class Id, Others kOthers>
struct OtherSlots : Slots<Id, kOthers == Others::kTable ? 4 : 8> {
  static constexpr bool kTable = kOthers == Others::kTable;

  __device__ __forceinline__ static int begin_of(const Problem& problem) {
    return kTable ? static_cast<int>(blockIdx.x / problem.span * problem.span) * problem.tile : 0;
  }
  __device__ __forceinline__ explicit OtherSlots(const Problem& problem)
      : OtherSlots::Slots(
            problem, begin_of(problem),
            (kTable ? static_cast<int>(blockIdx.x) * problem.tile : static_cast<int>(problem.args.slots)) -
                begin_of(problem)) {
    if (this->count > 0) this->load(threadIdx.x, kThreads);
  }
  __device__ __forceinline__ void count_into(const Problem& problem, const Shared<kOthers>& shared) {
    const int own = blockIdx.x * problem.tile;
    for_each_slot(*this, threadIdx.x, kThreads, [&](int i, int e) {
      int* row = kTable || i < own ? shared.first : shared.total;
      if (kTable || i < own || i >= own + problem.tile) atomicAdd(&row[shared.at(e)], 1);
    });
  }
};

}  // namespace
}  // namespace moe_route::cuda
