// Random gate calls for the tests of the backends: everything on and off at random, or as it is asked for.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "moe_route/gate.h"

namespace moe_route::test {

inline constexpr float kInf = std::numeric_limits<float>::infinity();
inline constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// SplitMix64: the same numbers with every standard library.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t bits() {
    uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
  }
  int below(int n) { return static_cast<int>(bits() % static_cast<uint64_t>(n)); }
  bool one_in(int n) { return below(n) == 0; }
  float bell() {  // close to normal: mean 0, variance 1, within +-3.5
    const uint64_t b = bits();
    const auto sum = (b & 0xffff) + (b >> 16 & 0xffff) + (b >> 32 & 0xffff) + (b >> 48);
    return (static_cast<float>(sum) - 131070.0f) * (1.7320508f / 65535.0f);
  }
  template <class T, size_t N>
  T pick(const T (&from)[N]) {
    return from[below(N)];
  }
  template <class T>
  void shuffle(std::vector<T>& values) {
    for (size_t i = values.size(); i > 1; --i) {
      std::swap(values[i - 1], values[static_cast<size_t>(bits() % i)]);
    }
  }

 private:
  uint64_t state_;
};

// What a test asks for; the rest is drawn.
struct GateWish {
  std::optional<int> experts, k, tokens, force;
  std::optional<DType> type;
  std::optional<Score> score;
  std::optional<Order> order;
  std::optional<Renormalize> renormalize;
  std::optional<uint32_t> planes;  // of the steering tables
  std::optional<GivenMode> given;
};

// A call and all that it reads. `args.weights`, `args.ids` and the statistics are left to who makes the call.
struct GateProblem {
  GateArgs args;
  bool wants_weights = true, wants_ids = true;
  std::vector<float> logits;
  std::vector<uint16_t> half_logits;
  std::vector<float> correction, expert_scale, tables, row_params, given_weights;
  std::vector<uint16_t> given_half_weights;
  std::vector<int32_t> remap, tokens, given_ids;
  std::vector<int64_t> given_ids64;
};

// Rounded towards zero: a test only needs valid halves.
inline uint16_t to_half(float x, DType type) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  const auto sign = static_cast<uint16_t>(u >> 16 & 0x8000);
  const uint32_t magnitude = u & 0x7fffffff;
  if (type == DType::kBFloat16) return x != x ? 0x7fc0 : static_cast<uint16_t>(u >> 16);
  if (magnitude >= 0x7f800000) return static_cast<uint16_t>(sign | (x != x ? 0x7e00 : 0x7c00));
  if (magnitude >= 0x47800000) return static_cast<uint16_t>(sign | 0x7bff);
  if (magnitude < 0x38800000) {  // subnormal: units of 2^-24
    return static_cast<uint16_t>(sign | static_cast<uint16_t>((x < 0 ? -x : x) * 0x1p24f));
  }
  return static_cast<uint16_t>(sign | (magnitude - 0x38000000) >> 13);
}

class GateDraw {
 public:
  GateDraw(uint64_t seed, const GateWish& wish) : g_(seed), wish_(wish) {}

  GateProblem draw() {
    shape();
    spec();
    statistics();
    const bool steered = wish_.planes ? *wish_.planes != 0 : g_.one_in(2);
    if (steered) steering();
    logits();
    given();
    if (steered || !g_.one_in(4)) tokens();
    if (g_.one_in(6)) a_.spec.softcap = g_.one_in(2) ? 3.0f : 0.75f;
    return std::move(p_);
  }

 private:
  void shape() {
    static constexpr int kExperts[] = {1,   6,   8,   16,  60,  64,  67,  72,  128,
                                       128, 160, 256, 257, 384, 512, 896, 1536};
    a_.experts = wish_.experts ? *wish_.experts : g_.one_in(2) ? g_.pick(kExperts) : 1 + g_.below(200);
    const int ks[] = {1, 2, 4, 6, 8, 8, 10, 12, 16, 22, 33, 40, 64, a_.experts, a_.experts - 1};
    const int k = wish_.k ? *wish_.k : g_.pick(ks);
    a_.k = std::min(std::max(k, 1), std::min(a_.experts, 64));
    a_.tokens = wish_.tokens ? *wish_.tokens : 1 + g_.below(40);
  }

  void spec() {
    GateSpec& s = a_.spec;
    s.score = wish_.score ? *wish_.score : static_cast<Score>(g_.below(5));
    s.order = wish_.order ? *wish_.order : static_cast<Order>(g_.below(2));
    s.renormalize = wish_.renormalize ? *wish_.renormalize : static_cast<Renormalize>(g_.below(4));
    static constexpr float kNorms[] = {1.0f, 2.0f, 3.0f, 0.5f, kInf};
    s.norm_p = g_.pick(kNorms);
    if (g_.one_in(2)) s.eps = 1e-6f;
    if (g_.one_in(3)) s.scale = 2.5f;
    s.jitter = 0.01f * static_cast<float>(g_.below(20));
    if (g_.one_in(3)) groups(s);
    for (int e = 0; e < a_.experts; ++e) {
      p_.correction.push_back(0.3f * g_.bell());
      p_.expert_scale.push_back(1.0f + 0.2f * g_.bell());
    }
    if (g_.one_in(3)) a_.correction_bias = p_.correction.data();
    if (g_.one_in(4)) a_.expert_scale = p_.expert_scale.data();
  }

