"""The paper's networks (arXiv 2003.00152) in plain PyTorch: CIFAR ResNets, wide ResNets and VGGs,
ImageNet ResNets.

Nothing here knows of bnfast's modules: ``bnfast.convert`` takes these models as it takes any other.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

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
    "vgg11, vgg13, vgg16, vgg19 (CIFAR)"
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
    from torchvision.models import resnet

    block, plan = _IMAGENET_PLANS[depth]
    model = resnet.ResNet(getattr(resnet, block), list(plan), num_classes=num_classes)
    if in_channels != 3:
        model.conv1 = nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
    return model


def create(name: str, num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """Builds a network of the paper and initialises it as the paper does (see :func:`initialize`).

    name: ``resnet<6n+2>`` (CIFAR ResNet; 50, 152 and 200 name the ImageNet networks),
    ``wrn<6n+2>_<k>`` (the CIFAR ResNet with k times the width), ``resnet18|34|50|101|152|200``
    (ImageNet ResNet, torchvision's class), ``vgg11|13|16|19`` (CIFAR VGG with BatchNorm). The model
    takes x [N, in_channels, H, W] and returns logits [N, num_classes].

    The weights come from torch's global generator, on the default device (``torch.device("meta")``
    works for counting).

    Raises ValueError for an unknown name and for counts below 1.
    """
    for argument, value in (("num_classes", num_classes), ("in_channels", in_channels)):
        if value < 1:
            raise ValueError(f"{argument} must be at least 1, not {value}")
    model = _build(name, num_classes, in_channels)
    initialize(model)
    return model


def _build(name: str, num_classes: int, in_channels: int) -> nn.Module:
    match = re.fullmatch(r"(resnet|wrn|vgg)([1-9]\d*)(?:_([1-9]\d*))?", name)
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
    raise ValueError(f"unknown model {name!r}; allowed are: {ALLOWED_NAMES}")


def initialize(
    model: nn.Module,
    gamma: str = "uniform",
    beta: float = 0.0,
    features: str = "kaiming_normal",
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Draws every parameter of the model anew, in place, as in the paper's experiments, and returns
    the model.

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
                if module.weight is not None and gamma == "ones":
                    nn.init.ones_(module.weight)
                elif module.weight is not None:
                    low = 0.0 if gamma == "uniform" else -1.0
                    nn.init.uniform_(module.weight, low, 1.0, generator=generator)
                if module.bias is not None:
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
