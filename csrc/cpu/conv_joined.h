// What runs behind a convolution that is cut into units of pixels, unit by unit while each is in the cache. A Conv has
//   y                       its result, in channels_last
//   pixels()                its units as pixels of y (PixelUnits), or nothing where they cannot be reduced one by one
//   is_split()              whether a unit cannot be computed alone
//   unit(u), all()          computes one unit, or everything on all threads
// or, in place of unit(u),
//   unit(u, cycles, upcoming)   leaves in upcoming what is fetched beside what follows, which takes so many cycles
//   unit_in_pieces(u, cycles, take)   the same where what follows takes piece by piece
//   set_behind(tensors)     optional: tensors of y's shape that are read behind each unit
//   finds_moments(), unit(u, mean, m2), all(mean, m2)   optional: whether units can leave their own moments, and such that do
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "bn_fused.h"

namespace bnfast {

// Units as pixels: unit u ends where border(u + 1) says, of an image out_width pixels wide with so many channels. Nothing where one of
// them would end inside of a group of 16 elements.
template <class F>
std::optional<PixelUnits> pixel_units(int64_t channels, int64_t out_width, int64_t units, F border) {
  constexpr int64_t kLanes = 16, kGroup = 64;   // elements of a row of a reduction, at least where it can be
  int64_t group = kLanes / std::gcd(channels, kLanes);
  if (out_width % group != 0) return std::nullopt;
  while (group * channels < kGroup && out_width % (2 * group) == 0) group *= 2;
  PixelUnits result = {group, {}};
  for (int64_t u = 0; u <= units; ++u) result.borders.push_back(border(u));
  return result;
}

// Computes unit u, the pixels [begin, end), and take(first, last, upcoming) of them, which takes cycles(pixels).
template <class Conv, class Cycles, class Take>
void unit_then(const Conv& conv, int64_t u, int64_t begin, int64_t end, Cycles cycles, Take take) {
  if constexpr (requires { conv.unit_in_pieces(u, cycles, take); }) {
    conv.unit_in_pieces(u, cycles, take);
  } else {
    Upcoming nothing;
    conv.unit(u);
    take(begin, end, nothing);
  }
}

// bn_fwd_reduce of the result. Returns z, mean, rstd.
template <class Conv>
std::tuple<at::Tensor, at::Tensor, at::Tensor> reduced_behind(const Conv& conv, OptionalTensor running_mean, OptionalTensor running_var,
                                                              OptionalTensor num_batches_tracked, std::optional<double> momentum,
                                                              double eps) {
  std::optional<PixelUnits> units = conv.pixels();
  // One channel: its reduction sees a plane, not pixels.
  const bool at_once = !units || conv.is_split() || conv.y.size(1) == 1;
  bool finds_moments = false;
  if constexpr (requires { conv.finds_moments(); }) finds_moments = units && conv.finds_moments();
  if (finds_moments) units->group = 1;   // a value per channel, not per place of a group
  const int64_t channels = conv.y.size(1);
  std::vector<double> means, m2s;   // of units that were computed at once
  if (at_once && conv.y.numel() > 0) {
    if (finds_moments) {
      means.resize((units->borders.size() - 1) * channels);
      m2s.resize(means.size());
    }
    if constexpr (requires { conv.all(means.data(), m2s.data()); }) finds_moments ? conv.all(means.data(), m2s.data()) : conv.all();
    else conv.all();
  }
  auto [mean, rstd] = bn_fwd_reduce_behind(
      conv.y, units ? &*units : nullptr,
      [&](int64_t unit, int64_t begin, int64_t end, Upcoming& upcoming, double* unit_mean, double* unit_m2) {
        if (at_once && finds_moments) {
          std::copy_n(means.data() + unit * channels, channels, unit_mean);
          std::copy_n(m2s.data() + unit * channels, channels, unit_m2);
        }
        if (at_once) return finds_moments;
        if constexpr (requires { conv.unit(unit, unit_mean, unit_m2); }) {
          if (finds_moments) {
            conv.unit(unit, unit_mean, unit_m2);
            return true;
          }
        }
        const int64_t cycles = (end - begin) * channels / 16 * kFwdReduceCycles;
        if constexpr (requires { conv.unit(unit, cycles, upcoming); }) conv.unit(unit, cycles, upcoming);
        else conv.unit(unit);
        return false;
      },
      running_mean, running_var, num_batches_tracked, momentum, eps);
  return {conv.y, mean, rstd};
}

// bn_fwd_apply of the result in its own memory.
template <class Conv>
at::Tensor applied_behind(Conv& conv, const at::Tensor& mean, const at::Tensor& rstd, const OptionalTensor& gamma,
                          const OptionalTensor& beta, const OptionalTensor& residual, c10::string_view act, double slope) {
  const std::optional<PixelUnits> units = conv.pixels();
  const bool at_once = !units || conv.is_split();
  const AppliedBehind behind(conv.y, mean, rstd, gamma, beta, residual, act, slope, at_once ? nullptr : &*units);
  if (conv.y.numel() == 0) return conv.y;
  if (at_once) {
    conv.all();
    behind.take_all();
    return conv.y;
  }
  if constexpr (requires { conv.set_behind(behind.reads()); }) conv.set_behind(behind.reads());
  at::parallel_for(0, static_cast<int64_t>(units->borders.size()) - 1, 1, [&](int64_t begin, int64_t end) {
    for (int64_t u = begin; u < end; ++u) {
      unit_then(conv, u, units->borders[u], units->borders[u + 1], [](int64_t) { return 0; },
                [&](int64_t first, int64_t last, Upcoming&) { behind.take(first, last); });
    }
  });
  return conv.y;
}

// What follows a data gradient. Returns dx, dgamma and dbeta of the unit below, and of the one beside it.
template <class Conv>
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> dgrad_reduced_behind(Conv& conv, const OptionalTensor& add,
                                                                                            const BelowUnit& below) {
  const std::optional<PixelUnits> units = conv.pixels();
  const BehindDgrad behind(conv.y, add, below, units ? &*units : nullptr);
  if constexpr (requires { conv.set_behind(behind.reads()); }) conv.set_behind(behind.reads());
  if (conv.y.numel() > 0) {
    const bool at_once = !units || conv.is_split();
    if (at_once) conv.all();
    at::parallel_for(0, behind.units(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t u = begin; u < end; ++u) {
        const auto take = [&](int64_t first, int64_t last, Upcoming& upcoming) { behind.take(u, first, last, upcoming); };
        Upcoming nothing;
        if (at_once) take(behind.begin(u), behind.end(u), nothing);
        else unit_then(conv, u, behind.begin(u), behind.end(u), [&](int64_t pixels) { return behind.cycles(pixels); }, take);
      }
    });
  }
  auto [dgamma_below, dbeta_below, dgamma_beside, dbeta_beside] = behind.sums();
  return {conv.y, dgamma_below, dbeta_below, dgamma_beside, dbeta_beside};
}

}  // namespace bnfast
