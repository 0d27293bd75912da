// The operators' schemas, and the few functions that are no operators. Implementations register in their own files.
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include "cpu/capability.h"
#include "cpu/pool.h"
#include "cpu/weights.h"
#include "recording.h"

TORCH_LIBRARY(bnfast, m) {
  m.def(
      "bn_fwd_reduce(Tensor z, Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, "
      "float? momentum, float eps) -> (Tensor mean, Tensor m2, Tensor rstd)");
  m.def(
      "bn_fwd_apply(Tensor z, Tensor mean, Tensor rstd, Tensor? gamma, Tensor? beta, Tensor? residual, str act, "
      "float slope, bool want_bits) -> (Tensor y, Tensor bits)");
  m.def(
      "bn_fwd_reduce_apply(Tensor z, Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, "
      "float? momentum, float eps, Tensor? gamma, Tensor? beta, Tensor? residual, str act, float slope, bool want_bits) "
      "-> (Tensor mean, Tensor rstd, Tensor y, Tensor bits)");
  m.def(
      "bn_bwd_reduce(Tensor dy, Tensor z, Tensor mean, Tensor rstd, Tensor? gamma, Tensor? beta, Tensor? residual, "
      "Tensor? bits, str act, float slope) -> (Tensor dgamma, Tensor dbeta)");
  m.def(
      "bn_bwd_apply(Tensor dy, Tensor z, Tensor mean, Tensor rstd, Tensor? gamma, Tensor? beta, Tensor? residual, "
      "Tensor? bits, Tensor? dgamma, Tensor? dbeta, str act, float slope, bool want_dresidual) "
      "-> (Tensor dz, Tensor dresidual)");
  m.def(
      "bn_bwd_apply_(Tensor(a!) dy, Tensor z, Tensor mean, Tensor rstd, Tensor? gamma, Tensor? beta, Tensor? residual, "
      "Tensor? bits, Tensor? dgamma, Tensor? dbeta, str act, float slope, bool want_dresidual) -> Tensor dresidual");
  m.def(
      "bn_bwd_reduce_apply(Tensor dy, Tensor z, Tensor mean, Tensor rstd, Tensor? gamma, Tensor? beta, Tensor? residual, "
      "Tensor? bits, str act, float slope, bool want_dresidual) -> (Tensor dgamma, Tensor dbeta, Tensor dz, Tensor dresidual)");
  m.def(
      "bn_bwd_reduce_apply_(Tensor(a!) dy, Tensor z, Tensor mean, Tensor rstd, Tensor? gamma, Tensor? beta, Tensor? residual, "
      "Tensor? bits, str act, float slope, bool want_dresidual) -> (Tensor dgamma, Tensor dbeta, Tensor dresidual)");
  m.def(
      "se_bwd_reduce(Tensor dy, Tensor z, Tensor? mean, Tensor? rstd, Tensor? gamma, Tensor? beta, str act, float slope) "
      "-> Tensor");
  m.def("se_fwd_reduce(Tensor z, Tensor mean, Tensor rstd, Tensor? gamma, Tensor? beta, str act, float slope) -> Tensor");
  m.def(
      "se_bwd_sums(Tensor dy, Tensor z, Tensor mean, Tensor rstd, Tensor? gamma, Tensor? beta, str act, float slope) -> Tensor");
  m.def("dot_conv(Tensor x, Tensor weights, Tensor? bias, SymInt out_channels, int[] stride, int[] padding, int[] dilation) -> Tensor");
  m.def(
      "dot_dgrad(Tensor dz, Tensor weights, SymInt in_channels, SymInt[] input_size, int[] stride, int[] padding, int[] dilation) "
      "-> Tensor");
  m.def(
      "dot_fwd_apply(Tensor x, Tensor mean, Tensor rstd, Tensor? gamma, Tensor? beta, Tensor? residual, str act, float slope, "
      "Tensor weights, Tensor? bias, SymInt out_channels, int[] stride, int[] padding, int[] dilation) -> Tensor");
  m.def(
      "dot_fwd_reduce(Tensor x, Tensor? mean, Tensor? rstd, Tensor? gamma, Tensor? beta, str act, float slope, "
      "Tensor weights, Tensor? bias, SymInt out_channels, int[] stride, int[] padding, int[] dilation, Tensor(a!)? running_mean, "
      "Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, float? momentum, float eps) "
      "-> (Tensor z, Tensor own_mean, Tensor own_rstd)");
  m.def(
      "dot_dgrad_reduce(Tensor dy, Tensor? z, Tensor? mean, Tensor? rstd, Tensor? gamma, Tensor? beta, Tensor? dgamma, "
      "Tensor? dbeta, str act, float slope, Tensor weights, SymInt in_channels, SymInt[] input_size, int[] stride, int[] padding, "
      "int[] dilation, Tensor? add, Tensor? z_below, Tensor? bits, "
      "Tensor? mean_below, Tensor? rstd_below, Tensor? gamma_below, Tensor? beta_below, str act_below, float slope_below, "
      "Tensor? z_beside, Tensor? mean_beside, Tensor? rstd_beside) "
      "-> (Tensor dx, Tensor dgamma_below, Tensor dbeta_below, Tensor dgamma_beside, Tensor dbeta_beside)");
  m.def("grouped_conv(Tensor x, Tensor taps, Tensor? bias, int[] stride, int[] padding, int[] dilation) -> Tensor");
  m.def(
      "grouped_fwd_apply(Tensor x, Tensor mean, Tensor rstd, Tensor? gamma, Tensor? beta, Tensor? residual, str act, "
      "float slope, Tensor taps, Tensor? bias, int[] stride, int[] padding, int[] dilation) -> Tensor");
  m.def(
      "grouped_fwd_reduce(Tensor x, Tensor? mean, Tensor? rstd, Tensor? gamma, Tensor? beta, str act, float slope, Tensor taps, "
      "Tensor? bias, int[] stride, int[] padding, int[] dilation, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
      "Tensor(c!)? num_batches_tracked, float? momentum, float eps) -> (Tensor z, Tensor own_mean, Tensor own_rstd)");
  m.def(
      "grouped_dgrad(Tensor dz, Tensor taps, SymInt[] input_size, int[] stride, int[] padding, int[] dilation) -> Tensor");
  m.def(
      "grouped_dgrad_reduce(Tensor dy, Tensor? z, Tensor? mean, Tensor? rstd, Tensor? gamma, Tensor? beta, Tensor? dgamma, "
      "Tensor? dbeta, str act, float slope, Tensor taps, SymInt[] input_size, int[] stride, int[] padding, int[] dilation, "
      "Tensor? add, Tensor? z_below, Tensor? bits, "
      "Tensor? mean_below, Tensor? rstd_below, Tensor? gamma_below, Tensor? beta_below, str act_below, float slope_below, "
      "Tensor? z_beside, Tensor? mean_beside, Tensor? rstd_beside, Tensor? gate=None, Tensor? shift=None) "
      "-> (Tensor dx, Tensor dgamma_below, Tensor dbeta_below, Tensor dgamma_beside, Tensor dbeta_beside)");
  m.def("max_pool(Tensor y, int[] kernel, int[] stride, int[] padding) -> (Tensor p, Tensor places)");
  m.def(
      "bn_fwd_apply_max_pool(Tensor z, Tensor mean, Tensor rstd, Tensor? gamma, Tensor? beta, str act, float slope, "
      "int[] kernel, int[] stride, int[] padding) -> (Tensor p, Tensor places)");
  m.def(
      "max_pool_backward_bn_bwd_reduce(Tensor dp, Tensor places, Tensor z, Tensor mean, Tensor rstd, Tensor? gamma, "
      "Tensor? beta, str act, float slope, int[] kernel, int[] stride, int[] padding) -> (Tensor dgamma, Tensor dbeta)");
  m.def(
      "max_pool_backward(Tensor dp, Tensor places, SymInt[] input_size, int[] kernel, int[] stride, int[] padding) -> Tensor");
  m.def("pointwise_conv(Tensor x, Tensor weights, Tensor? bias, SymInt out_channels) -> Tensor");
  m.def("pointwise_spread(Tensor read, SymInt[] input_size, int[] stride) -> Tensor");
  m.def(
      "pointwise_fwd_apply(Tensor x, Tensor mean, Tensor rstd, Tensor? gamma, Tensor? beta, Tensor? residual, str act, "
      "float slope, Tensor weights, Tensor? bias, SymInt out_channels) -> Tensor");
  m.def(
      "pointwise_fwd_reduce(Tensor x, Tensor? mean, Tensor? rstd, Tensor? gamma, Tensor? beta, str act, float slope, "
      "Tensor weights, Tensor? bias, SymInt out_channels, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
      "Tensor(c!)? num_batches_tracked, float? momentum, float eps, Tensor? gate=None) -> (Tensor z, Tensor own_mean, Tensor own_rstd)");
  m.def(
      "pointwise_bwd_reduce_apply_dgrad(Tensor dy, Tensor z, Tensor mean, Tensor rstd, Tensor? gamma, Tensor? beta, "
      "Tensor? residual, Tensor? bits, str act, float slope, bool want_dresidual, Tensor weights, SymInt in_channels) "
      "-> (Tensor dgamma, Tensor dbeta, Tensor dx, Tensor dresidual)");
  m.def(
      "pointwise_dgrad_reduce(Tensor dy, Tensor? z, Tensor? mean, Tensor? rstd, Tensor? gamma, Tensor? beta, Tensor? dgamma, "
      "Tensor? dbeta, str act, float slope, Tensor weights, SymInt in_channels, "
      "Tensor? add, Tensor? z_below, Tensor? bits, "
      "Tensor? mean_below, Tensor? rstd_below, Tensor? gamma_below, Tensor? beta_below, str act_below, float slope_below, "
      "Tensor? z_beside, Tensor? mean_beside, Tensor? rstd_beside) "
      "-> (Tensor dx, Tensor dgamma_below, Tensor dbeta_below, Tensor dgamma_beside, Tensor dbeta_beside)");
  m.def("blocked_conv(Tensor x, Tensor weights, Tensor? bias, SymInt out_channels, int[] kernel, int[] padding) -> Tensor");
  m.def(
      "blocked_fwd_reduce(Tensor x, Tensor weights, Tensor? bias, SymInt out_channels, int[] kernel, int[] padding, "
      "Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, float? momentum, float eps) "
      "-> (Tensor z, Tensor mean, Tensor rstd)");
  m.def("winograd_conv(Tensor x, Tensor weights, Tensor? bias, SymInt out_channels, int[] padding, int stride) -> Tensor");
  m.def(
      "winograd_dgrad(Tensor dy, Tensor weights, SymInt in_channels, SymInt[] input_size, int[] padding, int stride) -> Tensor");
  m.def(
      "winograd_fwd_apply(Tensor x, Tensor mean, Tensor rstd, Tensor? gamma, Tensor? beta, Tensor? residual, str act, "
      "float slope, Tensor weights, Tensor? bias, SymInt out_channels, int[] padding, int stride) -> Tensor");
  m.def(
      "winograd_fwd_reduce(Tensor x, Tensor? mean, Tensor? rstd, Tensor? gamma, Tensor? beta, str act, float slope, "
      "Tensor weights, Tensor? bias, SymInt out_channels, int[] padding, int stride, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
      "Tensor(c!)? num_batches_tracked, float? momentum, float eps) -> (Tensor z, Tensor own_mean, Tensor own_rstd)");
  m.def(
      "winograd_residual_fwd_reduce(Tensor x, Tensor mean, Tensor rstd, Tensor? gamma, Tensor? beta, Tensor residual, str act, "
      "float slope, bool want_bits, Tensor weights, Tensor? bias, SymInt out_channels, int[] padding, int stride, "
      "Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, float? momentum, float eps) "
      "-> (Tensor z, Tensor own_mean, Tensor own_rstd, Tensor y, Tensor bits)");
  m.def(
      "winograd_dgrad_reduce(Tensor dy, Tensor? z, Tensor? mean, Tensor? rstd, Tensor? gamma, Tensor? beta, Tensor? dgamma, "
      "Tensor? dbeta, str act, float slope, Tensor weights, SymInt in_channels, SymInt[] input_size, int[] padding, int stride, "
      "Tensor? add, Tensor? z_below, Tensor? bits, "
      "Tensor? mean_below, Tensor? rstd_below, Tensor? gamma_below, Tensor? beta_below, str act_below, float slope_below, "
      "Tensor? z_beside, Tensor? mean_beside, Tensor? rstd_beside) "
      "-> (Tensor dx, Tensor dgamma_below, Tensor dbeta_below, Tensor dgamma_beside, Tensor dbeta_beside)");
}

