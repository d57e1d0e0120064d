// Tiles of weights [E, in, out], as gpt-oss keeps them: consecutive columns lie side by side, so lanes are columns. A
// tile is up to kBlocks vectors of a row of the weight, and all of its rows: wide, since each row is another page. Two rows of elements of 2 bytes are interleaved
// into words, like those of x, of which each is broadcast.
//
// One stripe after the other is added up, its 16 bytes of x in each step, for all vectors of the tile; then its sums
// are folded with those that wait for it (stripe_of).
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "experts_factors.h"
#include "experts_finish.h"
#include "experts_memory.h"
#include "moe_route/experts.h"

namespace moe_route::cpu::MOE_ROUTE_ISA {
namespace {

template <class Type>
class ColumnTiles {
  using Element = typename Type::Element;
  static constexpr int kBlocks = 32, kLeastBlocks = 8;  // of a tile, at most and at least
  static constexpr int kRowsOfWord = 4 / sizeof(Element);
  static constexpr int kColumns = kRowsOfWord * Vector::kLanes;  // of the weight, in a block
  static constexpr int kHalves = kRowsOfWord;                    // vectors of sums of a block
  static constexpr int kTokens = Vector::kColumnTokens;
  static constexpr int kChunk = 16;  // rows of x whose sums are kept
  static constexpr int kLevels = 6;  // log2(kStripes) + 1
  static constexpr int64_t kWordsOfStep = 4 * kStripes;
  static constexpr int64_t kSumsOfToken = kBlocks * kHalves * Vector::kLanes;  // floats
  static constexpr int64_t kSumsOfLevel = kChunk * kSumsOfToken;

 public:
  static constexpr int64_t kFew = 16;  // rows up to which no panels are laid out
  static constexpr bool kFetchesNext = false;
  struct Scratch {
    Memory<float> sums;  // [kLevels, kChunk, kBlocks, kHalves, kLanes]
  };

  ColumnTiles(const ExpertProductArgs& args, int threads)
      : args_(args),
        finish_(args),
        width_(args.weight_rows()),
        gated_(args.pairing != Pairing::kNone),
        blocks_(blocks_for(threads)) {}

  int64_t columns() const { return gated_ ? blocks_ * kColumns / 2 : blocks_ * kColumns; }
  int64_t steps() const { return (args_.in * static_cast<int64_t>(sizeof(Element)) + 511) / 512; }
  int64_t line_floats() const { return steps() * kWordsOfStep * Type::kPlanes; }

  // Word after word; the planes of a word lie behind one another.
  void lay_out(float* to, const char* from) const {
    const int64_t bytes = args_.in * static_cast<int64_t>(sizeof(Element));
    alignas(64) float planes[Type::kPlanes * Vector::kLanes];
    for (int64_t at = 0; at < steps() * 512; at += 4 * Vector::kLanes) {
      const int64_t left = std::clamp<int64_t>(bytes - at, 0, 4 * Vector::kLanes);
      const bool whole = left == 4 * Vector::kLanes;
      Type::lay_out(
          planes, whole ? Vector::words(from + at) : Vector::first_words(left > 0 ? from + at : from, left));
      for (int lane = 0; lane < Vector::kLanes; ++lane) {
        for (int p = 0; p < Type::kPlanes; ++p) *to++ = planes[p * Vector::kLanes + lane];
      }
    }
  }

  void run(const Rows& rows, int64_t column, const float* const* x, Scratch& scratch) const {
    if (!scratch.sums) scratch.sums = memory<float>(kLevels * kSumsOfLevel);
    const Tile tile = tile_at(rows.expert, column);
    for (int64_t first = 0; first < rows.count; first += kChunk) {
      const int count = static_cast<int>(std::min<int64_t>(rows.count - first, kChunk));
      sum_stripes(tile, x + first, count, scratch.sums.get());
      for (int t = 0; t < count; ++t)
        finish(rows, first + t, column, tile, scratch.sums.get() + t * kSumsOfToken);
    }
  }

 private:
  struct Tile {
    int columns;  // of the result
    int blocks;
    const char* from[kBlocks];  // in row 0 of the weight
    int64_t bytes[kBlocks];     // that there are of each
  };

