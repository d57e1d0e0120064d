// The gate of few experts, sixteen rows side by side: one row a lane from the first load to the last sum.
//
// Contract: the bits of gate_row.h. A logit passes the kept ones of its lane once, larger first, equal ones after:
// no step is horizontal, sums over experts follow the tree of gate_score.h stripe by stripe, and every term of a
// statistic is rounded before it is added to others. O(E k / 16) a row. Serves what most rows of such models are:
// sixteen valid ones that follow each other, unsteered, with the same labels, each with k numbers above -infinity
// and a finite norm. It says so before it writes anything; gate_row.h takes the others.
#pragma once
#include "gate_block.h"
#include "gate_count.h"
#include "gate_widths.h"

namespace moe_route::cpu {
namespace {

template <class F>
class FewExperts {
 public:
  using T = typename F::Scalar;
  static bool serves(const GateArgs& args) {
    constexpr Widths kWidths = widths_of(F::kSet);
    static_assert(kWidths.few_experts <= kFewExperts && kWidths.few_slots <= kFewSlots);
    return args.experts <= kWidths.few_experts && args.k <= kWidths.few_slots &&
           args.given.mode == GivenMode::kNone && args.spec.groups == 1 && args.spec.softcap == 0 &&
           !args.correction_bias && weighs_in_lanes(args);
  }

  FewExperts(const GateArgs& args, int64_t rows, bool scores)
      : args_(args),
        serves_(F::kTransposes && rows >= widths_of(F::kSet).few_rows && serves(args)),
        scores_(scores),
        softmax_(args.spec.score == Score::kSoftmax),
        over_chosen_(softmax_over_chosen<F>(args.spec, nullptr)) {
    if (!serves_) return;
    for (auto& plane : sums_) {
      for (int e = 0; e < args.experts; ++e) {
        for (int64_t& sum : plane[e]) sum = 0;
      }
    }
  }
  bool serves() const { return serves_; }

  // Sixteen rows from t on, of these labels. False: nothing was done.
  bool take(int64_t t, int64_t group, int64_t segment, Tally<F>& tally) {
    const int experts = args_.experts, k = args_.k;
    if (experts <= 8)
      return k <= 2 ? take<8, 2>(t, group, segment, tally) : take<8, 4>(t, group, segment, tally);
    if (experts <= 16)
      return k <= 2 ? take<16, 2>(t, group, segment, tally) : take<16, 4>(t, group, segment, tally);
    return take<32, 4>(t, group, segment, tally);
  }

  // Adds what lanes hold to the labels of the last rows taken.
  void flush(Tally<F>& tally) {
    if (!held_) return;
    held_ = false;
    constexpr StatPlane kPlanes[] = {kMass, kWeight, kShare};
    for (int p = 0; p < 3; ++p) {
      for (int e = 0; tally.wants(kPlanes[p]) && e < args_.experts; ++e) {
        int64_t sum = 0;
        for (int64_t& lane : sums_[p][e]) sum += lane, lane = 0;
        tally.add(kPlanes[p], e, sum);
      }
    }
  }

