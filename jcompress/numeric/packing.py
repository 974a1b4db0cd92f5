"""Bits: integers of any width in one stream, and the cheapest exact code for a mask.

Pure NumPy. What this module counts is what ``jcompress.io`` writes, so the size that a node reports and the
size on disk cannot disagree.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

_CHUNK = 1 << 15
_WIDEST_GAP = 16
GROUP_SIZES = (2, 4, 8, 16, 32)


def unsigned(values: np.ndarray) -> np.ndarray:
    """The bit patterns of an array of numbers, of any byte order, as unsigned integers."""
    if values.dtype == np.bool_:
        return values.astype(np.uint8)
    native = values.astype(values.dtype.newbyteorder("="), copy=False)
    return np.ascontiguousarray(native).view(np.dtype(f"u{values.dtype.itemsize}"))


def _to_bits(values: np.ndarray, width: int) -> np.ndarray:
    """Unsigned integers as rows of ``width`` bits, the lowest first."""
    little = np.ascontiguousarray(values).astype(values.dtype.newbyteorder("<"), copy=False)
    rows = np.unpackbits(little.view(np.uint8).reshape(values.size, -1), axis=1, bitorder="little")
    return rows[:, :width].reshape(-1)


def _to_bytes(values: np.ndarray, width: int) -> np.ndarray:
    """Unsigned integers, a multiple of eight of them, as a stream of bits in whole bytes."""
    little = np.ascontiguousarray(values).astype(values.dtype.newbyteorder("<"), copy=False)
    if width % 8 == 0:
        return little.view(np.uint8).reshape(values.size, -1)[:, : width // 8].reshape(-1)
    if width > 8:
        return np.packbits(_to_bits(values, width), bitorder="little")
    eight = values.reshape(-1, 8)
    word = np.zeros(len(eight), "<u8")
    for i in range(8):
        word |= (eight[:, i] & ((1 << width) - 1)).astype(np.uint64) << np.uint64(i * width)
    return word.view(np.uint8).reshape(-1, 8)[:, :width].reshape(-1)


def _of_bytes(data: np.ndarray, width: int, unsigned: np.dtype) -> np.ndarray:
    """Integers of 1 to 8 bits from a stream of bits in whole bytes, a multiple of ``width`` of them."""
    word = np.zeros((data.size // width, 8), np.uint8)
    word[:, :width] = data.reshape(-1, width)
    found, most = np.zeros((len(word), 8), unsigned.newbyteorder("<")), np.uint64((1 << width) - 1)
    for i in range(8):
        found[:, i] = word.view("<u8")[:, 0] >> np.uint64(i * width) & most
    return found.reshape(-1)


class BitWriter:
    """Joins integers of any width into one stream of bits without padding between arrays.

    Args:
      sink: called with the bytes of the stream, piece by piece; without one, ``getvalue`` gives them all.
      skip: how many bits of the first byte stay 0, for others to write.
    """

    def __init__(self, sink: Callable[[bytes], Any] | None = None, skip: int = 0) -> None:
        self._pieces: list[bytes] = []
        self._sink = sink or self._pieces.append
        self._rest = np.zeros(skip, np.uint8)
        self.nbits = 0

    def write(self, values: np.ndarray, width: int) -> None:
        """Append the ``width`` lowest bits of every element, in C order."""
        flat = np.asarray(values).reshape(-1)
        if not 0 <= width <= 8 * flat.dtype.itemsize:
            raise ValueError(f"found width {width}, expected 0 to {8 * flat.dtype.itemsize} bits for {flat.dtype}")
        self.nbits += flat.size * width
        for start in range(0, flat.size, _CHUNK):
            self._append(unsigned(flat[start : start + _CHUNK]), width)

    def _append(self, chunk: np.ndarray, width: int) -> None:
        even = chunk.size if width % 8 == 0 else chunk.size // 8 * 8
        if even and width:
            self._append_bytes(_to_bytes(chunk[:even], width))
        if even == chunk.size:
            return
        bits = np.concatenate([self._rest, _to_bits(chunk[even:], width)])
        whole = bits.size // 8 * 8
        self._sink(np.packbits(bits[:whole], bitorder="little").tobytes())
        self._rest = bits[whole:]

    def _append_bytes(self, data: np.ndarray) -> None:
        """Whole bytes, moved behind the bits that wait."""
        if shift := self._rest.size:
            last = np.packbits(self._rest, bitorder="little")
            self._rest = np.unpackbits(data[-1:], bitorder="little")[8 - shift :]
            data = (data << shift) | np.concatenate([last, data[:-1] >> (8 - shift)])
        self._sink(data.tobytes())

    def close(self) -> None:
        """End the stream; the last byte is filled up with zeros."""
        self._sink(np.packbits(self._rest, bitorder="little").tobytes())
        self._rest = self._rest[:0]

    def getvalue(self) -> bytes:
        """The stream so far, the last byte filled up with zeros."""
        return b"".join(self._pieces) + np.packbits(self._rest, bitorder="little").tobytes()


class BitReader:
    """Reads back what :class:`BitWriter` wrote.

    Args:
      data: the bytes, or what gives a slice of them as an array and has a ``size``.
    """

    def __init__(self, data: Any) -> None:
        self._data = np.frombuffer(data, np.uint8) if isinstance(data, (bytes, bytearray, memoryview)) else data
        self._at = 0

    @property
    def nbits(self) -> int:
        """The bits read so far."""
        return self._at

    def seek(self, bit: int) -> None:
        """Go on at another bit."""
        self._at = bit

    def read(self, count: int, width: int, dtype: np.dtype) -> np.ndarray:
        """``count`` elements of ``width`` bits; narrow signed integers get their sign back.

        Raises:
          ValueError: for a width that ``dtype`` has not, or more bits than there are.
        """
        unsigned, end = np.dtype(f"u{dtype.itemsize}"), self._at + count * width
        if not 0 <= width <= 8 * dtype.itemsize:
            raise ValueError(f"found width {width}, expected 0 to {8 * dtype.itemsize} bits for {dtype}")
        if end > 8 * self._data.size:
            raise ValueError(f"the stream ends at bit {8 * self._data.size}; bit {end} was wanted")
        flat = np.zeros(count, unsigned)
        for start in range(0, count if width else 0, _CHUNK):
            chunk = self._integers(min(_CHUNK, count - start), width, unsigned)
            if np.issubdtype(dtype, np.signedinteger) and width < 8 * dtype.itemsize:
                sign = unsigned.type(1 << (width - 1))
                chunk = (chunk ^ sign) - sign
            flat[start : start + _CHUNK] = chunk
        return flat.astype(np.bool_) if dtype == np.bool_ else flat.view(dtype)

    def _integers(self, count: int, width: int, unsigned: np.dtype) -> np.ndarray:
        first, last = self._at // 8, -(-(self._at + count * width) // 8)
        window, skip = self._data[first:last], self._at % 8
        self._at += count * width
        if skip == 0 and width == 8 * unsigned.itemsize:
            return window.view(unsigned.newbyteorder("<"))
        if skip == 0 and width % 8 == 0:
            whole = np.zeros((count, unsigned.itemsize), np.uint8)
            whole[:, : width // 8] = window.reshape(count, -1)
            return whole.reshape(-1).view(unsigned.newbyteorder("<"))
        if width <= 8 and count % 8 == 0:
            if skip:
                window = (window[:-1] >> skip) | (window[1:] << (8 - skip))
            return _of_bytes(window, width, unsigned)
        bits = np.unpackbits(window, bitorder="little")[skip : skip + count * width].reshape(count, width)
        wide = np.zeros((count, 8 * unsigned.itemsize), np.uint8)
        wide[:, :width] = bits
        packed = np.packbits(wide, axis=1, bitorder="little")
        return packed.reshape(-1).view(unsigned.newbyteorder("<"))


@dataclasses.dataclass(frozen=True)
class MaskCode:
    """How one mask is written: its scheme, and the shape left when axes along which it is constant are dropped.

    Attributes:
      scheme: ``"bits"``, one bit an entry; ``"gaps"``, the distance from one kept entry to the next in ``width``
        bits, the largest value standing for "so far and nothing yet"; or ``"choice"``, the number of each
        group's subset where every ``m`` along axis -2 keep the same count ``n``.
      shape: the shape of the mask once constant axes have length 1.
      nbits: the exact cost.
    """

    scheme: str
    shape: tuple[int, ...]
    nbits: int
    width: int = 0
    n: int = 0
    m: int = 0


def mask_code(mask: np.ndarray) -> MaskCode:
    """The cheapest of the codes for ``mask``; ties go to the simplest."""
    core = _drop_constant_axes(mask)
    codes = [MaskCode("bits", core.shape, core.size)]
    # A gap takes its width at least: where many are kept, wide ones cannot be the cheapest.
    kept = int(np.count_nonzero(core))
    codes += _gap_codes(core, min((core.size - 1) // kept, _WIDEST_GAP) if kept else 1)
    codes += _choice_codes(core)
    return min(codes, key=lambda code: code.nbits)


def mask_alphabets(mask: np.ndarray) -> list[MaskCode]:
    """The codes for ``mask`` that an entropy coder may do well with: gaps are as wide as makes them few."""
    core = _drop_constant_axes(mask)
    gaps = min(_gap_codes(core, _WIDEST_GAP), key=lambda code: (code.nbits // code.width, code.width))
    return [MaskCode("bits", core.shape, core.size), gaps, *_choice_codes(core)]


def _drop_constant_axes(mask: np.ndarray) -> np.ndarray:
    for axis, length in enumerate(mask.shape):
        if length > 1:
            first = mask.take([0], axis)
            if (mask == first).all():
                mask = first
    return mask


def _gaps(mask: np.ndarray) -> Iterator[np.ndarray]:
    """Zeros before each kept entry, a chunk of the mask at a time."""
    flat, last = mask.reshape(-1), -1
    for start in range(0, flat.size, _CHUNK):
        places = np.flatnonzero(flat[start : start + _CHUNK]) + start
        yield np.diff(places, prepend=last) - 1
        last = int(places[-1]) if places.size else last


def _gap_codes(mask: np.ndarray, widest: int) -> Iterable[MaskCode]:
    widths = range(1, widest + 1)
    numbers = dict.fromkeys(widths, 0)
    for gaps in _gaps(mask):
        longest = int(gaps.max(initial=0))
        for width in widths:
            top = (1 << width) - 1
            numbers[width] += gaps.size + (int((gaps // top).sum()) if longest >= top else 0)
    return [MaskCode("gaps", mask.shape, width * numbers[width], width=width) for width in widths]


def _choice_codes(mask: np.ndarray) -> Iterable[MaskCode]:
    rows = mask.shape[-2] if mask.ndim > 1 else 0
    for m in GROUP_SIZES:
        if rows and rows % m == 0 and mask.size:
            counts = _groups(mask, m).sum(-1, dtype=np.uint8)
            n = int(counts.flat[0])
            if (counts == n).all():
                width = (math.comb(m, n) - 1).bit_length()
                yield MaskCode("choice", mask.shape, width * counts.size, width=width, n=n, m=m)
                return


def _groups(mask: np.ndarray, m: int) -> np.ndarray:
    """Axis -2 in groups of ``m``, which become the last axis."""
    *lead, rows, columns = mask.shape
    return np.swapaxes(mask.reshape(*lead, rows // m, m, columns), -1, -2)


def _ungroup(groups: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return np.swapaxes(groups, -1, -2).reshape(shape)


def encode_mask(mask: np.ndarray, code: MaskCode) -> np.ndarray:
    """The integers, ``code.width`` bits each (one bit for ``"bits"``), that stand for ``mask``."""
    core = mask[tuple(slice(0, n) for n in code.shape)]
    if code.scheme == "bits":
        return core.reshape(-1)
    if code.scheme == "gaps":
        return np.concatenate([np.zeros(0, np.uint16), *(_escape(gaps, (1 << code.width) - 1) for gaps in _gaps(core))])
    groups = _groups(core, code.m).reshape(-1, code.m)
    out = np.zeros(len(groups), np.uint32)
    for start in range(0, len(groups), _CHUNK):
        out[start : start + _CHUNK] = _numbers(groups[start : start + _CHUNK], code.n)
    return out


def _numbers(groups: np.ndarray, n: int) -> np.ndarray:
    """The combinatorial number system: the subset {p_1 < ... < p_n} has the number sum of C(p_i, i)."""
    m = groups.shape[-1]
    if m <= 8 and len(groups) > 1 << m:
        every = _subsets(np.arange(math.comb(m, n)), n, m)
        table = np.zeros(1 << m, np.uint64)
        table[np.packbits(every, axis=-1, bitorder="little")[:, 0]] = np.arange(len(every))
        return table[np.packbits(groups, axis=-1, bitorder="little")[:, 0]]
    kept = np.nonzero(groups)[1].reshape(-1, n)
    table = np.array([[math.comb(p, i + 1) for i in range(n)] for p in range(m)], np.uint64)
    return table.reshape(m, n)[kept, np.arange(n)].sum(-1, dtype=np.uint64)


def decode_mask(values: np.ndarray, code: MaskCode, shape: tuple[int, ...]) -> np.ndarray:
    """The mask of ``shape`` that ``values`` stand for."""
    if code.scheme == "bits":
        core = values.astype(np.bool_).reshape(code.shape)
    elif code.scheme == "gaps":
        core = np.zeros(math.prod(code.shape), np.bool_)
        core[_unescape(values, (1 << code.width) - 1)] = True
        core = core.reshape(code.shape)
    else:
        groups = np.zeros((values.size, code.m), np.bool_)
        for start in range(0, values.size, _CHUNK):
            groups[start : start + _CHUNK] = _subsets(values[start : start + _CHUNK], code.n, code.m)
        core = _ungroup(groups.reshape(*_group_shape(code)), code.shape)
    return np.broadcast_to(core, shape).copy()


def mask_count(code: MaskCode) -> tuple[int, int]:
    """How many integers the code takes, and their width."""
    width = max(code.width, 1) if code.scheme == "bits" else code.width
    if code.scheme == "bits":
        return code.nbits, width
    if width == 0:
        return math.prod(code.shape) // code.m, 0
    return code.nbits // width, width


def _group_shape(code: MaskCode) -> tuple[int, ...]:
    *lead, rows, columns = code.shape
    return (*lead, rows // code.m, columns, code.m)


def _escape(gaps: np.ndarray, top: int) -> np.ndarray:
    """Each gap as its number of escapes ``top`` and a rest below it."""
    escapes = gaps // top
    ends = np.cumsum(escapes + 1) - 1
    out = np.full(int(ends[-1]) + 1 if ends.size else 0, top, np.uint16)
    out[ends] = gaps - escapes * top
    return out


def _unescape(values: np.ndarray, top: int) -> np.ndarray:
    """The positions of the kept entries."""
    values = values.astype(np.int64)
    kept = values != top
    return (np.cumsum(values + kept) - 1)[kept]


def _subsets(numbers: np.ndarray, n: int, m: int) -> np.ndarray:
    """The subsets of ``m`` that the numbers stand for, as rows of a mask."""
    if (count := math.comb(m, n)) < numbers.size and numbers.max() < count:
        return _subsets(np.arange(count), n, m)[numbers]
    rest = numbers.astype(np.uint64).copy()
    out = np.zeros((rest.size, m), np.bool_)
    left = np.full(rest.size, n)
    table = np.array([[math.comb(p, i) for i in range(n + 1)] for p in range(m)], np.uint64)
    for p in reversed(range(m)):
        value = table[p, left]
        take = (left > 0) & (rest >= value)
        out[:, p] = take
        rest = np.where(take, rest - value, rest)
        left = left - take
    if rest.any() or left.any():
        raise ValueError(f"found a number beyond the {math.comb(m, n)} choices of {n} among {m}")
    return out


@dataclasses.dataclass(frozen=True, eq=False)
class Expected:
    """What is known of a mask before it has values: nothing that tells one mask from another, so all are equal.

    Attributes:
      density: the part of entries kept; None if unknown.
      group: the size of the groups along axis -2 that each keep that part, or None.
    """

    density: float | None = None
    group: int | None = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Expected)

    def __hash__(self) -> int:
        return 0

    def count(self, size: int) -> int:
        """How many of ``size`` entries are kept; all, where that is unknown."""
        return size if self.density is None else round(self.density * size)

    def nbits(self, shape: tuple[int, ...]) -> int:
        """The bits of a mask of this shape: exact in groups, else expected of entries that are kept at random."""
        size = math.prod(shape)
        if self.density is None:
            return size
        if self.group is not None:
            kept = round(self.density * self.group)
            return size // self.group * (math.comb(self.group, kept) - 1).bit_length()
        kept, hidden = self.count(size), 1 - self.density
        if kept in (0, size):
            return 1 if kept else 0  # a constant mask has one entry
        gaps = []
        for width in range(1, 17):
            far = hidden ** ((1 << width) - 1)
            gaps.append(round(width * kept * (1 + far / (1 - far))))
        return min(size, *gaps)
