"""How a tensor lies in memory, and the tiles that kernels take from it.

A tensor is seen as a dense matrix [rows, columns] with columns next to each other in memory:
    rows are pixels, columns are channels    channels_last, and tensors without a spatial size
    rows are planes (n, c), columns pixels   contiguous (NCHW): the channel of row r is r % C
"""

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from .launch import TRITON_DTYPES

LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
# Elements of a tile: 32 per thread of 4 warps, which keeps 16-byte loads in flight without spilling.
TILE = 4096
REDUCED_TILE = 2048  # of a reduction, which also holds sums
WARPS = 4
# Programs that a reduction is split over at most: fixed, so that results do not depend on the device.
PROGRAMS = 1024
MOST_SPLITS = 128
# Values per channel of a split, at least: its partial results are then a thirtieth of what it reads, or less.
LEAST_VALUES = 128
# Elements of a channel slab that one program keeps in registers, over all tensors that it keeps: 32 per thread of 16 warps.
SLAB = 16384
# Channels of a tile at most, in channels_last. A reduction takes fewer, a line of 16-bit values: more blocks keep more of the
# machine busy where there are few pixels.
MOST_CHANNELS, MOST_REDUCED_CHANNELS = 128, 64


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. Triton's own costs a launcher as much as an allocation."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is not below n >= 1."""
    return 1 << (n - 1).bit_length()


class View(NamedTuple):
    """z as [rows, columns]; count is M, the number of values per channel."""

    rows: int
    columns: int
    channels: int
    channel_is_column: bool
    count: int

    @property
    def bit_bytes(self) -> int:
        """Bytes that hold one bit per element, each row beginning at a new byte."""
        return self.rows * cdiv(self.columns, 8)


def dense(t: Tensor) -> Tensor:
    """t in one of the two layouts, itself where it is in one already. Raises TypeError for a dtype that kernels do not take."""
    if t.dtype not in TRITON_DTYPES:
        raise TypeError(f"z is {t.dtype}; allowed are {', '.join(map(str, TRITON_DTYPES))}")
    if t.is_contiguous():
        return t
    last = LAST.get(t.dim())
    if last is not None and t.is_contiguous(memory_format=last):
        return t
    if t.dim() == 4:
        return t.contiguous(memory_format=torch._prims_common.suggest_memory_format(t))
    return t.contiguous()


def empty_last(t: Tensor, batch: int, channels: int, height: int, width: int) -> Tensor:
    """A new tensor [N, C, H, W] in channels_last, of the dtype and on the device of t."""
    row = width * channels
    return t.new_empty_strided((batch, channels, height, width), (height * row, 1, row, channels))


def like(t: Tensor, z: Tensor) -> Tensor:
    """t in the layout of z, which is dense."""
    if t.stride() == z.stride():
        return t
    return torch.empty_like(z, dtype=t.dtype).copy_(t)


def view_of(z: Tensor) -> View:
    """The view of a dense tensor [N, C, *]."""
    return _view(z.shape, z.is_contiguous())


@functools.lru_cache(4096)
def _view(shape: torch.Size, is_contiguous: bool) -> View:
    batch, channels, *sizes = shape
    plane = math.prod(sizes)
    if plane > 1 and is_contiguous:
        return View(batch * channels, plane, channels, False, batch * plane)
    return View(batch * plane, channels, channels, True, batch * plane)


def tile_of(view: View) -> tuple[int, int]:
    """(rows, columns) of a tile of at most TILE elements."""
    return _tile(view, TILE, MOST_CHANNELS)


@functools.lru_cache(4096)
def _tile(view: View, size: int, most_channels: int) -> tuple[int, int]:
    most = most_channels if view.channel_is_column else 1024
    columns = min(next_power_of_2(max(view.columns, 8)), most, size)
    return min(size // columns, next_power_of_2(max(view.rows, 1))), columns


class Split(NamedTuple):
    """How a reduction is cut: rows, columns of a tile; blocks of channels; splits, the programs that share a block; per_split,
    the tiles of each. Depends on the shape alone."""

    rows: int
    columns: int
    blocks: int
    splits: int
    per_split: int


def split_of(view: View) -> Split:
    """The cut of a reduction over each channel's values. A tile of planes holds pixels of several channels of one image."""
    tile = _tile(view, REDUCED_TILE, MOST_REDUCED_CHANNELS)
    return _split(view, tile, PROGRAMS, MOST_SPLITS, LEAST_VALUES)


@functools.lru_cache(4096)
def _split(
    view: View, tile: tuple[int, int], programs: int, most_splits: int, least_values: int
) -> Split:
    rows, columns = tile
    if view.channel_is_column:
        blocks = cdiv(view.channels, columns)
        tiles = cdiv(view.rows, rows)
    else:
        rows = min(rows, next_power_of_2(view.channels))
        blocks = cdiv(view.channels, rows)
        tiles = view.rows // view.channels * cdiv(view.columns, columns)
    wanted = max(1, min(most_splits, programs // blocks, tiles, view.count // least_values))
    per_split = cdiv(tiles, wanted)
    return Split(rows, columns, blocks, cdiv(tiles, per_split), per_split)


class Slab(NamedTuple):
    """All values of some channels as one tile [rows, columns]: of channels_last, pixels and channels; of planes, the images and the
    pixels of one channel. blocks: how many there are; warps: of the program that holds one."""

    rows: int
    columns: int
    blocks: int
    warps: int


def slab_of(view: View, element_size: int, tensors: int) -> Slab | None:
    """The slab of a kernel that keeps so many tensors of a channel from its reduction to its end; None where it does not fit, and
    where there is nothing. Of channels_last, a sector of 32 bytes of channels, or half of one where only that fits."""
    return _slab(view, element_size, tensors, SLAB)


@functools.lru_cache(4096)
def _slab(view: View, element_size: int, tensors: int, most: int) -> Slab | None:
    if not view.rows * view.columns:
        return None
    if view.channel_is_column:
        rows = next_power_of_2(view.rows)
        columns = max(8, 32 // element_size)
        if tensors * rows * columns > most:
            columns = 8
        blocks = cdiv(view.channels, columns)
    else:
        rows = next_power_of_2(view.rows // view.channels)
        columns = next_power_of_2(max(view.columns, 8))
        blocks = view.channels
    if tensors * rows * columns > most:
        return None
    return Slab(rows, columns, blocks, max(WARPS, rows * columns * tensors // 1024))


def is_wide(view: View) -> bool:
    """Whether offsets need 64 bits. Half of what 32 hold: the last split's tiles reach past the tensor by less than its size."""
    return view.rows * view.columns >= 2**30
