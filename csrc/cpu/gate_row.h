// The gate on CPU: load, steer, choose, weigh, remap, count.
//
// Contract: moe_route/gate.h. The same bits on every instruction set: F is 16 lanes of float
// (gate_lanes_*.h), each lane one correctly rounded operation at a time. Rows do not see each other; padding
// rows are never read. Work that nobody asked for (weights, scores of all experts, the natural choice) is not
// done. O(E / 16) a row.
//
// A row is a chain of short dependent steps (fold, list, rank, look up, normalize), each of which waits for
// the one before. So rows go through in blocks, step by step: while one row waits, the processor works on the
// next. Where lanes can be transposed, steps that fold or sort take sixteen rows at once, one row a lane
// (gate_block.h), and few experts go from load to count that way (gate_few.h).
#pragma once
#include <new>

#include "gate_block.h"
#include "gate_count.h"
#include "gate_few.h"
#include "gate_force.h"
#include "gate_given.h"
#include "gate_widths.h"

namespace moe_route::cpu {
namespace {

struct Token {
  int64_t steering_row = -1;
  int64_t group = 0;
  int64_t segment = -1;
  bool valid = true;
};

inline Token read_token(const int32_t* table, int64_t t) {
  if (table == nullptr) return {};
  const int32_t* row = table + t * kTokenColumns;
  return {row[kTokenSteeringRow], row[kTokenGroup], row[kTokenSegment], row[kTokenValid] != 0};
}

// Steering rows kept unpacked: a batch of sequences in different languages steers each in its own way.
inline constexpr int kSteeringRows = 8;

// The most slots that rows without a book fill: of more, too many rows have a list that sixteen lanes do not hold, and
// are done twice.
inline constexpr int kPlainSlots = 10;

// A row in flight.
template <class F>
struct Row {
  using T = typename F::Scalar;
  Workspace<F> work;
  int64_t t = 0;
  Token token;
  const SteeringRow<F>* steering = nullptr;
  bool counted = false;
  bool given = false;           // the choice came with the call
  bool to_weigh = false;        // weights are to be computed
  bool scores_counted = false;  // mass or entropy is wanted
  bool steered = false;         // z differs from raw
  bool scored = false;          // scores of all experts are wanted
  bool by_score = false;        // selection compares scores
  int slots = 0;                // k of this row
  int wanted = 0;               // of the short list; 0: there is none
  int listed = 0;               // candidates on it
  T bound = 0;
  const int32_t* ranked = nullptr;  // the short list's ids, best first, where the block sorted it
  const T* raw = nullptr;           // logits
  const T* z = nullptr;             // logits after steering
  const T* values = nullptr;        // what selection compares
  const T* listable = nullptr;  // ... and what may come onto the short list: under force the free experts'
  RowScores<T> scores;
  Choice<F> choice;
};

template <class F>
class RowGate {
 public:
  using T = typename F::Scalar;
  static size_t workspace_bytes(const GateArgs& args, int64_t rows) {
    const int experts = args.experts;
    Arena arena(nullptr);
    for (int i = 0; i < block_of(experts, rows); ++i) Workspace<F>(arena, experts);
    for (int i = 0; i < kSteeringRows; ++i) ForceStore(arena, args);
    arena.take<int64_t>(Tally<F>::room(experts));
    return arena.used();
  }

  // rows: of the call.
  RowGate(const GateArgs& args, int64_t rows, void* memory) : RowGate(args, rows, Arena(memory)) {}

  void rows(int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end;) {
      if constexpr (F::kTransposes) {
        if (few_.serves()) {
          if (end - t >= kLanes && take_few(t)) {
            t += kLanes;
            continue;
          }
          few_.flush(tally_);
        }
        if (plain_ && end - t >= kLanes && take_plain(t)) {
          t += kLanes;
          continue;
        }
      }
      int count = 0;
      while (count < block_ && t < end) {
        const Token token = read_token(args_.token_table, t);
        if (!token.valid) {
          write_empty(t++);
          continue;
        }
        if (count > 0 && evicts_steering(token)) break;  // a row of this block may still need it
        prepare(block_rows_[count++], t++, token);
      }
      take_block(count);
    }
    if constexpr (F::kTransposes) few_.flush(tally_);
  }

