// Weights [E, out, in]: the sums of rows of a weight with lines of x, in the order of experts.h, a vector of stripes
// at a time.
//
// 16 bytes of a row are what one stripe takes, so the words of 4 vectors are turned (4 x 4, inside every 16 bytes):
// then a vector has one word of each of its stripes. The lines of x are laid out so once. Turning costs 2 shuffles a
// vector of weights, which hide behind its way from memory.
#pragma once
#include <cstdint>

#include "moe_route/experts.h"

namespace moe_route::cpu::MOE_ROUTE_ISA {
namespace {

inline constexpr int kParts = kStripes / Vector::kLanes;  // vectors of sums
inline constexpr int64_t kPartBytes = 4 * sizeof(Vector::Words), kStepBytes = kParts * kPartBytes;

// Sums of one row of weights with one line of x.
struct Sums {
  Vector::Floats part[kParts];
};

// Floats that a line of x takes when it is laid out, for one step over its 32 stripes.
template <class Type>
inline constexpr int64_t kStepFloats = Type::kPlanes * kStepBytes / 4;

inline void load_words(Vector::Words (&words)[4], const char* from, int64_t bytes) {
  constexpr int64_t kBytes = sizeof(Vector::Words);
  for (int i = 0; i < 4; ++i, bytes -= kBytes) {
    const char* at = from + (bytes > 0 ? i * kBytes : 0);
    words[i] = bytes >= kBytes ? Vector::words(at) : Vector::first_words(at, bytes > 0 ? bytes : 0);
  }
}

// A line of `bytes`, turned and widened, zeros behind its end up to a whole step.
template <class Type>
void lay_out(float* to, const char* from, int64_t bytes) {
  constexpr int64_t kVectorFloats = Type::kPlanes * Vector::kLanes;
  for (int64_t at = 0; at < bytes; at += kStepBytes) {
    for (int64_t part = at; part < at + kStepBytes; part += kPartBytes) {
      Vector::Words words[4];
      load_words(words, from + part, bytes - part);
      Vector::turn(words);
      for (int w = 0; w < 4; ++w, to += kVectorFloats) Type::lay_out(to, words[w]);
    }
  }
}

// One row of weights, or a part of it, as it lies in memory, with kTokens lines of x; `to` has the sums so far. With more
// than one line, it asks for as many bytes from `ahead` on: then they come while sums are added up. With one, asking
// takes longer than it saves.
template <class Type, int kTokens>
void sum_row(const char* weight, int64_t bytes, const char* ahead, const float* const* x, int64_t x_at,
             Sums* to) {
  constexpr int64_t kVectorFloats = Type::kPlanes * Vector::kLanes;
  Sums sums[kTokens];
  for (int t = 0; t < kTokens; ++t) sums[t] = to[t];
  const auto add = [&](const Vector::Words(&turned)[4], int part, int64_t at) {
#pragma GCC unroll 4
    for (int w = 0; w < 4; ++w) {
      const auto factors = Type::factors(turned[w]);
#pragma GCC unroll 8
      for (int t = 0; t < kTokens; ++t) {
        const auto line = Type::load(x[t] + at + (part * 4 + w) * kVectorFloats);
        sums[t].part[part] = Type::add(factors, line, sums[t].part[part]);
      }
    }
  };
  int64_t at = x_at;
  for (; bytes >= kStepBytes;
       bytes -= kStepBytes, weight += kStepBytes, ahead += kStepBytes, at += kStepFloats<Type>) {
#pragma GCC unroll 4
    for (int part = 0; part < kParts; ++part) {
      Vector::Words words[4];
      for (int i = 0; i < 4; ++i) {
        words[i] = Vector::words(weight + part * kPartBytes + i * static_cast<int64_t>(sizeof words[0]));
        if (kTokens > 1)
          Vector::prefetch(ahead + part * kPartBytes + i * static_cast<int64_t>(sizeof words[0]));
      }
      Vector::turn(words);
      add(words, part, at);
    }
  }
  // Stripes behind the end have nothing to add.
#pragma GCC unroll 4
  for (int part = 0; part < kParts; ++part) {
    if (bytes <= part * kPartBytes) break;
    Vector::Words words[4];
    load_words(words, weight + part * kPartBytes, bytes - part * kPartBytes);
    Vector::turn(words);
    add(words, part, at);
  }
  for (int t = 0; t < kTokens; ++t) to[t] = sums[t];
}

// The whole sums of kLanes rows of weights, sums[0], sums[stride], ..., in the order of the rows.
inline Vector::Floats fold(const Sums* sums, int64_t stride) {
  Vector::Floats lanes[Vector::kLanes];
  for (int i = 0; i < Vector::kLanes; ++i, sums += stride) {
    Vector::Floats parts[kParts];
    for (int p = 0; p < kParts; ++p) parts[p] = sums->part[p];
    for (int apart = kParts / 2; apart > 0; apart /= 2) {
      for (int p = 0; p < apart; ++p) parts[p] = Vector::add(parts[p], parts[p + apart]);
    }
    lanes[i] = parts[0];
  }
  return Vector::add(Vector::fold(lanes), Vector::zero());  // no -0, whatever was padded
}

}  // namespace
}  // namespace moe_route::cpu::MOE_ROUTE_ISA