#ifdef BNFAST_CUDA_ARCHITECTURES
constexpr const char* kCudaArchitectures = BNFAST_CUDA_ARCHITECTURES;
#else
constexpr const char* kCudaArchitectures = "";
#endif

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of bnfast; importing it registers torch.ops.bnfast.*";
  m.def("cpu_capability", [] { return bnfast::cpu_capability().name; },
        "The instruction set that the kernels use here: baseline, avx2, avx512, avx512_bf16 or amx.");
  m.def("weight_checksum", &bnfast::weight_checksum, pybind11::arg("weight"),
        "A checksum of a CPU tensor over 1,024 to 4,096 evenly spaced elements.");
  m.def("enter_pool", &bnfast::PoolScope::enter,
        "From here on large CPU tensors that this thread makes come from the pool of activation buffers; scopes nest.");
  m.def("leave_pool", &bnfast::PoolScope::leave, "Ends what enter_pool began.");
  m.def("clear_pool", &bnfast::clear_pool, "Gives the pool's free buffers back to the operating system.");
  m.def("pool_stats", [] {
    const bnfast::PoolStats s = bnfast::pool_stats();
    pybind11::dict stats;
    stats["used"] = s.used;
    stats["free"] = s.free;
    stats["most_used"] = s.most_used;
    stats["hits"] = s.hits;
    stats["misses"] = s.misses;
    return stats;
  }, "Bytes of the pool in use, free, and the most that was in use at once; requests served from it and mapped anew.");
  bnfast::define_recording(m);
  m.def("cuda_architectures", [] { return kCudaArchitectures; },
        "What the CUDA kernels were compiled for, as in TORCH_CUDA_ARCH_LIST; empty where the build has none.");
  m.def("build_info", [] {
    pybind11::dict info;
    info["compiler"] = __VERSION__;
    info["torch"] = BNFAST_TORCH_VERSION;
    return info;
  }, "Compiler and PyTorch version that the extension was built with.");
}
