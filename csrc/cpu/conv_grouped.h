// Depthwise convolutions and those of narrow groups, and their data gradients, on the CPU: arguments and the table of kernels (see bn.h
// for the pattern).
#pragma once

#include <algorithm>
#include <cstdint>

#include "pixels.h"

namespace bnfast {

constexpr int kMostTaps = 64;   // of a kernel

// Channels of a group: 1, a depthwise convolution, for all dtypes; the others, within the lanes of a block, for float32 and bfloat16.
constexpr bool is_group_width(int64_t width) { return width == 1 || width == 2 || width == 4 || width == 8 || width == 16; }

// A convolution along one side, forward or its data gradient, from `in` places to `out`.
struct GroupedSide {
  int64_t in, out, kernel, stride, padding, dilation;
  bool is_gradient;

  // The place of the input that tap k meets at output o, or -1.
  int64_t place(int64_t o, int64_t k) const {
    if (!is_gradient) {
      const int64_t at = o * stride - padding + k * dilation;
      return at < in ? std::max<int64_t>(at, -1) : -1;
    }
    const int64_t reach = o + padding - k * dilation;
    return reach >= 0 && reach % stride == 0 && reach / stride < in ? reach / stride : -1;
  }
  // Outputs that are `phases` apart meet the same taps, at places that are `advance` apart, but for those that lie outside.
  int64_t phases() const { return is_gradient ? stride : 1; }
  int64_t advance() const { return is_gradient ? 1 : stride; }
  // The first and the last place that output o may depend on.
  int64_t first(int64_t o) const {
    const int64_t reached = (kernel - 1) * dilation;
    return std::max<int64_t>(0, is_gradient ? (o + padding - reached + stride - 1) / stride : o * stride - padding);
  }
  int64_t last(int64_t o) const {
    return std::min(in - 1, is_gradient ? (o + padding) / stride : o * stride - padding + (kernel - 1) * dilation);
  }
  // Places from the first to the last that one output depends on.
  int64_t reach() const { return (kernel - 1) * dilation / (is_gradient ? stride : 1) + 1; }
};

// Outputs first, first + phases, ... of a row that meet the same taps: tap k of the first one meets place[k], or none where that is -1.
struct GroupedRun {
  int64_t first, count;
  int32_t place[kMostTaps];
};

// x [N, H, W, C] and y [N, OH, OW, C] of the sides' `in` and `out`, channels_last, in groups of `width` channels, a power of 2 up to 16;
// taps [KH, KW, width, C], by the channel of x within its group and the channel of y, and bias [C] (or null) in the accumulator type.
struct GroupedConv {
  const void* x;              // or null:
  const PixelSource* source;  // what makes x, row by row of the image
  const void* taps;
  const void* bias;
  void* y;
  int64_t channels, width;
  GroupedSide down, across;
  const GroupedRun* runs;   // all of a row
  int64_t run_count;

  // About how many cycles so many rows take, but for making x.
  int64_t cycles(int64_t rows) const {
    const int64_t blocks = (across.out * channels + 15) / 16, taps = down.kernel * across.kernel * width;
    return rows * blocks * taps * 5 / 8 / (down.phases() * across.phases());
  }
};

struct GroupedKernels {
  // The rows [begin, end) of y, counted over n and oh. scratch: with a source, reach rows of x behind its granularity() pixels, of
  // which `made` says what they hold. upcoming: fetched meanwhile.
  void (*rows)(const GroupedConv&, int64_t begin, int64_t end, void* scratch, MadeRows& made, Upcoming& upcoming);
};

}  // namespace bnfast
