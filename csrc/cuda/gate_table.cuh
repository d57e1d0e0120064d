// What a steering table does to the choice itself: experts by class of force, and other experts in their place.
#pragma once
#include "gate_weigh.cuh"

namespace moe_route::cuda {
namespace {

// Forced-on experts first, forced-off last, forbidden nowhere. `members` is room for the values of a class.
template <int kValues>
__device__ __forceinline__ int choose_by_class(const GateLaunch& launch, const SteeringRow& steering,
                                               int want, const Values<kValues>& values,
                                               Values<kValues>& members, Selection& selection) {
  const int experts = launch.args.experts;
  int chosen = 0;
#pragma unroll 1
  for (int rank_class = 1; rank_class >= -1 && chosen < want; --rank_class) {
    const auto member = [&](int e) {
      return class_of(force_code(entry(launch, steering, kForce, min(e, experts - 1), 0.0f))) == rank_class;
    };
    for_each_expert<kValues>(experts,
                             [&](int i, int e) { members[i] = member(e) ? values[i] : not_a_number(); });
    const int before = chosen;
    chosen += select_best<kValues>(members, experts, want - before, before, selection);
    if (chosen < want) chosen = append_nan<kValues>(values, experts, want, chosen, selection, member);
  }
  return chosen;
}

// Expert e -> remap[e], once weights are final: duplicates merge into the first slot. One lane does it. `ids` and
// `weights` are room for a number of each slot.
template <int kSlots>
__device__ __forceinline__ void remap(const GateLaunch& launch, const SteeringRow& steering, bool weighed,
                                      int32_t* ids, float* weights, Choice<kSlots>& choice) {
  const int experts = launch.args.experts;
  const int32_t* const to = launch.args.steering.remap + int64_t{steering.index} * experts;
  choice.spread(choice.ids, ids);
  choice.spread(choice.weights, weights);
  int kept = 0;
  if (lane() == 0) {
    for (int j = 0; j < choice.count; ++j) {
      const int32_t id = ids[j] < 0 ? -1 : __ldg(to + ids[j]);
      if (id < 0 || id >= experts) continue;
      int slot = 0;
      while (slot < kept && ids[slot] != id) ++slot;
      const float weight = weighed ? weights[j] : 0.0f;
      if (slot == kept) {
        ids[kept] = id;
        weights[kept++] = weight;
      } else {
        weights[slot] += weight;
      }
    }
  }
  kept = from_lane(kept, 0);
  __syncwarp();
  choice.clear();
  choice.count = kept, choice.compact = true;
  choice.each([&](int s, int j) { choice.ids[s] = ids[j], choice.weights[s] = weights[j]; });
}

}  // namespace
}  // namespace moe_route::cuda
