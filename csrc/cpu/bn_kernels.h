// The BatchNorm phases, memory passes per element in brackets:
//   bn_fwd_reduce  [read z]                    mean and M2; a tile is read again from the cache for the exact M2
//   bn_fwd_apply   [read z (, r), write y]     y = act((z - mean) * scale + beta (+ r)) (, 1 bit)
//   bn_bwd_reduce  [read dy, z]                sum(db), sum(db * (z - mean)) with db = dy * act'
//   bn_bwd_apply   [read dy, z, write dz (, dr)]
// Included once per capability; see vec.h for the arithmetic and bn.h for the two views of a tensor.
#pragma once

#include <algorithm>
#include <type_traits>

#include "../activation.h"
#include "bn.h"
#include "vec.h"

namespace bnfast::BNFAST_NAMESPACE {

// Elements whose mean is taken exactly before their squares are summed: small enough to stay in the L2 cache.
constexpr int64_t kTile = 32768;

template <bool kValue> using Flag = std::bool_constant<kValue>;

// A whole Block, or its first lanes.
template <class T>
inline Block<acc_t<T>> load(const T* from, int64_t lanes) {
  return lanes == kBlock ? load_block(from) : load_partial(from, lanes);
}
template <class T>
inline void store(T* to, const Block<acc_t<T>>& b, int64_t lanes) {
  lanes == kBlock ? store_block(to, b) : store_partial(to, b, lanes);
}

// Channel parameters of a span: read along it (rows), or one value for all of it (planes).
template <class A, bool kAlong>
struct Parameter {
  const A* values;
  inline Block<A> at(int64_t j, int64_t lanes) const {
    if constexpr (kAlong) return load(values + j, lanes);
    else return Block<A>(*values);
  }
};

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

  // The one expression of the pre-activation: forward and backward must agree on it bit for bit.
  inline Block<A> pre_activation(const Block<A>& z, int64_t j, int64_t lanes) const {
    return (z - mean.at(j, lanes)) * scale.at(j, lanes) + beta.at(j, lanes);
  }
};

// Calls body(offset, lanes) for each Block of n elements.
template <class F>
inline void for_blocks(int64_t n, F body) {
  int64_t j = 0;
  for (; j + kBlock <= n; j += kBlock) body(j, static_cast<int64_t>(kBlock));
  if (j < n) body(j, n - j);
}

// Calls body(first element, number of elements, first parameter, first word of bits) for each contiguous run.
template <class F>
inline void for_runs(RowSpan s, F body) {
  for (int64_t e = s.begin; e < s.end; e += s.length) {
    body(e, std::min(s.length, s.end - e), int64_t{0}, e / kBlock);
  }
}
template <class F>
inline void for_runs(PlaneSpan s, F body) {
  const int64_t words = (s.plane + kBlock - 1) / kBlock;
  for (int64_t n = s.n_begin; n < s.n_end; ++n) {
    for (int64_t c = s.c_begin; c < s.c_end; ++c) {
      const int64_t p = n * s.channels + c;
      body(p * s.plane + s.s_begin, s.s_end - s.s_begin, c, p * words + s.s_begin / kBlock);
    }
  }
}

template <class Span> constexpr bool kRows = std::is_same_v<Span, RowSpan>;

// ---- bn_fwd_apply -------------------------------------------------------------------------------------------------

template <class T, class Span>
void fwd_apply(const BnTensors& t, Span span) {
  using A = acc_t<T>;
  const T* z = static_cast<const T*>(t.z);
  const T* r = static_cast<const T*>(t.residual);
  T* y = static_cast<T*>(t.out);
  with_activation(t.act, t.slope, [&](auto act) {
    auto run = [&](auto has_residual, auto has_bits) {
      for_runs(span, [&](int64_t e, int64_t n, int64_t first, int64_t word) {
        const Channel<T, kRows<Span>> channel(t, first);
        for_blocks(n, [&](int64_t j, int64_t lanes) {
          Block<A> pre = channel.pre_activation(load(z + e + j, lanes), j, lanes);
          if constexpr (has_residual) pre = pre + load(r + e + j, lanes);
          store(y + e + j, act.value(pre), lanes);
          if constexpr (has_bits && act.kPiecewise) {
            t.bits[word + j / kBlock] = to_bits<A>(act.passes(rounded_to<T>(pre)));
          }
        });
      });
    };
    if (!r) run(Flag<false>{}, Flag<false>{});
    else if (!t.bits) run(Flag<true>{}, Flag<false>{});
    else run(Flag<true>{}, Flag<true>{});
  });
}

