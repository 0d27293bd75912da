"""The one tolerance rule of the tests: an error is judged by what PyTorch itself gets wrong on the same input.

For an output with the float64 oracle o, a magnitude s of the quantities that were added up to reach it, and M terms in its
longest sum, element by element:

    |actual - o|  <=  2 e s  +  eps_out |o| / 2  +  eps_acc (8 + sqrt(M) / 4) s  +  tiny  +  slack
    e = max over the stock paths and all elements of |stock - o| / s

eps_out belongs to the dtype of the output, eps_acc to the accumulator behind it (float32 for 16-bit outputs), tiny is where
the output dtype starts to underflow. With an empty stock list the rule is pure rounding analysis. An element that is finite
in the oracle has to be finite, and every comparison is written so that a NaN fails it.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

STOCK_FACTOR = 2.0
ROUNDINGS = 8.0


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which statistics, sums and pre-activations of `dtype` tensors are computed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def assert_close_to_oracle(
    actual: Tensor,
    oracle64: Tensor,
    stock_list: Sequence[Tensor],
    what: str,
    *,
    scale: Tensor | float | None = None,
    terms: int = 1,
    slack: Tensor | float = 0.0,
) -> None:
    """Raises AssertionError unless `actual` obeys the rule above.

    actual, oracle64 (float64) and each tensor of stock_list have the same shape. scale, s above, broadcasts to that shape;
    the default is the largest |oracle|. terms is M. slack is an absolute term for conditioning that s cannot express.
    """
    assert oracle64.dtype == torch.float64, f"{what}: the oracle is {oracle64.dtype}, not float64"
    assert actual.shape == oracle64.shape, (
        f"{what}: shape {tuple(actual.shape)}, the oracle has {tuple(oracle64.shape)}"
    )
    if actual.numel() == 0:
        return
    got, oracle = _float64(actual), _float64(oracle64)
    rounded = oracle.to(actual.dtype).double()
    finite = rounded.isfinite()
    if scale is None:
        scale = oracle[finite].abs().max() if finite.any() else 0.0
    scale = torch.as_tensor(scale, dtype=torch.float64).cpu().expand_as(oracle)
    slack = torch.as_tensor(slack, dtype=torch.float64).cpu()

    stock_error = max((_relative_error(s, oracle, scale) for s in stock_list), default=0.0)
    out, acc = torch.finfo(actual.dtype), torch.finfo(accumulator(actual.dtype))
    allowed = (
        (STOCK_FACTOR * stock_error + acc.eps * (ROUNDINGS + math.sqrt(terms) / 4)) * scale
        + 0.5 * out.eps * oracle.abs()
        + max(out.smallest_normal * out.eps, acc.smallest_normal)
        + slack
    )
    error = (got - oracle).abs()
    same_special = (got == rounded) | (got.isnan() & rounded.isnan())
    good = torch.where(finite, error <= allowed, same_special)
    if bool(good.all()):
        return
    raise AssertionError(
        _message(what, got, oracle, error, allowed, good, stock_error, actual.dtype)
    )


def assert_bit_equal(actual: Tensor, expected: Tensor, what: str) -> None:
    """Raises AssertionError unless both have the same dtype, shape and bits; NaN equals NaN, 0.0 is not -0.0."""
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype}, expected {expected.dtype}"
    assert actual.shape == expected.shape, f"{what}: {actual.shape}, expected {expected.shape}"
    same = actual == expected
    if actual.is_floating_point():
        same = (same & (actual.signbit() == expected.signbit())) | (
            actual.isnan() & expected.isnan()
        )
    if not bool(same.all()):
        at = tuple((~same).nonzero()[0].tolist())
        raise AssertionError(
            f"{what}: {int((~same).sum())} of {same.numel()} elements differ, the first at {at}: "
            f"{actual[at].item()!r}, expected {expected[at].item()!r}"
        )


def assert_bits_of_any_number_of_threads(threads: int, run: Callable[[], Sequence[Tensor]]) -> None:
    """What run() returns with so many threads is what it returns with those that are set now, bit for bit."""
    expected = run()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = run()
    finally:
        torch.set_num_threads(before)
    for i, (actual, one) in enumerate(zip(found, expected, strict=True)):
        assert_bit_equal(actual, one, f"result {i} with {threads} threads")


def _float64(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().double()


def _relative_error(stock: Tensor, oracle: Tensor, scale: Tensor) -> float:
    """Largest |stock - oracle| / scale; a stock path that overflows must not make everything else legal."""
    stock = _float64(stock)
    usable = stock.isfinite() & oracle.isfinite() & (scale > 0)
    ratio = (stock - oracle).abs()[usable] / scale[usable]
    return ratio.max().item() if ratio.numel() else 0.0


def _message(what, got, oracle, error, allowed, good, stock_error, dtype) -> str:
    excess = torch.where(good, 0.0, (error / allowed).nan_to_num(nan=math.inf, posinf=math.inf))
    worst = int(excess.flatten().argmax())
    at = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), oracle.shape))
    channels = ""
    if oracle.dim() > 1:
        bad = sorted({int(c) for c in (~good).nonzero()[:, 1]})
        channels = f" in channels {bad[:8]}{' ...' if len(bad) > 8 else ''}"
    return (
        f"{what} ({dtype}): {int((~good).sum())} of {good.numel()} elements too far from the float64 oracle{channels}\n"
        f"  worst at {at}: {got[at].item()!r}, oracle {oracle[at].item()!r}\n"
        f"  error {error[at].item():.3e}, allowed {allowed[at].item():.3e} "
        f"(stock PyTorch's worst scaled error is {stock_error:.3e})"
    )


def assert_close_as_winograd(
    actual: Tensor, oracle64: Tensor, stock_list: Sequence[Tensor], what: str
) -> None:
    """The rule for a convolution in Winograd's form, which rounds more than the direct one: error over result at most 5e-6 in
    the 2-norm and 2e-5 in the largest element, or 8 times (in bfloat16 3 times) the worst stock path's, whichever is larger. NaN fails."""
    assert actual.shape == oracle64.shape, (
        f"{what}: shape {tuple(actual.shape)}, the oracle has {tuple(oracle64.shape)}"
    )
    if actual.numel() == 0:
        return  # an empty tensor has no largest element, and no error
    oracle = _float64(oracle64)
    for name, order, bound in (("2-norm", 2.0, 5e-6), ("largest element", math.inf, 2e-5)):
        size = torch.linalg.vector_norm(oracle, order)
        error, *stock = (
            torch.linalg.vector_norm(_float64(t) - oracle, order) / size
            for t in (actual, *stock_list)
        )
        times = 3 if actual.dtype == torch.bfloat16 else 8
        allowed = max([bound] + [times * float(s) for s in stock])
        assert error <= allowed, f"{what}: {name} of the error {error:.2e}, allowed {allowed:.2e}"
