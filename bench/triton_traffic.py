"""Global memory traffic of the Triton kernels beside the floor: python -m bench.triton_traffic [--output FILE]

Two steps, both without a GPU. In the interpreter every load and store of a kernel is counted, by argument: bytes in all, and
unique bytes (each address once per kernel and direction: what memory sees if everything read again hits the cache), on shapes
that are multiples of the tiles. Then a training step of a whole converted ResNet-50 runs with the kernels left out: what it
would launch, times what the first step says about each kernel's arguments.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")

import numpy as np
import torch
import torchvision
from bnfast.triton_kernels import conv, conv_fwd, layout
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

import bnfast
from bench.floors import KINDS, Kind
from bnfast import triton_kernels

ROUTES = {
    "two-pass": ("cudnn", False),
    "moments in the epilogue": ("fused", False),
    "full chain": ("fused", True),
    "full chain, ends without z": ("gram", True),
}
DTYPE = torch.float16


@dataclasses.dataclass
class Traffic:
    """Bytes of one argument of one launch: loaded and stored at distinct addresses, and in all; and where the argument lies."""

    launch: int
    kernel: str
    variant: tuple[int, ...]  # taps and strides of a convolution
    argument: str
    address: int
    size: int
    load: int = 0
    store: int = 0
    total: int = 0

    @property
    def unique(self) -> int:
        return self.load + self.store


def _tensors(names: list[str], args: tuple) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the arguments of a launch that are tensors, those in tuples included."""
    for name, value in zip(names, args, strict=False):
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, tuple):
            for field, item in zip(value._fields, value, strict=True):
                if isinstance(item, Tensor):
                    yield f"{name}.{field}", item


def _arguments(executor, args: tuple, found: list[Traffic]) -> list[Traffic]:
    """The arguments of a launch that are tensors."""
    kernel = executor.fn.__name__
    values = dict(zip(executor.arg_names, args, strict=False))
    variant = tuple(values[n] for n in ("TAPS_H", "STRIDE_H") if n in values)
    launch = found[-1].launch + 1 if found else 0
    return [
        Traffic(launch, kernel, variant, name, tensor.data_ptr(), tensor.nbytes)
        for name, tensor in _tensors(executor.arg_names, args)
    ]


def _require_interpreter() -> None:
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("TRITON_INTERPRET is not 1; traffic is counted in Triton's interpreter")


@contextlib.contextmanager
def ledger() -> Iterator[list[Traffic]]:
    """Counts what kernels launched inside move. RuntimeError outside of Triton's interpreter."""
    _require_interpreter()
    found: list[Traffic] = []
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, run = builder.create_masked_load, builder.create_masked_store, executor.__call__
    places: dict[str, list[np.ndarray]] = {"load": [], "store": []}

    def saw(direction: str, pointers: interpreter.TensorHandle, mask: np.ndarray) -> None:
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        at = pointers.data[np.broadcast_to(mask, pointers.data.shape).astype(bool)]
        # Addresses of a byte each, so that elements of several sizes add up.
        places[direction].append((at[:, None] + np.arange(size, dtype=at.dtype)).ravel())

    def counted_load(self, pointers, mask, *rest):
        saw("load", pointers, mask.data)
        return load(self, pointers, mask, *rest)

    def counted_store(self, pointers, value, mask, *rest):
        saw("store", pointers, mask.data)
        return store(self, pointers, value, mask, *rest)

    def counted_run(self, *args, **kwargs):
        for seen in places.values():
            seen.clear()
        result = run(self, *args, **kwargs)
        # What shares its place with another argument (dz written over dy) counts once.
        entries = list({e.address: e for e in reversed(_arguments(self, args, found))}.values())
        for direction, seen in places.items():
            every = np.sort(np.concatenate(seen)) if seen else np.empty(0, np.uint64)
            unique = np.unique(every)
            for entry in entries:
                ends = (entry.address, entry.address + entry.size)
                inside = [np.subtract(*np.searchsorted(a, ends)[::-1]) for a in (unique, every)]
                setattr(entry, direction, int(inside[0]))
                entry.total += int(inside[1])
        found.extend(entries)
        return result

    builder.create_masked_load, builder.create_masked_store = counted_load, counted_store
    executor.__call__ = counted_run
    try:
        yield found
    finally:
        builder.create_masked_load, builder.create_masked_store = load, store
        executor.__call__ = run


# ---- units and chains in the interpreter ---------------------------------------------------------------------------------


SHAPE = (2, 128, 16, 32)  # multiples of all tiles
ON_CHIP_SHAPE = (8, 64, 8, 16)  # fits on chip both ways


