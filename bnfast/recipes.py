"""How a run trains: the paper's recipes as presets, and everything else that a run depends on."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

from bnfast import data, models
from bnfast.data import Augmentation
from bnfast.freezing import CONFIGURATIONS


@dataclass(frozen=True)
class Preset:
    """A recipe: SGD with momentum on the mean cross-entropy, weight decay on everything that trains.

    The learning rate rises linearly from 0 during warmup_epochs, step by step, and is multiplied by lr_factor at each of
    the milestones (in epochs; they scale with another number of epochs).
    """

    epochs: int
    batch_size: int
    lr: float
    milestones: tuple[float, ...]
    momentum: float = 0.9
    weight_decay: float = 1e-4
    lr_factor: float = 0.1
    warmup_epochs: float = 0
    augmentation: Augmentation = Augmentation()


PRESETS: dict[str, Preset] = {
    # The paper's: research code of its first author, and arXiv 2003.00152.
    "cifar": Preset(160, 128, 0.1, (80, 120), augmentation=Augmentation(flip=True, crop_padding=4)),
    "imagenet": Preset(
        90, 1024, 0.4, (30, 60, 80), warmup_epochs=5, augmentation=Augmentation(flip=True)
    ),
    "digits": Preset(20, 32, 0.3, (10, 15)),
    "smoke": Preset(1, 32, 0.1, (0.5, 0.75)),
}

RANDOM_WEIGHTS = re.compile(r"random([1-9]\d*)")
CONFIGURATION_NAMES = f"{', '.join(CONFIGURATIONS)}, random<k> (k weights per output channel)"
PRETRAINED = "pretrained"
FEATURES = (*models.FEATURE_CHOICES, PRETRAINED)


def _option(default: Any, group: str, help: str, **more: Any) -> Any:
    """A field of TrainConfig that is an option of the command line, in a group of its help."""
    return field(default=default, metadata={"group": group, "help": help, **more})


_RECIPE = "recipe (the preset's where left out)"
_WHAT = "what is trained"
_START = "where it starts"
_HOW = "how it runs"
_FOLDER = "folder, checkpoints, records"


@dataclass(frozen=True)
class TrainConfig:
    """Everything that a training run depends on; the fields are the options of ``bnfast train``, described there.

    Fields that are None are filled in by :meth:`resolved`: those of the recipe from the preset.
    """

    model: str = _option("resnet14", _WHAT, models.ALLOWED_NAMES)
    data: str = _option("digits", _WHAT, "the data set", choices=tuple(data.DATASETS))
    config: str = _option("bn", _WHAT, f"what learns: {CONFIGURATION_NAMES}")
    statistics: str = _option(
        "batch",
        _WHAT,
        "what BatchNorm normalises with in training: those of the batch, or its running statistics, kept as they are",
        choices=("batch", "running"),
    )
    data_dir: str | os.PathLike[str] | None = _option(
        None, _WHAT, "where its files are, if not bundled", metavar="DIR"
    )
    download: bool = _option(
        False, _WHAT, "fetch the data set first (fashion-mnist, cifar10, cifar100)"
    )

    preset: str | None = _option(
        None,
        _RECIPE,
        "cifar and imagenet are the paper's; the data set's where left out",
        choices=tuple(PRESETS),
    )
    epochs: int | None = _option(None, _RECIPE, "passes over the training data", type=int)
    batch_size: int | None = _option(None, _RECIPE, "images per step, over all ranks", type=int)
    lr: float | None = _option(None, _RECIPE, "learning rate", type=float)
    milestones: tuple[float, ...] | None = _option(
        None,
        _RECIPE,
        "epochs at which the learning rate drops; scaled with --epochs where left out",
        type=float,
        nargs="*",
    )
    lr_factor: float | None = _option(None, _RECIPE, "what a drop multiplies it by", type=float)
    warmup_epochs: float | None = _option(None, _RECIPE, "epochs of linear rise from 0", type=float)
    momentum: float | None = _option(None, _RECIPE, "of SGD", type=float)
    weight_decay: float | None = _option(None, _RECIPE, "of all that trains", type=float)
    flip: bool | None = _option(None, _RECIPE, "mirror half of the training images")
    crop_padding: int | None = _option(
        None, _RECIPE, "zeros around images in memory before a crop", type=int
    )
    image_size: int | None = _option(None, _RECIPE, "size of images from files", type=int)
    resize_size: int | None = _option(
        None, _RECIPE, "size before the test's crop, image files", type=int
    )
    crop_scale: tuple[float, float] | None = _option(
        None, _RECIPE, "share of the area that a crop of image files takes", type=float, nargs=2
    )
    crop_ratio: tuple[float, float] | None = _option(
        None, _RECIPE, "its width over height", type=float, nargs=2
    )

    seed: int = _option(0, _START, "of the weights, and of what follows where left out", type=int)
    seed_order: int | None = _option(None, _START, "of the order of the data", type=int)
    seed_augmentation: int | None = _option(None, _START, "of crops and flips", type=int)
    features: str = _option(
        "kaiming_normal",
        _START,
        "the frozen weights; pretrained ones are no random features",
        choices=FEATURES,
    )
    weights: str | os.PathLike[str] | None = _option(
        None,
        _START,
        "state_dict for --features pretrained; torchvision's or timm's where left out",
        metavar="FILE",
    )
    init_gamma: str | None = _option(
        None,
        _START,
        "first gammas: U[0, 1), 1 or U[-1, 1); uniform, or as pretrained",
        choices=models.GAMMA_CHOICES,
    )
    init_beta: float | None = _option(
        None, _START, "first value of every beta; 0, or as pretrained", type=float
    )
    calibrate: int = _option(
        0,
        _START,
        "set running statistics from so many training batches first",
        type=int,
        metavar="BATCHES",
    )
    load: str | os.PathLike[str] | None = _option(
        None,
        _START,
        "start from affine.safetensors of a run with the same features",
        metavar="FILE",
    )

    device: str = _option(
        "cpu",
        _HOW,
        "where to train; under torchrun cuda means one GPU per rank",
        choices=("cpu", "cuda"),
    )
    backend: str = _option("auto", _HOW, "auto, or one that `bnfast doctor` lists")
    convert: bool = _option(True, _HOW, "train the converted model (--no-convert: plain PyTorch)")
    compare: str = _option(
        "none",
        _HOW,
        "plain PyTorch beside it, for a few timed steps or for the whole run; needs its memory too",
        choices=("none", "steps", "run"),
    )
    channels_last: bool = _option(True, _HOW, "memory format of images and activations")
    amp: str = _option(
        "none",
        _HOW,
        "autocast in this dtype; float16 needs a GPU",
        choices=("none", "bfloat16", "float16"),
    )
    sync_bn: bool = _option(False, _HOW, "BatchNorm statistics of all ranks together (torchrun)")
    workers: int | None = _option(
        None, _HOW, "processes that decode image files; one per core where left out", type=int
    )
    analyse: bool = _option(
        True, _HOW, "gammas, dead ReLUs and small gammas set to 0, on the trained model"
    )

    out: str | os.PathLike[str] | None = _option(
        None, _FOLDER, "folder of the run; a new one under runs/ where left out", metavar="DIR"
    )
    overwrite: bool = _option(False, _FOLDER, "replace the run that DIR holds")
    resume: bool = _option(
        False, _FOLDER, "go on with the run in DIR, with its options where none are given"
    )
    use_previous: bool = _option(
        False, _FOLDER, "with --resume: where the last checkpoint is damaged, take the one before"
    )
    checkpoint_every: int | None = _option(
        None,
        _FOLDER,
        "steps between checkpoints; once per epoch where left out",
        type=int,
        metavar="STEPS",
    )
    tensorboard: bool = _option(
        False, _FOLDER, "write TensorBoard's files too, into DIR/tensorboard"
    )
    progress: bool = _option(True, _FOLDER, "no progress bar", flag="--quiet")

    def resolved(self) -> TrainConfig:
        """This configuration with every field that is None filled in, but those that stay away. Raises ValueError for any
        value that is not allowed.
        """
        name = data.spec(self.data).preset if self.preset is None else self.preset
        if name not in PRESETS:
            raise ValueError(
                f"unknown preset {name!r} (--preset); allowed are: {', '.join(PRESETS)}"
            )
        preset = PRESETS[name]
        values: dict[str, Any] = {"preset": name}
        for option in fields(self):
            source = preset.augmentation if hasattr(preset.augmentation, option.name) else preset
            if option.metadata["group"] == _RECIPE and getattr(self, option.name) is None:
                values[option.name] = getattr(source, option.name, values.get(option.name))
        for seed in ("seed_order", "seed_augmentation"):
            if getattr(self, seed) is None:
                values[seed] = self.seed
        if self.features != PRETRAINED:
            values["init_gamma"] = self.init_gamma or "uniform"
            values["init_beta"] = 0.0 if self.init_beta is None else self.init_beta
        config = replace(self, **values)
        if self.milestones is None and config.epochs is not None:
            scale = config.epochs / preset.epochs
            config = replace(config, milestones=tuple(m * scale for m in preset.milestones))
        config._check()
        return config

    def _check(self) -> None:
        for name in ("epochs", "batch_size", "image_size", "resize_size", "checkpoint_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        for name in (
            "lr",
            "momentum",
            "weight_decay",
            "lr_factor",
            "warmup_epochs",
            "crop_padding",
        ):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be a finite number and not negative, not {value}")
        for name in ("calibrate", "workers"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name} must not be negative, as {getattr(self, name)} is")
        for name in ("seed", "seed_order", "seed_augmentation"):
            if not 0 <= getattr(self, name) < 2**63:
                raise ValueError(
                    f"{name} must be between 0 and 2**63 - 1, not {getattr(self, name)}"
                )
        if not all(math.isfinite(m) and m >= 0 for m in self.milestones):
            raise ValueError(f"milestones must be finite and not negative, not {self.milestones}")
        for option in fields(self):
            choices = option.metadata.get("choices")
            value = getattr(self, option.name)
            if choices is not None and value is not None and value not in choices:
                raise ValueError(
                    f"{option.name} must be one of {', '.join(choices)}, not {value!r}"
                )
        if self.config not in CONFIGURATIONS and not RANDOM_WEIGHTS.fullmatch(self.config):
            raise ValueError(
                f"unknown configuration {self.config!r} (--config); allowed are: {CONFIGURATION_NAMES}"
            )
        if self.weights is not None and self.features != PRETRAINED:
            raise ValueError(
                f"weights {os.fspath(self.weights)!r} are no random features ({self.features}): "
                "say --features pretrained"
            )
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device 'cuda' was asked for, and torch sees no GPU here")
        if self.device == "cuda" and self.backend == "cpu":
            raise ValueError("backend 'cpu' cannot train on device 'cuda'")
        if self.amp == "float16" and self.device == "cpu":
            raise ValueError("amp 'float16' needs device 'cuda'; on the CPU there is bfloat16")
        if not self.convert and self.compare == "run":
            raise ValueError("compare 'run' is of a converted model: leave out --no-convert")
        if self.sync_bn and not self.convert and self.device == "cpu":
            raise ValueError(
                "torch's own SyncBatchNorm takes no tensors on the CPU: leave out --no-convert"
            )
        if self.resume and self.overwrite:
            raise ValueError("resume and overwrite exclude each other")
        if self.resume and self.out is None:
            raise ValueError("resume needs the folder of the run: --out DIR")

    @property
    def augmentation(self) -> Augmentation:
        """The part of the recipe that changes training images (of a resolved configuration)."""
        names = [option.name for option in fields(Augmentation)]
        return Augmentation(**{name: getattr(self, name) for name in names})

    def learning_rate(self, step: int, steps_per_epoch: int) -> float:
        """The rate of a step (from 0), of a resolved configuration."""
        drops = sum(step >= round(m * steps_per_epoch) for m in self.milestones)
        warm = round(self.warmup_epochs * steps_per_epoch)
        rise = step / warm if step < warm else 1.0
        return self.lr * self.lr_factor**drops * rise

    def decides(self) -> dict[str, Any]:
        """The options that decide the result of a run (of a resolved configuration), as plain values for JSON."""
        return {name: value for name, value in self.saved().items() if name not in _ANYWHERE}

    def saved(self) -> dict[str, Any]:
        """All options but those that say where files go and how to go on, as plain values for JSON."""
        values = {o.name: getattr(self, o.name) for o in fields(self) if o.name not in _UNSAVED}
        return {name: _plain(value) for name, value in values.items()}


# Where a run takes place, which changes no result beyond rounding; and what is of one call alone.
_ANYWHERE = (
    "data_dir",
    "workers",
    "device",
    "backend",
    "compare",
    "analyse",
    "checkpoint_every",
    "tensorboard",
)
_UNSAVED = ("download", "out", "overwrite", "resume", "use_previous", "progress")


def _plain(value: Any) -> Any:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return list(value) if isinstance(value, tuple) else value


def from_plain(values: dict[str, Any]) -> TrainConfig:
    """A configuration from plain values, such as a file's. Raises ValueError for a name that is no option."""
    known = {option.name: option for option in fields(TrainConfig)}
    for name in values:
        if name not in known:
            raise ValueError(f"there is no option {name!r}; the options are: {', '.join(known)}")
    return TrainConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
