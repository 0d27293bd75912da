"""What the pytest-benchmark suites share: peers timed once before each of our rounds, everything recorded in extra_info."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

import torch

from bench import timing


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
