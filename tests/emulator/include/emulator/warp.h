// Warp collectives. The lanes that a mask names must all come to the same call with the same mask; the last
// one to arrive works out everybody's result. Lanes of different masks may wait at the same time.
#pragma once
#include <bit>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "barriers.h"

namespace emulator {

enum class Collective : uint8_t {
  kSync,
  kShuffle,
  kBallot,
  kMatch,
  kAdd,
  kAnd,
  kOr,
  kXor,
  kMinSigned,
  kMaxSigned,
  kMinUnsigned,
  kMaxUnsigned
};
// `value` of the calling lane; `source` is the lane that a shuffle reads.
uint64_t warp_collective(Collective kind, uint32_t mask, uint64_t value, int source, const Place& place);
int lane();

// The types that CUDA shuffles and matches: numbers of 32 and 64 bits, and its 16-bit floats.
template <class T>
inline constexpr bool kIsWarpValue = std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8);

template <class T>
uint64_t to_bits(T value) {
  static_assert(kIsWarpValue<T>, "CUDA has no such collective for this type");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <class T>
T shuffle(unsigned mask, T value, int source, const Place& place) {
  const uint64_t bits = warp_collective(Collective::kShuffle, mask, to_bits(value), source, place);
  T result;
  std::memcpy(static_cast<void*>(&result), &bits, sizeof(T));
  return result;
}

inline unsigned reduce(Collective kind, unsigned mask, unsigned value, const Place& place) {
  return static_cast<unsigned>(warp_collective(kind, mask, value, 0, place));
}

}  // namespace emulator

inline void __syncwarp(unsigned mask = 0xffffffffu, EMULATOR_PLACE) {
  emulator::warp_collective(emulator::Collective::kSync, mask, 0, 0, place);
}

// `width` cuts the warp into pieces of that many lanes, a power of two; a lane whose source lies outside its
// piece keeps its own value.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, EMULATOR_PLACE) {
  const int first = emulator::lane() & ~(width - 1);
  return emulator::shuffle(mask, value, first | (source & (width - 1)), place);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, EMULATOR_PLACE) {
  const int lane = emulator::lane(), source = lane ^ lane_mask, last = lane | (width - 1);
  return emulator::shuffle(mask, value, source > last ? lane : source, place);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, EMULATOR_PLACE) {
  const int lane = emulator::lane(), source = lane - static_cast<int>(delta);
  return emulator::shuffle(mask, value, source < (lane & ~(width - 1)) ? lane : source, place);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, EMULATOR_PLACE) {
  const int lane = emulator::lane(), source = lane + static_cast<int>(delta);
  return emulator::shuffle(mask, value, source > (lane | (width - 1)) ? lane : source, place);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, EMULATOR_PLACE) {
  return emulator::reduce(emulator::Collective::kBallot, mask, predicate != 0, place);
}
inline int __any_sync(unsigned mask, int predicate, EMULATOR_PLACE) {
  return emulator::reduce(emulator::Collective::kBallot, mask, predicate != 0, place) != 0;
}
inline int __all_sync(unsigned mask, int predicate, EMULATOR_PLACE) {
  return emulator::reduce(emulator::Collective::kBallot, mask, predicate != 0, place) == mask;
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value, EMULATOR_PLACE) {
  return static_cast<unsigned>(
      emulator::warp_collective(emulator::Collective::kMatch, mask, emulator::to_bits(value), 0, place));
}
template <class T>
unsigned __match_all_sync(unsigned mask, T value, int* all, EMULATOR_PLACE) {
  const bool same = __match_any_sync(mask, value, place) == mask;
  *all = same;
  return same ? mask : 0;
}

#define EMULATOR_REDUCE(name, kind)                                                       \
  inline unsigned __reduce_##name##_sync(unsigned mask, unsigned value, EMULATOR_PLACE) { \
    return emulator::reduce(emulator::Collective::kind, mask, value, place);              \
  }
#define EMULATOR_REDUCE_SIGNED(name, kind)                                                        \
  inline int __reduce_##name##_sync(unsigned mask, int value, EMULATOR_PLACE) {                   \
    return static_cast<int>(                                                                      \
        emulator::reduce(emulator::Collective::kind, mask, static_cast<unsigned>(value), place)); \
  }
EMULATOR_REDUCE(add, kAdd)
EMULATOR_REDUCE_SIGNED(add, kAdd)
EMULATOR_REDUCE(min, kMinUnsigned)
EMULATOR_REDUCE_SIGNED(min, kMinSigned)
EMULATOR_REDUCE(max, kMaxUnsigned)
EMULATOR_REDUCE_SIGNED(max, kMaxSigned)
EMULATOR_REDUCE(and, kAnd)
EMULATOR_REDUCE(or, kOr)
EMULATOR_REDUCE(xor, kXor)
#undef EMULATOR_REDUCE
#undef EMULATOR_REDUCE_SIGNED

// Hardware may answer with any set of lanes that holds the calling one; a kernel that needs more is wrong.
inline unsigned __activemask() { return 1u << emulator::lane(); }
