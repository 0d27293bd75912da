// The BatchNorm phases on the CPU: what the operators (bn.cpp) hand to the kernels (bn_kernels.h), and the table of kernels
// that each capability provides. No torch headers here: kernels take pointers and sizes.
//
// A tensor is seen in one of two ways, and "channel parameters" are laid out to match:
//   rows    memory is a sequence of rows of `length` elements, the same channel at the same place of every row; parameters are
//           arrays of `length`. channels_last with C channels: length is a multiple of C (several pixels side by side), so
//           that it is a multiple of 16 whatever C is. The last row may be partial.
//   planes  memory is N x C planes of `plane` elements of one channel each; parameters are arrays of C. (NCHW.)
#pragma once

#include <cstdint>

#include "../activation.h"
#include "pixels.h"

namespace bnfast {

// Where the backward finds the slope of the activation.
enum class Slope : int { kFromZ, kFromZAndResidual, kFromBits };

// All element pointers are of the phase's dtype, all channel parameters and partial results of its accumulator.
struct BnTensors {
  const void* z = nullptr;
  const void* dy = nullptr;
  const void* residual = nullptr;
  const void* add = nullptr;      // bwd_join_rows: what else flows into dy
  const void* z_beside = nullptr, *mean_beside = nullptr;   // ... the residual's z and mean, null without one
  void* out = nullptr;        // y, or dz; bwd_join_rows: dy's own memory
  void* dresidual = nullptr;
  uint16_t* bits = nullptr;   // one bit per element, a word per Block; planes start at a new word
  const void* mean = nullptr;
  const void* scale = nullptr;   // gamma * rstd
  const void* beta = nullptr;
  const void* shift_db = nullptr;   // dbeta / M; null where the statistics are constants
  const void* shift_z = nullptr;    // rstd * dgamma / M
  Act act = Act::kIdentity;
  double slope = 0;
  Slope slope_from = Slope::kFromZ;
  int64_t ahead = 0;     // planes: elements from what an elementwise phase reads to what is read after it, fetched meanwhile
  Upcoming* upcoming = nullptr;   // fwd_reduce_rows, bwd_join_rows: fetched meanwhile
  bool streams = false;  // out is written past the cache: nothing reads it soon, and its lines need not be read first
};

// A run of whole rows, or the last, partial one: elements [begin, end) with begin a multiple of length.
struct RowSpan { int64_t length, begin, end; };

// Elements [s_begin, s_end) of the planes (n, c) with n, c in their ranges; s_begin is a multiple of 16.
struct PlaneSpan {
  int64_t channels, plane;
  int64_t n_begin, n_end, c_begin, c_end, s_begin, s_end;
};

// Pixels [begin, end) of a channels_last tensor, counted over n and the plane; parameters are arrays of C.
struct PixelSpan { int64_t channels, begin, end; };

// Kernels of one capability for one dtype. Each call is one unit of work, done by one thread.
struct BnKernels {
  // bn_fwd_reduce: exact mean and M2 of the span per parameter place.
  // rows: arrays of length, only whole rows; planes: arrays of C, written at c_begin .. c_end. scratch: 3 * length accumulators.
  void (*fwd_reduce_rows)(const BnTensors&, RowSpan, double* mean, double* m2, void* scratch);
  void (*fwd_reduce_planes)(const BnTensors&, PlaneSpan, double* mean, double* m2);
  // bn_fwd_apply.
  void (*fwd_apply_rows)(const BnTensors&, RowSpan);
  void (*fwd_apply_planes)(const BnTensors&, PlaneSpan);
  // bn_bwd_reduce: sum(db) and sum(db * (z - mean)) of the span.
  void (*bwd_reduce_rows)(const BnTensors&, RowSpan, void* sum_db, void* sum_db_z);
  void (*bwd_reduce_planes)(const BnTensors&, PlaneSpan, void* sum_db, void* sum_db_z);
  // bn_bwd_reduce of a run of rows while dy is in the cache: dy += add, then db in its place where there are bits or the activation is
  // smooth; db, db * (z - mean), and db * (z_beside - mean_beside) are added to sums, three arrays of length. float32 and bfloat16,
  // else null.
  void (*bwd_join_rows)(const BnTensors&, RowSpan, float* sums);
  void (*add_rows)(const BnTensors&, RowSpan);   // dy += add
  // bn_bwd_apply.
  void (*bwd_apply_rows)(const BnTensors&, RowSpan);
  void (*bwd_apply_planes)(const BnTensors&, PlaneSpan);
  // se_bwd_reduce: sum(dy * y) with y = act((z - mean) * scale + beta), over the pixels (arrays of C), or of each plane of the
  // span (sums of N x C). se_fwd_reduce: sum(y) of pixels, without dy.
  void (*se_reduce_pixels)(const BnTensors&, PixelSpan, void* sums);
  void (*se_reduce_planes)(const BnTensors&, PlaneSpan, void* sums);
  // se_bwd_sums, five arrays of C. float32, else null.
  void (*se_bwd_sums)(const BnTensors&, PixelSpan, void* sums);
  // to = from * gate + shift, of pixels; gate and shift (or null) of N x C. `from` counts pixels from 0, `to` from span.begin. float32, else null.
  void (*se_gate_pixels)(const float* from, float* to, PixelSpan, int64_t plane, const float* gate, const float* shift);
};

}  // namespace bnfast
