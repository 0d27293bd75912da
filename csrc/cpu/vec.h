// A Block: 16 lanes of float or double in the machine's own vectors (one AVX-512 register, two AVX2, four SSE or NEON).
//
// All kernels compute on Blocks, in the same order on every instruction set, and the build has -ffp-contract=off: one
// machine's bits are another's (but for sigmoid and sums of products, which take fma where there is one, and for subnormal bf16, which
// AVX512_BF16 stores as zeros). Loads and stores convert f16 and bf16 (round to nearest even). Included once per capability, inside its
// own namespace and its own target pragma; BNFAST_VECTOR_BYTES is the width of a register, BNFAST_ROUNDS_BF16 says that it is rounded to
// bf16 by an instruction.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "storage.h"

// Everything below a kernel is inlined: Blocks stay in registers.
#define BNFAST_INLINE __attribute__((always_inline)) inline
#define BNFAST_INLINE_LAMBDA __attribute__((always_inline))

namespace bnfast::BNFAST_NAMESPACE {

constexpr int kBlock = 16;

// Arithmetic type of a storage type.
template <class T> struct AccumulatorOf { using type = float; };
template <> struct AccumulatorOf<double> { using type = double; };
template <class T> using acc_t = typename AccumulatorOf<T>::type;

template <class A> struct Lanes;
template <> struct Lanes<float> { using integer = int32_t; };
template <> struct Lanes<double> { using integer = int64_t; };

template <class A>
struct Block {
  static constexpr int kLanes = BNFAST_VECTOR_BYTES / sizeof(A);
  static constexpr int kParts = kBlock / kLanes;
  using Int = typename Lanes<A>::integer;
  typedef A Vec __attribute__((vector_size(BNFAST_VECTOR_BYTES)));
  typedef Int IntVec __attribute__((vector_size(BNFAST_VECTOR_BYTES)));

  // f(0), ..., f(kParts - 1), written out: a loop would keep the parts in memory.
  template <class F> static BNFAST_INLINE void parts(F f) {
    [&]<int... P>(std::integer_sequence<int, P...>) BNFAST_INLINE_LAMBDA { (f(P), ...); }(std::make_integer_sequence<int, kParts>{});
  }

  struct Mask {
    IntVec part[kParts];
    template <class F> static BNFAST_INLINE Mask make(F f) {
      Mask m;
      parts([&](int p) BNFAST_INLINE_LAMBDA { m.part[p] = f(p); });
      return m;
    }
    friend BNFAST_INLINE Mask operator!(const Mask& a) { return make([&](int p) BNFAST_INLINE_LAMBDA { return ~a.part[p]; }); }
    friend BNFAST_INLINE Mask operator|(const Mask& a, const Mask& b) {
      return make([&](int p) BNFAST_INLINE_LAMBDA { return a.part[p] | b.part[p]; });
    }
  };

  Vec part[kParts];

  Block() = default;
  explicit BNFAST_INLINE Block(double value) {
    parts([&](int p) BNFAST_INLINE_LAMBDA { part[p] = Vec{} + static_cast<A>(value); });
  }
  template <class F> static BNFAST_INLINE Block make(F f) {
    Block b;
    parts([&](int p) BNFAST_INLINE_LAMBDA { b.part[p] = f(p); });
    return b;
  }

#define BNFAST_ARITHMETIC(op)                                            \
  friend BNFAST_INLINE Block operator op(const Block& a, const Block& b) {      \
    return make([&](int p) BNFAST_INLINE_LAMBDA { return a.part[p] op b.part[p]; });          \
  }
  BNFAST_ARITHMETIC(+)
  BNFAST_ARITHMETIC(-)
  BNFAST_ARITHMETIC(*)
  BNFAST_ARITHMETIC(/)
#undef BNFAST_ARITHMETIC

#define BNFAST_COMPARISON(op)                                            \
  friend BNFAST_INLINE Mask operator op(const Block& a, const Block& b) {       \
    return Mask::make([&](int p) BNFAST_INLINE_LAMBDA { return a.part[p] op b.part[p]; });    \
  }
  BNFAST_COMPARISON(<)
  BNFAST_COMPARISON(<=)
  BNFAST_COMPARISON(>)
  BNFAST_COMPARISON(>=)
  BNFAST_COMPARISON(==)
#undef BNFAST_COMPARISON

