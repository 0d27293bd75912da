"""A rehearsal of the GPU tests and benches on a machine without a GPU, as a pytest plugin: python -m pytest -p gpu_rehearsal -m gpu

PyTorch is made to say that it sees one GPU; what is put on it lies in the CPU's memory, and where the Triton backend would
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


def _no_graph() -> None:
    pytest.skip("a rehearsal: graphs need a GPU")


_MODE = _OnTheCPU()
_ANSWERS = {
    "is_available": lambda: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "get_device_name": lambda device=None: "rehearsal without a GPU",
    "get_device_capability": lambda device=None: (9, 0),
    "is_bf16_supported": lambda including_emulation=True: True,
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
    dispatch._MODULES["triton"] = reference
    dispatch._forced.append("triton")
    # Tensors on the CPU stand for those on a GPU.
    dispatch._interprets = lambda: True
    _MODE.__enter__()


def pytest_unconfigure(config: pytest.Config) -> None:
    _MODE.__exit__(None, None, None)
