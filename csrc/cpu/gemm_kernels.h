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
  for (int64_t c = 0; c < channels; ++c, weights += kBlock) {
    // Hidden from the compiler, which would keep a pointer for every row and spill them all.
    unrolled<kPointers>([&](auto i) BNFAST_INLINE_LAMBDA { asm("" : "+r"(from[i])); });
    ahead.line();
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
  unrolled<kRows>([&](auto r) BNFAST_INLINE_LAMBDA {
    unrolled<kBlocks>([&](auto b) BNFAST_INLINE_LAMBDA { put(r, b, sums[r * kBlocks + b]); });
  });
}

// As many sums in registers as the instruction set has room for beside the weights.
constexpr int kWideRows = BNFAST_VECTOR_BYTES == 64 ? 12 : BNFAST_VECTOR_BYTES == 32 ? 6 : 2;
constexpr int kNarrowRows = BNFAST_VECTOR_BYTES >= 32 ? 4 : 2;
constexpr int kWideBlocks = BNFAST_VECTOR_BYTES == 64 ? 2 : 1;

}  // namespace bnfast::BNFAST_NAMESPACE
