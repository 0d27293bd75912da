// What the operators of all devices do with their arguments before they compute: names, layouts, checks.
#pragma once

#include <ATen/ATen.h>
#include <ATen/MemoryOverlap.h>

#include "activation.h"

namespace bnfast {

using OptionalTensor = std::optional<at::Tensor>;

inline Act act_of(c10::string_view name) {
  if (name == "identity") return Act::kIdentity;
  if (name == "relu") return Act::kRelu;
  if (name == "relu6") return Act::kRelu6;
  if (name == "leaky_relu") return Act::kLeakyRelu;
  if (name == "silu") return Act::kSilu;
  if (name == "hardswish") return Act::kHardswish;
  TORCH_CHECK(false, "bnfast: act is '", name, "'; identity, relu, relu6, leaky_relu, silu and hardswish are allowed");
}

// z dense in one of the two layouts, without a copy where it is already.
inline at::Tensor dense(const at::Tensor& z) {
  if (z.is_contiguous()) return z;
  if (z.dim() == 4) return z.contiguous(z.suggest_memory_format());
  if (z.dim() == 5 && z.is_contiguous(at::MemoryFormat::ChannelsLast3d)) return z;
  return z.contiguous();
}

inline at::ScalarType accumulator(const at::Tensor& z) { return z.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

inline void check_z(const at::Tensor& z) {
  TORCH_CHECK(z.dim() >= 2, "bnfast: z is of shape ", z.sizes(), "; it must be [N, C, ...]");
}

inline void check_like(const at::Tensor& t, const at::Tensor& z, const char* name) {
  TORCH_CHECK(t.sizes() == z.sizes() && t.scalar_type() == z.scalar_type(), "bnfast: ", name, " is ", t.scalar_type(), " ",
              t.sizes(), "; it must be ", z.scalar_type(), " ", z.sizes(), " as z is");
}

inline void check_vector(const OptionalTensor& t, const at::Tensor& z, const char* name) {
  TORCH_CHECK(!t || (t->dim() == 1 && t->size(0) == z.size(1)), "bnfast: ", name, " is of shape ", t->sizes(),
              "; it must hold one value per channel, [", z.size(1), "]");
}

inline void check_running(const at::Tensor& z, const OptionalTensor& running_mean, const OptionalTensor& running_var,
                          const OptionalTensor& num_batches_tracked, std::optional<double> momentum) {
  check_z(z);
  check_vector(running_mean, z, "running_mean");
  check_vector(running_var, z, "running_var");
  TORCH_CHECK(momentum || num_batches_tracked || !(running_mean || running_var),
              "bnfast: momentum is None; that needs num_batches_tracked");
}

inline void check_both(const OptionalTensor& dgamma, const OptionalTensor& dbeta) {
  TORCH_CHECK(dgamma.has_value() == dbeta.has_value(),
              "bnfast: dgamma and dbeta must both be given (batch statistics) or both be None (constant statistics)");
}

// Whether dy may be overwritten while z and the residual are read.
inline void check_writable(const at::Tensor& dy, const at::Tensor& z, const OptionalTensor& residual) {
  at::assert_no_internal_overlap(dy);
  at::assert_no_overlap(dy, z);
  if (residual) at::assert_no_overlap(dy, *residual);
}

}  // namespace bnfast
