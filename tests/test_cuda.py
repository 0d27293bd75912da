"""The CUDA kernels in the emulator, beyond what every backend's tests ask: schedules, traffic, widths, large offsets."""

import itertools
import os
import subprocess
import sys

import pytest
import torch
from cases import FULL, LAYOUTS, Case, cases, make_inputs, run_phases
from closeness import assert_bit_equal
from conftest import has_emulator
from cuda_emulator import build

from bench import cuda_traffic
from bnfast import cuda, native, reference

pytestmark = pytest.mark.skipif(
    not has_emulator(), reason="the emulator needs a C++ compiler and bnfast._C, and no GPU"
)

TENSORS = ("z", "dy", "residual", "y", "dz", "dresidual")
SCHEDULES = 20 if FULL else 3
SCHEDULE_CASES = [
    Case(shape, dtype, layout, "off_centre", act, residual, True, True, layout, layout)
    for (shape, act, residual), layout, dtype in itertools.product(
        (
            ((7, 33, 13, 11), "relu", True),
            ((5, 64, 12, 12), "relu", False),
            ((3, 130, 7, 7), "silu", True),
            ((4, 256, 8, 8), "relu6", True),
        ),
        ("contiguous", "channels_last"),
        (torch.float32, torch.bfloat16),
    )
]
if FULL:
    SCHEDULE_CASES += [c for c in cases() if torch.Size(c.shape).numel() <= 50_000]


@pytest.fixture
def phases():
    build.emulator()
    return cuda.phases(torch.ops.bnfast_emulated)


def both_in_one(phases, case: Case) -> dict[str, torch.Tensor]:
    """Outputs of the two phases in one, forward and backward."""
    t, act = make_inputs(case), case.act
    want_bits = case.residual and act in reference.BIT_ACTS
    mean, rstd, y, bits = phases.bn_fwd_reduce_apply(
        t.z, t.running_mean, t.running_var, t.num_batches_tracked, case.momentum, case.eps,
        t.gamma, t.beta, t.residual, act, case.slope, want_bits,
    )  # fmt: skip
    kept = (None, bits) if want_bits else (t.residual, None)
    found = phases.bn_bwd_reduce_apply(
        t.dy, t.z, mean, rstd, t.gamma, t.beta, *kept, act, case.slope, case.residual
    )
    return {f"both {i}": value for i, value in enumerate((mean, rstd, y, *found))}


@pytest.mark.parametrize("case", SCHEDULE_CASES, ids=lambda c: c.name)
def test_no_schedule_changes_a_bit(phases, case):
    """Blocks and threads in another order each time: the same bits, in every output of every phase."""
    emulator, results = build.emulator(), []
    for seed in range(SCHEDULES):
        emulator.seed(seed)
        results.append(run_phases(phases, case, make_inputs(case)) | both_in_one(phases, case))
    emulator.seed(0)
    for other, name in itertools.product(results[1:], results[0]):
        assert_bit_equal(other[name], results[0][name], name)


def widths(launch: dict, direction: str, names: tuple[str, ...]) -> set[int]:
    """Sizes in bytes of the accesses to these tensors."""
    found = set()
    for memory in launch["memory"]:
        if memory["name"] in names:
            found |= {int(size) for size in memory[f"{direction}_widths"]}
    return found


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_tensors_are_moved_16_bytes_at_once(phases, dtype, layout):
    """Where the channels (channels_last) or the pixels (NCHW) are a multiple of 16 bytes; moments look at three single values."""
    width = 16 // dtype.itemsize
    case = Case((3, 3 * width, 4, 2 * width), dtype, layout, "normal", "relu", True, True, True, layout, layout)  # fmt: skip
    emulator = build.emulator()
    emulator.clear_ledger()
    run_phases(phases, case, make_inputs(case))
    launches = emulator.ledger()
    assert [launch["kernel"] for launch in launches] == [
        f"{name}_kernel" for name in ("bn_fwd_reduce", "bn_fwd_apply", "bn_bwd_reduce", "bn_bwd_apply")
    ]  # fmt: skip
    for launch in launches:
        loads, stores = (widths(launch, d, TENSORS) for d in ("read", "write"))
        single = {dtype.itemsize} if launch["kernel"] == "bn_fwd_reduce_kernel" else set()
        assert loads == {16} | single, launch["kernel"]
        assert stores == (set() if "reduce" in launch["kernel"] else {16}), launch["kernel"]


