// The CUDA kernels against the CPU, bit for bit: gate, dispatch, permute, combine, all four in a row, and the
// products of experts.
// One program for a real device and for the emulated one (tests/emulator), where memory checkers and ctest
// run it.
//
//   device_test [--problems N] [--seed S] [--only FAMILY] [--number I] [--determinism N]
//
// N random problems beside those that cover every option (60); --number runs one alone, as a failure names
// it; --determinism repeats every call N times and wants the same bits. Returns 1 on failure, 77 without a
// device.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "device_call.h"
#include "experts_problem.h"
#include "gate_problem.h"
#include "moe_route/cuda.h"

using namespace moe_route;
using namespace moe_route::test;

namespace {

struct Options {
  int problems = 60;
  uint64_t seed = 1;
  std::string only;
  int number = -1;
  int determinism = 1;
} options;

int passed = 0, failed = 0;

void report(const std::string& wrong, const std::string& about) {
  if (wrong.empty()) {
    ++passed;
  } else if (++failed <= 30) {
    std::printf("FAILED %s\n  %s\n", about.c_str(), wrong.c_str());
    std::fflush(stdout);
  }
}

void serial(int64_t n, int64_t, cpu::ParallelBody body, void* context) {
  if (n > 0) body(0, n, context);
}

// The operators under one name for each side.
void run_on_cpu(const GateArgs& a) { cpu::gate_rows(a, 0, a.tokens); }
void run_on_cpu(const DispatchArgs& a) { cpu::dispatch(a, serial, 1); }
void run_on_cpu(const PermuteArgs& a) { cpu::permute(a, serial); }
void run_on_cpu(const CombineArgs& a) { cpu::combine(a, serial); }
void run_on_cpu(const ExpertProductArgs& a) { cpu::expert_products(&a, 1, serial, 1); }
void run_on_cpu(const ExpertActivationArgs& a) { cpu::expert_activation(a, serial); }
void enqueue(const GateArgs& a, cuda::Stream stream) { cuda::gate(a, stream); }
void enqueue(const DispatchArgs& a, cuda::Stream stream) { cuda::dispatch(a, stream); }
void enqueue(const PermuteArgs& a, cuda::Stream stream) { cuda::permute(a, stream); }
void enqueue(const CombineArgs& a, cuda::Stream stream) { cuda::combine(a, stream); }
void enqueue(const ExpertProductArgs& a, cuda::Stream stream) { cuda::expert_product(a, stream); }
void enqueue(const ExpertActivationArgs& a, cuda::Stream stream) { cuda::expert_activation(a, stream); }

// What load_kernels has to be told for a call: with MOE_ROUTE_EMULATOR_LOADED_ONLY a kernel that it leaves
// out fails.
int32_t experts_of(const GateArgs& a) { return a.experts; }
int32_t experts_of(const DispatchArgs& a) { return a.experts; }
int32_t experts_of(const PermuteArgs&) { return 1; }
int32_t experts_of(const CombineArgs&) { return 1; }
int32_t experts_of(const ExpertProductArgs& a) { return a.experts; }
int32_t experts_of(const ExpertActivationArgs& a) { return a.experts; }

// ---- one call on both sides -----------------------------------------------------------------------------

// Half of the problems have guards behind their outputs; shift is of the first input.
template <class Args>
std::string compare(const Args& asked, bool guarded, int64_t shift, void* workspace = nullptr) {
  HostCall<Args> host(asked);
  run_on_cpu(host.args);
  DeviceCall<Args> device(asked, guarded, shift);
  if constexpr (std::is_same_v<Args, DispatchArgs>) device.args.workspace = workspace;
  cuda::load_kernels(experts_of(asked));
  for (int i = 0; i < options.determinism; ++i) {
    if (i > 0) device.reset();
    enqueue(device.args, nullptr);
    const std::string wrong = difference(device.results(), host.results);
    if (!wrong.empty()) return i == 0 ? wrong : wrong + " in run " + std::to_string(i + 1);
  }
  return "";
}

bool wanted(const char* test, int number) {
  return (options.only.empty() || options.only == test) && (options.number < 0 || options.number == number);
}

// What went wrong, exceptions included.
template <class Test>
std::string outcome(Test test) {
  try {
    return test();
  } catch (const std::exception& error) {
    return error.what();
  }
}

std::string list(std::initializer_list<std::pair<const char*, long long>> values) {
  std::string text;
  for (const auto& [name, value] : values) text += std::string(" ") + name + "=" + std::to_string(value);
  return text;
}

std::string about(const char* test, int number) {
  return std::string(test) + " --number " + std::to_string(number) + " --seed " +
         std::to_string(options.seed);
}

// ---- gate -----------------------------------------------------------------------------------------------

std::string describe(const GateArgs& a) {
  const GateSpec& s = a.spec;
  std::string text = list({{"T", a.tokens},
                           {"E", a.experts},
                           {"k", a.k},
                           {"type", int(a.logits_type)},
                           {"stride", a.row_stride},
                           {"score", int(s.score)},
                           {"order", int(s.order)},
                           {"renormalize", int(s.renormalize)},
                           {"groups", s.groups},
                           {"top_groups", s.top_groups},
                           {"group_score", int(s.group_score)},
                           {"correction", a.correction_bias != nullptr},
                           {"expert_scale", a.expert_scale != nullptr},
                           {"tokens", a.token_table != nullptr}});
  text += list({{"steering_rows", a.steering.rows},
                {"planes", a.steering.planes},
                {"row_params", a.steering.row_params != nullptr},
                {"remap", a.steering.remap != nullptr},
                {"given", int(a.given.mode)},
                {"given_weights", a.given.weights != nullptr},
                {"every_row", a.given.every_row},
                {"statistics_groups", a.statistics.num_groups},
                {"segments", a.statistics.num_segments},
                {"statistics_planes", a.statistics.planes},
                {"entropy", a.statistics.entropy},
                {"counting_only", a.weights == nullptr}});
  return text;
}

// Marks the outputs that are wanted: HostCall and DeviceCall put memory in their place.
GateArgs with_outputs(const GateProblem& p) {
  static int64_t mark;
  GateArgs a = p.args;
  a.weights = p.wants_weights ? &mark : nullptr;
  a.ids = p.wants_ids ? reinterpret_cast<int32_t*>(&mark) : nullptr;
  a.statistics.groups = a.statistics.num_groups > 0 ? &mark : nullptr;
  a.statistics.segments = a.statistics.num_segments > 0 ? &mark : nullptr;
  return a;
}

// Every number of experts with every k; every way to score; every plane and force code.
std::vector<GateWish> gate_wishes() {
  std::vector<GateWish> wishes;
  const DType types[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};
  const int lengths[] = {0, 1, 3, 17, 64}, usual[] = {8, 60, 64, 67, 128, 160, 256, 384};
  const auto add = [&]() -> GateWish& {
    const size_t n = wishes.size();
    GateWish& wish = wishes.emplace_back();
    wish.type = types[n % 3];
    wish.experts = usual[n % 8];
    wish.tokens = 17;
    return wish;
  };
  for (int experts : {1, 6, 8, 16, 60, 64, 67, 128, 256, 257, 384, 512, 896, 1536, 4096}) {
    for (int k : {1, 2, 4, 8, 10, 22, 40, 64}) {
      if (k > experts) continue;
      const int length = lengths[wishes.size() % 5];
      GateWish& wish = add();
      wish.experts = experts, wish.k = k;
      wish.tokens = experts > 512 ? std::min(length, 5) : length;
    }
  }
  for (int i = 0; i < 5 * 2 * 4; ++i) {
    GateWish& wish = add();
    wish.score = Score(i % 5), wish.order = Order(i / 5 % 2), wish.renormalize = Renormalize(i / 10);
  }
  for (uint32_t plane = 1; plane <= kForce; plane <<= 1) add().planes = plane;
  for (int force = kForbid; force <= kOnNatural + 1; ++force) {
    GateWish& wish = add();
    wish.planes = kForce, wish.force = force;
  }
  for (GivenMode mode : {GivenMode::kNone, GivenMode::kNatural, GivenMode::kReplay, GivenMode::kBaseline}) {
    add().given = mode;
    add().tokens = 300;
  }
  return wishes;
}

void test_gate() {
  std::vector<GateWish> wishes = gate_wishes();
  wishes.resize(wishes.size() + static_cast<size_t>(options.problems));
  for (int number = 0; number < static_cast<int>(wishes.size()); ++number) {
    if (!wanted("gate", number)) continue;
    const uint64_t seed = options.seed * 1'000'003 + static_cast<uint64_t>(number);
    const GateProblem problem = draw_gate(seed, wishes[static_cast<size_t>(number)]);
    const GateArgs asked = with_outputs(problem);
    const int64_t shift = number % 3 * bytes_of(asked.logits_type);
    report(outcome([&] { return compare(asked, number % 2 == 0, shift); }),
           about("gate", number) + describe(asked));
  }
}

// ---- dispatch -------------------------------------------------------------------------------------------

struct DispatchProblem {
  DispatchArgs args;
  std::vector<int32_t> ids;
  std::vector<int64_t> ids64;
};

DispatchProblem draw_dispatch(Random& g, int experts, int64_t slots) {
  DispatchProblem p;
  const int kind = g.below(4), favorite = g.below(experts);
  for (int64_t s = 0; s < slots; ++s) {
    int64_t id = g.below(experts);
    if (kind == 1 || (kind == 2 && !g.one_in(8))) id = favorite;
    if (kind != 1 && g.one_in(6)) id = g.one_in(2) ? -1 - g.below(3) : experts + g.below(3);
    p.ids.push_back(static_cast<int32_t>(id));
    p.ids64.push_back(id >= experts ? id << 32 : id);
  }
  DispatchArgs& a = p.args;
  const bool wide = g.one_in(2);
  a.ids = wide ? static_cast<const void*>(p.ids64.data()) : p.ids.data();
  a.ids_type = wide ? DType::kInt64 : DType::kInt32;
  a.slots = slots, a.experts = experts;
  const int blocks[] = {1, 1, 8, 16, 128};
  a.block = g.pick(blocks);
  a.capacity = dispatch_capacity(slots, experts, a.block) + (g.one_in(2) ? g.below(100) : 0);
  static int64_t mark;
  a.offsets = a.counts = a.order = a.inverse = &mark;
  a.ends = reinterpret_cast<int32_t*>(&mark);
  return p;
}

void test_dispatch() {
  std::vector<std::pair<int, int64_t>> shapes;
  for (int experts : {1, 6, 8, 60, 67, 128, 256, 257, 512, 682, 1536, 4096}) {
    for (int64_t slots : {0, 1, 17 * 8, 1000, 4096, 4097, 20000}) shapes.emplace_back(experts, slots);
  }
  const int fixed = static_cast<int>(shapes.size());
  for (int number = 0; number < fixed + options.problems / 2; ++number) {
    Random g(options.seed * 15'485'863 + static_cast<uint64_t>(number));
    if (number >= fixed) shapes.emplace_back(1 + g.below(300), g.below(9000));
    if (!wanted("dispatch", number)) continue;
    const auto [experts, slots] = shapes[static_cast<size_t>(number)];
    const DispatchProblem p = draw_dispatch(g, experts, slots);
    report(outcome([&] {
             const DeviceArray workspace(cuda::dispatch_workspace_bytes(slots, experts), 0, 0);
             return compare(p.args, number % 2 == 0, 0, workspace.data());
           }),
           about("dispatch", number) + list({{"E", experts},
                                             {"slots", slots},
                                             {"block", p.args.block},
                                             {"capacity", p.args.capacity},
                                             {"ids", int(p.args.ids_type)}}));
  }
}

// ---- permute and combine --------------------------------------------------------------------------------

// A dispatch that was made: what permute and combine read.
struct Rows {
  int64_t tokens, k, capacity;
  std::vector<int64_t> order, inverse;
};

Rows draw_rows(Random& g) {
  const int lengths[] = {0, 1, 3, 17, 64, 300}, ks[] = {1, 2, 3, 4, 5, 8, 10, 33, 40, 64};
  const int64_t tokens = g.pick(lengths), k = tokens > 64 ? 1 + g.below(8) : g.pick(ks);
  const int experts = 1 + g.below(70);
  const DispatchProblem p = draw_dispatch(g, experts, tokens * k);
  HostCall<DispatchArgs> call(p.args);
  run_on_cpu(call.args);
  const auto copy = [](const int64_t* from, int64_t n) { return std::vector<int64_t>(from, from + n); };
  return {tokens, k, p.args.capacity, copy(call.args.order, p.args.capacity),
          copy(call.args.inverse, p.args.slots)};
}

std::vector<unsigned char> random_bytes(Random& g, int64_t bytes) {
  std::vector<unsigned char> all(static_cast<size_t>(bytes));
  for (unsigned char& byte : all) byte = static_cast<unsigned char>(g.bits());
  return all;
}

void test_permute() {
  static constexpr int kRowBytes[] = {2, 4, 6, 8, 12, 16, 20, 32, 48, 64, 200, 1024, 2050, 4096, 4112, 14336};
  constexpr int kLengths = 16;
  for (int number = 0; number < 3 * kLengths + options.problems / 4; ++number) {
    if (!wanted("permute", number)) continue;
    Random g(options.seed * 32'452'843 + static_cast<uint64_t>(number));
    const Rows rows = draw_rows(g);
    PermuteArgs a;
    a.row_bytes = rows.capacity > 3000 ? 2 + 2 * g.below(30) : kRowBytes[number % kLengths];
    a.tokens = rows.tokens, a.k = rows.k, a.capacity = rows.capacity;
    const std::vector<unsigned char> x = random_bytes(g, a.tokens * a.row_bytes);
    static int mark;
    a.x = x.data(), a.inverse = rows.inverse.data(), a.order = rows.order.data(), a.rows = &mark;
    const int64_t shift = g.one_in(3) ? 2 << g.below(3) : 0;
    report(outcome([&] { return compare(a, number % 2 == 0, shift); }),
           about("permute", number) + list({{"T", a.tokens},
                                            {"k", a.k},
                                            {"row_bytes", a.row_bytes},
                                            {"capacity", a.capacity},
                                            {"shift", shift}}));
  }
}

// Random numbers of a type, now and then strange ones.
std::vector<unsigned char> random_numbers(Random& g, DType type, int64_t n) {
  std::vector<unsigned char> all(static_cast<size_t>(n * bytes_of(type)));
  const bool strange = g.one_in(3);
  static constexpr float kStrange[] = {kNaN, kInf, -kInf, -0.0f, 1e-42f, 1e38f, 65504.0f, 0x1p-24f};
  for (int64_t i = 0; i < n; ++i) {
    const float x = strange && g.one_in(50) ? g.pick(kStrange) : g.bell();
    const double wide = static_cast<double>(x) * 1.000000001;
    const uint16_t half = to_half(x, type);
    const void* from = type == DType::kFloat32   ? static_cast<const void*>(&x)
                       : type == DType::kFloat64 ? static_cast<const void*>(&wide)
                                                 : &half;
    std::memcpy(all.data() + i * bytes_of(type), from, static_cast<size_t>(bytes_of(type)));
  }
  return all;
}

void test_combine() {
  static constexpr DType kTypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16, DType::kFloat64};
  static constexpr int kHidden[] = {1, 2, 3, 4, 6, 8, 20, 64, 100, 256, 1030, 2048, 4100};
  constexpr int kLengths = 13;
  for (int number = 0; number < 4 * kLengths + options.problems / 4; ++number) {
    if (!wanted("combine", number)) continue;
    Random g(options.seed * 49'979'687 + static_cast<uint64_t>(number));
    const Rows rows = draw_rows(g);
    CombineArgs a;
    a.type = kTypes[number % 4];
    a.hidden = rows.capacity > 1000 ? 1 + g.below(40) : kHidden[number % kLengths];
    a.tokens = rows.tokens, a.k = rows.k, a.capacity = rows.capacity;
    std::vector<unsigned char> values = random_numbers(g, a.type, a.capacity * a.hidden);
    const int64_t row_bytes = a.hidden * bytes_of(a.type);
    for (int64_t r = 0; r < a.capacity; ++r) {  // NaN in the rows of no slot: they are never read
      if (rows.order[static_cast<size_t>(r)] < 0) {
        std::memset(values.data() + r * row_bytes, 0xff, static_cast<size_t>(row_bytes));
      }
    }
    const auto weights =
        random_numbers(g, a.type == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32, a.tokens * a.k);
    const auto residual = random_numbers(g, a.type, a.tokens * a.hidden);
    static int mark;
    a.rows = values.data(), a.weights = weights.data(), a.inverse = rows.inverse.data(), a.out = &mark;
    if (g.one_in(2)) a.residual = residual.data();
    const int64_t shift = g.one_in(3) ? bytes_of(a.type) << g.below(2) : 0;
    report(outcome([&] { return compare(a, number % 2 == 0, shift); }),
           about("combine", number) + list({{"T", a.tokens},
                                            {"k", a.k},
                                            {"H", a.hidden},
                                            {"type", int(a.type)},
                                            {"capacity", a.capacity},
                                            {"residual", a.residual != nullptr},
                                            {"shift", shift}}));
  }
}

