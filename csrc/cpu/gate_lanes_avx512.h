// Sixteen float lanes in one AVX-512 register. The vocabulary and its meaning are those of
// gate_lanes_portable.h.
#pragma once
#include <cstdint>

#include "avx512_intrinsics.h"
#include "moe_route/gate.h"
#include "moe_route/key.h"
#include "moe_route/math.h"

namespace moe_route::cpu {
namespace {

struct Mask {
  __mmask16 m;
};
inline uint32_t bits(Mask m) { return _cvtmask16_u32(m.m); }

struct Ints {
  __m512i v;
  Ints() = default;
  Ints(__m512i x) : v(x) {}
  explicit Ints(int32_t x) : v(_mm512_set1_epi32(x)) {}
  static Ints load(const int32_t* p) { return _mm512_loadu_si512(p); }
  void store(int32_t* p) const { _mm512_storeu_si512(p, v); }
  friend Mask operator>(Ints a, Ints b) { return {_mm512_cmpgt_epi32_mask(a.v, b.v)}; }
};
inline Ints add(Ints a, Ints b) { return _mm512_add_epi32(a.v, b.v); }
inline Ints sub(Ints a, Ints b) { return _mm512_sub_epi32(a.v, b.v); }
inline Ints shift_left(Ints a, int n) { return _mm512_slli_epi32(a.v, n); }
inline Ints count_where(Ints a, Mask m) { return _mm512_mask_add_epi32(a.v, m.m, a.v, _mm512_set1_epi32(1)); }
inline Ints shift_right(Ints a, int n) { return _mm512_srai_epi32(a.v, n); }

struct Lanes;
struct SortKeys;

struct FixedSums {
  __m512i low, high;
  static FixedSums load(const int64_t* p);
  void store(int64_t* p) const;
  void add(Lanes terms);
};

struct Lanes {
  using Scalar = float;
  using Int = Ints;
  using Fixed = FixedSums;
  using Mask = cpu::Mask;
  using Keys = SortKeys;
  static constexpr InstructionSet kSet = InstructionSet::kAvx512;
  static constexpr bool kTransposes = true;
  __m512 v;

  Lanes() = default;
  Lanes(__m512 x) : v(x) {}
  explicit Lanes(float x) : v(_mm512_set1_ps(x)) {}

  static __mmask16 first_lanes(int count) { return __mmask16((1u << count) - 1); }
  static Lanes load(const float* p) { return _mm512_loadu_ps(p); }
  static Lanes load_partial(const float* p, int count) {
    return _mm512_mask_loadu_ps(_mm512_set1_ps(__builtin_nanf("")), first_lanes(count), p);
  }
  static Lanes load_bfloat16(const uint16_t* p) {
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
  }
  static Lanes load_float16(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  // Lanes 0 to 7 from a, 8 to 15 from b.
  static Lanes pair(const float* a, const float* b) {
    return _mm512_insertf32x8(_mm512_castps256_ps512(_mm256_loadu_ps(a)), _mm256_loadu_ps(b), 1);
  }
  static __m256i pair_halves(const uint16_t* a, const uint16_t* b) {
    const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(a));
    return _mm256_inserti128_si256(_mm256_castsi128_si256(low),
                                   _mm_loadu_si128(reinterpret_cast<const __m128i*>(b)), 1);
  }
  static Lanes pair_bfloat16(const uint16_t* a, const uint16_t* b) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(pair_halves(a, b)), 16));
  }
  static Lanes pair_float16(const uint16_t* a, const uint16_t* b) {
    return _mm512_cvtph_ps(pair_halves(a, b));
  }
  void store(float* p) const { _mm512_storeu_ps(p, v); }

  friend Lanes operator+(Lanes a, Lanes b) { return _mm512_add_ps(a.v, b.v); }
  friend Lanes operator-(Lanes a, Lanes b) { return _mm512_sub_ps(a.v, b.v); }
  friend Lanes operator*(Lanes a, Lanes b) { return _mm512_mul_ps(a.v, b.v); }
  friend Lanes operator/(Lanes a, Lanes b) { return _mm512_div_ps(a.v, b.v); }
  friend Mask operator<(Lanes a, Lanes b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
  friend Mask operator>(Lanes a, Lanes b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ)}; }
  friend Mask operator>=(Lanes a, Lanes b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ)}; }
  friend Mask operator==(Lanes a, Lanes b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ)}; }
  friend Mask operator!=(Lanes a, Lanes b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_NEQ_UQ)}; }
};

