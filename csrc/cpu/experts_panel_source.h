// Where the words of a panel lie: packed, or in a weight of either layout, from which they are laid out. Two parts, since
// a gate and what it gates may lie apart.
#pragma once
#include <algorithm>
#include <cstdint>

#include "moe_route/experts.h"

namespace moe_route::cpu::MOE_ROUTE_ISA {
namespace {

class PanelSource {
 public:
  PanelSource() = default;
  PanelSource(const ExpertProductArgs& args, const ExpertPanels& of, int32_t expert, int64_t column)
      : of_(&of), size_(args.type == DType::kFloat32 ? 4 : 2), in_(args.in), width_(args.weight_rows()) {
    transposed_ = args.transposed;
    if (args.panels != nullptr)
      panel_ = args.panels + (expert * of.panels + column / of.columns) * of.panel_size();
    const auto* weight = static_cast<const char*>(args.weight) + expert * in_ * width_ * size_;
    const int64_t columns = std::min(of.columns, args.out_columns - column);
    const bool apart = args.pairing == Pairing::kHalves;
    part_rows_ = apart ? of.columns : kPanelColumns;
    rows_ = args.pairing == Pairing::kAlternating ? 2 * columns : columns;
    part_[0] = weight + args.gate_row(column) * row_stride();
    part_[1] = apart ? weight + args.up_row(column) * row_stride() : nullptr;
  }

  // The packed panel, or null.
  const uint32_t* panel() const { return panel_; }
  explicit operator bool() const { return of_ != nullptr; }

  // A part of as many cache lines as a panel has, number `line` of them.
  const char* line(int64_t line) const {
    if (panel_ != nullptr) return reinterpret_cast<const char*>(panel_) + line * 64;
    if (transposed_) {  // the lines of one row of [in, width] after the other, 2 or 4 of them
      const int shift = size_ == 2 ? 1 : 2;
      const int64_t row = std::min(line >> shift, in_ - 1), at = line & ((1 << shift) - 1);
      const int64_t of_part = part_rows_ * size_ / 64;
      return part_[at >= of_part] + row * width_ * size_ + (at & (of_part - 1)) * 64;
    }
    const int64_t half = of_->words * 4 * part_rows_ / 64;
    return line < half ? part_[0] + line * 64 : part_[1] + (line - half) * 64;
  }

  // All words of the panel to `to`, zeros where there are none.
  template <class V>
  void lay_out(uint32_t* to) const {
    for (int64_t j = 0; j < kPanelColumns; j += part_rows_) {
      if (transposed_) {
        columns<V>(to + j, part_[j / part_rows_]);
      } else {
        rows<V>(to + j, part_[j / part_rows_]);
      }
    }
  }

 private:
  int64_t row_stride() const { return transposed_ ? size_ : in_ * size_; }

  // Rows [out, in]: kLanes words of kLanes rows at a time, transposed.
  template <class V>
  void rows(uint32_t* to, const char* part) const {
    constexpr int64_t kBytes = sizeof(typename V::Words);
    const int64_t line_bytes = in_ * size_;
    for (int64_t j = 0; j < part_rows_; j += V::kLanes) {
      for (int64_t at = 0; at < line_bytes; at += kBytes) {
        int64_t word[V::kLanes / 4];
        for (int l = 0; l < V::kLanes / 4; ++l)
          word[l] = at / 16 + l < of_->groups ? of_->word_of_group(at / 16 + l) : -1;
        const char* from = part + j * line_bytes + at;
        if (rows_ - j >= V::kLanes && line_bytes - at >= kBytes) {
          square<V, true>(to + j, from, V::kLanes, kBytes, word);
        } else {
          square<V, false>(to + j, from, rows_ - j, line_bytes - at, word);
        }
      }
    }
  }

