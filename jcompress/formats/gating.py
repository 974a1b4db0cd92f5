"""What formats with gates and noise share."""

from __future__ import annotations

import jax
import jax.numpy as jnp

TINY = 1e-16
_LARGE = 2.0**50


def shared_shape(shape: tuple[int, ...], axes: tuple[int, ...]) -> tuple[int, ...]:
    """The shape with length 1 at the negative axes along which a gate is shared."""
    return tuple(1 if i - len(shape) in axes else n for i, n in enumerate(shape))


def log_alpha(mean: jax.Array, log_variance: jax.Array) -> jax.Array:
    """The log of the dropout rate ``variance / mean**2`` of Gaussian noise, in float32."""
    size = jnp.abs(mean.astype(jnp.float32))
    beyond = jnp.log(jnp.maximum(size, _LARGE) / _LARGE)  # 0 but for means whose square leaves float32
    return log_variance.astype(jnp.float32) - jnp.log(jnp.square(jnp.minimum(size, _LARGE)) + TINY) - 2 * beyond


def kept_or_zero(mask: jax.Array, value: jax.Array, like: jax.Array) -> jax.Array:
    """``value`` in the dtype of ``like`` where the mask is True, exactly 0.0 elsewhere."""
    return jnp.where(mask, value, 0).astype(like.dtype)
