// expert_product in its plain form, without vectors of its own: what the fast ones are held against, and what runs
// where there are none. Row by row of the weight: it is widened once, laid out so that the 32 stripes of a sum lie
// side by side, and multiplied with every row of its expert.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "moe_route/experts.h"
#include "row_elements.h"

namespace moe_route::cpu::MOE_ROUTE_ISA {
namespace {

// Elements of a line [in], padded with zeros and turned: element (step * 32 + stripe) * V + e stands at
// (step * V + e') * 32 + stripe, with e' = e, or e ^ 1 for elements of 2 bytes.
template <class Type>
class Lines {
 public:
  using Element = typename Type::Element;
  static constexpr int64_t kAtATime = 16 / sizeof(Element);

  explicit Lines(int64_t in)
      : in_(in), size_((in + kStep - 1) / kStep * kStep), wide_(size_), strided_(size_) {}

  int64_t size() const { return size_; }

  void turn(const Element* from, int64_t stride, float* to) {
    if (stride != 1) {
      for (int64_t i = 0; i < in_; ++i) strided_[i] = from[i * stride];
      from = strided_.data();
    }
    const float* wide = Type::widened(wide_.data(), from, in_);
    for (int64_t i = 0; i < size_; ++i) {
      const int64_t vector = i / kAtATime, step = vector / kStripes;
      const int64_t e = i % kAtATime ^ (sizeof(Element) == 2 ? 1 : 0);
      to[(step * kAtATime + e) * kStripes + vector % kStripes] = i < in_ ? wide[i] : 0.0f;
    }
  }

  float dot(const float* a, const float* b) const {
    float sum[kStripes] = {};
    for (int64_t i = 0; i < size_; i += kStripes) {
      for (int s = 0; s < kStripes; ++s) sum[s] = math::fma(a[i + s], b[i + s], sum[s]);
    }
    for (int s = 0; s < kStripes; ++s) sum[s] += 0.0f;  // no -0, whatever was padded
    for (int apart = kStripes / 2; apart > 0; apart /= 2) {
      for (int s = 0; s < apart; ++s) sum[s] += sum[s + apart];
    }
    return sum[0];
  }

 private:
  static constexpr int64_t kStep = kStripes * kAtATime;
  int64_t in_, size_;
  std::vector<float> wide_;
  std::vector<Element> strided_;
};

template <class Type>
class Product {
  using Element = typename Type::Element;

 public:
  explicit Product(const ExpertProductArgs& args) : args_(args), lines_(args.in) {}

  // Columns begin .. end - 1 of all experts in a row: column c of expert e is e * out_columns + c.
  void run(int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end;) {
      const int64_t expert = at / args_.out_columns, first = at % args_.out_columns;
      const int64_t last = std::min(args_.out_columns, first + end - at);
      load_rows(expert);
      if (rows_ > 0) columns(expert, first, last);
      at += last - first;
    }
  }

 private:
  void load_rows(int64_t expert) {
    first_row_ = std::max<int64_t>(args_.offsets[expert], 0);
    rows_ = std::min(args_.counts[expert], args_.capacity - first_row_);
    if (rows_ <= 0) return;
    x_.resize(static_cast<size_t>(rows_ * lines_.size()));
    for (int64_t r = 0; r < rows_; ++r) {
      float* to = x_.data() + r * lines_.size();
      const int64_t source = args_.source(first_row_ + r);
      if (source < 0) {
        std::fill_n(to, lines_.size(), 0.0f);
      } else {
        lines_.turn(static_cast<const Element*>(args_.x) + source * args_.in, 1, to);
      }
    }
  }

  void columns(int64_t expert, int64_t first, int64_t last) {
    std::vector<float> gate(lines_.size()), up(lines_.size());
    for (int64_t c = first; c < last; ++c) {
      const int64_t gate_row = args_.gate_row(c), up_row = args_.up_row(c);
      if (gated()) line_of_weight(expert, gate_row, gate.data());
      line_of_weight(expert, up_row, up.data());
      const float gate_bias = bias(expert, gate_row), up_bias = bias(expert, up_row);
      for (int64_t r = 0; r < rows_; ++r) {
        const float* x = x_.data() + r * lines_.size();
        const float u = lines_.dot(up.data(), x) + up_bias;
        const float value = gated() ? apply_gated(args_.activation, lines_.dot(gate.data(), x) + gate_bias, u)
                                    : apply(args_.activation, u);
        Type::store(static_cast<Element*>(args_.out) + (first_row_ + r) * args_.out_columns + c, &value, 1);
      }
    }
  }

  bool gated() const { return args_.pairing != Pairing::kNone; }

  void line_of_weight(int64_t expert, int64_t row, float* to) {
    const auto* weight = static_cast<const Element*>(args_.weight) + expert * args_.weight_rows() * args_.in;
    if (args_.transposed) return lines_.turn(weight + row, args_.weight_rows(), to);
    lines_.turn(weight + row * args_.in, 1, to);
  }

  float bias(int64_t expert, int64_t row) const {
    if (args_.bias == nullptr) return 0.0f;
    const auto* from = static_cast<const Element*>(args_.bias) + expert * args_.weight_rows() + row;
    float wide;
    return *Type::widened(&wide, from, 1);
  }

  const ExpertProductArgs& args_;
  Lines<Type> lines_;
  int64_t first_row_ = 0, rows_ = 0;
  std::vector<float> x_;  // of the rows of one expert
};

template <class Type>
void plain_product(const ExpertProductArgs& args, Parallel parallel) {
  constexpr int64_t kElementsPerPiece = 1 << 16;  // of weights
  const ParallelBody body = [](int64_t begin, int64_t end, void* context) {
    Product<Type>(*static_cast<const ExpertProductArgs*>(context)).run(begin, end);
  };
  parallel(args.experts * args.out_columns, 1 + kElementsPerPiece / (args.in + 1), body,
           const_cast<ExpertProductArgs*>(&args));
}

}  // namespace

void expert_product(const ExpertProductArgs& args, Parallel parallel) {
  switch (args.type) {
    case DType::kBFloat16:
      return plain_product<BFloat16>(args, parallel);
    case DType::kFloat16:
      return plain_product<Float16>(args, parallel);
    default:
      return plain_product<Float32>(args, parallel);
  }
}

}  // namespace moe_route::cpu::MOE_ROUTE_ISA
