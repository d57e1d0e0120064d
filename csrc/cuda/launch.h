// What every kernel file needs to launch: one place for refused launches and for facts of the device.
//
// Launches go through cudaLaunchKernelEx, plain C++ where <<<>>> is not, so that a host compiler can build
// the same files against the emulator of tests/emulator. Dynamic shared memory has one name in all kernels.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "moe_route/cuda.h"
#include "tunables.h"

extern __shared__ __align__(16) unsigned char moe_route_shared[];

namespace moe_route::cuda {

// moe_route_shared, for kernels that access it in many places. From compute capability 9.0 on, ptxas makes the
// address anew for every access (a read of SR_CgaCtaId, about 40 cycles each time); it cannot make anew what
// comes out of a shuffle. To be called by whole warps.
__device__ __forceinline__ unsigned char* shared_memory() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(moe_route_shared));
  return static_cast<unsigned char*>(__cvta_shared_to_generic(__shfl_sync(0xffffffffu, address, 0)));
#else
  return moe_route_shared;
#endif
}

// To be called by every thread of every kernel before it touches global memory and before it returns. A kernel may be
// launched while the kernels before it are still running (may_overlap below): this waits until they are complete and
// what they wrote is seen. Waiting before the first write matters as much, since torch hands memory out again that an
// earlier kernel still reads. From here on the next kernel may begin in turn, and waits at its own call: so its
// launch and what it does before that call take no time of their own.
__device__ __forceinline__ void wait_for_earlier_kernels() {
#if defined(MOE_ROUTE_EMULATOR)
  emulator::wait_for_earlier_grids();
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string("moe_route: the CUDA ") + what +
                             " failed: " + cudaGetErrorString(status));
  }
}

// A fact of the current device; asking costs well under a microsecond and does not wait for it.
inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device), "query of the device");
  check(cudaDeviceGetAttribute(&value, attribute, device), "query of the device");
  return value;
}

// Dynamic shared memory that a block may ask for. The kernels' own static arrays stay below 1 KiB.
inline constexpr int kStaticSharedBytes = 1024;
inline int most_shared_bytes() {
  return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) - kStaticSharedBytes;
}

// Whether a kernel may begin while the ones before it are running: where that is asked for, and the code that this
// device runs has the wait (compiled for compute capability 9.0 or newer, as PTX at least).
template <class... Parameters>
bool may_overlap(void (*kernel)(Parameters...)) {
  if (!tuned(Tunable::kPdl) || device_attribute(cudaDevAttrComputeCapabilityMajor) < 9) return false;
  cudaFuncAttributes facts;
  check(cudaFuncGetAttributes(&facts, kernel), "query of a kernel");
  return facts.ptxVersion >= 90;
}

// Loads a kernel onto the current device; otherwise its first launch does.
template <class... Parameters>
void load(void (*kernel)(Parameters...)) {
  cudaFuncAttributes facts;
  check(cudaFuncGetAttributes(&facts, kernel), "loading of a kernel");
}

template <class... Parameters, class... Arguments>
void launch(const char* what, void (*kernel)(Parameters...), int64_t blocks, dim3 threads,
            size_t shared_bytes, Stream stream, const Arguments&... arguments) {
  // More than 48 KiB, static arrays included, has to be asked for. Always for all there is: a limit of the
  // launch's own size could be lowered by another thread before the launch.
  if (shared_bytes > 48 * 1024 - kStaticSharedBytes) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most_shared_bytes()),
          what);
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = threads;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute overlap = {};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &overlap;
  config.numAttrs = may_overlap(kernel) ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, arguments...), what);
}

}  // namespace moe_route::cuda
