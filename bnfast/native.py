"""The compiled backend: the phases as registered operators, with fake kernels so that torch.compile sees through them.

The four BatchNorm phases, two at a time or alone, and `se_bwd_reduce` are C++ (csrc/). `conv_fwd_reduce` and `conv_dgrad` hand the convolution itself to PyTorch, with
the frozen weight in the form that is fastest, kept by `weights`. Signatures and meanings: `reference`.
"""

import functools
import os

import torch
from torch import Tensor

from . import dot, grouped, onednn, pointwise, reference, tuning, weights, winograd
from .reference import accumulator

try:
    from . import _C  # registers the schemas and kernels of torch.ops.bnfast
except ImportError as error:
    _C = None
    unavailable = f"the extension bnfast._C is not built or does not load: {error}"
else:
    unavailable = None
    _capability = _C.cpu_capability()

# The operators that C++ implements for tensors on the CPU and on CUDA.
BN_PHASES = (
    "bn_fwd_reduce",
    "bn_fwd_apply",
    "bn_fwd_reduce_apply",
    "bn_bwd_reduce",
    "bn_bwd_apply",
    "bn_bwd_apply_",
    "bn_bwd_reduce_apply",
    "bn_bwd_reduce_apply_",
)

# BNFAST_CHAIN=0: units one after the other, no phase of one in another's convolution. Read once.
_chains = os.environ.get("BNFAST_CHAIN", "") != "0"

_CONV = "Tensor weight, Tensor? bias, int[] stride, int[] padding, int[] dilation, int groups"
_STATS = (
    "Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, "
    "float? momentum, float eps"
)


def _pooled(kernel):
    """The kernel, with its large tensors from the pool of activation buffers (csrc/cpu/pool.h)."""

    @functools.wraps(kernel)
    def run(*args):
        if torch.compiler.is_compiling():
            return kernel(*args)
        _C.enter_pool()
        try:
            return kernel(*args)
        finally:
            _C.leave_pool()

    return run


@_pooled
def _conv_forward(x, weight, bias, stride, padding, dilation, groups):
    if _runs_as_winograd(x, weight, stride, padding, dilation, groups):
        turned = _winograd_weight(weight, stride, padding, x)
        return torch.ops.bnfast.winograd_conv.default(
            x, turned, bias, weight.shape[0], padding, stride[0]
        )
    if _runs_as_blocks(x, weight, stride, padding, dilation, groups):
        turned = _block_weight(weight, padding)
        return torch.ops.bnfast.blocked_conv.default(
            x, turned, bias, weight.shape[0], weight.shape[2:], padding
        )
    if _runs_as_pointwise(x, weight, stride, padding, groups):
        packed = _pointwise_weight(weight)
        return torch.ops.bnfast.pointwise_conv.default(x, packed, bias, weight.shape[0])
    if _runs_as_dot(x, weight, stride, padding, dilation, groups):
        packed = _dot_weight(weight)
        return torch.ops.bnfast.dot_conv.default(
            x, packed, bias, weight.shape[0], stride, padding, dilation
        )
    if _runs_as_grouped(x, weight, stride, padding, dilation, groups):
        taps = _taps(weight, x.dtype)
        return torch.ops.bnfast.grouped_conv.default(x, taps, bias, stride, padding, dilation)
    dtype = x.dtype
    return _direct_conv(
        x, weight, ("cast", dtype), lambda w: w.to(dtype), bias, stride, padding, dilation, groups
    )


def _direct_conv(x, weight, form, make, bias, stride, padding, dilation, groups):
    """PyTorch's convolution of x with make(weight), which has the dtype of x; form names what make does."""
    geometry = (stride, padding, dilation, groups)
    if _memory_format(x) == torch.channels_last and onednn.serves(x):
        packed = weights.transformed(
            weight, ("packed", form), lambda w: onednn.pack(make(w), x, *geometry)
        )
        bias = None if bias is None else bias.to(x.dtype)
        return onednn.convolve(x, packed, bias, *geometry)
    if form != ("cast", weight.dtype):
        weight = weights.transformed(weight, form, make)
    return reference.conv_forward(x, weight, bias, *geometry)


def _runs_as_winograd(x, weight, stride, padding, dilation, groups):
    """A 3x3 convolution whose result is channels_last, where Winograd's form pays."""
    if weight.dim() != 4 or torch.channels_last not in (_memory_format(x), _memory_format(weight)):
        return False
    geometry = (stride, padding, dilation, groups)
    pays = winograd.serves(x, weight.shape[2:], weight.shape[0], *geometry, _capability)
    if not tuning.is_active or winograd.is_forced():
        return pays
    if not winograd.can_serve(x, weight.shape[2:], *geometry):
        return False
    output = winograd.output_size(x.shape[2:], stride, padding)
    return _tuned("winograd", pays, x, weight, output, geometry)


def _runs_as_blocks(x, weight, stride, padding, dilation, groups):
    """A strided convolution of a few channels, as networks begin with, whose result is channels_last."""
    return (
        weight.dim() == 4
        and torch.channels_last in (_memory_format(x), _memory_format(weight))
        and winograd.serves_blocks(
            x, weight.shape[2:], weight.shape[0], stride, padding, dilation, groups, _capability
        )
    )


def _runs_as_pointwise(x, weight, stride, padding, groups):
    """A 1x1 convolution of stride 1 of x in channels_last, where our own product pays."""
    if weight.dim() != 4 or _memory_format(x) != torch.channels_last:
        return False
    pays = pointwise.serves(x, weight.shape[2:], stride, padding, groups, _capability)
    if not tuning.is_active or pointwise.is_forced():
        return pays
    if not pointwise.can_serve(x, weight.shape[2:], stride, padding, groups):
        return False
    return _tuned("product", pays, x, weight, x.shape[2:], (stride, padding, (1, 1), groups))


