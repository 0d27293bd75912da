"""What a plan takes for granted is checked at each call: forwards that depend on more than their tensors, and models that
change after convert()."""

import copy
import random

import numpy
import pytest
import torch
from agreement import PlanCounter, agree, check, entries, fused, images, prepare
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, spectral_norm, weight_norm

import bnfast

SHAPE = (2, 4, 5, 5)


class Base(nn.Module):
    """conv, bn, relu as self.body; subclasses put something around it."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)

    def body(self, x):
        return self.relu(self.bn(self.conv(x)))

    def forward(self, x):
        return self.body(x)


def converted_pair(model):
    """(unconverted, converted) with the same values."""
    plain = prepare(model)
    return plain, bnfast.convert(plain, train="keep")


# ---- modes and plain attributes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [True, False])
def test_forward_that_asks_for_its_mode(start, monkeypatch):
    class Net(Base):
        def forward(self, x):
            return self.body(x) + x if self.training else F.relu(x - self.body(x))

    model = Net()
    _, converted = check(model.train(start), images(*SHAPE))
    counter = PlanCounter(monkeypatch)
    assert counter.runs(converted.train(), images(*SHAPE))
    assert counter.runs(converted.eval(), images(*SHAPE))


def test_forward_that_asks_for_the_mode_of_a_child():
    class Net(Base):
        def forward(self, x):
            return self.body(x) * (2 if self.bn.training else 3)

    plain, converted = check(Net(), images(*SHAPE))
    for model in (plain.train(), converted.train()):
        model.bn.eval()
    agree(plain, converted, images(*SHAPE), modes=(None,))


class Flagged(Base):
    shared = "class"

    def __init__(self, **flags):
        super().__init__()
        self.__dict__.update(flags)

    def forward(self, x):
        y = self.body(x)
        if getattr(self, "flag", False):
            y = y * 2
        if self.shared != "class":
            y = y + 5
        for number in getattr(self, "numbers", ()):
            y = y + number
        if hasattr(self, "table"):
            y = y * self.table["a"][0]
        return y


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m, "flag", False),
        lambda m: setattr(m, "flag", 1),
        lambda m: m.numbers.append(4),
        lambda m: setattr(m, "numbers", (1, 2)),
        lambda m: m.table.update(a=[3]),
        lambda m: m.table["a"].__setitem__(0, 7),
        lambda m: delattr(m, "table"),
        lambda m: setattr(m, "shared", "own"),
        lambda m: setattr(m, "bn", nn.Identity()),
    ],
)
def test_attributes_that_change_after_convert(change):
    plain, converted = check(Flagged(flag=True, numbers=[1, 2], table={"a": [2]}), images(*SHAPE))
    assert fused(converted) == {"bn": "conv+bn+relu"}
    for model in (plain, converted):
        change(model)
    agree(plain, converted, images(*SHAPE))


@pytest.mark.parametrize("name", ["flag", "numbers", "table"])
def test_attributes_that_appear_after_convert(name):
    plain, converted = check(Flagged(), images(*SHAPE))
    for model in (plain, converted):
        setattr(model, name, {"flag": True, "numbers": [1], "table": {"a": [2]}}[name])
    agree(plain, converted, images(*SHAPE))


def test_class_attribute_that_changes_after_convert(monkeypatch):
    plain, converted = check(Flagged(), images(*SHAPE))
    monkeypatch.setattr(Flagged, "shared", "changed")
    agree(plain, converted, images(*SHAPE))


def test_defaults_keywords_and_further_arguments(monkeypatch):
    class Net(Base):
        def forward(self, x, factor=2.0, other=None, *rest, **more):
            y = self.body(x) * factor
            if other is not None:
                y = y + other
            for value in (*rest, *more.values()):
                y = y - value
            return y

    plain, converted = converted_pair(Net())
    counter = PlanCounter(monkeypatch)
    x = images(*SHAPE)
    calls = [
        (lambda m, x: m(x), True),
        (lambda m, x: m(x=x), True),
        (lambda m, x: m(x, 2.0), True),
        (lambda m, x: m(x, factor=2.0, other=None), True),
        (lambda m, x: m(x, 2), False),
        (lambda m, x: m(x, True), False),
        (lambda m, x: m(x, factor=3.0), False),
        (lambda m, x: m(x, factor=torch.tensor(3.0, dtype=x.dtype)), False),
        (lambda m, x: m(x, other=x), False),
        (lambda m, x: m(x, 2.0, x), False),
        (lambda m, x: m(x, 2.0, None, 5), False),
        (lambda m, x: m(x, more=5), False),
    ]
    for call, planned in calls:
        agree(plain, converted, x, call=call)
        counter.calls = 0
        call(converted, x)
        assert bool(counter.calls) == planned
    with pytest.raises(TypeError):
        converted(x, x=x)
    with pytest.raises(TypeError):
        converted(factor=2.0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: lambda self, x, *, factor=2.0: self.body(x) * factor,
        lambda: lambda self, *xs: self.body(xs[0]),
        lambda: lambda self, x, /, factor=2.0: self.body(x) * factor,
        lambda: lambda self, x, y=(1, 2): self.body(x) * y[1],
    ],
)
def test_signatures(make):
    Net = type("Net", (Base,), {"forward": make()})
    check(Net(), images(*SHAPE))


def test_types_of_inputs():
    class Net(Base):
        def forward(self, x):
            if isinstance(x, dict):
                x = x["x"]
            elif isinstance(x, (list, tuple)):
                x = x[0] + x[1]
            elif not torch.is_tensor(x):
                x = x.value
            return self.body(x)

    class Holder:
        def __init__(self, value):
            self.value = value

    plain, converted = converted_pair(Net())
    x, y = images(*SHAPE), images(*SHAPE, seed=2)
    for given in (x, [x, y], (x, y), {"x": x}):
        agree(plain, converted, given)
    agree(plain, converted, x, call=lambda m, x: m(Holder(x)))


def test_exact_type_of_an_input():
    class Net(Base):
        def forward(self, x):
            return self.body(x) if type(x) is torch.Tensor else self.body(x) * 2

    class Outer(Base):
        def __init__(self):
            super().__init__()
            self.inner = Net()

        def forward(self, x):
            return self.body(self.inner(x)) * (2 if type(self.inner) is Net else 3)

    class Class(Base):
        def forward(self, x):
            return self.body(x) if x.__class__ is torch.Tensor else self.body(x) * 2

    _, converted = check(Net(), images(*SHAPE))
    assert entries(converted)["bn"][1].endswith("forward asks for type(x)")
    _, converted = check(Outer(), images(*SHAPE))
    assert fused(converted) == {"bn": "conv+bn+relu", "inner.bn": None}
    check(Class(), images(*SHAPE))


def test_type_of_an_intermediate_value():
    class Net(Base):
        def forward(self, x):
            y = self.body(x)
            return [y] if isinstance(y, list) else y

    _, converted = check(Net(), images(*SHAPE))
    assert "type of an intermediate value" in entries(converted)["bn"][1]


def test_parameters_and_buffers_read_in_forward():
    class Net(Base):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.rand(4, 1, 1))
            self.register_buffer("offset", torch.rand(1))
            self.register_parameter("later", None)

        def forward(self, x):
            y = self.body(x) * self.scale + self.offset
            return y if self.later is None else y * self.later

    model = Net()
    plain, converted = check(model, images(*SHAPE), train="none")
    for m in (plain, converted):
        m.scale.requires_grad_()
        m.offset.mul_(3)
    agree(plain, converted, images(*SHAPE))
    for m in (plain, converted):
        m.later = nn.Parameter(torch.full((4, 1, 1), 3.0, dtype=torch.float64))
    agree(plain, converted, images(*SHAPE))


# ---- random numbers --------------------------------------------------------------------------------------------------------


class Noisy(Base):
    def __init__(self, kind):
        super().__init__()
        self.drop = {
            "Dropout": nn.Dropout(0.4),
            "Dropout2d": nn.Dropout2d(0.4),
            "Dropout of 0": nn.Dropout(0.0),
        }.get(kind, nn.Identity())
        self.kind = kind

    def forward(self, x):
        y = self.drop(self.body(x))
        if self.kind == "functional":
            y = F.dropout(y, 0.3, self.training)
        elif self.kind == "functional 2d":
            y = F.dropout2d(y, 0.3, training=self.training)
        elif self.kind == "rand_like":
            y = y + torch.rand_like(y)
        elif self.kind == "bernoulli":
            y = y * x.new_empty(x.shape[0], 1, 1, 1).bernoulli_(0.5)
        elif self.kind == "rand of a size":
            y = y + torch.rand(x.shape, dtype=x.dtype)
        return y + x


@pytest.mark.parametrize(
    "kind",
    [
        *("Dropout", "Dropout2d", "Dropout of 0", "functional", "functional 2d"),
        *("rand_like", "bernoulli", "rand of a size"),
    ],
)
def test_same_random_numbers_under_the_same_seed(kind):
    plain, converted = check(Noisy(kind), images(*SHAPE))
    assert fused(converted)["bn"] is not None
    if kind == "Dropout of 0":
        for model in (plain, converted):
            model.drop.p = 0.5
        agree(plain, converted, images(*SHAPE))


def test_stochastic_depth():
    ops = pytest.importorskip("torchvision.ops")

    class Net(Base):
        def __init__(self, probability):
            super().__init__()
            self.drop = ops.StochasticDepth(probability, "row")

        def forward(self, x):
            y = self.drop(self.bn(self.conv(x)))
            y += x
            return y

    plain, converted = check(Net(0.0), images(*SHAPE))
    assert fused(converted)["bn"] == "conv+bn+add"
    for model in (plain, converted):
        model.drop.p = 0.5
    agree(plain, converted, images(*SHAPE))
    check(Net(0.5), images(*SHAPE))


@pytest.mark.parametrize(
    "draw", [random.random, lambda: numpy.random.rand(), lambda: torch.rand(1).item()]
)
def test_random_numbers_drawn_in_python(draw):
    class Net(Base):
        def forward(self, x):
            return self.body(x) + x if draw() < 0.5 else self.body(x)

    model = prepare(Net())
    states = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state()
    converted = bnfast.convert(model, train="keep")
    assert random.getstate() == states[0] and torch.equal(torch.get_rng_state(), states[2])
    assert numpy.random.get_state()[1].tolist() == states[1]
    assert fused(converted) == {"bn": None}


# ---- what a trace cannot see -------------------------------------------------------------------------------------------------


class Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return -gradient


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * x


@pytest.mark.parametrize("function", [Reversal, Square])
def test_autograd_functions(function):
    class Net(Base):
        def forward(self, x):
            return function.apply(self.body(x))

    check(Net(), images(*SHAPE))


def _no_grad(net, x):
    with torch.no_grad():
        y = net.body(x)
    return y * x


def _no_grad_around_something_else(net, x):
    with torch.no_grad():
        scale = x.mean()
    return net.body(x) * scale


def _set_grad_enabled(net, x):
    torch.set_grad_enabled(False)
    y = net.body(x)
    torch.set_grad_enabled(True)
    return y * x


def _set_grad_enabled_in_a_block(net, x):
    with torch.set_grad_enabled(not net.training):
        y = net.body(x)
    return y * x


def _saved_on_cpu(net, x):
    with torch.autograd.graph.save_on_cpu():
        return net.body(x)


def _detached(net, x):
    return net.body(x.detach()) + x.sin()


@pytest.mark.parametrize(
    "body",
    [
        *(_no_grad, _no_grad_around_something_else, _set_grad_enabled),
        *(_set_grad_enabled_in_a_block, _saved_on_cpu, _detached),
    ],
)
@pytest.mark.parametrize("converted_without_gradients", [False, True])
def test_gradients_switched_off_in_forward(body, converted_without_gradients):
    class Net(Base):
        forward = body

    plain = prepare(Net())
    with torch.set_grad_enabled(not converted_without_gradients):
        converted = bnfast.convert(plain, train="keep")
    agree(plain, converted, images(*SHAPE))


def test_forward_decorated_with_no_grad():
    class Net(Base):
        @torch.no_grad()
        def forward(self, x):
            return self.body(x)

    check(
        nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), Net(), nn.BatchNorm2d(4)),
        images(*SHAPE),
    )


@pytest.mark.parametrize("enabled", [False, True])
def test_autocast_in_forward(enabled):
    class Net(Base):
        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                return self.body(x.float())

    plain = prepare(Net()).float()
    converted = bnfast.convert(plain, train="keep")
    x = images(*SHAPE).float()
    for outside in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=outside):
            assert converted(x).dtype == plain(x).dtype


def test_lists_that_forward_fills():
    class Net(Base):
        def __init__(self):
            super().__init__()
            self.seen, self.by_name = [], {}

        def forward(self, x):
            y = self.body(x)
            self.seen.append(y.shape[0])
            self.by_name["y"] = y.shape
            return y

    converted = bnfast.convert(prepare(Net()), train="keep")
    assert converted.seen == [] and converted.by_name == {}
    assert entries(converted)["bn"][0] is None
    converted(images(*SHAPE))
    assert converted.seen == [2] and converted.by_name == {"y": torch.Size(SHAPE)}


def test_nothing_stays_patched():
    before = nn.Module.__setattr__, torch.is_grad_enabled, torch.no_grad.__enter__
    own = dict(nn.Module.__dict__)

    class Net(Base):
        def forward(self, x):
            raise KeyError(x)

    for model in (Base(), Net(), nn.Sequential(Net(), Base())):
        bnfast.convert(model)
    assert (nn.Module.__setattr__, torch.is_grad_enabled, torch.no_grad.__enter__) == before
    assert dict(nn.Module.__dict__) == own
    assert entries(Net())["bn"][1].startswith("Net.forward cannot be traced")


# ---- children ----------------------------------------------------------------------------------------------------------------


class Parts(nn.Module):
    """Children in every kind of container, called in every way."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
        self.listed = nn.ModuleList([nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)])
        self.named = nn.ModuleDict({"conv": nn.Conv2d(4, 4, 1), "bn": nn.BatchNorm2d(4)})
        self.iterated = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
        self.blocks = nn.ModuleList([Base()])

    def forward(self, x):
        x = self.stem(x)
        for layer in self.listed:
            x = layer(x)
        for layer in self.named.values():
            x = layer(x)
        for layer in self.iterated:
            x = layer(x)
        for block in self.blocks:
            x = x + block(x)
        return x


