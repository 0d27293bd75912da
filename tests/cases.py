"""What the phases are tested on, as data: shapes, layouts, dtypes, distributions; and the two ways to run a case.

`run_phases` composes the four BatchNorm phases of a backend, `run_stock` is F.batch_norm + activation under autograd.
"""

import itertools
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from types import ModuleType

import torch
from closeness import accumulator
from torch import Tensor
from torch.nn import functional as F

from bnfast import reference

FULL = os.environ.get("BNFAST_FULL_TESTS") == "1"
BIG = os.environ.get("BNFAST_BIG_TESTS") == "1"

# Ragged in N, C and the spatial size at once; no dimension a multiple of a vector width everywhere.
SHAPES = (
    (7, 1, 56, 57),
    (2, 2, 13, 11),
    (7, 3, 7, 7),
    (2, 5, 3, 5),
    (1, 16, 56, 57),
    (7, 16, 7, 7),
    (2, 17, 13, 11),
    (7, 33, 3, 5),
    (2, 64, 7, 7),
    (7, 100, 1, 1),
    (2, 257, 3, 5),
    (7, 1001, 1, 1),
    (1, 1001, 7, 7),
    (1, 2, 316, 317),
    (1, 2048, 7, 7),
    (7, 33),
    (130, 100),
    (2, 17, 35),
    (7, 64, 1),
    (2, 5, 3, 5, 7),
    (1, 33, 2, 3, 3),
    (1, 5, 1, 1),
    (0, 5, 7, 7),
    (2, 3, 0, 4),
)
FULL_SHAPES = tuple(
    (n, c, h, w)
    for n in (1, 2, 7)
    for c in (1, 2, 3, 5, 16, 17, 33, 64, 100, 257, 1001)
    for h, w in ((1, 1), (7, 7), (3, 5), (13, 11), (56, 57))
    if n * c * h * w <= 1_500_000
)
DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
LAYOUTS = ("contiguous", "channels_last", "slice", "channel_slice", "transposed", "offset")
# Gradients also come expanded (stride 0), as from a mean over the pixels.
GRADIENT_LAYOUTS = ("channels_last", "contiguous", "expanded", "slice", "transposed")
DATA = ("off_centre", "normal", "far", "huge", "constant_channel", "tiny", "mixed")
# True: present and in the accumulator's dtype. "same": present in z's dtype. False: absent.
AFFINE = (True, "same", False, "gamma", "beta")


@dataclass(frozen=True)
class Case:
    """One BatchNorm on one tensor. layout, residual_layout and gradient_layout are names understood by `lay_out`."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    data: str = "off_centre"
    act: str = "relu"
    residual: bool = False
    affine: bool | str = True
    training: bool = True
    residual_layout: str = "contiguous"
    gradient_layout: str = "contiguous"
    eps: float = 1e-5
    momentum: float | None = 0.1
    slope: float = 0.01

    @property
    def name(self) -> str:
        parts = ["x".join(map(str, self.shape)), str(self.dtype).removeprefix("torch.")]
        parts += [self.layout, self.data, self.act]
        parts += [f"residual_{self.residual_layout}"] if self.residual else []
        parts += [f"affine_{self.affine}", "training" if self.training else "evaluation"]
        return "-".join([*parts, f"dy_{self.gradient_layout}"])

    @property
    def count(self) -> int:
        """M, the number of values per channel."""
        return torch.Size(self.shape).numel() // self.shape[1]


@dataclass
class Inputs:
    """The tensors of a case; None where the case has none."""

    z: Tensor
    residual: Tensor | None
    dy: Tensor
    gamma: Tensor | None
    beta: Tensor | None
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def map(self, function) -> "Inputs":
        """A copy with `function` applied to each tensor that is there."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return Inputs(**{k: v if v is None else function(v) for k, v in values.items()})

    def double(self) -> "Inputs":
        """The same values in float64 on the CPU: the oracle's inputs. The counter keeps its dtype."""
        return self.map(lambda t: t.cpu().double() if t.is_floating_point() else t.cpu().clone())

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are there, by name."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {k: v for k, v in values.items() if v is not None}


