// A build without CUDA kernels: every launch says so, and what to do.
#include <stdexcept>

#include "device.h"
#include "moe_route/cuda.h"

namespace moe_route::cuda {
namespace {

[[noreturn]] void refuse() {
  throw std::runtime_error(
      "this build of moe_route has no CUDA kernels. Install it again from its sources, with nvcc on the "
      "PATH: MOE_ROUTE_CUDA=ON pip install --force-reinstall --no-deps .");
}

}  // namespace

void gate(const GateArgs&, Stream) { refuse(); }
int64_t dispatch_workspace_bytes(int64_t, int32_t) { refuse(); }
void dispatch(const DispatchArgs&, Stream) { refuse(); }
void permute(const PermuteArgs&, Stream) { refuse(); }
void combine(const CombineArgs&, Stream) { refuse(); }
void expert_product(const ExpertProductArgs&, Stream) { refuse(); }
void expert_activation(const ExpertActivationArgs&, Stream) { refuse(); }
void load_kernels(int32_t) { refuse(); }
std::vector<TunableFacts> tunables() { return {}; }
void tune(const std::string&, int64_t) { refuse(); }

RuntimeFacts runtime_facts() { return {0, 0, {}, "this build has no CUDA kernels"}; }
void make_current(int32_t) { refuse(); }

}  // namespace moe_route::cuda