inline Lanes fma(Lanes a, Lanes b, Lanes c) { return _mm512_fmadd_ps(a.v, b.v, c.v); }
inline Lanes sqrt(Lanes a) { return _mm512_sqrt_ps(a.v); }
inline Lanes abs(Lanes a) { return _mm512_abs_ps(a.v); }
inline Ints as_int(Lanes a) { return _mm512_castps_si512(a.v); }
inline Lanes as_float(Ints a) { return _mm512_castsi512_ps(a.v); }
inline Ints to_int(Lanes a) { return _mm512_cvttps_epi32(a.v); }
inline Lanes to_float(Ints a) { return _mm512_cvtepi32_ps(a.v); }
inline Lanes select(Mask m, Lanes yes, Lanes no) { return _mm512_mask_blend_ps(m.m, no.v, yes.v); }
// The instructions return their second operand on ties and NaN.
inline Lanes larger(Lanes x, Lanes kept) { return _mm512_max_ps(x.v, kept.v); }
inline Lanes smaller(Lanes x, Lanes kept) { return _mm512_min_ps(x.v, kept.v); }

inline Ints order_keys(Lanes x) {
  const __m512i i = _mm512_castps_si512(_mm512_add_ps(x.v, _mm512_setzero_ps()));
  const __m512i flip = _mm512_srli_epi32(_mm512_srai_epi32(i, 31), 1);
  return _mm512_mask_mov_epi32(_mm512_set1_epi32(INT32_MIN), bits(x == x), _mm512_xor_si512(i, flip));
}

template <class Op>
inline float fold(Lanes a, Op op) {  // op(high, low)
  const __m256 eight = op(_mm512_extractf32x8_ps(a.v, 1), _mm512_castps512_ps256(a.v));
  const __m256 four = op(_mm256_castps128_ps256(_mm256_extractf128_ps(eight, 1)), eight);
  const __m128 low = _mm256_castps256_ps128(four);
  const __m256 two = op(_mm256_castps128_ps256(_mm_movehl_ps(low, low)), four);
  const __m128 pair = _mm256_castps256_ps128(two);
  return _mm_cvtss_f32(_mm256_castps256_ps128(op(_mm256_castps128_ps256(_mm_movehdup_ps(pair)), two)));
}
inline float fold_add(Lanes a) {
  return fold(a, [](__m256 high, __m256 low) { return _mm256_add_ps(low, high); });
}
inline float fold_max(Lanes a) {
  return fold(a, [](__m256 high, __m256 low) { return _mm256_max_ps(high, low); });
}
inline float fold_min(Lanes a) {
  return fold(a, [](__m256 high, __m256 low) { return _mm256_min_ps(high, low); });
}

// Compressed in registers and stored whole: compressing to memory is microcoded on Zen 4.
inline int append(Lanes values, Mask m, Ints id, float* out, int32_t* ids, int count) {
  _mm512_storeu_ps(out + count, _mm512_maskz_compress_ps(m.m, values.v));
  _mm512_storeu_si512(ids + count, _mm512_maskz_compress_epi32(m.m, id.v));
  return count + __builtin_popcount(bits(m));
}

// rows[c] becomes lane c of every row.
inline void transpose(Lanes (&rows)[16]) {
  const auto pairs = [](__m512 a) { return _mm512_castps_pd(a); };
  const auto quarters = [](Lanes a, Lanes b, auto pick) {
    return Lanes(_mm512_shuffle_f32x4(a.v, b.v, pick));
  };
  using Even = std::integral_constant<int, 0x88>;
  using Odd = std::integral_constant<int, 0xdd>;
  Lanes t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(rows[i].v, rows[i + 1].v);
    t[i + 1] = _mm512_unpackhi_ps(rows[i].v, rows[i + 1].v);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int j = 0; j < 2; ++j) {
      rows[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(pairs(t[i + j].v), pairs(t[i + j + 2].v)));
      rows[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(pairs(t[i + j].v), pairs(t[i + j + 2].v)));
    }
  }
  for (int i = 0; i < 4; ++i) {
    for (int half = 0; half < 16; half += 8) {
      t[half + i] = quarters(rows[half + i], rows[half + i + 4], Even());
      t[half + i + 4] = quarters(rows[half + i], rows[half + i + 4], Odd());
    }
  }
  for (int i = 0; i < 8; ++i) {
    const int to = i;
    rows[to] = quarters(t[i], t[i + 8], Even());
    rows[to + 8] = quarters(t[i], t[i + 8], Odd());
  }
}

