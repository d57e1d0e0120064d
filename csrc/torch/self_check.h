// Which calls on a device torch serves in the place of a kernel, and which kernels wait for their first check there.
//
// The first call of a kernel on a device runs the operator `check_kernels` of this namespace, which compares the kernels
// with torch (moe_route/ops/self_check.py) and answers by `mark` or `withdraw`. What is withdrawn, and float64 logits, are
// handed on to the operators of `moe_route_torch`. Afterwards a call pays for two loads.
#pragma once
#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <string>

namespace moe_route::self_check {

// Operators that share kernels are checked and withdrawn together.
enum class Kernels { kGate, kDispatch, kPermute, kCombine, kExpertRows, kExpertActivation };

// Whether the call whose boxed arguments are in `stack` is torch's. std::runtime_error where a check could not be made.
bool is_for_torch(Kernels kernels, StableIValue* stack);
// The same where the first argument is a list of tensors, each with its experts.
bool is_list_for_torch(Kernels kernels, StableIValue* stack);

// Runs `operation` of the namespace moe_route_torch on the boxed arguments.
void call_torch(const char* operation, StableIValue* stack);

// Whether kernels must be checked before they serve; they must.
void set_required(bool required);
// Whether calls of this thread run kernels that were not checked: those that check them.
void set_allowed_here(bool allowed);
// Those of `device` for this many experts (0: those that do not depend on it) may serve.
void mark(int32_t device, int32_t experts);
// By the name of the kernels: "gate", "dispatch", ... std::invalid_argument for another name.
void withdraw(const std::string& kernels);
// Why a check could not be made: the call that asked for it fails with these words.
void report(const std::string& problem);
// Nothing is checked, withdrawn or reported any more.
void forget();

}  // namespace moe_route::self_check

// A boxed operator of a device: `function`, or torch's.
#define MOE_ROUTE_ON_DEVICE_BY(decides, function, kernels)                                    \
  [](StableIValue* stack, uint64_t inputs, uint64_t outputs) {                                \
    if (::moe_route::self_check::decides(::moe_route::self_check::Kernels::kernels, stack)) { \
      return ::moe_route::self_check::call_torch("moe_route_torch::" #function, stack);       \
    }                                                                                         \
    TORCH_BOX (&function)(stack, inputs, outputs);                                            \
  }
#define MOE_ROUTE_ON_DEVICE(function, kernels) MOE_ROUTE_ON_DEVICE_BY(is_for_torch, function, kernels)
