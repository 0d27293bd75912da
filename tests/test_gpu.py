"""What only a GPU shows: graphs, streams, synchronisation, offsets past 2^31, training. `pytest -m gpu` runs these alone; every
backend's own tests run on the GPU too where there is one. Without one all of them skip, after their imports."""

import copy

import pytest
import torch
import torch.nn.functional as F
from closeness import assert_bit_equal
from torch import nn

import bnfast
from bnfast import dispatch, reference
from bnfast.nn import FrozenConvBNAct2d

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no GPU"),
]


def make_unit(dtype: torch.dtype = torch.float32) -> FrozenConvBNAct2d:
    unit = FrozenConvBNAct2d(16, 24, 3, padding=1, act="relu").to("cuda", dtype)
    return unit.to(memory_format=torch.channels_last)


def make_input(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = torch.randn(4, 16, 14, 10, device="cuda", dtype=dtype) * 2 + 1
    return x.contiguous(memory_format=torch.channels_last)


def step(unit: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> list[torch.Tensor]:
    """Output and gradients of one training step."""
    x = x.detach().requires_grad_()
    y = unit(x)
    wanted = [x, *(p for p in unit.parameters() if p.requires_grad)]
    return [y.detach(), *torch.autograd.grad(y, wanted, dy)]


def test_auto_takes_compiled_kernels_first():
    expected = "cuda" if dispatch.backends()["cuda"] is True else "triton"
    assert dispatch.pick("auto", torch.device("cuda")) == expected


def named(name: str) -> str:
    """The name of a backend that is there; skips the test with the reason where it is not."""
    available = dispatch.backends()[name]
    if available is not True:
        pytest.skip(f"backend {name}: {available}")
    return name


@pytest.fixture(params=["cuda", "triton"])
def gpu_backend(request):
    """Both backends for GPUs, each as the one that all calls use."""
    with dispatch.use_backend(named(request.param)):
        yield request.param


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("name", ["resnet20", "resnet56"])
def test_training_stays_with_plain_pytorch(gpu_backend, name, memory_format):
    """Five steps in float64: losses, affine parameters and statistics are those of the unconverted model."""
    plain = bnfast.freeze(bnfast.models.create(name).double()).cuda().train()
    ours = bnfast.convert(copy.deepcopy(plain), memory_format=memory_format)
    x = torch.randn(8, 3, 32, 32, device="cuda", dtype=torch.float64)
    target = torch.randint(0, 10, (8,), device="cuda")
    for model in (plain, ours):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(5):
            optimizer.zero_grad()
            F.cross_entropy(model(x), target).backward()
            optimizer.step()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-7, atol=1e-9, msg=name)


def test_bfloat16_autocast_trains(gpu_backend):
    model = bnfast.convert(bnfast.freeze(bnfast.models.create("resnet20").cuda().train()))
    x = torch.randn(8, 3, 32, 32, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        loss = F.cross_entropy(model(x), torch.randint(0, 10, (8,), device="cuda"))
    loss.backward()
    found = [p.grad for p in model.parameters() if p.requires_grad]
    assert found and all(g is not None and g.isfinite().all() for g in found)


def test_no_synchronisation(gpu_backend):
    """A step waits for nothing on the host, once weights are in their forms and kernels compiled."""
    unit, x = make_unit(), make_input()
    dy = torch.randn_like(unit(x))
    step(unit, x, dy)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(unit, x, dy)
    finally:
        torch.cuda.set_sync_debug_mode(before)


def test_side_stream(gpu_backend):
    unit, x = make_unit(), make_input()
    dy = torch.randn_like(unit(x))
    expected = step(copy.deepcopy(unit), x, dy)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = step(copy.deepcopy(unit), x, dy)
    torch.cuda.current_stream().wait_stream(stream)
    for i, (actual, value) in enumerate(zip(found, expected, strict=True)):
        assert_bit_equal(actual, value, f"result {i}")


def test_cuda_graph(gpu_backend):
    """Captured once, replayed on new values: the bits of the ordinary call."""
    unit, x = make_unit(), make_input()
    dy = torch.randn_like(unit(x))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(unit, x, dy)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(unit, x, dy)
    x.copy_(make_input())
    expected = step(copy.deepcopy(unit), x, dy)
    graph.replay()
    for i, (actual, value) in enumerate(zip(captured, expected, strict=True)):
        assert_bit_equal(actual, value, f"result {i}")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="PyTorch sees fewer than two GPUs")
def test_the_device_of_the_tensors_counts(gpu_backend):
    unit, x = make_unit(), make_input()
    dy = torch.randn_like(unit(x))
    expected = step(unit, x, dy)
    found = step(copy.deepcopy(unit).to("cuda:1"), x.to("cuda:1"), dy.to("cuda:1"))
    for actual, value in zip(found, expected, strict=True):
        torch.testing.assert_close(actual.cpu(), value.cpu())


def test_compile_captures_the_whole_step(gpu_backend):
    unit, x = make_unit(), make_input()
    dy = torch.randn_like(unit(x))
    expected = step(copy.deepcopy(unit), x, dy)
    compiled = torch.compile(copy.deepcopy(unit), fullgraph=True)
    for actual, value in zip(step(compiled, x, dy), expected, strict=True):
        torch.testing.assert_close(actual, value)


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=str)
def test_offsets_past_32_bits(gpu_backend, memory_format):
    """More than 2^31 elements: the last image, which only 64-bit offsets reach, is what it is on its own."""
    phases = dispatch.module(gpu_backend)
    channels, side = 64, 1024
    images = 2**31 // (channels * side * side) + 2
    needed = 4 * 2 * images * channels * side * side
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free GPU memory")
    z = torch.empty(
        (images, channels, side, side),
        dtype=torch.bfloat16,
        device="cuda",
        memory_format=memory_format,
    )
    generator = torch.Generator("cuda").manual_seed(0)
    for image in z:
        image.normal_(generator=generator)
    mean, m2, rstd = phases.bn_fwd_reduce(z, None, None, None, 0.1, 1e-5)
    sums = torch.zeros(2, channels, dtype=torch.float64, device="cuda")
    for image in z:
        wide = image.double()
        sums += torch.stack([wide.sum((1, 2)), wide.square().sum((1, 2))])
    count = images * side * side
    torch.testing.assert_close(mean.double(), sums[0] / count, rtol=0, atol=1e-6)
    torch.testing.assert_close(m2.double(), sums[1] - sums[0] ** 2 / count, rtol=1e-5, atol=0)
    y, _ = phases.bn_fwd_apply(z, mean, rstd, None, None, None, "relu", 0.0, False)
    last = z[-1:].clone(memory_format=memory_format)
    expected, _ = reference.bn_fwd_apply(last, mean, rstd, None, None, None, "relu", 0.0, False)
    torch.testing.assert_close(y[-1:], expected)


