// The gate on CUDA: load, steer, choose, weigh, remap, count, all in one launch.
//
// Contract: moe_route/gate.h. Half a warp (a team) works on one row at a time; a block on a run of
// consecutive rows, so that most of its tokens count in the same place. Rows do not see each other; padding
// rows are never read. O(E / 16) steps a row. Work that nobody asked for (weights, scores of all experts, the
// natural choice) is not done.
//
// kFull = false leaves out what plain routing needs none of: steering, given choices, group limits,
// SparseMixer.
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

__device__ __forceinline__ Token read_token(const int32_t* table, int64_t t) {
  Token token;
  if (table == nullptr) return token;
  const int32_t* row = table + t * kTokenColumns;
  token.steering_row = __ldg(row + kTokenSteeringRow);
  token.group = __ldg(row + kTokenGroup);
  token.segment = __ldg(row + kTokenSegment);
  token.valid = __ldg(row + kTokenValid) != 0;
  return token;
}

// A row in flight.
struct Row {
  int64_t t = 0;
  Token token;
  SteeringRow steering;
  Place place;
  int slots = 0;       // k of this row
  bool valid = false;  // a token, and no padding
  bool counted = false;
  bool given = false;           // the choice came with the call
  bool to_weigh = false;        // weights are to be computed
  bool scores_counted = false;  // mass or entropy is wanted
};

template <int kVectors, Level kLevel>
class RowGate {
  static constexpr bool kFull = kLevel == Level::kFull;

 public:
  __device__ __forceinline__ RowGate(const GateLaunch& launch, unsigned char* memory, Sum* block_row,
                                     Place block_place)
      : args_(launch.args),
        layout_(launch.layout),
        memory_(memory),
        tally_(launch.args, block_row, block_place) {
    slots_.keys = reinterpret_cast<unsigned long long*>(memory + GateLayout::kKeys);
    slots_.listed = reinterpret_cast<float*>(memory + GateLayout::kValues);
    slots_.ids = reinterpret_cast<int32_t*>(memory + layout_.ids);
    slots_.logits = reinterpret_cast<float*>(memory + layout_.logits);
    slots_.weights = reinterpret_cast<float*>(memory + layout_.weights);
    values_.place(row_at(layout_.value_row));
    scores_.place(row_at(layout_.score_row));
  }

  // Rows of [begin, end) of which this warp has two in every step of `step`.
  __device__ __forceinline__ void rows(int64_t begin, int64_t end, int64_t step) {
    for (int64_t first = begin; first < end; first += step) {
      const int64_t t = first + threadIdx.x / kTeam % kTeamsPerWarp;
      one_row(t, t < end);
    }
    tally_.flush();
  }

 private:
  __device__ __forceinline__ float* row_at(int offset) const {
    return reinterpret_cast<float*>(memory_ + offset);
  }

  __device__ __forceinline__ void one_row(int64_t t, bool there) {
    Row row;
    Choice choice;
    prepare(t, there, row, choice);
    if (any(row.valid)) {
      const int natural_count = choose_all(row, choice);
      weigh(row, choice);
      if constexpr (kFull) remap(row, choice);
      write(t, there, row, choice);
      count(row, choice, natural_count);
    } else {
      write(t, there, row, choice);
    }
    __syncwarp();  // the next row writes where this one was read
  }

  // ---- what is to be done for a row -------------------------------------------------------------

