"""Every backend, phase by phase and composed, against the reference in float64. "Anchor fN" is item N of the list
of numeric pitfalls that the package is built against; each docstring says in words what the item is about.

BNFAST_FULL_TESTS=1 runs the full product of cases, BNFAST_BIG_TESTS=1 the tensors with more than 2**31 elements.
"""

import itertools
import math

import pytest
import torch
from cases import (
    BIG,
    DTYPES,
    FULL,
    LAYOUTS,
    Case,
    Inputs,
    cases,
    evaluation_statistics,
    lay_out,
    make_inputs,
    run_phases,
    run_stock,
    silence_kinks,
    stock_activation,
    stock_statistics,
)
from closeness import (
    accumulator,
    assert_bit_equal,
    assert_close_as_winograd,
    assert_close_to_oracle,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from bnfast import native, reference, winograd

pytestmark = pytest.mark.usefixtures("poisoned_memory")

every_case = pytest.mark.parametrize("case", cases(), ids=lambda c: c.name)
float_dtypes = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=lambda d: str(d)[6:]
)
usual_layouts = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])


def on(backend, inputs: Inputs) -> Inputs:
    """The inputs on the backend's device with their strides; fresh storage, so that a phase may update its buffers."""
    if backend.device.type == "cpu":
        return inputs.map(lambda t: t)
    return inputs.map(lambda t: torch.empty_like(t, device=backend.device).copy_(t))


def wide(vector: Tensor, z: Tensor) -> Tensor:
    """A [C] vector in float64, shaped to broadcast against z."""
    return reference.per_channel(vector.cpu().double(), z)


def channel_sum(tensor: Tensor) -> Tensor:
    return tensor.sum([0, *range(2, tensor.dim())])


class Magnitudes:
    """How large the quantities are whose rounding each output contains: the `scale` of the closeness rule.

    Everything in float64. z - mean suffers from the mean's rounding where that is computed from z: then it is as large as the values
    that were added up are on average, which may be far more than |mean|. Where the mean is an argument z - mean is exact up to one
    rounding.
    """

    def __init__(self, case: Case, t: Inputs, mean: Tensor, rstd: Tensor, computed_mean: bool):
        one = torch.ones_like(mean)
        self.z, self.mean, self.rstd = t.z, mean, rstd
        self.gain = (rstd * (one if t.gamma is None else t.gamma)).abs()
        self.centred = (t.z - wide(mean, t.z)).abs()
        if computed_mean:
            self.centred = self.centred + wide(channel_sum(t.z.abs()) / max(case.count, 1), t.z)
        self.pre = self.centred * wide(self.gain, t.z)
        for term in (None if t.beta is None else wide(t.beta, t.z), t.residual):
            if term is not None:
                self.pre = self.pre + term.abs()
        # The slope of a smooth activation moves with the pre-activation; that of the others does not between kinks.
        self.db = t.dy.abs() * (1 + self.pre if case.act in reference.SMOOTH_ACTS else 1)
        self.dbeta = channel_sum(self.db)
        self.dgamma = channel_sum(self.db * self.centred) * rstd

    def dz(self, dgamma: Tensor | None, dbeta: Tensor | None, count: int) -> Tensor:
        total = self.db
        if dgamma is not None:
            total = total + wide(dbeta.abs() / count, self.z)
            total = total + self.centred * wide(self.rstd * dgamma.abs() / count, self.z)
        return total * wide(self.gain, self.z)


# ------------------------------------------------------------------------------------------------------ each phase alone


@every_case
def test_bn_fwd_reduce(backend, case):
    """Anchors f1, f2, f4, f5, f6, f7, f10: mean, M2, rstd and the running statistics of every case."""
    cpu_inputs = make_inputs(case)
    check_fwd_reduce(backend, case, cpu_inputs)


def test_bn_fwd_reduce_of_planes_in_pieces(backend):
    """Planes of which one is more than a thread takes at once, in pieces that are not equally long."""
    case = Case((2, 3, 270, 271), torch.float32, "contiguous", "off_centre", "identity", False)
    check_fwd_reduce(backend, case, make_inputs(case))


def check_fwd_reduce(backend, case: Case, cpu_inputs: Inputs) -> None:
    t, o = on(backend, cpu_inputs.map(clone_strided)), cpu_inputs.double()
    args = (case.momentum, case.eps)
    actual = backend.module.bn_fwd_reduce(
        t.z, t.running_mean, t.running_var, t.num_batches_tracked, *args
    )
    z = o.z
    mean, m2, rstd = reference.bn_fwd_reduce(
        z, o.running_mean, o.running_var, o.num_batches_tracked, *args
    )
    assert int(t.num_batches_tracked) == int(cpu_inputs.num_batches_tracked) + 1
    acc, count = accumulator(case.dtype), max(case.count, 1)
    size, eps = channel_sum(z.abs()) / count, torch.finfo(acc).eps
    # A mean that is off by d adds M d^2 to M2; below the smallest normal number, squares have no relative accuracy.
    off = eps * (8 + math.sqrt(count) / 4) * size
    slack = count * (off.square() + torch.finfo(acc).smallest_normal)
    var_slack = slack / max(count - 1, 1)
    rstd_slack = 0.5 * slack / count * rstd**3
    rules = {
        "mean": (actual[0], mean, size, 0.0),
        "m2": (actual[1], m2, m2, slack),
        "rstd": (actual[2], rstd, rstd, rstd_slack),
        "running_mean": (t.running_mean, o.running_mean, size + o.running_mean.abs(), 0.0),
        "running_var": (
            t.running_var,
            o.running_var,
            cpu_inputs.running_var.double() + o.running_var,
            var_slack,
        ),
    }
    stock = []
    if case.count > 1:
        stock = [stock_statistics(case, cpu_inputs, last) for last in (False, True)]
    for name, (got, oracle, scale, extra) in rules.items():
        assert got.shape == (case.shape[1],) and got.dtype == acc, name
        paths = [path[name] for path in stock]
        assert_close_to_oracle(got, oracle, paths, name, scale=scale, terms=count, slack=extra)


def clone_strided(tensor: Tensor) -> Tensor:
    """The same tensor where phases only read (its layout is the point), a clone of vectors, which may be updated."""
    return tensor.clone() if tensor.dim() < 2 else tensor


