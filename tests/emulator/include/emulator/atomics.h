// Atomics, for exactly the types that CUDA offers (int64_t is `long`: cast to unsigned long long, as there).
// They are atomic between OS threads too.
#pragma once
#include <atomic>
#include <concepts>
#include <type_traits>

namespace emulator {

template <class T, class... Types>
concept OneOf = (std::same_as<T, Types> || ...);

template <class T, class Change>
T read_modify_write(T* address, Change change) {
  std::atomic_ref<T> cell(*address);
  T old = cell.load(std::memory_order_relaxed);
  while (!cell.compare_exchange_weak(old, change(old), std::memory_order_relaxed)) {
  }
  return old;
}

}  // namespace emulator

#define EMULATOR_ATOMIC(name, expression, ...)                                                          \
  template <emulator::OneOf<__VA_ARGS__> T>                                                             \
  T atomic##name(T* address, std::type_identity_t<T> value) {                                           \
    return emulator::read_modify_write(address, [value](T old) { return static_cast<T>(expression); }); \
  }
EMULATOR_ATOMIC(Add, old + value, int, unsigned, unsigned long long, float, double)
EMULATOR_ATOMIC(Sub, old - value, int, unsigned)
EMULATOR_ATOMIC(Max, old < value ? value : old, int, unsigned, long long, unsigned long long)
EMULATOR_ATOMIC(Min, value < old ? value : old, int, unsigned, long long, unsigned long long)
EMULATOR_ATOMIC(And, old& value, int, unsigned, unsigned long long)
EMULATOR_ATOMIC(Or, old | value, int, unsigned, unsigned long long)
EMULATOR_ATOMIC(Xor, old ^ value, int, unsigned, unsigned long long)
EMULATOR_ATOMIC(Exch, (static_cast<void>(old), value), int, unsigned, unsigned long long, float)
#undef EMULATOR_ATOMIC

template <emulator::OneOf<int, unsigned, unsigned long long, unsigned short> T>
T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  return emulator::read_modify_write(address,
                                     [expected, value](T old) { return old == expected ? value : old; });
}