  friend BNFAST_INLINE Block select(const Mask& m, const Block& a, const Block& b) {
    return make([&](int p) BNFAST_INLINE_LAMBDA { return m.part[p] ? a.part[p] : b.part[p]; });
  }
};

// Sum of the 16 lanes in a fixed order.
template <class A>
BNFAST_INLINE A lane_sum(const Block<A>& b) {
  A lane[kBlock];
  std::memcpy(lane, b.part, sizeof(lane));
  for (int step = kBlock / 2; step > 0; step /= 2) {
    for (int i = 0; i < step; ++i) lane[i] += lane[i + step];
  }
  return lane[0];
}

// Lanes below n.
template <class A>
BNFAST_INLINE typename Block<A>::Mask first_lanes(int64_t n) {
  using B = Block<A>;
  return B::Mask::make([&](int p) BNFAST_INLINE_LAMBDA {
    typename B::IntVec index;
    for (int i = 0; i < B::kLanes; ++i) index[i] = p * B::kLanes + i;
    return index < static_cast<typename B::Int>(n);
  });
}

// One bit per lane, lane 0 lowest.
template <class A>
BNFAST_INLINE uint16_t to_bits(const typename Block<A>::Mask& m) {
  using B = Block<A>;
  uint32_t bits = 0;
  for (int p = 0; p < B::kParts; ++p) {
    uint32_t part = 0;
#if defined(__x86_64__) && BNFAST_VECTOR_BYTES == 64
    if constexpr (sizeof(A) == 4) part = _mm512_movepi32_mask((__m512i)m.part[p]);
    else part = _mm512_movepi64_mask((__m512i)m.part[p]);
#elif defined(__x86_64__) && BNFAST_VECTOR_BYTES == 32
    if constexpr (sizeof(A) == 4) part = _mm256_movemask_ps((__m256)m.part[p]);
    else part = _mm256_movemask_pd((__m256d)m.part[p]);
#elif defined(__x86_64__)
    if constexpr (sizeof(A) == 4) part = _mm_movemask_ps((__m128)m.part[p]);
    else part = _mm_movemask_pd((__m128d)m.part[p]);
#else
    for (int i = 0; i < B::kLanes; ++i) part |= (m.part[p][i] ? 1u : 0u) << i;
#endif
    bits |= part << (p * B::kLanes);
  }
  return static_cast<uint16_t>(bits);
}

template <class A>
BNFAST_INLINE typename Block<A>::Mask from_bits(uint16_t bits) {
  using B = Block<A>;
  return B::Mask::make([&](int p) BNFAST_INLINE_LAMBDA {
    typename B::IntVec bit;
    for (int i = 0; i < B::kLanes; ++i) bit[i] = typename B::Int(1) << (p * B::kLanes + i);
    return ((typename B::IntVec{} + static_cast<typename B::Int>(bits)) & bit) != 0;
  });
}

// ---- loads and stores of one Block --------------------------------------------------------------------------------

typedef uint16_t HalfWords __attribute__((vector_size(BNFAST_VECTOR_BYTES / 2)));
typedef uint32_t Words __attribute__((vector_size(BNFAST_VECTOR_BYTES)));
using FloatVec = Block<float>::Vec;
using FloatMask = Block<float>::IntVec;

// In one instruction each, where there is one: compilers write out what __builtin_convertvector says in several.
BNFAST_INLINE Words widen(const uint16_t* from) {
#if defined(__x86_64__) && BNFAST_VECTOR_BYTES == 64
  return (Words)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from));
