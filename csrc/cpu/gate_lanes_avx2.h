// Sixteen float lanes in two AVX2 registers. The vocabulary and its meaning are those of
// gate_lanes_portable.h.
#pragma once
#include <immintrin.h>

#include <cstdint>

#include "moe_route/gate.h"
#include "moe_route/key.h"
#include "moe_route/math.h"

namespace moe_route::cpu {
namespace {

struct Mask {
  __m256 low, high;
};
inline uint32_t bits(Mask m) {
  return uint32_t(_mm256_movemask_ps(m.low)) | uint32_t(_mm256_movemask_ps(m.high)) << 8;
}

struct Ints {
  __m256i low, high;
  Ints() = default;
  Ints(__m256i l, __m256i h) : low(l), high(h) {}
  explicit Ints(int32_t x) : low(_mm256_set1_epi32(x)), high(low) {}
  static Ints load(const int32_t* p) {
    const auto* halves = reinterpret_cast<const __m256i*>(p);
    return {_mm256_loadu_si256(halves), _mm256_loadu_si256(halves + 1)};
  }
  void store(int32_t* p) const {
    auto* halves = reinterpret_cast<__m256i*>(p);
    _mm256_storeu_si256(halves, low);
    _mm256_storeu_si256(halves + 1, high);
  }
  friend Mask operator>(Ints a, Ints b) {
    return {_mm256_castsi256_ps(_mm256_cmpgt_epi32(a.low, b.low)),
            _mm256_castsi256_ps(_mm256_cmpgt_epi32(a.high, b.high))};
  }
};
inline Ints add(Ints a, Ints b) { return {_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)}; }
inline Ints sub(Ints a, Ints b) { return {_mm256_sub_epi32(a.low, b.low), _mm256_sub_epi32(a.high, b.high)}; }
inline Ints shift_left(Ints a, int n) { return {_mm256_slli_epi32(a.low, n), _mm256_slli_epi32(a.high, n)}; }
inline Ints count_where(Ints a, Mask m) {  // a true lane is -1
  return {_mm256_sub_epi32(a.low, _mm256_castps_si256(m.low)),
          _mm256_sub_epi32(a.high, _mm256_castps_si256(m.high))};
}
inline Ints shift_right(Ints a, int n) { return {_mm256_srai_epi32(a.low, n), _mm256_srai_epi32(a.high, n)}; }

struct Lanes;
struct SortKeys;

struct FixedSums {
  __m256i four[4];
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
  static constexpr InstructionSet kSet = InstructionSet::kAvx2;
  static constexpr bool kTransposes = true;
  __m256 low, high;

  Lanes() = default;
  Lanes(__m256 l, __m256 h) : low(l), high(h) {}
  explicit Lanes(float x) : low(_mm256_set1_ps(x)), high(low) {}

