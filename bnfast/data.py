"""Data sets by name, as (train, test) pairs of torch data sets, with the training preset that suits
each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset


@dataclass(frozen=True)
class DataSpec:
    """One row of the table of data sets.

    load(folder) returns (train, test), data sets of pairs (image float32 [in_channels, H, W]
    normalised, label int64). epochs, batch_size and lr are the preset for BatchNorm-only training
    on it. needs_folder: the files are the user's.
    """

    load: Callable[[Path | None], tuple[Dataset, Dataset]]
    num_classes: int
    in_channels: int
    epochs: int
    batch_size: int
    lr: float
    needs_folder: bool = False


def _digits(folder: Path | None) -> tuple[Dataset, Dataset]:
    """scikit-learn's bundled 8x8 digits, enlarged to 16x16: 1,437 for training and 360 for the
    test, the same ones always.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ValueError(
            "data 'digits' needs scikit-learn, which is not installed: pip install scikit-learn"
        ) from error
    digits = load_digits()
    train_x, test_x, train_y, test_y = train_test_split(
        digits.images, digits.target, test_size=0.2, stratify=digits.target, random_state=0
    )

    def to_images(pixels) -> torch.Tensor:
        images = torch.as_tensor(pixels, dtype=torch.float32).unsqueeze(1)
        return F.interpolate(images, size=(16, 16), mode="bilinear", align_corners=False)

    train_images, test_images = to_images(train_x), to_images(test_x)
    mean, std = train_images.mean(), train_images.std()
    return (
        TensorDataset((train_images - mean) / std, torch.as_tensor(train_y, dtype=torch.int64)),
        TensorDataset((test_images - mean) / std, torch.as_tensor(test_y, dtype=torch.int64)),
    )


def _fake(folder: Path | None) -> tuple[Dataset, Dataset]:
    """Random images with random labels, 3x16x16, 64 for training and 32 for the test, the same ones
    always: for tests.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> TensorDataset:
        images = torch.randn(count, 3, 16, 16, generator=generator)
        return TensorDataset(images, torch.randint(10, (count,), generator=generator))

    return draw(64), draw(32)


DATASETS: dict[str, DataSpec] = {
    "digits": DataSpec(_digits, num_classes=10, in_channels=1, epochs=20, batch_size=32, lr=0.3),
    "fake": DataSpec(_fake, num_classes=10, in_channels=3, epochs=1, batch_size=32, lr=0.1),
}


def spec(name: str) -> DataSpec:
    """The row of a data set. Raises ValueError for a name that is not in the table."""
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r} (--data); allowed are: {', '.join(DATASETS)}")
    return DATASETS[name]


def load(name: str, folder: str | Path | None = None) -> tuple[Dataset, Dataset]:
    """Loads a data set as (train, test).

    Each holds pairs (image float32 [C, H, W], label int64). folder: where the files of the data set
    are, for those that are not bundled; it must exist if given.

    Raises ValueError for an unknown data set or a folder that is needed and was not given,
    FileNotFoundError for a folder that does not exist.
    """
    row = spec(name)
    if folder is None and row.needs_folder:
        raise ValueError(f"data set {name!r} needs the folder of its files: --data-dir DIR")
    if folder is not None and not Path(folder).is_dir():
        raise FileNotFoundError(f"the data folder {str(folder)!r} (--data-dir) does not exist")
    return row.load(None if folder is None else Path(folder))
