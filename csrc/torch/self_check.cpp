#include "self_check.h"

#include <torch/csrc/stable/ops.h>

#include <array>
#include <atomic>
#include <stdexcept>

#include "arguments.h"
#include "moe_route/gate.h"

namespace moe_route::self_check {
namespace {

constexpr int32_t kDevices = 64;
constexpr const char* kNames[] = {"gate",    "dispatch",    "permute",
                                  "combine", "expert_rows", "expert_activation"};
constexpr size_t kKinds = std::size(kNames);
constexpr size_t kWords = kMaxExperts / 64 + 1;  // a bit for each number of experts, and for 0

std::array<std::array<std::atomic<uint64_t>, kWords>, kDevices> checked{};
std::array<std::atomic<bool>, kKinds> withdrawn{};
#ifdef MOE_ROUTE_EMULATED
constexpr const char* kCheck = "moe_route_emulated::check_kernels";
std::atomic<bool> required{false};  // a test of the check asks for it
#else
constexpr const char* kCheck = "moe_route::check_kernels";
std::atomic<bool> required{true};
#endif
thread_local bool allowed_here = false;
thread_local std::string problem;

bool is_checked(int32_t device, int32_t experts) {
  return checked[device][experts / 64].load(std::memory_order_acquire) >> (experts % 64) & 1;
}

// The first tensor of a call, whose reference stays with the stack.
AtenTensorHandle leading_tensor(StableIValue* stack) {
  return torch::stable::detail::to<AtenTensorHandle>(stack[0]);
}

int32_t index_of([[maybe_unused]] AtenTensorHandle tensor) {
#ifdef MOE_ROUTE_EMULATED
  return 0;  // a CPU tensor has none
#else
  int32_t index = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensor, &index));
  return index;
#endif
}

// Experts that the kernels of a call depend on; 0 where they do not, or where the call will be refused anyway.
int32_t experts_of(Kernels kernels, AtenTensorHandle tensor, StableIValue* stack) {
  int64_t experts = 0, dimensions = 0;
  if (kernels == Kernels::kDispatch) {
    experts = torch::stable::detail::to<int64_t>(stack[1]);
  } else if (kernels == Kernels::kGate) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(tensor, &dimensions));
    if (dimensions == 2) TORCH_ERROR_CODE_CHECK(aoti_torch_get_size(tensor, 1, &experts));
  }
  return experts < 1 || experts > kMaxExperts ? 0 : static_cast<int32_t>(experts);
}

void check(int32_t device, int32_t experts) {
  StableIValue stack[2] = {torch::stable::detail::from(int64_t{device}),
                           torch::stable::detail::from(int64_t{experts})};
  problem.clear();
  const auto failed = torch_call_dispatcher(kCheck, "", stack, TORCH_ABI_VERSION);
  if (!problem.empty()) throw std::runtime_error(problem);
  TORCH_ERROR_CODE_CHECK(failed);
}

bool is_for_torch(Kernels kernels, AtenTensorHandle tensor, StableIValue* stack) {
  int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor, &dtype));
  if (kernels == Kernels::kGate && dtype == aoti_torch_dtype_float64()) return true;
  const std::atomic<bool>& gone = withdrawn[static_cast<size_t>(kernels)];
  if (gone.load(std::memory_order_acquire)) return true;
  if (allowed_here || !required.load(std::memory_order_relaxed)) return false;
  const int32_t device = index_of(tensor), experts = experts_of(kernels, tensor, stack);
  if (device >= kDevices) return true;
  if (!is_checked(device, experts)) check(device, experts);
  return gone.load(std::memory_order_acquire);
}

}  // namespace

bool is_for_torch(Kernels kernels, StableIValue* stack) {
  return is_for_torch(kernels, leading_tensor(stack), stack);
}

bool is_list_for_torch(Kernels kernels, StableIValue* stack) {
  const auto list = torch::stable::detail::to<StableListHandle>(stack[0]);
  size_t size = 0;
  TORCH_ERROR_CODE_CHECK(torch_list_size(list, &size));
  for (size_t i = 0; i < size; ++i) {
    StableIValue item;  // its reference stays with the list
    TORCH_ERROR_CODE_CHECK(torch_list_get_item(list, i, &item));
    if (is_for_torch(kernels, torch::stable::detail::to<AtenTensorHandle>(item), stack)) return true;
  }
  return false;
}

void call_torch(const char* operation, StableIValue* stack) {
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(operation, "", stack, TORCH_ABI_VERSION));
}

void set_required(bool wanted) { required = wanted; }
void set_allowed_here(bool allowed) { allowed_here = allowed; }

void mark(int32_t device, int32_t experts) {
  if (device < 0 || device >= kDevices || experts < 0 || experts > kMaxExperts)
    throw std::invalid_argument("no such kernels");
  checked[device][experts / 64].fetch_or(uint64_t{1} << (experts % 64), std::memory_order_release);
}

void withdraw(const std::string& kernels) {
  for (size_t kind = 0; kind < kKinds; ++kind) {
    if (kernels == kNames[kind]) return withdrawn[kind].store(true, std::memory_order_release);
  }
  throw std::invalid_argument("no kernels '" + kernels + "'");
}

void report(const std::string& words) { problem = words; }

void forget() {
  for (auto& device : checked) {
    for (auto& word : device) word = 0;
  }
  for (auto& gone : withdrawn) gone = false;
}

}  // namespace moe_route::self_check
