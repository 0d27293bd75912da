"""Winograd's F(4x4, 3x3) for frozen weights: the transform that is taken once, and when the form is used.

A tile of 4 x 4 outputs is A^T [sum over channels of (G w G^T) * (B^T x B)] A (arXiv 1509.09308), with the points 0, 1, -1, 2,
-2 and infinity: 36 products in place of 144. The kernel is csrc/cpu/conv_winograd_kernels.h.
"""

import functools
import math
import os

import torch
import torch.nn.functional as F
from torch import Tensor

_G = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)
_LANES = 16
_MOST_WASTE = 2.0  # places that are computed over those that exist; the form is no gain beyond it
# BNFAST_WINOGRAD: "0" turns the form off, "1" uses it wherever it can be used. Read once: it is asked for at every call of a unit.
mode = os.environ.get("BNFAST_WINOGRAD", "")
if hasattr(torch._C, "_get_fp32_precision_getter"):  # the property below takes many times as long
    _conv_precision = functools.partial(torch._C._get_fp32_precision_getter, "mkldnn", "conv")
else:

    def _conv_precision() -> str | None:
        return getattr(getattr(torch.backends.mkldnn, "conv", None), "fp32_precision", None)


def transformed_weight(weight: Tensor) -> Tensor:
    """G w G^T of weight [K, C, 3, 3], taken in float64, as float32 [36, ceil(K / 16), C, 16] with zeros behind channel K."""
    points = torch.tensor(_G, dtype=torch.float64, device=weight.device)
    out_channels, channels = weight.shape[:2]
    blocks = math.ceil(out_channels / _LANES)
    result = torch.empty(36, blocks, channels, _LANES, device=weight.device)
    # Block by block: in float64 the whole would take eight times the weight.
    for block, part in enumerate(weight.split(_LANES)):
        wide = torch.einsum("ai,kcij,bj->abck", points, part.double(), points)
        result[:, block] = F.pad(wide.flatten(0, 1), (0, _LANES - part.shape[0]))
    return result


def is_forced() -> bool:
    """Whether BNFAST_WINOGRAD says what is to be done."""
    return mode in ("0", "1")


def can_serve(
    x: Tensor,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> bool:
    """Whether the form gives the convolution of x [N, C, H, W]: float32, 3x3 kernels, stride 1, one group. Not where PyTorch is told
    that convolutions are to be exact: torch.backends.mkldnn.conv.fp32_precision = "ieee", where it has that."""
    if (
        groups != 1
        or x.dtype != torch.float32
        or kernel != (3, 3)
        or tuple(stride) != (1, 1)
        or tuple(dilation) != (1, 1)
    ):
        return False
    # Spelled out, as it is asked for at every call of most units. Where nothing fits the stock convolution says what is wrong.
    (_, _, height, width), (top, left) = x.shape, padding
    if top < 0 or left < 0 or height + 2 * top < 3 or width + 2 * left < 3:
        return False
    return _conv_precision() != "ieee"


def serves(
    x: Tensor,
    kernel: tuple[int, ...],
    out_channels: int,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
    capability: str,
) -> bool:
    """Whether the convolution of x [N, C, H, W] with K = out_channels and 3x3 kernels runs in this form by the fixed rule.

    Where it can it pays from 16 channels on, where tiles are not mostly outside of the output, and with vectors of 256 bits or
    more. BNFAST_WINOGRAD=0 turns it off; BNFAST_WINOGRAD=1 uses it wherever it can be used.
    """
    if mode == "0" or not can_serve(x, kernel, stride, padding, dilation, groups):
        return False
    if mode == "1":
        return True
    (_, channels, height, width), (top, left) = x.shape, padding
    height, width = height + 2 * top - 2, width + 2 * left - 2
    waste = 16 * -(-height // 4) * -(-width // 4) / (height * width)
    return channels >= 16 <= out_channels and waste <= _MOST_WASTE and capability != "baseline"
