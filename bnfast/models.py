"""The paper's networks (arXiv 2003.00152) in plain PyTorch: CIFAR ResNets, wide ResNets and VGGs,
ImageNet ResNets; and any classification network of torchvision or timm by its name.

Nothing here knows of bnfast's modules: ``bnfast.convert`` takes these models as it takes any other.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
from typing import NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnfast.freezing import affine_parameters, output_layers, shortcut_convolutions

_IMAGENET_PLANS = {
    18: ("BasicBlock", (2, 2, 2, 2)),
    34: ("BasicBlock", (3, 4, 6, 3)),
    50: ("Bottleneck", (3, 4, 6, 3)),
    101: ("Bottleneck", (3, 4, 23, 3)),
    152: ("Bottleneck", (3, 8, 36, 3)),
    200: ("Bottleneck", (3, 24, 36, 3)),
}

# Convolutions before each of the five poolings; the widths are the same in all four networks.
_VGG_PLANS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
_VGG_WIDTHS = (64, 128, 256, 512, 512)

ALLOWED_NAMES = (
    "resnet<6n+2> (CIFAR: resnet14, resnet20, resnet32, resnet56, resnet110, resnet218, "
    "resnet434, resnet866, ...), "
    "wrn<6n+2>_<k> (the same, k times as wide: wrn14_4, ...), "
    "resnet18, resnet34, resnet50, resnet101, resnet152, resnet200 (ImageNet), "
    "vgg11, vgg13, vgg16, vgg19 (CIFAR), or a classification network of torchvision or timm "
    "(torchvision:vgg16 where the name alone means another)"
)

GAMMA_CHOICES = ("uniform", "ones", "symmetric")
FEATURE_CHOICES = ("kaiming_normal", "kaiming_uniform", "orthogonal", "binary")


class ParameterCounts(NamedTuple):
    """Numbers of parameters (elements, not tensors), as in the model table of the paper."""

    total: int
    bn: int
    output: int
    shortcut: int


class CifarBlock(nn.Module):
    """Two 3x3 convolutions around a residual connection, with the ReLU after the addition.

    x [N, in_channels, H, W] -> [N, channels, H / stride, W / stride]. The shortcut is the identity
    where the shape stays and 1x1 convolution + BatchNorm where it changes ("option B").
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        if stride == 1 and in_channels == channels:
            self.shortcut: nn.Module = nn.Identity()
        else:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False),
                nn.BatchNorm2d(channels),
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu(out + self.shortcut(x))


class CifarResNet(nn.Module):
    """ResNet of depth 6n+2 for small images: a stem, three segments of n blocks, global average
    pooling, one Linear.

    x [N, in_channels, H, W] (the paper: 32 x 32) -> logits [N, num_classes]. Widths are w, 2w, 4w
    with w = 16 * width, so BatchNorm has 2w(14n+7) parameters in 6n+3 layers.
    """

    def __init__(
        self, depth: int, width: int = 1, num_classes: int = 10, in_channels: int = 3
    ) -> None:
        super().__init__()
        blocks_per_segment = (depth - 2) // 6
        channels = 16 * width
        self.conv = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        segments = []
        for segment in range(3):
            segment_channels = channels if segment == 0 else 2 * channels
            stride = 1 if segment == 0 else 2
            blocks = [CifarBlock(channels, segment_channels, stride)]
            channels = segment_channels
            blocks += [CifarBlock(channels, channels, 1) for _ in range(blocks_per_segment - 1)]
            segments.append(nn.Sequential(*blocks))
        self.segments = nn.Sequential(*segments)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn(self.conv(x)))
        out = self.pool(self.segments(out))
        return self.fc(out.flatten(1))


class CifarVGG(nn.Module):
    """VGG with BatchNorm for small images: 3x3 convolutions with bias, each followed by BatchNorm
    and ReLU, one Linear.

    x [N, in_channels, H, W] with H, W >= 16 (the paper: 32 x 32) -> logits [N, num_classes].
    """

    def __init__(self, depth: int, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = in_channels
        for stage, (width, repeats) in enumerate(zip(_VGG_WIDTHS, _VGG_PLANS[depth], strict=True)):
            if stage > 0:
                layers.append(nn.MaxPool2d(2))
            for _ in range(repeats):
                layers.append(nn.Conv2d(channels, width, 3, padding=1))
                layers.append(nn.BatchNorm2d(width))
                layers.append(nn.ReLU(inplace=True))
                channels = width
        self.features = nn.Sequential(*layers)
        # 32 x 32 images end as 2 x 2 maps: the paper's 2 x 2 average, and other sizes work too.
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pool(self.features(x)).flatten(1))


def _imagenet_resnet(depth: int, num_classes: int, in_channels: int) -> nn.Module:
    try:
        from torchvision.models import resnet
    except ImportError as error:
        raise ValueError(
            f"resnet{depth} is torchvision's, which is not installed: pip install torchvision"
        ) from error
    block, plan = _IMAGENET_PLANS[depth]
    model = resnet.ResNet(getattr(resnet, block), list(plan), num_classes=num_classes)
    return _with_in_channels(model, in_channels)


