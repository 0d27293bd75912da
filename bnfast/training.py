"""A training run by the paper's recipe (arXiv 2003.00152) from its options to its files, with the same training in plain
PyTorch beside it on request.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import itertools
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from bnfast import analysis, checkpoints, distributed, measure, models
from bnfast.affine import AffineFileError, load_affine, read_metadata, save_affine, write_atomically
from bnfast.data import Data, Place, load, mixed_seed, shuffled, spec
from bnfast.freezing import affine_parameters, freeze, frozen_digest
from bnfast.loop import Epoch, EvaluationBatches, Run, TrainingError, autocast, train_runs
from bnfast.random_weights import train_random_weights
from bnfast.recipes import PRETRAINED, RANDOM_WEIGHTS, TrainConfig

__all__ = ["Comparison", "Epoch", "TrainConfig", "TrainResult", "TrainingError", "rebuild", "train"]

CONFIG = "config.json"
METRICS = "metrics.jsonl"
PLAIN_METRICS = "plain_metrics.jsonl"
CHECKPOINT = "affine.safetensors"
ANALYSIS = "analysis.json"
RESULT = "result.json"
_FILES = (CONFIG, METRICS, PLAIN_METRICS, CHECKPOINT, ANALYSIS, RESULT)

_AGREEMENT_SAMPLES = 16
_COMPARED_STEPS = 7
_ANALYSED_IMAGES = 10_000


@dataclass(frozen=True)
class Comparison:
    """bnfast beside plain PyTorch: same initialisation, same batches, alternating steps in one process.

    Times are medians over the steps, in milliseconds; saved bytes are those of
    :func:`saved_activation_bytes` for one batch. gradients_agree: whether the gradients on the
    first samples were as near to float64 as plain PyTorch's. What follows is None unless the plain
    model was trained for the whole run (compare "run").
    """

    step_ms: float
    plain_step_ms: float
    saved_bytes: int
    plain_saved_bytes: int
    gradients_agree: bool
    train_loss: float | None = None
    plain_train_loss: float | None = None
    plain_test_accuracy: float | None = None
    plain_metrics: Path | None = None

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
    def loss_difference(self) -> float | None:
        """bnfast's training loss in the last epoch minus plain PyTorch's."""
        return None if self.train_loss is None else self.train_loss - self.plain_train_loss


@dataclass(frozen=True)
class TrainResult:
    """What a run ended with. history has one entry per epoch; model is the trained model, converted unless the
    configuration says otherwise. wall_seconds: from the first step to the last, tests included; peak_bytes: the most
    memory that the process (on a GPU: PyTorch's allocator) held so far, None where the system does not say. step_ms: median of
    the steps of this process, NaN where it did none.
    """

    model: nn.Module
    config: TrainConfig
    history: tuple[Epoch, ...]
    trainable_parameters: int
    total_parameters: int
    step_ms: float
    wall_seconds: float
    peak_bytes: int | None
    folder: Path
    comparison: Comparison | None

    @property
    def test_accuracy(self) -> float:
        """Fraction of the test split that is right after the last epoch, by running statistics."""
        return self.history[-1].test_accuracy

    @property
    def checkpoint(self) -> Path:
        """The file of gammas, betas, statistics and whatever else trained."""
        return self.folder / CHECKPOINT

    @property
    def metrics(self) -> Path:
        """The file with one line per epoch."""
        return self.folder / METRICS


def train(config: TrainConfig) -> TrainResult:
    """Trains a network by a recipe, and writes metrics, checkpoints and the result.

    SGD with momentum on the mean cross-entropy; BatchNorm takes batch statistics in training (unless statistics is
    "running") and running statistics on the test split. Frozen parameters are hashed at the start and compared at the end.
    The folder of the run gets config.json, metrics.jsonl (one line per epoch, see :class:`Epoch`), plain_metrics.jsonl with
    compare "run", checkpoints/ while it trains, and at the end affine.safetensors, from which :func:`rebuild` makes the
    model again, analysis.json (see :func:`bnfast.analysis.analyse`) and result.json. Under torchrun each rank takes its
    part of every batch and rank 0 writes. torch's global random state is left as it was.

    Raises ValueError for a value that is not allowed, OSError (FileNotFoundError, FileExistsError,
    ...) for files and folders, both before training starts; TrainingError when the loss stops being
    finite or a frozen tensor changed.
    """
    config = config.resolved()
    _check_here(config)
    with (
        distributed.joined(config.device) as (device, rank),
        torch.random.fork_rng(devices=[device] if device != "cpu" else []),
    ):
        place = Place(
            device,
            torch.channels_last if config.channels_last else torch.contiguous_format,
            _workers(config),
            rank,
            distributed.ranks(),
        )
        if config.download and rank == 0:
            load(config.data, config.data_dir, download=True)
        distributed.wait(place)
        data = load(config.data, config.data_dir, augmentation=config.augmentation)
        return _train(config, place, data)


def _check_here(config: TrainConfig) -> None:
    """Refuses what this machine, or this number of ranks, does not have."""
    import bnfast

    if importlib.util.find_spec("tqdm") is None:
        raise ValueError("training needs tqdm, which is not installed: pip install 'bnfast[train]'")
    if config.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise ValueError(
            "--tensorboard needs tensorboard, which is not installed: pip install 'bnfast[tensorboard]'"
        )
    if config.backend != "auto":
        available = bnfast.backends()
        if available.get(config.backend) is not True:
            reason = available.get(config.backend, f"allowed are: auto, {', '.join(available)}")
            raise ValueError(f"backend {config.backend!r} is not available: {reason}")
    if distributed.ranks() > 1 and config.compare != "none":
        raise ValueError(f"compare {config.compare!r} works in one process, not under torchrun")


def _workers(config: TrainConfig) -> int:
    if not spec(config.data).in_files:
        return 0
    return (os.cpu_count() or 1) if config.workers is None else config.workers


def _train(config: TrainConfig, place: Place, data: Data) -> TrainResult:
    import bnfast

    plain = _build(config, data.num_classes, data.in_channels)
    total = sum(p.numel() for p in plain.parameters())
    _choose(plain, config.config, config.seed)
    trainable = sum(p.numel() for p in plain.parameters() if p.requires_grad)
    if config.load is not None:
        _check_same_features(config)
        load_affine(plain, config.load)
    plain = plain.to(place.device, memory_format=place.memory_format)
    if config.calibrate:
        batches = shuffled(len(data.train), config.batch_size, mixed_seed(config.seed_order, 0))
        whole = Place(place.device, place.memory_format, place.workers)
        loader = data.train.batches(batches[: config.calibrate], whole)
        torch.optim.swa_utils.update_bn(loader, plain)
    if config.sync_bn:
        plain = nn.SyncBatchNorm.convert_sync_batchnorm(plain)
    model = plain
    if config.convert:
        model = bnfast.convert(
            copy.deepcopy(plain),
            train="keep",
            backend=config.backend,
            memory_format=place.memory_format,
        )

    with _run_folder(config, place) as folder:
        writer = _writer(config, folder) if place.rank == 0 else None
        run = Run(model, config, place, folder / METRICS, writer)
        runs = [run]
        compared = None
        if config.compare != "none" and config.convert:
            compared = _compare(model, plain, config, data, place)
        if config.compare == "run":
            runs.append(Run(plain, config, place, folder / PLAIN_METRICS))
        wall = train_runs(runs, config, data, place, folder)
        if config.compare == "run":
            plain_run = runs[1]
            compared |= {
                "step_ms": run.median_step_ms(),
                "plain_step_ms": plain_run.median_step_ms(),
                "train_loss": run.history[-1].train_loss,
                "plain_train_loss": plain_run.history[-1].train_loss,
                "plain_test_accuracy": plain_run.history[-1].test_accuracy,
                "plain_metrics": folder / PLAIN_METRICS,
            }
        result = TrainResult(
            model=model,
            config=config,
            history=tuple(run.history),
            trainable_parameters=trainable,
            total_parameters=total,
            step_ms=run.median_step_ms(),
            wall_seconds=wall,
            peak_bytes=measure.peak_bytes(place.device),
            folder=folder,
            comparison=None if compared is None else Comparison(**compared),
        )
        if place.rank == 0:
            _finish(result, run, data, place)
        distributed.wait(place)
    return result


def _compare(
    model: nn.Module, plain: nn.Module, config: TrainConfig, data: Data, place: Place
) -> dict[str, Any]:
    """The fields of Comparison that are known before training; step times for compare "steps". Works on copies."""
    order = shuffled(len(data.train), config.batch_size, mixed_seed(config.seed_order, 0))
    images, labels = next(data.train.batches(order[:1], place))
    few = slice(_AGREEMENT_SAMPLES)
    agree = measure.gradient_agreement(model, plain, images[few], labels[few]).ok
    sides = [copy.deepcopy(m).train() for m in (model, plain)]
    times = [math.nan, math.nan]
    with autocast(config):
        saved = [measure.saved_activation_bytes(side, images) for side in sides]
        if config.compare == "steps":
            # Many steps on one batch: small ones, so that the numbers stay ordinary.
            steps = [measure.training_step(s, images, labels, config.lr / 100) for s in sides]
            times = measure.interleaved_ms(steps, _COMPARED_STEPS)
    return {
        "step_ms": times[0],
        "plain_step_ms": times[1],
        "saved_bytes": saved[0],
        "plain_saved_bytes": saved[1],
        "gradients_agree": agree,
    }


def _finish(result: TrainResult, run: Run, data: Data, place: Place) -> None:
    """Writes what a finished run leaves behind; result.json is the last, and says that it is finished."""
    folder, model, config = result.folder, result.model, result.config
    is_affine = {id(parameter) for parameter in affine_parameters(model)}
    save_affine(
        model,
        result.checkpoint,
        also=[n for n, p in model.named_parameters() if p.requires_grad and id(p) not in is_affine],
        metadata=_metadata(config, run, data),
    )
    if config.analyse:
        alone = Place(place.device, place.memory_format, place.workers)
        batches = EvaluationBatches(data.test, alone, _ANALYSED_IMAGES)
        _write_json(folder / ANALYSIS, analysis.analyse(model, batches))
    last = result.history[-1]
    values: dict[str, Any] = {
        "options": config.decides(),
        "data_name": config.data,
        "trainable_parameters": result.trainable_parameters,
        "total_parameters": result.total_parameters,
        "batchnorm_parameters": sum(p.numel() for p in affine_parameters(model)),
        "train_loss": last.train_loss,
        "train_accuracy": last.train_accuracy,
        "test_accuracy": last.test_accuracy,
        "test_top5": last.test_top5,
        "training_seconds": sum(entry.seconds for entry in result.history),
        "wall_seconds": result.wall_seconds,
        "step_ms": None if math.isnan(result.step_ms) else result.step_ms,
        "peak_bytes": result.peak_bytes,
        "ranks": place.ranks,
        "machine": measure.machine(config.device),
        "torch": torch.__version__,
    }
    compared = result.comparison
    if compared is not None:
        values["comparison"] = {
            field.name: getattr(compared, field.name)
            for field in fields(compared)
            if field.name != "plain_metrics" and getattr(compared, field.name) is not None
        }
    _write_json(folder / RESULT, values)
    checkpoints.remove(folder)


def _write_json(path: Path, values: Any) -> None:
    write_atomically(path, (json.dumps(values, indent=1) + "\n").encode())


def rebuild(
    path: str | os.PathLike[str], weights: str | os.PathLike[str] | None = None
) -> nn.Module:
    """The plain PyTorch model of a checkpoint that :func:`train` wrote: frozen weights from its
    seed (or the file of pretrained ones that it was given), the rest from the file.

    Raises AffineFileError for a file that train did not write, or when this version of torch draws
    other weights from the seed than the one that trained (the file keeps a digest of them); OSError
    when it cannot be opened.
    """
    written = read_metadata(path)
    try:
        gamma, beta = (written[key] for key in ("init_gamma", "init_beta"))
        config = TrainConfig(
            model=written["model"],
            config=written["config"],
            seed=int(written["seed"]),
            features=written["features"],
            weights=weights,
            init_gamma=None if gamma == "None" else gamma,
            init_beta=None if beta == "None" else float(beta),
        )
        with torch.random.fork_rng(devices=[]):
            model = _build(config, int(written["num_classes"]), int(written["in_channels"]))
            _choose(model, config.config, config.seed)
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


def _build(config: TrainConfig, num_classes: int, in_channels: int) -> nn.Module:
    """The network as it is before training. What create() draws beyond convolutions, Linears and BatchNorms depends on
    the seed too."""
    torch.manual_seed(config.seed)
    if config.features != PRETRAINED:
        model = models.create(config.model, num_classes, in_channels)
        generator = torch.Generator().manual_seed(config.seed)
        gamma, beta = config.init_gamma, config.init_beta
        return models.initialize(model, gamma, beta, config.features, generator)
    model = models.create_pretrained(config.model, num_classes, in_channels, config.weights)
    generator = torch.Generator().manual_seed(config.seed)
    models.initialize_affine(model, config.init_gamma, config.init_beta, generator)
    return model


def _choose(model: nn.Module, name: str, seed: int) -> None:
    """Makes trainable what a configuration names."""
    match = RANDOM_WEIGHTS.fullmatch(name)
    if match is None:
        freeze(model, name)
    else:
        positions = torch.Generator().manual_seed(mixed_seed(seed, int(match[1])))
        train_random_weights(model, int(match[1]), positions)


def _check_same_features(config: TrainConfig) -> None:
    """The file holds no frozen weights, so its gammas mean nothing on features of another seed."""
    written = read_metadata(config.load)
    for key in ("model", "seed", "features"):
        asked = str(getattr(config, key))
        if key in written and written[key] != asked:
            raise ValueError(
                f"{os.fspath(config.load)!r} was trained with {key} {written[key]}, not {asked}"
            )


@contextlib.contextmanager
def _run_folder(config: TrainConfig, place: Place) -> Iterator[Path]:
    """The folder of the run, its own for as long as the context lasts, with config.json in it."""
    with contextlib.ExitStack() as stack:
        folder = None
        if place.rank == 0:
            folder = _make_folder(config)
            stack.enter_context(_locked(folder))
            _prepare(folder, config)
        if place.ranks > 1:
            shared = [str(folder)]
            dist.broadcast_object_list(shared, device=torch.device(place.device))
            folder = Path(shared[0])
        yield folder


def _make_folder(config: TrainConfig) -> Path:
    if config.out is None:
        name = f"{config.model.replace(':', '-')}-{config.data}-{config.config}"
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
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keeps other processes that train out of a folder; the system lifts the lock of a process that dies."""
    try:
        import fcntl
    except ImportError:  # Windows has none
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise FileExistsError(f"another process trains in {str(folder)!r} (--out)") from None
    try:
        yield
    finally:
        os.close(descriptor)


def _prepare(folder: Path, config: TrainConfig) -> None:
    """Makes the folder ready for a new run, or for the same run to go on."""
    for name in _FILES:
        for path in folder.glob(f".{name}.*.tmp"):  # of a process that died while it wrote
            path.unlink()
    earlier = [folder / name for name in _FILES if (folder / name).exists()]
    if config.resume and earlier:
        if (folder / RESULT).exists():
            raise FileExistsError(f"the run in {str(folder)!r} is finished: nothing to resume")
        if (folder / CONFIG).exists():
            _check_same_options(folder, config)
            return
    if earlier and not config.overwrite:
        raise FileExistsError(
            f"{str(folder)!r} (--out) already holds a run ({earlier[0].name}): choose another "
            f"folder, --resume or --overwrite"
        )
    for path in earlier:
        path.unlink()
    checkpoints.remove(folder)
    _write_json(folder / CONFIG, config.saved())


def _check_same_options(folder: Path, config: TrainConfig) -> None:
    """Raises where a run that is to go on was begun with other options."""
    begun = json.loads((folder / CONFIG).read_text())
    for name, value in config.decides().items():
        if begun.get(name) != value:
            raise ValueError(
                f"{name} is {value}; the run in {str(folder)!r} was begun with {begun.get(name)}"
            )


def _metadata(config: TrainConfig, run: Run, data: Data) -> dict[str, str]:
    kept = ("model", "data", "config", "seed", "init_gamma", "init_beta", "features", "epochs")
    kept += ("batch_size", "lr", "momentum", "weight_decay")
    return {key: str(getattr(config, key)) for key in kept} | {
        "num_classes": str(data.num_classes),
        "in_channels": str(data.in_channels),
        "test_accuracy": str(run.history[-1].test_accuracy),
        "frozen_digest": run.digest,
        "torch": torch.__version__,
    }


def _writer(config: TrainConfig, folder: Path) -> Any:
    """TensorBoard's writer of events, or None."""
    if not config.tensorboard:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder / "tensorboard"))
