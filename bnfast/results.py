"""Finished runs as data: read from their folders, grouped over seeds, and held against the orderings that the paper claims."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bnfast import paper
from bnfast.training import ANALYSIS, CONFIG, METRICS, RESULT

_SEEDS = ("seed", "seed_order", "seed_augmentation")
SMALL = 0.01
FAR = 5.0


@dataclass(frozen=True)
class RunRecord:
    """One finished run: its name, what result.json and analysis.json say, and its epochs."""

    name: str
    result: dict[str, Any]
    analysis: dict[str, Any]
    epochs: list[dict[str, Any]]

    @property
    def options(self) -> dict[str, Any]:
        return self.result["options"]


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but their seeds."""

    runs: tuple[RunRecord, ...]

    @property
    def options(self) -> dict[str, Any]:
        return self.runs[0].options

    @property
    def model(self) -> str:
        return self.options["model"]

    @property
    def label(self) -> str:
        """What trains, and how it differs from the paper's way."""
        o = self.options
        text = o["config"].replace("random", "random weights per channel: ")
        extra = []
        if o["init_gamma"] not in ("uniform", None):
            extra.append(f"gamma {o['init_gamma']}")
        if o["init_beta"] not in (0, None):
            extra.append(f"beta = {o['init_beta']:g}")
        if o["features"] != "kaiming_normal":
            extra.append(o["features"])
        if o["statistics"] != "batch":
            extra.append("running statistics")
        if not o["convert"]:
            extra.append("plain PyTorch")
        return ", ".join([text, *extra])

    @property
    def is_paper_init(self) -> bool:
        """Whether gamma ~ U[0, 1), beta = 0 and the features are kaiming normal, through bnfast."""
        return "," not in self.label

    def mean(self, key: str) -> float:
        return statistics.fmean(run.result[key] for run in self.runs)

    def accuracies(self) -> list[float]:
        """Test accuracies in per cent, one per seed."""
        return [100 * run.result["test_accuracy"] for run in self.runs]

    def small_gammas(self, threshold: float = SMALL) -> float | None:
        """Share of all gammas below a threshold, mean over the seeds."""
        return self._share("small_gammas", str(threshold))

    def dead_relus(self) -> float | None:
        """Share of all ReLU channels that are 0 on the whole test, mean over the seeds."""
        return self._share("dead_relus", None)

    def _share(self, key: str, threshold: str | None) -> float | None:
        shares = []
        for run in self.runs:
            layers = run.analysis.get(key)
            layers = layers if threshold is None or layers is None else layers.get(threshold)
            if layers:
                shares.append(sum(row[1] for row in layers) / sum(row[2] for row in layers))
        return statistics.fmean(shares) if shares else None

    def paper(self) -> paper.Figure | None:
        """The paper's accuracy of the same network and configuration (CIFAR-10, 160 epochs)."""
        o = self.options
        is_alternate = self.label == "bn, beta = 1"
        if not (self.is_paper_init or is_alternate):
            return None
        column = "bn, alternate" if is_alternate else o["config"]
        return paper.ACCURACY.get((self.model, column))


def read(folder: Path, leave_out: Path | None = None) -> tuple[list[RunRecord], list[str]]:
    """(finished runs, names of unfinished ones) anywhere under a folder, but not under `leave_out`, by name.

    Raises FileNotFoundError for a folder without a run, ValueError for files that are damaged.
    """
    finished: list[RunRecord] = []
    unfinished: list[str] = []
    for config in sorted(folder.rglob(CONFIG)):
        place = config.parent
        if leave_out is not None and place.is_relative_to(leave_out):
            continue
        name = str(place.relative_to(folder)) if place != folder else place.name
        if not (place / RESULT).is_file():
            unfinished.append(name)
            continue
        try:
            analysis = place / ANALYSIS
            finished.append(
                RunRecord(
                    name,
                    json.loads((place / RESULT).read_text()),
                    json.loads(analysis.read_text()) if analysis.is_file() else {},
                    [json.loads(line) for line in (place / METRICS).read_text().splitlines()],
                )
            )
        except json.JSONDecodeError as error:
            raise ValueError(f"a file of the run {str(place)!r} is damaged: {error}") from error
    if not finished:
        raise FileNotFoundError(f"{str(folder)!r} holds no finished run ({RESULT})")
    return finished, unfinished


_RECIPE = (
    "preset",
    "epochs",
    "batch_size",
    "lr",
    "milestones",
    "lr_factor",
    "warmup_epochs",
    "momentum",
    "weight_decay",
    "flip",
    "crop_padding",
    "image_size",
    "crop_scale",
    "crop_ratio",
)


