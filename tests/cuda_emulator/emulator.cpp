// Runs kernels on one CPU thread: each CUDA thread is a fiber that runs until it waits for others, and the order of blocks and of
// threads is shuffled by a seed. Every access to memory arrives at `saw`, from the hooks of -fsanitize=thread or from the
// intrinsics; with -fsanitize=address in place of it, that library does the watching. Compiled without either.
#include "cuda_emulator.h"

#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#include "fiber.h"

namespace cuda_emulator {
namespace {

constexpr unsigned kWarp = 32, kMostThreads = 1024, kMostResident = 3, kMostInCluster = 8;
constexpr size_t kPage = 4096;

// ---- who did what to a byte -----------------------------------------------------------------------------------------------

// A moment of one thread, or none. `phase` counts the barriers of its block, `warp_phase` those of its warp.
struct Stamp {
  int block = -1;
  int thread = 0;   // kSeveral: more than one thread in this phase
  int phase = 0, warp_phase = 0;
  static constexpr int kSeveral = -2;
  bool is_set() const { return block >= 0; }
};

struct Byte {
  Stamp written, read;
  bool filled = false;
};

struct Page { Byte bytes[kPage]; };

struct Traffic {
  uint64_t read = 0, written = 0, unique_read = 0, unique_written = 0;
  std::map<size_t, uint64_t> read_widths, write_widths;
};

struct Region {
  std::string name;
  uintptr_t begin = 0, end = 0;
  bool writable = false, filled = false;
  std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
  Traffic traffic;

  Byte& byte(uintptr_t at) {
    const uintptr_t number = at / kPage;
    if (number != last_number_ || last_ == nullptr) {
      std::unique_ptr<Page>& page = pages[number];
      if (!page) {
        page = std::make_unique<Page>();
        if (filled) {
          for (Byte& b : page->bytes) b.filled = true;
        }
      }
      last_ = page.get();
      last_number_ = number;
    }
    return last_->bytes[at % kPage];
  }
  // Before a launch: nobody has touched it, what was put there stays known.
  void begin_launch() {
    for (auto& [number, page] : pages) {
      for (Byte& b : page->bytes) b.written = b.read = Stamp();
    }
    traffic = Traffic();
  }

 private:
  Page* last_ = nullptr;
  uintptr_t last_number_ = 0;
};

// ---- threads, warps, blocks -------------------------------------------------------------------------------------------------

enum class State { kReady, kAtBarrier, kAtCluster, kAtExchange, kDone };

using Blocks = std::vector<bool>;   // a set of blocks of the grid
void add(Blocks& to, const Blocks& from) {
  if (to.size() < from.size()) to.resize(from.size());
  for (size_t i = 0; i < from.size(); ++i) to[i] = to[i] || from[i];
}
bool holds(const Blocks& set, int block) { return static_cast<size_t>(block) < set.size() && set[block]; }

struct Block;

struct Thread {
  Fiber fiber;
  Block* block = nullptr;
  int number = 0;
  uint3 index = {};
  State state = State::kReady;
  int warp_phase = 0;
  bool fenced = false;       // what the block has written so far is visible to whoever sees this thread's next atomic
  Blocks pending, acquired;  // blocks whose writes were seen by an atomic: before and after the fence that makes it count
  // What it waits with at an exchange.
  bool is_sync = false;
  Exchange kind = Exchange::kIndex;
  unsigned mask = 0;
  uint64_t value = 0;
  int lanes = 0;

  int warp() const { return number / static_cast<int>(kWarp); }
  int lane() const { return number % static_cast<int>(kWarp); }
};

struct Block {
  int number = 0;
  uint3 index = {};
  int phase = 0;
  std::vector<Thread> threads;
  Blocks acquired;
  std::vector<unsigned char> memory;               // shared memory
  std::map<const void*, std::pair<size_t, size_t>> arrays;   // key -> (offset, bytes)
  size_t used = 0, dynamic = 0;
  Region shared;
  std::vector<Block*> cluster;   // by rank, itself among them

