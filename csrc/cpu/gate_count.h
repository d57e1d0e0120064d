// Counting: what one pass over the rows adds to the statistics tables.
//
// Contract: int64 throughout; a term is rounded to 2^-32 once (nearest even) and then only added, so results
// do not depend on the order of rows or on how they are split. Rows of the same (group, segment) add up in
// one local row in the cache and reach both tables when the run ends. O(k) a token, O(E / 16) with mass.
#pragma once
#include "gate_weigh.h"

namespace moe_route::cpu {
namespace {

// Units of 2^-32, nearest even; terms are clamped to +-2^19, NaN is 0.
template <class T>
inline int64_t fixed_point(T x) {
  constexpr T kLimit = T(0x1p+19f);
  if (!(x == x)) return 0;
  const T clamped = x > kLimit ? kLimit : x < -kLimit ? -kLimit : x;
  return __builtin_llrint(double(clamped) * 0x1p+32);
}

template <class F>
class Tally {
 public:
  using T = typename F::Scalar;
  // The last vector of a plane may reach past it, with zeros.
  static size_t room(int experts) { return kStatScalars + 5 * size_t(experts) + kLanes; }
  Tally(Arena& arena, const GateStatistics& tables, int experts)
      : tables_(tables),
        experts_(experts),
        width_(kStatScalars + __builtin_popcount(tables.planes) * experts),
        sums_(arena.take<int64_t>(room(experts))) {
    clear(width_ + kLanes);
    counts_ = plane(kCounts), mass_ = plane(kMass), weight_ = plane(kWeight);
    share_ = plane(kShare), natural_ = plane(kNaturalCounts);
  }
  ~Tally() { add_to_tables(); }
  Tally(const Tally&) = delete;
  Tally& operator=(const Tally&) = delete;

  bool wants_scores() const { return mass_ || tables_.entropy; }
  bool wants_weights() const { return weight_ || share_ || natural_; }
  bool wants_natural() const { return natural_; }

  bool counts(int64_t group, int64_t segment) const {
    return (tables_.groups && group >= 0 && group < tables_.num_groups) ||
           (tables_.segments && segment >= 0 && segment < tables_.num_segments);
  }

  // Turns to the rows of a token that counts.
  void turn_to(int64_t group, int64_t segment) {
    if (!tables_.groups || group >= tables_.num_groups) group = -1;
    if (!tables_.segments || segment >= tables_.num_segments) segment = -1;
    if (group == group_ && segment == segment_) return;
    add_scores();
    if (add_to_tables()) clear(width_);
    group_ = group, segment_ = segment;
  }

  bool wants(StatPlane planes) const { return tables_.planes & planes; }
  // To the labels turned to.
  void add(StatScalar scalar, int64_t sum) { sums_[scalar] += sum; }
  void add(StatPlane bit, int e, int64_t sum) {
    if (int64_t* sums = plane(bit)) sums[e] += sum;
  }

  void token(int slots, bool steered) {
    sums_[kStatTokens] += 1;
    sums_[kStatSlots] += slots;
    sums_[kStatSteered] += steered;
  }

  // Remembers the scores of a row until add_scores(); of at most kMaxBlock rows.
  void take_scores(const RowScores<T>& r, const T* score) {
    if (!r.scored) {
      sums_[kStatUnscored] += 1;
      return;
    }
    total_[taken_] = r.total, entropy_sum_[taken_] = r.entropy_sum, inverse_[taken_] = r.inverse;
    score_[taken_++] = score;
  }

  // Adds them to the present labels: the sums stay in registers from row to row.
  void add_scores() {
    if (taken_ == 0) return;
    if (tables_.entropy) add_entropy();
    const F unit(T(0x1p+32f));
    for (int e = 0; mass_ && e < experts_; e += kLanes) {
      auto sums = F::Fixed::load(mass_ + e);
      for (int i = 0; i < taken_; ++i) sums.add(F::load(score_[i] + e) * F(inverse_[i]) * unit);
      sums.store(mass_ + e);
    }
    taken_ = 0;
  }

