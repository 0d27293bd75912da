"""The functional form: a chain of frozen convolutions with BatchNorm, residual and activation, and its one autograd Function."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import cross_rank, dispatch, recording
from .reference import (
    ACTS,
    BIT_ACTS,
    GATES,
    SMOOTH_ACTS,
    Above,
    Below,
    Beside,
    Norm,
    Source,
    accumulator,
    conv_output_size,
    rstd_of,
)


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


class MaxPool(NamedTuple):
    """Max-pooling of [N, C, H, W] as nn.MaxPool2d does it with dilation 1 and ceil_mode=False; pairs (height, width), at most 256
    pixels in a window."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]


class Unit(NamedTuple):
    """One unit of a chain, y = pool(act(BatchNorm(conv(x)) + residual)); conv, BatchNorm, residual and pool are each optional.

    squeeze, where given, is applied to x [N, J, H, W] before the convolution.

    weight [C, J / groups, *] or [C, J] (linear), None without a convolution; neither weight nor bias may need a gradient.
    gamma, beta [C]; running_mean, running_var [C] and num_batches_tracked [] are updated in place where batch statistics
    are used. normalize says whether there is a BatchNorm at all; use_batch_statistics is BatchNorm's training mode.
    residual has the shape and dtype of the unit's output in front of pool. act is one of `reference.ACTS`. group: a process group of
    torch.distributed over which batch statistics are taken.

    source and residual_source say whose output is the input and the residual, by its place in the chain; -1 is the chain's
    input. Without source it is the unit before; with residual_source there is no residual beside it.
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
    source: int | None = None
    residual_source: int | None = None
    pool: MaxPool | None = None


# Places of a unit's tensors among those that the Function takes; its static description is a _Spec. The tensors of squeeze and
# excitation follow those of all units.
_WEIGHT, _BIAS, _GAMMA, _BETA, _RUNNING_MEAN, _RUNNING_VAR, _TRACKED, _RESIDUAL = range(8)


class _Spec(NamedTuple):
    """What a unit is beside its tensors."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    normalize: bool
    use_batch_statistics: bool
    momentum: float | None
    eps: float
    act: str
    slope: float
    squeeze: tuple[str, str] | None  # act, gate
    group: Any
    source: int
    residual_source: int | None
    pool: MaxPool | None
    has_own_statistics: bool  # it normalises by the statistics of this process' batch

    @property
    def is_fusable(self) -> bool:
        """Whether the phases before and behind its convolution can join it."""
        return self.has_own_statistics and self.squeeze is None


def frozen_conv_bn_act(
    x: Tensor, units: Sequence[Unit], backend: str = "auto", low_memory: bool = False
) -> Tensor:
    """Runs a chain of units, each on the output of the one before or of the one that it names; every output but the last is
    read by units of the chain alone.

    x [N, J, *], any strides, f64, f32, bf16 or f16; returns [N, C, *] of the last unit, in channels_last where x (or the
    weight) is. Saves for the backward pass, per unit, the convolution's output and one bit per element where a residual
    hides the activation's sign (the residual itself in front of silu and hardswish); never a convolution's input. Of
    a 1x1 convolution that the backend `fuses_gram` only the bits. Squeeze and excitation computes its input again from the unit
    before it, or saves it where there is none (or one with a residual).
    low_memory: of a 1x1 convolution whose output has twice the channels of its input or more nothing is saved but the bits where the
    unit before it is; the convolution runs again in the backward pass.
    Gradients flow to x, gamma, beta and residual. Under autocast convolutions run in its dtype.

    Raises ValueError for what does not fit together, RuntimeError where a second derivative is asked for.
    """
    if not x.is_floating_point():
        raise ValueError(f"x is of dtype {x.dtype}; floating point is needed")
    name = dispatch.pick(backend, x.device)
    for i, unit in enumerate(units):
        _check(unit, x, i)
    if torch.is_autocast_enabled(x.device.type) and any(u.weight is not None for u in units):
        dtype = torch.get_autocast_dtype(x.device.type)
        if x.dtype != torch.float64:
            if units[0].weight is None:
                # A leading BatchNorm stays in its input's dtype; the convolutions behind it do not.
                x = frozen_conv_bn_act(x, units[:1], backend, low_memory)
                units = [_one_earlier(unit) for unit in units[1:]]
            x = x.to(dtype)
    if torch.compiler.is_compiling():
        # Dynamo takes no tensor twice, and a block's input is often its residual.
        units = [
            u if u.residual is None else u._replace(residual=u.residual.view_as(u.residual))
            for u in units
        ]
    tensors = []
    specs = []
    for i, unit in enumerate(units):
        tensors += (
            unit.weight,
            unit.bias,
            unit.gamma,
            unit.beta,
            unit.running_mean,
            unit.running_var,
            unit.num_batches_tracked,
            unit.residual,
        )
        specs.append(
            _Spec(
                unit.stride,
                unit.padding,
                unit.dilation,
                unit.groups,
                unit.normalize,
                unit.use_batch_statistics,
                unit.momentum,
                unit.eps,
                unit.act,
                unit.negative_slope,
                None if unit.squeeze is None else unit.squeeze[4:],
                unit.group,
                i - 1 if unit.source is None else unit.source,
                unit.residual_source,
                unit.pool,
                unit.normalize and unit.use_batch_statistics and unit.group is None,
            )
        )
    for unit in units:
        if unit.squeeze is not None:
            tensors += unit.squeeze[:4]
    saves = torch.is_grad_enabled() and (
        x.requires_grad or any(t is not None and t.requires_grad for t in tensors)
    )
    return _Chain.apply(tuple(specs), name, saves, low_memory, x, *tensors)


