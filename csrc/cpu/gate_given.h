// A choice that comes with the call: ids, and weights if there are any, as their tensors store them.
#pragma once
#include "gate_weigh.h"

namespace moe_route::cpu {
namespace {

template <class F>
class Given {
 public:
  using T = typename F::Scalar;
  explicit Given(const GateArgs& args) : given_(args.given), experts_(args.experts), k_(args.k) {}

  bool replays() const { return given_.mode == GivenMode::kReplay; }
  bool is_baseline() const { return given_.mode == GivenMode::kBaseline; }
  bool has_weights() const { return given_.weights != nullptr; }

  int32_t id(int64_t slot) const {
    const int64_t id = given_.ids_type == DType::kInt64 ? static_cast<const int64_t*>(given_.ids)[slot]
                                                        : static_cast<const int32_t*>(given_.ids)[slot];
    return id >= 0 && id < experts_ ? int32_t(id) : -1;
  }

  // Does this row come with a choice? Its first id, as stored, says so, where not all rows do.
  bool has(int64_t t) const {
    if (given_.mode == GivenMode::kNone || given_.ids == nullptr) return false;
    if (given_.every_row) return true;
    const int64_t slot = t * k_;
    return given_.ids_type == DType::kInt64 ? static_cast<const int64_t*>(given_.ids)[slot] != -1
                                            : static_cast<const int32_t*>(given_.ids)[slot] != -1;
  }

  // True if the given choice is the row's choice; then its ids are in `c`.
  bool read(int64_t t, bool steered, Choice<F>& c) const {
    if (is_baseline() || !has(t) || (given_.mode == GivenMode::kNatural && steered)) return false;
    bool whole = true;
    for (int j = 0; j < k_; ++j) {
      c.ids[j] = id(t * k_ + j);
      whole &= c.ids[j] >= 0;
    }
    c.compact = whole;
    return true;
  }

  void read_weights(int64_t t, Choice<F>& c) const {
    for (int j = 0; j < k_; ++j) c.weights[j] = c.ids[j] < 0 ? T(0) : weight(t * k_ + j);
  }

 private:
  T weight(int64_t slot) const {
    const void* weights = given_.weights;
    switch (given_.weights_type) {
      case DType::kBFloat16: {
        const uint32_t half = static_cast<const uint16_t*>(weights)[slot];
        return T(math::as_float(int32_t(half << 16)));
      }
      case DType::kFloat16: {
        uint16_t halves[kLanes] = {static_cast<const uint16_t*>(weights)[slot]};
        alignas(64) T converted[kLanes];
        F::load_float16(halves).store(converted);
        return converted[0];
      }
      case DType::kFloat64:
        return T(static_cast<const double*>(weights)[slot]);
      default:
        return T(static_cast<const float*>(weights)[slot]);
    }
  }

  const GateGiven& given_;
  const int experts_;
  const int k_;
};

}  // namespace
}  // namespace moe_route::cpu
