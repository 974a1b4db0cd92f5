"""Proximal operators of sparse penalties, as functions of arrays."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def soft_threshold(x: jax.Array, limit: Any) -> jax.Array:
    """``sign(x) max(|x| - limit, 0)``, the minimum over v of ``(v - x)**2 / 2 + limit |v|``."""
    return (jnp.sign(x) * jnp.maximum(jnp.abs(x) - limit, 0)).astype(x.dtype)


def shrink_factor(norm: jax.Array, limit: Any) -> jax.Array:
    """``max(1 - limit / norm, 0)``, by which a vector of this norm moves towards zero: block soft thresholding."""
    return jnp.where(norm > limit, 1 - limit / jnp.where(norm > limit, norm, 1), 0)


def isotonic(x: jax.Array) -> jax.Array:
    """The nearest non-increasing sequence in least squares, by pooling adjacent violators.

    Linear time, on the device: blocks of pooled entries stand on a stack, and a new entry is merged with the blocks
    below it as long as their means would rise.

    Args:
      x: (n,), float.

    Example:
      >>> import jax.numpy as jnp
      >>> from jcompress.numeric import shrinkage
      >>> shrinkage.isotonic(jnp.array([4.0, 1.0, 3.0, 2.0])).tolist()
      [4.0, 2.0, 2.0, 2.0]
    """
    if not x.size:
        return x

    def rises(blocks: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        total, count, top = blocks
        below = jnp.maximum(top - 1, 0)
        return (top > 0) & (total[below] * count[top] < total[top] * count[below])

    def merge(blocks: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        total, count, top = blocks
        total = total.at[top - 1].add(total[top]).at[top].set(0)
        return total, count.at[top - 1].add(count[top]).at[top].set(0), top - 1

    def push(i: jax.Array, blocks: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        total, count, top = blocks
        return jax.lax.while_loop(rises, merge, (total.at[top + 1].set(x[i]), count.at[top + 1].set(1), top + 1))

    empty = jnp.zeros_like(x), jnp.zeros(x.shape, jnp.int32), jnp.int32(-1)
    total, count, _ = jax.lax.fori_loop(0, x.size, push, empty)
    return jnp.repeat(total / jnp.maximum(count, 1), count, total_repeat_length=x.size)


def ordered_shrink(norms: jax.Array, limits: jax.Array) -> jax.Array:
    """The minimum over v of ``||v - norms||**2 / 2 + sum_i limits[i] v_[i]``, where ``v_[i]`` is the i-th largest.

    The norms are sorted, moved by the limits, made non-increasing again and clipped at zero (Bogdan et al. 2015,
    arXiv:1407.3824). Entries that come close to each other become equal.

    Args:
      norms: (n,), not negative.
      limits: (n,), non-increasing and not negative.

    Example:
      >>> import jax.numpy as jnp
      >>> from jcompress.numeric import shrinkage
      >>> shrinkage.ordered_shrink(jnp.array([1.0, 5.0, 4.5]), jnp.array([2.0, 1.0, 0.5])).tolist()
      [0.5, 3.25, 3.25]
    """
    order = jnp.argsort(norms, descending=True)
    moved = jnp.maximum(isotonic(norms[order] - limits), 0)
    return jnp.zeros_like(norms).at[order].set(moved)
