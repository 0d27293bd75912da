"""The plots of a report, as matplotlib figures: one function each, None where the runs have nothing to show."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from bnfast import paper
from bnfast.results import SMALL, Group, per_layer

_WIDTH, _HEIGHT = 6.4, 4.2
_COLOURS = (
    "#1f6feb",
    "#d1495b",
    "#2a9d6f",
    "#b8860b",
    "#7b4fb5",
    "#1b9aaa",
    "#8c564b",
    "#5c677d",
)
_STYLE = {
    "font.size": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e3e6ea",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 10.5,
    "figure.constrained_layout.use": True,
    "figure.dpi": 150,
}


def figures(groups: list[Group]) -> dict[str, tuple[str, Any]]:
    """Name -> (caption, figure) of every plot that these runs allow."""
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError(
            "reports need matplotlib, which is not installed: pip install 'bnfast[report]'"
        ) from error
    with matplotlib.rc_context(_STYLE):
        made = {name: (caption, draw(groups)) for name, (caption, draw) in _PLOTS.items()}
    return {name: pair for name, pair in made.items() if pair[1] is not None}


def _new(rows: int = 1, columns: int = 1, height: float = _HEIGHT):
    """A figure and its axes, all with one scale along x and its numbers."""
    from matplotlib.figure import Figure

    figure = Figure((_WIDTH, height))
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True)
    for axis in axes.flat:
        axis.xaxis.set_tick_params(labelbottom=True)
    return figure, axes


def _networks(groups: list[Group]) -> dict[str, list[Group]]:
    """The groups of each network, without the plain PyTorch twins."""
    found: dict[str, list[Group]] = {}
    for group in groups:
        if group.options["convert"]:
            found.setdefault(group.model, []).append(group)
    return found


def _accuracy(groups: list[Group]):
    bn = {g.model: g for g in groups if g.is_paper_init and g.options["config"] == "bn"}
    if not bn:
        return None
    from matplotlib import ticker

    figure, axes = _new()
    axis = axes[0][0]
    others = set(bn)
    for (name, family), colour in zip(
        (("deeper", paper.DEPTHS), ("wider", paper.WIDTHS)), _COLOURS, strict=False
    ):
        ours = [bn[m] for m in family if m in bn]
        others -= set(family)
        if ours:
            _with_range(axis, ours, f"{name}, these runs", color=colour, marker="o")
            last = max(g.runs[0].result["batchnorm_parameters"] for g in ours)
            shown = [m for m in family if paper.BATCHNORM_PARAMETERS[m] <= 4 * last]
            axis.plot(
                [paper.BATCHNORM_PARAMETERS[m] for m in shown],
                [paper.ACCURACY[m, "bn"].value for m in shown],
                color=colour,
                linestyle=":",
                marker="s",
                markersize=4,
                alpha=0.75,
                label=f"{name}, the paper (CIFAR-10, 160 epochs)",
            )
    if others:
        rest = [bn[m] for m in bn if m in others]
        _with_range(axis, rest, "other networks", color=_COLOURS[2], marker="^", linestyle="none")
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.xaxis.set_minor_formatter(ticker.NullFormatter())
    axis.set_xlabel("gammas and betas")
    axis.set_ylabel("test accuracy, %")
    axis.legend()
    return figure


def _with_range(axis, groups: list[Group], label: str, **style: Any) -> None:
    x = [g.runs[0].result["batchnorm_parameters"] for g in groups]
    values = [g.accuracies() for g in groups]
    means = [statistics.fmean(v) for v in values]
    reach = [
        [mean - min(v) for mean, v in zip(means, values, strict=True)],
        [max(v) - mean for mean, v in zip(means, values, strict=True)],
    ]
    axis.errorbar(x, means, yerr=reach, label=label, capsize=3, **style)


def _curves(groups: list[Group]):
    networks = _networks(groups)
    rows = (len(networks) + 1) // 2
    columns = min(2, len(networks))
    figure, axes = _new(rows, columns, height=1.2 + 2.9 * rows)
    labels = list(dict.fromkeys(g.label for own in networks.values() for g in own))
    seen: dict[str, Any] = {}
    for axis, (model, own) in zip(axes.flat, networks.items(), strict=False):
        for group in own:
            colour = _COLOURS[labels.index(group.label) % len(_COLOURS)]
            style = "-" if labels.index(group.label) < len(_COLOURS) else "--"
            epochs = [entry["epoch"] for entry in group.runs[0].epochs]
            for run in group.runs:
                accuracy = [100 * entry["test_accuracy"] for entry in run.epochs]
                alone = "o" if len(epochs) == 1 else None
                (line,) = axis.plot(epochs, accuracy, color=colour, linestyle=style, marker=alone)
            seen[group.label] = line
        axis.set_title(model, fontsize=12)
        axis.set_xlabel("epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
    for axis in list(axes.flat)[len(networks) :]:
        axis.remove()
    figure.supylabel("test accuracy, %", fontsize=12)
    figure.legend(seen.values(), seen.keys(), loc="outside lower center", ncols=2)
    return figure


def _histograms(key: str) -> Callable[[list[Group]], Any]:
    def draw(groups: list[Group]):
        own = [g for g in groups if g.options["convert"] and g.runs[0].analysis.get(key)]
        own = [g for g in own if g.options["config"] in ("bn", "all") or not g.is_paper_init]
        own = [g for g in own if not g.options["config"].startswith("random")]
        if not own:
            return None
        rows = (len(own) + 1) // 2
        figure, axes = _new(rows, min(2, len(own)), height=0.6 + 1.9 * rows)
        for axis, group in zip(axes.flat, own, strict=False):
            histogram = group.runs[0].analysis[key]
            axis.stairs(histogram["counts"], histogram["edges"], fill=True, color=_COLOURS[0])
            axis.set_title(f"{group.model}: {group.label}", fontsize=11)
            axis.set_yticks([])
            axis.axvline(0, color="#888888", linewidth=0.8)
        for axis in list(axes.flat)[len(own) :]:
            axis.remove()
        figure.supxlabel(f"{key} after training", fontsize=12)
        return figure

    return draw


def _per_layer(pick: Callable[[dict[str, Any]], Any], label: str) -> Callable[[list[Group]], Any]:
    def draw(groups: list[Group]):
        shown = [
            (g, shares)
            for g in groups
            if g.is_paper_init and g.options["config"] in ("bn", "all")
            if (shares := per_layer(g, pick)) is not None
        ]
        if not shown:
            return None
        models = list(dict.fromkeys(g.model for g, _ in shown))
        figure, axes = _new(height=_HEIGHT + 0.3 * (len(shown) // 2))
        axis = axes[0][0]
        for group, shares in shown:
            depth = [100 * i / max(len(shares) - 1, 1) for i in range(len(shares))]
            axis.plot(
                depth,
                [100 * share for share in shares],
                color=_COLOURS[models.index(group.model) % len(_COLOURS)],
                linestyle="-" if group.options["config"] == "bn" else ":",
                label=f"{group.model}: {group.label}",
            )
        axis.set_xlabel("place in the network, % of its depth")
        axis.set_ylabel(label)
        figure.legend(loc="outside lower center", ncols=2)
        return figure

    return draw


def _clamped(groups: list[Group]):
    shown = [
        g
        for g in groups
        if g.is_paper_init and g.options["config"] in ("bn", "all")
        if all(run.analysis.get("clamped") for run in g.runs)
    ]
    if not shown:
        return None
    models = list(dict.fromkeys(g.model for g in shown))
    figure, axes = _new(height=_HEIGHT + 0.3 * (len(shown) // 2))
    axis = axes[0][0]
    for group in shown:
        rows = list(zip(*(run.analysis["clamped"] for run in group.runs), strict=True))
        axis.plot(
            range(len(rows)),
            [100 * statistics.fmean(accuracy for _, _, accuracy in row) for row in rows],
            color=_COLOURS[models.index(group.model) % len(_COLOURS)],
            linestyle="-" if group.options["config"] == "bn" else ":",
            marker="o",
            label=f"{group.model}: {group.label}",
        )
    thresholds = [row[0] for row in shown[0].runs[0].analysis["clamped"]]
    axis.set_xticks(range(len(thresholds)), [f"{t:g}" for t in thresholds])
    axis.set_xlabel("every |gamma| below this is set to 0")
    axis.set_ylabel("test accuracy, %")
    figure.legend(loc="outside lower center", ncols=2)
    return figure


_PLOTS: dict[str, tuple[str, Callable[[list[Group]], Any]]] = {
    "accuracy": (
        "Test accuracy of BatchNorm alone against the number of its parameters. Bars: lowest and highest seed.",
        _accuracy,
    ),
    "curves": ("Test accuracy after each epoch, one line per seed.", _curves),
    "gammas": ("Gammas after training, first seed.", _histograms("gamma")),
    "betas": ("Betas after training, first seed.", _histograms("beta")),
    "small_gammas": (
        f"Share of |gamma| < {SMALL} in each BatchNorm. Dotted: everything trained.",
        _per_layer(
            lambda analysis: analysis.get("small_gammas", {}).get(str(SMALL)),
            f"|gamma| < {SMALL}, % of the layer",
        ),
    ),
    "dead_relus": (
        "Share of channels that are 0 on every test image after each ReLU. Dotted: everything trained.",
        _per_layer(lambda analysis: analysis.get("dead_relus"), "dead channels, % of the layer"),
    ),
    "clamped": (
        "Test accuracy with small gammas set to 0 after training. Dotted: everything trained.",
        _clamped,
    ),
}
