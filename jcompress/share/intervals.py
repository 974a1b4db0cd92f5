"""The best clusters of ordered points: intervals, by a dynamic program that runs under ``jit``."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Moments(NamedTuple):
    """Weight, mean, and squared error around it, of some points; float32 arrays of one shape."""

    weight: jax.Array
    mean: jax.Array
    error: jax.Array

    def joined(self, other: Moments) -> Moments:
        """The moments of both together (Chan et al. 1979), to the bit where one has no weight."""
        weight = self.weight + other.weight
        apart, safe = other.mean - self.mean, jnp.maximum(weight, jnp.finfo(jnp.float32).tiny)
        mean = jnp.where(
            self.weight >= other.weight,
            self.mean + apart * (other.weight / safe),
            other.mean - apart * (self.weight / safe),
        )
        return Moments(weight, mean, self.error + other.error + apart * apart * (self.weight * (other.weight / safe)))

    def at(self, place: jax.Array) -> Moments:
        """The moments at some places of the flat arrays."""
        return Moments(*(x.reshape(-1).at[place].get(mode="promise_in_bounds") for x in self))


@partial(jax.jit, static_argnames="clusters")
def best_intervals(points: jax.Array, weight: jax.Array, clusters: int) -> Moments:
    """The intervals of ordered points around whose means the squared error is least.

    ``D_k(j) = min_i D_{k-1}(i) + error(i, j)`` for the first ``j`` points in ``k`` intervals. The best ``i`` grows with
    ``j``, so the columns of a row are found in ``log n`` rounds, each between those found before, in ``O(n log n)``
    (Wang & Song 2011; Gronlund et al. 2017, arXiv:1701.07204). Errors are put together of two tabulated parts without a
    difference of large sums, so float32 serves.

    Args:
      points: float32 (n,), ascending where they have weight; ``n`` a power of two, at most 2**15.
      weight: float32 (n,), not negative.
      clusters: how many.

    Returns:
      The moments of the intervals, (clusters,). Some have no weight where points are few.
    """
    n = points.shape[0]
    table = halves(points, weight)
    columns = jnp.arange(n + 1)
    first = _error(table, jnp.zeros(n + 1, jnp.int32), columns)

    def row(k: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        best, cut = _row(state[0], table)
        return best, lax.dynamic_update_index_in_dim(state[1], cut.astype(jnp.uint16), k, 0)

    start = (first, jnp.zeros((max(clusters - 1, 1), n + 1), jnp.uint16))
    _, cuts = lax.fori_loop(0, clusters - 1, row, start)

    def back(i: jax.Array, ends: jax.Array) -> jax.Array:
        k = clusters - 1 - i
        return ends.at[k].set(cuts[k - 1, ends[k + 1]].astype(jnp.int32))

    ends = lax.fori_loop(0, clusters - 1, back, jnp.zeros(clusters + 1, jnp.int32).at[clusters].set(n))
    low, high = jnp.minimum(ends[:-1], n - 1), ends[1:]
    found = _between(table, low, jnp.maximum(high, low + 1))
    return found._replace(weight=jnp.where(high > low, found.weight, 0.0))


def halves(points: jax.Array, weight: jax.Array) -> Moments:
    """For each power of two, moments of the points from the middle of a block of so many to each of its points.

    Two entries of one row make up any interval: those of the smallest block that holds it.
    """
    n = points.shape[0]
    single = Moments(weight, points, jnp.zeros(n, jnp.float32))
    place = jnp.arange(n)

    def longer(parts: tuple[Moments, Moments], level: jax.Array) -> tuple[tuple[Moments, Moments], Moments]:
        """Parts of each block from its first point on, and up to its last: those of the blocks twice as long."""
        ahead, after = parts
        second, block = (place >> level & 1) > 0, place >> level
        before = ahead.at(jnp.maximum((block << level) - 1, 0)).joined(ahead)
        behind = after.joined(after.at(jnp.minimum(block + 1 << level, n - 1)))
        row = _where(second, ahead, after)
        return (_where(second, before, ahead), _where(second, after, behind)), row

    levels = jnp.arange(n.bit_length() - 1)
    rows = lax.scan(longer, (single, single), levels)[1]
    return Moments(*(jnp.concatenate([x[None], y]) for x, y in zip(single, rows, strict=True)))


def _where(which: jax.Array, x: Moments, y: Moments) -> Moments:
    return Moments(*(jnp.where(which, *pair) for pair in zip(x, y, strict=True)))


def _between(table: Moments, low: jax.Array, high: jax.Array) -> Moments:
    """The moments of the points from ``low`` to before ``high``, which is larger."""
    n, last = table.weight.shape[1], high - 1
    level = (32 - lax.clz(low ^ last)) * n
    left, right = table.at(level + low), table.at(level + last)
    alone = low == last
    right = right._replace(weight=jnp.where(alone, 0.0, right.weight))
    return left.joined(right)


def _error(table: Moments, low: jax.Array, high: jax.Array) -> jax.Array:
    found = _between(table, jnp.minimum(low, jnp.maximum(high - 1, 0)), jnp.maximum(high, 1)).error
    return jnp.where(high > low, found, 0.0)


def _row(best: jax.Array, table: Moments) -> tuple[jax.Array, jax.Array]:
    """The next row of the program, and its cuts: the last column, then in each round those in the middle of two."""
    n = table.weight.shape[1]
    every = jnp.arange(n + 1)
    value = best + _error(table, every, jnp.int32(n))
    row, cut = jnp.zeros(n + 1).at[n].set(value.min()), jnp.zeros(n + 1, jnp.int32)
    cut = cut.at[n].set(jnp.where(value <= value.min(), every, n).min())

    def halve(i: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        step = jnp.int32(n) >> (i + 1)
        column = step * (2 * jnp.arange(n // 2) + 1)
        found, at = _columns(best, table, column, step, state[1])
        place = jnp.where(column < n, column, n + 1)
        return state[0].at[place].set(found, mode="drop"), state[1].at[place].set(at, mode="drop")

    return lax.fori_loop(0, n.bit_length() - 1, halve, (row, cut))


def _columns(
    best: jax.Array, table: Moments, column: jax.Array, step: jax.Array, cut: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The least error for the points before each column, its last cut between those of the columns beside it.

    The candidates of all columns lie end to end, as many as could be needed: bounds of columns meet.
    """
    n, columns = table.weight.shape[1], column.shape[0]
    valid = column < n
    first, last = (cut[jnp.clip(column + side, 0, n)] for side in (-step, step))
    last = jnp.minimum(last, column)
    number = jnp.where(valid, last - first + 1, 0)
    start = jnp.cumsum(number) - number
    slots = n + columns
    marks = jnp.zeros(slots, jnp.int32).at[jnp.where(valid, start, slots)].add(1, mode="drop")
    owner = jnp.cumsum(marks) - 1
    low = jnp.minimum((first - start)[owner] + jnp.arange(slots), n)
    value = best.at[low].get(mode="promise_in_bounds") + _error(table, low, column[owner])
    value = jnp.where(low <= last[owner], value, jnp.inf)
    least = jax.ops.segment_min(value, owner, columns, indices_are_sorted=True)
    low = jnp.where(value <= least[owner], low, n)
    return least, jnp.minimum(jax.ops.segment_min(low, owner, columns, indices_are_sorted=True), last)
