// Checks a launch as hardware would and spreads its blocks over OS threads.
#include "emulator/launch.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <numeric>
#include <random>
#include <thread>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "block.h"
#include "errors.h"
#include "shared_memory.h"

namespace emulator {
namespace {

// Dynamic shared memory that was asked for, by kernel.
std::mutex limits_mutex;
std::unordered_map<const void*, size_t>& limits() {
  static std::unordered_map<const void*, size_t> map;
  return map;
}

// Kernels that cudaFuncGetAttributes has loaded.
std::mutex loaded_mutex;
std::unordered_set<const void*>& loaded() {
  static std::unordered_set<const void*> set;
  return set;
}

bool is_loaded(const void* kernel) {
  const std::lock_guard lock(loaded_mutex);
  return loaded().count(kernel) > 0;
}

size_t shared_limit(const void* kernel) {
  const std::lock_guard lock(limits_mutex);
  const auto found = limits().find(kernel);
  return found == limits().end() ? kSharedWithoutAsking : found->second;
}

// What runs launches in place of the emulator.
std::atomic<Machine> machine{nullptr};

bool overlaps(const cudaLaunchConfig_t& config) {
  return std::any_of(config.attrs, config.attrs + config.numAttrs, [](const cudaLaunchAttribute& attribute) {
    return attribute.id == cudaLaunchAttributeProgrammaticStreamSerialization &&
           attribute.val.programmaticStreamSerializationAllowed != 0;
  });
}

cudaError_t check(const cudaLaunchConfig_t& config, const void* kernel) {
  const dim3 g = config.gridDim, b = config.blockDim;
  const uint64_t threads = uint64_t{b.x} * b.y * b.z;
  const bool grid_fits = g.x > 0 && g.y > 0 && g.z > 0 && g.x <= 0x7fffffff && g.y <= 65535 && g.z <= 65535;
  const bool block_fits = threads > 0 && threads <= 1024 && b.x <= 1024 && b.y <= 1024 && b.z <= 64;
  if (!grid_fits || !block_fits) return cudaErrorInvalidConfiguration;
  if (kernel == nullptr) return cudaErrorInvalidDeviceFunction;
  return config.dynamicSmemBytes <= shared_limit(kernel) ? cudaSuccess : cudaErrorInvalidValue;
}

// Hands out the blocks of a grid in the order of the settings, to any number of OS threads.
class Blocks {
 public:
  explicit Blocks(const Grid& grid) : grid_(grid), count_(uint64_t{grid.grid.x} * grid.grid.y * grid.grid.z) {
    if (grid.settings.order != Order::kRandom) return;
    shuffled_.resize(count_);
    std::iota(shuffled_.begin(), shuffled_.end(), uint64_t{0});
    std::shuffle(shuffled_.begin(), shuffled_.end(), std::mt19937_64(grid.settings.seed));
  }

  uint64_t count() const { return count_; }

  void run() {
    for (uint64_t i; (i = next_.fetch_add(1)) < count_;) {
      try {
        this_thread_block().run(grid_, number(i));
      } catch (...) {
        next_.store(count_);  // the others begin no more
        const std::lock_guard lock(mutex_);
        if (!failure_) failure_ = std::current_exception();
      }
    }
  }

  void rethrow() const {
    if (failure_) std::rethrow_exception(failure_);
  }

 private:
  uint64_t number(uint64_t i) const {
    if (!shuffled_.empty()) return shuffled_[i];
    return grid_.settings.order == Order::kReverse ? count_ - 1 - i : i;
  }

  const Grid& grid_;
  const uint64_t count_;
  std::vector<uint64_t> shuffled_;
  std::atomic<uint64_t> next_{0};
  std::mutex mutex_;
  std::exception_ptr failure_;
};

void run(const Grid& grid) {
  Blocks blocks(grid);
  const auto helpers =
      std::min<uint64_t>(static_cast<uint64_t>(grid.settings.os_threads), blocks.count()) - 1;
  {
    std::vector<std::jthread> threads;
    for (uint64_t i = 0; i < helpers; ++i) threads.emplace_back([&blocks] { blocks.run(); });
    blocks.run();
  }
  blocks.rethrow();
}

}  // namespace

cudaError_t load(cudaFuncAttributes* facts, const void* kernel) {
  if (facts == nullptr) return remember(cudaErrorInvalidValue);
  if (kernel == nullptr) return remember(cudaErrorInvalidDeviceFunction);
  facts->maxThreadsPerBlock = 1024, facts->ptxVersion = 90;
  const std::lock_guard lock(loaded_mutex);
  loaded().insert(kernel);
  return cudaSuccess;
}

cudaError_t set_attribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (kernel == nullptr) return remember(cudaErrorInvalidDeviceFunction);
  if (attribute == cudaFuncAttributePreferredSharedMemoryCarveout) {
    return remember(value >= -1 && value <= 100 ? cudaSuccess : cudaErrorInvalidValue);
  }
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 ||
      static_cast<size_t>(value) > kSharedPerBlock) {
    return remember(cudaErrorInvalidValue);
  }
  const std::lock_guard lock(limits_mutex);
  limits()[kernel] = static_cast<size_t>(value);
  return cudaSuccess;
}

cudaError_t max_active_blocks(int* blocks, int threads, size_t shared_bytes) {
  if (blocks == nullptr || threads < 1) return remember(cudaErrorInvalidValue);
  const bool runs = threads <= 1024 && shared_bytes <= kSharedPerBlock;
  const auto by_shared = static_cast<int>(kSharedPerMultiprocessor / (shared_bytes + kSharedReserved));
  const int warps = (threads + 31) / 32;
  *blocks = runs ? std::min({by_shared, 64 / warps, 32}) : 0;
  return cudaSuccess;
}

void set_machine(Machine other) { machine.store(other); }

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, const Parameter* parameters,
                   uint64_t parameter_count, void (*body)(void*), void* context) {
  const cudaError_t refused = check(config, kernel);
  if (refused != cudaSuccess) return remember(refused);
  const Settings settings = read_settings();
  if (settings.loaded_only && !is_loaded(kernel)) return remember(cudaErrorStreamCaptureUnsupported);
  if (const Machine other = machine.load()) {
    const dim3 g = config.gridDim, b = config.blockDim;
    const Launch facts = {kernel,     {g.x, g.y, g.z}, {b.x, b.y, b.z}, config.dynamicSmemBytes,
                          parameters, parameter_count};
    return remember(static_cast<cudaError_t>(other(&facts)));
  }
  run(Grid{config.gridDim, config.blockDim, config.dynamicSmemBytes, overlaps(config), settings, body,
           context});
  return cudaSuccess;
}

}  // namespace emulator
