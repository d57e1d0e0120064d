// Sixteen float lanes in four NEON registers. The vocabulary and its meaning are those of
// gate_lanes_portable.h.
#pragma once
#include <arm_neon.h>

#include <cstdint>

#include "moe_route/gate.h"
#include "moe_route/key.h"
#include "moe_route/math.h"

namespace moe_route::cpu {
namespace {

// Register by register: a struct of 64 bytes that is copied as a whole goes through memory.
#define MOE_ROUTE_QUADS for (int i = 0; i < 4; ++i)

struct Mask {
  uint32x4_t quad[4];
};
inline uint32_t bits(Mask m) {
  static constexpr uint32_t kBits[16] = {1,       1 << 1,  1 << 2,  1 << 3, 1 << 4,  1 << 5,
                                         1 << 6,  1 << 7,  1 << 8,  1 << 9, 1 << 10, 1 << 11,
                                         1 << 12, 1 << 13, 1 << 14, 1 << 15};
  MOE_ROUTE_QUADS m.quad[i] = vandq_u32(m.quad[i], vld1q_u32(kBits + 4 * i));
  return vaddvq_u32(vorrq_u32(vorrq_u32(m.quad[0], m.quad[1]), vorrq_u32(m.quad[2], m.quad[3])));
}

struct Ints {
  int32x4_t quad[4];
  Ints() = default;
  explicit Ints(int32_t x) { MOE_ROUTE_QUADS quad[i] = vdupq_n_s32(x); }
  static Ints load(const int32_t* p) {
    Ints r;
    MOE_ROUTE_QUADS r.quad[i] = vld1q_s32(p + 4 * i);
    return r;
  }
  void store(int32_t* p) const { MOE_ROUTE_QUADS vst1q_s32(p + 4 * i, quad[i]); }
  friend Mask operator>(Ints a, Ints b) {
    Mask m;
    MOE_ROUTE_QUADS m.quad[i] = vcgtq_s32(a.quad[i], b.quad[i]);
    return m;
  }
};
inline Ints add(Ints a, Ints b) {
  MOE_ROUTE_QUADS a.quad[i] = vaddq_s32(a.quad[i], b.quad[i]);
  return a;
}
inline Ints sub(Ints a, Ints b) {
  MOE_ROUTE_QUADS a.quad[i] = vsubq_s32(a.quad[i], b.quad[i]);
  return a;
}
inline Ints shift_left(Ints a, int n) {
  MOE_ROUTE_QUADS a.quad[i] = vshlq_s32(a.quad[i], vdupq_n_s32(n));
  return a;
}
inline Ints shift_right(Ints a, int n) { return shift_left(a, -n); }
inline Ints count_where(Ints a, Mask m) {  // a true lane is -1
  MOE_ROUTE_QUADS a.quad[i] = vsubq_s32(a.quad[i], vreinterpretq_s32_u32(m.quad[i]));
  return a;
}

struct Lanes;

struct FixedSums {
  int64x2_t pair[8];
  static FixedSums load(const int64_t* p) {
    FixedSums sums;
    for (int i = 0; i < 8; ++i) sums.pair[i] = vld1q_s64(p + 2 * i);
    return sums;
  }
  void store(int64_t* p) const {
    for (int i = 0; i < 8; ++i) vst1q_s64(p + 2 * i, pair[i]);
  }
  void add(Lanes terms);
};

struct Lanes {
  using Scalar = float;
  using Int = Ints;
  using Fixed = FixedSums;
  static constexpr InstructionSet kSet = InstructionSet::kNeon;
  static constexpr bool kTransposes = false;
  using Mask = cpu::Mask;
  float32x4_t quad[4];

  Lanes() = default;
  explicit Lanes(float x) { MOE_ROUTE_QUADS quad[i] = vdupq_n_f32(x); }

