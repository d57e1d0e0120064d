// The CUDA backend: the contracts of gate.h and dispatch.h on device memory. One file per operator in
// csrc/cuda, without torch headers.
//
// Every pointer of an argument struct is a device address of the current device. A call only enqueues work on
// `stream`: it allocates nothing, copies nothing and never waits (but for the first call of each kernel,
// which loads it), so it may be captured into a CUDA graph; what it reads is read when the work runs. Results
// have the bits of the CPU backend (a NaN is a NaN), whatever the grid: rows depend on nothing but themselves
// and statistics are sums of integers. float64 logits are left to the CPU.
//
// Errors: std::runtime_error with CUDA's own message where a launch is refused.
#pragma once
#include <cstdint>

#include "moe_route/dispatch.h"
#include "moe_route/gate.h"

struct CUstream_st;

namespace moe_route::cuda {

using Stream = CUstream_st*;  // cudaStream_t

void gate(const GateArgs& args, Stream stream);

// DispatchArgs::workspace holds this many bytes, uninitialized.
int64_t dispatch_workspace_bytes(int64_t slots, int32_t experts);
void dispatch(const DispatchArgs& args, Stream stream);
void permute(const PermuteArgs& args, Stream stream);
void combine(const CombineArgs& args, Stream stream);

}  // namespace moe_route::cuda
