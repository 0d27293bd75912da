"""Squeeze and excitation in front of a unit: its phases, the chain, and where convert() finds it."""

import copy

import pytest
import torch
from closeness import accumulator, assert_bit_equal, assert_close_to_oracle
from torch import nn
from torch.nn import functional as F

import bnfast
from bnfast import native, ops, pointwise, recording, reference
from bnfast.reference import Above, Norm

BACKENDS = [
    "reference",
    pytest.param(
        "cpu", marks=pytest.mark.skipif(native.unavailable is not None, reason="not built")
    ),
]
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
needs_extension = pytest.mark.skipif(native.unavailable is not None, reason=str(native.unavailable))


def phase_arguments(shape, dtype, layout, has_bn):
    acc = accumulator(dtype)
    c = shape[1]
    z = (torch.randn(shape, dtype=acc) * 2 + 3).to(dtype).contiguous(memory_format=LAYOUTS[layout])
    dy = torch.randn(shape, dtype=acc).to(dtype).contiguous(memory_format=LAYOUTS[layout])
    if not has_bn:
        return dy, z, None, None, None, None
    return (
        dy,
        z,
        torch.randn(c, dtype=acc) + 3,
        torch.rand(c, dtype=acc),
        torch.randn(c),
        torch.randn(c),
    )


@needs_extension
@pytest.mark.parametrize("has_bn", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape",
    [
        (3, 5, 7, 9),
        (2, 33, 13, 11),
        (1, 100, 1, 1),
        (1, 2, 300, 301),
        (2, 64, 56, 57),
        (0, 4, 3, 3),
        (2, 3, 0, 4),
    ],
    ids=str,
)
def test_se_bwd_reduce(shape, dtype, layout, has_bn):
    torch.manual_seed(0)
    arguments = phase_arguments(shape, dtype, layout, has_bn)
    for act in reference.ACTS if has_bn else ("identity",):
        got = native.se_bwd_reduce(*arguments, act, 0.1)
        wide = [None if t is None else t.double() for t in arguments]
        dy, z, *rest = wide
        y = z if not has_bn else reference.bn_fwd_apply(z, *rest, None, act, 0.1, False)[0]
        terms = dy * y
        size = terms.abs()
        if has_bn:  # the pre-activation's own rounding, where its terms cancel
            mean, rstd, gamma, beta = (reference.per_channel(t, z) for t in rest)
            size = size + dy.abs() * ((gamma * rstd).abs() * (z.abs() + mean.abs()) + beta.abs())
        assert got.dtype == accumulator(dtype)
        # y is rounded once to dtype, in every term.
        unit = torch.finfo(dtype).eps
        band = size.sum((2, 3)) * unit * 8 + 1e-300
        assert ((got.double() - terms.sum((2, 3))).abs() <= band).all()


@needs_extension
@pytest.mark.parametrize("layout", LAYOUTS)
def test_se_bwd_reduce_does_not_depend_on_threads(layout):
    torch.manual_seed(0)
    arguments = phase_arguments((3, 48, 61, 57), torch.float32, layout, True)
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(native.se_bwd_reduce(*arguments, "silu", 0.0))
    torch.set_num_threads(before)
    assert all(torch.equal(results[0], r) for r in results)


@needs_extension
def test_opcheck():
    arguments = phase_arguments((2, 5, 4, 3), torch.float32, "channels_last", True)
    torch.library.opcheck(torch.ops.bnfast.se_bwd_reduce.default, (*arguments, "silu", 0.0))


def tensors(*shapes):
    return [torch.randn(s, dtype=torch.float64) for s in shapes]