#elif defined(__x86_64__) && BNFAST_VECTOR_BYTES == 32
  return (Words)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from));
#else
  HalfWords half;
  std::memcpy(&half, from, sizeof(half));
  return __builtin_convertvector(half, Words);
#endif
}

BNFAST_INLINE void narrow(Words words, uint16_t* to) {
#if defined(__x86_64__) && BNFAST_VECTOR_BYTES == 64
  _mm256_storeu_si256((__m256i*)to, _mm512_cvtepi32_epi16((__m512i)words));
#else
  const HalfWords half = __builtin_convertvector(words, HalfWords);
  std::memcpy(to, &half, sizeof(half));
#endif
}

#if defined(__x86_64__) && BNFAST_VECTOR_BYTES == 64
BNFAST_INLINE FloatVec float_of_f16(const uint16_t* from) {
  return (FloatVec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from));
}
BNFAST_INLINE void store_f16(FloatVec v, uint16_t* to) {
  _mm256_storeu_si256((__m256i*)to, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__x86_64__) && BNFAST_VECTOR_BYTES == 32
BNFAST_INLINE FloatVec float_of_f16(const uint16_t* from) {
  return (FloatVec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
}
BNFAST_INLINE void store_f16(FloatVec v, uint16_t* to) {
  _mm_storeu_si128((__m128i*)to, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
}
#else
// Without a conversion instruction: the exponent is moved by a multiplication, which is exact for subnormals too.
BNFAST_INLINE FloatVec float_of_f16(const uint16_t* from) {
  const Words h = widen(from);
  const Words sign = (h & 0x8000u) << 16;
  const Words magnitude = (h & 0x7fffu) << 13;
  const FloatVec scaled = (FloatVec)magnitude * 0x1p112f;
  const Words special = (Words)((h & 0x7c00u) == 0x7c00u);
  return (FloatVec)(sign | (special & (magnitude | 0x7f800000u)) | (~special & (Words)scaled));
}
BNFAST_INLINE void store_f16(FloatVec v, uint16_t* to) {
  const Words x = (Words)v;
  const Words sign = (x >> 16) & 0x8000u;
  const Words magnitude = x & 0x7fffffffu;
  // Normal results: rebias, then round the 13 dropped bits to nearest even; a carry runs into the exponent as it should.
  const Words normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Subnormal results: adding 0.5 lines the last place of f16 up with the last place of the float, which rounds.
  const FloatVec aligned = (FloatVec)magnitude + 0.5f;
  const Words subnormal = (Words)aligned - 0x3f000000u;
  const Words is_small = (Words)(magnitude < 0x38800000u);
  const Words is_large = (Words)(magnitude >= 0x477ff000u);
  const Words is_nan = (Words)(magnitude > 0x7f800000u);
  Words h = (is_small & subnormal) | (~is_small & normal);
  h = (~is_large & h) | (is_large & 0x7c00u);
  h = (~is_nan & h) | (is_nan & 0x7e00u);
  narrow(sign | h, to);
}
#endif

BNFAST_INLINE Block<float> load_block(const float* from) {
  return Block<float>::make([&](int p) BNFAST_INLINE_LAMBDA {
    Block<float>::Vec part;
    std::memcpy(&part, from + p * Block<float>::kLanes, sizeof(part));
    return part;
  });
}
BNFAST_INLINE Block<double> load_block(const double* from) {
  return Block<double>::make([&](int p) BNFAST_INLINE_LAMBDA {
    Block<double>::Vec part;
    std::memcpy(&part, from + p * Block<double>::kLanes, sizeof(part));
    return part;
  });
}
BNFAST_INLINE Block<float> load_block(const bf16* from) {
  const uint16_t* words = &from->bits;
  return Block<float>::make(
      [&](int p) BNFAST_INLINE_LAMBDA { return (FloatVec)(widen(words + p * Block<float>::kLanes) << 16); });
}
BNFAST_INLINE Block<float> load_block(const f16* from) {
  const uint16_t* words = &from->bits;
  return Block<float>::make([&](int p) BNFAST_INLINE_LAMBDA { return float_of_f16(words + p * Block<float>::kLanes); });
}

BNFAST_INLINE void store_block(float* to, const Block<float>& b) {
  Block<float>::parts([&](int p) BNFAST_INLINE_LAMBDA { std::memcpy(to + p * Block<float>::kLanes, &b.part[p], sizeof(b.part[p])); });
}
BNFAST_INLINE void store_block(double* to, const Block<double>& b) {
  Block<double>::parts([&](int p) BNFAST_INLINE_LAMBDA { std::memcpy(to + p * Block<double>::kLanes, &b.part[p], sizeof(b.part[p])); });
}
// As bf16 in the low half of each lane.
BNFAST_INLINE Words bf16_bits(FloatVec v) {
#ifdef BNFAST_ROUNDS_BF16
  return (Words)_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)v));
#else
  const Words x = (Words)v;
  const Words rounded = (x + 0x7fffu + ((x >> 16) & 1u)) >> 16;
  const Words is_nan = (Words)((x & 0x7fffffffu) > 0x7f800000u);
  return (~is_nan & rounded) | (is_nan & ((x >> 16) | 0x40u));
#endif
}
BNFAST_INLINE void store_block(bf16* to, const Block<float>& b) {
#ifdef BNFAST_ROUNDS_BF16
  _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh((__m512)b.part[0]));
