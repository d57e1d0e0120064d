// The gate for many rows: a thread works on one row, a warp on a tile of 32 rows in shared memory.
//
// A thread needs nobody else's numbers, so there are no shuffles and no waiting for them: choosing 8 of 128 takes
// a fifth of a warp's instructions for a row (csrc/cuda/README.md). It takes the common router (GateLaunch::common)
// up to soft steering, k <= 8, and counts, mass, weight and entropy. What a tile meets beyond that, it hands,
// row by row, to the warp's RowGate: logits that are not plain numbers, ties that make the list too long, rows
// that count elsewhere than the tile.
#pragma once
#include "gate_row.cuh"
#include "gate_tile_list.cuh"

namespace moe_route::cuda {
namespace {

template <int kValues, Level kLevel>
class TileGate {
  static constexpr int kExperts = kLanes * kValues;
  static constexpr int kStride = Tile<kValues>::kStride;
  static constexpr bool kScored = kLevel != Level::kPlain, kSteers = kLevel == Level::kSoft;

 public:
  static_assert(tile_bytes(kExperts) == (kLanes * kStride + (kTileList + 1) * 2 * kLanes) * 4);

  __device__ __forceinline__ TileGate(const GateLaunch& launch, unsigned char* memory, Place place)
      : launch_(launch),
        args_(launch.args),
        place_(place),
        tile_(launch, memory),
        list_(reinterpret_cast<float2*>(memory + kLanes * kStride * 4) + lane()) {}

  // Rows [begin, begin + 32) of the launch. Returns one bit for each row that is left to do.
  __device__ __forceinline__ unsigned rows(int64_t begin) {
    const int64_t t = begin + lane();
    const bool there = t < args_.tokens;
    tile_.load(begin);
    Token token;
    if (there) token = read_token<true>(launch_, t);
    const Place place = place_of(launch_.layout, token.group, token.segment);
    const bool counted = there && token.valid && place.counted();
    bool plain = there && token.valid && (!counted || place == place_);
    int count = args_.k;
    const bool steered = kSteers && in_table(launch_, token.steering_row);
    if constexpr (kSteers) {
      if (plain && steered) plain = steer(token.steering_row, count);
    }
    float* const row = tile_.row(lane());
    float largest, bound;
    plain = find_bound<kValues, kScored>(row, largest, bound) && plain;
    Stripes total, entropy;
    const int listed = list_best(row, bound, largest, total, entropy);
    plain = plain && listed < kTileList;
    choose(plain ? listed : 0, count);
    weigh(count);
    if (plain) write(t);
    const bool to_count = plain && counted;
    if (to_count) count_chosen();
    if constexpr (kScored) count_scores(to_count, total, entropy);
    count_tokens(to_count, count, steered);
    __syncwarp();
    return ballot(there && !plain);
  }

 private:
  // ---- steering ---------------------------------------------------------------------------------

  // The thread's row by its steering row; false where something is no plain number.
  __device__ __forceinline__ bool steer(int32_t index, int& count) {
    float* const row = tile_.row(lane());
    SteeringRow steering;
    steering.index = index, steering.k = args_.k;
    read_row_params<false>(launch_, steering);
    count = steering.k;
    bool plain = true;
    float std = 0;
    if (has(launch_, kStd)) {
      Stripes sums, squares;
      Tile<kValues>::each(row, [&](float x, int s) { sums.sums[s] = sums.sums[s] + x; });
      const float mean = sums.fold() / float(kExperts);
      Tile<kValues>::each(row, [&](float x, int s) {
        const float d = x - mean;
        squares.sums[s] = math::fma(d, d, squares.sums[s]);
      });
      const float all = squares.fold();
      plain = all < infinity();  // as it is where all logits are numbers and none is huge
      std = math::sqrt(all / float(kExperts - (steering.sample_std() ? 1 : 0)));
    }
#pragma unroll 1
    for (int e = 0; e < kExperts; e += kStripes) steer_stripes(steering, e, row + e, std);
    return plain;
  }
  // Sixteen logits plane by plane: a launch asks once for each plane, not for each logit.
  __device__ __forceinline__ void steer_stripes(const SteeringRow& steering, int e, float* z,
                                                float std) const {
    float x[kStripes], raw[kStripes];
#pragma unroll
    for (int s = 0; s < kStripes; s += 4) {
      const float4 four = *reinterpret_cast<const float4*>(z + s);
      raw[s] = four.x, raw[s + 1] = four.y, raw[s + 2] = four.z, raw[s + 3] = four.w;
    }
#pragma unroll
    for (int s = 0; s < kStripes; ++s) x[s] = raw[s];
    // op(value, raw value, entry) for each of them.
    const auto apply = [&](uint32_t bit, auto op) {
      if (!has(launch_, bit)) return;
      const float* const plane = plane_of(launch_, steering, bit) + e;
#pragma unroll
      for (int s = 0; s < kStripes; s += 4) {
        const float4 entry = four_of(plane + s);
        x[s] = op(x[s], raw[s], entry.x);
        x[s + 1] = op(x[s + 1], raw[s + 1], entry.y);
        x[s + 2] = op(x[s + 2], raw[s + 2], entry.z);
        x[s + 3] = op(x[s + 3], raw[s + 3], entry.w);
      }
    };
    apply(kScale, [](float v, float, float scale) { return v * scale; });
    if (steering.temperature != 1.0f) {
#pragma unroll
      for (int s = 0; s < kStripes; ++s) x[s] = x[s] / steering.temperature;
    }
    apply(kBias, [](float v, float, float b) { return b != 0.0f ? v + b : v; });
    apply(kStd, [std](float v, float, float c) { return c != 0.0f ? math::fma(c, std, v) : v; });
    apply(kMagnitude,
          [](float v, float own, float m) { return m != 0.0f ? math::fma(m, fabsf(own), v) : v; });
#pragma unroll
    for (int s = 0; s < kStripes; s += 4)
      *reinterpret_cast<float4*>(z + s) = make_float4(x[s], x[s + 1], x[s + 2], x[s + 3]);
  }
  // Four entries of a plane, in one load where all planes lie so.
  __device__ __forceinline__ float4 four_of(const float* plane) const {
    if (launch_.layout.whole_planes) return __ldg(reinterpret_cast<const float4*>(plane));
    return make_float4(__ldg(plane), __ldg(plane + 1), __ldg(plane + 2), __ldg(plane + 3));
  }

