"""The loop over epochs and steps, and what it keeps: sums, history, metrics files and checkpoints.

Everything random in a step comes from the seeds and the number of the step, so a checkpoint holds no generator: order of the
data, augmentation and dropout of the steps that follow are those of a run that was never interrupted.
"""

from __future__ import annotations

import contextlib
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from bnfast import checkpoints, distributed
from bnfast.affine import write_atomically
from bnfast.data import Data, FileSplit, Place, TensorSplit, in_order, mixed_seed, shuffled
from bnfast.freezing import freeze_statistics, frozen_digest
from bnfast.recipes import TrainConfig

# The first steps pack weights and fill caches; they are no part of the time of a step.
_WARM_UP_STEPS = 3
_TEST_BATCH = 256
_STEPS_PER_CHECK = 50


class TrainingError(RuntimeError):
    """Training came to a state that it must not reach: a loss that is not finite, or a frozen
    tensor that changed.
    """


@dataclass(frozen=True)
class Epoch:
    """One line of a metrics file. Losses are means over the epoch's samples, accuracies fractions
    (top5: the right class is among the first five), seconds those of the training steps alone, lr that
    of the epoch's first step.
    """

    epoch: int
    train_loss: float
    train_accuracy: float
    test_accuracy: float
    test_top5: float
    seconds: float
    lr: float


