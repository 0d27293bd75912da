"""Transforms of frozen weights, computed once: the cache that only a package for frozen weights can have.

An entry belongs to one weight tensor and dies with it. It is rebuilt when the weight is another tensor, moved, cast,
restrided, changed in place (`_version`), or changed behind autograd's back (`weight.data`, numpy): a checksum over 1,024
to 4,096 evenly spaced elements, at least one of each filter where there are at most 2,048 of them, is compared at each use (on the
CPU). A change that misses every sampled element, or one behind autograd's back on a GPU, needs `clear_cache()`.
"""

import threading
import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

try:
    from . import _C
except ImportError:
    _C = None


@dataclass(slots=True)
class _Entry:
    weight: weakref.ref
    state: tuple
    forms: dict[Hashable, Tensor] = field(default_factory=dict)
    attached: dict[Hashable, Any] = field(default_factory=dict)


_entries: dict[int, _Entry] = {}


class _Watched(threading.local):
    """Who of this thread is told of each form that is asked for (`recording`)."""

    by: Any = None


_watched = _Watched()


def watch(by: Any) -> None:
    """From here on by.transformed(weight, form or None) is called for each form that this thread asks for; None ends it."""
    _watched.by = by


def transformed(weight: Tensor, form: Hashable, make: Callable[[Tensor], Tensor]) -> Tensor:
    """make(weight), computed once per form while the weight stays what it was. The result must not be written to."""
    state = _state(weight)
    entry = _entries.get(id(weight))
    if entry is None or entry.weight() is not weight or entry.state != state:
        entry = _begin(weight, state)
    made = entry.forms.get(form)
    if _watched.by is not None:
        _watched.by.transformed(weight, made)
    if made is None:
        made = entry.forms[form] = _made(weight, make)
    return made


def _made(weight: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
    # In the pool for its huge pages: large weights come from memory in every step, and of small pages each costs a walk.
    if _C is not None:
        _C.enter_pool()
    try:
        with torch.no_grad():
            return make(weight.detach())
    finally:
        if _C is not None:
            _C.leave_pool()


def attached(weight: Tensor) -> dict[Hashable, Any]:
    """What others keep with the forms of a weight: it is forgotten with them, at the latest when the next form is asked for."""
    entry = _entries.get(id(weight))
    if entry is None or entry.weight() is not weight:
        entry = _begin(weight, _state(weight))
    return entry.attached


def clear_cache() -> None:
    """Forgets all transformed weights, which are computed again when next needed, and gives the activation buffers that are
    kept for the next step back to the operating system."""
    _entries.clear()
    if _C is not None:
        _C.clear_pool()


def cache_bytes() -> int:
    """Bytes that the transformed weights take."""
    return sum(t.nbytes for entry in list(_entries.values()) for t in entry.forms.values())


def kept(weight: Tensor) -> dict[str, int]:
    """What is kept of a weight now: bytes by the kind of form, its name's first word."""
    entry = _entries.get(id(weight))
    found: dict[str, int] = {}
    if entry is None or entry.weight() is not weight:
        return found
    for form, made in entry.forms.items():
        name = (form if isinstance(form, str) else str(form[0])).split()[0]
        found[name] = found.get(name, 0) + made.nbytes
    return found


def _begin(weight: Tensor, state: tuple) -> _Entry:
    key = id(weight)
    entry = _Entry(weakref.ref(weight, lambda ref: _forget(key, ref)), state)
    _entries[key] = entry
    return entry


def _forget(key: int, ref: weakref.ref) -> None:
    entry = _entries.get(key)
    if entry is not None and entry.weight is ref:
        del _entries[key]


def _state(weight: Tensor) -> tuple:
    try:
        version = weight._version
    except RuntimeError:  # a tensor of inference mode has none
        version = None
    return (
        weight.data_ptr(),  # which tells devices apart too
        version,
        weight.dtype,
        weight.shape,
        weight.stride(),
        # On a GPU to look at elements would be to wait for it.
        _C.weight_checksum(weight) if _C is not None and weight.is_cpu else None,
    )
