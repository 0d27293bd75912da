"""The CPU's convolutions with the phases in front of them and behind them, piece by piece: what is computed of each element is what
the phases one after the other compute, bit for bit; sums are held to float64."""

import math
from typing import NamedTuple

import pytest
import torch
from closeness import assert_bit_equal, assert_close_to_oracle
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bnfast import dot, grouped, native, ops, pointwise, reference, winograd
from bnfast.reference import Above, Below, Beside, Norm

pytestmark = [
    pytest.mark.skipif(native.unavailable is not None, reason=str(native.unavailable)),
    pytest.mark.usefixtures("poisoned_memory", "everywhere"),
]

ONES = [1, 1]
STATS = (None, None, None, 0.1, 1e-5)


@pytest.fixture
def everywhere(monkeypatch):
    """Our convolutions wherever they can be used, not only where they pay."""
    for family in (winograd, pointwise, dot):
        monkeypatch.setattr(family, "mode", "1")
    monkeypatch.setattr(grouped, "_WIDTHS_BF16", grouped._WIDTHS)


def last(*size: int, mean: float = 0.0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(size) + mean).to(dtype).contiguous(memory_format=torch.channels_last)


def norm(channels: int) -> Norm:
    """Vectors of a unit whose z is off centre by 2."""
    return Norm(
        torch.randn(channels) + 2,
        torch.rand(channels) + 0.5,
        torch.randn(channels),
        torch.randn(channels),
    )


class Kernel(NamedTuple):
    side: int
    stride: int = 1
    group: int = 0  # channels of a group, 0 for a single one

    def weight(self, out_channels: int, channels: int) -> torch.Tensor:
        inputs = self.group or channels
        weight = torch.randn(out_channels, inputs, self.side, self.side)
        weight /= math.sqrt(inputs) * self.side
        return weight.contiguous(memory_format=torch.channels_last)

    def geometry(self, channels: int, pad: int) -> tuple:
        pad = 0 if self.side == 1 else pad
        return [self.stride] * 2, [pad] * 2, ONES, channels // self.group if self.group else 1

    def output_size(self, size: int, pad: int) -> int:
        pad = 0 if self.side == 1 else pad
        return (size + 2 * pad - self.side) // self.stride + 1

    def is_ours(self, dtype: torch.dtype, channels: int, out_channels: int) -> bool:
        """Whether the convolution exists and is joined: in bfloat16 as a product of matrices, where the processor has that."""
        if self.group and channels % self.group:
            return False
        if self.group > 1 and native.cpu_capability() == "baseline":
            return False
        if self.group or dtype == torch.float32 or (winograd.mode == "1" and self.side > 1):
            return True
        is_even = channels % 2 == 0 == out_channels % 2
        return native.cpu_capability() in ("avx512_bf16", "amx") and is_even


SIZES = dict(
    batch=st.integers(1, 3),
    channels=st.sampled_from([2, 7, 16, 24, 32, 48]),
    out_channels=st.sampled_from([2, 5, 16, 24, 32, 64]),
    height=st.integers(1, 15),
    width=st.sampled_from([2, 3, 4, 7, 8, 13, 16, 29]),
    kernel=st.sampled_from(
        [
            Kernel(1), Kernel(3), Kernel(3, 2), Kernel(3, 1, 1), Kernel(3, 2, 1), Kernel(5, 2, 1),
            Kernel(3, 1, 8), Kernel(3, 2, 8), Kernel(3, 1, 4), Kernel(5, 2, 2), Kernel(3, 1, 16),
        ]
    ),
    pad=st.integers(0, 2),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, "dot"]),
    seed=st.integers(0, 2**31),
)  # fmt: skip
MANY = settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much],
)
LARGE = [
    ((2, 24, 41, 43), 144, Kernel(1)),
    ((2, 32, 40, 36), 48, Kernel(3)),
    ((9, 64, 8, 8), 64, Kernel(3)),
    ((1, 16, 9, 400), 16, Kernel(3)),
    ((2, 200, 7, 6), 300, Kernel(3)),
    ((3, 144, 30, 31), 24, Kernel(1)),
    ((2, 32, 40, 36), 48, Kernel(3, 2)),
    ((3, 40, 15, 150), 16, Kernel(3, 2)),
    ((2, 200, 14, 12), 300, Kernel(3, 2)),
    ((2, 72, 40, 36), 72, Kernel(3, 1, 1)),
    ((35, 80, 9, 12), 80, Kernel(5, 1, 1)),
    ((3, 32, 41, 37), 32, Kernel(3, 2, 1)),
    ((2, 104, 40, 37), 104, Kernel(3, 1, 8)),
    ((3, 48, 41, 36), 48, Kernel(3, 2, 16)),
]


