"""convert, revert and explain on small blocks: what is fused, what is left, and that neither changes results or the model."""

import copy
import io
import itertools
import json
import pickle

import pytest
import torch
from agreement import PlanCounter, agree, check, compare, entries, fused, images, prepare, step
from torch import nn
from torch.nn import functional as F

import bnfast
from bnfast import native, pointwise, winograd
from bnfast.measure import saved_activation_bytes

needs_native = pytest.mark.skipif(native.unavailable is not None, reason=str(native.unavailable))


class Block(nn.Module):
    """conv, bn, conv, bn around a shortcut; the tails are given as functions of (block, value[, x])."""

    def __init__(self, tail=None, end=None, channels=6):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 5, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(5)
        self.conv2 = nn.Conv2d(5, channels, 1)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.tail = tail or _relu_module
        self.end = end or _add_then_relu

    def forward(self, x):
        y = self.tail(self, self.bn1(self.conv1(x)))
        return self.end(self, self.bn2(self.conv2(y)), x)


def _relu_module(block, y):
    return block.relu(y)


def _add_then_relu(block, y, x):
    return block.relu(y + x)


def _iadd(block, y, x):
    y += x
    return block.relu(y)


TAILS = {
    "nothing": (lambda block, y: y, "conv+bn"),
    "module": (_relu_module, "conv+bn+relu"),
    "F.relu": (lambda block, y: F.relu(y), "conv+bn+relu"),
    "F.relu in place": (lambda block, y: F.relu(y, inplace=True), "conv+bn+relu"),
    "F.relu in place by position": (lambda block, y: F.relu(y, True), "conv+bn+relu"),
    "F.relu_": (lambda block, y: F.relu_(y), "conv+bn+relu"),
    "torch.relu": (lambda block, y: torch.relu(y), "conv+bn+relu"),
    "torch.relu_": (lambda block, y: torch.relu_(y), "conv+bn+relu"),
    "y.relu": (lambda block, y: y.relu(), "conv+bn+relu"),
    "y.relu_": (lambda block, y: y.relu_(), "conv+bn+relu"),
    "F.relu6": (lambda block, y: F.relu6(y), "conv+bn+relu6"),
    "F.leaky_relu": (lambda block, y: F.leaky_relu(y, 0.3), "conv+bn+leaky_relu"),
    "F.leaky_relu by name": (
        lambda block, y: F.leaky_relu(y, inplace=True, negative_slope=0.3),
        "conv+bn+leaky_relu",
    ),
    "F.leaky_relu_": (lambda block, y: F.leaky_relu_(y, 0.2), "conv+bn+leaky_relu"),
    "F.leaky_relu alone": (lambda block, y: F.leaky_relu(y), "conv+bn+leaky_relu"),
    "F.silu": (lambda block, y: F.silu(y), "conv+bn+silu"),
    "F.silu in place": (lambda block, y: F.silu(y, inplace=True), "conv+bn+silu"),
    "F.hardswish": (lambda block, y: F.hardswish(y), "conv+bn+hardswish"),
    "torch.sigmoid": (lambda block, y: torch.sigmoid(y), "conv+bn"),
    "F.gelu": (lambda block, y: F.gelu(y), "conv+bn"),
    "y * 2": (lambda block, y: y * 2, "conv+bn"),
    "two relus": (lambda block, y: F.relu(F.relu6(y)), "conv+bn+relu6"),
}


@pytest.mark.parametrize("name", TAILS)
def test_activations_behind_a_norm(name):
    tail, kind = TAILS[name]
    _, converted = check(Block(tail), images(2, 6, 5, 4))
    assert fused(converted)["bn1"] == kind


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    ("act", "kind"),
    [
        (nn.ReLU(), "relu"),
        (nn.ReLU6(), "relu6"),
        (nn.LeakyReLU(0.25), "leaky_relu"),
        (nn.SiLU(), "silu"),
        (nn.Hardswish(), "hardswish"),
    ],
)
def test_activation_modules(act, kind, inplace):
    act = copy.deepcopy(act)
    act.inplace = inplace
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), act, nn.Conv2d(4, 3, 1), nn.BatchNorm2d(3)
    )
    _, converted = check(model, images(2, 3, 6, 5))
    assert fused(converted) == {"1": f"conv+bn+{kind}", "4": "conv+bn"}


ENDS = {
    "y + x, relu": (_add_then_relu, "conv+bn+add+relu"),
    "x + y, relu": (lambda block, y, x: F.relu(x + y), "conv+bn+add+relu"),
    "y += x, relu": (_iadd, "conv+bn+add+relu"),
    "torch.add(y, x), relu": (lambda block, y, x: torch.add(y, x).relu_(), "conv+bn+add+relu"),
    "torch.add(x, y), relu": (lambda block, y, x: torch.add(x, y).relu_(), "conv+bn+add+relu"),
    "y.add(x), relu": (lambda block, y, x: y.add(x).relu(), "conv+bn+add+relu"),
    "x.add(y), relu": (lambda block, y, x: x.add(y).relu(), "conv+bn+add+relu"),
    "y.add_(x), relu": (lambda block, y, x: y.add_(x).relu_(), "conv+bn+add+relu"),
    "y + x": (lambda block, y, x: y + x, "conv+bn+add"),
    "y + x, silu": (lambda block, y, x: F.silu(y + x), "conv+bn+add+silu"),
    "y + x, hardswish": (lambda block, y, x: F.hardswish(y + x), "conv+bn+add+hardswish"),
    "y + x, leaky_relu": (lambda block, y, x: F.leaky_relu(y + x, 0.2), "conv+bn+add+leaky_relu"),
    "y + x, relu6": (lambda block, y, x: F.relu6(y + x), "conv+bn+add+relu6"),
    "relu, + x": (lambda block, y, x: F.relu(y) + x, "conv+bn+relu"),
    "y + x + x": (lambda block, y, x: y + x + x, "conv+bn+add"),
    "y + y": (lambda block, y, x: y + y, "conv+bn"),
    "y + 2": (lambda block, y, x: y + 2, "conv+bn"),
    "2 + y": (lambda block, y, x: 2 + y, "conv+bn"),
    "torch.add(alpha)": (lambda block, y, x: torch.add(y, x, alpha=3), "conv+bn"),
    "y.add(alpha)": (lambda block, y, x: y.add(x, alpha=3), "conv+bn"),
    "y + a number of x": (lambda block, y, x: y + x.size(1), None),
    "y + a scalar tensor": (lambda block, y, x: y + x.mean(), None),
    "y + a row of x": (lambda block, y, x: F.relu(y + x.mean((2, 3), keepdim=True)), None),
    "y += a row of x": (lambda block, y, x: y.add_(x[:, :, :1]).relu_(), None),
    "y + something larger": (lambda block, y, x: F.relu(y + torch.stack([x, x])), None),
    "x of another dtype": (lambda block, y, x: F.relu(y + x.float()), None),
    "add read twice": (lambda block, y, x: (y + x, F.relu(y - x)), "conv+bn"),
    "relu of a sum that is read twice": (
        lambda block, y, x: (lambda s: (s, F.relu(s)))(y + x),
        "conv+bn+add",
    ),
    "a buffer-free view": (lambda block, y, x: F.relu(y + x).flatten(1), "conv+bn+add+relu"),
    ".view behind it": (lambda block, y, x: (y + x).reshape(x.size(0), -1), "conv+bn+add"),
    "y - x": (lambda block, y, x: F.relu(y - x), "conv+bn"),
    "y * x": (lambda block, y, x: F.relu(y * x), "conv+bn"),
    "y in a cat": (lambda block, y, x: torch.cat([x, y], 1), "conv+bn"),
    "a dictionary": (lambda block, y, x: {"a": F.relu(y + x), "b": [x, 3]}, "conv+bn+add+relu"),
}


