"""Chains that are run again from a recording: the same bits and the same memory as when each is decided anew, and decided anew as soon
as something is not what it was."""

import gc
import threading
import weakref

import pytest
import torch
from closeness import assert_bit_equal
from torch.utils.flop_counter import FlopCounterMode

import bnfast
from bnfast import native, ops, recording, weights, winograd

pytestmark = [
    pytest.mark.skipif(native.unavailable is not None, reason=str(native.unavailable)),
    pytest.mark.skipif(not recording.is_active, reason="BNFAST_RECORD is 0"),
]

LAST = torch.channels_last


@pytest.fixture(autouse=True)
def nothing_recorded():
    bnfast.clear_cache()
    yield
    bnfast.clear_cache()


def last(*size: int) -> torch.Tensor:
    return torch.randn(size).contiguous(memory_format=LAST)


def weight(*size: int) -> torch.Tensor:
    return last(*size) / (size[1] * size[2] * size[3]) ** 0.5


def unit(w: torch.Tensor | None, channels: int, **fields) -> ops.Unit:
    """With parameters and buffers of its own; 3x3 kernels keep the size."""
    pad = 0 if w is None else w.shape[2] // 2
    geometry = ((1, 1), (pad, pad), (1, 1))
    fields = (
        dict(zip(("stride", "padding", "dilation"), geometry, strict=True), act="relu") | fields
    )
    return ops.Unit(
        w,
        gamma=torch.rand(channels).requires_grad_(),
        beta=torch.randn(channels).requires_grad_(),
        running_mean=torch.zeros(channels),
        running_var=torch.ones(channels),
        num_batches_tracked=torch.tensor(0),
        **fields,
    )


def bottleneck() -> list[ops.Unit]:
    """A pooled stem, 1x1, 3x3 and 1x1 with a residual inside of the chain."""
    pool = ops.MaxPool((3, 3), (2, 2), (1, 1))
    return [
        unit(weight(16, 3, 3, 3), 16, pool=pool),
        unit(weight(16, 16, 1, 1), 16),
        unit(weight(16, 16, 3, 3), 16, stride=(2, 2), act="silu"),
        unit(weight(16, 16, 3, 3), 16, act="identity"),
        unit(weight(16, 16, 1, 1), 16, residual_source=2),
    ]


def inverted() -> list[ops.Unit]:
    """Expansion, depthwise, squeeze and excitation, projection."""
    squeeze = ops.SqueezeExcite(
        weight(6, 48, 1, 1), torch.randn(6), weight(48, 6, 1, 1), None, "silu"
    )
    return [
        unit(weight(48, 3, 1, 1), 48, act="silu"),
        unit(weight(48, 1, 3, 3), 48, act="silu", groups=48),
        unit(weight(24, 48, 1, 1), 24, act="identity", squeeze=squeeze),
    ]


def grouped_and_plain() -> list[ops.Unit]:
    """PyTorch's convolutions, and one without BatchNorm."""
    return [
        unit(weight(32, 3, 7, 7), 32, stride=(2, 2)),
        unit(weight(32, 8, 3, 3), 32, groups=4, act="hardswish"),
        unit(weight(32, 32, 3, 3), 32)._replace(normalize=False, act="identity"),
    ]


CHAINS = {"bottleneck": bottleneck, "inverted": inverted, "grouped": grouped_and_plain}


def step(units, x, low_memory=False):
    """(y, gradients of x and of all parameters, running statistics after it), from the same start each time."""
    for u in units:
        u.running_mean.fill_(0.25)
        u.running_var.fill_(1.5)
    x = x.detach().requires_grad_()
    y = ops.frozen_conv_bn_act(x, units, "cpu", low_memory)
    wanted = [x, *(t for u in units if u.normalize for t in (u.gamma, u.beta))]
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    grads = torch.autograd.grad(y, wanted, dy.contiguous(memory_format=LAST))
    return [
        y.detach(),
        *grads,
        *(t.clone() for u in units for t in (u.running_mean, u.running_var)),
    ]


def without_recording(monkeypatch, units, x, *args):
    with monkeypatch.context() as patch:
        patch.setattr(recording, "is_active", False)
        return step(units, x, *args)


def recordings() -> list:
    gc.collect()
    return [
        kind.recording
        for entry in weights._entries.values()
        for kind in entry.attached.values()
        if kind.recording is not None
    ]


def recorded(units, x, *args) -> None:
    step(units, x, *args)
    step(units, x, *args)
    assert len(recordings()) == 2, "forward and backward were not recorded"


