"""Every torchvision model with a BatchNorm, converted and compared with itself: `python tests/zoo.py --write docs/coverage.md`.

One training step in float64, in training and in evaluation mode: outputs, gradients of all trainable parameters and of the
input, and running statistics agree with the unconverted model's (rtol 1e-7, atol scaled by the largest gradient); a float32
step agrees loosely; state_dict goes both ways, strictly; explain() accounts for every BatchNorm.
"""

import argparse
import contextlib
import copy
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torchvision
from torch import nn
from torch.utils._pytree import tree_leaves
from torchvision.models.optical_flow import _utils as raft_utils
from torchvision.models.optical_flow import raft

import bnfast

RTOL = 1e-7


def names() -> list[str]:
    """All torchvision models that hold a BatchNorm."""
    found = []
    for name in torchvision.models.list_models():
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                model = build(name)
            except NotImplementedError:  # an initialiser that does not run on meta tensors
                model = None
        if model is None:
            model = build(name)
        if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
            found.append(name)
    return found


def build(name: str) -> nn.Module:
    """The model with random weights; auxiliary heads where they are the default."""
    options = {"weights": None}
    builder = torchvision.models.get_model_builder(name)
    module = builder.__module__
    if "detection" in module or "segmentation" in module:
        options["weights_backbone"] = None
    if "detection" in module and "ssd" not in name:
        options.update(min_size=96, max_size=128)
    if "quantization" in module:
        options["quantize"] = False
    if name in ("googlenet", "inception_v3") or name.startswith(("quantized_g", "quantized_i")):
        options.update(init_weights=False, aux_logits=True)
    if "googlenet" in name:
        options["transform_input"] = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return builder(**options)


def inputs(name: str, dtype: torch.dtype) -> tuple[tuple, bool]:
    """(arguments of forward, whether it is a detection model in training form).

    Small, but with a dozen values or so per channel in the last BatchNorm: normalising two values keeps nothing but their
    order, and no two implementations agree about the gradient of that.
    """
    module = torchvision.models.get_model_builder(name).__module__
    generator = torch.Generator().manual_seed(1)

    def images(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) + 0.3

    if "detection" in module:
        size = 320 if "ssd" in name else 96
        pictures = [images(3, size, size) for _ in range(2)]
        boxes = torch.tensor([[10.0, 12, 60, 70], [5, 30, 80, 90]], dtype=dtype)
        target = {"boxes": boxes, "labels": torch.tensor([1, 2])}
        if "mask" in name:
            target["masks"] = torch.ones(2, size, size, dtype=torch.uint8)
        if "keypoint" in name:
            target["labels"] = torch.tensor([1, 1])
            points = torch.full((2, 17, 3), 40.0)  # torchvision takes float32 alone
            points[..., 2] = 1
            target["keypoints"] = points
        return (pictures, [target, copy.deepcopy(target)]), True
    if "video" in module:
        return (images(1, 3, 16, 224, 224) if name == "s3d" else images(2, 3, 4, 64, 64),), False
    if "optical_flow" in module:
        return (images(2, 3, 128, 128), images(2, 3, 128, 128), 2), False
    if "segmentation" in module:
        return (images(6, 3, 64, 64),), False
    side = 299 if "inception" in name else 224 if "maxvit" in name else 64
    if name.startswith(
        ("efficientnet", "mobilenet", "quantized_mobilenet", "mnasnet", "regnet", "shufflenet")
    ):
        side = 40  # grouped convolutions are slow in float64
    return (images(4, 3, side, side),), False


def step(
    model: nn.Module, name: str, dtype: torch.dtype, training: bool
) -> dict[str, torch.Tensor]:
    """One forward and backward pass; everything to compare, by name."""
    arguments, is_detection = inputs(name, dtype)
    leaf = arguments[0]
    if isinstance(leaf, torch.Tensor):
        leaf.requires_grad_()
    model.zero_grad(set_to_none=True)
    model.train(training or is_detection)
    if is_detection and not training:
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
    torch.manual_seed(2)
    with _raft_in(dtype):
        output = model(*arguments)
    leaves = [t for t in tree_leaves(output) if isinstance(t, torch.Tensor) and t.requires_grad]
    generator = torch.Generator().manual_seed(3)
    upstream = [
        torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype) for t in leaves
    ]
    torch.autograd.backward(leaves, upstream)
    result = {f"output {i}": t.detach() for i, t in enumerate(leaves)}
    if isinstance(leaf, torch.Tensor):
        result["gradient of the input"] = leaf.grad
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            result[f"gradient of {key}"] = parameter.grad
    for key, buffer in model.named_buffers():
        result[f"buffer {key}"] = buffer.clone()
    return result


