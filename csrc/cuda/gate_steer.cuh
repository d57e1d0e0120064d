// Steering: from raw logits to z', and what the steering row of a token asks of selection and weighing. The
// twin of csrc/cpu/gate_steer.h. A neutral entry leaves its logit's bits alone, so entries are applied
// without looking whether a whole plane is neutral; where that decides more than bits, the row is looked
// through (`read_steering`).
#pragma once
#include "gate_layout.h"
#include "gate_score.cuh"

namespace moe_route::cuda {
namespace {

// What a token's steering row says; without a row: the neutral values. Packed, since it is alive as long as the
// row is.
struct SteeringRow {
  enum Flag : uint32_t {
    kSteered = 1,       // there is a row and it is not neutral
    kHasScoreBias = 2,  // some entry of the plane is not neutral
    kPulled = 4,        // some expert is on or off
    kForbids = 8,       // some expert is forbidden
    kLogSoftmax = 16,   // some expert is on or off the SteerMoE way
    kOther = 32,        // something else is not neutral
    kSampleStd = 64,
    kBiasWeighs = 128,
    kScaleAfter = 256,
  };
  int32_t index = -1;
  uint32_t flags = 0;
  int k = 0;
  float temperature = 1;

  __device__ __forceinline__ bool steered() const { return flags & kSteered; }
  __device__ __forceinline__ bool score_bias() const { return flags & kHasScoreBias; }
  __device__ __forceinline__ bool pulled() const { return flags & kPulled; }
  __device__ __forceinline__ bool forced() const { return flags & (kPulled | kForbids); }
  __device__ __forceinline__ bool log_softmax() const { return flags & kLogSoftmax; }
  __device__ __forceinline__ bool sample_std() const { return flags & kSampleStd; }
  __device__ __forceinline__ bool score_bias_weighs() const { return flags & kBiasWeighs; }
  __device__ __forceinline__ bool weight_scale_after() const { return flags & kScaleAfter; }
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

// The lane's elements of a row of E, absent ones (e >= E) the row's last: op(i, element).
// `kWhole`: there are none.
template <int kValues, bool kWhole = false, class T, class Op>
__device__ __forceinline__ void load_row(const T* row, int experts, Op op) {
  if constexpr (kValues > 0) {
    const int first = first_expert<kValues>(experts);
    T loaded[kValues];
    if (kWhole || experts == kLanes * kValues) {  // addresses a constant apart
#pragma unroll
      for (int i = 0; i < kValues; ++i) loaded[i] = __ldg(row + first + kStripes * i);
    } else {
#pragma unroll
      for (int i = 0; i < kValues; ++i) loaded[i] = __ldg(row + min(first + kStripes * i, experts - 1));
    }
#pragma unroll
    for (int i = 0; i < kValues; ++i) op(i, loaded[i]);
  } else {
    for_each_expert<0>(experts, [&](int i, int e) { op(i, __ldg(row + min(e, experts - 1))); });
  }
}

// Planes are there only with tables: where rows have parameters alone the launch has none (gate.cu).
__device__ __forceinline__ bool has(const GateLaunch& launch, uint32_t bit) {
  return (launch.args.steering.planes & bit) != 0;
}
__device__ __forceinline__ const float* row_of(const GateLaunch& launch, const SteeringRow& row) {
  return launch.args.steering.tables +
         uint64_t{static_cast<uint32_t>(row.index)} * static_cast<uint32_t>(launch.layout.steering_stride);
}
// A row's entries of a plane. Where planes lie in a row is worked out on the host: here it would be worked out
// ahead for every plane, and kept in registers.
__device__ __forceinline__ const float* plane_of(const GateLaunch& launch, const SteeringRow& row,
                                                 uint32_t bit) {
  return row_of(launch, row) + launch.layout.steering_plane[bit_index(bit)];
}
// The entry of a plane for one expert (of the chosen, say), the neutral value for tokens without a row.
__device__ __forceinline__ float entry(const GateLaunch& launch, const SteeringRow& row, uint32_t bit, int e,
                                       float neutral) {
  return row.index < 0 ? neutral : __ldg(plane_of(launch, row, bit) + e);
}

// The lane's entries of a plane: all are asked for at once, before anything waits for one of them. Where a lane
// has more than registers hold beside its values, each is loaded when it is used.
template <int kValues, bool kHeld = (kValues > 0 && kValues <= 8)>
struct Entries {
  float of_lane[kValues];
  __device__ __forceinline__ void load(const float* plane, int experts) {
    load_row<kValues>(plane, experts, [&](int i, float x) { of_lane[i] = x; });
  }
  // Of rows of whole lanes: from the lane's first entry.
  __device__ __forceinline__ void load_lane(const float* mine) {
#pragma unroll
    for (int i = 0; i < kValues; ++i) of_lane[i] = __ldg(mine + kStripes * i);
  }
  __device__ __forceinline__ float operator()(int i) const { return of_lane[i]; }
};
template <int kValues>
struct Entries<kValues, false> {
  const float* mine = nullptr;  // the lane's first entry
  int last = 0;                 // of the row, counted from there
  __device__ __forceinline__ void load(const float* plane, int experts) {
    const int first = first_expert<kValues>(experts);
    mine = plane + first, last = experts - 1 - first;
  }
  __device__ __forceinline__ void load_lane(const float* mine_) { mine = mine_, last = kStripes * kValues; }
  __device__ __forceinline__ float operator()(int i) const { return __ldg(mine + min(kStripes * i, last)); }
};
template <int kValues>
__device__ __forceinline__ Entries<kValues> entries(const GateLaunch& launch, const SteeringRow& row,
                                                    uint32_t bit) {
  Entries<kValues> plane;
  plane.load(plane_of(launch, row, bit), launch.args.experts);
  return plane;
}
__device__ __forceinline__ bool in_table(const GateLaunch& launch, int32_t steering_row) {
  return static_cast<uint32_t>(steering_row) < static_cast<uint32_t>(launch.layout.steering_rows);
}

__device__ __forceinline__ uint32_t flags_of_force(int code) {
  if (code == kForceNone) return 0;
  if (code == kForbid) return SteeringRow::kForbids;
  const bool log_softmax = code == kOnSteerMoE || code == kOffSteerMoE;
  return SteeringRow::kPulled | (log_softmax ? uint32_t{SteeringRow::kLogSoftmax} : 0u);
}

// What the row's entries say, as flags; `whole`: also whether anything else differs from neutral.
template <int kValues>
__device__ __forceinline__ uint32_t look_through(const GateLaunch& launch, const SteeringRow& row,
                                                 bool whole) {
  uint32_t found = 0;
  const auto look = [&](uint32_t bit, float neutral, auto finding) {
    if (!has(launch, bit)) return;
    const Entries<kValues> plane = entries<kValues>(launch, row, bit);
    for_each_expert<kValues>(launch.args.experts, [&](int i, int) {
      const float x = plane(i);
      found |= x != neutral ? finding(x) : 0;
    });
  };
  const auto other = [](float) { return uint32_t{SteeringRow::kOther}; };
  look(kScoreBias, 0.0f, [](float) { return uint32_t{SteeringRow::kHasScoreBias}; });
  look(kForce, 0.0f, [](float x) { return flags_of_force(force_code(x)); });
  if (whole) {
    look(kScale, 1.0f, other);
    look(kBias, 0.0f, other);
    look(kStd, 0.0f, other);
    look(kMagnitude, 0.0f, other);
    look(kWeightScale, 1.0f, other);
    if (launch.args.steering.remap != nullptr) {
      const int32_t* remap = launch.args.steering.remap + int64_t{row.index} * launch.args.experts;
      for_each_expert<kValues>(launch.args.experts, [&](int, int e) {
        if (e < launch.args.experts && __ldg(remap + e) != e) found |= SteeringRow::kOther;
      });
    }
  }
  return __reduce_or_sync(kWarp, found);
}

// The lane's entries of the planes of a row. Asked for as soon as the row is known, before anything waits.
template <int kValues>
struct Planes {
  Entries<kValues> scale, bias, deviations, magnitude;
  template <bool kWhole>
  __device__ __forceinline__ void load(const GateLaunch& launch, const SteeringRow& row) {
    if (launch.args.steering.planes == 0) return;  // the row has parameters alone
    const float* const lane_entries = kept(row_of(launch, row) + first_expert<kValues>(launch.args.experts));
    const auto load_plane = [&](Entries<kValues>& plane, uint32_t bit) {
      if (!has(launch, bit)) return;
      const int begin = launch.layout.steering_plane[bit_index(bit)];
      if constexpr (kWhole)
        plane.load_lane(lane_entries + begin);
      else
        plane = entries<kValues>(launch, row, bit);
    };
    load_plane(deviations, kStd);
    load_plane(bias, kBias);
    // Two in one branch: a short one would be turned into predicates, and issue loads of nothing.
    if (!has(launch, kScale | kMagnitude)) return;
    load_plane(scale, kScale);
    load_plane(magnitude, kMagnitude);
  }
};

// `kFull`: the launch may have planes that the last two say something of.
template <bool kFull>
__device__ __forceinline__ void read_row_params(const GateLaunch& launch, SteeringRow& row) {
  if (launch.args.steering.row_params == nullptr) return;
  const float* params = launch.args.steering.row_params + int64_t{row.index} * kRowParams;
  row.temperature = __ldg(params + kRowTemperature);
  const float k = __ldg(params + kRowTopK);
  if (k >= 1.0f && k < float(launch.args.k)) row.k = static_cast<int>(k);
  row.flags = __ldg(params + kRowStdCorrection) != 0.0f ? uint32_t{SteeringRow::kSampleStd} : 0u;
  if constexpr (!kFull) return;
  row.flags |= (__ldg(params + kRowScoreBiasWeighs) != 0.0f ? uint32_t{SteeringRow::kBiasWeighs} : 0u) |
               (__ldg(params + kRowWeightScaleAfter) != 0.0f ? uint32_t{SteeringRow::kScaleAfter} : 0u);
}

// `whole`: is it of consequence whether the row is neutral? `kFull`: the launch may have more than kSoftPlanes.
template <bool kFull, bool kWhole, int kValues>
__device__ __forceinline__ SteeringRow read_steering(const GateLaunch& launch, int32_t index, bool whole,
                                                     Planes<kValues>& planes) {
  SteeringRow row;
  row.k = launch.args.k;
  if (!in_table(launch, index)) return row;
  row.index = index;
  planes.template load<kWhole>(launch, row);
  read_row_params<kFull>(launch, row);
  uint32_t found = 0;
  if constexpr (kFull) {
    if (whole || has(launch, kScoreBias | kForce)) found = look_through<kValues>(launch, row, whole);
  }
  const bool neutral = kFull && whole && found == 0 && row.temperature == 1.0f && row.k == launch.args.k;
  row.flags |= found | (neutral ? 0u : uint32_t{SteeringRow::kSteered});
  return row;
}

// The finite numbers of a row, each passed through `scaled`: how many there are, and the sum of their squared
// distances from the mean.
struct Spread {
  int count;
  float squares;
};
template <int kValues, class Scaled>
__device__ __forceinline__ Spread spread_of(const Values<kValues>& z, int experts, Scaled scaled) {
  const auto finite = [&](int i) { return fabsf(z[i]) < infinity(); };
  int mine = 0;
  for_each_expert<kValues>(experts, [&](int i, int) { mine += finite(i) ? 1 : 0; });
  const int count = fold_add(mine);
  const OneSum sum = sum_over_experts<kValues, OneSum>(experts, [&](int i, OneSum so_far) {
    return OneSum{so_far.value + (finite(i) ? scaled(z[i]) : 0.0f)};
  });
  const float mean = sum.value / float(count > 0 ? count : 1);
  const OneSum squares = sum_over_experts<kValues, OneSum>(experts, [&](int i, OneSum so_far) {
    const float d = finite(i) ? scaled(z[i]) - mean : 0.0f;
    return OneSum{math::fma(d, d, so_far.value)};
  });
  return {count, squares.value};
}

// Over the numbers in z that are finite; 0 where there are too few.
template <int kValues>
__device__ __forceinline__ float deviation_of_finite(Values<kValues> z, int experts, bool sample) {
  constexpr float kShrink = 0x1p-96f;  // see csrc/cpu/gate_steer.h
  const Spread spread = spread_of<kValues>(z, experts, [](float x) { return x; });
  const int degrees = spread.count - (sample ? 1 : 0);
  const float divisor = float(degrees > 0 ? degrees : 1);
  float std = math::sqrt(spread.squares / divisor);
  if (!(spread.squares < infinity())) {  // huge logits
    const Spread shrunk = spread_of<kValues>(z, experts, [](float x) { return x * kShrink; });
    std = math::sqrt(shrunk.squares / divisor) / kShrink;
  }
  return spread.count == 0 || degrees == 0 ? 0.0f : std;
}

// Where all numbers are finite and none is huge, which the sum of squares shows, nothing has to be picked and
// counted.
// `kWhole`: every lane has all its values.
template <int kValues, bool kWhole>
__device__ __forceinline__ float standard_deviation(const Values<kValues>& z, int experts, bool sample) {
  const int places = kLanes * (kValues > 0 ? kValues : values_of_lane(experts));
  const int count = kWhole ? places : experts;
  if (!kWhole && experts < places) return deviation_of_finite<kValues>(z, experts, sample);
  const float mean =
      sum_over_experts<kValues, OneSum>(experts, [&](int i, OneSum sum) { return OneSum{sum.value + z[i]}; })
          .value /
      float(count);
  const float squares = sum_over_experts<kValues, OneSum>(experts, [&](int i, OneSum sum) {
                          const float d = z[i] - mean;
                          return OneSum{math::fma(d, d, sum.value)};
                        }).value;
  if (!(squares < infinity()) || count == 1) return deviation_of_finite<kValues>(z, experts, sample);
  return math::sqrt(squares / float(sample ? count - 1 : count));
}

// Natural extremes of the allowed experts. Of equal values (zeros of either sign) the CPU keeps the one in
// the lower vector, then in the lower stripe, so lane 0 decides.
struct Extremes {
  float max = 0;
  float min = 0;
  float log_sum_exp = 0;
};
template <int kValues>
__device__ __forceinline__ Extremes natural_extremes(const Values<kValues>& raw, int experts,
                                                     bool log_softmax) {
  Extremes r;
  float most = -infinity(), least = infinity();
  for_each_expert<kValues>(experts, [&](int i, int) {
    most = raw[i] > most ? raw[i] : most;
    least = raw[i] < least ? raw[i] : least;
  });
#pragma unroll
  for (int apart = kStripes; apart > 0; apart /= 2) {
    const float above = __shfl_xor_sync(kWarp, most, apart), below = __shfl_xor_sync(kWarp, least, apart);
    most = above > most ? above : most;
    least = below < least ? below : least;
  }
  r.max = from_lane(most, 0);
  r.min = from_lane(least, 0);
  if (!log_softmax) return r;
  const float largest = largest_of<kValues>(raw, experts);
  const float total = sum_over_experts<kValues, OneSum>(experts, [&](int i, OneSum sum) {
                        return OneSum{sum.value + softmax_numerator(raw[i], largest)};
                      }).value;
  const bool scored = total >= kSmallestNormal && total < infinity() && r.max < infinity();
  if (scored) r.log_sum_exp = r.max + math::log(total);
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

// Applies what every logit gets by itself, plane by plane: a launch asks once for each plane, not for each logit.
template <int kValues>
__device__ __forceinline__ void apply(const GateLaunch& launch, const SteeringRow& row,
                                      const Planes<kValues>& planes, float std, Values<kValues>& z) {
  constexpr int kAtOnce = kValues > 0 ? kValues : 1;  // in shared memory: one after the other
  const int values = kValues > 0 ? kValues : values_of_lane(launch.args.experts);
#pragma unroll
  for (int first = 0; first < values; first += kAtOnce) {
    float x[kAtOnce], raw[kAtOnce];
    const auto each = [&](auto op) {
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) x[j] = op(x[j], first + j, j);
    };
    each([&](float, int i, int j) { return raw[j] = z[i]; });
    if (has(launch, kScale)) each([&](float v, int i, int) { return v * planes.scale(i); });
    if (row.temperature != 1.0f) each([&](float v, int, int) { return v / row.temperature; });
    if (has(launch, kBias)) {
      each([&](float v, int i, int) {
        const float b = planes.bias(i);
        return b != 0.0f ? v + b : v;
      });
    }
    if (has(launch, kStd)) {
      each([&](float v, int i, int) {
        const float c = planes.deviations(i);
        return c != 0.0f ? math::fma(c, std, v) : v;
      });
    }
    if (has(launch, kMagnitude)) {
      each([&](float v, int i, int j) {
        const float m = planes.magnitude(i);
        return m != 0.0f ? math::fma(m, fabsf(raw[j]), v) : v;
      });
    }
    each([&](float v, int i, int) { return z[i] = v; });
  }
}

// z' in the place of the raw logits.
template <bool kFull, bool kWhole, int kValues>
__device__ __forceinline__ void steer(const GateLaunch& launch, const SteeringRow& row,
                                      const Planes<kValues>& planes, Values<kValues>& z) {
  const int experts = launch.args.experts;
  Entries<kValues> force;
  const bool forced = kFull && row.forced();
  if (forced) {
    force = entries<kValues>(launch, row, kForce);
    for_each_expert<kValues>(experts, [&](int i, int) {
      if (force_code(force(i)) == kForbid) z[i] = not_a_number();
    });
  }
  const float std =
      has(launch, kStd) ? standard_deviation<kValues, kWhole>(z, experts, row.sample_std()) : 0.0f;
  Extremes natural;
  if (kFull && row.pulled()) natural = natural_extremes<kValues>(z, experts, row.log_softmax());
  apply<kValues>(launch, row, planes, std, z);
  const bool any_number = natural.max >= natural.min;
  if (!kFull || !row.pulled() || !any_number) return;
  for_each_expert<kValues>(experts, [&](int i, int e) {
    if (e >= experts) return;
    float x = z[i];
    if (row.log_softmax()) x = x - natural.log_sum_exp;
    z[i] = forced_logit(force_code(force(i)), x, natural);
  });
}

}  // namespace
}  // namespace moe_route::cuda
