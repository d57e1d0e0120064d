// expert_activation over a range of rows, compiled once per instruction set (each file in a namespace of its own).
#include <algorithm>
#include <cstdint>
#include <vector>

#include "moe_route/experts.h"
#include "row_elements.h"

namespace moe_route::cpu::MOE_ROUTE_ISA {
namespace {

template <class Type>
void run(const ExpertActivationArgs& args, int64_t begin, int64_t end) {
  using Element = typename Type::Element;
  const int64_t in = args.row_columns(), out = args.columns;
  std::vector<float> wide(in), of_bias(in), values(out);
  const bool gated = args.pairing != Pairing::kNone, alternating = args.pairing == Pairing::kAlternating;
  int32_t expert = -1;
  const std::vector<float> zeros(in);
  const float* bias = zeros.data();
  for (int64_t r = begin; r < end; ++r) {
    const int32_t owner = args.bias == nullptr ? -1 : args.expert_of(r);
    if (owner != expert) {
      expert = owner;
      bias = Type::widened(of_bias.data(), static_cast<const Element*>(args.bias) + expert * in, in);
    }
    const float* row = Type::widened(wide.data(), static_cast<const Element*>(args.rows) + r * in, in);
    for (int64_t c = 0; c < out; ++c) {
      const int64_t gate = alternating ? 2 * c : c, up = alternating ? 2 * c + 1 : gated ? out + c : c;
      const float u = row[up] + bias[up];
      values[c] = gated ? apply_gated(args.activation, row[gate] + bias[gate], u) : apply(args.activation, u);
    }
    Type::store(static_cast<Element*>(args.out) + r * out, values.data(), out);
  }
}

}  // namespace

void activate_rows(const ExpertActivationArgs& args, int64_t begin, int64_t end) {
  switch (args.type) {
    case DType::kBFloat16:
      return run<BFloat16>(args, begin, end);
    case DType::kFloat16:
      return run<Float16>(args, begin, end);
    default:
      return run<Float32>(args, begin, end);
  }
}

}  // namespace moe_route::cpu::MOE_ROUTE_ISA
