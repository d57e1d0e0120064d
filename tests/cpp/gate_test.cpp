// The gate against a brute-force oracle in double, every instruction set against portable bit for bit, and
// the hard cases by name. No framework: prints the sets and "N passed, N failed", and returns 1 on failure. An
// argument multiplies the number of random problems.
#include "moe_route/gate.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <limits>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "gate_backend.h"
#include "moe_route/math.h"

using namespace moe_route;

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr double kUnit = 0x1p-32;

int passed = 0, failed = 0;
std::string context;

bool check(bool holds, const std::string& what) {
  if (holds) {
    ++passed;
  } else if (++failed <= 30) {
    std::printf("FAILED %s [%s]\n", what.c_str(), context.c_str());
  }
  return holds;
}

bool near(double got, double expected, double relative, double absolute) {
  if (std::isnan(expected)) return std::isnan(got);
  if (std::isinf(expected)) return got == expected;
  return std::abs(got - expected) <= absolute + relative * std::abs(expected);
}

// ---- problems -----------------------------------------------------------------------------------

using Random = std::mt19937_64;
int below(Random& g, int n) { return int(g() % uint64_t(n)); }
bool one_in(Random& g, int n) { return below(g, n) == 0; }
float normal(Random& g) { return std::normal_distribution<float>()(g); }

uint16_t to_bfloat16(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  if (std::isnan(x)) return 0x7fc0;
  return uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
float from_bfloat16(uint16_t h) {
  const uint32_t u = uint32_t{h} << 16;
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}
float from_float16(uint16_t h) {
  const int exponent = h >> 10 & 31, mantissa = h & 1023;
  const double sign = h >> 15 ? -1 : 1;
  if (exponent == 31) return mantissa ? kNaN : float(sign * INFINITY);
  return float(sign * (exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24)));
}
uint16_t to_float16(float x) {  // towards zero: a test only needs valid halves
  if (std::isnan(x)) return 0x7e00;
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  x = std::abs(x);
  if (x > 65504) return uint16_t(sign | (std::isinf(x) ? 0x7c00 : 0x7bff));
  if (x < 0x1p-14f) return uint16_t(sign | uint16_t(x * 0x1p+24f));
  const int e = std::ilogb(x);
  return uint16_t(sign | (e + 15) << 10 | (int(std::ldexp(x, 10 - e)) - 1024));
}

// A gate call with all its storage.
struct Problem {
  GateArgs args;
  std::vector<float> logits;  // what the gate should see, [T, E]
  std::vector<float> stored_float;
  std::vector<double> stored_double;
  std::vector<uint16_t> stored_half;
  std::vector<float> correction, expert_scale, tables, row_params, given_weights;
  std::vector<int32_t> remap, tokens, given_ids;
  std::vector<int64_t> given_ids64;
};

int64_t table_width(const GateArgs& a) {
  return kStatScalars + int64_t{__builtin_popcount(a.statistics.planes)} * a.experts;
}

struct Result {
  std::vector<float> weights;
  std::vector<double> weights64;
  std::vector<int32_t> ids;
  std::vector<int64_t> groups, segments;
  bool operator==(const Result& o) const {
    return std::equal(weights.begin(), weights.end(), o.weights.begin(),
                      [](float a, float b) {
                        return std::memcmp(&a, &b, 4) == 0 || (std::isnan(a) && std::isnan(b));
                      }) &&
           ids == o.ids && groups == o.groups && segments == o.segments;
  }
  double weight(size_t i) const { return weights64.empty() ? weights[i] : weights64[i]; }
};

// Runs rows in `pieces` calls, so that results must not depend on the split.
Result run(const Problem& p, cpu::InstructionSet set, int pieces = 1, bool counting_only = false) {
  cpu::set_instruction_set(set);
  GateArgs a = p.args;
  Result r;
  const size_t slots = size_t(a.tokens * a.k);
  r.weights.assign(slots, -7.0f);
  r.ids.assign(slots, -7);
  r.groups.assign(size_t(a.statistics.num_groups * table_width(a)), 0);
  r.segments.assign(size_t(a.statistics.num_segments * table_width(a)), 0);
  a.weights = r.weights.data();
  if (a.logits_type == DType::kFloat64) {
    r.weights64.assign(slots, -7.0);
    a.weights = r.weights64.data();
  }
  a.ids = r.ids.data();
  if (counting_only) a.weights = nullptr, a.ids = nullptr;
  if (a.statistics.num_groups > 0) a.statistics.groups = r.groups.data();
  if (a.statistics.num_segments > 0) a.statistics.segments = r.segments.data();
  for (int i = 0; i < pieces; ++i) cpu::gate_rows(a, a.tokens * i / pieces, a.tokens * (i + 1) / pieces);
  return r;
}

void store_logits(Problem& p, DType type, int64_t stride) {
  GateArgs& a = p.args;
  a.logits_type = type;
  a.row_stride = stride;
  // Exactly as long as it must be: a read past the last row is an error that sanitizers see.
  const size_t size = a.tokens > 0 ? size_t((a.tokens - 1) * stride + a.experts) : 0;
  p.stored_float.clear(), p.stored_double.clear(), p.stored_half.clear();
  for (int64_t t = 0; t < a.tokens; ++t) {
    for (int e = 0; e < a.experts; ++e) {
      float& x = p.logits[size_t(t * a.experts + e)];
      const size_t at = size_t(t * stride + e);
      if (type == DType::kFloat32) p.stored_float.resize(size, kNaN), p.stored_float[at] = x;
      if (type == DType::kFloat64) p.stored_double.resize(size, NAN), p.stored_double[at] = x;
      if (type == DType::kBFloat16)
        p.stored_half.resize(size, 0x7fff), x = from_bfloat16(p.stored_half[at] = to_bfloat16(x));
      if (type == DType::kFloat16)
        p.stored_half.resize(size, 0x7fff), x = from_float16(p.stored_half[at] = to_float16(x));
    }
  }
  a.logits = p.stored_half.data();
  if (type == DType::kFloat32) a.logits = p.stored_float.data();
  if (type == DType::kFloat64) a.logits = p.stored_double.data();
}

void add_strange_logits(Problem& p, Random& g) {
  const float strange[] = {kNaN, kInf, -kInf, 0.0f, -0.0f, 1e30f, -1e30f, 200.0f, -200.0f};
  for (int64_t t = 0; t < p.args.tokens; ++t) {
    if (!one_in(g, 3)) continue;
    float* row = p.logits.data() + t * p.args.experts;
    const int kind = below(g, 4), rate = 1 + below(g, 8);
    const float fixed = strange[below(g, 9)];
    for (int e = 0; e < p.args.experts; ++e) {
      if (kind == 0) row[e] = fixed;
      if (kind == 1 && one_in(g, rate)) row[e] = fixed;
      if (kind == 2 && one_in(g, rate)) row[e] = strange[below(g, 9)];
      if (kind == 3) row[e] = float(below(g, 1 + rate)) - 2;
    }
  }
}

void add_steering(Problem& p, Random& g, bool tame) {
  GateArgs& a = p.args;
  GateSteering& s = a.steering;
  s.rows = 1 + below(g, one_in(g, 4) ? 20 : 4);
  s.planes = uint32_t(below(g, 128));
  if (one_in(g, 3)) s.planes = uint32_t(kBias | kForce);
  const size_t experts = size_t(a.experts);
  const float wild[] = {kInf, -kInf, kNaN, 1e9f, -1e9f, std::numeric_limits<float>::max()};
  for (int64_t row = 0; row < s.rows; ++row) {
    const bool null_row = one_in(g, 4);
    for (uint32_t bit = 1; bit <= kForce; bit <<= 1) {
      if (!(s.planes & bit)) continue;
      const int rate = 1 + below(g, 6);
      for (size_t e = 0; e < experts; ++e) {
        const bool neutral = null_row || !one_in(g, rate);
        float x = bit == kForce                          ? float(below(g, 8) - 4)
                  : bit == kScale || bit == kWeightScale ? std::abs(normal(g))
                                                         : normal(g);
        if (!tame && bit != kForce && one_in(g, 10)) x = wild[below(g, 6)];
        p.tables.push_back(!neutral ? x : bit == kScale || bit == kWeightScale ? 1.0f : 0.0f);
      }
    }
    const bool neutral = null_row || one_in(g, 2);
    const float params[kRowParams] = {neutral ? 1.0f : 0.25f + std::abs(normal(g)),
                                      neutral ? 0.0f : float(below(g, a.k + 1)), float(below(g, 2)),
                                      float(below(g, 2)), float(below(g, 2))};
    p.row_params.insert(p.row_params.end(), params, params + kRowParams);
    for (int e = 0; e < a.experts; ++e)
      p.remap.push_back(neutral || !one_in(g, 3) ? e : below(g, a.experts + 2) - 1);
  }
  s.tables = s.planes ? p.tables.data() : nullptr;
  if (one_in(g, 2)) s.row_params = p.row_params.data();
  if (one_in(g, 3)) s.remap = p.remap.data();
}

