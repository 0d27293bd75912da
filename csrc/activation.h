// The activations, defined once for CPU vectors and CUDA scalars.
//
// V is a value type (a Block of lanes on the CPU, float on CUDA) with arithmetic, comparisons and
// select(mask, a, b) = mask ? a : b and sigmoid(x). Each activation gives
//   value(x)          the activation of the pre-activation x
//   gradient(x, dy)   dy * act'(x)
// and, where it is piecewise linear (kPiecewise), the same gradient in two steps, since one bit holds its slope:
//   passes(x)         the mask of "the slope is 1"
//   masked(pass, dy)  dy * act'
// A NaN goes through value() and its gradient passes, as in PyTorch; value(-0) is -0.
//
// Included without BNFAST_NAMESPACE this file gives the names alone; with it, the functors too, inside the namespace of the
// kernels that include it, so that they are compiled with those kernels' flags.
#ifndef BNFAST_ACT
#define BNFAST_ACT

namespace bnfast {

enum class Act : int { kIdentity, kRelu, kRelu6, kLeakyRelu, kSilu, kHardswish };

}  // namespace bnfast
#endif  // BNFAST_ACT

#if defined(BNFAST_NAMESPACE) && !defined(BNFAST_ACTIVATIONS)
#define BNFAST_ACTIVATIONS

#ifndef BNFAST_HD
#define BNFAST_HD __attribute__((always_inline)) inline
#endif

namespace bnfast::BNFAST_NAMESPACE {

struct Identity {
  static constexpr bool kPiecewise = true;
  template <class V> BNFAST_HD V value(V x) const { return x; }
  template <class V> BNFAST_HD auto passes(V x) const { return x == x; }
  template <class M, class V> BNFAST_HD V masked(M, V dy) const { return dy; }
};

struct Relu {
  static constexpr bool kPiecewise = true;
  template <class V> BNFAST_HD V value(V x) const { return select(x < V(0), V(0), x); }
  template <class V> BNFAST_HD auto passes(V x) const { return !(x <= V(0)); }
  template <class M, class V> BNFAST_HD V masked(M pass, V dy) const { return select(pass, dy, V(0)); }
};

struct Relu6 {
  static constexpr bool kPiecewise = true;
  template <class V> BNFAST_HD V value(V x) const {
    return select(x < V(0), V(0), select(x > V(6), V(6), x));
  }
  template <class V> BNFAST_HD auto passes(V x) const { return !((x <= V(0)) | (x >= V(6))); }
  template <class M, class V> BNFAST_HD V masked(M pass, V dy) const { return select(pass, dy, V(0)); }
};

// PyTorch's own gradient of leaky_relu asks x > 0, so here a NaN takes the slope.
struct LeakyRelu {
  static constexpr bool kPiecewise = true;
  double slope;
  template <class V> BNFAST_HD V value(V x) const { return select(x > V(0), x, x * V(slope)); }
  template <class V> BNFAST_HD auto passes(V x) const { return x > V(0); }
  template <class M, class V> BNFAST_HD V masked(M pass, V dy) const {
    return select(pass, dy, dy * V(slope));
  }
};

struct Silu {
  static constexpr bool kPiecewise = false;
  template <class V> BNFAST_HD V value(V x) const { return x * sigmoid(x); }
  template <class V> BNFAST_HD V gradient(V x, V dy) const {
    const V s = sigmoid(x);
    return dy * (s * (V(1) + x * (V(1) - s)));
  }
};

struct Hardswish {
  static constexpr bool kPiecewise = false;
  template <class V> BNFAST_HD V value(V x) const {
    const V t = x + V(3);
    return x * select(t < V(0), V(0), select(t > V(6), V(6), t)) / V(6);
  }
  template <class V> BNFAST_HD V gradient(V x, V dy) const {
    const V middle = dy * (x / V(3) + V(0.5));
    return select(x <= V(-3), V(0), select(x < V(3), middle, dy));
  }
};

// Calls f with the activation's functor.
template <class F>
BNFAST_HD void with_activation(Act act, double slope, F f) {
  switch (act) {
    case Act::kIdentity: return f(Identity{});
    case Act::kRelu: return f(Relu{});
    case Act::kRelu6: return f(Relu6{});
    case Act::kLeakyRelu: return f(LeakyRelu{slope});
    case Act::kSilu: return f(Silu{});
    case Act::kHardswish: return f(Hardswish{});
  }
}

}  // namespace bnfast::BNFAST_NAMESPACE
#endif  // BNFAST_ACTIVATIONS
