"""The command line: bnfast train | explain | doctor. Exit codes: 0 done, 1 training failed, 2 wrong
use, 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import sys
from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import nn

from bnfast import models
from bnfast.data import DATASETS
from bnfast.freezing import CONFIGURATIONS
from bnfast.training import TrainConfig, TrainingError, TrainResult, train


class _UsageError(ValueError):
    """An argument that the parser refuses."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise _UsageError(f"{message} (see: {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code. argv: the arguments without the program's name
    (None: sys.argv).
    """
    try:
        arguments = _parser().parse_args(argv)
        return arguments.command(arguments)
    except (ValueError, OSError) as error:
        return _fail(error, 2)
    except TrainingError as error:
        return _fail(error, 1)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)


def _fail(error: object, code: int) -> int:
    print("bnfast: error:", " ".join(str(error).split()), file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="bnfast", description="BatchNorm-only training of CNNs (arXiv 2003.00152), fast."
    )
    commands = parser.add_subparsers(required=True, metavar="train | explain | doctor")
    _add_train(commands)
    _add_explain(commands)
    _add_doctor(commands)
    return parser


def _add_train(commands: argparse._SubParsersAction) -> None:
    default = TrainConfig()
    parser = commands.add_parser(
        "train",
        help="train one of the paper's networks, with plain PyTorch beside it",
        description="Trains one of the paper's networks, with the plain PyTorch model beside it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", default=default.model, help=models.ALLOWED_NAMES)
    add("--data", default=default.data, choices=DATASETS, help="the data set")
    add("--data-dir", metavar="DIR", help="where the data set's files are, if not bundled")
    add("--config", default=default.config, choices=CONFIGURATIONS, help="what trains")
    add(
        "--epochs",
        type=int,
        help="passes over the training data; the data set's preset if left out",
    )
    add("--batch-size", type=int, help="the data set's preset if left out")
    add("--lr", type=float, help="learning rate; the data set's preset if left out")
    add("--momentum", type=float, default=default.momentum, help="of SGD")
    add("--weight-decay", type=float, default=default.weight_decay, help="of all that trains")
    add("--seed", type=int, default=default.seed, help="of the weights and of the data order")
    add(
        "--init-gamma",
        default=default.init_gamma,
        choices=models.GAMMA_CHOICES,
        help="first gammas",
    )
    add("--init-beta", type=float, default=default.init_beta, help="first value of every beta")
    add(
        "--features",
        default=default.features,
        choices=models.FEATURE_CHOICES,
        help="frozen weights",
    )
    add("--load", metavar="FILE", help="start from the checkpoint of a run with the same features")
    add("--out", metavar="DIR", help="folder of the run; a new one under runs/ if left out")
    add("--overwrite", action="store_true", help="replace the run that DIR holds")
    add(
        "--no-compare",
        dest="compare",
        action="store_false",
        help="do not train the plain model too",
    )
    add("--backend", default=default.backend, help="auto, or one that `bnfast doctor` lists")
    add("--device", default=default.device, choices=("cpu", "cuda"), help="where to train")
    add("--quiet", dest="progress", action="store_false", help="no progress bar")
    parser.set_defaults(command=_train)


def _train(arguments: argparse.Namespace) -> int:
    options = {key: value for key, value in vars(arguments).items() if key != "command"}
    print(_summary(train(TrainConfig(**options))))
    return 0


def _summary(result: TrainResult) -> str:
    config = result.config
    rows = [
        (
            "model",
            f"{config.model}, training {config.config!r} on {config.data}, seed {config.seed}",
        ),
        ("test accuracy", f"{result.test_accuracy:.2%}"),
        (
            "trainable parameters",
            f"{result.trainable_parameters:,} of {result.total_parameters:,} "
            f"({result.trainable_parameters / result.total_parameters:.3%})",
        ),
    ]
    compared = result.comparison
    if compared is not None:
        rows.append(("", ""))
        rows.append(
            ("beside it", "plain PyTorch, channels_last, same weights and batches, alternating")
        )
        rows.append(("test accuracy, plain", f"{compared.plain_test_accuracy:.2%}"))
        if compared.gradients_agree:
            rows.append(
                (
                    "step time",
                    f"{compared.step_ms:.2f} ms, plain {compared.plain_step_ms:.2f} ms: "
                    f"{compared.step_time_ratio:.2f}x as fast",
                )
            )
        else:
            rows.append(("step time", "not reported: the gradients differ from plain PyTorch's"))
        rows += [
            (
                "saved activations",
                f"{_mebibytes(compared.saved_bytes)}, "
                f"plain {_mebibytes(compared.plain_saved_bytes)}: "
                f"{compared.saved_bytes_ratio:.2f}x the memory",
            ),
            (
                "final training loss",
                f"{compared.train_loss:.4f}, plain {compared.plain_train_loss:.4f}: "
                f"difference {compared.loss_difference:+.4f}",
            ),
        ]
    rows.append(("", ""))
    rows.append(("checkpoint", str(result.checkpoint)))
    rows.append(("metrics", str(result.metrics)))
    if compared is not None:
        rows.append(("metrics, plain", str(compared.plain_metrics)))
    return _table(rows)


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:.2f} MiB"


def _table(rows: list[tuple[str, str]]) -> str:
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"{label:<{width}}  {value}".rstrip() for label, value in rows)


def _add_explain(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "explain",
        help="say which BatchNorms of a model are fused with what, and why others are not",
        description="Converts a model and says for every BatchNorm what it is fused with, or why not.",
    )
    parser.add_argument("--model", required=True, help="a network of the paper or of torchvision")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(command=_explain)


def _explain(arguments: argparse.Namespace) -> int:
    import bnfast

    report = bnfast.explain(bnfast.convert(_named_model(arguments.model), inplace=True))
    print(json.dumps(report.to_dict(), indent=2) if arguments.json else report)
    return 0


def _named_model(name: str) -> nn.Module:
    try:
        return models.create(name)
    except ValueError as error:
        unknown = f"{error}, and any classification model of torchvision"
    try:
        import torchvision
    except ImportError as error:
        raise ValueError(f"{unknown}, once torchvision is installed") from error
    if name not in torchvision.models.list_models(module=torchvision.models):
        raise ValueError(unknown)
    return torchvision.models.get_model(name, weights=None)


def _add_doctor(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "doctor",
        help="say what this machine has, and what is missing",
        description="Says what of bnfast works on this machine and what to install for the rest.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(command=_doctor)


def _doctor(arguments: argparse.Namespace) -> int:
    import bnfast

    backends = bnfast.backends()
    compiler = _find((os.environ.get("CXX", ""), "c++", "g++", "clang++"))
    facts = {
        "bnfast": _version("bnfast") or "not installed, used from its folder",
        "python": f"{platform.python_version()} ({sys.executable})",
        "torch": torch.__version__,
        "torchvision": _version("torchvision") or "not installed",
        "scikit-learn": _version("scikit-learn") or "not installed",
        "machine": f"{platform.system()} {platform.machine()}",
        "cpu capability": torch.backends.cpu.get_cpu_capability(),
        "cpu threads": str(torch.get_num_threads()),
        "extension": "built" if backends.get("cpu") is True else f"no: {backends.get('cpu')}",
        "c++ compiler": compiler or "not found",
        "nvcc": _find(("nvcc",)) or "not found",
        "cuda kernels": _cuda_kernels(),
        "gpu": _gpu(),
    }
    missing = []
    if backends.get("cpu") is not True:
        if compiler is None:
            missing.append(
                "a C++ compiler, to build the extension: apt-get install g++ (Debian, Ubuntu), "
                "dnf install gcc-c++ (Fedora), xcode-select --install (macOS)"
            )
        missing.append(
            "the compiled extension: pip install --no-build-isolation -e . in bnfast's folder"
        )
    if _version("torchvision") is None:
        missing.append("torchvision, for the ImageNet networks: pip install torchvision")
    if _version("scikit-learn") is None:
        missing.append("scikit-learn, for the data set digits: pip install scikit-learn")
    if arguments.json:
        print(json.dumps(facts | {"backends": backends, "missing": missing}, indent=2))
        return 0
    rows = list(facts.items())
    rows += [
        (f"backend {name}", "available" if state is True else f"no: {state}")
        for name, state in backends.items()
    ]
    rows += [("missing", what) for what in missing] or [("missing", "nothing")]
    print(_table(rows))
    return 0


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _find(programs: Sequence[str]) -> str | None:
    return next((path for path in map(shutil.which, filter(None, programs)) if path), None)


def _cuda_kernels() -> str:
    """What the CUDA kernels inside the extension were compiled for."""
    from bnfast import cuda

    if not cuda.architectures:
        return f"none: {cuda.why_unavailable()}"
    found = cuda.architectures_inside()
    return f"{found} (from cuobjdump)" if found else f"{cuda.architectures} (as asked for)"


def _gpu() -> str:
    if torch.cuda.is_available():
        return ", ".join(
            torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())
        )
    if torch.version.cuda is None and torch.version.hip is None:
        return "none: this torch is built for the CPU alone"
    return "none visible"
