"""Interrupted training goes on to the same bits; damaged checkpoints are refused."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import FULL

import bnfast
from bnfast import checkpoints, loop
from bnfast.cli import main
from bnfast.loop import TrainingError
from bnfast.training import TrainConfig, train

TINY = {
    "model": "resnet8",
    "data": "fake",
    "epochs": 3,
    "batch_size": 16,
    "flip": True,
    "crop_padding": 2,
    "analyse": False,
    "progress": False,
}
KILLS = 20 if FULL else 3


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


class Stopped(Exception):
    pass


def stop_at(monkeypatch, number):
    """Makes training stop in front of one of its steps, as if the process had died there."""
    step = loop.Run.step

    def stopping(run, images, labels, count, at, lr):
        if at == number:
            raise Stopped
        step(run, images, labels, count, at, lr)

    monkeypatch.setattr(loop.Run, "step", stopping)


def check_same_end(one: Path, other: Path):
    """Same trained tensors and same metrics, bit for bit; times differ."""
    tensors = [
        safetensors.torch.load_file(folder / "affine.safetensors") for folder in (one, other)
    ]
    assert tensors[0].keys() == tensors[1].keys()
    for name, tensor in tensors[0].items():
        assert torch.equal(tensor, tensors[1][name]), name
    for name in ("metrics.jsonl", "plain_metrics.jsonl"):
        assert (one / name).exists() == (other / name).exists()
        if (one / name).exists():
            lines = [
                [json.loads(line) | {"seconds": 0} for line in (f / name).read_text().splitlines()]
                for f in (one, other)
            ]
            assert lines[0] == lines[1]
    assert (other / "result.json").exists() and not (other / checkpoints.FOLDER).exists()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"checkpoint_every": 1},
        {"config": "all"},
        {"config": "random2"},
        {"config": "none"},
        {"config": "beta", "statistics": "running", "calibrate": 2},
        {"compare": "run", "checkpoint_every": 3},
        {
            "model": "torchvision:mobilenet_v3_small",
            "config": "bn+output",
            "lr": 0.01,
        },  # has dropout
        {"convert": False, "amp": "bfloat16"},
    ],
    ids=lambda options: " ".join(f"{k}={v}" for k, v in options.items()) or "bn",
)
def test_a_run_that_stopped_ends_as_one_that_did_not(tmp_path, monkeypatch, options):
    options = TINY | options
    train(TrainConfig(**options, out=tmp_path / "whole"))
    for number in (2, 6):
        with monkeypatch.context() as patch:
            stop_at(patch, number)
            with pytest.raises(Stopped):
                train(TrainConfig(**options, out=tmp_path / "parts", resume=True))
    train(TrainConfig(**options, out=tmp_path / "parts", resume=True))
    check_same_end(tmp_path / "whole", tmp_path / "parts")


def test_seeds_of_weights_order_and_augmentation_are_apart(tmp_path):
    def ends(**seeds):
        folder = tmp_path / "-".join(map(str, seeds.values()))
        result = train(TrainConfig(**TINY, **seeds, out=folder))
        return result.model.conv.weight, result.history[-1].train_loss

    base = ends(seed=1, seed_order=1, seed_augmentation=1)
    for seeds in ((1, 2, 1), (1, 1, 2), (2, 1, 1)):
        names = ("seed", "seed_order", "seed_augmentation")
        weight, loss = ends(**dict(zip(names, seeds, strict=True)))
        assert torch.equal(weight, base[0]) is (seeds[0] == 1)
        assert loss != base[1]


def test_every_step_draws_other_numbers(tmp_path, monkeypatch):
    """Dropout's masks differ from step to step and with the seed."""
    step = loop.Run.step
    drawn = []

    def noting(run, *arguments):
        step(run, *arguments)
        drawn.append(torch.rand(1).item())

    monkeypatch.setattr(loop.Run, "step", noting)
    for seed in (0, 1):
        train(TrainConfig(**TINY, seed=seed, out=tmp_path / str(seed)))
    assert len(set(drawn)) == len(drawn) == 24


def command(folder: Path) -> list[str]:
    options = [
        "--model",
        "resnet8",
        "--data",
        "fake",
        "--epochs",
        "6",
        "--batch-size",
        "8",
        "--flip",
    ]
    options += ["--crop-padding", "2", "--checkpoint-every", "1", "--quiet"]
    return [sys.executable, "-m", "bnfast", "train", *options, "--out", str(folder), "--resume"]


def start(folder: Path) -> subprocess.Popen:
    root = str(Path(bnfast.__file__).parent.parent)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    return subprocess.Popen(command(folder), env=environment, stderr=subprocess.PIPE)


def steps_done(folder: Path) -> int:
    files = (folder / checkpoints.FOLDER).glob("step-*.safetensors")
    return max((int(path.stem[5:]) for path in files), default=0)


