"""Depthwise convolutions in Triton, with the phases before and behind them as in conv_fwd.py and conv_bwd.py. Bytes of global memory
per element of s bytes, what taps read again from the cache left out:
    conv_depthwise_fwd_reduce_kernel   read s per element of x, write s per element of z
    conv_depthwise_dgrad_kernel        read s (behind bn_bwd_apply 2 s) per element of dz, write s per element of dx; in front of
                                       bn_bwd_reduce and with a sum as conv_dgrad_kernel
No products of matrices: a tile of pixels and channels adds up one tap after the other, in the accumulator's dtype.
"""

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from bnfast import weights
from bnfast.reference import Above, Below, Beside, Norm, accumulator

from .activation import act_value, pre_activation
from .bn_fwd import load_norm, merge_tile, origin_of, store_moments, times
from .conv_bwd import dz_of, store_sums, taken_up
from .conv_fwd import BLOCK_K, plan, split_tiles
from .launch import TRITON_DTYPES
from .layout import WARPS, empty_last, like

TILE_BYTES = 4096  # of BLOCK_K channels: what a thread holds of a tile beside its sums fits into the registers of every chip


@triton.jit
def conv_depthwise_fwd_reduce_kernel(
    x_ptr,  # [N, H, W, C]
    norm,  # reference.Norm of x where bn_fwd_apply comes first, or None
    w_ptr,  # [taps, C]
    bias_ptr,  # [C] or None
    z_ptr,  # [N, OH, OW, C]
    part_ptr,  # [splits, 3 C + 1] in ACC as in bn_fwd.py, or None: no moments
    tracked_ptr,  # [] int64 or None
    pixels,  # N OH OW
    height,
    width,
    channels,
    out_height,
    out_width,
    out_channels,  # C again
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
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
):
    """z = conv(x, w) + bias of per_split tiles of pixels, and the moments of what was stored."""
    DTYPE: tl.constexpr = z_ptr.dtype.element_ty
    split = tl.program_id(1)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_mask = c < channels
    if tracked_ptr is not None and tl.program_id(0) + split == 0:
        tl.store(tracked_ptr, tl.load(tracked_ptr) + 1)
    bias = tl.zeros([BLOCK_C], ACC)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + c, c_mask, 0).to(ACC)
    if norm is not None:
        x_mean, x_scale, x_beta = load_norm(norm, c, c_mask, ACC)
    origin = tl.zeros([BLOCK_C], ACC)
    mean = tl.zeros([BLOCK_C], ACC)
    m2 = tl.zeros([BLOCK_C], ACC)
    count = tl.zeros([BLOCK_C], ACC)
    first = split * per_split
    for tile in range(first, first + per_split):
        first_m = times(tile, BLOCK_M, WIDE)
        m = first_m + tl.arange(0, BLOCK_M)
        m_mask = m < pixels
        ow = m % out_width
        oh = m // out_width % out_height
        image = m // (out_width * out_height)
        acc = tl.zeros([BLOCK_M, BLOCK_C], ACC)
        for tap in range(TAPS_H * TAPS_W):
            ih = oh * STRIDE_H - PADDING_H + tap // TAPS_W * DILATION_H
            iw = ow * STRIDE_W - PADDING_W + tap % TAPS_W * DILATION_W
            inside = m_mask & (ih >= 0) & (ih < height) & (iw >= 0) & (iw < width)
            valid = inside[:, None] & c_mask[None, :]
            at = (((image * height + ih) * width + iw) * channels)[:, None] + c[None, :]
            x = tl.load(x_ptr + at, valid, 0).to(ACC)
            if norm is not None:
                pre = pre_activation(x, x_mean[None, :], x_scale[None, :], x_beta[None, :])
                # y as the unit before would have stored it; the padding is of y.
                y = act_value(pre, ACT, SLOPE).to(DTYPE).to(ACC)
                x = tl.where(valid, y, 0)
            w = tl.load(w_ptr + tap * channels + c, c_mask, 0).to(ACC)
            acc = tl.fma(x, tl.broadcast_to(w[None, :], [BLOCK_M, BLOCK_C]), acc)
        z = (acc + bias[None, :]).to(DTYPE)
        mask = m_mask[:, None] & c_mask[None, :]
        tl.store(z_ptr + m[:, None] * channels + c[None, :], z, mask)
        if part_ptr is not None:
            n = tl.maximum(0, tl.minimum(BLOCK_M, pixels - first_m)).to(ACC)
            value = tl.where(mask, z.to(ACC), 0)
            if tile == first:
                origin = origin_of(value, n, 0)
            value = tl.where(mask, value - origin[None, :], 0)
            mean, m2, count = merge_tile(value, mask, n, mean, m2, count, True)
    if part_ptr is not None:
        store_moments(part_ptr, split, c, channels, origin, mean, m2, count)


