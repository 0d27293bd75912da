// The BatchNorm phases as operators for CUDA tensors: layouts, memory, and one launch per phase.
#include <cmath>
#include <deque>
#include <tuple>
#include <utility>

#include "../arguments.h"
#include "bn.h"

#include <device.h>   // of this folder; the emulator's comes first on its path

namespace bnfast::cuda {
namespace {

using at::Tensor;

DType dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case at::kFloat: return DType::kFloat;
    case at::kDouble: return DType::kDouble;
    case at::kBFloat16: return DType::kBFloat16;
    case at::kHalf: return DType::kHalf;
    default: break;
  }
  TORCH_CHECK(false, "bnfast: ", name, " is ", t.scalar_type(), "; float32, float64, bfloat16 and float16 are allowed");
}

bool is_aligned(const Tensor& t) { return !t.defined() || reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0; }

// How z, which is dense, lies in memory; the others have its strides.
View view_of(const Tensor& z, std::initializer_list<Tensor> others) {
  int64_t plane = 1;
  for (int64_t d = 2; d < z.dim(); ++d) plane *= z.size(d);
  const bool columns = plane == 1 || !z.is_contiguous();
  const int64_t width = 16 / z.element_size();
  bool wide = is_aligned(z) && !(columns && z.size(1) % width != 0);
  for (const Tensor& t : others) wide = wide && is_aligned(t);
  return View(columns, wide, static_cast<int>(z.element_size()), z.size(0), z.size(1), plane);
}

Tensor defined_or_empty(const OptionalTensor& t) { return t ? *t : Tensor(); }

// t with the strides of z, which is dense.
Tensor like(const Tensor& t, const Tensor& z) {
  if (!t.defined() || t.strides() == z.strides()) return t;
  return at::empty_like(z).copy_(t);
}

// Arguments of one call, and the tensors that own what their pointers point to.
class Call {
 public:
  explicit Call(const Tensor& z) : device_(z), z_(z) {}

  Device& device() { return device_; }

  ChannelVector vector(const OptionalTensor& t, const char* name) {
    check_vector(t, z_, name);
    if (!t) return {};
    const Tensor& kept = keep(t->contiguous());
    return {const_cast<void*>(device_.input(kept, name)), dtype_of(kept, name)};
  }
  // In the accumulator's dtype.
  const void* values(const OptionalTensor& t, const char* name) {
    check_vector(t, z_, name);
    if (!t) return nullptr;
    return device_.input(keep(t->to(accumulator(z_)).contiguous()), name);
  }
  Affine affine(const Tensor& mean, const Tensor& rstd, const OptionalTensor& gamma, const OptionalTensor& beta) {
    return {values(mean, "mean"), values(rstd, "rstd"), vector(gamma, "gamma"), vector(beta, "beta")};
  }
  // Uninitialised partial results of a reduction, and its counters.
  Workspace workspace(const View& v, const Split& split, int numbers) {
    const Tensor& parts = keep(at::empty({split.splits, numbers, v.channels}, z_.options().dtype(accumulator(z_))));
    return {device_.output(parts, "parts"), device_.counters(v.tiles + 1)};
  }

 private:
  const Tensor& keep(Tensor t) { return kept_.emplace_back(std::move(t)); }

  Device device_;
  Tensor z_;
  std::deque<Tensor> kept_;
};

