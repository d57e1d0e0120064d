// Which instruction set the kernels run on: the best that this build and this processor (and its operating
// system, which must save the registers) can run, lowered by MOE_ROUTE_ISA.
#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "moe_route/gate.h"
#if MOE_ROUTE_X86
#include <cpuid.h>
#endif

namespace moe_route::cpu {
namespace {

InstructionSet choose_at_start() {
  InstructionSet best = InstructionSet::kPortable;
  for (InstructionSet set : kInstructionSets) {
    if (supported(set)) best = set;
  }
  const char* asked = std::getenv("MOE_ROUTE_ISA");
  if (asked == nullptr || *asked == '\0') return best;
  const InstructionSet set = instruction_set_named(asked);
  return supported(set) ? set : best;
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
    case InstructionSet::kNeon:
      return "neon";
    default:
      return "portable";
  }
}

InstructionSet instruction_set_named(const char* wanted) {
  std::string names;
  for (InstructionSet set : kInstructionSets) {
    if (std::string(wanted) == name(set)) return set;
    names += std::string(names.empty() ? "" : ", ") + name(set);
  }
  throw std::invalid_argument("there is no instruction set '" + std::string(wanted) +
                              "'; set_instruction_set and the variable MOE_ROUTE_ISA take " + names + ".");
}

// __builtin_cpu_supports asks cpuid and, for these sets, XGETBV: what the operating system does not save is
// not there. Clang 14 and 16 refuse the name f16c; it has the registers of AVX2.
#if MOE_ROUTE_X86
static bool has_f16c() {
  unsigned a, b, c = 0, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

bool supported(InstructionSet set) {
#if MOE_ROUTE_X86
  switch (set) {
    case InstructionSet::kPortable:
      return true;
    case InstructionSet::kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
    case InstructionSet::kAvx512:
      return supported(InstructionSet::kAvx2) && __builtin_cpu_supports("avx512f") &&
             __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd");
    case InstructionSet::kAvx512Bf16:
      return supported(InstructionSet::kAvx512) && __builtin_cpu_supports("avx512bf16");
    default:
      return false;
  }
#else
  return set == InstructionSet::kPortable || (MOE_ROUTE_NEON && set == InstructionSet::kNeon);
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
