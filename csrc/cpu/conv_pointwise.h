// 1x1 convolutions of stride 1 on the CPU, as products of pixels and frozen weights: arguments and the table of kernels (see bn.h
// for the pattern). The data gradient is the same product with the weights transposed.
#pragma once

#include <cstdint>

namespace bnfast {

constexpr int kPointwiseLanes = 16;   // output channels of a block of weights

// Some pixels: x [rows, C] and y [rows, K], which may not overlap.
// weights [ceil(K / 16), C, 16] and bias [ceil(K / 16) * 16] (or null), padded with zeros.
struct PointwiseConv {
  const float* x;
  const float* weights;
  const float* bias;
  float* y;
  int64_t rows, channels, out_channels;
  int64_t rows_below;        // of y behind these
  const float* upcoming[2];  // what the caller reads next: fetched into the cache meanwhile
  int64_t upcoming_floats;   // of each that is not null

  static int64_t blocks(int64_t count) { return (count + kPointwiseLanes - 1) / kPointwiseLanes; }
};

struct PointwiseKernels {
  // y for the blocks [first, last) of output channels.
  void (*product)(const PointwiseConv&, int64_t first, int64_t last);
};

}  // namespace bnfast
