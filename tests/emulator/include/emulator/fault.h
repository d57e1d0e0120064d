// What a kernel did wrong.
#pragma once
#include <stdexcept>
#include <string>

namespace emulator {

// Thrown by cudaLaunchKernelEx where the kernel broke a rule. The threads of the block are dropped where they
// stand: nothing on their stacks is destroyed, which is harmless because kernels own nothing.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Called by a running thread: ends its launch with a Fault that says where all its block's threads stand.
[[noreturn]] void fault(const std::string& what);

}  // namespace emulator
