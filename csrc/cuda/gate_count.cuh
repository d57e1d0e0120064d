// Counting: what one pass over the rows adds to the statistics tables.
//
// int64 throughout; a term is rounded to 2^-32 once (nearest even) and then only added, so the result depends
// neither on the grid nor on the order in which blocks run. What belongs to the (group, segment) of a block's
// first counted token is added up in one row in shared memory, where that row fits, and reaches the tables
// when the block ends; anything else goes there at once. Mass, which every expert gets from every token, is
// summed in registers as long as the (group, segment) stays the same.
#pragma once
#include "gate_layout.h"
#include "gate_weigh.cuh"

namespace moe_route::cuda {
namespace {

// Units of 2^-32, nearest even; terms are clamped to +-2^19, NaN is 0. Scaling by 2^32 is exact.
__device__ __forceinline__ long long fixed_point(float x) {
  if (!(x == x)) return 0;
  return __float2ll_rn(fminf(fmaxf(x, -0x1p+19f), 0x1p+19f) * 0x1p+32f);
}

// The same of what is known to be a number from 0 to 2^19.
__device__ __forceinline__ long long fixed_point_of_tame(float x) { return __float2ll_rn(x * 0x1p+32f); }

using Sum = unsigned long long;  // int64 in two's complement, as atomics take it

// 64-bit addition to shared memory, of which hardware has the 32-bit kind: the low half's carry goes to the
// high half.
__device__ __forceinline__ void add_to_shared(Sum* sum, Sum term) {
  auto* halves = reinterpret_cast<unsigned*>(sum);
  const auto low = static_cast<unsigned>(term);
  const unsigned before = atomicAdd(halves, low);
  const unsigned high = static_cast<unsigned>(term >> 32) + (before + low < before ? 1u : 0u);
  if (high != 0) atomicAdd(halves + 1, high);
}

// The row of a table that a token counts in; -1 for none.
struct Place {
  int32_t group = -1;
  int32_t segment = -1;
  __device__ __forceinline__ bool counted() const { return (group & segment) >= 0; }  // not both below 0
  __device__ __forceinline__ bool operator==(const Place& other) const {
    return group == other.group && segment == other.segment;
  }
};

__device__ __forceinline__ Place place_of(const GateLayout& layout, int32_t group, int32_t segment) {
  Place place;
  place.group = static_cast<unsigned>(group) < static_cast<unsigned>(layout.groups) ? group : -1;
  place.segment = static_cast<unsigned>(segment) < static_cast<unsigned>(layout.segments) ? segment : -1;
  return place;
}

// The rows of a place in both tables, where it has them.
struct TableRows {
  bool has_group, has_segment;
  Sum *group, *segment;
  __device__ __forceinline__ TableRows(const GateStatistics& tables, const Place& place, int width)
      : has_group(place.group >= 0),
        has_segment(place.segment >= 0),
        group(reinterpret_cast<Sum*>(tables.groups) + int64_t{has_group ? place.group : 0} * width),
        segment(reinterpret_cast<Sum*>(tables.segments) + int64_t{has_segment ? place.segment : 0} * width) {}
  __device__ __forceinline__ void add(int at, Sum term) const {
    if (has_group) atomicAdd(group + at, term);
    if (has_segment) atomicAdd(segment + at, term);
  }
};

// Sums of mass of the lane's experts; where a row has too many for registers, or nobody asks, there are none.
template <int kSums>
struct MassSums {
  long long lane_sums[kSums];
  __device__ __forceinline__ void clear() {
    for (auto& sum : lane_sums) sum = 0;
  }
};
template <>
struct MassSums<0> {
  __device__ __forceinline__ void clear() {}
};

// Counts for one warp. `kWhole`: every lane has all its values.
template <int kValues, Level kLevel, bool kWhole>
class Tally {
 public:
  __device__ __forceinline__ explicit Tally(const GateLaunch& launch) : launch_(launch), args_(launch.args) {
    clear();
  }
  // `block_place`: what the block's row in shared memory, where it has one, is for.
  __device__ __forceinline__ void begin(const Place& block_place) { block_place_ = block_place; }

