// 3x3 convolutions of stride 1 and 2 in Winograd's form as operators, alone and with the BatchNorm phases in front of it and behind it;
// and kernels of up to 8 x 8 with stride 2 and few input channels, the stems of networks, which need no data gradient.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <array>

#include "capability_table.h"
#include "conv_joined.h"
#include "pool.h"

namespace bnfast {
namespace {

using at::Tensor;

// Bytes of what a unit reads, transforms and writes, which stay in an L2 cache of 2 MB beside the weights that pass through it.
constexpr int64_t kUnitBytes = 900 << 10;
constexpr int64_t kFewestValues = 24 * 36, kMostValues = 48 * 36;   // of the tiles of a unit in a channel, about
constexpr int64_t kWeightsNear = 1 << 20;               // bytes of weights that stay in the L2 cache
constexpr int64_t kMostlyWeights = 4;                   // times the bytes of x and y: then threads share the weights, not the tiles
constexpr int64_t kSplitBlocks = 4;               // output channels are split only so far: each piece transforms its input anew

constexpr int64_t kFewUnits = 32;
constexpr int64_t kEven = 2;
constexpr int64_t kFloat = sizeof(float);
constexpr int kMostRuns = 6;                      // that are fetched for a unit

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

void check_sizes(const Tensor& t, at::IntArrayRef padding, int64_t stride) {
  TORCH_CHECK(t.dim() == 4 && (t.scalar_type() == at::kFloat || t.scalar_type() == at::kBFloat16), "bnfast: x is ",
              t.scalar_type(), " ", t.sizes(), "; float32 or bfloat16 [N, C, H, W] is needed");
  TORCH_CHECK(padding.size() == 2 && padding[0] >= 0 && padding[1] >= 0, "bnfast: padding is ", padding,
              "; two values of at least 0 are needed");
  TORCH_CHECK(stride == 1 || stride == 2, "bnfast: stride is ", stride, "; 1 and 2 are allowed");
}

int64_t outputs_of(int64_t inputs, int64_t padding, int64_t stride) {
  return inputs + 2 * padding < 3 ? 0 : (inputs + 2 * padding - 3) / stride + 1;
}

// Where a convolution's tiles lie.
struct Geometry {
  using Kernel = WinogradKernels::TileRows WinogradKernels::*;
  WinogradForm form;
  Kernel kernel;
  int64_t out_height, out_width, in_top, in_left, out_top, out_left;

  static Geometry forward(const Tensor& x, at::IntArrayRef padding, int64_t stride, const Tensor& weights) {
    check_sizes(x, padding, stride);
    const auto [form, kernel] = stride == 1 ? of_stride_1(weights) : std::pair(kHalved, &WinogradKernels::halved);
    const Geometry g = {form, kernel, outputs_of(x.size(2), padding[0], stride), outputs_of(x.size(3), padding[1], stride),
                        -padding[0], -padding[1], 0, 0};
    TORCH_CHECK(g.out_height > 0 && g.out_width > 0, "bnfast: x is of shape ", x.sizes(), " with padding ", padding,
                "; a kernel of 3 x 3 does not fit");
    return g;
  }

  // Of the data gradient, whose output is of input_size.
  static Geometry backward(const Tensor& dy, at::IntArrayRef input_size, at::IntArrayRef padding, int64_t stride, const Tensor& weights) {
    check_sizes(dy, padding, stride);
    TORCH_CHECK(input_size.size() == 2 && outputs_of(input_size[0], padding[0], stride) == dy.size(2) &&
                    outputs_of(input_size[1], padding[1], stride) == dy.size(3) && dy.size(2) > 0 && dy.size(3) > 0,
                "bnfast: dy is of shape ", dy.sizes(), " and input_size ", input_size, " with padding ", padding, " and stride ", stride,
                "; the output size of that convolution is needed");
    const int64_t height = input_size[0], width = input_size[1];
    if (stride == 1) {
      const auto [form, kernel] = of_stride_1(weights);
      return {form, kernel, height, width, padding[0] - 2, padding[1] - 2, 0, 0};
    }
    // A tile begins at an odd place of the padded input, to which the middle tap of one dy contributes.
    const int64_t top = padding[0] % 2 - 1, left = padding[1] % 2 - 1;
    return {kDoubled, &WinogradKernels::doubled, height, width, (padding[0] + top - 1) / 2, (padding[1] + left - 1) / 2, top, left};
  }

