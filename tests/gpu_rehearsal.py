"""A rehearsal of the GPU tests and benches on a machine without a GPU, as a pytest plugin: python -m pytest -p gpu_rehearsal -m gpu

PyTorch is made to say that it sees one GPU; what is put on it lies in the CPU's memory, and where a backend would
launch kernels the reference's phases run. All else is what a GPU would meet: devices chosen, tests collected and run, peers
timed, reports written. What needs a real device (graphs, gigabytes) skips.
"""

import contextlib

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")


def _is_gpu(value: object) -> bool:
    if isinstance(value, torch.device):
        return value.type == "cuda"
    return isinstance(value, str) and value.split(":")[0] == "cuda"


class _OnTheCPU(TorchFunctionMode):
    """Puts on the CPU what is asked for on a GPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is Tensor.cuda:
            return args[0]
        if function is Tensor.to:
            args = tuple(CPU if _is_gpu(value) else value for value in args)
        if _is_gpu(kwargs.get("device")):
            kwargs["device"] = CPU
        return function(*args, **kwargs)


class _Stream:
    def wait_stream(self, other: "_Stream") -> None:
        pass


class _Generator(torch.Generator):
    def __new__(cls, device: object = CPU) -> "_Generator":
        return super().__new__(cls, CPU)


def _no_graph() -> None:
    pytest.skip("a rehearsal: graphs need a GPU")


def _no_profile(**options) -> None:
    pytest.skip("a rehearsal: counting launches needs a GPU")


_MODE = _OnTheCPU()
_ANSWERS = {
    "is_available": lambda: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "get_device_name": lambda device=None: "rehearsal without a GPU",
    "get_device_capability": lambda device=None: (9, 0),
    "is_bf16_supported": lambda including_emulation=True: True,
    "get_rng_state": lambda device=None: torch.get_rng_state(),
    "set_rng_state": lambda state, device=None: None,
    "synchronize": lambda device=None: None,
    "reset_peak_memory_stats": lambda device=None: None,
    "memory_allocated": lambda device=None: 0,
    "max_memory_allocated": lambda device=None: 1,
    "mem_get_info": lambda device=None: (0, 0),
    "get_sync_debug_mode": lambda: 0,
    "set_sync_debug_mode": lambda mode: None,
    "Stream": _Stream,
    "current_stream": lambda device=None: _Stream(),
    "stream": lambda stream: contextlib.nullcontext(),
    "CUDAGraph": _no_graph,
}


def pytest_configure(config: pytest.Config) -> None:
    from bnfast import dispatch, reference

    for name, answer in _ANSWERS.items():
        setattr(torch.cuda, name, answer)
    torch.Generator = _Generator
    torch.profiler.profile = _no_profile
    # Tensors on the CPU stand for those on a GPU.
    pick = dispatch.pick
    dispatch.pick = lambda name, device: pick(name, torch.device("cuda"))
    dispatch._MODULES |= {"cuda": reference, "triton": reference}
    _MODE.__enter__()


def pytest_unconfigure(config: pytest.Config) -> None:
    _MODE.__exit__(None, None, None)
