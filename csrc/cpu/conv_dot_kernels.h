// conv_fwd and conv_dgrad as products of bfloat16 matrices (conv_dot.h).
// Per element of x: read from the cache once per tap and panel of 32 output channels; y is written once, 2 bytes per element.
// Included by the capabilities that multiply bfloat16, each with its own way to multiply a tile.
#pragma once

#include <algorithm>

#include "conv_dot.h"
#include "gemm_kernels.h"
#include "runs_ahead.h"

namespace bnfast::BNFAST_NAMESPACE {

// Where the outputs of a span lie, from one to the next without dividing.
class DotOutputs {
 public:
  explicit DotOutputs(const DotSpan& span) : span_(span) {}
  // Those of the next `count` positions, null where the image has none.
  void next(int64_t count, bf16** to) {
    while (count > 0) {
      const int64_t kept = std::clamp<int64_t>(span_.columns - column_, 0, count);
      bf16* const first = span_.y + row_ * span_.y_row + column_ * span_.y_column;
      for (int64_t i = 0; i < kept; ++i) to[i] = first + i * span_.y_column;
      const int64_t between = std::min(count - kept, span_.row_step - column_ - kept);
      std::fill(to + kept, to + kept + between, nullptr);
      to += kept + between;
      count -= kept + between;
      column_ += kept + between;
      if (column_ == span_.row_step) column_ = 0, ++row_;
    }
  }

 private:
  const DotSpan& span_;
  int64_t row_ = 0, column_ = 0;
};

// kBlocks blocks of output channels from `block` on of all positions of a span. Tile::rows says how many positions Tile::product computes
// together, at most kDotReadAhead, where so many are left; it hands each sum to put(position, block, sum).
template <class Tile, int kBlocks, class L>
void dot_panel(const DotConv& d, const DotSpan& span, int64_t block, L lanes, RunsAhead& ahead) {
  const bf16* const weights = d.weights + block * d.block_elements;
  FloatBlock bias[kBlocks];
  for (int b = 0; b < kBlocks; ++b) bias[b] = d.bias ? load_block(d.bias + (block + b) * kBlock) : FloatBlock(0);
  DotOutputs outputs(span);
  const int64_t count = span.positions();
  for (int64_t at = 0; at < count;) {
    bf16* to[kDotReadAhead];
    const int64_t rows = Tile::rows(count - at), exist = std::min(rows, count - at);
    outputs.next(exist, to);
    std::fill(to + exist, to + rows, nullptr);
    const auto put = [&](auto i, auto b, const FloatBlock& sum) BNFAST_INLINE_LAMBDA {
      if (!to[i]) return;
      bf16* const y = to[i] + (block + b) * kBlock;
      if constexpr (b + 1 == kBlocks) store(y, sum + bias[b], lanes);
      else store_block(y, sum + bias[b]);
    };
    Tile::template product<kBlocks>(d, span, span.x + at * d.x_step, weights, rows, ahead, put);
    at += rows;
  }
}

template <class Tile>
void dot_product(const DotConv& d, const DotSpan* spans, int64_t count, int64_t first, int64_t last) {
  const Tile scope(d);
  int64_t steps = 0;
  for (int64_t s = 0; s < count; ++s) steps += spans[s].positions() * spans[s].tap_count;
  const int64_t panels = (last - first + 1) / 2;
  RunsAhead ahead(d.upcoming, d.upcoming_count, panels * Tile::lines(d, steps));
  for (int64_t block = first; block < last; block += 2) {
    const int64_t blocks = std::min<int64_t>(2, last - block), lanes = d.out_channels - (block + blocks - 1) * kBlock;
    for (int64_t s = 0; s < count; ++s) {
      const auto of = [&](auto n) {
        if (lanes >= kBlock) dot_panel<Tile, n>(d, spans[s], block, Whole{}, ahead);
        else dot_panel<Tile, n>(d, spans[s], block, First{lanes}, ahead);
      };
      if (blocks == 2) of(std::integral_constant<int, 2>{});
      else of(std::integral_constant<int, 1>{});
    }
  }
}

}  // namespace bnfast::BNFAST_NAMESPACE
