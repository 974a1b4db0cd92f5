"""Codebooks of scalars: near the optimum, by a histogram; and the nearest of their values."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jcompress.numeric.crowded import Bins, Pair, crowding
from jcompress.numeric.pieces import mapped, totals
from jcompress.numeric.scaling import Unit
from jcompress.share.intervals import best_intervals

MOST_EXACT = 512
"""The most clusters that the dynamic program is run for: its time grows with their square."""
_UNROLLED, _MANY, _SMALL = 16, 1 << 9, 1 << 16


def scalar_codebook(pairs: Sequence[Pair], unit: Unit, clusters: int, iterations: int) -> jax.Array:
    """Values, in units, whose weighted squared error is near the least that so many can have.

    A histogram with narrow bins where values crowd, the exact dynamic program over it for up to 512 clusters, above
    that the point density of high resolution (Panter & Dite 1951); then Lloyd's algorithm on the histogram.

    Args:
      pairs: arrays, and of each the weights of its entries or None.
      unit: what values are divided by.
      clusters: how many.
      iterations: the most rounds of Lloyd's algorithm.

    Returns:
      float32 (clusters,), ascending. Values that nothing needs are repeated.
    """
    return histogram_codebook(histogram(pairs, unit, clusters), clusters, iterations)


def histogram(pairs: Sequence[Pair], unit: Unit, clusters: int) -> Bins:
    """The histogram that a codebook of so many values, in units, is found on."""
    return crowding(pairs, unit, max(4 * _groups(clusters), 1 << 12), clusters)


@partial(jax.jit, static_argnames=("clusters", "iterations"))
def histogram_codebook(bins: Bins, clusters: int, iterations: int) -> jax.Array:
    """The codebook of all values in the bins."""
    points, weight = bins.points(), bins.weight
    start = _optimal(points, weight, clusters) if clusters <= MOST_EXACT else _spread(bins, clusters)

    def step(state: tuple) -> tuple:
        i, codebook, _ = state
        place = jnp.searchsorted((codebook[1:] + codebook[:-1]) / 2, points)
        means = moved(codebook, *(jax.ops.segment_sum(x, place, clusters) for x in (
            jnp.where(weight > 0, weight * (points - codebook[place]), 0.0), weight)))  # fmt: skip
        return i + 1, jnp.sort(means), jnp.any(means != codebook)

    return lax.while_loop(lambda s: (s[0] < iterations) & s[2], step, (jnp.int32(0), start, jnp.array(True)))[1]


def _groups(clusters: int) -> int:
    """How many points the dynamic program sees: a power of two, eight for each cluster at least."""
    return min(max(1 << (8 * clusters - 1).bit_length(), 1 << 9), 1 << 12)


def _optimal(points: jax.Array, weight: jax.Array, clusters: int) -> jax.Array:
    """The best codebook whose clusters end between groups of bins; of few bins each is a group."""
    size = _groups(clusters)
    order = jnp.argsort(weight == 0, stable=True)
    points, weight = points[order], weight[order]
    mean, total = grouped(points, weight, _grouping(points, weight, size), size)
    mean, total = grouped(mean, total, best_intervals(mean, total, clusters), clusters)
    return _filled(mean, total > 0)


def _grouping(points: jax.Array, weight: jax.Array, size: int) -> jax.Array:
    """Less than ``size`` groups of points that follow one another, of alike spans where they are not points alone."""
    shown = weight[1:] > 0
    span = jnp.where(shown, jnp.cbrt((weight[1:] + weight[:-1]) * jnp.square(points[1:] - points[:-1])), 0.0)
    span = lax.optimization_barrier(span / jnp.maximum(span.max(), jnp.finfo(jnp.float32).tiny))

    def halve(_: int, ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        middle = jnp.sqrt(ends[0] * ends[1])
        fits = jnp.sum(jnp.minimum(span / middle, 1.0)) <= size - 2
        return jnp.where(fits, ends[0], middle), jnp.where(fits, middle, ends[1])

    _, unit = lax.fori_loop(0, 24, halve, (jnp.float32(1e-30), jnp.float32(points.size)))
    steps = jnp.where(jnp.sum(shown) <= size - 2, shown, jnp.minimum(span / unit, 1.0))
    group = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.floor(jnp.cumsum(steps)).astype(jnp.int32)])
    return jnp.minimum(group, size - 2)


def grouped(points: jax.Array, weight: jax.Array, group: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """Mean and weight of each group. A group of one point has it as its mean, to the bit."""
    group = jnp.where(weight > 0, group, size)
    first = jnp.full(size, jnp.inf, jnp.float32).at[group].min(points, mode="drop")
    first = jnp.where(jnp.isfinite(first), first, 0.0)
    apart = points - first.at[group].get(mode="clip")
    total, count = (jnp.zeros(size, jnp.float32).at[group].add(x, mode="drop") for x in (weight * apart, weight))
    return moved(first, total, count), count


def _spread(bins: Bins, clusters: int) -> jax.Array:
    """Values in the middle of equal spans; of few bins, each of them."""
    shown, (low, high) = bins.weight > 0, bins.ends()
    many = jnp.sum(shown) > clusters
    own = jnp.where(many, bins.spans(), shown.astype(jnp.float32))
    ends = jnp.cumsum(own / jnp.maximum(jnp.where(many, own.sum(), clusters), 1e-30))
    wanted = (jnp.arange(clusters) + 0.5) / clusters
    at = jnp.minimum(jnp.searchsorted(ends, wanted), own.size - 1)
    before = jnp.where(at > 0, ends[at - 1], 0.0)
    part = jnp.clip((wanted - before) / jnp.maximum(ends[at] - before, 1e-30), 0, 1)
    value = jnp.where(many, low[at] + (high - low)[at] * part, bins.points()[at])
    return _filled(value, shown[at])


def _filled(values: jax.Array, shown: jax.Array) -> jax.Array:
    """Ascending values, those that are none like the one before, or the first one."""
    first = jnp.min(jnp.where(shown, values, jnp.inf))
    found = lax.cummax(jnp.where(shown, values, -jnp.inf))
    return jnp.where(shown.any(), jnp.maximum(found, first), 0.0)


def moved(codebook: jax.Array, total: jax.Array, weight: jax.Array) -> jax.Array:
    """Values and the means of what their clusters deviate from them, given as totals."""
    return jnp.where(weight > 0, codebook + total / jnp.where(weight > 0, weight, 1.0), codebook)


def cluster_means(
    codebook: jax.Array, triples: Sequence[tuple[jax.Array, jax.Array, jax.Array | None]], unit: Unit
) -> jax.Array:
    """The means of all entries by their cluster, in units; of a cluster without entries the value that it had.

    Deviations from the codebook are added up, not the entries: a sum of millions keeps its digits.

    Args:
      codebook: float32 (clusters,).
      triples: arrays, the cluster of each entry, and the weights of entries or None.
      unit: what entries are divided by.
    """
    clusters = codebook.shape[0]
    lanes = max(1, 512 // clusters)  # additions to one number wait for each other

    def piece(x: jax.Array, index: jax.Array, *weight: jax.Array) -> tuple[jax.Array, jax.Array]:
        place = index.astype(jnp.int32)
        apart = unit.divide(x) - codebook.at[place].get(mode="clip")
        # Integers, since a float32 that counts by ones ends at 2**24.
        share = weight[0].astype(jnp.float32) if weight else jnp.ones(x.shape, jnp.int32)
        apart = jnp.where(share > 0, apart * share, 0.0) if weight else apart
        lane = place * lanes + (lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1) % lanes if x.ndim else 0)
        found = (jnp.zeros(clusters * lanes, y.dtype).at[lane].add(y, mode="drop") for y in (apart, share))
        return tuple(y.astype(jnp.float32).reshape(clusters, lanes).sum(1) for y in found)  # type: ignore[return-value]

    found = [totals(piece, *(y for y in triple if y is not None)) for triple in triples if triple[0].size]
    return moved(codebook, *(sum(column) for column in zip(*found, strict=True))) if found else codebook


def nearest(x: jax.Array, codebook: jax.Array, unit: Unit, dtype: Any = jnp.int32) -> jax.Array:
    """The index of the nearest value of an ascending codebook, in units; in the middle of two, the lower one."""
    middles = codebook[:-1] + (codebook[1:] - codebook[:-1]) / 2
    if x.size < _SMALL and middles.size > _UNROLLED:
        return _searched(middles, unit.divide(x)).astype(dtype)
    if middles.size >= _MANY:
        return mapped(lambda x: jnp.searchsorted(middles, unit.divide(x)).astype(dtype), x)
    return mapped(lambda x: _above(middles, unit.divide(x), dtype), x)


def _above(bounds: jax.Array, x: jax.Array, dtype: Any) -> jax.Array:
    """How many of some bounds lie below each entry, compared one after the other: a CPU does many entries at once."""
    step = min(_UNROLLED, bounds.size)
    bounds = jnp.pad(bounds, (0, -bounds.size % max(step, 1)), constant_values=jnp.inf)

    def chunk(i: Any, found: jax.Array) -> jax.Array:
        own = lax.optimization_barrier(lax.dynamic_slice_in_dim(bounds, i * step, step))
        return sum(((x > own[u]).astype(dtype) for u in range(step)), start=found)

    start = jnp.zeros(x.shape, dtype)
    return lax.fori_loop(0, bounds.size // step, chunk, start) if bounds.size > step else chunk(0, start)


def _searched(bounds: jax.Array, x: jax.Array) -> jax.Array:
    """The same by halves, without a loop: many small leaves compile fast."""
    step = 1 << (bounds.size.bit_length() - 1)
    padded = jnp.concatenate([bounds, jnp.full(2 * step - bounds.size, jnp.inf, bounds.dtype)])
    found = jnp.zeros(x.shape, jnp.int32)
    while step:
        found = found + jnp.where(x > padded.at[found + step - 1].get(mode="promise_in_bounds"), step, 0)
        step //= 2
    return found