// ---- the gradient of the pre-activation, db = dy * act' ------------------------------------------------------------

// Calls run(gradient) with gradient(channel, z, e, j, lanes, word) -> db.
template <class T, class F>
void with_gradient(const BnTensors& t, F run) {
  using A = acc_t<T>;
  const T* dy = static_cast<const T*>(t.dy);
  const T* r = static_cast<const T*>(t.residual);
  with_activation(t.act, t.slope, [&](auto act) {
    using Activation = decltype(act);
    if constexpr (std::is_same_v<Activation, Identity>) {
      run([=](const auto&, const Block<A>&, int64_t e, int64_t j, int64_t lanes, int64_t) {
        return load(dy + e + j, lanes);
      });
    } else {
      auto from_pre = [=](const Block<A>& pre, const Block<A>& grad) {
        if constexpr (Activation::kPiecewise) return act.masked(act.passes(rounded_to<T>(pre)), grad);
        else return act.gradient(pre, grad);
      };
      if (t.slope_from == Slope::kFromZ) {
        run([=](const auto& channel, const Block<A>& z, int64_t e, int64_t j, int64_t lanes, int64_t) {
          return from_pre(channel.pre_activation(z, j, lanes), load(dy + e + j, lanes));
        });
      } else if (t.slope_from == Slope::kFromZAndResidual) {
        run([=](const auto& channel, const Block<A>& z, int64_t e, int64_t j, int64_t lanes, int64_t) {
          const Block<A> pre = channel.pre_activation(z, j, lanes) + load(r + e + j, lanes);
          return from_pre(pre, load(dy + e + j, lanes));
        });
      } else if constexpr (Activation::kPiecewise) {
        const uint16_t* bits = t.bits;
        run([=](const auto&, const Block<A>&, int64_t e, int64_t j, int64_t lanes, int64_t word) {
          return act.masked(from_bits<A>(bits[word + j / kBlock]), load(dy + e + j, lanes));
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
  T* dz = static_cast<T*>(t.out);
  T* dr = static_cast<T*>(t.dresidual);
  with_gradient<T>(t, [&](auto gradient) {
    auto run = [&](auto batch_statistics, auto has_residual) {
      for_runs(span, [&](int64_t e, int64_t n, int64_t first, int64_t word) {
        const Channel<T, kRows<Span>> channel(t, first);
        for_blocks(n, [&](int64_t j, int64_t lanes) {
          const Block<A> zb = load(z + e + j, lanes);
          const Block<A> db = gradient(channel, zb, e, j, lanes, word);
          if constexpr (has_residual) store(dr + e + j, db, lanes);
          Block<A> centred = db;
          if constexpr (batch_statistics) {
            centred = (db - channel.shift_db.at(j, lanes)) -
                      (zb - channel.mean.at(j, lanes)) * channel.shift_z.at(j, lanes);
          }
          store(dz + e + j, centred * channel.scale.at(j, lanes), lanes);
        });
      });
    };
    if (t.shift_db) dr ? run(Flag<true>{}, Flag<true>{}) : run(Flag<true>{}, Flag<false>{});
    else dr ? run(Flag<false>{}, Flag<true>{}) : run(Flag<false>{}, Flag<false>{});
  });
}

// ---- bn_fwd_reduce ------------------------------------------------------------------------------------------------

// Adds f(Block) over `rows` rows into sums, four rows at a time so that a sum is loaded and stored once for four.
template <class T, class F>
inline void accumulate_rows(const T* z, int64_t length, int64_t rows, acc_t<T>* sums, F f) {
  std::fill(sums, sums + length, acc_t<T>(0));
  int64_t i = 0;
  for (; i + 4 <= rows; i += 4, z += 4 * length) {
    for (int64_t j = 0; j < length; j += kBlock) {
      const auto low = f(load_block(z + j), j) + f(load_block(z + length + j), j);
      const auto high = f(load_block(z + 2 * length + j), j) + f(load_block(z + 3 * length + j), j);
      store_block(sums + j, load_block(sums + j) + (low + high));
    }
  }
  for (; i < rows; ++i, z += length) {
    for (int64_t j = 0; j < length; j += kBlock) {
      store_block(sums + j, load_block(sums + j) + f(load_block(z + j), j));
    }
  }
}

// Tile-exact mean and M2, merged over the tiles by Chan's formula:
//   n = na + nb, d = mean_b - mean_a, mean = mean_a + d nb / n, M2 = M2_a + M2_b + d^2 na nb / n.
template <class T>
void fwd_reduce_rows(const BnTensors& t, RowSpan span, void* mean_out, void* m2_out, void* scratch) {
  using A = acc_t<T>;
  const int64_t length = span.length;
  A* mean = static_cast<A*>(mean_out);
  A* m2 = static_cast<A*>(m2_out);
  A* tile_mean = static_cast<A*>(scratch);
  A* tile_m2 = tile_mean + length;
  const int64_t tile_rows = std::max<int64_t>(4, kTile / length / 4 * 4);
  std::fill(mean, mean + length, A(0));
  std::fill(m2, m2 + length, A(0));
  int64_t done = 0;
  for (int64_t e = span.begin; e < span.end; e += tile_rows * length) {
    const T* z = static_cast<const T*>(t.z) + e;
    const int64_t rows = std::min(tile_rows, (span.end - e) / length);
    accumulate_rows(z, length, rows, tile_mean, [](const Block<A>& x, int64_t) { return x; });
    const Block<A> one_over_rows(1.0 / rows);
    for (int64_t j = 0; j < length; j += kBlock) {
      store_block(tile_mean + j, load_block(tile_mean + j) * one_over_rows);
    }
    accumulate_rows(z, length, rows, tile_m2, [&](const Block<A>& x, int64_t j) {
      const Block<A> d = x - load_block(tile_mean + j);
      return d * d;
    });
    const double n = done + rows;
    const Block<A> mean_weight(rows / n), m2_weight(done * (rows / n));
    for (int64_t j = 0; j < length; j += kBlock) {
      const Block<A> old_mean = load_block(mean + j);
      const Block<A> d = load_block(tile_mean + j) - old_mean;
      store_block(mean + j, old_mean + d * mean_weight);
      store_block(m2 + j, load_block(m2 + j) + load_block(tile_m2 + j) + d * d * m2_weight);
    }
    done += rows;
  }
}

// Sum of f(Block, lanes, e, j, word) over channel c's runs of the span; four sums in flight hide the latency of the addition.
template <class A, class F>
inline A sum_over_channel(PlaneSpan span, int64_t c, F f) {
  Block<A> sums[4] = {Block<A>(0), Block<A>(0), Block<A>(0), Block<A>(0)};
  span.c_begin = c;
  span.c_end = c + 1;
  for_runs(span, [&](int64_t e, int64_t n, int64_t, int64_t word) {
    int64_t j = 0;
    for (; j + 4 * kBlock <= n; j += 4 * kBlock) {
      for (int i = 0; i < 4; ++i) sums[i] = sums[i] + f(e, j + i * kBlock, int64_t{kBlock}, word);
    }
    for (int i = 0; j < n; j += kBlock, ++i) {
      sums[i] = sums[i] + f(e, j, std::min<int64_t>(kBlock, n - j), word);
    }
  });
  return lane_sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <class T>
void fwd_reduce_planes(const BnTensors& t, PlaneSpan span, void* mean_out, void* m2_out) {
  using A = acc_t<T>;
  const T* z = static_cast<const T*>(t.z);
  const double count = static_cast<double>((span.n_end - span.n_begin) * (span.s_end - span.s_begin));
  for (int64_t c = span.c_begin; c < span.c_end; ++c) {
    const A mean = static_cast<A>(
        sum_over_channel<A>(span, c, [&](int64_t e, int64_t j, int64_t lanes, int64_t) {
          return load(z + e + j, lanes);
        }) / count);
    const Block<A> centre(mean);
    static_cast<A*>(mean_out)[c] = mean;
    static_cast<A*>(m2_out)[c] =
        sum_over_channel<A>(span, c, [&](int64_t e, int64_t j, int64_t lanes, int64_t) {
          const Block<A> d = load(z + e + j, lanes) - centre;
          return lanes == kBlock ? d * d : select(first_lanes<A>(lanes), d * d, Block<A>(0));
        });
  }
}

// ---- bn_bwd_reduce ------------------------------------------------------------------------------------------------

template <class T>
void bwd_reduce_rows(const BnTensors& t, RowSpan span, void* sum_db, void* sum_db_z) {
  using A = acc_t<T>;
  const T* z = static_cast<const T*>(t.z);
  A* first = static_cast<A*>(sum_db);
  A* second = static_cast<A*>(sum_db_z);
  const int64_t length = span.length;
  std::fill(first, first + length, A(0));
  std::fill(second, second + length, A(0));
  const Channel<T, true> channel(t, 0);
  with_gradient<T>(t, [&](auto gradient) {
    auto add = [&](int64_t e, int64_t j, int64_t lanes, Block<A>& db_sum, Block<A>& db_z_sum) {
      const Block<A> zb = load(z + e + j, lanes);
      const Block<A> db = gradient(channel, zb, e, j, lanes, e / kBlock);
      db_sum = db_sum + db;
      db_z_sum = db_z_sum + db * (zb - channel.mean.at(j, lanes));
    };
    int64_t e = span.begin;
    for (; e + 4 * length <= span.end; e += 4 * length) {
      for (int64_t j = 0; j < length; j += kBlock) {
        Block<A> db_sum = load_block(first + j), db_z_sum = load_block(second + j);
        for (int i = 0; i < 4; ++i) add(e + i * length, j, kBlock, db_sum, db_z_sum);
        store_block(first + j, db_sum);
        store_block(second + j, db_z_sum);
      }
    }
    for (; e < span.end; e += length) {
      for_blocks(std::min(length, span.end - e), [&](int64_t j, int64_t lanes) {
        Block<A> db_sum = load_block(first + j), db_z_sum = load_block(second + j);
        add(e, j, lanes, db_sum, db_z_sum);
        store_partial(first + j, db_sum, lanes);
        store_partial(second + j, db_z_sum, lanes);
      });
    }
  });
}

template <class T>
void bwd_reduce_planes(const BnTensors& t, PlaneSpan span, void* sum_db, void* sum_db_z) {
  using A = acc_t<T>;
  const T* z = static_cast<const T*>(t.z);
  with_gradient<T>(t, [&](auto gradient) {
    for (int64_t c = span.c_begin; c < span.c_end; ++c) {
      const Channel<T, false> channel(t, c);
      Block<A> db_z_sum[2] = {Block<A>(0), Block<A>(0)};
      // Lanes past the end hold dy = 0, so they add nothing to either sum.
      static_cast<A*>(sum_db)[c] =
          sum_over_channel<A>(span, c, [&](int64_t e, int64_t j, int64_t lanes, int64_t word) {
            const Block<A> zb = load(z + e + j, lanes);
            const Block<A> db = gradient(channel, zb, e, j, lanes, word);
            Block<A>& sum = db_z_sum[(j / kBlock) & 1];
            sum = sum + db * (zb - channel.mean.at(j, lanes));
            return db;
          });
      static_cast<A*>(sum_db_z)[c] = lane_sum(db_z_sum[0] + db_z_sum[1]);
    }
  });
}

template <class T>
constexpr BnKernels bn_kernels() {
  return {fwd_reduce_rows<T>, fwd_reduce_planes<T>, fwd_apply<T, RowSpan>, fwd_apply<T, PlaneSpan>,
          bwd_reduce_rows<T>, bwd_reduce_planes<T>, bwd_apply<T, RowSpan>, bwd_apply<T, PlaneSpan>};
}

}  // namespace bnfast::BNFAST_NAMESPACE
