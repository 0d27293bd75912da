"""Units whose statistics are known before their convolution, where nothing is kept for a backward pass."""

import pytest
import torch
from closeness import assert_bit_equal
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import bnfast
from bnfast import dispatch, grouped, native, pointwise, reference, winograd

pytestmark = pytest.mark.usefixtures("poisoned_memory")
needs_native = pytest.mark.skipif(native.unavailable is not None, reason=str(native.unavailable))


def channels_last(*size: int) -> torch.Tensor:
    return (torch.randn(size) + 0.5).contiguous(memory_format=torch.channels_last)


@needs_native
@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    batch=st.integers(1, 5),
    channels=st.integers(2, 70),
    out_channels=st.one_of(st.integers(2, 70), st.sampled_from((128, 256))),
    height=st.integers(2, 18),
    width=st.integers(2, 18),
    kernel=st.sampled_from((1, 3)),
    group=st.sampled_from((0, 0, 1, 2, 4, 8, 16)),
    stride=st.sampled_from((1, 2)),
    act=st.sampled_from(reference.ACTS),
    has_residual=st.booleans(),
    has_affine=st.booleans(),
    dtype=st.sampled_from((torch.float32, torch.bfloat16)),
    threads=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
def test_one_pass_is_both_phases_to_the_bit(
    monkeypatch, batch, channels, out_channels, height, width, kernel, group, stride, act, has_residual, has_affine, dtype, threads, seed
):  # fmt: skip
    monkeypatch.setattr(winograd, "mode", "1")
    monkeypatch.setattr(pointwise, "mode", "1")
    monkeypatch.setattr(grouped, "_WIDTHS_BF16", grouped._WIDTHS)
    torch.manual_seed(seed)
    if group:
        channels = out_channels = max(2, channels // group * group)
        group = min(group, channels)
    weight = torch.randn(out_channels, group or channels, kernel, kernel)
    x = channels_last(batch, channels, height, width).to(dtype)
    groups = channels // group if group else 1
    geometry = ([stride, stride], [kernel // 2] * 2, [1, 1], groups)
    conv = (weight, torch.randn(out_channels), *geometry)
    mean, rstd, gamma, beta = torch.rand(4, out_channels) + 0.5
    plane = [(n - 1) // stride + 1 for n in (height, width)]
    residual = channels_last(batch, out_channels, *plane).to(dtype) if has_residual else None
    affine = (gamma, beta) if has_affine else (None, None)
    norm = (mean, rstd, *affine, residual, act, 0.1)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        y = native.conv_fwd_apply(x, *conv, *norm)
    finally:
        torch.set_num_threads(before)
    expected, _ = native.bn_fwd_apply(native.conv_forward(x, *conv), *norm, False)
    assert_bit_equal(y, expected, "y")
    assert y.stride() == expected.stride()


@needs_native
def test_many_pixels_are_taken_in_several_units(monkeypatch):
    for family in (winograd, pointwise):
        monkeypatch.setattr(family, "mode", "1")  # where they do not pay too
    x, weight = channels_last(4, 32, 60, 52), torch.randn(48, 32, 3, 3)
    narrow = torch.randn(48, 32, 1, 1)
    norm = (*torch.rand(4, 48) + 0.5, channels_last(4, 48, 60, 52), "relu", 0.0)
    for w, padding in ((weight, [1, 1]), (narrow, [0, 0])):
        conv = (w, None, [1, 1], padding, [1, 1], 1)
        assert native.fuses_chain(x, w, *conv[2:])
        expected, _ = native.bn_fwd_apply(native.conv_forward(x, *conv), *norm, False)
        assert_bit_equal(native.conv_fwd_apply(x, *conv, *norm), expected, "y")


@needs_native
def test_a_residual_that_does_not_fit_is_refused():
    x, weight = channels_last(2, 16, 8, 8), torch.randn(16, 16, 3, 3)
    norm = (*torch.rand(4, 16), channels_last(2, 16, 8, 4), "relu", 0.0)
    with pytest.raises(RuntimeError, match="residual"):
        native.conv_fwd_apply(x, weight, None, [1, 1], [1, 1], [1, 1], 1, *norm)


@pytest.mark.parametrize("name", [n for n, ok in bnfast.backends().items() if ok is True])
def test_evaluation_is_the_same_with_and_without_gradients(name):
    torch.manual_seed(0)
    model = bnfast.models.create("resnet14").train()
    pooled = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(3, 2, 1))  # fmt: skip
    x = torch.randn(4, 3, 32, 32)
    for net in (model, pooled):
        bnfast.convert(net, inplace=True, backend=name)
        net(x)
        net.eval()
        with_gradients = net(x).detach()
        with torch.no_grad():
            without = net(x)
        with torch.inference_mode():
            inference = net(x)
        assert_bit_equal(without, with_gradients, "y")
        assert_bit_equal(inference, without, "y")
        plain = bnfast.revert(net)
        torch.testing.assert_close(without, plain(x).detach(), rtol=1e-3, atol=1e-3)


def test_every_backend_has_the_composition():
    for name, available in bnfast.backends().items():
        if available is True:
            phases = dispatch.module(name)
            assert callable(phases.conv_fwd_apply) and callable(phases.max_pool_values)
