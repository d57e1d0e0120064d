// Selection: the k best of E values.
//
// Contract: larger value first, then lower index; -0.0 equals +0.0; NaN is never chosen here (the caller
// appends NaN experts by index where numbers run out). The same ids on every instruction set: only
// comparisons decide.
//
// Deal the row over 16 columns and take each column's largest value: 16 different experts. So the k-th
// largest of these 16 bounds the k-th largest of the row from below, and the experts that reach the bound are
// a short list (10.6 on average for k = 8, however large E is) that holds the k best. The list is ranked by
// counting who beats whom. Larger k takes 32, 64 or 128 columns. O(E / 16 + list^2 / 16), with hardly a
// branch that depends on the data while the list is short. Where it grows long (ties) the exact k-th value is
// found by bisection over the bits of the order key instead: O(32 E / 16).
#pragma once
#include "gate_workspace.h"
#include "moe_route/key.h"

namespace moe_route::cpu {
namespace {

inline constexpr int kMaxCandidates = 192;  // above, bisection is cheaper than ranking

// Vectors of columns for the `want` best: with 1.5 columns for each the list is about 1.6 times as long as
// needed.
inline int columns_for(int want) { return want <= 11 ? 1 : want <= 22 ? 2 : want <= 44 ? 4 : 8; }

// The k-th largest of 16 * kColumns values: the smallest that fewer than k exceed. No NaN among them.
template <int kColumns, class F>
inline typename F::Scalar kth_largest(const F (&columns)[kColumns], int k) {
  using T = typename F::Scalar;
  using Int = typename F::Int;
  alignas(64) T values[kLanes * kColumns];
  Int above[kColumns];
  for (int c = 0; c < kColumns; ++c) {
    columns[c].store(values + kLanes * c);
    above[c] = Int(0);
  }
#pragma GCC unroll 16
  for (int j = 0; j < kLanes * kColumns; ++j) {
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; ++c) above[c] = count_where(above[c], F(values[j]) > columns[c]);
  }
  F found(infinity<T>());
  for (int c = 0; c < kColumns; ++c)
    found = smaller(select(Int(k) > above[c], columns[c], F(infinity<T>())), found);
  return fold_min(found);
}

template <int kColumns, class F>
inline typename F::Scalar bound_by(const typename F::Scalar* values, int vectors, int want) {
  F best[kColumns];
  for (F& column : best) column = F(-infinity<typename F::Scalar>());
  const int dealt = vectors - vectors % kColumns;
  for (int v = 0; v < dealt; v += kColumns) {
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; ++c) best[c] = larger(F::load(values + kLanes * (v + c)), best[c]);
  }
  for (int v = dealt; v < vectors; ++v)
    best[v - dealt] = larger(F::load(values + kLanes * v), best[v - dealt]);
  return kth_largest(best, want);
}

// A value that at least `want` of the row's numbers reach, or -infinity.
template <class F>
inline typename F::Scalar lower_bound(const typename F::Scalar* values, int vectors, int want) {
  if (vectors == 1) return -infinity<typename F::Scalar>();  // all of them fit the short list
  switch (columns_for(want)) {
    case 1:
      return bound_by<1, F>(values, vectors, want);
    case 2:
      return bound_by<2, F>(values, vectors, want);
    case 4:
      return bound_by<4, F>(values, vectors, want);
    default:
      return bound_by<8, F>(values, vectors, want);
  }
}

template <class F>
inline typename F::Int first_experts() {
  using Key = decltype(as_int(typename F::Scalar()));
  alignas(64) static constexpr Key kFirst[kLanes] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return F::Int::load(kFirst);
}

// The experts whose value reaches `bound`, in rising index.
template <class F>
inline int shortlist(const Workspace<F>& w, const typename F::Scalar* values, int vectors,
                     typename F::Scalar bound) {
  int count = 0;
  auto ids = first_experts<F>();
  for (int v = 0; v < vectors; ++v) {
    const F x = F::load(values + kLanes * v);
    count = append(x, x >= F(bound), ids, w.candidate, w.candidate_id, count);
    ids = add(ids, typename F::Int(kLanes));
  }
  return count;
}

