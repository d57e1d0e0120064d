// One call of an operator on host memory and on device memory, and what differs between the two.
//
// What a call reads and writes is listed once, by `inputs` and `outputs`: visit(pointer, bytes) and
// visit(name, pointer, type, elements, start), for every pointer that is not null.
#pragma once
#include <cuda_runtime.h>

#include <cmath>
#include <cstddef>
#include <cstdio>
#include <cstring>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "moe_route/dispatch.h"
#include "moe_route/gate.h"

namespace moe_route::test {

using Element = std::optional<DType>;  // of an output
inline constexpr Element kRawBytes = std::nullopt;

inline int64_t bytes_of(Element type) {
  if (!type) return 1;
  switch (*type) {
    case DType::kBFloat16:
    case DType::kFloat16:
      return 2;
    case DType::kFloat64:
    case DType::kInt64:
      return 8;
    default:
      return 4;
  }
}

// ---- what calls read and write --------------------------------------------------------------------------

enum class Start { kPoison, kNumbers };  // what an output holds before the call

template <class Visit>
void inputs(GateArgs& a, Visit visit) {
  const int64_t slots = a.tokens * a.k, rows = a.steering.rows;
  const int64_t last = a.tokens > 0 ? (a.tokens - 1) * a.row_stride + a.experts : 0;
  visit(a.logits, last * bytes_of(a.logits_type));
  visit(a.correction_bias, a.experts * 4);
  visit(a.expert_scale, a.experts * 4);
  visit(a.steering.tables, rows * __builtin_popcount(a.steering.planes) * a.experts * 4);
  visit(a.steering.row_params, rows * kRowParams * 4);
  visit(a.steering.remap, rows * a.experts * 4);
  visit(a.token_table, a.tokens * kTokenColumns * 4);
  visit(a.given.ids, slots * bytes_of(a.given.ids_type));
  visit(a.given.weights, slots * bytes_of(a.given.weights_type));
}
template <class Visit>
void outputs(GateArgs& a, Visit visit) {
  GateStatistics& s = a.statistics;
  const int64_t width = kStatScalars + int64_t{__builtin_popcount(s.planes)} * a.experts;
  visit("weights", a.weights, DType::kFloat32, a.tokens * a.k, Start::kPoison);
  visit("ids", a.ids, DType::kInt32, a.tokens * a.k, Start::kPoison);
  visit("groups", s.groups, DType::kInt64, s.num_groups * width, Start::kNumbers);
  visit("segments", s.segments, DType::kInt64, s.num_segments * width, Start::kNumbers);
}

template <class Visit>
void inputs(DispatchArgs& a, Visit visit) {
  visit(a.ids, a.slots * bytes_of(a.ids_type));
}
template <class Visit>
void outputs(DispatchArgs& a, Visit visit) {
  visit("offsets", a.offsets, DType::kInt64, a.experts + 1, Start::kPoison);
  visit("ends", a.ends, DType::kInt32, a.experts, Start::kPoison);
  visit("counts", a.counts, DType::kInt64, a.experts, Start::kPoison);
  visit("order", a.order, DType::kInt64, a.capacity, Start::kPoison);
  visit("inverse", a.inverse, DType::kInt64, a.slots, Start::kPoison);
}

template <class Visit>
void inputs(PermuteArgs& a, Visit visit) {
  visit(a.x, a.tokens * a.row_bytes);
  visit(a.inverse, a.tokens * a.k * 8);
  visit(a.order, a.capacity * 8);
}
template <class Visit>
void outputs(PermuteArgs& a, Visit visit) {
  visit("rows", a.rows, kRawBytes, a.capacity * a.row_bytes, Start::kPoison);
}

template <class Visit>
void inputs(CombineArgs& a, Visit visit) {
  const int64_t element = bytes_of(a.type);
  visit(a.rows, a.capacity * a.hidden * element);
  visit(a.weights, a.tokens * a.k * (a.type == DType::kFloat64 ? 8 : 4));
  visit(a.inverse, a.tokens * a.k * 8);
  visit(a.residual, a.tokens * a.hidden * element);
}
template <class Visit>
void outputs(CombineArgs& a, Visit visit) {
  visit("out", a.out, a.type, a.tokens * a.hidden, Start::kPoison);
}

// ---- outputs as bytes -----------------------------------------------------------------------------------

struct Output {
  const char* name;
  Element type;
  std::vector<unsigned char> bytes;
};

inline Output fresh_output(const char* name, Element type, int64_t elements, Start start) {
  Output output{name, type, std::vector<unsigned char>(static_cast<size_t>(elements * bytes_of(type)), 0x5a)};
  for (int64_t i = 0; start == Start::kNumbers && i < elements; ++i) {
    const int64_t number = i * 7919 % 1000;
    std::memcpy(output.bytes.data() + i * 8, &number, 8);
  }
  return output;
}

template <class T>
T read(const unsigned char* at) {
  T x;
  std::memcpy(&x, at, sizeof(T));
  return x;
}

inline bool is_nan(const unsigned char* at, Element type) {
  if (!type) return false;
  switch (*type) {
    case DType::kFloat32:
      return std::isnan(read<float>(at));
    case DType::kFloat64:
      return std::isnan(read<double>(at));
    case DType::kBFloat16:
      return (read<uint16_t>(at) & 0x7fff) > 0x7f80;
    case DType::kFloat16:
      return (read<uint16_t>(at) & 0x7fff) > 0x7c00;
    default:
      return false;
  }
}

inline std::string text(const unsigned char* at, Element type) {
  char buffer[64];
  if (!type) return std::snprintf(buffer, sizeof buffer, "0x%02x", static_cast<unsigned>(*at)), buffer;
  switch (*type) {
    case DType::kFloat32:
      std::snprintf(buffer, sizeof buffer, "%.9g (0x%08x)", static_cast<double>(read<float>(at)),
                    read<uint32_t>(at));
      break;
    case DType::kFloat64:
      std::snprintf(buffer, sizeof buffer, "%.17g", read<double>(at));
      break;
    case DType::kInt64:
      std::snprintf(buffer, sizeof buffer, "%lld", static_cast<long long>(read<int64_t>(at)));
      break;
    case DType::kInt32:
      std::snprintf(buffer, sizeof buffer, "%d", read<int32_t>(at));
      break;
    default:
      std::snprintf(buffer, sizeof buffer, "0x%04x", static_cast<unsigned>(read<uint16_t>(at)));
  }
  return buffer;
}

// The first element with other bits, or nothing. Any NaN is any other: hardware chooses its bits.
inline std::string difference(const std::vector<Output>& got, const std::vector<Output>& expected) {
  for (size_t i = 0; i < expected.size(); ++i) {
    const Output &a = got.at(i), &b = expected[i];
    const auto size = static_cast<size_t>(bytes_of(b.type));
    for (size_t at = 0; at + size <= b.bytes.size(); at += size) {
      const unsigned char *x = a.bytes.data() + at, *y = b.bytes.data() + at;
      if (std::memcmp(x, y, size) == 0 || (is_nan(x, b.type) && is_nan(y, b.type))) continue;
      return std::string(b.name) + "[" + std::to_string(at / size) + "] is " + text(x, b.type) +
             ", expected " + text(y, b.type);
    }
  }
  return "";
}

// ---- calls ----------------------------------------------------------------------------------------------

// A call on host memory. A pointer of an output that is not wanted is null in `asked`; elsewhere it says
// no more than that.
template <class Args>
struct HostCall {
  Args args;
  std::vector<Output> results;

