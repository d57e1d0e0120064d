#include "launch.h"

#include <torch/csrc/stable/accelerator.h>

#include <stdexcept>

#include "cpu_threads.h"
#include "cuda/device.h"
#include "moe_route/cuda.h"

// CUDA builds of torch have it, CPU builds do not: weak, so that one module loads beside both.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device,
                                                                                   void** stream);

namespace moe_route::launch {
namespace {

// The tensors' device made current while this lives, and torch's current stream there.
class OnDevice {
 public:
  explicit OnDevice(const Place& place) : guard_(place.index) {
    cuda::make_current(place.index);
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(place.index, &stream));
    stream_ = static_cast<cuda::Stream>(stream);
  }
  cuda::Stream stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cuda::Stream stream_ = nullptr;
};

}  // namespace

void gate(const GateArgs& args, const Place& place) {
  if (place.cpu) return cpu::launch_gate(args);
  cuda::gate(args, OnDevice(place).stream());
}

int64_t dispatch_workspace_bytes(const DispatchArgs& args, const Place& place) {
  return place.cpu ? 0 : cuda::dispatch_workspace_bytes(args.slots, args.experts);
}

void dispatch(const DispatchArgs& args, const Place& place) {
  if (place.cpu) return cpu::launch_dispatch(args);
  cuda::dispatch(args, OnDevice(place).stream());
}

void permute(const PermuteArgs& args, const Place& place) {
  if (place.cpu) return cpu::launch_permute(args);
  cuda::permute(args, OnDevice(place).stream());
}

void combine(const CombineArgs& args, const Place& place) {
  if (place.cpu) return cpu::launch_combine(args);
  cuda::combine(args, OnDevice(place).stream());
}

void expert_products(const ExpertProductArgs* products, int count, const Place& place) {
  if (place.cpu) return cpu::launch_expert_products(products, count);
  const OnDevice device(place);
  for (int i = 0; i < count; ++i) cuda::expert_product(products[i], device.stream());
}

void pack_expert_weight(const ExpertPackArgs& args) { cpu::launch_expert_pack(args); }

void expert_activation(const ExpertActivationArgs& args, const Place& place) {
  if (place.cpu) return cpu::launch_expert_activation(args);
  cuda::expert_activation(args, OnDevice(place).stream());
}

void load_kernels(int32_t index, int32_t experts) {
  const torch::stable::accelerator::DeviceGuard guard(index);
  cuda::make_current(index);
  cuda::load_kernels(experts);
}

}  // namespace moe_route::launch
