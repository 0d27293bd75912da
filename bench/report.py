"""Turns pytest-benchmark JSON into bench/results/report.md and one self-contained report.html with plots.

python -m bench.report bench/results/latest.json [more.json ...] [--output FOLDER]

Every row names the run it comes from; every run names machine, torch version and commit. Rows where bnfast loses are
shown like all others, and marked.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import html
import io
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from bench.timing import OURS, environment_line

Row = dict[str, object]

PRECISION = {"f32": "float32", "bf16": "bf16 autocast"}
MISSING = "-"
ALL_ACTIVATIONS = "all with an activation"
COLORS = ("#7a8793", "#3b6ea5", "#d08c2f", "#5a9e6f")


class ReportError(Exception):
    """The input holds nothing to report; the message says what is wrong with which file."""


def load(path: Path) -> list[Row]:
    """The entries of one pytest-benchmark JSON. ReportError if it is no such file."""
    try:
        entries = json.loads(path.read_text())["benchmarks"]
    except OSError as error:
        raise ReportError(f"{path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ReportError(f"{path}: not the JSON of a finished pytest-benchmark run") from error
    return rows_of(entries)


def rows_of(entries: Iterable[Mapping[str, object]]) -> list[Row]:
    """The extra_info of every entry that one of our suites filled."""
    return [dict(entry["extra_info"]) for entry in entries if "suite" in entry["extra_info"]]


@dataclasses.dataclass
class Table:
    """A titled table of strings; the first `labels` columns are text, the rest numbers."""

    title: str
    note: str
    headers: list[str]
    rows: list[list[str]]
    labels: int


def _runs(rows: Sequence[Row]) -> dict[str, str]:
    """Environment line -> its label A, B, ... in order of appearance."""
    lines = dict.fromkeys(environment_line(row["environment"]) for row in rows)
    return {line: _label(index) for index, line in enumerate(lines)}


def _label(index: int) -> str:
    return chr(ord("A") + index % 26) + ("" if index < 26 else str(index // 26))


def _peers(rows: Sequence[Row], field: str) -> list[str]:
    names = dict.fromkeys(name for row in rows for name in row.get(field) or {} if name != OURS)
    return list(names)


def _milliseconds(side: Mapping[str, float] | None) -> str:
    if side is None:
        return MISSING
    return f"{side['min'] * 1e3:.2f} ({side['median'] * 1e3:.2f})"


def _speedup(ratio: float) -> str:
    return f"{ratio:.2f}x" if ratio >= 1 else f"{ratio:.2f}x (slower)"


def _share(ratio: float) -> str:
    return f"{ratio:.2f}x" if ratio <= 1 else f"{ratio:.2f}x (more)"


def _megabytes(value: int | None, batch: int) -> str:
    return MISSING if value is None else f"{value / batch / 1e6:.2f}"


def _of(rows: Sequence[Row], suite: str) -> list[Row]:
    return [row for row in rows if row["suite"] == suite]


def steps_table(rows: Sequence[Row], runs: Mapping[str, str]) -> Table | None:
    """One row per network and precision: a whole training step."""
    rows = _of(rows, "step")
    peers = _peers(rows, "peers")
    body = [
        [
            row["network"],
            PRECISION[row["dtype"]],
            f"{row['batch']} x {row['size']}²",
            f"{row['fused']} of {row['fused'] + row['left']}",
            runs[environment_line(row["environment"])],
            _milliseconds(row["ours"]),
            *(_milliseconds(row["peers"].get(name)) for name in peers),
            f"{_speedup(row['ratio'])}, {row['ratio_median']:.2f}x",
        ]
        for row in rows
    ]
    headers = [
        "network",
        "precision",
        "batch x size",
        "BN fused",
        "run",
        OURS,
        *peers,
        "fastest peer / bnfast",
    ]
    note = "Milliseconds per step, minimum (median) of the rounds; ratio by minimum, then by median. Frozen convolutions on every side."
    return Table("Training step", note, headers, body, 5) if body else None


def phase_sums(rows: Sequence[Row]) -> dict[tuple[str, str, str, str], dict[str, object]]:
    """(environment line, network, dtype, kind) -> shapes, calls, and multiplicity-weighted seconds by side; the kind
    ALL_ACTIVATIONS adds up every kind but the bare BN and BN + add. Minimum of the rounds per shape."""
    sums: dict[tuple[str, str, str, str], dict[str, object]] = {}
    for row in _of(rows, "phase"):
        what, *layout = row["kind"].split(", ")
        kinds = [row["kind"]]
        if what not in ("identity", "add"):
            kinds.append(", ".join([ALL_ACTIVATIONS, *layout]))
        for kind in kinds:
            key = (environment_line(row["environment"]), row["network"], row["dtype"], kind)
            entry = sums.setdefault(
                key, {"shapes": 0, "calls": 0, "seconds": collections.defaultdict(float)}
            )
            entry["shapes"] += 1
            entry["calls"] += row["count"]
            for name, side in {OURS: row["ours"], **row["peers"]}.items():
                entry["seconds"][name] += row["count"] * side["min"]
    return dict(
        sorted(
            sums.items(),
            key=lambda item: (*item[0][:3], not item[0][3].startswith(ALL_ACTIVATIONS), item[0][3]),
        )
    )


def phase_sums_table(rows: Sequence[Row], runs: Mapping[str, str]) -> Table | None:
    """One row per network, precision and kind of unit, over the network's layers."""
    sums = phase_sums(rows)
    peers = _peers(_of(rows, "phase"), "peers")
    body = []
    for (line, network, dtype, kind), entry in sums.items():
        seconds = entry["seconds"]
        against = {name: seconds[name] / seconds[OURS] for name in peers if name in seconds}
        body.append(
            [
                network,
                PRECISION[dtype],
                kind,
                f"{entry['calls']} in {entry['shapes']} shapes",
                runs[line],
                f"{seconds[OURS] * 1e3:.2f}",
                *(
                    f"{seconds[n] * 1e3:.2f} ({against[n]:.2f}x)" if n in against else MISSING
                    for n in peers
                ),
                _speedup(min(against.values())),
            ]
        )
    headers = [
        "network",
        "precision",
        "after BN",
        "calls",
        "run",
        OURS,
        *peers,
        "fastest peer / bnfast",
    ]
    note = (
        "Forward + backward of BN (+ add) (+ activation) without the convolution, summed over the network's layers: "
        "milliseconds (ratio to bnfast), each shape's minimum times its multiplicity. bnfast runs in channels_last, in rows "
        "with NCHW in that; the peers are the same in both."
    )
    return Table("BatchNorm phases by network", note, headers, body, 5) if body else None


