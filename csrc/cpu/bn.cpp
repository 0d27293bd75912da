// The BatchNorm phases as operators for the CPU: layout, channel parameters, units of work, and the merge of partial results.
//
// Units of work and the order in which their results are merged depend on the shape alone, so the bits do not depend on the
// number of threads.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <string>
#include <tuple>
#include <vector>

#include "../arguments.h"
#include "bn_fused.h"
#include "capability_table.h"
#include "pool.h"

namespace bnfast {
namespace {

using at::Tensor;

constexpr int64_t kBlockLanes = 16;
constexpr int64_t kUnit = 65536;         // elements of one unit of a reduction
constexpr int64_t kMaxUnits = 128;       // ... of which there are not many more than this
constexpr int64_t kApplyUnit = 32768;    // elements of one unit of an elementwise phase
constexpr int64_t kRowLength = 64;       // rows are made at least this long, for loops that are worth starting
constexpr int64_t kSmallPlane = 32;      // planes smaller than this are treated as rows ...
constexpr int64_t kLongestRow = 32768;   // ... of at most this length
constexpr int64_t kStreamed = 1 << 18;   // elements of a result that is written past the cache, at least
constexpr int64_t kHot = 49152;          // elements that a reduction leaves in the cache for the elementwise phase behind it

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How a tensor lies in memory; see bn.h.
struct Layout {
  bool rows = false;
  int64_t channels = 0, batch = 0, plane = 0;   // N, C and the product of the other sizes
  at::MemoryFormat format = at::MemoryFormat::Contiguous;
  int64_t inner = 1;    // rows: neighbouring elements that share a channel (a small NCHW plane), 1 in channels_last
  int64_t length = 0;   // rows: elements of one row

  int64_t count() const { return batch * plane; }
  int64_t numel() const { return batch * plane * channels; }
  int64_t whole_rows() const { return numel() / length; }
  int64_t parameters() const { return rows ? length : channels; }
  int64_t channel_of(int64_t j) const { return rows ? (j / inner) % channels : j; }
  int64_t bit_bytes() const {
    const int64_t words = rows ? ceil_div(numel(), kBlockLanes) : batch * channels * ceil_div(plane, kBlockLanes);
    return 2 * words;
  }
};

Layout layout_of(const Tensor& z) {
  Layout l;
  l.batch = z.size(0);
  l.channels = z.size(1);
  l.plane = 1;
  for (int64_t d = 2; d < z.dim(); ++d) l.plane *= z.size(d);
  const bool last = (z.dim() == 4 && z.is_contiguous(at::MemoryFormat::ChannelsLast)) ||
                    (z.dim() == 5 && z.is_contiguous(at::MemoryFormat::ChannelsLast3d));
  if (last && !z.is_contiguous()) {
    l.format = z.dim() == 4 ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::ChannelsLast3d;
  } else if (l.plane > 1) {
    l.inner = l.plane;
  }
  l.rows = l.inner == 1 || (l.inner < kSmallPlane && l.inner * l.channels <= kLongestRow);
  if (l.rows) {
    const int64_t pixel = std::max<int64_t>(1, l.channels * l.inner);
    const int64_t step = kBlockLanes / std::gcd(pixel, kBlockLanes);   // pixels until a row ends at a Block's end
    l.length = pixel * step * std::max<int64_t>(1, kRowLength / (pixel * step));
  }
  return l;
}

struct Channels { int64_t begin, end; };

// A channel vector in the accumulator type A; `values` is null where the vector is absent.
template <class A>
struct ChannelVector {
  Tensor owner;
  const A* values = nullptr;
  explicit ChannelVector(const OptionalTensor& t) {
    if (!t) return;
    owner = t->to(c10::CppTypeToScalarType<A>::value).contiguous();
    values = owner.const_data_ptr<A>();
  }
};

// Writes value(c) for each channel in the layout of the kernels' parameters (bn.h).
template <class A, class F>
const A* lay_out(const Layout& l, A* to, F value) {
  const int64_t pixel = l.rows ? l.channels * l.inner : l.channels;
  for (int64_t c = 0, j = 0; c < l.channels; ++c) {
    const A v = value(c);
    for (int64_t i = 0; i < (l.rows ? l.inner : 1); ++i) to[j++] = v;
  }
  for (int64_t at = pixel; at < l.parameters(); at += pixel) std::memcpy(to + at, to, pixel * sizeof(A));
  return to;
}

// The parameters of bn_bwd_apply that depend on bn_bwd_reduce.
template <class A>
struct Shifts {
  const A *dgamma, *dbeta, *rstd;
  A count;
  A db(int64_t c) const { return dbeta[c] / count; }
  A z(int64_t c) const { return rstd[c] * dgamma[c] / count; }
};

template <class A>
void set_shifts(BnTensors& t, Tensor& buffer, const Layout& l, const Shifts<A>& shifts) {
  A* to = buffer.mutable_data_ptr<A>() + 3 * l.parameters();
  t.shift_db = lay_out(l, to, [&](int64_t c) { return shifts.db(c); });
  t.shift_z = lay_out(l, to + l.parameters(), [&](int64_t c) { return shifts.z(c); });
}

// Kernel arguments shared by the phases that know the statistics (mean 0 and rstd 1 where absent), with dgamma and dbeta where the backward uses batch
// statistics. `buffer` owns the parameters that the pointers point to.
template <class A>
void set_parameters(BnTensors& t, Tensor& buffer, const Layout& l, const OptionalTensor& mean, const OptionalTensor& rstd,
                    const OptionalTensor& gamma, const OptionalTensor& beta, const OptionalTensor& dgamma,
                    const OptionalTensor& dbeta) {
  const ChannelVector<A> m(mean), r(rstd), g(gamma), b(beta), dg(dgamma), db(dbeta);
  buffer = at::empty({5, l.parameters()}, at::TensorOptions().dtype(c10::CppTypeToScalarType<A>::value));
  A* to = buffer.mutable_data_ptr<A>();
  const int64_t step = l.parameters();
  t.mean = lay_out(l, to, [&](int64_t c) { return m.values ? m.values[c] : A(0); });
  t.scale = lay_out(l, to + step, [&](int64_t c) {
    return (g.values ? g.values[c] : A(1)) * (r.values ? r.values[c] : A(1));
  });
  t.beta = lay_out(l, to + 2 * step, [&](int64_t c) { return b.values ? b.values[c] : A(0); });
  if (dg.values) set_shifts<A>(t, buffer, l, {dg.values, db.values, r.values, static_cast<A>(l.count())});
}

void set_arguments(BnTensors& t, Tensor& buffer, const Tensor& z, const Layout& l, const OptionalTensor& mean,
                   const OptionalTensor& rstd, const OptionalTensor& gamma, const OptionalTensor& beta, const OptionalTensor& dgamma,
                   const OptionalTensor& dbeta, const Tensor& residual, c10::string_view act, double slope) {
  check_vector(mean, z, "mean");
  check_vector(rstd, z, "rstd");
  check_vector(gamma, z, "gamma");
  check_vector(beta, z, "beta");
  check_vector(dgamma, z, "dgamma");
  check_vector(dbeta, z, "dbeta");
  if (accumulator(z) == at::kDouble) set_parameters<double>(t, buffer, l, mean, rstd, gamma, beta, dgamma, dbeta);
  else set_parameters<float>(t, buffer, l, mean, rstd, gamma, beta, dgamma, dbeta);
  t.z = z.const_data_ptr();
  t.residual = residual.defined() ? residual.const_data_ptr() : nullptr;
  t.act = act_of(act);
  t.slope = slope;
}

const BnKernels& kernels_for(const Tensor& z) { return cpu_capability().bn[static_cast<int>(dtype_of(z))]; }

// ---- units of work ----------------------------------------------------------------------------------------------------

// Rows of a reduction, in units of whole rows, with the last partial row (if any) as a unit of its own.
struct RowUnits {
  int64_t length, tail;
  std::vector<int64_t> borders;   // elements

  explicit RowUnits(const Layout& l) : length(l.length), tail(l.numel() % l.length), borders{0} {
    const int64_t whole = l.whole_rows(), wanted = balanced(ceil_div(whole * length, kUnit));
    const int64_t rows_per_unit = std::max<int64_t>(1, ceil_div(whole, wanted));
    for (int64_t row = 0; row < whole; row += rows_per_unit) borders.push_back(std::min(whole, row + rows_per_unit) * length);
    if (tail) borders.push_back(l.numel());
  }

