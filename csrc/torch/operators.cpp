// The operators of namespace moe_route on torch's stable ABI: the checks of every argument, outputs.
// A bad argument is a ValueError (std::invalid_argument) that names the argument and the mend.
#include "operators.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <bit>
#include <tuple>
#include <vector>

#include "arguments.h"
#include "launch.h"
#include "self_check.h"

namespace moe_route {
namespace {

// Of the argument `statistics`: whether entropy is accumulated. The planes have the bits below it
// (moe_route/contract/tables.py packs both).
constexpr int kEntropyBit = 16;

// ---- the gate -------------------------------------------------------------------------------------------

// `policy` packs the discrete part of a RouterSpec (moe_route/contract/spec.py packs it):
//   bits 0-3 score, 4 order, 5 group_score, 6-8 renormalize, 16-31 groups, 32-47 top_groups
GateSpec unpack_spec(int64_t policy, int64_t experts, double group_fill, double eps, double norm_p,
                     double scale, double jitter, double softcap) {
  GateSpec spec;
  const auto bits = static_cast<uint64_t>(policy);
  const uint64_t score = bits & 15, renormalize = bits >> 6 & 7;
  if (score > static_cast<uint64_t>(Score::kSparseMixer) ||
      renormalize > static_cast<uint64_t>(Renormalize::kNorm)) {
    refuse("policy ", policy, " is not one that RouterSpec packs");
  }
  spec.score = static_cast<Score>(score);
  spec.order = static_cast<Order>(bits >> 4 & 1);
  spec.group_score = static_cast<GroupScore>(bits >> 5 & 1);
  spec.renormalize = static_cast<Renormalize>(renormalize);
  spec.groups = static_cast<int32_t>(bits >> 16 & 0xffff);
  spec.top_groups = static_cast<int32_t>(bits >> 32 & 0xffff);
  if (spec.groups < 1 || experts % spec.groups != 0) {
    refuse("spec.groups = ", spec.groups, " does not divide the ", experts, " experts");
  }
  if (spec.top_groups < 1 || spec.top_groups > spec.groups) {
    refuse("spec.top_groups = ", spec.top_groups, " is outside 1..", spec.groups, " (spec.groups)");
  }
  spec.group_fill = static_cast<float>(group_fill);
  spec.eps = static_cast<float>(eps);
  spec.norm_p = static_cast<float>(norm_p);
  spec.scale = static_cast<float>(scale);
  spec.jitter = static_cast<float>(jitter);
  spec.softcap = static_cast<float>(softcap);
  return spec;
}

// The part that every gate operator shares. Returns the tensor that owns the logits that `args` points to.
Tensor fill_logits(GateArgs& args, const Tensor& logits, int64_t k, const MaybeTensor& tokens,
                   const Place& place) {
  if (logits.dim() != 2) {
    refuse("logits have shape ", shape_text(logits),
           "; they must be [tokens, experts] (reshape(-1, experts) first)");
  }
  args.logits_type = float_type("logits", logits);
  args.tokens = logits.size(0);
  const int64_t experts = logits.size(1);
  if (experts < 1 || experts > kMaxExperts)
    refuse("logits have ", experts, " experts; 1..", kMaxExperts, " are supported");
  const int64_t most = std::min<int64_t>(experts, kMaxChosen);
  if (k < 1 || k > most) {
    refuse("k = ", k, " is outside 1..", most, " (at most the ", experts, " experts, at most ", kMaxChosen,
           ")");
  }
  args.experts = static_cast<int32_t>(experts);
  args.k = static_cast<int32_t>(k);
  args.token_table = int_table("tokens", tokens, {args.tokens, kTokenColumns}, place);
  check_storage("logits", logits);
  Tensor rows = logits.stride(1) == 1 || experts == 1 ? logits : torch::stable::contiguous(logits);
  args.logits = rows.const_data_ptr();
  args.row_stride = args.tokens > 1 ? rows.stride(0) : experts;
  return rows;
}

GateSteering steering_of(const MaybeTensor& tables, int64_t planes, const MaybeTensor& row_params,
                         const MaybeTensor& remap, int64_t experts, const Place& place) {
  GateSteering steering;
  if (planes < 0 || planes >= int64_t{kForce} * 2)
    refuse("steering_planes = ", planes, " has bits of no plane");
  if (tables.has_value() != (planes != 0)) refuse("steering tables and steering_planes must come together");
  for (const MaybeTensor* part : {&tables, &row_params, &remap}) {
    if (part->has_value() && steering.rows == 0 && (*part)->dim() > 0) steering.rows = (*part)->size(0);
  }
  steering.planes = static_cast<uint32_t>(planes);
  steering.tables =
      float_table("steering", tables, {steering.rows, std::popcount(steering.planes), experts}, place);
  steering.row_params = float_table("row_params", row_params, {steering.rows, kRowParams}, place);
  steering.remap = int_table("remap", remap, {steering.rows, experts}, place);
  return steering;
}

int64_t* statistics_table(const char* name, const MaybeTensor& table, int64_t width, const Place& place) {
  if (!table) return nullptr;
  check_tensor(name, *table, {-1, width}, place);
  check_dtype(name, *table, ScalarType::Long, "int64");
  return static_cast<int64_t*>(table->mutable_data_ptr());
}

// `layout` is the planes' bits and kEntropyBit.
GateStatistics statistics_of(const MaybeTensor& groups, const MaybeTensor& segments, int64_t layout,
                             const Tensor& logits, const Place& place) {
  const int64_t experts = logits.size(1);
  GateStatistics statistics;
  const int64_t planes = layout & ((1 << kEntropyBit) - 1);
  if (layout < 0 || layout >= 2 << kEntropyBit || planes >= int64_t{kNaturalCounts} * 2) {
    refuse("statistics = ", layout, " has bits of no plane");
  }
  statistics.planes = static_cast<uint32_t>(planes);
  statistics.entropy = (layout >> kEntropyBit) != 0;
  const int64_t width = kStatScalars + int64_t{std::popcount(statistics.planes)} * experts;
  statistics.groups = statistics_table("group_statistics", groups, width, place);
  statistics.segments = statistics_table("segment_statistics", segments, width, place);
  check_apart("segment_statistics", segments, "group_statistics", groups);
  check_apart("group_statistics", groups, "logits", logits);
  check_apart("segment_statistics", segments, "logits", logits);
  if (groups) statistics.num_groups = groups->size(0);
  if (segments) statistics.num_segments = segments->size(0);
  return statistics;
}

// Tensors that `given` points into, alive for the call.
struct GivenTensors {
  MaybeTensor ids, weights;
};

GateGiven given_of(GivenTensors& keep, const MaybeTensor& ids, const MaybeTensor& weights, int64_t mode,
                   int64_t tokens, int64_t k, const Place& place) {
  GateGiven given;
  if (mode < 0 || mode > static_cast<int64_t>(GivenMode::kBaseline))
    refuse("choice_mode = ", mode, " is outside 0..3");
  if (ids.has_value() != (mode != 0)) refuse("choice and choice_mode must come together");
  if (!ids) {
    if (weights) refuse("choice weights need choice");
    return given;
  }
  given.mode = static_cast<GivenMode>(mode);
  keep.ids = packed("choice ids", *ids);
  check_tensor("choice ids", *keep.ids, {tokens, k}, place);
  given.ids_type = index_type("choice ids", *keep.ids);
  given.ids = keep.ids->const_data_ptr();
  if (!weights) return given;
  keep.weights = packed("choice weights", *weights);
  check_tensor("choice weights", *keep.weights, {tokens, k}, place);
  given.weights_type = float_type("choice weights", *keep.weights);
  given.weights = keep.weights->const_data_ptr();
  return given;
}

Tensor allocate_weights(const GateArgs& args, const Place& place) {
  const bool wide = args.logits_type == DType::kFloat64;
  return allocate({args.tokens, args.k}, wide ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32(),
                  place);
}

std::tuple<Tensor, Tensor> route(const Tensor& logits, int64_t k, int64_t policy, const MaybeTensor& tokens,
                                 const MaybeTensor& group_statistics, int64_t statistics,
                                 const MaybeTensor& segment_statistics, double group_fill, double eps,
                                 double norm_p, double scale, double jitter, double softcap,
                                 const MaybeTensor& correction_bias, const MaybeTensor& expert_scale,
                                 const MaybeTensor& steering, int64_t steering_planes,
                                 const MaybeTensor& row_params, const MaybeTensor& remap,
                                 const MaybeTensor& choice_ids, const MaybeTensor& choice_weights,
                                 int64_t choice_mode) {
  GateArgs args;
  GivenTensors given;
  const Place place = place_of("logits", logits);
  const Tensor rows = fill_logits(args, logits, k, tokens, place);
  const int64_t experts = args.experts;
  args.spec = unpack_spec(policy, experts, group_fill, eps, norm_p, scale, jitter, softcap);
  args.correction_bias = float_table("correction_bias", correction_bias, {experts}, place);
  args.expert_scale = float_table("expert_scale", expert_scale, {experts}, place);
  args.steering = steering_of(steering, steering_planes, row_params, remap, experts, place);
  args.given = given_of(given, choice_ids, choice_weights, choice_mode, args.tokens, k, place);
  args.statistics = statistics_of(group_statistics, segment_statistics, statistics, logits, place);
  Tensor weights = allocate_weights(args, place);
  Tensor ids = allocate({args.tokens, k}, aoti_torch_dtype_int32(), place);
  args.weights = weights.mutable_data_ptr();
  args.ids = static_cast<int32_t*>(ids.mutable_data_ptr());
  launch::gate(args, place);
  return {std::move(weights), std::move(ids)};
}

void observe(const Tensor& logits, const Tensor& ids, const MaybeTensor& weights, int64_t policy,
             const MaybeTensor& tokens, const MaybeTensor& group_statistics, int64_t statistics,
             const MaybeTensor& segment_statistics, double group_fill, double eps, double norm_p,
             double scale, double jitter, double softcap, const MaybeTensor& expert_scale) {
  GateArgs args;
  GivenTensors given;
  if (ids.dim() != 2) refuse("ids have shape ", shape_text(ids), "; they must be [tokens, k]");
  const int64_t k = ids.size(1);
  const Place place = place_of("logits", logits);
  const Tensor rows = fill_logits(args, logits, k, tokens, place);
  args.spec = unpack_spec(policy, args.experts, group_fill, eps, norm_p, scale, jitter, softcap);
  args.expert_scale = float_table("expert_scale", expert_scale, {args.experts}, place);
  args.given =
      given_of(given, ids, weights, static_cast<int64_t>(GivenMode::kNatural), args.tokens, k, place);
  args.given.every_row = true;
  args.statistics = statistics_of(group_statistics, segment_statistics, statistics, logits, place);
  launch::gate(args, place);
}

// One call for all layers of a decode step, where every call of an operator meets cold caches.
void observe_layers(const std::vector<Tensor>& logits, const std::vector<Tensor>& ids,
                    const std::vector<Tensor>& weights, int64_t policy, const MaybeTensor& tokens,
                    const std::vector<Tensor>& group_statistics, int64_t statistics,
                    const std::vector<Tensor>& segment_statistics, double group_fill, double eps,
                    double norm_p, double scale, double jitter, double softcap) {
  const size_t layers = logits.size();
  for (const auto* list : {&ids, &weights, &group_statistics, &segment_statistics}) {
    const bool absent = list == &segment_statistics && list->empty();
    if (!absent && list->size() != layers)
      refuse(layers, " layers of logits, but a list of ", list->size(), "; every list needs one per layer");
  }
  for (size_t layer = 0; layer < layers; ++layer) {
    const MaybeTensor segments = segment_statistics.empty() ? MaybeTensor{} : segment_statistics[layer];
    observe(logits[layer], ids[layer], weights[layer], policy, tokens, group_statistics[layer], statistics,
            segments, group_fill, eps, norm_p, scale, jitter, softcap, std::nullopt);
  }
}

Tensor route_weights(const Tensor& logits, const Tensor& ids, int64_t policy, const MaybeTensor& tokens,
                     double group_fill, double eps, double norm_p, double scale, double jitter,
                     double softcap, const MaybeTensor& expert_scale, const MaybeTensor& steering,
                     int64_t steering_planes, const MaybeTensor& row_params) {
  GateArgs args;
  GivenTensors given;
  if (ids.dim() != 2) refuse("ids have shape ", shape_text(ids), "; they must be [tokens, k]");
  const int64_t k = ids.size(1);
  const Place place = place_of("logits", logits);
  const Tensor rows = fill_logits(args, logits, k, tokens, place);
  args.spec = unpack_spec(policy, args.experts, group_fill, eps, norm_p, scale, jitter, softcap);
  args.expert_scale = float_table("expert_scale", expert_scale, {args.experts}, place);
  args.steering = steering_of(steering, steering_planes, row_params, std::nullopt, args.experts, place);
  args.given =
      given_of(given, ids, std::nullopt, static_cast<int64_t>(GivenMode::kReplay), args.tokens, k, place);
  args.given.every_row = true;
  Tensor weights = allocate_weights(args, place);
  Tensor unused = allocate({args.tokens, k}, aoti_torch_dtype_int32(), place);
  args.weights = weights.mutable_data_ptr();
  args.ids = static_cast<int32_t*>(unused.mutable_data_ptr());
  launch::gate(args, place);
  return weights;
}

// ---- dispatch, permute, combine -------------------------------------------------------------------------

// torch's allocator hands freed memory out again in the order of the stream: it may go when the call returns.
MaybeTensor dispatch_workspace(const DispatchArgs& args, const Place& place) {
  const int64_t bytes = launch::dispatch_workspace_bytes(args, place);
  if (bytes == 0) return std::nullopt;
  return allocate({bytes}, aoti_torch_dtype_uint8(), place);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> dispatch(const Tensor& ids, int64_t num_experts,
                                                            int64_t block) {
  if (ids.dim() != 2) refuse("ids have shape ", shape_text(ids), "; they must be [tokens, k]");
  const Place place = place_of("ids", ids);
  if (num_experts < 1 || num_experts > kMaxExperts)
    refuse("num_experts = ", num_experts, " is outside 1..", kMaxExperts);
  if (block < 1 || block > 65536) refuse("block = ", block, " is outside 1..65536");
  DispatchArgs args;
  args.slots = ids.size(0) * ids.size(1);
  args.experts = static_cast<int32_t>(num_experts);
  args.block = static_cast<int32_t>(block);
  args.capacity = dispatch_capacity(args.slots, num_experts, block);
  if (args.capacity > kMaxRows) {
    refuse(args.slots, " slots of ", num_experts, " experts take up to ", args.capacity,
           " rows (block = ", block, "), more than the ", kMaxRows,
           " that are supported; dispatch the tokens in parts");
  }
  const Tensor source = packed("ids", ids);
  args.ids_type = index_type("ids", ids);
  args.ids = source.const_data_ptr();
  const int32_t dtype = aoti_torch_dtype_int64();
  Tensor offsets = allocate({num_experts + 1}, dtype, place);
  Tensor ends = allocate({num_experts}, aoti_torch_dtype_int32(), place);
  Tensor counts = allocate({num_experts}, dtype, place);
  Tensor order = allocate({args.capacity}, dtype, place);
  Tensor inverse = allocate({ids.size(0), ids.size(1)}, dtype, place);
  args.offsets = static_cast<int64_t*>(offsets.mutable_data_ptr());
  args.ends = static_cast<int32_t*>(ends.mutable_data_ptr());
  args.counts = static_cast<int64_t*>(counts.mutable_data_ptr());
  args.order = static_cast<int64_t*>(order.mutable_data_ptr());
  args.inverse = static_cast<int64_t*>(inverse.mutable_data_ptr());
  const MaybeTensor workspace = dispatch_workspace(args, place);
  if (workspace) args.workspace = workspace->mutable_data_ptr();
  launch::dispatch(args, place);
  return {std::move(offsets), std::move(ends), std::move(counts), std::move(order), std::move(inverse)};
}

Tensor permute(const Tensor& x, const Tensor& order, const Tensor& inverse) {
  if (x.dim() != 2) refuse("x has shape ", shape_text(x), "; it must be [tokens, hidden]");
  const Place place = place_of("x", x);
  check_tensor("inverse", inverse, {x.size(0), -1}, place);
  check_dtype("inverse", inverse, ScalarType::Long, "int64");
  check_tensor("order", order, {-1}, place);
  check_dtype("order", order, ScalarType::Long, "int64");
  const Tensor source = packed("x", x);
  Tensor rows = allocate({order.size(0), x.size(1)}, dtype_of(x), place);
  PermuteArgs args;
  args.x = source.const_data_ptr();
  args.inverse = inverse.const_data_ptr<int64_t>();
  args.order = order.const_data_ptr<int64_t>();
  args.rows = rows.mutable_data_ptr();
  args.tokens = x.size(0);
  args.k = inverse.size(1);
  args.row_bytes = x.size(1) * element_size(float_type("x", x));
  args.capacity = order.size(0);
  launch::permute(args, place);
  return rows;
}

Tensor combine(const Tensor& rows, const Tensor& weights, const Tensor& order, const Tensor& inverse,
               const MaybeTensor& residual) {
  if (rows.dim() != 2)
    refuse("rows have shape ", shape_text(rows), "; they must be [dispatched rows, hidden]");
  const Place place = place_of("rows", rows);
  check_tensor("inverse", inverse, {-1, -1}, place);
  check_dtype("inverse", inverse, ScalarType::Long, "int64");
  check_tensor("order", order, {rows.size(0)}, place);
  check_dtype("order", order, ScalarType::Long, "int64");
  const int64_t tokens = inverse.size(0), k = inverse.size(1), hidden = rows.size(1);
  const Tensor source = packed("rows", rows), factors = packed("weights", weights);
  CombineArgs args;
  args.type = float_type("rows", rows);
  const bool wide = args.type == DType::kFloat64;
  check_tensor("weights", factors, {tokens, k}, place);
  check_dtype("weights", factors, wide ? ScalarType::Double : ScalarType::Float,
              wide ? "float64" : "float32");
  MaybeTensor added;
  if (residual) {
    added = packed("residual", *residual);
    check_tensor("residual", *added, {tokens, hidden}, place);
    if (added->scalar_type() != rows.scalar_type()) refuse("residual must have the dtype of rows");
    args.residual = added->const_data_ptr();
  }
  Tensor out = allocate({tokens, hidden}, dtype_of(rows), place);
  args.rows = source.const_data_ptr();
  args.weights = factors.const_data_ptr();
  args.inverse = inverse.const_data_ptr<int64_t>();
  args.out = out.mutable_data_ptr();
  args.tokens = tokens;
  args.k = k;
  args.hidden = hidden;
  args.capacity = rows.size(0);
  launch::combine(args, place);
  return out;
}

// On torch's CPU: the kernels, always.
[[maybe_unused]] void implement_on_cpu(StableLibrary& m) {
  m.impl("route", TORCH_BOX(&route));
  m.impl("observe_layers", TORCH_BOX(&observe_layers));
  m.impl("observe", TORCH_BOX(&observe));
  m.impl("route_weights", TORCH_BOX(&route_weights));
  m.impl("dispatch", TORCH_BOX(&dispatch));
  m.impl("permute", TORCH_BOX(&permute));
  m.impl("combine", TORCH_BOX(&combine));
}

}  // namespace

void implement_on_device(StableLibrary& m) {
  m.impl("route", MOE_ROUTE_ON_DEVICE(route, kGate));
  m.impl("observe_layers", MOE_ROUTE_ON_DEVICE_BY(is_list_for_torch, observe_layers, kGate));
  m.impl("observe", MOE_ROUTE_ON_DEVICE(observe, kGate));
  m.impl("route_weights", MOE_ROUTE_ON_DEVICE(route_weights, kGate));
  m.impl("dispatch", MOE_ROUTE_ON_DEVICE(dispatch, kDispatch));
  m.impl("permute", MOE_ROUTE_ON_DEVICE(permute, kPermute));
  m.impl("combine", MOE_ROUTE_ON_DEVICE(combine, kCombine));
}

}  // namespace moe_route

// The schemas are defined in Python (moe_route/ops/schemas.py): torch's own backend needs them without this library.
// The tests build these operators a second time, over the emulated CUDA kernels and for CPU tensors.
#ifdef MOE_ROUTE_EMULATED
STABLE_TORCH_LIBRARY_IMPL(moe_route_emulated, CPU, m) { moe_route::implement_on_device(m); }
#else
STABLE_TORCH_LIBRARY_IMPL(moe_route, CPU, m) { moe_route::implement_on_cpu(m); }
#endif
