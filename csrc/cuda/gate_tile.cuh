// The gate for many rows: a thread works on one row, a warp on a tile of 32 rows in shared memory.
//
// A thread needs nobody else's numbers, so there are no shuffles and no waiting for them: choosing 8 of 128 takes
// a fifth of a warp's instructions for a row (docs/cuda.md). It takes the common router (GateLaunch::common)
// up to soft steering, k <= 8, and counts, mass, weight and entropy. What a tile meets beyond that, it hands,
// row by row, to the warp's RowGate: logits that are not plain numbers, ties that make the list too long, rows
// that count elsewhere than the tile.
#pragma once
#include "gate_row.cuh"

namespace moe_route::cuda {
namespace {

inline constexpr int kTileList = 24;       // candidates of a row
inline constexpr float kTame = 0x1p+100f;  // of such logits neither sums nor differences overflow

// 16 bytes from global to shared memory, without registers on the way.
__device__ __forceinline__ void copy_async(float* to, const float* from) {
#ifdef __CUDA_ARCH__
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
#else
  *reinterpret_cast<float4*>(to) = *reinterpret_cast<const float4*>(from);
#endif
}
__device__ __forceinline__ void wait_for_copies() {
#ifdef __CUDA_ARCH__
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
  __syncwarp();
}

// The smaller one; NaN where one is NaN.
__device__ __forceinline__ float least_or_nan(float x, float y) {
#ifdef __CUDA_ARCH__
  asm("min.NaN.f32 %0, %0, %1;" : "+f"(x) : "f"(y));
  return x;
#else
  return x == x && !(x < y) ? y : x;
#endif
}

// A list in shared memory that a thread appends to: entries lie a warp's width apart. One entry more than
// kTileList has room, to be overwritten.
class List {
 public:
  __device__ __forceinline__ explicit List(float2* first) : first_(first) {
#ifdef __CUDA_ARCH__
    begin_ = static_cast<unsigned>(__cvta_generic_to_shared(first));
#else
    begin_ = 0;
#endif
    next_ = begin_;
    full_ = begin_ + kTileList * kStep;
  }
  // Appends x and its expert where x >= bound. Predicated: a branch for each value would cost three times that.
  __device__ __forceinline__ void append_if_reaches(float x, float bound, int expert) {
#ifdef __CUDA_ARCH__
    asm volatile(
        "{.reg .pred p; setp.ge.f32 p, %1, %2; @p st.shared.v2.b32 [%0], {%3, %4};"
        " @p add.u32 %0, %0, %6; min.u32 %0, %0, %5;}"
        : "+r"(next_)
        : "f"(x), "f"(bound), "r"(__float_as_int(x)), "r"(expert), "r"(full_), "n"(kStep));
#else
    if (!(x >= bound)) return;
    first_[next_ / sizeof(float2)] = make_float2(x, __int_as_float(expert));
    next_ = min(next_ + kStep, full_);
#endif
  }
  // Entries; kTileList where there may be more.
  __device__ __forceinline__ int count() const {
#ifdef __CUDA_ARCH__
    asm volatile("" ::: "memory");  // what was appended is read from here on
#endif
    return static_cast<int>((next_ - begin_) / kStep);
  }

 private:
  static constexpr unsigned kStep = kLanes * sizeof(float2);
  float2* const first_;
  unsigned begin_, next_, full_;
};

// Sixteen stripes of one row in a thread's registers: the contract's tree needs nobody else.
struct Stripes {
  float sums[kStripes] = {};
  __device__ __forceinline__ float fold() {
    add_halves<8>();
    add_halves<4>();
    add_halves<2>();
    return sums[0] + sums[1];
  }
  template <int kApart>
  __device__ __forceinline__ void add_halves() {
#pragma unroll
    for (int s = 0; s < kApart; ++s) sums[s] = sums[s] + sums[s + kApart];
  }
};

// Sorts eight numbers, largest first.
__device__ __forceinline__ void sort_eight(float* x) {
  const auto in_order = [x](int a, int b) {
    const float larger = fmaxf(x[a], x[b]), smaller = fminf(x[a], x[b]);
    x[a] = larger, x[b] = smaller;
  };
  in_order(0, 1), in_order(2, 3), in_order(4, 5), in_order(6, 7);
  in_order(0, 2), in_order(1, 3), in_order(4, 6), in_order(5, 7);
  in_order(1, 2), in_order(5, 6);
  in_order(0, 4), in_order(1, 5), in_order(2, 6), in_order(3, 7);
  in_order(2, 4), in_order(3, 5);
  in_order(1, 2), in_order(3, 4), in_order(5, 6);
}

template <int kValues, Level kLevel>
class TileGate {
  static constexpr int kExperts = kLanes * kValues;
  static constexpr int kStride = kExperts + 4;  // of a tile's row: threads read theirs from different banks
  static constexpr bool kScored = kLevel != Level::kPlain, kSteers = kLevel == Level::kSoft;

 public:
  static_assert(tile_bytes(kExperts) == (kLanes * kStride + (kTileList + 1) * 2 * kLanes) * 4);

  __device__ __forceinline__ TileGate(const GateLaunch& launch, unsigned char* memory, Place place)
      : launch_(launch),
        args_(launch.args),
        place_(place),
        tile_(reinterpret_cast<float*>(memory)),
        list_(reinterpret_cast<float2*>(memory + kLanes * kStride * 4) + lane()) {}