  void chosen(const Choice<F>& c, int slots) {
    if (c.compact) {
      sums_[kStatEmpty] += slots - c.count;
      return chosen(c.ids, c.weights, c.count);
    }
    chosen_with_holes(c, slots);
    if (share_) shares(c.ids, c.weights, c.count);
  }

  // Experts of a row without empty slots.
  void chosen(const int32_t* ids, const T* weights, int count) {
    if (int64_t* const counts = counts_) {
#pragma GCC unroll 4
      for (int j = 0; j < count; ++j) ++counts[ids[j]];
    }
    for (int j = 0; weight_ && j < count; ++j) weight_[ids[j]] += fixed_point(weights[j]);
    if (share_) shares(ids, weights, count);
  }

  // Natural choices: experts of a row, -1 for none.
  void natural(const int32_t* ids, int count) {
    for (int j = 0; j < count; ++j) {
      if (ids[j] >= 0) ++natural_[ids[j]];
    }
  }

  // ids: without steering, or null where the choice itself is natural.
  void compare(const Choice<F>& c, const int32_t* ids, int count) {
    if (ids == nullptr) return natural(c.ids, c.count);
    natural(ids, count);
    T moved = 0;
    for (int j = 0; j < c.count; ++j) {
      bool found = c.ids[j] < 0;
      for (int i = 0; i < count; ++i) found |= ids[i] == c.ids[j];
      if (found) continue;
      sums_[kStatFlipped] += 1;
      moved += c.weights[j];
    }
    const T total = sum_in_order(c.weights, c.count);
    if (total != T(0)) sums_[kStatMoved] += fixed_point(moved / total);
  }

 private:
  // Of the normalized scores, in nats; a lane a row.
  void add_entropy() {
    static_assert(kMaxBlock <= kLanes);
    for (int i = taken_; i < kLanes; ++i) total_[i] = T(1), entropy_sum_[i] = inverse_[i] = T(0);
    const F h = log(F::load(total_)) - F::load(entropy_sum_) * F::load(inverse_);
    alignas(64) T entropy[kLanes];
    larger(h, F(T(0))).store(entropy);
    for (int i = 0; i < taken_; ++i) sums_[kStatEntropy] += fixed_point(entropy[i]);
  }

  int64_t* plane(StatPlane bit) const {
    if (!(tables_.planes & bit)) return nullptr;
    return sums_ + kStatScalars + __builtin_popcount(tables_.planes & (bit - 1)) * experts_;
  }

  void chosen_with_holes(const Choice<F>& c, int slots) {
    int present = 0;
    for (int j = 0; j < c.count; ++j) {
      if (c.ids[j] < 0) continue;
      ++present;
      if (counts_) ++counts_[c.ids[j]];
      if (weight_) weight_[c.ids[j]] += fixed_point(c.weights[j]);
    }
    sums_[kStatEmpty] += slots - present;
  }

  void shares(const int32_t* ids, const T* weights, int count) {
    const T total = sum_in_order(weights, count);
    for (int j = 0; total != T(0) && j < count; ++j) {
      if (ids[j] >= 0) share_[ids[j]] += fixed_point(weights[j] / total);
    }
  }

  static void add(int64_t* row, const int64_t* sums, int64_t width) {
    for (int64_t i = 0; i < width; ++i) row[i] += sums[i];
  }

  // Says whether there was anything.
  bool add_to_tables() const {
    if (group_ >= 0) add(tables_.groups + group_ * width_, sums_, width_);
    if (segment_ >= 0) add(tables_.segments + segment_ * width_, sums_, width_);
    return group_ >= 0 || segment_ >= 0;
  }
  void clear(int64_t width) const { __builtin_memset(sums_, 0, size_t(width) * sizeof(int64_t)); }

  const GateStatistics& tables_;
  const int experts_;
  const int64_t width_;
  int64_t* const sums_;
  int64_t* counts_;
  int64_t* mass_;
  int64_t* weight_;
  int64_t* share_;
  int64_t* natural_;
  int64_t group_ = -1;
  int64_t segment_ = -1;
  // Rows whose scores are still to be added.
  int taken_ = 0;
  const T* score_[kMaxBlock];
  alignas(64) T total_[kLanes], entropy_sum_[kLanes], inverse_[kLanes];
};

}  // namespace
}  // namespace moe_route::cpu