def phases_table(rows: Sequence[Row], runs: Mapping[str, str]) -> Table | None:
    """One row per layer shape."""
    rows = _of(rows, "phase")
    peers = _peers(rows, "peers")
    body = [
        [
            row["network"],
            PRECISION[row["dtype"]],
            row["kind"],
            " x ".join(map(str, row["shape"])),
            runs[environment_line(row["environment"])],
            str(row["count"]),
            _milliseconds(row["ours"]),
            *(_milliseconds(row["peers"].get(name)) for name in peers),
            f"{_speedup(row['ratio'])}, {row['ratio_median']:.2f}x",
        ]
        for row in rows
    ]
    headers = [
        "network",
        "precision",
        "after BN",
        "N x C x H x W",
        "run",
        "times",
        OURS,
        *peers,
        "fastest peer / bnfast",
    ]
    note = (
        "Milliseconds per call, minimum (median) of the rounds; ratio by minimum, then by median."
    )
    return Table("BatchNorm phases by shape", note, headers, body, 5) if body else None


def saved_rows(rows: Sequence[Row]) -> list[Row]:
    """Rows with saved bytes, one per environment, network and precision; the step suite's where both suites have one,
    because it knows the compiled peer."""
    best: dict[tuple[str, str, str], Row] = {}
    for row in rows:
        if row.get("saved_bytes"):
            key = (environment_line(row["environment"]), row["network"], row["dtype"])
            if key not in best or row["suite"] == "step":
                best[key] = row
    return list(best.values())


