"""What is timed: whole training steps by network, and the layer shapes of each network with multiplicity.

No shape is typed by hand: `units` runs the real model once on the meta device and watches which BatchNorm
follows which convolution, which activation follows the BatchNorm, and where a residual is added.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import os
import re

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

ACTIVATIONS = {
    aten.relu.default: "relu",
    aten.relu_.default: "relu",
    aten.hardtanh.default: "relu6",
    aten.hardtanh_.default: "relu6",
    aten.silu.default: "silu",
    aten.silu_.default: "silu",
    aten.hardswish.default: "hardswish",
    aten.hardswish_.default: "hardswish",
}
ADDS = (aten.add.Tensor, aten.add_.Tensor)


@dataclasses.dataclass(frozen=True)
class Network:
    """Where a network comes from and the input its training step is timed on: `batch` images of `size` x `size`."""

    name: str
    source: str  # "bnfast.models" or "torchvision"
    batch: int
    size: int
    classes: int


NETWORKS = {
    network.name: network
    for network in (
        Network("resnet20", "bnfast.models", 128, 32, 10),
        Network("resnet56", "bnfast.models", 128, 32, 10),
        Network("wrn20_4", "bnfast.models", 128, 32, 10),
        Network("resnet18", "torchvision", 16, 224, 1000),
        Network("resnet50", "torchvision", 16, 224, 1000),
        Network("mobilenet_v2", "torchvision", 16, 224, 1000),
        Network("efficientnet_b0", "torchvision", 16, 224, 1000),
        Network("vgg16_bn", "torchvision", 16, 224, 1000),
        Network("densenet121", "torchvision", 16, 224, 1000),
        Network("regnet_y_400mf", "torchvision", 16, 224, 1000),
    )
}

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}

# The default sets keep `make bench` under twenty minutes on two cores; BNFAST_BENCH_FULL=1 runs every network.
STEPS = {
    "f32": ("resnet20", "resnet56", "resnet18", "resnet50", "mobilenet_v2", "efficientnet_b0"),
    "bf16": ("resnet20", "mobilenet_v2"),
}
MEMORY = ("resnet56", "resnet18", "resnet50", "mobilenet_v2", "efficientnet_b0", "vgg16_bn")
PHASE_NETWORKS = ("resnet50",)
PHASE_BATCH = 16
LAYOUTS = {"channels_last": torch.channels_last, "NCHW": torch.contiguous_format}


@functools.cache
def classifiers() -> tuple[str, ...]:
    """torchvision's classification networks."""
    import torchvision

    return tuple(torchvision.models.list_models(module=torchvision.models))


def network(name: str) -> Network:
    """The entry of NETWORKS called `name`, or one made for another: 4 images for a classification network of torchvision, 32 for
    "wrn<6n+2>_<k>", the CIFAR ResNets by width. ValueError lists the entries."""
    if name in NETWORKS:
        return NETWORKS[name]
    if re.fullmatch(r"wrn\d+_\d+", name):
        return Network(name, "bnfast.models", 32, 32, 10)
    if name in classifiers():
        return Network(name, "bnfast.models", 4, 299 if name == "inception_v3" else 224, 1000)
    raise ValueError(f"network is {name!r}; allowed: {', '.join(NETWORKS)}, and torchvision's")


def build(name: str) -> nn.Module:
    """A fresh, randomly initialised network in training mode."""
    entry = network(name)
    if entry.source == "torchvision":
        import torchvision

        model = torchvision.models.get_model(name, weights=None, num_classes=entry.classes)
    else:
        import bnfast.models

        model = bnfast.models.create(name, num_classes=entry.classes)
    return model.train()


@dataclasses.dataclass(frozen=True)
class Unit:
    """One BatchNorm of a network as it is called: its producer, its output [channels, height, width], what follows it.

    `conv` is (in_channels, kernel, stride, groups) of the convolution that feeds it, None if something else does.
    """

    conv: tuple[int, int, int, int] | None
    channels: int
    height: int
    width: int
    act: str  # "identity" if no known activation follows directly
    residual: bool

    @property
    def kind(self) -> str:
        """`relu`, `add+relu`, `identity`, `add`, ...: the row that this unit belongs to in a report."""
        if not self.residual:
            return self.act
        return "add" if self.act == "identity" else f"add+{self.act}"