  // ---- choice -----------------------------------------------------------------------------------

  // Lists what reaches the bound, by rising index; with scores, turns the row into numerators. Returns how many
  // were listed; kTileList where there may be more.
  __device__ __forceinline__ int list_best(float* row, float bound, float largest, Stripes& total,
                                           Stripes& entropy) {
    List list(list_);
#pragma unroll 1
    for (int v = 0; v < kExperts; v += kStripes) {
#pragma unroll
      for (int s = 0; s < kStripes; s += 4) {
        float4& four = *reinterpret_cast<float4*>(row + v + s);
        float x[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int c = 0; c < 4; ++c) list.append_if_reaches(x[c], bound, v + s + c);
        if constexpr (kScored) {
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            const float shifted = x[c] - largest, numerator = math::exp_in_range(shifted);
            total.sums[s + c] = total.sums[s + c] + numerator;
            entropy.sums[s + c] = math::fma(numerator, shifted, entropy.sums[s + c]);
            x[c] = numerator;
          }
          four = make_float4(x[0], x[1], x[2], x[3]);
        }
      }
    }
    return list.count();
  }

  // The best of the list, by insertion; of equal values the one that was listed first stays ahead.
  __device__ __forceinline__ void choose(int listed, int count) {
#pragma unroll
    for (int j = 0; j < kMost; ++j) values_[j] = -infinity(), ids_[j] = -1;
    const int longest = __reduce_max_sync(kWarp, listed);
#pragma unroll 1
    for (int c = 0; c < longest; ++c) {
      const float2 candidate = list_[c * kLanes];
      const float x = c < listed ? candidate.x : -infinity();
      const int32_t id = __float_as_int(candidate.y);
#pragma unroll
      for (int j = kMost - 1; j >= 0; --j) {
        const bool here = x > values_[j], above = j > 0 && x > values_[j > 0 ? j - 1 : 0];
        values_[j] = here ? (above ? values_[j > 0 ? j - 1 : 0] : x) : values_[j];
        ids_[j] = here ? (above ? ids_[j > 0 ? j - 1 : 0] : id) : ids_[j];
      }
    }
#pragma unroll
    for (int j = 0; j < kMost; ++j) ids_[j] = j < count ? ids_[j] : -1;
  }

  __device__ __forceinline__ void weigh(int count) {
    float sum = 0;
#pragma unroll
    for (int j = 0; j < kMost; ++j) {
      weights_[j] = j < count ? math::exp_nonpositive(values_[j] - values_[0]) : 0.0f;
      sum = sum + weights_[j];
    }
#pragma unroll
    for (int j = 0; j < kMost; ++j) weights_[j] = j < count ? weights_[j] / sum : 0.0f;
  }

  __device__ __forceinline__ void write(int64_t t) {
    int32_t* const ids = args_.ids + t * args_.k;
    float* const weights = static_cast<float*>(args_.weights) + t * args_.k;
    if (launch_.layout.whole_slots) {
      reinterpret_cast<int4*>(ids)[0] = make_int4(ids_[0], ids_[1], ids_[2], ids_[3]);
      reinterpret_cast<int4*>(ids)[1] = make_int4(ids_[4], ids_[5], ids_[6], ids_[7]);
      reinterpret_cast<float4*>(weights)[0] = make_float4(weights_[0], weights_[1], weights_[2], weights_[3]);
      reinterpret_cast<float4*>(weights)[1] = make_float4(weights_[4], weights_[5], weights_[6], weights_[7]);
      return;
    }
#pragma unroll
    for (int j = 0; j < kMost; ++j) {
      if (j < args_.k) ids[j] = ids_[j], weights[j] = weights_[j];
    }
  }

