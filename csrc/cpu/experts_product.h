// expert_product with vectors, compiled once per instruction set (each file in a namespace of its own).
//
// First every line of x that some row reads is laid out (experts_rows.h), once. Then the threads take tiles, those of
// 2 * kLanes rows of the weight of one expert, one after the other as they get free. A tile reads its weights from
// memory once, whatever the number of rows of x. Up to kFew rows: each row of the weight is multiplied with all of
// them as it comes. More: kPanelRows rows of the weight at a time are turned into a panel, which stays in the
// first-level cache while it is multiplied with kPanelTokens lines of x after the other.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <new>
#include <vector>

#include "experts_factors.h"
#include "experts_rows.h"
#include "moe_route/experts.h"

namespace moe_route::cpu::MOE_ROUTE_ISA {
namespace {

constexpr int64_t kFew = 4;
constexpr int kChunk = 4 * Vector::kPanelTokens;  // rows of x whose sums are kept
constexpr int64_t kBytesPerPiece = 1 << 16;       // of lines to lay out

struct FreeAligned {
  void operator()(void* p) const { ::operator delete(p, std::align_val_t{64}); }
};
template <class T>
using Memory = std::unique_ptr<T[], FreeAligned>;
// Not initialized.
template <class T>
Memory<T> memory(int64_t count) {
  return Memory<T>(
      static_cast<T*>(::operator new(static_cast<size_t>(count) * sizeof(T), std::align_val_t{64})));
}

template <class Type>
class Product {
  using Element = typename Type::Element;

 public:
  Product(const ExpertProductArgs& args, int threads)
      : args_(args),
        threads_(threads),
        line_bytes_(args.in * static_cast<int64_t>(sizeof(Element))),
        line_floats_((line_bytes_ + kStepBytes - 1) / kStepBytes * kStepFloats<Type>),
        gated_(args.pairing != Pairing::kNone),
        tile_columns_(gated_ ? Vector::kLanes : kTileRows),
        tiles_((args.out_columns + tile_columns_ - 1) / tile_columns_) {}

  void run(Parallel parallel) {
    find_lines();
    const ParallelBody lay_out_some = [](int64_t begin, int64_t end, void* product) {
      static_cast<Product*>(product)->lay_out_lines(begin, end);
    };
    parallel(static_cast<int64_t>(sources_.size()), 1 + kBytesPerPiece / (line_bytes_ + 1), lay_out_some,
             this);
    const ParallelBody take_tiles = [](int64_t, int64_t, void* product) {
      static_cast<Product*>(product)->work();
    };
    const int64_t tiles = static_cast<int64_t>(experts_.size()) * tiles_;
    parallel(std::min<int64_t>(tiles, threads_), 1, take_tiles, this);
  }

 private:
  static constexpr int kTileRows = 2 * Vector::kLanes;  // of the weight

  struct Scratch {
    Memory<char> panel, sums;
  };

  struct Rows {
    int32_t expert;
    int64_t first, count;
  };

  struct Tile {
    Rows rows;
    int64_t column;  // the first
    int columns;
    // Row i of the tile: its number in the weight, and where its sums stand. Those of a gate come first.
    int64_t weight_row[kTileRows];
    int slot[kTileRows];
    int size;  // rows of the weight
  };

  // The experts that have rows, the source of every line that they read, and the line of every row.
  void find_lines() {
    std::vector<int64_t> line_of(static_cast<size_t>(args_.sources), -1);
    line_of_row_.resize(static_cast<size_t>(args_.capacity));
    int64_t zeros = -1;
    for (int32_t e = 0; e < args_.experts; ++e) {
      const int64_t first = std::max<int64_t>(args_.offsets[e], 0);
      const int64_t count = std::min(args_.counts[e], args_.capacity - first);
      if (count <= 0) continue;
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
    lines_ = memory<float>(static_cast<int64_t>(sources_.size()) * line_floats_);
  }

  void lay_out_lines(int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t source = sources_[static_cast<size_t>(i)];
      float* to = lines_.get() + i * line_floats_;
      if (source < 0) {
        std::fill_n(to, line_floats_, 0.0f);
      } else {
        lay_out<Type>(to, static_cast<const char*>(args_.x) + source * line_bytes_, line_bytes_);
      }
    }
  }

  void work() {
    const int64_t tiles = static_cast<int64_t>(experts_.size()) * tiles_;
    Scratch scratch;
    std::vector<const float*> x;
    for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < tiles;) {
      const Tile tile = tile_at(experts_[static_cast<size_t>(i / tiles_)], i % tiles_ * tile_columns_);
      x.clear();
      for (int64_t r = 0; r < tile.rows.count; ++r) {
        x.push_back(lines_.get() + line_of_row_[static_cast<size_t>(tile.rows.first + r)] * line_floats_);
      }
      if (tile.rows.count <= kFew) {
        few_rows(tile, x.data());
      } else {
        if (!scratch.panel) {
          scratch.panel = memory<char>(parts() * kPartBytes * Vector::kPanelRows);
          scratch.sums = memory<char>(kTileRows * kChunk * static_cast<int64_t>(sizeof(Sums)));
          std::fill_n(scratch.sums.get(), kTileRows * kChunk * sizeof(Sums), char{0});
        }
        many_rows(tile, x.data(), scratch);
      }
    }
  }