def plain_squeeze(x, w1, b1, w2, b2, act, gate):
    h = F.conv2d(x.mean((2, 3), keepdim=True), w1, b1)
    g = F.conv2d(reference._act_value(h, act, 0.0), w2, b2)
    return x * (torch.sigmoid(g) if gate == "sigmoid" else F.hardsigmoid(g))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("place", ["first", "after a unit", "after a residual"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "act, gate",
    [
        ("relu", "sigmoid"),
        ("silu", "sigmoid"),
        ("relu", "hardsigmoid"),
        ("hardswish", "hardsigmoid"),
        ("identity", "sigmoid"),
    ],
)
def test_chain_equals_plain_composition(backend, place, layout, act, gate):
    torch.manual_seed(1)
    n, j, s, c = 3, 6, 4, 5
    x, w0, w1, b1, w2, b2, w = tensors(
        (n, j, 7, 5), (j, 1, 3, 3), (s, j, 1, 1), (s,), (j, s, 1, 1), (j,), (c, j, 1, 1)
    )
    x = x.contiguous(memory_format=LAYOUTS[layout]) + 0.5
    (residual,) = tensors((n, j, 7, 5))
    gammas = [torch.rand(j, dtype=torch.float64) + 0.5, torch.rand(c, dtype=torch.float64) + 0.5]
    betas = tensors((j,), (c,))
    (dy,) = tensors((n, c, 7, 5))
    squeeze = ops.SqueezeExcite(w1, b1, w2, b2, act, gate)
    results = []
    for is_plain in (True, False):
        leaves = [t.clone().requires_grad_() for t in (x, residual, *gammas, *betas)]
        value, r, g0, g1, e0, e1 = leaves
        with_residual = place == "after a residual"
        if is_plain:
            if place != "first":
                value = F.conv2d(value, w0, None, 1, 1, 1, j)
                value = F.batch_norm(value, None, None, g0, e0, True)
                value = F.silu(value + r if with_residual else value)
            value = plain_squeeze(value, w1, b1, w2, b2, act, gate)
            y = F.relu(F.batch_norm(F.conv2d(value, w), None, None, g1, e1, True))
        else:
            units = []
            if place != "first":
                units.append(ops.Unit(w0, None, (1, 1), (1, 1), (1, 1), j, gamma=g0, beta=e0, act="silu",
                                      residual=r if with_residual else None))  # fmt: skip
            units.append(
                ops.Unit(
                    w,
                    None,
                    (1, 1),
                    (0, 0),
                    (1, 1),
                    1,
                    gamma=g1,
                    beta=e1,
                    act="relu",
                    squeeze=squeeze,
                )
            )
            y = ops.frozen_conv_bn_act(value, units, backend)
        used = [t for t in leaves if place != "first" or t is leaves[0] or t is g1 or t is e1]
        used = [t for t in used if with_residual or t is not r]
        results.append([y.detach(), *torch.autograd.grad(y, used, dy)])
    for ours, theirs in zip(*results, strict=True):
        assert torch.isfinite(ours).all()
        scale = theirs.abs().max().item()
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10 * scale)


@pytest.mark.parametrize(
    "change, word",
    [({"act": "gelu"}, "squeeze.act"), ({"gate": "tanh"}, "squeeze.gate"), ({"reduce_weight": torch.randn(2, 4, 1, 1, requires_grad=True)}, "gradient")],
)  # fmt: skip
def test_bad_squeeze_is_refused(change, word):
    squeeze = ops.SqueezeExcite(torch.randn(2, 4, 1, 1), None, torch.randn(4, 2, 1, 1), None)
    unit = ops.Unit(
        torch.randn(3, 4, 1, 1), None, (1, 1), (0, 0), (1, 1), squeeze=squeeze._replace(**change)
    )
    with pytest.raises(ValueError, match=word):
        ops.frozen_conv_bn_act(torch.randn(2, 4, 3, 3), [unit])


class Block(nn.Module):
    """conv-bn-act, squeeze and excitation in one of the usual spellings, conv-bn."""

    def __init__(self, spelling="module", gate="sigmoid"):
        super().__init__()
        self.conv1, self.bn1 = (
            nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False),
            nn.BatchNorm2d(6),
        )
        self.pool, self.fc1, self.act = nn.AdaptiveAvgPool2d(1), nn.Conv2d(6, 3, 1), nn.ReLU()
        self.fc2, self.gate = (
            nn.Conv2d(3, 6, 1),
            nn.Sigmoid() if gate == "sigmoid" else nn.Hardsigmoid(),
        )
        self.conv2, self.bn2 = nn.Conv2d(6, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.spelling = spelling

    def forward(self, x):
        x = F.silu(self.bn1(self.conv1(x)))
        s = x.mean((2, 3), keepdim=True) if self.spelling == "mean" else self.pool(x)
        s = self.fc2(self.act(self.fc1(s)))
        s = torch.sigmoid(s) if self.spelling == "mean" else self.gate(s)
        if self.spelling == "scaled":
            s = s * 0.5
        y = s * x if self.spelling == "module" else x * s
        z = self.bn2(self.conv2(y))
        return (z, y) if self.spelling == "two readers" else z


def compare(model, prepare=lambda m: None, **options):
    plain, ours = model, bnfast.convert(model, **options)
    if not options:
        bnfast.freeze(plain, "bn")
    else:
        plain = copy.deepcopy(plain)
    prepare(plain)
    prepare(ours)
    x = torch.randn(4, 6, 9, 7, dtype=torch.float64)
    results = []
    for net in (plain, ours):
        given = x.clone().requires_grad_()
        out = net(given)
        out = sum(t.mean(1) for t in out) if isinstance(out, tuple) else out
        torch.manual_seed(3)
        out.backward(torch.randn_like(out))
        results.append(
            [out.detach(), given.grad, *(p.grad for p in net.parameters() if p.grad is not None)]
        )
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7 * max(1.0, b.abs().max().item()))
    return {e.name: e.fused_as for e in bnfast.explain(ours).fused}


