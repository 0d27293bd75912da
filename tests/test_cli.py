"""Training and the command line: what they print, write and measure, and how they refuse."""

import copy
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import bnfast
from bnfast.affine import read_metadata, save_affine
from bnfast.cli import main
from bnfast.freezing import freeze, frozen_digest
from bnfast.measure import Agreement, gradient_agreement, saved_activation_bytes
from bnfast.models import create
from bnfast.training import TrainConfig, rebuild, train

TINY = ["train", "--model", "resnet8", "--data", "fake", "--quiet"]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)  # so small networks gain nothing from more


def refused(capsys, *arguments):
    """The message with which a command line is refused: exit code 2, one line, nothing on stdout."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("bnfast: error: ")
    assert captured.err.count("\n") == 1 and captured.err.endswith("\n")
    return captured.err


def test_train_prints_a_summary_and_writes_a_run(tmp_path, capsys):
    assert main([*TINY, "--epochs", "2", "--seed", "4", "--compare", "run"]) == 0
    printed = capsys.readouterr().out
    folder = tmp_path / "runs" / "resnet8-fake-bn-1"
    for wanted in (
        "test accuracy",
        "672 of 78,042",
        "plain PyTorch, channels_last",
        "step time",
        "saved activations",
        "final training loss",
        os.path.join("runs", "resnet8-fake-bn-1", "affine.safetensors"),
    ):
        assert wanted in printed
    for name in ("metrics.jsonl", "plain_metrics.jsonl"):
        lines = [json.loads(line) for line in (folder / name).read_text().splitlines()]
        assert [line["epoch"] for line in lines] == [1, 2]
        assert set(lines[0]) == {
            "epoch",
            "train_loss",
            "train_accuracy",
            "test_accuracy",
            "test_top5",
            "seconds",
            "lr",
        }
        assert [line["lr"] for line in lines] == pytest.approx([0.1, 0.01])
    written = read_metadata(folder / "affine.safetensors")
    assert (written["model"], written["seed"], written["config"]) == ("resnet8", "4", "bn")


def test_runs_get_folders_of_their_own(tmp_path):
    for _ in range(2):
        assert main([*TINY]) == 0
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == [
        "resnet8-fake-bn-1",
        "resnet8-fake-bn-2",
    ]


def test_a_run_is_replaced_only_on_request(tmp_path, capsys):
    arguments = [*TINY, "--out", str(tmp_path / "run")]
    assert main(arguments) == 0
    (tmp_path / "run" / "notes.txt").write_text("mine")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    capsys.readouterr()
    assert "--overwrite" in refused(capsys, *arguments)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    assert main([*arguments, "--overwrite"]) == 0
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 1
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


def test_out_that_is_a_file(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert "--out" in refused(capsys, *TINY, "--out", str(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--data", "mnist"], "--data"),
        (["train", "--model", "resnet15"], "unknown model 'resnet15'"),
        (["train", "--config", "delta"], "--config"),
        (["train", "--epochs", "0"], "epochs must be at least 1"),
        (["train", "--epochs", "many"], "--epochs"),
        (["train", "--batch-size", "-1"], "batch_size must be at least 1"),
        (["train", "--lr", "nan"], "lr must be a finite number"),
        (["train", "--weight-decay", "-1"], "weight_decay must be a finite number"),
        (["train", "--seed", "-1"], "seed must be between"),
        (["train", "--init-beta", "inf"], "beta must be a finite number"),
        (["train", "--device", "cuda", "--backend", "cpu"], "'cuda'"),
        (["train", "--backend", "abacus"], "backend 'abacus' is not available"),
        (["train", "--data-dir", "nowhere"], "'nowhere' (--data-dir) does not exist"),
        (["train", "--load", "nowhere.safetensors"], "nowhere.safetensors"),
        (["train", "--model", "vgg11", "--config", "shortcut+output"], "1x1 convolution"),
        (["train", "--speed", "fast"], "--speed"),
        (["train", "--amp", "float16"], "amp 'float16' needs device 'cuda'"),
        (["train", "--weights", "file"], "are no random features"),
        (["train", "--resume"], "--out DIR"),
        (["train", "--resume", "--overwrite", "--out", "x"], "exclude each other"),
        (["train", "--no-convert", "--compare", "run"], "--no-convert"),
        (["train", "--download"], "cannot be downloaded"),
        (["train", "--data", "imagenet"], "--data-dir DIR"),
        (["train", "--data", "cifar10", "--data-dir", "."], "cifar-10-batches-py"),
        (["train", "--data", "fashion-mnist", "--data-dir", "."], "train-images-idx3-ubyte"),
        (["train", "--config", "random28"], "has 9 weights"),
        (["explain"], "--model"),
        (["explain", "--model", "alexander"], "unknown model 'alexander'"),
        (["fly"], "fly"),
        ([], "train | sweep | report | explain | tune | doctor"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_use_is_one_line_and_leaves_nothing(tmp_path, capsys, arguments, message):
    assert message in refused(capsys, *arguments)
    assert not list(tmp_path.iterdir())


def test_unreadable_and_foreign_checkpoints(tmp_path, capsys):
    (tmp_path / "broken").write_bytes(b"broken")
    assert "not a readable safetensors file" in refused(capsys, *TINY, "--load", "broken")
    save_affine(create("resnet14"), "other")
    assert "does not fit the model" in refused(capsys, *TINY, "--load", "other")
    save_affine(create("resnet8"), "seeded", metadata={"seed": "9"})
    assert "seed 9, not 0" in refused(capsys, *TINY, "--load", "seeded")
    assert not (tmp_path / "runs").exists()


def test_a_loss_that_is_not_finite_is_exit_code_1(capsys):
    assert main([*TINY, "--init-beta", "3e38", "--lr", "1"]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("bnfast: error: the training loss is")
    assert captured.err.count("\n") == 1


def test_interruption_is_one_line(capsys, monkeypatch):
    def interrupt(config):
        raise KeyboardInterrupt

    monkeypatch.setattr("bnfast.cli.train", interrupt)
    assert main(TINY) == 130
    assert capsys.readouterr().err == "bnfast: error: interrupted\n"


def test_speed_is_not_printed_when_the_gradients_differ(capsys, monkeypatch):
    def worse(*arguments):
        return SimpleNamespace(ok=False)

    monkeypatch.setattr("bnfast.measure.gradient_agreement", worse)
    assert main([*TINY, "--compare", "steps"]) == 0
    printed = capsys.readouterr().out
    assert "x as fast" not in printed and "not reported" in printed


@pytest.mark.parametrize("config", ["bn", "bn+output", "all", "none"])
def test_a_run_can_be_rebuilt_from_its_checkpoint(tmp_path, config):
    options = TrainConfig("resnet8", "fake", config, progress=False, seed=2)
    result = train(options)
    model = rebuild(result.checkpoint)
    assert frozen_digest(model) == frozen_digest(result.model)
    trained = result.model.state_dict()
    assert all(torch.equal(value, trained[key]) for key, value in model.state_dict().items())


def test_rebuild_refuses_files_of_others(tmp_path):
    save_affine(create("resnet8"), "plain")
    with pytest.raises(ValueError, match="does not say how to rebuild"):
        rebuild("plain")


def test_rebuild_notices_other_frozen_weights():
    result = train(TrainConfig("resnet8", "fake", progress=False))
    changed = read_metadata(result.checkpoint) | {"seed": "1"}
    save_affine(result.model, "changed", metadata=changed)
    with pytest.raises(ValueError, match="draws other weights from seed 1"):
        rebuild("changed")


def test_training_goes_on_from_a_checkpoint():
    first = train(TrainConfig("resnet8", "fake", progress=False))
    options = TrainConfig("resnet8", "fake", progress=False, load=first.checkpoint)
    second = train(options)
    tracked = [result.model.state_dict()["bn.num_batches_tracked"] for result in (first, second)]
    assert [int(count) for count in tracked] == [2, 4]


def test_training_repeats_bit_for_bit_and_leaves_the_global_generator():
    before = torch.get_rng_state()
    results = [
        train(TrainConfig("resnet8", "fake", progress=False, compare="run")) for _ in range(2)
    ]
    assert torch.equal(before, torch.get_rng_state())
    first, second = (result.model.state_dict() for result in results)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert results[0].comparison.plain_train_loss == results[1].comparison.plain_train_loss


def test_the_run_beside_it_has_the_same_start_and_stays_close():
    compared = train(
        TrainConfig("resnet8", "fake", lr=0.01, progress=False, compare="run")
    ).comparison
    assert compared.gradients_agree
    assert abs(compared.loss_difference) < 1e-3
    assert compared.saved_bytes > 0 and compared.plain_saved_bytes > 0


def test_saved_activation_bytes_counts_what_autograd_keeps():
    conv, bn = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
    model = freeze(nn.Sequential(conv, bn, nn.ReLU()), "bn")
    x = torch.randn(2, 3, 8, 8)
    one_map = 2 * 4 * 8 * 8 * 4
    # BatchNorm keeps its input and 2 x 4 statistics, ReLU its output, the frozen first convolution nothing.
    assert 0 <= saved_activation_bytes(model, x) - 2 * one_map <= 64
    assert bn.num_batches_tracked == 0 and not bn.running_mean.any()
    # In eval mode nothing trains through the batch's statistics, but gamma still needs the input.
    assert saved_activation_bytes(model.eval(), x) >= 2 * one_map
    assert saved_activation_bytes(freeze(model, "none"), x) == 0


def test_gradient_agreement_tells_a_wrong_model_from_a_right_one():
    torch.manual_seed(0)
    plain = create("resnet8", in_channels=1)
    x, labels = torch.randn(8, 1, 8, 8), torch.arange(8)
    assert gradient_agreement(copy.deepcopy(plain), plain, x, labels).ok
    wrong = copy.deepcopy(plain)
    with torch.no_grad():
        wrong.segments[1][0].conv1.weight.mul_(1.1).add_(0.02)
    assert not gradient_agreement(wrong, plain, x, labels).ok
    assert not Agreement(float("nan"), 1e-6).ok


def test_explain_names_every_batchnorm(capsys):
    assert main(["explain", "--model", "resnet8", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["fused"]) + len(report["left"]) == 9
    assert main(["explain", "--model", "shufflenet_v2_x0_5"]) == 0
    assert capsys.readouterr().out.strip()


def test_doctor(capsys, monkeypatch):
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    for wanted in ("python", torch.__version__, "extension", "c++ compiler", "gpu", "missing"):
        assert wanted in printed
    assert main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["backends"] == bnfast.backends()


def test_doctor_says_what_is_missing(capsys, monkeypatch):
    monkeypatch.setattr("bnfast.backends", lambda: {"cpu": "not built", "reference": True})
    monkeypatch.setattr("shutil.which", lambda program: None)
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert "not built" in printed and "apt-get install g++" in printed and "pip install" in printed


def test_help_says_the_defaults(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--help"])
    assert stopped.value.code == 0
    assert "resnet14" in capsys.readouterr().out


def test_as_a_program():
    command = [sys.executable, "-m", "bnfast", "train", "--data", "nothing"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("bnfast: error: ") and done.stderr.count("\n") == 1


def test_pretrained_features_are_asked_for_and_kept(capsys):
    source = create("resnet8")
    with torch.no_grad():
        source.bn.weight.fill_(0.75)
    torch.save(source.state_dict(), "weights.pt")
    assert "--features pretrained" in refused(capsys, *TINY, "--weights", "weights.pt")
    options = ["--features", "pretrained", "--weights", "weights.pt"]
    assert main([*TINY, *options, "--lr", "0", "--out", "run"]) == 0
    model = rebuild("run/affine.safetensors", weights="weights.pt")
    assert torch.equal(model.conv.weight, source.conv.weight)
    assert (model.bn.weight == 0.75).all()
    assert main([*TINY, *options, "--lr", "0", "--out", "ones", "--init-gamma", "ones"]) == 0
    assert (rebuild("ones/affine.safetensors", weights="weights.pt").bn.weight == 1).all()
    other = create("resnet8")
    torch.save(other.state_dict(), "other.pt")
    with pytest.raises(ValueError, match="cannot be rebuilt"):
        rebuild("run/affine.safetensors", weights="other.pt")


@pytest.mark.parametrize(
    "options",
    [
        ["--config", "random2"],
        ["--config", "gamma", "--statistics", "running", "--calibrate", "2"],
        ["--amp", "bfloat16", "--no-channels-last"],
        ["--model", "timm:resnet18", "--features", "orthogonal"],
        # A seed without a pre-activation so near 0 that roundings decide on which side it is.
        ["--model", "vgg11", "--config", "bn+output", "--init-gamma", "symmetric", "--seed", "3"],
    ],
    ids=" ".join,
)
def test_other_ways_to_train(capsys, options):
    pytest.importorskip("timm")
    assert main([*TINY, *options, "--compare", "steps", "--out", "run"]) == 0
    assert "ms, plain" in capsys.readouterr().out
    trained = rebuild("run/affine.safetensors")
    assert all(value.isfinite().all() for value in trained.state_dict().values())