@triton.jit
def conv_depthwise_dgrad_kernel(
    dy_ptr,  # [N, OH, OW, C]: dz, or dy with above
    above,  # reference.Above of the z of dy, or None
    w_ptr,  # [taps, C]
    dx_ptr,  # [N, H, W, C]
    add_ptr,  # as dx: added to it; or None
    below,  # reference.Below of dx, or None
    beside,  # reference.Beside of dx, or None
    part_ptr,  # as in conv_bwd.py
    pixels,  # N H W
    height,
    width,
    channels,
    out_height,
    out_width,
    count,  # values per channel of dy
    per_split,
    ABOVE_ACT: tl.constexpr,
    ABOVE_SLOPE: tl.constexpr,
    BELOW_ACT: tl.constexpr,
    BELOW_SLOPE: tl.constexpr,
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
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
):
    """per_split tiles of pixels of dx."""
    DTYPE: tl.constexpr = dx_ptr.dtype.element_ty
    split = tl.program_id(1)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_mask = c < channels
    if above is not None:
        mean, scale, beta = load_norm(above, c, c_mask, ACC)
        shift_db = tl.load(above.dbeta + c, c_mask, 0) / count
        shift_z = tl.load(above.rstd + c, c_mask, 0) * tl.load(above.dgamma + c, c_mask, 0) / count
    sum_db = tl.zeros([BLOCK_C], ACC)
    sum_db_z = tl.zeros([BLOCK_C], ACC)
    sum_db_beside = tl.zeros([BLOCK_C], ACC)
    for tile in range(split * per_split, (split + 1) * per_split):
        pixel = times(tile, BLOCK_M, WIDE) + tl.arange(0, BLOCK_M)
        m_mask = pixel < pixels
        iw = pixel % width
        ih = pixel // width % height
        image = pixel // (width * height)
        acc = tl.zeros([BLOCK_M, BLOCK_C], ACC)
        for tap in range(TAPS_H * TAPS_W):
            # The pixel of dz that meets dx at this tap, times the stride.
            down = ih + PADDING_H - tap // TAPS_W * DILATION_H
            across = iw + PADDING_W - tap % TAPS_W * DILATION_W
            oh = down // STRIDE_H
            ow = across // STRIDE_W
            inside = m_mask & (down >= 0) & (oh < out_height) & (across >= 0) & (ow < out_width)
            inside = inside & (down % STRIDE_H == 0) & (across % STRIDE_W == 0)
            valid = inside[:, None] & c_mask[None, :]
            at = (((image * out_height + oh) * out_width + ow) * channels)[:, None] + c[None, :]
            dz = tl.load(dy_ptr + at, valid, 0).to(ACC)
            if above is not None:
                z = tl.load(above.z + at, valid, 0).to(ACC)
                dz = dz_of(
                    dz, z, mean, scale, beta, shift_db, shift_z, ABOVE_ACT, ABOVE_SLOPE, DTYPE
                )
                dz = tl.where(valid, dz, 0).to(DTYPE).to(ACC)
            w = tl.load(w_ptr + tap * channels + c, c_mask, 0).to(ACC)
            acc = tl.fma(dz, tl.broadcast_to(w[None, :], [BLOCK_M, BLOCK_C]), acc)
        at = pixel[:, None] * channels + c[None, :]
        mask = m_mask[:, None] & c_mask[None, :]
        dx, db, db_z, db_beside = taken_up(
            acc, at, mask, pixel, m_mask, c, pixels, channels, add_ptr, below, beside,
            BELOW_ACT, BELOW_SLOPE, DTYPE, ACC, BLOCK_M, BLOCK_C,
        )  # fmt: skip
        sum_db += db
        sum_db_z += db_z
        sum_db_beside += db_beside
        tl.store(dx_ptr + at, dx, mask)
    if part_ptr is not None:
        store_sums(part_ptr, split, c, channels, sum_db, sum_db_z, sum_db_beside, beside)


