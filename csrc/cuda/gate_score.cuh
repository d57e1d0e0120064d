// Scores: what a logit is worth, for one expert or for all experts of a row. The twin of
// csrc/cpu/gate_score.h: the same operations in the same order, so the same bits.
#pragma once
#include "gate_warp.cuh"
#include "moe_route/math.h"

namespace moe_route::cuda {
namespace {

// exp(z - largest), where several infinite logits share alike.
__device__ __forceinline__ float softmax_numerator(float z, float largest) {
  const float e = math::exp_nonpositive(z - largest);  // 0 beside an infinite one
  return largest == infinity() && z == largest ? 1.0f : e;
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

template <int kValues>
__device__ __forceinline__ float largest_of(const Values<kValues>& z, int experts) {
  float most = -infinity();
  for_each_expert<kValues>(experts, [&](int i, int) { most = fmaxf(most, z[i]); });
  return fold_max(most);
}

// Adds up the scores and, if asked for, `entropy_term(i, sum)`.
template <int kValues, class EntropyTerm>
__device__ __forceinline__ void add_up(const Values<kValues>& scores, int experts, bool entropy, RowScores& r,
                                       EntropyTerm entropy_term) {
  if (!entropy) {
    r.total = sum_over_experts<kValues, OneSum>(experts, [&](int i, OneSum sum) {
                return OneSum{sum.value + scores[i]};
              }).value;
    return;
  }
  const TwoSums sums = sum_over_experts<kValues, TwoSums>(experts, [&](int i, TwoSums sum) {
    return TwoSums{sum.first + scores[i], entropy_term(i, sum.second)};
  });
  r.total = sums.first;
  r.entropy_sum = sums.second;
}

// How far a logit lies below the largest. Where the numerator is 0 anyway, and for NaN, a number that turns its
// product with 0 into 0.
__device__ __forceinline__ float below(float z, float largest) {
  constexpr float kLowest = -88.0f;
  static_assert(kLowest < math::kExpUnderflow);
  return fmaxf(z - largest, kLowest);
}

// `r.largest` is known.
template <int kValues>
__device__ __forceinline__ void softmax_all(const Values<kValues>& z, int experts, bool entropy,
                                            Values<kValues>& scores, RowScores& r) {
  Values<kValues> shifted;  // made twice where there are no registers
  if (r.largest < infinity()) {
    for_each_expert<kValues>(experts, [&](int i, int) {
      const float x = below(z[i], r.largest);
      scores[i] = math::exp_nonpositive(x);
      if constexpr (kValues > 0) shifted[i] = x;
    });
  } else {
    for_each_expert<kValues>(experts, [&](int i, int) {
      scores[i] = z[i] == r.largest ? 1.0f : 0.0f;
      if constexpr (kValues > 0) shifted[i] = 0.0f;
    });
  }
  add_up<kValues>(scores, experts, entropy, r, [&](int i, float sum) {
    if constexpr (kValues > 0) return math::fma(scores[i], shifted[i], sum);
    return math::fma(scores[i], below(z[i], r.largest), sum);
  });
  if (r.largest == infinity()) r.entropy_sum = 0.0f;
  r.scored = true;
}

template <int kValues>
__device__ __forceinline__ void pointwise_all(Score score, const Values<kValues>& z, int experts,
                                              bool entropy, Values<kValues>& scores, RowScores& r) {
  float least = 0;
  Values<kValues> logs;  // of the scores; not worth a row of shared memory where there are no registers
  for_each_expert<kValues>(experts, [&](int i, int) {
    const float s = pointwise_score(score, z[i]);
    scores[i] = s;
    least = fminf(least, s);
    if constexpr (kValues > 0) logs[i] = entropy && s >= kSmallestNormal ? math::log(s) : 0.0f;
  });
  add_up<kValues>(scores, experts, entropy, r, [&](int i, float sum) {
    const float s = scores[i];
    if (!(s >= kSmallestNormal)) return sum;
    if constexpr (kValues > 0) return math::fma(s, logs[i], sum);
    return math::fma(s, math::log(s), sum);
  });
  r.scored = score != Score::kIdentity || !(fold_min(least) < 0.0f);
}

// `entropy` and `score` are the launch's, the same for every row. `known`: the largest logit, where it is known
// already.
template <int kValues>
__device__ __forceinline__ RowScores score_all(Score score, const Values<kValues>& z, int experts,
                                               bool entropy, Values<kValues>& scores,
                                               const float* known = nullptr) {
  RowScores r;
  if (is_softmax(score)) {
    r.largest = known != nullptr ? *known : largest_of<kValues>(z, experts);
    softmax_all<kValues>(z, experts, entropy, scores, r);
  } else {
    pointwise_all<kValues>(score, z, experts, entropy, scores, r);
  }
  r.scored = r.scored && r.total >= kSmallestNormal && r.total < infinity();
  r.inverse = r.scored ? 1.0f / r.total : 0.0f;  // a softmax whose sum is not 0 is scored
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
