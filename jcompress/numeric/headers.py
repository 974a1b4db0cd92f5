"""Small numbers in front of a coded stream: of a given width, or of any size by exponential Golomb codes."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable

import numpy as np

_LONGEST, _PIECE = 64, 256


@functools.lru_cache(maxsize=1 << 12)
def _golomb(value: int, order: int) -> str:
    text = format(value + (1 << order), "b")
    return "0" * (len(text) - 1 - order) + text


class HeaderWriter:
    """Collects numbers as bits, the highest first."""

    def __init__(self) -> None:
        self._pieces: list[str] = []

    def number(self, value: int, width: int) -> None:
        """Append ``value`` in ``width`` bits."""
        if width:
            self._pieces.append(format(value, f"0{width}b"))

    def golomb(self, value: int, order: int = 0) -> None:
        """Append any ``value >= 0``: about ``2 log2(value / 2**order + 1) + order`` bits."""
        self._pieces.append(_golomb(value, order))

    def golombs(self, values: Iterable[int], order: int) -> None:
        """Append several of them."""
        self._pieces.extend(map(_golomb, values, itertools.repeat(order)))

    def getvalue(self) -> bytes:
        """The bits, the last byte filled up with zeros."""
        text = "".join(self._pieces)
        size = -(-len(text) // 8)
        return int(text.ljust(8 * size, "0") or "0", 2).to_bytes(size, "big")


class HeaderReader:
    """Reads back what :class:`HeaderWriter` wrote."""

    def __init__(self, data: memoryview) -> None:
        self._data, self._at, self._text, self._read = data, 0, "", 0

    @property
    def nbytes(self) -> int:
        """The bytes read so far, the last one whole."""
        return -(-self._at // 8)

    def _take(self, width: int) -> str:
        """The next bits as text; bytes become text a piece at a time."""
        end = self._at + width
        while end > len(self._text):
            piece = self._data[self._read : self._read + _PIECE]
            if not piece:
                raise ValueError(f"the stream ends at bit {8 * len(self._data)}; bit {end} was wanted")
            self._text += format(int.from_bytes(piece, "big"), f"0{8 * len(piece)}b")
            self._read += len(piece)
        found, self._at = self._text[self._at : end], end
        return found

    def number(self, width: int) -> int:
        """The next ``width`` bits as a number.

        Raises:
          ValueError: where the stream ends before.
        """
        return int(self._take(width) or "0", 2)

    def golombs(self, count: int, order: int) -> list[int]:
        """So many of them, as the entries of a table; those that are text already without a call for each."""
        found, text, first, base = [], self._text, self._at, 1 << order
        for _ in range(count):
            one = text.find("1", first, first + _LONGEST + 1)
            end = 2 * one - first + 1 + order
            if one < 0 or end > len(text):
                break
            found.append(int(text[one:end], 2) - base)
            first = end
        self._at = first
        return found + [self.golomb(order) for _ in range(count - len(found))]

    def golomb(self, order: int = 0) -> int:
        """The next number of any size; at most 64 bits and what ``order`` adds."""
        first = self._at
        one = self._text.find("1", first, first + _LONGEST + 1)
        if one < 0:  # beyond what was made text so far, or too long
            while self._take(1) == "0":
                if self._at - first > _LONGEST:
                    raise ValueError(f"found a number of more than {_LONGEST} bits in the header of a coded array")
            one = self._at - 1
        self._at = one
        return int(self._take(one - first + 1 + order), 2) - (1 << order)


def shortest_golomb(values: np.ndarray, orders: int) -> tuple[list[int], list[int]]:
    """The fewest bits that :meth:`HeaderWriter.golomb` takes for each row of values, and the orders that take them."""
    order = np.arange(orders)[:, None]
    lengths = np.frexp(values[:, None] + np.float64(1 << order))[1]
    nbits = (2 * lengths - 1 - order).sum(-1)
    return nbits.min(1).tolist(), nbits.argmin(1).tolist()
