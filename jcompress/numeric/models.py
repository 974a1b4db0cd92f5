"""Models of a coded array: one table of frequencies, or one a class of numbers.

Classes are those of rows, of columns, of the number before, or of the quantizer that a trellis gives, the last two in
classes of rows or in all. Which is taken is decided by the bits that the array takes with it, tables and labels of
classes counted.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from jcompress.numeric.grids import Grid
from jcompress.numeric.tables import Table, fit_tables, tables_nbits, tables_rate

ONE, ROWS, COLUMNS, ABOVE, LEFT, STATE = range(2, 8)
"""Kinds of models as files name them; 0 and 1 are arrays that need none."""
CLASSES = (2, 4, 8)
_BINS, _ROUNDS, _FEW, _LABELS = 16, 3, 2048, 8
_WEIGHED, _ENTRY, _PAYS = 2, 3.0, 0.99
"""How many candidates get tables, about the bits of an entry, and where the number before is looked at more closely."""


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
    """The model that takes the fewest bits, and how many they are about.

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
        labelled = _by_labels(tokens, symbols, grid, quantizers)
        found += labelled
        if quantizers is None and grid.where is None:
            turned = tokens.reshape(grid.rows, grid.columns).T.reshape(-1)
            for kind, by, own, place in ((ABOVE, ROWS, tokens, grid), (LEFT, COLUMNS, turned, grid.turned())):
                alone = _by_context(own, counts, place, kind)
                found += alone
                if min(x.estimate for x in alone) < _PAYS * found[0].estimate:
                    labels = [x.model.labels for x in labelled if x.model.kind == by]
                    found += [x for each in labels for x in _by_context(own, counts, place, kind, each)]
    likely = sorted(found, key=lambda x: x.estimate)[:_WEIGHED]
    return min((_weighed(x.model, x.counts) for x in likely), key=lambda pair: pair[0])


@dataclasses.dataclass(frozen=True, eq=False)
class _Candidate:
    """A model without its tables, and the counts of tokens in each of its classes."""

    model: Model
    counts: np.ndarray

    @functools.cached_property
    def estimate(self) -> float:
        """About the bits, at a few for each entry of the tables."""
        labels = _rate(np.bincount(self.model.labels)[None]) if self.model.labels.size else 0.0
        return _rate(self.counts) + _ENTRY * np.count_nonzero(self.counts) + labels


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


def _weighed(model: Model, counts: np.ndarray) -> tuple[float, Model]:
    """A model with its tables, and its bits."""
    tables = fit_tables(counts)
    total = tables_rate(tables, counts) + tables_nbits(tables)
    model = dataclasses.replace(model, tables=tables)
    if model.labels.size:
        uses = np.bincount(model.labels, minlength=model.rows)
        total += tables_rate([model.label_table], uses[None]) + tables_nbits([model.label_table])
    if model.contexts > 1:
        total += (len(tables) - 1) * int(counts.sum()).bit_length()  # the lengths of the queues
    return total, model


def _by_labels(tokens: np.ndarray, symbols: int, grid: Grid, quantizers: np.ndarray | None) -> list[_Candidate]:
    """Classes of rows and of columns, the most promising number of each."""
    found, histograms = [], _histograms(tokens, symbols, grid)
    for kind, labels in zip((ROWS, COLUMNS), _best_labels(*histograms), strict=True):
        if labels is not None:
            found.append(_Candidate(Model(kind, [], labels), _counts(tokens, symbols, grid, kind, labels)))
            if quantizers is not None and kind == ROWS:
                found.append(_by_state(tokens, symbols, quantizers, labels, grid))
    return found


def _histograms(tokens: np.ndarray, symbols: int, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """How often tokens of each of 16 ranges stand in each row and in each column; doubles, whose products are fast."""
    mass = np.cumsum(np.bincount(tokens, minlength=symbols))
    bins = np.minimum((mass - 1) * _BINS // max(int(mass[-1]), 1), _BINS - 1)
    rows, columns = np.zeros((grid.rows, _BINS)), np.zeros((grid.columns, _BINS))
    of_row, of_column = _BINS * np.arange(grid.rows), _BINS * np.arange(grid.columns)
    for first, last, part in grid.slices():
        coarse = bins[tokens[part]]
        in_rows = grid.plus_rows(coarse, of_row - _BINS * first, first, last)
        in_columns = grid.plus_columns(coarse, of_column, first, last)
        rows[first:last] += np.bincount(in_rows, minlength=(last - first) * _BINS).reshape(-1, _BINS)
        columns += np.bincount(in_columns, minlength=columns.size).reshape(-1, _BINS)
    return rows, columns


def _best_labels(rows: np.ndarray, columns: np.ndarray) -> list[np.ndarray | None]:
    """A class for each row and one for each column, in as many classes as pay for their tables; None where none do."""
    both = [rows, columns]
    whole = [_rate(x.sum(0, keepdims=True)) for x in both]
    best: list[np.ndarray | None] = [None, None]
    gains, going = [0.0, 0.0], [True, True]
    for count in CLASSES:
        for i, labels in enumerate(_clusters(rows, columns, count)):
            told = whole[i] - _rate(_summed(both[i], labels, count))
            told -= _rate(np.bincount(labels, minlength=count)[None]) + _LABELS * count
            going[i] = going[i] and told > gains[i]
            if going[i]:
                best[i], gains[i] = labels, told
        if not any(going):
            break  # more classes serve no better
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


def _counts(tokens: np.ndarray, symbols: int, grid: Grid, kind: int, labels: np.ndarray) -> np.ndarray:
    """How often each token occurs in each class of rows or columns."""
    count, plus = int(labels.max()) + 1, grid.plus_rows if kind == ROWS else grid.plus_columns
    total, classes = np.zeros(count * symbols, np.int64), labels * np.int64(symbols)
    for first, last, part in grid.slices():
        total += np.bincount(plus(tokens[part], classes, first, last), minlength=total.size)
    return total.reshape(count, symbols)


def _by_context(
    tokens: np.ndarray, counts: np.ndarray, grid: Grid, kind: int, labels: np.ndarray | None = None
) -> list[_Candidate]:
    """Classes by the number a row before, by its sign, and by sign and size, within classes of rows."""
    symbols, centre = len(counts), int(np.argmax(counts))
    distances = np.bincount(np.abs(np.arange(symbols) - centre), counts)
    distances[0] = 0
    far = np.cumsum(distances)
    reach = max(int(np.searchsorted(far, far[-1] / 2)), 1)
    own = np.zeros(0, np.uint8) if labels is None else labels
    rows = int(own.max(initial=0)) + 1
    of_row, of_class = (
        own * np.int64(symbols),
        rows * symbols * relative(np.arange(symbols), centre, reach).astype(np.int64),
    )
    joint = np.zeros(5 * rows * symbols, np.int64)
    before = np.concatenate([np.full(grid.columns, centre, tokens.dtype), tokens[: -grid.columns]])
    for first, last, part in grid.slices():
        index = of_class[before[part]]
        index += tokens[part]
        index = grid.plus_rows(index, of_row, first, last) if own.size else index
        joint += np.bincount(index, minlength=joint.size)
    fine = joint.reshape(5, rows, symbols)
    coarse = np.stack([fine[0] + fine[1], fine[2], fine[3] + fine[4]])
    return [
        _Candidate(Model(kind, [], own, centre=centre, reach=0), coarse.reshape(-1, symbols)),
        _Candidate(Model(kind, [], own, centre=centre, reach=reach), fine.reshape(-1, symbols)),
    ]