def dtype_of(kind: torch.dtype | str) -> torch.dtype:
    """ "dot": bfloat16 without Winograd's form, which comes first."""
    winograd.mode = "0" if kind == "dot" else "1"
    return torch.bfloat16 if kind == "dot" else kind


def check_moments(z: torch.Tensor, mean: torch.Tensor, rstd: torch.Tensor) -> None:
    wide = z.double()
    var, centre = torch.var_mean(wide, (0, 2, 3), correction=0)
    assert_close_to_oracle(
        mean, centre, [], "mean", scale=wide.abs().amax((0, 2, 3)), terms=z.numel()
    )
    exact = (var + 1e-5).rsqrt()
    torch.testing.assert_close(rstd.double(), exact, rtol=2e-5, atol=0)


def check_forward(
    size, out_channels, kernel, pad, act, has_norm, has_bias, dtype=torch.float32
) -> None:
    z = last(*size, mean=2, dtype=dtype)
    own = norm(size[1]) if has_norm else None
    weight = kernel.weight(out_channels, size[1])
    bias = torch.randn(out_channels) if has_bias else None
    conv = (weight, bias, *kernel.geometry(size[1], pad))
    found, mean, rstd = native.bn_fwd_apply_conv_fwd_reduce(
        z, own, act if has_norm else "identity", 0.1, *conv, *STATS
    )
    x = native.bn_fwd_apply(z, *own, None, act, 0.1, False)[0] if has_norm else z
    assert_bit_equal(found, native.conv_forward(x, *conv), "z")
    check_moments(found, mean, rstd)


@MANY
@given(act=st.sampled_from(reference.ACTS), has_norm=st.booleans(), has_bias=st.booleans(), **SIZES)
def test_forward_on_random_shapes(
    batch, channels, out_channels, height, width, kernel, pad, dtype, seed, act, has_norm, has_bias
):
    out_channels = channels if kernel.group else out_channels
    dtype = dtype_of(dtype)
    if min(kernel.output_size(s, pad) for s in (height, width)) < 1 or not kernel.is_ours(
        dtype, channels, out_channels
    ):
        return
    torch.manual_seed(seed)
    size = (batch, channels, height, width)
    check_forward(size, out_channels, kernel, pad, act, has_norm, has_bias, dtype)


def check_kept(size, out_channels, kernel, pad, act, has_bits, dtype=torch.float32) -> None:
    """The unit before has a residual, and its output is read by others too."""
    z, residual = last(*size, mean=2, dtype=dtype), last(*size, dtype=dtype)
    own = norm(size[1])
    conv = (
        kernel.weight(out_channels, size[1]), torch.randn(out_channels), *kernel.geometry(size[1], pad)
    )  # fmt: skip
    found, mean, rstd, y, bits = native.bn_fwd_apply_residual_conv_fwd_reduce(
        z, own, residual, act, 0.1, has_bits, *conv, *STATS
    )
    expected, expected_bits = native.bn_fwd_apply(z, *own, residual, act, 0.1, has_bits)
    assert_bit_equal(y, expected.contiguous(memory_format=torch.channels_last), "y")
    assert_bit_equal(bits, expected_bits, "bits")
    assert_bit_equal(found, native.conv_forward(y, *conv), "z")
    check_moments(found, mean, rstd)


@MANY
@given(act=st.sampled_from(reference.ACTS), has_bits=st.booleans(), **SIZES)
def test_kept_input_on_random_shapes(
    batch, channels, out_channels, height, width, kernel, pad, dtype, seed, act, has_bits
):
    if (
        kernel.side != 3
        or kernel.group
        or dtype == "dot"
        or (has_bits and act not in reference.BIT_ACTS)
    ):
        return
    if min(kernel.output_size(s, pad) for s in (height, width)) < 1:
        return
    torch.manual_seed(seed)
    size = (batch, channels, height, width)
    check_kept(size, out_channels, kernel, pad, act, has_bits, dtype_of(dtype))


