"""torch.compile(fullgraph=True) of converted models: one graph forward and backward, the same results as without it.

BNFAST_FULL_TESTS=1 adds inductor on a torchvision ResNet-18, which takes about a minute.
"""

import copy
from collections.abc import Iterator

import pytest
import torch
from cases import FULL
from torch import Tensor, nn
from torch.nn import functional as F

import bnfast
from bnfast.nn import FrozenConvBNAct2d


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Nothing compiled before is left, and nothing stays."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def one_step(run, model: nn.Module, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Logits, gradients, and running statistics after one forward and backward pass, by name."""
    model.zero_grad()
    x = x.detach().clone().requires_grad_()
    logits = run(x)
    F.cross_entropy(logits, labels).backward()
    found = {"logits": logits.detach(), "dx": x.grad}
    found |= {f"grad of {n}": p.grad for n, p in model.named_parameters() if p.requires_grad}
    return found | {n: b.clone() for n, b in model.named_buffers()}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], rtol: float) -> None:
    assert actual.keys() == expected.keys()
    largest = max(t.abs().max().item() for n, t in expected.items() if n.startswith("grad"))
    for name, value in expected.items():
        atol = rtol * (largest if name.startswith("grad") else 1 + value.abs().max().item())
        torch.testing.assert_close(
            actual[name], value, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


def assert_compiles(model: nn.Module, compiler: str) -> None:
    """One training step of the converted model, compiled, then one of SGD and another step; float64."""
    model = bnfast.convert(model.double())
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, fullgraph=True, backend=compiler)
    for _ in range(2):
        x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
        labels = torch.randint(10, (4,))
        expected = one_step(model, model, x, labels)
        assert_same(one_step(compiled, twin, x, labels), expected, rtol=1e-9)
        for module in (model, twin):
            with torch.no_grad():
                for parameter in bnfast.affine_parameters(module):
                    parameter -= 0.1 * parameter.grad


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_small_resnet(compiler):
    assert_compiles(bnfast.models.create("resnet14"), compiler)


@pytest.mark.parametrize(
    "compiler",
    [
        "aot_eager",
        pytest.param(
            "inductor",
            marks=[
                pytest.mark.slow,
                pytest.mark.skipif(not FULL, reason="takes a minute; BNFAST_FULL_TESTS=1 runs it"),
            ],
        ),
    ],
)
def test_torchvision_resnet18(compiler):
    torchvision = pytest.importorskip("torchvision")
    assert_compiles(torchvision.models.resnet18(num_classes=10), compiler)


def test_graph_holds_the_phases():
    """What is captured are the operators of the backend: nothing falls back to PyTorch's own batch_norm."""
    if bnfast.backends()["cpu"] is not True:
        pytest.skip(f"backend cpu: {bnfast.backends()['cpu']}")
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    names = {"forward": set(), "backward": set()}

    def recorder(which):
        def compiler(graph, inputs):
            calls = [n for n in graph.graph.nodes if n.op == "call_function"]
            # An operator that writes to an argument (running statistics) is the argument of a wrapper.
            names[which] |= {str(f) for n in calls for f in (n.target, *n.args[:1])}
            return make_boxed_func(graph.forward)

        return compiler

    recording = aot_autograd(fw_compiler=recorder("forward"), bw_compiler=recorder("backward"))
    unit = FrozenConvBNAct2d(3, 8, 3, padding=1)
    x = torch.randn(2, 3, 6, 7).requires_grad_()
    y = torch.compile(unit, fullgraph=True, backend=recording)(x)
    y.backward(torch.randn_like(y))
    phases = {
        w: {n.split(".")[1] for n in found if n.startswith("bnfast.")} for w, found in names.items()
    }
    assert phases == {
        "forward": {"conv_forward", "bn_fwd_reduce_apply"},
        "backward": {"bn_bwd_reduce_apply", "conv_dgrad"},
    }
    assert not any(
        "batch_norm" in n or "convolution" in n for found in names.values() for n in found
    )


def test_modes_and_unfreezing_are_guarded(backend):
    """A compiled unit follows train(), eval() and requires_grad_() as the plain one does: it is compiled again."""
    if backend.interpreted:
        pytest.skip("Triton's interpreter cannot be traced")
    unit = FrozenConvBNAct2d(3, 4, 3, padding=1, act="silu").double()
    twin = copy.deepcopy(unit)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")

    def check() -> None:
        x = torch.randn(2, 3, 5, 6, dtype=torch.float64)
        residual, dy = torch.randn(2, 2, 4, 5, 6, dtype=torch.float64)
        with bnfast.use_backend(backend.name):
            found = []
            for run, module in ((compiled, twin), (unit, unit)):
                module.zero_grad()
                own = x.clone().requires_grad_()
                y = run(own, residual)
                y.backward(dy)
                grads = {
                    f"grad of {n}": p.grad for n, p in module.named_parameters() if p.requires_grad
                }
                buffers = {n: b.clone() for n, b in module.named_buffers()}
                found.append({"y": y.detach(), "dx": own.grad} | grads | buffers)
        assert_same(*found, rtol=1e-10)

    check()
    for module in (unit, twin):
        module.eval()
    check()
    for module in (unit, twin):
        module.train().conv.requires_grad_()
    check()


def test_same_tensor_as_input_and_residual():
    unit = FrozenConvBNAct2d(4, 4, 3, padding=1).double()
    x, dy = torch.randn(2, 2, 4, 5, 6, dtype=torch.float64)
    compiled = torch.compile(unit, fullgraph=True, backend="aot_eager")
    grads = []
    for run in (unit, compiled):
        own = x.clone().requires_grad_()
        run(own, own).backward(dy)
        grads.append(own.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-10, atol=1e-10)


def test_autocast():
    """Autocast around a compiled model; bf16 within what the fused and the split rounding of PyTorch differ by."""
    unit = FrozenConvBNAct2d(3, 8, 3, padding=1)
    twin = copy.deepcopy(unit)
    x = torch.randn(4, 3, 6, 7)
    results = []
    for module, run in (
        (unit, unit),
        (twin, torch.compile(twin, fullgraph=True, backend="aot_eager")),
    ):
        own = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = run(own)
        assert y.dtype == torch.bfloat16
        y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y))
        results.append((y.detach(), own.grad, module.bn.weight.grad))
    for actual, expected in zip(*results[::-1], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-2, atol=1e-2)


def test_no_break_and_one_graph():
    """torch._dynamo's own count for a converted net, forward: one graph, no break."""
    model = bnfast.convert(bnfast.models.create("resnet8"))
    report = torch._dynamo.explain(model)(torch.randn(2, 3, 16, 16))
    assert (report.graph_count, report.graph_break_count) == (1, 0), report.break_reasons
