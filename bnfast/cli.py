"""The command line: bnfast train | sweep | report | explain | tune | doctor. Exit codes: 0 done, 1 training failed, 2 wrong
use, 130 interrupted.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from bnfast import dispatch, distributed, models, sweep, tuning
from bnfast.recipes import TrainConfig, from_plain
from bnfast.training import CONFIG, TrainingError, TrainResult, train


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
    commands = parser.add_subparsers(
        required=True, metavar="train | sweep | report | explain | tune | doctor"
    )
    _add_train(commands)
    _add_sweep(commands)
    _add_report(commands)
    _add_explain(commands)
    _add_tune(commands)
    _add_doctor(commands)
    return parser


def _add_train(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "train",
        help="train a network by one of the paper's recipes",
        usage="%(prog)s [options]",
        description="Trains a network through its BatchNorm layers, or as --config says, by one of the paper's recipes.",
        epilog=_TRAIN_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        # What was not given stays out of the arguments, so that --resume can tell.
        argument_default=argparse.SUPPRESS,
    )
    groups: dict[str, argparse._ArgumentGroup] = {}
    for option in dataclasses.fields(TrainConfig):
        about = dict(option.metadata)
        title = about.pop("group")
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        name = "--" + option.name.replace("_", "-")
        text = about.pop("help")
        if option.default is False:
            groups[title].add_argument(name, action="store_true", help=text)
        elif option.default is True:
            flag = about.pop("flag", "--no-" + name[2:])
            groups[title].add_argument(
                flag, dest=option.name, action="store_false", help=_FLAGS[flag]
            )
        elif option.type.startswith("bool"):
            action = argparse.BooleanOptionalAction
            groups[title].add_argument(name, action=action, help=text)
        else:
            shown = "" if option.default is None else f" (default: {option.default})"
            if about.get("type") in (int, float):
                about.setdefault("metavar", "N" if about["type"] is int else "X")
            groups[title].add_argument(name, help=text + shown, **about)
    parser.set_defaults(command=_train)


# What the flags say that switch something off.
_FLAGS = {
    "--no-convert": "train the model in plain PyTorch, without bnfast.convert",
    "--no-channels-last": "images and activations in NCHW",
    "--no-analyse": "leave out gammas, dead ReLUs and small gammas set to 0 at the end",
    "--quiet": "no progress bar",
}

_TRAIN_EXAMPLES = """\
examples:
  bnfast train --model resnet110 --data cifar10 --download        the paper's BatchNorm-only ResNet-110
  bnfast train --model wrn14_4 --data cifar10 --config all        the same network, everything trained
  bnfast train --data cifar10 --config random2                    2 random weights per channel instead
  bnfast train --data fashion-mnist --epochs 4 --compare run      a short recipe, plain PyTorch beside it
  bnfast train --out runs/a --resume                              go on after an interruption
  torchrun --nproc-per-node 8 -m bnfast train --model resnet50 --data imagenet --data-dir DIR --device cuda