@pytest.mark.parametrize("name", ENDS)
def test_additions_behind_a_norm(name):
    end, kind = ENDS[name]
    _, converted = check(Block(end=end), images(2, 6, 5, 4))
    assert kind is None or fused(converted)["bn2"] == kind


def test_two_norms_meet_in_one_addition():
    class Down(Block):
        def __init__(self):
            super().__init__()
            self.down = nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6))

        def forward(self, x):
            y = self.relu(self.bn1(self.conv1(x)))
            return self.relu(self.bn2(self.conv2(y)) + self.down(x))

    _, converted = check(Down(), images(2, 6, 5, 4))
    kinds = fused(converted)
    assert kinds["bn1"] == "conv+bn+relu"
    assert sorted([kinds["bn2"], kinds["down.1"]]) == ["conv+bn", "conv+bn+add+relu"]


class PreActivation(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, 2, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(4, 6, 1, 2)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        a = self.relu(self.bn1(x))
        return self.conv2(self.relu(self.bn2(self.conv1(a)))) + self.shortcut(a)


def test_norm_in_front_of_a_convolution():
    _, converted = check(PreActivation(), images(2, 4, 6, 6))
    assert fused(converted) == {"bn1": "bn+relu", "bn2": "conv+bn+relu"}
    check(nn.Sequential(PreActivation(), nn.BatchNorm2d(6), nn.ReLU()), images(2, 4, 6, 6))


@pytest.mark.parametrize(
    ("layers", "shape"),
    [
        ((nn.Conv1d(3, 5, 3, padding="same"), nn.BatchNorm1d(5), nn.ReLU()), (4, 3, 9)),
        ((nn.Conv3d(2, 4, 3, padding=1), nn.BatchNorm3d(4), nn.SiLU()), (2, 2, 3, 4, 5)),
        ((nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(inplace=True)), (7, 6)),
        (
            (nn.Conv1d(3, 5, 1), nn.BatchNorm1d(5), nn.ReLU(), nn.Flatten(), nn.Linear(20, 3)),
            (4, 3, 4),
        ),
        ((nn.Linear(6, 5), nn.BatchNorm1d(4), nn.ReLU()), (3, 4, 6)),
        ((nn.Conv2d(4, 6, 3, groups=2, dilation=2), nn.BatchNorm2d(6), nn.ReLU6()), (2, 4, 7, 6)),
        ((nn.Conv2d(4, 4, (3, 1), stride=(2, 1), groups=4), nn.BatchNorm2d(4)), (2, 4, 7, 6)),
        ((nn.Conv2d(3, 4, 3, padding="valid"), nn.BatchNorm2d(4, momentum=None)), (2, 3, 5, 5)),
        ((nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)), (2, 3, 5, 5)),
        (
            (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False), nn.ReLU(), nn.BatchNorm2d(4)),
            (2, 3, 5, 5),
        ),
        (
            (nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 1, 3), nn.BatchNorm2d(1)),
            (2, 1, 6, 6),
        ),
        ((nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()), (5, 3, 1, 1)),
        ((nn.Conv2d(3, 4, 3, padding=2), nn.BatchNorm2d(4), nn.ReLU()), (5, 3, 1, 1)),
        ((nn.Conv2d(3, 4, 4), nn.BatchNorm2d(4), nn.ReLU()), (5, 3, 4, 4)),
        ((nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()), (1, 3, 4, 4)),
        ((nn.ConvTranspose2d(3, 4, 2), nn.BatchNorm2d(4), nn.ReLU()), (2, 3, 4, 4)),
        ((nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), nn.BatchNorm2d(4)), (2, 3, 4, 4)),
        ((nn.Conv2d(3, 4, 2, padding="same"), nn.BatchNorm2d(4), nn.ReLU()), (2, 3, 4, 4)),
    ],
    ids=str,
)
def test_kinds_of_convolutions(layers, shape):
    _, converted = check(nn.Sequential(*copy.deepcopy(layers)), images(*shape))
    assert fused(converted)["1"] is not None
    kind, reason = entries(converted)["1"]
    if layers[0].__class__ is nn.ConvTranspose2d:
        assert kind == "bn+relu" and "ConvTranspose2d" in reason
    elif getattr(layers[0], "padding_mode", "zeros") != "zeros":
        assert kind == "bn" and "padding_mode='circular'" in reason
    elif layers[0].__class__ is nn.Conv2d and layers[0].kernel_size == (2, 2):
        assert kind == "bn+relu" and "padding='same'" in reason
    else:
        assert kind.startswith("conv+bn")