  // The units of a convolution, none of which ends with a partial row.
  RowUnits(const Layout& l, const PixelUnits& pixels) : length(pixels.group * l.channels), tail(0) {
    for (const int64_t border : pixels.borders) borders.push_back(border * l.channels);
  }

  // A number of units that is shared out evenly among a usual number of threads.
  static int64_t balanced(int64_t units) {
    if (units <= 2) return std::max<int64_t>(1, units);
    return units <= 4 ? 4 : std::min(kMaxUnits, ceil_div(units, 8) * 8);
  }

  int64_t units() const { return static_cast<int64_t>(borders.size()) - 1; }
  bool is_tail(int64_t u) const { return tail && u == units() - 1; }
  RowSpan span(int64_t u) const { return {length, borders[u], borders[u + 1]}; }
  // Values behind place j of unit u's partial result.
  int64_t count(int64_t u, int64_t j) const {
    if (is_tail(u)) return j < tail ? 1 : 0;
    return (borders[u + 1] - borders[u]) / length;
  }
};

// Planes of a reduction. A unit is a block of channels times a range of images, or a piece of one large plane; the partial
// results of all units that share their images and piece are one "slice" of C values.
struct PlaneUnits {
  int64_t channels, plane, batch, per_piece, pieces, channel_block, image_block, channel_units, slices;

  explicit PlaneUnits(const Layout& l) : channels(l.channels), plane(l.plane), batch(l.batch) {
    pieces = ceil_div(plane, kUnit);
    per_piece = ceil_div(ceil_div(plane, pieces), kBlockLanes) * kBlockLanes;
    pieces = ceil_div(plane, per_piece);
    channel_block = std::clamp<int64_t>(4096 / plane, 1, channels);
    image_block = pieces > 1 ? 1 : std::clamp<int64_t>(kUnit / (channel_block * plane), 1, batch);
    channel_units = ceil_div(channels, channel_block);
    slices = ceil_div(batch, image_block) * pieces;
  }

  int64_t units() const { return slices * channel_units; }
  int64_t slice(int64_t u) const { return u / channel_units; }
  PlaneSpan span(int64_t u) const {
    const int64_t c = u % channel_units * channel_block, n = slice(u) / pieces * image_block;
    const int64_t s = slice(u) % pieces * per_piece;
    return {channels, plane, n, std::min(batch, n + image_block), c, std::min(channels, c + channel_block),
            s, std::min(plane, s + per_piece)};
  }
  int64_t count(int64_t slice) const {
    const PlaneSpan s = span(slice * channel_units);
    return (s.n_end - s.n_begin) * (s.s_end - s.s_begin);
  }
};

// Blocks of channels with all their planes, for the two phases in one: the thread that has reduced a block knows its statistics
// without waiting for anyone, and applies them while the planes are in its cache. A channel's result is the same in any block.
struct ChannelBlocks {
  int64_t channels, plane, width, count;

  explicit ChannelBlocks(const Layout& l) : channels(l.channels), plane(l.plane) {
    const int64_t threads = at::get_num_threads(), hot = std::max<int64_t>(1, kHot / l.count());
    count = ceil_div(ceil_div(channels, hot), threads) * threads;
    width = ceil_div(channels, count);
    count = ceil_div(channels, width);
  }
  // Whether all threads get work; else the phases one after the other, which split the planes.
  static bool serve(const Layout& l) { return !l.rows && l.channels >= 2 * at::get_num_threads(); }

  int64_t begin(int64_t block) const { return block * width; }
  int64_t end(int64_t block) const { return std::min(channels, (block + 1) * width); }
  PlaneSpan part(int64_t block, PlaneSpan s) const {
    s.c_begin = begin(block);
    s.c_end = end(block);
    return s;
  }
  // From an element of a block to the same place of the next, which is reduced after this one has been written.
  int64_t ahead(int64_t block) const { return block + 1 < count ? width * plane : 0; }
  PlaneSpan image(int64_t block, int64_t n) const { return {channels, plane, n, n + 1, begin(block), end(block), 0, plane}; }
};

// Runs f(unit) for all units on the intra-op threads.
template <class F>
void for_units(int64_t units, F f) {
  at::parallel_for(0, units, 1, [&](int64_t begin, int64_t end) {
    for (int64_t u = begin; u < end; ++u) f(u);
  });
}

// Whether planes are written past the cache: where they are many, and Blocks begin at multiples of their own size. (For rows it
// is no gain: what reads them next finds some of them in the cache.)
bool streams(const Layout& l, const Tensor& out) {
  const int64_t block = kBlockLanes * out.element_size();
  return !l.rows && l.numel() >= kStreamed && l.plane % kBlockLanes == 0 &&
         reinterpret_cast<uintptr_t>(out.const_data_ptr()) % block == 0;
}

// Runs an elementwise phase over the whole tensor.
void apply_all(const Layout& l, const BnTensors& t, void (*rows)(const BnTensors&, RowSpan),
               void (*planes)(const BnTensors&, PlaneSpan)) {
  if (l.rows) {
    const int64_t per_unit = std::max<int64_t>(1, kApplyUnit / l.length) * l.length;
    for_units(ceil_div(l.numel(), per_unit), [&](int64_t u) {
      rows(t, {l.length, u * per_unit, std::min(l.numel(), (u + 1) * per_unit)});
    });
    return;
  }
  const int64_t pieces = ceil_div(l.plane, kApplyUnit), together = std::max<int64_t>(1, kApplyUnit / l.plane);
  const int64_t per_piece = ceil_div(ceil_div(l.plane, pieces), kBlockLanes) * kBlockLanes;
  const int64_t channel_units = ceil_div(l.channels, together);
  for_units(l.batch * channel_units * pieces, [&](int64_t u) {
    const int64_t n = u / (channel_units * pieces), c = u / pieces % channel_units * together, s = u % pieces * per_piece;
    planes(t, {l.channels, l.plane, n, n + 1, c, std::min(l.channels, c + together), s, std::min(l.plane, s + per_piece)});
  });
}

// Two partial results per unit, [units, places] each, uninitialised.
struct Partials {
  Tensor first, second;
  Partials(int64_t units, int64_t places, at::ScalarType dtype)
      : first(at::empty({units, places}, at::TensorOptions().dtype(dtype))), second(at::empty_like(first)) {}
  template <class A> A* first_row(int64_t u) { return first.mutable_data_ptr<A>() + u * first.size(1); }
  template <class A> A* second_row(int64_t u) { return second.mutable_data_ptr<A>() + u * second.size(1); }
};

// Calls merge(first, second, n, channel) for each partial result of rows, in a fixed order.
template <class A, class F>
void for_partials(const Layout& l, const RowUnits& units, const Partials& partials, F merge) {
  const A* first = partials.first.const_data_ptr<A>();
  const A* second = partials.second.const_data_ptr<A>();
  for (int64_t u = 0; u < units.units(); ++u) {
    for (int64_t j = 0, c = 0, i = 0; j < units.length; ++j) {
      const int64_t n = units.count(u, j);
      if (n) merge(first[u * units.length + j], second[u * units.length + j], n, c);
      if (++i == l.inner) i = 0, c = c + 1 == l.channels ? 0 : c + 1;
    }
  }
}

// ... of these channels' planes.
template <class A, class F>
void for_partials(const PlaneUnits& units, const Partials& partials, Channels channels, F merge) {
  const A* first = partials.first.const_data_ptr<A>();
  const A* second = partials.second.const_data_ptr<A>();
  for (int64_t slice = 0; slice < units.slices; ++slice) {
    const int64_t n = units.count(slice);
    for (int64_t c = channels.begin; c < channels.end; ++c) {
      merge(first[slice * units.channels + c], second[slice * units.channels + c], n, c);
    }
  }
}

// ---- the phases -------------------------------------------------------------------------------------------------------

// What bn_fwd_reduce finds: the moments in double, and mean, M2 and rstd as tensors in the accumulator's dtype.
struct Statistics {
  std::vector<double> mean, m2;
  Tensor mean_out, m2_out, rstd_out;
  double count, eps;

  Statistics(const Tensor& z, const Layout& l, double eps)
      : mean(l.channels, 0.0),
        m2(l.channels, 0.0),
        mean_out(at::empty({l.channels}, z.options().dtype(accumulator(z)))),
        m2_out(at::empty_like(mean_out)),
        rstd_out(at::empty_like(mean_out)),
        count(static_cast<double>(l.count())),
        eps(eps) {}

