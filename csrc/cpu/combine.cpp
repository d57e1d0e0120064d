#define MOE_ROUTE_ISA portable
#include "combine_impl.h"

namespace moe_route::cpu {
#if MOE_ROUTE_X86
namespace avx2 {
void combine_range(const CombineArgs& args, int64_t begin, int64_t end);
}
namespace avx512 {
void combine_range(const CombineArgs& args, int64_t begin, int64_t end);
}
#endif

namespace {

constexpr int64_t kElementsPerPiece = 1 << 16;

struct Work {
  const CombineArgs& args;
  void (*range)(const CombineArgs&, int64_t, int64_t);
};

auto range_for(InstructionSet set) {
#if MOE_ROUTE_X86
  if (set >= InstructionSet::kAvx512) return &avx512::combine_range;
  if (set == InstructionSet::kAvx2) return &avx2::combine_range;
#endif
  static_cast<void>(set);
  return &portable::combine_range;
}

}  // namespace

void combine(const CombineArgs& args, Parallel parallel) {
  Work work{args, range_for(instruction_set())};
  const ParallelBody body = [](int64_t begin, int64_t end, void* context) {
    const auto& part = *static_cast<const Work*>(context);
    part.range(part.args, begin, end);
  };
  const int64_t elements = args.hidden * (args.k + 1);
  if (elements > 0) parallel(args.tokens, 1 + kElementsPerPiece / elements, body, &work);
}

}  // namespace moe_route::cpu