def assert_same(actual, expected) -> None:
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert_bit_equal(a, e, f"result {i}")
        assert a.stride() == e.stride()


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", [LAST, torch.contiguous_format], ids=["last", "nchw"])
@pytest.mark.parametrize("name", CHAINS)
def test_the_same_bits(name, layout, dtype, low_memory, monkeypatch):
    units = CHAINS[name]()
    x = last(3, 3, 21, 18).contiguous(memory_format=layout)
    cast = [
        u
        if u.weight is None
        else u._replace(weight=u.weight.to(dtype).contiguous(memory_format=layout))
        for u in units
    ]
    x = x.to(dtype)
    expected = without_recording(monkeypatch, cast, x, low_memory)
    recorded(cast, x, low_memory)
    for _ in range(2):
        assert_same(step(cast, x, low_memory), expected)
    other = torch.randn_like(x) + 1
    assert_same(
        step(cast, other, low_memory), without_recording(monkeypatch, cast, other, low_memory)
    )


def test_evaluation_and_autocast(monkeypatch):
    units = [u._replace(use_batch_statistics=False) for u in bottleneck()]
    x = last(3, 3, 21, 18)

    def run(autocast):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return [ops.frozen_conv_bn_act(x, units, "cpu")]

    for autocast in (False, True):
        with monkeypatch.context() as patch:
            patch.setattr(recording, "is_active", False)
            expected = run(autocast)
        results = [run(autocast) for _ in range(4)]
        for result in results:
            assert_same(result, expected)
        units[2].running_mean.add_(1)  # is read at each call, no part of a recording
        assert not torch.equal(run(autocast)[0], expected[0])
        units[2].running_mean.sub_(1)
    assert len(recordings()) == 2


def test_another_weight_is_noticed(monkeypatch):
    """In place, behind autograd's back, put in its place, and at the same address."""
    units, x = bottleneck(), last(3, 3, 21, 18)
    for place in range(len(units)):
        for change in ("in place", "data", "replaced", "same memory"):
            recorded(units, x)
            w = units[place].weight
            if change == "in place":
                w.mul_(0.5)
            elif change == "data":
                w.data.mul_(0.5)
            elif change == "replaced":
                units[place] = units[place]._replace(weight=w * 0.5)
            else:
                units[place] = units[place]._replace(weight=w.detach())
            assert_same(step(units, x), without_recording(monkeypatch, units, x))
            bnfast.clear_cache()


def test_a_weight_changed_between_forward_and_backward(monkeypatch):
    """What is behind autograd's back is seen in the backward pass too."""
    units, x = bottleneck(), last(3, 3, 21, 18)

    def run():
        y = ops.frozen_conv_bn_act(x, units, "cpu")
        units[3].weight.data.mul_(2)
        gradient = torch.autograd.grad(y, units[0].gamma, y.detach().sin())
        units[3].weight.data.mul_(0.5)
        return gradient

    with monkeypatch.context() as patch:
        patch.setattr(recording, "is_active", False)
        expected = run()
    recorded(units, x)
    assert_same(run(), expected)


def test_other_inputs_are_decided_anew(monkeypatch):
    """Sizes, layouts, which gradients are asked for, and a residual that once was the input."""
    units, x = (
        [unit(weight(16, 16, 3, 3), 16), unit(weight(16, 16, 3, 3), 16, act="identity")],
        last(2, 16, 12, 12),
    )
    for residual in (x, last(2, 16, 12, 12), x.contiguous(), None, x):
        units[1] = units[1]._replace(
            residual=residual, act="identity" if residual is None else "relu"
        )
        for value in (x, last(2, 16, 12, 12), last(3, 16, 12, 12), x.contiguous()):
            if residual is not None and residual.shape != value.shape:
                continue
            expected = without_recording(monkeypatch, units, value)
            for _ in range(3):
                assert_same(step(units, value), expected)
    for frozen in (True, False, True):
        units[0].gamma.requires_grad_(not frozen)
        for _ in range(3):
            y = ops.frozen_conv_bn_act(x.requires_grad_(False), units, "cpu")
            y.backward(torch.ones_like(y))
        assert (units[0].gamma.grad is None) == frozen
        units[0].gamma.grad = None


def test_the_input_as_its_own_residual_is_not_any_residual(monkeypatch):
    units, x = [unit(weight(16, 16, 3, 3), 16)], last(2, 16, 12, 12)

    def run(residual):
        return [ops.frozen_conv_bn_act(x, [units[0]._replace(residual=residual)], "cpu").detach()]

    for _ in range(3):
        run(x)
    assert recordings()
    other = last(2, 16, 12, 12)
    with monkeypatch.context() as patch:
        patch.setattr(recording, "is_active", False)
        expected = run(other)
    assert_same(run(other), expected)