def _runs_as_dot(x, weight, stride, padding, dilation, groups):
    """A convolution of bfloat16 in channels_last, where the processor multiplies that; asked behind Winograd's form."""
    if weight.dim() != 4 or _memory_format(x) != torch.channels_last:
        return False
    pays = dot.serves(x, weight, groups, _capability)
    if not tuning.is_active or dot.is_forced() or not dot.can_serve(x, weight, groups, _capability):
        return pays
    output = reference.conv_output_size(x.shape[2:], weight, stride, padding, dilation)
    return _tuned("dot", pays, x, weight, output, (stride, padding, dilation, groups))


def _dgrad_runs_as_dot(dz, weight, stride, padding, dilation, groups):
    """As _runs_as_dot, of the data gradient of dz in channels_last."""
    if weight.dim() != 4:
        return False
    pays = dot.serves(dz, weight, groups, _capability)
    if (
        not tuning.is_active
        or dot.is_forced()
        or not dot.can_serve(dz, weight, groups, _capability)
    ):
        return pays
    return _tuned("dot", pays, dz, weight, dz.shape[2:], (stride, padding, dilation, groups))


def _runs_as_grouped(x, weight, stride, padding, dilation, groups):
    """A depthwise convolution, or one of narrow groups, of x in channels_last."""
    return (
        groups > 1
        and grouped.serves(x, weight, stride, padding, dilation, groups, _capability)
        and _memory_format(x) == torch.channels_last
    )


def _tuned(way, pays, x, weight, output, geometry):
    """Whether a convolution goes this way or PyTorch's, by the table of `tuning`; `pays` is the fixed rule's word. x: what it reads, or
    dz, whose direction is not asked for."""
    shape = tuning.Shape(
        "cpu", str(x.dtype)[6:], tuple(weight.shape), tuple(geometry[0]), tuple(output)
    )
    ways = [way, "direct"] if pays else ["direct", way]
    if way == "winograd" and dot.mode != "0" and dot.can_serve(x, weight, geometry[3], _capability):
        # Where it is not Winograd's form, the fixed rule's word is that of `dot`.
        ways.insert(0 if not pays and dot.serves(x, weight, geometry[3], _capability) else 1, "dot")
    ways = tuple(ways)
    found = tuning.choice(shape, ways, x, weight, geometry)
    return pays if found is None else found == way


def _winograd_weight(weight, stride, padding, x):
    """For an input like x, to whose dtype the weight is rounded."""
    output = winograd.output_size(x.shape[2:], stride, padding)
    tile = winograd.tile(x.dtype, weight.shape[1], weight.shape[0], output, stride[0])
    return weights.transformed(
        weight,
        ("winograd", stride[0], tile, x.dtype),
        lambda w: winograd.transformed_weight(w.to(x.dtype), stride[0], tile),
    )


def _block_weight(weight, padding):
    return weights.transformed(
        weight,
        ("winograd blocks", tuple(padding)),
        lambda w: winograd.transformed_weight(winograd.block_weight(w.float(), padding), 2, 5),
    )


def _rotated_winograd_weight(weight, stride, input_size, dz):
    """Of the data gradient: a convolution with the kernel rotated and its channels exchanged."""
    tile = winograd.tile(dz.dtype, weight.shape[0], weight.shape[1], input_size, stride[0])

    def rotated(w):
        turned = w.to(dz.dtype).flip(2, 3).transpose(0, 1)
        return winograd.transformed_weight(turned, stride[0], tile)

    return weights.transformed(weight, ("winograd rotated", stride[0], tile, dz.dtype), rotated)


def _pointwise_weight(weight):
    return weights.transformed(weight, "pointwise", pointwise.packed_weight)


def _transposed_pointwise_weight(weight):
    return weights.transformed(
        weight, "pointwise transposed", lambda w: pointwise.packed_weight(w.transpose(0, 1))
    )


def _dot_weight(weight):
    return weights.transformed(weight, "dot", dot.packed_weight)


def _transposed_dot_weight(weight):
    return weights.transformed(
        weight, "dot transposed", lambda w: dot.packed_weight(w.transpose(0, 1))
    )


def _taps(weight, dtype):
    """Of a grouped convolution of an input of this dtype."""
    return weights.transformed(weight, ("grouped", dtype), lambda w: grouped.taps(w, dtype))


def _taps_of_dgrad(weight, dtype):
    if weight.shape[1] == 1:
        return _taps(weight, dtype)
    return weights.transformed(
        weight, ("grouped transposed", dtype), lambda w: grouped.taps_of_dgrad(w, dtype)
    )


def _conv_fwd_reduce(x, weight, bias, stride, padding, dilation, groups, *stats):
    z = _conv_forward(x, weight, bias, stride, padding, dilation, groups)
    return z, *bn_fwd_reduce(z, *stats)


def conv_fwd_reduce_apply(x, weight, bias, stride, padding, dilation, groups, *rest):
    """The convolution, and the phases behind it: a convolution of our own is reduced piece by piece while it is in the cache, a
    plane is normalised there."""
    stats, affine = rest[:5], rest[5:]
    conv = (x, weight, bias, stride, padding, dilation, groups)
    if _joins(x, weight, stride, padding, dilation, groups):
        z, mean, rstd = _conv_fwd_reduce_joined(None, "identity", 0.0, *conv, *stats)
        return z, mean, rstd, *bn_fwd_apply(z, mean, rstd, *affine)
    z = conv_forward(*conv)
    return z, *bn_fwd_reduce_apply(z, *rest)


