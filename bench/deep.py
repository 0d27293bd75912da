"""The paper's deepest network, ResNet-866 with 867 BatchNorms, trained through them alone, bnfast beside plain PyTorch.

    python -m bench.deep --output docs/resnet866.md

Both sides start from the paper's initialisation and take the same steps of its recipe (SGD 0.1, momentum 0.9, weight decay
1e-4) on the same batches, in turns. The command fails where a loss is not finite, where the losses do not fall, or where
convert() takes longer than it may.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bnfast
from bench import memory, timing
from bnfast import data
from bnfast.measure import saved_activation_bytes

CONVERT_SECONDS = 10.0
_WARM_UP = 2
_COMPARED = 5


class Side:
    """One model with its optimiser, its losses and the seconds of its steps."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model.train()
        parameters = bnfast.affine_parameters(model)
        self.optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-4)
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def step(self, images: Tensor, labels: Tensor) -> None:
        start = time.perf_counter()
        loss = F.cross_entropy(self.model(images), labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.seconds.append(time.perf_counter() - start)
        self.losses.append(loss.item())

    def is_healthy(self) -> bool:
        """Finite losses that fall: the mean of the last ones is below that of the first."""
        few = min(_COMPARED, len(self.losses) // 2)
        means = [statistics.fmean(part) for part in (self.losses[:few], self.losses[-few:])]
        return bool(torch.tensor(self.losses).isfinite().all()) and means[1] < means[0]

    def milliseconds(self) -> float:
        return 1000 * statistics.median(self.seconds[_WARM_UP:])


def run(name: str, data_name: str, folder: str | None, batch_size: int, steps: int) -> str:
    """The report in Markdown. Raises RuntimeError where a side diverges or convert() is too slow."""
    split = data.load(data_name, folder).train
    place = data.Place()
    torch.manual_seed(0)
    plain = bnfast.freeze(bnfast.models.create(name, in_channels=split.images.shape[1]), "bn")
    plain = plain.to(memory_format=torch.channels_last)
    start = time.perf_counter()
    converted = bnfast.convert(copy.deepcopy(plain), inplace=True)
    convert_seconds = time.perf_counter() - start
    if convert_seconds > CONVERT_SECONDS:
        raise RuntimeError(
            f"convert() took {convert_seconds:.1f} s, {CONVERT_SECONDS} s are allowed"
        )

    sides = {"bnfast": Side(converted), "plain PyTorch": Side(plain)}
    order = data.shuffled(len(split), batch_size, 0)[:steps]
    batches = list(split.batches(order, place))
    peaks = {}
    for side_name, side in sides.items():
        trial = Side(copy.deepcopy(side.model))
        peaks[side_name] = memory.peak_bytes(
            lambda t=trial: t.step(*batches[0]), torch.device("cpu")
        )
        del trial
    saved = {n: saved_activation_bytes(s.model, batches[0][0]) for n, s in sides.items()}
    for number, batch in enumerate(batches):
        for side in list(sides.values())[:: 1 if number % 2 == 0 else -1]:
            side.step(*batch)
    for side_name, side in sides.items():
        if not side.is_healthy():
            raise RuntimeError(f"{side_name} diverged: losses {side.losses}")

    norms = sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in plain.modules())
    lines = [
        f"# {name}: {steps} steps through BatchNorm alone",
        "",
        f"{norms} BatchNorms, {sum(p.numel() for p in bnfast.affine_parameters(plain)):,} of "
        f"{sum(p.numel() for p in plain.parameters()):,} parameters train. {data_name}, batches of {batch_size}, from the "
        "paper's initialisation by its recipe; both sides in turns, on the same batches. Written by `python -m bench.deep`.",
        "",
        timing.environment_line(timing.environment()),
        "",
        f"convert() took {convert_seconds:.1f} s.",
        "",
        "| | median step, ms | saved for backward, MiB | growth of the process in a step, MiB | first loss | last loss |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for side_name, side in sides.items():
        peak = "" if peaks[side_name] is None else f"{peaks[side_name] / 2**20:.0f}"
        lines.append(
            f"| {side_name} | {side.milliseconds():.0f} | {saved[side_name] / 2**20:.0f} | {peak} | "
            f"{side.losses[0]:.3f} | {side.losses[-1]:.3f} |"
        )
    lines += [
        "",
        "Losses, bnfast and plain PyTorch:",
        "",
        "| step | bnfast | plain |",
        "|--:|--:|--:|",
    ]
    pairs = zip(*(side.losses for side in sides.values()), strict=True)
    lines += [f"| {i} | {a:.4f} | {b:.4f} |" for i, (a, b) in enumerate(pairs, start=1)]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet866")
    parser.add_argument("--data", default="fashion-mnist", help="a data set in memory")
    parser.add_argument("--data-dir", help="where its files are")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output", type=Path, help="file for the report; printed in any case")
    args = parser.parse_args()
    report = run(args.model, args.data, args.data_dir, args.batch_size, args.steps)
    print(report)
    if args.output is not None:
        args.output.write_text(report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
