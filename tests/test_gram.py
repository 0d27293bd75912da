"""1x1 convolutions whose z never exists: the phases of equations (16) to (20) on every backend that has them."""

import math

import pytest
import torch
from torch import Tensor

from bnfast import reference
from bnfast.reference import Above, Below, Beside, Norm, Source

# [N, J, H, W] of x, K: ragged everywhere; one tile, several blocks of channels.
SHAPES = [((3, 9, 7, 5), 21), ((2, 70, 5, 3), 140), ((1, 5, 3, 3), 10)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
PHASES = (
    "bn_fwd_apply_gram_reduce",
    "bn_fwd_apply_conv_fwd_apply",
    "bn_bwd_mask",
    "bn_fwd_apply_conv_bwd_reduce",
)


@pytest.fixture
def gram_backend(backend):
    """The backends that have the phases."""
    if not hasattr(backend.module, PHASES[0]):
        pytest.skip(f"backend {backend.name} keeps z")
    return backend


class Expansion:
    """A unit, its 1x1 convolution behind a unit with an activation, and all that the phases take; data off centre."""

    def __init__(self, shape, out_channels, dtype, device, offset=3.0, act="relu", bias=True):
        batch, channels, *sizes = shape
        kind = {"device": device}
        acc = reference.accumulator(dtype)
        last = torch.channels_last
        self.z = (torch.randn(shape, **kind) * 2 + 5).to(dtype).contiguous(memory_format=last)
        mean, rstd = torch.randn(channels, **kind) + 5, torch.rand(channels, **kind) + 0.3
        gamma, beta = torch.rand(channels, **kind) + 0.5, torch.randn(channels, **kind) + offset
        self.norm = Norm(mean.to(acc), rstd.to(acc), gamma, beta)
        self.act = act
        weight = torch.randn(out_channels, channels, 1, 1, **kind) / math.sqrt(channels)
        self.weight = weight.to(dtype)
        self.bias = torch.randn(out_channels, **kind) if bias else None
        self.running = (torch.randn(out_channels, **kind), torch.rand(out_channels, **kind))
        self.tracked = torch.tensor(3, device=device)
        self.own = [torch.rand(out_channels, **kind) + 0.5, torch.randn(out_channels, **kind)]
        of_y = (batch, out_channels, *sizes)
        self.residual, self.dy = (
            torch.randn(of_y, **kind).to(dtype).contiguous(memory_format=last) for _ in range(2)
        )
        shortcut = torch.rand(4, out_channels, **kind).to(acc) + 0.5
        self.shortcut = Norm(*shortcut)

    def copy(self) -> "Expansion":
        """The same, with running statistics of its own."""
        twin = object.__new__(Expansion)
        twin.__dict__.update(self.__dict__)
        twin.running = tuple(t.clone() for t in self.running)
        twin.tracked = self.tracked.clone()
        return twin

    def exact(self) -> "Expansion":
        """A copy in float64."""
        twin = self.copy()
        for name in ("z", "weight", "residual", "dy"):
            setattr(twin, name, getattr(self, name).double())
        twin.norm = Norm(*(t.double() for t in self.norm))
        twin.shortcut = Norm(*(t.double() for t in self.shortcut))
        return twin

    def run(self, module, act="relu", momentum=0.1, shortcut=False, db=None) -> dict[str, Tensor]:
        """Forward and backward by the phases of a backend; behind the mask with another db where given."""
        given = (self.z, self.norm, self.act, 0.0)
        stats = (*self.running, self.tracked, momentum, 1e-5)
        mean_x, rstd = module.bn_fwd_apply_gram_reduce(*given, self.weight, self.bias, *stats)
        y, bits = module.bn_fwd_apply_conv_fwd_apply(
            *given, self.weight, Norm(mean_x, rstd, *self.own), self.residual,
            self.shortcut if shortcut else None, act, 0.01, act != "identity",
        )  # fmt: skip
        own_db = self.dy if act == "identity" else module.bn_bwd_mask(self.dy, bits, act, 0.01)
        db = own_db if db is None else db
        source = (Source(self.z, *self.norm, mean_x), self.act, 0.0)
        sums = module.bn_fwd_apply_conv_bwd_reduce(db, *source, self.weight, rstd)
        above = Above(None, None, rstd, *self.own, *sums)
        below = Below(self.z, None, *self.norm)
        dx, below_sums, _ = module.bn_bwd_apply_conv_dgrad_reduce(
            db, above, "identity", 0.0, *source, self.weight, list(self.z.shape[2:]),
            [1, 1], [0, 0], [1, 1], 1, None, below, self.act, 0.0, None,
        )  # fmt: skip
        names = (
            "mean_x",
            "rstd",
            "y",
            "db",
            "dgamma",
            "dbeta",
            "dx",
            "dgamma below",
            "dbeta below",
        )
        found = dict(zip(names, (mean_x, rstd, y, own_db, *sums, dx, *below_sums), strict=True))
        found |= dict(zip(("running_mean", "running_var"), self.running, strict=True))
        return found | {"tracked": self.tracked}


def plain(case: Expansion, act: str, shortcut: bool) -> dict[str, Tensor]:
    """The same by PyTorch's autograd."""
    x = reference.bn_fwd_apply(case.z, *case.norm, None, case.act, 0.0, False)[0]
    x.requires_grad_()
    gamma, beta = (t.double().requires_grad_() for t in case.own)
    z = torch.nn.functional.conv2d(
        x, case.weight, None if case.bias is None else case.bias.double()
    )
    residual = case.residual
    if shortcut:
        residual = reference.bn_fwd_apply(residual, *case.shortcut, None, "identity", 0.0, False)[0]
    pre = torch.nn.functional.batch_norm(z, None, None, gamma, beta, True, 0.1, 1e-5) + residual
    y = torch.relu(pre) if act == "relu" else pre
    y.backward(case.dy)
    return {"y": y.detach(), "dgamma": gamma.grad, "dbeta": beta.grad, "dx": x.grad}


def assert_close(found: dict, expected: dict, tolerance: float) -> None:
    for name, value in expected.items():
        size = value.double().norm().item()
        error = (found[name].double() - value.double()).norm().item()
        assert error <= tolerance * size, f"{name}: {error / size:.3g}"


@pytest.mark.parametrize("act", ["relu", "identity"])
@pytest.mark.parametrize("shortcut", [True, False])
def test_reference_is_what_pytorch_computes(act, shortcut):
    case = Expansion((3, 9, 7, 5), 21, torch.float64, "cpu")
    assert_close(case.run(reference, act, shortcut=shortcut), plain(case, act, shortcut), 1e-12)


@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_float32_is_as_exact_as_with_z(offset):
    """The reference in float32 against float64: at most twice the error of the phases that keep z, far off centre too."""
    case = Expansion((4, 16, 14, 14), 64, torch.float32, "cpu", offset, bias=False)
    expected = case.exact().run(reference)
    found = case.copy().run(reference)
    x = reference.bn_fwd_apply(case.z, *case.norm, None, case.act, 0.0, False)[0]
    conv = (case.weight, None, [1, 1], [0, 0], [1, 1], 1)
    z, mean, rstd, y, bits = reference.conv_fwd_reduce_apply(
        x, *conv, None, None, None, 0.1, 1e-5, *case.own, case.residual, "relu", 0.0, True
    )
    state = (z, mean, rstd, *case.own, None, bits)
    dgamma, dbeta = reference.bn_bwd_reduce_apply(case.dy, *state, "relu", 0.0, False)[:2]
    for name, stock in (("y", y), ("rstd", rstd), ("dgamma", dgamma), ("dbeta", dbeta)):
        size = expected[name].norm().item()
        allowed = 2 * (stock.double() - expected[name]).norm().item() + 1e-6 * size
        assert (found[name].double() - expected[name]).norm().item() <= allowed, name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", ["relu", "leaky_relu", "identity"])
@pytest.mark.parametrize("size", SHAPES, ids=str)
def test_phases(size, act, dtype, gram_backend, poisoned_memory):
    """Against the reference in float64, on data of the backend's dtype: at most three times what the reference in that dtype errs."""
    case = Expansion(*size, dtype, gram_backend.device)
    shortcut = act == "relu"
    expected = case.exact().run(reference, act, shortcut=shortcut)
    # The same db for all: a sign that rounding turns is a whole value of it.
    kind = {"act": act, "shortcut": shortcut, "db": expected.pop("db").to(dtype)}
    plain = case.copy().run(reference, **kind)
    found = case.run(gram_backend.module, **kind)
    assert found["tracked"] == 4
    if act != "identity":
        slope = 0.01 if act == "leaky_relu" else 0.0
        db = torch.where(found["y"] > 0, case.dy, (case.dy * slope))
        torch.testing.assert_close(found["db"], db, rtol=1e-2, atol=0)
    rounding = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 4e-3}[dtype]
    for name, value in expected.items():
        assert found[name].isfinite().all(), name
        size = value.double().norm().item()
        allowed = 3 * (plain[name].double() - value).norm().item() + rounding * size
        assert (found[name].double() - value).norm().item() <= allowed, name


