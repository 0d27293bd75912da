// 3x3 convolutions of stride 1 in Winograd's form as an operator: sizes, units of work, scratch memory.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "capability_table.h"
#include "pool.h"

namespace bnfast {
namespace {

constexpr int64_t kTransformedFloats = 1 << 18;   // of the input, taken at once: half of an L2 cache of 2 MB
constexpr int64_t kMostTiles = 96;
constexpr int64_t kFewestTiles = 32;              // for each time that the weights are read
constexpr int64_t kSplitBlocks = 4;               // output channels are split only so far: each piece transforms its input anew

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Every output depends on its own tile alone, in one order of additions: how the work is cut changes no bit.
void run(WinogradConv& d, int64_t batch) {
  const int64_t rows = batch * d.tile_rows, blocks = WinogradConv::blocks(d.out_channels), threads = at::get_num_threads();
  const int64_t fit = kTransformedFloats / (kWinogradPoints * d.input_columns());
  const int64_t tiles = std::clamp(fit, kFewestTiles, kMostTiles);
  const int64_t rows_per_unit = std::max<int64_t>(1, tiles / d.tile_columns), row_units = ceil_div(rows, rows_per_unit);
  const int64_t wanted = row_units >= 2 * threads ? 1 : ceil_div(2 * threads, row_units);
  const int64_t blocks_per_unit = ceil_div(blocks, std::clamp<int64_t>(blocks / kSplitBlocks, 1, wanted));
  const int64_t pieces = ceil_div(blocks, blocks_per_unit);
  d.tiles = ceil_div(std::min(tiles, rows_per_unit * d.tile_columns), kWinogradRowGroup) * kWinogradRowGroup;
  // Few channels: the transformed input stays in the L2 cache while the products of two blocks at a time pass through it. Many:
  // it does not, and each of its 36 matrices is read once for all blocks.
  d.panel = fit >= kFewestTiles ? std::min<int64_t>(2, blocks_per_unit) : blocks_per_unit;

  const int64_t floats = ceil_div(d.scratch_floats(), kWinogradLanes) * kWinogradLanes;
  const at::Tensor scratch = at::empty({threads * floats + kWinogradLanes}, at::kFloat);
  float* const memory = scratch.mutable_data_ptr<float>();
  float* const aligned = memory + (64 - reinterpret_cast<uintptr_t>(memory) % 64) % 64 / sizeof(float);
  const auto kernel = cpu_capability().winograd.tile_rows;
  at::parallel_for(0, row_units * pieces, 1, [&](int64_t begin, int64_t end) {
    float* const own = aligned + at::get_thread_num() * floats;
    for (int64_t u = begin; u < end; ++u) {
      const int64_t row = u / pieces * rows_per_unit, block = u % pieces * blocks_per_unit;
      kernel(d, row, std::min(rows, row + rows_per_unit), block, std::min(blocks, block + blocks_per_unit), own);
    }
  });
}

at::Tensor winograd_conv(const at::Tensor& x_in, const at::Tensor& weights, const std::optional<at::Tensor>& bias,
                         int64_t out_channels, at::IntArrayRef padding) {
  const PoolScope pooled;
  TORCH_CHECK(x_in.dim() == 4 && x_in.scalar_type() == at::kFloat, "bnfast: x is ", x_in.scalar_type(), " ", x_in.sizes(),
              "; float32 [N, C, H, W] is needed");
  TORCH_CHECK(padding.size() == 2 && padding[0] >= 0 && padding[1] >= 0, "bnfast: padding is ", padding,
              "; two values of at least 0 are needed");
  const int64_t blocks = WinogradConv::blocks(out_channels);
  TORCH_CHECK(weights.is_contiguous() && weights.scalar_type() == at::kFloat &&
                  weights.sizes() == at::IntArrayRef({kWinogradPoints, blocks, x_in.size(1), kWinogradLanes}),
              "bnfast: weights are ", weights.scalar_type(), " ", weights.sizes(), "; float32 [36, ", blocks, ", ", x_in.size(1),
              ", 16] is needed");
  WinogradConv d = {};
  d.channels = x_in.size(1);
  d.out_channels = out_channels;
  d.height = x_in.size(2);
  d.width = x_in.size(3);
  d.padding_height = padding[0];
  d.padding_width = padding[1];
  d.out_height = d.height + 2 * padding[0] - 2;
  d.out_width = d.width + 2 * padding[1] - 2;
  TORCH_CHECK(d.out_height > 0 && d.out_width > 0, "bnfast: x is of shape ", x_in.sizes(), " with padding ", padding,
              "; a kernel of 3 x 3 does not fit");
  d.tile_rows = ceil_div(d.out_height, kWinogradTile);
  d.tile_columns = ceil_div(d.out_width, kWinogradTile);
  const at::Tensor x = x_in.contiguous(at::MemoryFormat::ChannelsLast);
  at::Tensor y = at::empty({x.size(0), out_channels, d.out_height, d.out_width},
                           x.options().memory_format(at::MemoryFormat::ChannelsLast));
  at::Tensor padded_bias;
  if (bias) {
    TORCH_CHECK(bias->dim() == 1 && bias->size(0) == out_channels, "bnfast: bias is of shape ", bias->sizes(), "; [", out_channels,
                "] is needed");
    padded_bias = at::constant_pad_nd(bias->to(at::kFloat), {0, blocks * kWinogradLanes - out_channels}).contiguous();
    d.bias = padded_bias.const_data_ptr<float>();
  }
  d.x = x.const_data_ptr<float>();
  d.weights = weights.const_data_ptr<float>();
  d.y = y.mutable_data_ptr<float>();
  if (y.numel() > 0) run(d, x.size(0));
  return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(bnfast, CPU, m) { m.impl("winograd_conv", &winograd_conv); }

}  // namespace bnfast
