"""conv_fwd_reduce and conv_dgrad of the Triton backend: PyTorch's convolution (cuDNN), then the BatchNorm phases."""

import torch
from torch import Tensor

from bnfast import reference
from bnfast.reference import accumulator, conv_forward, se_bwd_apply, se_fwd

from .bn_fwd import bn_fwd_apply, bn_fwd_reduce, bn_fwd_reduce_apply

__all__ = [
    "conv_dgrad",
    "conv_forward",
    "conv_fwd_reduce",
    "conv_fwd_reduce_apply",
    "se_bwd_apply",
    "se_bwd_reduce",
    "se_fwd",
]


def conv_fwd_reduce(x, weight, bias, stride, padding, dilation, groups, *stats):
    """See reference.conv_fwd_reduce."""
    z = conv_forward(x, weight, bias, stride, padding, dilation, groups)
    return z, *bn_fwd_reduce(z, *stats)


def conv_fwd_reduce_apply(x, weight, bias, stride, padding, dilation, groups, *rest):
    """See reference.conv_fwd_reduce_apply."""
    z = conv_forward(x, weight, bias, stride, padding, dilation, groups)
    return z, *bn_fwd_reduce_apply(z, *rest)


def conv_dgrad(
    dz: Tensor,
    weight: Tensor,
    input_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """See reference.conv_dgrad. Grouped convolutions take PyTorch's own backward with one element in place of the input, of
    which only the shape is asked: the transposed convolution has no fast grouped form on GPUs."""
    if groups == 1 or not dz.is_cuda:
        return reference.conv_dgrad(dz, weight, input_size, stride, padding, dilation, groups)
    x = dz.new_empty(1).expand(dz.shape[0], weight.shape[1] * groups, *input_size)
    return torch.ops.aten.convolution_backward(
        dz,
        x,
        weight.to(dz.dtype),
        None,
        stride,
        padding,
        dilation,
        False,
        [0] * len(stride),
        groups,
        [True, False, False],
    )[0]


def se_bwd_reduce(dy, z, mean, rstd, gamma, beta, act, slope):
    """See reference.se_bwd_reduce."""
    x = z if mean is None else bn_fwd_apply(z, mean, rstd, gamma, beta, None, act, slope, False)[0]
    acc = accumulator(z.dtype)
    return (dy.to(acc) * x.to(acc)).sum((2, 3))