 private:
  template <int kColumns, int kSlots>
  [[gnu::noinline]] bool take(int64_t t, int64_t group, int64_t segment, Tally<F>& tally) {
    const int experts = args_.experts, k = args_.k;
    F z[kColumns];
    load<kColumns>(t, z);
    F value[kSlots], at[kSlots];  // at: ids as floats
    choose<kColumns>(z, value, at);
    if (bits(value[k - 1] > F(-infinity<T>())) != 0xffffu) return false;

    const bool counted = tally.counts(group, segment);
    const bool scored = counted && scores_;
    Scores scores;
    F score[kColumns];
    if (scored || (softmax_ && !over_chosen_ && weighs(counted, tally)))
      scores = softmax_ ? score_softmax<kColumns>(z, value[0], score) : score_pointwise<kColumns>(z, score);
    F weight[kSlots];
    if (weighs(counted, tally)) {
      for (int j = 0; j < kSlots; ++j) {
        weight[j] = value[j];
        if (softmax_ && !over_chosen_) weight[j] = numerator(value[j], value[0]) * scores.inverse;
      }
      if (weigh_lanes<F>(args_, weight, k) != 0) return false;
      if (counted && !fit_lanes(weight, k)) return false;
      if (args_.weights) write<kSlots>(weight, static_cast<T*>(args_.weights) + t * k);
    }
    if (args_.ids) {
      F ids[kSlots];
      for (int j = 0; j < kSlots; ++j) ids[j] = as_float(to_int(at[j]));
      write<kSlots>(ids, reinterpret_cast<T*>(args_.ids) + t * k);
    }
    if (!counted) return true;

    if (group != group_ || segment != segment_) {
      flush(tally);
      group_ = group, segment_ = segment;
    }
    tally.turn_to(group, segment);  // other rows may have turned it elsewhere in between
    tally.add(kStatTokens, kLanes);
    tally.add(kStatSlots, kLanes * k);
    for (int e = 0; tally.wants(StatPlane(kCounts | kNaturalCounts)) && e < experts; ++e) {
      int count = 0;
      for (int j = 0; j < k; ++j) count += __builtin_popcount(bits(at[j] == F(T(e))));
      tally.add(kCounts, e, count);
      tally.add(kNaturalCounts, e, count);
    }
    if (scored) add_scores<kColumns>(scores, score, tally);
    add_weights(weight, at, tally);
    return true;
  }

  bool weighs(bool counted, const Tally<F>& tally) const {
    return args_.weights || (counted && tally.wants_weights());
  }

  // ---- logits, one expert a vector ----------------------------------------------------------------

  template <int kColumns>
  void load(int64_t t, F (&z)[kColumns]) const {
    switch (args_.logits_type) {
      case DType::kBFloat16:
        return load<kColumns>(static_cast<const uint16_t*>(args_.logits), t, z, F::load_bfloat16,
                              F::pair_bfloat16);
      case DType::kFloat16:
        return load<kColumns>(static_cast<const uint16_t*>(args_.logits), t, z, F::load_float16,
                              F::pair_float16);
      default:
        return load<kColumns>(static_cast<const T*>(args_.logits), t, z, F::load, F::pair);
    }
  }

  template <int kColumns, class U, class Load, class Pair>
  void load(const U* logits, int64_t t, F (&z)[kColumns], Load load16, Pair load_pair) const {
    const int experts = args_.experts;
    const U* rows[kLanes];
    for (int r = 0; r < kLanes; ++r) rows[r] = logits + (t + r) * args_.row_stride;
    const int64_t ahead = kAhead * args_.row_stride;
    if (t + kLanes + kAhead <= args_.tokens) {
      for (int r = 0; r < kLanes; ++r) __builtin_prefetch(rows[r] + ahead);
      if (experts * sizeof(U) > 64)
        for (int r = 0; r < kLanes; ++r) __builtin_prefetch(rows[r] + ahead + 64 / sizeof(U));
    }
    U padded[kLanes][kColumns];
    if (experts < kColumns) {
      const U none = sizeof(U) == 2 ? U(0x7fff) : U(not_a_number<T>());
      for (int r = 0; r < kLanes; ++r) {
        for (int e = 0; e < kColumns; ++e) padded[r][e] = e < experts ? rows[r][e] : none;
        rows[r] = padded[r];
      }
    }
    if constexpr (kColumns == 8) {
      for (int i = 0; i < 4; ++i) {
        z[i] = load_pair(rows[i], rows[i + 4]);
        z[i + 4] = load_pair(rows[i + 8], rows[i + 12]);
      }
      transpose_pairs(z);
    } else {
      for (int first = 0; first < kColumns; first += kLanes) {
        F tile[kLanes];
        for (int r = 0; r < kLanes; ++r) tile[r] = load16(rows[r] + first);
        transpose(tile);
        for (int c = 0; c < kLanes; ++c) z[first + c] = tile[c];
      }
    }
  }

  // ---- choice ---------------------------------------------------------------------------------------