 private:
  RowGate(const GateArgs& args, int64_t rows, Arena arena)
      : args_(args),
        given_(args),
        block_(block_of(args.experts, rows)),
        side_by_side_(F::kTransposes && rows >= widths_of(F::kSet).side_by_side),
        vectors_(vectors_of(args.experts)),
        logit_bytes_(sizeof(T) == 8                        ? 8
                     : args.logits_type == DType::kFloat32 ? 4
                                                           : 2),
        tally_(arena, args.statistics, args.experts),
        scores_counted_(tally_.wants_scores()),
        weights_counted_(tally_.wants_weights()),
        softmax_over_all_(args.spec.score == Score::kSoftmax && !softmax_over_chosen<F>(args.spec, nullptr)),
        plain_(side_by_side_ && block_ == kLanes && args.k <= kPlainSlots &&
               args.given.mode == GivenMode::kNone && weighs_in_lanes(args) &&
               BlockBounds<F>::serves(vectors_, args.k)),
        weights_(args),
        few_(args, rows, tally_.wants_scores()) {
    for (int i = 0; i < block_; ++i) {
      new (&block_rows_[i]) Row<F>;
      block_rows_[i].work = Workspace<F>(arena, args.experts);
    }
    if (side_by_side_) spread_.clear(), scores_.clear(), weights_.clear();
    for (ForceStore& force : force_) force = ForceStore(arena, args);
  }

  // Sixteen rows from t on at once, if they are alike.
  bool take_few(int64_t t) {
    const Token token = read_token(args_.token_table, t);
    if (!token.valid || in_table(token.steering_row)) return false;
    if (args_.token_table) {
      const int32_t* first = args_.token_table + t * kTokenColumns;
      bool alike = true;
      for (int r = 1; r < kLanes; ++r)
        alike &= __builtin_memcmp(first, first + r * kTokenColumns, kTokenColumns * sizeof(int32_t)) == 0;
      if (!alike) return false;
    }
    return few_.take(t, token.group, token.segment, tally_);
  }

  // ---- sixteen plain rows -------------------------------------------------------------------------

  // Sixteen valid rows from t on, whose logits one steering row moves or forces, or none: the steps of any block, without
  // the book that is kept of a row, which is most of what choosing few of many experts costs. False: nothing was done.
  [[gnu::noinline]] bool take_plain(int64_t t) {
    Token tokens[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      tokens[i] = read_token(args_.token_table, t + i);
      if (!in_table(tokens[i].steering_row)) tokens[i].steering_row = -1;
      if (!tokens[i].valid || tokens[i].steering_row != tokens[0].steering_row) return false;
    }
    const SteeringRow<F>* const steering = steering_row(tokens[0].steering_row);
    if (steering && !is_plain(*steering)) return false;
    const bool forced = steering && steering->force;

    const T* z[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      z[i] = load(block_rows_[i].work, t + i);
    }
    if (steering) steer_plain(*steering, z);
    bool counted = false;
    for (const Token& token : tokens) counted |= tally_.counts(token.group, token.segment);
    const bool weighs = args_.weights || (counted && weights_counted_);
    const bool by_score = compares_scores(nullptr);
    const bool scored = wants_scores(counted && scores_counted_, by_score, weighs && softmax_over_all_);
    RowScores<T> scores[kLanes];
    if (scored) score_plain(z, scores);
    const T *values[kLanes], *listable[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      const Workspace<F>& work = block_rows_[i].work;
      values[i] = listable[i] =
          selection_values(work, nullptr, z[i], scored ? &scores[i] : nullptr, by_score);
      if (forced) listable[i] = free_values(work, *steering, values[i], args_.experts);
      bounds_.take(i, listable[i], vectors_);
    }
    uint32_t left = rank_plain(listable, forced ? free_slots(*steering, args_.k) : args_.k, t + kLanes);
    const int32_t* ids[kLanes];
    for (int i = 0; i < kLanes; ++i) ids[i] = ranks_.sorted(i);
    if (forced) left |= choose_plain(*steering, values, ids);
    if (weighs) {
      const bool in_place = !forced && values[0] == z[0] && weights_.weighs_logits();
      for (int i = 0; !in_place && i < kLanes; ++i) {
        if (!(left >> i & 1)) weights_.take(i, z[i], block_rows_[i].work.score, scores[i].inverse, ids[i]);
      }
      left |= weights_.weigh();
    }
    for (int i = 0; i < kLanes; ++i) {
      if (left >> i & 1) continue;
      write_plain(t, i, ids[i]);
      if (counted) count_plain(tokens[i], i, ids[i], scores[i]);
    }
    tally_.add_scores();
    if (left != 0) take_left(t, tokens, left);
    return true;
  }

