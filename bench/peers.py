"""Who is compared: the same work done by stock PyTorch in the ways its users run it, and by bnfast.

Every side of one case starts from the same weights, the same input and the same frozen convolutions. Inputs are random
and off-centre (style of real activations before BatchNorm), upstream gradients are random: zeros, or the gradient of a
plain sum, would make BatchNorm's backward trivial.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from bench import cases
from bench.timing import OURS

Convert = Callable[[nn.Module], nn.Module]

EAGER_NCHW = "eager NCHW"
EAGER = "eager channels_last"
COMPILED = "compile channels_last"


def convert(model: nn.Module, backend: str = "auto") -> nn.Module:
    """`bnfast.convert` in place, BatchNorm-only."""
    import bnfast

    return bnfast.convert(model, train="bn", inplace=True, backend=backend)


def randomize_affine(model: nn.Module, seed: int = 0) -> None:
    """Draws gamma from U(0.5, 1.5) and beta from N(0, 0.2), so that neither is at its trivial initial value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
                shape = module.weight.shape
                module.weight.copy_(torch.rand(shape, generator=generator) + 0.5)
                module.bias.copy_(torch.randn(shape, generator=generator) * 0.2)


def build_frozen(name: str) -> nn.Module:
    """Network `name` from a fixed seed, gamma and beta randomised, everything but BatchNorm frozen."""
    import bnfast

    torch.manual_seed(0)
    model = cases.build(name)
    randomize_affine(model)
    bnfast.freeze(model, "bn")
    return model


def images(batch: int, size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Random off-centre images [batch, 3, size, size], each channel with a mean and a scale of its own."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 3, size, size, generator=generator, dtype=dtype)
    offset = torch.tensor([0.4, -0.3, 0.2], dtype=dtype).view(1, 3, 1, 1)
    scale = torch.tensor([1.0, 0.7, 1.3], dtype=dtype).view(1, 3, 1, 1)
    return x * scale + offset


class TrainingStep:
    """One side of a step case. Calling it runs one step and returns the loss: forward, cross entropy, backward,
    SGD with momentum on whatever requires a gradient, zero_grad(set_to_none=True)."""

    def __init__(
        self,
        model: nn.Module,
        x: torch.Tensor,
        target: torch.Tensor,
        autocast: torch.dtype | None,
        lr: float = 1e-3,
    ) -> None:
        self.model = model
        self.x = x
        self.target = target
        self.autocast = autocast
        self.trained = [p for p in model.parameters() if p.requires_grad]
        # A small rate: timing needs the update's work, not its effect, and nothing may drift to inf over the rounds.
        self.optimizer = torch.optim.SGD(self.trained, lr=lr, momentum=0.9)

    def precision(self) -> contextlib.AbstractContextManager:
        """The autocast context of this side, or none."""
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.x.device.type, self.autocast)

    def forward(self) -> torch.Tensor:
        """The loss, with its graph."""
        with self.precision():
            return F.cross_entropy(self.model(self.x), self.target)

    def __call__(self) -> torch.Tensor:
        loss = self.forward()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def training_steps(
    case: cases.Step, device: torch.device, *, compiled: bool = True, convert: Convert = convert
) -> dict[str, TrainingStep]:
    """Every side of a training-step case by name, ours last; `compiled=False` leaves torch.compile out."""
    torch._dynamo.reset()  # a compile cache full of other networks would count against the recompile limit
    base = build_frozen(case.network).to(device)
    x = images(case.batch, case.size).to(device)
    generator = torch.Generator().manual_seed(2)
    target = torch.randint(case.classes, (case.batch,), generator=generator).to(device)
    autocast = None if case.dtype == "f32" else cases.DTYPES[case.dtype]
    last = x.contiguous(memory_format=torch.channels_last)

    def channels_last() -> nn.Module:
        return copy.deepcopy(base).to(memory_format=torch.channels_last)

    sides = {
        EAGER_NCHW: TrainingStep(copy.deepcopy(base), x, target, autocast),
        EAGER: TrainingStep(channels_last(), last, target, autocast),
    }
    if compiled:
        sides[COMPILED] = TrainingStep(
            torch.compile(channels_last(), dynamic=False), last, target, autocast
        )
    sides[OURS] = TrainingStep(convert(copy.deepcopy(base)), last, target, autocast)
    return sides


