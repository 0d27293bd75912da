"""What a trained network's gammas, betas and ReLUs look like: the paper's measurements, for notebooks and for reports.

    model = bnfast.training.rebuild("runs/.../affine.safetensors")
    small_gamma_share(model, 0.01)                     # how much of each BatchNorm is switched off
    dead_relu_share(model, loader)                     # features that are 0 on all of the data
    accuracy_without_small_gammas(model, loader, (0.01, 0.1))

A loader is anything that gives (images [N, C, H, W], labels int64 [N]) at each iteration over it, such as a DataLoader;
models are left as they were, and work on the device of the images.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnfast.conversion import revert

THRESHOLDS = (0.001, 0.01, 0.05, 0.1)
_BINS = 60

Loader = Iterable[tuple[Tensor, Tensor]]


class LayerShare(NamedTuple):
    """A share of a layer's channels: count of total, layer named by its path in the model."""

    layer: str
    count: int
    total: int

    @property
    def share(self) -> float:
        return self.count / self.total


class Clamped(NamedTuple):
    """Accuracy with the gammas below a threshold set to 0; zeroed is their share of all gammas."""

    threshold: float
    zeroed: float
    accuracy: float


class Histogram(NamedTuple):
    """counts [bins] between edges [bins + 1]."""

    counts: list[int]
    edges: list[float]


def gammas(model: nn.Module) -> dict[str, Tensor]:
    """Each BatchNorm's gamma [C], float64 on the CPU, by its path in the model, in definition order."""
    return _vectors(model, "weight")


def betas(model: nn.Module) -> dict[str, Tensor]:
    """Each BatchNorm's beta [C], as :func:`gammas`."""
    return _vectors(model, "bias")


def _vectors(model: nn.Module, name: str) -> dict[str, Tensor]:
    return {
        path: getattr(module, name).detach().double().cpu()
        for path, module in model.named_modules()
        if isinstance(module, _BatchNorm) and getattr(module, name) is not None
    }


def histogram(vectors: dict[str, Tensor], bins: int = _BINS) -> Histogram:
    """The distribution of all values of some layers together, over their whole range."""
    values = torch.cat(list(vectors.values()))
    counts, edges = torch.histogram(values, bins)
    return Histogram(counts.long().tolist(), edges.tolist())


def small_gamma_share(model: nn.Module, threshold: float = 0.01) -> list[LayerShare]:
    """The gammas with |gamma| < threshold of each BatchNorm. The paper counts 27 % below 0.01 in a ResNet-110 whose BatchNorm
    alone trains (first version of arXiv 2003.00152, second hand).
    """
    return [
        LayerShare(path, int((gamma.abs() < threshold).sum()), len(gamma))
        for path, gamma in gammas(model).items()
    ]


def dead_relu_share(model: nn.Module, loader: Loader) -> list[LayerShare]:
    """The channels of each ReLU that are 0 everywhere on all images, in evaluation mode.

    Seen are nn.ReLU modules; one that is called several times in a forward is a layer per call, "<path>#2" and so on.
    """
    model = revert(copy.deepcopy(model)).eval()
    alive: dict[str, Tensor] = {}
    calls: dict[str, int] = {}

    def hook(path: str):
        def note(module: nn.Module, inputs: Any, output: Tensor) -> None:
            calls[path] = calls.get(path, 0) + 1
            layer = path if calls[path] == 1 else f"{path}#{calls[path]}"
            seen = (output > 0).transpose(0, 1).flatten(1).any(1)
            alive[layer] = alive[layer] | seen if layer in alive else seen

        return note

    for path, module in model.named_modules():
        if isinstance(module, nn.ReLU):
            module.register_forward_hook(hook(path))
    with torch.no_grad():
        for images, _ in loader:
            calls.clear()
            model(images)
    return [LayerShare(layer, int((~seen).sum()), len(seen)) for layer, seen in alive.items()]


def accuracy_without_small_gammas(
    model: nn.Module, loader: Loader, thresholds: Sequence[float] = THRESHOLDS
) -> list[Clamped]:
    """Top-1 accuracy in evaluation mode with every |gamma| < threshold set to 0 (beta stays), for each threshold and,
    first, for 0: the model as it is.
    """
    model = copy.deepcopy(model).eval()
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.weight is not None]
    total = sum(norm.weight.numel() for norm in norms)
    before = [norm.weight.detach().clone() for norm in norms]
    results = []
    with torch.no_grad():
        for threshold in (0.0, *thresholds):
            zeroed = 0
            for norm, gamma in zip(norms, before, strict=True):
                small = gamma.abs() < threshold
                zeroed += int(small.sum())
                norm.weight.copy_(gamma.masked_fill(small, 0.0))
            results.append(Clamped(threshold, zeroed / total, _accuracy(model, loader)))
    return results


def _accuracy(model: nn.Module, loader: Loader) -> float:
    right = count = 0
    for images, labels in loader:
        right += int((model(images).argmax(1) == labels).sum())
        count += len(labels)
    return right / count


def analyse(model: nn.Module, loader: Loader) -> dict[str, Any]:
    """All of the above as plain values for JSON: what a run keeps for its report. Empty for a model without gammas."""
    if not gammas(model):
        return {}
    return {
        "gamma": histogram(gammas(model))._asdict(),
        "beta": histogram(betas(model))._asdict() if betas(model) else None,
        "small_gammas": {
            str(threshold): [tuple(layer) for layer in small_gamma_share(model, threshold)]
            for threshold in THRESHOLDS
        },
        "dead_relus": [tuple(layer) for layer in dead_relu_share(model, loader)],
        "clamped": [tuple(row) for row in accuracy_without_small_gammas(model, loader)],
    }
