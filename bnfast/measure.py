"""Measurements of a model: bytes that autograd keeps for the backward pass, agreement with the
plain model, times of steps; and of the machine.
"""

from __future__ import annotations

import copy
import itertools
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bnfast.freezing import affine_parameters


def saved_activation_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes that autograd holds between the forward and the backward of model(x), without
    parameters and buffers.

    Counts every storage that the graph saved once, at its full size, through
    torch.autograd.graph.saved_tensors_hooks. The forward runs in the mode (training or not) and
    with the requires_grad that the model has now; the loss is not part of it. Buffers (running
    statistics) and the random generators are as before afterwards.
    """
    own = {
        tensor.untyped_storage().data_ptr()
        for tensor in itertools.chain(model.parameters(), model.buffers())
    }
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    before = [buffer.detach().clone() for buffer in model.buffers()]
    devices = [x.device] if x.device.type == "cuda" else []
    try:
        with (
            torch.random.fork_rng(devices=devices),
            torch.enable_grad(),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        ):
            # The output keeps the graph alive: addresses of freed storages would be reused.
            output = model(x)
        del output
    finally:
        with torch.no_grad():
            for buffer, value in zip(model.buffers(), before, strict=True):
                buffer.copy_(value)
    return sum(saved.values())


def training_step(
    model: nn.Module, images: Tensor, labels: Tensor, lr: float
) -> Callable[[], None]:
    """A function that does one training step (SGD with momentum on the mean cross-entropy) of a model on one batch.

    The model is put into training mode and changes with every call.
    """
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = trained and torch.optim.SGD(trained, lr=lr, momentum=0.9)

    def step() -> None:
        loss = F.cross_entropy(model(images), labels)
        if optimizer:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if images.is_cuda:
            torch.cuda.synchronize()

    return step


def interleaved_ms(
    steps: Sequence[Callable[[], None]], rounds: int, warmup: int = 2
) -> list[float]:
    """The median time of each function in milliseconds, over `rounds` rounds in which each runs once, in alternating
    order, after `warmup` rounds that do not count.
    """
    times: list[list[float]] = [[] for _ in steps]
    for number in range(warmup + rounds):
        order = range(len(steps)) if number % 2 == 0 else reversed(range(len(steps)))
        for index in order:
            start = time.perf_counter()
            steps[index]()
            if number >= warmup:
                times[index].append(1000 * (time.perf_counter() - start))
    return [statistics.median(own) for own in times]


def peak_bytes(device: str) -> int | None:
    """The most memory that this process (on a GPU: PyTorch's allocator) has held so far; None where the system does not
    say.
    """
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    try:
        # Not getrusage: on Linux its figure is at least what the parent process held at the fork.
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS: bytes


def machine(device: str) -> str:
    """What a time was measured on: processor (and GPU), instruction set, threads."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        pass  # not Linux on x86: the platform's own word
    count = torch.get_num_threads()
    threads = f"{count} thread{'s' if count > 1 else ''}"
    text = f"{name}, {torch.backends.cpu.get_cpu_capability()}, {threads}"
    return f"{torch.cuda.get_device_name()}; {text}" if device.startswith("cuda") else text


class Agreement(NamedTuple):
    """How far two models' BatchNorm gradients are from those of float64, as relative L2 errors of
    the whole vector.
    """

    error: float
    plain_error: float

    @property
    def ok(self) -> bool:
        """Whether the error is of the plain model's order: at most 8 times as large, plus a band of
        1e-3.
        """
        # Written so that NaN is not ok. ReLUs that flip dominate both errors: no tighter bound.
        return self.error <= 8 * self.plain_error + 1e-3


def gradient_agreement(model: nn.Module, plain: nn.Module, x: Tensor, labels: Tensor) -> Agreement:
    """Compares gradients of the mean cross-entropy for all gammas and betas with those of the plain
    model in float64.

    model and plain have the same parameters; x [N, C, H, W] float32, labels int64 [N]. Works on
    copies in training mode.
    """
    exact = _affine_gradient(copy.deepcopy(plain).double(), x.double(), labels)
    scale = exact.norm().clamp_min(torch.finfo(torch.float32).tiny)

    def error(candidate: nn.Module) -> float:
        gradient = _affine_gradient(copy.deepcopy(candidate), x, labels)
        return ((gradient - exact).norm() / scale).item()

    return Agreement(error(model), error(plain))


def _affine_gradient(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    parameters = [p.requires_grad_(True) for p in affine_parameters(model)]
    loss = F.cross_entropy(model.train()(x), labels)
    gradients = torch.autograd.grad(loss, parameters)
    return torch.cat([gradient.flatten().double() for gradient in gradients])
