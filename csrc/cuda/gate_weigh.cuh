// Weights of the chosen experts, a slot for each lane. The twin of csrc/cpu/gate_weigh.h: sums over the
// chosen run in slot order, by every lane for itself, over shared memory.
#pragma once
#include "gate_select.cuh"
#include "gate_steer.cuh"

namespace moe_route::cuda {
namespace {

// The chosen of one row; slots at and after `count` are empty.
struct Choice {
  int count = 0;
  bool compact = true;  // no empty slots among them; a given choice may have some
};

// op(j) for the calling lane's slots below `count`.
template <class Op>
__device__ __forceinline__ void for_each_slot(int count, Op op) {
  for (int j = team_lane(); j < count; j += kTeam) op(j);
}

__device__ __forceinline__ float sum_in_order(const float* x, int count) {
  float sum = 0;
  for (int j = 0; j < count; ++j) sum += x[j];
  return sum;
}

// (sum |w|^p)^(1/p), scaled by the largest so that powers neither overflow nor vanish. p = 0 counts, p =
// infinity is the largest.
__device__ __forceinline__ float p_norm(const float* x, int count, float p) {
  float largest = 0, sum = 0;
  for (int j = 0; j < count; ++j) largest = fabsf(x[j]) > largest ? fabsf(x[j]) : largest;
  if (largest == 0.0f || largest == infinity() || p == infinity()) return largest;
  for (int j = 0; j < count; ++j) {
    const float ratio = fabsf(x[j]) / largest;
    if (p == 1.0f)
      sum += fabsf(x[j]);
    else if (p == 2.0f)
      sum += ratio * ratio;
    else if (p == 0.0f)
      sum += ratio > 0.0f ? 1.0f : 0.0f;
    else if (ratio >= kSmallestNormal)
      sum += math::exp_nonpositive(p * math::log(ratio));
  }
  if (p == 1.0f || p == 0.0f) return sum;
  return p == 2.0f ? largest * math::sqrt(sum) : largest / math::exp_nonpositive(-math::log(sum) / p);
}

__device__ __forceinline__ void divide(Slots slots, int count, float by) {
  for_each_slot(count, [&](int j) { slots.weights[j] = by != 0.0f ? slots.weights[j] / by : 0.0f; });
  __syncwarp();
}

__device__ __forceinline__ float norm_of(const GateSpec& spec, Slots slots, int count) {
  if (spec.renormalize == Renormalize::kNorm) return p_norm(slots.weights, count, spec.norm_p);
  const float sum = sum_in_order(slots.weights, count);
  if (spec.renormalize == Renormalize::kSum) return sum + spec.eps;
  return sum < spec.eps && sum > -infinity() ? spec.eps : sum;
}

// Infinite weights share, as infinite logits do under softmax; finite ones whose norm overflows are scaled
// first.
__device__ __forceinline__ void tame(Slots slots, int count, bool wild) {
  const float largest = p_norm(slots.weights, count, infinity());
  __syncwarp();
  for_each_slot(wild ? count : 0, [&](int j) {
    const float w = slots.weights[j];
    slots.weights[j] = largest < infinity()
                           ? w / largest
                           : (w == infinity() ? 1.0f : 0.0f) - (w == -infinity() ? 1.0f : 0.0f);
  });
  __syncwarp();
}

__device__ __forceinline__ void renormalize(const GateSpec& spec, Slots slots, int count) {
  if (spec.renormalize == Renormalize::kNone) return;
  float norm = norm_of(spec, slots, count);
  const bool wild = !(fabsf(norm) < infinity());
  if (any(wild)) {
    tame(slots, count, wild);
    norm = norm_of(spec, slots, count);
  }
  __syncwarp();
  divide(slots, count, norm);
}

// Does the sum over all experts cancel in renormalizing?
__device__ __forceinline__ bool softmax_over_chosen(const GateSpec& spec, const SteeringRow& row) {
  if (spec.score != Score::kSoftmax) return false;
  if (spec.order == Order::kTopKThenScore) return true;
  return spec.renormalize == Renormalize::kSum && spec.eps == 0.0f &&
         !(row.score_bias && row.score_bias_weighs);
}

// Phi's SparseMixer in evaluation; see GateSpec::jitter. `z` and `row` (its copy in shared memory) lose the
// chosen.
template <int kVectors>
__device__ __forceinline__ void sparsemixer(const GateArgs& args, Slots slots, int count, float* row,
                                            Values<kVectors>& z) {
  const float threshold = 2.0f * args.spec.jitter;
  for (int j = 0; j < args.k; ++j) {  // both teams, however many slots each has
    const float largest = largest_of<kVectors>(z, args.experts);
    const auto numerator = [&](float x) {
      const float size = fabsf(x) > largest ? fabsf(x) : largest;
      return (largest - x) / size > threshold ? 0.0f : softmax_numerator(x, largest);
    };
    float sum = 0;
    for_each_expert<kVectors>(args.experts, [&](int i, int) { sum = sum + numerator(z[i]); });
    const float total = fold_add(sum);
    const int id = j < count ? slots.ids[j] : -1;
    const float own = id >= 0 ? numerator(row[id]) : 0.0f;
    __syncwarp();
    if (j < count && team_lane() == 0) {
      slots.weights[j] = total > 0.0f ? own / total : 0.0f;
      if (id >= 0) row[id] = not_a_number();
    }
    for_each_expert<kVectors>(args.experts, [&](int i, int e) {
      if (e == id) z[i] = not_a_number();
    });
    __syncwarp();
  }
}

template <class Factor>
__device__ __forceinline__ void multiply(Slots slots, int count, Factor factor) {
  for_each_slot(count, [&](int j) {
    if (slots.ids[j] >= 0) slots.weights[j] *= factor(slots.ids[j]);
  });
}

// Logits of the chosen, looked up in the team's copy of z'.
__device__ __forceinline__ void look_up_logits(const GateArgs& args, const SteeringRow& row, const float* z,
                                               Slots slots, int count, bool bias_on_logits) {
  for_each_slot(count, [&](int j) {
    const int id = slots.ids[j];
    float x = id >= 0 ? z[id] : not_a_number();
    if (bias_on_logits && id >= 0) x = x + entry(args, row, kScoreBias, id, 0.0f);
    slots.logits[j] = x;
  });
}

// From scores (or softmax numerators) of the chosen to weights as the model uses them.
__device__ __forceinline__ void finish_weights(const GateArgs& args, const SteeringRow& row,
                                               bool bias_on_scores, Slots slots, const Choice& c) {
  const GateSpec& spec = args.spec;
  const int count = c.count;
  if (spec.score == Score::kSoftmax && spec.order == Order::kTopKThenScore) {
    __syncwarp();
    const float sum = sum_in_order(slots.weights, count);
    __syncwarp();
    divide(slots, count, sum);
  }
  if (bias_on_scores) {
    for_each_slot(count, [&](int j) {
      if (slots.logits[j] == slots.logits[j])
        slots.weights[j] += entry(args, row, kScoreBias, slots.ids[j], 0.0f);
    });
  }
  const bool rescales = has(args, kWeightScale) && row.tables != nullptr;
  const auto steered_scale = [&](int id) { return entry(args, row, kWeightScale, id, 1.0f); };
  if (rescales && !row.weight_scale_after) multiply(slots, count, steered_scale);
  __syncwarp();
  renormalize(spec, slots, count);
  if (spec.scale != 1.0f) multiply(slots, count, [&](int) { return spec.scale; });
  if (rescales && row.weight_scale_after) multiply(slots, count, steered_scale);
  if (args.expert_scale != nullptr)
    multiply(slots, count, [&](int id) { return __ldg(args.expert_scale + id); });
  // A given choice may have empty slots between others; whatever the row's norm was, they weigh 0.
  if (!c.compact) {
    for_each_slot(count, [&](int j) {
      if (slots.ids[j] < 0) slots.weights[j] = 0.0f;
    });
  }
  __syncwarp();
}

// Needs the logits of the chosen (but for SparseMixer), and `scores` where the softmax runs over all experts.
__device__ __forceinline__ void score_chosen(const GateArgs& args, const SteeringRow& row,
                                             const RowScores& scores, Slots slots, int count) {
  const bool over_chosen = softmax_over_chosen(args.spec, row);
  float largest = -infinity();
  for_each_slot(count, [&](int j) { largest = fmaxf(largest, slots.logits[j]); });
  largest = fold_max(largest);
  for_each_slot(count, [&](int j) {
    const float z = slots.logits[j];
    if (over_chosen)
      slots.weights[j] = softmax_numerator(z, largest);
    else if (args.spec.score == Score::kSoftmax)
      slots.weights[j] = slots.ids[j] < 0 ? 0.0f : softmax_numerator(z, scores.largest) * scores.inverse;
    else
      slots.weights[j] = pointwise_score(args.spec.score, z);
  });
}

}  // namespace
}  // namespace moe_route::cuda