def check_backward(
    size, out_channels, kernel, pad, act, below_act, has_above, has_add, kind, beside,
    dtype=torch.float32,
):  # fmt: skip
    """size: of the input of the convolution forward. kind: of the unit below: "none", "from z" or "bits"."""
    batch, channels, height, width = size
    weight = kernel.weight(out_channels, channels)
    conv = (weight, [height, width], *kernel.geometry(channels, pad))
    out = (batch, out_channels, *(kernel.output_size(s, pad) for s in (height, width)))
    dy = last(*out, dtype=dtype)
    if dy.is_contiguous():
        return  # an NCHW tensor as well: alone its data gradient is PyTorch's
    above = None
    dz = dy
    if has_above:
        own = norm(out_channels)
        sums = (torch.randn(out_channels) * 3, torch.randn(out_channels) * 3)
        above = Above(last(*out, mean=2, dtype=dtype), *own, *sums)
        dz, _ = native.bn_bwd_apply(dy, above.z, *own, None, None, *sums, act, 0.1, False)
    add = last(*size, dtype=dtype) if has_add else None
    z = last(*size, mean=2, dtype=dtype)
    own = norm(channels)
    below = bits = by = None
    if kind == "bits":
        if below_act not in reference.BIT_ACTS:
            below_act = "relu"
        residual = last(*size, dtype=dtype)
        _, bits = native.bn_fwd_apply(z, *own, residual, below_act, 0.1, True)
    if kind != "none":
        below = Below(z, bits, *own)
        if beside and (bits is not None or below_act == "identity"):
            z_beside = last(*size, mean=-1, dtype=dtype)
            by = Beside(z_beside, torch.randn(channels) - 1, torch.rand(channels) + 0.5)
    dx, found, found_beside = native.bn_bwd_apply_conv_dgrad_reduce(
        dy, above, act, 0.1, None, "identity", 0.0, *conv, add, below, below_act, 0.1, by
    )
    expected = native.conv_dgrad(dz, *conv)
    if add is not None:
        expected = expected + add
    gives_db = bits is not None or (below is not None and below_act in reference.SMOOTH_ACTS)
    if gives_db:
        _, expected = native.bn_bwd_apply(
            expected, z, *own, None, bits, None, None, below_act, 0.1, True
        )
    assert_bit_equal(dx, expected.contiguous(memory_format=torch.channels_last), "dx")
    assert (found is None) == (below is None) and (found_beside is None) == (by is None)
    act = "identity" if gives_db else below_act
    for sums, unit in ((found, below and (z, *own)), (found_beside, by and (*by, None, None))):
        if sums is not None:
            check_sums(dx, sums, unit, act)


def check_sums(dx, sums, unit, act) -> None:
    """dgamma and dbeta against those of the phase alone in float64; db is taken in float32, whose mask it is."""
    z, mean, rstd, gamma, beta = unit
    db = dx
    if act != "identity":
        vectors = (mean, rstd, gamma, beta, None, None, None, None)
        _, db = native.bn_bwd_apply(dx, z, *vectors, act, 0.1, True)
    wide = db.double()
    shape = (1, -1, 1, 1)
    hat = (z.double() - mean.double().view(shape)) * rstd.double().view(shape)
    for name, value, terms in (("dgamma", sums[0], wide * hat), ("dbeta", sums[1], wide)):
        oracle = terms.sum((0, 2, 3))
        scale = terms.abs().sum((0, 2, 3)) + 1e-30
        if z.dtype == torch.bfloat16:  # in which the phase alone writes db
            assert ((value.double() - oracle).abs() <= scale / 256).all(), name
            continue
        assert_close_to_oracle(value, oracle, [], name, scale=scale, terms=dx.numel())


@MANY
@given(
    act=st.sampled_from(reference.ACTS),
    below_act=st.sampled_from(reference.ACTS),
    has_above=st.booleans(),
    has_add=st.booleans(),
    kind=st.sampled_from(["none", "from z", "bits"]),
    beside=st.booleans(),
    **SIZES,
)
def test_backward_on_random_shapes(
    batch, channels, out_channels, height, width, kernel, pad, dtype, seed, act, below_act, has_above,
    has_add, kind, beside,
):  # fmt: skip
    out_channels = channels if kernel.group else out_channels
    dtype = dtype_of(dtype)
    if min(kernel.output_size(s, pad) for s in (height, width)) < 1 or not kernel.is_ours(
        dtype, channels, out_channels
    ):
        return
    torch.manual_seed(seed)
    check_backward(
        (batch, channels, height, width), out_channels, kernel, pad, act, below_act, has_above,
        has_add, kind, beside, dtype,
    )  # fmt: skip


@pytest.mark.parametrize("size, out_channels, kernel", LARGE, ids=str)
@pytest.mark.parametrize("threads", [1, 3])
def test_several_units_of_work(size, out_channels, kernel, threads):
    if not kernel.is_ours(torch.float32, size[1], out_channels):
        pytest.skip("PyTorch's with vectors of 128 bits")
    torch.set_num_threads(threads)
    check_forward(size, out_channels, kernel, 1, "relu", True, False)
    for kind in (torch.bfloat16, "dot"):
        dtype = dtype_of(kind)
        if kernel.is_ours(dtype, size[1], out_channels):
            args = (size, out_channels, kernel, 1)
            check_forward(*args, "silu", True, True, dtype)
            check_backward(*args, "relu", "relu6", True, True, "bits", True, dtype)
    dtype_of(torch.float32)
    check_backward(
        size, out_channels, kernel, 1, "silu", "relu", True, True, "bits", size[1] % 2 == 0
    )
    check_backward(size, out_channels, kernel, 1, "relu", "hardswish", True, False, "from z", False)
    if kernel.side == 3 and not kernel.group:
        for pad in range(4):
            check_kept(size, out_channels, kernel, pad, "relu", True)