def create(name: str, num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """Builds a network and initialises it as the paper does (see :func:`initialize`).

    name: ``resnet<6n+2>`` (CIFAR ResNet; 50, 152 and 200 name the ImageNet networks),
    ``wrn<6n+2>_<k>`` (the CIFAR ResNet with k times the width), ``resnet18|34|50|101|152|200``
    (ImageNet ResNet, torchvision's class), ``vgg11|13|16|19`` (CIFAR VGG with BatchNorm), or a
    classification network of torchvision or timm. Where a name stands for several, the first in this
    order is meant; ``torchvision:<name>`` and ``timm:<name>`` say which. The model takes
    x [N, in_channels, H, W] and returns logits [N, num_classes].

    The weights come from torch's global generator, on the default device (``torch.device("meta")``
    works for counting the paper's networks).

    Raises ValueError for an unknown name, for counts below 1, and for a network that cannot have them.
    """
    model = _build(name, num_classes, in_channels)
    initialize(model)
    return model


def create_pretrained(
    name: str,
    num_classes: int = 10,
    in_channels: int = 3,
    weights: str | os.PathLike[str] | None = None,
) -> nn.Module:
    """Builds a network with trained weights, which are no random features: those of a file, or (None) those that
    torchvision or timm offer for the name and download once.

    weights: a state_dict, written by torch.save or in safetensors. Where the output layer has another number of
    classes, a new one is made as :func:`initialize` makes them. name, num_classes and in_channels: see :func:`create`.

    Raises ValueError for a name without pretrained weights and a file that does not fit, OSError where
    it cannot be read or downloaded.
    """
    model = create(name, num_classes, in_channels)
    state = _offered_weights(name) if weights is None else _read_weights(weights)
    output = {
        f"{n}.{p}"
        for n, m in model.named_modules()
        if m in output_layers(model)
        for p in ("weight", "bias")
    }
    own = model.state_dict()
    fitting = {k: v for k, v in state.items() if k not in output or v.shape == own[k].shape}
    try:
        missing, unexpected = model.load_state_dict(fitting, strict=False)
    except RuntimeError as error:
        raise ValueError(f"the weights do not fit {name!r}: {error}") from error
    problems = [key for key in missing if key not in output] + unexpected
    if problems:
        raise ValueError(
            f"the weights do not fit {name!r}: missing or unknown are {', '.join(problems[:3])}"
        )
    return model


def _read_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    with open(path, "rb"):
        pass  # safetensors and torch report the system's errors as their own
    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError:
        pass
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # torch.load raises whatever its archive reader and unpickler do.
        raise ValueError(f"{os.fspath(path)!r} (weights) is no file of tensors: {error}") from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{os.fspath(path)!r} (weights) holds no state_dict")
    return state


def _offered_weights(name: str) -> dict[str, Tensor]:
    library, _, short = name.rpartition(":")
    if library != "timm":
        import torchvision

        if short in torchvision.models.list_models(module=torchvision.models):
            enum = torchvision.models.get_model_weights(short)
            if len(enum) and (library or not _is_cifar_name(short)):
                return enum.DEFAULT.get_state_dict(progress=False)
    if library != "torchvision" and _timm_knows(short):
        import timm

        if timm.is_model_pretrained(short):
            return timm.create_model(short, pretrained=True).state_dict()
    raise ValueError(f"there are no pretrained weights for {name!r}: give the file of your own")


_PAPER_NAME = re.compile(r"(resnet|wrn|vgg)([1-9]\d*)(?:_([1-9]\d*))?")


def _is_cifar_name(name: str) -> bool:
    match = _PAPER_NAME.fullmatch(name)
    return match is not None and not (match[1] == "resnet" and int(match[2]) in _IMAGENET_PLANS)


def _build(name: str, num_classes: int, in_channels: int) -> nn.Module:
    for argument, value in (("num_classes", num_classes), ("in_channels", in_channels)):
        if value < 1:
            raise ValueError(f"{argument} must be at least 1, not {value}")
    match = _PAPER_NAME.fullmatch(name)
    if match is not None:
        family, depth = match[1], int(match[2])
        width = int(match[3]) if match[3] else None
        is_cifar_depth = depth >= 8 and depth % 6 == 2
        if family == "vgg" and depth in _VGG_PLANS and width is None:
            return CifarVGG(depth, num_classes, in_channels)
        if family == "resnet" and depth in _IMAGENET_PLANS and width is None:
            return _imagenet_resnet(depth, num_classes, in_channels)
        if family == "resnet" and is_cifar_depth and width is None:
            return CifarResNet(depth, 1, num_classes, in_channels)
        if family == "wrn" and is_cifar_depth and width is not None:
            return CifarResNet(depth, width, num_classes, in_channels)
    library, _, short = name.rpartition(":")
    if library in ("", "torchvision") and importlib.util.find_spec("torchvision") is not None:
        import torchvision

        if short in torchvision.models.list_models(module=torchvision.models):
            # Auxiliary heads would change what the model returns in training.
            more = {"aux_logits": False, "init_weights": False} if short in _AUXILIARY else {}
            model = torchvision.models.get_model(
                short, weights=None, num_classes=num_classes, **more
            )
            return _with_in_channels(model, in_channels)
    if library in ("", "timm") and _timm_knows(short):
        import timm

        return timm.create_model(short, num_classes=num_classes, in_chans=in_channels)
    absent = [p for p in ("torchvision", "timm") if importlib.util.find_spec(p) is None]
    hint = f" ({' and '.join(absent)} not installed)" if absent else ""
    raise ValueError(f"unknown model {name!r}; allowed are: {ALLOWED_NAMES}{hint}")


_AUXILIARY = ("googlenet", "inception_v3")


def _timm_knows(name: str) -> bool:
    if importlib.util.find_spec("timm") is None:
        return False
    import timm

    return timm.is_model(name)


def _with_in_channels(model: nn.Module, in_channels: int) -> nn.Module:
    """The model with its first convolution made for images of in_channels."""
    if in_channels == 3:
        return model
    name, first = next((n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d))
    conv = nn.Conv2d(
        in_channels,
        first.out_channels,
        first.kernel_size,
        first.stride,
        first.padding,
        first.dilation,
        bias=first.bias is not None,
    )
    model.set_submodule(name, conv)
    return model


def initialize(
    model: nn.Module,
    gamma: str = "uniform",
    beta: float = 0.0,
    features: str = "kaiming_normal",
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Draws the parameters of convolutions, Linears and BatchNorms anew, in place, as in the paper's
    experiments, and returns the model.

    gamma: "uniform" (U[0, 1), the paper), "ones", or "symmetric" (U[-1, 1)). beta: one constant for
    every BatchNorm (the paper: 0). features, the weights of convolutions and Linears:
    "kaiming_normal" (fan-in, gain sqrt 2; the paper),
    "kaiming_uniform", "orthogonal", or "binary" (the sign of a kaiming_normal draw times the
    standard deviation of that
    draw). Biases of convolutions and Linears are U(-1/sqrt(fan_in), 1/sqrt(fan_in)), torch's
    default. Running statistics are reset. Numbers come from `generator`, or from torch's global
    one; the features are drawn before the gammas, so the same seed gives the same features whatever
    `gamma` and `beta` are.

    Raises ValueError, before anything is changed, for a choice that does not exist.
    """
    if gamma not in GAMMA_CHOICES:
        raise ValueError(f"gamma must be one of {', '.join(GAMMA_CHOICES)}, not {gamma!r}")
    if features not in FEATURE_CHOICES:
        raise ValueError(f"features must be one of {', '.join(FEATURE_CHOICES)}, not {features!r}")
    if not math.isfinite(beta):
        raise ValueError(f"beta must be a finite number, not {beta}")
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)):
                _draw_features(module.weight, features, generator)
                if module.bias is not None:
                    bound = 1 / math.sqrt(module.weight[0].numel())
                    nn.init.uniform_(module.bias, -bound, bound, generator=generator)
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.reset_running_stats()
    return initialize_affine(model, gamma, beta, generator)


def initialize_affine(
    model: nn.Module,
    gamma: str | None = "uniform",
    beta: float | None = 0.0,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """The part of :func:`initialize` that draws gammas and sets betas; None leaves them as they are."""
    if gamma not in (None, *GAMMA_CHOICES):
        raise ValueError(f"gamma must be one of {', '.join(GAMMA_CHOICES)}, not {gamma!r}")
    if beta is not None and not math.isfinite(beta):
        raise ValueError(f"beta must be a finite number, not {beta}")
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                if module.weight is not None and gamma == "ones":
                    nn.init.ones_(module.weight)
                elif module.weight is not None and gamma is not None:
                    low = 0.0 if gamma == "uniform" else -1.0
                    nn.init.uniform_(module.weight, low, 1.0, generator=generator)
                if module.bias is not None and beta is not None:
                    nn.init.constant_(module.bias, beta)
    return model


def _draw_features(weight: Tensor, features: str, generator: torch.Generator | None) -> None:
    if features == "kaiming_uniform":
        nn.init.kaiming_uniform_(weight, generator=generator)
    elif features == "orthogonal":
        nn.init.orthogonal_(weight, generator=generator)
    else:
        nn.init.kaiming_normal_(weight, generator=generator)
        if features == "binary":
            weight.copy_(weight.sign() * weight.std())


def count_parameters(model: nn.Module) -> ParameterCounts:
    """Counts a model's parameters the way the paper's model table does.

    total: all; bn: gammas and betas; output: weight and bias of the output layer; shortcut: weights
    of the 1x1 convolutions on residual bypasses (without their BatchNorm, which counts as bn). A
    part that the model lacks counts 0.
    """
    return ParameterCounts(
        total=sum(p.numel() for p in model.parameters()),
        bn=sum(p.numel() for p in affine_parameters(model)),
        output=sum(p.numel() for layer in output_layers(model) for p in layer.parameters()),
        shortcut=sum(p.numel() for conv in shortcut_convolutions(model) for p in conv.parameters()),
    )
