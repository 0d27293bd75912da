// Convolutions of bfloat16 as products of bfloat16 matrices, as operators: alone, and with the BatchNorm phases in front of them and
// behind them.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <vector>

#include "capability_table.h"
#include "conv_joined.h"
#include "pool.h"

namespace bnfast {
namespace {

using at::Tensor;

constexpr int64_t kUnitBytes = 512 << 10;     // of what a unit reads and writes, which stays in the L2 cache beside the weights
constexpr int64_t kUnits = 16;                // at least, where there is work for so many ...
constexpr int64_t kUnitsOfManyWeights = 4;    // ... or for so many, where each reads more weights than stay in the cache
constexpr int64_t kWeightsNear = 1 << 20;     // bytes of weights that do
constexpr int64_t kLeastWork = 1 << 15;       // elements of a unit that is worth starting
constexpr int64_t kFlatRow = 16;              // pixels of a row, where rows are any
constexpr int64_t kAlign = 32;                // elements of a cache line
constexpr int kMostRuns = 6;                  // that are fetched for a unit

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t whole_lines(int64_t elements) { return ceil_div(elements, kAlign) * kAlign; }

// Outputs along one side of a convolution of `in` places.
int64_t outputs_of(int64_t in, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
  const int64_t rest = in + 2 * padding - dilation * (kernel - 1) - 1;
  return rest < 0 ? 0 : rest / stride + 1;
}

struct Geometry {
  DotSide down, across;

  // Of x [N, C, H, W] to its output, or of dy, whose gradient is of input_size.
  Geometry(const Tensor& x, const Tensor& weights, at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
           const at::IntArrayRef* input_size) {
    TORCH_CHECK(x.dim() == 4 && x.scalar_type() == at::kBFloat16, "bnfast: x is ", x.scalar_type(), " ", x.sizes(),
                "; bfloat16 [N, C, H, W] is needed");
    TORCH_CHECK(weights.dim() == 6, "bnfast: weights are of shape ", weights.sizes(), "; [K / 16, KH, KW, C / 2, 16, 2] is needed");
    TORCH_CHECK(stride.size() == 2 && padding.size() == 2 && dilation.size() == 2 && stride[0] > 0 && stride[1] > 0 && padding[0] >= 0 &&
                    padding[1] >= 0 && dilation[0] > 0 && dilation[1] > 0,
                "bnfast: stride is ", stride, ", padding ", padding, " and dilation ", dilation,
                "; pairs are needed, of at least 1, for padding 0");
    TORCH_CHECK(!input_size || input_size->size() == 2, "bnfast: input_size is ", *input_size, "; two values are needed");
    const auto side = [&](int i) {
      const int64_t kernel = weights.size(1 + i), in = input_size ? (*input_size)[i] : x.size(2 + i);
      const int64_t out = outputs_of(in, kernel, stride[i], padding[i], dilation[i]);
      if (!input_size) {
        TORCH_CHECK(out > 0, "bnfast: x is of shape ", x.sizes(), " with padding ", padding, "; a kernel of ", weights.size(1), " x ",
                    weights.size(2), " does not fit");
        return DotSide{in, out, kernel, stride[i], padding[i], dilation[i], false};
      }
      TORCH_CHECK(out == x.size(2 + i) && out > 0, "bnfast: dy is of shape ", x.sizes(), " and input_size ", *input_size, " with padding ",
                  padding, ", stride ", stride, " and dilation ", dilation, "; the output size of that convolution is needed");
      return DotSide{out, in, kernel, stride[i], padding[i], dilation[i], true};
    };
    down = side(0);
    across = side(1);
  }

  // Whether an output depends on the one input of its own place.
  bool is_pointwise() const {
    const auto is_one = [](const DotSide& s) { return s.kernel == 1 && s.stride == 1 && s.padding == 0; };
    return is_one(down) && is_one(across);
  }
};

// A convolution cut into units of rows. Every output is one sum in one order: how the work is cut changes no bit.
class Dot {
 public:
  Tensor y;

