// conv_fwd and conv_dgrad of depthwise convolutions of any kernel, stride and dilation (conv_depthwise.h).
// [read x once per tap that meets it, from the cache, write y] per element of y. Neighbouring outputs share the load of a tap.
#pragma once

#include <algorithm>

#include "conv_depthwise.h"
#include "input_rows.h"
#include "runs_ahead.h"
#include "vec.h"

namespace bnfast::BNFAST_NAMESPACE {

constexpr int kTogether = 4;           // outputs of a row that are computed together
constexpr int64_t kChannelsAtOnce = 64;   // of a row: their taps stay in the L1 cache

constexpr int kLinesPerTap = 2;        // calls of RunsAhead::line() beside a tap

// The taps of an output, each with the input that it meets.
template <class T>
struct MetTaps {
  const T* x[kMostTaps];
  const acc_t<T>* tap[kMostTaps];
  int count = 0;
};

// kCount outputs at steps of y_step, for some channels, in front of which there are `before` others; the inputs of one lie x_step
// behind those of the one before. The last channels are computed together with some in front of them, which come out the same again.
template <int kCount, class T>
BNFAST_INLINE void depthwise_tile(const MetTaps<T>& met, int64_t offset, int64_t x_step, const acc_t<T>* bias, T* y, int64_t y_step,
                                  int64_t channels, int64_t before, RunsAhead& ahead) {
  using B = Block<acc_t<T>>;
  const auto block = [&](int64_t c, auto lanes) BNFAST_INLINE_LAMBDA {
    B sum[kCount];
    for (int o = 0; o < kCount; ++o) sum[o] = bias ? load(bias + c, lanes) : B(0);
    for (int i = 0; i < met.count; ++i) {
      const T* x = met.x[i] + offset + c;
      for (int l = 0; l < kLinesPerTap; ++l) ahead.line();
      const B tap = load(met.tap[i] + c, lanes);
      for (int o = 0; o < kCount; ++o) sum[o] = sum[o] + load(x + o * x_step, lanes) * tap;
    }
    for (int o = 0; o < kCount; ++o) store(y + o * y_step + c, sum[o], lanes);
  };
  int64_t c = 0;
  for (; c + kBlock <= channels; c += kBlock) block(c, Whole{});
  if (c == channels) return;
  if (before + channels >= kBlock) block(channels - kBlock, Whole{});
  else block(c, First{channels - c});
}

template <class T>
void depthwise_rows(const DepthwiseConv& d, int64_t begin, int64_t end, void* scratch, MadeRows& made) {
  using A = acc_t<T>;
  const DepthwiseSide &down = d.down, &across = d.across;
  const int64_t channels = d.channels, phases = across.phases(), x_step = across.advance() * channels, y_step = phases * channels;
  InputRows<T> input(d.x, d.source, channels, down.in, across.in, down.reach(), scratch, made);
  const int64_t in_bytes = across.in * channels * sizeof(T), out_bytes = across.out * channels * sizeof(T);
  const int64_t tiles = (across.out + kTogether - 1) / kTogether * ((channels + kBlock - 1) / kBlock);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t image = row / down.out, h = row % down.out;
    const T* lines[kMostTaps];
    input.make(image, down.first(h), down.last(h));
    for (int64_t k = 0; k < down.kernel; ++k) lines[k] = input(image, down.place(h, k));
    // What the next row of the image reads and writes, and what is read behind this one.
    Run runs[6];
    int run_count = 0;
    const auto fetch = [&](const void* tensor, int64_t first, int64_t count, int64_t bytes) {
      if (tensor && count > 0) runs[run_count++] = {static_cast<const char*>(tensor) + first * bytes, count * bytes};
    };
    if (h + 1 < down.out) {
      const int64_t next = down.last(h) + 1, count = down.last(h + 1) - down.last(h), at = image * down.in + next;
      fetch(d.source ? d.source->reads(0) : d.x, at, count, in_bytes);
      if (d.source) fetch(d.source->reads_too(0), at, count, in_bytes);
      fetch(d.y, row + 1, 1, out_bytes);
    }
    for (const void* tensor : d.behind) fetch(tensor, row, 1, out_bytes);
    RunsAhead ahead(runs, run_count, tiles * down.kernel * across.kernel * kLinesPerTap / (phases * phases));
    for (int64_t c = 0; c < channels; c += kChannelsAtOnce) {
      const int64_t width = std::min(kChannelsAtOnce, channels - c);
      const A* const bias = d.bias ? static_cast<const A*>(d.bias) + c : nullptr;
      for (int64_t r = 0; r < d.run_count; ++r) {
        const DepthwiseRun& run = d.runs[r];
        MetTaps<T> met;
        for (int64_t i = 0; i < down.kernel; ++i) {
          for (int64_t j = 0; lines[i] && j < across.kernel; ++j) {
            if (run.place[j] < 0) continue;
            met.x[met.count] = lines[i] + run.place[j] * channels + c;
            met.tap[met.count++] = static_cast<const A*>(d.taps) + (i * across.kernel + j) * channels + c;
          }
        }
        T* const y = static_cast<T*>(d.y) + (row * across.out + run.first) * channels + c;
        int64_t k = 0;
        for (; k + kTogether <= run.count; k += kTogether) {
          depthwise_tile<kTogether>(met, k * x_step, x_step, bias, y + k * y_step, y_step, width, c, ahead);
        }
        for (; k < run.count; ++k) depthwise_tile<1>(met, k * x_step, x_step, bias, y + k * y_step, y_step, width, c, ahead);
      }
    }
  }
}

template <class T>
constexpr DepthwiseKernels depthwise_kernels() {
  return {depthwise_rows<T>};
}

}  // namespace bnfast::BNFAST_NAMESPACE
