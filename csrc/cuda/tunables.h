// One table of what only a device can settle (sizes and crossovers) and of switches that turn a part off, to find out
// whether it is at fault. All are read by the host when it plans a launch, so no kernel pays for them, and no
// value changes a result. cuda.h has the interface: MOE_ROUTE_TUNING in the environment, and tune().
#pragma once
#include <cstdint>

namespace moe_route::cuda {

enum class Tunable : int {
  kGateTilesFrom,
  kGateBlocks,
  kGateLevel,
  kGateCommon,
  kGateRegisters,
  kGateBlockRow,
  kDispatchAlone,
  kDispatchOneLaunch,
  kDispatchTile,
  kDispatchLongTile,
  kDispatchSpans,
  kExpertsColumns,
  kRowsBlocks,
  kPdl,
  kCount,  // of the entries above
};

// The value in force. std::invalid_argument where MOE_ROUTE_TUNING cannot be read.
int64_t tuned(Tunable which);

}  // namespace moe_route::cuda
