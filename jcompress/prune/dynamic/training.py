"""Sparse training: an optimizer that works on the active weights only, while a rule moves the mask."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jcompress import rules, transforms
from jcompress.core import PyTree
from jcompress.formats import Masked
from jcompress.prune.dynamic import entries
from jcompress.prune.dynamic.exchange import Static
from jcompress.prune.dynamic.held import Masks, initial, lay
from jcompress.prune.dynamic.leaves import Leaf, Rule
from jcompress.rules import Plan


class SparseState(NamedTuple):
    """State of :func:`sparse`: the steps taken, masks by path, the key, what rule and optimizer remember.

    ``momentum`` holds the average of dense gradients by path, if the rule reads it.
    """

    steps: jax.Array
    masks: dict[str, jax.Array]
    key: jax.Array | None
    memory: PyTree
    momentum: dict[str, jax.Array]
    inner: PyTree

    def nodes(self, params: Mapping[str, jax.Array], /) -> dict[str, Masked]:
        """The active weights."""
        return transforms.masked(params, self.masks)


def sparse(
    inner: optax.GradientTransformation,
    rule: Rule,
    masks: Plan | Masks,
    every: int = 100,
    *,
    key: jax.Array | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Train sparse weights, their number constant, while ``rule`` moves the mask every so often (``NeST`` changes it).

    An optax transform that wraps the optimizer, so the loop stays as it is. After every step, from the first on, a
    weight that is not active is exactly 0.0. Its share of the optimizer's state is as new whenever the optimizer
    moves, so what is dropped leaves nothing behind, and what is grown starts at 0.0 with fresh moments, also where it
    was dropped in the same step (:class:`RigL` alone lets that go on as it was). The optimizer meets the gradients of
    active weights only: a clipped norm or an orthogonalized momentum is that of the sparse network. The rule reads the
    dense gradients. The masks change before the optimizer moves, on steps 0, ``every``, ``2 * every``, ...; weights
    grown in a step move from the next one on. In between the cost is that of reading the masks.

    A state entry belongs to a weight if its place in the state ends in the parameter's path and has its shape, as
    everything that optimizers build with ``tree.map`` does, inside ``chain``, ``masked``, ``partition``,
    ``inject_hyperparams`` and ``MultiSteps`` too. Statistics of no single weight stay: Adafactor's rows and columns,
    all that ``optax.flatten`` makes one vector of.

    Args:
      inner: any optax optimizer.
      rule: :class:`SET`, :class:`RigL`, :class:`SparseMomentum`, :class:`DSR`, :class:`NeST`, :class:`Static`, or a
        function of the same form, ``(leaves, memory) -> (masks, memory)``.
      masks: a plan whose methods choose the first masks, such as ``jc.prune.Random(sparsity=0.9)``; or the masks
        themselves, ``{path: boolean array}``.
      every: the steps between two changes of the masks.
      key: for rules (:class:`SET`, :class:`DSR`) and methods that draw random numbers. Every change draws anew.

    Returns:
      A ``GradientTransformationExtraArgs``; ``update`` must be given ``params``. The rule reads the gradients given as
      ``grads=``, for where this stands behind a transform that changes them, and otherwise what it is given to update.

    Raises:
      ValueError: if ``every`` is not positive, a method of the plan gives no mask, a given mask fits no parameter, or
        ``update`` is called without ``params``.

    Example:
      >>> import jax, jax.numpy as jnp, optax, jcompress as jc
      >>> params = {"w": jnp.arange(1.0, 9.0)}
      >>> plan = jc.plan(params, [("w", jc.prune.Magnitude(sparsity=0.5))])
      >>> tx = jc.prune.dynamic.sparse(optax.adamw(0.1), jc.prune.dynamic.RigL(stop=100), plan, every=2)
      >>> state = tx.init(params)
      >>> for _ in range(5):
      ...     updates, state = jax.jit(tx.update)({"w": -jnp.ones(8)}, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> small = jc.nodes(params, state)
      >>> int((params["w"] != 0).sum()), int(small["w"].mask.sum())
      (4, 4)
      >>> size = jc.save("weights.jc", small)
    """
    transforms.check_every("sparse", every)
    tx = optax.with_extra_args_support(inner)
    decay = getattr(rule, "decay", None)

    def init(params: PyTree) -> SparseState:
        first, weights = initial(params, masks, key), rules.leaves(params)
        memory = rule.memory() if hasattr(rule, "memory") else ()
        momentum = {} if decay is None else {path: jnp.zeros_like(weights[path]) for path in first}
        started = tx.init(lay(params, first))
        return SparseState(transforms.steps(), first, transforms.copied(key), memory, momentum, started)

    def update(
        updates: PyTree, state: SparseState, params: PyTree | None = None, *, grads: PyTree = None, **extra: Any
    ) -> tuple[PyTree, SparseState]:
        transforms.need("sparse", params)
        raw = updates if grads is None else grads
        extra = extra if grads is None else {**extra, "grads": grads}
        momentum = _averaged(state.momentum, rules.beside(params, raw), decay)
        kinds = {path: masks.kind(path) if isinstance(masks, Plan) else rules.kind(path) for path in state.masks}
        new, active, memory = _changed(rule, every, state._replace(momentum=momentum), params, raw, kinds)
        # Before the optimizer, not after: one that works weight by weight leaves a fresh entry as it is under a
        # gradient of zero, and it can write over its state only if what it moves by is what it keeps.
        fresh = entries.reset(tx.init, state.inner, params, active)
        updates, inner = tx.update(lay(updates, active, params), fresh, lay(params, active), **extra)
        old, change = rules.leaves(params), rules.beside(params, updates)
        # To exactly 0.0 where a weight is not active; the others move as the optimizer says.
        laid = {path: jnp.where(mask, change[path], -old[path]) for path, mask in active.items()}
        updates = rules.rebuild(updates, laid, like=params)
        steps = optax.safe_increment(state.steps)
        return updates, SparseState(steps, new, state.key, memory, momentum, inner)

    return optax.GradientTransformationExtraArgs(init, update)


