// Weights of the chosen experts, a slot for each lane. The twin of csrc/cpu/gate_weigh.h: sums over the
// chosen run in slot order, by every lane for itself, over shared memory.
#pragma once
#include "gate_select.cuh"
#include "gate_steer.cuh"

namespace moe_route::cuda {
namespace {

// The chosen of one row, of which lane l holds slots l and, where k may pass 32, l + 32. Slots at and after
// `count` are empty: id -1, weight 0.
template <int kSlots>
struct Choice {
  int32_t ids[kSlots];
  float logits[kSlots];
  float weights[kSlots];
  int count = 0;
  bool compact = true;  // no empty slots among them; a given choice may have some

  __device__ __forceinline__ Choice() { clear(); }
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int s = 0; s < kSlots; ++s) ids[s] = -1, logits[s] = not_a_number(), weights[s] = 0.0f;
  }
  // op(s, j) for the calling lane's slots j, held at s, that are below `count`.
  template <class Op>
  __device__ __forceinline__ void each(Op op) const {
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
      if (lane() + kLanes * s < count) op(s, lane() + kLanes * s);
    }
  }
  // Puts one number of each slot into shared memory, 0 for empty ones, for all lanes to read.
  template <class T>
  __device__ __forceinline__ void spread(const T (&mine)[kSlots], T* row) const {
    __syncwarp();
#pragma unroll
    for (int s = 0; s < kSlots; ++s) row[lane() + kLanes * s] = mine[s];
    __syncwarp();
  }
};