  // Rows [begin, begin + 32) of the launch. Returns one bit for each row that is left to do.
  __device__ __forceinline__ unsigned rows(int64_t begin) {
    const int64_t t = begin + lane();
    const bool there = t < args_.tokens;
    load(begin);
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
    float* const row = tile_ + lane() * kStride;
    float largest, bound;
    plain = find_bound(row, largest, bound) && plain;
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
  // ---- the tile ---------------------------------------------------------------------------------

  template <class T, class Convert>
  __device__ __forceinline__ void load_halves(int64_t begin, Convert convert) {
    for_each_four<T>(begin, [&](float* to, const T* from) {
      const uint2 raw = __ldg(reinterpret_cast<const uint2*>(from));
      *reinterpret_cast<float4*>(to) = make_float4(convert(raw.x & 0xffffu), convert(raw.x >> 16),
                                                   convert(raw.y & 0xffffu), convert(raw.y >> 16));
    });
  }
  // op(where four values go, where they come from), neighboring lanes side by side. Where rows begin is added up, not
  // multiplied out. Past the last row: one of the rows again.
  template <class T, class Op>
  __device__ __forceinline__ void for_each_four(int64_t begin, Op op) {
    constexpr int kFours = kExperts / 4;  // of a row
    constexpr int kRows = kFours < kLanes ? kLanes / kFours : 1, kParts = kFours < kLanes ? 1 : kFours / kLanes;
    const int first = lane() / kFours, column = lane() % kFours * 4;
    const int last = static_cast<int>(min(args_.tokens - begin, int64_t{kLanes})) - 1;
    const T* from = static_cast<const T*>(args_.logits) + (begin + min(first, last)) * args_.row_stride + column;
    float* const to = tile_ + first * kStride + column;
    const int64_t step = kRows * args_.row_stride;
#pragma unroll 8
    for (int row = 0; row < kLanes; row += kRows) {
#pragma unroll
      for (int part = 0; part < kParts; ++part)
        op(to + row * kStride + part * 4 * kLanes, from + part * 4 * kLanes);
      if (first + row + kRows <= last) from += step;
    }
  }
  __device__ __forceinline__ void load(int64_t begin) {
    if (args_.logits_type == DType::kFloat32) {
      for_each_four<float>(begin, [](float* to, const float* from) { copy_async(to, from); });
    } else if (launch_.layout.bfloat16) {
      load_halves<uint16_t>(begin, [](unsigned x) { return math::as_float(int32_t(x << 16)); });
    } else {
      load_halves<__half>(
          begin, [](unsigned x) { return __half2float(__ushort_as_half(static_cast<unsigned short>(x))); });
    }
    wait_for_copies();
  }

  // op(value, stripe) for the thread's row, in rising order.
  template <class Op>
  __device__ __forceinline__ static void each(const float* row, Op op) {
#pragma unroll 1
    for (int v = 0; v < kExperts; v += kStripes) {
#pragma unroll
      for (int s = 0; s < kStripes; s += 4) {
        const float4 x = *reinterpret_cast<const float4*>(row + v + s);
        op(x.x, s), op(x.y, s + 1), op(x.z, s + 2), op(x.w, s + 3);
      }
    }
  }

  // ---- steering ---------------------------------------------------------------------------------

  // The thread's row by its steering row; false where something is no plain number.
  __device__ __forceinline__ bool steer(int32_t index, int& count) {
    float* const row = tile_ + lane() * kStride;
    SteeringRow steering;
    steering.index = index, steering.k = args_.k;
    read_row_params<false>(launch_, steering);
    count = steering.k;
    bool plain = true;
    float std = 0;
    if (has(launch_, kStd)) {
      Stripes sums, squares;
      each(row, [&](float x, int s) {
        sums.sums[s] = sums.sums[s] + x;
      });
      const float mean = sums.fold() / float(kExperts);
      each(row, [&](float x, int s) {
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
  __device__ __forceinline__ void steer_stripes(const SteeringRow& steering, int e, float* z, float std) const {
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

  // The largest value, and one that at least eight reach: the eighth of the largest values of 16 stripes.
  // False where a value is no plain number.
  __device__ __forceinline__ bool find_bound(const float* row, float& largest, float& bound) const {
    float most[kStripes], least = infinity();
#pragma unroll
    for (int s = 0; s < kStripes; ++s) most[s] = -infinity();
    each(row, [&](float x, int s) {
      least = least_or_nan(least, x);
      most[s] = fmaxf(most[s], x);
    });
    sort_eight(most);
    sort_eight(most + 8);
    largest = fmaxf(most[0], most[8]);
    bound = fmaxf(most[0], most[15]);
#pragma unroll
    for (int i = 1; i < 8; ++i) bound = fminf(bound, fmaxf(most[i], most[15 - i]));
    const bool in_range = !kScored || largest - least <= -math::kExpUnderflow;  // no numerator is 0
    return least > -kTame && largest < kTame && in_range;
  }

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
        const float4 p = *reinterpret_cast<const float4*>(tile_ + r * kStride + first);
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
  float* const tile_;
  float2* const list_;
  float values_[kMost];
  float weights_[kMost];
  int32_t ids_[kMost];
};

// Tiles of 32 rows, and what they leave row by row.
template <int kValues, Level kLevel>
__global__ void __launch_bounds__(kLanes, tiles_at_once(kValues))
    tile_kernel(const __grid_constant__ GateLaunch launch) {
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
