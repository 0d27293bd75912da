"""Chains whose units refer to each other: residuals from inside, two readers, convolutions that take the phases around them along.

The joined form is checked against plain PyTorch on every backend that has it; the reference is given it here, so that the
autograd Function's own part is seen in float64.
"""

import copy
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bnfast import dispatch, ops, reference

LAYOUTS = [torch.channels_last, torch.contiguous_format]


class Layer(nn.Module):
    """A frozen convolution and a BatchNorm away from their defaults."""

    def __init__(self, in_channels, out_channels, kernel=1, stride=1, groups=1, bias=False):
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel, stride, kernel // 2, 1, groups, bias=bias
        ).requires_grad_(False)
        self.bn = nn.BatchNorm2d(out_channels)
        nn.init.uniform_(self.bn.weight, -1, 2)
        nn.init.normal_(self.bn.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))

    def unit(self, act="identity", residual_source=None, source=None, residual=None) -> ops.Unit:
        conv, bn = self.conv, self.bn
        return ops.Unit(
            conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups,
            gamma=bn.weight, beta=bn.bias, running_mean=bn.running_mean, running_var=bn.running_var,
            num_batches_tracked=bn.num_batches_tracked, residual=residual, act=act, source=source,
            residual_source=residual_source,
            use_batch_statistics=bn.training,
        )  # fmt: skip


class Net(nn.Module):
    """Layers, what plain PyTorch makes of them, and the chain of units that is the same."""

    def __init__(self, *layers: Layer):
        super().__init__()
        self.layers = nn.ModuleList(layers)


class Bottleneck(Net):
    """Two bottlenecks, the first with a shortcut that strides, the second with the plain one: every link there is."""

    def __init__(self, kernel=3):
        super().__init__(
            Layer(18, 10), Layer(10, 10, kernel, 2), Layer(18, 24, 1, 2), Layer(10, 24, bias=True),
            Layer(24, 10), Layer(10, 10, kernel), Layer(10, 24), Layer(24, 9, kernel),
        )  # fmt: skip

    def forward(self, x):
        a, b, shortcut, c, d, e, f, last = self.layers
        y = F.relu(c(F.relu(b(F.relu(a(x))))) + shortcut(x))
        y = F.relu(f(F.leaky_relu(e(F.relu6(d(y))), 0.01)) + y)
        return F.relu(last(y))

    def units(self, x):
        a, b, shortcut, c, d, e, f, last = self.layers
        return [
            a.unit("relu"),
            b.unit("relu"),
            shortcut.unit(source=-1),
            c.unit("relu", residual_source=2, source=1),
            d.unit("relu6"),
            e.unit("leaky_relu"),
            f.unit("relu", residual_source=3),
            last.unit("relu"),
        ]


class Linear(Net):
    """Additions without activation behind them, smooth activations, a depthwise convolution in between, a residual from outside."""

    def __init__(self):
        super().__init__(
            Layer(16, 16), Layer(16, 32), Layer(32, 32, 3, groups=32), Layer(32, 16),
            Layer(16, 16, 3), Layer(16, 16, 3),
        )  # fmt: skip

    def forward(self, x):
        a, b, c, d, e, f = self.layers
        y = F.hardswish(a(x))
        z = d(F.silu(c(F.silu(b(y))))) + y
        z = F.silu(e(z) + z)
        return F.relu(f(z) + x)

    def units(self, x):
        a, b, c, d, e, f = self.layers
        return [
            a.unit("hardswish"),
            b.unit("silu"),
            c.unit("silu"),
            d.unit(residual_source=0),
            e.unit("silu", residual_source=3),
            f.unit("relu", residual=x),
        ]


class End(Net):
    """A unit with a residual and an activation that its chain ends with."""

    def __init__(self):
        super().__init__(Layer(20, 9), Layer(9, 20, bias=True))

    def forward(self, x):
        a, b = self.layers
        return F.leaky_relu(b(F.relu6(a(x))) + x, 0.01)

    def units(self, x):
        a, b = self.layers
        return [a.unit("relu6"), b.unit("leaky_relu", residual_source=-1)]


