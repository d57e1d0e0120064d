// Which kernels a width has, and their launches. Every file of gate_instances instantiates one width.
#pragma once
#include "gate_tile.cuh"

namespace moe_route::cuda {

// What there is of a width: every level in registers; in shared memory, the full one for all.
template <int kValues, class Use>
void with_kernel(Level level, bool common, bool tiles, Use use) {
  if constexpr (has_tiles(kValues)) {
    if (tiles) {
      if (level == Level::kPlain) return use(tile_kernel<kValues, Level::kPlain>);
      if (level == Level::kScored) return use(tile_kernel<kValues, Level::kScored>);
      if (level == Level::kSoft) return use(tile_kernel<kValues, Level::kSoft>);
    }
  }
  if constexpr (kValues > 0) {
    if (level == Level::kPlain)
      return use(common ? gate_kernel<kValues, Level::kPlain, true>
                        : gate_kernel<kValues, Level::kPlain, false>);
    if (level == Level::kScored)
      return use(common ? gate_kernel<kValues, Level::kScored, true>
                        : gate_kernel<kValues, Level::kScored, false>);
    if (level == Level::kSoft)
      return use(common ? gate_kernel<kValues, Level::kSoft, true>
                        : gate_kernel<kValues, Level::kSoft, false>);
  }
  if constexpr (kLanes * kValues <= register_experts(Level::kFull)) {
    use(gate_kernel<kValues, Level::kFull, false>);
  } else {
    throw std::logic_error("moe_route: there is no full gate kernel of this width");
  }
}

template <int kValues>
void load_gate(Level level) {
  with_kernel<kValues>(level, true, true, [](void (*kernel)(GateLaunch)) { load(kernel); });
  for (bool common : {false, true})
    with_kernel<kValues>(level, common, false, [](void (*kernel)(GateLaunch)) { load(kernel); });
}

template <int kValues>
void launch_gate(const GateLaunch& gate, Stream stream) {
  with_kernel<kValues>(gate.level, gate.common, gate.tiles, [&](void (*kernel)(GateLaunch)) {
    launch("gate", kernel, gate.blocks, kLanes, gate.layout.shared_bytes, stream, gate);
  });
}

}  // namespace moe_route::cuda
