"""convert, revert and explain: a model's blocks get plans, one block at a time, and give them back."""

import copy
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from . import dispatch
from .freezing import freeze
from .nn import FROZEN_CLASSES, NORM_CLASSES, ORIGINAL_CLASSES, Options, PlannedForward
from .planning import BlockPlans, is_norm, norm_act, plans_of
from .weights import kept

_FORMATS = (torch.channels_last, torch.contiguous_format, None)


def convert(
    model: nn.Module,
    *,
    train: str = "bn",
    inplace: bool = False,
    backend: str = "auto",
    memory_format: torch.memory_format | None = torch.channels_last,
    memory: str = "normal",
) -> nn.Module:
    """The same model, made fast and small for training with frozen convolutions (arXiv 2003.00152).

    Returns a model of the same classes with the same state_dict keys, outputs and gradients; with inplace=True it is the
    given model, with the same Parameter and buffer objects. Convolutions that are frozen at the time of a call run fused with
    their BatchNorm, residual and activation and keep no input for the backward pass. What cannot be fused stays as it is;
    `explain` says why. A second convert changes nothing. `revert` undoes it.

    train: which parameters learn, as in `freeze`; "keep" leaves requires_grad alone.
    backend: a name of `backends()`, or "auto".
    memory_format: torch.channels_last runs blocks that are given plain NCHW input in channels_last and hands out NCHW; with
    torch.contiguous_format or None the layout stays the input's.
    memory: "low" also gives up the output of 1x1 expansions, which are larger than what they are made from (the ends of bottlenecks;
    MobileNetV2's expansions), and runs these convolutions again in the backward pass: the same numbers, less memory, more time.

    Raises TypeError or ValueError for arguments that make no sense, RuntimeError for a backend that is not available; the
    model is then as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; an nn.Module is needed")
    dispatch.check(backend)
    if memory_format not in _FORMATS:
        raise ValueError(
            f"memory_format is {memory_format}; allowed are torch.channels_last, "
            "torch.contiguous_format and None"
        )
    if memory not in ("normal", "low"):
        raise ValueError(f"memory is {memory!r}; allowed are 'normal' and 'low'")
    options = Options(backend, memory_format == torch.channels_last, memory == "low")
    if not inplace:
        model = copy.deepcopy(model)
    if train != "keep":
        freeze(model, train)
    for module in model.modules():
        cls = (FROZEN_CLASSES | NORM_CLASSES).get(type(module))
        if cls is not None:
            module.__class__ = cls
            module.__dict__["_bnfast_note"] = ""
    known: dict[tuple[str, int], bool] = {}
    for block in reversed(list(model.modules())):
        if not _can_hold_plan(block):
            continue
        found = plans_of(block, options, known)
        for path, note in found.partners.items():
            block.get_submodule(path).__dict__["_bnfast_note"] = note
        if found.plans:
            PlannedForward(block, found.plans, options).install()
        block.__dict__["_bnfast_found"] = _Findings.of(found)
    return model


def revert(model: nn.Module) -> nn.Module:
    """Plain torch modules again, in place: the same Parameter and buffer objects, no trace of convert()."""
    for module in model.modules():
        for name in ("forward", "_replicate_for_data_parallel"):
            if isinstance(
                getattr(module.__dict__.get(name), "__self__", module.__dict__.get(name)),
                PlannedForward,
            ):
                del module.__dict__[name]
        if "_bnfast_note" in module.__dict__:
            del module.__dict__["_bnfast_note"]
            module.__class__ = ORIGINAL_CLASSES.get(type(module), type(module))
        module.__dict__.pop("_bnfast_found", None)
    return model


@dataclass(frozen=True)
class Entry:
    """What became of one BatchNorm."""

    name: str  # its path in the model
    kind: str  # its class
    fused_as: str | None  # for example "conv+bn+add+relu"; None where it is left
    block: str | None  # path of the block whose plan runs it, "" for the model itself
    reason: str | None  # why it is left, or why its convolution is not in the unit


@dataclass(frozen=True)
class KeptWeight:
    """The transformed weights that a convolution which has run keeps for its next run; they are a cache, in no state_dict."""

    name: str  # its path in the model
    forms: dict[str, int]  # bytes by the kind of form, which says how it runs; see _RUNS

    @property
    def nbytes(self) -> int:
        return sum(self.forms.values())


# What a form of a weight is for.
_RUNS = {
    "winograd": "Winograd",
    "pointwise": "product",
    "dot": "product",
    "packed": "oneDNN",
    "grouped": "direct",
    "taps": "Triton",
    "rotated": "PyTorch",
    "cast": "PyTorch",
}


@dataclass
class Report:
    """Every BatchNorm of a model: fused as ..., or left, because ...; and the transformed weights that its convolutions keep, once they
    have run. Prints as a table."""

    fused: list[Entry] = field(default_factory=list)
    left: list[Entry] = field(default_factory=list)
    # Of this moment, and no property of the model that reports are compared by.
    kept: list[KeptWeight] = field(default_factory=list, compare=False)

    @property
    def kept_bytes(self) -> int:
        """Bytes of all transformed weights; `clear_cache()` gives them back until the next step."""
        return sum(weight.nbytes for weight in self.kept)

    def to_dict(self) -> dict[str, list[dict[str, Any]]]:
        """Plain lists and dictionaries, for JSON."""
        parts = {"fused": self.fused, "left": self.left, "kept": self.kept}
        return {name: [asdict(entry) for entry in entries] for name, entries in parts.items()}

    def _of_weights(self) -> list[str]:
        """One line on the transformed weights, where there are any: how many convolutions run how."""
        if not self.kept:
            return []
        counts: dict[str, int] = {}
        for weight in self.kept:
            for run in {_RUNS.get(form, form) for form in weight.forms}:
                counts[run] = counts.get(run, 0) + 1
        runs = ", ".join(f"{count} {run}" for run, count in sorted(counts.items()))
        return [
            f"{self.kept_bytes / 1e6:.1f} MB of transformed weights kept for {len(self.kept)} convolutions: {runs}"
        ]

    def __str__(self) -> str:
        rows = [("BatchNorm", "runs as", "in block", "because")]
        for entry in [*self.fused, *self.left]:
            what = entry.fused_as or "left"
            block = "" if entry.block is None else entry.block or "(model)"
            rows.append((entry.name, what, block, entry.reason or ""))
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = [
            "  ".join([*(row[i].ljust(widths[i]) for i in range(3)), row[3]]).rstrip()
            for row in rows
        ]
        total = len(self.fused) + len(self.left)
        end = f"{len(self.fused)} of {total} BatchNorms fused"
        return "\n".join([*lines, *self._of_weights(), end])


def explain(model: nn.Module) -> Report:
    """What convert() did to each BatchNorm of a converted model, or would do to an unconverted one (which stays as it is); and how the
    convolutions of a converted model ran, by the transformed weights that they keep since."""
    if not any("_bnfast_found" in m.__dict__ for m in model.modules()):
        model = convert(model, train="keep")
    report = Report()
    paths = dict(model.named_modules())
    for name, module in paths.items():
        forms = kept(module.weight) if isinstance(module, _ConvNd) else {}
        if forms:
            report.kept.append(KeptWeight(name, forms))
        if not _is_any_norm(module):
            continue
        kind = ORIGINAL_CLASSES.get(type(module), type(module)).__name__
        entry = _entry_of(name, kind, module, paths)
        (report.left if entry.fused_as is None else report.fused).append(entry)
    return report


@dataclass(frozen=True)
class _Findings:
    """What is kept of BlockPlans for explain()."""

    fused: dict[str, str]
    unfused_conv: dict[str, str]
    left: dict[str, str]
    reason: str | None

    @classmethod
    def of(cls, found: BlockPlans) -> "_Findings":
        return cls(found.fused, found.unfused_conv, found.left, found.reason)


def _can_hold_plan(block: nn.Module) -> bool:
    """Whether a module is a block: it has children and a forward of its own that is Python."""
    if norm_act(block) is not None:
        return True
    return (
        bool(block._modules)
        and not isinstance(block, (torch.jit.ScriptModule, nn.ModuleList, nn.ModuleDict))
        and not isinstance(block.__dict__.get("forward"), PlannedForward)
        and any(_is_any_norm(m) for m in block.modules())
    )


def _is_any_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


def _entry_of(name: str, kind: str, module: nn.Module, paths: dict[str, nn.Module]) -> Entry:
    parts = name.split(".") if name else []
    reason = None
    for depth in range(len(parts) + 1):
        block = ".".join(parts[:depth])
        inside = ".".join(parts[depth:])
        findings = paths[block].__dict__.get("_bnfast_found")
        if findings is None:
            continue
        if inside in findings.fused:
            return Entry(
                name, kind, findings.fused[inside], block, findings.unfused_conv.get(inside)
            )
        reason = findings.left.get(inside) or findings.reason or reason
    if not is_norm(module):
        reason = f"{kind} is not an exact nn.BatchNorm1d, 2d, 3d or nn.SyncBatchNorm, or a supported BatchNormAct2d"
    return Entry(
        name, kind, None, None, reason or "no block's forward calls it in a way that is known"
    )
