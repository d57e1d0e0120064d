// Scores: what a logit is worth, for one expert or for all experts of a row. The twin of
// csrc/cpu/gate_score.h: the same operations in the same order, so the same bits.
#pragma once
#include "gate_team.cuh"
#include "moe_route/math.h"

namespace moe_route::cuda {
namespace {

// exp(z - largest), where several infinite logits share alike.
__device__ __forceinline__ float softmax_numerator(float z, float largest) {
  if (largest == infinity()) return z == largest ? 1.0f : 0.0f;
  return math::exp_nonpositive(z - largest);
}

// Scores that need nothing but the expert's own logit.
__device__ __forceinline__ float pointwise_score(Score score, float z) {
  float s = z;
  if (score == Score::kSigmoid) s = math::sigmoid(z);
  if (score == Score::kSqrtSoftplus) s = math::sqrt_softplus(z);
  return z == z ? s : 0.0f;
}

__device__ __forceinline__ bool is_softmax(Score score) {
  return score == Score::kSoftmax || score == Score::kSparseMixer;
}

// Scores of all experts of a row.
struct RowScores {
  float total = 0;        // their sum
  float inverse = 0;      // 1 / total, or 0
  float factor = 1;       // stored value -> score: softmax stores numerators
  float largest = 0;      // softmax: the largest logit
  float entropy_sum = 0;  // softmax: sum of e (z - max); else sum of s log s
  bool scored = false;    // mass and entropy are defined
};

template <int kVectors>
__device__ __forceinline__ float largest_of(const Values<kVectors>& z, int experts) {
  float most = -infinity();
  for_each_expert<kVectors>(experts, [&](int i, int) { most = fmaxf(most, z[i]); });
  return fold_max(most);
}

template <int kVectors>
__device__ __forceinline__ void softmax_all(const Values<kVectors>& z, int experts, bool entropy,
                                            Values<kVectors>& scores, RowScores& r) {
  r.largest = largest_of<kVectors>(z, experts);
  float sum = 0, entropy_sum = 0;
  for_each_expert<kVectors>(experts, [&](int i, int) {
    const float e = softmax_numerator(z[i], r.largest);
    scores[i] = e;
    sum = sum + e;
    // e is 0 where the shifted logit is infinite or NaN, and that must not turn into a product.
    if (entropy && e > 0.0f) entropy_sum = math::fma(e, z[i] - r.largest, entropy_sum);
  });
  r.total = fold_add(sum);
  if (entropy) entropy_sum = fold_add(entropy_sum);  // by both teams, whatever their rows hold
  r.entropy_sum = r.largest == infinity() ? 0.0f : entropy_sum;
  r.scored = true;
}

template <int kVectors>
__device__ __forceinline__ void pointwise_all(Score score, const Values<kVectors>& z, int experts,
                                              bool entropy, Values<kVectors>& scores, RowScores& r) {
  float sum = 0, entropy_sum = 0, least = 0;
  for_each_expert<kVectors>(experts, [&](int i, int) {
    const float s = pointwise_score(score, z[i]);
    scores[i] = s;
    sum = sum + s;
    least = fminf(least, s);
    if (entropy && s >= kSmallestNormal) entropy_sum = math::fma(s, math::log(s), entropy_sum);
  });
  r.total = fold_add(sum);
  if (entropy) r.entropy_sum = fold_add(entropy_sum);
  r.scored = score != Score::kIdentity || !(fold_min(least) < 0.0f);
}

// `entropy` and `score` are the launch's, the same for every row.
template <int kVectors>
__device__ __forceinline__ RowScores score_all(Score score, const Values<kVectors>& z, int experts,
                                               bool entropy, Values<kVectors>& scores) {
  RowScores r;
  if (is_softmax(score))
    softmax_all<kVectors>(z, experts, entropy, scores, r);
  else
    pointwise_all<kVectors>(score, z, experts, entropy, scores, r);
  r.scored = r.scored && r.total >= kSmallestNormal && r.total < infinity();
  r.inverse = r.total > 0.0f ? 1.0f / r.total : 0.0f;
  if (is_softmax(score)) r.factor = r.inverse;
  return r;
}

// Entropy of the normalized scores, in nats.
__device__ __forceinline__ float entropy_of(const RowScores& r) {
  const float h = math::log(r.total) - r.entropy_sum * r.inverse;
  return h > 0.0f ? h : 0.0f;
}

}  // namespace
}  // namespace moe_route::cuda
