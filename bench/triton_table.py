"""Compiles every Triton kernel as it ships, for chips that need not be there, and prints what came out.

python -m bench.triton_table [--targets sm_90,gfx942] [--dtypes bf16] [--output FILE]

The launchers run as they are, on small tensors on the CPU; what they would launch is recorded and compiled. Columns:
registers, spilled bytes, shared memory, theoretical occupancy, and the widths in bytes of the accesses to global memory.
Exit status 1 where a kernel spills, where no access to a tensor of activations is 16 bytes wide although the sizes allow it,
where a convolution uses no matrix instruction, or where a mask comes from other operations than elsewhere.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"  # before the kernels are imported: they must be real ones
os.environ["BNFAST_TRITON_CONV"] = "gram"  # every way of a convolution

import torch
import triton
from bnfast.triton_kernels import launch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from bnfast import triton_kernels as kernels
from bnfast.reference import Above, Below, Beside, Norm, Source

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Warps, registers and bytes of shared memory of a multiprocessor.
MULTIPROCESSOR = {
    "sm_80": (64, 65536, 164 * 1024),
    "sm_90": (64, 65536, 228 * 1024),
    "sm_100": (64, 65536, 228 * 1024),
    "sm_120": (48, 65536, 100 * 1024),
    "gfx942": (32, 4 * 512 * 64, 64 * 1024),
}
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
NAMES = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.uint8: "u8",
    torch.int64: "i64",
}
MASK = "fsub fma fcmp"
LAYOUTS = {"channels_last": torch.channels_last, "NCHW": torch.contiguous_format}


@dataclasses.dataclass(frozen=True)
class Launch:
    """One kernel as a launcher would start it."""

    kernel: JITFunction
    variant: str
    signature: dict[str, object]
    constants: dict[tuple[int, ...], object]
    attributes: dict[tuple[int, ...], list]
    options: dict[str, int]

    @property
    def name(self) -> str:
        return f"{self.kernel.__name__} {self.variant}"


@dataclasses.dataclass
class Row:
    """What one compilation gave."""

    launch: Launch
    target: str
    registers: int
    spilled: int
    shared: int
    occupancy: float
    widths: dict[
        str, collections.Counter[int]
    ]  # "load" and "store" -> bytes of an access -> how often
    matrix: collections.Counter[str]  # matrix instructions
    masks: frozenset[str]  # what leads to comparisons of floats, from the subtraction on


def _argument_type(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return "*" + NAMES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i64" if abs(int(value)) >= 2**31 else "i32"


def _launch(kernel: JITFunction, variant: str, args: tuple, kwargs: dict) -> Launch:
    options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages") if name in kwargs}
    values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    constant = {p.name for p in kernel.params if p.is_constexpr}
    constants, signature, attributes = {}, {}, {}

    def describe(value: object, place: tuple[int, ...], is_constant: bool = False) -> object:
        if isinstance(value, tuple):
            fields = [describe(item, (*place, i)) for i, item in enumerate(value)]
            return type(value)(*fields)
        if is_constant or value is None:
            constants[place] = value
            return "constexpr"
        # As Triton does at a launch: 16 divides an allocation's address, and integers that it divides are marked.
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[place] = [["tt.divisibility", 16]]
        return _argument_type(value)

    for index, name in enumerate(kernel.arg_names):
        signature[name] = describe(values[name], (index,), name in constant)
    return Launch(kernel, variant, signature, constants, attributes, options)


def record(run: Callable[[], object], variant: str) -> Iterator[Launch]:
    """What `run` launches, without launching it."""
    found = []
    stock = JITFunction.run
    JITFunction.run = lambda self, *args, grid, warmup, **kwargs: found.append((self, args, kwargs))
    try:
        run()
    finally:
        JITFunction.run = stock
    for kernel, args, kwargs in found:
        yield _launch(kernel, variant, args, dict(kwargs))


def launches(dtype: str, lanes: int) -> list[Launch]:
    """Every kernel in `dtype`, in both layouts, with and without what changes its accesses; equal ones once. As launched where
    a warp has that many threads. An activation that needs more registers is tried in float32, whose tiles need the most."""
    launch.LANES = lanes
    found = []
    forms = [("channels_last", "relu", False)]
    if dtype == "bf16":
        forms.append(("channels_last", "relu", True))
    if dtype == "f32":
        forms.append(("channels_last", "silu", True))
    if dtype in TWO:
        forms.append(("NCHW", "relu", True))
    for layout, act, residual in forms:
        size = (32, 64, 32, 32)  # too many values for a program
        z, dy, r = (_dense(size, dtype, layout) for _ in range(3))
        mean, rstd, gamma, beta = torch.empty(4, size[1])
        buffers = (mean.clone(), rstd.clone(), torch.tensor(0))
        bits = residual and act == "relu"

        def step(
            z=z,
            dy=dy,
            r=r if residual else None,
            vectors=(gamma, beta),
            act=act,
            bits=bits,
            buffers=buffers,
        ):
            mean, rstd, _, packed = kernels.bn_fwd_reduce_apply(
                z, *buffers, 0.1, 1e-5, *vectors, r, act, 0.0, bits
            )
            kept = (None, packed) if bits else (r, None)
            kernels.bn_bwd_reduce_apply(dy, z, mean, rstd, *vectors, *kept, act, 0.0, bits)

        variant = f"{dtype} {layout} {act}{' residual' if residual else ''}"
        found += record(step, variant)
    found += _on_chip(dtype)
    for kernel, stride, names in CONVOLUTIONS:
        found += _convolutions(dtype, kernel, stride, names)
    if dtype in TWO:
        names = ("forward behind bn_fwd_apply", "backward between inner units")
        found += _convolutions(dtype, 3, 1, names, groups=64)
    found += _without_z(dtype)
    if dtype in TWO:
        z, r = (torch.empty(4, 64, 16, 16, dtype=DTYPES[dtype]) for _ in range(2))
        z, r = (t.contiguous(memory_format=torch.channels_last) for t in (z, r))
        norm = Norm(*torch.empty(4, 64))
        both = (z, norm, r, norm, "relu", 0.0, True)
        found += record(
            lambda: kernels.bn_fwd_apply_both(*both), f"{dtype} channels_last relu both normalised"
        )
    unique = {}
    for one in found:
        name = one.kernel.__name__
        # The kernels that finish a reduction differ in the number of splits and in what they do not write alone.
        key = (name,) if "finalise" in name else (name, str(one.signature), str(one.constants))
        unique.setdefault(key, one)
    return list(unique.values())


def _on_chip(dtype: str) -> list[Launch]:
    """Channels that fit on chip, as large as fit in each direction."""
    forms = [("channels_last", (8, 64, 8, 16), True)]
    if dtype in TWO:
        forms += [("channels_last", (8, 64, 8, 16), False), ("NCHW", (8, 64, 32, 32), True)]
    found = []
    for layout, size, residual in forms:
        twice, r = (_dense((2 * size[0], *size[1:]), dtype, layout) for _ in range(2))
        z, dy = (_dense(size, dtype, layout) for _ in range(2))
        mean, rstd, gamma, beta = torch.empty(4, size[1])
        buffers = (mean.clone(), rstd.clone(), torch.tensor(0))
        bits = torch.empty(z.numel() // 8, dtype=torch.uint8)
        forward = (twice, *buffers, 0.1, 1e-5, gamma, beta, r if residual else None)
        state = (dy, z, mean, rstd, gamma, beta, None, bits if residual else None)
        last = ("relu", 0.0, residual)

        def step(forward=forward, state=state, last=last, residual=residual):
            if residual:
                kernels.bn_fwd_reduce_apply(*forward, *last)
            kernels.bn_bwd_reduce_apply(*state, *last)

        found += record(step, f"{dtype} {layout} on chip relu{' residual' if residual else ''}")
    return found


def _dense(size: tuple[int, ...], dtype: str, layout: str) -> torch.Tensor:
    return torch.empty(size, dtype=DTYPES[dtype]).contiguous(memory_format=LAYOUTS[layout])


# Enough for variants of a kernel and for those without matrix instructions: nothing but the conversion of two bytes differs between the
# 16-bit types.
TWO = ("f32", "bf16")
# One of each kind is enough; (kernel size, stride, forms of `_convolutions`).
CONVOLUTIONS = (
    (1, 1, ("forward", "backward into an end")),
    (3, 2, ("forward behind bn_fwd_apply", "backward between inner units")),
)


def _convolutions(
    dtype: str, kernel: int, stride: int, forms: tuple[str, ...], groups: int = 1
) -> list[Launch]:
    def image(channels: int, side: int) -> torch.Tensor:
        t = torch.empty(4, channels, side, side, dtype=DTYPES[dtype])
        return t.contiguous(memory_format=torch.channels_last)

    out = 128 if groups == 1 else groups
    x, beside, z = image(64, 16), image(64, 16), image(out, 16 // stride)
    weight = torch.zeros(out, 64 // groups, kernel, kernel, dtype=DTYPES[dtype])
    geometry = ([stride] * 2, [kernel // 2] * 2, [1, 1], groups)
    v, w = torch.empty(64), torch.empty(out)
    stats = (None, None, None, 0.1, 1e-5)
    above, no_source = (Above(z, w, w, w, w, w, w), "relu", 0.0), (None, "identity", 0.0)
    bits = torch.empty(x.numel() // 8, dtype=torch.uint8)
    inner, end = Below(x, None, v, v, v, v), Below(x, bits, v, v, v, v)

    def dgrad(add, below, beside):
        kernels.bn_bwd_apply_conv_dgrad_reduce(
            z, *above, *no_source, weight, [16, 16], *geometry, add, below, "relu", 0.0, beside
        )

    runs = {
        "forward": lambda: kernels.conv_fwd_reduce(x, weight, None, *geometry, *stats),
        "forward behind bn_fwd_apply": lambda: kernels.bn_fwd_apply_conv_fwd_reduce(
            x, Norm(v, v, v, v), "relu", 0.0, weight, None, *geometry, *stats
        ),
        "backward between inner units": lambda: dgrad(None, inner, None),
        "backward into an end": lambda: dgrad(x, end, Beside(beside, v, v)),
    }
    found = []
    for form in forms:
        found += record(runs[form], f"{dtype} {kernel}x{kernel} stride {stride} {form}")
    return found


def _without_z(dtype: str) -> list[Launch]:
    """An expansion of a bottleneck by the statistics of its input, between an inner unit and a shortcut."""
    z, y, shortcut = (
        torch.empty(4, channels, 16, 16, dtype=DTYPES[dtype]).contiguous(
            memory_format=torch.channels_last
        )
        for channels in (64, 128, 128)
    )
    weight = torch.zeros(128, 64, 1, 1, dtype=DTYPES[dtype])
    v, w = torch.empty(64), torch.empty(128)
    before = (z, Norm(v, v, v, v), "relu", 0.0)
    stats = (w, w, None, 0.1, 1e-5)
    source = (Source(z, v, v, v, v, v), "relu", 0.0)
    bits = torch.empty(y.numel() // 8, dtype=torch.uint8)
    geometry = ([1, 1], [0, 0], [1, 1], 1)

    def step():
        kernels.bn_fwd_apply_gram_reduce(*before, weight, None, *stats)
        kernels.bn_fwd_apply_conv_fwd_apply(
            *before, weight, Norm(v, w, w, w), shortcut, Norm(w, w, w, w), "relu", 0.0, True
        )
        kernels.bn_bwd_mask(y, bits, "relu", 0.0)
        kernels.bn_fwd_apply_conv_bwd_reduce(y, *source, weight, w)
        kernels.bn_bwd_apply_conv_dgrad_reduce(
            y, Above(None, None, w, w, w, w, w), "identity", 0.0, *source, weight, [16, 16],
            *geometry, None, Below(z, None, v, v, v, v), "relu", 0.0, None,
        )  # fmt: skip

    return list(record(step, f"{dtype} 1x1 without z"))


def _tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _occupancy(target: str, registers: int, shared: int, warps: int) -> float:
    most, file, memory = MULTIPROCESSOR[target]
    lanes = TARGETS[target].warp_size
    per_warp = max(1, -(-registers // 8) * 8) * lanes
    by_registers = file // (per_warp * warps) if registers else most
    by_memory = memory // shared if shared else most
    return min(most, min(by_registers, by_memory) * warps) / most


def _nvidia(binary: bytes) -> tuple[int, int, dict, collections.Counter]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        usage, code = (
            subprocess.run(
                [_tool("cuobjdump"), flag, file.name], capture_output=True, text=True, check=True
            ).stdout
            for flag in ("-res-usage", "-sass")
        )
    registers = int(re.search(r"REG:(\d+)", usage).group(1))
    spilled = int(re.search(r"STACK:(\d+)", usage).group(1))
    widths = {"load": collections.Counter(), "store": collections.Counter()}
    for kind, flags in re.findall(r"\b(LDG|LDGSTS|STG)\.(\S+)", code):
        bits = re.search(r"\b(64|128|256)\b", flags.replace(".", " "))
        small = re.search(r"\b[US](8|16)\b", flags.replace(".", " "))
        width = int(bits.group(1)) // 8 if bits else int(small.group(1)) // 8 if small else 4
        widths["store" if kind == "STG" else "load"][width] += 1
    matrix = collections.Counter(re.findall(r"\b(?:[HDQ]MMA|[HQ]GMMA|UTC[HQ]MMA)\b", code))
    return registers, spilled, widths, matrix


def _amd(text: str) -> tuple[int, int, dict, collections.Counter]:
    def number(name: str) -> int:
        return int(re.search(rf"\.{name}:\s*(\d+)", text).group(1))

    widths = {"load": collections.Counter(), "store": collections.Counter()}
    bytes_of = {"dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16, "ubyte": 1, "byte": 1}
    bytes_of |= {"ushort": 2, "short": 2, "short_d16": 2, "short_d16_hi": 2}
    for kind, size in re.findall(r"\b(?:global|buffer)_(load|store)_(\w+)", text):
        widths[kind][bytes_of.get(size, 2)] += 1
    matrix = collections.Counter(re.findall(r"\bv_mfma(?=_)", text))
    return number("vgpr_count"), number("vgpr_spill_count"), widths, matrix


def compile_one(one: Launch, target: str) -> Row:
    """Compiles a launch for `target`, a name of TARGETS."""
    source = ASTSource(one.kernel, one.signature, one.constants, one.attributes)
    made = triton.compile(source, target=TARGETS[target], options=dict(one.options))
    if TARGETS[target].backend == "cuda":
        registers, spilled, widths, matrix = _nvidia(made.asm["cubin"])
    else:
        registers, spilled, widths, matrix = _amd(made.asm["amdgcn"])
    shared = made.metadata.shared
    occupancy = _occupancy(target, registers, shared, made.metadata.num_warps)
    masks = mask_sequences(made.asm["llir"])
    return Row(one, target, registers, spilled, shared, occupancy, widths, matrix, masks)


def mask_sequences(llir: str) -> frozenset[str]:
    """The operations from z - mean to each comparison of floats in a kernel's LLVM code, the last before machine code; an
    addition (of a residual) left out. They are to be the same in all kernels: then a mask is the forward's bit for bit."""
    definitions = {}
    for name, operation in re.findall(r"^\s*(%[\w.]+) = (.*)$", llir, re.MULTILINE):
        definitions[name] = operation
    found = set()
    for operation in definitions.values():
        compared = re.match(r"fcmp (?!uno|ord)\w+ .*?(%[\w.]+),", operation)
        if not compared:
            continue
        chain = ["fcmp"]
        name = compared.group(1)
        while chain[-1] not in ("fsub", "other"):
            step = definitions.get(name, "")
            if "@llvm.fma." in step:
                chain.append("fma")
            elif re.match(r"f(sub|add|mul|div)\b", step):
                chain.append(step[:4])
            elif not re.match(r"(insertelement|extractelement|shufflevector|bitcast)\b", step):
                chain.append("other")
            operands = re.findall(
                r"(?<!@)%[\w.]+", step.split("(", 1)[-1] if "call" in step else step
            )
            if operands:
                name = (
                    operands[1]
                    if step.startswith("insertelement") and len(operands) > 1
                    else operands[0]
                )
        if chain[-1] == "fsub":
            found.add(" ".join(op for op in reversed(chain) if op != "fadd"))
    return frozenset(found)


