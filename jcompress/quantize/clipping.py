"""How far weights are clipped before they are rounded, by what that does to the outputs."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jcompress import core
from jcompress.core import Context, Method
from jcompress.formats import Quantized
from jcompress.formats.quantized import pool, spread
from jcompress.layers import matrices
from jcompress.numeric import scaling

_LEAST = 0.5


def clipped(grid: Method, clips: int, layer: matrices.Contraction, gram: jax.Array, context: Context) -> Quantized:
    """The kernel of ``layer`` on the grid, each range cut to the part, from 1 down to 1/2, of least output error.

    The error that a scale answers for is that of its own inputs; where scales share an output, the leaf as a whole is
    clipped only if that lowers its error too.

    Args:
      grid: gives ``Quantized`` nodes.
      clips: how many parts.
      layer: the kernel, as it meets its inputs.
      gram: of these inputs, (layers, k, k).
      context: for the grid.

    Raises:
      ValueError: for a grid that gives another node.
    """
    w, plain = layer.w, grid(layer.w, context)
    if not isinstance(plain, Quantized):
        raise ValueError(
            f"{context.path}: clips={clips} needs a grid that gives Quantized, found {plain!r}; use clips=1"
        )
    if not w.size:
        return plain
    shown, unit = matrices.visible(layer, context), scaling.unit([w])
    how = plain.axes, plain.group_size, plain.group_axis
    most = pool(jnp.abs(w).astype(jnp.float32), how[0], how[1], jnp.maximum, 0.0, how[2])
    own = jnp.where(_together(plain, layer, most.shape), gram, 0)

    def fitted(part: jax.Array) -> tuple[Quantized, jax.Array]:
        limit = spread(part * most, w, *how[1:]).astype(w.dtype)
        node = grid(jnp.clip(w, -limit, limit), context)
        return node, jnp.where(shown, unit.divide(layer.of(core.dense(node) - w).matrix()), 0)

    def error(part: jax.Array) -> jax.Array:
        change = fitted(part)[1]
        moved = change * jnp.matmul(own, change, precision=jax.lax.Precision.HIGHEST)
        return pool(layer.of(w.astype(jnp.float32)).restore(moved), how[0], how[1], jnp.add, 0.0, how[2])

    parts = jnp.linspace(1.0, _LEAST, clips, dtype=jnp.float32)
    errors = jax.lax.map(error, parts)
    best = parts[jnp.argmin(jnp.where(jnp.isnan(errors), jnp.inf, errors), 0)]
    found = [fitted(part) for part in (jnp.ones_like(best), best)]
    whole, cut = (matrices.moved(change, gram).sum() for _, change in found)
    return jax.tree.map(lambda a, b: jnp.where(cut < whole, b, a), found[0][0], found[1][0])


def _together(node: Quantized, layer: matrices.Contraction, shape: tuple[int, ...]) -> jax.Array:
    """Which inputs share their scales, (layers, k, k)."""
    ids = jnp.arange(int(np.prod(shape)), dtype=jnp.float32).reshape(shape)
    wide = jnp.broadcast_to(spread(ids, layer.w, node.group_size, node.group_axis), layer.w.shape)
    row: Any = dataclasses.replace(layer, w=wide).matrix()[:, :, 0]
    return row[:, :, None] == row[:, None, :]
