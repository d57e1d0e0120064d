// What the module knows of CUDA devices by itself, without torch: device.cpp asks the CUDA runtime,
// absent.cpp stands in where the kernels were not built. Exactly one of the two is linked.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace moe_route::cuda {

struct DeviceFacts {
  std::string name;
  int major = 0, minor = 0;  // compute capability
};

struct RuntimeFacts {
  int runtime = 0, driver = 0;  // 1000 * major + 10 * minor; 0: none
  std::vector<DeviceFacts> devices;
  std::string problem;  // why there are no devices, empty where there are
};

// Never throws: no driver and no device are answers.
RuntimeFacts runtime_facts();

// Makes `device` the one that this module's CUDA runtime launches on, for the calling thread.
void make_current(int32_t device);

}  // namespace moe_route::cuda
