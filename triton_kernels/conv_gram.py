"""1x1 convolutions whose z never exists: BatchNorm's statistics from the second moments of the input, equations (16) to (20) of
bnfast/reference.py. Bytes of global memory per element of s bytes, what blocks of channels read again from the cache left out:
    gram_kernel                    read s per element of x        partial moments, J^2 + J per split
    finalise_gram_kernel, finalise_statistics_kernel              channel-sized
    conv_fwd_apply_kernel          read s per element of x, write s per element of y (+ s, + 1/8 with residual, with bits)
    bn_bwd_mask_kernel             read s + 1/8, write s per element of y
    conv_bwd_reduce_kernel         read s per element of db and of x
    gram_of_weights_kernel                                        channel-sized
x is the z of the unit before: bn_fwd_apply comes first in each. dx is conv_dgrad_kernel's, with a Source.

x is taken from its mean before it is multiplied, so that a mean far from 0 costs no digits of 16-bit factors; in gram_kernel,
which has no mean yet, from its first value.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bnfast import weights
from bnfast.reference import Norm, Source, accumulator

from . import launch
from .activation import act_passes, act_value, masked, pack_bits, pre_activation, unpack_bits
from .bn_bwd import finalise_sums
from .bn_fwd import bit_places, load_channels, load_norm, store_statistics, times
from .conv_fwd import BLOCK_J, BLOCK_K, BLOCK_M, THREADS, packed_taps, precision
from .launch import TRITON_DTYPES, device_of, no_elements, three
from .layout import MOST_SPLITS, PROGRAMS, WARPS, cdiv, empty_last

# A split's partial moments are at most this part of what it reads.
PART_OF_READ = 16
GRAM_M = 32  # pixels of a tile whose values are both factors
BLOCK_C = 32  # channels of the channel-sized products


@triton.jit
def load_source(
    z_ptr,  # [M, J]
    norm,  # reference.Norm of z, or None: z is x
    centre,  # [J] to subtract
    m,
    m_mask,
    j,
    channels,
    ACT: tl.constexpr,
    SLOPE: tl.constexpr,
    ACC: tl.constexpr,
):
    """x - centre of pixels m and channels j, in the dtype of z; 0 outside."""
    DTYPE: tl.constexpr = z_ptr.dtype.element_ty
    j_mask = j < channels
    valid = m_mask[:, None] & j_mask[None, :]
    x = tl.load(z_ptr + m[:, None] * channels + j[None, :], valid, 0)
    if norm is not None:
        mean, scale, beta = load_norm(norm, j, j_mask, ACC)
        pre = pre_activation(x.to(ACC), mean[None, :], scale[None, :], beta[None, :])
        x = act_value(pre, ACT, SLOPE).to(DTYPE)
    return tl.where(valid, x.to(ACC) - centre[None, :], 0).to(DTYPE)


@triton.jit
def load_first(z_ptr, norm, j, channels, ACT: tl.constexpr, SLOPE: tl.constexpr, ACC: tl.constexpr):
    """x of the first pixel, 0 where that is no number to count from."""
    x = tl.load(z_ptr + j, j < channels, 0).to(ACC)
    if norm is not None:
        mean, scale, beta = load_norm(norm, j, j < channels, ACC)
        x = act_value(pre_activation(x, mean, scale, beta), ACT, SLOPE)
        x = x.to(z_ptr.dtype.element_ty).to(ACC)
    return tl.where(tl.abs(x) < float("inf"), x, 0)


@triton.jit
def gram_kernel(
    z_ptr,  # [M, J]
    norm,  # reference.Norm of z, or None
    part_ptr,  # [splits, J + 1, J] in ACC: sums of products, sums; x counted from its first value
    origin_ptr,  # [J] in ACC
    tracked_ptr,  # [] int64 or None
    pixels,
    channels,
    per_split,
    ACT: tl.constexpr,
    SLOPE: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_J: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Second moments of per_split tiles of pixels, of two blocks of channels. They are symmetric: programs below the diagonal have
    nothing to do."""
    blocks = tl.cdiv(channels, BLOCK_J)
    one = tl.program_id(0) // blocks
    other = tl.program_id(0) % blocks
    split = tl.program_id(1)
    if tracked_ptr is not None and tl.program_id(0) + split == 0:
        tl.store(tracked_ptr, tl.load(tracked_ptr) + 1)
    if one <= other:
        i = one * BLOCK_J + tl.arange(0, BLOCK_J)
        j = other * BLOCK_J + tl.arange(0, BLOCK_J)
        origin_i = load_first(z_ptr, norm, i, channels, ACT, SLOPE, ACC)
        origin_j = load_first(z_ptr, norm, j, channels, ACT, SLOPE, ACC)
        products = tl.zeros([BLOCK_J, BLOCK_J], ACC)
        sums = tl.zeros([BLOCK_J], ACC)
        for tile in range(split * per_split, (split + 1) * per_split):
            m = times(tile, BLOCK_M, WIDE) + tl.arange(0, BLOCK_M)
            m_mask = m < pixels
            x_i = load_source(z_ptr, norm, origin_i, m, m_mask, i, channels, ACT, SLOPE, ACC)
            x_j = load_source(z_ptr, norm, origin_j, m, m_mask, j, channels, ACT, SLOPE, ACC)
            products = tl.dot(
                tl.trans(x_i), x_j, products, input_precision=PRECISION, out_dtype=ACC
            )
            sums += tl.sum(x_j.to(ACC), 0)
        part_ptr += split * (channels + 1) * channels
        mask = (i < channels)[:, None] & (j < channels)[None, :]
        tl.store(part_ptr + i[:, None] * channels + j[None, :], products, mask)
        if one < other:
            tl.store(part_ptr + j[None, :] * channels + i[:, None], products, mask)
        if one == 0:
            tl.store(part_ptr + channels * channels + j, sums, j < channels)
            tl.store(origin_ptr + j, origin_j, j < channels)


