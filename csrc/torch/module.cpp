// The module moe_route._C: what was built, the instruction set in force, and every kernel launcher over bare
// addresses and sizes, so that benchmarks time a kernel without torch's dispatcher. CPU launchers return when
// the work is done; those named *_cuda enqueue it on a stream of the current device.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>
#include <string>
#include <type_traits>
#include <vector>

#include "cpu_threads.h"
#include "cuda/device.h"
#include "launch.h"
#include "moe_route/cuda.h"
#include "operators.h"
#include "self_check.h"

namespace py = pybind11;

namespace moe_route {
namespace {

std::vector<std::string> words(const std::string& text) {
  std::vector<std::string> list;
  std::istringstream stream(text);
  for (std::string word; std::getline(stream, word, ',');) list.push_back(word);
  return list;
}

py::dict build_info() {
  py::dict info;
  info["version"] = MOE_ROUTE_VERSION;
  info["compiler"] = MOE_ROUTE_COMPILER;
  info["torch"] = MOE_ROUTE_TORCH_VERSION;
  info["instruction_sets"] = words(MOE_ROUTE_INSTRUCTION_SETS);
  info["cuda"] = bool(MOE_ROUTE_WITH_CUDA);
  info["cuda_architectures"] = words(MOE_ROUTE_CUDA_ARCHITECTURES);
  info["nvcc"] = MOE_ROUTE_NVCC;
  return info;
}

py::dict cuda_runtime() {
  const cuda::RuntimeFacts facts = cuda::runtime_facts();
  py::list devices;
  for (const cuda::DeviceFacts& device : facts.devices) {
    py::dict entry;
    entry["name"] = device.name;
    entry["capability"] = py::make_tuple(device.major, device.minor);
    devices.append(entry);
  }
  py::dict found;
  found["runtime"] = facts.runtime;
  found["driver"] = facts.driver;
  found["devices"] = devices;
  found["problem"] = facts.problem;
  return found;
}

py::dict tunables() {
  py::dict table;
  for (const cuda::TunableFacts& tunable : cuda::tunables()) {
    py::dict entry;
    entry["meaning"] = tunable.meaning;
    entry["usual"] = tunable.usual;
    entry["least"] = tunable.least;
    entry["most"] = tunable.most;
    entry["now"] = tunable.now;
    table[py::str(tunable.name)] = entry;
  }
  return table;
}

std::vector<std::string> supported_instruction_sets() {
  std::vector<std::string> list;
  for (auto set : cpu::kInstructionSets) {
    if (cpu::supported(set)) list.emplace_back(cpu::name(set));
  }
  return list;
}

// Addresses come from Tensor.data_ptr(); 0 is "none".
template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

using Value = const py::handle&;

// An address into a pointer, a number into an enum or a number.
template <class T>
void set(T& field, Value value) {
  if constexpr (std::is_pointer_v<T>) {
    field = reinterpret_cast<T>(value.cast<uintptr_t>());
  } else if constexpr (std::is_enum_v<T>) {
    field = static_cast<T>(value.cast<int64_t>());
  } else {
    field = value.cast<T>();
  }
}

// Keyword arguments of GateArgs.
struct Field {
  const char* name;
  void (*set)(GateArgs&, Value);
};
constexpr Field kFields[] = {
    {"row_stride", [](GateArgs& a, Value v) { set(a.row_stride, v); }},
    {"score", [](GateArgs& a, Value v) { set(a.spec.score, v); }},
    {"order", [](GateArgs& a, Value v) { set(a.spec.order, v); }},
    {"group_score", [](GateArgs& a, Value v) { set(a.spec.group_score, v); }},
    {"renormalize", [](GateArgs& a, Value v) { set(a.spec.renormalize, v); }},
    {"groups", [](GateArgs& a, Value v) { set(a.spec.groups, v); }},
    {"top_groups", [](GateArgs& a, Value v) { set(a.spec.top_groups, v); }},
    {"group_fill", [](GateArgs& a, Value v) { set(a.spec.group_fill, v); }},
    {"eps", [](GateArgs& a, Value v) { set(a.spec.eps, v); }},
    {"norm_p", [](GateArgs& a, Value v) { set(a.spec.norm_p, v); }},
    {"scale", [](GateArgs& a, Value v) { set(a.spec.scale, v); }},
    {"jitter", [](GateArgs& a, Value v) { set(a.spec.jitter, v); }},
    {"softcap", [](GateArgs& a, Value v) { set(a.spec.softcap, v); }},
    {"correction_bias", [](GateArgs& a, Value v) { set(a.correction_bias, v); }},
    {"expert_scale", [](GateArgs& a, Value v) { set(a.expert_scale, v); }},
    {"steering", [](GateArgs& a, Value v) { set(a.steering.tables, v); }},
    {"steering_planes", [](GateArgs& a, Value v) { set(a.steering.planes, v); }},
    {"steering_rows", [](GateArgs& a, Value v) { set(a.steering.rows, v); }},
    {"row_params", [](GateArgs& a, Value v) { set(a.steering.row_params, v); }},
    {"remap", [](GateArgs& a, Value v) { set(a.steering.remap, v); }},
    {"token_table", [](GateArgs& a, Value v) { set(a.token_table, v); }},
    {"choice_ids", [](GateArgs& a, Value v) { set(a.given.ids, v); }},
    {"choice_ids_type", [](GateArgs& a, Value v) { set(a.given.ids_type, v); }},
    {"choice_weights", [](GateArgs& a, Value v) { set(a.given.weights, v); }},
    {"choice_weights_type", [](GateArgs& a, Value v) { set(a.given.weights_type, v); }},
    {"choice_mode", [](GateArgs& a, Value v) { set(a.given.mode, v); }},
    {"choice_in_every_row", [](GateArgs& a, Value v) { set(a.given.every_row, v); }},
    {"group_statistics", [](GateArgs& a, Value v) { set(a.statistics.groups, v); }},
    {"num_groups", [](GateArgs& a, Value v) { set(a.statistics.num_groups, v); }},
    {"segment_statistics", [](GateArgs& a, Value v) { set(a.statistics.segments, v); }},
    {"num_segments", [](GateArgs& a, Value v) { set(a.statistics.num_segments, v); }},
    {"statistics_planes", [](GateArgs& a, Value v) { set(a.statistics.planes, v); }},
    {"entropy", [](GateArgs& a, Value v) { set(a.statistics.entropy, v); }},
};

void set_field(GateArgs& args, const std::string& name, Value value) {
  for (const Field& field : kFields) {
    if (name == field.name) return field.set(args, value);
  }
  throw py::type_error("GateArgs has no argument '" + name + "'");
}

GateArgs gate_args(uintptr_t logits, int dtype, int64_t tokens, int32_t experts, int32_t k, uintptr_t weights,
                   uintptr_t ids, const py::kwargs& rest) {
  GateArgs args;
  args.logits = at<void>(logits);
  args.logits_type = static_cast<DType>(dtype);
  args.tokens = tokens;
  args.experts = experts;
  args.row_stride = experts;
  args.k = k;
  args.weights = at<void>(weights);
  args.ids = at<int32_t>(ids);
  for (const auto& [name, value] : rest) set_field(args, name.cast<std::string>(), value);
  return args;
}

void load_kernels(int32_t device, int32_t experts) {
  if (!MOE_ROUTE_WITH_CUDA) throw std::runtime_error("this build of moe_route has no CUDA kernels");
  launch::load_kernels(device, experts);
}

// The operators of CUDA tensors, from the first call on; the schemas are defined by then.
void register_cuda() {
  if (!MOE_ROUTE_WITH_CUDA) throw std::runtime_error("this build of moe_route has no CUDA kernels");
  static StableLibrary* library = nullptr;  // kept: torch may outlive this module
  if (library) return;
  library = new StableLibrary(StableLibrary::Kind::IMPL, "moe_route", "CUDA", __FILE__, __LINE__);
  implement_on_device(*library);
  implement_experts_on_device(*library);
}

cuda::Stream stream_at(uintptr_t stream) { return at<CUstream_st>(stream); }

void run_gate(const GateArgs& args) {
  py::gil_scoped_release release;
  cpu::launch_gate(args);
}

void run_gate_cuda(const GateArgs& args, uintptr_t stream) {
  py::gil_scoped_release release;
  cuda::gate(args, stream_at(stream));
}

DispatchArgs dispatch_args(uintptr_t ids, int ids_type, int64_t slots, int32_t experts, int32_t block,
                           int64_t capacity, uintptr_t offsets, uintptr_t ends, uintptr_t counts,
                           uintptr_t order, uintptr_t inverse, uintptr_t workspace = 0) {
  return {at<void>(ids),
          static_cast<DType>(ids_type),
          slots,
          experts,
          block,
          capacity,
          at<int64_t>(offsets),
          at<int32_t>(ends),
          at<int64_t>(counts),
          at<int64_t>(order),
          at<int64_t>(inverse),
          at<void>(workspace)};
}

void dispatch(uintptr_t ids, int ids_type, int64_t slots, int32_t experts, int32_t block, int64_t capacity,
              uintptr_t offsets, uintptr_t ends, uintptr_t counts, uintptr_t order, uintptr_t inverse) {
  py::gil_scoped_release release;
  cpu::launch_dispatch(
      dispatch_args(ids, ids_type, slots, experts, block, capacity, offsets, ends, counts, order, inverse));
}

void dispatch_cuda(uintptr_t ids, int ids_type, int64_t slots, int32_t experts, int32_t block,
                   int64_t capacity, uintptr_t offsets, uintptr_t ends, uintptr_t counts, uintptr_t order,
                   uintptr_t inverse, uintptr_t workspace, uintptr_t stream) {
  py::gil_scoped_release release;
  cuda::dispatch(dispatch_args(ids, ids_type, slots, experts, block, capacity, offsets, ends, counts, order,
                               inverse, workspace),
                 stream_at(stream));
}

PermuteArgs permute_args(uintptr_t x, uintptr_t order, uintptr_t inverse, uintptr_t rows, int64_t tokens,
                         int64_t k, int64_t row_bytes, int64_t capacity) {
  return {at<void>(x), at<int64_t>(inverse), at<int64_t>(order), at<void>(rows), tokens, k, row_bytes,
          capacity};
}

void permute(uintptr_t x, uintptr_t order, uintptr_t inverse, uintptr_t rows, int64_t tokens, int64_t k,
             int64_t row_bytes, int64_t capacity) {
  py::gil_scoped_release release;
  cpu::launch_permute(permute_args(x, order, inverse, rows, tokens, k, row_bytes, capacity));
}

void permute_cuda(uintptr_t x, uintptr_t order, uintptr_t inverse, uintptr_t rows, int64_t tokens, int64_t k,
                  int64_t row_bytes, int64_t capacity, uintptr_t stream) {
  py::gil_scoped_release release;
  cuda::permute(permute_args(x, order, inverse, rows, tokens, k, row_bytes, capacity), stream_at(stream));
}

CombineArgs combine_args(uintptr_t rows, uintptr_t weights, uintptr_t inverse, uintptr_t residual,
                         uintptr_t out, int dtype, int64_t tokens, int64_t k, int64_t hidden,
                         int64_t capacity) {
  return {at<void>(rows),
          at<void>(weights),
          at<int64_t>(inverse),
          at<void>(residual),
          at<void>(out),
          static_cast<DType>(dtype),
          tokens,
          k,
          hidden,
          capacity};
}

void combine(uintptr_t rows, uintptr_t weights, uintptr_t inverse, uintptr_t residual, uintptr_t out,
             int dtype, int64_t tokens, int64_t k, int64_t hidden, int64_t capacity) {
  py::gil_scoped_release release;
  cpu::launch_combine(
      combine_args(rows, weights, inverse, residual, out, dtype, tokens, k, hidden, capacity));
}

void combine_cuda(uintptr_t rows, uintptr_t weights, uintptr_t inverse, uintptr_t residual, uintptr_t out,
                  int dtype, int64_t tokens, int64_t k, int64_t hidden, int64_t capacity, uintptr_t stream) {
  py::gil_scoped_release release;
  cuda::combine(combine_args(rows, weights, inverse, residual, out, dtype, tokens, k, hidden, capacity),
                stream_at(stream));
}

}  // namespace
}  // namespace moe_route