@pytest.mark.parametrize("kind", [torch.float32, "dot"], ids=str)
@pytest.mark.parametrize("size, out_channels, kernel", LARGE, ids=str)
def test_bits_are_the_same_for_any_number_of_threads(size, out_channels, kernel, kind):
    dtype = dtype_of(kind)
    if not kernel.is_ours(dtype, size[1], out_channels):
        pytest.skip("PyTorch's on this processor")
    z, own = last(*size, dtype=dtype), norm(size[1])
    weight = kernel.weight(out_channels, size[1])
    conv = kernel.geometry(size[1], 1)
    dy = last(size[0], out_channels, *(kernel.output_size(s, 1) for s in size[2:]), dtype=dtype)
    above = Above(
        last(*dy.shape, dtype=dtype),
        *norm(out_channels),
        torch.randn(out_channels),
        torch.randn(out_channels),
    )
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        forward = native.bn_fwd_apply_conv_fwd_reduce(
            z, own, "relu", 0.0, weight, None, *conv, *STATS
        )
        dx, sums, _ = native.bn_bwd_apply_conv_dgrad_reduce(
            dy, above, "relu", 0.0, None, "identity", 0.0, weight, list(size[2:]), *conv, None,
            Below(z, None, *own), "relu", 0.0, None,
        )  # fmt: skip
        kept = ()
        if kernel.side == 3 and not kernel.group and kind == torch.float32:
            kept = native.bn_fwd_apply_residual_conv_fwd_reduce(
                z, own, z, "relu", 0.0, True, weight, None, *conv, *STATS
            )
        results.append((*forward, dx, *sums, *kept))
    for result in results[1:]:
        for value, expected in zip(result, results[0], strict=True):
            assert_bit_equal(value, expected, "any number of threads")


def test_running_statistics():
    x, weight = last(2, 16, 8, 8, mean=3), Kernel(3).weight(16, 16)
    running = [torch.zeros(16), torch.ones(16), torch.tensor(0)]
    z, *_ = native.bn_fwd_apply_conv_fwd_reduce(
        x, None, "identity", 0.0, weight, None, *Kernel(3).geometry(16, 1), *running, 0.3, 1e-5
    )
    var, mean = torch.var_mean(z.double(), (0, 2, 3))
    torch.testing.assert_close(running[0].double(), 0.3 * mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(running[1].double(), 0.7 + 0.3 * var, rtol=1e-5, atol=1e-6)
    assert running[2] == 1


def test_a_chain_takes_them(monkeypatch):
    """The basic block's chain: both ways, what the unit-by-unit form computes; and it is the joined form that ran."""
    torch.manual_seed(0)
    units = [
        ops.Unit(
            Kernel(3).weight(16, 16), None, (s, s), (1, 1), (1, 1), gamma=torch.rand(16) + 0.5,
            beta=torch.randn(16), running_mean=torch.zeros(16), running_var=torch.ones(16), act="relu",
            residual_source=r,
        )
        for s, r in ((1, None), (1, -1), (1, None), (1, 1), (2, None), (1, None))
    ]  # fmt: skip
    for unit in units:
        unit.gamma.requires_grad_()
        unit.beta.requires_grad_()
    x, dy = last(4, 16, 12, 12, mean=1), last(4, 16, 6, 6)
    calls = []
    joined = native._conv_fwd_reduce_joined
    kept = native.bn_fwd_apply_residual_conv_fwd_reduce
    monkeypatch.setattr(
        native,
        "_conv_fwd_reduce_joined",
        lambda *args: calls.append("made" if args[0] else "read") or joined(*args),
    )
    monkeypatch.setattr(
        native,
        "bn_fwd_apply_residual_conv_fwd_reduce",
        lambda *args: calls.append("kept") or kept(*args),
    )
    results = []
    for chains in (True, False):
        monkeypatch.setattr(native, "_chains", chains)
        given = x.clone(memory_format=torch.preserve_format).requires_grad_()
        for unit in units:
            unit.gamma.grad = unit.beta.grad = None
        y = ops.frozen_conv_bn_act(given, units, "cpu")
        y.backward(dy)
        results.append(
            [y.detach(), given.grad, *(t.grad for u in units for t in (u.gamma, u.beta))]
        )
    assert calls == ["read", "made", "kept", "made", "kept", "made"] + 6 * ["read"]
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max())
