// bn_fwd_reduce and bn_fwd_apply. Bytes of global memory per element of s bytes:
//   bn_fwd_reduce_kernel   read s                         and three numbers per channel and split, written and read once
//   bn_fwd_apply_kernel    read s (+ s), write s (+ 1/8)  with residual, with bits
//   bn_fwd_reduce_apply_kernel   read s (+ s), write s (+ 1/8)   both phases, z kept in shared memory between them
#include "blocks.cuh"
#include "launch.cuh"

namespace bnfast::cuda {
namespace {

// ---- bn_fwd_reduce ------------------------------------------------------------------------------------------------------

// Moments are counted from a value of the channel, so that the size of the mean costs no digits, however many are merged: from the
// median of the first, a middle and the last one, since a single one may lie far from the others. From 0 where these differ by more
// than they are large (then the mean is not far off, and may itself be close to 0), or are no numbers to count from.
template <class T, bool kColumns>
BNFAST_DEVICE acc_t<T> origin_of(const FwdReduce& a, int64_t c) {
  using A = acc_t<T>;
  const View& v = a.view;
  if (c >= v.channels) return A(0);
  const auto value = [&](int64_t line, int64_t at) {
    return widened(static_cast<const T*>(a.z)[kColumns ? line * v.length + c : (line * v.channels + c) * v.length + at]);
  };
  const int64_t last = (kColumns ? v.lines : v.lines / v.channels) - 1;
  const A x = value(0, 0), y = value(last / 2, v.length / 2), z = value(last, v.length - 1);
  const A low = x < y ? x : y, high = x < y ? y : x;
  const A median = z < low ? low : z < high ? z : high;
  const A spread = (z > high ? z : high) - (z < low ? z : low);
  return is_finite(median) && spread < (median < A(0) ? -median : median) ? median : A(0);
}

// Number of values, mean and M2 of `kValues` channels.
template <class A, int kValues>
struct Moments {
  A n = 0, mean[kValues] = {}, m2[kValues] = {};

