// The gate: score, steer, select, weigh and count router logits in one pass.
//
// This header is the contract that every backend (csrc/cpu/gate*.cpp, csrc/cuda/gate*.cu) implements and
// every caller (csrc/torch) fills in. It knows nothing of torch: raw pointers, sizes and plain structs that
// host and device share.
//
//   logits [T, E]  ->  weights [T, k], ids [T, k] int32, and int64 tables that are added to in place.
//
// Order of choice: forced-on experts first, then the larger value, then the lower expert index. NaN ranks
// below every number (and below -inf). Where nothing is left to choose a slot stays empty (id -1, weight 0);
// empty slots are the last ones of a row, except that a given choice keeps its own places. Ids of a row are
// unique. The result of a row depends on nothing but that row, whatever the instruction set, thread count or
// batch split.
//
// Values that are not plain numbers, on every backend:
// - NaN logit: ranks last, its score and weight are 0. An all-NaN row chooses 0..k-1 with weights 0.
// - +inf logit: under softmax the +inf share the weight equally and the rest get 0.
// - -inf logit: score exp(-inf) = 0. A row of nothing else chooses 0..k-1 with weights 0.
// - Renormalizing: a sum of 0 leaves the weights 0; infinite weights (identity or sqrt-softplus of +inf)
//   share equally and the rest get 0. NaN weights come from infinite steering entries alone.
// - Unscored: a token whose scores have no finite positive sum, or (identity) a negative one among them, is
//   left out of mass and entropy and counted in kStatUnscored.
// - Underflow: exp below 2^-126 is 0 (math.h).
//
// Softmax + kScoreThenTopK + kSum with eps 0 and no weighing score bias has the bits of kTopKThenScore: the
// sum over all experts cancels, so it is never formed and cannot underflow.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>