@triton.jit
def finalise_gram_kernel(
    part_ptr,  # [splits, J + 1, J] in ACC
    origin_ptr,  # [J] in ACC
    gram_ptr,  # [J, J] in ACC: S
    mean_ptr,  # [J] in ACC
    channels,
    splits,
    count,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
):
    """Equation (16) from the partial sums, which all splits count from the same origin."""
    i = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    j = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (i < channels)[:, None] & (j < channels)[None, :]
    products = tl.zeros([BLOCK_C, BLOCK_C], ACC)
    sum_i = tl.zeros([BLOCK_C], ACC)
    sum_j = tl.zeros([BLOCK_C], ACC)
    for split in range(splits):
        part = part_ptr + split * (channels + 1) * channels
        products += tl.load(part + i[:, None] * channels + j[None, :], mask, 0)
        sum_i += tl.load(part + channels * channels + i, i < channels, 0)
        sum_j += tl.load(part + channels * channels + j, j < channels, 0)
    mean_j = sum_j / count
    gram = products - sum_i[:, None] * mean_j[None, :]
    tl.store(gram_ptr + i[:, None] * channels + j[None, :], gram, mask)
    if tl.program_id(0) == 0:
        mean = mean_j + tl.load(origin_ptr + j, j < channels, 0)
        tl.store(mean_ptr + j, mean, j < channels)