  // As many as leave every thread some tiles.
  int blocks_for(int threads) const {
    const int64_t experts = std::min<int64_t>(args_.experts, args_.capacity);
    int blocks = kBlocks;
    while (blocks > kLeastBlocks && experts * width_ < int64_t{4} * threads * blocks * kColumns) blocks /= 2;
    return blocks;
  }

  Tile tile_at(int32_t expert, int64_t column) const {
    Tile tile;
    tile.columns = static_cast<int>(std::min(columns(), args_.out_columns - column));
    tile.blocks = 0;
    const auto* weight = static_cast<const char*>(args_.weight) +
                         expert * args_.in * width_ * static_cast<int64_t>(sizeof(Element));
    const auto add = [&](int block, int64_t begin, int64_t count) {
      for (; count > 0; ++block, begin += kColumns, count -= kColumns) {
        tile.from[block] = weight + begin * static_cast<int64_t>(sizeof(Element));
        tile.bytes[block] = std::min<int64_t>(count, kColumns) * static_cast<int64_t>(sizeof(Element));
        tile.blocks = block + 1;
      }
    };
    if (args_.pairing == Pairing::kHalves) {
      add(0, column, tile.columns);
      add(tile.blocks, args_.out_columns + column, tile.columns);
    } else {
      add(0, gated_ ? 2 * column : column, gated_ ? 2 * tile.columns : tile.columns);
    }
    return tile;
  }

  // All stripes of a tile, folded, into level 0 of `sums`.
  void sum_stripes(const Tile& tile, const float* const* x, int count, float* sums) const {
    for (int turn = 0, level = 0; turn < kStripes; ++turn, ++level) {
      for (int t = 0; t < count; t += kTokens) {
        sum_stripe<kTokens>(std::min(count - t, kTokens), tile, turn, t == 0, x + t,
                            sums + level * kSumsOfLevel + t * kSumsOfToken);
      }
      for (int done = turn; done & 1; done >>= 1, --level) {
        float* to = sums + (level - 1) * kSumsOfLevel;
        const float* from = to + kSumsOfLevel;
        for (int64_t i = 0; i < count * kSumsOfToken; ++i) to[i] += from[i];
      }
    }
  }

  // One stripe with kMost lines. `fetch`: it asks for the rows after those that it adds up, since no prefetcher knows
  // where they lie.
  template <int kMost>
  void sum_stripe(int count, const Tile& tile, int turn, bool fetch, const float* const* x,
                  float* sums) const {
    if constexpr (kMost > 1) {
      if (count < kMost) return sum_stripe<kMost - 1>(count, tile, turn, fetch, x, sums);
    }
    std::fill_n(sums, kMost * kSumsOfToken, 0.0f);
    const auto row_of = [](int64_t step, int of) {
      return (step * kWordsOfStep + stripe_of(of) * 4) * kRowsOfWord;
    };
    for (int64_t step = 0; step < steps(); ++step) {
      const int64_t row = row_of(step, turn);
      if (row >= args_.in) break;
      int64_t next = row_of(step + 1, turn);
      if (next >= args_.in) next = turn + 1 < kStripes ? row_of(0, turn + 1) : args_.in;
      const bool all_rows = row + 4 * kRowsOfWord <= args_.in;
      for (int b = 0; b < tile.blocks; ++b) {
        if (fetch) prefetch(tile.from[b], next);
        const bool whole = all_rows && tile.bytes[b] == static_cast<int64_t>(sizeof(Vector::Words));
        float* to = sums + b * kHalves * Vector::kLanes;
        if (whole) {
          sum_block<kMost, true>(tile, b, row, x, to);
        } else {
          sum_block<kMost, false>(tile, b, row, x, to);
        }
      }
    }
  }

  void prefetch(const char* block, int64_t row) const {
    const int64_t row_bytes = width_ * static_cast<int64_t>(sizeof(Element));
    const int64_t rows = std::min<int64_t>(args_.in - row, 4 * kRowsOfWord);
    for (int64_t r = 0; r < rows; ++r) Vector::prefetch(block + (row + r) * row_bytes);
  }

