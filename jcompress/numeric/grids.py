"""Where numbers stand in their array: rows and columns, walked in chunks of whole rows."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator

import numpy as np

_CHUNK = 1 << 17


@dataclasses.dataclass(frozen=True, eq=False)
class Grid:
    """Numbers in the order of an array, of which some may be left out.

    Attributes:
      rows: their number.
      columns: their number.
      where: the entries that are there, bool, shape (rows, columns); None for all.
      states: of the trellis that integers follow along their rows; 0 for none.
    """

    rows: int
    columns: int
    where: np.ndarray | None = None
    states: int = 0

    @functools.cached_property
    def starts(self) -> np.ndarray:
        """How many numbers come before each row, and all in the end; int64, shape (rows + 1,)."""
        counts = np.full(self.rows, self.columns) if self.where is None else np.count_nonzero(self.where, axis=1)
        return np.concatenate([[0], np.cumsum(counts)])

    @property
    def size(self) -> int:
        """How many numbers there are."""
        return int(self.starts[-1])

    def chunks(self) -> list[tuple[int, int]]:
        """First and last row of each chunk."""
        step = max(_CHUNK // max(self.columns, 1), 1)
        edges = [*range(0, self.rows, step), self.rows]
        return list(itertools.pairwise(edges))

    def by_rows(self, labels: np.ndarray, first: int, last: int) -> np.ndarray:
        """The label of the row of each number in a chunk."""
        return np.repeat(labels[first:last], np.diff(self.starts[first : last + 1]))

    def by_columns(self, labels: np.ndarray, first: int, last: int) -> np.ndarray:
        """The label of the column of each number in a chunk."""
        if self.where is None:
            return np.tile(labels, last - first)
        return labels[np.flatnonzero(self.where[first:last]) % self.columns]

    def plus_rows(self, numbers: np.ndarray, of_row: np.ndarray, first: int, last: int) -> np.ndarray:
        """The numbers of a chunk, int64, each with what is added to its row; ``of_row`` is that of all rows."""
        if self.where is None:
            return (numbers.reshape(last - first, -1) + of_row[first:last, None]).reshape(-1)
        return numbers + self.by_rows(of_row, first, last)

    def plus_columns(self, numbers: np.ndarray, of_column: np.ndarray, first: int, last: int) -> np.ndarray:
        """The same by columns."""
        if self.where is None:
            return (numbers.reshape(last - first, -1) + of_column).reshape(-1)
        return numbers + self.by_columns(of_column, first, last)

    def slices(self) -> Iterator[tuple[int, int, slice]]:
        """First and last row of each chunk, and which of the numbers stand there."""
        for first, last in self.chunks():
            yield first, last, slice(int(self.starts[first]), int(self.starts[last]))

    def turned(self) -> Grid:
        """The grid of the transposed array, where all entries are there."""
        return Grid(self.columns, self.rows)


def grid_of(shape: tuple[int, ...], where: np.ndarray | None = None, states: int = 0) -> Grid:
    """An array as a matrix, its axes parted where rows and columns are nearest; trellises go along the last."""
    cuts = [(max(math.prod(shape[:at]), math.prod(shape[at:])), at) for at in range(1, len(shape))]
    at = min(cuts)[1] if cuts else 0
    at = max(len(shape) - 1, 0) if states else at
    rows, columns = math.prod(shape[:at]), math.prod(shape[at:])
    return Grid(rows, columns, None if where is None else np.asarray(where).reshape(rows, columns), states)