// Past `count` come zeros, to eight numbers or the next multiple of four.
__device__ __forceinline__ float sum_in_order(const float* x, int count) {
  float sum = 0;
  const auto add = [&](int j) {
    const float4 four = *reinterpret_cast<const float4*>(x + j);
    sum = sum + four.x;
    sum = sum + four.y;
    sum = sum + four.z;
    sum = sum + four.w;
  };
  add(0);
  add(4);
#pragma unroll 1
  for (int j = 8; j < count; j += 4) add(j);
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

template <int kSlots>
__device__ __forceinline__ void divide(Choice<kSlots>& c, float by) {
#pragma unroll
  for (int s = 0; s < kSlots; ++s) {
    const bool there = lane() + kLanes * s < c.count;
    const float quotient = (there ? c.weights[s] : by) / by;  // 0 / x would take division's slow path
    c.weights[s] = there && by != 0.0f ? quotient : 0.0f;
  }
}

// Reads the weights in `row`.
__device__ __forceinline__ float norm_of(const GateSpec& spec, const float* row, int count) {
  if (spec.renormalize == Renormalize::kNorm) return p_norm(row, count, spec.norm_p);
  const float sum = sum_in_order(row, count);
  if (spec.renormalize == Renormalize::kSum) return sum + spec.eps;
  return sum < spec.eps && sum > -infinity() ? spec.eps : sum;
}

// Infinite weights share, as infinite logits do under softmax; finite ones whose norm overflows are scaled
// first.
template <int kSlots>
__device__ __forceinline__ void tame(Choice<kSlots>& c, float* row) {
  const float largest = p_norm(row, c.count, infinity());
  c.each([&](int s, int) {
    const float w = c.weights[s];
    c.weights[s] = largest < infinity() ? w / largest
                                        : (w == infinity() ? 1.0f : 0.0f) - (w == -infinity() ? 1.0f : 0.0f);
  });
  c.spread(c.weights, row);
}

template <int kSlots>
__device__ __forceinline__ void renormalize(const GateSpec& spec, Choice<kSlots>& c, float* row) {
  if (spec.renormalize == Renormalize::kNone) return;
  c.spread(c.weights, row);
  float norm = norm_of(spec, row, c.count);
  if (!(fabsf(norm) < infinity())) {
    tame(c, row);
    norm = norm_of(spec, row, c.count);
  }
  divide(c, norm);
}

// Does the sum over all experts cancel in renormalizing? (gate.cu says so but for the bias.)
__device__ __forceinline__ bool softmax_over_chosen(const GateLaunch& launch, const SteeringRow& row) {
  if (launch.args.spec.order == Order::kTopKThenScore) return launch.layout.softmax_of_chosen;
  return launch.layout.softmax_of_chosen && !(row.score_bias() && row.score_bias_weighs());
}

// Phi's SparseMixer in evaluation; see GateSpec::jitter. `z` and `row` (its copy in shared memory) lose the
// chosen; `slots` is room for the ids.
template <int kValues, int kSlots>
__device__ __forceinline__ void sparsemixer(const GateLaunch& launch, Choice<kSlots>& c, int32_t* slots,
                                            float* row, Values<kValues>& z) {
  const float threshold = 2.0f * launch.args.spec.jitter;
  c.spread(c.ids, slots);
  for (int j = 0; j < c.count; ++j) {
    const float largest = largest_of<kValues>(z, launch.args.experts);
    const auto numerator = [&](float x) {
      const float size = fabsf(x) > largest ? fabsf(x) : largest;
      return (largest - x) / size > threshold ? 0.0f : softmax_numerator(x, largest);
    };
    const float total = sum_over_experts<kValues, OneSum>(launch.args.experts, [&](int i, OneSum sum) {
                          return OneSum{sum.value + numerator(z[i])};
                        }).value;
    const int id = slots[j];
    const float own = id >= 0 ? numerator(row[id]) : 0.0f;
    c.each([&](int s, int slot) {
      if (slot == j) c.weights[s] = total > 0.0f ? own / total : 0.0f;
    });
    __syncwarp();
    if (id >= 0 && lane() == 0) row[id] = not_a_number();
    for_each_expert<kValues>(launch.args.experts, [&](int i, int e) {
      if (e == id) z[i] = not_a_number();
    });
    __syncwarp();
  }
}

template <int kSlots, class Factor>
__device__ __forceinline__ void multiply(Choice<kSlots>& c, Factor factor) {
  c.each([&](int s, int) {
    if (c.ids[s] >= 0) c.weights[s] *= factor(c.ids[s]);
  });
}

// Logits of the chosen, looked up in the warp's copy of z'.
template <int kSlots>
__device__ __forceinline__ void look_up_logits(const GateLaunch& launch, const SteeringRow& row,
                                               const float* z, Choice<kSlots>& c, bool bias_on_logits) {
  c.each([&](int s, int) {
    const int id = c.ids[s];
    float x = id >= 0 ? z[id] : not_a_number();
    if (bias_on_logits && id >= 0) x = x + entry(launch, row, kScoreBias, id, 0.0f);
    c.logits[s] = x;
  });
}

// From scores (or softmax numerators) of the chosen to weights as the model uses them. `row` is room for a
// number of each slot.
template <bool kSteered, int kSlots>
__device__ __forceinline__ void finish_weights(const GateLaunch& launch, const SteeringRow& steering,
                                               bool bias_on_scores, Choice<kSlots>& c, float* row) {
  const GateSpec& spec = launch.args.spec;
  if (spec.score == Score::kSoftmax && spec.order == Order::kTopKThenScore) {
    c.spread(c.weights, row);
    divide(c, sum_in_order(row, c.count));
  }
  if (bias_on_scores) {
    c.each([&](int s, int) {
      if (c.logits[s] == c.logits[s]) c.weights[s] += entry(launch, steering, kScoreBias, c.ids[s], 0.0f);
    });
  }
  const bool rescales = kSteered && has(launch, kWeightScale) && steering.index >= 0;
  const auto steered_scale = [&](int id) { return entry(launch, steering, kWeightScale, id, 1.0f); };
  if (rescales && !steering.weight_scale_after()) multiply(c, steered_scale);
  renormalize(spec, c, row);
  if (spec.scale != 1.0f) multiply(c, [&](int) { return spec.scale; });
  if (rescales && steering.weight_scale_after()) multiply(c, steered_scale);
  if (launch.args.expert_scale != nullptr)
    multiply(c, [&](int id) { return __ldg(launch.args.expert_scale + id); });
  // A given choice may have empty slots between others; whatever the row's norm was, they weigh 0.
  if (!c.compact) {
    c.each([&](int s, int) {
      if (c.ids[s] < 0) c.weights[s] = 0.0f;
    });
  }
}

// Needs the logits of the chosen (but for SparseMixer), and `scores` where the softmax runs over all experts.
// `best_first`: no slot's logit is larger than the first's.
template <int kSlots>
__device__ __forceinline__ void score_chosen(const GateLaunch& launch, const SteeringRow& row,
                                             const RowScores& scores, bool best_first, Choice<kSlots>& c) {
  // The logits of empty slots are NaN, so their scores are 0.
  if (launch.args.spec.score != Score::kSoftmax) {
#pragma unroll
    for (int s = 0; s < kSlots; ++s) c.weights[s] = pointwise_score(launch.args.spec.score, c.logits[s]);
    return;
  }
  float largest = scores.largest, factor = scores.inverse;
  if (softmax_over_chosen(launch, row)) {
    factor = 1.0f;
    if (best_first) {
      largest = from_lane(c.logits[0], 0);
    } else {
      largest = -infinity();
#pragma unroll
      for (int s = 0; s < kSlots; ++s) largest = fmaxf(largest, c.logits[s]);
      largest = fold_max(largest);
    }
  }
#pragma unroll
  for (int s = 0; s < kSlots; ++s) c.weights[s] = softmax_numerator(c.logits[s], largest) * factor;
}

}  // namespace
}  // namespace moe_route::cuda
