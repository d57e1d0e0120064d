// The operators as kernels of a device, for the module (CUDA) and for the tests (the emulated device).
#pragma once
#include <torch/csrc/stable/library.h>

namespace moe_route {

using torch::stable::detail::StableLibrary;

void implement_on_device(StableLibrary& m);
void implement_experts_on_device(StableLibrary& m);

}  // namespace moe_route
