// The BatchNorm phases, memory passes per element in brackets:
//   bn_fwd_reduce  [read z]                    mean and M2; a tile is read again from the cache for the exact M2
//   bn_fwd_apply   [read z (, r), write y]     y = act((z - mean) * scale + beta (+ r)) (, 1 bit)
//   bn_bwd_reduce  [read dy, z]                sum(db), sum(db * (z - mean)) with db = dy * act'
//   bn_bwd_apply   [read dy, z, write dz (, dr)]
//   se_bwd_reduce  [read dy, z]                sum(dy * y) per image and channel, with y computed again from z
// Included once per capability; see vec.h for the arithmetic and bn.h for the two views of a tensor.
#pragma once

#include <algorithm>
#include <type_traits>

#include "../activation.h"
#include "bn.h"
#include "runs_ahead.h"
#include "vec.h"

namespace bnfast::BNFAST_NAMESPACE {

// Elements whose mean is taken exactly before their squares are summed: small enough to stay in the L2 cache.
constexpr int64_t kTile = 32768;

template <bool kValue> using Flag = std::bool_constant<kValue>;

// Channel parameters of a span: read along it (rows), or one value for all of it (planes).
template <class A, bool kAlong>
struct Parameter {
  const A* values;
  template <class L> BNFAST_INLINE Block<A> at(int64_t j, L lanes) const {
    if constexpr (kAlong) return load(values + j, lanes);
    else return Block<A>(*values);
  }
};

// The one expression of the pre-activation: forward and backward must agree on it bit for bit.
template <class C, class B, class L>
BNFAST_INLINE B pre_activation_of(const C& channel, const B& z, int64_t j, L lanes) {
  return (z - channel.mean.at(j, lanes)) * channel.scale.at(j, lanes) + channel.beta.at(j, lanes);
}

template <class T, bool kAlong>
struct Channel {
  using A = acc_t<T>;
  Parameter<A, kAlong> mean, scale, beta, shift_db, shift_z;

  Channel(const BnTensors& t, int64_t first)
      : mean{static_cast<const A*>(t.mean) + first},
        scale{static_cast<const A*>(t.scale) + first},
        beta{static_cast<const A*>(t.beta) + first},
        shift_db{t.shift_db ? static_cast<const A*>(t.shift_db) + first : nullptr},
        shift_z{t.shift_z ? static_cast<const A*>(t.shift_z) + first : nullptr} {}

  template <class L> BNFAST_INLINE Block<A> pre_activation(const Block<A>& z, int64_t j, L lanes) const {
    return pre_activation_of(*this, z, j, lanes);
  }
};

// The parameters of one Block of each row.
template <class A>
struct HeldParameter {
  Block<A> value;
  template <class L> BNFAST_INLINE const Block<A>& at(int64_t, L) const { return value; }
};
template <class A>
struct HeldChannel {
  HeldParameter<A> mean, scale, beta, shift_db, shift_z;