  // Of a kernel of up to 8 x 8 with stride 2, over x as blocks.
  static Geometry blocked(const Tensor& x, at::IntArrayRef kernel, at::IntArrayRef padding) {
    TORCH_CHECK(x.dim() == 4 && x.scalar_type() == at::kFloat, "bnfast: x is ", x.scalar_type(), " ", x.sizes(),
                "; float32 [N, C, H, W] is needed");
    TORCH_CHECK(kernel.size() == 2 && padding.size() == 2, "bnfast: kernel is ", kernel, " and padding ", padding,
                "; two values each are needed");
    int64_t first[2], outputs[2];   // the first block that an output reads, from the one at its own place
    for (int i = 0; i < 2; ++i) {
      first[i] = floor_half(-padding[i]);
      TORCH_CHECK(kernel[i] >= 1 && padding[i] >= 0 && floor_half(kernel[i] - 1 - padding[i]) - first[i] < kBlocked.taps,
                  "bnfast: kernel is ", kernel, " and padding ", padding, "; at most 4 blocks of 2 places are allowed");
      outputs[i] = x.size(2 + i) + 2 * padding[i] < kernel[i] ? 0 : (x.size(2 + i) + 2 * padding[i] - kernel[i]) / 2 + 1;
    }
    TORCH_CHECK(outputs[0] > 0 && outputs[1] > 0, "bnfast: x is of shape ", x.sizes(), " with padding ", padding, "; a kernel of ",
                kernel, " does not fit");
    return {kBlocked, &WinogradKernels::blocked, outputs[0], outputs[1], first[0], first[1], 0, 0};
  }

 private:
  static int64_t floor_half(int64_t value) { return value >> 1; }
  // The tile that the weights were transformed for.
  static std::pair<WinogradForm, Kernel> of_stride_1(const Tensor& weights) {
    const bool is_wide = weights.dim() == 4 && weights.size(0) == kWide.matrices * kWide.matrices;
    return is_wide ? std::pair(kWide, &WinogradKernels::wide) : std::pair(kSame, &WinogradKernels::same);
  }
};

// A convolution cut into units of work. Every output depends on its own tile alone, in one order of additions: how the work is cut
// changes no bit of it. What is reduced behind it is reduced by units, whose borders depend on the shape alone.
class Winograd {
 public:
  Tensor y;

  // x: of the input's sizes.
  Winograd(const Tensor& x, const Tensor& weights, const OptionalTensor& bias, int64_t out_channels, const Geometry& geometry) {
    blocks_ = WinogradConv::blocks(out_channels);
    d_.form = geometry.form;
    TORCH_CHECK(weights.is_contiguous() && weights.scalar_type() == at::kFloat &&
                    weights.sizes() == at::IntArrayRef({d_.matrices(), blocks_, x.size(1), kWinogradLanes}),
                "bnfast: weights are ", weights.scalar_type(), " ", weights.sizes(), "; float32 [", d_.matrices(), ", ", blocks_, ", ",
                x.size(1), ", 16] is needed");
    kernel_ = cpu_capability().winograd[static_cast<int>(dtype_of(x))].*geometry.kernel;
    TORCH_CHECK(kernel_, "bnfast: weights are of tiles of 6 x 6 and x is ", x.scalar_type(), "; float32 is needed");
    element_ = x.element_size();
    d_.channels = x.size(1);
    d_.out_channels = out_channels;
    d_.height = x.size(2);
    d_.width = x.size(3);
    d_.out_height = geometry.out_height;
    d_.out_width = geometry.out_width;
    d_.in_top = geometry.in_top;
    d_.in_left = geometry.in_left;
    d_.out_top = geometry.out_top;
    d_.out_left = geometry.out_left;
    d_.tile_rows = ceil_div(d_.out_height - d_.out_top, d_.form.out);
    d_.tile_columns = ceil_div(d_.out_width - d_.out_left, d_.form.out);
    d_.last_down = static_cast<int>(d_.out_height - d_.out_top - (d_.tile_rows - 1) * d_.form.out);
    d_.last_across = static_cast<int>(d_.out_width - d_.out_left - (d_.tile_columns - 1) * d_.form.out);
    if (bias) {
      TORCH_CHECK(bias->dim() == 1 && bias->size(0) == out_channels, "bnfast: bias is of shape ", bias->sizes(), "; [",
                  out_channels, "] is needed");
      bias_ = at::constant_pad_nd(bias->to(at::kFloat), {0, blocks_ * kWinogradLanes - out_channels}).contiguous();
      d_.bias = bias_.const_data_ptr<float>();
    }
    y = at::empty({x.size(0), out_channels, d_.out_height, d_.out_width},
                  x.options().memory_format(at::MemoryFormat::ChannelsLast));
    d_.weights = weights.const_data_ptr<float>();
    d_.y = y.mutable_data_ptr();
    rows_ = x.size(0) * d_.tile_rows;
    cut();
  }

