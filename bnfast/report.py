"""A folder of finished runs as one self-contained HTML page with PNG plots, each figure of the paper's beside its trust."""

from __future__ import annotations

import base64
import io
import shutil
import statistics
from html import escape
from pathlib import Path

from bnfast import paper, plots
from bnfast.affine import write_atomically
from bnfast.results import SMALL, Group, RunRecord, claims, experiments, grouped, read
from bnfast.training import ANALYSIS, CONFIG, METRICS, RESULT

PAGE = "report.html"
_KEPT = (CONFIG, RESULT, ANALYSIS, METRICS)


def write(folder: Path, output: Path, note: str = "") -> Path:
    """Renders the finished runs under `folder` into `output`: report.html, plots/*.png and, under records/, the small files
    that it is made of, from which it can be rendered again. note: a paragraph of plain text under the page's head, for what the
    runs themselves cannot tell. Returns the path of the page.

    Raises FileNotFoundError for a folder without a finished run, ValueError where matplotlib is missing, OSError.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {str(folder)!r}")
    runs, unfinished = read(folder, leave_out=output)
    parts = experiments(runs)
    pictures = [plots.figures(grouped(part)) for part in parts]
    (output / "plots").mkdir(parents=True, exist_ok=True)
    sections = []
    for number, (part, figures) in enumerate(zip(parts, pictures, strict=True), start=1):
        embedded = []
        for name, (caption, figure) in figures.items():
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", metadata={"Software": None})
            prefix = f"{number}-" if len(parts) > 1 else ""
            write_atomically(output / "plots" / f"{prefix}{name}.png", buffer.getvalue())
            embedded.append(_picture(buffer.getvalue(), caption))
        sections.append(_section(grouped(part), part, embedded))
    for run in runs:
        source = folder / run.name if (folder / run.name).is_dir() else folder
        target = output / "records" / run.name
        target.mkdir(parents=True, exist_ok=True)
        for file in _KEPT:
            if (source / file).is_file() and (source / file) != (target / file):
                shutil.copyfile(source / file, target / file)
    write_atomically(output / PAGE, _page(runs, unfinished, sections, note).encode())
    return output / PAGE


def _page(runs: list[RunRecord], unfinished: list[str], sections: list[str], note: str) -> str:
    sets = sorted({run.result["data_name"] for run in runs})
    title = f"BatchNorm alone on {', '.join(sets)}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        "<p>Figures of the paper (Frankle, Schwab, Morcos: Training BatchNorm and Only BatchNorm, arXiv 2003.00152) are for "
        "CIFAR-10 after 160 epochs, and stand beside these runs for the order of networks and configurations.</p>",
        *([f"<p>{escape(note)}</p>"] if note else []),
        *sections,
    ]
    if unfinished:
        parts.append(f"<p class=note>Not finished: {escape(', '.join(unfinished))}.</p>")
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_CSS}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _section(groups: list[Group], runs: list[RunRecord], pictures: list[str]) -> str:
    """Everything about the runs on one data set by one recipe."""
    parts = [
        f"<p>{escape(_recipe(runs))}</p>",
        "<h2>What the paper claims, and these runs</h2>",
        _claims_list(groups),
        "<h2>Accuracy</h2>",
        _table(_ACCURACY_HEAD, [_accuracy_row(group) for group in groups], "wide words"),
        f"<p class=note>{escape(_trust())}</p>",
        "<h2>Time and memory</h2>",
        _table(_COST_HEAD, [_cost_row(run, _machines(runs)) for run in runs]),
        f"<p class=note>{escape(_cost_note(runs))}</p>",
        _whole_runs(runs),
        "<h2>Plots</h2>",
        f"<div class=plots>{''.join(pictures)}</div>",
    ]
    return "\n".join(["<section>", *parts, "</section>"])


def _recipe(runs: list[RunRecord]) -> str:
    """Data set and recipe of the runs, which are the same for all of them, in a sentence."""
    o = runs[0].options
    drops = ", ".join(f"{m:g}" for m in o["milestones"])
    warm = f" after {o['warmup_epochs']:g} epochs of linear rise" if o["warmup_epochs"] else ""
    augmented = [word for word, on in (("flips", o["flip"]), ("crops", o["crop_padding"])) if on]
    return (
        f"{_counted(len(runs), 'run')} on {runs[0].result['data_name']}: {_counted(o['epochs'], 'epoch')}, SGD with batches of "
        f"{o['batch_size']}, learning rate {o['lr']:g}{warm}, times {o['lr_factor']:g} after {drops} epochs, momentum "
        f"{o['momentum']:g}, weight decay {o['weight_decay']:g}, {' and '.join(augmented) or 'no augmentation'}."
    )


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _claims_list(groups: list[Group]) -> str:
    rows = []
    for claim in claims(groups):
        word, style = {
            True: ("holds", "yes"),
            False: ("does not hold", "no"),
            None: ("not measured", "open"),
        }[claim.holds]
        rows.append(
            f"<li><span class={style}>{word}</span> {escape(claim.text)}"
            f"<br><small>{escape(claim.evidence)}</small></li>"
        )
    return f"<ul class=claims>{''.join(rows)}</ul>"


_ACCURACY_HEAD = (
    "network",
    "what trains",
    "test accuracy, %",
    "paper, %",
    "seeds",
    "trainable",
    "top-5, %",
    f"|gamma| < {SMALL}",
    "dead ReLUs",
)


def _accuracy_row(group: Group) -> list[str]:
    values = group.accuracies()
    mean = f"{statistics.fmean(values):.2f}"
    reach = f"<br><small>{min(values):.2f} to {max(values):.2f}</small>" if len(values) > 1 else ""
    figure = group.paper()
    small = paper.SMALL_GAMMAS.get(group.options["config"]) if group.is_paper_init else None
    return [
        escape(group.model),
        escape(group.label),
        mean + reach,
        "" if figure is None else f"{figure.value:.1f}<br><small>{escape(figure.tag)}</small>",
        str(len(values)),
        f"{group.runs[0].result['trainable_parameters']:,}",
        f"{100 * group.mean('test_top5'):.2f}",
        _percent(group.small_gammas())
        + (
            ""
            if small is None
            else f"<br><small>paper, ResNet-110: {small.value:g} %, {escape(small.tag)}</small>"
        ),
        _percent(group.dead_relus()),
    ]


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"


def _trust() -> str:
    tags = "; ".join(f"“{tag}”: {meaning}" for tag, meaning in paper.TAGS.items())
    return (
        f"How far the paper's figures can be trusted: {tags}. Its curve of an alternate initialisation stands beside "
        "beta = 1, the likeliest meaning."
    )


_COST_HEAD = (
    "run",
    "training steps, s",
    "with tests, s",
    "step, ms",
    "plain PyTorch, ms",
    "times as fast",
    "saved for backward, MiB",
    "plain PyTorch, MiB",
    "peak of the process, MiB",
)


def _machine(run: RunRecord) -> str:
    return f"{run.result['machine']}, torch {run.result['torch']}"


def _machines(runs: list[RunRecord]) -> list[str]:
    """What the runs were measured on: times of different machines, or numbers of threads, are not to be compared."""
    return sorted({_machine(run) for run in runs})


def _cost_row(run: RunRecord, machines: list[str]) -> list[str]:
    result = run.result
    where = f" ({machines.index(_machine(run)) + 1})" if len(machines) > 1 else ""
    row = [
        escape(run.name + where),
        f"{result['training_seconds']:.1f}",
        f"{result['wall_seconds']:.1f}",
    ]
    compared = result.get("comparison")
    if compared is None:
        own = result["step_ms"]
        row += ["" if own is None else f"{own:.1f}", "", "", "", ""]
    else:
        ratio = f"{compared['plain_step_ms'] / compared['step_ms']:.2f}"
        if not compared["gradients_agree"]:
            ratio = "gradients differ"
        row += [
            f"{compared['step_ms']:.1f}",
            f"{compared['plain_step_ms']:.1f}",
            ratio,
            f"{compared['saved_bytes'] / 2**20:.1f}",
            f"{compared['plain_saved_bytes'] / 2**20:.1f}",
        ]
    peak = result["peak_bytes"]
    return [*row, "" if peak is None else f"{peak / 2**20:.0f}"]


def _cost_note(runs: list[RunRecord]) -> str:
    machines = _machines(runs)
    if len(machines) > 1:
        machines = [f"({i}) {machine}" for i, machine in enumerate(machines, start=1)]
    return (
        "Step times beside plain PyTorch: medians of alternating steps in one process before the run, on copies; without "
        "that comparison, of the run itself. Saved for backward: what autograd keeps of one batch. Measured on "
        f"{'; '.join(machines)}."
    )


def _whole_runs(runs: list[RunRecord]) -> str:
    """Whole runs through bnfast and in plain PyTorch that differ in nothing else."""
    rows = []
    for run in runs:
        for twin in runs:
            if run.options["convert"] and twin.options == run.options | {"convert": False}:
                times = [r.result["wall_seconds"] for r in (run, twin)]
                rows.append(
                    [
                        escape(run.name),
                        f"{times[0]:.1f}",
                        f"{times[1]:.1f}",
                        f"{times[1] / times[0]:.2f}",
                        f"{100 * run.result['test_accuracy']:.2f}",
                        f"{100 * twin.result['test_accuracy']:.2f}",
                    ]
                )
    if not rows:
        return ""
    head = (
        "whole run",
        "bnfast, s",
        "plain PyTorch, s",
        "times as fast",
        "accuracy, %",
        "plain, %",
    )
    return _table(head, rows)


def _table(head: tuple[str, ...], rows: list[list[str]], style: str = "wide") -> str:
    """A table that scrolls sideways where it is wider than the page; the first column stays."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(
        "<tr>" + f"<th>{row[0]}</th>" + "".join(f"<td>{cell}</td>" for cell in row[1:]) + "</tr>"
        for row in rows
    )
    return f'<div class="{style}"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _picture(png: bytes, caption: str) -> str:
    data = base64.b64encode(png).decode()
    text = escape(caption)
    return (
        f'<figure><img alt="{text}" src="data:image/png;base64,{data}">'
        f"<figcaption>{text}</figcaption></figure>"
    )


