"""Winograd's form for frozen 3x3 weights, and for the strided stems of networks: the transform that is taken once, and when the form is used.

A tile of outputs is A^T [sum over channels of (G w G^T) * (B^T x B)] A (arXiv 1509.09308). Stride 1: F(4x4, 3x3) with the points
0, 1, -1, 2, -2 and infinity, 36 products in place of 144, or F(6x6, 3x3) with 1/2 and -1/2 beside them, 64 in place of 324. Stride 2:
the two outer taps through 0, 1, -1, 2 and infinity, the middle one directly, 81 products in place of 144 (csrc/cpu/conv_winograd.h).
The kernels are in csrc/cpu/conv_winograd_kernels.h.

A larger kernel of stride 2 over few channels, as the 7x7 stem of ResNet and DenseNet: x as blocks of 2 x 2 places is an image with four times the
channels, over which the kernel moves by one block and has at most 4 x 4 taps: F(5x5, 4x4), 64 products per channel of a block in place of 400.
"""

import functools
import itertools
import math
import os
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# By the stride and the outputs of a tile along a side.
_G = {
    (1, 4): (
        (1 / 4, 0, 0),
        (-1 / 6, -1 / 6, -1 / 6),
        (-1 / 6, 1 / 6, -1 / 6),
        (1 / 24, 1 / 12, 1 / 6),
        (1 / 24, -1 / 12, 1 / 6),
        (0, 0, 1),
    ),
    (1, 6): (
        (-1, 0, 0),
        (-2 / 9, -2 / 9, -2 / 9),
        (-2 / 9, 2 / 9, -2 / 9),
        (1 / 90, 1 / 45, 2 / 45),
        (1 / 90, -1 / 45, 2 / 45),
        (32 / 45, 16 / 45, 8 / 45),
        (32 / 45, -16 / 45, 8 / 45),
        (0, 0, 1),
    ),
    # 4 taps, over blocks.
    (2, 5): (
        (-1, 0, 0, 0),
        (-2 / 9, -2 / 9, -2 / 9, -2 / 9),
        (-2 / 9, 2 / 9, -2 / 9, 2 / 9),
        (1 / 90, 1 / 45, 2 / 45, 4 / 45),
        (1 / 90, -1 / 45, 2 / 45, -4 / 45),
        (32 / 45, 16 / 45, 8 / 45, 4 / 45),
        (32 / 45, -16 / 45, 8 / 45, -4 / 45),
        (0, 0, 0, 1),
    ),
    (2, 4): (
        (1 / 2, 0, 0),
        (-1 / 2, 0, -1 / 2),
        (-1 / 6, 0, 1 / 6),
        (1 / 6, 0, 1 / 3),
        (0, 0, 1),
        (0, 1, 0),
    ),
}
_LANES = 16
# Products per output and pair of channels, of 9 in the direct form, by the stride; this form is no gain beyond it.
_MOST_PRODUCTS = {1: 4.5, 2: 5.5}
# Tiles of 6 x 6 outputs take fewer products and 64 values of each weight in place of 36: they pay where that saves so much of the products,
# these are most of the work, and what a unit of tiles reads and writes still stays in the cache. Weights, and places of the output. From 256 x
# 256 channels on the kept weights would be felt: 93 MB of a ResNet-50.
_LEAST_SAVED, _WIDE_WEIGHTS, _MOST_WIDE_PLACES = 0.1, range(128 * 128, 256 * 256), 32 * 32
# In bfloat16 by the capability. The form is computed in float32; where bfloat16 is multiplied, twice as fast by vectors and many times by
# matrices, `dot` is the other way.
_MOST_PRODUCTS_BF16 = {"avx512_bf16": {1: 3.15, 2: 0.0}, "amx": {1: 0.0, 2: 0.0}}
# BNFAST_WINOGRAD: "0" turns the form off, "1" uses it wherever it can be used. Read once: it is asked for at every call of a unit.
mode = os.environ.get("BNFAST_WINOGRAD", "")
# BNFAST_WINOGRAD_TILE: "4" or "6", the outputs of a tile along a side wherever both can be had.
tile_mode = os.environ.get("BNFAST_WINOGRAD_TILE", "")
if hasattr(torch._C, "_get_fp32_precision_getter"):  # the property below takes many times as long
    conv_precision = functools.partial(torch._C._get_fp32_precision_getter, "mkldnn", "conv")
