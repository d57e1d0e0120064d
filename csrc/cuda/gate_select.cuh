// Selection: the k best of E values: the larger value first, then the lower index; -0.0 equals +0.0; NaN
// never.
//
// A lane's largest value makes 32 columns of different experts, so the k-th largest of these bounds the k-th
// largest of the row from below. k rounds of redux.sync find it: take the largest, drop the lanes that hold
// it. The experts that reach the bound, about k + 1 on average however large E is, go to a short list in
// shared memory, and each is ranked by counting who beats it. Equal values show as ranks that collide, and
// only then the indices are compared. Where the list would be too long (k above 22, many ties) the exact k-th
// value is found by bisection over the bits of its key. Only comparisons decide, so the ids are those of
// every other backend.
#pragma once
#include "gate_warp.cuh"

namespace moe_route::cuda {
namespace {

inline constexpr int kMostChosen = 64;  // largest k
inline constexpr int kListRoom = 128;   // of the short list
inline constexpr int kColumnsFor = 16;  // largest k for which the bound keeps the list short
inline constexpr int kAtATime = 12;  // candidates that a rank looks at before it asks whether there are more

// Longest list that is ranked: one candidate a lane, or two where k may pass 32.
__host__ __device__ constexpr int most_listed(int values) { return values > 0 ? kLanes : kMostChosen; }

// A warp's list and choice in shared memory. `chosen_values` and `natural` are free once slots are read.
struct Selection {
  float listed[kListRoom + kAtATime];  // past the list's end come NaN, which beat nobody
  int32_t listed_ids[kListRoom + kAtATime];
  int32_t ids[kMostChosen];      // of the chosen, best first ...
  float chosen[kMostChosen];     // ... and what they were compared by
  int32_t natural[kMostChosen];  // ids without steering, where they are compared
};

// A value that at least `want` (1..32) of the row's numbers reach, or -infinity.
template <int kValues>
__device__ __forceinline__ float bound_of(const Values<kValues>& values, int experts, int want) {
  float most = -infinity();
  for_each_expert<kValues>(experts, [&](int i, int) { most = fmaxf(most, values[i]); });
  int32_t key = number_key(most), best = kLowestKey;
  const auto take_best = [&] {
    best = __reduce_max_sync(kWarp, key);
    key = key == best ? kNoKey : key;
  };
  if (want == 8) {
#pragma unroll
    for (int round = 0; round < 8; ++round) take_best();
  } else {
#pragma unroll 1
    for (int round = 0; round < want; ++round) take_best();
  }
  return number_of(best > kLowestKey ? best : kLowestKey);
}

// Lists the experts that `reaches` lets pass, in no order that matters, as far as there is room. Returns how
// many there are.
template <int kValues, class Reaches>
__device__ __forceinline__ int list_experts(const Values<kValues>& values, int experts, Selection& selection,
                                            Reaches reaches) {
  const auto put = [&](int place, int i, int e) {
    selection.listed[place] = values[i];
    selection.listed_ids[place] = e;
  };
  int count = 0;
  if constexpr (kValues > 0 && kValues <= 4) {
    const int first_id = kept(first_expert<kValues>(experts));
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      const bool mine = reaches(values[i]);
      const unsigned found = ballot(mine);
      const int place = count + __popc(found & lanes_below());
      if (mine) put(place, i, first_id + kStripes * i);  // of 128 experts at most
      count += __popc(found);
    }
  } else {
    int mine = 0;
    for_each_expert<kValues>(experts, [&](int i, int) { mine += reaches(values[i]) ? 1 : 0; });
    int next = mine;
#pragma unroll
    for (int apart = 1; apart < kLanes; apart *= 2) {
      const int before = __shfl_up_sync(kWarp, next, apart);
      next += lane() >= apart ? before : 0;
    }
    count = from_lane(next, kLanes - 1);
    next -= mine;
    for_each_expert<kValues>(experts, [&](int i, int e) {
      if (reaches(values[i]) && next < kListRoom) put(next++, i, e);
    });
  }
  return count;
}

template <int kValues>
__device__ __forceinline__ int count_above(const Values<kValues>& values, int experts, int32_t key) {
  int mine = 0;
  for_each_expert<kValues>(experts, [&](int i, int) { mine += order_key(values[i]) > key ? 1 : 0; });
  return fold_add(mine);
}

// Lists exactly the `want` best numbers (all of them, if fewer).
template <int kValues>
__device__ __forceinline__ int list_exactly(const Values<kValues>& values, int experts, int want,
                                            Selection& selection) {
  constexpr uint32_t kNaNKey = 0x80000000u;
  const int numbers = count_above<kValues>(values, experts, int32_t(kNaNKey));
  want = numbers < want ? numbers : want;
  if (want == 0) return 0;
  // `reached`: the largest key that at least `want` keys reach, built from its highest bit down.
  uint32_t reached = kNaNKey;
#pragma unroll 1
  for (int bit = 31; bit >= 0; --bit) {
    const uint32_t trial = reached + (1u << bit);
    if (count_above<kValues>(values, experts, int32_t(trial - 1)) >= want) reached = trial;
  }
  int listed = list_experts<kValues>(values, experts, selection,
                                     [&](float x) { return order_key(x) > int32_t(reached); });
  // Of those that equal it the lowest indices: the lower half's experts come before the upper half's.
#pragma unroll 1
  for (int half = 0; half < kLanes / kStripes; ++half) {
    for_each_expert<kValues>(experts, [&](int i, int e) {
      const bool equals = values[i] == values[i] && order_key(values[i]) == int32_t(reached);
      const unsigned found = ballot(equals && lane() / kStripes == half);
      const int place = listed + __popc(found & lanes_below());
      if ((found >> lane() & 1u) && place < want) {
        selection.listed[place] = values[i];
        selection.listed_ids[place] = e;
      }
      listed = listed + __popc(found) < want ? listed + __popc(found) : want;
    });
  }
  return want;
}

// How many of the list beat the candidate `own`, by value alone.
__device__ __forceinline__ int beaten_by(const Selection& selection, int count, float own) {
  const auto* fours = reinterpret_cast<const float4*>(selection.listed);
  int beaten = 0;
  const auto look_at = [&](int four) {
    const float4 x = fours[four];
    count_greater(beaten, x.x, own);
    count_greater(beaten, x.y, own);
    count_greater(beaten, x.z, own);
    count_greater(beaten, x.w, own);
  };
#pragma unroll
  for (int four = 0; four < kAtATime / 4; ++four) look_at(four);
#pragma unroll 1
  for (int four = kAtATime / 4; 4 * four < count; ++four) look_at(four);
  return beaten;
}

// ids[first + r] = the listed expert that exactly r others beat, for r < want; its value goes to `chosen`.
// `kMost`: the longest list there may be.
template <int kMost>
__device__ __forceinline__ void rank(Selection& selection, int count, int want, int first) {
  if (lane() < kAtATime) selection.listed[count + lane()] = not_a_number();
  __syncwarp();
#pragma unroll
  for (int c = 0; c < kMost; c += kLanes) {
    const bool there = c + lane() < count;
    const float own = selection.listed[c + lane()];
    const int32_t id = selection.listed_ids[c + lane()];
    int place = beaten_by(selection, count, own);
    const int taken = kMost == kLanes ? fold_or(there ? 1 << place : 0) : 0;
    if (__popc(static_cast<unsigned>(taken)) != count) {  // equal values
      for (int other = 0; other < count; ++other)
        place += selection.listed[other] == own && selection.listed_ids[other] < id ? 1 : 0;
    }
    if (there && place < want) {
      selection.ids[first + place] = id;
      selection.chosen[first + place] = own;
    }
  }
  __syncwarp();
}

// The `want` > 0 best numbers of a row, best first, to ids[first ...]; returns how many there were.
template <int kValues>
__device__ __forceinline__ int select_best(const Values<kValues>& values, int experts, int want, int first,
                                           Selection& selection) {
  constexpr int kMost = most_listed(kValues);
  int listed = kMost + 1;
  const bool all_fit = kValues <= 1 && experts <= kMost;
  if (want <= kColumnsFor || all_fit) {
    const float bound = !all_fit ? bound_of<kValues>(values, experts, want) : -infinity();
    listed = list_experts<kValues>(values, experts, selection, [&](float x) { return x >= bound; });
  }
  if (listed > kMost) {
    __syncwarp();
    listed = list_exactly<kValues>(values, experts, want, selection);
  }
  rank<kMost>(selection, listed, want, first);
  return listed < want ? listed : want;
}

// Appends the NaN experts that `eligible` lets pass, by index, until `want` are chosen. Returns how many are.
template <int kValues, class Eligible>
__device__ __forceinline__ int append_nan(const Values<kValues>& values, int experts, int want, int chosen,
                                          Selection& selection, Eligible eligible) {
#pragma unroll 1
  for (int half = 0; half < kLanes / kStripes; ++half) {
    for_each_expert<kValues>(experts, [&](int i, int e) {
      const bool mine = lane() / kStripes == half && e < experts && !(values[i] == values[i]) && eligible(e);
      const unsigned found = ballot(mine);
      const int place = chosen + __popc(found & lanes_below());
      if (mine && place < want) {
        selection.ids[place] = e;
        selection.chosen[place] = not_a_number();
      }
      chosen = chosen + __popc(found) < want ? chosen + __popc(found) : want;
    });
  }
  __syncwarp();
  return chosen;
}

// ---- group limit --------------------------------------------------------------------------------

// The largest and the second largest number seen.
struct TopTwo {
  float first = -infinity(), second = -infinity();
  __device__ __forceinline__ void see(float x) {
    second = fmaxf(second, fminf(x == x ? x : -infinity(), first));
    first = fmaxf(first, x);
  }
  __device__ __forceinline__ void merge(const TopTwo& other) {
    second = fmaxf(fmaxf(second, other.second), fminf(first, other.first));
    first = fmaxf(first, other.first);
  }
};

// Every group's score. As many lanes as there are for each group work on it, so that all of up to 32 groups
// go at once; they begin at different places, in different banks.
__device__ __forceinline__ void score_groups(const GateSpec& spec, int experts, const float* row,
                                             float* group_scores) {
  const int size = experts / spec.groups;
  int width = kLanes;  // lanes of a group, a power of two
  while (width > 1 && width * spec.groups > kLanes) width /= 2;
  const int within = lane() % width;
#pragma unroll 1
  for (int first = 0; first < spec.groups; first += kLanes / width) {
    const int group = first + lane() / width;
    TopTwo best;
    int at = (within + group * width) % size;
    const int steps = group < spec.groups ? (size - within + width - 1) / width : 0;
    if (size % width != 0) at = within;
#pragma unroll 4
    for (int step = 0; step < steps; ++step) {
      best.see(row[group * size + at]);
      at += width;
      at -= at >= size ? size : 0;
    }
    for (int apart = width / 2; apart > 0; apart /= 2)
      best.merge({__shfl_xor_sync(kWarp, best.first, apart), __shfl_xor_sync(kWarp, best.second, apart)});
    const float sum =
        spec.group_score == GroupScore::kMax || size == 1 ? best.first : best.first + best.second;
    if (within == 0 && group < spec.groups) group_scores[group] = sum == sum ? sum : -infinity();
  }
  __syncwarp();
}

// Keeps the best groups (larger score, then lower group); the values of the others become spec.group_fill.
// NaN stays NaN: it ranks last in whatever group. `row` is room for the values, `group_scores` for twice the
// groups; `reciprocal` is 2^32 / (experts of a group), rounded up (0 for one expert).
template <int kValues>
__device__ __forceinline__ void limit_groups(const GateSpec& spec, int experts, uint32_t reciprocal,
                                             float* row, float* group_scores, Values<kValues>& values) {
  for_each_expert<kValues>(experts, [&](int i, int e) {
    if (e < experts) row[e] = values[i];
  });
  __syncwarp();
  score_groups(spec, experts, row, group_scores);
  float* const kept = group_scores + spec.groups;
  for (int group = lane(); group < spec.groups; group += kLanes) {
    const float own = group_scores[group];
    int better = 0;
    for (int h = 0; h < spec.groups; ++h)
      better += group_scores[h] > own || (group_scores[h] == own && h < group) ? 1 : 0;
    kept[group] = better < spec.top_groups ? 1.0f : 0.0f;
  }
  __syncwarp();
  for_each_expert<kValues>(experts, [&](int i, int e) {
    const int group = reciprocal != 0 ? static_cast<int>(__umulhi(static_cast<unsigned>(e), reciprocal)) : e;
    const bool dropped = e < experts && kept[e < experts ? group : 0] == 0.0f;
    if (dropped && values[i] == values[i]) values[i] = spec.group_fill;
  });
  __syncwarp();
}

}  // namespace
}  // namespace moe_route::cuda
