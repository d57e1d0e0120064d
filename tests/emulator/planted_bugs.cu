// A kernel that is sound, and the same kernel with one bug planted. The emulator must catch every bug and let
// the sound kernel pass, whatever the order of threads. CMakeLists.txt says what must be printed for each.
//
//   planted_bugs sound         the sound kernel, on a grid
//   planted_bugs <name>        one bug; then the sound kernel, for a caught bug must leave nothing behind
#include <cuda_runtime.h>

#include <cstdio>
#include <cstring>
#include <string>

extern __shared__ __align__(16) unsigned char moe_route_shared[];

namespace {

enum class Bug {
  kNone,
  kMissingBarrier,
  kMissingWarpBarrier,
  kSharedOverrun,
  kStaticSharedOverrun,
  kGlobalOverrun,
  kDivergentBarriers,
  kUnequalVotes,
  kReturnedLane,
  kReturnBeforeShuffle,
  kDivergentShuffle,
  kShuffleOutsideMask,
  kCallerOutsideMask,
  kDifferentCollectives,
  kNeverWritten,
  kDeadlock,
  kTrap,
  kMissingWait,
};

constexpr int kThreads = 96;

// out[t] = mirrored number of t + that of t ^ 1, where the mirrored number of t is kThreads - 1 - t.
template <Bug kBug>
__global__ void mirror_and_pair(int* out) {
  if (kBug != Bug::kMissingWait || threadIdx.x >= 32) emulator::wait_for_earlier_grids();
  int* numbers = reinterpret_cast<int*>(moe_route_shared);
  int* pairs = numbers + kThreads;
  __shared__ int copies[kThreads];
  out += blockIdx.x * kThreads;
  const int t = threadIdx.x, lane = t % 32;
  if (kBug != Bug::kNeverWritten || t != 40) numbers[t] = t;
  copies[kBug == Bug::kStaticSharedOverrun ? t + 1 : t] = t;

  if (kBug == Bug::kDivergentBarriers && t < 32) {
    __syncthreads();
  } else if (kBug == Bug::kUnequalVotes && t < 32) {
    __syncthreads_or(1);
  } else if (kBug != Bug::kMissingBarrier) {
    __syncthreads();
  }
  int mirrored = numbers[kThreads - 1 - t];
  if (copies[kThreads - 1 - t] != mirrored) mirrored = -1;
  pairs[kBug == Bug::kSharedOverrun ? t + 1 : t] = mirrored;
  if (kBug != Bug::kMissingWarpBarrier) __syncwarp();

  if (kBug == Bug::kReturnedLane && t == 50) return;
  if (kBug == Bug::kReturnBeforeShuffle && lane == 31) return;
  if (kBug == Bug::kDivergentShuffle && lane % 2 == 1) mirrored = __shfl_sync(0xffffffffu, mirrored, lane);
  if (kBug == Bug::kDeadlock && lane < 16) __syncthreads();
  if (kBug == Bug::kTrap && t == 95) __trap();
  if (kBug == Bug::kDifferentCollectives && lane < 16) __syncwarp();
  unsigned mask = 0xffffffffu;
  if (kBug == Bug::kShuffleOutsideMask) mask = lane < 16 ? 0x0000ffffu : 0xffff0000u;
  if (kBug == Bug::kCallerOutsideMask) mask = 0x0000ffffu;
  const int apart = kBug == Bug::kShuffleOutsideMask ? 16 : 1;
  int sum = mirrored + __shfl_xor_sync(mask, mirrored, apart);
  if (pairs[t ^ 1] != sum - mirrored) sum = -1;
  out[kBug == Bug::kGlobalOverrun ? t + 1 : t] = sum;
}

enum class Outcome { kRight, kWrong, kFault, kRefused };

template <Bug kBug>
Outcome run(unsigned blocks) {
  int* out = nullptr;
  cudaMalloc(&out, blocks * kThreads * sizeof(int));
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks), config.blockDim = dim3(kThreads),
  config.dynamicSmemBytes = 2 * kThreads * sizeof(int);
  cudaLaunchAttribute overlap = {};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &overlap, config.numAttrs = 1;
  Outcome outcome = Outcome::kRight;
  try {
    if (cudaLaunchKernelEx(&config, mirror_and_pair<kBug>, out) != cudaSuccess) outcome = Outcome::kRefused;
  } catch (const emulator::Fault& fault) {
    std::printf("%s\n", fault.what());
    outcome = Outcome::kFault;
  }
  for (unsigned i = 0; outcome == Outcome::kRight && i < blocks * kThreads; ++i) {
    const int t = static_cast<int>(i % kThreads);
    if (out[i] != 2 * (kThreads - 1) - t - (t ^ 1)) outcome = Outcome::kWrong;
  }
  cudaFree(out);
  return outcome;
}

struct Planted {
  const char* name;
  Outcome (*run)(unsigned blocks);
};
constexpr Planted kPlanted[] = {
    {"missing_barrier", run<Bug::kMissingBarrier>},
    {"missing_warp_barrier", run<Bug::kMissingWarpBarrier>},
    {"shared_overrun", run<Bug::kSharedOverrun>},
    {"static_shared_overrun", run<Bug::kStaticSharedOverrun>},
    {"global_overrun", run<Bug::kGlobalOverrun>},
    {"divergent_barriers", run<Bug::kDivergentBarriers>},
    {"unequal_votes", run<Bug::kUnequalVotes>},
    {"returned_lane", run<Bug::kReturnedLane>},
    {"return_before_shuffle", run<Bug::kReturnBeforeShuffle>},
    {"divergent_shuffle", run<Bug::kDivergentShuffle>},
    {"shuffle_outside_mask", run<Bug::kShuffleOutsideMask>},
    {"caller_outside_mask", run<Bug::kCallerOutsideMask>},
    {"different_collectives", run<Bug::kDifferentCollectives>},
    {"never_written", run<Bug::kNeverWritten>},
    {"deadlock", run<Bug::kDeadlock>},
    {"trap", run<Bug::kTrap>},
    {"missing_wait", run<Bug::kMissingWait>},
};

const char* name(Outcome outcome) {
  switch (outcome) {
    case Outcome::kRight:
      return "right";
    case Outcome::kWrong:
      return "wrong results";
    case Outcome::kFault:
      return "fault";
    case Outcome::kRefused:
      return "refused";
  }
  return "?";
}

int run_sound() {
  const Outcome outcome = run<Bug::kNone>(9);
  std::printf("sound kernel: %s\n", name(outcome));
  return outcome == Outcome::kRight ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string wanted = argc == 2 ? argv[1] : "";
  if (wanted == "sound") return run_sound();
  for (const Planted& planted : kPlanted) {
    if (wanted != planted.name) continue;
    std::printf("%s: %s\n", planted.name, name(planted.run(9)));
    return run_sound();
  }
  std::printf("usage: planted_bugs sound");
  for (const Planted& planted : kPlanted) std::printf(" | %s", planted.name);
  std::printf("\n");
  return 2;
}
