"""Small numbers in front of a coded stream: of a given width, or of any size by exponential Golomb codes."""

from __future__ import annotations

import numpy as np

_LONGEST = 64


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
        text = format(value + (1 << order), "b")
        self._pieces.append("0" * (len(text) - 1 - order) + text)

    def getvalue(self) -> bytes:
        """The bits, the last byte filled up with zeros."""
        text = "".join(self._pieces)
        size = -(-len(text) // 8)
        return int(text.ljust(8 * size, "0") or "0", 2).to_bytes(size, "big")


class HeaderReader:
    """Reads back what :class:`HeaderWriter` wrote."""

    def __init__(self, data: memoryview) -> None:
        self._data, self._at = data, 0

    @property
    def nbytes(self) -> int:
        """The bytes read so far, the last one whole."""
        return -(-self._at // 8)

    def number(self, width: int) -> int:
        """The next ``width`` bits as a number.

        Raises:
          ValueError: where the stream ends before.
        """
        end = self._at + width
        if end > 8 * len(self._data):
            raise ValueError(f"the stream ends at bit {8 * len(self._data)}; bit {end} was wanted")
        value = int.from_bytes(self._data[self._at // 8 : -(-end // 8)], "big") >> (-end % 8)
        self._at = end
        return value & ((1 << width) - 1)

    def golomb(self, order: int = 0) -> int:
        """The next number of any size; at most 64 bits and what ``order`` adds."""
        zeros = 0
        while not self.number(1):
            zeros += 1
            if zeros > _LONGEST:
                raise ValueError(f"found a number of more than {_LONGEST} bits in the header of a coded array")
        return (1 << (zeros + order) | self.number(zeros + order)) - (1 << order)


def shortest_golomb(values: np.ndarray, orders: int) -> tuple[int, int]:
    """The fewest bits that :meth:`HeaderWriter.golomb` takes for all of ``values``, and the order that takes them."""
    order = np.arange(orders)[:, None]
    lengths = np.frexp(values.astype(np.float64) + (1 << order))[1]
    nbits = (2 * lengths - 1 - order).sum(1)
    best = int(nbits.argmin())
    return int(nbits[best]), best