  static Lanes load(const float* p) {
    Lanes r;
    MOE_ROUTE_QUADS r.quad[i] = vld1q_f32(p + 4 * i);
    return r;
  }
  static Lanes load_partial(const float* p, int count) {
    float present[16];
    for (int i = 0; i < 16; ++i) present[i] = i < count ? p[i] : __builtin_nanf("");
    return load(present);
  }
  static Lanes load_bfloat16(const uint16_t* p) {
    Lanes r;
    MOE_ROUTE_QUADS { r.quad[i] = vreinterpretq_f32_u32(vshlq_n_u32(vmovl_u16(vld1_u16(p + 4 * i)), 16)); }
    return r;
  }
  static Lanes load_float16(const uint16_t* p) {
    Lanes r;
    MOE_ROUTE_QUADS r.quad[i] = vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i)));
    return r;
  }
  void store(float* p) const { MOE_ROUTE_QUADS vst1q_f32(p + 4 * i, quad[i]); }

#define MOE_ROUTE_OPERATOR(op, intrinsic)                        \
  friend Lanes operator op(Lanes a, Lanes b) {                   \
    MOE_ROUTE_QUADS a.quad[i] = intrinsic(a.quad[i], b.quad[i]); \
    return a;                                                    \
  }
  MOE_ROUTE_OPERATOR(+, vaddq_f32)
  MOE_ROUTE_OPERATOR(-, vsubq_f32)
  MOE_ROUTE_OPERATOR(*, vmulq_f32)
  MOE_ROUTE_OPERATOR(/, vdivq_f32)
#undef MOE_ROUTE_OPERATOR
#define MOE_ROUTE_COMPARE(op, intrinsic)                         \
  friend Mask operator op(Lanes a, Lanes b) {                    \
    Mask m;                                                      \
    MOE_ROUTE_QUADS m.quad[i] = intrinsic(a.quad[i], b.quad[i]); \
    return m;                                                    \
  }
  MOE_ROUTE_COMPARE(<, vcltq_f32)
  MOE_ROUTE_COMPARE(>, vcgtq_f32)
  MOE_ROUTE_COMPARE(>=, vcgeq_f32)
  MOE_ROUTE_COMPARE(==, vceqq_f32)
#undef MOE_ROUTE_COMPARE
  friend Mask operator!=(Lanes a, Lanes b) {
    Mask m = a == b;
    MOE_ROUTE_QUADS m.quad[i] = vmvnq_u32(m.quad[i]);
    return m;
  }
};

inline Lanes fma(Lanes a, Lanes b, Lanes c) {
  MOE_ROUTE_QUADS c.quad[i] = vfmaq_f32(c.quad[i], a.quad[i], b.quad[i]);
  return c;
}
inline Lanes sqrt(Lanes a) {
  MOE_ROUTE_QUADS a.quad[i] = vsqrtq_f32(a.quad[i]);
  return a;
}
inline Lanes abs(Lanes a) {
  MOE_ROUTE_QUADS a.quad[i] = vabsq_f32(a.quad[i]);
  return a;
}
inline Ints as_int(Lanes a) {
  Ints r;
  MOE_ROUTE_QUADS r.quad[i] = vreinterpretq_s32_f32(a.quad[i]);
  return r;
}
inline Lanes as_float(Ints a) {
  Lanes r;
  MOE_ROUTE_QUADS r.quad[i] = vreinterpretq_f32_s32(a.quad[i]);
  return r;
}
inline Lanes to_float(Ints a) {
  Lanes r;
  MOE_ROUTE_QUADS r.quad[i] = vcvtq_f32_s32(a.quad[i]);
  return r;
}
inline Lanes select(Mask m, Lanes yes, Lanes no) {
  MOE_ROUTE_QUADS yes.quad[i] = vbslq_f32(m.quad[i], yes.quad[i], no.quad[i]);
  return yes;
}
// Not FMAX and FMIN: where one operand is NaN, they return NaN.
inline float32x4_t larger(float32x4_t x, float32x4_t kept) { return vbslq_f32(vcgtq_f32(x, kept), x, kept); }
inline float32x4_t smaller(float32x4_t x, float32x4_t kept) { return vbslq_f32(vcltq_f32(x, kept), x, kept); }
inline Lanes larger(Lanes x, Lanes kept) {
  MOE_ROUTE_QUADS x.quad[i] = larger(x.quad[i], kept.quad[i]);
  return x;
}
inline Lanes smaller(Lanes x, Lanes kept) {
  MOE_ROUTE_QUADS x.quad[i] = smaller(x.quad[i], kept.quad[i]);
  return x;
}

