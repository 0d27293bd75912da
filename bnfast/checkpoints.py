"""Checkpoints of a run in training: tensors and a state of plain values in one safetensors file each, the last two kept.

A file appears whole or not at all and is named by its step, so a process that dies at any moment leaves the last whole
one; a digest over all of it tells a file that was cut or edited.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from bnfast.affine import write_atomically

FOLDER = "checkpoints"
_KEPT = 2
_FORMAT = "training/1"
_NAME = re.compile(r"step-(\d{9})\.safetensors")


class CheckpointError(ValueError):
    """A checkpoint that was cut, edited, or written by something else."""


def save(run: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Path:
    """Writes the checkpoint of a step into the folder of a run, and removes those before the last two.

    state: plain values, as JSON keeps them (floats exactly). Raises OSError.
    """
    folder = run / FOLDER
    folder.mkdir(exist_ok=True)
    copies = {key: t.detach().cpu().contiguous().clone() for key, t in tensors.items()}
    text = json.dumps(state)
    header = {"bnfast.format": _FORMAT, "state": text, "digest": _digest(copies, text)}
    path = folder / f"step-{step:09d}.safetensors"
    write_atomically(path, safetensors.torch.save(copies, metadata=header))
    for old in _files(run)[:-_KEPT]:
        old.unlink()
    return path


def load(run: Path, use_previous: bool = False) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """(tensors, state) of the last checkpoint of a run, or None where there is none yet.

    use_previous: where the last one is damaged, take the one before. Raises CheckpointError for a damaged one, OSError.
    """
    files = _files(run)
    if not files:
        return None
    try:
        return _read(files[-1])
    except CheckpointError as error:
        if len(files) == 1:
            raise CheckpointError(
                f"{error}; there is none before it: --overwrite starts again"
            ) from error
        if not use_previous:
            raise CheckpointError(f"{error}; --use-previous goes on from the one before") from error
    return _read(files[-2])


def remove(run: Path) -> None:
    """Removes the checkpoints of a run, and what a process that died left half written."""
    folder = run / FOLDER
    if folder.is_dir():
        for path in [*_files(run), *folder.glob(".step-*.tmp")]:
            path.unlink()
        with contextlib.suppress(OSError):  # something of the user's is in it
            folder.rmdir()


def _files(run: Path) -> list[Path]:
    folder = run / FOLDER
    return sorted(p for p in folder.iterdir() if _NAME.fullmatch(p.name)) if folder.is_dir() else []


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = dict(file.metadata() or {})
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"checkpoint {str(path)!r} is cut or damaged: {error}") from error
    if header.get("bnfast.format") != _FORMAT:
        raise CheckpointError(f"{str(path)!r} is no checkpoint that this version reads")
    text = header.get("state", "")
    if header.get("digest") != _digest(tensors, text):
        raise CheckpointError(
            f"checkpoint {str(path)!r} is damaged or was edited: its digest differs"
        )
    return tensors, json.loads(text)


def _digest(tensors: Mapping[str, Tensor], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
