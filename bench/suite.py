"""What the pytest-benchmark suites share: peers timed once before each of our rounds, everything recorded in extra_info."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

import torch

import bnfast
from bench import cases, gate, peers, timing


def rounds() -> int:
    """Timed rounds per case: BNFAST_BENCH_ROUNDS, 7 if unset."""
    return int(os.environ.get("BNFAST_BENCH_ROUNDS") or 7)


def run(
    benchmark, sides: Mapping[str, Callable[[], object]], device: torch.device, **details: object
) -> None:
    """Times `sides` interleaved: pytest-benchmark times ours, its setup times every peer once just before.

    extra_info then holds `details`, the environment, minimum and median in seconds of every side, and the ratios of
    `timing.compare`. Under --benchmark-disable everything runs once and nothing is recorded.
    """
    peers = {name: side for name, side in sides.items() if name != timing.OURS}
    ours = sides[timing.OURS]
    clock = timing.Rounds(peers, device)

    def timed() -> None:
        ours()
        timing.synchronize(device)

    if not benchmark.disabled:
        timing.Rounds(sides, device).warm_up(2)
    benchmark.pedantic(
        timed, setup=clock.once, rounds=1 if benchmark.disabled else rounds(), iterations=1
    )
    if benchmark.disabled:
        return
    found = {name: timing.summary(times) for name, times in clock.times.items()}
    mine = timing.summary(benchmark.stats.stats.data)
    benchmark.extra_info.update(
        details,
        environment=timing.environment(device),
        rounds=rounds(),
        ours=mine,
        peers=found,
        **timing.compare(mine, found),
    )


def run_phase(benchmark, case: cases.Phase, device: torch.device, network: str) -> None:
    """Times a case of the BatchNorm phases, behind its gate; `network` is its name in the report."""
    benchmark.group = f"BN phases of {case.network}, {case.kind}, {case.dtype}"
    data = peers.phase_data(case, device)
    gate.avoid_kinks(case, data)
    sides = peers.phase_steps(case, data, compiled=cases.compiled())
    gate.check_phase(case, data, sides)
    run(
        benchmark,
        sides,
        device,
        suite="phase",
        network=network,
        dtype=case.dtype,
        kind=case.kind,
        shape=case.shape,
        count=case.count,
    )


def run_step(
    benchmark, case: cases.Step, device: torch.device, network: str
) -> dict[str, peers.TrainingStep]:
    """Times a training step, behind its gates; `network` is its name in the report. Returns all sides."""
    benchmark.group = f"training step, {case.dtype}"
    gate.check_model(case, device)
    sides = peers.training_steps(case, device, compiled=cases.compiled())
    gate.check_first_step(case, sides)
    units = bnfast.explain(sides[timing.OURS].model)
    run(
        benchmark,
        sides,
        device,
        suite="step",
        network=network,
        dtype=case.dtype,
        batch=case.batch,
        size=case.size,
        fused=len(units.fused),
        left=len(units.left),
    )
    return sides