  // x: of the input's sizes.
  Dot(const Tensor& x, const Tensor& weights, const OptionalTensor& bias, int64_t out_channels, const Geometry& geometry)
      : down_(geometry.down), across_(geometry.across), channels_(x.size(1)), images_(x.size(0)), weights_(weights) {
    kernel_ = cpu_capability().dot.product;
    TORCH_CHECK(kernel_, "bnfast: this processor does not multiply bfloat16 (BNFAST_CPU_CAPABILITY avx512_bf16 or amx)");
    blocks_ = DotConv::blocks(out_channels);
    TORCH_CHECK(weights.is_contiguous() && weights.scalar_type() == at::kBFloat16 && channels_ % 2 == 0 &&
                    weights.sizes() == at::IntArrayRef({blocks_, down_.kernel, across_.kernel, channels_ / 2, kDotLanes, 2}),
                "bnfast: weights are ", weights.scalar_type(), " ", weights.sizes(), "; bfloat16 [", blocks_, ", ", down_.kernel, ", ",
                across_.kernel, ", ", channels_, " / 2, 16, 2] is needed, of an even number of channels");
    if (bias) {
      TORCH_CHECK(bias->dim() == 1 && bias->size(0) == out_channels, "bnfast: bias is of shape ", bias->sizes(), "; [",
                  out_channels, "] is needed");
      bias_ = at::constant_pad_nd(bias->to(at::kFloat), {0, blocks_ * kDotLanes - out_channels}).contiguous();
      d_.bias = bias_.const_data_ptr<float>();
    }
    y = at::empty({images_, out_channels, down_.out, across_.out}, x.options().memory_format(at::MemoryFormat::ChannelsLast));
    if (geometry.is_pointwise() && y.numel() > 0) flatten();
    first_row_ = down_.first();
    first_column_ = across_.first();
    d_.weights = elements(weights);
    d_.channels = channels_;
    d_.out_channels = out_channels;
    d_.block_elements = down_.kernel * across_.kernel * channels_ * kDotLanes;
    d_.step = DotConv::step_of(channels_);
    d_.x_step = across_.in_step() * channels_;
    row_step_ = std::max(across_.groups() + (across_.last() - first_column_) / across_.in_step(),
                         ceil_div(across_.in - first_column_, across_.in_step()));
    cut();
  }

  // One of the two, before anything is computed.
  void set_input(const Tensor& x) {
    x_ = x.contiguous(at::MemoryFormat::ChannelsLast);
    make_room();
  }
  void set_input(const PixelSource& source) {
    source_ = &source;
    make_room();
  }
  // Tensors of y's shape that are read behind each unit; null ones are ignored.
  void set_behind(std::array<const void*, 3> tensors) { behind_ = tensors; }

  std::optional<PixelUnits> pixels() const {
    return pixel_units(d_.out_channels, across_.out, units_, [&](int64_t u) { return out_pixel(first_group(u)); });
  }
  // Whether threads share units by their output channels; else a unit can be computed alone.
  bool is_split() const { return pieces_ > 1; }
  void unit(int64_t u) const { piece(u, 0, blocks_); }
  void all() const {
    at::parallel_for(0, units_ * pieces_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t block = i % pieces_ * blocks_per_piece_;
        piece(i / pieces_, block, std::min(blocks_, block + blocks_per_piece_));
      }
    });
  }

 private:
  // Rows of one image that a unit computes, counted in groups, and where its input begins in scratch memory.
  struct Part {
    int64_t image, begin, end, memory;
  };

  static bf16* elements(Tensor& t) { return static_cast<bf16*>(t.mutable_data_ptr()); }
  static const bf16* elements(const Tensor& t) { return static_cast<const bf16*>(t.const_data_ptr()); }

  // All pixels as one image, whose rows are any.
  void flatten() {
    const int64_t pixels = images_ * down_.in * across_.in, width = pixels % kFlatRow == 0 ? kFlatRow : 1;
    images_ = 1;
    down_.in = down_.out = pixels / width;
    across_.in = across_.out = width;
    is_flat_ = true;
  }