// ---- products of experts --------------------------------------------------------------------------------

void test_experts() {
  for (int number = 0; number < 36 + options.problems / 4; ++number) {
    if (!wanted("experts", number)) continue;
    Random g(options.seed * 67'867'967 + static_cast<uint64_t>(number));
    const ExpertsProblem p(g, number, random_numbers);
    const ExpertProductArgs& a = p.args;
    const int64_t shift = g.one_in(3) ? bytes_of(a.type) << g.below(2) : 0;
    report(outcome([&] { return compare(a, number % 2 == 0, shift); }),
           about("experts", number) + list({{"E", a.experts},
                                            {"in", a.in},
                                            {"out", a.out_columns},
                                            {"type", int(a.type)},
                                            {"transposed", a.transposed},
                                            {"pairing", int(a.pairing)},
                                            {"activation", int(a.activation.kind)},
                                            {"capacity", a.capacity},
                                            {"shift", shift}}));
  }
}

void test_activation() {
  for (int number = 0; number < 36 + options.problems / 4; ++number) {
    if (!wanted("activation", number)) continue;
    Random g(options.seed * 32'452'843 + static_cast<uint64_t>(number));
    const ActivationProblem p(g, number, random_numbers);
    const ExpertActivationArgs& a = p.args;
    const int64_t shift = g.one_in(3) ? bytes_of(a.type) << g.below(2) : 0;
    report(outcome([&] { return compare(a, number % 2 == 0, shift); }),
           about("activation", number) + list({{"E", a.experts},
                                               {"columns", a.columns},
                                               {"type", int(a.type)},
                                               {"pairing", int(a.pairing)},
                                               {"activation", int(a.activation.kind)},
                                               {"bias", a.bias != nullptr},
                                               {"capacity", a.capacity},
                                               {"shift", shift}}));
  }
}

