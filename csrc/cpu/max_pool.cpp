// Max-pooling behind a unit as operators.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "capability_table.h"
#include "pool.h"

namespace bnfast {
namespace {

using at::Tensor;

constexpr int64_t kUnit = 32768;   // elements of the larger tensor of one unit of work

// sizes: of the larger tensor, [N, C, H, W].
MaxPool arguments(at::IntArrayRef sizes, at::IntArrayRef pooled, at::IntArrayRef kernel, at::IntArrayRef stride,
                  at::IntArrayRef padding) {
  TORCH_CHECK(sizes.size() == 4 && kernel.size() == 2 && stride.size() == 2 && padding.size() == 2, "bnfast: y is of shape ", sizes,
              " and kernel, stride and padding are ", kernel, ", ", stride, ", ", padding, "; [N, C, H, W] and pairs are needed");
  TORCH_CHECK(kernel[0] > 0 && kernel[1] > 0 && kernel[0] * kernel[1] <= 256 && stride[0] > 0 && stride[1] > 0,
              "bnfast: kernel is ", kernel, " and stride ", stride, "; at least 1, and at most 256 places in a window, are allowed");
  TORCH_CHECK(padding[0] >= 0 && padding[1] >= 0 && 2 * padding[0] <= kernel[0] && 2 * padding[1] <= kernel[1],
              "bnfast: padding is ", padding, "; 0 to half of the kernel ", kernel, " is allowed");
  MaxPool d = {};
  d.channels = sizes[1];
  d.height = sizes[2];
  d.width = sizes[3];
  d.out_height = pooled[0];
  d.out_width = pooled[1];
  d.kernel_height = kernel[0];
  d.kernel_width = kernel[1];
  d.stride_height = stride[0];
  d.stride_width = stride[1];
  d.padding_height = padding[0];
  d.padding_width = padding[1];
  return d;
}

void for_rows(int64_t rows, int64_t elements_per_row, const MaxPool& d, void (*run)(const MaxPool&, int64_t, int64_t)) {
  const int64_t per_unit = std::max<int64_t>(1, kUnit / std::max<int64_t>(1, elements_per_row));
  at::parallel_for(0, (rows + per_unit - 1) / per_unit, 1, [&](int64_t begin, int64_t end) {
    run(d, begin * per_unit, std::min(rows, end * per_unit));
  });
}

const MaxPoolKernels& kernels_for(const Tensor& t) { return cpu_capability().max_pool[static_cast<int>(dtype_of(t))]; }

std::tuple<Tensor, Tensor> max_pool(const Tensor& y_in, at::IntArrayRef kernel, at::IntArrayRef stride, at::IntArrayRef padding) {
  const PoolScope pooled;
  MaxPool d = arguments(y_in.sizes(), {0, 0}, kernel, stride, padding);
  d.out_height = (d.height + 2 * padding[0] - kernel[0]) / stride[0] + 1;
  d.out_width = (d.width + 2 * padding[1] - kernel[1]) / stride[1] + 1;
  TORCH_CHECK(d.height + 2 * padding[0] >= kernel[0] && d.width + 2 * padding[1] >= kernel[1], "bnfast: y is of shape ",
              y_in.sizes(), " with padding ", padding, "; a window of ", kernel, " does not fit");
  const Tensor y = y_in.contiguous(at::MemoryFormat::ChannelsLast);
  const auto options = y.options().memory_format(at::MemoryFormat::ChannelsLast);
  Tensor p = at::empty({y.size(0), d.channels, d.out_height, d.out_width}, options);
  Tensor places = at::empty(p.sizes(), options.dtype(at::kByte));
  d.y = y.const_data_ptr();
  d.p = p.mutable_data_ptr();
  d.places = places.mutable_data_ptr<uint8_t>();
  if (p.numel() > 0) {
    for_rows(p.size(0) * d.out_height, d.out_width * d.channels * d.stride_height * d.stride_width, d, kernels_for(y).forward_rows);
  }
  return {p, places};
}

Tensor max_pool_backward(const Tensor& dp_in, const Tensor& places_in, at::IntArrayRef input_size, at::IntArrayRef kernel,
                         at::IntArrayRef stride, at::IntArrayRef padding) {
  const PoolScope pooled;
  TORCH_CHECK(dp_in.dim() == 4 && input_size.size() == 2 && places_in.sizes() == dp_in.sizes() && places_in.scalar_type() == at::kByte,
              "bnfast: dp is of shape ", dp_in.sizes(), ", places ", places_in.scalar_type(), " ", places_in.sizes(),
              " and input_size ", input_size, "; [N, C, OH, OW], uint8 of the same shape and (H, W) are needed");
  const Tensor dp = dp_in.contiguous(at::MemoryFormat::ChannelsLast), places = places_in.contiguous(at::MemoryFormat::ChannelsLast);
  Tensor dy = at::empty({dp.size(0), dp.size(1), input_size[0], input_size[1]},
                        dp.options().memory_format(at::MemoryFormat::ChannelsLast));
  MaxPool d = arguments(dy.sizes(), dp.sizes().slice(2), kernel, stride, padding);
  d.dp = dp.const_data_ptr();
  d.dy = dy.mutable_data_ptr();
  d.places = const_cast<uint8_t*>(places.const_data_ptr<uint8_t>());
  if (dy.numel() > 0) for_rows(dy.size(0) * d.height, d.width * d.channels, d, kernels_for(dp).backward_rows);
  return dy;
}

}  // namespace

TORCH_LIBRARY_IMPL(bnfast, CPU, m) {
  m.impl("max_pool", &max_pool);
  m.impl("max_pool_backward", &max_pool_backward);
}

}  // namespace bnfast
