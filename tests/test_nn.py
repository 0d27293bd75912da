"""The drop-in modules against the torch modules whose places they take."""

import copy
import io
import pickle

import pytest
import torch
from closeness import assert_bit_equal
from torch import Tensor, nn
from torch.nn import functional as F

import bnfast
from bnfast import ops, reference
from bnfast.nn import (
    BatchNormAct1d,
    BatchNormAct2d,
    BatchNormAct3d,
    FrozenConv1d,
    FrozenConv2d,
    FrozenConv3d,
    FrozenConvBNAct2d,
)

ACTIVATIONS = {
    "identity": nn.Identity(),
    "relu": nn.ReLU(),
    "relu6": nn.ReLU6(),
    "leaky_relu": nn.LeakyReLU(0.2),
    "silu": nn.SiLU(),
    "hardswish": nn.Hardswish(),
}
NORMS = {
    "1d_rows": (BatchNormAct1d, nn.BatchNorm1d, (6, 5)),
    "1d": (BatchNormAct1d, nn.BatchNorm1d, (4, 5, 7)),
    "2d": (BatchNormAct2d, nn.BatchNorm2d, (4, 5, 3, 4)),
    "3d": (BatchNormAct3d, nn.BatchNorm3d, (3, 5, 2, 3, 2)),
}
OPTIONS = {
    "default": {},
    "cumulative": {"momentum": None},
    "momentum": {"momentum": 0.7, "eps": 1e-2},
    "momentum_0": {"momentum": 0.0},
    "no_statistics": {"track_running_stats": False},
    "no_statistics_cumulative": {"track_running_stats": False, "momentum": None},
    "no_affine": {"affine": False},
    "nothing": {"affine": False, "track_running_stats": False},
}
every_norm = pytest.mark.parametrize(("ours", "theirs", "shape"), NORMS.values(), ids=NORMS)


class Plain(nn.Module):
    """act(bn(conv(x)) + residual) in torch modules, with the children of FrozenConvBNAct2d."""

    def __init__(self, conv: nn.Module | None, bn: nn.Module, act: str):
        super().__init__()
        self.conv, self.bn, self.act = conv, bn, ACTIVATIONS[act]

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        x = self.bn(x if self.conv is None else self.conv(x))
        return self.act(x if residual is None else x + residual)


def randomise(module: nn.Module) -> nn.Module:
    """Parameters and buffers of a float64 module drawn anew, gammas of both signs."""
    with torch.no_grad():
        for name, t in [*module.named_parameters(), *module.named_buffers()]:
            if name.endswith("running_var"):
                t.copy_(torch.rand(t.shape) + 0.5)
            elif t.is_floating_point():
                t.copy_(torch.randn(t.shape))
    return module