// ---- gate, dispatch, permute, combine in a row ----------------------------------------------------------

// The inputs of a chain; its shape is that of `wish`.
struct ChainProblem {
  GateProblem gate;
  std::vector<unsigned char> x, residual;
  int64_t hidden = 72;
  int32_t block;

  ChainProblem(uint64_t seed, const GateWish& wish, int32_t block)
      : gate(draw_gate(seed, wish)), block(block) {
    gate.wants_weights = gate.wants_ids = true;
    Random g(seed + 1);
    x = random_numbers(g, DType::kBFloat16, gate.args.tokens * hidden);
    residual = random_numbers(g, DType::kBFloat16, gate.args.tokens * hidden);
  }
};

// All four calls on either side; each takes what the one before has left. `Call` is HostCall or
// DeviceCall.
template <template <class> class Call, class... Guarded>
struct Chain {
  Call<GateArgs> gate;
  Call<DispatchArgs> dispatch;
  Call<PermuteArgs> permute;
  Call<CombineArgs> combine;

  explicit Chain(const ChainProblem& p, Guarded... guarded)
      : gate(with_outputs(p.gate), guarded...),
        dispatch(dispatch_args(p, gate.args), guarded...),
        permute(permute_args(p), guarded...),
        combine(combine_args(p), guarded...) {
    dispatch.args.ids = gate.args.ids;
    permute.args.inverse = dispatch.args.inverse, permute.args.order = dispatch.args.order;
    combine.args.rows = permute.args.rows, combine.args.inverse = dispatch.args.inverse;
    combine.args.weights = gate.args.weights;
  }

