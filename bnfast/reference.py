"""The phases in plain PyTorch: the specification that every backend is tested against.

Notation. z [N, C, *] is a convolution's output and BatchNorm's input, M = N * (everything but C) the number of values per
channel, r an optional residual of z's shape, dy the gradient of y. Per channel c, with a sum over the M values:

    (1)  mean  = sum(z) / M
    (2)  M2    = sum((z - mean)^2)
    (3)  rstd  = 1 / sqrt(M2 / M + eps)                          0 where M2 / M + eps is 0, so that y = beta there
    (4)  running_mean = (1 - f) running_mean + f mean
         running_var  = (1 - f) running_var  + f M2 / (M - 1)    f = momentum, or 1 / num_batches_tracked where momentum is None
    (5)  pre   = (z - mean) * (gamma * rstd) + beta [+ r]        in this order: beta - mean * scale would cancel
    (6)  y     = act(pre)
    (7)  db    = dy * act'(pre)
    (8)  dbeta = sum(db);  dgamma = sum(db * (z - mean)) * rstd
    (9)  dz    = gamma * rstd * (db - dbeta / M - (z - mean) * rstd * dgamma / M)
    (10) dz    = gamma * rstd * db                               where the statistics are constants (evaluation mode)
    (11) dr    = db
    (12) dx    = the convolution transposed, from dz and W alone; the input of the convolution is not an argument

Squeeze and excitation (arXiv 1709.01507) in front of a convolution, x [N, J, H, W], per image n, S hidden channels:

    (13) h     = W1 mean(x) + b1;  g = gate(W2 act(h) + b2);  y = x * g
    (14) dg    = sum(dy * x)                                     over the pixels of an image
    (15) dx    = dy * g + W1^T ((W2^T (dg * gate')) * act'(h)) / (H W)

Of a 1x1 convolution of x [N, J, *] with stride 1, known before it runs:

    (16) mean_x = sum(x) / M;  S = sum((x - mean_x) (x - mean_x)^T)                [J, J]
    (17) mean   = W mean_x + b;  M2 = diag(W S W^T)
    (18) pre    = gamma * rstd * W (x - mean_x) + beta [+ r]                       without z
    (19) dgamma = rstd * diag(W sum((x - mean_x) db^T))
    (20) dx     = W^T s (db - dbeta / M) - Q (x - mean_x);  Q = W^T s rstd dgamma / M W,  s = gamma * rstd

Sums, statistics and (5) are float32 for 16-bit and float32 tensors and float64 for float64. The slope act' is taken at pre
rounded to the dtype of y, so that forward and backward agree about every element.

Shapes and dtypes, the same for all phases and backends: z, dy, residual [N, C, *] in f64, f32, bf16 or f16, any strides;
mean, m2, rstd, dgamma, dbeta [C] float32 (float64 for float64); gamma, beta, running_mean, running_var [C] in any of these
dtypes, or None; bits is a private uint8 tensor: whoever wrote it in `bn_fwd_apply` reads it in the backward phases.

Phases in one (`bn_fwd_reduce_apply`, `bn_bwd_reduce_apply`, `conv_fwd_reduce_apply`, `bn_bwd_reduce_apply_dgrad`) are their
composition, and nothing else; a name that ends in an underscore writes dz over dy.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

# Piecewise linear activations: one bit per element holds the slope where a residual hides the pre-activation.
BIT_ACTS = ("relu", "relu6", "leaky_relu")
# Smooth activations: the slope needs the pre-activation, so a residual in front of them is kept.
SMOOTH_ACTS = ("silu", "hardswish")
ACTS = ("identity", *BIT_ACTS, *SMOOTH_ACTS)
# What squeeze and excitation ends in.
GATES = ("sigmoid", "hardsigmoid")


def conv_fwd_reduce(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """z = conv(x, W) + bias, and its mean, M2 and rstd; updates the running statistics as `bn_fwd_reduce` does.

    x [N, J, *], weight [C, J / groups, *]; a two-dimensional weight [C, J] is a linear layer on x [N, J].
    """
    z = conv_forward(x, weight, bias, stride, padding, dilation, groups)
    return z, *bn_fwd_reduce(z, running_mean, running_var, num_batches_tracked, momentum, eps)


def conv_fwd_reduce_apply(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    act: str,
    slope: float,
    want_bits: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """conv_fwd_reduce and bn_fwd_apply: (z, mean, rstd, y, bits)."""
    z, mean, _, rstd = conv_fwd_reduce(
        x,
        weight,
        bias,
        stride,
        padding,
        dilation,
        groups,
        running_mean,
        running_var,
        num_batches_tracked,
        momentum,
        eps,
    )
    y, bits = bn_fwd_apply(z, mean, rstd, gamma, beta, residual, act, slope, want_bits)
    return z, mean, rstd, y, bits


def conv_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """The convolution alone, or the linear layer where weight is [C, J]; computed in the dtype of x."""
    weight = weight.to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    if weight.dim() == 2:
        return F.linear(x, weight, bias)
    return torch.convolution(
        x, weight, bias, stride, padding, dilation, False, [0] * len(stride), groups
    )


def conv_output_size(
    input_size: Sequence[int],
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """Spatial sizes of a convolution's output; [] for a linear layer."""
    kernel = weight.shape[2:]
    if len(kernel) == 2:  # spelled out, as it is asked for at every call of most units
        (h, w), (kh, kw), (sh, sw), (ph, pw), (dh, dw) = (
            input_size,
            kernel,
            stride,
            padding,
            dilation,
        )
        return [
            (h + 2 * ph - dh * (kh - 1) - 1) // sh + 1,
            (w + 2 * pw - dw * (kw - 1) - 1) // sw + 1,
        ]
    return [
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, k, s, p, d in zip(input_size, kernel, stride, padding, dilation, strict=True)
    ]