inline Ints order_keys(Lanes x) {
  Ints r;
  MOE_ROUTE_QUADS {
    const float32x4_t value = x.quad[i];
    const int32x4_t b = vreinterpretq_s32_f32(vaddq_f32(value, vdupq_n_f32(0)));
    const int32x4_t key = veorq_s32(b, vandq_s32(vshrq_n_s32(b, 31), vdupq_n_s32(INT32_MAX)));
    r.quad[i] = vbslq_s32(vceqq_f32(value, value), key, vdupq_n_s32(INT32_MIN));
  }
  return r;
}

template <class Op>
inline float fold(Lanes a, Op op) {  // op(high, low)
  const float32x4_t four = op(op(a.quad[3], a.quad[1]), op(a.quad[2], a.quad[0]));
  const float32x4_t two = op(vextq_f32(four, four, 2), four);
  return vgetq_lane_f32(op(vdupq_laneq_f32(two, 1), two), 0);
}
inline float fold_add(Lanes a) {
  return fold(a, [](float32x4_t high, float32x4_t low) { return vaddq_f32(low, high); });
}
inline float fold_max(Lanes a) {
  return fold(a, [](float32x4_t high, float32x4_t low) { return larger(high, low); });
}
inline float fold_min(Lanes a) {
  return fold(a, [](float32x4_t high, float32x4_t low) { return smaller(high, low); });
}

// For each 4-bit mask the bytes of the set lanes in rising order: what AVX-512's compress does.
struct CompressTable {
  alignas(64) uint8_t bytes[16][16];
  uint8_t count[16];
  constexpr CompressTable() : bytes(), count() {
    for (int m = 0; m < 16; ++m) {
      for (int lane = 0; lane < 4; ++lane) {
        if (!(m >> lane & 1)) continue;
        for (int byte = 0; byte < 4; ++byte) bytes[m][4 * count[m] + byte] = uint8_t(4 * lane + byte);
        ++count[m];
      }
    }
  }
};
inline constexpr CompressTable kCompress;

inline int append(Lanes values, Mask m, Ints id, float* out, int32_t* ids, int count) {
  const uint32_t set = bits(m);
  MOE_ROUTE_QUADS {
    const uint32_t quad = set >> 4 * i & 15;
    const uint8x16_t at = vld1q_u8(kCompress.bytes[quad]);
    vst1q_f32(out + count, vreinterpretq_f32_u8(vqtbl1q_u8(vreinterpretq_u8_f32(values.quad[i]), at)));
    vst1q_s32(ids + count, vreinterpretq_s32_u8(vqtbl1q_u8(vreinterpretq_u8_s32(id.quad[i]), at)));
    count += kCompress.count[quad];
  }
  return count;
}

inline void FixedSums::add(Lanes terms) {
  MOE_ROUTE_QUADS {
    const float64x2_t low = vcvt_f64_f32(vget_low_f32(terms.quad[i]));
    const float64x2_t high = vcvt_high_f64_f32(terms.quad[i]);
    pair[2 * i] = vaddq_s64(pair[2 * i], vcvtnq_s64_f64(low));
    pair[2 * i + 1] = vaddq_s64(pair[2 * i + 1], vcvtnq_s64_f64(high));
  }
}

#undef MOE_ROUTE_QUADS

}  // namespace
}  // namespace moe_route::cpu
