"""Models of a coded array: one table of frequencies, or one a class of rows, of columns, or of the number before.

Which is taken is decided by the bits that the array takes with it, tables and labels of classes counted.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from jcompress.numeric.grids import Grid
from jcompress.numeric.tables import Table, fit_table, table_nbits

ONE, ROWS, COLUMNS, ABOVE, LEFT = range(2, 7)
"""Kinds of models as files name them; 0 and 1 are arrays that need none."""
CLASSES = (2, 4, 8)
_BINS, _ROUNDS, _FEW, _LABELS = 16, 3, 2048, 8
_NARROW, _CALLS, _CHUNK = 512, 8192, 1 << 17


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """How the tokens of one array fall into classes.

    Attributes:
      kind: one of the kinds.
      tables: one a class.
      labels: the class of each row or column, uint8; empty for the other kinds.
      centre: for the number before, the token that counts as zero, and how far from it is far.
      reach: see ``centre``; 0 where only the sign counts.
    """

    kind: int
    tables: list[Table]
    labels: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.uint8))
    centre: int = 0
    reach: int = 0

    @property
    def label_table(self) -> Table:
        """The table that the labels are coded by."""
        return fit_table(np.bincount(self.labels, minlength=len(self.tables)))

    def classes(self, grid: Grid, first: int, last: int, before: np.ndarray) -> np.ndarray:
        """The class of each number in a chunk of rows; ``before`` are the tokens of the row above, if any."""
        if self.kind == ROWS:
            return grid.by_rows(self.labels, first, last)
        if self.kind == COLUMNS:
            return grid.by_columns(self.labels, first, last)
        if not before.size:
            return np.full(grid.columns, len(self.tables) // 2, np.uint8)
        return relative(before, self.centre, self.reach)


def relative(tokens: np.ndarray, centre: int, reach: int) -> np.ndarray:
    """Classes of tokens by sign, 0 to 2, or by sign and size, 0 to 4."""
    tokens = tokens.astype(np.int32)
    sign = np.sign(tokens - centre)
    return (sign + 1 if reach == 0 else 2 + sign + sign * (np.abs(tokens - centre) > reach)).astype(np.uint8)


def choose(tokens: np.ndarray, symbols: int, grid: Grid) -> tuple[float, Model]:
    """The model that takes the fewest bits, and how many they are about."""
    counts = np.bincount(tokens, minlength=symbols)
    found = [_weighed(Model(ONE, []), counts[None])]
    if tokens.size >= _FEW and symbols > 1 and grid.rows > 1:
        found += _by_labels(tokens, symbols, grid)
        if grid.where is None:
            found += _by_context(tokens, counts, grid, ABOVE)
            turned = tokens.reshape(grid.rows, grid.columns).T.reshape(-1)
            found += _by_context(turned, counts, grid.turned(), LEFT)
    return min(found, key=lambda pair: pair[0])


def _weighed(model: Model, counts: np.ndarray) -> tuple[float, Model]:
    """A model with its tables, and its bits."""
    tables, before, total = [], None, 0.0
    for row in counts:
        table = fit_table(row)
        total += table.rate(row) + table_nbits(table, before)
        tables.append(table)
        before = table
    model = dataclasses.replace(model, tables=tables)
    if model.labels.size:
        uses = np.bincount(model.labels, minlength=len(tables))
        total += model.label_table.rate(uses) + table_nbits(model.label_table, None)
    return total, model


def _by_labels(tokens: np.ndarray, symbols: int, grid: Grid) -> list[tuple[float, Model]]:
    """Classes of rows and of columns, the most promising number of each."""
    found = []
    for kind, histograms in zip((ROWS, COLUMNS), _histograms(tokens, symbols, grid), strict=True):
        best, gain = None, 0.0
        whole = _rate(histograms.sum(0, keepdims=True))
        for count in CLASSES:
            labels = _clusters(histograms, count)
            parted = np.stack([histograms[labels == c].sum(0) for c in range(count)])
            told = whole - _rate(parted) - _rate(np.bincount(labels, minlength=count)[None]) - _LABELS * count
            best, gain = (labels, told) if told > gain else (best, gain)
        if best is not None:
            found.append(_weighed(Model(kind, [], best), _counts(tokens, symbols, grid, Model(kind, [], best))))
    return found


def _histograms(tokens: np.ndarray, symbols: int, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """How often tokens of each of 16 ranges stand in each row and in each column."""
    mass = np.cumsum(np.bincount(tokens, minlength=symbols))
    bins = np.minimum((mass - 1) * _BINS // max(int(mass[-1]), 1), _BINS - 1)
    rows, columns = np.zeros((grid.rows, _BINS), np.int64), np.zeros((grid.columns, _BINS), np.int64)
    for first, last, part in grid.slices():
        coarse = bins[tokens[part]]
        in_rows = grid.by_rows(np.arange(grid.rows) - first, first, last) * _BINS + coarse
        in_columns = grid.by_columns(np.arange(grid.columns), first, last) * _BINS + coarse
        rows[first:last] += np.bincount(in_rows, minlength=(last - first) * _BINS).reshape(-1, _BINS)
        columns += np.bincount(in_columns, minlength=columns.size).reshape(-1, _BINS)
    return rows, columns


def _clusters(histograms: np.ndarray, count: int) -> np.ndarray:
    """Classes of rows whose codes are short: each goes to the class whose code is shortest for it, a few times."""
    weight = np.maximum(histograms.sum(1), 1)
    order = np.argsort(histograms @ np.arange(_BINS) / weight, kind="stable")
    labels = np.empty(len(histograms), np.uint8)
    labels[order] = np.arange(len(order)) * count // max(len(order), 1)
    for _ in range(_ROUNDS):
        parted = np.stack([histograms[labels == c].sum(0) for c in range(count)]) + 0.1
        labels = np.argmin(-histograms @ np.log2(parted / parted.sum(1, keepdims=True)).T, axis=1).astype(np.uint8)
    return np.unique(labels, return_inverse=True)[1].astype(np.uint8).reshape(-1)


def _rate(counts: np.ndarray) -> float:
    kept = np.where(counts > 0, counts, 1)
    totals = np.maximum(counts.sum(-1), 1)
    return float((counts.sum(-1) * np.log2(totals)).sum() - (counts * np.log2(kept)).sum())


def _counts(tokens: np.ndarray, symbols: int, grid: Grid, model: Model) -> np.ndarray:
    """How often each token occurs in each class of rows or columns."""
    count = int(model.labels.max()) + 1
    total = np.zeros(count * symbols, np.int64)
    for first, last, part in grid.slices():
        classes = model.classes(grid, first, last, tokens[:0])
        total += np.bincount(classes * np.int64(symbols) + tokens[part], minlength=total.size)
    return total.reshape(count, symbols)


def _by_context(tokens: np.ndarray, counts: np.ndarray, grid: Grid, kind: int) -> list[tuple[float, Model]]:
    """Classes by the number a row before: by its sign, and by sign and size."""
    if grid.columns < _NARROW and grid.rows > _CALLS:
        return []  # a decoder goes row by row
    symbols, centre = len(counts), int(np.argmax(counts))
    distances = np.bincount(np.abs(np.arange(symbols) - centre), counts)
    distances[0] = 0
    far = np.cumsum(distances)
    reach = max(int(np.searchsorted(far, far[-1] / 2)), 1)
    joint = np.zeros(5 * symbols, np.int64)
    joint[2 * symbols :][:symbols] += np.bincount(tokens[: grid.columns], minlength=symbols)
    for start in range(grid.columns, tokens.size, _CHUNK):
        now = tokens[start : start + _CHUNK]
        before = relative(tokens[start - grid.columns : start - grid.columns + now.size], centre, reach)
        joint += np.bincount(before * np.int64(symbols) + now, minlength=joint.size)
    fine = joint.reshape(5, symbols)
    coarse = np.stack([fine[0] + fine[1], fine[2], fine[3] + fine[4]])
    return [
        _weighed(Model(kind, [], centre=centre, reach=0), coarse),
        _weighed(Model(kind, [], centre=centre, reach=reach), fine),
    ]
