"""Depthwise convolutions and narrow groups of the CPU engine, both directions, on random shapes against float64; what surrounds them is in test_joined.py."""

import math

import pytest
import torch
import torch.nn.functional as F
from closeness import assert_bits_of_any_number_of_threads, assert_close_to_oracle
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import bnfast
from bnfast import grouped, native, weights

pytestmark = [
    pytest.mark.skipif(native.unavailable is not None, reason=str(native.unavailable)),
    pytest.mark.usefixtures("poisoned_memory"),
]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def last(*size: int, mean: float = 0.0) -> torch.Tensor:
    return (torch.randn(size) + mean).contiguous(memory_format=torch.channels_last)


pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))


@settings(
    max_examples=250,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    batch=st.integers(1, 3),
    channels=st.sampled_from([2, 7, 16, 24, 64, 65, 104, 150]),
    width=st.sampled_from([1, 1, 2, 4, 8, 16]),
    size=st.tuples(st.integers(1, 15), st.integers(1, 40)),
    kernel=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    stride=pairs,
    padding=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    dilation=pairs,
    has_bias=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_both_directions_on_random_shapes(
    poisoned_memory, monkeypatch, batch, channels, width, size, kernel, stride, padding, dilation, has_bias, dtype, seed
):  # fmt: skip
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    if any(n + 2 * p < r for n, p, r in zip(size, padding, reach, strict=True)):
        return
    if channels % width:
        return
    monkeypatch.setattr(grouped, "_WIDTHS_BF16", grouped._WIDTHS)
    torch.manual_seed(seed)
    x = last(batch, channels, *size, mean=1.0).to(dtype)
    weight = (torch.randn(channels, width, *kernel) / math.sqrt(width * math.prod(kernel))).to(
        dtype
    )
    if not grouped.can_serve(weight, channels // width, dtype):
        return
    bias = torch.randn(channels).to(dtype) if has_bias else None
    geometry = (list(stride), list(padding), list(dilation), channels // width)
    wide = x.double().requires_grad_()
    oracle = F.conv2d(wide, weight.double(), None if bias is None else bias.double(), *geometry)
    terms = width * math.prod(kernel) + 1
    z = native.conv_forward(x, weight, bias, *geometry)
    scale = F.conv2d(wide.abs(), weight.double().abs(), None, *geometry).detach() + 1
    assert_close_to_oracle(z, oracle.detach(), [], "z", scale=scale, terms=terms)

    dz = last(*oracle.shape).to(dtype)
    (dx_oracle,) = torch.autograd.grad(oracle, wide, dz.double())
    dx = native.conv_dgrad(dz, weight, list(size), *geometry)
    sizes = native.conv_dgrad(dz.abs().double(), weight.abs().double(), list(size), *geometry)
    assert_close_to_oracle(dx, dx_oracle, [], "dx", scale=sizes + 1e-3, terms=terms)
    for source, t in ((x, z), (dz, dx)):
        assert t.dtype == dtype
        if not source.is_contiguous():  # else it is an NCHW tensor as well, and stays one
            assert t.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("width", [1, 8])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_thread_count_does_not_change_a_bit(threads, width):
    x, weight = last(5, 72, 33, 20), torch.randn(72, width, 5, 5)
    conv = ([2, 2], [2, 2], [1, 1], 72 // width)

    def results():
        z = native.conv_forward(x, weight, None, *conv)
        return z, native.conv_dgrad(z, weight, [33, 20], *conv)

    assert_bits_of_any_number_of_threads(threads, results)


@pytest.mark.parametrize("width", [1, 4])
def test_the_choice(width, monkeypatch):
    if width > 1 and native.cpu_capability() == "baseline":
        pytest.skip("groups are PyTorch's there")
    x, weight = last(2, 16, 8, 8), torch.randn(16, width, 3, 3)
    bnfast.clear_cache()
    run = (x, weight, None, [1, 1], [1, 1], [1, 1], 16 // width)
    ours = native.conv_forward(*run)
    assert set(weights.kept(weight)) == {"grouped"}
    dx = native.conv_dgrad(ours, weight, [8, 8], *run[3:])
    assert set(weights.kept(weight)) == {"grouped"}
    monkeypatch.setattr(grouped, "mode", "0")
    bnfast.clear_cache()
    torch.testing.assert_close(native.conv_forward(*run), ours)
    assert set(weights.kept(weight)) == {"packed"}
    torch.testing.assert_close(native.conv_dgrad(ours, weight, [8, 8], *run[3:]), dx)


def test_what_is_served():
    def served(shape, groups, dtype=torch.float32):
        return grouped.can_serve(torch.randn(shape), groups, dtype)

    assert served((16, 1, 3, 3), 16, torch.float64)
    assert served((16, 2, 3, 3), 8) and served((32, 16, 3, 3), 2)
    assert not served((16, 2, 3, 3), 8, torch.float64)
    assert not served((24, 3, 3, 3), 8) and not served((64, 32, 3, 3), 2)
    assert not served((32, 2, 3, 3), 8)  # more outputs than inputs
    assert not served((16, 1, 9, 9), 16)


def test_taps_follow_the_weight():
    x, weight = last(2, 16, 8, 8), torch.randn(16, 1, 3, 3)
    run = (x, weight, None, [1, 1], [1, 1], [1, 1], 16)
    before = native.conv_forward(*run)
    for change in (lambda: weight.mul_(2), lambda: weight.data.mul_(2), lambda: weight.numpy().__imul__(2)):  # fmt: skip
        change()
        torch.testing.assert_close(native.conv_forward(*run), 2 * before)
        before = native.conv_forward(*run)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x=torch.zeros(2, 4, 8)), "x is"),
        (dict(x=torch.zeros(2, 5, 8, 8)), "taps"),
        (dict(x=torch.zeros(2, 4, 8, 8, dtype=torch.float64)), "taps"),
        (dict(x=torch.zeros(2, 4, 1, 8), padding=[0, 0]), "does not fit"),
        (dict(bias=torch.zeros(5)), "bias is"),
        (dict(stride=[0, 1]), "x is"),
        (dict(taps=torch.zeros(9, 9, 1, 4), padding=[4, 4]), "81 taps"),
        (dict(taps=torch.zeros(3, 3, 4)), "taps"),
        (dict(taps=torch.zeros(3, 3, 3, 4)), "groups of 3"),
        (dict(taps=torch.zeros(3, 3, 8, 4)), "groups of 8"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_what_does_not_fit_is_refused(change, message):
    arguments = dict(
        x=torch.zeros(2, 4, 8, 8), taps=torch.zeros(3, 3, 1, 4), bias=None, stride=[1, 1], padding=[1, 1]
    ) | change  # fmt: skip
    with pytest.raises(RuntimeError, match=message):
        torch.ops.bnfast.grouped_conv(*arguments.values(), [1, 1])


def test_empty_batch():
    z = native.conv_forward(
        last(0, 16, 8, 8), torch.randn(16, 1, 3, 3), None, [2, 2], [1, 1], [1, 1], 16
    )
    assert z.shape == (0, 16, 4, 4)
