// Scratch memory of one worker of the gate: a few rows of E values, kept in the first-level cache.
//
// Everything in the gate_*.h headers has internal linkage: they are compiled once per instruction set, and
// the linker must never put one file's machine code into another's place.
#pragma once
#include <cstddef>
#include <cstdint>

#include "moe_route/gate.h"
#include "moe_route/math.h"

namespace moe_route::cpu {
namespace {

using math::abs, math::as_int, math::exp_nonpositive, math::fma, math::log, math::select, math::sigmoid,
    math::sqrt, math::sqrt_softplus, math::tanh;

inline constexpr int kLanes = 16;
inline constexpr int kMaxSlots = 64;

inline int vectors_of(int experts) { return (experts + kLanes - 1) / kLanes; }

// Hands out aligned pieces of one allocation, or only adds their sizes up.
class Arena {
 public:
  static constexpr size_t kAlignment = 64;
  explicit Arena(void* memory) : begin_(static_cast<unsigned char*>(memory)) {}
  template <class U>
  U* take(size_t count) {
    U* piece = begin_ ? reinterpret_cast<U*>(begin_ + used_) : nullptr;
    used_ += (count * sizeof(U) + kAlignment - 1) / kAlignment * kAlignment;
    return piece;
  }
  size_t used() const { return used_; }

 private:
  unsigned char* begin_;
  size_t used_ = 0;
};

// What one row in flight needs. Values beyond E in a row are NaN: never chosen, score 0.
template <class F>
struct Workspace {
  using T = typename F::Scalar;
  T* raw;                 // logits as T, where the caller's row cannot be read in place
  T* steered;             // z'
  T* score;               // score of every expert; softmax: exp(z' - max), before division by the total
  T* value;               // what selection compares
  T* masked;              // values of one force class; SparseMixer's experts not chosen yet
  T* candidate;           // selection's short list ...
  int32_t* candidate_id;  // ... and whose values they are
  typename F::Int* keys;  // order keys, a row of vectors

  Workspace() = default;
  Workspace(Arena& arena, int experts) {
    const size_t row = size_t(kLanes) * (vectors_of(experts) + 2);
    raw = arena.take<T>(row);
    steered = arena.take<T>(row);
    score = arena.take<T>(row);
    value = arena.take<T>(row);
    masked = arena.take<T>(row);
    candidate = arena.take<T>(row);
    candidate_id = arena.take<int32_t>(row);
    keys = arena.take<typename F::Int>(row / kLanes);
  }
};

// Rows in flight: enough to hide the latency of one row behind the others, few enough for the first-level
// cache.
inline constexpr int kMaxBlock = 16;
inline int block_of(int experts, int64_t rows) {
  const int most = experts <= 1024 ? kMaxBlock : experts <= 2048 ? 2 : 1;
  return rows < most ? static_cast<int>(rows) : most;
}

template <class T>
constexpr T infinity() {
  return static_cast<T>(__builtin_inff());
}
template <class T>
constexpr T not_a_number() {
  return static_cast<T>(__builtin_nanf(""));
}
template <class T>
constexpr T smallest_normal() {
  return static_cast<T>(0x1p-126f);
}

// The vector that starts at expert e of a row of E: absent lanes are NaN.
template <class F, class U>
inline F load_vector(const U* row, int e, int experts) {
  return experts - e >= kLanes ? F::load(row + e) : F::load_partial(row + e, experts - e);
}

}  // namespace
}  // namespace moe_route::cpu