  static Lanes load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static Lanes load_partial(const float* p, int count) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const auto half = [lane](const float* q, int present) {
      const __m256i mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(present), lane);
      const __m256 none = _mm256_set1_ps(__builtin_nanf(""));
      return _mm256_blendv_ps(none, _mm256_maskload_ps(q, mask), _mm256_castsi256_ps(mask));
    };
    return {half(p, count), half(p + 8, count - 8)};
  }
  static __m256 bfloat16(const uint16_t* p) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
  }
  static __m256 float16(const uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static Lanes load_bfloat16(const uint16_t* p) { return {bfloat16(p), bfloat16(p + 8)}; }
  static Lanes load_float16(const uint16_t* p) { return {float16(p), float16(p + 8)}; }
  // Lanes 0 to 7 from a, 8 to 15 from b.
  static Lanes pair(const float* a, const float* b) { return {_mm256_loadu_ps(a), _mm256_loadu_ps(b)}; }
  static Lanes pair_bfloat16(const uint16_t* a, const uint16_t* b) { return {bfloat16(a), bfloat16(b)}; }
  static Lanes pair_float16(const uint16_t* a, const uint16_t* b) { return {float16(a), float16(b)}; }
  void store(float* p) const {
    _mm256_storeu_ps(p, low);
    _mm256_storeu_ps(p + 8, high);
  }

  friend Lanes operator+(Lanes a, Lanes b) {
    return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)};
  }
  friend Lanes operator-(Lanes a, Lanes b) {
    return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)};
  }
  friend Lanes operator*(Lanes a, Lanes b) {
    return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)};
  }
  friend Lanes operator/(Lanes a, Lanes b) {
    return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)};
  }
  template <int kPredicate>
  static Mask compare(Lanes a, Lanes b) {
    return {_mm256_cmp_ps(a.low, b.low, kPredicate), _mm256_cmp_ps(a.high, b.high, kPredicate)};
  }
  friend Mask operator<(Lanes a, Lanes b) { return compare<_CMP_LT_OQ>(a, b); }
  friend Mask operator>(Lanes a, Lanes b) { return compare<_CMP_GT_OQ>(a, b); }
  friend Mask operator>=(Lanes a, Lanes b) { return compare<_CMP_GE_OQ>(a, b); }
  friend Mask operator==(Lanes a, Lanes b) { return compare<_CMP_EQ_OQ>(a, b); }
  friend Mask operator!=(Lanes a, Lanes b) { return compare<_CMP_NEQ_UQ>(a, b); }
};

inline Lanes fma(Lanes a, Lanes b, Lanes c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
inline Lanes sqrt(Lanes a) { return {_mm256_sqrt_ps(a.low), _mm256_sqrt_ps(a.high)}; }
inline Lanes abs(Lanes a) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, a.low), _mm256_andnot_ps(sign, a.high)};
}
inline Ints as_int(Lanes a) { return {_mm256_castps_si256(a.low), _mm256_castps_si256(a.high)}; }
inline Lanes as_float(Ints a) { return {_mm256_castsi256_ps(a.low), _mm256_castsi256_ps(a.high)}; }
inline Ints to_int(Lanes a) { return {_mm256_cvttps_epi32(a.low), _mm256_cvttps_epi32(a.high)}; }
inline Lanes to_float(Ints a) { return {_mm256_cvtepi32_ps(a.low), _mm256_cvtepi32_ps(a.high)}; }
inline Lanes select(Mask m, Lanes yes, Lanes no) {
  return {_mm256_blendv_ps(no.low, yes.low, m.low), _mm256_blendv_ps(no.high, yes.high, m.high)};
}
// The instructions return their second operand on ties and NaN.
inline Lanes larger(Lanes x, Lanes kept) {
  return {_mm256_max_ps(x.low, kept.low), _mm256_max_ps(x.high, kept.high)};
}
inline Lanes smaller(Lanes x, Lanes kept) {
  return {_mm256_min_ps(x.low, kept.low), _mm256_min_ps(x.high, kept.high)};
}

inline Ints order_keys(Lanes x) {
  const auto key = [](__m256 half) {
    const __m256i i = _mm256_castps_si256(_mm256_add_ps(half, _mm256_setzero_ps()));
    const __m256i flipped = _mm256_xor_si256(i, _mm256_srli_epi32(_mm256_srai_epi32(i, 31), 1));
    const __m256 lowest = _mm256_castsi256_ps(_mm256_set1_epi32(INT32_MIN));
    const __m256 number = _mm256_cmp_ps(half, half, _CMP_ORD_Q);
    return _mm256_castps_si256(_mm256_blendv_ps(lowest, _mm256_castsi256_ps(flipped), number));
  };
  return {key(x.low), key(x.high)};
}

