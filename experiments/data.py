"""Real data, small enough for a laptop: digits, MNIST, bytes of text, and TFDS names where that is installed."""

from __future__ import annotations

import dataclasses
import gzip
import struct
import tarfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

NAMES = ("digits", "mnist", "cifar10", "text", "synthetic_text", "synthetic_images", "tfds:<name>")
OPTIONS = ("val", "test", "length", "examples")


class DataError(ValueError):
    """Data that is missing, corrupt or unknown. The message says how to mend it."""


@dataclasses.dataclass(frozen=True)
class Split:
    """Examples and their labels.

    Attributes:
      x: float32 images (n, height, width, channels) in [0, 1], or uint8 bytes (n, length).
      y: int32 labels (n,), or for text the byte that follows each input byte, (n, length).
    """

    x: np.ndarray
    y: np.ndarray

    def __len__(self) -> int:
        return len(self.x)

    def take(self, index: np.ndarray | slice) -> Split:
        return Split(self.x[index], self.y[index])


@dataclasses.dataclass(frozen=True)
class Data:
    """One data set. ``val`` may be empty; nothing may be chosen by ``test``."""

    name: str
    kind: Literal["image", "text"]
    classes: int
    train: Split
    val: Split
    test: Split

    def __str__(self) -> str:
        return f"{self.name}: {len(self.train)} train, {len(self.val)} validation, {len(self.test)} test"

    def checksum(self) -> int:
        """CRC-32 of all examples and labels, to tell whether two runs saw the same data."""
        value = 0
        for split in (self.train, self.val, self.test):
            for array in (split.x, split.y):
                value = zlib.crc32(array.tobytes(), value)
        return value


def of(name: str, data_dir: str | None, options: Mapping[str, Any], seed: int = 0) -> Data:
    """Load a data set with the options of a config; see :func:`load`.

    Raises:
      DataError: for an option that there is not, too.
    """
    for option in options:
        if option not in OPTIONS:
            raise DataError(f"config.data_options: {option!r} is unknown; use some of {', '.join(OPTIONS)}")
    return load(name, data_dir, seed, **options)


