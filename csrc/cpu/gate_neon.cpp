// The gate on NEON, which every aarch64 processor has.
#include "gate_backend.h"
#include "gate_lanes_neon.h"
#include "gate_row.h"

namespace moe_route::cpu {

GateBackend gate_neon() {
  return {RowGate<Lanes>::workspace_bytes,
          [](const GateArgs& args, int64_t begin, int64_t end, void* workspace) {
            RowGate<Lanes>(args, end - begin, workspace).rows(begin, end);
          }};
}

}  // namespace moe_route::cpu
