"""bn_fwd_reduce and bn_fwd_apply in Triton. Bytes of global memory per element of s bytes:
    bn_fwd_reduce_kernel   read s                         partial moments, a few per channel
    finalise_moments_kernel                               channel-sized
    bn_fwd_apply_kernel    read s (+ s), write s (+ 1/8)  with residual, with bits
No atomics: partial results have their own places and merge in a fixed order. The second phase walks from the end to the
beginning, so that it begins with what the first left in the L2 cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bnfast.reference import Norm, accumulator, rstd_of

from .activation import act_passes, act_value, pack_bits, pre_activation
from .launch import TRITON_DTYPES, device_of, no_elements, three
from .layout import (
    WARPS,
    View,
    cdiv,
    dense,
    is_wide,
    like,
    next_power_of_2,
    split_of,
    tile_of,
    view_of,
)


@triton.jit
def load_sum(high, low, lowest, ACC: tl.constexpr):
    """[1] of a float64 argument that comes as the sum of three float32."""
    return tl.full([1], high, ACC) + (tl.full([1], low, ACC) + tl.full([1], lowest, ACC))


@triton.jit
def spread(values, CHANNEL_IS_COLUMN: tl.constexpr):
    """Channel values along a tile's columns or rows."""
    if CHANNEL_IS_COLUMN:
        values = values[None, :]
    else:
        values = values[:, None]
    return values


@triton.jit
def times(index, size, WIDE: tl.constexpr):
    """index * size; of 64 bits where offsets need them: Triton's indices have 32."""
    return tl.full([], size, tl.int64 if WIDE else tl.int32) * index