class _Watch(TorchDispatchMode):
    """Follows BatchNorm outputs through the adds and activations that come directly after them."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: list[torch.Tensor] = []  # an id stays unique only while its tensor lives
        self.convs: dict[int, nn.Conv2d] = {}
        self.pending: dict[
            int, int
        ] = {}  # tensor id -> index of the unit whose output it is so far
        self.units: list[Unit] = []

    def saw_conv(self, module: nn.Conv2d, args: tuple, out: torch.Tensor) -> None:
        self.alive.append(out)
        self.convs[id(out)] = module

    def saw_batch_norm(self, module: nn.BatchNorm2d, args: tuple, out: torch.Tensor) -> None:
        self.alive += [args[0], out]
        conv = self.convs.get(id(args[0]))
        spec = conv and (conv.in_channels, conv.kernel_size[0], conv.stride[0], conv.groups)
        self.pending[id(out)] = len(self.units)
        self.units.append(Unit(spec, *out.shape[1:], act="identity", residual=False))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        owners = [self.pending.get(id(a)) for a in args[:2] if isinstance(a, torch.Tensor)]
        out = func(*args, **(kwargs or {}))
        if func in ACTIVATIONS and owners[0] is not None:
            index = owners[0]
            self.units[index] = dataclasses.replace(self.units[index], act=ACTIVATIONS[func])
            self.pending = {key: value for key, value in self.pending.items() if value != index}
        elif func in ADDS and len(owners) == 2 and any(owner is not None for owner in owners):
            # Where both summands come from a BatchNorm only one of them can take the addition: the first.
            index = owners[0] if owners[0] is not None else owners[1]
            self.pending = {
                key: value for key, value in self.pending.items() if value not in owners
            }
            if not self.units[index].residual:
                self.units[index] = dataclasses.replace(self.units[index], residual=True)
                self.alive.append(out)
                self.pending[id(out)] = index
        else:
            # Whoever else reads the output (the next block's convolution) keeps it from being fused with a later add.
            for value in pytree.arg_tree_leaves(*args):
                self.pending.pop(id(value), None)
        return out


@functools.cache
def units(name: str, size: int | None = None) -> tuple[Unit, ...]:
    """Every BatchNorm2d call of network `name` at `size` x `size` pixels, in the order of execution."""
    with torch.random.fork_rng():
        model = build(name).to("meta")
    x = torch.empty(2, 3, *[size or network(name).size] * 2, device="meta")
    watch = _Watch()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(watch.saw_conv)
        elif isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(watch.saw_batch_norm)
    with watch, torch.no_grad():
        model(x)
    return tuple(watch.units)


@dataclasses.dataclass(frozen=True)
class Phase:
    """BN (+ add) (+ act), forward and backward, on [batch, channels, height, width], found `count` times in `network`;
    `layout` is that of bnfast's tensors, peers have their own."""

    network: str
    dtype: str
    batch: int
    channels: int
    height: int
    width: int
    act: str
    residual: bool
    count: int
    layout: str = "channels_last"  # or "NCHW"

    @property
    def kind(self) -> str:
        kind = Unit(None, self.channels, self.height, self.width, self.act, self.residual).kind
        return kind if self.layout == "channels_last" else f"{kind}, {self.layout}"

    @property
    def id(self) -> str:
        kind = self.kind.replace(", ", "-")
        return f"{self.network}-{self.dtype}-{kind}-C{self.channels}-H{self.height}"

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.channels, self.height, self.width


def phases(
    name: str, dtype: str = "f32", batch: int = PHASE_BATCH, layout: str = "channels_last"
) -> list[Phase]:
    """The distinct BatchNorm shapes of network `name`, largest first, with how often each occurs."""
    counts = collections.Counter(
        (u.channels, u.height, u.width, u.act, u.residual) for u in units(name)
    )
    rows = [Phase(name, dtype, batch, *key, count, layout) for key, count in counts.items()]
    return sorted(rows, key=lambda row: (-row.channels * row.height * row.width, row.id))


@dataclasses.dataclass(frozen=True)
class Step:
    """One training step of `network`: `batch` images [3, size, size], float32 or under bf16 autocast."""

    network: str
    dtype: str
    batch: int
    size: int

    @property
    def id(self) -> str:
        return f"{self.network}-{self.dtype}"

    @property
    def classes(self) -> int:
        return network(self.network).classes


def step(name: str, dtype: str = "f32", batch: int | None = None, size: int | None = None) -> Step:
    """The training-step case of network `name`, at its own batch and size unless they are given."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; allowed: {', '.join(DTYPES)}")
    entry = network(name)
    return Step(name, dtype, batch or entry.batch, size or entry.size)


def _flag(variable: str) -> bool:
    return os.environ.get(variable, "0") not in ("", "0")


def quick() -> bool:
    """BNFAST_BENCH_QUICK=1: one network and one phase, about a minute."""
    return _flag("BNFAST_BENCH_QUICK")


def full() -> bool:
    """BNFAST_BENCH_FULL=1: every network in both precisions, hours rather than minutes."""
    return _flag("BNFAST_BENCH_FULL")


def compiled() -> bool:
    """BNFAST_BENCH_NO_COMPILE=1 leaves the torch.compile peers out, for a quick look: no ratio to publish."""
    return not _flag("BNFAST_BENCH_NO_COMPILE")


def step_cases() -> list[Step]:
    """The step suite's cases under the environment's quick or full flag."""
    if quick():
        return [step("resnet20")]
    if full():
        return [step(name, dtype) for dtype in DTYPES for name in NETWORKS]
    return [step(name, dtype) for dtype, names in STEPS.items() for name in names]


def memory_cases() -> list[Step]:
    """The memory suite's cases under the environment's quick or full flag."""
    names = ("resnet20",) if quick() else tuple(NETWORKS) if full() else MEMORY
    # A quarter of the batch: bytes per image are the same, and what does not grow with the batch weighs more.
    return [step(name, dtype, network(name).batch // 4) for name in names for dtype in DTYPES]


def phase_cases() -> list[Phase]:
    """The phase suite's cases under the environment's quick or full flag."""
    if quick():
        rows = phases("resnet50")  # the one with most elements over all its occurrences
        return [max(rows, key=lambda row: row.count * row.channels * row.height * row.width)]
    names, dtypes = (tuple(NETWORKS), tuple(DTYPES)) if full() else (PHASE_NETWORKS, ("f32",))
    return [
        row
        for name in names
        for dtype in dtypes
        for layout in LAYOUTS
        for row in phases(name, dtype, layout=layout)
    ]
