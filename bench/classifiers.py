"""Training steps of every classification network of torchvision that has a BatchNorm, with a small batch, beside PyTorch:
python -m bench.classifiers --output docs/classifiers.md

Exit status 1 where one is slower than the fastest peer by more than 3 %, or a gate failed.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from torch import nn

from bench import cases, gate, peers, timing

LEAST = 0.97


def names() -> list[str]:
    """Those that have a BatchNorm."""
    found = []
    for name in cases.classifiers():
        try:
            with torch.device("meta"):
                model = cases.build(name)
        except NotImplementedError:  # RegNets compute their widths with tensors
            model = cases.build(name)
        if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
            found.append(name)
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.classifiers", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--only", help="comma-separated names; all without it")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--size", type=int, help="pixels, instead of the network's own")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    device = timing.default_device()
    rows, failed = [], []
    for name in options.only.split(",") if options.only else names():
        case = cases.step(name, "f32", options.batch, options.size)
        sides = peers.training_steps(case, device, compiled=not options.no_compile)
        try:
            gate.check_first_step(case, sides)
        except gate.GateError as error:
            failed.append(f"{name}: gate failed: {error}")
            continue
        times = timing.interleave(sides, options.rounds, 2, device=device)
        found = {side: timing.summary(values) for side, values in times.items()}
        ours = found.pop(timing.OURS)
        result = timing.compare(ours, found)
        rows.append({"name": name, "size": case.size, "ours": ours, "peers": found, **result})
        print(f"{name}: {result['ratio']:.2f}", file=sys.stderr, flush=True)
        if result["ratio"] < LEAST:
            failed.append(f"{name}: {result['ratio']:.2f} of {result['fastest_peer']}")
    environment = timing.environment(device)
    lines = [
        "# torchvision's classification networks",
        "",
        f"`python -m bench.classifiers --output docs/classifiers.md`. A training step with {options.batch} images, minimum of {options.rounds} "
        f"interleaved rounds; ratio: the fastest peer's time over ours{', torch.compile left out' if options.no_compile else ''}. "
        f"{timing.environment_line(environment)}.",
        "",
        "| network | size | ours, ms | fastest peer, ms | ratio |",
        "|---|--:|--:|--:|--:|",
    ]
    for row in rows:
        peer = row["peers"][row["fastest_peer"]]["min"]
        lines.append(
            f"| {row['name']} | {row['size']} | {1e3 * row['ours']['min']:.1f} | {1e3 * peer:.1f} ({row['fastest_peer']}) "
            f"| {row['ratio']:.2f} |"
        )
    page = "\n".join(lines) + "\n"
    if options.output:
        options.output.write_text(page)
        content = {"environment": environment, "rows": rows}
        options.output.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
    else:
        print(page)
    for text in failed:
        print(text, file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
