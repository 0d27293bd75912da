// The BatchNorm phases on CUDA: what the operators (bn.cpp) hand to the launchers (bn_fwd.cu, bn_bwd.cu). No torch headers here
// and no CUDA ones: launchers take pointers and sizes, and compile as plain C++ too.
//
// A dense tensor is seen as lines of elements that lie next to each other:
//   columns   a line is a pixel, its elements are the channels       channels_last, and tensors without a spatial size
//   planes    a line is a plane (n, c), its elements are the pixels  contiguous (NCHW): the channel of line l is l % C
// A thread takes a slot: up to 16 bytes side by side. Slots of columns begin with the line; those of planes begin where memory is
// aligned, so that the first and the last slot of a plane may be partial. A line has `slots` of them, a whole number of bytes of
// one bit per element: bit i of slot s of line l is bit (l * slots + s) * width + i.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../activation.h"

namespace bnfast::cuda {

enum class DType : int { kFloat, kDouble, kBFloat16, kHalf };

// Where the backward finds the slope of the activation.
enum class Slope : int { kFromZ, kFromZAndResidual, kFromBits };

constexpr int kThreads = 256;      // of every block
constexpr int kLeastResident = 2;  // blocks that a multiprocessor holds at once, at least: 128 registers per thread
constexpr int kMostColumns = 16;   // slots side by side that a block takes of columns: 256 bytes
constexpr int kMostSplits = 256;   // blocks that share the channels of a reduction, at most ...
constexpr int kBlocks = 1024;      // ... and about how many there are in all: fixed, so that no bit depends on the device;
constexpr int kLeastBlocks = 256;  // more than this many only where each has
constexpr int kManyValues = 512;   // this many values per channel, and never with fewer than
constexpr int kLeastValues = 256;  // this many: partial results are then a hundredth of what is moved
constexpr int kMostInCluster = 8;            // blocks of a cluster, on any device that has them
constexpr int64_t kOnChip = 200 * 1024;      // bytes of shared memory that a block fills with values
constexpr int kLeastOnChipBlocks = 128;      // with fewer the machine is better used in two passes
constexpr int kMostOnChipBlocks = 1 << 20;
constexpr int kReduceLoads = 8;    // slots in flight per thread, by phase
constexpr int kFwdApplyLoads = 4;
constexpr int kBwdReduceLoads = 4;
constexpr int kBwdApplyLoads = 2;
constexpr int kApplySteps = 4;     // times that a thread of an elementwise phase of columns takes so many

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How a dense tensor lies in memory.
struct View {
  bool columns;
  bool wide;          // whole slots are moved in one access: all tensors begin at multiples of 16 bytes, and so do the lines of columns
  int width;          // elements of a slot
  int channels;
  int64_t lines, length, slots;
  int64_t count;      // values per channel ...
  double one_over_count;
  int column_bits;    // columns: a block takes 1 << column_bits slots side by side
  int tiles;          // blocks side by side that cover all channels of a reduction ...
  int tile_channels;  // ... and the channels of each, a power of two

  View() = default;
  View(bool columns, bool wide, int element_size, int64_t batch, int64_t channels, int64_t plane)
      : columns(columns),
        wide(wide),
        width(16 / element_size),
        channels(static_cast<int>(channels)),
        lines(columns ? batch * plane : batch * channels),
        length(columns ? channels : plane),
        count(batch * plane),
        one_over_count(1.0 / static_cast<double>(std::max<int64_t>(1, batch * plane))) {
    const int64_t bytes = ceil_div(length, 8) + (!columns && length % 8 != 0);
    slots = bytes * 8 / width;
    int bits = 0;
    while (columns && (1 << bits) < std::min<int64_t>(slots, kMostColumns)) ++bits;
    set_columns(bits);
  }

  void set_columns(int bits) {
    column_bits = bits;
    tiles = static_cast<int>(columns ? ceil_div(slots, int64_t{1} << column_bits) : channels);
    tile_channels = columns ? width << column_bits : 1;
  }

  int64_t bit_bytes() const { return lines * slots * width / 8; }
};

// How a reduction is cut into blocks: tiles x splits, each of `steps` times the slots that its threads have in flight. Depends on
// the shape alone. `on_chip`: the splits of a tile hold all their values in shared memory, and are few enough to form a cluster of
// blocks, which read each other's: the two phases in one read the tensors once (bn_fwd_reduce_apply, bn_bwd_reduce_apply).
struct Split {
  int splits;
  int64_t steps;
  bool on_chip;

