"""Depthwise convolutions of the CPU engine: the form of their frozen weights, and when they run as our own.

The kernel is csrc/cpu/conv_depthwise_kernels.h: direct, forward and data gradient alike, with the BatchNorm phases around it.
"""

import os

import torch
from torch import Tensor

from .reference import conv_output_size

_MOST_TAPS = 64  # of csrc/cpu/conv_depthwise.h
# BNFAST_DEPTHWISE: "0" keeps PyTorch's forward convolution. Read once.
mode = os.environ.get("BNFAST_DEPTHWISE", "")


def taps(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """weight [C, 1, KH, KW], rounded to the dtype of what it is multiplied with, as [KH, KW, C] in that dtype's accumulator."""
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    return weight[:, 0].permute(1, 2, 0).to(dtype).to(accumulator).contiguous()


def can_serve(weight: Tensor, groups: int) -> bool:
    """One input channel per output channel, and a kernel that ours takes."""
    return (
        weight.dim() == 4 and weight.shape[:2] == (groups, 1) and weight[0, 0].numel() <= _MOST_TAPS
    )


def serves(x: Tensor, weight: Tensor, stride, padding, dilation, groups: int) -> bool:
    """Whether the convolution of x [N, C, H, W], channels_last, runs as our own: where it can, unless BNFAST_DEPTHWISE=0. Its data
    gradient does wherever it can."""
    if mode == "0" or not can_serve(weight, groups):
        return False
    # Where nothing fits the stock convolution says what is wrong.
    return min(conv_output_size(x.shape[2:], weight, stride, padding, dilation)) > 0
