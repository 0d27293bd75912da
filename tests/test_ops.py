"""The functional form: registered operators, gradients of units and chains, what is saved, and the cache of weights."""

import gc
import inspect
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from cases import FULL, lay_out
from closeness import assert_bit_equal, assert_close_to_oracle
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import bnfast
from bnfast import dispatch, dot, native, ops, pointwise, reference, weights, winograd

needs_native = pytest.mark.skipif(native.unavailable is not None, reason=str(native.unavailable))
ACTIVATIONS = {
    "identity": lambda t, slope: t,
    "relu": lambda t, slope: F.relu(t),
    "relu6": lambda t, slope: F.relu6(t),
    "leaky_relu": F.leaky_relu,
    "silu": lambda t, slope: F.silu(t),
    "hardswish": lambda t, slope: F.hardswish(t),
}


@dataclass(frozen=True)
class Conv:
    """A convolution on 2 x channels x 5 x 6 (kernel 0: a linear layer, None: no convolution)."""

    channels: int
    out: int
    kernel: int | None = 3
    stride: int = 1
    padding: int = 1
    dilation: int = 1
    groups: int = 1
    bias: bool = False

    def fields(self, dtype: torch.dtype) -> dict:
        """The convolution's fields of a Unit, weights drawn anew."""
        bias = torch.randn(self.out, dtype=dtype) if self.bias else None
        if self.kernel is None:
            return {}
        if self.kernel == 0:
            weight = torch.randn(self.out, self.channels, dtype=dtype)
            return {"weight": weight, "bias": bias}
        shape = (self.out, self.channels // self.groups, self.kernel, self.kernel)
        return {
            "weight": torch.randn(shape, dtype=dtype) / self.kernel,
            "bias": bias,
            "stride": (self.stride,) * 2,
            "padding": (self.padding,) * 2,
            "dilation": (self.dilation,) * 2,
            "groups": self.groups,
        }


NO_CONV = Conv(3, 3, None)
PLAIN = Conv(3, 4)
CONVS = {
    "none": NO_CONV,
    "3x3": PLAIN,
    "3x3_bias": Conv(3, 4, bias=True),
    "3x3_stride_2": Conv(3, 4, stride=2),
    "3x3_no_padding": Conv(3, 4, padding=0),
    "3x3_wide_padding": Conv(3, 4, padding=4),
    "3x3_dilated": Conv(3, 4, padding=2, dilation=2),
    "grouped": Conv(4, 6, groups=2),
    "depthwise": Conv(3, 3, groups=3),
    "depthwise_stride_2": Conv(3, 6, stride=2, groups=3),
    "1x1": Conv(3, 4, 1, padding=0),
    "1x1_stride_2": Conv(3, 4, 1, stride=2, padding=0),
    "1x1_padded": Conv(3, 4, 1, padding=1),
    "linear": Conv(5, 4, 0),
    "linear_bias": Conv(5, 4, 0, bias=True),
}


def input_of(conv: Conv, dtype=torch.float64, layout="contiguous", needs_grad=True) -> Tensor:
    shape = (6, conv.channels) if conv.kernel == 0 else (2, conv.channels, 5, 6)
    return lay_out(torch.randn(shape, dtype=dtype), layout).requires_grad_(needs_grad)


def make_unit(
    conv: Conv, dtype=torch.float64, residual: Tensor | None = None, **fields
) -> ops.Unit:
    """A unit with random weights, affine parameters that need gradients, and running statistics."""
    c = conv.out
    drawn = {
        # Large enough that relu6 and hardswish see both of their kinks.
        "gamma": (4 * torch.randn(c, dtype=dtype)).requires_grad_(),
        "beta": torch.randn(c, dtype=dtype).requires_grad_(),
        "running_mean": 0.1 * torch.randn(c, dtype=dtype),
        "running_var": torch.rand(c, dtype=dtype) + 1,
        "num_batches_tracked": torch.tensor(3),
    }
    return ops.Unit(**(conv.fields(dtype) | drawn | {"residual": residual} | fields))


def residual_for(x: Tensor, unit: ops.Unit) -> Tensor:
    """A random residual of the shape of the unit's output, with gradient."""
    with torch.no_grad():
        shape = plain_conv(x, unit).shape
    return torch.randn(shape, dtype=x.dtype).requires_grad_()


def twin(unit: ops.Unit) -> ops.Unit:
    """A copy whose tensors are copies, with the same requires_grad."""
    return unit._replace(
        **{
            name: value.detach().clone().requires_grad_(value.requires_grad)
            for name, value in unit._asdict().items()
            if isinstance(value, Tensor)
        }
    )


def plain_conv(x: Tensor, u: ops.Unit) -> Tensor:
    if u.weight is None:
        return x
    if u.weight.dim() == 2:
        return F.linear(x, u.weight, u.bias)
    return F.conv2d(x, u.weight, u.bias, u.stride, u.padding, u.dilation, u.groups)


def plain_chain(x: Tensor, units: list[ops.Unit]) -> Tensor:
    """The same chain in PyTorch's own functions; updates the running statistics."""
    for u in units:
        x = plain_conv(x, u)
        if u.normalize:
            momentum = u.momentum
            if u.use_batch_statistics and u.num_batches_tracked is not None:
                u.num_batches_tracked.add_(1)
                if momentum is None:
                    momentum = 1 / u.num_batches_tracked.item()
            x = F.batch_norm(
                x,
                u.running_mean,
                u.running_var,
                u.gamma,
                u.beta,
                u.use_batch_statistics,
                momentum,
                u.eps,
            )
        x = x if u.residual is None else x + u.residual
        x = ACTIVATIONS[u.act](x, u.negative_slope)
    return x


def leaves(x: Tensor, units: list[ops.Unit]) -> dict[str, Tensor]:
    """Everything that needs a gradient, by name."""
    named = {"x": x}
    for i, u in enumerate(units):
        named |= {f"{i}.{n}": getattr(u, n) for n in ("gamma", "beta", "residual")}
    return {n: t for n, t in named.items() if t is not None and t.requires_grad}


def outputs_of(y: Tensor, dy: Tensor, x: Tensor, units: list[ops.Unit]) -> dict[str, Tensor]:
    """y, the gradients, and the running statistics as they are after the step, by name."""
    wanted = leaves(x, units)
    found = {"y": y.detach()}
    grads = torch.autograd.grad(y, list(wanted.values()), dy)
    found |= {f"grad of {n}": g for n, g in zip(wanted, grads, strict=True)}
    for i, u in enumerate(units):
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            if getattr(u, name) is not None:
                found[f"{i}.{name}"] = getattr(u, name).clone()
    return found


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], rtol=1e-9) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        atol = rtol * (1 + value.abs().max().item() if value.numel() else 1)
        torch.testing.assert_close(
            actual[name], value, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


def assert_matches_plain(
    x: Tensor, units: list[ops.Unit], backend: str, layout="contiguous"
) -> None:
    """A step through `backend` gives the outputs, gradients and statistics of the same step in plain PyTorch."""
    copies = [twin(u) for u in units]
    same_x = x.detach().clone().requires_grad_(x.requires_grad)
    expected = plain_chain(same_x, copies)
    dy = lay_out(torch.randn(expected.shape, dtype=expected.dtype), layout)
    expected = outputs_of(expected, dy, same_x, copies)
    y = ops.frozen_conv_bn_act(x, units, backend)
    assert_same(outputs_of(y, dy, x, units), expected)


# ---- registered operators ----------------------------------------------------------------------------------------------


def operator_inputs(name: str):
    """Yields argument tuples for an operator of torch.ops.bnfast, none with a gradient."""
    shapes = [
        (2, 3, 5, 6),
        (3, 17, 2, 3),
        (2, 1, 7, 9),
        (2, 1, 1, 8),
        (4, 5),
        (2, 3, 40),
        (2, 4, 2, 3, 3),
    ]
    layouts = ("contiguous", "channels_last", "slice", "transposed")
    dtypes = itertools.cycle((torch.float32, torch.bfloat16, torch.float64))
    acts = itertools.cycle(reference.ACTS)
    if name == "pointwise_spread":
        yield last(2, 5, 4, 3), (8, 5), (2, 2)
        yield last(2, 3, 3, 7).bfloat16(), (7, 7), (3, 1)
        return
    if name.startswith("blocked_"):
        for kernel, padding in (((7, 7), (3, 3)), ((4, 5), (0, 2))):
            weight = winograd.block_weight(torch.randn(18, 3, *kernel), padding)
            conv = (winograd.transformed_weight(weight, 2, 5), torch.randn(18), 18, kernel, padding)
            stats = (*statistics(18, torch.float32), 0.1, 1e-5)
            yield (last(2, 3, 15, 12), *conv, *(stats if name == "blocked_fwd_reduce" else ()))
        return
    if (
        name.startswith(("winograd_", "pointwise_", "dot_"))
        and name != "pointwise_bwd_reduce_apply_dgrad"
    ):
        yield from convolution_inputs(name, acts)
        return
    if name == "pointwise_bwd_reduce_apply_dgrad":
        for (channels, out), act in zip(((20, 18), (3, 32)), acts, strict=False):
            turned = pointwise.packed_weight(torch.randn(out, channels, 1, 1).transpose(0, 1))
            z, dy = last(2, out, 5, 7), last(2, out, 5, 7)
            vectors = tuple(torch.rand(4, out) + 0.5)  # mean, rstd, gamma, beta
            for want in (False, True):
                yield (dy, z, *vectors, None, None, act, 0.01, want, turned, channels)
        return
    if name in ("bn_fwd_apply_max_pool", "max_pool_backward_bn_bwd_reduce"):
        for window in (((3, 3), (2, 2), (1, 1)), ((2, 3), (1, 3), (0, 1))):
            z, norm, act = last(2, 19, 8, 9), tuple(torch.rand(4, 19) + 0.5), next(acts)
            p, places = reference.bn_fwd_apply_max_pool(z, norm, act, 0.01, *window)
            rest = (z, *norm, act, 0.01, *window)
            yield rest if name.startswith("bn") else (last(*p.shape), places, *rest)
        return
    if name.startswith("max_pool"):
        for window in (((3, 3), (2, 2), (1, 1)), ((2, 3), (1, 3), (0, 1))):
            y = last(2, 19, 8, 9)
            p, places = reference.max_pool(y, *window)
            yield (y, *window) if name == "max_pool" else (p, places, y.shape[2:], *window)
        return
    if name.startswith("grouped_") and name != "grouped_dgrad":
        yield from grouped_inputs(name, acts)
        return
    if name == "grouped_dgrad":
        for kernel, dtype in zip((1, 3, 5), dtypes, strict=False):
            dz = lay_out(torch.randn(2, 5, 4, 3, dtype=dtype), "channels_last")
            taps = torch.randn(kernel, kernel, 1, 5, dtype=reference.accumulator(dtype))
            padding = kernel // 2
            yield (dz, taps, (8, 5), (2, 2), (padding, padding), (1, 1))
        return
    if name.startswith("conv_"):
        for (conv, layout), dtype in zip(
            itertools.product(CONVS.values(), layouts[:2]), dtypes, strict=False
        ):
            if conv.kernel is None:
                continue
            x = input_of(conv, dtype, layout, needs_grad=False)
            f = conv.fields(dtype)
            geometry = (
                f.get("stride", ()),
                f.get("padding", ()),
                f.get("dilation", ()),
                conv.groups,
            )
            if name == "conv_dgrad":
                dz = lay_out(torch.randn_like(plain_conv(x, ops.Unit(**f))), layout)
                yield (dz, f["weight"], x.shape[2:], *geometry)
                continue
            stats = ()
            if name == "conv_fwd_reduce":
                stats = (*statistics(conv.out, dtype), 0.1, 1e-5)
            yield (x, f["weight"], f["bias"], *geometry, *stats)
        return
    for shape, layout in itertools.product(shapes, layouts):
        dtype, act = next(dtypes), next(acts)
        acc, c = reference.accumulator(dtype), shape[1]
        z, dy, residual = (lay_out(torch.randn(shape, dtype=dtype), layout) for _ in range(3))
        mean, dgamma, dbeta = torch.randn(3, c, dtype=acc)
        rstd = torch.rand(c, dtype=acc) + 0.5
        gamma, beta = torch.randn(2, c, dtype=acc)
        momentum = None if act == "relu" else 0.1
        if name == "bn_fwd_reduce":
            yield (z, *statistics(c, dtype), momentum, 1e-5)
            yield (z, None, None, None, 0.1, 1e-5)
            continue
        bits = None
        if act in reference.BIT_ACTS:
            bits = native.bn_fwd_apply(z, mean, rstd, gamma, beta, residual, act, 0.01, True)[1]
        hidden = residual if act in reference.SMOOTH_ACTS else None
        if name == "bn_fwd_apply":
            yield (z, mean, rstd, gamma, beta, residual, act, 0.01, bits is not None)
            yield (z, mean, rstd, None, None, None, act, 0.01, False)
        elif name == "bn_fwd_reduce_apply":
            tail = (momentum, 1e-5, gamma, beta, residual, act, 0.01, bits is not None)
            yield (z, *statistics(c, dtype), *tail)
            yield (z, None, None, None, 0.1, 1e-5, None, None, None, act, 0.01, False)
        elif name == "bn_bwd_reduce":
            yield (dy, z, mean, rstd, gamma, beta, hidden, bits, act, 0.01)
        elif name in ("bn_bwd_reduce_apply", "bn_bwd_reduce_apply_"):
            yield (dy, z, mean, rstd, gamma, beta, hidden, bits, act, 0.01, True)
            yield (dy, z, mean, rstd, None, None, None, None, act, 0.01, False)
        elif name in ("se_fwd_reduce", "se_bwd_sums"):
            if z.dim() == 4 and z.dtype == torch.float32 and not z.is_contiguous():
                given = (z,) if name == "se_fwd_reduce" else (dy, z)
                yield (*given, mean, rstd, gamma, beta, act, 0.01)
        elif name == "se_bwd_reduce":
            if z.dim() == 4:
                yield (dy, z, mean, rstd, gamma, beta, act, 0.01)
                yield (dy, z, None, None, None, None, "identity", 0.0)
        elif name in ("bn_bwd_apply", "bn_bwd_apply_"):
            yield (dy, z, mean, rstd, gamma, beta, hidden, bits, dgamma, dbeta, act, 0.01, True)
            yield (dy, z, mean, rstd, None, None, None, None, None, None, act, 0.01, False)
        else:
            raise AssertionError(f"no inputs are known for the new operator bnfast::{name}")


def last(*size: int) -> Tensor:
    return torch.randn(size).contiguous(memory_format=torch.channels_last)


def convolution_inputs(name: str, acts: Iterator[str]) -> Iterator[tuple]:
    """Of the convolutions of our own, alone and with the phases in front of them and behind them."""
    for (channels, out, padding, stride), act in zip(
        ((20, 18, [1, 1], 1), (3, 32, [0, 2], 1), (20, 18, [1, 1], 2)), acts, strict=False
    ):
        x = last(2, channels, 9, 7)
        if name.startswith("dot_"):
            if channels % 2:
                continue
            x = x.bfloat16()
            weights = dot.packed_weight(torch.randn(out, channels, 3, 3))
            geometry = ([stride, stride], padding, [1, 1])
            sizes = winograd.output_size([9, 7], (stride, stride), padding)
        elif name.startswith("winograd_"):
            weights = winograd.transformed_weight(torch.randn(out, channels, 3, 3), stride)
            geometry = (padding, stride)
            sizes = winograd.output_size([9, 7], (stride, stride), padding)
        else:
            weights = pointwise.packed_weight(torch.randn(out, channels, 1, 1))
            geometry, sizes = (), [9, 7]
        vectors = tuple(torch.rand(4, channels) + 0.5)  # mean, rstd, gamma, beta
        if name.endswith("_conv"):
            yield (x, weights, torch.randn(out), out, *geometry)
            yield (x, weights, None, out, *geometry)
        elif name.endswith("_fwd_apply"):
            norm = torch.rand(4, out) + 0.5  # mean, rstd, gamma, beta
            conv = (weights, torch.randn(out), out, *geometry)
            yield (x, *norm, last(2, out, *sizes).to(x.dtype), act, 0.01, *conv)
            yield (x, *norm[:2], None, None, None, act, 0.01, *conv)
        elif name == "winograd_residual_fwd_reduce":
            rest = (None, out, *geometry, *statistics(out, torch.float32), 0.1, 1e-5)
            yield (x, *vectors, last(2, channels, 9, 7), act, 0.01, act == "relu", weights, *rest)
        elif name.endswith("_fwd_reduce"):
            stats = (*statistics(out, torch.float32), 0.1, 1e-5)
            yield (x, *vectors, act, 0.01, weights, None, out, *geometry, *stats)
            if name == "pointwise_fwd_reduce":
                gate = torch.rand(x.shape[:2])
                yield (x, *vectors, act, 0.01, weights, None, out, *stats, gate)
            yield (
                x,
                None,
                None,
                None,
                None,
                "identity",
                0.0,
                weights,
                None,
                out,
                *geometry,
                *stats,
            )
        else:
            # x is dy, which a convolution makes of a plane of these sizes.
            if geometry:
                sizes = [(n - 1) * stride + 3 - 2 * p for n, p in zip((9, 7), padding, strict=True)]
                geometry = (sizes, *geometry)
            conv = (weights, out, *geometry)
            if name in ("winograd_dgrad", "dot_dgrad"):
                yield (x, *conv)
                continue
            below = (last(2, out, *sizes).to(x.dtype), None, *torch.rand(4, out), act, 0.01)
            beside = (last(2, out, *sizes).to(x.dtype), *torch.rand(2, out))
            above = (
                last(2, channels, 9, 7).to(x.dtype),
                *vectors,
                *torch.rand(2, channels),
                act,
                0.01,
            )
            nothing = (None,) * 7
            yield (x, *above, *conv, last(2, out, *sizes).to(x.dtype), *below, *beside)
            yield (x, *nothing, "identity", 0.0, *conv, None, *below, None, None, None)
            yield (x, *above, *conv, None, *nothing[:6], "identity", 0.0, None, None, None)


def grouped_inputs(name: str, acts: Iterator[str]) -> Iterator[tuple]:
    """Of depthwise convolutions and narrow groups, with the phases in front of them and behind them."""
    for side, stride, width, act in zip((3, 5, 3), (1, 2, 2), (1, 1, 4), acts, strict=False):
        taps, x = torch.randn(side, side, width, 20), last(2, 20, 9, 7)
        vectors, geometry = tuple(torch.rand(4, 20) + 0.5), ([stride] * 2, [side // 2] * 2, [1, 1])
        out = [(n - 1) // stride + 1 for n in (9, 7)]
        if name == "grouped_conv":
            yield (x, taps, torch.randn(20), *geometry)
            if width == 1:
                yield (x.double(), taps.double(), None, *geometry)
        elif name == "grouped_fwd_apply":
            yield (x, *vectors, last(2, 20, *out), act, 0.01, taps, torch.randn(20), *geometry)
        elif name == "grouped_fwd_reduce":
            stats = (*statistics(20, torch.float32), 0.1, 1e-5)
            yield (x, *vectors, act, 0.01, taps, None, *geometry, *stats)
        else:
            size = [(n - 1) * stride + 1 for n in (9, 7)]
            below = (last(2, 20, *size), None, *torch.rand(4, 20), act, 0.01)
            beside = (last(2, 20, *size), *torch.rand(2, 20))
            above = (last(2, 20, 9, 7), *vectors, *torch.rand(2, 20), act, 0.01)
            conv, nothing = (taps, size, *geometry), (None,) * 7
            yield (x, *above, *conv, last(2, 20, *size), *below, *beside)
            yield (x, *above, *conv, None, *below, *(None,) * 3, *torch.rand(2, 2, 20))
            yield (x, *nothing, "identity", 0.0, *conv, None, *below, None, None, None)
            yield (x, *above, *conv, None, *nothing[:6], "identity", 0.0, None, None, None)


def statistics(channels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    acc = reference.accumulator(dtype)
    return torch.zeros(channels, dtype=acc), torch.ones(channels, dtype=acc), torch.tensor(3)


def registered_operators() -> list[str]:
    names = torch._C._dispatch_get_all_op_names()
    return sorted(
        {n.removeprefix("bnfast::").split(".")[0] for n in names if n.startswith("bnfast::")}
    )


@needs_native
@pytest.mark.parametrize("name", registered_operators())
def test_opcheck(name):
    if name.startswith("dot_") and native.cpu_capability() not in ("avx512_bf16", "amx"):
        pytest.skip("the processor does not multiply bfloat16, or is not to")
    operator = getattr(torch.ops.bnfast, name).default
    cheap = ("test_schema", "test_autograd_registration", "test_faketensor")
    for i, args in enumerate(operator_inputs(name)):
        # Compiling for dynamic shapes takes longer than all the others together.
        if FULL or i % 9 == 0:
            torch.library.opcheck(operator, args)
        else:
            torch.library.opcheck(operator, args, test_utils=cheap)


@needs_native
def test_operators_are_the_phases():
    phases = {n for n, f in vars(reference).items() if inspect.isfunction(f) and hasattr(native, n)}
    assert {
        "conv_fwd_reduce",
        "bn_fwd_reduce",
        "bn_fwd_apply",
        "bn_bwd_reduce",
        "bn_bwd_apply",
        "conv_dgrad",
    } <= phases
    # A few small PyTorch operations, and operators one after the other or by the kind of convolution.
    no_operators = {
        "bn_fwd_apply_both",
        "bn_fwd_apply_conv_fwd_reduce",
        "bn_fwd_apply_residual_conv_fwd_reduce",
        "bn_bwd_apply_conv_dgrad_reduce",
        "bn_fwd_apply_se_conv_fwd_reduce",
        "se_fwd",
        "se_gate",
        "se_bwd_apply",
        "se_bwd_gate",
        "se_bwd_norm",
        "conv_fwd_apply",
        "conv_fwd_reduce_apply",
        "bn_bwd_reduce_apply_dgrad",
        "max_pool_values",
    }
    assert phases - {
        "accumulator",
        "joins_pool",
        "joins_residual",
        "joins_squeeze",
        "joins_units",
        "fuses_chain",
        "fuses_gram",
    } - no_operators <= set(registered_operators())


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "slice", "transposed"])
@pytest.mark.parametrize(
    "shape", [(2, 3, 5, 6), (2, 3, 50, 61), (4, 5), (2, 3, 40), (2, 4, 2, 3, 3)], ids=str
)
def test_strides_of_fake_and_real_agree(shape, layout, dtype):
    """opcheck compares the strides of dense outputs only loosely where a size is 1; the bits must have the right length."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    z = lay_out(torch.randn(shape, dtype=dtype), layout)
    vector = torch.ones(shape[1])
    args = (z, vector, vector, None, None, torch.randn_like(z), "relu", 0.0, True)
    real = torch.ops.bnfast.bn_fwd_apply(*args)
    with FakeTensorMode() as mode:
        fake = torch.ops.bnfast.bn_fwd_apply(
            *(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args)
        )
    for r, f in zip(real, fake, strict=True):
        assert (r.shape, r.stride(), r.dtype) == (f.shape, f.stride(), f.dtype)


# ---- gradients ---------------------------------------------------------------------------------------------------------


def assert_gradcheck(x: Tensor, unit: ops.Unit, backend: str) -> None:
    inputs = leaves(x, [unit])

    def run(*values):
        given = dict(zip(inputs, values, strict=True))
        fields = {n.removeprefix("0."): v for n, v in given.items() if n != "x"}
        return ops.frozen_conv_bn_act(given.get("x", x), [unit._replace(**fields)], backend)

    # The fast form compares random projections of the Jacobians.
    fast = not FULL and sum(t.numel() for t in inputs.values()) > 100
    assert torch.autograd.gradcheck(run, tuple(inputs.values()), fast_mode=fast)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("has_residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("act", reference.ACTS)
def test_gradcheck_of_each_activation(backend, act, has_residual, training):
    if act != "silu":
        backend.takes_long()
    for conv, layout in ((NO_CONV, "channels_last"), (Conv(2, 3), "contiguous")):
        x = torch.randn(2, conv.channels, 3, 4, dtype=torch.float64)
        x = lay_out(x, layout).requires_grad_()
        unit = make_unit(conv, act=act, negative_slope=0.2, use_batch_statistics=training)
        unit = unit._replace(residual=residual_for(x, unit) if has_residual else None)
        assert_gradcheck(x, unit, backend.name)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("conv", CONVS.values(), ids=CONVS)
def test_gradcheck_of_each_convolution(backend, conv, training):
    x = input_of(conv)
    unit = make_unit(conv, act="silu", use_batch_statistics=training)
    assert_gradcheck(x, unit, backend.name)


@pytest.mark.parametrize("conv", CONVS.values(), ids=CONVS)
def test_gradcheck_without_batch_norm(backend, conv):
    if conv.kernel is None:
        pytest.skip("nothing to compute")
    assert_gradcheck(
        input_of(conv), ops.Unit(**conv.fields(torch.float64), normalize=False), backend.name
    )


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "slice"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("conv", CONVS.values(), ids=CONVS)
def test_unit_equals_plain_composition(backend, conv, training, layout):
    x = input_of(conv, layout=layout)
    unit = make_unit(conv, act="relu", use_batch_statistics=training)
    assert_matches_plain(x, [unit._replace(residual=residual_for(x, unit))], backend.name)


@pytest.mark.parametrize("act", reference.ACTS)
def test_chains_equal_plain_composition(backend, act):
    x = input_of(Conv(3, 8))
    first = make_unit(Conv(3, 8, bias=True), act="relu")
    second = make_unit(Conv(8, 8, groups=4), act=act, momentum=0.3)
    third = make_unit(Conv(8, 4, 1, stride=2, padding=0), act=act, momentum=None)
    assert_matches_plain(x, [first, second._replace(residual=residual_for(x, first))], backend.name)
    with torch.no_grad():
        shape = plain_chain(x, [twin(u) for u in (first, second, third)]).shape
    second = second._replace(residual=torch.randn(2, 8, 5, 6, dtype=x.dtype).requires_grad_())
    third = third._replace(residual=torch.randn(shape, dtype=x.dtype).requires_grad_())
    assert_matches_plain(x, [first, second, third], backend.name)


def test_chain_of_mixed_statistics(backend):
    """Evaluation, a bare convolution, a BatchNorm alone without affine or buffers, a frozen BatchNorm."""
    x = input_of(PLAIN)
    units = [
        make_unit(PLAIN, act="hardswish", use_batch_statistics=False),
        ops.Unit(**Conv(4, 6).fields(torch.float64), normalize=False),
        ops.Unit(act="leaky_relu", negative_slope=0.3),
        make_unit(Conv(6, 4, 1, padding=0), act="relu6", use_batch_statistics=False),
        make_unit(Conv(4, 4), act="silu"),
    ]
    frozen = units[3]
    units[3] = frozen._replace(gamma=frozen.gamma.detach(), beta=frozen.beta.detach())
    assert_matches_plain(x, units, backend.name)


def test_gradient_of_a_residual_inside_a_chain_stays_as_it_was(backend):
    """dz is written over gradients that the chain made, except one that is handed out as a residual's gradient."""
    generator = torch.Generator().manual_seed(11)
    x, residual, dy = (
        torch.randn(3, 8, 6, 5, generator=generator, dtype=torch.float64) for _ in range(3)
    )
    weights = torch.randn(2, 8, 8, 3, 3, generator=generator, dtype=torch.float64)
    gammas = torch.rand(2, 8, generator=generator, dtype=torch.float64) + 0.5

    def run(chain):
        leaves = [t.clone().requires_grad_() for t in (x, residual, *gammas)]
        units = [
            ops.Unit(w, None, (1, 1), (1, 1), (1, 1), gamma=g, residual=r)
            for w, g, r in zip(weights, leaves[2:], (leaves[1], None), strict=True)
        ]
        return torch.autograd.grad(chain(leaves[0], units), leaves, dy)

    def plain(value, units):
        for u in units:
            z = F.conv2d(value, u.weight, padding=1)
            value = F.batch_norm(z, None, None, u.gamma, None, True)
            value = value if u.residual is None else value + u.residual
        return value

    ours = run(lambda value, units: ops.frozen_conv_bn_act(value, units, backend.name))
    for actual, expected in zip(ours, run(plain), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_chain_whose_residual_is_its_own_input(backend):
    """The same tensor as x and as residual gets the sum of both gradients."""
    x = input_of(Conv(4, 4))
    units = [make_unit(Conv(4, 4), act="relu"), make_unit(Conv(4, 4), act="relu")]
    copies = [twin(u) for u in units]
    same_x = x.detach().clone().requires_grad_()
    copies[1] = copies[1]._replace(residual=same_x)
    y = plain_chain(same_x, copies)
    dy = torch.randn_like(y)
    copies[1] = copies[1]._replace(residual=None)
    expected = outputs_of(y, dy, same_x, copies)
    y = ops.frozen_conv_bn_act(x, [units[0], units[1]._replace(residual=x)], backend.name)
    assert_same(outputs_of(y, dy, x, units), expected)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("act", ["identity", "relu", "silu"])
def test_gradients_asked_for_one_by_one(backend, act, training):
    x = input_of(PLAIN)
    units = [make_unit(u, act=act, use_batch_statistics=training) for u in (PLAIN, Conv(4, 4))]
    units = [
        u._replace(residual=torch.randn(2, 4, 5, 6, dtype=x.dtype).requires_grad_()) for u in units
    ]
    dy = torch.randn(2, 4, 5, 6, dtype=x.dtype)
    everything = outputs_of(ops.frozen_conv_bn_act(x, units, backend.name), dy, x, units)
    names = list(leaves(x, units))
    for subset in [*itertools.combinations(names, 1), *itertools.combinations(names, 2)]:
        some_x = x.detach().clone().requires_grad_("x" in subset)
        some = [
            u._replace(
                **{
                    n: getattr(u, n).detach().clone().requires_grad_(f"{i}.{n}" in subset)
                    for n in ("gamma", "beta", "residual")
                }
            )
            for i, u in enumerate(units)
        ]
        y = ops.frozen_conv_bn_act(some_x, some, backend.name)
        y.backward(dy)
        wanted = leaves(some_x, some)
        assert set(wanted) == set(subset)
        for name, leaf in wanted.items():
            torch.testing.assert_close(
                leaf.grad, everything[f"grad of {name}"], rtol=1e-12, atol=1e-12
            )
    nothing = [
        u._replace(gamma=u.gamma.detach(), beta=u.beta.detach(), residual=None) for u in units
    ]
    assert not ops.frozen_conv_bn_act(x.detach(), nothing, backend.name).requires_grad
    with torch.no_grad():
        assert not ops.frozen_conv_bn_act(x, units, backend.name).requires_grad


@pytest.mark.parametrize(
    "layout", ["expanded", "slice", "channels_last", "transposed", "channel_slice"]
)
@pytest.mark.parametrize("act", reference.ACTS)
def test_upstream_gradient_of_any_layout(backend, act, layout):
    x = input_of(PLAIN)
    unit = make_unit(PLAIN, act=act)
    assert_matches_plain(x, [unit._replace(residual=residual_for(x, unit))], backend.name, layout)


def test_two_forwards_before_backward(backend):
    """Each call keeps its own state: the backward passes run in the other order and see their own forward's."""
    unit = make_unit(PLAIN, act="relu")
    first, second = input_of(PLAIN), input_of(PLAIN)
    dy = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    alone = [
        outputs_of(ops.frozen_conv_bn_act(x, [twin(unit)], backend.name), dy, x, [])["grad of x"]
        for x in (first, second)
    ]
    ys = [ops.frozen_conv_bn_act(x, [unit], backend.name) for x in (first, second)]
    for x, y, expected in reversed(list(zip((first, second), ys, alone, strict=True))):
        assert_bit_equal(torch.autograd.grad(y, x, dy)[0], expected, "dx")


def test_running_statistics_change_before_backward(backend):
    """Evaluation mode: the backward pass uses the statistics that the forward pass used."""
    x = input_of(PLAIN)
    unit = make_unit(PLAIN, act="relu", use_batch_statistics=False)
    dy = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    expected = outputs_of(ops.frozen_conv_bn_act(x, [unit], backend.name), dy, x, [unit])
    y = ops.frozen_conv_bn_act(x, [unit], backend.name)
    unit.running_mean.add_(1)
    unit.running_var.mul_(3)
    for name, grad in outputs_of(y, dy, x, [unit]).items():
        if name.startswith("grad"):
            assert_bit_equal(grad, expected[name], name)


@pytest.mark.parametrize("name", ["gamma", "weight"])
def test_a_saved_parameter_that_changes_before_backward_is_refused(backend, name):
    x = input_of(PLAIN)
    unit = make_unit(PLAIN, act="relu")
    y = ops.frozen_conv_bn_act(x, [unit], backend.name)
    with torch.no_grad():
        getattr(unit, name).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(torch.randn_like(y))


def test_retain_graph_gives_the_same_twice(backend):
    x = input_of(PLAIN)
    unit = make_unit(PLAIN, act="relu6")
    y = ops.frozen_conv_bn_act(x, [unit], backend.name)
    dy = torch.randn_like(y)
    first = torch.autograd.grad(y, [x, unit.gamma], dy, retain_graph=True)
    second = torch.autograd.grad(y, [x, unit.gamma], dy)
    for a, b in zip(first, second, strict=True):
        assert_bit_equal(a, b, "gradient")


# ---- dtypes and devices ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_autocast(backend, training):
    """bf16 out of the convolution, float32 parameters and statistics, as close to float64 as PyTorch's own autocast."""
    x = torch.randn(8, 8, 6, 7)
    unit = make_unit(Conv(8, 12), torch.float32, act="silu", use_batch_statistics=training)
    unit = unit._replace(weight=unit.weight / 3)
    dy = torch.randn(8, 12, 6, 7).bfloat16()

    def step(run, dtype, autocast, layout="contiguous"):
        own = twin(unit)
        own = own._replace(
            **{n: v.detach().to(dtype).requires_grad_(v.requires_grad) for n, v in own._asdict().items()
               if isinstance(v, Tensor) and v.is_floating_point()}
        )  # fmt: skip
        own_x = lay_out(x, layout).to(dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = run(own_x, [own])
        return outputs_of(y, dy.to(y.dtype), own_x, [own])

    oracle = step(plain_chain, torch.float64, False)
    stocks = [
        step(plain_chain, torch.float32, True, layout) for layout in ("contiguous", "channels_last")
    ]
    ours = step(lambda x, u: ops.frozen_conv_bn_act(x, u, backend.name), torch.float32, True)
    assert ours["y"].dtype == torch.bfloat16 == stocks[0]["y"].dtype
    for name in oracle.keys() - {"0.num_batches_tracked"}:
        assert name == "y" or ours[name].dtype == torch.float32, name
        terms = 1 if name == "y" else dy.numel() // 12
        assert_close_to_oracle(
            ours[name], oracle[name], [s[name] for s in stocks], name, terms=terms
        )


def test_autocast_leaves_float64_and_a_leading_batch_norm_alone(backend):
    """PyTorch's autocast casts neither float64 nor the input of batch_norm."""
    norm = make_unit(Conv(3, 3, None), torch.float32)
    conv = make_unit(PLAIN, torch.float32)
    x = torch.randn(2, 3, 5, 6).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        alone = ops.frozen_conv_bn_act(x, [norm], backend.name)
        both = ops.frozen_conv_bn_act(x, [norm, conv], backend.name)
        double = ops.frozen_conv_bn_act(input_of(PLAIN), [make_unit(PLAIN)], backend.name)
    assert (alone.dtype, both.dtype, double.dtype) == (torch.float32, torch.bfloat16, torch.float64)
    both.backward(torch.randn_like(both))
    assert x.grad.dtype == torch.float32 and bool(x.grad.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
@pytest.mark.parametrize("has_residual", [False, True], ids=["", "residual"])
def test_16_bit_input_with_float32_parameters(backend, dtype, has_residual):
    x = torch.randn(4, 5, 6, 7).to(dtype)
    residual = torch.randn(4, 5, 6, 7).to(dtype).requires_grad_() if has_residual else None
    unit = make_unit(Conv(5, 5, None), torch.float32, residual, act="silu")
    dy = torch.randn(4, 5, 6, 7).to(dtype)

    def step(run, own_dtype=None, layout="contiguous"):
        own = twin(unit)
        if own_dtype is not None:
            own = own._replace(
                **{n: v.detach().to(own_dtype).requires_grad_(v.requires_grad) for n, v in own._asdict().items()
                   if isinstance(v, Tensor) and v.is_floating_point()}
            )  # fmt: skip
        own_x = lay_out(x, layout).to(own_dtype or dtype).requires_grad_()
        y = run(own_x, [own])
        return outputs_of(y, dy.to(y.dtype), own_x, [own])

    oracle = step(plain_chain, torch.float64)
    stocks = [step(plain_chain, None, layout) for layout in ("contiguous", "channels_last")]
    ours = step(lambda x, u: ops.frozen_conv_bn_act(x, u, backend.name))
    for name in oracle.keys() - {"0.num_batches_tracked"}:
        assert ours[name].dtype == stocks[0][name].dtype, name
        terms = 1 if name == "y" else 4 * 6 * 7
        assert_close_to_oracle(
            ours[name], oracle[name], [s[name] for s in stocks], name, terms=terms
        )


@pytest.mark.parametrize("shape", [(0, 3, 5, 6), (0, 3, 8, 1)], ids=str)
@pytest.mark.parametrize("conv", [NO_CONV, PLAIN], ids=["bn", "conv_bn"])
def test_empty_batch(backend, conv, shape):
    x = torch.randn(shape, dtype=torch.float64).requires_grad_()
    unit = make_unit(conv, act="relu")
    before = twin(unit)
    y = ops.frozen_conv_bn_act(x, [unit], backend.name)
    assert y.shape == (0, conv.out, *shape[2:])
    y.backward(torch.randn_like(y))
    assert x.grad.shape == x.shape
    assert_bit_equal(unit.gamma.grad, torch.zeros_like(unit.gamma), "dgamma")
    assert_bit_equal(unit.beta.grad, torch.zeros_like(unit.beta), "dbeta")
    assert_bit_equal(unit.running_mean, before.running_mean, "running_mean")
    assert_bit_equal(unit.running_var, before.running_var, "running_var")
    assert unit.num_batches_tracked.item() == 4


def test_memory_format_follows_the_input(backend):
    for conv in (NO_CONV, PLAIN, Conv(3, 4, stride=2), Conv(3, 3, groups=3), Conv(3, 4, 1, 2, 0)):
        for layout in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(2, 3, 6, 7).contiguous(memory_format=layout).requires_grad_()
            unit = make_unit(conv, torch.float32, act="relu")
            y = ops.frozen_conv_bn_act(x, [unit], backend.name)
            assert y.is_contiguous(memory_format=layout), (conv, layout)
            y.backward(torch.randn_like(y))
            assert x.grad.is_contiguous(memory_format=layout), (conv, layout)


@needs_native
@pytest.mark.parametrize(
    "conv", [NO_CONV, Conv(3, 4), Conv(3, 3, groups=3)], ids=["bn", "conv", "depthwise"]
)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_repeats_and_thread_counts_are_bit_equal(conv, layout):
    x = lay_out(torch.randn(6, 3, 31, 33), layout).requires_grad_()
    unit = make_unit(conv, torch.float32, act="relu")
    unit = unit._replace(residual=residual_for(x, unit))
    dy = torch.randn(6, conv.out, 31, 33)
    results = []
    for threads in (1, 2, 1, 2):
        torch.set_num_threads(threads)
        own = twin(unit)
        results.append(outputs_of(ops.frozen_conv_bn_act(x, [own], "cpu"), dy, x, [own]))
    for other in results[1:]:
        for name, value in results[0].items():
            assert_bit_equal(other[name], value, name)


# ---- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_trainable_convolution_is_refused(backend, name):
    x = input_of(PLAIN)
    unit = make_unit(Conv(3, 4, bias=True))
    before = unit.running_mean.clone()
    getattr(unit, name).requires_grad_()
    with pytest.raises(
        ValueError, match=rf"^{name} needs a gradient.*{name}\.requires_grad_\(False\)"
    ):
        ops.frozen_conv_bn_act(x, [make_unit(PLAIN), unit], backend.name)
    assert_bit_equal(unit.running_mean, before, "running_mean")
    with torch.no_grad():
        ops.frozen_conv_bn_act(x, [unit], backend.name)


def test_unknown_activation_is_refused(backend):
    with pytest.raises(ValueError, match="act is 'gelu'; allowed are 'identity', 'relu'"):
        ops.frozen_conv_bn_act(input_of(NO_CONV), [make_unit(NO_CONV, act="gelu")], backend.name)


def test_units_without_work_are_refused(backend):
    with pytest.raises(ValueError, match="nothing to compute"):
        ops.frozen_conv_bn_act(input_of(NO_CONV), [ops.Unit(normalize=False)], backend.name)


@pytest.mark.parametrize(
    "lost",
    [{"act": "relu"}, {"residual": torch.zeros(2, 4, 5, 6, dtype=torch.float64)}],
    ids=["act", "residual"],
)
def test_activation_or_residual_without_batch_norm_is_refused(backend, lost):
    unit = ops.Unit(**PLAIN.fields(torch.float64), normalize=False, **lost)
    with pytest.raises(ValueError, match=next(iter(lost))):
        ops.frozen_conv_bn_act(input_of(PLAIN), [unit], backend.name)


def test_evaluation_without_running_statistics_is_refused(backend):
    unit = make_unit(NO_CONV, use_batch_statistics=False, running_mean=None, running_var=None)
    with pytest.raises(ValueError, match="running_mean"):
        ops.frozen_conv_bn_act(input_of(NO_CONV), [unit], backend.name)


def test_integer_input_is_refused(backend):
    with pytest.raises(ValueError, match=r"x is of dtype torch\.int64"):
        ops.frozen_conv_bn_act(
            torch.zeros(2, 3, 4, 4, dtype=torch.int64), [ops.Unit()], backend.name
        )


def test_one_value_per_channel_is_refused(backend):
    """With PyTorch's own words, before anything is changed."""
    for conv, x in (
        (NO_CONV, torch.randn(1, 3, 1, 1)),
        (Conv(3, 4, padding=0), torch.randn(1, 3, 3, 3)),
        (Conv(5, 4, 0), torch.randn(1, 5)),
    ):
        unit = make_unit(conv, torch.float32)
        with pytest.raises(ValueError) as theirs:
            plain_chain(x, [twin(unit)])
        with pytest.raises(ValueError, match="Expected more than 1 value per channel") as ours:
            ops.frozen_conv_bn_act(x, [unit], backend.name)
        sizes = str(list(plain_conv(x, unit).shape))
        assert sizes in str(ours.value) and sizes in str(theirs.value)
        assert unit.num_batches_tracked.item() == 3
        # Evaluation mode has its statistics already.
        ops.frozen_conv_bn_act(x, [unit._replace(use_batch_statistics=False)], backend.name)


def test_second_derivative_is_refused(backend):
    x = input_of(PLAIN)
    y = ops.frozen_conv_bn_act(x, [make_unit(PLAIN, act="silu")], backend.name)
    dy = torch.randn_like(y).requires_grad_()
    (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        dx.backward(torch.randn_like(dx))


def test_forward_mode_is_refused(backend):
    x = input_of(PLAIN, needs_grad=False)
    with (
        forward_ad.dual_level(),
        pytest.raises(RuntimeError, match="jvp"),
    ):
        ops.frozen_conv_bn_act(
            forward_ad.make_dual(x, torch.randn_like(x)), [make_unit(PLAIN)], backend.name
        )


# ---- what is saved, and what is computed -------------------------------------------------------------------------------


def saved_by(run) -> tuple[list[Tensor], Tensor]:
    """All tensors that the graph of run() keeps, and its output, which keeps them alive."""
    found = []

    def pack(tensor):
        found.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = run()
    return found, y


def storages(tensors) -> dict[int, int]:
    """Bytes by address of the distinct storages."""
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def record_convolutions(module, monkeypatch) -> tuple[list[Tensor], list[Tensor]]:
    """Two lists that will hold the inputs and the outputs of all convolutions of a backend's forward phases."""
    inputs, outputs = [], []
    names = ["conv_forward", "conv_fwd_reduce", "conv_fwd_reduce_apply"]
    if hasattr(module, "bn_fwd_apply_conv_fwd_reduce"):
        names.append("bn_fwd_apply_conv_fwd_reduce")
    for name in names:
        original = getattr(module, name)

        def recorded(x, *args, original=original):
            out = original(x, *args)
            if not isinstance(args[0], reference.Norm):  # else x is a z, and the input never exists
                inputs.append(x)
            outputs.append(out if isinstance(out, Tensor) else out[0])
            return out

        monkeypatch.setattr(module, name, recorded)
    return inputs, outputs


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("act", reference.ACTS)
def test_saves_conv_outputs_and_bits_alone(backend, monkeypatch, act, training):
    conv_inputs, conv_outputs = record_convolutions(backend.module, monkeypatch)
    shape = (2, 4, 5, 6)
    x = torch.randn(shape).requires_grad_()
    residual = torch.randn(shape).requires_grad_()
    units = [
        make_unit(Conv(4, 4), torch.float32, act=act, use_batch_statistics=training)
        for _ in range(3)
    ]
    units[1] = units[1]._replace(residual=residual)
    saved, y = saved_by(lambda: ops.frozen_conv_bn_act(x, units, backend.name))
    # reference's conv_fwd_reduce calls its own conv_forward: the outputs are those of three convolutions either way.
    assert len(storages(conv_outputs)) == 3

    kept = storages(saved)
    assert not kept.keys() & storages(conv_inputs).keys()
    assert y.untyped_storage().data_ptr() not in kept
    z = storages(conv_outputs)
    assert z.keys() <= kept.keys()
    parameters = storages(t for u in units for t in (u.weight, u.gamma, u.beta))
    large = {
        at: size for at, size in kept.items() if size >= 30 and at not in z and at not in parameters
    }
    elements = y.numel()
    if act in reference.SMOOTH_ACTS:
        assert large.keys() == storages([residual]).keys()
    elif act == "identity":
        assert not large
    else:
        # One bit per element; planes of the compiled backends may end with part of a word, and on CUDA begin with part of a byte.
        (bits,) = large.values()
        partial = y.shape[0] * y.shape[1] if backend.name == "cuda" else 0
        assert elements / 8 <= bits <= elements / 8 * 1.3 + partial


def test_nothing_is_saved_without_need(backend):
    units = [
        make_unit(PLAIN, torch.float32, act="relu"),
        make_unit(Conv(4, 4), torch.float32, act="relu"),
    ]
    x = torch.randn(2, 3, 5, 6)
    with torch.no_grad():
        assert (
            saved_by(lambda: ops.frozen_conv_bn_act(x.requires_grad_(), units, backend.name))[0]
            == []
        )
    x = x.detach()
    units = [u._replace(gamma=u.gamma.detach(), beta=u.beta.detach()) for u in units]
    assert saved_by(lambda: ops.frozen_conv_bn_act(x, units, backend.name))[0] == []


class Produced(TorchDispatchMode):
    """Records every tensor with a storage of its own that an operator returns."""

    def __init__(self, known: list[Tensor]):
        super().__init__()
        self.known = storages(known)
        self.kept: list[Tensor] = []
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.names.add(func.name())
        self.kept += [
            t
            for t in tree_leaves(out)
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in self.known
        ]
        return out

    def of_shape(self, shapes: set[torch.Size]) -> list[Tensor]:
        return [t for t in self.kept if t.shape in shapes]


def test_backward_computes_no_weight_gradient(backend):
    """No tensor of a weight's shape appears in the backward pass, as in PyTorch's own with frozen weights; with weights that
    train, the same net in PyTorch has one for each, so the detector works. PyTorch's saves conv inputs, the chain does not."""
    convs = [Conv(3, 6), Conv(6, 6), Conv(6, 7, 1, stride=2, padding=0), Conv(7, 14, groups=7)]
    units = [make_unit(c, torch.float32, act="relu") for c in convs]
    frozen = [u.weight for u in units]
    shapes = {w.shape for w in frozen}
    x = torch.randn(5, 3, 9, 10).requires_grad_()

    def backward(run, known):
        saved, y = saved_by(run)
        dy = torch.randn_like(y)
        with Produced(known) as mode:
            y.backward(dy)
        return mode, saved

    ours = lambda: ops.frozen_conv_bn_act(x, units, backend.name)  # noqa: E731
    ours().backward(torch.randn(5, 14, 5, 5))  # fills the cache of transformed weights
    mode, saved = backward(ours, frozen)
    assert mode.kept and not mode.of_shape(shapes)
    assert x.untyped_storage().data_ptr() not in storages(saved)

    mode, saved = backward(lambda: plain_chain(x, units), frozen)
    assert mode.kept and not mode.of_shape(shapes)
    assert x.untyped_storage().data_ptr() in storages(saved)

    training = [u._replace(weight=u.weight.clone().requires_grad_()) for u in units]
    mode, _ = backward(lambda: plain_chain(x, training), [u.weight for u in training])
    assert {t.shape for t in mode.of_shape(shapes)} == shapes


def test_converted_net_computes_no_weight_gradient_and_saves_no_conv_input(backend, monkeypatch):
    plain = bnfast.freeze(bnfast.models.create("resnet8"))
    model = bnfast.convert(plain)
    x = torch.randn(5, 3, 10, 11).requires_grad_()
    with bnfast.use_backend(backend.name):
        y = model(x)
        y.backward(torch.randn_like(y))  # fills the cache of transformed weights
        inputs, outputs = record_convolutions(backend.module, monkeypatch)
        saved, y = saved_by(lambda: model(x))
    convs = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(storages(outputs)) == len(convs)
    assert not storages(saved).keys() & storages(inputs).keys()
    assert storages(outputs).keys() <= storages(saved).keys()
    with Produced([*model.parameters()]) as mode:
        y.backward(torch.randn_like(y))
    assert mode.kept and not mode.of_shape({c.weight.shape for c in convs})
    # In PyTorch the input of a convolution is the output that the ReLU before it keeps: one more tensor per unit.
    plain_saved, _ = saved_by(lambda: plain(x))
    own = storages([*model.parameters(), *plain.parameters()]).keys()
    ours, theirs = (
        sum(size for at, size in storages(t).items() if at not in own) for t in (saved, plain_saved)
    )
    assert ours < 0.6 * theirs, f"{ours / theirs:.2f}"


@pytest.mark.parametrize(
    "conv",
    [c for c in CONVS.values() if c.kernel is not None],
    ids=[n for n in CONVS if n != "none"],
)
def test_users_tensors_are_never_written(backend, conv):
    x = input_of(conv)
    unit = make_unit(conv, act="relu")
    unit = unit._replace(residual=residual_for(x, unit))
    watched = {"x": x} | {
        n: getattr(unit, n) for n in ("weight", "bias", "gamma", "beta", "residual")
    }
    watched = {n: t for n, t in watched.items() if t is not None}
    before = {n: (t.detach().clone(), t._version, t.stride()) for n, t in watched.items()}
    y = ops.frozen_conv_bn_act(x, [unit], backend.name)
    dy = torch.randn_like(y)
    same_dy = dy.clone()
    torch.autograd.grad(y, list(leaves(x, [unit]).values()), dy)
    assert_bit_equal(dy, same_dy, "dy")
    for name, tensor in watched.items():
        value, version, stride = before[name]
        assert_bit_equal(tensor.detach(), value, name)
        assert (tensor._version, tensor.stride()) == (version, stride), name


# ---- the cache of transformed weights ----------------------------------------------------------------------------------


@pytest.fixture
def cache():
    """An empty cache, and empty again afterwards."""
    weights.clear_cache()
    yield weights
    weights.clear_cache()


def doubled(w: Tensor) -> Tensor:
    return 2 * w


@needs_native
def test_transform_is_computed_once(cache):
    calls = []

    def make(w):
        calls.append(w)
        return 2 * w

    w = torch.randn(4, 3, 3, 3)
    first = cache.transformed(w, "doubled", make)
    assert cache.transformed(w, "doubled", make) is first and len(calls) == 1
    assert_bit_equal(first, 2 * w, "doubled")
    cache.transformed(w, "other", make)
    assert len(calls) == 2
    assert cache.cache_bytes() == 2 * w.nbytes


def by_data(w):
    w.data.mul_(2)


def by_numpy(w):
    w.detach().numpy()[1, 2, 0, 1] += 1


def by_element_exchange(w):
    w.data[[0, 1]] = w.data[[1, 0]].clone()


def by_no_grad_copy(w):
    with torch.no_grad():
        w.copy_(torch.randn_like(w))


def by_new_data(w):
    w.data = torch.randn_like(w)


def by_dtype(w):
    w.data = w.data.double()


def by_layout(w):
    w.data = w.data.contiguous(memory_format=torch.channels_last)


def by_nan(w):
    w.data[0, 0, 0, 0] = torch.nan


@needs_native
@pytest.mark.parametrize(
    "change",
    [
        by_data,
        by_numpy,
        by_element_exchange,
        by_no_grad_copy,
        by_new_data,
        by_dtype,
        by_layout,
        by_nan,
    ],
    ids=lambda f: f.__name__,
)
def test_changed_weight_is_transformed_again(cache, change):
    w = torch.nn.Parameter(torch.randn(4, 3, 3, 3), requires_grad=False)
    before = cache.transformed(w, "doubled", doubled)
    change(w)
    after = cache.transformed(w, "doubled", doubled)
    assert after is not before
    assert_bit_equal(after, 2 * w.detach(), change.__name__)
    assert after.stride() == (2 * w).stride()
    assert cache.transformed(w, "doubled", doubled) is after


@needs_native
def test_large_weight_that_changes_everywhere(cache):
    """Above 1,024 elements the checksum samples: a change of all elements shows, whatever the layout."""
    for layout in (torch.contiguous_format, torch.channels_last):
        w = torch.randn(64, 48, 3, 3).contiguous(memory_format=layout)
        cache.transformed(w, "doubled", doubled)
        w.data.mul_(-1)
        assert_bit_equal(cache.transformed(w, "doubled", doubled), 2 * w, "doubled")


@needs_native
@pytest.mark.parametrize("shape", [(300, 5, 3, 3), (1500, 1, 3, 3), (2048, 3, 1, 1)], ids=str)
def test_a_filter_that_changes_is_seen(shape):
    """Each holds a sample, whatever the number of filters up to 2,048."""
    w = torch.randn(shape)
    before = native._C.weight_checksum(w)
    for k in range(0, shape[0], 7):
        w[k] += 1
        after = native._C.weight_checksum(w)
        assert after != before, k
        before = after


@needs_native
def test_cache_after_load_state_dict_and_to(cache):
    conv = torch.nn.Conv2d(3, 4, 3, padding=1, bias=False).requires_grad_(False)

    def assert_right(dtype):
        x = torch.randn(2, 3, 5, 6, dtype=dtype).requires_grad_()
        unit = ops.Unit(conv.weight, None, (1, 1), (1, 1), (1, 1), normalize=False)
        y = ops.frozen_conv_bn_act(x, [unit], "cpu")
        dy = torch.randn_like(y)
        (expected,) = torch.autograd.grad(conv(x), x, dy)
        (dx,) = torch.autograd.grad(y, x, dy)
        torch.testing.assert_close(dx, expected)

    assert_right(torch.float32)
    conv.load_state_dict({"weight": torch.randn(4, 3, 3, 3)})
    assert_right(torch.float32)
    conv.double()
    assert_right(torch.float64)
    conv.to(memory_format=torch.channels_last)
    assert_right(torch.float64)
    conv.weight.data.neg_()
    assert_right(torch.float64)
    conv.load_state_dict({"weight": torch.randn(4, 3, 3, 3).double()}, assign=True)
    assert_right(torch.float64)


@needs_native
def test_inference_mode_weights(cache):
    """Inference tensors have no version; the checksum alone sees the change."""
    with torch.inference_mode():
        w = torch.randn(4, 3, 3, 3)
        first = cache.transformed(w, "doubled", doubled)
        assert cache.transformed(w, "doubled", doubled) is first
        w.mul_(3)
        assert_bit_equal(cache.transformed(w, "doubled", doubled), 2 * w, "doubled")
        x = torch.randn(2, 3, 5, 6)
        unit = ops.Unit(
            w, None, (1, 1), (1, 1), (1, 1), running_mean=torch.zeros(4), running_var=torch.ones(4)
        )
        ours = ops.frozen_conv_bn_act(x, [unit], "cpu")
        torch.testing.assert_close(ours, plain_chain(x, [unit]))


@needs_native
def test_transform_made_in_inference_mode_serves_training(cache):
    """A weight first used under inference_mode: its cached forms must not poison a later backward pass."""
    unit = make_unit(Conv(3, 4), torch.float32)
    x = torch.randn(2, 3, 5, 6).bfloat16()
    with torch.inference_mode():
        ops.frozen_conv_bn_act(x, [unit], "cpu")  # casts the weight
    y = ops.frozen_conv_bn_act(x.requires_grad_(), [unit], "cpu")
    y.backward(torch.randn_like(y))
    assert bool(x.grad.isfinite().all())


@needs_native
def test_freed_weight_and_reused_address(cache):
    """The entry dies with its weight; a new weight in the same memory, even with the same id, has its own."""
    w = torch.randn(4, 3, 3, 3)
    cache.transformed(w, "doubled", doubled)
    assert cache.cache_bytes() == w.nbytes
    del w
    gc.collect()
    assert cache.cache_bytes() == 0
    ids, places = set(), set()
    for _ in range(50):
        w = torch.randn(4, 3, 3, 3)
        ids.add(id(w))
        places.add(w.data_ptr())
        assert_bit_equal(cache.transformed(w, "doubled", doubled), 2 * w, "doubled")
        del w
    reused = min(len(ids), len(places)) < 50
    assert reused, "neither an id nor memory was ever given again: the test tested nothing"


@needs_native
def test_clear_cache_finds_what_the_checksum_cannot_see(cache):
    w = torch.randn(64, 128, 3, 3)
    old = cache.transformed(w, "doubled", doubled)
    # Every 18th of 73,728 elements is sampled: element 1 is not.
    w.data.view(-1)[1] += 1
    assert cache.transformed(w, "doubled", doubled) is old
    bnfast.clear_cache()
    assert cache.cache_bytes() == 0
    assert_bit_equal(cache.transformed(w, "doubled", doubled), 2 * w, "doubled")


def test_backend_is_named_once_per_call(backend):
    """The forward's backend serves the backward, whatever is in force by then."""
    other = next(
        (n for n, ok in dispatch.backends().items() if ok is True and n != backend.name), None
    )
    if other is None:
        pytest.skip("only one backend is available")
    x = input_of(PLAIN)
    unit = make_unit(PLAIN, act="relu", residual=torch.randn(2, 4, 5, 6, dtype=torch.float64))
    with dispatch.use_backend(backend.name):
        y = ops.frozen_conv_bn_act(x, [unit])
    dy = torch.randn_like(y)
    with dispatch.use_backend(other):
        (dx,) = torch.autograd.grad(y, x, dy)
    copy = twin(unit)
    (expected,) = torch.autograd.grad(plain_chain(x, [copy]), x, dy)
    torch.testing.assert_close(dx, expected)
