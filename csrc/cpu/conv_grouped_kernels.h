// conv_fwd and conv_dgrad of depthwise convolutions and those of narrow groups, of any kernel, stride and dilation (conv_grouped.h).
// [read x once per tap that meets it, from the cache, write y] per element of y. Neighbouring outputs share the load of a tap.
#pragma once

#include <algorithm>
#include <array>

#include "conv_grouped.h"
#include "gemm_kernels.h"
#include "input_rows.h"
#include "runs_ahead.h"
#include "vec.h"

namespace bnfast::BNFAST_NAMESPACE {

constexpr int64_t kChannelsAtOnce = 64, kTapsAtOnce = 256;   // of a row: at most, and times the channels of a group

// Outputs of a row that are computed together, as the registers have room for them.
constexpr int together(int width) {
  return BNFAST_VECTOR_BYTES == 64 ? 8 : width == 1 ? 4 : BNFAST_VECTOR_BYTES == 32 ? 2 : 1;
}

// The taps of an output, each with the input that it meets.
template <class T>
struct MetTaps {
  const T* x[kMostTaps];
  const acc_t<T>* tap[kMostTaps];   // of the first channel of a group
  int count = 0;
};

// Lane l of each part takes the i-th channel of its group.
template <int kWidth, int i>
struct Spread {
  static constexpr int kLanes = FloatBlock::kLanes;
  alignas(64) static constexpr auto kFrom = [] {
    std::array<int32_t, kLanes> from = {};
    for (int l = 0; l < kLanes; ++l) from[l] = kWidth <= kLanes ? l - l % kWidth + i : i % kLanes;
    return from;
  }();
  static BNFAST_INLINE FloatBlock of(const FloatBlock& x) {
    return FloatBlock::make([&](int p) BNFAST_INLINE_LAMBDA {
      const FloatVec& part = x.part[kWidth <= kLanes ? p : (p * kLanes / kWidth * kWidth + i) / kLanes];
#if defined(__x86_64__) && BNFAST_VECTOR_BYTES == 64
      return (FloatVec)_mm512_permutexvar_ps(_mm512_load_si512(kFrom.data()), (__m512)part);
#elif defined(__x86_64__) && BNFAST_VECTOR_BYTES == 32
      return (FloatVec)_mm256_permutevar8x32_ps((__m256)part, _mm256_load_si256((const __m256i*)kFrom.data()));
#else
      FloatVec result;
      for (int l = 0; l < kLanes; ++l) result[l] = part[kFrom[l]];
      return result;
#endif
    });
  }
};

BNFAST_INLINE FloatBlock fma(const FloatBlock& a, const FloatBlock& b, const FloatBlock& c) {
  return FloatBlock::make([&](int p) BNFAST_INLINE_LAMBDA { return fma(a.part[p], b.part[p], c.part[p]); });
}
BNFAST_INLINE Block<double> fma(const Block<double>& a, const Block<double>& b, const Block<double>& c) { return a * b + c; }
BNFAST_INLINE FloatBlock fma(float a, const FloatBlock& b, const FloatBlock& c) {
  return FloatBlock::make([&](int p) BNFAST_INLINE_LAMBDA { return fma(broadcast(a), b.part[p], c.part[p]); });
}

// kCount outputs at steps of y_step, for some channels of all_channels, in front of which there are `before` others; the inputs of one lie
// x_step behind those of the one before. The last channels are computed together with some in front of them, which come out the same again.
template <int kWidth, int kCount, class T>
BNFAST_INLINE void grouped_tile(const MetTaps<T>& met, int64_t all_channels, int64_t offset, int64_t x_step, const acc_t<T>* bias, T* y,
                                int64_t y_step, int64_t channels, int64_t before, RunsAhead& ahead) {
  using B = Block<acc_t<T>>;
  // Of a few outputs more sums than one each, which do not wait for one another.
  constexpr int kSums = std::clamp(4 / kCount, 1, kWidth);
  const auto block = [&](int64_t c, auto lanes) BNFAST_INLINE_LAMBDA {
    auto walk = ahead.walk();
    B sum[kCount * kSums];
    for (int o = 0; o < kCount * kSums; ++o) sum[o] = bias && o < kCount ? load(bias + c, lanes) : B(0);
    for (int i = 0; i < met.count; ++i) {
      const T* x = met.x[i] + offset + c;
      const acc_t<T>* tap = met.tap[i] + c;
      if constexpr (kWidth == 1) {
        walk.line();
        const B factor = load(tap, lanes);
        for (int o = 0; o < kCount; ++o) sum[o] = fma(load(x + o * x_step, lanes), factor, sum[o]);
      } else {
        constexpr bool kIsBroadcast = kWidth == kBlock && std::is_same_v<T, float>;
        B value[kCount];
        for (int o = 0; o < kCount && !kIsBroadcast; ++o) value[o] = load(x + o * x_step, lanes);
        unrolled<kWidth>([&](auto j) BNFAST_INLINE_LAMBDA {
          walk.line();
          const B factor = load(tap + j * all_channels, lanes);
          unrolled<kCount>([&](auto o) BNFAST_INLINE_LAMBDA {
            B& s = sum[j % kSums * kCount + o];
            // A group that fills a block: its channel is one number, which a load repeats.
            if constexpr (kIsBroadcast) s = fma(x[o * x_step + j], factor, s);
            else s = fma(Spread<kWidth, j>::of(value[o]), factor, s);
          });
        });
      }
    }
    ahead.walked(walk);
    for (int o = 0; o < kCount; ++o) {
      for (int k = 1; k < kSums; ++k) sum[o] = sum[o] + sum[k * kCount + o];
      store(y + o * y_step + c, sum[o], lanes);
    }
  };
  int64_t c = 0;
  for (; c + kBlock <= channels; c += kBlock) block(c, Whole{});
  if (c == channels) return;
  if (before + channels >= kBlock) block(channels - kBlock, Whole{});
  else block(c, First{channels - c});
}

// The outputs of a run, from output k on kCount at a time; what is left over by smaller tiles.
template <int kWidth, int kCount, class T>
BNFAST_INLINE void grouped_run(const MetTaps<T>& met, int64_t all_channels, int64_t k, int64_t count, int64_t x_step, const acc_t<T>* bias,
                               T* y, int64_t y_step, int64_t channels, int64_t before, RunsAhead& ahead) {
  for (; k + kCount <= count; k += kCount) {
    grouped_tile<kWidth, kCount>(met, all_channels, k * x_step, x_step, bias, y + k * y_step, y_step, channels, before, ahead);
  }
  if constexpr (kCount > 1) {
    grouped_run<kWidth, kCount / 2>(met, all_channels, k, count, x_step, bias, y, y_step, channels, before, ahead);
  }
}

template <int kWidth, class T>
void grouped_rows_of(const GroupedConv& d, int64_t begin, int64_t end, void* scratch, MadeRows& made, Upcoming& upcoming) {
  using A = acc_t<T>;
  const GroupedSide &down = d.down, &across = d.across;
  const int64_t channels = d.channels, phases = across.phases(), x_step = across.advance() * channels, y_step = phases * channels;
  InputRows<T> input(d.x, d.source, channels, down.in, across.in, down.reach(), scratch, made);
  constexpr int kTogether = together(kWidth);
  constexpr int64_t kAtOnce = std::min(kChannelsAtOnce, kTapsAtOnce / kWidth);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t image = row / down.out, h = row % down.out;
    const T* lines[kMostTaps];
    input.make(image, down.first(h), down.last(h));
    for (int64_t k = 0; k < down.kernel; ++k) lines[k] = input(image, down.place(h, k));
    RunsAhead ahead(&upcoming, &Upcoming::beside_product, kTogether * 0.625);   // see GroupedConv::cycles
    for (int64_t c = 0; c < channels; c += kAtOnce) {
      const int64_t width = std::min(kAtOnce, channels - c);
      const A* const bias = d.bias ? static_cast<const A*>(d.bias) + c : nullptr;
      for (int64_t r = 0; r < d.run_count; ++r) {
        const GroupedRun& run = d.runs[r];
        MetTaps<T> met;
        for (int64_t i = 0; i < down.kernel; ++i) {
          for (int64_t j = 0; lines[i] && j < across.kernel; ++j) {
            if (run.place[j] < 0) continue;
            met.x[met.count] = lines[i] + run.place[j] * channels + c;
            met.tap[met.count++] = static_cast<const A*>(d.taps) + (i * across.kernel + j) * kWidth * channels + c;
          }
        }
        T* const y = static_cast<T*>(d.y) + (row * across.out + run.first) * channels + c;
        grouped_run<kWidth, kTogether>(met, channels, 0, run.count, x_step, bias, y, y_step, width, c, ahead);
      }
    }
  }
}

template <class T>
void grouped_rows(const GroupedConv& d, int64_t begin, int64_t end, void* scratch, MadeRows& made, Upcoming& upcoming) {
  if constexpr (std::is_same_v<T, float> || std::is_same_v<T, bf16>) {
    switch (d.width) {
      case 2: return grouped_rows_of<2, T>(d, begin, end, scratch, made, upcoming);
      case 4: return grouped_rows_of<4, T>(d, begin, end, scratch, made, upcoming);
      case 8: return grouped_rows_of<8, T>(d, begin, end, scratch, made, upcoming);
      case 16: return grouped_rows_of<16, T>(d, begin, end, scratch, made, upcoming);
    }
  }
  grouped_rows_of<1, T>(d, begin, end, scratch, made, upcoming);
}

template <class T>
constexpr GroupedKernels grouped_kernels() {
  return {grouped_rows<T>};
}

}  // namespace bnfast::BNFAST_NAMESPACE
