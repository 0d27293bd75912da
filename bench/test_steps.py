"""Whole training steps, bnfast against stock PyTorch: make bench, or pytest bench/test_steps.py -k resnet20."""

import pytest

from bench import cases, memory, suite


@pytest.mark.parametrize("case", cases.step_cases(), ids=lambda case: case.id)
def test_step(benchmark, case, device):
    sides = suite.run_step(benchmark, case, device, case.network)
    if not benchmark.disabled:
        # Here and not in the memory suite, because the compiled model exists here; after timing, so that nothing was
        # compiled while autograd was being watched.
        saved = {name: memory.saved_bytes(side) for name, side in sides.items()}
        benchmark.extra_info["saved_bytes"] = saved