class Run:
    """One model in training: its optimiser, its clock and its metrics file."""

    def __init__(
        self, model: nn.Module, config: TrainConfig, place: Place, metrics: Path, writer: Any = None
    ) -> None:
        self.model = model
        self.config = config
        self.place = place
        self.metrics = metrics
        self.writer = writer
        self.history: list[Epoch] = []
        self.digest = frozen_digest(model)
        self.step_seconds: list[float] = []
        trained = [p for p in model.parameters() if p.requires_grad]
        # With configuration "none" nothing trains, and SGD and DistributedDataParallel refuse an empty list.
        self.optimizer = trained and torch.optim.SGD(
            trained,
            lr=config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )
        self.forward = DistributedDataParallel(model) if trained and place.ranks > 1 else model
        self.scaler = torch.amp.GradScaler("cuda", enabled=config.amp == "float16")
        self._reset()

    def _reset(self) -> None:
        # Loss, right ones and images of this rank in the epoch so far.
        self.sums = torch.zeros(3, dtype=torch.float64, device=self.place.device)
        self.seconds = 0.0

    def start(self) -> None:
        """Puts the model into training mode."""
        self.model.train()
        if self.config.statistics == "running":
            freeze_statistics(self.model)

    def step(self, images: Tensor, labels: Tensor, count: int, number: int, lr: float) -> None:
        """One step on this rank's part of a batch of `count` images."""
        if self.optimizer:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
        torch.manual_seed(mixed_seed(self.config.seed, number, self.place.rank))
        start = self._now()
        with autocast(self.config):
            logits = self.forward(images)
            loss = F.cross_entropy(logits, labels, reduction="sum")
        if self.optimizer:
            self.optimizer.zero_grad()
            # DistributedDataParallel takes the mean over the ranks.
            self.scaler.scale(loss * (self.place.ranks / count)).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
        elapsed = self._now() - start
        with torch.no_grad():
            self.sums[0] += loss
            self.sums[1] += (logits.argmax(1) == labels).sum()
            self.sums[2] += len(labels)
        self.step_seconds.append(elapsed)
        self.seconds += elapsed
        if number % _STEPS_PER_CHECK == 0:
            self.check_finite()

    def check_finite(self) -> None:
        """Raises TrainingError where a loss since the last epoch was not finite."""
        loss = self.sums[0].item()
        if not math.isfinite(loss):
            raise TrainingError(
                f"the training loss is {loss} in epoch {len(self.history) + 1}: "
                f"try a smaller lr than {self.config.lr}"
            )

    def _now(self) -> float:
        if self.config.device == "cuda" and self.config.compare == "run":
            torch.cuda.synchronize()
        return time.perf_counter()

    def end_epoch(self, test: TensorSplit | FileSplit, lr: float) -> None:
        if self.config.device == "cuda":
            torch.cuda.synchronize()
        self.check_finite()
        loss, right, count = distributed.summed(self.sums, self.place).tolist()
        distributed.share_buffers(self.model, self.place)
        top1, top5 = accuracy(self.model, test, self.place, self.config)
        self.history.append(
            Epoch(
                epoch=len(self.history) + 1,
                train_loss=loss / count,
                train_accuracy=right / count,
                test_accuracy=top1,
                test_top5=top5,
                seconds=self.seconds,
                lr=lr,
            )
        )
        self._reset()
        if self.place.rank == 0:
            self.write_metrics()

    def write_metrics(self) -> None:
        """The metrics file of the history: whole at any moment."""
        lines = "".join(json.dumps(vars(entry)) + "\n" for entry in self.history)
        write_atomically(self.metrics, lines.encode())
        if self.writer is not None and self.history:
            last = vars(self.history[-1])
            for name in ("train_loss", "train_accuracy", "test_accuracy", "test_top5", "lr"):
                self.writer.add_scalar(name, last[name], last["epoch"])
            self.writer.flush()

    def check_frozen(self) -> None:
        """Raises TrainingError where a frozen parameter is not what it was at the start, in any bit."""
        if frozen_digest(self.model) != self.digest:
            raise TrainingError("a frozen parameter changed during training")

    def median_step_ms(self) -> float:
        skipped = min(_WARM_UP_STEPS, len(self.step_seconds) - 1)
        return (
            1000 * statistics.median(self.step_seconds[skipped:]) if self.step_seconds else math.nan
        )

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, plain values) of all that training changes."""
        tensors = {}
        for name, tensor in self._changing():
            tensors[f"model.{name}"] = tensor
            momentum = (self.optimizer.state.get(tensor, {}) if self.optimizer else {}).get(
                "momentum_buffer"
            )
            if momentum is not None:
                tensors[f"momentum.{name}"] = momentum
        return tensors, {
            "history": [vars(entry) for entry in self.history],
            "sums": self.sums.tolist(),
            "seconds": self.seconds,
            "digest": self.digest,
            "scaler": self.scaler.state_dict(),
        }

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Puts back what `state` gave. Raises CheckpointError where it is of another model."""
        if state["digest"] != self.digest:
            raise checkpoints.CheckpointError(
                "the checkpoint belongs to other frozen weights: torch draws others from the seed, or other ones were given"
            )
        changing = dict(self._changing())
        if {f"model.{name}" for name in changing} - set(tensors):
            raise checkpoints.CheckpointError("the checkpoint is of another model")
        with torch.no_grad():
            for name, tensor in changing.items():
                tensor.copy_(tensors[f"model.{name}"])
                if f"momentum.{name}" in tensors:
                    momentum = tensors[f"momentum.{name}"].to(tensor.device)
                    self.optimizer.state[tensor]["momentum_buffer"] = torch.empty_like(
                        tensor
                    ).copy_(momentum)
        self.history = [Epoch(**entry) for entry in state["history"]]
        self.sums.copy_(torch.tensor(state["sums"], dtype=torch.float64))
        self.seconds = state["seconds"]
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])

    def _changing(self) -> list[tuple[str, Tensor]]:
        trained = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        return [*trained, *self.model.named_buffers()]


def autocast(config: TrainConfig) -> contextlib.AbstractContextManager:
    """The precision in which the model runs."""
    if config.amp == "none":
        return contextlib.nullcontext()
    return torch.autocast(config.device, getattr(torch, config.amp))