  // In rising e, so that of equal values the one kept before stays before. NaN is above nothing.
  template <int kColumns, int kSlots>
  static void choose(const F (&z)[kColumns], F (&value)[kSlots], F (&at)[kSlots]) {
    for (int j = 0; j < kSlots; ++j) value[j] = F(-infinity<T>()), at[j] = F(T(0));
    for (int e = 0; e < kColumns; ++e) {
      const F x = z[e], id(static_cast<T>(e));
      auto above = x > value[kSlots - 1];
      for (int j = kSlots - 1; j > 0; --j) {
        const auto above_next = x > value[j - 1];
        value[j] = select(above_next, value[j - 1], select(above, x, value[j]));
        at[j] = select(above_next, at[j - 1], select(above, id, at[j]));
        above = above_next;
      }
      value[0] = select(above, x, value[0]);
      at[0] = select(above, id, at[0]);
    }
  }

  // ---- scores of all experts ------------------------------------------------------------------------

  struct Scores {
    F total, inverse, entropy_sum;
  };

  static F numerator(F z, F largest) {
    const F share = select(z == largest, F(T(1)), F(T(0)));
    return select(largest == F(infinity<T>()), share, exp_nonpositive(z - largest));
  }

  // fold_add of the stripes e % 16.
  template <int kColumns>
  static F fold_columns(F (&x)[kColumns]) {
    for (int e = kLanes; e < kColumns; ++e) x[e - kLanes] = x[e - kLanes] + x[e];
    for (int apart = 8; apart > 0; apart /= 2) {
      for (int i = 0; i < apart && i + apart < kColumns; ++i) x[i] = x[i] + x[i + apart];
    }
    return x[0];
  }

  template <int kColumns>
  Scores finish_scores(const F (&score)[kColumns], F entropy_sum) const {
    F x[kColumns];
    for (int e = 0; e < kColumns; ++e) x[e] = score[e];
    Scores s;
    s.total = fold_columns(x);
    s.inverse = select(s.total > F(T(0)), F(T(1)) / s.total, F(T(0)));
    s.entropy_sum = entropy_sum;
    return s;
  }

  template <int kColumns>
  Scores score_softmax(const F (&z)[kColumns], F largest, F (&score)[kColumns]) const {
    const F zero(T(0));
    F sums[kColumns], entropy_sum = zero;
    for (int e = 0; e < kColumns; ++e) score[e] = numerator(z[e], largest);
    if (args_.statistics.entropy) {
      for (int e = 0; e < kColumns; ++e) {
        const F before = e < kLanes ? zero : sums[e % kLanes];
        sums[e % kLanes] = select(score[e] > zero, fma(score[e], z[e] - largest, before), before);
      }
      entropy_sum = select(largest == F(infinity<T>()), zero, fold_stripes<kColumns>(sums));
    }
    return finish_scores(score, entropy_sum);
  }

  template <int kColumns>
  Scores score_pointwise(const F (&z)[kColumns], F (&score)[kColumns]) const {
    const F zero(T(0)), tiny(smallest_normal<T>());
    F sums[kColumns], entropy_sum = zero;
    for (int e = 0; e < kColumns; ++e) score[e] = pointwise_score(args_.spec.score, z[e]);
    if (args_.statistics.entropy) {
      for (int e = 0; e < kColumns; ++e) {
        const F before = e < kLanes ? zero : sums[e % kLanes];
        sums[e % kLanes] = select(score[e] >= tiny, fma(score[e], log(score[e]), before), before);
      }
      entropy_sum = fold_stripes<kColumns>(sums);
    }
    return finish_scores(score, entropy_sum);
  }

  template <int kColumns>
  static F fold_stripes(F (&sums)[kColumns]) {
    constexpr int kStripes = kColumns < kLanes ? kColumns : kLanes;
    F x[kStripes];
    for (int i = 0; i < kStripes; ++i) x[i] = sums[i];
    return fold_columns(x);
  }

  // ---- outputs and statistics -----------------------------------------------------------------------

