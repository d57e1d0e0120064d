// Tiles of 64 rows of a weight as a panel (ExpertPanels), for any number of rows of x: packed before, or laid out here,
// in the second-level cache, from weights of either layout (of [E, in, out], some panels at a time). Lanes are rows of the weight, and each word of x is
// broadcast, so the sums of a stripe stay in registers for up to kTokens rows of x. A long panel is taken some turns at
// a time, a subtree of the folds, so that it stays in the cache for all rows of x. Meanwhile the thread's next tile is
// asked for.
#pragma once
#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>

#include "experts_finish.h"
#include "experts_memory.h"
#include "experts_panel_source.h"
#include "moe_route/experts.h"

namespace moe_route::cpu::MOE_ROUTE_ISA {
namespace {

template <class Type>
class PanelTiles {
  static constexpr int kTokens = Type::kPlanes == 1 ? Vector::kPanelTokens : Vector::kPanelTokensOfPlanes;
  static constexpr int kVectors = Vector::kPanelVectors;
  static constexpr int kBlock = kVectors * Vector::kLanes;  // rows of the weight whose sums are in registers
  static constexpr int kLevels = 5;                         // sums that wait to be folded
  static constexpr int64_t kMostBytes = 512 << 10;          // of a panel that stays in the second-level cache
  static constexpr int kMostPanels = 8;                     // of a tile
  using Line = float[kPanelColumns];

 public:
  static constexpr bool kFetchesNext = true;
  struct Scratch {
    PanelSource next;        // of the tile that this thread takes next
    Memory<uint32_t> panel;  // if it is not packed
    Memory<float> waiting;   // [kLevels, rows, kPanelColumns]: sums of earlier turns
    int64_t waiting_rows = 0;
  };

  PanelTiles(const ExpertProductArgs& args, int)
      : args_(args),
        finish_(args),
        of_(args.type, args.in, args.out_columns, args.pairing),
        line_bytes_(args.in * static_cast<int64_t>(sizeof(typename Type::Element))),
        panels_(args.panels == nullptr && args.transposed ? kMostPanels : 1) {
    while (turns_ > 1 && of_.panel_size() * 4 / kStripes * turns_ > kMostBytes) turns_ /= 2;
  }

  int64_t columns() const { return panels_ * of_.columns; }
  int64_t line_floats() const { return line_words() * Type::kPlanes; }
  PanelSource source(int32_t expert, int64_t column) const { return {args_, of_, expert, column}; }
  // What is worth asking for while a tile before it is worked on.
  PanelSource fetched(int32_t expert, int64_t column) const {
    return args_.panels == nullptr && args_.transposed ? PanelSource() : source(expert, column);
  }

  // The words in the order of the panels, each with its planes behind one another.
  void lay_out(float* to, const char* from) const {
    float* words = to + line_words() * (Type::kPlanes - 1);
    float* next = words;
    for (int turn = 0; turn < kStripes; ++turn) {
      for (int64_t at = int64_t{16} * stripe_of(turn); at < line_bytes_; at += 16 * kStripes, next += 4) {
        if (at + 16 > line_bytes_) std::fill_n(next, 4, 0.0f);
        std::memcpy(next, from + at, static_cast<size_t>(std::min<int64_t>(16, line_bytes_ - at)));
      }
    }
    if constexpr (Type::kPlanes > 1) {
      std::fill_n(next, line_words() - of_.words, 0.0f);
      widen(to, words);
    }
  }

  void run(const Rows& rows, int64_t column, const float* const* x, Scratch& scratch) const {
    PanelSource from[kMostPanels];
    const int64_t end = std::min(column + columns(), args_.out_columns);
    int count = 0;
    for (int64_t c = column; c < end; c += of_.columns) from[count++] = source(rows.expert, c);
    const uint32_t* panel = from[0].panel();
    if (panel == nullptr) {
      if (!scratch.panel) scratch.panel = memory<uint32_t>(panels_ * of_.panel_size());
      if (args_.transposed) {
        PanelSource::lay_out_columns<Vector>(scratch.panel.get(), from, count);
      } else {
        from[0].lay_out_rows<Vector>(scratch.panel.get());
      }
      panel = scratch.panel.get();
    }
    for (int p = 0; p < count; ++p, column += of_.columns, panel += of_.panel_size()) {
      for (int turn = 0; turn < kStripes; turn += turns_) sum_rows(rows, column, x, turn, panel, scratch);
    }
  }

 private:
  int64_t line_words() const { return (of_.words + Vector::kLanes - 1) / Vector::kLanes * Vector::kLanes; }

  // From the last of the planes' place to all of it: what is written has been read.
  void widen(float* to, const float* words) const {
    alignas(64) float planes[Type::kPlanes * Vector::kLanes];
    for (int64_t at = 0; at < line_words(); at += Vector::kLanes) {
      Type::lay_out(planes, Vector::words(words + at));
      for (int lane = 0; lane < Vector::kLanes; ++lane) {
        for (int p = 0; p < Type::kPlanes; ++p) *to++ = planes[p * Vector::kLanes + lane];
      }
    }
  }

