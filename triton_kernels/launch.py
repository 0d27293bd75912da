"""What launchers share: dtypes, arguments, the current device."""

import contextlib
import ctypes
import functools

import torch
import triton.language as tl
from torch import Tensor

TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
# Threads of a warp, which is how Triton counts them.
LANES = 64 if torch.version.hip else 32
_SAME = contextlib.nullcontext()


def device_of(t: Tensor) -> contextlib.AbstractContextManager:
    """The tensor's device as the current one: Triton launches on that, whatever its arguments."""
    if not t.is_cuda or t.device.index == torch.cuda.current_device():
        return _SAME
    return torch.cuda.device(t.device)


_nothing: dict[tuple[torch.device, torch.dtype], Tensor] = {}


def no_elements(device: torch.device, dtype: torch.dtype = torch.uint8) -> Tensor:
    """A tensor without elements, the same each time: what is returned where nothing is asked for."""
    if torch.compiler.is_compiling():
        return torch.empty(0, dtype=dtype, device=device)
    key = (device, dtype)
    if key not in _nothing:
        _nothing[key] = torch.empty(0, dtype=dtype, device=device)
    return _nothing[key]


def check_writable(dy: Tensor, *others: Tensor | None) -> None:
    """Raises RuntimeError where elements of dy share a place in memory, or dy lies in the range of one of the others."""
    if torch._debug_has_internal_overlap(dy) == 1:
        raise RuntimeError(
            "dy is to be written, and several of its elements share one place in memory"
        )
    for other in others:
        if other is None or _are_apart(dy.untyped_storage(), other.untyped_storage()):
            continue
        (begin, end), (first, last) = _range(dy), _range(other)
        if begin < last and first < end:
            raise RuntimeError("dy is to be written, and shares memory with z or the residual")


def _are_apart(one: torch.UntypedStorage, other: torch.UntypedStorage) -> bool:
    """Whether two storages have no byte in common, which is faster to see than of two tensors."""
    begin, first = one.data_ptr(), other.data_ptr()
    return begin + one.nbytes() <= first or first + other.nbytes() <= begin


def _range(t: Tensor) -> tuple[int, int]:
    """Addresses from the first byte of t to behind its last."""
    if t.numel() == 0:
        return 0, 0
    last = sum((size - 1) * step for size, step in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()


@functools.lru_cache(1024)
def three(value: float) -> tuple[float, float, float]:
    """A float64 as three floats whose sum it is; Triton passes floats as float32."""
    high = ctypes.c_float(value).value
    low = ctypes.c_float(value - high).value
    return high, low, value - high - low