  __device__ __forceinline__ void prepare(int64_t t, bool there, Row& row, Choice& choice) {
    row.t = t;
    if (there) row.token = read_token(args_.token_table, t);
    row.valid = there && row.token.valid;
    row.steering.k = args_.k;
    if constexpr (kFull) {
      if (args_.steering.rows > 0 && any(row.valid && in_table(args_, row.token.steering_row))) {
        const bool neutral_matters = args_.given.mode == GivenMode::kNatural || tally_.wants_natural();
        row.steering =
            read_steering<kVectors>(args_, row.valid ? row.token.steering_row : -1, neutral_matters);
      }
    }
    row.slots = row.valid ? row.steering.k : 0;
    if (row.valid) row.place = place_of(args_.statistics, row.token.group, row.token.segment);
    row.counted = row.valid && row.place.counted();
    row.scores_counted = row.counted && tally_.wants_scores();
    row.to_weigh = row.valid && (args_.weights != nullptr || (row.counted && tally_.wants_weights()));
    if constexpr (kFull) {
      if (args_.given.mode != GivenMode::kNone) take_given(row, choice);
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
    return row.valid && (args_.given.every_row || given_id_as_stored(row.t * args_.k) != -1);
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
  __device__ __forceinline__ void take_given(Row& row, Choice& choice) {
    const bool replay = args_.given.mode == GivenMode::kReplay;
    row.given = has_given(row) && (replay || !row.steering.steered);
    bool whole = true;
    if (row.given) {
      for_each_slot(args_.k, [&](int j) {
        slots_.ids[j] = given_id(row.t * args_.k + j);
        whole &= slots_.ids[j] >= 0;
      });
      choice.count = args_.k;
      if (replay) row.slots = args_.k;
    }
    choice.compact = ballot(whole) == 0xffffu;
    if (row.given && !replay && args_.given.weights != nullptr) {
      row.to_weigh = false;
      for_each_slot(args_.k, [&](int j) {
        slots_.weights[j] = slots_.ids[j] < 0 ? 0.0f : given_weight(row.t * args_.k + j);
      });
    }
    __syncwarp();
  }

  // ---- logits and choice ------------------------------------------------------------------------

  // All loads of a lane are on their way before the first is used: those past the last expert load that one
  // again.
  template <class Read>
  __device__ __forceinline__ void load_by(bool wanted, Read read) {
    const int last = args_.experts - 1;
    if (!wanted) {
      for_each_expert<kVectors>(args_.experts, [&](int i, int) { values_[i] = not_a_number(); });
    } else if constexpr (kVectors > 0) {
      for_each_expert<kVectors>(args_.experts, [&](int i, int e) { values_[i] = read(min(e, last)); });
      for_each_expert<kVectors>(args_.experts, [&](int i, int e) {
        if (e > last) values_[i] = not_a_number();
      });
    } else {
      constexpr int kInFlight = 8;
      for (int first = 0; first < vectors_of(args_.experts); first += kInFlight) {
        float x[kInFlight];
#pragma unroll
        for (int n = 0; n < kInFlight; ++n) x[n] = read(min(kTeam * (first + n) + team_lane(), last));
#pragma unroll
        for (int n = 0; n < kInFlight; ++n) {
          const bool there = kTeam * (first + n) + team_lane() <= last;
          if (first + n < vectors_of(args_.experts)) values_[first + n] = there ? x[n] : not_a_number();
        }
      }
    }
  }

  __device__ __forceinline__ void load(int64_t t, bool wanted) {
    const int64_t first = t * args_.row_stride;
    if (args_.logits_type == DType::kFloat32) {
      const float* row = static_cast<const float*>(args_.logits) + first;
      load_by(wanted, [&](int e) { return __ldg(row + e); });
    } else if (args_.logits_type == DType::kBFloat16) {
      const uint16_t* row = static_cast<const uint16_t*>(args_.logits) + first;
      load_by(wanted, [&](int e) { return math::as_float(int32_t(uint32_t{__ldg(row + e)} << 16)); });
    } else {
      const __half* row = static_cast<const __half*>(args_.logits) + first;
      load_by(wanted, [&](int e) { return __half2float(__ldg(row + e)); });
    }
  }

  // Scores are compared only where they are not a monotone function of the logit, so that scores that collide
  // after rounding never decide.
  __device__ __forceinline__ bool compares_scores(const SteeringRow& steering) const {
    if (args_.spec.order == Order::kTopKThenScore) return false;
    return args_.correction_bias != nullptr || args_.spec.groups > 1 || steering.score_bias;
  }

  // The natural choice first, where it has to be known and is another one; then the choice itself. Returns
  // how many natural ids there are.
  __device__ __forceinline__ int choose_all(Row& row, Choice& choice) {
    if constexpr (!kFull) {
      choose(row, row.steering, row.valid && !row.given, true, choice);
      return choice.count;
    } else {
      const bool compared = row.counted && tally_.wants_natural() && (row.steering.steered || is_replay(row));
      const bool natural_given = compared && args_.given.mode == GivenMode::kNatural && has_given(row);
      const bool natural_chosen = compared && !natural_given;
      int32_t* const natural = reinterpret_cast<int32_t*>(memory_ + layout_.natural);
      int natural_count = natural_given ? args_.k : 0;
      for_each_slot(natural_count, [&](int j) { natural[j] = given_id(row.t * args_.k + j); });
      __syncwarp();
      SteeringRow none;
      none.k = args_.k;
#pragma unroll 1
      for (int pass = any(natural_chosen) ? 0 : 1; pass < 2; ++pass) {  // one copy of the code for both
        const bool last = pass == 1;
        const SteeringRow steering = last ? row.steering : none;
        Choice made = choice;
        choose(row, steering, last ? row.valid && !row.given : natural_chosen, last, made);
        if (last) choice = made;
        if (!last && natural_chosen) {
          for_each_slot(made.count, [&](int j) { natural[j] = slots_.ids[j]; });
          natural_count = made.count;
        }
        if (!last && is_replay(row))
          for_each_slot(args_.k, [&](int j) { slots_.ids[j] = given_id(row.t * args_.k + j); });
        __syncwarp();
      }
      return natural_count;
    }
  }

  // From logits to ids (where `choosing`), scores and the logits that weighing looks up (where `last`).
  __device__ __forceinline__ void choose(Row& row, const SteeringRow& steering, bool choosing, bool last,
                                         Choice& choice) {
    const bool by_score = choosing && compares_scores(steering);
    const bool softmax_weights = last && row.to_weigh && args_.spec.score == Score::kSoftmax &&
                                 !softmax_over_chosen(args_.spec, steering);
    const bool scores_counted = last && row.scores_counted;
    load(row.t, choosing || (last && (row.to_weigh || row.scores_counted)));
    if constexpr (kFull) {
      if (any(steering.steered)) steer<kVectors>(args_, steering, values_);
    }
    if (any(by_score || softmax_weights || scores_counted)) {
      row_scores_ =
          score_all<kVectors>(args_.spec.score, values_, args_.experts, args_.statistics.entropy, scores_);
    }
    if (layout_.keeps_logits) {
      float* z = row_at(layout_.logit_row);
      for_each_expert<kVectors>(args_.experts, [&](int i, int e) {
        if (e < args_.experts) z[e] = values_[i];
      });
      __syncwarp();
    }
    if (!any(choosing)) return;
    selection_values(steering, by_score);
    choice_of(steering, choosing ? (last ? row.slots : args_.k) : 0, choosing, choice);
  }

  // What selection compares, in place of the logits.
  __device__ __forceinline__ void selection_values(const SteeringRow& steering, bool by_score) {
    if (!layout_.keeps_logits) return;  // the logits themselves
    const float* correction = args_.correction_bias;
    for_each_expert<kVectors>(args_.experts, [&](int i, int e) {
      const float x = values_[i];
      float v = by_score && x == x ? scores_[i] * row_scores_.factor : x;
      if (correction != nullptr) v = v + __ldg(correction + min(e, args_.experts - 1));
      if constexpr (kFull) {
        if (steering.score_bias) v = v + entry(args_, steering, kScoreBias, e, 0.0f);
      }
      values_[i] = v;
    });
    if constexpr (kLevel != Level::kPlain) {
      if (args_.spec.groups > 1) {
        limit_groups<kVectors>(args_.spec, args_.experts, row_at(layout_.value_row),
                               row_at(layout_.group_scores), values_);
      }
    }
  }

  __device__ __forceinline__ void choice_of(const SteeringRow& steering, int want, bool choosing,
                                            Choice& choice) {
    int chosen = 0;
    bool forced = false;
    if constexpr (kFull) forced = any(steering.forced);
    if (!forced) {
      chosen = select_best<kVectors>(values_, args_.experts, args_.k, want, 0, slots_, slots_.ids);
      if (any(chosen < want)) {
        chosen = append_nan<kVectors>(values_, args_.experts, want, chosen, slots_, slots_.ids,
                                      [](int) { return true; });
      }
    } else if constexpr (kFull) {
      chosen = choose_by_class(steering, want);
    }
    if (choosing) choice.count = chosen, choice.compact = true;
  }

  // Forced-on experts first, forced-off last, forbidden nowhere.
  __device__ __forceinline__ int choose_by_class(const SteeringRow& steering, int want) {
    Values<kVectors> members;
    members.place(row_at(layout_.member_row));
    int chosen = 0;
#pragma unroll 1
    for (int rank_class = 1; rank_class >= -1; --rank_class) {
      const auto member = [&](int e) {
        return class_of(steering.forced ? force_code(entry(args_, steering, kForce, e, 0.0f)) : 0) ==
               rank_class;
      };
      for_each_expert<kVectors>(args_.experts,
                                [&](int i, int e) { members[i] = member(e) ? values_[i] : not_a_number(); });
      const int before = chosen;
      chosen +=
          select_best<kVectors>(members, args_.experts, args_.k, want - before, before, slots_, slots_.ids);
      if (any(chosen < want)) {
        chosen = append_nan<kVectors>(values_, args_.experts, want, chosen, slots_, slots_.ids, member);
      }
    }
    return chosen;
  }

  // ---- weights, remap, outputs, counts ----------------------------------------------------------

  __device__ __forceinline__ void weigh(const Row& row, const Choice& choice) {
    if (!any(row.to_weigh)) return;
    const SteeringRow& steering = row.steering;
    const int count = row.to_weigh ? choice.count : 0;
    const bool biased = kFull && steering.score_bias && steering.score_bias_weighs;
    const bool bias_on_logits = biased && args_.spec.order == Order::kTopKThenScore;
    if (layout_.keeps_logits) {
      look_up_logits(args_, steering, row_at(layout_.logit_row), slots_, count, bias_on_logits);
      __syncwarp();
    }
    bool mixed = false;
    if constexpr (kFull) mixed = args_.spec.score == Score::kSparseMixer;
    if (!mixed) {
      score_chosen(args_, steering, row_scores_, slots_, count);
    } else if constexpr (kFull) {
      float* z = row_at(layout_.logit_row);
      for_each_expert<kVectors>(
          args_.experts, [&](int i, int e) { values_[i] = e < args_.experts ? z[e] : not_a_number(); });
      __syncwarp();
      sparsemixer<kVectors>(args_, slots_, count, z, values_);
    }
    Choice weighed = choice;
    weighed.count = count;
    finish_weights(args_, steering, biased && !bias_on_logits, slots_, weighed);
  }

  // Expert e -> remap[e], once weights are final: duplicates merge into the first slot. One lane does it.
  __device__ __forceinline__ void remap(const Row& row, Choice& choice) {
    const bool wanted = row.valid && row.steering.remap != nullptr && row.steering.steered && !is_replay(row);
    if (!any(wanted)) return;
    int kept = 0;
    if (wanted && team_lane() == 0) {
      for (int j = 0; j < choice.count; ++j) {
        const int32_t id = slots_.ids[j] < 0 ? -1 : __ldg(row.steering.remap + slots_.ids[j]);
        if (id < 0 || id >= args_.experts) continue;
        int slot = 0;
        while (slot < kept && slots_.ids[slot] != id) ++slot;
        const float weight = row.to_weigh ? slots_.weights[j] : 0.0f;
        if (slot == kept) {
          slots_.ids[kept] = id;
          slots_.weights[kept++] = weight;
        } else {
          slots_.weights[slot] += weight;
        }
      }
    }
    kept = from_lane(kept, 0);
    __syncwarp();
    if (wanted) choice.count = kept, choice.compact = true;
  }

  __device__ __forceinline__ void write(int64_t t, bool there, const Row& row, const Choice& choice) {
    const int count = row.valid ? choice.count : 0;
    for_each_slot(there ? args_.k : 0, [&](int j) {
      if (args_.ids != nullptr) args_.ids[t * args_.k + j] = j < count ? slots_.ids[j] : -1;
      if (args_.weights != nullptr)
        static_cast<float*>(args_.weights)[t * args_.k + j] = j < count ? slots_.weights[j] : 0.0f;
    });
  }

  __device__ __forceinline__ void count(const Row& row, const Choice& choice, int natural_count) {
    if (!any(row.counted)) return;
    if (row.counted) {
      tally_.turn_to(row.place);
      tally_.scalar(kStatTokens, 1);
      tally_.scalar(kStatSlots, row.slots);
      if (in_table(args_, row.token.steering_row)) tally_.scalar(kStatSteered, 1);
      if (row.scores_counted) tally_.scores(row_scores_, scores_);
    }
    count_chosen(tally_, slots_, choice, row.counted, row.slots);
    if (!tally_.wants_natural()) return;
    bool differs = false;
    const int32_t* natural = slots_.ids;
    int ids = choice.count;
    if constexpr (kFull) {
      differs = row.steering.steered || is_replay(row);
      if (differs) natural = reinterpret_cast<const int32_t*>(memory_ + layout_.natural), ids = natural_count;
    }
    count_natural(tally_, slots_, choice, row.counted, natural, ids, differs);
  }

  const GateArgs& args_;
  const GateLayout& layout_;
  unsigned char* const memory_;
  Tally<kVectors, kLevel> tally_;
  Slots slots_;
  Values<kVectors> values_;  // logits; after selection_values what selection compares
  Values<kVectors> scores_;
  RowScores row_scores_;
};

// The place of the first token of [begin, end) that counts; every warp finds it for itself.
__device__ __forceinline__ Place first_place(const GateArgs& args, int64_t begin, int64_t end) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  Place place;
  for (int64_t first = begin; first < end; first += 32) {
    Token token;
    const int64_t t = first + lane;
    if (t < end) token = read_token(args.token_table, t);
    const bool valid = t < end && token.valid;
    if (valid) place = place_of(args.statistics, token.group, token.segment);
    const unsigned counted = __ballot_sync(kWarp, valid && place.counted());
    if (counted == 0) continue;
    const int source = __ffs(static_cast<int>(counted)) - 1;
    place.group = __shfl_sync(kWarp, place.group, source);
    place.segment = __shfl_sync(kWarp, place.segment, source);
    return place;
  }
  return Place{};
}

template <int kVectors, Level kLevel>
__global__ void __launch_bounds__(kVectors > 0 ? kGateThreads : kGateThreadsAboveRegisters,
                                  blocks_at_once(kVectors, kLevel))
    gate_kernel(const __grid_constant__ GateLaunch launch) {
  const int64_t begin = int64_t{blockIdx.x} * launch.rows_per_block;
  const int64_t last = begin + launch.rows_per_block;
  const int64_t end = last < launch.args.tokens ? last : launch.args.tokens;
  const int width = statistics_width(launch.args);
  Sum* const block_row = launch.layout.block_row > 0 ? reinterpret_cast<Sum*>(moe_route_shared) : nullptr;
  Place place;
  if (block_row != nullptr) {
    place = first_place(launch.args, begin, end);
    for (int i = static_cast<int>(threadIdx.x); i < width; i += static_cast<int>(blockDim.x))
      block_row[i] = 0;
    __syncthreads();
  }
  const int team = static_cast<int>(threadIdx.x / kTeam), teams = static_cast<int>(blockDim.x / kTeam);
  unsigned char* const memory = moe_route_shared + launch.layout.block_row + team * launch.layout.team;
  RowGate<kVectors, kLevel>(launch, memory, block_row, place)
      .rows(begin + team / kTeamsPerWarp * kTeamsPerWarp, end, teams);
  if (block_row == nullptr || !place.counted()) return;  // the same for the whole block
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < width; i += static_cast<int>(blockDim.x)) {
    if (block_row[i] != 0) add_to_tables(launch.args.statistics, place, width, i, block_row[i]);
  }
}

}  // namespace

template <int kVectors>
void load_gate(Level level) {
  if (level == Level::kPlain) return load(gate_kernel<kVectors, Level::kPlain>);
  if (level == Level::kScored) return load(gate_kernel<kVectors, Level::kScored>);
  if constexpr (kTeam * kVectors <= register_experts(Level::kFull)) load(gate_kernel<kVectors, Level::kFull>);
}

template <int kVectors>
void launch_gate(const GateLaunch& gate, Stream stream) {
  const int threads = kVectors > 0 ? kGateThreads : kGateThreadsAboveRegisters;
  const auto start = [&](void (*kernel)(GateLaunch)) {
    launch("gate", kernel, gate.blocks, threads, gate.layout.shared_bytes, stream, gate);
  };
  if (gate.level == Level::kPlain) return start(gate_kernel<kVectors, Level::kPlain>);
  if (gate.level == Level::kScored) return start(gate_kernel<kVectors, Level::kScored>);
  if constexpr (kTeam * kVectors <= register_experts(Level::kFull)) {
    start(gate_kernel<kVectors, Level::kFull>);
  } else {
    throw std::logic_error("moe_route: there is no full gate kernel of this width");
  }
}

}  // namespace moe_route::cuda