  // One of the two, before anything is computed.
  void set_input(const Tensor& x) {
    x_ = x.contiguous(at::MemoryFormat::ChannelsLast);
    d_.x = x_.const_data_ptr();
    make_room();
  }
  void set_input(const PixelSource& source) {
    d_.source = &source;
    make_room();
  }

  // Tensors of y's shape that are read after each unit; null ones are ignored.
  void set_behind(std::array<const void*, 3> tensors) { behind_ = tensors; }

  // The units as pixels of y, or nothing where one of them would end inside of a group of 16 elements.
  std::optional<PixelUnits> pixels() const {
    if (is_shared_) return std::nullopt;
    return pixel_units(d_.out_channels, d_.out_width, units_, [&](int64_t u) { return out_pixel(row(u)); });
  }

  // Whether threads share units by their output channels; else a unit can be computed alone.
  bool is_split() const { return pieces_ > 1; }
  void unit(int64_t u) const { piece(u, 0, blocks_); }
  // The same with the moments of a channel over the unit, [K] each. Whether that can be asked for depends on the shape alone.
  bool finds_moments() const { return element_ == kFloat && d_.out_channels % kWinogradLanes == 0; }
  void unit(int64_t u, double* mean, double* m2) const { piece(u, 0, blocks_, mean, m2); }
  // mean, m2: of all units, [units, K] each.
  void all(double* mean = nullptr, double* m2 = nullptr) const {
    at::parallel_for(0, units_ * pieces_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        // Threads that share the weights keep to their own.
        const int64_t unit = is_shared_ ? i % units_ : i / pieces_, block = (is_shared_ ? i / units_ : i % pieces_) * blocks_per_piece_;
        const int64_t moments = unit * d_.out_channels;
        piece(unit, block, std::min(blocks_, block + blocks_per_piece_), mean ? mean + moments : nullptr, m2 ? m2 + moments : nullptr);
      }
    });
  }

