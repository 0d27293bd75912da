"""1x1 convolutions of frozen weights as matrix products: the form of the weights, and when it is used.

The kernel is csrc/cpu/conv_pointwise_kernels.h. Its sums run over the input channels in their order.
"""

import math
import os

import torch
import torch.nn.functional as F
from torch import Tensor

_LANES = 16


def packed_weight(weight: Tensor) -> Tensor:
    """weight [K, C, 1, 1] as float32 [ceil(K / 16), C, 16], with zeros behind channel K."""
    out_channels, channels = weight.shape[:2]
    blocks = math.ceil(out_channels / _LANES)
    padded = F.pad(
        weight.reshape(out_channels, channels).float().t(), (0, blocks * _LANES - out_channels)
    )
    return padded.reshape(channels, blocks, _LANES).transpose(0, 1).contiguous()


def serves(
    x: Tensor,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    groups: int,
    capability: str,
) -> bool:
    """Whether the convolution of x [N, C, H, W], channels_last, runs in this form.

    It can in float32 with 1x1 kernels, stride 1 and no padding. It pays with vectors of 256 bits or more, unless C is a
    multiple of 1,024: the pixels of a tile then lie in the same few places of the L1 cache. BNFAST_POINTWISE=0 turns it off,
    BNFAST_POINTWISE=1 uses it wherever it can be used.
    """
    if (
        groups != 1
        or x.dtype != torch.float32
        or tuple(kernel) != (1, 1)
        or tuple(stride) != (1, 1)
        or any(padding)
    ):
        return False
    mode = os.environ.get("BNFAST_POINTWISE", "")
    pays = capability != "baseline" and x.shape[1] % 1024 != 0
    return mode != "0" and (mode == "1" or pays)
