"""Proximal gradient descent, plain and accelerated: optax transforms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jcompress import core, rules, transforms
from jcompress.core import PyTree
from jcompress.prune.penalties.norms import Penalty


def _prox(penalty: Penalty, path: str, x: jax.Array, step: Any) -> jax.Array:
    wrong = [axis for axis in getattr(penalty, "axes", ()) if not -x.ndim <= axis < 0]
    if wrong:
        raise ValueError(
            f"{path}: found shape {x.shape}, which has no axes {wrong} for {penalty}; choose its arrays with match="
        )
    return penalty.prox(x, step)


def proximal(
    penalty: Penalty, learning_rate: optax.ScalarOrSchedule, match: str = ".*"
) -> optax.GradientTransformationExtraArgs:
    """Apply a penalty's proximal operator after each step: an optax transform, last in the chain.

    ``w <- argmin_v ||v - w||**2 / 2 + learning_rate * penalty(v)``. After ``optax.sgd(learning_rate)`` this is proximal
    gradient descent (ISTA; Daubechies et al. 2004), which converges to the minimum of the penalized loss if the
    learning rate is below one over the largest curvature. Zeros are exact, and a gradient can bring a weight back.
    After another optimizer it is the usual heuristic: the same operator at the same rate. For units that span several
    arrays see :func:`jcompress.prune.structured.group_lasso_proximal`.

    Soft thresholds for the scales of batch norm, the proximal form of network slimming (Liu et al. 2017,
    arXiv:1708.06519), are ``proximal(L1(strength), learning_rate, match=".*scale")``.

    Args:
      penalty: one of this room, or anything with ``prox(x, step)``.
      learning_rate: the step of the operator, that of the optimizer, or the same schedule.
      match: a regular expression for the whole paths of the parameters that are penalized.

    Returns:
      A ``GradientTransformationExtraArgs``; ``update`` must be given ``params``.

    Raises:
      ValueError: if nothing matches, an array lacks the axes of the penalty, or ``update`` is called without
        ``params``.

    Example:
      >>> import jax.numpy as jnp, optax, jcompress as jc
      >>> from jcompress.prune import penalties
      >>> params = {"w": jnp.array([1.0, -0.05])}
      >>> tx = optax.chain(optax.sgd(0.5), penalties.proximal(penalties.L1(0.5), 0.5))
      >>> updates, state = tx.update({"w": jnp.array([1.0, 0.0])}, tx.init(params), params)
      >>> params = optax.apply_updates(params, updates)
      >>> params["w"].tolist()
      [0.25, 0.0]
      >>> size = jc.save("weights.jc", jc.nodes(params, state))  # masks of what is not zero
    """

    def chosen(params: PyTree) -> dict[str, jax.Array]:
        return rules.matching(params, match, "proximal: match")

    def shrink(new: dict[str, jax.Array], steps: jax.Array) -> dict[str, jax.Array]:
        rate = core.value_at(learning_rate, steps)
        return {path: _prox(penalty, path, x, rate) for path, x in chosen(new).items()}

    return transforms.moving("proximal", chosen, shrink)


class AcceleratedState(NamedTuple):
    """State of :func:`accelerated`.

    Attributes:
      steps: the steps taken.
      t: Nesterov's t.
      iterate: the iterate, whose zeros are exact.
      paths: those of the parameters that are penalized.

    Example:
      >>> import jax.numpy as jnp
      >>> from jcompress.prune import penalties
      >>> penalties.accelerated(penalties.L1(0.5), 0.5).init({"w": jnp.zeros(2)}).paths
      {'w': None}
    """

    steps: jax.Array
    t: jax.Array
    iterate: PyTree
    paths: dict[str, None]

    def nodes(self, params: Mapping[str, jax.Array], /) -> dict[str, Any]:
        """The iterate, under masks of what is not zero in it where it is penalized."""
        found = rules.leaves(self.iterate)
        # Looked up, so that the parameters of another model are refused.
        known = {path: found[path].astype(params[path].dtype) for path in found}
        return known | transforms.by_zeros(known, self.paths)


def accelerated(
    penalty: Penalty, learning_rate: optax.ScalarOrSchedule, match: str = ".*"
) -> optax.GradientTransformationExtraArgs:
    """FISTA: proximal gradient descent with Nesterov's momentum (Beck & Teboulle 2009), an optimizer of its own.

    ``x' = prox(y - learning_rate * grad(y))``, ``t' = (1 + sqrt(1 + 4 t**2)) / 2`` and ``y' = x' + (t - 1) /
    t' (x' - x)``. The parameters are the points y where gradients are wanted. The answer, with exact zeros, is the
    iterate x, ``state.iterate``, and it is what :func:`jcompress.nodes` gives.
    Generative adversarial learning trains its soft masks so (GAL; Lin et al. 2019, arXiv:1903.09291): see
    :func:`jcompress.prune.structured.generator_loss`.

    Args:
      penalty: one of this room, or anything with ``prox(x, step)``.
      learning_rate: at most one over the largest curvature for the rate of 1 / steps**2 to hold; or a schedule.
      match: a regular expression for the whole paths of the parameters that are penalized; the others have the momentum
        only.

    Returns:
      A ``GradientTransformationExtraArgs``, to be given raw gradients and ``params``.

    Raises:
      ValueError: as for :func:`proximal`.

    Example:
      >>> import jax, jax.numpy as jnp, optax, jcompress as jc
      >>> from jcompress.prune import penalties
      >>> params = {"w": jnp.zeros(2)}
      >>> tx = penalties.accelerated(penalties.L1(0.5), 0.5)
      >>> state = tx.init(params)
      >>> for _ in range(30):
      ...     grads = {"w": params["w"] - jnp.array([2.0, 0.3])}
      ...     updates, state = tx.update(grads, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> state.iterate["w"].round(2).tolist()
      [1.5, 0.0]
      >>> size = jc.save("weights.jc", jc.nodes(params, state))
    """

    def init(params: PyTree) -> AcceleratedState:
        chosen = rules.matching(params, match, "accelerated: match")
        t, iterate = jnp.ones((), jnp.float32), jax.tree.map(jnp.copy, params)
        return AcceleratedState(transforms.steps(), t, iterate, dict.fromkeys(chosen))

    def update(
        updates: PyTree, state: AcceleratedState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, AcceleratedState]:
        transforms.need("accelerated", params)
        rate = core.value_at(learning_rate, state.steps)
        moved = jax.tree.map(lambda y, g: (y - rate * g).astype(y.dtype), params, updates)
        found = rules.leaves(moved)
        iterate = rules.rebuild(moved, {path: _prox(penalty, path, found[path], rate) for path in state.paths})
        t = 0.5 * (1 + jnp.sqrt(1 + 4 * state.t**2))
        ahead = (state.t - 1) / t
        change = jax.tree.map(
            lambda new, old, y: (new + ahead * (new - old) - y).astype(y.dtype), iterate, state.iterate, params
        )
        return change, AcceleratedState(optax.safe_increment(state.steps), t, iterate, state.paths)

    return optax.GradientTransformationExtraArgs(init, update)
