// How the words of a weight and of x are multiplied, for each type of element. A line of x is laid out once and
// read for every row of a weight, so it is widened; a word of a weight is widened as it is read. What stands in the
// upper half of a word is multiplied first: the order of bfloat16 dot products in hardware.
#pragma once
#include "row_elements.h"

namespace moe_route::cpu::MOE_ROUTE_ISA {
namespace {

struct WholeFactors : Float32 {
  static constexpr int kPlanes = 1;  // vectors of x for one of words
  struct Factors {
    Vector::Floats whole;
  };
  static Factors factors(Vector::Words w) {
    Vector::Floats whole;
    std::memcpy(&whole, &w, sizeof whole);
    return {whole};
  }
  static void lay_out(float* to, Vector::Words x) { Vector::store(static_cast<void*>(to), x); }
  static Vector::Floats add(const Factors& w, const Factors& x, Vector::Floats sum) {
    return Vector::fma(w.whole, x.whole, sum);
  }
  static Factors load(const float* x) { return {Vector::load(x)}; }
  static Factors broadcast(const float* x) { return {Vector::broadcast(x)}; }
};

template <class Type, Vector::Floats (*kUpper)(Vector::Words), Vector::Floats (*kLower)(Vector::Words)>
struct HalfFactors : Type {
  static constexpr int kPlanes = 2;
  struct Factors {
    Vector::Floats upper, lower;
  };
  static Factors factors(Vector::Words w) { return {kUpper(w), kLower(w)}; }
  static void lay_out(float* to, Vector::Words x) {
    Vector::store(to, kUpper(x));
    Vector::store(to + Vector::kLanes, kLower(x));
  }
  static Vector::Floats add(const Factors& w, const Factors& x, Vector::Floats sum) {
    return Vector::fma(w.lower, x.lower, Vector::fma(w.upper, x.upper, sum));
  }
  static Factors load(const float* x) { return {Vector::load(x), Vector::load(x + Vector::kLanes)}; }
  static Factors broadcast(const float* x) { return {Vector::broadcast(x), Vector::broadcast(x + 1)}; }
};
using Float16Factors = HalfFactors<Float16, Vector::upper_float16, Vector::lower_float16>;

#if defined(__AVX512BF16__)
struct BFloat16Factors : BFloat16 {
  static constexpr int kPlanes = 1;
  using Factors = Vector::Words;
  static Factors factors(Vector::Words w) { return w; }
  static void lay_out(float* to, Vector::Words x) { Vector::store(static_cast<void*>(to), x); }
  static Vector::Floats add(Factors w, Factors x, Vector::Floats sum) {
    return Vector::dot_bfloat16(w, x, sum);
  }
  static Factors load(const float* x) { return Vector::words(x); }
  static Factors broadcast(const float* x) { return Vector::broadcast_word(x); }
};
#else
using BFloat16Factors = HalfFactors<BFloat16, Vector::upper_bfloat16, Vector::lower_bfloat16>;
#endif

}  // namespace
}  // namespace moe_route::cpu::MOE_ROUTE_ISA
