"""Global memory traffic of the CUDA kernels, counted in the emulator, beside the floor: python -m bench.cuda_traffic

Per kernel, bytes in all (every access) and unique bytes (each address once per kernel and direction: what memory sees if everything
read again hits the cache). Needs a C++ compiler and no GPU; the kernels are those of csrc/cuda, compiled by it.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from cuda_emulator import build

from bench.floors import KINDS, Kind, resnet50_bytes
from bnfast import cuda

SHAPE = (8, 64, 32, 32)
ON_CHIP_SHAPE = (8, 256, 32, 32)  # on chip in both layouts
DTYPE = torch.bfloat16
LAYOUTS = {"channels_last": torch.channels_last, "NCHW": torch.contiguous_format}
# Accesses per element, forward and backward, of an inner unit and of the end of a block, as their sources have them
# (docs/cuda_comparison.md); bool masks are a byte, bits an eighth.
PEERS = {
    "eager PyTorch": ("5", "8", "8", "8"),
    "torch.compile (Inductor)": ("3", "4", "5 + a byte", "6 + a byte"),
    "cuDNN BN + add + ReLU, tensor on chip": ("2", "3 + bit", "3", "4 + bit"),
    "cuDNN BN + add + ReLU, larger": ("3", "4 + bit", "5", "6 + bit"),
    "apex groupbn (float16), tensor on chip": ("2", "3 + bit", "3", "4 + bit"),
    "apex groupbn (float16), larger": ("3", "4 + bit", "5", "6 + bit"),
    "bnfast, two passes": ("3", "4 + bit", "5", "6 + 2 bits"),
    "bnfast, on chip": ("2", "3 + bit", "3", "4 + 2 bits"),
}


@dataclasses.dataclass
class Traffic:
    """Bytes of one kernel's launches: in all, and at distinct addresses."""

    total: int = 0
    unique: int = 0


def traffic(ledger: list[dict]) -> dict[str, Traffic]:
    """By kernel, over all memory it touched."""
    found: dict[str, Traffic] = {}
    for launch in ledger:
        entry = found.setdefault(launch["kernel"], Traffic())
        for memory in launch["memory"]:
            entry.total += memory["read"] + memory["written"]
            entry.unique += memory["unique_read"] + memory["unique_written"]
    return found


def run_unit(
    kind: Kind, layout: torch.memory_format, shape: tuple[int, ...] = SHAPE, on_chip: bool = False
) -> tuple[list[dict], list[dict]]:
    """The ledgers of forward and backward of one unit's BatchNorm side: in two passes, or on_chip with each tensor read once (for a
    shape whose blocks fit)."""
    emulator = build.emulator()
    phases = cuda.phases(torch.ops.bnfast_emulated)
    z, dy, residual = (
        torch.randn(shape).to(DTYPE).contiguous(memory_format=layout) for _ in range(3)
    )
    gamma, beta = torch.rand(2, shape[1]) + 0.5
    statistics = (z, None, None, None, 0.1, 1e-5)
    output = (gamma, beta, residual if kind.residual else None, kind.act, 0.0, kind.residual)
    emulator.clear_ledger()
    if on_chip:
        mean, rstd, _, bits = phases.bn_fwd_reduce_apply(*statistics, *output)
    else:
        mean, _, rstd = phases.bn_fwd_reduce(*statistics)
        _, bits = phases.bn_fwd_apply(z, mean, rstd, *output)
    forward = emulator.ledger()
    emulator.clear_ledger()
    state = (dy, z, mean, rstd, gamma, beta, None, bits if kind.residual else None, kind.act)
    if not kind.has_dgrad:
        phases.bn_bwd_reduce(*state, 0.0)
    elif on_chip:
        phases.bn_bwd_reduce_apply(*state, 0.0, kind.residual)
    else:
        sums = phases.bn_bwd_reduce(*state, 0.0)
        phases.bn_bwd_apply(*state[:-1], *sums, kind.act, 0.0, kind.residual)
    return forward, emulator.ledger()


