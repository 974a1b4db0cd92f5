"""Models of a coded array: one table of frequencies, or one a class of numbers.

Classes are those of rows, of columns, of the number before, or of the quantizer that a trellis gives, the last two in
classes of rows or in all. Which is taken is decided by the bits that the array takes with it: its entropy, and about
what tables and labels of classes take.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np

from jcompress.numeric.grids import Grid
from jcompress.numeric.tables import Table, fit_tables

ONE, ROWS, COLUMNS, ABOVE, LEFT, STATE = range(2, 8)
"""Kinds of models as files name them; 0 and 1 are arrays that need none."""
CLASSES = (2, 4, 8)
_BINS, _ROUNDS, _FEW = 16, 3, 2048
_ENTRY, _TABLE, _LABELLED = 4.5, 20.0, 90.0
"""About the bits of an entry of a table, of a table besides, and of the table of labels, as in kernels of ResNet-20."""
_CLASS, _MORE, _PAYS = 40, 800, 0.99
"""What another class takes, the gain from a class that has twice as many tried, and the part of the bits below which
the number before is looked at within classes of rows."""


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """How the tokens of one array fall into classes.

    Attributes:
      kind: one of the kinds.
      tables: one a class.
      labels: the class of each row or column, uint8; empty where there is one.
      centre: for the number before, the token that counts as zero, and how far from it is far.
      reach: see ``centre``; 0 where only the sign counts.
    """

    kind: int
    tables: list[Table]
    labels: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.uint8))
    centre: int = 0
    reach: int = 0

    @functools.cached_property
    def label_table(self) -> Table:
        """The table that the labels are coded by."""
        return fit_tables(np.bincount(self.labels, minlength=self.rows)[None])[0]

    @property
    def contexts(self) -> int:
        """How many classes there are of what came before."""
        return {STATE: 2, ABOVE: 5 if self.reach else 3, LEFT: 5 if self.reach else 3}.get(self.kind, 1)

    @property
    def rows(self) -> int:
        """How many classes of rows there are, or of columns."""
        return len(self.tables) // self.contexts

    @property
    def start(self) -> int:
        """The class of what came before the first row, a zero."""
        return self.contexts // 2

    def every_label(self, grid: Grid) -> np.ndarray:
        """The class of each row, where there may be but one."""
        return self.labels if self.labels.size else np.zeros(grid.rows, np.uint8)

    @functools.cached_property
    def relative(self) -> np.ndarray:
        """The class of what follows each token, uint8, by its sign, or its sign and size."""
        symbols = len(self.tables[0].levels)
        return relative(np.arange(symbols), self.centre, self.reach)


def relative(tokens: np.ndarray, centre: int, reach: int) -> np.ndarray:
    """Classes of tokens by sign, 0 to 2, or by sign and size, 0 to 4."""
    tokens = tokens.astype(np.int32)
    sign = np.sign(tokens - centre)
    return (sign + 1 if reach == 0 else 2 + sign + sign * (np.abs(tokens - centre) > reach)).astype(np.uint8)


def choose(tokens: np.ndarray, symbols: int, grid: Grid, quantizers: np.ndarray | None = None) -> tuple[float, Model]:
    """About how many bits the model takes that takes the fewest, and that model.

    Args:
      tokens: of the array.
      symbols: how many there are.
      grid: where they stand.
      quantizers: 0 or 1 for each token, where a trellis says so.
    """
    counts = np.bincount(tokens, minlength=symbols)
    found = [_Candidate(Model(ONE, []), counts[None])]
    if quantizers is not None:
        found.append(_by_state(tokens, symbols, quantizers))
    if tokens.size >= _FEW and symbols > 1 and grid.rows > 1:
        rows, columns = _best_labels(*_histograms(tokens, symbols, grid))
        if quantizers is None and grid.where is None:
            turned = tokens.reshape(grid.rows, grid.columns).T.reshape(-1)
            found += _by_context(tokens, found[0], grid, (ROWS, ABOVE), rows)
            found += _by_context(turned, found[0], grid.turned(), (COLUMNS, LEFT), columns)
        else:
            found += _by_labels(tokens, symbols, grid, ROWS, rows) + _by_labels(tokens, symbols, grid, COLUMNS, columns)
            if quantizers is not None and rows is not None:
                found.append(_by_state(tokens, symbols, quantizers, rows, grid))
    best = min(found, key=lambda x: x.estimate)
    return best.estimate, dataclasses.replace(best.model, tables=fit_tables(best.counts))


@dataclasses.dataclass(frozen=True, eq=False)
class _Candidate:
    """A model without its tables, and the counts of tokens in each of its classes."""

    model: Model
    counts: np.ndarray

    @functools.cached_property
    def estimate(self) -> float:
        """About the bits, at a few for each table and each of its entries."""
        total = _rate(self.counts) + _TABLE * len(self.counts) + _ENTRY * np.count_nonzero(self.counts)
        if self.model.labels.size:
            total += _rate(np.bincount(self.model.labels)[None]) + _LABELLED
        if self.model.contexts > 1:
            total += (len(self.counts) - 1) * int(self.counts.sum()).bit_length()  # the lengths of the queues
        return total


def _by_state(
    tokens: np.ndarray, symbols: int, quantizers: np.ndarray, labels: np.ndarray | None = None, grid: Grid | None = None
) -> _Candidate:
    """Classes by the quantizer, within classes of rows."""
    classes, rows, chosen = quantizers.astype(np.int64), 1, np.zeros(0, np.uint8)
    if labels is not None and grid is not None:
        rows, chosen = int(labels.max()) + 1, labels
        classes = rows * classes + grid.by_rows(labels, 0, grid.rows)
    counts = np.bincount(classes * symbols + tokens, minlength=2 * rows * symbols).reshape(2 * rows, symbols)
    return _Candidate(Model(STATE, [], chosen), counts)


def _histograms(tokens: np.ndarray, symbols: int, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """How often tokens of each of 16 ranges stand in each row and in each column; doubles, whose products are fast."""
    counts = np.bincount(tokens, minlength=symbols)
    mass, common = np.cumsum(counts), np.argmax(counts)
    bins = np.minimum((mass - 1) * _BINS // max(int(mass[-1]), 1), _BINS - 1)
    rows, columns = np.zeros((grid.rows, _BINS)), np.zeros((grid.columns, _BINS))
    of_row, of_column = _BINS * np.arange(grid.rows), _BINS * np.arange(grid.columns)
    few, here = _few(tokens != common, grid)
    own = tokens[here]
    for first, last, part in few.slices():
        coarse = bins[own[part]]
        in_rows = few.plus_rows(coarse, of_row - _BINS * first, first, last)
        in_columns = few.plus_columns(coarse, of_column, first, last)
        rows[first:last] += np.bincount(in_rows, minlength=(last - first) * _BINS).reshape(-1, _BINS)
        columns += np.bincount(in_columns, minlength=columns.size).reshape(-1, _BINS)
    if few is not grid:
        rows[:, bins[common]] += grid.columns - rows.sum(1)
        columns[:, bins[common]] += grid.rows - columns.sum(1)
    return rows, columns


def _few(there: np.ndarray, grid: Grid) -> tuple[Grid, Any]:
    """Where those stand that are there, and an index of them, if they are a few of an array that is whole."""
    if grid.where is not None or 4 * np.count_nonzero(there) > there.size:
        return grid, slice(None)
    return Grid(grid.rows, grid.columns, there.reshape(grid.rows, -1)), np.flatnonzero(there)


def _best_labels(rows: np.ndarray, columns: np.ndarray) -> list[np.ndarray | None]:
    """A class for each row and one for each column, in as many classes as pay for their tables; None where none do."""
    both = [rows, columns]
    whole = [_rate(x.sum(0, keepdims=True)) for x in both]
    best: list[np.ndarray | None] = [None, None]
    gains, going = [0.0, 0.0], [True, True]
    for count in CLASSES:
        for i, labels in enumerate(_clusters(rows, columns, count)):
            told = whole[i] - _rate(_summed(both[i], labels, count))
            told -= _rate(np.bincount(labels, minlength=count)[None]) + _CLASS * count
            if going[i] and told > gains[i]:
                best[i], gains[i], going[i] = labels, told, told > _MORE * count
            else:
                going[i] = False
        if not any(going):
            break
    return best


def _clusters(rows: np.ndarray, columns: np.ndarray, count: int) -> list[np.ndarray]:
    """Classes of rows, and of columns, whose codes are short: each goes to the class whose code is shortest for it.

    Both at once, a few times; small arrays take their time by the call.
    """
    histograms = np.concatenate([rows, columns])
    means = histograms @ np.arange(_BINS) / np.maximum(histograms.sum(1), 1)
    parts = [slice(0, len(rows)), slice(len(rows), None)]
    labels = np.empty(len(histograms), np.uint8)
    for i, part in enumerate(parts):
        order = np.argsort(means[part], kind="stable")
        labels[part][order] = np.arange(len(order)) * count // max(len(order), 1) + i * count
    for _ in range(_ROUNDS):
        parted = _summed(histograms, labels, 2 * count) + 0.1
        lengths = -histograms @ np.log2(parted / parted.sum(1, keepdims=True)).T
        for i, part in enumerate(parts):
            labels[part] = np.argmin(lengths[part, i * count : (i + 1) * count], axis=1) + i * count
    found = []
    for i, part in enumerate(parts):
        own = labels[part] - np.uint8(i * count)
        taken = np.bincount(own, minlength=count) > 0
        found.append((np.cumsum(taken) - 1).astype(np.uint8)[own])
    return found


def _summed(histograms: np.ndarray, labels: np.ndarray, count: int) -> np.ndarray:
    """The histogram of each class."""
    return (labels == np.arange(count)[:, None]).astype(np.float64) @ histograms


def _rate(counts: np.ndarray) -> float:
    kept = np.where(counts > 0, counts, 1)
    totals = np.maximum(counts.sum(-1), 1)
    return float((counts.sum(-1) * np.log2(totals)).sum() - (counts * np.log2(kept)).sum())


def _by_labels(tokens: np.ndarray, symbols: int, grid: Grid, kind: int, labels: np.ndarray | None) -> list[_Candidate]:
    """Classes of rows or of columns, where they pay."""
    if labels is None:
        return []
    count, plus = int(labels.max()) + 1, grid.plus_rows if kind == ROWS else grid.plus_columns
    total, classes = np.zeros(count * symbols, np.int64), labels * np.int64(symbols)
    for first, last, part in grid.slices():
        total += np.bincount(plus(tokens[part], classes, first, last), minlength=total.size)
    return [_Candidate(Model(kind, [], labels), total.reshape(count, symbols))]


def _by_context(
    tokens: np.ndarray, whole: _Candidate, grid: Grid, kinds: tuple[int, int], labels: np.ndarray | None
) -> list[_Candidate]:
    """Classes of rows; of the number a row before, by its sign, and by sign and size; of both, where these pay.

    All are counted at once. ``kinds`` are that of a model by rows and that of one by the number before.
    """
    counts, (by_rows, by_before) = whole.counts[0], kinds
    symbols, centre = len(counts), int(np.argmax(counts))
    distances = np.bincount(np.abs(np.arange(symbols) - centre), counts)
    distances[0] = 0
    far = np.cumsum(distances)
    reach = max(int(np.searchsorted(far, far[-1] / 2)), 1)
    own = np.zeros(grid.rows, np.uint8) if labels is None else labels
    rows = int(own.max()) + 1
    of_row = own * np.int64(symbols)
    of_class = rows * symbols * relative(np.arange(symbols), centre, reach).astype(np.int64)
    joint = np.zeros(5 * rows * symbols, np.int64)
    before = np.concatenate([np.full(grid.columns, centre, tokens.dtype), tokens[: -grid.columns]])
    few, here = _few((tokens != centre) | (before != centre), grid)
    now, before = tokens[here], before[here]
    for first, last, part in few.slices():
        index = of_class[before[part]]
        index += now[part]
        joint += np.bincount(few.plus_rows(index, of_row, first, last), minlength=joint.size)
    fine = joint.reshape(5, rows, symbols)
    fine[2, :, centre] += np.bincount(own) * grid.columns - fine.sum((0, 2))
    coarse = np.stack([fine[0] + fine[1], fine[2], fine[3] + fine[4]])
    nothing = np.zeros(0, np.uint8)
    alone = [
        _Candidate(Model(by_before, [], nothing, centre, reach * i), x.sum(1)) for i, x in enumerate((coarse, fine))
    ]
    if labels is None:
        return alone
    found = [_Candidate(Model(by_rows, [], labels), fine.sum(0)), *alone]
    if min(x.estimate for x in alone) < _PAYS * whole.estimate:
        for i, x in enumerate((coarse, fine)):
            found.append(_Candidate(Model(by_before, [], labels, centre, reach * i), x.reshape(-1, symbols)))
    return found
