// bn_bwd_reduce and bn_bwd_apply. Bytes of global memory per element of s bytes:
//   bn_bwd_reduce_kernel   read 2 s (+ s, + 1/8)              with the residual of a smooth activation, with bits; and two
//                                                             numbers per channel and split, written and read once
//   bn_bwd_apply_kernel    read 2 s (+ s, + 1/8), write s (+ s)   with dresidual
//   bn_bwd_reduce_apply_kernel   read 2 s (+ 2 s, + 2/8), write s (+ s)   both phases, dy and z kept in shared memory between them
#include "blocks.cuh"
#include "launch.cuh"

namespace bnfast::cuda {
namespace {

// What a thread has in flight.
template <class T, Slope kFrom, int kLoads>
struct Loaded {
  static constexpr bool kResidual = kFrom == Slope::kFromZAndResidual, kBits = kFrom == Slope::kFromBits;
  Slot slots[kLoads];
  Packed<T> dy[kLoads], z[kLoads], residual[kResidual ? kLoads : 1];
  uint32_t bits[kBits ? kLoads : 1];

  template <Reuse kReuse>
  BNFAST_DEVICE void take(int u, const Slot& slot, const Gradient& g, bool wide) {
    dy[u] = load<kReuse>(static_cast<const T*>(g.dy), slot, wide);
    z[u] = load<kReuse>(static_cast<const T*>(g.z), slot, wide);
    take_the_rest<kReuse>(u, slot, g, wide);
  }
  // All but dy and z.
  template <Reuse kReuse>
  BNFAST_DEVICE void take_the_rest(int u, const Slot& slot, const Gradient& g, bool wide) {
    slots[u] = slot;
    if constexpr (kResidual) residual[u] = load<kReuse>(static_cast<const T*>(g.residual), slot, wide);
    if constexpr (kBits) bits[u] = load_bits<T>(g.bits, slot);
  }