class Pooled(Net):
    """Max-pooling behind units, with and without a residual, in the middle, as a residual and at the end."""

    def __init__(self):
        super().__init__(Layer(18, 10, 3), Layer(10, 24), Layer(24, 24, 3), Layer(24, 24))

    def forward(self, x):
        a, b, c, d = self.layers
        y = F.max_pool2d(F.relu(a(x)), 3, 2, 1)
        y = F.max_pool2d(F.silu(b(y)), (2, 1), (1, 1))
        return F.max_pool2d(F.relu(d(F.relu(c(y))) + y), (1, 3), 1, (0, 1))

    def units(self, x):
        a, b, c, d = self.layers
        return [
            a.unit("relu")._replace(pool=ops.MaxPool((3, 3), (2, 2), (1, 1))),
            b.unit("silu")._replace(pool=ops.MaxPool((2, 1), (1, 1), (0, 0))),
            c.unit("relu"),
            d.unit("relu", residual_source=1)._replace(pool=ops.MaxPool((1, 3), (1, 1), (0, 1))),
        ]


class TwoReaders(Net):
    """A unit that two convolutions read and nobody else, and one that is its own reader's residual."""

    def __init__(self):
        super().__init__(Layer(16, 8), Layer(8, 24, 3), Layer(8, 24, 3), Layer(24, 24))

    def forward(self, x):
        a, b, c, d = self.layers
        y = F.relu(a(x))
        y = F.relu(b(y) + c(y))
        return F.relu(d(y) + y)

    def units(self, x):
        a, b, c, d = self.layers
        return [
            a.unit("relu"),
            c.unit(),
            b.unit("relu", residual_source=1, source=0),
            d.unit("relu", residual_source=2),
        ]


class Crossed(Net):
    """A unit that is first somebody's residual and then somebody's input, whose convolution's output is a residual itself."""

    def __init__(self, act=F.relu, name="relu"):
        super().__init__(Layer(16, 24), Layer(16, 24), Layer(24, 16, 3), Layer(24, 16))
        self.act, self.name = act, name

    def forward(self, x):
        a, b, c, d = self.layers
        y = self.act(a(x))
        return F.relu(d(F.relu(b(x) + y)) + c(y))

    def units(self, x):
        a, b, c, d = self.layers
        return [
            a.unit(self.name),
            b.unit("relu", residual_source=0, source=-1),
            c.unit(source=0),
            d.unit("relu", residual_source=2, source=1),
        ]


class CrossedTwice(Crossed):
    """The residual of one unit that another unit has read before, on the way back, and whose gradient is not that one's db alone."""

    def __init__(self):
        super().__init__(lambda y: y, "identity")

    def units(self, x):
        a, b, c, d = self.layers
        return [
            a.unit("identity"),
            b.unit("relu", residual_source=0, source=-1),
            d.unit(source=1),
            c.unit("relu", residual_source=2, source=0),
        ]


class ReadTwice(Net):
    """A unit without activation that is the residual of two others, and of each of them of something else too."""

    def __init__(self):
        super().__init__(Layer(16, 16), Layer(16, 16, 3), Layer(16, 16))

    def forward(self, x):
        a, b, c = self.layers
        r = a(x)
        return F.relu(c(F.relu(b(x) + r)) + r)

    def units(self, x):
        a, b, c = self.layers
        return [
            a.unit(),
            b.unit("relu", source=-1, residual_source=0),
            c.unit("relu", source=1, residual_source=0),
        ]


class CrossedLinear(Crossed):
    def __init__(self):
        super().__init__(lambda y: y, "identity")


class TwoActivations(Net):
    """A residual with an activation of its own."""

    def __init__(self):
        super().__init__(Layer(16, 16, 3), Layer(16, 16), Layer(16, 8))

    def forward(self, x):
        a, b, c = self.layers
        return F.relu(c(F.relu(b(x) + F.relu(a(x)))))

    def units(self, x):
        a, b, c = self.layers
        return [a.unit("relu"), b.unit("relu", residual_source=0, source=-1), c.unit("relu")]


FORMS = {"unit by unit": "cudnn", "joined": "fused", "without z": "gram"}


@pytest.fixture(params=FORMS)
def form(request, monkeypatch) -> str:
    set_route(monkeypatch, FORMS[request.param])
    if request.param != "unit by unit":
        monkeypatch.setattr(reference, "joins_units", lambda: True)
        monkeypatch.setattr(
            reference,
            "fuses_chain",
            lambda x, weight, *geometry: geometry[-1] == 1 and weight.dim() == 4,
        )
    if request.param == "without z":
        monkeypatch.setattr(reference, "fuses_gram", is_pointwise)
    return request.param


