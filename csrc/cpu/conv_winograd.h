// 3x3 convolutions of stride 1 and 2 in Winograd's form on the CPU: arguments and the table of kernels (see bn.h for the pattern).
//
// A tile of the output is computed from the tile of the input that it depends on,
//   y = A^T [ sum over channels of (G w G^T) * (B^T x B) ] A
// G w G^T is taken once, because w is frozen: 36 values, 64 in the wide form. Along one side:
//   kSame     stride 1, F(4, 3): 4 outputs from 6 places through the points 0, 1, -1, 2, -2 and infinity.
//   kWide     stride 1, F(6, 3): 6 outputs from 8 places through these points, 1/2 and -1/2.
//   kBlocked  stride 2, kernels of up to 8: with stride 1 over blocks of 2 x 2 places, of which there are at most 4 taps. F(5, 4), through the
//             points of kWide.
//   kHalved   stride 2: y[k] = x[2k] w0 + x[2k+1] w1 + x[2k+2] w2. The even places are F(4, 2) with the taps w0 and w2 through the points
//             0, 1, -1, 2 and infinity; the odd places are multiplied with w1 as they are. 4 outputs from 9 places, 9 products.
//   kDoubled  the data gradient of kHalved: 8 outputs, every second one of them F(4, 2), the others one product each, from 5 places.
// A^T and B^T are spelled out in conv_winograd_kernels.h. Products per tile and pair of channels: 36 of 144, 64 of 324, 64 of 400 (a block has
// four times the channels), and 81 of 144.
//
// Where the outputs are no multiple of a tile's, the last tile of a side is short: for fewer outputs fewer points do, some of the same,
// and so of the same transformed weights. Kept are infinity and the first of the list.
#pragma once

#include <cstdint>

#include "pixels.h"

namespace bnfast {

constexpr int kWinogradRowGroup = 4;    // tiles of a scratch buffer are a multiple of this
constexpr int kWinogradLanes = 16;      // channels of a block of transformed weights

// A form along one side.
struct WinogradForm {
  int in, in_step;     // places of the input that a tile depends on, and from one tile to the next
  int points;          // values of a transformed tile: one for each matrix, the last of which has all that are left
  int out;             // outputs of a tile
  int matrices;        // of transformed weights
  int taps;            // of the kernel that is taken through points

  constexpr bool is_strided() const { return points > matrices; }
  // Of a tile with only so many outputs: those that are taken through points, and those of one product each. Where all points but 1/2 and -1/2
  // are too few for them, they are taken as the outputs of a whole tile.
  constexpr int through_points(int outputs) const {
    if (out == 8) return outputs / 2;
    return points == 8 && outputs + taps > 7 ? out : outputs;
  }
  constexpr int direct(int outputs) const { return !is_strided() ? 0 : out == 8 ? (outputs + 1) / 2 : outputs; }
  // Whether it has this value.
  constexpr bool has(int outputs, int value) const {
    const int through = through_points(outputs), infinity = is_strided() ? 4 : points - 1;
    if (value > infinity) return value - 5 < direct(outputs);
    return through > 0 && (value == infinity || value < through + taps - 2);
  }
  constexpr int values(int outputs) const {
    int count = 0;
    for (int value = 0; value < points; ++value) count += has(outputs, value);
    return count;
  }
};
constexpr WinogradForm kSame = {6, 4, 6, 4, 6, 3}, kWide = {8, 6, 8, 6, 8, 3}, kBlocked = {8, 5, 8, 5, 8, 4};
constexpr WinogradForm kHalved = {9, 8, 9, 4, 6, 2}, kDoubled = {5, 4, 9, 8, 6, 2};

// x [N, H, W, C] and y [N, OH, OW, K], channels_last, both of the kernels' dtype; the tiles of one row of tiles are neighbours.
// weights [matrices^2, ceil(K / 16), C, 16] and bias [ceil(K / 16) * 16] (or null), padded with zeros.
struct WinogradConv {
  WinogradForm form;
  const void* x;              // or null:
  const PixelSource* source;  // what makes x, row by row of the image
  RowRange own;               // rows of x that these tiles make where the source keeps them
  const float* weights;
  const float* bias;
  void* y;
  int64_t channels, out_channels, height, width, out_height, out_width;
  int64_t in_top, in_left, out_top, out_left;   // the first place of the first tile; what lies outside of x is zero
  int64_t tile_rows, tile_columns;   // of one image
  int last_down, last_across;        // outputs of the last tile of a column and of a row
  int64_t tiles;                     // that are transformed together, a multiple of kWinogradRowGroup
  double *mean, *m2;                 // of what these tiles put out in each channel, [K], or null: float32
  const Run* upcoming;               // what is needed after these tiles, fetched into the cache meanwhile
  int upcoming_count;
  bool fetches_weights;              // ahead of their use, as they come from memory
  int64_t panel;                     // blocks of output channels that are transformed back together

  static int64_t blocks(int64_t count) { return (count + kWinogradLanes - 1) / kWinogradLanes; }
  int64_t points() const { return form.points * form.points; }
  int64_t matrices() const { return form.matrices * form.matrices; }
  // Floats of the transformed values, [tiles, columns] for each point, those of one matrix together. The odd block behind each
  // keeps the values of one place, written together, from falling into the same set of the L1 cache.
  int64_t values(int64_t columns) const { return points() * tiles * columns + matrices() * kWinogradLanes; }
  int64_t input_columns() const { return blocks(channels) * kWinogradLanes; }
  int64_t panel_columns() const { return panel * kWinogradLanes; }
  // Rows of x that are made: those of a row of tiles, behind room for what a source writes in front of them.
  int64_t made_floats() const {
    if (!source) return 0;
    return blocks((form.in * width + source->granularity()) * channels) * kWinogradLanes;
  }
  int64_t moments_floats() const { return 3 * blocks(out_channels) * kWinogradLanes; }
  // A row of a tile of padded input pixels, all zeros, the transformed input, the products, the rows that are made, sums for the moments; each
  // 64-byte aligned.
  int64_t scratch_floats() const {
    return form.in * input_columns() + values(input_columns()) + values(panel_columns()) + made_floats() + moments_floats();
  }
};

// float32 and bfloat16 (wide and blocked: float32), else null. Between the loads and the stores everything is float32.
struct WinogradKernels {
  // y of the rows of tiles [begin, end), counted over images, for the blocks [first, last) of output channels.
  // scratch: scratch_floats() floats, 64-byte aligned, of any content.
  using TileRows = void (*)(const WinogradConv&, int64_t begin, int64_t end, int64_t first, int64_t last, float* scratch);
  TileRows same, wide, blocked, halved, doubled;
};

}  // namespace bnfast
