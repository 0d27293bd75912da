"""Global memory traffic of the Triton kernels, counted in the interpreter, beside the floor: python -m bench.triton_traffic

Per kernel, bytes in all (every load and store of an element) and unique bytes (each address once per kernel and direction: what
memory sees if everything read again hits the cache). Shapes are multiples of the tiles. Writes a table; runs without a GPU.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")

import numpy as np
import torch
from triton.runtime import interpreter

from bench.floors import KINDS, Kind, resnet50_bytes
from bnfast import triton_kernels


@dataclasses.dataclass
class Traffic:
    """Bytes of one kernel's launches: in all, and at distinct addresses."""

    total: int = 0
    unique: int = 0


class _Counter:
    """Addresses that one launch loads from and stores to."""

    def __init__(self) -> None:
        self.total = 0
        self.places: dict[str, list[np.ndarray]] = {"load": [], "store": []}

    def saw(self, direction: str, pointers: interpreter.TensorHandle, mask: np.ndarray) -> None:
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        places = pointers.data[np.broadcast_to(mask, pointers.data.shape).astype(bool)]
        self.total += places.size * size
        # Addresses of a byte each, so that elements of several sizes add up.
        self.places[direction].append(
            (places[:, None] + np.arange(size, dtype=places.dtype)).ravel()
        )

    def unique(self) -> int:
        return sum(np.unique(np.concatenate(found)).size for found in self.places.values() if found)


@contextlib.contextmanager
def ledger() -> Iterator[dict[str, Traffic]]:
    """Counts what kernels launched inside move, by kernel name. RuntimeError outside of Triton's interpreter."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("TRITON_INTERPRET is not 1; traffic is counted in Triton's interpreter")
    found: dict[str, Traffic] = collections.defaultdict(Traffic)
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, run = builder.create_masked_load, builder.create_masked_store, executor.__call__
    current: list[_Counter] = []

    def counted_load(self, pointers, mask, *rest):
        current[-1].saw("load", pointers, mask.data)
        return load(self, pointers, mask, *rest)

    def counted_store(self, pointers, value, mask, *rest):
        current[-1].saw("store", pointers, mask.data)
        return store(self, pointers, value, mask, *rest)

    def counted_run(self, *args, **kwargs):
        current.append(_Counter())
        try:
            return run(self, *args, **kwargs)
        finally:
            counter, entry = current.pop(), found[self.fn.__name__]
            entry.total += counter.total
            entry.unique += counter.unique()

    builder.create_masked_load, builder.create_masked_store = counted_load, counted_store
    executor.__call__ = counted_run
    try:
        yield found
    finally:
        builder.create_masked_load, builder.create_masked_store = load, store
        executor.__call__ = run


SHAPE = (2, 128, 16, 32)  # multiples of all tiles
DTYPE = torch.float16


def run_unit(kind: Kind, layout: torch.memory_format) -> dict[str, Traffic]:
    """Forward and backward of one unit's BatchNorm side on z of SHAPE."""
    z, dy, residual = (
        torch.randn(SHAPE).to(DTYPE).contiguous(memory_format=layout) for _ in range(3)
    )
    gamma, beta = torch.rand(2, SHAPE[1]) + 0.5
    with ledger() as found:
        mean, rstd, _, bits = triton_kernels.bn_fwd_reduce_apply(
            z, None, None, None, 0.1, 1e-5, gamma, beta, residual if kind.residual else None,
            kind.act, 0.0, kind.residual,
        )  # fmt: skip
        state = (dy, z, mean, rstd, gamma, beta, None, bits if kind.residual else None, kind.act)
        if kind.has_dgrad:
            triton_kernels.bn_bwd_reduce_apply(*state, 0.0, kind.residual)
        else:
            triton_kernels.bn_bwd_reduce(*state, 0.0)
    return dict(found)