@pytest.mark.parametrize("layout", list(cuda_traffic.LAYOUTS))
@pytest.mark.parametrize("kind", cuda_traffic.KINDS, ids=lambda kind: kind.name)
def test_traffic_is_that_of_two_passes(kind, layout):
    """Bytes at distinct addresses per phase: at most 1.02 of the floor."""
    both = cuda_traffic.run_unit(kind, cuda_traffic.LAYOUTS[layout])
    for ledger, floor in zip(both, cuda_traffic.floors(kind), strict=True):
        unique = sum(t.unique for t in cuda_traffic.traffic(ledger).values())
        assert floor <= unique <= 1.02 * floor


@pytest.mark.parametrize("layout", list(cuda_traffic.LAYOUTS))
@pytest.mark.parametrize(
    "kind",
    [kind for kind in cuda_traffic.KINDS if FULL or kind.name == "end"],
    ids=lambda kind: kind.name,
)
def test_traffic_on_chip_is_that_of_one_pass(kind, layout):
    """One kernel each way, where there is a dz: bytes at distinct addresses at most 1.02 of the floor, and no tensor moved twice."""
    shape, memory_format = cuda_traffic.ON_CHIP_SHAPE, cuda_traffic.LAYOUTS[layout]
    forward, backward = cuda_traffic.run_unit(kind, memory_format, shape, on_chip=True)
    assert [launch["kernel"] for launch in forward] == ["bn_fwd_reduce_apply_kernel"]
    both = "bn_bwd_reduce_apply_kernel" if kind.has_dgrad else "bn_bwd_reduce_kernel"
    assert [launch["kernel"] for launch in backward] == [both]
    for ledger, floor in zip((forward, backward), cuda_traffic.floors(kind, shape, True), strict=True):  # fmt: skip
        unique = sum(t.unique for t in cuda_traffic.traffic(ledger).values())
        whole = sum(
            16 * m[f"{direction}_widths"].get("16", 0)
            for m in ledger[0]["memory"]
            for direction in ("read", "write")
            if m["name"] in TENSORS
        )
        assert unique <= 1.02 * floor and whole <= floor, "a tensor is moved more than once"


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_offsets_past_two_to_the_31(phases, layout):
    """The blocks at both ends of grids over more than 2**31 elements, on memory of which only the touched pages exist."""
    channels, side, ends = 64, 8192, 2
    shape = (1, channels, side + 8, side // 2 * 2)
    z = torch.empty(shape, dtype=torch.bfloat16)
    if layout == "channels_last":
        z = torch.empty((1, side + 8, side, channels), dtype=torch.bfloat16).permute(0, 3, 1, 2)
    assert z.numel() > 2**31
    flat = z.as_strided((z.numel(),), (1,))
    edge = 1 << 16
    for part in (flat[:edge], flat[-edge:]):
        part.copy_(torch.randn(edge))
    mean, rstd = torch.randn(channels), torch.rand(channels) + 0.5
    emulator = build.emulator()
    emulator.only_ends(ends)
    try:
        y, bits = phases.bn_fwd_apply(z, mean, rstd, None, None, None, "relu", 0.0, True)
        dz, _ = phases.bn_bwd_apply(z, z, mean, rstd, None, None, None, bits, None, None, "relu", 0.0, False)  # fmt: skip
        if FULL or layout == "contiguous":  # a block of it has millions of elements to go through
            phases.bn_fwd_reduce(z, None, None, None, 0.1, 1e-5)
    finally:
        emulator.only_ends(0)
    for start in (0, z.numel() - 4096):
        at = torch.arange(start, start + 4096)
        c = at % channels if layout == "channels_last" else at // (z.numel() // channels)
        x = flat[start : start + 4096].float()
        pre = torch.addcmul(torch.zeros(()), x - mean[c], rstd[c])
        got_y, got_dz = (t.as_strided((t.numel(),), (1,))[start : start + 4096] for t in (y, dz))
        torch.testing.assert_close(got_y, pre.relu().bfloat16())
        torch.testing.assert_close(got_dz, torch.where(pre > 0, x * rstd[c], 0).bfloat16())


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "slice"])
def test_bits_are_a_bit_per_element(phases, layout):
    """... and a little where lines do not end with a byte."""
    for shape in ((3, 64, 8, 8), (2, 17, 5, 7)):
        case = Case(shape, torch.bfloat16, layout, residual=True)
        t = make_inputs(case)
        mean, rstd = torch.zeros(shape[1]), torch.ones(shape[1])
        _, bits = phases.bn_fwd_apply(t.z, mean, rstd, None, None, t.residual, "relu", 0.0, True)
        elements = t.z.numel()
        assert bits.numel() == native.bit_bytes(t.z, on_cuda=True), "what torch.compile is told"
        assert elements / 8 <= bits.numel() <= 2.5 * elements / 8
        if shape[1] == 64:
            assert bits.numel() == elements // 8


