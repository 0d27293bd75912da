// Convolutions of bfloat16 as products of bfloat16 matrices, of any kernel, stride and dilation, and their data gradients, on processors
// that multiply bfloat16 (AVX512_BF16, AMX): arguments and the table of kernels (see bn.h for the pattern).
//
// An output is the sum over the taps that it meets, and over the channels of each, in pairs: one instruction multiplies two neighbouring
// channels and adds both products to a float32 sum. The rows of x that are needed are laid into scratch memory, with the zeros that surround
// an image written out and, where the convolution strides, rows of one remainder next to each other. Then the inputs that a tap meets lie
// at one step for all outputs, from the end of a row of outputs to the beginning of the next one too: they are the rows of a matrix. The
// outputs between, at places where the image has none, are computed and not kept.
#pragma once

#include <algorithm>
#include <cstdint>

#include "pixels.h"
#include "storage.h"

namespace bnfast {

constexpr int kDotLanes = 16;      // output channels of a block of weights
constexpr int kDotStep = 32;       // channels that one instruction of AMX multiplies, at most
constexpr int kDotReadAhead = 32;  // outputs that are computed together: inputs so far behind the last one are read

// One side of a convolution, forward or its data gradient, from `in` places to `out`. Outputs form groups of out_step(), one of each phase:
// those of a phase meet the same taps, at inputs that move by in_step() from group to group.
struct DotSide {
  int64_t in, out, kernel, stride, padding, dilation;
  bool is_gradient;

  int64_t in_step() const { return is_gradient ? 1 : stride; }
  int64_t out_step() const { return is_gradient ? stride : 1; }
  int64_t groups() const { return (out + out_step() - 1) / out_step(); }
  // Outputs of a phase in the groups [begin, end).
  int64_t count(int64_t begin, int64_t end, int64_t phase) const {
    const int64_t all = std::max<int64_t>(0, (out - phase + out_step() - 1) / out_step());
    return std::max<int64_t>(0, std::min(end, all) - begin);
  }
  bool meets(int64_t phase, int64_t tap) const { return !is_gradient || (phase + padding - tap * dilation) % stride == 0; }
  // From the first input of a group, group * in_step(), to the one that a tap meets.
  int64_t offset(int64_t phase, int64_t tap) const {
    return is_gradient ? (phase + padding - tap * dilation) / stride : tap * dilation - padding;
  }
  // The least and the greatest of the offsets that are met, and 0.
  int64_t first() const {
    return over_offsets(0, [](int64_t a, int64_t b) { return std::min(a, b); });
  }
  int64_t last() const {
    return over_offsets(0, [](int64_t a, int64_t b) { return std::max(a, b); });
  }

 private:
  template <class F> int64_t over_offsets(int64_t found, F pick) const {
    for (int64_t phase = 0; phase < out_step(); ++phase) {
      for (int64_t tap = 0; tap < kernel; ++tap) {
        if (meets(phase, tap)) found = pick(found, offset(phase, tap));
      }
    }
    return found;
  }
};

// A tap: where its inputs begin behind those of a span, and its weights behind those of a block. Elements.
struct DotTap { int64_t input, weights; };

// Some outputs of one phase: `rows` rows of `columns`, each `row_step` positions behind the one before.
struct DotSpan {
  const bf16* x;          // of the first position
  int64_t rows, columns, row_step;
  bf16* y;                // of the first output, row by row and column by column these elements apart
  int64_t y_row, y_column;
  const DotTap* taps;
  int64_t tap_count;

  int64_t positions() const { return rows > 0 && columns > 0 ? (rows - 1) * row_step + columns : 0; }
};

// weights bfloat16 [ceil(K / 16), KH, KW, C / 2, 16, 2] and bias float32 [ceil(K / 16) * 16] (or null), padded with zeros; C is even.
struct DotConv {
  const bf16* weights;
  const float* bias;
  int64_t channels, out_channels, block_elements;
  int64_t step;              // AMX: channels at once, even and a divisor of C
  int64_t x_step;            // elements from the input of a position to that of the next
  const Run* upcoming;       // what the caller needs next, fetched into the cache meanwhile
  int upcoming_count;

  static int64_t blocks(int64_t count) { return (count + kDotLanes - 1) / kDotLanes; }
  // The most channels that AMX can take at once: an even divisor of C.
  static int64_t step_of(int64_t channels) {
    int64_t step = kDotStep;
    while (channels % step != 0) step -= 2;
    return step;
  }
};

struct DotKernels {
  // All outputs of the spans, for the blocks [first, last) of output channels. Null where the processor does not multiply bfloat16.
  void (*product)(const DotConv&, const DotSpan* spans, int64_t count, int64_t first, int64_t last);
};

}  // namespace bnfast
