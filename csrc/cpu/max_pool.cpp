// Max-pooling behind a unit as operators.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <memory>
#include <vector>

#include "bn_fused.h"
#include "capability_table.h"
#include "pool.h"

namespace bnfast {
namespace {

using at::Tensor;

constexpr int64_t kUnit = 32768;   // elements of the larger tensor of one unit of work
constexpr int64_t kMadeBytes = 1 << 18;   // of a tensor that is made piece by piece, at once

// Memory for some rows of an image.
class Rows {
 public:
  // margin: bytes in front of the first row that may be written to.
  Rows(int64_t count, int64_t bytes, int64_t margin)
      : count_(count), margin_(margin), memory_(at::empty({count * bytes + margin}, at::kByte)) {}
  int64_t count() const { return count_; }
  char* first() const { return static_cast<char*>(memory_.mutable_data_ptr()) + margin_; }

 private:
  int64_t count_, margin_;
  Tensor memory_;
};

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

// p and places of a tensor like y, in channels_last.
struct Pooled {
  Tensor p, places;
  MaxPool d;

  Pooled(const Tensor& y, at::IntArrayRef kernel, at::IntArrayRef stride, at::IntArrayRef padding)
      : d(arguments(y.sizes(), {0, 0}, kernel, stride, padding)) {
    d.out_height = (d.height + 2 * padding[0] - kernel[0]) / stride[0] + 1;
    d.out_width = (d.width + 2 * padding[1] - kernel[1]) / stride[1] + 1;
    TORCH_CHECK(d.height + 2 * padding[0] >= kernel[0] && d.width + 2 * padding[1] >= kernel[1], "bnfast: y is of shape ",
                y.sizes(), " with padding ", padding, "; a window of ", kernel, " does not fit");
    const auto options = y.options().memory_format(at::MemoryFormat::ChannelsLast);
    p = at::empty({y.size(0), d.channels, d.out_height, d.out_width}, options);
    places = at::empty(p.sizes(), options.dtype(at::kByte));
    d.p = p.mutable_data_ptr();
    d.places = places.mutable_data_ptr<uint8_t>();
  }
};

std::tuple<Tensor, Tensor> max_pool(const Tensor& y_in, at::IntArrayRef kernel, at::IntArrayRef stride, at::IntArrayRef padding) {
  const PoolScope pooled;
  Pooled to(y_in, kernel, stride, padding);
  const Tensor y = y_in.contiguous(at::MemoryFormat::ChannelsLast);
  MaxPool& d = to.d;
  d.y = y.const_data_ptr();
  if (to.p.numel() > 0) {
    for_rows(y.size(0) * d.out_height, d.out_width * d.channels * d.stride_height * d.stride_width, d, kernels_for(y).forward_rows);
  }
  return {to.p, to.places};
}

// y never leaves the cache: a few rows of it are made, and pooled.
std::tuple<Tensor, Tensor> bn_fwd_apply_max_pool(const Tensor& z, const Tensor& mean, const Tensor& rstd, const OptionalTensor& gamma,
                                                 const OptionalTensor& beta, c10::string_view act, double slope,
                                                 at::IntArrayRef kernel, at::IntArrayRef stride, at::IntArrayRef padding) {
  const PoolScope pooled;
  Pooled to(z, kernel, stride, padding);
  const Normalised source(z, mean, rstd, gamma, beta, act, slope);
  if (to.p.numel() == 0) return {to.p, to.places};
  const MaxPool& whole = to.d;
  const auto run = kernels_for(z).forward_rows;
  const int64_t pixel_bytes = whole.channels * z.element_size(), row = whole.width * pixel_bytes;
  const int64_t rows = std::clamp<int64_t>((kMadeBytes / row - whole.kernel_height) / whole.stride_height, 1, whole.out_height);
  const int64_t units = (whole.out_height + rows - 1) / rows, most = (rows - 1) * whole.stride_height + whole.kernel_height;
  at::parallel_for(0, z.size(0) * units, 1, [&](int64_t first, int64_t last) {
    MaxPool d = whole;
    Rows made(most, row, source.granularity() * pixel_bytes);
    for (int64_t u = first; u < last; ++u) {
      const int64_t n = u / units, begin = u % units * rows, end = std::min(d.out_height, begin + rows);
      const int64_t h = std::max<int64_t>(0, begin * d.stride_height - d.padding_height);
      const int64_t h_end = std::min(d.height, (end - 1) * d.stride_height - d.padding_height + d.kernel_height);
      const int64_t pixel = (n * d.height + h) * d.width;
      source.write_from(pixel, (n * d.height + h_end) * d.width, d.channels, made.first());
      d.y = made.first() - pixel * pixel_bytes;
      run(d, n * d.out_height + begin, n * d.out_height + end);
    }
  });
  return {to.p, to.places};
}

// dy of max_pool_backward, without its memory.
MaxPool backward_arguments(const Tensor& dp, const Tensor& places, at::IntArrayRef sizes, at::IntArrayRef kernel,
                           at::IntArrayRef stride, at::IntArrayRef padding) {
  MaxPool d = arguments(sizes, dp.sizes().slice(2), kernel, stride, padding);
  d.dp = dp.const_data_ptr();
  d.places = const_cast<uint8_t*>(places.const_data_ptr<uint8_t>());
  return d;
}

void check_pooled(const Tensor& dp, const Tensor& places, at::IntArrayRef input_size) {
  TORCH_CHECK(dp.dim() == 4 && input_size.size() == 2 && places.sizes() == dp.sizes() && places.scalar_type() == at::kByte,
              "bnfast: dp is of shape ", dp.sizes(), ", places ", places.scalar_type(), " ", places.sizes(),
              " and input_size ", input_size, "; [N, C, OH, OW], uint8 of the same shape and (H, W) are needed");
}

Tensor max_pool_backward(const Tensor& dp_in, const Tensor& places_in, at::IntArrayRef input_size, at::IntArrayRef kernel,
                         at::IntArrayRef stride, at::IntArrayRef padding) {
  const PoolScope pooled;
  check_pooled(dp_in, places_in, input_size);
  const Tensor dp = dp_in.contiguous(at::MemoryFormat::ChannelsLast), places = places_in.contiguous(at::MemoryFormat::ChannelsLast);
  Tensor dy = at::empty({dp.size(0), dp.size(1), input_size[0], input_size[1]},
                        dp.options().memory_format(at::MemoryFormat::ChannelsLast));
  MaxPool d = backward_arguments(dp, places, dy.sizes(), kernel, stride, padding);
  d.dy = dy.mutable_data_ptr();
  if (dy.numel() > 0) for_rows(dy.size(0) * d.height, d.width * d.channels, d, kernels_for(dp).backward_rows);
  return dy;
}

std::tuple<Tensor, Tensor> max_pool_backward_bn_bwd_reduce(
    const Tensor& dp_in, const Tensor& places_in, const Tensor& z_in, const Tensor& mean, const Tensor& rstd, const OptionalTensor& gamma,
    const OptionalTensor& beta, c10::string_view act, double slope, at::IntArrayRef kernel, at::IntArrayRef stride,
    at::IntArrayRef padding) {
  const PoolScope pooled;
  TORCH_CHECK(z_in.dim() == 4 && dp_in.dim() == 4 && dp_in.scalar_type() == z_in.scalar_type() &&
                  dp_in.sizes().slice(0, 2) == z_in.sizes().slice(0, 2),
              "bnfast: dp is ", dp_in.scalar_type(), " ", dp_in.sizes(), " and z ", z_in.scalar_type(), " ", z_in.sizes(),
              "; N, C and the dtype must be the same");
  check_pooled(dp_in, places_in, z_in.sizes().slice(2));
  const Tensor dp = dp_in.contiguous(at::MemoryFormat::ChannelsLast), places = places_in.contiguous(at::MemoryFormat::ChannelsLast);
  const Tensor z = z_in.contiguous(at::MemoryFormat::ChannelsLast);
  MaxPool whole = backward_arguments(dp, places, z.sizes(), kernel, stride, padding);
  whole.y = z.const_data_ptr();
  const auto pick = kernels_for(dp).pick;
  const int64_t pixel_bytes = whole.channels * z.element_size();
  // Grows to what a unit needs, once per thread.
  std::vector<std::unique_ptr<Rows>> made(at::get_num_threads());
  // An element that several windows have in common gets the sum of their gradients: it may as well be counted for each.
  return bn_bwd_reduce_of(dp, mean, rstd, gamma, beta, act, slope, [&](int64_t begin, int64_t end) -> const void* {
    auto& own = made[at::get_thread_num()];
    if (!own || own->count() < end - begin) own = std::make_unique<Rows>(end - begin, pixel_bytes, 0);
    MaxPool d = whole;
    d.p = own->first() - begin * pixel_bytes;
    pick(d, begin, end);
    return own->first();
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(bnfast, CPU, m) {
  m.impl("bn_fwd_apply_max_pool", &bn_fwd_apply_max_pool);
  m.impl("max_pool", &max_pool);
  m.impl("max_pool_backward_bn_bwd_reduce", &max_pool_backward_bn_bwd_reduce);
  m.impl("max_pool_backward", &max_pool_backward);
}

}  // namespace bnfast
