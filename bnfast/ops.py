"""The functional form: a chain of frozen convolutions with BatchNorm, residual and activation, and its one autograd Function."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import cross_rank, dispatch
from .reference import ACTS, BIT_ACTS, GATES, SMOOTH_ACTS, accumulator, conv_output_size, rstd_of


class SqueezeExcite(NamedTuple):
    """Squeeze and excitation (arXiv 1709.01507) of x [N, J, H, W]: x * gate(W2 act(W1 mean(x) + b1) + b2).

    reduce_weight [S, J, 1, 1] and expand_weight [J, S, 1, 1] are W1 and W2; none of the four tensors may need a gradient.
    act is one of `reference.ACTS` but leaky_relu, gate one of `reference.GATES`.
    """

    reduce_weight: Tensor
    reduce_bias: Tensor | None
    expand_weight: Tensor
    expand_bias: Tensor | None
    act: str = "relu"
    gate: str = "sigmoid"


class Unit(NamedTuple):
    """One unit of a chain, y = act(BatchNorm(conv(x)) + residual); conv, BatchNorm and residual are each optional.

    squeeze, where given, is applied to x [N, J, H, W] before the convolution.

    weight [C, J / groups, *] or [C, J] (linear), None without a convolution; neither weight nor bias may need a gradient.
    gamma, beta [C]; running_mean, running_var [C] and num_batches_tracked [] are updated in place where batch statistics
    are used. normalize says whether there is a BatchNorm at all; use_batch_statistics is BatchNorm's training mode.
    residual has the shape and dtype of the unit's output. act is one of `reference.ACTS`. group: a process group of
    torch.distributed over which batch statistics are taken.
    """

    weight: Tensor | None = None
    bias: Tensor | None = None
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    normalize: bool = True
    use_batch_statistics: bool = True
    gamma: Tensor | None = None
    beta: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    num_batches_tracked: Tensor | None = None
    momentum: float | None = 0.1
    eps: float = 1e-5
    residual: Tensor | None = None
    act: str = "identity"
    negative_slope: float = 0.01
    squeeze: SqueezeExcite | None = None
    group: Any = None


# Tensor fields of a unit in the order in which the Function takes them; the others are its static description. The tensors
# of squeeze and excitation follow those of all units.
_TENSORS = (
    "weight",
    "bias",
    "gamma",
    "beta",
    "running_mean",
    "running_var",
    "num_batches_tracked",
    "residual",
)
_WEIGHT, _BIAS, _GAMMA, _BETA, _RUNNING_MEAN, _RUNNING_VAR, _TRACKED, _RESIDUAL = range(8)


def frozen_conv_bn_act(x: Tensor, units: Sequence[Unit], backend: str = "auto") -> Tensor:
    """Runs a chain of units, each on the output of the one before.

    x [N, J, *], any strides, f64, f32, bf16 or f16; returns [N, C, *] of the last unit, in channels_last where x (or the
    weight) is. Saves for the backward pass, per unit, the convolution's output and one bit per element where a residual
    hides the activation's sign (the residual itself in front of silu and hardswish); never a convolution's input. Squeeze
    and excitation computes its input again from the unit before it, or saves it where there is none (or one with a residual).
    Gradients flow to x, gamma, beta and residual. Under autocast convolutions run in its dtype.

    Raises ValueError for what does not fit together, RuntimeError where a second derivative is asked for.
    """
    name = dispatch.pick(backend, x.device)
    for unit in units:
        _check(unit, x)
    if torch.is_autocast_enabled(x.device.type) and any(u.weight is not None for u in units):
        dtype = torch.get_autocast_dtype(x.device.type)
        if x.dtype != torch.float64:
            if units[0].weight is None:
                # A leading BatchNorm stays in its input's dtype; the convolutions behind it do not.
                x = frozen_conv_bn_act(x, units[:1], backend)
                units = units[1:]
            x = x.to(dtype)
    if torch.compiler.is_compiling():
        # Dynamo takes no tensor twice, and a block's input is often its residual.
        units = [
            u if u.residual is None else u._replace(residual=u.residual.view_as(u.residual))
            for u in units
        ]
    tensors = [getattr(unit, field) for unit in units for field in _TENSORS]
    for unit in units:
        if unit.squeeze is not None:
            tensors += unit.squeeze[:4]
    saves = torch.is_grad_enabled() and (
        x.requires_grad or any(t is not None and t.requires_grad for t in tensors)
    )
    specs = tuple(
        (
            u.stride,
            u.padding,
            u.dilation,
            u.groups,
            u.normalize,
            u.use_batch_statistics,
            u.momentum,
            u.eps,
            u.act,
            u.negative_slope,
            None if u.squeeze is None else u.squeeze[4:],
            u.group,
        )
        for u in units
    )
    return _Chain.apply(specs, name, saves, x, *tensors)


def _check(unit: Unit, x: Tensor) -> None:
    if unit.act not in ACTS:
        raise ValueError(f"act is {unit.act!r}; allowed are {', '.join(map(repr, ACTS))}")
    for name in ("weight", "bias"):
        tensor = getattr(unit, name)
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name} needs a gradient; frozen_conv_bn_act computes none for it: "
                f"set {name}.requires_grad_(False), or run the convolution outside"
            )
    if unit.squeeze is not None:
        _check_squeeze(unit.squeeze, x)
    if unit.weight is None and not unit.normalize:
        raise ValueError("a unit without weight and with normalize=False has nothing to compute")
    if not unit.normalize and (unit.act != "identity" or unit.residual is not None):
        raise ValueError("act and residual follow a BatchNorm; with normalize=False there is none")
    has_buffers = unit.running_mean is not None and unit.running_var is not None
    if unit.normalize and not (unit.use_batch_statistics or has_buffers):
        raise ValueError("use_batch_statistics is False; that needs running_mean and running_var")
    if not x.is_floating_point():
        raise ValueError(f"x is of dtype {x.dtype}; floating point is needed")


def _check_squeeze(squeeze: SqueezeExcite, x: Tensor) -> None:
    if squeeze.act not in ACTS or squeeze.act == "leaky_relu":
        raise ValueError(f"squeeze.act is {squeeze.act!r}; {ACTS} but leaky_relu are allowed")
    if squeeze.gate not in GATES:
        raise ValueError(f"squeeze.gate is {squeeze.gate!r}; allowed are {GATES}")
    if any(t is not None and t.requires_grad for t in squeeze[:4]) and torch.is_grad_enabled():
        raise ValueError("squeeze holds a tensor that needs a gradient; none is computed for it")
    if x.dim() != 4:
        raise ValueError(f"x has {x.dim()} dimensions; squeeze needs [N, J, H, W]")


class _Chain(torch.autograd.Function):
    """Forward and backward of a chain, unit by unit, through the phases of one backend."""

    @staticmethod
    def forward(ctx, specs, backend, saves, x, *tensors):
        phases = dispatch.module(backend)
        saved = []
        saved_squeeze = []
        input_sizes = []
        shares = []
        squeezes = iter(range(8 * len(specs), len(tensors), 4))
        can_recompute = False  # x from what the unit before saves
        for i, spec in enumerate(specs):
            (
                stride,
                padding,
                dilation,
                groups,
                normalize,
                batch_stats,
                momentum,
                eps,
                act,
                slope,
                squeeze,
                group,
            ) = spec
            weight, bias, gamma, beta, running_mean, running_var, tracked, residual = tensors[
                8 * i : 8 * i + 8
            ]
            input_sizes.append(x.shape[2:])
            if squeeze is not None:
                at = next(squeezes)
                given = x
                x, hidden, gate = phases.se_fwd(x, *tensors[at : at + 4], *squeeze)
                saved_squeeze += (
                    tensors[at],
                    tensors[at + 2],
                    hidden,
                    gate,
                    None if can_recompute else given,
                )
            mean = rstd = bits = None
            want_bits = saves and residual is not None and act in BIT_ACTS
            share = None
            conv = (weight, bias, stride, padding, dilation, groups)
            if normalize and batch_stats and group is not None:
                z = x if weight is None else phases.conv_forward(x, *conv)
                mean, m2, _ = phases.bn_fwd_reduce(z, None, None, None, momentum, eps)
                stats = (running_mean, running_var, tracked, momentum, eps)
                count = math.prod(z.shape[:1] + z.shape[2:])
                mean, rstd, share = cross_rank.merged(count, mean, m2, *stats, group)
                rest = (gamma, beta, residual, act, slope, want_bits)
                x, bits = phases.bn_fwd_apply(z, mean, rstd, *rest)
            elif normalize and batch_stats:
                stats = (running_mean, running_var, tracked, momentum, eps)
                rest = (*stats, gamma, beta, residual, act, slope, want_bits)
                if weight is None:
                    _check_count(x.shape)
                    z = x
                    mean, rstd, x, bits = phases.bn_fwd_reduce_apply(z, *rest)
                else:
                    sizes = conv_output_size(x.shape[2:], weight, stride, padding, dilation)
                    _check_count([x.shape[0], weight.shape[0], *sizes])
                    z, mean, rstd, x, bits = phases.conv_fwd_reduce_apply(x, *conv, *rest)
            else:
                z = x if weight is None else phases.conv_forward(x, *conv)
                x = z
            if normalize and not batch_stats:
                # A copy: the buffers may change before the backward pass.
                mean = running_mean.to(accumulator(z.dtype), copy=True)
                rstd = rstd_of(running_var.to(mean.dtype), eps)
                x, bits = phases.bn_fwd_apply(
                    z, mean, rstd, gamma, beta, residual, act, slope, want_bits
                )
            bits = bits if want_bits else None
            hidden = residual if residual is not None and act in SMOOTH_ACTS else None
            kept = (z if normalize else None, mean, rstd, bits, hidden)
            can_recompute = normalize and residual is None
            saved += (weight, gamma, beta, *kept)
            shares.append(share)
        if saves:
            ctx.save_for_backward(*saved, *saved_squeeze)
            ctx.specs, ctx.backend, ctx.input_sizes, ctx.shares = (
                specs,
                backend,
                input_sizes,
                shares,
            )
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        phases = dispatch.module(ctx.backend)
        saved = ctx.saved_tensors
        needs_x, *needs = ctx.needs_input_grad[3:]
        grads = [None] * len(needs)
        squeezes = iter(range(len(saved) - 5, -1, -5))
        ours = False  # dy was made here and nobody else holds it: dz may be written over it
        for i in reversed(range(len(ctx.specs))):
            spec, share = ctx.specs[i], ctx.shares[i]
            stride, padding, dilation, groups, normalize, batch_stats = spec[:6]
            act, slope, squeeze, group = spec[8:]
            weight, gamma, beta, z, mean, rstd, bits, hidden = saved[8 * i : 8 * i + 8]
            conv = (ctx.input_sizes[i], stride, padding, dilation, groups)
            needs_input = needs_x or any(needs[: 8 * i])
            first = 8 * i
            if normalize:
                state = (dy, z, mean, rstd, gamma, beta, hidden, bits)
                needs_residual = needs[first + _RESIDUAL]
                is_dresidual = act == "identity" and needs_residual
                want = needs_residual and not is_dresidual
                if is_dresidual:
                    grads[first + _RESIDUAL] = dy
                may_overwrite = ours and not is_dresidual
                over_dy = may_overwrite and dy.stride() == z.stride()
                dgamma = dbeta = dresidual = None
                if share is not None:
                    dgamma, dbeta = phases.bn_bwd_reduce(*state, act, slope)
                    if needs_input or want:
                        over_all = cross_rank.summed(dgamma, dbeta, share, group)
                        dy, dresidual = phases.bn_bwd_apply(*state, *over_all, act, slope, want)
                elif batch_stats and needs_input and weight is not None:
                    dgamma, dbeta, dy, dresidual = phases.bn_bwd_reduce_apply_dgrad(
                        *state, act, slope, want, may_overwrite, weight, *conv
                    )
                elif batch_stats and needs_input:
                    if over_dy:
                        dgamma, dbeta, dresidual = phases.bn_bwd_reduce_apply_(
                            *state, act, slope, want
                        )
                    else:
                        dgamma, dbeta, dy, dresidual = phases.bn_bwd_reduce_apply(
                            *state, act, slope, want
                        )
                else:
                    if needs[first + _GAMMA] or needs[first + _BETA]:
                        dgamma, dbeta = phases.bn_bwd_reduce(*state, act, slope)
                    if needs_input or want:
                        if over_dy:
                            dresidual = phases.bn_bwd_apply_(*state, None, None, act, slope, want)
                        else:
                            dy, dresidual = phases.bn_bwd_apply(
                                *state, None, None, act, slope, want
                            )
                if needs[first + _GAMMA]:
                    grads[first + _GAMMA] = dgamma.to(gamma.dtype)
                if needs[first + _BETA]:
                    grads[first + _BETA] = dbeta.to(beta.dtype)
                if want:
                    grads[first + _RESIDUAL] = dresidual
            if not needs_input:
                break
            if weight is not None and not (normalize and batch_stats and share is None):
                dy = phases.conv_dgrad(dy, weight, *conv)
            if squeeze is not None:
                at = next(squeezes)
                dy = _squeeze_backward(phases, dy, saved[at : at + 5], squeeze, ctx.specs, saved, i)
            # Captured graphs stay functional.
            ours = not torch.compiler.is_compiling()
        return None, None, None, dy if needs_x else None, *grads


def _squeeze_backward(phases, dy, kept, squeeze, specs, saved, i):
    """The gradient of the input of unit i's squeeze and excitation, from that of its output."""
    reduce_weight, expand_weight, hidden, gate, x = kept
    if x is None:  # y of the unit before, from its z
        _, gamma, beta, z, mean, rstd, _, _ = saved[8 * i - 8 : 8 * i]
        before = (z, mean, rstd, gamma, beta, *specs[i - 1][8:10])
    else:
        before = (x, None, None, None, None, "identity", 0.0)
    dgate = phases.se_bwd_reduce(dy, *before)
    return phases.se_bwd_apply(dy, dgate, hidden, gate, reduce_weight, expand_weight, *squeeze)


def _check_count(shape: Sequence[int]) -> None:
    """Raises as torch does where a channel of a [N, C, *] value has one element: its variance is undefined."""
    if math.prod(shape[:1] + shape[2:]) == 1:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {list(shape)}"
        )
