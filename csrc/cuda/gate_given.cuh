// A choice that comes with the call: ids, and weights if there are any, as their tensors store them.
#pragma once
#include <cuda_fp16.h>

#include "gate_warp.cuh"
#include "moe_route/math.h"

namespace moe_route::cuda {
namespace {

class Given {
 public:
  __device__ __forceinline__ explicit Given(const GateArgs& args)
      : given_(args.given), experts_(args.experts), k_(args.k) {}

  __device__ __forceinline__ int64_t id_as_stored(int64_t slot) const {
    return given_.ids_type == DType::kInt64 ? __ldg(static_cast<const long long*>(given_.ids) + slot)
                                            : __ldg(static_cast<const int32_t*>(given_.ids) + slot);
  }
  __device__ __forceinline__ int32_t id(int64_t slot) const {
    const int64_t id = id_as_stored(slot);
    return id >= 0 && id < experts_ ? static_cast<int32_t>(id) : -1;
  }
  // Does this row come with a choice? Its first id, as stored, says so, where not all rows do.
  __device__ __forceinline__ bool has(int64_t t) const {
    return given_.every_row || id_as_stored(t * k_) != -1;
  }

  template <class Choice>
  __device__ __forceinline__ void read_ids(int64_t t, Choice& choice) const {
    bool whole = true;
    choice.count = k_;
    choice.each([&](int s, int j) {
      choice.ids[s] = id(t * k_ + j);
      whole &= choice.ids[s] >= 0;
    });
    choice.compact = ballot(whole) == kWarp;
  }

  __device__ __forceinline__ float weight(int64_t slot) const {
    switch (given_.weights_type) {
      case DType::kBFloat16:
        return math::as_float(
            int32_t(uint32_t{__ldg(static_cast<const uint16_t*>(given_.weights) + slot)} << 16));
      case DType::kFloat16:
        return __half2float(static_cast<const __half*>(given_.weights)[slot]);
      case DType::kFloat64:
        return static_cast<float>(__ldg(static_cast<const double*>(given_.weights) + slot));
      default:
        return __ldg(static_cast<const float*>(given_.weights) + slot);
    }
  }

 private:
  const GateGiven& given_;
  const int experts_, k_;
};

}  // namespace
}  // namespace moe_route::cuda
