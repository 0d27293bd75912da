// 1x1 convolutions of stride 1 as operators: alone, and with the BatchNorm phases in front of the product and behind it.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <array>
#include <cstring>
#include <numeric>

#include "bn_fused.h"
#include "capability_table.h"
#include "pool.h"

namespace bnfast {
namespace {

using at::Tensor;

constexpr int64_t kRowGroup = 12;         // of the widest kernel
constexpr int64_t kChunkFloats = 28672;   // of x and y that pass through the L2 cache together
constexpr int64_t kUnitFloats = 262144;   // ... in one unit of work
constexpr int64_t kSpreadBytes = 131072;  // of dx in one unit of work
constexpr int64_t kAlignment = 16;        // of scratch memory, in floats

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// x times the weights: every output is one sum in one order, so how the work is cut changes no bit.
struct Product {
  Tensor x, y, bias;
  PointwiseConv conv = {};
  int64_t blocks, chunk;

  // like: a tensor of y's batch and plane.
  Product(const Tensor& like, const Tensor& weights, const OptionalTensor& bias_in, int64_t channels, int64_t out_channels)
      : blocks(PointwiseConv::blocks(out_channels)) {
    TORCH_CHECK(weights.is_contiguous() && weights.scalar_type() == at::kFloat &&
                    weights.sizes() == at::IntArrayRef({blocks, channels, kPointwiseLanes}),
                "bnfast: weights are ", weights.scalar_type(), " ", weights.sizes(), "; float32 [", blocks, ", ", channels,
                ", 16] is needed");
    if (bias_in) {
      TORCH_CHECK(bias_in->dim() == 1 && bias_in->size(0) == out_channels, "bnfast: bias is of shape ", bias_in->sizes(), "; [",
                  out_channels, "] is needed");
      bias = at::constant_pad_nd(bias_in->to(at::kFloat), {0, blocks * kPointwiseLanes - out_channels}).contiguous();
      conv.bias = bias.const_data_ptr<float>();
    }
    y = at::empty({like.size(0), out_channels, like.size(2), like.size(3)},
                  like.options().memory_format(at::MemoryFormat::ChannelsLast));
    conv.weights = weights.const_data_ptr<float>();
    conv.y = y.mutable_data_ptr<float>();
    conv.rows = y.size(0) * y.size(2) * y.size(3);
    conv.channels = channels;
    conv.out_channels = out_channels;
    chunk = std::max<int64_t>(4, kChunkFloats / (channels + out_channels) / kRowGroup) * kRowGroup;
  }

  void set_x(const Tensor& x_in) {
    x = x_in.contiguous(at::MemoryFormat::ChannelsLast);
    conv.x = x.const_data_ptr<float>();
  }

  // Tensors of y's shape that are read after each chunk; null ones are ignored.
  void set_behind(std::array<const void*, 3> tensors) { behind_ = tensors; }

  // What is needed behind the rows [from, to), of those up to `end`, while they are multiplied and reduced, which takes `cycles`. source: of x.
  Upcoming upcoming(int64_t from, int64_t to, int64_t end, int64_t cycles, const PixelSource* source = nullptr) const {
    Upcoming result;
    const int64_t next = std::min(chunk, end - to);
    const auto add = [&](const void* at, int64_t floats_per_row) {
      result.add(at, next * floats_per_row * static_cast<int64_t>(sizeof(float)));
    };
    const PointwiseConv p = part(from, to);
    if (!p.is_near()) add(conv.y + to * conv.out_channels, conv.out_channels);
    for (const void* tensor : behind_) {
      if (tensor) add(static_cast<const float*>(tensor) + to * conv.out_channels, conv.out_channels);
    }
    add(source ? source->reads(to) : conv.x + to * conv.channels, conv.channels);
    if (source) add(source->reads_too(to), conv.channels);
    result.spread(p.cycles(), cycles);
    return result;
  }

  // y of the rows [from, to) for the blocks [first, last). made: x of these rows, where a source makes it.
  void rows(int64_t from, int64_t to, int64_t first, int64_t last, Upcoming& upcoming, const float* made = nullptr) const {
    PointwiseConv p = part(from, to);
    if (made) p.x = made;
    p.upcoming = &upcoming;
    cpu_capability().pointwise.product(p, first, last);
  }

 private:
  PointwiseConv part(int64_t from, int64_t to) const {
    PointwiseConv p = conv;
    if (p.x) p.x += from * conv.channels;
    p.y += from * conv.out_channels;
    p.rows = to - from;
    p.rows_below = conv.rows - to;
    return p;
  }