def step(module: nn.Module, x: Tensor, dy: Tensor, residual: Tensor | None = None) -> dict:
    """Output, gradients and state after one forward and backward pass, by name."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    args = (x,)
    if residual is not None:
        residual = residual.detach().clone().requires_grad_()
        args = (x, residual)
    module.zero_grad()
    y = module(*args)
    y.backward(dy.to(y.dtype).expand_as(y))
    found = {"y": y.detach(), "dx": x.grad}
    if residual is not None:
        found["dresidual"] = residual.grad
    found |= {f"grad of {n}": p.grad for n, p in module.named_parameters()}
    return found | {n: b.clone() for n, b in module.named_buffers()}


def assert_same(actual: dict, expected: dict, rtol: float = 1e-9) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        if value is None:
            assert actual[name] is None, name
            continue
        scale = value.abs().max().item() if value.numel() else 0
        torch.testing.assert_close(
            actual[name],
            value,
            rtol=rtol,
            atol=rtol * (1 + scale),
            msg=lambda m, n=name: f"{n}: {m}",
        )


# ---- BatchNormAct ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@every_norm
def test_batch_norm_act_is_batch_norm_then_activation(ours, theirs, shape, options):
    """Three training steps, whose statistics build on each other, then one in evaluation mode."""
    norm = randomise(ours(5, **options, act="relu").double())
    plain = theirs(5, **options).double()
    plain.load_state_dict(norm.state_dict(), strict=True)
    plain = Plain(None, plain, "relu")
    for i in range(4):
        if i == 3:
            norm.eval()
            plain.eval()
        x = torch.randn(shape, dtype=torch.float64) + i
        dy = torch.randn_like(x)
        expected = {
            n.removeprefix("bn.").replace("of bn.", "of "): t for n, t in step(plain, x, dy).items()
        }
        assert_same(step(norm, x, dy), expected)


@pytest.mark.parametrize("act", reference.ACTS)
@pytest.mark.parametrize("has_residual", [False, True], ids=["", "residual"])
@every_norm
def test_each_activation_with_and_without_residual(ours, theirs, shape, has_residual, act):
    norm = randomise(ours(5, act=act, negative_slope=0.2).double())
    plain = theirs(5).double()
    plain.load_state_dict(norm.state_dict())
    x, dy, residual = torch.randn(3, *shape, dtype=torch.float64)
    residual = residual if has_residual else None
    for training in (True, False):
        norm.train(training)
        plain.train(training)
        expected = step(Plain(None, plain, act), x, dy, residual)
        expected = {n.removeprefix("bn.").replace("of bn.", "of "): t for n, t in expected.items()}
        assert_same(step(norm, x, dy, residual), expected)


@pytest.mark.parametrize(
    "shape", [(5, 1, 1), (1, 5, 3, 4), (4, 1, 3, 4), (4, 5, 1, 4), (3, 4)], ids=str
)
def test_residual_that_broadcasts(shape):
    """Added as PyTorch adds it, in both directions."""
    norm = randomise(BatchNormAct2d(5).double())
    plain = nn.BatchNorm2d(5).double()
    plain.load_state_dict(norm.state_dict())
    x, dy = torch.randn(2, 4, 5, 3, 4, dtype=torch.float64)
    residual = torch.randn(shape, dtype=torch.float64)
    ours, theirs = step(norm, x, dy, residual), step(Plain(None, plain, "relu"), x, dy, residual)
    assert_same(
        ours, {n.removeprefix("bn.").replace("of bn.", "of "): t for n, t in theirs.items()}
    )


def test_residual_larger_than_the_output():
    norm = randomise(BatchNormAct2d(5).double())
    plain = Plain(None, nn.BatchNorm2d(5).double(), "relu")
    plain.bn.load_state_dict(norm.state_dict())
    x = torch.randn(1, 5, 3, 4, dtype=torch.float64)
    residual = torch.randn(4, 5, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(norm(x, residual), plain(x, residual))


@pytest.mark.parametrize(("x_dtype", "residual_dtype"), [
    (torch.float32, torch.float64), (torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)
], ids=str)  # fmt: skip
def test_residual_of_another_dtype_promotes_as_in_pytorch(x_dtype, residual_dtype):
    norm, plain = BatchNormAct2d(5), Plain(None, nn.BatchNorm2d(5), "relu")
    x = torch.randn(4, 5, 3, 4).to(x_dtype)
    residual = torch.randn(4, 5, 3, 4).to(residual_dtype)
    ours, theirs = norm(x, residual), plain(x, residual)
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2)


def test_residual_that_does_not_broadcast_is_refused():
    x = torch.randn(4, 5, 3, 4)
    with pytest.raises(RuntimeError, match="must match the size"):
        BatchNormAct2d(5)(x, torch.randn(4, 5, 3, 3))


@every_norm
def test_wrong_dimensions_and_channels_are_refused_as_in_pytorch(ours, theirs, shape):
    for wrong in (torch.randn(5), torch.randn(2, 5, 2, 2, 2, 2), torch.randn(4, 6, *shape[2:])):
        with pytest.raises((ValueError, RuntimeError)) as expected:
            theirs(5)(wrong)
        with pytest.raises(expected.type):
            ours(5)(wrong)


def test_one_value_per_channel():
    norm = BatchNormAct2d(5)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        norm(torch.randn(1, 5, 1, 1))
    norm.eval()(torch.randn(1, 5, 1, 1))


@every_norm
def test_state_dict_keys_are_those_of_pytorch(ours, theirs, shape):
    for options in OPTIONS.values():
        assert list(ours(5, **options).state_dict()) == list(theirs(5, **options).state_dict())
    plain = randomise(theirs(5))
    norm = ours(5)
    norm.load_state_dict(plain.state_dict(), strict=True)
    plain.load_state_dict(norm.state_dict(), strict=True)
    assert isinstance(norm, theirs)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
def test_batch_norm_act_copies(how):
    norm = randomise(BatchNormAct2d(5, eps=1e-3, act="leaky_relu", negative_slope=0.2).double())
    twin = duplicate(norm, how)
    assert (type(twin), twin.act, twin.negative_slope, twin.eps) == (
        BatchNormAct2d,
        "leaky_relu",
        0.2,
        1e-3,
    )
    assert twin.weight is not norm.weight
    x, dy = torch.randn(2, 4, 5, 3, 4, dtype=torch.float64)
    assert_same(step(twin, x, dy), step(norm, x, dy), rtol=0)


def duplicate(module: nn.Module, how: str) -> nn.Module:
    if how == "deepcopy":
        return copy.deepcopy(module)
    if how == "pickle":
        return pickle.loads(pickle.dumps(module))
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def test_repr_shows_the_activation():
    plain = repr(nn.BatchNorm2d(5)).replace("BatchNorm2d", "BatchNormAct2d")
    assert repr(BatchNormAct2d(5, act="silu")) == plain.removesuffix(")") + ", act='silu')"
    assert "act" not in repr(BatchNormAct1d(5, act="identity"))
    unit = FrozenConvBNAct2d(3, 5, 3, act="relu6")
    assert "act='relu6'" in repr(unit) and "(conv): FrozenConv2d(3, 5" in repr(unit)
    assert "(bn): BatchNormAct2d(5" in repr(unit)


@pytest.mark.parametrize("make", [
    lambda: BatchNormAct1d(5, act="gelu"),
    lambda: BatchNormAct3d(5, act="gelu"),
    lambda: FrozenConvBNAct2d(3, 5, 3, act="gelu"),
    lambda: FrozenConvBNAct2d.from_modules(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), act="gelu"),
])  # fmt: skip
def test_unknown_activation_is_refused(make):
    with pytest.raises(ValueError, match="act is 'gelu'; allowed are 'identity', 'relu'"):
        make()


# ---- FrozenConv --------------------------------------------------------------------------------------------------------


CONVS = {
    "plain": dict(kernel_size=3, padding=1),
    "bias": dict(kernel_size=3, padding=1, bias=True),
    "stride": dict(kernel_size=3, stride=2, padding=1),
    "grouped": dict(kernel_size=3, groups=2, padding=1),
    "depthwise_stride": dict(kernel_size=3, stride=2, padding=1, groups=4),
    "pointwise_stride": dict(kernel_size=1, stride=2),
    "dilated": dict(kernel_size=3, dilation=2, padding=2),
    "wide_padding": dict(kernel_size=3, padding=4),
    "valid": dict(kernel_size=3, padding="valid"),
    "same": dict(kernel_size=3, padding="same"),
    "same_dilated": dict(kernel_size=3, padding="same", dilation=2),
    "same_asymmetric": dict(kernel_size=2, padding="same"),
    "reflect": dict(kernel_size=3, padding=1, padding_mode="reflect"),
    "circular": dict(kernel_size=3, padding=1, padding_mode="circular"),
    "replicate_same": dict(kernel_size=3, padding="same", padding_mode="replicate"),
}  # fmt: skip
CONV_CLASSES = {
    1: (FrozenConv1d, nn.Conv1d, (3, 4, 9)),
    2: (FrozenConv2d, nn.Conv2d, (3, 4, 8, 9)),
    3: (FrozenConv3d, nn.Conv3d, (2, 4, 5, 6, 7)),
}


@pytest.mark.parametrize("options", CONVS.values(), ids=CONVS)
@pytest.mark.parametrize("dims", CONV_CLASSES)
def test_frozen_conv_is_conv(dims, options):
    ours, theirs, shape = CONV_CLASSES[dims]
    options = {"bias": False} | options
    conv = ours(4, 8, **options).double().requires_grad_(False)
    plain = theirs(4, 8, **options).double().requires_grad_(False)
    plain.load_state_dict(conv.state_dict(), strict=True)
    x = torch.randn(shape, dtype=torch.float64)
    with torch.no_grad():
        dy = torch.randn_like(plain(x))
    assert_same(step(conv, x, dy), step(plain, x, dy))
    if dims == 2:
        x = x.contiguous(memory_format=torch.channels_last)
        ours, theirs = step(conv, x, dy), step(plain, x, dy)
        assert_same(ours, theirs)
        assert ours["y"].stride() == theirs["y"].stride()


@pytest.mark.parametrize("mode", ["zeros", "reflect"])
def test_frozen_conv_saves_no_input(mode):
    """Where PyTorch itself keeps it; other paddings run as PyTorch's own."""
    conv = FrozenConv2d(4, 8, 3, padding=1, padding_mode=mode).requires_grad_(False)
    x = torch.randn(2, 4, 5, 6).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.shape) or t, lambda t: t
    ):
        y = conv(x)
    wanted = [conv.weight.shape] if mode == "zeros" else None
    assert wanted is None or saved == wanted
    assert y.requires_grad


