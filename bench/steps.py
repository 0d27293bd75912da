"""The table of step-time ratios, at once: python -m bench.steps --models resnet20,resnet50 --rounds 5 [--no-compile]

Same cases, peers, gate and timer as the pytest suites; writes nothing.
"""

from __future__ import annotations

import argparse
import functools
import sys

import torch

from bench import cases, gate, peers, timing


def measure(
    case: cases.Step,
    *,
    rounds: int,
    warmup: int = 2,
    budget_s: float = float("inf"),
    compiled: bool = True,
    device: torch.device | None = None,
    convert: peers.Convert = peers.convert,
) -> dict[str, list[float]]:
    """Gate, then seconds per round of every side of `case`. Raises gate.GateError before anything is timed."""
    device = device or timing.default_device()
    gate.check_model(case, device, convert)
    sides = peers.training_steps(case, device, compiled=compiled, convert=convert)
    gate.check_first_step(case, sides)
    return timing.interleave(sides, rounds, warmup, budget_s, device)


def main(arguments: list[str] | None = None, convert: peers.Convert | None = None) -> int:
    """Prints one row per model and dtype; 0 if every gate passed, 1 if one did not, 2 for a wrong option."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.steps", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--models",
        default="resnet20,resnet50",
        help=f"comma-separated: {', '.join(cases.NETWORKS)}",
    )
    parser.add_argument("--dtypes", default="f32", help="comma-separated: f32, bf16 (autocast)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument(
        "--budget", type=float, default=float("inf"), help="seconds of timed rounds per row"
    )
    parser.add_argument("--batch", type=int, help="instead of the network's own")
    parser.add_argument("--size", type=int, help="pixels, instead of the network's own")
    parser.add_argument("--threads", type=int, help="torch.set_num_threads")
    parser.add_argument("--backend", default="auto", help="backend= of bnfast.convert")
    parser.add_argument(
        "--no-compile", action="store_true", help="leave the torch.compile peer out"
    )
    options = parser.parse_args(arguments)
    try:
        names = [name for name in options.models.split(",") if name]
        rows = [
            cases.step(n, d, options.batch, options.size)
            for n in names
            for d in options.dtypes.split(",")
        ]
    except ValueError as error:
        parser.error(str(error))
    if options.threads:
        torch.set_num_threads(options.threads)
    convert = convert or functools.partial(peers.convert, backend=options.backend)
    device = timing.default_device()
    print(timing.environment_line(timing.environment(device)))
    print(
        "minimum (median) ms per training step; ratio: fastest peer / bnfast by minimum (by median)"
    )
    failed = False
    for case in rows:
        label = f"{case.id} batch {case.batch} size {case.size}"
        try:
            times = measure(
                case,
                rounds=options.rounds,
                warmup=options.warmup,
                budget_s=options.budget,
                compiled=not options.no_compile,
                device=device,
                convert=convert,
            )
        except gate.GateError as error:
            failed = True
            print(f"{label}: gate failed: {error}", flush=True)
            continue
        found = {name: timing.summary(values) for name, values in times.items()}
        ours = found.pop(timing.OURS)
        result = timing.compare(ours, found)
        print(
            f"{label}: {result['ratio']:.2f}x ({result['ratio_median']:.2f}x) against {result['fastest_peer']}"
        )
        for name, value in {timing.OURS: ours, **found}.items():
            print(
                f"    {name:24s}{value['min'] * 1e3:9.1f} ({value['median'] * 1e3:.1f}) ms"
                f"{value['min'] / ours['min']:8.2f}x",
                flush=True,
            )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