def test_one_relu_at_several_places():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.relu = nn.ReLU()
            self.a, self.b = Block(), Block()
            self.a.relu = self.b.relu = self.relu
            self.conv, self.bn = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)

        def forward(self, x):
            return self.relu(self.b(self.relu(self.bn(self.conv(self.a(x))))))

    _, converted = check(Net(), images(2, 6, 5, 4))
    assert set(fused(converted).values()) == {"conv+bn+relu", "conv+bn+add+relu"}


class DenseLayer(nn.Module):
    """Takes a tensor or a list of tensors, as DenseNet's does."""

    def __init__(self, channels):
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(channels), nn.Conv2d(channels, 6, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(6), nn.Conv2d(6, 2, 3, 1, 1, bias=False)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, input):
        previous = [input] if isinstance(input, torch.Tensor) else input
        y = self.conv1(self.relu(self.norm1(torch.cat(previous, 1))))
        return self.conv2(self.relu(self.norm2(y)))


class DenseBlock(nn.ModuleDict):
    def __init__(self):
        super().__init__({"a": DenseLayer(3), "b": DenseLayer(5), "c": DenseLayer(7)})

    def forward(self, x):
        features = [x]
        for layer in self.values():
            features.append(layer(features))
        return torch.cat(features, 1)


def test_layer_that_takes_a_list_or_a_tensor():
    layer = DenseLayer(5)
    _, converted = check(layer, images(2, 5, 4, 4))
    assert fused(converted) == {"norm1": "bn+relu", "norm2": "conv+bn+relu"}
    plain, converted = check(DenseLayer(5), [images(2, 3, 4, 4), images(2, 2, 4, 4, seed=2)])
    agree(plain, converted, images(2, 5, 4, 4))
    agree(plain, converted, (images(2, 3, 4, 4), images(2, 2, 4, 4, seed=2)))
    _, converted = check(DenseBlock(), images(2, 3, 4, 4))
    assert set(fused(converted).values()) == {"bn+relu", "conv+bn+relu"}


def test_addition_of_quantizable_models():
    class Quantizable(Block):
        def __init__(self):
            super().__init__()
            self.sum = torch.ao.nn.quantized.FloatFunctional()

        def forward(self, x):
            y = self.relu(self.bn1(self.conv1(x)))
            return self.relu(self.sum.add(self.bn2(self.conv2(y)), x))

    _, converted = check(Quantizable(), images(2, 6, 5, 4))
    assert fused(converted) == {"bn1": "conv+bn+relu", "bn2": "conv+bn+add+relu"}


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("resnet10t", {"bn1": "conv+bn+relu+maxpool", "layer1.0.bn2": "conv+bn+add+relu"}),
        ("test_efficientnet", {"bn1": "conv+bn+silu"}),
        ("mobilenetv3_small_050", {"bn1": "conv+bn+hardswish", "blocks.0.0.bn2": "se+conv+bn"}),
        ("tf_efficientnet_b0", {"bn1": "bn+silu"}),
    ],
)
def test_timm(name, kinds):
    timm = pytest.importorskip("timm")
    model = timm.create_model(name, pretrained=False, num_classes=5, drop_rate=0.0)
    plain = prepare(model)
    converted = bnfast.convert(plain, train="keep")
    agree(plain, converted, images(3, 3, 40, 40), modes=(True,) if "b0" in name else (True, False))
    found = fused(converted)
    assert None not in found.values()
    assert {key: found[key] for key in kinds} == kinds
    assert list(converted.state_dict()) == list(plain.state_dict())
    bnfast.revert(converted)
    assert [type(m) for m in converted.modules()] == [type(m) for m in plain.modules()]


# ---- left ----------------------------------------------------------------------------------------------------------------


class Left(nn.Module):
    """conv, bn, relu, run as `body(block, x)` says."""

    def __init__(self, body, conv=nn.Conv2d, norm=nn.BatchNorm2d):
        super().__init__()
        self.conv, self.bn, self.relu = conv(4, 4, 3, padding=1), norm(4), nn.ReLU(inplace=True)
        self.body = body

    def forward(self, x):
        return self.body(self, x)


def _plain_body(b, x):
    return b.relu(b.bn(b.conv(x)))


class OwnConv(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * 2


class OwnNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) * 2


def _second_reader_of_conv(b, x):
    z = b.conv(x)
    return b.relu(b.bn(z)) + z


def _twice(b, x):
    return b.bn(b.relu(b.bn(b.conv(x))))


def _assigns(b, x):
    b.seen = x.shape[0]
    return _plain_body(b, x)


def _depends_on_data(b, x):
    return _plain_body(b, x if x.sum() > 0 else -x)


def _python_random(b, x):
    import random

    return _plain_body(b, x) * (1 if random.random() < 2 else 3)


def _numpy_random(b, x):
    import numpy

    return _plain_body(b, x) * (1 if numpy.random.rand() < 2 else 3)


def _torch_rand(b, x):
    return _plain_body(b, x) + torch.rand(1)


def _reads_something(b, x):
    return _plain_body(b, x * b.factor)


def _two_norms(b, x):
    z = b.conv(x)
    return b.relu(b.bn(z)), z


@pytest.mark.parametrize(
    ("body", "kind", "words"),
    [
        (_second_reader_of_conv, "bn+relu", "the convolution's output has another reader"),
        (_two_norms, "bn+relu", "the convolution's output has another reader"),
        (_twice, None, "called more than once"),
        (_assigns, None, "assigns self.seen"),
        (_depends_on_data, None, "control flow"),
        (_python_random, None, "random numbers in Python"),
        (_numpy_random, None, "random numbers in Python"),
        (_torch_rand, None, "tensors that are no inputs"),
        (lambda b, x: _plain_body(b, x.to(b.conv.weight.device)), "conv+bn+relu", None),
        (lambda b, x: b.relu(b.bn(input=b.conv(x))), None, ""),
        (lambda b, x: _plain_body(b, x) if len(x) else x, None, "Left.forward cannot be traced"),
        (lambda b, x: _plain_body(b, torch.from_numpy(x.detach().numpy())), None, ""),
    ],
)
def test_left_with_the_reason(body, kind, words):
    _, converted = check(Left(body), images(2, 4, 5, 5))
    got, reason = entries(converted)["bn"]
    assert got == kind
    assert reason == words if words is None else words in reason


