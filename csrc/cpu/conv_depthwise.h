// The data gradient of a depthwise convolution on the CPU: arguments and the table of kernels (see bn.h for the pattern).
#pragma once

#include <cstdint>

namespace bnfast {

// dz [N, OH, OW, C] and dx [N, H, W, C], channels_last; taps [KH, KW, C] in the accumulator type.
struct DepthwiseDgrad {
  const void* dz;
  const void* taps;
  void* dx;
  int64_t channels, height, width, out_height, out_width, kernel_height, kernel_width;
  int64_t stride_height, stride_width, padding_height, padding_width, dilation_height, dilation_width;
};

struct DepthwiseKernels {
  // conv_dgrad of the rows [begin, end) of dx, counted over n and h.
  void (*dgrad_rows)(const DepthwiseDgrad&, int64_t begin, int64_t end);
};

}  // namespace bnfast
