// Tiles of weights [E, out, in] for up to kFew rows of x: 2 * kLanes rows of one expert's weight, each of which is
// multiplied with all rows of x as it comes from memory.
#pragma once
#include <algorithm>
#include <cstdint>

#include "experts_finish.h"
#include "experts_rows.h"
#include "moe_route/experts.h"

namespace moe_route::cpu::MOE_ROUTE_ISA {
namespace {

template <class Type>
class RowTiles {
  static constexpr int kTileRows = 2 * Vector::kLanes;  // of the weight
  static constexpr int64_t kAhead = 4096;               // bytes
  // Lines of x beyond the first-level cache are taken in parts, multiples of kStepBytes, each for all rows of the tile.
  static constexpr int64_t kWholeBytes = 8 << 10, kPartOfRow = 4 << 10;

 public:
  static constexpr int64_t kFew = 4;
  static constexpr bool kFetchesNext = false;
  struct Scratch {};

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
  void run(const Rows& rows, int64_t column, const float* const* x, Scratch&) const {
    const Tile tile = tile_at(rows, column);
    Sums sums[kTileRows * kFew];
    const int count = static_cast<int>(rows.count);
    std::fill_n(&sums[0].part[0], kTileRows * kFew * kParts, Vector::zero());
    const int64_t part = count > 1 && line_bytes_ > kWholeBytes ? kPartOfRow : line_bytes_;
    for (int64_t at = 0; at < line_bytes_; at += part) {
      const int64_t bytes = std::min(part, line_bytes_ - at);
      for (int i = 0; i < tile.size; ++i) {
        const char* weight = weight_row(tile, i) + at;
        const char* ahead = part == line_bytes_ ? weight + kAhead
                            : i + 1 < tile.size ? weight_row(tile, i + 1) + at
                                                : weight_row(tile, 0) + at + bytes;
        Sums* to = sums + tile.slot[i] * kFew;
        for (int t = 0; t < count; t += Vector::kTogether) {
          sum_few<Vector::kTogether>(std::min(count - t, Vector::kTogether), weight, bytes, ahead, x + t,
                                     at / kStepBytes * kStepFloats<Type>, to + t);
        }
      }
    }
    for (int t = 0; t < count; ++t) finish(tile, t, sums + t, kFew);
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

  template <int kMost>
  void sum_few(int count, const char* weight, int64_t bytes, const char* ahead, const float* const* x,
               int64_t x_at, Sums* to) const {
    if constexpr (kMost > 1) {
      if (count < kMost) return sum_few<kMost - 1>(count, weight, bytes, ahead, x, x_at, to);
    }
    sum_row<Type, kMost>(weight, bytes, ahead, x, x_at, to);
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
