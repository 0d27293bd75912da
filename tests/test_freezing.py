"""What trains in each of the paper's configurations."""

import contextlib

import pytest
import torch
import torchvision
from torch import nn

import bnfast
from bnfast import models
from bnfast.freezing import (
    CONFIGURATIONS,
    affine_parameters,
    freeze,
    freeze_statistics,
    frozen_digest,
    normalised_convolutions,
    output_layers,
    shortcut_convolutions,
)
from bnfast.random_weights import merge_random_weights, train_random_weights


def on_meta(build):
    with torch.device("meta"):
        return build()


def trained(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def path_of(model, wanted):
    return next(name for name, module in model.named_modules() if module is wanted)


@pytest.mark.parametrize(
    ("train", "count"),
    [
        ("all", 175_258),
        ("bn", 1_120),
        ("bn+output", 1_770),
        ("bn+shortcut+output", 4_330),
        ("shortcut+output", 3_210),
        ("output", 650),
        ("none", 0),
        ("all-but-bn", 174_138),
        ("gamma", 560),
        ("beta", 560),
    ],
)
def test_trainable_counts_of_resnet14(train, count):
    model = models.create("resnet14")
    freeze(model, "none")
    assert freeze(model, train) is model
    assert trained(model) == count


def test_every_batchnorm_type_is_found_whatever_its_name():
    timm_layers = pytest.importorskip("timm.layers")
    layers = {
        "one": nn.BatchNorm1d(2),
        "two": nn.BatchNorm2d(2),
        "three": nn.BatchNorm3d(2),
        "sync": nn.SyncBatchNorm(2),
        "timm": timm_layers.BatchNormAct2d(2),
        "plain": nn.BatchNorm2d(2, affine=False),
        "bn_instance": nn.InstanceNorm2d(2, affine=True),
        "bn_layer": nn.LayerNorm(2),
        "bn": nn.Conv2d(2, 2, 1),
    }
    parameters = affine_parameters(nn.ModuleDict(layers))
    expected = [
        p for name in ("one", "two", "three", "sync", "timm") for p in layers[name].parameters()
    ]
    assert [id(p) for p in parameters] == [id(p) for p in expected]


def test_a_shared_batchnorm_counts_once():
    bn = nn.BatchNorm2d(2)
    assert len(affine_parameters(nn.Sequential(bn, nn.ReLU(), bn))) == 2


def test_unknown_configuration_is_refused():
    with pytest.raises(ValueError, match=r"all-but-bn.*'delta'"):
        freeze(models.create("resnet14"), "delta")


@pytest.mark.parametrize(
    ("model", "train"),
    [
        (nn.Sequential(nn.Conv2d(1, 1, 3), nn.BatchNorm2d(1, affine=False)), "bn"),
        (nn.Sequential(nn.Conv2d(1, 1, 3)), "all-but-bn"),
        (nn.Sequential(nn.BatchNorm2d(1)), "bn+output"),
        (nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1)), "bn+shortcut+output"),
    ],
)
def test_a_missing_part_is_refused_and_nothing_changes(model, train):
    before = [p.requires_grad_(i % 2 == 0).requires_grad for i, p in enumerate(model.parameters())]
    with pytest.raises(ValueError, match="the model has none"):
        freeze(model, train)
    assert [p.requires_grad for p in model.parameters()] == before


def test_integer_parameters_stay_as_they_are():
    model = nn.Sequential(nn.BatchNorm2d(2))
    model.packed = nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False)
    assert not freeze(model, "all").packed.requires_grad


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("resnet18", "fc"),
        ("vgg11_bn", "classifier.6"),
        ("mobilenet_v3_small", "classifier.3"),
        ("squeezenet1_1", "classifier.1"),
        ("densenet121", "classifier"),
        ("efficientnet_b0", "classifier.1"),
    ],
)
def test_output_layer_of_torchvision_models(name, path):
    model = on_meta(lambda: torchvision.models.get_model(name, weights=None))
    assert [path_of(model, layer) for layer in output_layers(model)] == [path]


def test_output_layer_is_not_that_of_an_auxiliary_head():
    model = on_meta(
        lambda: torchvision.models.get_model(
            "deeplabv3_mobilenet_v3_large", weights=None, weights_backbone=None, aux_loss=True
        )
    )
    assert [path_of(model, layer) for layer in output_layers(model)] == ["classifier.4"]


