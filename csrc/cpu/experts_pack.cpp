// pack_expert_weight: rows of a weight into panels (ExpertPanels), panel by panel.
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "moe_route/experts.h"

namespace moe_route::cpu {
namespace {

class Packing {
 public:
  explicit Packing(const ExpertPackArgs& args)
      : args_(args),
        of_(args.type, args.in, args.out_columns, args.pairing),
        size_(args.type == DType::kFloat32 ? 4 : 2),
        width_(args.pairing == Pairing::kNone ? args.out_columns : 2 * args.out_columns) {}

  int64_t all_panels() const { return args_.experts * of_.panels; }
  int64_t panel_size() const { return of_.panel_size(); }

  void panel(int64_t number) const {
    const int64_t expert = number / of_.panels, column = number % of_.panels * of_.columns;
    uint32_t* to = args_.panels + number * of_.panel_size();
    const char* from = static_cast<const char*>(args_.weight) + expert * width_ * args_.in * size_;
    int64_t row[kPanelColumns];
    for (int64_t j = 0; j < kPanelColumns; ++j) row[j] = row_of(column, j);
    for (int64_t group = 0; group < of_.groups; ++group) {
      uint32_t* words = to + of_.word_of_group(group) * kPanelColumns;
      if (args_.transposed) {
        columns_of_group(words, from, group, row);
      } else {
        rows_of_group(words, from, group, row);
      }
    }
  }

 private:
  // The row of the weight that is row j of the panel whose first column is `column`, or -1.
  int64_t row_of(int64_t column, int64_t j) const {
    if (args_.pairing == Pairing::kAlternating) return 2 * column + j < width_ ? 2 * column + j : -1;
    const int64_t c = column + j % of_.columns;
    return c >= args_.out_columns ? -1 : j < of_.columns ? c : args_.out_columns + c;
  }

  int64_t elements() const { return 16 / size_; }

  void rows_of_group(uint32_t* words, const char* from, int64_t group, const int64_t* row) const {
    const int64_t first = group * elements(), count = std::min(elements(), args_.in - first);
    for (int64_t j = 0; j < kPanelColumns; ++j) {
      uint32_t group_words[kWordsAtATime] = {};
      if (row[j] >= 0) std::memcpy(group_words, from + (row[j] * args_.in + first) * size_, count * size_);
      for (int64_t w = 0; w < kWordsAtATime; ++w) words[w * kPanelColumns + j] = group_words[w];
    }
  }

  void columns_of_group(uint32_t* words, const char* from, int64_t group, const int64_t* row) const {
    std::fill_n(words, kWordsAtATime * kPanelColumns, 0u);
    const int64_t first = group * elements(), count = std::min(elements(), args_.in - first);
    for (int64_t i = 0; i < count; ++i) {
      const char* line = from + (first + i) * width_ * size_;
      char* to = reinterpret_cast<char*>(words) + i * size_ / 4 * kPanelColumns * 4 + i * size_ % 4;
      for (int64_t j = 0; j < kPanelColumns; ++j) {
        if (row[j] >= 0) std::memcpy(to + j * 4, line + row[j] * size_, size_);
      }
    }
  }

  const ExpertPackArgs& args_;
  const ExpertPanels of_;
  const int64_t size_, width_;  // bytes of an element, rows of the weight [out, in]
};

}  // namespace

void pack_expert_weight(const ExpertPackArgs& args, Parallel parallel) {
  constexpr int64_t kWordsPerPiece = 1 << 14;
  const Packing packing(args);
  const ParallelBody body = [](int64_t begin, int64_t end, void* context) {
    for (int64_t i = begin; i < end; ++i) static_cast<const Packing*>(context)->panel(i);
  };
  parallel(packing.all_panels(), 1 + kWordsPerPiece / (packing.panel_size() + 1), body,
           const_cast<Packing*>(&packing));
}

}  // namespace moe_route::cpu