def conv_fwd_apply(x, weight, bias, stride, padding, dilation, groups, *norm):
    """See reference.conv_fwd_apply: a convolution of our own is normalised piece by piece while it is in the cache."""
    conv = (weight, bias, stride, padding, dilation, groups)
    if not fuses_chain(x, weight, stride, padding, dilation, groups):
        return bn_fwd_apply(conv_forward(x, *conv), *norm, False)[0]
    if groups > 1:
        taps = _taps(weight, x.dtype)
        return torch.ops.bnfast.grouped_fwd_apply.default(
            x, *norm, taps, bias, stride, padding, dilation
        )
    if _runs_as_winograd(x, weight, stride, padding, dilation, groups):
        turned = _winograd_weight(weight, stride, padding, x)
        return torch.ops.bnfast.winograd_fwd_apply.default(
            x, *norm, turned, bias, weight.shape[0], padding, stride[0]
        )
    if x.dtype == torch.bfloat16:
        packed = _dot_weight(weight)
        return torch.ops.bnfast.dot_fwd_apply.default(
            x, *norm, packed, bias, weight.shape[0], stride, padding, dilation
        )
    packed = _pointwise_weight(weight)
    return torch.ops.bnfast.pointwise_fwd_apply.default(x, *norm, packed, bias, weight.shape[0])


def ways() -> tuple | None:
    """All that decides which operators the phases come to beside their arguments' shapes, dtypes and layouts; None where it does not
    last. On the CPU they are operators of PyTorch's dispatcher alone, so that `recording` can run them again."""
    tuned = tuning.in_force()
    if tuned is None:
        return None
    modes = (winograd.mode, winograd.tile_mode, pointwise.mode, dot.mode, grouped.mode, _chains)
    return modes, winograd.conv_precision(), torch._C._get_mkldnn_enabled(), tuned


def joins_units():
    """See reference.joins_units."""
    return _chains


def fuses_chain(x, weight, stride, padding, dilation, groups):
    """See reference.fuses_chain: convolutions in channels_last that are ours in both directions. Captured graphs run unit by
    unit."""
    return _chains and _joins(x, weight, stride, padding, dilation, groups)


def _joins(x, weight, stride, padding, dilation, groups):
    # One channel is NCHW as well as channels_last, and what comes of it might be either.
    return (
        x.is_cpu
        and _is_eager(x)
        and weight.shape[0] > 1
        and weight.shape[1] * groups > 1
        and _memory_format(x) == torch.channels_last
        and (
            _runs_as_pointwise(x, weight, stride, padding, groups)
            or _runs_as_winograd(x, weight, stride, padding, dilation, groups)
            or _runs_as_dot(x, weight, stride, padding, dilation, groups)
            or (
                x.dtype in (torch.float32, torch.bfloat16)
                and _runs_as_grouped(x, weight, stride, padding, dilation, groups)
            )
        )
    )


_IDENTITY = (None, None, None, None, "identity", 0.0)


def bn_fwd_apply_conv_fwd_reduce(
    z, norm, act, slope, weight, bias, stride, padding, dilation, groups, *stats
):
    """See reference.bn_fwd_apply_conv_fwd_reduce: the input is made row by row, the output reduced piece by piece."""
    conv = (weight, bias, stride, padding, dilation, groups)
    if _joins(z, weight, stride, padding, dilation, groups):
        return _conv_fwd_reduce_joined(norm, act, slope, z, *conv, *stats)
    if (
        norm is None
        and _is_eager(z)
        and _runs_as_blocks(z, weight, stride, padding, dilation, groups)
    ):
        turned = _block_weight(weight, padding)
        return torch.ops.bnfast.blocked_fwd_reduce.default(
            z, turned, bias, weight.shape[0], weight.shape[2:], padding, *stats
        )
    x = z if norm is None else bn_fwd_apply(z, *norm, None, act, slope, False)[0]
    z, mean, _, rstd = conv_fwd_reduce(x, *conv, *stats)
    return z, mean, rstd


def joins_residual(x, weight, stride, padding, dilation, groups):
    """See reference.joins_residual: 3x3 convolutions in Winograd's form."""
    return _runs_as_winograd(x, weight, stride, padding, dilation, groups)


def bn_fwd_apply_residual_conv_fwd_reduce(
    z, norm, residual, act, slope, want_bits, weight, bias, stride, padding, dilation, groups,
    *stats,
):  # fmt: skip
    """See reference.bn_fwd_apply_residual_conv_fwd_reduce, for what `joins_residual` says yes to."""
    turned = _winograd_weight(weight, stride, padding, z)
    rest = (weight.shape[0], padding, stride[0], *stats)
    return torch.ops.bnfast.winograd_residual_fwd_reduce.default(
        z, *norm, residual, act, slope, want_bits, turned, bias, *rest
    )


def joins_squeeze(x, weight, stride, padding, groups, groups_below):
    """See reference.joins_squeeze: a product behind a grouped convolution."""
    return groups_below > 1 and _runs_as_pointwise(x, weight, stride, padding, groups)


def se_fwd_reduce(z, norm, act, slope):
    """See reference.se_fwd_reduce."""
    return torch.ops.bnfast.se_fwd_reduce.default(z, *norm, act, slope)


def bn_fwd_apply_se_conv_fwd_reduce(
    z, norm, act, slope, gate, weight, bias, stride, padding, dilation, groups, *stats
):
    """See reference.bn_fwd_apply_se_conv_fwd_reduce, for what `joins_squeeze` says yes to."""
    packed = _pointwise_weight(weight)
    return torch.ops.bnfast.pointwise_fwd_reduce.default(
        z, *norm, act, slope, packed, bias, weight.shape[0], *stats, gate
    )


def se_bwd_sums(dy, z, norm, act, slope):
    """See reference.se_bwd_sums."""
    return torch.ops.bnfast.se_bwd_sums.default(dy, z, *norm, act, slope)


se_gate = reference.se_gate
se_bwd_gate = reference.se_bwd_gate
se_bwd_norm = reference.se_bwd_norm