def test_running_statistics_without_memory_of_their_own(phases):
    """Buffers that are views with strides are updated like others."""
    z = torch.randn(4, 10, 6, 6) + 3
    plain = torch.zeros(10), torch.ones(10)
    strided = torch.zeros(20)[::2], torch.ones(20)[1::2]
    for mean, var in (plain, strided):
        phases.bn_fwd_reduce(z, mean, var, torch.tensor(0), 0.1, 1e-5)
    for a, b in zip(plain, strided, strict=True):
        assert_bit_equal(a, b, "running statistics")


def test_wrong_arguments_are_named(phases):
    z, one = torch.randn(2, 8, 4, 4), torch.ones(8)
    rest = (None, None, None, "relu", 0.0, False)
    with pytest.raises(RuntimeError, match=r"mean is of shape \[7\]"):
        phases.bn_fwd_apply(z, torch.ones(7), one, *rest)
    with pytest.raises(RuntimeError, match=r"z is (Long|int64)"):
        phases.bn_fwd_apply(z.long(), one, one, *rest)
    with pytest.raises(RuntimeError, match="residual is"):
        phases.bn_fwd_apply(z, one, one, None, None, z[:1], "relu", 0.0, False)
    with pytest.raises(RuntimeError, match="act is 'gelu'"):
        phases.bn_fwd_apply(z, one, one, None, None, None, "gelu", 0.0, False)
    with pytest.raises(RuntimeError, match="bits holds 3 bytes"):
        bits = torch.zeros(3, dtype=torch.uint8)
        phases.bn_bwd_reduce(z, z, one, one, None, None, None, bits, "relu", 0.0)


@pytest.mark.slow
@pytest.mark.skipif(not FULL, reason="a build of its own: BNFAST_FULL_TESTS=1 runs it")
def test_under_address_sanitizer():
    """One step of every small case with AddressSanitizer in place of the emulator's own watch."""
    libraries = [
        subprocess.run([build.compiler(), f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]  # fmt: skip
    env = {
        **os.environ,
        "BNFAST_EMULATOR_WATCH": "asan",
        "BNFAST_FULL_TESTS": "0",
        "LD_PRELOAD": ":".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0:alloc_dealloc_mismatch=0",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_backends.py", "-k", "cuda"]  # fmt: skip
    done = subprocess.run(command, cwd=build.ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_names_of_the_phases():
    """The operators that C++ implements are the reference's functions."""
    for name in native.BN_PHASES:
        assert callable(getattr(reference, name))