  void cut() {
    const int64_t groups = std::max<int64_t>(1, down_.groups()), all = images_ * groups;
    const int64_t in_row = down_.in_step() * row_elements(), out_row = down_.out_step() * across_.out * d_.out_channels;
    const int64_t most = std::max<int64_t>(1, kUnitBytes / (2 * std::max<int64_t>(1, in_row + 2 * out_row)));
    const bool is_near = blocks_ * d_.block_elements * 2 <= kWeightsNear;
    const int64_t work = std::max<int64_t>(1, all * (in_row + out_row) / kLeastWork);
    const int64_t wanted = std::max(ceil_div(all, most), std::min(work, is_near ? kUnits : kUnitsOfManyWeights));
    int64_t rows = std::max<int64_t>(1, ceil_div(all, wanted));
    if (rows >= groups) rows = rows / groups * groups;       // whole images
    else rows = ceil_div(groups, ceil_div(groups, rows));    // pieces of an image
    groups_per_unit_ = rows;
    units_per_image_ = rows >= groups ? 1 : ceil_div(groups, rows);
    units_ = all == 0 || y.numel() == 0 ? 0 : rows >= groups ? ceil_div(images_, rows / groups) : images_ * units_per_image_;
    const int64_t threads = at::get_num_threads();
    const int64_t pieces = units_ >= 2 * threads || units_ == 0 ? 1 : ceil_div(2 * threads, units_);
    blocks_per_piece_ = ceil_div(ceil_div(blocks_, pieces), 2) * 2;
    pieces_ = std::max<int64_t>(1, ceil_div(blocks_, blocks_per_piece_));
  }

  int64_t row_elements() const { return row_step_ * d_.x_step; }   // of a row in scratch memory
  int64_t groups() const { return down_.groups(); }
  // Counted over all images.
  int64_t first_group(int64_t unit) const {
    if (groups_per_unit_ >= groups()) return std::min(images_ * groups(), unit * groups_per_unit_);
    return unit / units_per_image_ * groups() + std::min(groups(), unit % units_per_image_ * groups_per_unit_);
  }
  // Of y, and of x, in front of a group.
  int64_t out_pixel(int64_t group) const {
    return (group / groups() * down_.out + group % groups() * down_.out_step()) * across_.out;
  }
  int64_t in_pixel(int64_t group) const {
    return (group / groups() * down_.in + std::min(down_.in, group % groups() * down_.in_step())) * across_.in;
  }

  // Input rows of so many groups.
  int64_t rows_of(int64_t count) const { return (count - 1) * down_.in_step() + down_.last() - first_row_ + 1; }

  void make_room() {
    slack_ = source_ ? whole_lines(source_->granularity() * channels_) : 0;
    class_elements_ = ceil_div(rows_of(std::min(groups(), groups_per_unit_)), down_.in_step()) * row_elements() + slack_;
    part_elements_ = whole_lines(slack_ + down_.in_step() * class_elements_);
    find_taps();
    // A flat x is read where it is, but for what lies behind the last whole tile.
    const int64_t read_ahead = whole_lines(kDotReadAhead * d_.x_step);
    const int64_t made = reads_in_place() ? read_ahead : ceil_div(groups_per_unit_, groups()) * part_elements_;
    elements_ = made + read_ahead;
    scratch_ = at::empty({at::get_num_threads() * elements_ + kAlign}, y.options().memory_format(at::MemoryFormat::Contiguous));
    bf16* const memory = elements(scratch_);
    aligned_ = memory + (64 - reinterpret_cast<uintptr_t>(memory) % 64) % 64 / sizeof(bf16);
  }
  bool reads_in_place() const { return is_flat_ && !source_; }

