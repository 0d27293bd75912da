"""bn_bwd_reduce and bn_bwd_apply in Triton. Bytes of global memory per element of s bytes:
    bn_bwd_reduce_kernel   read 2 s (+ s, + 1/8)            with the residual of a smooth activation, with bits
    finalise_sums_kernel                                    channel-sized
    bn_bwd_apply_kernel    read 2 s (+ s, + 1/8), write s (+ s)   with dresidual
Order and determinism as in bn_fwd.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation import act_gradient, masked, pre_activation, unpack_bits
from .bn_fwd import bit_places, load_channels, reduced_tile, spread, tile_offsets
from .launch import TRITON_DTYPES, check_writable, device_of, no_elements
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
def gradient(
    dy,
    z,
    residual_ptr,
    bits_ptr,
    at,
    mask,
    r,
    column,
    rows,
    columns,
    mean,
    scale,
    beta,
    DTYPE: tl.constexpr,
    ACT: tl.constexpr,
    SLOPE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
):
    """db of a tile, equation (7): the slope from the bits where there are any, else from the pre-activation."""
    if ACT == "identity":
        db = dy
    elif bits_ptr is not None:
        places, inside = bit_places(r, column, rows, columns, BLOCK_C)
        packed = tl.load(bits_ptr + places, inside, 0)
        db = masked(unpack_bits(packed, BLOCK_R, BLOCK_C), dy, ACT, SLOPE)
    else:
        pre = pre_activation(z, mean, scale, beta)
        if residual_ptr is not None:
            pre += tl.load(residual_ptr + at, mask, 0).to(ACC)
        db = act_gradient(pre, dy, DTYPE, ACT, SLOPE)
    return db


@triton.jit
def bn_bwd_reduce_kernel(
    dy_ptr,  # [rows, columns]
    z_ptr,
    residual_ptr,  # as z, or None
    bits_ptr,  # [rows, ceil(columns / 8)] uint8, or None
    part_ptr,  # [2, splits, C] in ACC: sum(db), sum(db (z - mean))
    mean_ptr,  # [C] in ACC
    rstd_ptr,
    gamma_ptr,  # [C] or None
    beta_ptr,
    rows,
    columns,
    channels,
    per_split,
    ACT: tl.constexpr,
    SLOPE: tl.constexpr,
    CHANNEL_IS_COLUMN: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
):
    """The sums of one split of equation (8); a tile's elements add up in registers and are reduced once, at the end."""
    AXIS: tl.constexpr = 0 if CHANNEL_IS_COLUMN else 1
    CHANNELS: tl.constexpr = BLOCK_C if CHANNEL_IS_COLUMN else BLOCK_R
    split = tl.program_id(1)
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    inside = c < channels
    mean = spread(tl.load(mean_ptr + c, inside, 0), CHANNEL_IS_COLUMN)
    scale = load_channels(gamma_ptr, c, inside, 1, ACC) * tl.load(rstd_ptr + c, inside, 0)
    scale = spread(scale, CHANNEL_IS_COLUMN)
    beta = spread(load_channels(beta_ptr, c, inside, 0, ACC), CHANNEL_IS_COLUMN)
    sum_db = tl.zeros([BLOCK_R, BLOCK_C], ACC)
    sum_db_z = tl.zeros([BLOCK_R, BLOCK_C], ACC)
    for tile in range(split * per_split, (split + 1) * per_split):
        at, mask, _, r, column = reduced_tile(
            tile, c, rows, columns, channels, CHANNEL_IS_COLUMN, WIDE, BLOCK_R, BLOCK_C
        )
        z = tl.load(z_ptr + at, mask, 0).to(ACC)
        dy = tl.load(dy_ptr + at, mask, 0).to(ACC)
        db = gradient(
            dy,
            z,
            residual_ptr,
            bits_ptr,
            at,
            mask,
            r,
            column,
            rows,
            columns,
            mean,
            scale,
            beta,
            z_ptr.dtype.element_ty,
            ACT,
            SLOPE,
            BLOCK_R,
            BLOCK_C,
            ACC,
        )
        # Outside the tensor dy is 0, but 0 times an infinite slope or distance would not be.
        sum_db += tl.where(mask, db, 0)
        sum_db_z += tl.where(mask, db * (z - mean), 0)
    part_ptr += split * channels + c
    tl.store(part_ptr, tl.sum(sum_db, AXIS), inside)
    tl.store(part_ptr + tl.num_programs(1) * channels, tl.sum(sum_db_z, AXIS), inside)


