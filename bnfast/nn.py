"""Drop-in modules, and the two ways in which modules reach `ops`: `run_chain`, and a planned block's forward."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from . import cross_rank, ops
from .reference import ACTS, conv_output_size

_ACT_FUNCTIONS = {
    "identity": lambda x, slope: x,
    "relu": lambda x, slope: F.relu(x),
    "relu6": lambda x, slope: F.relu6(x),
    "leaky_relu": F.leaky_relu,
    "silu": lambda x, slope: F.silu(x),
    "hardswish": lambda x, slope: F.hardswish(x),
}


# The entry of run_chain from adds_in_place on, of a unit that is a chain of its own.
_ALONE = (False, None, None, None, None)


class _Noted:
    """Shows in print(model) what convert() fused a module with."""

    def extra_repr(self) -> str:
        note = self.__dict__.get("_bnfast_note")
        return super().extra_repr() + (f"  # {note}" if note else "")


class _FrozenConv(_Noted):
    """A convolution that keeps no input for the backward pass while its weight and bias need no gradient."""

    def forward(self, input: Tensor) -> Tensor:
        if (
            torch.is_grad_enabled()
            and input.requires_grad
            and is_frozen(self)
            and input.dim() == self.weight.dim()
        ):
            return run_chain(input, "auto", (self, None, "identity", 0.0, None, *_ALONE))
        return super().forward(input)


class FrozenConv1d(_FrozenConv, nn.Conv1d):
    """nn.Conv1d for frozen weights; see FrozenConv2d."""


class FrozenConv2d(_FrozenConv, nn.Conv2d):
    """nn.Conv2d for frozen weights: same parameters, results and gradients, no saved input.

    x [N, J, H, W] -> [N, C, H', W']. With a weight or bias that needs a gradient it is nn.Conv2d and nothing else.
    """


class FrozenConv3d(_FrozenConv, nn.Conv3d):
    """nn.Conv3d for frozen weights; see FrozenConv2d."""


class _BatchNormAct(_Noted):
    act = "identity"
    negative_slope = 0.01

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """act(BatchNorm(input) + residual); both [N, C, ...] of one shape and dtype, any strides."""
        self._check_input_dim(input)
        return run_chain(
            input,
            "auto",
            (None, self, self.act, self.negative_slope, residual, *_ALONE),
        )


def _batch_norm_act(base: type[nn.Module], name: str) -> type[nn.Module]:
    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device=None,
        dtype=None,
        *,
        act: str = "relu",
        negative_slope: float = 0.01,
    ) -> None:
        check_act(act)
        base.__init__(self, num_features, eps, momentum, affine, track_running_stats, device, dtype)
        self.act = act
        self.negative_slope = negative_slope

    def extra_repr(self) -> str:
        act = "" if self.act == "identity" else f", act={self.act!r}"
        return super(cls, self).extra_repr() + act

    doc = f"""nn.{base.__name__} with activation and optional residual: y = act(BatchNorm(x) + residual).

    act is one of {", ".join(ACTS)}; negative_slope is leaky_relu's. All else, the statistics and the state_dict included,
    is nn.{base.__name__}'s. Raises ValueError for an unknown act.
    """
    cls = type(
        name,
        (_BatchNormAct, base),
        {"__init__": __init__, "extra_repr": extra_repr, "__doc__": doc, "__module__": __name__},
    )
    return cls


BatchNormAct1d = _batch_norm_act(nn.BatchNorm1d, "BatchNormAct1d")
BatchNormAct2d = _batch_norm_act(nn.BatchNorm2d, "BatchNormAct2d")
BatchNormAct3d = _batch_norm_act(nn.BatchNorm3d, "BatchNormAct3d")


class SyncBatchNormAct(_BatchNormAct, nn.modules.batchnorm._BatchNorm):
    """nn.SyncBatchNorm as part of units, and on the CPU too: batch statistics over all ranks of its process group.

    No subclass of it: DistributedDataParallel refuses every nn.SyncBatchNorm on the CPU.
    """

    _check_input_dim = nn.SyncBatchNorm._check_input_dim


# The drop-in class of each exact class; the way back is `original_class`.
FROZEN_CLASSES: dict[type, type] = {
    nn.Conv1d: FrozenConv1d,
    nn.Conv2d: FrozenConv2d,
    nn.Conv3d: FrozenConv3d,
}
NORM_CLASSES: dict[type, type] = {
    nn.BatchNorm1d: BatchNormAct1d,
    nn.BatchNorm2d: BatchNormAct2d,
    nn.BatchNorm3d: BatchNormAct3d,
    nn.SyncBatchNorm: SyncBatchNormAct,
}
ORIGINAL_CLASSES = {new: old for old, new in (FROZEN_CLASSES | NORM_CLASSES).items()}


class FrozenConvBNAct2d(nn.Module):
    """act(bn(conv(x)) + residual) for hand-written nets, with real children .conv and .bn.

    conv is an nn.Conv2d that is frozen here, bn an nn.BatchNorm2d; the activation is a name of `reference.ACTS`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        act: str = "relu",
        negative_slope: float = 0.01,
    ) -> None:
        check_act(act)
        super().__init__()
        self.conv = FrozenConv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias=False
        ).requires_grad_(False)
        self.bn = BatchNormAct2d(out_channels, act="identity")
        self.act = act
        self.negative_slope = negative_slope

    @classmethod
    def from_modules(
        cls, conv: nn.Conv2d, bn: nn.BatchNorm2d, act: str = "relu", negative_slope: float = 0.01
    ) -> "FrozenConvBNAct2d":
        """Around existing modules, which are kept as they are, the same objects; conv is frozen.

        Raises TypeError or ValueError where conv is no nn.Conv2d, bn no nn.BatchNorm2d, or their channels differ.
        """
        check_act(act)
        if not isinstance(conv, nn.Conv2d):
            raise TypeError(f"conv is a {type(conv).__name__}; an nn.Conv2d is needed")
        if not isinstance(bn, nn.BatchNorm2d):
            raise TypeError(f"bn is a {type(bn).__name__}; an nn.BatchNorm2d is needed")
        if conv.out_channels != bn.num_features:
            raise ValueError(
                f"bn has {bn.num_features} features; conv has {conv.out_channels} output channels"
            )
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self.conv = conv.requires_grad_(False)
        self.bn = bn
        self.act = act
        self.negative_slope = negative_slope
        return self

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x [N, J, H, W], residual of the output's shape [N, C, H', W'] and dtype, or None."""
        return run_chain(
            x,
            "auto",
            (self.conv, self.bn, self.act, self.negative_slope, residual, *_ALONE),
        )

    def extra_repr(self) -> str:
        return f"act={self.act!r}"