  // The rows that the groups of a part read, from the last to the first: a source writes over what is in front of a row.
  void make_input(const Part& part, bf16* memory) const {
    const int64_t count = part.end - part.begin, left = -first_column_, step = down_.in_step();
    const int64_t right = row_elements() / channels_ - left - across_.in;
    if (is_flat_) {
      source_->write_from(part.begin * across_.in, part.end * across_.in, channels_, memory);
      return;
    }
    for (int64_t i = rows_of(count) - 1; i >= 0; --i) {
      if (!reads_class(i % step)) continue;
      const int64_t row = part.begin * step + first_row_ + i;
      bf16* const line = memory + i % step * class_elements_ + i / step * row_elements();
      if (row < 0 || row >= down_.in) {
        std::memset(line, 0, row_elements() * sizeof(bf16));
        continue;
      }
      bf16* const to = line + left * channels_;
      const int64_t pixel = (part.image * down_.in + row) * across_.in;
      if (source_) source_->write_from(pixel, pixel + across_.in, channels_, to);
      else std::memcpy(to, elements(x_) + pixel * channels_, across_.in * channels_ * sizeof(bf16));
      std::memset(line, 0, left * channels_ * sizeof(bf16));
      std::memset(to + across_.in * channels_, 0, right * channels_ * sizeof(bf16));
    }
  }

  // Whether a tap meets input rows whose distance from the first one has this remainder by in_step().
  bool reads_class(int64_t remainder) const {
    if (down_.in_step() == 1) return true;
    for (int64_t r = 0; r < down_.kernel; ++r) {
      if ((down_.offset(0, r) - first_row_) % down_.in_step() == remainder) return true;
    }
    return false;
  }

  // The taps of every phase, one phase after the other.
  void find_taps() {
    for (int64_t a = 0; a < down_.out_step(); ++a) {
      for (int64_t b = 0; b < across_.out_step(); ++b) {
        for (int64_t r = 0; r < down_.kernel; ++r) {
          for (int64_t s = 0; s < across_.kernel; ++s) {
            if (!down_.meets(a, r) || !across_.meets(b, s)) continue;
            const int64_t row = down_.offset(a, r) - first_row_, column = across_.offset(b, s) - first_column_;
            const int64_t line = row % down_.in_step() * class_elements_ + row / down_.in_step() * row_elements();
            taps_.push_back({line + column * channels_, (r * across_.kernel + s) * channels_ * kDotLanes});
          }
        }
        ends_.push_back(static_cast<int64_t>(taps_.size()));
      }
    }
  }

  void piece(int64_t unit, int64_t block, int64_t last_block) const {
    bf16* const scratch = aligned_ + at::get_thread_num() * elements_;
    const int64_t begin = first_group(unit), end = first_group(unit + 1);
    std::vector<Part> parts;
    int64_t memory = 0;
    for (int64_t group = begin; group < end;) {
      const int64_t image = group / groups(), until = std::min(end, (image + 1) * groups());
      parts.push_back({image, group - image * groups(), until - image * groups(), memory + slack_});
      memory += part_elements_;
      group = until;
    }
    std::vector<DotSpan> spans;
    if (reads_in_place()) {
      add_in_place(parts[0], scratch, spans);
    } else {
      for (const Part& part : parts) {
        make_input(part, scratch + part.memory);
        add_spans(part, scratch + part.memory, spans);
      }
    }
    DotConv d = d_;
    Run runs[kMostRuns];
    d.upcoming = runs;
    d.upcoming_count = pieces_ == 1 ? find_runs(begin, end, unit, runs) : 0;
    kernel_(d, spans.data(), static_cast<int64_t>(spans.size()), block, last_block);
  }

  void add_spans(const Part& part, const bf16* memory, std::vector<DotSpan>& spans) const {
    const int64_t pixel = d_.out_channels;
    bf16* const first = static_cast<bf16*>(y.mutable_data_ptr()) + part.image * down_.out * across_.out * pixel;
    int64_t phase = 0, begin = 0;
    for (int64_t a = 0; a < down_.out_step(); ++a) {
      for (int64_t b = 0; b < across_.out_step(); ++b, begin = ends_[phase++]) {
        DotSpan span;
        span.x = memory;
        span.rows = down_.count(part.begin, part.end, a);
        span.columns = across_.count(0, across_.groups(), b);
        span.row_step = row_step_;
        span.y = first + ((part.begin * down_.out_step() + a) * across_.out + b) * pixel;
        span.y_row = down_.out_step() * across_.out * pixel;
        span.y_column = across_.out_step() * pixel;
        span.taps = taps_.data() + begin;
        span.tap_count = ends_[phase] - begin;
        if (span.positions() > 0) spans.push_back(span);
      }
    }
  }