def _one_earlier(unit: Unit) -> Unit:
    """A unit of a chain whose first one has run on its own."""
    links = {"source": unit.source, "residual_source": unit.residual_source}
    if -1 in links.values():
        raise ValueError(
            "a chain that begins with a BatchNorm names its input; under autocast it cannot"
        )
    return unit._replace(**{n: None if k is None else k - 1 for n, k in links.items()})


def _check(unit: Unit, x: Tensor, place: int) -> None:
    if unit.act not in ACTS:
        raise ValueError(f"act is {unit.act!r}; allowed are {', '.join(map(repr, ACTS))}")
    if unit.pool is not None:
        _check_pool(unit, x)
    weight, bias, residual = unit.weight, unit.bias, unit.residual
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name} needs a gradient; frozen_conv_bn_act computes none for it: "
                f"set {name}.requires_grad_(False), or run the convolution outside"
            )
    source, residual_source = unit.source, unit.residual_source
    if source is not None or residual_source is not None:
        for name, link in (("source", source), ("residual_source", residual_source)):
            if link is not None and not -1 <= link < place:
                raise ValueError(f"{name} of unit {place} is {link}; allowed are -1 to {place - 1}")
    if residual is not None and residual_source is not None:
        raise ValueError(f"unit {place} has both a residual and a residual_source")
    if unit.squeeze is not None:
        _check_squeeze(unit.squeeze, x)
    if not unit.normalize:
        if weight is None:
            raise ValueError(
                "a unit without weight and with normalize=False has nothing to compute"
            )
        if unit.act != "identity" or residual is not None or residual_source is not None:
            raise ValueError(
                "act and residual follow a BatchNorm; with normalize=False there is none"
            )
    elif not unit.use_batch_statistics and (unit.running_mean is None or unit.running_var is None):
        raise ValueError("use_batch_statistics is False; that needs running_mean and running_var")


def _check_pool(unit: Unit, x: Tensor) -> None:
    if x.dim() != 4 or math.prod(unit.pool.kernel) > 256:
        raise ValueError(
            f"pool is {unit.pool} of a value with {x.dim()} dimensions; [N, C, H, W] and windows of at most 256 pixels are needed"
        )
    if not unit.normalize:
        raise ValueError("pool follows a BatchNorm; with normalize=False there is none")


def _check_squeeze(squeeze: SqueezeExcite, x: Tensor) -> None:
    if squeeze.act not in ACTS or squeeze.act == "leaky_relu":
        raise ValueError(f"squeeze.act is {squeeze.act!r}; {ACTS} but leaky_relu are allowed")
    if squeeze.gate not in GATES:
        raise ValueError(f"squeeze.gate is {squeeze.gate!r}; allowed are {GATES}")
    if any(t is not None and t.requires_grad for t in squeeze[:4]) and torch.is_grad_enabled():
        raise ValueError("squeeze holds a tensor that needs a gradient; none is computed for it")
    if x.dim() != 4:
        raise ValueError(f"x has {x.dim()} dimensions; squeeze needs [N, J, H, W]")


def _readers(specs: tuple[_Spec, ...]) -> list[list[int]]:
    """For each unit the units that read its output, as their input or residual; those of the chain's input at the end."""
    readers: list[list[int]] = [[] for _ in range(len(specs) + 1)]
    for i, spec in enumerate(specs):
        readers[spec.source].append(i)
        if spec.residual_source is not None:
            readers[spec.residual_source].append(i)
    return readers


class _Chain(torch.autograd.Function):
    """Forward and backward of a chain through the phases of one backend: unit by unit, or where the backend says so with a
    unit's bn_fwd_apply inside of its readers' convolutions, and its bn_bwd_reduce inside of the last one's data gradient."""

    @staticmethod
    def forward(ctx, specs, backend, saves, low_memory, x, *tensors):
        phases = dispatch.module(backend)

        def compute(inputs):
            return _Forward(phases, specs, saves, low_memory, inputs).run()

        ctx.owner = ctx.key = None
        inputs = [x, *tensors]
        ways = phases.ways() if _is_recordable(backend, specs, x) else None
        if ways is not None:
            ctx.owner = next((w for w in tensors[: 8 * len(specs) : 8] if w is not None), None)
        if ctx.owner is None:
            (y, *saved), facts = compute(inputs)
        else:
            ctx.key = (specs, saves, low_memory, x.shape, x.stride(), x.dtype, ways)
            (y, *saved), facts = recording.run(ctx.owner, ctx.key, inputs, compute)
        if saves:
            ctx.save_for_backward(*saved)
            ctx.backend, ctx.specs, ctx.facts = backend, specs, facts
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        phases, needs = dispatch.module(ctx.backend), ctx.needs_input_grad[4:]
        inputs = [dy, *ctx.saved_tensors]
        if not torch.compiler.is_compiling():
            # From here on this list alone holds them (unless the graph is kept), and lets each go with its unit.
            ctx.maybe_clear_saved_tensors()

        def compute(inputs):
            return _Backward(phases, ctx.specs, ctx.facts, needs, inputs).run(), None

        if ctx.owner is None or type(dy) is not Tensor:
            grads, _ = compute(inputs)
        else:
            key = (ctx.key, needs, dy.shape, dy.stride(), dy.dtype)
            grads, _ = recording.run(ctx.owner, key, inputs, compute)
        return None, None, None, None, *grads


