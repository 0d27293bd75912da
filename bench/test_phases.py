"""bn_fwd_reduce, bn_fwd_apply, bn_bwd_reduce and bn_bwd_apply together, without the convolution: BN (+ add) (+ act),
forward and backward, on every layer shape of a network."""

import pytest

from bench import cases, gate, peers, suite

CASES = cases.phase_cases()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_phase(benchmark, case, device):
    benchmark.group = f"BN phases of {case.network}, {case.kind}, {case.dtype}"
    data = peers.phase_data(case, device)
    gate.avoid_kinks(case, data)
    sides = peers.phase_steps(case, data, compiled=cases.compiled())
    gate.check_phase(case, data, sides)
    suite.run(
        benchmark,
        sides,
        device,
        suite="phase",
        network=case.network,
        dtype=case.dtype,
        kind=case.kind,
        shape=case.shape,
        count=case.count,
    )
