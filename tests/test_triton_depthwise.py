"""Depthwise convolutions in Triton with the phases around them, against the reference's phases one after the other in float64."""

import pytest
import torch
from closeness import assert_close_to_oracle

from bnfast import dispatch, reference
from bnfast.reference import Above, Below, Beside, Norm

pytestmark = [
    pytest.mark.skipif(
        dispatch.backends()["triton"] is not True, reason=str(dispatch.backends()["triton"])
    ),
    pytest.mark.usefixtures("poisoned_memory"),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STATS = (None, None, None, 0.1, 1e-5)
# Batch, channels, height, width; kernel, stride, padding, dilation.
GEOMETRIES = [
    ((2, 19, 7, 5), (3, 3), (1, 1), (1, 1), (1, 1)),
    ((1, 72, 9, 6), (3, 3), (2, 2), (1, 1), (1, 1)),
    ((3, 8, 8, 7), (5, 5), (2, 1), (2, 0), (1, 1)),
    ((1, 66, 6, 11), (3, 2), (1, 2), (2, 1), (2, 1)),
]


@pytest.fixture
def kernels(monkeypatch):
    module = dispatch.module("triton")
    monkeypatch.setattr(module.conv, "route", "fused")
    return module


@pytest.fixture
def launched(kernels, monkeypatch):
    """How many launches went to the depthwise kernels."""
    names = []
    for name in ("launch_depthwise", "launch_depthwise_dgrad"):
        original = getattr(kernels.conv, name)
        monkeypatch.setattr(
            kernels.conv, name, lambda *a, f=original, n=name: names.append(n) or f(*a)
        )
    return names


def last(size, dtype, mean=0.0) -> torch.Tensor:
    t = (torch.randn(size) + mean).to(dtype).to(DEVICE)
    return t.contiguous(memory_format=torch.channels_last)


def norm(channels: int) -> Norm:
    vectors = (torch.randn(4, channels).abs() + 0.3).to(DEVICE)
    return Norm(*(vectors * torch.tensor([[1.0], [1], [-1], [1]], device=DEVICE)))


def wide(value):
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, tuple):
        parts = [wide(part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


def rounded_chain(t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What is stored between two phases."""
    return t.to(dtype).double()


def size_before(z: torch.Tensor, norm: Norm) -> torch.Tensor:
    """Of the terms that a pre-activation is the sum of."""
    mean, rstd, gamma, beta = (t.double().abs().view(1, -1, 1, 1) for t in norm)
    return (z.double().abs() + mean) * rstd * gamma + beta


@pytest.mark.parametrize("size, kernel, stride, padding, dilation", GEOMETRIES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("act", [None, "relu6", "silu"])
def test_forward(kernels, launched, size, kernel, stride, padding, dilation, dtype, act):
    channels = size[1]
    x = last(size, dtype, mean=2)
    weight = (torch.randn(channels, 1, *kernel) / 3).to(DEVICE)
    bias = torch.randn(channels, device=DEVICE) if act == "silu" else None
    own = norm(channels) if act else None
    conv = (weight, bias, stride, padding, dilation, channels)
    if act is None:
        z, mean, _, rstd = kernels.conv_fwd_reduce(x, *conv, *STATS)
        y = x.double()
        size_of_y = y.abs()
    else:
        z, mean, rstd = kernels.bn_fwd_apply_conv_fwd_reduce(x, own, act, 0.0, *conv, *STATS)
        y, _ = reference.bn_fwd_apply(x.double(), *wide(own), None, act, 0.0, False)
        y = rounded_chain(y, dtype)
        size_of_y = size_before(x, own)
    assert launched == ["launch_depthwise"]
    w = weight.to(dtype).double()
    oracle = torch.nn.functional.conv2d(y, w, wide(bias), stride, padding, dilation, channels)
    scale = torch.nn.functional.conv2d(
        size_of_y, w.abs(), None, stride, padding, dilation, channels
    ) + (0 if bias is None else bias.double().abs().view(1, -1, 1, 1))
    # A rounding of y to 16 bits may fall to the other side.
    slack = scale * torch.finfo(dtype).eps if dtype != torch.float32 and act else 0.0
    assert_close_to_oracle(z, oracle, [], "z", scale=scale, terms=w[0].numel(), slack=slack)
    var, centre = torch.var_mean(z.double(), (0, 2, 3), correction=0)
    assert_close_to_oracle(mean, centre, [], "mean", scale=z.double().abs().amax((0, 2, 3)))
    torch.testing.assert_close(rstd.double(), (var + 1e-5).rsqrt(), rtol=2e-5, atol=0)


@pytest.mark.parametrize("size, kernel, stride, padding, dilation", GEOMETRIES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["alone", "inner", "smooth", "end"])
def test_backward(kernels, launched, size, kernel, stride, padding, dilation, dtype, kind):
    channels = size[1]
    weight = (torch.randn(channels, 1, *kernel) / 3).to(DEVICE)
    out = reference.conv_output_size(size[2:], weight, stride, padding, dilation)
    dy = last((size[0], channels, *out), dtype)
    conv = (weight, list(size[2:]), stride, padding, dilation, channels)
    above = add = below = beside = None
    dz = dy.double()
    size_of_dz = dz.abs()
    if kind != "alone":
        above = Above(
            last(dy.shape, dtype, 2), *norm(channels), *torch.randn(2, channels).to(DEVICE)
        )
        z, *vectors, dgamma, dbeta = wide(above)
        dz, _ = reference.bn_bwd_apply(
            dz, z, *vectors, None, None, dgamma, dbeta, "relu", 0.0, False
        )
        dz = rounded_chain(dz, dtype)
        shift_db, shift_z, scale = (
            t.double().abs().view(1, -1, 1, 1)
            for t in (
                dbeta / dy[:, 0].numel(),
                above.rstd * dgamma / dy[:, 0].numel(),
                above.gamma * above.rstd,
            )
        )
        distance = z.abs() + above.mean.double().abs().view(1, -1, 1, 1)
        size_of_dz = (size_of_dz + shift_db + distance * shift_z) * scale
        bits = None
        if kind == "end":
            add, residual = last(size, dtype), last(size, dtype)
            beside = Beside(last(size, dtype, -1), *torch.rand(2, channels).to(DEVICE))
        below = Below(last(size, dtype, 2), bits, *norm(channels))
        if kind == "end":
            _, bits = kernels.bn_fwd_apply(*below[:1], *below[2:], residual, "relu", 0.0, True)
            below = below._replace(bits=bits)
    below_act = "silu" if kind == "smooth" else "relu"
    dx, sums, sums_beside = kernels.bn_bwd_apply_conv_dgrad_reduce(
        dy, above, "relu", 0.0, None, "identity", 0.0, *conv, add, below, below_act, 0.0, beside
    )
    assert launched == ["launch_depthwise_dgrad"]
    w = weight.to(dtype).double()
    grad = lambda dz, w: reference.conv_dgrad(dz, w, *conv[1:])  # noqa: E731
    oracle = grad(dz, w)
    scale = grad(size_of_dz, w.abs()) + 1e-6
    if add is not None:
        oracle, scale = oracle + add.double(), scale + add.double().abs()
    if below is not None and below.bits is not None:
        vectors = wide(tuple(below[2:]))
        pre = reference.bn_fwd_apply(
            below.z.double(), *vectors, residual.double(), "identity", 0.0, False
        )[0]
        oracle = torch.where(pre > 0, oracle, 0)
    if kind == "smooth":
        z, _, *vectors = wide(tuple(below))
        factors = (z, *vectors, None, None, None, None, below_act, 0.0, True)
        _, oracle = reference.bn_bwd_apply(oracle, *factors)
        # A slope is at most 1.1, and off by the rounding of its pre-activation.
        scale = scale * (1.1 + 4 * torch.finfo(torch.float32).eps * (z.abs() + 10))
    slack = 2 * scale * torch.finfo(dtype).eps if dtype != torch.float32 else 0.0
    assert_close_to_oracle(dx, oracle, [], "dx", scale=scale, terms=w[0].numel(), slack=slack)
    if below is None:
        assert sums is None
        return
    act = "relu" if kind == "inner" else "identity"
    units = [(sums, (below.z, *below[2:]))]
    if beside is not None:
        units.append((sums_beside, (*beside, None, None)))
    for found, (z, *vectors) in units:
        exact = reference.bn_bwd_reduce(
            dx.double(), z.double(), *wide(tuple(vectors)), None, None, act, 0.0
        )
        count = dx.numel() // channels
        size_of = dx.double().abs().sum((0, 2, 3)) * 8 + 1e-3
        for name, value, oracle in zip(("dgamma", "dbeta"), found, exact, strict=True):
            assert_close_to_oracle(value, oracle, [], name, scale=size_of, terms=count)


@pytest.mark.skipif(DEVICE == "cuda", reason="counts in the interpreter")
def test_bytes(kernels):
    """Unique bytes of global memory at most 1.05 of: x and z forward; dy, z, dx and the z below backward."""
    from bench import triton_traffic

    size, dtype, channels = (2, 64, 16, 16), torch.float16, 64
    x, dy, z = (last(size, dtype) for _ in range(3))
    weight = torch.randn(channels, 1, 3, 3)
    conv = ((1, 1), (1, 1), (1, 1), channels)
    own = norm(channels)
    with triton_traffic.ledger() as forward:
        kernels.bn_fwd_apply_conv_fwd_reduce(x, own, "relu", 0.0, weight, None, *conv, *STATS)
    with triton_traffic.ledger() as backward:
        kernels.bn_bwd_apply_conv_dgrad_reduce(
            dy, Above(z, *own, *torch.randn(2, channels)), "relu", 0.0, None, "identity", 0.0, weight,
            [16, 16], *conv, None, Below(x, None, *own), "relu", 0.0, None,
        )  # fmt: skip
    for found, tensors in ((forward, 2), (backward, 4)):
        moved = sum(e.unique for e in found if e.argument != "w_ptr")
        assert tensors * x.nbytes <= moved <= 1.05 * tensors * x.nbytes
