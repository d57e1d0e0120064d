// Steps that the rows of a block take together, one row a lane: the bounds of their short lists, and the
// weights of their chosen.
//
// Contract: the bits of gate_select.h and gate_weigh.h, which a lane follows operation by operation; what they
// fold across a row's lanes costs no step here. Rows that ask for more than a lane knows (kTakesPart) go the
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
    {0, 1},   {2, 3},   {4, 5},   {6, 7},  {8, 9},  {10, 11}, {12, 13}, {14, 15}, {0, 2},  {1, 3},
    {4, 6},   {5, 7},   {8, 10},  {9, 11}, {12, 14}, {13, 15}, {0, 4},  {1, 5},   {2, 6},  {3, 7},
    {8, 12},  {9, 13},  {10, 14}, {11, 15}, {0, 8},  {1, 9},   {2, 10}, {3, 11},  {4, 12}, {5, 13},
    {6, 14},  {7, 15},  {5, 10},  {6, 9},  {3, 12}, {13, 14}, {4, 8},  {7, 11},  {1, 2},  {1, 4},
    {7, 13},  {2, 8},   {11, 14}, {2, 4},  {5, 6},  {9, 10},  {11, 13}, {3, 8},   {7, 12}, {6, 8},
    {10, 12}, {3, 5},   {7, 9},   {3, 4},  {5, 6},  {7, 8},   {9, 10}, {11, 12}, {6, 7},  {8, 9}};

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

// lower_bound() of up to 16 rows.
template <class F>
class BlockBounds {
 public:
  using T = typename F::Scalar;
  // Can lane by lane answer for so many wanted?
  static bool serves(int vectors, int wanted) { return vectors > 1 && columns_for(wanted) == 1; }

  void take(int lane, const T* values, int vectors) {
    F best(-infinity<T>());
    for (int v = 0; v < vectors; ++v) best = larger(F::load(values + kLanes * v), best);
    best.store(tile_[lane]);
  }
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

  BlockRanks() {
    for (int i = 0; i < kLanes; ++i) none_[i] = -infinity<T>(), none_id_[i] = 0;
  }
  void clear() {
    for (int i = 0; i < kLanes; ++i) values_[i] = none_, ids_[i] = none_id_;
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

// Weights of up to 16 rows whose k slots are all taken.
template <class F>
class BlockWeights {
 public:
  using T = typename F::Scalar;
  explicit BlockWeights(const GateArgs& args)
      : args_(args),
        softmax_(args.spec.score == Score::kSoftmax),
        over_chosen_(softmax_over_chosen<F>(args.spec, nullptr)),
        serves_(args.spec.score <= Score::kSqrtSoftplus && args.spec.renormalize != Renormalize::kNorm &&
                args.expert_scale == nullptr) {
    if (!serves_) return;
    for (int j = 0; j < kLanes * ((args.k + kLanes - 1) / kLanes); ++j) F(T(0)).store(tile_[j]);
  }

  bool serves(const SteeringRow<F>* row, const Choice<F>& c) const {
    return serves_ && c.compact && c.count == args_.k && !(row && (row->weight_scale || row->score_bias_weighs));
  }

  // z: the row's steered logits; score: numerators of all experts where softmax does not cancel.
  void take(int lane, const T* z, const T* score, T inverse, const int32_t* ids) {
    const int k = args_.k;
    if (softmax_ && !over_chosen_) {
      for (int j = 0; j < k; ++j) tile_[j][lane] = score[ids[j]] * inverse;
    } else {
      for (int j = 0; j < k; ++j) tile_[j][lane] = z[ids[j]];
    }
  }

  // Where BlockRanks::sort may put the logits of the chosen itself: value[slot][lane].
  T (*chosen_logits())[kLanes] { return tile_; }
  bool weighs_logits() const { return over_chosen_ || !softmax_; }

  // Says which lanes are to be weighed by gate_weigh.h: those whose norm is not finite.
  uint32_t weigh() {
    const GateSpec& spec = args_.spec;
    const int k = args_.k;
    const F zero(T(0));
    if (over_chosen_) {
      softmax_of_lanes();
    } else if (!softmax_) {
      for (int j = 0; j < k; ++j) pointwise_score(spec.score, F::load(tile_[j])).store(tile_[j]);
    }
    if (softmax_ && spec.order == Order::kTopKThenScore) divide_lanes(sum_of_lanes());
    uint32_t left = 0;
    if (spec.renormalize != Renormalize::kNone) {
      const F eps(T(spec.eps));
      F norm = sum_of_lanes();
      if (spec.renormalize == Renormalize::kSum)
        norm = norm + eps;
      else
        norm = select(norm < eps, select(norm > F(-infinity<T>()), eps, norm), norm);
      left = ~bits(abs(norm) < F(infinity<T>())) & 0xffffu;
      divide_lanes(norm);
    }
    if (spec.scale != 1.0f) {
      for (int j = 0; j < k; ++j) (F::load(tile_[j]) * F(T(spec.scale))).store(tile_[j]);
    }
    for (int j = 0; j < k; j += kLanes) {
      F rows[kLanes];
      for (int i = 0; i < kLanes; ++i) rows[i] = F::load(tile_[j + i]);
      transpose(rows);
      for (int i = 0; i < kLanes; ++i) rows[i].store(tile_[j + i]);
    }
    return left;
  }

  // Slots j to j + 15 of a row, after weigh().
  const T* weights(int lane, int j) const { return tile_[j + lane]; }

 private:
  void softmax_of_lanes() {
    const int k = args_.k;
    F largest(-infinity<T>());
    for (int j = 0; j < k; ++j) largest = larger(F::load(tile_[j]), largest);
    const auto infinite = largest == F(infinity<T>());
    for (int j = 0; j < k; ++j) {
      const F z = F::load(tile_[j]);
      const F share = select(z == largest, F(T(1)), F(T(0)));
      select(infinite, share, exp_nonpositive(z - largest)).store(tile_[j]);
    }
  }
  F sum_of_lanes() const {
    F sum(T(0));
    for (int j = 0; j < args_.k; ++j) sum = sum + F::load(tile_[j]);
    return sum;
  }
  void divide_lanes(const F& by) {
    const auto any = by != F(T(0));
    for (int j = 0; j < args_.k; ++j) select(any, F::load(tile_[j]) / by, F(T(0))).store(tile_[j]);
  }

  const GateArgs& args_;
  const bool softmax_;
  const bool over_chosen_;
  const bool serves_;
  alignas(64) T tile_[kMaxSlots][kLanes];
};

}  // namespace
}  // namespace moe_route::cpu
