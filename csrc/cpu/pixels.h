// What a convolution reads, made piece by piece while it is needed: the phase in front of it, applied to pixels that are then taken
// out of the cache. float32 or bfloat16 in channels_last: a pixel is C neighbouring elements, pixels are counted over n and the plane.
#pragma once

#include <cstdint>

namespace bnfast {

// Memory that will be read or written soon.
struct Run {
  const void* begin;
  int64_t bytes;
};

// How far the rows of an image have been made: the next one, of which image.
struct MadeRows {
  int64_t image = -1, next = 0;
};

// Rows of images, counted over the images.
struct RowRange {
  int64_t begin = 0, end = 0;
};

class PixelSource {
 public:
  virtual int64_t granularity() const = 0;   // pixels: begin is a multiple of it
  virtual int64_t element_bytes() const = 0;
  // The pixels [begin, end) into `to`.
  virtual void write(int64_t begin, int64_t end, void* to) const = 0;
  // What write(begin, ...) reads, from its first element on; the second may be null.
  virtual const void* reads(int64_t begin) const = 0;
  virtual const void* reads_too(int64_t begin) const = 0;
  // Where what it makes stays, for others to read: then each pixel is to be made there once, in runs whose ends are multiples of
  // granularity(). Null where it is made for the convolution alone.
  virtual void* kept() const { return nullptr; }
  virtual void keep(int64_t, int64_t) const {}

  // As write, for any begin: up to granularity() - 1 pixels in front of `to` are overwritten with what belongs there.
  void write_from(int64_t begin, int64_t end, int64_t channels, void* to) const {
    const int64_t before = begin % granularity();
    write(begin - before, end, static_cast<char*>(to) - before * channels * element_bytes());
  }

 protected:
  ~PixelSource() = default;
};

}  // namespace bnfast