def memory_table(
    rows: Sequence[Row], runs: Mapping[str, str], field: str, title: str, note: str
) -> Table | None:
    """One row per network and precision of `field` (saved_bytes or peak_bytes), in megabytes per image."""
    rows = saved_rows(rows) if field == "saved_bytes" else [row for row in rows if row.get(field)]
    rows = [
        row
        for row in rows
        if row[field].get(OURS) and any(row[field].get(n) for n in _peers([row], field))
    ]
    peers = _peers(rows, field)
    body = []
    for row in rows:
        found = row[field]
        least = min(value for name, value in found.items() if name != OURS and value)
        eager = found.get("eager channels_last")
        body.append(
            [
                row["network"],
                PRECISION[row["dtype"]],
                f"{row['batch']} x {row['size']}²",
                runs[environment_line(row["environment"])],
                _megabytes(found[OURS], row["batch"]),
                *(_megabytes(found.get(name), row["batch"]) for name in peers),
                _share(found[OURS] / eager) if eager else MISSING,
                _share(found[OURS] / least),
            ]
        )
    headers = [
        "network",
        "precision",
        "batch x size",
        "run",
        OURS,
        *peers,
        "bnfast / eager",
        "bnfast / least peer",
    ]
    return Table(title, note, headers, body, 4) if body else None


def tables(rows: Sequence[Row]) -> list[Table]:
    """Every table that `rows` can fill, summaries first."""
    runs = _runs(rows)
    found = [
        steps_table(rows, runs),
        phase_sums_table(rows, runs),
        memory_table(
            rows,
            runs,
            "saved_bytes",
            "Saved for backward",
            "Megabytes per image that autograd keeps between forward and backward (unique storages, parameters and "
            "buffers excluded).",
        ),
        memory_table(
            rows,
            runs,
            "peak_bytes",
            "Peak memory",
            "Megabytes per image by which the process (on a GPU: PyTorch's allocator) grows at its highest during the "
            "first two steps, caches included.",
        ),
        phases_table(rows, runs),
    ]
    return [table for table in found if table]


TITLE = "bnfast against stock PyTorch"
INTRODUCTION = (
    "BatchNorm-only training: the convolutions are frozen on every side. Every row passed its correctness gate in the "
    "process that timed it. Sides run interleaved in one process. Above 1x bnfast is faster; rows where it is slower or "
    "needs more memory are marked."
)


def markdown(rows: Sequence[Row]) -> str:
    """The report as Markdown."""
    parts = [f"# {TITLE}", "", INTRODUCTION, ""]
    parts += [f"- run {label}: {line}" for line, label in _runs(rows).items()]
    for table in tables(rows):
        parts += ["", f"## {table.title}", "", table.note, ""]
        parts.append("| " + " | ".join(table.headers) + " |")
        parts.append(
            "|" + "".join("---|" if i < table.labels else "--:|" for i in range(len(table.headers)))
        )
        parts += ["| " + " | ".join(row) + " |" for row in table.rows]
    return "\n".join(parts) + "\n"