 private:
  void cut() {
    const int64_t threads = at::get_num_threads();
    const int64_t weights = d_.matrices() * d_.channels * blocks_ * kWinogradLanes * kFloat;
    weights_are_near_ = weights <= kWeightsNear;
    d_.fetches_weights = !weights_are_near_;
    const int64_t moved = element_ * y.size(0) * (d_.height * d_.width * d_.channels + d_.out_height * d_.out_width * d_.out_channels);
    is_shared_ = weights > kMostlyWeights * moved && blocks_ >= 2 * kSplitBlocks;
    rows_per_unit_ = 1;
    if (is_shared_) {
      const int64_t most = std::max<int64_t>(1, most_tiles() / d_.tile_columns);
      rows_per_unit_ = std::max<int64_t>(1, ceil_div(rows_, std::max<int64_t>(1, ceil_div(rows_, most))));
    } else {
      const int64_t tiles = tiles_wanted();
      for (int64_t rows = 2; rows <= rows_ && rows * d_.tile_columns <= most_tiles(); ++rows) {
        if (cost(rows, tiles) < cost(rows_per_unit_, tiles)) rows_per_unit_ = rows;
      }
    }
    units_ = ceil_div(rows_, rows_per_unit_);
    const int64_t wanted = is_shared_ ? threads : units_ >= 2 * threads || units_ == 0 ? 1 : ceil_div(2 * threads, units_);
    blocks_per_piece_ = ceil_div(blocks_, std::clamp<int64_t>(blocks_ / kSplitBlocks, 1, wanted));
    pieces_ = ceil_div(blocks_, blocks_per_piece_);
    // Wide images: a row of tiles is taken in parts.
    d_.tiles = ceil_div(std::min(most_tiles(), rows_per_unit_ * d_.tile_columns), kWinogradRowGroup) * kWinogradRowGroup;
    // Few channels: the transformed input stays in the L2 cache while the products of two blocks at a time pass through it. Many:
    // it does not, and each of its 36 matrices is read once for all blocks.
    const bool is_near = d_.points() * d_.input_columns() * d_.tiles * kFloat <= kUnitBytes;
    d_.panel = is_near ? std::min<int64_t>(2, blocks_per_piece_) : blocks_per_piece_;
  }

  // Tiles of a unit: at most, and those that fill the cache.
  int64_t most_tiles() const { return 2 * kMostValues / d_.points(); }
  int64_t tiles_wanted() const {
    const WinogradForm& form = d_.form;
    const int64_t streams = 2 * form.in_step * form.in_step * d_.input_columns() + 3 * form.out * form.out * blocks_ * kWinogradLanes;
    const int64_t scratch = d_.points() * (d_.input_columns() + std::min<int64_t>(2, blocks_) * kWinogradLanes);
    return std::clamp(kUnitBytes / (streams * element_ + scratch * kFloat), kFewestValues / d_.points(), kMostValues / d_.points());
  }

  // What units of so many rows of tiles cost, in products of one tile with the weights: tiles go through the product in groups of
  // 12, 8 and 4, of which the smaller are slower, each unit reads the weights, and threads share units evenly only where these are
  // many. Beyond what fills the cache it grows by a hundredth per tile.
  double cost(int64_t rows, int64_t wanted) const {
    const auto groups = [](int64_t tiles) {
      const int64_t rest = tiles % 12;
      return static_cast<double>(tiles - rest) + (rest > 8 ? 14 : rest > 4 ? 8.5 : rest > 0 ? 5.5 : 0);
    };
    // Rows of tiles and tiles of a row that have a value, and values that they have along a side: all tiles, and all but the short ones.
    const int64_t tiles = rows * d_.tile_columns, fewer_rows = rows - rows / d_.tile_rows, fewer_columns = d_.tile_columns - 1;
    const double all_down = d_.form.values(d_.last_down), less_down = d_.form.points - all_down;
    const double all_across = d_.form.values(d_.last_across), less_across = d_.form.points - all_across;
    const double products = all_down * (all_across * groups(tiles) + less_across * groups(rows * fewer_columns)) +
                            less_down * (all_across * groups(fewer_rows * d_.tile_columns) + less_across * groups(fewer_rows * fewer_columns));
    const int64_t units = ceil_div(rows_, rows), shared = units < kFewUnits ? ceil_div(units, kEven) * kEven : units;
    return static_cast<double>(shared) * (products / static_cast<double>(d_.points()) + (weights_are_near_ ? 2 : 4)) *
           (1 + 0.01 * static_cast<double>(std::max<int64_t>(0, tiles - wanted)));
  }

  void make_room() {
    floats_ = ceil_div(d_.scratch_floats(), kWinogradLanes) * kWinogradLanes;
    scratch_ = at::empty({at::get_num_threads() * floats_ + kWinogradLanes}, at::kFloat);
    float* const memory = scratch_.mutable_data_ptr<float>();
    aligned_ = memory + (64 - reinterpret_cast<uintptr_t>(memory) % 64) % 64 / sizeof(float);
  }

