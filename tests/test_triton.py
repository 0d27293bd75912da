"""The Triton backend beyond what every backend is tested for: tiles and splits, the interpreter's patched cast, refusals."""

import os
import subprocess
import sys
from pathlib import Path

import conftest
import pytest
import torch

import bnfast
from bnfast import dispatch, reference

if dispatch.backends()["triton"] is not True:
    pytest.skip(str(dispatch.backends()["triton"]), allow_module_level=True)

import test_backends
import triton
import triton.language as tl
import triton_interpreter
from bnfast.triton_kernels import activation, bn_fwd, conv, conv_fwd, launch, layout

from bench import triton_traffic
from bnfast import triton_kernels

ROOT = Path(__file__).resolve().parent.parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def cast_kernel(x_ptr, y_ptr, COUNT: tl.constexpr):
    offs = tl.arange(0, COUNT)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs).to(y_ptr.dtype.element_ty))


def test_float32_to_bfloat16_rounds_to_nearest_even():
    """Ties, subnormals, overflow to infinity, NaN: as PyTorch casts."""
    bits = torch.randint(-(2**31), 2**31, (4096,), dtype=torch.int64).to(torch.int32)
    bits[:1024] = (bits[:1024] & ~0xFFFF) | 0x8000
    x = bits.view(torch.float32)
    x[:4] = torch.tensor([3.4e38, float("inf"), float("nan"), 1e-40])
    y = torch.empty(4096, dtype=torch.bfloat16, device=DEVICE)
    cast_kernel[(1,)](x.to(DEVICE), y, 4096)
    expected = x.to(torch.bfloat16)
    assert torch.equal(y.cpu().isnan(), expected.isnan())
    assert torch.equal(y.cpu().nan_to_num(0), expected.nan_to_num(0))


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=str)
def test_many_small_tiles(memory_format, monkeypatch):
    """Tiles far smaller than the tensor, more splits than fit evenly, ragged in N, C and H W at once: as one large tile."""
    shape = (3, 21, 7, 9)
    z = (torch.randn(shape) * 2 + 50).to(DEVICE).contiguous(memory_format=memory_format)
    dy, residual = torch.randn_like(z), torch.randn_like(z)
    gamma, beta = torch.randn(2, 21, device=DEVICE)

    def run(module):
        mean, rstd, y, bits = module.bn_fwd_reduce_apply(
            z, None, None, None, 0.1, 1e-5, gamma, beta, residual, "relu", 0.0, True
        )
        state = (dy, z, mean, rstd, gamma, beta, None, bits, "relu", 0.0, True)
        return mean, rstd, y, *module.bn_bwd_reduce_apply(*state)

    expected = run(reference)
    monkeypatch.setattr(layout, "SLAB", 0)
    for tile, splits, least in (
        (64, 128, 1),
        (16, 5, 1),
        (128, 1, 1),
        (4096, 128, 64),
        (32, 128, 64),
    ):
        monkeypatch.setattr(layout, "TILE", tile)
        monkeypatch.setattr(layout, "REDUCED_TILE", tile)
        monkeypatch.setattr(layout, "MOST_SPLITS", splits)
        monkeypatch.setattr(layout, "LEAST_VALUES", least)
        names = ("mean", "rstd", "y", "dgamma", "dbeta", "dz", "dresidual")
        for name, a, e in zip(names, run(triton_kernels), expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4, msg=f"{name}, tile {tile}")


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=str)
def test_means_of_splits_far_from_zero(memory_format, monkeypatch):
    """At 100,000 float32 has no digit for how far the splits' means are apart; the squares between them need some."""
    monkeypatch.setattr(layout, "SLAB", 0)
    monkeypatch.setattr(layout, "REDUCED_TILE", 64)
    monkeypatch.setattr(layout, "LEAST_VALUES", 1)
    z = (torch.randn(9, 5, 7, 11) + 1e5).to(DEVICE).contiguous(memory_format=memory_format)
    found = triton_kernels.bn_fwd_reduce(z, None, None, None, 0.1, 1e-5)
    expected = reference.bn_fwd_reduce(z.double(), None, None, None, 0.1, 1e-5)
    for name, a, e in zip(("mean", "m2", "rstd"), found, expected, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-6, atol=0, msg=name)


