// Elements of the types that rows have, inside the words of a vector: widened one by one, rounded together.
// Shared by combine and the products of experts.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

#include "rows.cuh"

namespace moe_route::cuda {

// The words of a vector (the lower half of one word, of a vector of 2 bytes).
template <int Bytes>
struct Words {
  uint32_t word[Bytes < 4 ? 1 : Bytes / 4];
};
__device__ __forceinline__ Words<16> words(uint4 v) { return {v.x, v.y, v.z, v.w}; }
__device__ __forceinline__ Words<8> words(uint2 v) { return {v.x, v.y}; }
__device__ __forceinline__ Words<4> words(uint32_t v) { return {v}; }
__device__ __forceinline__ Words<2> words(uint16_t v) { return {v}; }
__device__ __forceinline__ uint4 vector(Words<16> w) { return {w.word[0], w.word[1], w.word[2], w.word[3]}; }
__device__ __forceinline__ uint2 vector(Words<8> w) { return {w.word[0], w.word[1]}; }
__device__ __forceinline__ uint32_t vector(Words<4> w) { return w.word[0]; }
__device__ __forceinline__ uint16_t vector(Words<2> w) { return static_cast<uint16_t>(w.word[0]); }

// Elements in the words of a vector: element i widened, and all n rounded.
struct Float32 {
  using Sum = float;
  static constexpr int kBytes = 4;
  static __device__ __forceinline__ float widen(const uint32_t* word, int i) {
    return __uint_as_float(word[i]);
  }
  static __device__ __forceinline__ void round(uint32_t* word, const float* sum, int n) {
#pragma unroll
    for (int i = 0; i < n; ++i) word[i] = __float_as_uint(sum[i]);
  }
};

struct Float64 {
  using Sum = double;
  static constexpr int kBytes = 8;
  static __device__ __forceinline__ double widen(const uint32_t* word, int i) {
    const uint64_t bits = static_cast<uint64_t>(word[2 * i + 1]) << 32 | word[2 * i];
    return __longlong_as_double(static_cast<long long>(bits));
  }
  static __device__ __forceinline__ void round(uint32_t* word, const double* sum, int n) {
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const uint64_t bits = static_cast<uint64_t>(__double_as_longlong(sum[i]));
      word[2 * i] = static_cast<uint32_t>(bits);
      word[2 * i + 1] = static_cast<uint32_t>(bits >> 32);
    }
  }
};

// Types of which a word holds two. One instruction rounds both.
template <class Type>
struct TwoInAWord {
  using Sum = float;
  static constexpr int kBytes = 2;
  template <class Pair>
  static __device__ __forceinline__ uint32_t bits_of(Pair pair) {
    uint32_t bits;
    memcpy(&bits, &pair, sizeof bits);
    return bits;
  }
  static __device__ __forceinline__ void round(uint32_t* word, const float* sum, int n) {
#pragma unroll
    for (int i = 0; i < n; i += 2) word[i / 2] = Type::pair(sum[i], i + 1 < n ? sum[i + 1] : 0.0f);
  }
};

struct BFloat16 : TwoInAWord<BFloat16> {
  static __device__ __forceinline__ float widen(const uint32_t* word, int i) {
    return __uint_as_float(i % 2 == 0 ? word[i / 2] << 16 : word[i / 2] & 0xffff0000u);
  }
  static __device__ __forceinline__ uint32_t pair(float low, float high) {
    return bits_of(__floats2bfloat162_rn(low, high));
  }
};

struct Float16 : TwoInAWord<Float16> {
  static __device__ __forceinline__ float widen(const uint32_t* word, int i) {
    return __half2float(__ushort_as_half(static_cast<uint16_t>(word[i / 2] >> i % 2 * 16)));
  }
  static __device__ __forceinline__ uint32_t pair(float low, float high) {
    return bits_of(__floats2half2_rn(low, high));
  }
};

}  // namespace moe_route::cuda