else:

    def conv_precision() -> str | None:
        """What PyTorch is told of float32 convolutions on the CPU."""
        return getattr(getattr(torch.backends.mkldnn, "conv", None), "fp32_precision", None)


def transformed_weight(weight: Tensor, stride: int = 1, tile: int = 4) -> Tensor:
    """G w G^T of weight [K, C, 3, 3] for tiles of tile x tile outputs (6: stride 1 alone; 5: [K, C, 4, 4], of `block_weight`), taken in
    float64, as float32 [36 (tiles 5 and 6: 64), ceil(K / 16), C, 16] with zeros behind channel K."""
    points = torch.tensor(_G[stride, tile], dtype=torch.float64, device=weight.device)
    out_channels, channels = weight.shape[:2]
    blocks = math.ceil(out_channels / _LANES)
    result = torch.empty(len(points) ** 2, blocks, channels, _LANES, device=weight.device)
    # Block by block: in float64 the whole would take eight times the weight.
    for block, part in enumerate(weight.split(_LANES)):
        wide = torch.einsum("ai,kcij,bj->abck", points, part.double(), points)
        result[:, block] = F.pad(wide.flatten(0, 1), (0, _LANES - part.shape[0]))
    return result


def block_weight(weight: Tensor, padding: Sequence[int]) -> Tensor:
    """The kernel [K, C, KH, KW] of a convolution of stride 2 as one over blocks of 2 x 2 places, [K, 4 C, 4, 4]: channels are those of a block's
    places, the upper two first."""
    out_channels, channels, *kernel = weight.shape
    blocks = weight.new_zeros(out_channels, 2, 2, channels, 4, 4)
    for i, j in itertools.product(*map(range, kernel)):
        (down, lower), (across, right) = (
            divmod(k - p + 2 * -(-p // 2), 2) for k, p in zip((i, j), padding, strict=True)
        )
        blocks[:, lower, right, :, down, across] = weight[:, :, i, j]
    return blocks.flatten(1, 3)


def can_serve_blocks(
    x: Tensor,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> bool:
    """Whether F(5x5, 4x4) over blocks of x [N, C, H, W] gives the convolution: float32, stride 2, kernels beyond 3x3 that reach over at most 4
    blocks."""
    return (
        x.dtype == torch.float32
        and groups == 1
        and max(kernel) > 3
        and tuple(stride) == (2, 2)
        and tuple(dilation) == (1, 1)
        and min(padding) >= 0
        and conv_precision() != "ieee"
        and all((k - 1 - p) // 2 - -p // 2 < 4 for k, p in zip(kernel, padding, strict=True))
        and all(n + 2 * p >= k for n, k, p in zip(x.shape[2:], kernel, padding, strict=True))
    )


def serves_blocks(
    x: Tensor,
    kernel: tuple[int, ...],
    out_channels: int,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
    capability: str,
) -> bool:
    """Whether the convolution of x [N, C, H, W] with K = out_channels runs in this form by the fixed rule: where the channels of a block fill at
    most one vector, and at most half of the products are left. BNFAST_WINOGRAD as for 3x3 kernels."""
    if mode == "0" or not can_serve_blocks(x, kernel, stride, padding, dilation, groups):
        return False
    if mode == "1":
        return True
    if 4 * x.shape[1] > _LANES or out_channels < _LANES or capability == "baseline":
        return False
    outputs = output_size(x.shape[2:], stride, padding, kernel)
    products = 4 * math.prod(8 * math.ceil(n / 5) for n in outputs)
    return 2 * products <= math.prod(kernel) * math.prod(outputs)


def tile(
    dtype: torch.dtype,
    channels: int,
    out_channels: int,
    output: Sequence[int],
    stride: int,
) -> int:
    """Outputs of a tile along a side, 4 or 6, for a convolution of C = channels to K = out_channels that makes planes of (OH, OW). 6 for
    float32 and stride 1 alone, there by BNFAST_WINOGRAD_TILE or the fixed rule."""
    if stride != 1 or dtype != torch.float32 or tile_mode == "4":
        return 4
    if tile_mode == "6":
        return 6
    if channels * out_channels not in _WIDE_WEIGHTS or math.prod(output) > _MOST_WIDE_PLACES:
        return 4
    products = {t: math.prod(_products_of_side(n, stride, t) for n in output) for t in (4, 6)}
    return 6 if products[6] <= (1 - _LEAST_SAVED) * products[4] else 4


def is_forced() -> bool:
    """Whether BNFAST_WINOGRAD says what is to be done."""
    return mode in ("0", "1")


def output_size(
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    kernel: Sequence[int] = (3, 3),
) -> list[int]:
    """[OH, OW] of a convolution of a plane (H, W)."""
    sides = zip(size, stride, padding, kernel, strict=True)
    return [(n + 2 * p - k) // s + 1 for n, s, p, k in sides]


def can_serve(
    x: Tensor,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> bool:
    """Whether the form gives the convolution of x [N, C, H, W]: float32 or bfloat16, 3x3 kernels, stride 1 or 2, one group. Not where
    PyTorch is told that float32 convolutions are to be exact: torch.backends.mkldnn.conv.fp32_precision = "ieee", where it has that."""
    # Spelled out, as it is asked for at every call of most units. Where nothing fits the stock convolution says what is wrong.
    if not can_serve_dgrad(x, kernel, stride, padding, dilation, groups):
        return False
    (_, _, height, width), (top, left) = x.shape, padding
    return height + 2 * top >= 3 and width + 2 * left >= 3


def can_serve_dgrad(
    dz: Tensor,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> bool:
    """As can_serve, of the data gradient for dz [N, K, OH, OW]."""
    if groups != 1 or kernel != (3, 3) or tuple(dilation) != (1, 1):
        return False
    if tuple(stride) not in ((1, 1), (2, 2)) or min(padding) < 0:
        return False
    return dz.dtype == torch.bfloat16 or (dz.dtype == torch.float32 and conv_precision() != "ieee")


def serves(
    x: Tensor,
    kernel: tuple[int, ...],
    out_channels: int,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
    capability: str,
) -> bool:
    """Whether the convolution of x [N, C, H, W] with K = out_channels and 3x3 kernels runs in this form by the fixed rule.

    Where it can it pays from 16 channels on, where the output is not too small to save products, and with vectors of 256 bits or
    more; in bfloat16 where the processor does not multiply that so much faster. BNFAST_WINOGRAD=0 turns it off; BNFAST_WINOGRAD=1 uses it wherever it can be used.
    """
    if mode == "0" or not can_serve(x, kernel, stride, padding, dilation, groups):
        return False
    if mode == "1":
        return True
    (_, channels, height, width), (top, left), step = x.shape, padding, stride[0]
    height, width = (height + 2 * top - 3) // step + 1, (width + 2 * left - 3) // step + 1
    return _pays(x.dtype, channels, out_channels, height, width, step, capability)


def serves_dgrad(
    dz: Tensor,
    kernel: tuple[int, ...],
    in_channels: int,
    input_size: Sequence[int],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
    capability: str,
) -> bool:
    """As serves, of the data gradient [N, C, *input_size] for dz [N, K, OH, OW]."""
    if mode == "0" or not can_serve_dgrad(dz, kernel, stride, padding, dilation, groups):
        return False
    if mode == "1":
        return True
    # A tile of stride 2 has 4 x 4 places of dz.
    height, width = input_size if stride[0] == 1 else dz.shape[2:]
    return _pays(dz.dtype, dz.shape[1], in_channels, height, width, stride[0], capability)


def _pays(
    dtype: torch.dtype,
    channels: int,
    out_channels: int,
    height: int,
    width: int,
    stride: int,
    capability: str,
) -> bool:
    products = _products_of_side(height, stride) * _products_of_side(width, stride)
    most = _MOST_PRODUCTS
    if dtype == torch.bfloat16:
        most = _MOST_PRODUCTS_BF16.get(capability, most)
    few = products <= most[stride] * height * width
    return few and channels >= 16 <= out_channels and capability != "baseline"


def _products_of_side(outputs: int, stride: int, tile: int = 4) -> int:
    """Of whole tiles and a shorter one; of 6 outputs 5 are taken as 6."""
    tiles, rest = divmod(outputs, tile)
    if stride == 1:
        return (tile + 2) * tiles + (8 if rest == 5 else rest + 2 if rest else 0)
    return 9 * tiles + (2 * rest + 1 if rest else 0)
