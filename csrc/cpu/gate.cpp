// gate_rows: checks what a wrong call would turn into stray writes, lends scratch memory, and hands the rows
// to the instruction set in force. At most one allocation a call, whatever the number of rows.
#include <memory>
#include <new>

#include "gate_backend.h"

namespace moe_route::cpu {
namespace {

struct AlignedDelete {
  void operator()(void* p) const { ::operator delete(p, std::align_val_t{64}); }
};

// The scratch memory of a short call lies on the stack: allocating it takes a quarter of the time of a row.
constexpr size_t kOnStack = size_t{64} << 10;
[[gnu::noinline]] void rows_on_stack(const GateBackend& backend, const GateArgs& args, int64_t begin,
                                     int64_t end) {
  alignas(64) char workspace[kOnStack];
  backend.rows(args, begin, end, workspace);
}

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
  const size_t bytes = backend.workspace_bytes(args, end - begin);
  if (bytes <= kOnStack) return rows_on_stack(backend, args, begin, end);
  const std::unique_ptr<void, AlignedDelete> workspace(::operator new(bytes, std::align_val_t{64}));
  backend.rows(args, begin, end, workspace.get());
}

}  // namespace moe_route::cpu
