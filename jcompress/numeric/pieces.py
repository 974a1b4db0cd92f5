"""Totals over an array, a piece at a time, so that nothing of its size is written out."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jcompress.numeric.meshes import is_explicit

_PARTS, _PIECES, _SMALL, _LARGE = 64, 64, 1 << 12, 1 << 18


def added(a: Any, b: Any) -> Any:
    """The sums of two pytrees."""
    return jax.tree.map(operator.add, a, b)


def totals(call: Callable[..., Any], *arrays: jax.Array, combine: Callable[[Any, Any], Any] = added) -> Any:
    """The sum of ``call(*pieces)`` over pieces of arrays of one shape, its results of a fixed shape.

    A piece takes a part of each of up to 64 spans of an axis: where that axis is sharded over a power of two devices,
    each has as much of every piece, and no entry moves.

    Args:
      call: gives a pytree of arrays, whose shapes do not depend on those of the pieces.
      *arrays: of one shape; all but the first may have more axes behind.
      combine: what is done with the results of two pieces, which leaves zeros without effect: they are added.

    Returns:
      The pytree of sums.
    """
    cut = _cut(*arrays)
    if cut is None:
        return call(*arrays)
    axis, number, split = cut
    take = [_taker(x, axis, split) for x in arrays]

    def piece(i: Any) -> Any:
        return call(*(own(i) for own in take))

    start = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(piece, 0))
    return lax.fori_loop(0, number, lambda i, total: combine(total, piece(i)), start)


def mapped(call: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """An elementwise function of an array, whose steps are written out for a piece at a time only."""
    cut = _cut(x) if x.size >= _LARGE else None  # a loop for each array takes long to compile
    if cut is None:
        return call(x)
    axis, number, split = cut
    take = _taker(x, axis, split)

    def piece(i: Any, found: jax.Array) -> jax.Array:
        return lax.dynamic_update_index_in_dim(found, call(take(i)), i, axis)

    start = jnp.zeros(split, jax.eval_shape(call, x).dtype)
    return lax.fori_loop(0, number, piece, start).reshape(x.shape)


def _taker(x: jax.Array, axis: int, split: tuple[int, ...]) -> Callable[[Any], jax.Array]:
    """A function of its number that gives a piece."""
    dtype, whole = x.dtype, x.reshape(*split, *x.shape[len(split) - 2 :])
    if dtype.itemsize == 2 and jnp.issubdtype(dtype, jnp.floating):
        # As integers: a CPU would widen all of the floats to cut them.
        whole = lax.bitcast_convert_type(whole, jnp.uint16)
        return lambda i: lax.bitcast_convert_type(lax.dynamic_index_in_dim(whole, i, axis, keepdims=False), dtype)
    return lambda i: lax.dynamic_index_in_dim(whole, i, axis, keepdims=False)


def _cut(*arrays: jax.Array) -> tuple[int, int, tuple[int, ...]] | None:
    """The axis of pieces and their number, of arrays reshaped so; None for arrays that are better left whole."""
    shape = arrays[0].shape
    if arrays[0].size < _SMALL or any(map(is_explicit, arrays)):
        return None
    axis = max(range(len(shape)), key=lambda i: (_pieces(shape[i]), shape[i]))
    number, parts = _pieces(shape[axis]), math.gcd(shape[axis], _PARTS)
    split = (*shape[:axis], parts, number, shape[axis] // (parts * number), *shape[axis + 1 :])
    return None if number == 1 else (axis + 1, number, split)


@functools.cache
def _pieces(length: int) -> int:
    """Into how many equal pieces each span of an axis of this length is cut."""
    span = length // math.gcd(length, _PARTS) if length else 1
    return max(n for n in range(1, min(span, _PIECES) + 1) if span % n == 0)
