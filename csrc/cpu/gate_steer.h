// Steering: from raw logits to z', and what the current steering row asks of selection and weighing.
//
// Contract: an entry with its neutral value leaves its logit's bits alone, whatever std or the logit is; a
// neutral row is no steering. A forbidden expert's logit is NaN from here on. Deterministic, O(planes * E /
// 16) a token; a row's tables are looked through once and remembered (gate_row.h).
#pragma once
#include "gate_score.h"

namespace moe_route::cpu {
namespace {

template <class F>
struct SteeringRow {
  using T = typename F::Scalar;
  int64_t index = -1;
  bool neutral = true;
  bool log_softmax = false;  // some expert is forced the SteerMoE way
  bool sample_std = false;
  bool score_bias_weighs = false;
  bool weight_scale_after = false;
  bool moves_logits = false;  // z' may differ from z
  int k = 0;
  T temperature = 1;
  // Rows of the planes; null where absent or neutral throughout.
  const float* scale = nullptr;
  const float* bias = nullptr;
  const float* std = nullptr;
  const float* magnitude = nullptr;
  const float* score_bias = nullptr;
  const float* weight_scale = nullptr;
  const int32_t* remap = nullptr;
  // Experts under force, in rising index: on, off, forbidden.
  const int8_t* force = nullptr;  // their codes, [E]; null where there is none
  const float* free = nullptr;    // 0 at experts that are neither forced on nor off, NaN at the others, [E]
  const int32_t* on = nullptr;
  const int32_t* off = nullptr;
  const int32_t* forbidden = nullptr;
  int on_count = 0;
  int off_count = 0;
  int forbidden_count = 0;
};

// Where the force codes and lists of a steering row are kept.
struct ForceStore {
  int8_t* codes = nullptr;
  float* free = nullptr;
  int32_t* lists[3] = {};
  ForceStore() = default;
  ForceStore(Arena& arena, const GateArgs& args) {
    if (!(args.steering.planes & kForce)) return;
    const size_t experts = size_t(args.experts);
    codes = arena.take<int8_t>(experts), free = arena.take<float>(experts);
    for (int32_t*& list : lists) list = arena.take<int32_t>(experts);
  }
};

inline bool differs(const float* row, int experts, float neutral) {
  bool any = false;
  for (int e = 0; e < experts; ++e) any |= row[e] != neutral;
  return any;
}

inline int8_t force_code(float x) {
  const bool code = x >= float(kForbid) && x <= float(kOnNatural);
  const int8_t rounded = code ? static_cast<int8_t>(x) : int8_t{0};
  return float(rounded) == x ? rounded : int8_t{kForceNone};
}

template <class F>
inline void read_force(const float* codes, int experts, const ForceStore& store, SteeringRow<F>& row) {
  for (int e = 0; e < experts; ++e) {
    const int8_t code = force_code(codes[e]);
    store.codes[e] = code;
    store.free[e] = code == kForceNone || code == kForbid ? 0.0f : not_a_number<float>();
    if (code > 0) store.lists[0][row.on_count++] = e;
    if (code < 0 && code != kForbid) store.lists[1][row.off_count++] = e;
    if (code == kForbid) store.lists[2][row.forbidden_count++] = e;
    row.log_softmax |= code == kOnSteerMoE || code == kOffSteerMoE;
  }
  if (row.on_count + row.off_count + row.forbidden_count == 0) return;
  row.force = store.codes, row.free = store.free;
  row.on = store.lists[0], row.off = store.lists[1], row.forbidden = store.lists[2];
}

template <class F>
inline void read_row_params(const float* params, int k, SteeringRow<F>& row) {
  row.temperature = params[kRowTemperature];
  if (params[kRowTopK] >= 1.0f && params[kRowTopK] < float(k)) row.k = static_cast<int>(params[kRowTopK]);
  row.sample_std = params[kRowStdCorrection] != 0.0f;
  row.score_bias_weighs = params[kRowScoreBiasWeighs] != 0.0f;
  row.weight_scale_after = params[kRowWeightScaleAfter] != 0.0f;
}

inline bool is_identity(const int32_t* remap, int experts) {
  bool same = true;
  for (int e = 0; e < experts; ++e) same &= remap[e] == e;
  return same;
}

template <class F>
inline SteeringRow<F> read_steering_row(const GateArgs& args, int64_t index, const ForceStore& force) {
  const GateSteering& s = args.steering;
  const int experts = args.experts;
  SteeringRow<F> row;
  row.index = index;
  row.k = args.k;
  if (index < 0 || index >= s.rows) return row;
  const float* next = s.tables + index * __builtin_popcount(s.planes) * int64_t{experts};
  const auto plane = [&](SteeringPlane bit, float neutral) -> const float* {
    if (s.tables == nullptr || !(s.planes & bit)) return nullptr;
    const float* here = next;
    next += experts;
    return differs(here, experts, neutral) ? here : nullptr;
  };
  row.scale = plane(kScale, 1.0f);
  row.bias = plane(kBias, 0.0f);
  row.std = plane(kStd, 0.0f);
  row.magnitude = plane(kMagnitude, 0.0f);
  row.score_bias = plane(kScoreBias, 0.0f);
  row.weight_scale = plane(kWeightScale, 1.0f);
  if (const float* codes = plane(kForce, 0.0f)) read_force(codes, experts, force, row);
  if (s.row_params != nullptr) read_row_params(s.row_params + index * kRowParams, args.k, row);
  if (s.remap != nullptr && !is_identity(s.remap + index * experts, experts))
    row.remap = s.remap + index * experts;
  row.moves_logits = row.scale || row.bias || row.std || row.magnitude || row.force ||
                     row.temperature != decltype(row.temperature)(1);
  row.neutral = !row.moves_logits && !row.score_bias && !row.weight_scale && !row.remap && row.k == args.k;
  return row;
}

// The finite numbers of a row, each passed through `scaled`: how many there are, and the sum of their squared
// distances from the mean.
template <class T>
struct Spread {
  int count;
  T squares;
};
template <class F, class Scaled>
inline Spread<typename F::Scalar> spread_of(const typename F::Scalar* z, int end, Scaled scaled) {
  using T = typename F::Scalar;
  const F limit(infinity<T>()), zero(T(0));
  F sum = zero;
  int count = 0;
  for (int e = 0; e < end; e += kLanes) {
    const F x = F::load(z + e);
    const auto finite = abs(x) < limit;
    sum = sum + select(finite, scaled(x), zero);
    count += __builtin_popcount(bits(finite));
  }
  const F mean(fold_add(sum) / T(count > 0 ? count : 1));
  F squares = zero;
  for (int e = 0; e < end; e += kLanes) {
    const F x = F::load(z + e);
    const F d = select(abs(x) < limit, scaled(x) - mean, zero);
    squares = fma(d, d, squares);
  }
  return {count, fold_add(squares)};
}

// A power of two that brings the squares of all numbers into range, and their sums over all experts.
template <class T>
inline constexpr T kShrink = sizeof(T) == 4 ? T(0x1p-96) : T(0x1p-600);

// Over the numbers in z that are finite; 0 where there are too few.
template <class F>
inline typename F::Scalar standard_deviation(const typename F::Scalar* z, int experts, bool sample) {
  using T = typename F::Scalar;
  const int end = kLanes * vectors_of(experts);
  const auto [count, squares] = spread_of<F>(z, end, [](F x) { return x; });
  const int degrees = count - (sample ? 1 : 0);
  if (count == 0 || degrees == 0) return T(0);
  if (squares < infinity<T>()) return sqrt(squares / T(degrees));
  const F factor(kShrink<T>);  // huge logits
  return sqrt(spread_of<F>(z, end, [factor](F x) { return x * factor; }).squares / T(degrees)) / kShrink<T>;
}

// to[e] = op(from[e], e), a vector at a time; from and to may be the same row.
template <class F, class T, class Op>
inline void map_row(const T* from, int experts, T* to, Op op) {
  for (int e = 0; e < experts; e += kLanes) op(F::load(from + e), e).store(to + e);
}

// One pass per plane in use; most plans use one.
template <class F>
inline void apply_planes(const SteeringRow<F>& row, const typename F::Scalar* raw, int experts,
                         typename F::Scalar deviation, typename F::Scalar* steered) {
  using T = typename F::Scalar;
  const F zero(T(0));
  const auto entry = [experts](const float* plane, int e) { return load_vector<F>(plane, e, experts); };
  const T* z = raw;
  const auto pass = [&](auto op) {
    map_row<F>(z, experts, steered, op);
    z = steered;
  };
  if (row.scale) pass([&](F x, int e) { return x * entry(row.scale, e); });
  if (row.temperature != T(1)) pass([t = F(row.temperature)](F x, int) { return x / t; });
  if (row.bias) {
    pass([&](F x, int e) {
      const F b = entry(row.bias, e);
      return select(b != zero, x + b, x);
    });
  }
  if (row.std) {
    pass([&, std = F(deviation)](F x, int e) {
      const F c = entry(row.std, e);
      return select(c != zero, fma(c, std, x), x);
    });
  }
  if (row.magnitude) {
    pass([&](F x, int e) {
      const F m = entry(row.magnitude, e);
      return select(m != zero, fma(m, abs(F::load(raw + e)), x), x);
    });
  }
  if (z == raw) pass([](F x, int) { return x; });
}

// Forced logits, from the natural extremes of `raw` (NaN at forbidden experts).
template <class F>
inline void apply_force(const Workspace<F>& w, const SteeringRow<F>& row, const typename F::Scalar* raw,
                        int experts, typename F::Scalar* steered) {
  using T = typename F::Scalar;
  F most(-infinity<T>()), least(infinity<T>());
  for (int e = 0; e < experts; e += kLanes) {
    most = larger(F::load(raw + e), most);
    least = smaller(F::load(raw + e), least);
  }
  T max = fold_max(most), min = fold_min(least);
  if (max < min) return;  // not one number in the row
  if (row.log_softmax) {
    const RowScores<T> scores = score_all<F>(w, Score::kSoftmax, raw, experts, false);
    const T log_sum_exp = scores.scored && max < infinity<T>() ? max + log(scores.total) : T(0);
    map_row<F>(steered, experts, steered, [shift = F(log_sum_exp)](F x, int) { return x - shift; });
    max -= log_sum_exp, min -= log_sum_exp;
  }
  for (int i = 0; i < row.on_count; ++i) {
    const int e = row.on[i];
    if (row.force[e] == kOnPaper) steered[e] = max;
    if (row.force[e] == kOnSteerMoE) steered[e] = max + T(0.01);
  }
  for (int i = 0; i < row.off_count; ++i) {
    const int e = row.off[i];
    if (row.force[e] == kOffPaper) steered[e] = min;
    if (row.force[e] == kOffSteerMoE) steered[e] = min - T(0.01);
  }
}

// Raw logits with NaN at forbidden experts.
template <class F>
inline const typename F::Scalar* forbid(const Workspace<F>& w, const SteeringRow<F>& row,
                                        const typename F::Scalar* raw, int experts) {
  if (row.forbidden_count == 0) return raw;
  if (raw != w.raw) map_row<F>(raw, experts, w.raw, [](F x, int) { return x; });
  for (int i = 0; i < row.forbidden_count; ++i) w.raw[row.forbidden[i]] = not_a_number<typename F::Scalar>();
  return w.raw;
}

// z' of one row into Workspace::steered. deviation: the standard deviation of `raw`, where the row asks for it.
template <class F>
inline const typename F::Scalar* steer(const Workspace<F>& w, const SteeringRow<F>& row,
                                       const typename F::Scalar* raw, int experts,
                                       typename F::Scalar deviation) {
  apply_planes(row, raw, experts, deviation, w.steered);
  if (row.on_count + row.off_count > 0) apply_force(w, row, raw, experts, w.steered);
  return w.steered;
}

}  // namespace
}  // namespace moe_route::cpu
