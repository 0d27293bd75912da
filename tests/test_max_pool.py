"""Max-pooling behind a unit: the compiled kernels against the reference, which is PyTorch's, bit for bit."""

import itertools

import pytest
import torch
from closeness import assert_bit_equal, assert_close_to_oracle

from bnfast import native, reference

pytestmark = [
    pytest.mark.skipif(native.unavailable is not None, reason=str(native.unavailable)),
    pytest.mark.usefixtures("poisoned_memory"),
]
WINDOWS = [
    ((3, 3), (2, 2), (1, 1)),
    ((2, 2), (2, 2), (0, 0)),
    ((3, 2), (1, 3), (1, 0)),
    ((1, 1), (1, 1), (0, 0)),
    ((5, 4), (3, 1), (2, 2)),
    ((2, 2), (3, 3), (0, 1)),
    ((16, 16), (4, 8), (8, 3)),
]
SIZES = [(2, 16, 12, 9), (1, 5, 16, 16), (3, 67, 7, 11), (2, 32, 5, 40)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def pooled(size, window) -> bool:
    return all(s + 2 * p >= k for s, k, p in zip(size[2:], window[0], window[2], strict=True))


@pytest.mark.parametrize(
    "size, window", [c for c in itertools.product(SIZES, WINDOWS) if pooled(*c)], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("threads", [1, 3])
def test_both_directions(size, window, dtype, threads):
    torch.set_num_threads(threads)
    # Few different values: many maxima of a window are equal.
    y = torch.randint(-3, 3, size).to(dtype).contiguous(memory_format=torch.channels_last)
    p, places = native.max_pool(y, *window)
    expected, expected_places = reference.max_pool(y, *window)
    assert p.is_contiguous(memory_format=torch.channels_last)
    assert_bit_equal(p, expected, "p")
    assert_bit_equal(places, expected_places, "places")
    # Small integers, whose sums are exact in any order.
    dp = torch.randint(-8, 8, p.shape).to(dtype).contiguous(memory_format=torch.channels_last)
    dy = native.max_pool_backward(dp, places, y, *window)
    assert_bit_equal(dy, reference.max_pool_backward(dp, places, y, *window), "dy")


@pytest.mark.parametrize(
    "size, window",
    [c for c in itertools.product((*SIZES, (2, 48, 61, 45)), WINDOWS) if pooled(*c)],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("threads", [1, 3])
def test_joined_with_the_phases_of_its_unit(size, window, threads, dtype):
    """To the bit what the phases give one after the other, and sums of what they add up."""
    torch.set_num_threads(threads)
    z = torch.randn(size).contiguous(memory_format=torch.channels_last).to(dtype) + 0.5
    if not native.joins_pool(z):
        pytest.skip("one channel or pixel: not in channels_last alone")
    norm = reference.Norm(*(torch.rand(4, size[1]) + 0.5))
    for act in ("relu", "silu", "identity"):
        y, _ = native.bn_fwd_apply(z, *norm, None, act, 0.0, False)
        expected, expected_places = native.max_pool(y, *window)
        p, places = native.bn_fwd_apply_max_pool(z, norm, act, 0.0, *window)
        assert_bit_equal(p, expected, "p")
        assert_bit_equal(places, expected_places, "places")
        dp = torch.randn(p.shape).contiguous(memory_format=torch.channels_last).to(dtype)
        found = native.max_pool_backward_bn_bwd_reduce(dp, places, z, norm, act, 0.0, *window)
        wide = reference.Norm(*(t.double() for t in norm))
        dy = reference.max_pool_backward(dp.double(), places, z.double(), *window)
        one = torch.ones_like(dy)
        _, slope = reference.bn_bwd_apply(
            one, z.double(), *wide, None, None, None, None, act, 0.0, True
        )
        # In float32, as the phases find the mask.
        if act == "relu":
            slope = (native.bn_fwd_apply(z.float(), *norm, None, act, 0.0, False)[0] > 0).double()
        mean, rstd = (t.view(1, -1, 1, 1) for t in wide[:2])
        db = dy * slope
        for name, sums, factor, size_of_factor in (
            ("dgamma", found[0], (z.double() - mean) * rstd, (z.double().abs() + mean) * rstd),
            ("dbeta", found[1], one, one),
        ):
            oracle = (db * factor).sum((0, 2, 3))
            scale = (db.abs() * size_of_factor).sum((0, 2, 3)) + 1e-30
            count = p.numel() // p.shape[1]
            assert_close_to_oracle(sums, oracle, [], name, scale=scale, terms=count)


def test_joined_refusals():
    z = torch.randn(2, 16, 8, 8).contiguous(memory_format=torch.channels_last)
    norm, window = tuple(torch.rand(4, 16)), ((2, 2), (2, 2), (0, 0))
    places = torch.zeros(2, 16, 4, 4, dtype=torch.uint8)
    operator = torch.ops.bnfast.max_pool_backward_bn_bwd_reduce
    with pytest.raises(RuntimeError, match="N, C and the dtype"):
        operator(torch.randn(2, 8, 4, 4), places, z, *norm, "relu", 0.0, *window)
    with pytest.raises(RuntimeError, match="places"):
        operator(torch.randn(2, 16, 4, 4), places.float(), z, *norm, "relu", 0.0, *window)
    with pytest.raises(RuntimeError, match="in channels_last is needed"):
        torch.ops.bnfast.bn_fwd_apply_max_pool(z.double(), *norm, "relu", 0.0, *window)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinity(dtype):
    y = torch.randn(2, 19, 9, 9).to(dtype)
    for value in (float("nan"), float("inf"), -float("inf")):
        y[torch.rand(y.shape) < 0.2] = value
    y[0, :3] = -float("inf")
    y[1, :3] = float("nan")
    y = y.contiguous(memory_format=torch.channels_last)
    window = WINDOWS[0]
    for name, found, expected in zip(
        ("p", "places"), native.max_pool(y, *window), reference.max_pool(y, *window), strict=True
    ):
        assert_bit_equal(found, expected, name)


def test_other_layouts_and_sizes():
    """NCHW is the stock kernel's; empty batches; a gradient in another layout."""
    window = WINDOWS[0]
    y = torch.randn(2, 8, 10, 10)
    p, places = native.max_pool(y, *window)
    assert p.is_contiguous()
    last = y.contiguous(memory_format=torch.channels_last)
    p_last, places_last = native.max_pool(last, *window)
    assert_bit_equal(p_last.contiguous(), p, "p")
    dp = torch.randn_like(p)
    dy = native.max_pool_backward(dp, places_last, last, *window)
    expected = native.max_pool_backward(dp, places, y, *window)
    torch.testing.assert_close(dy, expected)
    empty, _ = native.max_pool(last[:0], *window)
    assert empty.shape == (0, 8, 5, 5)


@pytest.mark.parametrize(
    "window, what",
    [
        (((17, 16), (1, 1), (0, 0)), "kernel is"),
        (((3, 3), (0, 1), (0, 0)), "stride"),
        (((3, 3), (1, 1), (2, 0)), "padding is"),
        (((13, 3), (1, 1), (0, 0)), "does not fit"),
    ],
)
def test_refusals(window, what):
    y = torch.randn(1, 16, 12, 12).contiguous(memory_format=torch.channels_last)
    with pytest.raises(RuntimeError, match=what):
        native.max_pool(y, *window)