  std::array<const void*, 3> behind_ = {};
};

void check_x(const Tensor& x) {
  TORCH_CHECK(x.dim() == 4 && x.scalar_type() == at::kFloat, "bnfast: x is ", x.scalar_type(), " ", x.sizes(),
              "; float32 [N, C, H, W] is needed");
}

// Units of `count` rows that share a multiple of `step` rows each: as many for one thread as for another.
struct Units {
  int64_t each, count;
  Units(int64_t rows, int64_t floats_per_row, int64_t step) {
    const int64_t threads = at::get_num_threads(), most = std::max<int64_t>(4 * kRowGroup, kUnitFloats / floats_per_row);
    const int64_t per_thread = ceil_div(ceil_div(rows, threads), most);
    each = ceil_div(ceil_div(rows, threads * per_thread), step) * step;
    count = ceil_div(rows, each);
  }
};

// All of y, shared out among the threads.
void all_rows(const Product& product) {
  const int64_t rows = product.conv.rows, blocks = product.blocks, threads = at::get_num_threads();
  const Units units(rows, product.conv.channels + product.conv.out_channels, kRowGroup);
  // Few pixels: the output channels are shared out too.
  const int64_t blocks_per_unit = units.count >= threads ? blocks : ceil_div(ceil_div(blocks * units.count, threads), 2) * 2;
  const int64_t pieces = ceil_div(blocks, blocks_per_unit);
  at::parallel_for(0, units.count * pieces, 1, [&](int64_t begin, int64_t end) {
    for (int64_t u = begin; u < end; ++u) {
      const int64_t row = u / pieces * units.each, block = u % pieces * blocks_per_unit, last = std::min(rows, row + units.each);
      for (int64_t from = row; from < last; from += product.chunk) {
        const int64_t to = std::min(last, from + product.chunk);
        Upcoming upcoming = product.upcoming(from, to, last, 0);
        product.rows(from, to, block, std::min(blocks, block + blocks_per_unit), upcoming);
      }
    }
  });
}

Tensor pointwise_conv(const Tensor& x, const Tensor& weights, const OptionalTensor& bias, int64_t out_channels) {
  const PoolScope pooled;
  check_x(x);
  Product product(x, weights, bias, x.size(1), out_channels);
  product.set_x(x);
  if (product.y.numel() > 0) all_rows(product);
  return product.y;
}

Tensor pointwise_fwd_apply(const Tensor& x, const Tensor& mean, const Tensor& rstd, const OptionalTensor& gamma,
                           const OptionalTensor& beta, const OptionalTensor& residual, c10::string_view act, double slope,
                           const Tensor& weights, const OptionalTensor& bias, int64_t out_channels) {
  const PoolScope pooled;
  check_x(x);
  Product product(x, weights, bias, x.size(1), out_channels);
  product.set_x(x);
  const AppliedBehind behind(product.y, mean, rstd, gamma, beta, residual, act, slope, nullptr);
  if (product.y.numel() == 0) return product.y;
  const int64_t rows = product.conv.rows, step = std::lcm(kRowGroup, behind.granularity());
  const Units units(rows, product.conv.channels + 2 * out_channels, step);
  if (units.count < at::get_num_threads()) {
    all_rows(product);
    behind.take_all();
    return product.y;
  }
  product.set_behind(behind.reads());
  product.chunk = ceil_div(product.chunk, step) * step;
  at::parallel_for(0, units.count, 1, [&](int64_t first, int64_t last) {
    const int64_t end = std::min(rows, last * units.each);
    for (int64_t from = first * units.each; from < end; from += product.chunk) {
      const int64_t to = std::min(end, from + product.chunk);
      Upcoming upcoming = product.upcoming(from, to, end, 0);
      product.rows(from, to, 0, product.blocks, upcoming);
      behind.take(from, to);
    }
  });
  return product.y;
}

// Room for a chunk of pixels that a source makes.
class Made {
 public:
  Made(const PixelSource& source, int64_t pixels, int64_t channels, const Tensor& like)
      : source_(source), channels_(channels),
        memory_(at::empty({(pixels + source.granularity()) * channels + kAlignment},
                          like.options().memory_format(at::MemoryFormat::Contiguous))) {
    float* const first = memory_.mutable_data_ptr<float>() + source.granularity() * channels;
    to_ = first + (64 - reinterpret_cast<uintptr_t>(first) % 64) % 64 / sizeof(float);
  }
  // y of the pixels [from, to), at most a chunk.
  void rows(const Product& product, int64_t from, int64_t to, Upcoming& upcoming) const {
    source_.write_from(from, to, channels_, to_);
    product.rows(from, to, 0, product.blocks, upcoming, to_);
  }

