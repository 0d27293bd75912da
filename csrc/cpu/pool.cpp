#include "pool.h"

#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <unordered_map>

#if defined(__linux__)
#include <pthread.h>
#include <sys/mman.h>
#endif

namespace bnfast {

#if defined(__linux__)
namespace {

constexpr size_t kSmallest = size_t{1} << 16;    // smaller tensors stay with malloc
constexpr size_t kGrain = size_t{1} << 16;       // sizes are multiples of this
constexpr size_t kHugePage = size_t{1} << 21;
constexpr double kSlack = 1.5;                   // bound on bytes held, over the most that was in use at once
constexpr double kFit = 1.125;                   // a free buffer serves requests down to its size over this ...
constexpr double kLooseFit = 4;                  // ... or over this where the bound is reached

thread_local int scopes = 0;

class Pool {
 public:
  void* take(size_t bytes) {
    const size_t size = (bytes + kGrain - 1) / kGrain * kGrain;
    const std::lock_guard<std::mutex> guard(mutex_);
    void* buffer = nullptr;
    size_t held = size;
    auto fit = free_.lower_bound(size);
    // Of those that fit well the one freed last: its lines may still be in the cache.
    for (auto it = fit; it != free_.end() && it->first <= size * kFit; ++it) {
      if (it->second.since > fit->second.since) fit = it;
    }
    // Where a new buffer would break the bound, one that is too large is better than fresh pages.
    const bool is_full = used_ + free_bytes_ + size > std::max(most_used_, used_ + size) * kSlack;
    if (fit != free_.end() && fit->first <= size * (is_full ? kLooseFit : kFit)) {
      held = fit->first;
      buffer = fit->second.buffer;
      free_bytes_ -= held;
      free_.erase(fit);
      ++hits_;
    } else {
      most_used_ = std::max(most_used_, used_ + size);
      while (!free_.empty() && used_ + free_bytes_ + size > most_used_ * kSlack) unmap_oldest();
      buffer = map(size);
      if (!buffer) return nullptr;
      ++misses_;
    }
    used_ += held;
    most_used_ = std::max(most_used_, used_);
    taken_.emplace(buffer, held);
    return buffer;
  }

  // False if the buffer is not of the pool.
  bool give_back(void* buffer) {
    const std::lock_guard<std::mutex> guard(mutex_);
    const auto found = taken_.find(buffer);
    if (found == taken_.end()) return false;
    const size_t size = found->second;
    taken_.erase(found);
    used_ -= size;
    free_bytes_ += size;
    free_.emplace(size, Free{buffer, ++clock_});
    return true;
  }

  void clear() {
    const std::lock_guard<std::mutex> guard(mutex_);
    while (!free_.empty()) unmap_oldest();
    most_used_ = used_;
  }

  PoolStats stats() {
    const std::lock_guard<std::mutex> guard(mutex_);
    return {static_cast<int64_t>(used_), static_cast<int64_t>(free_bytes_), static_cast<int64_t>(most_used_), hits_, misses_};
  }

  std::mutex& mutex() { return mutex_; }

 private:
  struct Free {
    void* buffer;
    uint64_t since;
  };

  // Aligned to huge pages where there is room for one, and asking for them.
  static void* map(size_t size) {
    const size_t extra = size >= kHugePage ? kHugePage : 0;
    void* raw = mmap(nullptr, size + extra, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (raw == MAP_FAILED) return nullptr;
    if (!extra) return raw;
    char* begin = static_cast<char*>(raw);
    char* aligned = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(raw) + extra - 1) / extra * extra);
    if (aligned > begin) munmap(begin, aligned - begin);
    if (aligned < begin + extra) munmap(aligned + size, begin + extra - aligned);
    madvise(aligned, size, MADV_HUGEPAGE);
    return aligned;
  }

  void unmap_oldest() {
    auto oldest = free_.begin();
    for (auto it = free_.begin(); it != free_.end(); ++it) {
      if (it->second.since < oldest->second.since) oldest = it;
    }
    munmap(oldest->second.buffer, oldest->first);
    free_bytes_ -= oldest->first;
    free_.erase(oldest);
  }

  std::mutex mutex_;
  std::multimap<size_t, Free> free_;             // by size
  std::unordered_map<void*, size_t> taken_;
  size_t used_ = 0, free_bytes_ = 0, most_used_ = 0;
  uint64_t clock_ = 0;
  int64_t hits_ = 0, misses_ = 0;
};

// Never destroyed: tensors may be freed after static destruction has begun.
Pool& pool() {
  static Pool* const instance = [] {
    Pool* const made = new Pool();
    pthread_atfork([] { pool().mutex().lock(); }, [] { pool().mutex().unlock(); }, [] { pool().mutex().unlock(); });
    return made;
  }();
  return *instance;
}

// PyTorch's own allocator with the pool in front.
class PoolAllocator final : public c10::Allocator {
 public:
  explicit PoolAllocator(c10::Allocator* base) : base_(base) {}

  c10::DataPtr allocate(size_t bytes) override {
    if (scopes > 0 && bytes >= kSmallest) {
      if (void* buffer = pool().take(bytes)) return {buffer, buffer, &give_back, c10::Device(c10::kCPU)};
    }
    return base_->allocate(bytes);
  }

  // Serves raw pointers of both origins.
  c10::DeleterFnPtr raw_deleter() const override { return &give_back; }

  void copy_data(void* to, const void* from, std::size_t count) const override { std::memcpy(to, from, count); }

  static void install() {
    static PoolAllocator* const instance = [] {
      auto* const made = new PoolAllocator(c10::GetCPUAllocator());
      base_deleter = made->base_->raw_deleter();
      c10::SetCPUAllocator(made);
      return made;
    }();
    (void)instance;
  }

 private:
  static void give_back(void* buffer) {
    if (buffer && !pool().give_back(buffer) && base_deleter) base_deleter(buffer);
  }

  inline static c10::DeleterFnPtr base_deleter = nullptr;
  c10::Allocator* base_;
};

bool is_wanted() {
  static const bool wanted = [] {
    const char* value = std::getenv("BNFAST_POOL");
    return !value || std::strcmp(value, "0") != 0;
  }();
  return wanted;
}

}  // namespace

void PoolScope::enter() {
  if (!is_wanted()) return;
  PoolAllocator::install();
  ++scopes;
}

void PoolScope::leave() {
  if (scopes > 0) --scopes;
}

PoolStats pool_stats() { return pool().stats(); }
void clear_pool() { pool().clear(); }

#else  // no mmap: PyTorch's allocator alone

void PoolScope::enter() {}
void PoolScope::leave() {}
PoolStats pool_stats() { return {}; }
void clear_pool() {}

#endif

}  // namespace bnfast
