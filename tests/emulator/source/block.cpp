#include "block.h"

#include <algorithm>
#include <bit>
#include <cstdio>
#include <cstring>
#include <utility>

#include "emulator/barriers.h"
#include "emulator/fault.h"
#include "emulator/language.h"
#include "shared_memory.h"

constinit thread_local uint3 threadIdx{}, blockIdx{};
constinit thread_local dim3 blockDim, gridDim;

namespace emulator {
namespace {

constexpr int kWarp = 32;

bool same(const Place& a, const Place& b) {
  return a.line() == b.line() && a.column() == b.column() &&
         (a.file_name() == b.file_name() || std::strcmp(a.file_name(), b.file_name()) == 0);
}

std::string text(const Place& place) {
  return std::string(place.file_name()) + ":" + std::to_string(place.line());
}

std::string text(uint32_t mask) {
  char digits[11];
  std::snprintf(digits, sizeof digits, "0x%08x", mask);
  return digits;
}

std::string text(const uint3& index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " + std::to_string(index.z) +
         ")";
}

template <class Size>
uint3 index_in(uint64_t number, const Size& size) {
  return {static_cast<unsigned>(number % size.x), static_cast<unsigned>(number / size.x % size.y),
          static_cast<unsigned>(number / size.x / size.y)};
}

}  // namespace

// ---- a block from beginning to end ----------------------------------------------------------------------

Block& this_thread_block() {
  static constinit thread_local Block* block = nullptr;
  if (block == nullptr) {
    static thread_local std::unique_ptr<Block> owner;
    owner = std::make_unique<Block>();
    block = owner.get();
  }
  return *block;
}

void Block::run(const Grid& grid, uint64_t number) {
  prepare(grid, number);
  const SharedMemory shared(grid.shared_bytes);
  begin_or_end();
  caller_.hand_over(switched_to(take_next()));
  begin_or_end();
  running_ = -1;
  if (failure_) {
    stacks_.forget_frames();
    for (int i = 0; i < size_; ++i) threads_[i].fiber.forget();
    std::rethrow_exception(std::exchange(failure_, nullptr));
  }
  if (shared.overrun()) {
    throw Fault("CUDA emulator: block " + text(blockIdx) + " wrote past the end of its " +
                std::to_string(grid.shared_bytes) + " bytes of dynamic shared memory");
  }
  if (grid.overlaps && waited_ != size_) {
    throw Fault("CUDA emulator: block " + text(blockIdx) + " may run beside earlier grids, but " +
                std::to_string(size_ - waited_) + " of its " + std::to_string(size_) +
                " threads never waited for them");
  }
}

void Block::prepare(const Grid& grid, uint64_t number) {
  grid_ = &grid;
  blockIdx = index_in(number, grid.grid), gridDim = grid.grid, blockDim = grid.block;
  size_ = alive_ = static_cast<int>(grid.block.x * grid.block.y * grid.block.z);
  at_barrier_ = 0, ready_count_ = 0, waited_ = 0;
  random_ = (grid.settings.seed + 1) * 0x9e3779b97f4a7c15u + number;
  if (!threads_) threads_ = std::make_unique<Thread[]>(Stacks::kMost);
  warps_.resize(static_cast<size_t>((size_ + kWarp - 1) / kWarp));
  for (int first = 0; first < size_; first += kWarp) {
    Warp& warp = warps_[static_cast<size_t>(first / kWarp)];
    warp.alive = size_ - first >= kWarp ? ~0u : (1u << (size_ - first)) - 1;
    warp.meetings.clear();
    warp.meetings.reserve(kWarp);  // never grows while threads run
  }
  for (int i = 0; i < size_; ++i) {
    threads_[i].index = index_in(static_cast<uint64_t>(i), grid.block);
    threads_[i].fiber.prepare(stacks_.stack(i), i, thread_entry);
  }
  caller_.adopt();
  make_ready_where([](int) { return true; });
}

void Block::thread_entry() {
  Block& block = this_thread_block();
  Fiber::arrive(block.caller_);
  Fiber& mine = block.threads_[block.running_].fiber;
  Fiber* next = &block.caller_;
  try {
    block.grid_->body(block.grid_->context);
    block.leave();
    next = &block.switched_to(block.take_next());
  } catch (...) {
    block.failure_ = std::current_exception();
  }
  mine.end(*next);
}

void Block::leave() {
  Warp& warp = warps_[static_cast<size_t>(running_ / kWarp)];
  threads_[running_].state = State::kDone;
  warp.alive &= ~(1u << lane());
  for (const Meeting& meeting : warp.meetings) {
    if (meeting.mask >> lane() & 1) {
      fail("lane " + std::to_string(lane()) + " returned, but others wait for it at " + text(meeting.place));
    }
  }
  if (--alive_ > 0 && at_barrier_ == alive_) open_barrier();
}

void Block::fail(const std::string& what) const {
  std::string where = "block " + text(blockIdx);
  if (running_ >= 0) {
    const Thread& thread = threads_[running_];
    where += ", thread " + std::to_string(running_) + " (lane " + std::to_string(lane()) + " of warp " +
             std::to_string(running_ / kWarp) + ")";
    if (thread.state == State::kAtBarrier || thread.state == State::kInCollective) {
      where += " at " + text(thread.place);
    }
  }
  throw Fault("CUDA emulator: " + what + "\n  " + where + where_all_stand());
}

// Neighbours that stand at the same place share a line.
std::string Block::where_all_stand() const {
  std::string all, last;
  int lines = 0;
  for (int i = 0; i < size_ && lines <= 16; ++i) {
    const Thread& thread = threads_[i];
    std::string stand = thread.state == State::kDone    ? "returned"
                        : thread.state == State::kReady ? "can run"
                        : thread.state == State::kAtBarrier
                            ? "waits for the block at " + text(thread.place)
                            : "waits for lanes " + text(thread.mask) + " at " + text(thread.place);
    if (stand == last) continue;
    all += "\n    from thread " + std::to_string(i) + " on: " + stand;
    last = std::move(stand);
    ++lines;
  }
  return all;
}

// ---- whose turn it is -----------------------------------------------------------------------------------

int Block::take_next() {
  if (ready_count_ == 0) {
    if (alive_ > 0) fail("deadlock: every thread waits");
    return -1;
  }
  if (grid_->settings.order == Order::kRandom) {
    random_ = random_ * 6364136223846793005u + 1442695040888963407u;
    std::swap(ready(0), ready(static_cast<unsigned>((random_ >> 33) % ready_count_)));
  }
  const int thread = ready(0);
  ++first_ready_, --ready_count_;
  return thread;
}

Fiber& Block::switched_to(int thread) {
  if (thread < 0) return caller_;
  running_ = thread;
  threadIdx = threads_[thread].index;
  return threads_[thread].fiber;
}

void Block::suspend() {
  Fiber& mine = threads_[running_].fiber;
  const int next = take_next();
  if (next != running_) mine.hand_over(switched_to(next));
}

void Block::make_ready(int thread) {
  threads_[thread].state = State::kReady;
  ready(ready_count_++) = thread;
}

template <class Condition>
void Block::make_ready_where(Condition condition) {
  const bool reverse = grid_->settings.order == Order::kReverse;
  for (int i = 0; i < size_; ++i) {
    const int thread = reverse ? size_ - 1 - i : i;
    if (condition(thread)) make_ready(thread);
  }
}

void Block::wait_for_turn() {
  make_ready(running_);
  suspend();
}

// ---- what orders memory ---------------------------------------------------------------------------------

template <class Condition>
void Block::order_where(Condition condition, void* token) {
  if (!sanitizer::kRaces) return;
  meeting_fibers_.clear();
  for (int i = 0; i < size_; ++i) {
    if (condition(i)) meeting_fibers_.push_back(&threads_[i].fiber);
  }
  Fiber::order(meeting_fibers_, token);
}

void Block::begin_or_end() {
  if (!sanitizer::kRaces) return;
  meeting_fibers_.assign({&caller_});
  for (int i = 0; i < size_; ++i) meeting_fibers_.push_back(&threads_[i].fiber);
  Fiber::order(meeting_fibers_, this);
}

// ---- the barrier of the block ---------------------------------------------------------------------------

uint32_t Block::wait_at_barrier(Vote vote, bool predicate, const Place& place) {
  Thread& me = threads_[running_];
  me.place = place, me.state = State::kAtBarrier;
  if (at_barrier_ == 0) {
    barrier_vote_ = vote, barrier_place_ = place;
    barrier_result_ = vote == Vote::kAnd;
  } else if (vote != barrier_vote_ || !same(place, barrier_place_)) {
    fail("threads of one block wait at different barriers: here and at " + text(barrier_place_));
  }
  if (vote == Vote::kCount) barrier_result_ += predicate;
  if (vote == Vote::kAnd) barrier_result_ &= predicate;
  if (vote == Vote::kOr) barrier_result_ |= predicate;
  if (++at_barrier_ == alive_) open_barrier();
  suspend();
  return me.barrier_result;
}

void Block::open_barrier() {
  at_barrier_ = 0;
  order_where([&](int thread) { return threads_[thread].state == State::kAtBarrier; }, &at_barrier_);
  make_ready_where([&](int thread) {
    if (threads_[thread].state != State::kAtBarrier) return false;
    threads_[thread].barrier_result = barrier_result_;
    return true;
  });
}

// ---- collectives of a warp ------------------------------------------------------------------------------

namespace {

uint32_t combine(Collective kind, uint32_t a, uint32_t b) {
  const auto signed_a = static_cast<int32_t>(a), signed_b = static_cast<int32_t>(b);
  switch (kind) {
    case Collective::kAdd:
      return a + b;
    case Collective::kAnd:
      return a & b;
    case Collective::kOr:
      return a | b;
    case Collective::kXor:
      return a ^ b;
    case Collective::kMinUnsigned:
      return std::min(a, b);
    case Collective::kMaxUnsigned:
      return std::max(a, b);
    case Collective::kMinSigned:
      return static_cast<uint32_t>(std::min(signed_a, signed_b));
    case Collective::kMaxSigned:
      return static_cast<uint32_t>(std::max(signed_a, signed_b));
    default:
      return 0;  // gives every lane the same nothing
  }
}

// The lanes of `mask` with the value `value`.
uint32_t lanes_with(uint64_t value, uint32_t mask, const uint64_t* values) {
  uint32_t lanes = 0;
  for (uint32_t rest = mask; rest != 0; rest &= rest - 1) {
    const int lane = std::countr_zero(rest);
    lanes |= static_cast<uint32_t>(values[lane] == value) << lane;
  }
  return lanes;
}

// What all lanes of `mask` get alike.
uint64_t common_result(Collective kind, uint32_t mask, const uint64_t* values) {
  if (kind == Collective::kBallot) return lanes_with(1, mask, values);
  auto result = static_cast<uint32_t>(values[std::countr_zero(mask)]);
  for (uint32_t rest = mask & (mask - 1); rest != 0; rest &= rest - 1) {
    result = combine(kind, result, static_cast<uint32_t>(values[std::countr_zero(rest)]));
  }
  return result;
}

}  // namespace

uint64_t Block::wait_for_warp(Collective kind, uint32_t mask, uint64_t value, int source,
                              const Place& place) {
  const int lane = this->lane();
  Thread& me = threads_[running_];
  Warp& warp = warps_[static_cast<size_t>(running_ / kWarp)];
  me.place = place, me.mask = mask, me.state = State::kInCollective;
  if (!(mask >> lane & 1)) fail("the mask " + text(mask) + " does not name the calling lane");
  if (const uint32_t absent = mask & ~warp.alive) {
    fail("the mask " + text(mask) + " names lanes that have returned or never were: " + text(absent));
  }
  warp.value[lane] = value, warp.source[lane] = source;
  Meeting& meeting = meeting_of(warp, kind, mask, place);
  meeting.arrived |= 1u << lane;
  if (meeting.arrived == mask) {
    conclude(warp, meeting);
    meeting = warp.meetings.back();
    warp.meetings.pop_back();
  }
  suspend();
  return warp.result[lane];
}

Block::Meeting& Block::meeting_of(Warp& warp, Collective kind, uint32_t mask, const Place& place) {
  for (Meeting& meeting : warp.meetings) {
    if (meeting.mask != mask) continue;
    if (meeting.kind != kind || !same(meeting.place, place)) {
      fail("lanes of one mask are at different collectives: here and at " + text(meeting.place));
    }
    return meeting;
  }
  return warp.meetings.emplace_back(Meeting{mask, 0, kind, place});
}

void Block::conclude(Warp& warp, const Meeting& meeting) {
  const uint32_t mask = meeting.mask;
  const bool alike = meeting.kind != Collective::kShuffle && meeting.kind != Collective::kMatch;
  const uint64_t common = alike ? common_result(meeting.kind, mask, warp.value) : 0;
  for (uint32_t rest = mask; rest != 0; rest &= rest - 1) {
    const int lane = std::countr_zero(rest);
    const int source = warp.source[lane];
    if (meeting.kind == Collective::kShuffle && !(mask >> source & 1)) {
      fail("a shuffle with the mask " + text(mask) + " reads lane " + std::to_string(source) +
           ", outside it");
    }
    warp.result[lane] = alike                                ? common
                        : meeting.kind == Collective::kMatch ? lanes_with(warp.value[lane], mask, warp.value)
                                                             : warp.value[source];
  }
  const int first = running_ & ~(kWarp - 1);
  if (meeting.kind == Collective::kSync) {  // no other collective promises to order memory
    order_where(
        [&](int thread) {
          return thread >= first && thread < first + kWarp && (mask >> (thread - first) & 1);
        },
        &warp.result[std::countr_zero(mask)]);
  }
  const bool reverse = grid_->settings.order == Order::kReverse;
  for (int i = 0; i < kWarp; ++i) {
    const int lane = reverse ? kWarp - 1 - i : i;
    if (mask >> lane & 1) make_ready(first + lane);
  }
}

// ---- what the headers call ------------------------------------------------------------------------------

uint32_t block_barrier(Vote vote, bool predicate, const Place& place) {
  return this_thread_block().wait_at_barrier(vote, predicate, place);
}
uint64_t warp_collective(Collective kind, uint32_t mask, uint64_t value, int source, const Place& place) {
  return this_thread_block().wait_for_warp(kind, mask, value, source, place);
}
int lane() { return this_thread_block().lane(); }
void yield() { this_thread_block().wait_for_turn(); }
void wait_for_earlier_grids() { this_thread_block().wait_for_earlier_grids(); }
void fault(const std::string& what) { this_thread_block().fail(what); }

}  // namespace emulator