  static DispatchArgs dispatch_args(const ChainProblem& p, const GateArgs& gate) {
    DispatchArgs a;
    static int64_t mark;
    a.slots = gate.tokens * gate.k, a.experts = gate.experts, a.block = p.block;
    a.capacity = dispatch_capacity(a.slots, a.experts, a.block);
    a.offsets = a.counts = a.order = a.inverse = &mark;
    a.ends = reinterpret_cast<int32_t*>(&mark);
    return a;
  }
  static PermuteArgs permute_args(const ChainProblem& p) {
    const GateArgs& gate = p.gate.args;
    static int64_t mark;
    PermuteArgs a;
    a.x = p.x.data(), a.rows = &mark, a.row_bytes = p.hidden * 2;
    a.tokens = gate.tokens, a.k = gate.k;
    a.capacity = dispatch_capacity(gate.tokens * gate.k, gate.experts, p.block);
    return a;
  }
  static CombineArgs combine_args(const ChainProblem& p) {
    const PermuteArgs permute = permute_args(p);
    static int64_t mark;
    CombineArgs a;
    a.residual = p.residual.data(), a.out = &mark, a.type = DType::kBFloat16;
    a.tokens = permute.tokens, a.k = permute.k, a.hidden = p.hidden, a.capacity = permute.capacity;
    return a;
  }

