"""The convolutions' phases in Triton, and which of two ways one goes: PyTorch's own (cuDNN) with the BatchNorm phases before and
behind it, or the kernels of conv_fwd.py and conv_bwd.py, which take those phases along.
"""

import os

import torch
from torch import Tensor

from bnfast import reference, tuning
from bnfast.cuda import input_gradient
from bnfast.reference import (
    Above,
    Below,
    Beside,
    Norm,
    Source,
    accumulator,
    followed_by_apply,
    joins_pool,
    joins_residual,
    joins_squeeze,
    max_pool,
    max_pool_backward,
    max_pool_values,
    se_bwd_apply,
    se_fwd,
)

from .bn_bwd import finalise_sums
from .bn_fwd import bn_fwd_apply, finalise_moments
from .bn_reduce import (
    bn_bwd_reduce_apply,
    bn_bwd_reduce_apply_,
    bn_fwd_reduce,
    bn_fwd_reduce_apply,
)
from .conv_bwd import launch_dgrad
from .conv_depthwise import is_depthwise, launch_depthwise, launch_depthwise_dgrad
from .conv_fwd import launch_conv
from .conv_gram import (
    bn_bwd_mask,
    bn_fwd_apply_conv_bwd_reduce,
    bn_fwd_apply_conv_fwd_apply,
    bn_fwd_apply_gram_reduce,
)
from .launch import TRITON_DTYPES, device_of
from .layout import dense

__all__ = [
    "bn_bwd_apply_conv_dgrad_reduce",
    "bn_bwd_mask",
    "bn_bwd_reduce_apply_dgrad",
    "bn_fwd_apply_conv_bwd_reduce",
    "bn_fwd_apply_conv_fwd_apply",
    "bn_fwd_apply_conv_fwd_reduce",
    "bn_fwd_apply_gram_reduce",
    "conv_dgrad",
    "conv_forward",
    "conv_fwd_apply",
    "conv_fwd_reduce",
    "conv_fwd_reduce_apply",
    "fuses_chain",
    "fuses_gram",
    "joins_pool",
    "joins_residual",
    "joins_squeeze",
    "joins_units",
    "max_pool",
    "max_pool_backward",
    "max_pool_values",
    "se_bwd_apply",
    "se_bwd_reduce",
    "se_fwd",
]


def forced_route() -> str | None:
    """The value of BNFAST_TRITON_CONV; without it each convolution goes as `bnfast tune` has found, or cuDNN's way."""
    route = os.environ.get("BNFAST_TRITON_CONV")
    if route not in (None, "cudnn", "fused", "gram"):
        raise ValueError(
            f"BNFAST_TRITON_CONV is {route!r}; allowed are 'cudnn', 'fused' and 'gram'"
        )
    return route


# Read once: a launch takes not much longer than a look into the environment.
route = forced_route()


def is_fused(x: Tensor, weight: Tensor, stride, padding, dilation, groups: int) -> bool:
    """Whether a convolution of x is one of this package's kernels: on the routes "fused" and "gram" wherever they can be taken, with
    one group or one per channel and [N, C, H, W] in channels_last, or where the table of `bnfast.tuning` says so. Else it is cuDNN's."""
    if not joins_units() or not _can_fuse(x, weight, groups):
        return False
    if route is not None:
        return True
    output = reference.conv_output_size(x.shape[2:], weight, stride, padding, dilation)
    return _tuned(x, weight, output, (stride, padding, dilation, groups))


def _can_fuse(x: Tensor, weight: Tensor, groups: int) -> bool:
    return (
        (groups == 1 or is_depthwise(weight, groups))
        and weight.dim() == 4
        and x.dtype in TRITON_DTYPES
        and x.numel() > 0
        and (_is_last(x) or _is_last(weight))
    )


def _tuned(x: Tensor, weight: Tensor, output, geometry: tuple) -> bool:
    """x: what the convolution reads, or dz."""
    shape = tuning.Shape(
        "triton", str(x.dtype)[6:], tuple(weight.shape), tuple(geometry[0]), tuple(output)
    )
    return tuning.choice(shape, ("cudnn", "fused"), x, weight, geometry) == "fused"


def _dgrad_is_fused(dz: Tensor, weight: Tensor, stride, padding, dilation, groups: int) -> bool:
    if not joins_units() or not _can_fuse(dz, weight, groups):
        return False
    geometry = (stride, padding, dilation, groups)
    return route is not None or _tuned(dz, weight, dz.shape[2:], geometry)


def _is_last(t: Tensor) -> bool:
    return t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous()


def joins_units() -> bool:
    """See reference.joins_units."""
    return route != "cudnn" if route is not None else _follows_table()


def _follows_table() -> bool:
    """Captured graphs do not: what reads a table cannot be in them."""
    return tuning.is_active and not torch.compiler.is_compiling()


def fuses_chain(x: Tensor, weight: Tensor, stride, padding, dilation, groups: int) -> bool:
    """See reference.fuses_chain. Dynamo takes no tuples for a kernel, and the chain's kernels take some."""
    return not torch.compiler.is_compiling() and is_fused(
        x, weight, stride, padding, dilation, groups
    )


def fuses_gram(x: Tensor, weight: Tensor, stride, padding, groups: int) -> bool:
    """See reference.fuses_gram: on the route "gram", where z is larger than what its statistics are taken from."""
    if route != "gram" or weight.dim() != 4:
        return False
    out_channels, in_channels, *kernel = weight.shape
    return (
        out_channels >= 2 * in_channels  # what most are not comes first
        and kernel == [1, 1]
        and tuple(stride) == (1, 1)
        and not any(padding)
        and fuses_chain(x, weight, stride, padding, (1, 1), groups)
    )