  // Chan's formula: n = na + nb, e = mean_b - mean_a, mean = mean_a + e nb / n, M2 = M2_a + M2_b + e^2 na nb / n.
  BNFAST_DEVICE void merge(A other_n, const A (&other_mean)[kValues], const A (&other_m2)[kValues]) {
    const A total = n + other_n, weight = total > A(0) ? quotient(other_n, total) : A(0);
    for (int j = 0; j < kValues; ++j) {
      const A step = other_mean[j] - mean[j];
      mean[j] += step * weight;
      m2[j] += other_m2[j] + step * (step * (n * weight));   // in this order: step^2 may be infinite while n is 0
    }
    n = total;
  }
};

// Merges the slots that a thread has in flight: their mean as the centre, then sum(d) and sum(d^2) of d = z - centre, which correct
// it. n is the number of values per channel. kMasked: not all places count, but those whose bit in `counted` is set.
template <bool kMasked, bool kColumns, class T, int kLoads, int kValues>
BNFAST_DEVICE void merge_slots(Moments<acc_t<T>, kValues>& moments, const Packed<T> (&z)[kLoads], const uint32_t (&counted)[kLoads],
                               const acc_t<T> (&origin)[kValues], acc_t<T> n) {
  using A = acc_t<T>;
  constexpr int w = kWidth<T>;
  const auto place = [](int i) { return kColumns ? i : 0; };
  const auto counts = [&](int u, int i) { return !kMasked || (counted[u] >> (kColumns ? 0 : i) & 1) != 0; };
  // Sums per place; those of planes become one.
  const auto collapse = [&](const A (&sums)[w], A (&to)[kValues]) {
    if constexpr (kColumns) {
      for (int i = 0; i < w; ++i) to[i] = sums[i];
    } else {
      A half[w];
      for (int i = 0; i < w; ++i) half[i] = sums[i];
      for (int count = w / 2; count > 0; count /= 2) {
        for (int i = 0; i < count; ++i) half[i] += half[i + count];
      }
      to[0] = half[0];
    }
  };
  const A one_over_n = quotient(A(1), n);
  A sums[w] = {}, centre[kValues];
#pragma unroll
  for (int u = 0; u < kLoads; ++u) {
    for (int i = 0; i < w; ++i) sums[i] += counts(u, i) ? z[u][i] - origin[place(i)] : A(0);
  }
  collapse(sums, centre);
  for (int j = 0; j < kValues; ++j) centre[j] *= one_over_n;
  A rests[w] = {}, squares[w] = {}, rest[kValues], square[kValues];
#pragma unroll
  for (int u = 0; u < kLoads; ++u) {
    for (int i = 0; i < w; ++i) {
      const A d = counts(u, i) ? (z[u][i] - origin[place(i)]) - centre[place(i)] : A(0);
      rests[i] += d;
      squares[i] = fma(d, d, squares[i]);
    }
  }
  collapse(rests, rest);
  collapse(squares, square);
  for (int j = 0; j < kValues; ++j) {
    centre[j] += rest[j] * one_over_n;
    square[j] -= rest[j] * rest[j] * one_over_n;
  }
  moments.merge(n, centre, square);
}

// All threads' moments of the same channels, in a fixed order: lanes of a warp, then warps. Calls put(what, place, channel, value)
// for the block's number of values, mean and M2.
template <class A, int kValues, class F>
BNFAST_DEVICE void merge_block(Moments<A, kValues>& mine, const FwdReduce& a, F put) {
  constexpr int kWarps = kThreads / 32, kMost = kValues * (kValues > 1 ? kMostColumns : 1);
  BNFAST_SHARED(A, number, kWarps * kMostColumns);
  BNFAST_SHARED(A, mean, kWarps * kMost);
  BNFAST_SHARED(A, m2, kWarps * kMost);
  const int columns = kValues > 1 ? 1 << a.view.column_bits : 1, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int lanes = 16; lanes >= columns; lanes /= 2) {
    A other_mean[kValues], other_m2[kValues];
    const A other_n = __shfl_down_sync(kAllLanes, mine.n, lanes);
    for (int j = 0; j < kValues; ++j) {
      other_mean[j] = __shfl_down_sync(kAllLanes, mine.mean[j], lanes);
      other_m2[j] = __shfl_down_sync(kAllLanes, mine.m2[j], lanes);
    }
    mine.merge(other_n, other_mean, other_m2);
  }
  if (lane < columns) {
    number[warp * columns + lane] = mine.n;
    for (int j = 0; j < kValues; ++j) {
      mean[(warp * columns + lane) * kValues + j] = mine.mean[j];
      m2[(warp * columns + lane) * kValues + j] = mine.m2[j];
    }
  }
  __syncthreads();
  const int channels = columns * kValues, i = threadIdx.x, c = blockIdx.x * channels + i;
  if (i < channels && c < a.view.channels) {
    Moments<A, 1> all;
    for (int w = 0; w < kWarps; ++w) {
      const A other_mean[1] = {mean[w * channels + i]}, other_m2[1] = {m2[w * channels + i]};
      all.merge(number[w * columns + i / kValues], other_mean, other_m2);
    }
    put(0, i, c, all.n);
    put(1, i, c, all.mean[0]);
    put(2, i, c, all.m2[0]);
  }
}

// Chan's formula for all splits at once, rstd and the running statistics: equations (1) to (4) of bnfast/reference.py.
// get(split, what, place, channel) gives what merge_block put. Calls found(place, channel, mean, rstd) for each channel of the
// tile, by one thread; results and running statistics are written where `writes`.
template <class T, bool kColumns, class Get, class Found>
BNFAST_DEVICE void finalise_moments(const FwdReduce& a, bool writes, Get get, Found found) {
  using A = acc_t<T>;
  BNFAST_SHARED(A, scratch, kThreads);
  const int channels = a.view.tile_channels, i = threadIdx.x & (channels - 1), c = static_cast<int>(blockIdx.x) * channels + i;
  const bool inside = c < a.view.channels;
  const auto load_part = [&](int split, int what) { return inside ? get(split, what, i, c) : A(0); };
  const A count = static_cast<A>(a.view.count), one_over_count = static_cast<A>(a.view.one_over_count);
  A mean = sum_over_splits(a.split.splits, channels, scratch, [&](int s) { return load_part(s, 0) * load_part(s, 1); });
  mean *= one_over_count;
  const A m2 = sum_over_splits(a.split.splits, channels, scratch, [&](int s) {
    const A d = load_part(s, 1) - mean;
    return load_part(s, 2) + d * (d * load_part(s, 0));
  });
  if (inside && static_cast<int>(threadIdx.x) < channels) {
    mean += origin_of<T, kColumns>(a, c);
    const A shifted = m2 * one_over_count + static_cast<A>(a.eps);
    const A rstd = shifted == A(0) ? A(0) : quotient(A(1), square_root(shifted));
    found(i, c, mean, rstd);
    if (writes) {
      static_cast<A*>(a.mean)[c] = mean;
      static_cast<A*>(a.m2)[c] = m2;
      static_cast<A*>(a.rstd)[c] = rstd;
      const A factor = a.averages && a.tracked ? quotient(A(1), static_cast<A>(*a.tracked + 1)) : static_cast<A>(a.momentum);
      const auto update = [&](const ChannelVector& running, A batch) {
        if (running.values) set_value(running, c, (A(1) - factor) * value_of(running, c, A(0)) + factor * batch);
      };
      update(a.running_mean, mean);
      update(a.running_var, quotient(m2, count > A(1) ? count - A(1) : A(1)));
    }
  }
  // Counted by whoever comes last, when all have read it.
  if (writes && a.tracked && is_last_block(a.workspace.counters + gridDim.x, gridDim.x) && threadIdx.x == 0) *a.tracked += 1;
}

// The moments of this thread's slots of the block. Calls keep(step, u, z) for each.
template <class T, bool kColumns, class F>
BNFAST_DEVICE Moments<acc_t<T>, kColumns ? kWidth<T> : 1> moments_of(const FwdReduce& a, F keep) {
  using A = acc_t<T>;
  constexpr int w = kWidth<T>, kValues = kColumns ? w : 1;
  ReduceBlock<T, kColumns, kReduceLoads> block(a.view, a.split);
  A origin[kValues];
  for (int j = 0; j < kValues; ++j) origin[j] = origin_of<T, kColumns>(a, block.channel() + j);
  Moments<A, kValues> moments;
  for (int64_t step = 0; step < a.split.steps; ++step) {
    uint32_t counted[kReduceLoads];
    Packed<T> z[kReduceLoads];
    int values = 0;   // per channel
#pragma unroll
    for (int u = 0; u < kReduceLoads; ++u) {
      const Slot slot = block.next();
      z[u] = load<Reuse::kSoon>(static_cast<const T*>(a.z), slot, a.view.wide);
      keep(step, u, z[u]);
      counted[u] = kColumns ? slot.is_there() : slot.places();
      values += kColumns ? slot.is_there() : slot.hi - slot.lo;
    }
    const A n = static_cast<A>(values);
    if (values == kReduceLoads * (kColumns ? 1 : w)) merge_slots<false, kColumns>(moments, z, counted, origin, n);
    else if (values > 0) merge_slots<true, kColumns>(moments, z, counted, origin, n);
  }
  return moments;
}

template <class T, bool kColumns>
__global__ void __launch_bounds__(kThreads, kLeastResident) bn_fwd_reduce_kernel(const FwdReduce a) {
  using A = acc_t<T>;
  const auto place = [&](int split, int what, int c) {
    return part<A>(a.workspace, FwdReduce::kValues, split, what, a.view.channels, c);
  };
  auto moments = moments_of<T, kColumns>(a, [](int64_t, int, const Packed<T>&) {});
  merge_block(moments, a, [&](int what, int, int c, A value) { *place(blockIdx.y, what, c) = value; });
  if (is_last_block(a.workspace.counters + blockIdx.x, gridDim.y)) {
    finalise_moments<T, kColumns>(
        a, true, [&](int split, int what, int, int c) { return __ldcg(place(split, what, c)); }, [](int, int, A, A) {});
  }
}

// ---- bn_fwd_apply -------------------------------------------------------------------------------------------------------

// y of a slot, and its bits where they are wanted. All lanes of the warp call it. r: null without a residual.
template <class T, bool kColumns, class Activation>
BNFAST_DEVICE void apply_slot(const FwdApply& a, const Activation& act, const Channel<T, kColumns>& channel, const Slot& slot,
                              const Packed<T>& z, const Packed<T>* r) {
  using A = acc_t<T>;
  constexpr int w = kWidth<T>;
  A y[w];
  uint32_t passes = 0;
  for (int i = 0; i < w; ++i) {
    A pre = channel.pre_activation(z[i], i);
    if (r) pre += (*r)[i];
    y[i] = act.value(pre);
    if constexpr (Activation::kPiecewise) passes |= static_cast<uint32_t>(act.passes(rounded<T>(pre))) << i;
  }
  store(static_cast<T*>(a.y), slot, a.view.wide, y);
  if (a.bits) store_bits<T>(a.bits, slot, passes);
}

template <class T, bool kColumns, bool kResidual>
__global__ void __launch_bounds__(kThreads, kLeastResident) bn_fwd_apply_kernel(const FwdApply a) {
  using A = acc_t<T>;
  using Block = ApplyBlock<T, kColumns, kFwdApplyLoads>;
  constexpr int kStride = Block::kMostStaged;
  BNFAST_SHARED(A, staged, 3 * kStride);
  const T *z_from = static_cast<const T*>(a.z), *r_from = static_cast<const T*>(a.residual);
  const Block block(a.view);
  Channel<T, kColumns> channel;
  for (int step = 0; step < Block::kSteps; ++step) {
    Slot slots[kFwdApplyLoads];
    Packed<T> z[kFwdApplyLoads], r[kResidual ? kFwdApplyLoads : 1];
    int places[kFwdApplyLoads];
#pragma unroll
    for (int u = 0; u < kFwdApplyLoads; ++u) {
      slots[u] = block.slot(step, u, places[u]);
      z[u] = load<Reuse::kLast>(z_from, slots[u], a.view.wide);
      if constexpr (kResidual) r[u] = load<Reuse::kLast>(r_from, slots[u], a.view.wide);
    }
    if (step == 0) {
      block.stage([&](int c, int i) { stage_affine(a.affine, c, staged + i, kStride); });
      __syncthreads();
      if constexpr (kColumns) channel = channel_at<T, true>(staged, places[0], kStride);
    }
    with_activation(a.act, a.slope, [&](auto act) {
#pragma unroll
      for (int u = 0; u < kFwdApplyLoads; ++u) {
        if constexpr (!kColumns) channel = channel_at<T, false>(staged, places[u], kStride);
        apply_slot(a, act, channel, slots[u], z[u], kResidual ? &r[u] : nullptr);
      }
    });
  }
}

// ---- both, z read once ------------------------------------------------------------------------------------------------

template <class T, bool kColumns, bool kResidual>
__global__ void __launch_bounds__(kThreads, 1) bn_fwd_reduce_apply_kernel(const FwdReduceApply a) {
  if constexpr (kHasClusters) {
    using A = acc_t<T>;
    constexpr int kStride = kColumns ? kWidth<T> * kMostColumns : 1;
    BNFAST_DYNAMIC_SHARED(uint4, kept);
    BNFAST_SHARED(A, own, FwdReduce::kValues * kStride);
    BNFAST_SHARED(A, staged, 3 * kStride);
    const View& v = a.reduce.view;
    const auto place = [&](int64_t step, int u) { return kept + (step * kReduceLoads + u) * kThreads + threadIdx.x; };
    auto moments = moments_of<T, kColumns>(a.reduce, [&](int64_t step, int u, const Packed<T>& z) { *place(step, u) = z.words; });
    merge_block(moments, a.reduce, [&](int what, int i, int, A value) { own[what * kStride + i] = value; });
    cluster_sync();
    if (static_cast<int>(threadIdx.x) < v.tile_channels) {   // also behind the last channel: they are read, and nothing comes of it
      for (int what = 0; what < 3; ++what) staged[what * kStride + threadIdx.x] = A(0);
    }
    finalise_moments<T, kColumns>(
        a.reduce, blockIdx.y == 0, [&](int split, int what, int i, int) { return cluster_value(own + what * kStride + i, split); },
        [&](int i, int c, A mean, A rstd) {
          staged[i] = mean;
          staged[kStride + i] = value_of(a.apply.affine.gamma, c, A(1)) * rstd;
          staged[2 * kStride + i] = value_of(a.apply.affine.beta, c, A(0));
        });
    cluster_sync();   // no block ends while others read what it found
    const auto channel = channel_at<T, kColumns>(staged, ReduceBlock<T, kColumns, 1>::place(v), kStride);
    ReduceBlock<T, kColumns, kReduceLoads> block(v, a.reduce.split);
    for (int64_t step = 0; step < a.reduce.split.steps; ++step) {
      Slot slots[kReduceLoads];
      Packed<T> r[kResidual ? kReduceLoads : 1];
#pragma unroll
      for (int u = 0; u < kReduceLoads; ++u) {
        slots[u] = block.next();
        if constexpr (kResidual) r[u] = load<Reuse::kLast>(static_cast<const T*>(a.apply.residual), slots[u], a.apply.view.wide);
      }
      with_activation(a.apply.act, a.apply.slope, [&](auto act) {
#pragma unroll
        for (int u = 0; u < kReduceLoads; ++u) {
          apply_slot(a.apply, act, channel, slots[u], Packed<T>{*place(step, u)}, kResidual ? &r[u] : nullptr);
        }
      });
    }
  }
}

}  // namespace

