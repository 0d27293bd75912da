"""A converted block against its unconverted self: outputs with their strides, all gradients, the tensors that were handed in,
buffers and the random generator afterwards, in float64."""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import bnfast

RTOL = 1e-9
LAYOUTS = (torch.contiguous_format, torch.channels_last)


def images(*shape: int, seed: int = 1) -> Tensor:
    """Random float64, off centre."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64) + 0.3


def prepare(model: nn.Module, train: str = "bn") -> nn.Module:
    """float64, frozen, and with BatchNorms that do something: random gammas, betas and statistics."""
    model = model.double()
    generator = torch.Generator().manual_seed(5)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            with torch.no_grad():
                for name, low in (("weight", 0.5), ("bias", -0.3), ("running_mean", -0.2)):
                    tensor = getattr(module, name)
                    if tensor is not None:
                        tensor.copy_(
                            low + torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
                        )
                if module.running_var is not None:
                    module.running_var.uniform_(0.5, 1.5, generator=generator)
    return model if train == "keep" else bnfast.freeze(model, train)


def step(
    model: nn.Module,
    inputs: Iterable[Any],
    call: Callable[..., Any] | None = None,
    backward: bool = True,
) -> dict[str, Any]:
    """One forward and backward pass with random upstream gradients; everything to compare, by name.

    The model gets copies of the inputs' tensors that are no leaves, so that it may write to them. Without backward it runs
    under torch.no_grad().
    """
    model.zero_grad(set_to_none=True)
    leaves: list[Tensor] = []
    given: list[Tensor] = []

    def hand_out(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        leaves.append(value.detach().clone().requires_grad_())
        given.append(leaves[-1] * 1)
        assert given[-1].stride() == value.stride()
        return given[-1]

    arguments = tree_map(hand_out, list(inputs))
    torch.manual_seed(7)
    with torch.set_grad_enabled(backward):
        output = model(*arguments) if call is None else call(model, *arguments)
    result: dict[str, Any] = {"random state": torch.rand(3)}
    values = [t for t in tree_leaves(output) if isinstance(t, Tensor)]
    for i, value in enumerate(values):
        result[f"output {i}"] = value.detach().clone()
        # The strides of dimensions of size 1 mean something in NCHW alone: torch itself mixes them in channels_last.
        strict = all(t.is_contiguous() for t in given)
        result[f"strides of output {i}"] = tuple(
            s for s, size in zip(value.stride(), value.shape, strict=True) if strict or size > 1
        )
    for i, value in enumerate(given):
        result[f"tensor {i} that was handed in"] = value.detach().clone()
    values = [t for t in values if t.requires_grad]
    upstream = [images(*t.shape, seed=11 + i) - 0.3 for i, t in enumerate(values)]
    if backward:
        torch.autograd.backward(values, upstream)
    for i, leaf in enumerate(leaves):
        result[f"gradient of input {i}"] = leaf.grad
    for name, parameter in model.named_parameters():
        result[f"gradient of {name}"] = parameter.grad
    for name, buffer in model.named_buffers():
        result[f"buffer {name}"] = buffer.clone()
    return result


def compare(want: dict[str, Any], got: dict[str, Any], where: str = "") -> None:
    """Raises AssertionError where two steps differ."""
    assert want.keys() == got.keys(), where
    gradients = [t for k, t in want.items() if k.startswith("gradient") and t is not None]
    largest = max((t.abs().max().item() for t in gradients if t.numel()), default=1.0)
    for key, expected in want.items():
        actual = got[key]
        if not isinstance(expected, Tensor) or not isinstance(actual, Tensor):
            assert actual == expected if not isinstance(actual, Tensor) else expected is actual, (
                f"{where}: {key}: {actual}, unconverted {expected}"
            )
            continue
        assert actual.shape == expected.shape and actual.dtype == expected.dtype, f"{where}: {key}"
        if not expected.numel():
            continue
        scale = largest if key.startswith("gradient") else max(expected.abs().max().item(), 1e-30)
        error = (actual.double() - expected.double()).abs().max().item()
        assert error <= RTOL * scale, f"{where}: {key}: differs by {error:.3g} at {scale:.3g}"


def agree(
    plain: nn.Module,
    converted: nn.Module,
    *inputs: Any,
    modes: Iterable[bool | None] = (True, False),
    call: Callable[..., Any] | None = None,
    backward: bool = True,
) -> None:
    """Both models on the same inputs, plain NCHW and channels_last, in training and in evaluation mode (None: as it is)."""
    four = any(isinstance(t, Tensor) and t.dim() == 4 for t in tree_leaves(list(inputs)))
    for training in modes:
        for layout in LAYOUTS if four else LAYOUTS[:1]:

            def laid_out(value, layout=layout):
                if isinstance(value, Tensor) and value.dim() == 4:
                    return value.contiguous(memory_format=layout)
                return value

            arguments = tree_map(laid_out, list(inputs))
            if training is not None:
                plain.train(training)
                converted.train(training)
            want = step(plain, arguments, call, backward)
            got = step(converted, arguments, call, backward)
            compare(want, got, f"training={training}, {layout}")


def check(
    model: nn.Module,
    *inputs: Any,
    modes: Iterable[bool | None] = (True, False),
    call: Callable[..., Any] | None = None,
    backward: bool = True,
    train: str = "bn",
    **options: Any,
) -> tuple[nn.Module, nn.Module]:
    """Converts a copy and compares; returns (unconverted, converted)."""
    plain = prepare(model, train)
    converted = bnfast.convert(copy.deepcopy(plain), train="keep", **options)
    agree(plain, converted, *inputs, modes=modes, call=call, backward=backward)
    return plain, converted


def entries(model: nn.Module) -> dict[str, tuple[str | None, str | None]]:
    """explain() as {name of the BatchNorm: (fused as, reason)}."""
    report = bnfast.explain(model)
    return {e.name: (e.fused_as, e.reason) for e in [*report.fused, *report.left]}


def fused(model: nn.Module) -> dict[str, str | None]:
    """explain() as {name of the BatchNorm: fused as}."""
    return {name: kind for name, (kind, _) in entries(model).items()}


class PlanCounter:
    """Counts the calls that plans, and not blocks' own forwards, have answered."""

    def __init__(self, monkeypatch) -> None:
        self.calls = 0
        plain = bnfast.nn.Plan.fitting

        def fitting(plan, block, args):
            modules = plain(plan, block, args)
            self.calls += modules is not None
            return modules

        monkeypatch.setattr(bnfast.nn.Plan, "fitting", fitting)

    def runs(self, model: nn.Module, *inputs: Any) -> bool:
        """Whether plans run on these inputs, in a copy of the model."""
        model = copy.deepcopy(model)
        self.calls = 0
        with torch.no_grad():
            model(*inputs)
        return self.calls > 0