  template <int kSlots>
  void write(const F (&x)[kSlots], T* out) const {
    const int k = args_.k;
    if (k == 1) return x[0].store(out);
    F low, high;
    if (k == 2) {
      zip(x[0], x[1], low, high);
      low.store(out), high.store(out + kLanes);
      return;
    }
    if constexpr (kSlots == 4) {
      F even[2], odd[2];
      alignas(64) T rows[4 * kLanes];
      T* to = k == 4 ? out : rows;
      zip(x[0], x[2], even[0], even[1]);
      zip(x[1], x[3], odd[0], odd[1]);
      for (int half = 0; half < 2; ++half) {
        zip(even[half], odd[half], low, high);
        low.store(to + 2 * half * kLanes), high.store(to + (2 * half + 1) * kLanes);
      }
      for (int r = 0; k == 3 && r < kLanes; ++r) {
        for (int j = 0; j < 3; ++j) out[3 * r + j] = rows[4 * r + j];
      }
    }
  }

  // Terms that F::Fixed rounds as fixed_point() does.
  template <int kSlots>
  static bool fit_lanes(const F (&weight)[kSlots], int k) {
    uint32_t fit = 0xffffu;
    for (int j = 0; j < k; ++j) fit &= bits(abs(weight[j]) < F(T(0x1p+19f)));
    return fit == 0xffffu;
  }

  static void add_fixed(int64_t* sums, F term) {
    auto fixed = F::Fixed::load(sums);
    fixed.add(term * F(T(0x1p+32f)));
    fixed.store(sums);
  }

  template <int kColumns>
  void add_scores(const Scores& s, const F (&score)[kColumns], Tally<F>& tally) {
    const F zero(T(0));
    const uint32_t scored = bits(s.total >= F(smallest_normal<T>())) & bits(s.total < F(infinity<T>()));
    const F total = scored == 0xffffu ? s.total : select_bits(scored, s.total, F(T(1)));
    tally.add(kStatUnscored, kLanes - __builtin_popcount(scored));
    if (args_.statistics.entropy) {
      const F h = larger(log(total) - s.entropy_sum * s.inverse, zero);
      alignas(64) int64_t sums[kLanes] = {};
      add_fixed(sums, scored == 0xffffu ? h : select_bits(scored, h, zero));
      int64_t sum = 0;
      for (int64_t lane : sums) sum += lane;
      tally.add(kStatEntropy, sum);
    }
    if (!tally.wants(kMass)) return;
    held_ = true;
    for (int e = 0; e < args_.experts; ++e) {
      const F term = score[e] * s.inverse;
      add_fixed(sums_[0][e], scored == 0xffffu ? term : select_bits(scored, term, zero));
    }
  }

  static F select_bits(uint32_t lanes, F yes, F no) {
    alignas(64) T y[kLanes], n[kLanes];
    yes.store(y), no.store(n);
    for (int i = 0; i < kLanes; ++i) n[i] = lanes >> i & 1 ? y[i] : n[i];
    return F::load(n);
  }

  template <int kSlots>
  void add_weights(const F (&weight)[kSlots], const F (&at)[kSlots], Tally<F>& tally) {
    if (tally.wants(kWeight)) add_chosen(1, weight, at);
    if (!tally.wants(kShare)) return;
    const int k = args_.k;
    F total(T(0)), share[kSlots];
    for (int j = 0; j < k; ++j) total = total + weight[j];
    for (int j = 0; j < k; ++j) share[j] = select(total != F(T(0)), weight[j] / total, F(T(0)));
    add_chosen(2, share, at);
  }

  template <int kSlots>
  void add_chosen(int plane, const F (&term)[kSlots], const F (&at)[kSlots]) {
    held_ = true;
    const int k = args_.k;
    for (int e = 0; e < args_.experts; ++e) {
      F own(T(0));
      for (int j = 0; j < k; ++j) own = select(at[j] == F(T(e)), term[j], own);
      add_fixed(sums_[plane][e], own);
    }
  }

  static constexpr int64_t kAhead = 64;  // rows between a load and the one that it asks for

  const GateArgs& args_;
  const bool serves_;
  const bool scores_;
  const bool softmax_;
  const bool over_chosen_;
  bool held_ = false;
  int64_t group_ = -1;
  int64_t segment_ = -1;
  alignas(64) int64_t sums_[3][kFewExperts][kLanes];
};

}  // namespace
}  // namespace moe_route::cpu