@pytest.mark.parametrize("dims", CONV_CLASSES)
def test_unbatched_convolution(dims):
    ours, theirs, shape = CONV_CLASSES[dims]
    conv = ours(4, 8, 3).double().requires_grad_(False)
    plain = theirs(4, 8, 3).double().requires_grad_(False)
    plain.load_state_dict(conv.state_dict())
    x = torch.randn(shape[1:], dtype=torch.float64)
    with torch.no_grad():
        dy = torch.randn_like(plain(x))
    assert_same(step(conv, x, dy), step(plain, x, dy))


@pytest.mark.parametrize("part", ["weight", "bias", "both"])
def test_unfrozen_later_trains(part):
    """A weight or bias that needs a gradient gets the right one, from the next call on; and no more once frozen again."""
    conv = FrozenConv2d(4, 8, 3, padding=1).double().requires_grad_(False)
    plain = nn.Conv2d(4, 8, 3, padding=1).double().requires_grad_(False)
    plain.load_state_dict(conv.state_dict())
    x, dy = (
        torch.randn(2, 4, 6, 7, dtype=torch.float64),
        torch.randn(2, 8, 6, 7, dtype=torch.float64),
    )
    step(conv, x, dy)
    for module in (conv, plain):
        for name in ("weight", "bias") if part == "both" else (part,):
            getattr(module, name).requires_grad_()
    for _ in range(3):
        ours, theirs = step(conv, x, dy), step(plain, x, dy)
        assert_same(ours, theirs)
        with torch.no_grad():
            for module, found in ((conv, ours), (plain, theirs)):
                for name, parameter in module.named_parameters():
                    if parameter.requires_grad:
                        parameter -= 0.1 * found[f"grad of {name}"]
    for module in (conv, plain):
        module.requires_grad_(False)
    # The weight changed while it was trained: the transform that the backward pass uses is made again.
    assert_same(step(conv, x, dy), step(plain, x, dy))


