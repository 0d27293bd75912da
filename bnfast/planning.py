"""From a block's trace to its plan: units, chains of units, and the code that runs them.

A unit is found at its BatchNorm and grows both ways while each value on the way has one reader: a convolution in front, an
addition and an activation behind. Units of which one reads nothing but the other's output form a chain. A chain runs at
the place of its last operation, so it stops where something in between could write to what it reads.
"""

import functools
import math
import operator
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from .nn import (
    FROZEN_CLASSES,
    NORM_CLASSES,
    Guard,
    Options,
    Plan,
    PlannedForward,
    run_chain,
    unsupported_conv,
)
from .reference import SMOOTH_ACTS
from .tracing import Trace, Untraceable, trace

CONV_CLASSES = {*FROZEN_CLASSES, *FROZEN_CLASSES.values(), nn.Linear}
BN_CLASSES = {*NORM_CLASSES, *NORM_CLASSES.values()}

_ACT_MODULES = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.LeakyReLU: "leaky_relu",
    nn.SiLU: "silu",
    nn.Hardswish: "hardswish",
}
_ACT_FUNCTIONS = {
    F.relu: "relu",
    F.relu_: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    F.relu6: "relu6",
    F.leaky_relu: "leaky_relu",
    F.leaky_relu_: "leaky_relu",
    F.silu: "silu",
    F.hardswish: "hardswish",
}
_ACT_METHODS = {"relu": "relu", "relu_": "relu"}
_GATE_MODULES = {nn.Sigmoid: "sigmoid", nn.Hardsigmoid: "hardsigmoid"}
_GATE_FUNCTIONS = {torch.sigmoid: "sigmoid", F.sigmoid: "sigmoid", F.hardsigmoid: "hardsigmoid"}
_GATE_METHODS = {"sigmoid": "sigmoid"}
_MUL_TARGETS = {"call_function": (operator.mul, torch.mul), "call_method": ("mul",)}
_ADD_FUNCTIONS = {operator.add: False, operator.iadd: True, torch.add: False}
_ADD_METHODS = {"add": False, "add_": True}

# Operations that give the same values and, seen from outside, the same layout whether their input is NCHW or channels_last
# once the block's outputs are put back. Dropout is none: it draws its mask in the order of memory.
_LAYOUT_FREE_MODULES = (
    *_ACT_MODULES,
    nn.Identity,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d,
    nn.Sigmoid,
    nn.Hardsigmoid,
)
_LAYOUT_FREE_FUNCTIONS = {
    *_ACT_FUNCTIONS,
    *_ADD_FUNCTIONS,
    operator.mul,
    operator.imul,
    torch.mul,
    torch.cat,
    F.max_pool2d,
    torch.max_pool2d,
    F.avg_pool2d,
    F.adaptive_avg_pool2d,
    torch.sigmoid,
}
_LAYOUT_FREE_METHODS = {"relu", "relu_", "add", "add_", "mul", "mul_", "sigmoid"}

# Operations whose output shares no memory with their inputs.
_FRESH_FUNCTIONS = {
    operator.add,
    operator.mul,
    torch.add,
    torch.mul,
    torch.cat,
    torch.sigmoid,
    F.silu,
    F.hardswish,
    F.max_pool2d,
    F.avg_pool2d,
    F.adaptive_avg_pool2d,
}
_FRESH_METHODS = {"add", "mul", "mean", "sigmoid"}
_FRESH_MODULES = (
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d,
    nn.Sigmoid,
)


@dataclass
class FoundSqueeze:
    """Squeeze and excitation in front of a unit's convolution: product = value * gate(expand(act(reduce(pool(value)))))."""

    pool: fx.Node
    reduce: fx.Node
    act_node: fx.Node
    act: str
    expand: fx.Node
    gate_node: fx.Node
    gate: str
    product: fx.Node

    def nodes(self) -> list[fx.Node]:
        return [self.pool, self.reduce, self.act_node, self.expand, self.gate_node, self.product]


@dataclass
class FoundUnit:
    """A unit in a graph, with the nodes that it takes the place of."""

    bn: fx.Node
    act: str = "identity"
    slope: float = 0.01
    conv: fx.Node | None = None
    add: fx.Node | None = None
    adds_in_place: bool = False
    act_node: fx.Node | None = None
    squeeze: FoundSqueeze | None = None
    pool_node: fx.Node | None = None
    pool: tuple[tuple[int, int], ...] | None = None

    @property
    def first(self) -> fx.Node:
        return self.squeeze.pool if self.squeeze else self.conv or self.bn

    @property
    def input(self) -> fx.Node:
        return self.first.args[0]

    @property
    def entries(self) -> set[fx.Node]:
        """The nodes of the unit that read its input."""
        return {self.squeeze.pool, self.squeeze.product} if self.squeeze else {self.first}

    @property
    def last(self) -> fx.Node:
        return self.pool_node or self.act_node or self.add or self.bn

    @property
    def residual(self) -> fx.Node | None:
        # Read from the graph each time: other units' nodes are replaced while the plan is written.
        return None if self.add is None else next(n for n in self.add.args if n is not self.bn)

    def end_at_bn(self) -> None:
        """Gives up the addition, the activation and the pooling."""
        self.add = self.act_node = self.pool_node = self.pool = None
        self.act, self.slope, self.adds_in_place = "identity", 0.01, False

    def nodes(self) -> list[fx.Node]:
        own = (self.conv, self.bn, self.add, self.act_node, self.pool_node)
        own = [n for n in own if n is not None]
        return [*(self.squeeze.nodes() if self.squeeze else ()), *own]

    def describe(self) -> str:
        """For example "conv+bn+add+relu"."""
        parts = ["se"] if self.squeeze else []
        parts += ["conv"] if self.conv else []
        parts.append("bn")
        parts += ["add"] if self.add else []
        parts += [self.act] if self.act != "identity" else []
        parts += ["maxpool"] if self.pool else []
        return "+".join(parts)


