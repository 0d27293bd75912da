"""The correctness gate. Every bench passes it first, in the same process, on the objects it then times; a bench whose
gate fails raises GateError and prints no number.

Comparisons are written as `error <= allowed` on values proven finite, so a NaN fails.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from torch import nn

from bench import cases, peers
from bench.timing import OURS

# How near to an activation's kink a pre-activation may lie before rounding alone decides its mask.
KINK = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


class GateError(AssertionError):
    """bnfast's result differs from stock PyTorch's by more than rounding explains."""


def _require(what: str, error: float, allowed: float) -> None:
    if not error <= allowed:
        raise GateError(f"{what}: error {error:.3g}, allowed {allowed:.3g}; nothing was timed")


def _error(what: str, value: torch.Tensor, reference: torch.Tensor) -> float:
    """Largest absolute difference; GateError on another shape or a value that is not finite."""
    if value.shape != reference.shape:
        raise GateError(f"{what}: shape {tuple(value.shape)}, expected {tuple(reference.shape)}")
    if not (torch.isfinite(value).all() and torch.isfinite(reference).all()):
        raise GateError(f"{what}: not finite")
    return (value.double() - reference.double()).abs().max().item() if value.numel() else 0.0


def check_model(
    case: cases.Step,
    device: torch.device,
    convert: Callable[[nn.Module], nn.Module] = peers.convert,
    batch: int = 4,
) -> None:
    """Converted against unconverted in float64: output, every gradient, running statistics (rtol 1e-7, gradients with
    an atol of 1e-7 times the largest gradient). Small input: at most 64 x 64 pixels."""
    reference = peers.build_frozen(case.network).to(device, torch.float64)
    ours = convert(copy.deepcopy(reference))
    x = (
        peers.images(batch, min(case.size, 64), torch.float64)
        .to(device)
        .contiguous(memory_format=torch.channels_last)
    )
    upstream = torch.randn(
        batch, case.classes, dtype=torch.float64, generator=torch.Generator().manual_seed(3)
    )
    outputs, gradients = [], []
    for model in (reference, ours):
        torch.manual_seed(4)  # dropout and stochastic depth draw the same masks on both sides
        outputs.append(model(x))
        outputs[-1].backward(upstream.to(device))
        gradients.append(
            {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        )
    if gradients[0].keys() != gradients[1].keys():
        odd = sorted(gradients[0].keys() ^ gradients[1].keys())
        raise GateError(
            f"{case.network}: only one side has a gradient for {', '.join(odd[:5])}; nothing was timed"
        )
    where = f"{case.network} in float64"
    size = outputs[0].abs().max().item()
    _require(f"{where}, output", _error(f"{where}, output", outputs[1], outputs[0]), 1e-7 * size)
    largest = max(g.abs().max().item() for g in gradients[0].values())
    for name, gradient in gradients[0].items():
        what = f"{where}, gradient of {name}"
        error = _error(what, gradients[1][name], gradient)
        _require(what, error, 1e-7 * (gradient.abs().max().item() + largest))
    found = dict(ours.named_buffers())
    for name, buffer in reference.named_buffers():
        what = f"{where}, {name}"
        _require(what, _error(what, found[name], buffer), 1e-7 * buffer.abs().max().item() + 1e-12)


def _fewest_elements(side: peers.TrainingStep) -> int:
    """Elements of the smallest map that a BatchNorm writes."""
    sizes = []
    hooks = [
        module.register_forward_hook(lambda _, args, out: sizes.append(out.numel()))
        for module in side.model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
    ]
    side.forward()
    for hook in hooks:
        hook.remove()
    return min(sizes)


def _first_step(side: peers.TrainingStep) -> torch.Tensor:
    """[loss, gradients...] of one step from the current weights, as one float64 vector; nothing is updated but the
    running statistics, and the gradients are dropped again."""
    torch.manual_seed(5)
    loss = side.forward()
    loss.backward()
    vector = torch.cat(
        [loss.detach().double().view(1)] + [p.grad.double().flatten() for p in side.trained]
    )
    side.optimizer.zero_grad(set_to_none=True)
    return vector


def check_first_step(case: cases.Step, sides: Mapping[str, peers.TrainingStep]) -> None:
    """The very modules, input and precision that will be timed: loss and gradients against eager, as vector norms.

    It sees what the small float64 check cannot: wrong kernels for the timed type and size. Under bf16 autocast the
    truth is the float32 step and ours may be off by twice what the worse stock layout is, plus 2 %. In float32 there is
    no affordable truth, so the measure is how far the stock layouts are apart: 16 times that (a cached Winograd
    convolution rounds up to 8 times as much as a direct one), plus 0.1 %, plus what one element changes that is so near an
    activation's kink that rounding decides its mask: it turns a gradient of n elements by n**-0.5, and the stock layouts
    may share all their masks.
    """
    nchw, eager, ours = (_first_step(sides[name]) for name in (peers.EAGER_NCHW, peers.EAGER, OURS))
    if case.dtype == "f32":
        one_mask = _fewest_elements(sides[peers.EAGER]) ** -0.5
        truth, factor, floor = eager, 16, 1e-3 + one_mask
    else:
        plain = sides[peers.EAGER]
        precise = peers.TrainingStep(plain.model, plain.x, plain.target, None)
        truth, factor, floor = _first_step(precise), 2, 2e-2
    _error(case.id, ours, truth)
    # Rounding is amplified layer by layer on the way back, in bf16 until whole-network gradients share little more than
    # their length; the last BatchNorm's are still sharp.
    last = sum(parameter.numel() for parameter in sides[OURS].trained[-2:])
    parts = {
        "loss": [vector[:1] for vector in (truth, nchw, eager, ours)],
        "gradients": [vector[1:] for vector in (truth, nchw, eager, ours)],
        "length of the gradients": [vector[1:].norm() for vector in (truth, nchw, eager, ours)],
        "gradients of the last BatchNorm": [
            vector[-last:] for vector in (truth, nchw, eager, ours)
        ],
    }
    for what, (exact, *stock, found) in parts.items():
        worse = max((value - exact).norm().item() for value in stock)
        # Two lengths can agree by luck, so the stock paths' difference alone is no measure of theirs.
        least = 0.2 if what.startswith("length") else floor
        allowed = factor * worse + least * exact.norm().item()
        _require(f"{case.id} at full size, {what}", (found - exact).norm().item(), allowed)


def check_inference(case: cases.Step, sides: Mapping[str, Callable[[], torch.Tensor]]) -> None:
    """The logits of the forward passes that will be timed, as a vector norm, against eager's: 0.1 %, as in `check_first_step`."""
    truth, ours = (sides[name]().double() for name in (peers.EAGER, OURS))
    _error(case.id, ours, truth)
    _require(f"{case.id} in evaluation", (ours - truth).norm().item(), 1e-3 * truth.norm().item())


