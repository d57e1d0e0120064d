// The candidates of a thread's row: a bound that at least eight values reach, and the list of what reaches it.
#pragma once
#include "gate_tile_rows.cuh"

namespace moe_route::cuda {
namespace {

inline constexpr int kTileList = 24;       // candidates of a row
inline constexpr float kTame = 0x1p+100f;  // of such logits neither sums nor differences overflow

// The smaller one; NaN where one is NaN.
__device__ __forceinline__ float least_or_nan(float x, float y) {
#ifdef __CUDA_ARCH__
  asm("min.NaN.f32 %0, %0, %1;" : "+f"(x) : "f"(y));
  return x;
#else
  return x == x && !(x < y) ? y : x;
#endif
}

// A list in shared memory that a thread appends to: entries lie a warp's width apart. One entry more than
// kTileList has room, to be overwritten.
class List {
 public:
  __device__ __forceinline__ explicit List(float2* first) : first_(first) {
#ifdef __CUDA_ARCH__
    begin_ = static_cast<unsigned>(__cvta_generic_to_shared(first));
#else
    begin_ = 0;
#endif
    next_ = begin_;
    full_ = begin_ + kTileList * kStep;
  }
  // Appends x and its expert where x >= bound. Predicated: a branch for each value would cost three times that.
  __device__ __forceinline__ void append_if_reaches(float x, float bound, int expert) {
#ifdef __CUDA_ARCH__
    asm volatile(
        "{.reg .pred p; setp.ge.f32 p, %1, %2; @p st.shared.v2.b32 [%0], {%3, %4};"
        " @p add.u32 %0, %0, %6; min.u32 %0, %0, %5;}"
        : "+r"(next_)
        : "f"(x), "f"(bound), "r"(__float_as_int(x)), "r"(expert), "r"(full_), "n"(kStep));
#else
    if (!(x >= bound)) return;
    first_[next_ / sizeof(float2)] = make_float2(x, __int_as_float(expert));
    next_ = min(next_ + kStep, full_);
#endif
  }
  // Entries; kTileList where there may be more.
  __device__ __forceinline__ int count() const {
#ifdef __CUDA_ARCH__
    asm volatile("" ::: "memory");  // what was appended is read from here on
#endif
    return static_cast<int>((next_ - begin_) / kStep);
  }

 private:
  static constexpr unsigned kStep = kLanes * sizeof(float2);
  float2* const first_;
  unsigned begin_, next_, full_;
};

// Sorts eight numbers, largest first.
__device__ __forceinline__ void sort_eight(float* x) {
  const auto in_order = [x](int a, int b) {
    const float larger = fmaxf(x[a], x[b]), smaller = fminf(x[a], x[b]);
    x[a] = larger, x[b] = smaller;
  };
  in_order(0, 1), in_order(2, 3), in_order(4, 5), in_order(6, 7);
  in_order(0, 2), in_order(1, 3), in_order(4, 6), in_order(5, 7);
  in_order(1, 2), in_order(5, 6);
  in_order(0, 4), in_order(1, 5), in_order(2, 6), in_order(3, 7);
  in_order(2, 4), in_order(3, 5);
  in_order(1, 2), in_order(3, 4), in_order(5, 6);
}

// The largest value, and one that at least eight reach: the eighth of the largest values of 16 stripes.
// False where a value is no plain number.
template <int kValues, bool kScored>
__device__ __forceinline__ bool find_bound(const float* row, float& largest, float& bound) {
  float most[kStripes], least = infinity();
#pragma unroll
  for (int s = 0; s < kStripes; ++s) most[s] = -infinity();
  Tile<kValues>::each(row, [&](float x, int s) {
    least = least_or_nan(least, x);
    most[s] = fmaxf(most[s], x);
  });
  sort_eight(most);
  sort_eight(most + 8);
  largest = fmaxf(most[0], most[8]);
  bound = fmaxf(most[0], most[15]);
#pragma unroll
  for (int i = 1; i < 8; ++i) bound = fminf(bound, fmaxf(most[i], most[15 - i]));
  const bool in_range = !kScored || largest - least <= -math::kExpUnderflow;  // no numerator is 0
  return least > -kTame && largest < kTame && in_range;
}

}  // namespace
}  // namespace moe_route::cuda
