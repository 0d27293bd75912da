"""The only timer: every side of a comparison runs once per round, in an order that rotates from round to round.

What drifts during a run (clocks, neighbours on the machine, temperature) then hits all sides alike. Reported are the
minimum and the median of the rounds, in seconds; ratios are the fastest peer's over ours.
"""

from __future__ import annotations

import functools
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

OURS = "bnfast"


def default_device() -> torch.device:
    """BNFAST_BENCH_DEVICE if set, otherwise the GPU if PyTorch sees one, otherwise the CPU."""
    return torch.device(
        os.environ.get("BNFAST_BENCH_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
    )


def synchronize(device: torch.device) -> None:
    """Waits until `device` has finished; nothing to wait for on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Wall-clock seconds of one call of `call`, device included."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


class Rounds:
    """Times each of `sides` once per call of `once`, rotating the order; `times` maps each name to seconds per round."""

    def __init__(self, sides: Mapping[str, Callable[[], object]], device: torch.device) -> None:
        self.sides = dict(sides)
        self.device = device
        self.times: dict[str, list[float]] = {name: [] for name in self.sides}
        self._round = 0

    def warm_up(self, calls: int) -> None:
        """Runs every side `calls` times, untimed."""
        for _ in range(calls):
            for call in self.sides.values():
                call()
        synchronize(self.device)

    def once(self) -> None:
        """One timed round."""
        names = list(self.sides)
        first = self._round % len(names) if names else 0
        for name in names[first:] + names[:first]:
            self.times[name].append(seconds(self.sides[name], self.device))
        self._round += 1


def interleave(
    sides: Mapping[str, Callable[[], object]],
    rounds: int = 7,
    warmup: int = 2,
    budget_s: float = float("inf"),
    device: torch.device | None = None,
) -> dict[str, list[float]]:
    """Seconds per round of each of `sides`, `rounds` of them after `warmup` untimed calls.

    `budget_s` ends the timed part after the round in which it is used up, so at least one round is always complete.
    Raises ValueError if `rounds` is below 1 or `warmup` below 0.
    """
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}; allowed: 1 or more")
    if warmup < 0:
        raise ValueError(f"warmup is {warmup}; allowed: 0 or more")
    run = Rounds(sides, device or default_device())
    run.warm_up(warmup)
    start = time.perf_counter()
    for _ in range(rounds):
        run.once()
        if time.perf_counter() - start > budget_s:
            break
    return run.times


def summary(times: list[float]) -> dict[str, float]:
    """Minimum and median, in seconds."""
    return {"min": min(times), "median": statistics.median(times)}


def compare(ours: dict[str, float], peers: Mapping[str, dict[str, float]]) -> dict[str, object]:
    """The fastest peer by minimum, and fastest peer / ours by minimum and by median (above 1: bnfast is faster)."""
    fastest = min(peers, key=lambda name: peers[name]["min"])
    median = min(peer["median"] for peer in peers.values())
    return {
        "fastest_peer": fastest,
        "ratio": peers[fastest]["min"] / ours["min"],
        "ratio_median": median / ours["median"],
    }


def _git(*arguments: str) -> str:
    root = Path(__file__).resolve().parent.parent
    try:
        return subprocess.run(
            ["git", *arguments], cwd=root, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


@functools.cache
def environment(device: torch.device | None = None) -> dict[str, object]:
    """What every number is published with: machine, thread count, torch version, commit and whether the tree was dirty."""
    device = device or default_device()
    machine = f"{_processor()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        machine = f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}; host {machine}"
    # Generated results are no change of the code that made them.
    dirty = _git("status", "--porcelain", "--", ".", ":!bench/results")
    commit = _git("rev-parse", "--short=12", "HEAD") or "unknown"
    return {
        "machine": machine,
        "device": device.type,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": f"{commit}{'+dirty' if dirty else ''}",
    }


def environment_line(env: Mapping[str, object]) -> str:
    """`environment` in one line."""
    return f"{env['machine']}; torch {env['torch']}; commit {env['commit']}"
