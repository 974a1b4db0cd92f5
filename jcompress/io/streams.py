"""The arrays of a file as they are written and read: one stream of bits, or entropy-coded bytes array by array."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax
import numpy as np

from jcompress.core import Part
from jcompress.io.manifest import StorageError
from jcompress.numeric import coding, packing
from jcompress.numeric.grids import Grid, grid_of
from jcompress.numeric.processes import runs, shown_before, spans, whole

_SMALL = 1 << 16
"""Bytes of an array."""


class MissingCoderError(StorageError, ImportError):
    """So that ``except ImportError`` works too."""


@contextlib.contextmanager
def needing_coder(path: Any) -> Iterator[None]:
    """What needs the package that codes says so, with the name of the file."""
    try:
        yield
    except ImportError as error:
        raise MissingCoderError(f"{path}: {error}") from None


@dataclasses.dataclass
class Store:
    """Collects what a file holds.

    Attributes:
      coded: whether arrays are entropy-coded.
      parts: the arrays in order, where they are not; they are read when they are written.
      streams: their bytes in order, where they are.
    """

    coded: bool = False
    parts: list[Part] = dataclasses.field(default_factory=list)
    streams: list[bytes] = dataclasses.field(default_factory=list)

    def add(self, part: Part) -> Part:
        """Take one more array; returned as it is stored, with the code that was chosen for a mask."""
        if not self.coded:
            self.parts.append(part)
            return part
        part, stream = _shortest(part) if part.code is not None else (part, _coded(part))
        self.streams.append(stream)
        return part

    @property
    def nbytes(self) -> int:
        """The bytes of the payload."""
        return sum(map(len, self.streams)) + -(-sum(part.nbits for part in self.parts) // 8)

    @property
    def spans(self) -> bool:
        """Whether the arrays of some part lie on several processes, that each writes its own."""
        return any(spans(part.array) or spans(part.where) for part in self.parts)

    def write(self, sink: Callable[[bytes], Any]) -> None:
        """Hand the payload to ``sink`` piece by piece."""
        for stream in self.streams:
            sink(stream)
        writer = packing.BitWriter(sink)
        for part in self.parts:
            writer.write(*integers(part))
        writer.close()


def _coded(part: Part) -> bytes:
    return coding.encode(*integers(part), _grid(part))


def _shortest(part: Part) -> tuple[Part, bytes]:
    """A mask in the code that takes the fewest bytes once it is coded."""
    found = []
    for code in packing.mask_alphabets(whole(part.array)):
        other = dataclasses.replace(part, width=packing.mask_count(code)[1], code=code)
        found.append((other, _coded(other)))
    return min(found, key=lambda pair: len(pair[1]))


def _grid(part: Part) -> Grid | None:
    """Where the numbers of a part stand in its array; None for gaps and choices, which stand in no place."""
    if part.code is not None:
        return grid_of(part.code.shape) if part.code.scheme == "bits" else None
    return grid_of(part.array.shape, None if part.where is None else whole(part.where), part.states)


def integers(part: Part) -> tuple[np.ndarray, int]:
    """The values of one part as they are written, and how many bits each takes."""
    x = part.array
    if isinstance(x, jax.Array) and x.is_fully_addressable and x.nbytes > _SMALL:
        # Another array of the same buffers, that the copy on the host goes with it; small ones may keep theirs.
        x = jax.device_put(x, x.sharding)
    values = whole(x)
    if part.code is not None:
        return packing.encode_mask(values, part.code), part.width
    return numbers(part, values if part.where is None else values[whole(part.where)])


def numbers(part: Part, values: np.ndarray) -> tuple[np.ndarray, int]:
    """Values of a part, all or some, as they are written, and how many bits each takes."""
    if values.dtype.kind == "c" and values.dtype.itemsize == 16:
        return np.ascontiguousarray(values, np.complex128).view(np.float64), part.width // 2
    _check_fits(part, values)
    return values, part.width


def _check_fits(part: Part, values: np.ndarray) -> None:
    dtype = values.dtype
    if not np.issubdtype(dtype, np.integer) or part.width >= 8 * dtype.itemsize or not values.size:
        return
    half = 1 << part.width >> 1
    low, high = (-half, max(half - 1, 0)) if np.issubdtype(dtype, np.signedinteger) else (0, (1 << part.width) - 1)
    if int(values.min()) < low or int(values.max()) > high:
        raise StorageError(
            f"{part.name}: found values from {values.min()} to {values.max()}, expected {low} to {high}, which fit in "
            f"{part.width} bits; fit the node anew, or give it more bits"
        )


class Reader(Protocol):
    """Reads the arrays of a payload in order."""

    @property
    def nbits(self) -> int:
        """The bits read so far."""

    def read(self, part: Part) -> np.ndarray:
        """The stored numbers of one array."""

    def later(self, part: Part) -> Later | None:
        """One array to read block by block, and nothing of it now; None if it can be read as a whole only."""


class PlainReader:
    """Reads the arrays of a stream of bits in order."""

    def __init__(self, payload: Any) -> None:
        self._bits = packing.BitReader(payload)

    @property
    def nbits(self) -> int:
        """The bits read so far."""
        return self._bits.nbits

    def read(self, part: Part) -> np.ndarray:
        """The stored numbers of one array."""
        count, width, dtype = _stored(part)
        return _read(self._bits, count, width, dtype)

    def later(self, part: Part) -> Later | None:
        """One array to read block by block, and nothing of it now; None if it can be read as a whole only."""
        if part.code is not None:
            return None
        count, width, _ = _stored(part)
        first = self._bits.nbits
        self._bits.seek(first + count * width)
        return Later(part, self._bits, first)


def _read(bits: packing.BitReader, count: int, width: int, dtype: np.dtype) -> np.ndarray:
    if dtype == np.complex128:
        return bits.read(2 * count, width // 2, np.dtype(np.float64)).view(np.complex128)
    return bits.read(count, width, dtype)


class Later:
    """An array in a file, of which blocks are read by their slices."""

    def __init__(self, part: Part, bits: packing.BitReader, first: int) -> None:
        self.shape, self.dtype = part.array.shape, part.array.dtype
        self._part, self._bits, self._first = part, bits, first

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        part, ends = self._part, [x.indices(n)[:2] for x, n in zip(index, self.shape, strict=True)]
        out = np.zeros([b - a for a, b in ends], self.dtype)
        if not out.size:
            return out
        starts, length = runs(self.shape, index)
        rows, after = out.reshape(starts.size, length), self._bits.nbits
        flat = None if part.where is None else part.where.reshape(-1)
        places = starts if flat is None else shown_before(flat, starts)
        for row, start, place in zip(rows, starts.tolist(), places.tolist(), strict=True):
            self._bits.seek(self._first + place * part.width)
            kept = np.ones(length, np.bool_) if flat is None else flat[start : start + length]
            row[kept] = _read(self._bits, int(kept.sum()), part.width, self.dtype)
        self._bits.seek(after)
        return out


class CodedReader:
    """Reads entropy-coded arrays in order."""

    def __init__(self, payload: Any) -> None:
        self._data, self._at = memoryview(payload[:]), 0

    @property
    def nbits(self) -> int:
        """The bits read so far."""
        return 8 * self._at

    def read(self, part: Part) -> np.ndarray:
        """The stored numbers of one array."""
        count, width, dtype = _stored(part)
        if part.code is not None and count > 2 * math.prod(part.code.shape) + 1:
            raise StorageError(
                f"the manifest has a mask of shape {part.code.shape} with {count} numbers, which is none"
            )
        values, used = coding.decode(self._data[self._at :], count, width, dtype, _grid(part))
        self._at += used
        return values

    def later(self, part: Part) -> Later | None:
        """None: what is coded is read as a whole."""
        return None


def _stored(part: Part) -> tuple[int, int, np.dtype]:
    """How many numbers, the bits of each, and their dtype."""
    if part.code is not None:
        return *packing.mask_count(part.code), np.dtype(np.uint32)
    count = part.array.size if part.where is None else int(part.where.sum())
    return count, part.width, part.array.dtype
