"""Checkpoints of what BatchNorm-only training learns: gamma, beta and running statistics, in one
small safetensors file.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

_FORMAT_KEY = "bnfast.format"
_FORMAT = "affine/1"
_VERSION_KEY = "bnfast.version"
_ALSO_KEY = "bnfast.also"
_RESERVED = "bnfast."
_BATCHNORM_TENSORS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


class AffineFileError(ValueError):
    """A file that is no checkpoint of save_affine, or one that does not fit the model."""


def save_affine(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    also: Iterable[str] = (),
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes every BatchNorm's gamma, beta, running_mean, running_var and num_batches_tracked to a
    safetensors file.

    Tensors are stored under their state_dict keys with their own dtypes. also: further state_dict
    keys to store, such as those of a new output layer. metadata: strings to keep with them; keys
    that begin with "bnfast." are reserved. The file appears whole or not at all, and replaces one
    of the same name.

    Raises ValueError for a model without BatchNorm, an unknown key in `also` and metadata that is
    not str to str; OSError when the file cannot be written.
    """
    also = sorted(set(also))
    tensors = _affine_tensors(model, also)
    header = dict(metadata or {})
    for key, value in header.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise ValueError(f"metadata must map str to str, not {key!r} to {value!r}")
        if key.startswith(_RESERVED):
            raise ValueError(f"metadata keys must not begin with {_RESERVED!r}, as {key!r} does")
    header[_FORMAT_KEY] = _FORMAT
    header[_VERSION_KEY] = _version()
    header[_ALSO_KEY] = json.dumps(also)
    # Copies: safetensors refuses shared memory, which a BatchNorm used under two names has.
    copies = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
    write_atomically(path, safetensors.torch.save(copies, metadata=header))


def load_affine(model: nn.Module, path: str | os.PathLike[str]) -> dict[str, str]:
    """Writes the tensors of a :func:`save_affine` file into the model, in place, and returns the
    file's own metadata.

    Keys, shapes and dtypes of the whole file are compared with the model's first: either all
    tensors are written or none. Devices and memory formats stay the model's.

    Raises AffineFileError (a ValueError) for a file that is unreadable, foreign, of another format
    version, or does not fit the model; OSError (FileNotFoundError, ...) when it cannot be opened.
    """
    tensors, header = _read(path)
    try:
        also = json.loads(header.get(_ALSO_KEY, "[]"))
        if not isinstance(also, list) or not all(isinstance(key, str) for key in also):
            raise ValueError(f"its {_ALSO_KEY} is {also!r}, it must be a list of names")
        targets = _affine_tensors(model, also)
    except ValueError as error:
        raise AffineFileError(f"{os.fspath(path)!r} does not fit the model: {error}") from error
    problems = _misfits(tensors, targets)
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise AffineFileError(
            f"{os.fspath(path)!r} does not fit the model: {'; '.join(problems[:3])}{more}"
        )
    with torch.no_grad():
        for key, target in targets.items():
            target.copy_(tensors[key])
    return {key: value for key, value in header.items() if not key.startswith(_RESERVED)}


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The metadata that :func:`save_affine` was given for this file. Raises as :func:`load_affine`
    does.
    """
    header = _read(path)[1]
    return {key: value for key, value in header.items() if not key.startswith(_RESERVED)}


def _version() -> str:
    try:
        return importlib.metadata.version("bnfast")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _affine_tensors(model: nn.Module, also: Iterable[str]) -> dict[str, Tensor]:
    """State_dict key -> the model's own tensor, for all that a file of this model holds."""
    state = model.state_dict(keep_vars=True)
    keys = [
        f"{name}.{tensor}" if name else tensor
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, _BatchNorm)
        for tensor in _BATCHNORM_TENSORS
    ]
    # A BatchNorm without affine parameters or running statistics lacks some of its keys.
    tensors = {key: state[key] for key in keys if key in state}
    if not tensors:
        raise ValueError("the model has no BatchNorm with parameters or running statistics")
    for key in also:
        if key not in state:
            raise ValueError(f"the model has no tensor {key!r}")
        tensors[key] = state[key]
    return tensors


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    path = os.fspath(path)
    # safetensors reports some of the system's errors as its own, so let Python open the file first.
    with open(path, "rb"):
        pass
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = dict(file.metadata() or {})
            written = header.get(_FORMAT_KEY)
            if written != _FORMAT:
                found = "none" if written is None else repr(written)
                raise AffineFileError(
                    f"{path!r} is no file of save_affine that this version reads: its "
                    f"{_FORMAT_KEY} is {found}, it must be {_FORMAT!r}"
                )
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, header
    except safetensors.SafetensorError as error:
        raise AffineFileError(f"{path!r} is not a readable safetensors file: {error}") from error


def _misfits(tensors: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> list[str]:
    problems = [f"the file lacks {key!r}" for key in targets if key not in tensors]
    problems += [f"the model lacks {key!r}" for key in tensors if key not in targets]
    for key, target in targets.items():
        if key in tensors:
            tensor = tensors[key]
            if tensor.shape != target.shape:
                problems.append(
                    f"{key!r} is {list(tensor.shape)} in the file, "
                    f"{list(target.shape)} in the model"
                )
            elif tensor.dtype != target.dtype:
                problems.append(
                    f"{key!r} is {tensor.dtype} in the file, {target.dtype} in the model"
                )
    return problems


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes a file so that it appears whole or not at all, replacing one of the same name. Raises
    OSError.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        raise