def cases(full: bool = FULL) -> list[Case]:
    """The default set: each shape some times with everything else rotating; the full set: much more of the product."""
    rounds = 6 if full else 3
    rotating = _rotation()
    found = [next(rotating)(shape) for _ in range(rounds) for shape in SHAPES]
    if full:
        found += [next(rotating)(shape) for _ in range(3) for shape in FULL_SHAPES]
    # Each activation with each slope source, dtype and mode on one awkward shape in both usual layouts.
    found += [
        Case((2, 17, 5, 7), dtype, layout, "mixed", act, residual, training=training)
        for act, residual, (dtype, layout), training in itertools.product(
            reference.ACTS,
            (False, True),
            itertools.product(DTYPES, LAYOUTS[:2])
            if full
            else ((torch.float32, "channels_last"), (torch.bfloat16, "contiguous")),
            (True, False),
        )
    ]
    # Planes so large that one is done in pieces, with a bit per element; rows that end within a vector.
    found += [
        Case(shape, dtype, layout, "normal", "relu", True, residual_layout=layout)
        for shape in ((1, 2, 190, 191), (3, 17, 41, 43))
        for dtype, layout in itertools.product(DTYPES[:2], LAYOUTS[:2])
    ]
    return found


def _rotation() -> Iterator:
    """Endless case makers; the lists have different lengths, so that their combinations keep changing."""
    lists = (
        LAYOUTS,
        DTYPES,
        DATA,
        reference.ACTS,
        (True, False, False),
        AFFINE,
        (True, True, True, False, True),
        GRADIENT_LAYOUTS,
        LAYOUTS[::-1],
        (0.1, None, 0.0),
        (1e-5, 1e-3),
    )
    wheels = [itertools.cycle(values) for values in lists]
    # The extra steps keep wheels of equal length out of phase from one shape to the next.
    for step in itertools.count():
        picks = [next(w) for w in wheels]
        if step % 11 == 10:
            for w in wheels[1::2]:
                next(w)

        def make(shape, picks=picks):
            layout, dtype, data, act, residual, affine, training, dy_layout, r_layout, f, eps = (
                picks
            )
            if dy_layout == "expanded" and act not in ("identity", "silu"):
                # Elements next to a kink are silenced one by one, which an expanded gradient cannot do.
                dy_layout = "contiguous"
            return Case(
                shape,
                dtype,
                layout,
                data,
                act,
                residual,
                affine,
                training,
                r_layout,
                dy_layout,
                eps,
                f,
            )

        yield make


def lay_out(values: Tensor, layout: str) -> Tensor:
    """A tensor with the values of `values` [N, C, *] and the strides that `layout` names.

    What lies between the elements of a sliced layout is NaN, so that reading it shows. "expanded" takes the first value
    of each channel's plane (2-D: of each channel) for all of it.
    """
    if layout == "contiguous":
        return values.clone(memory_format=torch.contiguous_format)
    if layout == "channels_last":
        return values.movedim(1, -1).clone(memory_format=torch.contiguous_format).movedim(-1, 1)
    if layout == "transposed":
        first = 2 if values.dim() > 3 else 0
        swapped = values.transpose(first, -1)
        return swapped.clone(memory_format=torch.contiguous_format).transpose(first, -1)
    if layout == "expanded":
        if values.numel() == 0:
            return values.clone()
        kept = (slice(0, 1),) if values.dim() == 2 else (slice(None), slice(None))
        return values[kept + (slice(0, 1),) * (values.dim() - 2)].clone().expand(values.shape)
    if layout == "offset":
        flat = values.new_full((values.numel() + 1,), torch.nan)
        view = flat[1:].view(values.shape)
    elif layout == "channel_slice":
        n, c, *spatial = values.shape
        view = values.new_full((n, *spatial, c + 3), torch.nan)[..., 2 : c + 2].movedim(-1, 1)
    elif layout == "slice":
        big = values.new_full([2 * s + 2 for s in values.shape], torch.nan)
        view = big[tuple(slice(1, 2 * s + 1, 2) for s in values.shape)]
    else:
        raise ValueError(f"layout must be one of {(*LAYOUTS, 'expanded')}, got {layout!r}")
    return view.copy_(values)