@contextlib.contextmanager
def _raft_in(dtype: torch.dtype) -> Iterator[None]:
    """RAFT builds its grid of coordinates in float32 whatever its input is; here it gets the input's dtype."""
    grids = {m: m.make_coords_grid for m in (raft, raft_utils)}
    for module, plain in grids.items():
        module.make_coords_grid = lambda *args, plain=plain, **kw: plain(*args, **kw).to(dtype)
    try:
        yield
    finally:
        for module, plain in grids.items():
            module.make_coords_grid = plain


def compare(
    name: str, want: dict, got: dict, rtol: float, strides: bool = True, loose: bool = False
) -> None:
    """Raises AssertionError where two steps differ in any element; loosely, in the root of the mean square."""
    assert want.keys() == got.keys()
    largest = max(
        (t.abs().max().item() for k, t in want.items() if k.startswith("grad") and t is not None),
        default=1.0,
    )
    for key, expected in want.items():
        actual = got[key]
        if expected is None:
            assert actual is None, f"{name}: {key}: a gradient where the unconverted model has none"
            continue
        assert actual is not None, f"{name}: {key}: no gradient"
        if strides and key.startswith("output"):
            assert actual.stride() == expected.stride(), f"{name}: {key}: strides"
        scale = largest if key.startswith("grad") else max(expected.abs().max().item(), 1e-30)
        difference = actual.double() - expected.double()
        error = 0.0
        if expected.numel():
            error = (difference.square().mean().sqrt() if loose else difference.abs().max()).item()
        assert error <= rtol * scale, (
            f"{name}: {key}: differs by {error:.3g} at a scale of {scale:.3g}"
        )


def prepare(name: str, dtype: torch.dtype) -> nn.Module:
    """The unconverted model with BatchNorms that do something: random gammas, betas and statistics, BN-only."""
    torch.manual_seed(0)
    model = build(name).to(dtype)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            with torch.no_grad():
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(std=0.2)
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 1.5)
    return bnfast.freeze(model, "bn")


def check(name: str, float32: bool = True) -> bnfast.Report:
    """All comparisons for one model; raises AssertionError."""
    plain = prepare(name, torch.float64)
    converted = bnfast.convert(plain, train="keep")
    assert list(converted.state_dict()) == list(plain.state_dict())
    converted.load_state_dict(plain.state_dict(), strict=True)
    plain.load_state_dict(converted.state_dict(), strict=True)
    for training in (True, False):
        want = step(plain, name, torch.float64, training)
        compare(name, want, step(converted, name, torch.float64, training), RTOL)
    if float32:
        plain, converted = plain.float(), converted.float()
        got = step(converted, name, torch.float32, False)
        try:
            compare(name, step(plain, name, torch.float32, False), got, 2e-2, loose=True)
        except AssertionError:
            # A ReLU's mask may flip between stock PyTorch's own two layouts; converted models run in the second.
            plain = plain.to(memory_format=torch.channels_last)
            want = step(plain, name, torch.float32, False)
            compare(name, want, got, 2e-2, strides=False, loose=True)
    report = bnfast.explain(converted)
    norms = sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in converted.modules())
    assert len(report.fused) + len(report.left) == norms
    return report


def adds_after_bn(report: bnfast.Report) -> int:
    """How many BatchNorms run in one unit with an addition."""
    return sum("add" in e.fused_as for e in report.fused)


def table(rows: list[tuple[str, bnfast.Report]]) -> str:
    """The coverage table as Markdown."""
    lines = [
        "# What convert() fuses in torchvision",
        "",
        f"As explain() reports it (torch {torch.__version__}, torchvision {torchvision.__version__}). `python tests/zoo.py` "
        "compares a training step of each model with the unconverted model's and can write this table.",
        "",
        "| model | BatchNorms | fused | as | left, because |",
        "|---|--:|--:|---|---|",
    ]
    for name, report in rows:
        kinds = Counter(e.fused_as for e in report.fused)
        reasons = Counter(e.reason for e in report.left)
        total = len(report.fused) + len(report.left)
        fused_as = ", ".join(f"{n} {kind}" for kind, n in kinds.most_common())
        left = "; ".join(f"{n}: {reason}" for reason, n in reasons.most_common())
        lines.append(f"| {name} | {total} | {len(report.fused)} | {fused_as} | {left} |")
    return "\n".join(lines) + "\n"


def main(say: Callable[[str], None] = print) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, help="where the table goes")
    parser.add_argument("--only", help="comma-separated names")
    options = parser.parse_args()
    rows, failed = [], []
    for name in options.only.split(",") if options.only else names():
        started = time.perf_counter()
        try:
            report = check(name)
        except Exception as error:
            failed.append(name)
            say(f"FAILED {name}: {type(error).__name__}: {error}")
            continue
        rows.append((name, report))
        total = len(report.fused) + len(report.left)
        say(f"{name}: {len(report.fused)} of {total} fused, {time.perf_counter() - started:.0f} s")
    if options.write and not failed:
        options.write.parent.mkdir(parents=True, exist_ok=True)
        options.write.write_text(table(rows))
    say(f"{len(rows)} passed, {len(failed)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
