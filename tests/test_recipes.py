"""The paper's recipes, number by number, and that each can be changed."""

import pytest

from bnfast.recipes import TrainConfig, from_plain


def rates(config, steps_per_epoch, steps):
    return [config.learning_rate(step, steps_per_epoch) for step in steps]


def test_the_papers_recipe_for_cifar():
    config = TrainConfig(data="cifar10").resolved()
    assert (config.preset, config.epochs, config.batch_size, config.lr) == ("cifar", 160, 128, 0.1)
    assert (config.momentum, config.weight_decay, config.warmup_epochs) == (0.9, 1e-4, 0)
    assert (config.flip, config.crop_padding) == (True, 4)
    assert (config.init_gamma, config.init_beta, config.features) == (
        "uniform",
        0,
        "kaiming_normal",
    )
    steps = (0, 31_279, 31_280, 46_919, 46_920, 62_559)
    assert rates(config, 391, steps) == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


def test_the_papers_recipe_for_imagenet():
    config = TrainConfig(data="imagenet").resolved()
    assert (config.preset, config.epochs, config.batch_size, config.lr) == (
        "imagenet",
        90,
        1024,
        0.4,
    )
    assert (config.momentum, config.weight_decay, config.flip) == (0.9, 1e-4, True)
    assert (config.crop_scale, config.crop_ratio) == ((0.1, 1.0), (0.8, 1.25))
    assert (config.image_size, config.resize_size) == (224, 256)
    n = 1252
    steps = (0, 3130, 5 * n, 30 * n - 1, 30 * n, 60 * n, 80 * n)
    assert rates(config, n, steps) == pytest.approx([0, 0.2, 0.4, 0.4, 0.04, 0.004, 0.0004])


def test_drops_move_with_the_number_of_epochs():
    config = TrainConfig(data="fashion-mnist", epochs=4).resolved()
    assert config.milestones == (2, 3)
    assert TrainConfig(epochs=4, milestones=(1,)).resolved().milestones == (1,)
    assert TrainConfig(preset="imagenet", epochs=9).resolved().milestones == pytest.approx(
        (3, 6, 8)
    )


def test_every_number_can_be_changed():
    changed = {
        "epochs": 3,
        "batch_size": 7,
        "lr": 0.7,
        "milestones": (1.0,),
        "lr_factor": 0.5,
        "warmup_epochs": 0.5,
        "momentum": 0.1,
        "weight_decay": 0.0,
        "flip": False,
        "crop_padding": 2,
        "image_size": 64,
        "resize_size": 70,
        "crop_scale": (0.5, 0.9),
        "crop_ratio": (1.0, 1.1),
    }
    config = TrainConfig(preset="cifar", **changed).resolved()
    assert {name: getattr(config, name) for name in changed} == changed
    assert rates(config, 10, (0, 4, 5, 9, 10)) == pytest.approx([0, 0.56, 0.7, 0.7, 0.35])
    assert config.augmentation.crop_padding == 2 and config.augmentation.crop_scale == (0.5, 0.9)


def test_the_seeds_are_one_unless_said_otherwise():
    config = TrainConfig(seed=5).resolved()
    assert (config.seed_order, config.seed_augmentation) == (5, 5)
    config = TrainConfig(seed=5, seed_order=6, seed_augmentation=0).resolved()
    assert (config.seed, config.seed_order, config.seed_augmentation) == (5, 6, 0)


def test_plain_values_and_back():
    config = TrainConfig(data="cifar10", crop_scale=(0.2, 0.8)).resolved()
    assert from_plain(config.saved()).resolved() == config
    with pytest.raises(ValueError, match="no option 'epoch'"):
        from_plain({"epoch": 3})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"preset": "mine"}, "unknown preset 'mine'"),
        ({"config": "random0"}, "unknown configuration"),
        ({"milestones": (float("nan"),)}, "milestones"),
        ({"calibrate": -1}, "calibrate must not be negative"),
        ({"checkpoint_every": 0}, "checkpoint_every must be at least 1"),
        ({"statistics": "none"}, "statistics must be one of"),
        ({"sync_bn": True, "convert": False}, "SyncBatchNorm"),
    ],
    ids=str,
)
def test_wrong_values(wrong, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**wrong).resolved()
