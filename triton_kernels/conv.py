"""conv_fwd_reduce and conv_dgrad in Triton. Bytes of global memory per element of s bytes, what taps and blocks of channels read
again from the cache left out:
    conv_fwd_reduce_kernel   read s per element of x, write s per element of z      with the moments of z on the way
    the same without moments is conv_dgrad of stride 1: the weight rotated, its channels exchanged, once
An implicit GEMM: rows are pixels of the result, columns its channels, and the sum runs over taps and input channels.

Which of two ways a convolution goes, `route` says: PyTorch's own (cuDNN) followed by the BatchNorm phases, or this kernel.
"""

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from bnfast import reference, weights
from bnfast.reference import accumulator, conv_output_size, se_bwd_apply, se_fwd

from . import launch
from .bn_bwd import bn_bwd_reduce_apply, bn_bwd_reduce_apply_
from .bn_fwd import (
    bn_fwd_apply,
    bn_fwd_reduce,
    bn_fwd_reduce_apply,
    finalise_moments,
    merge_tile,
    store_moments,
    times,
)
from .launch import TRITON_DTYPES, device_of
from .layout import LEAST_VALUES, MOST_SPLITS, PROGRAMS, cdiv, dense

__all__ = [
    "bn_bwd_reduce_apply_dgrad",
    "conv_dgrad",
    "conv_forward",
    "conv_fwd_reduce",
    "conv_fwd_reduce_apply",
    "route",
    "se_bwd_apply",
    "se_bwd_reduce",
    "se_fwd",
]

BLOCK_M, BLOCK_K, BLOCK_J = 64, 64, 32
# With fewer the sums do not fit into the registers of every chip, with more a thread loads less than 16 bytes at once.
THREADS = 256


@triton.jit
def conv_fwd_reduce_kernel(
    x_ptr,  # [N, H, W, J]
    w_ptr,  # [taps, J, K]
    bias_ptr,  # [K] or None
    z_ptr,  # [N, OH, OW, K]
    part_ptr,  # [splits, 2 K + 1] in ACC as in bn_fwd.py, or None: no moments
    tracked_ptr,  # [] int64 or None
    pixels,  # N OH OW
    height,
    width,
    in_channels,
    out_height,
    out_width,
    out_channels,
    per_split,
    TAPS_H: tl.constexpr,
    TAPS_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_J: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """z = conv(x, W) + bias of per_split tiles of pixels, and the moments of what was stored: of the rounded values."""
    split = tl.program_id(1)
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    if tracked_ptr is not None and tl.program_id(0) + split == 0:
        tl.store(tracked_ptr, tl.load(tracked_ptr) + 1)
    bias = tl.zeros([BLOCK_K], ACC)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + k, k < out_channels, 0).to(ACC)
    origin = tl.zeros([BLOCK_K], ACC)
    mean = tl.zeros([BLOCK_K], ACC)
    m2 = tl.zeros([BLOCK_K], ACC)
    count = tl.zeros([BLOCK_K], ACC)
    first = split * per_split
    for tile in range(first, first + per_split):
        first_m = times(tile, BLOCK_M, WIDE)
        m = first_m + tl.arange(0, BLOCK_M)
        m_mask = m < pixels
        ow = m % out_width
        oh = m // out_width % out_height
        image = m // (out_width * out_height)
        acc = tl.zeros([BLOCK_M, BLOCK_K], ACC)
        for tap in range(TAPS_H * TAPS_W):
            ih = oh * STRIDE_H - PADDING_H + tap // TAPS_W * DILATION_H
            iw = ow * STRIDE_W - PADDING_W + tap % TAPS_W * DILATION_W
            inside = m_mask & (ih >= 0) & (ih < height) & (iw >= 0) & (iw < width)
            row = x_ptr + ((image * height + ih) * width + iw) * in_channels
            for start in range(0, in_channels, BLOCK_J):
                j = start + tl.arange(0, BLOCK_J)
                x = tl.load(
                    row[:, None] + j[None, :], inside[:, None] & (j < in_channels)[None, :], 0
                )
                at = (tap * in_channels + j)[:, None] * out_channels + k[None, :]
                w = tl.load(w_ptr + at, (j < in_channels)[:, None] & (k < out_channels)[None, :], 0)
                acc = tl.dot(x, w, acc, input_precision=PRECISION, out_dtype=ACC)
        z = (acc + bias[None, :]).to(z_ptr.dtype.element_ty)
        mask = m_mask[:, None] & (k < out_channels)[None, :]
        tl.store(z_ptr + m[:, None] * out_channels + k[None, :], z, mask)
        if part_ptr is not None:
            # Counted from the first tile's mean, so that the size of the mean costs no digits.
            n = tl.maximum(0, tl.minimum(BLOCK_M, pixels - first_m)).to(ACC)
            value = tl.where(mask, z.to(ACC), 0)
            if tile == first:
                origin = tl.sum(value, 0) / tl.maximum(n, 1)
            value = tl.where(mask, value - origin[None, :], 0)
            mean, m2, count = merge_tile(value, mask, n, mean, m2, count, True)
    if part_ptr is not None:
        store_moments(part_ptr, split, k, out_channels, mean + origin, m2, count)


