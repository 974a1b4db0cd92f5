"""Tables of frequencies as they are stored: logarithms of counts in small steps, so that a table costs little.

A count ``n`` is written as the level ``1 + round(r log2 n)``, 0 for none, where ``r`` is 1, 2, 4, ..., 64: as many
steps an octave as pay for themselves. Frequencies follow from levels in integers, the same on every machine.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

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
        return _frequencies(*_stacked([self]))[0]


def _stacked(tables: Sequence[Table]) -> tuple[np.ndarray, np.ndarray]:
    """Levels (tables, symbols) and steps (tables, 1)."""
    return np.stack([x.levels for x in tables]), np.array([[x.steps] for x in tables])


def _frequencies(levels: np.ndarray, steps: np.ndarray) -> np.ndarray:
    exponents = np.maximum(levels - 1, 0)
    octaves = exponents // steps
    down = np.minimum(octaves.max(1, keepdims=True, initial=0) - octaves, 40)
    values = np.maximum(_powers()[(exponents & steps - 1) * (_FINEST // steps)] >> down, 1)
    there = levels > 0
    return np.where(there.any(1, keepdims=True), np.where(there, values, 0), 1)


def fit_tables(counts: np.ndarray) -> list[Table]:
    """A table for each row of counts, in steps as fine as the length of its message pays for."""
    kinds = np.maximum(np.count_nonzero(counts, axis=1), 1)
    fine = 0.2 * np.sqrt(counts.sum(1) / kinds)  # where another bit an entry costs what the error of a step does
    steps = 1 << np.clip(np.rint(np.log2(np.maximum(fine, 1))), 0, 6).astype(np.int64)
    levels = np.where(counts > 0, 1 + np.rint(steps[:, None] * np.log2(np.maximum(counts, 1))), 0).astype(np.int64)
    return [Table(*pair) for pair in zip(levels, steps.tolist(), strict=True)]


class _Written(NamedTuple):
    """A table as it is written: bits and order of its codes, their numbers, and whether it refers to the one before."""

    nbits: int
    order: int
    numbers: np.ndarray
    refers: bool


def _written(tables: Sequence[Table]) -> list[_Written]:
    """Each table alone, or the difference from the one before it, whichever takes fewer bits."""
    levels, steps = _stacked(tables)
    alone = _differences(levels, levels)
    beside = _differences(levels[1:], levels[1:] - _filled(levels[:-1], steps[:-1], steps[1:]))
    both = np.concatenate([alone, beside])
    codes = [*zip(*shortest_golomb(both, _ORDERS), both, strict=True)]
    found = [_Written(*codes[0], False)]
    for first, second in zip(codes[1 : len(tables)], codes[len(tables) :], strict=True):
        found.append(_Written(*second, True) if second[0] < first[0] else _Written(*first, False))
    return found


def _differences(levels: np.ndarray, values: np.ndarray) -> np.ndarray:
    """What is written of each table: values less those of the symbol before that is there; 0 for one that is not."""
    there = levels > 0
    last = np.maximum.accumulate(np.where(there, np.arange(levels.shape[1]), -1), axis=1)
    before = np.concatenate([np.full((len(levels), 1), -1), last[:, :-1]], axis=1)
    known = np.where(before >= 0, np.take_along_axis(values, np.maximum(before, 0), axis=1), 0)
    changes = values - known
    # 0, -1, 1, -2, ... in the order of their sizes, behind the 0 of what is not there.
    return np.where(there, ((changes << 1) ^ (changes >> 63)) + ~there.all(1, keepdims=True), 0)


def _filled(levels: np.ndarray, steps: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Levels in other steps; where there is none, that of the symbol before."""
    last = np.maximum.accumulate(np.where(levels > 0, np.arange(levels.shape[1]), 0), axis=1)
    found = np.take_along_axis(levels, last, axis=1)
    return np.where(found > 0, (found - 1) * wanted // steps + 1, 0)


def write_tables(tables: Sequence[Table], header: HeaderWriter) -> None:
    """Append tables of as many symbols each; of the one before only the difference is written, where that is less."""
    for table, written in zip(tables, _written(tables), strict=True):
        header.number(table.steps.bit_length() - 1, 3)
        header.number(written.order, 3)
        header.number(not (table.levels > 0).all(), 1)
        header.number(written.refers, 1)
        header.golombs(written.numbers.tolist(), written.order)


def read_table(symbols: int, before: Table | None, header: HeaderReader) -> Table:
    """One of the tables that :func:`write_tables` wrote.

    Raises:
      ValueError: for levels that no table has.
    """
    steps, order, gaps, refers = 1 << header.number(3), header.number(3), header.number(1), header.number(1)
    if steps > _FINEST or (refers and before is None):
        raise ValueError("found a table of frequencies that refers to none, or in steps too fine")
    reference = [0] * symbols
    if refers and before is not None:
        reference = _filled(*_stacked([before]), np.array([[steps]]))[0].tolist()
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
