"""Which way a frozen convolution goes, where there are several: measured once by `tune`, read from a table thereafter.

Without a table, and for shapes that it does not know, the choice is by fixed rules (`winograd.serves`, `pointwise.serves`, `dot.serves`; cuDNN for
Triton). A table is a file, so a choice is the same in every run; it counts for the device, the number of threads and the versions of
bnfast and PyTorch that it was measured with. The environment variables that force a way (BNFAST_WINOGRAD, BNFAST_POINTWISE,
BNFAST_DOT, BNFAST_TRITON_CONV) come first.

    BNFAST_TUNING=/path/to/file.json    instead of bnfast/tuning.json in $XDG_CACHE_HOME (~/.cache)
    BNFAST_TUNING=0                     no table
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import os
import platform
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

FORMAT = 1
_LEAST_GAIN = (
    0.03  # what another way than the fixed rule's has to gain: less is within what timings vary by
)


class Shape(NamedTuple):
    """A convolution as a table knows it, forward and backward: [K, C / groups, *] of the weight, and the size of what it makes."""

    backend: str  # "cpu" or "triton"
    dtype: str  # of x
    weight: tuple[int, ...]
    stride: tuple[int, ...]
    output: tuple[int, ...]

    def __str__(self) -> str:
        k, c, *kernel = self.weight
        times = "x".join
        return (
            f"{self.backend} {self.dtype} {c} -> {k}, {times(map(str, kernel))} stride {times(map(str, self.stride))}, "
            f"{times(map(str, self.output))}"
        )


WAYS = {"cpu": ("winograd", "product", "dot", "direct"), "triton": ("cudnn", "fused")}


@dataclass
class Measured:
    """One row of a table."""

    shape: Shape
    way: str
    seconds: dict[str, float]  # of a unit's forward and backward pass, by way


class _State:
    """What choices depend on: the tables that were read, and what `tune` records or forces."""

    def __init__(self) -> None:
        self.tables: dict[tuple[str, int], dict[Shape, str]] | None = None
        self.seen: dict[Shape, tuple] | None = None  # while recording: what a unit is made of
        self.forced: str | None = None
        self.reads = 0  # of the tables


_state = _State()
# False where nothing was tuned and nothing is being tuned: then nobody asks. Set at the end of this file and by `tune`.
is_active = False


def path() -> Path | None:
    """Where the table is or would be; None where BNFAST_TUNING=0 asks for none."""
    given = os.environ.get("BNFAST_TUNING", "")
    if given == "0":
        return None
    if given:
        return Path(given)
    cache = os.environ.get("XDG_CACHE_HOME")
    if not cache:
        try:
            cache = Path.home() / ".cache"
        except RuntimeError:  # a user without a home
            return None
    return Path(cache) / "bnfast" / "tuning.json"


def _exists(file: Path | None) -> bool:
    """Also where nobody may look: os.path says no where pathlib raises."""
    return file is not None and os.path.isfile(file)


def choice(
    shape: Shape, ways: tuple[str, ...], x: Tensor, weight: Tensor, geometry: tuple
) -> str | None:
    """The way among `ways`, of which the first is the fixed rule's, that the table has for a convolution, or None. geometry: stride,
    padding, dilation, groups."""
    # What is asked for dz alone, of a strided 1x1 convolution, is not measured, but where both have as many channels.
    if _state.seen is not None and x.shape[1] == weight.shape[1] * geometry[3]:
        _state.seen.setdefault(shape, (ways, x.shape, x.device, x.dtype, weight, geometry))
    if _state.forced is not None:
        return _state.forced if _state.forced in ways else None
    if _state.tables is None:
        _state.tables = _read_all(path())
    table = _state.tables.get(_device_key(x.device))
    way = None if table is None else table.get(shape)
    return way if way in ways else None


def in_force() -> tuple | None:
    """What choices depend on beside a convolution; None while they are recorded or forced."""
    if _state.seen is not None or _state.forced is not None:
        return None
    return (_state.reads, torch.get_num_threads()) if is_active else ()


@functools.cache
def _name_of(device_type: str, index: int) -> str:
    if device_type == "cuda":
        return torch.cuda.get_device_name(index)
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                processor = line.split(":", 1)[1].strip()
                break
    return f"{processor}, {torch.backends.cpu.get_cpu_capability()}"


def _device_key(device: torch.device) -> tuple[str, int]:
    """Its name, and the number of threads where they matter."""
    if device.type == "cuda":
        return _name_of("cuda", device.index or 0), 0
    return _name_of("cpu", 0), torch.get_num_threads()


def _versions() -> dict[str, str]:
    import bnfast

    return {"bnfast": bnfast.__version__, "torch": torch.__version__}


def state() -> str:
    """In one line what is tuned here, for `bnfast doctor`."""
    file = path()
    if file is None:
        return "none: BNFAST_TUNING is 0, or there is no folder for it"
    if not _exists(file):
        return f"none at {file}: fixed rules choose (bnfast tune measures)"
    try:
        entries = _load(file)
    except ValueError as error:
        return f"not used: {error}"
    name, threads = _device_key(torch.device("cpu"))
    counts = [
        len(entry["rows"])
        for entry in entries
        if entry["versions"] == _versions()
        and entry["device"] in {name, *_gpu_names()}
        and entry["threads"] in (0, threads)
    ]
    return f"{sum(counts)} convolutions in {file}"


def _gpu_names() -> list[str]:
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def _read_all(file: Path | None) -> dict[tuple[str, int], dict[Shape, str]]:
    """The tables of a file that count here; with a warning and none where it cannot be read."""
    if not _exists(file):
        return {}
    try:
        found = _load(file)
    except ValueError as error:
        warnings.warn(f"the tuning table is not used: {error}", stacklevel=2)
        return {}
    return {
        (entry["device"], entry["threads"]): {
            _shape_of(row["shape"]): row["way"] for row in entry["rows"]
        }
        for entry in found
        if entry["versions"] == _versions()
    }


def _load(file: Path) -> list[dict]:
    """The entries of a table file, one per device, threads and versions. Raises ValueError for a file that is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{str(file)!r} cannot be read: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{str(file)!r} is no tuning table of format {FORMAT}")
    try:
        for entry in content["entries"]:
            str(entry["device"]), int(entry["threads"]), dict(entry["versions"])
            for row in entry["rows"]:
                shape = _shape_of(row["shape"])
                if row["way"] not in WAYS[shape.backend]:
                    raise ValueError(f"way {row['way']!r}")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{str(file)!r} is damaged: {error}") from error
    return content["entries"]