  // Equation (7) of bnfast/reference.py for place i of slot u. dy is 0 outside of the tensor, and so is the result.
  template <class Activation, bool kColumns>
  BNFAST_DEVICE acc_t<T> gradient(const Activation& act, const Channel<T, kColumns>& channel, int u, int i) const {
    using A = acc_t<T>;
    const A grad = dy[u][i];
    if constexpr (kBits && Activation::kPiecewise) {
      return act.masked((bits[u] >> i & 1) != 0, grad);
    } else {
      A pre = channel.pre_activation(z[u][i], i);
      if constexpr (kResidual) pre += residual[u][i];
      if constexpr (Activation::kPiecewise) return act.masked(act.passes(rounded<T>(pre)), grad);
      else return act.gradient(pre, grad);
    }
  }
};

// ---- bn_bwd_reduce ------------------------------------------------------------------------------------------------------

// sum(db) and sum(db * (z - mean)) of one thread, for `kValues` channels.
template <class A, int kValues>
struct Sums {
  A values[BwdReduce::kValues][kValues] = {};
};

// The sums of all threads, in a fixed order: lanes of a warp, then warps. Calls put(what, place, channel, value) for the block's.
template <class A, int kValues, class F>
BNFAST_DEVICE void add_block(Sums<A, kValues>& thread, const BwdReduce& a, F put) {
  auto& mine = thread.values;
  constexpr int kWarps = kThreads / 32, kMost = kValues * (kValues > 1 ? kMostColumns : 1);
  BNFAST_SHARED(A, sums, BwdReduce::kValues * kWarps * kMost);
  const int columns = kValues > 1 ? 1 << a.view.column_bits : 1, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int lanes = 16; lanes >= columns; lanes /= 2) {
    for (int what = 0; what < BwdReduce::kValues; ++what) {
      for (int j = 0; j < kValues; ++j) mine[what][j] += __shfl_down_sync(kAllLanes, mine[what][j], lanes);
    }
  }
  if (lane < columns) {
    for (int what = 0; what < BwdReduce::kValues; ++what) {
      for (int j = 0; j < kValues; ++j) sums[((what * kWarps + warp) * columns + lane) * kValues + j] = mine[what][j];
    }
  }
  __syncthreads();
  const int channels = columns * kValues, i = threadIdx.x, c = blockIdx.x * channels + i;
  if (i < channels && c < a.view.channels) {
    for (int what = 0; what < BwdReduce::kValues; ++what) {
      A sum = 0;
      for (int w = 0; w < kWarps; ++w) sum += sums[(what * kWarps + w) * channels + i];
      put(what, i, c, sum);
    }
  }
}

// Equation (8) of bnfast/reference.py. get(split, what, place, channel) gives what add_block put. Calls found(place, channel,
// dgamma, dbeta) for each channel of the tile, by one thread; they are written where `writes`.
template <class A, class Get, class Found>
BNFAST_DEVICE void finalise_sums(const BwdReduce& a, bool writes, Get get, Found found) {
  BNFAST_SHARED(A, scratch, kThreads);
  const int channels = a.view.tile_channels, i = threadIdx.x & (channels - 1), c = static_cast<int>(blockIdx.x) * channels + i;
  const bool inside = c < a.view.channels;
  const auto sum_of = [&](int what) {
    return sum_over_splits(a.split.splits, channels, scratch, [&](int s) { return inside ? get(s, what, i, c) : A(0); });
  };
  const A dbeta = sum_of(0), db_z = sum_of(1);
  if (inside && static_cast<int>(threadIdx.x) < channels) {
    const A dgamma = db_z * static_cast<const A*>(a.gradient.affine.rstd)[c];
    found(i, c, dgamma, dbeta);
    if (writes) {
      static_cast<A*>(a.dbeta)[c] = dbeta;
      static_cast<A*>(a.dgamma)[c] = dgamma;
    }
  }
}

// The parameters of the tile's channels into staged[3][stride], and this thread's from there. Called by all threads of the block.
template <class T, bool kColumns>
BNFAST_DEVICE Channel<T, kColumns> stage_tile(const View& v, const Affine& affine, acc_t<T>* staged, int stride) {
  if (static_cast<int>(threadIdx.x) < v.tile_channels) {
    const int c = min(static_cast<int>(blockIdx.x) * v.tile_channels + static_cast<int>(threadIdx.x), v.channels - 1);
    stage_affine(affine, c, staged + threadIdx.x, stride);
  }
  __syncthreads();
  return channel_at<T, kColumns>(staged, ReduceBlock<T, kColumns, 1>::place(v), stride);
}

// The sums of this thread's slots of the block. Calls keep(step, u, dy, z) for each.
template <class T, bool kColumns, Slope kFrom, class F>
BNFAST_DEVICE Sums<acc_t<T>, kColumns ? kWidth<T> : 1> sums_of(const BwdReduce& a, const Channel<T, kColumns>& channel, F keep) {
  using A = acc_t<T>;
  constexpr int w = kWidth<T>;
  ReduceBlock<T, kColumns, kBwdReduceLoads> block(a.view, a.split);
  Sums<A, kColumns ? w : 1> thread;
  auto& sums = thread.values;
  with_activation(a.gradient.act, a.gradient.slope, [&](auto act) {
    for (int64_t step = 0; step < a.split.steps; ++step) {
      Loaded<T, kFrom, kBwdReduceLoads> loaded;
#pragma unroll
      for (int u = 0; u < kBwdReduceLoads; ++u) {
        loaded.template take<Reuse::kSoon>(u, block.next(), a.gradient, a.view.wide);
        keep(step, u, loaded.dy[u], loaded.z[u]);
      }
      A part[BwdReduce::kValues][w] = {};   // planes: sums in parallel, which become one
#pragma unroll
      for (int u = 0; u < kBwdReduceLoads; ++u) {
        for (int i = 0; i < w; ++i) {
          const A db = loaded.gradient(act, channel, u, i);
          part[0][i] += db;
          part[1][i] = fma(db, loaded.z[u][i] - channel.mean[channel.place(i)], part[1][i]);
        }
      }
      for (int what = 0; what < BwdReduce::kValues; ++what) {
        if constexpr (kColumns) {
          for (int i = 0; i < w; ++i) sums[what][i] += part[what][i];
        } else {
          for (int count = w / 2; count > 0; count /= 2) {
            for (int i = 0; i < count; ++i) part[what][i] += part[what][i + count];
          }
          sums[what][0] += part[what][0];
        }
      }
    }
  });
  return thread;
}

template <class T, bool kColumns, Slope kFrom>
__global__ void __launch_bounds__(kThreads, kLeastResident) bn_bwd_reduce_kernel(const BwdReduce a) {
  using A = acc_t<T>;
  constexpr int kStride = kColumns ? kWidth<T> * kMostColumns : 1;
  BNFAST_SHARED(A, staged, 3 * kStride);
  const auto place = [&](int split, int what, int c) {
    return part<A>(a.workspace, BwdReduce::kValues, split, what, a.view.channels, c);
  };
  const auto channel = stage_tile<T, kColumns>(a.view, a.gradient.affine, staged, kStride);
  auto sums = sums_of<T, kColumns, kFrom>(a, channel, [](int64_t, int, const Packed<T>&, const Packed<T>&) {});
  add_block(sums, a, [&](int what, int, int c, A value) { *place(blockIdx.y, what, c) = value; });
  if (is_last_block(a.workspace.counters + blockIdx.x, gridDim.y)) {
    finalise_sums<A>(
        a, true, [&](int split, int what, int, int c) { return __ldcg(place(split, what, c)); }, [](int, int, A, A) {});
  }
}

// ---- bn_bwd_apply -------------------------------------------------------------------------------------------------------

// What bn_bwd_apply takes of a slot's channels beside Channel: dbeta / M and rstd * dgamma / M.
template <class T, bool kColumns>
struct Shifts {
  acc_t<T> db[Channel<T, kColumns>::kValues], z[Channel<T, kColumns>::kValues];
};

// The same of channel c, in arrays of `stride` behind the three of stage_affine.
template <class A>
BNFAST_DEVICE void stage_shifts(const BwdApply& a, A rstd, A dgamma, A dbeta, A* to, int stride) {
  const A one_over_count = static_cast<A>(a.view.one_over_count);
  to[3 * stride] = dbeta * one_over_count;
  to[4 * stride] = rstd * dgamma * one_over_count;
}

template <class T, bool kColumns>
BNFAST_DEVICE Shifts<T, kColumns> shifts_at(const acc_t<T>* staged, int first, int stride) {
  Shifts<T, kColumns> shifts;
  for (int i = 0; i < Channel<T, kColumns>::kValues; ++i) {
    shifts.db[i] = staged[3 * stride + first + i];
    shifts.z[i] = staged[4 * stride + first + i];
  }
  return shifts;
}

// dz and dresidual of slot u, equations (9) to (11) of bnfast/reference.py.
template <bool kColumns, class T, Slope kFrom, int kLoads, class Activation>
BNFAST_DEVICE void apply_slot(const BwdApply& a, const Activation& act, const Channel<T, kColumns>& channel,
                              const Shifts<T, kColumns>& shifts, bool batch_statistics, const Loaded<T, kFrom, kLoads>& loaded,
                              int u) {
  using A = acc_t<T>;
  constexpr int w = kWidth<T>;
  A dz[w], db[w];
  for (int i = 0; i < w; ++i) {
    const int j = channel.place(i);
    db[i] = loaded.gradient(act, channel, u, i);
    A centred = db[i];
    // Not by shifts of 0: 0 times an infinite distance is no 0.
    if (batch_statistics) centred = (db[i] - shifts.db[j]) - (loaded.z[u][i] - channel.mean[j]) * shifts.z[j];
    dz[i] = centred * channel.scale[j];
  }
  store(static_cast<T*>(a.dz), loaded.slots[u], a.view.wide, dz);
  if (a.dresidual) store(static_cast<T*>(a.dresidual), loaded.slots[u], a.view.wide, db);
}

template <class T, bool kColumns, Slope kFrom>
__global__ void __launch_bounds__(kThreads, kLeastResident) bn_bwd_apply_kernel(const BwdApply a) {
  using A = acc_t<T>;
  using Block = ApplyBlock<T, kColumns, kBwdApplyLoads>;
  constexpr int kStride = Block::kMostStaged;
  BNFAST_SHARED(A, staged, 5 * kStride);
  const Block block(a.view);
  Channel<T, kColumns> channel;
  Shifts<T, kColumns> shifts;
  const auto take_channel = [&](int place) {
    channel = channel_at<T, kColumns>(staged, place, kStride);
    shifts = shifts_at<T, kColumns>(staged, place, kStride);
  };
  for (int step = 0; step < Block::kSteps; ++step) {
    Loaded<T, kFrom, kBwdApplyLoads> loaded;
    int places[kBwdApplyLoads];
#pragma unroll
    for (int u = 0; u < kBwdApplyLoads; ++u) {
      loaded.template take<Reuse::kLast>(u, block.slot(step, u, places[u]), a.gradient, a.view.wide);
    }
    if (step == 0) {
      block.stage([&](int c, int i) {
        stage_affine(a.gradient.affine, c, staged + i, kStride);
        const auto value = [&](const void* vector) { return vector ? static_cast<const A*>(vector)[c] : A(0); };
        stage_shifts(a, value(a.gradient.affine.rstd), value(a.dgamma), value(a.dbeta), staged + i, kStride);
      });
      __syncthreads();
      if constexpr (kColumns) take_channel(places[0]);
    }
    with_activation(a.gradient.act, a.gradient.slope, [&](auto act) {
#pragma unroll
      for (int u = 0; u < kBwdApplyLoads; ++u) {
        if constexpr (!kColumns) take_channel(places[u]);
        apply_slot<kColumns>(a, act, channel, shifts, a.dgamma != nullptr, loaded, u);
      }
    });
  }
}

// ---- both, dy and z read once -----------------------------------------------------------------------------------------

template <class T, bool kColumns, Slope kFrom>
__global__ void __launch_bounds__(kThreads, 1) bn_bwd_reduce_apply_kernel(const BwdReduceApply a) {
  if constexpr (kHasClusters) {
    using A = acc_t<T>;
    constexpr int kStride = kColumns ? kWidth<T> * kMostColumns : 1;
    BNFAST_DYNAMIC_SHARED(uint4, kept);
    BNFAST_SHARED(A, own, BwdReduce::kValues * kStride);
    BNFAST_SHARED(A, staged, 5 * kStride);
    const View& v = a.reduce.view;
    const auto place = [&](int64_t step, int u, int which) {
      return kept + ((step * kBwdReduceLoads + u) * 2 + which) * kThreads + threadIdx.x;
    };
    const auto channel = stage_tile<T, kColumns>(v, a.reduce.gradient.affine, staged, kStride);
    auto sums = sums_of<T, kColumns, kFrom>(a.reduce, channel, [&](int64_t step, int u, const Packed<T>& dy, const Packed<T>& z) {
      *place(step, u, 0) = dy.words;
      *place(step, u, 1) = z.words;
    });
    add_block(sums, a.reduce, [&](int what, int i, int, A value) { own[what * kStride + i] = value; });
    cluster_sync();
    // Places behind the last channel too: they are read, and nothing comes of it.
    if (static_cast<int>(threadIdx.x) < v.tile_channels) stage_shifts(a.apply, A(0), A(0), A(0), staged + threadIdx.x, kStride);
    finalise_sums<A>(
        a.reduce, blockIdx.y == 0, [&](int split, int what, int i, int) { return cluster_value(own + what * kStride + i, split); },
        [&](int i, int c, A dgamma, A dbeta) {
          stage_shifts(a.apply, static_cast<const A*>(a.reduce.gradient.affine.rstd)[c], dgamma, dbeta, staged + i, kStride);
        });
    cluster_sync();   // no block ends while others read what it found
    const auto shifts = shifts_at<T, kColumns>(staged, ReduceBlock<T, kColumns, 1>::place(v), kStride);
    ReduceBlock<T, kColumns, kBwdReduceLoads> block(v, a.reduce.split);
    for (int64_t step = 0; step < a.reduce.split.steps; ++step) {
      Loaded<T, kFrom, kBwdReduceLoads> loaded;
#pragma unroll
      for (int u = 0; u < kBwdReduceLoads; ++u) {
        loaded.template take_the_rest<Reuse::kLast>(u, block.next(), a.apply.gradient, a.apply.view.wide);
        loaded.dy[u].words = *place(step, u, 0);
        loaded.z[u].words = *place(step, u, 1);
      }
      with_activation(a.apply.gradient.act, a.apply.gradient.slope, [&](auto act) {
#pragma unroll
        for (int u = 0; u < kBwdReduceLoads; ++u) apply_slot<kColumns>(a.apply, act, channel, shifts, true, loaded, u);
      });
    }
  }
}

// Calls f(where the slope comes from) and returns its value.
template <class F>
int with_slope(Slope from, F f) {
  switch (from) {
    case Slope::kFromZ: return f(std::integral_constant<Slope, Slope::kFromZ>{});
    case Slope::kFromZAndResidual: return f(std::integral_constant<Slope, Slope::kFromZAndResidual>{});
    case Slope::kFromBits: return f(std::integral_constant<Slope, Slope::kFromBits>{});
  }
  return cudaErrorInvalidValue;
}

}  // namespace

