"""The phases that reduce, alone and with the one that applies: one kernel where all values of a channel fit into a program's
registers, else those of bn_fwd.py and bn_bwd.py. Bytes of global memory per element of s bytes, of the one kernel:
    bn_fwd_slab_kernel   read s (+ s), write s (+ 1/8)          with residual, with bits
    bn_bwd_slab_kernel   read 2 s (+ s, + 1/8), write s (+ s)   with the residual of a smooth activation, with bits; with dresidual
and nothing written but channel vectors where nothing is to be applied.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bnfast.reference import accumulator

from . import bn_bwd, bn_fwd
from .activation import act_passes, act_value, pack_bits, pre_activation
from .bn_bwd import gradient
from .bn_fwd import bit_places, load_channels, spread, store_statistics, times
from .launch import TRITON_DTYPES, check_writable, device_of, no_elements, three
from .layout import Slab, View, dense, is_wide, like, slab_of, view_of


@triton.jit
def slab_offsets(
    rows,
    columns,
    channels,
    CHANNEL_IS_COLUMN: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Of this program's channels: element offsets, mask, channels, their mask, rows, columns."""
    if CHANNEL_IS_COLUMN:
        c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
        column = c
        r = times(tl.arange(0, BLOCK_R), 1, WIDE)
    else:
        c = tl.program_id(0) + tl.arange(0, 1)
        column = tl.arange(0, BLOCK_C)
        r = times(tl.arange(0, BLOCK_R), channels, WIDE) + c
    mask = (r < rows)[:, None] & (column < columns)[None, :]
    return r[:, None] * columns + column[None, :], mask, c, c < channels, r, column


@triton.jit
def over_slab(values, CHANNEL_IS_COLUMN: tl.constexpr):
    """Each channel's sum over a slab."""
    if CHANNEL_IS_COLUMN:
        sums = tl.sum(values, 0)
    else:
        sums = tl.sum(tl.sum(values, 1), 0, keep_dims=True)
    return sums