  template <class Use>
  void each(Use use) {
    use(gate), use(dispatch), use(permute), use(combine);
  }
};

using HostChain = Chain<HostCall>;

struct DeviceChain : Chain<DeviceCall, bool> {
  DeviceArray workspace;

  explicit DeviceChain(const ChainProblem& p)
      : Chain(p, true),
        workspace(cuda::dispatch_workspace_bytes(dispatch.args.slots, dispatch.args.experts), 0, 0) {
    dispatch.args.workspace = workspace.data();
  }
  void start(cuda::Stream stream) {
    each([&](auto& call) {
      cuda::load_kernels(experts_of(call.args));
      enqueue(call.args, stream);
    });
  }
  void upload(const ChainProblem& p) {
    gate.upload(with_outputs(p.gate));
    dispatch.reset();
    permute.upload(permute_args(p));
    combine.upload(combine_args(p));
  }
};

std::string compare_chain(DeviceChain& device, const ChainProblem& problem) {
  HostChain host(problem);
  host.each([](auto& call) { run_on_cpu(call.args); });
  std::string wrong = difference(device.gate.results(), host.gate.results);
  if (wrong.empty()) wrong = difference(device.dispatch.results(), host.dispatch.results);
  if (wrong.empty()) wrong = difference(device.permute.results(), host.permute.results);
  if (wrong.empty()) wrong = difference(device.combine.results(), host.combine.results);
  return wrong;
}