  // The moments from the partial results (n_i, mean_i, M2_i) by Chan's formula for all of them at once:
  //   mean = sum(n_i mean_i) / n,  M2 = sum(M2_i + n_i (mean_i - mean)^2).
  // `partials` calls a function for each partial result of these channels: for_partials<double>.
  template <class F>
  void merge(Channels channels, F partials) {
    const double one_over_count = 1.0 / count;
    partials([&](double part_mean, double, int64_t n, int64_t c) { mean[c] += n * part_mean; });
    for (int64_t c = channels.begin; c < channels.end; ++c) mean[c] *= one_over_count;
    partials([&](double part_mean, double part_m2, int64_t n, int64_t c) {
      const double d = part_mean - mean[c];
      m2[c] += part_m2 + n * d * d;
    });
  }

  template <class A>
  void write(Channels channels) {
    A *mean_ptr = mean_out.mutable_data_ptr<A>(), *m2_ptr = m2_out.mutable_data_ptr<A>(), *rstd_ptr = rstd_out.mutable_data_ptr<A>();
    for (int64_t c = channels.begin; c < channels.end; ++c) {
      const double shifted = (count > 0 ? m2[c] / count : 0.0) + eps;
      mean_ptr[c] = mean[c];
      m2_ptr[c] = m2[c];
      rstd_ptr[c] = shifted == 0 ? 0.0 : 1.0 / std::sqrt(shifted);
    }
  }

  void update(Tensor& running, const std::vector<double>& batch, double factor) const {
    const auto blend = [&](auto* values) {
      for (size_t c = 0; c < batch.size(); ++c) values[c] = (1 - factor) * values[c] + factor * batch[c];
    };
    if (running.scalar_type() == at::kFloat && running.is_contiguous()) {
      blend(running.mutable_data_ptr<float>());
      running.unsafeGetTensorImpl()->bump_version();
      return;
    }
    const Tensor values = running.to(at::kDouble, /*non_blocking=*/false, /*copy=*/true).contiguous();
    blend(values.mutable_data_ptr<double>());
    running.copy_(values);
  }

  // Equation (4) of bnfast/reference.py; an empty batch changes nothing but the count.
  void update_running(OptionalTensor& running_mean, OptionalTensor& running_var, OptionalTensor& num_batches_tracked,
                      std::optional<double> momentum) const {
    if (num_batches_tracked) num_batches_tracked->add_(1);
    if (count == 0 || !(running_mean || running_var)) return;
    const double factor = momentum ? *momentum : 1.0 / num_batches_tracked->item<int64_t>();
    if (running_mean) update(*running_mean, mean, factor);
    if (running_var) {
      std::vector<double> unbiased(m2);
      for (double& value : unbiased) value /= std::max(count - 1, 1.0);
      update(*running_var, unbiased, factor);
    }
  }
};

using Produce = c10::function_ref<bool(int64_t unit, int64_t begin, int64_t end, Upcoming& upcoming, double* mean, double* m2)>;

// The statistics of rows. produce, where given, writes the pixels [begin, end) of z, those of a unit, before they are read, or returns true and
// leaves the moments too.
void reduce_rows(Statistics& found, const Tensor& z, const Layout& l, const RowUnits& units, const Produce* produce) {
  const BnKernels& kernels = kernels_for(z);
  Partials partials(units.units(), units.length, at::kDouble);
  for_units(units.units() - (units.tail ? 1 : 0), [&](int64_t u) {
    const RowSpan span = units.span(u);
    Upcoming upcoming;
    double *const mean = partials.first_row<double>(u), *const m2 = partials.second_row<double>(u);
    if (produce && (*produce)(u, span.begin / l.channels, span.end / l.channels, upcoming, mean, m2)) return;
    BnTensors t;
    t.z = z.const_data_ptr();
    t.upcoming = &upcoming;
    std::vector<double> scratch(3 * units.length);
    kernels.fwd_reduce_rows(t, span, mean, m2, scratch.data());
  });
  if (units.tail) {
    // One value per place: the value is the mean, and M2 is 0.
    const int64_t last = units.units() - 1, begin = z.storage_offset() + units.span(last).begin;
    Upcoming nothing;
    if (produce) (*produce)(last, units.span(last).begin / l.channels, l.count(), nothing, nullptr, nullptr);
    partials.first[last].slice(0, 0, units.tail).copy_(z.as_strided({units.tail}, {1}, begin));
    partials.second[last].zero_();
  }
  found.merge({0, l.channels}, [&](auto merge) { for_partials<double>(l, units, partials, merge); });
}

void reduce_planes(Statistics& found, const Tensor& z, const Layout& l) {
  const BnKernels& kernels = kernels_for(z);
  BnTensors t;
  t.z = z.const_data_ptr();
  const PlaneUnits units(l);
  Partials partials(units.slices, l.channels, at::kDouble);
  for_units(units.units(), [&](int64_t u) {
    const int64_t slice = units.slice(u);
    kernels.fwd_reduce_planes(t, units.span(u), partials.first_row<double>(slice), partials.second_row<double>(slice));
  });
  const Channels all = {0, l.channels};
  found.merge(all, [&](auto merge) { for_partials<double>(units, partials, all, merge); });
}

// The statistics of z, which is dense.
Statistics reduce(const Tensor& z, const Layout& l, double eps) {
  Statistics found(z, l, eps);
  if (l.numel() > 0 && l.rows) reduce_rows(found, z, l, RowUnits(l), nullptr);
  else if (l.numel() > 0) reduce_planes(found, z, l);
  const Channels all = {0, l.channels};
  if (accumulator(z) == at::kDouble) found.write<double>(all);
  else found.write<float>(all);
  return found;
}

std::tuple<Tensor, Tensor, Tensor> bn_fwd_reduce(const Tensor& z_in, OptionalTensor running_mean, OptionalTensor running_var,
                                                 OptionalTensor num_batches_tracked, std::optional<double> momentum,
                                                 double eps) {
  check_running(z_in, running_mean, running_var, num_batches_tracked, momentum);
  const Tensor z = dense(z_in);
  Statistics found = reduce(z, layout_of(z), eps);
  found.update_running(running_mean, running_var, num_batches_tracked, momentum);
  return {found.mean_out, found.m2_out, found.rstd_out};
}

// What bn_fwd_apply takes and makes, but for the statistics.
struct Forward {
  Tensor z, residual, parameters, y, bits;
  Layout layout;
  BnTensors tensors;

  Forward(const Tensor& z_in, const OptionalTensor& residual_in, bool want_bits) {
    check_z(z_in);
    if (residual_in) check_like(*residual_in, z_in, "residual");
    z = dense(z_in);
    layout = layout_of(z);
    if (residual_in) residual = residual_in->contiguous(layout.format);
    y = at::empty_like(z);
    bits = at::empty({want_bits ? layout.bit_bytes() : 0}, z.options().dtype(at::kByte));
    tensors.out = y.mutable_data_ptr();
    tensors.streams = streams(layout, y);
    tensors.bits = want_bits ? static_cast<uint16_t*>(bits.mutable_data_ptr()) : nullptr;
  }

