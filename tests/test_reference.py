"""The reference phases against nn.BatchNorm and PyTorch's activations under autograd, in float64."""

import itertools

import pytest
import torch
from cases import Case, Inputs, make_inputs, run_phases, stock_activation
from closeness import accumulator, assert_bit_equal
from torch import nn

from bnfast import reference

CLOSE = {"rtol": 1e-9, "atol": 1e-10}
NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


def run_module(case: Case, inputs: Inputs) -> tuple[dict[str, torch.Tensor], nn.Module]:
    """The outputs of nn.BatchNorm + residual + activation under autograd, and the module after one step."""
    bn = NORMS[len(case.shape)](
        case.shape[1], eps=case.eps, momentum=case.momentum, affine=case.affine is True
    ).double()
    bn.running_mean.copy_(inputs.running_mean)
    bn.running_var.copy_(inputs.running_var)
    bn.num_batches_tracked.copy_(inputs.num_batches_tracked)
    leaves = {"dz": inputs.z.clone().requires_grad_()}
    if case.affine is True:
        bn.weight.data.copy_(inputs.gamma)
        bn.bias.data.copy_(inputs.beta)
        leaves |= {"dgamma": bn.weight, "dbeta": bn.bias}
    out = bn.train(case.training)(leaves["dz"])
    if case.residual:
        leaves["dresidual"] = inputs.residual.clone().requires_grad_()
        out = out + leaves["dresidual"]
    y = stock_activation(out, case.act, case.slope)
    gradients = torch.autograd.grad(y, list(leaves.values()), inputs.dy)
    return {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}, bn


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("act", reference.ACTS)
def test_step_equals_batchnorm_module(act, residual, training):
    """Anchors f7, f8, f9, f12, f14: outputs, gradients and running statistics, gamma partly negative and zero."""
    shapes = ((5, 7, 6, 3), (4, 3), (3, 5, 9), (2, 3, 4, 3, 5))
    options = itertools.cycle(itertools.product((0.1, None, 0.0), (True, False)))
    for shape in shapes:
        momentum, affine = next(options)
        case = Case(
            shape,
            torch.float64,
            "channels_last",
            "mixed",
            act,
            residual,
            affine,
            training,
            momentum=momentum,
        )
        inputs = make_inputs(case)
        expected, bn = run_module(case, inputs)
        actual = run_phases(reference, case, inputs)
        for name, tensor in expected.items():
            torch.testing.assert_close(
                actual[name], tensor, **CLOSE, msg=lambda m, n=name: f"{n}: {m}"
            )
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            torch.testing.assert_close(getattr(inputs, name), getattr(bn, name), **CLOSE)


@pytest.mark.parametrize("momentum", [0.1, None, 0.0, 1.0])
def test_running_statistics_over_steps(momentum):
    """Anchor f8: three steps; momentum=None is the cumulative average, counted after the increment."""
    bn = nn.BatchNorm2d(5, momentum=momentum).double()
    mean, var = torch.zeros(5, dtype=torch.float64), torch.ones(5, dtype=torch.float64)
    tracked = torch.tensor(0)
    for step in range(3):
        z = 3 * step + torch.randn(4, 5, 3, 3, dtype=torch.float64)
        bn(z)
        reference.bn_fwd_reduce(z, mean, var, tracked, momentum, 1e-5)
    torch.testing.assert_close(mean, bn.running_mean, **CLOSE)
    torch.testing.assert_close(var, bn.running_var, **CLOSE)
    assert tracked == bn.num_batches_tracked == 3


