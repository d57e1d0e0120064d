// What one instruction set offers to the dispatcher in gate.cpp.
#pragma once
#include <cstddef>
#include <cstdint>

#include "moe_route/gate.h"

namespace moe_route::cpu {

struct GateBackend {
  size_t (*workspace_bytes)(const GateArgs& args, int64_t rows);
  void (*rows)(const GateArgs& args, int64_t begin, int64_t end,
               void* workspace);  // workspace aligned to 64 bytes
};

GateBackend gate_portable();
GateBackend gate_portable_double();  // kFloat64 logits
#if MOE_ROUTE_X86
GateBackend gate_avx2();
GateBackend gate_avx512();
#elif MOE_ROUTE_NEON
GateBackend gate_neon();
#endif
// What runs such logits on the instruction set in force.
GateBackend gate_backend(DType logits);

}  // namespace moe_route::cpu