  // Whole tiles of a flat x where they are; the pixels behind them from a copy, behind which there is something to read.
  void add_in_place(const Part& part, bf16* scratch, std::vector<DotSpan>& spans) const {
    const int64_t begin = part.begin * across_.in, end = part.end * across_.in;
    const int64_t whole = begin + (end - begin) / kDotReadAhead * kDotReadAhead;
    std::memcpy(scratch, elements(x_) + whole * channels_, (end - whole) * channels_ * sizeof(bf16));
    const auto add = [&](const bf16* x, int64_t from, int64_t count) {
      bf16* const to = static_cast<bf16*>(y.mutable_data_ptr()) + from * d_.out_channels;
      if (count > 0) spans.push_back({x, 1, count, count, to, 0, d_.out_channels, taps_.data(), static_cast<int64_t>(taps_.size())});
    };
    add(elements(x_) + begin * channels_, begin, whole - begin);
    add(scratch, whole, end - whole);
  }

  // What is written and read after these groups, and read for the next unit.
  int find_runs(int64_t begin, int64_t end, int64_t unit, Run* runs) const {
    int count = 0;
    const auto add = [&](const void* tensor, int64_t first, int64_t last, int64_t channels) {
      const int64_t pixel = channels * static_cast<int64_t>(sizeof(bf16));
      if (tensor && last > first) runs[count++] = {static_cast<const char*>(tensor) + first * pixel, (last - first) * pixel};
    };
    const int64_t out = out_pixel(begin), out_end = out_pixel(end);
    add(y.const_data_ptr(), out, out_end, d_.out_channels);
    for (const void* tensor : behind_) add(tensor, out, out_end, d_.out_channels);
    if (unit + 1 < units_) {
      const int64_t in = in_pixel(end), in_end = in_pixel(first_group(unit + 2));
      if (source_) {
        add(source_->reads(0), in, in_end, channels_);
        add(source_->reads_too(0), in, in_end, channels_);
      } else {
        add(x_.const_data_ptr(), in, in_end, channels_);
      }
    }
    return count;
  }

  DotConv d_ = {};
  DotSide down_, across_;
  int64_t channels_, images_;
  Tensor weights_, x_, bias_, scratch_;
  void (*kernel_)(const DotConv&, const DotSpan*, int64_t, int64_t, int64_t);
  const PixelSource* source_ = nullptr;
  std::array<const void*, 3> behind_ = {};
  bf16* aligned_ = nullptr;
  bool is_flat_ = false;
  int64_t blocks_, first_row_, first_column_;
  int64_t row_step_;   // positions from the input of an output to that of the one below it
  int64_t groups_per_unit_, units_per_image_, units_, blocks_per_piece_, pieces_;
  int64_t slack_ = 0;   // elements that a source may write in front of a row
  int64_t class_elements_ = 0, part_elements_ = 0;   // of scratch memory: rows of one remainder by in_step(), and a part
  std::vector<DotTap> taps_;
  std::vector<int64_t> ends_;   // of the taps of each phase
  int64_t elements_ = 0;
};

Tensor dot_conv(const Tensor& x, const Tensor& weights, const OptionalTensor& bias, int64_t out_channels, at::IntArrayRef stride,
                at::IntArrayRef padding, at::IntArrayRef dilation) {
  const PoolScope pooled;
  Dot conv(x, weights, bias, out_channels, Geometry(x, weights, stride, padding, dilation, nullptr));
  conv.set_input(x);
  if (conv.y.numel() > 0) conv.all();
  return conv.y;
}

