// Order-preserving integer keys: comparing keys as integers is comparing values in the gate's order.
//
//   a < b as numbers  <=>  key(a) < key(b);   key(-0.0) == key(+0.0);   key(-inf) > key(NaN) = lowest.
//
// Two's complement orders non-negative floats as their bits do; negative ones run backwards, so all but the
// sign bit is flipped. No bit pattern is stolen from the numbers: NaN takes the one below every key.
#pragma once
#include "moe_route/math.h"

namespace moe_route {

template <class V>
MOE_ROUTE_INLINE auto order_key(V x) {
  using namespace math;
  using Int = decltype(as_int(x));
  constexpr int kSignBit = 8 * sizeof(Int) - 1;
  const Int bits = as_int(x + V(0.0f));  // -0.0 + 0.0 = +0.0
  const Int key = bits ^ ((bits >> kSignBit) & ~(Int(1) << kSignBit));
  return x == x ? key : Int(Int(1) << kSignBit);
}

// Keys that hold an index too: doubles whose high half is the float's bits and whose low half breaks ties, so that
// one max and one min exchange value and index. A float's exponent reaches into the double's from above, so that
// no float but a NaN becomes an infinity or a NaN; this step makes none of them subnormal (flushing would lose the
// low half of zero).
inline constexpr int32_t kKeyStep = 0x00100000;

}  // namespace moe_route