  void apply(const Tensor& mean, const Tensor& rstd, const OptionalTensor& gamma, const OptionalTensor& beta,
             c10::string_view act, double slope) {
    set_arguments(tensors, parameters, z, layout, mean, rstd, gamma, beta, std::nullopt, std::nullopt, residual, act, slope);
    const BnKernels& kernels = kernels_for(z);
    if (layout.numel() > 0) apply_all(layout, tensors, kernels.fwd_apply_rows, kernels.fwd_apply_planes);
  }
};

std::tuple<Tensor, Tensor> bn_fwd_apply(const Tensor& z, const Tensor& mean, const Tensor& rstd, OptionalTensor gamma,
                                        OptionalTensor beta, OptionalTensor residual, c10::string_view act, double slope,
                                        bool want_bits) {
  const PoolScope pooled;
  Forward f(z, residual, want_bits);
  f.apply(mean, rstd, gamma, beta, act, slope);
  return {f.y, f.bits};
}

// bn_fwd_reduce and bn_fwd_apply, block of channels by block of channels.
template <class A>
Statistics reduce_and_apply(Forward& f, double eps, const OptionalTensor& gamma, const OptionalTensor& beta,
                            c10::string_view act, double slope) {
  const Layout& l = f.layout;
  Statistics found(f.z, l, eps);
  // Arrays of C for what set_arguments reads here; each block overwrites its channels' part before it is used.
  set_arguments(f.tensors, f.parameters, f.z, l, std::nullopt, std::nullopt, gamma, beta, std::nullopt, std::nullopt, f.residual,
                act, slope);
  A *mean = f.parameters.mutable_data_ptr<A>(), *scale = mean + l.channels;
  const A* rstd = found.rstd_out.const_data_ptr<A>();
  const BnKernels& kernels = kernels_for(f.z);
  const PlaneUnits units(l);
  const ChannelBlocks blocks(l);
  Partials partials(units.slices, l.channels, at::kDouble);
  double *first = partials.first.mutable_data_ptr<double>(), *second = partials.second.mutable_data_ptr<double>();
  for_units(blocks.count, [&](int64_t block) {
    const Channels channels = {blocks.begin(block), blocks.end(block)};
    for (int64_t slice = 0; slice < units.slices; ++slice) {
      kernels.fwd_reduce_planes(f.tensors, blocks.part(block, units.span(slice * units.channel_units)), first + slice * l.channels,
                                second + slice * l.channels);
    }
    found.merge(channels, [&](auto merge) { for_partials<double>(units, partials, channels, merge); });
    found.write<A>(channels);
    for (int64_t c = channels.begin; c < channels.end; ++c) {
      mean[c] = static_cast<A>(found.mean[c]);
      scale[c] *= rstd[c];
    }
    // What was read last is read first.
    BnTensors t = f.tensors;
    t.ahead = blocks.ahead(block);
    for (int64_t n = l.batch; n-- > 0;) kernels.fwd_apply_planes(t, blocks.image(block, n));
  });
  return found;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_fwd_reduce_apply(const Tensor& z, OptionalTensor running_mean,
                                                               OptionalTensor running_var, OptionalTensor num_batches_tracked,
                                                               std::optional<double> momentum, double eps,
                                                               OptionalTensor gamma, OptionalTensor beta,
                                                               OptionalTensor residual, c10::string_view act, double slope,
                                                               bool want_bits) {
  const PoolScope pooled;
  check_running(z, running_mean, running_var, num_batches_tracked, momentum);
  Forward f(z, residual, want_bits);
  const auto run = [&]() {
    if (f.layout.numel() > 0 && ChannelBlocks::serve(f.layout)) {
      if (accumulator(z) == at::kDouble) return reduce_and_apply<double>(f, eps, gamma, beta, act, slope);
      return reduce_and_apply<float>(f, eps, gamma, beta, act, slope);
    }
    const Statistics found = reduce(f.z, f.layout, eps);
    f.apply(found.mean_out, found.rstd_out, gamma, beta, act, slope);
    return found;
  };
  const Statistics found = run();
  found.update_running(running_mean, running_var, num_batches_tracked, momentum);
  return {found.mean_out, found.rstd_out, f.y, f.bits};
}

}  // namespace

std::tuple<Tensor, Tensor> bn_fwd_reduce_behind(const Tensor& z, const PixelUnits* units, Produce produce, OptionalTensor running_mean,
                                                OptionalTensor running_var, OptionalTensor num_batches_tracked,
                                                std::optional<double> momentum, double eps) {
  check_running(z, running_mean, running_var, num_batches_tracked, momentum);
  const Layout l = layout_of(z);
  Statistics found(z, l, eps);
  const bool by_pixels = l.rows && l.inner == 1;
  if (!by_pixels && l.numel() > 0) {
    Upcoming nothing;
    produce(0, 0, l.count(), nothing, nullptr, nullptr);
  }
  if (by_pixels && l.numel() > 0) reduce_rows(found, z, l, units ? RowUnits(l, *units) : RowUnits(l), &produce);
  else if (l.numel() > 0) l.rows ? reduce_rows(found, z, l, RowUnits(l), nullptr) : reduce_planes(found, z, l);
  found.write<float>({0, l.channels});
  found.update_running(running_mean, running_var, num_batches_tracked, momentum);
  return {found.mean_out, found.rstd_out};
}

namespace {

// Pixels in channels_last, which is what z must be in.
Layout pixel_layout(const Tensor& z) {
  const Layout l = layout_of(z);
  TORCH_CHECK((z.scalar_type() == at::kFloat || z.scalar_type() == at::kBFloat16) && l.rows && l.inner == 1, "bnfast: z is ",
              z.scalar_type(), " ", z.sizes(), " of strides ", z.strides(), "; float32 or bfloat16 in channels_last is needed");
  return l;
}

// A kernel reads and writes element e of a tensor like z; here element `begin` lies at `at`.
const void* at_element(const void* at, int64_t begin, const Tensor& z) { return static_cast<const char*>(at) - begin * z.element_size(); }
void* at_element(void* at, int64_t begin, const Tensor& z) { return static_cast<char*>(at) - begin * z.element_size(); }
const void* element(const void* tensor, int64_t index, const Tensor& z) {
  return static_cast<const char*>(tensor) + index * z.element_size();
}

}  // namespace

namespace {

// A factor and an addend for each channel of each image, of a tensor in channels_last and float32.
class Gate {
 public:
  Gate() = default;
  Gate(const Tensor& gate, const OptionalTensor& shift, const Tensor& of) : plane_(of.size(2) * of.size(3)) {
    gate_ = taken(gate, "gate", of);
    if (shift) shift_ = taken(*shift, "shift", of);
  }
  explicit operator bool() const { return gate_.defined(); }
  // The pixels [begin, end) of `from`, of which the first goes `to`.
  void write(const BnKernels& kernels, const void* from, int64_t begin, int64_t end, void* to) const {
    kernels.se_gate_pixels(static_cast<const float*>(from), static_cast<float*>(to), {gate_.size(1), begin, end}, plane_,
                           gate_.const_data_ptr<float>(), shift_.defined() ? shift_.const_data_ptr<float>() : nullptr);
  }