def test_output_layer_of_timm_models():
    timm = pytest.importorskip("timm")
    for name, path in [
        ("resnet18", "fc"),
        ("regnety_002", "head.fc"),
        ("ghostnet_100", "classifier"),
    ]:
        model = on_meta(lambda name=name: timm.create_model(name))
        assert [path_of(model, layer) for layer in output_layers(model)] == [path]
    headless = on_meta(lambda: timm.create_model("resnet18", num_classes=0))
    with pytest.raises(ValueError, match="output layer"):
        freeze(headless, "output")


@pytest.mark.parametrize(
    ("name", "paths"),
    [
        ("resnet18", [f"layer{i}.0.downsample.0" for i in (2, 3, 4)]),
        ("resnet50", [f"layer{i}.0.downsample.0" for i in (1, 2, 3, 4)]),
        ("regnet_y_400mf", [f"trunk_output.block{i}.block{i}-0.proj.0" for i in (1, 2, 3, 4)]),
        ("mobilenet_v2", []),
        ("densenet121", []),
        ("googlenet", []),
    ],
)
def test_shortcut_convolutions_of_torchvision_models(name, paths):
    options = {"init_weights": False} if name == "googlenet" else {}
    with contextlib.nullcontext() if "regnet" in name else torch.device("meta"):
        model = torchvision.models.get_model(name, weights=None, **options)
    assert [path_of(model, conv) for conv in shortcut_convolutions(model)] == paths


def test_shortcut_convolutions_of_timm_models():
    timm = pytest.importorskip("timm")
    for name, count in [("resnet50d", 4), ("resnetv2_50", 4), ("regnety_002", 4)]:
        model = on_meta(lambda name=name: timm.create_model(name))
        found = shortcut_convolutions(model)
        assert len(found) == count
        assert all("downsample" in path_of(model, conv) for conv in found)


class JoinedByModule(nn.Module):
    """A bottleneck whose residual goes into a child as second argument, all convolutions as bare children."""

    class Join(nn.Module):
        def forward(self, x, residual):
            return torch.relu(x + residual)

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(4, 4, 1)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.third = nn.Conv2d(4, 8, 1)
        self.around = nn.Conv2d(4, 8, 1)
        self.join = self.Join()

    def forward(self, x):
        return self.join(self.third(self.second(self.first(x))), residual=self.around(x))


def test_a_shortcut_needs_no_particular_name():
    model = JoinedByModule()
    assert shortcut_convolutions(model) == [model.around]


def test_an_untraceable_block_has_no_shortcuts():
    class Branching(JoinedByModule):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else x

    assert shortcut_convolutions(Branching()) == []


def test_digest_sees_every_frozen_bit_and_nothing_else():
    model = freeze(models.create("resnet14"), "bn")
    digest = frozen_digest(model)
    with torch.no_grad():
        model.bn.weight.add_(1)
        model.bn.running_mean.add_(1)
    assert frozen_digest(model.to(memory_format=torch.channels_last)) == digest
    with torch.no_grad():
        model.fc.bias[3] = torch.nextafter(model.fc.bias[3], torch.tensor(9.0))
    assert frozen_digest(model) != digest
    assert frozen_digest(freeze(model, "output")) != frozen_digest(freeze(model, "bn"))


def test_digest_of_bfloat16_scalars_and_empty_tensors():
    model = nn.Module()
    model.a = nn.Parameter(torch.tensor(1.5, dtype=torch.bfloat16), requires_grad=False)
    model.b = nn.Parameter(torch.empty(0, 3), requires_grad=False)
    assert len(frozen_digest(model)) == 64


def fifty_steps(model, train_mode=lambda model: None):
    """SGD with momentum and weight decay on everything that the optimiser is given, which is every parameter."""
    torch.set_num_threads(1)  # so small a model gains nothing from more
    gen = torch.Generator().manual_seed(7)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    for _ in range(50):
        train_mode(model.train())
        loss = nn.functional.cross_entropy(
            model(torch.randn(8, 1, 8, 8, generator=gen)), torch.arange(8)
        )
        optimizer.zero_grad()
        if loss.requires_grad:
            loss.backward()
            optimizer.step()


