// Slots: what a thread moves at once, its way between memory and the accumulator's dtype, and the bits that belong to it.
#pragma once

#include "bn.h"
#include "intrinsics.cuh"

#define BNFAST_NAMESPACE cuda
#define BNFAST_HD BNFAST_DEVICE

namespace bnfast::cuda {

// What csrc/activation.h asks of a value type, for float and double.
template <class A> BNFAST_DEVICE A select(bool mask, A a, A b) { return mask ? a : b; }
template <class A> BNFAST_DEVICE A sigmoid(A x) { return A(1) / (A(1) + exponential(-x)); }

}  // namespace bnfast::cuda

#include "../activation.h"

namespace bnfast::cuda {

// ---- element types: the accumulator, and the way there and back ---------------------------------------------------------

struct BFloat16 { uint16_t bits; };
struct Half { uint16_t bits; };

template <class T> struct AccumulatorOf { using type = float; };
template <> struct AccumulatorOf<double> { using type = double; };
template <class T> using acc_t = typename AccumulatorOf<T>::type;

template <class T> constexpr int kWidth = 16 / sizeof(T);   // elements of a slot

BNFAST_DEVICE float widened(float x) { return x; }
BNFAST_DEVICE double widened(double x) { return x; }
BNFAST_DEVICE float widened(BFloat16 x) { return __uint_as_float(uint32_t{x.bits} << 16); }
BNFAST_DEVICE float widened(Half x) { return __half2float(__ushort_as_half(x.bits)); }

template <class T> BNFAST_DEVICE T narrowed(acc_t<T> x) { return x; }
template <> BNFAST_DEVICE BFloat16 narrowed<BFloat16>(float x) { return {__bfloat16_as_ushort(__float2bfloat16_rn(x))}; }
template <> BNFAST_DEVICE Half narrowed<Half>(float x) { return {__half_as_ushort(__float2half_rn(x))}; }

// The value that a tensor of T would hold.
template <class T> BNFAST_DEVICE acc_t<T> rounded(acc_t<T> x) { return widened(narrowed<T>(x)); }

// A channel vector's value in the accumulator's dtype, and back.
template <class A>
BNFAST_DEVICE A value_of(const ChannelVector& v, int c, A absent) {
  if (v.values == nullptr) return absent;
  switch (v.dtype) {
    case DType::kFloat: return static_cast<A>(static_cast<const float*>(v.values)[c]);
    case DType::kDouble: return static_cast<A>(static_cast<const double*>(v.values)[c]);
    case DType::kBFloat16: return static_cast<A>(widened(static_cast<const BFloat16*>(v.values)[c]));
    case DType::kHalf: return static_cast<A>(widened(static_cast<const Half*>(v.values)[c]));
  }
  return absent;
}

template <class A>
BNFAST_DEVICE void set_value(const ChannelVector& v, int c, A value) {
  switch (v.dtype) {
    case DType::kFloat: static_cast<float*>(v.values)[c] = static_cast<float>(value); break;
    case DType::kDouble: static_cast<double*>(v.values)[c] = value; break;
    case DType::kBFloat16: static_cast<BFloat16*>(v.values)[c] = narrowed<BFloat16>(static_cast<float>(value)); break;
    case DType::kHalf: static_cast<Half*>(v.values)[c] = narrowed<Half>(static_cast<float>(value)); break;
  }
}

// ---- slots ----------------------------------------------------------------------------------------------------------

// The places [lo, hi) of the `width` elements from element `at` on; index is the slot's number in the tensor, by which its bits
// lie. A slot that is not there has no places and index -1.
struct Slot {
  int64_t at, index;
  int lo, hi;

  BNFAST_DEVICE bool is_there() const { return index >= 0; }
  BNFAST_DEVICE bool has(int i) const { return i >= lo && i < hi; }
  BNFAST_DEVICE uint32_t places() const { return (1u << hi) - (1u << lo); }   // a bit for each
};

BNFAST_DEVICE Slot no_slot() { return {0, -1, 0, 0}; }

// Slot k of a line.
template <class T, bool kColumns>
BNFAST_DEVICE Slot slot_of(const View& v, int64_t line, int64_t k) {
  constexpr int w = kWidth<T>;
  const int64_t begin = line * v.length, first = k * w;
  const int shift = kColumns ? 0 : static_cast<int>(begin & 7);   // of planes: slots begin where memory is aligned
  const int64_t lo = shift - first, hi = shift + v.length - first;
  return {begin - shift + first, line * v.slots + k, lo < 0 ? 0 : lo > w ? w : static_cast<int>(lo),
          hi < 0 ? 0 : hi > w ? w : static_cast<int>(hi)};
}

// The elements of a slot as they lie in memory.
template <class T>
struct Packed {
  uint4 words;

