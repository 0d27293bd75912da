"""`pytest -m gpu` and the benches as on a machine with a GPU, kernels aside; see gpu_rehearsal.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import FULL

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: no rehearsal")


def run_pytest(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    paths = os.pathsep.join([str(ROOT / "tests"), str(ROOT)])
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "gpu_rehearsal", *arguments]
    environment = {**os.environ, "PYTHONPATH": paths, "TRITON_INTERPRET": "0", **environment}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_gpu_tests_run_up_to_the_launch():
    # Training in float64 on one core takes its time.
    chosen = "not compile" if FULL else "not compile and not resnet56 and not contiguous"
    run = run_pytest("tests/test_gpu.py", "-m", "gpu", "-k", chosen)
    assert run.returncode == 0, run.stdout + run.stderr
    for reason in ("graphs need a GPU", "fewer than two GPUs", "GiB of free GPU memory"):
        assert reason in run.stdout
    assert "sees no GPU" not in run.stdout


def test_benches_run_up_to_the_launch(tmp_path):
    results = tmp_path / "results.json"
    run = run_pytest(
        "bench",
        f"--benchmark-json={results}",
        BNFAST_BENCH_QUICK="1",
        BNFAST_BENCH_NO_COMPILE="1",
        BNFAST_BENCH_ROUNDS="1",
    )
    assert run.returncode == 0, run.stdout + run.stderr
    found = json.loads(results.read_text())["benchmarks"]
    names = {entry["extra_info"]["network"] for entry in found}
    assert {"resnet50, triton", "resnet20, triton gram"} <= names
    for entry in found:
        assert entry["extra_info"]["environment"]["device"] == "cuda"
        assert "rehearsal without a GPU" in entry["extra_info"]["environment"]["machine"]
