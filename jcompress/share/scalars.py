"""Codebooks of scalars: near the optimum, by a histogram; and the nearest of their values."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jcompress.numeric.crowding import UPPER, Bins, Pair, crowding, to_key, upper
from jcompress.numeric.pieces import mapped, totals
from jcompress.numeric.scaling import Unit
from jcompress.share.intervals import Moments, best_intervals

MOST_EXACT = 512
"""The most clusters that the dynamic program is run for: its time grows with their square."""
_FEW, _LARGE = 17, 1 << 16


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
    return crowding(pairs, unit, 4 * _groups(clusters), clusters)


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
    return min(max(1 << (8 * clusters - 1).bit_length(), 1 << 10), 1 << 13)


def _optimal(points: jax.Array, weight: jax.Array, clusters: int) -> jax.Array:
    """The best codebook whose clusters end between groups of bins; of few bins each is a group."""
    size, shown = _groups(clusters), weight > 0
    order = jnp.argsort(~shown, stable=True)
    points, weight = points[order], weight[order]
    group = jnp.where(weight > 0, _grouping(points, weight, size), size)
    joint = grouped(points, weight, group, size)
    found = best_intervals(joint.mean, joint.weight, clusters)
    return _filled(found.mean, found.weight > 0)


def _grouping(points: jax.Array, weight: jax.Array, size: int) -> jax.Array:
    """At most ``size`` groups of points that follow one another, of one span where they are not points alone."""
    links = jnp.cbrt(weight[1:] + weight[:-1]) * jnp.square(jnp.cbrt(points[1:] - points[:-1]))
    links = jnp.where(
        weight[1:] > 0, links / jnp.maximum(jnp.max(links, where=weight[1:] > 0, initial=0.0), 1e-30), 0.0
    )
    few = jnp.sum(weight > 0) <= size

    def halve(_: int, ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        middle = jnp.sqrt(ends[0] * ends[1])
        fits = jnp.sum(jnp.minimum(links / middle, 1.0)) <= size - 2
        return jnp.where(fits, ends[0], middle), jnp.where(fits, middle, ends[1])

    _, unit = lax.fori_loop(0, 30, halve, (jnp.float32(1e-30), jnp.float32(points.size)))
    steps = jnp.where(few, weight[1:] > 0, jnp.minimum(links / unit, 1.0))
    return jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.floor(jnp.cumsum(steps)).astype(jnp.int32)])


def grouped(points: jax.Array, weight: jax.Array, group: jax.Array, size: int) -> Moments:
    """Weight and mean of each group. A group of one point has it as its mean, to the bit."""
    first = jnp.full(size, jnp.inf).at[group].min(points, mode="drop")
    first = jnp.where(jnp.isfinite(first), first, 0.0)
    near = first.at[group].get(mode="clip")
    total, count = (jnp.zeros(size).at[group].add(x, mode="drop") for x in (weight * (points - near), weight))
    return Moments(count, moved(first, total, count), jnp.zeros(size))


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
        share = weight[0].astype(jnp.float32) if weight else jnp.ones(x.shape, jnp.float32)
        apart = jnp.where(share > 0, apart * share, 0.0) if weight else apart
        lane = place * lanes + (lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1) % lanes if x.ndim else 0)
        zeros = jnp.zeros(clusters * lanes, jnp.float32)
        found = (zeros.at[lane].add(y, mode="drop") for y in (apart, share))
        return tuple(y.reshape(clusters, lanes).sum(1) for y in found)  # type: ignore[return-value]

    found = [totals(piece, *(y for y in triple if y is not None)) for triple in triples if triple[0].size]
    return moved(codebook, *(sum(column) for column in zip(*found, strict=True))) if found else codebook


def nearest(x: jax.Array, codebook: jax.Array, unit: Unit, dtype: Any = jnp.int32) -> jax.Array:
    """The index of the nearest value of an ascending codebook, in units; in the middle of two, the lower one.

    Large arrays look up a bucket of their upper bits first, and search between the few values whose middles lie in it.
    """
    middles = codebook[:-1] + (codebook[1:] - codebook[:-1]) / 2
    if middles.size < _FEW:
        start = jnp.zeros((), dtype)
        return mapped(lambda x: sum(((unit.divide(x) > m).astype(dtype) for m in middles), start=start), x)
    keys = to_key(middles)
    if x.size < _LARGE:
        return _searched(keys, to_key(unit.divide(x))).astype(dtype)
    bucket = jnp.searchsorted(keys, jnp.arange(1 << UPPER, dtype=jnp.uint32) << (32 - UPPER)).astype(jnp.int32)
    steps = 32 - lax.clz(jnp.max(jnp.diff(bucket, append=keys.size)))
    padded = jnp.concatenate([keys, jnp.full(keys.size + 1, 0xFFFFFFFF, jnp.uint32)])

    def piece(x: jax.Array) -> jax.Array:
        key = to_key(unit.divide(x))

        def halve(i: jax.Array, found: jax.Array) -> jax.Array:
            step = jnp.int32(1) << (steps - 1 - i)
            return found + jnp.where(key > padded.at[found + step - 1].get(mode="promise_in_bounds"), step, 0)

        return lax.fori_loop(0, steps, halve, bucket.at[upper(key)].get(mode="promise_in_bounds")).astype(dtype)

    return mapped(piece, x)


def _searched(keys: jax.Array, key: jax.Array) -> jax.Array:
    """How many of some ascending keys lie below each key, without a loop: many small leaves compile fast."""
    step = 1 << (keys.size.bit_length() - 1)
    padded = jnp.concatenate([keys, jnp.full(2 * step - keys.size, 0xFFFFFFFF, jnp.uint32)])
    found = jnp.zeros(key.shape, jnp.int32)
    while step:
        found = found + jnp.where(key > padded.at[found + step - 1].get(mode="promise_in_bounds"), step, 0)
        step //= 2
    return found
