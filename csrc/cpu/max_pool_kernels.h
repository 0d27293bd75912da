// Max-pooling with one byte per pooled element for the way back, channels_last.
//   max_pool           [read y, write p and 1 byte]   windows overlap in the cache
//   max_pool_backward  [read dp and 1 byte, write dy] each dy gathers from the windows that it lies in, in their order
//   max_pool_pick      [read z and 1 byte, write 1 value per pooled element] windows overlap in the cache
#pragma once

#include <algorithm>
#include <limits>

#include "max_pool.h"
#include "vec.h"

namespace bnfast::BNFAST_NAMESPACE {

// Places of a window as lanes of the values' type, so that one mask chooses both.
template <class A>
BNFAST_INLINE void store_places(uint8_t* to, const Block<A>& places, int64_t count) {
  A lane[kBlock];
  store_block(lane, places);
  uint8_t byte[kBlock];
  for (int i = 0; i < kBlock; ++i) byte[i] = static_cast<uint8_t>(static_cast<int>(lane[i]));
  std::memcpy(to, byte, count == kBlock ? kBlock : count);
}
template <class A>
BNFAST_INLINE Block<A> load_places(const uint8_t* from, int64_t count) {
  uint8_t byte[kBlock] = {};
  std::memcpy(byte, from, count == kBlock ? kBlock : count);
  A lane[kBlock];
  for (int i = 0; i < kBlock; ++i) lane[i] = static_cast<int>(byte[i]);
  return load_block(lane);
}

BNFAST_INLINE int64_t lanes_of(Whole) { return kBlock; }
BNFAST_INLINE int64_t lanes_of(First f) { return f.lanes; }

template <class T>
void max_pool_rows(const MaxPool& d, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t n = row / d.out_height, h = row % d.out_height * d.stride_height - d.padding_height;
    const T* image = static_cast<const T*>(d.y) + n * d.height * d.width * d.channels;
    const int64_t h_end = std::min(d.height, h + d.kernel_height);
    for (int64_t ow = 0; ow < d.out_width; ++ow) {
      const int64_t w = ow * d.stride_width - d.padding_width, w_end = std::min(d.width, w + d.kernel_width);
      const int64_t at = (row * d.out_width + ow) * d.channels;
      for_blocks(d.channels, [&](int64_t c, auto lanes) BNFAST_INLINE_LAMBDA {
        // As in PyTorch a NaN wins, the last one of several; of equal values the first.
        Block<A> best(-std::numeric_limits<double>::infinity());
        Block<A> place((std::max<int64_t>(h, 0) - h) * d.kernel_width + std::max<int64_t>(w, 0) - w);
        for (int64_t i = std::max<int64_t>(h, 0); i < h_end; ++i) {
          for (int64_t j = std::max<int64_t>(w, 0); j < w_end; ++j) {
            const Block<A> value = load(image + (i * d.width + j) * d.channels + c, lanes);
            const auto wins = (value > best) | !(value == value);
            place = select(wins, Block<A>((i - h) * d.kernel_width + j - w), place);
            best = select(wins, value, best);
          }
        }
        store(static_cast<T*>(d.p) + at + c, best, lanes);
        store_places<A>(d.places + at + c, place, lanes_of(lanes));
      });
    }
  }
}

template <class T>
void max_pool_backward_rows(const MaxPool& d, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t n = row / d.height, h = row % d.height + d.padding_height;
    // The windows [oh, oh_end) x [ow, ow_end) hold the pixel.
    const int64_t oh = h < d.kernel_height ? 0 : (h - d.kernel_height) / d.stride_height + 1;
    const int64_t oh_end = std::min(d.out_height, h / d.stride_height + 1);
    for (int64_t column = 0; column < d.width; ++column) {
      const int64_t w = column + d.padding_width;
      const int64_t ow = w < d.kernel_width ? 0 : (w - d.kernel_width) / d.stride_width + 1;
      const int64_t ow_end = std::min(d.out_width, w / d.stride_width + 1);
      T* to = static_cast<T*>(d.dy) + (row * d.width + column) * d.channels;
      for_blocks(d.channels, [&](int64_t c, auto lanes) BNFAST_INLINE_LAMBDA {
        Block<A> sum(0);
        for (int64_t i = oh; i < oh_end; ++i) {
          for (int64_t j = ow; j < ow_end; ++j) {
            const int64_t at = ((n * d.out_height + i) * d.out_width + j) * d.channels + c;
            const Block<A> own((h - i * d.stride_height) * d.kernel_width + w - j * d.stride_width);
            const auto is_here = load_places<A>(d.places + at, lanes_of(lanes)) == own;
            sum = sum + select(is_here, load(static_cast<const T*>(d.dp) + at, lanes), Block<A>(0));
          }
        }
        store(to + c, sum, lanes);
      });
    }
  }
}

template <class T>
void max_pool_pick(const MaxPool& d, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  for (int64_t pixel = begin; pixel < end; ++pixel) {
    const int64_t row = pixel / d.out_width, h = row % d.out_height * d.stride_height - d.padding_height;
    const int64_t w = pixel % d.out_width * d.stride_width - d.padding_width;
    const T* image = static_cast<const T*>(d.y) + row / d.out_height * d.height * d.width * d.channels;
    const int64_t h_begin = std::max<int64_t>(0, h), h_end = std::min(d.height, h + d.kernel_height);
    const int64_t w_begin = std::max<int64_t>(0, w), w_end = std::min(d.width, w + d.kernel_width);
    for_blocks(d.channels, [&](int64_t c, auto lanes) BNFAST_INLINE_LAMBDA {
      const Block<A> place = load_places<A>(d.places + pixel * d.channels + c, lanes_of(lanes));
      Block<A> picked(0);
      for (int64_t i = h_begin; i < h_end; ++i) {
        for (int64_t j = w_begin; j < w_end; ++j) {
          const auto is_here = place == Block<A>((i - h) * d.kernel_width + j - w);
          picked = select(is_here, load(image + (i * d.width + j) * d.channels + c, lanes), picked);
        }
      }
      store(static_cast<T*>(d.p) + pixel * d.channels + c, picked, lanes);
    });
  }
}

template <class T>
constexpr MaxPoolKernels max_pool_kernels() {
  return {max_pool_rows<T>, max_pool_backward_rows<T>, max_pool_pick<T>};
}

}  // namespace bnfast::BNFAST_NAMESPACE
