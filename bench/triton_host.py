"""Host time of the Triton backend per unit, forward and backward, with kernels and convolutions left out:
python -m bench.triton_host [--repeat 30]

What remains is bnfast's own Python, its allocations and autograd: the time that a GPU would wait for if its kernels took none.
Runs on the CPU; CPU time, the least of all repetitions.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Iterator

os.environ.setdefault("TRITON_INTERPRET", "1")

import torch
import torchvision
from torch import Tensor, nn
from triton.runtime import interpreter

import bnfast
from bench import triton_traffic
from bnfast import reference, weights


def _nothing(*args, **kwargs) -> None:
    pass


@contextlib.contextmanager
def left_out() -> Iterator[None]:
    """Launches do nothing, and PyTorch's convolutions give results that are there already."""
    launch = interpreter.InterpretedFunction.__getitem__
    convolve, dgrad = reference.conv_forward, reference.conv_dgrad
    checksum, weights._checksum = weights._checksum, None  # of weights in the CPU's memory alone
    outputs: dict[int, Tensor] = {}  # by their weights
    gradients: dict[int, Tensor] = {}

    def last(x: Tensor, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=x.dtype).contiguous(memory_format=torch.channels_last)

    def conv_forward(x, weight, bias, stride, padding, dilation, groups):
        if id(weight) not in outputs:
            sizes = reference.conv_output_size(x.shape[2:], weight, stride, padding, dilation)
            outputs[id(weight)] = last(x, x.shape[0], weight.shape[0], *sizes)
        return outputs[id(weight)]

    def conv_dgrad(dz, weight, input_size, stride, padding, dilation, groups):
        if id(weight) not in gradients:
            channels = weight.shape[1] * groups
            gradients[id(weight)] = last(dz, dz.shape[0], channels, *input_size)
        return gradients[id(weight)]

    interpreter.InterpretedFunction.__getitem__ = lambda self, grid: _nothing
    reference.conv_forward, reference.conv_dgrad = conv_forward, conv_dgrad
    try:
        yield
    finally:
        interpreter.InterpretedFunction.__getitem__ = launch
        reference.conv_forward, reference.conv_dgrad = convolve, dgrad
        weights._checksum = checksum


def unit_seconds(path: str, repeat: int) -> float:
    """Seconds per unit of a converted ResNet-50 whose stem and head are left out."""
    model = bnfast.convert(torchvision.models.resnet50(), inplace=True)
    stages = bnfast.convert(
        nn.Sequential(model.layer1, model.layer2, model.layer3, model.layer4), inplace=True
    )
    units = sum(isinstance(module, nn.BatchNorm2d) for module in stages.modules())
    # Small: what PyTorch itself adds up or allocates is not what is measured.
    x = torch.randn(2, 64, 8, 8).contiguous(memory_format=torch.channels_last)
    affine = bnfast.affine_parameters(stages)
    torch.set_num_threads(1)
    least = float("inf")
    with triton_traffic.route(path), left_out():
        dy = torch.zeros_like(stages(x))
        for _ in range(repeat):
            for parameter in affine:
                parameter.grad = None
            begin = time.process_time()
            stages(x).backward(dy)
            least = min(least, time.process_time() - begin)
    return least / units


def main(arguments: list[str] | None = None) -> int:
    """Prints microseconds per unit for each path."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.triton_host", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--repeat", type=int, default=30, help="how often each is measured")
    args = parser.parse_args(arguments)
    for path, (_, joins) in triton_traffic.ROUTES.items():
        if path != "two-pass" and not joins:
            continue  # of captured graphs alone, in which this Python does not run
        print(
            f"{path}: {unit_seconds(path, args.repeat) * 1e6:.1f} us per unit, forward and backward"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
