// What a convolution reads, made piece by piece while it is needed: the phase in front of it, applied to pixels that are then taken
// out of the cache. float32 or bfloat16 in channels_last: a pixel is C neighbouring elements, pixels are counted over n and the plane.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../activation.h"

namespace bnfast {

// Memory that will be read or written soon.
struct Run {
  const void* begin;
  int64_t bytes;
};

// What will be needed soon, fetched by the phases of a piece of work one after the other, each taking up where the one before left off:
// as fast as memory gives it beside a product, which reads from the L1 cache, then beside a reduction of the result. What is left then, an
// elementwise phase that reads from end to end fetches itself.
struct Upcoming {
  static constexpr int kMost = 8;
  static constexpr double kFastest = 4;   // bytes per cycle of one core, twice that beside a reduction, which is short
  Run runs[kMost] = {};
  int count = 0, begun = 0;
  int64_t bytes = 0;
  const char *at = nullptr, *end = nullptr;   // of the run that is being fetched
  double beside_product = 0, beside_reduction = 0;   // bytes per cycle

  // Nothing where there is no such memory.
  void add(const void* begin, int64_t size) {
    if (!begin || size <= 0) return;
    runs[count++] = {begin, size};
    bytes += size;
  }
  // After all of it has been added.
  void spread(int64_t product_cycles, int64_t reduction_cycles) {
    const auto within = [](double left, double cycles) { return std::max(0.0, left) / std::max(1.0, cycles); };
    const double all = static_cast<double>(bytes), product = static_cast<double>(product_cycles);
    beside_product = std::min(kFastest, within(all, product));
    beside_reduction = std::min(2 * kFastest, within(all - beside_product * product, static_cast<double>(reduction_cycles)));
  }
};

// Cycles of reductions, about, for 16 elements that are in the cache.
constexpr int64_t kFwdReduceCycles = 6;
constexpr int64_t bwd_reduce_cycles(Act act) { return act == Act::kSilu || act == Act::kHardswish ? 24 : 8; }

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
