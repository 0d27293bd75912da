"""The examples run on small files in the real formats, and the data sets of files through the command line."""

import json
import re
import runpy
import sys
from pathlib import Path

import image_files
import pytest
import torch
from test_distributed import torchrun

from bnfast.cli import main

EXAMPLES = Path(__file__).parent.parent / "examples"


def epochs_of(printed):
    return re.findall(r"^epoch (\d+): loss (\d+\.\d+)", printed, re.M)


def test_cifar10_bn_only(tmp_path, monkeypatch, capsys):
    torch.set_num_threads(1)
    data = image_files.cifar(tmp_path, "cifar10", monkeypatch)
    options = ["--depth", "8", "--epochs", "2", "--batch-size", "20", "--workers", "0"]
    monkeypatch.setattr(sys, "argv", ["cifar10_bn_only.py", "--data", str(data), *options])
    runpy.run_path(str(EXAMPLES / "cifar10_bn_only.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "672 parameters learn" in printed
    assert [epoch for epoch, _ in epochs_of(printed)] == ["1", "2"]


def test_imagenet_bn_only(tmp_path):
    data = image_files.image_folder(tmp_path)
    options = ["--epochs", "2", "--batch-size", "6", "--image-size", "32", "--workers", "0"]
    options += ["--model", "resnet18", "--warmup", "0.5"]
    done = torchrun(str(EXAMPLES / "imagenet_bn_only.py"), "--data", str(data), *options)
    assert done.returncode == 0, done.stderr
    assert "9,600 parameters learn" in done.stdout
    assert [epoch for epoch, _ in epochs_of(done.stdout)] == ["1", "2"]


def test_the_only_line_of_bnfast():
    """Without `import bnfast` and the line of convert(), the examples are plain PyTorch."""
    for path in EXAMPLES.glob("*.py"):
        code = path.read_text().split('"""', 2)[2]
        lines = [line.strip() for line in code.splitlines() if "bnfast" in line]
        assert lines == ["import bnfast", "model = bnfast.convert(model)"], path.name


@pytest.mark.parametrize(
    "name", ["cifar10", "cifar100", "imagefolder", "imagenet", "fashion-mnist"]
)
def test_training_on_data_sets_of_files(tmp_path, monkeypatch, capsys, name):
    torch.set_num_threads(1)
    options = ["--model", "resnet8", "--epochs", "1", "--batch-size", "16", "--quiet"]
    if name.startswith("cifar"):
        folder = image_files.cifar(tmp_path, name, monkeypatch)
    elif name == "fashion-mnist":
        folder = image_files.fashion_mnist(tmp_path)
    else:
        folder = image_files.image_folder(tmp_path)
        options += ["--image-size", "32", "--resize-size", "36", "--workers", "0"]
    out = tmp_path / "run"
    arguments = ["train", "--data", name, "--data-dir", str(folder), *options, "--out", str(out)]
    assert main(arguments) == 0
    assert "test accuracy" in capsys.readouterr().out
    result = json.loads((out / "result.json").read_text())
    preset = "imagenet" if name.startswith("image") else "cifar"
    assert result["options"]["preset"] == preset and result["options"]["flip"]
    assert 0 <= result["test_accuracy"] <= result["test_top5"] <= 1
