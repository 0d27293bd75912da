"""Memory of a training step, measured: what autograd saves, and how far the process grows."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from bench.peers import TrainingStep


def saved_bytes(side: TrainingStep) -> int:
    """Bytes that one forward of `side` keeps for backward: unique storages, parameters and buffers excluded."""
    import bnfast.measure

    with side.precision():
        return int(bnfast.measure.saved_activation_bytes(side.model, side.x))


def _status(field: str) -> int:
    """A field of this process's /proc status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """How many bytes above the present state the process (on a GPU: PyTorch's allocator) is at its highest while
    `call` runs; caches that `call` leaves behind count. None where the system offers no such counter."""
    import bnfast

    gc.collect()
    bnfast.clear_cache()  # buffers that are kept from the cases before would hide the call's own
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if not sys.platform.startswith("linux"):
        return None
    try:
        ctypes.CDLL(None).malloc_trim(
            0
        )  # freed but unreturned pages would hide the call's own growth
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        before = _status("VmRSS")
        call()
        return _status("VmHWM") - before
    except (OSError, AttributeError):
        return None
