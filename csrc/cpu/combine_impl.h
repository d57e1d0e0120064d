// combine over a range of tokens, compiled once per instruction set (each file in a namespace of its own).
// The compiler vectorises over the hidden dimension; every output element is the same sum in the same order,
// product and sum rounded apart (contraction is off), so all instruction sets give the same bits. Bound by
// memory: (k + 1) * T * H elements. The sum of a tile stays in the first-level cache.
#include <algorithm>
#include <cstdint>

#include "moe_route/dispatch.h"
#include "row_elements.h"

namespace moe_route::cpu::MOE_ROUTE_ISA {
namespace {

constexpr int64_t kTile = 1024;

template <class Type>
void combine_tokens(const CombineArgs& args, int64_t begin, int64_t end) {
  using Sum = typename Type::Sum;
  using Element = typename Type::Element;
  const auto* rows = static_cast<const Element*>(args.rows);
  const auto* residual = static_cast<const Element*>(args.residual);
  const auto* weights = static_cast<const Sum*>(args.weights);
  auto* out = static_cast<Element*>(args.out);
  alignas(64) Sum sum[kTile];
  alignas(64) Sum buffer[kTile];
  for (int64_t t = begin; t < end; ++t) {
    for (int64_t h = 0; h < args.hidden; h += kTile) {
      const int64_t n = std::min(kTile, args.hidden - h);
      if (residual != nullptr)
        std::copy_n(Type::widened(buffer, residual + t * args.hidden + h, n), n, sum);
      else
        std::fill_n(sum, n, Sum{0});
      for (int64_t j = 0; j < args.k; ++j) {
        const int64_t r = args.inverse[t * args.k + j];
        if (r < 0 || r >= args.capacity) continue;
        const Sum weight = weights[t * args.k + j];
        const Sum* row = Type::widened(buffer, rows + r * args.hidden + h, n);
        for (int64_t i = 0; i < n; ++i) sum[i] += weight * row[i];
      }
      Type::store(out + t * args.hidden + h, sum, n);
    }
  }
}

}  // namespace

void combine_range(const CombineArgs& args, int64_t begin, int64_t end) {
  switch (args.type) {
    case DType::kBFloat16:
      return combine_tokens<BFloat16>(args, begin, end);
    case DType::kFloat16:
      return combine_tokens<Float16>(args, begin, end);
    case DType::kFloat64:
      return combine_tokens<Float64>(args, begin, end);
    default:
      return combine_tokens<Float32>(args, begin, end);
  }
}

}  // namespace moe_route::cpu::MOE_ROUTE_ISA
