// expert_products with vectors, compiled once per instruction set (each file in a namespace of its own).
//
// One parallel region for all products (experts_work.h), since waking threads takes as long as reading half a megabyte.
// First every line of x that some row reads is laid out as the kernels want it, once. Then the threads take tiles, some
// columns of one expert, one after the other as they get free. What a tile is, and the order inside a line, is that of
// the layout of the weights (experts_row_tiles.h, experts_column_tiles.h, experts_panel_tiles.h).
#include <algorithm>
#include <cstdint>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#include "experts_column_tiles.h"
#include "experts_factors.h"
#include "experts_memory.h"
#include "experts_panel_tiles.h"
#include "experts_row_tiles.h"
#include "experts_work.h"
#include "moe_route/experts.h"

namespace moe_route::cpu::MOE_ROUTE_ISA {
namespace {

constexpr int64_t kElementsPerPiece = 1 << 15;  // of lines to lay out

template <class Type, class Tiles>
class Product final : public Work {
 public:
  // Of the experts that have `least` to `most` rows.
  Product(const ExpertProductArgs& args, int threads, int64_t least, int64_t most)
      : args_(args),
        least_(least),
        most_(most),
        tiles_(args, threads),
        tiles_of_expert_((args.out_columns + tiles_.columns() - 1) / tiles_.columns()) {
    find_lines();
    lines_taken_.total = static_cast<int64_t>(sources_.size());
    tiles_taken_.total = static_cast<int64_t>(experts_.size()) * tiles_of_expert_;
  }

  int64_t pieces() const override { return tiles_taken_.total; }
  const Taken& lines_taken() const override { return lines_taken_; }
  const Taken& tiles_taken() const override { return tiles_taken_; }

  void lay_out() override {
    const int64_t at_a_time = 1 + kElementsPerPiece / (args_.in + 1);
    for (int64_t first; (first = lines_taken_.take(at_a_time)) < lines_taken_.total;) {
      const int64_t end = std::min(first + at_a_time, lines_taken_.total);
      lay_out_lines(first, end);
      lines_taken_.finish(end - first);
    }
  }

  void multiply() override {
    typename Tiles::Scratch scratch;
    std::vector<const float*> x;
    int64_t next = Tiles::kFetchesNext ? tiles_taken_.take(1) : -1;
    for (int64_t i; (i = Tiles::kFetchesNext ? next : tiles_taken_.take(1)) < tiles_taken_.total;) {
      if constexpr (Tiles::kFetchesNext) {
        next = tiles_taken_.take(1);
        const bool any = next < tiles_taken_.total;
        scratch.next = any ? tiles_.fetched(rows_of(next).expert, column_of(next)) : PanelSource();
      }
      const Rows& rows = rows_of(i);
      x.clear();
      for (int64_t r = rows.first; r < rows.first + rows.count; ++r) {
        x.push_back(line(line_of_row_[static_cast<size_t>(r)]));
      }
      tiles_.run(rows, column_of(i), x.data(), scratch);
      tiles_taken_.finish(1);
    }
  }

 private:
  // The experts that have rows, the source of every line that they read, and the line of every row.
  void find_lines() {
    std::vector<int64_t> line_of(static_cast<size_t>(args_.sources), -1);
    line_of_row_.resize(static_cast<size_t>(args_.capacity));
    int64_t zeros = -1;
    for (int32_t e = 0; e < args_.experts; ++e) {
      const int64_t first = std::max<int64_t>(args_.offsets[e], 0);
      const int64_t count = std::min(args_.counts[e], args_.capacity - first);
      if (count < least_ || count > most_) continue;
      experts_.push_back({e, first, count});
      for (int64_t r = first; r < first + count; ++r) {
        const int64_t source = args_.source(r);
        int64_t& line = source < 0 ? zeros : line_of[static_cast<size_t>(source)];
        if (line < 0) {
          line = static_cast<int64_t>(sources_.size());
          sources_.push_back(source);
        }
        line_of_row_[static_cast<size_t>(r)] = line;
      }
    }
    lines_ = memory<float>(static_cast<int64_t>(sources_.size()) * tiles_.line_floats());
  }

  const float* line(int64_t i) const { return lines_.get() + i * tiles_.line_floats(); }

  void lay_out_lines(int64_t begin, int64_t end) {
    const auto line_bytes = args_.in * static_cast<int64_t>(sizeof(typename Type::Element));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t source = sources_[static_cast<size_t>(i)];
      float* to = lines_.get() + i * tiles_.line_floats();
      if (source < 0) {
        std::fill_n(to, tiles_.line_floats(), 0.0f);
      } else {
        tiles_.lay_out(to, static_cast<const char*>(args_.x) + source * line_bytes);
      }
    }
  }

  const Rows& rows_of(int64_t tile) const { return experts_[static_cast<size_t>(tile / tiles_of_expert_)]; }
  int64_t column_of(int64_t tile) const { return tile % tiles_of_expert_ * tiles_.columns(); }

  const ExpertProductArgs& args_;
  const int64_t least_, most_;
  const Tiles tiles_;
  const int64_t tiles_of_expert_;
  std::vector<Rows> experts_;
  std::vector<int64_t> sources_;      // of the lines; -1: zeros
  std::vector<int64_t> line_of_row_;  // of rows that an expert has
  Memory<float> lines_;
  Taken lines_taken_, tiles_taken_;
};

// Weights of experts with few rows are read as they lie, where nothing has to be laid out.
template <class Type>
Works product(const ExpertProductArgs& args, int threads) {
  const int64_t all = args.capacity;
  Works works;
  const auto add = [&]<class Tiles>(std::type_identity<Tiles>, int64_t least, int64_t most) {
    auto work = std::make_unique<Product<Type, Tiles>>(args, threads, least, most);
    if (work->pieces() > 0) works.push_back(std::move(work));
  };
  if (args.panels != nullptr) {
    add(std::type_identity<PanelTiles<Type>>{}, 1, all);
  } else if (args.transposed) {
    add(std::type_identity<ColumnTiles<Type>>{}, 1, ColumnTiles<Type>::kFew);
    add(std::type_identity<PanelTiles<Type>>{}, ColumnTiles<Type>::kFew + 1, all);
  } else {
    add(std::type_identity<RowTiles<Type>>{}, 1, RowTiles<Type>::kFew);
    add(std::type_identity<PanelTiles<Type>>{}, RowTiles<Type>::kFew + 1, all);
  }
  return works;
}

Works product_of_type(const ExpertProductArgs& args, int threads) {
#if !defined(__AVX512BF16__)  // whose dot products others have no use for: experts.cpp sends them to AVX-512
  if (args.type == DType::kFloat16) return product<Float16Factors>(args, threads);
  if (args.type == DType::kFloat32) return product<WholeFactors>(args, threads);
#endif
  return product<BFloat16Factors>(args, threads);
}

}  // namespace

void expert_products(const ExpertProductArgs* products, int count, Parallel parallel, int threads) {
  std::vector<Works> in_turn;
  for (int i = 0; i < count; ++i) in_turn.push_back(product_of_type(products[i], threads));
  SharedWork(std::move(in_turn)).run(parallel, threads);
}

}  // namespace moe_route::cpu::MOE_ROUTE_ISA
