#define MOE_ROUTE_ISA portable
#include "experts_impl.h"

namespace moe_route::cpu {
#if MOE_ROUTE_X86
namespace avx2 {
void expert_columns(const ExpertProductArgs& args, int64_t begin, int64_t end);
}
namespace avx512 {
void expert_columns(const ExpertProductArgs& args, int64_t begin, int64_t end);
}
#endif

namespace {

constexpr int64_t kElementsPerPiece = 1 << 16;  // of weights

struct Work {
  const ExpertProductArgs& args;
  void (*columns)(const ExpertProductArgs&, int64_t, int64_t);
};

auto columns_for(InstructionSet set) {
#if MOE_ROUTE_X86
  if (set == InstructionSet::kAvx512) return &avx512::expert_columns;
  if (set == InstructionSet::kAvx2) return &avx2::expert_columns;
#endif
  static_cast<void>(set);
  return &portable::expert_columns;
}

}  // namespace

void expert_product(const ExpertProductArgs& args, Parallel parallel) {
  Work work{args, columns_for(instruction_set())};
  const ParallelBody body = [](int64_t begin, int64_t end, void* context) {
    const auto& part = *static_cast<const Work*>(context);
    part.columns(part.args, begin, end);
  };
  const int64_t columns = args.experts * args.out_columns;
  if (columns > 0 && args.capacity > 0) parallel(columns, 1 + kElementsPerPiece / (args.in + 1), body, &work);
}

}  // namespace moe_route::cpu
