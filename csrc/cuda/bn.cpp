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

// Statistics of z, which is dense: memory, arguments, and what follows the launch.
struct Moments {
  Tensor mean, m2, rstd;
  OptionalTensor running_mean, running_var, tracked;
  Tensor own_mean, own_var;   // in one piece, as a kernel updates them
  FwdReduce arguments;

  Moments(Call& call, const Tensor& z, OptionalTensor running_mean_in, OptionalTensor running_var_in, OptionalTensor tracked_in,
          std::optional<double> momentum, double eps)
      : running_mean(std::move(running_mean_in)), running_var(std::move(running_var_in)), tracked(std::move(tracked_in)) {
    const auto options = z.options().dtype(accumulator(z)).memory_format(at::MemoryFormat::Contiguous);
    mean = at::empty({z.size(1)}, options);
    m2 = at::empty_like(mean);
    rstd = at::empty_like(mean);
    if (z.numel() == 0) {
      if (tracked) tracked->add_(1);
      mean.zero_();
      m2.zero_();
      rstd.fill_(eps > 0 ? 1 / std::sqrt(eps) : 0.0);
      return;
    }
    Device& device = call.device();
    const auto updated = [&](const OptionalTensor& t, Tensor& own, const char* name) -> ChannelVector {
      if (!t) return {};
      own = t->contiguous();
      return {device.updated(own, name), dtype_of(own, name)};
    };
    FwdReduce& a = arguments;
    a.view = view_of(z, {});
    a.split = Split(a.view, kReduceLoads, 1);
    a.dtype = dtype_of(z, "z");
    a.z = device.input(z, "z");
    a.workspace = call.workspace(a.view, a.split, FwdReduce::kValues);
    a.mean = device.output(mean, "mean");
    a.m2 = device.output(m2, "m2");
    a.rstd = device.output(rstd, "rstd");
    a.running_mean = updated(running_mean, own_mean, "running_mean");
    a.running_var = updated(running_var, own_var, "running_var");
    a.tracked = nullptr;
    if (tracked) {
      TORCH_CHECK(tracked->scalar_type() == at::kLong && tracked->numel() == 1, "bnfast: num_batches_tracked is ",
                  tracked->scalar_type(), " ", tracked->sizes(), "; it must hold one int64");
      a.tracked = static_cast<int64_t*>(device.updated(*tracked, "num_batches_tracked"));
    }
    a.averages = !momentum;
    a.momentum = momentum.value_or(0.0);
    a.eps = eps;
  }

  void finish() {
    for (const auto& [owner, own] : {std::pair(running_mean, own_mean), std::pair(running_var, own_var)}) {
      if (!owner) continue;
      if (own.is_same(*owner)) owner->unsafeGetTensorImpl()->bump_version();
      else owner->copy_(own);
    }
    if (tracked) tracked->unsafeGetTensorImpl()->bump_version();
  }
};

std::tuple<Tensor, Tensor, Tensor> bn_fwd_reduce(const Tensor& z_in, OptionalTensor running_mean, OptionalTensor running_var,
                                                 OptionalTensor num_batches_tracked, std::optional<double> momentum,
                                                 double eps) {
  check_running(z_in, running_mean, running_var, num_batches_tracked, momentum);
  dtype_of(z_in, "z");
  Call call(z_in);
  const Tensor z = dense(z_in);
  Moments m(call, z, running_mean, running_var, num_batches_tracked, momentum, eps);
  if (z.numel() != 0) {
    call.device().check(launch_bn_fwd_reduce(m.arguments, call.device().stream()), "bn_fwd_reduce");
    m.finish();
  }
  return {m.mean, m.m2, m.rstd};
}

// y and bits of z, which is dense: memory and arguments, but for the statistics.
struct Output {
  Tensor residual, y, bits;
  FwdApply arguments;

  Output(Call& call, const Tensor& z, const OptionalTensor& residual_in, c10::string_view act, double slope, bool want_bits) {
    FwdApply& a = arguments;
    a.dtype = dtype_of(z, "z");
    a.act = act_of(act);
    a.slope = slope;
    residual = like(defined_or_empty(residual_in), z);
    y = at::empty_like(z);
    a.view = view_of(z, {residual, y});
    bits = at::empty({want_bits ? a.view.bit_bytes() : 0}, z.options().dtype(at::kByte).memory_format(at::MemoryFormat::Contiguous));
    if (z.numel() == 0) return;
    Device& device = call.device();
    a.z = device.input(z, "z");
    a.residual = residual.defined() ? device.input(residual, "residual") : nullptr;
    a.y = device.output(y, "y");
    a.bits = want_bits ? static_cast<uint8_t*>(device.output(bits, "bits")) : nullptr;
  }
};