def load(
    name: str,
    data_dir: str | None = None,
    seed: int = 0,
    *,
    val: float | None = None,
    test: float = 0.2,
    length: int = 128,
    examples: int = 2048,
) -> Data:
    """Load a data set by name.

    Args:
      name: ``digits`` (embedded in scikit-learn), ``mnist`` (idx files, gzipped or not), ``cifar10`` (the official
        binary archive, packed or not), ``text`` (bytes of a .txt file), ``synthetic_text`` and ``synthetic_images``
        (drawn from a rule that can be learned, for trials of a machine), or ``tfds:<name>`` for an image data set of
        tensorflow_datasets.
      data_dir: the folder of the files, for ``mnist``, ``cifar10`` and ``text``; for TFDS its own folder.
      seed: of the random split, where the data set has no split of its own (``digits``).
      val: the fraction that validates: of all digits (0.2 by default), or of the training split (none by default).
      test: the fraction of the digits that tests.
      length: bytes in one example of text.
      examples: of synthetic data that train; a quarter as many test.

    Raises:
      DataError: if the name is unknown, or a file is missing or corrupt.
    """
    if name == "digits":
        return _digits(seed, 0.2 if val is None else val, test)
    if name == "mnist":
        return _mnist(_folder(name, data_dir), val or 0.0)
    if name == "cifar10":
        return _cifar(_folder(name, data_dir), val or 0.0)
    if name == "text":
        return _text(_folder(name, data_dir), length, val or 0.0)
    if name in ("synthetic_text", "synthetic_images"):
        make = _synthetic_text if name == "synthetic_text" else _synthetic_images
        return make(np.random.default_rng(seed), examples, examples // 4, length)
    if name.startswith("tfds:"):
        return _tfds(name, data_dir, val or 0.0)
    raise DataError(f"data {name!r} is unknown; use one of {', '.join(NAMES)}")


def fold(data: Data, index: int, folds: int = 5, seed: int = 0) -> Data:
    """Shuffle training and test examples together and make fold ``index`` of ``folds`` the test split."""
    if not 0 <= index < folds:
        raise DataError(f"fold {index} of {folds} does not exist; use 0 to {folds - 1}")
    x = np.concatenate([data.train.x, data.test.x])
    y = np.concatenate([data.train.y, data.test.y])
    parts = np.array_split(np.random.default_rng(seed).permutation(len(x)), folds)
    rest = np.concatenate([part for i, part in enumerate(parts) if i != index])
    whole = Split(x, y)
    return dataclasses.replace(
        data, name=f"{data.name} fold {index}/{folds}", train=whole.take(rest), test=whole.take(parts[index])
    )


def _folder(name: str, data_dir: str | None) -> Path:
    if not data_dir:
        raise DataError(f"data {name!r} needs its files; pass --data_dir=<folder>")
    folder = Path(data_dir).expanduser()
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; pass --data_dir=<the folder that holds the files of {name!r}>")
    return folder


def _digits(seed: int, val: float, test: float) -> Data:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError("data 'digits' needs scikit-learn; pip install 'jcompress[experiments]'") from None
    digits = load_digits()
    whole = Split((digits.images[..., None] / 16).astype(np.float32), digits.target.astype(np.int32))
    order = np.random.default_rng(seed).permutation(len(whole))
    first, second = round(test * len(whole)), round((test + val) * len(whole))
    parts = [whole.take(index) for index in (order[second:], order[first:second], order[:first])]
    return Data("digits", "image", 10, *parts)


def _mnist(folder: Path, val: float) -> Data:
    images, labels = _find(folder, "train-images"), _find(folder, "train-labels")
    if images and labels:
        return _split_off("MNIST", _mnist_pair(images, labels), _mnist_test(folder), val)
    whole = _mnist_test(folder)
    cut = len(whole) * 4 // 5
    return _split_off(f"MNIST-{len(whole) // 1000}k", whole.take(slice(cut)), whole.take(slice(cut, None)), val)


def _mnist_test(folder: Path) -> Split:
    images, labels = _find(folder, "t10k-images"), _find(folder, "t10k-labels")
    if not images or not labels:
        raise DataError(
            f"{folder}: found no MNIST files; expected t10k-images-idx3-ubyte.gz and t10k-labels-idx1-ubyte.gz, and "
            "for the full data set train-images-idx3-ubyte.gz and train-labels-idx1-ubyte.gz"
        )
    return _mnist_pair(images, labels)


def _find(folder: Path, start: str) -> Path | None:
    return next((path for path in sorted(folder.glob(f"{start}*ubyte*"))), None)


def _mnist_pair(images: Path, labels: Path) -> Split:
    x, y = read_idx(images), read_idx(labels)
    if x.ndim != 3 or y.ndim != 1 or len(x) != len(y):
        raise DataError(
            f"{images.name} of shape {x.shape} and {labels.name} of shape {y.shape} do not belong together; "
            "download both again"
        )
    return Split((x[..., None] / np.float32(255)).astype(np.float32), y.astype(np.int32))


def read_idx(path: Path) -> np.ndarray:
    """The uint8 array in an idx file, gzipped or not (the format of MNIST)."""
    try:
        raw = path.read_bytes()
        data = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error}); download it again") from None
    if len(data) < 4 or data[:3] != b"\0\0\x08" or len(data) < 4 + 4 * data[3]:
        raise DataError(f"{path}: not an idx file of bytes, its first bytes are {data[:4].hex()}; download it again")
    shape = struct.unpack(f">{data[3]}I", data[4 : 4 + 4 * data[3]])
    values = np.frombuffer(data, np.uint8, offset=4 + 4 * data[3])
    if values.size != int(np.prod(shape)):
        raise DataError(
            f"{path}: its header says {'x'.join(map(str, shape))} bytes, found {values.size}; download it again"
        )
    return values.reshape(shape)


def _cifar(folder: Path, val: float) -> Data:
    train, test = (_cifar_split(folder, names) for names in ("data_batch_", "test_batch"))
    return _split_off("CIFAR-10", train, test, val)


