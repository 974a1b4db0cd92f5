"""Units cut while a network trains, along a schedule of its cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jcompress import core, rules, transforms
from jcompress.core import PyTree
from jcompress.formats import Masked
from jcompress.layers import units
from jcompress.layers.groups import Group
from jcompress.prune.structured import choice, ranking, targets

Score = Callable[[PyTree], Mapping[str, jax.Array]]


class UnitsState(NamedTuple):
    """State of :func:`prune_units`.

    Attributes:
      steps: taken so far, int32.
      keep: ``{name: bool (size,)}``, the units that stay.
      masks: ``{path: bool}`` of the parameters that hold units, in shapes that broadcast to theirs.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> from jcompress.prune import structured
      >>> groups = {"hidden": jc.trace.Group(size=2, producers=(("a", 1),))}
      >>> state = structured.prune_units(groups, sparsity=0.5).init({"a": jnp.ones((1, 2))})
      >>> int(state.steps), state.keep["hidden"].tolist()
      (0, [True, True])
    """

    steps: jax.Array
    keep: dict[str, jax.Array]
    masks: dict[str, jax.Array]

    def nodes(self, params: Mapping[str, jax.Array], /) -> dict[str, Masked]:
        """The parameters without the units that are cut."""
        full = {path: jnp.broadcast_to(mask, params[path].shape) for path, mask in self.masks.items()}
        return {path: Masked(jnp.where(mask, params[path], 0), mask) for path, mask in full.items()}


def prune_units(
    groups: Mapping[str, Group],
    every: int = 1,
    *,
    cost: optax.ScalarOrSchedule | None = None,
    sparsity: optax.ScalarOrSchedule | None = None,
    score: Score | None = None,
    scope: choice.Scope = "group",
    multiple_of: int = 1,
    at_least: int = 1,
    normalize: choice.Normalize | None = None,
    of: Literal["multiply_adds", "bytes"] | targets.CostOfSizes = "multiply_adds",
) -> optax.GradientTransformationExtraArgs:
    """Cut units while training, until the network costs what a schedule says: an optax transform, last in the chain.

    On steps 0, ``every``, ``2 * every``, ... the units are chosen as :func:`keep` chooses them, by the scores of the
    parameters as they then are. What is cut is exactly zero after every step, in all members of its group, whatever
    the optimizer does, and stays so. At the end ``jc.shrink(fn, params, structured.kept_units(state), *args)`` cuts
    it out, and the shrunk network costs what the schedule ended at. After gradual magnitude pruning, which does this
    to weights (Zhu & Gupta 2017, arXiv:1710.01878).

    Args:
      groups: from ``jc.trace.coupling``; where the optimizer gets a part of the tree, such as the ``params`` of Flax
        variables, ``groups.within("params")``.
      every: the steps between two choices.
      cost: the share of the cost that stays, in (0, 1], or an optax schedule of it; it should not rise.
      sparsity: in its place the fraction of units to cut, or a schedule of it.
      score: ``score(params)`` gives ``{name: (size,)}`` for the groups that are to be cut; by default the Euclidean
        norm of all that would be cut, :func:`l2` with ``members="all"``.
      scope: as for :func:`keep`.
      multiple_of: as for :func:`keep`.
      at_least: as for :func:`keep`.
      normalize: as for :func:`keep`.
      of: as for :func:`keep`; a function of sizes must be traceable.

    Returns:
      A ``GradientTransformationExtraArgs`` whose state is a :class:`UnitsState`; ``update`` must be given ``params``.

    Raises:
      ValueError: as :func:`keep`, for ``every`` below 1, or if ``update`` is called without ``params``.

    Example:
      >>> import jax, jax.numpy as jnp, optax, jcompress as jc
      >>> from jcompress.prune import structured
      >>> params = {"up": jnp.array([[4.0, 1.0, 3.0, 2.0]]), "down": jnp.ones((4, 1))}
      >>> fn, x = lambda p, x: jax.nn.relu(x @ p["up"]) @ p["down"], jnp.ones((2, 1))
      >>> groups = jc.trace.coupling(fn, params, x)
      >>> tx = optax.chain(optax.adam(0.01), structured.prune_units(groups, cost=optax.linear_schedule(1.0, 0.5, 3)))
      >>> state = tx.init(params)
      >>> for _ in range(4):
      ...     updates, state = tx.update(jax.grad(lambda p: fn(p, x).sum())(params), state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> params["up"].astype(int).tolist(), structured.kept_units(state)["up[1]"].tolist()
      ([[3, 0, 2, 0]], [True, False, True, False])
      >>> small_fn, small = jc.shrink(fn, params, structured.kept_units(state), x)
      >>> jc.trace.cost(small_fn, small, x).total.multiply_adds / jc.trace.cost(fn, params, x).total.multiply_adds
      0.5
    """
    transforms.check_every("prune_units", every)
    aims = {"cost": cost, "sparsity": sparsity}
    options: dict[str, Any] = {
        "scope": scope, "multiple_of": multiple_of, "at_least": at_least, "normalize": normalize, "of": of,
    }  # fmt: skip

    def scored(params: PyTree) -> Mapping[str, jax.Array]:
        return ranking.l2(params, groups, members="all") if score is None else score(params)

    def chosen(params: PyTree, keep: dict[str, jax.Array], steps: jax.Array) -> dict[str, jax.Array]:
        alive = {name: jnp.where(keep[name], x, -jnp.inf) for name, x in scored(params).items()}
        aim: dict[str, Any] = {name: None if x is None else core.value_at(x, steps) for name, x in aims.items()}
        # A share that rises again brings nothing back: what is cut is zero in all members.
        found = choice.keep(alive, groups, **aim, **options)
        return {name: mask & keep[name] for name, mask in found.items()}

    def init(params: PyTree) -> UnitsState:
        keep = {name: jnp.ones(x.shape, bool) for name, x in jax.eval_shape(scored, params).items()}
        choice.keep(keep, groups, sparsity=0.0)  # names and sizes are checked before training starts
        return UnitsState(transforms.steps(), keep, _masks(params, groups, keep))

    def update(
        updates: PyTree, state: UnitsState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, UnitsState]:
        transforms.need("prune_units", params)
        new = optax.apply_updates(params, updates)
        due = transforms.is_due(state.steps, every)
        keep = jax.lax.cond(due, lambda: chosen(new, state.keep, state.steps), lambda: state.keep)
        masks, old = _masks(params, groups, keep), rules.leaves(params)
        change = rules.beside(params, updates)
        # Minus the parameter leads to zero exactly; elsewhere the update stays what it was.
        moved = {
            path: jnp.where(mask, change[path], -old[path].astype(change[path].dtype)) for path, mask in masks.items()
        }
        updates = rules.rebuild(updates, moved, like=params)
        return updates, UnitsState(optax.safe_increment(state.steps), keep, masks)

    return optax.GradientTransformationExtraArgs(init, update)


def _masks(params: PyTree, groups: Mapping[str, Group], keep: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """For each parameter with units, what stays of it."""
    found, masks = rules.leaves(params), dict[str, jax.Array]()
    for name, kept in keep.items():
        for (path, axis), index in groups[name].maps.items():
            along = units.spread(kept, axis, index, jnp.ndim(units.leaf(found, path, name)), True)
            masks[path] = masks[path] & along if path in masks else along
    return masks


def kept_units(state: PyTree) -> dict[str, jax.Array]:
    """The units that an optimizer's state keeps, for ``jc.shrink``.

    Args:
      state: of an optimizer with :func:`prune_units` in it, wherever that stands.

    Returns:
      ``{name: bool (size,)}``, as :func:`keep` gives it.

    Raises:
      ValueError: if there is none, or several.

    Example:
      >>> import jax.numpy as jnp, optax, jcompress as jc
      >>> from jcompress.prune import structured
      >>> params, groups = {"a": jnp.ones((1, 2))}, {"hidden": jc.trace.Group(size=2, producers=(("a", 1),))}
      >>> tx = optax.chain(optax.sgd(0.1), structured.prune_units(groups, sparsity=0.5))
      >>> structured.kept_units(tx.init(params))["hidden"].tolist()
      [True, True]
    """
    leaves = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, UnitsState))
    found = [x for x in leaves if isinstance(x, UnitsState)]
    if len(found) != 1:
        raise ValueError(
            f"kept_units: found {len(found)} states of prune_units, expected one; give the optimizer's state"
        )
    return dict(found[0].keep)