def test_two_streams_at_once():
    """Reductions on several streams at the same time do not share counters."""
    phases = dispatch.module(named("cuda"))
    inputs = [torch.randn(16, 64, 56, 56, device="cuda") + i for i in range(4)]
    expected = [phases.bn_fwd_reduce(z, None, None, None, 0.1, 1e-5) for z in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    for _ in range(20):
        found = []
        for stream, z in zip(streams, inputs, strict=True):
            with torch.cuda.stream(stream):
                found.append(phases.bn_fwd_reduce(z, None, None, None, 0.1, 1e-5))
        torch.cuda.synchronize()
        for actual, wanted in zip(found, expected, strict=True):
            for a, w in zip(actual, wanted, strict=True):
                assert_bit_equal(a, w, "moments on a stream of their own")


def test_cuda_launches_two_kernels_each_way():
    """Forward and backward of a unit's BatchNorm side, memory operations included; one each where the tensor stays on chip, which
    it can from compute capability 9.0 on."""
    phases = dispatch.module(named("cuda"))
    z, dy = (torch.randn(8, 64, 28, 28, device="cuda") for _ in range(2))
    gamma, beta = torch.rand(2, 64, device="cuda")
    buffers = (torch.zeros(64, device="cuda"), torch.ones(64, device="cuda"))
    tracked = torch.tensor(0, device="cuda")

    def step():
        mean, rstd, _, _ = phases.bn_fwd_reduce_apply(
            z, *buffers, tracked, 0.1, 1e-5, gamma, beta, None, "relu", 0.0, False
        )
        phases.bn_bwd_reduce_apply(dy, z, mean, rstd, gamma, beta, None, None, "relu", 0.0, False)

    step()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step()
        torch.cuda.synchronize()
    names = [event.name for event in profile.events() if event.device_type.name == "CUDA"]
    expected = 2 if torch.cuda.get_device_capability() >= (9, 0) else 4
    assert len(names) == expected and all("bn_" in name for name in names), names


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=str)
def test_on_chip_is_bit_equal_to_two_passes(memory_format):
    """Clusters of blocks (from compute capability 9.0 on) give the bits of the two phases one after the other."""
    phases = dispatch.module(named("cuda"))
    for shape in ((8, 256, 28, 28), (32, 512, 14, 14), (4, 2048, 7, 7)):
        z, dy, r = (
            torch.randn(shape, device="cuda", dtype=torch.bfloat16).to(memory_format=memory_format)
            for _ in range(3)
        )
        gamma, beta = torch.rand(2, shape[1], device="cuda")
        mean, _, rstd = phases.bn_fwd_reduce(z, None, None, None, 0.1, 1e-5)
        y, bits = phases.bn_fwd_apply(z, mean, rstd, gamma, beta, r, "relu", 0.0, True)
        state = (dy, z, mean, rstd, gamma, beta, None, bits)
        sums = phases.bn_bwd_reduce(*state, "relu", 0.0)
        expected = (mean, rstd, y, bits, *sums)
        expected += phases.bn_bwd_apply(*state, *sums, "relu", 0.0, True)
        found = phases.bn_fwd_reduce_apply(
            z, None, None, None, 0.1, 1e-5, gamma, beta, r, "relu", 0.0, True
        )
        found += phases.bn_bwd_reduce_apply(*state, "relu", 0.0, True)
        for i, (actual, wanted) in enumerate(zip(found, expected, strict=True)):
            assert_bit_equal(actual, wanted, f"result {i} on {shape}")
