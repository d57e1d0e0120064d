// The gate on CUDA: one launch, cut so that a small batch spreads over the chip and a large one fills it
// once.
#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "gate_layout.h"
#include "tunables.h"

namespace moe_route::cuda {
namespace {

int rounded(int64_t n, int to) { return static_cast<int>((n + to - 1) / to * to); }

Level level_of(const GateArgs& args) {
  const GateStatistics& statistics = args.statistics;
  const GateSteering& steering = args.steering;
  const bool steers = steering.rows > 0;
  if (args.given.mode != GivenMode::kNone || args.spec.score == Score::kSparseMixer ||
      args.spec.softcap != 0 || (statistics.planes & kNaturalCounts) ||
      (steers && (steering.remap != nullptr || (steering.planes & ~kSoftPlanes)))) {
    return Level::kFull;
  }
  if (steers) return Level::kSoft;
  const bool scored = statistics.entropy || (statistics.planes & kMass) || args.spec.groups > 1;
  return scored ? Level::kScored : Level::kPlain;
}

// `rows`: of a block. A single row adds to the statistics tables by itself: setting up a row in shared memory
// and adding that up would take longer.
GateLayout layout_of(const GateArgs& args, bool in_registers, int rows, int most_shared) {
  const GateSpec& spec = args.spec;
  const bool forces = args.steering.planes & kForce;
  GateLayout layout;
  layout.keeps_logits = args.correction_bias != nullptr || spec.groups > 1 ||
                        spec.score == Score::kSparseMixer || args.given.mode != GivenMode::kNone ||
                        (args.steering.planes & kScoreBias);
  layout.whole_tokens = reinterpret_cast<uintptr_t>(args.token_table) % 16 == 0;
  layout.softmax_of_chosen =
      spec.score == Score::kSoftmax &&
      (spec.order == Order::kTopKThenScore || (spec.renormalize == Renormalize::kSum && spec.eps == 0.0f));
  layout.softmax_of_all = spec.score == Score::kSoftmax && !layout.softmax_of_chosen;
  layout.compares_scores =
      spec.order == Order::kScoreThenTopK && (args.correction_bias != nullptr || spec.groups > 1);
  const auto reachable = [](int64_t rows) {  // a token's index is an int32
    return static_cast<int>(std::min<int64_t>(rows, INT32_MAX));
  };
  const auto table_rows = [&](const int64_t* table, int64_t rows) {
    return table == nullptr ? 0 : reachable(rows);
  };
  layout.steering_rows = reachable(args.steering.rows);
  layout.groups = table_rows(args.statistics.groups, args.statistics.num_groups);
  layout.segments = table_rows(args.statistics.segments, args.statistics.num_segments);
  const uint32_t group_size = static_cast<uint32_t>(args.experts / spec.groups);
  layout.group_reciprocal = group_size > 1 ? static_cast<uint32_t>((uint64_t{1} << 32) / group_size) + 1 : 0;
  int next = GateLayout::kSelection;
  const auto take = [&next](bool wanted, int bytes) {
    const int here = next;
    if (wanted) next += rounded(bytes, 16);
    return here;
  };
  const int row = rounded(args.experts, 32) * 4;
  layout.logit_row = take(layout.keeps_logits, row);
  layout.value_row = take(!in_registers || spec.groups > 1, row);
  layout.score_row = take(!in_registers, row);
  layout.member_row = take(!in_registers && forces, row);
  layout.group_scores = take(spec.groups > 1, 2 * spec.groups * 4);
  const bool counting =
      rows > 1 && (args.statistics.groups != nullptr || args.statistics.segments != nullptr);
  layout.steering_stride = __builtin_popcount(args.steering.planes) * args.experts;
  for (int i = 0; i < 7; ++i)
    layout.steering_plane[i] = __builtin_popcount(args.steering.planes & ((1u << i) - 1)) * args.experts;
  layout.statistics_width = kStatScalars + __builtin_popcount(args.statistics.planes) * args.experts;
  for (int i = 0; i < 5; ++i)
    layout.statistics_plane[i] =
        kStatScalars + __builtin_popcount(args.statistics.planes & ((1u << i) - 1)) * args.experts;
  const int block_row = rounded(layout.statistics_width * 8, 16);
  const bool adds_up = counting && tuned(Tunable::kGateBlockRow);
  if (adds_up && block_row + next <= most_shared) layout.block_row = block_row;
  layout.shared_bytes = layout.block_row + next;
  if (layout.shared_bytes > most_shared) {
    throw std::runtime_error("moe_route: " + std::to_string(args.experts) +
                             " experts with this steering need " + std::to_string(layout.shared_bytes) +
                             " bytes of shared memory, of which a block of this device has " +
                             std::to_string(most_shared) + "; move the tensors with .to('cpu')");
  }
  return layout;
}

bool is_common(const GateArgs& args, const GateLaunch& gate) {
  const GateSpec& spec = args.spec;
  const bool one_division = spec.order == Order::kTopKThenScore
                                ? spec.renormalize == Renormalize::kNone
                                : spec.renormalize == Renormalize::kSum && spec.eps == 0.0f;
  return spec.score == Score::kSoftmax && one_division && spec.scale == 1.0f &&
         args.expert_scale == nullptr && !gate.layout.keeps_logits && args.weights != nullptr &&
         args.ids != nullptr && gate.layout.whole_tokens;
}

// Does the launch suit tiles of 32 rows, a thread each?
bool takes_tiles(const GateArgs& args, const GateLaunch& gate) {
  const uint32_t counted = kCounts | kMass | kWeight;
  const int vector = args.logits_type == DType::kFloat32 ? 16 : 8,
            bytes = vector / 4;  // of four values, of one
  return gate.common && args.experts <= 256 && has_tiles(args.experts / 32) && args.k <= 8 &&
         (args.statistics.planes & ~counted) == 0 && reinterpret_cast<uintptr_t>(args.logits) % vector == 0 &&
         args.row_stride * bytes % vector == 0;
}

// What the files in gate_instances have for one width of rows.
struct Width {
  void (*launch)(const GateLaunch&, Stream);
  void (*load)(Level);
};
template <int kVectors>
constexpr Width kWidth = {launch_gate<kVectors>, load_gate<kVectors>};

// Rows with more slots than lanes, or more experts than registers, are kept in shared memory.
bool in_registers(const GateArgs& args, Level level) {
  return args.experts <= register_experts(level) && args.k <= 32 && tuned(Tunable::kGateRegisters);
}

Width width_for(int experts) {
  if (experts <= 32) return kWidth<1>;
  if (experts <= 64) return kWidth<2>;
  if (experts <= 128) return kWidth<4>;
  if (experts <= 256) return kWidth<8>;
  if (experts <= 384) return kWidth<12>;
  return kWidth<16>;
}

// A block takes one tile after the other; its statistics row is always there.
void lay_tiles(GateLaunch& gate) {
  const int64_t processors = device_attribute(cudaDevAttrMultiProcessorCount);
  const int64_t tiles = (gate.args.tokens + 31) / 32;
  const int shared =
      layout_of(gate.args, true, 2, most_shared_bytes()).shared_bytes + tile_bytes(gate.args.experts);
  const int64_t at_once = processors * std::max(1, most_shared_bytes() / (shared + 1024));
  gate.rows_per_block = static_cast<int>(32 * ((tiles + at_once - 1) / at_once));
  gate.blocks = (gate.args.tokens + gate.rows_per_block - 1) / gate.rows_per_block;
  gate.layout = layout_of(gate.args, true, 2, most_shared_bytes());
  gate.layout.tile = gate.layout.shared_bytes - gate.layout.block_row;
  gate.layout.shared_bytes += tile_bytes(gate.args.experts);
  gate.layout.bfloat16 = gate.args.logits_type == DType::kBFloat16;
  gate.layout.whole_planes = reinterpret_cast<uintptr_t>(gate.args.steering.tables) % 16 == 0;
  gate.layout.whole_slots = gate.args.k == 8 && reinterpret_cast<uintptr_t>(gate.args.ids) % 16 == 0 &&
                            reinterpret_cast<uintptr_t>(gate.args.weights) % 16 == 0;
}

// Every lane of the width has its values.
bool is_whole(int experts) {
  for (int whole : {32, 64, 128, 256, 384, 512}) {
    if (experts == whole) return true;
  }
  return false;
}

}  // namespace

void gate(const GateArgs& asked, Stream stream) {
  if (asked.tokens <= 0) return;
  check(asked);
  if (asked.logits_type == DType::kFloat64)
    throw std::invalid_argument("moe_route gate: float64 logits are computed on the CPU only");
  GateLaunch gate;
  GateArgs& args = gate.args = asked;
  if (args.steering.tables == nullptr) args.steering.planes = 0;
  gate.level = std::max(level_of(args), static_cast<Level>(tuned(Tunable::kGateLevel)));
  const bool registers = in_registers(args, gate.level);
  const int64_t most_blocks = tuned(Tunable::kGateBlocks) * device_attribute(cudaDevAttrMultiProcessorCount);
  gate.rows_per_block = static_cast<int>((args.tokens + most_blocks - 1) / most_blocks);
  gate.layout = layout_of(args, registers, gate.rows_per_block, most_shared_bytes());
  gate.blocks = (args.tokens + gate.rows_per_block - 1) / gate.rows_per_block;
  gate.common = registers && gate.level != Level::kFull && is_whole(args.experts) && is_common(args, gate) &&
                tuned(Tunable::kGateCommon);
  // with fewer rows, too few threads are under way at once
  gate.tiles = takes_tiles(args, gate) && tuned(Tunable::kGateBlockRow) &&
               args.tokens >= tuned(Tunable::kGateTilesFrom);
  if (gate.tiles) lay_tiles(gate);
  (registers ? width_for(args.experts) : kWidth<0>).launch(gate, stream);
}

void load_gate_kernels(int32_t experts) {
  for (Level level : {Level::kPlain, Level::kScored, Level::kSoft, Level::kFull}) {
    if (experts <= register_experts(level)) width_for(experts).load(level);
  }
  kWidth<0>.load(Level::kFull);
}

void load_kernels(int32_t experts) {
  load_gate_kernels(experts);
  load_dispatch_kernels(experts);
  load_permute_kernels();
  load_combine_kernels();
  load_experts_kernels();
  load_expert_activation_kernels();
}

}  // namespace moe_route::cuda
