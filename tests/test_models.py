"""The paper's networks: parameter counts to the integer, forward shapes, initialisation."""

import sys

import pytest
import safetensors.torch
import torch
from torch import nn

from bnfast import models

# name, total, BatchNorm parameters, output weight + bias, shortcut convolutions, BatchNorm layers
CIFAR = [
    ("resnet14", 175_258, 1_120, 650, 2_560, 15),
    ("resnet20", 272_474, 1_568, 650, 2_560, 21),
    ("resnet32", 466_906, 2_464, 650, 2_560, 33),
    ("resnet56", 855_770, 4_256, 650, 2_560, 57),
    ("resnet110", 1_730_714, 8_288, 650, 2_560, 111),
    ("resnet218", 3_480_602, 16_352, 650, 2_560, 219),
    ("resnet434", 6_980_378, 32_480, 650, 2_560, 435),
    ("resnet866", 13_979_930, 64_736, 650, 2_560, 867),
    ("wrn14_1", 175_258, 1_120, 650, 2_560, 15),
    ("wrn14_2", 696_618, 2_240, 1_290, 10_240, 15),
    ("wrn14_4", 2_777_674, 4_480, 2_570, 40_960, 15),
    ("wrn14_8", 11_093_130, 8_960, 5_130, 163_840, 15),
    ("wrn14_16", 44_337_418, 17_920, 10_250, 655_360, 15),
    ("wrn14_32", 177_279_498, 35_840, 20_490, 2_621_440, 15),
    ("vgg11", 9_231_114, 5_504, 5_130, 0, 8),
    ("vgg13", 9_416_010, 5_888, 5_130, 0, 10),
    ("vgg16", 14_728_266, 8_448, 5_130, 0, 13),
    ("vgg19", 20_040_522, 11_008, 5_130, 0, 16),
]
IMAGENET = [
    ("resnet18", 11_689_512, 9_600, 513_000, 172_032, 20),
    ("resnet34", 21_797_672, 17_024, 513_000, 172_032, 36),
    ("resnet50", 25_557_032, 53_120, 2_049_000, 2_768_896, 53),
    ("resnet101", 44_549_160, 105_344, 2_049_000, 2_768_896, 104),
    ("resnet152", 60_192_808, 151_424, 2_049_000, 2_768_896, 155),
    ("resnet200", 64_673_832, 176_000, 2_049_000, 2_768_896, 203),
]


def check_counts(model, row):
    assert models.count_parameters(model) == row[1:5]
    assert sum(isinstance(module, nn.BatchNorm2d) for module in model.modules()) == row[5]


@pytest.mark.parametrize("row", CIFAR, ids=lambda row: row[0])
def test_cifar_counts(row):
    with torch.device("meta"):
        check_counts(models.create(row[0]), row)


@pytest.mark.parametrize("row", IMAGENET, ids=lambda row: row[0])
def test_imagenet_counts(row):
    with torch.device("meta"):
        check_counts(models.create(row[0], num_classes=1000), row)


@pytest.mark.parametrize(
    ("name", "total"),
    [("resnet14", 181_108), ("resnet110", 1_736_564), ("resnet866", 13_985_780)],
)
def test_counts_with_100_classes(name, total):
    with torch.device("meta"):
        assert models.count_parameters(models.create(name, num_classes=100)).total == total


@pytest.mark.parametrize("name", ["resnet14", "wrn8_2", "vgg11", "resnet18", "resnet50"])
def test_forward_shape(name):
    with torch.device("meta"):
        model = models.create(name, num_classes=7, in_channels=1)
        assert model(torch.empty(2, 1, 32, 32)).shape == (2, 7)


def test_maps_of_the_cifar_resnet_are_32_16_8():
    with torch.device("meta"):
        model = models.create("resnet14")
        x = model.conv(torch.empty(1, 3, 32, 32))
        sizes = []
        for segment in model.segments:
            x = segment(x)
            sizes.append(tuple(x.shape[1:]))
    assert sizes == [(16, 32, 32), (32, 16, 16), (64, 8, 8)]


@pytest.mark.parametrize(
    "name",
    [
        "resnet15",
        "resnet2",
        "wrn14",
        "wrn16_4",
        "wrn14_0",
        "resnet14_2",
        "vgg12",
        "alexander",
        "timm:alexnet",
        "",
    ],
)
def test_unknown_name_lists_what_is_allowed(name):
    with pytest.raises(ValueError, match=r"unknown model .*resnet<6n\+2>.*wrn.*resnet200.*vgg19"):
        models.create(name)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("mobilenet_v3_small", "MobileNetV3"),
        ("torchvision:vgg16", "VGG"),
        ("vgg16", "CifarVGG"),
        ("googlenet", "GoogLeNet"),
        ("regnety_002", "RegNet"),
        ("timm:resnet18", "ResNet"),
    ],
)
def test_networks_of_torchvision_and_timm(name, kind):
    pytest.importorskip("timm")
    model = models.create(name, num_classes=7, in_channels=1).eval()
    assert type(model).__name__ == kind
    assert model(torch.randn(2, 1, 64, 64)).shape == (2, 7)
    gamma = gammas(model) if any(isinstance(m, nn.BatchNorm2d) for m in model.modules()) else None
    assert gamma is None or (gamma.min() >= 0 and gamma.max() < 1 and gamma.std() > 0.2)