  // Adds four words of x, times their rows of one block, to the sums of the block.
  template <int kCount, bool kWhole>
  void sum_block(const Tile& tile, int block, int64_t row, const float* const* x, float* to) const {
    Vector::Floats sums[kCount][kHalves];
    for (int t = 0; t < kCount; ++t) {
      for (int h = 0; h < kHalves; ++h) sums[t][h] = Vector::load(to + t * kSumsOfToken + h * Vector::kLanes);
    }
    const int64_t row_bytes = width_ * static_cast<int64_t>(sizeof(Element));
    const auto load = [&](int64_t r) {
      const char* from = tile.from[block] + r * row_bytes;
      if constexpr (kWhole) return Vector::words(from);
      if (r >= args_.in) return Vector::first_words(tile.from[block], 0);
      const bool full = tile.bytes[block] == static_cast<int64_t>(sizeof(Vector::Words));
      return full ? Vector::words(from) : Vector::first_words(from, tile.bytes[block]);
    };
#pragma GCC unroll 4
    for (int w = 0; w < 4; ++w) {
      typename Type::Factors factors[kHalves];
      if constexpr (kRowsOfWord == 1) {
        factors[0] = Type::factors(load(row + w));
      } else {
        const Vector::Words even = load(row + 2 * w), odd = load(row + 2 * w + 1);
        factors[0] = Type::factors(Vector::interleave_low(even, odd));
        factors[1] = Type::factors(Vector::interleave_high(even, odd));
      }
#pragma GCC unroll 8
      for (int t = 0; t < kCount; ++t) {
        const auto value = Type::broadcast(x[t] + (row / kRowsOfWord + w) * Type::kPlanes);
        for (int h = 0; h < kHalves; ++h) sums[t][h] = Type::add(factors[h], value, sums[t][h]);
      }
    }
    for (int t = 0; t < kCount; ++t) {
      for (int h = 0; h < kHalves; ++h) Vector::store(to + t * kSumsOfToken + h * Vector::kLanes, sums[t][h]);
    }
  }

  // Bias, activation and rounding of one row, kLanes columns at a time.
  void finish(const Rows& rows, int64_t t, int64_t column, const Tile& tile, const float* sums) const {
    alignas(64) float line[kSumsOfToken];
    for (int b = 0; b < tile.blocks; ++b) in_order(sums + b * kHalves * Vector::kLanes, line + b * kColumns);
    for (int i = 0; i < tile.blocks * kColumns; ++i) line[i] += 0.0f;  // no -0, whatever was padded
    const int64_t row = rows.first + t;
    for (int c = 0; c < tile.columns; c += Vector::kLanes) {
      const int count = std::min(tile.columns - c, Vector::kLanes);
      if (!gated_) {
        finish_.plain(rows.expert, row, column + c, count, line + c);
        continue;
      }
      alignas(64) float gate[Vector::kLanes], up[Vector::kLanes];
      const bool halves = args_.pairing == Pairing::kHalves;
      const float* from = halves ? line + c : line + 2 * c;
      const int apart = halves ? 1 : 2, up_at = halves ? tile.blocks / 2 * kColumns : 1;
      for (int i = 0; i < Vector::kLanes; ++i) {
        gate[i] = i < count ? from[i * apart] : 0.0f;
        up[i] = i < count ? from[i * apart + up_at] : 0.0f;
      }
      finish_.gated(rows.expert, row, column + c, count, gate, up);
    }
  }

  // The sums of a block as its columns lie: interleaving took four columns of every 16 bytes, then the other four.
  static void in_order(const float* sums, float* to) {
    if constexpr (kHalves == 1) {
      std::copy_n(sums, kColumns, to);
    } else {
      for (int i = 0; i < Vector::kLanes; i += 4, to += 8) {
        std::copy_n(sums + i, 4, to);
        std::copy_n(sums + Vector::kLanes + i, 4, to + 4);
      }
    }
  }

  const ExpertProductArgs& args_;
  const Finish<Type> finish_;
  const int64_t width_;  // columns of the weight
  const bool gated_;
  const int blocks_;
};

}  // namespace
}  // namespace moe_route::cpu::MOE_ROUTE_ISA
