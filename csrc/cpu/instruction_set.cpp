// Which instruction set the kernels run on: the best that this build and this processor (and its operating
// system, which must save the registers) can run, lowered by MOE_ROUTE_ISA.
#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "moe_route/gate.h"

namespace moe_route::cpu {
namespace {

constexpr InstructionSet kAll[] = {InstructionSet::kPortable, InstructionSet::kAvx2, InstructionSet::kAvx512,
                                   InstructionSet::kAvx512Bf16};

InstructionSet choose_at_start() {
  InstructionSet best = InstructionSet::kPortable;
  for (InstructionSet set : kAll) {
    if (supported(set)) best = set;
  }
  const char* asked = std::getenv("MOE_ROUTE_ISA");
  if (asked == nullptr || *asked == '\0') return best;
  for (InstructionSet set : kAll) {
    if (std::string(asked) == name(set)) return supported(set) ? set : best;
  }
  throw std::invalid_argument("MOE_ROUTE_ISA is '" + std::string(asked) +
                              "'; it takes portable, avx2, avx512 or avx512_bf16.");
}

std::atomic<InstructionSet>& current() {
  static std::atomic<InstructionSet> set{choose_at_start()};
  return set;
}

}  // namespace

const char* name(InstructionSet set) {
  switch (set) {
    case InstructionSet::kAvx2:
      return "avx2";
    case InstructionSet::kAvx512:
      return "avx512";
    case InstructionSet::kAvx512Bf16:
      return "avx512_bf16";
    default:
      return "portable";
  }
}

// __builtin_cpu_supports asks cpuid and, for these sets, XGETBV: what the operating system does not save is
// not there.
bool supported(InstructionSet set) {
#if MOE_ROUTE_X86
  switch (set) {
    case InstructionSet::kPortable:
      return true;
    case InstructionSet::kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
             __builtin_cpu_supports("f16c");
    case InstructionSet::kAvx512:
      return supported(InstructionSet::kAvx2) && __builtin_cpu_supports("avx512f") &&
             __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd");
    case InstructionSet::kAvx512Bf16:
      return supported(InstructionSet::kAvx512) && __builtin_cpu_supports("avx512bf16");
  }
  return false;
#else
  return set == InstructionSet::kPortable;
#endif
}

InstructionSet best_instruction_set() { return choose_at_start(); }
InstructionSet instruction_set() { return current().load(std::memory_order_relaxed); }

void set_instruction_set(InstructionSet set) {
  if (!supported(set)) {
    throw std::invalid_argument(std::string("this build or processor has no ") + name(set) +
                                "; set one of the supported sets.");
  }
  current().store(set, std::memory_order_relaxed);
}

}  // namespace moe_route::cpu
