// Stands in for the CUDA toolkit's header of this name: the type and its conversions, no arithmetic (kernels
// of this project compute in float32).
#pragma once
#include <bit>
#include <cstdint>

#include "cuda_runtime.h"

struct __half {
  unsigned short bits;
};
struct alignas(4) __half2 {
  __half x, y;
};
using half = __half;
using half2 = __half2;

inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline unsigned short __half_as_ushort(__half h) { return h.bits; }

inline float __half2float(__half h) {
  const uint32_t sign = static_cast<uint32_t>(h.bits & 0x8000) << 16, rest = h.bits & 0x7fff;
  // The exponent is moved to float's place; a multiplication by a power of two rights its bias, subnormals
  // included.
  const float magnitude = std::bit_cast<float>(rest << 13) * 0x1p112f;
  const uint32_t bits =
      rest >= 0x7c00 ? 0x7f800000u | (rest & 0x3ff) << 13 : std::bit_cast<uint32_t>(magnitude);
  return std::bit_cast<float>(sign | bits);
}

inline __half __float2half_rn(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
  uint32_t half;
  if (rest > 0x7f800000) return {0x7fff};  // every NaN becomes this one
  if (rest >= 0x477ff000) {                // rounds to 65536 or more
    half = 0x7c00;
  } else if (rest < 0x38800000) {  // below 2^-14: adding 1/2 rounds at 2^-24, half's last place
    half = std::bit_cast<uint32_t>(std::bit_cast<float>(rest) + 0.5f) - 0x3f000000;
  } else {  // nearest, ties to even; a carry steps the exponent
    half = (rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13;
  }
  return {static_cast<unsigned short>(sign | half)};
}
inline __half __float2half(float x) { return __float2half_rn(x); }

inline __half2 __halves2half2(__half low, __half high) { return {low, high}; }
inline __half2 __floats2half2_rn(float low, float high) {
  return {__float2half_rn(low), __float2half_rn(high)};
}
inline __half2 __float22half2_rn(float2 v) { return __floats2half2_rn(v.x, v.y); }
inline float2 __half22float2(__half2 v) { return {__half2float(v.x), __half2float(v.y)}; }
inline __half __low2half(__half2 v) { return v.x; }
inline __half __high2half(__half2 v) { return v.y; }
inline float __low2float(__half2 v) { return __half2float(v.x); }
inline float __high2float(__half2 v) { return __half2float(v.y); }
