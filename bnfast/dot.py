"""Convolutions of bfloat16 as products of bfloat16 matrices: the form of the frozen weight, and when it is used.

The kernels are csrc/cpu/conv_dot_kernels.h; they need a processor that multiplies bfloat16, by vectors (AVX512_BF16) or by matrices (AMX).
Sums are float32, over the taps of the kernel and over pairs of channels.
"""

import math
import os

import torch
import torch.nn.functional as F
from torch import Tensor

_LANES = 16
# Fewest channels: of the convolution, and of the part of them that an instruction of AMX multiplies, which takes up to 32.
_FEWEST, _FEWEST_AT_ONCE, _MOST_AT_ONCE = 16, 16, 32
# BNFAST_DOT: "0" turns the form off, "1" uses it wherever it can be used. Read once.
mode = os.environ.get("BNFAST_DOT", "")


def packed_weight(weight: Tensor) -> Tensor:
    """weight [K, C, KH, KW] as bfloat16 [ceil(K / 16), KH, KW, C / 2, 16, 2], with zeros behind channel K; C is even."""
    out_channels, channels, height, width = weight.shape
    blocks = math.ceil(out_channels / _LANES)
    padded = F.pad(weight.bfloat16(), (0, 0, 0, 0, 0, 0, 0, blocks * _LANES - out_channels))
    parts = padded.reshape(blocks, _LANES, channels // 2, 2, height, width)
    return parts.permute(0, 4, 5, 2, 1, 3).contiguous()


def is_forced() -> bool:
    """Whether BNFAST_DOT says what is to be done."""
    return mode in ("0", "1")


def can_serve(x: Tensor, weight: Tensor, groups: int, capability: str) -> bool:
    """Whether the form gives a convolution of x [N, C, H, W] and its data gradient: bfloat16, two dimensions, one group, even numbers of
    channels, on a processor that multiplies bfloat16."""
    return (
        groups == 1
        and x.dtype == torch.bfloat16
        and weight.dim() == 4
        and capability in ("avx512_bf16", "amx")
        and weight.shape[0] % 2 == 0 == weight.shape[1] % 2
    )


def serves(x: Tensor, weight: Tensor, groups: int, capability: str) -> bool:
    """Whether the convolution of x, channels_last, runs in this form by the fixed rule: where it can, from 16 channels on, unless AMX could
    only take fewer than 16 at once. BNFAST_DOT=0 turns it off, BNFAST_DOT=1 uses it wherever it can be used."""
    if mode == "0" or not can_serve(x, weight, groups, capability):
        return False
    if mode == "1":
        return True
    return all(
        channels >= _FEWEST and (capability != "amx" or _at_once(channels) >= _FEWEST_AT_ONCE)
        for channels in weight.shape[:2]
    )


def _at_once(channels: int) -> int:
    """Channels that an instruction of AMX multiplies: the greatest even divisor up to 32."""
    return next(n for n in range(_MOST_AT_ONCE, 0, -2) if channels % n == 0)
