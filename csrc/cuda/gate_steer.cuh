// Steering: from raw logits to z', and what the steering row of a token asks of selection and weighing. The
// twin of csrc/cpu/gate_steer.h. A neutral entry leaves its logit's bits alone, so entries are applied
// without looking whether a whole plane is neutral; where that decides more than bits, the row is looked
// through (`read_steering`).
#pragma once
#include "gate_score.cuh"

namespace moe_route::cuda {
namespace {

// What a token's steering row says. Without a row: the neutral values.
struct SteeringRow {
  const float* tables = nullptr;   // the row's planes; null: no row
  const int32_t* remap = nullptr;  // [E]
  bool steered = false;            // there is a row and it is not neutral
  bool score_bias = false;         // some entry of the plane is not neutral
  bool forced = false;             // some expert is on, off or forbidden
  bool pulled = false;             // some expert is on or off
  bool log_softmax = false;        // ... the SteerMoE way
  bool sample_std = false;
  bool score_bias_weighs = false;
  bool weight_scale_after = false;
  int k = 0;
  float temperature = 1;
};

__device__ __forceinline__ int force_code(float x) {
  const bool code = x >= float(kForbid) && x <= float(kOnNatural);
  const int rounded = code ? static_cast<int>(x) : 0;
  return float(rounded) == x ? rounded : int(kForceNone);
}
// Classes of choice: 1 on, 0 free, -1 off, -2 forbidden.
__device__ __forceinline__ int class_of(int code) {
  return code == kForbid ? -2 : code > 0 ? 1 : code < 0 ? -1 : 0;
}

// The entry of a plane for expert e, the neutral value for tokens without a row. Past the last expert, where
// every value is NaN, it is the last one's: no branch keeps loads apart.
__device__ __forceinline__ float entry(const GateArgs& args, const SteeringRow& row, uint32_t bit, int e,
                                       float neutral) {
  if (row.tables == nullptr) return neutral;
  const int plane = __popc(args.steering.planes & (bit - 1));
  return __ldg(row.tables + plane * args.experts + min(e, args.experts - 1));
}
__device__ __forceinline__ bool has(const GateArgs& args, uint32_t bit) {
  return (args.steering.planes & bit) != 0;
}

__device__ __forceinline__ bool in_table(const GateArgs& args, int32_t steering_row) {
  return steering_row >= 0 && steering_row < args.steering.rows;
}

enum Finding : int {
  kFoundScoreBias = 1,
  kFoundPull = 2,
  kFoundForbid = 4,
  kFoundLogSoftmax = 8,
  kFoundOther = 16
};

__device__ __forceinline__ int finding_of_force(int code) {
  if (code == kForceNone) return 0;
  if (code == kForbid) return kFoundForbid;
  return kFoundPull | (code == kOnSteerMoE || code == kOffSteerMoE ? kFoundLogSoftmax : 0);
}

// Bits of Finding in the row; `whole`: also whether anything else differs from neutral.
template <int kVectors>
__device__ __forceinline__ int look_through(const GateArgs& args, const SteeringRow& row, bool whole) {
  int found = 0;
  const auto look = [&](uint32_t bit, float neutral, auto finding) {
    if (!has(args, bit)) return;
    for_each_expert<kVectors>(args.experts, [&](int, int e) {
      const float x = entry(args, row, bit, e, neutral);
      found |= x != neutral ? finding(x) : 0;
    });
  };
  const auto other = [](float) { return int(kFoundOther); };
  look(kScoreBias, 0.0f, [](float) { return int(kFoundScoreBias); });
  look(kForce, 0.0f, [](float x) { return finding_of_force(force_code(x)); });
  if (whole) {
    look(kScale, 1.0f, other);
    look(kBias, 0.0f, other);
    look(kStd, 0.0f, other);
    look(kMagnitude, 0.0f, other);
    look(kWeightScale, 1.0f, other);
    for_each_expert<kVectors>(args.experts, [&](int, int e) {
      if (row.remap != nullptr && e < args.experts && __ldg(row.remap + e) != e) found |= kFoundOther;
    });
  }
  return fold_or(found);
}

// `whole`: is it of consequence whether the row is neutral?
template <int kVectors>
__device__ __forceinline__ SteeringRow read_steering(const GateArgs& args, int32_t index, bool whole) {
  const GateSteering& steering = args.steering;
  SteeringRow row;
  row.k = args.k;
  if (in_table(args, index)) {
    if (steering.tables != nullptr)
      row.tables = steering.tables + int64_t{index} * __popc(steering.planes) * args.experts;
    if (steering.remap != nullptr) row.remap = steering.remap + int64_t{index} * args.experts;
    if (steering.row_params != nullptr) {
      const float* params = steering.row_params + int64_t{index} * kRowParams;
      row.temperature = __ldg(params + kRowTemperature);
      const float k = __ldg(params + kRowTopK);
      if (k >= 1.0f && k < float(args.k)) row.k = static_cast<int>(k);
      row.sample_std = __ldg(params + kRowStdCorrection) != 0.0f;
      row.score_bias_weighs = __ldg(params + kRowScoreBiasWeighs) != 0.0f;
      row.weight_scale_after = __ldg(params + kRowWeightScaleAfter) != 0.0f;
    }
    row.steered = true;
  }
  if (!whole && !has(args, kScoreBias) && !has(args, kForce)) return row;
  const int found = look_through<kVectors>(args, row, whole);
  row.score_bias = found & kFoundScoreBias;
  row.pulled = found & kFoundPull;
  row.forced = found & (kFoundPull | kFoundForbid);
  row.log_softmax = found & kFoundLogSoftmax;
  if (whole && found == 0 && row.temperature == 1.0f && row.k == args.k) row.steered = false;
  return row;
}

// The finite numbers of a row, each passed through `scaled`: how many there are, and the sum of their squared
// distances from the mean.
struct Spread {
  int count;
  float squares;
};
template <int kVectors, class Scaled>
__device__ __forceinline__ Spread spread_of(const Values<kVectors>& z, int experts, Scaled scaled) {
  float sum = 0, squares = 0;
  int mine = 0;
  for_each_expert<kVectors>(experts, [&](int i, int) {
    const bool finite = fabsf(z[i]) < infinity();
    sum = sum + (finite ? scaled(z[i]) : 0.0f);
    mine += finite ? 1 : 0;
  });
  const int count = fold_add(mine);
  const float mean = fold_add(sum) / float(count > 0 ? count : 1);
  for_each_expert<kVectors>(experts, [&](int i, int) {
    const float d = fabsf(z[i]) < infinity() ? scaled(z[i]) - mean : 0.0f;
    squares = math::fma(d, d, squares);
  });
  return {count, fold_add(squares)};
}

// Over the numbers in z that are finite; 0 where there are too few.
template <int kVectors>
__device__ __forceinline__ float standard_deviation(const Values<kVectors>& z, int experts, bool sample) {
  constexpr float kShrink = 0x1p-96f;  // see csrc/cpu/gate_steer.h
  const Spread spread = spread_of<kVectors>(z, experts, [](float x) { return x; });
  const int degrees = spread.count - (sample ? 1 : 0);
  const float divisor = float(degrees > 0 ? degrees : 1);
  float std = math::sqrt(spread.squares / divisor);
  const bool overflowed = !(spread.squares < infinity());
  if (any(overflowed)) {  // huge logits in one of the warp's rows
    const Spread shrunk = spread_of<kVectors>(z, experts, [](float x) { return x * kShrink; });
    if (overflowed) std = math::sqrt(shrunk.squares / divisor) / kShrink;
  }
  return spread.count == 0 || degrees == 0 ? 0.0f : std;
}

// Natural extremes of the allowed experts. Of equal values (zeros of either sign) the CPU keeps the one in
// the lower lane, so lane 0 decides.
struct Extremes {
  float max = 0;
  float min = 0;
  float log_sum_exp = 0;
};
template <int kVectors>
__device__ __forceinline__ Extremes natural_extremes(const Values<kVectors>& raw, int experts,
                                                     bool log_softmax) {
  Extremes r;
  float most = -infinity(), least = infinity();
  for_each_expert<kVectors>(experts, [&](int i, int) {
    most = raw[i] > most ? raw[i] : most;
    least = raw[i] < least ? raw[i] : least;
  });
  r.max = from_lane(fold(most, [](float a, float b) { return b > a ? b : a; }), 0);
  r.min = from_lane(fold(least, [](float a, float b) { return b < a ? b : a; }), 0);
  if (!any(log_softmax)) return r;
  const float largest = largest_of<kVectors>(raw, experts);
  float sum = 0;
  for_each_expert<kVectors>(experts, [&](int i, int) { sum = sum + softmax_numerator(raw[i], largest); });
  const float total = fold_add(sum);
  const bool scored = total >= kSmallestNormal && total < infinity() && r.max < infinity();
  if (log_softmax && scored) r.log_sum_exp = r.max + math::log(total);
  return r;
}

__device__ __forceinline__ float forced_logit(int code, float z, const Extremes& natural) {
  const float max = natural.max - natural.log_sum_exp, min = natural.min - natural.log_sum_exp;
  switch (code) {
    case kOnPaper:
      return max;
    case kOnSteerMoE:
      return max + 0.01f;
    case kOffPaper:
      return min;
    case kOffSteerMoE:
      return min - 0.01f;
    default:
      return z;
  }
}

// z' in the place of the raw logits.
template <int kVectors>
__device__ __forceinline__ void steer(const GateArgs& args, const SteeringRow& row, Values<kVectors>& z) {
  const int experts = args.experts;
  if (any(row.forced)) {
    for_each_expert<kVectors>(experts, [&](int i, int e) {
      if (row.forced && force_code(entry(args, row, kForce, e, 0.0f)) == kForbid) z[i] = not_a_number();
    });
  }
  const float std = has(args, kStd) ? standard_deviation<kVectors>(z, experts, row.sample_std) : 0.0f;
  Extremes natural;
  const bool pulls = any(row.pulled);
  if (pulls) natural = natural_extremes<kVectors>(z, experts, row.log_softmax);
  const bool pulled = row.pulled && natural.max >= natural.min;  // else there is not one number in the row
  const bool tempered = any(row.temperature != 1.0f);
  for_each_expert<kVectors>(experts, [&](int i, int e) {
    const float raw = z[i];
    float x = raw;
    if (has(args, kScale)) x = x * entry(args, row, kScale, e, 1.0f);
    if (tempered && row.temperature != 1.0f) x = x / row.temperature;
    if (has(args, kBias)) {
      const float b = entry(args, row, kBias, e, 0.0f);
      x = b != 0.0f ? x + b : x;
    }
    if (has(args, kStd)) {
      const float c = entry(args, row, kStd, e, 0.0f);
      x = c != 0.0f ? math::fma(c, std, x) : x;
    }
    if (has(args, kMagnitude)) {
      const float m = entry(args, row, kMagnitude, e, 0.0f);
      x = m != 0.0f ? math::fma(m, fabsf(raw), x) : x;
    }
    if (pulls && pulled && e < experts) {
      if (row.log_softmax) x = x - natural.log_sum_exp;
      x = forced_logit(force_code(entry(args, row, kForce, e, 0.0f)), x, natural);
    }
    z[i] = x;
  });
}

}  // namespace
}  // namespace moe_route::cuda
