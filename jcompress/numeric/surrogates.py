"""Functions with another derivative than their own."""

from __future__ import annotations

import jax
import jax.numpy as jnp


@jax.custom_jvp
def straight_through(w: jax.Array, value: jax.Array) -> jax.Array:
    """``value`` forward, exactly; backward the identity in ``w`` (Bengio et al. 2013, arXiv:1308.3432).

    Args:
      w: what gets the gradient.
      value: of the shape of ``w``, what is computed with.

    Returns:
      ``value``.

    Example:
      >>> import jax, jax.numpy as jnp, jcompress as jc
      >>> rounded = lambda w: jc.straight_through(w, jnp.round(w))
      >>> float(rounded(1.4)), float(jax.grad(rounded)(1.4))
      (1.0, 1.0)
    """
    return value


@straight_through.defjvp
def _straight_through_jvp(primals: tuple, tangents: tuple) -> tuple:
    return straight_through(*primals), tangents[0]


@jax.custom_jvp
def round_through(x: jax.Array) -> jax.Array:
    """The nearest integer, ties to even; the derivative is one (Bengio et al. 2013, arXiv:1308.3432)."""
    return jnp.round(x)


@round_through.defjvp
def _round_through_jvp(primals: tuple, tangents: tuple) -> tuple:
    return round_through(*primals), tangents[0]


def clip_outside(x: jax.Array, low: float, high: float) -> jax.Array:
    """``clip(x, low, high)`` with derivative one strictly between the ends, zero on and beyond them."""
    return jnp.where((x > low) & (x < high), x, jax.lax.stop_gradient(jnp.clip(x, low, high)))


def scaled_gradient(x: jax.Array, factor: float) -> jax.Array:
    """``x`` forward; its gradient is multiplied by ``factor``."""
    return straight_through(x * factor, x)


def soft_round(x: jax.Array, k: jax.Array) -> jax.Array:
    """``floor(x) + (tanh(k * t) / tanh(k / 2) + 1) / 2`` with ``t = x - floor(x) - 1/2``."""
    whole = jnp.floor(x)
    return whole + (jnp.tanh(k * (x - whole - 0.5)) / jnp.tanh(k / 2) + 1) / 2


@jax.custom_jvp
def round_with_soft_slope(x: jax.Array, k: jax.Array) -> jax.Array:
    """The nearest integer, with the derivatives of :func:`soft_round`."""
    return jnp.round(x)


@round_with_soft_slope.defjvp
def _round_with_soft_slope_jvp(primals: tuple, tangents: tuple) -> tuple:
    return round_with_soft_slope(*primals), jax.jvp(soft_round, primals, tangents)[1]