def _conv(**options):
    torch.manual_seed(9)
    return nn.Conv2d(4, 4, 3, padding=1, **options).double()


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.stem.append(_conv()),
        lambda m: m.stem.__delitem__(2),
        lambda m: m.stem.__setitem__(0, _conv()),
        lambda m: m.stem.__setitem__(1, nn.Identity()),
        lambda m: m.stem.__setitem__(2, nn.Tanh()),
        lambda m: setattr(m, "stem", nn.Sequential(*m.stem, nn.Tanh())),
        lambda m: m.listed.append(_conv()),
        lambda m: m.listed.insert(0, nn.Tanh()),
        lambda m: m.listed.__delitem__(1),
        lambda m: m.listed.__setitem__(0, _conv()),
        lambda m: m.named.update({"more": _conv()}),
        lambda m: m.named.pop("bn"),
        lambda m: m.iterated.append(_conv()),
        lambda m: m.iterated.__setitem__(1, nn.Identity()),
        lambda m: m.blocks.append(nn.Tanh()),
        lambda m: m.blocks.__delitem__(0),
        lambda m: m.blocks.__setitem__(0, nn.Tanh()),
        lambda m: setattr(m.blocks[0], "bn", nn.Identity()),
        lambda m: setattr(m.blocks[0], "conv", _conv(bias=False)),
        lambda m: setattr(m.blocks[0], "relu", nn.Tanh()),
        lambda m: m.add_module("unused", nn.ReLU()),
        lambda m: setattr(m.blocks[0], "forward", lambda x: x * 2),
        lambda m: setattr(m.blocks[0].conv, "forward", lambda x: x * 2),
        lambda m: setattr(m.stem[1], "forward", lambda x: x * 2),
        lambda m: setattr(m.stem[0], "padding_mode", "circular"),
        lambda m: (
            setattr(m.blocks[0].conv, "padding_mode", "reflect")
            or setattr(m.blocks[0].conv, "_reversed_padding_repeated_twice", [1, 1, 1, 1])
        ),
    ],
)
def test_children_that_change_after_convert(change):
    plain, converted = check(Parts(), images(*SHAPE))
    assert None not in fused(converted).values()
    for model in (plain, converted):
        change(model)
    agree(plain, converted, images(*SHAPE))
    again = bnfast.convert(converted, train="keep")
    agree(plain, again, images(*SHAPE))


