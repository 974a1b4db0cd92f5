"""A histogram with bins where the values are: narrow in a crowd, wide in a tail, whatever their magnitudes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jcompress.numeric.pieces import added, totals
from jcompress.numeric.scaling import Unit

Pair = tuple[jax.Array, jax.Array | None]
Place = Callable[[jax.Array], jax.Array]
UPPER = 14
"""The upper bits of a key that tell where a value is, roughly."""
_ROUNDS = 8
_COARSE, _BELOW, _HALF = 1 << UPPER, 32 - UPPER, 1 << 16
_LAST = np.uint32(0xFFFFFFFF)


class Bins(NamedTuple):
    """Bins in ascending order, of float32 values by their keys; between them there are no values.

    Attributes:
      low: uint32 (bins,), the key of the least value that may lie in each.
      high: uint32 (bins,), the key of the first value above.
      weight: float32 (bins,), the total weight of the values in each.
    """

    low: jax.Array
    high: jax.Array
    weight: jax.Array

    def ends(self) -> tuple[jax.Array, jax.Array]:
        """The least and the greatest value that may lie in each."""
        shown = self.weight > 0
        low = jnp.where(shown, from_key(self.low), 0.0)
        return low, jnp.maximum(jnp.where(shown, from_key(self.high - 1), 0.0), low)

    def points(self) -> jax.Array:
        """The middle of each bin; of one that holds a single value, that value."""
        low, high = self.ends()
        return low + (high - low) / 2

    def spans(self) -> jax.Array:
        """``(weight * width**2) ** (1 / 3)``: bins in which the best codebooks have alike many values, have one span.

        That is the point density of quantizers of high resolution (Panter & Dite 1951).
        """
        low, high = self.ends()
        return jnp.cbrt(self.weight) * jnp.square(jnp.cbrt(high - low))


def to_key(x: jax.Array) -> jax.Array:
    """Integers in the order of finite float32 numbers, uint32; both zeros have one."""
    bits = lax.bitcast_convert_type(x + 0.0, jnp.uint32)
    return jnp.where(bits >> 31 > 0, ~bits, bits | jnp.uint32(1 << 31))


def from_key(key: jax.Array) -> jax.Array:
    """The number of a key."""
    return lax.bitcast_convert_type(jnp.where(key >> 31 > 0, key ^ jnp.uint32(1 << 31), ~key), jnp.float32)


def upper(key: jax.Array) -> jax.Array:
    """The place of a key among 2**14 equal ranges of keys, int32."""
    return (key >> _BELOW).astype(jnp.int32)


def crowding(pairs: Sequence[Pair], unit: Unit, size: int, clusters: int) -> Bins:
    """The histogram of values in some arrays, fine enough to find so many clusters of them.

    A first count over all float32 numbers by their upper bits says where values are; bins of equal span are laid
    there and counted. Where one such bin holds much, many equal values or a crowd, bins are cut again. Of arrays that
    are sharded only counts move between devices.

    Args:
      pairs: arrays, and the weight of each entry or None: booleans or floats of the array's shape.
      unit: what entries are divided by.
      size: the number of bins, a power of two, at most 2**15.
      clusters: no bin shall matter to the error of so many clusters, and as many values are told apart.

    Returns:
      The bins.
    """
    start, parts, bins = _laid(_coarse(pairs, unit), size)
    bins = bins._replace(weight=_fine(pairs, unit, start << 16 | parts, size))
    if not isinstance(bins.weight, jax.core.Tracer) and not _matters(bins, clusters):
        return bins  # most arrays: nothing more to compile
    return _refined(pairs, unit, bins, clusters)


@jax.jit
def _coarse(pairs: Sequence[Pair], unit: Unit) -> jax.Array:
    return _counted(pairs, lambda x: upper(to_key(unit.divide(x))), 1 << UPPER)


@partial(jax.jit, static_argnames="size")
def _fine(pairs: Sequence[Pair], unit: Unit, place: jax.Array, size: int) -> jax.Array:
    def of(x: jax.Array) -> jax.Array:
        key = to_key(unit.divide(x))
        found, lower = place.at[upper(key)].get(mode="promise_in_bounds"), key << UPPER >> 16
        return ((found >> 16) + (lower * (found & (_HALF - 1)) >> 16)).astype(jnp.int32)

    return _counted(pairs, of, size)


@partial(jax.jit, static_argnames="clusters")
def _refined(pairs: Sequence[Pair], unit: Unit, bins: Bins, clusters: int) -> Bins:
    size = bins.weight.size

    def cut(state: tuple[jax.Array, Bins]) -> tuple[jax.Array, Bins]:
        low = _cut(state[1], size)

        def of(x: jax.Array) -> jax.Array:
            return jnp.searchsorted(low, to_key(unit.divide(x)), side="right").astype(jnp.int32) - 1

        return state[0] + 1, _seen(pairs, unit, of, size)

    def coarse(state: tuple[jax.Array, Bins]) -> jax.Array:
        return (state[0] < _ROUNDS) & _matters(state[1], clusters)

    return lax.while_loop(coarse, cut, (jnp.int32(0), bins))[1]


def _counted(pairs: Sequence[Pair], place: Place, size: int) -> jax.Array:
    """The total weight of each bin. Entries without a number have none."""

    def piece(x: jax.Array, *weight: jax.Array) -> jax.Array:
        return _weighed(x, weight, place(x), size)

    return _over(piece, pairs, jnp.zeros(size, jnp.float32), added)


def _seen(pairs: Sequence[Pair], unit: Unit, place: Place, size: int) -> Bins:
    """Bins from the least value seen in each to the greatest."""

    def piece(x: jax.Array, *weight: jax.Array) -> tuple[jax.Array, ...]:
        shown = jnp.isfinite(x) & (weight[0] > 0) if weight else jnp.isfinite(x)
        at, key, none = place(x), to_key(unit.divide(x)), jnp.zeros(size, jnp.uint32)
        ends = (none.at[at].max(jnp.where(shown, y, jnp.uint32(0)), mode="drop") for y in (~key, key))
        return _weighed(x, weight, at, size), *ends

    def both(a: tuple[jax.Array, ...], b: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        return a[0] + b[0], jnp.maximum(a[1], b[1]), jnp.maximum(a[2], b[2])

    none = jnp.zeros(size, jnp.uint32)
    weight, low, high = _over(piece, pairs, (jnp.zeros(size, jnp.float32), none, none), both)
    return Bins(~low, high + 1, weight)


def _over(piece: Any, pairs: Sequence[Pair], start: Any, combine: Any) -> Any:
    for x, weight in pairs:
        if x.size:
            start = combine(start, totals(piece, x, *([] if weight is None else [weight]), combine=combine))
    return start


def _weighed(x: jax.Array, weight: tuple[jax.Array, ...], place: jax.Array, size: int) -> jax.Array:
    shown = jnp.where(jnp.isfinite(x), weight[0], 0) if weight else jnp.isfinite(x)
    zeros = jnp.zeros(size, jnp.int32 if jnp.issubdtype(shown.dtype, jnp.bool_) else jnp.float32)
    return zeros.at[place].add(shown.astype(zeros.dtype), mode="drop").astype(jnp.float32)


@partial(jax.jit, static_argnames="size")
def _laid(weight: jax.Array, size: int) -> tuple[jax.Array, jax.Array, Bins]:
    """Bins of about equal span over the coarse ones: for each of those the first bin and their number."""
    coarse = jnp.arange(_COARSE, dtype=jnp.uint32) << _BELOW
    span = Bins(coarse, coarse + (1 << _BELOW), weight).spans()
    span = span / jnp.maximum(span.max(), jnp.finfo(jnp.float32).tiny)
    share = jnp.floor(span * ((1 << 28) / jnp.maximum(span.sum(), 1.0))).astype(jnp.uint32)
    ends = jnp.minimum(jnp.cumsum(share) >> (29 - size.bit_length()), size - 1)
    start = jnp.concatenate([jnp.zeros(1, jnp.uint32), ends[:-1]])
    parts = jnp.maximum(ends - start, 1)
    return start, parts, _edges(coarse, start, parts, weight > 0, size)


def _edges(coarse: jax.Array, start: jax.Array, parts: jax.Array, shown: jax.Array, size: int) -> Bins:
    """What keys the bins hold: some coarse ones whole, or a part of one."""
    place = jnp.where(shown, start, size).astype(jnp.int32)
    low = jnp.full(size, _LAST, jnp.uint32).at[place].min(coarse, mode="drop")
    high = jnp.zeros(size, jnp.uint32).at[place].max(coarse + _edge(1, parts), mode="drop")
    bins = jnp.arange(size, dtype=jnp.uint32)
    owner = jnp.searchsorted(start, bins, side="right") - 1
    n, part = parts[owner], bins - start[owner]
    inside = (part > 0) & (part < n)
    low = jnp.where(inside, coarse[owner] + _edge(part, n), low)
    high = jnp.where(inside, coarse[owner] + _edge(part + 1, n), high)
    return Bins(low, high, jnp.zeros(size, jnp.float32))


def _edge(part: jax.Array | int, parts: jax.Array) -> jax.Array:
    """The first key of a part of a coarse bin, from that of the bin."""
    return (part * _HALF + parts - 1) // parts << (_BELOW - 16)


@partial(jax.jit, static_argnames="clusters")
def _matters(bins: Bins, clusters: int) -> jax.Array:
    """Whether values in one bin may add to the error of so many clusters, which is about ``span.sum()**3`` parts."""
    span = bins.spans()
    part = span / jnp.maximum(span.max(), jnp.finfo(jnp.float32).tiny)
    return (span.max() > 0) & (clusters**2 * jnp.sum(part**3) > jnp.sum(part) ** 3 / 64)


def _cut(bins: Bins, size: int) -> jax.Array:
    """The first keys of parts of bins, half of them by their span and half to all alike; empty bins are given up."""
    width, span = bins.high - bins.low, bins.spans()
    shown, many = bins.weight > 0, (bins.weight > 0) & (bins.high - bins.low > 1)
    free = size - jnp.sum(shown)
    share = span / jnp.maximum(span.sum(), 1e-30) / 2 + many / jnp.maximum(jnp.sum(many), 1) / 2
    parts = jnp.where(shown, 1 + jnp.where(many, jnp.floor(free * 0.999 * share), 0.0), 0.0).astype(jnp.int32)
    parts = jnp.minimum(parts, jnp.minimum(width, size).astype(jnp.int32))
    ends = jnp.cumsum(parts)
    slot = jnp.arange(size)
    owner = jnp.minimum(jnp.searchsorted(ends, slot, side="right"), size - 1)
    n, part = jnp.maximum(parts[owner], 1).astype(jnp.uint32), (slot - (ends - parts)[owner]).astype(jnp.uint32)
    whole, rest = width[owner] // n, width[owner] % n
    return jnp.where(slot < ends[-1], bins.low[owner] + whole * part + (rest * part + n - 1) // n, _LAST)