// Lanes j to 15 hold 1, those before 0.
template <class Key>
struct LanesFrom {
  alignas(64) Key lanes[2 * kLanes];
  constexpr LanesFrom() : lanes() {
    for (int i = kLanes; i < 2 * kLanes; ++i) lanes[i] = 1;
  }
};
template <class F>
inline typename F::Int lanes_from(int j) {
  static constexpr LanesFrom<decltype(as_int(typename F::Scalar()))> kLanesFrom{};
  return F::Int::load(kLanesFrom.lanes + kLanes - j);
}

// ids[r] = the candidate that exactly r others beat; candidates of equal value stand in rising index. "i beats j" is
// key[i] > key[j] for a later i, >= for an earlier one, that is key[i] > key[j] - 1: one comparison for value and tie
// rule. At most 16 of them: the rest of the vector is -infinity, later than any candidate, so all ranks differ.
template <class F>
inline void rank_short(const Workspace<F>& w, int count, int32_t* ids) {
  using Int = typename F::Int;
  using Key = decltype(as_int(typename F::Scalar()));
  const Int all = order_keys(F::load(w.candidate));
  alignas(64) Key lower[kLanes];
  add(all, Int(Key(-1))).store(lower);
  for (int first = 0; first < count; first += 4) {
#pragma GCC unroll 4
    for (int j = first; j < first + 4; ++j)
      ids[__builtin_popcount(bits(all > add(Int(lower[j]), lanes_from<F>(j))))] = w.candidate_id[j];
  }
}

// The same for any number. For one vector of candidates after the other, counts in every lane how many beat it: of
// those before the vector an equal one does, of those after it only a larger one, and inside it the rule is as above.
template <class F>
inline void rank_long(const Workspace<F>& w, int count, int32_t* ids) {
  using Int = typename F::Int;
  using Key = decltype(as_int(typename F::Scalar()));
  alignas(64) Key keys[kMaxCandidates + kLanes], beaten[kLanes];
  for (int j = 0; j < count; j += kLanes) order_keys(F::load(w.candidate + j)).store(keys + j);
  for (int first = 0; first < count; first += kLanes) {
    const Int own = Int::load(keys + first), lower = add(own, Int(Key(-1)));
    const int after = count - first < kLanes ? count : first + kLanes;
    Int by(Key(0));
    for (int j = 0; j < first; ++j) by = count_where(by, Int(keys[j]) > lower);
    for (int j = first; j < after; ++j)
      by = count_where(by, add(Int(keys[j]), lanes_from<F>(j - first + 1)) > own);
    for (int j = after; j < count; ++j) by = count_where(by, Int(keys[j]) > own);
    by.store(beaten);
    for (int j = first; j < after; ++j) ids[beaten[j - first]] = w.candidate_id[j];
  }
}

// Ids best first, of `count` candidates. ids has room for kMaxCandidates.
template <class F>
inline void rank(const Workspace<F>& w, int count, int32_t* ids) {
  F(-infinity<typename F::Scalar>()).store(w.candidate + count);
  if (count <= kLanes)
    rank_short(w, count, ids);
  else
    rank_long(w, count, ids);
}

template <class F>
inline int count_above(const Workspace<F>& w, int vectors, const typename F::Int& key) {
  int count = 0;
  for (int v = 0; v < vectors; ++v) count += __builtin_popcount(bits(w.keys[v] > key));
  return count;
}