@pytest.mark.parametrize("save", [torch.save, safetensors.torch.save_file])
def test_pretrained_weights_of_a_file(tmp_path, save):
    source = models.create("resnet8", num_classes=10)
    save(source.state_dict(), tmp_path / "weights")
    same = models.create_pretrained("resnet8", 10, weights=tmp_path / "weights").state_dict()
    assert all(torch.equal(value, same[key]) for key, value in source.state_dict().items())
    other = models.create_pretrained("resnet8", 4, weights=tmp_path / "weights").state_dict()
    assert torch.equal(other["conv.weight"], source.conv.weight) and len(other["fc.bias"]) == 4
    with pytest.raises(ValueError, match="do not fit 'resnet14'"):
        models.create_pretrained("resnet14", weights=tmp_path / "weights")


def test_networks_of_packages_that_are_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    with pytest.raises(ValueError, match="pip install torchvision"):
        models.create("resnet50")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"unknown model 'alexnet'.*torchvision and timm not installed"
    ):
        models.create("alexnet")


def test_pretrained_weights_that_are_none(tmp_path):
    with pytest.raises(ValueError, match="no pretrained weights for 'resnet14'"):
        models.create_pretrained("resnet14")
    (tmp_path / "broken").write_bytes(b"broken")
    with pytest.raises(ValueError, match="no file of tensors"):
        models.create_pretrained("resnet14", weights=tmp_path / "broken")
    with pytest.raises(FileNotFoundError):
        models.create_pretrained("resnet14", weights=tmp_path / "nowhere")


@pytest.mark.parametrize("argument", ["num_classes", "in_channels"])
def test_counts_below_one_are_refused(argument):
    with pytest.raises(ValueError, match=argument):
        models.create("resnet14", **{argument: 0})


def gammas(model):
    return torch.cat([m.weight for m in model.modules() if isinstance(m, nn.BatchNorm2d)])


def test_default_initialisation_is_the_papers():
    torch.manual_seed(0)
    model = models.create("wrn14_2")
    gamma = gammas(model)
    assert gamma.min() >= 0 and gamma.max() < 1
    assert abs(gamma.mean() - 0.5) < 0.05
    assert all(not m.bias.any() for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    conv = model.segments[2][1].conv2.weight
    assert abs(conv.std() / (2 / conv[0].numel()) ** 0.5 - 1) < 0.02
    assert abs(model.fc.weight.std() / (2 / 128) ** 0.5 - 1) < 0.1
    assert model.fc.bias.abs().max() <= 128**-0.5


def test_initialisation_choices():
    model = models.create("resnet14")
    models.initialize(model, gamma="ones", beta=1.0)
    assert (gammas(model) == 1).all() and (model.bn.bias == 1).all()
    models.initialize(model, gamma="symmetric")
    assert gammas(model).min() < -0.9 and gammas(model).max() > 0.9
    models.initialize(model, features="binary")
    magnitude = model.conv.weight.abs()
    assert magnitude.min() == magnitude.max() > 0
    models.initialize(model, features="orthogonal")
    rows = model.conv.weight.flatten(1)
    torch.testing.assert_close(rows @ rows.T, torch.eye(16), atol=1e-5, rtol=0)
    models.initialize(model, features="kaiming_uniform")
    assert model.conv.weight.abs().max() <= (6 / 27) ** 0.5


def test_generator_alone_decides_and_gamma_does_not_move_the_features():
    first, second = models.create("resnet14"), models.create("resnet14")
    models.initialize(first, generator=torch.Generator().manual_seed(3))
    before = torch.get_rng_state()
    models.initialize(second, gamma="ones", generator=torch.Generator().manual_seed(3))
    assert torch.equal(before, torch.get_rng_state())
    for one, other in zip(first.modules(), second.modules(), strict=True):
        if isinstance(one, (nn.Conv2d, nn.Linear)):
            assert torch.equal(one.weight, other.weight)
    assert torch.equal(first.fc.bias, second.fc.bias)
    assert not torch.equal(gammas(first), gammas(second))


def test_the_global_seed_decides_what_create_draws():
    states = []
    for _ in range(2):
        torch.manual_seed(5)
        states.append(models.create("resnet14").state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize(
    "wrong", [{"gamma": "two"}, {"features": "zeros"}, {"beta": float("nan")}], ids=str
)
def test_wrong_initialisation_changes_nothing(wrong):
    model = models.create("resnet14")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=next(iter(wrong))):
        models.initialize(model, **wrong)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
