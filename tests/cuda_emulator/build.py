"""Builds the CUDA kernels for the emulator, and loads them. What was built is kept by a hash of everything it was made of."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CUDA = ROOT / "csrc" / "cuda"
CACHE = Path(os.environ.get("BNFAST_EMULATOR_CACHE", ROOT / "build" / "cuda_emulator"))
# -ffp-contract=off as nvcc's -fmad=false; kernels are watched access by access, the rest is not.
FLAGS = ["-std=c++20", "-O1", "-g1", "-fPIC", "-ffp-contract=off", "-fvisibility=hidden"]
FLAGS += ["-Wall", "-Wno-unknown-pragmas", "-Wno-maybe-uninitialized", f"-I{HERE}"]
WATCHED = {"hooks": ["-fsanitize=thread"], "asan": ["-fsanitize=address"]}


def compiler() -> str | None:
    """The C++ compiler that there is: g++ before others, whose hooks are known to arrive."""
    wanted = os.environ.get("CXX", "").split()[:1]
    return next(filter(None, map(shutil.which, [*wanted, "g++", "c++"])), None)


def build(name: str, kernels: Sequence[Path], others: Sequence[Path] = (), flags: Sequence[str] = (), link: Sequence[str] = (),
          watch: str = "hooks") -> Path:  # fmt: skip
    """The shared library of `kernels`, whose accesses are watched, and `others`; watch is "hooks" or "asan"."""
    emulator = [HERE / "emulator.cpp", HERE / "fiber.cpp"]
    # AddressSanitizer has to see everything; the hooks may not see themselves.
    plain = WATCHED[watch] if watch == "asan" else []
    jobs = [(source, [*FLAGS, *WATCHED[watch], "-x", "c++"]) for source in kernels]
    jobs += [(source, [*FLAGS, *plain, "-I", str(CUDA), *flags]) for source in others]
    jobs += [(source, [*FLAGS, *plain]) for source in emulator]
    digest = hashlib.sha256(repr((compiler(), [f for _, f in jobs], link)).encode())
    for path in sorted(
        [*CUDA.glob("*"), *ROOT.glob("csrc/*.h"), *HERE.glob("*.*"), *kernels, *others]
    ):
        digest.update(path.read_bytes())
    folder = CACHE / f"{name}-{digest.hexdigest()[:16]}"
    library = folder / f"{name}.so"
    if library.exists():
        return library
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as work:

        def compile_one(job: tuple[int, tuple[Path, list[str]]]) -> str:
            number, (source, its_flags) = job
            target = f"{work}/{number}.o"
            _run([compiler(), *its_flags, "-c", str(source), "-o", target])
            return target

        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
            objects = list(pool.map(compile_one, enumerate(jobs)))
        sanitizer = ["-fsanitize=address"] if watch == "asan" else []
        made = Path(work) / library.name
        _run(
            [compiler(), "-shared", "-Wl,-Bsymbolic", *sanitizer, *objects, *link, "-o", str(made)]
        )
        folder.mkdir(exist_ok=True)
        made.rename(library)
    return library


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error" in line]
        raise RuntimeError("\n".join([" ".join(command), *errors[:20]]))


def phases_library(watch: str = "hooks") -> Path:
    """The BatchNorm phases with their operators, for tensors on the CPU."""
    import torch
    from torch.utils import cpp_extension

    flags = [f"-isystem{path}" for path in cpp_extension.include_paths()]
    flags.append(f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}")
    folder = Path(torch.__file__).parent / "lib"
    link = [f"-L{folder}", f"-Wl,-rpath,{folder}", "-lc10", "-ltorch", "-ltorch_cpu"]
    return build("phases", sorted(CUDA.glob("*.cu")), [CUDA / "bn.cpp"], flags, link, watch)


class Emulator:
    """The schedule and the ledger of a library that `build` made."""

    def __init__(self, library: Path):
        self.library = ctypes.CDLL(str(library), mode=os.RTLD_NOW | os.RTLD_LOCAL)
        self.library.cuda_emulator_ledger.restype = ctypes.c_char_p

    def seed(self, value: int) -> None:
        """Another order of blocks and threads for each value."""
        self.library.cuda_emulator_seed(ctypes.c_uint64(value))

    def only_ends(self, blocks: int) -> None:
        """Of each launch only so many blocks at either end of the grid run; 0: all."""
        self.library.cuda_emulator_only_ends(ctypes.c_int64(blocks))

    def clear_ledger(self) -> None:
        self.library.cuda_emulator_clear_ledger()

    def ledger(self) -> list[dict]:
        """All launches since it was cleared: kernel, blocks, and what it read and wrote, by tensor."""
        return json.loads(self.library.cuda_emulator_ledger())


@functools.cache
def emulator() -> Emulator:
    """The phases in the emulator; their operators are torch.ops.bnfast_emulated.*"""
    import torch

    from bnfast import native

    library = phases_library(os.environ.get("BNFAST_EMULATOR_WATCH", "hooks"))
    definitions = torch.library.Library("bnfast_emulated", "DEF")
    emulator.definitions = definitions  # for as long as the process
    for name in native.BN_PHASES:
        schema = str(getattr(torch.ops.bnfast, name).default._schema)
        definitions.define(schema.removeprefix("bnfast::"))
    torch.ops.load_library(str(library))
    return Emulator(library)


if __name__ == "__main__":
    print(phases_library(*sys.argv[1:]))