  void groups(GateSpec& s) {
    std::vector<int> divisors;
    for (int d = 1; d <= a_.experts; ++d) {
      if (a_.experts % d == 0) divisors.push_back(d);
    }
    s.groups = divisors[static_cast<size_t>(g_.below(static_cast<int>(divisors.size())))];
    s.top_groups = 1 + g_.below(s.groups);
    s.group_score = static_cast<GroupScore>(g_.below(2));
    s.group_fill = g_.one_in(2) ? 0.0f : -kInf;
  }

  void statistics() {
    GateStatistics& s = a_.statistics;
    s.num_groups = g_.below(4);
    s.num_segments = g_.below(4);
    s.planes = g_.one_in(4) ? 31 : static_cast<uint32_t>(g_.below(32));
    s.entropy = g_.one_in(2);
    if (g_.one_in(8)) p_.wants_weights = p_.wants_ids = false;  // counting only
  }

  void steering() {
    GateSteering& s = a_.steering;
    s.rows = 1 + g_.below(g_.one_in(4) ? 20 : 4);
    s.planes = wish_.planes ? *wish_.planes : static_cast<uint32_t>(g_.below(128));
    if (wish_.force) s.planes |= kForce;
    for (int64_t row = 0; row < s.rows; ++row) {
      const bool neutral = g_.one_in(4) && s.rows > 1;
      for (uint32_t bit = 1; bit <= kForce; bit <<= 1) {
        if (s.planes & bit) steering_plane(bit, neutral);
      }
      steering_row(neutral || g_.one_in(2));
    }
    s.tables = s.planes ? p_.tables.data() : nullptr;
    if (g_.one_in(2)) s.row_params = p_.row_params.data();
    if (g_.one_in(3)) s.remap = p_.remap.data();
  }

  void steering_plane(uint32_t bit, bool neutral_row) {
    static constexpr float kWild[] = {kInf,  -kInf, kNaN, 1e9f, -1e9f, std::numeric_limits<float>::max(),
                                      1e-42f};
    static constexpr float kNoCodes[] = {4.0f, -5.0f, 0.5f, -2.5f, 1e9f, kNaN, kInf};
    const bool factor = bit == kScale || bit == kWeightScale, wild = g_.one_in(3);
    const int rate = 1 + g_.below(6);
    for (int e = 0; e < a_.experts; ++e) {
      float x = factor ? 1.0f : 0.0f;
      if (!neutral_row && g_.one_in(rate)) {
        x = bit == kForce ? static_cast<float>(wish_.force ? *wish_.force : g_.below(8) - 4)
            : factor      ? 0.2f + 0.3f * (g_.bell() + 3.5f)
                          : g_.bell();
        if (wild && g_.one_in(10)) x = bit == kForce ? g_.pick(kNoCodes) : g_.pick(kWild);
      }
      p_.tables.push_back(x);
    }
  }

  void steering_row(bool neutral) {
    const float params[kRowParams] = {neutral ? 1.0f : 0.3f + 0.3f * (g_.bell() + 3.5f),
                                      neutral ? 0.0f : static_cast<float>(g_.below(a_.k + 1)),
                                      static_cast<float>(g_.below(2)), static_cast<float>(g_.below(2)),
                                      static_cast<float>(g_.below(2))};
    p_.row_params.insert(p_.row_params.end(), params, params + kRowParams);
    for (int e = 0; e < a_.experts; ++e) {
      p_.remap.push_back(neutral || !g_.one_in(3) ? e : g_.below(a_.experts + 2) - 1);
    }
  }

