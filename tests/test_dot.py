"""Convolutions of bfloat16 as products of bfloat16 matrices, both directions, on random shapes against float64; what surrounds them is in
test_joined.py."""

import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from closeness import assert_bit_equal, assert_bits_of_any_number_of_threads, assert_close_to_oracle
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import bnfast
from bnfast import dot, native, weights, winograd

pytestmark = [
    pytest.mark.skipif(
        native.cpu_capability() not in ("avx512_bf16", "amx"),
        reason="the processor does not multiply bfloat16, or is not to",
    ),
    pytest.mark.usefixtures("poisoned_memory", "everywhere"),
]


@pytest.fixture
def everywhere(monkeypatch):
    """The form wherever it can be used."""
    monkeypatch.setattr(dot, "mode", "1")
    monkeypatch.setattr(winograd, "mode", "0")


def last(*size: int, mean: float = 0.0) -> torch.Tensor:
    values = (torch.randn(size) + mean).bfloat16()
    return values.contiguous(memory_format=torch.channels_last)


def random_weight(out_channels: int, channels: int, *kernel: int) -> torch.Tensor:
    weight = torch.randn(out_channels, channels, *kernel)
    return (weight / math.sqrt(channels * math.prod(kernel))).bfloat16()


pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))


@settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    batch=st.integers(1, 5),
    channels=st.sampled_from([2, 6, 16, 24, 32, 64, 74, 80, 96]),
    out_channels=st.sampled_from([2, 6, 16, 18, 32, 48, 64, 88]),
    size=st.tuples(st.integers(1, 17), st.integers(1, 40)),
    kernel=st.sampled_from([(1, 1), (1, 1), (3, 3), (3, 3), (5, 5), (1, 7), (7, 1), (2, 3)]),
    stride=pairs,
    padding=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    dilation=pairs,
    has_bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_both_directions_on_random_shapes(
    poisoned_memory, everywhere, batch, channels, out_channels, size, kernel, stride, padding, dilation, has_bias, seed
):  # fmt: skip
    if kernel == (1, 1):
        padding = (0, 0)
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    if any(n + 2 * p < r for n, p, r in zip(size, padding, reach, strict=True)):
        return
    torch.manual_seed(seed)
    x, weight = (
        last(batch, channels, *size, mean=1.0),
        random_weight(out_channels, channels, *kernel),
    )
    bias = torch.randn(out_channels).bfloat16() if has_bias else None
    geometry = (list(stride), list(padding), list(dilation), 1)
    wide = x.double().requires_grad_()
    oracle = F.conv2d(wide, weight.double(), None if bias is None else bias.double(), *geometry)
    z = native.conv_forward(x, weight, bias, *geometry)
    scale = F.conv2d(wide.abs(), weight.double().abs(), None, *geometry).detach() + 1
    terms = channels * math.prod(kernel) + 1
    assert_close_to_oracle(z, oracle.detach(), [], "z", scale=scale, terms=terms)

    dz = last(*oracle.shape)
    (dx_oracle,) = torch.autograd.grad(oracle, wide, dz.double())
    dx = native.conv_dgrad(dz, weight, list(size), *geometry)
    (sizes,) = torch.autograd.grad(
        F.conv2d(wide, weight.double().abs(), None, *geometry), wide, dz.abs().double()
    )
    terms = out_channels * math.prod(kernel) + 1
    assert_close_to_oracle(dx, dx_oracle, [], "dx", scale=sizes + 1e-3, terms=terms)
    for source, t in ((x, z), (dz, dx)):
        assert t.dtype == torch.bfloat16
        if not source.is_contiguous():  # else it is an NCHW tensor as well, and stays one
            assert t.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "size, out_channels, kernel, stride",
    [
        ((16, 64, 56, 56), 64, 3, 1),
        ((16, 64, 56, 56), 128, 3, 2),
        ((16, 128, 28, 28), 512, 1, 1),
        ((16, 256, 28, 28), 512, 1, 2),
        ((16, 512, 7, 7), 512, 3, 1),
        ((3, 2048, 7, 7), 512, 1, 1),
        ((64, 16, 32, 32), 16, 3, 1),
        ((1, 48, 200, 90), 100, 3, 1),
    ],
    ids=str,
)
def test_large(size, out_channels, kernel, stride):
    """Many units of work, and those that are whole images together."""
    x, weight = last(*size, mean=1.0), random_weight(out_channels, size[1], kernel, kernel)
    geometry = ([stride] * 2, [kernel // 2] * 2, [1, 1], 1)
    bnfast.clear_cache()
    z = native.conv_forward(x, weight, None, *geometry)
    assert set(weights.kept(weight)) == {"dot"}
    exact = F.conv2d(x.float(), weight.float(), None, *geometry)
    torch.testing.assert_close(z.float(), exact, rtol=1e-2, atol=2e-2)
    dz = last(*z.shape)
    dx = native.conv_dgrad(dz, weight, list(size[2:]), *geometry)
    assert set(weights.kept(weight)) == {"dot"}
    wide = x.float().requires_grad_()
    (exact,) = torch.autograd.grad(
        F.conv2d(wide, weight.float(), None, *geometry), wide, dz.float()
    )
    torch.testing.assert_close(dx.float(), exact, rtol=1e-2, atol=2e-2)


def test_no_less_exact_than_pytorch():
    """The error against float64 is within 3 times that of PyTorch's own convolution in bfloat16."""
    x, weight = last(4, 128, 14, 14, mean=1.0), random_weight(128, 128, 3, 3)
    geometry = ([1, 1], [1, 1], [1, 1], 1)
    oracle = F.conv2d(x.double(), weight.double(), None, *geometry)

    def error(z):
        return (z.double() - oracle).abs().max()

    stock = error(F.conv2d(x, weight, None, *geometry))
    assert error(native.conv_forward(x, weight, None, *geometry)) <= 3 * stock


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_thread_count_does_not_change_a_bit(threads):
    x, weight = last(5, 64, 33, 20), random_weight(96, 64, 3, 3)
    conv = ([2, 2], [1, 1], [1, 1], 1)

    def results():
        z = native.conv_forward(x, weight, None, *conv)
        return z, native.conv_dgrad(z, weight, [33, 20], *conv)

    assert_bits_of_any_number_of_threads(threads, results)


@pytest.mark.parametrize("kernel", [1, 3])
def test_what_is_not_finite_stays_where_it_is(kernel):
    """The products that are not kept, and what lies around an image, reach no other output."""
    x, weight = last(2, 32, 9, 11), random_weight(32, 32, kernel, kernel)
    geometry = ([1, 1], [kernel // 2] * 2, [1, 1], 1)
    clean = native.conv_forward(x, weight, None, *geometry)
    x[1, 5, 3, 10] = float("nan")
    x[0, 7, 8, 0] = float("inf")
    z = native.conv_forward(x, weight, None, *geometry)
    expected = F.conv2d(x.float(), weight.float(), None, *geometry)
    assert torch.equal(z.isfinite(), expected.isfinite())
    kept = expected.isfinite()
    assert_bit_equal(z[kept], clean[kept], "z")


def test_the_choice(monkeypatch):
    monkeypatch.setattr(dot, "mode", "")
    monkeypatch.setattr(winograd, "mode", "")
    x, weight = last(2, 64, 8, 8), random_weight(64, 64, 1, 1)
    run = (x, weight, None, [1, 1], [0, 0], [1, 1], 1)
    bnfast.clear_cache()
    ours = native.conv_forward(*run)
    dx = native.conv_dgrad(ours, weight, [8, 8], *run[3:])
    assert set(weights.kept(weight)) == {"dot"}
    monkeypatch.setattr(dot, "mode", "0")
    bnfast.clear_cache()
    stock = native.conv_forward(*run)
    assert set(weights.kept(weight)) == {"packed"}
    torch.testing.assert_close(stock, ours)
    torch.testing.assert_close(native.conv_dgrad(ours, weight, [8, 8], *run[3:]), dx)


def test_what_is_served(monkeypatch):
    def served(shape, capability, dtype=torch.bfloat16, groups=1):
        x = torch.empty(1, dtype=dtype)
        return dot.serves(x, torch.empty(shape), groups, capability)

    monkeypatch.setattr(dot, "mode", "")
    for capability in ("avx512_bf16", "amx"):
        assert served((64, 64, 3, 3), capability) and served((48, 24, 1, 7), capability)
        assert not served((64, 3, 7, 7), capability) and not served((64, 8, 3, 3), capability)
        assert not served((64, 64, 3, 3), capability, torch.float32)
        assert not served((64, 32, 3, 3), capability, groups=2)
        assert not served((64, 64, 3), capability) and not served((64, 64, 3, 3, 3), capability)
    assert served((64, 74, 1, 1), "avx512_bf16")
    assert not served((64, 74, 1, 1), "amx")  # two channels at once
    assert not served((64, 64, 3, 3), "avx512") and not served((64, 64, 3, 3), "baseline")
    monkeypatch.setattr(dot, "mode", "1")
    assert served((2, 2, 1, 1), "amx") and not served((2, 3, 1, 1), "amx")


def test_the_form_follows_the_weight():
    x, weight = last(2, 16, 8, 8), random_weight(16, 16, 3, 3).float()
    run = (x, weight, None, [1, 1], [1, 1], [1, 1], 1)
    before = native.conv_forward(*run)
    for change in (lambda: weight.mul_(2), lambda: weight.data.mul_(2), lambda: weight.numpy().__imul__(2)):  # fmt: skip
        change()
        torch.testing.assert_close(native.conv_forward(*run), 2 * before)
        before = native.conv_forward(*run)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x=torch.zeros(2, 4, 8, dtype=torch.bfloat16)), "x is"),
        (dict(x=torch.zeros(2, 4, 8, 8)), "x is"),
        (dict(x=torch.zeros(2, 6, 8, 8, dtype=torch.bfloat16)), "weights are"),
        (dict(x=torch.zeros(2, 5, 8, 8, dtype=torch.bfloat16)), "weights are"),
        (dict(x=torch.zeros(2, 4, 1, 8, dtype=torch.bfloat16), padding=[0, 0]), "does not fit"),
        (dict(weights=torch.zeros(1, 3, 3, 2, 16, 2)), "weights are"),
        (dict(weights=torch.zeros(3, 3, 2, 16, 2, dtype=torch.bfloat16)), "weights are"),
        (dict(out_channels=17), "weights are"),
        (dict(bias=torch.zeros(5)), "bias is"),
        (dict(stride=[0, 1]), "stride is"),
        (dict(padding=[-1, 1]), "padding"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_what_does_not_fit_is_refused(change, message):
    arguments = dict(
        x=torch.zeros(2, 4, 8, 8, dtype=torch.bfloat16),
        weights=torch.zeros(1, 3, 3, 2, 16, 2, dtype=torch.bfloat16),
        bias=None, out_channels=16, stride=[1, 1], padding=[1, 1],
    ) | change  # fmt: skip
    with pytest.raises(RuntimeError, match=message):
        torch.ops.bnfast.dot_conv(*arguments.values(), [1, 1])


def test_a_gradient_that_does_not_fit_is_refused():
    dz = torch.zeros(2, 16, 8, 8, dtype=torch.bfloat16)
    packed = torch.zeros(1, 3, 3, 8, 16, 2, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="input_size"):
        torch.ops.bnfast.dot_dgrad(dz, packed, 16, [8, 9], [1, 1], [1, 1], [1, 1])


@pytest.mark.parametrize("kernel", [1, 3])
def test_empty_batch(kernel):
    weight = random_weight(32, 16, kernel, kernel)
    z = native.conv_forward(last(0, 16, 8, 8), weight, None, [1, 1], [kernel // 2] * 2, [1, 1], 1)
    assert z.shape == (0, 32, 8, 8)


_PRODUCT = """
import torch
from bnfast import native, dot
torch.manual_seed(0)
x = torch.randn(2, 64, 9, 9).bfloat16().contiguous(memory_format=torch.channels_last)
weight = torch.randn(32, 64, 3, 3) / 24
dot.mode = "1"
z = native.conv_forward(x, weight, None, [1, 1], [1, 1], [1, 1], 1)
exact = torch.nn.functional.conv2d(x.double(), weight.bfloat16().double(), None, 1, 1)
print(native.cpu_capability(), (z.double() - exact).abs().max().item())
"""


@pytest.mark.parametrize("capability", ["avx512", "avx512_bf16", "amx"])
def test_each_capability(capability):
    env = {**os.environ, "BNFAST_CPU_CAPABILITY": capability}
    done = subprocess.run([sys.executable, "-c", _PRODUCT], env=env, capture_output=True, text=True)
    if "does not run it" in done.stderr:
        pytest.skip(f"this processor does not run {capability}")
    assert done.returncode == 0, done.stderr
    name, error = done.stdout.split()
    assert name == capability and float(error) < 0.02
