// combine over a range of tokens, compiled once per instruction set (each file in a namespace of its own).
// The compiler vectorises over the hidden dimension; every output element is the same sum in the same order,
// product and sum rounded apart (contraction is off), so all instruction sets give the same bits. Bound by
// memory: (k + 1) * T * H elements. The sum of a tile stays in the first-level cache.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "moe_route/dispatch.h"

namespace moe_route::cpu::MOE_ROUTE_ISA {
namespace {

constexpr int64_t kTile = 1024;

struct Float32 {
  using Sum = float;
  using Element = float;
  static const float* widened(float*, const float* from, int64_t) { return from; }
  static void store(float* to, const float* from, int64_t n) { std::copy_n(from, n, to); }
};

struct Float64 {
  using Sum = double;
  using Element = double;
  static const double* widened(double*, const double* from, int64_t) { return from; }
  static void store(double* to, const double* from, int64_t n) { std::copy_n(from, n, to); }
};

struct BFloat16 {
  using Sum = float;
  using Element = uint16_t;
  static const float* widened(float* to, const uint16_t* from, int64_t n) {
    for (int64_t i = 0; i < n; ++i) to[i] = std::bit_cast<float>(uint32_t{from[i]} << 16);
    return to;
  }
  static void store(uint16_t* to, const float* from, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t bits = std::bit_cast<uint32_t>(from[i]);
      const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
      to[i] = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
    }
  }
};

struct Float16 {
  using Sum = float;
  using Element = uint16_t;
  static float widen(uint16_t half) {
    const uint32_t magnitude = half & 0x7fffu, exponent = magnitude >> 10;
    const uint32_t sign = uint32_t{half & 0x8000u} << 16;
    if (exponent == 0x1f) return std::bit_cast<float>(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
    if (exponent != 0) return std::bit_cast<float>(sign | ((magnitude << 13) + (112u << 23)));
    const float subnormal = static_cast<float>(magnitude) * 0x1p-24f;
    return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(subnormal));
  }
  static uint16_t narrow(float value) {
    const uint32_t bits = std::bit_cast<uint32_t>(value), magnitude = bits & 0x7fffffffu;
    const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
    if (magnitude > 0x7f800000u) return sign | 0x7e00u;
    if (magnitude >= 0x477ff000u) return sign | 0x7c00u;  // 65520 and more round to infinity
    if (magnitude < 0x38800000u) {                        // subnormal: the sum's last bit is worth 2^-24
      const float aligned = std::bit_cast<float>(magnitude) + 0.5f;
      return static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(aligned) - std::bit_cast<uint32_t>(0.5f)));
    }
    return static_cast<uint16_t>(sign | (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1)) >> 13);
  }
  static const float* widened(float* to, const uint16_t* from, int64_t n) {
    int64_t i = 0;
#if defined(__F16C__)
    for (; i + 8 <= n; i += 8) {
      _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
    }
#endif
    for (; i < n; ++i) to[i] = widen(from[i]);
    return to;
  }
  static void store(uint16_t* to, const float* from, int64_t n) {
    int64_t i = 0;
#if defined(__F16C__)
    for (; i + 8 <= n; i += 8) {
      const __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), half);
    }
#endif
    for (; i < n; ++i) to[i] = narrow(from[i]);
  }
};

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
