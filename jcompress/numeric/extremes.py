"""The least and the greatest of values that may be no numbers: NaN is neither."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def argmin(x: jax.Array, axis: int | None = None) -> jax.Array:
    """Where the least is; ``jnp.argmin`` takes NaN for it."""
    return jnp.argmin(jnp.where(jnp.isnan(x), jnp.inf, x), axis=axis)


def argmax(x: jax.Array, axis: int | None = None) -> jax.Array:
    """Where the greatest is; ``jnp.argmax`` takes NaN for it."""
    return jnp.argmax(lowest(x), axis=axis)


def lowest(x: jax.Array) -> jax.Array:
    """Scores, of which the higher is the better, with NaN as the lowest."""
    return jnp.where(jnp.isnan(x), -jnp.inf, x)
