// Words of 4 bytes in one AVX-512 register, for the products of experts. The vocabulary of experts_rows.h.
#pragma once
#include <cstdint>

#include "avx512_intrinsics.h"

namespace moe_route::cpu::MOE_ROUTE_ISA {
namespace {

struct Vector {
  using Floats = __m512;
  using Words = __m512i;
  static constexpr int kLanes = 16;
  // What fits into 32 registers: the rows of x that share one pass over a row of weights (2 sums each), and those that
  // share columns.
  static constexpr int kTogether = 4, kColumnTokens = 8;
  // Of a panel: the vectors of rows and, by planes of x, the rows of x that share them.
  static constexpr int kPanelVectors = 4, kPanelTokens = 6, kPanelTokensOfPlanes = 5;

  // Into the second-level cache.
  static void prefetch(const void* from) { _mm_prefetch(static_cast<const char*>(from), _MM_HINT_T1); }
  static Floats zero() { return _mm512_setzero_ps(); }
  static Floats load(const float* from) { return _mm512_loadu_ps(from); }
  static void store(float* to, Floats v) { _mm512_storeu_ps(to, v); }
  static Floats broadcast(const float* from) { return _mm512_set1_ps(*from); }
  static Words broadcast_word(const void* from) {
    return _mm512_castps_si512(_mm512_set1_ps(*static_cast<const float*>(from)));
  }
  // Elements of 2 bytes of a and b side by side: the lower four of every 16 bytes, and the upper four.
  static Words interleave_low(Words a, Words b) { return _mm512_unpacklo_epi16(a, b); }
  static Words interleave_high(Words a, Words b) { return _mm512_unpackhi_epi16(a, b); }
  static Words words(const void* from) { return _mm512_loadu_si512(from); }
  static void store(void* to, Words v) { _mm512_storeu_si512(to, v); }
  static void store(void* to, Floats v) { _mm512_storeu_ps(to, v); }
  // The first `bytes` of a vector, an even number below 64; zeros behind them.
  static Words first_words(const void* from, int64_t bytes) {
    return _mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint64_t{1} << (bytes / 2)) - 1), from);
  }
  static Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
  static Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }

  // Word w of each 16 bytes of v[0], v[1], ... into v[w].
  static void turn(Words (&v)[4]) {
    const Words low01 = _mm512_unpacklo_epi32(v[0], v[1]), high01 = _mm512_unpackhi_epi32(v[0], v[1]);
    const Words low23 = _mm512_unpacklo_epi32(v[2], v[3]), high23 = _mm512_unpackhi_epi32(v[2], v[3]);
    v[0] = _mm512_unpacklo_epi64(low01, low23), v[1] = _mm512_unpackhi_epi64(low01, low23);
    v[2] = _mm512_unpacklo_epi64(high01, high23), v[3] = _mm512_unpackhi_epi64(high01, high23);
  }

  // Part l of 16 bytes of v[0], v[1], ... into v[l].
  static void turn_lanes(Words (&v)[4]) {
    const Words low01 = _mm512_shuffle_i32x4(v[0], v[1], 0x44),
                high01 = _mm512_shuffle_i32x4(v[0], v[1], 0xee);
    const Words low23 = _mm512_shuffle_i32x4(v[2], v[3], 0x44),
                high23 = _mm512_shuffle_i32x4(v[2], v[3], 0xee);
    v[0] = _mm512_shuffle_i32x4(low01, low23, 0x88), v[1] = _mm512_shuffle_i32x4(low01, low23, 0xdd);
    v[2] = _mm512_shuffle_i32x4(high01, high23, 0x88), v[3] = _mm512_shuffle_i32x4(high01, high23, 0xdd);
  }
  // Elements of 2 bytes of a and b side by side, in their order: those of the lower halves into a.
  static void interleave(Words& a, Words& b) {
    const Words low = _mm512_unpacklo_epi16(a, b), high = _mm512_unpackhi_epi16(a, b);
    a = _mm512_permutex2var_epi64(low, _mm512_set_epi64(11, 10, 3, 2, 9, 8, 1, 0), high);
    b = _mm512_permutex2var_epi64(low, _mm512_set_epi64(15, 14, 7, 6, 13, 12, 5, 4), high);
  }

  // Adds up the lanes of each of 16 vectors, those that `turn` laid 8, 4, 2 and 1 stripes apart.
  static Floats fold(const Floats (&v)[16]) {
    Floats a[8], b[4], c[2];
    for (int i = 0; i < 8; ++i) {
      const __m512d x = _mm512_castps_pd(v[2 * i]), y = _mm512_castps_pd(v[2 * i + 1]);
      a[i] = add(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
    }
    for (int i = 0; i < 4; ++i) {
      const Floats x = a[2 * i], y = a[2 * i + 1];
      b[i] = add(_mm512_shuffle_ps(x, y, 0x88), _mm512_shuffle_ps(x, y, 0xdd));
    }
    for (int i = 0; i < 2; ++i) {
      const Floats x = b[2 * i], y = b[2 * i + 1];
      c[i] = add(_mm512_shuffle_f32x4(x, y, 0x44), _mm512_shuffle_f32x4(x, y, 0xee));
    }
    return add(_mm512_shuffle_f32x4(c[0], c[1], 0x88), _mm512_shuffle_f32x4(c[0], c[1], 0xdd));
  }

  // The halves of each word, widened.
  static Floats upper_bfloat16(Words v) {
    return _mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
  }
  static Floats lower_bfloat16(Words v) { return _mm512_castsi512_ps(_mm512_slli_epi32(v, 16)); }
  static Floats upper_float16(Words v) { return lower_float16(_mm512_srli_epi32(v, 16)); }
  static Floats lower_float16(Words v) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(v)); }
#if defined(__AVX512BF16__)
  // c + upper halves' product, rounded, + lower halves' product, rounded; a subnormal number counts as zero.
  static Floats dot_bfloat16(Words a, Words b, Floats c) {
#if defined(__clang__)  // Clang 16 crashes on a broadcast vector of type __m512bh (like LLVM issue 68117)
    asm("vdpbf16ps %2, %1, %0" : "+v"(c) : "v"(a), "v"(b));
    return c;
#else
    return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
#endif
  }
#endif
};

}  // namespace
}  // namespace moe_route::cpu::MOE_ROUTE_ISA