  bool has(size_t offset, size_t bytes) const {
    if (offset + bytes <= dynamic) return true;
    return std::any_of(arrays.begin(), arrays.end(), [&](const auto& array) {
      return offset >= array.second.first && offset + bytes <= array.second.first + array.second.second;
    });
  }
};

struct Launch {
  std::string kernel;
  dim3 blocks, threads;
  unsigned cluster = 1;
  size_t shared_bytes = 0;
  void (*run)(const void*) = nullptr;
  const void* body = nullptr;
  std::unordered_map<uintptr_t, Blocks> released;   // per atomic: blocks whose writes it publishes
  uintptr_t host_begin = 0, host_end = 0;           // stack of the thread that launched
};

struct Record {
  std::string kernel;
  unsigned blocks;
  std::vector<std::pair<std::string, Traffic>> regions;
};

constexpr size_t kSharedBytes = 227 * 1024;

std::vector<std::unique_ptr<Region>> regions;   // sorted by begin
std::vector<Record> ledger;
uint64_t seed = 0;
int64_t only_ends = 0;   // blocks at either end of the grid that run; 0: all
std::vector<std::unique_ptr<Block>> idle;       // blocks whose stacks and memory are used again
Launch* launched = nullptr;
Thread* running = nullptr;
Fiber scheduler;
// Whether accesses are the kernel's. Not those of this file: the linker may have taken a function of the standard library, which it
// shares with the kernels, from among the watched ones.
bool watching = false;
struct Unwatched {
  Unwatched() { watching = false; }
  ~Unwatched() { watching = true; }
};
std::string problem;

extern "C" const char __ehdr_start, _end;   // this library: constants of kernels are no global memory

std::string where(const Thread& t) {
  std::ostringstream out;
  out << "block " << t.block->number << ", thread " << t.number;
  return out.str();
}

// Ends the launch, from the running thread or from the scheduler.
[[noreturn]] void fail(const std::string& what) {
  watching = false;
  problem = launched->kernel + ": " + where(*running) + ": " + what;
  switch_to(running->fiber, scheduler);
  __builtin_unreachable();
}
[[noreturn]] void stop(const std::string& where, const std::string& what) {
  throw std::runtime_error("cuda_emulator: " + launched->kernel + ": " + where + ": " + what);
}

void wait(State state) {
  running->state = state;
  switch_to(running->fiber, scheduler);
}

size_t thread_count() { return size_t{launched->threads.x} * launched->threads.y * launched->threads.z; }

Stamp now() { return {running->block->number, running->number, running->block->phase, running->warp_phase}; }

// Whether nothing orders what another thread of this block did at `s` before what this one does now.
bool is_race(const Stamp& s) {
  const Stamp mine = now();
  if (!s.is_set() || s.block != mine.block || s.thread == mine.thread || s.phase != mine.phase) return false;
  if (s.thread == Stamp::kSeveral) return true;
  return s.thread / static_cast<int>(kWarp) != running->warp() || s.warp_phase == mine.warp_phase;
}

bool is_foreign(const Stamp& s) {
  return s.is_set() && s.block != running->block->number && !holds(running->block->acquired, s.block) &&
         !holds(running->acquired, s.block);
}

Region* region_of(uintptr_t at) {
  for (Block* b : running->block->cluster) {
    if (at >= b->shared.begin && at < b->shared.end) return &b->shared;
  }
  const auto after = std::upper_bound(regions.begin(), regions.end(), at,
                                      [](uintptr_t a, const std::unique_ptr<Region>& r) { return a < r->begin; });
  if (after == regions.begin()) return nullptr;
  Region* r = std::prev(after)->get();
  return at < r->end ? r : nullptr;
}

std::string place(const Region& r, uintptr_t at) {
  std::ostringstream out;
  out << r.name << " + " << at - r.begin << " bytes (of " << r.end - r.begin << ")";
  return out.str();
}

void check_byte(Region& r, uintptr_t at, bool writes) {
  Byte& b = r.byte(at);
  if (is_race(b.written)) {
    fail((writes ? "race: writes " : "race: reads ") + place(r, at) + ", which thread " + std::to_string(b.written.thread) +
         " wrote with no barrier between them");
  }
  if (is_foreign(b.written)) {
    fail((writes ? "race: writes " : "race: reads ") + place(r, at) + ", which block " + std::to_string(b.written.block) +
         " wrote, with no fence and atomic between them");
  }
  const Stamp mine = now();
  if (writes) {
    if (is_race(b.read)) fail("race: writes " + place(r, at) + ", which another thread read with no barrier between them");
    if (!b.written.is_set()) ++r.traffic.unique_written;
    b.written = mine;
    b.filled = true;
  } else {
    if (!b.filled) fail("reads " + place(r, at) + ", which nothing wrote");
    if (!b.read.is_set()) ++r.traffic.unique_read;
    const bool same_phase = b.read.is_set() && b.read.block == mine.block && b.read.phase == mine.phase;
    const int reader = b.read.thread;
    b.read = mine;
    if (same_phase && reader != mine.thread) b.read.thread = Stamp::kSeveral;
  }
}

// ---- the schedule ---------------------------------------------------------------------------------------------------------

void run_fiber() {
  watching = true;
  launched->run(launched->body);
  const Unwatched scope;
  wait(State::kDone);
}

std::unique_ptr<Block> make_block(int number) {
  std::unique_ptr<Block> block;
  if (idle.empty()) {
    block = std::make_unique<Block>();
    block->memory.resize(kSharedBytes + 16);
  } else {
    block = std::move(idle.back());
    idle.pop_back();
  }
  const dim3 grid = launched->blocks, size = launched->threads;
  const unsigned n = static_cast<unsigned>(number);
  block->number = number;
  block->index = {n % grid.x, n / grid.x % grid.y, n / grid.x / grid.y};
  block->phase = 0;
  block->acquired.clear();
  block->arrays.clear();
  block->dynamic = launched->shared_bytes;
  block->used = (launched->shared_bytes + 15) / 16 * 16;
  block->shared = Region();
  block->shared.name = "shared memory";
  block->shared.begin = (reinterpret_cast<uintptr_t>(block->memory.data()) + 15) / 16 * 16;
  block->shared.end = block->shared.begin + block->used;
  block->shared.writable = true;
  const size_t count = size_t{size.x} * size.y * size.z;
  if (block->threads.size() < count) block->threads = std::vector<Thread>(count);
  for (size_t i = 0; i < count; ++i) {
    Thread& t = block->threads[i];
    t.block = block.get();
    t.number = static_cast<int>(i);
    const unsigned k = static_cast<unsigned>(i);
    t.index = {k % size.x, k / size.x % size.y, k / size.x / size.y};
    t.state = State::kReady;
    t.warp_phase = 0;
    t.fenced = false;
    t.pending.clear();
    t.acquired.clear();
    t.fiber.start(run_fiber);
  }
  return block;
}

// Lets the lanes that wait for each other go on, if all are there. Returns whether any could.
bool resolve_warp(Block& block, size_t first) {
  const size_t last = std::min(first + kWarp, thread_count());
  bool moved = false;
  for (size_t i = first; i < last; ++i) {
    Thread& t = block.threads[i];
    if (t.state != State::kAtExchange) continue;
    bool complete = true;
    for (size_t j = 0; j < kWarp && complete; ++j) {
      if (!(t.mask >> j & 1)) continue;
      if (first + j >= last) stop(where(t), "lane " + std::to_string(j) + " of the mask does not exist");
      const Thread& other = block.threads[first + j];
      if (other.state == State::kDone || other.state == State::kAtBarrier || other.state == State::kAtCluster) {
        stop(where(t), "exchange between lanes: lane " + std::to_string(j) + " of the mask is absent, it " +
             (other.state == State::kDone ? "has ended" : "waits at a barrier"));
      }
      if (other.state == State::kAtExchange && (other.mask != t.mask || other.is_sync != t.is_sync || other.kind != t.kind)) {
        stop(where(t), "exchange between lanes: lane " + std::to_string(j) + " of the mask is at another exchange, or with another mask");
      }
      complete = other.state == State::kAtExchange;
    }
    if (!complete) continue;
    uint64_t results[kWarp] = {};
    unsigned ballot = 0;
    for (size_t j = 0; j < kWarp; ++j) {
      if (t.mask >> j & 1 && block.threads[first + j].value) ballot |= 1u << j;
    }
    for (size_t j = 0; j < kWarp; ++j) {
      if (!(t.mask >> j & 1)) continue;
      Thread& lane = block.threads[first + j];
      if (lane.is_sync) continue;
      int from = static_cast<int>(j);
      if (lane.kind == Exchange::kIndex) from = lane.lanes % static_cast<int>(kWarp);
      if (lane.kind == Exchange::kXor) from ^= lane.lanes;
      if (lane.kind == Exchange::kDown && from + lane.lanes < static_cast<int>(kWarp)) from += lane.lanes;
      if (lane.kind == Exchange::kBallot) {
        results[j] = ballot;
        continue;
      }
      if (!(t.mask >> from & 1)) {
        stop(where(lane), "exchange between lanes: takes the value of lane " + std::to_string(from) + ", which is not in the mask");
      }
      results[j] = block.threads[first + from].value;
    }
    const unsigned mask = t.mask;
    for (size_t j = 0; j < kWarp; ++j) {
      if (!(mask >> j & 1)) continue;
      Thread& lane = block.threads[first + j];
      lane.value = results[j];
      lane.state = State::kReady;
      if (lane.is_sync) ++lane.warp_phase;
    }
    moved = true;
  }
  return moved;
}

// Behind a barrier: what happened before is seen by all.
void pass_barrier(Block& block) {
  ++block.phase;
  for (size_t i = 0; i < thread_count(); ++i) {
    Thread& t = block.threads[i];
    add(block.acquired, t.acquired);
    t.fenced = false;
    t.state = State::kReady;
  }
}

size_t count_in(const Block& block, State state) {
  return static_cast<size_t>(std::count_if(block.threads.begin(), block.threads.begin() + static_cast<ptrdiff_t>(thread_count()),
                                           [&](const Thread& t) { return t.state == state; }));
}

enum class Round { kGoesOn, kWaitsForCluster, kEnded };

// Runs every thread that can run once.
Round run_round(Block& block, std::mt19937_64& random) {
  const size_t count = thread_count();
  size_t step = random() % count + 1;
  while (std::gcd(step, count) != 1) ++step;
  size_t at = random() % count;
  bool moved = false;
  for (size_t i = 0; i < count; ++i, at = (at + step) % count) {
    Thread& t = block.threads[at];
    if (t.state != State::kReady) continue;
    moved = true;
    running = &t;
    switch_to(scheduler, t.fiber);
    running = nullptr;
    if (!problem.empty()) throw std::runtime_error("cuda_emulator: " + problem);
  }
  for (size_t first = 0; first < count; first += kWarp) moved = resolve_warp(block, first) || moved;
  if (moved) return Round::kGoesOn;
  const size_t waiting = count_in(block, State::kAtBarrier), done = count_in(block, State::kDone);
  const size_t at_cluster = count_in(block, State::kAtCluster);
  if (done == count) return Round::kEnded;
  if (at_cluster == count) return Round::kWaitsForCluster;
  if (waiting != count) {
    stop("block " + std::to_string(block.number), std::to_string(waiting + at_cluster) + " of " + std::to_string(count) +
         " threads reached a barrier, " + std::to_string(done) + " have ended");
  }
  pass_barrier(block);
  return Round::kGoesOn;
}

// Blocks that are there together: one, or a cluster.
using Group = std::vector<std::unique_ptr<Block>>;

Group make_group(int64_t number) {
  // Clusters are counted x first, as blocks are; their blocks lie side by side in y.
  const int64_t width = launched->blocks.x, size = launched->cluster;
  const int64_t first = number / width * width * size + number % width;
  Group group;
  for (int64_t rank = 0; rank < size; ++rank) group.push_back(make_block(static_cast<int>(first + rank * width)));
  for (const auto& block : group) {
    block->cluster.clear();
    for (const auto& other : group) block->cluster.push_back(other.get());
  }
  return group;
}

// Runs every thread of the group that can run once. Returns false when all its blocks have ended.
bool run_group(Group& group, std::mt19937_64& random) {
  size_t ended = 0, waiting = 0;
  const size_t first = random() % group.size();
  for (size_t i = 0; i < group.size(); ++i) {
    const Round round = run_round(*group[(first + i) % group.size()], random);
    ended += round == Round::kEnded;
    waiting += round == Round::kWaitsForCluster;
  }
  if (ended == group.size()) return false;
  if (ended > 0 && ended + waiting == group.size()) {
    stop("block " + std::to_string(group[0]->number), "a barrier of the cluster that not all of its blocks reach");
  }
  if (waiting == group.size()) {
    Blocks all;
    for (const auto& block : group) {
      Blocks own(static_cast<size_t>(block->number) + 1);
      own[static_cast<size_t>(block->number)] = true;
      add(all, own);
      add(all, block->acquired);
    }
    for (const auto& block : group) {
      pass_barrier(*block);
      add(block->acquired, all);
    }
  }
  return true;
}

void run_all(std::mt19937_64& random) {
  const int64_t count = int64_t{launched->blocks.x} * launched->blocks.y * launched->blocks.z / launched->cluster;
  std::vector<int64_t> order;
  for (int64_t i = 0; i < count; ++i) {
    if (only_ends == 0 || i < only_ends || i >= count - only_ends) order.push_back(i);
  }
  std::shuffle(order.begin(), order.end(), random);
  std::vector<Group> resident;
  const size_t most = random() % kMostResident + 1;
  size_t next = 0;
  while (next < order.size() || !resident.empty()) {
    while (next < order.size() && resident.size() < most) resident.push_back(make_group(order[next++]));
    const size_t chosen = random() % resident.size();
    if (!run_group(resident[chosen], random)) {
      for (auto& block : resident[chosen]) idle.push_back(std::move(block));
      resident.erase(resident.begin() + static_cast<ptrdiff_t>(chosen));
    }
  }
}

std::string json(const std::map<size_t, uint64_t>& widths) {
  std::ostringstream out;
  out << "{";
  for (auto it = widths.begin(); it != widths.end(); ++it) {
    out << (it == widths.begin() ? "" : ", ") << '"' << it->first << "\": " << it->second;
  }
  out << "}";
  return out.str();
}

}  // namespace

// ---- for whoever launches -----------------------------------------------------------------------------------------------

void watch(const char* name, const void* at, size_t bytes, bool writable, bool filled) {
  if (bytes == 0) return;
  auto region = std::make_unique<Region>();
  region->name = name;
  region->begin = reinterpret_cast<uintptr_t>(at);
  region->end = region->begin + bytes;
  region->writable = writable;
  region->filled = filled;
  for (auto it = regions.begin(); it != regions.end();) {
    Region& other = **it;
    if (other.begin < region->end && region->begin < other.end) {
      region->name = other.name == region->name ? other.name : other.name + "/" + region->name;
      region->begin = std::min(region->begin, other.begin);
      region->end = std::max(region->end, other.end);
      region->writable = region->writable || other.writable;
      region->filled = region->filled || other.filled;
      it = regions.erase(it);
    } else {
      ++it;
    }
  }
  const auto after = std::find_if(regions.begin(), regions.end(),
                                  [&](const std::unique_ptr<Region>& r) { return r->begin > region->begin; });
  regions.insert(after, std::move(region));
}

void forget_all() { regions.clear(); }

bool runs_all_blocks() { return only_ends == 0; }

void launch(const char* kernel, dim3 blocks, unsigned cluster, dim3 threads, size_t shared_bytes, void (*run)(const void*), const void* body) {
  Launch launch;
  launch.kernel = std::string(kernel);
  launch.kernel = launch.kernel.substr(launch.kernel.find_first_not_of('('));
  launch.kernel = launch.kernel.substr(0, launch.kernel.find_first_of("<)"));
  launch.blocks = blocks;
  launch.cluster = cluster;
  launch.threads = threads;
  launch.shared_bytes = shared_bytes;
  launch.run = run;
  launch.body = body;
  const size_t count = size_t{threads.x} * threads.y * threads.z;
  if (count == 0 || count > kMostThreads || blocks.x == 0 || blocks.y == 0 || blocks.z == 0 || blocks.y > 65535 ||
      blocks.z > 65535 || blocks.x > 2147483647u || shared_bytes > kSharedBytes || cluster == 0 ||
      cluster > kMostInCluster || blocks.y % cluster != 0) {
    throw std::runtime_error("cuda_emulator: " + launch.kernel + ": no device takes this grid");
  }
  pthread_attr_t attributes;
  void* stack = nullptr;
  size_t bytes = 0;
  pthread_getattr_np(pthread_self(), &attributes);
  pthread_attr_getstack(&attributes, &stack, &bytes);
  pthread_attr_destroy(&attributes);
  launch.host_begin = reinterpret_cast<uintptr_t>(stack);
  launch.host_end = launch.host_begin + bytes;
  for (auto& region : regions) region->begin_launch();
  problem.clear();
  launched = &launch;
  std::mt19937_64 random(seed * 1000003 + ledger.size());
  try {
    run_all(random);
  } catch (...) {
    launched = nullptr;
    running = nullptr;
    throw;
  }
  launched = nullptr;
  Record record = {launch.kernel, blocks.x * blocks.y * blocks.z, {}};
  for (const auto& region : regions) record.regions.emplace_back(region->name, region->traffic);
  ledger.push_back(std::move(record));
}

// ---- for kernels ----------------------------------------------------------------------------------------------------------

uint3 thread_index() { return running->index; }
uint3 block_index() { return running->block->index; }
dim3 block_size() { return launched->threads; }
dim3 grid_size() { return launched->blocks; }

void* shared_array(const void* key, size_t bytes) {
  const Unwatched scope;
  Block& b = *running->block;
  const auto found = b.arrays.find(key);
  if (found != b.arrays.end()) return reinterpret_cast<void*>(b.shared.begin + found->second.first);
  const size_t offset = b.used + 16;   // something lies between two arrays, so that the end of one is not the other
  b.used = offset + (bytes + 15) / 16 * 16;
  if (b.used > kSharedBytes) fail("more than " + std::to_string(kSharedBytes) + " bytes of shared memory");
  b.shared.end = b.shared.begin + b.used;
  b.arrays[key] = {offset, bytes};
  return reinterpret_cast<void*>(b.shared.begin + offset);
}

void* dynamic_shared() { return reinterpret_cast<void*>(running->block->shared.begin); }

void sync_threads() {
  const Unwatched scope;
  wait(State::kAtBarrier);
}

void sync_cluster() {
  const Unwatched scope;
  wait(State::kAtCluster);
}

const void* shared_of_rank(const void* mine, unsigned rank) {
  const Unwatched scope;
  const Block& b = *running->block;
  if (rank >= b.cluster.size()) fail("no block of rank " + std::to_string(rank) + " is in the cluster");
  const Block& other = *b.cluster[rank];
  const size_t offset = reinterpret_cast<uintptr_t>(mine) - b.shared.begin;
  for (const auto& [key, array] : b.arrays) {
    if (offset < array.first || offset >= array.first + array.second) continue;
    const auto found = other.arrays.find(key);
    if (found == other.arrays.end()) fail("block " + std::to_string(other.number) + " has not come to that shared memory yet");
    return reinterpret_cast<const void*>(other.shared.begin + found->second.first + (offset - array.first));
  }
  return reinterpret_cast<const void*>(other.shared.begin + offset);   // dynamic
}

void sync_warp(unsigned mask) {
  const Unwatched scope;
  if (!(mask >> running->lane() & 1)) fail("__syncwarp with a mask that lacks the lane itself");
  running->is_sync = true;
  running->mask = mask;
  running->value = 0;
  wait(State::kAtExchange);
}

uint64_t exchange(Exchange kind, unsigned mask, uint64_t value, int lanes) {
  const Unwatched scope;
  if (!(mask >> running->lane() & 1)) fail("exchange between lanes with a mask that lacks the lane itself");
  running->is_sync = false;
  running->kind = kind;
  running->mask = mask;
  running->value = value;
  running->lanes = lanes;
  wait(State::kAtExchange);
  return running->value;
}

void thread_fence() {
  const Unwatched scope;
  running->fenced = true;
  add(running->acquired, running->pending);
  running->pending.clear();
}

namespace {
unsigned* atomic_place(unsigned* at) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(at);
  Region* r = region_of(address);
  if (r == nullptr || address + sizeof(unsigned) > r->end || !r->writable) fail("atomic outside of all memory that may be written");
  if (!r->byte(address).filled) fail("atomic on " + place(*r, address) + ", which nothing wrote");
  Blocks& released = launched->released[address];
  if (running->fenced) {
    Blocks own(running->block->number + 1);
    own[running->block->number] = true;
    add(own, running->block->acquired);
    add(released, own);
  }
  add(running->pending, released);
  r->traffic.read += sizeof(unsigned);
  r->traffic.written += sizeof(unsigned);
  return at;
}
}  // namespace

