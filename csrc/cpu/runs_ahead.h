// Fetching what is needed next while something is computed.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "pixels.h"
#include "vec.h"

namespace bnfast::BNFAST_NAMESPACE {

// Memory that will be needed soon, fetched beside the arithmetic: run after run, as evenly as the calls of line() are spread. A burst
// would take the few buffers for lines on their way, and every load that misses the L1 cache would wait for one. Rows of several
// streams that end and begin again defeat the prefetcher of the hardware; a straight walk through what comes next does not depend on it.
class RunsAhead {
 public:
  // All of the runs, within so many calls of line(), about.
  RunsAhead(const Run* runs, int count, int64_t calls) : last_(runs + count), place_(from(runs, last_)) {
    int64_t bytes = 0;
    for (int i = 0; i < count; ++i) bytes += runs[i].bytes;
    pace_ = place_.pace(bytes / std::max<int64_t>(1, calls) + 1);
  }
  // At the rate of a phase that takes so many cycles from one call of line() to the next; upcoming may be null.
  RunsAhead(Upcoming* upcoming, double Upcoming::*rate, double cycles) : state_(upcoming) {
    if (!upcoming) return;
    const Run* const next = upcoming->runs + upcoming->begun;
    last_ = upcoming->runs + upcoming->count;
    place_ = upcoming->at ? Place{upcoming->at, upcoming->end, next} : from(next, last_);
    pace_ = place_.pace(std::min<int64_t>(kWidestPace, static_cast<int64_t>(std::ceil(upcoming->*rate * cycles))));
  }
  ~RunsAhead() {
    if (!state_ || !place_.next) return;
    state_->begun = static_cast<int>(place_.next - state_->runs);
    state_->at = place_.at == &kNowhere ? nullptr : place_.at;
    state_->end = place_.end;
  }
  RunsAhead(const RunsAhead&) = delete;
  RunsAhead& operator=(const RunsAhead&) = delete;

  // Fetches the same line again and again, or every second one, where that is the pace: a branch would cost more.
  BNFAST_INLINE void line() {
    __builtin_prefetch(place_.at, 0, 2);
    place_.at += pace_;
    if (__builtin_expect(place_.at >= place_.end, 0)) {
      // By value: an object that others see would be kept in memory, and stored at each call.
      place_ = from(place_.next, last_);
      pace_ = place_.pace(pace_);
    }
  }

 private:
  static constexpr int64_t kWidestPace = 128;   // bytes
  static constexpr char kNowhere = 0;

  struct Place {
    const char* at = &kNowhere;
    const char* end = &kNowhere + 1;
    const Run* next = nullptr;

    int64_t pace(int64_t wanted) const { return at == &kNowhere ? 0 : wanted; }
  };
  __attribute__((noinline)) static Place from(const Run* next, const Run* last) {
    if (next == last) return {&kNowhere, &kNowhere + 1, next};
    return {static_cast<const char*>(next->begin), static_cast<const char*>(next->begin) + next->bytes, next + 1};
  }

  Upcoming* state_ = nullptr;
  const Run* last_ = nullptr;
  Place place_;
  int64_t pace_ = 0;
};

}  // namespace bnfast::BNFAST_NAMESPACE
