// The gate on CUDA: load, steer, choose, weigh, remap, count, all in one launch.
//
// Contract: moe_route/gate.h. A warp works on one row at a time; a block on a run of consecutive rows, so
// that most of its tokens count in the same place. Rows do not see each other; what a padding row holds
// reaches nothing. O(E / 32) steps a row. Work that nobody asked for (weights, scores of all experts, the
// natural choice) is not done.
#pragma once
#include <cuda_fp16.h>

#include "gate_count.cuh"
#include "gate_layout.h"

namespace moe_route::cuda {
namespace {

struct Token {
  int32_t steering_row = -1;
  int32_t group = 0;
  int32_t segment = -1;
  bool valid = true;
};

// One load where the table's address allows it.
__device__ __forceinline__ Token read_token(const GateLaunch& launch, int64_t t) {
  Token token;
  const int32_t* table = launch.args.token_table;
  if (table == nullptr) return token;
  const int32_t* row = table + t * kTokenColumns;
  if (launch.layout.whole_tokens) {
    const int4 columns = __ldg(reinterpret_cast<const int4*>(row));
    token.steering_row = columns.x, token.group = columns.y, token.segment = columns.z;
    token.valid = columns.w != 0;
    return token;
  }
  token.steering_row = __ldg(row + kTokenSteeringRow);
  token.group = __ldg(row + kTokenGroup);
  token.segment = __ldg(row + kTokenSegment);
  token.valid = __ldg(row + kTokenValid) != 0;
  return token;
}

static_assert(sizeof(Selection) == GateLayout::kSelection);

// A row in flight.
struct Row {
  int64_t t = 0;
  int32_t steering_row = -1;  // as the token says it
  SteeringRow steering;
  int slots = 0;       // k of this row
  bool valid = false;  // a token, and no padding
  bool counted = false;
  bool given = false;           // the choice came with the call
  bool to_weigh = false;        // weights are to be computed
  bool scores_counted = false;  // mass or entropy is wanted
};

template <int kValues, Level kLevel, bool kCommon>
class RowGate {
  static constexpr bool kFull = kLevel == Level::kFull, kSteers = kLevel >= Level::kSoft;
  static constexpr int kSlots = slots_of_lane(kValues);
  using Chosen = Choice<kSlots>;

 public:
  __device__ __forceinline__ RowGate(const GateLaunch& launch, unsigned char* memory, Place block_place)
      : launch_(launch),
        args_(launch.args),
        layout_(launch.layout),
        memory_(memory),
        selection_(*reinterpret_cast<Selection*>(memory)),
        tally_(launch, block_place) {
    if (args_.token_table == nullptr) tally_.turn_to(place_of(layout_, Token{}.group, Token{}.segment));
    values_.place(row_at(layout_.value_row), args_.experts);
    scores_.place(row_at(layout_.score_row), args_.experts);
  }

  __device__ __forceinline__ void rows(int64_t begin, int64_t end) {
    int64_t t = begin;
    for (int left = kept(static_cast<int>(end - begin)); left > 0; --left) row(t++);
    flush();
  }
  __device__ __forceinline__ void row(int64_t t) { one_row(t); }
  __device__ __forceinline__ void flush() { tally_.flush(); }

 private:
  __device__ __forceinline__ float* row_at(int offset) const {
    return reinterpret_cast<float*>(memory_ + offset);
  }
  // Room for a number of each slot, once the choice is in registers.
  __device__ __forceinline__ float* slot_row() const { return selection_.chosen; }

  __device__ __forceinline__ void one_row(int64_t t) {
    // The logits are asked for before the token is known: one wait, not two. (A given choice may need none.)
    const bool early = !kFull || args_.given.mode == GivenMode::kNone;
    if (early) load(t);
    Row row;
    Chosen choice;
    prepare(t, row, choice);
    if (row.valid) {
      const int natural_count = choose_all(row, choice, early);
      weigh(row, choice);
      if constexpr (kFull) remap(row, choice);
      write(t, choice);
      count(row, choice, natural_count);
    } else {
      choice.clear();
      write(t, choice);
    }
    __syncwarp();  // the next row writes where this one was read
  }

  // ---- what is to be done for a row -------------------------------------------------------------

