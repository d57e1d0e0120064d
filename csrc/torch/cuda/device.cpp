#include "device.h"

#include <cuda_runtime.h>

#include <stdexcept>

namespace moe_route::cuda {
namespace {

DeviceFacts facts_of(int device) {
  DeviceFacts facts;
  cudaDeviceProp properties;
  if (cudaGetDeviceProperties(&properties, device) != cudaSuccess) return facts;
  facts.name = properties.name;
  facts.major = properties.major;
  facts.minor = properties.minor;
  return facts;
}

}  // namespace

RuntimeFacts runtime_facts() {
  RuntimeFacts facts;
  cudaRuntimeGetVersion(&facts.runtime);
  cudaDriverGetVersion(&facts.driver);
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess) {
    facts.problem = facts.driver == 0 ? "there is no CUDA driver" : cudaGetErrorString(status);
    cudaGetLastError();  // said here; the next launch shall not find it
    return facts;
  }
  for (int device = 0; device < count; ++device) facts.devices.push_back(facts_of(device));
  if (count == 0) facts.problem = "no device";
  return facts;
}

// torch has set the device through its own copy of the runtime. This module's copy is linked statically and
// usually sees that; it is told where it does not.
void make_current(int32_t device) {
  int current = -1;
  if (cudaGetDevice(&current) == cudaSuccess && current == device) return;
  const cudaError_t status = cudaSetDevice(device);
  if (status != cudaSuccess) {
    throw std::runtime_error("moe_route: cuda:" + std::to_string(device) +
                             " cannot be used: " + cudaGetErrorString(status));
  }
}

}  // namespace moe_route::cuda
