"""Checkpoints of gamma, beta and running statistics."""

import pytest
import safetensors
import safetensors.torch
import torch
from torch import nn

from bnfast import models
from bnfast.affine import AffineFileError, load_affine, read_metadata, save_affine


def random_model(seed, name="resnet14"):
    torch.manual_seed(seed)
    model = models.create(name)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
                module.num_batches_tracked.fill_(seed + 7)
    return model


def clone(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def is_batchnorm(model, key):
    return isinstance(model.get_submodule(key.rpartition(".")[0]), nn.BatchNorm2d)


def test_round_trip_restores_batchnorm_and_nothing_else(tmp_path):
    source, target = random_model(0), random_model(1)
    before = clone(target)
    save_affine(source, tmp_path / "a.safetensors", metadata={"seed": "0"})
    assert load_affine(target, tmp_path / "a.safetensors") == {"seed": "0"}
    for key, value in target.state_dict().items():
        wanted = source.state_dict() if is_batchnorm(target, key) else before
        assert torch.equal(value, wanted[key])


def test_file_holds_the_five_tensors_of_each_batchnorm(tmp_path):
    save_affine(random_model(0), tmp_path / "a.safetensors")
    with safetensors.safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert len(list(file.keys())) == 15 * 5
        assert file.metadata()["bnfast.format"] == "affine/1"
        assert "bnfast.version" in file.metadata()
    assert (tmp_path / "a.safetensors").stat().st_size < 30_000


def test_nothing_else_is_left_in_the_folder(tmp_path):
    save_affine(random_model(0), tmp_path / "a.safetensors")
    save_affine(random_model(1), tmp_path / "a.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    save_affine(random_model(0), path)
    old = path.read_bytes()

    def fail(source, target):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save_affine(random_model(1), path)
    assert path.read_bytes() == old
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.safetensors"]


def test_also_stores_further_tensors(tmp_path):
    source, target = random_model(0), random_model(1)
    save_affine(source, tmp_path / "a.safetensors", also=["fc.weight", "fc.bias"])
    load_affine(target, tmp_path / "a.safetensors")
    assert torch.equal(source.fc.weight, target.fc.weight)
    assert torch.equal(source.fc.bias, target.fc.bias)
    assert not torch.equal(source.conv.weight, target.conv.weight)


def test_objects_requires_grad_and_autograd_stay(tmp_path):
    model = random_model(0)
    save_affine(model, tmp_path / "a.safetensors")
    gamma = model.bn.weight
    load_affine(model, tmp_path / "a.safetensors")
    assert model.bn.weight is gamma and gamma.requires_grad and gamma.is_leaf


def test_odd_batchnorms(tmp_path):
    def build():
        shared = nn.BatchNorm1d(3)
        return nn.ModuleDict(
            {
                "bare": nn.BatchNorm2d(2, affine=False),
                "untracked": nn.BatchNorm2d(2, track_running_stats=False),
                "a": shared,
                "b": shared,
                "low": nn.BatchNorm2d(2, dtype=torch.bfloat16),
            }
        )

    source, target = build(), build()
    with torch.no_grad():
        for value in source.state_dict().values():
            value.add_(3)
    save_affine(source, tmp_path / "a.safetensors")
    load_affine(target, tmp_path / "a.safetensors")
    for key, value in source.state_dict().items():
        assert torch.equal(value, target.state_dict()[key])


def test_a_bare_batchnorm_is_a_model(tmp_path):
    save_affine(nn.BatchNorm2d(2), tmp_path / "a.safetensors")
    load_affine(nn.BatchNorm2d(2), tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (lambda: random_model(1, "resnet20"), "the file lacks 'segments"),
        (lambda: random_model(1, "resnet8"), "the model lacks 'segments"),
        (lambda: random_model(1, "wrn14_2"), r"is \[16\] in the file, \[32\] in the model"),
        (lambda: random_model(1).double(), "is torch.float32 in the file, torch.float64"),
        (lambda: nn.Linear(2, 2), "no BatchNorm"),
    ],
)
def test_a_misfit_changes_nothing(tmp_path, target, message):
    save_affine(random_model(0), tmp_path / "a.safetensors")
    model = target()
    before = clone(model)
    with pytest.raises(AffineFileError, match=message):
        load_affine(model, tmp_path / "a.safetensors")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_only_the_last_tensor_misfits_and_still_nothing_changes(tmp_path):
    path = tmp_path / "a.safetensors"
    save_affine(random_model(0), path)
    with safetensors.safe_open(path, framework="pt") as file:
        header, tensors = file.metadata(), {key: file.get_tensor(key) for key in list(file.keys())}
    tensors["segments.2.1.bn2.weight"] = torch.ones(3)
    safetensors.torch.save_file(tensors, path, metadata=header)
    model = random_model(1)
    before = clone(model)
    with pytest.raises(AffineFileError, match=r"segments\.2\.1\.bn2\.weight"):
        load_affine(model, path)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", bytes(64), b"\xff" * 4096])
def test_unreadable_files(tmp_path, content):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(AffineFileError, match="not a readable safetensors file"):
        load_affine(random_model(0), tmp_path / "a")


def test_truncated_file(tmp_path):
    save_affine(random_model(0), tmp_path / "a")
    (tmp_path / "a").write_bytes((tmp_path / "a").read_bytes()[:-5])
    with pytest.raises(AffineFileError, match="not a readable safetensors file"):
        load_affine(random_model(0), tmp_path / "a")


@pytest.mark.parametrize("metadata", [None, {"bnfast.format": "affine/99"}, {"format": "pt"}])
def test_foreign_files_and_other_versions(tmp_path, metadata):
    safetensors.torch.save_file({"weight": torch.ones(2)}, tmp_path / "a", metadata=metadata)
    with pytest.raises(AffineFileError, match="must be 'affine/1'"):
        load_affine(nn.BatchNorm2d(2), tmp_path / "a")


@pytest.mark.parametrize("also", ["{", "3", '["nothing"]', "[[1]]"])
def test_a_damaged_list_of_further_tensors(tmp_path, also):
    header = {"bnfast.format": "affine/1", "bnfast.also": also}
    safetensors.torch.save_file({"weight": torch.ones(2)}, tmp_path / "a", metadata=header)
    with pytest.raises(AffineFileError):
        load_affine(nn.BatchNorm2d(2), tmp_path / "a")


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_affine(random_model(0), tmp_path / "none")
    with pytest.raises(OSError):
        load_affine(random_model(0), tmp_path)
    with pytest.raises(FileNotFoundError):
        save_affine(random_model(0), tmp_path / "none" / "a")


@pytest.mark.parametrize("metadata", [{"seed": 1}, {"bnfast.seed": "1"}, {1: "a"}])
def test_wrong_metadata_writes_nothing(tmp_path, metadata):
    with pytest.raises(ValueError, match="metadata"):
        save_affine(random_model(0), tmp_path / "a", metadata=metadata)
    assert not list(tmp_path.iterdir())


def test_wrong_models_write_nothing(tmp_path):
    with pytest.raises(ValueError, match="no BatchNorm"):
        save_affine(nn.Linear(2, 2), tmp_path / "a")
    with pytest.raises(ValueError, match="'head'"):
        save_affine(random_model(0), tmp_path / "a", also=["head"])
    assert not list(tmp_path.iterdir())


def test_metadata_can_be_read_alone(tmp_path):
    save_affine(random_model(0), tmp_path / "a", metadata={"note": "ü, 1"})
    assert read_metadata(tmp_path / "a") == {"note": "ü, 1"}