def test_slices_of_a_sequential():
    plain, converted = converted_pair(
        nn.Sequential(
            nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        )
    )
    for part in (slice(0, 2), slice(1, 5), slice(3, None), slice(0, 0)):
        agree(plain[part], converted[part], images(*SHAPE))
    agree(plain[:2] + plain[2:], converted[:2] + converted[2:], images(*SHAPE))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = copy.deepcopy(plain)

        def forward(self, x):
            return self.layers[3:](self.layers[:3](x))

    check(Net(), images(*SHAPE))


def test_object_with_a_forward_of_its_own():
    model = Parts()
    model.blocks[0].forward = lambda x: x * 3
    model.stem[0].forward = lambda x: x * 2
    plain = prepare(model)
    converted = bnfast.convert(plain, train="keep")
    agree(plain, converted, images(*SHAPE))
    bnfast.revert(converted)
    assert "forward" in converted.stem[0].__dict__ and "forward" in converted.blocks[0].__dict__


@pytest.mark.parametrize("path", ["", "conv", "bn", "relu"])
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_that_come_and_go(path, kind, monkeypatch):
    plain, converted = converted_pair(Base())
    plain.relu.inplace = converted.relu.inplace = False
    counter = PlanCounter(monkeypatch)
    calls = {id(plain): 0, id(converted): 0}
    handles = []
    for model in (plain, converted):

        def hook(module, *values, model=model):
            calls[id(model)] += 1
            return values[-1] * 2 if kind == "forward" else None

        register = f"register_{kind}_hook"
        handles.append(getattr(model.get_submodule(path), register)(hook))
    agree(plain, converted, images(*SHAPE))
    assert calls[id(plain)] == calls[id(converted)] == 4
    for handle in handles:
        handle.remove()
    agree(plain, converted, images(*SHAPE))
    assert calls[id(converted)] == 4
    assert counter.runs(converted, images(*SHAPE))


