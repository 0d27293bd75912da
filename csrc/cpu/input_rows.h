// The rows of an image that a convolution reads, taken from memory or made by the phase in front as they are needed.
#pragma once

#include <algorithm>
#include <cstdint>

#include "pixels.h"

namespace bnfast::BNFAST_NAMESPACE {

// Rows of x [N, H, W, C], asked for in increasing order within an image, the last `reach` of them again and again: a row that is made
// is kept in place r modulo reach. Rows are made together where they lie together: for a narrow one the call costs more than the work.
template <class T>
class InputRows {
 public:
  // memory: reach rows behind granularity() pixels, where there is a source; else x is read. made: what that memory holds already.
  InputRows(const void* x, const PixelSource* source, int64_t channels, int64_t height, int64_t width, int64_t reach, void* memory,
            MadeRows& made)
      : x_(static_cast<const T*>(x)), source_(source), channels_(channels), height_(height), width_(width), reach_(reach), so_far_(made) {
    if (source) made_ = static_cast<T*>(memory) + source->granularity() * channels;
  }

  // Sees to it that the rows [first, last] of the image, at most reach of them, are there.
  void make(int64_t image, int64_t first, int64_t last) {
    if (!made_) return;
    if (image != so_far_.image) so_far_ = {image, 0};
    const int64_t end = std::min(last + 1, height_);
    for (int64_t r = std::max(first, so_far_.next); r < end;) {
      const int64_t until = std::min(end, r - r % reach_ + reach_), begin = image * height_;
      source_->write_from((begin + r) * width_, (begin + until) * width_, channels_, place(r));
      so_far_.next = r = until;
    }
  }
  // Row r of the image, null where it is outside.
  const T* operator()(int64_t image, int64_t r) const {
    if (r < 0 || r >= height_) return nullptr;
    return made_ ? place(r) : x_ + (image * height_ + r) * width_ * channels_;
  }

 private:
  T* place(int64_t r) const { return made_ + r % reach_ * width_ * channels_; }

  const T* x_;
  const PixelSource* source_;
  int64_t channels_, height_, width_, reach_;
  T* made_ = nullptr;
  MadeRows& so_far_;
};

}  // namespace bnfast::BNFAST_NAMESPACE
