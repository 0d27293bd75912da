// The rows of an image that a convolution reads, taken from memory or made by the phase in front as they are needed.
#pragma once

#include <algorithm>
#include <cstdint>

#include "pixels.h"

namespace bnfast::BNFAST_NAMESPACE {

// Rows of x [N, H, W, C], asked for in increasing order within an image, the last `reach` of them again and again: a row that is made
// stays in place r modulo reach, but for those that are this reader's own where the source keeps what it makes. Rows are made together
// where they lie together: for a narrow one the call costs more than the work.
template <class T>
class InputRows {
 public:
  // memory: reach rows behind granularity() pixels, where there is a source; else x is read. made: what that memory holds already.
  InputRows(const void* x, const PixelSource* source, int64_t channels, int64_t height, int64_t width, int64_t reach, void* memory,
            MadeRows& made, RowRange own = {})
      : x_(static_cast<const T*>(x)), source_(source), channels_(channels), height_(height), width_(width), reach_(reach), so_far_(made) {
    if (!source) return;
    made_ = static_cast<T*>(memory) + source->granularity() * channels;
    kept_ = static_cast<T*>(source->kept());
    if (kept_) own_ = own;
  }

  // Sees to it that the rows [first, last] of the image, at most reach of them, are there.
  void make(int64_t image, int64_t first, int64_t last) {
    if (!made_) return;
    if (image != so_far_.image) {
      finish();
      so_far_ = {image, 0};
    }
    const int64_t end = std::min(last + 1, height_), begin = image * height_;
    for (int64_t r = std::max(first, so_far_.next); r < end;) {
      int64_t until;
      if (is_own(begin + r)) {
        until = std::min(end, own_.end - begin);
        source_->keep((begin + r) * width_, (begin + until) * width_);
      } else {
        until = std::min(end, r - r % reach_ + reach_);
        if (begin + r < own_.begin) until = std::min(until, own_.begin - begin);
        source_->write_from((begin + r) * width_, (begin + until) * width_, channels_, place(r));
      }
      so_far_.next = r = until;
    }
  }
  // Keeps what is left of this reader's own rows of the image; it was not asked for.
  void finish() {
    const int64_t begin = so_far_.image * height_;
    const int64_t first = std::max(begin + so_far_.next, own_.begin), last = std::min(begin + height_, own_.end);
    if (so_far_.image >= 0 && first < last) source_->keep(first * width_, last * width_);
  }
  // Row r of the image, null where it is outside.
  const T* operator()(int64_t image, int64_t r) const {
    if (r < 0 || r >= height_) return nullptr;
    const int64_t row = image * height_ + r;
    if (!made_) return x_ + row * width_ * channels_;
    return is_own(row) ? kept_ + row * width_ * channels_ : place(r);
  }

 private:
  bool is_own(int64_t row) const { return row >= own_.begin && row < own_.end; }
  T* place(int64_t r) const { return made_ + r % reach_ * width_ * channels_; }

  const T* x_;
  const PixelSource* source_;
  int64_t channels_, height_, width_, reach_;
  T *made_ = nullptr, *kept_ = nullptr;
  RowRange own_;   // of the images' rows, counted over the images
  MadeRows& so_far_;
};

}  // namespace bnfast::BNFAST_NAMESPACE