def _shape_of(plain: list) -> Shape:
    backend, dtype, *sizes = plain
    return Shape(backend, dtype, *(tuple(int(n) for n in part) for part in sizes))


def _write(file: Path, device: tuple[str, int], rows: list[Measured]) -> None:
    """Adds rows to the table of a device, in place of what it held for these shapes; the file is whole at any moment."""
    entries = _load(file) if _exists(file) else []
    name, threads = device
    head = {"device": name, "threads": threads, "versions": _versions()}
    new = {row.shape: {"shape": row.shape, "way": row.way, "seconds": row.seconds} for row in rows}
    for entry in entries:
        if {k: entry[k] for k in head} == head:
            kept = [row for row in entry["rows"] if _shape_of(row["shape"]) not in new]
            entry["rows"] = [*kept, *new.values()]
            break
    else:
        entries.append(head | {"rows": [*new.values()]})
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=file.name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as out:
            json.dump({"format": FORMAT, "entries": entries}, out, indent=1)
        os.chmod(temporary, 0o644)  # others may read it, as any file
        os.replace(temporary, file)
    except BaseException:
        os.unlink(temporary)
        raise


@contextlib.contextmanager
def _active(**values: object) -> Iterator[_State]:
    """Within it choices are recorded (seen) or forced."""
    global is_active
    before = is_active, _state.seen, _state.forced
    is_active, _state.seen, _state.forced = True, values.get("seen"), values.get("forced")
    try:
        yield _state
    finally:
        is_active, _state.seen, _state.forced = before