// ---- forward ----------------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor> bn_fwd_reduce(const Tensor& z_in, OptionalTensor running_mean, OptionalTensor running_var,
                                                 OptionalTensor num_batches_tracked, std::optional<double> momentum,
                                                 double eps) {
  check_running(z_in, running_mean, running_var, num_batches_tracked, momentum);
  const DType dtype = dtype_of(z_in, "z");
  Call call(z_in);
  Device& device = call.device();
  const Tensor z = dense(z_in);
  const auto options = z.options().dtype(accumulator(z)).memory_format(at::MemoryFormat::Contiguous);
  Tensor mean = at::empty({z.size(1)}, options), m2 = at::empty_like(mean), rstd = at::empty_like(mean);
  if (z.numel() == 0) {
    if (num_batches_tracked) num_batches_tracked->add_(1);
    return {mean.zero_(), m2.zero_(), rstd.fill_(eps > 0 ? 1 / std::sqrt(eps) : 0.0)};
  }
  // A kernel updates what lies in one piece; the rest comes back by a copy.
  const auto in_one_piece = [](const OptionalTensor& t) { return t ? t->contiguous() : Tensor(); };
  const Tensor own_mean = in_one_piece(running_mean), own_var = in_one_piece(running_var);
  const auto updated = [&](const Tensor& t, const char* name) -> ChannelVector {
    if (!t.defined()) return {};
    return {device.updated(t, name), dtype_of(t, name)};
  };
  FwdReduce a;
  a.view = view_of(z, {});
  a.split = Split(a.view, kReduceLoads);
  a.dtype = dtype;
  a.z = device.input(z, "z");
  a.workspace = call.workspace(a.view, a.split, FwdReduce::kValues);
  a.mean = device.output(mean, "mean");
  a.m2 = device.output(m2, "m2");
  a.rstd = device.output(rstd, "rstd");
  a.running_mean = updated(own_mean, "running_mean");
  a.running_var = updated(own_var, "running_var");
  a.tracked = nullptr;
  if (num_batches_tracked) {
    TORCH_CHECK(num_batches_tracked->scalar_type() == at::kLong && num_batches_tracked->numel() == 1, "bnfast: num_batches_tracked is ",
                num_batches_tracked->scalar_type(), " ", num_batches_tracked->sizes(), "; it must hold one int64");
    a.tracked = static_cast<int64_t*>(device.updated(*num_batches_tracked, "num_batches_tracked"));
  }
  a.averages = !momentum;
  a.momentum = momentum.value_or(0.0);
  a.eps = eps;
  device.check(launch_bn_fwd_reduce(a, device.stream()), "bn_fwd_reduce");
  for (const auto& [owner, own] : {std::pair(running_mean, own_mean), std::pair(running_var, own_var)}) {
    if (!owner) continue;
    if (own.is_same(*owner)) owner->unsafeGetTensorImpl()->bump_version();
    else owner->copy_(own);
  }
  if (num_batches_tracked) num_batches_tracked->unsafeGetTensorImpl()->bump_version();
  return {mean, m2, rstd};
}