  int64_t row(int64_t unit) const { return std::min(rows_, unit * rows_per_unit_); }   // of tiles
  // Pixels of the output and of the input in front of a row of tiles.
  int64_t out_pixel(int64_t row) const {
    return (row / d_.tile_rows * d_.out_height + std::max<int64_t>(0, row % d_.tile_rows * d_.form.out + d_.out_top)) * d_.out_width;
  }
  int64_t in_pixel(int64_t row) const { return in_row(row) * d_.width; }
  int64_t in_row(int64_t row) const { return row / d_.tile_rows * d_.height + std::min(d_.height, row % d_.tile_rows * d_.form.in_step); }

  void piece(int64_t unit, int64_t block, int64_t last_block, double* mean = nullptr, double* m2 = nullptr) const {
    WinogradConv d = d_;
    d.mean = mean, d.m2 = m2;
    if (block == 0) d.own = {in_row(row(unit)), in_row(row(unit + 1))};
    Run runs[kMostRuns];
    if (pieces_ == 1 && unit + 1 < units_) {
      const int64_t begin = row(unit + 1), end = row(unit + 2);
      const auto add = [&](const void* tensor, int64_t first, int64_t last, int64_t channels) {
        const int64_t pixel = channels * element_;
        if (tensor) runs[d.upcoming_count++] = {static_cast<const char*>(tensor) + first * pixel, (last - first) * pixel};
      };
      const int64_t in = in_pixel(begin), in_end = in_pixel(end), out = out_pixel(row(unit)), out_end = out_pixel(begin);
      add(d.y, out, out_end, d.out_channels);
      for (const void* tensor : behind_) add(tensor, out, out_end, d.out_channels);
      if (d.source) {
        add(d.source->reads(0), in, in_end, d.channels);
        add(d.source->reads_too(0), in, in_end, d.channels);
        add(d.source->kept(), in, in_end, d.channels);
      } else {
        add(d.x, in, in_end, d.channels);
      }
      d.upcoming = runs;
    }
    kernel_(d, row(unit), row(unit + 1), block, last_block, aligned_ + at::get_thread_num() * floats_);
  }

  WinogradConv d_ = {};
  WinogradKernels::TileRows kernel_;
  std::array<const void*, 3> behind_ = {};
  Tensor x_, bias_, scratch_;
  float* aligned_ = nullptr;
  int64_t element_, rows_, units_, rows_per_unit_, blocks_, blocks_per_piece_, pieces_, floats_ = 0;
  bool weights_are_near_, is_shared_;
};

// x [N, C, H, W] as an image of blocks of 2 x 2 places: [N, ceil(H / 2), ceil(W / 2), 4 C], of a block first the upper two places. What lies
// outside of x is zero.
class Blocks final : public PixelSource {
 public:
  explicit Blocks(const Tensor& x)
      : x_(x.contiguous(at::MemoryFormat::ChannelsLast)), channels_(x.size(1)), height_(x.size(2)), width_(x.size(3)) {}

  // A tensor of the sizes of the image.
  Tensor image() const {
    return x_.new_empty({}).expand({x_.size(0), 4 * channels_, ceil_div(height_, 2), ceil_div(width_, 2)});
  }
  int64_t granularity() const override { return 1; }
  int64_t element_bytes() const override { return kFloat; }
  void write(int64_t begin, int64_t end, void* to) const override {
    // Images have one channel or three.
    switch (channels_) {
      case 1: return copy<1>(begin, end, static_cast<float*>(to));
      case 3: return copy<3>(begin, end, static_cast<float*>(to));
      default: return copy<0>(begin, end, static_cast<float*>(to));
    }
  }
  // Two rows of x are a row of blocks, one behind the other, where both sides are even.
  const void* reads(int64_t begin) const override {
    return height_ % 2 == 0 && width_ % 2 == 0 ? x_.const_data_ptr<float>() + begin * 4 * channels_ : nullptr;
  }
  const void* reads_too(int64_t) const override { return nullptr; }