@triton.jit
def bn_fwd_slab_kernel(
    z_ptr,  # [rows, columns]
    residual_ptr,  # as z, or None
    y_ptr,  # or None: nothing is applied
    bits_ptr,  # [rows, ceil(columns / 8)] uint8, or None
    mean_ptr,  # [C] in ACC
    m2_ptr,  # or None
    rstd_ptr,
    gamma_ptr,  # [C] or None
    beta_ptr,
    running_mean_ptr,  # [C] or None
    running_var_ptr,
    counted_ptr,  # [] int64, to be counted up; or None
    tracked_ptr,  # [] int64: the momentum is one over it; or None
    momentum,
    momentum_low,
    momentum_lowest,
    eps,
    eps_low,
    eps_lowest,
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
    """Equations (1) to (6) of this program's channels. The squares are taken around a rounded mean: the sum of the distances from
    it corrects both."""
    at, mask, c, c_mask, r, column = slab_offsets(
        rows, columns, channels, CHANNEL_IS_COLUMN, WIDE, BLOCK_R, BLOCK_C
    )
    z = tl.load(z_ptr + at, mask, 0).to(ACC)
    values = tl.full([1], count, ACC)
    centre = over_slab(z, CHANNEL_IS_COLUMN) / values
    d = tl.where(mask, z - spread(centre, CHANNEL_IS_COLUMN), 0)
    rest = over_slab(d, CHANNEL_IS_COLUMN)
    m2 = over_slab(d * d, CHANNEL_IS_COLUMN) - rest * rest / values
    mean = centre + rest / values
    rstd = store_statistics(
        c, c_mask, mean, m2, values, rstd_ptr, running_mean_ptr, running_var_ptr, tracked_ptr, momentum,
        momentum_low, momentum_lowest, eps, eps_low, eps_lowest, ACC,
    )  # fmt: skip
    tl.store(mean_ptr + c, mean, c_mask)
    if m2_ptr is not None:
        tl.store(m2_ptr + c, m2, c_mask)
    if counted_ptr is not None and tl.program_id(0) == 0:
        tl.store(counted_ptr, tl.load(counted_ptr) + 1)
    if y_ptr is not None:
        scale = load_channels(gamma_ptr, c, c_mask, 1, ACC) * rstd
        beta = load_channels(beta_ptr, c, c_mask, 0, ACC)
        pre = pre_activation(
            z,
            spread(mean, CHANNEL_IS_COLUMN),
            spread(scale, CHANNEL_IS_COLUMN),
            spread(beta, CHANNEL_IS_COLUMN),
        )
        if residual_ptr is not None:
            pre += tl.load(residual_ptr + at, mask, 0).to(ACC)
        tl.store(y_ptr + at, act_value(pre, ACT, SLOPE).to(y_ptr.dtype.element_ty), mask)
        if bits_ptr is not None:
            passes = act_passes(pre, y_ptr.dtype.element_ty, ACT)
            places, inside = bit_places(r, column, rows, columns, BLOCK_C)
            tl.store(bits_ptr + places, pack_bits(passes, BLOCK_R, BLOCK_C), inside)


@triton.jit
def bn_bwd_slab_kernel(
    dy_ptr,  # [rows, columns]
    z_ptr,
    residual_ptr,  # as z, or None
    bits_ptr,  # [rows, ceil(columns / 8)] uint8, or None
    dz_ptr,  # or None: nothing is applied; may be dy_ptr: a channel is read before it is written
    dresidual_ptr,  # or None
    mean_ptr,  # [C] in ACC
    rstd_ptr,
    gamma_ptr,  # [C] or None
    beta_ptr,
    dgamma_ptr,  # [C] in ACC
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
    """Equations (7) to (11) of this program's channels."""
    at, mask, c, c_mask, r, column = slab_offsets(
        rows, columns, channels, CHANNEL_IS_COLUMN, WIDE, BLOCK_R, BLOCK_C
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
    d = z - mean
    # Outside the tensor dy is 0, but 0 times an infinite slope or distance would not be.
    dbeta = over_slab(tl.where(mask, db, 0), CHANNEL_IS_COLUMN)
    dgamma = over_slab(tl.where(mask, db * d, 0), CHANNEL_IS_COLUMN) * rstd
    tl.store(dbeta_ptr + c, dbeta, c_mask)
    tl.store(dgamma_ptr + c, dgamma, c_mask)
    if dz_ptr is not None:
        shift_db = spread(dbeta / count, CHANNEL_IS_COLUMN)
        shift_z = spread(rstd * dgamma / count, CHANNEL_IS_COLUMN)
        db = (db - shift_db) - d * shift_z
        tl.store(dz_ptr + at, (db * scale).to(dz_ptr.dtype.element_ty), mask)


def _forward(
    z: Tensor,
    view: View,
    slab: Slab,
    y: Tensor | None,
    bits: Tensor | None,
    m2: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    residual: Tensor | None = None,
    act: str = "identity",
    slope: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """mean and rstd of a dense z in one kernel, which also writes what it is given of y, bits and M2."""
    acc = accumulator(z.dtype)
    mean = z.new_empty(view.channels, dtype=acc)
    rstd = torch.empty_like(mean)
    counted, tracked = num_batches_tracked, None
    if momentum is None and running_mean is not None:
        # Every program reads it: it is counted up before them.
        num_batches_tracked.add_(1)
        counted, tracked = None, num_batches_tracked
    bn_fwd_slab_kernel[(slab.blocks,)](
        z,
        None if residual is None else like(residual, z),
        y,
        bits,
        mean,
        m2,
        rstd,
        gamma,
        beta,
        running_mean,
        running_var,
        counted,
        tracked,
        *three(momentum or 0.0),
        *three(eps),
        view.rows,
        view.columns,
        view.channels,
        view.count,
        ACT=act,
        SLOPE=slope,
        CHANNEL_IS_COLUMN=view.channel_is_column,
        WIDE=is_wide(view),
        BLOCK_R=slab.rows,
        BLOCK_C=slab.columns,
        ACC=TRITON_DTYPES[acc],
        num_warps=slab.warps,
    )
    return mean, rstd


def _backward(
    dy: Tensor,
    dz: Tensor | None,
    dresidual: Tensor | None,
    z: Tensor,
    view: View,
    slab: Slab,
    mean: Tensor,
    rstd: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    bits: Tensor | None,
    act: str,
    slope: float,
) -> tuple[Tensor, Tensor]:
    """(dgamma, dbeta) of a dense z in one kernel, which also writes what it is given of dz, which may be dy, and dresidual."""
    dgamma, dbeta = torch.empty_like(mean), torch.empty_like(mean)
    bn_bwd_slab_kernel[(slab.blocks,)](
        dy,
        z,
        None if residual is None else like(residual, z),
        bits,
        dz,
        dresidual,
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
        BLOCK_R=slab.rows,
        BLOCK_C=slab.columns,
        ACC=TRITON_DTYPES[mean.dtype],
        num_warps=slab.warps,
    )
    return dgamma, dbeta


def bn_fwd_reduce(z: Tensor, *stats) -> tuple[Tensor, Tensor, Tensor]:
    """See reference.bn_fwd_reduce."""
    with device_of(z):
        z = dense(z)
        view = view_of(z)
        slab = slab_of(view, z.element_size(), 1)
        if not slab:
            return bn_fwd.reduce_dense(z, view, *stats, True)
        m2 = z.new_empty(view.channels, dtype=accumulator(z.dtype))
        mean, rstd = _forward(z, view, slab, None, None, m2, *stats)
        return mean, m2, rstd


def bn_fwd_reduce_apply(z: Tensor, *args) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See reference.bn_fwd_reduce_apply."""
    with device_of(z):
        z = dense(z)
        view = view_of(z)
        slab = slab_of(view, z.element_size(), 1)
        if not slab:
            mean, _, rstd = bn_fwd.reduce_dense(z, view, *args[:5], False)
            return mean, rstd, *bn_fwd.apply_dense(z, view, mean, rstd, *args[5:])
        *rest, want_bits = args
        y = torch.empty_like(z)
        bits = z.new_empty(view.bit_bytes, dtype=torch.uint8) if want_bits else None
        mean, rstd = _forward(z, view, slab, y, bits, None, *rest)
        return mean, rstd, y, no_elements(z.device) if bits is None else bits


def bn_bwd_reduce(dy: Tensor, z: Tensor, *args) -> tuple[Tensor, Tensor]:
    """See reference.bn_bwd_reduce."""
    with device_of(z):
        z = dense(z)
        dy, view = like(dy, z), view_of(z)
        slab = slab_of(view, z.element_size(), 2)
        if not slab:
            return bn_bwd.reduce_dense(dy, z, view, *args)
        return _backward(dy, None, None, z, view, slab, *args)


def _reduce_apply(dy: Tensor, dz: Tensor, z: Tensor, *args) -> tuple[Tensor, Tensor, Tensor]:
    """(dgamma, dbeta, dresidual) of a dense z, and dz, which may be dy, as it lies."""
    view = view_of(z)
    slab = slab_of(view, z.element_size(), 2)
    *state, want_dresidual = args
    if not slab:
        sums = bn_bwd.reduce_dense(dy, z, view, *state)
        *state, act, slope = state
        last = (*sums, act, slope, want_dresidual)
        return *sums, bn_bwd.apply_dense(dy, dz, z, view, *state, *last)
    dresidual = torch.empty_like(z) if want_dresidual else None
    sums = _backward(dy, dz, dresidual, z, view, slab, *state)
    return *sums, no_elements(z.device, z.dtype) if dresidual is None else dresidual


def bn_bwd_reduce_apply(dy: Tensor, z: Tensor, *args) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See reference.bn_bwd_reduce_apply."""
    with device_of(z):
        z = dense(z)
        dz = torch.empty_like(z)
        dgamma, dbeta, dresidual = _reduce_apply(like(dy, z), dz, z, *args)
        return dgamma, dbeta, dz, dresidual


def bn_bwd_reduce_apply_(dy: Tensor, z: Tensor, *args) -> tuple[Tensor, Tensor, Tensor]:
    """See reference.bn_bwd_reduce_apply_."""
    check_writable(dy, z, args[4])
    with device_of(z):
        z = dense(z)
        own = like(dy, z)
        found = _reduce_apply(own, own, z, *args)
        if own is not dy:
            dy.copy_(own)
        return found
