"""Fixtures shared by all tests: seed and thread count, poisoned fresh memory, one `backend` per backend of the package."""

from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch

from bnfast import dispatch


@dataclass(frozen=True)
class Backend:
    """A backend under test: its module of phase functions and the device on which its tensors live."""

    name: str
    module: ModuleType
    device: torch.device

    def __str__(self) -> str:
        return self.name


@pytest.fixture(params=sorted(dispatch.backends()))
def backend(request: pytest.FixtureRequest) -> Backend:
    """Each backend of bnfast.dispatch.backends(); one that is not available is skipped with its own reason."""
    name = request.param
    available = dispatch.backends()[name]
    if available is not True:
        pytest.skip(f"backend {name}: {available}")
    on_gpu = name == "cuda" or (name == "triton" and torch.cuda.is_available())
    device = torch.device("cuda" if on_gpu else "cpu")
    return Backend(name, dispatch.module(name), device)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The global generators start each test in the same state."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def thread_count() -> Iterator[None]:
    """Gives the number of threads back after each test."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """torch.empty and at::empty return NaN (integers: the largest value), so that an unwritten output is seen."""
    algorithms = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    # Filling needs the deterministic mode; warn_only because the stock paths are allowed to be what they are.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(algorithms, warn_only=warn_only)
    torch.utils.deterministic.fill_uninitialized_memory = fill