  __device__ __forceinline__ void prepare(int64_t t, Row& row, Chosen& choice) {
    row.t = t;
    Token token;
    if (args_.token_table != nullptr) token = read_token(launch_, t);
    row.steering_row = token.steering_row;
    row.valid = token.valid;
    row.steering.k = args_.k;
    if constexpr (kSteers) {
      if (row.valid && in_table(launch_, token.steering_row)) {
        const bool neutral_matters = args_.given.mode == GivenMode::kNatural || tally_.wants_natural();
        row.steering = read_steering<kFull, kValues>(launch_, token.steering_row, neutral_matters);
      }
    }
    row.slots = row.valid ? row.steering.k : 0;
    if (args_.token_table == nullptr) {
      row.counted = tally_.counting();
    } else if (row.valid) {
      const Place place = place_of(layout_, token.group, token.segment);
      row.counted = place.counted();
      if (row.counted) tally_.turn_to(place);
    }
    row.scores_counted = row.counted && tally_.wants_scores();
    row.to_weigh =
        row.valid && (kCommon || args_.weights != nullptr || (row.counted && tally_.wants_weights()));
    if constexpr (kFull) {
      if (args_.given.mode != GivenMode::kNone && row.valid) take_given(row, choice);
    }
  }

  __device__ __forceinline__ bool is_replay(const Row& row) const {
    return row.given && args_.given.mode == GivenMode::kReplay;
  }

  __device__ __forceinline__ int64_t given_id_as_stored(int64_t slot) const {
    return args_.given.ids_type == DType::kInt64
               ? __ldg(static_cast<const long long*>(args_.given.ids) + slot)
               : __ldg(static_cast<const int32_t*>(args_.given.ids) + slot);
  }
  __device__ __forceinline__ int32_t given_id(int64_t slot) const {
    const int64_t id = given_id_as_stored(slot);
    return id >= 0 && id < args_.experts ? static_cast<int32_t>(id) : -1;
  }
  // Does this row come with a choice? Its first id, as stored, says so, where not all rows do.
  __device__ __forceinline__ bool has_given(const Row& row) const {
    return args_.given.every_row || given_id_as_stored(row.t * args_.k) != -1;
  }

  __device__ __forceinline__ float given_weight(int64_t slot) const {
    switch (args_.given.weights_type) {
      case DType::kBFloat16:
        return math::as_float(
            int32_t(uint32_t{__ldg(static_cast<const uint16_t*>(args_.given.weights) + slot)} << 16));
      case DType::kFloat16:
        return __half2float(static_cast<const __half*>(args_.given.weights)[slot]);
      case DType::kFloat64:
        return static_cast<float>(__ldg(static_cast<const double*>(args_.given.weights) + slot));
      default:
        return __ldg(static_cast<const float*>(args_.given.weights) + slot);
    }
  }

  // Takes the given choice where it is the row's choice.
  __device__ __forceinline__ void take_given(Row& row, Chosen& choice) {
    const bool replay = args_.given.mode == GivenMode::kReplay;
    row.given = has_given(row) && (replay || !row.steering.steered());
    if (!row.given) return;
    read_given_ids(row, choice);
    if (replay) row.slots = args_.k;
    if (replay || args_.given.weights == nullptr) return;
    row.to_weigh = false;
    choice.each([&](int s, int j) {
      choice.weights[s] = choice.ids[s] < 0 ? 0.0f : given_weight(row.t * args_.k + j);
    });
  }

  __device__ __forceinline__ void read_given_ids(const Row& row, Chosen& choice) {
    bool whole = true;
    choice.count = args_.k;
    choice.each([&](int s, int j) {
      choice.ids[s] = given_id(row.t * args_.k + j);
      whole &= choice.ids[s] >= 0;
    });
    choice.compact = ballot(whole) == kWarp;
  }

  // ---- logits and choice ------------------------------------------------------------------------

  template <class T, class Convert>
  __device__ __forceinline__ void load_as(int64_t t, Convert convert) {
    const T* row = static_cast<const T*>(args_.logits) + t * args_.row_stride;
    load_row<kValues, kCommon>(row, args_.experts, [&](int i, T x) { values_[i] = convert(x); });
    if (kCommon || args_.experts == kLanes * kValues) return;
    for_each_expert<kValues>(args_.experts, [&](int i, int e) {
      if (e >= args_.experts) values_[i] = not_a_number();
    });
  }
  __device__ __forceinline__ void load(int64_t t) {
    if (args_.logits_type == DType::kFloat32) {
      load_as<float>(t, [](float x) { return x; });
    } else if (args_.logits_type == DType::kBFloat16) {
      load_as<uint16_t>(t, [](uint16_t x) { return math::as_float(int32_t(uint32_t{x} << 16)); });
    } else {
      load_as<__half>(t, [](__half x) { return __half2float(x); });
    }
  }

