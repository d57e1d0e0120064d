// Activations of experts in float32: one definition for every backend, so that host and device give the same
// bits (math.h says under which compiler options). A NaN stays a NaN.
#pragma once
#include <cstdint>
#include <limits>

#include "moe_route/math.h"

namespace moe_route {

enum class ActivationKind : int32_t {
  kNone,         // x, unchanged and unclamped: the second product of an expert
  kSilu,         // x * sigmoid(alpha * x)
  kGelu,         // x * Phi(x), Phi the normal distribution
  kGeluTanh,     // x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2
  kRelu,         // max(x, 0)
  kReluSquared,  // max(x, 0)^2
};

// An expert without a gate: act(min(up, limit)). With one: act(min(gate, limit)) * (clamp(up, +-limit) + shift).
// gpt-oss is kSilu with alpha = 1.702, limit = 7, shift = 1.
struct Activation {
  ActivationKind kind = ActivationKind::kNone;
  float alpha = 1.0f;
  float limit = std::numeric_limits<float>::infinity();
  float shift = 0.0f;
};

namespace math {

// Phi(x). The other tail is erfc(|x| / sqrt 2) / 2 = t exp(-z^2 + p(t)) / 2 with t = 1 / (1 + z / 2) (Numerical
// Recipes, erfcc); relative error 2e-6 where the result is not below 1e-10.
MOE_ROUTE_INLINE float normal_distribution(float x) {
  const float z = abs(x) * 0.70710678f, t = 1.0f / fma(0.5f, z, 1.0f);
  float p = fma(0.17087277f, t, -0.82215223f);
  p = fma(p, t, 1.48851587f);
  p = fma(p, t, -1.13520398f);
  p = fma(p, t, 0.27886807f);
  p = fma(p, t, -0.18628806f);
  p = fma(p, t, 0.09678418f);
  p = fma(p, t, 0.37409196f);
  p = fma(p, t, 1.00002368f);
  p = fma(p, t, -1.26551223f);
  const float tail = 0.5f * t * exp_nonpositive(fma(0.0f - z, z, p));
  return select(x < 0.0f, tail, 1.0f - tail);
}

}  // namespace math

MOE_ROUTE_INLINE float activate(const Activation& activation, float x) {
  switch (activation.kind) {
    case ActivationKind::kSilu:
      return x * math::sigmoid(activation.alpha * x);
    case ActivationKind::kGelu:
      return x * math::normal_distribution(x);
    case ActivationKind::kGeluTanh: {  // (1 + tanh(y)) / 2 = sigmoid(2 y)
      const float y = 1.5957691216f * math::fma(0.044715f * x * x, x, x);
      return x * math::sigmoid(y);
    }
    case ActivationKind::kRelu:
      return x < 0.0f ? 0.0f : x;
    case ActivationKind::kReluSquared:
      return x < 0.0f ? 0.0f : x * x;
    default:
      return x;
  }
}

MOE_ROUTE_INLINE float at_most(float x, float limit) { return x > limit ? limit : x; }
MOE_ROUTE_INLINE float at_least(float x, float limit) { return x < limit ? limit : x; }

MOE_ROUTE_INLINE float apply(const Activation& activation, float up) {
  if (activation.kind == ActivationKind::kNone) return up;
  return activate(activation, at_most(up, activation.limit));
}

MOE_ROUTE_INLINE float apply_gated(const Activation& activation, float gate, float up) {
  const float limit = activation.limit;
  const float clamped = at_least(at_most(up, limit), 0.0f - limit);
  return activate(activation, at_most(gate, limit)) * (clamped + activation.shift);
}

}  // namespace moe_route
