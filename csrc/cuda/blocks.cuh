// Which slots the threads of a block take, and how the blocks of a reduction come together.
#pragma once

#include "slots.cuh"

namespace bnfast::cuda {

// ---- elementwise phases -----------------------------------------------------------------------------------------------

// The slots of a block of an elementwise phase, counted from the end of the tensor: what the reduction before it read last is still
// in the L2 cache. A block of columns takes `kApplySteps` times `kLoads` lines per thread, side by side; a block of planes takes
// slots in a row, which may belong to several planes.
template <class T, bool kColumns, int kLoads>
struct ApplyBlock {
  const View& v;
  int64_t first;           // columns: line; planes: slot, counted from the first plane
  int64_t k = 0, line = 0;   // columns: the thread's slot of each line; planes: the first plane
  int tile = 0;

  static constexpr int kSteps = kColumns ? kApplySteps : 1;
  // Channels of a block of columns, or planes, at most: a plane has 8 elements' worth of slots or more.
  static constexpr int kMostStaged = kColumns ? kWidth<T> * kMostColumns : kThreads * kLoads * kWidth<T> / 8 + 2;

  static int64_t blocks(const View& v) {
    if (!kColumns) return ceil_div(v.lines * v.slots, kThreads * kLoads);
    return v.tiles * ceil_div(v.lines, (kThreads >> v.column_bits) * kLoads * kSteps);
  }

  BNFAST_DEVICE explicit ApplyBlock(const View& v) : v(v) {
    const int64_t block = int64_t{gridDim.x} - 1 - blockIdx.x;
    if constexpr (kColumns) {
      tile = static_cast<int>(block % v.tiles);
      first = block / v.tiles * ((kThreads >> v.column_bits) * kLoads * kSteps) + (threadIdx.x >> v.column_bits);
      k = (int64_t{tile} << v.column_bits) + (threadIdx.x & ((1u << v.column_bits) - 1));
    } else {
      line = block * (kThreads * kLoads) / v.slots;
      first = block * (kThreads * kLoads) - line * v.slots;
    }
  }

  // The u-th slot of a step, and where its channels are staged.
  BNFAST_DEVICE Slot slot(int step, int u, int& staged) const {
    if constexpr (kColumns) {
      staged = static_cast<int>(threadIdx.x & ((1u << v.column_bits) - 1)) * kWidth<T>;
      const int64_t l = first + int64_t{step * kLoads + u} * (kThreads >> v.column_bits);
      return l < v.lines && k < v.slots ? slot_of<T, true>(v, l, k) : no_slot();
    } else {
      const uint32_t at = static_cast<uint32_t>(first) + u * kThreads + threadIdx.x, slots = static_cast<uint32_t>(v.slots);
      staged = static_cast<int>(at / slots);
      return line + staged < v.lines ? slot_of<T, false>(v, line + staged, at % slots) : no_slot();
    }
  }

  // Calls set(channel, place) for all that the block's slots need, by all of its threads.
  template <class F>
  BNFAST_DEVICE void stage(F set) const {
    if constexpr (kColumns) {
      const int begin = tile * v.tile_channels;
      // Places behind the last channel get its values: they are read, and nothing comes of it.
      for (int i = threadIdx.x; i < v.tile_channels; i += kThreads) set(min(begin + i, v.channels - 1), i);
    } else {
      const int64_t last = (first + kThreads * kLoads - 1) / v.slots;
      for (int i = threadIdx.x; i <= last; i += kThreads) set(static_cast<int>((line + i) % v.channels), i);
    }
  }
};

// ---- reductions -------------------------------------------------------------------------------------------------------

// The slots of a block of a reduction: tile blockIdx.x of the channels, split blockIdx.y of their values.
template <class T, bool kColumns, int kLoads>
struct ReduceBlock {
  const View& v;
  int64_t line, k;   // of the next slot; planes: the image in place of the line

  BNFAST_DEVICE ReduceBlock(const View& v, const Split& split) : v(v) {
    if constexpr (kColumns) {
      line = int64_t{blockIdx.y} * split.steps * kLoads * (kThreads >> v.column_bits) + (threadIdx.x >> v.column_bits);
      k = (int64_t{blockIdx.x} << v.column_bits) + (threadIdx.x & ((1u << v.column_bits) - 1));
    } else {
      const int64_t first = int64_t{blockIdx.y} * split.steps * (kLoads * kThreads) + threadIdx.x;
      line = first / v.slots;
      k = first % v.slots;
    }
  }

  // The thread's first channel.
  BNFAST_DEVICE int64_t channel() const { return kColumns ? k * kWidth<T> : int64_t{blockIdx.x}; }

  // Where it is among those of the tile.
  BNFAST_DEVICE static int place(const View& v) { return kColumns ? (threadIdx.x & ((1u << v.column_bits) - 1)) * kWidth<T> : 0; }

  BNFAST_DEVICE Slot next() {
    if constexpr (kColumns) {
      const Slot s = line < v.lines && k < v.slots ? slot_of<T, true>(v, line, k) : no_slot();
      line += kThreads >> v.column_bits;
      return s;
    } else {
      const int64_t plane = line * v.channels + blockIdx.x;
      const Slot s = plane < v.lines ? slot_of<T, false>(v, plane, k) : no_slot();
      k += kThreads;
      if (k >= v.slots) {
        const uint32_t past = static_cast<uint32_t>(k), slots = static_cast<uint32_t>(v.slots);
        line += past / slots;
        k = past % slots;
      }
      return s;
    }
  }
};

// Whether this block is the last of `blocks` that reach this point, whose results it may then read with __ldcg. The counter is 0
// before the first and after the last.
BNFAST_DEVICE bool is_last_block(unsigned* counter, unsigned blocks) {
  BNFAST_SHARED(bool, is_last, 1);
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    is_last[0] = atomicInc(counter, blocks - 1) == blocks - 1;
    __threadfence();
  }
  __syncthreads();
  return is_last[0];
}

// Of one value per thread the sum over all threads with the same threadIdx.x % channels, in a fixed order; channels is a power of
// two. Called by all threads of the block; scratch: kThreads values.
template <class A>
BNFAST_DEVICE A sum_by_channel(A value, int channels, A* scratch) {
  __syncthreads();
  scratch[threadIdx.x] = value;
  for (int half = kThreads / 2; half >= channels; half /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < half) scratch[threadIdx.x] += scratch[threadIdx.x + half];
  }
  __syncthreads();
  return scratch[threadIdx.x & (channels - 1)];
}

// Where the partial results of a split lie: value `what` of channel c of parts [splits, values, C].
template <class A>
BNFAST_DEVICE A* part(const Workspace& w, int values, int split, int what, int channels, int c) {
  return static_cast<A*>(w.parts) + (int64_t{split} * values + what) * channels + c;
}

// The sum over all splits of f(split), for channel c of this thread; see sum_by_channel.
template <class A, class F>
BNFAST_DEVICE A sum_over_splits(int splits, int channels, A* scratch, F f) {
  A sum = 0;
#pragma unroll 4
  for (int s = threadIdx.x / channels; s < splits; s += kThreads / channels) sum += f(s);
  return sum_by_channel(sum, channels, scratch);
}

}  // namespace bnfast::cuda