def given_statistics(case: Case, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """(mean, rstd) in the accumulator dtype for the phases that take them: the rounded oracle's."""
    if not case.training:
        return evaluation_statistics(case, inputs)
    mean, _, rstd = reference.bn_fwd_reduce(inputs.z.double(), None, None, None, 0.0, case.eps)
    acc = accumulator(case.dtype)
    return mean.to(acc), rstd.to(acc)


def kept_by(
    case: Case, inputs: Inputs, bits: Tensor | None
) -> list[tuple[Tensor | None, Tensor | None]]:
    """The (residual, bits) pairs from which the backward phases can find the slope of this case."""
    if inputs.residual is None or case.act == "identity":
        return [(None, None)]
    return [(inputs.residual, None)] + ([(None, bits)] if case.act in reference.BIT_ACTS else [])


@every_case
def test_apply_phases_and_bwd_reduce(backend, case):
    """bn_fwd_apply, bn_bwd_reduce and bn_bwd_apply, each from exact arguments, so that only rounding is allowed.

    Anchors f3, f5, f6, f9, f10, f12, f14, f19, f21, f23, f24: off-centre data, evaluation statistics, gamma 0 and
    negative, any strides, parameters in a dtype other than z's.
    """
    cpu_inputs = make_inputs(case)
    mean, rstd = given_statistics(case, cpu_inputs)
    o = cpu_inputs.double()
    mean64, rstd64 = mean.double(), rstd.double()
    size = Magnitudes(case, o, mean64, rstd64, computed_mean=False)
    cpu_inputs = silence_kinks(case, cpu_inputs, mean64, rstd64, size.pre)
    t, o = on(backend, cpu_inputs), cpu_inputs.double()
    size = Magnitudes(case, o, mean64, rstd64, computed_mean=False)
    device_mean, device_rstd = mean.to(backend.device), rstd.to(backend.device)
    saved = (t.z, device_mean, device_rstd, t.gamma, t.beta)
    saved64 = (o.z, mean64, rstd64, o.gamma, o.beta)
    act, slope, phases = case.act, case.slope, backend.module

    y, bits = phases.bn_fwd_apply(*saved, t.residual, act, slope, act in reference.BIT_ACTS)
    y64, _ = reference.bn_fwd_apply(*saved64, o.residual, act, slope, False)
    assert y.dtype == case.dtype
    assert (bits.dtype, bits.numel() > 0) == (
        torch.uint8,
        act in reference.BIT_ACTS and y.numel() > 0,
    )
    assert_close_to_oracle(y, y64, [], "y", scale=size.pre)
    without, empty = phases.bn_fwd_apply(*saved, t.residual, act, slope, False)
    assert empty.numel() == 0
    assert_bit_equal(without, y, "y with and without bits")

    stock_dbeta = []
    if case.gradient_layout == "expanded" and case.count > 1:
        # Equal summands all round the same way: the sqrt(M) of the rule is not for them, PyTorch's own error is.
        stock_dbeta = [run_stock(case, cpu_inputs, last)["dbeta"] for last in (False, True)]
    for residual, given_bits in kept_by(case, t, bits):
        how = "from bits" if given_bits is not None else "from the pre-activation"
        sums = phases.bn_bwd_reduce(t.dy, *saved, residual, given_bits, act, slope)
        sums64 = reference.bn_bwd_reduce(o.dy, *saved64, o.residual, None, act, slope)
        for name, got, oracle in zip(("dgamma", "dbeta"), sums, sums64, strict=True):
            assert got.dtype == accumulator(case.dtype)
            assert_close_to_oracle(
                got,
                oracle,
                stock_dbeta if name == "dbeta" else [],
                f"{name} {how}",
                scale=getattr(size, name),
                terms=max(case.count, 1),
            )
        # Rounded sums of the oracle, so that a wrong bn_bwd_reduce cannot excuse or blame bn_bwd_apply.
        given = (
            tuple(s.to(accumulator(case.dtype)) for s in sums64) if case.training else (None,) * 2
        )
        on_device = [s if s is None else s.to(backend.device) for s in given]
        given64 = [s if s is None else s.double() for s in given]
        dz, dr = phases.bn_bwd_apply(
            t.dy, *saved, residual, given_bits, *on_device, act, slope, case.residual
        )
        dz64, dr64 = reference.bn_bwd_apply(
            o.dy, *saved64, o.residual, None, *given64, act, slope, case.residual
        )
        assert dz.dtype == dr.dtype == case.dtype
        scale = size.dz(*given64, max(case.count, 1))
        assert_close_to_oracle(dz, dz64, [], f"dz {how}", scale=scale)
        scale = size.db if case.residual else None
        assert_close_to_oracle(dr, dr64, [], f"dresidual {how}", scale=scale)


# -------------------------------------------------------------------------------------------------- the phases composed


def backwards(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """All outputs of the reference, the values of each channel taken from the last to the first."""

    def turned(t: Tensor) -> Tensor:
        return t.flip([0, *range(2, t.dim())]) if t.dim() > 1 else t.clone()

    return {n: turned(t) for n, t in run_phases(reference, case, inputs.map(turned)).items()}


def check_step(backend, case: Case) -> None:
    """One step, all outputs, by the closeness rule with both stock paths."""
    cpu_inputs = make_inputs(case)
    o = cpu_inputs.double()
    if case.training:
        mean, _, rstd = reference.bn_fwd_reduce(o.z, None, None, None, 0.0, case.eps)
    else:
        mean, rstd = evaluation_statistics(case, o)
    size = Magnitudes(case, o, mean, rstd, computed_mean=True)
    cpu_inputs = silence_kinks(case, cpu_inputs, mean, rstd, size.pre)
    o = cpu_inputs.double()
    size = Magnitudes(case, o, mean, rstd, computed_mean=True)
    stock = []
    if case.count > 1:  # one value per channel has no stock answer in training
        stock = [run_stock(case, cpu_inputs, last) for last in (False, True)]
    if case.dtype == torch.float64:
        # The oracle rounds as much as what it judges; how much, its sums in another order say.
        stock.append(backwards(case, o))
    t = on(backend, cpu_inputs.map(clone_strided))
    oracle = run_phases(reference, case, o)
    actual = run_phases(backend.module, case, t)
    assert actual.keys() == oracle.keys()
    # Both sums are computed here: their roundings are those of what was added up.
    sums = (size.dgamma, size.dbeta) if case.training else (None, None)
    scales = {
        "y": size.pre,
        "dgamma": size.dgamma,
        "dbeta": size.dbeta,
        "dz": size.dz(*sums, max(case.count, 1)),
        "dresidual": size.db,
    }
    for name, scale in scales.items():
        if name in oracle:
            assert_close_to_oracle(
                actual[name],
                oracle[name],
                [path[name] for path in stock],
                name,
                scale=scale,
                terms=max(case.count, 1),
            )


@every_case
def test_step(backend, case):
    """Anchor f24: no further from float64 than twice the worse of PyTorch's own two paths, plus rounding."""
    check_step(backend, case)


@settings(
    max_examples=150 if FULL else 25,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_step_on_random_shapes(backend, data):
    """Property: the closeness rule holds for any small shape, layout, dtype, activation and distribution."""
    ndim = data.draw(st.integers(2, 5), label="ndim")
    n, c = data.draw(st.integers(0, 5), label="n"), data.draw(st.integers(1, 70), label="c")
    spatial = data.draw(st.tuples(*[st.integers(0, 9)] * (ndim - 2)), label="spatial")
    case = Case(
        (n, c, *spatial),
        data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])),
        data.draw(st.sampled_from(LAYOUTS)),
        data.draw(st.sampled_from(["off_centre", "normal", "mixed", "constant_channel"])),
        data.draw(st.sampled_from(reference.ACTS)),
        data.draw(st.booleans(), label="residual"),
        data.draw(st.sampled_from([True, "same", False, "gamma", "beta"])),
        data.draw(st.booleans(), label="training"),
        data.draw(st.sampled_from(LAYOUTS)),
        data.draw(st.sampled_from(LAYOUTS)),
    )
    check_step(backend, case)