template <class Op>
inline float fold(Lanes a, Op op) {  // op(high, low)
  const __m256 eight = op(a.high, a.low);
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

// For each 8-bit mask the set lanes in rising order: what AVX-512's compress does.
struct CompressTable {
  alignas(64) uint8_t lanes[256][8];
  constexpr CompressTable() : lanes() {
    for (int m = 0; m < 256; ++m) {
      int count = 0;
      for (int i = 0; i < 8; ++i) {
        if (m >> i & 1) lanes[m][count++] = uint8_t(i);
      }
    }
  }
};
inline constexpr CompressTable kCompress;

inline int append_half(__m256 values, __m256 mask, __m256i id, float* out, int32_t* ids, int count) {
  const int m = _mm256_movemask_ps(mask);
  const __m128i packed = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kCompress.lanes[m]));
  const __m256i lanes = _mm256_cvtepu8_epi32(packed);
  _mm256_storeu_ps(out + count, _mm256_permutevar8x32_ps(values, lanes));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(ids + count), _mm256_permutevar8x32_epi32(id, lanes));
  return count + __builtin_popcount(unsigned(m));
}
inline int append(Lanes values, Mask m, Ints id, float* out, int32_t* ids, int count) {
  count = append_half(values.low, m.low, id.low, out, ids, count);
  return append_half(values.high, m.high, id.high, out, ids, count);
}

inline void transpose8(__m256 (&rows)[8]) {
  const auto pairs = [](__m256 a) { return _mm256_castps_pd(a); };
  __m256 t[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    for (int j = 0; j < 2; ++j) {
      rows[i + 2 * j] = _mm256_castpd_ps(_mm256_unpacklo_pd(pairs(t[i + j]), pairs(t[i + j + 2])));
      rows[i + 2 * j + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(pairs(t[i + j]), pairs(t[i + j + 2])));
    }
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm256_permute2f128_ps(rows[i], rows[i + 4], 0x20);
    t[i + 4] = _mm256_permute2f128_ps(rows[i], rows[i + 4], 0x31);
  }
  for (int i = 0; i < 8; ++i) rows[i] = t[i];
}
// rows[c] becomes lane c of every row.
inline void transpose(Lanes (&rows)[16]) {
  __m256 blocks[4][8];
  for (int i = 0; i < 8; ++i) {
    blocks[0][i] = rows[i].low, blocks[1][i] = rows[i + 8].low;
    blocks[2][i] = rows[i].high, blocks[3][i] = rows[i + 8].high;
  }
  for (auto& block : blocks) transpose8(block);
  for (int i = 0; i < 8; ++i) {
    rows[i] = {blocks[0][i], blocks[1][i]};
    rows[i + 8] = {blocks[2][i], blocks[3][i]};
  }
}

// rows[i] holds eight lanes of rows i and i + 4, rows[i + 4] those of rows i + 8 and i + 12, for i < 4; rows[c] becomes
// lane c of all sixteen.
inline void transpose_pairs(Lanes (&rows)[8]) {
  __m256 first[8], second[8];
  for (int i = 0; i < 4; ++i) {
    first[i] = rows[i].low, first[i + 4] = rows[i].high;
    second[i] = rows[i + 4].low, second[i + 4] = rows[i + 4].high;
  }
  transpose8(first);
  transpose8(second);
  for (int i = 0; i < 8; ++i) rows[i] = {first[i], second[i]};
}
// low, high: a[0], b[0], a[1], b[1] and so on.
inline void zip(Lanes a, Lanes b, Lanes& low, Lanes& high) {
  const auto zip8 = [](__m256 x, __m256 y) {
    const __m256 even = _mm256_unpacklo_ps(x, y), odd = _mm256_unpackhi_ps(x, y);
    return Lanes(_mm256_permute2f128_ps(even, odd, 0x20), _mm256_permute2f128_ps(even, odd, 0x31));
  };
  low = zip8(a.low, b.low);
  high = zip8(a.high, b.high);
}

