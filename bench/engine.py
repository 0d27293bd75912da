"""The CPU engine's table: training steps and inference, the fastest peer's time over ours, beside what is asked of it and what the machine
would allow.

    python -m bench.engine --output docs/engine.md [--rows resnet20-f32,resnet18-eval] [--rounds 7] [--no-compile]

Writes the table and, beside it, everything that was measured as JSON; without --output it prints both. Same cases, peers, gate and
timer as the pytest suites. "roofline" is the fastest peer's time over `roofline.seconds`: a ratio beyond it needs a new algorithm.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import torch

from bench import cases, gate, peers, roofline, timing


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the table: what is timed, and the ratio that is asked for at least and as a goal."""

    network: str
    dtype: str
    batch: int
    least: float
    goal: float
    training: bool = True

    @property
    def id(self) -> str:
        return f"{self.network}-{self.dtype if self.training else 'eval'}"

    @property
    def case(self) -> cases.Step:
        return cases.step(self.network, self.dtype, self.batch)


ROWS = (
    Row("resnet20", "f32", 128, 2.0, 3.0),
    Row("resnet56", "f32", 128, 2.2, 3.0),
    Row("wrn20_4", "f32", 32, 2.6, 4.0),
    Row("resnet18", "f32", 16, 2.2, 3.5),
    Row("resnet50", "f32", 16, 1.5, 2.0),
    Row("vgg16_bn", "f32", 8, 2.2, 3.5),
    Row("mobilenet_v2", "f32", 16, 1.6, 2.3),
    Row("efficientnet_b0", "f32", 16, 1.6, 2.5),
    Row("densenet121", "f32", 8, 1.3, 1.7),
    Row("regnet_y_400mf", "f32", 16, 1.4, 2.0),
    Row("resnet18", "bf16", 16, 1.3, 2.0),
    Row("resnet50", "bf16", 16, 1.15, 1.6),
    Row("resnet20", "bf16", 128, 1.3, 2.0),
    Row("resnet18", "f32", 16, 1.8, 3.0, training=False),
    Row("resnet50", "f32", 16, 1.3, 1.8, training=False),
)


def measure(row: Row, rounds: int, compiled: bool, device: torch.device) -> dict[str, object]:
    """Gate, then the times of every side: what the JSON holds of one row. Raises gate.GateError before anything is timed."""
    case = row.case
    if row.training:
        gate.check_model(case, device)
        sides = peers.training_steps(case, device, compiled=compiled)
        gate.check_first_step(case, sides)
    else:
        sides = peers.inference(case, device, compiled=compiled)
        gate.check_inference(case, sides)
    times = timing.interleave(sides, rounds, 2, device=device)
    found = {name: timing.summary(values) for name, values in times.items()}
    ours = found.pop(timing.OURS)
    rates = roofline.measured(cases.DTYPES[row.dtype], device)
    ideal = roofline.seconds(case, rates, training=row.training)
    result = timing.compare(ours, found)
    return {
        "id": row.id,
        "dtype": row.dtype,
        "batch": row.batch,
        "size": case.size,
        "ours": ours,
        "peers": found,
        **result,
        "least": row.least,
        "goal": row.goal,
        "ideal": ideal,
        "roofline": found[result["fastest_peer"]]["min"] / ideal,
        "rates": dataclasses.asdict(rates),
    }


def table(results: list[dict]) -> str:
    """Markdown, one line per row."""
    lines = [
        "| step | ours, ms | fastest peer, ms | ratio (by median) | at least | goal | roofline |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for r in results:
        peer = r["peers"][r["fastest_peer"]]["min"]
        mark = "" if r["ratio"] >= r["least"] else " *"
        lines.append(
            f"| {r['id']}, batch {r['batch']}, {r['size']} | {1e3 * r['ours']['min']:.1f} | {1e3 * peer:.1f} ({r['fastest_peer']}) "
            f"| {r['ratio']:.2f} ({r['ratio_median']:.2f}){mark} | {r['least']} | {r['goal']} | {r['roofline']:.1f} |"
        )
    return "\n".join(lines)


def page(results: list[dict], environment: dict, rounds: int) -> str:
    rates = {r["dtype"]: r["rates"] for r in results}
    measured = "; ".join(
        f"{name}: {v['flops'] / 1e9:.0f} GFLOP/s, {v['bytes'] / 1e9:.0f} GB/s"
        for name, v in rates.items()
    )
    return f"""# The CPU engine beside PyTorch

`python -m bench.engine --output docs/engine.md`. Time of a whole step (forward, cross entropy, backward, SGD on gamma and beta), or of a
forward pass in evaluation; minimum of {rounds} interleaved rounds. ratio: the fastest peer's time over ours; * is below what is asked
for. roofline: the fastest peer's time over that of the same arithmetic (after Winograd's) and bytes (of a full chain) at the rates that
the machine reaches in a matrix product and in a copy.

{timing.environment_line(environment)}. Measured rates: {measured}.

{table(results)}
"""


def main(arguments: list[str] | None = None) -> int:
    """0 if every gate passed, 1 if one did not, 2 for a wrong option."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.engine", description=__doc__.splitlines()[0]
    )
    known = [row.id for row in ROWS]
    parser.add_argument("--rows", default=",".join(known), help="comma-separated, of the ids")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--no-compile", action="store_true", help="without torch.compile: no ratio to publish"
    )
    parser.add_argument("--output", type=Path, help="where the page goes; the JSON lies beside it")
    options = parser.parse_args(arguments)
    wanted = options.rows.split(",")
    if unknown := sorted(set(wanted) - set(known)):
        parser.error(
            f"--rows names {', '.join(unknown)}; there are {', '.join(dict.fromkeys(known))}"
        )
    if options.rounds < 1:
        parser.error(f"--rounds is {options.rounds}; allowed: 1 or more")
    device = timing.default_device()
    results, failed = [], False
    for row in ROWS:
        if row.id not in wanted:
            continue
        try:
            results.append(measure(row, options.rounds, not options.no_compile, device))
        except gate.GateError as error:
            failed = True
            print(f"{row.id}: gate failed: {error}", file=sys.stderr, flush=True)
            continue
        print(table(results[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
    environment = timing.environment(device)
    content = json.dumps({"environment": environment, "rows": results}, indent=1)
    if options.output:
        options.output.write_text(page(results, environment, options.rounds))
        options.output.with_suffix(".json").write_text(content + "\n")
    else:
        print(page(results, environment, options.rounds))
        print(content)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
