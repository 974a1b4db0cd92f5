"""Learning-compression: training with a penalty that leads the parameters onto the compressed set, by any plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jcompress import core, rules, transforms
from jcompress.apply import check_paths, check_plan, contexts_of, fit
from jcompress.core import PyTree
from jcompress.projection import fixed, is_linear, nearest, needs
from jcompress.rules import Plan


class LCState(NamedTuple):
    """State of :func:`lc`.

    Attributes:
      steps: the steps taken.
      held: ``{path: node}``: what the last C step fixed, trainable leaves left out, as of :func:`jcompress.project`.
      multipliers: ``{path: array}``: the Lagrange multipliers times the step size; empty for the quadratic penalty.
      key: the PRNG key, if any.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> params = {"w": jnp.array([1.0, 2.0])}
      >>> state = jc.lc(jc.plan(params, [("w", jc.prune.Magnitude(sparsity=0.5))]), mu=0.1).init(params)
      >>> state.held["w"].mask.tolist(), state.multipliers["w"].tolist()
      ([False, True], [0.0, 0.0])
    """

    steps: jax.Array
    held: PyTree
    multipliers: PyTree
    key: jax.Array | None = None

    def nodes(self, params: Mapping[str, jax.Array], /) -> dict[str, Any]:
        """What is held, its trainable leaves fitted to the parameters: the point of the set that they are led to."""
        return nearest(self.held, params)


def lc(
    plan: Plan,
    every: int = 1,
    *,
    mu: Any,
    multipliers: bool = True,
    key: jax.Array | None = None,
    stats: Mapping[str, Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""An optax transform, last in the chain, that alternates learning and compression.

    Minimizes ``L(w)`` for ``w = D(t)``, what a compressed node ``t`` stands for, by the augmented Lagrangian ``L(w) +
    (mu / 2 ||w - D(t)||^2 - m . (w - D(t))) / r``, where ``r`` is the step size of the optimizer in front. Each step
    is one of the L step: the optimizer's own for ``L``, then that of the penalty, taken exactly, ``w <- w +
    (mu (D(t) - w) + m) / (1 + mu)``, which is stable for any mu: at mu = 1 half of the way. The C step, ``t <- argmin
    ||w - m / mu - D(t)||``, is what the plan's methods do: held leaves (masks, codes, assignments) are fitted anew on
    steps 0, ``every``, ``2 * every``, ..., the others follow at each step, except those whose projection does not cost
    linear time. After a C step the multipliers ``m`` move against what is left, ``m <- m - g mu (w - D(t))``, where
    ``g = 1 - (1 + mu) ** -every`` is the part of the way that the L step went. Where ``D(t) = w`` it is plain
    training, to the bit.

    Unlike :func:`jcompress.project`, which keeps parameters on the set, they move freely at first, and a mu that grows
    brings them there: take ``jc.nodes(params, state)`` when it is large.

    Args:
      plan: from :func:`jcompress.plan`: any methods, ``residual`` too. Schedules are read at the number of steps taken:
        a sparsity that rises tightens the set on the way, which serves masks of few weights.
      every: steps between C steps.
      mu: the penalty in units of one over the step size, >= 0; a number or an ``optax.Schedule``, such as
        ``optax.exponential_decay(1e-3, 1000, 3.0, end_value=10.0)``.
      multipliers: whether to use them; without, this is the quadratic penalty, which is on the set at mu = infinity
        only.
      key: for methods that draw random numbers; as in :func:`jcompress.project`.
      stats: ``{path: statistics}`` from calibration.

    Returns:
      A ``GradientTransformationExtraArgs``. ``update`` must be given ``params``, and takes ``grads=``, the raw
      gradients, for methods that need them.

    Raises:
      ValueError: if ``every`` is not positive, ``mu`` is negative, or ``update`` is called without ``params``.

    Example:
      >>> import jax, jax.numpy as jnp, optax, jcompress as jc
      >>> params = {"w": jnp.array([1.0, 5.0])}  # one value for both, of a loss in which the first counts thrice
      >>> grad = jax.grad(lambda p: 0.5 * (jnp.array([3.0, 1.0]) * (p["w"] - jnp.array([1.0, 5.0])) ** 2).sum())
      >>> plan = jc.plan(params, [("w", jc.share.KMeans(clusters=1))])
      >>> tx = optax.chain(optax.sgd(0.1), jc.lc(plan, mu=0.2))
      >>> state, update = tx.init(params), jax.jit(tx.update)
      >>> for _ in range(200):
      ...     updates, state = update(grad(params), state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> jc.nodes(params, state)["w"].materialize().round(3).tolist()  # the best; compressing first gives 3.0
      [2.0, 2.0]

    Carreira-Perpinan 2017, arXiv:1707.01209; Idelbayev & Carreira-Perpinan 2020, arXiv:2005.07786.
    """
    check_plan("lc", plan)
    transforms.check_every("lc", every)
    if not callable(mu) and core.is_concrete(mu) and not mu >= 0:
        raise ValueError(f"lc: mu={mu} must be at least 0; it is the weight of a penalty")

    def init(params: PyTree) -> LCState:
        grads = jax.tree.map(jnp.zeros_like, params) if needs(plan, "grad") else None
        leaves, steps = rules.leaves(params), transforms.steps()
        nodes = fit(leaves, transforms.shown(plan, params), contexts_of(params, steps, key, stats, grads))
        duals = {path: jnp.zeros_like(leaves[path]) for path in nodes} if multipliers else {}
        return LCState(steps, fixed(nodes), duals, transforms.copied(key))

    def update(
        updates: PyTree, state: LCState, params: PyTree | None = None, *, grads: PyTree = None, **extra: Any
    ) -> tuple[PyTree, LCState]:
        transforms.need("lc", params)
        old, change, here = rules.leaves(params), rules.beside(params, updates), transforms.shown(plan, params)
        check_paths(old, here)
        new = {path: optax.apply_updates(old[path], change[path]) for path in state.held}
        weight = core.value_at(mu, state.steps)
        contexts = contexts_of(params, state.steps, state.key, stats, grads)
        held, target = _c_step(here, every, state, old | new, weight, contexts)
        pull = {path: weight * (target[path] - w) + state.multipliers.get(path, 0) for path, w in new.items()}
        moved = {path: w + (pull[path] / (1 + weight)).astype(w.dtype) for path, w in new.items()}
        part = jnp.where(transforms.is_due(state.steps, every), weight * (1 - (1 + weight) ** -jnp.float32(every)), 0)
        duals = {
            path: m - (part * (moved[path] - target[path])).astype(m.dtype) for path, m in state.multipliers.items()
        }
        state = LCState(optax.safe_increment(state.steps), held, duals, state.key)
        return transforms.onto(params, updates, moved), state

    return optax.GradientTransformationExtraArgs(init, update)


def _c_step(
    plan: Plan, every: int, state: LCState, arrays: dict[str, jax.Array], mu: Any, contexts: dict[str, core.Context]
) -> tuple[dict[str, Any], dict[str, jax.Array]]:
    """What is held, fitted anew where that is due, and the dense arrays that it stands for."""
    inverse = 1 / jnp.where(mu > 0, mu, 1)
    free = {
        path: arrays[path] - (inverse * state.multipliers.get(path, 0)).astype(arrays[path].dtype)
        for path in state.held
    }
    linear = core.projected({path: node for path, node in state.held.items() if is_linear(node)}, free)
    followed = {path: linear.get(path, node) for path, node in state.held.items()}

    def dense(nodes: dict[str, Any]) -> dict[str, jax.Array]:
        return {path: x.astype(arrays[path].dtype) for path, x in core.materialize(nodes).items()}

    def anew() -> tuple[dict[str, Any], dict[str, jax.Array]]:
        known = {path: dataclasses.replace(contexts[path], previous=followed.get(path)) for path in arrays}
        nodes = fit(arrays | free, plan, known)
        return fixed(nodes), dense(nodes)

    return jax.lax.cond(transforms.is_due(state.steps, every), anew, lambda: (state.held, dense(followed)))