@dataclass
class BlockPlans:
    """A block's plans, and what they say about each BatchNorm (by its path within the block)."""

    plans: tuple[Plan, ...] = ()
    fused: dict[str, str] = field(default_factory=dict)  # path of bn -> "conv+bn+relu"
    partners: dict[str, str] = field(
        default_factory=dict
    )  # path of conv or bn -> note for print(model)
    unfused_conv: dict[str, str] = field(
        default_factory=dict
    )  # path of bn -> why its producer is not in the unit
    left: dict[str, str] = field(default_factory=dict)  # path of bn -> why it is in no unit
    reason: str | None = None  # why there is no plan


def plans_of(
    block: nn.Module,
    options: Options,
    known: dict[tuple[str, int], bool] | None = None,
) -> BlockPlans:
    """Plans for all modes that the block's forward can be in; empty, with the reason, where it has no trace or no unit.

    known remembers, over the blocks of one model, which children are looked into from their parents, ("inlined", id), and
    which may write to their inputs, ("writes", id).
    """
    if is_patched(block):
        return BlockPlans(reason=f"{type(block).__name__}.forward is replaced on this object")
    if norm_act(block) is not None:
        return _norm_act_plan(block, options)
    known = {} if known is None else known
    for child in list(block.modules())[1:]:
        if ("inlined", id(child)) not in known:
            known["inlined", id(child)] = _is_inlined(child)

    apart: set[int] = set()  # blocks that are called more than once: each call runs their own plan

    def is_leaf(module: nn.Module, path: str) -> bool:
        if not module._modules or is_norm(module) or has_hooks(module) or id(module) in apart:
            return True
        return (
            type(module).forward is not nn.Sequential.forward and not known["inlined", id(module)]
        )

    found = BlockPlans()
    plans: list[Plan] = []
    for training in dict.fromkeys((block.training, True, False)):
        with _in_mode(block, training):
            try:
                traces = trace(block, is_leaf)
                while repeated := _called_again(block, traces, apart):
                    apart |= repeated
                    traces = trace(block, is_leaf)
            except Untraceable as error:
                name = type(block).__name__
                found.reason = found.reason or f"{name}.forward cannot be traced: {error}"
                continue
            for traced in traces:
                plan = _Builder(block, traced, options, found, known).plan()
                if plan is not None:
                    plans.append(plan)
        if not any("training" in names for t in traces for names in t.reads.values()):
            break
    found.plans = tuple(plans)
    return found


def _norm_act_plan(block: nn.Module, options: Options) -> BlockPlans:
    """The plan of a timm BatchNormAct2d on its own: itself as one unit."""
    act, slope = norm_act(block)

    def run(self, modules, x):
        return run_chain(
            x, options.backend, (None, self, act, slope, None, False, None, None, None, None)
        )

    children = tuple((name, type(child)) for name, child in block._modules.items())
    guards = [Guard((), type(block), children, (), False)]
    guards += [
        Guard((name,), type(child), None, _slope_of(child), True)
        for name, child in block._modules.items()
    ]
    name = "bn" if act == "identity" else f"bn+{act}"
    plan = Plan(run, f"run_chain: {name}", ("x",), frozenset(), tuple(guards))
    return BlockPlans((plan,), {"": name})


def _slope_of(module: nn.Module) -> tuple[tuple[str, float], ...]:
    slope = module.__dict__.get("negative_slope")
    return () if slope is None else (("negative_slope", slope),)


def is_patched(module: nn.Module) -> bool:
    """Whether someone gave this one object a forward of its own."""
    forward = module.__dict__.get("forward")
    return forward is not None and not isinstance(forward, PlannedForward)