def make_inputs(case: Case, seed: int = 0) -> Inputs:
    """The tensors of a case, the same for the same case and seed. Upstream gradients are random (never all ones)."""
    gen = torch.Generator().manual_seed(seed + zlib.crc32(case.name.encode()))

    def randn(*shape):
        return torch.randn(*shape, generator=gen, dtype=torch.float64)

    c = case.shape[1]
    acc = accumulator(case.dtype)
    params = case.dtype if case.affine == "same" else acc
    gamma, beta = randn(c) + 0.3, randn(c)
    gamma[c // 2] = 0.0 if c > 2 else -1.5
    z = _distribution(case.data, case.dtype, randn(*case.shape), randn(c))
    dims = [0, *range(2, z.dim())]
    running_mean, running_var = randn(c), randn(c).square() + 0.1
    if case.count > 1:
        # Evaluation statistics that fit the data, but not exactly: normalised values stay of order one.
        running_mean = z.mean(dims) + 0.3 * z.std(dims) * running_mean
        running_var = z.var(dims) * (0.5 + running_var) + 1e-12 * (case.data != "tiny")
    return Inputs(
        z=lay_out(z.to(case.dtype), case.layout),
        residual=lay_out(randn(*case.shape).to(case.dtype), case.residual_layout)
        if case.residual
        else None,
        dy=lay_out(randn(*case.shape).to(case.dtype), case.gradient_layout),
        gamma=gamma.to(params) if case.affine not in (False, "beta") else None,
        beta=beta.to(params) if case.affine not in (False, "gamma") else None,
        running_mean=running_mean.to(acc),
        running_var=running_var.to(acc),
        num_batches_tracked=torch.tensor(3),
    )


def _distribution(name: str, dtype: torch.dtype, noise: Tensor, per_channel: Tensor) -> Tensor:
    """float64 values of the named distribution, from standard normal noise [N, C, *] and per_channel [C]."""
    shift = per_channel.view(1, -1, *[1] * (noise.dim() - 2))
    if name == "off_centre":
        return 20 + 0.5 * noise
    if name == "far":
        return 1e3 + noise
    if name == "huge":
        scale = {torch.float16: 1e4, torch.float64: 1e100}.get(dtype, 1e15)
        return scale * noise.clamp(-6, 6)
    if name == "tiny":
        return (1e-5 if dtype == torch.float16 else 1e-20) * noise
    if name == "constant_channel":
        noise = noise.clone()
        noise[:, 0] = 0.7
        return noise + shift
    if name == "mixed":
        scale = 10.0 ** (torch.arange(noise.shape[1]) % 5 - 2)
        return (noise + 3 * shift) * scale.view_as(shift)
    if name == "normal":
        return noise
    raise ValueError(f"data must be one of {DATA}, got {name!r}")


def evaluation_statistics(case: Case, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """(mean, rstd) [C] in evaluation mode, from the running statistics."""
    acc = accumulator(inputs.z.dtype)
    return inputs.running_mean.to(acc), reference.rstd_of(inputs.running_var.to(acc), case.eps)


def run_phases(backend: ModuleType, case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """All outputs of one training or evaluation step through the four phases, by name. Updates the running statistics."""
    t, act, slope = inputs, case.act, case.slope
    out = {}
    if case.training:
        mean, m2, rstd = backend.bn_fwd_reduce(
            t.z, t.running_mean, t.running_var, t.num_batches_tracked, case.momentum, case.eps
        )
        out |= {"mean": mean, "m2": m2, "rstd": rstd}
        out |= {"running_mean": t.running_mean, "running_var": t.running_var}
    else:
        mean, rstd = evaluation_statistics(case, t)
    hidden = case.residual and act in reference.BIT_ACTS
    y, bits = backend.bn_fwd_apply(t.z, mean, rstd, t.gamma, t.beta, t.residual, act, slope, hidden)
    bits = bits if hidden else None
    residual = t.residual if act in reference.SMOOTH_ACTS else None
    saved = (t.dy, t.z, mean, rstd, t.gamma, t.beta, residual, bits)
    dgamma, dbeta = backend.bn_bwd_reduce(*saved, act, slope)
    sums = (dgamma, dbeta) if case.training else (None, None)
    dz, dresidual = backend.bn_bwd_apply(*saved, *sums, act, slope, case.residual)
    out |= {"y": y, "dgamma": dgamma, "dbeta": dbeta, "dz": dz}
    return out | ({"dresidual": dresidual} if case.residual else {})


def run_stock(case: Case, inputs: Inputs, channels_last: bool) -> dict[str, Tensor]:
    """The same step through torch.batch_norm, +, the activation and autograd, in the dtype of z."""
    layout = "channels_last" if channels_last else "contiguous"
    acc = accumulator(case.dtype)
    z = lay_out(inputs.z.cpu(), layout).requires_grad_()
    c = z.shape[1]
    gamma, beta = (
        torch.full((c,), fill, dtype=acc) if p is None else p.detach().cpu().to(acc)
        for p, fill in ((inputs.gamma, 1.0), (inputs.beta, 0.0))
    )
    gamma, beta = gamma.requires_grad_(), beta.requires_grad_()
    statistics = inputs.running_mean.cpu().clone(), inputs.running_var.cpu().clone()
    factor = case.momentum
    if factor is None:
        factor = 1 / (int(inputs.num_batches_tracked) + 1)
    out = torch.batch_norm(z, gamma, beta, *statistics, case.training, factor, case.eps, False)
    leaves = [z, gamma, beta]
    if inputs.residual is not None:
        leaves.append(lay_out(inputs.residual.cpu(), layout).requires_grad_())
        out = out + leaves[-1]
    y = stock_activation(out, case.act, case.slope)
    gradients = torch.autograd.grad(y, leaves, lay_out(inputs.dy.cpu(), layout))
    named = dict(zip(("dz", "dgamma", "dbeta", "dresidual"), gradients, strict=False))
    named |= {"running_mean": statistics[0], "running_var": statistics[1]} if case.training else {}
    return {"y": y.detach(), **named}


def stock_statistics(case: Case, inputs: Inputs, channels_last: bool) -> dict[str, Tensor]:
    """mean, m2, rstd and the updated running statistics as PyTorch's own BatchNorm computes them; needs M > 1."""
    z = lay_out(inputs.z.cpu(), "channels_last" if channels_last else "contiguous")
    mean, var = (v.cpu().clone() for v in (inputs.running_mean, inputs.running_var))
    factor = case.momentum
    if factor is None:
        factor = 1 / (int(inputs.num_batches_tracked) + 1)
    named = {"running_mean": mean.clone(), "running_var": var.clone()}
    torch.native_batch_norm(z, None, None, *named.values(), True, factor, case.eps)
    _, _, rstd = torch.native_batch_norm(z, None, None, mean, var, True, 1.0, case.eps)
    return named | {"mean": mean, "m2": var * (case.count - 1), "rstd": rstd}


def stock_activation(x: Tensor, act: str, slope: float) -> Tensor:
    """The activation by PyTorch's own function."""
    if act == "identity":
        return x
    return F.leaky_relu(x, slope) if act == "leaky_relu" else getattr(F, act)(x)


def silence_kinks(case: Case, inputs: Inputs, mean: Tensor, rstd: Tensor, spread: Tensor) -> Inputs:
    """Inputs whose dy is 0 wherever rounding decides on which side of a kink of act the pre-activation falls.

    There the gradient of two correct implementations differs by all of dy, which would make any tolerance on it useless.
    mean, rstd: the float64 statistics [C]. spread: uncertainty of the pre-activation in units of the accumulator's eps,
    broadcasting to z. That forward and backward take the same side is a test of its own, on data full of kinks.
    """
    kinks = {"relu": (0,), "leaky_relu": (0,), "relu6": (0, 6), "hardswish": (-3, 3)}.get(
        case.act, ()
    )
    if not kinks or inputs.z.numel() == 0:
        return inputs
    t = inputs.double()
    pre, _ = reference.bn_fwd_apply(
        t.z, mean, rstd, t.gamma, t.beta, t.residual, "identity", 0.0, False
    )
    normalised = pre if t.residual is None else pre - t.residual
    eps = torch.finfo(case.dtype).eps
    loud = torch.ones_like(pre, dtype=torch.bool)
    for kink in kinks:
        band = 64 * torch.finfo(accumulator(case.dtype)).eps * spread + 2 * eps * abs(kink)
        band = band + eps * torch.finfo(case.dtype).smallest_normal  # rounds to 0
        if t.residual is not None:
            # The stock path rounds BatchNorm's output before it adds.
            band = band + eps * normalised.abs()
        loud &= (pre - kink).abs() > band
    dy = torch.where(loud.to(inputs.dy.device), inputs.dy, 0)
    return replace(inputs, dy=lay_out(dy, case.gradient_layout))
