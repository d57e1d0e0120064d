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

  // Of the cache lines that the panel is made of, as many as it has, number `line`. Not of weights [E, in, out].
  const char* line(int64_t line) const {
    if (panel_ != nullptr) return reinterpret_cast<const char*>(panel_) + line * 64;
    const int64_t half = of_->words * 4 * part_rows_ / 64;
    return line < half ? part_[0] + line * 64 : part_[1] + (line - half) * 64;
  }

  // All words of the panel, of weights [E, out, in], to `to`; zeros where there are none.
  template <class V>
  void lay_out_rows(uint32_t* to) const {
    for (int64_t j = 0; j < kPanelColumns; j += part_rows_) rows<V>(to + j, part_[j / part_rows_]);
  }

  // All words of `count` neighboring panels of weights [E, in, out] to `to`, row after row, since each is another page.
  template <class V>
  static void lay_out_columns(uint32_t* to, const PanelSource* panels, int count) {
    const ExpertPanels& of = *panels->of_;
    const int64_t rows_of_word = 4 / panels->size_;
    for (int64_t group = 0; group < of.groups; ++group) {
      for (int64_t w = 0; w < kWordsAtATime; ++w) {
        const int64_t row = (group * kWordsAtATime + w) * rows_of_word;
        uint32_t* word = to + (of.word_of_group(group) + w) * kPanelColumns;
        for (int p = 0; p < count; ++p, word += of.panel_size()) panels[p].word_of_all_parts<V>(word, row);
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

  // A word of all columns: a row of [in, out], or two of them interleaved. Rows some way behind are asked for.
  template <class V>
  void word_of_all_parts(uint32_t* to, int64_t row) const {
    constexpr int64_t kRowsAhead = 16;
    const int64_t rows_of_word = 4 / size_;
    const bool whole = rows_ >= part_rows_ && row + rows_of_word <= in_;
    for (int64_t j = 0; j < kPanelColumns; j += part_rows_) {
      const char* part = part_[j / part_rows_];
      for (int64_t r = row + kRowsAhead; r < std::min(row + kRowsAhead + rows_of_word, in_); ++r) {
        for (int64_t at = 0; at < part_rows_ * size_; at += 64) V::prefetch(part + r * width_ * size_ + at);
      }
      if (whole) {
        word_of_columns<V, true>(to + j, part, row);
      } else {
        word_of_columns<V, false>(to + j, part, row);
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