# ---- FrozenConvBNAct2d -------------------------------------------------------------------------------------------------


def unit_pair(act="relu", **options) -> tuple[FrozenConvBNAct2d, Plain]:
    options = {"kernel_size": 3, "padding": 1, "bias": False} | options
    conv = nn.Conv2d(4, 8, **options).requires_grad_(False)
    plain = randomise(Plain(conv, nn.BatchNorm2d(8), act).double())
    twin = copy.deepcopy(plain)
    return FrozenConvBNAct2d.from_modules(twin.conv, twin.bn, act, negative_slope=0.2), plain


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("has_residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("options", CONVS.values(), ids=CONVS)
def test_unit_is_conv_bn_act(options, has_residual, training):
    ours, theirs = unit_pair("silu", **options)
    x = torch.randn(3, 4, 8, 9, dtype=torch.float64)
    with torch.no_grad():
        dy = torch.randn_like(copy.deepcopy(theirs)(x))
    residual = torch.randn_like(dy) if has_residual else None
    ours.train(training)
    theirs.train(training)
    for layout in (torch.contiguous_format, torch.channels_last):
        x = x.contiguous(memory_format=layout)
        assert_same(step(ours, x, dy, residual), step(theirs, x, dy, residual))


@pytest.mark.parametrize("act", reference.ACTS)
@pytest.mark.parametrize("has_residual", [False, True], ids=["", "residual"])
def test_unit_with_each_activation(act, has_residual):
    ours, theirs = unit_pair(act)
    x, dy = (
        torch.randn(3, 4, 6, 7, dtype=torch.float64),
        torch.randn(3, 8, 6, 7, dtype=torch.float64),
    )
    residual = torch.randn_like(dy) if has_residual else None
    assert_same(step(ours, x, dy, residual), step(theirs, x, dy, residual))


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 6, 7), (3, 1, 6, 7)], ids=str)
def test_unit_with_residual_that_broadcasts(shape):
    ours, theirs = unit_pair()
    x, dy = (
        torch.randn(3, 4, 6, 7, dtype=torch.float64),
        torch.randn(3, 8, 6, 7, dtype=torch.float64),
    )
    residual = torch.randn(shape, dtype=torch.float64)
    assert_same(step(ours, x, dy, residual), step(theirs, x, dy, residual))


