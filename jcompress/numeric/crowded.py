"""A histogram with bins where the values are: narrow in a crowd, wide in a tail, whatever their magnitudes."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jcompress.numeric.pieces import added, totals
from jcompress.numeric.scaling import Unit

Pair = tuple[jax.Array, jax.Array | None]
_UPPER = 12
"""The upper bits of a key that are counted first."""
_BELOW, _ROUNDS = 32 - _UPPER, 8
_LAST = np.uint32(0xFFFFFFFF)


class Bins(NamedTuple):
    """Bins in ascending order, of float32 values by their keys; between them there are no values.

    Attributes:
      low: uint32 (bins,), the key of the least value that may lie in each.
      high: uint32 (bins,), the key of the greatest.
      weight: float32 (bins,), the total weight of the values in each.
    """

    low: jax.Array
    high: jax.Array
    weight: jax.Array

    def ends(self) -> tuple[jax.Array, jax.Array]:
        """The least and the greatest value that may lie in each."""
        shown = self.weight > 0
        low = jnp.where(shown, from_key(self.low), 0.0)
        return low, jnp.maximum(jnp.where(shown, from_key(self.high), 0.0), low)

    def points(self) -> jax.Array:
        """The middle of each bin; of one that holds a single value, that value."""
        low, high = self.ends()
        return low + (high - low) / 2

    def spans(self) -> jax.Array:
        """``(weight * width**2) ** (1 / 3)``: bins in which the best codebooks have alike many values, have one span.

        That is the point density of quantizers of high resolution (Panter & Dite 1951).
        """
        low, high = self.ends()
        return lax.optimization_barrier(jnp.cbrt(self.weight * jnp.square(high - low)))


def to_key(x: jax.Array) -> jax.Array:
    """Integers in the order of finite float32 numbers, uint32; both zeros have one."""
    bits = lax.bitcast_convert_type(x + 0.0, jnp.uint32)
    return jnp.where(bits >> 31 > 0, ~bits, bits | jnp.uint32(1 << 31))


def from_key(key: jax.Array) -> jax.Array:
    """The number of a key."""
    return lax.bitcast_convert_type(jnp.where(key >> 31 > 0, key ^ jnp.uint32(1 << 31), ~key), jnp.float32)


@partial(jax.jit, static_argnames=("size", "clusters"))
def crowding(pairs: Sequence[Pair], unit: Unit, size: int, clusters: int) -> Bins:
    """The histogram of values in some arrays, fine enough to find so many clusters of them.

    A first count over all float32 numbers by their upper bits says where values are. Then bins are cut, more where
    the best codebook has more values, and counted again, until none of them holds much. Of arrays that are sharded
    only such counts, of a fixed number of bins, move between devices.

    Args:
      pairs: arrays, and the weight of each entry or None: booleans or floats of the array's shape.
      unit: what entries are divided by.
      size: the number of bins, at least 4,096.
      clusters: no bin shall matter to the error of so many clusters, and as many values are told apart.

    Returns:
      The bins, in ascending order; those without weight have no place.
    """
    coarse = jnp.arange(1 << _UPPER, dtype=jnp.uint32) << _BELOW
    weight = _over(
        lambda x, *w: _weighed(x, w, (to_key(unit.divide(x)) >> _BELOW).astype(jnp.int32), coarse.size), pairs
    )
    start = Bins(
        *(jnp.pad(x, (0, size - coarse.size)) for x in (coarse, coarse + np.uint32((1 << _BELOW) - 1), weight))
    )

    def cut(state: tuple[jax.Array, Bins]) -> tuple[jax.Array, Bins]:
        return state[0] + 1, _seen(pairs, unit, _cut(state[1]))

    def goes_on(state: tuple[jax.Array, Bins]) -> jax.Array:
        return (state[0] == 0) | ((state[0] < _ROUNDS) & _coarse(state[1], clusters))

    return lax.while_loop(goes_on, cut, (jnp.int32(0), start))[1]


def _seen(pairs: Sequence[Pair], unit: Unit, last: jax.Array) -> Bins:
    """Bins from the least value seen in each to the greatest, given the last keys that belong to them."""
    none = jnp.zeros(last.size, jnp.uint32)

    def piece(x: jax.Array, *weight: jax.Array) -> tuple[jax.Array, ...]:
        shown = jnp.isfinite(x) & (weight[0] > 0) if weight else jnp.isfinite(x)
        key = to_key(unit.divide(x))
        at = jnp.searchsorted(last, key).astype(jnp.int32)
        ends = (none.at[at].max(jnp.where(shown, y, jnp.uint32(0)), mode="drop") for y in (~key, key))
        return _weighed(x, weight, at, last.size), *ends

    def both(a: tuple[jax.Array, ...], b: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        return a[0] + b[0], jnp.maximum(a[1], b[1]), jnp.maximum(a[2], b[2])

    weight, low, high = _over(piece, pairs, both)
    return Bins(~low, high, weight)


def _over(piece: Any, pairs: Sequence[Pair], combine: Any = added) -> Any:
    """What pieces of all arrays give, put together."""
    found = [totals(piece, x, *([] if w is None else [w]), combine=combine) for x, w in pairs if x.size]
    return functools.reduce(combine, found)


def _weighed(x: jax.Array, weight: tuple[jax.Array, ...], place: jax.Array, size: int) -> jax.Array:
    shown = jnp.where(jnp.isfinite(x), weight[0], 0) if weight else jnp.isfinite(x)
    zeros = jnp.zeros(size, jnp.int32 if jnp.issubdtype(shown.dtype, jnp.bool_) else jnp.float32)
    return zeros.at[place].add(shown.astype(zeros.dtype), mode="drop").astype(jnp.float32)


def _coarse(bins: Bins, clusters: int) -> jax.Array:
    """Whether bins tell too little: half of them are free, or one adds to the error of so many clusters.

    That error is about ``span.sum()**3`` parts, by the point density.
    """
    span, wide = bins.spans(), (bins.weight > 0) & (bins.high > bins.low)
    part = span / jnp.maximum(span.max(), jnp.finfo(jnp.float32).tiny)
    matters = (span.max() > 0) & (clusters**2 * jnp.sum(part**3) > jnp.sum(part) ** 3 / 64)
    return matters | (wide.any() & (jnp.sum(bins.weight > 0) < bins.weight.size // 2))


def _cut(bins: Bins) -> jax.Array:
    """The last keys of parts of bins, half of them by their span and half to all alike; empty bins are given up."""
    size, width, span = bins.weight.size, bins.high - bins.low, bins.spans()
    shown = bins.weight > 0
    many = shown & (width > 0)
    free = size - jnp.sum(shown)
    share = span / jnp.maximum(span.sum(), 1e-30) / 2 + many / jnp.maximum(jnp.sum(many), 1) / 2
    parts = jnp.where(shown, 1 + jnp.floor(free * 0.999 * share), 0.0).astype(jnp.uint32)
    parts = jnp.minimum(parts, width + 1)
    ends = jnp.cumsum(parts)
    slot = jnp.arange(size, dtype=jnp.uint32)
    owner = jnp.minimum(jnp.searchsorted(ends, slot, side="right"), size - 1)
    n, part = jnp.maximum(parts[owner], 1), slot + 1 - (ends - parts)[owner]
    whole, rest = width[owner] // n, width[owner] % n
    return jnp.where(slot < ends[-1], bins.low[owner] + whole * part + rest * part // n, _LAST)
