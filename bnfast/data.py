"""Data sets by name, as two splits (training, test) that give batches.

A split that fits into memory is a tensor, and batches are augmented as a whole; one of image files goes through
torchvision's transforms image by image. Either way what an image looks like depends on the augmentation seed, the epoch and the
image alone: not on the number of worker processes or ranks, nor on where training was interrupted.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

# Of ImageNet; the paper's code takes them for CIFAR too.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

FASHION_FOLDERS = ("data/FashionMNIST/raw", "/usr/share/datasets/fashion-mnist")
_FASHION_FILES = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
_BITS_OF_SEED = 63


@dataclass(frozen=True)
class Augmentation:
    """What happens to images of the training split: flip says whether half of them are mirrored.

    crop_padding: zeros around the image before a crop of its own size, for data in memory. image_size, crop_scale and
    crop_ratio: a crop of a random part and shape, resized, for image files; resize_size: what their test images are
    resized to before the crop in the centre.
    """

    flip: bool = False
    crop_padding: int = 0
    image_size: int = 224
    resize_size: int = 256
    crop_scale: tuple[float, float] = (0.1, 1.0)
    crop_ratio: tuple[float, float] = (0.8, 1.25)


@dataclass(frozen=True)
class Place:
    """Where batches go, and which part of each: the images at rank, rank + ranks, ... of a batch."""

    device: str = "cpu"
    memory_format: torch.memory_format = torch.channels_last
    workers: int = 0
    rank: int = 0
    ranks: int = 1

    def put(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        images = images.to(self.device, memory_format=self.memory_format, non_blocking=True)
        return images, labels.to(self.device, non_blocking=True)


@dataclass(frozen=True)
class TensorSplit:
    """Images [N, C, H, W] in memory, uint8 or float32, with labels int64 [N].

    A pixel is divided by `scale`, then mean and std [C] are applied.
    """

    images: Tensor
    labels: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: float = 255.0
    augmentation: Augmentation | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def batches(
        self, order: Sequence[Tensor], place: Place, seed: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """One (images float32, labels) per index tensor of `order`; augmented where a seed is given.

        The seed must differ from epoch to epoch.
        """
        for index in order:
            part = slice(place.rank, None, place.ranks)
            images = self.images[index[part]]
            if seed is not None and self.augmentation is not None:
                generator = torch.Generator().manual_seed(mixed_seed(seed, *index[:1].tolist()))
                images = _crop_and_flip(images, len(index), part, self.augmentation, generator)
            mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (self.mean, self.std))
            images = (images.float() / self.scale - mean) / std
            yield place.put(images, self.labels[index[part]])


def _crop_and_flip(
    images: Tensor, count: int, part: slice, how: Augmentation, generator: torch.Generator
) -> Tensor:
    """Images [B, C, H, W] of one part of a batch of `count`: the draws are those of the whole batch."""
    pad = how.crop_padding
    draws = [torch.randint(2 * pad + 1, (count,), generator=generator)[part] for _ in range(2)]
    mirrored = (torch.rand(count, generator=generator) < 0.5)[part] & how.flip
    height, width = images.shape[2:]
    images = F.pad(images, (pad, pad, pad, pad))
    columns = torch.arange(width)
    columns = torch.where(mirrored[:, None], columns.flip(0), columns) + draws[0][:, None]
    rows = torch.arange(height) + draws[1][:, None]
    image = torch.arange(len(images))[:, None, None, None]
    channel = torch.arange(images.shape[1])[None, :, None, None]
    return images[image, channel, rows[:, None, :, None], columns[:, None, None, :]]


@dataclass(frozen=True)
class FileSplit:
    """Image files, through torchvision's ImageFolder: decoded, transformed and batched as they are needed."""

    files: Dataset
    labels: Tensor
    augmentation: Augmentation
    is_test: bool

    def __len__(self) -> int:
        return len(self.files)

    def batches(
        self, order: Sequence[Tensor], place: Place, seed: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """As :meth:`TensorSplit.batches`; images are float32 [B, 3, image_size, image_size]."""
        how = self.augmentation
        images = _Transformed(self.files, _transform(how, seed is not None), seed)
        parts = [index[place.rank :: place.ranks].tolist() for index in order]
        size = (0, 3, how.image_size, how.image_size)
        loader = DataLoader(
            images,
            batch_sampler=[part for part in parts if part],
            num_workers=place.workers,
            pin_memory=place.device.startswith("cuda"),
            # Without a generator of its own the loader would advance torch's global one.
            generator=torch.Generator().manual_seed(0),
        )
        loaded = iter(loader)
        for part in parts:
            empty = [torch.empty(size), torch.empty(0, dtype=torch.int64)]
            yield place.put(*(next(loaded) if part else empty))


class _Transformed(Dataset):
    """Images through a transform whose random numbers depend on seed and image alone."""

    def __init__(self, files: Dataset, transform: Callable, seed: int | None) -> None:
        self.files = files
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.files[index]
        with torch.random.fork_rng(devices=[]):
            if self.seed is not None:
                torch.manual_seed(mixed_seed(self.seed, index))
            return self.transform(image), label


def _transform(how: Augmentation, is_training: bool) -> Callable:
    from torchvision.transforms import v2

    if is_training:
        shape = [v2.RandomResizedCrop(how.image_size, how.crop_scale, how.crop_ratio)]
        shape += [v2.RandomHorizontalFlip()] if how.flip else []
    else:
        shape = [v2.Resize(how.resize_size), v2.CenterCrop(how.image_size)]
    to_float = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    return v2.Compose([*shape, *to_float])


def mixed_seed(*parts: int) -> int:
    """One seed of several numbers: other numbers, or their order, give an unrelated one."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> (64 - _BITS_OF_SEED)


def shuffled(count: int, batch_size: int, seed: int) -> list[Tensor]:
    """The batches of an epoch as index tensors; the last one may be smaller."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return list(order.split(batch_size))


def in_order(count: int, batch_size: int) -> list[Tensor]:
    """The same without shuffling."""
    return list(torch.arange(count).split(batch_size))


@dataclass(frozen=True)
class Data:
    """A data set: training and test split, number of classes and of channels."""

    train: TensorSplit | FileSplit
    test: TensorSplit | FileSplit
    num_classes: int
    in_channels: int


def _digits(folder: Path | None, download: bool, how: Augmentation) -> Data:
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

    def to_images(pixels) -> Tensor:
        images = torch.as_tensor(pixels, dtype=torch.float32).unsqueeze(1)
        return F.interpolate(images, size=(16, 16), mode="bilinear", align_corners=False)

    train_images, test_images = to_images(train_x), to_images(test_x)
    norm = ((train_images.mean().item(),), (train_images.std().item(),), 1.0)
    labels = (torch.as_tensor(y, dtype=torch.int64) for y in (train_y, test_y))
    train, test = (
        TensorSplit(images, y, *norm)
        for images, y in zip((train_images, test_images), labels, strict=True)
    )
    return Data(_augmented(train, how), test, 10, 1)


def _fake(folder: Path | None, download: bool, how: Augmentation) -> Data:
    """Random images with random labels, 3x16x16, 64 for training and 32 for the test, the same ones
    always: for tests.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> TensorSplit:
        images = torch.randn(count, 3, 16, 16, generator=generator)
        labels = torch.randint(10, (count,), generator=generator)
        return TensorSplit(images, labels, (0.0,) * 3, (1.0,) * 3, 1.0)

    return Data(_augmented(draw(64), how), draw(32), 10, 3)


def _augmented(split: TensorSplit, how: Augmentation) -> TensorSplit:
    if not (how.flip or how.crop_padding):
        return split
    return TensorSplit(split.images, split.labels, split.mean, split.std, split.scale, how)


def _fashion_mnist(folder: Path | None, download: bool, how: Augmentation) -> Data:
    """Fashion-MNIST's 60,000 and 10,000 images from IDX files, with zeros around them to 32x32."""
    if download:
        torchvision = _torchvision("fashion-mnist")
        folder = folder or Path("data")
        _downloading(lambda: torchvision.datasets.FashionMNIST(str(folder), download=True))
    given = () if folder is None else (folder, folder / "FashionMNIST" / "raw")
    found = given or tuple(map(Path, FASHION_FOLDERS))
    places = [f for f in found if all(_idx_path(f, name) is not None for name in _FASHION_FILES)]
    if not places:
        raise FileNotFoundError(
            f"the IDX files of fashion-mnist ({_FASHION_FILES[0]}-ubyte[.gz] ...) are not in "
            f"{' or '.join(map(str, found))}: --data-dir DIR, --download, or Debian's package dataset-fashion-mnist"
        )
    images, labels, test_images, test_labels = (
        _read_idx(_idx_path(places[0], name)) for name in _FASHION_FILES
    )
    for name, pair in (("train", (images, labels)), ("t10k", (test_images, test_labels))):
        if pair[0].shape[1:] != (28, 28) or pair[1].shape != pair[0].shape[:1]:
            shapes = " and ".join(str(tuple(t.shape)) for t in pair)
            raise ValueError(
                f"{places[0]}: {name} holds {shapes}; images [N, 28, 28] and N labels are needed"
            )
    images, test_images = (F.pad(t.unsqueeze(1), (2, 2, 2, 2)) for t in (images, test_images))
    pixels = images.double() / 255
    norm = ((pixels.mean().item(),), (pixels.std().item(),))
    train = TensorSplit(images, labels.long(), *norm)
    return Data(_augmented(train, how), TensorSplit(test_images, test_labels.long(), *norm), 10, 1)


def _idx_path(folder: Path, name: str) -> Path | None:
    paths = (folder / f"{name}-ubyte", folder / f"{name}-ubyte.gz")
    return next((path for path in paths if path.is_file()), None)


def _read_idx(path: Path) -> Tensor:
    """A uint8 tensor from an IDX file, gzipped or not: 0, 0, type 8, number of sizes; the sizes; the bytes."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            content = file.read()
    except (gzip.BadGzipFile, EOFError) as error:
        raise ValueError(f"{str(path)!r} is no whole gzip file: {error}") from error
    start = 4 + 4 * content[3] if len(content) > 3 else 4
    if content[:3] != b"\0\0\x08" or len(content) < start:
        raise ValueError(f"{str(path)!r} is no IDX file of bytes")
    sizes = struct.unpack(f">{content[3]}I", content[4:start])
    if len(content) - start != torch.Size(sizes).numel():
        raise ValueError(f"{str(path)!r} holds {len(content) - start} bytes; its sizes say {sizes}")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=start).view(sizes)


def _cifar(name: str, folder: Path | None, download: bool, how: Augmentation) -> Data:
    """CIFAR-10 or CIFAR-100 from the batches of their python version, through torchvision."""
    torchvision = _torchvision(name)
    kind = getattr(torchvision.datasets, name.upper())
    root = folder or Path("data")
    if root.name == kind.base_folder:
        root = root.parent
    if download:
        _downloading(lambda: kind(str(root), download=True))
    try:
        splits = [kind(str(root), train=is_train) for is_train in (True, False)]
    except RuntimeError as error:
        raise FileNotFoundError(
            f"{name}: the folder {kind.base_folder!r} of the python version is not in {str(root)!r}, "
            "or a file in it is damaged: --data-dir DIR, or --download"
        ) from error
    train, test = (
        TensorSplit(
            torch.from_numpy(split.data).permute(0, 3, 1, 2).contiguous(),
            torch.tensor(split.targets),
            MEAN,
            STD,
        )
        for split in splits
    )
    return Data(_augmented(train, how), test, len(splits[0].classes), 3)


def _image_folder(folder: Path | None, download: bool, how: Augmentation) -> Data:
    """DIR/train and DIR/val (or DIR/test), one folder of images per class in each."""
    torchvision = _torchvision("imagefolder")
    test = next((folder / name for name in ("val", "test") if (folder / name).is_dir()), None)
    if test is None or not (folder / "train").is_dir():
        raise FileNotFoundError(f"{str(folder)!r} (--data-dir) must hold the folders train and val")
    splits = [torchvision.datasets.ImageFolder(str(path)) for path in (folder / "train", test)]
    if splits[0].classes != splits[1].classes:
        odd = sorted(set(splits[0].classes) ^ set(splits[1].classes))
        raise ValueError(f"{str(folder)!r}: only one of train and {test.name} has {odd[:5]}")
    parts = [
        FileSplit(split, torch.tensor(split.targets), how, is_test)
        for split, is_test in zip(splits, (False, True), strict=True)
    ]
    return Data(*parts, len(splits[0].classes), 3)


def _torchvision(name: str):
    try:
        import torchvision
    except ImportError as error:
        raise ValueError(
            f"data {name!r} needs torchvision, which is not installed: pip install 'bnfast[train]'"
        ) from error
    return torchvision


def _downloading(fetch: Callable[[], object]) -> None:
    try:
        # torchvision prints what it tries; what is wrong comes with the error.
        with contextlib.redirect_stdout(io.StringIO()):
            fetch()
    except (OSError, RuntimeError) as error:
        raise ConnectionError(f"the download (--download) failed: {error}") from error


@dataclass(frozen=True)
class DataSpec:
    """One row of the table of data sets: how it is loaded, and the preset that suits it.

    needs_folder: the files are the user's; in_files: they are decoded as they are needed.
    """

    load: Callable[[Path | None, bool, Augmentation], Data]
    preset: str
    can_download: bool = False
    needs_folder: bool = False
    in_files: bool = False


DATASETS: dict[str, DataSpec] = {
    "digits": DataSpec(_digits, "digits"),
    "fashion-mnist": DataSpec(_fashion_mnist, "cifar", can_download=True),
    "cifar10": DataSpec(lambda *options: _cifar("cifar10", *options), "cifar", can_download=True),
    "cifar100": DataSpec(lambda *options: _cifar("cifar100", *options), "cifar", can_download=True),
    "imagefolder": DataSpec(_image_folder, "imagenet", needs_folder=True, in_files=True),
    "imagenet": DataSpec(_image_folder, "imagenet", needs_folder=True, in_files=True),
    "fake": DataSpec(_fake, "smoke"),
}


def spec(name: str) -> DataSpec:
    """The row of a data set. Raises ValueError for a name that is not in the table."""
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r} (--data); allowed are: {', '.join(DATASETS)}")
    return DATASETS[name]


def load(
    name: str,
    folder: str | os.PathLike[str] | None = None,
    download: bool = False,
    augmentation: Augmentation | None = None,
) -> Data:
    """Loads a data set.

    folder: where its files are, for those that are not bundled; it must exist if given, unless download puts them there.

    Raises ValueError for an unknown data set, files that are not what they should be, and a folder that is needed and was
    not given; OSError (FileNotFoundError, ...) for files and folders that are not there, ConnectionError for a download.
    """
    row = spec(name)
    if folder is None and row.needs_folder:
        raise ValueError(f"data set {name!r} needs the folder of its files: --data-dir DIR")
    if download and not row.can_download:
        raise ValueError(f"data set {name!r} cannot be downloaded (--download)")
    if folder is not None and not download and not Path(folder).is_dir():
        raise FileNotFoundError(f"the data folder {str(folder)!r} (--data-dir) does not exist")
    place = None if folder is None else Path(folder)
    return row.load(place, download, augmentation or Augmentation())
