// Random products of experts: sizes that are multiples of nothing, both layouts, every pairing and activation,
// experts without rows (whose weights are NaN: they are never read) and rows of no slot.
#pragma once
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "device_call.h"
#include "moe_route/experts.h"

namespace moe_route::test {

template <class Visit>
void inputs(ExpertProductArgs& a, Visit visit) {
  const int64_t element = bytes_of(a.type);
  visit(a.weight, a.experts * a.weight_rows() * a.in * element);
  visit(a.x, a.sources * a.in * element);
  visit(a.bias, a.experts * a.weight_rows() * element);
  visit(a.order, a.capacity * 8);
  visit(a.offsets, (a.experts + 1) * 8);
  visit(a.counts, a.experts * 8);
}
template <class Visit>
void outputs(ExpertProductArgs& a, Visit visit) {
  visit("out", a.out, a.type, a.capacity * a.out_columns, Start::kPoison);
}

template <class Visit>
void inputs(ExpertActivationArgs& a, Visit visit) {
  const int64_t element = bytes_of(a.type);
  visit(a.rows, a.capacity * a.row_columns() * element);
  visit(a.bias, a.experts * a.row_columns() * element);
  visit(a.offsets, (a.experts + 1) * 8);
}
template <class Visit>
void outputs(ExpertActivationArgs& a, Visit visit) {
  visit("out", a.out, a.type, a.capacity * a.columns, Start::kPoison);
}

// Every expert's rows behind one another, with a gap behind some.
struct ExpertsProblem {
  ExpertProductArgs args;
  std::vector<int64_t> order, offsets, counts;
  std::vector<unsigned char> x, weight, bias;

  template <class Random, class Numbers>
  ExpertsProblem(Random& g, int number, Numbers random_numbers) {
    static constexpr DType kTypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};
    static constexpr int kIns[] = {1, 7, 8, 24, 64, 257, 520, 1100}, kOuts[] = {1, 2, 9, 16, 40, 72};
    args.type = kTypes[number % 3];
    args.transposed = number / 3 % 2 == 1;
    args.pairing = static_cast<Pairing>(number / 6 % 3);
    args.activation.kind = static_cast<ActivationKind>(g.below(6));
    if (g.one_in(2)) args.activation.limit = 1.0f, args.activation.shift = 0.5f;
    args.activation.alpha = g.one_in(2) ? 1.702f : 1.0f;
    args.experts = 1 + g.below(number % 4 == 0 ? 90 : 5);
    args.in = g.pick(kIns), args.out_columns = g.pick(kOuts);
    args.k = 1 + g.below(4);
    const bool ordered = g.one_in(2);
    for (int e = 0; e < args.experts; ++e) {
      const int most = args.experts > 5 ? 3 : 20, rows = g.one_in(3) ? 0 : g.below(most);
      offsets.push_back(args.capacity), counts.push_back(rows);
      args.capacity += rows + (g.one_in(3) ? g.below(3) : 0);
    }
    offsets.push_back(args.capacity);
    args.capacity += g.below(3);
    args.sources = ordered ? 1 + g.below(9) : args.capacity;
    for (int64_t r = 0; ordered && r < args.capacity; ++r) {
      order.push_back(g.below(static_cast<int>(args.sources * args.k)) - (g.one_in(20) ? 1000 : 0));
    }
    const int64_t matrix = args.weight_rows() * args.in, element = bytes_of(args.type);
    x = random_numbers(g, args.type, args.sources * args.in);
    weight = random_numbers(g, args.type, args.experts * matrix);
    bias = random_numbers(g, args.type, args.experts * args.weight_rows());
    for (int e = 0; e < args.experts; ++e) {
      if (counts[static_cast<size_t>(e)] > 0) continue;
      std::memset(weight.data() + e * matrix * element, 0xff, static_cast<size_t>(matrix * element));
    }
    static int mark;
    args.x = x.data(), args.weight = weight.data(), args.out = &mark;
    if (g.one_in(2)) args.bias = bias.data();
    if (ordered) args.order = order.data();
    args.offsets = offsets.data(), args.counts = counts.data();
  }
  ExpertsProblem(const ExpertsProblem&) = delete;
  ExpertsProblem& operator=(const ExpertsProblem&) = delete;
};

// What stands between the products: rows of some experts, and some of nobody behind them, which keep their poison.
struct ActivationProblem {
  ExpertActivationArgs args;
  std::vector<int64_t> offsets;
  std::vector<unsigned char> rows, bias;

  template <class Random, class Numbers>
  ActivationProblem(Random& g, int number, Numbers random_numbers) {
    static constexpr DType kTypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};
    static constexpr int kColumns[] = {1, 3, 8, 24, 100, 512, 1032, 2100};
    args.type = kTypes[number % 3];
    args.pairing = static_cast<Pairing>(number / 3 % 3);
    args.activation.kind = static_cast<ActivationKind>(g.below(6));
    if (g.one_in(2)) args.activation.limit = 1.0f, args.activation.shift = 0.5f;
    args.activation.alpha = g.one_in(2) ? 1.702f : 1.0f;
    args.experts = 1 + g.below(number % 4 == 0 ? 300 : 5);
    args.columns = g.pick(kColumns);
    for (int e = 0; e < args.experts; ++e) {
      offsets.push_back(args.capacity);
      args.capacity += g.one_in(3) ? 0 : g.below(args.experts > 5 ? 3 : 20);
    }
    offsets.push_back(args.capacity);
    args.capacity += g.below(4);
    rows = random_numbers(g, args.type, args.capacity * args.row_columns());
    bias = random_numbers(g, args.type, args.experts * args.row_columns());
    static int mark;
    args.rows = rows.data(), args.out = &mark, args.offsets = offsets.data();
    if (g.one_in(2)) args.bias = bias.data();
  }
  ActivationProblem(const ActivationProblem&) = delete;
  ActivationProblem& operator=(const ActivationProblem&) = delete;
};

}  // namespace moe_route::test
