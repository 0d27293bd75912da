"""Bytes saved for backward, and peak memory of two training steps, bnfast against eager PyTorch.

The compiled peer's saved bytes are in the step suite, which compiles anyway.
"""

import pytest

from bench import cases, gate, memory, peers, timing


@pytest.mark.parametrize("case", cases.memory_cases(), ids=lambda case: case.id)
def test_memory(benchmark, case, device):
    benchmark.group = f"memory, {case.dtype}"
    gate.check_model(case, device)
    # On sides of its own, because those that are measured start cold. It also brings in what libraries allocate once per
    # process, which must not be charged to whoever comes first.
    gate.check_first_step(case, peers.training_steps(case, device, compiled=False))
    sides = peers.training_steps(case, device, compiled=False)

    def measure():
        saved, peak = {}, {}
        for name, side in sides.items():
            # Peak first: two steps from cold include the caches that a side builds, the optimiser state too.
            peak[name] = memory.peak_bytes(lambda side=side: (side(), side()), device)
            saved[name] = memory.saved_bytes(side)
        return saved, peak

    saved, peak = benchmark.pedantic(measure, rounds=1, iterations=1)
    benchmark.extra_info.update(
        suite="memory",
        network=case.network,
        dtype=case.dtype,
        batch=case.batch,
        size=case.size,
        environment=timing.environment(device),
        saved_bytes=saved,
        peak_bytes=peak,
    )
    assert all(value > 0 for value in saved.values())
