// What the emulator's words mean, against expectations worked out here by the book, and what it refuses.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

extern __shared__ __align__(16) unsigned char moe_route_shared[];

namespace {

int failed = 0;

void check(bool holds, const char* what) {
  if (holds) return;
  ++failed;
  std::printf("FAILED %s\n", what);
}

template <class... Parameters, class... Arguments>
cudaError_t launch(dim3 grid, dim3 block, size_t shared_bytes, void (*kernel)(Parameters...),
                   Arguments... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid, config.blockDim = block, config.dynamicSmemBytes = shared_bytes;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// ---- warp collectives -----------------------------------------------------------------------------------

enum Column {
  kShuffle,
  kXor,
  kUp,
  kDown,
  kShuffleOf8,
  kXorOf8,
  kUpOf8,
  kDownOf8,
  kWide,
  kBallot,
  kAny,
  kAll,
  kMatch,
  kMatchAll,
  kAdd,
  kMin,
  kMax,
  kMinSigned,
  kMaxSigned,
  kAnd,
  kOr,
  kHalves,
  kColumns
};

__global__ void collectives(long long* out) {
  const unsigned all = 0xffffffffu;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int value = 100 * lane - 700;
  long long* row = out + threadIdx.x * kColumns;
  row[kShuffle] = __shfl_sync(all, value, lane * 3);
  row[kXor] = __shfl_xor_sync(all, value, 5);
  row[kUp] = __shfl_up_sync(all, value, 3);
  row[kDown] = __shfl_down_sync(all, value, 3);
  row[kShuffleOf8] = __shfl_sync(all, value, 10, 8);
  row[kXorOf8] = __shfl_xor_sync(all, value, 12, 8);
  row[kUpOf8] = __shfl_up_sync(all, value, 2, 8);
  row[kDownOf8] = __shfl_down_sync(all, value, 2, 8);
  row[kWide] = __shfl_sync(all, value * (1ll << 40), 31 - lane);
  row[kBallot] = __ballot_sync(all, lane % 3 == 0);
  row[kAny] = __any_sync(all, lane == 9) * 2 + __any_sync(all, lane == 40);
  row[kAll] = __all_sync(all, lane < 32) * 2 + __all_sync(all, lane != 9);
  row[kMatch] = __match_any_sync(all, lane / 5);
  int same = 7;
  row[kMatchAll] = __match_all_sync(all, 3.5f, &same);
  row[kMatchAll] += same;
  row[kAdd] = __reduce_add_sync(all, value);
  row[kMin] = __reduce_min_sync(all, static_cast<unsigned>(value));
  row[kMax] = __reduce_max_sync(all, static_cast<unsigned>(value));
  row[kMinSigned] = __reduce_min_sync(all, value);
  row[kMaxSigned] = __reduce_max_sync(all, value);
  row[kAnd] = __reduce_and_sync(all, static_cast<unsigned>(lane | 64));
  row[kOr] = __reduce_or_sync(all, static_cast<unsigned>(lane & 21));
  // Two masks at a time, in branches that part.
  row[kHalves] = lane < 16 ? __reduce_add_sync(0x0000ffffu, lane) : __reduce_add_sync(0xffff0000u, lane);
}

void test_collectives() {
  std::vector<long long> out(64 * kColumns);
  check(launch(1, 64, 0, collectives, out.data()) == cudaSuccess, "collectives launch");
  for (int t = 0; t < 64; ++t) {
    const int lane = t % 32, eighth = lane & ~7, in_eighth = lane & 7;
    const auto value = [](int l) { return 100ll * l - 700; };
    const auto is = [&](Column column, long long expected, const char* what) {
      check(out[static_cast<size_t>(t * kColumns + column)] == expected, what);
    };
    is(kShuffle, value(lane * 3 % 32), "shuffle");
    is(kXor, value(lane ^ 5), "xor");
    is(kUp, value(lane < 3 ? lane : lane - 3), "up");
    is(kDown, value(lane > 28 ? lane : lane + 3), "down");
    is(kShuffleOf8, value(eighth + 2), "shuffle of 8");
    // 12 = 8 + 4: into the neighboring piece. Only an earlier piece may be read.
    is(kXorOf8, value((lane ^ 12) > (lane | 7) ? lane : lane ^ 12), "xor of 8");
    is(kUpOf8, value(in_eighth < 2 ? lane : lane - 2), "up of 8");
    is(kDownOf8, value(in_eighth > 5 ? lane : lane + 2), "down of 8");
    is(kWide, value(31 - lane) * (1ll << 40), "64 bits");
    is(kBallot, 0x49249249, "ballot");
    is(kAny, 2, "any");
    is(kAll, 2, "all");
    long long match = 0;
    for (int l = 0; l < 32; ++l) match |= l / 5 == lane / 5 ? 1ll << l : 0;
    is(kMatch, match, "match any");
    is(kMatchAll, 0x100000000ll, "match all");
    is(kAdd, 32 * (value(0) + value(31)) / 2, "add");
    is(kMin, 0, "min");
    is(kMax, 0xffffffffu - 99, "max");
    is(kMinSigned, -700, "signed min");
    is(kMaxSigned, 2400, "signed max");
    is(kAnd, 64, "and");
    is(kOr, 21, "or");
    is(kHalves, lane < 16 ? 120 : 376, "halves of a warp");
  }
}

// ---- barriers, shared memory, atomics, indices ----------------------------------------------------------

__global__ void votes(int* out) {
  const int t = static_cast<int>(threadIdx.x);
  out[3 * t] = __syncthreads_count(t % 3 == 0);
  out[3 * t + 1] = __syncthreads_and(t < 70) * 2 + __syncthreads_and(t < 69);
  if (t >= 40) return;  // those that have returned are not waited for
  out[3 * t + 2] = __syncthreads_or(t == 39) * 2 + __syncthreads_or(t == 40);
}

void test_votes() {
  std::vector<int> out(70 * 3);
  check(launch(1, 70, 0, votes, out.data()) == cudaSuccess, "votes launch");
  for (size_t t = 0; t < 70; ++t) {
    check(out[3 * t] == 24 && out[3 * t + 1] == 2, "count and and");
    if (t < 40) check(out[3 * t + 2] == 2, "or without those that returned");
  }
}

__global__ void fresh_shared(int* stale) {
  for (unsigned i = threadIdx.x; i < 400; i += blockDim.x) {
    if (moe_route_shared[i] != 0xff) atomicAdd(stale, 1);
    moe_route_shared[i] = 1;
  }
}

struct Sums {
  int count, largest, smallest;
  unsigned bits;
  unsigned long long wide;
  float sum;
};

__global__ void atomics(Sums* sums) {
  const int number = static_cast<int>((blockIdx.y * gridDim.x + blockIdx.x) * blockDim.x * blockDim.y +
                                      threadIdx.y * blockDim.x + threadIdx.x);
  atomicAdd(&sums->count, 1);
  atomicMax(&sums->largest, number);
  atomicMin(&sums->smallest, number);
  atomicOr(&sums->bits, 1u << number % 32);
  atomicAdd(&sums->wide, 1ull << 33);
  atomicAdd(&sums->sum, 0.5f);
}

void test_atomics() {
  int stale = 0;
  check(launch(20, 64, 400, fresh_shared, &stale) == cudaSuccess && stale == 0,
        "shared memory starts as 0xFF");
  Sums sums = {0, -1, 1 << 30, 0, 0, 0};
  check(launch(dim3(5, 3), dim3(8, 4), 0, atomics, &sums) == cudaSuccess, "atomics launch");
  check(sums.count == 480 && sums.largest == 479 && sums.smallest == 0, "atomics and indices");
  check(sums.bits == 0xffffffffu && sums.wide == 480ull << 33 && sums.sum == 240.0f,
        "atomics of other types");
  unsigned cell = 5;
  check(atomicCAS(&cell, 5u, 9u) == 5 && atomicCAS(&cell, 5u, 1u) == 9 && cell == 9, "compare and swap");
  check(atomicExch(&cell, 2u) == 9 && atomicSub(&cell, 3u) == 2 && cell == 0xffffffffu, "exchange, subtract");
}

// ---- arithmetic -----------------------------------------------------------------------------------------

void test_bits() {
  check(__brev(1) == 0x80000000u && __brev(0x12345678u) == 0x1e6a2c48u && __brevll(2) == 1ull << 62, "brev");
  check(__clz(0) == 32 && __clz(-1) == 0 && __clzll(1) == 63 && __ffs(0) == 0 && __ffs(8) == 4, "clz, ffs");
  check(__funnelshift_l(0x80000000u, 1, 1) == 3 && __funnelshift_r(1, 3, 33) == 0x80000000u, "funnel shift");
  check(__funnelshift_l(7, 5, 32) == 5 && __funnelshift_r(7, 5, 0) == 7, "funnel shift by nothing");
  check(__byte_perm(0x33221100u, 0x77665544u, 0x7250) == 0x77225500u, "byte perm");
  check(__umulhi(0x80000000u, 6) == 3 && __popcll(~0ull) == 64, "mulhi, popc");
  check(max(-1, 2) == 2 && max(1u, 2) == 2u && min(3ll, 4) == 3 && max(NAN, 1.0f) == 1.0f, "max, min");
}

void test_conversions() {
  const float inf = INFINITY;
  check(__float2int_rn(2.5f) == 2 && __float2int_rn(-3.5f) == -4 && __float2int_rz(-3.9f) == -3, "to int");
  check(__float2int_rn(inf) == INT32_MAX && __float2int_rn(-3e9f) == INT32_MIN && __float2int_rn(NAN) == 0,
        "to int, saturating");
  check(
      __float2uint_rn(-1) == 0 && __float2uint_rn(5e9f) == UINT32_MAX && __float2uint_rn(3e9f) == 3000000000u,
      "to unsigned");
  check(__float2ll_rn(0x1p62f) == 1ll << 62 && __float2ll_rn(inf) == INT64_MAX &&
            __float2ll_rn(NAN) == INT64_MIN,
        "to long long");
  check(
      __double2ll_rn(-0x1p63) == INT64_MIN && __double2ll_rn(1e300) == INT64_MAX && __double2ll_rn(0.5) == 0,
      "double to long long");
  check(__float2ull_rn(-inf) == 0 && __double2ull_rn(0x1p64) == UINT64_MAX, "to unsigned long long");
}

// Every half and bfloat16 survives the way to float and back; what lies between two goes to the nearer, and
// to the even one from the middle.
template <class T, class Widen, class Narrow>
void test_type(Widen widen, Narrow narrow, unsigned short infinity, const char* what) {
  const auto bits = [](T x) {
    unsigned short result;
    std::memcpy(&result, &x, 2);
    return result;
  };
  const auto value = [&](unsigned short b) {
    T x;
    std::memcpy(&x, &b, 2);
    return widen(x);
  };
  for (unsigned b = 0; b < 65536; ++b) {
    const auto half = static_cast<unsigned short>(b);
    const bool nan = (half & 0x7fff) > infinity;
    if (nan) check(std::isnan(value(half)) && bits(narrow(value(half))) == 0x7fff, what);
    if (!nan) check(bits(narrow(value(half))) == half, what);
    if ((half & 0x7fff) + 1 >= infinity) continue;
    const float here = value(half), next = value(static_cast<unsigned short>(half + 1));
    const float middle = here / 2 + next / 2;
    if (middle - here != next - middle) continue;  // float32 has no such number
    const auto even = static_cast<unsigned short>(half & 1 ? half + 1 : half);
    check(bits(narrow(middle)) == even, what);
    check(bits(narrow(std::nextafter(middle, here))) == half, what);
    check(bits(narrow(std::nextafter(middle, next))) == half + 1, what);
  }
}

void test_halves() {
  test_type<__half>([](__half x) { return __half2float(x); }, [](float x) { return __float2half(x); }, 0x7c00,
                    "float16");
  test_type<__nv_bfloat16>([](__nv_bfloat16 x) { return __bfloat162float(x); },
                           [](float x) { return __float2bfloat16(x); }, 0x7f80, "bfloat16");
  check(
      __half2float(__ushort_as_half(0x3555)) == 0x1.554p-2f && __half2float(__ushort_as_half(1)) == 0x1p-24f,
      "float16 by the book");
  check(__half_as_ushort(__float2half(65520.0f)) == 0x7c00 &&
            __half_as_ushort(__float2half(65519.0f)) == 0x7bff,
        "float16 overflow");
  const float2 both = __half22float2(__floats2half2_rn(1.5f, -2.0f));
  check(both.x == 1.5f && both.y == -2.0f, "two at a time");
}

// ---- what is refused ------------------------------------------------------------------------------------

__global__ void nothing() {}

void test_refusals() {
  check(launch(1, 1024, 48 * 1024, nothing) == cudaSuccess, "the largest launch without asking");
  check(launch(0, 32, 0, nothing) == cudaErrorInvalidConfiguration, "no blocks");
  check(launch(1, 0, 0, nothing) == cudaErrorInvalidConfiguration, "no threads");
  check(launch(1, 1025, 0, nothing) == cudaErrorInvalidConfiguration, "1025 threads");
  check(launch(1, dim3(1, 1, 65), 0, nothing) == cudaErrorInvalidConfiguration, "65 layers of threads");
  check(launch(dim3(1, 65536), 1, 0, nothing) == cudaErrorInvalidConfiguration, "65536 rows of blocks");
  check(cudaGetLastError() == cudaErrorInvalidConfiguration && cudaGetLastError() == cudaSuccess,
        "last error");
  check(launch(1, 32, 48 * 1024 + 1, nothing) == cudaErrorInvalidValue,
        "shared memory that was not asked for");
  const auto attribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
  check(cudaFuncSetAttribute(nothing, attribute, 227 * 1024 + 1) == cudaErrorInvalidValue,
        "more than there is");
  check(cudaFuncSetAttribute(nothing, attribute, 227 * 1024) == cudaSuccess, "all there is");
  check(launch(1, 32, 227 * 1024, nothing) == cudaSuccess, "shared memory that was asked for");
  int blocks = 0;
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, nothing, 256, 100 * 1024);
  check(blocks == 2, "blocks a multiprocessor holds");
}

void test_settings() {
  setenv("MOE_ROUTE_EMULATOR_ORDER", "backwards", 1);
  bool refused = false;
  try {
    launch(1, 32, 0, nothing);
  } catch (const std::invalid_argument& error) {
    refused = std::strstr(error.what(), "forward, reverse or a seed") != nullptr;
  }
  check(refused, "an order that is none");
}

}  // namespace

int main() {
  test_collectives();
  test_votes();
  test_atomics();
  test_bits();
  test_conversions();
  test_halves();
  test_refusals();
  test_settings();
  std::printf("%d failed\n", failed);
  return failed == 0 ? 0 : 1;
}