  // Scores are compared only where they are not a monotone function of the logit, so that scores that collide
  // after rounding never decide.
  __device__ __forceinline__ bool compares_scores(const SteeringRow& steering) const {
    if (kFull && steering.score_bias()) return args_.spec.order == Order::kScoreThenTopK;
    return !kCommon && layout_.compares_scores;
  }

  // The natural choice first, where it has to be known and is another one; then the choice itself. `loaded`:
  // the logits are in place. Returns how many natural ids there are, -1 where they are the choice's own.
  __device__ __forceinline__ int choose_all(Row& row, Chosen& choice, bool loaded) {
    if constexpr (!kFull) {
      choose(row, row.steering, true, true, loaded, choice);
      return -1;
    } else {
      const bool compared =
          row.counted && tally_.wants_natural() && (row.steering.steered() || is_replay(row));
      const bool natural_given = compared && args_.given.mode == GivenMode::kNatural && has_given(row);
      const bool natural_chosen = compared && !natural_given;
      int natural_count = compared ? args_.k : -1;
      if (natural_given) {
        for (int j = lane(); j < args_.k; j += kLanes) selection_.natural[j] = given_id(row.t * args_.k + j);
      }
#pragma unroll 1
      for (int pass = natural_chosen ? 0 : 1; pass < 2; ++pass) {  // one copy of the code for both
        const bool last = pass == 1;
        Chosen made = choice;
        SteeringRow steering;  // field by field: two rows to pick from would lie in memory
        steering.index = last ? row.steering.index : -1;
        steering.flags = last ? row.steering.flags : 0;
        steering.k = last ? row.steering.k : args_.k;
        steering.temperature = last ? row.steering.temperature : 1.0f;
        choose(row, steering, last ? !row.given : true, last, loaded && pass == (natural_chosen ? 0 : 1),
               made);
        if (last) {
          choice = made;
        } else {
          made.each([&](int s, int j) { selection_.natural[j] = made.ids[s]; });
          natural_count = made.count;
        }
        __syncwarp();
      }
      return natural_count;
    }
  }

  // From logits to ids (where `choosing`), scores and the logits that weighing looks up (where `last`).
  __device__ __forceinline__ void choose(Row& row, const SteeringRow& steering, bool choosing, bool last,
                                         bool loaded, Chosen& choice) {
    const bool by_score = choosing && compares_scores(steering);
    const bool softmax_weights = !kCommon && last &&
                                 (layout_.softmax_of_all || (kFull && args_.spec.score == Score::kSoftmax &&
                                                             !softmax_over_chosen(launch_, steering)));
    const bool scores_counted = last && row.scores_counted;
    if (kFull && !choosing && !(row.to_weigh || scores_counted)) return;
    if (!loaded) load(row.t);
    if constexpr (kSteers) {
      if (steering.steered()) steer<kFull, kValues>(launch_, steering, values_);
    }
    if (by_score || softmax_weights || scores_counted) {
      row_scores_ = score_all<kValues>(args_.spec.score, values_, args_.experts,
                                       scores_counted && args_.statistics.entropy, scores_);
      if (scores_counted) tally_.scores(row_scores_, scores_);
    }
    if (!kCommon && layout_.keeps_logits) {
      float* z = row_at(layout_.logit_row);
      for_each_expert<kValues>(args_.experts, [&](int i, int e) {
        if (e < args_.experts) z[e] = values_[i];
      });
      __syncwarp();
    }
    if (!choosing) return;
    selection_values(steering, by_score);
    choose_experts(steering, last ? row.slots : args_.k, choice);
  }

  // What selection compares, in place of the logits.
  __device__ __forceinline__ void selection_values(const SteeringRow& steering, bool by_score) {
    if (kCommon || !layout_.keeps_logits) return;  // the logits themselves
    const float* correction = args_.correction_bias;
    Entries<kValues> corrections, biases;
    if (correction != nullptr) corrections.load(correction, args_.experts);
    if constexpr (kFull) {
      if (steering.score_bias()) biases = entries<kValues>(launch_, steering, kScoreBias);
    }
    for_each_expert<kValues>(args_.experts, [&](int i, int) {
      const float x = values_[i];
      float v = by_score && x == x ? scores_[i] * row_scores_.factor : x;
      if (correction != nullptr) v = v + corrections(i);
      if constexpr (kFull) {
        if (steering.score_bias()) v = v + biases(i);
      }
      values_[i] = v;
    });
    if constexpr (kLevel != Level::kPlain) {
      if (args_.spec.groups > 1) {
        limit_groups<kValues>(args_.spec, args_.experts, layout_.group_reciprocal, row_at(layout_.value_row),
                              row_at(layout_.group_scores), values_);
      }
    }
  }