void add_given(Problem& p, Random& g) {
  GateArgs& a = p.args;
  a.given.mode = GivenMode(1 + below(g, 3));
  std::vector<int32_t> order(size_t(a.experts));
  std::iota(order.begin(), order.end(), 0);
  for (int64_t t = 0; t < a.tokens; ++t) {
    std::shuffle(order.begin(), order.end(), g);
    const bool none = one_in(g, 4);
    for (int j = 0; j < a.k; ++j) {
      int32_t id = none ? -1 : order[size_t(j)];
      if (!none && j > 0 && one_in(g, 8)) id = one_in(g, 2) ? -1 : a.experts + below(g, 3);
      p.given_ids.push_back(id);
      p.given_ids64.push_back(id);
      p.given_weights.push_back(from_bfloat16(to_bfloat16(normal(g))));
    }
  }
  const bool wide = one_in(g, 2);
  a.given.ids_type = wide ? DType::kInt64 : DType::kInt32;
  a.given.ids = wide ? static_cast<const void*>(p.given_ids64.data()) : p.given_ids.data();
  if (one_in(g, 2)) a.given.weights = p.given_weights.data();
}

void add_spec(Problem& p, Random& g) {
  GateArgs& a = p.args;
  GateSpec& s = a.spec;
  s.score = Score(below(g, 5));
  s.order = Order(below(g, 2));
  s.renormalize = Renormalize(below(g, 4));
  const float norms[] = {1.0f, 2.0f, 3.0f, 0.5f, kInf};
  s.norm_p = norms[below(g, 5)];
  if (one_in(g, 2)) s.eps = 1e-6f;
  if (one_in(g, 3)) s.scale = 2.5f;
  s.jitter = 0.01f * float(below(g, 20));
  if (one_in(g, 3)) {
    std::vector<int> divisors;
    for (int d = 2; d <= a.experts; ++d) {
      if (a.experts % d == 0) divisors.push_back(d);
    }
    if (!divisors.empty()) s.groups = divisors[size_t(below(g, int(divisors.size())))];
    s.top_groups = 1 + below(g, s.groups);
    s.group_score = GroupScore(below(g, 2));
    s.group_fill = one_in(g, 2) ? 0.0f : -kInf;
  }
  for (int e = 0; e < a.experts; ++e) {
    p.correction.push_back(0.3f * normal(g));
    p.expert_scale.push_back(1.0f + 0.2f * normal(g));
  }
  if (one_in(g, 3)) a.correction_bias = p.correction.data();
  if (one_in(g, 4)) a.expert_scale = p.expert_scale.data();
}

void add_tokens(Problem& p, Random& g) {
  GateArgs& a = p.args;
  int32_t row = 0, group = 0, segment = 0;
  for (int64_t t = 0; t < a.tokens; ++t) {
    if (one_in(g, 3)) row = below(g, int(a.steering.rows) + 2) - 1;
    if (one_in(g, 4)) group = below(g, int(a.statistics.num_groups) + 2) - 1;
    if (one_in(g, 4)) segment = below(g, int(a.statistics.num_segments) + 2) - 1;
    const int32_t token[] = {row, group, segment, one_in(g, 8) ? 0 : 1};
    p.tokens.insert(p.tokens.end(), token, token + kTokenColumns);
  }
  a.token_table = p.tokens.data();
}

struct Shape {
  int experts, k;
};

Shape random_shape(Random& g) {
  const int usual[] = {1, 2, 6, 8, 16, 32, 60, 64, 67, 72, 128, 128, 160, 256, 257, 384, 512, 896, 1536};
  const int experts = one_in(g, 2) ? usual[below(g, 19)] : 1 + below(g, 200);
  const int ks[] = {1, 2, 4, 6, 8, 8, 10, 12, 16, 22, 33, 64, experts, experts - 1};
  return {experts, std::clamp(ks[below(g, 14)], 1, std::min(experts, 64))};
}

// Everything on and off at random. `tame` leaves out what no tolerance can compare: infinite and giant
// entries of steering tables, steering of strange logits, saturated scores under group limits.
void random_problem(Problem& p, Random& g, bool tame) {
  const Shape shape = random_shape(g);
  GateArgs& a = p.args;
  a.experts = shape.experts, a.k = shape.k;
  a.tokens = 1 + below(g, 24);
  add_spec(p, g);
  const float spread = one_in(g, 4) && !(tame && a.spec.groups > 1) ? 30.0f : 2.0f;
  for (int64_t i = 0; i < a.tokens * a.experts; ++i) p.logits.push_back(spread * normal(g));
  const bool strange = one_in(g, 2) && !(tame && a.spec.groups > 1);
  if (strange) add_strange_logits(p, g);
  const DType types[] = {DType::kFloat32, DType::kFloat32, DType::kBFloat16, DType::kFloat16};
  store_logits(p, types[below(g, 4)], a.experts + (one_in(g, 2) ? 0 : below(g, 40)));
  a.statistics.num_groups = below(g, 4);
  a.statistics.num_segments = below(g, 4);
  a.statistics.planes = uint32_t(below(g, 32));
  a.statistics.entropy = one_in(g, 2);
  if (one_in(g, 2) && !(tame && strange)) add_steering(p, g, tame);
  if (one_in(g, 4)) add_given(p, g);
  if (!one_in(g, 4)) add_tokens(p, g);
  if (one_in(g, 6)) a.spec.softcap = one_in(g, 2) ? 3.0f : 0.75f;
}

// ---- oracle -------------------------------------------------------------------------------------

struct OracleRow {
  bool valid = true, steered = false, replay = false, given = false;
  int slots = 0;
  std::vector<double> z, score, value;  // [E]
  std::vector<int> force;               // [E] codes, 0 where none
  std::vector<int> ids;                 // best first
  const float* plane[7] = {};
  const float* params = nullptr;
  const int32_t* remap = nullptr;
};

// exp underflows below 2^-126 in float32, and with it scores that are nothing but exp.
double oracle_pointwise(const GateArgs& a, double z) {
  const Score score = a.spec.score;
  if (std::isnan(z)) return 0;
  if (z < -87.33 && score != Score::kIdentity && a.logits_type != DType::kFloat64) return 0;
  if (score == Score::kSigmoid) return 1 / (1 + std::exp(-z));
  if (score == Score::kSqrtSoftplus)
    return std::sqrt(z > 30 ? z + std::log1p(std::exp(-z)) : std::log1p(std::exp(z)));
  return z;
}

std::vector<double> oracle_softmax(const GateArgs& a, const std::vector<double>& z) {
  const double underflow = a.logits_type == DType::kFloat64 ? -INFINITY : -87.33;
  double largest = -INFINITY, sum = 0;
  for (double x : z) largest = x > largest ? x : largest;
  std::vector<double> p(z.size());
  for (size_t e = 0; e < z.size(); ++e) {
    const double x = z[e] == largest ? 0 : z[e] - largest;
    p[e] = std::isnan(z[e]) || z[e] == -INFINITY || x < underflow ? 0
           : largest == INFINITY                                  ? double(z[e] == largest)
                                                                  : std::exp(x);
    sum += p[e];
  }
  for (double& x : p) x = sum > 0 ? x / sum : 0;
  return p;
}

std::vector<double> oracle_scores(const GateArgs& a, const std::vector<double>& z) {
  if (a.spec.score == Score::kSoftmax || a.spec.score == Score::kSparseMixer) return oracle_softmax(a, z);
  std::vector<double> s;
  for (double x : z) s.push_back(oracle_pointwise(a, x));
  return s;
}

void oracle_read_steering(const Problem& p, int64_t row, OracleRow& o) {
  const GateArgs& a = p.args;
  const int64_t present = __builtin_popcount(a.steering.planes);
  int next = 0;
  for (int i = 0; i < 7; ++i) {
    if (a.steering.planes >> i & 1) o.plane[i] = a.steering.tables + (row * present + next++) * a.experts;
  }
  if (a.steering.row_params) o.params = a.steering.row_params + row * kRowParams;
  if (a.steering.remap) o.remap = a.steering.remap + row * a.experts;
  const float neutrals[] = {1, 0, 0, 0, 0, 1, 0};
  for (int e = 0; e < a.experts; ++e) {
    for (int i = 0; i < 7; ++i) o.steered |= o.plane[i] && o.plane[i][e] != neutrals[i];
    o.steered |= o.remap && o.remap[e] != e;
  }
  if (o.params) {
    o.steered |=
        o.params[kRowTemperature] != 1 || (o.params[kRowTopK] != 0 && o.params[kRowTopK] != float(a.k));
    if (o.params[kRowTopK] != 0) o.slots = int(o.params[kRowTopK]);
  }
  if (!o.steered) o.remap = nullptr;
}