def _conv_fwd_reduce_joined(
    norm, act, slope, x, weight, bias, stride, padding, dilation, groups, *stats
):
    norm = _IDENTITY if norm is None else (*norm, act, slope)
    count = weight.shape[0]
    if groups > 1:
        taps = _taps(weight, x.dtype)
        return torch.ops.bnfast.grouped_fwd_reduce.default(
            x, *norm, taps, bias, stride, padding, dilation, *stats
        )
    if _runs_as_winograd(x, weight, stride, padding, dilation, groups):
        turned = _winograd_weight(weight, stride, padding, x)
        return torch.ops.bnfast.winograd_fwd_reduce.default(
            x, *norm, turned, bias, count, padding, stride[0], *stats
        )
    if x.dtype == torch.bfloat16:
        packed = _dot_weight(weight)
        return torch.ops.bnfast.dot_fwd_reduce.default(
            x, *norm, packed, bias, count, stride, padding, dilation, *stats
        )
    packed = _pointwise_weight(weight)
    return torch.ops.bnfast.pointwise_fwd_reduce.default(x, *norm, packed, bias, count, *stats)


def bn_bwd_apply_conv_dgrad_reduce(
    dy, above, above_act, above_slope, source, source_act, source_slope, weight, input_size, stride,
    padding, dilation, groups, add, below, below_act, below_slope, beside, gate=None, shift=None,
):  # fmt: skip
    """See reference.bn_bwd_apply_conv_dgrad_reduce, for the convolutions of `fuses_chain`: dz is made row by row, dx taken up piece
    by piece."""
    state = (None,) * 7 if above is None else tuple(above)
    under = (None,) * 6 if below is None else tuple(below)
    by = (None,) * 3 if beside is None else tuple(beside)
    rest = (add, *under, below_act, below_slope, *by)
    channels = weight.shape[1]
    if groups > 1:
        taps = _taps_of_dgrad(weight, dy.dtype)
        dx, *sums = torch.ops.bnfast.grouped_dgrad_reduce.default(
            dy,
            *state,
            above_act,
            above_slope,
            taps,
            input_size,
            stride,
            padding,
            dilation,
            *rest,
            gate,
            shift,
        )
    elif _dgrad_runs_as_dot(
        dy, weight, stride, padding, dilation, groups
    ) and not _dgrad_runs_as_winograd(dy, weight, input_size, stride, padding, dilation, groups):
        packed = _transposed_dot_weight(weight)
        dx, *sums = torch.ops.bnfast.dot_dgrad_reduce.default(
            dy,
            *state,
            above_act,
            above_slope,
            packed,
            channels,
            input_size,
            stride,
            padding,
            dilation,
            *rest,
        )
    elif weight.shape[2:] == (1, 1):
        packed = _transposed_pointwise_weight(weight)
        dx, *sums = torch.ops.bnfast.pointwise_dgrad_reduce.default(
            dy, *state, above_act, above_slope, packed, channels, *rest
        )
    else:
        turned = _rotated_winograd_weight(weight, stride, input_size, dy)
        dx, *sums = torch.ops.bnfast.winograd_dgrad_reduce.default(
            dy,
            *state,
            above_act,
            above_slope,
            turned,
            channels,
            input_size,
            padding,
            stride[0],
            *rest,
        )
    return (
        dx,
        None if below is None else tuple(sums[:2]),
        None if beside is None else tuple(sums[2:]),
    )


def bn_fwd_apply_both(z, norm, residual_z, residual_norm, act, slope, want_bits):
    """See reference.bn_fwd_apply_both."""
    residual, _ = bn_fwd_apply(residual_z, *residual_norm, None, "identity", 0.0, False)
    return bn_fwd_apply(z, *norm, residual, act, slope, want_bits)


@_pooled
def _conv_dgrad(dz, weight, input_size, stride, padding, dilation, groups):
    if weight.dim() == 2:
        return dz @ _as_dtype(weight, dz.dtype)
    layout = _memory_format(dz)
    kernel = weight.shape[2:]
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if layout == torch.channels_last and _dgrad_runs_as_winograd(
        dz, weight, input_size, stride, padding, dilation, groups
    ):
        turned = _rotated_winograd_weight(weight, stride, input_size, dz)
        dx = torch.ops.bnfast.winograd_dgrad.default(
            dz, turned, weight.shape[1], input_size, padding, stride[0]
        )
    elif layout == torch.channels_last and _dgrad_runs_as_dot(
        dz, weight, stride, padding, dilation, groups
    ):
        packed = _transposed_dot_weight(weight)
        dx = torch.ops.bnfast.dot_dgrad.default(
            dz, packed, weight.shape[1], input_size, stride, padding, dilation
        )
    elif (
        layout == torch.channels_last
        and groups > 1
        and grouped.serves_dgrad(dz, weight, groups, _capability)
    ):
        taps = _taps_of_dgrad(weight, dz.dtype)
        dx = torch.ops.bnfast.grouped_dgrad.default(dz, taps, input_size, stride, padding, dilation)
    elif all(s == 1 for s in stride) and all(p <= r for p, r in zip(padding, reach, strict=True)):
        dx = _dgrad_as_conv(dz, weight, groups, layout, reach, padding, dilation)
    elif all(k == 1 for k in kernel) and not any(padding):
        dx = _dgrad_pointwise(dz, weight, input_size, stride, groups, layout)
    else:
        dx = reference.conv_dgrad(
            dz, _as_dtype(weight, dz.dtype), input_size, stride, padding, dilation, groups
        )
    return dx.contiguous(memory_format=layout)