def bn_fwd_reduce(
    z: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(mean, M2, rstd) of z, equations (1) to (3); updates the running statistics in place by (4) where given.

    An empty batch gives mean 0, M2 0 and leaves the running statistics as they were; num_batches_tracked counts it.
    """
    dims = [0, *range(2, z.dim())]
    count = z.numel() // z.shape[1] if z.shape[1] else 0
    acc = z.to(accumulator(z.dtype))
    if count == 0:
        if num_batches_tracked is not None:
            num_batches_tracked.add_(1)
        mean = acc.new_zeros(z.shape[1])
        return mean, mean.clone(), rstd_of(mean, eps)
    mean = acc.mean(dims)
    m2 = (acc - per_channel(mean, z)).square().sum(dims)
    update_running_statistics(
        running_mean, running_var, num_batches_tracked, momentum, mean, m2, count
    )
    return mean, m2, rstd_of(m2 / count, eps)


def update_running_statistics(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    mean: Tensor,
    m2: Tensor,
    count: int | Tensor,
) -> None:
    """Equation (4), in place, for a batch of `count` values per channel (M); counts the batch."""
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    factor = momentum
    if momentum is None and num_batches_tracked is not None:
        factor = 1.0 / num_batches_tracked.double()
    degrees = count.sub(1).clamp_min(1) if isinstance(count, Tensor) else max(count - 1, 1)
    for running, batch in ((running_mean, mean), (running_var, m2 / degrees)):
        if running is not None:
            running.copy_((1 - factor) * running.to(batch.dtype) + factor * batch)


def bn_fwd_apply(
    z: Tensor,
    mean: Tensor,
    rstd: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    act: str,
    slope: float,
    want_bits: bool,
) -> tuple[Tensor, Tensor]:
    """(y, bits) by equations (5) and (6). bits is empty unless want_bits; slope is leaky_relu's negative slope."""
    pre = _pre_activation(z, mean, rstd, gamma, beta, residual)
    y = _act_value(pre, act, slope).to(z.dtype)
    if not want_bits:
        return y, torch.empty(0, dtype=torch.uint8, device=z.device)
    return y, _pack_bits(_act_passes(pre.to(z.dtype), act))


def bn_fwd_reduce_apply(
    z: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    act: str,
    slope: float,
    want_bits: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """bn_fwd_reduce and bn_fwd_apply: (mean, rstd, y, bits)."""
    mean, _, rstd = bn_fwd_reduce(z, running_mean, running_var, num_batches_tracked, momentum, eps)
    return mean, rstd, *bn_fwd_apply(z, mean, rstd, gamma, beta, residual, act, slope, want_bits)


def bn_bwd_reduce(
    dy: Tensor,
    z: Tensor,
    mean: Tensor,
    rstd: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    bits: Tensor | None,
    act: str,
    slope: float,
) -> tuple[Tensor, Tensor]:
    """(dgamma, dbeta) by equations (7) and (8).

    The slope comes from bits where given; else from the pre-activation, which needs the residual that was in it.
    """
    dims = [0, *range(2, z.dim())]
    db = _masked_gradient(dy, z, mean, rstd, gamma, beta, residual, bits, act, slope)
    centred = z.to(db.dtype) - per_channel(mean, z)
    return (db * centred).sum(dims) * rstd, db.sum(dims)


def bn_bwd_apply(
    dy: Tensor,
    z: Tensor,
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
) -> tuple[Tensor, Tensor]:
    """(dz, dresidual) by equations (9) and (11), or (10) where dgamma and dbeta are None; dresidual empty unless wanted."""
    db = _masked_gradient(dy, z, mean, rstd, gamma, beta, residual, bits, act, slope)
    scale = rstd if gamma is None else gamma.to(rstd.dtype) * rstd
    dz = db
    if dgamma is not None and z.numel():
        count = z.numel() // z.shape[1]
        centred = z.to(db.dtype) - per_channel(mean, z)
        dz = db - per_channel(dbeta / count, z) - centred * per_channel(rstd * dgamma / count, z)
    dz = (dz * per_channel(scale, z)).to(z.dtype)
    return dz, db.to(z.dtype) if want_dresidual else z.new_empty(0)


def bn_bwd_apply_(dy: Tensor, *args) -> Tensor:
    """As bn_bwd_apply, with dz written over dy; returns dresidual. dy may share no memory with z or the residual."""
    dz, dresidual = bn_bwd_apply(dy.clone(), *args)
    dy.copy_(dz)
    return dresidual


def bn_bwd_reduce_apply(
    dy: Tensor,
    z: Tensor,
    mean: Tensor,
    rstd: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    bits: Tensor | None,
    act: str,
    slope: float,
    want_dresidual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """bn_bwd_reduce and bn_bwd_apply with batch statistics: (dgamma, dbeta, dz, dresidual)."""
    state = (dy, z, mean, rstd, gamma, beta, residual, bits)
    dgamma, dbeta = bn_bwd_reduce(*state, act, slope)
    return dgamma, dbeta, *bn_bwd_apply(*state, dgamma, dbeta, act, slope, want_dresidual)


def bn_bwd_reduce_apply_(dy: Tensor, *args) -> tuple[Tensor, Tensor, Tensor]:
    """As bn_bwd_reduce_apply, with dz written over dy; returns (dgamma, dbeta, dresidual)."""
    dgamma, dbeta, dz, dresidual = bn_bwd_reduce_apply(dy.clone(), *args)
    dy.copy_(dz)
    return dgamma, dbeta, dresidual


def conv_dgrad(
    dz: Tensor,
    weight: Tensor,
    input_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """dx [N, J, *input_size] by equation (12), from dz [N, C, *] and weight [C, J / groups, *] (or [C, J], linear)."""
    weight = weight.to(dz.dtype)
    if weight.dim() == 2:
        return dz @ weight
    output_padding = [
        size - ((out - 1) * s - 2 * p + d * (k - 1) + 1)
        for size, out, s, p, d, k in zip(
            input_size, dz.shape[2:], stride, padding, dilation, weight.shape[2:], strict=True
        )
    ]
    return torch.convolution(
        dz, weight, None, stride, padding, dilation, True, output_padding, groups
    )


def followed_by_dgrad(bn_bwd_reduce_apply, bn_bwd_reduce_apply_, conv_dgrad):
    """The composition of three phases of a backend, `bn_bwd_reduce_apply_dgrad`."""

    def bn_bwd_reduce_apply_dgrad(
        dy: Tensor, z: Tensor, *args
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """bn_bwd_reduce_apply and conv_dgrad: (dgamma, dbeta, dx, dresidual).

        args: the other arguments of bn_bwd_reduce_apply, may_overwrite (whether dy may be written to), and the arguments of
        conv_dgrad behind dz.
        """
        *state, may_overwrite, weight, input_size, stride, padding, dilation, groups = args
        if may_overwrite and dy.stride() == z.stride():
            dgamma, dbeta, dresidual = bn_bwd_reduce_apply_(dy, z, *state)
            dz = dy
        else:
            dgamma, dbeta, dz, dresidual = bn_bwd_reduce_apply(dy, z, *state)
        dx = conv_dgrad(dz, weight, input_size, stride, padding, dilation, groups)
        return dgamma, dbeta, dx, dresidual

    return bn_bwd_reduce_apply_dgrad


bn_bwd_reduce_apply_dgrad = followed_by_dgrad(bn_bwd_reduce_apply, bn_bwd_reduce_apply_, conv_dgrad)


class Norm(NamedTuple):
    """BatchNorm's vectors [C] in equation (5); gamma and beta may be None."""

    mean: Tensor
    rstd: Tensor
    gamma: Tensor | None
    beta: Tensor | None


class Above(NamedTuple):
    """What turns the dy of a unit into dz by equation (9); without z, which a unit of equations (16) to (20) has not, dy is db and
    the term with z is Q's."""

    z: Tensor | None
    mean: Tensor
    rstd: Tensor
    gamma: Tensor | None
    beta: Tensor | None
    dgamma: Tensor
    dbeta: Tensor


class Source(NamedTuple):
    """A unit whose output is the x of equations (16) to (20): what makes x of its z by equations (5) and (6), and mean_x."""

    z: Tensor
    mean: Tensor
    rstd: Tensor
    gamma: Tensor | None
    beta: Tensor | None
    mean_x: Tensor


class Below(NamedTuple):
    """A unit whose output's gradient a convolution's dx is: what equations (7) and (8) take. Without z its db is all that is
    asked for."""

    z: Tensor | None
    bits: Tensor | None
    mean: Tensor
    rstd: Tensor
    gamma: Tensor | None
    beta: Tensor | None


class Beside(NamedTuple):
    """A unit without activation whose output is the residual of the one below: its gradient is that one's db."""

    z: Tensor
    mean: Tensor
    rstd: Tensor


def followed_by_apply(conv_forward, bn_fwd_apply):
    """The backend's conv_fwd_apply of its two parts."""

    def conv_fwd_apply(
        x, weight, bias, stride, padding, dilation, groups, mean, rstd, gamma, beta, residual, act, slope
    ):  # fmt: skip
        """conv_forward and bn_fwd_apply, where mean and rstd are known before z, which nobody asks for: y."""
        z = conv_forward(x, weight, bias, stride, padding, dilation, groups)
        return bn_fwd_apply(z, mean, rstd, gamma, beta, residual, act, slope, False)[0]

    return conv_fwd_apply


conv_fwd_apply = followed_by_apply(conv_forward, bn_fwd_apply)


def joins_units() -> bool:
    """Whether there are convolutions that this backend's `fuses_chain` says yes to; else it need not be asked."""
    return False


def fuses_chain(x: Tensor, weight: Tensor, stride, padding, dilation, groups: int) -> bool:
    """Whether a convolution of x is one that this backend joins with the phases of the units before and behind it, by the three
    functions below; without it chains run unit by unit. x is its input, or the z of which bn_fwd_apply makes that."""
    return False


def bn_fwd_apply_conv_fwd_reduce(
    z: Tensor, norm: Norm | None, act: str, slope: float, *args
) -> tuple[Tensor, Tensor, Tensor]:
    """bn_fwd_apply of the unit before, whose y is read by nobody else, or nothing without norm, and conv_fwd_reduce, whose arguments
    behind x are args: (z, mean, rstd)."""
    x = z if norm is None else bn_fwd_apply(z, *norm, None, act, slope, False)[0]
    z, mean, _, rstd = conv_fwd_reduce(x, *args)
    return z, mean, rstd


def joins_residual(x: Tensor, weight: Tensor, stride, padding, dilation, groups: int) -> bool:
    """Whether a convolution that `fuses_chain` says yes to can do the bn_fwd_apply of the unit before, which has a residual, by the
    function below. x is the z of that unit."""
    return False


def bn_fwd_apply_residual_conv_fwd_reduce(
    z: Tensor, norm: Norm, residual: Tensor, act: str, slope: float, want_bits: bool, *args
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """bn_fwd_apply of the unit before, whose y others read too, and conv_fwd_reduce, whose arguments behind x are args: (z, mean,
    rstd, y, bits)."""
    y, bits = bn_fwd_apply(z, *norm, residual, act, slope, want_bits)
    z, mean, _, rstd = conv_fwd_reduce(y, *args)
    return z, mean, rstd, y, bits


def bn_fwd_apply_both(
    z: Tensor,
    norm: Norm,
    residual_z: Tensor,
    residual_norm: Norm,
    act: str,
    slope: float,
    want_bits: bool,
) -> tuple[Tensor, Tensor]:
    """bn_fwd_apply of a unit and of the one without activation that is its residual and read by nobody else: (y, bits)."""
    residual, _ = bn_fwd_apply(residual_z, *residual_norm, None, "identity", 0.0, False)
    return bn_fwd_apply(z, *norm, residual, act, slope, want_bits)


def fuses_gram(x: Tensor, weight: Tensor, stride, padding, groups: int) -> bool:
    """Whether BatchNorm's statistics behind a convolution of x are taken from those of x, equations (16) to (20), by the four
    functions below, and z never exists; only for convolutions of 1x1 with stride 1, no padding and one group."""
    return False


def bn_fwd_apply_gram_reduce(
    z: Tensor,
    norm: Norm | None,
    act: str,
    slope: float,
    weight: Tensor,
    bias: Tensor | None,
    *stats,
) -> tuple[Tensor, Tensor]:
    """(mean_x [J], rstd [C]) by equations (16), (17) and (3), x being bn_fwd_apply of z, or z without norm; updates the running
    statistics, which stats and the momentum and eps behind them are those of `bn_fwd_reduce`."""
    running_mean, running_var, num_batches_tracked, momentum, eps = stats
    x = _rows(z, norm, act, slope)
    mean_x = x.mean(0)
    x = x - mean_x
    w = weight.flatten(1).to(z.dtype).to(x.dtype)
    mean = w @ mean_x if bias is None else w @ mean_x + bias.to(x.dtype)
    m2 = ((w @ (x.T @ x)) * w).sum(1).clamp_min(0)
    count = x.shape[0]
    running = (running_mean, running_var, num_batches_tracked)
    update_running_statistics(*running, momentum, mean, m2, count)
    return mean_x, rstd_of(m2 / count, eps)


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
    """(y, bits) of the convolution's unit by equations (18) and (6); own.mean is mean_x. A residual with a norm is the z of a unit
    without activation, see `bn_fwd_apply_both`."""
    x = _rows(z, norm, act, slope) - own.mean
    centred = x @ weight.flatten(1).to(z.dtype).to(x.dtype).T
    batch, _, *sizes = z.shape
    centred = centred.view(batch, *sizes, -1).movedim(-1, 1)
    pre = _pre_activation(centred, torch.zeros_like(own.rstd), *own[1:], None)
    if residual is not None:
        if residual_norm is not None:
            residual, _ = bn_fwd_apply(residual, *residual_norm, None, "identity", 0.0, False)
        pre = pre + residual.to(pre.dtype)
    y = _act_value(pre, own_act, own_slope).to(z.dtype)
    y = torch.empty_like(y, memory_format=_format_of(z)).copy_(y)
    if not want_bits:
        return y, torch.empty(0, dtype=torch.uint8, device=z.device)
    return y, _pack_bits(_act_passes(pre.to(z.dtype), own_act))


def bn_bwd_mask(dy: Tensor, bits: Tensor, act: str, slope: float) -> Tensor:
    """db by equation (7), from the bits that `bn_fwd_apply_conv_fwd_apply` wrote for a y of the layout of dy."""
    passes = _unpack_bits(bits, dy.shape)
    return torch.where(passes, dy, dy * slope if act == "leaky_relu" else 0)


def bn_fwd_apply_conv_bwd_reduce(
    db: Tensor, source: Source, act: str, slope: float, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """(dgamma, dbeta) by equations (19) and (8); act is the source's, rstd of the unit of the convolution."""
    z, *norm, mean_x = source
    x = _rows(z, Norm(*norm), act, slope) - mean_x
    db = _rows(db, None, "identity", 0.0)
    w = weight.flatten(1).to(z.dtype).to(x.dtype)
    return ((db.T @ x) * w).sum(1) * rstd, db.sum(0)


def _rows(z: Tensor, norm: Norm | None, act: str, slope: float) -> Tensor:
    """[M, C] in the accumulator's dtype of z, or of bn_fwd_apply of it."""
    if norm is not None:
        z, _ = bn_fwd_apply(z, *norm, None, act, slope, False)
    return z.to(accumulator(z.dtype)).movedim(1, -1).flatten(0, -2)


def _format_of(z: Tensor) -> torch.memory_format:
    last = z.dim() == 4 and z.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


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
    gate: Tensor | None = None,
    shift: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor] | None, tuple[Tensor, Tensor] | None]:
    """bn_bwd_apply, conv_dgrad, a sum, and bn_bwd_reduce of the unit below: (dx + add, its (dgamma, dbeta), those of the unit
    beside it), each None where there is no such unit.

    Without above dy is dz; with source the convolution is one of equations (16) to (20), and dx that of (20). Where the unit below
    has bits, what is returned is its db, the gradient of its residual too; where its activation is smooth as well, whose slope is then
    found once. With gate and shift [N, C], of squeeze and excitation behind the unit, its output's gradient is dy gate + shift.
    """
    if gate is not None:
        dy = torch.addcmul(shift[:, :, None, None], dy, gate[:, :, None, None])
    if source is not None:
        dx = _dgrad_without_z(dy, above, source, source_act, source_slope, weight)
    else:
        if above is not None:
            z, *vectors, dgamma, dbeta = above
            state = (z, *vectors, None, None, dgamma, dbeta)
            dy, _ = bn_bwd_apply(dy, *state, above_act, above_slope, False)
        dx = conv_dgrad(dy, weight, input_size, stride, padding, dilation, groups)
    if add is not None:
        dx = dx + add
    if below is None:
        return dx, None, None
    z, bits, *vectors = below
    if bits is not None:
        dx = bn_bwd_mask(dx, bits, below_act, below_slope)
        below_act = "identity"
    elif below_act in SMOOTH_ACTS:
        db = _masked_gradient(dx, z, *vectors, None, None, below_act, below_slope)
        dx, below_act = db.to(dx.dtype), "identity"
    sums = None
    if z is not None:
        sums = bn_bwd_reduce(dx, z, *vectors, None, None, below_act, below_slope)
    if beside is None:
        return dx, sums, None
    return dx, sums, bn_bwd_reduce(dx, *beside, None, None, None, None, "identity", 0.0)


def _dgrad_without_z(db, above, source, act, slope, weight):
    """Equation (20)."""
    z, *norm, mean_x = source
    x = _rows(z, Norm(*norm), act, slope) - mean_x
    w = weight.flatten(1).to(z.dtype).to(x.dtype)
    _, _, rstd, gamma, _, dgamma, dbeta = above
    scale = rstd if gamma is None else gamma.to(rstd.dtype) * rstd
    count = x.shape[0]
    q = (w * (scale * rstd * dgamma / count)[:, None]).T @ w
    dx = ((_rows(db, None, "identity", 0.0) - dbeta / count) * scale) @ w - x @ q
    batch, _, *sizes = z.shape
    return torch.empty_like(z).copy_(dx.view(batch, *sizes, -1).movedim(-1, 1))


def se_fwd(
    x: Tensor,
    reduce_weight: Tensor,
    reduce_bias: Tensor | None,
    expand_weight: Tensor,
    expand_bias: Tensor | None,
    act: str,
    gate: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, h [N, S], g [N, J]) by equation (13); reduce_weight [S, J, 1, 1], expand_weight [J, S, 1, 1], all in the dtype of x."""
    convs = (reduce_weight, reduce_bias, expand_weight, expand_bias)
    h, g = se_gate(x.mean((2, 3)), *convs, act, gate)
    return x * g[:, :, None, None], h, g


def se_gate(
    mean: Tensor,
    reduce_weight: Tensor,
    reduce_bias: Tensor | None,
    expand_weight: Tensor,
    expand_bias: Tensor | None,
    act: str,
    gate: str,
) -> tuple[Tensor, Tensor]:
    """(h [N, S], g [N, J]) of `se_fwd` from the mean [N, J] of each plane."""

    def linear(value, weight, bias):
        dtype = mean.dtype
        return F.linear(
            value, weight.flatten(1).to(dtype), None if bias is None else bias.to(dtype)
        )

    h = linear(mean, reduce_weight, reduce_bias)
    g = linear(_act_value(h, act, 0.0), expand_weight, expand_bias)
    return h, torch.sigmoid(g) if gate == "sigmoid" else F.hardsigmoid(g)


def joins_squeeze(
    x: Tensor, weight: Tensor, stride, padding, groups: int, groups_below: int
) -> bool:
    """Whether the backend joins squeeze and excitation with what is around it, by `se_fwd_reduce`, `bn_fwd_apply_se_conv_fwd_reduce`,
    `se_bwd_sums` and gate and shift of `bn_bwd_apply_conv_dgrad_reduce`: the convolution behind it, and that of the unit in front of
    it, of groups_below groups. x is the z of the unit in front. Asked where both convolutions are of those of `fuses_chain`."""
    return False


def se_fwd_reduce(z: Tensor, norm: Norm, act: str, slope: float) -> Tensor:
    """The mean [N, J] of each plane of bn_fwd_apply of z."""
    return bn_fwd_apply(z, *norm, None, act, slope, False)[0].mean((2, 3))


def bn_fwd_apply_se_conv_fwd_reduce(
    z: Tensor, norm: Norm, act: str, slope: float, gate: Tensor, *args
) -> tuple[Tensor, Tensor, Tensor]:
    """conv_fwd_reduce(*args) of bn_fwd_apply of z times gate [N, J]: (z, mean, rstd)."""
    x = bn_fwd_apply(z, *norm, None, act, slope, False)[0] * gate[:, :, None, None]
    z, mean, _, rstd = conv_fwd_reduce(x, *args)
    return z, mean, rstd


def se_bwd_sums(dy: Tensor, z: Tensor, norm: Norm, act: str, slope: float) -> Tensor:
    """[N, 5, J]: over each plane the sums of dy y, dy act', dy act' (z - mean), act' and act' (z - mean), where y is bn_fwd_apply of z and
    dy the gradient of y times the gate. The first is dg of `se_bwd_reduce`; the others give dgamma and dbeta of the unit, see
    `se_bwd_norm`, before the gradient of y is known."""
    acc = accumulator(z.dtype)
    y = bn_fwd_apply(z, *norm, None, act, slope, False)[0].to(acc)
    _, factor = bn_bwd_apply(
        torch.ones_like(dy), z, *norm, None, None, None, None, act, slope, True
    )
    centred = z.to(acc) - per_channel(norm.mean, z)
    dy, factor = dy.to(acc), factor.to(acc)
    terms = (dy * y, dy * factor, dy * factor * centred, factor, factor * centred)
    return torch.stack([t.sum((2, 3)) for t in terms], 1)


def se_bwd_norm(sums: Tensor, gate: Tensor, shift: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """(dgamma, dbeta) of a unit whose output's gradient is dy gate + shift, both [N, J], from the sums of `se_bwd_sums`."""
    dbeta = (sums[:, 1] * gate).addcmul(sums[:, 3], shift).sum(0)
    dgamma = (sums[:, 2] * gate).addcmul(sums[:, 4], shift).sum(0) * rstd
    return dgamma, dbeta


def se_bwd_reduce(
    dy: Tensor,
    z: Tensor,
    mean: Tensor | None,
    rstd: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    act: str,
    slope: float,
) -> Tensor:
    """dg [N, J] by equation (14) in the accumulator dtype; x is z, or where mean is given `bn_fwd_apply` of z."""
    x = z if mean is None else bn_fwd_apply(z, mean, rstd, gamma, beta, None, act, slope, False)[0]
    acc = accumulator(z.dtype)
    return (dy.to(acc) * x.to(acc)).sum((2, 3))


def se_bwd_apply(
    dy: Tensor,
    dg: Tensor,
    h: Tensor,
    g: Tensor,
    reduce_weight: Tensor,
    expand_weight: Tensor,
    act: str,
    gate: str,
) -> Tensor:
    """dx by equation (15), from dg of `se_bwd_reduce` and h, g of `se_fwd`."""
    plane = dy.shape[2] * dy.shape[3]
    shift = se_bwd_gate(dg, h, g, reduce_weight, expand_weight, act, gate, plane)
    return torch.addcmul(shift.to(dy.dtype)[:, :, None, None], dy, g[:, :, None, None])


def se_bwd_gate(
    dg: Tensor,
    h: Tensor,
    g: Tensor,
    reduce_weight: Tensor,
    expand_weight: Tensor,
    act: str,
    gate: str,
    plane: int,
) -> Tensor:
    """What equation (15) adds to dy g for each plane, [N, J] in the dtype of dg; plane: pixels of it."""
    acc = dg.dtype
    wide_g, wide_h = g.to(acc), h.to(acc)
    if gate == "sigmoid":
        dpre = dg * wide_g * (1 - wide_g)
    else:
        dpre = torch.ops.aten.hardsigmoid_backward(dg, 6 * wide_g - 3)
    dh = dpre @ expand_weight.flatten(1).to(acc)
    if act in SMOOTH_ACTS:
        dh = dh * _act_slope(wide_h, act)
    elif act != "identity":
        dh = torch.where(_act_passes(wide_h, act), dh, 0)
    return dh @ reduce_weight.flatten(1).to(acc) / max(1, plane)


def max_pool(
    y: Tensor, kernel: list[int], stride: list[int], padding: list[int]
) -> tuple[Tensor, Tensor]:
    """(p, places) of y [N, C, H, W]: torch's max_pool2d, and the place of each maximum within its window, uint8 and in p's layout.

    kernel, stride and padding [2]; at most 256 places in a window.
    """
    pooled, index = torch.ops.aten.max_pool2d_with_indices(y, kernel, stride, padding)
    width = y.shape[3]
    down, across = _windows(pooled, stride, padding)
    place = (index // width - down) * kernel[1] + index % width - across
    return pooled, place.to(torch.uint8)


def joins_pool(x: Tensor) -> bool:
    """Whether the backend joins the max-pooling behind a unit of x with the unit's own phases, by the two functions below; else it
    is not to be asked for them."""
    return False


def bn_fwd_apply_max_pool(
    z: Tensor, norm: Norm, act: str, slope: float, *window
) -> tuple[Tensor, Tensor]:
    """bn_fwd_apply without residual and max_pool: (p, places)."""
    return max_pool(bn_fwd_apply(z, *norm, None, act, slope, False)[0], *window)


def max_pool_backward_bn_bwd_reduce(
    dp: Tensor, places: Tensor, z: Tensor, norm: Norm, act: str, slope: float, *window
) -> tuple[Tensor, Tensor]:
    """max_pool_backward and bn_bwd_reduce, where nobody asks for dy: (dgamma, dbeta)."""
    dy = max_pool_backward(dp, places, z, *window)
    return bn_bwd_reduce(dy, z, *norm, None, None, act, slope)


def max_pool_values(
    y: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> Tensor:
    """p of max_pool alone."""
    return torch.nn.functional.max_pool2d(y, kernel, stride, padding)


def max_pool_backward(
    dp: Tensor, places: Tensor, y: Tensor, kernel: list[int], stride: list[int], padding: list[int]
) -> Tensor:
    """dy of max_pool from dp; of y [N, C, H, W] only the shape, dtype and layout are asked for."""
    place = places.to(torch.int64)
    down, across = _windows(dp, stride, padding)
    index = (place // kernel[1] + down) * y.shape[3] + place % kernel[1] + across
    ones = [1, 1]
    return torch.ops.aten.max_pool2d_with_indices_backward(
        dp, y, kernel, stride, padding, ones, False, index
    )


def _windows(pooled: Tensor, stride: list[int], padding: list[int]) -> tuple[Tensor, Tensor]:
    """[OH, 1] and [OW]: the row and the column in which each window begins; in the padding they are below 0."""
    down, across = (
        torch.arange(size, device=pooled.device) * s - p
        for size, s, p in zip(pooled.shape[2:], stride, padding, strict=True)
    )
    return down[:, None], across


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics and sums over tensors of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def per_channel(vector: Tensor, z: Tensor) -> Tensor:
    """A [C] vector shaped to broadcast against z [N, C, *]."""
    return vector.view(1, -1, *[1] * (z.dim() - 2))


def rstd_of(var: Tensor, eps: float) -> Tensor:
    """Equation (3) in the dtype of var; 0 where var + eps is 0."""
    shifted = var + eps
    return torch.where(shifted == 0, 0, shifted.rsqrt())


def _pre_activation(z, mean, rstd, gamma, beta, residual):
    """Equation (5) in the accumulator dtype."""
    scale = rstd if gamma is None else gamma.to(rstd.dtype) * rstd
    pre = (z.to(mean.dtype) - per_channel(mean, z)) * per_channel(scale, z)
    if beta is not None:
        pre = pre + per_channel(beta.to(mean.dtype), z)
    return pre if residual is None else pre + residual.to(mean.dtype)


def _act_value(pre, act, slope):
    if act == "identity":
        return pre
    if act == "relu":
        return F.relu(pre)
    if act == "relu6":
        return F.relu6(pre)
    if act == "leaky_relu":
        return F.leaky_relu(pre, slope)
    if act == "silu":
        return F.silu(pre)
    return F.hardswish(pre)


def _act_passes(pre, act):
    """Where the gradient passes with slope 1. A NaN passes, as it does in PyTorch's own backward."""
    if act == "relu6":
        return ~((pre <= 0) | (pre >= 6))
    return ~(pre <= 0) if act == "relu" else pre > 0


def _act_slope(pre, act):
    """act'(pre) of the smooth activations."""
    if act == "silu":
        s = torch.sigmoid(pre)
        return s * (1 + pre * (1 - s))
    return torch.where(pre <= -3, 0, torch.where(pre < 3, pre / 3 + 0.5, 1))


def _masked_gradient(dy, z, mean, rstd, gamma, beta, residual, bits, act, slope):
    """Equation (7) in the accumulator dtype."""
    db = dy.to(mean.dtype)
    if act == "identity":
        return db
    if bits is not None:
        passes = _unpack_bits(bits, z.shape)
    else:
        pre = _pre_activation(z, mean, rstd, gamma, beta, residual)
        if act in SMOOTH_ACTS:
            return db * _act_slope(pre, act)
        passes = _act_passes(pre.to(z.dtype), act)
    return torch.where(passes, db, db * slope if act == "leaky_relu" else 0)


def _pack_bits(passes: Tensor) -> Tensor:
    flat = passes.reshape(-1)
    flat = F.pad(flat, (0, -flat.numel() % 8)).view(-1, 8).to(torch.uint8)
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=flat.device)
    return (flat * weights).sum(1, dtype=torch.uint8)


def _unpack_bits(bits: Tensor, shape: torch.Size) -> Tensor:
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    flat = (bits.unsqueeze(1) >> shifts) & 1
    return flat.view(-1)[: shape.numel()].view(shape).bool()
