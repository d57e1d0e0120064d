// The gate on CUDA: load, steer, choose, weigh, remap, count, all in one launch.
//
// Contract: moe_route/gate.h. A warp works on one row at a time; a block on a run of consecutive rows, so
// that most of its tokens count in the same place. Rows do not see each other; what a padding row holds
// reaches nothing. O(E / 32) steps a row. Work that nobody asked for (weights, scores of all experts, the
// natural choice) is not done.
#pragma once
#include <cuda_fp16.h>

#include "gate_block.cuh"
#include "gate_given.cuh"
#include "gate_table.cuh"

namespace moe_route::cuda {
namespace {

static_assert(sizeof(Selection) == GateLayout::kSelection);

// A row in flight.
struct Row {
  int64_t t = 0;
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
  __device__ __forceinline__ RowGate(const GateLaunch& launch, unsigned char* memory)
      : launch_(launch),
        args_(launch.args),
        layout_(launch.layout),
        memory_(memory),
        selection_(*reinterpret_cast<Selection*>(memory)),
        given_(launch.args),
        tally_(launch) {
    values_.place(row_at(layout_.value_row), args_.experts);
    scores_.place(row_at(layout_.score_row), args_.experts);
  }

  // Asks for the token and the logits of the first row: before anything else that a block has to wait for.
  __device__ __forceinline__ void begin_at(int64_t t) {
    const int bytes = args_.logits_type == DType::kFloat32 ? 4 : 2;
    row_bytes_ = args_.row_stride * bytes;
    logits_ = static_cast<const char*>(args_.logits) + t * row_bytes_;
    slot_ = t * args_.k + lane();
    if (loads_early()) load();
    ask_for_token(t);
  }
  // What counts in `place` adds up in the block's row.
  __device__ __forceinline__ void begin(const Place& place) {
    tally_.begin(place);
    if (args_.token_table == nullptr) tally_.turn_to(place_of(layout_, Token{}.group, Token{}.segment));
  }
  // Rows that follow each other, of which the first one's logits have been asked for.
  __device__ __forceinline__ void rows(int64_t begin, int64_t end) {
    int64_t t = begin;
    for (int left = kept(static_cast<int>(end - begin)); left > 0; --left) one_row(t++, left > 1);
    flush();
  }
  // A row by itself.
  __device__ __forceinline__ void row(int64_t t) {
    begin_at(t);
    one_row(t, false);
  }
  __device__ __forceinline__ void flush() { tally_.flush(); }

 private:
  __device__ __forceinline__ float* row_at(int offset) const {
    return reinterpret_cast<float*>(memory_ + offset);
  }
  // Room for a number of each slot, once the choice is in registers.
  __device__ __forceinline__ float* slot_row() const { return selection_.chosen; }

  // Logits are asked for before the token is known: one wait, not two. (A given choice may need none.)
  __device__ __forceinline__ bool loads_early() const {
    return !kFull || args_.given.mode == GivenMode::kNone;
  }

  __device__ __forceinline__ void ask_for_token(int64_t t) {
    if (args_.token_table != nullptr) token_ = read_token<kCommon>(launch_, t);
  }

  // `more`: the next row's logits are asked for as soon as this one's are used up.
  __device__ __forceinline__ void one_row(int64_t t, bool more) {
    Row row;
    Chosen choice;
    prepare(t, row, choice);
    const auto ask_for_next = [&] {
      logits_ += row_bytes_;
      if (more) ask_for_token(t + 1);
      if (more && loads_early()) load();
    };
    if (row.valid) {
      const int natural_count = choose_all(row, choice, loads_early());
      if constexpr (kCommon) ask_for_next();
      weigh(row, choice);
      if constexpr (!kCommon) ask_for_next();
      if constexpr (kFull) {
        if (args_.steering.remap != nullptr && row.steering.steered() && !is_replay(row))
          remap(launch_, row.steering, row.to_weigh, selection_.ids, slot_row(), choice);
      }
      write(choice);
      count(row, choice, natural_count);
    } else {
      ask_for_next();
      choice.clear();
      write(choice);
    }
    __syncwarp();  // the next row writes where this one was read
  }