 private:
  static Tensor taken(const Tensor& given, const char* name, const Tensor& of) {
    TORCH_CHECK(of.scalar_type() == at::kFloat && given.scalar_type() == at::kFloat && given.sizes() == of.sizes().slice(0, 2), "bnfast: ",
                name, " is ", given.scalar_type(), " ", given.sizes(), " for ", of.scalar_type(), " ", of.sizes(),
                "; float32 [N, C] for float32 [N, C, H, W] is needed");
    return given.contiguous();
  }
  int64_t plane_ = 0;
  Tensor gate_, shift_;
};

}  // namespace

struct Normalised::State {
  Tensor z, parameters;
  Layout layout;
  BnTensors tensors;
  const BnKernels& kernels;
  Gate gate;
};

Normalised::Normalised(const Tensor& z_in, const OptionalTensor& mean, const OptionalTensor& rstd, const OptionalTensor& gamma,
                       const OptionalTensor& beta, c10::string_view act, double slope, const OptionalTensor& gate) {
  const Tensor z = z_in.contiguous(at::MemoryFormat::ChannelsLast);
  state_.reset(new State{z, {}, pixel_layout(z), {}, kernels_for(z), gate ? Gate(*gate, std::nullopt, z) : Gate()});
  set_arguments(state_->tensors, state_->parameters, z, state_->layout, mean, rstd, gamma, beta, std::nullopt, std::nullopt, Tensor(),
                act, slope);
}
Normalised::~Normalised() = default;
int64_t Normalised::granularity() const { return state_->layout.length / state_->layout.channels; }
int64_t Normalised::element_bytes() const { return state_->z.element_size(); }
void Normalised::write(int64_t begin, int64_t end, void* to) const {
  const int64_t channels = state_->layout.channels;
  BnTensors t = state_->tensors;
  t.out = at_element(to, begin * channels, state_->z);
  state_->kernels.fwd_apply_rows(t, {state_->layout.length, begin * channels, end * channels});
  if (state_->gate) state_->gate.write(state_->kernels, t.out, begin, end, to);
}
const void* Normalised::reads(int64_t begin) const {
  return element(state_->tensors.z, begin * state_->layout.channels, state_->z);
}

struct Kept::State {
  Forward forward;
  const BnKernels& kernels;
};

Kept::Kept(const Tensor& z_in, const Tensor& mean, const Tensor& rstd, const OptionalTensor& gamma, const OptionalTensor& beta,
           const Tensor& residual, c10::string_view act, double slope, bool want_bits) {
  const Tensor z = z_in.contiguous(at::MemoryFormat::ChannelsLast);
  const Layout layout = pixel_layout(z);
  state_.reset(new State{Forward(z, residual, want_bits), kernels_for(z)});
  Forward& f = state_->forward;
  f.tensors.streams = false;
  set_arguments(f.tensors, f.parameters, z, layout, mean, rstd, gamma, beta, std::nullopt, std::nullopt, f.residual, act, slope);
}
Kept::~Kept() = default;
int64_t Kept::granularity() const { return state_->forward.layout.length / state_->forward.layout.channels; }
int64_t Kept::element_bytes() const { return state_->forward.z.element_size(); }
void Kept::write(int64_t begin, int64_t end, void* to) const {
  const Layout& l = state_->forward.layout;
  BnTensors t = state_->forward.tensors;
  t.out = at_element(to, begin * l.channels, state_->forward.z);
  t.bits = nullptr;
  state_->kernels.fwd_apply_rows(t, {l.length, begin * l.channels, end * l.channels});
}
const void* Kept::reads(int64_t begin) const {
  return element(state_->forward.tensors.z, begin * state_->forward.layout.channels, state_->forward.z);
}
const void* Kept::reads_too(int64_t begin) const {
  return element(state_->forward.tensors.residual, begin * state_->forward.layout.channels, state_->forward.z);
}
void* Kept::kept() const { return state_->forward.tensors.out; }
void Kept::keep(int64_t begin, int64_t end) const {
  const Layout& l = state_->forward.layout;
  state_->kernels.fwd_apply_rows(state_->forward.tensors, {l.length, begin * l.channels, end * l.channels});
}
void Kept::keep_all() const {
  const Forward& f = state_->forward;
  if (f.layout.numel() > 0) apply_all(f.layout, f.tensors, state_->kernels.fwd_apply_rows, state_->kernels.fwd_apply_planes);
}
const Tensor& Kept::y() const { return state_->forward.y; }
const Tensor& Kept::bits() const { return state_->forward.bits; }

struct AppliedBehind::State {
  Tensor y, residual, parameters;
  Layout layout;
  BnTensors tensors;
  const BnKernels& kernels;
};

AppliedBehind::AppliedBehind(Tensor& y, const Tensor& mean, const Tensor& rstd, const OptionalTensor& gamma,
                             const OptionalTensor& beta, const OptionalTensor& residual, c10::string_view act, double slope,
                             const PixelUnits* units) {
  if (residual) check_like(*residual, y, "residual");
  state_.reset(new State{y, residual ? residual->contiguous(at::MemoryFormat::ChannelsLast) : Tensor(), {}, pixel_layout(y), {},
                         kernels_for(y)});
  if (units) state_->layout.length = units->group * state_->layout.channels;
  set_arguments(state_->tensors, state_->parameters, y, state_->layout, mean, rstd, gamma, beta, std::nullopt, std::nullopt,
                state_->residual, act, slope);
  state_->tensors.out = y.mutable_data_ptr();
}
AppliedBehind::~AppliedBehind() = default;
int64_t AppliedBehind::granularity() const { return state_->layout.length / state_->layout.channels; }
std::array<const void*, 3> AppliedBehind::reads() const { return {state_->tensors.residual}; }
void AppliedBehind::take(int64_t begin, int64_t end) const {
  const Layout& l = state_->layout;
  state_->kernels.fwd_apply_rows(state_->tensors, {l.length, begin * l.channels, end * l.channels});
}
void AppliedBehind::take_all() const {
  const int64_t group = granularity(), groups = ceil_div(state_->layout.count(), group);
  at::parallel_for(0, groups, std::max<int64_t>(1, kApplyUnit / state_->layout.length), [&](int64_t begin, int64_t end) {
    take(begin * group, std::min(state_->layout.count(), end * group));
  });
}

namespace {

// Sets what the two backward phases share.
struct Backward {
  Tensor z, dy, residual, parameters;
  Layout layout;
  BnTensors tensors;

  Backward(const Tensor& dy_in, const Tensor& z_in, const Tensor& mean, const Tensor& rstd, const OptionalTensor& gamma,
           const OptionalTensor& beta, const OptionalTensor& residual_in, const OptionalTensor& bits,
           const OptionalTensor& dgamma, const OptionalTensor& dbeta, c10::string_view act, double slope) {
    check_z(z_in);
    check_like(dy_in, z_in, "dy");
    if (residual_in) check_like(*residual_in, z_in, "residual");
    z = dense(z_in);
    layout = layout_of(z);
    dy = dy_in.contiguous(layout.format);
    if (residual_in) residual = residual_in->contiguous(layout.format);
    set_arguments(tensors, parameters, z, layout, mean, rstd, gamma, beta, dgamma, dbeta, residual, act, slope);
    tensors.dy = dy.const_data_ptr();
    if (bits) {
      TORCH_CHECK(bits->numel() == layout.bit_bytes(), "bnfast: bits holds ", bits->numel(), " bytes; ", layout.bit_bytes(),
                  " belong to z of shape ", z.sizes());
      TORCH_CHECK(tensors.act != Act::kSilu && tensors.act != Act::kHardswish, "bnfast: bits is given; act '", act,
                  "' needs the residual instead");
      tensors.bits = const_cast<uint16_t*>(static_cast<const uint16_t*>(bits->const_data_ptr()));
      tensors.slope_from = Slope::kFromBits;
    } else if (residual.defined()) {
      tensors.slope_from = Slope::kFromZAndResidual;
    }
  }
};

// What bn_bwd_reduce finds: dgamma and dbeta in the accumulator's dtype.
template <class A>
struct Sums {
  std::vector<double> db, db_z;
  Tensor dgamma, dbeta;
  ChannelVector<A> rstd;

  Sums(const Backward& b, const Tensor& rstd)
      : db(b.layout.channels, 0.0),
        db_z(b.layout.channels, 0.0),
        dgamma(at::empty({b.layout.channels}, b.z.options().dtype(c10::CppTypeToScalarType<A>::value))),
        dbeta(at::empty_like(dgamma)),
        rstd(rstd) {}

  void add(double part_db, double part_db_z, int64_t c) {
    db[c] += part_db;
    db_z[c] += part_db_z;
  }