@triton.jit
def finalise_sums_kernel(
    part_ptr,  # [sums, splits, C] in ACC: sum(db), then sums of db (z - mean)
    rstd_ptr,  # [C]
    dgamma_ptr,  # [C]
    dbeta_ptr,
    which,  # of the sums is dgamma's
    channels,
    splits,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Equation (8) from the partial sums."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    s = tl.arange(0, BLOCK_S)
    mask = c < channels
    inside = (s < splits)[:, None] & mask[None, :]
    at = part_ptr + s[:, None] * channels + c[None, :]
    dbeta = tl.sum(tl.load(at, inside, 0), 0)
    products = tl.sum(tl.load(at + which * splits * channels, inside, 0), 0)
    dgamma = products * tl.load(rstd_ptr + c, mask, 0)
    tl.store(dgamma_ptr + c, dgamma, mask)
    tl.store(dbeta_ptr + c, dbeta, mask)


@triton.jit
def bn_bwd_apply_kernel(
    dy_ptr,  # [rows, columns]
    z_ptr,
    residual_ptr,  # as z, or None
    bits_ptr,  # [rows, ceil(columns / 8)] uint8, or None
    dz_ptr,  # may be dy_ptr: an element is read before it is written
    dresidual_ptr,  # or None
    mean_ptr,  # [C] in ACC
    rstd_ptr,
    gamma_ptr,  # [C] or None
    beta_ptr,
    dgamma_ptr,  # [C] in ACC, or None where the statistics are constants
    dbeta_ptr,
    rows,
    columns,
    channels,
    count,
    ACT: tl.constexpr,
    SLOPE: tl.constexpr,
    CHANNEL_IS_COLUMN: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
):
    """Equations (9) to (11)."""
    at, mask, c, c_mask, r, column = tile_offsets(
        rows, columns, channels, WIDE, BLOCK_R, BLOCK_C, CHANNEL_IS_COLUMN
    )
    rstd = tl.load(rstd_ptr + c, c_mask, 0)
    mean = spread(tl.load(mean_ptr + c, c_mask, 0), CHANNEL_IS_COLUMN)
    scale = spread(load_channels(gamma_ptr, c, c_mask, 1, ACC) * rstd, CHANNEL_IS_COLUMN)
    beta = spread(load_channels(beta_ptr, c, c_mask, 0, ACC), CHANNEL_IS_COLUMN)
    z = tl.load(z_ptr + at, mask, 0).to(ACC)
    dy = tl.load(dy_ptr + at, mask, 0).to(ACC)
    db = gradient(
        dy,
        z,
        residual_ptr,
        bits_ptr,
        at,
        mask,
        r,
        column,
        rows,
        columns,
        mean,
        scale,
        beta,
        z_ptr.dtype.element_ty,
        ACT,
        SLOPE,
        BLOCK_R,
        BLOCK_C,
        ACC,
    )
    if dresidual_ptr is not None:
        tl.store(dresidual_ptr + at, db.to(dresidual_ptr.dtype.element_ty), mask)
    if dgamma_ptr is not None:
        shift_db = spread(tl.load(dbeta_ptr + c, c_mask, 0) / count, CHANNEL_IS_COLUMN)
        shift_z = spread(rstd * tl.load(dgamma_ptr + c, c_mask, 0) / count, CHANNEL_IS_COLUMN)
        db = (db - shift_db) - (z - mean) * shift_z
    tl.store(dz_ptr + at, (db * scale).to(dz_ptr.dtype.element_ty), mask)


def reduce_dense(
    dy: Tensor,
    z: Tensor,
    view: View,
    mean: Tensor,
    rstd: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    bits: Tensor | None,
    act: str,
    slope: float,
) -> tuple[Tensor, Tensor]:
    """bn_bwd_reduce of a dense z, and dy as it lies."""
    if z.numel() == 0:
        zero = torch.zeros_like(mean)
        return zero, zero.clone()
    split = split_of(view)
    parts = mean.new_empty(2, split.splits, view.channels)
    bn_bwd_reduce_kernel[(split.blocks, split.splits)](
        dy,
        z,
        None if residual is None else like(residual, z),
        bits,
        parts,
        mean,
        rstd,
        gamma,
        beta,
        view.rows,
        view.columns,
        view.channels,
        split.per_split,
        ACT=act,
        SLOPE=slope,
        CHANNEL_IS_COLUMN=view.channel_is_column,
        WIDE=is_wide(view),
        BLOCK_R=split.rows,
        BLOCK_C=split.columns,
        ACC=TRITON_DTYPES[mean.dtype],
        num_warps=WARPS,
    )
    return finalise_sums(parts, rstd)


def finalise_sums(parts: Tensor, rstd: Tensor, which: int = 1) -> tuple[Tensor, Tensor]:
    """(dgamma, dbeta) [C] from partial sums [sums, splits, C]; at most `layout.MOST_SPLITS` splits."""
    _, splits, channels = parts.shape
    dgamma, dbeta = torch.empty_like(rstd), torch.empty_like(rstd)
    block = 16
    finalise_sums_kernel[(cdiv(channels, block),)](
        parts,
        rstd,
        dgamma,
        dbeta,
        which,
        channels,
        splits,
        BLOCK_S=next_power_of_2(splits),
        BLOCK_C=block,
        num_warps=WARPS,
    )
    return dgamma, dbeta


def apply_dense(
    dy: Tensor,
    dz: Tensor,
    z: Tensor,
    view: View,
    mean: Tensor,
    rstd: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    bits: Tensor | None,
    dgamma: Tensor | None,
    dbeta: Tensor | None,
    act: str,
    slope: float,
    want_dresidual: bool,
) -> Tensor:
    """dz, which may be dy, of a dense z, and dy as it lies; returns dresidual."""
    dresidual = torch.empty_like(z) if want_dresidual else no_elements(z.device, z.dtype)
    if z.numel() == 0:
        return dresidual
    rows, columns = tile_of(view)
    bn_bwd_apply_kernel[(cdiv(view.rows, rows) * cdiv(view.columns, columns),)](
        dy,
        z,
        None if residual is None else like(residual, z),
        bits,
        dz,
        dresidual if want_dresidual else None,
        mean,
        rstd,
        gamma,
        beta,
        dgamma,
        dbeta,
        view.rows,
        view.columns,
        view.channels,
        view.count,
        ACT=act,
        SLOPE=slope,
        CHANNEL_IS_COLUMN=view.channel_is_column,
        WIDE=is_wide(view),
        BLOCK_R=rows,
        BLOCK_C=columns,
        ACC=TRITON_DTYPES[mean.dtype],
        num_warps=WARPS,
    )
    return dresidual


def bn_bwd_apply(dy: Tensor, z: Tensor, *args) -> tuple[Tensor, Tensor]:
    """See reference.bn_bwd_apply."""
    with device_of(z):
        z = dense(z)
        dz = torch.empty_like(z)
        return dz, apply_dense(like(dy, z), dz, z, view_of(z), *args)


def bn_bwd_apply_(dy: Tensor, z: Tensor, *args) -> Tensor:
    """See reference.bn_bwd_apply_."""
    check_writable(dy, z, args[4])
    with device_of(z):
        z = dense(z)
        own = like(dy, z)
        dresidual = apply_dense(own, own, z, view_of(z), *args)
        if own is not dy:
            dy.copy_(own)
        return dresidual