GateWish chain_wish(int number) {
  GateWish wish;
  const int tokens[] = {1, 17, 64, 300, 600};
  wish.experts = number % 2 == 0 ? 60 : 128;
  wish.k = 8, wish.tokens = tokens[number % 5];
  wish.type = DType::kBFloat16, wish.given = GivenMode::kNone;
  return wish;
}

void test_chain() {
  for (int number = 0; number < 10; ++number) {
    if (!wanted("chain", number)) continue;
    const ChainProblem problem(options.seed * 67'867'967 + static_cast<uint64_t>(number), chain_wish(number),
                               number % 3 == 0 ? 16 : 1);
    report(outcome([&] {
             DeviceChain device(problem);
             device.start(nullptr);
             return compare_chain(device, problem);
           }),
           about("chain", number) + describe(with_outputs(problem.gate)));
  }
}
// ---- what only a real device can show -------------------------------------------------------------------

#if !defined(MOE_ROUTE_EMULATOR)

class OwnStream {
 public:
  OwnStream() { check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreate"); }
  ~OwnStream() { cudaStreamDestroy(stream_); }
  OwnStream(const OwnStream&) = delete;
  OwnStream& operator=(const OwnStream&) = delete;
  operator cudaStream_t() const { return stream_; }

 private:
  cudaStream_t stream_ = nullptr;
};

// A captured chain, replayed with other logits, tables, tokens, counters and activations at the same
// addresses.
std::string replay_graph(uint64_t seed, GateWish wish) {
  const OwnStream stream;
  // The problems differ in all but their sizes: one call's options, other contents.
  ChainProblem problem(seed, wish, 16);
  DeviceChain device(problem);
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "cudaStreamBeginCapture");
  device.start(stream);
  check(cudaStreamEndCapture(stream, &graph), "cudaStreamEndCapture");
  check(cudaGraphInstantiate(&executable, graph, 0), "cudaGraphInstantiate");
  std::string wrong;
  for (uint64_t replay = 0; replay < 4 && wrong.empty(); ++replay) {
    if (replay > 0) {
      reroll(problem.gate, seed + replay);
      device.upload(problem);
    }
    check(cudaGraphLaunch(executable, stream), "cudaGraphLaunch");
    check(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
    wrong = compare_chain(device, problem);
    if (!wrong.empty()) wrong += " in replay " + std::to_string(replay);
  }
  cudaGraphExecDestroy(executable);
  cudaGraphDestroy(graph);
  return wrong;
}

void test_graphs() {
  for (int number = 0; number < 10; ++number) {
    if (!wanted("graph", number)) continue;
    const uint64_t seed = options.seed * 86'028'121 + static_cast<uint64_t>(number) * 16;
    report(outcome([&] { return replay_graph(seed, chain_wish(number)); }), about("graph", number));
  }
}

// Two chains at the same time, each on a stream and memory of its own.
void test_streams() {
  for (int number = 0; number < 5; ++number) {
    if (!wanted("streams", number)) continue;
    const uint64_t seed = options.seed * 104'395'301 + static_cast<uint64_t>(number);
    report(outcome([&] {
             const OwnStream one, other;
             const ChainProblem p(seed, chain_wish(number), 1), q(seed + 1, chain_wish(number + 1), 16);
             DeviceChain a(p), b(q);
             a.start(one), b.start(other);
             const std::string wrong = compare_chain(a, p);
             return wrong.empty() ? compare_chain(b, q) : wrong;
           }),
           about("streams", number));
  }
}

#endif

// ---- the program ----------------------------------------------------------------------------------------

bool read_options(int argc, char** argv) {
  for (int i = 1; i < argc; i += 2) {
    const std::string name = argv[i];
    if (i + 1 == argc) return false;
    const char* value = argv[i + 1];
    if (name == "--problems")
      options.problems = std::atoi(value);
    else if (name == "--seed")
      options.seed = std::strtoull(value, nullptr, 10);
    else if (name == "--only")
      options.only = value;
    else if (name == "--number")
      options.number = std::atoi(value);
    else if (name == "--determinism")
      options.determinism = std::max(1, std::atoi(value));
    else
      return false;
  }
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  if (!read_options(argc, argv)) {
    std::printf(
        "usage: device_test [--problems N] [--seed S] [--only "
        "gate|dispatch|permute|combine|experts|activation|chain|graph|streams] "
        "[--number I] [--determinism N]\n");
    return 2;
  }
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::printf("no CUDA device\n");
    return 77;
  }
  test_gate();
  test_dispatch();
  test_permute();
  test_combine();
  test_experts();
  test_activation();
  test_chain();
#if !defined(MOE_ROUTE_EMULATOR)
  test_graphs();
  test_streams();
#endif
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 && passed > 0 ? 0 : 1;
}