std::tuple<Tensor, Tensor> bn_fwd_apply(const Tensor& z_in, const Tensor& mean, const Tensor& rstd, OptionalTensor gamma,
                                        OptionalTensor beta, OptionalTensor residual, c10::string_view act, double slope,
                                        bool want_bits) {
  check_z(z_in);
  if (residual) check_like(*residual, z_in, "residual");
  Call call(z_in);
  const Tensor z = dense(z_in);
  Output out(call, z, residual, act, slope, want_bits);
  if (z.numel() != 0) {
    out.arguments.affine = call.affine(mean, rstd, gamma, beta);
    call.device().check(launch_bn_fwd_apply(out.arguments, call.device().stream()), "bn_fwd_apply");
  }
  return {out.y, out.bits};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_fwd_reduce_apply(const Tensor& z_in, OptionalTensor running_mean,
                                                               OptionalTensor running_var, OptionalTensor num_batches_tracked,
                                                               std::optional<double> momentum, double eps,
                                                               OptionalTensor gamma, OptionalTensor beta,
                                                               OptionalTensor residual, c10::string_view act, double slope,
                                                               bool want_bits) {
  check_running(z_in, running_mean, running_var, num_batches_tracked, momentum);
  if (residual) check_like(*residual, z_in, "residual");
  Call call(z_in);
  Device& device = call.device();
  const Tensor z = dense(z_in);
  Output out(call, z, residual, act, slope, want_bits);
  Moments m(call, z, running_mean, running_var, num_batches_tracked, momentum, eps);
  if (z.numel() == 0) return {m.mean, m.rstd, out.y, out.bits};
  if (m.arguments.split.on_chip && has_clusters()) {
    out.arguments.affine.gamma = call.vector(gamma, "gamma");
    out.arguments.affine.beta = call.vector(beta, "beta");
    device.check(launch_bn_fwd_reduce_apply({m.arguments, out.arguments}, device.stream()), "bn_fwd_reduce_apply");
  } else {
    device.check(launch_bn_fwd_reduce(m.arguments, device.stream()), "bn_fwd_reduce");
    out.arguments.affine = call.affine(m.mean, m.rstd, gamma, beta);
    device.check(launch_bn_fwd_apply(out.arguments, device.stream()), "bn_fwd_apply");
  }
  m.finish();
  return {m.mean, m.rstd, out.y, out.bits};
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

  void take(Call& call, const Tensor& mean, const Tensor& rstd, const OptionalTensor& gamma, const OptionalTensor& beta) {
    Device& device = call.device();
    const int64_t bytes = view_of(z, {}).bit_bytes();
    gradient.dy = device.input(dy, "dy");
    gradient.z = device.input(z, "z");
    gradient.residual = residual.defined() ? device.input(residual, "residual") : nullptr;
    gradient.bits = nullptr;
    if (bits) {
      TORCH_CHECK(bits->numel() == bytes && bits->is_contiguous(), "bnfast: bits holds ", bits->numel(), " bytes; ",
                  bytes, " belong to z of shape ", z.sizes());
      gradient.bits = static_cast<const uint8_t*>(device.input(*bits, "bits"));
    }
    gradient.affine = call.affine(mean, rstd, gamma, beta);
  }
};

// dgamma and dbeta: memory and arguments.
struct Sums {
  Tensor dgamma, dbeta;
  BwdReduce arguments;

  Sums(Call& call, const Backward& b) {
    const auto options = b.z.options().dtype(accumulator(b.z)).memory_format(at::MemoryFormat::Contiguous);
    dgamma = at::empty({b.z.size(1)}, options);
    dbeta = at::empty_like(dgamma);
    if (b.z.numel() == 0) {
      dgamma.zero_();
      dbeta.zero_();
      return;
    }
    BwdReduce& a = arguments;
    a.view = view_of(b.z, {b.dy, b.residual});
    a.split = Split(a.view, kBwdReduceLoads, 2);
    a.dtype = b.dtype;
    a.gradient = b.gradient;
    a.workspace = call.workspace(a.view, a.split, BwdReduce::kValues);
    a.dgamma = call.device().output(dgamma, "dgamma");
    a.dbeta = call.device().output(dbeta, "dbeta");
  }
};

// dz, which may be b.dy itself, and dresidual: memory and arguments, but for dgamma and dbeta.
struct InputGradient {
  Tensor dz, dresidual;
  BwdApply arguments;

  InputGradient(Call& call, const Backward& b, const Tensor& dz_in, bool want_dresidual) : dz(dz_in) {
    dresidual = want_dresidual ? at::empty_like(b.z) : at::empty({0}, b.z.options().memory_format(at::MemoryFormat::Contiguous));
    if (b.z.numel() == 0) return;
    BwdApply& a = arguments;
    a.view = view_of(b.z, {b.dy, b.residual, dz, want_dresidual ? dresidual : Tensor()});
    a.dtype = b.dtype;
    a.gradient = b.gradient;
    a.dgamma = a.dbeta = nullptr;
    a.dz = dz.is_same(b.dy) ? call.device().updated(dz, "dy") : call.device().output(dz, "dz");
    a.dresidual = want_dresidual ? call.device().output(dresidual, "dresidual") : nullptr;
  }
};

std::tuple<Tensor, Tensor> reduce(Backward& b, const Tensor& mean, const Tensor& rstd, const OptionalTensor& gamma,
                                  const OptionalTensor& beta) {
  Call call(b.z);
  if (b.z.numel() != 0) b.take(call, mean, rstd, gamma, beta);
  Sums sums(call, b);
  if (b.z.numel() != 0) call.device().check(launch_bn_bwd_reduce(sums.arguments, call.device().stream()), "bn_bwd_reduce");
  return {sums.dgamma, sums.dbeta};
}

// dz may be b.dy itself. Returns dresidual.
Tensor apply(Backward& b, const Tensor& dz, const Tensor& mean, const Tensor& rstd, const OptionalTensor& gamma,
             const OptionalTensor& beta, const OptionalTensor& dgamma, const OptionalTensor& dbeta, bool want_dresidual) {
  Call call(b.z);
  if (b.z.numel() != 0) b.take(call, mean, rstd, gamma, beta);
  InputGradient found(call, b, dz, want_dresidual);
  if (b.z.numel() == 0) return found.dresidual;
  found.arguments.dgamma = call.values(dgamma, "dgamma");
  found.arguments.dbeta = call.values(dbeta, "dbeta");
  call.device().check(launch_bn_bwd_apply(found.arguments, call.device().stream()), "bn_bwd_apply");
  return found.dresidual;
}

// Both. dz may be b.dy itself. Returns dgamma, dbeta, dresidual.
std::tuple<Tensor, Tensor, Tensor> reduce_and_apply(Backward& b, const Tensor& dz, const Tensor& mean, const Tensor& rstd,
                                                    const OptionalTensor& gamma, const OptionalTensor& beta, bool want_dresidual) {
  Call call(b.z);
  Device& device = call.device();
  if (b.z.numel() != 0) b.take(call, mean, rstd, gamma, beta);
  Sums sums(call, b);
  InputGradient found(call, b, dz, want_dresidual);
  if (b.z.numel() == 0) return {sums.dgamma, sums.dbeta, found.dresidual};
  if (sums.arguments.split.on_chip && has_clusters()) {
    device.check(launch_bn_bwd_reduce_apply({sums.arguments, found.arguments}, device.stream()), "bn_bwd_reduce_apply");
  } else {
    device.check(launch_bn_bwd_reduce(sums.arguments, device.stream()), "bn_bwd_reduce");
    found.arguments.dgamma = sums.arguments.dgamma;
    found.arguments.dbeta = sums.arguments.dbeta;
    device.check(launch_bn_bwd_apply(found.arguments, device.stream()), "bn_bwd_apply");
  }
  return {sums.dgamma, sums.dbeta, found.dresidual};
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
  Tensor dz = at::empty_like(b.z);
  const auto [dgamma, dbeta, dresidual] = reduce_and_apply(b, dz, mean, rstd, gamma, beta, want_dresidual);
  return {dgamma, dbeta, dz, dresidual};
}

std::tuple<Tensor, Tensor, Tensor> bn_bwd_reduce_apply_(Tensor& dy, const Tensor& z, const Tensor& mean, const Tensor& rstd,
                                                        OptionalTensor gamma, OptionalTensor beta, OptionalTensor residual,
                                                        OptionalTensor bits, c10::string_view act, double slope,
                                                        bool want_dresidual) {
  check_writable(dy, z, residual);
  Backward b(dy, z, residual, bits, act, slope);
  const auto [dgamma, dbeta, dresidual] = reduce_and_apply(b, b.dy, mean, rstd, gamma, beta, want_dresidual);
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
