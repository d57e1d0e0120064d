// Weights of the chosen experts.
//
// Contract: an empty slot, a NaN logit and a forbidden expert weigh 0; a sum of weights that is 0 leaves them
// 0. Sums over the chosen run in slot order. O(k), except SparseMixer: O(k E / 16).
#pragma once
#include "gate_select.h"
#include "gate_steer.h"

namespace moe_route::cpu {
namespace {

// The chosen of one row. Slots at and after `count` are empty; all arrays are readable to a multiple of 16.
template <class F>
struct Choice {
  using T = typename F::Scalar;
  int count = 0;        // slots in use
  bool compact = true;  // no empty slots among them; a given choice may have some
  alignas(64) int32_t ids[kMaxSlots + kMaxCandidates + kLanes];
  alignas(64) T weights[kMaxSlots + kLanes];
  alignas(64) T logits[kMaxSlots + kLanes];
};

template <class T>
inline void look_up(const T* __restrict z, const int32_t* __restrict ids, int count, T* __restrict out) {
  for (int j = 0; j < count; ++j) out[j] = z[ids[j]];
}

template <class T>
inline T sum_in_order(const T* x, int count) {
  T sum = 0;
  for (int j = 0; j < count; ++j) sum += x[j];
  return sum;
}

// (sum |w|^p)^(1/p), scaled by the largest so that powers neither overflow nor vanish. p = 0 counts, p =
// infinity is the largest.
template <class T>
inline T p_norm(const T* x, int count, T p) {
  T largest = 0, sum = 0;
  for (int j = 0; j < count; ++j) largest = abs(x[j]) > largest ? abs(x[j]) : largest;
  if (largest == T(0) || largest == infinity<T>() || p == infinity<T>()) return largest;
  for (int j = 0; j < count; ++j) {
    const T ratio = abs(x[j]) / largest;
    if (p == T(1))
      sum += abs(x[j]);
    else if (p == T(2))
      sum += ratio * ratio;
    else if (p == T(0))
      sum += T(ratio > T(0));
    else if (ratio >= smallest_normal<T>())
      sum += exp_nonpositive(p * log(ratio));
  }
  if (p == T(1) || p == T(0)) return sum;
  return p == T(2) ? largest * sqrt(sum) : largest / exp_nonpositive(-log(sum) / p);
}

template <class F>
inline void divide(Choice<F>& c, typename F::Scalar by) {
  using T = typename F::Scalar;
  for (int j = 0; j < c.count; j += kLanes) {
    const F w = F::load(c.weights + j);
    (by != T(0) ? w / F(by) : F(T(0))).store(c.weights + j);
  }
}

template <class F>
inline typename F::Scalar norm_of(const GateSpec& spec, const Choice<F>& c) {
  using T = typename F::Scalar;
  if (spec.renormalize == Renormalize::kNorm) return p_norm(c.weights, c.count, T(spec.norm_p));
  const T sum = sum_in_order(c.weights, c.count), eps = spec.eps;
  if (spec.renormalize == Renormalize::kSum) return sum + eps;
  return sum < eps && sum > -infinity<T>() ? eps : sum;
}

// Infinite weights share, as infinite logits do under softmax; finite ones whose norm overflows are scaled
// first.
template <class F>
inline void tame(Choice<F>& c) {
  using T = typename F::Scalar;
  const T largest = p_norm(c.weights, c.count, infinity<T>());
  for (int j = 0; j < c.count; ++j) {
    const T w = c.weights[j];
    c.weights[j] = largest < infinity<T>() ? w / largest : T(w == infinity<T>()) - T(w == -infinity<T>());
  }
}

template <class F>
inline void renormalize(const GateSpec& spec, Choice<F>& c) {
  using T = typename F::Scalar;
  if (spec.renormalize == Renormalize::kNone) return;
  T norm = norm_of(spec, c);
  if (!(abs(norm) < infinity<T>())) {
    tame(c);
    norm = norm_of(spec, c);
  }
  divide(c, norm);
}

// Numerators of the softmax over the chosen alone.
template <class F>
inline void softmax_of_chosen(Choice<F>& c) {
  using T = typename F::Scalar;
  F best(-infinity<T>());
  for (int j = 0; j < c.count; j += kLanes) best = larger(F::load(c.logits + j), best);
  const T largest = fold_max(best);
  for (int j = 0; j < c.count; j += kLanes)
    softmax_numerator(F::load(c.logits + j), largest).store(c.weights + j);
}

// Phi's SparseMixer in evaluation; see GateSpec::jitter.
template <class F>
inline void sparsemixer(const Workspace<F>& w, const GateSpec& spec, const typename F::Scalar* z, int experts,
                        Choice<F>& c) {
  using T = typename F::Scalar;
  const int end = kLanes * vectors_of(experts);
  const T threshold = T(2) * T(spec.jitter);
  for (int e = 0; e < end; e += kLanes) F::load(z + e).store(w.masked + e);
  for (int j = 0; j < c.count; ++j) {
    F best(-infinity<T>()), sum(T(0));
    for (int e = 0; e < end; e += kLanes) best = larger(F::load(w.masked + e), best);
    const T largest = fold_max(best);
    const auto numerator = [&](F x) {
      const auto dropped = (F(largest) - x) / larger(abs(x), F(largest)) > F(threshold);
      return select(dropped, F(T(0)), softmax_numerator(x, largest));
    };
    for (int e = 0; e < end; e += kLanes) sum = sum + numerator(F::load(w.masked + e));
    const int id = c.ids[j];
    const T total = fold_add(sum), own = id >= 0 ? fold_max(numerator(F(w.masked[id]))) : T(0);
    c.weights[j] = total > T(0) ? own / total : T(0);
    if (id >= 0) w.masked[id] = not_a_number<T>();
  }
}

// True where the sum over all experts cancels in renormalizing.
template <class F>
inline bool softmax_over_chosen(const GateSpec& spec, const SteeringRow<F>* row) {
  if (spec.score != Score::kSoftmax) return false;
  if (spec.order == Order::kTopKThenScore) return true;
  return spec.renormalize == Renormalize::kSum && spec.eps == 0.0f &&
         !(row && row->score_bias && row->score_bias_weighs);
}

template <class F, class Factor>
inline void multiply(Choice<F>& c, Factor factor) {
  for (int j = 0; j < c.count; ++j) {
    if (c.ids[j] >= 0) c.weights[j] *= factor(c.ids[j]);
  }
}

// From scores (or softmax numerators) of the chosen to weights as the model uses them.
template <class F>
inline void finish_weights(const GateArgs& args, const SteeringRow<F>* row, bool bias_on_scores,
                           Choice<F>& c) {
  using T = typename F::Scalar;
  const GateSpec& spec = args.spec;
  if (spec.score == Score::kSoftmax && spec.order == Order::kTopKThenScore) {
    divide(c, sum_in_order(c.weights, c.count));
  }
  for (int j = 0; bias_on_scores && j < c.count; ++j) {
    if (c.logits[j] == c.logits[j]) c.weights[j] += T(row->score_bias[c.ids[j]]);
  }
  const auto steered_scale = [&](int id) { return T(row->weight_scale[id]); };
  if (row && row->weight_scale && !row->weight_scale_after) multiply(c, steered_scale);
  renormalize(spec, c);
  if (spec.scale != 1.0f) multiply(c, [&](int) { return T(spec.scale); });
  if (row && row->weight_scale && row->weight_scale_after) multiply(c, steered_scale);
  if (args.expert_scale) multiply(c, [&](int id) { return T(args.expert_scale[id]); });
}

// A given choice may have empty slots between others; whatever the row's norm was, they weigh 0.
template <class F>
inline void clear_empty(Choice<F>& c) {
  for (int j = 0; j < c.count; ++j) {
    if (c.ids[j] < 0) c.weights[j] = 0;
  }
}

// z: the row's steered logits. scores: of all experts, where they were needed (softmax that does not cancel).
template <class F>
inline void weigh(const Workspace<F>& w, const GateArgs& args, const SteeringRow<F>* row,
                  const typename F::Scalar* z, const RowScores<typename F::Scalar>& scores, Choice<F>& c) {
  using T = typename F::Scalar;
  const GateSpec& spec = args.spec;
  const bool over_chosen = softmax_over_chosen(spec, row);
  const bool biased = row && row->score_bias && row->score_bias_weighs;
  const bool bias_on_logits = biased && spec.order == Order::kTopKThenScore;
  if (c.compact && !bias_on_logits) {
    look_up(z, c.ids, c.count, c.logits);
  } else {
    for (int j = 0; j < c.count; ++j) {
      const int id = c.ids[j];
      c.logits[j] = id >= 0 ? z[id] : not_a_number<T>();
      if (bias_on_logits && id >= 0) c.logits[j] += T(row->score_bias[id]);
    }
  }
  F(not_a_number<T>()).store(c.logits + c.count);
  if (over_chosen) {
    softmax_of_chosen(c);
  } else if (spec.score == Score::kSparseMixer) {
    sparsemixer(w, spec, z, args.experts, c);
  } else if (spec.score == Score::kSoftmax) {
    for (int j = 0; j < c.count; ++j) c.weights[j] = c.ids[j] < 0 ? T(0) : w.score[c.ids[j]] * scores.inverse;
  } else {
    for (int j = 0; j < c.count; j += kLanes)
      pointwise_score(spec.score, F::load(c.logits + j)).store(c.weights + j);
  }
  finish_weights(args, row, biased && !bias_on_logits, c);
}

}  // namespace
}  // namespace moe_route::cpu
