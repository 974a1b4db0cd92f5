"""K-means of blocks: one codebook of vectors for arrays whose blocks are its words, as product quantization has it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jcompress.formats.codebook import row_totals
from jcompress.numeric.pieces import totals

_PER_WORD, _SPANS, _UNROLLED, _LONG, _FALL, _FEW = 256, 64, 64, 32, 1e-3, 1 << 16
_WHOLE = 1 << 20
"""Rows a word that rounds look at; spans of an axis; terms in a kernel, and in a sum; the least fall of the error;
scores that are few; rows that are looked at in one piece, which is faster."""

Rows = list[jax.Array]
Shown = list[jax.Array] | None


@partial(jax.jit, static_argnames=("clusters", "iterations"))
def fitted(rows: Rows, shown: Shown, clusters: int, iterations: int) -> jax.Array:
    """The words, float32 (clusters, d), that Lloyd's algorithm finds for the rows of several arrays.

    Rounds look at 256 rows a word, spread over the arrays, until the squared error falls by less than 1e-3 of itself;
    of fewer rows two more follow. A word that no row is nearest to is put beside the one with the largest error.
    Beside the start, which is some of the rows, sums over rows are all that is computed, so these alone cross devices.

    Args:
      rows: float32 arrays (..., d).
      shown: for each, which entries count; or None for all.
      clusters: the number of words.
      iterations: the most rounds.
    """
    part = [_sample(x, rows, clusters) for x in rows]
    seen = None if shown is None else [_sample(x, rows, clusters) for x in shown]
    start = (jnp.int32(0), _start(rows, shown, clusters), jnp.float32(jnp.inf), jnp.array(True))

    def round_(state: tuple) -> tuple:
        number, words, before, _ = state
        words, error = _round(words, part, seen, number)
        return number + 1, words, error, error < before * (1 - _FALL)

    def goes_on(state: tuple) -> jax.Array:
        return (state[0] < iterations) & (state[3] | (state[0] < 4))

    words = lax.while_loop(goes_on, round_, start)[1]
    last = min(iterations, 2) if _total(rows) <= _PER_WORD * clusters else 0
    return lax.fori_loop(0, last, lambda _, words: _means(words, _all(words, rows, shown)), words)


def assigned(rows: jax.Array, shown: jax.Array | None, words: jax.Array) -> jax.Array:
    """The number of the nearest word of each row, int32 (...)."""
    x, seen = _planes(rows, shown)
    return _nearest(x, seen, words)[0]


def centred(words: jax.Array, rows: Rows, shown: Shown, places: Rows) -> jax.Array:
    """The means of the rows that have each word; a word without rows stays."""
    found = [
        row_totals(x, place, len(words), None if shown is None else shown[i])
        for i, (x, place) in enumerate(zip(rows, places, strict=True))
        if x.size
    ]
    return _means(words, (*(sum(column) for column in zip(*found, strict=True)), None)) if found else words


def _round(words: jax.Array, rows: Rows, shown: Shown, number: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The means of the rows nearest to each word, and the squared error that the words had."""
    clusters, d = words.shape
    found = _, count, error = _all(words, rows, shown)
    means = _means(words, found)
    # The words that nobody chose, and those that have most to gain from a second one, in pairs.
    empty, sizes = jnp.max(count, axis=1) == 0, jnp.max(count, axis=1)
    vacant = jnp.argsort(~empty)
    worst = jnp.argsort(-jnp.where(empty, -1.0, error))
    splits = (jnp.arange(clusters) < empty.sum()) & (error[worst] > 0)
    spread = jnp.sqrt(error / jnp.maximum(sizes * d, 1))[worst, None]
    turn = jnp.arange(clusters * d, dtype=jnp.uint32).reshape(clusters, d) * jnp.uint32(2654435761)
    sign = jnp.where(((turn + number.astype(jnp.uint32) * jnp.uint32(40503)) >> 15) & 1, 0.5, -0.5)
    beside = jnp.where(splits[:, None], means[worst] + sign * spread, means[vacant])
    moved = jnp.where(splits[:, None], means[worst] - sign * spread, means[worst])
    return means.at[worst].set(moved).at[jnp.where(splits, vacant, clusters)].set(beside, mode="drop"), error.sum()


def _means(words: jax.Array, found: tuple[Any, ...]) -> jax.Array:
    total, count, _ = found
    return jnp.where(count > 0, total / jnp.maximum(count, 1), words)


def _all(words: jax.Array, rows: Rows, shown: Shown) -> tuple[jax.Array, ...]:
    """What :func:`_sums` gives, of all arrays."""
    found = [_sums(x, None if shown is None else shown[i], words) for i, x in enumerate(rows) if x.size]
    return tuple(sum(column) for column in zip(*found, strict=True))


