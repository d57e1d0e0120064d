// gate_rows: checks what a wrong call would turn into stray writes, lends scratch memory, and hands the rows
// to the instruction set in force. One allocation a call, whatever the number of rows.
#include <memory>
#include <new>

#include "gate_backend.h"

namespace moe_route::cpu {
namespace {

struct AlignedDelete {
  void operator()(void* p) const { ::operator delete(p, std::align_val_t{64}); }
};

}  // namespace

GateBackend gate_backend(DType logits) {
  if (logits == DType::kFloat64) return gate_portable_double();
  switch (instruction_set()) {
#if MOE_ROUTE_X86
    case InstructionSet::kAvx512Bf16:
    case InstructionSet::kAvx512:
      return gate_avx512();
    case InstructionSet::kAvx2:
      return gate_avx2();
#elif MOE_ROUTE_NEON
    case InstructionSet::kNeon:
      return gate_neon();
#endif
    default:
      return gate_portable();
  }
}

void gate_rows(const GateArgs& args, int64_t begin, int64_t end) {
  if (begin >= end) return;
  check(args);
  const GateBackend backend = gate_backend(args.logits_type);
  const std::unique_ptr<void, AlignedDelete> workspace(
      ::operator new(backend.workspace_bytes(args.experts, end - begin), std::align_val_t{64}));
  backend.rows(args, begin, end, workspace.get());
}

}  // namespace moe_route::cpu
