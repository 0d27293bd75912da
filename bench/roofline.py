"""What a training step would take at the machine's own rates: the arithmetic of every convolution after Winograd's, or the bytes that a
full chain of units has to move, whichever takes longer.

It is no bound for an algorithm with fewer operations, and it knows nothing of caches: a tensor that stays in one costs nothing there.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import torch
from torch import nn

from bench import cases, floors, timing
from bnfast import winograd

# Products of Winograd's form per output and pair of channels, by the stride and the outputs of a tile along a side (bnfast/winograd.py): of 3x3
# kernels, and of larger ones of stride 2, over blocks of four times the channels.
WINOGRAD = {(1, 4): 36 / 16, (1, 6): 64 / 36, (2, 4): 81 / 16, (2, 5): 4 * 64 / 25}


@dataclasses.dataclass(frozen=True)
class Rates:
    """Operations (a multiplication and an addition are two) and bytes (read or written) per second."""

    flops: float
    bytes: float


@functools.cache
def measured(dtype: torch.dtype, device: torch.device) -> Rates:
    """The best of a few products of square matrices, and of a few copies of 256 MB."""
    size = 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    source = torch.ones(64 * 2**20, device=device)
    target = torch.empty_like(source)

    def best(call) -> float:
        call()
        return min(timing.seconds(call, device) for _ in range(10))

    product, copy = best(lambda: a @ b), best(lambda: target.copy_(source))
    return Rates(2 * size**3 / product, 2 * source.nbytes / copy)


@dataclasses.dataclass(frozen=True)
class Conv:
    """A convolution (or a linear layer) of a network for one image: multiplications of the direct form, elements that it reads and
    writes, what share of the multiplications Winograd's form takes where it can be used."""

    products: int
    reads: int
    writes: int
    winograd: float


def winograd_share(conv: nn.Conv2d, x: torch.Tensor, out: torch.Tensor) -> float:
    """The share of a convolution's products that Winograd's form takes, 1 where it cannot be used."""
    kernel, stride = tuple(conv.kernel_size), conv.stride[0]
    where = (conv.stride, conv.padding, conv.dilation, conv.groups)
    if winograd.serves_blocks(x, kernel, conv.out_channels, *where, "avx512"):
        tile = 5
    elif kernel == (3, 3) and (*where[2:], stride) in (((1, 1), 1, 1), ((1, 1), 1, 2)):
        tile = winograd.tile(torch.float32, *conv.weight.shape[1::-1], out.shape[2:], stride)
    else:
        return 1.0
    return WINOGRAD[stride, tile] / math.prod(kernel)


@functools.cache
def convolutions(network: str, size: int) -> tuple[Conv, ...]:
    """In the order of execution, of one image [3, size, size]."""
    with torch.random.fork_rng():
        model = cases.build(network).to("meta")
    found: list[Conv] = []

    def saw(module: nn.Module, args: tuple, out: torch.Tensor) -> None:
        per_output = module.weight[0].numel()
        share = winograd_share(module, args[0], out) if isinstance(module, nn.Conv2d) else 1.0
        elements = [math.prod(t.shape[1:]) for t in (args[0], out)]
        found.append(Conv(elements[1] * per_output, *elements, share))

    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(saw)
    with torch.no_grad():
        model(torch.empty(2, 3, size, size, device="meta"))
    return tuple(found)


def seconds(case: cases.Step, rates: Rates, *, training: bool = True) -> float:
    """The ideal time of one step of `case`, or of its forward pass in evaluation.

    Arithmetic: forward and the data gradient, which the first convolution has not. Bytes: the accesses per element of
    `floors.KINDS` for a full chain, convolutions included (but for the stem's); in evaluation each unit reads its input (and residual) and writes its
    output.
    """
    element = 4 if case.dtype == "f32" else 2
    arithmetic = 0.0
    for i, conv in enumerate(convolutions(case.network, case.size)):
        products = conv.products * (conv.winograd if case.dtype == "f32" else 1)
        arithmetic += 2 * products * (2 if training and i > 0 else 1)
    kinds = {kind.name: kind for kind in floors.KINDS}
    moved = 0.0
    for i, unit in enumerate(cases.units(case.network, case.size)):
        kind = kinds[floors.kind_of(unit, i == 0)]
        accesses = sum(kind.chain or kind.two_pass) if training else 3 if unit.residual else 2
        moved += accesses * unit.channels * unit.height * unit.width * element
    return case.batch * max(arithmetic / rates.flops, moved / rates.bytes)