unsigned atomic_increment(unsigned* at, unsigned limit) {
  const Unwatched scope;
  unsigned& value = *atomic_place(at);
  const unsigned before = value;
  value = before >= limit ? 0 : before + 1;
  return before;
}

unsigned atomic_add(unsigned* at, unsigned added) {
  const Unwatched scope;
  unsigned& value = *atomic_place(at);
  const unsigned before = value;
  value += added;
  return before;
}

void saw(const void* at, size_t bytes, bool writes) {
#if defined(__SANITIZE_ADDRESS__)
  return;   // stores of the kernels do not arrive here
#endif
  if (!watching || bytes == 0) return;
  const Unwatched scope;
  const uintptr_t address = reinterpret_cast<uintptr_t>(at);
  if (running->fiber.owns(address)) return;
  Region* r = region_of(address);
  if (r == nullptr) {
    if (address >= launched->host_begin && address < launched->host_end) return;   // arguments of the kernel
    if (address >= reinterpret_cast<uintptr_t>(&__ehdr_start) && address < reinterpret_cast<uintptr_t>(&_end)) return;
    std::ostringstream out;
    out << (writes ? "writes " : "reads ") << bytes << " bytes outside of all memory";
    for (const auto& region : regions) {
      if (address >= region->end && address < region->end + 64) out << ", " << address - region->end << " behind " << region->name;
      if (address < region->begin && address + 64 > region->begin) out << ", " << region->begin - address << " before " << region->name;
    }
    fail(out.str());
  }
  const auto& cluster = running->block->cluster;
  const auto owner = std::find_if(cluster.begin(), cluster.end(), [&](Block* b) { return r == &b->shared; });
  if (owner != cluster.end() && !(*owner)->has(address - r->begin, bytes)) {
    fail((writes ? "writes " : "reads ") + std::to_string(bytes) + " bytes of shared memory outside of all arrays");
  }
  if (address + bytes > r->end) fail((writes ? "writes " : "reads ") + place(*r, address) + ": past the end");
  if (address % bytes != 0 && (bytes & (bytes - 1)) == 0) {
    fail("access of " + std::to_string(bytes) + " bytes to " + place(*r, address) + ": not aligned");
  }
  if (writes && !r->writable) fail("writes " + place(*r, address) + ", which is read-only");
  (writes ? r->traffic.written : r->traffic.read) += bytes;
  ++(writes ? r->traffic.write_widths : r->traffic.read_widths)[bytes];
  for (size_t i = 0; i < bytes; ++i) check_byte(*r, address + i, writes);
  if (owner != cluster.end() && *owner != running->block &&
      std::any_of((*owner)->threads.begin(), (*owner)->threads.begin() + static_cast<ptrdiff_t>(thread_count()),
                  [](const Thread& t) { return t.state == State::kDone; })) {
    fail("touches shared memory of block " + std::to_string((*owner)->number) + " of the cluster, which has ended");
  }
  if (writes && owner == cluster.end()) running->fenced = false;
}

}  // namespace cuda_emulator