def experiments(runs: Iterable[RunRecord]) -> list[list[RunRecord]]:
    """The runs by data set and recipe: only those of one are compared with each other."""
    found: dict[str, list[RunRecord]] = {}
    for run in runs:
        key = json.dumps([run.result["data_name"], *(run.options[name] for name in _RECIPE)])
        found.setdefault(key, []).append(run)
    return list(found.values())


def grouped(runs: Iterable[RunRecord]) -> list[Group]:
    """Groups over seeds, by size of the network and then in the order of their names."""
    found: dict[str, list[RunRecord]] = {}
    for run in runs:
        key = json.dumps({k: v for k, v in run.options.items() if k not in _SEEDS}, sort_keys=True)
        found.setdefault(key, []).append(run)
    groups = [Group(tuple(own)) for own in found.values()]
    return sorted(
        groups,
        key=lambda g: (
            g.runs[0].result["batchnorm_parameters"],
            g.model,
            g.options["config"] != "bn",
            not g.is_paper_init,
            g.label,
        ),
    )


@dataclass(frozen=True)
class Claim:
    """An ordering of the paper, and whether the runs show it: True, False, or None where they do not say."""

    text: str
    holds: bool | None
    evidence: str


def claims(groups: list[Group]) -> list[Claim]:
    """The orderings that the paper claims, each against these runs."""
    by_key = {(g.model, g.options["config"]): g for g in groups if g.is_paper_init}
    return [
        _rises("BatchNorm alone gets better with depth", paper.DEPTHS, by_key),
        _rises("BatchNorm alone gets better with width", paper.WIDTHS, by_key),
        _above(
            f"BatchNorm alone is far above as many random weights ({FAR:g} points and more)",
            "bn",
            "random2",
            by_key,
            FAR,
        ),
        _above("Training everything is above BatchNorm alone", "all", "bn", by_key),
        _above("BatchNorm alone is above the untrained network", "bn", "none", by_key),
        _above(
            "Shortcuts and output beside BatchNorm are above BatchNorm alone",
            "bn+shortcut+output",
            "bn",
            by_key,
        ),
        _more_small_gammas(by_key),
    ]


def _rises(text: str, models: tuple[str, ...], by_key: dict[tuple[str, str], Group]) -> Claim:
    found = [(m, by_key[m, "bn"]) for m in models if (m, "bn") in by_key]
    means = [statistics.fmean(group.accuracies()) for _, group in found]
    evidence = " < ".join(f"{m} {mean:.1f} %" for (m, _), mean in zip(found, means, strict=True))
    if len(found) < 2:
        return Claim(text, None, "fewer than two networks")
    holds = all(a < b for a, b in itertools.pairwise(means))
    return Claim(text, holds, evidence if holds else evidence.replace(" < ", ", "))


def _above(
    text: str, higher: str, lower: str, by_key: dict[tuple[str, str], Group], margin: float = 0.0
) -> Claim:
    """Holds where the worst seed of one is above the best seed of the other by more than `margin` points, on every
    network that has both.
    """
    rows = []
    holds = True
    for (model, config), group in by_key.items():
        other = by_key.get((model, lower))
        if config == higher and other is not None:
            low, high = max(other.accuracies()), min(group.accuracies())
            holds = holds and high > low + margin
            means = [statistics.fmean(g.accuracies()) for g in (group, other)]
            rows.append(f"{model} {means[0]:.1f} % and {means[1]:.1f} %")
    return Claim(text, holds if rows else None, "; ".join(rows) or "no network has both")


def _more_small_gammas(by_key: dict[tuple[str, str], Group]) -> Claim:
    text = "More gammas end near 0 when BatchNorm alone trains than when everything does"
    rows = []
    holds = True
    for (model, config), group in by_key.items():
        other = by_key.get((model, "all"))
        if config == "bn" and other is not None:
            shares = group.small_gammas(), other.small_gammas()
            if None not in shares:
                holds = holds and shares[0] > shares[1]
                rows.append(f"{model} {shares[0]:.1%} and {shares[1]:.1%} below {SMALL}")
    return Claim(text, holds if rows else None, "; ".join(rows) or "no network has both")


def per_layer(group: Group, pick: Callable[[dict[str, Any]], list | None]) -> list[float] | None:
    """A share per layer, mean over the seeds, of what `pick` takes from an analysis: rows (layer, count, total)."""
    rows = [pick(run.analysis) for run in group.runs]
    if not all(rows):
        return None
    return [
        statistics.fmean(count / total for _, count, total in layer)
        for layer in zip(*rows, strict=True)
    ]