@pytest.mark.parametrize(
    "spelling, gate", [("module", "sigmoid"), ("module", "hardsigmoid"), ("mean", "sigmoid")]
)
def test_found_in_its_usual_spellings(spelling, gate):
    torch.manual_seed(0)
    assert compare(Block(spelling, gate).double())["bn2"] == "se+conv+bn"


@pytest.mark.parametrize("spelling", ["two readers", "scaled"])
def test_left_alone_where_it_is_something_else(spelling):
    torch.manual_seed(0)
    assert compare(Block(spelling).double())["bn2"] == "conv+bn"


def test_trainable_gate_gets_its_gradients():
    torch.manual_seed(0)
    assert compare(Block().double(), train="keep")["bn2"] == "se+conv+bn"


def test_hook_on_a_part_is_called():
    calls = []

    def prepare(net):
        net.fc1.register_forward_hook(lambda *args: calls.append(1))

    torch.manual_seed(0)
    compare(Block().double(), prepare)
    assert len(calls) == 2


def test_unfreezing_the_gate_later_stays_correct():
    torch.manual_seed(0)
    compare(Block().double(), lambda net: net.fc2.requires_grad_(True))


def test_input_is_computed_again_and_not_saved():
    block = bnfast.convert(Block())
    x = torch.randn(2, 6, 16, 16)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        block(x)
    large = [t for t in saved if t.numel() >= 2 * 6 * 16 * 16]
    assert len(large) == 2  # z of both units


@needs_extension
def test_compiles_whole():
    torch.manual_seed(0)
    block = bnfast.convert(Block())
    x = torch.randn(2, 6, 8, 8, requires_grad=True)
    dy = torch.randn(2, 8, 8, 8)
    results = []
    for run in (block, torch.compile(block, fullgraph=True, backend="aot_eager")):
        block.zero_grad()
        y = run(x)
        results.append(
            [y.detach(), *torch.autograd.grad(y, [x, block.bn1.weight, block.bn2.bias], dy)]
        )
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_in_front_of_a_convolution_without_norm():
    """Its input gets the gradient through the gate too."""
    x = torch.randn(2, 6, 5, 4, dtype=torch.float64, requires_grad=True)
    weight, reduce, expand = (
        torch.randn(*shape, dtype=torch.float64)
        for shape in ((3, 6, 1, 1), (4, 6, 1, 1), (6, 4, 1, 1))
    )
    squeeze = ops.SqueezeExcite(reduce, None, expand, None)
    unit = ops.Unit(weight, None, (1, 1), (0, 0), (1, 1), normalize=False, squeeze=squeeze)
    y = ops.frozen_conv_bn_act(x, [unit])
    dy = torch.randn_like(y)
    gate = torch.sigmoid(F.conv2d(torch.relu(F.conv2d(x.mean((2, 3), True), reduce)), expand))
    expected = F.conv2d(x * gate, weight)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(
        torch.autograd.grad(y, x, dy)[0], torch.autograd.grad(expected, x, dy)[0]
    )


# ---- joined with the unit in front of it and the convolution behind it ---------------------------------------------------

JOINED_SHAPES = [(3, 5, 7, 9), (2, 33, 13, 11), (4, 16, 1, 3), (2, 40, 61, 57), (1, 64, 4, 4)]


