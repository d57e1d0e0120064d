// The gate in plain C++, for every processor.
#include "gate_backend.h"
#include "gate_lanes_portable.h"
#include "gate_row.h"

namespace moe_route::cpu {

GateBackend gate_portable() {
  return {RowGate<Lanes<float>>::workspace_bytes,
          [](const GateArgs& args, int64_t begin, int64_t end, void* workspace) {
            RowGate<Lanes<float>>(args, end - begin, workspace).rows(begin, end);
          }};
}

}  // namespace moe_route::cpu