@pytest.mark.parametrize("shape", [(64, 16, 32, 32), (3, 1000, 7, 7), (2, 3, 224, 224), (9, 5)])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=str)
def test_splits_cover_every_tile_once(shape, memory_format):
    z = torch.empty(shape, device="meta")
    z = z.contiguous(memory_format=memory_format) if z.dim() == 4 else z
    view = layout.view_of(z)
    split = layout.split_of(view)
    if view.channel_is_column:
        tiles = -(-view.rows // split.rows)
        assert split.blocks * split.columns >= view.channels
    else:
        tiles = view.rows // view.channels * -(-view.columns // split.columns)
        assert split.blocks * split.rows >= view.channels
    assert (split.splits - 1) * split.per_split < tiles <= split.splits * split.per_split
    assert split.splits <= layout.MOST_SPLITS
    assert split.rows * split.columns <= layout.REDUCED_TILE
    assert view.count * view.channels == z.numel()


@pytest.mark.parametrize(
    "shape, memory_format, element_size, tensors, expected",
    [
        ((8, 64, 8, 16), torch.channels_last, 4, 1, (1024, 8, 8, 8)),
        ((8, 64, 8, 16), torch.channels_last, 2, 1, (1024, 16, 4, 16)),
        ((8, 65, 8, 16), torch.channels_last, 2, 2, (1024, 8, 9, 16)),  # half a sector: two are too many
        ((16, 64, 8, 16), torch.channels_last, 4, 1, (2048, 8, 8, 16)),
        ((16, 64, 8, 16), torch.channels_last, 4, 2, None),
        ((2049, 64), torch.contiguous_format, 4, 1, None),
        ((3, 5, 7, 7), torch.channels_last, 4, 2, (256, 8, 1, 4)),
        ((3, 5, 7, 7), torch.contiguous_format, 4, 2, (4, 64, 5, 4)),
        ((64, 5, 16, 16), torch.contiguous_format, 2, 1, (64, 256, 5, 16)),
        ((65, 5, 16, 16), torch.contiguous_format, 2, 1, None),
        ((0, 5, 4, 4), torch.contiguous_format, 4, 1, None),
    ],
)  # fmt: skip
def test_what_fits_on_chip(shape, memory_format, element_size, tensors, expected):
    z = torch.empty(shape, device="meta")
    z = z.contiguous(memory_format=memory_format) if z.dim() == 4 else z
    assert layout.slab_of(layout.view_of(z), element_size, tensors) == expected


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("shape", [(1, 9, 45, 45), (2, 3, 90, 91), (7, 11, 12, 13)])
def test_channels_on_chip(shape, memory_format, momentum):
    """One kernel each way, at and near what fits, far from 0: against float64, and running statistics counted once."""
    z = (torch.randn(shape) * 2 + 1e3).to(DEVICE).contiguous(memory_format=memory_format)
    dy = torch.randn_like(z)
    channels = shape[1]
    gamma, beta = torch.randn(2, channels, device=DEVICE)

    def run(module, cast):
        stats = (
            torch.zeros(channels, device=DEVICE, dtype=cast(z).dtype),
            torch.ones(channels, device=DEVICE, dtype=cast(z).dtype),
            torch.tensor(4, device=DEVICE),
        )
        affine = (cast(gamma), cast(beta))
        mean, rstd, y, _ = module.bn_fwd_reduce_apply(
            cast(z), *stats, momentum, 1e-5, *affine, None, "silu", 0.0, False
        )
        state = (cast(dy), cast(z), mean, rstd, *affine, None, None, "silu", 0.0, False)
        *sums, dz, _ = module.bn_bwd_reduce_apply(*state)
        return mean, rstd, y, *sums, dz, *stats

    expected = run(reference, torch.Tensor.double)
    names = ("mean", "rstd", "y", "dgamma", "dbeta", "dz", "running_mean", "running_var", "tracked")
    for name, a, e in zip(names, run(triton_kernels, lambda t: t), expected, strict=True):
        scale = e.abs().max().item() if name in ("dgamma", "dbeta") else 1.0
        torch.testing.assert_close(a.double(), e.double(), rtol=1e-4, atol=1e-4 * scale, msg=name)


def test_offsets_are_wide_before_a_tile_behind_the_end_leaves_32_bits():
    view = layout.View(2**20, 2**10, 2**10, True, 2**20)
    assert layout.is_wide(view) and not layout.is_wide(view._replace(rows=2**20 - 1))


@triton.jit
def reduced_tile_kernel(
    at_ptr, mask_ptr, n_ptr, tile, rows, columns, channels,
    CHANNEL_IS_COLUMN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    c = tl.arange(0, BLOCK_C if CHANNEL_IS_COLUMN else BLOCK_R)
    at, mask, n, _, _ = bn_fwd.reduced_tile(
        tile, c, rows, columns, channels, CHANNEL_IS_COLUMN, True, BLOCK_R, BLOCK_C
    )
    place = tl.arange(0, BLOCK_R)[:, None] * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    tl.store(at_ptr + place, at)
    tl.store(mask_ptr + place, mask.to(tl.int8))
    tl.store(n_ptr + tl.arange(0, 1), n)


@pytest.mark.parametrize(
    "tile, rows, columns, channel_is_column, n",
    [
        (2**27, 2**31 + 5, 8, True, 5),  # the last rows
        (2**27 + 1, 2**31 + 5, 8, True, 0),  # behind them
        (2**21 + 3, 2**25, 2**6, False, 8),  # pixels 24 to 31 of an image
        (2**28 + 1, 2**31 + 16, 8, False, 8),  # the last image
        (2**28 + 2, 2**31 + 16, 8, False, 0),
    ],
)
def test_offsets_past_32_bits(tile, rows, columns, channel_is_column, n):
    """Of one tile alone, as a launch of its program would compute them: no tensor is that large."""
    block_r, block_c = (16, 8) if channel_is_column else (8, 8)
    at = torch.empty(block_r, block_c, dtype=torch.int64, device=DEVICE)
    mask = torch.empty(block_r, block_c, dtype=torch.int8, device=DEVICE)
    count = torch.empty(1, dtype=torch.int64, device=DEVICE)
    reduced_tile_kernel[(1,)](
        at, mask, count, tile, rows, columns, 8, channel_is_column, block_r, block_c
    )
    if channel_is_column:
        r, column = tile * block_r + torch.arange(block_r), torch.arange(block_c)
    else:
        image, pixel = divmod(tile * block_c, columns)
        r, column = image * 8 + torch.arange(block_r), pixel + torch.arange(block_c)
    expected = r[:, None] * columns + column[None, :]
    assert torch.equal(at.cpu(), expected)
    assert torch.equal(mask.cpu().bool(), (r < rows)[:, None].expand(block_r, block_c))
    assert count.item() == n


@pytest.mark.parametrize("value", [0.1, 1e-5, 1e-3, 0.9, 1.0, 0.0, 1e-30])
def test_float64_arguments_come_as_three(value):
    parts = torch.tensor(launch.three(value), dtype=torch.float32).double()
    assert parts.sum().item() == value


def test_unsupported_dtype_is_named():
    z = torch.zeros(2, 3, 4, 4, dtype=torch.int32)
    with pytest.raises(TypeError, match=r"z is torch.int32; allowed are torch.float32"):
        triton_kernels.bn_fwd_apply(z, z, z, None, None, None, "relu", 0.0, False)


def test_meta_tensors_are_refused():
    x = torch.randn(2, 3, 4, 4, device="meta")
    with (
        bnfast.use_backend("triton"),
        pytest.raises(RuntimeError, match="backend 'triton' serves tensors on a GPU; x is on meta"),
    ):
        bnfast.nn.BatchNormAct2d(3).to("meta")(x)


fused_convolutions = pytest.mark.parametrize(
    "case", [c for c in test_backends.CONVOLUTIONS if len(c[1]) == 4], ids=lambda c: c[0]
)
dtypes = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float64], ids=lambda d: str(d)[6:]
)


