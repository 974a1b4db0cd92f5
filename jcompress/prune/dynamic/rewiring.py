"""Deep rewiring: noisy training under sign constraints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jcompress import core, rules, transforms
from jcompress.core import PyTree
from jcompress.formats import Masked
from jcompress.numeric.alike import each
from jcompress.numeric.counting import Count, counted
from jcompress.numeric.threshold import keep_largest
from jcompress.prune.dynamic import entries
from jcompress.prune.dynamic.held import Masks, initial, lay
from jcompress.prune.masks.selection import Scope
from jcompress.rules import Plan


class RewiringState(NamedTuple):
    """State of :func:`deep_rewiring`: steps, masks, which weights are negative for good, the key, the optimizer's."""

    steps: jax.Array
    masks: dict[str, jax.Array]
    negative: dict[str, jax.Array]
    key: jax.Array
    inner: PyTree

    def nodes(self, params: Mapping[str, jax.Array], /) -> dict[str, Masked]:
        """The active weights."""
        return transforms.masked(params, self.masks)


def deep_rewiring(
    inner: optax.GradientTransformation,
    masks: Plan | Masks,
    *,
    key: jax.Array,
    learning_rate: optax.ScalarOrSchedule,
    l1: float = 0.0,
    temperature: float = 0.0,
    scope: Scope = "leaf",
) -> optax.GradientTransformationExtraArgs:
    """Deep rewiring, DeepR (Bellec et al. 2018, arXiv:1711.05136), around any optimizer.

    Every weight has a sign for good, that of its first value, and ``theta``, its value times that sign. Active ones
    move by ``theta <- theta + sign * update - eta * l1 + sqrt(2 * eta * temperature) * noise`` with standard normal
    noise. Whichever is then negative becomes dormant, exactly 0.0, and as many dormant weights, drawn uniformly,
    become active at 0.0 with fresh moments. So the number of active weights is the same after every step.

    Args:
      inner: the optimizer; gives ``update``; plain descent at rate eta in the paper.
      masks: as for :func:`sparse`.
      key: a PRNG key; every step draws anew.
      learning_rate: eta, a number or an optax schedule.
      l1: the rate at which all active weights shrink.
      temperature: of the random walk; the noise has variance ``2 * eta * temperature``.
      scope: whether the number of active weights is kept in each leaf, or ``"global"``, in all together.

    Returns:
      A ``GradientTransformationExtraArgs``; ``update`` must be given ``params``. Every step draws one normal number a
      weight, and with it costs more than an ordinary one.

    Raises:
      ValueError: as :func:`sparse` does, or for an unknown scope.

    Example:
      >>> import jax, jax.numpy as jnp, optax, jcompress as jc
      >>> params = {"w": jnp.array([1.0, -2.0, 3.0, 0.5])}
      >>> plan = jc.plan(params, [("w", jc.prune.Magnitude(sparsity=0.5))])
      >>> tx = jc.prune.dynamic.deep_rewiring(optax.sgd(1.0), plan, key=jax.random.key(0), learning_rate=1.0)
      >>> updates, state = tx.update({"w": jnp.array([0.0, -3.0, 1.0, 0.0])}, tx.init(params), params)
      >>> params = optax.apply_updates(params, updates)
      >>> params["w"].tolist()  # -2 would have become positive
      [0.0, 0.0, 2.0, 0.0]
      >>> size = jc.save("weights.jc", jc.nodes(params, state))
    """
    if scope not in ("leaf", "global"):
        raise ValueError(f"deep_rewiring: scope={scope!r} is unknown; use 'leaf' or 'global'")
    tx = optax.with_extra_args_support(inner)

    def init(params: PyTree) -> RewiringState:
        first, weights = initial(params, masks, key), rules.leaves(params)
        negative = {path: weights[path] < 0 for path in first}
        started = tx.init(lay(params, first))
        return RewiringState(transforms.steps(), first, negative, jnp.copy(key), started)

    def update(
        updates: PyTree, state: RewiringState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, RewiringState]:
        transforms.need("deep_rewiring", params)
        updates, inner = tx.update(lay(updates, state.masks, params), state.inner, lay(params, state.masks), **extra)
        change = rules.beside(params, updates)
        eta = core.value_at(learning_rate, state.steps)
        walks, alive = {}, {}
        for path, w in rules.paths(params):
            if path in state.masks:
                walks[path], alive[path] = _walk(w, change[path], state, path, eta * l1, 2 * eta * temperature)
        inner = entries.reset(tx.init, inner, params, alive)
        new = _reactivated(state, alive, scope)
        return rules.rebuild(updates, walks, like=params), state._replace(
            steps=optax.safe_increment(state.steps), masks=new, inner=inner
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _key(state: RewiringState, path: str, use: int) -> jax.Array:
    now = jax.random.fold_in(jax.random.fold_in(state.key, state.steps), use)
    key = rules.key_of(now, path)
    assert key is not None
    return key


def _walk(
    w: jax.Array, change: jax.Array, state: RewiringState, path: str, shrink: Any, variance: Any
) -> tuple[jax.Array, jax.Array]:
    """The update of one leaf, and which of its active weights kept their sign."""
    sign = jnp.where(state.negative[path], -1.0, 1.0).astype(w.dtype)
    noise = jax.random.normal(_key(state, path, 0), w.shape, w.dtype)
    step = change + sign * (jnp.sqrt(jnp.asarray(variance, w.dtype)) * noise - shrink)
    alive = state.masks[path] & (sign * (w + step).astype(w.dtype) >= 0)
    return jnp.where(alive, step, -w), alive


def _reactivated(state: RewiringState, alive: dict[str, jax.Array], scope: Scope) -> dict[str, jax.Array]:
    """As many masks True as before, what is missing drawn at random."""
    drawn = {path: jax.random.uniform(_key(state, path, 1), x.shape, jnp.float32) for path, x in alive.items()}
    scores = {path: jnp.where(x, 2.0, drawn[path]) for path, x in alive.items()}
    numbers = [counted(state.masks[path]) for path in alive]
    if scope == "global" and alive:
        chosen = keep_largest(list(scores.values()), Count.total(numbers))
    else:
        items = list(zip(scores.values(), numbers, strict=True))
        chosen = each(lambda _, item: keep_largest([item[0]], item[1])[0], items, list(map(rules.kind, scores)))
    return dict(zip(alive, chosen, strict=True))
