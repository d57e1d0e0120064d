// Products of experts on CUDA, for few rows: time is what reading the weights of the experts hit takes. Each of
// their matrices is read once for up to 8 rows, in loads of 16 bytes that lie side by side, 8 of a thread in
// flight (64 KiB of a multiprocessor). x of the rows waits in shared memory. No tensor cores: at two
// operations for each byte and row, 8 rows stay below what the vector units do in the time of the loads.
//
// experts_rows.cuh and experts_columns.cuh have the two layouts of weights, experts_work.cuh the work list.
// Bits: those of the CPU backend (experts.h).
#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "experts_columns.cuh"
#include "experts_rows.cuh"
#include "tunables.h"

namespace moe_route::cuda {
namespace {

using namespace experts;

int64_t ceil_div(int64_t n, int64_t d) { return (n + d - 1) / d; }

bool aligned(const void* address, int64_t elements, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(address) % kVectorBytes == 0 && elements * bytes % kVectorBytes == 0;
}

// Groups that there can be: one for each expert hit, and one more for every `at_once` of the other rows.
int64_t most_groups(const Problem& problem) {
  const int64_t rows = problem.args.capacity, hit = std::min<int64_t>(rows, problem.args.experts);
  return hit + (rows - hit) / problem.at_once;
}

// As many rows as half of a multiprocessor's shared memory holds, one at least.
int64_t rows_at_once(const Problem& problem, int64_t most, int64_t extra) {
  const int64_t row = int64_t{problem.steps} * kStripes * kVectorBytes;
  const int64_t half = device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor) / kBlocksAtOnce;
  const int64_t limit = std::min<int64_t>(most_shared_bytes(), half - kStaticSharedBytes);
  while (most > 1 && (most * row + extra > limit || most / 2 >= problem.args.capacity)) most /= 2;
  if (row + extra > most_shared_bytes()) {
    throw std::runtime_error("moe_route: rows of " + std::to_string(problem.args.in) +
                             " elements do not fit into this device's shared memory");
  }
  return most;
}

void start(const Problem& problem, void (*kernel)(Problem), int64_t extra, Stream stream) {
  const int64_t shared = int64_t{problem.at_once} * problem.steps * kStripes * kVectorBytes + extra;
  const int64_t blocks = most_groups(problem) * problem.tiles;
  if (blocks > INT32_MAX) throw std::runtime_error("moe_route: too many rows of experts for one launch");
  launch("product of experts", kernel, blocks, kThreads, static_cast<size_t>(shared), stream, problem);
}

// A tile's columns: what makes one round of resident blocks. Not too many for a warp, though: the last blocks
// would run alone for longer.
void tile_rows(Problem& problem, int64_t columns_at_a_time) {
  const int64_t at_a_time = kWarps * columns_at_a_time;
  const int64_t resident = int64_t{kBlocksAtOnce} * device_attribute(cudaDevAttrMultiProcessorCount);
  const int64_t rounds = ceil_div(most_groups(problem) * problem.args.out_columns, resident * at_a_time);
  const int64_t most = std::max<int64_t>(1, tuned(Tunable::kExpertsColumns) / columns_at_a_time);
  problem.columns = static_cast<int32_t>(at_a_time * std::clamp<int64_t>(rounds, 1, most));
  problem.tiles = static_cast<uint32_t>(ceil_div(problem.args.out_columns, problem.columns));
}

template <class Type, bool kGated, bool kWide>
void run_rows(Problem problem, Stream stream) {
  problem.steps =
      static_cast<int32_t>(kDepth * ceil_div(problem.args.in, kDepth * kStripes * kElements<Type>));
  problem.at_once = static_cast<int32_t>(rows_at_once(problem, kMostRows<Type, kWide>, 0));
  const ExpertProductArgs& args = problem.args;
  const int64_t row = args.in * Type::kBytes;
  problem.expert_bytes = args.weight_rows() * row;
  problem.column_bytes = args.pairing == Pairing::kAlternating ? 2 * row : row;
  problem.pair_bytes = args.pairing == Pairing::kHalves ? args.out_columns * row : row;
  problem.turn_bytes = kWarps * kColumnsAtATime<kGated> * problem.column_bytes -
                       int64_t{problem.steps} * kStripes * kVectorBytes;
  tile_rows(problem, kColumnsAtATime<kGated>);
  start(problem, multiply_rows<Type, kGated, kWide>, 0, stream);
}

template <class Type, bool kWide>
void run_columns(Problem problem, Stream stream) {
  const ExpertProductArgs& args = problem.args;
  const int64_t extra = int64_t{kWarps} * kTileColumns<Type> * kMostTeamRows<kWide> * sizeof(float);
  problem.steps = static_cast<int32_t>(ceil_div(args.in, kStripes * kElements<Type>));
  problem.at_once = static_cast<int32_t>(rows_at_once(problem, kMostTeamRows<kWide>, extra));
  problem.columns = args.pairing == Pairing::kNone ? kTileColumns<Type> : kTileColumns<Type> / 2;
  problem.tiles = static_cast<uint32_t>(ceil_div(args.out_columns, problem.columns));
  start(problem, multiply_columns<Type, kWide>, extra, stream);
}

// By layout, and whether all rows of the weight can be read in whole vectors.
template <class Type>
void run(const ExpertProductArgs& args, Stream stream) {
  Problem problem;
  problem.args = args;
  problem.wide_x = aligned(args.x, args.in, Type::kBytes);
  const bool gated = args.pairing != Pairing::kNone;
  if (args.transposed) {
    const int64_t whole = args.pairing == Pairing::kHalves ? args.out_columns : args.weight_rows();
    const bool wide = aligned(args.weight, whole, Type::kBytes);
    return wide ? run_columns<Type, true>(problem, stream) : run_columns<Type, false>(problem, stream);
  }
  if (aligned(args.weight, args.in, Type::kBytes)) {
    return gated ? run_rows<Type, true, true>(problem, stream) : run_rows<Type, false, true>(problem, stream);
  }
  return gated ? run_rows<Type, true, false>(problem, stream) : run_rows<Type, false, false>(problem, stream);
}

template <class Type>
void load_all() {
  load(multiply_rows<Type, true, true>), load(multiply_rows<Type, true, false>);
  load(multiply_rows<Type, false, true>), load(multiply_rows<Type, false, false>);
  load(multiply_columns<Type, true>), load(multiply_columns<Type, false>);
}

}  // namespace

void expert_product(const ExpertProductArgs& args, Stream stream) {
  if (args.out_columns == 0 || args.capacity == 0) return;
  if (args.in > INT32_MAX / 8 || args.weight_rows() > INT32_MAX / 8) {
    throw std::runtime_error("moe_route: experts of " + std::to_string(args.weight_rows()) + " x " +
                             std::to_string(args.in) + " are too large for these kernels");
  }
  switch (args.type) {
    case DType::kBFloat16:
      return run<BFloat16>(args, stream);
    case DType::kFloat16:
      return run<Float16>(args, stream);
    default:
      return run<Float32>(args, stream);
  }
}

void load_experts_kernels() { load_all<BFloat16>(), load_all<Float16>(), load_all<Float32>(); }

}  // namespace moe_route::cuda