def last(*size: int, mean: float = 0.0) -> torch.Tensor:
    return (torch.randn(size) + mean).contiguous(memory_format=torch.channels_last)


def norm_of(channels: int) -> Norm:
    return Norm(torch.randn(channels) + 2, torch.rand(channels) + 0.5, *torch.randn(2, channels))


@needs_extension
@pytest.mark.parametrize("act", reference.ACTS)
@pytest.mark.parametrize("shape", JOINED_SHAPES, ids=str)
def test_sums_of_a_plane(shape, act):
    """The mean that the gate is made of, and the five sums from which its gradient and those of gamma and beta follow."""
    torch.manual_seed(0)
    z, dy, norm = last(*shape, mean=2), last(*shape, mean=0.5), norm_of(shape[1])
    wide = Norm(*(t.double() for t in norm))
    plane = shape[2] * shape[3]
    y, _ = reference.bn_fwd_apply(z.double(), *wide, None, act, 0.1, False)
    size = 1 + (z.double() - 2).abs() + wide.beta.abs().view(1, -1, 1, 1) + 4
    scale = (size * (wide.gamma * wide.rstd).abs().clamp_min(1).view(1, -1, 1, 1)).mean((2, 3))
    found = native.se_fwd_reduce(z, norm, act, 0.1)
    assert_close_to_oracle(found, y.mean((2, 3)), [], "mean", scale=scale, terms=plane)

    sums = native.se_bwd_sums(dy, z, norm, act, 0.1)
    oracle = reference.se_bwd_sums(dy.double(), z.double(), wide, act, 0.1)
    assert sums.shape == (shape[0], 5, shape[1])
    largest = size.amax((2, 3)) * (wide.gamma * wide.rstd).abs().clamp_min(1)
    scale = largest * plane * dy.double().abs().amax((2, 3)).clamp_min(1) * 4
    for i, name in enumerate(("dy y", "dy act'", "dy act' (z - mean)", "act'", "act' (z - mean)")):
        assert_close_to_oracle(sums[:, i], oracle[:, i], [], name, scale=scale, terms=plane)

    # What they are for: the gradients of the unit, whose output's gradient is dy gate + shift.
    gate, shift = torch.rand(shape[:2]), torch.randn(shape[:2])
    full = dy.double() * gate.double()[:, :, None, None] + shift.double()[:, :, None, None]
    expected = reference.bn_bwd_reduce(full, z.double(), *wide, None, None, act, 0.1)
    found = native.se_bwd_norm(sums, gate, shift, norm.rstd)
    for name, one, other in zip(("dgamma", "dbeta"), found, expected, strict=True):
        bound = 8 * scale.sum(0) * (1 + wide.rstd)
        assert_close_to_oracle(one, other, [], name, scale=bound, terms=plane)


