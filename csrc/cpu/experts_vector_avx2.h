// Words of 4 bytes in one AVX2 register, for the products of experts. The vocabulary of experts_rows.h.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace moe_route::cpu::MOE_ROUTE_ISA {
namespace {

struct Vector {
  using Floats = __m256;
  using Words = __m256i;
  static constexpr int kLanes = 8;
  // What fits into 16 registers; see experts_vector_avx512.h. Here a row of x has 4 sums.
  static constexpr int kTogether = 2, kColumnTokens = 4;
  static constexpr int kPanelVectors = 2, kPanelTokens = 6, kPanelTokensOfPlanes = 4;

  // Into the second-level cache.
  static void prefetch(const void* from) { _mm_prefetch(static_cast<const char*>(from), _MM_HINT_T1); }
  static Floats zero() { return _mm256_setzero_ps(); }
  static Floats load(const float* from) { return _mm256_loadu_ps(from); }
  static void store(float* to, Floats v) { _mm256_storeu_ps(to, v); }
  static Floats broadcast(const float* from) { return _mm256_broadcast_ss(from); }
  static Words interleave_low(Words a, Words b) { return _mm256_unpacklo_epi16(a, b); }
  static Words interleave_high(Words a, Words b) { return _mm256_unpackhi_epi16(a, b); }
  static Words words(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
  static void store(void* to, Words v) { _mm256_storeu_si256(static_cast<__m256i*>(to), v); }
  static void store(void* to, Floats v) { _mm256_storeu_ps(static_cast<float*>(to), v); }
  static Words first_words(const void* from, int64_t bytes) {
    alignas(32) char copy[32] = {};
    std::memcpy(copy, from, static_cast<size_t>(bytes));
    return words(copy);
  }
  static Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
  static Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }

  static void turn(Words (&v)[4]) {
    const Words low01 = _mm256_unpacklo_epi32(v[0], v[1]), high01 = _mm256_unpackhi_epi32(v[0], v[1]);
    const Words low23 = _mm256_unpacklo_epi32(v[2], v[3]), high23 = _mm256_unpackhi_epi32(v[2], v[3]);
    v[0] = _mm256_unpacklo_epi64(low01, low23), v[1] = _mm256_unpackhi_epi64(low01, low23);
    v[2] = _mm256_unpacklo_epi64(high01, high23), v[3] = _mm256_unpackhi_epi64(high01, high23);
  }

  // Part l of 16 bytes of v[0], v[1] into v[l].
  static void turn_lanes(Words (&v)[2]) {
    const Words first = v[0];
    v[0] = _mm256_permute2x128_si256(first, v[1], 0x20), v[1] = _mm256_permute2x128_si256(first, v[1], 0x31);
  }
  // Elements of 2 bytes of a and b side by side, in their order: those of the lower halves into a.
  static void interleave(Words& a, Words& b) {
    const Words low = _mm256_unpacklo_epi16(a, b), high = _mm256_unpackhi_epi16(a, b);
    a = _mm256_permute2x128_si256(low, high, 0x20), b = _mm256_permute2x128_si256(low, high, 0x31);
  }

  static Floats fold(const Floats (&v)[8]) {
    Floats a[4], b[2];
    for (int i = 0; i < 4; ++i) {
      const __m256d x = _mm256_castps_pd(v[2 * i]), y = _mm256_castps_pd(v[2 * i + 1]);
      a[i] = add(_mm256_castpd_ps(_mm256_unpacklo_pd(x, y)), _mm256_castpd_ps(_mm256_unpackhi_pd(x, y)));
    }
    for (int i = 0; i < 2; ++i) {
      const Floats x = a[2 * i], y = a[2 * i + 1];
      b[i] = add(_mm256_shuffle_ps(x, y, 0x88), _mm256_shuffle_ps(x, y, 0xdd));
    }
    return add(_mm256_permute2f128_ps(b[0], b[1], 0x20), _mm256_permute2f128_ps(b[0], b[1], 0x31));
  }

  static Floats upper_bfloat16(Words v) {
    return _mm256_castsi256_ps(_mm256_and_si256(v, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
  }
  static Floats lower_bfloat16(Words v) { return _mm256_castsi256_ps(_mm256_slli_epi32(v, 16)); }
  static Floats upper_float16(Words v) { return lower_float16(_mm256_srli_epi32(v, 16)); }
  static Floats lower_float16(Words v) {
    const Words low = _mm256_and_si256(v, _mm256_set1_epi32(0xffff));
    const Words packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, low), 0x88);
    return _mm256_cvtph_ps(_mm256_castsi256_si128(packed));
  }
};

}  // namespace
}  // namespace moe_route::cpu::MOE_ROUTE_ISA