@pytest.mark.parametrize("slope", [0.01, 0.3, 0.0])
@pytest.mark.parametrize("act", reference.ACTS)
def test_activation_slope_is_the_derivative(act, slope):
    """Equation (7) against central differences of equation (6), away from the kinks."""
    step = 1e-6
    z = torch.linspace(-7, 9, 401, dtype=torch.float64).view(-1, 1)
    kinks = torch.tensor([-3.0, 0.0, 3.0, 6.0], dtype=torch.float64)
    z = z[((z - kinks).abs() > 10 * step).all(1)]
    mean, rstd = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)

    def value(x):
        return reference.bn_fwd_apply(x, mean, rstd, None, None, None, act, slope, False)[0]

    numeric = (value(z + step) - value(z - step)) / (2 * step)
    dy = torch.randn_like(z)
    dz, _ = reference.bn_bwd_apply(
        dy, z, mean, rstd, None, None, None, None, None, None, act, slope, False
    )
    torch.testing.assert_close(dz, dy * numeric, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("act", reference.ACTS)
def test_activation_and_slope_equal_pytorch_at_special_values(act):
    """Anchor f15: NaN, infinities, signed zeros and the kinks themselves, as PyTorch's own functions do it."""
    inf = torch.inf
    values = [-inf, -7, -3, -1, -5e-324, -0.0, 0.0, 5e-324, 1, 3, 6, 7, inf, torch.nan]
    z = torch.tensor(values, dtype=torch.float64).view(-1, 1).requires_grad_()
    dy = torch.randn_like(z)
    y = stock_activation(z, act, 0.01)
    (expected,) = torch.autograd.grad(y, z, dy)
    mean, rstd = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    actual, _ = reference.bn_fwd_apply(z.detach(), mean, rstd, None, None, None, act, 0.01, False)
    # z - 0 turns -0.0 into 0.0 nowhere: IEEE keeps the sign of x - 0.
    assert_bit_equal(actual, y.detach(), f"{act} forward")
    dz, _ = reference.bn_bwd_apply(
        dy, z.detach(), mean, rstd, None, None, None, None, None, None, act, 0.01, False
    )
    torch.testing.assert_close(dz, expected, rtol=1e-12, atol=0, equal_nan=True)


@pytest.mark.parametrize("act", reference.BIT_ACTS)
@pytest.mark.parametrize("shape", [(3, 5, 7, 3), (1, 1, 1, 1), (2, 8), (0, 3, 2, 2)])
def test_bits_carry_what_the_residual_hides(act, shape):
    """Backward from the bits equals backward from the pre-activation, bit for bit, also for sizes not divisible by 8."""
    case = Case(shape, torch.float32, "channels_last", "normal", act, residual=True)
    t = make_inputs(case)
    mean, _, rstd = reference.bn_fwd_reduce(t.z, None, None, None, 0.1, case.eps)
    _, bits = reference.bn_fwd_apply(t.z, mean, rstd, t.gamma, t.beta, t.residual, act, 0.01, True)
    assert bits.dtype == torch.uint8
    common = (t.dy, t.z, mean, rstd, t.gamma, t.beta)
    from_pre, from_bits = (t.residual, None), (None, bits)
    sums = reference.bn_bwd_reduce(*common, *from_pre, act, 0.01)
    again = reference.bn_bwd_reduce(*common, *from_bits, act, 0.01)
    # The bits have no strides, so the order of summation may differ; the summands may not.
    for name, a, b in zip(("dgamma", "dbeta"), sums, again, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    for given in (sums, (None, None)):
        expected = reference.bn_bwd_apply(*common, *from_pre, *given, act, 0.01, True)
        actual = reference.bn_bwd_apply(*common, *from_bits, *given, act, 0.01, True)
        for a, b in zip(actual, expected, strict=True):
            assert_bit_equal(a, b, f"{act} {shape}")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_and_shapes_of_outputs(dtype):
    """Anchor f5: tensors in z's dtype, everything per channel in float32 (float64 for float64)."""
    case = Case((3, 5, 4, 2), dtype, residual=True, affine="same")
    out = run_phases(reference, case, make_inputs(case))
    for name, tensor in out.items():
        whole = name in ("y", "dz", "dresidual")
        assert tensor.dtype == (dtype if whole else accumulator(dtype)), name
        assert tensor.shape == ((3, 5, 4, 2) if whole else (5,)), name


def test_gradient_of_a_sum_says_nothing_and_a_random_one_does():
    """The sum over BatchNorm's output does not depend on its input: why no test here uses an upstream gradient of ones."""
    case = Case((8, 6, 5, 5), torch.float64, data="normal", act="identity")
    inputs = make_inputs(case)
    x = inputs.z.clone().requires_grad_()
    y = nn.functional.batch_norm(x, None, None, inputs.gamma, inputs.beta, training=True)
    (of_sum,) = torch.autograd.grad(y, x, torch.ones_like(y), retain_graph=True)
    (of_random,) = torch.autograd.grad(y, x, inputs.dy)
    live = inputs.gamma != 0
    assert of_sum.abs().max() < 1e-12
    assert of_random[:, live].abs().amax((0, 2, 3)).min() > 0.1
    inputs.dy.fill_(1.0)
    assert run_phases(reference, case, inputs)["dz"].abs().max() < 1e-12


def test_rstd_of_zero_variance():
    """Anchor f11: eps = 0 and variance 0 give 0, not infinity; eps > 0 gives 1 / sqrt(eps)."""
    zero = torch.zeros(3, dtype=torch.float64)
    assert torch.equal(reference.rstd_of(zero, 0.0), zero)
    torch.testing.assert_close(reference.rstd_of(zero, 1e-4), zero + 100.0)


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize(
    "kernel, stride, padding",
    [
        ((2, 2), (2, 2), (0, 0)),
        ((3, 3), (2, 2), (1, 1)),
        ((1, 4), (3, 1), (0, 2)),
        ((16, 16), (5, 7), (8, 3)),
        ((5, 3), (1, 2), (2, 1)),
    ],
    ids=str,
)
def test_max_pool_by_places(kernel, stride, padding, memory_format):
    """PyTorch's own pooling and its gradient, with many equal values, a NaN, and places of one byte."""
    y = torch.randint(-3, 4, (2, 5, 19, 17)).double().contiguous(memory_format=memory_format)
    y[1, 2, 7, 8] = float("nan")
    y.requires_grad_()
    expected = torch.nn.functional.max_pool2d(y, kernel, stride, padding)
    dp = torch.randn_like(expected)
    expected.backward(dp)
    pooled, places = reference.max_pool(y.detach(), kernel, stride, padding)
    assert torch.equal(pooled.nan_to_num(9), expected.nan_to_num(9))
    assert places.dtype == torch.uint8 and places.stride() == pooled.stride()
    dy = reference.max_pool_backward(dp, places, y.detach(), kernel, stride, padding)
    assert torch.equal(dy, y.grad)
