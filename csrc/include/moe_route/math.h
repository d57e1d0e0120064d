// Numerics of the gate: one definition of exp, log, log1p, tanh, sigmoid and softplus for every backend.
//
// Contract
// - Each function is one fixed sequence of correctly rounded operations (+, -, *, /, fma, sqrt, compare,
//   select). So float32 results have the same bits on every instruction set and on the GPU, provided that
//   contraction is off (-ffp-contract=off; nvcc -fmad=false) and division and square root are IEEE.
// - V is float, or a vector of floats that offers the same vocabulary (csrc/cpu/gate_lanes_*.h).
// - double calls the C library: it serves gradient checks, on one backend.
// - Largest errors stand with each function; tests/cpp/gate_test.cpp measures them.
// - Everything is `static`: files compiled for different instruction sets must not share one weak symbol.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define MOE_ROUTE_INLINE static __host__ __device__ __forceinline__
#define MOE_ROUTE_INLINE_MEMBER __host__ __device__ __forceinline__
#else
#define MOE_ROUTE_INLINE [[maybe_unused]] static inline __attribute__((always_inline))
#define MOE_ROUTE_INLINE_MEMBER inline
#endif

namespace moe_route::math {

// Vocabulary for scalars. Vectors bring their own, found by argument-dependent lookup.
MOE_ROUTE_INLINE float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
MOE_ROUTE_INLINE double fma(double a, double b, double c) { return __builtin_fma(a, b, c); }
MOE_ROUTE_INLINE float sqrt(float x) { return __builtin_sqrtf(x); }
MOE_ROUTE_INLINE double sqrt(double x) { return __builtin_sqrt(x); }
MOE_ROUTE_INLINE float abs(float x) { return __builtin_fabsf(x); }
MOE_ROUTE_INLINE double abs(double x) { return __builtin_fabs(x); }
MOE_ROUTE_INLINE float select(bool c, float a, float b) { return c ? a : b; }
MOE_ROUTE_INLINE double select(bool c, double a, double b) { return c ? a : b; }
MOE_ROUTE_INLINE int32_t as_int(float x) { return __builtin_bit_cast(int32_t, x); }
MOE_ROUTE_INLINE int64_t as_int(double x) { return __builtin_bit_cast(int64_t, x); }
MOE_ROUTE_INLINE float as_float(int32_t i) { return __builtin_bit_cast(float, i); }
MOE_ROUTE_INLINE double as_float(int64_t i) { return __builtin_bit_cast(double, i); }
// Wrapping, as vector integers do.
MOE_ROUTE_INLINE int32_t add(int32_t a, int32_t b) { return int32_t(uint32_t(a) + uint32_t(b)); }
MOE_ROUTE_INLINE int32_t sub(int32_t a, int32_t b) { return int32_t(uint32_t(a) - uint32_t(b)); }
MOE_ROUTE_INLINE int32_t shift_left(int32_t a, int n) { return int32_t(uint32_t(a) << n); }
MOE_ROUTE_INLINE int32_t shift_right(int32_t a, int n) { return a >> n; }
MOE_ROUTE_INLINE float to_float(int32_t i) { return float(i); }

inline constexpr float kLog2E = 0x1.715476p+0f;
inline constexpr float kLn2High = 0x1.62e400p-1f;  // 15 significant bits: n * kLn2High is exact
inline constexpr float kLn2Low = 0x1.7f7d1cp-20f;
// Adding 1.5 * 2^23 rounds to the nearest integer and leaves it in the low bits.
inline constexpr float kRoundToInteger = 0x1.8p+23f;
inline constexpr float kExpUnderflow = -87.33f;  // exp of anything lower is taken as 0

// exp(x) for kExpUnderflow <= x <= 88. Error < 1.01 ulp.
// x = n ln 2 + r with |r| <= ln 2 / 2, then e^r = 1 + (r + r^2 q(r)), q of degree 4 (relative error 3e-9).
template <class V>
MOE_ROUTE_INLINE V exp_in_range(V x) {
  const V shifted = fma(x, V(kLog2E), V(kRoundToInteger));
  const V n = shifted - V(kRoundToInteger);
  const V r = fma(n, V(-kLn2Low), fma(n, V(-kLn2High), x));
  V q = fma(V(0.00138145394f), r, V(0.00836874545f));
  q = fma(q, r, V(0.041668389f));
  q = fma(q, r, V(0.166665211f));
  q = fma(q, r, V(0.49999994f));
  const V e_to_r = fma(q, r * r, r) + V(1.0f);
  return as_float(add(as_int(e_to_r), shift_left(as_int(shifted), 23)));
}

// exp(x) for x <= 0; 0 below kExpUnderflow and for NaN.
template <class V>
MOE_ROUTE_INLINE V exp_nonpositive(V x) {
  return select(x >= V(kExpUnderflow), exp_in_range(x), V(0.0f));
}

// 2 atanh(s) for 0 <= |s| <= 1/3: 2s + s^3 P(s^2), P of degree 4 (relative error 1.1e-10).
template <class V>
MOE_ROUTE_INLINE V two_atanh(V s) {
  const V z = s * s;
  V p = fma(V(0.242902935f), z, V(0.214305609f));
  p = fma(p, z, V(0.286166102f));
  p = fma(p, z, V(0.39998889f));
  p = fma(p, z, V(0.666666746f));
  return fma(s * z, p, s + s);
}

// log(x) for normal finite x > 0. Error < 2 ulp.
// x = 2^n m with m in [sqrt(1/2), sqrt(2)), and log m = 2 atanh((m - 1) / (m + 1)).
template <class V>
MOE_ROUTE_INLINE V log(V x) {
  using Int = decltype(as_int(x));
  constexpr int32_t kSqrtHalf = 0x3f3504f3;  // where the exponent is to step, instead of at 1
  const Int n = shift_right(sub(as_int(x), Int(kSqrtHalf)), 23);
  const V m = as_float(sub(as_int(x), shift_left(n, 23)));
  const V t = two_atanh((m - V(1.0f)) / (m + V(1.0f)));
  return fma(to_float(n), V(kLn2High), fma(to_float(n), V(kLn2Low), t));
}

// log(1 + y) for 0 <= y <= 1, exact to the last bits for tiny y: 2 atanh(y / (2 + y)). Error < 2 ulp.
template <class V>
MOE_ROUTE_INLINE V log1p_unit(V y) {
  return two_atanh(y / (y + V(2.0f)));
}

// tanh(x). Error < 1.1 ulp; it never falls where x rises, is 1 from 9.011 on, and leaves NaN and -0 as they are.
// Without fma, so that torch's elementwise operations give the same bits (moe_route/reference/gate.py).
// Below 0.7: x + x z P(z), z = x^2, P of degree 4 (relative error 1.6e-8); above: 1 - 2 / (e^2x + 1).
template <class V>
MOE_ROUTE_INLINE V tanh(V x) {
  const V a = select(abs(x) < V(10.0f), abs(x), V(10.0f)), z = a * a;
  V p = V(-0x1.50c48ep-8f) * z + V(0x1.492fdep-6f);
  p = p * z + V(-0x1.b6c114p-5f);
  p = p * z + V(0x1.10faeep-3f);
  p = p * z + V(-0x1.5554f6p-2f);
  const V small = a * (z * p) + a;

  const V twice = a + a, shifted = twice * V(kLog2E) + V(kRoundToInteger);
  const V n = shifted - V(kRoundToInteger);
  const V r = (twice - n * V(kLn2High)) - n * V(kLn2Low);
  V q = V(0.00138145394f) * r + V(0.00836874545f);
  q = q * r + V(0.041668389f);
  q = q * r + V(0.166665211f);
  q = q * r + V(0.49999994f);
  const V e_to_r = (q * (r * r) + r) + V(1.0f);
  const V e = as_float(add(as_int(e_to_r), shift_left(as_int(shifted), 23)));
  const V t = select(a < V(0.7f), small, V(1.0f) - V(2.0f) / (e + V(1.0f)));
  return select(abs(x) > V(0.0f), select(x < V(0.0f), V(0.0f) - t, t), x);
}
MOE_ROUTE_INLINE double tanh(double x) { return __builtin_tanh(x); }

MOE_ROUTE_INLINE double exp_nonpositive(double x) { return x == x ? __builtin_exp(x) : 0.0; }
MOE_ROUTE_INLINE double log(double x) { return __builtin_log(x); }
MOE_ROUTE_INLINE double log1p_unit(double y) { return __builtin_log1p(y); }

// 1 / (1 + exp(-x)); both tails keep their relative accuracy.
template <class V>
MOE_ROUTE_INLINE V sigmoid(V x) {
  const V e = exp_nonpositive(V(0.0f) - abs(x));
  return select(x < V(0.0f), e, V(1.0f)) / (e + V(1.0f));
}

// sqrt(log(1 + exp(x))).
template <class V>
MOE_ROUTE_INLINE V sqrt_softplus(V x) {
  const V e = exp_nonpositive(V(0.0f) - abs(x));
  return sqrt(select(x > V(0.0f), x, V(0.0f)) + log1p_unit(e));
}

}  // namespace moe_route::math
