"""Pruning at random, the control of every comparison."""

from __future__ import annotations

import dataclasses

from jcompress.prune import scores
from jcompress.prune.masks.scored import ByScore, fixed


@dataclasses.dataclass(frozen=True)
class Random(ByScore):
    """Keep weights chosen uniformly at random: a control for methods that claim to choose well.

    Scores are uniform and depend on the key and the path only, so under a growing sparsity the masks are nested.

    Attributes:
      sparsity: the fraction of zeros, in [0, 1]: a number, a traced scalar or an optax schedule. None if a pattern
        fixes it.
      scope: ``"leaf"``, ``"output"`` or ``"global"``, as for :class:`Magnitude`. By outputs, each has the same fan-in.
      pattern: :class:`NM`, :class:`Block` or :class:`Shared`, or None for unstructured.

    Raises:
      ValueError: for a sparsity outside [0, 1], or if no key is given.

    Example:
      >>> import jax, jax.numpy as jnp, jcompress as jc
      >>> w = {"w": jnp.ones((8, 8))}
      >>> small = jc.compress(w, jc.plan(w, [("w", jc.prune.Random(sparsity=0.75))]), key=jax.random.key(0))
      >>> int(small["w"].mask.sum())
      16
    """

    score: scores.Score = fixed(scores.random)
