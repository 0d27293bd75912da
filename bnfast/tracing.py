"""Symbolic trace of one block, with everything recorded that the trace takes for granted.

A trace runs the block's Python once with stand-ins for tensors, so whatever else the code looks at is baked in: plain
attributes, the classes of children, default arguments, the type of an input. All of that comes back with the graph as
assumptions to be checked at each call. What cannot be checked makes the block untraceable, with the reason.
"""

import contextlib
import dis
import inspect
import itertools
import operator
import os
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .nn import Guard

_FX_FOLDER = os.path.dirname(fx.__file__)
_TORCH_FOLDER = os.path.dirname(torch.__file__)
_OWN_FOLDER = os.path.dirname(__file__)
# isinstance(value, nn.Parameter) goes through parameter.py; fx asks it of everything.
_ASKERS_FOR_THE_PROXY = (_FX_FOLDER, _OWN_FOLDER, inspect.getfile(nn.Parameter))
_INTERNAL = frozenset(nn.Module().__dict__) - {"training"} | {"_forward_hooks", "_is_replica"}
_SIMPLE = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)
# What a trace would run through without a mark in the graph: operations inside would lose it.
_MANAGERS = (
    (torch.no_grad, "__enter__"),
    (torch.enable_grad, "__enter__"),
    (torch.inference_mode, "__enter__"),
    (torch.set_grad_enabled, "__init__"),
    (torch.autocast, "__enter__"),
    (torch.autograd.graph.saved_tensors_hooks, "__enter__"),
)


class Untraceable(Exception):
    """Why a block has no trace."""


@dataclass
class Trace:
    """A block's graph and what it assumes."""

    graph: fx.Graph
    inputs: tuple[
        str, ...
    ]  # parameters of forward that are tensors (or lists); the others have their defaults
    list_inputs: frozenset[str]
    reads: dict[
        tuple[str, ...], dict[str, Any]
    ]  # path of a module -> its plain attributes that were read
    visited: set[
        tuple[str, ...]
    ]  # paths of the modules whose forward or children the trace went into


def trace(block: nn.Module, is_leaf: Callable[[nn.Module, str], bool]) -> list[Trace]:
    """The block's traces: one, or two where it asks whether an input is a tensor. Raises Untraceable.

    is_leaf(module, path) says which children stay calls. Nothing of the block is changed.
    """
    first = _trace_once(block, is_leaf, frozenset())
    if not first.asked:
        return [first.trace]
    traces = [first.trace]
    with contextlib.suppress(Untraceable):
        traces.append(_trace_once(block, is_leaf, frozenset(first.asked)).trace)
    return traces


@dataclass
class _Result:
    trace: Trace
    asked: set[str]


def _trace_once(block, is_leaf, list_inputs: frozenset[str]) -> _Result:
    tracer = _Tracer(block, is_leaf, list_inputs)
    states = _random_states()
    try:
        _refuse_type_questions(type(block).forward)
        with _watched(tracer), _NoTensorOps():
            graph = tracer.trace(block)
    except Untraceable:
        raise
    except Exception as error:
        words = " ".join(str(error).split()) or type(error).__name__
        raise Untraceable(words if len(words) <= 160 else words[:157] + "...") from error
    finally:
        drawn = _put_back(states)
        changed = tracer.put_back()
    if drawn:
        raise Untraceable("forward draws random numbers in Python")
    if changed:
        raise Untraceable(f"forward changes {changed}")
    for node in graph.nodes:
        if node.op == "get_attr" and node.target.startswith("_tensor_constant"):
            raise Untraceable("forward uses a tensor that is no parameter, buffer or input")
    inputs = tuple(node.name for node in graph.nodes if node.op == "placeholder")
    return _Result(
        Trace(graph, tracer.input_names, list_inputs, tracer.reads, tracer.visited)
        if len(inputs) == len(tracer.input_names)
        else _fail("forward has arguments that a trace does not see"),
        tracer.asked,
    )


def _random_states() -> list[tuple[Any, Any, Callable[[Any], None]]]:
    """The global random generators' states: what equality compares, the state, and the function that sets it."""
    torch_state = torch.get_rng_state()
    states = [
        (random.getstate(), random.getstate(), random.setstate),
        (torch_state.tolist(), torch_state, torch.set_rng_state),
    ]
    if "numpy" in sys.modules:
        numpy = sys.modules["numpy"].random
        state = numpy.get_state()
        states.append(((state[1].tobytes(), *state[2:]), state, numpy.set_state))
    return states