def set_route(monkeypatch, route: str) -> None:
    """How Triton's convolutions go, where there is Triton."""
    if dispatch.backends()["triton"] is True:
        monkeypatch.setattr(dispatch.module("triton").conv, "route", route)


def is_pointwise(x, weight, stride, padding, groups) -> bool:
    return groups == 1 and tuple(weight.shape[2:]) == tuple(stride) == (1, 1) and not any(padding)


@pytest.fixture
def chain_backend(backend):
    """The backends that chains can be asked for by name: all but CUDA's emulator."""
    if backend.name == "cuda" and backend.device.type == "cpu":
        pytest.skip("the emulator is no backend that a chain could name")
    return backend


def step(run, net: nn.Module, x: Tensor, needs_x: bool, dy: Tensor) -> dict[str, Tensor]:
    """Output, gradients and running statistics after one pass."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_(needs_x)
    y = run(x)
    net.zero_grad()
    y.backward(dy)
    found = {"y": y.detach()} | ({"dx": x.grad} if needs_x else {})
    found |= {n: p.grad for n, p in net.named_parameters() if p.grad is not None}
    return found | {n: b.clone() for n, b in net.named_buffers()}


@pytest.mark.parametrize("memory_format", LAYOUTS, ids=str)
@pytest.mark.parametrize("needs_x", [True, False], ids=["dx", "no dx"])
@pytest.mark.parametrize(
    "make",
    [
        Bottleneck,
        Linear,
        End,
        Pooled,
        TwoReaders,
        Crossed,
        CrossedLinear,
        CrossedTwice,
        ReadTwice,
        TwoActivations,
    ],
)
@pytest.mark.parametrize("mode", ["train", "eval", "some frozen"])
def test_chain_is_what_pytorch_computes(
    make, needs_x, memory_format, mode, form, chain_backend, poisoned_memory
):
    """float64, ragged sizes, data off centre: output, every gradient and the running statistics."""
    net, twin = make(), make()
    twin.load_state_dict(net.state_dict())
    if mode == "some frozen":  # statistics of one layer, the affine parameters of another
        for one in (net, twin):
            one.layers[1].bn.eval()
            one.layers[0].bn.requires_grad_(False)
            one.layers[-1].bn.bias.requires_grad_(False)
    for one in (net, twin):
        one.double().to(chain_backend.device).train(one.training and mode != "eval")
        if mode == "some frozen":
            one.layers[1].bn.eval()
    x = torch.randn(3, net.layers[0].conv.in_channels, 7, 5, dtype=torch.float64) * 2 + 3
    x = x.to(chain_backend.device).contiguous(memory_format=memory_format)
    with torch.no_grad():
        dy = torch.randn_like(net(x))
    net.load_state_dict(twin.state_dict())
    expected = step(net, net, x, needs_x, dy)
    found = step(
        lambda x: ops.frozen_conv_bn_act(x, twin.units(x), chain_backend.name), twin, x, needs_x, dy
    )
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        scale = 1 + value.abs().max().item()
        torch.testing.assert_close(
            found[name], value, rtol=1e-9, atol=1e-10 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "make, route",
    [(Bottleneck, "fused"), (Bottleneck, "gram"), (TwoReaders, "fused"), (End, "gram")],
)
def test_joined_is_as_exact_as_unit_by_unit(make, route, dtype, chain_backend, monkeypatch):
    """Against float64: the error of the joined forms is at most twice that of the phases one after the other."""
    if chain_backend.name != "triton":
        pytest.skip("the other backends run unit by unit")
    nets = [make() for _ in range(3)]
    for net in nets[1:]:
        net.load_state_dict(nets[0].state_dict())
    for net in nets:
        for layer in net.layers:
            layer.conv.to(dtype).double() if net is nets[0] else layer.conv.to(dtype)
            layer.bn.to(torch.float64 if net is nets[0] else torch.float32)
            layer.to(chain_backend.device)
    x = (torch.randn(2, nets[0].layers[0].conv.in_channels, 9, 7) * 2 + 1).to(
        chain_backend.device, dtype
    )
    x = x.contiguous(memory_format=torch.channels_last)
    results = []
    for net, way in zip(nets, ("cudnn", "cudnn", route), strict=True):
        set_route(monkeypatch, way)
        name = "reference" if net is nets[0] else chain_backend.name
        given = x.double() if net is nets[0] else x
        torch.manual_seed(1)
        with torch.no_grad():
            shape = net.double()(given.double()).shape if net is nets[0] else results[0]["y"].shape
        dy = torch.randn(shape, device=chain_backend.device).to(dtype).to(given.dtype)
        dy = dy.contiguous(memory_format=torch.channels_last)
        run = lambda x, net=net, name=name: ops.frozen_conv_bn_act(x, net.units(x), name)  # noqa: E731
        results.append(step(run, net, given, True, dy))
    exact, apart, joined = results
    for name, value in exact.items():
        if value.dim() == 0 or name.endswith(("running_mean", "running_var")):
            continue
        size = value.norm().item()
        allowed = 2 * (apart[name].double() - value).norm().item() + 1e-6 * size
        error = (joined[name].double() - value).norm().item()
        assert error <= allowed, f"{name}: {error / size:.3g}, allowed {allowed / size:.3g}"


def test_saved_tensors_go_with_their_unit(monkeypatch):
    """While a unit's backward runs, what the units behind it saved is no longer there; with retain_graph it stays."""
    x, layers = torch.randn(2, 8, 6, 6, requires_grad=True), [Layer(8, 8) for _ in range(3)]
    kept: list[weakref.ref] = []
    alive: list[int] = []

    def pack(t):
        t = t.clone()
        if t.dim() == 4 and t.shape[2] > 1:
            kept.append(weakref.ref(t))
        return t

    run = reference.bn_bwd_reduce_apply_dgrad

    def counted(*args):
        alive.append(sum(ref() is not None for ref in kept))
        return run(*args)

    monkeypatch.setattr(reference, "bn_bwd_reduce_apply_dgrad", counted)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = ops.frozen_conv_bn_act(x, [layer.unit("relu") for layer in layers], "reference")
    assert len(kept) == 3
    y.backward(torch.randn_like(y), retain_graph=True)
    assert alive == [3, 3, 3]
    y.backward(torch.randn_like(y))
    assert alive[3:] == [3, 2, 1]