namespace moe_route {

inline constexpr int32_t kMaxExperts = 4096;  // E
inline constexpr int32_t kMaxChosen = 64;     // k

enum class DType : int32_t {
  kFloat32 = 0,
  kBFloat16 = 1,
  kFloat16 = 2,
  kFloat64 = 3,
  kInt32 = 4,
  kInt64 = 5
};

// How a model turns router logits into scores over all experts.
enum class Score : int32_t { kSoftmax = 0, kSigmoid = 1, kSqrtSoftplus = 2, kIdentity = 3, kSparseMixer = 4 };
// kScoreThenTopK: select on score(z) + correction bias, the weight is the score of the chosen.
// kTopKThenScore: select on z + correction bias, the weight is score() taken over the chosen logits only.
enum class Order : int32_t { kScoreThenTopK = 0, kTopKThenScore = 1 };
enum class GroupScore : int32_t { kMax = 0, kTopTwoSum = 1 };
// kSum: w / (sum + eps).  kClamp: w / max(sum, eps).  kNorm: w / (sum |w|^p)^(1/p), p = GateSpec::norm_p.
enum class Renormalize : int32_t { kNone = 0, kSum = 1, kClamp = 2, kNorm = 3 };

// How the model routes. Plain data, one per router.
struct GateSpec {
  Score score = Score::kSoftmax;
  Order order = Order::kScoreThenTopK;
  GroupScore group_score = GroupScore::kTopTwoSum;
  Renormalize renormalize = Renormalize::kNone;
  int32_t groups = 1;       // expert groups; E % groups == 0
  int32_t top_groups = 1;   // groups that stay eligible
  float group_fill = 0.0f;  // what an excluded group's selection values become (NaN stays NaN): -inf, or 0 in
                            // some models, then still selectable
  float eps = 0.0f;
  float norm_p = 1.0f;
  float scale = 1.0f;  // routed scaling factor, after renormalization
  // SparseMixer (Phi, evaluation): slot j weighs exp(z - m) / sum exp(z - m) over the experts not chosen
  // before it with (m - z) / max(|z|, m) <= 2 * jitter, where m is the largest of those not chosen before; 0
  // where the chosen itself fails the test (possible only if forced or replayed).
  float jitter = 0.0f;
  // Not 0: every logit z becomes softcap * tanh(z / softcap) as soon as it is read, in float32 (float64 for
  // kFloat64); all that is said of logits is said of these. Infinities become the cap; NaN and -0 stay.
  float softcap = 0.0f;
};

// Steering tables: float32 [rows, planes present, E], planes in the order of their bits. A token picks a row,
// or -1 for none.
//   z' = z * kScale / temperature + kBias + kStd * std(z) + kMagnitude * |z|     (std, |z| of the raw z)
// std is taken over the finite logits of allowed experts, 0 where there are too few of them; however large
// they are, it does not overflow on the way. An entry with its neutral value leaves its logit bit for bit
// alone (0 x infinity never arises), and a row of neutral entries is no steering at all. Then force, then
// score.
enum SteeringPlane : uint32_t {
  kScale = 1u << 0,      // factor on the logit, neutral 1
  kBias = 1u << 1,       // added, neutral 0
  kStd = 1u << 2,        // added times std(z), neutral 0                          [arXiv 2510.04694 eq. 4]
  kMagnitude = 1u << 3,  // added times |z|, neutral 0                             [arXiv 2601.14050]
  // Added to what selection compares (the score, or the logit under kTopKThenScore), neutral 0. Choosing
  // only, or, with kRowScoreBiasWeighs, weighing too. Mass and entropy never see it.
  kScoreBias = 1u << 4,
  // Factor on the weight of the chosen, neutral 1. Before or after renormalization: kRowWeightScaleAfter.
  kWeightScale = 1u << 5,
  kForce = 1u << 6,  // a Force code, neutral 0 (as is anything that is no code)
};
// Codes of the kForce plane. They decide selection by class (on, none, off), never by arithmetic; the number
// says what the *weight* is made of:
// - paper: the logit becomes the row's natural max / min before scoring [arXiv 2510.04694 eq. 5]
// - steermoe: all logits of the row become log-softmax, the forced one its max + 0.01 / min - 0.01
//   [arXiv 2509.09660]
// - natural: the expert's own (steered) logit
// Natural max, min and log-sum-exp are those of the raw logits of allowed experts, NaN left out. Off experts
// are chosen last but still before a slot stays empty. A forbidden expert is never chosen, is not "allowed",
// and has no score.
enum Force : int32_t {
  kForceNone = 0,
  kOnPaper = 1,
  kOnSteerMoE = 2,
  kOnNatural = 3,
  kOffPaper = -1,
  kOffSteerMoE = -2,
  kOffNatural = -3,
  kForbid = -4,
};
// Columns of the per-row parameters, float32 [rows, kRowParams].
enum RowParam : int32_t {
  kRowTemperature = 0,       // neutral 1
  kRowTopK = 1,              // 0 = the model's k, else 1..k: later slots stay empty (id -1)
  kRowStdCorrection = 2,     // 0 population, 1 sample
  kRowScoreBiasWeighs = 3,   // 0 = kScoreBias chooses only, 1 = it also changes the weight
  kRowWeightScaleAfter = 4,  // 0 = kWeightScale before renormalization, 1 = after
  kRowParams = 5,
};
struct GateSteering {
  const float* tables = nullptr;      // [rows, popcount(planes), E]
  const float* row_params = nullptr;  // [rows, kRowParams] or null for neutral
  // [rows, E] or null: expert e -> remap[e] (out of range: dropped) once weights are final. Duplicates merge
  // into the first slot, weights add up, the slots freed are left empty at the end of the row. Not under
  // kReplay.
  const int32_t* remap = nullptr;
  int64_t rows = 0;
  uint32_t planes = 0;
};

// Token table: int32 [T, kTokenColumns]. An index outside its table counts as -1.
enum TokenColumn : int32_t {
  kTokenSteeringRow = 0,  // -1 = leave this token alone
  kTokenGroup = 1,        // row of the group statistics, -1 = not counted
  kTokenSegment = 2,      // row of the segment (sequence) statistics, -1 = not counted
  kTokenValid = 3,        // 0 = padding: ids -1, weights 0, in no statistic; its logits matter to nothing
  kTokenColumns = 4,
};

// A choice that exists already. ids [T, k]; a row that starts with -1 has none, unless `every_row` says that
// such a row was chosen too (a token that was dropped). Ids out of range become -1 with weight 0, in place.
// - kNatural, the model's own: unsteered rows return it unchanged; for steered rows it is the natural choice
//   that kNaturalCounts and flips compare with.
// - kReplay: every row returns these ids; weights are always recomputed from the (steered) scores, and
//   kRowTopK has no say.
// - kBaseline: every row chooses from the logits; the ids are the natural choice that kNaturalCounts and flips
//   compare with, of unsteered rows too (their logits are not the model's own). Weights are not read.
enum class GivenMode : int32_t { kNone = 0, kNatural = 1, kReplay = 2, kBaseline = 3 };
struct GateGiven {
  const void* ids = nullptr;      // kInt32 or kInt64
  const void* weights = nullptr;  // null: recomputed from the logits; else of a floating type
  DType ids_type = DType::kInt32;
  DType weights_type = DType::kFloat32;
  GivenMode mode = GivenMode::kNone;
  bool every_row = false;
};

// Statistics tables: int64, one row per group (or segment): kStatScalars scalars, then one plane of E per bit
// that is set. Fixed point: unit 2^-32, each token's term rounded once (nearest even), so sums do not depend
// on order and merge exactly. A term beyond +-2^19 is clamped to it, NaN adds 0.
enum StatPlane : uint32_t {
  kCounts = 1u << 0,         // times an expert was chosen
  kMass = 1u << 1,           // fixed point: (steered) score over all experts, divided by its sum
  kWeight = 1u << 2,         // fixed point: weight of the chosen, as the model uses it
  kShare = 1u << 3,          // fixed point: weight of the chosen divided by the row's sum of weights
  kNaturalCounts = 1u << 4,  // times an expert would have been chosen unsteered, with the model's k
};
enum StatScalar : int32_t {
  kStatTokens = 0,    // tokens counted
  kStatSlots = 1,     // sum over tokens of k(token)
  kStatEmpty = 2,     // slots that stayed empty: sum of counts + empty = slots
  kStatUnscored = 3,  // tokens left out of mass and entropy
  kStatEntropy = 4,   // fixed point, nats: entropy of the normalized scores
  kStatSteered = 5,   // tokens with a steering row (a neutral one too)
  kStatFlipped = 6,   // chosen slots outside the natural choice (needs kNaturalCounts)
  kStatMoved = 7,     // fixed point: share of the weight on such slots (needs kNaturalCounts)
  kStatScalars = 8,
};
struct GateStatistics {
  int64_t* groups = nullptr;    // [num_groups, kStatScalars + popcount(planes) * E] or null
  int64_t* segments = nullptr;  // [num_segments, same row] or null
  int64_t num_groups = 0;
  int64_t num_segments = 0;
  uint32_t planes = 0;   // the same for both
  bool entropy = false;  // accumulate kStatEntropy (with kMass's normalized scores)
};

struct GateArgs {
  const void* logits = nullptr;         // [T, E], unit stride inside a row
  int64_t row_stride = 0;               // elements
  int64_t tokens = 0;                   // T
  DType logits_type = DType::kFloat32;  // kFloat64 computes in double on CPU (portable only)
  int32_t experts = 0;                  // E, 1..kMaxExperts
  int32_t k = 0;                        // 1..min(E, kMaxChosen)
  GateSpec spec;
  const float* correction_bias = nullptr;  // [E], for choosing only
  const float* expert_scale = nullptr;     // [E], factor on the final weight of the chosen
  GateSteering steering;
  const int32_t* token_table = nullptr;  // [T, kTokenColumns] or null: row -1, group 0, segment -1, valid
  GateGiven given;
  GateStatistics statistics;
  void* weights = nullptr;  // [T, k] float32 (float64 for kFloat64 logits); null: not wanted (counting only)
  int32_t* ids = nullptr;   // [T, k]; null: not wanted (counting only)
};

// Refuses what a kernel would turn into stray reads and writes: std::invalid_argument. Static, since files
// that are compiled for different instruction sets must not share one symbol.
[[maybe_unused]] static inline void check(const GateArgs& args) {
  const auto require = [](bool holds, const char* message) {
    if (!holds) throw std::invalid_argument(std::string("moe_route gate: ") + message);
  };
  const GateSpec& spec = args.spec;
  require(args.experts >= 1 && args.experts <= kMaxExperts, "experts must lie in 1..kMaxExperts");
  require(args.k >= 1 && args.k <= args.experts && args.k <= kMaxChosen,
          "k must lie in 1..min(experts, kMaxChosen)");
  require(spec.groups >= 1 && args.experts % spec.groups == 0, "experts must divide into groups");
  require(spec.top_groups >= 1 && spec.top_groups <= spec.groups, "top_groups must lie in 1..groups");
  require(args.logits != nullptr || args.given.mode == GivenMode::kNatural, "logits are missing");
  require(args.given.mode == GivenMode::kNone || args.given.ids != nullptr, "a given choice needs ids");
}

namespace cpu {

// kNeon is that of aarch64, the others of x86. kAvx512Bf16 is kAvx512 and the dot products of bfloat16 (Zen 4,
// Cooper Lake, Sapphire Rapids).
enum class InstructionSet : int32_t { kPortable = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3, kNeon = 4 };
inline constexpr InstructionSet kInstructionSets[] = {InstructionSet::kPortable, InstructionSet::kAvx2,
                                                      InstructionSet::kAvx512, InstructionSet::kAvx512Bf16,
                                                      InstructionSet::kNeon};
const char* name(InstructionSet);
InstructionSet instruction_set_named(const char*);  // throws std::invalid_argument with the names there are
// Best set this processor and build can run; MOE_ROUTE_ISA in the environment, a name, lowers it.
InstructionSet best_instruction_set();
bool supported(InstructionSet);
// In force now; set_instruction_set throws std::invalid_argument where it is not supported (used by tests).
InstructionSet instruction_set();
void set_instruction_set(InstructionSet);

// Rows [begin, end) on the calling thread, with statistics added to `args.statistics` without
// synchronization. Workers pass tables of their own and add them up: sums are integers, so the result is the
// same bits.
void gate_rows(const GateArgs& args, int64_t begin, int64_t end);

}  // namespace cpu
}  // namespace moe_route