  // ---- what is to be done for a row -------------------------------------------------------------

  __device__ __forceinline__ void prepare(int64_t t, Row& row, Chosen& choice) {
    row.t = t;
    const Token token = token_;
    row.valid = token.valid != 0;
    row.steering.k = args_.k;
    if (args_.token_table == nullptr) {
      row.counted = tally_.counting();
    } else if (row.valid) {
      const Place place = place_of(layout_, token.group, token.segment);
      row.counted = place.counted();
      if (row.counted) tally_.turn_to(place);
    }
    if constexpr (kSteers) {  // last, so that nothing waits for the planes before they are used
      if (row.valid && in_table(launch_, token.steering_row)) {
        const bool neutral_matters = args_.given.mode == GivenMode::kNatural || tally_.wants_natural();
        row.steering =
            read_steering<kFull, kCommon, kValues>(launch_, token.steering_row, neutral_matters, planes_);
      }
    }
    row.slots = row.valid ? row.steering.k : 0;
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

  __device__ __forceinline__ bool is_baseline() const { return args_.given.mode == GivenMode::kBaseline; }

  // Takes the given choice where it is the row's choice.
  __device__ __forceinline__ void take_given(Row& row, Chosen& choice) {
    const bool replay = args_.given.mode == GivenMode::kReplay;
    row.given = !is_baseline() && given_.has(row.t) && (replay || !row.steering.steered());
    if (!row.given) return;
    given_.read_ids(row.t, choice);
    if (replay) row.slots = args_.k;
    if (replay || args_.given.weights == nullptr) return;
    row.to_weigh = false;
    choice.each([&](int s, int j) {
      choice.weights[s] = choice.ids[s] < 0 ? 0.0f : given_.weight(row.t * args_.k + j);
    });
  }

  // ---- logits and choice ------------------------------------------------------------------------

  template <class T, class Convert>
  __device__ __forceinline__ void load_as(Convert convert) {
    load_row<kValues, kCommon>(reinterpret_cast<const T*>(logits_), args_.experts,
                               [&](int i, T x) { values_[i] = convert(x); });
    if (kCommon || args_.experts == kLanes * kValues) return;
    for_each_expert<kValues>(args_.experts, [&](int i, int e) {
      if (e >= args_.experts) values_[i] = not_a_number();
    });
  }
  __device__ __forceinline__ void load() {
    if (args_.logits_type == DType::kFloat32) {
      load_as<float>([](float x) { return x; });
    } else if (args_.logits_type == DType::kBFloat16) {
      load_as<uint16_t>([](uint16_t x) { return math::as_float(int32_t(uint32_t{x} << 16)); });
    } else {
      load_as<__half>([](__half x) { return __half2float(x); });
    }
    if constexpr (kFull) {
      const float cap = args_.spec.softcap;
      if (cap == 0) return;
      for_each_expert<kValues>(args_.experts,
                               [&](int i, int) { values_[i] = math::tanh(values_[i] / cap) * cap; });
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
    if constexpr (kCommon) {
      choose_common(row, choice);
      return -1;
    } else if constexpr (!kFull) {
      choose(row, row.steering, true, true, loaded, choice);
      return -1;
    } else {
      const bool compared = row.counted && tally_.wants_natural() &&
                            (row.steering.steered() || is_replay(row) || is_baseline());
      const bool natural_given =
          compared && (args_.given.mode == GivenMode::kNatural || is_baseline()) && given_.has(row.t);
      const bool natural_chosen = compared && !natural_given;
      int natural_count = compared ? args_.k : -1;
      if (natural_given) {
        for (int j = lane(); j < args_.k; j += kLanes) selection_.natural[j] = given_.id(row.t * args_.k + j);
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

  // Nothing but steered logits decides, so scores come after the choice, which knows the largest logit.
  __device__ __forceinline__ void choose_common(const Row& row, Chosen& choice) {
    if constexpr (kSteers) {
      if (row.steering.steered()) steer<kFull, kCommon, kValues>(launch_, row.steering, planes_, values_);
    }
    choose_experts(row.steering, row.slots, choice);
    row_scores_.largest = from_lane(choice.logits[0], 0);
    if constexpr (kLevel != Level::kPlain) {
      if (!row.scores_counted) return;
      row_scores_ = score_all<kValues>(Score::kSoftmax, values_, args_.experts, args_.statistics.entropy,
                                       scores_, &row_scores_.largest);
      tally_.template scores<true>(row_scores_, scores_);
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
    if (!loaded) load();
    if constexpr (kSteers) {
      if (steering.steered()) steer<kFull, kCommon, kValues>(launch_, steering, planes_, values_);
    }
    if (by_score || softmax_weights || scores_counted) {
      row_scores_ = score_all<kValues>(args_.spec.score, values_, args_.experts,
                                       scores_counted && args_.statistics.entropy, scores_);
      if (scores_counted) tally_.template scores<false>(row_scores_, scores_);
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
      Values<kValues> members;
      members.place(row_at(layout_.member_row), args_.experts);
      chosen = choose_by_class<kValues>(launch_, steering, want, values_, members, selection_);
    }
    choice.clear();
    choice.count = chosen, choice.compact = true;
    choice.each([&](int s, int j) {
      choice.ids[s] = selection_.ids[j];
      choice.logits[s] = selection_.chosen[j];
    });
  }

  // ---- weights, remap, outputs, counts ----------------------------------------------------------

  // Softmax over the chosen; their best comes first. The numerators are at most 1, so their sum is finite.
  __device__ __forceinline__ void weigh_common(Chosen& choice) {
    choice.weights[0] = softmax_numerator(choice.logits[0], row_scores_.largest);
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

  __device__ __forceinline__ void write(const Chosen& choice) {
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
      if (lane() + kLanes * s >= args_.k) continue;
      if (kCommon || args_.ids != nullptr) args_.ids[slot_ + kLanes * s] = choice.ids[s];
      if (kCommon || args_.weights != nullptr)
        static_cast<float*>(args_.weights)[slot_ + kLanes * s] = choice.weights[s];
    }
    slot_ += args_.k;
  }

  __device__ __forceinline__ void count(const Row& row, const Chosen& choice, int natural_count) {
    if (!row.counted) return;
    const bool steered = kSteers && row.steering.index >= 0;
    count_chosen<kCommon>(tally_, choice, row.slots, steered, slot_row());
    if (!tally_.wants_natural()) return;
    count_natural(tally_, choice, natural_count < 0 ? nullptr : selection_.natural, natural_count,
                  slot_row());
  }

  const GateLaunch& launch_;
  const GateArgs& args_;
  const GateLayout& layout_;
  unsigned char* const memory_;
  Selection& selection_;
  const Given given_;
  Tally<kValues, kLevel, kCommon> tally_;
  const char* logits_;  // of the row that is asked for next
  int64_t row_bytes_;
  int64_t slot_;  // of the next row, the lane's first one
  Token token_;
  Values<kValues> values_;  // logits; after selection_values what selection compares
  Values<kValues> scores_;
  RowScores row_scores_;
  Planes<kValues> planes_;
};

template <int kValues, Level kLevel, bool kCommon>
__global__ void __launch_bounds__(kLanes, blocks_at_once(kValues, kLevel, kCommon))
    gate_kernel(const __grid_constant__ GateLaunch launch) {
  wait_for_earlier_kernels();
  const RowRange range = rows_of_block(launch);
  RowGate<kValues, kLevel, kCommon> gate(launch, moe_route_shared + launch.layout.block_row);
  gate.begin_at(range.begin);
  const Place place = begin_block(launch, range);
  gate.begin(place);
  gate.rows(range.begin, range.end);
  end_block(launch, place);
}

}  // namespace
}  // namespace moe_route::cuda
