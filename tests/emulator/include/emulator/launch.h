// Launching: the configuration is refused where hardware would refuse it, then every thread of the grid runs
// before the launch returns. A kernel that breaks a rule makes the launch throw emulator::Fault.
#pragma once
#include <cstdint>
#include <type_traits>
#include <utility>

#include "fault.h"
#include "host.h"
#include "language.h"

enum cudaLaunchAttributeID {
  cudaLaunchAttributeIgnore = 0,
  cudaLaunchAttributeProgrammaticStreamSerialization = 6,
  cudaLaunchAttributePriority = 8,
};
union cudaLaunchAttributeValue {
  int programmaticStreamSerializationAllowed;
  int priority;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributePreferredSharedMemoryCarveout = 9,
};

struct cudaFuncAttributes {
  int maxThreadsPerBlock;
  int ptxVersion;
};

namespace emulator {

cudaError_t load(cudaFuncAttributes* facts, const void* kernel);
cudaError_t set_attribute(const void* kernel, cudaFuncAttribute attribute, int value);
cudaError_t max_active_blocks(int* blocks, int threads, size_t shared_bytes);
// A parameter of a kernel, as it lies in memory.
struct Parameter {
  const void* bytes;
  uint64_t size, alignment;
};
// A launch that was not refused, in plain C types. The parameters live until the call returns.
struct Launch {
  const void* kernel;
  uint64_t blocks[3], threads[3], shared_bytes;  // dynamic shared memory
  const Parameter* parameters;
  uint64_t parameter_count;
};
// Runs a whole launch in place of the emulator; another answer than 0 is the launch's error.
using Machine = int (*)(const Launch*);
void set_machine(Machine machine);  // null: the emulator again

// Runs body(context) once for each thread of the grid.
cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, const Parameter* parameters,
                   uint64_t parameter_count, void (*body)(void*), void* context);

template <class... Parameters>
const void* address_of(void (*kernel)(Parameters...)) {
  return reinterpret_cast<const void*>(kernel);
}

}  // namespace emulator

// Loads the kernel, as on a device that loads lazily.
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* facts, Kernel* kernel) {
  return emulator::load(facts, emulator::address_of(kernel));
}

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute attribute, int value) {
  return emulator::set_attribute(emulator::address_of(kernel), attribute, value);
}

template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel*, int threads,
                                                          size_t shared_bytes) {
  return emulator::max_active_blocks(blocks, threads, shared_bytes);
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  static_assert((std::is_trivially_copyable_v<Parameters> && ...),
                "parameters are copied to the device as bytes");
  static_assert((size_t{0} + ... + sizeof(Parameters)) <= 4096, "more parameters than every device takes");
  return [config,
          kernel](Parameters... parameters) {  // converted once, as for a call; copied for every thread
    auto thread = [&] { kernel(parameters...); };
    const emulator::Parameter as_bytes[] = {{&parameters, sizeof(Parameters), alignof(Parameters)}..., {}};
    return emulator::launch(
        *config, emulator::address_of(kernel), as_bytes, sizeof...(Parameters),
        [](void* context) { (*static_cast<decltype(thread)*>(context))(); }, &thread);
  }(std::forward<Arguments>(arguments)...);
}
