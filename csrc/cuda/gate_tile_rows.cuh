// A tile: 32 rows of logits in shared memory, one for each thread, and sums over a row in a thread's registers.
#pragma once
#include <cuda_fp16.h>

#include "gate_layout.h"
#include "gate_warp.cuh"
#include "moe_route/math.h"

namespace moe_route::cuda {
namespace {

// 16 bytes from global to shared memory, without registers on the way.
__device__ __forceinline__ void copy_async(float* to, const float* from) {
#ifdef __CUDA_ARCH__
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
#else
  *reinterpret_cast<float4*>(to) = *reinterpret_cast<const float4*>(from);
#endif
}
__device__ __forceinline__ void wait_for_copies() {
#ifdef __CUDA_ARCH__
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
  __syncwarp();
}

// Sixteen stripes of one row in a thread's registers: the contract's tree needs nobody else.
struct Stripes {
  float sums[kStripes] = {};
  __device__ __forceinline__ float fold() {
    add_halves<8>();
    add_halves<4>();
    add_halves<2>();
    return sums[0] + sums[1];
  }
  template <int kApart>
  __device__ __forceinline__ void add_halves() {
#pragma unroll
    for (int s = 0; s < kApart; ++s) sums[s] = sums[s] + sums[s + kApart];
  }
};

template <int kValues>
class Tile {
 public:
  static constexpr int kExperts = kLanes * kValues;
  static constexpr int kStride = kExperts + 4;  // of a row: threads read theirs from different banks

  __device__ __forceinline__ Tile(const GateLaunch& launch, unsigned char* memory)
      : launch_(launch), args_(launch.args), first_row_(reinterpret_cast<float*>(memory)) {}

  __device__ __forceinline__ float* row(int which) const { return first_row_ + which * kStride; }

  // Rows [begin, begin + 32) of the launch.
  __device__ __forceinline__ void load(int64_t begin) {
    if (args_.logits_type == DType::kFloat32) {
      for_each_four<float>(begin, [](float* to, const float* from) { copy_async(to, from); });
    } else if (launch_.layout.bfloat16) {
      load_halves<uint16_t>(begin, [](unsigned x) { return math::as_float(int32_t(x << 16)); });
    } else {
      load_halves<__half>(
          begin, [](unsigned x) { return __half2float(__ushort_as_half(static_cast<unsigned short>(x))); });
    }
    wait_for_copies();
  }

  // op(value, stripe) for the thread's row, in rising order.
  template <class Op>
  __device__ __forceinline__ static void each(const float* row, Op op) {
#pragma unroll 1
    for (int v = 0; v < kExperts; v += kStripes) {
#pragma unroll
      for (int s = 0; s < kStripes; s += 4) {
        const float4 x = *reinterpret_cast<const float4*>(row + v + s);
        op(x.x, s), op(x.y, s + 1), op(x.z, s + 2), op(x.w, s + 3);
      }
    }
  }

 private:
  template <class T, class Convert>
  __device__ __forceinline__ void load_halves(int64_t begin, Convert convert) {
    for_each_four<T>(begin, [&](float* to, const T* from) {
      const uint2 raw = __ldg(reinterpret_cast<const uint2*>(from));
      *reinterpret_cast<float4*>(to) = make_float4(convert(raw.x & 0xffffu), convert(raw.x >> 16),
                                                   convert(raw.y & 0xffffu), convert(raw.y >> 16));
    });
  }
  // op(where four values go, where they come from), neighboring lanes side by side. Where rows begin is added up, not
  // multiplied out. Past the last row: one of the rows again.
  template <class T, class Op>
  __device__ __forceinline__ void for_each_four(int64_t begin, Op op) {
    constexpr int kFours = kExperts / 4;  // of a row
    constexpr int kRows = kFours < kLanes ? kLanes / kFours : 1,
                  kParts = kFours < kLanes ? 1 : kFours / kLanes;
    const int first = lane() / kFours, column = lane() % kFours * 4;
    const int last = static_cast<int>(min(args_.tokens - begin, int64_t{kLanes})) - 1;
    const T* from =
        static_cast<const T*>(args_.logits) + (begin + min(first, last)) * args_.row_stride + column;
    float* const to = first_row_ + first * kStride + column;
    const int64_t step = kRows * args_.row_stride;
#pragma unroll 8
    for (int row = 0; row < kLanes; row += kRows) {
#pragma unroll
      for (int part = 0; part < kParts; ++part)
        op(to + row * kStride + part * 4 * kLanes, from + part * 4 * kLanes);
      if (first + row + kRows <= last) from += step;
    }
  }
  const GateLaunch& launch_;
  const GateArgs& args_;
  float* const first_row_;
};

}  // namespace
}  // namespace moe_route::cuda
