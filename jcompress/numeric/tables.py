"""Tables of frequencies as they are stored: logarithms of counts in small steps, so that a table costs little.

A count ``n`` is written as the level ``1 + round(r log2 n)``, 0 for none, where ``r`` is 1, 2, 4, ..., 64: as many
steps an octave as pay for themselves. Frequencies follow from levels in integers, the same on every machine.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np

from jcompress.numeric.headers import HeaderReader, HeaderWriter, shortest_golomb

MOST_SYMBOLS = 1 << 12
_FINEST, _MOST_LEVELS, _ORDERS = 64, 64 * 64, 8


@functools.cache
def _powers() -> np.ndarray:
    """``2**(k / 64)`` for k below 64 in units of ``2**-30``, by square roots of integers."""
    unit, root, roots = 1 << 60, 2 << 60, []
    for _ in range(6):
        root = math.isqrt(root * unit)
        roots.append(root)  # 2**(1/2), 2**(1/4), ..., 2**(1/64)
    found = []
    for k in range(_FINEST):
        value = unit
        for bit, factor in enumerate(reversed(roots)):
            value = value * factor // unit if k >> bit & 1 else value
        found.append(value >> 30)
    return np.array(found, np.int64)


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
    """The frequencies of symbols 0, 1, ... up to a few percent.

    Attributes:
      levels: logarithms of the counts, int64, shape (symbols,); 0 for a symbol that never occurs.
      steps: levels an octave, a power of two up to 64.
    """

    levels: np.ndarray
    steps: int

    @functools.cached_property
    def frequencies(self) -> np.ndarray:
        """Integers in proportion to the counts, int64, shape (symbols,); all alike where nothing was counted."""
        if not self.levels.any():
            return np.ones(len(self.levels), np.int64)
        exponents = np.maximum(self.levels - 1, 0)
        octaves = exponents >> self.steps.bit_length() - 1
        down = np.minimum(octaves.max(initial=0) - octaves, 40)
        values = np.maximum(_powers()[(exponents & self.steps - 1) * (_FINEST // self.steps)] >> down, 1)
        return np.where(self.levels > 0, values, 0)

    def rate(self, counts: np.ndarray) -> float:
        """Bits of a message with these counts by this table."""
        kept, frequencies = counts[counts > 0], self.frequencies[counts > 0]
        return float(kept.sum() * np.log2(max(self.frequencies.sum(), 1)) - (kept * np.log2(frequencies)).sum())


def fit_table(counts: np.ndarray) -> Table:
    """The table for these counts, in steps as fine as the length of the message pays for."""
    kinds, total = max(int((counts > 0).sum()), 1), int(counts.sum())
    fine = 0.2 * math.sqrt(total / kinds)  # where another bit an entry costs what the error of a step does
    steps = 1 << min(max(round(math.log2(max(fine, 1))), 0), 6)
    levels = np.where(counts > 0, 1 + np.rint(steps * np.log2(np.maximum(counts, 1))), 0)
    return Table(levels.astype(np.int64), steps)


def _differences(table: Table, before: Table | None) -> np.ndarray:
    """What is written: each level less the one before, and less the same difference in the table before."""
    there = np.flatnonzero(table.levels)
    levels = table.levels[there] - (0 if before is None else _filled(before, table.steps)[there])
    changes = levels.copy()
    changes[1:] -= levels[:-1]
    return (changes << 1) ^ (changes >> 63)  # 0, -1, 1, -2, ... in the order of their sizes


def _filled(table: Table, steps: int) -> np.ndarray:
    """Levels in other steps; where there is none, that of the symbol before."""
    there = table.levels > 0
    last = np.maximum.accumulate(np.where(there, np.arange(len(there)), 0))
    levels = table.levels[last]
    return np.where(levels > 0, (levels - 1) * steps // table.steps + 1, 0)


@functools.lru_cache(maxsize=256)  # what was weighed is written next; tables are told apart by identity
def _written(table: Table, before: Table | None) -> tuple[int, int, np.ndarray]:
    """The bits after the first five, the order of the codes, and the numbers to write."""
    numbers = np.zeros(len(table.levels), np.int64)
    there = table.levels > 0
    gaps = not there.all()
    numbers[there] = _differences(table, before) + gaps
    return *shortest_golomb(numbers, _ORDERS), numbers


def table_nbits(table: Table, before: Table | None) -> int:
    """How many bits :func:`write_table` takes."""
    kinds = [None] if before is None else [None, before]
    return 8 + min(_written(table, other)[0] for other in kinds)


def write_table(table: Table, before: Table | None, header: HeaderWriter) -> None:
    """Append a table; of the one before it only the difference is written, where that is less."""
    alone = _written(table, None)
    beside = None if before is None else _written(table, before)
    refers = beside is not None and beside[0] < alone[0]
    _, order, numbers = beside if beside is not None and refers else alone
    header.number(table.steps.bit_length() - 1, 3)
    header.number(order, 3)
    header.number(not (table.levels > 0).all(), 1)
    header.number(refers, 1)
    for number in numbers.tolist():
        header.golomb(number, order)


def read_table(symbols: int, before: Table | None, header: HeaderReader) -> Table:
    """What :func:`write_table` wrote.

    Raises:
      ValueError: for levels that no table has.
    """
    steps, order, gaps, refers = 1 << header.number(3), header.number(3), header.number(1), header.number(1)
    if steps > _FINEST or (refers and before is None):
        raise ValueError("found a table of frequencies that refers to none, or in steps too fine")
    reference = _filled(before, steps).tolist() if refers and before is not None else [0] * symbols
    levels, last = [], 0
    for at, written in enumerate(header.golombs(symbols, order)):
        number = written - gaps
        if number < 0:
            levels.append(0)
            continue
        last += -(number + 1 >> 1) if number & 1 else number >> 1
        levels.append(last + reference[at])
        if not 0 < levels[-1] <= _MOST_LEVELS:
            raise ValueError(f"found the level {levels[-1]} in a table of frequencies, expected 1 to {_MOST_LEVELS}")
    return Table(np.array(levels, np.int64), steps)
