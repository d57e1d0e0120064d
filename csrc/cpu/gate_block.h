// Steps that the rows of a block take together, one row a lane: sums over experts, standard deviations, the bounds
// and the order of their short lists, and the weights of their chosen.
//
// Contract: the bits of gate_select.h and gate_weigh.h, which a lane follows operation by operation; what they
// fold across a row's lanes costs no step here. Rows that ask for more than a lane knows (BlockWeights::serves) go the
// way of gate_weigh.h. For lanes that can be transposed (F::kTransposes).
#pragma once
#include <iterator>
#include <utility>

#include "gate_weigh.h"

namespace moe_route::cpu {
namespace {

// Green's network: 60 exchanges, larger values first.
struct Exchange {
  int8_t first, second;
};
inline constexpr Exchange kSort16[] = {
    {0, 1},   {2, 3},  {4, 5},   {6, 7},   {8, 9},   {10, 11}, {12, 13}, {14, 15}, {0, 2},  {1, 3},
    {4, 6},   {5, 7},  {8, 10},  {9, 11},  {12, 14}, {13, 15}, {0, 4},   {1, 5},   {2, 6},  {3, 7},
    {8, 12},  {9, 13}, {10, 14}, {11, 15}, {0, 8},   {1, 9},   {2, 10},  {3, 11},  {4, 12}, {5, 13},
    {6, 14},  {7, 15}, {5, 10},  {6, 9},   {3, 12},  {13, 14}, {4, 8},   {7, 11},  {1, 2},  {1, 4},
    {7, 13},  {2, 8},  {11, 14}, {2, 4},   {5, 6},   {9, 10},  {11, 13}, {3, 8},   {7, 12}, {6, 8},
    {10, 12}, {3, 5},  {7, 9},   {3, 4},   {5, 6},   {7, 8},   {9, 10},  {11, 12}, {6, 7},  {8, 9}};

template <class V>
inline void exchange(V& first, V& second) {
  const V high = larger(first, second);
  second = smaller(first, second);
  first = high;
}
template <class V>
inline void sort16(V (&x)[16]) {
  [&x]<size_t... kStep>(std::index_sequence<kStep...>) {
    (exchange(x[kSort16[kStep].first], x[kSort16[kStep].second]), ...);
  }(std::make_index_sequence<std::size(kSort16)>());
}

// fold_add() and fold_max() of up to 16 rows: value(lane) is what they give for the row put there.
template <class F>
class BlockFold {
 public:
  using T = typename F::Scalar;
  void clear() {
    for (auto& row : tile_) F(T(0)).store(row);
  }
  void put(int lane, const F& stripes) { stripes.store(tile_[lane]); }
  F add() {
    return fold([](F a, F b) { return a + b; });
  }
  F max() {
    return fold([](F a, F b) { return larger(b, a); });
  }

 private:
  template <class Op>
  F fold(Op op) {
    F x[kLanes];
    for (int i = 0; i < kLanes; ++i) x[i] = F::load(tile_[i]);
    transpose(x);
#pragma GCC unroll 4
    for (int apart = 8; apart > 0; apart /= 2) {
#pragma GCC unroll 8
      for (int i = 0; i < apart; ++i) x[i] = op(x[i], x[i + apart]);
    }
    return x[0];
  }
  alignas(64) T tile_[kLanes][kLanes];
};

// score_all() of up to 16 rows, in two steps: largest logits, where softmax wants them, then scores and their sums.
template <class F>
class BlockScores {
 public:
  using T = typename F::Scalar;
  static bool serves(Score score) { return score <= Score::kSqrtSoftplus; }

  void clear() {
    total_.clear(), entropy_.clear();
    for (T& x : largest_) x = T(0);
  }
  void take_logits(int lane, const T* z, int vectors) { total_.put(lane, largest_of<F>(z, vectors)); }
  void find_largest() { total_.max().store(largest_); }

  void take(int lane, const Workspace<F>& w, Score score, const T* z, int experts, bool entropy) {
    const ScoreSums<F> sums = score_sums<F>(w, score, z, experts, largest_[lane], entropy);
    total_.put(lane, sums.total);
    if (entropy) entropy_.put(lane, sums.entropy);
  }
  void finish(bool entropy) {
    const F total = total_.add(), zero(T(0));
    total.store(total_sum_);
    select(total > zero, F(T(1)) / total, zero).store(inverse_);
    if (entropy) entropy_.add().store(entropy_sum_);
  }
  RowScores<T> scores(int lane, Score score, bool entropy) const {
    RowScores<T> r;
    r.total = total_sum_[lane], r.inverse = inverse_[lane];
    if (entropy) r.entropy_sum = entropy_sum_[lane];
    r.scored = r.total >= smallest_normal<T>() && r.total < infinity<T>();
    if (is_softmax(score)) r.factor = r.inverse;
    return r;
  }

