"""The CUDA backend: the BatchNorm phases as compiled operators (csrc/cuda), between PyTorch's own convolutions.

Signatures and meanings: `reference`.
"""

import importlib.util
import os
import re
import shutil
import subprocess
from types import SimpleNamespace

import torch
from torch import Tensor

from . import native, reference
from .reference import accumulator

# What the kernels were compiled for, as in TORCH_CUDA_ARCH_LIST; empty where the build has none.
architectures = "" if native._C is None else native._C.cuda_architectures()

# The type of the devices whose tensors the kernels take; the tests' emulator takes those of the CPU.
device_type = "cuda"


def why_unavailable() -> str | None:
    """The reason why the CUDA kernels cannot be used here; None where they can."""
    if native.unavailable is not None:
        return native.unavailable
    if device_type == "cuda" and not architectures:
        return "the extension bnfast._C was built without the CUDA kernels (no nvcc, or a torch without CUDA)"
    if device_type == "cuda" and not torch.cuda.is_available():
        return "PyTorch sees no GPU"
    return None


def find_tool(name: str) -> str | None:
    """The path of a program of the CUDA toolkit: of the one on PATH, or of those that Triton carries."""
    places = [name, os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", name)]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin:
        folder = os.path.dirname(triton.origin)
        places.append(os.path.join(folder, "backends", "nvidia", "bin", name))
    return next(filter(None, map(shutil.which, places)), None)


def architectures_inside() -> str | None:
    """The architectures whose code the extension holds, as cuobjdump lists them: "sm_80, sm_90, PTX for sm_90". None where that
    program is missing, or finds nothing."""
    tool = find_tool("cuobjdump")
    if tool is None or native._C is None:
        return None
    found = []
    for option, kind in (("--list-elf", ""), ("--list-ptx", "PTX for ")):
        command = [tool, option, native._C.__file__]
        listing = subprocess.run(command, capture_output=True, text=True).stdout
        names = set(re.findall(r"\.(sm_\w+)\.(?:cubin|ptx)", listing))
        found += [kind + name for name in sorted(names, key=lambda n: int(re.sub(r"\D", "", n)))]
    return ", ".join(found) or None


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
        conv_fwd_apply=reference.followed_by_apply(reference.conv_forward, bn.bn_fwd_apply),
        conv_fwd_reduce=conv_fwd_reduce,
        conv_fwd_reduce_apply=conv_fwd_reduce_apply,
        conv_dgrad=input_gradient,
        bn_bwd_reduce_apply_dgrad=reference.followed_by_dgrad(
            bn.bn_bwd_reduce_apply, bn.bn_bwd_reduce_apply_, input_gradient
        ),
        joins_units=reference.joins_units,
        fuses_chain=reference.fuses_chain,
        fuses_gram=reference.fuses_gram,
        joins_pool=reference.joins_pool,
        joins_residual=reference.joins_residual,
        joins_squeeze=reference.joins_squeeze,
        max_pool=reference.max_pool,
        max_pool_values=reference.max_pool_values,
        max_pool_backward=reference.max_pool_backward,
        se_fwd=reference.se_fwd,
        se_bwd_reduce=se_bwd_reduce,
        se_bwd_apply=reference.se_bwd_apply,
    )