@fused_convolutions
@dtypes
@pytest.mark.parametrize(
    "check", [test_backends.test_conv_fwd_reduce, test_backends.test_conv_dgrad]
)
def test_fused_convolution(case, dtype, check, monkeypatch):
    """What every backend's convolutions are tested for, with those that the kernel can take forced to go through it."""
    monkeypatch.setattr(conv, "route", "fused")
    backend = conftest.Backend("triton", triton_kernels, torch.device(DEVICE))
    check(backend, dtype, "channels_last", case)


def test_fused_moments_of_many_tiles(monkeypatch):
    """Several tiles per split, several splits, ragged in pixels and channels, far from 0: those of the stored z."""
    monkeypatch.setattr(conv, "route", "fused")
    monkeypatch.setattr(conv_fwd, "BLOCK_M", 16)
    monkeypatch.setattr(conv_fwd, "plan", conv_fwd.plan.__wrapped__)
    monkeypatch.setattr(conv_fwd, "MOST_SPLITS", 5)
    monkeypatch.setattr(conv_fwd, "LEAST_VALUES", 1)
    x = torch.randn(3, 18, 7, 9).contiguous(memory_format=torch.channels_last).to(DEVICE)
    weight, bias = (
        torch.randn(21, 18, 3, 3, device=DEVICE) / 13,
        torch.full((21,), 1e3, device=DEVICE),
    )
    geometry = ([1, 1], [1, 1], [1, 1], 1)
    z, mean, m2, rstd = triton_kernels.conv_fwd_reduce(
        x, weight, bias, *geometry, None, None, None, 0.1, 1e-5
    )
    expected = reference.bn_fwd_reduce(z.double(), None, None, None, 0.1, 1e-5)
    for a, e in zip((mean, m2, rstd), expected, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-5, atol=0)


