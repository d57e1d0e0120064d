// expert_activation on CUDA: a block takes a piece of a row at a time, kUnroll vectors of the result a thread, and
// twice as many of a gated row in flight. Bound by memory: rows read once, the result written once. The grid comes
// from the capacity alone; how many rows are in use is read on the device.
//
// Vectors have 16 bytes where every address and half a row allow it, and are single elements otherwise.
#include <cstdint>
#include <type_traits>

#include "elements.cuh"
#include "launch.h"
#include "rows.cuh"

namespace moe_route::cuda {
namespace {

constexpr int kUnroll = 2;

// The vectors of a row that make one vector of the result.
template <class Type, int Bytes, Pairing kPairing>
struct Pair {
  static constexpr int kElements = Bytes / Type::kBytes;
  Words<Bytes> first, second;

  __device__ __forceinline__ void load(const Vector<Bytes>* row, int64_t vectors, int64_t v) {
    if constexpr (kPairing == Pairing::kAlternating) {
      first = words(row[2 * v]), second = words(row[2 * v + 1]);
    } else {
      first = words(row[v]);
      if constexpr (kPairing == Pairing::kHalves) second = words(row[vectors + v]);
    }
  }
  __device__ __forceinline__ float gate(int i) const {
    return kPairing == Pairing::kAlternating ? behind_one_another(2 * i) : Type::widen(first.word, i);
  }
  __device__ __forceinline__ float up(int i) const {
    if constexpr (kPairing == Pairing::kAlternating) return behind_one_another(2 * i + 1);
    return Type::widen(kPairing == Pairing::kHalves ? second.word : first.word, i);
  }

 private:
  __device__ __forceinline__ float behind_one_another(int i) const {
    return i < kElements ? Type::widen(first.word, i) : Type::widen(second.word, i - kElements);
  }
};

// Runs body with the kind as a constant, so that elements do not branch one by one.
template <class Body>
__device__ __forceinline__ void with_kind(ActivationKind kind, Body body) {
  switch (kind) {
    case ActivationKind::kSilu:
      return body(std::integral_constant<ActivationKind, ActivationKind::kSilu>{});
    case ActivationKind::kGelu:
      return body(std::integral_constant<ActivationKind, ActivationKind::kGelu>{});
    case ActivationKind::kGeluTanh:
      return body(std::integral_constant<ActivationKind, ActivationKind::kGeluTanh>{});
    case ActivationKind::kRelu:
      return body(std::integral_constant<ActivationKind, ActivationKind::kRelu>{});
    case ActivationKind::kReluSquared:
      return body(std::integral_constant<ActivationKind, ActivationKind::kReluSquared>{});
    default:
      return body(std::integral_constant<ActivationKind, ActivationKind::kNone>{});
  }
}

template <class Type, int Bytes, Pairing kPairing>
__device__ __forceinline__ void activate_row(const ExpertActivationArgs& args, const RowGrid& grid,
                                             const RowPart& part, int64_t row) {
  using V = Vector<Bytes>;
  using Values = Pair<Type, Bytes, kPairing>;
  constexpr int kVectors = kPairing == Pairing::kNone ? 1 : 2;
  const V* from = static_cast<const V*>(args.rows) + row * kVectors * grid.vectors;
  Values values[kUnroll], biases[kUnroll] = {};
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) values[u].load(from, grid.vectors, part.first + part.load(u));
  if (args.bias != nullptr) {
    const V* bias = static_cast<const V*>(args.bias) + args.expert_of(row) * kVectors * grid.vectors;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) biases[u].load(bias, grid.vectors, part.first + part.load(u));
  }
  V* out = static_cast<V*>(args.out) + row * grid.vectors + part.first;
  with_kind(args.activation.kind, [&](auto kind) {
    Activation activation = args.activation;
    activation.kind = decltype(kind)::value;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      float result[Values::kElements];
#pragma unroll
      for (int i = 0; i < Values::kElements; ++i) {
        const float up = values[u].up(i) + biases[u].up(i);
        if constexpr (kPairing == Pairing::kNone) {
          result[i] = apply(activation, up);
        } else {
          result[i] = apply_gated(activation, values[u].gate(i) + biases[u].gate(i), up);
        }
      }
      Words<Bytes> rounded;
      Type::round(rounded.word, result, Values::kElements);
      if (part.has(u)) out[u * part.step] = vector(rounded);
    }
  });
}

template <class Type, int Bytes, Pairing kPairing>
__global__ void __launch_bounds__(kRowThreads)
    activate_rows(const ExpertActivationArgs args, const RowGrid grid) {
  wait_for_earlier_kernels();
  const RowPart part = row_part(grid, kUnroll);
  const int64_t end = args.rows_in_use();
  if (part.last < 0) return;
  for (int64_t row = part.token; row < end; row += grid.in_flight) {
    activate_row<Type, Bytes, kPairing>(args, grid, part, row);
  }
}

template <class Type, int Bytes, Pairing kPairing>
void launch_activation(const ExpertActivationArgs& args, Stream stream) {
  const RowGrid grid = row_grid(args.capacity, args.columns * Type::kBytes / Bytes, kUnroll);
  launch("expert_activation", activate_rows<Type, Bytes, kPairing>, grid.blocks(), grid.threads, 0, stream,
         args, grid);
}

template <class Type, Pairing kPairing>
void activate_in(const ExpertActivationArgs& args, Stream stream) {
  if (vector_bytes(args.columns * Type::kBytes, args.rows, args.bias, args.out) == 16) {
    return launch_activation<Type, 16, kPairing>(args, stream);
  }
  launch_activation<Type, Type::kBytes, kPairing>(args, stream);
}

template <class Type>
void activate_as(const ExpertActivationArgs& args, Stream stream) {
  switch (args.pairing) {
    case Pairing::kHalves:
      return activate_in<Type, Pairing::kHalves>(args, stream);
    case Pairing::kAlternating:
      return activate_in<Type, Pairing::kAlternating>(args, stream);
    default:
      return activate_in<Type, Pairing::kNone>(args, stream);
  }
}

template <class Type, Pairing kPairing>
void load_pairing() {
  load(activate_rows<Type, 16, kPairing>), load(activate_rows<Type, Type::kBytes, kPairing>);
}

template <class Type>
void load_type() {
  load_pairing<Type, Pairing::kNone>(), load_pairing<Type, Pairing::kHalves>();
  load_pairing<Type, Pairing::kAlternating>();
}

}  // namespace

void expert_activation(const ExpertActivationArgs& args, Stream stream) {
  if (args.capacity == 0 || args.columns == 0) return;
  switch (args.type) {
    case DType::kBFloat16:
      return activate_as<BFloat16>(args, stream);
    case DType::kFloat16:
      return activate_as<Float16>(args, stream);
    default:
      return activate_as<Float32>(args, stream);
  }
}

void load_expert_activation_kernels() { load_type<BFloat16>(), load_type<Float16>(), load_type<Float32>(); }

}  // namespace moe_route::cuda