@triton.jit
def reduced_tile(
    tile,
    c,
    rows,
    columns,
    channels,
    CHANNEL_IS_COLUMN: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Of a tile of channels c: element offsets, mask, values per channel, rows, columns. Tiles of channels_last follow each
    other down the rows; those of planes lie in one image each, side by side, then in the next image. A tile behind the last
    one is empty."""
    if CHANNEL_IS_COLUMN:
        first = times(tile, BLOCK_R, WIDE)
        r = first + tl.arange(0, BLOCK_R)
        column = c
        n = tl.minimum(BLOCK_R, rows - first)
        mask = (r < rows)[:, None] & (c < channels)[None, :]
    else:
        across = tl.cdiv(columns, BLOCK_C)
        start = tile % across * BLOCK_C
        image = tile // across
        column = start + tl.arange(0, BLOCK_C)
        first = times(image, channels, WIDE)
        r = first + c
        n = tl.where(first < rows, tl.minimum(BLOCK_C, columns - start), 0)
        mask = ((c < channels) & (r < rows))[:, None] & (column < columns)[None, :]
    return r[:, None] * columns + column[None, :], mask, tl.maximum(n, 0), r, column


@triton.jit
def origin_of(z, n, AXIS: tl.constexpr):
    """The mean of a split's first tile, z being 0 outside of the tensor: moments are taken of the distance from it, so that the size
    of the mean costs no digits, however many tiles are merged. 0 where it is no number to count from."""
    origin = tl.sum(z, AXIS) / tl.maximum(n, 1)
    return tl.where(tl.abs(origin) < float("inf"), origin, 0)


@triton.jit
def merge_tile(z, mask, n, mean, m2, count, CHANNEL_IS_COLUMN: tl.constexpr):
    """Chan's merge of a tile's n values per channel, counted from the origin, with (mean, M2, count) of the tiles before:
    N = na + nb, e = mean_b - mean_a, mean = mean_a + e nb / N, M2 = M2_a + M2_b + e^2 na nb / N. z is 0 outside of mask."""
    AXIS: tl.constexpr = 0 if CHANNEL_IS_COLUMN else 1
    one_over_n = 1 / tl.maximum(n, 1)
    centre = tl.sum(z, AXIS) * one_over_n
    d = tl.where(mask, z - spread(centre, CHANNEL_IS_COLUMN), 0)
    # The squares are taken around a rounded mean: sum(d) corrects both.
    rest = tl.sum(d, AXIS)
    square = tl.sum(d * d, AXIS) - rest * rest * one_over_n
    total = count + n
    weight = n / tl.maximum(total, 1)
    step = centre + rest * one_over_n - mean
    return mean + step * weight, m2 + square + step * step * (count * weight), total


@triton.jit
def store_moments(part_ptr, split, c, channels, origin, mean, m2, count):
    """One split's partial result into [splits, 3 C + 1]; the number of values is the same for all channels. The mean, counted from
    the origin, goes there as two numbers whose sum it is: where it is large, one would not tell splits apart to the last digit."""
    high = origin + mean
    of_mean = high - origin
    low = (origin - (high - of_mean)) + (mean - of_mean)
    row = part_ptr + split * (3 * channels + 1)
    tl.store(row + c, high, c < channels)
    tl.store(row + channels + c, low, c < channels)
    tl.store(row + 2 * channels + c, m2, c < channels)
    tl.store(row + 3 * channels + c * 0, count, c == 0)


@triton.jit
def bn_fwd_reduce_kernel(
    z_ptr,  # [rows, columns]
    part_ptr,  # [splits, 3 C + 1] in ACC: mean as the sum of two and M2 per channel, number of values
    tracked_ptr,  # [] int64 or None
    rows,
    columns,
    channels,
    per_split,
    CHANNEL_IS_COLUMN: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
):
    """Moments of one split."""
    CHANNELS: tl.constexpr = BLOCK_C if CHANNEL_IS_COLUMN else BLOCK_R
    AXIS: tl.constexpr = 0 if CHANNEL_IS_COLUMN else 1
    split = tl.program_id(1)
    if tracked_ptr is not None and tl.program_id(0) + split == 0:
        tl.store(tracked_ptr, tl.load(tracked_ptr) + 1)
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    origin = tl.zeros([CHANNELS], ACC)
    mean = tl.zeros([CHANNELS], ACC)
    m2 = tl.zeros([CHANNELS], ACC)
    count = tl.zeros([CHANNELS], ACC)
    first = split * per_split
    for tile in range(first, first + per_split):
        at, mask, values, _, _ = reduced_tile(
            tile, c, rows, columns, channels, CHANNEL_IS_COLUMN, WIDE, BLOCK_R, BLOCK_C
        )
        z = tl.load(z_ptr + at, mask, 0).to(ACC)
        if tile == first:
            origin = origin_of(z, values.to(ACC), AXIS)
        z = tl.where(mask, z - spread(origin, CHANNEL_IS_COLUMN), 0)
        mean, m2, count = merge_tile(z, mask, values.to(ACC), mean, m2, count, CHANNEL_IS_COLUMN)
    store_moments(part_ptr, split, c, channels, origin, mean, m2, count)


@triton.jit
def update_running(ptr, c, mask, batch, factor):
    """Equation (4)."""
    old = tl.load(ptr + c, mask, 0).to(batch.dtype)
    tl.store(ptr + c, (1 - factor) * old + factor * batch, mask)


@triton.jit
def store_statistics(
    c,
    mask,
    mean,
    m2,
    count,
    rstd_ptr,
    running_mean_ptr,
    running_var_ptr,
    tracked_ptr,
    momentum,
    momentum_low,
    momentum_lowest,
    eps,
    eps_low,
    eps_lowest,
    ACC: tl.constexpr,
):
    """Equations (3) and (4) of channels c; returns rstd."""
    shifted = m2 / tl.maximum(count, 1) + load_sum(eps, eps_low, eps_lowest, ACC)
    # The rounded square root exists for float32 alone; that of float64 always rounds.
    root = tl.sqrt(shifted) if ACC == tl.float64 else tl.sqrt_rn(shifted)
    rstd = tl.where(shifted == 0, 0, 1 / root)
    tl.store(rstd_ptr + c, rstd, mask)
    if tracked_ptr is not None:
        factor = 1 / tl.load(tracked_ptr).to(ACC)
    else:
        factor = load_sum(momentum, momentum_low, momentum_lowest, ACC)
    if running_mean_ptr is not None:
        update_running(running_mean_ptr, c, mask, mean, factor)
    if running_var_ptr is not None:
        update_running(running_var_ptr, c, mask, m2 / tl.maximum(count - 1, 1), factor)
    return rstd


@triton.jit
def finalise_moments_kernel(
    part_ptr,  # [splits, 3 C + 1] in ACC
    mean_ptr,  # [C] in ACC
    m2_ptr,  # or None
    rstd_ptr,
    running_mean_ptr,  # [C] or None
    running_var_ptr,
    tracked_ptr,  # [] int64: the momentum is one over it; or None
    momentum,
    momentum_low,
    momentum_lowest,
    eps,
    eps_low,
    eps_lowest,
    channels,
    splits,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
):
    """Chan's formula for all splits at once, rstd, and the running statistics: equations (1) to (4)."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    s = tl.arange(0, BLOCK_S)
    mask = c < channels
    inside = (s < splits)[:, None] & mask[None, :]
    row = part_ptr + s * (3 * channels + 1)
    at = row[:, None] + c[None, :]
    n = tl.load(row + 3 * channels, s < splits, 0)
    count = tl.sum(n, 0)
    n = n[:, None]
    one_over_count = 1 / tl.maximum(count, 1)
    # From the first split's mean: the difference of two that lie close is exact.
    origin = tl.load(part_ptr + c, mask, 0)
    part_mean = (tl.load(at, inside, 0) - origin[None, :]) + tl.load(at + channels, inside, 0)
    part_mean = tl.where(inside, part_mean, 0)
    mean = tl.sum(n * part_mean, 0) * one_over_count
    d = tl.where(inside, part_mean - mean[None, :], 0)
    mean += origin
    m2 = tl.sum(tl.load(at + 2 * channels, inside, 0) + n * d * d, 0)
    tl.store(mean_ptr + c, mean, mask)
    if m2_ptr is not None:
        tl.store(m2_ptr + c, m2, mask)
    store_statistics(
        c, mask, mean, m2, count, rstd_ptr, running_mean_ptr, running_var_ptr, tracked_ptr, momentum,
        momentum_low, momentum_lowest, eps, eps_low, eps_lowest, ACC,
    )  # fmt: skip


@triton.jit
def load_channels(ptr, c, mask, default, ACC: tl.constexpr):
    """A channel vector's values at c; the default where there is no vector."""
    if ptr is None:
        values = tl.full(c.shape, default, ACC)
    else:
        values = tl.load(ptr + c, mask, 0).to(ACC)
    return values


@triton.jit
def load_norm(norm, c, mask, ACC: tl.constexpr):
    """Mean, scale and beta of channels c from a reference.Norm."""
    scale = load_channels(norm.gamma, c, mask, 1, ACC) * tl.load(norm.rstd + c, mask, 0)
    return tl.load(norm.mean + c, mask, 0), scale, load_channels(norm.beta, c, mask, 0, ACC)


@triton.jit
def tile_offsets(
    rows,
    columns,
    channels,
    WIDE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    CHANNEL_IS_COLUMN: tl.constexpr,
):
    """Of the tile of this program, counted from the end: element offsets, mask, channels, their mask, rows, columns."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    across = tl.cdiv(columns, BLOCK_C)
    r = times(tile // across, BLOCK_R, WIDE) + tl.arange(0, BLOCK_R)
    column = tile % across * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (r < rows)[:, None] & (column < columns)[None, :]
    at = r[:, None] * columns + column[None, :]
    if CHANNEL_IS_COLUMN:
        c = column
        c_mask = column < columns
    else:
        c = (r % channels).to(tl.int32)
        c_mask = r < rows
    return at, mask, c, c_mask, r, column


@triton.jit
def bit_places(r, column, rows, columns, BLOCK_C: tl.constexpr):
    """Offsets [rows, columns / 8] of a tile's bytes of bits, and their mask."""
    bytes_per_row = tl.cdiv(columns, 8)
    byte = tl.min(column, 0) // 8 + tl.arange(0, BLOCK_C // 8)
    return r[:, None] * bytes_per_row + byte[None, :], (r < rows)[:, None] & (byte < bytes_per_row)[
        None, :
    ]


@triton.jit
def bn_fwd_apply_kernel(
    z_ptr,  # [rows, columns]
    residual_ptr,  # as z, or None
    residual_norm,  # reference.Norm of a residual that is itself a z, or None
    y_ptr,
    bits_ptr,  # [rows, ceil(columns / 8)] uint8, or None
    mean_ptr,  # [C] in ACC
    rstd_ptr,
    gamma_ptr,  # [C] or None
    beta_ptr,
    rows,
    columns,
    channels,
    ACT: tl.constexpr,
    SLOPE: tl.constexpr,
    CHANNEL_IS_COLUMN: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
):
    """Equations (5) and (6)."""
    at, mask, c, c_mask, r, column = tile_offsets(
        rows, columns, channels, WIDE, BLOCK_R, BLOCK_C, CHANNEL_IS_COLUMN
    )
    mean = tl.load(mean_ptr + c, c_mask, 0)
    scale = load_channels(gamma_ptr, c, c_mask, 1, ACC) * tl.load(rstd_ptr + c, c_mask, 0)
    beta = load_channels(beta_ptr, c, c_mask, 0, ACC)
    z = tl.load(z_ptr + at, mask, 0).to(ACC)
    pre = pre_activation(
        z,
        spread(mean, CHANNEL_IS_COLUMN),
        spread(scale, CHANNEL_IS_COLUMN),
        spread(beta, CHANNEL_IS_COLUMN),
    )
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + at, mask, 0).to(ACC)
        if residual_norm is not None:
            mean, scale, beta = load_norm(residual_norm, c, c_mask, ACC)
            residual = pre_activation(
                residual,
                spread(mean, CHANNEL_IS_COLUMN),
                spread(scale, CHANNEL_IS_COLUMN),
                spread(beta, CHANNEL_IS_COLUMN),
            )
            residual = residual.to(y_ptr.dtype.element_ty).to(ACC)
        pre += residual
    y = act_value(pre, ACT, SLOPE).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + at, y, mask)
    if bits_ptr is not None:
        passes = act_passes(pre, y_ptr.dtype.element_ty, ACT)
        places, inside = bit_places(r, column, rows, columns, BLOCK_C)
        tl.store(bits_ptr + places, pack_bits(passes, BLOCK_R, BLOCK_C), inside)