  // ---- counts, all in the block's row -----------------------------------------------------------

  __device__ __forceinline__ Sum* sums(int bit) const {
    return reinterpret_cast<Sum*>(moe_route_shared) + launch_.layout.statistics_plane[bit];
  }
  __device__ __forceinline__ bool wants(uint32_t plane) const { return args_.statistics.planes & plane; }

  __device__ __forceinline__ void count_chosen() {
    const bool counts = wants(kCounts), weights = wants(kWeight);
#pragma unroll
    for (int j = 0; j < kMost; ++j) {
      if (ids_[j] < 0) continue;
      if (counts) atomicAdd(reinterpret_cast<unsigned*>(sums(bit_index(kCounts)) + ids_[j]), 1u);
      if (weights)
        add_to_shared(sums(bit_index(kWeight)) + ids_[j], static_cast<Sum>(fixed_point(weights_[j])));
    }
  }

  __device__ __forceinline__ void count_scores(bool counted, Stripes& total, Stripes& entropy) {
    RowScores scores;
    scores.total = total.fold(), scores.entropy_sum = entropy.fold();
    scores.inverse = 1.0f / scores.total;
    if (counted && args_.statistics.entropy)
      add_to_shared(sums(0) - kStatScalars + kStatEntropy, static_cast<Sum>(fixed_point(entropy_of(scores))));
    if (!wants(kMass)) return;
    __syncwarp();
    // A lane adds up its columns over the tile's rows; rows that do not count have no part. Scaling by 2^32 is
    // exact, and `inverse` is at most 1.
    const float unit = scores.inverse * 0x1p+32f;
    const unsigned who = ballot(counted);
#pragma unroll 1
    for (int all = 0; all < kExperts; all += 4 * kLanes) {  // lanes past the last expert add up the last ones
      const int first = min(all + 4 * lane(), kExperts - 4);
      long long mass[4] = {};
      const auto add_row = [&](int r, float scale) {
        const float4 p = *reinterpret_cast<const float4*>(tile_.row(r) + first);
        mass[0] += __float2ll_rn(p.x * scale);
        mass[1] += __float2ll_rn(p.y * scale);
        mass[2] += __float2ll_rn(p.z * scale);
        mass[3] += __float2ll_rn(p.w * scale);
      };
      if (who == kWarp) {
#pragma unroll 4
        for (int r = 0; r < kLanes; ++r) add_row(r, from_lane(unit, r));
      } else {
#pragma unroll 1
        for (int r = 0; r < kLanes; ++r) {
          const float scale = from_lane(unit, r);
          if (who >> r & 1u) add_row(r, scale);
        }
      }
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        if (mass[c] != 0 && all + 4 * lane() < kExperts)
          add_to_shared(sums(bit_index(kMass)) + first + c, static_cast<Sum>(mass[c]));
      }
    }
  }

  __device__ __forceinline__ void count_tokens(bool counted, int count, bool steered) {
    const int tokens = fold_add(counted ? 1 : 0), slots = fold_add(counted ? count : 0);
    const int with_row = kSteers ? fold_add(counted && steered ? 1 : 0) : 0;
    Sum* const scalars = reinterpret_cast<Sum*>(moe_route_shared);
    if (lane() != 0 || tokens == 0) return;
    add_to_shared(scalars + kStatTokens, static_cast<Sum>(tokens));
    add_to_shared(scalars + kStatSlots, static_cast<Sum>(slots));
    if (with_row != 0) add_to_shared(scalars + kStatSteered, static_cast<Sum>(with_row));
  }

  static constexpr int kMost = 8;
  const GateLaunch& launch_;
  const GateArgs& args_;
  const Place place_;
  Tile<kValues> tile_;
  float2* const list_;
  float values_[kMost];
  float weights_[kMost];
  int32_t ids_[kMost];
};

// Tiles of 32 rows, and what they leave row by row.
template <int kValues, Level kLevel>
__global__ void __launch_bounds__(kLanes, tiles_at_once(kValues))
    tile_kernel(const __grid_constant__ GateLaunch launch) {
  wait_for_earlier_kernels();
  const RowRange range = rows_of_block(launch);
  const Place place = begin_block(launch, range);
  unsigned char* const memory = moe_route_shared + launch.layout.block_row;
  TileGate<kValues, kLevel> tile(launch, memory + launch.layout.tile, place);
  RowGate<kValues, kLevel, true> alone(launch, memory);
  alone.begin(place);
  for (int64_t t = range.begin; t < range.end; t += kLanes) {
    unsigned left = tile.rows(t);
    while (left != 0) {
      alone.row(t + __ffs(static_cast<int>(left)) - 1);
      left &= left - 1;
    }
  }
  alone.flush();
  end_block(launch, place);
}

}  // namespace
}  // namespace moe_route::cuda