@contextlib.contextmanager
def slabs(used: bool) -> Iterator[None]:
    """Within it channels that fit on chip go through the one kernel, or none does."""
    before = layout.SLAB
    layout.SLAB = before if used else 0
    try:
        yield
    finally:
        layout.SLAB = before


def run_unit(
    kind: Kind, memory_format: torch.memory_format, on_chip: bool = False
) -> list[Traffic]:
    """Forward and backward of one unit's BatchNorm side on z of SHAPE, in two passes; or on one of ON_CHIP_SHAPE, read once."""
    shape = ON_CHIP_SHAPE if on_chip else SHAPE
    z, dy, residual = (
        torch.randn(shape).to(DTYPE).contiguous(memory_format=memory_format) for _ in range(3)
    )
    gamma, beta = torch.rand(2, shape[1]) + 0.5
    running = (torch.zeros(shape[1]), torch.ones(shape[1]), torch.tensor(0))
    with slabs(on_chip), ledger() as found:
        mean, rstd, _, bits = triton_kernels.bn_fwd_reduce_apply(
            z, *running, 0.1, 1e-5, gamma, beta, residual if kind.residual else None,
            kind.act, 0.0, kind.residual,
        )  # fmt: skip
        state = (dy, z, mean, rstd, gamma, beta, None, bits if kind.residual else None, kind.act)
        if kind.has_dgrad:
            triton_kernels.bn_bwd_reduce_apply(*state, 0.0, kind.residual)
        else:
            triton_kernels.bn_bwd_reduce(*state, 0.0)
    return found


def floor_bytes(kind: Kind, on_chip: bool = False) -> float:
    """Bytes of the two-pass form for SHAPE: whole tensors, and bits. On chip what is reduced is not read again: z forward, dy and z
    backward, and bits."""
    if not on_chip:
        return np.prod(SHAPE) * (sum(kind.two_pass) * DTYPE.itemsize + kind.bits / 8)
    again = 3 if kind.has_dgrad else 1
    bits = 2 if kind.residual else 0
    return np.prod(ON_CHIP_SHAPE) * ((sum(kind.two_pass) - again) * DTYPE.itemsize + bits / 8)