"""


def _train(arguments: argparse.Namespace) -> int:
    given = {key: value for key, value in vars(arguments).items() if key != "command"}
    begun: dict[str, Any] = {}
    if given.get("resume") and "out" in given and (Path(given["out"]) / CONFIG).is_file():
        begun = json.loads((Path(given["out"]) / CONFIG).read_text())
    result = train(from_plain(begun | given))
    if distributed.is_first():
        print(_summary(result))
    return 0


def _add_sweep(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "sweep",
        help="train the runs of a file, skipping what is finished",
        description="Trains the runs of a TOML file, one after the other. Finished ones are skipped, interrupted ones go on.",
    )
    parser.add_argument("file", metavar="FILE", help="see experiments/ for examples")
    parser.add_argument(
        "--out", metavar="DIR", help="folder of the runs; runs/<FILE's name> where left out"
    )
    parser.add_argument("--list", action="store_true", help="say what would run, and run nothing")
    parser.add_argument("--quiet", dest="progress", action="store_false", help="no progress bars")
    parser.set_defaults(command=_sweep)


def _sweep(arguments: argparse.Namespace) -> int:
    planned = sweep.read(arguments.file)
    folder = Path(arguments.out or Path("runs") / Path(arguments.file).stem)
    if arguments.list:
        print(_table([(run.name, sweep.state(run, folder)) for run in planned]))
        return 0
    failed = sweep.sweep(planned, folder, arguments.progress, lambda line: print(line, flush=True))
    if failed:
        raise TrainingError(f"{len(failed)} of {len(planned)} runs failed: {', '.join(failed)}")
    print(f"all {len(planned)} runs are finished: bnfast report {folder}")
    return 0


def _add_report(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "report",
        help="render runs as one page, beside the paper's figures",
        description="Renders all finished runs under a folder as one self-contained HTML page and PNG plots.",
    )
    parser.add_argument("folder", metavar="DIR", help="a run, or a folder of runs")
    parser.add_argument(
        "--output", metavar="DIR", help="where the page goes; DIR/report where left out"
    )
    parser.add_argument(
        "--note",
        metavar="TEXT",
        default="",
        help="a paragraph under the page's head, in plain text",
    )
    parser.set_defaults(command=_report)


def _report(arguments: argparse.Namespace) -> int:
    from bnfast import report

    folder = Path(arguments.folder)
    print(report.write(folder, Path(arguments.output or folder / "report"), arguments.note))
    return 0


def _summary(result: TrainResult) -> str:
    config = result.config
    rows = [
        (
            "model",
            f"{config.model}, training {config.config!r} on {config.data}, seed {config.seed}",
        ),
        (
            "test accuracy",
            f"{result.test_accuracy:.2%}, top-5 {result.history[-1].test_top5:.2%}",
        ),
        (
            "trainable parameters",
            f"{result.trainable_parameters:,} of {result.total_parameters:,} "
            f"({result.trainable_parameters / result.total_parameters:.3%})",
        ),
    ]
    compared = result.comparison
    if compared is None:
        rows.append(("step time", f"{result.step_ms:.2f} ms"))
    else:
        rows.append(("", ""))
        rows.append(
            (
                "beside it",
                f"plain PyTorch, {'channels_last' if config.channels_last else 'NCHW'}, "
                "same weights and batches, alternating",
            )
        )
        if compared.plain_test_accuracy is not None:
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
        rows.append(
            (
                "saved activations",
                f"{_mebibytes(compared.saved_bytes)}, "
                f"plain {_mebibytes(compared.plain_saved_bytes)}: "
                f"{compared.saved_bytes_ratio:.2f}x the memory",
            )
        )
        if compared.train_loss is not None:
            rows.append(
                (
                    "final training loss",
                    f"{compared.train_loss:.4f}, plain {compared.plain_train_loss:.4f}: "
                    f"difference {compared.loss_difference:+.4f}",
                )
            )
    rows.append(("", ""))
    rows.append(("checkpoint", str(result.checkpoint)))
    rows.append(("metrics", str(result.metrics)))
    if compared is not None and compared.plain_metrics is not None:
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

    report = bnfast.explain(bnfast.convert(models.create(arguments.model), inplace=True))
    print(json.dumps(report.to_dict(), indent=2) if arguments.json else report)
    return 0


def _add_tune(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "tune",
        help="measure which way each convolution of a model is fastest here",
        description="Measures the ways that each convolution of a model can go on this machine, and keeps the fastest in a table that "
        "every later run on this machine reads.",
    )
    parser.add_argument(
        "--model", required=True, help="a network of the paper, torchvision or timm"
    )
    parser.add_argument("--batch", type=int, default=16, help="images at once (default: 16)")
    parser.add_argument("--size", type=int, default=224, help="height and width (default: 224)")
    parser.add_argument("--channels", type=int, default=3, help="of the images (default: 3)")
    parser.add_argument("--amp", choices=("bf16", "f16"), help="tune for autocast in this dtype")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 (default: cpu)")
    parser.add_argument("--backend", default="auto", help="auto, cpu, triton (default: auto)")
    parser.add_argument("--rounds", type=int, default=7, help="timed calls per way (default: 7)")
    parser.add_argument(
        "--output", help="the table (default: $BNFAST_TUNING, else in the user's cache)"
    )
    parser.set_defaults(command=_tune)


def _tune(arguments: argparse.Namespace) -> int:
    import bnfast

    for name in ("batch", "size", "channels", "rounds"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name} is {getattr(arguments, name)}; at least 1 is needed")
    if arguments.device != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"--device is {arguments.device!r}; PyTorch sees no GPU")
    try:
        dispatch.check(arguments.backend)
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    model = models.create(arguments.model, in_channels=arguments.channels)
    x = torch.randn(arguments.batch, arguments.channels, arguments.size, arguments.size)
    amp = {"bf16": torch.bfloat16, "f16": torch.float16, None: None}[arguments.amp]
    rows = bnfast.tune(
        model.to(arguments.device),
        x.to(arguments.device),
        autocast=amp,
        backend=arguments.backend,
        rounds=arguments.rounds,
        file=arguments.output,
        say=lambda line: print(line, flush=True),
    )
    if not rows:
        print("nothing to choose: no convolution of this model has several ways on this backend")
    else:
        print(f"{len(rows)} convolutions in {arguments.output or tuning.path()}")
    return 0


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
        "matplotlib": _version("matplotlib") or "not installed",
        "machine": f"{platform.system()} {platform.machine()}",
        "cpu capability": torch.backends.cpu.get_cpu_capability(),
        "cpu threads": str(torch.get_num_threads()),
        "extension": "built" if backends.get("cpu") is True else f"no: {backends.get('cpu')}",
        "c++ compiler": compiler or "not found",
        "nvcc": _find(("nvcc",)) or "not found",
        "cuda kernels": _cuda_kernels(),
        "tuning table": tuning.state(),
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
    if _version("matplotlib") is None:
        missing.append("matplotlib, for bnfast report: pip install matplotlib")
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