#else
  for (int p = 0; p < Block<float>::kParts; ++p) narrow(bf16_bits(b.part[p]), &to->bits + p * Block<float>::kLanes);
#endif
}
BNFAST_INLINE void store_block(f16* to, const Block<float>& b) {
  for (int p = 0; p < Block<float>::kParts; ++p) {
    store_f16(b.part[p], &to->bits + p * Block<float>::kLanes);
  }
}

#if defined(__x86_64__) && BNFAST_VECTOR_BYTES == 64
template <class T>
BNFAST_INLINE void read_lanes(T (&lane)[kBlock], const T* from, int64_t n) {
  const uint32_t mask = (1u << n) - 1;
  if constexpr (sizeof(T) == 2) {
    _mm256_storeu_si256((__m256i*)lane, _mm256_maskz_loadu_epi16(mask, from));
  } else if constexpr (sizeof(T) == 4) {
    _mm512_storeu_si512(lane, _mm512_maskz_loadu_epi32(mask, from));
  } else {
    _mm512_storeu_si512(lane, _mm512_maskz_loadu_epi64(mask & 0xff, from));
    _mm512_storeu_si512(lane + 8, _mm512_maskz_loadu_epi64(mask >> 8, from + 8));
  }
}
template <class T>
BNFAST_INLINE void write_lanes(T* to, const T (&lane)[kBlock], int64_t n) {
  const uint32_t mask = (1u << n) - 1;
  if constexpr (sizeof(T) == 2) {
    _mm256_mask_storeu_epi16(to, mask, _mm256_loadu_si256((const __m256i*)lane));
  } else if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_epi32(to, mask, _mm512_loadu_si512(lane));
  } else {
    _mm512_mask_storeu_epi64(to, mask & 0xff, _mm512_loadu_si512(lane));
    _mm512_mask_storeu_epi64(to + 8, mask >> 8, _mm512_loadu_si512(lane + 8));
  }
}
#else
template <class T>
BNFAST_INLINE void read_lanes(T (&lane)[kBlock], const T* from, int64_t n) {
  std::memset(lane, 0, sizeof(lane));
  std::memcpy(lane, from, n * sizeof(T));
}
template <class T>
BNFAST_INLINE void write_lanes(T* to, const T (&lane)[kBlock], int64_t n) { std::memcpy(to, lane, n * sizeof(T)); }
#endif