def route(x: Tensor, weight: Tensor, groups: int) -> str:
    """ "fused" or "cudnn": the way of a convolution of x. BNFAST_TRITON_CONV=fused takes the kernel of this file wherever it
    can be taken: one group, [N, C, H, W] in channels_last. Without it every convolution is cuDNN's: no measurement says yet
    where another way is faster."""
    possible = (
        groups == 1
        and weight.dim() == 4
        and x.dtype in TRITON_DTYPES
        and x.numel() > 0
        and torch.channels_last in (_format(x), _format(weight))
    )
    wanted = os.environ.get("BNFAST_TRITON_CONV", "cudnn")
    if wanted not in ("cudnn", "fused"):
        raise ValueError(f"BNFAST_TRITON_CONV is {wanted!r}; allowed are 'cudnn' and 'fused'")
    return wanted if possible else "cudnn"


def _format(t: Tensor) -> torch.memory_format:
    if not t.is_contiguous() and t.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def _packed(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """[taps, J, K] of weight [K, J, KH, KW]."""
    return weight.to(dtype).permute(2, 3, 1, 0).flatten(0, 1).contiguous()


def _convolve(
    x, packed, bias, kernel, out_size, stride, padding, dilation, with_moments, tracked=None
) -> tuple[Tensor, Tensor | None]:
    """(z, partial moments or None) of x [N, J, H, W] and packed [taps, J, K]."""
    x = x.contiguous(memory_format=torch.channels_last)
    batch, in_channels, height, width = x.shape
    out_channels = packed.shape[2]
    z = torch.empty(
        (batch, out_channels, *out_size),
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last,
    )
    if z.numel() == 0:
        return z, None
    acc = accumulator(x.dtype)
    pixels = batch * out_size[0] * out_size[1]
    tiles, blocks = cdiv(pixels, BLOCK_M), cdiv(out_channels, BLOCK_K)
    most = pixels // LEAST_VALUES if with_moments else tiles
    per_split = cdiv(tiles, max(1, min(MOST_SPLITS, PROGRAMS // blocks, tiles, most)))
    splits = cdiv(tiles, per_split)
    parts = None
    if with_moments:
        parts = torch.empty((splits, 2 * out_channels + 1), dtype=acc, device=x.device)
    ieee = torch.backends.cudnn.conv.fp32_precision == "ieee"
    conv_fwd_reduce_kernel[(blocks, splits)](
        x,
        packed,
        bias,
        z,
        parts,
        tracked,
        pixels,
        height,
        width,
        in_channels,
        *out_size,
        out_channels,
        per_split,
        *kernel,
        *stride,
        *padding,
        *dilation,
        WIDE=max(x.numel(), z.numel()) >= 2**30,
        BLOCK_M=BLOCK_M,
        BLOCK_K=BLOCK_K,
        BLOCK_J=BLOCK_J,
        ACC=TRITON_DTYPES[acc],
        PRECISION="ieee" if ieee or x.dtype != torch.float32 else "tf32",
        num_warps=THREADS // launch.LANES,
    )
    return z, parts


def conv_forward(x, weight, bias, stride, padding, dilation, groups):
    """See reference.conv_forward."""
    with device_of(x):
        if route(x, weight, groups) == "cudnn":
            return reference.conv_forward(x, weight, bias, stride, padding, dilation, groups)
        size = conv_output_size(x.shape[2:], weight, stride, padding, dilation)
        packed = weights.transformed(weight, ("taps", x.dtype), lambda w: _packed(w, x.dtype))
        kernel = weight.shape[2:]
        return _convolve(x, packed, bias, kernel, size, stride, padding, dilation, False)[0]


def conv_fwd_reduce(
    x,
    weight,
    bias,
    stride,
    padding,
    dilation,
    groups,
    running_mean,
    running_var,
    tracked,
    momentum,
    eps,
):
    """See reference.conv_fwd_reduce."""
    with device_of(x):
        stats = (running_mean, running_var, tracked, momentum, eps)
        conv = (weight, bias, stride, padding, dilation, groups)
        if route(x, weight, groups) == "fused":
            return _fused_fwd_reduce(x, *conv[:5], *stats)
        z = reference.conv_forward(x, *conv)
        return z, *bn_fwd_reduce(z, *stats)


def conv_fwd_reduce_apply(x, weight, bias, stride, padding, dilation, groups, *rest):
    """See reference.conv_fwd_reduce_apply."""
    with device_of(x):
        conv = (weight, bias, stride, padding, dilation, groups)
        if route(x, weight, groups) == "fused":
            z, mean, _, rstd = _fused_fwd_reduce(x, *conv[:5], *rest[:5])
            return z, mean, rstd, *bn_fwd_apply(z, mean, rstd, *rest[5:])
        z = reference.conv_forward(x, *conv)
        return z, *bn_fwd_reduce_apply(z, *rest)


def _fused_fwd_reduce(x, weight, bias, stride, padding, dilation, *stats):
    size = conv_output_size(x.shape[2:], weight, stride, padding, dilation)
    packed = weights.transformed(weight, ("taps", x.dtype), lambda w: _packed(w, x.dtype))
    kernel, tracked = weight.shape[2:], stats[2]
    z, parts = _convolve(x, packed, bias, kernel, size, stride, padding, dilation, True, tracked)
    if parts is None:
        return z, *bn_fwd_reduce(z, *stats)
    return z, *finalise_moments(parts, *stats)


def conv_dgrad(
    dz: Tensor,
    weight: Tensor,
    input_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """See reference.conv_dgrad. Grouped convolutions take PyTorch's own backward with one element in place of the input, of
    which only the shape is asked: the transposed convolution has no fast grouped form on GPUs."""
    with device_of(dz):
        if route(dz, weight, groups) == "fused" and all(s == 1 for s in stride):
            kernel = weight.shape[2:]
            margin = [d * (k - 1) - p for d, k, p in zip(dilation, kernel, padding, strict=True)]
            turned = weights.transformed(
                weight,
                ("taps rotated", dz.dtype),
                lambda w: _packed(w.flip((2, 3)).transpose(0, 1), dz.dtype),
            )
            ones = (1, 1)
            return _convolve(dz, turned, None, kernel, input_size, ones, margin, dilation, False)[0]
        if groups == 1 or not dz.is_cuda:
            return reference.conv_dgrad(dz, weight, input_size, stride, padding, dilation, groups)
        x = dz.new_empty(1).expand(dz.shape[0], weight.shape[1] * groups, *input_size)
        return torch.ops.aten.convolution_backward(
            dz,
            x,
            weight.to(dz.dtype),
            None,
            stride,
            padding,
            dilation,
            False,
            [0] * len(stride),
            groups,
            [True, False, False],
        )[0]


def se_bwd_reduce(dy, z, mean, rstd, gamma, beta, act, slope):
    """See reference.se_bwd_reduce."""
    z = dense(z)
    x = z if mean is None else bn_fwd_apply(z, mean, rstd, gamma, beta, None, act, slope, False)[0]
    acc = accumulator(z.dtype)
    return (dy.to(acc) * x.to(acc)).sum((2, 3))


bn_bwd_reduce_apply_dgrad = reference.followed_by_dgrad(
    bn_bwd_reduce_apply, bn_bwd_reduce_apply_, conv_dgrad
)