def test_unit_with_residual_of_another_dtype_under_autocast():
    """A float32 residual meets a bf16 convolution: the sum is float32, as in PyTorch."""
    ours, theirs = unit_pair()
    ours, theirs = ours.float(), theirs.float()
    x, residual = torch.randn(3, 4, 6, 7), torch.randn(3, 8, 6, 7)
    for r in (residual, residual.bfloat16()):
        with torch.autocast("cpu", torch.bfloat16):
            actual, expected = ours(x, r), theirs(x, r)
        assert actual.dtype == expected.dtype
        torch.testing.assert_close(actual, expected, rtol=2e-2, atol=5e-2)


def test_unit_unfrozen_later_trains():
    ours, theirs = unit_pair()
    x, dy = (
        torch.randn(3, 4, 6, 7, dtype=torch.float64),
        torch.randn(3, 8, 6, 7, dtype=torch.float64),
    )
    step(ours, x, dy)
    step(theirs, x, dy)
    for module in (ours, theirs):
        module.conv.weight.requires_grad_()
    found = step(ours, x, dy)
    assert found["grad of conv.weight"] is not None
    assert_same(found, step(theirs, x, dy))


def test_unbatched_input_is_refused_as_in_pytorch():
    """nn.Conv2d takes [C, H, W], nn.BatchNorm2d does not: the result must not be taken for [N, C, L]."""
    ours, theirs = unit_pair()
    x = torch.randn(
        4, 8, 7, dtype=torch.float64
    )  # H is the number of channels behind the convolution
    with pytest.raises(ValueError, match=r"expected 4D input \(got 3D input\)"):
        theirs(x)
    with pytest.raises(ValueError, match=r"expected 4D input \(got 3D input\)"):
        ours(x)


def test_unit_made_by_hand():
    unit = FrozenConvBNAct2d(
        4, 8, 3, stride=2, padding=1, groups=2, act="leaky_relu", negative_slope=0.2
    )
    assert not unit.conv.weight.requires_grad and unit.conv.bias is None
    assert unit.bn.weight.requires_grad
    assert isinstance(unit.conv, nn.Conv2d) and isinstance(unit.bn, nn.BatchNorm2d)
    assert list(unit.state_dict()) == [
        "conv.weight",
        *(
            f"bn.{n}"
            for n in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
        ),
    ]
    plain = Plain(nn.Conv2d(4, 8, 3, 2, 1, groups=2, bias=False), nn.BatchNorm2d(8), "leaky_relu")
    plain.requires_grad_(False).bn.requires_grad_()
    plain.load_state_dict(unit.state_dict(), strict=True)
    x, dy = (
        torch.randn(3, 4, 6, 8, dtype=torch.float64),
        torch.randn(3, 8, 3, 4, dtype=torch.float64),
    )
    assert_same(step(unit.double(), x, dy), step(plain.double(), x, dy))


def test_from_modules_keeps_the_objects():
    conv, bn = nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8)
    unit = FrozenConvBNAct2d.from_modules(conv, bn)
    assert unit.conv is conv and unit.bn is bn and unit.act == "relu"
    assert not conv.weight.requires_grad and not conv.bias.requires_grad and bn.weight.requires_grad


@pytest.mark.parametrize(("conv", "bn", "error", "words"), [
    (nn.Linear(4, 8), nn.BatchNorm2d(8), TypeError, "conv is a Linear; an nn.Conv2d is needed"),
    (nn.Conv2d(4, 8, 3), nn.BatchNorm1d(8), TypeError, "bn is a BatchNorm1d; an nn.BatchNorm2d is needed"),
    (nn.Conv2d(4, 8, 3), nn.BatchNorm2d(4), ValueError, "bn has 4 features; conv has 8 output channels"),
])  # fmt: skip
def test_from_modules_refuses_what_does_not_fit(conv, bn, error, words):
    with pytest.raises(error, match=words):
        FrozenConvBNAct2d.from_modules(conv, bn)
    assert all(p.requires_grad for p in conv.parameters()), "something was changed before the error"


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
def test_unit_copies(how):
    ours, _ = unit_pair("hardswish")
    x, dy = (
        torch.randn(3, 4, 6, 7, dtype=torch.float64),
        torch.randn(3, 8, 6, 7, dtype=torch.float64),
    )
    twin = duplicate(ours, how)
    assert (type(twin), twin.act, twin.conv.weight.requires_grad) == (
        FrozenConvBNAct2d,
        "hardswish",
        False,
    )
    assert_same(step(twin, x, dy), step(ours, x, dy), rtol=0)
    with torch.no_grad():
        twin.conv.weight.neg_()
    dx = step(ours, x, dy)["dx"]
    assert bool((dx - step(twin, x, dy)["dx"]).abs().max() > 1e-3)


