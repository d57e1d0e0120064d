// The gate on CUDA: one launch, cut so that a small batch spreads over the chip and a large one fills it
// once.
#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "gate_layout.h"

namespace moe_route::cuda {
namespace {

constexpr int kTeam = 16;
constexpr int kBlocksPerMultiprocessor = 12;  // whole waves of 6, 4, 3 or 2 blocks at once

int rounded(int64_t n, int to) { return static_cast<int>((n + to - 1) / to * to); }

Level level_of(const GateArgs& args) {
  const GateStatistics& statistics = args.statistics;
  if (args.steering.rows > 0 || args.given.mode != GivenMode::kNone ||
      args.spec.score == Score::kSparseMixer || (statistics.planes & kNaturalCounts)) {
    return Level::kFull;
  }
  const bool scored = statistics.entropy || (statistics.planes & kMass) || args.spec.groups > 1;
  return scored ? Level::kScored : Level::kPlain;
}

GateLayout layout_of(const GateArgs& args, bool in_registers, int teams, int most_shared) {
  const GateSpec& spec = args.spec;
  const bool forces = args.steering.planes & kForce;
  GateLayout layout;
  layout.keeps_logits = args.correction_bias != nullptr || spec.groups > 1 ||
                        spec.score == Score::kSparseMixer || args.given.mode != GivenMode::kNone ||
                        (args.steering.planes & kScoreBias);
  int next = GateLayout::kSlots;
  const auto take = [&next](bool wanted, int bytes) {
    const int here = next;
    if (wanted) next += rounded(bytes, 16);
    return here;
  };
  const int slots = rounded(args.k, kTeam) * 4, row = rounded(args.experts, kTeam) * 4;
  layout.ids = take(true, slots);
  layout.logits = take(true, slots);
  layout.weights = take(true, slots);
  layout.natural = take(args.statistics.planes & kNaturalCounts, slots);
  layout.logit_row = take(layout.keeps_logits, row);
  layout.value_row = take(!in_registers || spec.groups > 1, row);
  layout.score_row = take(!in_registers, row);
  layout.member_row = take(!in_registers && forces, row);
  layout.group_scores = take(spec.groups > 1, spec.groups * 4);
  layout.team = next;
  const bool counting = args.statistics.groups != nullptr || args.statistics.segments != nullptr;
  const int width = kStatScalars + __builtin_popcount(args.statistics.planes) * args.experts;
  const int block_row = rounded(width * 8, 16);
  if (counting && block_row + teams * layout.team <= most_shared) layout.block_row = block_row;
  layout.shared_bytes = layout.block_row + teams * layout.team;
  if (layout.shared_bytes > most_shared) {
    throw std::runtime_error("moe_route: " + std::to_string(args.experts) +
                             " experts with this steering need " + std::to_string(layout.shared_bytes) +
                             " bytes of shared memory, of which a block of this device has " +
                             std::to_string(most_shared) + "; move the tensors with .to('cpu')");
  }
  return layout;
}

// What the files in gate_instances have for one width of rows.
struct Width {
  void (*launch)(const GateLaunch&, Stream);
  void (*load)(Level);
};
template <int kVectors>
constexpr Width kWidth = {launch_gate<kVectors>, load_gate<kVectors>};

Width width_for(int experts, Level level) {
  if (experts > register_experts(level)) return kWidth<0>;
  if (experts <= 16) return kWidth<1>;
  if (experts <= 32) return kWidth<2>;
  if (experts <= 64) return kWidth<4>;
  if (experts <= 128) return kWidth<8>;
  if (experts <= 256) return kWidth<16>;
  if (experts <= 384) return kWidth<24>;
  return kWidth<32>;
}

}  // namespace

void gate(const GateArgs& args, Stream stream) {
  if (args.tokens <= 0) return;
  check(args);
  if (args.logits_type == DType::kFloat64)
    throw std::invalid_argument("moe_route gate: float64 logits are computed on the CPU only");
  const Level level = level_of(args);
  const bool in_registers = args.experts <= register_experts(level);
  const int teams = (in_registers ? kGateThreads : kGateThreadsAboveRegisters) / kTeam;
  GateLaunch gate;
  gate.args = args;
  gate.level = level;
  gate.layout = layout_of(args, in_registers, teams, most_shared_bytes());
  const int64_t most_blocks =
      int64_t{kBlocksPerMultiprocessor} * device_attribute(cudaDevAttrMultiProcessorCount);
  const int64_t steps = (args.tokens + teams - 1) / teams;
  gate.rows_per_block = (steps + most_blocks - 1) / most_blocks * teams;
  gate.blocks = (args.tokens + gate.rows_per_block - 1) / gate.rows_per_block;
  width_for(args.experts, level).launch(gate, stream);
}

void load_gate_kernels(int32_t experts) {
  for (Level level : {Level::kPlain, Level::kScored, Level::kFull}) width_for(experts, level).load(level);
}

void load_kernels(int32_t experts) {
  load_gate_kernels(experts);
  load_dispatch_kernels(experts);
  load_permute_kernels();
  load_combine_kernels();
  load_experts_kernels();
}

}  // namespace moe_route::cuda
