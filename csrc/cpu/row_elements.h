// Elements of the types that rows have: widened to what sums are added up in, and rounded back. Compiled once
// per instruction set, each in the namespace of the file that includes it (MOE_ROUTE_ISA).
#pragma once
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace moe_route::cpu::MOE_ROUTE_ISA {
namespace {

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

}  // namespace
}  // namespace moe_route::cpu::MOE_ROUTE_ISA
