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
  RunsAhead(const Run* runs, int count, int64_t calls) : walk_{Walk::from(runs, runs + count), runs + count, 0} {
    int64_t bytes = 0;
    for (int i = 0; i < count; ++i) bytes += runs[i].bytes;
    walk_.pace = walk_.place.pace(bytes / std::max<int64_t>(1, calls) + 1);
  }
  // At the rate of a phase that takes so many cycles from one call of line() to the next; upcoming may be null.
  RunsAhead(Upcoming* upcoming, double Upcoming::*rate, double cycles) : state_(upcoming) {
    if (!upcoming) return;
    const Run* const next = upcoming->runs + upcoming->begun;
    walk_.last = upcoming->runs + upcoming->count;
    walk_.place = upcoming->at ? Place{upcoming->at, upcoming->end, next} : Walk::from(next, walk_.last);
    walk_.pace = walk_.place.pace(std::min<int64_t>(kWidestPace, static_cast<int64_t>(std::ceil(upcoming->*rate * cycles))));
  }
  ~RunsAhead() {
    const Place& place = walk_.place;
    if (!state_ || !place.next) return;
    state_->begun = static_cast<int>(place.next - state_->runs);
    state_->at = place.at == &kNowhere ? nullptr : place.at;
    state_->end = place.end;
  }
  RunsAhead(const RunsAhead&) = delete;
  RunsAhead& operator=(const RunsAhead&) = delete;

 private:
  static constexpr int64_t kWidestPace = 128;   // bytes
  static constexpr char kNowhere = 0;

  struct Place {
    const char* at = &kNowhere;
    const char* end = &kNowhere + 1;
    const Run* next = nullptr;

    int64_t pace(int64_t wanted) const { return at == &kNowhere ? 0 : wanted; }
  };

 public:
  // Where it is. A loop takes it out and puts it back behind itself: what others see would be loaded and stored at each call.
  struct Walk {
    Place place;
    const Run* last = nullptr;
    int64_t pace = 0;

    // Fetches the same line again and again, or every second one, where that is the pace: a branch would cost more.
    BNFAST_INLINE void line() {
      __builtin_prefetch(place.at, 0, 2);
      place.at += pace;
      if (__builtin_expect(place.at >= place.end, 0)) {
        place = from(place.next, last);   // by value, for the same reason
        pace = place.pace(pace);
      }
    }
    __attribute__((noinline)) static Place from(const Run* next, const Run* last) {
      if (next == last) return {&kNowhere, &kNowhere + 1, next};
      return {static_cast<const char*>(next->begin), static_cast<const char*>(next->begin) + next->bytes, next + 1};
    }
  };
  BNFAST_INLINE Walk walk() const { return walk_; }
  BNFAST_INLINE void walked(const Walk& walk) { walk_ = walk; }
  BNFAST_INLINE void line() { walk_.line(); }
  template <int kCalls>
  BNFAST_INLINE void lines() {
    Walk walk = walk_;
    for (int i = 0; i < kCalls; ++i) walk.line();
    walk_ = walk;
  }

 private:
  Upcoming* state_ = nullptr;
  Walk walk_;
};

}  // namespace bnfast::BNFAST_NAMESPACE
