// One call of the gate, for counting its instructions: gate_cost EXPERTS K TOKENS DTYPE WORK, with WORK one of route,
// counts, statistics, steering and biased (counts under a sigmoid with a correction bias). tests/gate_cost.py runs it under valgrind and holds the ceilings.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "gate_problem.h"

using namespace moe_route;

int main(int argc, char** argv) {
  if (argc != 6) return std::fputs("gate_cost EXPERTS K TOKENS DTYPE WORK\n", stderr), 2;
  GateArgs args;
  args.experts = std::atoi(argv[1]), args.k = std::atoi(argv[2]), args.tokens = std::atoi(argv[3]);
  const std::string dtype = argv[4], work = argv[5];
  args.logits_type = dtype == "bfloat16" ? DType::kBFloat16 : DType::kFloat32;
  args.row_stride = args.experts;
  args.spec.renormalize = Renormalize::kSum;

  test::Random random(1);
  std::vector<float> logits(size_t(args.tokens) * size_t(args.experts));
  for (float& x : logits) x = random.bell();
  std::vector<uint16_t> halves;
  for (float x : logits) halves.push_back(test::to_half(x, DType::kBFloat16));
  args.logits =
      args.logits_type == DType::kBFloat16 ? static_cast<const void*>(halves.data()) : logits.data();
  std::vector<float> weights(size_t(args.tokens) * size_t(args.k)), std(size_t(args.experts));
  std::vector<int32_t> ids(weights.size()), tokens;
  args.weights = weights.data(), args.ids = ids.data();

  std::vector<int64_t> table(kStatScalars + 3 * size_t(args.experts));
  if (work != "route") args.statistics.groups = table.data(), args.statistics.num_groups = 1;
  args.statistics.planes = work == "statistics" ? kCounts | kMass | kWeight : kCounts;
  args.statistics.entropy = work == "statistics";
  if (work == "steering") {
    for (int e = 0; e < std::min(4, args.experts); ++e) std[size_t(e)] = 0.5f;
    args.steering.tables = std.data(), args.steering.rows = 1, args.steering.planes = kStd;
    for (int64_t t = 0; t < args.tokens; ++t) tokens.insert(tokens.end(), {0, 0, -1, 1});
    args.token_table = tokens.data();
  }
  std::vector<float> correction;
  for (int e = 0; e < args.experts; ++e) correction.push_back(0.1f * random.bell());
  if (work == "biased") args.spec.score = Score::kSigmoid, args.correction_bias = correction.data();
  cpu::instruction_set();  // looks into the environment once
  cpu::gate_rows(args, 0, args.tokens);
  return 0;
}
