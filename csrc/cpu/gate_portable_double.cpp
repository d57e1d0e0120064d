// The gate in plain C++ for logits in double, which serve gradient checks. A file of its own, since CMake
// compiles it at -O1: at -O3 it would be the slowest file of the build.
#include "gate_backend.h"
#include "gate_lanes_portable.h"
#include "gate_row.h"

namespace moe_route::cpu {

GateBackend gate_portable_double() {
  return {RowGate<Lanes<double>>::workspace_bytes,
          [](const GateArgs& args, int64_t begin, int64_t end, void* workspace) {
            RowGate<Lanes<double>>(args, end - begin, workspace).rows(begin, end);
          }};
}

}  // namespace moe_route::cpu
