"""Time per image as the batch grows and as the network gets wider, beside PyTorch: python -m bench.growth --output docs/growth.md

ResNet-20 with batches of 1 to 256, and ResNet-20 with 1 to 8 times the width at batch 32, all sides interleaved as everywhere. Writes a
table, a PNG beside it and everything measured as JSON. Exit status 1 where ours has a cliff: time per image more than
CLIFF times that of the next smaller batch, or time per image and channel pair more than CLIFF times that of the next narrower network.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path

import torch

from bench import cases, gate, peers, timing

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
WIDTHS = (1, 2, 4, 8)
WIDTH_BATCH = 32
CLIFF = 1.25


def measure(case: cases.Step, rounds: int, compiled: bool, device: torch.device) -> dict:
    """Seconds per image of every side. Raises gate.GateError before anything is timed."""
    sides = peers.training_steps(case, device, compiled=compiled)
    if case.batch > 1:  # one image of 8 x 8 pixels is too little for a comparison of gradients
        gate.check_first_step(case, sides)
    times = timing.interleave(sides, rounds, 2, device=device)
    return {name: min(values) / case.batch for name, values in times.items()}


def cliffs(points: list[dict], power: int = 0) -> list[str]:
    """Where ours gets slower from one point to the next, after what is expected: points' "x" to this power."""
    found = []
    for before, after in itertools.pairwise(points):
        one, two = (p["seconds"][timing.OURS] / p["x"] ** power for p in (before, after))
        if two > CLIFF * one:
            found.append(f"from {before['x']} to {after['x']}: {two / one:.2f} times")
    return found


def table(points: list[dict], what: str) -> str:
    names = list(points[0]["seconds"])
    lines = [
        f"| {what} | {', ms | '.join(names)}, ms | ratio |",
        "|--:" * (len(names) + 2) + "|",
    ]
    for p in points:
        fastest = min(v for n, v in p["seconds"].items() if n != timing.OURS)
        values = " | ".join(f"{1e3 * p['seconds'][n]:.3f}" for n in names)
        lines.append(f"| {p['x']} | {values} | {fastest / p['seconds'][timing.OURS]:.2f} |")
    return "\n".join(lines)


def plot(curves: dict[str, list[dict]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(curves), figsize=(5 * len(curves), 4))
    for axis, (what, points) in zip(axes, curves.items(), strict=True):
        for name in points[0]["seconds"]:
            xs, ys = ([p["x"] for p in points], [1e3 * p["seconds"][name] for p in points])
            axis.plot(xs, ys, marker="o", label=name, linewidth=2 if name == timing.OURS else 1)
        axis.set(xscale="log", yscale="log", xlabel=what, ylabel="ms per image")
        axis.set_xticks([p["x"] for p in points], [str(p["x"]) for p in points])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120, metadata={"Software": None})


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.growth", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile")
    parser.add_argument("--batches", default=",".join(map(str, BATCHES)))
    parser.add_argument("--widths", default=",".join(map(str, WIDTHS)))
    parser.add_argument("--output", type=Path, default=Path("growth.md"))
    options = parser.parse_args(arguments)
    device = timing.default_device()
    compiled = not options.no_compile
    curves: dict[str, list[dict]] = {"batch": [], "width": []}
    for batch in map(int, options.batches.split(",")):
        case = cases.step("resnet20", "f32", batch)
        seconds = measure(case, options.rounds, compiled, device)
        curves["batch"].append({"x": batch, "seconds": seconds})
    for width in map(int, options.widths.split(",")):
        case = cases.step("resnet20" if width == 1 else f"wrn20_{width}", "f32", WIDTH_BATCH)
        seconds = measure(case, options.rounds, compiled, device)
        curves["width"].append({"x": width, "seconds": seconds})
    # By width the arithmetic grows with the square; what is read and written, with the width.
    found = [f"batch {c}" for c in cliffs(curves["batch"])]
    found += [f"width {c}" for c in cliffs(curves["width"], power=2)]
    environment = timing.environment(device)
    picture = options.output.with_suffix(".png")
    plot(curves, picture)
    options.output.write_text(
        "# Growth with batch and width\n\n"
        "`python -m bench.growth --output docs/growth.md`. A training step of ResNet-20 on 32 x 32 images, time per image, minimum of "
        f"{options.rounds} interleaved rounds; by width at batch {WIDTH_BATCH}. {timing.environment_line(environment)}.\n\n"
        f"![time per image]({picture.name})\n\n{table(curves['batch'], 'batch')}\n\n{table(curves['width'], 'width')}\n\n"
        f"Cliffs: {'; '.join(found) or 'none'}.\n"
    )
    content = {"environment": environment, "curves": curves}
    options.output.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
    for text in found:
        print(text, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