 private:
  BlockFold<F> total_, entropy_;
  alignas(64) T largest_[kLanes], total_sum_[kLanes], inverse_[kLanes], entropy_sum_[kLanes];
};

// standard_deviation() of up to 16 rows.
template <class F>
class BlockSpread {
 public:
  using T = typename F::Scalar;
  void clear() {
    sums_.clear();
    for (int i = 0; i < kLanes; ++i) count_[i] = degrees_[i] = T(1);
  }
  void take(int lane, const T* z, int experts, bool sample) {
    const F limit(infinity<T>()), zero(T(0));
    F sum = zero;
    int count = 0;
    for (int e = 0; e < experts; e += kLanes) {
      const F x = F::load(z + e);
      const auto finite = abs(x) < limit;
      sum = sum + select(finite, x, zero);
      count += __builtin_popcount(bits(finite));
    }
    sums_.put(lane, sum);
    count_[lane] = T(count > 0 ? count : 1);
    degrees_[lane] = T(count > 0 ? count - (sample ? 1 : 0) : 0);
  }
  void find_means() { (sums_.add() / F::load(count_)).store(mean_); }
  void take_squares(int lane, const T* z, int experts) {
    const F limit(infinity<T>()), zero(T(0)), mean(mean_[lane]);
    F squares = zero;
    for (int e = 0; e < experts; e += kLanes) {
      const F x = F::load(z + e);
      const F d = select(abs(x) < limit, x - mean, zero);
      squares = fma(d, d, squares);
    }
    sums_.put(lane, squares);
  }
  // Says which lanes overflow: standard_deviation() scales those.
  uint32_t finish() {
    const F squares = sums_.add(), degrees = F::load(degrees_), zero(T(0));
    select(degrees > zero, sqrt(squares / degrees), zero).store(mean_);
    return ~bits(squares < F(infinity<T>())) & 0xffffu;
  }
  T deviation(int lane) const { return mean_[lane]; }

 private:
  BlockFold<F> sums_;
  alignas(64) T count_[kLanes], degrees_[kLanes], mean_[kLanes];
};

// lower_bound() of up to 16 rows.
template <class F>
class BlockBounds {
 public:
  using T = typename F::Scalar;
  // Can lane by lane answer for so many wanted?
  static bool serves(int vectors, int wanted) { return vectors > 1 && columns_for(wanted) == 1; }

  void take(int lane, const T* values, int vectors) { largest_of<F>(values, vectors).store(tile_[lane]); }
  void sort() {
    F columns[kLanes];
    for (int i = 0; i < kLanes; ++i) columns[i] = F::load(tile_[i]);
    transpose(columns);
    sort16(columns);
    for (int i = 0; i < kLanes; ++i) columns[i].store(tile_[i]);
  }
  T bound(int lane, int wanted) const { return tile_[wanted - 1][lane]; }

 private:
  alignas(64) T tile_[kLanes][kLanes];
};

// Short lists of up to 16 rows, sorted side by side.
template <class F>
class BlockRanks {
 public:
  using T = typename F::Scalar;
  static constexpr int kLongest = kLanes;  // list

  void clear() {
    F(-infinity<T>()).store(none_);
    for (int i = 0; i < kLanes; ++i) values_[i] = none_, ids_[i] = none_id_, none_id_[i] = 0;
  }
  // The list of a row: `count` candidates, at most kLongest.
  void take(int lane, const Workspace<F>& w, int count) {
    F(-infinity<T>()).store(w.candidate + count);
    values_[lane] = w.candidate, ids_[lane] = w.candidate_id;
  }
  // The k first of every list: values into value[j][lane], and ids, by row, into sorted(lane).
  void sort(int k, T (*value)[kLanes]) {
    using Keys = typename F::Keys;
    for (int first = 0; first < kLanes; first += Keys::kRows) {
      Keys slots[kLanes];
      Keys::load(values_ + first, ids_ + first, slots);
      sort16(slots);
      for (int j = 0; j < k; ++j) slots[j].store(value[j] + first, sorted_[j] + first);
    }
    F rows[kLanes];
    for (int i = 0; i < kLanes; ++i) rows[i] = F::load(reinterpret_cast<const T*>(sorted_[i]));
    transpose(rows);
    for (int i = 0; i < kLanes; ++i) rows[i].store(reinterpret_cast<T*>(sorted_[i]));
  }
  const int32_t* sorted(int lane) const { return sorted_[lane]; }