# -------------------------------------------------------------------------------------------- determinism and isolation

SPLIT_CASES = [
    Case(
        shape,
        dtype,
        layout,
        act=act,
        residual=residual,
        residual_layout=layout,
        gradient_layout=layout,
    )
    for (shape, act, residual), layout, dtype in itertools.product(
        (
            ((7, 33, 13, 11), "relu", True),
            ((2, 64, 56, 57), "relu", False),
            ((1, 2, 316, 317), "silu", False),
            ((3, 1030, 7, 7), "relu6", True),
        ),
        ("contiguous", "channels_last"),
        (torch.float32, torch.bfloat16),
    )
]
split_cases = pytest.mark.parametrize("case", SPLIT_CASES, ids=lambda c: c.name)


@split_cases
def test_repeats_are_bit_equal(backend, case):
    """Anchor f16: the same call twice gives the same bits, whatever lay in the memory it was given."""
    first, second = (run_phases(backend.module, case, on(backend, make_inputs(case))) for _ in "ab")
    for name in first:
        assert_bit_equal(second[name], first[name], name)


@split_cases
def test_thread_count_does_not_change_a_bit(backend, case):
    """Anchor f16: chunk borders depend on the shape only."""
    if backend.name == "reference":
        pytest.skip("PyTorch's own sums depend on the number of threads")
    backend.takes_long()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(run_phases(backend.module, case, on(backend, make_inputs(case))))
    for other, name in itertools.product(results[1:], results[0]):
        assert_bit_equal(other[name], results[0][name], name)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("act", ["relu", "silu"])
def test_arguments_are_never_written(backend, act, layout):
    """Anchor f18: every argument but the running statistics comes back bit for bit; statistics only in bn_fwd_reduce."""
    case = Case(
        (3, 18, 5, 7),
        layout=layout,
        act=act,
        residual=True,
        residual_layout=layout,
        gradient_layout=layout,
    )
    t = on(backend, make_inputs(case))
    before = {name: tensor.clone() for name, tensor in t.tensors().items()}
    m, written = backend.module, {"running_mean", "running_var", "num_batches_tracked"}

    def unchanged(phase, names):
        for name in names:
            assert_bit_equal(t.tensors()[name], before[name], f"{name} after {phase}")

    mean, _, rstd = m.bn_fwd_reduce(
        t.z, t.running_mean, t.running_var, t.num_batches_tracked, case.momentum, case.eps
    )
    unchanged("bn_fwd_reduce", before.keys() - written)
    for name in written:
        assert not torch.equal(t.tensors()[name], before[name]), f"{name} was not updated"
        before[name] = t.tensors()[name].clone()
    vectors = [mean.clone(), rstd.clone()]
    y, bits = m.bn_fwd_apply(t.z, mean, rstd, t.gamma, t.beta, t.residual, act, 0.01, act == "relu")
    kept = (None, bits) if act == "relu" else (t.residual, None)
    bits_before, y_before = bits.clone(), y.clone()
    saved = (t.dy, t.z, mean, rstd, t.gamma, t.beta, *kept)
    sums = m.bn_bwd_reduce(*saved, act, 0.01)
    sums_before = [s.clone() for s in sums]
    m.bn_bwd_apply(*saved, *sums, act, 0.01, True)
    unchanged("the backward phases", before)
    for now, then in zip(
        (mean, rstd, *sums, bits, y), (*vectors, *sums_before, bits_before, y_before), strict=True
    ):
        assert_bit_equal(now, then, "saved tensors")