def _averaged(momentum: dict[str, jax.Array], grads: dict[str, jax.Array], decay: float | None) -> dict[str, jax.Array]:
    if decay is None:
        return {}
    return {path: (decay * m + (1 - decay) * grads[path]).astype(m.dtype) for path, m in momentum.items()}


def _exchanged(rule: Rule, found: list[Leaf], memory: PyTree) -> tuple[list[jax.Array], list[jax.Array], PyTree]:
    """The new masks, what of the old ones was not dropped, and the memory."""
    if hasattr(rule, "exchange"):
        return rule.exchange(found, memory)
    new, memory = rule(found, memory)
    return new, [leaf.mask for leaf in found], memory


def _changed(
    rule: Rule, every: int, state: SparseState, params: PyTree, grads: PyTree, kinds: Mapping[str, Hashable]
) -> tuple[dict[str, jax.Array], dict[str, jax.Array], PyTree]:
    """The masks after this step, those of the weights that were active before it as well, and the memory.

    A loop of no turn or one, not a conditional: its result stands where its operand stood, so the steps without a
    change copy one set of masks and not two, and the optimizer reads one.
    """
    if isinstance(rule, Static) or not state.masks:
        return state.masks, state.masks, state.memory
    # Masks have no derivative; a loop may stand in what is differentiated only where nothing flows through it.
    weights, gradients, memory, momentum = jax.lax.stop_gradient(
        (rules.leaves(params), rules.beside(params, grads), state.memory, state.momentum)
    )
    key = None if state.key is None else jax.random.fold_in(state.key, state.steps)

    def anew(carry: tuple) -> tuple:
        _, masks, _, memory = carry
        found = [
            Leaf(
                w=weights[path],
                mask=mask,
                grad=gradients[path],
                momentum=momentum.get(path),
                step=state.steps,
                key=rules.key_of(key, path),
                kind=kinds[path],
            )
            for path, mask in masks.items()
        ]
        new, survivors, memory = _exchanged(rule, found, memory)
        active = [a & b for a, b in zip(survivors, new, strict=True)]
        return jnp.zeros_like(due), dict(zip(masks, new, strict=True)), dict(zip(masks, active, strict=True)), memory

    due = transforms.is_due(state.steps, every)
    return jax.lax.while_loop(lambda carry: carry[0], anew, (due, state.masks, state.masks, memory))[1:]
