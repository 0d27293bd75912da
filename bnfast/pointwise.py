"""1x1 convolutions of frozen weights as matrix products: the form of the weights, and when it is used.

The kernel is csrc/cpu/conv_pointwise_kernels.h. Its sums run over the input channels in their order.
"""

import math
import os

import torch
import torch.nn.functional as F
from torch import Tensor

_LANES = 16
# BNFAST_POINTWISE: "0" turns the form off, "1" uses it wherever it can be used. Read once.
mode = os.environ.get("BNFAST_POINTWISE", "")


def packed_weight(weight: Tensor) -> Tensor:
    """weight [K, C, 1, 1] as float32 [ceil(K / 16), C, 16], with zeros behind channel K."""
    out_channels, channels = weight.shape[:2]
    blocks = math.ceil(out_channels / _LANES)
    padded = F.pad(
        weight.reshape(out_channels, channels).float().t(), (0, blocks * _LANES - out_channels)
    )
    return padded.reshape(channels, blocks, _LANES).transpose(0, 1).contiguous()


def is_forced() -> bool:
    """Whether BNFAST_POINTWISE says what is to be done."""
    return mode in ("0", "1")


def can_serve(
    x: Tensor,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    groups: int,
) -> bool:
    """Whether the form gives the convolution of x: float32, 1x1 kernels, stride 1, no padding, one group."""
    return (
        groups == 1
        and x.dtype == torch.float32
        and kernel == (1, 1)
        and tuple(stride) == (1, 1)
        and not any(padding)
    )


def serves(
    x: Tensor,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    groups: int,
    capability: str,
) -> bool:
    """Whether the convolution of x [N, C, H, W], channels_last, runs in this form by the fixed rule.

    Where it can it pays with vectors of 256 bits or more, unless C is a multiple of 1,024: the pixels of a tile then lie in the
    same few places of the L1 cache. BNFAST_POINTWISE=0 turns it off, BNFAST_POINTWISE=1 uses it wherever it can be used.
    """
    if mode == "0" or not can_serve(x, kernel, stride, padding, groups):
        return False
    if mode == "1":
        return True
    return capability != "baseline" and x.shape[1] % 1024 != 0