// rows[i] holds eight lanes of rows i and i + 4, rows[i + 4] those of rows i + 8 and i + 12, for i < 4; rows[c] becomes
// lane c of all sixteen.
inline void transpose_pairs(Lanes (&rows)[8]) {
  const auto pairs = [](__m512 a) { return _mm512_castps_pd(a); };
  Lanes t[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm512_unpacklo_ps(rows[i].v, rows[i + 1].v);
    t[i + 1] = _mm512_unpackhi_ps(rows[i].v, rows[i + 1].v);
  }
  for (int i = 0; i < 8; i += 4) {
    for (int j = 0; j < 2; ++j) {
      rows[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(pairs(t[i + j].v), pairs(t[i + j + 2].v)));
      rows[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(pairs(t[i + j].v), pairs(t[i + j + 2].v)));
    }
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_f32x4(rows[i].v, rows[i + 4].v, 0x88);
    t[i + 4] = _mm512_shuffle_f32x4(rows[i].v, rows[i + 4].v, 0xdd);
  }
  for (int i = 0; i < 8; ++i) rows[i] = t[i];
}
// low, high: a[0], b[0], a[1], b[1] and so on.
inline void zip(Lanes a, Lanes b, Lanes& low, Lanes& high) {
  const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  low = _mm512_permutex2var_ps(a.v, first, b.v);
  high = _mm512_permutex2var_ps(a.v, _mm512_add_epi32(first, _mm512_set1_epi32(8)), b.v);
}

struct SortKeys {
  __m512d v;
  static constexpr int kRows = 8;
  static void load(const float* const* values, const int32_t* const* ids, SortKeys (&slots)[16]);
  void store(float* values, int32_t* ids) const;
};
inline SortKeys larger(SortKeys a, SortKeys b) { return {_mm512_max_pd(a.v, b.v)}; }
inline SortKeys smaller(SortKeys a, SortKeys b) { return {_mm512_min_pd(a.v, b.v)}; }
inline void transpose8(__m512d (&rows)[8]) {
  __m512d t[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm512_unpacklo_pd(rows[i], rows[i + 1]);
    t[i + 1] = _mm512_unpackhi_pd(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 2; ++i) {
    for (int half = 0; half < 8; half += 4) {
      rows[half + i] = _mm512_shuffle_f64x2(t[half + i], t[half + i + 2], 0x88);
      rows[half + i + 2] = _mm512_shuffle_f64x2(t[half + i], t[half + i + 2], 0xdd);
    }
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_f64x2(rows[i], rows[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_f64x2(rows[i], rows[i + 4], 0xdd);
  }
  for (int i = 0; i < 8; ++i) rows[i] = t[i];
}
inline void SortKeys::load(const float* const* values, const int32_t* const* ids, SortKeys (&slots)[16]) {
  __m512d low[8], high[8];
  for (int r = 0; r < 8; ++r) {
    const __m512 x = _mm512_add_ps(_mm512_loadu_ps(values[r]), _mm512_setzero_ps());
    const __m512i key = _mm512_add_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(kKeyStep));
    const __m512i id = _mm512_loadu_si512(ids[r]);
    const __m512i tie = _mm512_ternarylogic_epi32(id, _mm512_srai_epi32(key, 31), id, 0xc3);  // ~(id ^ sign)
    low[r] = _mm512_castsi512_pd(_mm512_unpacklo_epi32(tie, key));
    high[r] = _mm512_castsi512_pd(_mm512_unpackhi_epi32(tie, key));
  }
  transpose8(low);
  transpose8(high);
  for (int i = 0; i < 8; ++i) slots[i].v = low[i], slots[i + 8].v = high[i];
}
inline void SortKeys::store(float* values, int32_t* ids) const {
  const __m512i bits = _mm512_castpd_si512(v);
  const __m256i tie = _mm512_cvtepi64_epi32(bits), key = _mm512_cvtepi64_epi32(_mm512_srli_epi64(bits, 32));
  const __m256i sign = _mm256_srai_epi32(key, 31);
  const __m256i id = _mm256_xor_si256(_mm256_xor_si256(tie, sign), _mm256_set1_epi32(-1));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(values), _mm256_sub_epi32(key, _mm256_set1_epi32(kKeyStep)));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(ids), id);
}

inline FixedSums FixedSums::load(const int64_t* p) {
  return {_mm512_loadu_si512(p), _mm512_loadu_si512(p + 8)};
}
inline void FixedSums::store(int64_t* p) const {
  _mm512_storeu_si512(p, low);
  _mm512_storeu_si512(p + 8, high);
}
inline void FixedSums::add(Lanes terms) {
  low = _mm512_add_epi64(low, _mm512_cvtps_epi64(_mm512_castps512_ps256(terms.v)));
  high = _mm512_add_epi64(high, _mm512_cvtps_epi64(_mm512_extractf32x8_ps(terms.v, 1)));
}

}  // namespace
}  // namespace moe_route::cpu