def _pre_activation(case: cases.Phase, data: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """gamma * (x - mean) * rstd + beta [+ residual] in float64, [N, C, H, W]."""
    x = data["x"].double()
    var, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0, keepdim=True)
    column = (1, -1, 1, 1)
    scale = data["gamma"].double().view(column) * (var + 1e-5).rsqrt()
    pre = (x - mean) * scale + data["beta"].double().view(column)
    return pre + data["residual"].double() if case.residual else pre


def avoid_kinks(case: cases.Phase, data: dict[str, torch.Tensor]) -> None:
    """Zeroes dy where the pre-activation is so near a kink of the activation that rounding decides the mask.

    Such elements differ between any two correct float32 programs by a full dy, which would hide every other error.
    """
    kinks = {"relu": (0.0,), "relu6": (0.0, 6.0), "hardswish": (-3.0, 3.0)}.get(case.act, ())
    if not kinks:
        return
    pre = _pre_activation(case, data)
    for kink in kinks:
        data["dy"].masked_fill_((pre - kink).abs() < KINK[data["x"].dtype], 0)


def check_phase(
    case: cases.Phase, data: dict[str, torch.Tensor], sides: Mapping[str, peers.PhaseStep]
) -> None:
    """Ours against float64 on the timed tensors: each result's largest error at most twice that of the worse stock
    path (NCHW, channels_last), plus one rounding of its type, plus sqrt(M) roundings of the mean term for the sums."""
    exact = {name: value.double() for name, value in data.items()}
    module = peers.StockBatchNormAct(case.channels, case.act).to(data["x"].device, torch.float64)
    reference = peers.PhaseStep(module, exact, torch.contiguous_format)()
    stock = [sides[name]() for name in (peers.EAGER_NCHW, peers.EAGER)]
    names = ["y", "dx", *(["dresidual"] if case.residual else []), "dgamma", "dbeta"]
    rows = case.batch * case.height * case.width
    for index, (name, ours) in enumerate(zip(names, sides[OURS](), strict=True)):
        what = f"{case.id}, {name}"
        error = _error(what, ours, reference[index])
        worse = max(
            _error(f"{what} of stock PyTorch", result[index], reference[index]) for result in stock
        )
        scale = reference[index].abs().max().item()
        if name in ("dgamma", "dbeta"):
            # The terms of the sum are of the size of dy, dy * xhat; their rounding errors add up like a random walk.
            scale = rows**0.5
        _require(what, error, 2 * worse + torch.finfo(ours.dtype).eps * scale)
