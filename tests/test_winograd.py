"""3x3 convolutions of stride 1 and 2 in Winograd's form: every shape against float64, the choice of the form, its weights and its errors."""

import math

import pytest
import torch
import torch.nn.functional as F
from closeness import (
    assert_bit_equal,
    assert_bits_of_any_number_of_threads,
    assert_close_as_winograd,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import bnfast
from bnfast import native, ops, winograd
from bnfast.weights import cache_bytes

pytestmark = pytest.mark.skipif(native.unavailable is not None, reason=str(native.unavailable))

ONES = [1, 1]


@pytest.fixture
def everywhere(monkeypatch):
    monkeypatch.setattr(winograd, "mode", "1")


def channels_last(*size: int, mean: float = 0.0) -> torch.Tensor:
    return (torch.randn(size) + mean).contiguous(memory_format=torch.channels_last)


@pytest.fixture(params=["4", "6"])
def tile(request, monkeypatch):
    """Outputs of a tile along a side, where the stride is 1."""
    monkeypatch.setattr(winograd, "tile_mode", request.param)
    return int(request.param)


def frozen(out_channels: int, channels: int) -> torch.Tensor:
    return torch.randn(out_channels, channels, 3, 3) / math.sqrt(9 * channels)


SIZES = dict(
    batch=st.integers(1, 3),
    channels=st.integers(1, 40),
    out_channels=st.integers(1, 40),
    height=st.integers(1, 14),
    width=st.integers(1, 30),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    stride=st.sampled_from([1, 2]),
    mean=st.sampled_from([0.0, 3.0, -100.0]),
    has_bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)


@settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(**SIZES)
def test_both_directions_on_random_shapes(
    everywhere,
    tile,
    batch,
    channels,
    out_channels,
    height,
    width,
    padding,
    stride,
    mean,
    has_bias,
    dtype,
    seed,
):
    if height + 2 * padding[0] < 3 or width + 2 * padding[1] < 3:
        return
    torch.manual_seed(seed)
    geometry = ([stride, stride], list(padding), ONES, 1)
    x, weight = (
        channels_last(batch, channels, height, width, mean=mean).to(dtype),
        frozen(out_channels, channels).to(dtype),
    )
    bias = torch.randn(out_channels).to(dtype) if has_bias else None
    wide = x.double().requires_grad_()
    oracle = F.conv2d(
        wide, weight.double(), None if bias is None else bias.double(), stride, padding
    )
    stock_x = x.clone().requires_grad_()
    stock = F.conv2d(stock_x, weight, bias, stride, padding)
    y = native.conv_forward(x, weight, bias, *geometry)
    if not x.is_contiguous():  # else it is an NCHW tensor as well, and stays one
        assert y.is_contiguous(memory_format=torch.channels_last)
    assert_close_as_winograd(y, oracle.detach(), [stock.detach()], "y")

    dz = channels_last(*oracle.shape).to(dtype)
    (dx_oracle,) = torch.autograd.grad(oracle, wide, dz.double())
    (dx_stock,) = torch.autograd.grad(stock, stock_x, dz)
    dx = native.conv_dgrad(dz, weight, [height, width], *geometry)
    assert_close_as_winograd(dx, dx_oracle, [dx_stock], "dx")


@settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    batch=st.integers(1, 3),
    channels=st.integers(1, 9),
    out_channels=st.integers(2, 40),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    kernel=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    padding=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    mean=st.sampled_from([0.0, 3.0, -100.0]),
    has_bias=st.booleans(),
    seed=st.integers(0, 2**31),
)  # fmt: skip
def test_strided_stems_on_random_shapes(
    everywhere, batch, channels, out_channels, size, kernel, padding, mean, has_bias, seed
):
    torch.manual_seed(seed)
    x = channels_last(batch, channels, *size, mean=mean)
    if not winograd.can_serve_blocks(x, kernel, (2, 2), padding, (1, 1), 1):
        return
    weight = torch.randn(out_channels, channels, *kernel) / math.sqrt(channels * math.prod(kernel))
    bias = torch.randn(out_channels) if has_bias else None
    oracle = F.conv2d(
        x.double(), weight.double(), None if bias is None else bias.double(), 2, padding
    )
    if oracle.norm() == 0 or oracle.numel() == out_channels:
        return  # padding alone; one value per channel
    turned = winograd.transformed_weight(winograd.block_weight(weight, padding), 2, 5)
    y = torch.ops.bnfast.blocked_conv(x, turned, bias, out_channels, kernel, padding)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_close_as_winograd(y, oracle, [F.conv2d(x, weight, bias, 2, padding)], "y")
    running = torch.zeros(out_channels), torch.ones(out_channels), torch.tensor(0)
    z, m, rstd = torch.ops.bnfast.blocked_fwd_reduce(
        x, turned, bias, out_channels, kernel, padding, *running, 0.1, 1e-5
    )
    assert_bit_equal(z, y, "z")
    zd = z.double()
    var = zd.var((0, 2, 3), unbiased=False)
    torch.testing.assert_close(m.double(), zd.mean((0, 2, 3)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rstd.double(), (var + 1e-5).rsqrt(), rtol=1e-4, atol=0)
    torch.testing.assert_close(running[0].double(), 0.1 * m.double(), rtol=1e-5, atol=1e-6)


def test_a_stem_is_a_unit_of_a_chain(everywhere, monkeypatch):
    """Conv, BatchNorm and max-pooling of a network's begin, and the operator that it comes to."""
    x = channels_last(2, 3, 45, 38, mean=1.0)
    weight = torch.randn(32, 3, 7, 7).contiguous(memory_format=torch.channels_last) / 12
    gamma, beta = torch.rand(32) + 0.5, torch.randn(32)
    called = []
    run = torch.ops.bnfast.blocked_fwd_reduce.default

    def saw(*args):
        called.append(args)
        return run(*args)

    monkeypatch.setattr(native.torch.ops.bnfast.blocked_fwd_reduce, "default", saw)
    unit = ops.Unit(
        weight, None, (2, 2), (3, 3), (1, 1), gamma=gamma, beta=beta, act="relu", running_mean=None,
        running_var=None, pool=ops.MaxPool((3, 3), (2, 2), (1, 1)),
    )  # fmt: skip
    y = ops.frozen_conv_bn_act(x, [unit], "cpu")
    assert len(called) == 1
    z = F.conv2d(x.double(), weight.double(), None, 2, 3)
    z = F.batch_norm(z, None, None, gamma.double(), beta.double(), True).relu()
    oracle = F.max_pool2d(z, 3, 2, 1)
    torch.testing.assert_close(y.double(), oracle, rtol=2e-5, atol=2e-5)


def test_the_choice_of_stems(monkeypatch):
    monkeypatch.setattr(winograd, "mode", "")
    x = torch.empty(2, 3, 32, 32)

    def serves(
        x=x, kernel=(7, 7), out_channels=64, stride=(2, 2), padding=(3, 3), dilation=(1, 1), groups=1,
        capability="avx512",
    ):  # fmt: skip
        return winograd.serves_blocks(
            x, kernel, out_channels, stride, padding, dilation, groups, capability
        )

    assert serves() and serves(kernel=(8, 8), padding=(4, 4))
    assert serves(torch.empty(2, 3, 80, 80), kernel=(5, 5), padding=(2, 2))
    assert not serves(x.double()) and not serves(x.bfloat16())
    assert not serves(stride=(1, 1)) and not serves(stride=(2, 1)) and not serves(dilation=(2, 2))
    assert not serves(kernel=(3, 3), padding=(1, 1)) and not serves(kernel=(8, 8))
    assert not serves(kernel=(4, 4)), "too few products to save"
    assert not serves(torch.empty(2, 5, 32, 32)) and not serves(out_channels=8)
    assert not serves(x[..., :2, :2]), "most of a tile is empty"
    assert not serves(capability="baseline")
    monkeypatch.setattr(winograd, "mode", "1")
    assert serves(torch.empty(2, 5, 32, 32)) and not serves(kernel=(3, 3), padding=(1, 1))
    monkeypatch.setattr(winograd, "mode", "0")
    assert not serves()


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x=torch.zeros(2, 3, 8)), "x is"),
        (dict(x=torch.zeros(2, 3, 8, 8, dtype=torch.float64)), "float32"),
        (dict(x=torch.zeros(2, 4, 8, 8)), "weights are"),
        (dict(x=torch.zeros(2, 3, 0, 8)), "does not fit"),
        (dict(kernel=[9, 7]), "kernel is"),
        (dict(padding=[3]), "two values"),
        (dict(padding=[-1, 3]), "padding"),
        (dict(bias=torch.zeros(5)), "bias is"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_stems_that_do_not_fit_are_refused(change, message):
    arguments = dict(x=torch.zeros(2, 3, 8, 8), bias=None, kernel=[7, 7], padding=[3, 3]) | change
    weight = winograd.block_weight(torch.randn(6, 3, 7, 7), (3, 3))
    weights = winograd.transformed_weight(weight, 2, 5)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.bnfast.blocked_conv(
            arguments["x"], weights, arguments["bias"], 6, arguments["kernel"], arguments["padding"]
        )


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_thread_count_does_not_change_a_bit(everywhere, tile, threads, stride):
    x, weight, step = channels_last(2, 96, 15, 9), frozen(160, 96), [stride, stride]

    stem_x, stem = channels_last(2, 3, 60, 62), torch.randn(40, 3, 7, 7)

    def results():
        y = native.conv_forward(x, weight, None, step, ONES, ONES, 1)
        first = native.conv_forward(stem_x, stem, None, [2, 2], [3, 3], ONES, 1)
        return first, y, native.conv_dgrad(y, weight, [15, 9], step, ONES, ONES, 1)

    assert_bits_of_any_number_of_threads(threads, results)


@pytest.mark.parametrize("channels", [65, 128, 272])
@pytest.mark.parametrize("mean", [0.0, 3.0])
def test_sums_over_many_channels(everywhere, tile, channels, mean):
    x, weight = channels_last(2, channels, 16, 18, mean=mean), frozen(40, channels)
    y = native.conv_forward(x, weight, None, ONES, ONES, ONES, 1)
    oracle, stock = F.conv2d(x.double(), weight.double(), padding=1), F.conv2d(x, weight, padding=1)
    assert_close_as_winograd(y, oracle, [stock], "y")


@pytest.mark.parametrize("batch, size", [(3, 7), (20, 9)])
def test_threads_that_share_weights_change_no_bit(tile, batch, size):
    """Few pixels of many channels: the weights are the most of what is read, and each thread takes its part of them."""
    x, weight = channels_last(batch, 144, size, size, mean=1.0), frozen(256, 144)
    turned = winograd.transformed_weight(weight, tile=tile)
    stats = (None, None, None, 0.1, 1e-5)
    norm, behind = torch.rand(4, 144) + 0.5, torch.rand(4, 256) + 0.5
    z, below = channels_last(batch, 144, size, size), channels_last(batch, 256, size, size)

    def results() -> list[torch.Tensor]:
        y = native.conv_forward(x, weight, None, ONES, ONES, ONES, 1)
        forward = torch.ops.bnfast.winograd_fwd_reduce(
            x, *norm, "relu", 0.0, turned, None, 256, ONES, 1, *stats
        )
        backward = torch.ops.bnfast.winograd_dgrad_reduce(
            x, z, *norm, *norm[:2], "relu", 0.0, turned, 256, [size, size], ONES, 1, None,
            below, None, *behind, "relu", 0.0, None, None, None,
        )  # fmt: skip
        return [y, *forward, *backward]

    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(results())
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        for i, (one, two) in enumerate(zip(found[0], other, strict=True)):
            assert_bit_equal(two, one, f"result {i}")
    y, z_of_y, mean, rstd = found[0][:4]
    oracle = F.conv2d(x.double(), weight.double(), padding=1)
    assert_close_as_winograd(y, oracle, [F.conv2d(x, weight, padding=1)], "y")
    torch.testing.assert_close(mean.double(), z_of_y.double().mean((0, 2, 3)), rtol=1e-5, atol=1e-5)
    variance = z_of_y.double().var((0, 2, 3), unbiased=False)
    torch.testing.assert_close(rstd.double(), (variance + 1e-5).rsqrt(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("where", ["everywhere", "first tile", "elsewhere"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("batch, channels, out_channels", [(2, 16, 16), (2, 20, 64), (1, 16, 272)])
def test_moments_from_registers(everywhere, tile, batch, channels, out_channels, stride, where):
    """As precise as sums about the mean, wherever the values lie far from 0: also where the first tile, whose mean is taken for a
    unit's, is far from all others."""
    x, weight = channels_last(batch, channels, 19, 23), frozen(out_channels, channels)
    far = torch.zeros(19, 23)
    far[:8, :8] = 1
    x += 1000 * {"everywhere": 1, "first tile": far, "elsewhere": 1 - far}[where]
    turned = winograd.transformed_weight(weight, stride, 4 if stride == 2 else tile)
    bias = torch.randn(out_channels)
    z, mean, rstd = torch.ops.bnfast.winograd_fwd_reduce(
        x, None, None, None, None, "identity", 0.0, turned, bias, out_channels, ONES, stride,
        None, None, None, None, 1e-5,
    )  # fmt: skip
    variance, expected = torch.var_mean(z.double(), (0, 2, 3), unbiased=False)
    deviation = variance.sqrt()
    assert ((mean - expected).abs() <= 1e-6 * expected.abs() + 1e-5 * deviation).all()
    torch.testing.assert_close(rstd.double(), (variance + 1e-5).rsqrt(), rtol=1e-5, atol=0)


def test_nan_stays_with_the_outputs_that_it_reaches(everywhere):
    x, weight = channels_last(2, 20, 12, 12), frozen(18, 20)
    x[1, 3, 2, 2] = math.nan
    y = native.conv_forward(x, weight, None, ONES, ONES, ONES, 1)
    assert (
        y[0].isfinite().all() and y[1, :, 4:].isfinite().all() and y[1, :, :, 4:].isfinite().all()
    )
    assert y[1, :, 1:4, 1:4].isnan().all()


def serves(
    x,
    out_channels=32,
    kernel=(3, 3),
    stride=(1, 1),
    padding=(1, 1),
    dilation=(1, 1),
    groups=1,
    capability="avx512",
):
    return winograd.serves(x, kernel, out_channels, stride, padding, dilation, groups, capability)


def test_the_choice(monkeypatch):
    monkeypatch.setattr(winograd, "mode", "")
    x = torch.empty(2, 32, 8, 8)
    assert serves(x)
    assert not serves(x.double()) and not serves(x.half())
    for capability, expected in (
        ("avx512", (True, True)),
        ("avx512_bf16", (True, False)),
        ("amx", (False, False)),
    ):
        on = dict(capability=capability)
        assert tuple(serves(x.bfloat16(), stride=(s, s), **on) for s in (1, 2)) == expected
        assert serves(x, **on) and serves(x, stride=(2, 2), **on)
    assert not serves(x, kernel=(1, 3)) and not serves(x, dilation=(1, 2))
    assert (
        serves(x, stride=(2, 2)) and not serves(x, stride=(1, 2)) and not serves(x, stride=(3, 3))
    )
    assert serves(x[..., :6, :6], stride=(2, 2)) and not serves(x[..., :1, :8], stride=(2, 2))
    assert not serves(x, groups=2) and not serves(x, out_channels=8) and not serves(x[:, :3])
    assert serves(x[..., :2, :2]) and not serves(x[..., :1, :1]), (
        "as many products as the direct form"
    )
    assert not winograd.serves(x, (3, 3), 32, ONES, ONES, ONES, 1, "baseline")
    monkeypatch.setattr(winograd, "mode", "1")
    assert serves(x, out_channels=8) and not serves(x.double())
    monkeypatch.setattr(winograd, "mode", "0")
    assert not serves(x)


def test_the_choice_of_the_tile(monkeypatch):
    monkeypatch.setattr(winograd, "tile_mode", "")

    def tile(channels=128, size=(14, 14), stride=1, dtype=torch.float32):
        return winograd.tile(dtype, channels, channels, size, stride)

    assert tile() == tile(255) == tile(size=(32, 32)) == tile(size=(6, 6)) == 6
    assert tile(64) == tile(256) == 4, "products are not the most of the work, or weights are"
    assert tile(size=(8, 8)) == tile(size=(7, 7)) == 4, "as many products"
    assert tile(size=(56, 56)) == tile(stride=2) == tile(dtype=torch.bfloat16) == 4
    monkeypatch.setattr(winograd, "tile_mode", "6")
    assert tile(3, (8, 8)) == 6 and tile(stride=2) == tile(dtype=torch.bfloat16) == 4
    monkeypatch.setattr(winograd, "tile_mode", "4")
    assert tile() == 4


@pytest.mark.skipif(
    not hasattr(getattr(torch.backends.mkldnn, "conv", None), "fp32_precision"),
    reason="this PyTorch has no precision setting for convolutions",
)
def test_ieee_precision_turns_it_off(monkeypatch):
    monkeypatch.setattr(winograd, "mode", "")
    before = torch.backends.mkldnn.conv.fp32_precision
    torch.backends.mkldnn.conv.fp32_precision = "ieee"
    try:
        assert not serves(torch.empty(2, 32, 8, 8))
    finally:
        torch.backends.mkldnn.conv.fp32_precision = before


def test_transformed_weights_follow_the_weight(everywhere, tile):
    x, weight = channels_last(1, 16, 8, 8), frozen(16, 16)

    def run():
        return native.conv_forward(x, weight, None, ONES, ONES, ONES, 1)

    bnfast.clear_cache()
    first = run()
    assert cache_bytes() == (tile + 2) ** 2 * 16 * 16 * 4
    for change in (
        lambda: weight.mul_(2),
        lambda: weight.data.mul_(2),
        lambda: weight.numpy().__imul__(2),
    ):
        before = run()
        change()
        torch.testing.assert_close(run(), 2 * before)
    assert not torch.equal(run(), first)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x=torch.zeros(2, 4, 8)), "x is"),
        (dict(x=torch.zeros(2, 4, 8, 8, dtype=torch.float64)), "float32"),
        (dict(x=torch.zeros(2, 5, 8, 8)), "weights are"),
        (dict(x=torch.zeros(2, 4, 1, 8), padding=[0, 0]), "does not fit"),
        (dict(padding=[1]), "padding is"),
        (dict(stride=3), "stride is"),
        (dict(bias=torch.zeros(5)), "bias is"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_what_does_not_fit_is_refused(change, message):
    arguments = dict(x=torch.zeros(2, 4, 8, 8), bias=None, padding=[1, 1], stride=1) | change
    weights = winograd.transformed_weight(torch.randn(3, 4, 3, 3))
    with pytest.raises(RuntimeError, match=message):
        torch.ops.bnfast.winograd_conv(
            arguments["x"], weights, arguments["bias"], 3, arguments["padding"], arguments["stride"]
        )


def test_wide_tiles_of_bfloat16_are_refused():
    weights = winograd.transformed_weight(torch.randn(3, 4, 3, 3), tile=6)
    with pytest.raises(RuntimeError, match="float32 is needed"):
        torch.ops.bnfast.winograd_conv(
            torch.zeros(2, 4, 8, 8, dtype=torch.bfloat16), weights, None, 3, ONES, 1
        )


@pytest.mark.parametrize(
    "size, padding, stride", [([8, 9], ONES, 1), ([9, 8], ONES, 2), ([8], ONES, 2)]
)
def test_a_gradient_that_does_not_fit_is_refused(size, padding, stride):
    weights = winograd.transformed_weight(torch.randn(3, 4, 3, 3), stride)
    with pytest.raises(RuntimeError, match="input_size"):
        torch.ops.bnfast.winograd_dgrad(torch.zeros(2, 4, 8, 8), weights, 3, size, padding, stride)


def test_empty_batch(everywhere):
    y = native.conv_forward(
        torch.empty(0, 16, 8, 8).contiguous(memory_format=torch.channels_last),
        frozen(16, 16),
        None,
        ONES,
        ONES,
        ONES,
        1,
    )
    assert y.shape == (0, 16, 8, 8)


# ---- units on many shapes and kinds of data ----------------------------------------------------------------------------


def of_kind(kind: str, size: tuple[int, ...]) -> torch.Tensor:
    """x [N, C, H, W]: what reaches a convolution in a network, and what breaks sums."""
    x = torch.randn(size)
    if kind == "off centre":
        x = x + torch.randn(1, size[1], 1, 1) * 30
    elif kind == "tiny":
        x = x * 1e-4
    elif kind == "huge":
        x = x * 1e4 - 2e4
    elif kind == "half zeros":
        x = x.relu()
    elif kind == "heavy tails":
        x = x * torch.randn(size).exp() ** 2
    elif kind == "one outlier":
        x[0, 0, 0, 0] = 1e3
    elif kind == "dead channels":
        x[:, ::2] = 0
    return x.contiguous(memory_format=torch.channels_last)


def two_units(weights, vectors, strides, act: str) -> list[ops.Unit]:
    return [
        ops.Unit(
            w, None, (s, s), (1, 1), (1, 1), gamma=g, beta=b, act=act, running_mean=None,
            running_var=None,
        )
        for w, (g, b), s in zip(weights, vectors, strides, strict=True)
    ]  # fmt: skip


def plain(x, weights, vectors, strides, act: str) -> torch.Tensor:
    for w, (g, b), s in zip(weights, vectors, strides, strict=True):
        x = F.batch_norm(F.conv2d(x, w, stride=s, padding=1), None, None, g, b, True)
        x = F.silu(x) if act == "silu" else x
    return x


def results(run, x, weights, vectors, dy) -> list[torch.Tensor]:
    """y, dx, and dgamma and dbeta of both units."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    vectors = [tuple(v.detach().clone().requires_grad_() for v in pair) for pair in vectors]
    y = run(x, weights, vectors)
    leaves = [x, *(v for pair in vectors for v in pair)]
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def errors(found, exact) -> list[float]:
    """In the 2-norm."""
    return [
        torch.linalg.vector_norm(f.double() - e).item() for f, e in zip(found, exact, strict=True)
    ]


def conditions(x, weights, vectors, strides, act: str, dy) -> tuple[float, list[float]]:
    """In float64: the conditioning of the normalisations (their inputs' size over their deviation), and the 2-norms that roundings of
    y, dx, and each unit's dgamma and dbeta are relative to. For the sums that is the sum of the sizes of what they add up: behind a
    unit whose whole map is one pixel, the unit below has a dbeta of exactly 0 (the normalisation takes its beta out again)."""
    conditioning, kept = 1.0, []
    x = z = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    for w, (g, b), s in zip(weights, vectors, strides, strict=True):
        z = F.conv2d(z, w, stride=s, padding=1)
        deviation = (z.detach().var((0, 2, 3), correction=0) + 1e-5).sqrt()
        conditioning *= 1 + (z.detach().abs().amax((0, 2, 3)) / deviation).max().item()
        xhat = F.batch_norm(z, None, None, None, None, True)
        pre = xhat * g.view(1, -1, 1, 1) + b.view(1, -1, 1, 1)
        pre.retain_grad()
        kept.append((xhat.detach(), pre))
        z = F.silu(pre) if act == "silu" else pre
    z.backward(dy)
    norms = [z.detach().norm().item(), x.grad.norm().item()]
    for xhat, pre in kept:
        for term in (pre.grad * xhat, pre.grad):
            norms.append(term.abs().sum((0, 2, 3)).norm().item())
    return conditioning, norms


@settings(
    max_examples=2000,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    batch=st.integers(1, 4),
    channels=st.sampled_from([1, 3, 8, 16, 17, 32]),
    between=st.sampled_from([2, 5, 16, 24]),
    out_channels=st.sampled_from([1, 4, 16, 19]),
    height=st.integers(1, 13),
    width=st.integers(1, 13),
    strides=st.sampled_from([(1, 1), (1, 2), (2, 1)]),
    tile=st.sampled_from(["4", "6"]),
    act=st.sampled_from(["identity", "silu"]),
    kind=st.sampled_from(
        ["normal", "off centre", "tiny", "huge", "half zeros", "heavy tails", "one outlier", "dead channels"]
    ),
    seed=st.integers(0, 2**31),
)  # fmt: skip
def test_units_are_within_eight_times_of_stock_pytorch(
    everywhere, monkeypatch, batch, channels, between, out_channels, height, width, strides, tile, act, kind, seed
):  # fmt: skip
    """Two units, joined: every result's error against float64 is at most 8 times that of the worse stock layout, or 1e-5 times its
    size and the conditioning of the normalisations where that is more."""
    out = [-(-n // max(strides)) for n in (height, width)]
    if batch * math.prod(out) < 4:
        return
    monkeypatch.setattr(winograd, "tile_mode", tile)
    torch.manual_seed(seed)
    x = of_kind(kind, (batch, channels, height, width))
    weights = [frozen(between, channels), frozen(out_channels, between)]
    vectors = [(torch.rand(n) + 0.5, torch.randn(n)) for n in (between, out_channels)]
    dy = torch.randn(batch, out_channels, *out)
    wide = [w.double() for w in weights]

    def stock(x, w, v):
        return plain(x, w, v, strides, act)

    def ours(x, w, v):
        return ops.frozen_conv_bn_act(x, two_units(w, v, strides, act), "cpu")

    double = [tuple(v.double() for v in pair) for pair in vectors]
    exact = results(stock, x.double(), wide, double, dy.double())
    apart = [
        errors(results(stock, x.contiguous(memory_format=f), weights, vectors, dy), exact)
        for f in (torch.contiguous_format, torch.channels_last)
    ]
    found = results(ours, x, weights, vectors, dy)
    assert all(t.isfinite().all() for t in found)
    conditioning, norms = conditions(x.double(), wide, double, strides, act, dy.double())
    names = ("y", "dx", "dgamma 1", "dbeta 1", "dgamma 2", "dbeta 2")
    for name, size, error, *stocks in zip(names, norms, errors(found, exact), *apart, strict=True):
        allowed = max(8 * max(stocks), 1e-5 * conditioning * size)
        assert error <= allowed, f"{name}: {error:.2e}, allowed {allowed:.2e}"