def test_cumulative_average_and_a_chain_input(gram_backend, poisoned_memory):
    """momentum None, no affine parameters, no bias, and an x that is no unit's z."""
    case = Expansion((2, 6, 5, 5), 14, torch.float64, gram_backend.device, bias=False)
    case.own = [None, None]
    twin = case.exact()
    assert_close(
        case.run(gram_backend.module, momentum=None), twin.run(reference, momentum=None), 1e-10
    )
    own = Norm(
        case.z.mean((0, 2, 3)),
        torch.ones(14, dtype=torch.float64, device=case.z.device),
        None,
        None,
    )
    given = (case.z, None, "identity", 0.0, case.weight, own, None, None, "relu", 0.0, True)
    found, _ = gram_backend.module.bn_fwd_apply_conv_fwd_apply(*given)
    expected, _ = reference.bn_fwd_apply_conv_fwd_apply(*given)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_constant_input_has_variance_zero(gram_backend):
    """Channels that are dead: the variance is 0 and not what rounding leaves, y is beta."""
    case = Expansion((2, 8, 6, 6), 16, torch.float32, gram_backend.device, bias=False)
    case.z = case.z[:1, :, :1, :1].expand(2, 8, 6, 6).contiguous(memory_format=torch.channels_last)
    case.residual = torch.zeros_like(case.residual)
    found = case.run(gram_backend.module, "identity")
    torch.testing.assert_close(found["rstd"], torch.full_like(found["rstd"], 1e-5**-0.5))
    beta = case.own[1].view(1, -1, 1, 1).expand_as(found["y"])
    torch.testing.assert_close(found["y"], beta, rtol=1e-3, atol=1e-3)


