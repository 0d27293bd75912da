// A pool of activation buffers. What a chain allocates is large, short-lived, and the same in every training step; from
// malloc it comes as fresh pages, which the operating system clears one by one at their first use.
//
// The pool stands in front of PyTorch's CPU allocator and serves only threads that are inside a PoolScope; the tensors are
// ordinary ones and may outlive it. The pool never holds more than kSlack times the most that was in use at once.
#pragma once

#include <cstdint>

namespace bnfast {

// Large CPU tensors that this thread makes come from the pool while one of these exists. Scopes nest.
class PoolScope {
 public:
  PoolScope() { enter(); }
  ~PoolScope() { leave(); }
  PoolScope(const PoolScope&) = delete;
  PoolScope& operator=(const PoolScope&) = delete;
  static void enter();
  static void leave();
};

struct PoolStats {
  int64_t used = 0, free = 0, most_used = 0;   // bytes
  int64_t hits = 0, misses = 0;
};

PoolStats pool_stats();

// Gives free buffers back to the operating system; buffers in use come back to it when they are freed.
void clear_pool();

}  // namespace bnfast
