// expert_products on the instruction set in force: with vectors, or in the plain form (experts_simple.h).
#define MOE_ROUTE_ISA portable
#include "experts_simple.h"

namespace moe_route::cpu {
#if MOE_ROUTE_X86
namespace avx2 {
void expert_products(const ExpertProductArgs* products, int count, Parallel parallel, int threads);
}
namespace avx512 {
void expert_products(const ExpertProductArgs* products, int count, Parallel parallel, int threads);
}
namespace avx512_bf16 {
void expert_products(const ExpertProductArgs* products, int count, Parallel parallel, int threads);
}
#endif

void expert_products(const ExpertProductArgs* products, int count, Parallel parallel,
                     [[maybe_unused]] int threads) {
#if MOE_ROUTE_X86
  switch (instruction_set()) {
    case InstructionSet::kAvx512Bf16:
      if (products->type == DType::kBFloat16) {
        return avx512_bf16::expert_products(products, count, parallel, threads);
      }
      [[fallthrough]];
    case InstructionSet::kAvx512:
      return avx512::expert_products(products, count, parallel, threads);
    case InstructionSet::kAvx2:
      return avx2::expert_products(products, count, parallel, threads);
    default:
      break;
  }
#endif
  for (int i = 0; i < count; ++i) portable::expert_product(products[i], parallel);
}

}  // namespace moe_route::cpu