  template <class V, bool kWhole>
  void square(uint32_t* to, const char* from, int64_t rows, int64_t bytes, const int64_t* word) const {
    constexpr int64_t kBytes = sizeof(typename V::Words);
    constexpr int kQuads = V::kLanes / 4;
    const int64_t line_bytes = in_ * size_;
    typename V::Words v[kQuads][4];
#pragma GCC unroll 16
    for (int r = 0; r < V::kLanes; ++r) {
      if constexpr (kWhole) {
        v[r / 4][r % 4] = V::words(from + r * line_bytes);
      } else {
        const char* row = from + (r < rows ? r * line_bytes : 0);
        const int64_t count = r < rows ? bytes : 0;
        v[r / 4][r % 4] = count >= kBytes ? V::words(row) : V::first_words(count > 0 ? row : from, count);
      }
    }
#pragma GCC unroll 4
    for (int q = 0; q < kQuads; ++q) V::turn(v[q]);
#pragma GCC unroll 4
    for (int w = 0; w < 4; ++w) {
      typename V::Words lanes[kQuads];
#pragma GCC unroll 4
      for (int q = 0; q < kQuads; ++q) lanes[q] = v[q][w];
      V::turn_lanes(lanes);
#pragma GCC unroll 4
      for (int l = 0; l < kQuads; ++l) {
        if (word[l] >= 0) V::store(static_cast<void*>(to + (word[l] + w) * kPanelColumns), lanes[l]);
      }
    }
  }

  // Rows [in, out]: a word of all columns is one row, or two of them interleaved.
  template <class V>
  void columns(uint32_t* to, const char* part) const {
    const int64_t elements = 16 / size_, rows_of_word = 4 / size_;
    for (int turn = 0; turn < kStripes; ++turn) {
      for (int64_t group = stripe_of(turn); group < of_->groups; group += kStripes) {
        const int64_t row = group * elements;
        const bool whole = rows_ >= part_rows_ && row + elements <= in_;
        for (int64_t w = 0; w < kWordsAtATime; ++w, to += kPanelColumns) {
          if (whole) {
            word_of_columns<V, true>(to, part, row + w * rows_of_word);
          } else {
            word_of_columns<V, false>(to, part, row + w * rows_of_word);
          }
        }
      }
    }
  }

  template <class V, bool kWhole>
  void word_of_columns(uint32_t* to, const char* part, int64_t row) const {
    constexpr int64_t kBytes = sizeof(typename V::Words);
    const char* line = part + row * width_ * size_;
    const auto load = [&](int64_t r, int64_t at) {
      if constexpr (kWhole) return V::words(line + r * width_ * size_ + at);
      const int64_t bytes = row + r < in_ ? std::clamp<int64_t>(rows_ * size_ - at, 0, kBytes) : 0;
      const char* from = bytes > 0 ? line + r * width_ * size_ + at : part;
      return bytes == kBytes ? V::words(from) : V::first_words(from, bytes);
    };
    for (int64_t at = 0; at < part_rows_ * size_; at += kBytes, to += kBytes / size_) {
      typename V::Words even = load(0, at);
      if (size_ == 2) {
        typename V::Words odd = load(1, at);
        V::interleave(even, odd);
        V::store(static_cast<void*>(to + V::kLanes), odd);
      }
      V::store(static_cast<void*>(to), even);
    }
  }

  const ExpertPanels* of_ = nullptr;
  const uint32_t* panel_ = nullptr;
  const char* part_[2] = {};
  int64_t size_ = 0, in_ = 0, width_ = 0;  // bytes of an element, rows of x, rows of the weight
  int64_t part_rows_ = 0, rows_ = 0;       // of the panel in a part, and those that there are
  bool transposed_ = false;
};

// Which of the cache lines of every word of the next tile one group of rows asks for: all groups share the work.
class Fetch {
  static constexpr int kLinesOfWord = kPanelColumns * 4 / 64;

 public:
  Fetch(const PanelSource& next, int64_t group, int64_t groups)
      : next_(next),
        first_(next ? static_cast<int>(kLinesOfWord * group / groups) : 0),
        last_(next ? static_cast<int>(kLinesOfWord * (group + 1) / groups) : 0) {}
  void operator()(int64_t word) const {
    for (int line = first_; line < last_; ++line) Vector::prefetch(next_.line(word * kLinesOfWord + line));
  }

 private:
  const PanelSource& next_;
  const int first_, last_;
};

}  // namespace
}  // namespace moe_route::cpu::MOE_ROUTE_ISA