  void write(Channels channels) {
    A *dgamma_ptr = dgamma.template mutable_data_ptr<A>(), *dbeta_ptr = dbeta.template mutable_data_ptr<A>();
    for (int64_t c = channels.begin; c < channels.end; ++c) {
      dgamma_ptr[c] = db_z[c] * static_cast<double>(rstd.values[c]);
      dbeta_ptr[c] = db[c];
    }
  }
};

using MakeZ = c10::function_ref<const void*(int64_t begin, int64_t end)>;

// make, where given, makes the pixels of z.
template <class A>
std::tuple<Tensor, Tensor> reduce(const Backward& b, const Tensor& rstd, const MakeZ* make = nullptr) {
  const Layout& l = b.layout;
  const BnKernels& kernels = kernels_for(b.z);
  Sums<A> sums(b, rstd);
  const Channels all = {0, l.channels};
  if (l.numel() > 0 && l.rows) {
    const RowUnits units(l);
    Partials partials(units.units(), l.length, c10::CppTypeToScalarType<A>::value);
    A *first = partials.first_row<A>(0), *second = partials.second_row<A>(0);
    for_units(units.units(), [&](int64_t u) {
      const RowSpan span = units.span(u);
      BnTensors t = b.tensors;
      if (make) t.z = at_element((*make)(span.begin / l.channels, ceil_div(span.end, l.channels)), span.begin, b.z);
      kernels.bwd_reduce_rows(t, span, first + u * l.length, second + u * l.length);
    });
    for_partials<A>(l, units, partials, [&](A db, A db_z, int64_t, int64_t c) { sums.add(db, db_z, c); });
  } else if (l.numel() > 0) {
    const PlaneUnits units(l);
    Partials partials(units.slices, l.channels, c10::CppTypeToScalarType<A>::value);
    A *first = partials.first_row<A>(0), *second = partials.second_row<A>(0);
    for_units(units.units(), [&](int64_t u) {
      const int64_t at = units.slice(u) * l.channels;
      kernels.bwd_reduce_planes(b.tensors, units.span(u), first + at, second + at);
    });
    for_partials<A>(units, partials, all, [&](A db, A db_z, int64_t, int64_t c) { sums.add(db, db_z, c); });
  }
  sums.write(all);
  return {sums.dgamma, sums.dbeta};
}

std::tuple<Tensor, Tensor> bn_bwd_reduce(const Tensor& dy, const Tensor& z, const Tensor& mean, const Tensor& rstd,
                                         OptionalTensor gamma, OptionalTensor beta, OptionalTensor residual,
                                         OptionalTensor bits, c10::string_view act, double slope) {
  const Backward b(dy, z, mean, rstd, gamma, beta, residual, bits, std::nullopt, std::nullopt, act, slope);
  return accumulator(z) == at::kDouble ? reduce<double>(b, rstd) : reduce<float>(b, rstd);
}

// Where bn_bwd_apply writes: dz, which may be dy's own memory (an element of dy is read before that of dz is written), and
// dresidual, which is returned.
Tensor set_outputs(Backward& b, Tensor& dz, bool want_dresidual) {
  Tensor dresidual = want_dresidual ? at::empty_like(b.z) : at::empty({0}, b.z.options());
  b.tensors.out = dz.mutable_data_ptr();
  // What is written over dy is in the cache already.
  b.tensors.streams = dz.const_data_ptr() != b.tensors.dy && streams(b.layout, dz) &&
                      (!want_dresidual || streams(b.layout, dresidual));
  b.tensors.dresidual = want_dresidual ? dresidual.mutable_data_ptr() : nullptr;
  return dresidual;
}

Tensor write_dz(Backward& b, Tensor& dz, bool want_dresidual) {
  Tensor dresidual = set_outputs(b, dz, want_dresidual);
  const BnKernels& kernels = kernels_for(b.z);
  if (b.layout.numel() > 0) apply_all(b.layout, b.tensors, kernels.bwd_apply_rows, kernels.bwd_apply_planes);
  return dresidual;
}

std::tuple<Tensor, Tensor> bn_bwd_apply(const Tensor& dy, const Tensor& z, const Tensor& mean, const Tensor& rstd,
                                        OptionalTensor gamma, OptionalTensor beta, OptionalTensor residual,
                                        OptionalTensor bits, OptionalTensor dgamma, OptionalTensor dbeta,
                                        c10::string_view act, double slope, bool want_dresidual) {
  const PoolScope pooled;
  check_both(dgamma, dbeta);
  Backward b(dy, z, mean, rstd, gamma, beta, residual, bits, dgamma, dbeta, act, slope);
  Tensor dz = at::empty_like(b.z);
  Tensor dresidual = write_dz(b, dz, want_dresidual);
  return {dz, dresidual};
}

Tensor bn_bwd_apply_(Tensor& dy, const Tensor& z, const Tensor& mean, const Tensor& rstd, OptionalTensor gamma,
                     OptionalTensor beta, OptionalTensor residual, OptionalTensor bits, OptionalTensor dgamma,
                     OptionalTensor dbeta, c10::string_view act, double slope, bool want_dresidual) {
  const PoolScope pooled;
  check_both(dgamma, dbeta);
  check_writable(dy, z, residual);
  Backward b(dy, z, mean, rstd, gamma, beta, residual, bits, dgamma, dbeta, act, slope);
  Tensor dresidual = write_dz(b, b.dy, want_dresidual);
  if (!b.dy.is_same(dy)) dy.copy_(b.dy);   // dy came in another layout
  return dresidual;
}

// bn_bwd_reduce and bn_bwd_apply of planes, block of channels by block of channels.
template <class A>
std::tuple<Tensor, Tensor> reduce_and_apply(Backward& b, const Tensor& rstd) {
  const Layout& l = b.layout;
  const BnKernels& kernels = kernels_for(b.z);
  Sums<A> sums(b, rstd);
  const A *dgamma = sums.dgamma.template const_data_ptr<A>(), *dbeta = sums.dbeta.template const_data_ptr<A>();
  const PlaneUnits units(l);
  const ChannelBlocks blocks(l);
  Partials partials(units.slices, l.channels, c10::CppTypeToScalarType<A>::value);
  A *first = partials.first_row<A>(0), *second = partials.second_row<A>(0);
  const Shifts<A> shifts = {dgamma, dbeta, sums.rstd.values, static_cast<A>(l.count())};
  A *shift_db = b.parameters.mutable_data_ptr<A>() + 3 * l.channels, *shift_z = shift_db + l.channels;
  b.tensors.shift_db = shift_db;
  b.tensors.shift_z = shift_z;
  for_units(blocks.count, [&](int64_t block) {
    const Channels channels = {blocks.begin(block), blocks.end(block)};
    for (int64_t slice = 0; slice < units.slices; ++slice) {
      kernels.bwd_reduce_planes(b.tensors, blocks.part(block, units.span(slice * units.channel_units)), first + slice * l.channels,
                                second + slice * l.channels);
    }
    for_partials<A>(units, partials, channels, [&](A db, A db_z, int64_t, int64_t c) { sums.add(db, db_z, c); });
    sums.write(channels);
    for (int64_t c = channels.begin; c < channels.end; ++c) {
      shift_db[c] = shifts.db(c);
      shift_z[c] = shifts.z(c);
    }
    BnTensors t = b.tensors;
    t.ahead = blocks.ahead(block);
    for (int64_t n = l.batch; n-- > 0;) kernels.bwd_apply_planes(t, blocks.image(block, n));
  });
  return {sums.dgamma, sums.dbeta};
}

template <class A>
std::tuple<Tensor, Tensor> reduce_and_set_shifts(Backward& b, const Tensor& rstd) {
  const std::tuple<Tensor, Tensor> sums = reduce<A>(b, rstd);
  const ChannelVector<A> r(rstd);
  set_shifts<A>(b.tensors, b.parameters, b.layout,
                {std::get<0>(sums).template const_data_ptr<A>(), std::get<1>(sums).template const_data_ptr<A>(), r.values,
                 static_cast<A>(b.layout.count())});
  return sums;
}

// dz into `dz`; returns dgamma, dbeta and dresidual.
std::tuple<Tensor, Tensor, Tensor> reduce_and_write_dz(Backward& b, const Tensor& rstd, Tensor& dz, bool want_dresidual) {
  const bool is_double = accumulator(b.z) == at::kDouble;
  std::tuple<Tensor, Tensor> sums;
  if (b.layout.numel() > 0 && ChannelBlocks::serve(b.layout)) {
    Tensor dresidual = set_outputs(b, dz, want_dresidual);
    sums = is_double ? reduce_and_apply<double>(b, rstd) : reduce_and_apply<float>(b, rstd);
    return {std::get<0>(sums), std::get<1>(sums), dresidual};
  }
  sums = is_double ? reduce_and_set_shifts<double>(b, rstd) : reduce_and_set_shifts<float>(b, rstd);
  return {std::get<0>(sums), std::get<1>(sums), write_dz(b, dz, want_dresidual)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_bwd_reduce_apply(const Tensor& dy, const Tensor& z, const Tensor& mean,
                                                               const Tensor& rstd, OptionalTensor gamma, OptionalTensor beta,
                                                               OptionalTensor residual, OptionalTensor bits,
                                                               c10::string_view act, double slope, bool want_dresidual) {
  const PoolScope pooled;
  Backward b(dy, z, mean, rstd, gamma, beta, residual, bits, std::nullopt, std::nullopt, act, slope);
  Tensor dz = at::empty_like(b.z);
  auto [dgamma, dbeta, dresidual] = reduce_and_write_dz(b, rstd, dz, want_dresidual);
  return {dgamma, dbeta, dz, dresidual};
}

std::tuple<Tensor, Tensor, Tensor> bn_bwd_reduce_apply_(Tensor& dy, const Tensor& z, const Tensor& mean, const Tensor& rstd,
                                                        OptionalTensor gamma, OptionalTensor beta, OptionalTensor residual,
                                                        OptionalTensor bits, c10::string_view act, double slope,
                                                        bool want_dresidual) {
  const PoolScope pooled;
  check_writable(dy, z, residual);
  Backward b(dy, z, mean, rstd, gamma, beta, residual, bits, std::nullopt, std::nullopt, act, slope);
  auto result = reduce_and_write_dz(b, rstd, b.dy, want_dresidual);
  if (!b.dy.is_same(dy)) dy.copy_(b.dy);   // dy came in another layout
  return result;
}

// Pixels of dz, and their dresidual where it is wanted, in the order in which they lie in memory.
class DzRows final : public PixelSource {
 public:
  explicit DzRows(const Backward& b, Gate gate = {}) : b_(b), gate_(std::move(gate)), kernels_(kernels_for(b.z)) {}
  int64_t granularity() const override { return b_.layout.length / b_.layout.channels; }
  int64_t element_bytes() const override { return b_.z.element_size(); }
  void write(int64_t begin, int64_t end, void* to) const override {
    BnTensors t = b_.tensors;
    const RowSpan span = {b_.layout.length, begin * b_.layout.channels, end * b_.layout.channels};
    t.out = at_element(to, span.begin, b_.z);
    if (gate_) {
      gate_.write(kernels_, t.dy, begin, end, to);
      t.dy = t.out;
    }
    kernels_.bwd_apply_rows(t, span);
  }
  const void* reads(int64_t begin) const override { return element(b_.tensors.dy, begin * b_.layout.channels, b_.z); }
  const void* reads_too(int64_t begin) const override { return element(b_.tensors.z, begin * b_.layout.channels, b_.z); }

 private:
  const Backward& b_;
  Gate gate_;
  const BnKernels& kernels_;
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor> bn_bwd_before(const Tensor& dy, const Tensor& z, const Tensor& mean, const Tensor& rstd,
                                                 OptionalTensor gamma, OptionalTensor beta, OptionalTensor residual,
                                                 OptionalTensor bits, c10::string_view act, double slope, bool want_dresidual,
                                                 c10::function_ref<void(const PixelSource&)> consume) {
  pixel_layout(z);
  Backward b(dy, z, mean, rstd, gamma, beta, residual, bits, std::nullopt, std::nullopt, act, slope);
  auto [dgamma, dbeta] = reduce_and_set_shifts<float>(b, rstd);
  Tensor dresidual = want_dresidual ? at::empty_like(b.z) : at::empty({0}, b.z.options());
  b.tensors.dresidual = want_dresidual ? dresidual.mutable_data_ptr() : nullptr;
  consume(DzRows(b));
  return {dgamma, dbeta, dresidual};
}

std::tuple<Tensor, Tensor> bn_bwd_reduce_of(const Tensor& dy_in, const Tensor& mean, const Tensor& rstd, const OptionalTensor& gamma,
                                            const OptionalTensor& beta, c10::string_view act, double slope, MakeZ make) {
  const Tensor dy = dy_in.contiguous(at::MemoryFormat::ChannelsLast);
  pixel_layout(dy);
  // dy stands for z, which is like it.
  return reduce<float>(Backward(dy, dy, mean, rstd, gamma, beta, std::nullopt, std::nullopt, std::nullopt, std::nullopt, act, slope),
                       rstd, &make);
}

struct Dz::State {
  Backward backward;
  DzRows rows;
  State(Backward&& b, Gate&& gate) : backward(std::move(b)), rows(backward, std::move(gate)) {}
};

Dz::Dz(const Tensor& dy, const Tensor& z_in, const Tensor& mean, const Tensor& rstd, const OptionalTensor& gamma,
       const OptionalTensor& beta, const Tensor& dgamma, const Tensor& dbeta, c10::string_view act, double slope,
       const OptionalTensor& gate, const OptionalTensor& shift) {
  const Tensor z = z_in.contiguous(at::MemoryFormat::ChannelsLast);
  pixel_layout(z);
  TORCH_CHECK(gate.has_value() || !shift.has_value(), "bnfast: shift is given without gate");
  state_.reset(new State(Backward(dy, z, mean, rstd, gamma, beta, std::nullopt, std::nullopt, dgamma, dbeta, act, slope),
                         gate ? Gate(*gate, shift, z) : Gate()));
}
Dz::~Dz() = default;
int64_t Dz::granularity() const { return state_->rows.granularity(); }
int64_t Dz::element_bytes() const { return state_->rows.element_bytes(); }
void Dz::write(int64_t begin, int64_t end, void* to) const { state_->rows.write(begin, end, to); }
const void* Dz::reads(int64_t begin) const { return state_->rows.reads(begin); }
const void* Dz::reads_too(int64_t begin) const { return state_->rows.reads_too(begin); }

struct BehindDgrad::State {
  Tensor dx, add, z, z_beside, parameters, mean_beside, rstd_below, rstd_beside, partials;
  Layout layout;
  RowUnits units;
  BnTensors tensors;
  const BnKernels& kernels;

  float* part(int64_t unit) const { return partials.mutable_data_ptr<float>() + unit * 3 * units.length; }
};

BehindDgrad::BehindDgrad(Tensor& dx, const OptionalTensor& add, const BelowUnit& below, const PixelUnits* units) {
  const Layout l = pixel_layout(dx);
  state_.reset(new State{dx, {}, {}, {}, {}, {}, {}, {}, {}, l, units ? RowUnits(l, *units) : RowUnits(l), {}, kernels_for(dx)});
  State& s = *state_;
  BnTensors& t = s.tensors;
  const auto taken = [&](const OptionalTensor& given, const char* name) {
    TORCH_CHECK(given->sizes() == dx.sizes() && given->scalar_type() == dx.scalar_type(), "bnfast: ", name, " is ",
                given->scalar_type(), " ", given->sizes(), "; it must be ", dx.scalar_type(), " ", dx.sizes(), " as dx is");
    return given->contiguous(l.format);
  };
  t.dy = t.out = dx.mutable_data_ptr();
  if (add) t.add = (s.add = taken(add, "add")).const_data_ptr();
  TORCH_CHECK(below.z.has_value() == below.mean.has_value() && below.z.has_value() == below.rstd.has_value(),
              "bnfast: z_below, mean_below and rstd_below must all be given or all be None");
  TORCH_CHECK(below.z_beside.has_value() == below.mean_beside.has_value() &&
                  below.z_beside.has_value() == below.rstd_beside.has_value() && (below.z || !below.z_beside),
              "bnfast: z_beside, mean_beside and rstd_beside must all be given, beside a z_below, or all be None");
  if (!below.z) return;
  s.z = taken(below.z, "z_below");
  s.layout.length = s.units.length;
  set_arguments(t, s.parameters, s.z, s.layout, below.mean, below.rstd, below.gamma, below.beta, std::nullopt, std::nullopt, Tensor(),
                below.act, below.slope);
  s.rstd_below = *below.rstd;
  if (below.bits) {
    TORCH_CHECK(below.bits->numel() == l.bit_bytes(), "bnfast: bits holds ", below.bits->numel(), " bytes; ", l.bit_bytes(),
                " belong to z of shape ", s.z.sizes());
    TORCH_CHECK(t.act != Act::kSilu && t.act != Act::kHardswish, "bnfast: bits is given; act_below '", below.act, "' has none");
    t.bits = const_cast<uint16_t*>(static_cast<const uint16_t*>(below.bits->const_data_ptr()));
    t.slope_from = Slope::kFromBits;
  }
  if (below.z_beside) {
    t.z_beside = (s.z_beside = taken(below.z_beside, "z_beside")).const_data_ptr();
    check_vector(below.mean_beside, dx, "mean_beside");
    check_vector(below.rstd_beside, dx, "rstd_beside");
    const ChannelVector<float> mean(below.mean_beside);
    s.mean_beside = at::empty({s.units.length}, at::kFloat);
    t.mean_beside = lay_out(s.layout, s.mean_beside.mutable_data_ptr<float>(), [&](int64_t c) { return mean.values[c]; });
    s.rstd_beside = *below.rstd_beside;
  }
  s.partials = at::empty({s.units.units(), 3, s.units.length}, at::kFloat);
}
BehindDgrad::~BehindDgrad() = default;
int64_t BehindDgrad::units() const { return state_->units.units(); }
int64_t BehindDgrad::granularity() const { return state_->units.length / state_->layout.channels; }
int64_t BehindDgrad::begin(int64_t unit) const { return state_->units.borders[unit] / state_->layout.channels; }
int64_t BehindDgrad::end(int64_t unit) const { return begin(unit + 1); }
std::array<const void*, 3> BehindDgrad::reads() const {
  const BnTensors& t = state_->tensors;
  return {t.z, t.add, t.z_beside};
}

int64_t BehindDgrad::cycles(int64_t pixels) const {
  const State& s = *state_;
  return s.z.defined() ? ceil_div(pixels * s.layout.channels, kBlockLanes) * bwd_reduce_cycles(s.tensors.act) : 0;
}

void BehindDgrad::take(int64_t unit, int64_t first, int64_t last, Upcoming& upcoming) const {
  const State& s = *state_;
  const RowSpan span = {s.units.length, first * s.layout.channels, last * s.layout.channels};
  if (s.z.defined()) {
    if (first == begin(unit)) std::fill(s.part(unit), s.part(unit) + 3 * s.units.length, 0.0f);
    BnTensors t = s.tensors;
    t.upcoming = &upcoming;
    s.kernels.bwd_join_rows(t, span, s.part(unit));
  } else if (s.add.defined()) {
    s.kernels.add_rows(s.tensors, span);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> BehindDgrad::sums() const {
  const State& s = *state_;
  const auto none = [&] { return at::empty({0}, at::kFloat); };
  if (!s.z.defined()) return {none(), none(), none(), none()};
  const int64_t channels = s.layout.channels, length = s.units.length;
  std::vector<double> sums(3 * channels, 0.0);
  for (int64_t u = 0; u < s.units.units(); ++u) {
    const int64_t filled = s.units.is_tail(u) ? s.units.tail : length;
    for (int64_t i = 0; i < 3; ++i) {
      const float* from = s.part(u) + i * length;
      for (int64_t j = 0, c = 0; j < filled; ++j, c = c + 1 == channels ? 0 : c + 1) sums[i * channels + c] += from[j];
    }
  }
  const auto vector = [&](int64_t i, const Tensor& rstd_of) {
    Tensor result = at::empty({channels}, at::kFloat);
    const OptionalTensor given = rstd_of.defined() ? OptionalTensor(rstd_of) : std::nullopt;
    const ChannelVector<float> rstd(given);
    float* to = result.mutable_data_ptr<float>();
    for (int64_t c = 0; c < channels; ++c) {
      to[c] = sums[i * channels + c] * (rstd.values ? static_cast<double>(rstd.values[c]) : 1.0);
    }
    return result;
  };
  const Tensor dbeta = vector(0, Tensor()), dgamma = vector(1, s.rstd_below);
  if (!s.z_beside.defined()) return {dgamma, dbeta, none(), none()};
  return {dgamma, dbeta, vector(2, s.rstd_beside), vector(0, Tensor())};
}

namespace {

// Sums over the pixels of each image of a tensor in channels_last, [N, count, C]: run(span, to) writes count arrays of C. A unit of work
// is a piece of one image; the pieces are added in their order.
template <class F>
Tensor sums_of_images(const Layout& l, int64_t count, const at::TensorOptions& options, F run) {
  if (l.numel() == 0) return at::zeros({l.batch, count, l.channels}, options);
  const int64_t pieces = ceil_div(l.plane * l.channels, kUnit), per_piece = ceil_div(l.plane, pieces);
  Tensor parts = at::empty({l.batch, pieces, count, l.channels}, options);
  char* to = static_cast<char*>(parts.mutable_data_ptr());
  const int64_t step = count * l.channels * parts.element_size();
  for_units(l.batch * pieces, [&](int64_t u) {
    const int64_t image = u / pieces * l.plane, first = u % pieces * per_piece;
    const int64_t last = std::min(l.plane, first + per_piece);
    run(PixelSpan{l.channels, image + std::min(first, last), image + last}, to + u * step);
  });
  return pieces == 1 ? parts.squeeze(1) : parts.sum(1);
}

Tensor se_bwd_reduce(const Tensor& dy_in, const Tensor& z_in, OptionalTensor mean, OptionalTensor rstd, OptionalTensor gamma,
                     OptionalTensor beta, c10::string_view act, double slope) {
  check_z(z_in);
  check_like(dy_in, z_in, "dy");
  const Tensor z = dense(z_in);
  Layout l = layout_of(z);
  const Tensor dy = dy_in.contiguous(l.format);
  l.rows = l.inner == 1;
  l.length = l.channels;
  Tensor parameters;
  BnTensors t;
  set_arguments(t, parameters, z, l, mean, rstd, gamma, beta, std::nullopt, std::nullopt, Tensor(), act, slope);
  t.dy = dy.const_data_ptr();
  const BnKernels& kernels = kernels_for(z);
  const auto options = z.options().dtype(accumulator(z)).memory_format(at::MemoryFormat::Contiguous);
  if (l.numel() == 0) return at::zeros({l.batch, l.channels}, options);
  if (!l.rows) {
    Tensor sums = at::empty({l.batch, l.channels}, options);
    const int64_t together = std::max<int64_t>(1, kApplyUnit / l.plane), blocks = ceil_div(l.channels, together);
    for_units(l.batch * blocks, [&](int64_t u) {
      const int64_t n = u / blocks, c = u % blocks * together;
      kernels.se_reduce_planes(t, {l.channels, l.plane, n, n + 1, c, std::min(l.channels, c + together), 0, l.plane},
                               sums.mutable_data_ptr());
    });
    return sums;
  }
  return sums_of_images(l, 1, options, [&](PixelSpan span, void* sums) { kernels.se_reduce_pixels(t, span, sums); }).squeeze(1);
}

// z in channels_last and float32 with the parameters of its unit, for the phases of squeeze and excitation that a chain joins.
struct SqueezedUnit {
  Tensor z, parameters;
  Layout layout;
  BnTensors tensors;

  SqueezedUnit(const Tensor& z_in, const Tensor& mean, const Tensor& rstd, const OptionalTensor& gamma, const OptionalTensor& beta,
               c10::string_view act, double slope)
      : z(z_in.contiguous(at::MemoryFormat::ChannelsLast)), layout(pixel_layout(z)) {
    TORCH_CHECK(z.scalar_type() == at::kFloat, "bnfast: z is ", z.scalar_type(), "; float32 is needed");
    layout.length = layout.channels;
    set_arguments(tensors, parameters, z, layout, mean, rstd, gamma, beta, std::nullopt, std::nullopt, Tensor(), act, slope);
  }
  at::TensorOptions options() const { return z.options().memory_format(at::MemoryFormat::Contiguous); }
};

Tensor se_fwd_reduce(const Tensor& z, const Tensor& mean, const Tensor& rstd, const OptionalTensor& gamma, const OptionalTensor& beta,
                     c10::string_view act, double slope) {
  const SqueezedUnit u(z, mean, rstd, gamma, beta, act, slope);
  const BnKernels& kernels = kernels_for(u.z);
  Tensor sums = sums_of_images(u.layout, 1, u.options(), [&](PixelSpan span, void* to) { kernels.se_reduce_pixels(u.tensors, span, to); });
  return sums.squeeze(1).div_(std::max<int64_t>(1, u.layout.plane));
}

Tensor se_bwd_sums(const Tensor& dy_in, const Tensor& z, const Tensor& mean, const Tensor& rstd, const OptionalTensor& gamma,
                   const OptionalTensor& beta, c10::string_view act, double slope) {
  check_like(dy_in, z, "dy");
  SqueezedUnit u(z, mean, rstd, gamma, beta, act, slope);
  const Tensor dy = dy_in.contiguous(at::MemoryFormat::ChannelsLast);
  u.tensors.dy = dy.const_data_ptr();
  const BnKernels& kernels = kernels_for(u.z);
  return sums_of_images(u.layout, 5, u.options(), [&](PixelSpan span, void* to) { kernels.se_bwd_sums(u.tensors, span, to); });
}

}  // namespace

TORCH_LIBRARY_IMPL(bnfast, CPU, m) {
  m.impl("bn_fwd_reduce", &bn_fwd_reduce);
  m.impl("bn_fwd_apply", &bn_fwd_apply);
  m.impl("bn_fwd_reduce_apply", &bn_fwd_reduce_apply);
  m.impl("bn_bwd_reduce", &bn_bwd_reduce);
  m.impl("bn_bwd_apply", &bn_bwd_apply);
  m.impl("bn_bwd_apply_", &bn_bwd_apply_);
  m.impl("bn_bwd_reduce_apply", &bn_bwd_reduce_apply);
  m.impl("bn_bwd_reduce_apply_", &bn_bwd_reduce_apply_);
  m.impl("se_bwd_reduce", &se_bwd_reduce);
  m.impl("se_fwd_reduce", &se_fwd_reduce);
  m.impl("se_bwd_sums", &se_bwd_sums);
}

}  // namespace bnfast