@pytest.mark.parametrize(
    "register",
    [
        nn.modules.module.register_module_forward_hook,
        nn.modules.module.register_module_forward_pre_hook,
        nn.modules.module.register_module_full_backward_hook,
    ],
)
def test_global_hooks(register):
    plain, converted = converted_pair(Base())
    plain.relu.inplace = converted.relu.inplace = False
    seen = []
    handle = register(lambda module, *values: seen.append(module) or None)
    try:
        agree(plain, converted, images(*SHAPE))
    finally:
        handle.remove()
    assert [m in seen for m in converted.modules()] == [m in seen for m in plain.modules()]
    agree(plain, converted, images(*SHAPE))


class Doubled(nn.Module):
    def forward(self, weight):
        return weight * 2


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    "change",
    [
        lambda conv: parametrize.register_parametrization(conv, "weight", Doubled()),
        lambda conv: parametrizations.weight_norm(conv),
        lambda conv: parametrizations.orthogonal(conv),
        lambda conv: weight_norm(conv),
        lambda conv: spectral_norm(conv),
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_parametrized_convolution(change, when, frozen):
    plain = prepare(Base())
    converted = copy.deepcopy(plain)
    if when == "after":
        bnfast.convert(converted, train="keep", inplace=True)
    for model in (plain, converted):
        torch.manual_seed(4)
        change(model.conv)
        model.conv.requires_grad_(not frozen)
    if when == "before":  # the older weight_norm has no deepcopy
        bnfast.convert(converted, train="keep", inplace=True)
    agree(plain, converted, images(*SHAPE))


def test_parametrized_norm():
    plain, converted = converted_pair(Base())
    for model in (plain, converted):
        parametrize.register_parametrization(model.bn, "weight", Doubled())
    agree(plain, converted, images(*SHAPE))
    for model in (plain, converted):
        parametrize.remove_parametrizations(model.bn, "weight")
    agree(plain, converted, images(*SHAPE))


@pytest.mark.parametrize("name", ["conv.weight", "conv.bias", "bn.weight", "bn.bias"])
def test_requires_grad_changes_after_convert(name):
    plain, converted = converted_pair(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), Base()))
    for needs in (True, False):
        for model in (plain, converted):
            parameter = model[2].get_parameter(name)
            parameter.requires_grad_(needs)
        agree(plain, converted, images(*SHAPE))
    for needs in (True, False):
        for model in (plain, converted):
            model.requires_grad_(needs)
        agree(plain, converted, images(*SHAPE))


