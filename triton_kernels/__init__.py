"""The Triton backend: the phases of `bnfast.reference` for GPUs, without a compiler on the machine.

bn_fwd.py, bn_bwd.py   the BatchNorm phases, kernel and launcher side by side
bn_reduce.py           ... those that reduce, in one kernel where a channel fits on chip
conv.py                the convolutions' phases, by cuDNN or by
conv_fwd.py, conv_bwd.py   ... the kernels that take the phases before and behind a convolution along
conv_depthwise.py      ... of depthwise convolutions
conv_gram.py           1x1 convolutions whose output never exists
activation.py          the pre-activation, the activations and bits, shared by forward and backward
layout.py, launch.py   views of tensors and their tiles; arguments and devices

On a machine without a GPU the kernels run in Triton's interpreter, on CPU tensors, where TRITON_INTERPRET=1 was set before
the import.
"""

from .bn_bwd import bn_bwd_apply, bn_bwd_apply_
from .bn_fwd import bn_fwd_apply, bn_fwd_apply_both
from .bn_reduce import (
    bn_bwd_reduce,
    bn_bwd_reduce_apply,
    bn_bwd_reduce_apply_,
    bn_fwd_reduce,
    bn_fwd_reduce_apply,
)
from .conv import (
    bn_bwd_apply_conv_dgrad_reduce,
    bn_bwd_mask,
    bn_bwd_reduce_apply_dgrad,
    bn_fwd_apply_conv_bwd_reduce,
    bn_fwd_apply_conv_fwd_apply,
    bn_fwd_apply_conv_fwd_reduce,
    bn_fwd_apply_gram_reduce,
    conv_dgrad,
    conv_forward,
    conv_fwd_apply,
    conv_fwd_reduce,
    conv_fwd_reduce_apply,
    fuses_chain,
    fuses_gram,
    joins_pool,
    joins_residual,
    joins_squeeze,
    joins_units,
    max_pool,
    max_pool_backward,
    max_pool_values,
    se_bwd_apply,
    se_bwd_reduce,
    se_fwd,
)

__all__ = [
    "bn_bwd_apply",
    "bn_bwd_apply_",
    "bn_bwd_apply_conv_dgrad_reduce",
    "bn_bwd_mask",
    "bn_bwd_reduce",
    "bn_bwd_reduce_apply",
    "bn_bwd_reduce_apply_",
    "bn_bwd_reduce_apply_dgrad",
    "bn_fwd_apply",
    "bn_fwd_apply_both",
    "bn_fwd_apply_conv_bwd_reduce",
    "bn_fwd_apply_conv_fwd_apply",
    "bn_fwd_apply_conv_fwd_reduce",
    "bn_fwd_apply_gram_reduce",
    "bn_fwd_reduce",
    "bn_fwd_reduce_apply",
    "conv_dgrad",
    "conv_forward",
    "conv_fwd_apply",
    "conv_fwd_reduce",
    "conv_fwd_reduce_apply",
    "fuses_chain",
    "fuses_gram",
    "joins_pool",
    "joins_residual",
    "joins_squeeze",
    "joins_units",
    "max_pool",
    "max_pool_backward",
    "max_pool_values",
    "se_bwd_apply",
    "se_bwd_reduce",
    "se_fwd",
]
