"""Data sets: their file formats, what augmentation does, and that it depends on nothing but seed and image."""

import urllib.error
from dataclasses import replace
from pathlib import Path

import image_files
import numpy as np
import pytest
import torch

from bnfast import data
from bnfast.cli import main
from bnfast.data import FASHION_FOLDERS, Augmentation, Place, TensorSplit, in_order, shuffled

CIFAR_AUGMENTATION = Augmentation(flip=True, crop_padding=4)
NCHW = Place(memory_format=torch.contiguous_format)


def all_batches(split, order, seed=None, place=NCHW):
    images, labels = zip(*split.batches(order, place, seed), strict=True)
    return torch.cat(images), torch.cat(labels)


def test_digits_are_split_the_same_way_always():
    pytest.importorskip("sklearn")
    digits = data.load("digits")
    images, labels = all_batches(digits.train, in_order(1437, 500))
    assert len(digits.train) == 1437 and len(digits.test) == 360
    assert images.shape == (1437, 1, 16, 16) and images.dtype == torch.float32
    assert abs(images.mean()) < 1e-5 and abs(images.std() - 1) < 1e-5
    assert digits.test.labels.bincount().min() >= 34 and labels.bincount().min() >= 139
    assert torch.equal(digits.train.images, data.load("digits").train.images)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_fashion_mnist_from_idx_files(tmp_path, suffix):
    found = data.load("fashion-mnist", image_files.fashion_mnist(tmp_path, suffix=suffix))
    assert (len(found.train), len(found.test), found.num_classes, found.in_channels) == (
        48,
        16,
        10,
        1,
    )
    assert found.train.images.shape == (48, 1, 32, 32)
    pixels = np.random.default_rng(0).integers(0, 256, (48, 28, 28))
    assert np.array_equal(found.train.images[:, 0, 2:30, 2:30], pixels)
    assert not found.train.images[:, :, :2].any() and not found.test.images[:, :, :, 30:].any()
    images, labels = all_batches(found.train, in_order(48, 20))
    assert abs(images.mean()) < 1e-4 and abs(images.std() - 1) < 1e-3
    assert labels.tolist() == [i % 10 for i in range(48)]


def test_the_whole_fashion_mnist():
    if not Path(FASHION_FOLDERS[-1]).is_dir():
        pytest.skip("Debian's package dataset-fashion-mnist is not installed")
    found = data.load("fashion-mnist", FASHION_FOLDERS[-1])
    assert (len(found.train), len(found.test)) == (60_000, 10_000)
    assert found.train.labels.bincount().tolist() == [6000] * 10


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\0\0\x08\x01\0\0\0\x09" + bytes(8), "holds 8 bytes; its sizes say"),
        (b"\0\0\x0d\x01\0\0\0\x01" + bytes(4), "no IDX file of bytes"),
        (b"", "no IDX file of bytes"),
        (b"\0\0\x08\x01\0\0\0\x02" + bytes(2), "48 labels|N labels"),
    ],
)
def test_damaged_idx_files(tmp_path, content, message):
    image_files.fashion_mnist(tmp_path, suffix="")
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        data.load("fashion-mnist", tmp_path)


def test_a_cut_gzip_file(tmp_path):
    path = image_files.fashion_mnist(tmp_path) / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="no whole gzip file"):
        data.load("fashion-mnist", tmp_path)


@pytest.mark.parametrize(("name", "classes"), [("cifar10", 10), ("cifar100", 100)])
@pytest.mark.parametrize("inside", [False, True])
def test_cifar_from_the_python_version(tmp_path, monkeypatch, name, classes, inside):
    folder = image_files.cifar(tmp_path, name, monkeypatch)
    found = data.load(name, next(folder.iterdir()) if inside else folder)
    batches = 5 if name == "cifar10" else 1
    assert (len(found.train), len(found.test)) == (12 * batches, 12)
    assert (found.num_classes, found.in_channels) == (classes, 3)
    first = np.random.default_rng(1).integers(0, 256, (12, 3072)).reshape(12, 3, 32, 32)
    assert np.array_equal(found.train.images[:12], first)
    images, _ = all_batches(found.train, in_order(12, 12))
    red = (first[:, 0] / 255 - 0.485) / 0.229
    np.testing.assert_allclose(images[:, 0], red, rtol=1e-5, atol=1e-5)


def test_damaged_cifar_is_refused(tmp_path, monkeypatch):
    folder = image_files.cifar(tmp_path, "cifar10", monkeypatch)
    (folder / "cifar-10-batches-py" / "data_batch_3").write_bytes(b"broken")
    with pytest.raises(FileNotFoundError, match="a file in it is damaged"):
        data.load("cifar10", folder)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "fashion-mnist"])