def test_single_norms_in_another_mode(monkeypatch):
    plain, converted = converted_pair(Parts())
    counter = PlanCounter(monkeypatch)
    for training in (True, False):
        for name in ("stem.1", "listed.1", "blocks.0.bn", "blocks.0"):
            for model in (plain, converted):
                model.train(training)
                model.get_submodule(name).train(not training)
            agree(plain, converted, images(*SHAPE), modes=(None,))
            assert counter.runs(converted, images(*SHAPE))


@pytest.mark.parametrize(
    "change",
    [
        lambda bn: setattr(bn, "eps", 0.1),
        lambda bn: setattr(bn, "momentum", 0.5),
        lambda bn: setattr(bn, "momentum", None),
        lambda bn: setattr(bn, "track_running_stats", False),
        lambda bn: bn.reset_running_stats(),
        lambda bn: setattr(bn, "weight", None),
        lambda bn: setattr(bn, "weight", nn.Parameter(torch.full((4,), 3.0, dtype=torch.float64))),
        lambda bn: bn.running_mean.add_(1),
        lambda bn: setattr(bn, "running_mean", torch.ones(4, dtype=torch.float64)),
        lambda bn: (setattr(bn, "running_mean", None), setattr(bn, "running_var", None)),
    ],
)
def test_norms_that_change_after_convert(change):
    plain, converted = converted_pair(Base())
    for model in (plain, converted):
        change(model.bn)
    agree(plain, converted, images(*SHAPE))