class Bottleneck(nn.Module):
    """A bottleneck of ResNet-50 in any width."""

    def __init__(self, in_channels: int, channels: int, out_channels: int, stride: int = 1):
        super().__init__()

        def layer(*conv):
            return nn.Sequential(nn.Conv2d(*conv, bias=False), nn.BatchNorm2d(conv[1]))

        self.first = layer(in_channels, channels, 1)
        self.second = layer(channels, channels, 3, stride, 1)
        self.third = layer(channels, out_channels, 1)
        self.shortcut = None
        if stride != 1 or in_channels != out_channels:
            self.shortcut = layer(in_channels, out_channels, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.third(torch.relu(self.second(torch.relu(self.first(x)))))
        return torch.relu(y + (x if self.shortcut is None else self.shortcut(x)))


@contextlib.contextmanager
def route(name: str) -> Iterator[None]:
    """Within it convolutions go one of the ROUTES."""
    way, joins = ROUTES[name]
    before, fuses = conv.route, triton_kernels.fuses_chain
    conv.route = way
    if not joins:
        triton_kernels.fuses_chain = lambda *args: False
    try:
        with slabs(False), bnfast.use_backend("triton"):
            yield
    finally:
        conv.route, triton_kernels.fuses_chain = before, fuses


def step(model: nn.Module, x: Tensor) -> None:
    """One training step's forward and backward with a random gradient."""
    y = model(x)
    y.backward(torch.randn_like(y))


def run_chain(
    blocks: list[Bottleneck], size: tuple[int, int, int], path: str = "full chain"
) -> list[Traffic]:
    """A chain of bottlenecks in the interpreter by one of the ROUTES, x [N, J, H, W]: every launch's arguments in order."""
    model = bnfast.convert(nn.Sequential(*blocks), inplace=True)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.to(DTYPE)
    batch, height, width = size
    x = torch.randn(batch, blocks[0].first[0].in_channels, height, width).to(DTYPE)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    with route(path), ledger() as found:
        step(model, x)
    return found


FORWARD = (
    "conv_fwd_reduce_kernel",
    "bn_fwd_reduce_kernel",
    "finalise_moments_kernel",
    "bn_fwd_apply_kernel",
)


def per_unit(found: list[Traffic]) -> dict[int, dict[str, float]]:
    """Unique bytes of a chain's launches by unit, in the order of its convolutions, "forward" and "backward". A unit is charged
    with its z, its y and its gradient wherever they are read, with what it reads as residual, and with its channel vectors;
    the chain's input and weights belong to none."""
    unit_of: dict[int, int] = {}  # address of a z or y -> unit
    sums: dict[int, dict[str, float]] = collections.defaultdict(
        lambda: {"forward": 0, "backward": 0}
    )
    units = 0
    last = None  # the unit whose partial results the finalising kernel that follows merges
    for entries in by_launch(found):
        kernel = entries[0].kernel
        at = {entry.argument: entry for entry in entries}
        owners: dict[str, int | None] = {}

        def unit(argument: str, at=at) -> int | None:
            return unit_of.get(at[argument].address) if argument in at else None

        if kernel == "conv_fwd_reduce_kernel":
            unit_of[at["z_ptr"].address] = last = units
            units += 1
            source = unit("x_ptr")
            owners = {n: source if n == "x_ptr" or n.startswith("norm") else last for n in at}
        elif kernel == "conv_dgrad_kernel":
            below = last = unit("below.z")
            for name in at:
                owners[name] = below
                if name == "dy_ptr" or name.startswith("above"):
                    owners[name] = unit("above.z")
                elif name.startswith("beside"):
                    owners[name] = unit("beside.z")
        elif "z_ptr" in at:
            owner = last = unit("z_ptr")
            owners = dict.fromkeys(at, owner)
            if "y_ptr" in at:
                unit_of[at["y_ptr"].address] = owner
            owners["residual_norm.mean"] = unit("residual_ptr")
        else:
            owners = dict.fromkeys(at, last)
        owners["w_ptr"] = None
        direction = "forward" if kernel in FORWARD else "backward"
        for name, entry in at.items():
            if owners[name] is not None:
                sums[owners[name]][direction] += entry.unique
    return sums


def by_launch(found: list[Traffic]) -> list[list[Traffic]]:
    launches: dict[int, list[Traffic]] = collections.defaultdict(list)
    for entry in found:
        launches[entry.launch].append(entry)
    return list(launches.values())


# ---- a whole network with the kernels left out ---------------------------------------------------------------------------


Shares = dict[tuple[str, tuple[int, ...], str], tuple[float, float]]


def shares(found: list[Traffic]) -> Shares:
    """What part of an argument a kernel loads and stores, by (kernel, variant, argument)."""
    sums: dict[tuple, list[int]] = collections.defaultdict(lambda: [0, 0, 0])
    for entry in found:
        one = sums[entry.kernel, entry.variant, entry.argument]
        for i, value in enumerate((entry.load, entry.store, entry.size)):
            one[i] += value
    return {key: (load / size, store / size) for key, (load, store, size) in sums.items()}


class _ConvolutionBytes(TorchDispatchMode):
    """Makes convolutions empty results, and counts what they read and write, weights left out; additions as well."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        aten = torch.ops.aten
        if function is aten.convolution.default:
            x, weight, _, stride, padding, dilation, transposed, extra, _ = args
            batch, _, *sizes = x.shape
            kernel = weight.shape[2:]
            geometry = zip(sizes, kernel, stride, padding, dilation, extra, strict=True)
            if transposed:
                sizes = [(n - 1) * s - 2 * p + d * (k - 1) + e + 1 for n, k, s, p, d, e in geometry]
            else:
                sizes = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d, _ in geometry]
            y = x.new_empty((batch, weight.shape[1 if transposed else 0], *sizes))
            y = y.contiguous(memory_format=torch.channels_last)
            self.bytes += x.nbytes + y.nbytes
            return y
        result = function(*args, **(kwargs or {}))
        is_sum = function in (aten.add.Tensor, aten.add_.Tensor) and result.dim() == 4
        if is_sum and result.is_floating_point():  # and none of pooling's indices
            self.bytes += 3 * result.nbytes
        return result


@contextlib.contextmanager
def left_out(known: Shares) -> Iterator[list[float]]:
    """Kernels launched inside do not run; the list gets the unique bytes that each would have moved, weights left out."""
    _require_interpreter()
    run = interpreter.GridExecutor.__call__
    moved: list[float] = []

    def recorded(self, *args, **kwargs):
        bytes_at: dict[int, tuple[float, float]] = {}
        for entry in _arguments(self, args, []):
            if entry.argument != "w_ptr":
                key = (entry.kernel, entry.variant, entry.argument)
                # A kernel size that was not measured reads whole tensors, as all do but strided 1x1.
                ways = known.get(key) or known[(entry.kernel, (3, 1), entry.argument)]
                before = bytes_at.get(entry.address, (0.0, 0.0))
                bytes_at[entry.address] = tuple(
                    max(old, way * entry.size) for old, way in zip(before, ways, strict=True)
                )
        moved.extend(load + store for load, store in bytes_at.values())

    interpreter.GridExecutor.__call__ = recorded
    try:
        yield moved
    finally:
        interpreter.GridExecutor.__call__ = run


def resnet50_bytes(path: str, known: Shares, batch: int = 32) -> float:
    """Bytes per image of the convolutions, BatchNorms, activations and additions of a training step of ResNet-50 at 224, pooling
    and classifier left out."""
    model = bnfast.convert(torchvision.models.resnet50(), inplace=True).to(DTYPE)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.float()
    x = torch.randn(batch, 3, 224, 224).to(DTYPE).contiguous(memory_format=torch.channels_last)
    with route(path), left_out(known) as moved, _ConvolutionBytes() as convolutions:
        step(model, x)
    return (sum(moved) + convolutions.bytes) / batch


# ---- the page -----------------------------------------------------------------------------------------------------------

# Bytes per image in MB, float16, the convolutions' own reads and writes included, from passes per element: eager PyTorch, what
# torch.compile's two-pass form moves, and the floor of each path. Bits are left out of all.
EAGER, COMPILED = 421.1, 314.0
FLOORS = {
    "two-pass": 314.0,
    "moments in the epilogue": 291.8,
    "full chain": 172.2,
    "full chain, ends without z": 147.0,
}


def units_table() -> tuple[list[str], list[Traffic]]:
    """Lines about units in the two-pass form, and what was counted for them in channels_last."""
    lines = ["| unit | layout | kernel | unique | in all |", "|---|---|---|---|---|"]
    elements = float(np.prod(SHAPE))
    sums: dict[str, dict[str, float]] = collections.defaultdict(dict)
    counted: list[Traffic] = []
    for memory_format in (torch.channels_last, torch.contiguous_format):
        name = "channels_last" if memory_format == torch.channels_last else "NCHW"
        for kind in KINDS:
            found = run_unit(kind, memory_format)
            if memory_format == torch.channels_last:
                counted += found
            for entries in by_launch(found):
                unique, total = (sum(getattr(e, n) for e in entries) for n in ("unique", "total"))
                lines.append(
                    f"| {kind.name} | {name} | {entries[0].kernel} | {unique / elements:.3f} | {total / elements:.3f} |"
                )
            sums[name][kind.name] = sum(entry.unique for entry in found) / elements
    lines += [
        "",
        "| bytes per element | floor | channels_last | NCHW | eager |",
        "|---|--:|--:|--:|--:|",
    ]
    for kind in KINDS:
        floor, eager = floor_bytes(kind) / elements, float(sum(kind.eager) * DTYPE.itemsize)
        values = (floor, sums["channels_last"][kind.name], sums["NCHW"][kind.name], eager)
        lines.append(f"| {kind.name} | " + " | ".join(f"{value:.2f}" for value in values) + " |")
    return lines, counted


def on_chip_table() -> list[str]:
    """Lines about units whose channels fit on chip."""
    lines = [
        "| unit | layout | kernels | unique | in all | floor |",
        "|---|---|---|--:|--:|--:|",
    ]
    elements = float(np.prod(ON_CHIP_SHAPE))
    for kind, memory_format in itertools.product(
        KINDS, (torch.channels_last, torch.contiguous_format)
    ):
        name = "channels_last" if memory_format == torch.channels_last else "NCHW"
        found = run_unit(kind, memory_format, on_chip=True)
        kernels = ", ".join(dict.fromkeys(entry.kernel for entry in found))
        unique, total = (sum(getattr(e, n) for e in found) / elements for n in ("unique", "total"))
        floor = floor_bytes(kind, on_chip=True) / elements
        lines.append(
            f"| {kind.name} | {name} | {kernels} | {unique:.3f} | {total:.3f} | {floor:.3f} |"
        )
    return lines


def chain_accesses(channels: int, size: tuple[int, int, int]) -> dict[str, tuple[float, float]]:
    """Unique accesses per element, forward and backward, of the units in the middle of a full chain of three bottlenecks, the
    first with a shortcut."""
    wide = 4 * channels
    blocks = [Bottleneck(2 * channels, channels, wide)]
    blocks += [Bottleneck(wide, channels, wide) for _ in range(2)]
    sums = per_unit(run_chain(blocks, size))
    pixels = np.prod(size) * DTYPE.itemsize
    # Convolutions in order: two inner ones, the shortcut, the end; then the middle block.
    places = {"inner": (5, channels), "end": (6, wide), "shortcut": (2, wide)}
    return {
        kind: tuple(sums[unit][way] / (pixels * width) for way in ("forward", "backward"))
        for kind, (unit, width) in places.items()
    }


def table() -> str:
    """The page in Markdown."""
    lines = [
        "# Global memory traffic of the Triton kernels",
        "",
        "Counted in the interpreter, float16, by `python -m bench.triton_traffic`. Unique: each address once per kernel and direction,",
        "what memory sees if everything read again hits the cache.",
        "",
        "## ResNet-50 at 224, MB per image",
        "",
        "A training step of the converted model with the kernels left out, times what the interpreter says about each kernel's",
        "arguments; the convolutions' own reads and writes included, weights, pooling and classifier not. The floors, eager and",
        "torch.compile are passes per element times elements; that of the moments in the epilogue takes units one by one, where a",
        "shortcut's y is neither written nor read: the unit that adds it normalises it.",
        "",
        "| path | unique | floor | | eager | torch.compile |",
        "|---|--:|--:|--:|--:|--:|",
    ]  # fmt: skip
    units, counted = units_table()
    wide = 256
    for path in ("full chain", "full chain, ends without z"):
        blocks = [Bottleneck(128, 64, wide, 2), Bottleneck(wide, 64, wide)]
        counted += run_chain(blocks, (1, 32, 32), path)
    known = shares(counted)
    for path in ROUTES:
        moved = resnet50_bytes(path, known) / 1e6
        lines.append(
            f"| {path} | {moved:.1f} | {FLOORS[path]:.1f} | {moved / FLOORS[path]:.3f}x | {EAGER:.1f} | {COMPILED:.1f} |"
        )
    size = (4, 32, 32)
    lines += [
        "",
        "## A full chain of bottlenecks, unique accesses per element",
        "",
        f"Units in the middle, {list(size)} pixels, 64 and 256 channels; what reads and writes their z, y and gradients, convolutions",
        "included, and what they read as residual.",
        "",
        "| unit | forward | floor | backward | floor |",
        "|---|--:|--:|--:|--:|",
    ]  # fmt: skip
    floors = {kind.name: kind.chain for kind in KINDS}
    for kind, (forward, backward) in chain_accesses(64, size).items():
        at_best = floors[kind]
        lines.append(f"| {kind} | {forward:.3f} | {at_best[0]} | {backward:.3f} | {at_best[1]} |")
    lines += [
        "",
        "## What the chain's kernels read again",
        "",
        f"Tiles of {conv_fwd.BLOCK_M} pixels, {conv_fwd.BLOCK_K} channels of the result and {conv_fwd.BLOCK_J} of the sum: each block of",
        "channels reads its pixels anew, each tap as well, each tile of pixels its weights.",
        "",
        "| kernel | kernel size, stride | argument | times its size, unique | in all |",
        "|---|---|---|--:|--:|",
    ]  # fmt: skip
    for (kernel, variant, argument), (unique, total) in read_again(counted).items():
        lines.append(
            f"| {kernel} | {variant[0]}, {variant[1]} | {argument} | {unique:.2f} | {total:.2f} |"
        )
    lines += [
        "",
        "## Units in the two-pass form, bytes per element",
        "",
        f"On {list(SHAPE)}; the BatchNorm side alone, convolutions' own reads and writes left out.",
        "",
        *units,
        "",
        "## Units whose channels fit on chip, bytes per element",
        "",
        f"On {list(ON_CHIP_SHAPE)}: one kernel each way, which reads each tensor once.",
        "",
        *on_chip_table(),
    ]
    return "\n".join(lines) + "\n"


def read_again(found: list[Traffic]) -> dict[tuple, tuple[float, float]]:
    """(unique, in all) over their sizes of the tensors that convolutions move."""
    sums: dict[tuple, list[int]] = collections.defaultdict(lambda: [0, 0, 0])
    for entry in found:
        if entry.variant and entry.argument in (
            "x_ptr",
            "w_ptr",
            "z_ptr",
            "dy_ptr",
            "dx_ptr",
            "above.z",
        ):
            one = sums[entry.kernel, entry.variant, entry.argument]
            for i, value in enumerate((entry.unique, entry.total, entry.size)):
                one[i] += value
    return {
        key: (unique / size, total / size) for key, (unique, total, size) in sorted(sums.items())
    }


def main(arguments: list[str] | None = None) -> int:
    """Prints the page, or writes it."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.triton_traffic", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--output", type=Path, help="file to write the page to")
    args = parser.parse_args(arguments)
    text = table()
    if args.output:
        args.output.write_text(text)
    else:
        print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
