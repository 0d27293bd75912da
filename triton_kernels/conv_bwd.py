"""conv_dgrad in Triton. Bytes of global memory per element of s bytes, what taps and blocks of channels read again from the cache
left out:
    conv_dgrad_kernel   read s per element of dz, write s per element of dx
    behind bn_bwd_apply            reads dy and z, 2 s, in place of dz
    without z, see conv_gram.py    reads db, s, in place of dz, and the z of the unit before, s per element of dx
    in front of bn_bwd_reduce      reads z of the unit below, s per element of dx (+ 1/8 with bits)
    added to a gradient            reads it, s per element of dx (s more with a unit beside)
An implicit GEMM: rows are pixels of dx, columns its channels, and the sum runs over taps and channels of dz. Strides divide the
pixels of dx into phases, each of which meets the same taps: a tile lies in one phase, and no product is with zeros.
"""

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from bnfast import weights
from bnfast.reference import Above, Below, Beside, Source, accumulator

from . import launch
from .activation import act_gradient, masked, pre_activation, unpack_bits
from .bn_fwd import bit_places, load_channels, load_norm, times
from .conv_fwd import BLOCK_J, BLOCK_K, BLOCK_M, THREADS, precision, split_tiles
from .conv_gram import gram_of_weights, load_source
from .launch import TRITON_DTYPES
from .layout import cdiv, empty_last, like


