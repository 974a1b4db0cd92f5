"""Rates: how many bits symbols take under an ideal code. One vocabulary for choosing, training and storing.

``rate`` is what a message costs, ``code_lengths`` what each symbol does. Both take counts, or probabilities that need
not sum to one, of any shape whose last axis runs over symbols, on the host or on a device, and are differentiable.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def code_lengths(counts: Any, *, floor: float = 0.0) -> jax.Array:
    """Bits of each symbol under the ideal code of these counts, ``-log2(n / sum(n))``.

    Args:
      counts: how often each symbol occurs, shape (..., symbols); or probabilities.
      floor: what is added to each count, so that a symbol that never occurred has a finite length.

    Returns:
      Bits, float32, of the shape of ``counts``; infinite for a symbol that never occurs.
    """
    counts = jnp.asarray(counts, jnp.float32) + floor
    total = jnp.sum(counts, axis=-1, keepdims=True)
    return jnp.where(counts > 0, jnp.log2(total) - jnp.log2(jnp.where(counts > 0, counts, 1)), jnp.inf)


def rate(counts: Any, under: Any = None) -> jax.Array:
    """Bits of a message with these counts, under its own ideal code or that of others.

    ``sum(n_i * -log2(q_i / sum(q)))``: with ``q = n`` the empirical entropy times the length of the message.

    Args:
      counts: how often each symbol occurs, shape (..., symbols); may be soft.
      under: the counts or probabilities that the code is made for; those of the message itself by default.

    Returns:
      Bits, float32, of shape (...). A symbol that occurs and has no code costs infinitely many.
    """
    counts = jnp.asarray(counts, jnp.float32)
    lengths = code_lengths(counts if under is None else under)
    return jnp.sum(jnp.where(counts > 0, counts * jnp.where(counts > 0, lengths, 0), 0), axis=-1)