void oracle_steer(const GateArgs& a, OracleRow& o) {
  const auto entry = [&](int i, size_t e, double neutral) {
    return o.plane[i] ? double(o.plane[i][e]) : neutral;
  };
  const size_t experts = size_t(a.experts);
  std::vector<double> finite;
  for (size_t e = 0; e < experts; ++e) {
    o.force[e] = int(entry(6, e, 0));
    if (o.force[e] == kForbid) o.z[e] = NAN;
    if (std::isfinite(o.z[e])) finite.push_back(o.z[e]);
  }
  double mean = 0, variance = 0, max = -INFINITY, min = INFINITY;
  for (double x : finite) mean += x / double(finite.size());
  for (double x : finite) variance += (x - mean) * (x - mean);
  const double degrees = double(finite.size()) - (o.params && o.params[kRowStdCorrection] != 0);
  const double std = degrees > 0 ? std::sqrt(variance / degrees) : 0;
  for (double x : o.z) max = x > max ? x : max, min = x < min ? x : min;
  double sum = 0;
  for (double x : o.z) sum += std::isnan(x) ? 0 : std::exp(x - max);
  const bool log_softmax = std::any_of(o.force.begin(), o.force.end(),
                                       [](int c) { return c == kOnSteerMoE || c == kOffSteerMoE; });
  const double shift = log_softmax && std::isfinite(max) ? max + std::log(sum) : 0;
  for (size_t e = 0; e < experts; ++e) {
    const double raw = o.z[e];
    double z = raw * entry(0, e, 1) / (o.params ? o.params[kRowTemperature] : 1.0);
    if (entry(1, e, 0) != 0) z += entry(1, e, 0);
    if (entry(2, e, 0) != 0) z += entry(2, e, 0) * std;
    if (entry(3, e, 0) != 0) z += entry(3, e, 0) * std::abs(raw);
    const bool forced = max >= min;
    z -= forced ? shift : 0;
    if (forced && o.force[e] == kOnPaper) z = max - shift;
    if (forced && o.force[e] == kOffPaper) z = min - shift;
    if (forced && o.force[e] == kOnSteerMoE) z = max - shift + 0.01;
    if (forced && o.force[e] == kOffSteerMoE) z = min - shift - 0.01;
    o.z[e] = z;
  }
}

void oracle_limit_groups(const GateSpec& s, OracleRow& o) {
  const size_t size = o.value.size() / size_t(s.groups);
  std::vector<double> score;
  for (size_t g = 0; g < size_t(s.groups); ++g) {
    std::vector<double> v;
    for (size_t e = g * size; e < (g + 1) * size; ++e)
      v.push_back(std::isnan(o.value[e]) ? -INFINITY : o.value[e]);
    std::sort(v.rbegin(), v.rend());
    const double both = size > 1 && s.group_score == GroupScore::kTopTwoSum ? v[0] + v[1] : v[0];
    score.push_back(std::isnan(both) ? -INFINITY : both);
  }
  std::vector<int> order(score.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int x, int y) { return score[size_t(x)] > score[size_t(y)]; });
  for (size_t i = size_t(s.top_groups); i < order.size(); ++i) {
    for (size_t e = size_t(order[i]) * size; e < size_t(order[i] + 1) * size; ++e) {
      if (o.force[e] != kForbid && !std::isnan(o.value[e])) o.value[e] = s.group_fill;
    }
  }
}

int force_class(int code) { return code == kForbid ? -2 : (code > 0) - (code < 0); }

void oracle_choose(const GateArgs& a, OracleRow& o) {
  o.score = oracle_scores(a, o.z);
  o.value = o.z;
  const bool score_bias = o.steered && o.plane[4] &&
                          std::any_of(o.plane[4], o.plane[4] + a.experts, [](float x) { return x != 0; });
  const bool by_score =
      a.spec.order == Order::kScoreThenTopK && (a.correction_bias || a.spec.groups > 1 || score_bias);
  for (size_t e = 0; e < o.z.size(); ++e) {
    if (by_score && !std::isnan(o.z[e])) o.value[e] = o.score[e];
    if (a.correction_bias) o.value[e] += a.correction_bias[e];
    if (score_bias) o.value[e] += o.plane[4][e];
  }
  if (a.spec.groups > 1) oracle_limit_groups(a.spec, o);
  std::vector<int> order(o.z.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int x, int y) {
    const int cx = force_class(o.force[size_t(x)]), cy = force_class(o.force[size_t(y)]);
    if (cx != cy) return cx > cy;
    const double vx = o.value[size_t(x)], vy = o.value[size_t(y)];
    return !std::isnan(vx) && (std::isnan(vy) || vx > vy);
  });
  for (int e : order) {
    if (int(o.ids.size()) < o.slots && o.force[size_t(e)] != kForbid) o.ids.push_back(e);
  }
}

OracleRow oracle_row(const Problem& p, int64_t t, bool natural = false) {
  const GateArgs& a = p.args;
  OracleRow o;
  o.slots = a.k;
  o.z.assign(p.logits.begin() + t * a.experts, p.logits.begin() + (t + 1) * a.experts);
  const float cap = a.spec.softcap;
  for (double& z : o.z) {  // in the precision of the gate, where large logits become equal
    if (cap != 0)
      z = a.logits_type == DType::kFloat64 ? std::tanh(z / cap) * cap : math::tanh(float(z) / cap) * cap;
  }
  o.force.assign(size_t(a.experts), 0);
  const int32_t* token = a.token_table ? a.token_table + t * kTokenColumns : nullptr;
  o.valid = !token || token[kTokenValid] != 0;
  const int64_t row = token ? token[kTokenSteeringRow] : -1;
  if (!natural && row >= 0 && row < a.steering.rows) oracle_read_steering(p, row, o);
  if (o.steered) oracle_steer(a, o);
  const bool has_given = a.given.mode != GivenMode::kNone && p.given_ids[size_t(t * a.k)] != -1;
  o.replay = has_given && a.given.mode == GivenMode::kReplay && !natural;
  o.given = o.replay ||
            (has_given && !o.steered &&
             (a.given.mode == GivenMode::kNatural || (a.given.mode == GivenMode::kBaseline && natural)));
  if (o.replay) o.slots = a.k;
  oracle_choose(a, o);
  if (o.given) {
    o.ids.clear();
    for (int j = 0; j < a.k; ++j) {
      const int id = p.given_ids[size_t(t * a.k + j)];
      o.ids.push_back(id < a.experts ? id : -1);
    }
  }
  return o;
}

// SparseMixer's test in the precision of the gate: half logits sit right on the threshold.
template <class T>
bool fails(const GateArgs& a, double largest, double x) {
  const T m = T(largest), z = T(x);
  return (m - z) / std::max(std::abs(z), m) > 2 * T(a.spec.jitter);
}

std::vector<double> oracle_sparsemixer(const GateArgs& a, const OracleRow& o, const std::vector<int>& ids) {
  std::vector<double> left = o.z, w;
  for (int id : ids) {
    double largest = -INFINITY, sum = 0, own = 0;
    for (double x : left) largest = x > largest ? x : largest;
    for (size_t e = 0; e < left.size(); ++e) {
      const double x = left[e];
      const bool dropped =
          a.logits_type == DType::kFloat64 ? fails<double>(a, largest, x) : fails<float>(a, largest, x);
      const double term = largest == INFINITY                          ? double(x == largest)
                          : std::isnan(x) || dropped || x == -INFINITY ? 0
                                                                       : std::exp(x - largest);
      sum += term;
      if (int(e) == id) own = term;
    }
    w.push_back(sum > 0 ? own / sum : 0);
    if (id >= 0) left[size_t(id)] = NAN;
  }
  return w;
}

