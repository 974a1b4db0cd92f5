"""The best clusters of ordered points: intervals, by a dynamic program that runs under ``jit``."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

_TABLE, _FEW = 3 << 16, 512
"""Errors that are kept of intervals of many points, and how many are few."""


class Moments(NamedTuple):
    """Weight, mean, and squared error around it, of some points; float32 arrays of one shape."""

    weight: jax.Array
    mean: jax.Array
    error: jax.Array

    def joined(self, other: Moments) -> Moments:
        """The moments of both together (Chan et al. 1979), to the bit where one has no weight."""
        weight = self.weight + other.weight
        apart, share = other.mean - self.mean, other.weight / jnp.maximum(weight, jnp.finfo(jnp.float32).tiny)
        mean = self.mean + apart * share
        return Moments(weight, mean, self.error + other.error + apart * apart * (self.weight * share))


@partial(jax.jit, static_argnames="clusters")
def best_intervals(points: jax.Array, weight: jax.Array, clusters: int) -> jax.Array:
    """Into which intervals ordered points fall so that the squared error around the intervals' means is least.

    ``D_k(j) = min_i D_{k-1}(i) + error(i, j)`` for the first ``j`` points in ``k`` intervals. An interval
    holds less than ``3 * 2**16 / n`` points, of up to 512 any number.

    Args:
      points: float32 (n,), ascending.
      weight: float32 (n,), positive, and zero for points at the end that are none.
      clusters: how many.

    Returns:
      int32 (n,), the interval of each point, ascending from 0. Some intervals have no points where these are few.
    """
    n = points.shape[0]
    errors = _errors(points, weight, n if n <= _FEW else max(_TABLE // n - 1, 1))
    longest = errors.shape[0]
    kind = jnp.uint8 if longest < 256 else jnp.uint16

    def row(k: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        before = jnp.concatenate([jnp.full(longest, jnp.inf, jnp.float32), state[0]])

        def longer(i: jax.Array, found: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            error = lax.dynamic_slice_in_dim(before, longest - 1 - i, n + 1) + errors[i]
            return jnp.minimum(error, found[0]), jnp.where(error < found[0], i + 1, found[1])

        best, length = lax.fori_loop(0, longest, longer, (state[0], jnp.zeros(n + 1, jnp.int32)))
        return best, lax.dynamic_update_index_in_dim(state[1], length.astype(kind), k, 0)

    start = jnp.full(n + 1, jnp.inf, jnp.float32).at[0].set(0.0), _later(errors, (clusters, n + 1), kind)
    _, lengths = lax.fori_loop(0, clusters, row, start)

    def back(end: jax.Array, length: jax.Array) -> tuple[jax.Array, jax.Array]:
        first = end - length[end].astype(jnp.int32)
        return first, first

    _, firsts = lax.scan(back, jnp.sum(weight > 0), lengths, reverse=True)
    return jnp.cumsum(jnp.zeros(n + 1, jnp.int32).at[firsts[1:]].add(1))[:n]


def _errors(points: jax.Array, weight: jax.Array, longest: int) -> jax.Array:
    """The squared error of the points before each end, (longest, n + 1): of the last one, the last two, ..."""
    n = points.shape[0]
    lead, none = jnp.zeros(longest, jnp.float32), jnp.zeros(n + 1, jnp.float32)
    found = _later(weight, (longest, n + 1), jnp.float32)
    points, weight = jnp.concatenate([lead, points, lead[:1]]), jnp.concatenate([lead, weight, lead[:1]])

    def longer(i: jax.Array, state: tuple[Moments, jax.Array]) -> tuple[Moments, jax.Array]:
        heavy, place = (lax.dynamic_slice_in_dim(x, longest - 1 - i, n + 1) for x in (weight, points))
        now = state[0].joined(Moments(heavy, place, none))
        error = jnp.where(jnp.arange(n + 1) <= i, jnp.inf, now.error)
        return now, lax.dynamic_update_index_in_dim(state[1], error, i, 0)

    return lax.fori_loop(0, longest, longer, (Moments(none, none, none), found))[1]


def _later(x: jax.Array, shape: tuple[int, int], dtype: Any) -> jax.Array:
    """Some numbers, all to be overwritten. XLA does not make room for them before ``x`` is known."""
    return jnp.full(shape, x.reshape(-1)[0]).astype(dtype)