def test_unknown_route_is_named(monkeypatch):
    monkeypatch.setenv("BNFAST_TRITON_CONV", "fast")
    with pytest.raises(
        ValueError, match="BNFAST_TRITON_CONV is 'fast'; allowed are 'cudnn', 'fused' and 'gram'"
    ):
        conv.forced_route()


def test_what_goes_without_z(monkeypatch):
    """1x1 with stride 1 and no padding, one group, channels_last, twice as many channels as it reads: and only where asked for."""
    x = torch.randn(2, 8, 4, 4, device=DEVICE).contiguous(memory_format=torch.channels_last)
    wide, narrow, large = (
        torch.randn(k, 8, size, size, device=DEVICE) for k, size in ((16, 1), (15, 1), (16, 3))
    )
    monkeypatch.setattr(conv, "route", "fused")
    assert not triton_kernels.fuses_gram(x, wide, (1, 1), (0, 0), 1)
    monkeypatch.setattr(conv, "route", "gram")
    assert triton_kernels.fuses_gram(x, wide, (1, 1), (0, 0), 1)
    for given, weight, stride, padding, groups in (
        (x, narrow, 1, 0, 1),
        (x, large, 1, 0, 1),
        (x, wide, 2, 0, 1),
        (x, wide, 1, 1, 1),
        (x, wide[:, :4], 1, 0, 2),
        (x.contiguous(), wide, 1, 0, 1),
    ):
        assert not triton_kernels.fuses_gram(given, weight, (stride,) * 2, (padding,) * 2, groups)


