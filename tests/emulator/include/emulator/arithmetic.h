// Integer intrinsics, conversions and correctly rounded arithmetic. Nothing approximate.
#pragma once
#include <math.h>

#include <bit>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "fault.h"

// ---- bits -----------------------------------------------------------------------------------------------
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return std::countl_zero(static_cast<unsigned long long>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __brev(unsigned x) {
  x = (x >> 1 & 0x55555555u) | (x & 0x55555555u) << 1;
  x = (x >> 2 & 0x33333333u) | (x & 0x33333333u) << 2;
  x = (x >> 4 & 0x0f0f0f0fu) | (x & 0x0f0f0f0fu) << 4;
  return __builtin_bswap32(x);
}
inline unsigned long long __brevll(unsigned long long x) {
  const unsigned long long low = __brev(static_cast<unsigned>(x));
  return low << 32 | __brev(static_cast<unsigned>(x >> 32));
}
// The 32 upper (l) or lower (r) bits of high:low, shifted by shift % 32.
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) << (shift & 31) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) >> (shift & 31));
}
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned pick = selector >> (4 * i) & 15;
    const unsigned byte = bytes >> (8 * (pick & 7)) & 255;
    result |= (pick & 8 ? (byte & 128 ? 255u : 0u) : byte) << (8 * i);
  }
  return result;
}
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32);
}
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}

// ---- the same bits as another type ----------------------------------------------------------------------
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return std::bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return std::bit_cast<double>(x); }

// ---- conversions ----------------------------------------------------------------------------------------
namespace emulator {

// Out of range saturates. NaN is 0, but the top bit alone where either side has 64 bits (PTX ISA, cvt).
template <class To, class From>
To saturate(From rounded) {
  if (rounded != rounded) {
    constexpr bool wide = sizeof(To) == 8 || sizeof(From) == 8;
    return wide ? static_cast<To>(std::make_unsigned_t<To>{1} << (8 * sizeof(To) - 1)) : To{0};
  }
  constexpr int digits = std::numeric_limits<To>::digits;
  const From above = static_cast<From>(uint64_t{1} << (digits - 1)) * 2;  // a power of two: exact
  if (rounded >= above) return std::numeric_limits<To>::max();
  if (rounded < (std::is_signed_v<To> ? -above : From{0})) return std::numeric_limits<To>::min();
  return static_cast<To>(rounded);
}

}  // namespace emulator

// From: its name and its type, then those of the result.
#define EMULATOR_CONVERT(from, From, to, To)                                              \
  inline To __##from##2##to##_rn(From x) { return emulator::saturate<To>(nearbyint(x)); } \
  inline To __##from##2##to##_rz(From x) { return emulator::saturate<To>(trunc(x)); }     \
  inline To __##from##2##to##_rd(From x) { return emulator::saturate<To>(floor(x)); }     \
  inline To __##from##2##to##_ru(From x) { return emulator::saturate<To>(ceil(x)); }
EMULATOR_CONVERT(float, float, int, int)
EMULATOR_CONVERT(float, float, uint, unsigned)
EMULATOR_CONVERT(float, float, ll, long long)
EMULATOR_CONVERT(float, float, ull, unsigned long long)
EMULATOR_CONVERT(double, double, int, int)
EMULATOR_CONVERT(double, double, uint, unsigned)
EMULATOR_CONVERT(double, double, ll, long long)
EMULATOR_CONVERT(double, double, ull, unsigned long long)
#undef EMULATOR_CONVERT

inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline float __uint2float_rn(unsigned x) { return static_cast<float>(x); }
inline float __ll2float_rn(long long x) { return static_cast<float>(x); }
inline float __ull2float_rn(unsigned long long x) { return static_cast<float>(x); }
inline double __ll2double_rn(long long x) { return static_cast<double>(x); }
inline double __ull2double_rn(unsigned long long x) { return static_cast<double>(x); }
inline float __double2float_rn(double x) { return static_cast<float>(x); }

// ---- arithmetic, each operation rounded once ------------------------------------------------------------
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fsqrt_rn(float a) { return __builtin_sqrtf(a); }
inline float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __fma_rn(double a, double b, double c) { return __builtin_fma(a, b, c); }

// CUDA has these at global scope, for mixed types too.
template <class A, class B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) {
    return ::fmax(static_cast<T>(a), static_cast<T>(b));
  } else {
    return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(b) : static_cast<T>(a);
  }
}
template <class A, class B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) {
    return ::fmin(static_cast<T>(a), static_cast<T>(b));
  } else {
    return static_cast<T>(b) < static_cast<T>(a) ? static_cast<T>(b) : static_cast<T>(a);
  }
}

[[noreturn]] inline void __trap() { emulator::fault("the kernel called __trap()"); }