// Weights of any choice of this row, as the contract makes them.
// `condition`: how much the division enlarges rounding errors of its terms.
std::vector<double> oracle_weights(const GateArgs& a, const OracleRow& o, const std::vector<int>& ids,
                                   double& condition) {
  const GateSpec& s = a.spec;
  const bool steered = o.steered;
  const auto weighs = steered && o.params && o.params[kRowScoreBiasWeighs] != 0 && o.plane[4];
  const auto after = steered && o.params && o.params[kRowWeightScaleAfter] != 0;
  std::vector<double> w(ids.size(), 0.0), chosen(ids.size(), NAN);
  for (size_t j = 0; j < ids.size(); ++j) {
    if (ids[j] < 0) continue;
    const size_t e = size_t(ids[j]);
    const double z = o.z[e], bias = weighs ? o.plane[4][e] : 0;
    chosen[j] = z + (s.order == Order::kTopKThenScore ? bias : 0);
    if (s.score == Score::kSoftmax)
      w[j] = o.score[e];
    else
      w[j] = oracle_pointwise(a, chosen[j]);
  }
  if (s.score == Score::kSoftmax && s.order == Order::kTopKThenScore) w = oracle_softmax(a, chosen);
  if (s.score == Score::kSparseMixer) w = oracle_sparsemixer(a, o, ids);
  const bool bias_on_score = weighs && s.order == Order::kScoreThenTopK;
  // Where the sum over all experts cancels, underflow of single terms must not matter.
  if (s.score == Score::kSoftmax && s.renormalize == Renormalize::kSum && s.eps == 0 && !bias_on_score)
    w = oracle_softmax(a, chosen);
  const auto scaled = [&](size_t j) {
    return steered && o.plane[5] && ids[j] >= 0 ? double(o.plane[5][ids[j]]) : 1.0;
  };
  for (size_t j = 0; j < ids.size(); ++j) {
    if (bias_on_score && ids[j] >= 0 && !std::isnan(o.z[size_t(ids[j])])) w[j] += o.plane[4][ids[j]];
    if (!after) w[j] *= scaled(j);
  }
  const bool infinite = std::any_of(w.begin(), w.end(), [](double x) { return std::isinf(x); });
  for (double& x : w)
    x = infinite && s.renormalize != Renormalize::kNone ? double(x == INFINITY) - double(x == -INFINITY) : x;
  double sum = 0, largest = 0, powers = 0, by = 1, magnitude = 0;
  for (double x : w) sum += x, largest = std::max(largest, std::abs(x)), magnitude += std::abs(x);
  for (double x : w) powers += largest > 0 ? std::pow(std::abs(x) / largest, double(s.norm_p)) : 0;
  if (s.renormalize == Renormalize::kSum) by = sum + double(s.eps);
  if (s.renormalize == Renormalize::kClamp) by = std::max(sum, double(s.eps));
  if (s.renormalize == Renormalize::kNorm)
    by = std::isinf(s.norm_p) ? largest : largest * std::pow(powers, 1 / double(s.norm_p));
  condition = s.renormalize == Renormalize::kNone || by == 0 ? 1 : std::max(1.0, magnitude / std::abs(by));
  const bool subnormal = largest > 0 && largest < 1e-30 && a.logits_type != DType::kFloat64;
  const bool vanishing = std::abs(sum) < 0.05 * magnitude;  // shares of such a sum mean nothing
  if (subnormal || vanishing) condition = INFINITY;
  for (size_t j = 0; j < w.size(); ++j) {
    w[j] = by != 0 ? w[j] / by * double(s.scale) : 0;
    if (after) w[j] *= scaled(j);
    if (a.expert_scale && ids[j] >= 0) w[j] *= a.expert_scale[ids[j]];
  }
  return w;
}

// ---- comparison with the oracle -----------------------------------------------------------------

// The same order up to values that rounding may swap. `exact`: not even that.
void check_ids(const OracleRow& o, const std::vector<int>& got, bool exact, double tolerance) {
  if (!check(got.size() == o.ids.size(), "number of chosen")) return;
  for (size_t j = 0; j < got.size(); ++j) {
    if (got[j] == o.ids[j]) continue;
    const double vg = o.value[size_t(got[j])], ve = o.value[size_t(o.ids[j])];
    const bool swapped = !exact &&
                         force_class(o.force[size_t(got[j])]) == force_class(o.force[size_t(o.ids[j])]) &&
                         near(vg, ve, tolerance, tolerance);
    check(swapped, "id " + std::to_string(got[j]) + " for " + std::to_string(o.ids[j]) + " in slot " +
                       std::to_string(j));
  }
  std::vector<int> sorted = got;
  std::sort(sorted.begin(), sorted.end());
  check(std::adjacent_find(sorted.begin(), sorted.end()) == sorted.end(), "unique ids");
}

struct Expectation {
  std::vector<double> groups, segments;  // in units of one
};

double term(double x) { return std::isnan(x) ? 0 : std::clamp(x, -0x1p+19, 0x1p+19); }

void count_row(const Problem& p, int64_t t, const OracleRow& o, const std::vector<int>& ids,
               const std::vector<double>& w, std::vector<double>& table, int64_t rows, int column) {
  const GateArgs& a = p.args;
  const int64_t index = a.token_table           ? a.token_table[t * kTokenColumns + column]
                        : column == kTokenGroup ? 0
                                                : -1;
  if (index < 0 || index >= rows) return;
  double* sums = table.data() + index * table_width(a);
  const int64_t steering = a.token_table ? a.token_table[t * kTokenColumns + kTokenSteeringRow] : -1;
  std::vector<int> present;
  double total = std::accumulate(w.begin(), w.end(), 0.0);
  for (int id : ids) {
    if (id >= 0) present.push_back(id);
  }
  sums[kStatTokens] += 1;
  sums[kStatSlots] += o.slots;
  sums[kStatEmpty] += o.slots - int(present.size());
  sums[kStatSteered] += steering >= 0 && steering < a.steering.rows;
  double score_sum = 0, entropy = 0;
  for (double s : o.score) score_sum += s;
  const bool scored = score_sum >= 0x1p-126 && std::isfinite(score_sum) &&
                      *std::min_element(o.score.begin(), o.score.end()) >= 0;
  const bool wants = (a.statistics.planes & kMass) || a.statistics.entropy;
  if (wants && !scored) sums[kStatUnscored] += 1;
  for (double s : o.score) entropy -= scored && s > 0 ? s / score_sum * std::log(s / score_sum) : 0;
  if (a.statistics.entropy) sums[kStatEntropy] += entropy;
  double* plane = sums + kStatScalars;
  const auto has = [&](StatPlane bit) { return (a.statistics.planes & bit) != 0; };
  if (has(kCounts)) {
    for (int id : present) plane[id] += 1;
    plane += a.experts;
  }
  if (has(kMass)) {
    for (size_t e = 0; scored && e < o.score.size(); ++e) plane[e] += o.score[e] / score_sum;
    plane += a.experts;
  }
  for (StatPlane bit : {kWeight, kShare}) {
    if (!has(bit)) continue;
    for (size_t j = 0; j < ids.size(); ++j) {
      if (ids[j] >= 0 && (bit == kWeight || total != 0))
        plane[ids[j]] += term(bit == kWeight ? w[j] : w[j] / total);
    }
    plane += a.experts;
  }
  if (!has(kNaturalCounts)) return;
  std::vector<int> natural = ids;
  if (o.steered || o.replay || a.given.mode == GivenMode::kBaseline) natural = oracle_row(p, t, true).ids;
  double moved = 0;
  for (int id : natural) {
    if (id >= 0) plane[id] += 1;
  }
  for (size_t j = 0; j < ids.size(); ++j) {
    if (ids[j] < 0 || std::find(natural.begin(), natural.end(), ids[j]) != natural.end()) continue;
    sums[kStatFlipped] += 1;
    moved += w[j];
  }
  if (total != 0) sums[kStatMoved] += term(moved / total);
}

void apply_remap(const OracleRow& o, int experts, std::vector<int>& ids, std::vector<double>& w) {
  std::vector<int> to;
  std::vector<double> weights;
  for (size_t j = 0; j < ids.size(); ++j) {
    const int id = ids[j] < 0 ? -1 : o.remap[ids[j]];
    if (id < 0 || id >= experts) continue;
    const auto at = std::find(to.begin(), to.end(), id);
    if (at == to.end())
      to.push_back(id), weights.push_back(w[j]);
    else
      weights[size_t(at - to.begin())] += w[j];
  }
  ids = to, w = weights;
}

bool is_fixed_point_scalar(int64_t column) { return column == kStatEntropy || column == kStatMoved; }

void check_table(const GateArgs& a, const std::vector<int64_t>& got, const std::vector<double>& expected,
                 double tolerance) {
  const int64_t width = table_width(a);
  for (size_t i = 0; i < got.size(); ++i) {
    const int64_t column = int64_t(i) % width, plane = (column - kStatScalars) / a.experts;
    uint32_t bit = 0;
    if (column >= kStatScalars) {
      int64_t seen = -1;
      for (bit = 1; seen < plane; bit <<= 1) seen += (a.statistics.planes & bit) != 0;
      bit >>= 1;
    }
    const bool counted =
        column < kStatScalars ? !is_fixed_point_scalar(column) : bit == kCounts || bit == kNaturalCounts;
    const double value = double(got[i]) * (counted ? 1.0 : kUnit);
    if (!check(near(value, expected[i], counted ? 0 : tolerance,
                    counted ? 0 : tolerance + kUnit * double(a.tokens * a.k)),
               "table column " + std::to_string(column) + ": " + std::to_string(value) + " for " +
                   std::to_string(expected[i]))) {
      return;
    }
  }
}

