// 1x1 convolutions of stride 1 as operators: alone, with bn_fwd_reduce behind the product, and with bn_bwd_apply in front of it.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <numeric>

#include "bn_fused.h"
#include "capability_table.h"
#include "pool.h"

namespace bnfast {
namespace {

using at::Tensor;

constexpr int64_t kRowGroup = 12;         // of the widest kernel
constexpr int64_t kChunkFloats = 49152;   // of x and y that pass through the L2 cache together
constexpr int64_t kUnitFloats = 262144;   // ... in one unit of work
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

  // The chunk [from, to) of rows, for the blocks [first, last).
  PointwiseConv part(int64_t from, int64_t to) const {
    PointwiseConv p = conv;
    p.x = conv.x + from * conv.channels;
    p.y = conv.y + from * conv.out_channels;
    p.rows = to - from;
    p.rows_below = conv.rows - to;
    p.upcoming_floats = std::min(chunk, p.rows_below) * conv.channels;
    return p;
  }

  void rows(int64_t begin, int64_t end, int64_t first, int64_t last) const {
    const auto kernel = cpu_capability().pointwise.product;
    for (int64_t from = begin; from < end; from += chunk) {
      const int64_t to = std::min(end, from + chunk);
      PointwiseConv p = part(from, to);
      p.upcoming[0] = conv.x + to * conv.channels;
      kernel(p, first, last);
    }
  }
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

Tensor pointwise_conv(const Tensor& x, const Tensor& weights, const OptionalTensor& bias, int64_t out_channels) {
  const PoolScope pooled;
  check_x(x);
  Product product(x, weights, bias, x.size(1), out_channels);
  product.set_x(x);
  if (product.y.numel() == 0) return product.y;
  const int64_t rows = product.conv.rows, blocks = product.blocks, threads = at::get_num_threads();
  const Units units(rows, product.conv.channels + out_channels, kRowGroup);
  // Few pixels: the output channels are shared out too.
  const int64_t blocks_per_unit = units.count >= threads ? blocks : ceil_div(ceil_div(blocks * units.count, threads), 2) * 2;
  const int64_t pieces = ceil_div(blocks, blocks_per_unit);
  at::parallel_for(0, units.count * pieces, 1, [&](int64_t begin, int64_t end) {
    for (int64_t u = begin; u < end; ++u) {
      const int64_t row = u / pieces * units.each, block = u % pieces * blocks_per_unit;
      product.rows(row, std::min(rows, row + units.each), block, std::min(blocks, block + blocks_per_unit));
    }
  });
  return product.y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> pointwise_fwd_reduce_apply(
    const Tensor& x, const Tensor& weights, const OptionalTensor& bias, int64_t out_channels, OptionalTensor running_mean,
    OptionalTensor running_var, OptionalTensor num_batches_tracked, std::optional<double> momentum, double eps,
    OptionalTensor gamma, OptionalTensor beta, OptionalTensor residual, c10::string_view act, double slope, bool want_bits) {
  const PoolScope pooled;
  check_x(x);
  Product product(x, weights, bias, x.size(1), out_channels);
  product.set_x(x);
  auto [mean, rstd, y, bits] = bn_fwd_behind(
      product.y, [&](int64_t begin, int64_t end) { product.rows(begin, end, 0, product.blocks); }, running_mean, running_var,
      num_batches_tracked, momentum, eps, gamma, beta, residual, act, slope, want_bits);
  return {product.y, mean, rstd, y, bits};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> pointwise_bwd_reduce_apply_dgrad(
    const Tensor& dy, const Tensor& z, const Tensor& mean, const Tensor& rstd, OptionalTensor gamma, OptionalTensor beta,
    OptionalTensor residual, OptionalTensor bits, c10::string_view act, double slope, bool want_dresidual, const Tensor& weights,
    int64_t in_channels) {
  const PoolScope pooled;
  check_x(z);
  const int64_t channels = z.size(1);
  Product product(z, weights, std::nullopt, channels, in_channels);
  const auto consume = [&](const DzRows& dz) {
    const int64_t rows = product.conv.rows, step = std::lcm(kRowGroup, dz.granularity());
    if (rows == 0) return;
    const int64_t chunk = ceil_div(product.chunk, step) * step;
    const Units units(rows, 2 * channels + in_channels, step);
    const auto kernel = cpu_capability().pointwise.product;
    at::parallel_for(0, units.count, 1, [&](int64_t first, int64_t last) {
      const Tensor scratch = at::empty({chunk * channels + kAlignment}, z.options().memory_format(at::MemoryFormat::Contiguous));
      float* const memory = scratch.mutable_data_ptr<float>();
      float* const part = memory + (64 - reinterpret_cast<uintptr_t>(memory) % 64) % 64 / sizeof(float);
      const int64_t begin = first * units.each, end = std::min(rows, last * units.each);
      for (int64_t from = begin; from < end; from += chunk) {
        const int64_t to = std::min(end, from + chunk);
        dz.write(from, to, part);
        PointwiseConv p = product.part(from, to);
        p.x = part;
        p.upcoming[0] = dz.dy(to);
        p.upcoming[1] = dz.z(to);
        p.upcoming_floats = std::min(chunk, p.rows_below) * channels;
        kernel(p, 0, product.blocks);
      }
    });
  };
  auto [dgamma, dbeta, dresidual] =
      bn_bwd_before(dy, z, mean, rstd, gamma, beta, residual, bits, act, slope, want_dresidual, consume);
  return {dgamma, dbeta, product.y, dresidual};
}

}  // namespace

TORCH_LIBRARY_IMPL(bnfast, CPU, m) {
  m.impl("pointwise_conv", &pointwise_conv);
  m.impl("pointwise_fwd_reduce_apply", &pointwise_fwd_reduce_apply);
  m.impl("pointwise_bwd_reduce_apply_dgrad", &pointwise_bwd_reduce_apply_dgrad);
}

}  // namespace bnfast
