// Sixteen lanes in plain C++: what gate_row.h computes with where there are no intrinsics, and the definition
// that the AVX2 and AVX-512 lanes must match bit for bit.
//
// The vocabulary of every lanes type F:
// - types F::Scalar, F::Int (as many integers), and masks, one truth value a lane
// - F(x) in all lanes; load; load_partial, absent lanes NaN; load_bfloat16, load_float16; store
// - + - * / fma sqrt abs as_int as_float < > >= == != and select(mask, yes, no)
// - larger(x, kept), smaller(x, kept): x where it is larger / smaller, else kept; a NaN x never wins
// - fold_add, fold_max, fold_min: 16 lanes to one value, lanes 8, 4, 2, 1 apart
// - bits(mask): one bit a lane; count_where(ints, mask): adds 1 where the mask is set
// - order_keys: key.h's keys, lane by lane
// - append: the masked lanes to the end of a list, in lane order
// - Fixed: 16 int64 sums; add takes lanes within +-2^51, rounded to the nearest even integer
// - kSet: its row of gate_widths.h
// - kTransposes: rows can be turned into lanes, for gate_block.h and gate_few.h. Then it has transpose,
//   transpose_pairs, zip, to_int, pair (eight lanes of two rows) and Keys (key.h's keys with an index) as well;
//   portable has not: it takes each row by itself, and the others are tested against it
#pragma once
#include <cstdint>

#include "moe_route/gate.h"
#include "moe_route/key.h"
#include "moe_route/math.h"

namespace moe_route::cpu {
namespace {

template <class T>
struct IntOf;
template <>
struct IntOf<float> {
  using Type = int32_t;
};
template <>
struct IntOf<double> {
  using Type = int64_t;
};

#define MOE_ROUTE_LANES for (int i = 0; i < 16; ++i)

struct PortableFixedSums {
  int64_t lane[16];
  static PortableFixedSums load(const int64_t* p) {
    PortableFixedSums sums;
    MOE_ROUTE_LANES sums.lane[i] = p[i];
    return sums;
  }
  void store(int64_t* p) const { MOE_ROUTE_LANES p[i] = lane[i]; }
  template <class Lanes>
  void add(const Lanes& terms) {
    MOE_ROUTE_LANES lane[i] += __builtin_llrint(terms.lane[i]);
  }
};

struct PortableMask {
  bool lane[16];
};

template <class I>
struct PortableInts {
  I lane[16];
  PortableInts() = default;
  explicit PortableInts(I x) { MOE_ROUTE_LANES lane[i] = x; }
  static PortableInts load(const I* p) {
    PortableInts r;
    MOE_ROUTE_LANES r.lane[i] = p[i];
    return r;
  }
  void store(I* p) const { MOE_ROUTE_LANES p[i] = lane[i]; }
};

template <class T>
struct PortableLanes {
  using Scalar = T;
  using Int = PortableInts<typename IntOf<T>::Type>;
  using Mask = PortableMask;
  using Fixed = PortableFixedSums;
  static constexpr InstructionSet kSet = InstructionSet::kPortable;
  static constexpr bool kTransposes = false;
  T lane[16];

  PortableLanes() = default;
  explicit PortableLanes(T x) { MOE_ROUTE_LANES lane[i] = x; }

  template <class Op>
  static PortableLanes map(Op op) {
    PortableLanes r;
    MOE_ROUTE_LANES r.lane[i] = op(i);
    return r;
  }
  template <class Op>
  static Mask test(Op op) {
    Mask r;
    MOE_ROUTE_LANES r.lane[i] = op(i);
    return r;
  }
  template <class U>
  static PortableLanes load(const U* p) {
    return map([=](int i) { return T(p[i]); });
  }
  template <class U>
  static PortableLanes load_partial(const U* p, int count) {
    return map([=](int i) { return i < count ? T(p[i]) : T(__builtin_nanf("")); });
  }
  static PortableLanes load_bfloat16(const uint16_t* p) {
    return map([=](int i) { return T(math::as_float(int32_t(uint32_t{p[i]} << 16))); });
  }
  static PortableLanes load_float16(const uint16_t* p) {
    return map([=](int i) { return T(float16_to_float(p[i])); });
  }
  void store(T* p) const { MOE_ROUTE_LANES p[i] = lane[i]; }

