// What AVX512_BF16 adds to AVX-512: kernels of bfloat16 that round and multiply it in one instruction.
#include "capability_prelude.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi,bmi2,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")
#endif

#define BNFAST_NAMESPACE avx512_bf16
#define BNFAST_VECTOR_BYTES 64
#define BNFAST_ROUNDS_BF16
#include "bn_kernels.h"
#include "conv_dot_kernels.h"
#include "conv_grouped_kernels.h"
#include "conv_winograd_kernels.h"
#include "max_pool_kernels.h"

namespace bnfast::avx512_bf16 {
namespace {

// 12 or 4 positions times the pairs of 16 output channels, with all sums in registers.
struct VectorTile {
  explicit VectorTile(const DotConv&) {}
  static int64_t rows(int64_t left) { return left >= kWideRows ? kWideRows : kNarrowRows; }
  static int64_t lines(const DotConv& d, int64_t positions) { return positions / kWideRows * d.channels / 2; }

  template <int kBlocks, class F>
  static void product(const DotConv& d, const DotSpan& span, const bf16* x, const bf16* weights, int64_t rows, RunsAhead& ahead, F put) {
    if (rows == kWideRows) tile<kWideRows, kBlocks>(d, span, x, weights, ahead, put);
    else tile<kNarrowRows, kBlocks>(d, span, x, weights, ahead, put);
  }

  template <int kRows, int kBlocks, class F>
  static BNFAST_INLINE void tile(const DotConv& d, const DotSpan& span, const bf16* x, const bf16* weights, RunsAhead& ahead, F put) {
    constexpr int kPointers = kRows / 4;   // see multiply() of gemm_kernels.h
    __m512 sums[kRows * kBlocks] = {};
    const int64_t step = d.x_step, step3 = 3 * step;
    auto walk = ahead.walk();
    for (int64_t t = 0; t < span.tap_count; ++t) {
      const bf16* from[kPointers];
      unrolled<kPointers>([&](auto i) BNFAST_INLINE_LAMBDA { from[i] = x + span.taps[t].input + i * 4 * step; });
      const bf16* w = weights + span.taps[t].weights;
      for (int64_t c = 0; c < d.channels; c += 2, w += 2 * kBlock) {
        unrolled<kPointers>([&](auto i) BNFAST_INLINE_LAMBDA { asm("" : "+r"(from[i])); });
        walk.line();
        __m512i pairs[kBlocks];
        unrolled<kBlocks>([&](auto b) BNFAST_INLINE_LAMBDA { pairs[b] = _mm512_loadu_si512(w + b * d.block_elements); });
        unrolled<kRows>([&](auto r) BNFAST_INLINE_LAMBDA {
          int32_t pair;
          std::memcpy(&pair, from[r / 4] + (r % 4 == 3 ? step3 : r % 4 * step), sizeof(pair));
          const __m512i value = _mm512_set1_epi32(pair);
          unrolled<kBlocks>([&](auto b) BNFAST_INLINE_LAMBDA {
            sums[r * kBlocks + b] = _mm512_dpbf16_ps(sums[r * kBlocks + b], (__m512bh)value, (__m512bh)pairs[b]);
          });
        });
        unrolled<kPointers>([&](auto i) BNFAST_INLINE_LAMBDA { from[i] += 2; });
      }
    }
    ahead.walked(walk);
    unrolled<kRows>([&](auto r) BNFAST_INLINE_LAMBDA {
      unrolled<kBlocks>([&](auto b) BNFAST_INLINE_LAMBDA {
        put(r, b, FloatBlock::make([&](int) BNFAST_INLINE_LAMBDA { return (FloatVec)sums[r * kBlocks + b]; }));
      });
    });
  }
};

}  // namespace

extern const Bf16Kernels kernels;
const Bf16Kernels kernels = {
    bn_kernels<bf16>(), grouped_kernels<bf16>(), max_pool_kernels<bf16>(), winograd_kernels<bf16>(), {dot_product<VectorTile>},
};

}  // namespace bnfast::avx512_bf16

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif  // __x86_64__