std::tuple<Tensor, Tensor> bn_fwd_apply(const Tensor& z_in, const Tensor& mean, const Tensor& rstd, OptionalTensor gamma,
                                        OptionalTensor beta, OptionalTensor residual_in, c10::string_view act, double slope,
                                        bool want_bits) {
  check_z(z_in);
  if (residual_in) check_like(*residual_in, z_in, "residual");
  FwdApply a;
  a.dtype = dtype_of(z_in, "z");
  a.act = act_of(act);
  a.slope = slope;
  Call call(z_in);
  Device& device = call.device();
  const Tensor z = dense(z_in), residual = like(defined_or_empty(residual_in), z);
  Tensor y = at::empty_like(z);
  a.view = view_of(z, {residual, y});
  Tensor bits = at::empty({want_bits ? a.view.bit_bytes() : 0}, z.options().dtype(at::kByte).memory_format(at::MemoryFormat::Contiguous));
  if (z.numel() == 0) return {y, bits};
  a.z = device.input(z, "z");
  a.residual = residual.defined() ? device.input(residual, "residual") : nullptr;
  a.y = device.output(y, "y");
  a.bits = want_bits ? static_cast<uint8_t*>(device.output(bits, "bits")) : nullptr;
  a.affine = call.affine(mean, rstd, gamma, beta);
  device.check(launch_bn_fwd_apply(a, device.stream()), "bn_fwd_apply");
  return {y, bits};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_fwd_reduce_apply(const Tensor& z_in, OptionalTensor running_mean,
                                                               OptionalTensor running_var, OptionalTensor num_batches_tracked,
                                                               std::optional<double> momentum, double eps,
                                                               OptionalTensor gamma, OptionalTensor beta,
                                                               OptionalTensor residual, c10::string_view act, double slope,
                                                               bool want_bits) {
  check_z(z_in);
  const Tensor z = dense(z_in);
  const auto [mean, m2, rstd] = bn_fwd_reduce(z, running_mean, running_var, num_batches_tracked, momentum, eps);
  const auto [y, bits] = bn_fwd_apply(z, mean, rstd, gamma, beta, residual, act, slope, want_bits);
  return {mean, rstd, y, bits};
}

// ---- backward ---------------------------------------------------------------------------------------------------------

// What both backward phases read: their arguments as dense tensors of the same strides.
struct Backward {
  Tensor dy, z, residual;
  OptionalTensor bits;
  DType dtype;
  Gradient gradient;

  Backward(const Tensor& dy_in, const Tensor& z_in, const OptionalTensor& residual_in, const OptionalTensor& bits,
           c10::string_view act, double slope)
      : bits(bits) {
    check_z(z_in);
    check_like(dy_in, z_in, "dy");
    if (residual_in) check_like(*residual_in, z_in, "residual");
    dtype = dtype_of(z_in, "z");
    gradient.act = act_of(act);
    gradient.slope = slope;
    TORCH_CHECK(!bits || (gradient.act != Act::kSilu && gradient.act != Act::kHardswish), "bnfast: bits is given; act '", act,
                "' needs the residual instead");
    z = dense(z_in);
    dy = like(dy_in, z);
    residual = bits ? Tensor() : like(defined_or_empty(residual_in), z);
    gradient.slope_from = bits ? Slope::kFromBits : residual.defined() ? Slope::kFromZAndResidual : Slope::kFromZ;
  }

  // dy's memory is given as input unless it is to be overwritten.
  void take(Call& call, const View& view, const Tensor& mean, const Tensor& rstd, const OptionalTensor& gamma,
            const OptionalTensor& beta, bool overwrites = false) {
    Device& device = call.device();
    gradient.dy = overwrites ? device.updated(dy, "dy") : device.input(dy, "dy");
    gradient.z = device.input(z, "z");
    gradient.residual = residual.defined() ? device.input(residual, "residual") : nullptr;
    gradient.bits = nullptr;
    if (bits) {
      TORCH_CHECK(bits->numel() == view.bit_bytes() && bits->is_contiguous(), "bnfast: bits holds ", bits->numel(), " bytes; ",
                  view.bit_bytes(), " belong to z of shape ", z.sizes());
      gradient.bits = static_cast<const uint8_t*>(device.input(*bits, "bits"));
    }
    gradient.affine = call.affine(mean, rstd, gamma, beta);
  }
};

std::tuple<Tensor, Tensor> reduce(Backward& b, const Tensor& mean, const Tensor& rstd, const OptionalTensor& gamma,
                                  const OptionalTensor& beta) {
  Call call(b.z);
  Device& device = call.device();
  const auto options = b.z.options().dtype(accumulator(b.z)).memory_format(at::MemoryFormat::Contiguous);
  Tensor dgamma = at::empty({b.z.size(1)}, options), dbeta = at::empty_like(dgamma);
  if (b.z.numel() == 0) return {dgamma.zero_(), dbeta.zero_()};
  BwdReduce a;
  a.view = view_of(b.z, {b.dy, b.residual});
  a.split = Split(a.view, kBwdReduceLoads);
  a.dtype = b.dtype;
  b.take(call, a.view, mean, rstd, gamma, beta);
  a.gradient = b.gradient;
  a.workspace = call.workspace(a.view, a.split, BwdReduce::kValues);
  a.dgamma = device.output(dgamma, "dgamma");
  a.dbeta = device.output(dbeta, "dbeta");
  device.check(launch_bn_bwd_reduce(a, device.stream()), "bn_bwd_reduce");
  return {dgamma, dbeta};
}

// dz may be b.dy itself. Returns dresidual.
Tensor apply(Backward& b, Tensor& dz, const Tensor& mean, const Tensor& rstd, const OptionalTensor& gamma,
             const OptionalTensor& beta, const OptionalTensor& dgamma, const OptionalTensor& dbeta, bool want_dresidual) {
  Call call(b.z);
  Device& device = call.device();
  Tensor dresidual = want_dresidual ? at::empty_like(b.z) : at::empty({0}, b.z.options().memory_format(at::MemoryFormat::Contiguous));
  if (b.z.numel() == 0) return dresidual;
  const bool overwrites = dz.is_same(b.dy);
  BwdApply a;
  a.view = view_of(b.z, {b.dy, b.residual, dz, want_dresidual ? dresidual : Tensor()});
  a.dtype = b.dtype;
  b.take(call, a.view, mean, rstd, gamma, beta, overwrites);
  a.gradient = b.gradient;
  a.dgamma = call.values(dgamma, "dgamma");
  a.dbeta = call.values(dbeta, "dbeta");
  a.dz = overwrites ? const_cast<void*>(a.gradient.dy) : device.output(dz, "dz");
  a.dresidual = want_dresidual ? device.output(dresidual, "dresidual") : nullptr;
  device.check(launch_bn_bwd_apply(a, device.stream()), "bn_bwd_apply");
  return dresidual;
}

std::tuple<Tensor, Tensor> bn_bwd_reduce(const Tensor& dy, const Tensor& z, const Tensor& mean, const Tensor& rstd,
                                         OptionalTensor gamma, OptionalTensor beta, OptionalTensor residual,
                                         OptionalTensor bits, c10::string_view act, double slope) {
  Backward b(dy, z, residual, bits, act, slope);
  return reduce(b, mean, rstd, gamma, beta);
}

std::tuple<Tensor, Tensor> bn_bwd_apply(const Tensor& dy, const Tensor& z, const Tensor& mean, const Tensor& rstd,
                                        OptionalTensor gamma, OptionalTensor beta, OptionalTensor residual,
                                        OptionalTensor bits, OptionalTensor dgamma, OptionalTensor dbeta,
                                        c10::string_view act, double slope, bool want_dresidual) {
  check_both(dgamma, dbeta);
  Backward b(dy, z, residual, bits, act, slope);
  Tensor dz = at::empty_like(b.z);
  Tensor dresidual = apply(b, dz, mean, rstd, gamma, beta, dgamma, dbeta, want_dresidual);
  return {dz, dresidual};
}

Tensor bn_bwd_apply_(Tensor& dy, const Tensor& z, const Tensor& mean, const Tensor& rstd, OptionalTensor gamma,
                     OptionalTensor beta, OptionalTensor residual, OptionalTensor bits, OptionalTensor dgamma,
                     OptionalTensor dbeta, c10::string_view act, double slope, bool want_dresidual) {
  check_both(dgamma, dbeta);
  check_writable(dy, z, residual);
  Backward b(dy, z, residual, bits, act, slope);
  Tensor dresidual = apply(b, b.dy, mean, rstd, gamma, beta, dgamma, dbeta, want_dresidual);
  if (!b.dy.is_same(dy)) dy.copy_(b.dy);   // dy came in another layout
  return dresidual;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_bwd_reduce_apply(const Tensor& dy, const Tensor& z, const Tensor& mean,
                                                               const Tensor& rstd, OptionalTensor gamma, OptionalTensor beta,
                                                               OptionalTensor residual, OptionalTensor bits,
                                                               c10::string_view act, double slope, bool want_dresidual) {
  Backward b(dy, z, residual, bits, act, slope);
  const auto [dgamma, dbeta] = reduce(b, mean, rstd, gamma, beta);
  Tensor dz = at::empty_like(b.z);
  Tensor dresidual = apply(b, dz, mean, rstd, gamma, beta, dgamma, dbeta, want_dresidual);
  return {dgamma, dbeta, dz, dresidual};
}

std::tuple<Tensor, Tensor, Tensor> bn_bwd_reduce_apply_(Tensor& dy, const Tensor& z, const Tensor& mean, const Tensor& rstd,
                                                        OptionalTensor gamma, OptionalTensor beta, OptionalTensor residual,
                                                        OptionalTensor bits, c10::string_view act, double slope,
                                                        bool want_dresidual) {
  check_writable(dy, z, residual);
  Backward b(dy, z, residual, bits, act, slope);
  const auto [dgamma, dbeta] = reduce(b, mean, rstd, gamma, beta);
  Tensor dresidual = apply(b, b.dy, mean, rstd, gamma, beta, dgamma, dbeta, want_dresidual);
  if (!b.dy.is_same(dy)) dy.copy_(b.dy);   // dy came in another layout
  return {dgamma, dbeta, dresidual};
}

}  // namespace

BNFAST_CUDA_OPERATORS(m) {
  m.impl("bn_fwd_reduce", &bn_fwd_reduce);
  m.impl("bn_fwd_apply", &bn_fwd_apply);
  m.impl("bn_fwd_reduce_apply", &bn_fwd_reduce_apply);
  m.impl("bn_bwd_reduce", &bn_bwd_reduce);
  m.impl("bn_bwd_apply", &bn_bwd_apply);
  m.impl("bn_bwd_apply_", &bn_bwd_apply_);
  m.impl("bn_bwd_reduce_apply", &bn_bwd_reduce_apply);
  m.impl("bn_bwd_reduce_apply_", &bn_bwd_reduce_apply_);
}

}  // namespace bnfast::cuda
