// Max-pooling behind a unit on the CPU: arguments and the table of kernels (see bn.h for the pattern).
#pragma once

#include <cstdint>

namespace bnfast {

// y [N, H, W, C], p and places [N, OH, OW, C], channels_last. places: where in its window each maximum lies, counted along the
// window's rows.
struct MaxPool {
  const void* y;      // forward, pick
  void* p;            // forward, pick
  const void* dp;     // backward
  void* dy;           // backward
  uint8_t* places;
  int64_t channels, height, width, out_height, out_width, kernel_height, kernel_width;
  int64_t stride_height, stride_width, padding_height, padding_width;
};

struct MaxPoolKernels {
  // The rows [begin, end) of p, counted over n and oh.
  void (*forward_rows)(const MaxPool&, int64_t begin, int64_t end);
  // The rows [begin, end) of dy, counted over n and h.
  void (*backward_rows)(const MaxPool&, int64_t begin, int64_t end);
  // The pixels [begin, end) of p, counted over n and the plane: what y holds where the maxima lie that places names.
  void (*pick)(const MaxPool&, int64_t begin, int64_t end);
};

}  // namespace bnfast