def finalise_moments(
    parts: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
    with_m2: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """mean, M2 (where asked for) and rstd [C] from the partial results [splits, 3 C + 1]; at most `layout.MOST_SPLITS` splits."""
    splits, channels = parts.shape
    channels //= 3
    mean = parts.new_empty(channels)
    rstd, m2 = torch.empty_like(mean), torch.empty_like(mean) if with_m2 else None
    block = 16
    finalise_moments_kernel[(cdiv(channels, block),)](
        parts,
        mean,
        m2,
        rstd,
        running_mean,
        running_var,
        num_batches_tracked if momentum is None and running_mean is not None else None,
        *three(momentum or 0.0),
        *three(eps),
        channels,
        splits,
        BLOCK_S=next_power_of_2(splits),
        BLOCK_C=block,
        ACC=TRITON_DTYPES[parts.dtype],
        num_warps=WARPS,
    )
    return mean, m2, rstd


def reduce_dense(
    z: Tensor,
    view: View,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
    with_m2: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """bn_fwd_reduce of a dense z, M2 where asked for."""
    acc = accumulator(z.dtype)
    if z.numel() == 0:
        if num_batches_tracked is not None:
            num_batches_tracked.add_(1)
        mean = torch.zeros(z.shape[1], dtype=acc, device=z.device)
        return mean, mean.clone(), rstd_of(mean, eps)
    split = split_of(view)
    parts = z.new_empty(split.splits, 3 * view.channels + 1, dtype=acc)
    bn_fwd_reduce_kernel[(split.blocks, split.splits)](
        z,
        parts,
        num_batches_tracked,
        view.rows,
        view.columns,
        view.channels,
        split.per_split,
        CHANNEL_IS_COLUMN=view.channel_is_column,
        WIDE=is_wide(view),
        BLOCK_R=split.rows,
        BLOCK_C=split.columns,
        ACC=TRITON_DTYPES[acc],
        num_warps=WARPS,
    )
    running = (running_mean, running_var, num_batches_tracked)
    return finalise_moments(parts, *running, momentum, eps, with_m2)


def apply_dense(
    z: Tensor,
    view: View,
    mean: Tensor,
    rstd: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    act: str,
    slope: float,
    want_bits: bool,
    residual_norm: Norm | None = None,
) -> tuple[Tensor, Tensor]:
    """bn_fwd_apply, or bn_fwd_apply_both, of a dense z."""
    y = torch.empty_like(z)
    bits = z.new_empty(view.bit_bytes, dtype=torch.uint8) if want_bits else no_elements(z.device)
    if z.numel() == 0:
        return y, bits
    rows, columns = tile_of(view)
    bn_fwd_apply_kernel[(cdiv(view.rows, rows) * cdiv(view.columns, columns),)](
        z,
        None if residual is None else like(residual, z),
        residual_norm,
        y,
        bits if want_bits else None,
        mean,
        rstd,
        gamma,
        beta,
        view.rows,
        view.columns,
        view.channels,
        ACT=act,
        SLOPE=slope,
        CHANNEL_IS_COLUMN=view.channel_is_column,
        WIDE=is_wide(view),
        BLOCK_R=rows,
        BLOCK_C=columns,
        ACC=TRITON_DTYPES[mean.dtype],
        num_warps=WARPS,
    )
    return y, bits


def bn_fwd_apply(z: Tensor, *args) -> tuple[Tensor, Tensor]:
    """See reference.bn_fwd_apply."""
    with device_of(z):
        z = dense(z)
        return apply_dense(z, view_of(z), *args)


def bn_fwd_apply_both(
    z: Tensor,
    norm: Norm,
    residual_z: Tensor,
    residual_norm: Norm,
    act: str,
    slope: float,
    want_bits: bool,
) -> tuple[Tensor, Tensor]:
    """See reference.bn_fwd_apply_both."""
    return bn_fwd_apply(z, *norm, residual_z, act, slope, want_bits, residual_norm)
