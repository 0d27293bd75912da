"""What nvcc made of the CUDA kernels: registers, spills, shared memory, occupancy, and the widths of their accesses to memory.

python -m bench.cuda_table [--targets sm_80,sm_90] [--dtypes bf16] [--build] [--output FILE]

Read from the machine code inside the extension bnfast._C; --build compiles csrc/cuda anew for targets that it does not hold (needs
nvcc; minutes). No GPU is needed. Exit status 1 where a kernel spills, or where none of its accesses to tensors is 16 bytes wide.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bnfast import cuda, native

SOURCES = Path(__file__).resolve().parent.parent / "csrc" / "cuda"
TARGETS = ("sm_80", "sm_90", "sm_100")
THREADS = 256
# Threads, registers and bytes of shared memory of a multiprocessor, and its blocks at most.
MULTIPROCESSOR = {
    "sm_75": (1024, 65536, 64 * 1024, 16),
    "sm_80": (2048, 65536, 164 * 1024, 32),
    "sm_86": (1536, 65536, 100 * 1024, 16),
    "sm_89": (1536, 65536, 100 * 1024, 24),
    "sm_90": (2048, 65536, 228 * 1024, 32),
    "sm_100": (2048, 65536, 228 * 1024, 32),
    "sm_120": (1536, 65536, 100 * 1024, 24),
}
DTYPES = {"f32": "f", "f64": "d", "bf16": "BFloat16", "f16": "Half"}
SLOPES = {
    "bn_bwd_reduce": ("", "residual", "bits"),
    "bn_bwd_apply": ("", "residual", "bits"),
    "bn_fwd_apply": ("", "residual"),
    "bn_fwd_reduce": ("",),
    "bn_fwd_reduce_apply": ("", "residual"),
    "bn_bwd_reduce_apply": ("", "residual", "bits"),
}
# Kernels that need clusters of blocks: empty where there are none. Their shared memory is mostly dynamic: a block may take all.
WITH_CLUSTERS = ("bn_fwd_reduce_apply", "bn_bwd_reduce_apply")


@dataclasses.dataclass
class Row:
    """One kernel for one target."""

    kernel: str  # bn_fwd_apply
    dtype: str
    layout: str
    variant: str
    target: str
    registers: int
    spilled: int
    shared: int
    loads: collections.Counter[int]  # bytes of an access -> how many instructions
    stores: collections.Counter[int]

    @property
    def name(self) -> str:
        return " ".join(filter(None, (f"{self.kernel}_kernel", self.dtype, self.layout, self.variant)))  # fmt: skip

    @property
    def occupancy(self) -> float:
        """Threads that a multiprocessor holds at once, of those that it could."""
        threads, registers, shared, blocks = MULTIPROCESSOR[self.target]
        per_block = max(1, -(-self.registers // 8) * 8) * THREADS
        fit = min(threads // THREADS, registers // per_block, blocks)
        if self.shared:
            fit = min(fit, shared // (self.shared + 1024))  # 1 KiB of each block is the system's
        return fit * THREADS / threads


def _describe(symbol: str) -> tuple[str, str, str, str] | None:
    """(kernel, dtype, layout, variant) of a mangled name; None where it is no kernel of a phase."""
    found = re.search(r"(bn_(?:fwd|bwd)_(?:reduce_apply|reduce|apply))_kernelI(.*?)EEv", symbol)
    if not found:
        return None
    kernel, arguments = found.groups()
    dtype = next(
        name
        for name, code in DTYPES.items()
        if (arguments.startswith(code) if len(code) == 1 else code in arguments)
    )
    numbers = [int(n) for n in re.findall(r"L(?:b|NS\w*?E)(\d)", arguments)]
    layout = "channels_last" if numbers[0] else "NCHW"
    variant = SLOPES[kernel][numbers[1] if len(numbers) > 1 else 0]
    return kernel, dtype, layout, variant


def _run(*command: str | Path) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command[0]}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def _widths(code: str, instruction: str) -> collections.Counter[int]:
    counter: collections.Counter[int] = collections.Counter()
    for flags in re.findall(rf"\b{instruction}((?:\.\w+)*)", code):
        parts = flags.split(".")
        wide = next((int(p) for p in parts if p in ("64", "128", "256")), 0)
        small = next((int(p[1:]) for p in parts if re.fullmatch(r"[US](8|16)", p)), 0)
        counter[(wide or small or 32) // 8] += 1
    return counter


def rows_of(binary: Path, target: str) -> Iterator[Row]:
    """The kernels for `target` inside a cubin, an object or a library."""
    tool = cuda.find_tool("cuobjdump")
    if tool is None:
        raise RuntimeError("cuobjdump was not found (CUDA toolkit, or pip install triton)")
    select = [] if binary.suffix == ".cubin" else ["-arch", target]
    usage = _run(tool, *select, "-res-usage", binary)
    resources = {
        symbol: {key: int(value) for key, value in re.findall(r"(\w+)(?:\[0\])?:(\d+)", line)}
        for symbol, line in re.findall(r"Function (\S+?):\s*\n?\s*(REG:.*)", usage)
    }
    listing = _run(tool, *select, "-sass", binary)
    for part in re.split(r"\n\s*Function : ", listing)[1:]:
        symbol, _, code = part.partition("\n")
        described = _describe(symbol)
        if described is None or (described[0] in WITH_CLUSTERS and int(target[3:]) < 90):
            continue
        used = resources[symbol.strip()]
        loads, stores = _widths(code, "LDG"), _widths(code, "STG")
        yield Row(*described, target, used["REG"], used["STACK"] + used.get("LOCAL", 0), used["SHARED"], loads, stores)  # fmt: skip


def compiled(target: str) -> Iterator[Row]:
    """The kernels, compiled for `target` by nvcc."""
    nvcc = cuda.find_tool("nvcc")
    if nvcc is None:
        raise RuntimeError("nvcc was not found (CUDA toolkit)")
    with tempfile.TemporaryDirectory() as folder:
        for source in sorted(SOURCES.glob("*.cu")):
            binary = Path(folder) / f"{source.stem}.cubin"
            flags = [
                "-std=c++20",
                "-O3",
                "-fmad=false",
                "-prec-div=false",
                "-cubin",
                f"-arch={target}",
            ]
            _run(nvcc, *flags, source, "-o", binary)
            yield from rows_of(binary, target)


def problems(row: Row) -> list[str]:
    """What is wrong with a row."""
    found = []
    if row.spilled:
        found.append(f"{row.name} for {row.target} spills {row.spilled} bytes")
    if max(row.loads) < 16:
        found.append(f"{row.name} for {row.target}: widest load is {max(row.loads)} bytes")
    if "apply" in row.kernel and max(row.stores) < 16:
        found.append(f"{row.name} for {row.target}: widest store is {max(row.stores)} bytes")
    return found


def _list(counter: collections.Counter[int]) -> str:
    return " ".join(f"{width}Bx{n}" for width, n in sorted(counter.items(), reverse=True)) or "-"


def markdown(rows: list[Row]) -> str:
    """The table, one line per kernel and target."""
    lines = [
        "# The CUDA kernels as machine code",
        "",
        "By `python -m bench.cuda_table`, from what nvcc made of csrc/cuda: instructions by width, not accesses. Narrow ones belong to",
        "the parameters of a channel, to partial results, and to tails: slots that are partial, or tensors whose lines do not begin at a",
        "multiple of 16 bytes. bn_*_reduce_apply_kernel takes up to 200 KiB of dynamic shared memory too (occupancy without it). That whole slots move in one access is counted in the emulator (tests/test_cuda.py).",
        "",
        "| kernel | target | registers | spilled | shared | occupancy | global loads | global stores |",
        "|---|---|--:|--:|--:|--:|---|---|",
    ]
    lines += [
        f"| {r.name} | {r.target} | {r.registers} | {r.spilled} | {r.shared} | {r.occupancy:.0%} | {_list(r.loads)} | {_list(r.stores)} |"
        for r in rows
    ]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Prints the table; 1 if a row has a problem, 2 for a wrong option."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.cuda_table", description=__doc__.splitlines()[0]
    )
    inside = [name for name in (cuda.architectures_inside() or "").split(", ") if name in MULTIPROCESSOR]  # fmt: skip
    add = parser.add_argument
    add("--targets", help=f"of {', '.join(MULTIPROCESSOR)}; by default those in the extension, with --build {', '.join(TARGETS)}")  # fmt: skip
    add("--dtypes", default=",".join(DTYPES), help=f"of {', '.join(DTYPES)}")
    add("--build", action="store_true", help="compile for targets that the extension does not hold")
    add("--output", type=Path, help="also write the table to this file")
    options = parser.parse_args(arguments)
    default = list(TARGETS) if options.build else inside
    targets = options.targets.split(",") if options.targets else default
    dtypes = options.dtypes.split(",")
    for names, known, what in ((targets, MULTIPROCESSOR, "--targets"), (dtypes, DTYPES, "--dtypes")):  # fmt: skip
        unknown = [name for name in names if name not in known]
        if unknown:
            parser.error(f"{what}: {unknown[0]!r} is not one of {', '.join(known)}")
    absent = [target for target in targets if target not in inside]
    if not targets or (absent and not options.build):
        parser.error(f"the extension holds {', '.join(inside) or 'no CUDA kernels'}; --build compiles others")  # fmt: skip
    rows = []
    for target in targets:
        source = rows_of(Path(native._C.__file__), target) if target in inside else compiled(target)
        rows += [row for row in source if row.dtype in dtypes]
    order = list(SLOPES)
    rows.sort(key=lambda r: (dtypes.index(r.dtype), r.layout, order.index(r.kernel), r.variant, targets.index(r.target)))  # fmt: skip
    print(markdown(rows), end="")
    if options.output:
        options.output.write_text(markdown(rows))
    found = [text for row in rows for text in problems(row)]
    for text in found:
        print(text, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
