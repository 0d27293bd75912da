"""Which backend serves a call. A backend is a module, or a namespace, with the phases of `reference` as
functions."""

import contextlib
import importlib
import importlib.util
import os
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace

import torch

from . import cuda, native, reference

_MODULES: dict[str, ModuleType | SimpleNamespace] = {"cpu": native, "reference": reference}
NAMES = ("auto", *_MODULES, "cuda", "triton")
_forced: list[str] = []
_has_triton = importlib.util.find_spec("triton") is not None


def backends() -> dict[str, bool | str]:
    """Each backend's name with True where it can be used here, else the reason why it cannot."""
    return {
        "cpu": native.unavailable or True,
        "cuda": cuda.why_unavailable() or True,
        "reference": True,
        "triton": _why_no_triton() or True,
    }


def _why_no_triton() -> str | None:
    if not _has_triton:
        return "the package triton is not installed (pip install triton)"
    if not (torch.cuda.is_available() or _interprets()):
        return (
            "PyTorch sees no GPU (with TRITON_INTERPRET=1 in the environment the kernels run in Triton's "
            "interpreter, on CPU tensors and slowly)"
        )
    return None


def _interprets() -> bool:
    """Whether Triton kernels run in its interpreter, which takes tensors on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the context all calls of this process use the named backend, whatever convert() was told.

    Raises ValueError for an unknown name, RuntimeError for a backend that is not available here.
    """
    check(name)
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


def check(name: str) -> None:
    """Raises unless `name` is a backend that can be used here, or "auto"."""
    if name not in NAMES:
        raise ValueError(f"backend is {name!r}; allowed are {', '.join(map(repr, NAMES))}")
    if name != "auto" and backends()[name] is not True:
        raise RuntimeError(f"backend {name!r} is not available: {backends()[name]}")


def pick(name: str, device: torch.device) -> str:
    """The name of the backend for tensors on `device`; raises RuntimeError where the named one cannot serve them."""
    if _forced:
        name = _forced[-1]
    if name == "auto":
        if device.type == "cuda":
            if cuda.why_unavailable() is None:
                return "cuda"
            return "triton" if _has_triton else "reference"
        return "cpu" if device.type == "cpu" and native.unavailable is None else "reference"
    if name == "cpu" and device.type != "cpu":
        raise RuntimeError(f"backend 'cpu' serves tensors on the CPU; x is on {device}")
    if name == "cuda" and device.type != cuda.device_type:
        raise RuntimeError(f"backend 'cuda' serves tensors on an NVIDIA GPU; x is on {device}")
    if name == "triton" and device.type != "cuda" and not (device.type == "cpu" and _interprets()):
        raise RuntimeError(f"backend 'triton' serves tensors on a GPU; x is on {device}")
    return name


def module(name: str) -> ModuleType | SimpleNamespace:
    """The phases of a backend that `pick` named."""
    if name not in _MODULES:
        if name == "cuda":
            _MODULES[name] = cuda.phases(torch.ops.bnfast)
        else:
            # Not at the top: importing Triton costs a moment.
            _MODULES[name] = importlib.import_module("bnfast.triton_kernels")
    return _MODULES[name]