def _is_recordable(backend: str, specs: tuple[_Spec, ...], x: Tensor) -> bool:
    """Whether what a chain does is operators of the dispatcher that follow from its description and shapes."""
    return (
        recording.is_active
        and backend == "cpu"
        and type(x) is Tensor
        and not torch.compiler.is_compiling()
        and all(spec.group is None for spec in specs)
    )


class _Facts(NamedTuple):
    """What the backward pass of a chain knows of the forward pass beside its tensors."""

    input_sizes: list[torch.Size]
    shares: list  # of the batch of all ranks, by unit
    # Whether the backend joins the unit's convolution with what is around it.
    joins: list[bool]
    readers: list[list[int]]
    dropped: list[int]  # units whose z the backward pass makes again
    is_last: bool  # the chain's output is in channels_last, and its gradient is to be


class _Forward:
    """The forward pass of one chain, from its first unit to its last, and what it keeps for the backward pass."""

    def __init__(self, phases, specs, saves: bool, low_memory: bool, inputs: list) -> None:
        x, *tensors = inputs
        self.phases, self.specs, self.saves, self.tensors = phases, specs, saves, tensors
        self.low_memory = low_memory
        self.readers = _readers(specs)
        self.fuses = _Fuses(phases, specs, tensors)
        self.outputs: list[Tensor | None] = [None] * len(specs) + [x]  # the last one is -1's
        # Units whose bn_fwd_apply their readers do: what it takes. Their output is their z.
        self.waiting: dict[int, tuple[Norm, str, float]] = {}
        # A unit with a residual whose bn_fwd_apply the next one does, and what that takes. Until then its output is its z.
        self.kept_by_next: dict[int, tuple[Norm, Tensor, str, float, bool]] = {}
        self.recomputable: set[int] = set()  # units whose output follows from what they save
        # Eight tensors per unit, see `_Backward.state`; five per squeeze and excitation.
        self.saved: list[Tensor | None] = []
        self.saved_squeeze: list[Tensor | None] = []
        self.gate: Tensor | None = None  # of the unit that runs, where its convolution applies it
        self.input_sizes: list[torch.Size] = []
        self.shares: list = []
        self.dropped: list[int] = []
        self.saved_biases: list[Tensor | None] = []  # of the dropped ones
        # Where the maxima of those units lie that pool, in their order.
        self.saved_places: list[Tensor] = []
        self.joins: list[bool] = []

    def run(self) -> tuple[list[Tensor | None], _Facts]:
        """The output of the last unit and what is to be saved, and what is to be known."""
        squeezes = iter(range(8 * len(self.specs), len(self.tensors), 4))
        outputs = self.outputs
        for i, spec in enumerate(self.specs):
            x = outputs[spec.source]
            self.input_sizes.append(x.shape[2:])
            is_gated = spec.squeeze is not None and spec.source in self.waiting
            if is_gated:
                self.gate = self.gate_of(x, spec, next(squeezes))
            elif spec.squeeze is not None:
                x = self.squeeze(x, spec, next(squeezes))
            self.joins.append(is_gated or self.fuses(i, x))
            outputs[i] = self.unit(i, spec, x)
            for k in (spec.source, spec.residual_source):
                if k is not None and k >= 0 and self.readers[k][-1] == i:
                    outputs[k] = None  # nobody reads it any more
        saved = (*self.saved, *self.saved_biases, *self.saved_places, *self.saved_squeeze)
        y = outputs[len(self.specs) - 1]
        facts = _Facts(
            self.input_sizes, self.shares, self.joins, self.readers, self.dropped, _is_last(y)
        )
        return [y, *saved], facts

    def squeeze(self, x: Tensor, spec: _Spec, at: int) -> Tensor:
        """x through squeeze and excitation, whose tensors begin at `at`."""
        reduce, _, expand, _ = tensors = self.tensors[at : at + 4]
        y, hidden, gate = self.phases.se_fwd(x, *tensors, *spec.squeeze)
        kept = None if spec.source in self.recomputable else x
        self.saved_squeeze += (reduce, expand, hidden, gate, kept)
        return y

    def gate_of(self, z: Tensor, spec: _Spec, at: int) -> Tensor:
        """The gate [N, J] of squeeze and excitation of a unit's output, which its convolution makes of z."""
        reduce, _, expand, _ = tensors = self.tensors[at : at + 4]
        mean = self.phases.se_fwd_reduce(z, *self.waiting[spec.source])
        hidden, gate = self.phases.se_gate(mean, *tensors, *spec.squeeze)
        self.saved_squeeze += (reduce, expand, hidden, gate, None)
        return gate

    def unit(self, i: int, spec: _Spec, x: Tensor) -> Tensor:
        """The output of unit i, or its z where it waits."""
        phases = self.phases
        weight, bias, gamma, beta, running_mean, running_var, tracked, residual = self.tensors[
            8 * i : 8 * i + 8
        ]
        if spec.residual_source is not None:
            residual = self.outputs[spec.residual_source]
        act, slope = spec.act, spec.slope
        want_bits = self.saves and residual is not None and act in BIT_ACTS
        conv = (weight, bias, spec.stride, spec.padding, spec.dilation, spec.groups)
        stats = (running_mean, running_var, tracked, spec.momentum, spec.eps)
        affine = (gamma, beta, residual, act, slope, want_bits)
        mean = rstd = bits = share = None
        if not spec.normalize:
            y, z = phases.conv_forward(x, *conv), None
        elif not spec.use_batch_statistics:
            # A copy: the buffers may change before the backward pass.
            mean = running_mean.to(accumulator(x.dtype), copy=self.saves)
            rstd = rstd_of(running_var.to(mean.dtype), spec.eps)
            if weight is not None and not self.saves and self.pools(spec, residual, x):
                z, y = phases.conv_forward(x, *conv), None
            elif weight is not None and not self.saves:
                z, y = None, phases.conv_fwd_apply(x, *conv, mean, rstd, *affine[:-1])
            else:
                z = x if weight is None else phases.conv_forward(x, *conv)
                y, bits = phases.bn_fwd_apply(z, mean, rstd, *affine)
        elif spec.group is not None:
            z = x if weight is None else phases.conv_forward(x, *conv)
            mean, m2, _ = phases.bn_fwd_reduce(z, None, None, None, *stats[3:])
            count = math.prod(z.shape[:1] + z.shape[2:])
            mean, rstd, share = cross_rank.merged(count, mean, m2, *stats, spec.group)
            y, bits = phases.bn_fwd_apply(z, mean, rstd, *affine)
        elif weight is None:
            _check_count(x.shape)
            z = x
            if residual is None and self.may_wait(i, x) and self.readers_apply(i, x):
                mean, _, rstd = phases.bn_fwd_reduce(z, *stats)
                self.waiting[i] = (Norm(mean, rstd, gamma, beta), act, slope)
                y = z
            else:
                mean, rstd, y, bits = phases.bn_fwd_reduce_apply(z, *stats, *affine)
        else:
            if x.shape[0] == 1:
                geometry = (spec.stride, spec.padding, spec.dilation)
                sizes = conv_output_size(x.shape[2:], weight, *geometry)
                _check_count([1, weight.shape[0], *sizes])
            if self.pools(spec, residual, x):
                norm, *before = self.waiting.get(spec.source) or (None, "identity", 0.0)
                z, mean, rstd = phases.bn_fwd_apply_conv_fwd_reduce(x, norm, *before, *conv, *stats)
                y = None
            else:
                z, mean, rstd, y, bits = self.convolution(i, spec, x, conv, stats, affine)
        if self.low_memory and z is not None and self.drops(i, spec, weight):
            self.dropped.append(i)
            self.saved_biases.append(bias)
            z = None
        if spec.normalize and residual is None and z is not None and spec.pool is None:
            self.recomputable.add(i)
        hidden = residual if residual is not None and act in SMOOTH_ACTS else None
        bits = bits if want_bits or (z is None and i not in self.dropped) else None
        self.saved += (weight, gamma, beta, z if self.saves else None, mean, rstd, bits, hidden)
        self.shares.append(share)
        if spec.pool is None:
            return y
        if y is None:
            norm = Norm(mean, rstd, gamma, beta)
            y, places = phases.bn_fwd_apply_max_pool(z, norm, act, slope, *spec.pool)
        elif not self.saves:
            return phases.max_pool_values(y, *spec.pool)
        else:
            y, places = phases.max_pool(y, *spec.pool)
        self.saved_places.append(places)
        return y

    def pools(self, spec: _Spec, residual: Tensor | None, x: Tensor) -> bool:
        """Whether the backend normalises and pools at once behind the convolution of a unit."""
        return spec.pool is not None and residual is None and self.phases.joins_pool(x)

    def drops(self, i: int, spec: _Spec, weight: Tensor | None) -> bool:
        """Whether z of unit i is larger than what a cheap convolution makes it of, and that is recomputable."""
        return (
            weight is not None
            and math.prod(weight.shape[2:]) == 1
            and weight.shape[0] >= 2 * weight.shape[1] * spec.groups
            and spec.squeeze is None
            and spec.source in self.recomputable
        )

    def convolution(self, i: int, spec: _Spec, x: Tensor, conv, stats, affine) -> tuple:
        """(z, mean, rstd, y, bits) of a convolution with batch statistics of its own: joined with the phases around it where the
        backend says so. Where z never exists the mean is that of the convolution's input."""
        phases = self.phases
        gamma, beta, residual, act, slope, want_bits = affine
        before = self.waiting.get(spec.source)
        residual_norm = None
        if spec.residual_source in self.waiting:
            residual_norm = self.waiting[spec.residual_source][0]
        may_wait = residual is None and self.may_wait(i, x)
        # Whether it waits is to be known before there is a z here: by x, whose layout and dtype decide where z's are left out.
        if (
            spec.source in self.recomputable
            and self.fuses.gram(i, x)
            and not (may_wait and self.readers_apply(i, x))
        ):
            return self.without_z(i, x, before, conv, stats, affine, residual_norm)
        is_alone = before is None and spec.source not in self.kept_by_next
        if is_alone and residual_norm is None and not may_wait:
            return phases.conv_fwd_reduce_apply(x, *conv, *stats, *affine)
        z, mean, rstd = self.reduced(spec, x, conv, stats)
        norm = Norm(mean, rstd, gamma, beta)
        if may_wait and self.readers_apply(i, z):
            self.waiting[i] = (norm, act, slope)
            return z, mean, rstd, z, None
        if residual_norm is not None:
            both = (residual, residual_norm, act, slope, want_bits)
            return z, mean, rstd, *phases.bn_fwd_apply_both(z, norm, *both)
        if residual is not None and self.next_keeps(i, z):
            self.kept_by_next[i] = (norm, residual, act, slope, want_bits)
            return z, mean, rstd, z, None
        return z, mean, rstd, *phases.bn_fwd_apply(z, mean, rstd, *affine)

    def reduced(self, spec: _Spec, x: Tensor, conv, stats) -> tuple[Tensor, Tensor, Tensor]:
        """(z, mean, rstd) of a convolution of x, or of what the unit before has left to it to make of x."""
        phases, source = self.phases, spec.source
        kept = self.kept_by_next.pop(source, None)
        if kept is not None:
            *z, y, bits = phases.bn_fwd_apply_residual_conv_fwd_reduce(x, *kept, *conv, *stats)
            self.outputs[source] = y
            self.saved[8 * source + 6] = bits if kept[-1] else None
            return z
        before = self.waiting.get(source) or (None, "identity", 0.0)
        if self.gate is None:
            return phases.bn_fwd_apply_conv_fwd_reduce(x, *before, *conv, *stats)
        gate, self.gate = self.gate, None
        return phases.bn_fwd_apply_se_conv_fwd_reduce(x, *before, gate, *conv, *stats)

    def without_z(self, i: int, x: Tensor, before, conv, stats, affine, residual_norm) -> tuple:
        """As convolution, of a unit whose z never exists."""
        phases = self.phases
        gamma, beta, residual, act, slope, _ = affine
        x = (x, *(before or (None, "identity", 0.0)))
        mean, rstd = phases.bn_fwd_apply_gram_reduce(*x, *conv[:2], *stats)
        own = (Norm(mean, rstd, gamma, beta), residual, residual_norm)
        want_bits = self.saves and act in BIT_ACTS
        y, bits = phases.bn_fwd_apply_conv_fwd_apply(*x, conv[0], *own, act, slope, want_bits)
        return None, mean, rstd, y, bits if want_bits else None

    def may_wait(self, i: int, x: Tensor) -> bool:
        """Whether unit i, which has no residual, could leave its bn_fwd_apply to those that read it: to convolutions, or to the one
        unit whose residual it is."""
        own, readers = self.specs[i], self.readers[i]
        if not readers or own.pool is not None or not self.phases.joins_units():
            return False
        for reader in readers:
            spec = self.specs[reader]
            is_squeezed = spec.has_own_statistics and readers == [reader] and spec.source == i
            is_joinable = spec.is_fusable or is_squeezed
            if not is_joinable or self.tensors[8 * reader] is None:
                return False
            if spec.residual_source == i and (
                len(readers) > 1 or own.act != "identity" or spec.act in SMOOTH_ACTS
            ):
                return False
        # Else a backend's two phases in one are worth more.
        return _is_last(x) or self.fuses(i, x)

    def next_keeps(self, i: int, z: Tensor) -> bool:
        """Whether unit i, whose z this is and which has a residual, can leave its bn_fwd_apply to the convolution of the next one. Others
        may read its output after that."""
        following = i + 1
        if following not in self.readers[i] or self.specs[i].pool is not None:
            return False
        spec, weight = self.specs[following], self.tensors[8 * following]
        return (
            spec.source == i
            and spec.residual_source != i
            and spec.pool is None
            and self.fuses(following, z)
            and self.phases.joins_residual(
                z, weight, spec.stride, spec.padding, spec.dilation, spec.groups
            )
        )

    def readers_apply(self, i: int, z: Tensor) -> bool:
        """Whether those that could do: z is unit i's, which is what they would read."""
        return all(
            self.specs[reader].residual_source == i
            or self.fuses(reader, z)
            or self.squeezes(reader, i, z)
            for reader in self.readers[i]
        )

    def squeezes(self, reader: int, i: int, z: Tensor) -> bool:
        """Whether squeeze and excitation of unit i's output is joined with unit i, whose z is this, and with its reader."""
        spec, weight = self.specs[reader], self.tensors[8 * reader]
        below = self.specs[i].groups
        return (
            spec.squeeze is not None
            and spec.pool is None
            and self.joins[i]
            and self.fuses.convolution(reader, z)
            and self.phases.joins_squeeze(z, weight, spec.stride, spec.padding, spec.groups, below)
        )


