"""Several objectives at once: which points no other beats. Higher is better in every objective."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def dominates(a: jax.Array, b: jax.Array) -> jax.Array:
    """Whether ``a`` is nowhere worse than ``b`` and somewhere better; the last axis holds objectives."""
    return jnp.all(a >= b, -1) & jnp.any(a > b, -1)


def ranks(scores: jax.Array) -> jax.Array:
    """Non-dominated sorting: 0 for points that none beats, 1 for those that only rank 0 beats, and so on.

    All pairs are compared at once, and fronts are peeled off in a loop (Deb et al. 2002, NSGA-II).

    Args:
      scores: (n, objectives), higher is better. Negate bytes.

    Returns:
      (n,), int32.

    Example:
      >>> import jax.numpy as jnp
      >>> from jcompress import measure
      >>> measure.ranks(jnp.array([[1.0, 3.0], [2.0, 2.0], [1.0, 2.0], [0.0, 0.0]])).tolist()
      [0, 0, 1, 2]
    """
    beats = dominates(scores[:, None], scores[None])

    def peel(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        rank, now = state
        left = rank < 0
        front = left & ~jnp.any(beats & left[:, None], 0)
        return jnp.where(front, now, rank), now + 1

    start = jnp.full(scores.shape[0], -1, jnp.int32), jnp.int32(0)
    return jax.lax.while_loop(lambda state: jnp.any(state[0] < 0), peel, start)[0]


def crowding(scores: jax.Array, rank: jax.Array) -> jax.Array:
    """How far apart the neighbours of a point in its front are, summed over objectives; infinite at the ends.

    Differences are parts of the range of all points (Deb et al. 2002, NSGA-II).

    Args:
      scores: (n, objectives).
      rank: (n,), from :func:`ranks`.

    Returns:
      float32 (n,).

    Example:
      >>> import jax.numpy as jnp
      >>> from jcompress import measure
      >>> scores = jnp.array([[0.0, 4.0], [1.0, 3.0], [4.0, 0.0]])
      >>> measure.crowding(scores, measure.ranks(scores)).tolist()
      [inf, 2.0, inf]
    """
    total = jnp.zeros(scores.shape[0])
    for column in scores.T:
        order = jnp.lexsort((column, rank))
        x, front = column[order], rank[order]
        inside = (front[2:] == front[1:-1]) & (front[:-2] == front[1:-1])
        span = jnp.maximum(jnp.max(x, initial=-jnp.inf) - jnp.min(x, initial=jnp.inf), jnp.finfo(x.dtype).tiny)
        gap = jnp.full(x.shape, jnp.inf).at[1:-1].set(jnp.where(inside, (x[2:] - x[:-2]) / span, jnp.inf))
        total = total.at[order].add(gap)
    return total


def hypervolume(scores: np.ndarray, reference: np.ndarray) -> float:
    """The volume of all that the points beat, down to a reference point. It grows with every better front.

    By slices along the last objective, recursively: exact, on the host, for the few points of a front.

    Args:
      scores: (n, objectives), higher is better. Dominated points add nothing.
      reference: (objectives,): what counts as worst. Points not above it in all objectives add nothing.

    Returns:
      The volume, in the product of the units of the objectives.

    Example:
      >>> import numpy as np
      >>> from jcompress import measure
      >>> measure.hypervolume(np.array([[1.0, 3.0], [2.0, 2.0]]), np.zeros(2))
      5.0
    """
    reference = np.asarray(reference, np.float64)
    points = np.asarray(scores, np.float64)
    points = points[(points > reference).all(-1)] - reference
    return _volume(points)


def _volume(points: np.ndarray) -> float:
    if not len(points):
        return 0.0
    if points.shape[1] == 1:
        return float(points.max())
    points = points[np.argsort(-points[:, -1])]
    heights = points[:, -1] - np.append(points[1:, -1], 0)
    return float(sum(h * _volume(points[: i + 1, :-1]) for i, h in enumerate(heights) if h > 0))
