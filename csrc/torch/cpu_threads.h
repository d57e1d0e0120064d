// Whole problems on torch's threads.
#pragma once
#include "moe_route/dispatch.h"
#include "moe_route/experts.h"
#include "moe_route/gate.h"

namespace moe_route::cpu {

// All rows of `args`. Few rows run on the calling thread. Every worker past the first counts into tables of
// its own, which are added up afterwards: sums of integers, so the same bits for any number of threads.
void launch_gate(const GateArgs& args);
void launch_dispatch(const DispatchArgs& args);
void launch_permute(const PermuteArgs& args);
void launch_combine(const CombineArgs& args);
void launch_expert_products(const ExpertProductArgs* products, int count);
void launch_expert_activation(const ExpertActivationArgs& args);
void launch_expert_pack(const ExpertPackArgs& args);

}  // namespace moe_route::cpu