  // Values in [T, E], then in their type with a stride. Nothing lies past the last row: a read there is an
  // error that memory checkers see.
  void logits() {
    const float spread = g_.one_in(4) ? 30.0f : 2.0f;
    const int64_t experts = a_.experts;
    std::vector<float> values(static_cast<size_t>(a_.tokens * experts));
    for (float& x : values) x = spread * g_.bell();
    if (g_.one_in(2)) {
      for (int64_t t = 0; t < a_.tokens; ++t) {
        if (g_.one_in(3)) strange_row(values.data() + t * experts);
      }
    }
    static constexpr DType kTypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};
    a_.logits_type = wish_.type ? *wish_.type : g_.pick(kTypes);
    a_.row_stride = experts + (g_.one_in(2) ? 0 : g_.below(40));
    const size_t size = a_.tokens > 0 ? static_cast<size_t>((a_.tokens - 1) * a_.row_stride + experts) : 0;
    const bool wide = a_.logits_type == DType::kFloat32;
    if (wide) p_.logits.assign(size, kNaN);
    if (!wide) p_.half_logits.assign(size, 0x7fff);
    for (int64_t t = 0; t < a_.tokens; ++t) {
      for (int64_t e = 0; e < experts; ++e) {
        const auto at = static_cast<size_t>(t * a_.row_stride + e);
        const float x = values[static_cast<size_t>(t * experts + e)];
        if (wide) p_.logits[at] = x;
        if (!wide) p_.half_logits[at] = to_half(x, a_.logits_type);
      }
    }
    a_.logits = wide ? static_cast<const void*>(p_.logits.data()) : p_.half_logits.data();
  }

  void strange_row(float* row) {
    static constexpr float kStrange[] = {kNaN,  kInf,   -kInf,  0.0f,    -0.0f,
                                         1e30f, -1e30f, 200.0f, -200.0f, 1e-42f};
    const int kind = g_.below(4), rate = 1 + g_.below(8);
    const float fixed = g_.pick(kStrange);
    for (int e = 0; e < a_.experts; ++e) {
      if (kind == 0) row[e] = fixed;
      if (kind == 1 && g_.one_in(rate)) row[e] = fixed;
      if (kind == 2 && g_.one_in(rate)) row[e] = g_.pick(kStrange);
      if (kind == 3) row[e] = static_cast<float>(g_.below(1 + rate)) - 2.0f;  // ties
    }
  }

  void given() {
    static constexpr GivenMode kModes[] = {GivenMode::kNone, GivenMode::kNone, GivenMode::kNatural,
                                           GivenMode::kReplay, GivenMode::kBaseline};
    a_.given.mode = wish_.given ? *wish_.given : g_.pick(kModes);
    if (a_.given.mode == GivenMode::kNone) return;
    std::vector<int32_t> order(static_cast<size_t>(a_.experts));
    std::iota(order.begin(), order.end(), 0);
    for (int64_t t = 0; t < a_.tokens; ++t) {
      g_.shuffle(order);
      const bool none = g_.one_in(4);
      for (int j = 0; j < a_.k; ++j) {
        int32_t id = none ? -1 : order[static_cast<size_t>(j)];
        if (!none && j > 0 && g_.one_in(8)) id = g_.one_in(2) ? -1 : a_.experts + g_.below(3);
        p_.given_ids.push_back(id);
        p_.given_ids64.push_back(id >= a_.experts && g_.one_in(2) ? int64_t{id} << 32 : id);
        p_.given_weights.push_back(g_.bell());
      }
    }
    given_types();
  }

  void given_types() {
    const bool wide = g_.one_in(2);
    a_.given.ids_type = wide ? DType::kInt64 : DType::kInt32;
    a_.given.ids = wide ? static_cast<const void*>(p_.given_ids64.data()) : p_.given_ids.data();
    a_.given.every_row = g_.one_in(2);
    static constexpr DType kTypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};
    a_.given.weights_type = g_.pick(kTypes);
    for (float x : p_.given_weights) p_.given_half_weights.push_back(to_half(x, a_.given.weights_type));
    if (g_.one_in(2)) return;  // recomputed
    a_.given.weights = a_.given.weights_type == DType::kFloat32
                           ? static_cast<const void*>(p_.given_weights.data())
                           : p_.given_half_weights.data();
  }

  void tokens() {
    static constexpr int32_t kAbsurd[] = {std::numeric_limits<int32_t>::min(), -2, 1000,
                                          std::numeric_limits<int32_t>::max()};
    const auto index = [&](int64_t rows) {
      return g_.one_in(12) ? g_.pick(kAbsurd) : g_.below(static_cast<int>(rows) + 2) - 1;
    };
    const bool runs = !g_.one_in(4);  // of equal tokens, as sequences have them
    int32_t row = 0, group = 0, segment = 0;
    for (int64_t t = 0; t < a_.tokens; ++t) {
      if (!runs || g_.one_in(3)) row = index(a_.steering.rows);
      if (!runs || g_.one_in(4)) group = index(a_.statistics.num_groups);
      if (!runs || g_.one_in(4)) segment = index(a_.statistics.num_segments);
      const int32_t token[kTokenColumns] = {row, group, segment, g_.one_in(8) ? 0 : 1};
      p_.tokens.insert(p_.tokens.end(), token, token + kTokenColumns);
    }
    a_.token_table = p_.tokens.data();
  }

  Random g_;
  const GateWish& wish_;
  GateProblem p_;
  GateArgs& a_ = p_.args;
};

// Other contents for the same call: nothing that `args` says changes.
inline void reroll(GateProblem& p, uint64_t seed) {
  Random g(seed);
  g.shuffle(p.logits), g.shuffle(p.half_logits), g.shuffle(p.tables);
  g.shuffle(p.correction), g.shuffle(p.expert_scale), g.shuffle(p.remap);
  std::rotate(p.tokens.begin(), p.tokens.begin() + (p.tokens.empty() ? 0 : kTokenColumns), p.tokens.end());
  for (size_t i = 0; i < p.row_params.size(); i += kRowParams) {
    p.row_params[i + kRowTemperature] = 0.5f + static_cast<float>(g.below(4));
    p.row_params[i + kRowTopK] = static_cast<float>(g.below(p.args.k + 1));
  }
}

inline GateProblem draw_gate(uint64_t seed, const GateWish& wish = {}) { return GateDraw(seed, wish).draw(); }

}  // namespace moe_route::test
