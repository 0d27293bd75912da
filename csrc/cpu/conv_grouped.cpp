// Depthwise convolutions and those of narrow groups, and their data gradients, as operators: alone, and with the BatchNorm phases in front of them and behind them.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <vector>

#include "capability_table.h"
#include "conv_joined.h"
#include "pool.h"

namespace bnfast {
namespace {

using at::Tensor;

constexpr int64_t kUnitBytes = 384 << 10;   // of x and y, or twice y, that stay in the L2 cache
constexpr int64_t kFewestRows = 4;          // of an image in one unit
constexpr int64_t kPieceElements = 4096;    // of y behind which something elementwise follows, where its rows are narrower
constexpr int64_t kAlignment = 64;   // of scratch memory, in bytes

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A convolution cut into units of rows of an image. Every output is one sum in one order: how the work is cut changes no bit.
class Grouped {
 public:
  Tensor y;

  // x: of the input's sizes. output_size: of what is made of it.
  Grouped(const Tensor& x, const Tensor& taps, const OptionalTensor& bias, at::IntArrayRef output_size, at::IntArrayRef stride,
            at::IntArrayRef padding, at::IntArrayRef dilation, bool is_gradient)
      : taps_(taps) {
    const auto acc = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    TORCH_CHECK(x.dim() == 4 && taps.dim() == 4 && taps.size(3) == x.size(1) && taps.is_contiguous() && taps.scalar_type() == acc,
                "bnfast: x is of shape ", x.sizes(), " and taps ", taps.scalar_type(), " ", taps.sizes(), "; [N, C, H, W] and ", acc,
                " [KH, KW, C / groups, C] are needed");
    const bool is_wide = x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16;
    TORCH_CHECK(is_group_width(taps.size(2)) && x.size(1) % taps.size(2) == 0 && (taps.size(2) == 1 || is_wide), "bnfast: x is ",
                x.scalar_type(), " ", x.sizes(), " in groups of ", taps.size(2), " channels; 1, or of float32 and bfloat16 2, 4, 8 and 16, are "
                "allowed, which are to divide C");
    TORCH_CHECK(taps.size(0) * taps.size(1) <= kMostTaps, "bnfast: the kernel has ", taps.size(0) * taps.size(1),
                " taps; at most ", kMostTaps);
    TORCH_CHECK(output_size.size() == 2 && stride.size() == 2 && padding.size() == 2 && dilation.size() == 2 && stride[0] > 0 &&
                    stride[1] > 0 && dilation[0] > 0 && dilation[1] > 0,
                "bnfast: stride is ", stride, ", padding ", padding, " and dilation ", dilation, "; pairs are needed, and at least 1");
    const auto side = [&](int i) {
      return GroupedSide{x.size(2 + i), output_size[i], taps.size(i), stride[i], padding[i], dilation[i], is_gradient};
    };
    d_.down = side(0);
    d_.across = side(1);
    d_.channels = x.size(1);
    d_.width = taps.size(2);
    d_.taps = taps.const_data_ptr();
    if (bias) {
      TORCH_CHECK(bias->dim() == 1 && bias->size(0) == x.size(1), "bnfast: bias is of shape ", bias->sizes(), "; [", x.size(1),
                  "] is needed");
      bias_ = bias->to(acc).contiguous();
      d_.bias = bias_.const_data_ptr();
    }
    y = at::empty({x.size(0), x.size(1), output_size[0], output_size[1]}, x.options().memory_format(at::MemoryFormat::ChannelsLast));
    d_.y = y.mutable_data_ptr();
    rows_ = cpu_capability().grouped[static_cast<int>(dtype_of(x))].rows;
    find_runs();
    const int64_t height = std::max<int64_t>(1, d_.down.out);
    const int64_t places = d_.across.out + std::max(d_.across.out, d_.across.in * d_.down.in / height);
    const int64_t row = std::max<int64_t>(1, places * d_.channels * y.element_size());
    const int64_t most = std::clamp(kUnitBytes / row, std::min(kFewestRows, height), height);
    rows_per_unit_ = ceil_div(height, ceil_div(height, most));
    pieces_ = ceil_div(height, rows_per_unit_);
    units_ = y.size(0) * pieces_;
    threads_.resize(at::get_num_threads());
  }

