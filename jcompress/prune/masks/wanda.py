"""Pruning by weights and the activations that they meet."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jcompress.core import Context
from jcompress.layers import matrices
from jcompress.numeric.damping import filled
from jcompress.prune import scores
from jcompress.prune.masks import selection
from jcompress.prune.masks.scored import ByScore, fixed


@scores.reads("stats.norm")
def wanda(w: jax.Array, context: Context) -> jax.Array:
    """``|w|`` times the Euclidean norm, over the calibration data, of the input that the weight multiplies."""
    layer, norm = matrices.of(w, context, "norm")
    return jnp.abs(w).astype(jnp.float32) * matrices.spread(layer, filled(norm))


@dataclasses.dataclass(frozen=True)
class Wanda(ByScore):
    """Keep the weights whose magnitude times input norm is largest among those of the same output.

    The score is ``|W_ij| * ||x_i||_2`` (Sun et al. 2023, arXiv:2306.11695): the change of the output when this weight
    alone is cut. Weights are compared within each output, each of which keeps ``k - round(sparsity * k)`` of its ``k``
    weights. Needs the statistic ``norm``, from ``jc.calibrate(fn, params, batches, plan=plan)``, which also says which
    axes are contracted, so convolutions and stacked layers are laid out right. An input that was never seen, norm 0,
    counts as the mean of the others: there magnitude decides.

    Attributes:
      sparsity: the fraction of zeros, in [0, 1]: a number, a traced scalar or an optax schedule. None if a pattern
        fixes it.
      scope: ``"output"``, as in the paper, ``"leaf"`` or ``"global"``.
      pattern: :class:`NM`; with another scope also :class:`Block` or :class:`Shared`; or None for unstructured.

    Raises:
      ValueError: for a sparsity outside [0, 1], or if the statistics are missing or of another shape.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> params = {"kernel": jnp.array([[1.0, 2.0], [3.0, -3.0]])}
      >>> plan = jc.plan(params, [("kernel", jc.prune.Wanda(sparsity=0.5))])
      >>> batches = [jnp.array([[6.0, 1.0], [8.0, 1.0]])]
      >>> stats = jc.calibrate(lambda p, x: x @ p["kernel"], params, batches, plan=plan)
      >>> jc.compress(params, plan, stats=stats)["kernel"].materialize().tolist()
      [[1.0, 2.0], [0.0, 0.0]]
    """

    scope: selection.Scope = "output"
    score: scores.Score = fixed(wanda)