// Exactly the `want` best (or all numbers, if fewer) as candidates.
template <class F>
inline int shortlist_exact(const Workspace<F>& w, const typename F::Scalar* values, int vectors, int want) {
  using Int = typename F::Int;
  using Key = decltype(math::as_int(typename F::Scalar()));
  using Unsigned = decltype(sizeof(Key) == 8 ? uint64_t() : uint32_t());
  for (int v = 0; v < vectors; ++v) w.keys[v] = order_keys(F::load(values + kLanes * v));
  constexpr Key kNaNKey = Key(Unsigned(1) << (8 * sizeof(Key) - 1));
  const int numbers = count_above(w, vectors, Int(kNaNKey));
  if (numbers < want) want = numbers;
  if (want == 0) return 0;
  // `reached`: the largest key that at least `want` keys reach, built from its highest bit down.
  Unsigned reached = Unsigned(kNaNKey);
  for (int bit = 8 * sizeof(Key) - 1; bit >= 0; --bit) {
    const Unsigned trial = reached + (Unsigned(1) << bit);
    if (count_above(w, vectors, Int(Key(trial - 1))) >= want) reached = trial;
  }
  int count = 0;
  Int ids = first_experts<F>();
  for (int v = 0; v < vectors; ++v) {
    count = append(F::load(values + kLanes * v), w.keys[v] > Int(Key(reached)), ids, w.candidate,
                   w.candidate_id, count);
    ids = add(ids, Int(kLanes));
  }
  for (int v = 0; v < vectors && count < want; ++v) {
    const auto equal = bits(w.keys[v] > Int(Key(reached - 1))) & ~bits(w.keys[v] > Int(Key(reached)));
    for (uint32_t left = equal; left != 0 && count < want; left &= left - 1) {
      const int e = kLanes * v + __builtin_ctz(left);
      w.candidate[count] = values[e];
      w.candidate_id[count++] = e;
    }
  }
  return count;
}

// The `want` best numbers of a row, best first; returns how many there were. `listed` is what shortlist()
// returned.
template <class F>
inline int select_listed(const Workspace<F>& w, const typename F::Scalar* values, int vectors, int want,
                         int listed, int32_t* ids) {
  if (listed > kMaxCandidates) listed = shortlist_exact<F>(w, values, vectors, want);
  rank(w, listed, ids);
  return listed < want ? listed : want;
}

// Appends the NaN experts that `eligible` lets pass, by index, until `want` are chosen.
template <class T, class Eligible>
inline int append_nan(const T* values, int experts, int want, int chosen, int32_t* ids, Eligible eligible) {
  for (int e = 0; e < experts && chosen < want; ++e) {
    if (values[e] != values[e] && eligible(e)) ids[chosen++] = e;
  }
  return chosen;
}

// ---- group limit --------------------------------------------------------------------------------

template <class T>
struct TopTwo {
  T first = -infinity<T>();
  T second = -infinity<T>();
};

template <class V>
inline void take_top_two(V x, V& first, V& second) {
  second = larger(smaller(x, first), second);
  first = larger(x, first);
}

// Two largest numbers of a group; -infinity where there are fewer.
template <class F>
inline TopTwo<typename F::Scalar> top_two(const typename F::Scalar* values, int count) {
  using T = typename F::Scalar;
  const F lowest(-infinity<T>());
  F first = lowest, second = lowest;
  for (int e = 0; e < count; e += kLanes) {
    const F x = load_vector<F>(values, e, count);
    take_top_two(select(x == x, x, lowest), first, second);
  }
  TopTwo<T> top;
  top.first = fold_max(first);
  const auto winners = bits(first == F(top.first));
  // The runner-up is a lane's second, another lane's first, or the same value once more.
  const F others = select(first == F(top.first), second, first);
  top.second = winners & (winners - 1) ? top.first : fold_max(larger(others, second));
  return top;
}

// Keeps the best groups (larger score, then lower group); the values of the others become spec.group_fill.
// NaN stays NaN: it ranks last in whatever group.
template <class F>
inline void limit_groups(const Workspace<F>& w, const GateSpec& spec, typename F::Scalar* values,
                         int experts) {
  using T = typename F::Scalar;
  const int size = experts / spec.groups;
  T* group_score = w.candidate;
  for (int g = 0; g < spec.groups; ++g) {
    const TopTwo<T> top = top_two<F>(values + g * size, size);
    const T score = spec.group_score == GroupScore::kMax || size == 1 ? top.first : top.first + top.second;
    group_score[g] = score == score ? score : -infinity<T>();
  }
  for (int g = 0; g < spec.groups; ++g) {
    int better = 0;
    for (int h = 0; h < spec.groups; ++h) {
      better += group_score[h] > group_score[g] || (group_score[h] == group_score[g] && h < g);
    }
    if (better < spec.top_groups) continue;
    for (int e = g * size; e < (g + 1) * size; ++e) {
      if (values[e] == values[e]) values[e] = T(spec.group_fill);
    }
  }
}

}  // namespace
}  // namespace moe_route::cpu