  BNFAST_DEVICE acc_t<T> operator[](int i) const {
    const uint32_t word[4] = {words.x, words.y, words.z, words.w};
    if constexpr (sizeof(T) == 2) return widened(T{static_cast<uint16_t>(word[i / 2] >> (i % 2 * 16))});
    else if constexpr (sizeof(T) == 4) return __uint_as_float(word[i]);
    else return __hiloint2double(static_cast<int>(word[2 * i + 1]), static_cast<int>(word[2 * i]));
  }
};

template <class T>
BNFAST_DEVICE Packed<T> packed(const acc_t<T> (&x)[kWidth<T>]) {
  uint32_t word[4];
  if constexpr (sizeof(T) == 2) {
    for (int i = 0; i < 4; ++i) {
      word[i] = narrowed<T>(x[2 * i]).bits | uint32_t{narrowed<T>(x[2 * i + 1]).bits} << 16;
    }
  } else if constexpr (sizeof(T) == 4) {
    for (int i = 0; i < 4; ++i) word[i] = __float_as_uint(x[i]);
  } else {
    for (int i = 0; i < 2; ++i) {
      word[2 * i] = static_cast<uint32_t>(__double2loint(x[i]));
      word[2 * i + 1] = static_cast<uint32_t>(__double2hiint(x[i]));
    }
  }
  return {{word[0], word[1], word[2], word[3]}};
}

// Memory is read again soon (the reductions), or not (kLast: the elementwise phases).
enum class Reuse { kSoon, kLast };

// Places outside of the slot are 0.
template <Reuse kReuse, class T>
BNFAST_DEVICE Packed<T> load(const T* from, const Slot& s, bool wide) {
  constexpr int w = kWidth<T>;
  Packed<T> p = {{0, 0, 0, 0}};
  if (wide && s.lo == 0 && s.hi == w) {
    const uint4* words = reinterpret_cast<const uint4*>(from + s.at);
    if constexpr (kReuse == Reuse::kSoon) p.words = __ldg(words);
    else p.words = __ldcs(words);
  } else if (s.lo < s.hi) {
    acc_t<T> x[w];
    for (int i = 0; i < w; ++i) x[i] = s.has(i) ? widened(from[s.at + i]) : acc_t<T>(0);
    p = packed<T>(x);
  }
  return p;
}

template <class T>
BNFAST_DEVICE void store(T* to, const Slot& s, bool wide, const acc_t<T> (&x)[kWidth<T>]) {
  constexpr int w = kWidth<T>;
  if (wide && s.lo == 0 && s.hi == w) {
    __stcs(reinterpret_cast<uint4*>(to + s.at), packed<T>(x).words);
  } else {
    for (int i = 0; i < w; ++i) {
      if (s.has(i)) to[s.at + i] = narrowed<T>(x[i]);
    }
  }
}

// ---- bits -----------------------------------------------------------------------------------------------------------

// Stores the lowest `width` bits of each lane's word; slots that share a byte lie in neighbouring lanes. All lanes of the warp
// call it.
template <class T>
BNFAST_DEVICE void store_bits(uint8_t* bits, const Slot& s, uint32_t word) {
  constexpr int w = kWidth<T>;
  for (int lanes = 1; lanes * w < 8; lanes *= 2) word |= __shfl_down_sync(kAllLanes, word, lanes) << (lanes * w);
  if (s.is_there() && s.index * w % 8 == 0) bits[s.index * w / 8] = static_cast<uint8_t>(word);
}

template <class T>
BNFAST_DEVICE uint32_t load_bits(const uint8_t* bits, const Slot& s) {
  constexpr int w = kWidth<T>;
  return s.is_there() ? uint32_t{bits[s.index * w / 8]} >> (s.index * w % 8) : 0;
}

// ---- which slots a block takes, and the values of their channels --------------------------------------------------------

// The parameters of a slot's channels: one for each place in columns, one for all of them in planes.
template <class T, bool kColumns>
struct Channel {
  using A = acc_t<T>;
  static constexpr int kValues = kColumns ? kWidth<T> : 1;
  A mean[kValues], scale[kValues], beta[kValues];

  BNFAST_DEVICE static constexpr int place(int i) { return kColumns ? i : 0; }
  // The one expression of the pre-activation: forward and backward must agree on it bit for bit.
  BNFAST_DEVICE A pre_activation(A z, int i) const { return fma(z - mean[place(i)], scale[place(i)], beta[place(i)]); }
};

// Arrays of `kStride` values per channel in shared memory, filled by all threads of the block; the caller synchronises.
template <class A>
BNFAST_DEVICE void stage_affine(const Affine& a, int c, A* to, int stride) {
  const A rstd = static_cast<const A*>(a.rstd)[c];
  to[0] = static_cast<const A*>(a.mean)[c];
  to[stride] = value_of<A>(a.gamma, c, A(1)) * rstd;
  to[2 * stride] = value_of<A>(a.beta, c, A(0));
}

template <class T, bool kColumns>
BNFAST_DEVICE Channel<T, kColumns> channel_at(const acc_t<T>* staged, int first, int stride) {
  Channel<T, kColumns> channel;
  for (int i = 0; i < channel.kValues; ++i) {
    channel.mean[i] = staged[first + i];
    channel.scale[i] = staged[stride + first + i];
    channel.beta[i] = staged[2 * stride + first + i];
  }
  return channel;
}

}  // namespace bnfast::cuda
