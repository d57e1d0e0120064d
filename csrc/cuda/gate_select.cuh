// Selection: the k best of E values: the larger value first, then the lower index; -0.0 equals +0.0; NaN
// never.
//
// As on the CPU (csrc/cpu/gate_select.h): a lane's largest value makes 16 columns of different experts, so
// the k-th largest of these bounds the k-th largest of the row from below. The experts that reach the
// bound, 10.6 on average for k = 8 however large E is, go to a short list in shared memory and are ranked by
// counting who beats whom; one 64-bit key holds value and index, so a comparison decides both. Up to k = 22
// two columns a lane do. Beyond that, and where ties make the list too long, the exact k-th value is found by
// bisection over the bits of the key. Only comparisons decide, so the ids are those of every other backend.
#pragma once
#include "gate_team.cuh"

namespace moe_route::cuda {
namespace {

inline constexpr int kListed = 64;      // room of the short list; no fewer than the largest k
inline constexpr int kOneColumn = 11;   // largest k that 16 columns serve,
inline constexpr int kTwoColumns = 22;  // and 32

// A team's slots and short list in shared memory.
struct Slots {
  unsigned long long* keys;  // [kListed + 2]
  float* listed;             // [kListed] values of the list
  int32_t* ids;              // [k rounded up to 16] ...
  float* logits;             // ... and as many
  float* weights;
};

// One step of a bitonic network: the lower lane of a pair keeps the larger value where `descending`.
__device__ __forceinline__ float exchange(float mine, int apart, bool descending) {
  const float other = __shfl_xor_sync(kWarp, mine, apart);
  const bool keeps_larger = ((team_lane() & apart) == 0) == descending;
  return keeps_larger ? fmaxf(mine, other) : fminf(mine, other);
}
__device__ __forceinline__ float merge(float mine, int size, bool descending) {
#pragma unroll
  for (int apart = size / 2; apart > 0; apart /= 2) mine = exchange(mine, apart, descending);
  return mine;
}
__device__ __forceinline__ float sort(float mine, bool descending) {
#pragma unroll
  for (int size = 2; size < kTeam; size *= 2)
    mine = merge(mine, size, ((team_lane() & size) == 0) == descending);
  return merge(mine, kTeam, descending);
}

// A value that at least `want` of the row's numbers reach, or -infinity.
template <int kVectors>
__device__ __forceinline__ float bound_by_one_column(const Values<kVectors>& values, int experts, int want) {
  float most = -infinity();
  for_each_expert<kVectors>(experts, [&](int i, int) { most = fmaxf(most, values[i]); });
  return from_lane(sort(most, true), want - 1);
}
template <int kVectors>
__device__ __forceinline__ float bound_by_two_columns(const Values<kVectors>& values, int experts, int want) {
  float even = -infinity(), odd = -infinity();
  for_each_expert<kVectors>(experts, [&](int i, int) {
    if (i % 2 == 0)
      even = fmaxf(even, values[i]);
    else
      odd = fmaxf(odd, values[i]);
  });
  const float falling = sort(even, true), rising = sort(odd, false);
  const float upper = merge(fmaxf(falling, rising), kTeam, true);
  const float lower = merge(fminf(falling, rising), kTeam, true);
  const int rank = want - 1;
  const float in_upper = from_lane(upper, rank), in_lower = from_lane(lower, rank);
  return rank < kTeam ? in_upper : in_lower;
}

// Lists the lane's experts that `reaches` lets pass, unless there are more than fit. Returns how many there
// are.
template <int kVectors, class Reaches>
__device__ __forceinline__ int list_experts(const Values<kVectors>& values, int experts, Slots slots,
                                            Reaches reaches) {
  int mine = 0;
  for_each_expert<kVectors>(experts, [&](int i, int) { mine += reaches(values[i]) ? 1 : 0; });
  int next = mine;
#pragma unroll
  for (int apart = 1; apart < kTeam; apart *= 2) {
    const int before = __shfl_up_sync(kWarp, next, apart, kTeam);
    next += team_lane() >= apart ? before : 0;
  }
  const int count = from_lane(next, kTeam - 1);
  next -= mine;
  for_each_expert<kVectors>(experts, [&](int i, int e) {
    if (reaches(values[i]) && count <= kListed) {
      slots.listed[next] = values[i];
      slots.keys[next] = static_cast<unsigned long long>(e);  // the key follows
      ++next;
    }
  });
  return count;
}

template <int kVectors>
__device__ __forceinline__ int count_above(const Values<kVectors>& values, int experts, int32_t key) {
  int mine = 0;
  for_each_expert<kVectors>(experts, [&](int i, int) { mine += order_key(values[i]) > key ? 1 : 0; });
  return fold_add(mine);
}

// Lists exactly the `want` best numbers (all of them, if fewer) where `wanted`; both teams walk through it.
template <int kVectors>
__device__ __forceinline__ int list_exactly(const Values<kVectors>& values, int experts, int want,
                                            bool wanted, Slots slots) {
  constexpr uint32_t kNaNKey = 0x80000000u;
  const int numbers = count_above<kVectors>(values, experts, int32_t(kNaNKey));
  want = numbers < want ? numbers : want;
  // `reached`: the largest key that at least `want` keys reach, built from its highest bit down.
  uint32_t reached = kNaNKey;
#pragma unroll 1
  for (int bit = 31; bit >= 0; --bit) {
    const uint32_t trial = reached + (1u << bit);
    if (count_above<kVectors>(values, experts, int32_t(trial - 1)) >= want) reached = trial;
  }
  const auto above = [&](float x) { return wanted && want > 0 && order_key(x) > int32_t(reached); };
  int listed = list_experts<kVectors>(values, experts, slots, above);
  for_each_expert<kVectors>(experts, [&](int i, int e) {
    const unsigned equal =
        ballot(wanted && order_key(values[i]) == int32_t(reached) && values[i] == values[i]);
    const int place = listed + __popc(equal & lanes_below());
    if ((equal >> team_lane() & 1u) && place < want) {
      slots.listed[place] = values[i];
      slots.keys[place] = static_cast<unsigned long long>(e);
    }
    listed = listed + __popc(equal) < want ? listed + __popc(equal) : want;
  });
  return wanted ? want : 0;
}

// Order of choice as one integer: the value's key, then the lower index.
__device__ __forceinline__ unsigned long long choice_key(float value, int32_t expert) {
  const uint32_t upper = uint32_t(order_key(value)) ^ 0x80000000u;
  return static_cast<unsigned long long>(upper) << 32 | uint32_t(~expert);
}

// ids[first + r] = the listed expert that exactly r others beat, for r < want; its value goes to `logits`.
__device__ __forceinline__ void rank(Slots slots, int count, int want, int first, int32_t* ids) {
  __syncwarp();
  for (int c = team_lane(); c < count; c += kTeam) {
    slots.keys[c] = choice_key(slots.listed[c], static_cast<int32_t>(slots.keys[c]));
  }
  if (team_lane() == 0) slots.keys[count] = 0;  // pairs are read below; nothing ranks lower
  __syncwarp();
  for (int c = team_lane(); c < count; c += kTeam) {
    const unsigned long long own = slots.keys[c];
    int beaten_by = 0;
    for (int other = 0; other < count; other += 2) {
      const ulonglong2 pair = *reinterpret_cast<const ulonglong2*>(slots.keys + other);
      beaten_by += (pair.x > own ? 1 : 0) + (pair.y > own ? 1 : 0);
    }
    if (beaten_by < want) {
      ids[first + beaten_by] = ~static_cast<int32_t>(own);
      slots.logits[first + beaten_by] = slots.listed[c];
    }
  }
  __syncwarp();
}

// The `want` best numbers of a row, best first, to ids[first ...]; returns how many there were. `most` is the
// launch's k, the same for both teams; `want` may be 0.
template <int kVectors>
__device__ __forceinline__ int select_best(const Values<kVectors>& values, int experts, int most, int want,
                                           int first, Slots slots, int32_t* ids) {
  int listed = kListed + 1;
  if (most <= kTwoColumns || experts <= kTeam) {
    float bound = -infinity();  // one vector: all of it fits the list
    if (kVectors != 1 && experts > kTeam) {
      bound = most <= kOneColumn ? bound_by_one_column<kVectors>(values, experts, want)
                                 : bound_by_two_columns<kVectors>(values, experts, want);
    }
    listed = list_experts<kVectors>(values, experts, slots, [&](float x) { return want > 0 && x >= bound; });
  }
  const bool too_long = want > 0 && listed > kListed;
  if (any(too_long)) {
    const int exactly = list_exactly<kVectors>(values, experts, want, too_long, slots);
    if (too_long) listed = exactly;
  }
  listed = want > 0 ? listed : 0;
  rank(slots, listed, want, first, ids);
  return listed < want ? listed : want;
}

// Appends the NaN experts that `eligible` lets pass, by index, until `want` are chosen. Returns how many are.
template <int kVectors, class Eligible>
__device__ __forceinline__ int append_nan(const Values<kVectors>& values, int experts, int want, int chosen,
                                          Slots slots, int32_t* ids, Eligible eligible) {
  for_each_expert<kVectors>(experts, [&](int i, int e) {
    const bool mine = chosen < want && e < experts && !(values[i] == values[i]) && eligible(e);
    const unsigned found = ballot(mine);
    const int place = chosen + __popc(found & lanes_below());
    if (mine && place < want) {
      ids[place] = e;
      slots.logits[place] = not_a_number();
    }
    chosen = chosen + __popc(found) < want ? chosen + __popc(found) : chosen < want ? want : chosen;
  });
  __syncwarp();
  return chosen;
}

// ---- group limit --------------------------------------------------------------------------------

// Keeps the best groups (larger score, then lower group); the values of the others become spec.group_fill.
// NaN stays NaN: it ranks last in whatever group. `row` is the team's copy of the values, `group_scores` has
// room for the groups.
template <int kVectors>
__device__ __forceinline__ void limit_groups(const GateSpec& spec, int experts, float* row,
                                             float* group_scores, Values<kVectors>& values) {
  const int size = experts / spec.groups;
  for_each_expert<kVectors>(experts, [&](int i, int e) {
    if (e < experts) row[e] = values[i];
  });
  __syncwarp();
  for (int g = 0; g < spec.groups; ++g) {
    float first = -infinity(), second = -infinity();
    for (int e = team_lane(); e < size; e += kTeam) {
      const float x = row[g * size + e];
      second = fmaxf(second, fminf(x == x ? x : -infinity(), first));
      first = fmaxf(first, x);
    }
#pragma unroll
    for (int apart = kTeam / 2; apart > 0; apart /= 2) {
      const float other = __shfl_xor_sync(kWarp, first, apart),
                  runner_up = __shfl_xor_sync(kWarp, second, apart);
      second = fmaxf(fmaxf(second, runner_up), fminf(first, other));
      first = fmaxf(first, other);
    }
    const float sum = spec.group_score == GroupScore::kMax || size == 1 ? first : first + second;
    if (team_lane() == 0) group_scores[g] = sum == sum ? sum : -infinity();
  }
  __syncwarp();
  // A lane's experts rise by 16, so its group rises with them.
  int group = team_lane() / size, within = team_lane() % size, checked = -1;
  bool dropped = false;
  for_each_expert<kVectors>(experts, [&](int i, int e) {
    if (e < experts && group != checked) {
      const float own = group_scores[group];
      int better = 0;
      for (int h = 0; h < spec.groups; ++h)
        better += group_scores[h] > own || (group_scores[h] == own && h < group);
      dropped = better >= spec.top_groups;
      checked = group;
    }
    if (dropped && e < experts && values[i] == values[i]) values[i] = spec.group_fill;
    within += kTeam;
    while (within >= size) within -= size, ++group;
  });
  __syncwarp();
}

}  // namespace
}  // namespace moe_route::cuda
