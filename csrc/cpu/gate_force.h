// Selection under force: forced-on experts first, forced-off ones last, forbidden ones nowhere.
//
// Contract: within a class as in gate_select.h, and then its NaN experts by index. The short list of the free
// experts, the largest class, is made with the block's other rows: of a copy of the values in which the forced
// ones are NaN. The rest is O(forced experts), unless numbers run out.
#pragma once
#include "gate_select.h"
#include "gate_steer.h"

namespace moe_route::cpu {
namespace {

// Slots that free experts can get.
template <class F>
inline int free_slots(const SteeringRow<F>& row, int slots) {
  return row.on_count < slots ? slots - row.on_count : 0;
}

// Values of the free experts, NaN at the others, into Workspace::masked.
template <class F>
inline const typename F::Scalar* free_values(const Workspace<F>& w, const SteeringRow<F>& row,
                                             const typename F::Scalar* values, int experts) {
  for (int e = 0; e < experts; e += kLanes) {
    const F x = F::load(values + e), none = load_vector<F>(row.free, e, experts);
    select(none == none, x, none).store(w.masked + e);
  }
  return w.masked;
}

template <class F>
class ForcedChoice {
 public:
  using T = typename F::Scalar;
  ForcedChoice(const Workspace<F>& w, const SteeringRow<F>& row, const T* values, int experts, int slots,
               int32_t* ids)
      : w_(w), row_(row), values_(values), experts_(experts), slots_(slots), ids_(ids) {}

  // Says how many were chosen, at most `slots`; their ids are in `ids`. listed: free experts on the short list.
  // ranked: their ids, best first, if they are sorted already.
  int choose(int listed, const int32_t* ranked) const {
    const int on = row_.on_count < slots_ ? row_.on_count : slots_;
    // First, since the short list is in the memory that ranking the others needs.
    int free = 0;
    if (ranked) {
      free = slots_ - on;
      for (int j = 0; j < free; ++j) ids_[on + j] = ranked[j];
    } else if (on < slots_) {
      free = select_listed<F>(w_, w_.masked, vectors_of(experts_), slots_ - on, listed, ids_ + on);
    }
    rank_class(row_.on, row_.on_count, on, ids_);
    const int chosen = append_nan(values_, experts_, slots_, on + free, ids_,
                                  [this](int e) { return row_.force[e] == kForceNone; });
    const int off = row_.off_count < slots_ - chosen ? row_.off_count : slots_ - chosen;
    rank_class(row_.off, row_.off_count, off, ids_ + chosen);
    return chosen + off;
  }

 private:
  // The `want` best of a class, its NaN experts last.
  void rank_class(const int32_t* list, int count, int want, int32_t* ids) const {
    if (want == 0) return;
    if (count == 1) {
      ids[0] = list[0];
      return;
    }
    int32_t ranked[kMaxSlots + kMaxCandidates + kLanes];
    int found = count > kMaxCandidates ? rank_many(list, count, want, ranked) : rank_few(list, count, ranked);
    for (int i = 0; i < count && found < want; ++i) {
      const T x = values_[list[i]];
      if (x != x) ranked[found++] = list[i];
    }
    for (int i = 0; i < want; ++i) ids[i] = ranked[i];
  }

  int rank_few(const int32_t* list, int count, int32_t* ranked) const {
    int numbers = 0;
    for (int i = 0; i < count; ++i) {
      const T x = values_[list[i]];
      w_.candidate[numbers] = x;
      w_.candidate_id[numbers] = list[i];
      numbers += x == x;
    }
    rank<F>(w_, numbers, ranked);
    return numbers;
  }

  int rank_many(const int32_t* list, int count, int want, int32_t* ranked) const {
    const int vectors = vectors_of(experts_);
    for (int v = 0; v < vectors; ++v) F(not_a_number<T>()).store(w_.masked + kLanes * v);
    for (int i = 0; i < count; ++i) w_.masked[list[i]] = values_[list[i]];
    const T bound = lower_bound<F>(w_.masked, vectors, want);
    return select_listed<F>(w_, w_.masked, vectors, want, shortlist<F>(w_, w_.masked, vectors, bound),
                            ranked);
  }

  const Workspace<F>& w_;
  const SteeringRow<F>& row_;
  const T* const values_;
  const int experts_;
  const int slots_;
  int32_t* const ids_;
};

}  // namespace
}  // namespace moe_route::cpu