// The first n < 16 lanes; the others are 0 on load and untouched on store.
template <class T>
BNFAST_INLINE Block<acc_t<T>> load_partial(const T* from, int64_t n) {
  T lane[kBlock];
  read_lanes(lane, from, n);
  return load_block(lane);
}
template <class T>
BNFAST_INLINE void store_partial(T* to, const Block<acc_t<T>>& b, int64_t n) {
  T lane[kBlock];
  store_block(lane, b);
  write_lanes(to, lane, n);
}

// A whole Block, or the first lanes of one. Two types, so that the loop over whole Blocks is compiled without the other case.
struct Whole {};
struct First { int64_t lanes; };

template <class T> BNFAST_INLINE Block<acc_t<T>> load(const T* from, Whole) { return load_block(from); }
template <class T> BNFAST_INLINE Block<acc_t<T>> load(const T* from, First f) { return load_partial(from, f.lanes); }
template <class T> BNFAST_INLINE void store(T* to, const Block<acc_t<T>>& b, Whole) { store_block(to, b); }
template <class T> BNFAST_INLINE void store(T* to, const Block<acc_t<T>>& b, First f) { store_partial(to, b, f.lanes); }

// As store_block, past the cache; `to` is a multiple of the Block's bytes. Followed by end_of_stream before others read it.
template <class T>
BNFAST_INLINE void stream_block(T* to, const Block<acc_t<T>>& b) {
#if defined(__x86_64__)
  T lane[kBlock] __attribute__((aligned(64)));
  store_block(lane, b);
  constexpr int kBytes = sizeof(lane) < BNFAST_VECTOR_BYTES ? sizeof(lane) : BNFAST_VECTOR_BYTES;
  for (size_t i = 0; i < sizeof(lane); i += kBytes) {
    char* const at = reinterpret_cast<char*>(to) + i;
    const char* const from = reinterpret_cast<const char*>(lane) + i;
#if BNFAST_VECTOR_BYTES == 64
    if constexpr (kBytes == 64) _mm512_stream_si512((__m512i*)at, _mm512_load_si512(from));
#endif
#if BNFAST_VECTOR_BYTES >= 32
    if constexpr (kBytes == 32) _mm256_stream_si256((__m256i*)at, _mm256_load_si256((const __m256i*)from));
#endif
    if constexpr (kBytes == 16) _mm_stream_si128((__m128i*)at, _mm_load_si128((const __m128i*)from));
  }
#else
  store_block(to, b);
#endif
}
BNFAST_INLINE void end_of_stream() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// The value that storing as T keeps.
template <class T>
BNFAST_INLINE Block<acc_t<T>> rounded_to(const Block<acc_t<T>>& b) {
  if constexpr (sizeof(T) == sizeof(acc_t<T>)) {
    return b;
  } else if constexpr (std::is_same_v<T, bf16>) {
    return Block<float>::make([&](int p) BNFAST_INLINE_LAMBDA { return (FloatVec)(bf16_bits(b.part[p]) << 16); });
  } else {
    T lane[kBlock];
    store_block(lane, b);
    return load_block(lane);
  }
}

// The value in every lane: one load that repeats it, where adding it to a vector of zeros costs an addition (-0 + 0 is 0).
BNFAST_INLINE FloatVec broadcast(float value) {
#if defined(__x86_64__) && BNFAST_VECTOR_BYTES == 64
  return (FloatVec)_mm512_set1_ps(value);
#elif defined(__x86_64__) && BNFAST_VECTOR_BYTES == 32
  return (FloatVec)_mm256_set1_ps(value);
#elif defined(__x86_64__)
  return (FloatVec)_mm_set1_ps(value);
#else
  FloatVec v;
  for (int i = 0; i < Block<float>::kLanes; ++i) v[i] = value;
  return v;
#endif
}

// ---- sigmoid ------------------------------------------------------------------------------------------------------