def train_runs(
    runs: list[Run], config: TrainConfig, data: Data, place: Place, folder: Path
) -> float:
    """Trains all runs side by side: every batch goes through each of them, in alternating order. Goes on from the
    checkpoint of the folder with config.resume. Returns the seconds of wall-clock time, those before an interruption
    up to its checkpoint included.
    """
    from tqdm import tqdm

    batches = math.ceil(len(data.train) / config.batch_size)
    done, before = _resume(runs, config, folder)
    begun = time.perf_counter()

    def save(step: int) -> None:
        if place.rank == 0:
            for run in runs:
                run.check_finite()
            _save(runs, config, folder, step, before + time.perf_counter() - begun)

    interval = 0.5 if sys.stderr.isatty() else 10.0
    with tqdm(
        total=config.epochs * batches,
        initial=done,
        disable=not config.progress or place.rank != 0,
        mininterval=interval,
        unit="step",
        leave=False,
    ) as bar:
        while done < config.epochs * batches:
            epoch, first = divmod(done, batches)
            for run in runs:
                run.start()
            order = shuffled(
                len(data.train), config.batch_size, mixed_seed(config.seed_order, epoch)
            )[first:]
            seed = mixed_seed(config.seed_augmentation, epoch)
            for index, batch in zip(order, data.train.batches(order, place, seed), strict=True):
                lr = config.learning_rate(done, batches)
                for run in runs if done % 2 == 0 else runs[::-1]:
                    run.step(*batch, len(index), done, lr)
                done += 1
                bar.update()
                if (
                    config.checkpoint_every
                    and done % config.checkpoint_every == 0
                    and done % batches
                ):
                    save(done)
            for run in runs:
                run.end_epoch(data.test, config.learning_rate(epoch * batches, batches))
            if done < config.epochs * batches or config.checkpoint_every:
                save(done)
            last = runs[0].history[-1]
            bar.set_postfix_str(
                f"epoch {last.epoch}/{config.epochs}, loss {last.train_loss:.3f}, "
                f"test accuracy {last.test_accuracy:.1%}"
            )
    for run in runs:
        run.check_frozen()
    return before + time.perf_counter() - begun


def _save(runs: list[Run], config: TrainConfig, folder: Path, step: int, wall: float) -> None:
    tensors: dict[str, Tensor] = {}
    states = []
    for number, run in enumerate(runs):
        own, state = run.state()
        tensors |= {f"{number}.{name}": tensor for name, tensor in own.items()}
        states.append(state)
    state = {"step": step, "wall_seconds": wall, "options": config.decides(), "runs": states}
    checkpoints.save(folder, step, tensors, state)


def _resume(runs: list[Run], config: TrainConfig, folder: Path) -> tuple[int, float]:
    """(steps done, seconds) of the checkpoint, put into the runs; zeros where there is none."""
    found = checkpoints.load(folder, config.use_previous) if config.resume else None
    if found is None:
        return 0, 0.0
    tensors, state = found
    if len(state["runs"]) != len(runs):
        raise checkpoints.CheckpointError("the checkpoint was written with another --compare")
    for number, (run, own) in enumerate(zip(runs, state["runs"], strict=True)):
        prefix = f"{number}."
        parts = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
        run.restore(parts, own)
        if run.place.rank == 0:
            run.write_metrics()
    return state["step"], state["wall_seconds"]


def accuracy(
    model: nn.Module, split: TensorSplit | FileSplit, place: Place, config: TrainConfig
) -> tuple[float, float]:
    """(top-1, top-5) of a model in evaluation mode on a split, as fractions, over all ranks."""
    model.eval()
    right = torch.zeros(2, device=place.device, dtype=torch.float64)
    with torch.no_grad(), autocast(config):
        for images, labels in split.batches(in_order(len(split), _TEST_BATCH), place):
            if len(labels):
                right += _hits(model(images), labels)
    top1, top5 = (distributed.summed(right, place) / len(split)).tolist()
    return top1, top5


def _hits(logits: Tensor, labels: Tensor) -> Tensor:
    ranked = logits.topk(min(5, logits.shape[1]), 1).indices == labels[:, None]
    return torch.stack([ranked[:, 0].sum(), ranked.sum()]).double()


class EvaluationBatches:
    """Batches of at most `count` images spread evenly over a split, the same ones at each iteration."""

    def __init__(self, split: TensorSplit | FileSplit, place: Place, count: int) -> None:
        self.split = split
        self.place = place
        self.order = torch.arange(0, len(split), math.ceil(len(split) / count)).split(_TEST_BATCH)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.split.batches(self.order, self.place)