  // The rows of these bits, from the beginning.
  [[gnu::noinline]] void take_left(int64_t t, const Token (&tokens)[kLanes], uint32_t left) {
    int count = 0;
    for (; left != 0; left &= left - 1) {
      const int i = __builtin_ctz(left);
      prepare(block_rows_[count++], t + i, tokens[i]);
    }
    take_block(count);
  }

  // Does the row do no more than move or force logits?
  bool is_plain(const SteeringRow<F>& row) const {
    return row.moves_logits && row.k == args_.k && free_slots(row, row.k) > 0 && !row.score_bias &&
           !row.weight_scale && !row.remap && !tally_.wants_natural();
  }

  void steer_plain(const SteeringRow<F>& steering, const T* (&z)[kLanes]) {
    for (int i = 0; i < kLanes; ++i) {
      Row<F>& row = block_rows_[i];
      row.steering = &steering, row.steered = true;
      row.raw = forbid(row.work, steering, z[i], args_.experts);
    }
    steer_rows(kLanes);
    for (int i = 0; i < kLanes; ++i) z[i] = block_rows_[i].z;
  }

  void score_plain(const T* const (&z)[kLanes], RowScores<T> (&scores)[kLanes]) {
    const Score score = args_.spec.score;
    const bool entropy = args_.statistics.entropy && scores_counted_;
    if (is_softmax(score)) {
      for (int i = 0; i < kLanes; ++i) scores_.take_logits(i, z[i], vectors_);
      scores_.find_largest();
    }
    for (int i = 0; i < kLanes; ++i)
      scores_.take(i, block_rows_[i].work, score, z[i], args_.experts, entropy);
    scores_.finish(entropy);
    for (int i = 0; i < kLanes; ++i) scores[i] = scores_.scores(i, score, entropy);
  }

  // Sorts the short lists of values whose largest `bounds_` has taken. Says which rows are not sorted by it.
  uint32_t rank_plain(const T* const (&values)[kLanes], int wanted, int64_t next) {
    bounds_.sort();
    ranks_.clear();
    for (int i = 0; i < kLanes; ++i) {
      prefetch(next + i);
      const Workspace<F>& work = block_rows_[i].work;
      const int listed = shortlist<F>(work, values[i], vectors_, bounds_.bound(i, wanted));
      if (listed >= wanted && listed <= BlockRanks<F>::kLongest) ranks_.take(i, work, listed);
    }
    ranks_.sort(wanted, weights_.chosen_logits());
    // -infinity in the last slot: there is no list, or too few numbers are on it.
    return ~bits(F::load(weights_.chosen_logits()[wanted - 1]) > F(-infinity<T>())) & 0xffffu;
  }

  // Puts the forced experts beside the ranked free ones. Says which rows have empty slots.
  uint32_t choose_plain(const SteeringRow<F>& steering, const T* const (&values)[kLanes],
                        const int32_t* (&ids)[kLanes]) {
    uint32_t left = 0;
    for (int i = 0; i < kLanes; ++i) {
      Row<F>& row = block_rows_[i];
      choose_forced(row.work, values[i], steering, args_.k, 0, ids[i], row.choice);
      ids[i] = row.choice.ids;
      left |= uint32_t{row.choice.count < args_.k} << i;
    }
    return left;
  }

  // Row `lane` of those from t on. A vector may reach into the rows after it, which are written later.
  void write_plain(int64_t t, int lane, const int32_t* ids) const {
    const int k = args_.k;
    const int64_t first = (t + lane) * k;
    const bool wide = (kLanes - lane) * k >= kLanes;
    const auto put = [&](auto* out, const auto* slots) {
      if (out == nullptr) return;
      if (wide)
        __builtin_memcpy(out + first, slots, kLanes * sizeof(*slots));
      else
        copy_slots(out + first, slots, k);
    };
    put(args_.ids, ids);
    put(static_cast<T*>(args_.weights), weights_.weights(lane, 0));
  }