  __device__ __forceinline__ bool wants(uint32_t plane) const {
    return (args_.statistics.planes & plane) != 0;
  }
  __device__ __forceinline__ bool wants_scores() const {
    return kLevel != Level::kPlain && (wants(kMass) || args_.statistics.entropy);
  }
  __device__ __forceinline__ bool wants_natural() const {
    return kLevel == Level::kFull && wants(kNaturalCounts);
  }
  __device__ __forceinline__ bool wants_weights() const { return wants(kWeight | kShare | kNaturalCounts); }

  // Turns to the place of a token that counts.
  __device__ __forceinline__ void turn_to(const Place& place) {
    if (place == place_) return;
    flush();
    place_ = place;
    in_block_ = launch_.layout.block_row > 0 && place_ == block_place_;
  }

  __device__ __forceinline__ bool counting() const { return place_.counted(); }

  // All lanes add the same: a token, what it has, and the scalars that only some launches have.
  __device__ __forceinline__ void token(int slots, int empty, bool steered) {
    ++tokens_;
    if constexpr (kLevel >= Level::kSoft) slots_ += slots, steered_ += steered ? 1 : 0;
    if constexpr (kLevel == Level::kFull) empty_ += empty;  // elsewhere nothing is forbidden, and k <= E
  }
  __device__ __forceinline__ void flips(int flipped, long long moved) {
    flipped_ += flipped, moved_ += moved;
  }

  // `kNumerators`: they are of a softmax, so `inverse` is at most 1 and its product with 2^32 exact.
  template <bool kNumerators>
  __device__ __forceinline__ void scores(const RowScores& r, const Values<kValues>& score) {
    if (!r.scored) {
      ++unscored_;
      return;
    }
    if (args_.statistics.entropy)
      entropy_ += kNumerators ? fixed_point_of_tame(entropy_of(r)) : fixed_point(entropy_of(r));
    if (!wants(kMass)) return;
    const float unit = r.inverse * 0x1p+32f;
    for_each_expert<kValues>(args_.experts, [&](int i, int e) {
      const long long term = __float2ll_rn(kNumerators ? score[i] * unit : score[i] * r.inverse * 0x1p+32f);
      if constexpr (kSums > 0) {
        mass_.lane_sums[i] += term;
      } else if (e < args_.experts && term != 0) {
        add(plane(kMass) + e, static_cast<Sum>(term));
      }
    });
  }

  // Adds to entry `at` of the row of the current place.
  __device__ __forceinline__ void add(int at, Sum term) {
    if (in_block_)
      add_to_shared(block_row() + at, term);
    else
      table_rows().add(at, term);
  }
  // Adds one to a plane of counts. A block has fewer than 2^32 slots, so its row needs no carry and nobody
  // waits.
  __device__ __forceinline__ void add_one(int at) {
    if (in_block_)
      atomicAdd(reinterpret_cast<unsigned*>(block_row() + at), 1u);
    else
      table_rows().add(at, 1);
  }
  // First entry of a plane.
  __device__ __forceinline__ int plane(uint32_t bit) const {
    return launch_.layout.statistics_plane[bit_index(bit)];
  }

  __device__ __forceinline__ void flush() {
    if (tokens_ > 0) {
      if (in_block_) {
        flush_to([](int at, Sum term) { add_to_shared(block_row() + at, term); });
      } else {
        const TableRows rows = table_rows();
        flush_to([&rows](int at, Sum term) { rows.add(at, term); });
      }
    }
    clear();
  }

 private:
  __device__ __forceinline__ TableRows table_rows() const {
    return TableRows(args_.statistics, place_, launch_.layout.statistics_width);
  }
  template <class AddTo>
  __device__ __forceinline__ void flush_to(AddTo add_to) const {
    if (lane() < kStatScalars) {
      const long long mine = scalar_of(lane());
      if (mine != 0) add_to(lane(), static_cast<Sum>(mine));
    }
    if constexpr (kSums > 0) {
      if (!wants(kMass)) return;
      const int first = plane(kMass) + first_expert<kValues>(args_.experts);
      for_each_expert<kValues>(args_.experts, [&](int i, int e) {
        // No look whether a sum is 0: few are, and lanes that part cost more than what they add.
        if (kWhole || e < args_.experts) add_to(first + kStripes * i, static_cast<Sum>(mass_.lane_sums[i]));
      });
    }
  }
  __device__ __forceinline__ long long scalar_of(int which) const {
    long long mine = 0;  // no switch: its table would lie in memory
    mine = which == kStatTokens ? tokens_ : mine;
    mine = which == kStatSlots ? (kLevel < Level::kSoft ? tokens_ * args_.k : slots_) : mine;
    mine = which == kStatEmpty ? empty_ : mine;
    mine = which == kStatUnscored ? unscored_ : mine;
    mine = which == kStatEntropy ? entropy_ : mine;
    mine = which == kStatSteered ? steered_ : mine;
    mine = which == kStatFlipped ? flipped_ : mine;
    return which == kStatMoved ? moved_ : mine;
  }
  __device__ __forceinline__ void clear() {
    tokens_ = slots_ = empty_ = unscored_ = steered_ = flipped_ = 0;
    entropy_ = moved_ = 0;
    mass_.clear();
  }
  __device__ __forceinline__ static Sum* block_row() { return reinterpret_cast<Sum*>(moe_route_shared); }

