"""Training under torchrun: one process per rank, gloo on the CPU and nccl on GPUs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bnfast.data import Place


def ranks() -> int:
    """Number of processes of this training: 1 unless torchrun started it."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def is_first() -> bool:
    """Whether this process is the one that prints and writes."""
    return ranks() == 1 or os.environ["RANK"] == "0"


@contextlib.contextmanager
def joined(device: str) -> Iterator[tuple[str, int]]:
    """(device, rank) of this process, with the group of all ranks up to the end of the context."""
    if ranks() == 1:
        yield device, 0
        return
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
    owns = not dist.is_initialized()
    if owns:
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield device, dist.get_rank()
    finally:
        if owns:
            dist.destroy_process_group()


def summed(values: Tensor, place: Place) -> Tensor:
    """The sum of a tensor over all ranks, in place."""
    if place.ranks > 1:
        dist.all_reduce(values)
    return values


def share_buffers(model: nn.Module, place: Place) -> None:
    """Gives all ranks the running statistics of rank 0, in place."""
    if place.ranks > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def wait(place: Place) -> None:
    """Returns when all ranks have come here."""
    if place.ranks > 1:
        dist.barrier()