  template <class T, class L>
  BNFAST_INLINE HeldChannel(const Channel<T, true>& all, int64_t j, L lanes)
      : mean{all.mean.at(j, lanes)}, scale{all.scale.at(j, lanes)}, beta{all.beta.at(j, lanes)} {
    if (all.shift_db.values) {
      shift_db.value = all.shift_db.at(j, lanes);
      shift_z.value = all.shift_z.at(j, lanes);
    }
  }
  template <class L> BNFAST_INLINE Block<A> pre_activation(const Block<A>& z, int64_t j, L lanes) const {
    return pre_activation_of(*this, z, j, lanes);
  }
};

constexpr int kHeldBlocks = 4;   // of a row, the parameters of which stay in registers from row to row

// Calls body(channel, first element of a run, offset in it, lanes, first word of bits) for each Block of an elementwise phase.
template <class T, class F>
BNFAST_INLINE void for_elements(const BnTensors& t, RowSpan s, F body) {
  const Channel<T, true> channel(t, 0);
  int64_t e = s.begin;
  if (BNFAST_VECTOR_BYTES == 64 && s.length == kHeldBlocks * kBlock) {
    [&]<int... I>(std::integer_sequence<int, I...>) BNFAST_INLINE_LAMBDA {
      const HeldChannel<acc_t<T>> held[] = {HeldChannel<acc_t<T>>(channel, I * kBlock, Whole{})...};
      for (; e + s.length <= s.end; e += s.length) (body(held[I], e, int64_t{I * kBlock}, Whole{}, e / kBlock), ...);
    }(std::make_integer_sequence<int, kHeldBlocks>{});
  }
  for (; e < s.end; e += s.length) {
    for_blocks(std::min(s.length, s.end - e), [&](int64_t j, auto lanes) BNFAST_INLINE_LAMBDA { body(channel, e, j, lanes, e / kBlock); });
  }
}

// Calls body(first element, number of elements, first parameter, first word of bits) for each contiguous run.
template <class F>
BNFAST_INLINE void for_runs(PlaneSpan s, F body) {
  const int64_t words = (s.plane + kBlock - 1) / kBlock;
  for (int64_t n = s.n_begin; n < s.n_end; ++n) {
    for (int64_t c = s.c_begin; c < s.c_end; ++c) {
      const int64_t p = n * s.channels + c;
      body(p * s.plane + s.s_begin, s.s_end - s.s_begin, c, p * words + s.s_begin / kBlock);
    }
  }
}

template <class T, class F>
BNFAST_INLINE void for_elements(const BnTensors& t, PlaneSpan s, F body) {
  for_runs(s, [&](int64_t e, int64_t n, int64_t first, int64_t word) {
    const Channel<T, false> channel(t, first);
    for_blocks(n, [&](int64_t j, auto lanes) BNFAST_INLINE_LAMBDA { body(channel, e, j, lanes, word); });
  });
}

template <class Span> constexpr bool kRows = std::is_same_v<Span, RowSpan>;

constexpr int64_t kNear = 512;   // elements

// What an elementwise phase will read next: of planes, what is named; of rows, which are read from end to end, what comes soon. The
// prefetcher of the hardware begins anew at each page, and after each piece of a convolution that runs between the rows.
template <class Span, class T>
BNFAST_INLINE void fetch_ahead(int64_t ahead, const T* from) {
  __builtin_prefetch(from + (kRows<Span> ? kNear : ahead), 0, kRows<Span> ? 3 : 2);
}

// What the next rows will read, where four rows of `length` elements are read side by side: the hardware loses sight of them. From the L2
// cache into the L1 cache (kLocality 3), or from memory into the L2 cache.
template <int kLocality = 2, class T>
BNFAST_INLINE void fetch_next_rows(const T* from, int64_t length) { __builtin_prefetch(from + 4 * length, 0, kLocality); }

// A branch that always goes the same way, in place of a second copy of each kernel.
template <class T> BNFAST_INLINE void write(T* to, const Block<acc_t<T>>& b, Whole, bool streams) {
  if (streams) stream_block(to, b);
  else store_block(to, b);
}
template <class T> BNFAST_INLINE void write(T* to, const Block<acc_t<T>>& b, First lanes, bool) { store(to, b, lanes); }

// ---- bn_fwd_apply -------------------------------------------------------------------------------------------------

template <class T, class Span>
void fwd_apply(const BnTensors& t, Span span) {
  using A = acc_t<T>;
  const T* z = static_cast<const T*>(t.z);
  const T* r = static_cast<const T*>(t.residual);
  T* y = static_cast<T*>(t.out);
  uint16_t* bits = t.bits;
  const int64_t ahead = t.ahead;
  const bool streams = t.streams;
  with_activation(t.act, t.slope, [&](auto act) {
    auto run = [&](auto has_residual, auto has_bits) {
      // By value, here and below: what is captured by reference is loaded again behind each store.
      for_elements<T>(t, span, [=](const auto& channel, int64_t e, int64_t j, auto lanes, int64_t word) BNFAST_INLINE_LAMBDA {
        fetch_ahead<Span>(ahead, z + e + j);
        Block<A> pre = channel.pre_activation(load(z + e + j, lanes), j, lanes);
        if constexpr (has_residual) {
          fetch_ahead<Span>(ahead, r + e + j);
          pre = pre + load(r + e + j, lanes);
        }
        write(y + e + j, act.value(pre), lanes, streams);
        if constexpr (has_bits && act.kPiecewise) {
          bits[word + j / kBlock] = to_bits<A>(act.passes(rounded_to<T>(pre)));
        }
      });
    };
    if (r) t.bits ? run(Flag<true>{}, Flag<true>{}) : run(Flag<true>{}, Flag<false>{});
    else t.bits ? run(Flag<false>{}, Flag<true>{}) : run(Flag<false>{}, Flag<false>{});
  });
  if (streams) end_of_stream();
}

// ---- the gradient of the pre-activation, db = dy * act' ------------------------------------------------------------

// Calls run(gradient) with gradient(channel, z, dy, e, j, lanes, word) -> db.
template <class T, class F>
void with_gradient(const BnTensors& t, F run) {
  using A = acc_t<T>;
  const T* r = static_cast<const T*>(t.residual);
  with_activation(t.act, t.slope, [&](auto act) {
    using Activation = decltype(act);
    if constexpr (std::is_same_v<Activation, Identity>) {
      run([=](const auto&, const Block<A>&, const Block<A>& dy, int64_t, int64_t, auto, int64_t) BNFAST_INLINE_LAMBDA { return dy; });
    } else {
      auto from_pre = [=](const Block<A>& pre, const Block<A>& grad) BNFAST_INLINE_LAMBDA {
        if constexpr (Activation::kPiecewise) return act.masked(act.passes(rounded_to<T>(pre)), grad);
        else return act.gradient(pre, grad);
      };
      if (t.slope_from == Slope::kFromZ) {
        run([=](const auto& channel, const Block<A>& z, const Block<A>& dy, int64_t, int64_t j, auto lanes, int64_t)
                BNFAST_INLINE_LAMBDA { return from_pre(channel.pre_activation(z, j, lanes), dy); });
      } else if (t.slope_from == Slope::kFromZAndResidual) {
        run([=](const auto& channel, const Block<A>& z, const Block<A>& dy, int64_t e, int64_t j, auto lanes, int64_t)
                BNFAST_INLINE_LAMBDA { return from_pre(channel.pre_activation(z, j, lanes) + load(r + e + j, lanes), dy); });
      } else if constexpr (Activation::kPiecewise) {
        const uint16_t* bits = t.bits;
        run([=](const auto&, const Block<A>&, const Block<A>& dy, int64_t, int64_t j, auto, int64_t word) BNFAST_INLINE_LAMBDA {
          return act.masked(from_bits<A>(bits[word + j / kBlock]), dy);
        });
      }
    }
  });
}

// ---- bn_bwd_apply -------------------------------------------------------------------------------------------------

template <class T, class Span>
void bwd_apply(const BnTensors& t, Span span) {
  using A = acc_t<T>;
  const T* z = static_cast<const T*>(t.z);
  const T* dy = static_cast<const T*>(t.dy);
  T* dz = static_cast<T*>(t.out);
  T* dr = static_cast<T*>(t.dresidual);
  const int64_t ahead = t.ahead;
  const bool streams = t.streams;
  with_gradient<T>(t, [&](auto gradient) {
    auto run = [&](auto batch_statistics, auto has_residual) {
      for_elements<T>(t, span, [=](const auto& channel, int64_t e, int64_t j, auto lanes, int64_t word) BNFAST_INLINE_LAMBDA {
        fetch_ahead<Span>(ahead, z + e + j);
        fetch_ahead<Span>(ahead, dy + e + j);
        const Block<A> zb = load(z + e + j, lanes);
        const Block<A> db = gradient(channel, zb, load(dy + e + j, lanes), e, j, lanes, word);
        if constexpr (has_residual) write(dr + e + j, db, lanes, streams);
        Block<A> centred = db;
        if constexpr (batch_statistics) {
          centred = (db - channel.shift_db.at(j, lanes)) -
                    (zb - channel.mean.at(j, lanes)) * channel.shift_z.at(j, lanes);
        }
        write(dz + e + j, centred * channel.scale.at(j, lanes), lanes, streams);
      });
    };
    if (t.shift_db) dr ? run(Flag<true>{}, Flag<true>{}) : run(Flag<true>{}, Flag<false>{});
    else dr ? run(Flag<false>{}, Flag<true>{}) : run(Flag<false>{}, Flag<false>{});
  });
  if (streams) end_of_stream();
}

// ---- bn_fwd_reduce ------------------------------------------------------------------------------------------------

// Calls add(first element, rows that are taken at once) for 4 rows at a time, then for single rows: a running sum is loaded
// and stored once for four rows.
template <class F>
BNFAST_INLINE void for_row_groups(RowSpan span, F add) {
  int64_t e = span.begin;
  for (; e + 4 * span.length <= span.end; e += 4 * span.length) add(e, Flag<true>{});
  for (; e < span.end; e += span.length) add(e, Flag<false>{});
}

// Tile by tile: the mean in the accumulator's precision as the centre, then sum(d) and sum(d^2) of d = z - centre, which
// correct it: mean = centre + sum(d) / n, M2 = sum(d^2) - sum(d)^2 / n, in double, so that the size of the mean costs no digits.
// Tiles merge by Chan's formula: n = na + nb, e = mean_b - mean_a, mean = mean_a + e nb / n, M2 = M2_a + M2_b + e^2 na nb / n.
template <class T>
void fwd_reduce_rows(const BnTensors& t, RowSpan span, double* mean, double* m2, void* scratch) {
  using A = acc_t<T>;
  const int64_t length = span.length;
  const T* z = static_cast<const T*>(t.z);
  A* centre = static_cast<A*>(scratch);
  A* sum = centre + length;
  A* square = sum + length;
  const int64_t tile_rows = std::max<int64_t>(4, kTile / length / 4 * 4);
  RunsAhead ahead(t.upcoming, &Upcoming::beside_reduction, 2 * kFwdReduceCycles);   // two calls for four Blocks
  int64_t done = 0;
  for (int64_t begin = span.begin; begin < span.end; begin += tile_rows * length) {
    const RowSpan tile = {length, begin, std::min(span.end, begin + tile_rows * length)};
    const int64_t rows = (tile.end - tile.begin) / length;
    std::fill(centre, centre + 3 * length, A(0));
    for_row_groups(tile, [&](int64_t e, auto four) {
      for (int64_t j = 0; j < length; j += kBlock) {
        const T* x = z + e + j;
        Block<A> total = load_block(x);
        if constexpr (four) {
          for (int i = 0; i < 4; ++i) fetch_next_rows(x + i * length, length);
          ahead.line();
          total = (total + load_block(x + length)) + (load_block(x + 2 * length) + load_block(x + 3 * length));
        }
        store_block(centre + j, load_block(centre + j) + total);
      }
    });
    const Block<A> one_over_rows(1.0 / rows);
    for (int64_t j = 0; j < length; j += kBlock) {
      store_block(centre + j, load_block(centre + j) * one_over_rows);
    }
    for_row_groups(tile, [&](int64_t e, auto four) {
      for (int64_t j = 0; j < length; j += kBlock) {
        const T* x = z + e + j;
        const Block<A> c = load_block(centre + j);
        Block<A> d = load_block(x) - c;
        Block<A> q = d * d;
        if constexpr (four) {
          ahead.line();
          const Block<A> d1 = load_block(x + length) - c, d2 = load_block(x + 2 * length) - c,
                         d3 = load_block(x + 3 * length) - c;
          d = (d + d1) + (d2 + d3);
          q = (q + d1 * d1) + (d2 * d2 + d3 * d3);
        }
        store_block(sum + j, load_block(sum + j) + d);
        store_block(square + j, load_block(square + j) + q);
      }
    });
    const double n = done + rows, mean_weight = rows / n, m2_weight = done * (rows / n), one_over = 1.0 / rows;
    if (done == 0) {
      for (int64_t j = 0; j < length; ++j) {
        const double d = sum[j];
        mean[j] = centre[j] + d * one_over;
        m2[j] = square[j] - d * d * one_over;
      }
    } else {
      for (int64_t j = 0; j < length; ++j) {
        const double d = sum[j], step = centre[j] + d * one_over - mean[j];
        mean[j] += step * mean_weight;
        m2[j] += (square[j] - d * d * one_over) + step * step * m2_weight;
      }
    }
    done += rows;
  }
}

// Sum of f(Block, lanes, e, j, word) over channel c's runs of the span; four sums in flight hide the latency of the addition.
template <class A, class F>
BNFAST_INLINE A sum_over_channel(PlaneSpan span, int64_t c, F f) {
  Block<A> sums[4] = {Block<A>(0), Block<A>(0), Block<A>(0), Block<A>(0)};
  span.c_begin = c;
  span.c_end = c + 1;
  for_runs(span, [&](int64_t e, int64_t n, int64_t, int64_t word) {
    int64_t j = 0;
    for (; j + 4 * kBlock <= n; j += 4 * kBlock) {
      for (int i = 0; i < 4; ++i) sums[i] = sums[i] + f(e, j + i * kBlock, Whole{}, word);
    }
    for (; j + kBlock <= n; j += kBlock) sums[0] = sums[0] + f(e, j, Whole{}, word);
    if (j < n) sums[1] = sums[1] + f(e, j, First{n - j}, word);
  });
  return lane_sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <class T>
void fwd_reduce_planes(const BnTensors& t, PlaneSpan span, double* mean_out, double* m2_out) {
  using A = acc_t<T>;
  const T* z = static_cast<const T*>(t.z);
  const double count = static_cast<double>((span.n_end - span.n_begin) * (span.s_end - span.s_begin));
  for (int64_t c = span.c_begin; c < span.c_end; ++c) {
    const A mean = static_cast<A>(
        sum_over_channel<A>(span, c, [&](int64_t e, int64_t j, auto lanes, int64_t) BNFAST_INLINE_LAMBDA {
          return load(z + e + j, lanes);
        }) / count);
    const Block<A> centre(mean);
    Block<A> squares[2] = {Block<A>(0), Block<A>(0)};
    const double sum = sum_over_channel<A>(span, c, [&](int64_t e, int64_t j, auto lanes, int64_t) BNFAST_INLINE_LAMBDA {
      Block<A> d = load(z + e + j, lanes) - centre;
      if constexpr (std::is_same_v<decltype(lanes), First>) {
        d = select(first_lanes<A>(lanes.lanes), d, Block<A>(0));
      }
      Block<A>& square = squares[(j / kBlock) & 1];
      square = square + d * d;
      return d;
    });
    mean_out[c] = mean + sum / count;
    m2_out[c] = lane_sum(squares[0] + squares[1]) - sum * sum / count;
  }
}

// ---- bn_bwd_reduce ------------------------------------------------------------------------------------------------

template <class T>
void bwd_reduce_rows(const BnTensors& t, RowSpan span, void* sum_db, void* sum_db_z) {
  using A = acc_t<T>;
  const T* z = static_cast<const T*>(t.z);
  const T* dy = static_cast<const T*>(t.dy);
  A* first = static_cast<A*>(sum_db);
  A* second = static_cast<A*>(sum_db_z);
  const int64_t length = span.length;
  std::fill(first, first + length, A(0));
  std::fill(second, second + length, A(0));
  const Channel<T, true> channel(t, 0);
  with_gradient<T>(t, [&](auto gradient) {
    auto add = [=](const auto& held, int64_t e, int64_t j, auto lanes, Block<A>& db_sum, Block<A>& db_z_sum) BNFAST_INLINE_LAMBDA {
      const Block<A> zb = load(z + e + j, lanes);
      const Block<A> db = gradient(held, zb, load(dy + e + j, lanes), e, j, lanes, e / kBlock);
      db_sum = db_sum + db;
      db_z_sum = db_z_sum + db * (zb - held.mean.at(j, lanes));
    };
    int64_t e = span.begin;
    for (; e + 4 * length <= span.end; e += 4 * length) {
      for (int64_t j = 0; j < length; j += kBlock) {
        const HeldChannel<A> held(channel, j, Whole{});
        Block<A> db_sum = load_block(first + j), db_z_sum = load_block(second + j);
        for (int i = 0; i < 4; ++i) {
          fetch_next_rows(z + e + i * length + j, length);
          fetch_next_rows(dy + e + i * length + j, length);
          add(held, e + i * length, j, Whole{}, db_sum, db_z_sum);
        }
        store_block(first + j, db_sum);
        store_block(second + j, db_z_sum);
      }
    }
    for (; e < span.end; e += length) {
      for_blocks(std::min(length, span.end - e), [&](int64_t j, auto lanes) BNFAST_INLINE_LAMBDA {
        Block<A> db_sum = load_block(first + j), db_z_sum = load_block(second + j);
        add(channel, e, j, lanes, db_sum, db_z_sum);
        store(first + j, db_sum, lanes);
        store(second + j, db_z_sum, lanes);
      });
    }
  });
}

template <class T>
void bwd_reduce_planes(const BnTensors& t, PlaneSpan span, void* sum_db, void* sum_db_z) {
  using A = acc_t<T>;
  const T* z = static_cast<const T*>(t.z);
  const T* dy = static_cast<const T*>(t.dy);
  with_gradient<T>(t, [&](auto gradient) {
    for (int64_t c = span.c_begin; c < span.c_end; ++c) {
      const Channel<T, false> channel(t, c);
      Block<A> db_z_sum[2] = {Block<A>(0), Block<A>(0)};
      // Lanes past the end hold dy = 0, so they add nothing to either sum.
      static_cast<A*>(sum_db)[c] =
          sum_over_channel<A>(span, c, [&](int64_t e, int64_t j, auto lanes, int64_t word) BNFAST_INLINE_LAMBDA {
            const Block<A> zb = load(z + e + j, lanes);
            const Block<A> db = gradient(channel, zb, load(dy + e + j, lanes), e, j, lanes, word);
            Block<A>& sum = db_z_sum[(j / kBlock) & 1];
            sum = sum + db * (zb - channel.mean.at(j, lanes));
            return db;
          });
      static_cast<A*>(sum_db_z)[c] = lane_sum(db_z_sum[0] + db_z_sum[1]);
    }
  });
}

// ---- bn_bwd_reduce behind a data gradient ---------------------------------------------------------------------------

// [dy is in the cache; read z (, add, z_beside, 1 bit), write dy where it changes]
template <class T>
void bwd_join_rows(const BnTensors& t, RowSpan span, float* sums) {
  using B = Block<float>;
  const int64_t length = span.length;
  const T *z = static_cast<const T*>(t.z), *more = static_cast<const T*>(t.add), *beside = static_cast<const T*>(t.z_beside);
  const float* mean_beside = static_cast<const float*>(t.mean_beside);
  T* dy = static_cast<T*>(t.out);
  const Channel<T, true> channel(t, 0);
  RunsAhead ahead(t.upcoming, &Upcoming::beside_reduction, bwd_reduce_cycles(t.act));
  // The slope of a smooth activation costs more than db does, which lies in the cache as dy did.
  const bool keeps = t.slope_from == Slope::kFromBits || t.act == Act::kSilu || t.act == Act::kHardswish;
  with_gradient<T>(t, [&](auto gradient) {
    const auto run = [&](auto has_add, auto keeps_db, auto has_beside) {
      auto walk = ahead.walk();
      const auto add = [=, &walk](const auto& held, int64_t e, int64_t j, auto lanes, B (&sum)[3]) BNFAST_INLINE_LAMBDA {
        walk.line();
        fetch_next_rows<3>(dy + e + j, length);
        fetch_next_rows<3>(z + e + j, length);
        B given = load(dy + e + j, lanes);
        if constexpr (has_add) given = rounded_to<T>(given + load(more + e + j, lanes));
        const B zb = load(z + e + j, lanes);
        B db = gradient(held, zb, given, e, j, lanes, e / kBlock);
        if constexpr (keeps_db) store(dy + e + j, db = rounded_to<T>(db), lanes);
        else if constexpr (has_add) store(dy + e + j, given, lanes);
        sum[0] = sum[0] + db;
        sum[1] = sum[1] + db * (zb - held.mean.at(j, lanes));
        if constexpr (has_beside) {
          sum[2] = sum[2] + db * (load(beside + e + j, lanes) - load(mean_beside + j, lanes));
        }
      };
      const auto rows = [=, &add](int64_t e, int64_t j, auto lanes, int count) BNFAST_INLINE_LAMBDA {
        B s[3];
        for (int i = 0; i < (has_beside ? 3 : 2); ++i) s[i] = load(sums + i * length + j, lanes);
        const HeldChannel<float> held(channel, j, lanes);
        for (int i = 0; i < count; ++i) add(held, e + i * length, j, lanes, s);
        for (int i = 0; i < (has_beside ? 3 : 2); ++i) store(sums + i * length + j, s[i], lanes);
      };
      int64_t e = span.begin;
      for (; e + 4 * length <= span.end; e += 4 * length) {
        for (int64_t j = 0; j < length; j += kBlock) rows(e, j, Whole{}, 4);
      }
      for (; e < span.end; e += length) {
        for_blocks(std::min(length, span.end - e), [&](int64_t j, auto lanes) BNFAST_INLINE_LAMBDA { rows(e, j, lanes, 1); });
      }
      ahead.walked(walk);
    };
    const auto with_add = [&](auto keeps_db, auto has_beside) {
      more ? run(Flag<true>{}, keeps_db, has_beside) : run(Flag<false>{}, keeps_db, has_beside);
    };
    if (beside) keeps ? with_add(Flag<true>{}, Flag<true>{}) : with_add(Flag<false>{}, Flag<true>{});
    else keeps ? with_add(Flag<true>{}, Flag<false>{}) : with_add(Flag<false>{}, Flag<false>{});
  });
}

template <class T>
void add_rows(const BnTensors& t, RowSpan span) {
  const T* more = static_cast<const T*>(t.add);
  T* dy = static_cast<T*>(t.out);
  for_blocks(span.end - span.begin, [&](int64_t j, auto lanes) BNFAST_INLINE_LAMBDA {
    const int64_t at = span.begin + j;
    store(dy + at, load(dy + at, lanes) + load(more + at, lanes), lanes);
  });
}

// ---- se_bwd_reduce ------------------------------------------------------------------------------------------------

// What forward stored as y.
template <class T, class Activation, class C, class L>
BNFAST_INLINE Block<acc_t<T>> output_of(Activation act, const C& channel, const T* z, int64_t j, L lanes) {
  return rounded_to<T>(act.value(channel.pre_activation(load(z, lanes), j, lanes)));
}

// Without dy the sums of y.
template <class T>
void se_reduce_pixels(const BnTensors& t, PixelSpan span, void* sums_out) {
  using A = acc_t<T>;
  const int64_t count = span.channels;
  const T* z = static_cast<const T*>(t.z);
  const T* dy = static_cast<const T*>(t.dy);
  A* sums = static_cast<A*>(sums_out);
  std::fill(sums, sums + count, A(0));
  const Channel<T, true> channel(t, 0);
  with_activation(t.act, t.slope, [&](auto act) {
    const auto run = [&](auto has_dy) {
      auto product = [&](int64_t pixel, int64_t j, auto lanes) BNFAST_INLINE_LAMBDA {
        const int64_t at = pixel * count + j;
        fetch_next_rows(z + at, count);
        const Block<A> y = output_of<T>(act, channel, z + at, j, lanes);
        if constexpr (has_dy) {
          fetch_next_rows(dy + at, count);
          return load(dy + at, lanes) * y;
        } else {
          return y;
        }
      };
      int64_t p = span.begin;
      for (; p + 4 <= span.end; p += 4) {
        for_blocks(count, [&](int64_t j, auto lanes) BNFAST_INLINE_LAMBDA {
          const Block<A> four = (product(p, j, lanes) + product(p + 1, j, lanes)) +
                                (product(p + 2, j, lanes) + product(p + 3, j, lanes));
          store(sums + j, load(sums + j, lanes) + four, lanes);
        });
      }
      for (; p < span.end; ++p) {
        for_blocks(count, [&](int64_t j, auto lanes) BNFAST_INLINE_LAMBDA {
          store(sums + j, load(sums + j, lanes) + product(p, j, lanes), lanes);
        });
      }
    };
    dy ? run(Flag<true>{}) : run(Flag<false>{});
  });
}

// [read dy, z] Sums of dy y, dy act', dy act' (z - mean), act' and act' (z - mean): five arrays of C.
template <class T>
void se_bwd_sums(const BnTensors& t, PixelSpan span, void* sums_out) {
  using A = acc_t<T>;
  constexpr int kSums = 5, kPixels = 4;
  const int64_t count = span.channels;
  const T* z = static_cast<const T*>(t.z);
  const T* dy = static_cast<const T*>(t.dy);
  A* sums = static_cast<A*>(sums_out);
  std::fill(sums, sums + kSums * count, A(0));
  const Channel<T, true> channel(t, 0);
  with_activation(t.act, t.slope, [&](auto act) {
    using Activation = decltype(act);
    const auto add = [&](int64_t at, int64_t j, auto lanes, Block<A> (&sum)[kSums]) BNFAST_INLINE_LAMBDA {
      fetch_next_rows(z + at, count);
      fetch_next_rows(dy + at, count);
      const Block<A> zb = load(z + at, lanes), given = load(dy + at, lanes), pre = channel.pre_activation(zb, j, lanes);
      const Block<A> one(1), slope = [&] {
        if constexpr (Activation::kPiecewise) return act.masked(act.passes(rounded_to<T>(pre)), one);
        else return act.gradient(pre, one);
      }();
      const Block<A> db = given * slope, centred = zb - channel.mean.at(j, lanes);
      sum[0] = sum[0] + given * rounded_to<T>(act.value(pre));
      sum[1] = sum[1] + db;
      sum[2] = sum[2] + db * centred;
      sum[3] = sum[3] + slope;
      sum[4] = sum[4] + slope * centred;
    };
    for (int64_t p = span.begin; p < span.end; p += kPixels) {
      const int64_t pixels = std::min<int64_t>(kPixels, span.end - p);
      for_blocks(count, [&](int64_t j, auto lanes) BNFAST_INLINE_LAMBDA {
        Block<A> sum[kSums];
        for (int i = 0; i < kSums; ++i) sum[i] = load(sums + i * count + j, lanes);
        for (int64_t k = 0; k < pixels; ++k) add((p + k) * count + j, j, lanes, sum);
        for (int i = 0; i < kSums; ++i) store(sums + i * count + j, sum[i], lanes);
      });
    }
  });
}

// [read from, write to] to = from * gate + shift of the pixels of the span, whose image has `plane` pixels; `to` is that of the first.
inline void se_gate_pixels(const float* from, float* to, PixelSpan span, int64_t plane, const float* gate, const float* shift) {
  for (int64_t p = span.begin; p < span.end; ++p, to += span.channels) {
    const int64_t n = p / plane * span.channels;
    for_blocks(span.channels, [&](int64_t j, auto lanes) BNFAST_INLINE_LAMBDA {
      Block<float> value = load(from + p * span.channels + j, lanes) * load(gate + n + j, lanes);
      if (shift) value = value + load(shift + n + j, lanes);
      store(to + j, value, lanes);
    });
  }
}

template <class T>
void se_reduce_planes(const BnTensors& t, PlaneSpan span, void* sums_out) {
  using A = acc_t<T>;
  const T* z = static_cast<const T*>(t.z);
  const T* dy = static_cast<const T*>(t.dy);
  A* sums = static_cast<A*>(sums_out);
  with_activation(t.act, t.slope, [&](auto act) {
    for (int64_t n = span.n_begin; n < span.n_end; ++n) {
      PlaneSpan image = span;
      image.n_begin = n;
      image.n_end = n + 1;
      for (int64_t c = span.c_begin; c < span.c_end; ++c) {
        const Channel<T, false> channel(t, c);
        // Lanes past the end hold dy = 0.
        sums[n * span.channels + c] =
            sum_over_channel<A>(image, c, [&](int64_t e, int64_t j, auto lanes, int64_t) BNFAST_INLINE_LAMBDA {
              return load(dy + e + j, lanes) * output_of<T>(act, channel, z + e + j, j, lanes);
            });
      }
    }
  });
}

template <class T>
constexpr BnKernels bn_kernels() {
  BnKernels kernels = {fwd_reduce_rows<T>, fwd_reduce_planes<T>, fwd_apply<T, RowSpan>, fwd_apply<T, PlaneSpan>,
                       bwd_reduce_rows<T>, bwd_reduce_planes<T>, nullptr, nullptr, bwd_apply<T, RowSpan>, bwd_apply<T, PlaneSpan>,
                       se_reduce_pixels<T>, se_reduce_planes<T>};
  if constexpr (std::is_same_v<T, float> || std::is_same_v<T, bf16>) {
    kernels.bwd_join_rows = bwd_join_rows<T>;
    kernels.add_rows = add_rows<T>;
  }
  if constexpr (std::is_same_v<T, float>) {
    kernels.se_bwd_sums = se_bwd_sums<T>;
    kernels.se_gate_pixels = se_gate_pixels;
  }
  return kernels;
}

}  // namespace bnfast::BNFAST_NAMESPACE