def floors(
    kind: Kind, shape: tuple[int, ...] = SHAPE, on_chip: bool = False
) -> tuple[float, float]:
    """Bytes forward and backward: whole tensors once per pass, and bits. On chip what is reduced is not read again: z forward, dy and
    z backward."""
    elements, bits = math.prod(shape), (1, 1 if on_chip else 2) if kind.residual else (0, 0)
    accesses = kind.two_pass
    if on_chip:
        accesses = accesses[0] - 1, accesses[1] - (2 if kind.has_dgrad else 0)
    forward, backward = (
        elements * (count * DTYPE.itemsize + of_bits / 8)
        for count, of_bits in zip(accesses, bits, strict=True)
    )
    return forward, backward


def table() -> str:
    """The tables in Markdown."""
    elements = math.prod(SHAPE)
    lines = [
        "# Global memory traffic of the CUDA kernels",
        "",
        f"Counted in the emulator (tests/cuda_emulator) on {list(SHAPE)}, bfloat16, by `python -m bench.cuda_traffic`: bytes per element,",
        "unique (each address once per kernel and direction) and in all (also what a block reads again, such as the parameters of its",
        "channels). The BatchNorm side alone: convolutions' own reads and writes are left out.",
        "",
        "| unit | layout | kernel | unique | in all |",
        "|---|---|---|--:|--:|",
    ]
    phase_lines = [
        "",
        "Per phase, unique, beside the floor of two passes (every tensor once per pass, a bit per element where a residual hides the mask):",
        "",
        "| unit | layout | forward | of the floor | backward | of the floor |",
        "|---|---|--:|--:|--:|--:|",
    ]
    sums: dict[str, dict[str, float]] = {}
    for layout, memory_format in LAYOUTS.items():
        for kind in KINDS:
            row = f"| {kind.name} | {layout} |"
            for part, floor in zip(run_unit(kind, memory_format), floors(kind), strict=True):
                found = traffic(part)
                lines += [
                    f"| {kind.name} | {layout} | {kernel} | {t.unique / elements:.3f} | {t.total / elements:.3f} |"
                    for kernel, t in found.items()
                ]
                unique = sum(t.unique for t in found.values())
                row += f" {unique / elements:.3f} | {unique / floor:.3f}x |"
                per_layout = sums.setdefault(layout, {})
                per_layout[kind.name] = per_layout.get(kind.name, 0.0) + unique / elements
            phase_lines.append(row)
    phase_lines += [
        "",
        "On devices with clusters of blocks (compute capability 9.0 on) and where the blocks of a channel fit, each tensor is read once;",
        f"on {list(ON_CHIP_SHAPE)}, beside the floor of that (a second read of bits is not at a new address):",
        "",
        "| unit | layout | forward | of the floor | backward | of the floor |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for layout, memory_format in LAYOUTS.items():
        for kind in KINDS:
            shape, row = ON_CHIP_SHAPE, f"| {kind.name} | {layout} |"
            parts = run_unit(kind, memory_format, shape, on_chip=True)
            for part, floor in zip(parts, floors(kind, shape, on_chip=True), strict=True):
                unique = sum(t.unique for t in traffic(part).values())
                row += f" {unique / math.prod(shape):.3f} | {unique / floor:.3f}x |"
            phase_lines.append(row)
    floor = {k.name: sum(floors(k)) / elements for k in KINDS}
    eager = {k.name: float(sum(k.eager) * DTYPE.itemsize) for k in KINDS}
    columns = (floor, sums["channels_last"], sums["NCHW"], eager)
    lines += [
        *phase_lines,
        "",
        "| | floor | channels_last | NCHW | eager PyTorch |",
        "|---|--:|--:|--:|--:|",
    ]
    for k in KINDS:
        values = " | ".join(f"{column[k.name]:.2f}" for column in columns)
        lines.append(f"| {k.name}, bytes per element | {values} |")
    whole = " | ".join(f"{resnet50_bytes(column) / 1e6:.1f}" for column in columns)
    lines += [
        f"| ResNet-50, MB per image | {whole} |",
        "",
        "Others, as their sources have them, in accesses to whole tensors (not counted here; docs/cuda_comparison.md):",
        "",
        "| | forward, inner | forward, end | backward, inner | backward, end |",
        "|---|---|---|---|---|",
    ]
    lines += [f"| {name} | {' | '.join(passes)} |" for name, passes in PEERS.items()]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Prints the table, or writes it."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.cuda_traffic", description=__doc__.splitlines()[0]
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