def _put_back(states: list[tuple[Any, Any, Callable[[Any], None]]]) -> bool:
    """Sets the generators back; whether one was used meanwhile."""
    now = _random_states()
    for _, state, set_back in states:
        set_back(state)
    return any(was != is_[0] for (was, _, _), is_ in zip(states, now, strict=False))


def _refuse_type_questions(forward: Callable[..., Any]) -> None:
    """Raises Untraceable where a forward asks for type(argument): the answer would be the stand-in's."""
    code = getattr(inspect.unwrap(forward), "__code__", None)
    if code is None or "type" not in code.co_names:
        return
    arguments = code.co_varnames[1 : code.co_argcount]
    for step, following in itertools.pairwise(dis.get_instructions(code)):
        if (
            step.opname == "LOAD_GLOBAL"
            and step.argval == "type"
            and following.opname.startswith("LOAD_FAST")
            and following.argval in arguments
        ):
            raise Untraceable(f"forward asks for type({following.argval})")


def _fail(reason: str):
    raise Untraceable(reason)


class _Proxy(fx.Proxy):
    """fx's stand-in with two corrections: `a += b` is traced as the in-place operation it is, and asking for the type of an
    input is answered by the trace's hypothesis about it."""

    def __iadd__(self, other):
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})

    def __imul__(self, other):
        return self.tracer.create_proxy("call_function", operator.imul, (self, other), {})

    def __isub__(self, other):
        return self.tracer.create_proxy("call_function", operator.isub, (self, other), {})

    def __itruediv__(self, other):
        return self.tracer.create_proxy("call_function", operator.itruediv, (self, other), {})

    @property
    def __class__(self):
        asker = sys._getframe(1).f_code.co_filename
        if asker.startswith(_ASKERS_FOR_THE_PROXY):
            return _Proxy
        if self.node.op == "placeholder":
            name = self.node.target
            if not asker.startswith(_TORCH_FOLDER):
                self.tracer.asked.add(name)
            return list if name in self.tracer.list_inputs else torch.Tensor
        if asker.startswith(_TORCH_FOLDER):
            return torch.Tensor
        raise Untraceable("forward asks for the type of an intermediate value")


class _Tracer(fx.Tracer):
    def __init__(self, block, is_leaf, list_inputs):
        super().__init__()
        self.block = block
        self.decide_leaf = is_leaf
        self.list_inputs = list_inputs
        self.asked: set[str] = set()
        self.reads: dict[tuple[str, ...], dict[str, Any]] = {}
        self.visited: set[tuple[str, ...]] = {()}
        self.input_names: tuple[str, ...] = ()
        self.paths = {}
        for name, module in block.named_modules():
            self.paths.setdefault(id(module), tuple(name.split(".")) if name else ())

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, module: nn.Module, path: str) -> bool:
        if id(module) not in self.paths:
            raise Untraceable("forward calls a module that is not among its children")
        leaf = self.decide_leaf(module, path)
        if not leaf:
            _refuse_type_questions(type(module).forward)
            self.visited.add(tuple(path.split(".")))
        return leaf

    def create_args_for_root(self, root_fn, is_module, concrete_args=None):
        """Stand-ins for the arguments without a simple default; the others keep it."""
        args = [self.root]
        names = []
        for parameter in list(inspect.signature(root_fn).parameters.values())[1:]:
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                continue
            if type(parameter.default) in _SIMPLE:
                if parameter.kind is not parameter.KEYWORD_ONLY:
                    args.append(parameter.default)
                continue
            if parameter.kind is parameter.KEYWORD_ONLY:
                raise Untraceable(f"forward has the keyword-only argument {parameter.name!r}")
            names.append(parameter.name)
            args.append(self.create_proxy("placeholder", parameter.name, (), {}))
        if not names:
            raise Untraceable("forward has no argument")
        self.input_names = tuple(names)
        return root_fn, args

    def create_arg(self, a):
        if isinstance(a, torch.Tensor) and not isinstance(a, nn.Parameter):
            known = any(a is buffer for buffer in self.root.buffers())
            if not known:
                raise Untraceable("forward uses a tensor that is no parameter, buffer or input")
        return super().create_arg(a)

    def record(self, module: nn.Module, name: str, value: Any) -> None:
        path = self.paths[id(module)]
        if not _is_checkable(value):
            raise Untraceable(f"forward reads {'.'.join((*path, name))}, a {type(value).__name__}")
        self.reads.setdefault(path, {}).setdefault(name, _snapshot(value))

    def put_back(self) -> str:
        """Undoes what the trace did to containers that it read; the name of one, or ""."""
        changed = ""
        for path, attributes in self.reads.items():
            module = self.root.get_submodule(".".join(path))
            for name, before in attributes.items():
                now = getattr(module, name, before)
                if isinstance(now, (list, dict, set)) and not _is_same(now, before):
                    changed = ".".join((*path, name))
                    now.clear()
                    (now.extend if isinstance(now, list) else now.update)(_snapshot(before))
        return changed