def test_attribute_that_cannot_be_checked():
    model = Left(_reads_something)
    model.factor = torch.tensor(2.0, dtype=torch.float64)
    _, converted = check(model, images(2, 4, 5, 5))
    assert entries(converted)["bn"] == (
        None,
        "Left.forward cannot be traced: forward reads factor, a Tensor",
    )


def test_subclasses_are_left():
    _, converted = check(Left(_plain_body, conv=OwnConv), images(2, 4, 5, 5))
    assert entries(converted)["bn"] == ("bn+relu", "OwnConv is not an exact nn.Conv or nn.Linear")
    assert type(converted.conv) is OwnConv
    _, converted = check(Left(_plain_body, norm=OwnNorm), images(2, 4, 5, 5))
    kind, reason = entries(converted)["bn"]
    assert kind is None and reason.startswith("OwnNorm is not an exact nn.BatchNorm1d")


@pytest.mark.parametrize("name", ["conv", "bn", "relu"])
@pytest.mark.parametrize(
    "register",
    ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"],
)
def test_hooks_on_a_child(name, register):
    seen = []

    def hook(module, *values):
        seen.append(type(module).__name__)

    plain = prepare(Left(_plain_body))
    hooked = copy.deepcopy(plain)
    if register == "register_full_backward_hook":
        plain.relu.inplace = hooked.relu.inplace = False
    getattr(hooked.get_submodule(name), register)(hook)
    converted = bnfast.convert(hooked, train="keep")
    agree(plain, converted, images(2, 4, 5, 5))
    assert len(seen) == 4
    kind, reason = entries(converted)["bn"]
    expected = {
        "conv": ("bn+relu", "the convolution has hooks"),
        "bn": (None, "it has hooks"),
        "relu": ("conv+bn", None),
    }
    assert (kind, reason) == expected[name]


# ---- writes --------------------------------------------------------------------------------------------------------------


def _input_iadd(b, x):
    x += b.bn(b.conv(x))
    return b.relu(x)


def _input_add_(b, x):
    return x.add_(b.bn(b.conv(x)))


def _input_relu_module(b, x):
    return b.bn(b.conv(b.relu(x)))


def _input_relu_then_shortcut(b, x):
    y = b.bn(b.conv(F.relu_(x)))
    return y + x


def _input_imul_behind(b, x):
    y = b.bn(b.conv(x))
    x *= 2
    return y + x


def _relu_with_second_reader(b, x):
    y = b.bn(b.conv(x))
    z = b.relu(y)
    return z + y * 3


def _iadd_with_second_reader(b, x):
    y = b.bn(b.conv(x))
    z = y
    y += x
    return F.relu(y) * z


def _conv_input_changes(b, x):
    a = x * 1
    z = b.conv(a)
    a.mul_(3)
    return b.relu(b.bn(z)) + a


def _conv_input_changes_through_a_view(b, x):
    a = x * 1
    v = a[:, :, 1:]
    z = b.conv(v)
    a.mul_(3)
    return b.bn(z)


def _conv_input_behind_silu_in_place(b, x):
    a = x * 1
    v = F.silu(a, inplace=True)
    z = b.conv(v)
    a.add_(1)
    return b.bn(z)


def _residual_changes_in_between(b, x):
    r = x * 1
    y = b.bn(b.conv(x)) + r
    r.mul_(3)
    return F.relu(y) * r


def _residual_changes_behind(b, x):
    r = x * 1
    y = F.relu(b.bn(b.conv(x)) + r)
    r.mul_(3)
    return y * r


def _residual_changes_behind_silu(b, x):
    r = x * 1
    y = F.silu(b.bn(b.conv(x)) + r)
    r.mul_(3)
    return y * r


def _output_changes(b, x):
    y = b.bn(b.conv(x))
    y[:, 0].mul_(2)
    return y


def _dropout_then_iadd(b, x):
    y = F.dropout(x, 0.0, b.training)
    y = y * 1
    y += b.bn(b.conv(x))
    return y + x


def _weights_change(b, x):
    z = b.conv(x)
    b.bn.weight.data.mul_(1.5)
    return b.bn(z)


BODIES = [
    value
    for key, value in list(globals().items())
    if key.startswith(
        (
            "_input_",
            "_relu_with",
            "_iadd_",
            "_conv_in",
            "_residual_",
            "_output_",
            "_dropout_",
            "_weights_",
        )
    )
]


@pytest.mark.parametrize("memory_format", [torch.channels_last, None])
@pytest.mark.parametrize("body", BODIES)
def test_writes_in_a_forward(body, memory_format):
    _check_writes(Left(body), memory_format=memory_format)


def _check_writes(model, **options):
    """Values without gradients, and gradients where the unconverted model has them: autograd refuses some writes."""
    x = images(2, 4, 5, 5)
    plain, converted = check(model, x, backward=False, **options)
    for training in (True, False):
        try:
            want = step(plain.train(training), [x])
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)
            continue
        compare(want, step(converted.train(training), [x]))


@pytest.mark.parametrize("body", [_input_iadd, _input_relu_module])
def test_writes_of_a_child_block(body):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Left(body)
            self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
            self.other = Block(channels=4)

        def forward(self, x):
            return self.bn(self.conv(self.other(self.block(x)))) + x

    _check_writes(Net())


def test_dropout_without_effect_still_copies():
    class Net(Left):
        def __init__(self):
            super().__init__(None)
            self.drop = nn.Dropout(0.0)

        def forward(self, x):
            y = self.drop(x)
            y += self.bn(self.conv(x))
            return y + x

    _check_writes(Net())


