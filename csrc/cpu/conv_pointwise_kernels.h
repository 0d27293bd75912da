// conv_fwd and conv_dgrad of 1x1 convolutions of stride 1 (conv_pointwise.h), float32.
// Per element of x: read once from memory, then from the cache for each panel of output channels; y is written once. Both are
// fetched ahead in the order of their addresses: the tiles of rows jump, and the prefetcher of the hardware follows them badly.
#pragma once

#include <algorithm>

#include "conv_pointwise.h"
#include "gemm_kernels.h"

namespace bnfast::BNFAST_NAMESPACE {

// The rows [begin, end) times the panel of kBlocks blocks of output channels from `block` on; `lanes` of the last one exist.
template <int kBlocks, class L>
void pointwise_panel(const PointwiseConv& d, int64_t begin, int64_t end, int64_t block, L lanes, RunsAhead& ahead) {
  const float* weights = d.weights + block * d.channels * kBlock;
  const auto tile = [&](auto rows, int64_t r) BNFAST_INLINE_LAMBDA {
    float* y = d.y + r * d.out_channels + block * kBlock;
    multiply<rows, kBlocks>(d.x + r * d.channels, d.channels, weights, d.channels * kBlock, d.channels, ahead,
                            [&](auto i, auto b, FloatBlock sum) BNFAST_INLINE_LAMBDA {
      if (d.bias) sum = sum + load_block(d.bias + (block + b) * kBlock);
      float* to = y + i * d.out_channels + b * kBlock;
      if constexpr (b + 1 == kBlocks) store(to, sum, lanes);
      else store_block(to, sum);
    });
  };
  int64_t r = begin;
  for (; r + kWideRows <= end; r += kWideRows) tile(std::integral_constant<int, kWideRows>{}, r);
  for (; r + kNarrowRows <= end; r += kNarrowRows) tile(std::integral_constant<int, kNarrowRows>{}, r);
  if (r < end && end - begin >= kNarrowRows) {
    tile(std::integral_constant<int, kNarrowRows>{}, end - kNarrowRows);   // some rows again, to the same values
  } else {
    for (; r < end; ++r) tile(std::integral_constant<int, 1>{}, r);
  }
}

inline void pointwise_product(const PointwiseConv& d, int64_t first, int64_t last) {
  const int64_t panels = (last - first + kWideBlocks - 1) / kWideBlocks;
  RunsAhead ahead(d.upcoming, &Upcoming::beside_product, kWideRows * std::min<int64_t>(kWideBlocks, last - first) / 2);
  const auto panel = [&](int64_t from, int64_t to, int64_t block) {
    const auto of = [&](auto blocks) {
      const int64_t lanes = d.out_channels - (block + blocks - 1) * kBlock;
      if (lanes >= kBlock) pointwise_panel<blocks>(d, from, to, block, Whole{}, ahead);
      else pointwise_panel<blocks>(d, from, to, block, First{lanes}, ahead);
    };
    if (last - block >= kWideBlocks) of(std::integral_constant<int, kWideBlocks>{});
    else of(std::integral_constant<int, 1>{});
  };
  if (panels == 1 || !d.is_near()) {
    for (int64_t block = first; block < last; block += kWideBlocks) panel(0, d.rows, block);
    return;
  }
  // Few weights: tile by tile, so that y is written from its beginning to its end, a tile behind its fetch.
  for (int64_t from = 0; from < d.rows; from += kWideRows) {
    const int64_t to = std::min(d.rows, from + kWideRows), next = std::min<int64_t>(kWideRows, d.rows + d.rows_below - to);
    const int64_t lines = (next * d.out_channels + kBlock - 1) / kBlock, lines_per_panel = (lines + panels - 1) / panels;
    int64_t line = 0;
    for (int64_t block = first; block < last; block += kWideBlocks) {
      const int64_t until = std::min(lines, line + lines_per_panel);
      for (; line < until; ++line) __builtin_prefetch(d.y + to * d.out_channels + line * kBlock);
      panel(from, to, block);
    }
  }
}

constexpr PointwiseKernels pointwise_kernels() { return {pointwise_product}; }

}  // namespace bnfast::BNFAST_NAMESPACE