interpreted = pytest.mark.skipif(
    not triton_interpreter.switched_on(), reason="needs the interpreter"
)


@interpreted
@pytest.mark.parametrize("kind", triton_traffic.KINDS, ids=lambda kind: kind.name)
def test_traffic_is_that_of_whole_tensors(kind, monkeypatch):
    """Each address once per kernel: what the two-pass form reads and writes, and at most a twentieth of it beside that."""
    monkeypatch.setattr(triton_traffic, "SHAPE", (1, 64, 16, 32))
    unique = sum(entry.unique for entry in triton_traffic.run_unit(kind, torch.channels_last))
    assert triton_traffic.floor_bytes(kind) <= unique <= 1.05 * triton_traffic.floor_bytes(kind)


@interpreted
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("kind", triton_traffic.KINDS, ids=lambda kind: kind.name)
def test_a_channel_on_chip_is_read_once(kind, layout):
    """At most a fiftieth beside whole tensors once: in all, not only at distinct addresses."""
    found = triton_traffic.run_unit(kind, layout, on_chip=True)
    assert {entry.kernel for entry in found} == {"bn_fwd_slab_kernel", "bn_bwd_slab_kernel"}
    floor = triton_traffic.floor_bytes(kind, on_chip=True)
    assert floor <= sum(entry.unique for entry in found) <= 1.02 * floor
    assert sum(entry.total for entry in found) <= 1.02 * floor


@interpreted
def test_a_full_chain_writes_no_y_and_no_dz_of_inner_units():
    """Accesses per element within a chain: the floor, bits, and on as few pixels as here a quarter for vectors per channel."""
    blocks = [triton_traffic.Bottleneck(128, 64, 256), triton_traffic.Bottleneck(256, 64, 256)]
    found = triton_traffic.run_chain(blocks, (1, 16, 16))
    sums = triton_traffic.per_unit(found)
    floors = {kind.name: kind.chain for kind in triton_traffic.KINDS}
    pixels = 16 * 16 * triton_traffic.DTYPE.itemsize
    for unit, kind, channels in (
        (1, "inner", 64),
        (2, "shortcut", 256),
        (3, "end", 256),
        (5, "inner", 64),
    ):
        moved = [sums[unit][way] / (pixels * channels) for way in ("forward", "backward")]
        for accesses, floor in zip(moved, floors[kind], strict=True):
            assert floor <= accesses <= floor + 0.3125, (kind, moved)
    # The same part of each argument on a whole network, the kernels left out.
    known = triton_traffic.shares(found)
    assert known["conv_fwd_reduce_kernel", (3, 1), "x_ptr"] == (1, 0)
    assert known["conv_dgrad_kernel", (1, 1), "dx_ptr"] == (0, 1)
    assert triton_traffic.resnet50_bytes("full chain", known, 2) <= 1.05 * 172.2e6 * 1.25