def _sums(rows: jax.Array, shown: jax.Array | None, words: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of the rows nearest to each word: sum (clusters, d), number (clusters, 1 or d), squared error (clusters,)."""

    def piece(x: jax.Array, *where: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        planes, seen = _planes(x, where[0] if where else None)
        place, score = _nearest(planes, seen, words)
        error = jnp.maximum(score + jnp.sum(jnp.square(planes), axis=0), 0)
        total, count = row_totals(jnp.where(where[0], x, 0) if where else x, place, len(words), *where)
        return total, count, jnp.zeros(len(words), jnp.float32).at[place].add(error, mode="drop")

    if rows.size <= _WHOLE * rows.shape[-1]:
        return piece(rows, *([] if shown is None else [shown]))
    lead = rows[..., 0]
    return totals(lambda _, *rest: piece(*rest), lead, rows, *([] if shown is None else [shown]))


def _planes(rows: jax.Array, shown: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
    """The entries of rows as planes (d, ...), zero where they do not count, and which ones count."""
    if shown is not None:
        rows = jnp.where(shown, rows, 0)
    # Written out: else every sum over a row would read it across.
    planes = lax.optimization_barrier(jnp.moveaxis(rows, -1, 0))
    return planes, None if shown is None else jnp.moveaxis(shown, -1, 0).astype(jnp.float32)


def _nearest(x: jax.Array, seen: jax.Array | None, words: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The number of the nearest word, and the squared distance to it less the row's own square.

    Words are compared one after the other, some of them in one kernel: on a CPU ``argmin`` takes ten times as long.
    """
    clusters, d = words.shape
    if x[0].size * clusters <= _FEW:  # not worth the time to compile
        squares = jnp.square(words)
        own = jnp.tensordot(squares, seen, 1, precision="highest") if seen is not None else squares.sum(1)
        own = own if seen is not None else own.reshape(-1, *[1] * (x.ndim - 1))
        scores = own - 2 * jnp.tensordot(words, x, 1, precision="highest")
        return jnp.argmin(scores, axis=0).astype(jnp.int32), jnp.min(scores, axis=0)
    step = min(max(_UNROLLED // d, 4), clusters)
    padding = -clusters % step
    words = jnp.pad(words, [(0, padding), (0, 0)])
    squares = jnp.pad(jnp.sum(jnp.square(words), axis=1)[:clusters], (0, padding), constant_values=jnp.inf)

    def chunk(i: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        best, place = state
        own = lax.dynamic_slice_in_dim(words, i * step, step)
        offset = lax.dynamic_slice_in_dim(squares, i * step, step)
        for u, score in enumerate(_scores(x, seen, own, offset)):
            place = jnp.where(score < best, i * step + u, place)
            best = jnp.minimum(score, best)
        return best, place

    start = jnp.full(x.shape[1:], jnp.inf, jnp.float32), jnp.zeros(x.shape[1:], jnp.int32)
    best, place = lax.fori_loop(0, (clusters + padding) // step, chunk, start)
    return place, best


def _scores(x: jax.Array, seen: jax.Array | None, words: jax.Array, squares: jax.Array) -> list[jax.Array]:
    """Squared distances less the rows' own squares, of a few words."""
    step, d = words.shape
    if d > _LONG or seen is not None:
        inner = -2 * jnp.tensordot(words, x, 1, precision="highest")
        if seen is None:
            return [inner[u] + squares[u] for u in range(step)]
        own = jnp.tensordot(jnp.square(words), seen, 1, precision="highest")
        return [jnp.where(squares[u] < jnp.inf, inner[u] + own[u], jnp.inf) for u in range(step)]
    found = []
    for u in range(step):
        score = squares[u]
        for j in range(d):
            score = score - 2 * words[u, j] * x[j]
        found.append(score)
    return found


def _sample(x: jax.Array, rows: Rows, clusters: int) -> jax.Array:
    """A part of an array, 256 rows a word of all arrays: the beginnings of up to 64 spans of its longest axis."""
    total = _total(rows)
    if total <= _PER_WORD * clusters or not x.size:
        return x
    axis = int(np.argmax(x.shape[:-1]))
    parts = math.gcd(x.shape[axis], _SPANS)
    span = x.shape[axis] // parts
    kept = max(math.ceil(span * _PER_WORD * clusters / total), 1)
    split = x.reshape(*x.shape[:axis], parts, span, *x.shape[axis + 1 :])
    return lax.slice_in_dim(split, 0, kept, axis=axis + 1)


def _total(rows: Rows) -> int:
    """How many rows there are in all arrays."""
    return sum(math.prod(x.shape[:-1]) for x in rows)


def _start(rows: Rows, shown: Shown, clusters: int) -> jax.Array:
    """Rows spread over all arrays; by the golden section, so that no period of an array meets that of the places."""
    sizes = [math.prod(x.shape[:-1]) for x in rows]
    places = np.sort((np.arange(clusters) * 0.6180339887498949 % 1 * sum(sizes)).astype(np.int64))
    found, first = [], 0
    for i, (x, size) in enumerate(zip(rows, sizes, strict=True)):
        own = places[(places >= first) & (places < first + size)] - first
        at = np.unravel_index(own, x.shape[:-1]) if size else (own,) * (x.ndim - 1)
        row = x[at]
        found.append(row if shown is None else jnp.where(shown[i][at], row, 0))
        first += size
    return jnp.concatenate(found).astype(jnp.float32)


def check_block(path: str, block: Sequence[int], shape: tuple[int, ...], name: str = "KMeans") -> None:
    """Raise if blocks do not tile an array."""
    last = shape[max(len(shape) - len(block), 0) :]
    if len(last) < len(block) or any(n % b for n, b in zip(last, block, strict=True)):
        fits = tuple(math.gcd(n, b) for n, b in zip(last, block, strict=False))
        fix = f"use block={fits}" if last and math.prod(fits) > 1 else "choose one that does, or another method"
        raise ValueError(
            f"{path}: {name} found block={tuple(block)}, which does not tile the last axes of shape {shape}; {fix}"
        )