  // One of the two, before anything is computed.
  void set_input(const Tensor& x) {
    x_ = x.contiguous(at::MemoryFormat::ChannelsLast);
    d_.x = x_.const_data_ptr();
  }
  void set_input(const PixelSource& source) {
    d_.source = &source;
    const int64_t pixels = d_.down.reach() * d_.across.in + source.granularity();
    bytes_ = ceil_div(pixels * d_.channels * source.element_bytes(), kAlignment) * kAlignment;
    scratch_ = at::empty({at::get_num_threads() * bytes_ + kAlignment}, at::kByte);
    auto* const memory = static_cast<char*>(scratch_.mutable_data_ptr());
    aligned_ = memory + (kAlignment - reinterpret_cast<uintptr_t>(memory) % kAlignment) % kAlignment;
  }

  std::optional<PixelUnits> pixels() const {
    return pixel_units(d_.channels, d_.across.out, units_, [&](int64_t u) { return row(u) * d_.across.out; });
  }
  // Tensors of y's shape that are read behind each unit; null ones are ignored.
  void set_behind(std::array<const void*, 3> tensors) { behind_ = tensors; }
  bool is_split() const { return false; }
  // Leaves in upcoming what the next unit needs and is to be fetched beside what follows, which takes so many cycles.
  void unit(int64_t u, int64_t cycles, Upcoming& upcoming) const { compute({row(u), row(u + 1)}, cycles, upcoming); }
  // Unit u piece by piece: take(first, last, upcoming) follows each, pixels of y, and takes cycles(pixels).
  template <class Cycles, class Take>
  void unit_in_pieces(int64_t u, Cycles cycles, Take take) const {
    const int64_t width = d_.across.out, step = std::max<int64_t>(1, kPieceElements / (width * d_.channels));
    for (int64_t begin = row(u); begin < row(u + 1); begin += step) {
      const RowRange rows = {begin, std::min(row(u + 1), begin + step)};
      Upcoming upcoming;
      compute(rows, cycles((rows.end - rows.begin) * width), upcoming);
      take(rows.begin * width, rows.end * width, upcoming);
    }
  }
  void all() const {
    at::parallel_for(0, units_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t u = begin; u < end; ++u) {
        Upcoming upcoming;
        unit(u, 0, upcoming);
      }
    });
  }

 private:
  // The first row of a unit, counted over the images.
  int64_t row(int64_t unit) const { return unit / pieces_ * d_.down.out + std::min(d_.down.out, unit % pieces_ * rows_per_unit_); }

  // Rows of y within one image, counted over the images; in upcoming is then what as many behind them need.
  void compute(RowRange rows, int64_t cycles, Upcoming& upcoming) const {
    const int thread = at::get_thread_num();
    Progress& own = threads_[thread];
    // Rows of x that were made for those before are there only for the next ones.
    if (own.next_row != rows.begin) own.made = {};
    own.next_row = rows.end;
    upcoming = needed({rows.end, std::min(rows.end + (rows.end - rows.begin), row(units_))});
    upcoming.spread(d_.cycles(rows.end - rows.begin), cycles);
    rows_(d_, rows.begin, rows.end, aligned_ + thread * bytes_, own.made, upcoming);
  }
  // Rows of x that these rows of y read and the ones before them have not.
  RowRange read_by(RowRange rows) const {
    const auto image = [&](int64_t r) { return r / d_.down.out * d_.down.in; };
    const int64_t first = rows.begin % d_.down.out, last = rows.end - 1;
    const int64_t begin = std::max(d_.down.first(first), first > 0 ? d_.down.last(first - 1) + 1 : 0);
    return {image(rows.begin) + begin, image(last) + d_.down.last(last % d_.down.out) + 1};
  }
  // What these rows read from memory and write.
  Upcoming needed(RowRange rows) const {
    Upcoming result;
    if (rows.begin == rows.end) return result;
    const RowRange read = read_by(rows);
    const auto add = [&](const void* tensor, RowRange of, int64_t width) {
      const int64_t bytes = width * d_.channels * y.element_size();
      if (tensor) result.add(static_cast<const char*>(tensor) + of.begin * bytes, (of.end - of.begin) * bytes);
    };
    add(d_.y, rows, d_.across.out);
    for (const void* tensor : behind_) add(tensor, rows, d_.across.out);
    add(d_.source ? d_.source->reads(0) : d_.x, read, d_.across.in);
    if (d_.source) add(d_.source->reads_too(0), read, d_.across.in);
    return result;
  }