def _dgrad_as_conv(dz, weight, groups, layout, reach, padding, dilation):
    """Stride 1: the gradient is a convolution with the kernel rotated and its channels exchanged, once."""

    def rotated(w):
        out_per_group, in_per_group = w.shape[0] // groups, w.shape[1]
        w = w.to(dz.dtype).flip(list(range(2, w.dim())))
        w = w.reshape(groups, out_per_group, in_per_group, *w.shape[2:]).transpose(1, 2)
        return w.reshape(groups * in_per_group, out_per_group, *w.shape[3:]).contiguous(
            memory_format=layout
        )

    margin = [r - p for r, p in zip(reach, padding, strict=True)]
    ones = [1] * len(reach)
    if _runs_as_pointwise(dz, weight, ones, margin, groups):
        packed = _transposed_pointwise_weight(weight)
        return torch.ops.bnfast.pointwise_conv.default(dz, packed, None, weight.shape[1])
    form = ("rotated", groups, dz.dtype, layout)
    return _direct_conv(dz, weight, form, rotated, None, ones, margin, dilation, groups)


def _dgrad_runs_as_winograd(dz, weight, input_size, stride, padding, dilation, groups):
    if weight.dim() != 4:
        return False
    geometry = (stride, padding, dilation, groups)
    pays = winograd.serves_dgrad(
        dz, weight.shape[2:], weight.shape[1], input_size, *geometry, _capability
    )
    if not tuning.is_active or winograd.is_forced():
        return pays
    if not winograd.can_serve_dgrad(dz, weight.shape[2:], *geometry):
        return False
    return _tuned("winograd", pays, dz, weight, dz.shape[2:], geometry)


def _dgrad_pointwise(dz, weight, input_size, stride, groups, layout):
    """A strided 1x1 kernel: gradient at the pixels that were read, 0 at the others."""
    ones, zeros = [1] * len(stride), [0] * len(stride)
    read = _dgrad_as_conv(dz, weight, groups, layout, zeros, zeros, ones)
    if layout == torch.channels_last:
        return torch.ops.bnfast.pointwise_spread.default(read, input_size, stride)
    dx = torch.zeros((*read.shape[:2], *input_size), dtype=dz.dtype, device=dz.device).contiguous(
        memory_format=layout
    )
    dx[(..., *(slice(None, None, s) for s in stride))] = read
    return dx


fuses_gram = reference.fuses_gram


def max_pool(y, kernel, stride, padding):
    """See reference.max_pool."""
    if _is_eager(y) and _memory_format(y) == torch.channels_last:
        return torch.ops.bnfast.max_pool.default(y, kernel, stride, padding)
    return reference.max_pool(y, kernel, stride, padding)


def joins_pool(x):
    """See reference.joins_pool: float32 and bfloat16 in channels_last."""
    return (
        _chains
        and x.dtype in (torch.float32, torch.bfloat16)
        and _is_eager(x)
        and _memory_format(x) == torch.channels_last
    )


def bn_fwd_apply_max_pool(z, norm, act, slope, *window):
    """See reference.bn_fwd_apply_max_pool: y is made and pooled a few rows at a time."""
    if joins_pool(z):
        return torch.ops.bnfast.bn_fwd_apply_max_pool.default(z, *norm, act, slope, *window)
    return max_pool(bn_fwd_apply(z, *norm, None, act, slope, False)[0], *window)


def max_pool_backward_bn_bwd_reduce(dp, places, z, norm, act, slope, *window):
    """See reference.max_pool_backward_bn_bwd_reduce: z is picked where the maxima lie, a few pixels at a time."""
    if joins_pool(z):
        return torch.ops.bnfast.max_pool_backward_bn_bwd_reduce.default(
            dp, places, z, *norm, act, slope, *window
        )
    dy = max_pool_backward(dp, places, z, *window)
    return bn_bwd_reduce(dy, z, *norm, None, None, act, slope)


def max_pool_values(y, kernel, stride, padding):
    """See reference.max_pool_values."""
    if _is_eager(y) and _memory_format(y) == torch.channels_last:
        return torch.ops.bnfast.max_pool.default(y, kernel, stride, padding)[0]
    return reference.max_pool_values(y, kernel, stride, padding)


def max_pool_backward(dp, places, y, kernel, stride, padding):
    """See reference.max_pool_backward."""
    if _is_eager(dp) and _memory_format(y) == torch.channels_last:
        return torch.ops.bnfast.max_pool_backward.default(
            dp, places, y.shape[2:], kernel, stride, padding
        )
    return reference.max_pool_backward(dp, places, y, kernel, stride, padding)


se_fwd = _pooled(reference.se_fwd)
se_bwd_apply = _pooled(reference.se_bwd_apply)


def _as_dtype(weight: Tensor, dtype: torch.dtype) -> Tensor:
    if weight.dtype == dtype:
        return weight
    return weights.transformed(weight, ("cast", dtype), lambda w: w.to(dtype))


def _memory_format(t: Tensor) -> torch.memory_format:
    """The layout that a convolution of t gives."""
    if not t.is_contiguous():
        dims = t.dim()
        if dims == 4 and t.is_contiguous(memory_format=torch.channels_last):
            return torch.channels_last
        if dims == 5 and t.is_contiguous(memory_format=torch.channels_last_3d):
            return torch.channels_last_3d
    return torch.contiguous_format


def _fake_dense(t: Tensor) -> Tensor:
    """What csrc/cpu/bn.cpp makes of a tensor before it computes: dense, in the layout that it has or suggests."""
    if t.is_contiguous():
        return t
    if t.dim() == 4:
        return t.contiguous(memory_format=torch._prims_common.suggest_memory_format(t))
    if t.dim() == 5 and t.is_contiguous(memory_format=torch.channels_last_3d):
        return t
    return t.contiguous()


def _fake_bn_fwd_reduce(z, *stats):
    vector = z.new_empty(z.shape[1], dtype=accumulator(z.dtype))
    return vector, torch.empty_like(vector), torch.empty_like(vector)


def _fake_bn_fwd_apply(z, mean, rstd, gamma, beta, residual, act, slope, want_bits):
    count = bit_bytes(z, z.device.type == "cuda") if want_bits else 0
    return torch.empty_like(_fake_dense(z)), z.new_empty(count, dtype=torch.uint8)