# ---- layouts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format, None])
def test_memory_format(memory_format, monkeypatch):
    class Net(Block):
        def forward(self, x):
            y = self.relu(self.bn1(self.conv1(x)))
            z = self.bn2(self.conv2(y))
            return z.flatten(1), F.relu(z + x)

    class Viewing(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Block()

        def forward(self, x):
            return self.block(x).view(x.size(0), -1)

    plain, converted = check(Net(), images(2, 6, 5, 4), memory_format=memory_format)
    plain = prepare(Viewing())
    viewing = bnfast.convert(plain, train="keep", memory_format=memory_format)
    compare(step(plain, [images(2, 6, 5, 4)]), step(viewing, [images(2, 6, 5, 4)]))
    seen = []
    run = bnfast.ops.frozen_conv_bn_act
    monkeypatch.setattr(
        bnfast.ops, "frozen_conv_bn_act", lambda x, *rest: seen.append(x.stride()) or run(x, *rest)
    )
    for layout in (torch.contiguous_format, torch.channels_last):
        seen.clear()
        converted(images(2, 6, 5, 4).contiguous(memory_format=layout))
        inside = torch.channels_last if torch.channels_last in (layout, memory_format) else layout
        assert {strides[1] == 1 for strides in seen} == {inside is torch.channels_last}


@pytest.mark.parametrize("memory_format", [torch.channels_last, None])
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, :, ::2],
        lambda x: x[:, 1:5],
        lambda x: x.transpose(2, 3),
        lambda x: x[:1].expand(3, -1, -1, -1),
        lambda x: x.permute(0, 2, 3, 1).flip(3).permute(0, 3, 1, 2)[:, :, 1:],
        lambda x: x[:0],
    ],
)
def test_inputs_of_odd_strides(view, memory_format):
    x = images(4, 6, 5, 5)
    c = view(x).shape[1]
    for model in (
        nn.Sequential(nn.Conv2d(c, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()),
        nn.Sequential(nn.BatchNorm2d(c), nn.ReLU(), nn.Conv2d(c, 3, 1)),
    ):
        plain = prepare(model)
        converted = bnfast.convert(plain, train="keep", memory_format=memory_format)
        for training in (True, False) if view(x).numel() else (False,):
            want = step(plain.train(training), [x], lambda model, x: model(view(x)))
            got = step(converted.train(training), [x], lambda model, x: model(view(x)))
            compare(want, got, f"training={training}")


def test_weights_in_channels_last_and_input_in_nchw():
    plain = prepare(Block().to(memory_format=torch.channels_last))
    agree(plain, bnfast.convert(plain, train="keep"), images(2, 6, 5, 4))


def test_two_inputs_of_different_layouts():
    class Two(Block):
        def forward(self, x, y):
            return self.bn1(self.conv1(x)), self.bn2(y), torch.cat([x, y], 1)

    plain = prepare(Two())
    converted = bnfast.convert(plain, train="keep")
    a, b = (
        images(2, 6, 5, 4),
        images(2, 6, 5, 4, seed=2).contiguous(memory_format=torch.channels_last),
    )
    compare(step(plain, [a, b]), step(converted, [a, b]), "NCHW, channels_last")
    compare(step(plain, [b, a]), step(converted, [b, a]), "channels_last, NCHW")


# ---- what the user sees of the model ---------------------------------------------------------------------------------------


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(2)
        self.layer1 = nn.Sequential(Block(), Block(end=_iadd))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(6, 4)

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.fc(torch.flatten(self.avgpool(self.layer1(x)), 1))


X = images(3, 3, 8, 8)


def _facts(model):
    """Everything that a model holds, module by module, for comparison."""
    return [
        (name, type(m), {k: v for k, v in m.__dict__.items() if k not in ("_parameters", "_buffers", "_modules")},
         {k: (id(v), None if v is None else v._version) for k, v in [*m._parameters.items(), *m._buffers.items()]},
         {k: id(v) for k, v in m._modules.items()})
        for name, m in model.named_modules()
    ]  # fmt: skip


def test_convert_leaves_the_given_model_alone():
    model = prepare(ResNet(), "keep")
    before, needs = _facts(model), [p.requires_grad for p in model.parameters()]
    converted = bnfast.convert(model)
    assert _facts(model) == before
    assert [p.requires_grad for p in model.parameters()] == needs
    assert not {id(p) for p in model.parameters()} & {id(p) for p in converted.parameters()}
    assert not {id(m) for m in model.modules()} & {id(m) for m in converted.modules()}
    bnfast.explain(model)
    assert _facts(model) == before


def test_inplace_keeps_objects_and_revert_gives_everything_back():
    model = prepare(ResNet())
    before = _facts(model)
    children = dict(model.named_modules())
    converted = bnfast.convert(model, train="keep", inplace=True)
    assert converted is model
    after = _facts(model)
    assert [(n, p, c) for n, _, _, p, c in after] == [(n, p, c) for n, _, _, p, c in before]
    assert dict(model.named_modules()) == children
    assert type(model) is ResNet and all(type(b) is Block for b in model.layer1)
    assert type(model.conv1) is bnfast.nn.FrozenConv2d and isinstance(model.bn1, nn.BatchNorm2d)
    assert bnfast.revert(model) is model
    assert _facts(model) == before
    assert bnfast.revert(model) is model
    assert _facts(model) == before
    agree(model, bnfast.convert(model, train="keep"), X)


def test_second_convert_changes_nothing():
    model = bnfast.convert(prepare(ResNet()), train="keep")
    before = [(n, t, p, c) for n, t, _, p, c in _facts(model)]
    told = str(bnfast.explain(model))
    plans = [m.__dict__.get("forward") for m in model.modules()]
    assert bnfast.convert(model, train="keep", inplace=True) is model
    assert [(n, t, p, c) for n, t, _, p, c in _facts(model)] == before
    assert [m.__dict__.get("forward") for m in model.modules()] == plans
    assert str(bnfast.explain(model)) == told
    agree(bnfast.revert(copy.deepcopy(model)), bnfast.convert(model, train="keep"), X)


@needs_native
def test_explain_tells_how_convolutions_ran_and_what_they_keep(monkeypatch):
    monkeypatch.setattr(winograd, "mode", "1")
    monkeypatch.setattr(pointwise, "mode", "1")
    model = nn.Sequential(
        nn.Conv2d(3, 16, 5, 3, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
    )  # fmt: skip
    converted = bnfast.convert(model)
    assert not bnfast.explain(converted).kept
    x = torch.randn(2, 3, 17, 17).contiguous(memory_format=torch.channels_last)
    y = converted(x)
    y.backward(torch.randn_like(y))
    told = bnfast.explain(converted)
    assert {w.name: set(w.forms) for w in told.kept} == {
        "0": {"packed"}, "3": {"pointwise"}, "6": {"winograd"},
    }  # fmt: skip
    by_name = {w.name: w.nbytes for w in told.kept}
    # Both directions: [32 / 16, 16, 16] and [16 / 16, 32, 16]; 36 points of [32 / 16, 32, 16] twice.
    assert by_name["3"] == 2 * 32 * 16 * 4 and by_name["6"] == 2 * 36 * 32 * 32 * 4
    assert told.kept_bytes == sum(by_name.values())
    line = str(told).splitlines()[-2]
    assert line.endswith("kept for 3 convolutions: 1 Winograd, 1 oneDNN, 1 product")
    assert {entry["name"] for entry in told.to_dict()["kept"]} == {"0", "3", "6"}
    bnfast.clear_cache()
    assert not bnfast.explain(converted).kept


def test_explain_reports_each_norm_once():
    model = ResNet()
    told = bnfast.explain(model)
    assert told == bnfast.explain(bnfast.convert(model))
    names = [n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert [e.name for e in told.fused] == names and not told.left
    assert json.loads(json.dumps(told.to_dict())) == told.to_dict()
    assert told.to_dict()["fused"][0] == {
        "name": "bn1",
        "kind": "BatchNorm2d",
        "fused_as": "conv+bn+relu+maxpool",
        "block": "",
        "reason": None,
    }
    assert "5 of 5 BatchNorms fused" in str(told)
    assert "# conv1+bn1+relu+maxpool" in str(bnfast.convert(model))
    assert "bnfast" not in str(model) and "# conv" not in str(model)


def test_state_dict_goes_both_ways():
    plain = prepare(ResNet())
    converted = bnfast.convert(ResNet().double(), train="bn")
    assert list(converted.state_dict()) == list(plain.state_dict())
    assert converted.state_dict()._metadata == plain.state_dict()._metadata
    converted.load_state_dict(plain.state_dict(), strict=True)
    agree(plain, converted, X)
    fresh = prepare(ResNet())
    fresh.load_state_dict(converted.state_dict(), strict=True)
    agree(fresh, converted, X)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save", "pickle of a copy that ran"])
def test_copies_and_pickles(how, monkeypatch):
    plain = prepare(ResNet())
    converted = bnfast.convert(plain, train="keep")
    if how == "deepcopy":
        twin = copy.deepcopy(converted)
    elif how == "torch.save":
        file = io.BytesIO()
        torch.save(converted, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    else:
        if how != "pickle":
            converted(X)
            converted.load_state_dict(plain.state_dict())
        twin = pickle.loads(pickle.dumps(converted))
    assert twin.__dict__["forward"].block is twin
    assert twin.layer1[0].__dict__["forward"].block is twin.layer1[0]
    with torch.no_grad():
        for module in converted.modules():  # the twin has nothing of it
            if isinstance(module, nn.BatchNorm2d):
                module.weight.fill_(float("nan"))
    agree(plain, twin, X)
    assert PlanCounter(monkeypatch).runs(twin, X)
    assert bnfast.explain(twin) == bnfast.explain(converted)
    assert type(bnfast.revert(twin).conv1) is nn.Conv2d


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    model = bnfast.convert(prepare(ResNet()), train="keep")
    want = model.eval()(X).detach()
    model = model.to(dtype)
    for training in (False, True):
        x = X.to(dtype).detach().clone().requires_grad_()
        y = model.train(training)(x)
        assert y.dtype == dtype
        if not training:
            error = (y.double() - want).abs().max() / want.abs().max()
            assert error <= 16 * torch.finfo(dtype).eps
        y.backward(torch.randn_like(y))
        assert x.grad.isfinite().all() and x.grad.dtype == dtype
        assert model.bn1.weight.grad.dtype == dtype


def test_to_keeps_plans(monkeypatch):
    counter = PlanCounter(monkeypatch)
    model = bnfast.convert(prepare(ResNet()), train="keep")
    for change in (
        lambda m: m.float(),
        lambda m: m.to(memory_format=torch.channels_last),
        lambda m: m.to("cpu"),
        lambda m: m.bfloat16(),
        lambda m: m.half(),
        lambda m: m.double(),
    ):
        model = change(model)
        assert counter.runs(model, X.to(model.fc.weight.dtype))


def test_optimiser_built_before_convert():
    torch.manual_seed(3)
    plain = prepare(ResNet())
    model = copy.deepcopy(plain)
    optimisers = [
        torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
        for m in (plain, model)
    ]
    bnfast.convert(model, inplace=True)
    for training_step in range(3):
        for m, optimiser in zip((plain, model), optimisers, strict=True):
            optimiser.zero_grad()
            F.cross_entropy(m(images(4, 3, 8, 8, seed=training_step)), torch.arange(4)).backward()
            optimiser.step()
    for (name, a), b in zip(plain.state_dict().items(), model.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, msg=name)


def _replicate(module):
    """What nn.DataParallel makes for each device, on the CPU: replicas that hold copies of parameters as plain tensors."""
    modules = list(module.modules())
    replicas = {id(m): m._replicate_for_data_parallel() for m in modules}
    for m in modules:
        replica = replicas[id(m)]
        for key, child in m._modules.items():
            setattr(replica, key, None if child is None else replicas[id(child)])
        for key, parameter in m._parameters.items():
            setattr(
                replica,
                key,
                None
                if parameter is None
                else parameter * 1
                if parameter.requires_grad
                else parameter.detach().clone(),
            )
        for key, buffer in m._buffers.items():
            setattr(replica, key, None if buffer is None else buffer.clone())
    return replicas[id(module)]


@pytest.mark.parametrize("pickled", [False, True])
def test_data_parallel_replicas(monkeypatch, pickled):
    plain = prepare(ResNet())
    model = bnfast.convert(plain, train="keep")
    if pickled:
        model = pickle.loads(pickle.dumps(model))
    counter = PlanCounter(monkeypatch)

    def through_replicas(m, x):
        replicas = [_replicate(m), _replicate(m)]
        for replica in replicas:
            for part in replica.modules():
                forward = part.__dict__.get("forward")
                assert forward is None or forward.block is part
        return torch.cat([r(half) for r, half in zip(replicas, x.chunk(2), strict=True)])

    want = step(plain, [images(4, 3, 8, 8)], through_replicas)
    got = step(model, [images(4, 3, 8, 8)], through_replicas)
    compare(want, got)
    assert counter.calls == 2  # the model's own plan holds its blocks
    # Replicas have their own children: what happens to the model does not reach them.
    replica = _replicate(model)
    before = replica(X)
    with torch.no_grad():
        model.layer1[0].bn1.weight.fill_(float("nan"))
    assert torch.equal(before, replica(X))


def test_blocks_of_a_stage_are_one_chain():
    """Blocks are looked into from above, and what only the units of a chain read stays in it, over blocks and stages."""
    model = bnfast.convert(prepare(ResNet()), train="keep")
    sources = [plan.source for plan in model.__dict__["forward"].plans]
    assert [source.count("run_chain(") for source in sources] == [1]


def test_a_block_that_is_called_twice_keeps_its_own_plan():
    plain = nn.Sequential(Block(), nn.MaxPool2d(2))
    plain.append(plain[0])
    plain = prepare(plain)
    model = bnfast.convert(plain, train="keep")
    assert not bnfast.explain(model).left
    agree(plain, model, images(2, 6, 8, 8))


def test_distributed_data_parallel(tmp_path):
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch.distributed has no gloo")
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        plain = prepare(ResNet())
        model = bnfast.convert(plain, train="keep")
        want = step(plain, [X])
        got = step(nn.parallel.DistributedDataParallel(model), [X])
        compare(want, {key.replace("module.", "", 1): value for key, value in got.items()})
    finally:
        dist.destroy_process_group()


def test_data_parallel_wrapper_runs_on_the_cpu():
    plain = prepare(ResNet())
    model = bnfast.convert(plain, train="keep")
    compare(
        step(plain, [X]),
        {k.replace("module.", "", 1): v for k, v in step(nn.DataParallel(model), [X]).items()},
    )


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    from torch.utils.checkpoint import checkpoint

    def call(model, x):
        return checkpoint(model, x, use_reentrant=reentrant)

    check(ResNet(), X, call=call)


def test_functional_call():
    plain = prepare(ResNet())
    model = bnfast.convert(plain, train="keep")
    other = {k: v * 1.5 for k, v in plain.named_parameters()}
    for module in (plain, model):
        module.eval()
    want = torch.func.functional_call(plain, other, (X,))
    torch.testing.assert_close(
        torch.func.functional_call(model, other, (X,)), want, rtol=1e-9, atol=1e-9
    )


TRAIN = ("all", "bn", "bn+output", "output", "none", "all-but-bn", "keep")


@pytest.mark.parametrize("train", TRAIN)
def test_what_trains(train):
    model = prepare(ResNet(), "keep")
    model.bn1.weight.requires_grad_(False)
    plain = copy.deepcopy(model)
    if train != "keep":
        bnfast.freeze(plain, train)
    converted = bnfast.convert(model, train=train)
    needs = {n: p.requires_grad for n, p in converted.named_parameters()}
    assert needs == {n: p.requires_grad for n, p in plain.named_parameters()}
    agree(plain, converted, X)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"train": "delta"}, ValueError),
        ({"backend": "tpu"}, (ValueError, RuntimeError)),
        ({"memory_format": torch.preserve_format}, ValueError),
        ({"memory_format": "channels_last"}, ValueError),
        ({"train": "bn+shortcut+output"}, ValueError),
    ],
)
def test_wrong_arguments_change_nothing(options, error, inplace):
    model = ResNet()
    model.layer1 = nn.Sequential()  # no shortcut convolutions
    before = _facts(model)
    needs = [p.requires_grad for p in model.parameters()]
    with pytest.raises(error):
        bnfast.convert(model, inplace=inplace, **options)
    assert _facts(model) == before
    assert [p.requires_grad for p in model.parameters()] == needs


