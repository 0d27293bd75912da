"""The paper's training recipe (arXiv 2003.00152), with the same training in plain PyTorch beside it
on request.
"""

from __future__ import annotations

import copy
import importlib.util
import itertools
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from bnfast import data, models
from bnfast.affine import AffineFileError, load_affine, read_metadata, save_affine
from bnfast.freezing import affine_parameters, freeze, frozen_digest
from bnfast.measure import gradient_agreement, saved_activation_bytes

CHECKPOINT = "affine.safetensors"
METRICS = "metrics.jsonl"
PLAIN_METRICS = "plain_metrics.jsonl"

# The first steps pack weights and fill caches; they are no part of the time of a step.
_WARM_UP_STEPS = 3
_AGREEMENT_SAMPLES = 16
_TEST_BATCH = 256


@dataclass(frozen=True)
class TrainConfig:
    """Everything that a training run depends on.

    config is a configuration of :func:`bnfast.freeze`. epochs, batch_size and lr are the data set's
    preset where None. init_gamma, init_beta and features go to :func:`bnfast.models.initialize`.
    load: a checkpoint of an earlier run with the same features to start from. out: the folder of
    the run (None: a new one under runs/); overwrite: replace the run in it. compare: train the
    plain PyTorch model too. backend goes to :func:`bnfast.convert`, device is "cpu" or "cuda".
    """

    model: str = "resnet14"
    data: str = "digits"
    config: str = "bn"
    epochs: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    momentum: float = 0.9
    weight_decay: float = 1e-4
    seed: int = 0
    init_gamma: str = "uniform"
    init_beta: float = 0.0
    features: str = "kaiming_normal"
    load: str | os.PathLike[str] | None = None
    data_dir: str | os.PathLike[str] | None = None
    out: str | os.PathLike[str] | None = None
    overwrite: bool = False
    compare: bool = True
    backend: str = "auto"
    device: str = "cpu"
    progress: bool = True

    def resolved(self) -> TrainConfig:
        """This configuration with the data set's preset filled in. Raises ValueError for any value
        that is not allowed.
        """
        preset = data.spec(self.data)
        config = replace(
            self,
            epochs=preset.epochs if self.epochs is None else self.epochs,
            batch_size=preset.batch_size if self.batch_size is None else self.batch_size,
            lr=preset.lr if self.lr is None else self.lr,
        )
        for name in ("epochs", "batch_size"):
            if getattr(config, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(config, name)}")
        for name in ("lr", "momentum", "weight_decay"):
            value = getattr(config, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be a finite number and not negative, not {value}")
        if not 0 <= config.seed < 2**63:
            raise ValueError(f"seed must be between 0 and 2**63 - 1, not {config.seed}")
        if config.device not in ("cpu", "cuda"):
            raise ValueError(f"device must be cpu or cuda, not {config.device!r}")
        if config.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device 'cuda' was asked for, and torch sees no GPU here")
        if config.device == "cuda" and config.backend == "cpu":
            raise ValueError("backend 'cpu' cannot train on device 'cuda'")
        return config


@dataclass(frozen=True)
class Epoch:
    """One line of a metrics file. Losses are means over the epoch's samples, accuracies fractions,
    seconds those of the training steps alone.
    """

    epoch: int
    train_loss: float
    train_accuracy: float
    test_accuracy: float
    seconds: float
    lr: float


@dataclass(frozen=True)
class Comparison:
    """bnfast beside plain PyTorch (channels_last): same initialisation, same batches, alternating
    steps in one process.

    Times are medians over the steps, in milliseconds; saved bytes are those of
    :func:`saved_activation_bytes` for one batch. gradients_agree: whether the gradients on the
    first samples were as near to float64 as plain PyTorch's.
    """

    step_ms: float
    plain_step_ms: float
    saved_bytes: int
    plain_saved_bytes: int
    train_loss: float
    plain_train_loss: float
    plain_test_accuracy: float
    gradients_agree: bool
    plain_metrics: Path

    @property
    def step_time_ratio(self) -> float:
        """Plain PyTorch's step time over bnfast's: above 1, bnfast is faster."""
        return self.plain_step_ms / self.step_ms

    @property
    def saved_bytes_ratio(self) -> float:
        """bnfast's saved bytes over plain PyTorch's: below 1, bnfast needs less. NaN where plain
        PyTorch saves nothing.
        """
        return self.saved_bytes / self.plain_saved_bytes if self.plain_saved_bytes else math.nan

    @property
    def loss_difference(self) -> float:
        """bnfast's training loss in the last epoch minus plain PyTorch's."""
        return self.train_loss - self.plain_train_loss


@dataclass(frozen=True)
class TrainResult:
    """What a run ended with. history has one entry per epoch; model is the trained, converted
    model.
    """

    model: nn.Module
    config: TrainConfig
    history: tuple[Epoch, ...]
    trainable_parameters: int
    total_parameters: int
    checkpoint: Path
    metrics: Path
    comparison: Comparison | None

    @property
    def test_accuracy(self) -> float:
        """Fraction of the test split that is right after the last epoch, by running statistics."""
        return self.history[-1].test_accuracy


class TrainingError(RuntimeError):
    """Training came to a state that it must not reach: a loss that is not finite, or a frozen
    tensor that changed.
    """


def train(config: TrainConfig) -> TrainResult:
    """Trains one of the paper's networks through bnfast.convert, and writes metrics and a
    checkpoint.

    SGD with momentum on the mean cross-entropy, weight decay on everything that trains, the
    learning rate divided by ten after one half and three quarters of the epochs (the paper: 80 and
    120 of 160), no warm-up. BatchNorm takes batch statistics in training and running statistics on
    the test split. The folder of the run gets metrics.jsonl (one line per epoch, see
    :class:`Epoch`), plain_metrics.jsonl with compare=True, and at the end affine.safetensors, from
    which :func:`rebuild` makes the model again. torch's global random state is left as it was.

    Raises ValueError for a value that is not allowed, OSError (FileNotFoundError, FileExistsError,
    ...) for files and folders, both before training starts; TrainingError when the loss stops being
    finite or a frozen tensor changed.
    """
    import bnfast

    if importlib.util.find_spec("tqdm") is None:
        raise ValueError("training needs tqdm, which is not installed: pip install 'bnfast[train]'")
    config = config.resolved()
    if config.backend != "auto":
        available = bnfast.backends()
        if available.get(config.backend) is not True:
            reason = available.get(config.backend, f"allowed are: auto, {', '.join(available)}")
            raise ValueError(f"backend {config.backend!r} is not available: {reason}")
    train_set, test_set = data.load(config.data, config.data_dir)
    preset = data.spec(config.data)
    with torch.random.fork_rng(devices=[]):
        plain = _build(
            config.model,
            preset.num_classes,
            preset.in_channels,
            config.seed,
            config.init_gamma,
            config.init_beta,
            config.features,
        )
    freeze(plain, config.config)
    if config.load is not None:
        _check_same_features(config)
        load_affine(plain, config.load)
    folder = _run_folder(config)

    plain = plain.to(config.device, memory_format=torch.channels_last)
    model = bnfast.convert(copy.deepcopy(plain), train=config.config, backend=config.backend)
    run = _Run(model, config, folder / METRICS)
    runs = [run]
    if config.compare:
        images, labels = next(_batches(train_set, config, epoch=0))
        few = slice(_AGREEMENT_SAMPLES)
        agreement = gradient_agreement(model, plain, images[few], labels[few])
        saved_bytes = [saved_activation_bytes(m.train(), images) for m in (model, plain)]
        plain_run = _Run(plain, config, folder / PLAIN_METRICS)
        runs.append(plain_run)
    _train_runs(runs, config, train_set, test_set)

    checkpoint = folder / CHECKPOINT
    is_affine = {id(parameter) for parameter in affine_parameters(model)}
    save_affine(
        model,
        checkpoint,
        also=[n for n, p in model.named_parameters() if p.requires_grad and id(p) not in is_affine],
        metadata=_metadata(config, run),
    )
    comparison = None
    if config.compare:
        comparison = Comparison(
            step_ms=run.median_step_ms(),
            plain_step_ms=plain_run.median_step_ms(),
            saved_bytes=saved_bytes[0],
            plain_saved_bytes=saved_bytes[1],
            train_loss=run.history[-1].train_loss,
            plain_train_loss=plain_run.history[-1].train_loss,
            plain_test_accuracy=plain_run.history[-1].test_accuracy,
            gradients_agree=agreement.ok,
            plain_metrics=folder / PLAIN_METRICS,
        )
    return TrainResult(
        model=model,
        config=config,
        history=tuple(run.history),
        trainable_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        total_parameters=sum(p.numel() for p in model.parameters()),
        checkpoint=checkpoint,
        metrics=folder / METRICS,
        comparison=comparison,
    )


def rebuild(path: str | os.PathLike[str]) -> nn.Module:
    """The plain PyTorch model of a checkpoint that :func:`train` wrote: frozen weights from its
    seed, the rest from the file.

    Raises AffineFileError for a file that train did not write, or when this version of torch draws
    other weights from the seed than the one that trained (the file keeps a digest of them); OSError
    when it cannot be opened.
    """
    written = read_metadata(path)
    try:
        with torch.random.fork_rng(devices=[]):
            model = _build(
                written["model"],
                int(written["num_classes"]),
                int(written["in_channels"]),
                int(written["seed"]),
                written["init_gamma"],
                float(written["init_beta"]),
                written["features"],
            )
        freeze(model, written["config"])
        digest = written["frozen_digest"]
    except (KeyError, ValueError) as error:
        raise AffineFileError(
            f"{os.fspath(path)!r} does not say how to rebuild its model: {error}"
        ) from error
    load_affine(model, path)
    if frozen_digest(model) != digest:
        raise AffineFileError(
            f"{os.fspath(path)!r} cannot be rebuilt: torch {torch.__version__} draws other weights "
            f"from seed {written['seed']} than torch {written.get('torch')}, which trained it"
        )
    return model


def learning_rate(lr: float, epoch: int, epochs: int) -> float:
    """The rate in an epoch (from 0): lr, a tenth of it from epochs / 2 on, a hundredth from 3
    epochs / 4 on.
    """
    return lr * 0.1 ** ((2 * epoch >= epochs) + (4 * epoch >= 3 * epochs))


def _build(
    name: str,
    num_classes: int,
    in_channels: int,
    seed: int,
    gamma: str,
    beta: float,
    features: str,
) -> nn.Module:
    model = models.create(name, num_classes, in_channels)
    # Draws everything anew, so the weights depend on the seed alone and not on what create() drew.
    generator = torch.Generator().manual_seed(seed)
    return models.initialize(model, gamma, beta, features, generator)


def _check_same_features(config: TrainConfig) -> None:
    """The file holds no frozen weights, so its gammas mean nothing on features of another seed."""
    written = read_metadata(config.load)
    for key in ("model", "seed", "features"):
        asked = str(getattr(config, key))
        if key in written and written[key] != asked:
            raise ValueError(
                f"{os.fspath(config.load)!r} was trained with {key} {written[key]}, not {asked}"
            )


def _run_folder(config: TrainConfig) -> Path:
    if config.out is None:
        name = f"{config.model}-{config.data}-{config.config}"
        for number in itertools.count(1):
            folder = Path("runs") / f"{name}-{number}"
            try:
                folder.mkdir(parents=True)
            except FileExistsError:
                continue
            return folder
    folder = Path(config.out)
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{str(folder)!r} (--out) is a file, not a folder")
    earlier = [folder / name for name in (METRICS, PLAIN_METRICS, CHECKPOINT)]
    earlier = [path for path in earlier if path.exists()]
    if earlier and not config.overwrite:
        raise FileExistsError(
            f"{str(folder)!r} (--out) already holds a run ({earlier[0].name}): choose another "
            f"folder, or --overwrite"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for path in earlier:
        path.unlink()
    return folder


def _metadata(config: TrainConfig, run: _Run) -> dict[str, str]:
    preset = data.spec(config.data)
    kept = ("model", "data", "config", "seed", "init_gamma", "init_beta", "features", "epochs")
    kept += ("batch_size", "lr", "momentum", "weight_decay")
    return {key: str(getattr(config, key)) for key in kept} | {
        "num_classes": str(preset.num_classes),
        "in_channels": str(preset.in_channels),
        "test_accuracy": str(run.history[-1].test_accuracy),
        "frozen_digest": run.digest,
        "torch": torch.__version__,
    }


def _batches(dataset: Dataset, config: TrainConfig, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled batches on the device, images channels_last; the order depends on seed and epoch
    only.
    """
    order = torch.Generator().manual_seed((config.seed + 1_000_003 * (epoch + 1)) % 2**63)
    for batch in DataLoader(dataset, config.batch_size, shuffle=True, generator=order):
        yield _to_device(batch, config.device)


def _to_device(batch: list[Tensor], device: str) -> tuple[Tensor, Tensor]:
    images, labels = batch
    return images.to(device, memory_format=torch.channels_last), labels.to(device)


class _Run:
    """One model in training: its optimiser, its clock and its metrics file."""

    def __init__(self, model: nn.Module, config: TrainConfig, metrics: Path) -> None:
        self.model = model
        self.config = config
        self.metrics = metrics
        self.history: list[Epoch] = []
        self.digest = frozen_digest(model)
        self.step_seconds: list[float] = []
        trained = [p for p in model.parameters() if p.requires_grad]
        # With configuration "none" nothing trains, and SGD refuses an empty list.
        self.optimizer = trained and torch.optim.SGD(
            trained,
            lr=config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )
        self._reset()

    def _reset(self) -> None:
        self.samples = 0
        self.correct = 0
        self.loss_sum = 0.0
        self.seconds = 0.0

    def start_epoch(self, lr: float) -> None:
        self._reset()
        self.model.train()
        self.lr = lr
        if self.optimizer:
            for group in self.optimizer.param_groups:
                group["lr"] = lr

    def step(self, images: Tensor, labels: Tensor) -> None:
        start = self._now()
        logits = self.model(images)
        loss = F.cross_entropy(logits, labels)
        if self.optimizer:
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        elapsed = self._now() - start

        loss_value = loss.item()
        if not math.isfinite(loss_value):
            raise TrainingError(
                f"the training loss is {loss_value} in epoch {len(self.history) + 1}: "
                f"try a smaller lr than {self.config.lr}"
            )
        self.step_seconds.append(elapsed)
        self.seconds += elapsed
        self.samples += len(labels)
        self.correct += (logits.argmax(1) == labels).sum().item()
        self.loss_sum += loss_value * len(labels)

    def _now(self) -> float:
        if self.config.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def end_epoch(self, test_set: Dataset) -> None:
        entry = Epoch(
            epoch=len(self.history) + 1,
            train_loss=self.loss_sum / self.samples,
            train_accuracy=self.correct / self.samples,
            test_accuracy=_accuracy(self.model, test_set, self.config.device),
            seconds=self.seconds,
            lr=self.lr,
        )
        self.history.append(entry)
        with open(self.metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(vars(entry)) + "\n")

    def check_frozen(self) -> None:
        if frozen_digest(self.model) != self.digest:
            raise TrainingError("a frozen parameter changed during training")

    def median_step_ms(self) -> float:
        skipped = min(_WARM_UP_STEPS, len(self.step_seconds) - 1)
        return 1000 * statistics.median(self.step_seconds[skipped:])


def _train_runs(
    runs: list[_Run], config: TrainConfig, train_set: Dataset, test_set: Dataset
) -> None:
    """Trains all runs side by side: every batch goes through each of them, in alternating order."""
    from tqdm import tqdm

    steps = config.epochs * math.ceil(len(train_set) / config.batch_size)
    turn = itertools.cycle((runs, runs[::-1]))
    interval = 0.5 if sys.stderr.isatty() else 10.0
    with tqdm(
        total=steps, disable=not config.progress, mininterval=interval, unit="step", leave=False
    ) as bar:
        for epoch in range(config.epochs):
            for run in runs:
                run.start_epoch(learning_rate(config.lr, epoch, config.epochs))
            for images, labels in _batches(train_set, config, epoch):
                for run in next(turn):
                    run.step(images, labels)
                bar.update()
            for run in runs:
                run.end_epoch(test_set)
            last = runs[0].history[-1]
            bar.set_postfix_str(
                f"epoch {last.epoch}/{config.epochs}, loss {last.train_loss:.3f}, "
                f"test accuracy {last.test_accuracy:.1%}"
            )
    for run in runs:
        run.check_frozen()


def _accuracy(model: nn.Module, dataset: Dataset, device: str) -> float:
    model.eval()
    correct = 0
    with torch.no_grad():
        # Without a generator of its own the loader would advance torch's global one.
        for batch in DataLoader(dataset, _TEST_BATCH, generator=torch.Generator()):
            images, labels = _to_device(batch, device)
            correct += (model(images).argmax(1) == labels).sum().item()
    return correct / len(dataset)