  __device__ __forceinline__ void choose_experts(const SteeringRow& steering, int want, Chosen& choice) {
    int chosen = 0;
    if (!kFull || !steering.forced()) {
      chosen = select_best<kValues>(values_, args_.experts, want, 0, selection_);
      if (chosen < want) {
        chosen =
            append_nan<kValues>(values_, args_.experts, want, chosen, selection_, [](int) { return true; });
      }
    } else if constexpr (kFull) {
      chosen = choose_by_class(steering, want);
    }
    choice.clear();
    choice.count = chosen, choice.compact = true;
    choice.each([&](int s, int j) {
      choice.ids[s] = selection_.ids[j];
      choice.logits[s] = selection_.chosen[j];
    });
  }

  // Forced-on experts first, forced-off last, forbidden nowhere.
  __device__ __forceinline__ int choose_by_class(const SteeringRow& steering, int want) {
    Values<kValues> members;
    members.place(row_at(layout_.member_row), args_.experts);
    int chosen = 0;
#pragma unroll 1
    for (int rank_class = 1; rank_class >= -1; --rank_class) {
      const auto member = [&](int e) {
        const int there = min(e, args_.experts - 1);
        return class_of(force_code(entry(launch_, steering, kForce, there, 0.0f))) == rank_class;
      };
      for_each_expert<kValues>(args_.experts,
                               [&](int i, int e) { members[i] = member(e) ? values_[i] : not_a_number(); });
      const int before = chosen;
      chosen += select_best<kValues>(members, args_.experts, want - before, before, selection_);
      if (chosen < want)
        chosen = append_nan<kValues>(values_, args_.experts, want, chosen, selection_, member);
    }
    return chosen;
  }

  // ---- weights, remap, outputs, counts ----------------------------------------------------------

  // Softmax over the chosen; their best comes first. The numerators are at most 1, so their sum is finite.
  __device__ __forceinline__ void weigh_common(Chosen& choice) {
    const float largest = from_lane(choice.logits[0], 0);
    choice.weights[0] = softmax_numerator(choice.logits[0], largest);
    choice.spread(choice.weights, slot_row());
    divide(choice, sum_in_order(slot_row(), choice.count));
  }

  __device__ __forceinline__ void weigh(const Row& row, Chosen& choice) {
    if constexpr (kCommon) return weigh_common(choice);
    if (!row.to_weigh) return;
    const SteeringRow& steering = row.steering;
    const bool biased = kFull && steering.score_bias() && steering.score_bias_weighs();
    const bool bias_on_logits = biased && args_.spec.order == Order::kTopKThenScore;
    if (layout_.keeps_logits)
      look_up_logits(launch_, steering, row_at(layout_.logit_row), choice, bias_on_logits);
    bool mixed = false;
    if constexpr (kFull) mixed = args_.spec.score == Score::kSparseMixer;
    if (!mixed) {
      // Selection compared the logits themselves, and by nothing else.
      const bool best_first = !layout_.keeps_logits && !(kFull && steering.forced());
      score_chosen(launch_, steering, row_scores_, best_first, choice);
    } else if constexpr (kFull) {
      float* z = row_at(layout_.logit_row);
      for_each_expert<kValues>(args_.experts,
                               [&](int i, int e) { values_[i] = e < args_.experts ? z[e] : not_a_number(); });
      __syncwarp();
      sparsemixer<kValues>(launch_, choice, selection_.ids, z, values_);
    }
    finish_weights<kFull>(launch_, steering, biased && !bias_on_logits, choice, slot_row());
  }

  // Expert e -> remap[e], once weights are final: duplicates merge into the first slot. One lane does it.
  __device__ __forceinline__ void remap(const Row& row, Chosen& choice) {
    if (args_.steering.remap == nullptr || !row.steering.steered() || is_replay(row)) return;
    const int32_t* const to = args_.steering.remap + int64_t{row.steering.index} * args_.experts;
    int32_t* const ids = selection_.ids;
    float* const weights = slot_row();
    choice.spread(choice.ids, ids);
    choice.spread(choice.weights, weights);
    int kept = 0;
    if (lane() == 0) {
      for (int j = 0; j < choice.count; ++j) {
        const int32_t id = ids[j] < 0 ? -1 : __ldg(to + ids[j]);
        if (id < 0 || id >= args_.experts) continue;
        int slot = 0;
        while (slot < kept && ids[slot] != id) ++slot;
        const float weight = row.to_weigh ? weights[j] : 0.0f;
        if (slot == kept) {
          ids[kept] = id;
          weights[kept++] = weight;
        } else {
          weights[slot] += weight;
        }
      }
    }
    kept = from_lane(kept, 0);
    __syncwarp();
    choice.clear();
    choice.count = kept, choice.compact = true;
    choice.each([&](int s, int j) { choice.ids[s] = ids[j], choice.weights[s] = weights[j]; });
  }

