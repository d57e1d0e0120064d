// Scores: what a logit is worth, for one expert, for the chosen, or for all experts of a row.
//
// Contract: a NaN logit has score 0. Sums over the experts use one tree: expert e goes to stripe e % 16 in
// rising e, then the stripes are folded 8, 4, 2 and 1 apart, so every instruction set has the same bits. O(E
// / 16).
#pragma once
#include "gate_workspace.h"
#include "moe_route/math.h"

namespace moe_route::cpu {
namespace {

// exp(z - largest), where several infinite logits share alike.
template <class V, class T>
inline V softmax_numerator(V z, T largest) {
  if (largest == infinity<T>()) return select(z == V(largest), V(T(1)), V(T(0)));
  return exp_nonpositive(z - V(largest));
}

// Scores that need nothing but the expert's own logit.
template <Score kScore, class V>
inline V pointwise_score(V z) {
  V s = z;
  if constexpr (kScore == Score::kSigmoid) s = sigmoid(z);
  if constexpr (kScore == Score::kSqrtSoftplus) s = sqrt_softplus(z);
  return select(z == z, s, V(typename V::Scalar(0)));
}
template <class V>
inline V pointwise_score(Score score, V z) {
  if (score == Score::kSigmoid) return pointwise_score<Score::kSigmoid>(z);
  if (score == Score::kSqrtSoftplus) return pointwise_score<Score::kSqrtSoftplus>(z);
  return pointwise_score<Score::kIdentity>(z);
}

inline bool is_softmax(Score score) { return score == Score::kSoftmax || score == Score::kSparseMixer; }

// Scores of all experts of a row, stored in Workspace::score.
template <class T>
struct RowScores {
  T total = 0;            // their sum
  T inverse = 0;          // 1 / total, or 0
  T factor = 1;           // stored value -> score: softmax stores numerators
  T entropy_sum = 0;      // softmax: sum of e (z - max); else sum of s log s
  bool negative = false;  // some score is
  bool scored = false;    // mass and entropy are defined
};

// Of each stripe.
template <class F>
inline F largest_of(const typename F::Scalar* z, int vectors) {
  F best(-infinity<typename F::Scalar>());
  for (int v = 0; v < vectors; ++v) best = larger(F::load(z + kLanes * v), best);
  return best;
}

// What one pass over a row leaves in each stripe.
template <class F>
struct ScoreSums {
  F total{typename F::Scalar(0)};
  F entropy{typename F::Scalar(0)};
  F least{typename F::Scalar(0)};  // identity
};

// largest: of the row.
template <class F, bool kEntropy>
inline ScoreSums<F> softmax_sums(const Workspace<F>& w, const typename F::Scalar* z, int vectors,
                                 typename F::Scalar largest) {
  using T = typename F::Scalar;
  const F zero(T(0)), shift(largest);
  ScoreSums<F> sums;
  for (int v = 0; v < vectors; ++v) {
    const F x = F::load(z + kLanes * v);
    const F e = softmax_numerator(x, largest);
    e.store(w.score + kLanes * v);
    sums.total = sums.total + e;
    // e is 0 where the shifted logit is infinite or NaN, and that must not turn into a product.
    if constexpr (kEntropy) sums.entropy = select(e > zero, fma(e, x - shift, sums.entropy), sums.entropy);
  }
  if (kEntropy && largest == infinity<T>()) sums.entropy = zero;
  return sums;
}

template <class F, Score kScore, bool kEntropy>
inline ScoreSums<F> pointwise_sums(const Workspace<F>& w, const typename F::Scalar* z, int vectors) {
  using T = typename F::Scalar;
  const F tiny(smallest_normal<T>());
  ScoreSums<F> sums;
  for (int v = 0; v < vectors; ++v) {
    const F s = pointwise_score<kScore>(F::load(z + kLanes * v));
    s.store(w.score + kLanes * v);
    sums.total = sums.total + s;
    sums.least = smaller(s, sums.least);
    if constexpr (kEntropy) sums.entropy = select(s >= tiny, fma(s, log(s), sums.entropy), sums.entropy);
  }
  return sums;
}

template <class F, bool kEntropy>
inline ScoreSums<F> sums_by(const Workspace<F>& w, Score score, const typename F::Scalar* z, int vectors,
                            typename F::Scalar largest) {
  switch (score) {
    case Score::kSigmoid:
      return pointwise_sums<F, Score::kSigmoid, kEntropy>(w, z, vectors);
    case Score::kSqrtSoftplus:
      return pointwise_sums<F, Score::kSqrtSoftplus, kEntropy>(w, z, vectors);
    case Score::kIdentity:
      return pointwise_sums<F, Score::kIdentity, kEntropy>(w, z, vectors);
    default:
      return softmax_sums<F, kEntropy>(w, z, vectors, largest);
  }
}

// Stores the scores of a row; largest: of the row, for softmax.
template <class F>
inline ScoreSums<F> score_sums(const Workspace<F>& w, Score score, const typename F::Scalar* z, int experts,
                               typename F::Scalar largest, bool entropy) {
  const int vectors = vectors_of(experts);
  return entropy ? sums_by<F, true>(w, score, z, vectors, largest)
                 : sums_by<F, false>(w, score, z, vectors, largest);
}

template <class F>
inline RowScores<typename F::Scalar> score_all(const Workspace<F>& w, Score score,
                                               const typename F::Scalar* z, int experts, bool entropy) {
  using T = typename F::Scalar;
  const T largest = is_softmax(score) ? fold_max(largest_of<F>(z, vectors_of(experts))) : T(0);
  const ScoreSums<F> sums = score_sums<F>(w, score, z, experts, largest, entropy);
  RowScores<T> r;
  r.total = fold_add(sums.total);
  r.negative = score == Score::kIdentity && fold_min(sums.least) < T(0);
  r.entropy_sum = fold_add(sums.entropy);
  r.scored = r.total >= smallest_normal<T>() && r.total < infinity<T>() && !r.negative;
  r.inverse = r.total > T(0) ? T(1) / r.total : T(0);
  if (is_softmax(score)) r.factor = r.inverse;
  return r;
}

}  // namespace
}  // namespace moe_route::cpu
