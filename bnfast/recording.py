"""What a chain asks of the compiled backend, recorded and run again: between its operators there is no Python then.

Which operators a chain comes to follows from its description, and from the shapes and layouts of its tensors; to find out costs Python
as much as a small convolution, at each unit and in each step. So the second call of a kind is recorded as PyTorch's dispatcher sees
it, and those behind it run the same operators on the same values (csrc/recording.cpp): the same bits, and the same memory, as each
value is let go at its last use. A recording holds the transformed weights that it computes with, and belongs to one of these weights,
with which it goes. Where a tensor is not like the one it was recorded for, or a weight has changed, everything is decided anew.

BNFAST_RECORD=0 turns it off.
"""

import os
import weakref
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from . import weights

try:
    from ._C import Recording
except ImportError:  # then there is no backend to record
    Recording = None

# Read once.
is_active = Recording is not None and os.environ.get("BNFAST_RECORD", "") != "0"

_MOST_KINDS = 16  # of one weight's calls; the oldest goes
_MOST_ATTEMPTS = 4  # at a kind whose recordings do not last


class _Kind:
    """The calls of one owner and key: how far they have come."""

    __slots__ = ("attempts", "facts", "recording", "was_seen")

    def __init__(self) -> None:
        self.was_seen = False
        self.attempts = 0
        self.recording: Any = None
        self.facts: Any = None


def run(
    owner: Tensor,
    key: Hashable,
    inputs: list[Tensor | None],
    compute: Callable[[list[Tensor | None]], tuple[list[Tensor | None], Any]],
) -> tuple[list[Tensor | None], Any]:
    """compute(inputs), which takes the list over: its outputs, tensors made of the inputs by PyTorch's operators, and facts that hold no
    tensors and follow from key and the inputs' shapes, dtypes and layouts.

    owner is the weight with which the recording is forgotten. Not for calls that are captured.
    """
    kind = _kind(owner, key)
    if kind.recording is not None:
        outputs = kind.recording.run(inputs)
        if outputs is not None:
            return outputs, kind.facts
        kind.recording = None
    if not kind.was_seen or kind.attempts == _MOST_ATTEMPTS or not _can_record():
        kind.was_seen = True
        return compute(inputs)
    kind.attempts += 1
    recorder = _Recorder(inputs)
    with recorder:
        outputs, facts = compute(inputs)
    kind.recording, kind.facts = recorder.finished(outputs), facts
    return outputs, facts


def _kind(owner: Tensor, key: Hashable) -> _Kind:
    kinds = weights.attached(owner)
    kind = kinds.get(key)
    if kind is None:
        if len(kinds) == _MOST_KINDS:
            del kinds[next(iter(kinds))]
        kind = kinds[key] = _Kind()
    return kind


def _can_record() -> bool:
    """Whether nobody else looks at operators here."""
    return (
        torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._functorch.peek_interpreter_stack()
    )


class _Recorder(TorchDispatchMode):
    """Notes the operators that run inside of it, and where the tensors that they take come from."""

    def __init__(self, inputs: list[Tensor | None]) -> None:
        super().__init__()
        self.recording = Recording(inputs)
        self.is_whole = True  # else there was something that cannot be recorded
        # Tensors live as long as without the recorder; each goes from here as it dies.
        self.slots: dict[int, int] = {}
        self.alive: dict[int, weakref.ref] = {}
        self.weights: set[int] = set()
        self.count = len(inputs)
        for i, tensor in enumerate(inputs):
            if tensor is not None:
                self._place(tensor, i)

    def __enter__(self):
        weights.watch(self)
        return super().__enter__()

    def __exit__(self, *error):
        weights.watch(None)
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        if self.is_whole:
            self._note(func, args, kwargs or {}, results)
        return results

    def transformed(self, weight: Tensor, made: Tensor | None) -> None:
        """`weights.transformed` gives this form of the weight; None where it has to be made first."""
        at = self.slots.get(id(weight))
        if made is None or at is None or at >= self.count:
            self.is_whole = False
            return
        if at not in self.weights:
            self.weights.add(at)
            self.recording.depends_on(at, weight)
        if id(made) not in self.slots:
            self._place(made, self.recording.constant(made))

    def finished(self, outputs: list[Tensor | None]):
        """The recording, or None where it cannot be run again."""
        slots = [-1 if t is None else self.slots.get(id(t), -2) for t in outputs]
        if not self.is_whole or -2 in slots:
            return None
        self.recording.finish(slots)
        return self.recording

    def _note(self, func, args: tuple, kwargs: dict, results: Any) -> None:
        schema = func._schema
        values = list(args)
        for argument in schema.arguments[len(args) :]:
            values.append(kwargs.get(argument.name, argument.default_value))
        slots = []
        for value in values:
            slot = self.slots.get(id(value), -2) if isinstance(value, Tensor) else -1
            if slot == -2 or (
                isinstance(value, list | tuple) and any(isinstance(v, Tensor) for v in value)
            ):
                self.is_whole = False
                return
            slots.append(slot)
        results = results if isinstance(results, tuple) else (results,)
        if len(results) != len(schema.returns) or not all(
            r is None or isinstance(r, Tensor) for r in results
        ):
            self.is_whole = False
            return
        constants = [None if slot >= 0 else v for slot, v in zip(slots, values, strict=True)]
        try:
            made = self.recording.call(schema.name, schema.overload_name, constants, slots)
        except (RuntimeError, TypeError):  # an argument of a kind that C++ has no value for
            self.is_whole = False
            return
        for tensor, slot in zip(results, made, strict=True):
            # What an operator writes to and returns keeps its place.
            if tensor is not None and id(tensor) not in self.slots:
                self._place(tensor, slot)

    def _place(self, tensor: Tensor, slot: int) -> None:
        number = id(tensor)
        self.slots[number] = slot
        self.alive[number] = weakref.ref(tensor, lambda _: self._died(number))

    def _died(self, number: int) -> None:
        del self.slots[number], self.alive[number]