class _Fuses:
    """Which convolutions the backend joins with the phases around them, asked once each."""

    def __init__(self, phases, specs, tensors) -> None:
        self.phases, self.specs, self.tensors = phases, specs, tensors
        self.answers: dict[int, bool] = {}

    def __call__(self, i: int, x: Tensor) -> bool:
        """Unit i; x is its input, or the z of which that is made."""
        answer = self.answers.get(i)
        if answer is None:
            answer = self.answers[i] = self.specs[i].is_fusable and self.convolution(i, x)
        return answer

    def convolution(self, i: int, x: Tensor) -> bool:
        """As the call, of unit i's convolution alone."""
        weight, spec = self.tensors[8 * i], self.specs[i]
        return weight is not None and self.phases.fuses_chain(
            x, weight, spec.stride, spec.padding, spec.dilation, spec.groups
        )

    def gram(self, i: int, x: Tensor) -> bool:
        """Whether unit i, which is not to wait, goes without z: by the statistics of its input, which is recomputable."""
        weight, spec = self.tensors[8 * i], self.specs[i]
        return (
            spec.is_fusable
            and spec.pool is None
            and spec.act not in SMOOTH_ACTS
            and self.phases.fuses_gram(x, weight, spec.stride, spec.padding, spec.groups)
        )


