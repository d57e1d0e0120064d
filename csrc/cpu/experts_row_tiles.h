// Tiles of weights [E, out, in]: 2 * kLanes rows of one expert's weight, which are read from memory once, whatever the
// number of rows of x. Up to kFew rows: each row of the weight is multiplied with all of them as it comes. More:
// kPanelRows rows of the weight at a time are turned into a panel, which stays in the first-level cache while it is
// multiplied with kPanelTokens lines of x after the other.
#pragma once
#include <algorithm>
#include <cstdint>

#include "experts_finish.h"
#include "experts_memory.h"
#include "experts_rows.h"
#include "moe_route/experts.h"

namespace moe_route::cpu::MOE_ROUTE_ISA {
namespace {

template <class Type>
class RowTiles {
  static constexpr int kTileRows = 2 * Vector::kLanes;  // of the weight
  static constexpr int64_t kFew = 4;
  static constexpr int kChunk = 4 * Vector::kPanelTokens;  // rows of x whose sums are kept

 public:
  static constexpr bool kFetchesNext = false;
  struct Scratch {
    Memory<char> panel, sums;
  };

  RowTiles(const ExpertProductArgs& args, int)
      : args_(args),
        finish_(args),
        line_bytes_(args.in * static_cast<int64_t>(sizeof(typename Type::Element))),
        gated_(args.pairing != Pairing::kNone) {}

  int64_t columns() const { return gated_ ? Vector::kLanes : kTileRows; }  // of `out`, in a tile
  int64_t line_floats() const { return (line_bytes_ + kStepBytes - 1) / kStepBytes * kStepFloats<Type>; }
  void lay_out(float* to, const char* from) const {
    moe_route::cpu::MOE_ROUTE_ISA::lay_out<Type>(to, from, line_bytes_);
  }

  // Columns column .. column + columns() - 1 of the rows, as far as there are any; x[i] is the line of row i of them.
  void run(const Rows& rows, int64_t column, const float* const* x, Scratch& scratch) const {
    const Tile tile = tile_at(rows, column);
    if (rows.count <= kFew) return few_rows(tile, x);
    if (!scratch.panel) {
      constexpr int64_t kSumsBytes = kTileRows * kChunk * static_cast<int64_t>(sizeof(Sums));
      scratch.panel = memory<char>(parts() * kPartBytes * Vector::kPanelRows);
      scratch.sums = memory<char>(kSumsBytes);
      std::fill_n(scratch.sums.get(), kSumsBytes, char{0});
    }
    many_rows(tile, x, scratch);
  }

 private:
  struct Tile {
    Rows rows;
    int64_t column;  // the first
    int columns;
    // Row i of the tile: its number in the weight, and where its sums stand. Those of a gate come first.
    int64_t weight_row[kTileRows];
    int slot[kTileRows];
    int size;  // rows of the weight
  };

  Tile tile_at(const Rows& rows, int64_t column) const {
    Tile tile;
    tile.rows = rows;
    tile.column = column;
    tile.columns = static_cast<int>(std::min(columns(), args_.out_columns - column));
    tile.size = gated_ ? 2 * tile.columns : tile.columns;
    const bool alternating = args_.pairing == Pairing::kAlternating;
    for (int i = 0; i < tile.size; ++i) {
      const int c = !gated_ ? i : alternating ? i / 2 : i % tile.columns;
      const bool up = gated_ && (alternating ? i % 2 == 1 : i >= tile.columns);
      tile.weight_row[i] = up || !gated_ ? args_.up_row(column + c) : args_.gate_row(column + c);
      tile.slot[i] = up ? Vector::kLanes + c : c;
    }
    return tile;
  }

  const char* weight_row(const Tile& tile, int i) const {
    return static_cast<const char*>(args_.weight) +
           (tile.rows.expert * args_.weight_rows() + tile.weight_row[i]) * line_bytes_;
  }