def inference(
    case: cases.Step, device: torch.device, *, compiled: bool = True, convert: Convert = convert
) -> dict[str, Callable[[], torch.Tensor]]:
    """Every side of a forward pass in evaluation mode by name, ours last; each call returns the logits. Running statistics are those
    of one batch, so that activations keep their size."""
    torch._dynamo.reset()
    base = build_frozen(case.network).to(device)
    x = images(case.batch, case.size).to(device).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        for module in base.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.momentum = 1.0
        base(x)
    base.eval()

    def side(model: nn.Module) -> Callable[[], torch.Tensor]:
        def run() -> torch.Tensor:
            with torch.no_grad():
                return model(x)

        return run

    def channels_last() -> nn.Module:
        return copy.deepcopy(base).to(memory_format=torch.channels_last)

    sides = {EAGER: side(channels_last())}
    if compiled:
        sides[COMPILED] = side(torch.compile(channels_last(), dynamic=False))
    sides[OURS] = side(convert(copy.deepcopy(base)))
    return sides


def _act(y: torch.Tensor, act: str) -> torch.Tensor:
    """`act` the way the networks write it: in place."""
    if act == "identity":
        return y
    if act == "relu":
        return F.relu(y, inplace=True)
    if act == "relu6":
        return F.relu6(y, inplace=True)
    if act == "silu":
        return F.silu(y, inplace=True)
    if act == "hardswish":
        return F.hardswish(y, inplace=True)
    raise ValueError(f"act is {act!r}; allowed: identity, relu, relu6, silu, hardswish")


class StockBatchNormAct(nn.BatchNorm2d):
    """BN, add, act as three stock calls: what a torchvision block does after its convolution."""

    def __init__(self, num_features: int, act: str) -> None:
        super().__init__(num_features)
        self.act = act

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        y = super().forward(x)
        if residual is not None:
            y += residual
        return _act(y, self.act)


class PhaseStep:
    """One side of a phase case. Calling it runs forward and backward and returns (y, dx, [dresidual,] dgamma, dbeta)."""

    def __init__(
        self,
        module: nn.BatchNorm2d,
        data: dict[str, torch.Tensor],
        memory_format: torch.memory_format,
    ):
        tensors = {
            name: value.contiguous(memory_format=memory_format)
            for name, value in data.items()
            if value.dim() == 4
        }
        self.module = module
        self.call = module
        self.dy = tensors.pop("dy")
        self.inputs = [
            tensors[name].requires_grad_() for name in ("x", "residual") if name in tensors
        ]
        with torch.no_grad():
            module.weight.copy_(data["gamma"])
            module.bias.copy_(data["beta"])

    def __call__(self) -> tuple[torch.Tensor, ...]:
        y = self.call(*self.inputs)
        wanted = [*self.inputs, self.module.weight, self.module.bias]
        return y.detach(), *torch.autograd.grad(y, wanted, self.dy)


def phase_data(case: cases.Phase, device: torch.device) -> dict[str, torch.Tensor]:
    """x and residual [N, C, H, W] off-centre per channel, dy random, gamma of both signs, beta; x, residual, dy in the
    case's dtype, gamma and beta [C] in float32."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    channels = case.channels
    mean, std = normal(1, channels, 1, 1) * 2, normal(1, channels, 1, 1).abs() + 0.3
    dtype = cases.DTYPES[case.dtype]
    data = {"x": (normal(*case.shape) * std + mean).to(dtype), "dy": normal(*case.shape).to(dtype)}
    if case.residual:
        data["residual"] = (normal(*case.shape) + 0.3).to(dtype)
    data["gamma"] = normal(channels) * 0.3 + 1
    data["gamma"][::7] *= -1
    data["beta"] = normal(channels) * 0.3
    return data


def phase_steps(
    case: cases.Phase,
    data: dict[str, torch.Tensor],
    *,
    compiled: bool = True,
    make: Callable[[int, str], nn.BatchNorm2d] | None = None,
) -> dict[str, PhaseStep]:
    """Every side of a phase case by name, ours last. `make(channels, act)` builds our module, by default
    bnfast.nn.BatchNormAct2d."""
    torch._dynamo.reset()
    if make is None:
        import bnfast.nn

        def make(channels: int, act: str) -> nn.BatchNorm2d:
            return bnfast.nn.BatchNormAct2d(channels, act=act)

    device = data["x"].device
    sides = {}
    for name, layout in (
        (EAGER_NCHW, torch.contiguous_format),
        (EAGER, torch.channels_last),
        (COMPILED, torch.channels_last),
    ):
        if name != COMPILED or compiled:
            sides[name] = PhaseStep(
                StockBatchNormAct(case.channels, case.act).to(device), data, layout
            )
    if compiled:
        sides[COMPILED].call = torch.compile(sides[COMPILED].module, dynamic=False, fullgraph=True)
    sides[OURS] = PhaseStep(
        make(case.channels, case.act).to(device), data, cases.LAYOUTS[case.layout]
    )
    return sides
