// What the environment says, read anew at every launch.
#pragma once
#include <cstdint>

namespace emulator {

enum class Order { kForward, kReverse, kRandom };

struct Settings {
  Order order = Order::kForward;  // MOE_ROUTE_EMULATOR_ORDER = forward | reverse | a seed
  uint64_t seed = 0;
  int os_threads = 1;        // MOE_ROUTE_EMULATOR_THREADS
  int multiprocessors = 4;   // MOE_ROUTE_EMULATOR_MULTIPROCESSORS
  bool loaded_only = false;  // MOE_ROUTE_EMULATOR_LOADED_ONLY = 1: as in a capture, which can load no kernel
};

// Throws std::invalid_argument naming the variable and what it takes.
Settings read_settings();

}  // namespace emulator