bool has_clusters() { return runs_clusters(bn_fwd_reduce_apply_kernel<float, true, false>); }

int launch_bn_fwd_reduce_apply(const FwdReduceApply& a, void* stream) {
  const Split& split = a.reduce.split;
  return with_types(a.reduce.dtype, a.reduce.view, [&](auto type, auto columns) {
    using T = typename decltype(type)::type;
    const dim3 blocks(a.reduce.view.tiles, split.splits);
    const int64_t kept = split.kept_bytes(kReduceLoads, 1);
    if (a.apply.residual) {
      return BNFAST_LAUNCH_CLUSTERS((bn_fwd_reduce_apply_kernel<T, columns, true>), blocks, split.splits, kThreads, kept, stream, a);
    }
    return BNFAST_LAUNCH_CLUSTERS((bn_fwd_reduce_apply_kernel<T, columns, false>), blocks, split.splits, kThreads, kept, stream, a);
  });
}

int launch_bn_fwd_reduce(const FwdReduce& a, void* stream) {
  return with_types(a.dtype, a.view, [&](auto type, auto columns) {
    using T = typename decltype(type)::type;
    const dim3 blocks(a.view.tiles, a.split.splits);
    return BNFAST_LAUNCH((bn_fwd_reduce_kernel<T, columns>), blocks, kThreads, 0, stream, a);
  });
}

int launch_bn_fwd_apply(const FwdApply& a, void* stream) {
  return with_types(a.dtype, a.view, [&](auto type, auto columns) {
    using T = typename decltype(type)::type;
    const dim3 blocks(ApplyBlock<T, columns, kFwdApplyLoads>::blocks(a.view));
    if (a.residual) return BNFAST_LAUNCH((bn_fwd_apply_kernel<T, columns, true>), blocks, kThreads, 0, stream, a);
    return BNFAST_LAUNCH((bn_fwd_apply_kernel<T, columns, false>), blocks, kThreads, 0, stream, a);
  });
}

}  // namespace bnfast::cuda