@triton.jit
def dz_of(
    dy, z, mean, scale, beta, shift_db, shift_z,
    ACT: tl.constexpr, SLOPE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Equation (9) for [pixels, channels]; DTYPE is y's."""
    pre = pre_activation(z, mean[None, :], scale[None, :], beta[None, :])
    db = act_gradient(pre, dy, DTYPE, ACT, SLOPE)
    return ((db - shift_db[None, :]) - (z - mean[None, :]) * shift_z[None, :]) * scale[None, :]


@triton.jit
def taken_up(
    acc,  # [BLOCK_M, BLOCK_J] of dx, at these offsets
    at,
    mask,
    pixel,
    m_mask,
    j,
    pixels,
    in_channels,
    add_ptr,
    below,
    beside,
    ACT: tl.constexpr,
    SLOPE: tl.constexpr,
    DTYPE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """What follows a data gradient: (dx to be stored, the tile's sums of db, db (z - mean), and the same beside)."""
    j_mask = j < in_channels
    sum_db = tl.zeros([BLOCK_J], ACC)
    sum_db_z = tl.zeros([BLOCK_J], ACC)
    sum_db_beside = tl.zeros([BLOCK_J], ACC)
    if add_ptr is not None:
        acc += tl.load(add_ptr + at, mask, 0).to(ACC)
    dx = acc.to(DTYPE)
    if below is not None:
        dy = dx.to(ACC)
        if below.z is not None:
            z = tl.load(below.z + at, mask, 0).to(ACC)
            mean, scale, beta = load_norm(below, j, j_mask, ACC)
        if below.bits is not None:
            places, there = bit_places(pixel, j, pixels, in_channels, BLOCK_J)
            packed = tl.load(below.bits + places, there & m_mask[:, None], 0)
            db = masked(unpack_bits(packed, BLOCK_M, BLOCK_J), dy, ACT, SLOPE)
        elif ACT == "identity":
            db = dy
        else:
            pre = pre_activation(z, mean[None, :], scale[None, :], beta[None, :])
            db = act_gradient(pre, dy, DTYPE, ACT, SLOPE)
        if below.bits is not None or ACT == "silu" or ACT == "hardswish":
            dx = db.to(DTYPE)
            db = dx.to(ACC)
        # Outside the tensor dx is 0, but 0 times an infinite slope or distance would not be.
        db = tl.where(mask, db, 0)
        sum_db = tl.sum(db, 0)
        if below.z is not None:
            sum_db_z = tl.sum(tl.where(mask, db * (z - mean[None, :]), 0), 0)
        if beside is not None:
            z = tl.load(beside.z + at, mask, 0).to(ACC)
            mean = tl.load(beside.mean + j, j_mask, 0)
            sum_db_beside = tl.sum(tl.where(mask, db * (z - mean[None, :]), 0), 0)
    return dx, sum_db, sum_db_z, sum_db_beside


@triton.jit
def store_sums(part_ptr, split, j, in_channels, sum_db, sum_db_z, sum_db_beside, beside):
    """One split's partial sums into [2 or with beside 3, splits, J]."""
    place = part_ptr + split * in_channels + j
    row_size = tl.num_programs(1) * in_channels
    tl.store(place, sum_db, j < in_channels)
    tl.store(place + row_size, sum_db_z, j < in_channels)
    if beside is not None:
        tl.store(place + 2 * row_size, sum_db_beside, j < in_channels)


@triton.jit
def conv_dgrad_kernel(
    dy_ptr,  # [N, OH, OW, K]: dz, or dy with above
    above,  # reference.Above of the z of dy, or None
    source,  # reference.Source of the convolution's input where above has no z, or None
    q_ptr,  # [J, J]: -Q of equation (20) with source, or None
    w_ptr,  # [taps, K, J]
    dx_ptr,  # [N, H, W, J]
    add_ptr,  # as dx: added to it; or None
    below,  # reference.Below of dx, or None
    beside,  # reference.Beside of dx, or None
    part_ptr,  # [2 or with beside 3, splits, J] in ACC: sum(db), sum(db (z - mean)), the same beside; or None
    pixels,  # N H W
    height,
    width,
    in_channels,
    out_height,
    out_width,
    out_channels,
    phase_height,  # ceil(H / STRIDE_H)
    phase_width,
    phase_pixels,  # N phase_height phase_width
    phase_tiles,
    count,  # values per channel of dy
    per_split,
    ABOVE_ACT: tl.constexpr,
    ABOVE_SLOPE: tl.constexpr,
    SOURCE_ACT: tl.constexpr,
    SOURCE_SLOPE: tl.constexpr,
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
    BLOCK_J: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """per_split tiles of pixels of dx."""
    DTYPE: tl.constexpr = dx_ptr.dtype.element_ty
    split = tl.program_id(1)
    j = tl.program_id(0) * BLOCK_J + tl.arange(0, BLOCK_J)
    j_mask = j < in_channels
    sum_db = tl.zeros([BLOCK_J], ACC)
    sum_db_z = tl.zeros([BLOCK_J], ACC)
    sum_db_beside = tl.zeros([BLOCK_J], ACC)
    for tile in range(split * per_split, (split + 1) * per_split):
        phase = tile // phase_tiles
        m = times(tile % phase_tiles, BLOCK_M, WIDE) + tl.arange(0, BLOCK_M)
        column = m % phase_width
        row = m // phase_width % phase_height
        image = m // (phase_width * phase_height)
        ih = row * STRIDE_H + phase // STRIDE_W
        iw = column * STRIDE_W + phase % STRIDE_W
        m_mask = (m < phase_pixels) & (phase < STRIDE_H * STRIDE_W) & (ih < height) & (iw < width)
        acc = tl.zeros([BLOCK_M, BLOCK_J], ACC)
        for tap in range(TAPS_H * TAPS_W):
            # The pixel of dz that meets dx at this tap, times the stride.
            down = phase // STRIDE_W + PADDING_H - tap // TAPS_W * DILATION_H
            across = phase % STRIDE_W + PADDING_W - tap % TAPS_W * DILATION_W
            if (down % STRIDE_H == 0) & (across % STRIDE_W == 0):
                oh = row + down // STRIDE_H
                ow = column + across // STRIDE_W
                inside = m_mask & (oh >= 0) & (oh < out_height) & (ow >= 0) & (ow < out_width)
                first = ((image * out_height + oh) * out_width + ow) * out_channels
                for start in range(0, out_channels, BLOCK_K):
                    k = start + tl.arange(0, BLOCK_K)
                    k_mask = k < out_channels
                    valid = inside[:, None] & k_mask[None, :]
                    at = first[:, None] + k[None, :]
                    dz = tl.load(dy_ptr + at, valid, 0)
                    if source is not None:
                        scale = load_channels(above.gamma, k, k_mask, 1, ACC)
                        scale *= tl.load(above.rstd + k, k_mask, 0)
                        shift_db = tl.load(above.dbeta + k, k_mask, 0) / count
                        db = dz.to(ACC) - shift_db[None, :]
                        dz = tl.where(valid, db * scale[None, :], 0).to(DTYPE)
                    elif above is not None:
                        mean, scale, beta = load_norm(above, k, k_mask, ACC)
                        rstd = tl.load(above.rstd + k, k_mask, 0)
                        shift_db = tl.load(above.dbeta + k, k_mask, 0) / count
                        shift_z = rstd * tl.load(above.dgamma + k, k_mask, 0) / count
                        z = tl.load(above.z + at, valid, 0).to(ACC)
                        dz = dz_of(
                            dz.to(ACC), z, mean, scale, beta, shift_db, shift_z,
                            ABOVE_ACT, ABOVE_SLOPE, DTYPE,
                        )  # fmt: skip
                        dz = tl.where(valid, dz, 0).to(DTYPE)
                    w_at = (tap * out_channels + k)[:, None] * in_channels + j[None, :]
                    w = tl.load(w_ptr + w_at, k_mask[:, None] & j_mask[None, :], 0)
                    acc = tl.dot(dz, w, acc, input_precision=PRECISION, out_dtype=ACC)
        pixel = (image * height + ih) * width + iw
        if source is not None:
            for start in range(0, in_channels, BLOCK_K):
                i = start + tl.arange(0, BLOCK_K)
                mean_x = tl.load(source.mean_x + i, i < in_channels, 0)
                x = load_source(
                    source.z, source, mean_x, pixel, m_mask, i, in_channels,
                    SOURCE_ACT, SOURCE_SLOPE, ACC,
                )  # fmt: skip
                q_mask = (i < in_channels)[:, None] & j_mask[None, :]
                q = tl.load(q_ptr + i[:, None] * in_channels + j[None, :], q_mask, 0)
                acc = tl.dot(x, q, acc, input_precision=PRECISION, out_dtype=ACC)
        at = pixel[:, None] * in_channels + j[None, :]
        mask = m_mask[:, None] & j_mask[None, :]
        dx, db, db_z, db_beside = taken_up(
            acc, at, mask, pixel, m_mask, j, pixels, in_channels, add_ptr, below, beside,
            BELOW_ACT, BELOW_SLOPE, DTYPE, ACC, BLOCK_M, BLOCK_J,
        )  # fmt: skip
        sum_db += db
        sum_db_z += db_z
        sum_db_beside += db_beside
        tl.store(dx_ptr + at, dx, mask)
    if part_ptr is not None:
        store_sums(part_ptr, split, j, in_channels, sum_db, sum_db_z, sum_db_beside, beside)


def launch_dgrad(
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
    add: Tensor | None,
    below: Below | None,
    below_act: str,
    below_slope: float,
    beside: Beside | None,
) -> tuple[Tensor, Tensor | None]:
    """(dx, partial sums or None); dy [N, K, *], dx [N, J, *input_size]."""
    packed = weights.transformed(weight, ("taps of dgrad", dy.dtype), lambda w: _taps(w, dy.dtype))
    if above is None or above.z is None:
        dy = dy.contiguous(memory_format=torch.channels_last)
    else:
        dy = like(dy, above.z)
    in_channels = weight.shape[1]
    with_sums = beside is not None or (below is not None and below.z is not None)
    sizes, grid, is_wide = _plan(dy.shape, in_channels, *input_size, *stride, with_sums)
    dx = empty_last(dy, dy.shape[0], in_channels, *input_size)
    if dx.numel() == 0:
        return dx, None
    acc = accumulator(dy.dtype)
    parts = q = None
    if source is not None:
        q = gram_of_weights(weight, above, dy.dtype, dy.numel() // dy.shape[1])
    if with_sums:
        sums = 2 if beside is None else 3
        parts = below.rstd.new_empty(sums, grid[1], in_channels)
    conv_dgrad_kernel[grid](
        dy,
        above,
        source,
        q,
        packed,
        dx,
        None if add is None else like(add, dx),
        below,
        beside,
        parts,
        *sizes,
        above_act,
        above_slope,
        source_act,
        source_slope,
        below_act,
        below_slope,
        *weight.shape[2:],
        *stride,
        *padding,
        *dilation,
        WIDE=is_wide,
        BLOCK_M=BLOCK_M,
        BLOCK_J=BLOCK_K,
        BLOCK_K=BLOCK_J,
        ACC=TRITON_DTYPES[acc],
        PRECISION=precision(dy.dtype),
        num_warps=THREADS // launch.LANES,
        num_stages=2 if dy.dtype.itemsize == 2 else 1,
    )
    return dx, parts


@functools.lru_cache(4096)
def _plan(
    dy_shape: torch.Size,
    in_channels: int,
    height: int,
    width: int,
    stride_height: int,
    stride_width: int,
    with_sums: bool,
) -> tuple[tuple[int, ...], tuple[int, int], bool]:
    """The kernel's sizes from pixels to per_split, its grid, and whether offsets need 64 bits."""
    batch, out_channels, out_height, out_width = dy_shape
    phase_height, phase_width = cdiv(height, stride_height), cdiv(width, stride_width)
    phase_pixels = batch * phase_height * phase_width
    phase_tiles = cdiv(phase_pixels, BLOCK_M)
    tiles = stride_height * stride_width * phase_tiles
    blocks, splits, per_split = split_tiles(tiles * BLOCK_M, BLOCK_M, in_channels, with_sums)
    sizes = (
        batch * height * width, height, width, in_channels, out_height, out_width, out_channels,
        phase_height, phase_width, phase_pixels, phase_tiles, batch * out_height * out_width, per_split,
    )  # fmt: skip
    is_wide = max(math.prod(dy_shape), batch * in_channels * height * width) >= 2**30
    return sizes, (blocks, splits), is_wide


def _taps(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """[taps, K, J] of weight [K, J, KH, KW]."""
    return weight.to(dtype).permute(2, 3, 0, 1).flatten(0, 1).contiguous()
