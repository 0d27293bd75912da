// conv_dgrad of depthwise convolutions of any stride: each dx is the sum of the few dz that its pixel reached.
// Reads dz once per tap that meets it (from the cache), writes dx once: [read dz, write dx] per element of dx.
#pragma once

#include "conv_depthwise.h"
#include "vec.h"

namespace bnfast::BNFAST_NAMESPACE {

// Calls f(tap, output place) for the taps that connect the input place `in` with an output place.
template <class F>
BNFAST_INLINE void for_taps(int64_t in, int64_t taps, int64_t stride, int64_t padding, int64_t dilation, int64_t outs, F f) {
  for (int64_t k = 0; k < taps; ++k) {
    const int64_t reach = in + padding - k * dilation;
    if (reach >= 0 && reach % stride == 0 && reach / stride < outs) f(k, reach / stride);
  }
}

template <class T>
void depthwise_dgrad_rows(const DepthwiseDgrad& d, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  constexpr int64_t kMaxTaps = 64;   // of one pixel; the operator refuses larger kernels
  const int64_t c_count = d.channels;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t n = row / d.height, h = row % d.height;
    const T* dz = static_cast<const T*>(d.dz) + n * d.out_height * d.out_width * c_count;
    T* dx = static_cast<T*>(d.dx) + row * d.width * c_count;
    for (int64_t w = 0; w < d.width; ++w, dx += c_count) {
      const T* from[kMaxTaps];
      const A* by[kMaxTaps];
      int64_t count = 0;
      for_taps(h, d.kernel_height, d.stride_height, d.padding_height, d.dilation_height, d.out_height, [&](int64_t kh, int64_t oh) {
        for_taps(w, d.kernel_width, d.stride_width, d.padding_width, d.dilation_width, d.out_width, [&](int64_t kw, int64_t ow) {
          from[count] = dz + (oh * d.out_width + ow) * c_count;
          by[count++] = static_cast<const A*>(d.taps) + (kh * d.kernel_width + kw) * c_count;
        });
      });
      int64_t c = 0;
      for (; c + kBlock <= c_count; c += kBlock) {
        Block<A> sum(0);
        for (int64_t i = 0; i < count; ++i) sum = sum + load_block(from[i] + c) * load_block(by[i] + c);
        store_block(dx + c, sum);
      }
      if (c < c_count) {
        Block<A> sum(0);
        const int64_t rest = c_count - c;
        for (int64_t i = 0; i < count; ++i) sum = sum + load_partial(from[i] + c, rest) * load_partial(by[i] + c, rest);
        store_partial(dx + c, sum, rest);
      }
    }
  }
}

template <class T>
constexpr DepthwiseKernels depthwise_kernels() {
  return {depthwise_dgrad_rows<T>};
}

}  // namespace bnfast::BNFAST_NAMESPACE