def run_convolution(kernel: int) -> tuple[dict[str, Traffic], int]:
    """Forward of a convolution to SHAPE with the moments in its epilogue, bn_fwd_apply and ReLU; and the bytes that the
    convolution moves in any case: x, weight and z, once."""
    out_channels = SHAPE[1]
    x = torch.randn(SHAPE[0], out_channels // 2, *SHAPE[2:]).to(DTYPE)
    x = x.contiguous(memory_format=torch.channels_last)
    weight = torch.randn(out_channels, x.shape[1], kernel, kernel).to(DTYPE)
    gamma, beta = torch.rand(2, out_channels) + 0.5
    geometry = ([1, 1], [kernel // 2] * 2, [1, 1], 1)
    before = os.environ.get("BNFAST_TRITON_CONV")
    os.environ["BNFAST_TRITON_CONV"] = "fused"
    try:
        with ledger() as found:
            z, *_ = triton_kernels.conv_fwd_reduce_apply(
                x, weight, None, *geometry, None, None, None, 0.1, 1e-5, gamma, beta, None, "relu", 0.0, False
            )  # fmt: skip
    finally:
        if before is None:
            del os.environ["BNFAST_TRITON_CONV"]
        else:
            os.environ["BNFAST_TRITON_CONV"] = before
    return dict(found), x.nbytes + weight.nbytes + z.nbytes


def floor_bytes(kind: Kind) -> float:
    """Bytes of the two-pass form for SHAPE: whole tensors, and bits."""
    return np.prod(SHAPE) * (sum(kind.two_pass) * DTYPE.itemsize + kind.bits / 8)


def table() -> str:
    """The table in Markdown."""
    lines = [
        "# Global memory traffic of the Triton kernels",
        "",
        f"Counted in the interpreter on {list(SHAPE)}, float16, by `python -m bench.triton_traffic`: bytes per element, unique (each",
        "address once per kernel and direction) and in all, beside the floor of the two-pass form and what eager PyTorch moves. The",
        "BatchNorm side alone: convolutions' own reads and writes are left out.",
        "",
        "| unit | layout | kernel | unique | in all |",
        "|---|---|---|---|---|",
    ]
    elements = float(np.prod(SHAPE))
    sums: dict[str, dict[str, float]] = {}
    for layout in (torch.channels_last, torch.contiguous_format):
        name = "channels_last" if layout == torch.channels_last else "NCHW"
        for kind in KINDS:
            found = run_unit(kind, layout)
            for kernel, traffic in found.items():
                lines.append(
                    f"| {kind.name} | {name} | {kernel} | {traffic.unique / elements:.3f} | {traffic.total / elements:.3f} |"
                )
            unique = sum(t.unique for t in found.values()) / elements
            total = sum(t.total for t in found.values()) / elements
            lines.append(f"| {kind.name} | {name} | **all** | **{unique:.3f}** | **{total:.3f}** |")
            sums.setdefault(name, {})[kind.name] = unique
    floor = {k.name: floor_bytes(k) / elements for k in KINDS}
    eager = {k.name: float(sum(k.eager) * DTYPE.itemsize) for k in KINDS}
    lines += ["", "| unit | floor | channels_last | NCHW | eager |", "|---|---|---|---|---|"]
    rows = [
        (k.name, *(d[k.name] for d in (floor, sums["channels_last"], sums["NCHW"], eager)))
        for k in KINDS
    ]
    lines += [
        f"| {name}, bytes per element | " + " | ".join(f"{v:.2f}" for v in values) + " |"
        for name, *values in rows
    ]
    whole = [resnet50_bytes(d) / 1e6 for d in (floor, sums["channels_last"], sums["NCHW"], eager)]
    lines.append("| ResNet-50, MB per image | " + " | ".join(f"{v:.1f}" for v in whole) + " |")
    lines += [
        "",
        "Forward of an inner unit with the moments in the convolution's epilogue, channels_last; floor: read z, write y.",
        "",
        "| convolution | kernel | unique | in all |",
        "|---|---|---|---|",
    ]
    for kernel in (1, 3):
        found, own = run_convolution(kernel)
        label = f"{kernel}x{kernel}, {SHAPE[1] // 2} to {SHAPE[1]} channels"
        for name, traffic in found.items():
            lines.append(
                f"| {label} | {name} | {traffic.unique / elements:.3f} | {traffic.total / elements:.3f} |"
            )
        side = (sum(t.unique for t in found.values()) - own) / elements
        floor_side = 2 * DTYPE.itemsize
        lines.append(
            f"| {label} | **without x, weight and z of the convolution** | **{side:.3f}** (floor {floor_side}) | |"
        )
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Prints the table, or writes it."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.triton_traffic", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--output", type=Path, help="file to write the table to")
    args = parser.parse_args(arguments)
    text = table()
    if args.output:
        args.output.write_text(text)
    else:
        print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