 private:
  template <int kChannels>
  void copy(int64_t begin, int64_t end, float* to) const {
    const int64_t channels = kChannels > 0 ? kChannels : channels_, columns = ceil_div(width_, 2), rows = ceil_div(height_, 2);
    const float* const x = x_.const_data_ptr<float>();
    for (int64_t row = begin / columns; row * columns < end; ++row) {
      const int64_t first = std::max(begin, row * columns) - row * columns, last = std::min(end, (row + 1) * columns) - row * columns;
      const int64_t top = row % rows * 2;
      for (int64_t half = 0; half < 2; ++half) {
        const float* const line = x + ((row / rows * height_ + top + half) * width_) * channels;
        float* out = to + half * 2 * channels;
        for (int64_t column = first; column < last; ++column, out += 4 * channels) {
          const int64_t there = top + half < height_ ? std::min<int64_t>(2, width_ - 2 * column) * channels : 0;
          if (there == 2 * channels) {
            for (int64_t i = 0; i < 2 * channels; ++i) out[i] = line[2 * column * channels + i];
          } else {
            for (int64_t i = 0; i < 2 * channels; ++i) out[i] = i < there ? line[2 * column * channels + i] : 0;
          }
        }
      }
      to += (last - first) * 4 * channels;
    }
  }

  const Tensor x_;
  int64_t channels_, height_, width_;
};

Tensor winograd_conv(const Tensor& x, const Tensor& weights, const OptionalTensor& bias, int64_t out_channels,
                     at::IntArrayRef padding, int64_t stride) {
  const PoolScope pooled;
  Winograd conv(x, weights, bias, out_channels, Geometry::forward(x, padding, stride, weights));
  conv.set_input(x);
  if (conv.y.numel() > 0) conv.all();
  return conv.y;
}

Tensor blocked_conv(const Tensor& x, const Tensor& weights, const OptionalTensor& bias, int64_t out_channels, at::IntArrayRef kernel,
                    at::IntArrayRef padding) {
  const PoolScope pooled;
  const Geometry geometry = Geometry::blocked(x, kernel, padding);
  const Blocks source(x);
  Winograd conv(source.image(), weights, bias, out_channels, geometry);
  conv.set_input(source);
  if (conv.y.numel() > 0) conv.all();
  return conv.y;
}

std::tuple<Tensor, Tensor, Tensor> blocked_fwd_reduce(const Tensor& x, const Tensor& weights, const OptionalTensor& bias,
                                                      int64_t out_channels, at::IntArrayRef kernel, at::IntArrayRef padding,
                                                      OptionalTensor running_mean, OptionalTensor running_var,
                                                      OptionalTensor num_batches_tracked, std::optional<double> momentum, double eps) {
  const PoolScope pooled;
  const Geometry geometry = Geometry::blocked(x, kernel, padding);
  const Blocks source(x);
  Winograd conv(source.image(), weights, bias, out_channels, geometry);
  conv.set_input(source);
  return reduced_behind(conv, running_mean, running_var, num_batches_tracked, momentum, eps);
}

Tensor winograd_dgrad(const Tensor& dy, const Tensor& weights, int64_t in_channels, at::IntArrayRef input_size,
                      at::IntArrayRef padding, int64_t stride) {
  const PoolScope pooled;
  Winograd conv(dy, weights, std::nullopt, in_channels, Geometry::backward(dy, input_size, padding, stride, weights));
  conv.set_input(dy);
  if (conv.y.numel() > 0) conv.all();
  return conv.y;
}