class _Absent:
    """Stands for an attribute that a module does not have; plans compare it with what getattr gives instead."""

    def __ne__(self, other: object) -> bool:
        return not isinstance(other, Guard)

    def __eq__(self, other: object) -> bool:
        return not self != other

    __hash__ = None


def _snapshot(value: Any) -> Any:
    """A copy of a checkable value that does not change with it."""
    if isinstance(value, dict):
        return {key: _snapshot(item) for key, item in value.items()}
    if type(value) in (list, tuple, set, frozenset):
        return type(value)(_snapshot(item) for item in value)
    return value


def _is_same(now: Any, before: Any) -> bool:
    try:
        return bool(now == before)
    except Exception:  # a stand-in is among the items
        return False


def _is_checkable(value: Any) -> bool:
    """Whether equality tells that a value is still what the trace saw."""
    if isinstance(value, _SIMPLE) or inspect.isroutine(value) or inspect.isclass(value):
        return True
    if isinstance(value, (tuple, list, set, frozenset)):
        return all(_is_checkable(item) for item in value)
    if isinstance(value, dict):
        return all(_is_checkable(item) for pair in value.items() for item in pair)
    return False


@contextlib.contextmanager
def _watched(tracer: _Tracer) -> Iterator[None]:
    """Records the plain attributes that the block's modules are asked for, and refuses assignments and questions about
    global state."""

    def is_watched(self, name):
        return (
            id(self) in tracer.paths
            and name not in _INTERNAL
            and not name.startswith("__")
            and name not in ("forward", "_replicate_for_data_parallel", "_bnfast_note")
        )

    def get(self, name):
        asker = sys._getframe(1).f_code.co_filename
        try:
            value = object.__getattribute__(self, name)
        except AttributeError:
            if is_watched(self, name) and not asker.startswith((_TORCH_FOLDER, _OWN_FOLDER)):
                held = self._parameters | self._buffers | self._modules
                if held.get(name, self) is None:
                    tracer.record(self, name, None)
                elif name not in held:
                    tracer.reads.setdefault(tracer.paths[id(self)], {})[name] = _Absent()
            raise
        if is_watched(self, name):
            if name in object.__getattribute__(self, "__dict__"):
                if not asker.startswith((_FX_FOLDER, _OWN_FOLDER)):
                    tracer.record(self, name, value)
            elif _is_class_constant(type(self), name, value) and not asker.startswith(
                (_TORCH_FOLDER, _OWN_FOLDER)
            ):
                tracer.record(self, name, value)
        return value

    plain_set = nn.Module.__setattr__

    def set_(self, name, value):
        if id(self) in tracer.paths:
            raise Untraceable(f"forward assigns self.{name}")
        plain_set(self, name, value)

    def refusing(name, plain):
        def ask(*args, **kwargs):
            if not sys._getframe(1).f_code.co_filename.startswith(_TORCH_FOLDER):
                raise Untraceable(f"forward asks {name}()")
            return plain(*args, **kwargs)

        return ask

    def refuse(manager, *args, **kwargs):
        raise Untraceable(f"forward uses torch's {type(manager).__name__}")

    questions = ("is_grad_enabled", "is_inference_mode_enabled", "is_autocast_enabled")
    plain = {name: getattr(torch, name) for name in questions}
    nn.Module.__getattribute__ = get
    nn.Module.__setattr__ = set_
    for name in questions:
        setattr(torch, name, refusing(f"torch.{name}", plain[name]))
    entries = [(manager, name, getattr(manager, name)) for manager, name in _MANAGERS]
    for manager, name, _ in entries:
        setattr(manager, name, refuse)
    try:
        yield
    finally:
        for manager, name, entry in entries:
            setattr(manager, name, entry)
        del nn.Module.__getattribute__
        nn.Module.__setattr__ = plain_set
        for name in questions:
            setattr(torch, name, plain[name])


def _is_class_constant(cls: type, name: str, value: Any) -> bool:
    """Whether an attribute that the object itself does not hold is a plain value on its class."""
    return (
        _is_checkable(value)
        and not inspect.isroutine(value)
        and not inspect.isclass(value)
        and not inspect.isdatadescriptor(inspect.getattr_static(cls, name, None))
    )


class _NoTensorOps(TorchDispatchMode):
    """Refuses computations on real tensors: their results would be baked into the trace."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        raise Untraceable(f"forward computes {func} on tensors that are no inputs")