def test_weights_under_which_the_input_cancels(gram_backend):
    """Channels that are sums of two others, and weights that take them apart again: the variance is what rounding leaves, which
    can be less than nothing; rstd stays a number."""
    device = gram_backend.device
    two = torch.randn(2, 8, 7, 5, device=device)
    z = torch.cat([two, two[:, :4] + two[:, 4:]], 1).contiguous(memory_format=torch.channels_last)
    weight = torch.zeros(24, 12, 1, 1, device=device)
    for k in range(24):
        weight[k, [k % 4, k % 4 + 4, k % 4 + 8], 0, 0] = (2.0 + k) ** 5 * torch.tensor(
            [1.0, 1.0, -1.0], device=device
        )
    stats = (None, None, None, 0.1, 1e-5)
    _, rstd = gram_backend.module.bn_fwd_apply_gram_reduce(
        z, None, "identity", 0.0, weight, None, *stats
    )
    assert rstd.isfinite().all()


def test_below_without_z_is_masked_and_beside_is_summed(gram_backend):
    """The gradient that flows into a unit without z, and the sums of the shortcut beside it."""
    device, last = gram_backend.device, torch.channels_last
    dz, add, z = (
        torch.randn(2, c, 5, 3, dtype=torch.float64, device=device).contiguous(memory_format=last)
        for c in (6, 10, 10)
    )
    case = Expansion((2, 4, 5, 3), 10, torch.float64, device)
    weight = torch.randn(6, 10, 3, 3, dtype=torch.float64, device=device)
    results = []
    for module in (gram_backend.module, reference):
        own = Norm(case.z.mean((0, 2, 3)), torch.ones_like(case.shortcut.rstd), None, None)
        _, bits = module.bn_fwd_apply_conv_fwd_apply(
            case.z, None, "identity", 0.0, case.weight, own, None, None, "relu", 0.0, True
        )
        below = Below(None, bits, None, own.rstd, None, None)
        beside = Beside(z, case.shortcut.mean, case.shortcut.rstd)
        results.append(
            module.bn_bwd_apply_conv_dgrad_reduce(
                dz, None, "identity", 0.0, None, "identity", 0.0, weight, [5, 3], [1, 1], [1, 1],
                [1, 1], 1, add, below, "relu", 0.0, beside,
            )
        )  # fmt: skip
    (dx, sums, aside), (expected, _, expected_aside) = results
    assert sums is None
    assert (dx == 0).any()
    torch.testing.assert_close(dx, expected)
    torch.testing.assert_close(aside, expected_aside)
