// Fetching what is needed next while something is computed.
#pragma once

#include <algorithm>
#include <cstdint>

#include "pixels.h"
#include "vec.h"

namespace bnfast::BNFAST_NAMESPACE {

// Memory that will be needed soon, fetched beside the arithmetic: run after run, as evenly as the calls of line() are spread. A burst
// would take the few buffers for lines on their way, and every load that misses the L1 cache would wait for one. Rows of several
// streams that end and begin again defeat the prefetcher of the hardware; a straight walk through what comes next does not depend on it.
class RunsAhead {
 public:
  // calls: of line(), about.
  RunsAhead(const Run* runs, int count, int64_t calls) : next_(runs), last_(runs + count) {
    int64_t bytes = 0;
    for (int i = 0; i < count; ++i) bytes += runs[i].bytes;
    pace_ = bytes / std::max<int64_t>(1, calls) + 1;
    step();
  }
  // Fetches the same line again and again, or every second one, where that is the pace: a branch would cost more.
  BNFAST_INLINE void line() {
    __builtin_prefetch(at_, 0, 2);
    at_ += pace_;
    if (__builtin_expect(at_ >= end_, 0)) step();
  }

 private:
  void step() {
    if (next_ == last_) {
      at_ = reinterpret_cast<const char*>(this);
      end_ = at_ + 1;
      pace_ = 0;
      return;
    }
    at_ = static_cast<const char*>(next_->begin);
    end_ = at_ + next_->bytes;
    ++next_;
  }
  const Run *next_, *last_;
  const char *at_, *end_;
  int64_t pace_;
};

}  // namespace bnfast::BNFAST_NAMESPACE
