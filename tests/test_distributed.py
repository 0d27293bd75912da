"""Statistics over all ranks, and training under torchrun: two processes against one on the whole batch."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

import bnfast
from bnfast.models import create

ROOT = Path(bnfast.__file__).parent.parent
# Images of rank 0 and of rank 1.
SPLITS = [(6, 6), (9, 3), (12, 0), (0, 12)]


class Block(nn.Module):
    """Every kind of unit: 3x3 and 1x1 convolutions, a residual in front of an activation, a BatchNorm without convolution."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.second = nn.Conv2d(16, 16, 3, padding=1, stride=2, bias=False)
        self.bn2 = nn.BatchNorm2d(16, momentum=None)
        self.around = nn.Conv2d(16, 16, 1, stride=2, bias=False)
        self.bn3 = nn.BatchNorm2d(16)
        self.alone = nn.BatchNorm2d(16, affine=False)
        self.third = nn.Conv2d(16, 8, 1, bias=False)
        self.bn4 = nn.BatchNorm2d(8, track_running_stats=False)

    def forward(self, x):
        x = torch.relu(self.bn1(self.first(x)))
        x = F.silu(self.bn2(self.second(x)) + self.bn3(self.around(x)))
        return F.relu(self.bn4(self.third(self.alone(x))))


def problem(dtype):
    """(model, x, upstream gradient), the same in every process; off-centre, with ranks of different scale."""
    gen = torch.Generator().manual_seed(3)
    torch.manual_seed(2)
    model = Block()
    bnfast.models.initialize(model, "symmetric", 0.3)
    x = torch.randn(12, 3, 9, 7, generator=gen, dtype=torch.float64) * 3 + 5
    x[9:] *= 4
    dy = torch.randn(12, 8, 5, 4, generator=gen, dtype=torch.float64)
    return bnfast.freeze(model, "bn").to(dtype), x.to(dtype), dy.to(dtype)


def evaluated(model, x, dy):
    """Two steps' output, input gradient, parameter gradients and buffers, as float64."""
    x = x.clone().requires_grad_()
    for _ in range(2):
        model.zero_grad()
        x.grad = None
        y = model(x)
        y.backward(dy)
    results = {"y": y, "dx": x.grad}
    results |= {f"d {n}": p.grad for n, p in model.named_parameters() if p.requires_grad}
    results |= dict(model.named_buffers())
    return {name: t.detach().double() for name, t in results.items()}


def rank_main(rank, folder):
    """One of two processes: all cases, results into files."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for number, (dtype, backend) in enumerate(CASES):
        for split in SPLITS:
            model, x, dy = problem(dtype)
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
            model = bnfast.convert(model, backend=backend)
            part = slice(0, split[0]) if rank == 0 else slice(split[0], 12)
            results = evaluated(model.train(), x[part], dy[part])
            torch.save(results, f"{folder}/{number}-{split[0]}-{rank}.pt")
    dist.destroy_process_group()


CASES = [(torch.float64, "cpu"), (torch.float32, "cpu"), (torch.float64, "reference")]
CASES = [case for case in CASES if bnfast.backends()[case[1]] is True]


def test_two_ranks_are_one_on_the_whole_batch(tmp_path):
    """Forward, backward, running statistics, for even and uneven parts, one rank without images included."""
    torch.multiprocessing.spawn(rank_main, (str(tmp_path),), nprocs=2)
    for number, (dtype, _) in enumerate(CASES):
        model, x, dy = problem(dtype)
        whole = evaluated(model.train(), x, dy)
        tolerance = 1e-11 if dtype == torch.float64 else 3e-5
        for split in SPLITS:
            parts = [torch.load(tmp_path / f"{number}-{split[0]}-{rank}.pt") for rank in (0, 1)]
            for name, want in whole.items():
                if name in ("y", "dx"):
                    got = torch.cat([part[name] for part in parts])
                elif name.startswith("d "):
                    got = parts[0][name] + parts[1][name]
                else:
                    got = parts[0][name]
                    assert torch.equal(got, parts[1][name]), name
                scale = want.abs().max().clamp_min(1e-3)
                assert ((got - want).abs().max() / scale) <= tolerance, (dtype, split, name)


def test_syncbatchnorm_in_one_process_is_batchnorm(backend):
    if backend.device.type != "cpu":
        pytest.skip("torch's own takes GPU tensors there")
    backend.takes_long()
    model, x, dy = problem(torch.float64)
    sync = bnfast.convert(nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model)))
    assert len(bnfast.explain(sync).fused) == 5
    with bnfast.use_backend(backend.name):
        got = evaluated(sync.train(), x, dy)
    for name, want in evaluated(model.train(), x, dy).items():
        torch.testing.assert_close(got[name], want, rtol=1e-9, atol=1e-9, msg=name)
    assert type(bnfast.revert(sync).bn1) is nn.SyncBatchNorm


def torchrun(*arguments, processes=2):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, "-m", *launch, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


TINY = [
    "--model",
    "resnet8",
    "--data",
    "fake",
    "--epochs",
    "2",
    "--batch-size",
    "21",
    "--lr",
    "0.01",
]
TINY += ["--flip", "--crop-padding", "2", "--no-analyse", "--quiet"]


def test_training_under_torchrun_is_training_on_the_whole_batch(tmp_path, monkeypatch):
    """Batches of 21, 21, 21 and 1 images: the ranks' parts differ, and the last batch leaves rank 1 with none."""
    from bnfast.cli import main

    done = torchrun("-m", "bnfast", "train", *TINY, "--sync-bn", "--out", str(tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("test accuracy") == 1
    torch.set_num_threads(1)
    assert main(["train", *TINY, "--out", str(tmp_path / "one")]) == 0
    one, two = (
        safetensors.torch.load_file(tmp_path / f / "affine.safetensors") for f in ("one", "two")
    )
    moved = create("resnet8").state_dict()
    for name, want in one.items():
        assert moved[name].shape == want.shape
        torch.testing.assert_close(two[name], want, rtol=2e-3, atol=2e-4, msg=name)
    lines = [
        [json.loads(line) for line in (tmp_path / f / "metrics.jsonl").read_text().splitlines()]
        for f in ("one", "two")
    ]
    for a, b in zip(*lines, strict=True):
        assert b["train_loss"] == pytest.approx(a["train_loss"], rel=1e-3)
        assert b["test_accuracy"] == pytest.approx(a["test_accuracy"], abs=0.04)
        assert b["lr"] == a["lr"]