  Tile tile_at(const Rows& rows, int64_t column) const {
    Tile tile;
    tile.rows = rows;
    tile.column = column;
    tile.columns = static_cast<int>(std::min(tile_columns_, args_.out_columns - column));
    tile.size = gated_ ? 2 * tile.columns : tile.columns;
    for (int i = 0; i < tile.size; ++i) {
      const bool alternating = args_.pairing == Pairing::kAlternating;
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

  void few_rows(const Tile& tile, const float* const* x) {
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
  void sum_few(int count, const char* weight, const float* const* x, Sums* to) {
    if constexpr (kMost > 1) {
      if (count < kMost) return sum_few<kMost - 1>(count, weight, x, to);
    }
    sum_row<Type, kMost>(weight, line_bytes_, x, to);
  }

  int64_t parts() const { return (line_bytes_ + kPartBytes - 1) / kPartBytes; }

  void many_rows(const Tile& tile, const float* const* x, Scratch& scratch) {
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
                  const char* const* next) {
    if constexpr (kMost > 1) {
      if (count < kMost) return sum_panels<kMost - 1>(count, panel, x, to, next);
    }
    sum_panel<Type, kMost>(panel, parts(), x, to, next);
  }

  // Folds the sums of row t of the tile's, and writes its columns. Those of slot s are sums[s * stride].
  void finish(const Tile& tile, int64_t t, const Sums* sums, int64_t stride) {
    alignas(64) float low[Vector::kLanes], high[Vector::kLanes];
    Vector::store(low, fold(sums, stride));
    Vector::store(high, fold(sums + Vector::kLanes * stride, stride));
    const int64_t row = tile.rows.first + t;
    if (gated_) {
      const int64_t apart = args_.pairing == Pairing::kAlternating ? 2 : 1;
      add_bias(low, tile, args_.gate_row(tile.column), apart, tile.columns);
      add_bias(high, tile, args_.up_row(tile.column), apart, tile.columns);
      activate_gated(low, high);
      return store(row, tile.column, low, tile.columns);
    }
    const int first = std::min(tile.columns, Vector::kLanes), second = tile.columns - first;
    add_bias(low, tile, tile.column, 1, first);
    activate_plain(low);
    store(row, tile.column, low, first);
    if (second <= 0) return;
    add_bias(high, tile, tile.column + Vector::kLanes, 1, second);
    activate_plain(high);
    store(row, tile.column + Vector::kLanes, high, second);
  }

  void add_bias(float* sums, const Tile& tile, int64_t row, int64_t apart, int count) {
    if (args_.bias == nullptr) return;
    const auto* bias = static_cast<const Element*>(args_.bias) + tile.rows.expert * args_.weight_rows() + row;
    float wide;
    for (int i = 0; i < count; ++i) sums[i] += *Type::widened(&wide, bias + i * apart, 1);
  }

  // The kind is a constant inside each loop, so that the compiler makes vectors of it.
  template <class Body>
  void for_kind(Body body) {
    Activation activation = args_.activation;
    const auto with = [&](ActivationKind kind) {
      activation.kind = kind;
      for (int i = 0; i < Vector::kLanes; ++i) body(activation, i);
    };
    switch (activation.kind) {
      case ActivationKind::kSilu:
        return with(ActivationKind::kSilu);
      case ActivationKind::kGelu:
        return with(ActivationKind::kGelu);
      case ActivationKind::kGeluTanh:
        return with(ActivationKind::kGeluTanh);
      case ActivationKind::kRelu:
        return with(ActivationKind::kRelu);
      case ActivationKind::kReluSquared:
        return with(ActivationKind::kReluSquared);
      case ActivationKind::kNone:
        return with(ActivationKind::kNone);
    }
  }
  void activate_gated(float* gate, const float* up) {
    for_kind([&](const Activation& a, int i) { gate[i] = apply_gated(a, gate[i], up[i]); });
  }
  void activate_plain(float* values) {
    if (args_.activation.kind == ActivationKind::kNone) return;
    for_kind([&](const Activation& a, int i) { values[i] = apply(a, values[i]); });
  }

  void store(int64_t row, int64_t column, const float* values, int count) {
    Element* to = static_cast<Element*>(args_.out) + row * args_.out_columns + column;
    if (count == Vector::kLanes) return Type::store(to, values, Vector::kLanes);
    Type::store(to, values, count);
  }

  const ExpertProductArgs& args_;
  const int threads_;
  const int64_t line_bytes_, line_floats_;
  const bool gated_;
  const int64_t tile_columns_, tiles_;
  std::vector<Rows> experts_;
  std::vector<int64_t> sources_;      // of the lines; -1: zeros
  std::vector<int64_t> line_of_row_;  // of rows that an expert has
  Memory<float> lines_;
  std::atomic<int64_t> next_{0};  // tile
};

}  // namespace

void expert_product(const ExpertProductArgs& args, Parallel parallel, int threads) {
  switch (args.type) {
    case DType::kBFloat16:
      return Product<BFloat16Factors>(args, threads).run(parallel);
    case DType::kFloat16:
      return Product<Float16Factors>(args, threads).run(parallel);
    default:
      return Product<WholeFactors>(args, threads).run(parallel);
  }
}

}  // namespace moe_route::cpu::MOE_ROUTE_ISA