 private:
  const T* values_[kLanes];
  const int32_t* ids_[kLanes];
  alignas(64) int32_t sorted_[kLanes][kLanes];
  alignas(64) T none_[kLanes];
  alignas(64) int32_t none_id_[kLanes];
};

// ---- weights, one row a lane --------------------------------------------------------------------

// Can weigh_lanes() do what the model asks of weights?
inline bool weighs_in_lanes(const GateArgs& args) {
  return args.spec.score <= Score::kSqrtSoftplus && args.spec.renormalize != Renormalize::kNorm &&
         args.expert_scale == nullptr;
}

template <class F>
inline F sum_lanes(const F* x, int k) {
  F sum(typename F::Scalar(0));
  for (int j = 0; j < k; ++j) sum = sum + x[j];
  return sum;
}
template <class F>
inline void divide_lanes(F* x, int k, F by) {
  const F zero(typename F::Scalar(0));
  const auto any = by != zero;
  for (int j = 0; j < k; ++j) x[j] = select(any, x[j] / by, zero);
}
template <class F>
inline void softmax_lanes(F* x, int k) {
  using T = typename F::Scalar;
  F largest(-infinity<T>());
  for (int j = 0; j < k; ++j) largest = larger(x[j], largest);
  const auto infinite = largest == F(infinity<T>());
  for (int j = 0; j < k; ++j) {
    const F share = select(x[j] == largest, F(T(1)), F(T(0)));
    x[j] = select(infinite, share, exp_nonpositive(x[j] - largest));
  }
}

// From logits of the chosen (their scores, where softmax runs over all experts and does not cancel) to weights, k
// slots of sixteen rows. Says which lanes have no finite norm: gate_weigh.h weighs those.
template <class F>
inline uint32_t weigh_lanes(const GateArgs& args, F* x, int k) {
  using T = typename F::Scalar;
  const GateSpec& spec = args.spec;
  const bool softmax = spec.score == Score::kSoftmax;
  if (softmax && softmax_over_chosen<F>(spec, nullptr)) {
    softmax_lanes(x, k);
  } else if (!softmax) {
    for (int j = 0; j < k; ++j) x[j] = pointwise_score(spec.score, x[j]);
  }
  if (softmax && spec.order == Order::kTopKThenScore) divide_lanes(x, k, sum_lanes(x, k));
  uint32_t left = 0;
  if (spec.renormalize != Renormalize::kNone) {
    const F eps(T(spec.eps));
    F norm = sum_lanes(x, k);
    if (spec.renormalize == Renormalize::kSum)
      norm = norm + eps;
    else
      norm = select(norm < eps, select(norm > F(-infinity<T>()), eps, norm), norm);
    left = ~bits(abs(norm) < F(infinity<T>())) & 0xffffu;
    divide_lanes(x, k, norm);
  }
  for (int j = 0; spec.scale != 1.0f && j < k; ++j) x[j] = x[j] * F(T(spec.scale));
  return left;
}

// Weights of up to 16 rows whose k slots are all taken.
template <class F>
class BlockWeights {
 public:
  using T = typename F::Scalar;
  explicit BlockWeights(const GateArgs& args)
      : args_(args),
        serves_(weighs_in_lanes(args)),
        weighs_scores_(args.spec.score == Score::kSoftmax && !softmax_over_chosen<F>(args.spec, nullptr)) {}
  void clear() {
    for (int j = 0; j < kLanes * vectors_of(args_.k); ++j) F(T(0)).store(tile_[j]);
  }

  bool serves(const SteeringRow<F>* row, const Choice<F>& c) const {
    return serves_ && c.compact && c.count == args_.k &&
           !(row && (row->weight_scale || row->score_bias_weighs));
  }

  // z: the row's steered logits; score: numerators of all experts where softmax does not cancel.
  void take(int lane, const T* z, const T* score, T inverse, const int32_t* ids) {
    const int k = args_.k;
    if (weighs_scores_) {
      for (int j = 0; j < k; ++j) tile_[j][lane] = score[ids[j]] * inverse;
    } else {
      for (int j = 0; j < k; ++j) tile_[j][lane] = z[ids[j]];
    }
  }

  // Where BlockRanks::sort may put the logits of the chosen itself: value[slot][lane].
  T (*chosen_logits()) [kLanes] { return tile_; } bool weighs_logits() const { return !weighs_scores_; }

  // Says which lanes are to be weighed by gate_weigh.h.
  uint32_t weigh() {
    const int k = args_.k;
    F x[kMaxSlots];
    for (int j = 0; j < k; ++j) x[j] = F::load(tile_[j]);
    const uint32_t left = weigh_lanes<F>(args_, x, k);
    for (int j = k; j < kLanes * vectors_of(k); ++j) x[j] = F(T(0));
    for (int j = 0; j < k; j += kLanes) {
      F rows[kLanes];
      for (int i = 0; i < kLanes; ++i) rows[i] = x[j + i];
      transpose(rows);
      for (int i = 0; i < kLanes; ++i) rows[i].store(tile_[j + i]);
    }
    return left;
  }

  // Slots j to j + 15 of a row, after weigh().
  const T* weights(int lane, int j) const { return tile_[j + lane]; }

 private:
  const GateArgs& args_;
  const bool serves_;
  const bool weighs_scores_;
  alignas(64) T tile_[kMaxSlots][kLanes];
};

}  // namespace
}  // namespace moe_route::cpu
