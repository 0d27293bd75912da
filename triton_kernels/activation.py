"""What forward and backward kernels share: the pre-activation, the activations, and bits. One definition each, so that the mask
of the backward pass is the forward's bit for bit.

Values are in the accumulator's dtype. ACT and SLOPE (leaky_relu's) are compile-time constants.
"""

import triton
import triton.language as tl


@triton.jit
def pre_activation(z, mean, scale, beta):
    """Equation (5) of bnfast/reference.py without the residual; the fma is spelled out, so that no compiler chooses."""
    return tl.fma(z - mean, scale, beta)


@triton.jit
def sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def act_value(x, ACT: tl.constexpr, SLOPE: tl.constexpr):
    """Equation (6). A NaN goes through, relu(-0.0) is -0.0, as in PyTorch."""
    if ACT == "relu":
        x = tl.where(x < 0, 0.0, x)
    elif ACT == "relu6":
        x = tl.where(x < 0, 0.0, tl.where(x > 6, 6.0, x))
    elif ACT == "leaky_relu":
        x = tl.where(x > 0, x, x * SLOPE)
    elif ACT == "silu":
        x = x / (1 + tl.exp(-x))
    elif ACT == "hardswish":
        t = x + 3
        x = x * tl.where(t < 0, 0.0, tl.where(t > 6, 6.0, t)) / 6
    return x


@triton.jit
def act_passes(x, DTYPE: tl.constexpr, ACT: tl.constexpr):
    """Where a piecewise linear activation has slope 1 at x rounded to DTYPE, that of y. A NaN passes, but in leaky_relu.

    x itself is compared, with what rounds to 0 and to 6: halfway numbers, which go to the even neighbour. A rounding that is
    only there to be compared is one that compilers leave out.
    """
    ZERO: tl.constexpr = (
        2.0**-134 if DTYPE == tl.bfloat16 else 2.0**-25 if DTYPE == tl.float16 else 0.0
    )
    SIX: tl.constexpr = (
        5.984375 if DTYPE == tl.bfloat16 else 5.998046875 if DTYPE == tl.float16 else 6.0
    )
    # Of the dtype of x: a number as small as these would make the comparison one of float64.
    zero = tl.full([], ZERO, x.dtype)
    if ACT == "relu6":
        passes = ~((x <= zero) | (x >= SIX))
    elif ACT == "leaky_relu":
        passes = x > zero
    else:
        passes = ~(x <= zero)
    return passes


@triton.jit
def masked(passes, dy, ACT: tl.constexpr, SLOPE: tl.constexpr):
    """dy times the slope of a piecewise linear activation."""
    if ACT == "leaky_relu":
        db = tl.where(passes, dy, dy * SLOPE)
    else:
        db = tl.where(passes, dy, 0.0)
    return db


@triton.jit
def act_gradient(x, dy, DTYPE: tl.constexpr, ACT: tl.constexpr, SLOPE: tl.constexpr):
    """Equation (7) from the pre-activation x; DTYPE is y's."""
    if ACT == "identity":
        db = dy
    elif ACT == "silu":
        s = sigmoid(x)
        db = dy * (s * (1 + x * (1 - s)))
    elif ACT == "hardswish":
        db = tl.where(x <= -3, 0.0, tl.where(x < 3, dy * (x / 3 + 0.5), dy))
    else:
        db = masked(act_passes(x, DTYPE, ACT), dy, ACT, SLOPE)
    return db


@triton.jit
def pack_bits(passes, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS, COLUMNS] of bool to [ROWS, COLUMNS / 8] of uint8, the first column in the lowest bit."""
    shifts = tl.arange(0, 8)[None, None, :]
    eight = tl.reshape(passes.to(tl.int32), [ROWS, COLUMNS // 8, 8])
    return tl.sum(eight << shifts, 2).to(tl.uint8)


@triton.jit
def unpack_bits(packed, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The inverse of pack_bits."""
    shifts = tl.arange(0, 8)[None, None, :]
    eight = (packed.to(tl.int32)[:, :, None] >> shifts) & 1
    return tl.reshape(eight, [ROWS, COLUMNS]) != 0
