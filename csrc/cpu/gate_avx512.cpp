// The gate on AVX-512. Compiled for that instruction set alone: nothing here may be called before gate.cpp
// has asked the processor.
#include "gate_backend.h"
#include "gate_lanes_avx512.h"
#include "gate_row.h"

namespace moe_route::cpu {

GateBackend gate_avx512() {
  return {RowGate<Lanes>::workspace_bytes,
          [](const GateArgs& args, int64_t begin, int64_t end, void* workspace) {
            RowGate<Lanes>(args, end - begin, workspace).rows(begin, end);
          }};
}

}  // namespace moe_route::cpu
