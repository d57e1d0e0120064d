// combine on CUDA: a thread owns a few vectors of a token's row, adds up the rows of the token's slots in the
// order of j in registers and rounds once. Rows are loaded in batches of several j, all in flight before the
// first is used. Bound by memory: (k + 1) * T * H elements. No atomics.
//
// The bits of the CPU backend: every output element is the same sum in the same order, product and sum
// rounded apart (-fmad=false). Only a NaN is no more than a NaN: which one is the hardware's choice.
#include <cstdint>
#include <stdexcept>

#include "elements.cuh"
#include "launch.h"
#include "rows.cuh"

namespace moe_route::cuda {
namespace {

// The sums of one vector's elements.
template <class Type, int Bytes>
struct Sums {
  using Sum = typename Type::Sum;
  static constexpr int kElements = Bytes / Type::kBytes;

  Sum sum[kElements];

  __device__ __forceinline__ void start(Vector<Bytes> residual) {
    const Words<Bytes> from = words(residual);
#pragma unroll
    for (int i = 0; i < kElements; ++i) sum[i] = Type::widen(from.word, i);
  }
  __device__ __forceinline__ void add(Sum weight, Vector<Bytes> row) {
    const Words<Bytes> from = words(row);
#pragma unroll
    for (int i = 0; i < kElements; ++i) sum[i] += weight * Type::widen(from.word, i);
  }
  __device__ __forceinline__ Vector<Bytes> rounded() const {
    Words<Bytes> to;
    Type::round(to.word, sum, kElements);
    return vector(to);
  }
};

// What a lane knows of one of a token's slots.
template <class Sum>
struct Slot {
  int64_t row;
  Sum weight;
};

template <class Sum>
__device__ __forceinline__ Slot<Sum> load_slot(const CombineArgs& args, int64_t token, int64_t j) {
  if (j >= args.k) return {-1, Sum{0}};
  return {args.inverse[token * args.k + j], static_cast<const Sum*>(args.weights)[token * args.k + j]};
}

// Adds the rows of up to 32 slots, one held by each lane, Batch of them in flight; `slots` says which lanes
// hold one that is to be added. `rows` begins at this thread's first vector.
template <class Type, int Bytes, int Batch, int Unroll>
__device__ __forceinline__ void add_slots(Sums<Type, Bytes> (&sums)[Unroll], unsigned slots,
                                          Slot<typename Type::Sum> mine, const Vector<Bytes>* rows,
                                          int64_t vectors, const RowPart& part) {
  while (slots != 0) {
    Vector<Bytes> loaded[Batch][Unroll];
    typename Type::Sum weights[Batch];
    const int count = __popc(slots);
#pragma unroll
    for (int b = 0; b < Batch; ++b) {
      if (b < count) {
        const int source = __ffs(slots) - 1;
        slots &= slots - 1;
        weights[b] = __shfl_sync(kWarp, mine.weight, source);
        const Vector<Bytes>* from = rows + __shfl_sync(kWarp, mine.row, source) * vectors;
#pragma unroll
        for (int u = 0; u < Unroll; ++u) loaded[b][u] = from[part.load(u)];
      }
    }
#pragma unroll
    for (int b = 0; b < Batch; ++b) {
      if (b < count) {
#pragma unroll
        for (int u = 0; u < Unroll; ++u) sums[u].add(weights[b], loaded[b][u]);
      }
    }
  }
}

template <class Type, int Bytes, int Batch, int Unroll>
__device__ __forceinline__ void combine_token(const CombineArgs& args, int64_t vectors, const RowPart& part,
                                              int64_t token) {
  using V = Vector<Bytes>;
  using Sum = typename Type::Sum;
  const int lane = threadIdx.x & 31;
  const int64_t start = token * vectors + part.first;
  Slot<Sum> mine = load_slot<Sum>(args, token, lane);  // on its way together with the residual
  V residual[Unroll];
#pragma unroll
  for (int u = 0; u < Unroll; ++u) {  // no residual: zero bits, which are 0 in every type
    residual[u] = args.residual != nullptr ? static_cast<const V*>(args.residual)[start + part.load(u)] : V{};
  }
  Sums<Type, Bytes> sums[Unroll];
#pragma unroll
  for (int u = 0; u < Unroll; ++u) sums[u].start(residual[u]);
  for (int64_t group = 0; group < args.k; group += 32) {
    if (group > 0) mine = load_slot<Sum>(args, token, group + lane);
    const unsigned slots = __ballot_sync(kWarp, mine.row >= 0 && mine.row < args.capacity);
    const V* rows = static_cast<const V*>(args.rows) + part.first;
    add_slots<Type, Bytes, Batch>(sums, slots, mine, rows, vectors, part);
  }
  V* out = static_cast<V*>(args.out) + start;
#pragma unroll
  for (int u = 0; u < Unroll; ++u) {
    if (part.has(u)) out[u * part.step] = sums[u].rounded();
  }
}

template <class Type, int Bytes, int Batch, int Unroll>
__global__ void __launch_bounds__(kRowThreads) combine_rows(const CombineArgs args, const RowGrid grid) {
  wait_for_earlier_kernels();
  const RowPart part = row_part(grid, Unroll);
  for (int64_t token = part.token; token < args.tokens; token += grid.in_flight) {
    combine_token<Type, Bytes, Batch, Unroll>(args, grid.vectors, part, token);
  }
}

template <class Type, int Bytes, int Batch, int Unroll>
void launch_combine(const CombineArgs& args, Stream stream) {
  const RowGrid grid = row_grid(args.tokens, args.hidden * Type::kBytes / Bytes, Unroll);
  launch("combine", combine_rows<Type, Bytes, Batch, Unroll>, grid.blocks(), grid.threads, 0, stream, args,
         grid);
}

template <class Type>
void combine_wide(const CombineArgs& args, Stream stream) {
  if (args.k <= 2) return launch_combine<Type, 16, 2, 2>(args, stream);
  if (args.k <= 4) return launch_combine<Type, 16, 4, 1>(args, stream);
  return launch_combine<Type, 16, 8, 1>(args, stream);
}

template <class Type>
void combine_as(const CombineArgs& args, Stream stream) {
  const int bytes = vector_bytes(args.hidden * Type::kBytes, args.rows, args.residual, args.out);
  if (bytes == 16) return combine_wide<Type>(args, stream);
  if (bytes == 8) return launch_combine<Type, 8, 4, 2>(args, stream);
  if constexpr (Type::kBytes <= 4) {
    if (bytes == 4) return launch_combine<Type, 4, 4, 2>(args, stream);
  }
  if constexpr (Type::kBytes <= 2) {
    if (bytes == 2) return launch_combine<Type, 2, 4, 2>(args, stream);
  }
  throw std::runtime_error("moe_route: combine needs addresses that are multiples of the element size");
}

template <class Type>
void load_combine() {
  load(combine_rows<Type, 16, 2, 2>), load(combine_rows<Type, 16, 4, 1>), load(combine_rows<Type, 16, 8, 1>);
  load(combine_rows<Type, 8, 4, 2>);
  if constexpr (Type::kBytes <= 4) load(combine_rows<Type, 4, 4, 2>);
  if constexpr (Type::kBytes <= 2) load(combine_rows<Type, 2, 4, 2>);
}

}  // namespace

void combine(const CombineArgs& args, Stream stream) {
  if (args.tokens == 0 || args.hidden == 0) return;
  switch (args.type) {
    case DType::kBFloat16:
      return combine_as<BFloat16>(args, stream);
    case DType::kFloat16:
      return combine_as<Float16>(args, stream);
    case DType::kFloat64:
      return combine_as<Float64>(args, stream);
    default:
      return combine_as<Float32>(args, stream);
  }
}

void load_combine_kernels() {
  load_combine<BFloat16>(), load_combine<Float16>(), load_combine<Float32>(), load_combine<Float64>();
}

}  // namespace moe_route::cuda
