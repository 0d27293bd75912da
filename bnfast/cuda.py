"""The CUDA backend: the BatchNorm phases as compiled operators (csrc/cuda), between PyTorch's own convolutions.

Signatures and meanings: `reference`.
"""

from types import SimpleNamespace

import torch
from torch import Tensor

from . import native, reference
from .reference import accumulator

# What the kernels were compiled for, as in TORCH_CUDA_ARCH_LIST; empty where the build has none.
architectures = "" if native._C is None else native._C.cuda_architectures()


def why_unavailable() -> str | None:
    """The reason why the CUDA kernels cannot be used here; None where they can."""
    if native.unavailable is not None:
        return native.unavailable
    if not architectures:
        return "the extension bnfast._C was built without the CUDA kernels (no nvcc, or a torch without CUDA)"
    if not torch.cuda.is_available():
        return "PyTorch sees no GPU"
    return None


def input_gradient(
    dz: Tensor,
    weight: Tensor,
    input_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """conv_dgrad by PyTorch. Grouped convolutions on a GPU take its backward with one element in place of the input, of which only
    the shape is asked: the transposed convolution has no fast grouped form there."""
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


def phases(operators) -> SimpleNamespace:
    """The backend whose BatchNorm phases are `operators`, a namespace of torch.ops with the names of native.BN_PHASES."""
    bn = SimpleNamespace(**{name: getattr(operators, name).default for name in native.BN_PHASES})

    def conv_fwd_reduce(x, weight, bias, stride, padding, dilation, groups, *stats):
        """See reference.conv_fwd_reduce."""
        z = reference.conv_forward(x, weight, bias, stride, padding, dilation, groups)
        return z, *bn.bn_fwd_reduce(z, *stats)

    def conv_fwd_reduce_apply(x, weight, bias, stride, padding, dilation, groups, *rest):
        """See reference.conv_fwd_reduce_apply."""
        z = reference.conv_forward(x, weight, bias, stride, padding, dilation, groups)
        mean, rstd, y, bits = bn.bn_fwd_reduce_apply(z, *rest)
        return z, mean, rstd, y, bits

    def se_bwd_reduce(dy, z, mean, rstd, gamma, beta, act, slope):
        """See reference.se_bwd_reduce."""
        x = z
        if mean is not None:
            x, _ = bn.bn_fwd_apply(z, mean, rstd, gamma, beta, None, act, slope, False)
        acc = accumulator(z.dtype)
        return (dy.to(acc) * x.to(acc)).sum((2, 3))

    return SimpleNamespace(
        **vars(bn),
        conv_forward=reference.conv_forward,
        conv_fwd_reduce=conv_fwd_reduce,
        conv_fwd_reduce_apply=conv_fwd_reduce_apply,
        conv_dgrad=input_gradient,
        bn_bwd_reduce_apply_dgrad=reference.followed_by_dgrad(
            bn.bn_bwd_reduce_apply, bn.bn_bwd_reduce_apply_, input_gradient
        ),
        se_fwd=reference.se_fwd,
        se_bwd_reduce=se_bwd_reduce,
        se_bwd_apply=reference.se_bwd_apply,
    )