def problems(row: Row) -> list[str]:
    """What is wrong with a row: spills, and narrow accesses of the kernels that walk over activations."""
    found = []
    name = row.launch.kernel.__name__
    is_conv = name.startswith("conv") and "depthwise" not in name
    if is_conv and not row.matrix:
        found.append(f"{row.launch.name} for {row.target} uses no matrix instruction")
    recomputes = row.launch.kernel.__name__.startswith("bn_bwd") and row.launch.variant.endswith(
        "relu"
    )
    if recomputes and not row.masks:
        found.append(f"{row.launch.name} for {row.target} shows no mask")
    if row.masks - {MASK}:
        found.append(
            f"{row.launch.name} for {row.target} compares what {sorted(row.masks)} gives, not {MASK}"
        )
    if row.spilled:
        found.append(f"{row.launch.name} for {row.target} spills {row.spilled} bytes")
    if not any(part in row.launch.kernel.__name__ for part in ("finalise", "of_weights")):
        for kind, widths in row.widths.items():
            writes_channels_alone = kind == "store" and row.launch.kernel.__name__ in (
                "bn_fwd_reduce_kernel", "bn_bwd_reduce_kernel", "conv_bwd_reduce_kernel"
            )  # fmt: skip
            # AMD's matrix unit leaves four values side by side in a lane: 8 bytes of a 16-bit type.
            least = 8 if is_conv and kind == "store" and row.target.startswith("gfx") else 16
            if widths and max(widths) < least and not writes_channels_alone:
                found.append(
                    f"{row.launch.name} for {row.target}: widest {kind} is {max(widths)} bytes"
                )
    return found


