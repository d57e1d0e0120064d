// dispatch on CPU: a stable counting sort. Slots are cut into one contiguous piece per worker; each worker
// counts its piece, a scan over (expert, worker) gives every worker its first row of every expert, each
// worker scatters its piece. So a row's place depends on the slots before it only, not on the number of
// workers. O(T * k + E).
#include "moe_route/dispatch.h"

#include <algorithm>
#include <vector>

namespace moe_route::cpu {
namespace {

constexpr int64_t kSlotsPerWorker = 8192;

template <class Id>
struct Sort {
  const DispatchArgs& args;
  const Id* ids;
  int workers;
  std::vector<int64_t> cursor;  // [workers, E]: counts, then the next row of a worker in an expert

  int64_t begin(int64_t worker) const { return args.slots * worker / workers; }
  int64_t* row(int64_t worker) { return cursor.data() + worker * args.experts; }
  bool routed(Id id) const { return id >= 0 && id < static_cast<Id>(args.experts); }

  void count(int64_t worker) {
    int64_t* counts = row(worker);
    for (int64_t s = begin(worker); s < begin(worker + 1); ++s) {
      if (routed(ids[s])) ++counts[ids[s]];
    }
  }

  void scan() {
    int64_t next = 0;
    for (int32_t e = 0; e < args.experts; ++e) {
      args.offsets[e] = next;
      int64_t place = next;
      for (int w = 0; w < workers; ++w) {
        const int64_t mine = row(w)[e];
        row(w)[e] = place;
        place += mine;
      }
      args.counts[e] = place - next;
      next += (args.counts[e] + args.block - 1) / args.block * args.block;
      args.ends[e] = static_cast<int32_t>(next);
    }
    args.offsets[args.experts] = next;
  }

  void scatter(int64_t worker) {
    int64_t* place = row(worker);
    for (int64_t s = begin(worker); s < begin(worker + 1); ++s) {
      const int64_t r = routed(ids[s]) ? place[ids[s]]++ : -1;
      args.inverse[s] = r;
      if (r >= 0) args.order[r] = s;
    }
  }

  void mark_empty_rows() {
    for (int32_t e = 0; e < args.experts; ++e) {
      std::fill(args.order + args.offsets[e] + args.counts[e], args.order + args.offsets[e + 1], int64_t{-1});
    }
    std::fill(args.order + args.offsets[args.experts], args.order + args.capacity, int64_t{-1});
  }
};

template <class Id>
void sort(const DispatchArgs& args, Parallel parallel, int threads) {
  const int workers =
      static_cast<int>(std::clamp<int64_t>(args.slots / kSlotsPerWorker, 1, std::max(threads, 1)));
  Sort<Id> work{args, static_cast<const Id*>(args.ids), workers,
                std::vector<int64_t>(int64_t{workers} * args.experts)};
  const auto run = [&](ParallelBody body) {
    if (workers == 1)
      body(0, 1, &work);
    else
      parallel(workers, 1, body, &work);
  };
  run([](int64_t begin, int64_t end, void* context) {
    for (int64_t w = begin; w < end; ++w) static_cast<Sort<Id>*>(context)->count(w);
  });
  work.scan();
  run([](int64_t begin, int64_t end, void* context) {
    for (int64_t w = begin; w < end; ++w) static_cast<Sort<Id>*>(context)->scatter(w);
  });
  work.mark_empty_rows();
}

}  // namespace

void dispatch(const DispatchArgs& args, Parallel parallel, int threads) {
  if (args.ids_type == DType::kInt64)
    sort<int64_t>(args, parallel, threads);
  else
    sort<int32_t>(args, parallel, threads);
}

}  // namespace moe_route::cpu
