"""bn_fwd_reduce, bn_fwd_apply, bn_bwd_reduce and bn_bwd_apply together, without the convolution: BN (+ add) (+ act),
forward and backward, on every layer shape of a network."""

import pytest

from bench import cases, suite


@pytest.mark.parametrize("case", cases.phase_cases(), ids=lambda case: case.id)
def test_phase(benchmark, case, device):
    suite.run_phase(benchmark, case, device, case.network)
