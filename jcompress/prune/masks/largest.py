"""Pruning by magnitude."""

from __future__ import annotations

import dataclasses

from jcompress.prune import scores
from jcompress.prune.masks.scored import ByScore, fixed


@dataclasses.dataclass(frozen=True)
class Magnitude(ByScore):
    """Keep the weights of largest magnitude (Han et al. 2015, arXiv:1506.02626).

    The score of a weight is ``|w|``. The number of weights kept is exact, ``n - round(sparsity * n)``, and ties go
    to the lower index; so a leaf of fewer than ``0.5 / (1 - sparsity)`` weights keeps none (``.9999`` of 100): give
    it a rule of its own, or ``scope="global"``. With a cubic ramp,
    ``optax.polynomial_schedule(0.0, 0.9, power=3, transition_steps=n)``,
    this is gradual pruning (Zhu & Gupta 2017, arXiv:1710.01878).

    Attributes:
      sparsity: the fraction of zeros, in [0, 1]: a number, a traced scalar or an optax schedule. None if a pattern
        fixes it.
      scope: ``"leaf"``, a threshold for each leaf; ``"output"``, one for the weights of each output (the last axis);
        or ``"global"``, one for all leaves of the rule.
      pattern: :class:`NM`, :class:`Block` or :class:`Shared`, or None for unstructured.

    Raises:
      ValueError: for a sparsity outside [0, 1] or one that disagrees with the pattern.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> node = jc.prune.Magnitude(sparsity=0.5)(jnp.array([1.0, -4.0, 2.0, -3.0]))
      >>> node.materialize().tolist()
      [0.0, -4.0, 0.0, -3.0]
    """

    score: scores.Score = fixed(scores.magnitude)