def _bars(groups: Sequence[str], series: Mapping[str, Sequence[float | None]], ylabel: str) -> str:
    """Grouped bars with a line at 1 (parity), as inline SVG; None leaves a gap."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context({"svg.hashsalt": "bnfast", "svg.fonttype": "none", "font.size": 10}):
        figure, axes = pyplot.subplots(
            figsize=(max(6.0, 1.5 * len(groups) + 1.5), 3.8), layout="constrained"
        )
        width = 0.8 / len(series)
        for index, (name, values) in enumerate(series.items()):
            shown = [(place, value) for place, value in enumerate(values) if value is not None]
            offset = (index - (len(series) - 1) / 2) * width
            bars = axes.bar(
                [place + offset for place, _ in shown],
                [value for _, value in shown],
                width * 0.92,
                label=name,
                color=COLORS[index % len(COLORS)],
            )
            axes.bar_label(bars, fmt="%.2f", fontsize=8, padding=2)
        axes.axhline(1, color="black", linewidth=1)
        axes.set_xticks(range(len(groups)), groups)
        axes.set_ylabel(ylabel)
        axes.margins(y=0.15)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, ncols=len(series), loc="lower left", bbox_to_anchor=(0, 1))
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
        pyplot.close(figure)
    text = out.getvalue()
    return text[text.index("<svg") :]


def _chart(entries: Sequence[tuple[str, Mapping[str, float]]], ylabel: str) -> str:
    peers = list(dict.fromkeys(name for _, values in entries for name in values))
    series = {f"against {name}": [values.get(name) for _, values in entries] for name in peers}
    return _bars([label for label, _ in entries], series, ylabel)


def charts(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """(caption, SVG) of time per step, phases and memory, bar per network, one set per run."""
    found = []
    for line, label in _runs(rows).items():
        here = [row for row in rows if environment_line(row["environment"]) == line]
        steps = [
            (
                f"{row['network']}\n{PRECISION[row['dtype']]}",
                {name: side["min"] / row["ours"]["min"] for name, side in row["peers"].items()},
            )
            for row in _of(here, "step")
        ]
        phases = [
            (
                f"{network}\n{kind}\n{PRECISION[dtype]}",
                {n: s / entry["seconds"][OURS] for n, s in entry["seconds"].items() if n != OURS},
            )
            for (_, network, dtype, kind), entry in phase_sums(here).items()
        ]
        saved = [
            (
                f"{row['network']}\n{PRECISION[row['dtype']]}",
                {
                    n: row["saved_bytes"][OURS] / b
                    for n, b in row["saved_bytes"].items()
                    if n != OURS and b
                },
            )
            for row in saved_rows(here)
        ]
        for entries, ylabel, caption in (
            (
                steps,
                "peer's time / bnfast's",
                "Training step: how many times faster bnfast is; below 1 it is slower",
            ),
            (
                phases,
                "peer's time / bnfast's",
                "BatchNorm phases summed over the layers of a network",
            ),
            (
                saved,
                "bnfast's bytes / peer's",
                "Saved for backward: bnfast's share of each peer's; lower is better",
            ),
        ):
            if entries:
                found.append((f"{caption}. Run {label}: {line}.", _chart(entries, ylabel)))
    return found


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c232b; background: #fff; margin: 2rem auto; max-width: 76rem; padding: 0 1rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem }
.scroll { overflow-x: auto }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #d8dee4; text-align: right; white-space: nowrap }
th.label, td.label { text-align: left }
td.loses { color: #a3260f; font-weight: 600 }
figure { margin: 2rem 0; overflow-x: auto } figcaption { color: #4a5560; font-size: .9rem }
svg { max-width: 100%; height: auto }
"""


def page(rows: Sequence[Row]) -> str:
    """The report as one HTML page that needs no other file."""
    escape = html.escape
    parts = [
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{TITLE}</title>',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<style>{STYLE}</style></head><body>\n<h1>{TITLE}</h1>\n<p>{escape(INTRODUCTION)}</p>\n<ul>",
    ]
    parts += [f"<li>run {label}: {escape(line)}</li>" for line, label in _runs(rows).items()]
    parts.append("</ul>")
    parts += [
        f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"
        for caption, svg in charts(rows)
    ]
    for table in tables(rows):
        parts.append(
            f"<h2>{escape(table.title)}</h2>\n<p>{escape(table.note)}</p>\n<div class='scroll'><table><thead><tr>"
        )
        for index, header in enumerate(table.headers):
            parts.append(
                f"<th{' class=label' if index < table.labels else ''}>{escape(header)}</th>"
            )
        parts.append("</tr></thead><tbody>")
        for row in table.rows:
            cells = []
            for index, cell in enumerate(row):
                loses = "(slower)" in cell or "(more)" in cell
                kind = " class=label" if index < table.labels else " class=loses" if loses else ""
                cells.append(f"<td{kind}>{escape(cell)}</td>")
            parts.append(f"<tr>{''.join(cells)}</tr>")
        parts.append("</tbody></table></div>")
    parts.append("</body></html>\n")
    return "\n".join(parts)


def _write(path: Path, text: str) -> None:
    """Replaces `path` in one move, so that an interrupted report leaves the old one."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def main(arguments: list[str] | None = None) -> int:
    """Writes report.md and report.html; 2 with a one-line error if there is nothing to report."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.report", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "json", nargs="+", type=Path, help="files written by pytest --benchmark-json"
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parent / "results")
    options = parser.parse_args(arguments)
    try:
        rows = [row for path in options.json for row in load(path)]
        if not rows:
            raise ReportError(
                f"{', '.join(map(str, options.json))}: no bench passed its gate, nothing to report"
            )
        options.output.mkdir(parents=True, exist_ok=True)
        for name, text in (("report.md", markdown(rows)), ("report.html", page(rows))):
            _write(options.output / name, text)
            print(options.output / name)
    except (ReportError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