@triton.jit
def finalise_statistics_kernel(
    w_ptr,  # [J, K]
    bias_ptr,  # [K] or None
    gram_ptr,  # [J, J] in ACC
    mean_x_ptr,  # [J] in ACC
    rstd_ptr,  # [K] in ACC
    running_mean_ptr,  # [K] or None
    running_var_ptr,
    tracked_ptr,  # [] int64: the momentum is one over it; or None
    momentum,
    momentum_low,
    momentum_lowest,
    eps,
    eps_low,
    eps_lowest,
    in_channels,
    out_channels,
    count,
    BLOCK_K: tl.constexpr,
    BLOCK_J: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Equations (17), (3) and (4)."""
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = k < out_channels
    mean = tl.zeros([BLOCK_K], ACC)
    if bias_ptr is not None:
        mean = tl.load(bias_ptr + k, mask, 0).to(ACC)
    m2 = tl.zeros([BLOCK_K], ACC)
    for start in range(0, in_channels, BLOCK_J):
        i = start + tl.arange(0, BLOCK_J)
        inside = (i < in_channels)[:, None] & mask[None, :]
        w = tl.load(w_ptr + i[:, None] * out_channels + k[None, :], inside, 0).to(ACC)
        mean_x = tl.load(mean_x_ptr + i, i < in_channels, 0)
        mean += tl.sum(w * mean_x[:, None], 0)
        product = tl.zeros([BLOCK_J, BLOCK_K], ACC)
        for other in range(0, in_channels, BLOCK_J):
            j = other + tl.arange(0, BLOCK_J)
            both = (i < in_channels)[:, None] & (j < in_channels)[None, :]
            gram = tl.load(gram_ptr + i[:, None] * in_channels + j[None, :], both, 0)
            inside = (j < in_channels)[:, None] & mask[None, :]
            w_j = tl.load(w_ptr + j[:, None] * out_channels + k[None, :], inside, 0).to(ACC)
            product = tl.dot(gram, w_j, product, input_precision=PRECISION, out_dtype=ACC)
        m2 += tl.sum(product * w, 0)
    # Where the sum cancels to nothing, rounding may leave less than that.
    m2 = tl.where(m2 < 0, 0, m2)
    store_statistics(
        k, mask, mean, m2, tl.full([], count, ACC), rstd_ptr, running_mean_ptr, running_var_ptr,
        tracked_ptr, momentum, momentum_low, momentum_lowest, eps, eps_low, eps_lowest, ACC,
    )  # fmt: skip


@triton.jit
def conv_fwd_apply_kernel(
    z_ptr,  # [M, J]
    norm,  # reference.Norm of z, or None
    w_ptr,  # [J, K]
    own,  # reference.Norm of the result; its mean is that of x
    residual_ptr,  # [M, K] or None
    residual_norm,  # reference.Norm of a residual that is itself a z, or None
    y_ptr,  # [M, K]
    bits_ptr,  # [M, ceil(K / 8)] uint8, or None
    pixels,
    in_channels,
    out_channels,
    ACT: tl.constexpr,  # of x
    SLOPE: tl.constexpr,
    OWN_ACT: tl.constexpr,
    OWN_SLOPE: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_J: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Equations (18) and (6) of one tile."""
    DTYPE: tl.constexpr = y_ptr.dtype.element_ty
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    k_mask = k < out_channels
    m = times(tl.program_id(1), BLOCK_M, WIDE) + tl.arange(0, BLOCK_M)
    m_mask = m < pixels
    acc = tl.zeros([BLOCK_M, BLOCK_K], ACC)
    for start in range(0, in_channels, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        mean_x = tl.load(own.mean + j, j < in_channels, 0)
        x = load_source(z_ptr, norm, mean_x, m, m_mask, j, in_channels, ACT, SLOPE, ACC)
        inside = (j < in_channels)[:, None] & k_mask[None, :]
        w = tl.load(w_ptr + j[:, None] * out_channels + k[None, :], inside, 0)
        acc = tl.dot(x, w, acc, input_precision=PRECISION, out_dtype=ACC)
    scale = load_channels(own.gamma, k, k_mask, 1, ACC) * tl.load(own.rstd + k, k_mask, 0)
    beta = load_channels(own.beta, k, k_mask, 0, ACC)
    pre = tl.fma(acc, scale[None, :], beta[None, :])
    mask = m_mask[:, None] & k_mask[None, :]
    at = m[:, None] * out_channels + k[None, :]
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + at, mask, 0).to(ACC)
        if residual_norm is not None:
            mean, scale, beta = load_norm(residual_norm, k, k_mask, ACC)
            residual = pre_activation(residual, mean[None, :], scale[None, :], beta[None, :])
            residual = residual.to(DTYPE).to(ACC)
        pre += residual
    tl.store(y_ptr + at, act_value(pre, OWN_ACT, OWN_SLOPE).to(DTYPE), mask)
    if bits_ptr is not None:
        places, inside = bit_places(m, k, pixels, out_channels, BLOCK_K)
        bits = pack_bits(act_passes(pre, DTYPE, OWN_ACT), BLOCK_M, BLOCK_K)
        tl.store(bits_ptr + places, bits, inside)


@triton.jit
def bn_bwd_mask_kernel(
    dy_ptr,  # [M, K]
    bits_ptr,  # [M, ceil(K / 8)] uint8
    db_ptr,
    pixels,
    channels,
    ACT: tl.constexpr,
    SLOPE: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,
):
    """Equation (7) from the bits."""
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    m = times(tl.program_id(1), BLOCK_M, WIDE) + tl.arange(0, BLOCK_M)
    mask = (m < pixels)[:, None] & (k < channels)[None, :]
    at = m[:, None] * channels + k[None, :]
    places, inside = bit_places(m, k, pixels, channels, BLOCK_K)
    passes = unpack_bits(tl.load(bits_ptr + places, inside, 0), BLOCK_M, BLOCK_K)
    db = masked(passes, tl.load(dy_ptr + at, mask, 0).to(ACC), ACT, SLOPE)
    tl.store(db_ptr + at, db.to(db_ptr.dtype.element_ty), mask)


@triton.jit
def conv_bwd_reduce_kernel(
    db_ptr,  # [M, K]
    source,  # reference.Source of x
    w_ptr,  # [J, K]
    part_ptr,  # [2, splits, J blocks, K] in ACC: sum(db) once, then its products with x contracted with W
    pixels,
    in_channels,
    out_channels,
    per_split,
    ACT: tl.constexpr,  # of x
    SLOPE: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_J: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Of per_split tiles of pixels, one block of K and one of J: what they add to equations (19) and (8)."""
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    j = tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J)
    split = tl.program_id(2)
    k_mask = k < out_channels
    mean_x = tl.load(source.mean_x + j, j < in_channels, 0)
    products = tl.zeros([BLOCK_K, BLOCK_J], ACC)
    sums = tl.zeros([BLOCK_K], ACC)
    for tile in range(split * per_split, (split + 1) * per_split):
        m = times(tile, BLOCK_M, WIDE) + tl.arange(0, BLOCK_M)
        m_mask = m < pixels
        mask = m_mask[:, None] & k_mask[None, :]
        db = tl.load(db_ptr + m[:, None] * out_channels + k[None, :], mask, 0)
        x = load_source(source.z, source, mean_x, m, m_mask, j, in_channels, ACT, SLOPE, ACC)
        products = tl.dot(tl.trans(db), x, products, input_precision=PRECISION, out_dtype=ACC)
        sums += tl.sum(db.to(ACC), 0)
    inside = (j < in_channels)[:, None] & k_mask[None, :]
    w = tl.load(w_ptr + j[:, None] * out_channels + k[None, :], inside, 0).to(ACC)
    place = part_ptr + (split * tl.num_programs(1) + tl.program_id(1)) * out_channels + k
    row_size = tl.num_programs(2) * tl.num_programs(1) * out_channels
    tl.store(place, tl.where(tl.program_id(1) == 0, sums, 0), k_mask)
    tl.store(place + row_size, tl.sum(products * tl.trans(w), 1), k_mask)


@triton.jit
def gram_of_weights_kernel(
    w_ptr,  # [J, K]
    rstd_ptr,  # [K] in ACC
    gamma_ptr,  # [K] or None
    dgamma_ptr,  # [K] in ACC
    q_ptr,  # [J, J]
    in_channels,
    out_channels,
    count,
    BLOCK_J: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """-Q of equation (20)."""
    i = tl.program_id(0) * BLOCK_J + tl.arange(0, BLOCK_J)
    j = tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J)
    q = tl.zeros([BLOCK_J, BLOCK_J], ACC)
    for start in range(0, out_channels, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        k_mask = k < out_channels
        rstd = tl.load(rstd_ptr + k, k_mask, 0)
        factor = load_channels(gamma_ptr, k, k_mask, 1, ACC) * rstd
        factor *= rstd * tl.load(dgamma_ptr + k, k_mask, 0) / count
        inside = (i < in_channels)[:, None] & k_mask[None, :]
        w_i = tl.load(w_ptr + i[:, None] * out_channels + k[None, :], inside, 0).to(ACC)
        inside = (j < in_channels)[:, None] & k_mask[None, :]
        w_j = tl.load(w_ptr + j[:, None] * out_channels + k[None, :], inside, 0).to(ACC)
        q = tl.dot(
            w_i * -factor[None, :], tl.trans(w_j), q, input_precision=PRECISION, out_dtype=ACC
        )
    mask = (i < in_channels)[:, None] & (j < in_channels)[None, :]
    tl.store(q_ptr + i[:, None] * in_channels + j[None, :], q.to(q_ptr.dtype.element_ty), mask)


def split_pixels(pixels: int, block: int, programs: int, part: int, most: int) -> tuple[int, int]:
    """(splits, tiles of each) of a sum over pixels in tiles of `block`; `programs` blocks of channels share each split, and a channel
    leaves `part` sums per split. By the shape alone."""
    tiles = cdiv(pixels, block)
    splits = max(1, min(most, PROGRAMS // programs, tiles, pixels // (PART_OF_READ * part)))
    per_split = cdiv(tiles, splits)
    return cdiv(tiles, per_split), per_split


def exact(dtype: torch.dtype) -> str:
    """How tl.dot multiplies float32 where a variance comes of it: as exactly as float32. AMD's matrix unit takes float32 itself."""
    return "tf32x3" if precision(dtype) == "tf32" and launch.LANES == 32 else "ieee"


def packed(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """[J, K] of weight [K, J, 1, 1], cached; the same form as the other kernels of the forward pass take."""
    return weights.transformed(weight, ("taps", dtype), lambda w: packed_taps(w, dtype))


def bn_fwd_apply_gram_reduce(
    z: Tensor,
    norm: Norm | None,
    act: str,
    slope: float,
    weight: Tensor,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """See reference.bn_fwd_apply_gram_reduce; for convolutions that `fuses_gram` says yes to."""
    with device_of(z):
        z = z.contiguous(memory_format=torch.channels_last)
        acc = accumulator(z.dtype)
        out_channels, channels = weight.shape[:2]
        pixels = z.numel() // channels
        blocks = cdiv(channels, BLOCK_K)
        splits, per_split = split_pixels(pixels, GRAM_M, blocks**2, channels, MOST_SPLITS)
        parts = z.new_empty(splits, channels + 1, channels, dtype=acc)
        origin = parts.new_empty(channels)
        mean_x = torch.empty_like(origin)
        accurate, warps = TRITON_DTYPES[acc], THREADS // launch.LANES
        gram_kernel[(blocks**2, splits)](
            z,
            norm,
            parts,
            origin,
            num_batches_tracked,
            pixels,
            channels,
            per_split,
            ACT=act,
            SLOPE=slope,
            WIDE=z.numel() >= 2**30,
            BLOCK_M=GRAM_M,
            BLOCK_J=BLOCK_K,
            PRECISION=exact(z.dtype),
            ACC=accurate,
            num_warps=warps,
            num_stages=1,
        )
        gram = parts.new_empty(channels, channels)
        square = cdiv(channels, BLOCK_C)
        finalise_gram_kernel[(square, square)](
            parts,
            origin,
            gram,
            mean_x,
            channels,
            splits,
            pixels,
            BLOCK_C=BLOCK_C,
            ACC=accurate,
            num_warps=warps,
        )
        rstd = parts.new_empty(out_channels)
        finalise_statistics_kernel[(cdiv(out_channels, BLOCK_C),)](
            packed(weight, z.dtype),
            bias,
            gram,
            mean_x,
            rstd,
            running_mean,
            running_var,
            num_batches_tracked if momentum is None and running_mean is not None else None,
            *three(momentum or 0.0),
            *three(eps),
            channels,
            out_channels,
            pixels,
            BLOCK_K=BLOCK_C,
            BLOCK_J=BLOCK_C,
            PRECISION=exact(acc),
            ACC=accurate,
            num_warps=warps,
            num_stages=1,
        )
    return mean_x, rstd


def bn_fwd_apply_conv_fwd_apply(
    z: Tensor,
    norm: Norm | None,
    act: str,
    slope: float,
    weight: Tensor,
    own: Norm,
    residual: Tensor | None,
    residual_norm: Norm | None,
    own_act: str,
    own_slope: float,
    want_bits: bool,
) -> tuple[Tensor, Tensor]:
    """See reference.bn_fwd_apply_conv_fwd_apply; for convolutions that `fuses_gram` says yes to."""
    with device_of(z):
        z = z.contiguous(memory_format=torch.channels_last)
        batch, in_channels, height, width = z.shape
        out_channels = weight.shape[0]
        pixels = batch * height * width
        y = empty_last(z, batch, out_channels, height, width)
        if residual is not None:
            residual = residual.contiguous(memory_format=torch.channels_last)
        bits = None
        if want_bits:
            bits = z.new_empty(pixels * cdiv(out_channels, 8), dtype=torch.uint8)
        conv_fwd_apply_kernel[(cdiv(out_channels, BLOCK_K), cdiv(pixels, BLOCK_M))](
            z,
            norm,
            packed(weight, z.dtype),
            own,
            residual,
            residual_norm,
            y,
            bits,
            pixels,
            in_channels,
            out_channels,
            ACT=act,
            SLOPE=slope,
            OWN_ACT=own_act,
            OWN_SLOPE=own_slope,
            WIDE=pixels * out_channels >= 2**30,
            BLOCK_M=BLOCK_M,
            BLOCK_K=BLOCK_K,
            BLOCK_J=BLOCK_J,
            ACC=TRITON_DTYPES[own.rstd.dtype],
            PRECISION=precision(z.dtype),
            num_warps=THREADS // launch.LANES,
            num_stages=2 if z.dtype.itemsize == 2 else 1,
        )
    return y, no_elements(z.device) if bits is None else bits


def bn_bwd_mask(dy: Tensor, bits: Tensor, act: str, slope: float) -> Tensor:
    """See reference.bn_bwd_mask; bits are those of a y in channels_last."""
    with device_of(dy):
        dy = dy.contiguous(memory_format=torch.channels_last)
        db = torch.empty_like(dy)
        channels = dy.shape[1]
        pixels = dy.numel() // channels
        bn_bwd_mask_kernel[(cdiv(channels, BLOCK_K), cdiv(pixels, BLOCK_M))](
            dy,
            bits,
            db,
            pixels,
            channels,
            ACT=act,
            SLOPE=slope,
            WIDE=dy.numel() >= 2**30,
            BLOCK_M=BLOCK_M,
            BLOCK_K=BLOCK_K,
            ACC=TRITON_DTYPES[accumulator(dy.dtype)],
            num_warps=THREADS // launch.LANES,
        )
    return db


def bn_fwd_apply_conv_bwd_reduce(
    db: Tensor, source: Source, act: str, slope: float, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """See reference.bn_fwd_apply_conv_bwd_reduce; for convolutions that `fuses_gram` says yes to."""
    with device_of(db):
        db = db.contiguous(memory_format=torch.channels_last)
        out_channels, in_channels = weight.shape[:2]
        pixels = db.numel() // out_channels
        blocks, in_blocks = cdiv(out_channels, BLOCK_K), cdiv(in_channels, BLOCK_K)
        programs = blocks * in_blocks
        splits, per_split = split_pixels(
            pixels, BLOCK_M, programs, 2 * in_blocks, MOST_SPLITS // in_blocks
        )
        parts = rstd.new_empty(2, splits * in_blocks, out_channels)
        conv_bwd_reduce_kernel[(blocks, in_blocks, splits)](
            db,
            source,
            packed(weight, db.dtype),
            parts,
            pixels,
            in_channels,
            out_channels,
            per_split,
            ACT=act,
            SLOPE=slope,
            WIDE=db.numel() >= 2**30,
            BLOCK_M=BLOCK_M,
            BLOCK_K=BLOCK_K,
            BLOCK_J=BLOCK_K,
            ACC=TRITON_DTYPES[rstd.dtype],
            PRECISION=precision(db.dtype),
            num_warps=THREADS // launch.LANES,
            num_stages=1,
        )
        return finalise_sums(parts, rstd)


def gram_of_weights(weight: Tensor, above, dtype: torch.dtype, count: int) -> Tensor:
    """-Q [J, J] of equation (20) in dtype, for `count` pixels; above is the unit's reference.Above."""
    out_channels, in_channels = weight.shape[:2]
    acc = above.rstd.dtype
    q = above.rstd.new_empty(in_channels, in_channels, dtype=dtype)
    blocks = cdiv(in_channels, BLOCK_C)
    gram_of_weights_kernel[(blocks, blocks)](
        packed(weight, dtype),
        above.rstd,
        above.gamma,
        above.dgamma,
        q,
        in_channels,
        out_channels,
        count,
        BLOCK_J=BLOCK_C,
        BLOCK_K=BLOCK_C,
        ACC=TRITON_DTYPES[acc],
        PRECISION=exact(acc),
        num_warps=WARPS,
        num_stages=1,
    )
    return q