  void find_runs() {
    const GroupedSide& across = d_.across;
    const int64_t phases = across.phases();
    for (int64_t phase = 0; phase < std::min(phases, across.out); ++phase) {
      for (int64_t w = phase; w < across.out; w += phases) {
        GroupedRun run = {w, 1, {}};
        for (int64_t k = 0; k < across.kernel; ++k) run.place[k] = static_cast<int32_t>(across.place(w, k));
        if (w > phase && continues(runs_.back(), run)) ++runs_.back().count;
        else runs_.push_back(run);
      }
    }
    d_.runs = runs_.data();
    d_.run_count = static_cast<int64_t>(runs_.size());
  }
  bool continues(const GroupedRun& run, const GroupedRun& next) const {
    for (int64_t k = 0; k < d_.across.kernel; ++k) {
      if ((run.place[k] < 0) != (next.place[k] < 0)) return false;
    }
    return true;
  }

  struct Progress {
    int64_t next_row = -1;
    MadeRows made;
  };

  GroupedConv d_ = {};
  void (*rows_)(const GroupedConv&, int64_t, int64_t, void*, MadeRows&, Upcoming&);
  std::array<const void*, 3> behind_ = {};
  mutable std::vector<Progress> threads_;
  std::vector<GroupedRun> runs_;
  Tensor x_, taps_, bias_, scratch_;
  char* aligned_ = nullptr;
  int64_t rows_per_unit_, pieces_, units_, bytes_ = 0;
};

std::vector<int64_t> output_size(const Tensor& x, const Tensor& taps, at::IntArrayRef stride, at::IntArrayRef padding,
                                 at::IntArrayRef dilation) {
  TORCH_CHECK(x.dim() == 4 && taps.dim() == 4 && stride.size() == 2 && padding.size() == 2 && dilation.size() == 2, "bnfast: x is of shape ",
              x.sizes(), ", taps ", taps.sizes(), ", stride ", stride, ", padding ", padding, " and dilation ", dilation,
              "; [N, C, H, W], [KH, KW, C / groups, C] and pairs are needed");
  std::vector<int64_t> sizes;
  for (int i = 0; i < 2; ++i) {
    const int64_t rest = x.size(2 + i) + 2 * padding[i] - dilation[i] * (taps.size(i) - 1) - 1;
    TORCH_CHECK(rest >= 0 && stride[i] > 0, "bnfast: x is of shape ", x.sizes(), " with padding ", padding, "; a kernel of ", taps.size(0),
                " x ", taps.size(1), " does not fit");
    sizes.push_back(rest / stride[i] + 1);
  }
  return sizes;
}

Tensor grouped_conv(const Tensor& x, const Tensor& taps, const OptionalTensor& bias, at::IntArrayRef stride, at::IntArrayRef padding,
                      at::IntArrayRef dilation) {
  const PoolScope pooled;
  Grouped conv(x, taps, bias, output_size(x, taps, stride, padding, dilation), stride, padding, dilation, false);
  conv.set_input(x);
  if (conv.y.numel() > 0) conv.all();
  return conv.y;
}

