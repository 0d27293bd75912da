"""Convolutions whose weight is kept in oneDNN's blocked form: the bits of PyTorch's own, whatever comes in."""

import pytest
import torch
from closeness import assert_bit_equal

import bnfast
from bnfast import dot, grouped, native, onednn, reference, weights, winograd

pytestmark = [
    pytest.mark.skipif(native.unavailable is not None, reason=str(native.unavailable)),
    pytest.mark.skipif(
        torch.float32 not in onednn._dtypes, reason="PyTorch here has no oneDNN operators"
    ),
]

CONVS = {
    "1x1": ((24, 40, 1, 1), [1, 1], [0, 0], [1, 1], 1),
    "1x1 stride 2": ((24, 40, 1, 1), [2, 2], [0, 0], [1, 1], 1),
    "7x7 stride 2": ((17, 3, 7, 7), [2, 2], [3, 3], [1, 1], 1),
    "grouped": ((32, 4, 3, 3), [1, 1], [1, 1], [1, 1], 8),
    "depthwise": ((19, 1, 5, 5), [1, 1], [2, 2], [1, 1], 19),
    "dilated": ((16, 8, 3, 3), [1, 1], [2, 2], [2, 2], 1),
}


def channels_last(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", sorted(onednn._dtypes, key=str), ids=str)
@pytest.mark.parametrize("name", CONVS)
def test_bits_of_the_stock_convolution(name, dtype, monkeypatch):
    """Forward with bias and data gradient, on the shape that the weight was packed for and on others."""
    monkeypatch.setattr(winograd, "mode", "0")
    monkeypatch.setattr(grouped, "mode", "0")
    monkeypatch.setattr(dot, "mode", "0")
    shape, stride, padding, dilation, groups = CONVS[name]
    weight = torch.randn(shape).contiguous(memory_format=torch.channels_last)
    bias = torch.randn(shape[0])
    geometry = (stride, padding, dilation, groups)
    before = weights.cache_bytes()
    for batch, size in ((2, (14, 15)), (5, (9, 14)), (1, (32, 31))):
        x = channels_last(batch, shape[1] * groups, *size, dtype=dtype)
        actual = native.conv_forward(x, weight, bias, *geometry)
        cast = weight.to(dtype), bias.to(dtype)
        expected = reference.conv_forward(x, *cast, *geometry)
        assert_bit_equal(actual, expected, "z")
        assert actual.stride() == expected.stride()
    assert weights.cache_bytes() > before


def test_switched_off_with_mkldnn():
    """torch.backends.mkldnn.flags(enabled=False) is obeyed at each call."""
    x, weight = channels_last(2, 8, 7, 7), torch.randn(16, 8, 1, 1)
    args = (x, weight, None, [1, 1], [0, 0], [1, 1], 1)
    expected = native.conv_forward(*args)
    with torch.backends.mkldnn.flags(enabled=False):
        assert not onednn.serves(x)
        actual = native.conv_forward(*args)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w.mul_(2),
        lambda w: w.data.mul_(2),
        lambda w: w.set_(torch.randn(w.shape)),
        lambda w: w.numpy().__imul__(2),
    ],
    ids=["in place", "data", "set_", "numpy"],
)
def test_packed_anew_after_a_change(change):
    x, weight = channels_last(2, 8, 7, 7), torch.randn(16, 8, 1, 1)
    args = (x, weight, None, [1, 1], [0, 0], [1, 1], 1)
    native.conv_forward(*args)
    change(weight)
    assert_bit_equal(native.conv_forward(*args), reference.conv_forward(*args), "z")


def test_clear_cache_frees_packed_weights():
    weight = torch.randn(64, 64, 1, 1)
    native.conv_forward(channels_last(2, 64, 7, 7), weight, None, [1, 1], [0, 0], [1, 1], 1)
    assert weights.cache_bytes() >= weight.nbytes
    bnfast.clear_cache()
    assert weights.cache_bytes() == 0


def test_empty_batch_packs_nothing():
    weight = torch.randn(4, 3, 1, 1)
    bnfast.clear_cache()
    x = torch.empty(0, 3, 5, 5).contiguous(memory_format=torch.channels_last)
    z = native.conv_forward(x, weight, None, [1, 1], [0, 0], [1, 1], 1)
    assert z.shape == (0, 4, 5, 5) and weights.cache_bytes() == 0