  void count_plain(const Token& token, int lane, const int32_t* ids, const RowScores<T>& scores) {
    if (!tally_.counts(token.group, token.segment)) return;
    tally_.turn_to(token.group, token.segment);
    tally_.token(args_.k, token.steering_row >= 0);
    if (scores_counted_) tally_.take_scores(scores, block_rows_[lane].work.score);
    tally_.chosen(ids, weights_.weights(lane, 0), args_.k);
    if (tally_.wants_natural()) tally_.natural(ids, args_.k);
  }

  // ---- the steps of a block ---------------------------------------------------------------------

  // Inlined: rows() is faster with it than with a call.
  [[gnu::always_inline]] inline void take_block(int count) {
    steer_rows(count);
    score_rows(count);
    for (int i = 0; i < count; ++i) find_values(block_rows_[i]);
    choose(count);
    weigh_rows(count);
    for (int i = 0; i < count; ++i) finish(block_rows_[i]);
    tally_.add_scores();
  }

  void prepare(Row<F>& row, int64_t t, const Token& token) {
    Choice<F>& c = row.choice;
    row.t = t, row.token = token;
    row.steering = token.steering_row < 0 ? nullptr : steering_row(token.steering_row);
    row.counted = tally_.counts(token.group, token.segment);
    row.scores_counted = row.counted && scores_counted_;
    row.to_weigh = args_.weights != nullptr || (row.counted && weights_counted_);
    row.slots = row.wanted = row.steering ? row.steering->k : args_.k;
    c.count = args_.k, c.compact = true;
    row.given = given_.read(t, row.steering != nullptr, c);
    if (row.given) take_given(row);
    row.steered = row.scored = row.by_score = false;
    if (row.given && !row.to_weigh && !row.scores_counted) return;
    row.steered = row.steering && row.steering->moves_logits;
    row.by_score = compares_scores(row.steering);
    const bool softmax_weights = row.to_weigh && softmax_over_all(row.steering);
    row.scored = wants_scores(row.scores_counted, row.by_score && !row.given, softmax_weights);
    row.raw = row.z = load(row.work, t);
    if (row.steered) row.raw = forbid(row.work, *row.steering, row.raw, args_.experts);
  }

  void steer_rows(int count) {
    const int experts = args_.experts;
    uint32_t spread = 0, overflow = 0;
    if constexpr (F::kTransposes) {
      for (int i = 0; side_by_side_ && i < count; ++i) {
        const Row<F>& row = block_rows_[i];
        if (!row.steered || !row.steering->std) continue;
        spread_.take(i, row.raw, experts, row.steering->sample_std);
        spread |= 1u << i;
      }
      if (spread != 0) {
        spread_.find_means();
        for (int i = 0; i < count; ++i) {
          if (spread >> i & 1) spread_.take_squares(i, block_rows_[i].raw, experts);
        }
        overflow = spread_.finish();
      }
    }
    for (int i = 0; i < count; ++i) {
      Row<F>& row = block_rows_[i];
      if (!row.steered) continue;
      T deviation = 0;
      if constexpr (F::kTransposes) {
        if (spread >> i & 1) deviation = spread_.deviation(i);
      }
      if (row.steering->std && !(spread & ~overflow & (1u << i)))
        deviation = standard_deviation<F>(row.raw, experts, row.steering->sample_std);
      row.z = steer(row.work, *row.steering, row.raw, experts, deviation);
    }
  }

