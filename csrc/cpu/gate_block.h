// Rows in flight: what one row carries from step to step.
#pragma once
#include "gate_steer.h"
#include "gate_weigh.h"

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
  bool scored = false;          // scores of all experts are wanted
  bool by_score = false;        // selection compares them
  int slots = 0;                // k of this row
  int wanted = 0;               // of the short list; 0: there is none
  int listed = 0;               // candidates on it
  T bound = 0;
  Extent<T> natural;            // of the raw logits, as far as steering asks for it
  const T* raw = nullptr;       // logits
  const T* z = nullptr;         // logits after steering
  const T* values = nullptr;    // what selection compares
  const T* listable = nullptr;  // ... and what may come onto the short list: under force the free experts'
  RowScores<T> scores;
  Choice<F> choice;
};

// An odd number of cache lines for each row. Rows whose size is a multiple of a large power of two would share
// a few sets of the first-level cache, and the stores of one would hold up the loads of another (4 % of a plain
// row at 2048 bytes).
template <class F>
struct SpacedRow : Row<F> {
  static constexpr size_t kLine = 64;
  static_assert(sizeof(Row<F>) % kLine == 0);
  unsigned char gap[sizeof(Row<F>) / kLine % 2 == 0 ? kLine : 2 * kLine];
};

}  // namespace
}  // namespace moe_route::cpu