def _widths(counter: collections.Counter[int]) -> str:
    return (
        " ".join(f"{width}Bx{times}" for width, times in sorted(counter.items(), reverse=True))
        or "-"
    )


def _matrix(counter: collections.Counter[str]) -> str:
    return " ".join(f"{name} x{times}" for name, times in sorted(counter.items())) or "-"


def markdown(rows: list[Row]) -> str:
    """The table, one line per kernel and target."""
    lines = [
        "| kernel | target | registers | spilled | shared | occupancy | global loads | global stores | matrix instructions | mask |",
        "|---|---|--:|--:|--:|--:|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row.launch.name} | {row.target} | {row.registers} | {row.spilled} | {row.shared} | {row.occupancy:.0%} | "
            f"{_widths(row.widths['load'])} | {_widths(row.widths['store'])} | {_matrix(row.matrix)} | {', '.join(sorted(row.masks)) or '-'} |"
        )
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Prints the table; 1 if a row has a problem, 2 for a wrong option."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.triton_table", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--targets", default=",".join(TARGETS), help=f"of {', '.join(TARGETS)}")
    parser.add_argument("--dtypes", default=",".join(DTYPES), help=f"of {', '.join(DTYPES)}")
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    options = parser.parse_args(arguments)
    targets, dtypes = options.targets.split(","), options.dtypes.split(",")
    for names, known, what in ((targets, TARGETS, "--targets"), (dtypes, DTYPES, "--dtypes")):
        unknown = [name for name in names if name not in known]
        if unknown:
            parser.error(f"{what}: {unknown[0]!r} is not one of {', '.join(known)}")
    rows = []
    for lanes in (32, 64):
        # Those that work on sums in float32 are the same for several dtypes.
        once = {
            (one.kernel.__name__, str(one.signature), str(one.constants)): one
            for dtype in reversed(dtypes)
            for one in launches(dtype, lanes)
        }
        rows += [
            compile_one(one, target)
            for one in once.values()
            for target in targets
            if TARGETS[target].warp_size == lanes
        ]
    print(markdown(rows), end="")
    if options.output:
        options.output.write_text(markdown(rows))
    found = [text for row in rows for text in problems(row)]
    for text in found:
        print(text, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
