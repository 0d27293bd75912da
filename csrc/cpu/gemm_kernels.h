// The inner loop of the convolutions that are matrix products: a few rows times a panel of transformed weights, with all sums in
// registers. Per multiplication of two vectors: 1 / kRows loads of weights and 1 / (vectors of the panel) loads of a row.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "runs_ahead.h"
#include "vec.h"

namespace bnfast::BNFAST_NAMESPACE {

// f(0), ..., f(N - 1) with constant arguments: arrays indexed by them live in registers.
template <int N, class F>
BNFAST_INLINE void unrolled(F f) {
  [&]<int... I>(std::integer_sequence<int, I...>) BNFAST_INLINE_LAMBDA {
    (f(std::integral_constant<int, I>{}), ...);
  }(std::make_integer_sequence<int, N>{});
}

using FloatBlock = Block<float>;

// As many sums in registers as the instruction set has room for beside the weights.
constexpr int kWideRows = BNFAST_VECTOR_BYTES == 64 ? 12 : BNFAST_VECTOR_BYTES == 32 ? 6 : 2;
constexpr int kNarrowRows = BNFAST_VECTOR_BYTES >= 32 ? 4 : 2;
constexpr int kWideBlocks = BNFAST_VECTOR_BYTES == 64 ? 2 : 1;

// Calls put(row, block, sum) with each FloatBlock of [kRows, kBlocks * 16] = v [kRows, channels] times kBlocks blocks of weights
// [channels, 16], one block weights_step floats behind the other.
template <int kRows, int kBlocks, class A, class F>
BNFAST_INLINE void multiply(const float* v, int64_t v_step, const float* weights, int64_t weights_step, int64_t channels, A& ahead, F put) {
  constexpr int kParts = FloatBlock::kParts, kLanes = FloatBlock::kLanes;
  constexpr int kPointers = (kRows + 3) / 4;   // one for four rows: the next three are reached by addressing alone
  FloatBlock sums[kRows * kBlocks] = {};
  const float* from[kPointers];
  unrolled<kPointers>([&](auto i) BNFAST_INLINE_LAMBDA { from[i] = v + i * 4 * v_step; });
  const int64_t v_step3 = 3 * v_step;
  auto walk = ahead.walk();
  for (int64_t c = 0; c < channels; ++c, weights += kBlock) {
    // Hidden from the compiler, which would keep a pointer for every row and spill them all.
    unrolled<kPointers>([&](auto i) BNFAST_INLINE_LAMBDA { asm("" : "+r"(from[i])); });
    walk.line();
    FloatVec w[kBlocks * kParts];
    unrolled<kBlocks * kParts>([&](auto i) BNFAST_INLINE_LAMBDA {
      std::memcpy(&w[i], weights + i / kParts * weights_step + i % kParts * kLanes, sizeof(FloatVec));
    });
    unrolled<kRows>([&](auto r) BNFAST_INLINE_LAMBDA {
      const FloatVec value = broadcast(from[r / 4][r % 4 == 3 ? v_step3 : r % 4 * v_step]);
      unrolled<kBlocks * kParts>([&](auto i) BNFAST_INLINE_LAMBDA {
        FloatVec& sum = sums[r * kBlocks + i / kParts].part[i % kParts];
        sum = fma(value, w[i], sum);
      });
    });
    unrolled<kPointers>([&](auto i) BNFAST_INLINE_LAMBDA { ++from[i]; });
  }
  ahead.walked(walk);
  unrolled<kRows>([&](auto r) BNFAST_INLINE_LAMBDA {
    unrolled<kBlocks>([&](auto b) BNFAST_INLINE_LAMBDA { put(r, b, sums[r * kBlocks + b]); });
  });
}

// m [rows, 16] = v [rows, 16], one row directly behind the other, times one block of 16 channels: all of the weights stay in registers, so that a
// row's values are all that is loaded. rows: a multiple of 4.
template <class A>
BNFAST_INLINE void multiply_by_block(const float* v, const float* weights, int64_t rows, float* m, int64_t m_step, A& ahead) {
  FloatVec w[kBlock];
  unrolled<kBlock>([&](auto c) BNFAST_INLINE_LAMBDA { std::memcpy(&w[c], weights + c * kBlock, sizeof(FloatVec)); });
  auto walk = ahead.walk();
  const int64_t m_step3 = 3 * m_step;
  const auto take = [&](auto count) BNFAST_INLINE_LAMBDA {
    FloatVec sums[count];
    unrolled<kBlock>([&](auto c) BNFAST_INLINE_LAMBDA {
      walk.line();
      unrolled<count>([&](auto r) BNFAST_INLINE_LAMBDA {
        const FloatVec value = broadcast(v[r * kBlock + c]);
        if constexpr (c == 0) sums[r] = value * w[c];
        else sums[r] = fma(value, w[c], sums[r]);
      });
    });
    unrolled<count / 4>([&](auto i) BNFAST_INLINE_LAMBDA {
      float* to = m + i * 4 * m_step;
      asm("" : "+r"(to));   // as in multiply
      unrolled<4>([&](auto r) BNFAST_INLINE_LAMBDA { std::memcpy(to + (r == 3 ? m_step3 : r * m_step), &sums[4 * i + r], sizeof(FloatVec)); });
    });
    v += count * kBlock, m += count * m_step, rows -= count;
  };
  while (rows >= kWideRows) take(std::integral_constant<int, kWideRows>{});
  if (rows >= 8) take(std::integral_constant<int, 8>{});
  if (rows > 0) take(std::integral_constant<int, 4>{});
  ahead.walked(walk);
}

}  // namespace bnfast::BNFAST_NAMESPACE