  explicit HostCall(const Args& asked) : args(asked) {
    outputs(args, [&](const char* name, auto& pointer, Element type, int64_t elements, Start start) {
      if (pointer == nullptr) return;
      results.push_back(fresh_output(name, type, elements, start));
      pointer = reinterpret_cast<std::decay_t<decltype(pointer)>>(results.back().bytes.data());
    });
  }
  HostCall(const HostCall&) = delete;
  HostCall& operator=(const HostCall&) = delete;
};

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// Device memory of exactly `bytes`, or followed by a guard that must survive; `shift` bytes from an
// aligned address.
class DeviceArray {
 public:
  DeviceArray(int64_t bytes, int64_t guard, int64_t shift)
      : bytes_(static_cast<size_t>(bytes)),
        guard_(static_cast<size_t>(guard)),
        shift_(static_cast<size_t>(shift)) {
    check(cudaMalloc(&base_, shift_ + bytes_ + guard_ + (bytes == 0)), "cudaMalloc");
    const std::vector<unsigned char> pattern(guard_, kPattern);
    check(cudaMemcpy(data() + bytes_, pattern.data(), guard_, cudaMemcpyHostToDevice), "cudaMemcpy");
  }
  ~DeviceArray() { cudaFree(base_); }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;

  unsigned char* data() const { return base_ + shift_; }
  void upload(const void* from) const {
    if (bytes_ > 0) check(cudaMemcpy(data(), from, bytes_, cudaMemcpyHostToDevice), "cudaMemcpy");
  }
  std::vector<unsigned char> download() const {
    std::vector<unsigned char> all(bytes_ + guard_);
    check(cudaMemcpy(all.data(), data(), all.size(), cudaMemcpyDeviceToHost), "cudaMemcpy");
    for (size_t i = bytes_; i < all.size(); ++i) {
      if (all[i] != kPattern) throw std::runtime_error("bytes past the end of an output were written");
    }
    all.resize(bytes_);
    return all;
  }

