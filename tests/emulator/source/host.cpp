#include "emulator/host.h"

#include <chrono>
#include <cstdlib>
#include <cstring>

#include "errors.h"
#include "settings.h"
#include "shared_memory.h"

struct CUstream_st {};
struct CUevent_st {
  std::chrono::steady_clock::time_point time;
};

// ---- errors ---------------------------------------------------------------------------------------------

namespace {

constinit thread_local cudaError_t last_error = cudaSuccess;

struct ErrorText {
  cudaError_t error;
  const char *name, *text;
};
constexpr ErrorText kErrors[] = {
    {cudaSuccess, "cudaSuccess", "no error"},
    {cudaErrorInvalidValue, "cudaErrorInvalidValue", "invalid argument"},
    {cudaErrorMemoryAllocation, "cudaErrorMemoryAllocation", "out of memory"},
    {cudaErrorInvalidConfiguration, "cudaErrorInvalidConfiguration", "invalid configuration argument"},
    {cudaErrorInvalidDeviceFunction, "cudaErrorInvalidDeviceFunction", "invalid device function"},
    {cudaErrorInvalidDevice, "cudaErrorInvalidDevice", "invalid device ordinal"},
    {cudaErrorNotSupported, "cudaErrorNotSupported", "operation not supported"},
};
constexpr ErrorText kUnknown = {cudaErrorNotSupported, "unrecognized error code", "unrecognized error code"};

const ErrorText& find(cudaError_t error) {
  for (const ErrorText& known : kErrors) {
    if (known.error == error) return known;
  }
  return kUnknown;
}

}  // namespace

namespace emulator {

cudaError_t remember(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

}  // namespace emulator

using emulator::remember;

const char* cudaGetErrorString(cudaError_t error) { return find(error).text; }
const char* cudaGetErrorName(cudaError_t error) { return find(error).name; }
cudaError_t cudaPeekAtLastError() { return last_error; }
cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}

// ---- device ---------------------------------------------------------------------------------------------

cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int device) { return remember(device == 0 ? cudaSuccess : cudaErrorInvalidDevice); }
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device != 0) return remember(cudaErrorInvalidDevice);
  const auto answer = [value](size_t x) { return *value = static_cast<int>(x), cudaSuccess; };
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock:
      return answer(1024);
    case cudaDevAttrMaxGridDimX:
      return answer(0x7fffffff);
    case cudaDevAttrMaxSharedMemoryPerBlock:
      return answer(emulator::kSharedWithoutAsking);
    case cudaDevAttrWarpSize:
      return answer(32);
    case cudaDevAttrMultiProcessorCount:
      return answer(static_cast<size_t>(emulator::read_settings().multiprocessors));
    case cudaDevAttrL2CacheSize:
      return answer(50 << 20);
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      return answer(2048);
    case cudaDevAttrComputeCapabilityMajor:
      return answer(9);
    case cudaDevAttrComputeCapabilityMinor:
      return answer(0);
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      return answer(emulator::kSharedPerMultiprocessor);
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      return answer(emulator::kSharedPerBlock);
    case cudaDevAttrMaxBlocksPerMultiprocessor:
      return answer(32);
    case cudaDevAttrReservedSharedMemoryPerBlock:
      return answer(emulator::kSharedReserved);
  }
  return remember(cudaErrorInvalidValue);
}

// ---- memory ---------------------------------------------------------------------------------------------

namespace emulator {

cudaError_t allocate(void** address, size_t bytes) {
  *address = nullptr;
  if (bytes == 0) return cudaSuccess;
  if (posix_memalign(address, 256, bytes) != 0) return remember(cudaErrorMemoryAllocation);
  std::memset(*address, 0xa5, bytes);
  return cudaSuccess;
}

}  // namespace emulator

cudaError_t cudaFree(void* address) { return std::free(address), cudaSuccess; }
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  if (bytes > 0) std::memcpy(to, from, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t) {
  return cudaMemcpy(to, from, bytes, kind);
}
cudaError_t cudaMemset(void* address, int value, size_t bytes) {
  if (bytes > 0) std::memset(address, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* address, int value, size_t bytes, cudaStream_t) {
  return cudaMemset(address, value, bytes);
}

// ---- streams and events ---------------------------------------------------------------------------------

cudaError_t cudaStreamCreate(cudaStream_t* stream) { return *stream = new CUstream_st, cudaSuccess; }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) { return cudaStreamCreate(stream); }
cudaError_t cudaStreamDestroy(cudaStream_t stream) { return delete stream, cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return cudaSuccess; }
cudaError_t cudaEventCreate(cudaEvent_t* event) { return *event = new CUevent_st, cudaSuccess; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) { return cudaEventCreate(event); }
cudaError_t cudaEventDestroy(cudaEvent_t event) { return delete event, cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t) {
  event->time = std::chrono::steady_clock::now();
  return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t end) {
  *milliseconds = std::chrono::duration<float, std::milli>(end->time - start->time).count();
  return cudaSuccess;
}
