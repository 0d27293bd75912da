// 1x1 convolutions of stride 1 on the CPU, as products of pixels and frozen weights: arguments and the table of kernels (see bn.h
// for the pattern). The data gradient is the same product with the weights transposed.
#pragma once

#include <cstdint>

#include "pixels.h"

namespace bnfast {

constexpr int kPointwiseLanes = 16;   // output channels of a block of weights

constexpr int64_t kNearFloats = 6144;   // half of an L1 cache of 48 KB

// Some pixels: x [rows, C] and y [rows, K], which may not overlap.
// weights [ceil(K / 16), C, 16] and bias [ceil(K / 16) * 16] (or null), padded with zeros.
struct PointwiseConv {
  const float* x;
  const float* weights;
  const float* bias;
  float* y;
  int64_t rows, channels, out_channels;
  int64_t rows_below;        // of y behind these
  Upcoming* upcoming;        // what the caller needs next, fetched into the cache meanwhile

  // Whether the weights stay in the L1 cache beside a tile of rows; then y is fetched by the kernel, tile by tile.
  bool is_near() const { return blocks(out_channels) * channels * kPointwiseLanes <= kNearFloats; }

  // About how many cycles the product takes.
  int64_t cycles() const { return rows * channels * blocks(out_channels) / 2; }

  static int64_t blocks(int64_t count) { return (count + kPointwiseLanes - 1) / kPointwiseLanes; }
};

struct PointwiseKernels {
  // y for the blocks [first, last) of output channels.
  void (*product)(const PointwiseConv&, int64_t first, int64_t last);
};

}  // namespace bnfast