def test_killed_at_random_moments(tmp_path):
    """kill -9, again and again; the run that is left at the end equals one that nobody touched."""
    whole = start(tmp_path / "whole")
    assert whole.wait(120) == 0, whole.stderr.read()
    moments = random.Random(11)
    run = tmp_path / "killed"
    for kill in range(KILLS):
        process = start(run)
        # Up to some step of those that are left, and then a moment longer: in the middle of whatever comes there.
        wanted = steps_done(run) + moments.randint(0, 2 * 48 // (KILLS + 1))
        deadline = time.monotonic() + 120
        while steps_done(run) < wanted and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.03))
        process.send_signal(signal.SIGKILL)
        process.wait()
        if (run / "result.json").exists():
            assert kill > 0, "the run ended before it was killed"
            break
    else:
        last = start(run)
        assert last.wait(120) == 0, last.stderr.read()
    check_same_end(tmp_path / "whole", run)


@pytest.fixture
def stopped_run(tmp_path, monkeypatch):
    """A run with two checkpoints, stopped in front of step 9 of 12."""
    with monkeypatch.context() as patch:
        stop_at(patch, 9)
        with pytest.raises(Stopped):
            train(TrainConfig(**TINY, out=tmp_path / "run"))
    return tmp_path / "run"


def last_checkpoint(run: Path) -> Path:
    files = sorted((run / checkpoints.FOLDER).iterdir())
    assert [path.name for path in files] == [
        "step-000000004.safetensors",
        "step-000000008.safetensors",
    ]
    return files[-1]


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def edit_a_tensor(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def edit_the_state(path):
    content = path.read_bytes()
    assert b'step\\": 8' in content
    path.write_bytes(content.replace(b'step\\": 8', b'step\\": 9'))


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [cut, edit_a_tensor, edit_the_state, empty])
def test_damaged_checkpoints_are_refused_and_the_one_before_is_used_on_request(
    tmp_path, capsys, stopped_run, damage
):
    damage(last_checkpoint(stopped_run))
    resume = ["train", "--out", str(stopped_run), "--resume", "--quiet"]
    assert main(resume) == 2
    message = capsys.readouterr().err
    assert "step-000000008.safetensors" in message and "--use-previous" in message
    assert message.count("\n") == 1
    assert main([*resume, "--use-previous"]) == 0
    train(TrainConfig(**TINY, out=tmp_path / "whole"))
    check_same_end(tmp_path / "whole", stopped_run)


def test_a_single_damaged_checkpoint_cannot_be_resumed(capsys, stopped_run):
    cut(last_checkpoint(stopped_run))
    (stopped_run / checkpoints.FOLDER / "step-000000004.safetensors").unlink()
    assert main(["train", "--out", str(stopped_run), "--resume", "--use-previous"]) == 2
    assert "there is none before it" in capsys.readouterr().err


def test_resume_takes_the_options_of_the_run_and_no_others(capsys, stopped_run):
    resume = ["train", "--out", str(stopped_run), "--resume", "--quiet"]
    assert main([*resume, "--lr", "0.7"]) == 2
    assert "lr is 0.7; the run in" in capsys.readouterr().err
    assert main([*resume, "--epochs", "3"]) == 0
    assert main(resume) == 2
    assert "is finished: nothing to resume" in capsys.readouterr().err
    assert main(["train", "--out", str(stopped_run)]) == 2
    assert "already holds a run" in capsys.readouterr().err


def test_resume_refuses_other_frozen_weights(monkeypatch, stopped_run):
    from bnfast import training

    def other_weights(config, num_classes, in_channels):
        torch.manual_seed(99)
        return bnfast.models.create(config.model, num_classes, in_channels)

    monkeypatch.setattr(training, "_build", other_weights)
    with pytest.raises(checkpoints.CheckpointError, match="other frozen weights"):
        train(TrainConfig(**TINY, out=stopped_run, resume=True))


def test_a_frozen_weight_that_changes_is_an_error(tmp_path, monkeypatch):
    step = loop.Run.step

    def meddling(run, *arguments):
        step(run, *arguments)
        with torch.no_grad():
            run.model.fc.weight[3, 1] += 1e-7

    monkeypatch.setattr(loop.Run, "step", meddling)
    with pytest.raises(TrainingError, match="a frozen parameter changed"):
        train(TrainConfig(**TINY, out=tmp_path / "run"))
    assert not (tmp_path / "run" / "result.json").exists()


def test_a_folder_in_use_is_left_alone(tmp_path, capsys):
    run = tmp_path / "run"
    process = start(run)
    try:
        deadline = time.monotonic() + 120
        while steps_done(run) < 1:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.001)
        process.send_signal(signal.SIGSTOP)
        assert main(["train", "--out", str(run), "--overwrite", "--quiet"]) == 2
        assert "another process trains in" in capsys.readouterr().err
        assert steps_done(run) >= 1
    finally:
        process.kill()
        process.wait()


def test_tensorboard_gets_every_epoch(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = train(TrainConfig(**TINY, tensorboard=True, out=tmp_path / "run"))
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    seen = events.Scalars("test_accuracy")
    assert [event.step for event in seen] == [1, 2, 3]
    assert seen[-1].value == pytest.approx(result.test_accuracy, abs=1e-6)