  void few_rows(const Tile& tile, const float* const* x) const {
    Sums sums[kTileRows * kFew];
    const int count = static_cast<int>(tile.rows.count);
    if (tile.size < kTileRows) std::fill_n(&sums[0].part[0], kTileRows * kFew * kParts, Vector::zero());
    for (int i = 0; i < tile.size; ++i) {
      Sums* to = sums + tile.slot[i] * kFew;
      for (int t = 0; t < count; t += Vector::kTogether) {
        sum_few<Vector::kTogether>(std::min(count - t, Vector::kTogether), weight_row(tile, i), x + t,
                                   to + t);
      }
    }
    for (int t = 0; t < count; ++t) finish(tile, t, sums + t, kFew);
  }

  template <int kMost>
  void sum_few(int count, const char* weight, const float* const* x, Sums* to) const {
    if constexpr (kMost > 1) {
      if (count < kMost) return sum_few<kMost - 1>(count, weight, x, to);
    }
    sum_row<Type, kMost>(weight, line_bytes_, x, to);
  }

  int64_t parts() const { return (line_bytes_ + kPartBytes - 1) / kPartBytes; }

  void many_rows(const Tile& tile, const float* const* x, Scratch& scratch) const {
    constexpr int kRows = Vector::kPanelRows;
    auto* panel = reinterpret_cast<Vector::Words*>(scratch.panel.get());
    auto* sums = reinterpret_cast<Sums*>(scratch.sums.get());
    for (int64_t first = 0; first < tile.rows.count; first += kChunk) {
      const int count = static_cast<int>(std::min<int64_t>(tile.rows.count - first, kChunk));
      for (int i = 0; i < tile.size; i += kRows) {
        Sums* to[kRows];
        for (int r = 0; r < kRows; ++r) {  // the last row again where there are no more
          const int row = std::min(i + r, tile.size - 1);
          turn_row(panel + r, weight_row(tile, row), line_bytes_);
          to[r] = sums + tile.slot[row] * kChunk;
        }
        const char* next[kRows];
        for (int r = 0; r < kRows; ++r) next[r] = weight_row(tile, std::min(i + kRows + r, tile.size - 1));
        const int groups = (count + Vector::kPanelTokens - 1) / Vector::kPanelTokens;
        for (int g = 0; g < groups; ++g) {
          const int begin = count * g / groups, end = count * (g + 1) / groups;
          Sums* there[kRows];
          for (int r = 0; r < kRows; ++r) there[r] = to[r] + begin;
          sum_panels<Vector::kPanelTokens>(end - begin, panel, x + first + begin, there,
                                           g == 0 && first == 0 ? next : nullptr);
        }
      }
      for (int t = 0; t < count; ++t) finish(tile, first + t, sums + t, kChunk);
    }
  }

  template <int kMost>
  void sum_panels(int count, const Vector::Words* panel, const float* const* x, Sums* const* to,
                  const char* const* next) const {
    if constexpr (kMost > 1) {
      if (count < kMost) return sum_panels<kMost - 1>(count, panel, x, to, next);
    }
    sum_panel<Type, kMost>(panel, parts(), x, to, next);
  }

  // Folds the sums of row t of the tile's, and writes its columns. Those of slot s are sums[s * stride].
  void finish(const Tile& tile, int64_t t, const Sums* sums, int64_t stride) const {
    alignas(64) float low[Vector::kLanes], high[Vector::kLanes];
    Vector::store(low, fold(sums, stride));
    Vector::store(high, fold(sums + Vector::kLanes * stride, stride));
    const int32_t expert = tile.rows.expert;
    const int64_t row = tile.rows.first + t;
    if (gated_) return finish_.gated(expert, row, tile.column, tile.columns, low, high);
    const int first = std::min(tile.columns, Vector::kLanes), second = tile.columns - first;
    finish_.plain(expert, row, tile.column, first, low);
    if (second > 0) finish_.plain(expert, row, tile.column + Vector::kLanes, second, high);
  }

  const ExpertProductArgs& args_;
  const Finish<Type> finish_;
  const int64_t line_bytes_;
  const bool gated_;
};

}  // namespace
}  // namespace moe_route::cpu::MOE_ROUTE_ISA
