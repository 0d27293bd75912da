"""Depthwise convolutions and those of narrow groups in the CPU engine: the form of their frozen weights, and when they run as our own.

The kernel is csrc/cpu/conv_grouped_kernels.h: direct, forward and data gradient alike, with the BatchNorm phases around it.
"""

import os

import torch
from torch import Tensor

from .reference import conv_output_size

_MOST_TAPS = 64  # of csrc/cpu/conv_grouped.h
_WIDTHS = (1, 2, 4, 8, 16)  # channels of a group
# In bfloat16, which is computed in float32: where the processor multiplies it itself wider groups are no gain.
_multiplies_bf16 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
_WIDTHS_BF16 = _WIDTHS[:3] if _multiplies_bf16 else _WIDTHS
# BNFAST_GROUPED: "0" keeps PyTorch's convolutions, but for data gradients of depthwise ones. Read once.
mode = os.environ.get("BNFAST_GROUPED", "")


def taps(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """weight [C, C / groups, KH, KW], rounded to the dtype of what it is multiplied with, as [KH, KW, C / groups, C] in that dtype's
    accumulator."""
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    return weight.permute(2, 3, 1, 0).to(dtype).to(accumulator).contiguous()


def taps_of_dgrad(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """As taps, with the channels of each group exchanged."""
    width = weight.shape[1]
    groups = weight.unflatten(0, (-1, width)).transpose(1, 2)
    return taps(groups.flatten(0, 1), dtype)


def can_serve(weight: Tensor, groups: int, dtype: torch.dtype) -> bool:
    """For an input of this dtype: as many output channels as input channels, groups that ours takes, and a kernel that it takes."""
    return (
        weight.dim() == 4
        and weight.shape[1] in (_WIDTHS_BF16 if dtype == torch.bfloat16 else _WIDTHS)
        and weight.shape[0] == groups * weight.shape[1]
        and weight[0, 0].numel() <= _MOST_TAPS
        and (weight.shape[1] == 1 or dtype in (torch.float32, torch.bfloat16))
    )


def serves_dgrad(dz: Tensor, weight: Tensor, groups: int, capability: str) -> bool:
    """Whether the data gradient for dz, channels_last, runs as our own: depthwise wherever it can, groups with vectors of 256 bits or more."""
    return can_serve(weight, groups, dz.dtype) and (
        weight.shape[1] == 1 or (capability != "baseline" and mode != "0")
    )


def serves(
    x: Tensor, weight: Tensor, stride, padding, dilation, groups: int, capability: str
) -> bool:
    """Whether the convolution of x [N, C, H, W], channels_last, runs as our own: as serves_dgrad, unless BNFAST_GROUPED=0."""
    if mode == "0" or not serves_dgrad(x, weight, groups, capability):
        return False
    # Where nothing fits the stock convolution says what is wrong.
    return min(conv_output_size(x.shape[2:], weight, stride, padding, dilation)) > 0
