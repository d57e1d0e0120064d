// Whole problems on the device of their tensors: the one place that chooses between the backends.
//
// On the CPU a call returns when the work is done; on a CUDA device it only enqueues on torch's current
// stream of that device. launch.cpp is the library's; the tests link the operators with another one, which
// runs the emulated CUDA kernels on CPU tensors.
#pragma once
#include "moe_route/dispatch.h"
#include "moe_route/experts.h"
#include "moe_route/gate.h"
#include "place.h"

namespace moe_route::launch {

void gate(const GateArgs& args, const Place& place);

// Bytes that DispatchArgs::workspace must hold, 0 where none is needed.
int64_t dispatch_workspace_bytes(const DispatchArgs& args, const Place& place);
void dispatch(const DispatchArgs& args, const Place& place);
void permute(const PermuteArgs& args, const Place& place);
void combine(const CombineArgs& args, const Place& place);
// One after the other: each may read what those before it wrote.
void expert_products(const ExpertProductArgs* products, int count, const Place& place);
void pack_expert_weight(const ExpertPackArgs& args);  // on the CPU
void expert_activation(const ExpertActivationArgs& args, const Place& place);

// Loads the CUDA kernels that later calls with this many experts may launch on the device `index`.
void load_kernels(int32_t index, int32_t experts);

}  // namespace moe_route::launch
