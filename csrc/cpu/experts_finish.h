// What follows the sums: bias, activation, rounding. Shared by both layouts of weights; compiled once per instruction
// set.
#pragma once
#include <cstdint>

#include "moe_route/experts.h"

namespace moe_route::cpu::MOE_ROUTE_ISA {
namespace {

// The rows of `out` that one expert makes, and of x that it reads.
struct Rows {
  int32_t expert;
  int64_t first, count;
};

template <class Type>
class Finish {
  using Element = typename Type::Element;

 public:
  explicit Finish(const ExpertProductArgs& args) : args_(args) {}

  // Writes columns column .. column + count - 1, at most kLanes, of a row from their sums. Both arrays have kLanes
  // numbers, which this changes.
  void gated(int32_t expert, int64_t row, int64_t column, int count, float* gate, float* up) const {
    const int64_t apart = args_.pairing == Pairing::kAlternating ? 2 : 1;
    add_bias(gate, expert, args_.gate_row(column), apart, count);
    add_bias(up, expert, args_.up_row(column), apart, count);
    for_kind([&](const Activation& a, int i) { gate[i] = apply_gated(a, gate[i], up[i]); });
    store(row, column, gate, count);
  }
  void plain(int32_t expert, int64_t row, int64_t column, int count, float* sums) const {
    add_bias(sums, expert, column, 1, count);
    if (args_.activation.kind != ActivationKind::kNone) {
      for_kind([&](const Activation& a, int i) { sums[i] = apply(a, sums[i]); });
    }
    store(row, column, sums, count);
  }

 private:
  void add_bias(float* sums, int32_t expert, int64_t row, int64_t apart, int count) const {
    if (args_.bias == nullptr) return;
    const auto* bias = static_cast<const Element*>(args_.bias) + expert * args_.weight_rows() + row;
    float wide;
    for (int i = 0; i < count; ++i) sums[i] += *Type::widened(&wide, bias + i * apart, 1);
  }

  // The kind is a constant inside each loop, so that the compiler makes vectors of it.
  template <class Body>
  void for_kind(Body body) const {
    Activation activation = args_.activation;
    const auto with = [&](ActivationKind kind) {
      activation.kind = kind;
      for (int i = 0; i < Vector::kLanes; ++i) body(activation, i);
    };
    switch (activation.kind) {
      case ActivationKind::kSilu:
        return with(ActivationKind::kSilu);
      case ActivationKind::kGelu:
        return with(ActivationKind::kGelu);
      case ActivationKind::kGeluTanh:
        return with(ActivationKind::kGeluTanh);
      case ActivationKind::kRelu:
        return with(ActivationKind::kRelu);
      case ActivationKind::kReluSquared:
        return with(ActivationKind::kReluSquared);
      case ActivationKind::kNone:
        return with(ActivationKind::kNone);
    }
  }

  void store(int64_t row, int64_t column, const float* values, int count) const {
    Element* to = static_cast<Element*>(args_.out) + row * args_.out_columns + column;
    if (count == Vector::kLanes) return Type::store(to, values, Vector::kLanes);
    Type::store(to, values, count);
  }

  const ExpertProductArgs& args_;
};

}  // namespace
}  // namespace moe_route::cpu::MOE_ROUTE_ISA