@pytest.mark.parametrize("gradient_layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize("act", ["identity", "relu", "silu"])
def test_dz_over_dy(backend, act, gradient_layout):
    """bn_bwd_apply_ and bn_bwd_reduce_apply_ give the bits of bn_bwd_apply, whatever the layout of the gradient that they
    overwrite."""
    large = (2, 2, 70, 71) if backend.interpreted else (2, 2, 190, 191)
    for shape, dtype in itertools.product(((3, 18, 5, 7), large), DTYPES):
        case = Case(shape, dtype, "channels_last", act=act, gradient_layout=gradient_layout)
        t, m = on(backend, make_inputs(case)), backend.module
        mean, _, rstd = m.bn_fwd_reduce(t.z, None, None, None, 0.1, case.eps)
        rest = (t.z, mean, rstd, t.gamma, t.beta, None, None)
        sums = m.bn_bwd_reduce(t.dy, *rest, act, 0.01)
        expected = m.bn_bwd_apply(t.dy.clone(), *rest, *sums, act, 0.01, True)
        over = torch.empty_strided(t.dy.shape, t.dy.stride(), dtype=dtype, device=t.dy.device)
        over.copy_(t.dy)
        dresidual = m.bn_bwd_apply_(t.dy, *rest, *sums, act, 0.01, True)
        found = m.bn_bwd_reduce_apply_(over, *rest, act, 0.01, True)
        for actual, value, name in (
            (t.dy, expected[0], "dz"),
            (dresidual, expected[1], "dr"),
            (over, expected[0], "dz of both phases"),
            (found[0], sums[0], "dgamma"),
            (found[1], sums[1], "dbeta"),
            (found[2], expected[1], "dr of both phases"),
        ):
            assert_bit_equal(actual, value, f"{name}, {shape}, {dtype}")


@every_case
def test_two_phases_in_one_are_the_two_phases(backend, case):
    """bn_fwd_reduce_apply and bn_bwd_reduce_apply give the bits of what they are made of, running statistics included."""
    check_two_in_one(backend, case)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("act", ["relu", "silu"])
def test_two_phases_in_one_block_by_block(backend, act, threads):
    """The same where planes go through in blocks of channels: several blocks, an unequal last one, planes in pieces."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        large = (2, 7, 70, 71) if backend.interpreted else (2, 7, 270, 271)
        for shape in ((3, 67, 9, 7), large, (5, 130, 13, 13), (1, 6, 100, 70)):
            for residual in (False, True):
                check_two_in_one(
                    backend,
                    Case(shape, torch.float32, "contiguous", "off_centre", act, residual),
                )
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act, residual", [("relu", True), ("silu", False)])
def test_large_planes_written_past_the_cache(backend, dtype, act, residual):
    """Planes of whole blocks, which are streamed, and of a partial last block, which are not."""
    if backend.interpreted:
        pytest.skip("Triton has no such stores")
    for shape in ((2, 9, 128, 124), (2, 9, 125, 127), (17, 65, 16, 16)):
        case = Case(shape, dtype, "contiguous", "off_centre", act, residual)
        check_step(backend, case)
        check_two_in_one(backend, case)


def check_two_in_one(backend, case: Case) -> None:
    inputs, m = make_inputs(case), backend.module
    one, two = (on(backend, inputs.map(clone_strided)) for _ in range(2))
    act, slope = case.act, 0.01
    want_bits = one.residual is not None and act in reference.BIT_ACTS
    rest = (act, slope, want_bits)

    def buffers(t: Inputs):
        return t.running_mean, t.running_var, t.num_batches_tracked

    mean, _, rstd = m.bn_fwd_reduce(one.z, *buffers(one), case.momentum, case.eps)
    y, bits = m.bn_fwd_apply(one.z, mean, rstd, one.gamma, one.beta, one.residual, *rest)
    found = m.bn_fwd_reduce_apply(
        two.z, *buffers(two), case.momentum, case.eps, two.gamma, two.beta, two.residual, *rest
    )
    names = ("mean", "rstd", "y", "running_mean", "running_var", "num_batches_tracked")
    for name, actual, expected in zip(
        names, (*found[:3], *buffers(two)), (mean, rstd, y, *buffers(one)), strict=True
    ):
        if expected is not None:
            assert_bit_equal(actual, expected, name)
    kept = (None, bits) if want_bits else (one.residual, None)
    state = (one.z, mean, rstd, one.gamma, one.beta, *kept)
    sums = m.bn_bwd_reduce(one.dy, *state, act, slope)
    for want in (False, True):
        expected = (*sums, *m.bn_bwd_apply(one.dy, *state, *sums, act, slope, want))
        kept = (None, found[3]) if want_bits else (two.residual, None)
        actual = m.bn_bwd_reduce_apply(
            two.dy, two.z, *found[:2], two.gamma, two.beta, *kept, act, slope, want
        )
        for name, a, e in zip(("dgamma", "dbeta", "dz", "dr"), actual, expected, strict=True):
            assert_bit_equal(a, e, name)


def test_dz_over_dy_refuses_shared_memory(backend):
    if backend.name == "reference":
        pytest.skip("the reference computes before it writes")
    z, one = torch.randn(2, 4, 3, 3), torch.ones(4)
    rest = (one, one, None, None, None, None, None, None, "relu", 0.0, False)
    for dy in (z, z.flatten()[1:37].view(1, 4, 3, 3), torch.randn(1, 4, 1, 1).expand(2, 4, 3, 3)):
        other = z[: dy.shape[0]]
        with pytest.raises(RuntimeError, match="memory"):
            backend.module.bn_bwd_apply_(dy, other, *rest)
        with pytest.raises(RuntimeError, match="memory"):
            backend.module.bn_bwd_reduce_apply_(dy, other, *rest[:6], "relu", 0.0, False)


def test_outputs_do_not_share_memory(backend):
    """Anchor f18: nothing that a phase returns aliases an argument or another output, also for the identity."""
    for act, training in itertools.product(("identity", "relu"), (True, False)):
        case = Case((2, 4, 3, 3), act=act, residual=True, affine=False, training=training)
        t = on(backend, make_inputs(case))
        out = run_phases(backend.module, case, t)
        out = {k: v for k, v in out.items() if not k.startswith("running")}
        if act == "identity":
            del out["dresidual"]  # equals dy, which plain Python functions may hand through
        pointers = [v.untyped_storage().data_ptr() for v in (*out.values(), *t.tensors().values())]
        assert len(set(pointers)) == len(pointers), f"{act}: {list(out)}"


@pytest.mark.parametrize("act", ["identity", "relu"])
def test_aliased_arguments(backend, act):
    """Anchor f18: the residual may be z itself, dy may be z itself."""
    base = Case((3, 17, 5, 5), layout="channels_last", data="mixed", act=act, residual=True)
    t = on(backend, make_inputs(base))
    aliased = Inputs(t.z, t.z, t.z, t.gamma, t.beta, *(v.clone() for v in statistics(t)))
    apart = Inputs(
        t.z, t.z.clone(), t.z.clone(), t.gamma, t.beta, *(v.clone() for v in statistics(t))
    )
    first, second = (run_phases(backend.module, base, i) for i in (aliased, apart))
    for name in first:
        assert_bit_equal(first[name], second[name], name)


def statistics(t: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    return t.running_mean, t.running_var, t.num_batches_tracked


# ------------------------------------------------------------------------------------- the mask of forward and backward


def near_zero_step(dtype, shape, layout, residual, subnormal, act):
    """z, mean, rstd, gamma, beta, residual with most pre-activations within a few roundings of 0 (relu6: of 0 or 6).

    subnormal: a gamma so small that values of both signs underflow to 0 in float16.
    """
    acc = accumulator(dtype)
    c = shape[1]
    mean, rstd = torch.randn(c, dtype=acc), torch.rand(c, dtype=acc) + 0.5
    gamma = torch.randn(c, dtype=acc)
    if subnormal:
        gamma = gamma * 2.0**-24
    centre = torch.randn(c, dtype=acc).to(dtype)
    steps = torch.randint(-4, 5, shape).to(acc) * torch.finfo(dtype).eps
    z = (reference.per_channel(centre.to(acc), steps) * (1 + steps)).to(dtype)
    beta = -(centre.to(acc) - mean) * (gamma * rstd)
    if subnormal:
        z = torch.randn(shape, dtype=acc).to(dtype)
        beta = gamma * torch.randn(c, dtype=acc)
    if act == "relu6":
        beta = beta + 6 * (torch.arange(c) % 2)
    r = None
    if residual:
        z = torch.randn(shape, dtype=acc).to(dtype)
        pre, _ = reference.bn_fwd_apply(z, mean, rstd, gamma, beta, None, "identity", 0.0, False)
        level = 6 * torch.randint(0, 2, shape) if act == "relu6" else 0
        r = (level - pre.to(acc)) * (1 + steps)
        if subnormal:
            r = r + torch.randint(-1, 2, shape) * 2.0**-24
        r = lay_out(r.to(dtype), layout)
    return lay_out(z, layout), mean, rstd, gamma, beta, r


@pytest.mark.parametrize("act", reference.BIT_ACTS)
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@usual_layouts
@float_dtypes
def test_mask_of_backward_is_that_of_forward(backend, dtype, layout, residual, act):
    """Anchors f13, f14: the gradient passes exactly where y > 0 (relu6: 0 < y < 6), bit for bit, in every path.

    With the mask taken from the bits and from a recomputed pre-activation, in the sum (dbeta counts), in dz and in
    dresidual, in training and evaluation form, in vector bodies and tails (odd sizes), in float16 with underflow.
    """
    sizes = ((3, 33, 5, 7), (2, 7, 16, 19), (5, 64, 1, 1)) + (
        ((3, 16, 4, 4), (1, 1, 3, 5)) if FULL else ()
    )
    for shape, subnormal in itertools.product(
        sizes, (False, True) if dtype == torch.float16 else (False,)
    ):
        tensors = near_zero_step(dtype, shape, layout, residual, subnormal, act)
        tensors = [
            v if v is None else torch.empty_like(v, device=backend.device).copy_(v) for v in tensors
        ]
        z, mean, rstd, gamma, beta, r = tensors
        check_mask(backend, act, z, mean, rstd, gamma, beta, r)


def check_mask(backend, act, z, mean, rstd, gamma, beta, r) -> None:
    m, slope, weight = backend.module, 0.25, 1024.0
    y, bits = m.bn_fwd_apply(z, mean, rstd, gamma, beta, r, act, slope, True)
    if act == "leaky_relu":
        passes = y > 0
    else:  # written so that a NaN passes
        passes = ~((y <= 0) | (y >= (6 if act == "relu6" else torch.inf)))
    share = passes.float().mean().item()
    exercised = 0.02 < share < 0.98 or z.numel() < 100  # of a few values all may lie on one side
    assert exercised, f"the data do not exercise the mask: {share} pass"
    # Powers of two keep everything below exact: sums of them, and their products with the slope.
    dy = torch.full_like(z, weight)
    blocked = weight * slope if act == "leaky_relu" else 0.0
    expected = torch.where(passes, weight, blocked)
    zero = torch.zeros_like(mean)
    for residual, given_bits in ((r, None), (None, bits)):
        source = "bits" if given_bits is not None else "pre-activation"
        saved = (dy, z, mean, rstd, gamma, beta, residual, given_bits)
        _, dbeta = m.bn_bwd_reduce(*saved, act, slope)
        assert_bit_equal(dbeta, channel_sum(expected.to(dbeta.dtype)), f"dbeta from {source}")
        for sums in ((zero, zero), (None, None)):
            dz, dr = m.bn_bwd_apply(*saved, *sums, act, slope, True)
            assert_bit_equal(dr, expected.to(z.dtype), f"dresidual from {source}")
            if act != "leaky_relu":
                assert torch.equal(dz != 0, passes), f"mask of dz from {source}"
            alone, empty = m.bn_bwd_apply(*saved, *sums, act, slope, False)
            assert empty.numel() == 0
            assert_bit_equal(alone, dz, f"dz without dresidual from {source}")


# ---------------------------------------------------------------------------------------------- special values and sizes


@usual_layouts
@float_dtypes
def test_nan_stays_in_its_channel(backend, dtype, layout):
    """Anchor f15: one NaN makes its whole channel NaN, forward and backward; the others keep their bits."""
    for act in reference.ACTS:
        case = Case((3, 19, 5, 7), dtype, layout, "normal", act, gradient_layout=layout)
        clean = make_inputs(case)
        dirty = clean.map(Tensor.clone)
        dirty.z[1, 4, 2, 3] = torch.nan
        expected = run_phases(backend.module, case, on(backend, clean))
        actual = run_phases(backend.module, case, on(backend, dirty))
        others = [c for c in range(19) if c != 4]
        for name in expected:
            whole = expected[name].dim() > 1
            mine = actual[name][:, 4] if whole else actual[name][4]
            if (
                name != "dbeta" or act == "silu"
            ):  # dbeta of a NaN channel: as the activation's mask says
                assert mine.isnan().all(), f"{act} {name}"
            got, want = (
                v[name][:, others] if whole else v[name][others] for v in (actual, expected)
            )
            assert_bit_equal(got, want, f"{act} {name} in the clean channels")


@usual_layouts
@float_dtypes
@pytest.mark.parametrize("act", reference.ACTS)
def test_special_values_pass_as_in_pytorch(backend, act, dtype, layout):
    """Anchors f13, f15: NaN, infinities, -0.0 and the kinks through bn_fwd_apply and both backward phases.

    Each in every position of a vector body and tail, with and without bits. What PyTorch's backward of relu6 and
    hardswish does with a NaN depends on its vector width; here relu6 lets the gradient pass by the rule of the mask.
    """
    inf = torch.inf
    special = torch.tensor(
        [torch.nan, inf, -inf, -0.0, 0.0, 3.0, -3.0, 6.0, 1.5, -1.5], dtype=dtype
    )
    values = special[(torch.arange(3 * 21 * 5 * 7) * 7) % 10].view(3, 21, 5, 7)
    z = lay_out(values, layout).to(backend.device)
    mean = torch.zeros(21, dtype=accumulator(dtype), device=backend.device)
    rstd = torch.ones_like(mean)
    leaf = values.clone().requires_grad_()
    y_stock = stock_activation(leaf, act, 0.25)
    dy = torch.randn(values.shape).to(dtype)
    (dz_stock,) = torch.autograd.grad(y_stock, leaf, dy)
    if act == "relu6":
        dz_stock = torch.where(values.isnan(), dy, dz_stock)
    if act == "hardswish":
        values_nan, dz_stock = values.isnan(), dz_stock.masked_fill(values.isnan(), 0)
        dy = dy.masked_fill(values_nan, 0)
    dy = lay_out(dy, layout).to(backend.device)
    m, tolerance = (
        backend.module,
        {"rtol": 4 * torch.finfo(dtype).eps, "atol": 0, "equal_nan": True},
    )

    y, bits = m.bn_fwd_apply(z, mean, rstd, None, None, None, act, 0.25, act in reference.BIT_ACTS)
    # 0.0 == -0.0 here: + beta, with beta absent or 0, may turn one into the other.
    torch.testing.assert_close(y.cpu(), y_stock.detach(), **tolerance)
    for source in [None] + ([bits] if act in reference.BIT_ACTS else []):
        saved = (dy, z, mean, rstd, None, None, None, source)
        _, dr = m.bn_bwd_apply(*saved, None, None, act, 0.25, True)
        torch.testing.assert_close(dr.cpu(), dz_stock, **tolerance)
        _, dbeta = m.bn_bwd_reduce(*saved, act, 0.25)
        expected = channel_sum(dz_stock.to(dbeta.dtype))
        nan = expected.isnan()
        assert torch.equal(dbeta.cpu().isnan(), nan)
        torch.testing.assert_close(dbeta.cpu()[~nan], expected[~nan], rtol=1e-2, atol=0.1)


@usual_layouts
def test_mean_ten_thousand_standard_deviations_away(backend, layout):
    """Anchors f1, f2: E[x^2] - E[x]^2 loses every digit of the variance here (and can turn it negative)."""
    for shape, ratio in itertools.product(
        ((8, 17, 14, 14), (2, 3, 100, 100), (64, 33, 1, 1)), (1e2, 1e3, 1e4)
    ):
        z = torch.randn(shape, dtype=torch.float64) + ratio
        z = lay_out(z.float(), layout)
        case = Case(shape, layout=layout)
        inputs = make_inputs(case)
        inputs.z = z
        check_fwd_reduce(backend, case, inputs)
        _, m2, rstd = backend.module.bn_fwd_reduce(z.to(backend.device), None, None, None, 0.1, 0.0)
        exact = z.double().var([0, 2, 3], correction=0)
        torch.testing.assert_close(m2.cpu().double() / case.count, exact, rtol=2e-4, atol=0)
        torch.testing.assert_close(rstd.cpu().double(), exact.rsqrt(), rtol=1e-4, atol=0)


@usual_layouts
def test_first_values_say_nothing_about_the_rest(backend, layout):
    """Anchor f1: a shift by the first pixel, row or tile must not be needed for accuracy: the outlier comes first."""
    z = 1e4 + torch.randn(6, 37, 9, 9)
    z[0, :, 0] = 0.0
    z[0, ::2, 0] = -3e6
    case = Case(tuple(z.shape), layout=layout)
    inputs = make_inputs(case)
    inputs.z = lay_out(z, layout)
    check_fwd_reduce(backend, case, inputs)


@usual_layouts
def test_normalisation_of_far_data_does_not_cancel(backend, layout):
    """Anchor f3: (z - mean) * scale + beta, not z * scale + (beta - mean * scale): relative error at mean 1e6, sd 1."""
    z = lay_out(1e6 + torch.randn(4, 35, 6, 5), layout).to(backend.device)
    mean = torch.full((35,), 1e6, device=backend.device)
    rstd = torch.rand(35, device=backend.device) + 0.5
    gamma = torch.randn(35, device=backend.device)
    beta = torch.randn(35, device=backend.device)
    y, _ = backend.module.bn_fwd_apply(z, mean, rstd, gamma, beta, None, "identity", 0.0, False)
    d = [v.double().cpu() for v in (z, mean, rstd, gamma, beta)]
    exact, _ = reference.bn_fwd_apply(*d, None, "identity", 0.0, False)
    torch.testing.assert_close(y.cpu().double(), exact, rtol=1e-6, atol=2e-6)


@usual_layouts
def test_dgamma_of_far_data_does_not_cancel(backend, layout):
    """Anchor f23: sum(db * (z - mean)), not sum(db * z) - mean * sum(db)."""
    shape = (4, 35, 6, 5)
    z = lay_out(1e5 + torch.randn(shape), layout).to(backend.device)
    dy = lay_out(1 + torch.randn(shape), layout).to(backend.device)
    mean = torch.full((35,), 1e5, device=backend.device)
    dgamma, _ = backend.module.bn_bwd_reduce(
        dy, z, mean, torch.ones_like(mean), None, None, None, None, "identity", 0.0
    )
    exact = channel_sum(dy.double() * (z.double() - 1e5))
    torch.testing.assert_close(dgamma.double(), exact, rtol=1e-5, atol=2e-3)


@usual_layouts
@pytest.mark.parametrize("eps", [0.0, 1e-5])
def test_constant_channels(backend, eps, layout):
    """Anchor f11: variance 0 with eps 0 gives rstd 0, y = act(beta) and dz = 0; with eps, rstd = 1 / sqrt(eps)."""
    value = torch.tensor([0.0, 1.0, -3.0, 0.1, 1e4 + 0.3]).repeat(7)
    z = lay_out(value.view(1, -1, 1, 1).expand(3, 35, 5, 3).clone(), layout).to(backend.device)
    gamma, beta = torch.randn(35, device=z.device), torch.randn(35, device=z.device)
    m = backend.module
    mean, m2, rstd = m.bn_fwd_reduce(z, None, None, None, 0.1, eps)
    torch.testing.assert_close(mean.cpu(), value, rtol=5e-7, atol=0)
    exact_mean = mean.cpu() == value  # where 45 equal values sum up without rounding
    assert exact_mean[:3].all()
    for c in (0, 1, 2):
        assert m2[c] == 0
        assert rstd[c] == (0 if eps == 0 else pytest.approx(eps**-0.5, rel=1e-6))
    assert rstd.isfinite().all() and (m2 >= 0).all()
    y, _ = m.bn_fwd_apply(z, mean, rstd, gamma, beta, None, "relu", 0.0, False)
    torch.testing.assert_close(
        y[:, :3], beta[:3].relu().view(1, 3, 1, 1).expand(3, 3, 5, 3), rtol=0, atol=0
    )
    dy = torch.randn_like(z)
    sums = m.bn_bwd_reduce(dy, z, mean, rstd, gamma, beta, None, None, "relu", 0.0)
    dz, _ = m.bn_bwd_apply(dy, z, mean, rstd, gamma, beta, None, None, *sums, "relu", 0.0, False)
    assert sums[0][:3].abs().max() == 0 and dz.isfinite().all()
    if eps == 0:
        assert dz[:, :3].abs().max() == 0


@usual_layouts
@float_dtypes
def test_one_value_per_channel(backend, dtype, layout):
    """Anchor f7: M = 1 divides by nothing: M2 = 0, a finite running variance (Bessel's M - 1 taken as 1), y = act(beta)."""
    case = Case((1, 37, 1, 1), dtype, layout, "off_centre", "relu")
    t = on(backend, make_inputs(case))
    before = t.running_var.clone()
    out = run_phases(backend.module, case, t)
    assert torch.equal(out["mean"], t.z.flatten().to(out["mean"].dtype))
    assert out["m2"].abs().max() == 0
    torch.testing.assert_close(t.running_var, 0.9 * before)
    torch.testing.assert_close(out["y"].flatten(), t.beta.relu().to(dtype), rtol=0, atol=0)
    assert out["dgamma"].abs().max() == 0
    assert out["dz"].isfinite().all()


@pytest.mark.parametrize("shape", [(0, 5, 7, 7), (3, 5, 0, 4), (0, 16), (0, 1, 3)], ids=str)
@float_dtypes
def test_empty_batch(backend, dtype, shape):
    """Anchor f10: empty output, zero gradients, statistics as they were; the batch is counted."""
    for act, residual in itertools.product(("relu", "silu"), (False, True)):
        case = Case(shape, dtype, act=act, residual=residual)
        t = on(backend, make_inputs(case).map(Tensor.clone))
        mean, var = t.running_mean.clone(), t.running_var.clone()
        out = run_phases(backend.module, case, t)
        assert torch.equal(t.running_mean, mean) and torch.equal(t.running_var, var)
        assert int(t.num_batches_tracked) == 4
        for name in ("mean", "m2", "dgamma", "dbeta"):
            assert torch.equal(out[name], torch.zeros_like(mean)), name
        assert out["rstd"].isfinite().all()
        for name in ("y", "dz") + (("dresidual",) if residual else ()):
            assert out[name].shape == shape and out[name].dtype == dtype, name


@usual_layouts
def test_range_of_float16(backend, layout):
    """Anchor f6: values whose squares overflow float16 by far, and sums beyond 65504."""
    z = torch.randn(4, 21, 9, 9).clamp(-4, 4).mul(1.6e4).half()
    z[0, :, 0, 0] = 65504
    case = Case(tuple(z.shape), torch.float16, layout)
    inputs = make_inputs(case)
    inputs.z = lay_out(z, layout)
    check_fwd_reduce(backend, case, inputs)


@usual_layouts
def test_m2_that_overflows(backend, layout):
    """Anchor f6: |z| ~ 1e20 in float32: M2 is inf, not NaN and not a silent zero; mean and y are right or 0, never NaN."""
    z = lay_out(1e20 * torch.randn(4, 19, 5, 5), layout).to(backend.device)
    mean, m2, rstd = backend.module.bn_fwd_reduce(z, None, None, None, 0.1, 1e-5)
    exact = z.double().mean([0, 2, 3])
    torch.testing.assert_close(mean.double(), exact, rtol=0, atol=1e15)
    assert (m2 == torch.inf).all()
    # A backend may have rstd from M2 in a wider type; then it has to be that of the data.
    wider = z.double().var([0, 2, 3], correction=0).rsqrt()
    assert ((rstd == 0) | ((rstd.double() / wider - 1).abs() < 1e-5)).all()


def test_gamma_zero(backend):
    """Anchor f12: gamma 0 stops dz but not dgamma; with beta 0 too the channel is dead under relu."""
    case = Case((3, 18, 5, 5), data="normal", act="identity")
    t = on(backend, make_inputs(case))
    t.gamma.zero_()
    out = run_phases(backend.module, case, t)
    assert out["dz"].abs().max() == 0
    assert out["dgamma"].abs().min() > 0
    t.beta.zero_()
    dead = run_phases(backend.module, Case((3, 18, 5, 5), data="normal", act="relu"), t)
    for name in ("y", "dz", "dgamma", "dbeta"):
        assert dead[name].abs().max() == 0, name


@pytest.mark.parametrize("momentum", [0.1, None, 0.0, 1.0])
def test_running_statistics_over_steps(backend, momentum):
    """Anchors f7, f8: three steps in float32 and with bfloat16 buffers; momentum None averages, 0 freezes but counts."""
    for dtype in (torch.float32, torch.bfloat16):
        mean = torch.zeros(19, dtype=dtype, device=backend.device)
        var = torch.ones(19, dtype=dtype, device=backend.device)
        tracked = torch.tensor(0, device=backend.device)
        mean64, var64 = mean.double(), var.double()
        tracked64 = torch.tensor(0, device=backend.device)
        for step in range(3):
            z = 3 * step + torch.randn(4, 19, 3, 3, device=backend.device)
            backend.module.bn_fwd_reduce(z, mean, var, tracked, momentum, 1e-5)
            factor = 1 / (step + 1) if momentum is None else momentum
            mean64 = (1 - factor) * mean64 + factor * z.double().mean([0, 2, 3])
            var64 = (1 - factor) * var64 + factor * z.double().var([0, 2, 3])
            tracked64 += 1
        assert tracked == tracked64
        assert_close_to_oracle(
            mean, mean64, [], "running_mean", slack=3 * torch.finfo(dtype).eps * 9
        )
        assert_close_to_oracle(var, var64, [], "running_var", slack=3 * torch.finfo(dtype).eps * 3)


def test_statistics_without_buffers(backend):
    """Anchor f8: running statistics may be missing; what is returned does not depend on them."""
    case = Case((3, 21, 5, 5))
    t = on(backend, make_inputs(case))
    with_buffers = backend.module.bn_fwd_reduce(t.z, *statistics(t), 0.1, 1e-5)
    for momentum in (0.1, None):  # None is legal then: nothing is there to be averaged
        without = backend.module.bn_fwd_reduce(t.z, None, None, None, momentum, 1e-5)
        for a, b in zip(with_buffers, without, strict=True):
            assert_bit_equal(a, b, "statistics")


def test_parameters_of_every_dtype(backend):
    """Anchor f21: gamma, beta in any of the four dtypes with z in any other, as under autocast."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    for z_dtype, p_dtype in itertools.product(dtypes, dtypes):
        case = Case((3, 18, 5, 5), z_dtype, "channels_last", "normal", "silu")
        t = on(backend, make_inputs(case))
        # Values that every dtype can hold: then the dtype of the parameters may not change a bit.
        t.gamma, t.beta = (v.bfloat16().half().to(v.dtype) for v in (t.gamma, t.beta))
        expected = run_phases(backend.module, case, t.map(clone_strided))
        t.gamma, t.beta = t.gamma.to(p_dtype), t.beta.to(p_dtype)
        actual = run_phases(backend.module, case, t.map(clone_strided))
        for name in ("y", "dgamma", "dbeta", "dz"):
            assert_bit_equal(actual[name], expected[name], f"{name}, z {z_dtype}, gamma {p_dtype}")


# --------------------------------------------------------------------------------------------------------- large tensors


def test_strides_beyond_two_to_the_31(backend):
    """Anchor f19: offsets of 2**31 elements and more from strides; only the pages that are used get memory."""
    stride = 2**30 + 8
    torch.utils.deterministic.fill_uninitialized_memory = False
    buffer = torch.empty(2 * stride + 2 * 18 * 64, dtype=torch.bfloat16, device=backend.device)
    torch.utils.deterministic.fill_uninitialized_memory = True
    for strides in ((stride, 64, 8, 1), (stride, 1, 160, 20)):
        z = buffer.as_strided((3, 18, 7, 5), strides)
        z.copy_(torch.randn(3, 18, 7, 5))
        case = Case((3, 18, 7, 5), torch.bfloat16)
        inputs = on(backend, make_inputs(case))
        far, near = (
            Inputs(**{**inputs.map(Tensor.clone).tensors(), "z": v, "residual": None})
            for v in (z, z.contiguous())
        )
        actual, expected = (run_phases(backend.module, case, i) for i in (far, near))
        for name in ("mean", "y", "dz", "dgamma"):
            torch.testing.assert_close(actual[name], expected[name], rtol=1e-2, atol=1e-2)


@pytest.mark.skipif(not BIG, reason="needs 20 GB: set BNFAST_BIG_TESTS=1")
@usual_layouts
def test_more_than_two_to_the_31_elements(backend, layout):
    """Anchor f19: the last rows of a tensor with more than 2**31 elements, forward and backward."""
    if backend.name == "reference":
        pytest.skip("the reference would hold several float32 copies of it")
    shape, m = (1, 3, 2**15 + 1, 2**15 // 2 * 2), backend.module
    torch.utils.deterministic.fill_uninitialized_memory = False
    z = torch.zeros(shape, dtype=torch.bfloat16, device=backend.device)
    if layout == "channels_last":
        z = z.contiguous(memory_format=torch.channels_last)
    assert z.numel() > 2**31
    z[..., -1, :] = torch.randn(shape[-1], device=backend.device).bfloat16()
    count = z.numel() // 3
    last = z[0, :, -1].double()
    mean, m2, _ = m.bn_fwd_reduce(z, None, None, None, 0.1, 1e-5)
    torch.testing.assert_close(mean.double(), last.sum(1) / count, rtol=1e-3, atol=1e-9)
    torch.testing.assert_close(m2.double(), last.square().sum(1), rtol=1e-3, atol=0)
    one, zero = torch.ones(3, device=backend.device), torch.zeros(3, device=backend.device)
    y, _ = m.bn_fwd_apply(z, zero, one, None, None, None, "relu", 0.0, False)
    assert torch.equal(y[..., -1, :], z[..., -1, :].relu())
    dgamma, dbeta = m.bn_bwd_reduce(z, z, zero, one, None, None, None, None, "relu", 0.0)
    torch.testing.assert_close(dgamma.double(), last.relu().square().sum(1), rtol=1e-3, atol=0)
    torch.testing.assert_close(dbeta.double(), last.relu().sum(1), rtol=1e-3, atol=0)
    del y
    dz, _ = m.bn_bwd_apply(z, z, zero, one, None, None, None, None, None, None, "relu", 0.0, False)
    assert torch.equal(dz[..., -1, :], z[..., -1, :].relu())


# ----------------------------------------------------------------------------------------------------------- convolution

# name, input [N, J, *], weight [C, J / groups, *], stride, padding, dilation, groups
CONVOLUTIONS = [
    ("3x3", (2, 5, 9, 11), (7, 5, 3, 3), [1, 1], [1, 1], [1, 1], 1),
    ("3x3 aligned", (2, 16, 12, 12), (32, 16, 3, 3), [1, 1], [1, 1], [1, 1], 1),
    ("3x3 stride 2, odd", (3, 4, 9, 7), (6, 4, 3, 3), [2, 2], [1, 1], [1, 1], 1),
    ("3x3 stride 2, even", (3, 4, 10, 8), (6, 4, 3, 3), [2, 2], [1, 1], [1, 1], 1),
    ("1x1", (2, 17, 5, 7), (33, 17, 1, 1), [1, 1], [0, 0], [1, 1], 1),
    ("1x1 stride 2", (2, 17, 8, 7), (9, 17, 1, 1), [2, 2], [0, 0], [1, 1], 1),
    ("7x7 stride 2 stem", (2, 3, 32, 31), (8, 3, 7, 7), [2, 2], [3, 3], [1, 1], 1),
    ("dilated", (2, 5, 13, 12), (7, 5, 3, 3), [1, 1], [2, 2], [2, 2], 1),
    ("stride 3, dilated, unequal", (2, 4, 17, 16), (6, 4, 3, 2), [3, 2], [2, 0], [2, 3], 1),
    ("rectangular", (2, 4, 8, 9), (6, 4, 1, 5), [1, 2], [0, 2], [1, 1], 1),
    ("groups", (2, 12, 7, 7), (8, 3, 3, 3), [1, 1], [1, 1], [1, 1], 4),
    ("depthwise", (2, 19, 9, 8), (19, 1, 3, 3), [1, 1], [1, 1], [1, 1], 19),
    ("depthwise stride 2, 5x5", (2, 16, 11, 10), (16, 1, 5, 5), [2, 2], [2, 2], [1, 1], 16),
    ("depthwise multiplier 2", (2, 6, 7, 7), (12, 1, 3, 3), [1, 1], [1, 1], [1, 1], 6),
    ("padding beyond same", (1, 3, 5, 5), (4, 3, 3, 3), [1, 1], [3, 3], [1, 1], 1),
    ("kernel larger than stride span", (1, 2, 5, 5), (3, 2, 5, 5), [4, 4], [0, 0], [1, 1], 1),
    ("one channel", (2, 1, 28, 27), (1, 1, 3, 3), [1, 1], [1, 1], [1, 1], 1),
    ("1d", (3, 5, 23), (7, 5, 4), [3], [2], [1], 1),
    ("3d", (2, 3, 5, 6, 7), (4, 3, 3, 2, 3), [2, 1, 2], [1, 0, 1], [1, 2, 1], 1),
    ("linear", (5, 17), (33, 17), [], [], [], 1),
    ("empty batch", (0, 5, 9, 9), (7, 5, 3, 3), [1, 1], [1, 1], [1, 1], 1),
]
convolutions = pytest.mark.parametrize("conv", CONVOLUTIONS, ids=lambda c: c[0])


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: tuple) -> Tensor:
    """The convolution by torch.nn.functional."""
    if weight.dim() == 2:
        return F.linear(x, weight, bias)
    return (F.conv1d, F.conv2d, F.conv3d)[weight.dim() - 3](x, weight, bias, *geometry)


def stock_layouts(tensor: Tensor) -> list[Tensor]:
    return [lay_out(tensor, layout) for layout in ("contiguous", "channels_last")]


def may_run_as_winograd(backend, layout, weight_size) -> bool:
    """Whether it is for `bnfast.winograd` to say."""
    return backend.name == "cpu" and layout == "channels_last" and len(weight_size) == 4


@convolutions
@usual_layouts
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16], ids=lambda d: str(d)[6:]
)
def test_conv_dgrad(backend, dtype, layout, conv):
    """Equation (12): dx from dz and W alone equals autograd's; every output_padding that a size can need."""
    _, size, weight_size, *geometry = conv
    weight = torch.randn(weight_size).mul(1 / math.sqrt(math.prod(weight_size[1:]))).to(dtype)
    x = torch.randn(size).to(dtype)

    def gradient(x, w, dz):
        x = x.requires_grad_()
        return torch.autograd.grad(convolve(x, w, None, geometry), x, dz)[0]

    dz = torch.randn(convolve(x.double(), weight.double(), None, geometry).shape).to(dtype)
    oracle = gradient(x.double(), weight.double(), dz.double())
    stock = [
        gradient(a, weight.clone(), b)
        for a, b in zip(stock_layouts(x), stock_layouts(dz), strict=True)
    ]
    weight_before = weight.clone()
    moved = [v.to(backend.device) for v in (lay_out(dz, layout), weight)]
    dx = backend.module.conv_dgrad(*moved, list(size[2:]), *geometry)
    assert dx.dtype == dtype
    terms = math.prod(weight_size) // weight_size[1]
    shape = (weight_size[2:], weight_size[1], size[2:])
    if may_run_as_winograd(backend, layout, weight_size) and winograd.serves_dgrad(
        dz, *shape, *geometry, native.cpu_capability()
    ):
        assert_close_as_winograd(dx, oracle, stock, "dx")
    else:
        assert_close_to_oracle(dx, oracle, stock, "dx", terms=terms)
    assert_bit_equal(moved[1].cpu(), weight_before, "weight")


@convolutions
@usual_layouts
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16], ids=lambda d: str(d)[6:]
)
def test_conv_fwd_reduce(backend, dtype, layout, conv):
    """Anchor f4: z is the convolution, and the statistics are those of z as it is stored, after rounding to its dtype."""
    _, size, weight_size, *geometry = conv
    weight = torch.randn(weight_size).mul(1 / math.sqrt(math.prod(weight_size[1:]))).to(dtype)
    x = (torch.randn(size) + 0.5).to(dtype)
    bias = torch.randn(weight_size[0]).to(dtype) if len(size) != 4 or size[1] % 2 else None
    oracle = convolve(
        x.double(), weight.double(), None if bias is None else bias.double(), geometry
    )
    stock = [convolve(a, weight, bias, geometry) for a in stock_layouts(x)]
    case = Case(tuple(oracle.shape), dtype, layout)
    t = on(backend, make_inputs(case))
    moved = [v if v is None else v.to(backend.device) for v in (lay_out(x, layout), weight, bias)]
    before = [v if v is None else v.clone() for v in moved]
    running = [v.clone() for v in statistics(t)]
    z, mean, m2, rstd = backend.module.conv_fwd_reduce(*moved, *geometry, *running, 0.1, 1e-5)
    assert z.dtype == dtype
    if may_run_as_winograd(backend, layout, weight_size) and winograd.serves(
        x, weight_size[2:], weight_size[0], *geometry, native.cpu_capability()
    ):
        assert_close_as_winograd(z, oracle, stock, "z")
    else:
        assert_close_to_oracle(z, oracle, stock, "z", terms=math.prod(weight_size[1:]))
    for now, then in zip(moved, before, strict=True):
        if now is not None:
            assert_bit_equal(now, then, "arguments of conv_fwd_reduce")

    class Returned:
        """The statistics that came with z, seen as a backend whose bn_fwd_reduce is to be checked."""

        device = backend.device

        class module:
            @staticmethod
            def bn_fwd_reduce(_, *buffers_and_options):
                for buffer, new in zip(buffers_and_options[:3], running, strict=True):
                    buffer.copy_(new)
                return mean, m2, rstd

    inputs = make_inputs(case)
    inputs.z = z.cpu()
    check_fwd_reduce(Returned, case, inputs)
