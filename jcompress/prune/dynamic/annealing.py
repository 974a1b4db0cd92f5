"""Gates over alternatives whose temperature falls while the weak ones are cut."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jcompress import core, rules
from jcompress.core import PyTree


class AnnealedState(NamedTuple):
    """State of :func:`asap`: the steps taken, ``{path: alternatives that are left}``, the optimizer's state."""

    steps: jax.Array
    masks: dict[str, jax.Array]
    inner: PyTree


def asap(
    optimizer: optax.GradientTransformation,
    temperature: optax.ScalarOrSchedule,
    threshold: optax.ScalarOrSchedule,
    *,
    grace: int = 0,
    every: int = 1,
) -> optax.GradientTransformationExtraArgs:
    """ASAP: train the logits of alternatives, anneal them, and cut those of low probability (Noy et al. 2019).

    An optax transform for a tree of logits, beside the weights and their optimizer: the last axis of each array lists
    the alternatives of one place, operations, blocks or groups of channels, whose outputs the model weighs by
    :func:`gates`; the paper trains them on data that the weights do not see. On steps ``every``, ``2 * every``, ...,
    after ``grace``, alternatives with a probability below the threshold are cut for good, the most probable one never;
    what is cut has a gate of exactly 0, and its logit stays as it is. As the temperature falls, probabilities part,
    until one alternative is left (arXiv:1904.04123).

    Args:
      optimizer: of the logits.
      temperature: of the softmax, positive: a number or a schedule, such as ``optax.exponential_decay(1.3, 100, 0.9)``.
      threshold: a number or a schedule, in the unit of a probability; below 1 / (number of alternatives) at first.
      grace: steps before the first cut.
      every: steps between cuts.

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
    if every < 1:
        raise ValueError(f"asap: every={every} must be a positive number of steps")
    tx = optax.with_extra_args_support(optimizer)

    def init(params: PyTree) -> AnnealedState:
        masks = {path: jnp.ones(jnp.shape(x), jnp.bool_) for path, x in rules.paths(params)}
        return AnnealedState(jnp.zeros((), jnp.int32), masks, tx.init(params))

    def update(
        updates: PyTree, state: AnnealedState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, AnnealedState]:
        if params is None:
            raise ValueError("asap needs the logits: call tx.update(grads, state, params)")
        updates, inner = tx.update(_laid(updates, state.masks), state.inner, params, **extra)
        updates = _laid(updates, state.masks)
        steps = optax.safe_increment(state.steps)
        due = (steps % every == 0) & (steps > grace)
        found = _probabilities(
            optax.apply_updates(params, updates), state.masks, core.value_at(temperature, state.steps)
        )
        least = core.value_at(threshold, state.steps)
        masks = {
            path: mask & (~due | (found[path] >= least) | (found[path] == found[path].max(-1, keepdims=True)))
            for path, mask in state.masks.items()
        }
        return updates, AnnealedState(steps, masks, inner)

    return optax.GradientTransformationExtraArgs(init, update)


def gates(logits: PyTree, state: AnnealedState, temperature: optax.ScalarOrSchedule) -> PyTree:
    """The probabilities of the alternatives that are left, 0 for the others; of the logits' form.

    Args:
      logits: the tree that :func:`asap` trains.
      state: of it.
      temperature: as given to it; a schedule is read at the steps taken.
    """
    found = _probabilities(logits, state.masks, core.value_at(temperature, state.steps))
    return jax.tree.unflatten(jax.tree.structure(logits), list(found.values()))


def _probabilities(logits: PyTree, masks: dict[str, jax.Array], temperature: Any) -> dict[str, jax.Array]:
    return {path: jax.nn.softmax(x / temperature, where=masks[path]) for path, x in rules.paths(logits)}


def _laid(updates: PyTree, masks: dict[str, jax.Array]) -> PyTree:
    leaves, treedef = jax.tree.flatten(updates)
    return jax.tree.unflatten(treedef, [jnp.where(mask, x, 0) for x, mask in zip(leaves, masks.values(), strict=True)])