  void score_rows(int count) {
    const Score score = args_.spec.score;
    const auto entropy = [this](const Row<F>& row) { return row.scores_counted && args_.statistics.entropy; };
    if constexpr (F::kTransposes) {
      if (side_by_side_ && BlockScores<F>::serves(score)) {
        uint32_t scored = 0;
        for (int i = 0; i < count; ++i) scored |= uint32_t{block_rows_[i].scored} << i;
        if (scored == 0) return;
        for (int i = 0; is_softmax(score) && i < count; ++i) {
          if (scored >> i & 1) scores_.take_logits(i, block_rows_[i].z, vectors_);
        }
        if (is_softmax(score)) scores_.find_largest();
        for (int i = 0; i < count; ++i) {
          const Row<F>& row = block_rows_[i];
          if (row.scored) scores_.take(i, row.work, score, row.z, args_.experts, entropy(row));
        }
        scores_.finish(args_.statistics.entropy);
        for (int i = 0; i < count; ++i) {
          Row<F>& row = block_rows_[i];
          if (row.scored) row.scores = scores_.scores(i, score, entropy(row));
        }
        return;
      }
    }
    for (int i = 0; i < count; ++i) {
      Row<F>& row = block_rows_[i];
      if (row.scored) row.scores = score_all<F>(row.work, score, row.z, args_.experts, entropy(row));
    }
  }

  void find_values(Row<F>& row) {
    if (row.given) return;
    row.values = row.listable =
        selection_values(row.work, row.steering, row.z, row.scored ? &row.scores : nullptr, row.by_score);
    if (row.steering && row.steering->force) leave_forced_out(row);
  }

  void leave_forced_out(Row<F>& row) const {
    row.wanted = free_slots(*row.steering, row.slots);
    if (row.wanted > 0) row.listable = free_values(row.work, *row.steering, row.values, args_.experts);
  }

  void take_given(Row<F>& row) const {
    row.wanted = 0;
    row.raw = row.z = nullptr;
    if (given_.replays()) row.slots = args_.k;
    if (given_.replays() || !given_.has_weights()) return;
    row.to_weigh = false;
    given_.read_weights(row.t, row.choice);
  }

  void choose(int count) {
    bound_rows(count);
    for (int i = 0; i < count; ++i) {
      Row<F>& row = block_rows_[i];
      if (row.raw) prefetch(row.t + block_);
      if (row.wanted > 0) row.listed = shortlist<F>(row.work, row.listable, vectors_, row.bound);
    }
    rank_rows(count);
    for (int i = 0; i < count; ++i) {
      Row<F>& row = block_rows_[i];
      if (!row.given)
        finish_choice(row.work, row.values, row.steering, row.slots, row.listed, row.ranked, row.choice);
    }
  }

  void rank_rows(int count) {
    if constexpr (F::kTransposes) {
      bool any = false;
      for (int i = 0; i < count; ++i) {
        Row<F>& row = block_rows_[i];
        row.ranked = nullptr;
        if (!side_by_side_ || row.wanted == 0 || row.listed < row.wanted ||
            row.listed > BlockRanks<F>::kLongest)
          continue;
        if (!any) ranks_.clear();
        any = true;
        ranks_.take(i, row.work, row.listed);
        row.ranked = ranks_.sorted(i);
      }
      if (!any) return;
      const int slots = args_.k < kLanes ? args_.k : kLanes;
      ranks_.sort(slots, weights_.chosen_logits());
      for (int i = 0; i < count; ++i) {
        Row<F>& row = block_rows_[i];
        if (row.ranked && !(weights_.chosen_logits()[row.wanted - 1][i] > -infinity<T>()))
          row.ranked = nullptr;
      }
    }
  }

  void bound_rows(int count) {
    bool sorts = false;
    for (int i = 0; i < count; ++i) {
      Row<F>& row = block_rows_[i];
      if (row.wanted == 0) continue;
      if constexpr (F::kTransposes) {
        if (side_by_side_ && BlockBounds<F>::serves(vectors_, row.wanted)) {
          bounds_.take(i, row.listable, vectors_);
          sorts = true;
          continue;
        }
      }
      row.bound = lower_bound<F>(row.listable, vectors_, row.wanted);
    }
    if constexpr (F::kTransposes) {
      if (!sorts) return;
      bounds_.sort();
      for (int i = 0; i < count; ++i) {
        Row<F>& row = block_rows_[i];
        if (row.wanted > 0 && BlockBounds<F>::serves(vectors_, row.wanted))
          row.bound = bounds_.bound(i, row.wanted);
      }
    }
  }