@interpreted
def test_a_chain_whose_ends_have_no_z():
    """Of an end its y and db alone are moved: written, read as input and as residual; written, read twice, read to be added."""
    blocks = [triton_traffic.Bottleneck(128, 64, 256), triton_traffic.Bottleneck(256, 64, 256)]
    path = "full chain, ends without z"
    found = triton_traffic.run_chain(blocks, (1, 16, 16), path)
    end = 16 * 16 * 256 * triton_traffic.DTYPE.itemsize
    # The first block's, as those in the middle of a network; the shortcut's z is as large.
    large = [e for e in found if e.size == end]
    assert sum(e.kernel == "conv_fwd_apply_kernel" and e.argument == "y_ptr" for e in large) == 2
    assert sum(e.argument == "z_ptr" for e in large) == 1
    moved = sum(e.unique for e in large)
    # First end: y 3, db 4; shortcut: z 2 and beside 1 and above 1; second end: y 1, dy and its mask 2, db 3; x and dx.
    assert moved == pytest.approx(end * (7 + 4 + 6), rel=0.2), moved / end
    stem = triton_traffic.run_unit(triton_traffic.KINDS[0], torch.channels_last)
    known = triton_traffic.shares(found + stem)
    assert triton_traffic.resnet50_bytes(path, known, 2) <= 1.05 * 147e6 * 1.35


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_kernels_compile_for_chips_that_are_not_there(target):
    """As they ship, in bfloat16: no spills, accesses of 16 bytes, matrix instructions; bench/triton_table.py checks that and shows
    the rest."""
    command = [sys.executable, "-m", "bench.triton_table", "--dtypes", "bf16", "--targets", target]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    for kernel in ("bn_fwd_reduce", "bn_fwd_apply", "bn_bwd_reduce", "bn_bwd_apply"):
        assert f"| {kernel}_kernel bf16 channels_last relu | {target} |" in run.stdout
    for name in (
        "bn_fwd_slab_kernel bf16 channels_last on chip relu residual",
        "bn_bwd_slab_kernel bf16 channels_last on chip relu",
        "conv_fwd_apply_kernel bf16 1x1 without z",
        "conv_fwd_reduce_kernel bf16 3x3 stride 2 forward behind bn_fwd_apply",
        "conv_dgrad_kernel bf16 1x1 stride 1 backward into an end",
        "conv_depthwise_fwd_reduce_kernel bf16 3x3 stride 1 forward behind bn_fwd_apply",
        "conv_depthwise_dgrad_kernel bf16 3x3 stride 1 backward between inner units",
    ):
        assert f"| {name} | {target} |" in run.stdout
    assert "| fsub fma fcmp |" in run.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_gpu_and_interpreter_it_says_why():
    code = (
        "import bnfast\nprint(bnfast.backends()['triton'])\nwith bnfast.use_backend('triton'): pass"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert "PyTorch sees no GPU (with TRITON_INTERPRET=1" in run.stdout
    assert "RuntimeError: backend 'triton' is not available: PyTorch sees no GPU" in run.stderr


@pytest.mark.skipif(not triton_interpreter.switched_on(), reason="needs the interpreter")
def test_auto_stays_with_the_compiled_backend_on_the_cpu():
    assert dispatch.pick("auto", torch.device("cpu")) in ("cpu", "reference")


@triton.jit
def passes_kernel(x_ptr, y_ptr, rounded_ptr, COUNT: tl.constexpr, ACT: tl.constexpr):
    offs = tl.arange(0, COUNT)
    x = tl.load(x_ptr + offs)
    tl.store(rounded_ptr + offs, x.to(rounded_ptr.dtype.element_ty))
    tl.store(y_ptr + offs, activation.act_passes(x, rounded_ptr.dtype.element_ty, ACT))


@pytest.mark.parametrize("act", ["relu", "relu6", "leaky_relu"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_mask_is_that_of_the_rounded_value(dtype, act):
    """At every float32 next to where rounding reaches 0 and 6, from both sides, and at ties."""
    edges = torch.tensor(
        [0.0, 2.0**-134, 2.0**-133, 2.0**-25, 2.0**-24, 5.984375, 5.998046875, 6.0]
    )
    bits = edges.view(torch.int32)[:, None] + torch.arange(-6, 7)
    x = bits[bits >= 0].to(torch.int32).view(torch.float32)
    x = torch.cat([x, -x, torch.tensor([float("inf"), float("nan")])])
    x = torch.cat([x, x.new_zeros(256 - x.numel())]).to(DEVICE)
    passes = torch.empty(256, dtype=torch.bool, device=DEVICE)
    rounded = torch.empty(256, dtype=dtype, device=DEVICE)
    passes_kernel[(1,)](x, passes, rounded, 256, act)
    y = x.to(dtype).float()
    expected = {"relu": ~(y <= 0), "relu6": ~((y <= 0) | (y >= 6)), "leaky_relu": y > 0}[act]
    assert torch.equal(passes, expected)