def test_slope_that_changes_after_convert():
    plain, converted = check(
        nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.LeakyReLU(0.1)), images(*SHAPE)
    )
    for model in (plain, converted):
        model[2].negative_slope = 0.4
    agree(plain, converted, images(*SHAPE))


def test_timm_norm_that_changes_after_convert():
    norm_act = pytest.importorskip("timm.layers.norm_act")
    model = nn.Sequential(nn.Conv2d(4, 4, 1), norm_act.BatchNormAct2d(4), nn.Conv2d(4, 4, 1))
    changes = [
        lambda bn: setattr(bn, "act", nn.SiLU()),
        lambda bn: setattr(bn, "drop", nn.Dropout(0.5)),
        lambda bn: setattr(bn, "act", nn.Identity()),
        lambda bn: setattr(bn, "act", nn.Tanh()),
    ]
    for change in changes:
        plain, converted = check(copy.deepcopy(model), images(*SHAPE))
        assert fused(converted) == {"1": "conv+bn+relu"}
        for m in (plain, converted):
            change(m[1])
        agree(plain, converted, images(*SHAPE))


def test_shared_modules():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = Base(), Base()
            self.b.conv = self.a.conv
            self.c = self.a

        def forward(self, x):
            return self.c(self.b(self.a(x)))

    plain, converted = check(Net(), images(*SHAPE))
    assert converted.b.conv is converted.a.conv and converted.c is converted.a
    for model in (plain, converted):
        model.a.conv.requires_grad_()
    agree(plain, converted, images(*SHAPE))