// Portable against the oracle. What follows from ids is computed from the gate's own, once those are
// accepted.
void compare_with_oracle(const Problem& p, double tolerance, bool exact) {
  const GateArgs& a = p.args;
  const Result r = run(p, cpu::InstructionSet::kPortable);
  std::vector<double> groups(r.groups.size()), segments(r.segments.size());
  bool comparable = true;
  for (int64_t t = 0; t < a.tokens; ++t) {
    OracleRow o = oracle_row(p, t);
    std::vector<int> got(r.ids.begin() + t * a.k, r.ids.begin() + (t + 1) * a.k);
    if (!o.valid) {
      for (int j = 0; j < a.k; ++j)
        check(got[size_t(j)] == -1 && r.weight(size_t(t * a.k + j)) == 0, "padding is empty");
      continue;
    }
    std::vector<int> ids = got;
    const bool remapped = o.remap && !o.replay;
    if (remapped)
      ids = o.ids;  // what was chosen before remapping cannot be read back
    else if (!o.given) {
      ids.resize(o.ids.size());
      check_ids(o, ids, exact, tolerance);
    } else {
      check(ids == o.ids, "given ids");
    }
    double condition = 1;
    std::vector<double> w = oracle_weights(a, o, ids, condition);
    double largest_logit = 1;  // identity scores carry the logits' absolute errors
    for (double z : o.z)
      largest_logit = a.spec.score == Score::kIdentity && std::isfinite(z)
                          ? std::max(largest_logit, std::abs(z))
                          : largest_logit;
    if (condition > 30) comparable = false;  // a sum that cancels: no digits left to compare
    if (o.given && !o.replay && a.given.weights) {
      for (size_t j = 0; j < w.size(); ++j)
        w[j] = ids[j] < 0 ? 0 : double(p.given_weights[size_t(t * a.k) + j]);
    }
    if (remapped) apply_remap(o, a.experts, ids, w);
    if (remapped && !std::equal(ids.begin(), ids.end(), got.begin())) {
      comparable = false;  // a swap of equal values before the remap
      continue;
    }
    for (size_t j = 0; j < size_t(a.k); ++j) {
      const double expected = j < w.size() ? w[j] : 0, weight = r.weight(size_t(t * a.k) + j);
      const double slack = tolerance * condition * condition * largest_logit;
      check(condition > 30 || near(weight, expected, 20 * slack, slack),
            "weight " + std::to_string(weight) + " for " + std::to_string(expected));
      check(j < ids.size() || got[j] == -1, "empty slot");
    }
    count_row(p, t, o, ids, w, groups, a.statistics.num_groups, kTokenGroup);
    count_row(p, t, o, ids, w, segments, a.statistics.num_segments, kTokenSegment);
  }
  if (!comparable) return;
  check_table(a, r.groups, groups, 50 * tolerance * double(a.tokens));
  check_table(a, r.segments, segments, 50 * tolerance * double(a.tokens));
}

// ---- tests --------------------------------------------------------------------------------------

template <class Got, class Expected>
void check_ulp(const char* name, double low, double high, double limit, Got got, Expected expected) {
  context = name;
  double worst = 0, at = 0;
  for (int i = 0; i <= 2000000; ++i) {
    const float x = float(low + (high - low) * i / 2000000);
    const double e = expected(double(x)), ulp = std::ldexp(1.0, std::max(std::ilogb(e), -126) - 23);
    const double error = std::abs(double(got(x)) - e) / ulp;
    if (error > worst) worst = error, at = x;
  }
  check(worst <= limit, std::to_string(worst) + " ulp at " + std::to_string(at));
}

void test_math() {
  const auto exp = [](float x) { return math::exp_nonpositive(x); };
  check_ulp("exp", -87.32, 0, 1.01, exp, [](double x) { return std::exp(x); });
  check_ulp("exp near 0", -0.01, 0, 1.01, exp, [](double x) { return std::exp(x); });
  check_ulp(
      "log", 1e-6, 100, 2.0, [](float x) { return math::log(x); }, [](double x) { return std::log(x); });
  check_ulp(
      "log near 1", 0.9, 1.1, 2.0, [](float x) { return math::log(x); },
      [](double x) { return std::log(x); });
  check_ulp(
      "log large", 1, 4096, 2.0, [](float x) { return math::log(x); }, [](double x) { return std::log(x); });
  check_ulp(
      "log1p", 1e-7, 1, 2.0, [](float x) { return math::log1p_unit(x); },
      [](double x) { return std::log1p(x); });
  check_ulp(
      "sigmoid", -87, 40, 2.5, [](float x) { return math::sigmoid(x); },
      [](double x) { return 1 / (1 + std::exp(-x)); });
  const auto softplus = [](double x) {
    return std::sqrt(std::max(x, 0.0) + std::log1p(std::exp(-std::abs(x))));
  };
  check_ulp("sqrt softplus", -87, 87, 2.5, [](float x) { return math::sqrt_softplus(x); }, softplus);
  const auto tanh = [](float x) { return math::tanh(x); };
  check_ulp("tanh", -12, 12, 1.1, tanh, [](double x) { return std::tanh(x); });
  check_ulp("tanh near 0", -0.01, 0.01, 1.1, tanh, [](double x) { return std::tanh(x); });
  check_ulp("tanh near 0.7", 0.69, 0.71, 1.1, tanh, [](double x) { return std::tanh(x); });
  context = "tanh";
  check(tanh(kInf) == 1.0f && tanh(-kInf) == -1.0f && std::isnan(tanh(kNaN)), "tanh of infinities and NaN");
  check(std::signbit(tanh(-0.0f)) && !std::signbit(tanh(0.0f)) && tanh(1e-40f) == 1e-40f,
        "tanh of tiny numbers");
  float before = 0;
  bool rises = true;
  for (int32_t i = math::as_int(0x1p-20f); i < math::as_int(16.0f); i += 3) {
    const float now = tanh(math::as_float(i));
    rises &= now >= before && now == -tanh(-math::as_float(i));
    before = now;
  }
  check(rises && before == 1.0f, "tanh never falls, is odd, and ends at 1");
  context = "exp ends";
  check(exp(0.0f) == 1.0f && exp(-88.0f) == 0.0f && exp(-kInf) == 0.0f && exp(kNaN) == 0.0f,
        "exp of 0, -88, -inf, NaN");
}

void test_against_oracle(int problems) {
  for (int i = 0; i < problems; ++i) {
    Random g(uint64_t(i) * 7919 + 1);
    Problem p;
    random_problem(p, g, true);
    context = "oracle problem " + std::to_string(i) + " E=" + std::to_string(p.args.experts) +
              " k=" + std::to_string(p.args.k) + " score=" + std::to_string(int(p.args.spec.score)) +
              " order=" + std::to_string(int(p.args.spec.order)) +
              " renorm=" + std::to_string(int(p.args.spec.renormalize)) +
              " planes=" + std::to_string(p.args.steering.planes);
    const bool exact = p.args.steering.rows == 0 && !p.args.correction_bias && p.args.spec.groups == 1;
    compare_with_oracle(p, 1e-5, exact);
    if (i % 4 != 0) continue;
    store_logits(p, DType::kFloat64, p.args.experts);
    context += " float64";
    compare_with_oracle(p, 1e-12, exact);
  }
}

std::vector<cpu::InstructionSet> faster_sets() {
  std::vector<cpu::InstructionSet> sets;
  for (auto set : {cpu::InstructionSet::kAvx2, cpu::InstructionSet::kAvx512, cpu::InstructionSet::kNeon}) {
    if (cpu::supported(set)) sets.push_back(set);
  }
  return sets;
}

// Comparing a set with portable proves nothing if it is portable that runs.
void test_every_set_has_its_gate() {
  context = "gates";
  for (auto set : faster_sets()) {
    cpu::set_instruction_set(set);
    check(cpu::gate_backend(DType::kBFloat16).rows != cpu::gate_portable().rows,
          std::string(cpu::name(set)) + " has a gate of its own");
  }
#if defined(__aarch64__)
  check(cpu::supported(cpu::InstructionSet::kNeon), "aarch64 has NEON");
#endif
}

void check_invariants(const Problem& p, const Result& r) {
  const GateArgs& a = p.args;
  for (int64_t t = 0; t < a.tokens; ++t) {
    std::vector<int> ids(r.ids.begin() + t * a.k, r.ids.begin() + (t + 1) * a.k);
    for (int j = 0; j < a.k; ++j) {
      check(ids[size_t(j)] >= -1 && ids[size_t(j)] < a.experts, "id in range");
      if (ids[size_t(j)] < 0) check(r.weight(size_t(t * a.k + j)) == 0, "empty slot weighs 0");
    }
    std::sort(ids.begin(), ids.end());
    for (size_t j = 1; j < ids.size(); ++j) check(ids[j] < 0 || ids[j] != ids[j - 1], "unique ids");
  }
  const int64_t width = table_width(a);
  for (const auto& table : {r.groups, r.segments}) {
    for (size_t row = 0; row * size_t(width) < table.size() && (a.statistics.planes & kCounts); ++row) {
      const int64_t* sums = table.data() + row * size_t(width);
      const int64_t counted =
          std::accumulate(sums + kStatScalars, sums + kStatScalars + a.experts, int64_t{0});
      check(counted + sums[kStatEmpty] == sums[kStatSlots], "counts + empty = slots");
    }
  }
}

