"""Whole training steps, bnfast against stock PyTorch: make bench, or pytest bench/test_steps.py -k resnet20."""

import pytest

import bnfast
from bench import cases, gate, memory, peers, suite, timing


@pytest.mark.parametrize("case", cases.step_cases(), ids=lambda case: case.id)
def test_step(benchmark, case, device):
    benchmark.group = f"training step, {case.dtype}"
    gate.check_model(case, device)
    sides = peers.training_steps(case, device, compiled=cases.compiled())
    gate.check_first_step(case, sides)
    units = bnfast.explain(sides[timing.OURS].model)
    suite.run(
        benchmark,
        sides,
        device,
        suite="step",
        network=case.network,
        dtype=case.dtype,
        batch=case.batch,
        size=case.size,
        fused=len(units.fused),
        left=len(units.left),
    )
    if not benchmark.disabled:
        # Here and not in the memory suite, because the compiled model exists here; after timing, so that nothing was
        # compiled while autograd was being watched.
        saved = {name: memory.saved_bytes(side) for name, side in sides.items()}
        benchmark.extra_info["saved_bytes"] = saved
