// The CUDA backend: the contracts of gate.h, dispatch.h and experts.h on device memory. One file per operator in
// csrc/cuda, without torch headers.
//
// Every pointer of an argument struct is a device address of the current device. A call only enqueues work on
// `stream`: it allocates nothing, copies nothing and never waits, so it may be captured into a CUDA graph;
// what it reads is read when the work runs. The first launch of each kernel loads it, which may wait;
// load_kernels does that beforehand. Results have the bits of the CPU backend (a NaN is a NaN), whatever the
// grid: rows depend on nothing but themselves and statistics are sums of integers. float64 logits are left to
// the CPU.
//
// Errors: std::runtime_error with CUDA's own message where a launch is refused.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "moe_route/dispatch.h"
#include "moe_route/experts.h"
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
void expert_product(const ExpertProductArgs& args, Stream stream);
void expert_activation(const ExpertActivationArgs& args, Stream stream);

// Loads every kernel that a later call with this many experts may launch, on the current device: all levels
// of the gate, dispatch, permute, combine and the products of experts. A few microseconds where they are loaded already.
void load_kernels(int32_t experts);

// The parts of load_kernels, one for each file.
void load_gate_kernels(int32_t experts);
void load_dispatch_kernels(int32_t experts);
void load_permute_kernels();
void load_combine_kernels();
void load_experts_kernels();
void load_expert_activation_kernels();

// Numbers that only a device can settle, and switches that turn a part off (csrc/cuda/tunables.cu). None changes a
// result. MOE_ROUTE_TUNING=name=number,... in the environment sets them for a process.
struct TunableFacts {
  std::string name, meaning;
  int64_t usual = 0, least = 0, most = 0, now = 0;
};
std::vector<TunableFacts> tunables();

// For the launches that follow. std::invalid_argument where the name or the number is out of range.
void tune(const std::string& name, int64_t value);

}  // namespace moe_route::cuda