def test_a_download_without_internet_is_one_clear_line(tmp_path, capsys, monkeypatch, name):
    def no_network(*arguments, **options):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    arguments = ["train", "--data", name, "--download", "--data-dir", str(tmp_path)]
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    assert printed.err.startswith("bnfast: error: the download (--download) failed: ")


def test_a_download_of_what_is_there_fetches_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", None)
    folder = image_files.cifar(tmp_path, "cifar10", monkeypatch)
    assert len(data.load("cifar10", folder, download=True).train) == 60
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    image_files.fashion_mnist(raw, suffix="")
    for load in ({"download": True}, {}):
        assert len(data.load("fashion-mnist", tmp_path, **load).train) == 48


def test_augmentation_flips_and_crops():
    """Every image shows one of the 2 x 81 pictures that it can, and nearly all of these appear."""
    image = torch.arange(1, 1025, dtype=torch.uint8).view(1, 1, 32, 32)
    count = 2000
    split = TensorSplit(
        image.expand(count, 1, 32, 32),
        torch.zeros(count, dtype=torch.int64),
        (0.0,),
        (1.0,),
        1.0,
        CIFAR_AUGMENTATION,
    )
    padded = torch.nn.functional.pad(image.float(), (4, 4, 4, 4))
    crops = [padded[0, :, i : i + 32, j : j + 32] for i in range(9) for j in range(9)]
    allowed = {crop.numpy().tobytes() for c in crops for crop in (c, c.flip(2).contiguous())}
    assert len(allowed) == 162
    images, _ = all_batches(split, in_order(count, 100), seed=3)
    seen = {one.contiguous().numpy().tobytes() for one in images}
    assert seen <= allowed and len(seen) > 150
    assert torch.equal(all_batches(split, in_order(100, 100))[0][0], image[0].float())


def check_independence(split, order, place=NCHW):
    """The images of a batch do not depend on the batches before it or on the number of ranks; they do on the seed."""
    images, labels = all_batches(split, order, 5, place)
    assert torch.equal(images, all_batches(split, order, 5, place)[0])
    assert not torch.equal(images, all_batches(split, order, 6, place)[0])
    later = all_batches(split, order[1:], 5, place)
    assert torch.equal(later[0], images[len(order[0]) :])
    parts = [list(split.batches(order, replace(place, rank=r, ranks=2), 5)) for r in range(2)]
    start = 0
    for number, index in enumerate(order):
        for rank in range(2):
            some, own = parts[rank][number]
            here = slice(start + rank, start + len(index), 2)
            assert torch.equal(some, images[here]) and torch.equal(own, labels[here])
        start += len(index)


def test_augmentation_depends_on_seed_and_image_alone():
    images = torch.randint(0, 256, (33, 3, 32, 32), dtype=torch.uint8)
    split = TensorSplit(images, torch.arange(33), (0.5,) * 3, (0.2,) * 3, 255.0, CIFAR_AUGMENTATION)
    check_independence(split, shuffled(33, 16, 1))  # the last batch has one image: none for rank 1


def test_image_folder(tmp_path):
    how = Augmentation(flip=True, image_size=32, resize_size=40)
    found = data.load("imagefolder", image_files.image_folder(tmp_path), augmentation=how)
    assert (len(found.train), len(found.test), found.num_classes) == (18, 6, 3)
    images, labels = all_batches(found.test, in_order(6, 4))
    assert images.shape == (6, 3, 32, 32) and labels.tolist() == [0, 0, 1, 1, 2, 2]
    before = torch.get_rng_state()
    check_independence(found.train, shuffled(17, 8, 1))
    assert torch.equal(before, torch.get_rng_state())


def test_image_files_are_the_same_from_worker_processes(tmp_path):
    how = Augmentation(flip=True, image_size=24, resize_size=28)
    split = data.load("imagenet", image_files.image_folder(tmp_path), augmentation=how).train
    order = shuffled(18, 8, 2)
    alone, workers = (all_batches(split, order, 5, replace(NCHW, workers=n)) for n in (0, 2))
    assert torch.equal(alone[0], workers[0]) and torch.equal(alone[1], workers[1])


def test_image_folders_that_do_not_fit(tmp_path):
    with pytest.raises(FileNotFoundError, match="train and val"):
        data.load("imagefolder", tmp_path)
    image_files.image_folder(tmp_path)
    (tmp_path / "val" / "n00000002").rename(tmp_path / "val" / "other")
    with pytest.raises(ValueError, match=r"only one of train and val has \['n00000002', 'other'\]"):
        data.load("imagefolder", tmp_path)
