"""A particle filter over masks."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jcompress.prune.search.evolution import Fitness


class Filtered(NamedTuple):
    """What a particle filter leaves: particles, their weights, and the effective number of particles at each step.

    Attributes:
      masks: (particles, length), boolean.
      weights: (particles,), which sum to one.
      effective: (steps,), the effective number of particles.

    Example:
      >>> import jax.numpy as jnp
      >>> from jcompress.prune import search
      >>> found = search.Filtered(jnp.array([[True, False], [True, True]]), jnp.array([0.75, 0.25]), jnp.array([1.6]))
      >>> (found.weights @ found.masks).tolist()
      [1.0, 0.25]
    """

    masks: jax.Array
    weights: jax.Array
    effective: jax.Array


def particle_filter(
    error: Fitness,
    key: jax.Array,
    length: int,
    *,
    particles: int = 128,
    steps: int = 50,
    flip: float | None = None,
    density: float = 0.5,
) -> Filtered:
    """A particle filter over masks: weights ``exp(-error)``, resampling, and bits that flip (Anwar et al. 2017).

    The paper is arXiv:1512.08571. A step flips bits, multiplies each weight by ``exp(-error)`` and normalises. If the
    effective number of particles, ``1 / sum weights**2``, falls below half, particles are drawn anew in proportion to
    their weights (systematic resampling) and weigh the same again.

    Args:
      error: of one mask, lower is better: a loss, or the errors on a validation split. Divide it by a temperature to
        make the filter more or less greedy.
      key: a PRNG key.
      length: bits of a mask.
      particles: how many.
      steps: how many.
      flip: the probability of a bit to flip in a step, ``1 / length`` by default.
      density: the expected fraction of ones at the start.

    Returns:
      :class:`Filtered`: masks (particles, length), weights (particles,) that sum to one, and the effective number of
      particles before any resampling, (steps,).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jcompress.prune import search
      >>> found = search.particle_filter(lambda mask: 4.0 * mask.sum(), jax.random.key(0), 6)
      >>> bool(found.masks.T @ found.weights @ jnp.ones(6) < 1)
      True
    """
    rate = 1 / length if flip is None else flip
    errors = jax.vmap(lambda mask: jnp.nan_to_num(error(mask), nan=1e30).astype(jnp.float32))

    def step(state: tuple[jax.Array, jax.Array], key: jax.Array) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        masks, logs = state
        flipped, drawn = jax.random.split(key)
        masks = masks ^ jax.random.bernoulli(flipped, jnp.float32(rate), masks.shape)
        logs = jax.nn.log_softmax(logs - errors(masks))
        effective = jnp.exp(-jax.nn.logsumexp(2 * logs))
        poor = effective < particles / 2
        places = jnp.where(poor, systematic(drawn, jnp.exp(logs)), jnp.arange(particles))
        return (masks[places], jnp.where(poor, jnp.zeros_like(logs), logs)), effective

    first, key = jax.random.split(key)
    masks = jax.random.bernoulli(first, jnp.float32(density), (particles, length))
    start = masks, jnp.zeros(particles, jnp.float32)
    (masks, logs), effective = jax.lax.scan(step, start, jax.random.split(key, steps))
    return Filtered(masks, jax.nn.softmax(logs), effective)


def systematic(key: jax.Array, weights: jax.Array) -> jax.Array:
    """Indices drawn in proportion to weights, each ``n * weight`` times up to rounding: systematic resampling.

    Args:
      key: for the one offset that is drawn.
      weights: (n,), not negative; they need not sum to one.

    Returns:
      int32 (n,), in rising order.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jcompress.prune import search
      >>> search.systematic(jax.random.key(0), jnp.array([0.0, 0.5, 0.5, 0.0])).tolist()
      [1, 1, 2, 2]
    """
    n = weights.shape[0]
    sums = jnp.cumsum(weights)
    points = (jnp.arange(n) + jax.random.uniform(key, dtype=jnp.float32)) / n * sums[-1]
    return jnp.minimum(jnp.searchsorted(sums, points, side="right"), n - 1)