def test_the_way_of_a_convolution_is_asked_for_again(monkeypatch):
    units, x = [unit(weight(16, 16, 3, 3), 16)], last(2, 16, 12, 12)
    monkeypatch.setattr(winograd, "mode", "1")
    recorded(units, x)
    usual = step(units, x)
    monkeypatch.setattr(winograd, "mode", "0")
    assert not torch.equal(step(units, x)[0], usual[0])


def test_memory_is_that_of_the_units(monkeypatch):
    """Values go at their last use, in the call that records and in those behind it."""
    units = bottleneck()
    x = last(8, 3, 96, 96)

    def peak(run) -> int:
        gc.collect()
        native._C.clear_pool()
        before = native._C.pool_stats()["used"]
        run()
        return native._C.pool_stats()["most_used"] - before

    without_recording(monkeypatch, units, x)  # what weights are transformed to is made before
    usual = peak(lambda: without_recording(monkeypatch, units, x))
    for what in ("seen", "recorded", "run again"):
        assert 0 < peak(lambda: step(units, x)) <= usual, what
    assert len(recordings()) == 2


def test_it_goes_with_its_weights():
    units, x = bottleneck(), last(3, 3, 21, 18)
    recorded(units, x)
    forms = [weakref.ref(t) for entry in weights._entries.values() for t in entry.forms.values()]
    assert forms and recordings()
    del units
    gc.collect()
    assert not recordings() and not any(form() for form in forms)
    units = bottleneck()
    recorded(units, x)
    bnfast.clear_cache()
    assert not recordings()


def test_few_kinds_are_kept():
    units = [unit(weight(16, 16, 3, 3), 16)]
    for size in range(8, 40):
        for _ in range(3):
            ops.frozen_conv_bn_act(last(1, 16, size, 8), units, "cpu")
    assert len(recordings()) <= recording._MOST_KINDS


def test_who_looks_at_operators_sees_them(monkeypatch):
    units, x = grouped_and_plain(), last(3, 3, 21, 18)
    recorded(units, x)

    def counted() -> int:
        with FlopCounterMode(display=False) as counter:
            ops.frozen_conv_bn_act(x, units, "cpu")
        return counter.get_total_flops()

    seen = counted()
    monkeypatch.setattr(recording, "is_active", False)
    assert seen == counted()


def test_an_error_is_the_same_again():
    units = [unit(weight(16, 16, 3, 3), 16)]
    x = last(1, 16, 1, 1)
    for _ in range(4):
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            ops.frozen_conv_bn_act(x, units, "cpu")
    assert not recordings()


def test_threads_run_one_recording_at_once():
    units, x = bottleneck(), last(3, 3, 21, 18)
    units = [u._replace(use_batch_statistics=False) for u in units]
    with torch.no_grad():
        expected = [ops.frozen_conv_bn_act(x, units, "cpu") for _ in range(3)][-1]
        results = []

        def run():
            with torch.no_grad():
                results.extend(ops.frozen_conv_bn_act(x, units, "cpu") for _ in range(20))

        threads = [threading.Thread(target=run) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(results) == 80
    for result in results:
        assert_bit_equal(result, expected, "y")


def test_a_graph_that_is_kept_can_be_walked_again():
    units, x = bottleneck(), last(3, 3, 21, 18)
    recorded(units, x)
    y = ops.frozen_conv_bn_act(x, units, "cpu")
    dy = torch.randn_like(y)
    first = torch.autograd.grad(y, units[0].gamma, dy, retain_graph=True)
    assert_same(torch.autograd.grad(y, units[0].gamma, dy), first)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, units[0].gamma, dy)


@pytest.mark.parametrize("what", ["a tensor from elsewhere", "a value read", "tensors in a list"])
def test_what_cannot_be_recorded_is_not(what):
    """It runs as it is, each time, and is not tried for ever."""
    owner, elsewhere = torch.randn(4), torch.ones(4)

    def compute(inputs):
        if what == "a tensor from elsewhere":
            return [inputs[0] + elsewhere], None
        if what == "a value read":
            return [inputs[0] * float(inputs[0].sum())], None
        return [torch.cat([inputs[0], inputs[0]])], None

    for i in range(8):
        elsewhere.fill_(i)
        x = torch.randn(4)
        (y,), _ = recording.run(owner, "key", [x], compute)
        assert_bit_equal(y, compute([x])[0][0], "y")
    (kind,) = weights.attached(owner).values()
    assert kind.recording is None and kind.attempts == recording._MOST_ATTEMPTS
