// bn_bwd_reduce and bn_bwd_apply. Bytes of global memory per element of s bytes:
//   bn_bwd_reduce_kernel   read 2 s (+ s, + 1/8)              with the residual of a smooth activation, with bits; and two
//                                                             numbers per channel and split, written and read once
//   bn_bwd_apply_kernel    read 2 s (+ s, + 1/8), write s (+ s)   with dresidual
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
    slots[u] = slot;
    dy[u] = load<kReuse>(static_cast<const T*>(g.dy), slot, wide);
    z[u] = load<kReuse>(static_cast<const T*>(g.z), slot, wide);
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

// The sums of all threads, in a fixed order: lanes of a warp, then warps. Writes the split's partial result.
template <class A, int kValues>
BNFAST_DEVICE void add_block(A (&mine)[BwdReduce::kValues][kValues], const BwdReduce& a) {
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
      *part<A>(a.workspace, BwdReduce::kValues, blockIdx.y, what, a.view.channels, c) = sum;
    }
  }
}

// Equation (8) of bnfast/reference.py from the partial sums.
template <class A>
BNFAST_DEVICE void finalise_sums(const BwdReduce& a) {
  BNFAST_SHARED(A, scratch, kThreads);
  const int channels = a.view.tile_channels, c = blockIdx.x * channels + (threadIdx.x & (channels - 1));
  const bool inside = c < a.view.channels;
  const auto sum_of = [&](int what) {
    return sum_over_splits(a.split.splits, channels, scratch, [&](int s) {
      return inside ? __ldcg(part<A>(a.workspace, BwdReduce::kValues, s, what, a.view.channels, c)) : A(0);
    });
  };
  const A dbeta = sum_of(0), db_z = sum_of(1);
  if (inside && static_cast<int>(threadIdx.x) < channels) {
    static_cast<A*>(a.dbeta)[c] = dbeta;
    static_cast<A*>(a.dgamma)[c] = db_z * static_cast<const A*>(a.gradient.affine.rstd)[c];
  }
}

template <class T, bool kColumns, Slope kFrom>
__global__ void __launch_bounds__(kThreads, kLeastResident) bn_bwd_reduce_kernel(const BwdReduce a) {
  using A = acc_t<T>;
  constexpr int w = kWidth<T>, kValues = kColumns ? w : 1, kStride = kColumns ? w * kMostColumns : 1;
  BNFAST_SHARED(A, staged, 3 * kStride);
  ReduceBlock<T, kColumns, kBwdReduceLoads> block(a.view, a.split);
  const int channels = a.view.tile_channels;
  if (static_cast<int>(threadIdx.x) < channels) {
    const int c = min(static_cast<int>(blockIdx.x) * channels + static_cast<int>(threadIdx.x), a.view.channels - 1);
    stage_affine(a.gradient.affine, c, staged + threadIdx.x, kStride);
  }
  __syncthreads();
  const Channel<T, kColumns> channel =
      channel_at<T, kColumns>(staged, kColumns ? (threadIdx.x & ((1u << a.view.column_bits) - 1)) * w : 0, kStride);
  A sums[BwdReduce::kValues][kValues] = {};
  with_activation(a.gradient.act, a.gradient.slope, [&](auto act) {
    for (int64_t step = 0; step < a.split.steps; ++step) {
      Loaded<T, kFrom, kBwdReduceLoads> loaded;
#pragma unroll
      for (int u = 0; u < kBwdReduceLoads; ++u) loaded.template take<Reuse::kSoon>(u, block.next(), a.gradient, a.view.wide);
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
  add_block(sums, a);
  if (is_last_block(a.workspace.counters + blockIdx.x, gridDim.y)) finalise_sums<A>(a);
}

// ---- bn_bwd_apply -------------------------------------------------------------------------------------------------------

template <class T, bool kColumns, Slope kFrom>
__global__ void __launch_bounds__(kThreads, kLeastResident) bn_bwd_apply_kernel(const BwdApply a) {
  using A = acc_t<T>;
  using Block = ApplyBlock<T, kColumns, kBwdApplyLoads>;
  constexpr int w = kWidth<T>, kStride = Block::kMostStaged;
  BNFAST_SHARED(A, staged, 5 * kStride);
  const Block block(a.view);
  Channel<T, kColumns> channel;
  A shift_db[Channel<T, kColumns>::kValues], shift_z[Channel<T, kColumns>::kValues];
  const auto take_channel = [&](int place) {
    channel = channel_at<T, kColumns>(staged, place, kStride);
    for (int i = 0; i < channel.kValues; ++i) {
      shift_db[i] = staged[3 * kStride + place + i];
      shift_z[i] = staged[4 * kStride + place + i];
    }
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
        const A one_over_count = static_cast<A>(a.view.one_over_count), rstd = static_cast<const A*>(a.gradient.affine.rstd)[c];
        staged[3 * kStride + i] = a.dbeta ? static_cast<const A*>(a.dbeta)[c] * one_over_count : A(0);
        staged[4 * kStride + i] = a.dgamma ? rstd * static_cast<const A*>(a.dgamma)[c] * one_over_count : A(0);
      });
      __syncthreads();
      if constexpr (kColumns) take_channel(places[0]);
    }
    with_activation(a.gradient.act, a.gradient.slope, [&](auto act) {
#pragma unroll
      for (int u = 0; u < kBwdApplyLoads; ++u) {
        if constexpr (!kColumns) take_channel(places[u]);
        A dz[w], db[w];
        for (int i = 0; i < w; ++i) {
          const int j = channel.place(i);
          db[i] = loaded.gradient(act, channel, u, i);
          A centred = db[i];
          // Not by shifts of 0: 0 times an infinite distance is no 0.
          if (a.dgamma) centred = (db[i] - shift_db[j]) - (loaded.z[u][i] - channel.mean[j]) * shift_z[j];
          dz[i] = centred * channel.scale[j];
        }
        store(static_cast<T*>(a.dz), loaded.slots[u], a.view.wide, dz);
        if (a.dresidual) store(static_cast<T*>(a.dresidual), loaded.slots[u], a.view.wide, db);
      }
    });
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

}  // namespace bnfast::cuda
