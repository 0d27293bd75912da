"""Many runs from one file: models x configurations x seeds, or any other options; what is finished is skipped.

A sweep file is TOML: a table [options] for all runs, and any number of [[runs]], in each of which an option that is a list
stands for one run per value (several lists: all combinations).
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bnfast.loop import TrainingError
from bnfast.recipes import TrainConfig, from_plain
from bnfast.training import CONFIG, RESULT, train

_PLACED_BY_SWEEP = ("out", "overwrite", "resume", "progress")
# Options whose single value is a list.
_LISTS = ("milestones", "crop_scale", "crop_ratio")


@dataclass(frozen=True)
class Planned:
    """One run of a sweep: its name, which is its folder's, and its options."""

    name: str
    config: TrainConfig


def read(path: str | os.PathLike[str]) -> list[Planned]:
    """The runs of a sweep file, in its order. Raises ValueError for a file that makes no sense, OSError."""
    try:
        import tomllib
    except ImportError:  # Python 3.10
        try:
            import tomli as tomllib
        except ImportError as error:
            raise ValueError("sweeps need tomli on Python 3.10: pip install tomli") from error
    try:
        content = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{os.fspath(path)!r} is no TOML: {error}") from error
    unknown = set(content) - {"options", "runs"}
    if unknown or not content.get("runs"):
        raise ValueError(
            f"{os.fspath(path)!r} must hold [options] and [[runs]]"
            + (f", not {', '.join(sorted(unknown))}" if unknown else "")
        )
    planned: dict[str, Planned] = {}
    for entry in content["runs"]:
        lists = {k: v for k, v in entry.items() if isinstance(v, list) and k not in _LISTS}
        for values in itertools.product(*lists.values()):
            own = entry | dict(zip(lists, values, strict=True))
            options = content.get("options", {}) | own
            for name in _PLACED_BY_SWEEP:
                if name in options:
                    raise ValueError(f"{os.fspath(path)!r}: {name} is for the sweep to say")
            run = Planned(_name(options, own), from_plain(options))
            if run.name in planned:
                raise ValueError(f"{os.fspath(path)!r} names the run {run.name!r} twice")
            run.config.resolved()
            planned[run.name] = run
    return list(planned.values())


def _name(options: dict[str, Any], own: dict[str, Any]) -> str:
    default = TrainConfig()
    parts = [str(options.get(key, getattr(default, key))) for key in ("model", "config")]
    parts += [f"{k}={v}" for k, v in own.items() if k not in ("model", "config", "seed")]
    return (
        "-".join([*parts, f"seed{options.get('seed', default.seed)}"])
        .replace(":", ".")
        .replace("/", ".")
    )


def state(run: Planned, folder: Path) -> str:
    """ "finished", "begun" or "to do". Raises ValueError where the folder holds a run with other options."""
    place = folder / run.name
    for file, word in ((RESULT, "finished"), (CONFIG, "begun")):
        if (place / file).is_file():
            written = json.loads((place / file).read_text())
            written = written.get("options", written)
            for name, value in run.config.resolved().decides().items():
                if written.get(name) != value:
                    raise ValueError(
                        f"{str(place)!r} holds a run with {name} {written.get(name)}, not {value}: "
                        "choose another folder (--out) or remove it"
                    )
            return word
    return "to do"


def sweep(
    planned: list[Planned],
    folder: Path,
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> list[str]:
    """Runs what is not finished, one process each, in order, and returns the names of the runs that failed.

    A run that was interrupted goes on from its last checkpoint. Raises ValueError, before anything runs, where a folder
    holds a run with other options.
    """
    states = [state(run, folder) for run in planned]
    failed = []
    for number, (run, before) in enumerate(zip(planned, states, strict=True), start=1):
        head = f"[{number}/{len(planned)}] {run.name}:"
        if before != "finished":
            say(f"{head} {'goes on' if before == 'begun' else 'starts'}")
            start = time.perf_counter()
            config = replace(run.config, out=str(folder / run.name), resume=True, progress=progress)
            # A process of its own: its peak of memory is the run's, and a run that dies takes nothing with it.
            process = multiprocessing.get_context("spawn").Process(target=_run, args=(config,))
            process.start()
            process.join()
            if process.exitcode != 0:
                say(f"{head} failed with exit code {process.exitcode}")
                failed.append(run.name)
                continue
            before = f"{time.perf_counter() - start:.0f} s"
        result = json.loads((folder / run.name / RESULT).read_text())
        say(f"{head} {before}, test accuracy {result['test_accuracy']:.2%}")
    return failed


def _run(config: TrainConfig) -> None:
    try:
        train(config)
    except (ValueError, OSError, TrainingError) as error:
        sys.exit(f"bnfast: error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