  void finish_choice(const Workspace<F>& work, const T* values, const SteeringRow<F>* steering, int slots,
                     int listed, const int32_t* ranked, Choice<F>& c) const {
    if (steering && steering->force) return choose_forced(work, values, *steering, slots, listed, ranked, c);
    if (ranked) {
      __builtin_memcpy(c.ids, ranked, kLanes * sizeof(int32_t));
      c.count = slots;
      return;
    }
    c.count = select_listed<F>(work, values, vectors_, slots, listed, c.ids);
    if (c.count < slots)
      c.count = append_nan(values, args_.experts, slots, c.count, c.ids, [](int) { return true; });
  }

  // Out of line, so that the common way stays short enough to be inlined.
  [[gnu::noinline]] void choose_forced(const Workspace<F>& work, const T* values,
                                       const SteeringRow<F>& steering, int slots, int listed,
                                       const int32_t* ranked, Choice<F>& c) const {
    c.count = ForcedChoice<F>(work, steering, values, args_.experts, slots, c.ids).choose(listed, ranked);
  }

  void weigh_rows(int count) {
    if constexpr (F::kTransposes) {
      uint32_t lanes = 0;
      for (int i = 0; i < count; ++i) {
        Row<F>& row = block_rows_[i];
        if (!side_by_side_ || !row.to_weigh || row.given || !weights_.serves(row.steering, row.choice)) {
          weigh_row(row);
          continue;
        }
        const bool in_place =
            row.ranked && row.values == row.z && row.wanted == args_.k && weights_.weighs_logits();
        if (!in_place) weights_.take(i, row.z, row.work.score, row.scores.inverse, row.choice.ids);
        lanes |= 1u << i;
      }
      if (lanes == 0) return;
      const uint32_t left = weights_.weigh();
      for (int i = 0; i < count; ++i) {
        if (!(lanes >> i & 1)) continue;
        Row<F>& row = block_rows_[i];
        if (left >> i & 1) {
          weigh_row(row);
          continue;
        }
        for (int j = 0; j < args_.k; j += kLanes)
          F::load(weights_.weights(i, j)).store(row.choice.weights + j);
      }
    } else {
      for (int i = 0; i < count; ++i) weigh_row(block_rows_[i]);
    }
  }

  void weigh_row(Row<F>& row) {
    if (!row.to_weigh) return;
    weigh(row.work, args_, row.steering, row.z, row.scores, row.choice);
    if (!row.choice.compact) clear_empty(row.choice);
  }

  void finish(Row<F>& row) {
    Choice<F>& c = row.choice;
    if (row.steering && row.steering->remap && !is_replay(row)) remap(row.steering->remap, row.to_weigh, c);
    write(row.t, c);
    if (!row.counted) return;
    tally_.turn_to(row.token.group, row.token.segment);
    tally_.token(row.slots, in_table(row.token.steering_row));
    if (row.scores_counted) tally_.take_scores(row.scores, row.work.score);
    tally_.chosen(c, row.slots);
    if (tally_.wants_natural()) compare_with_natural(row);
  }

  bool is_replay(const Row<F>& row) const { return row.given && given_.replays(); }

  // ---- logits -----------------------------------------------------------------------------------

  // Asks for the row a block ahead, between the short lists of two rows: where all rows of a block are asked for at once,
  // the processor waits for as many lines as it can (128 experts then took half as long again).
  void prefetch(int64_t t) const {
    if (t >= args_.tokens) return;
    const auto* row = static_cast<const char*>(args_.logits) + t * args_.row_stride * logit_bytes_;
#pragma GCC unroll 4
    for (int64_t i = 0; i < args_.experts * logit_bytes_; i += 64) __builtin_prefetch(row + i);
  }

  const T* load(const Workspace<F>& work, int64_t t) const {
    const T* row = load_row(work, t);
    return args_.spec.softcap == 0 ? row : cap(row, work.raw);
  }

  [[gnu::noinline]] const T* cap(const T* row, T* capped) const {
    const F by(T(args_.spec.softcap));
    for (int e = 0; e < args_.experts; e += kLanes) (tanh(F::load(row + e) / by) * by).store(capped + e);
    return capped;
  }