def _cifar_split(folder: Path, start: str) -> Split:
    """The records of all binary files of a name, in a folder or in the archive: a label, and 32 x 32 bytes a colour."""
    files = {p.name: p.read_bytes for p in sorted(folder.rglob(f"{start}*.bin"))}
    archive = folder / "cifar-10-binary.tar.gz"
    if not files and archive.exists():
        with tarfile.open(archive) as packed:
            raw = [
                packed.extractfile(member).read()  # type: ignore[union-attr]  # regular files
                for member in sorted(packed.getmembers(), key=lambda m: m.name)
                if member.isfile() and Path(member.name).name.startswith(start)
            ]
    else:
        raw = [read() for read in files.values()]
    whole = np.frombuffer(b"".join(raw), np.uint8)
    if not whole.size or whole.size % 3073:
        raise DataError(
            f"{folder}: found {whole.size} bytes of {start}*.bin, expected records of 3,073, in a folder or in "
            "cifar-10-binary.tar.gz; download it again"
        )
    records = whole.reshape(-1, 3073)
    x = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1) / np.float32(255)
    return Split(np.ascontiguousarray(x, np.float32), records[:, 0].astype(np.int32))


def _split_off(name: str, train: Split, test: Split, val: float) -> Data:
    """The last ``val`` of the training split validates."""
    cut = len(train) - round(val * len(train))
    classes = int(max(train.y.max(), test.y.max())) + 1
    return Data(name, "image", classes, train.take(slice(cut)), train.take(slice(cut, None)), test)


def _text(folder: Path, length: int, val: float) -> Data:
    path = folder / "tinyshakespeare.txt"
    path = path if path.exists() else next(iter(sorted(folder.glob("*.txt"))), path)
    if not path.exists():
        raise DataError(f"{folder}: found no .txt file; put a plain text there")
    content = np.frombuffer(path.read_bytes(), np.uint8)
    cut = len(content) * 9 // 10
    train, test = _windows(content[:cut], length), _windows(content[cut:], length)
    if not len(train) or not len(test):
        raise DataError(f"{path}: {len(content)} bytes are too few for examples of {length}; use a longer text")
    keep = len(train) - round(val * len(train))
    return Data(f"text ({path.name})", "text", 256, train.take(slice(keep)), train.take(slice(keep, None)), test)


def _windows(content: np.ndarray, length: int) -> Split:
    """Examples that do not overlap, each byte with the one that follows it."""
    count = max((len(content) - 1) // length, 0)
    x, y = content[: count * length], content[1 : count * length + 1]
    return Split(x.reshape(count, length), y.reshape(count, length).astype(np.int32))


def _synthetic_text(rng: np.random.Generator, train: int, test: int, length: int) -> Data:
    """Bytes of which nine in ten follow from the one before by one permutation."""
    follows, text = rng.permutation(256), rng.integers(0, 256, (train + test, length + 1))
    kept = rng.random(text.shape) < 0.9
    for i in range(1, length + 1):
        text[:, i] = np.where(kept[:, i], follows[text[:, i - 1]], text[:, i])
    whole = Split(text[:, :-1].astype(np.uint8), text[:, 1:].astype(np.int32))
    return Data(
        "synthetic text", "text", 256, whole.take(slice(train)), whole.take(slice(0)), whole.take(slice(train, None))
    )


def _synthetic_images(rng: np.random.Generator, train: int, test: int, _: int) -> Data:
    """Ten patterns of 32 x 32 pixels and three colours, under as much noise."""
    patterns, y = rng.random((10, 8, 8, 3)), rng.integers(0, 10, train + test).astype(np.int32)
    x = patterns.repeat(4, 1).repeat(4, 2)[y] + rng.random((train + test, 32, 32, 3))
    whole = Split((x / 2).astype(np.float32), y)
    return Data(
        "synthetic images", "image", 10, whole.take(slice(train)), whole.take(slice(0)), whole.take(slice(train, None))
    )


def _tfds(name: str, data_dir: str | None, val: float) -> Data:
    try:
        import tensorflow_datasets as tfds
    except ImportError:
        raise DataError(
            f"data {name!r} needs tensorflow_datasets, which is not installed; pip install 'jcompress[tfds]'"
        ) from None
    short = name.removeprefix("tfds:")
    try:
        sets = tfds.load(short, data_dir=data_dir, split=["train", "test"], batch_size=-1, as_supervised=True)
    except Exception as error:  # TFDS raises many kinds, all of them about the name or the download
        first = str(error).strip().splitlines()[0]
        raise DataError(f"data {name!r}: tensorflow_datasets cannot load it ({first})") from None
    train, test = (
        Split(np.asarray(x, np.float32) / np.float32(255), np.asarray(y, np.int32)) for x, y in tfds.as_numpy(sets)
    )
    return _split_off(short, train, test, val)