def bit_bytes(z: Tensor, on_cuda: bool) -> int:
    """Bytes of one bit per element. On the CPU in words of 16 bits, planes that are no rows (csrc/cpu/bn.h) beginning at a new
    word; on CUDA each line of the tensor in bytes of its own (csrc/cuda/bn.h)."""
    dense = _fake_dense(z)
    plane = 1
    for size in z.shape[2:]:
        plane = plane * size
    inner = plane if dense.is_contiguous() else 1
    if on_cuda:
        if inner == 1:
            return z.shape[0] * plane * ((z.shape[1] + 7) // 8)
        partial = 1 if plane % 8 != 0 else 0
        return z.shape[0] * z.shape[1] * ((plane + 7) // 8 + partial)
    if inner == 1 or (inner < 32 and inner * z.shape[1] <= 32768):
        return 2 * ((z.numel() + 15) // 16)
    return 2 * z.shape[0] * z.shape[1] * ((plane + 15) // 16)


def _fake_bn_fwd_reduce_apply(
    z, mean, var, tracked, momentum, eps, gamma, beta, residual, act, slope, want_bits
):
    mean, _, rstd = _fake_bn_fwd_reduce(z)
    rest = (gamma, beta, residual, act, slope, want_bits)
    return mean, rstd, *_fake_bn_fwd_apply(z, mean, rstd, *rest)


def _fake_bn_bwd_reduce(dy, z, mean, rstd, gamma, beta, residual, bits, act, slope):
    return torch.empty_like(mean), torch.empty_like(mean)


def _fake_bn_bwd_apply(
    dy, z, mean, rstd, gamma, beta, residual, bits, dgamma, dbeta, act, slope, want_dresidual
):
    dz = torch.empty_like(_fake_dense(z))
    return dz, torch.empty_like(dz) if want_dresidual else z.new_empty(0)


def _fake_bn_bwd_apply_(
    dy, z, mean, rstd, gamma, beta, residual, bits, dgamma, dbeta, act, slope, want_dresidual
):
    return torch.empty_like(_fake_dense(z)) if want_dresidual else z.new_empty(0)


def _fake_bn_bwd_reduce_apply(
    dy, z, mean, rstd, gamma, beta, residual, bits, act, slope, want_dresidual
):
    dgamma, dbeta, dresidual = _fake_bn_bwd_reduce_apply_(
        dy, z, mean, rstd, gamma, beta, residual, bits, act, slope, want_dresidual
    )
    return dgamma, dbeta, torch.empty_like(_fake_dense(z)), dresidual


def _fake_bn_bwd_reduce_apply_(
    dy, z, mean, rstd, gamma, beta, residual, bits, act, slope, want_dresidual
):
    dresidual = torch.empty_like(_fake_dense(z)) if want_dresidual else z.new_empty(0)
    return torch.empty_like(mean), torch.empty_like(mean), dresidual


def _fake_conv_forward(x, weight, bias, stride, padding, dilation, groups):
    return reference.conv_forward(x, weight, bias, stride, padding, dilation, groups)


def _fake_conv_fwd_reduce(x, weight, bias, stride, padding, dilation, groups, *stats):
    z = _fake_conv_forward(x, weight, bias, stride, padding, dilation, groups)
    return z, *_fake_bn_fwd_reduce(z)


def _fake_se_fwd_reduce(z, mean, rstd, gamma, beta, act, slope):
    return z.new_empty(z.shape[:2])


def _fake_se_bwd_sums(dy, z, mean, rstd, gamma, beta, act, slope):
    return z.new_empty((z.shape[0], 5, z.shape[1]))


def _fake_se_bwd_reduce(dy, z, mean, rstd, gamma, beta, act, slope):
    return z.new_empty(z.shape[:2], dtype=accumulator(z.dtype))


def _fake_grouped_conv(x, taps, bias, stride, padding, dilation):
    geometry = zip(x.shape[2:], taps.shape, stride, padding, dilation, strict=False)
    sizes = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in geometry]
    return torch.empty(
        (*x.shape[:2], *sizes), dtype=x.dtype, device=x.device, memory_format=torch.channels_last
    )


def _fake_grouped_fwd_apply(x, mean, rstd, gamma, beta, residual, act, slope, *conv):
    return _fake_grouped_conv(x, *conv)


def _fake_grouped_fwd_reduce(x, mean, rstd, gamma, beta, act, slope, *rest):
    z = _fake_grouped_conv(x, *rest[:-5])
    return z, *_fake_vectors(z, z.shape[1], 2)


def _fake_grouped_dgrad_reduce(dy, *args):
    taps, *rest = args[9:]
    dx = _fake_grouped_dgrad(dy, taps, *rest[:4])
    below = 0 if rest[5] is None else dx.shape[1]
    beside = 0 if rest[13] is None else below
    return dx, *_fake_vectors(dx, below, 2), *_fake_vectors(dx, beside, 2)


def _fake_grouped_dgrad(dz, taps, input_size, stride, padding, dilation):
    return torch.empty(
        (*dz.shape[:2], *input_size),
        dtype=dz.dtype,
        device=dz.device,
        memory_format=torch.channels_last,
    )


def _fake_dot_conv(x, weights, bias, out_channels, stride, padding, dilation):
    geometry = zip(x.shape[2:], weights.shape[1:3], stride, padding, dilation, strict=True)
    sizes = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in geometry]
    return torch.empty(
        (x.shape[0], out_channels, *sizes),
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last,
    )


def _fake_dgrad(dz, weights, in_channels, input_size, *geometry):
    return torch.empty(
        (dz.shape[0], in_channels, *input_size),
        dtype=dz.dtype,
        device=dz.device,
        memory_format=torch.channels_last,
    )


def _fake_pointwise_spread(read, input_size, stride):
    return torch.empty(
        (*read.shape[:2], *input_size),
        dtype=read.dtype,
        device=read.device,
        memory_format=torch.channels_last,
    )


def _fake_pointwise_conv(x, weights, bias, out_channels):
    return torch.empty(
        (x.shape[0], out_channels, *x.shape[2:]),
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last,
    )


def _fake_pointwise_dgrad(dy, weights, in_channels):
    return _fake_pointwise_conv(dy, weights, None, in_channels)


def _fake_fwd_apply(conv):
    def fake(x, mean, rstd, gamma, beta, residual, act, slope, weights, bias, out_channels, *rest):
        return conv(x, weights, bias, out_channels, *rest)

    return fake


def _fake_pointwise_bwd_reduce_apply_dgrad(dy, z, *args):
    *state, weights, in_channels = args
    dgamma, dbeta, _, dresidual = _fake_bn_bwd_reduce_apply(dy, z, *state)
    return dgamma, dbeta, _fake_pointwise_conv(z, weights, None, in_channels), dresidual


def _fake_vectors(like, channels, count):
    return tuple(like.new_empty(channels, dtype=torch.float32) for _ in range(count))


def _fake_fwd_reduce(conv, geometry):
    def fake(x, mean, rstd, gamma, beta, act, slope, weights, bias, out_channels, *rest):
        z = conv(x, weights, bias, out_channels, *rest[:geometry])
        return z, *_fake_vectors(z, out_channels, 2)

    return fake


def _fake_winograd_residual_fwd_reduce(
    x, mean, rstd, gamma, beta, residual, act, slope, want_bits, weights, bias, out_channels, *rest
):
    z = _fake_winograd_conv(x, weights, bias, out_channels, *rest[:2])
    y, bits = _fake_bn_fwd_apply(x, mean, rstd, gamma, beta, residual, act, slope, want_bits)
    y = y.contiguous(memory_format=torch.channels_last)
    return z, *_fake_vectors(z, out_channels, 2), y, bits


def _fake_dgrad_reduce(dgrad, geometry):
    def fake(dy, *args):
        weights, channels, *rest = args[9:]
        dx = dgrad(dy, weights, channels, *rest[:geometry])
        below = 0 if rest[geometry + 1] is None else channels
        beside = 0 if rest[-3] is None else below
        return dx, *_fake_vectors(dx, below, 2), *_fake_vectors(dx, beside, 2)

    return fake


def _fake_max_pool(y, kernel, stride, padding):
    sizes = [
        (size + 2 * p - k) // s + 1
        for size, k, s, p in zip(y.shape[2:], kernel, stride, padding, strict=True)
    ]
    p = torch.empty(
        (*y.shape[:2], *sizes), dtype=y.dtype, device=y.device, memory_format=torch.channels_last
    )
    return p, torch.empty_like(p, dtype=torch.uint8)


def _fake_bn_fwd_apply_max_pool(z, mean, rstd, gamma, beta, act, slope, *window):
    return _fake_max_pool(z, *window)


def _fake_max_pool_backward_bn_bwd_reduce(dp, places, z, mean, *rest):
    return torch.empty_like(mean), torch.empty_like(mean)


def _fake_max_pool_backward(dp, places, input_size, kernel, stride, padding):
    return torch.empty(
        (*dp.shape[:2], *input_size),
        dtype=dp.dtype,
        device=dp.device,
        memory_format=torch.channels_last,
    )


def _fake_winograd_conv(x, weights, bias, out_channels, padding, stride, kernel=(3, 3)):
    sizes = winograd.output_size(x.shape[2:], (stride, stride), padding, kernel)
    return torch.empty(
        (x.shape[0], out_channels, *sizes),
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last,
    )


def _fake_blocked_conv(x, weights, bias, out_channels, kernel, padding):
    return _fake_winograd_conv(x, weights, bias, out_channels, padding, 2, kernel)


def _fake_blocked_fwd_reduce(x, weights, bias, out_channels, kernel, padding, *stats):
    z = _fake_blocked_conv(x, weights, bias, out_channels, kernel, padding)
    return z, *_fake_vectors(z, out_channels, 2)


def _fake_conv_dgrad(dz, weight, input_size, stride, padding, dilation, groups):
    if weight.dim() == 2:
        return dz.new_empty((dz.shape[0], weight.shape[1]))
    shape = (dz.shape[0], weight.shape[1] * groups, *input_size)
    return torch.empty(shape, dtype=dz.dtype, device=dz.device, memory_format=_memory_format(dz))


def _is_eager(tensor):
    """Whether what is called now runs now, on a tensor that is nothing else."""
    return not torch.compiler.is_compiling() and type(tensor) is Tensor


def _direct_in_eager(operator, kernel):
    """Calls a kernel that is Python without the dispatcher, which costs it as much as a small convolution."""

    def call(tensor, *args):
        return kernel(tensor, *args) if _is_eager(tensor) else operator(tensor, *args)

    return call


def bn_bwd_reduce_apply_dgrad(dy, z, *args):
    """See reference.bn_bwd_reduce_apply_dgrad. The dz of a 1x1 convolution never leaves the cache."""
    *state, _, weight, _, stride, padding, _, groups = args
    if _is_eager(z) and _runs_as_pointwise(z, weight, stride, padding, groups):
        packed = _transposed_pointwise_weight(weight)
        return torch.ops.bnfast.pointwise_bwd_reduce_apply_dgrad.default(
            dy, z, *state, packed, weight.shape[1]
        )
    return _bn_bwd_reduce_apply_dgrad(dy, z, *args)


if unavailable is None:
    _library = torch.library.Library("bnfast", "FRAGMENT")
    for _name, _schema, _kernel in (
        ("conv_forward", f"(Tensor x, {_CONV}) -> Tensor", _conv_forward),
        (
            "conv_fwd_reduce",
            f"(Tensor x, {_CONV}, {_STATS}) -> (Tensor z, Tensor mean, Tensor m2, Tensor rstd)",
            _conv_fwd_reduce,
        ),
        (
            "conv_dgrad",
            "(Tensor dz, Tensor weight, SymInt[] input_size, int[] stride, int[] padding, "
            "int[] dilation, int groups) -> Tensor",
            _conv_dgrad,
        ),
    ):
        _library.define(_name + _schema)
        _library.impl(_name, _kernel, "CPU")
    for _name, _fake in (
        ("conv_forward", _fake_conv_forward),
        ("conv_fwd_reduce", _fake_conv_fwd_reduce),
        ("conv_dgrad", _fake_conv_dgrad),
        ("dot_conv", _fake_dot_conv),
        ("dot_dgrad", _fake_dgrad),
        ("dot_fwd_apply", _fake_fwd_apply(_fake_dot_conv)),
        ("dot_fwd_reduce", _fake_fwd_reduce(_fake_dot_conv, 3)),
        ("dot_dgrad_reduce", _fake_dgrad_reduce(_fake_dgrad, 4)),
        ("grouped_conv", _fake_grouped_conv),
        ("grouped_fwd_apply", _fake_grouped_fwd_apply),
        ("grouped_fwd_reduce", _fake_grouped_fwd_reduce),
        ("grouped_dgrad", _fake_grouped_dgrad),
        ("grouped_dgrad_reduce", _fake_grouped_dgrad_reduce),
        ("pointwise_conv", _fake_pointwise_conv),
        ("pointwise_bwd_reduce_apply_dgrad", _fake_pointwise_bwd_reduce_apply_dgrad),
        ("pointwise_spread", _fake_pointwise_spread),
        ("pointwise_fwd_apply", _fake_fwd_apply(_fake_pointwise_conv)),
        ("pointwise_fwd_reduce", _fake_fwd_reduce(_fake_pointwise_conv, 0)),
        ("pointwise_dgrad_reduce", _fake_dgrad_reduce(_fake_pointwise_dgrad, 0)),
        ("blocked_conv", _fake_blocked_conv),
        ("blocked_fwd_reduce", _fake_blocked_fwd_reduce),
        ("winograd_conv", _fake_winograd_conv),
        ("winograd_fwd_apply", _fake_fwd_apply(_fake_winograd_conv)),
        ("winograd_fwd_reduce", _fake_fwd_reduce(_fake_winograd_conv, 2)),
        ("winograd_residual_fwd_reduce", _fake_winograd_residual_fwd_reduce),
        ("winograd_dgrad", _fake_dgrad),
        ("winograd_dgrad_reduce", _fake_dgrad_reduce(_fake_dgrad, 3)),
        ("bn_fwd_apply_max_pool", _fake_bn_fwd_apply_max_pool),
        ("max_pool_backward_bn_bwd_reduce", _fake_max_pool_backward_bn_bwd_reduce),
        ("max_pool", _fake_max_pool),
        ("max_pool_backward", _fake_max_pool_backward),
        ("bn_fwd_reduce", _fake_bn_fwd_reduce),
        ("bn_fwd_apply", _fake_bn_fwd_apply),
        ("bn_fwd_reduce_apply", _fake_bn_fwd_reduce_apply),
        ("bn_bwd_reduce", _fake_bn_bwd_reduce),
        ("bn_bwd_apply", _fake_bn_bwd_apply),
        ("bn_bwd_apply_", _fake_bn_bwd_apply_),
        ("bn_bwd_reduce_apply", _fake_bn_bwd_reduce_apply),
        ("bn_bwd_reduce_apply_", _fake_bn_bwd_reduce_apply_),
        ("se_bwd_reduce", _fake_se_bwd_reduce),
        ("se_fwd_reduce", _fake_se_fwd_reduce),
        ("se_bwd_sums", _fake_se_bwd_sums),
    ):
        torch.library.register_fake(f"bnfast::{_name}", _fake, lib=_library)

    # Resolved once: looking an operator up costs as much as calling it.
    conv_forward = _direct_in_eager(torch.ops.bnfast.conv_forward.default, _conv_forward)
    conv_fwd_reduce = _direct_in_eager(torch.ops.bnfast.conv_fwd_reduce.default, _conv_fwd_reduce)
    conv_dgrad = _direct_in_eager(torch.ops.bnfast.conv_dgrad.default, _conv_dgrad)
    bn_fwd_reduce = torch.ops.bnfast.bn_fwd_reduce.default
    bn_fwd_apply = torch.ops.bnfast.bn_fwd_apply.default
    bn_fwd_reduce_apply = torch.ops.bnfast.bn_fwd_reduce_apply.default
    bn_bwd_reduce = torch.ops.bnfast.bn_bwd_reduce.default
    bn_bwd_apply = torch.ops.bnfast.bn_bwd_apply.default
    bn_bwd_apply_ = torch.ops.bnfast.bn_bwd_apply_.default
    bn_bwd_reduce_apply = torch.ops.bnfast.bn_bwd_reduce_apply.default
    bn_bwd_reduce_apply_ = torch.ops.bnfast.bn_bwd_reduce_apply_.default
    _bn_bwd_reduce_apply_dgrad = reference.followed_by_dgrad(
        bn_bwd_reduce_apply, bn_bwd_reduce_apply_, conv_dgrad
    )
    se_bwd_reduce = torch.ops.bnfast.se_bwd_reduce.default


def cpu_capability() -> str | None:
    """The instruction set of the compiled kernels on this processor, or None without the extension."""
    return None if _C is None else _C.cpu_capability()


def build_info() -> dict[str, str] | None:
    """Compiler and PyTorch version of the build, or None without the extension."""
    return None if _C is None else _C.build_info()
