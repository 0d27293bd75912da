"""1x1 convolutions as products of our own: every shape against float64, the phases around them, the choice, weights and errors."""

import math

import pytest
import torch
import torch.nn.functional as F
from closeness import assert_bit_equal, assert_close_to_oracle
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import bnfast
from bnfast import native, pointwise, reference
from bnfast.weights import cache_bytes

pytestmark = [
    pytest.mark.skipif(native.unavailable is not None, reason=str(native.unavailable)),
    pytest.mark.usefixtures("poisoned_memory"),
]

ONES, ZEROS = [1, 1], [0, 0]
GEOMETRY = (ONES, ZEROS, ONES, 1)


@pytest.fixture
def everywhere(monkeypatch):
    monkeypatch.setattr(pointwise, "mode", "1")


def channels_last(*size: int, mean: float = 0.0) -> torch.Tensor:
    return (torch.randn(size) + mean).contiguous(memory_format=torch.channels_last)


def frozen(out_channels: int, channels: int) -> torch.Tensor:
    return torch.randn(out_channels, channels, 1, 1) / math.sqrt(channels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("stride, size", [((2, 2), (9, 8)), ((3, 1), (7, 7)), ((1, 2), (4, 5))])
def test_spread_is_zero_where_nothing_was_read(stride, size, dtype):
    shape = [-(-n // s) for n, s in zip(size, stride, strict=True)]
    read = channels_last(2, 7, *shape).to(dtype)
    dx = torch.ops.bnfast.pointwise_spread(read, size, stride)
    expected = torch.zeros(2, 7, *size, dtype=dtype)
    expected[:, :, :: stride[0], :: stride[1]] = read
    assert_bit_equal(dx, expected.contiguous(memory_format=torch.channels_last), "dx")
    with pytest.raises(RuntimeError, match="stride"):
        torch.ops.bnfast.pointwise_spread(read, [size[0] + 3, size[1]], stride)


SIZES = dict(
    batch=st.integers(1, 3),
    channels=st.integers(2, 70),
    out_channels=st.integers(2, 70),
    height=st.integers(1, 14),
    width=st.integers(2, 30),
    seed=st.integers(0, 2**31),
)
MANY = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def recorded(monkeypatch, name: str) -> list:
    """Gets an entry for each call of an operator."""
    calls, packet = [], getattr(torch.ops.bnfast, name)

    class Recorder:
        @staticmethod
        def default(*args):
            calls.append(args)
            return packet.default(*args)

    monkeypatch.setattr(torch.ops.bnfast, name, Recorder)
    return calls


@MANY
@given(mean=st.sampled_from([0.0, 3.0, -100.0]), has_bias=st.booleans(), **SIZES)
def test_both_directions_on_random_shapes(
    everywhere, batch, channels, out_channels, height, width, seed, mean, has_bias
):
    torch.manual_seed(seed)
    x = channels_last(batch, channels, height, width, mean=mean)
    weight = frozen(out_channels, channels)
    bias = torch.randn(out_channels) if has_bias else None
    wide = x.double().requires_grad_()
    oracle = F.conv2d(wide, weight.double(), None if bias is None else bias.double())
    size = F.conv2d(x.double().abs(), weight.double().abs()) + (0 if bias is None else 1)
    y = native.conv_forward(x, weight, bias, *GEOMETRY)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_close_to_oracle(y, oracle.detach(), [], "y", scale=size, terms=channels)

    dz = channels_last(*oracle.shape)
    (dx_oracle,) = torch.autograd.grad(oracle, wide, dz.double())
    size = torch.einsum("nkhw,kc->nchw", dz.double().abs(), weight[..., 0, 0].double().abs())
    dx = native.conv_dgrad(dz, weight, [height, width], *GEOMETRY)
    assert_close_to_oracle(dx, dx_oracle, [], "dx", scale=size, terms=out_channels)


@MANY
@given(
    act=st.sampled_from(reference.ACTS),
    has_residual=st.booleans(),
    has_gamma=st.booleans(),
    want_dresidual=st.booleans(),
    has_bias=st.booleans(),
    gradient_is_last=st.booleans(),
    **SIZES,
)
def test_phases_around_it_are_the_phases(
    everywhere, batch, channels, out_channels, height, width, seed, act, has_residual, has_gamma,
    want_dresidual, has_bias, gradient_is_last,
):  # fmt: skip
    """conv_fwd_reduce_apply and bn_bwd_reduce_apply_dgrad, piece by piece, give the bits of the phases one after the other."""
    torch.manual_seed(seed)
    check_phases_around_it(
        (batch, channels, height, width), out_channels, act, has_residual, has_gamma,
        want_dresidual, has_bias, gradient_is_last,
    )  # fmt: skip


@pytest.mark.parametrize(
    "size, out_channels",
    [((2, 24, 41, 43), 144), ((3, 200, 30, 31), 24), ((1, 16, 113, 97), 96), ((2, 640, 9, 7), 530)],
    ids=str,
)
@pytest.mark.parametrize("threads", [1, 3])
def test_several_units_of_work(everywhere, size, out_channels, threads):
    torch.set_num_threads(threads)
    check_phases_around_it(size, out_channels, "relu6", False, True, False, False, True)
    check_phases_around_it(size, out_channels, "relu", True, True, True, True, False)


def check_phases_around_it(
    size, out_channels, act, has_residual, has_gamma, want_dresidual, has_bias, gradient_is_last
):
    x, weight = channels_last(*size, mean=2.0), frozen(out_channels, size[1])
    shape = (size[0], out_channels, *size[2:])
    conv = (weight, torch.randn(out_channels) if has_bias else None, *GEOMETRY)
    gamma, beta = (torch.rand(2, out_channels) + 0.2) if has_gamma else (None, None)
    residual = channels_last(*shape) if has_residual else None
    want_bits = has_residual and act in reference.BIT_ACTS
    tail = (0.3, 1e-5, gamma, beta, residual, act, 0.01, want_bits)

    def buffers():
        return torch.zeros(out_channels), torch.ones(out_channels), torch.tensor(3)

    ours, expected = buffers(), buffers()
    z, mean, rstd, y, bits = native.conv_fwd_reduce_apply(x, *conv, *ours, *tail)
    plain = native.conv_forward(x, *conv)
    found = native.bn_fwd_reduce_apply(plain, *expected, *tail)
    names = ("z", "mean", "rstd", "y", "bits", "running_mean", "running_var", "tracked")
    for name, actual, value in zip(
        names, (z, mean, rstd, y, bits, *ours), (plain, *found, *expected), strict=True
    ):
        assert_bit_equal(actual, value, name)

    dy = torch.randn(shape)
    if gradient_is_last:
        dy = dy.contiguous(memory_format=torch.channels_last)
    hidden = residual if act in reference.SMOOTH_ACTS else None
    state = (z, mean, rstd, gamma, beta, hidden, bits if want_bits else None)
    state = (*state, act, 0.01, want_dresidual)
    before = dy.clone()
    dgrad = (weight, list(size[2:]), *GEOMETRY)
    actual = native.bn_bwd_reduce_apply_dgrad(dy, *state, False, *dgrad)
    assert_bit_equal(dy, before, "dy")
    dgamma, dbeta, dz, dresidual = native.bn_bwd_reduce_apply(dy, *state)
    expected = (dgamma, dbeta, native.conv_dgrad(dz, *dgrad), dresidual)
    for name, a, e in zip(("dgamma", "dbeta", "dx", "dresidual"), actual, expected, strict=True):
        assert_bit_equal(a, e, name)


def test_the_chain_takes_the_fused_phases(everywhere, monkeypatch):
    """One product forward and one backward, and no bn_bwd_apply beside them."""
    forward = recorded(monkeypatch, "pointwise_fwd_reduce")
    backward = recorded(monkeypatch, "pointwise_dgrad_reduce")
    unit = bnfast.nn.FrozenConvBNAct2d(6, 20, 1, act="relu6")
    x = channels_last(2, 6, 5, 4).requires_grad_()
    y = unit(x)
    y.backward(torch.randn_like(y))
    assert len(forward) == len(backward) == 1


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_thread_count_does_not_change_a_bit(everywhere, threads):
    for size, out_channels in (((2, 96, 15, 9), 160), ((1, 48, 3, 2), 210), ((4, 31, 40, 40), 17)):
        x, weight = channels_last(*size), frozen(out_channels, size[1])
        expected = native.conv_forward(x, weight, None, *GEOMETRY)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        assert_bit_equal(native.conv_forward(x, weight, None, *GEOMETRY), expected, "y")
        torch.set_num_threads(before)


def test_nan_stays_with_its_pixel(everywhere):
    x, weight = channels_last(2, 20, 7, 9), frozen(18, 20)
    x[1, 3, 2, 2] = math.nan
    y = native.conv_forward(x, weight, None, *GEOMETRY)
    assert y[1, :, 2, 2].isnan().all()
    assert int(y.isnan().sum()) == 18


def serves(x, kernel=(1, 1), stride=(1, 1), padding=(0, 0), groups=1, capability="avx512"):
    return pointwise.serves(x, kernel, stride, padding, groups, capability)


def test_the_choice(monkeypatch):
    monkeypatch.setattr(pointwise, "mode", "")
    x = torch.empty(2, 32, 8, 8)
    assert serves(x)
    assert not serves(x.double()) and not serves(x.bfloat16())
    assert not serves(x, kernel=(1, 3)) and not serves(x, stride=(2, 2))
    assert not serves(x, padding=(0, 1)) and not serves(x, groups=2)
    assert not serves(x, capability="baseline")
    assert not serves(torch.empty(2, 2048, 8, 8)), "pixels of a tile would collide in the cache"
    monkeypatch.setattr(pointwise, "mode", "1")
    assert serves(x, capability="baseline") and not serves(x.double())
    monkeypatch.setattr(pointwise, "mode", "0")
    assert not serves(x)


def test_packed_weights_follow_the_weight(everywhere):
    x, weight = channels_last(1, 16, 8, 8), frozen(20, 16)

    def run():
        return native.conv_forward(x, weight, None, *GEOMETRY)

    bnfast.clear_cache()
    first = run()
    assert cache_bytes() == 2 * 16 * 16 * 4
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
        (dict(bias=torch.zeros(5)), "bias is"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_what_does_not_fit_is_refused(change, message):
    arguments = dict(x=torch.zeros(2, 4, 8, 8), bias=None) | change
    weights = pointwise.packed_weight(torch.randn(3, 4, 1, 1))
    with pytest.raises(RuntimeError, match=message):
        torch.ops.bnfast.pointwise_conv(arguments["x"], weights, arguments["bias"], 3)


def test_the_fused_backward_refuses_planes():
    z, vector = torch.randn(2, 4, 8, 8), torch.ones(4)
    weights = pointwise.packed_weight(torch.randn(3, 4, 1, 1))
    with pytest.raises(RuntimeError, match="channels_last is needed"):
        torch.ops.bnfast.pointwise_bwd_reduce_apply_dgrad(
            z, z, vector, vector, None, None, None, None, "relu", 0.0, False, weights, 3
        )


def test_empty_batch(everywhere):
    x = torch.empty(0, 16, 8, 8).contiguous(memory_format=torch.channels_last)
    assert native.conv_forward(x, frozen(20, 16), None, *GEOMETRY).shape == (0, 20, 8, 8)