int launch_bn_bwd_reduce(const BwdReduce& a, void* stream) {
  return with_types(a.dtype, a.view, [&](auto type, auto columns) {
    using T = typename decltype(type)::type;
    return with_slope(a.gradient.slope_from, [&](auto from) {
      const dim3 blocks(a.view.tiles, a.split.splits);
      return BNFAST_LAUNCH((bn_bwd_reduce_kernel<T, columns, from>), blocks, kThreads, 0, stream, a);
    });
  });
}

int launch_bn_bwd_apply(const BwdApply& a, void* stream) {
  return with_types(a.dtype, a.view, [&](auto type, auto columns) {
    using T = typename decltype(type)::type;
    return with_slope(a.gradient.slope_from, [&](auto from) {
      const dim3 blocks(ApplyBlock<T, columns, kBwdApplyLoads>::blocks(a.view));
      return BNFAST_LAUNCH((bn_bwd_apply_kernel<T, columns, from>), blocks, kThreads, 0, stream, a);
    });
  });
}

int launch_bn_bwd_reduce_apply(const BwdReduceApply& a, void* stream) {
  const Split& split = a.reduce.split;
  return with_types(a.reduce.dtype, a.reduce.view, [&](auto type, auto columns) {
    using T = typename decltype(type)::type;
    return with_slope(a.reduce.gradient.slope_from, [&](auto from) {
      const dim3 blocks(a.reduce.view.tiles, split.splits);
      return BNFAST_LAUNCH_CLUSTERS((bn_bwd_reduce_apply_kernel<T, columns, from>), blocks, split.splits, kThreads,
                                    split.kept_bytes(kBwdReduceLoads, 2), stream, a);
    });
  });
}

}  // namespace bnfast::cuda