PYBIND11_MODULE(_C, m) {
  namespace mr = moe_route;
  using py::arg;
  m.doc() = "Compiled part of moe_route. The operators are torch.ops.moe_route.*; see moe_route.ops.";
  m.attr("__version__") = MOE_ROUTE_VERSION;
  m.attr("MAX_EXPERTS") = mr::kMaxExperts;
  m.attr("MAX_CHOSEN") = mr::kMaxChosen;
  m.attr("MAX_ROWS") = mr::kMaxRows;
  m.def("build_info", &mr::build_info, "What this module was built with.");
  m.def("cuda_runtime", &mr::cuda_runtime, "CUDA versions, devices, or the problem. Needs no driver.");
  m.def("load_kernels", &mr::load_kernels, arg("device"), arg("experts"),
        "Load the CUDA kernels that calls with this many experts may launch on a device.");
  m.def("register_cuda", &mr::register_cuda, "Let the CUDA kernels serve the operators of CUDA tensors.");
  m.def("set_required", &mr::self_check::set_required, arg("required"), "See csrc/torch/self_check.h.");
  m.def("set_allowed_here", &mr::self_check::set_allowed_here, arg("allowed"));
  m.def("mark", &mr::self_check::mark, arg("device"), arg("experts"));
  m.def("withdraw", &mr::self_check::withdraw, arg("kernels"));
  m.def("report", &mr::self_check::report, arg("problem"));
  m.def("forget", &mr::self_check::forget);
  m.def("tunables", &mr::tunables, "What a device settles about the CUDA kernels, and switches, by name.");
  m.def("tune", &mr::cuda::tune, arg("name"), arg("value"), "Set one of them for the launches that follow.");
  m.def("instruction_set", [] { return std::string(mr::cpu::name(mr::cpu::instruction_set())); });
  m.def("best_instruction_set", [] { return std::string(mr::cpu::name(mr::cpu::best_instruction_set())); });
  m.def("supported_instruction_sets", &mr::supported_instruction_sets);
  m.def(
      "set_instruction_set",
      [](const std::string& name) {
        mr::cpu::set_instruction_set(mr::cpu::instruction_set_named(name.c_str()));
      },
      arg("name"));
  py::class_<mr::GateArgs>(m, "GateArgs",
                           "Arguments of one gate launch: addresses (data_ptr()), sizes, policies.")
      .def(py::init(&mr::gate_args), arg("logits"), arg("dtype"), arg("tokens"), arg("experts"), arg("k"),
           arg("weights"), arg("ids"))
      .def("run", &mr::run_gate, "Launch on torch's threads. The caller keeps every tensor alive.")
      .def("run_cuda", &mr::run_gate_cuda, arg("stream"),
           "Enqueue on a stream of the current device. The caller keeps every tensor alive.");
  m.def("dispatch", &mr::dispatch, arg("ids"), arg("ids_type"), arg("slots"), arg("experts"), arg("block"),
        arg("capacity"), arg("offsets"), arg("ends"), arg("counts"), arg("order"), arg("inverse"));
  m.def("dispatch_workspace_bytes", &mr::cuda::dispatch_workspace_bytes, arg("slots"), arg("experts"));
  m.def("dispatch_cuda", &mr::dispatch_cuda, arg("ids"), arg("ids_type"), arg("slots"), arg("experts"),
        arg("block"), arg("capacity"), arg("offsets"), arg("ends"), arg("counts"), arg("order"),
        arg("inverse"), arg("workspace"), arg("stream"));
  m.def("permute", &mr::permute, arg("x"), arg("order"), arg("inverse"), arg("rows"), arg("tokens"), arg("k"),
        arg("row_bytes"), arg("capacity"));
  m.def("permute_cuda", &mr::permute_cuda, arg("x"), arg("order"), arg("inverse"), arg("rows"), arg("tokens"),
        arg("k"), arg("row_bytes"), arg("capacity"), arg("stream"));
  m.def("combine", &mr::combine, arg("rows"), arg("weights"), arg("inverse"), arg("residual"), arg("out"),
        arg("dtype"), arg("tokens"), arg("k"), arg("hidden"), arg("capacity"));
  m.def("combine_cuda", &mr::combine_cuda, arg("rows"), arg("weights"), arg("inverse"), arg("residual"),
        arg("out"), arg("dtype"), arg("tokens"), arg("k"), arg("hidden"), arg("capacity"), arg("stream"));
}