Tensor dot_dgrad(const Tensor& dz, const Tensor& weights, int64_t in_channels, at::IntArrayRef input_size, at::IntArrayRef stride,
                 at::IntArrayRef padding, at::IntArrayRef dilation) {
  const PoolScope pooled;
  Dot conv(dz, weights, std::nullopt, in_channels, Geometry(dz, weights, stride, padding, dilation, &input_size));
  conv.set_input(dz);
  if (conv.y.numel() > 0) conv.all();
  return conv.y;
}

Tensor dot_fwd_apply(const Tensor& x, const Tensor& mean, const Tensor& rstd, const OptionalTensor& gamma, const OptionalTensor& beta,
                     const OptionalTensor& residual, c10::string_view act, double slope, const Tensor& weights,
                     const OptionalTensor& bias, int64_t out_channels, at::IntArrayRef stride, at::IntArrayRef padding,
                     at::IntArrayRef dilation) {
  const PoolScope pooled;
  Dot conv(x, weights, bias, out_channels, Geometry(x, weights, stride, padding, dilation, nullptr));
  conv.set_input(x);
  return applied_behind(conv, mean, rstd, gamma, beta, residual, act, slope);
}

std::tuple<Tensor, Tensor, Tensor> dot_fwd_reduce(
    const Tensor& x, const OptionalTensor& mean, const OptionalTensor& rstd, const OptionalTensor& gamma, const OptionalTensor& beta,
    c10::string_view act, double slope, const Tensor& weights, const OptionalTensor& bias, int64_t out_channels, at::IntArrayRef stride,
    at::IntArrayRef padding, at::IntArrayRef dilation, OptionalTensor running_mean, OptionalTensor running_var,
    OptionalTensor num_batches_tracked, std::optional<double> momentum, double eps) {
  const PoolScope pooled;
  Dot conv(x, weights, bias, out_channels, Geometry(x, weights, stride, padding, dilation, nullptr));
  std::optional<Normalised> source;
  if (mean) conv.set_input(source.emplace(x, mean, rstd, gamma, beta, act, slope));
  else conv.set_input(x);
  return reduced_behind(conv, running_mean, running_var, num_batches_tracked, momentum, eps);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> dot_dgrad_reduce(
    const Tensor& dy, const OptionalTensor& z, const OptionalTensor& mean, const OptionalTensor& rstd, const OptionalTensor& gamma,
    const OptionalTensor& beta, const OptionalTensor& dgamma, const OptionalTensor& dbeta, c10::string_view act, double slope,
    const Tensor& weights, int64_t in_channels, at::IntArrayRef input_size, at::IntArrayRef stride, at::IntArrayRef padding,
    at::IntArrayRef dilation, const OptionalTensor& add, const OptionalTensor& z_below, const OptionalTensor& bits,
    const OptionalTensor& mean_below, const OptionalTensor& rstd_below, const OptionalTensor& gamma_below,
    const OptionalTensor& beta_below, c10::string_view act_below, double slope_below, const OptionalTensor& z_beside,
    const OptionalTensor& mean_beside, const OptionalTensor& rstd_beside) {
  const PoolScope pooled;
  Dot conv(dy, weights, std::nullopt, in_channels, Geometry(dy, weights, stride, padding, dilation, &input_size));
  check_above(z, mean, rstd, dgamma, dbeta);
  std::optional<Dz> source;
  if (z) conv.set_input(source.emplace(dy, *z, *mean, *rstd, gamma, beta, *dgamma, *dbeta, act, slope));
  else conv.set_input(dy);
  return dgrad_reduced_behind(conv, add, {z_below, bits, mean_below, rstd_below, gamma_below, beta_below, act_below, slope_below,
                                          z_beside, mean_beside, rstd_beside});
}

}  // namespace

TORCH_LIBRARY_IMPL(bnfast, CPU, m) {
  m.impl("dot_conv", &dot_conv);
  m.impl("dot_fwd_apply", &dot_fwd_apply);
  m.impl("dot_fwd_reduce", &dot_fwd_reduce);
  m.impl("dot_dgrad", &dot_dgrad);
  m.impl("dot_dgrad_reduce", &dot_dgrad_reduce);
}

}  // namespace bnfast
