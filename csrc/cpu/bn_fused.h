// The BatchNorm phases for convolutions that run around them piece by piece, while a piece is in the cache (bn.cpp). float32 or bfloat16
// in channels_last: a pixel is C neighbouring elements, pixels are counted over n and the plane.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/FunctionRef.h>

#include <array>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "pixels.h"

namespace bnfast {

using OptionalTensor = std::optional<at::Tensor>;

// Units of work of a convolution behind which something is reduced: unit u is the pixels [borders[u], borders[u + 1]) of the result,
// each border a multiple of `group` pixels, which are a multiple of 16 elements.
struct PixelUnits {
  int64_t group;
  std::vector<int64_t> borders;
};

// bn_fwd_reduce of z, whose pixels [begin, end) are written by produce(unit, begin, end, upcoming, mean, m2) before they are reduced: each
// pixel once, by any thread. What it leaves in upcoming is fetched beside the reduction; or it returns true and has left the unit's moments in
// mean and m2, [group * C] each. Without units they are those of bn_fwd_reduce. Returns mean, rstd.
std::tuple<at::Tensor, at::Tensor> bn_fwd_reduce_behind(
    const at::Tensor& z, const PixelUnits* units,
    c10::function_ref<bool(int64_t unit, int64_t begin, int64_t end, Upcoming& upcoming, double* mean, double* m2)> produce,
    OptionalTensor running_mean, OptionalTensor running_var, OptionalTensor num_batches_tracked, std::optional<double> momentum,
    double eps);

// bn_fwd_apply without residual, as a convolution's input; times gate [N, C], where given, of squeeze and excitation (float32).
class Normalised final : public PixelSource {
 public:
  Normalised(const at::Tensor& z, const OptionalTensor& mean, const OptionalTensor& rstd, const OptionalTensor& gamma,
             const OptionalTensor& beta, c10::string_view act, double slope, const OptionalTensor& gate = {});
  ~Normalised();
  int64_t granularity() const override;
  int64_t element_bytes() const override;
  void write(int64_t begin, int64_t end, void* to) const override;
  const void* reads(int64_t begin) const override;
  const void* reads_too(int64_t) const override { return nullptr; }

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// bn_fwd_apply with a residual, as a convolution's input that others read too: y, and one bit per element where they are wanted.
class Kept final : public PixelSource {
 public:
  Kept(const at::Tensor& z, const at::Tensor& mean, const at::Tensor& rstd, const OptionalTensor& gamma, const OptionalTensor& beta,
       const at::Tensor& residual, c10::string_view act, double slope, bool want_bits);
  ~Kept();
  int64_t granularity() const override;
  int64_t element_bytes() const override;
  void write(int64_t begin, int64_t end, void* to) const override;
  const void* reads(int64_t begin) const override;
  const void* reads_too(int64_t begin) const override;
  void* kept() const override;
  void keep(int64_t begin, int64_t end) const override;
  void keep_all() const;
  const at::Tensor& y() const;
  const at::Tensor& bits() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// bn_fwd_apply of a convolution's result in its own memory, where the statistics are known before it.
class AppliedBehind {
 public:
  // Without units pixels are taken from any multiple of granularity() on, else from any border of a unit on.
  AppliedBehind(at::Tensor& y, const at::Tensor& mean, const at::Tensor& rstd, const OptionalTensor& gamma, const OptionalTensor& beta,
                const OptionalTensor& residual, c10::string_view act, double slope, const PixelUnits* units);
  ~AppliedBehind();
  int64_t granularity() const;                 // pixels
  std::array<const void*, 3> reads() const;   // the residual, if there is one
  void take(int64_t begin, int64_t end) const;
  void take_all() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// bn_bwd_apply without residual, as a data gradient's input: dz, once the sums dgamma and dbeta are known. With gate and shift [N, C]
// (float32) the gradient of the unit's output is dy * gate + shift.
class Dz final : public PixelSource {
 public:
  Dz(const at::Tensor& dy, const at::Tensor& z, const at::Tensor& mean, const at::Tensor& rstd, const OptionalTensor& gamma,
     const OptionalTensor& beta, const at::Tensor& dgamma, const at::Tensor& dbeta, c10::string_view act, double slope,
     const OptionalTensor& gate = {}, const OptionalTensor& shift = {});
  ~Dz();
  int64_t granularity() const override;
  int64_t element_bytes() const override;
  void write(int64_t begin, int64_t end, void* to) const override;
  const void* reads(int64_t begin) const override;
  const void* reads_too(int64_t begin) const override;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// What makes dz of dy comes together: all of it, or dy is dz.
inline void check_above(const OptionalTensor& z, const OptionalTensor& mean, const OptionalTensor& rstd, const OptionalTensor& dgamma,
                        const OptionalTensor& dbeta) {
  const bool given = z.has_value();
  TORCH_CHECK(mean.has_value() == given && rstd.has_value() == given && dgamma.has_value() == given && dbeta.has_value() == given,
              "bnfast: z, mean, rstd, dgamma and dbeta must all be given (dy of a unit) or all be None (dz)");
}

// bn_bwd_reduce, then consume(dz), which takes dz piece by piece; dresidual is complete when all pixels have been written.
// Returns dgamma, dbeta, dresidual.
std::tuple<at::Tensor, at::Tensor, at::Tensor> bn_bwd_before(
    const at::Tensor& dy, const at::Tensor& z, const at::Tensor& mean, const at::Tensor& rstd, OptionalTensor gamma,
    OptionalTensor beta, OptionalTensor residual, OptionalTensor bits, c10::string_view act, double slope, bool want_dresidual,
    c10::function_ref<void(const PixelSource&)> consume);

// bn_bwd_reduce of a z that is made while it is needed: make(begin, end) returns the pixels [begin, end) of what is like dy, which any
// thread may ask for once, and which it reads before it asks again. Returns dgamma, dbeta.
std::tuple<at::Tensor, at::Tensor> bn_bwd_reduce_of(const at::Tensor& dy, const at::Tensor& mean, const at::Tensor& rstd,
                                                    const OptionalTensor& gamma, const OptionalTensor& beta, c10::string_view act,
                                                    double slope,
                                                    c10::function_ref<const void*(int64_t begin, int64_t end)> make);

// A unit whose output's gradient a data gradient dx is, and the unit without activation that is its residual: Below and Beside of
// bnfast/reference.py, each absent without its z.
struct BelowUnit {
  OptionalTensor z, bits, mean, rstd, gamma, beta;
  c10::string_view act;
  double slope;
  OptionalTensor z_beside, mean_beside, rstd_beside;
};

// What follows a data gradient while it is in the cache: + add, db of the unit below where that has bits or a smooth activation, and its
// bn_bwd_reduce.
class BehindDgrad {
 public:
  // Without units they are those of bn_bwd_reduce.
  BehindDgrad(at::Tensor& dx, const OptionalTensor& add, const BelowUnit& below, const PixelUnits* units);
  ~BehindDgrad();
  int64_t units() const;
  int64_t begin(int64_t unit) const;   // pixels
  int64_t end(int64_t unit) const;
  std::array<const void*, 3> reads() const;   // what it reads beside dx, null where there is no such tensor
  int64_t granularity() const;         // pixels: what is taken begins at a multiple of it
  int64_t cycles(int64_t pixels) const;
  // Takes the pixels [first, last) of a unit, which have been written: the unit from its beginning to its end by one thread.
  void take(int64_t unit, int64_t first, int64_t last, Upcoming& upcoming) const;
  // dgamma and dbeta of the unit below and of the one beside it, empty where there is none; when all units have been taken.
  std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> sums() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace bnfast
