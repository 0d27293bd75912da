"""conv_fwd_reduce in Triton. Bytes of global memory per element of s bytes, what taps and blocks of channels read again from the
cache left out:
    conv_fwd_reduce_kernel   read s per element of x, write s per element of z
The moments of z are taken on the way; with bn_fwd_apply as its prologue x is the z of the unit before, whose y is never
written. An implicit GEMM: rows are pixels of the result, columns its channels, and the sum runs over taps and input channels.
"""

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from bnfast import weights
from bnfast.reference import Norm, accumulator

from . import launch
from .activation import act_value, pre_activation
from .bn_fwd import load_norm, merge_tile, origin_of, store_moments, times
from .launch import TRITON_DTYPES
from .layout import MOST_SPLITS, PROGRAMS, cdiv, empty_last

BLOCK_M, BLOCK_K, BLOCK_J = 64, 64, 32
# With fewer the sums do not fit into the registers of every chip, with more a thread loads less than 16 bytes at once; for the same
# reason fewer loads are in flight (num_stages) where a prologue, or float32, needs the registers.
THREADS = 256
# Pixels of a split at least: its partial results of a channel are then a sixteenth of what it writes, or less.
LEAST_VALUES = 256

if hasattr(torch._C, "_get_fp32_precision_getter"):  # the property below takes six times as long
    _fp32_precision = functools.partial(torch._C._get_fp32_precision_getter, "cuda", "conv")
else:

    def _fp32_precision() -> str:
        return torch.backends.cudnn.conv.fp32_precision


@triton.jit
def conv_fwd_reduce_kernel(
    x_ptr,  # [N, H, W, J]
    norm,  # reference.Norm of x where bn_fwd_apply comes first, or None
    w_ptr,  # [taps, J, K]
    bias_ptr,  # [K] or None
    z_ptr,  # [N, OH, OW, K]
    part_ptr,  # [splits, 3 K + 1] in ACC as in bn_fwd.py, or None: no moments
    tracked_ptr,  # [] int64 or None
    pixels,  # N OH OW
    height,
    width,
    in_channels,
    out_height,
    out_width,
    out_channels,
    per_split,
    ACT: tl.constexpr,  # of the prologue
    SLOPE: tl.constexpr,
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
                j_mask = j < in_channels
                valid = inside[:, None] & j_mask[None, :]
                x = tl.load(row[:, None] + j[None, :], valid, 0)
                if norm is not None:
                    x_mean, x_scale, x_beta = load_norm(norm, j, j_mask, ACC)
                    pre = pre_activation(
                        x.to(ACC), x_mean[None, :], x_scale[None, :], x_beta[None, :]
                    )
                    # The padding is of y: 0, not what a z of 0 would become.
                    x = tl.where(valid, act_value(pre, ACT, SLOPE), 0).to(z_ptr.dtype.element_ty)
                at = (tap * in_channels + j)[:, None] * out_channels + k[None, :]
                w = tl.load(w_ptr + at, j_mask[:, None] & (k < out_channels)[None, :], 0)
                acc = tl.dot(x, w, acc, input_precision=PRECISION, out_dtype=ACC)
        z = (acc + bias[None, :]).to(z_ptr.dtype.element_ty)
        mask = m_mask[:, None] & (k < out_channels)[None, :]
        tl.store(z_ptr + m[:, None] * out_channels + k[None, :], z, mask)
        if part_ptr is not None:
            # Counted from the first tile's mean, so that the size of the mean costs no digits.
            n = tl.maximum(0, tl.minimum(BLOCK_M, pixels - first_m)).to(ACC)
            value = tl.where(mask, z.to(ACC), 0)
            if tile == first:
                origin = origin_of(value, n, 0)
            value = tl.where(mask, value - origin[None, :], 0)
            mean, m2, count = merge_tile(value, mask, n, mean, m2, count, True)
    if part_ptr is not None:
        store_moments(part_ptr, split, k, out_channels, origin, mean, m2, count)


def launch_conv(
    x: Tensor,
    norm: Norm | None,
    act: str,
    slope: float,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    with_moments: bool,
    tracked: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(z, partial moments or None) of x [N, J, H, W], in front of which bn_fwd_apply comes where norm is given."""
    packed = weights.transformed(weight, ("taps", x.dtype), lambda w: packed_taps(w, x.dtype))
    x = x.contiguous(memory_format=torch.channels_last)
    geometry = (*weight.shape[2:], *stride, *padding, *dilation)
    out_channels = weight.shape[0]
    z_shape, sizes, grid, is_wide = plan(x.shape, out_channels, geometry, with_moments, BLOCK_M)
    z = empty_last(x, *z_shape)
    if z.numel() == 0:
        return z, None
    acc = accumulator(x.dtype)
    parts = None
    if with_moments:
        size = (grid[1], 3 * out_channels + 1)
        parts = x.new_empty(*size, dtype=acc) if norm is None else norm.rstd.new_empty(*size)
    conv_fwd_reduce_kernel[grid](
        x,
        norm,
        packed,
        bias,
        z,
        parts,
        tracked,
        *sizes,
        act,
        slope,
        *geometry,
        WIDE=is_wide,
        BLOCK_M=BLOCK_M,
        BLOCK_K=BLOCK_K,
        BLOCK_J=BLOCK_J,
        ACC=TRITON_DTYPES[acc],
        PRECISION=precision(x.dtype),
        num_warps=THREADS // launch.LANES,
        num_stages=3 if norm is None or x.dtype.itemsize == 2 else 1,
    )
    return z, parts


@functools.lru_cache(4096)
def plan(
    x_shape: torch.Size,
    out_channels: int,
    geometry: tuple[int, ...],
    with_moments: bool,
    block: int,
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, int], bool]:
    """Of a convolution of x in tiles of `block` pixels: the shape of z, the kernel's sizes from pixels to per_split, its grid, and
    whether offsets need 64 bits."""
    batch, in_channels, *size = x_shape
    out_size = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(size, *(geometry[i : i + 2] for i in (0, 2, 4, 6)), strict=True)
    ]
    pixels = batch * out_size[0] * out_size[1]
    blocks, splits, per_split = split_tiles(pixels, block, out_channels, with_moments)
    sizes = (pixels, *size, in_channels, *out_size, out_channels, per_split)
    is_wide = max(math.prod(x_shape), pixels * out_channels) >= 2**30
    return (batch, out_channels, *out_size), sizes, (blocks, splits), is_wide


def packed_taps(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """[taps, J, K] of weight [K, J, KH, KW]."""
    return weight.to(dtype).permute(2, 3, 1, 0).flatten(0, 1).contiguous()


def split_tiles(pixels: int, block: int, channels: int, with_sums: bool) -> tuple[int, int, int]:
    """(blocks of channels, splits, tiles of each split) of a convolution's result, by its shape alone. Where a split also
    writes partial results of its channels it has LEAST_VALUES pixels at least."""
    tiles, blocks = cdiv(pixels, block), cdiv(channels, BLOCK_K)
    most = pixels // LEAST_VALUES if with_sums else tiles
    per_split = cdiv(tiles, max(1, min(MOST_SPLITS, PROGRAMS // blocks, tiles, most)))
    return blocks, cdiv(tiles, per_split), per_split


def precision(dtype: torch.dtype) -> str:
    """How tl.dot multiplies float32: as PyTorch lets cuDNN do it."""
    if dtype != torch.float32:
        return "ieee"
    return "ieee" if _fp32_precision() == "ieee" else "tf32"