  static float float16_to_float(uint16_t h) {
    const uint32_t sign = uint32_t{h & 0x8000u} << 16, magnitude = h & 0x7fffu;
    if (magnitude >= 0x7c00u) return math::as_float(int32_t(sign | 0x7f800000u | magnitude << 13));
    // Read as a float with the exponent 112 too low, then scaled by 2^112: exact, denormals included.
    return math::as_float(int32_t(sign | magnitude << 13)) * 0x1p+112f;
  }
};

template <class T>
using Lanes = PortableLanes<T>;

#define MOE_ROUTE_OPERATOR(op)                          \
  template <class T>                                    \
  inline Lanes<T> operator op(Lanes<T> a, Lanes<T> b) { \
    MOE_ROUTE_LANES a.lane[i] = a.lane[i] op b.lane[i]; \
    return a;                                           \
  }
MOE_ROUTE_OPERATOR(+)
MOE_ROUTE_OPERATOR(-)
MOE_ROUTE_OPERATOR(*)
MOE_ROUTE_OPERATOR(/)
#undef MOE_ROUTE_OPERATOR
#define MOE_ROUTE_COMPARE(op)                                             \
  template <class T>                                                      \
  inline PortableMask operator op(const Lanes<T>& a, const Lanes<T>& b) { \
    return Lanes<T>::test([&](int i) { return a.lane[i] op b.lane[i]; }); \
  }
MOE_ROUTE_COMPARE(<)
MOE_ROUTE_COMPARE(>)
MOE_ROUTE_COMPARE(>=)
MOE_ROUTE_COMPARE(==)
MOE_ROUTE_COMPARE(!=)
#undef MOE_ROUTE_COMPARE

template <class T>
inline Lanes<T> fma(const Lanes<T>& a, const Lanes<T>& b, const Lanes<T>& c) {
  return Lanes<T>::map([&](int i) { return math::fma(a.lane[i], b.lane[i], c.lane[i]); });
}
template <class T>
inline Lanes<T> sqrt(const Lanes<T>& a) {
  return Lanes<T>::map([&](int i) { return math::sqrt(a.lane[i]); });
}
template <class T>
inline Lanes<T> abs(const Lanes<T>& a) {
  return Lanes<T>::map([&](int i) { return math::abs(a.lane[i]); });
}
template <class T>
inline Lanes<T> select(const PortableMask& m, const Lanes<T>& yes, const Lanes<T>& no) {
  return Lanes<T>::map([&](int i) { return m.lane[i] ? yes.lane[i] : no.lane[i]; });
}
template <class T>
inline Lanes<T> larger(const Lanes<T>& x, const Lanes<T>& kept) {
  return select(x > kept, x, kept);
}
template <class T>
inline Lanes<T> smaller(const Lanes<T>& x, const Lanes<T>& kept) {
  return select(x < kept, x, kept);
}
inline uint32_t bits(const PortableMask& m) {
  uint32_t r = 0;
  MOE_ROUTE_LANES r |= uint32_t{m.lane[i]} << i;
  return r;
}

// Scalar functions of math.h, lane by lane: the same operations in the same order as its vector form.
template <class T>
inline Lanes<T> exp_nonpositive(const Lanes<T>& x) {
  return Lanes<T>::map([&](int i) { return math::exp_nonpositive(x.lane[i]); });
}
template <class T>
inline Lanes<T> log(const Lanes<T>& x) {
  return Lanes<T>::map([&](int i) { return math::log(x.lane[i]); });
}
template <class T>
inline Lanes<T> tanh(const Lanes<T>& x) {
  return Lanes<T>::map([&](int i) { return math::tanh(x.lane[i]); });
}
template <class T>
inline Lanes<T> sigmoid(const Lanes<T>& x) {
  return Lanes<T>::map([&](int i) { return math::sigmoid(x.lane[i]); });
}
template <class T>
inline Lanes<T> sqrt_softplus(const Lanes<T>& x) {
  return Lanes<T>::map([&](int i) { return math::sqrt_softplus(x.lane[i]); });
}
template <class T>
inline typename Lanes<T>::Int order_keys(const Lanes<T>& x) {
  typename Lanes<T>::Int r;
  MOE_ROUTE_LANES r.lane[i] = order_key(x.lane[i]);
  return r;
}
template <class I>
inline PortableMask operator>(const PortableInts<I>& a, const PortableInts<I>& b) {
  PortableMask r;
  MOE_ROUTE_LANES r.lane[i] = a.lane[i] > b.lane[i];
  return r;
}

template <class I>
inline PortableInts<I> add(PortableInts<I> a, const PortableInts<I>& b) {
  MOE_ROUTE_LANES a.lane[i] += b.lane[i];
  return a;
}
template <class I>
inline PortableInts<I> count_where(PortableInts<I> a, const PortableMask& m) {
  MOE_ROUTE_LANES a.lane[i] += m.lane[i];
  return a;
}

template <class T>
inline T fold_add(Lanes<T> a) {
  for (int apart = 8; apart > 0; apart /= 2) {
    for (int i = 0; i < apart; ++i) a.lane[i] += a.lane[i + apart];
  }
  return a.lane[0];
}
template <class T>
inline T fold_max(Lanes<T> a) {
  for (int apart = 8; apart > 0; apart /= 2) {
    for (int i = 0; i < apart; ++i) a.lane[i] = a.lane[i + apart] > a.lane[i] ? a.lane[i + apart] : a.lane[i];
  }
  return a.lane[0];
}
template <class T>
inline T fold_min(Lanes<T> a) {
  for (int apart = 8; apart > 0; apart /= 2) {
    for (int i = 0; i < apart; ++i) a.lane[i] = a.lane[i + apart] < a.lane[i] ? a.lane[i + apart] : a.lane[i];
  }
  return a.lane[0];
}

// Appends the lanes of a mask, and their ids. Writes up to 16 elements past the list's end; returns the new count.
template <class T>
inline int append(const Lanes<T>& values, const PortableMask& m, const typename Lanes<T>::Int& id, T* out,
                  int32_t* ids, int count) {
  MOE_ROUTE_LANES {
    out[count] = values.lane[i];
    ids[count] = int32_t(id.lane[i]);
    count += m.lane[i];
  }
  return count;
}

#undef MOE_ROUTE_LANES

}  // namespace
}  // namespace moe_route::cpu