#if defined(__x86_64__) && BNFAST_VECTOR_BYTES == 64
BNFAST_INLINE FloatVec fma(FloatVec a, FloatVec b, FloatVec c) { return (FloatVec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
// The second operand where one is a NaN.
BNFAST_INLINE FloatVec min(FloatVec a, FloatVec b) { return (FloatVec)_mm512_min_ps((__m512)a, (__m512)b); }
// 1 / x for 1 <= x < 2^126: 14 bits from the table, doubled by Newton's step, in place of a division.
BNFAST_INLINE FloatVec reciprocal(FloatVec x) {
  const FloatVec y = (FloatVec)_mm512_rcp14_ps((__m512)x);
  const FloatVec error = (FloatVec)_mm512_fnmadd_ps((__m512)x, (__m512)y, (__m512)(FloatVec{} + 1.0f));
  return fma(y, error, y);
}
#elif defined(__x86_64__) && BNFAST_VECTOR_BYTES == 32
BNFAST_INLINE FloatVec fma(FloatVec a, FloatVec b, FloatVec c) { return (FloatVec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
BNFAST_INLINE FloatVec min(FloatVec a, FloatVec b) { return (FloatVec)_mm256_min_ps((__m256)a, (__m256)b); }
BNFAST_INLINE FloatVec reciprocal(FloatVec x) { return 1.0f / x; }
#else
BNFAST_INLINE FloatVec fma(FloatVec a, FloatVec b, FloatVec c) { return a * b + c; }
BNFAST_INLINE FloatVec min(FloatVec a, FloatVec b) { return a < b ? a : b; }
BNFAST_INLINE FloatVec reciprocal(FloatVec x) { return 1.0f / x; }
#endif

// exp(-x) to about 1 ulp for -87 <= x, the value at 87 beyond that; anything below; a NaN stays one.
// x = n ln2 + r with |r| <= ln2 / 2, e^-r by the polynomial of degree 6 whose largest relative error, 2e-9, is least, 2^-n by the exponent field.
BNFAST_INLINE FloatVec exp_of_minus(FloatVec x) {
  const FloatVec zero = {};
  const FloatVec v = min(zero + 87.0f, x);
  const FloatVec shifted = fma(v, zero - 1.44269504f, zero + 12582912.0f);  // 1.5 * 2^23: the low bits are round(-v / ln2)
  const FloatVec n = shifted - 12582912.0f;
  const FloatVec r = fma(n, zero - 2.12194440e-4f, fma(n, zero + 0.693359375f, v));  // ln2 in two parts, the first exact times n
  FloatVec e = fma(r, zero + 0.00138436060f, zero - 0.00837419555f);
  e = fma(e, r, zero + 0.0416680053f);
  e = fma(e, r, zero - 0.166664302f);
  e = fma(e, r, zero + 0.49999994f);
  e = fma(e, r, zero - 1.0f);
  e = fma(e, r, zero + 1.0f);
  return (FloatVec)((FloatMask)e + (FloatMask)((Words)shifted << 23));
}

// 1 / (1 + exp(-x)) to about 2 ulp. Its bits depend on the instruction set: fma and division differ.
BNFAST_INLINE Block<float> sigmoid(const Block<float>& x) {
  return Block<float>::make([&](int p) BNFAST_INLINE_LAMBDA {
    const FloatVec s = reciprocal(exp_of_minus(x.part[p]) + 1.0f);
    return x.part[p] < -87.0f ? FloatVec{} : s;   // 0, so that -infinity * sigmoid(-infinity) is NaN as in PyTorch
  });
}

BNFAST_INLINE Block<double> sigmoid(const Block<double>& x) {
  double lane[kBlock];
  store_block(lane, x);
  for (double& value : lane) value = 1 / (1 + std::exp(-value));
  return load_block(lane);
}

// Calls body(offset, lanes) for each Block of n elements.
template <class F>
BNFAST_INLINE void for_blocks(int64_t n, F body) {
  int64_t j = 0;
  for (; j + kBlock <= n; j += kBlock) body(j, Whole{});
  if (j < n) body(j, First{n - j});
}

}  // namespace bnfast::BNFAST_NAMESPACE