 private:
  static constexpr unsigned char kPattern = 0xc3;
  unsigned char* base_ = nullptr;
  size_t bytes_, guard_, shift_;
};

// The same call on device memory.
template <class Args>
class DeviceCall {
 public:
  Args args;  // device addresses

  // `asked` has host addresses of the inputs. `guarded`: outputs are followed by guards instead of by
  // nothing, so that both a test without a memory checker and a memory checker find a stray write.
  // `shift`: of the first input.
  DeviceCall(const Args& asked, bool guarded, int64_t shift = 0) : args(asked) {
    inputs(args, [&](auto& pointer, int64_t bytes) {
      const int64_t here = std::exchange(shift, 0);
      if (pointer == nullptr) return;
      inputs_.push_back(std::make_unique<DeviceArray>(bytes, 0, here));
      inputs_.back()->upload(pointer);
      pointer = reinterpret_cast<std::decay_t<decltype(pointer)>>(inputs_.back()->data());
    });
    outputs(args, [&](const char* name, auto& pointer, Element type, int64_t elements, Start start) {
      if (pointer == nullptr) return;
      start_.push_back(fresh_output(name, type, elements, start));
      const auto bytes = static_cast<int64_t>(start_.back().bytes.size());
      outputs_.push_back(std::make_unique<DeviceArray>(bytes, guarded ? 64 : 0, 0));
      pointer = reinterpret_cast<std::decay_t<decltype(pointer)>>(outputs_.back()->data());
    });
    reset();
  }

  // Other inputs of the same sizes, at the same addresses.
  void upload(const Args& asked) {
    Args copy = asked;
    size_t next = 0;
    inputs(copy, [&](auto& pointer, int64_t) {
      if (pointer != nullptr) inputs_.at(next++)->upload(pointer);
    });
    reset();
  }

  // Outputs as they were before the call. The device has it all when this returns.
  void reset() {
    for (size_t i = 0; i < start_.size(); ++i) outputs_[i]->upload(start_[i].bytes.data());
    check(cudaDeviceSynchronize(), "copying to the device");
  }

  std::vector<Output> results() const {
    check(cudaDeviceSynchronize(), "running the kernels");
    std::vector<Output> results = start_;
    for (size_t i = 0; i < results.size(); ++i) results[i].bytes = outputs_[i]->download();
    return results;
  }

 private:
  std::vector<std::unique_ptr<DeviceArray>> inputs_, outputs_;
  std::vector<Output> start_;
};

}  // namespace moe_route::test