def conv_forward(x, weight, bias, stride, padding, dilation, groups):
    """See reference.conv_forward."""
    with device_of(x):
        geometry = (stride, padding, dilation)
        if not is_fused(x, weight, *geometry, groups):
            return reference.conv_forward(x, weight, bias, *geometry, groups)
        launch = _launcher(weight, groups)
        return launch(x, None, "identity", 0.0, weight, bias, *geometry, False)[0]


conv_fwd_apply = followed_by_apply(conv_forward, bn_fwd_apply)


def _launcher(weight, groups):
    return launch_depthwise if is_depthwise(weight, groups) else launch_conv


def conv_fwd_reduce(x, weight, bias, stride, padding, dilation, groups, *stats):
    """See reference.conv_fwd_reduce."""
    with device_of(x):
        geometry = (stride, padding, dilation)
        if is_fused(x, weight, *geometry, groups):
            return _fused_fwd_reduce(x, weight, bias, *geometry, groups, *stats)
        z = reference.conv_forward(x, weight, bias, *geometry, groups)
        return z, *bn_fwd_reduce(z, *stats)


def conv_fwd_reduce_apply(x, weight, bias, stride, padding, dilation, groups, *rest):
    """See reference.conv_fwd_reduce_apply."""
    with device_of(x):
        conv = (weight, bias, stride, padding, dilation)
        if is_fused(x, weight, stride, padding, dilation, groups):
            z, mean, _, rstd = _fused_fwd_reduce(x, *conv, groups, *rest[:5], with_m2=False)
            return z, mean, rstd, *bn_fwd_apply(z, mean, rstd, *rest[5:])
        z = reference.conv_forward(x, *conv, groups)
        return z, *bn_fwd_reduce_apply(z, *rest)


def bn_fwd_apply_conv_fwd_reduce(
    z: Tensor,
    norm: Norm | None,
    act: str,
    slope: float,
    weight,
    bias,
    stride,
    padding,
    dilation,
    groups,
    *stats,
):
    """See reference.bn_fwd_apply_conv_fwd_reduce; with norm for convolutions that `fuses_chain` says yes to."""
    with device_of(z):
        if norm is None and not is_fused(z, weight, stride, padding, dilation, groups):
            z = reference.conv_forward(z, weight, bias, stride, padding, dilation, groups)
            mean, _, rstd = bn_fwd_reduce(z, *stats)
            return z, mean, rstd
        z, parts = _launcher(weight, groups)(
            z, norm, act, slope, weight, bias, stride, padding, dilation, True, stats[2]
        )
        if parts is None:  # an empty batch
            mean, _, rstd = bn_fwd_reduce(z, *stats)
        else:
            mean, _, rstd = finalise_moments(parts, *stats, False)
        return z, mean, rstd


def _fused_fwd_reduce(x, weight, bias, stride, padding, dilation, groups, *stats, with_m2=True):
    conv = (weight, bias, stride, padding, dilation)
    z, parts = _launcher(weight, groups)(x, None, "identity", 0.0, *conv, True, stats[2])
    if parts is None:
        return z, *bn_fwd_reduce(z, *stats)
    return z, *finalise_moments(parts, *stats, with_m2)


def conv_dgrad(
    dz: Tensor,
    weight: Tensor,
    input_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """See reference.conv_dgrad; what does not run fused goes PyTorch's way, see `bnfast.cuda.input_gradient`."""
    with device_of(dz):
        conv = (weight, input_size, stride, padding, dilation)
        if _dgrad_is_fused(dz, weight, stride, padding, dilation, groups):
            return bn_bwd_apply_conv_dgrad_reduce(
                dz, None, "identity", 0.0, None, "identity", 0.0, *conv, groups,
                None, None, "identity", 0.0, None,
            )[0]  # fmt: skip
        return input_gradient(dz, *conv, groups)


def bn_bwd_apply_conv_dgrad_reduce(
    dy: Tensor,
    above: Above | None,
    above_act: str,
    above_slope: float,
    source: Source | None,
    source_act: str,
    source_slope: float,
    weight: Tensor,
    input_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    add: Tensor | None,
    below: Below | None,
    below_act: str,
    below_slope: float,
    beside: Beside | None,
):
    """See reference.bn_bwd_apply_conv_dgrad_reduce; for convolutions that `fuses_chain` says yes to."""
    with device_of(dy):
        conv = (weight, input_size, stride, padding, dilation)
        around = (add, below, below_act, below_slope, beside)
        if is_depthwise(weight, groups):
            dx, parts = launch_depthwise_dgrad(dy, above, above_act, above_slope, *conv, *around)
        else:
            dx, parts = launch_dgrad(
                dy, above, above_act, above_slope, source, source_act, source_slope, *conv, *around
            )
        if parts is None:
            return dx, None, None
        sums = None if below.z is None else finalise_sums(parts, below.rstd)
        return dx, sums, None if beside is None else finalise_sums(parts, beside.rstd, 2)


def se_bwd_reduce(dy, z, mean, rstd, gamma, beta, act, slope):
    """See reference.se_bwd_reduce."""
    z = dense(z)
    x = z if mean is None else bn_fwd_apply(z, mean, rstd, gamma, beta, None, act, slope, False)[0]
    acc = accumulator(z.dtype)
    return (dy.to(acc) * x.to(acc)).sum((2, 3))


bn_bwd_reduce_apply_dgrad = reference.followed_by_dgrad(
    bn_bwd_reduce_apply, bn_bwd_reduce_apply_, conv_dgrad
)