@pytest.mark.parametrize("model", [None, "resnet18", torch.zeros(1), ResNet])
def test_no_model(model):
    with pytest.raises(TypeError, match="model is a"):
        bnfast.convert(model)


def test_errors_of_the_original_stay():
    model = bnfast.convert(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()))
    plain = bnfast.revert(copy.deepcopy(model))
    for x in (
        torch.randn(3, 5, 5),  # no batch dimension
        torch.randn(2, 4, 5, 5),
        torch.randn(1, 3, 1, 1),  # one value per channel
        torch.randint(3, (2, 3, 4, 4)),
    ):
        with pytest.raises((ValueError, RuntimeError)):
            plain(x)
        with pytest.raises((ValueError, RuntimeError)):
            model(x)
    with pytest.raises(TypeError):
        model()
    with pytest.raises(TypeError):
        model(torch.randn(2, 3, 4, 4), 1)
    mismatched = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm1d(4))
    with pytest.raises(ValueError, match="expected 2D or 3D"):
        bnfast.convert(mismatched)(torch.randn(2, 3, 4, 4))
    mismatched = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(5))
    with pytest.raises((ValueError, RuntimeError)):
        bnfast.convert(mismatched)(torch.randn(2, 3, 4, 4))


def test_models_without_blocks():
    check(nn.BatchNorm2d(3), images(2, 3, 4, 4))
    check(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), images(2, 3, 4, 4), train="none")
    assert str(bnfast.explain(nn.Linear(2, 2))).endswith("0 of 0 BatchNorms fused")
    assert not bnfast.explain(nn.Sequential()).fused


