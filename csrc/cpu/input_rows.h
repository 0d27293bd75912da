// The rows of an image that a convolution reads, taken from memory or made by the phase in front as they are needed.
#pragma once

#include <cstdint>

#include "pixels.h"

namespace bnfast::BNFAST_NAMESPACE {

// Rows of x [N, H, W, C], asked for in increasing order within an image, the last `reach` of them again and again: a row that is made
// is kept in place r modulo reach.
template <class T>
class InputRows {
 public:
  // memory: reach rows behind granularity() pixels, where there is a source; else x is read. made: what that memory holds already.
  InputRows(const void* x, const PixelSource* source, int64_t channels, int64_t height, int64_t width, int64_t reach, void* memory,
            MadeRows& made)
      : x_(static_cast<const T*>(x)), source_(source), channels_(channels), height_(height), width_(width), reach_(reach), so_far_(made) {
    if (source) made_ = static_cast<T*>(memory) + source->granularity() * channels;
  }

  // Row r of the image, null where it is outside.
  const T* operator()(int64_t image, int64_t r) {
    if (r < 0 || r >= height_) return nullptr;
    const int64_t begin = (image * height_ + r) * width_;
    if (!made_) return x_ + begin * channels_;
    if (image != so_far_.image) so_far_ = {image, 0};
    T* to = made_ + r % reach_ * width_ * channels_;
    if (r >= so_far_.next) source_->write_from(begin, begin + width_, channels_, to), so_far_.next = r + 1;
    return to;
  }

 private:
  const T* x_;
  const PixelSource* source_;
  int64_t channels_, height_, width_, reach_;
  T* made_ = nullptr;
  MadeRows& so_far_;
};

}  // namespace bnfast::BNFAST_NAMESPACE