struct SortKeys {
  __m256d v;
  static constexpr int kRows = 4;
  static void load(const float* const* values, const int32_t* const* ids, SortKeys (&slots)[16]);
  void store(float* values, int32_t* ids) const;
};
inline SortKeys larger(SortKeys a, SortKeys b) { return {_mm256_max_pd(a.v, b.v)}; }
inline SortKeys smaller(SortKeys a, SortKeys b) { return {_mm256_min_pd(a.v, b.v)}; }
inline void SortKeys::load(const float* const* values, const int32_t* const* ids, SortKeys (&slots)[16]) {
  for (int half = 0; half < 16; half += 8) {
    __m256d low[4], high[4];
    for (int r = 0; r < 4; ++r) {
      const __m256 x = _mm256_add_ps(_mm256_loadu_ps(values[r] + half), _mm256_setzero_ps());
      const __m256i key = _mm256_add_epi32(_mm256_castps_si256(x), _mm256_set1_epi32(kKeyStep));
      const __m256i id = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(ids[r] + half));
      const __m256i sign = _mm256_srai_epi32(key, 31);
      const __m256i tie = _mm256_xor_si256(_mm256_xor_si256(id, sign), _mm256_set1_epi32(-1));
      low[r] = _mm256_castsi256_pd(_mm256_unpacklo_epi32(tie, key));
      high[r] = _mm256_castsi256_pd(_mm256_unpackhi_epi32(tie, key));
    }
    const auto transpose4 = [](const __m256d(&rows)[4], SortKeys* to) {
      const __m256d a = _mm256_unpacklo_pd(rows[0], rows[1]), b = _mm256_unpackhi_pd(rows[0], rows[1]);
      const __m256d c = _mm256_unpacklo_pd(rows[2], rows[3]), d = _mm256_unpackhi_pd(rows[2], rows[3]);
      to[0].v = _mm256_permute2f128_pd(a, c, 0x20), to[1].v = _mm256_permute2f128_pd(b, d, 0x20);
      to[2].v = _mm256_permute2f128_pd(a, c, 0x31), to[3].v = _mm256_permute2f128_pd(b, d, 0x31);
    };
    transpose4(low, slots + half);
    transpose4(high, slots + half + 4);
  }
}
inline void SortKeys::store(float* values, int32_t* ids) const {
  const __m256 bits = _mm256_castpd_ps(v);
  const __m128 first = _mm256_castps256_ps128(bits), second = _mm256_extractf128_ps(bits, 1);
  const __m128i tie = _mm_castps_si128(_mm_shuffle_ps(first, second, 0x88));
  const __m128i key = _mm_castps_si128(_mm_shuffle_ps(first, second, 0xdd));
  const __m128i id = _mm_xor_si128(_mm_xor_si128(tie, _mm_srai_epi32(key, 31)), _mm_set1_epi32(-1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(values), _mm_sub_epi32(key, _mm_set1_epi32(kKeyStep)));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(ids), id);
}

inline FixedSums FixedSums::load(const int64_t* p) {
  FixedSums sums;
  for (int i = 0; i < 4; ++i) sums.four[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 4 * i));
  return sums;
}
inline void FixedSums::store(int64_t* p) const {
  for (int i = 0; i < 4; ++i) _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 4 * i), four[i]);
}
// Adding 1.5 * 2^52 rounds to the nearest integer and leaves it in the low bits.
inline void FixedSums::add(Lanes terms) {
  const auto rounded = [magic = _mm256_set1_pd(0x1.8p+52)](__m128 x) {
    const __m256i shifted = _mm256_castpd_si256(_mm256_add_pd(_mm256_cvtps_pd(x), magic));
    return _mm256_sub_epi64(shifted, _mm256_castpd_si256(magic));
  };
  four[0] = _mm256_add_epi64(four[0], rounded(_mm256_castps256_ps128(terms.low)));
  four[1] = _mm256_add_epi64(four[1], rounded(_mm256_extractf128_ps(terms.low, 1)));
  four[2] = _mm256_add_epi64(four[2], rounded(_mm256_castps256_ps128(terms.high)));
  four[3] = _mm256_add_epi64(four[3], rounded(_mm256_extractf128_ps(terms.high, 1)));
}

}  // namespace
}  // namespace moe_route::cpu