def tune(
    model: nn.Module,
    x: Tensor,
    *,
    autocast: torch.dtype | None = None,
    backend: str = "auto",
    rounds: int = 7,
    file: str | os.PathLike[str] | None = None,
    say: Callable[[str], None] | None = None,
) -> list[Measured]:
    """Measures every way of each convolution that a training step of `model` on x [N, C, H, W] meets, on x's device, and adds the
    fastest to the table, which later calls of this and other processes read.

    model: converted or not; it is copied and stays as it is. autocast: the dtype of torch.autocast, if the training has one. A unit
    (convolution, BatchNorm, ReLU, forward and backward) is timed each way in turns, `rounds` times after two warm-up calls, the
    minimum counts; a way other than the fixed rule's has to gain 3 %. A row counts for any batch size. file: instead of `path()`.
    say: gets a line per shape. Other threads of the process must not run chains meanwhile.

    Raises ValueError for x or rounds that make no sense, and for a file that is no table (which is then left as it is).
    """
    from . import conversion, dispatch

    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(
            f"x is {x.dtype} of shape {tuple(x.shape)}; images [N, C, H, W] are needed"
        )
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}; at least 1 is needed")
    target = path() if file is None else Path(file)
    if target is None:
        raise ValueError(
            "there is no table to write to (BNFAST_TUNING is 0, or the user has no home): name a file"
        )
    if _exists(target):
        _load(target)
    dispatch.check(backend)
    model = conversion.convert(copy.deepcopy(model), backend=backend).to(x.device).train()
    seen: dict[Shape, tuple] = {}
    with _active(seen=seen), _autocast(x.device, autocast):
        model(x).float().square().mean().backward()
    name = dispatch.pick(backend, x.device)
    rows = []
    for shape, made_of in seen.items():
        row = _measure(shape, made_of, name, rounds)
        rows.append(row)
        if say is not None:
            times = ", ".join(f"{way} {1e3 * s:.3f} ms" for way, s in row.seconds.items())
            say(f"{shape}: {row.way} ({times})")
    if rows:
        _write(target, _device_key(x.device), rows)
    if _exists(path()) and _exists(target) and os.path.samefile(target, path()):
        _refresh()
    return rows


def _autocast(device: torch.device, dtype: torch.dtype | None) -> contextlib.AbstractContextManager:
    if dtype is None:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)


def _measure(shape: Shape, made_of: tuple, backend: str, rounds: int) -> Measured:
    from .ops import Unit, frozen_conv_bn_act

    ways, size, device, dtype, weight, geometry = made_of
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size, generator=generator).to(device, dtype)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    gamma, beta = (torch.ones(shape.weight[0], device=device) for _ in range(2))
    unit = Unit(weight.detach(), None, *geometry, gamma=gamma, beta=beta, act="relu")
    dy = None

    def run(way: str | None) -> float:
        nonlocal dy
        with _active(forced=way):
            _wait(device)
            start = time.perf_counter()
            y = frozen_conv_bn_act(x, [unit], backend)
            if dy is None:
                dy = torch.randn_like(y)
            y.backward(dy)
            _wait(device)
            x.grad = None
            return time.perf_counter() - start

    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for way in ways:
        run(way), run(way)
    for _ in range(rounds):
        for way in ways:
            seconds[way].append(run(way))
    best = {way: min(times) for way, times in seconds.items()}
    usual, fastest = ways[0], min(best, key=best.get)
    gains = best[fastest] <= (1 - _LEAST_GAIN) * best[usual]
    return Measured(shape, fastest if gains else usual, best)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _refresh() -> None:
    """Reads the table anew when it is next asked for."""
    global is_active
    _state.tables = None
    _state.reads += 1
    is_active = _exists(path())


_refresh()