// ---- for tests ------------------------------------------------------------------------------------------------------------

extern "C" {

__attribute__((visibility("default"))) void cuda_emulator_seed(uint64_t value) { cuda_emulator::seed = value; }

// Of each launch only so many blocks at either end of the grid run; 0: all.
__attribute__((visibility("default"))) void cuda_emulator_only_ends(int64_t blocks) { cuda_emulator::only_ends = blocks; }

__attribute__((visibility("default"))) void cuda_emulator_clear_ledger() { cuda_emulator::ledger.clear(); }

// All launches since it was cleared, as JSON: kernel, blocks, and per range of memory the bytes in all, those at distinct addresses,
// and how many accesses of which size.
__attribute__((visibility("default"))) const char* cuda_emulator_ledger() {
  using namespace cuda_emulator;
  static std::string text;
  std::ostringstream out;
  out << "[";
  for (size_t i = 0; i < ledger.size(); ++i) {
    out << (i ? ", " : "") << "{\"kernel\": \"" << ledger[i].kernel << "\", \"blocks\": " << ledger[i].blocks << ", \"memory\": [";
    for (size_t j = 0; j < ledger[i].regions.size(); ++j) {
      const auto& [name, t] = ledger[i].regions[j];
      out << (j ? ", " : "") << "{\"name\": \"" << name << "\", \"read\": " << t.read << ", \"written\": " << t.written
          << ", \"unique_read\": " << t.unique_read << ", \"unique_written\": " << t.unique_written
          << ", \"read_widths\": " << json(t.read_widths) << ", \"write_widths\": " << json(t.write_widths) << "}";
    }
    out << "]}";
  }
  out << "]";
  text = out.str();
  return text.c_str();
}

// What the compiler calls at each access under -fsanitize=thread.
#define BNFAST_HOOK(size)                                                                          \
  void __tsan_read##size(void* at) { cuda_emulator::saw(at, size, false); }                        \
  void __tsan_write##size(void* at) { cuda_emulator::saw(at, size, true); }                        \
  void __tsan_unaligned_read##size(void* at) { cuda_emulator::saw(at, size, false); }              \
  void __tsan_unaligned_write##size(void* at) { cuda_emulator::saw(at, size, true); }
BNFAST_HOOK(1)
BNFAST_HOOK(2)
BNFAST_HOOK(4)
BNFAST_HOOK(8)
BNFAST_HOOK(16)
#undef BNFAST_HOOK
void __tsan_read_range(void* at, unsigned long bytes) { cuda_emulator::saw(at, bytes, false); }
void __tsan_write_range(void* at, unsigned long bytes) { cuda_emulator::saw(at, bytes, true); }
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}

}  // extern "C"
