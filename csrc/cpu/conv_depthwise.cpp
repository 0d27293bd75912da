// The depthwise data gradient as an operator.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "capability_table.h"
#include "pool.h"

namespace bnfast {
namespace {

constexpr int64_t kUnit = 32768;   // elements of dx of one unit of work

at::Tensor depthwise_dgrad(const at::Tensor& dz_in, const at::Tensor& taps, at::IntArrayRef input_size, at::IntArrayRef stride,
                           at::IntArrayRef padding, at::IntArrayRef dilation) {
  const PoolScope pooled;
  TORCH_CHECK(dz_in.dim() == 4 && taps.dim() == 3 && taps.size(2) == dz_in.size(1) && taps.is_contiguous(),
              "bnfast: dz is of shape ", dz_in.sizes(), " and taps ", taps.sizes(), "; [N, C, OH, OW] and [KH, KW, C] are needed");
  TORCH_CHECK(taps.size(0) * taps.size(1) <= 64, "bnfast: the kernel has ", taps.size(0) * taps.size(1), " taps; at most 64");
  const at::Tensor dz = dz_in.contiguous(at::MemoryFormat::ChannelsLast);
  const auto acc = dz.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  TORCH_CHECK(taps.scalar_type() == acc, "bnfast: taps are ", taps.scalar_type(), "; ", acc, " is needed");
  at::Tensor dx = at::empty({dz.size(0), dz.size(1), input_size[0], input_size[1]},
                            dz.options().memory_format(at::MemoryFormat::ChannelsLast));
  if (dx.numel() == 0) return dx;
  const DepthwiseDgrad d = {dz.const_data_ptr(), taps.const_data_ptr(), dx.mutable_data_ptr(),
                            dz.size(1), input_size[0], input_size[1], dz.size(2), dz.size(3), taps.size(0), taps.size(1),
                            stride[0], stride[1], padding[0], padding[1], dilation[0], dilation[1]};
  const auto run = cpu_capability().depthwise[static_cast<int>(dtype_of(dz))].dgrad_rows;
  const int64_t rows = dz.size(0) * d.height;
  const int64_t per_unit = std::max<int64_t>(1, kUnit / (d.width * d.channels));
  at::parallel_for(0, (rows + per_unit - 1) / per_unit, 1, [&](int64_t begin, int64_t end) {
    run(d, begin * per_unit, std::min(rows, end * per_unit));
  });
  return dx;
}

}  // namespace

TORCH_LIBRARY_IMPL(bnfast, CPU, m) { m.impl("depthwise_dgrad", &depthwise_dgrad); }

}  // namespace bnfast
