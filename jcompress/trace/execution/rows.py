"""Products with a matrix in one form: rows of an activation against inputs and outputs."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jax_core

from jcompress.trace.core.contraction import Dot, Product


@dataclasses.dataclass(frozen=True)
class Rows:
    """An activation as rows of what is summed, and how the result is laid out.

    Attributes:
      x: (rows, inputs).
      turned: whether the matrix lies (outputs, inputs).
      product: that it is for.
      lead: the other axes of the activation.
    """

    x: jax.Array
    turned: bool
    product: Dot
    lead: tuple[int, ...]

    def restored(self, y: jax.Array) -> jax.Array:
        """The result (rows, outputs) as the product gives it."""
        y = y.reshape(*self.lead, y.shape[-1]).astype(self.product.dtype)
        return y if self.product.side else jnp.moveaxis(y, -1, 0)


def count(product: Product, x: jax.Array) -> int:
    """How many rows of an activation a matrix meets."""
    return x.size // max(math.prod(x.shape[d] for d in product.summed), 1)


def of(product: Product, x: jax.Array, ndim: int) -> Rows | None:
    """The rows of an activation, where a matrix (of ``ndim`` 2) is summed over one axis; else None."""
    if type(product) is not Dot or ndim != 2 or len(product.contracted) != 1 or product.numbers[1][0]:
        return None
    (axis,), (summed,) = product.contracted, product.summed
    moved = jnp.moveaxis(x, summed, -1)
    return Rows(moved.reshape(-1, moved.shape[-1]), axis == 1, product, moved.shape[:-1])


def flattened(
    product: Dot, x: jax.Array, sizes: Sequence[int], mine: Sequence[int], theirs: Sequence[int]
) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
    """An activation for the matrix that a weight is, and what brings the result to where the product has it.

    Args:
      product: that contracts these axes and no others.
      x: the activation.
      sizes: of the weight.
      mine: its axes that are summed over, negative, in the order in which the matrix has them as rows.
      theirs: its other axes, in the order of columns.

    Returns:
      ``(..., rows of the matrix)``, and a function of ``(..., columns)``.
    """
    n, contracted, other = len(sizes), list(product.contracted), product.summed
    front = [d for d in range(x.ndim) if d not in other]
    flat = x.transpose(*front, *(other[contracted.index(a + n)] for a in mine))
    flat = flat.reshape(*flat.shape[: len(front)], math.prod(sizes[a] for a in mine))

    def restored(y: jax.Array) -> jax.Array:
        y = y.reshape(*y.shape[: len(front)], *(sizes[a] for a in theirs))
        free = [a for a in range(n) if a not in contracted]
        order = [a + n for a in theirs]
        y = y.transpose(*range(len(front)), *(len(front) + order.index(a) for a in free))
        if product.side == 0:
            y = jnp.moveaxis(y, range(len(front)), range(-len(front), 0))
        return y.astype(product.dtype)

    return flat, restored


def with_derivative_of(plain: Callable[..., jax.Array], fast: Callable[..., jax.Array], *operands: Any) -> jax.Array:
    """``fast(*operands)``, differentiated as if it were ``plain(*operands)``, in either direction.

    Args:
      plain: what JAX can differentiate.
      fast: another way to the same array.
      *operands: arrays, or None.
    """
    given = [x for x in operands if x is not None]

    def filled(call: Callable[..., jax.Array], arrays: tuple[Any, ...]) -> jax.Array:
        left = iter(arrays)
        return call(*(None if x is None else next(left) for x in operands))

    run = jax.custom_jvp(functools.partial(_called, filled, fast))

    @run.defjvp
    def _(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
        _, slope = jax.jvp(lambda *xs: filled(plain, xs), primals, tangents)
        return run(*primals), slope

    return run(*given)


def _called(filled: Callable[..., jax.Array], fast: Callable[..., jax.Array], *arrays: Any) -> jax.Array:
    return filled(fast, arrays)


def fixed(x: jax.Array, bits: int) -> tuple[jax.Array, jax.Array]:
    """The last axis in integers of so many bits, and their scale, (..., 1): NaN or infinite where ``x`` is."""
    most = np.float32(2 ** (bits - 1) - 1)
    wide = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(wide), axis=-1, keepdims=True, initial=0.0)
    scale = jnp.where(largest == 0, 1.0, largest) / most
    inside = jnp.where(jnp.isfinite(scale), wide / scale, 0.0)
    return jnp.round(inside).astype(jnp.int32), jnp.where(largest == 0, 0.0, scale)


def of_lookup(eqn: jax_core.JaxprEqn, shape: Sequence[int], at: jax.Array) -> Lookup | None:
    """What a gather reads of a matrix, where that is whole rows; else None."""
    p, ndim = eqn.params, at.ndim - 1
    numbers = p["dimension_numbers"]
    rows = numbers.start_index_map == numbers.collapsed_slice_dims == (0,) and not numbers.operand_batching_dims
    if len(shape) != 2 or not rows or tuple(p["slice_sizes"]) != (1, shape[1]) or numbers.offset_dims != (ndim,):
        return None
    fills = p["mode"] == jax.lax.GatherScatterMode.FILL_OR_DROP
    return None if fills and p["fill_value"] is not None else Lookup(at[..., 0], shape[0], fills)


@dataclasses.dataclass(frozen=True)
class Lookup:
    """Rows of a table that an activation chose.

    Attributes:
      at: which.
      length: of the table.
      fills: whether a row outside is NaN, or the nearest.
    """

    at: jax.Array
    length: int
    fills: bool

    def taken(self, table: jax.Array, unit: int = 1) -> jax.Array:
        """Rows of a table, of which one may stand for ``unit`` others, or for all."""
        if table.shape[0] == 1:
            return table
        return jnp.take(table, jnp.clip(self.at.reshape(-1), 0, self.length - 1) // unit, axis=0)

    def restored(self, found: jax.Array) -> jax.Array:
        """The rows where they belong."""
        found = found.reshape(*self.at.shape, found.shape[-1])
        if not self.fills:
            return found
        inside = (self.at >= 0) & (self.at < self.length)
        return jnp.where(inside[..., None], found, jnp.asarray(jnp.nan, found.dtype))