def start(converted, train, name="resnet8"):
    torch.manual_seed(0)
    model = models.create(name, in_channels=1)
    if train.startswith("random"):
        train_random_weights(model, int(train[6:]))
    else:
        freeze(model, train)
    return bnfast.convert(model, train="keep") if converted else model


@pytest.mark.parametrize("converted", [False, True], ids=["plain", "converted"])
@pytest.mark.parametrize("train", [*CONFIGURATIONS, "random1", "random2"])
def test_training_moves_what_trains_and_nothing_else(train, converted):
    model = start(converted, train)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    digest = frozen_digest(model)
    fifty_steps(model)
    assert frozen_digest(model) == digest
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) is not parameter.requires_grad, name
        assert parameter.isfinite().all()
    assert model.bn.running_mean.any()


@pytest.mark.parametrize("converted", [False, True], ids=["plain", "converted"])
def test_frozen_statistics_stay_and_gamma_and_beta_train(converted):
    model = start(converted, "bn")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fifty_steps(model, freeze_statistics)
    for name, value in model.state_dict().items():
        is_affine = "bn" in name or "shortcut.1" in name
        trained = is_affine and "running" not in name and "tracked" not in name
        assert torch.equal(value, before[name]) is not trained, name


def test_statistics_that_do_not_exist_cannot_be_frozen():
    model = nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm2d(2, track_running_stats=False)).train()
    with pytest.raises(ValueError, match="'1' has no running statistics"):
        freeze_statistics(model)
    assert model[0].training


@pytest.mark.parametrize("converted", [False, True], ids=["plain", "converted"])
def test_random_weights_move_only_at_their_places(converted):
    model = start(converted, "random2", "resnet14")
    assert trained(model) == models.count_parameters(models.create("resnet14")).bn == 1_120
    dense = {
        n: m.weight.detach().clone() for n, m in model.named_modules() if isinstance(m, nn.Conv2d)
    }
    values = model.state_dict()
    torch.manual_seed(0)
    untouched = models.create("resnet14", in_channels=1)
    x = torch.randn(4, 1, 8, 8)
    torch.testing.assert_close(model.eval()(x), untouched.eval()(x))
    fifty_steps(model)
    for name, conv in model.named_modules():
        if isinstance(conv, nn.Conv2d):
            moved = (conv.weight != dense[name]).flatten(1)
            chosen = torch.zeros_like(moved).scatter(
                1, values[f"{name}.parametrizations.weight.0.index"], True
            )
            assert torch.equal(moved, chosen), name
    after = model.eval()(x)
    merged = merge_random_weights(model)
    assert "conv.weight" in merged.state_dict() and trained(merged) == 0
    assert set(bnfast.revert(merged).state_dict()) == set(untouched.state_dict())
    torch.testing.assert_close(merged(x), after)


def test_random_weights_are_those_of_the_generator():
    drawn = []
    for seed in (1, 1, 2):
        model = models.create("resnet8")
        train_random_weights(model, 3, torch.Generator().manual_seed(seed))
        index = model.conv.parametrizations.weight[0].index
        assert all(len(set(row.tolist())) == 3 for row in index)
        drawn.append(index)
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_random_weights_that_cannot_be():
    model = models.create("resnet8")
    for wrong, message in ((0, "at least 1"), (17, "'segments.1.0.shortcut.0' has 16 weights")):
        with pytest.raises(ValueError, match=message):
            train_random_weights(model, wrong)
        assert trained(model) == models.count_parameters(model).total
    with pytest.raises(ValueError, match="no convolution"):
        train_random_weights(nn.Sequential(nn.Conv2d(1, 1, 1)), 1)
    with pytest.raises(ValueError, match="parametrized already"):
        train_random_weights(train_random_weights(model, 1), 1)


def test_convolutions_in_front_of_a_batchnorm():
    model = models.create("resnet14")
    assert len(normalised_convolutions(model)) == 15
    model = models.create("mobilenet_v3_small")  # squeeze and excitation has convolutions without
    inside = {id(m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and "fc" in n}
    found = normalised_convolutions(model)
    assert len(found) == 34 and not inside & {id(conv) for conv in found}
