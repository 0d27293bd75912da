"""What the build makes of csrc/cuda: nvcc or not, the architectures inside, and the machine code."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import cuda_table
from bnfast import cuda
from bnfast.cli import main

ROOT = Path(__file__).resolve().parent.parent

needs_kernels = pytest.mark.skipif(
    not cuda.architectures, reason="the extension was built without the CUDA kernels"
)
needs_cuobjdump = pytest.mark.skipif(
    cuda.find_tool("cuobjdump") is None, reason="cuobjdump was not found"
)


def configured(**environment: str) -> subprocess.CompletedProcess:
    """What setup.py says when it is asked for the package's name, which decides about CUDA and builds nothing."""
    env = {**os.environ, **environment}
    command = [sys.executable, "setup.py", "--name"]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


def test_without_nvcc_the_rest_is_built():
    done = configured(CUDA_HOME="/nonexistent", BNFAST_FORCE_CUDA="")
    assert done.returncode == 0, done.stderr
    assert "nvcc was not found" in done.stdout and "without the CUDA kernels" in done.stdout


def test_cuda_can_be_demanded_and_refused():
    done = configured(CUDA_HOME="/nonexistent", BNFAST_FORCE_CUDA="1")
    assert done.returncode != 0
    assert "BNFAST_FORCE_CUDA=1, but nvcc was not found" in done.stderr
    done = configured(BNFAST_FORCE_CUDA="0")
    assert done.returncode == 0, done.stderr
    assert "building without the CUDA kernels" in done.stdout


@needs_kernels
@needs_cuobjdump
def test_doctor_lists_the_architectures_inside(capsys):
    """Those that were asked for, read from the binary; and whether a GPU is visible."""
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    inside = re.search(r"^cuda kernels +(.*) \(from cuobjdump\)$", printed, re.MULTILINE)
    assert inside, printed
    for name in re.findall(r"\d+\.\d+", cuda.architectures):
        assert f"sm_{name.replace('.', '')}" in inside.group(1)
    if not torch.cuda.is_available():
        assert re.search(r"^gpu +none visible$", printed, re.MULTILINE)
        assert re.search(r"^backend cuda +no: PyTorch sees no GPU$", printed, re.MULTILINE)


@needs_kernels
@needs_cuobjdump
def test_machine_code_has_no_spills_and_wide_accesses(capsys):
    """Of every kernel in bfloat16 and float32, for every target inside that the table knows."""
    assert cuda_table.main(["--dtypes", "bf16,f32"]) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    kernels = set(re.findall(r"^\| (bn_\w+_kernel .*?) \|", printed, re.MULTILINE))
    # 2 dtypes, 2 layouts; forward: 1 reduction and 2 with or without residual; backward: 3 slopes each; both phases in one where
    # there are clusters of blocks.
    has_clusters = any(float(n) >= 9 for n in re.findall(r"\d+\.\d+", cuda.architectures))
    assert len(kernels) == 2 * 2 * (1 + 2 + 3 + 3 + (2 + 3) * has_clusters)


def test_table_refuses_unknown_targets(capsys):
    with pytest.raises(SystemExit):
        cuda_table.main(["--targets", "sm_1"])
    assert "'sm_1' is not one of" in capsys.readouterr().err
