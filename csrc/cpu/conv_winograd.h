// 3x3 convolutions of stride 1 by Winograd's F(4x4, 3x3) on the CPU: arguments and the table of kernels (see bn.h for the pattern).
//
// A tile is 4 x 4 places of the output, computed from the 6 x 6 places of the input that it depends on:
//   y = A^T [ sum over channels of (G w G^T) * (B^T x B) ] A
// 36 products per tile and pair of channels in place of 144. G w G^T is taken once, because w is frozen. B^T and A^T are those of
// the points 0, 1, -1, 2, -2 and infinity; they are spelled out in conv_winograd_kernels.h.
#pragma once

#include <cstdint>

#include "pixels.h"

namespace bnfast {

constexpr int kWinogradTile = 4;        // outputs of a tile along one side
constexpr int kWinogradReach = 6;       // inputs that they depend on
constexpr int kWinogradPoints = 36;     // values of a transformed tile
constexpr int kWinogradRowGroup = 4;    // tiles of a scratch buffer are a multiple of this
constexpr int kWinogradLanes = 16;      // channels of a block of transformed weights

// x [N, H, W, C] and y [N, OH, OW, K], channels_last; the tiles of one row of tiles are neighbours.
// weights [36, ceil(K / 16), C, 16] and bias [ceil(K / 16) * 16] (or null), padded with zeros.
struct WinogradConv {
  const float* x;             // or null:
  const PixelSource* source;  // what makes x, row by row of the image
  const float* weights;
  const float* bias;
  float* y;
  int64_t channels, out_channels, height, width, out_height, out_width, padding_height, padding_width;
  int64_t tile_rows, tile_columns;   // of one image
  int64_t tiles;                     // that are transformed together, a multiple of kWinogradRowGroup
  const Run* upcoming;               // what is needed after these tiles, fetched into the cache meanwhile
  int upcoming_count;
  bool fetches_weights;              // ahead of their use, as they come from memory
  int64_t panel;                     // blocks of output channels that are transformed back together

  static int64_t blocks(int64_t count) { return (count + kWinogradLanes - 1) / kWinogradLanes; }
  // Floats between two of the 36 matrices of transformed tiles, [tiles, columns] each. The odd block keeps the 36 values of one
  // place, written together, from falling into the same set of the L1 cache.
  int64_t matrix(int64_t columns) const { return tiles * columns + kWinogradLanes; }
  int64_t input_columns() const { return blocks(channels) * kWinogradLanes; }
  int64_t panel_columns() const { return panel * kWinogradLanes; }
  // Rows of x that are made: those of a row of tiles, behind room for what a source writes in front of them.
  int64_t made_floats() const {
    if (!source) return 0;
    return blocks((kWinogradReach * width + source->granularity()) * channels) * kWinogradLanes;
  }
  // A row of a tile of padded input pixels, all zeros, the transformed input, the products, the rows that are made; each 64-byte aligned.
  int64_t scratch_floats() const {
    return kWinogradReach * input_columns() + kWinogradPoints * (matrix(input_columns()) + matrix(panel_columns())) + made_floats();
  }
};

struct WinogradKernels {
  // y of the rows of tiles [begin, end), counted over images, for the blocks [first, last) of output channels.
  // scratch: scratch_floats() floats, 64-byte aligned, of any content.
  void (*tile_rows)(const WinogradConv&, int64_t begin, int64_t end, int64_t first, int64_t last, float* scratch);
};

}  // namespace bnfast