def check_act(act: str) -> None:
    """Raises ValueError unless act is a known activation."""
    if act not in ACTS:
        raise ValueError(f"act is {act!r}; allowed are {', '.join(map(repr, ACTS))}")


def unsupported_conv(conv: nn.Module) -> str | None:
    """Why a convolution of a supported class cannot be part of a unit, or None."""
    if isinstance(conv, nn.Linear):
        return None
    if conv.padding_mode != "zeros":
        return f"padding_mode={conv.padding_mode!r}"
    if _padding(conv) is None:
        return "padding='same' that is not symmetric"
    return None


def is_frozen(conv: nn.Module) -> bool:
    """Whether neither weight nor bias needs a gradient and the convolution is one that units support."""
    return (
        not conv.weight.requires_grad
        and (conv.bias is None or not conv.bias.requires_grad)
        and unsupported_conv(conv) is None
    )


def _padding(conv: nn.Module) -> tuple[int, ...] | None:
    padding = conv.padding
    if not isinstance(padding, str):
        return padding
    if padding == "valid":
        return (0,) * len(conv.stride)
    reach = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    return None if any(r % 2 for r in reach) else tuple(r // 2 for r in reach)


def run_chain(x: Tensor, backend: str, *entries: tuple, low_memory: bool = False) -> Tensor:
    """Runs a chain of (conv, bn, act, negative_slope, residual, adds_in_place, squeeze, source, residual_source, pool) units.

    conv, bn, residual, squeeze, pool (see `ops.MaxPool`) and the sources may be None; squeeze is (reduce, act, expand, gate), see
    `ops.SqueezeExcite`; the sources are links within the chain, see `ops.Unit`; low_memory is that of `ops.frozen_conv_bn_act`.
    Decides at each call what runs fused: where a convolution's or a squeeze's weight or bias needs a gradient, or a residual has
    another shape or dtype than what it is added to, every unit runs on its own and what cannot be fused as itself.
    """
    units = []
    values = _Values(x)
    for entry in entries:
        unit = _unit(x, *entry)
        if unit is None or not values.fit(unit):
            return _run_apart(x, backend, entries)
        units.append(unit)
    return ops.frozen_conv_bn_act(x, units, backend, low_memory)


def _fits(x: Tensor, conv: nn.Module | None) -> bool:
    """Whether a convolution of x, if there is one, can be part of a unit."""
    return conv is None or (x.dim() == conv.weight.dim() and is_frozen(conv))


def _squeeze_fits(x: Tensor, squeeze: tuple | None) -> bool:
    return squeeze is None or (x.dim() == 4 and all(map(_is_frozen_pointwise, squeeze[::2])))


def _unit(
    x, conv, bn, act, slope, residual, adds_in_place, squeeze, source, residual_source, pool
) -> ops.Unit | None:
    """One entry of run_chain as a unit, None where a part of it cannot be in one; x has the right number of dimensions."""
    weight = bias = None
    stride = padding = dilation = ()
    groups = 1
    if conv is not None:
        weight, bias = (
            _held(conv._parameters, conv, "weight"),
            _held(conv._parameters, conv, "bias"),
        )
        dims = weight.dim()
        if (
            x.dim() != dims
            or weight.requires_grad
            or (bias is not None and bias.requires_grad)
            or unsupported_conv(conv) is not None
        ):
            return None
        if dims > 2:
            stride, padding = conv.stride, _padding(conv)
            dilation, groups = conv.dilation, conv.groups
    if squeeze is not None and not _squeeze_fits(x, squeeze):
        return None
    norm, group = _NO_NORM, None
    if bn is not None:
        bn._check_input_dim(x)  # a frozen convolution keeps the number of dimensions
        norm, group = _norm_fields(bn), cross_rank.group_of(bn)
    if squeeze is not None:
        squeeze = _squeeze_unit(*squeeze)
    pool = None if pool is None else ops.MaxPool(*pool)
    rest = (residual, act, slope, squeeze, group, source, residual_source, pool)
    return ops.Unit(weight, bias, stride, padding, dilation, groups, *norm, *rest)


def _held(place: dict[str, Tensor | None], module: nn.Module, name: str) -> Tensor | None:
    """A parameter or buffer from the dictionary where it lies in the first place, without nn.Module's search through all that a
    module holds; replicas and parametrized modules have it elsewhere."""
    return place[name] if name in place else getattr(module, name)


def _run_apart(x: Tensor, backend: str, entries: tuple) -> Tensor:
    """Each unit of a chain on its own, and what cannot be part of one by PyTorch."""
    outputs = [*[None] * len(entries), x]  # the last one is -1's
    for i, entry in enumerate(entries):
        conv, bn, act, slope, residual, adds_in_place, squeeze, source, residual_source, pool = (
            entry
        )
        x = outputs[i - 1 if source is None else source]
        if residual_source is not None:
            residual = outputs[residual_source]
        if not (_fits(x, conv) and _squeeze_fits(x, squeeze)):
            if squeeze is not None:
                x, squeeze = _squeeze(x, *squeeze), None
            if not _fits(x, conv):
                x, conv = conv(x), None
        unit = _unit(x, conv, bn, act, slope, residual, adds_in_place, squeeze, None, None, pool)
        if _Values(x).fit(unit):
            x = ops.frozen_conv_bn_act(x, [unit], backend)
        else:
            alone = unit._replace(residual=None, act="identity", pool=None)
            x = ops.frozen_conv_bn_act(x, [alone], backend)
            x = x.add_(residual) if adds_in_place else x + residual
            x = _ACT_FUNCTIONS[act](x, slope)
            x = x if pool is None else F.max_pool2d(x, *pool)
        outputs[i] = x
    return x


class _Values:
    """Shape and dtype of a chain's values, to see whether a residual is like the output that it is added to."""

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self.conv_dtype: torch.dtype | None = None  # of convolutions' outputs, once there is one
        self.values = [(list(x.shape), x.dtype)]  # of the chain's input, then of each unit's output

    def fit(self, unit: ops.Unit) -> bool:
        """Takes the next unit in; False where its residual has another shape, dtype or device than its output."""
        shape, dtype = self.values[-1 if unit.source is None else unit.source + 1]
        weight = unit.weight
        if weight is not None:
            sizes = conv_output_size(shape[2:], weight, unit.stride, unit.padding, unit.dilation)
            if self.conv_dtype is None:
                kind = self.x.device.type
                autocast = dtype != torch.float64 and torch.is_autocast_enabled(kind)
                self.conv_dtype = torch.get_autocast_dtype(kind) if autocast else dtype
            shape, dtype = [shape[0], weight.shape[0], *sizes], self.conv_dtype
        output = shape
        if unit.pool is not None:
            windows = zip(shape[2:], *unit.pool, strict=True)
            output = [*shape[:2], *((n + 2 * p - k) // s + 1 for n, k, s, p in windows)]
        self.values.append((output, dtype))
        residual = unit.residual
        if unit.residual_source is not None:
            return self.values[unit.residual_source + 1] == (shape, dtype)
        return residual is None or (
            isinstance(residual, Tensor)
            and list(residual.shape) == shape
            and residual.dtype == dtype
            and residual.device == self.x.device
        )


def _is_frozen_pointwise(conv: nn.Conv2d) -> bool:
    """Whether a convolution inside squeeze and excitation is a constant matrix."""
    return (
        is_frozen(conv)
        and conv.kernel_size == conv.stride == (1, 1)
        and conv.padding in ((0, 0), "valid", "same")
        and conv.groups == 1
    )


def _squeeze_unit(reduce: nn.Conv2d, act: str, expand: nn.Conv2d, gate: str) -> ops.SqueezeExcite:
    return ops.SqueezeExcite(reduce.weight, reduce.bias, expand.weight, expand.bias, act, gate)


def _squeeze(x: Tensor, reduce: nn.Conv2d, act: str, expand: nn.Conv2d, gate: str) -> Tensor:
    """The same by PyTorch, where it cannot be part of a unit."""
    scale = expand(_ACT_FUNCTIONS[act](reduce(F.adaptive_avg_pool2d(x, 1)), 0.0))
    return x * (torch.sigmoid(scale) if gate == "sigmoid" else F.hardsigmoid(scale))


# What _norm_fields gives where there is no BatchNorm.
_NO_NORM = (False, True, None, None, None, None, None, 0.1, 1e-5)


def _norm_fields(bn: nn.Module) -> tuple:
    """From normalize to eps of an `ops.Unit`: BatchNorm's rules about its mode, buffers and momentum, as in
    nn.BatchNorm2d.forward."""
    training, momentum = bn.training, bn.momentum
    parameters, buffers = bn._parameters, bn._buffers
    mean, var = _held(buffers, bn, "running_mean"), _held(buffers, bn, "running_var")
    use_batch = training or (mean is None and var is None)
    tracked = None
    if training and not bn.track_running_stats:
        mean = var = None
    elif training:
        tracked = _held(buffers, bn, "num_batches_tracked")
    if momentum is None and tracked is None:
        momentum = 0.0
    affine = (_held(parameters, bn, "weight"), _held(parameters, bn, "bias"))
    return True, use_batch, *affine, mean, var, tracked, momentum, bn.eps


# ---- planned blocks ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Guard:
    """What a plan assumes of one module of the block: `path` of child names, exact class, children, attributes read."""

    path: tuple[str, ...]
    cls: type
    children: tuple[tuple[str, type], ...] | None
    attributes: tuple[tuple[str, Any], ...]
    is_called: bool  # the original calls it and the plan does not: hooks on it would be missed


@dataclass(frozen=True)
class Plan:
    """One way to run a block: generated code, and what must hold for it to be the block's own forward.

    run takes the block, the list of modules that `fitting` gives, and the inputs.
    """

    run: Callable[..., Any]
    source: str
    inputs: tuple[str, ...]
    list_inputs: frozenset[str]
    guards: tuple[
        Guard, ...
    ]  # in the order of their paths: a module comes behind those that hold it
    anchors: tuple[tuple[int, tuple[str, ...]], ...] = field(init=False)

    def __post_init__(self) -> None:
        """For each guard the place of the nearest module above it among them, -1 for the block, and the way from there."""
        places = {guard.path: place for place, guard in enumerate(self.guards)}
        anchors = []
        for guard in self.guards:
            above = [n for n in range(len(guard.path)) if guard.path[:n] in places]
            length = above[-1] if above else 0
            anchors.append((places[guard.path[:length]] if above else -1, guard.path[length:]))
        object.__setattr__(self, "anchors", tuple(anchors))

    def __deepcopy__(self, memo: dict) -> "Plan":
        return self

    def fitting(self, block: nn.Module, args: tuple) -> list[nn.Module] | None:
        """The modules of the guards, where this plan does what the block's forward would do on these arguments now; else None."""
        for name, value in zip(self.inputs, args, strict=True):
            if not isinstance(value, list if name in self.list_inputs else Tensor):
                return None
        modules = []
        for guard, (anchor, way) in zip(self.guards, self.anchors, strict=True):
            module = block if anchor < 0 else modules[anchor]
            for name in way:
                module = module._modules.get(name)
                if module is None:
                    return None
            if type(module) is not guard.cls:
                return None
            modules.append(module)
            if guard.is_called and (
                type(module.__dict__.get("forward")) not in (type(None), PlannedForward)
                or module._forward_hooks
                or module._forward_pre_hooks
                or module._backward_hooks
                or module._backward_pre_hooks
            ):
                return None
            if guard.children is not None:
                children = module._modules
                if len(children) != len(guard.children):
                    return None
                for name, cls in guard.children:
                    if type(children.get(name)) is not cls:
                        return None
            for name, value in guard.attributes:
                if getattr(module, name, guard) != value:
                    return None
        return modules


class Options(NamedTuple):
    """What convert() was asked for: see there."""

    backend: str = "auto"
    channels_last: bool = True
    low_memory: bool = False


class PlannedForward:
    """The instance attribute `forward` of a converted block: runs the plan that fits, else the block's own forward.

    Plans hold names, never modules, so copies share them; a pickle leaves them out and the first call makes them again.
    """

    def __init__(self, block: nn.Module, plans: tuple[Plan, ...], options: Options) -> None:
        self.block = block
        self.plans: tuple[Plan, ...] | None = plans
        self.options = options

    def install(self) -> None:
        """Puts it, and its way through nn.DataParallel, on the block."""
        self.block.__dict__["forward"] = self
        self.block.__dict__["_replicate_for_data_parallel"] = self.replicate

    def replicate(self) -> nn.Module:
        """A replica of the block for nn.DataParallel, whose forward is bound to the replica."""
        replica = type(self.block)._replicate_for_data_parallel(self.block)
        PlannedForward(replica, self.plans, self.options).install()
        return replica

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "plans": None}

    def __deepcopy__(self, memo: dict) -> "PlannedForward":
        import copy

        twin = PlannedForward.__new__(PlannedForward)
        memo[id(self)] = twin
        twin.__dict__.update(self.__dict__)
        twin.block = copy.deepcopy(self.block, memo)
        return twin

    def __call__(self, *args, **kwargs):
        block = self.block
        if any(isinstance(value, fx.Proxy) for value in (*args, *kwargs.values())):
            return type(block).forward(block, *args, **kwargs)  # a trace goes through
        if self.plans is None:
            self._plan_again()
        if not _global_hooks():
            for plan in self.plans:
                values = args
                if kwargs or len(args) != len(plan.inputs):
                    values = _bind(type(block).forward, block, args, kwargs, plan.inputs)
                    if values is None:
                        break
                modules = plan.fitting(block, values)
                if modules is not None:
                    return plan.run(block, modules, *values)
        return type(block).forward(block, *args, **kwargs)

    def _plan_again(self) -> None:
        from .planning import plans_of

        self.plans = plans_of(self.block, self.options).plans


def _global_hooks() -> bool:
    hooks = nn.modules.module
    return bool(
        hooks._global_forward_hooks
        or hooks._global_forward_pre_hooks
        or hooks._global_backward_hooks
        or hooks._global_backward_pre_hooks
    )


def _bind(function, block, args, kwargs, inputs) -> tuple | None:
    """The values of `inputs` in a call whose other arguments all have their defaults; None for any other call."""
    try:
        bound = inspect.signature(function).bind(block, *args, **kwargs)
    except TypeError:
        return None  # the block's own forward raises it with its own words
    parameters = inspect.signature(function).parameters
    given = dict(list(bound.arguments.items())[1:])
    for name, value in given.items():
        if name in inputs:
            continue
        default = parameters[name].default
        if type(value) is not type(default) or value != default:
            return None
    return tuple(given[name] for name in inputs) if all(n in given for n in inputs) else None