def test_chain_of_units_equals_torch():
    """A residual block written by hand, three steps of SGD on gamma and beta."""

    class Block(nn.Module):
        def __init__(self, first, second, third):
            super().__init__()
            self.first, self.second, self.third = first, second, third

        def forward(self, x):
            y = self.first(x)
            return self.third(self.second(y), y)

    ours, theirs = zip(unit_pair(), unit_pair(), unit_pair("silu"), strict=True)
    widen = [
        nn.Conv2d(8, 8, 3, padding=1, bias=False).double().requires_grad_(False) for _ in range(2)
    ]
    for pair in (ours, theirs):
        for unit, conv in zip(pair[1:], widen, strict=True):
            unit.conv = copy.deepcopy(conv)
    ours, theirs = Block(*ours), Block(*theirs)
    x, dy = (
        torch.randn(3, 4, 6, 7, dtype=torch.float64),
        torch.randn(3, 8, 6, 7, dtype=torch.float64),
    )
    for _ in range(3):
        found, expected = step(ours, x, dy), step(theirs, x, dy)
        assert_same(found, expected)
        with torch.no_grad():
            for module, grads in ((ours, found), (theirs, expected)):
                for name, parameter in module.named_parameters():
                    if parameter.requires_grad:
                        parameter -= 0.1 * grads[f"grad of {name}"]


def test_to_half_and_back():
    unit, plain = unit_pair("identity")
    unit, plain = unit.bfloat16().eval(), plain.bfloat16().eval()
    x = torch.randn(3, 4, 6, 7).bfloat16()
    torch.testing.assert_close(unit(x), plain(x), rtol=5e-2, atol=5e-2)
    # The cached transforms follow the weight back to float64.
    unit, plain = unit.double().train(), plain.double().train()
    dy = torch.randn(3, 8, 6, 7, dtype=torch.float64)
    assert_same(step(unit, x.double(), dy), step(plain, x.double(), dy))


def test_forced_backend_reaches_modules():
    """use_backend decides for modules too; both backends give the same."""
    unit, _ = unit_pair()
    x, dy = (
        torch.randn(3, 4, 6, 7, dtype=torch.float64),
        torch.randn(3, 8, 6, 7, dtype=torch.float64),
    )
    found = []
    for name, available in bnfast.backends().items():
        if available is True:
            with bnfast.use_backend(name):
                found.append(step(copy.deepcopy(unit), x, dy))
    for other in found[1:]:
        assert_same(other, found[0])


def test_hooks_on_the_children_see_the_fused_unit_as_one():
    """The children of a unit are not called one by one: their hooks do not fire, the unit's own do."""
    unit, _ = unit_pair()
    calls = []
    unit.register_forward_hook(lambda m, args, out: calls.append(out.shape))
    unit(torch.randn(3, 4, 6, 7, dtype=torch.float64))
    assert calls == [(3, 8, 6, 7)]


def test_inference_mode_and_no_grad():
    ours, theirs = unit_pair()
    x = torch.randn(3, 4, 6, 7, dtype=torch.float64)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            actual, expected = ours(x), theirs(x)
        torch.testing.assert_close(actual, expected)
        assert actual.is_inference() == expected.is_inference()
        assert_bit_equal(ours.bn.num_batches_tracked, theirs.bn.num_batches_tracked, "counter")
    torch.testing.assert_close(ours.bn.running_var, theirs.bn.running_var)


def test_functional_form_and_module_are_the_same():
    unit, _ = unit_pair("relu6")
    x = torch.randn(3, 4, 6, 7, dtype=torch.float64)
    bn = unit.bn
    direct = ops.frozen_conv_bn_act(
        x, [ops.Unit(unit.conv.weight, None, (1, 1), (1, 1), (1, 1), gamma=bn.weight, beta=bn.bias, act="relu6")]
    )  # fmt: skip
    assert_bit_equal(unit(x), direct, "y")
    assert_bit_equal(F.relu6(direct), direct, "y")