 private:
  const PixelSource& source_;
  int64_t channels_;
  Tensor memory_;
  float* to_;
};

std::tuple<Tensor, Tensor, Tensor> pointwise_fwd_reduce(
    const Tensor& x, const OptionalTensor& mean, const OptionalTensor& rstd, const OptionalTensor& gamma, const OptionalTensor& beta,
    c10::string_view act, double slope, const Tensor& weights, const OptionalTensor& bias, int64_t out_channels,
    OptionalTensor running_mean, OptionalTensor running_var, OptionalTensor num_batches_tracked, std::optional<double> momentum,
    double eps, const OptionalTensor& gate) {
  const PoolScope pooled;
  check_x(x);
  TORCH_CHECK(mean.has_value() || !gate.has_value(), "bnfast: gate is given without mean");
  Product product(x, weights, bias, x.size(1), out_channels);
  std::optional<Normalised> source;
  if (mean) source.emplace(x, mean, rstd, gamma, beta, act, slope, gate);
  else product.set_x(x);
  auto [own_mean, own_rstd] = bn_fwd_reduce_behind(
      product.y, nullptr,
      [&](int64_t, int64_t begin, int64_t end, Upcoming& upcoming, double*, double*) {
        std::optional<Made> made;
        if (source) made.emplace(*source, product.chunk, x.size(1), product.y);
        for (int64_t from = begin; from < end; from += product.chunk) {
          const int64_t to = std::min(end, from + product.chunk);
          // The thread that reduces these goes on with those behind them.
          const int64_t behind = to == end ? (end - begin) * out_channels / kPointwiseLanes * kFwdReduceCycles : 0;
          upcoming = product.upcoming(from, to, product.conv.rows, behind, source ? &*source : nullptr);
          if (made) made->rows(product, from, to, upcoming);
          else product.rows(from, to, 0, product.blocks, upcoming);
        }
        return false;
      },
      running_mean, running_var, num_batches_tracked, momentum, eps);
  return {product.y, own_mean, own_rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> pointwise_bwd_reduce_apply_dgrad(
    const Tensor& dy, const Tensor& z, const Tensor& mean, const Tensor& rstd, OptionalTensor gamma, OptionalTensor beta,
    OptionalTensor residual, OptionalTensor bits, c10::string_view act, double slope, bool want_dresidual, const Tensor& weights,
    int64_t in_channels) {
  const PoolScope pooled;
  check_x(z);
  const int64_t channels = z.size(1);
  Product product(z, weights, std::nullopt, channels, in_channels);
  const auto consume = [&](const PixelSource& dz) {
    const int64_t rows = product.conv.rows, step = std::lcm(kRowGroup, dz.granularity());
    if (rows == 0) return;
    product.chunk = ceil_div(product.chunk, step) * step;   // each pixel is made once, and its dresidual written once
    const Units units(rows, 2 * channels + in_channels, step);
    at::parallel_for(0, units.count, 1, [&](int64_t first, int64_t last) {
      const Made made(dz, product.chunk, channels, z);
      const int64_t end = std::min(rows, last * units.each);
      for (int64_t from = first * units.each; from < end; from += product.chunk) {
        const int64_t to = std::min(end, from + product.chunk);
        Upcoming upcoming = product.upcoming(from, to, end, 0, &dz);
        made.rows(product, from, to, upcoming);
      }
    });
  };
  auto [dgamma, dbeta, dresidual] =
      bn_bwd_before(dy, z, mean, rstd, gamma, beta, residual, bits, act, slope, want_dresidual, consume);
  return {dgamma, dbeta, product.y, dresidual};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> pointwise_dgrad_reduce(
    const Tensor& dy, const OptionalTensor& z, const OptionalTensor& mean, const OptionalTensor& rstd, const OptionalTensor& gamma,
    const OptionalTensor& beta, const OptionalTensor& dgamma, const OptionalTensor& dbeta, c10::string_view act, double slope,
    const Tensor& weights, int64_t in_channels, const OptionalTensor& add, const OptionalTensor& z_below, const OptionalTensor& bits,
    const OptionalTensor& mean_below, const OptionalTensor& rstd_below, const OptionalTensor& gamma_below,
    const OptionalTensor& beta_below, c10::string_view act_below, double slope_below, const OptionalTensor& z_beside,
    const OptionalTensor& mean_beside, const OptionalTensor& rstd_beside) {
  const PoolScope pooled;
  check_x(dy);
  const int64_t channels = dy.size(1);
  Product product(dy, weights, std::nullopt, channels, in_channels);
  check_above(z, mean, rstd, dgamma, dbeta);
  std::optional<Dz> source;
  if (z) source.emplace(dy, *z, *mean, *rstd, gamma, beta, *dgamma, *dbeta, act, slope);
  else product.set_x(dy);
  const BehindDgrad behind(product.y, add, {z_below, bits, mean_below, rstd_below, gamma_below, beta_below, act_below, slope_below,
                                            z_beside, mean_beside, rstd_beside}, nullptr);
  product.set_behind(behind.reads());
  const int64_t step = std::lcm(kRowGroup, behind.granularity());
  product.chunk = ceil_div(product.chunk, step) * step;
  if (product.y.numel() > 0) {
    at::parallel_for(0, behind.units(), 1, [&](int64_t first, int64_t last) {
      std::optional<Made> made;
      if (source) made.emplace(*source, product.chunk, channels, dy);
      const int64_t end = behind.end(last - 1);
      for (int64_t u = first; u < last; ++u) {
        for (int64_t from = behind.begin(u); from < behind.end(u); from += product.chunk) {
          const int64_t to = std::min(behind.end(u), from + product.chunk);
          Upcoming upcoming = product.upcoming(from, to, end, behind.cycles(to - from), source ? &*source : nullptr);
          if (made) made->rows(product, from, to, upcoming);
          else product.rows(from, to, 0, product.blocks, upcoming);
          behind.take(u, from, to, upcoming);
        }
      }
    });
  }
  auto [dgamma_below, dbeta_below, dgamma_beside, dbeta_beside] = behind.sums();
  return {product.y, dgamma_below, dbeta_below, dgamma_beside, dbeta_beside};
}

// dx [N, C, H, W] of a 1x1 convolution that strides: the gradient `read` at the pixels that it reads, and 0 at the others.
Tensor pointwise_spread(const Tensor& read_in, at::IntArrayRef input_size, at::IntArrayRef stride) {
  const PoolScope pooled;
  TORCH_CHECK(read_in.dim() == 4 && input_size.size() == 2 && stride.size() == 2 && stride[0] > 0 && stride[1] > 0 &&
                  read_in.size(2) == ceil_div(input_size[0], stride[0]) && read_in.size(3) == ceil_div(input_size[1], stride[1]),
              "bnfast: read is of shape ", read_in.sizes(), ", input_size ", input_size, " and stride ", stride,
              "; [N, C, ceil(H / stride), ceil(W / stride)] is needed");
  const Tensor read = read_in.contiguous(at::MemoryFormat::ChannelsLast);
  Tensor dx = at::empty({read.size(0), read.size(1), input_size[0], input_size[1]},
                        read.options().memory_format(at::MemoryFormat::ChannelsLast));
  const int64_t pixel = read.size(1) * read.element_size(), height = input_size[0], width = input_size[1], columns = read.size(3);
  const auto* const from = static_cast<const char*>(read.const_data_ptr());
  auto* const to = static_cast<char*>(dx.mutable_data_ptr());
  const int64_t rows = dx.size(0) * height, rows_per_unit = std::max<int64_t>(1, kSpreadBytes / std::max<int64_t>(1, width * pixel));
  at::parallel_for(0, rows, rows_per_unit, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t n = row / height, h = row % height;
      char* line = to + row * width * pixel;
      if (h % stride[0] != 0) {
        std::memset(line, 0, width * pixel);
        continue;
      }
      const char* pixels = from + (n * read.size(2) + h / stride[0]) * columns * pixel;
      for (int64_t j = 0; j < columns; ++j, pixels += pixel) {
        const int64_t w = j * stride[1], zeros = std::min(stride[1], width - w) - 1;
        std::memcpy(line + w * pixel, pixels, pixel);
        std::memset(line + (w + 1) * pixel, 0, zeros * pixel);
      }
    }
  });
  return dx;
}

}  // namespace

TORCH_LIBRARY_IMPL(bnfast, CPU, m) {
  m.impl("pointwise_conv", &pointwise_conv);
  m.impl("pointwise_fwd_apply", &pointwise_fwd_apply);
  m.impl("pointwise_fwd_reduce", &pointwise_fwd_reduce);
  m.impl("pointwise_bwd_reduce_apply_dgrad", &pointwise_bwd_reduce_apply_dgrad);
  m.impl("pointwise_dgrad_reduce", &pointwise_dgrad_reduce);
  m.impl("pointwise_spread", &pointwise_spread);
}

}  // namespace bnfast