@needs_extension
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("shape", JOINED_SHAPES, ids=str)
def test_gated_as_the_convolutions_read(shape, threads, monkeypatch):
    """To the bit what comes of the gated tensor itself."""
    monkeypatch.setattr(pointwise, "mode", "1")
    torch.manual_seed(0)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        channels, ones = shape[1], [1, 1]
        z, norm, gate = last(*shape, mean=2), norm_of(channels), torch.rand(shape[:2])
        conv = (torch.randn(24, channels, 1, 1), None, ones, [0, 0], ones, 1)
        stats = (None, None, None, 0.1, 1e-5)
        y, _ = native.bn_fwd_apply(z, *norm, None, "silu", 0.0, False)
        expected = native.conv_forward(y * gate[:, :, None, None], *conv)
        found, _, _ = native.bn_fwd_apply_se_conv_fwd_reduce(
            z, norm, "silu", 0.0, gate, *conv, *stats
        )
        assert_bit_equal(found, expected, "z")

        dy, shift = last(*shape), torch.randn(shape[:2])
        sums = tuple(torch.randn(2, channels))
        above, last_two = Above(z, *norm, *sums), (None, None, "identity", 0.0, None)
        side = min(3, shape[2])
        depthwise = torch.randn(channels, 1, side, side)
        conv = (depthwise, list(shape[2:]), ones, [side // 2] * 2, ones, channels)
        conv = (
            depthwise,
            [shape[2] + side - 1 - side // 2 * 2, shape[3] + side - 1 - side // 2 * 2],
            *conv[2:],
        )
        nothing = (None, "identity", 0.0)
        gated = dy * gate[:, :, None, None] + shift[:, :, None, None]
        dx, _, _ = native.bn_bwd_apply_conv_dgrad_reduce(
            gated, above, "silu", 0.0, *nothing, *conv, *last_two
        )
        found, _, _ = native.bn_bwd_apply_conv_dgrad_reduce(
            dy, above, "silu", 0.0, *nothing, *conv, *last_two, gate, shift
        )
        assert_bit_equal(found, dx, "dx")
    finally:
        torch.set_num_threads(before)


@needs_extension
@pytest.mark.parametrize("side, stride, group", [(3, 1, 1), (5, 2, 1), (3, 1, 8)])
@pytest.mark.parametrize(
    "act, gate", [("silu", "sigmoid"), ("hardswish", "hardsigmoid"), ("relu", "sigmoid")]
)
@pytest.mark.parametrize("ends", ["in a residual", "in pooling", "at once"])
def test_joined_chain(side, stride, group, act, gate, ends, monkeypatch):
    """Expansion, grouped convolution, squeeze and excitation, projection: against float64, no worse than PyTorch by much, and nothing
    gated is written."""
    monkeypatch.setattr(pointwise, "mode", "1")
    monkeypatch.setattr(recording, "is_active", False)
    torch.manual_seed(0)
    n, c, j, s = 3, 16, 48, 6
    shapes = (
        (j, c, 1, 1),
        (j, group, side, side),
        (s, j, 1, 1),
        (s,),
        (j, s, 1, 1),
        (j,),
        (c, j, 1, 1),
    )
    w0, w1, r, rb, e, eb, w2 = (
        torch.randn(shape) / (max(1, shape[1:].numel() if len(shape) > 1 else 4)) ** 0.5
        for shape in map(torch.Size, shapes)
    )
    x, plane = last(n, c, 13, 11, mean=0.5), [(size - 1) // stride + 1 for size in (13, 11)]
    residual = last(n, c, *plane)
    leaves = [
        x,
        residual,
        *(torch.rand(k) + 0.5 for k in (j, j, c)),
        *torch.randn(2, j),
        torch.randn(c),
    ]
    joined = []
    for name in ("se_fwd_reduce", "se_bwd_sums"):
        phase = getattr(native, name)
        monkeypatch.setattr(native, name, lambda *a, f=phase, n=name: (joined.append(n), f(*a))[1])

    def plain(dtype):
        values = [t.detach().to(dtype).requires_grad_() for t in leaves]
        x, residual, g0, g1, g2, b0, b1, b2 = values
        weights = [t.to(dtype) for t in (w0, w1, r, rb, e, eb, w2)]
        function = reference._act_value
        y = F.batch_norm(F.conv2d(x, weights[0]), None, None, g0, b0, True)
        y = F.conv2d(function(y, act, 0.0), weights[1], None, stride, side // 2, 1, j // group)
        y = function(F.batch_norm(y, None, None, g1, b1, True), act, 0.0)
        y = plain_squeeze(y, *weights[2:6], act, gate)
        y = F.batch_norm(F.conv2d(y, weights[6]), None, None, g2, b2, True)
        if ends == "in a residual":
            y = F.relu(y + residual)
        if ends == "in pooling":
            y = F.max_pool2d(F.relu(y), 2)
        return values, y

    def ours():
        values = [t.detach().clone().requires_grad_() for t in leaves]
        x, residual, g0, g1, g2, b0, b1, b2 = values
        one, zero = (1, 1), (0, 0)
        squeeze = ops.SqueezeExcite(r, rb, e, eb, act, gate)
        middle = (w1, None, (stride,) * 2, (side // 2,) * 2, one, j // group)
        end = {
            "in a residual": dict(residual=residual, act="relu"),
            "in pooling": dict(act="relu", pool=ops.MaxPool((2, 2), (2, 2), zero)),
            "at once": {},
        }[ends]
        units = [
            ops.Unit(w0, None, one, zero, one, 1, gamma=g0, beta=b0, act=act),
            ops.Unit(*middle, gamma=g1, beta=b1, act=act),
            ops.Unit(w2, None, one, zero, one, 1, gamma=g2, beta=b2, squeeze=squeeze, **end),
        ]
        return values, ops.frozen_conv_bn_act(x, units, "cpu")

    dy = None
    results = []
    for values, y in (plain(torch.float64), plain(torch.float32), ours()):
        dy = torch.randn(y.shape, dtype=torch.float64) if dy is None else dy
        used = [v for v in values if ends == "in a residual" or v is not values[1]]
        given = dy.to(y.dtype).contiguous(memory_format=torch.channels_last)
        results.append([y.detach(), *torch.autograd.grad(y, used, given)])
    is_grouped_ours = group == 1 or native.cpu_capability() != "baseline"
    is_joined = ends != "in pooling" and is_grouped_ours
    assert joined == (["se_fwd_reduce", "se_bwd_sums"] if is_joined else [])
    for oracle, stock, found in zip(*results, strict=True):
        assert bool(found.isfinite().all())
        scale = oracle.abs().max()
        error, stock_error = ((t.double() - oracle).abs().max() / scale for t in (found, stock))
        assert error <= 4 * stock_error + 1e-6


@needs_extension
@pytest.mark.parametrize("side", [1, 3])
def test_behind_a_convolution_of_one_group(side, monkeypatch):
    """A widening convolution in front of the squeeze is no grouped one: what flows back into it is gated before it is joined."""
    monkeypatch.setattr(pointwise, "mode", "1")
    torch.manual_seed(0)
    x = last(3, 16, 13, 11, mean=0.5)
    w, r, e, w2 = (
        torch.randn(shape) / 4 for shape in ((48, 16, side, side), (6, 48, 1, 1), (48, 6, 1, 1), (16, 48, 1, 1))
    )  # fmt: skip
    leaves = [x, torch.rand(48) + 0.5, torch.rand(16) + 0.5, torch.randn(48), torch.randn(16)]
    dy = last(3, 16, 13, 11)

    def plain():
        values = [t.detach().double().requires_grad_() for t in leaves]
        x, g1, g2, b1, b2 = values
        y = F.conv2d(x, w.double(), None, 1, side // 2)
        y = F.silu(F.batch_norm(y, None, None, g1, b1, True))
        y = plain_squeeze(y, r.double(), None, e.double(), None, "silu", "sigmoid")
        return values, F.batch_norm(F.conv2d(y, w2.double()), None, None, g2, b2, True)

    def ours():
        values = [t.detach().clone().requires_grad_() for t in leaves]
        x, g1, g2, b1, b2 = values
        one, pad = (1, 1), (side // 2, side // 2)
        squeeze = ops.SqueezeExcite(r, None, e, None, "silu", "sigmoid")
        units = [
            ops.Unit(w, None, one, pad, one, 1, gamma=g1, beta=b1, act="silu"),
            ops.Unit(w2, None, one, (0, 0), one, 1, gamma=g2, beta=b2, squeeze=squeeze),
        ]
        return values, ops.frozen_conv_bn_act(x, units, "cpu")

    results = []
    for values, y in (plain(), ours()):
        results.append([y.detach(), *torch.autograd.grad(y, values, dy.to(y.dtype))])
    for oracle, found in zip(*results, strict=True):
        assert (found.double() - oracle).abs().max() <= 1e-4 * oracle.abs().max()


@needs_extension
def test_joined_refusals():
    z, norm, packed = last(2, 16, 5, 5), tuple(norm_of(16)), torch.randn(1, 16, 16)
    stats = (None, None, None, 0.1, 1e-5)
    operator = torch.ops.bnfast.pointwise_fwd_reduce
    with pytest.raises(RuntimeError, match="gate is"):
        operator(z, *norm, "relu", 0.0, packed, None, 16, *stats, torch.rand(2, 8))
    with pytest.raises(RuntimeError, match="gate is given without mean"):
        operator(
            z, None, None, None, None, "relu", 0.0, packed, None, 16, *stats, torch.rand(2, 16)
        )
    with pytest.raises(RuntimeError, match="float32 is needed"):
        torch.ops.bnfast.se_fwd_reduce(z.bfloat16(), *norm, "relu", 0.0)
    with pytest.raises(RuntimeError, match="dy is"):
        torch.ops.bnfast.se_bwd_sums(last(2, 8, 5, 5), z, *norm, "relu", 0.0)
