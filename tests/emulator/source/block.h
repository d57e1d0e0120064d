// One block of a grid: its threads as fibers on the calling OS thread, its barrier and its warps.
#pragma once
#include <array>
#include <cstdint>
#include <exception>
#include <memory>
#include <string>
#include <vector>

#include "emulator/vector_types.h"
#include "emulator/warp.h"
#include "fiber.h"
#include "settings.h"

namespace emulator {

// Of all its blocks.
struct Grid {
  dim3 grid, block;
  size_t shared_bytes;
  bool overlaps;  // with earlier grids, so that every thread has to wait for them
  Settings settings;
  void (*body)(void*);
  void* context;
};

class Block {
 public:
  // Throws Fault. May be called again, after a Fault too.
  void run(const Grid& grid, uint64_t number);

  // What the running thread may ask for.
  uint32_t wait_at_barrier(Vote vote, bool predicate, const Place& place);
  uint64_t wait_for_warp(Collective kind, uint32_t mask, uint64_t value, int source, const Place& place);
  void wait_for_turn();
  void wait_for_earlier_grids() { ++waited_; }
  [[noreturn]] void fail(const std::string& what) const;
  int lane() const { return running_ & 31; }

 private:
  enum class State : uint8_t { kReady, kAtBarrier, kInCollective, kDone };
  struct Thread {
    Fiber fiber;
    uint3 index;
    State state;
    Place place;  // of the barrier or collective it came to last
    uint32_t mask;
    uint32_t barrier_result;
  };
  // Lanes that have come to one collective, until the last lane of its mask comes.
  struct Meeting {
    uint32_t mask, arrived;
    Collective kind;
    Place place;
  };
  struct Warp {
    uint64_t value[32], result[32];
    int source[32];
    uint32_t alive;
    std::vector<Meeting> meetings;
  };

  void prepare(const Grid& grid, uint64_t number);
  static void thread_entry();
  void leave();  // the running thread has returned
  // Of the threads that can run, by the order of the settings; -1 where all have returned.
  int take_next();
  Fiber& switched_to(int thread);
  void suspend();
  int& ready(unsigned place) { return ready_[(first_ready_ + place) % ready_.size()]; }
  void make_ready(int thread);
  template <class Condition>
  void make_ready_where(Condition condition);
  void open_barrier();
  Meeting& meeting_of(Warp& warp, Collective kind, uint32_t mask, const Place& place);
  void conclude(Warp& warp, const Meeting& meeting);
  // For race detection: the threads that satisfy the condition meet.
  template <class Condition>
  void order_where(Condition condition, void* token);
  void begin_or_end();  // the caller and all threads meet
  std::string where_all_stand() const;

  std::vector<const Fiber*> meeting_fibers_;
  std::unique_ptr<Thread[]> threads_;
  std::vector<Warp> warps_;
  std::array<int, Stacks::kMost> ready_;  // a ring; a thread is in it at most once
  unsigned first_ready_ = 0, ready_count_ = 0;
  Fiber caller_;
  Stacks stacks_;
  const Grid* grid_ = nullptr;
  int size_ = 0, alive_ = 0, running_ = -1;
  int waited_ = 0;  // threads that waited for earlier grids
  uint64_t random_ = 0;
  // The barrier that threads are gathering at.
  int at_barrier_ = 0;
  Vote barrier_vote_ = Vote::kNone;
  Place barrier_place_;
  uint32_t barrier_result_ = 0;
  std::exception_ptr failure_;
};

// The block that the calling OS thread runs; made when first asked for.
Block& this_thread_block();

}  // namespace emulator
