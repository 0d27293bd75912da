"""What is to be chosen on a GPU, side by side: the backends on a network's BatchNorm phases, and the ways of a convolution in Triton on
whole training steps. pytest bench -m gpu; without a GPU all of them skip. The other suites run on a GPU as they are."""

import pytest
import torch
from bnfast.triton_kernels import conv

import bnfast
from bench import cases, suite

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no GPU"),
]


def named(backend: str) -> str:
    """The name of a backend that is there; skips the bench with the reason where it is not."""
    available = bnfast.backends()[backend]
    if available is not True:
        pytest.skip(f"backend {backend}: {available}")
    return backend


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("case", cases.phase_cases(), ids=lambda case: case.id)
def test_phase(benchmark, case, device, backend):
    """BN (+ add) (+ act) forward and backward by one backend."""
    with bnfast.use_backend(named(backend)):
        suite.run_phase(benchmark, case, device, f"{case.network}, {backend}")


@pytest.mark.parametrize("route", ["gram"] if cases.quick() else ["cudnn", "fused", "gram"])
@pytest.mark.parametrize("case", cases.step_cases(), ids=lambda case: case.id)
def test_step(benchmark, case, device, route, monkeypatch):
    """A training step in Triton, convolutions as BNFAST_TRITON_CONV says."""
    monkeypatch.setattr(conv, "route", route)
    with bnfast.use_backend(named("triton")):
        suite.run_step(benchmark, case, device, f"{case.network}, triton {route}")
