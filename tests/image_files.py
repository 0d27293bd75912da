"""Small data sets in their real file formats, made for the tests."""

import gzip
import hashlib
import pickle
import struct
from pathlib import Path

import numpy as np
import torchvision
from PIL import Image


def write_idx(path: Path, values: np.ndarray) -> None:
    """A uint8 array as an IDX file, gzipped where the name ends in .gz."""
    head = struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape)
    with gzip.open(path, "wb") if path.suffix == ".gz" else open(path, "wb") as file:
        file.write(head + values.astype(np.uint8).tobytes())


def fashion_mnist(folder: Path, train: int = 48, test: int = 16, suffix: str = ".gz") -> Path:
    rng = np.random.default_rng(0)
    for name, count in (("train", train), ("t10k", test)):
        images = rng.integers(0, 256, (count, 28, 28))
        write_idx(folder / f"{name}-images-idx3-ubyte{suffix}", images)
        write_idx(folder / f"{name}-labels-idx1-ubyte{suffix}", np.arange(count) % 10)
    return folder


def cifar(folder: Path, name: str, monkeypatch, rows: int = 12) -> Path:
    """The python version of cifar10 or cifar100: batches of `rows` images. torchvision knows the checksums of the real
    files alone, so it is told those of these.
    """
    kind = getattr(torchvision.datasets, name.upper())
    rng = np.random.default_rng(1)
    base = folder / kind.base_folder
    base.mkdir()
    classes = 10 if name == "cifar10" else 100
    key = "labels" if name == "cifar10" else "fine_labels"

    def write(file: str, content: dict) -> str:
        data = pickle.dumps(content, protocol=2)
        (base / file).write_bytes(data)
        return hashlib.md5(data).hexdigest()

    for attribute in ("train_list", "test_list"):
        files = [file for file, _ in getattr(kind, attribute)]
        sums = [
            write(
                file,
                {
                    "data": rng.integers(0, 256, (rows, 3072)).astype(np.uint8),
                    key: rng.integers(0, classes, rows).tolist(),
                },
            )
            for file in files
        ]
        monkeypatch.setattr(kind, attribute, [list(pair) for pair in zip(files, sums, strict=True)])
    meta = dict(kind.meta)
    meta["md5"] = write(meta["filename"], {meta["key"]: [f"class {i}" for i in range(classes)]})
    monkeypatch.setattr(kind, "meta", meta)
    return folder


def image_folder(folder: Path, classes: int = 3, train: int = 6, val: int = 2) -> Path:
    """JPEGs of several sizes, one grey, in train/<class> and val/<class>."""
    rng = np.random.default_rng(2)
    for split, count in (("train", train), ("val", val)):
        for label in range(classes):
            place = folder / split / f"n{label:08d}"
            place.mkdir(parents=True)
            for number in range(count):
                size = (int(rng.integers(40, 80)), int(rng.integers(40, 80)))
                shape = size if number == 0 else (*size, 3)
                pixels = rng.integers(0, 256, shape).astype(np.uint8)
                Image.fromarray(pixels).save(place / f"{number}.JPEG", quality=90)
    return folder