class _Backward:
    """The backward pass of one chain, from its last unit to its first."""

    def __init__(self, phases, specs, facts: _Facts, needs: tuple[bool, ...], inputs: list) -> None:
        """needs: whether the gradients of the chain's input and of the units' tensors are asked for. inputs: dy and what was saved,
        whose list is emptied."""
        self.phases, self.specs = phases, specs
        self.input_sizes, self.shares, self.joins = facts.input_sizes, facts.shares, facts.joins
        self.dy, *self.saved = inputs
        inputs.clear()
        begin = 8 * len(specs)
        end = begin + len(facts.dropped)
        self.dropped = dict(zip(facts.dropped, self.saved[begin:end], strict=True))
        pooled = [i for i, spec in enumerate(specs) if spec.pool is not None]
        self.places = dict(zip(pooled, self.saved[end : end + len(pooled)], strict=True))
        needs_x, *self.needs = needs
        count = len(self.specs)
        # Whether what flows back into each unit's output, and at the end into the chain's input, is asked for.
        self.wanted = [False] * count + [needs_x]
        for i, spec in enumerate(self.specs):
            r = spec.residual_source
            self.wanted[i] = (
                self.wanted[spec.source]
                or True in self.needs[8 * i : 8 * i + 8]
                or (r is not None and self.wanted[r])
            )
        self.remaining = [len(readers) for readers in facts.readers]
        self.flowing: list[Tensor | None] = [None] * (count + 1)
        # Whether a gradient was made here and nobody else holds it: then it may be written over.
        self.ours = [False] * (count + 1)
        if facts.is_last and not self.dy.is_contiguous(memory_format=torch.channels_last):
            # Once, and what a unit without BatchNorm gives on is in the layout of its input.
            self.dy = self.dy.contiguous(memory_format=torch.channels_last)
            self.ours[count - 1] = not torch.compiler.is_compiling()
        # (dgamma, dbeta) of units whose bn_bwd_reduce a convolution above has done.
        self.known: dict[int, tuple[Tensor, Tensor]] = {}
        # (gate, shift) of units whose output's gradient is what flows times gate plus shift.
        self.gated: dict[int, tuple[Tensor, Tensor]] = {}
        self.masked: set[int] = set()  # units of whose gradient a convolution above has made db
        self.grads: list[Tensor | None] = [None] * len(self.needs)

    def run(self) -> list[Tensor | None]:
        """The gradients of the chain's input and of the units' tensors."""
        squeezes = iter(range(len(self.saved) - 5, -1, -5))
        self.flowing[len(self.specs) - 1], self.dy = self.dy, None
        for i in reversed(range(len(self.specs))):
            spec = self.specs[i]
            squeeze = None
            if spec.squeeze is not None:
                at = next(squeezes)
                squeeze = self.saved[at : at + 5]
            if self.wanted[i]:
                self.make_again(i)
                self.unit(i, spec, squeeze)
            self.saved[8 * i : 8 * i + 8] = [None] * 8
        return [self.flowing[-1], *self.grads]

    def make_again(self, i: int) -> None:
        """z of unit i, where it was not kept, from that of the unit before."""
        if i not in self.dropped:
            return
        spec = self.specs[i]
        before = self.specs[spec.source]
        z, *norm = self.source(spec.source)
        x, _ = self.phases.bn_fwd_apply(z, *norm, None, before.act, before.slope, False)
        bias = self.dropped.pop(i)
        conv = (self.saved[8 * i], bias, spec.stride, spec.padding, spec.dilation)
        self.saved[8 * i + 3] = self.phases.conv_forward(x, *conv, spec.groups)

    def state(self, i: int) -> tuple:
        """(weight, gamma, beta, z, mean, rstd, bits, hidden residual) of unit i. Where it normalises and has no z, its mean is that
        of its convolution's input, see equations (16) to (20) of reference.py."""
        return self.saved[8 * i : 8 * i + 8]

    def unit(self, i: int, spec: _Spec, squeeze: tuple | None) -> None:
        """Unit i: its gradients of gamma, beta and residual, and what flows on to its input."""
        dy, self.flowing[i] = self.flowing[i], None
        if spec.pool is not None and self.pool_reduces(i, spec, dy):
            z, *norm = self.source(i)
            own = (z, Norm(*norm), spec.act, spec.slope)
            sums = self.phases.max_pool_backward_bn_bwd_reduce(
                dy, self.places.pop(i), *own, *spec.pool
            )
            self.gives(i, sums)
            return
        if spec.pool is not None:
            of_y = self.saved[8 * i + 3]
            dy = self.phases.max_pool_backward(dy, self.places.pop(i), of_y, *spec.pool)
            self.ours[i] = not torch.compiler.is_compiling()
        weight = self.saved[8 * i]
        needs_input = self.wanted[spec.source]
        conv = (
            weight, self.input_sizes[i], spec.stride, spec.padding, spec.dilation, spec.groups
        )  # fmt: skip
        if not spec.normalize:
            self.flow_through(i, spec, squeeze, self.phases.conv_dgrad(dy, *conv))
            return
        act = "identity" if i in self.masked else spec.act
        sums = self.known.pop(i, None)
        r = spec.residual_source
        needs_residual = self.needs[8 * i + _RESIDUAL] or (r is not None and self.wanted[r])
        want = needs_residual and act != "identity"
        has_z = self.saved[8 * i + 3] is not None
        joins = needs_input and (self.joins[i] or not has_z)
        run = self.alone if has_z and not joins else self.joined if has_z else self.without_z
        may_overwrite = self.ours[i] and (want or not needs_residual)
        sums, dresidual, dx = run(i, spec, dy, act, sums, want, needs_input, may_overwrite, conv)
        if needs_residual:
            dresidual = dresidual if want else dy
            if r is None:
                self.grads[8 * i + _RESIDUAL] = dresidual
            else:
                self.flow(r, dresidual, want or self.ours[i])
        self.gives(i, sums)
        if joins and squeeze is not None:
            self.below_squeeze(i, spec, squeeze, conv, *dx)
        elif joins:
            self.below(i, spec, conv, *dx)
        elif needs_input:
            self.flow_through(i, spec, squeeze, dx)

    def gives(self, i: int, sums: tuple[Tensor, Tensor] | None) -> None:
        """dgamma and dbeta of unit i, where they are asked for."""
        _, gamma, beta = self.saved[8 * i : 8 * i + 3]
        if self.needs[8 * i + _GAMMA]:
            self.grads[8 * i + _GAMMA] = _cast(sums[0], gamma.dtype)
        if self.needs[8 * i + _BETA]:
            self.grads[8 * i + _BETA] = _cast(sums[1], beta.dtype)

    def pool_reduces(self, i: int, spec: _Spec, dy: Tensor) -> bool:
        """Whether dgamma and dbeta are all that is asked of a unit that pools, and the backend finds them from what was pooled."""
        r = spec.residual_source
        return (
            not self.wanted[spec.source]
            and spec.has_own_statistics
            and r is None
            and not self.needs[8 * i + _RESIDUAL]
            and self.saved[8 * i + 3] is not None
            and self.saved[8 * i + 6 : 8 * i + 8] == [None, None]
            and self.phases.joins_pool(dy)
        )

    def flow_through(self, i: int, spec: _Spec, squeeze: tuple | None, dx: Tensor) -> None:
        """Gives the gradient of unit i's convolution's input on, through squeeze and excitation where there is any."""
        if squeeze is not None:
            dx = _squeeze_backward(self.phases, dx, squeeze, self.specs, self.saved, i)
        self.flow(spec.source, dx)

    def joined(self, i, spec, dy, act, sums, want, needs_input, may_overwrite, conv):
        """(sums, dresidual, what the data gradient takes: dy and the unit that makes dz of it, or dz)."""
        _, gamma, beta, z, mean, rstd, bits, hidden = self.state(i)
        state = (dy, z, mean, rstd, gamma, beta, hidden, bits)
        if sums is None and (want or bits is not None or hidden is not None):
            *sums, dz, dresidual = self.phases.bn_bwd_reduce_apply(*state, act, spec.slope, want)
            return sums, dresidual, (dz, None, act)
        if sums is None:
            sums = self.phases.bn_bwd_reduce(*state, act, spec.slope)
        return sums, None, (dy, Above(z, mean, rstd, gamma, beta, *sums), act)

    def without_z(self, i, spec, dy, act, sums, want, needs_input, may_overwrite, conv):
        """As joined, for a unit whose z never was."""
        weight, gamma, beta, _, mean_x, rstd, bits, _ = self.state(i)
        if act != "identity":
            dy = self.phases.bn_bwd_mask(dy, bits, act, spec.slope)
        before = self.specs[spec.source]
        source = (Source(*self.source(spec.source), mean_x), before.act, before.slope)
        sums = self.phases.bn_fwd_apply_conv_bwd_reduce(dy, *source, weight, rstd)
        above = Above(None, None, rstd, gamma, beta, *sums)
        return sums, dy if want else None, (dy, above, "identity", *source)

    def below(
        self,
        i: int,
        spec: _Spec,
        conv: tuple,
        dy: Tensor,
        above: Above | None,
        act: str,
        source: Source | None = None,
        source_act: str = "identity",
        source_slope: float = 0.0,
    ) -> None:
        """The data gradient of unit i, with what else flows into its input, and with bn_bwd_reduce of the unit there where it
        is the last."""
        k = spec.source
        self.remaining[k] -= 1
        below = beside = r = None
        target = spec
        if k >= 0 and self.remaining[k] == 0:
            target = self.specs[k]
            self.make_again(k)
            _, gamma, beta, z, mean, rstd, bits, hidden = self.state(k)
            is_last = self.joins[k] if z is None else _is_last(z)
            if hidden is None and is_last and target.pool is None and target.has_own_statistics:
                below = Below(z, bits, mean, rstd, gamma, beta)
                if bits is not None or target.act in SMOOTH_ACTS:
                    self.masked.add(k)
                r = target.residual_source
                if r is not None and self.takes_db(r, bits is not None or target.act == "identity"):
                    beside = Beside(*self.state(r)[3:6])
        gate = self.gated.pop(i, ())
        dx, sums, sums_beside = self.phases.bn_bwd_apply_conv_dgrad_reduce(
            dy, above, act, spec.slope, source, source_act, source_slope, *conv, self.flowing[k],
            below, target.act, target.slope, beside, *gate,
        )  # fmt: skip
        if sums is not None:
            self.known[k] = sums
        if sums_beside is not None:
            self.known[r] = sums_beside
        self.flowing[k], self.ours[k] = dx, True

    def below_squeeze(
        self, i: int, spec: _Spec, squeeze: tuple, conv: tuple, dy: Tensor, above: Above, act: str
    ) -> None:
        """The data gradient of unit i, whose input is gated, and bn_bwd_reduce of the unit in front of the squeeze: its dy is not
        made, but by the data gradient below."""
        k = spec.source
        self.remaining[k] -= 1
        dx, _, _ = self.phases.bn_bwd_apply_conv_dgrad_reduce(
            dy, above, act, spec.slope, None, "identity", 0.0, *conv, None, None, "identity", 0.0, None
        )  # fmt: skip
        reduce, expand, hidden, gate, _ = squeeze
        target, (z, *norm) = self.specs[k], self.source(k)
        sums = self.phases.se_bwd_sums(dx, z, Norm(*norm), target.act, target.slope)
        shift = self.phases.se_bwd_gate(
            sums[:, 0], hidden, gate, reduce, expand, *spec.squeeze, math.prod(z.shape[2:])
        )
        self.known[k] = self.phases.se_bwd_norm(sums, gate, shift, norm[1])
        self.flowing[k], self.ours[k], self.gated[k] = dx, True, (gate, shift)

    def takes_db(self, r: int, is_db: bool) -> bool:
        """Whether unit r's gradient is nothing but the db of the one unit that reads it."""
        if r < 0 or not is_db or not self.wanted[r]:
            return False
        if self.remaining[r] != 1 or self.flowing[r] is not None:
            return False
        spec = self.specs[r]
        z = self.saved[8 * r + 3]
        return (
            spec.act == "identity"
            and spec.pool is None
            and spec.has_own_statistics
            and z is not None
            and _is_last(z)
        )

    def source(self, k: int) -> tuple:
        """(z, mean, rstd, gamma, beta) of unit k."""
        _, gamma, beta, z, mean, rstd, _, _ = self.state(k)
        return z, mean, rstd, gamma, beta

    def alone(self, i, spec, dy, act, sums, want, needs_input, may_overwrite, conv):
        """(sums, dresidual, dx) by the unit's own phases."""
        phases = self.phases
        weight, gamma, beta, z, mean, rstd, bits, hidden = self.state(i)
        bits = None if act == "identity" else bits
        state = (dy, z, mean, rstd, gamma, beta, hidden, bits)
        last = (act, spec.slope, want)
        over_dy = may_overwrite and dy.stride() == z.stride()
        dresidual = None
        share = self.shares[i]
        if spec.use_batch_statistics and needs_input and sums is None and share is None:
            if weight is not None:
                *sums, dx, dresidual = phases.bn_bwd_reduce_apply_dgrad(
                    *state, *last, may_overwrite, *conv
                )
                return sums, dresidual, dx
            if over_dy:
                *sums, dresidual = phases.bn_bwd_reduce_apply_(*state, *last)
            else:
                *sums, dy, dresidual = phases.bn_bwd_reduce_apply(*state, *last)
            return sums, dresidual, dy
        means = sums if spec.use_batch_statistics and sums is not None else (None, None)
        if sums is None and (self.needs[8 * i + _GAMMA] or self.needs[8 * i + _BETA]):
            sums = phases.bn_bwd_reduce(*state, act, spec.slope)
        if needs_input or want:
            if share is not None:
                sums = sums or phases.bn_bwd_reduce(*state, act, spec.slope)
                means = cross_rank.summed(*sums, share, spec.group)
            if over_dy:
                dresidual = phases.bn_bwd_apply_(*state, *means, *last)
            else:
                dy, dresidual = phases.bn_bwd_apply(*state, *means, *last)
        if needs_input and weight is not None:
            dy = phases.conv_dgrad(dy, *conv)
        return sums, dresidual, dy

    def flow(self, k: int, gradient: Tensor, is_ours: bool = True) -> None:
        """Adds a gradient to what flows back into unit k's output."""
        self.remaining[k] -= 1
        if not self.wanted[k]:
            return
        before = self.flowing[k]
        if before is not None:
            if self.ours[k] and before.stride() == gradient.stride():
                gradient = before.add_(gradient)
            else:
                gradient = before + gradient
            is_ours = True
        self.flowing[k] = gradient
        # Captured graphs stay functional.
        self.ours[k] = is_ours and not torch.compiler.is_compiling()