void test_instruction_sets(int problems) {
  for (int i = 0; i < problems; ++i) {
    Random g(uint64_t(i) * 104729 + 5);
    Problem p;
    random_problem(p, g, false);
    context = "parity problem " + std::to_string(i) + " E=" + std::to_string(p.args.experts) +
              " k=" + std::to_string(p.args.k) + " score=" + std::to_string(int(p.args.spec.score)) +
              " planes=" + std::to_string(p.args.steering.planes);
    const Result portable = run(p, cpu::InstructionSet::kPortable);
    check_invariants(p, portable);
    for (auto set : faster_sets()) check(run(p, set) == portable, std::string("bits of ") + cpu::name(set));
    check(run(p, cpu::best_instruction_set(), 3) == portable, "bits of three pieces");
    const Result counted = run(p, cpu::best_instruction_set(), 1, true);
    check(counted.groups == portable.groups && counted.segments == portable.segments, "counting only");
  }
}

// ---- blocks of rows -----------------------------------------------------------------------------

// Memory that ends where none is mapped: a read past the last row faults.
class Guarded {
 public:
  explicit Guarded(size_t bytes)
      : page_(size_t(sysconf(_SC_PAGESIZE))), size_((bytes + page_ - 1) / page_ * page_) {
    map_ = static_cast<char*>(
        mmap(nullptr, size_ + page_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (map_ == MAP_FAILED || mprotect(map_ + size_, page_, PROT_NONE) != 0) std::abort();
    begin_ = map_ + size_ - bytes;
  }
  ~Guarded() { munmap(map_, size_ + page_); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  void* begin() const { return begin_; }

 private:
  size_t page_, size_;
  char *map_, *begin_;
};

enum class Neighbour { kNormal, kTied, kNaN, kPartlyNaN, kInfinite, kLowest, kHuge, kPadding };

float neighbour_logit(Neighbour kind, int e, Random& g) {
  switch (kind) {
    case Neighbour::kTied:
      return float(below(g, 3));
    case Neighbour::kNaN:
      return kNaN;
    case Neighbour::kPartlyNaN:
      return one_in(g, 2) ? kNaN : normal(g);
    case Neighbour::kInfinite:
      return one_in(g, 3) ? kInf : one_in(g, 2) ? -kInf : normal(g);
    case Neighbour::kLowest:
      return e == 1 ? normal(g) : -kInf;
    case Neighbour::kHuge:
      return one_in(g, 2) ? 3e38f : -0.0f;
    default:
      return normal(g);
  }
}

// How a model routes, and what is counted of it.
struct Routing {
  Score score;
  Order order;
  Renormalize renormalize;
  bool correction;
  uint32_t planes;
  uint32_t steering;
};
constexpr uint32_t kAll = kCounts | kMass | kWeight | kShare | kNaturalCounts;
const Routing kRoutings[] = {
    {Score::kSoftmax, Order::kScoreThenTopK, Renormalize::kSum, false, kAll, 0},
    {Score::kSoftmax, Order::kScoreThenTopK, Renormalize::kNone, false, kAll, 0},
    {Score::kSoftmax, Order::kTopKThenScore, Renormalize::kNone, false, kCounts, 0},
    {Score::kSigmoid, Order::kScoreThenTopK, Renormalize::kSum, true, kAll, 0},
    {Score::kSigmoid, Order::kScoreThenTopK, Renormalize::kClamp, false, kCounts | kMass, 0},
    {Score::kSqrtSoftplus, Order::kScoreThenTopK, Renormalize::kSum, false, kAll, 0},
    {Score::kSoftmax, Order::kScoreThenTopK, Renormalize::kSum, false, kAll, kBias | kStd | kMagnitude},
    {Score::kSoftmax, Order::kScoreThenTopK, Renormalize::kSum, false, kCounts | kMass, kForce},
    {Score::kSigmoid, Order::kScoreThenTopK, Renormalize::kSum, true, kAll, kScale | kStd | kForce},
    {Score::kSoftmax, Order::kScoreThenTopK, Renormalize::kSum, false, kCounts | kWeight, kBias | kStd},
    {Score::kSoftmax, Order::kScoreThenTopK, Renormalize::kNone, false, kCounts | kMass, kScale | kMagnitude},
    {Score::kSigmoid, Order::kScoreThenTopK, Renormalize::kSum, true, kCounts | kShare, kBias | kForce},
};

Problem block_problem(Shape shape, int tokens, const Routing& routing, Neighbour kind, Random& g) {
  Problem p;
  GateArgs& a = p.args;
  a.experts = shape.experts, a.k = shape.k, a.tokens = tokens;
  a.spec.score = routing.score, a.spec.order = routing.order, a.spec.renormalize = routing.renormalize;
  if (routing.renormalize == Renormalize::kClamp) a.spec.eps = 0.5f, a.spec.scale = 2.5f;
  for (int e = 0; e < a.experts; ++e) p.correction.push_back(0.3f * normal(g));
  if (routing.correction) a.correction_bias = p.correction.data();
  if (routing.correction && a.experts % 4 == 0) a.spec.groups = 4, a.spec.top_groups = 2;
  for (int i = 0; i < tokens * a.experts; ++i) p.logits.push_back(normal(g));
  for (int t = 0; t < tokens; ++t) {
    if (one_in(g, 2)) continue;
    for (int e = 0; e < a.experts; ++e) p.logits[size_t(t * a.experts + e)] = neighbour_logit(kind, e, g);
  }
  a.statistics.num_groups = 2, a.statistics.num_segments = 2;
  a.statistics.planes = routing.planes, a.statistics.entropy = routing.planes != kCounts;
  if (routing.steering != 0) {
    a.steering.rows = 2, a.steering.planes = routing.steering;
    for (uint32_t bit = 1; bit <= kForce; bit <<= 1) {
      for (int i = 0; (routing.steering & bit) && i < 2 * a.experts; ++i) {
        const bool one = one_in(g, 3);
        p.tables.push_back(bit == kForce   ? (one_in(g, 6) ? float(below(g, 8) - 4) : 0.0f)
                           : bit == kScale ? (one ? 1.5f : 1.0f)
                                           : (one ? normal(g) : 0.0f));
      }
    }
    // Planes of a row stand together.
    const size_t planes = size_t(__builtin_popcount(routing.steering)), experts = size_t(a.experts);
    std::vector<float> by_row;
    for (size_t row = 0; row < 2; ++row) {
      for (size_t plane = 0; plane < planes; ++plane) {
        const auto from = p.tables.begin() + std::ptrdiff_t((2 * plane + row) * experts);
        by_row.insert(by_row.end(), from, from + std::ptrdiff_t(experts));
      }
    }
    p.tables = by_row;
    a.steering.tables = p.tables.data();
  }
  return p;
}

// Labels of all rows: alike, or changing; rows of padding between them.
void label_rows(Problem& p, bool alike, bool padding, Random& g) {
  const int steered = int(p.args.steering.rows);
  for (int64_t t = 0; t < p.args.tokens; ++t) {
    const int32_t mixed[] = {below(g, steered + 1) - 1, below(g, 3) - 1, below(g, 3) - 1, 1};
    const int32_t same[] = {steered - 1, 1, 0, 1};
    const int32_t* token = alike ? same : mixed;
    p.tokens.insert(p.tokens.end(), token, token + kTokenColumns);
    if (!padding || !one_in(g, 4)) continue;
    p.tokens.back() = 0;  // what the row holds must not count
    std::fill_n(p.logits.begin() + t * p.args.experts, p.args.experts, kNaN);
  }
  p.args.token_table = p.tokens.data();
}

const Shape kBlockShapes[] = {{8, 2},   {8, 1},   {6, 3},   {16, 2},   {16, 4},  {13, 1},
                              {32, 4},  {27, 3},  {60, 4},  {64, 8},   {128, 8}, {128, 11},
                              {256, 8}, {257, 6}, {40, 16}, {896, 16}, {100, 22}};

// Blocks of every length and kind: the bits of portable, which takes each row by itself, whatever lies beside it.
void test_blocks() {
  Random g(17);
  const DType types[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};
  int turn = 0;
  for (const Shape shape : kBlockShapes) {
    for (int tokens = 1; tokens <= 33; ++tokens) {
      for (int kind = 0; kind <= int(Neighbour::kPadding); ++kind, ++turn) {
        const Routing& routing = kRoutings[turn % int(std::size(kRoutings))];
        Problem p = block_problem(shape, tokens, routing, Neighbour(kind), g);
        const int labels = turn / 2 % 3;
        if (labels > 0 || p.args.steering.rows > 0)
          label_rows(p, labels == 1, kind == int(Neighbour::kPadding), g);
        store_logits(p, types[turn % 3], shape.experts + (turn % 2) * 3);
        context = "block E=" + std::to_string(shape.experts) + " k=" + std::to_string(shape.k) +
                  " T=" + std::to_string(tokens) + " neighbour " + std::to_string(kind) + " routing " +
                  std::to_string(turn % int(std::size(kRoutings)));
        const Result portable = run(p, cpu::InstructionSet::kPortable);
        for (auto set : faster_sets())
          check(run(p, set) == portable, std::string("bits of ") + cpu::name(set));
      }
    }
  }
}

// Rows of one label, then a mixed block that ends with another label, then rows of the first: a book that stays open over
// blocks is turned back.
void test_labels_return() {
  Random g(29);
  for (const Shape shape : kBlockShapes) {
    for (const Routing& routing : kRoutings) {
      Problem p = block_problem(shape, 48, routing, Neighbour::kNormal, g);
      store_logits(p, DType::kFloat32, shape.experts);
      for (int t = 0; t < 48; ++t) {
        const int32_t other = t >= 16 && t < 32 && t % 2 == 1 ? 1 : 0;
        const int32_t token[] = {int(p.args.steering.rows) - 1, other, other, 1};
        p.tokens.insert(p.tokens.end(), token, token + kTokenColumns);
      }
      p.args.token_table = p.tokens.data();
      context = "labels that return E=" + std::to_string(shape.experts) + " k=" + std::to_string(shape.k) +
                " routing " + std::to_string(&routing - kRoutings);
      const Result portable = run(p, cpu::InstructionSet::kPortable);
      for (auto set : faster_sets()) check(run(p, set) == portable, std::string("bits of ") + cpu::name(set));
    }
  }
}

// One row at every place of its blocks, beside rows of another kind: what it is alone.
void test_places(cpu::InstructionSet set) {
  Random g(23);
  const std::string what = context;
  for (const Shape shape : kBlockShapes) {
    for (int kind = 0; kind < int(Neighbour::kPadding); ++kind) {
      const Routing& routing = kRoutings[kind % 6];
      Problem alone = block_problem(shape, 1, routing, Neighbour(kind), g);
      store_logits(alone, DType::kFloat32, shape.experts);
      const Result expected = run(alone, set);
      Problem p = block_problem(shape, 33, routing, Neighbour((kind + 3) % int(Neighbour::kPadding)), g);
      if (routing.correction)
        std::copy(alone.correction.begin(), alone.correction.end(), p.correction.begin());
      const std::vector<float> beside = p.logits;
      for (int place = 0; place < 33; ++place) {
        p.logits = beside;
        std::copy(alone.logits.begin(), alone.logits.end(), p.logits.begin() + place * shape.experts);
        store_logits(p, DType::kFloat32, shape.experts);
        const Result r = run(p, set);
        context = what + " E=" + std::to_string(shape.experts) + " kind " + std::to_string(kind) + " place " +
                  std::to_string(place);
        const size_t at = size_t(place * shape.k), k = size_t(shape.k);
        check(std::equal(expected.ids.begin(), expected.ids.end(), r.ids.begin() + std::ptrdiff_t(at)),
              "ids");
        check(std::memcmp(expected.weights.data(), r.weights.data() + at, k * sizeof(float)) == 0, "weights");
      }
    }
  }
}

// Neither past the last row nor in rows of padding is anything read: there is no memory.
void test_unmapped(cpu::InstructionSet set) {
  Random g(29);
  for (const Shape shape : kBlockShapes) {
    for (DType type : {DType::kFloat32, DType::kBFloat16}) {
      for (int tokens : {1, 15, 16, 17, 33}) {
        Problem p = block_problem(shape, tokens, kRoutings[0], Neighbour::kNormal, g);
        label_rows(p, true, false, g);
        store_logits(p, type, shape.experts);
        const Result expected = run(p, set);
        const size_t bytes =
            size_t(tokens * shape.experts) * (type == DType::kFloat32 ? sizeof(float) : sizeof(uint16_t));
        const Guarded memory(bytes);
        std::memcpy(memory.begin(), p.args.logits, bytes);
        p.args.logits = memory.begin();
        check(run(p, set) == expected, "bits at the end of memory");
        p.args.tokens += 17;  // padding
        for (int i = 0; i < 17; ++i) p.tokens.insert(p.tokens.end(), {-1, 1, 0, 0});
        p.args.token_table = p.tokens.data();
        const Result padded = run(p, set);
        check(std::equal(expected.ids.begin(), expected.ids.end(), padded.ids.begin()) &&
                  padded.groups == expected.groups,
              "padding behind the end of memory");
      }
    }
  }
}

// The row-wise hard cases run on every instruction set.
template <class Test>
void on_every_set(const char* name, Test test) {
  std::vector<cpu::InstructionSet> sets = faster_sets();
  sets.push_back(cpu::InstructionSet::kPortable);
  for (auto set : sets) {
    context = std::string(name) + " on " + cpu::name(set);
    test(set);
  }
}

Problem one_row(std::vector<float> logits, int k, Renormalize renormalize = Renormalize::kSum) {
  Problem p;
  p.logits = std::move(logits);
  p.args.tokens = 1, p.args.experts = int(p.logits.size()), p.args.k = k;
  p.args.spec.renormalize = renormalize;
  p.args.statistics.num_groups = 1;
  p.args.statistics.planes = kCounts | kMass | kWeight;
  p.args.statistics.entropy = true;
  store_logits(p, DType::kFloat32, p.args.experts);
  return p;
}

void expect(const Result& r, std::vector<int> ids, std::vector<double> weights) {
  check(std::equal(ids.begin(), ids.end(), r.ids.begin(), r.ids.end()), "ids");
  for (size_t j = 0; j < weights.size(); ++j) {
    check(near(r.weight(j), weights[j], 1e-6, 0),
          "weight " + std::to_string(r.weight(j)) + " for " + std::to_string(weights[j]));
  }
}

void test_hard_logits(cpu::InstructionSet set) {
  const std::vector<float> nothing(20, kNaN), lowest(20, -kInf), equal(40, 1.0f);
  const Result all_nan = run(one_row(nothing, 3), set);
  expect(all_nan, {0, 1, 2}, {0, 0, 0});
  check(all_nan.groups[kStatUnscored] == 1 && all_nan.groups[kStatEntropy] == 0, "all-NaN row is unscored");
  expect(run(one_row(lowest, 3), set), {0, 1, 2}, {0, 0, 0});
  expect(run(one_row(equal, 4), set), {0, 1, 2, 3}, {0.25, 0.25, 0.25, 0.25});
  expect(run(one_row({kNaN, 0, kNaN, 0, -kInf}, 5), set), {1, 3, 4, 0, 2}, {0.5, 0.5, 0, 0, 0});
  for (auto renormalize : {Renormalize::kNone, Renormalize::kSum}) {
    expect(run(one_row({1, kInf, 2, kInf, kNaN}, 3, renormalize), set), {1, 3, 2}, {0.5, 0.5, 0});
  }
  Problem infinite = one_row({1, kInf, 2, kInf, kNaN}, 3);
  infinite.args.spec.score = Score::kSqrtSoftplus;
  expect(run(infinite, set), {1, 3, 2}, {0.5, 0.5, 0});
  expect(run(one_row({-0.0f, 0.0f, -0.0f, 0.0f}, 2), set), {0, 1}, {0.5, 0.5});
  expect(run(one_row({-200, -200, 0, -200}, 2, Renormalize::kNone), set), {2, 0}, {1, 0});
  expect(run(one_row({5}, 1), set), {0}, {1});
}

// 64 chosen of 4096 equal experts, and of rising ones: the exact short list.
void test_long_rows(cpu::InstructionSet set) {
  std::vector<float> logits(4096, 0.5f);
  std::vector<int> ids(64);
  std::iota(ids.begin(), ids.end(), 0);
  expect(run(one_row(logits, 64), set), ids, std::vector<double>(64, 1.0 / 64));
  for (int e = 0; e < 4096; ++e) logits[size_t(e)] = float(e) * 0.001f;
  for (int j = 0; j < 64; ++j) ids[size_t(j)] = 4095 - j;
  expect(run(one_row(logits, 64), set), ids, {});
}

// Softmax, top-k, renormalize has the bits of top-k, softmax.
void test_cancelling_softmax(cpu::InstructionSet set) {
  Random g(3);
  for (int i = 0; i < 50; ++i) {
    std::vector<float> logits;
    for (int e = 0; e < 100; ++e) logits.push_back(3 * normal(g));
    Problem p = one_row(logits, 8);
    const Result a = run(p, set);
    p.args.spec.order = Order::kTopKThenScore, p.args.spec.renormalize = Renormalize::kNone;
    check(run(p, set) == a, "bits of top-k then softmax");
  }
}

struct Forced {
  std::vector<float> codes;
  std::vector<int> ids;
  std::vector<double> weights;
};

void test_force(cpu::InstructionSet set) {
  const std::vector<float> z = {0, 1, 2, 3};
  const double e1 = std::exp(-1.0), up = std::exp(0.01);
  const std::vector<Forced> cases = {
      {{kOnPaper, 0, 0, 0}, {0, 3}, {0.5, 0.5}},
      {{kOnNatural, 0, 0, 0}, {0, 3}, {std::exp(-3.0) / (1 + std::exp(-3.0)), 1 / (1 + std::exp(-3.0))}},
      {{kOnSteerMoE, 0, 0, 0}, {0, 3}, {up / (1 + up), 1 / (1 + up)}},
      {{kOnPaper, kOnPaper, kOnPaper, 0}, {0, 1}, {0.5, 0.5}},  // more than k
      {{0, 0, 0, kOffPaper}, {2, 1}, {1 / (1 + e1), e1 / (1 + e1)}},
      {{kForbid, kOffNatural, kOffNatural, kOffNatural},
       {3, 2},
       {1 / (1 + e1), e1 / (1 + e1)}},  // fewer than k left
      {{kForbid, kForbid, kForbid, 0}, {3, -1}, {1, 0}},
      {{kForbid, kForbid, kForbid, kForbid}, {-1, -1}, {0, 0}},
  };
  for (const Forced& c : cases) {
    Problem p = one_row(z, 2);
    p.tables = c.codes;
    p.tokens = {0, 0, -1, 1};
    p.args.steering.tables = p.tables.data(), p.args.steering.rows = 1, p.args.steering.planes = kForce;
    p.args.token_table = p.tokens.data();
    expect(run(p, set), c.ids, c.weights);
  }
}

// A neutral row, -1 and an index out of range have the bits of no steering, beside a steered row with
// infinities.
void test_neutral_steering(cpu::InstructionSet set) {
  Random g(5);
  Problem p;
  GateArgs& a = p.args;
  a.tokens = 4, a.experts = 60, a.k = 6;
  a.spec.score = Score::kIdentity;
  std::vector<float> row;
  for (int e = 0; e < 60; ++e)
    row.push_back(e % 7 == 0 ? -0.0f : e == 30 ? kInf : e == 31 ? kNaN : normal(g));
  for (int t = 0; t < 4; ++t) p.logits.insert(p.logits.end(), row.begin(), row.end());
  store_logits(p, DType::kFloat32, 60);
  const Result plain = run(p, set);
  a.steering.rows = 2, a.steering.planes = 127;
  for (int plane = 0; plane < 14; ++plane) {
    const float neutral = plane % 7 == 0 || plane % 7 == 5 ? 1.0f : 0.0f;
    for (int e = 0; e < 60; ++e) p.tables.push_back(plane >= 7 && plane < 13 && e % 5 == 0 ? kInf : neutral);
  }
  p.row_params = {1, 0, 1, 1, 1, 1, 0, 0, 0, 0};
  for (int row_index = 0; row_index < 2; ++row_index) {
    for (int e = 0; e < 60; ++e) p.remap.push_back(e);
  }
  p.tokens = {0, 0, -1, 1, -1, 0, -1, 1, 2, 0, -1, 1, 1, 0, -1, 1};
  a.steering.tables = p.tables.data(), a.steering.row_params = p.row_params.data(),
  a.steering.remap = p.remap.data();
  a.token_table = p.tokens.data();
  const Result steered = run(p, set);
  check(std::equal(plain.ids.begin(), plain.ids.begin() + 18, steered.ids.begin()), "ids of rows left alone");
  check(std::memcmp(plain.weights.data(), steered.weights.data(), 18 * sizeof(float)) == 0,
        "weights of rows left alone");
  check_invariants(p, steered);
}

// Half logits have the bits of the same logits as float32.
void test_half_logits(cpu::InstructionSet set) {
  for (DType type : {DType::kBFloat16, DType::kFloat16}) {
    Random g(11);
    Problem p;
    p.args.tokens = 9, p.args.experts = 67, p.args.k = 5;
    p.args.statistics.num_groups = 1, p.args.statistics.planes = 31, p.args.statistics.entropy = true;
    for (int i = 0; i < 9 * 67; ++i) p.logits.push_back(normal(g) * (i % 3 == 0 ? 1e-6f : 3.0f));
    p.logits[5] = kInf, p.logits[77] = kNaN, p.logits[140] = -kInf;
    store_logits(p, type, 70);
    const Result half = run(p, set);
    store_logits(p, DType::kFloat32, 67);
    check(run(p, set) == half, type == DType::kBFloat16 ? "bfloat16" : "float16");
  }
}

// Every half there is reads as the number it stands for.
void test_all_float16(cpu::InstructionSet set) {
  Problem p;
  p.args.tokens = 1 << 12, p.args.experts = 16, p.args.k = 1;
  p.args.spec.score = Score::kIdentity;
  p.stored_half.resize(1 << 16);
  std::iota(p.stored_half.begin(), p.stored_half.end(), uint16_t{0});
  p.args.logits = p.stored_half.data(), p.args.logits_type = DType::kFloat16, p.args.row_stride = 16;
  bool same = true;
  // Replaying each expert in turn returns its own logit as the weight.
  p.args.given.mode = GivenMode::kReplay;
  for (int e = 0; e < 16; ++e) {
    p.given_ids.assign(size_t(p.args.tokens), e);
    p.args.given.ids = p.given_ids.data();
    const Result r = run(p, set);
    for (int64_t t = 0; t < p.args.tokens; ++t) {
      const float expected = from_float16(p.stored_half[size_t(t * 16 + e)]);
      same &= r.weights[size_t(t)] == (std::isnan(expected) ? 0.0f : expected);
    }
  }
  check(same, "all 65536 halves");
}

void test_padding_and_empty(cpu::InstructionSet set) {
  Problem p = one_row({1, 2, 3, 4}, 2);
  p.tokens = {0, 0, -1, 0};
  p.args.token_table = p.tokens.data();
  const Result r = run(p, set);
  expect(r, {-1, -1}, {0, 0});
  check(std::all_of(r.groups.begin(), r.groups.end(), [](int64_t x) { return x == 0; }),
        "padding is in no statistic");
  cpu::gate_rows(p.args, 0, 0);  // nothing to do, nothing touched
  Problem unread = p;
  unread.args.logits = reinterpret_cast<const void*>(uintptr_t{64});  // would fault if read
  expect(run(unread, set), {-1, -1}, {0, 0});
}

void test_remap(cpu::InstructionSet set) {
  Problem p = one_row({4, 3, 2, 1}, 3, Renormalize::kNone);
  p.args.spec.score = Score::kIdentity;
  p.remap = {1, 1, -1, 3};
  p.tokens = {0, 0, -1, 1};
  p.args.steering.remap = p.remap.data(), p.args.steering.rows = 1, p.args.token_table = p.tokens.data();
  const Result r = run(p, set);
  expect(r, {1, -1, -1}, {7, 0, 0});
  check(r.groups[kStatEmpty] == 2 && r.groups[kStatSlots] == 3, "merged and dropped slots are empty");
}

void test_refusals() {
  context = "refusals";
  for (int bad = 0; bad < 4; ++bad) {
    Problem p = one_row({1, 2, 3, 4}, 2);
    if (bad == 0) p.args.k = 5;
    if (bad == 1) p.args.experts = 5000;
    if (bad == 2) p.args.spec.groups = 3;
    if (bad == 3) p.args.logits = nullptr;
    bool refused = false;
    try {
      cpu::gate_rows(p.args, 0, 1);
    } catch (const std::invalid_argument&) {
      refused = true;
    }
    check(refused, "bad call " + std::to_string(bad));
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int times = argc > 1 ? std::max(1, std::atoi(argv[1])) : 1;
  std::printf("portable");
  for (auto set : faster_sets()) std::printf(", %s", cpu::name(set));
  std::printf(": ");
  test_every_set_has_its_gate();
  test_math();
  on_every_set("hard logits", test_hard_logits);
  on_every_set("long rows", test_long_rows);
  on_every_set("cancelling softmax", test_cancelling_softmax);
  on_every_set("force", test_force);
  on_every_set("neutral steering", test_neutral_steering);
  on_every_set("half logits", test_half_logits);
  on_every_set("all float16", test_all_float16);
  on_every_set("padding", test_padding_and_empty);
  on_every_set("remap", test_remap);
  on_every_set("places", test_places);
  on_every_set("unmapped", test_unmapped);
  test_blocks();
  test_labels_return();
  test_refusals();
  test_against_oracle(1000 * times);
  test_instruction_sets(1000 * times);
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 ? 0 : 1;
}