  const T* load_row(const Workspace<F>& work, int64_t t) const {
    const int64_t first = t * args_.row_stride;
    switch (args_.logits_type) {
      case DType::kBFloat16:
        return convert(static_cast<const uint16_t*>(args_.logits) + first, F::load_bfloat16, work.raw);
      case DType::kFloat16:
        return convert(static_cast<const uint16_t*>(args_.logits) + first, F::load_float16, work.raw);
      default:
        return in_place(static_cast<const T*>(args_.logits) + first, work.raw);
    }
  }

  const T* in_place(const T* row, T* padded) const {
    const int experts = args_.experts;
    if (experts % kLanes == 0) return row;
    for (int e = 0; e < experts; e += kLanes) load_vector<F>(row, e, experts).store(padded + e);
    return padded;
  }

  template <class Load>
  const T* convert(const uint16_t* row, Load load_half, T* converted) const {
    const int experts = args_.experts, whole = experts / kLanes * kLanes;
    for (int e = 0; e < whole; e += kLanes) load_half(row + e).store(converted + e);
    if (whole == experts) return converted;
    uint16_t last[kLanes];
    for (int i = 0; i < kLanes; ++i)
      last[i] = whole + i < experts ? row[whole + i] : uint16_t{0x7fff};  // NaN in both
    load_half(last).store(converted + whole);
    return converted;
  }

  // ---- steering and choice ----------------------------------------------------------------------

  bool in_table(int64_t steering_row) const {
    return steering_row >= 0 && steering_row < args_.steering.rows;
  }
  bool evicts_steering(const Token& token) const {
    const int64_t index = token.steering_row;
    return in_table(index) && steering_[index % kSteeringRows].index != index;
  }

  // Null where the row asks for nothing: a neutral row is an unsteered one.
  const SteeringRow<F>* steering_row(int64_t index) {
    if (!in_table(index)) return nullptr;
    SteeringRow<F>& row = steering_[index % kSteeringRows];
    if (row.index != index) row = read_steering_row<F>(args_, index, force_[index % kSteeringRows]);
    return row.neutral ? nullptr : &row;
  }

  // Scores are compared only where they are not a monotone function of the logit, so that scores that collide
  // after rounding never decide.
  bool compares_scores(const SteeringRow<F>* steering) const {
    if (args_.spec.order == Order::kTopKThenScore) return false;
    return args_.correction_bias || args_.spec.groups > 1 || (steering && steering->score_bias);
  }

  // Do the weights need the softmax over all experts?
  bool softmax_over_all(const SteeringRow<F>* steering) const {
    if (steering == nullptr) return softmax_over_all_;
    return args_.spec.score == Score::kSoftmax && !softmax_over_chosen(args_.spec, steering);
  }

  // Are the scores of all experts to be kept? Scores that are only compared are computed by selection_values(), but for
  // softmax, which needs the total of the row first.
  bool wants_scores(bool counted, bool by_score, bool softmax_weights) const {
    return counted || softmax_weights || (by_score && is_softmax(args_.spec.score));
  }

  // scores: those that are kept, or null.
  const T* selection_values(const Workspace<F>& work, const SteeringRow<F>* steering, const T* z,
                            const RowScores<T>* scores, bool by_score) const {
    const float* score_bias = steering ? steering->score_bias : nullptr;
    if (!args_.correction_bias && !score_bias && args_.spec.groups == 1) return z;
    const Score score = args_.spec.score;
    const auto fill = [&](auto value) { fill_values(work, score_bias, z, value); };
    if (by_score && scores) {
      const F factor(scores->factor);
      fill([&](F x, int e) { return select(x == x, F::load(work.score + e) * factor, x); });
    } else if (by_score && score == Score::kSigmoid) {
      fill([](F x, int) { return select(x == x, sigmoid(x), x); });
    } else if (by_score && score == Score::kSqrtSoftplus) {
      fill([](F x, int) { return select(x == x, sqrt_softplus(x), x); });
    } else {
      fill([](F x, int) { return x; });
    }
    if (args_.spec.groups > 1) {
      limit_groups(work, args_.spec, work.value, args_.experts);
    }
    return work.value;
  }

