#include "cpu_threads.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <bit>
#include <memory>
#include <stdexcept>
#include <vector>

namespace moe_route::cpu {
namespace {

// A parallel region costs 5 to 10 us; a worker should have more than that to do. Logits, at about 1 ns each.
constexpr int64_t kLogitsPerWorker = 16384;

int threads_allowed() {
  uint32_t threads = 1;
  if (torch_get_num_threads(&threads) != AOTI_TORCH_SUCCESS)
    throw std::runtime_error("torch_get_num_threads failed");
  return static_cast<int>(threads);
}

void on_torch_threads(int64_t n, int64_t grain, ParallelBody body, void* context) {
  if (n <= grain) {
    if (n > 0) body(0, n, context);
    return;
  }
  if (torch_parallel_for(0, n, grain, body, context) != AOTI_TORCH_SUCCESS) {
    throw std::runtime_error("torch_parallel_for failed");
  }
}

// The rows [first, last) of one statistics table that a range of tokens can touch.
struct Window {
  int64_t first = 0;
  int64_t last = 0;
  int64_t rows() const { return last - first; }
};

Window window(const int32_t* token_table, int column, int64_t table_rows, int64_t begin, int64_t end) {
  if (token_table == nullptr)
    return column == kTokenGroup ? Window{0, std::min<int64_t>(table_rows, 1)} : Window{};
  Window w{table_rows, 0};
  for (int64_t t = begin; t < end; ++t) {
    const int64_t row = token_table[t * kTokenColumns + column];
    if (row < 0 || row >= table_rows) continue;
    w.first = std::min(w.first, row);
    w.last = std::max(w.last, row + 1);
  }
  return w.rows() > 0 ? w : Window{};
}

// A worker's own zeroed copy of the table rows its tokens touch. Sequences lie together in a batch, so this
// is a small part of a long segment table.
class PrivateTable {
 public:
  PrivateTable() = default;
  PrivateTable(int64_t* shared, Window window, int64_t width)
      : shared_(shared),
        window_(window),
        width_(width),
        own_(std::make_unique<int64_t[]>(window.rows() * width)) {}

  // Where row 0 of the whole table would lie; only rows of the window are ever touched through it.
  int64_t* base() const {
    const auto offset = static_cast<uintptr_t>(window_.first * width_) * sizeof(int64_t);
    return reinterpret_cast<int64_t*>(reinterpret_cast<uintptr_t>(own_.get()) - offset);
  }
  void add_to_shared() const {
    int64_t* target = shared_ + window_.first * width_;
    for (int64_t i = 0; i < window_.rows() * width_; ++i) target[i] += own_[i];
  }

 private:
  int64_t* shared_ = nullptr;
  Window window_;
  int64_t width_ = 0;
  std::unique_ptr<int64_t[]> own_;
};

struct GateWork {
  int64_t begin = 0, end = 0;
  GateArgs args;
  PrivateTable groups, segments;
};

std::vector<GateWork> split(const GateArgs& args, int workers) {
  const GateStatistics& shared = args.statistics;
  const int64_t width = kStatScalars + int64_t{std::popcount(shared.planes)} * args.experts;
  std::vector<GateWork> parts(workers);
  for (int w = 0; w < workers; ++w) {
    GateWork& part = parts[w];
    part.begin = args.tokens * w / workers;
    part.end = args.tokens * (w + 1) / workers;
    part.args = args;
    if (w == 0) continue;
    if (shared.groups != nullptr) {
      const Window rows = window(args.token_table, kTokenGroup, shared.num_groups, part.begin, part.end);
      part.groups = PrivateTable(shared.groups, rows, width);
      part.args.statistics.groups = part.groups.base();
    }
    if (shared.segments != nullptr) {
      const Window rows = window(args.token_table, kTokenSegment, shared.num_segments, part.begin, part.end);
      part.segments = PrivateTable(shared.segments, rows, width);
      part.args.statistics.segments = part.segments.base();
    }
  }
  return parts;
}

}  // namespace

void launch_gate(const GateArgs& args) {
  const int64_t worth = args.tokens * args.experts / kLogitsPerWorker;
  const int workers =
      worth < 2 ? 1 : static_cast<int>(std::min<int64_t>({worth, threads_allowed(), args.tokens}));
  if (workers == 1) {
    if (args.tokens > 0) gate_rows(args, 0, args.tokens);
    return;
  }
  std::vector<GateWork> parts = split(args, workers);
  const ParallelBody body = [](int64_t begin, int64_t end, void* context) {
    auto* work = static_cast<GateWork*>(context);
    for (int64_t w = begin; w < end; ++w) gate_rows(work[w].args, work[w].begin, work[w].end);
  };
  on_torch_threads(workers, 1, body, parts.data());
  for (const GateWork& part : parts) {
    part.groups.add_to_shared();
    part.segments.add_to_shared();
  }
}

void launch_dispatch(const DispatchArgs& args) { dispatch(args, on_torch_threads, threads_allowed()); }
void launch_permute(const PermuteArgs& args) { permute(args, on_torch_threads); }
void launch_combine(const CombineArgs& args) { combine(args, on_torch_threads); }
void launch_expert_products(const ExpertProductArgs* products, int count) {
  expert_products(products, count, on_torch_threads, threads_allowed());
}
void launch_expert_activation(const ExpertActivationArgs& args) { expert_activation(args, on_torch_threads); }
void launch_expert_pack(const ExpertPackArgs& args) { pack_expert_weight(args, on_torch_threads); }

}  // namespace moe_route::cpu
