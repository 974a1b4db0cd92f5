"""Activations that may become linear, and the prior that makes them so."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jcompress.core import PyTree


def prelu(x: jax.Array, slope: jax.Array) -> jax.Array:
    """``max(x, 0) + slope * min(x, 0)``, a slope for each channel on the last axis: 0 is ReLU, 1 is linear.

    Args:
      x: (..., channels).
      slope: (channels,), or a number.

    Returns:
      An array like ``x``.

    Paper: He et al. 2015, arXiv:1502.01852.

    Example:
      >>> import jax.numpy as jnp
      >>> from jcompress.prune import structured
      >>> structured.prelu(jnp.array([[-2.0, -2.0], [3.0, 3.0]]), jnp.array([0.5, 1.0])).tolist()
      [[-1.0, -2.0], [3.0, 3.0]]
    """
    return jnp.where(x > 0, x, slope * x)


def linearity_penalty(slopes: PyTree, power: float = 0.5) -> jax.Array:
    """The prior that makes channels linear, ``sum |1 - slope|**power`` (Mehmeti-Goepel & Disselhoff 2022, 2211.17180).

    For powers below 1 it counts the nonlinear channels nearly, and so drives some slopes to 1 and leaves others. The
    gradient grows without bound near 1 and is taken as 0 there; follow steps with ``jnp.where(jnp.abs(1 - slope) <
    tolerance, 1, slope)``, and then hold those slopes.

    Args:
      slopes: a pytree of slopes of :func:`prelu`.
      power: 1/2 in the paper.

    Returns:
      A float32 scalar.

    Example:
      >>> import jax.numpy as jnp
      >>> from jcompress.prune import structured
      >>> float(structured.linearity_penalty({"act": jnp.array([1.0, 0.0, 0.75])}))
      1.5
    """
    total = jnp.zeros((), jnp.float32)
    for slope in jax.tree.leaves(slopes):
        away = jnp.abs(1 - jnp.asarray(slope, jnp.float32))
        total = total + jnp.sum(jnp.where(away > 0, jnp.where(away > 0, away, 1) ** power, 0))
    return total
