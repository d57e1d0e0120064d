// Products that threads share in one parallel region: each thread takes pieces of the work as it gets free, so a busy
// neighbor delays one piece and not all. A product begins when the one before it is done; who finds nothing left to take
// waits for those that others have taken, and they are at it. So any number of threads finishes, even one alone.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

#include "moe_route/experts.h"

namespace moe_route::cpu::MOE_ROUTE_ISA {
namespace {

// Pieces 0 .. total - 1, each taken by one thread.
class Taken {
 public:
  int64_t total = 0;

  int64_t take(int64_t count) { return next_.fetch_add(count, std::memory_order_relaxed); }
  void finish(int64_t count) { done_.fetch_add(count, std::memory_order_release); }
  // What was written for the pieces can be read then. False if `failed` came true before.
  bool wait(const std::atomic<bool>& failed) const {
    constexpr int kSpins = 2000;  // some 50 us; then others may need the processor
    for (int spins = 0; done_.load(std::memory_order_acquire) < total; ++spins) {
      if (failed.load(std::memory_order_relaxed)) return false;
      if (spins < kSpins) {
        pause();
      } else {
        std::this_thread::yield();
      }
    }
    return true;
  }

 private:
  static void pause() {
#if defined(__x86_64__) || defined(__i386__)
    _mm_pause();
#endif
  }

  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) std::atomic<int64_t> done_{0};
};

// A product, or a part of one. Both functions are what one thread does.
class Work {
 public:
  virtual ~Work() = default;
  virtual int64_t pieces() const = 0;  // that threads can share
  virtual void lay_out() = 0;
  virtual void multiply() = 0;
  virtual const Taken& lines_taken() const = 0;
  virtual const Taken& tiles_taken() const = 0;
};
using Works = std::vector<std::unique_ptr<Work>>;

class SharedWork {
 public:
  explicit SharedWork(std::vector<Works> in_turn) : in_turn_(std::move(in_turn)) {}

  void run(Parallel parallel, int threads) {
    int64_t most = 0;
    for (const Works& works : in_turn_) {
      int64_t pieces = 0;
      for (const auto& work : works) pieces += work->pieces();
      most = std::max(most, pieces);
    }
    const ParallelBody body = [](int64_t, int64_t, void* shared) {
      static_cast<SharedWork*>(shared)->thread();
    };
    parallel(std::min<int64_t>(most, threads), 1, body, this);
  }

 private:
  void thread() {
    try {
      for (const Works& works : in_turn_) {
        for (const auto& work : works) work->lay_out();
        for (const auto& work : works) {
          if (!work->lines_taken().wait(failed_)) return;
        }
        for (const auto& work : works) work->multiply();
        for (const auto& work : works) {
          if (!work->tiles_taken().wait(failed_)) return;
        }
      }
    } catch (...) {
      failed_ = true;  // the others would wait for what this thread has taken
      throw;
    }
  }

  std::vector<Works> in_turn_;
  std::atomic<bool> failed_{false};
};

}  // namespace
}  // namespace moe_route::cpu::MOE_ROUTE_ISA