Tensor grouped_fwd_apply(const Tensor& x, const Tensor& mean, const Tensor& rstd, const OptionalTensor& gamma,
                           const OptionalTensor& beta, const OptionalTensor& residual, c10::string_view act, double slope,
                           const Tensor& taps, const OptionalTensor& bias, at::IntArrayRef stride, at::IntArrayRef padding,
                           at::IntArrayRef dilation) {
  const PoolScope pooled;
  Grouped conv(x, taps, bias, output_size(x, taps, stride, padding, dilation), stride, padding, dilation, false);
  conv.set_input(x);
  return applied_behind(conv, mean, rstd, gamma, beta, residual, act, slope);
}

std::tuple<Tensor, Tensor, Tensor> grouped_fwd_reduce(
    const Tensor& x, const OptionalTensor& mean, const OptionalTensor& rstd, const OptionalTensor& gamma, const OptionalTensor& beta,
    c10::string_view act, double slope, const Tensor& taps, const OptionalTensor& bias, at::IntArrayRef stride, at::IntArrayRef padding,
    at::IntArrayRef dilation, OptionalTensor running_mean, OptionalTensor running_var, OptionalTensor num_batches_tracked,
    std::optional<double> momentum, double eps) {
  const PoolScope pooled;
  Grouped conv(x, taps, bias, output_size(x, taps, stride, padding, dilation), stride, padding, dilation, false);
  std::optional<Normalised> source;
  if (mean) conv.set_input(source.emplace(x, mean, rstd, gamma, beta, act, slope));
  else conv.set_input(x);
  return reduced_behind(conv, running_mean, running_var, num_batches_tracked, momentum, eps);
}

Tensor grouped_dgrad(const Tensor& dz, const Tensor& taps, at::IntArrayRef input_size, at::IntArrayRef stride, at::IntArrayRef padding,
                       at::IntArrayRef dilation) {
  const PoolScope pooled;
  Grouped conv(dz, taps, std::nullopt, input_size, stride, padding, dilation, true);
  conv.set_input(dz);
  if (conv.y.numel() > 0) conv.all();
  return conv.y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> grouped_dgrad_reduce(
    const Tensor& dy, const OptionalTensor& z, const OptionalTensor& mean, const OptionalTensor& rstd, const OptionalTensor& gamma,
    const OptionalTensor& beta, const OptionalTensor& dgamma, const OptionalTensor& dbeta, c10::string_view act, double slope,
    const Tensor& taps, at::IntArrayRef input_size, at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
    const OptionalTensor& add, const OptionalTensor& z_below, const OptionalTensor& bits, const OptionalTensor& mean_below,
    const OptionalTensor& rstd_below, const OptionalTensor& gamma_below, const OptionalTensor& beta_below, c10::string_view act_below,
    double slope_below, const OptionalTensor& z_beside, const OptionalTensor& mean_beside, const OptionalTensor& rstd_beside,
    const OptionalTensor& gate, const OptionalTensor& shift) {
  const PoolScope pooled;
  Grouped conv(dy, taps, std::nullopt, input_size, stride, padding, dilation, true);
  check_above(z, mean, rstd, dgamma, dbeta);
  std::optional<Dz> source;
  TORCH_CHECK(z.has_value() || !gate.has_value(), "bnfast: gate is given without z");
  if (z) conv.set_input(source.emplace(dy, *z, *mean, *rstd, gamma, beta, *dgamma, *dbeta, act, slope, gate, shift));
  else conv.set_input(dy);
  return dgrad_reduced_behind(conv, add, {z_below, bits, mean_below, rstd_below, gamma_below, beta_below, act_below, slope_below,
                                          z_beside, mean_beside, rstd_beside});
}

}  // namespace

TORCH_LIBRARY_IMPL(bnfast, CPU, m) {
  m.impl("grouped_conv", &grouped_conv);
  m.impl("grouped_fwd_apply", &grouped_fwd_apply);
  m.impl("grouped_fwd_reduce", &grouped_fwd_reduce);
  m.impl("grouped_dgrad", &grouped_dgrad);
  m.impl("grouped_dgrad_reduce", &grouped_dgrad_reduce);
}

}  // namespace bnfast
