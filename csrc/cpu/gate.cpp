// gate_rows: checks what a wrong call would turn into stray writes, lends scratch memory, and hands the rows
// to the instruction set in force. One allocation a call, whatever the number of rows.
#include <memory>
#include <new>
#include <stdexcept>
#include <string>

#include "gate_backend.h"

namespace moe_route::cpu {
namespace {

void require(bool holds, const char* message) {
  if (!holds) throw std::invalid_argument(std::string("gate_rows: ") + message);
}

void check(const GateArgs& args) {
  const GateSpec& spec = args.spec;
  require(args.experts >= 1 && args.experts <= 4096, "experts must lie in 1..4096");
  require(args.k >= 1 && args.k <= args.experts && args.k <= 64, "k must lie in 1..min(experts, 64)");
  require(spec.groups >= 1 && args.experts % spec.groups == 0, "experts must divide into groups");
  require(spec.top_groups >= 1 && spec.top_groups <= spec.groups, "top_groups must lie in 1..groups");
  require(args.logits != nullptr || args.given.mode == GivenMode::kNatural, "logits are missing");
  require(args.given.mode == GivenMode::kNone || args.given.ids != nullptr, "a given choice needs ids");
}

GateBackend backend_for(DType logits) {
  if (logits == DType::kFloat64) return gate_portable_double();
#if MOE_ROUTE_X86
  switch (instruction_set()) {
    case InstructionSet::kAvx512:
      return gate_avx512();
    case InstructionSet::kAvx2:
      return gate_avx2();
    case InstructionSet::kPortable:
      break;
  }
#endif
  return gate_portable();
}

struct AlignedDelete {
  void operator()(void* p) const { ::operator delete(p, std::align_val_t{64}); }
};

}  // namespace

void gate_rows(const GateArgs& args, int64_t begin, int64_t end) {
  if (begin >= end) return;
  check(args);
  const GateBackend backend = backend_for(args.logits_type);
  const std::unique_ptr<void, AlignedDelete> workspace(
      ::operator new(backend.workspace_bytes(args.experts), std::align_val_t{64}));
  backend.rows(args, begin, end, workspace.get());
}

}  // namespace moe_route::cpu