# ---- memory --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape", "limit"),
    [
        ("resnet56", (2, 3, 32, 32), 0.54),
        ("mobilenet_v2", (1, 3, 64, 64), 0.38),
        ("efficientnet_b0", (1, 3, 64, 64), 0.48),
        ("resnet50", (1, 3, 64, 64), 0.60),
    ],
)
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
def test_bytes_saved_for_the_backward_pass(name, shape, limit, autocast):
    if name == "resnet56":
        plain = bnfast.models.create(name)
    else:
        plain = pytest.importorskip("torchvision").models.get_model(name, weights=None)
    plain = bnfast.freeze(plain)
    x = images(*shape).float()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        eager = saved_activation_bytes(plain, x)
        ours = saved_activation_bytes(bnfast.convert(plain), x)
    assert ours <= (limit + 0.03 * autocast) * eager, f"{ours / eager:.3f}"


# ---- torchvision: a few here, all of them by `python tests/zoo.py` ---------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "mobilenet_v3_small",
        "densenet121",
        "shufflenet_v2_x0_5",
        "googlenet",
        "regnet_y_400mf",
        "r3d_18",
    ],
)
def test_torchvision(name):
    pytest.importorskip("torchvision")
    from zoo import check as check_model

    report = check_model(name)
    assert not report.left


