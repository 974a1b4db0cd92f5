"""The tokens of an array parted by the classes of a model, and put together again as a decoder does.

The tokens of a class follow one another in its own queue, which is coded as a whole. Where a class depends on tokens
before, a decoder has all queues, and takes from them what it finds to be due: by rows, or along the rows by columns.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from jcompress.numeric import dependent
from jcompress.numeric.grids import Grid
from jcompress.numeric.models import ABOVE, COLUMNS, LEFT, ONE, ROWS, STATE, Model

_WIDE = 192


def turned(tokens: np.ndarray, grid: Grid) -> np.ndarray:
    """The tokens of the transposed array, where all entries are there."""
    return np.ascontiguousarray(tokens.reshape(grid.rows, grid.columns).T).reshape(-1)


def parted(tokens: np.ndarray, grid: Grid, model: Model, low: int) -> list[np.ndarray]:
    """The tokens of each class in the order in which a decoder takes them; ``low`` is the number of token 0."""
    if model.kind == ONE:
        return [tokens]
    if _is_labelled(grid, model):
        return [tokens.reshape(grid.rows, -1)[place].reshape(-1) for place in _places(model)]
    if model.kind == LEFT:
        tokens, grid = turned(tokens, grid), grid.turned()
    classes = _classes(tokens, grid, model, low)
    if model.kind == STATE:
        tokens, classes = (_by_columns(x, grid) for x in (tokens, classes))
    return [tokens[classes == c] for c in range(len(model.tables))]


def _is_labelled(grid: Grid, model: Model) -> bool:
    """Whether classes are whole rows or whole columns."""
    return model.kind in (ROWS, COLUMNS) and grid.where is None


def _places(model: Model) -> Iterator[Any]:
    """The rows or columns of each class, as an index."""
    for c in range(len(model.tables)):
        mask = model.labels == c
        yield mask if model.kind == ROWS else (slice(None), mask)


def _classes(tokens: np.ndarray, grid: Grid, model: Model, low: int) -> np.ndarray:
    if model.kind == ROWS:
        return grid.by_rows(model.labels, 0, grid.rows)
    if model.kind == COLUMNS:
        return grid.by_columns(model.labels, 0, grid.rows)
    if model.kind == STATE:
        return model.rows * quantizers(tokens, grid, low) + grid.by_rows(model.every_label(grid), 0, grid.rows)
    first = np.full(grid.columns, model.start, np.uint8)
    before = np.concatenate([first, model.relative[tokens[: -grid.columns or None]]])[: tokens.size]
    return model.rows * before + grid.by_rows(model.every_label(grid), 0, grid.rows)


def sizes(grid: Grid, model: Model) -> list[int]:
    """How many tokens there are of each class of rows or columns."""
    if model.kind == ONE:
        return [grid.size]
    if model.kind == ROWS:
        counts = np.diff(grid.starts)
    else:
        counts = np.full(grid.columns, grid.rows) if grid.where is None else np.count_nonzero(grid.where, axis=0)
    return [int(counts[model.labels == c].sum()) for c in range(len(model.tables))]


def quantizers(tokens: np.ndarray, grid: Grid, low: int) -> np.ndarray:
    """Which quantizer of a trellis each token is of, uint8. What is not there counts as an even number."""
    odd = (tokens & 1 ^ (low & 1)).astype(np.uint8)
    if grid.where is None:
        return dependent.quantizers(odd.reshape(grid.rows, -1), grid.states).astype(np.uint8).reshape(-1)
    dense = np.zeros((grid.rows, grid.columns), np.uint8)
    dense[grid.where] = odd
    return dependent.quantizers(dense, grid.states).astype(np.uint8)[grid.where]


def _by_columns(x: np.ndarray, grid: Grid) -> np.ndarray:
    if grid.where is None:
        return turned(x, grid)
    dense = np.zeros((grid.rows, grid.columns), x.dtype)
    dense[grid.where] = x
    return dense.T[grid.where.T]


class Queues:
    """Takes tokens from the queues of their classes.

    Raises:
      ValueError: where a queue is too short, or at the end too long.
    """

    def __init__(self, queues: list[np.ndarray], dtype: np.dtype) -> None:
        self._all = np.concatenate(queues).astype(dtype)
        self._at = np.cumsum([0, *map(len, queues)])
        self._ends, self._at = self._at[1:], self._at[:-1].copy()

    def take(self, classes: np.ndarray) -> np.ndarray:
        """The next tokens of these classes."""
        order = np.argsort(classes, kind="stable")
        ends = self._at + np.bincount(classes, minlength=len(self._at))
        found = np.empty(len(classes), self._all.dtype)
        pieces = [self._all[a:b] for a, b in zip(self._at, ends, strict=True) if b > a]
        if (ends > self._ends).any():
            raise ValueError("found fewer numbers in a coded stream than its array takes")
        found[order] = np.concatenate(pieces) if pieces else found
        self._at = ends
        return found

    def close(self) -> None:
        """Check that all was taken."""
        if (self._at != self._ends).any():
            raise ValueError("found more in a coded stream than its array takes")


def joined(queues: list[np.ndarray], grid: Grid, model: Model, low: int, dtype: np.dtype) -> np.ndarray:
    """What :func:`parted` took apart.

    Raises:
      ValueError: for queues whose lengths are not those of the classes.
    """
    if model.kind == ONE:
        return queues[0].astype(dtype)
    if model.kind == LEFT:
        return turned(_row_by_row(queues, grid.turned(), model, dtype), grid.turned())
    if model.kind == ABOVE:
        return _row_by_row(queues, grid, model, dtype)
    if _is_labelled(grid, model):
        whole = np.empty((grid.rows, grid.columns), dtype)
        for place, own in zip(_places(model), queues, strict=True):
            whole[place] = own.reshape(whole[place].shape)
        return whole.reshape(-1)
    queue = Queues(queues, dtype)
    found = (
        _along_rows(queue, grid, model, low) if model.kind == STATE else queue.take(_classes(queues[0], grid, model, 0))
    )
    queue.close()
    return found


def _row_by_row(queues: list[np.ndarray], grid: Grid, model: Model, dtype: np.dtype) -> np.ndarray:
    if grid.columns >= _WIDE:
        return np.array([*_wide_rows(queues, grid, model, dtype)], dtype).reshape(-1)
    rows = _narrow_rows(queues, grid, model)
    # Bytes are made from numbers much faster than arrays are.
    return np.frombuffer(bytearray().join(map(bytes, rows)), dtype) if dtype == np.uint8 else _flat(rows, dtype)


def _flat(rows: Iterable[list[int]], dtype: np.dtype) -> np.ndarray:
    return np.fromiter(itertools.chain.from_iterable(rows), dtype)


def _wide_rows(queues: list[np.ndarray], grid: Grid, model: Model, dtype: np.dtype) -> Iterator[np.ndarray]:
    queue, before = Queues(queues, dtype), np.full(grid.columns, model.start, np.uint8)
    for label in model.every_label(grid):
        row = queue.take(model.rows * before + label)
        before = model.relative[row]
        yield row
    queue.close()


def _narrow_rows(queues: list[np.ndarray], grid: Grid, model: Model) -> Iterator[list[int]]:
    """As :func:`_wide_rows`, token by token, which is faster for few columns."""
    queue = [iter(x.tobytes() if x.dtype == np.uint8 else x.tolist()) for x in queues]
    by_label = [queue[label :: model.rows] for label in range(model.rows)]
    after = [[own[c] for c in model.relative.tolist()].__getitem__ for own in by_label]
    labels = model.every_label(grid).tolist()
    due: Iterable[Iterator[int]] = [by_label[labels[0]][model.start]] * grid.columns
    for below in [*labels[1:], 0]:
        row = list(map(next, due))  # ends early with the queue that does, and runs in C
        if len(row) < grid.columns:
            raise ValueError("found fewer numbers in a coded stream than its array takes")
        due = map(after[below], row)
        yield row
    if any(next(x, None) is not None for x in queue):
        raise ValueError("found more in a coded stream than its array takes")


def _along_rows(queue: Queues, grid: Grid, model: Model, low: int) -> np.ndarray:
    found = np.zeros((grid.rows, grid.columns), queue._all.dtype)
    labels, state = model.every_label(grid), np.zeros(grid.rows, np.int64)
    for at in range(grid.columns):
        classes = model.rows * (state & 1) + labels
        if grid.where is None:
            found[:, at] = column = queue.take(classes)
            odd = column & 1 ^ (low & 1)
        else:
            here, odd = grid.where[:, at], np.zeros(grid.rows, np.int64)
            found[here, at] = column = queue.take(classes[here])
            odd[here] = column & 1 ^ (low & 1)
        state = dependent.step(state, odd, grid.states)
    return found.reshape(-1) if grid.where is None else found[grid.where]