_CSS = """
:root { color-scheme: light; }
body { margin: 0; background: #f6f7f9; color: #1c2128; font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1200px; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; margin: 1rem 0; }
section + section { margin-top: 3rem; border-top: 2px solid #d8dde3; padding-top: 1rem; }
h2 { font-size: 1.2rem; margin: 2rem 0 .6rem; }
.note, figcaption { color: #57606a; font-size: .875rem; }
.claims { list-style: none; padding: 0; display: grid; gap: .5rem; grid-template-columns: repeat(auto-fit, minmax(18rem, 1fr)); }
.claims li { background: #fff; border: 1px solid #d8dde3; border-radius: 8px; padding: .6rem .8rem; }
.claims span { font-size: .8rem; font-weight: 600; border-radius: 4px; padding: .1rem .4rem; margin-right: .3rem; }
.yes { background: #d9f2e3; color: #115c36; } .no { background: #fbdcdc; color: #8a1c1c; } .open { background: #e8eaee; color: #444c56; }
small { color: #57606a; font-size: .8rem; }
.wide { overflow-x: auto; background: #fff; border: 1px solid #d8dde3; border-radius: 8px; margin: .6rem 0; }
table { border-collapse: separate; border-spacing: 0; font-size: .875rem; width: 100%; }
th, td { padding: .4rem .6rem; text-align: right; white-space: nowrap; border-top: 1px solid #e8eaee; }
thead th { border-top: 0; color: #57606a; font-weight: 600; vertical-align: bottom; white-space: normal; }
td, tbody th { vertical-align: top; line-height: 1.3; }
tbody th { font-weight: 500; }
th:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
.words td:nth-child(2), .words th:nth-child(2) { text-align: left; }
.plots { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); align-items: start; }
figure { margin: 0; background: #fff; border: 1px solid #d8dde3; border-radius: 8px; padding: .8rem; }
@media (max-width: 600px) {
  th, td { padding: .35rem .45rem; }
  tbody th, .words td:nth-child(2) { white-space: normal; overflow-wrap: anywhere; }
  tbody th { min-width: 4.5rem; max-width: 9rem; } .words td:nth-child(2) { min-width: 5.5rem; }
}
img { width: 100%; height: auto; display: block; }
"""