def test_order_of_operands_and_modes_in_products():
    """Training with some BatchNorms in evaluation mode, any of them."""
    plain = prepare(ResNet())
    converted = bnfast.convert(plain, train="keep")
    names = ["bn1", "layer1.0.bn1", "layer1.0.bn2"]
    for modes in itertools.product([True, False], repeat=3):
        for model in (plain, converted):
            model.train()
            for name, training in zip(names, modes, strict=True):
                model.get_submodule(name).train(training)
        agree(plain, converted, X, modes=(None,))


class Pools(nn.Module):
    """A unit with a pooling behind it that `make` gives: a module, or a function of y."""

    def __init__(self, pool):
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU()
        if isinstance(pool, nn.Module):
            self.pool = pool
        else:
            object.__setattr__(self, "pool", pool)

    def forward(self, x):
        return self.pool(self.relu(self.bn(self.conv(x)))) * 2


@pytest.mark.parametrize(
    "pool, inside",
    [
        (nn.MaxPool2d(3, 2, 1), True),
        (nn.MaxPool2d((2, 3), padding=(1, 0)), True),
        (nn.MaxPool2d(16, 16), True),
        (nn.MaxPool2d(3, 2, ceil_mode=True), False),
        (nn.MaxPool2d(2, dilation=2), False),
        (nn.MaxPool2d(17, 1, 8), False),
        (nn.AvgPool2d(2), False),
        (lambda y: F.max_pool2d(y, 2), True),
        (lambda y: F.max_pool2d(y, (3, 3), stride=2, padding=1), True),
        (lambda y: F.max_pool2d(y, 3, 2, 1, ceil_mode=True), False),
        (lambda y: F.max_pool2d(y, 2, return_indices=True)[0], False),
        (lambda y: F.max_pool2d(y, y.shape[2:]), False),
        (lambda y: F.max_pool2d(y, kernel_size=y.size()[2:], stride=1), False),
        (lambda y: F.max_pool2d(y, (y.size(2), 1)), False),
        (lambda y: F.max_pool2d(input=y, kernel_size=2), True),
    ],
    ids=str,
)
def test_max_pooling_ends_a_unit(pool, inside):
    plain, converted = check(Pools(pool), images(2, 3, 22, 21))
    (kind,) = fused(converted).values()
    assert kind == ("conv+bn+relu+maxpool" if inside else "conv+bn+relu")
    if isinstance(pool, nn.MaxPool2d):
        for model in (plain, converted):
            model.pool.stride = 3  # from now on the plan is another model's
        agree(plain, converted, images(2, 3, 22, 21))


def test_pooling_of_what_has_no_planes_stays_outside():
    """max_pool2d takes [N, C, L] for one image."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6)

        def forward(self, x):
            return F.max_pool2d(F.relu(self.bn(self.conv(x))), 2)

    _, converted = check(Net(), images(4, 3, 12))
    assert list(fused(converted).values()) == ["conv+bn+relu"]


def test_of_a_pooled_unit_one_byte_per_maximum_is_saved():
    """Neither the pooling's input nor its indices of eight bytes."""
    model = bnfast.freeze(Pools(nn.MaxPool2d(2)), "bn")
    x = torch.randn(2, 3, 18, 18)
    z, pooled = 2 * 6 * 16 * 16, 2 * 6 * 8 * 8
    saved = saved_activation_bytes(bnfast.convert(model), x)
    assert saved - (4 * z + pooled) == 4 * 2 * 6  # mean, rstd


def test_low_memory_keeps_the_results_and_saves_less():
    """Bit-equal to the normal mode, in copies and after a pickle too; what is saved of a bottleneck shrinks by its end's z."""
    from torchvision.models import resnet50

    model = resnet50(num_classes=10).train()
    x = torch.randn(2, 3, 64, 64)
    results, saved = [], []
    for convert in (
        lambda m: bnfast.convert(m),
        lambda m: bnfast.convert(m, memory="low"),
        lambda m: pickle.loads(pickle.dumps(bnfast.convert(m, memory="low"))),
    ):
        converted = convert(copy.deepcopy(model))
        sizes = {}

        def pack(t, sizes=sizes):
            if not isinstance(t, nn.Parameter):
                sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = converted(x)
        y.backward(torch.ones_like(y).cumsum(1))
        results.append([y, *(p.grad for p in bnfast.affine_parameters(converted))])
        saved.append(sum(sizes.values()))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    assert saved[1] == saved[2] < 0.65 * saved[0]


def test_unknown_memory_is_named():
    with pytest.raises(ValueError, match="memory is 'none'; allowed are 'normal' and 'low'"):
        bnfast.convert(nn.Sequential(nn.BatchNorm2d(3)), memory="none")
