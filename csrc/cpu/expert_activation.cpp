#define MOE_ROUTE_ISA portable
#include "expert_activation_impl.h"

namespace moe_route::cpu {
#if MOE_ROUTE_X86
namespace avx2 {
void activate_rows(const ExpertActivationArgs& args, int64_t begin, int64_t end);
}
namespace avx512 {
void activate_rows(const ExpertActivationArgs& args, int64_t begin, int64_t end);
}
#endif

namespace {

constexpr int64_t kElementsPerPiece = 1 << 14;

struct Work {
  const ExpertActivationArgs& args;
  void (*rows)(const ExpertActivationArgs&, int64_t, int64_t);
};

auto rows_for(InstructionSet set) {
#if MOE_ROUTE_X86
  if (set == InstructionSet::kAvx512) return &avx512::activate_rows;
  if (set == InstructionSet::kAvx2) return &avx2::activate_rows;
#endif
  static_cast<void>(set);
  return &portable::activate_rows;
}

}  // namespace

void expert_activation(const ExpertActivationArgs& args, Parallel parallel) {
  Work work{args, rows_for(instruction_set())};
  const ParallelBody body = [](int64_t begin, int64_t end, void* context) {
    const auto& part = *static_cast<const Work*>(context);
    part.rows(part.args, begin, end);
  };
  const int64_t rows = args.columns == 0 ? 0 : args.rows_in_use();
  if (rows > 0) parallel(rows, 1 + kElementsPerPiece / args.columns, body, &work);
}

}  // namespace moe_route::cpu