def _cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """t.to(dtype), which takes its time where there is nothing to do."""
    return t if t.dtype is dtype else t.to(dtype)


def _is_last(z: Tensor) -> bool:
    """Whether z is in channels_last and in nothing else."""
    return (
        z.dim() == 4
        and not z.is_contiguous()
        and z.is_contiguous(memory_format=torch.channels_last)
    )


def _squeeze_backward(phases, dy, kept, specs, saved, i):
    """The gradient of the input of unit i's squeeze and excitation, from that of its output."""
    reduce_weight, expand_weight, hidden, gate, x = kept
    if x is None:  # y of the unit before, from its z
        k = specs[i].source
        _, gamma, beta, z, mean, rstd, _, _ = saved[8 * k : 8 * k + 8]
        before = (z, mean, rstd, gamma, beta, specs[k].act, specs[k].slope)
    else:
        before = (x, None, None, None, None, "identity", 0.0)
    dgate = phases.se_bwd_reduce(dy, *before)
    return phases.se_bwd_apply(
        dy, dgate, hidden, gate, reduce_weight, expand_weight, *specs[i].squeeze
    )


def _check_count(shape: Sequence[int]) -> None:
    """Raises as torch does where a channel of a [N, C, *] value has one element: its variance is undefined."""
    if math.prod(shape[:1] + shape[2:]) == 1:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {list(shape)}"
        )