def has_hooks(module: nn.Module) -> bool:
    """Whether anything hangs on the module's call."""
    return bool(
        is_patched(module)
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


class _in_mode:
    """Sets `training` throughout a block for the time of a trace, and puts each module's own value back."""

    def __init__(self, block: nn.Module, training: bool):
        self.modules = [(m, m.training) for m in block.modules()]
        self.training = training

    def __enter__(self):
        if self.training != self.modules[0][1]:
            for module, _ in self.modules:
                module.training = self.training

    def __exit__(self, *error):
        for module, training in self.modules:
            module.training = training


def _called_again(block: nn.Module, traces: list[Trace], apart: set[int]) -> set[int]:
    """The blocks, of those that traces went into, that hold a BatchNorm which is called more than once; by id."""
    found = set()
    for traced in traces:
        calls = Counter(node.target for node in traced.graph.nodes if node.op == "call_module")
        for target, count in calls.items():
            if count == 1 or not is_norm(block.get_submodule(target)):
                continue
            path = target.split(".")[:-1]
            while path and id(block.get_submodule(".".join(path))) in apart:
                path.pop()
            if path:
                found.add(id(block.get_submodule(".".join(path))))
    return found


def _is_inlined(module: nn.Module) -> bool:
    """Whether a block's forward traces, down to leaves: then it is looked into from its parent."""
    if not module._modules or is_norm(module) or module.__module__.startswith("torch.nn"):
        return False
    try:
        trace(module, lambda m, path: not m._modules or is_norm(m))
    except Untraceable:
        return False
    return True


def _may_write(module: nn.Module, known: dict[tuple[str, int], bool]) -> bool:
    """Whether calling the module may write to what it is given: what its trace says, yes where it has none."""
    if is_norm(module) or type(module).__name__ in ("StochasticDepth", "DropPath"):
        return False
    if type(module).__module__.startswith("torch.nn") and not module._modules:
        return getattr(module, "inplace", False) is True
    key = "writes", id(module)
    if key not in known:
        known[key] = has_hooks(module) or _trace_writes(module, known)
    return known[key]


def _trace_writes(module: nn.Module, known: dict[tuple[str, int], bool]) -> bool:
    for training in (True, False):
        with _in_mode(module, training):
            try:
                traces = trace(module, lambda m, path: not m._modules or is_norm(m) or has_hooks(m))
            except Untraceable:
                return True
        for traced in traces:
            builder = _Builder(module, traced, Options(), BlockPlans(), known)
            roots = builder.alias_roots()
            for node in traced.graph.nodes:
                if any(r.op == "placeholder" for n in builder.writes(node) for r in roots[n]):
                    return True
    return False


def is_norm(module: nn.Module) -> bool:
    """Whether it is a BatchNorm that units can hold: of an exact class of torch's, ours, or timm's with an activation."""
    return type(module) in BN_CLASSES or norm_act(module) is not None


def norm_act(module: nn.Module) -> tuple[str, float] | None:
    """(act, negative slope) of timm's BatchNormAct2d, recognised without importing timm; None for anything else."""
    cls = type(module)
    if cls.__name__ != "BatchNormAct2d" or cls.__module__ != "timm.layers.norm_act":
        return None
    if type(module.drop) is not nn.Identity:
        return None
    act = module.act
    if type(act) is nn.Identity:
        return "identity", 0.0
    name = _ACT_MODULES.get(type(act))
    return None if name is None else (name, getattr(act, "negative_slope", 0.0))


class _Builder:
    """Makes one plan from one trace."""

    def __init__(self, block, traced: Trace, options: Options, found: BlockPlans, known):
        self.block = block
        self.traced = traced
        self.graph = traced.graph
        self.options = options
        self.found = found
        self.known = known
        self.called: set[tuple[str, ...]] = set()  # modules that the plan runs without calling them
        self.reads = traced.reads

    def plan(self) -> Plan | None:
        self._remove_transparent()
        self.order = {node: i for i, node in enumerate(self.graph.nodes)}
        self.roots = self.alias_roots()
        units = [unit for node in self.graph.nodes if (unit := self._unit_at(node)) is not None]
        units = self._disjoint(units)
        if not units:
            return None
        chains = self._chains(units)
        for unit in units:
            self._note(unit)
        convs = [unit.conv.target for unit in units if unit.conv is not None]
        written = self._written(units)
        run_nodes = [self._replace(chain) for chain in chains]
        if self.options.channels_last and written is not None:
            self._keep_layout(run_nodes, convs, written)
        self.graph.lint()
        return self._compile()

    # -- looking at nodes

    def _module(self, node: Any) -> nn.Module | None:
        if not isinstance(node, fx.Node) or node.op != "call_module":
            return None
        return self.block.get_submodule(node.target)

    def _remove_transparent(self) -> None:
        """Takes Identity and dropout with probability 0 out of the graph."""
        for node in list(self.graph.nodes):
            module = self._module(node)
            if module is None or len(node.args) != 1 or node.kwargs or has_hooks(module):
                continue
            names = {
                "Dropout": "p",
                "Dropout2d": "p",
                "StochasticDepth": "p",
                "DropPath": "drop_prob",
            }
            attribute = names.get(type(module).__name__)
            path = tuple(node.target.split("."))
            if attribute is not None:
                probability = getattr(module, attribute, 1)
                if probability not in (0, None):
                    continue
                self.reads.setdefault(path, {})[attribute] = probability
            elif type(module) is not nn.Identity:
                continue
            copies = attribute == "p" and type(module).__name__.startswith("Dropout")
            if copies and any(node in self.writes(n) for n in node.users):
                continue  # in training mode the input stays as it is
            self.called.add(path)
            node.replace_all_uses_with(node.args[0])
            self.graph.erase_node(node)

    def _act_of(self, node: fx.Node) -> tuple[str, float] | None:
        """(act, slope) if the node is an activation that units know, applied to its first argument."""
        module = self._module(node)
        if module is not None:
            name = _ACT_MODULES.get(type(module))
            if name is None or len(node.args) != 1 or node.kwargs or has_hooks(module):
                return None
            if name == "leaky_relu":
                path = tuple(node.target.split("."))
                self.reads.setdefault(path, {})["negative_slope"] = module.negative_slope
                return name, module.negative_slope
            return name, 0.01
        table = {"call_function": _ACT_FUNCTIONS, "call_method": _ACT_METHODS}.get(node.op, {})
        name = table.get(node.target)
        if name is None:
            return None
        slope = 0.01
        if name == "leaky_relu":
            slope = node.args[1] if len(node.args) > 1 else node.kwargs.get("negative_slope", 0.01)
            if not isinstance(slope, (int, float)):
                return None
        return name, slope

    def _pool_of(self, node: fx.Node) -> tuple[tuple[int, int], ...] | None:
        """(kernel, stride, padding) as pairs if the node is a max-pooling that units know."""
        names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
        module = self._module(node)
        if module is not None:
            if (
                type(module) is not nn.MaxPool2d
                or has_hooks(module)
                or len(node.args) != 1
                or node.kwargs
            ):
                return None
            values = {name: getattr(module, name) for name in names}
            self.reads.setdefault(tuple(node.target.split(".")), {}).update(values)
        elif node.op == "call_function" and node.target is F.max_pool2d and node.args:
            values = {
                "stride": None,
                "padding": 0,
                "dilation": 1,
                "ceil_mode": False,
                "return_indices": False,
            }
            values |= dict(zip(names, node.args[1:], strict=False)) | dict(node.kwargs)
        else:
            return None
        values["stride"] = values["stride"] or values.get("kernel_size")
        pairs = []
        for name in names[:4]:
            value = values.get(name)
            pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
            if len(pair) != 2 or not all(isinstance(n, int) for n in pair):
                return None  # a size of the trace, for example
            pairs.append(pair)
        kernel, stride, padding, dilation = pairs
        if values["ceil_mode"] or values["return_indices"] or dilation != (1, 1):
            return None
        return (kernel, stride, padding) if math.prod(kernel) <= 256 else None

    def _add_of(self, node: fx.Node, value: fx.Node) -> tuple[fx.Node, bool] | None:
        """(other operand, in place) if the node adds value and another node, without writing to the other one."""
        table = {"call_function": _ADD_FUNCTIONS, "call_method": _ADD_METHODS}.get(node.op, {})
        if node.target not in table or node.kwargs or len(node.args) != 2:
            return None
        in_place = table[node.target]
        left, right = node.args
        if not (isinstance(left, fx.Node) and isinstance(right, fx.Node)) or left is right:
            return None
        if left is value:
            return right, in_place
        return None if in_place else (left, False)

    def _unit_at(self, node: fx.Node) -> FoundUnit | None:
        """The unit of a BatchNorm's node."""
        bn = self._module(node)
        if bn is None or not is_norm(bn) or len(node.args) != 1 or node.kwargs:
            return None
        source = node.args[0]
        if not isinstance(source, fx.Node):
            return None
        if sum(n.target == node.target for n in self.graph.nodes if n.op == "call_module") > 1:
            self.found.left[node.target] = "it is called more than once in its block"
            return None
        if has_hooks(bn):
            self.found.left[node.target] = "it has hooks"
            return None
        unit = FoundUnit(node)
        why = self._why_no_conv(source)
        if why is None:
            unit.conv = source
        elif why:
            self.found.unfused_conv[node.target] = why
        own_act = norm_act(bn)
        reader = _only_reader(node)
        if own_act is not None:
            unit.act, unit.slope = own_act
            if "act" in bn._modules:
                path = (*node.target.split("."), "act")
                self.reads.setdefault(path, {}).update(_slope_of(bn.act))
        elif reader is not None and (act := self._act_of(reader)):
            unit.act_node, (unit.act, unit.slope) = reader, act
        elif reader is not None and (add := self._add_of(reader, node)):
            unit.add, unit.adds_in_place = reader, add[1]
            after = _only_reader(reader)
            if after is not None and (act := self._act_of(after)):
                unit.act_node, (unit.act, unit.slope) = after, act
        pooled = _only_reader(unit.last)
        # Of a value with other dimensions max_pool2d makes something else.
        has_planes = isinstance(bn, nn.BatchNorm2d)
        if has_planes and pooled is not None and (pool := self._pool_of(pooled)):
            unit.pool_node, unit.pool = pooled, pool
        # A later end, and then the convolution, are given up where something in between could write to what the unit reads.
        if unit.last is not node and (self._is_disturbed([unit]) or self._loses_residual(unit)):
            unit.end_at_bn()
        if unit.conv is not None and self._is_disturbed([unit]):
            unit.conv = None
            self.found.unfused_conv[node.target] = (
                "something in between may write to the convolution's input"
            )
        if unit.conv is not None:
            unit.squeeze = self._squeeze_at(unit.conv.args[0], unit.conv)
            if unit.squeeze is not None and self._is_disturbed([unit]):
                unit.squeeze = None
        return unit

    def _squeeze_at(self, product: fx.Node, conv: fx.Node) -> FoundSqueeze | None:
        """The squeeze and excitation that ends in `product`, which only conv reads."""
        if (
            product.target not in _MUL_TARGETS.get(product.op, ())
            or _only_reader(product) is not conv
        ):
            return None
        if product.kwargs or len(product.args) != 2:
            return None
        for value, gate_node in (product.args, product.args[::-1]):
            gate = self._gate_of(gate_node)
            if gate is None or not isinstance(value, fx.Node):
                continue
            back = [gate_node]  # from the gate to the pooling, each read by the next alone
            for _ in range(4):
                source = back[-1].args[0] if back[-1].args else None
                if not isinstance(source, fx.Node) or _only_reader(source) is not back[-1]:
                    break
                back.append(source)
            if len(back) != 5 or _only_reader(gate_node) is not product:
                continue
            gate_node, expand, act_node, reduce, pool = back
            act = self._act_of(act_node)
            if act is None or act[0] == "leaky_relu" or pool.args[0] is not value:
                continue
            if self._is_pointwise(reduce) and self._is_pointwise(expand) and self._pools_all(pool):
                return FoundSqueeze(
                    pool, reduce, act_node, act[0], expand, gate_node, gate, product
                )
        return None

    def _gate_of(self, node: Any) -> str | None:
        if not isinstance(node, fx.Node) or node.kwargs or len(node.args) != 1:
            return None
        module = self._module(node)
        if module is not None:
            return None if has_hooks(module) else _GATE_MODULES.get(type(module))
        table = {"call_function": _GATE_FUNCTIONS, "call_method": _GATE_METHODS}.get(node.op, {})
        return table.get(node.target)

    def _is_pointwise(self, node: fx.Node) -> bool:
        """Whether the node is a 1x1 convolution with nothing special about it."""
        conv = self._module(node)
        return (
            conv is not None
            and self._why_no_conv(node) is None
            and isinstance(conv, nn.Conv2d)
            and conv.kernel_size == conv.stride == (1, 1)
        )

    def _pools_all(self, node: fx.Node) -> bool:
        """Whether the node is the mean of each plane, as [N, C, 1, 1]."""
        module = self._module(node)
        if module is not None:
            if type(module) is not nn.AdaptiveAvgPool2d or has_hooks(module) or len(node.args) != 1:
                return False
            path = tuple(node.target.split("."))
            self.reads.setdefault(path, {})["output_size"] = module.output_size
            return module.output_size in (1, (1, 1))
        if node.op == "call_function" and node.target is F.adaptive_avg_pool2d:
            return not node.kwargs and node.args[1:] in ((1,), ((1, 1),))
        if node.op == "call_method" and node.target == "mean":
            rest = (*node.args[1:], *node.kwargs.items())
            return rest in (((2, 3), ("keepdim", True)), ((2, 3), True))
        return False

    def _why_no_conv(self, source: fx.Node) -> str | None:
        """None where `source` is a convolution for the unit; else why not ("" where it is none at all)."""
        conv = self._module(source)
        if conv is None or not isinstance(conv, (nn.modules.conv._ConvNd, nn.Linear)):
            return ""
        if type(conv) not in CONV_CLASSES:
            return f"{type(conv).__name__} is not an exact nn.Conv or nn.Linear"
        if has_hooks(conv):
            return "the convolution has hooks"
        if len(source.users) > 1:
            return "the convolution's output has another reader"
        reason = unsupported_conv(conv)
        if reason is not None:
            return f"the convolution has {reason}"
        if len(source.args) != 1 or source.kwargs or not isinstance(source.args[0], fx.Node):
            return "the convolution is called with more than its input"
        return None

    def _disjoint(self, units: list[FoundUnit]) -> list[FoundUnit]:
        """Where two units end in one addition, one keeps it and the other's output is its residual: a shortcut's, whose input
        others read too, or else that of the earlier one."""

        def rank(unit: FoundUnit) -> tuple[bool, int]:
            return len(unit.input.users) == len(unit.entries), self.order[unit.bn]

        owners: dict[fx.Node, FoundUnit] = {}
        for unit in units:
            if unit.add is not None:
                other = owners.get(unit.add)
                if other is None or rank(unit) > rank(other):
                    owners[unit.add] = unit
        for unit in units:
            if unit.add is not None and owners[unit.add] is not unit:
                unit.end_at_bn()
        return units

    # -- what may be moved

    def alias_roots(self) -> dict[fx.Node, frozenset[fx.Node]]:
        """For each node the values whose memory its output may share."""
        roots: dict[fx.Node, frozenset[fx.Node]] = {}
        for node in self.graph.nodes:
            module = self._module(node)
            if module is not None:
                fresh = is_norm(module) or type(module) in {*CONV_CLASSES, *_FRESH_MODULES}
            else:
                names = {"call_function": _FRESH_FUNCTIONS, "call_method": _FRESH_METHODS}
                fresh = node.target in names.get(node.op, ())
            fresh = fresh and not self.writes(node)
            shared = (
                frozenset().union(*(roots[n] for n in node.all_input_nodes))
                if not fresh
                else frozenset()
            )
            roots[node] = shared | {node}
        return roots

    def writes(self, node: fx.Node) -> Iterable[fx.Node]:
        """The arguments that a node may write to."""
        inputs = node.all_input_nodes
        if node.op == "call_method":
            name = node.target
            return inputs[:1] if name.endswith("_") and not name.endswith("__") else ()
        if node.op == "call_module":
            return inputs if _may_write(self._module(node), self.known) else ()
        if node.op == "call_function":
            name = getattr(node.target, "__name__", "")
            in_place = node.target in (
                operator.iadd,
                operator.imul,
                operator.isub,
                operator.itruediv,
            )
            in_place |= name.endswith("_") and not name.startswith("_")
            in_place |= node.kwargs.get("inplace") is True or node.kwargs.get("out") is not None
            in_place |= any(a is True for a in node.args[1:]) and node.target in _ACT_FUNCTIONS
            in_place |= node.target in (operator.setitem, setattr)
            return inputs if in_place else ()
        return ()

    def _is_disturbed(self, units: list[FoundUnit]) -> bool:
        """Whether running the units at the place of the last one could see values that were written to in between."""
        own = {node for unit in units for node in unit.nodes()}
        start = min(self.order[unit.first] for unit in units)
        end = self.order[units[-1].last]
        read = set(self.roots[units[0].input])
        for node in self.graph.nodes:
            at = self.order[node]
            if start < at < end:
                if node not in own and any(read & self.roots[n] for n in self.writes(node)):
                    return True
                for unit in units:
                    if unit.add is node:
                        read |= self.roots[unit.residual]
        return False

    def _loses_residual(self, unit: FoundUnit) -> bool:
        """Whether a residual that is kept for the backward pass is written to later in the block."""
        if unit.add is None or unit.act not in SMOOTH_ACTS:
            return False
        kept = self.roots[unit.residual]
        later = (n for n in self.graph.nodes if self.order[n] > self.order[unit.add])
        return any(kept & self.roots[value] for n in later for value in self.writes(n))

    def _chains(self, units: list[FoundUnit]) -> list[list[FoundUnit]]:
        """The units in chains: each as long as nobody but its own units reads what they give, the last one's output aside."""
        chains: list[list[FoundUnit]] = []
        remaining = sorted(units, key=lambda unit: self.order[unit.last])
        while remaining:
            group = self._grown(remaining)
            while len(group) > 1 and not self._is_chain(group):
                group.pop()
            chains.append(group)
            taken = set(map(id, group))
            remaining = [unit for unit in remaining if id(unit) not in taken]
        return chains

    def _grown(self, units: list[FoundUnit]) -> list[FoundUnit]:
        """The first unit, and those behind it that read its input or what another of them gives."""
        group = units[:1]
        known = {units[0].last}
        if units[0].conv is not None:
            # Under autocast a leading BatchNorm's input has another dtype than the rest of the chain.
            known.add(units[0].input)
        for unit in units[1:]:
            if unit.input in known and unit.conv is not None:
                group.append(unit)
                known.add(unit.last)
        return group

    def _is_chain(self, group: list[FoundUnit]) -> bool:
        readers: dict[fx.Node, set[fx.Node]] = {}
        for unit in group:
            readers.setdefault(unit.input, set()).update(unit.entries)
            if unit.add is not None:
                readers.setdefault(unit.residual, set()).add(unit.add)
        inside = [unit.last for unit in group[:-1]]
        return all(set(node.users) <= readers.get(node, set()) for node in inside) and (
            not self._is_disturbed(group)
        )

    # -- writing the plan

    def _note(self, unit: FoundUnit) -> None:
        self.found.fused[unit.bn.target] = unit.describe()
        conv_and_bn = [n.target for n in (unit.conv, unit.bn) if n is not None]
        words = "+".join(part.rsplit(".", 1)[-1] for part in conv_and_bn)
        words += "+add" if unit.add is not None else ""
        words += f"+{unit.act}" if unit.act != "identity" else ""
        words += "+maxpool" if unit.pool else ""
        self.found.partners[unit.bn.target] = words
        if unit.conv is not None:
            self.found.partners[unit.conv.target] = words

    def _replace(self, chain: list[FoundUnit]) -> fx.Node:
        """Puts one call of run_chain in the place of a chain's nodes."""
        last = chain[-1].last
        places = {unit.last: i for i, unit in enumerate(chain)}
        if chain[0].conv is not None:
            places[chain[0].input] = -1
        with self.graph.inserting_before(last):
            entries = []
            for i, unit in enumerate(chain):
                modules = []
                for node in (unit.conv, unit.bn):
                    modules.append(None if node is None else self.graph.get_attr(node.target))
                squeeze = None
                if unit.squeeze is not None:
                    se = unit.squeeze
                    reduce, expand = (self.graph.get_attr(n.target) for n in (se.reduce, se.expand))
                    squeeze = (reduce, se.act, expand, se.gate)
                residual = unit.residual
                residual_source = places.get(residual)
                if residual_source is not None:
                    residual = None
                source = places[unit.input] if i else -1
                rest = (unit.adds_in_place, squeeze, None if source == i - 1 else source)
                rest = (*rest, residual_source, unit.pool)
                entries.append((*modules, unit.act, unit.slope, residual, *rest))
            low = {"low_memory": True} if self.options.low_memory else {}
            given = (chain[0].input, self.options.backend, *entries)
            call = self.graph.call_function(run_chain, given, low)
        last.replace_all_uses_with(call)
        nodes = [node for unit in chain for node in unit.nodes()]
        for node in sorted(nodes, key=lambda node: -self.order[node]):
            if node.op == "call_module":
                self.called.add(tuple(node.target.split(".")))
            self.graph.erase_node(node)
        return call

    def _written(self, units: list[FoundUnit]) -> set[fx.Node] | None:
        """The inputs that something outside the units writes to; None where a write would miss a copy.

        A block that is run in another layout works on copies: of its inputs, and of values that leave the part in which the
        layout does not matter. A write to one of these has to be seen by nothing else.
        """
        own = {node for unit in units for node in unit.nodes()}

        @functools.cache  # asked for every pair of a write and a node
        def is_inside(node: fx.Node) -> bool:
            return node in own or self._is_layout_free(node)

        written: set[fx.Node] = set()
        for node in self.graph.nodes:
            for value in self.writes(node) if node not in own else ():
                inputs = {n for n in self.roots[value] if n.op == "placeholder"}
                written |= inputs
                if inputs:
                    continue
                for shared in self.graph.nodes:
                    if not (self.roots[shared] & self.roots[value] and is_inside(shared)):
                        continue
                    leaving = [n for n in shared.users if not is_inside(n)]
                    if is_inside(node):
                        # What the caller gets is copied at the end, with everything that was written.
                        leaving = [n for n in leaving if n.op != "output"]
                    if leaving and len(shared.users) > 1:
                        return None
        return written

    def _keep_layout(
        self, run_nodes: list[fx.Node], convs: list[str], written: set[fx.Node]
    ) -> None:
        """Runs the block in channels_last where its input is plain NCHW, and hands out what NCHW would have given.

        Values that come from a converted input stay in channels_last through operations that do not show it; anything else
        that reads one, the caller included, gets it back in NCHW. convs are the paths of the convolutions in units.
        """
        free: set[fx.Node] = set()
        chains = set(run_nodes)
        inputs = [
            n
            for n in self.graph.nodes
            if n.op == "placeholder" and n.target not in self.traced.list_inputs
        ]
        after_inputs = next(n for n in self.graph.nodes if n.op != "placeholder")
        converted: dict[fx.Node, list[fx.Node]] = {}
        for given in inputs:
            readers = [n for n in given.users if n in chains or self._is_layout_free(n)]
            if given not in written and any(
                n in chains or self._module(n) is not None for n in readers
            ):
                converted[given] = readers
        if not converted:
            return
        with self.graph.inserting_before(after_inputs):
            conv = self.graph.get_attr(convs[0]) if convs else None
            is_nchw = self.graph.call_function(are_plain_nchw, (conv, *inputs))
            for given, readers in converted.items():
                inside = self.graph.call_function(to_channels_last, (given, is_nchw))
                for reader in readers:
                    reader.replace_input_with(given, inside)
                free.add(inside)
        for node in list(self.graph.nodes):
            if node in free:
                continue
            from_free = [n for n in node.all_input_nodes if n in free]
            if not from_free:
                continue
            if node in chains or self._is_layout_free(node):
                free.add(node)
                continue
            for value in from_free:
                with self.graph.inserting_before(node):
                    back = self.graph.call_function(back_to_nchw, (value, is_nchw))
                node.replace_input_with(value, back)

    def _is_layout_free(self, node: fx.Node) -> bool:
        module = self._module(node)
        if module is not None:
            if type(module).__name__ in ("StochasticDepth", "DropPath"):
                return True  # one random number per image
            if (
                type(module) in _LAYOUT_FREE_MODULES
                or is_norm(module)
                or type(module) in CONV_CLASSES
            ):
                return not getattr(module, "return_indices", False)
            return isinstance(module.__dict__.get("forward"), PlannedForward)
        if node.op == "call_function":
            if node.target is torch.flatten:
                return len(node.args) == 2 and node.args[1] == 1 and not node.kwargs
            return node.target in _LAYOUT_FREE_FUNCTIONS
        return node.op == "call_method" and node.target in _LAYOUT_FREE_METHODS

    def _compile(self) -> Plan:
        guards = self._guards()
        self._take_modules(guards)
        code = self.graph.python_code("self")
        namespace = dict(code.globals)
        exec(compile(code.src, f"<bnfast plan of {type(self.block).__name__}>", "exec"), namespace)
        return Plan(
            run=namespace["forward"],
            source=code.src,
            inputs=self.traced.inputs,
            list_inputs=self.traced.list_inputs,
            guards=guards,
        )

    def _take_modules(self, guards: tuple[Guard, ...]) -> None:
        """Lets the code read modules from a list, in the order of the guards, which hold them already when the code runs."""
        places = {".".join(guard.path): place for place, guard in enumerate(guards)}
        with self.graph.inserting_before(next(iter(self.graph.nodes))):
            modules = self.graph.placeholder("modules")
        for node in list(self.graph.nodes):
            if node.op == "get_attr" and node.target in places:
                with self.graph.inserting_before(node):
                    item = self.graph.call_function(
                        operator.getitem, (modules, places[node.target])
                    )
                node.replace_all_uses_with(item)
                self.graph.erase_node(node)

    def _guards(self) -> tuple[Guard, ...]:
        paths = {*self.traced.visited, *self.called, *self.reads}
        held = set(self.traced.visited)
        for path in sorted(self.traced.visited):
            held |= _containers(self.block.get_submodule(".".join(path)), path)
        held |= {p for p in self.called if norm_act(self.block.get_submodule(".".join(p)))}
        paths |= held
        guards = []
        for path in sorted(paths):
            module = self.block.get_submodule(".".join(path))
            inlined = path in self.traced.visited
            guards.append(
                Guard(
                    path=path,
                    cls=_class_after(module),
                    children=tuple((n, _class_after(m)) for n, m in module._modules.items())
                    if path in held
                    else None,
                    attributes=tuple(self.reads.get(path, {}).items()),
                    is_called=bool(path) and (inlined or path in self.called),
                )
            )
        return tuple(guards)


def _containers(module: nn.Module, path: tuple[str, ...]) -> set[tuple[str, ...]]:
    """Paths of the containers below a module whose children its forward may call without calling them."""
    found = set()
    for name, child in module._modules.items():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
            found |= {(*path, name)} | _containers(child, (*path, name))
    return found


def _class_after(module: nn.Module | None) -> type:
    """The class that a module has once convert() is done."""
    return (FROZEN_CLASSES | NORM_CLASSES).get(type(module), type(module))


def _only_reader(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


# ---- what plans call ---------------------------------------------------------------------------------------------------


def are_plain_nchw(conv: nn.Module | None, *inputs: Any) -> bool:
    """Whether a block that is called with these inputs works in NCHW: the images among them are dense NCHW and nothing
    else, and so is the weight of its first convolution."""
    if conv is not None and conv.weight.dim() == 4:
        weight = conv.weight
        if weight.stride(1) == 1 and weight.stride(3) == weight.shape[1]:
            return False
    images = [x for x in inputs if isinstance(x, torch.Tensor) and x.dim() == 4]
    return bool(images) and all(
        x.is_contiguous() and (x.stride(1) != 1 or x.shape[1] == 1 or x.shape[2] == x.shape[3] == 1)
        for x in images
    )


def to_channels_last(x: torch.Tensor, is_nchw: bool) -> torch.Tensor:
    """x in channels_last if it is an image in NCHW, else x."""
    if not is_nchw or x.dim() != 4 or not x.numel():
        return x
    y = x.contiguous(memory_format=torch.channels_last)
    if y.stride(1) != 1:
        # One channel: the layouts coincide, and only the strides tell convolutions which one is meant.
        n, c, h, w = y.shape
        y = y.as_strided((n, c, h, w), (h * w * c, 1, w * c, c))
    return y


def back_to_nchw(x: Any, is_nchw: bool) -> Any:
    """x in dense NCHW if the block's input was; what is no image as it is."""
    if not is_nchw or not isinstance(x, torch.Tensor) or x.dim() < 4 or not x.numel():
        return x
    y = x.contiguous()
    strides = [1]
    for size in reversed(x.shape[1:]):
        strides.insert(0, strides[0] * size)
    # Where a size is 1 the layouts coincide, and only the strides tell what comes next which one is meant.
    return y if y.stride() == tuple(strides) else y.as_strided(y.shape, strides)