  const GateLaunch& launch_;
  const GateArgs& args_;
  Place block_place_;
  Place place_;
  bool in_block_ = false;  // does the current place add up in the block's row?
  // Since the last flush: fewer than 2^31 slots of one warp.
  int tokens_, slots_, empty_, unscored_, steered_, flipped_;
  long long entropy_, moved_;
  static constexpr int kSums = kLevel == Level::kPlain ? 0 : kValues;
  MassSums<kSums> mass_;
};

// What the chosen of a row add. `row` is room for a number of each slot.
// `kTame`: weights are numbers from 0 to 1.
template <bool kTame, class Tally, int kSlots>
__device__ __forceinline__ void count_chosen(Tally& tally, const Choice<kSlots>& c, int row_slots,
                                             bool steered, float* row) {
  int present = c.count;
  if (!c.compact) {
    int mine = 0;
    c.each([&](int s, int) { mine += c.ids[s] >= 0 ? 1 : 0; });
    present = fold_add(mine);
  }
  tally.token(row_slots, row_slots - present, steered);
  const bool counts = tally.wants(kCounts), weights = tally.wants(kWeight);
#pragma unroll
  for (int s = 0; s < kSlots; ++s) {
    if (c.ids[s] < 0) continue;
    if (counts) tally.add_one(tally.plane(kCounts) + c.ids[s]);
    if (weights) {
      const long long term = kTame ? fixed_point_of_tame(c.weights[s]) : fixed_point(c.weights[s]);
      tally.add(tally.plane(kWeight) + c.ids[s], static_cast<Sum>(term));
    }
  }
  if (!tally.wants(kShare)) return;
  c.spread(c.weights, row);
  const float total = sum_in_order(row, c.count);
  if (total == 0.0f) return;
  c.each([&](int s, int) {
    const int id = c.ids[s];
    if (id >= 0) tally.add(tally.plane(kShare) + id, static_cast<Sum>(fixed_point(c.weights[s] / total)));
  });
}

// Natural counts, and how many slots and how much weight lie outside the natural choice. `natural`: its ids,
// or null where they are the choice's own.
template <class Tally, int kSlots>
__device__ __forceinline__ void count_natural(Tally& tally, const Choice<kSlots>& c, const int32_t* natural,
                                              int natural_count, float* row) {
  const int plane = tally.plane(kNaturalCounts);
  if (natural == nullptr) {
    c.each([&](int s, int) {
      if (c.ids[s] >= 0) tally.add_one(plane + c.ids[s]);
    });
    return;
  }
  for (int j = lane(); j < natural_count; j += kLanes) {
    if (natural[j] >= 0) tally.add_one(plane + natural[j]);
  }
  int flipped = 0;
  float moved[kSlots] = {};
  c.each([&](int s, int) {
    bool found = c.ids[s] < 0;
    for (int i = 0; i < natural_count; ++i) found |= natural[i] == c.ids[s];
    flipped += found ? 0 : 1;
    moved[s] = found ? 0.0f : c.weights[s];
  });
  flipped = fold_add(flipped);
  c.spread(moved, row);
  const float moved_total = sum_in_order(row, c.count);
  c.spread(c.weights, row);
  const float total = sum_in_order(row, c.count);
  tally.flips(flipped, total != 0.0f ? fixed_point(moved_total / total) : 0);
}

}  // namespace
}  // namespace moe_route::cuda