@pytest.mark.parametrize("make", [Bottleneck, End, Linear, TwoReaders])
@pytest.mark.parametrize("needs_x", [True, False], ids=["dx", "no dx"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_low_memory_is_the_same_to_the_bit(make, needs_x, dtype, chain_backend):
    """And saves less: no z of a 1x1 convolution with twice as many channels as it reads, behind a unit without residual."""
    net = make().to(chain_backend.device)
    for layer in net.layers:
        layer.conv.to(dtype)
    x = torch.randn(2, net.layers[0].conv.in_channels, 6, 5).to(chain_backend.device, dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    dy, results, saved = None, [], []
    for low in (False, True):
        net.load_state_dict(state)
        sizes = {}

        def pack(t, sizes=sizes):
            sizes[t.data_ptr()] = t.nbytes
            return t

        def run(x, low=low):
            return ops.frozen_conv_bn_act(x, net.units(x), chain_backend.name, low_memory=low)

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            given = x.clone(memory_format=torch.preserve_format).requires_grad_(needs_x)
            y = run(given)
        dy = torch.randn_like(y) if dy is None else dy
        net.zero_grad()
        y.backward(dy)
        found = {"y": y.detach(), "dx": given.grad} | {n: p.grad for n, p in net.named_parameters()}
        results.append(found | {n: b.clone() for n, b in net.named_buffers()})
        saved.append(sum(sizes.values()))
    for name, value in results[0].items():
        assert value is results[1][name] is None or torch.equal(value, results[1][name]), name
    # Those that fall away, values and biases counted.
    dropped = {
        "Bottleneck": 2 * 3 * 3 * 48,
        "End": 2 * 6 * 5 * 20,
        "Linear": 2 * 6 * 5 * 32,
    }
    dropped = dropped.get(make.__name__, 0) * x.element_size()
    assert 0 <= dropped - (saved[0] - saved[1]) <= 4 * 48, saved


def test_low_memory_beside_joined_convolutions(chain_backend, monkeypatch):
    """What is made again only in its own backward pass has no z yet where the convolution behind it is joined with others."""
    set_route(monkeypatch, "fused")
    net = Net(Layer(16, 8), Layer(8, 16, groups=2), Layer(16, 8), Layer(8, 8)).to(
        chain_backend.device
    )
    a, b, c, d = net.layers
    x = torch.randn(2, 16, 6, 5, device=chain_backend.device)
    x = x.contiguous(memory_format=torch.channels_last)
    units = [a.unit("relu"), b.unit("relu"), c.unit("relu"), d.unit("relu")]
    results, dy = [], torch.randn(2, 8, 6, 5, device=chain_backend.device)
    for low in (False, True):
        y = ops.frozen_conv_bn_act(x, units, chain_backend.name, low_memory=low)
        results.append(
            torch.autograd.grad(y, list(filter(lambda p: p.requires_grad, net.parameters())), dy)
        )
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("act", ["relu", "silu"])
def test_a_leading_batchnorm_waits_for_its_convolution(act, chain_backend, monkeypatch):
    """Without a convolution of its own it is applied as the one behind it reads, as in DenseNet."""
    set_route(monkeypatch, "fused")
    torch.manual_seed(0)
    first = nn.BatchNorm2d(18).to(chain_backend.device)
    nn.init.uniform_(first.weight, -1, 2)
    nn.init.normal_(first.bias)
    layer = Layer(18, 24).to(chain_backend.device)
    x = (torch.randn(3, 18, 7, 6, device=chain_backend.device) + 2).contiguous(
        memory_format=torch.channels_last
    )
    dy = torch.randn(3, 24, 7, 6, device=chain_backend.device)
    results = []
    for dtype, plain in ((torch.float64, True), (torch.float32, False)):
        bn, net = copy.deepcopy(first).to(dtype), copy.deepcopy(layer).to(dtype)
        given = x.to(dtype).requires_grad_()
        if plain:
            y = F.relu(net(getattr(F, act)(bn(given))))
        else:
            leading = ops.Unit(
                gamma=bn.weight, beta=bn.bias, running_mean=bn.running_mean,
                running_var=bn.running_var, num_batches_tracked=bn.num_batches_tracked, act=act,
            )  # fmt: skip
            y = ops.frozen_conv_bn_act(given, [leading, net.unit("relu")], chain_backend.name)
        y.backward(dy.to(dtype))
        affine = [bn.weight, bn.bias, net.bn.weight, net.bn.bias]
        grads = [given.grad, *(p.grad for p in affine)]
        results.append([y.detach(), *grads, bn.running_mean, bn.running_var])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("side", [1, 3])
def test_a_gradient_in_another_layout_goes_on_in_that_of_the_input(side, normalize, chain_backend):
    """Attention and means hand gradients back in NCHW, or expanded; behind a convolution without BatchNorm they stayed so."""
    torch.manual_seed(0)
    device = chain_backend.device
    x = torch.randn(2, 16, 6, 5, device=device).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(24, 16, side, side, device=device) / 12
    weight = weight.contiguous(memory_format=torch.channels_last)
    conv = ((1, 1), (side // 2,) * 2, (1, 1))
    given, wide = x.clone(memory_format=torch.preserve_format).requires_grad_(), x.double()
    wide.requires_grad_()
    unit = ops.Unit(weight, None, *conv, normalize=normalize)
    y = ops.frozen_conv_bn_act(given, [unit], chain_backend.name)
    expected = F.conv2d(wide, weight.double(), None, *conv)
    if normalize:
        expected = F.batch_norm(expected, None, None, training=True)
    kept = torch.randn_like(y, memory_format=torch.contiguous_format)
    for dy in (kept, kept[:, :, :1, :1].expand(y.shape)):
        before = dy.clone()
        (dx,) = torch.autograd.grad(y, given, dy, retain_graph=True)
        (oracle,) = torch.autograd.grad(expected, wide, dy.double(), retain_graph=True)
        torch.testing.assert_close(dx.double(), oracle, rtol=1e-4, atol=1e-4)
        assert dx.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(dy, before)


def test_links_that_lead_nowhere_are_refused():
    x, layer = torch.randn(2, 8, 4, 4), Layer(8, 8)
    with pytest.raises(ValueError, match=r"source of unit 1 is 1; allowed are -1 to 0"):
        ops.frozen_conv_bn_act(x, [layer.unit(), layer.unit(source=1)])
    with pytest.raises(ValueError, match=r"residual_source of unit 0 is -2; allowed are -1 to -1"):
        ops.frozen_conv_bn_act(x, [layer.unit(residual_source=-2)])
