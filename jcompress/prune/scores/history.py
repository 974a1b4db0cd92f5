"""Scores that are gathered while a model trains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jcompress import core, rules, transforms
from jcompress.core import Context, PyTree
from jcompress.prune import scores


class AccumulatedScores(NamedTuple):
    """State of :func:`accumulate`.

    Attributes:
      scores: ``{path: float32 array}``.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> jc.prune.AccumulatedScores({"w": jnp.array([1.0, 3.0])}).scores["w"].tolist()
      [1.0, 3.0]
    """

    scores: dict[str, jax.Array]

    def nodes(self, params: Mapping[str, jax.Array], /) -> dict[str, Any]:
        """Nothing: scores choose afterwards."""
        return {}


def accumulate(score: scores.Score, decay: float | None = None) -> optax.GradientTransformationExtraArgs:
    """An optax transform that gathers a score over the steps and leaves the updates as they are.

    ``S <- S + s_t``, or with a decay the running mean ``S <- decay * S + (1 - decay) * s_t``. The score's
    ``context.grad`` is what the transform is given: gradients at the head of a chain, the steps themselves at its end.

    - ``accumulate(scores.movement)`` at the head: movement pruning (Sanh et al. 2020, arXiv:2005.07683).
    - ``accumulate(scores.movement, decay=0.8)`` at the head: relevance, for skeletonization (Mozer & Smolensky 1989);
      ``pattern=Block((None, 1))`` sums it over units.
    - ``accumulate(lambda w, context: context.grad**2)`` at the end: the squared steps of :func:`karnin`.

    Args:
      score: a function of an array and its context; it may read ``grad``.
      decay: in [0, 1), or None for the sum.

    Returns:
      A transform whose state has ``.scores``, ``{path: array}``, for :func:`jcompress.prune.scores.lookup`.

    Raises:
      ValueError: if ``update`` is called without ``params``, or for a decay outside [0, 1).

    Example:
      >>> import jax.numpy as jnp, optax, jcompress as jc
      >>> params = {"w": jnp.array([2.0, -2.0])}
      >>> tx = optax.chain(jc.prune.accumulate(jc.prune.scores.movement), optax.sgd(0.1))
      >>> updates, state = tx.update({"w": jnp.array([-1.0, -1.0])}, tx.init(params), params)
      >>> state[0].scores["w"].tolist()
      [2.0, -2.0]

      Pruning by what was gathered:

      >>> by = jc.prune.ByScore(sparsity=0.5, score=jc.prune.scores.lookup(state[0].scores))
      >>> size = jc.save("weights.jc", jc.compress(params, jc.plan(params, [("w", by)])))
    """
    if decay is not None and core.is_concrete(decay) and not 0 <= decay < 1:
        raise ValueError(f"accumulate: decay={decay} is outside [0, 1)")

    def init(params: PyTree) -> AccumulatedScores:
        return AccumulatedScores({path: jnp.zeros_like(w, jnp.float32) for path, w in rules.paths(params)})

    def update(
        updates: PyTree, state: AccumulatedScores, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, AccumulatedScores]:
        transforms.need("accumulate", params)
        found, grads = {}, rules.beside(params, updates)
        for path, w in rules.leaves(params).items():
            now = scores.evaluate(score, w, Context(grad=grads[path], path=path)).astype(jnp.float32)
            old = state.scores[path]
            found[path] = old + now if decay is None else decay * old + (1 - decay) * now
        return updates, AccumulatedScores(found)

    return optax.GradientTransformationExtraArgs(init, update)


def karnin(initial: jax.Array, final: jax.Array, squared_steps: jax.Array, learning_rate: Any) -> jax.Array:
    """Karnin's sensitivity: the loss of a weight's removal, estimated from the path of training to its end.

    ``S = |sum_n dw(n)**2 * w_f / (eta (w_f - w_i))|``, which approximates the integral of the gradient from 0 to
    ``w_f`` by what descent has seen between ``w_i`` and ``w_f``. A weight that never moved has score 0.

    Args:
      initial: ``w_i``.
      final: ``w_f``, of the same shape.
      squared_steps: the sum of squared steps, from :func:`accumulate`.
      learning_rate: ``eta`` of plain gradient descent.

    Returns:
      Scores of the same shape; larger is kept.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> steps = 10 * (0.1 * 3.0)**2  # ten steps of rate 0.1 along a constant gradient of 3
      >>> float(jc.prune.karnin(jnp.array(5.0), jnp.array(2.0), jnp.array(steps), 0.1).round(4))
      6.0

    Reference: Karnin 1990, A simple procedure for pruning back-propagation trained neural networks.
    """
    moved = final - initial
    still = moved == 0
    return jnp.abs(jnp.where(still, 0, squared_steps * final / (learning_rate * jnp.where(still, 1, moved))))


def weight_elimination(params: PyTree, scale: Any = 1.0) -> jax.Array:
    """A penalty that counts weights: ``sum (w/scale)**2 / (1 + (w/scale)**2)`` (Weigend et al. 1991).

    Near zero it is weight decay, and for ``|w|`` far above the scale its gradient, ``2 b w / (1 + b w**2)**2`` with
    ``b = 1/scale**2``, is nearly none: large weights are free, small ones are driven out. Hanson & Pratt 1989 bias
    weight decay so.

    Args:
      params: a pytree of float arrays; those to be penalised.
      scale: the magnitude that counts as half a weight. A traced scalar works too.

    Returns:
      A float32 scalar, to be added to the loss.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> float(jc.prune.weight_elimination({"w": jnp.array([0.0, 1.0, 1e4])}).round(1))
      1.5
    """
    total = jnp.zeros((), jnp.float32)
    for w in jax.tree.leaves(params):
        square = jnp.square(w.astype(jnp.float32) / scale)
        total = total + jnp.sum(square / (1 + square))
    return total