  Split() = default;
  // Narrows the blocks of v where that brings its values on chip. tensors: how many a block has to keep.
  Split(View& v, int loads, int tensors) {
    on_chip = true;
    const int widest = v.column_bits, narrowest = v.columns ? 8 / v.width > 2 ? 2 : 1 : 0;   // 32 bytes, and whole bytes of bits
    for (int bits = widest; bits >= std::min(widest, narrowest); --bits) {
      v.set_columns(bits);
      for (splits = 1; splits <= kMostInCluster; splits *= 2) {
        const int64_t whole = steps_of_all(v, loads);
        steps = ceil_div(whole, splits);
        const bool fits = kept_bytes(loads, tensors) <= kOnChip && int64_t{v.tiles} * splits <= kMostOnChipBlocks;
        if (fits && splits <= whole && v.tiles * splits >= kLeastOnChipBlocks) return;
      }
    }
    on_chip = false;
    v.set_columns(widest);
    const int64_t whole = steps_of_all(v, loads);
    const int64_t least = std::max(1, kLeastBlocks / v.tiles), most = std::max(1, kBlocks / v.tiles);
    const int64_t wanted = std::min(std::clamp(v.count / kManyValues, least, most), std::max<int64_t>(1, v.count / kLeastValues));
    steps = ceil_div(whole, std::min({whole, wanted, int64_t{kMostSplits}}));
    splits = static_cast<int>(ceil_div(whole, steps));
  }

  // Bytes of shared memory for the values of a block.
  int64_t kept_bytes(int loads, int tensors) const { return steps * loads * tensors * kThreads * 16; }

 private:
  static int64_t steps_of_all(const View& v, int loads) {
    if (v.columns) return ceil_div(v.lines, (kThreads >> v.column_bits) * loads);
    return ceil_div(v.lines / v.channels * v.slots, kThreads * loads);
  }
};

// A vector of one value per channel in any dtype; null where it is absent.
struct ChannelVector {
  void* values = nullptr;
  DType dtype = DType::kFloat;
};

// What normalises: y = act((z - mean) * gamma * rstd + beta (+ residual)). mean and rstd are of the accumulator's dtype.
struct Affine {
  const void* mean = nullptr;
  const void* rstd = nullptr;
  ChannelVector gamma, beta;
};

// Partial results of a reduction, [splits, values per channel, C] of the accumulator's dtype, uninitialised; and its counters of
// finished blocks: tiles + 1 of them, 0 before and after every launch.
struct Workspace {
  void* parts;
  unsigned* counters;
};

struct FwdReduce {
  View view;
  Split split;
  DType dtype;
  const void* z;
  Workspace workspace;
  void *mean, *m2, *rstd;
  ChannelVector running_mean, running_var;
  int64_t* tracked;   // num_batches_tracked, or null
  bool averages;      // momentum is 1 / num_batches_tracked
  double momentum, eps;

  static constexpr int kValues = 3;   // number, mean and M2
};

struct FwdApply {
  View view;
  DType dtype;
  const void *z, *residual;
  void* y;
  uint8_t* bits;
  Affine affine;
  Act act;
  double slope;
};

struct Gradient {
  const void *dy, *z, *residual;
  const uint8_t* bits;
  Affine affine;
  Act act;
  double slope;
  Slope slope_from;
};

struct BwdReduce {
  View view;
  Split split;
  DType dtype;
  Gradient gradient;
  Workspace workspace;
  void *dgamma, *dbeta;

  static constexpr int kValues = 2;   // sum(db) and sum(db * (z - mean))
};

struct BwdApply {
  View view;
  DType dtype;
  Gradient gradient;
  const void *dgamma, *dbeta;   // of the accumulator's dtype; null where the statistics are constants
  void* dz;                     // may be gradient.dy: an element is read before it is written
  void* dresidual;              // or null
};

// Two phases in one: the reduction's view and split are that of both.
struct FwdReduceApply {
  FwdReduce reduce;
  FwdApply apply;
};

struct BwdReduceApply {
  BwdReduce reduce;
  BwdApply apply;
};

// Whether the current device, and what was compiled, has clusters of blocks: the launchers of two phases in one need them, and
// splits that are on_chip.
bool has_clusters();

// Each starts one kernel on a CUDA stream (cudaStream_t), for a tensor that is not empty, and returns a cudaError_t.
int launch_bn_fwd_reduce(const FwdReduce&, void* stream);
int launch_bn_fwd_apply(const FwdApply&, void* stream);
int launch_bn_bwd_reduce(const BwdReduce&, void* stream);
int launch_bn_bwd_apply(const BwdApply&, void* stream);
int launch_bn_fwd_reduce_apply(const FwdReduceApply&, void* stream);
int launch_bn_bwd_reduce_apply(const BwdReduceApply&, void* stream);

}  // namespace bnfast::cuda
