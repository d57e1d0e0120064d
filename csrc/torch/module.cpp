// The module moe_route._C: what was built, the instruction set in force, and every kernel launcher over bare
// addresses and sizes, so that benchmarks time a kernel without torch's dispatcher. CPU launchers return when
// the work is done; those named *_cuda enqueue it on a stream of the current device.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>
#include <string>
#include <vector>

#include "cpu_threads.h"
#include "cuda/device.h"
#include "moe_route/cuda.h"

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

constexpr cpu::InstructionSet kSets[] = {cpu::InstructionSet::kPortable, cpu::InstructionSet::kAvx2,
                                         cpu::InstructionSet::kAvx512};

cpu::InstructionSet set_named(const std::string& wanted) {
  for (auto set : kSets) {
    if (wanted == cpu::name(set)) return set;
  }
  throw std::invalid_argument("no instruction set '" + wanted + "'; there are portable, avx2 and avx512");
}

std::vector<std::string> supported_instruction_sets() {
  std::vector<std::string> list;
  for (auto set : kSets) {
    if (cpu::supported(set)) list.emplace_back(cpu::name(set));
  }
  return list;
}

// Addresses come from Tensor.data_ptr(); 0 is "none".
template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Keyword arguments of gate(), set on a GateArgs by name; an unknown name is refused.
void set_field(GateArgs& args, const std::string& name, const py::handle& value) {
  const auto integer = [&] { return value.cast<int64_t>(); };
  const auto address = [&] { return value.cast<uintptr_t>(); };
  const auto number = [&] { return value.cast<float>(); };
  if (name == "row_stride")
    args.row_stride = integer();
  else if (name == "score")
    args.spec.score = static_cast<Score>(integer());
  else if (name == "order")
    args.spec.order = static_cast<Order>(integer());
  else if (name == "group_score")
    args.spec.group_score = static_cast<GroupScore>(integer());
  else if (name == "renormalize")
    args.spec.renormalize = static_cast<Renormalize>(integer());
  else if (name == "groups")
    args.spec.groups = value.cast<int32_t>();
  else if (name == "top_groups")
    args.spec.top_groups = value.cast<int32_t>();
  else if (name == "group_fill")
    args.spec.group_fill = number();
  else if (name == "eps")
    args.spec.eps = number();
  else if (name == "norm_p")
    args.spec.norm_p = number();
  else if (name == "scale")
    args.spec.scale = number();
  else if (name == "jitter")
    args.spec.jitter = number();
  else if (name == "correction_bias")
    args.correction_bias = at<float>(address());
  else if (name == "expert_scale")
    args.expert_scale = at<float>(address());
  else if (name == "steering")
    args.steering.tables = at<float>(address());
  else if (name == "steering_planes")
    args.steering.planes = value.cast<uint32_t>();
  else if (name == "steering_rows")
    args.steering.rows = integer();
  else if (name == "row_params")
    args.steering.row_params = at<float>(address());
  else if (name == "remap")
    args.steering.remap = at<int32_t>(address());
  else if (name == "token_table")
    args.token_table = at<int32_t>(address());
  else if (name == "given_ids")
    args.given.ids = at<void>(address());
  else if (name == "given_ids_type")
    args.given.ids_type = static_cast<DType>(integer());
  else if (name == "given_weights")
    args.given.weights = at<void>(address());
  else if (name == "given_weights_type")
    args.given.weights_type = static_cast<DType>(integer());
  else if (name == "given_mode")
    args.given.mode = static_cast<GivenMode>(integer());
  else if (name == "given_every_row")
    args.given.every_row = value.cast<bool>();
  else if (name == "group_statistics")
    args.statistics.groups = at<int64_t>(address());
  else if (name == "num_groups")
    args.statistics.num_groups = integer();
  else if (name == "segment_statistics")
    args.statistics.segments = at<int64_t>(address());
  else if (name == "num_segments")
    args.statistics.num_segments = integer();
  else if (name == "statistics_planes")
    args.statistics.planes = value.cast<uint32_t>();
  else if (name == "entropy")
    args.statistics.entropy = value.cast<bool>();
  else
    throw py::type_error("gate() has no argument '" + name + "'");
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
                           int64_t capacity, uintptr_t offsets, uintptr_t counts, uintptr_t order,
                           uintptr_t inverse, uintptr_t workspace = 0) {
  return {at<void>(ids),
          static_cast<DType>(ids_type),
          slots,
          experts,
          block,
          capacity,
          at<int64_t>(offsets),
          at<int64_t>(counts),
          at<int64_t>(order),
          at<int64_t>(inverse),
          at<void>(workspace)};
}