def is_depthwise(weight: Tensor, groups: int) -> bool:
    """Whether each channel has a kernel of its own, and no other."""
    return groups > 1 and weight.dim() == 4 and weight.shape[:2] == (groups, 1)


def launch_depthwise(
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
    """As conv_fwd.launch_conv, of x [N, C, H, W] and weight [C, 1, KH, KW]."""
    x = x.contiguous(memory_format=torch.channels_last)
    geometry = (*weight.shape[2:], *stride, *padding, *dilation)
    channels = weight.shape[0]
    block = _pixels(x.dtype)
    z_shape, sizes, grid, is_wide = plan(x.shape, channels, geometry, with_moments, block)
    z = empty_last(x, *z_shape)
    if z.numel() == 0:
        return z, None
    acc = accumulator(x.dtype)
    parts = None
    if with_moments:
        size = (grid[1], 3 * channels + 1)
        parts = x.new_empty(*size, dtype=acc) if norm is None else norm.rstd.new_empty(*size)
    conv_depthwise_fwd_reduce_kernel[grid](
        x,
        norm,
        _taps(weight, x.dtype),
        bias,
        z,
        parts,
        tracked,
        *sizes,
        act,
        slope,
        *geometry,
        WIDE=is_wide,
        BLOCK_M=block,
        BLOCK_C=BLOCK_K,
        ACC=TRITON_DTYPES[acc],
        num_warps=WARPS,
    )
    return z, parts


def launch_depthwise_dgrad(
    dy: Tensor,
    above: Above | None,
    above_act: str,
    above_slope: float,
    weight: Tensor,
    input_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    add: Tensor | None,
    below: Below | None,
    below_act: str,
    below_slope: float,
    beside: Beside | None,
) -> tuple[Tensor, Tensor | None]:
    """As conv_bwd.launch_dgrad, of weight [C, 1, KH, KW]."""
    dy = dy.contiguous(memory_format=torch.channels_last) if above is None else like(dy, above.z)
    channels = weight.shape[0]
    with_sums = beside is not None or (below is not None and below.z is not None)
    block = _pixels(dy.dtype)
    sizes, grid, is_wide = _plan_dgrad(dy.shape, *input_size, with_sums, block)
    dx = empty_last(dy, dy.shape[0], channels, *input_size)
    if dx.numel() == 0:
        return dx, None
    parts = None
    if with_sums:
        parts = below.rstd.new_empty(2 if beside is None else 3, grid[1], channels)
    conv_depthwise_dgrad_kernel[grid](
        dy,
        above,
        _taps(weight, dy.dtype),
        dx,
        None if add is None else like(add, dx),
        below,
        beside,
        parts,
        *sizes,
        above_act,
        above_slope,
        below_act,
        below_slope,
        *weight.shape[2:],
        *stride,
        *padding,
        *dilation,
        WIDE=is_wide,
        BLOCK_M=block,
        BLOCK_C=BLOCK_K,
        ACC=TRITON_DTYPES[accumulator(dy.dtype)],
        num_warps=WARPS,
    )
    return dx, parts


@functools.lru_cache(4096)
def _plan_dgrad(
    dy_shape: torch.Size, height: int, width: int, with_sums: bool, block: int
) -> tuple[tuple[int, ...], tuple[int, int], bool]:
    """The kernel's sizes from pixels to per_split, its grid, and whether offsets need 64 bits."""
    batch, channels, out_height, out_width = dy_shape
    pixels = batch * height * width
    blocks, splits, per_split = split_tiles(pixels, block, channels, with_sums)
    count = batch * out_height * out_width
    sizes = (pixels, height, width, channels, out_height, out_width, count, per_split)
    is_wide = max(math.prod(dy_shape), pixels * channels) >= 2**30
    return sizes, (blocks, splits), is_wide


def _pixels(dtype: torch.dtype) -> int:
    """Of a tile."""
    return TILE_BYTES // (BLOCK_K * dtype.itemsize)


def _taps(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """[taps, C] of weight [C, 1, KH, KW], made once."""
    return weights.transformed(
        weight,
        ("taps", "depthwise", dtype),
        lambda w: w[:, 0].to(dtype).permute(1, 2, 0).flatten(0, 1).contiguous(),
    )