  // turns_ turns from `turn` on for all rows of x; the last turns write the result.
  void sum_rows(const Rows& rows, int64_t column, const float* const* x, int turn, const uint32_t* panel,
                Scratch& scratch) const {
    const bool whole = turns_ == kStripes, last = turn + turns_ == kStripes;
    if (!whole && scratch.waiting_rows < rows.count) {
      scratch.waiting = memory<float>(kLevels * rows.count * kPanelColumns);
      scratch.waiting_rows = rows.count;
    }
    const int64_t groups = (rows.count + kTokens - 1) / kTokens;
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t begin = rows.count * g / groups, end = rows.count * (g + 1) / groups;
      alignas(64) Line sums[kTokens];
      const Fetch fetch(scratch.next, g, groups);
      sum_panel<kTokens>(static_cast<int>(end - begin), turn, panel, x + begin, sums, fetch);
      for (int64_t t = begin; t < end; ++t) {
        if (!whole) fold(turn / turns_, last, t, sums[t - begin], scratch);
        if (last) finish(rows, t, column, sums[t - begin]);
      }
    }
  }

  // The sums of one line of x and subtree `number` with those that wait for them.
  void fold(int number, bool last, int64_t t, float* sums, Scratch& scratch) const {
    int level = std::popcount(static_cast<unsigned>(number));
    const auto waiting = [&](int l) {
      return scratch.waiting.get() + (l * scratch.waiting_rows + t) * kPanelColumns;
    };
    for (int done = number; done & 1; done >>= 1) {
      const float* from = waiting(--level);
      for (int64_t i = 0; i < kPanelColumns; ++i) sums[i] += from[i];
    }
    if (!last) std::copy_n(sums, kPanelColumns, waiting(level));
  }

  template <int kMost>
  void sum_panel(int count, int turn, const uint32_t* panel, const float* const* x, Line* to,
                 const Fetch& fetch) const {
    if constexpr (kMost > 1) {
      if (count < kMost) return sum_panel<kMost - 1>(count, turn, panel, x, to, fetch);
    }
    for (int block = 0; block < kPanelColumns; block += kBlock)
      sum_block<kMost>(turn, panel, block, x, to, fetch);
  }

  // Some turns of one block of a panel with kCount lines of x.
  template <int kCount>
  void sum_block(int first, const uint32_t* panel, int block, const float* const* x, Line* to,
                 const Fetch& fetch) const {
    alignas(64) float waiting[kLevels][kCount][kBlock];
    int64_t word = of_.first_word(first);
    const uint32_t* weight = panel + word * kPanelColumns + block;
    for (int turn = 0, level = 0; turn < turns_; ++turn, ++level) {
      Vector::Floats sums[kCount][kVectors];
      for (auto& row : sums) {
        for (auto& sum : row) sum = Vector::zero();
      }
      const int64_t end = of_.first_word(first + turn + 1);
      for (; word < end; ++word, weight += kPanelColumns) {
        if (block == 0) fetch(word);
        add_word<kCount>(weight, word, x, sums);
      }
      for (int done = turn; done & 1; done >>= 1) {
        --level;
        for (int t = 0; t < kCount; ++t) {
          for (int v = 0; v < kVectors; ++v)
            sums[t][v] = Vector::add(sums[t][v], Vector::load(waiting[level][t] + v * Vector::kLanes));
        }
      }
      for (int t = 0; t < kCount; ++t) {
        float* there = turn + 1 == turns_ ? to[t] + block : waiting[level][t];
        for (int v = 0; v < kVectors; ++v) Vector::store(there + v * Vector::kLanes, sums[t][v]);
      }
    }
  }

  template <int kCount>
  static void add_word(const uint32_t* weight, int64_t word, const float* const* x,
                       Vector::Floats (&sums)[kCount][kVectors]) {
    typename Type::Factors factors[kVectors];
    for (int v = 0; v < kVectors; ++v) factors[v] = Type::factors(Vector::words(weight + v * Vector::kLanes));
#pragma GCC unroll 8
    for (int t = 0; t < kCount; ++t) {
      const auto value = Type::broadcast(x[t] + word * Type::kPlanes);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[t][v] = Type::add(factors[v], value, sums[t][v]);
    }
  }

  void finish(const Rows& rows, int64_t t, int64_t column, float* sums) const {
    for (int64_t i = 0; i < kPanelColumns; ++i) sums[i] += 0.0f;  // no -0, whatever was padded
    const int64_t columns = std::min(of_.columns, args_.out_columns - column), row = rows.first + t;
    const bool alternating = args_.pairing == Pairing::kAlternating;
    const int64_t apart = alternating ? 2 : 1, up = alternating ? 1 : of_.columns;
    for (int64_t c = 0; c < columns; c += Vector::kLanes) {
      const int count = static_cast<int>(std::min<int64_t>(columns - c, Vector::kLanes));
      if (args_.pairing == Pairing::kNone) {
        finish_.plain(rows.expert, row, column + c, count, sums + c);
        continue;
      }
      alignas(64) float gates[Vector::kLanes], ups[Vector::kLanes];
      for (int i = 0; i < Vector::kLanes; ++i) {
        gates[i] = sums[(c + i) * apart];
        ups[i] = sums[(c + i) * apart + up];
      }
      finish_.gated(rows.expert, row, column + c, count, gates, ups);
    }
  }

  const ExpertProductArgs& args_;
  const Finish<Type> finish_;
  const ExpertPanels of_;
  const int64_t line_bytes_;
  const int panels_;      // of a tile
  int turns_ = kStripes;  // whose part of a panel fits the cache: a power of 2
};

}  // namespace
}  // namespace moe_route::cpu::MOE_ROUTE_ISA
