"""Gates over alternatives whose temperature falls while the weak ones are cut."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jcompress import core, rules, transforms
from jcompress.core import PyTree
from jcompress.prune.dynamic.held import lay


class AnnealedState(NamedTuple):
    """State of :func:`asap`: the steps taken, ``{path: alternatives that are left}``, the optimizer's state."""

    steps: jax.Array
    masks: dict[str, jax.Array]
    inner: PyTree

    def nodes(self, params: Mapping[str, jax.Array], /) -> dict[str, Any]:
        """Nothing: a logit whose alternative is cut is not 0."""
        return {}


def asap(
    inner: optax.GradientTransformation,
    temperature: optax.ScalarOrSchedule,
    threshold: optax.ScalarOrSchedule,
    every: int = 1,
    *,
    grace: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """ASAP: train the logits of alternatives, anneal them, and cut those of low probability (Noy et al. 2019).

    An optax transform for a tree of logits, beside the weights and their optimizer: the last axis of each array lists
    the alternatives of one place, operations, blocks or groups of channels, whose outputs the model weighs by
    :func:`gates`; the paper trains them on data that the weights do not see. On steps 0, ``every``, ``2 * every``, ...,
    from ``grace`` on, alternatives with a probability below the threshold are cut for good, the most probable one
    never; what is cut has a gate of exactly 0, and its logit stays as it is. As the temperature falls, probabilities
    part, until one alternative is left (arXiv:1904.04123).

    A logit of 0 would be a gate above 0, so :func:`jcompress.nodes` leaves logits as they are: ``state.masks`` says
    which alternatives to build the model from.

    Args:
      inner: the optimizer of the logits.
      temperature: of the softmax, positive: a number or a schedule, such as ``optax.exponential_decay(1.3, 100, 0.9)``.
      threshold: a number or a schedule, in the unit of a probability; below 1 / (number of alternatives) at first.
      every: steps between cuts.
      grace: steps before the first cut.

    Returns:
      A ``GradientTransformationExtraArgs``; ``update`` must be given ``params``.

    Raises:
      ValueError: if ``every`` is not positive, or ``update`` is called without ``params``.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from jcompress.prune import dynamic
      >>> logits = {"place": jnp.zeros(3)}
      >>> tx = dynamic.asap(optax.sgd(0.5), temperature=1.0, threshold=0.15)
      >>> state = tx.init(logits)
      >>> for _ in range(3):
      ...     grads = jax.grad(lambda x: dynamic.gates(x, state, 1.0)["place"] @ jnp.array([0.0, 1.0, 3.0]))(logits)
      ...     updates, state = tx.update(grads, state, logits)
      ...     logits = optax.apply_updates(logits, updates)
      >>> state.masks["place"].tolist()
      [True, True, False]
    """
    transforms.check_every("asap", every)
    tx = optax.with_extra_args_support(inner)

    def init(params: PyTree) -> AnnealedState:
        masks = {path: jnp.ones(jnp.shape(x), jnp.bool_) for path, x in rules.paths(params)}
        return AnnealedState(transforms.steps(), masks, tx.init(params))

    def update(
        updates: PyTree, state: AnnealedState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, AnnealedState]:
        transforms.need("asap", params)
        updates, inner = tx.update(lay(updates, state.masks, params), state.inner, params, **extra)
        updates = lay(updates, state.masks, params)
        due = transforms.is_due(state.steps, every) & (state.steps >= grace)
        found = _probabilities(
            optax.apply_updates(params, updates), state.masks, core.value_at(temperature, state.steps)
        )
        least = core.value_at(threshold, state.steps)
        masks = {
            path: mask & (~due | (found[path] >= least) | (found[path] == found[path].max(-1, keepdims=True)))
            for path, mask in state.masks.items()
        }
        return updates, AnnealedState(optax.safe_increment(state.steps), masks, inner)

    return optax.GradientTransformationExtraArgs(init, update)


def gates(logits: PyTree, state: AnnealedState, temperature: optax.ScalarOrSchedule) -> PyTree:
    """The probabilities of the alternatives that are left, 0 for the others; of the logits' form.

    Args:
      logits: the tree that :func:`asap` trains.
      state: of it.
      temperature: as given to it; a schedule is read at the steps taken.

    Returns:
      A tree like ``logits``.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from jcompress.prune import dynamic
      >>> logits = {"place": jnp.zeros(2)}
      >>> state = dynamic.asap(optax.sgd(0.5), temperature=1.0, threshold=0.15).init(logits)
      >>> dynamic.gates(logits, state, 1.0)["place"].tolist()
      [0.5, 0.5]
    """
    found = _probabilities(logits, state.masks, core.value_at(temperature, state.steps))
    return rules.rebuild(logits, found)


def _probabilities(logits: PyTree, masks: dict[str, jax.Array], temperature: Any) -> dict[str, jax.Array]:
    return {path: jax.nn.softmax(x / temperature, where=masks[path]) for path, x in rules.paths(logits)}