  __device__ __forceinline__ void write(int64_t t, const Chosen& choice) {
    const int64_t first = t * args_.k;
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
      if (lane() + kLanes * s >= args_.k) continue;
      if (kCommon || args_.ids != nullptr) args_.ids[first + kLanes * s + lane()] = choice.ids[s];
      if (kCommon || args_.weights != nullptr)
        static_cast<float*>(args_.weights)[first + kLanes * s + lane()] = choice.weights[s];
    }
  }

  __device__ __forceinline__ void count(const Row& row, const Chosen& choice, int natural_count) {
    if (!row.counted) return;
    const bool steered = kSteers && in_table(launch_, row.steering_row);
    count_chosen(tally_, choice, row.slots, steered, slot_row());
    if (!tally_.wants_natural()) return;
    count_natural(tally_, choice, natural_count < 0 ? nullptr : selection_.natural, natural_count,
                  slot_row());
  }

  const GateLaunch& launch_;
  const GateArgs& args_;
  const GateLayout& layout_;
  unsigned char* const memory_;
  Selection& selection_;
  Tally<kValues, kLevel> tally_;
  Values<kValues> values_;  // logits; after selection_values what selection compares
  Values<kValues> scores_;
  RowScores row_scores_;
};

// The place of the first token of [begin, end) that counts; every warp finds it for itself.
__device__ __forceinline__ Place first_place(const GateLaunch& launch, int64_t begin, int64_t end) {
  const GateArgs& args = launch.args;
  Place place;
  if (args.token_table == nullptr) return place_of(launch.layout, Token{}.group, Token{}.segment);
  for (int64_t first = begin; first < end; first += kLanes) {
    Token token;
    const int64_t t = first + lane();
    if (t < end) token = read_token(launch, t);
    const bool valid = t < end && token.valid;
    if (valid) place = place_of(launch.layout, token.group, token.segment);
    const unsigned counted = ballot(valid && place.counted());
    if (counted == 0) continue;
    const int source = __ffs(static_cast<int>(counted)) - 1;
    place.group = from_lane(place.group, source);
    place.segment = from_lane(place.segment, source);
    return place;
  }
  return Place{};
}

// A block's rows, and the place of the row in shared memory where it adds up what they count.
struct BlockRows {
  int64_t begin, end;
  Place place;
};

__device__ __forceinline__ BlockRows begin_block(const GateLaunch& launch) {
  BlockRows block;
  block.begin = int64_t{blockIdx.x} * launch.rows_per_block;
  const int64_t last = block.begin + launch.rows_per_block;
  block.end = last < launch.args.tokens ? last : launch.args.tokens;
  if (launch.layout.block_row > 0) {
    block.place = first_place(launch, block.begin, block.end);
    for (int i = lane(); i < launch.layout.statistics_width; i += kLanes)
      reinterpret_cast<Sum*>(moe_route_shared)[i] = 0;
    __syncwarp();
  }
  return block;
}

__device__ __forceinline__ void end_block(const GateLaunch& launch, const BlockRows& block) {
  if (launch.layout.block_row == 0 || !block.place.counted()) return;
  const Sum* const row = reinterpret_cast<const Sum*>(moe_route_shared);
  const int width = launch.layout.statistics_width;
  __syncwarp();
  for (int i = lane(); i < width; i += kLanes) {
    if (row[i] != 0) add_to_tables(launch.args.statistics, block.place, width, i, row[i]);
  }
}

template <int kValues, Level kLevel, bool kCommon>
__global__ void __launch_bounds__(kLanes, blocks_at_once(kValues, kLevel, kCommon))
    gate_kernel(const __grid_constant__ GateLaunch launch) {
  wait_for_earlier_kernels();
  const BlockRows block = begin_block(launch);
  unsigned char* const memory = moe_route_shared + launch.layout.block_row;
  RowGate<kValues, kLevel, kCommon>(launch, memory, block.place).rows(block.begin, block.end);
  end_block(launch, block);
}

}  // namespace
}  // namespace moe_route::cuda
