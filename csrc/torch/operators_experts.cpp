// The operators expert_rows, expert_activation and pack_expert_weight, like operators.cpp.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "arguments.h"
#include "launch.h"
#include "operators.h"
#include "self_check.h"

namespace moe_route {
namespace {

// Checks weights [E, rows, in], which must be packed: as they are, or (true) as a transposed view of [E, in, rows].
bool is_transposed(const char* name, const Tensor& weight, int64_t experts, int64_t in, const Tensor& x,
                   const Place& place) {
  if (weight.dim() != 3 || weight.size(0) != experts || weight.size(2) != in) {
    refuse(name, " has shape ", shape_text(weight), "; it must be [", experts, ", any, ", in,
           "] (experts, out, in)");
  }
  check_place(name, weight, place);
  if (weight.scalar_type() != x.scalar_type())
    refuse(name, " must have the dtype of x; convert one to the other");
  check_storage(name, weight);
  if (weight.is_contiguous()) return false;
  const int64_t out = weight.size(1), inner = weight.size(2);
  const bool turned = (weight.stride(1) == 1 || out == 1) && (weight.stride(2) == out || inner == 1) &&
                      (weight.stride(0) == out * inner || weight.size(0) == 1);
  if (!turned) {
    refuse(name,
           " is neither contiguous nor a transposed view (.transpose(-2, -1)) of a contiguous tensor; "
           "call .contiguous() on it first");
  }
  return true;
}

const void* bias_of(const char* name, const MaybeTensor& bias, const Tensor& weight, const Place& place) {
  if (!bias) return nullptr;
  check_tensor(name, *bias, {weight.size(0), weight.size(1)}, place);
  if (bias->scalar_type() != weight.scalar_type()) refuse(name, " must have the dtype of its weight");
  return bias->const_data_ptr();
}

Activation activation_of(int64_t kind, double alpha, double limit, double shift) {
  if (kind < static_cast<int64_t>(ActivationKind::kSilu) ||
      kind > static_cast<int64_t>(ActivationKind::kReluSquared))
    refuse("activation ", kind, " is not one that moe_route.ops.Activation packs");
  return {static_cast<ActivationKind>(kind), static_cast<float>(alpha), static_cast<float>(limit),
          static_cast<float>(shift)};
}

Pairing pairing_of(int64_t pairing) {
  if (pairing < 0 || pairing > static_cast<int64_t>(Pairing::kAlternating))
    refuse("pairing = ", pairing, " is outside 0..2");
  return static_cast<Pairing>(pairing);
}

DType product_type(const char* name, const Tensor& tensor) {
  const DType type = float_type(name, tensor);
  if (type == DType::kFloat64) refuse(name, " is float64; it must be float32, bfloat16 or float16");
  return type;
}

int64_t experts_of(const Tensor& offsets) {
  const int64_t experts = offsets.dim() == 1 ? offsets.size(0) - 1 : -1;
  if (experts < 1 || experts > kMaxExperts)
    refuse("offsets have shape ", shape_text(offsets), "; they must be [experts + 1]");
  return experts;
}

// What the tables of a dispatch hold costs nothing to read on a CPU, and is refused where it leads nowhere. The kernels
// of a device, the emulated one too, cut it to what was allocated: to read it would be to wait.
#ifdef MOE_ROUTE_EMULATED
bool reads(const Place&) { return false; }
#else
bool reads(const Place& place) { return place.cpu; }
#endif

void check_offsets(const int64_t* offsets, int64_t experts, int64_t rows, const Place& place) {
  for (int64_t e = 0; reads(place) && e <= experts; ++e) {
    if (offsets[e] < (e == 0 ? 0 : offsets[e - 1]) || offsets[e] > rows) {
      refuse("offsets[", e, "] = ", offsets[e], "; offsets must not fall, and lie in 0..", rows,
             " (the rows): take those of moe_route.ops.dispatch");
    }
  }
}

void check_slots(const ExpertProductArgs& args, const Place& place) {
  check_offsets(args.offsets, args.experts, args.capacity, place);
  if (!reads(place)) return;
  for (int64_t e = 0; e < args.experts; ++e) {
    const int64_t range = args.offsets[e + 1] - args.offsets[e];
    if (args.counts[e] < 0 || args.counts[e] > range) {
      refuse("counts[", e, "] = ", args.counts[e], " is outside 0..", range, " (the rows of expert ", e,
             " by offsets): take those of moe_route.ops.dispatch");
    }
  }
  const int64_t slots = args.sources * args.k;
  for (int64_t r = 0; r < args.capacity; ++r) {
    if (args.order[r] < -1 || args.order[r] >= slots) {
      refuse("order[", r, "] = ", args.order[r], " is outside -1..", slots - 1,
             " (tokens of x times k = ", args.k, "): take that of moe_route.ops.dispatch");
    }
  }
}

ExpertPanels panels_of(const ExpertProductArgs& args) {
  return {args.type, args.in, args.out_columns, args.pairing};
}

// Sets the panels of a weight of which the other arguments are set.
void set_panels(ExpertProductArgs& args, const char* name, const MaybeTensor& panels, const Place& place) {
  if (!panels) return;
  if (!place.cpu) refuse(name, " are packed for a CPU, and x is on ", place.name(), "; leave them out");
  const ExpertPanels of = panels_of(args);
  check_tensor(name, *panels, {args.experts, of.panels, of.words, kPanelColumns}, place);
  check_dtype(name, *panels, ScalarType::Int, "int32");
  args.panels = static_cast<const uint32_t*>(panels->const_data_ptr());
}

Tensor pack_expert_weight(const Tensor& weight, int64_t pairing) {
  if (weight.dim() != 3) refuse("weight has shape ", shape_text(weight), "; it must be [experts, out, in]");
  const Place place = place_of("weight", weight);
  ExpertProductArgs args;
  args.type = product_type("weight", weight);
  args.transposed = is_transposed("weight", weight, weight.size(0), weight.size(2), weight, place);
  args.pairing = pairing_of(pairing);
  const int64_t factor = args.pairing == Pairing::kNone ? 1 : 2;
  if (weight.size(1) % factor != 0)
    refuse("weight has ", weight.size(1), " rows, an odd number; a gate and its columns take two each");
  if (weight.size(0) > kMaxExperts)
    refuse("weight has ", weight.size(0), " experts; up to ", kMaxExperts, " are supported");
  args.in = weight.size(2);
  args.out_columns = weight.size(1) / factor;
  const ExpertPanels of = panels_of(args);
  Tensor panels =
      allocate({weight.size(0), of.panels, of.words, kPanelColumns}, aoti_torch_dtype_int32(), place);
  ExpertPackArgs pack{weight.const_data_ptr(), static_cast<uint32_t*>(panels.mutable_data_ptr())};
  pack.type = args.type;
  pack.transposed = args.transposed;
  pack.pairing = args.pairing;
  pack.experts = static_cast<int32_t>(weight.size(0));
  pack.in = args.in;
  pack.out_columns = args.out_columns;
  launch::pack_expert_weight(pack);
  return panels;
}

Tensor expert_rows(const Tensor& x, const Tensor& offsets, const Tensor& counts, const Tensor& order,
                   int64_t k, const Tensor& up, const Tensor& down, const MaybeTensor& up_bias,
                   const MaybeTensor& down_bias, int64_t activation, int64_t pairing, double alpha,
                   double limit, double shift, const MaybeTensor& up_panels, const MaybeTensor& down_panels) {
  if (x.dim() != 2) refuse("x has shape ", shape_text(x), "; it must be [tokens, hidden]");
  const Place place = place_of("x", x);
  const int64_t experts = experts_of(offsets);
  const int64_t hidden = x.size(1);
  ExpertProductArgs args;
  args.type = product_type("x", x);
  if (k < 1) refuse("k = ", k, " is below 1");
  if (k > kMaxRows) refuse("k = ", k, " is above ", kMaxRows);
  const auto table = [&](const char* name, const Tensor& tensor, int64_t size) {
    check_tensor(name, tensor, {size}, place);
    check_dtype(name, tensor, ScalarType::Long, "int64");
    return tensor.const_data_ptr<int64_t>();
  };
  const Tensor source = packed("x", x);
  args.x = source.const_data_ptr();
  args.offsets = table("offsets", offsets, experts + 1);
  args.counts = table("counts", counts, experts);
  args.order = table("order", order, -1);
  args.capacity = order.size(0);
  args.experts = static_cast<int32_t>(experts);
  args.sources = x.size(0);
  args.k = k;
  check_slots(args, place);
  // up, with gate and activation
  args.transposed = is_transposed("up", up, experts, hidden, x, place);
  args.pairing = pairing_of(pairing);
  const int64_t factor = args.pairing == Pairing::kNone ? 1 : 2;
  if (up.size(1) % factor != 0)
    refuse("up has ", up.size(1), " rows, an odd number; a gate and its columns take two each");
  args.weight = up.const_data_ptr();
  args.bias = bias_of("up_bias", up_bias, up, place);
  args.activation = activation_of(activation, alpha, limit, shift);
  args.in = hidden;
  args.out_columns = up.size(1) / factor;
  set_panels(args, "up_panels", up_panels, place);
  Tensor inner = allocate({args.capacity, args.out_columns}, dtype_of(x), place);
  args.out = inner.mutable_data_ptr();
  // down
  ExpertProductArgs then = args;
  then.transposed = is_transposed("down", down, experts, args.out_columns, x, place);
  then.pairing = Pairing::kNone;
  then.panels = nullptr;
  then.weight = down.const_data_ptr();
  then.bias = bias_of("down_bias", down_bias, down, place);
  then.activation = {};
  then.x = args.out;
  then.order = nullptr;
  then.sources = args.capacity;
  then.in = args.out_columns;
  then.out_columns = down.size(1);
  set_panels(then, "down_panels", down_panels, place);
  Tensor rows = allocate({args.capacity, then.out_columns}, dtype_of(x), place);
  then.out = rows.mutable_data_ptr();
  const ExpertProductArgs both[] = {args, then};
  launch::expert_products(both, 2, place);
  return rows;
}

Tensor expert_activation(const Tensor& rows, const Tensor& offsets, const MaybeTensor& bias,
                         int64_t activation, int64_t pairing, double alpha, double limit, double shift) {
  if (rows.dim() != 2)
    refuse("rows have shape ", shape_text(rows), "; they must be [dispatched rows, columns]");
  const Place place = place_of("rows", rows);
  ExpertActivationArgs args;
  args.type = product_type("rows", rows);
  args.pairing = pairing_of(pairing);
  args.activation = activation_of(activation, alpha, limit, shift);
  const int64_t experts = experts_of(offsets), factor = args.pairing == Pairing::kNone ? 1 : 2;
  check_tensor("offsets", offsets, {experts + 1}, place);
  check_dtype("offsets", offsets, ScalarType::Long, "int64");
  if (rows.size(1) % factor != 0)
    refuse("rows have ", rows.size(1), " columns, an odd number; a gate and its columns take two each");
  const Tensor source = packed("rows", rows);
  args.rows = source.const_data_ptr();
  args.offsets = offsets.const_data_ptr<int64_t>();
  if (bias) {
    check_tensor("bias", *bias, {experts, rows.size(1)}, place);
    if (bias->scalar_type() != rows.scalar_type()) refuse("bias must have the dtype of rows");
    args.bias = bias->const_data_ptr();
  }
  args.experts = static_cast<int32_t>(experts);
  args.capacity = rows.size(0);
  check_offsets(args.offsets, experts, args.capacity, place);
  args.columns = rows.size(1) / factor;
  Tensor out = allocate({args.capacity, args.columns}, dtype_of(rows), place);
  args.out = out.mutable_data_ptr();
  launch::expert_activation(args, place);
  return out;
}

[[maybe_unused]] void implement_on_cpu(StableLibrary& m) {
  m.impl("expert_rows", TORCH_BOX(&expert_rows));
  m.impl("expert_activation", TORCH_BOX(&expert_activation));
  m.impl("pack_expert_weight", TORCH_BOX(&pack_expert_weight));
}

}  // namespace

void implement_experts_on_device(StableLibrary& m) {
  m.impl("expert_rows", MOE_ROUTE_ON_DEVICE(expert_rows, kExpertRows));
  m.impl("expert_activation", MOE_ROUTE_ON_DEVICE(expert_activation, kExpertActivation));
}

}  // namespace moe_route

#ifdef MOE_ROUTE_EMULATED
STABLE_TORCH_LIBRARY_IMPL(moe_route_emulated, CPU, m) { moe_route::implement_experts_on_device(m); }
#else
STABLE_TORCH_LIBRARY_IMPL(moe_route, CPU, m) { moe_route::implement_on_cpu(m); }
#endif
