// The BatchNorm phases for convolutions that run around them piece by piece, while a piece is in the cache (bn.cpp). float32 in
// channels_last: a pixel is C neighbouring elements, pixels are counted over n and the plane.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/FunctionRef.h>

#include <optional>
#include <tuple>

namespace bnfast {

using OptionalTensor = std::optional<at::Tensor>;

// bn_fwd_reduce_apply of z, whose pixels [begin, end) are written by produce(begin, end) before they are reduced: each pixel
// once, by any thread.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> bn_fwd_behind(
    const at::Tensor& z, c10::function_ref<void(int64_t begin, int64_t end)> produce, OptionalTensor running_mean,
    OptionalTensor running_var, OptionalTensor num_batches_tracked, std::optional<double> momentum, double eps,
    OptionalTensor gamma, OptionalTensor beta, OptionalTensor residual, c10::string_view act, double slope, bool want_bits);

// dz of bn_bwd_reduce_apply, once the sums are known.
class DzRows {
 public:
  virtual int64_t granularity() const = 0;   // pixels: begin is a multiple of it
  // dz of the pixels [begin, end) into `to`, and their dresidual where it is wanted.
  virtual void write(int64_t begin, int64_t end, float* to) const = 0;
  // What write(begin, ...) reads, from its first element on.
  virtual const float* dy(int64_t begin) const = 0;
  virtual const float* z(int64_t begin) const = 0;

 protected:
  ~DzRows() = default;
};

// bn_bwd_reduce, then consume(dz), which takes dz piece by piece; dresidual is complete when all pixels have been written.
// Returns dgamma, dbeta, dresidual.
std::tuple<at::Tensor, at::Tensor, at::Tensor> bn_bwd_before(
    const at::Tensor& dy, const at::Tensor& z, const at::Tensor& mean, const at::Tensor& rstd, OptionalTensor gamma,
    OptionalTensor beta, OptionalTensor residual, OptionalTensor bits, c10::string_view act, double slope, bool want_dresidual,
    c10::function_ref<void(const DzRows&)> consume);

}  // namespace bnfast
