// launch.h over the emulated CUDA kernels: what the operators hand to a device runs here, on CPU tensors.
#include "launch.h"

#include <exception>
#include <stdexcept>
#include <string>

#include "emulator/launch.h"
#include "moe_route/cuda.h"
#include "self_check.h"

// For Python: from here on `machine` runs every launch; null: the emulator again.
extern "C" __attribute__((visibility("default"))) void moe_route_emulated_set_machine(
    emulator::Machine machine) {
  emulator::set_machine(machine);
}

// For Python: tune() of moe_route/cuda.h; the message of its error, or null.
extern "C" __attribute__((visibility("default"))) const char* moe_route_emulated_tune(const char* name,
                                                                                      int64_t value) {
  static thread_local std::string problem;
  try {
    moe_route::cuda::tune(name, value);
    return nullptr;
  } catch (const std::exception& error) {
    problem = error.what();
    return problem.c_str();
  }
}

// A line for each of them: name, usual value, least, most.
extern "C" __attribute__((visibility("default"))) const char* moe_route_emulated_tunables() {
  static const std::string table = [] {
    std::string lines;
    for (const auto& one : moe_route::cuda::tunables()) {
      lines += one.name;
      for (int64_t value : {one.usual, one.least, one.most}) lines += " " + std::to_string(value);
      lines += "\n";
    }
    return lines;
  }();
  return table.c_str();
}

// For Python: self_check.h.
extern "C" {
__attribute__((visibility("default"))) void moe_route_emulated_set_required(bool required) {
  moe_route::self_check::set_required(required);
}
__attribute__((visibility("default"))) void moe_route_emulated_set_allowed_here(bool allowed) {
  moe_route::self_check::set_allowed_here(allowed);
}
__attribute__((visibility("default"))) void moe_route_emulated_mark(int32_t device, int32_t experts) {
  moe_route::self_check::mark(device, experts);
}
__attribute__((visibility("default"))) void moe_route_emulated_withdraw(const char* kernels) {
  moe_route::self_check::withdraw(kernels);
}
__attribute__((visibility("default"))) void moe_route_emulated_report(const char* problem) {
  moe_route::self_check::report(problem);
}
__attribute__((visibility("default"))) void moe_route_emulated_forget() { moe_route::self_check::forget(); }
}

namespace moe_route::launch {

void gate(const GateArgs& args, const Place&) { cuda::gate(args, nullptr); }

int64_t dispatch_workspace_bytes(const DispatchArgs& args, const Place&) {
  return cuda::dispatch_workspace_bytes(args.slots, args.experts);
}

void dispatch(const DispatchArgs& args, const Place&) { cuda::dispatch(args, nullptr); }
void permute(const PermuteArgs& args, const Place&) { cuda::permute(args, nullptr); }
void combine(const CombineArgs& args, const Place&) { cuda::combine(args, nullptr); }
void expert_products(const ExpertProductArgs* products, int count, const Place&) {
  for (int i = 0; i < count; ++i) cuda::expert_product(products[i], nullptr);
}
void pack_expert_weight(const ExpertPackArgs&) {
  throw std::runtime_error("weights are packed for a CPU only; the emulated device reads them as they are");
}
void expert_activation(const ExpertActivationArgs& args, const Place&) {
  cuda::expert_activation(args, nullptr);
}

}  // namespace moe_route::launch