  template <class Value>
  void fill_values(const Workspace<F>& work, const float* score_bias, const T* z, Value value) const {
    const float* correction = args_.correction_bias;
    const int experts = args_.experts;
    for (int e = 0; e < experts; e += kLanes) {
      F v = value(F::load(z + e), e);
      if (correction) v = v + load_vector<F>(correction, e, experts);
      if (score_bias) v = v + load_vector<F>(score_bias, e, experts);
      v.store(work.value + e);
    }
  }

  // ---- remap, outputs, natural choice -----------------------------------------------------------

  void remap(const int32_t* to, bool weighed, Choice<F>& c) const {
    int kept = 0;
    for (int j = 0; j < c.count; ++j) {
      const int32_t id = c.ids[j] < 0 ? -1 : to[c.ids[j]];
      if (id < 0 || id >= args_.experts) continue;
      int slot = 0;
      while (slot < kept && c.ids[slot] != id) ++slot;
      const T weight = weighed ? c.weights[j] : T(0);
      if (slot == kept) {
        c.ids[kept] = id;
        c.weights[kept++] = weight;
      } else {
        c.weights[slot] += weight;
      }
    }
    c.count = kept, c.compact = true;
  }

  // In pieces of eight: a loop over k slots would become a call of memcpy.
  template <class U>
  static void copy_slots(U* out, const U* in, int count) {
    int j = 0;
    for (; j + 8 <= count; j += 8) __builtin_memcpy(out + j, in + j, 8 * sizeof(U));
    for (; j + 2 <= count; j += 2) __builtin_memcpy(out + j, in + j, 2 * sizeof(U));
    if (j < count) out[j] = in[j];
  }

  void write(int64_t t, Choice<F>& c) const {
    const int64_t first = t * args_.k;
    for (int j = c.count; j < args_.k; ++j) c.ids[j] = -1, c.weights[j] = 0;
    if (args_.ids) copy_slots(args_.ids + first, c.ids, args_.k);
    if (args_.weights) copy_slots(static_cast<T*>(args_.weights) + first, c.weights, args_.k);
  }

  void write_empty(int64_t t) const {
    Choice<F> nothing;
    write(t, nothing);
  }

  void compare_with_natural(Row<F>& row) {
    const Choice<F>& c = row.choice;
    if (!row.steering && !is_replay(row) && !given_.is_baseline()) return tally_.compare(c, nullptr, 0);
    Choice<F> natural;
    natural.count = args_.k;
    if (!given_.replays() && given_.has(row.t)) {
      for (int j = 0; j < args_.k; ++j) natural.ids[j] = given_.id(row.t * args_.k + j);
    } else {
      choose_unsteered(row, natural);
    }
    tally_.compare(c, natural.ids, natural.count);
  }

  // The row's workspace is free by now; steering may have worked in its raw logits, so they are read again.
  void choose_unsteered(Row<F>& row, Choice<F>& natural) {
    tally_.add_scores();  // it reads the workspace
    const T* raw = load(row.work, row.t);
    const bool by_score = compares_scores(nullptr), scored = wants_scores(false, by_score, false);
    RowScores<T> scores;
    if (scored) scores = score_all<F>(row.work, args_.spec.score, raw, args_.experts, false);
    const T* values = selection_values(row.work, nullptr, raw, scored ? &scores : nullptr, by_score);
    const int listed = shortlist<F>(row.work, values, vectors_, lower_bound<F>(values, vectors_, args_.k));
    finish_choice(row.work, values, nullptr, args_.k, listed, nullptr, natural);
  }

  const GateArgs& args_;
  const Given<F> given_;
  const int block_;
  const bool side_by_side_;
  const int vectors_;
  const int64_t logit_bytes_;
  Tally<F> tally_;
  const bool scores_counted_;
  const bool weights_counted_;
  const bool softmax_over_all_;
  const bool plain_;
  SteeringRow<F> steering_[kSteeringRows];
  ForceStore force_[kSteeringRows];
  BlockSpread<F> spread_;
  BlockScores<F> scores_;
  BlockBounds<F> bounds_;
  BlockRanks<F> ranks_;
  BlockWeights<F> weights_;
  FewExperts<F> few_;
  union {  // of which a call sets up as many as it has use for
    Row<F> block_rows_[kMaxBlock];
  };
};

}  // namespace
}  // namespace moe_route::cpu
