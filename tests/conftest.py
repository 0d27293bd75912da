"""Fixtures shared by all tests: seed and thread count, poisoned fresh memory, one `backend` per backend of the package (where there
is no GPU, Triton's in its interpreter and CUDA's in the emulator)."""

import importlib
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

# A table that the machine's owner has made would choose other kernels than those under test.
os.environ["BNFAST_TUNING"] = "0"

import pytest
import torch
import triton_interpreter
from cuda_emulator import build as cuda_emulator

is_interpreted = triton_interpreter.install()

from bnfast import cuda, dispatch, native

FULL = os.environ.get("BNFAST_FULL_TESTS") == "1"
# Of tests with many cases one in so many runs where a backend is interpreted.
SAMPLE = {"triton": 4, "cuda": 4}
WHERE = {"triton": "Triton's interpreter", "cuda": "the CUDA emulator"}


def has_emulator() -> bool:
    """Whether the CUDA kernels run in the emulator here: without a GPU, with a C++ compiler and the operators' schemas."""
    return (
        not torch.cuda.is_available()
        and native.unavailable is None
        and bool(cuda_emulator.compiler())
    )


@dataclass(frozen=True)
class Backend:
    """A backend under test: its module of phase functions and the device on which its tensors live."""

    name: str
    module: ModuleType | SimpleNamespace
    device: torch.device
    interpreted: bool = False  # in an interpreter or emulator, slow: large shapes are cut

    def __str__(self) -> str:
        return self.name

    def takes_long(self) -> None:
        """Skips the test where the interpreter would take minutes for it, but in the full form."""
        if self.interpreted and not FULL:
            pytest.skip(f"takes too long in {WHERE[self.name]}; BNFAST_FULL_TESTS=1 runs it")


@pytest.fixture(params=sorted(dispatch.backends()))
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Backend:
    """Each backend of bnfast.dispatch.backends(); one that is not available is skipped with its own reason."""
    name = request.param
    emulated = name == "cuda" and has_emulator()
    available = emulated or dispatch.backends()[name]
    if available is not True:
        pytest.skip(f"backend {name}: {available}")
    interpreted = emulated or (name == "triton" and is_interpreted)
    if interpreted and not FULL:
        # Of tests with many cases the interpreter gets a sample, the same each time, and no large tensors.
        params = request.node.callspec.params
        case = params.get("case")
        large = case is not None and torch.Size(case.shape).numel() > 50_000
        chosen = zlib.crc32(request.node.nodeid.encode()) % SAMPLE[name] == 0
        if large or (len(params) > 1 and not chosen):
            pytest.skip(
                f"one small case in {SAMPLE[name]} in {WHERE[name]}; all: BNFAST_FULL_TESTS=1"
            )
    if emulated:
        cuda_emulator.emulator()
        module = cuda.phases(torch.ops.bnfast_emulated)
        monkeypatch.setattr(cuda, "device_type", "cpu")
        monkeypatch.setitem(dispatch._MODULES, "cuda", module)
        return Backend(name, module, torch.device("cpu"), interpreted)
    if name == "triton" and zlib.crc32(request.node.nodeid.encode()) & 256:
        # Most shapes of tests are small enough for the kernels that keep a channel on chip: of every other test's, none is.
        monkeypatch.setattr(importlib.import_module("bnfast.triton_kernels.layout"), "SLAB", 0)
    on_gpu = name == "cuda" or (name == "triton" and not interpreted)
    device = torch.device("cuda" if on_gpu else "cpu")
    return Backend(name, dispatch.module(name), device, interpreted)


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