std::tuple<Tensor, Tensor, Tensor> winograd_fwd_reduce(
    const Tensor& x, const OptionalTensor& mean, const OptionalTensor& rstd, const OptionalTensor& gamma, const OptionalTensor& beta,
    c10::string_view act, double slope, const Tensor& weights, const OptionalTensor& bias, int64_t out_channels,
    at::IntArrayRef padding, int64_t stride, OptionalTensor running_mean, OptionalTensor running_var,
    OptionalTensor num_batches_tracked, std::optional<double> momentum, double eps) {
  const PoolScope pooled;
  Winograd conv(x, weights, bias, out_channels, Geometry::forward(x, padding, stride, weights));
  std::optional<Normalised> source;
  if (mean) conv.set_input(source.emplace(x, mean, rstd, gamma, beta, act, slope));
  else conv.set_input(x);
  return reduced_behind(conv, running_mean, running_var, num_batches_tracked, momentum, eps);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> winograd_residual_fwd_reduce(
    const Tensor& x, const Tensor& mean, const Tensor& rstd, const OptionalTensor& gamma, const OptionalTensor& beta,
    const Tensor& residual, c10::string_view act, double slope, bool want_bits, const Tensor& weights, const OptionalTensor& bias,
    int64_t out_channels, at::IntArrayRef padding, int64_t stride, OptionalTensor running_mean, OptionalTensor running_var,
    OptionalTensor num_batches_tracked, std::optional<double> momentum, double eps) {
  const PoolScope pooled;
  Winograd conv(x, weights, bias, out_channels, Geometry::forward(x, padding, stride, weights));
  const Kept source(x, mean, rstd, gamma, beta, residual, act, slope, want_bits);
  if (x.size(3) % source.granularity() == 0) {
    conv.set_input(source);
  } else {   // a row would end inside of a group of elements
    source.keep_all();
    conv.set_input(source.y());
  }
  auto [z, own_mean, own_rstd] = reduced_behind(conv, running_mean, running_var, num_batches_tracked, momentum, eps);
  return {z, own_mean, own_rstd, source.y(), source.bits()};
}

Tensor winograd_fwd_apply(const Tensor& x, const Tensor& mean, const Tensor& rstd, const OptionalTensor& gamma,
                          const OptionalTensor& beta, const OptionalTensor& residual, c10::string_view act, double slope,
                          const Tensor& weights, const OptionalTensor& bias, int64_t out_channels, at::IntArrayRef padding,
                          int64_t stride) {
  const PoolScope pooled;
  Winograd conv(x, weights, bias, out_channels, Geometry::forward(x, padding, stride, weights));
  conv.set_input(x);
  return applied_behind(conv, mean, rstd, gamma, beta, residual, act, slope);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> winograd_dgrad_reduce(
    const Tensor& dy, const OptionalTensor& z, const OptionalTensor& mean, const OptionalTensor& rstd, const OptionalTensor& gamma,
    const OptionalTensor& beta, const OptionalTensor& dgamma, const OptionalTensor& dbeta, c10::string_view act, double slope,
    const Tensor& weights, int64_t in_channels, at::IntArrayRef input_size, at::IntArrayRef padding, int64_t stride,
    const OptionalTensor& add, const OptionalTensor& z_below,
    const OptionalTensor& bits, const OptionalTensor& mean_below, const OptionalTensor& rstd_below, const OptionalTensor& gamma_below,
    const OptionalTensor& beta_below, c10::string_view act_below, double slope_below, const OptionalTensor& z_beside,
    const OptionalTensor& mean_beside, const OptionalTensor& rstd_beside) {
  const PoolScope pooled;
  Winograd conv(dy, weights, std::nullopt, in_channels, Geometry::backward(dy, input_size, padding, stride, weights));
  check_above(z, mean, rstd, dgamma, dbeta);
  std::optional<Dz> source;
  if (z) conv.set_input(source.emplace(dy, *z, *mean, *rstd, gamma, beta, *dgamma, *dbeta, act, slope));
  else conv.set_input(dy);
  return dgrad_reduced_behind(conv, add, {z_below, bits, mean_below, rstd_below, gamma_below, beta_below, act_below, slope_below,
                                          z_beside, mean_beside, rstd_beside});
}

}  // namespace

TORCH_LIBRARY_IMPL(bnfast, CPU, m) {
  m.impl("blocked_conv", &blocked_conv);
  m.impl("blocked_fwd_reduce", &blocked_fwd_reduce);
  m.impl("winograd_conv", &winograd_conv);
  m.impl("winograd_fwd_apply", &winograd_fwd_apply);
  m.impl("winograd_fwd_reduce", &winograd_fwd_reduce);
  m.impl("winograd_residual_fwd_reduce", &winograd_residual_fwd_reduce);
  m.impl("winograd_dgrad", &winograd_dgrad);
  m.impl("winograd_dgrad_reduce", &winograd_dgrad_reduce);
}

}  // namespace bnfast
