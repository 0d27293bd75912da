"""PyTorch's own convolutions (oneDNN) with the frozen weight kept in the blocked form that oneDNN computes with.

torch.convolution brings its weight into that form at each call; the operators used here, which PyTorch's compiler uses for
frozen models, take it ready. The results are the same bits.
"""

import torch
from torch import Tensor

_has_operators = torch.backends.mkldnn.is_available() and all(
    hasattr(torch.ops.mkldnn, name)
    for name in ("_convolution_pointwise", "_reorder_convolution_weight")
)


def _supported_dtypes() -> frozenset[torch.dtype]:
    if not _has_operators:
        return frozenset()
    found = {torch.float32}
    for dtype, question in (
        (torch.bfloat16, "_is_mkldnn_bf16_supported"),
        (torch.float16, "_is_mkldnn_fp16_supported"),
    ):
        if hasattr(torch.ops.mkldnn, question) and getattr(torch.ops.mkldnn, question)():
            found.add(dtype)
    return frozenset(found)


_dtypes = _supported_dtypes()


def serves(x: Tensor) -> bool:
    """Whether a convolution of x [N, C, H, W], channels_last, can take its weight in the blocked form."""
    return x.dtype in _dtypes and x.dim() == 4 and x.numel() > 0 and torch._C._get_mkldnn_enabled()


def pack(weight: Tensor, x: Tensor, stride, padding, dilation, groups) -> Tensor:
    """weight, in the dtype of x, in the form that fits x best; any other x of its dtype can be computed with it too."""
    return torch.ops.mkldnn._reorder_convolution_weight.default(
        weight, padding, stride, dilation, groups, list(x.shape)
    )


def convolve(x: Tensor, packed: Tensor, bias: Tensor | None, stride, padding, dilation, groups):
    """The convolution of x with a packed weight; bias in the dtype of x."""
    return torch.ops.mkldnn._convolution_pointwise.default(
        x, packed, bias, padding, stride, dilation, groups, "none", [], ""
    )
