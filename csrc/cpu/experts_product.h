// expert_product with vectors, compiled once per instruction set (each file in a namespace of its own).
//
// First every line of x that some row reads is laid out as the kernels want it, once. Then the threads take tiles, some
// columns of one expert, one after the other as they get free. What a tile is, and the order inside a line, is that of
// the layout of the weights (experts_row_tiles.h, experts_column_tiles.h, experts_panel_tiles.h).
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include "experts_column_tiles.h"
#include "experts_factors.h"
#include "experts_memory.h"
#include "experts_panel_tiles.h"
#include "experts_row_tiles.h"
#include "moe_route/experts.h"

namespace moe_route::cpu::MOE_ROUTE_ISA {
namespace {

constexpr int64_t kElementsPerPiece = 1 << 15;  // of lines to lay out

template <class Type, class Tiles>
class Product {
 public:
  // Of the experts that have `least` to `most` rows.
  Product(const ExpertProductArgs& args, int threads, int64_t least, int64_t most)
      : args_(args),
        least_(least),
        most_(most),
        tiles_(args, threads),
        threads_(threads),
        tiles_of_expert_((args.out_columns + tiles_.columns() - 1) / tiles_.columns()) {}

  void run(Parallel parallel) {
    find_lines();
    if (experts_.empty()) return;
    const ParallelBody lay_out = [](int64_t begin, int64_t end, void* product) {
      static_cast<Product*>(product)->lay_out_lines(begin, end);
    };
    parallel(static_cast<int64_t>(sources_.size()), 1 + kElementsPerPiece / (args_.in + 1), lay_out, this);
    const ParallelBody work = [](int64_t, int64_t, void* product) { static_cast<Product*>(product)->work(); };
    parallel(std::min<int64_t>(all_tiles(), threads_), 1, work, this);
  }

 private:
  int64_t all_tiles() const { return static_cast<int64_t>(experts_.size()) * tiles_of_expert_; }

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

  // What one thread does: any tile that nobody has taken.
  void work() {
    typename Tiles::Scratch scratch;
    std::vector<const float*> x;
    int64_t next = Tiles::kFetchesNext ? take() : -1;
    for (int64_t i; (i = Tiles::kFetchesNext ? next : take()) < all_tiles();) {
      if constexpr (Tiles::kFetchesNext) {
        next = take();
        scratch.next = next < all_tiles() ? tiles_.source(rows_of(next).expert, column_of(next)) : PanelSource();
      }
      const Rows& rows = rows_of(i);
      x.clear();
      for (int64_t r = rows.first; r < rows.first + rows.count; ++r) {
        x.push_back(line(line_of_row_[static_cast<size_t>(r)]));
      }
      tiles_.run(rows, column_of(i), x.data(), scratch);
    }
  }

  int64_t take() { return next_.fetch_add(1, std::memory_order_relaxed); }
  const Rows& rows_of(int64_t tile) const { return experts_[static_cast<size_t>(tile / tiles_of_expert_)]; }
  int64_t column_of(int64_t tile) const { return tile % tiles_of_expert_ * tiles_.columns(); }

  const ExpertProductArgs& args_;
  const int64_t least_, most_;
  const Tiles tiles_;
  const int threads_;
  const int64_t tiles_of_expert_;
  std::vector<Rows> experts_;
  std::vector<int64_t> sources_;      // of the lines; -1: zeros
  std::vector<int64_t> line_of_row_;  // of rows that an expert has
  Memory<float> lines_;
  std::atomic<int64_t> next_{0};  // tile
};

// Packed weights make one pass. Of others, experts with few rows are read as they lie, where nothing has to be laid out.
template <class Type>
void product(const ExpertProductArgs& args, Parallel parallel, int threads) {
  const int64_t all = args.capacity;
  if (args.panels != nullptr) return Product<Type, PanelTiles<Type>>(args, threads, 1, all).run(parallel);
  if (args.transposed) return Product<Type, ColumnTiles<Type>>(args, threads, 1, all).run(parallel);
  const int64_t few = RowTiles<Type>::kFew;
  Product<Type, RowTiles<Type>>(args, threads, 1, few).run(parallel);
  if (all > few) Product<Type, PanelTiles<Type>>(args, threads, few + 1, all).run(parallel);
}

}  // namespace

void expert_product(const ExpertProductArgs& args, Parallel parallel, int threads) {
  switch (args.type) {
    case DType::kBFloat16:
      return product<BFloat16Factors>(args, parallel, threads);
    case DType::kFloat16:
      return product<Float16Factors>(args, parallel, threads);
    default:
      return product<WholeFactors>(args, parallel, threads);
  }
}

}  // namespace moe_route::cpu::MOE_ROUTE_ISA