void dispatch(uintptr_t ids, int ids_type, int64_t slots, int32_t experts, int32_t block, int64_t capacity,
              uintptr_t offsets, uintptr_t counts, uintptr_t order, uintptr_t inverse) {
  py::gil_scoped_release release;
  cpu::launch_dispatch(
      dispatch_args(ids, ids_type, slots, experts, block, capacity, offsets, counts, order, inverse));
}

void dispatch_cuda(uintptr_t ids, int ids_type, int64_t slots, int32_t experts, int32_t block,
                   int64_t capacity, uintptr_t offsets, uintptr_t counts, uintptr_t order, uintptr_t inverse,
                   uintptr_t workspace, uintptr_t stream) {
  py::gil_scoped_release release;
  cuda::dispatch(dispatch_args(ids, ids_type, slots, experts, block, capacity, offsets, counts, order,
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
  m.def("build_info", &mr::build_info, "What this module was built with.");
  m.def("cuda_runtime", &mr::cuda_runtime, "CUDA versions, devices, or the problem. Needs no driver.");
  m.def("instruction_set", [] { return std::string(mr::cpu::name(mr::cpu::instruction_set())); });
  m.def("best_instruction_set", [] { return std::string(mr::cpu::name(mr::cpu::best_instruction_set())); });
  m.def("supported_instruction_sets", &mr::supported_instruction_sets);
  m.def(
      "set_instruction_set",
      [](const std::string& name) { mr::cpu::set_instruction_set(mr::set_named(name)); }, arg("name"));
  py::class_<mr::GateArgs>(m, "GateArgs",
                           "Arguments of one gate launch: addresses (data_ptr()), sizes, policies.")
      .def(py::init(&mr::gate_args), arg("logits"), arg("dtype"), arg("tokens"), arg("experts"), arg("k"),
           arg("weights"), arg("ids"))
      .def("run", &mr::run_gate, "Launch on torch's threads. The caller keeps every tensor alive.")
      .def("run_cuda", &mr::run_gate_cuda, arg("stream"),
           "Enqueue on a stream of the current device. The caller keeps every tensor alive.");
  m.def("dispatch", &mr::dispatch, arg("ids"), arg("ids_type"), arg("slots"), arg("experts"), arg("block"),
        arg("capacity"), arg("offsets"), arg("counts"), arg("order"), arg("inverse"));
  m.def("dispatch_workspace_bytes", &mr::cuda::dispatch_workspace_bytes, arg("slots"), arg("experts"));
  m.def("dispatch_cuda", &mr::dispatch_cuda, arg("ids"), arg("ids_type"), arg("slots"), arg("experts"),
        arg("block"), arg("capacity"), arg("offsets"), arg("counts"), arg("order"), arg("inverse"),
        arg("workspace"), arg("stream"));
  m.def("permute", &mr::permute, arg("x"), arg("order"), arg("inverse"), arg("rows"), arg("tokens"), arg("k"),
        arg("row_bytes"), arg("capacity"));
  m.def("permute_cuda", &mr::permute_cuda, arg("x"), arg("order"), arg("inverse"), arg("rows"), arg("tokens"),
        arg("k"), arg("row_bytes"), arg("capacity"), arg("stream"));
  m.def("combine", &mr::combine, arg("rows"), arg("weights"), arg("inverse"), arg("residual"), arg("out"),
        arg("dtype"), arg("tokens"), arg("k"), arg("hidden"), arg("capacity"));
  m.def("combine_cuda", &mr::combine_cuda, arg("rows"), arg("weights"), arg("inverse"), arg("residual"),
        arg("out"), arg("dtype"), arg("tokens"), arg("k"), arg("hidden"), arg("capacity"), arg("stream"));
}
