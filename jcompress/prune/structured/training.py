"""Optimizers that drive whole units to zero: optax transforms and a penalty."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jcompress import core, rules, transforms
from jcompress.core import PyTree
from jcompress.formats import Masked
from jcompress.layers import units
from jcompress.layers.groups import Group, Groups, Member
from jcompress.layers.units import Members
from jcompress.numeric import shrinkage
from jcompress.prune.structured import choice


class FilterState(NamedTuple):
    """State of :func:`soft_filter`: the steps taken, and ``{path: mask}`` of the filters that the last cut kept."""

    steps: jax.Array
    masks: dict[str, jax.Array]

    def nodes(self, params: Mapping[str, jax.Array], /) -> dict[str, Masked]:
        """The parameters without the filters of the last cut, also where these have returned since."""
        return transforms.masked(params, self.masks)


def group_lasso(
    params: PyTree, groups: Groups, members: Members = "kernels", match: str = ".*", weighted: bool = False
) -> jax.Array:
    """The sum of the norms of all units, ``sum_g ||w_g||``: a penalty to be added to a loss.

    Structured sparsity learning sums plain norms (Wen et al. 2016, arXiv:1608.03665); ``weighted=True`` multiplies each
    by the root of the number of weights in it, as the group lasso does (Yuan & Lin 2006) and Scardapane et al. 2017,
    arXiv:1607.00485, for networks. The gradient at a unit that is zero is zero, not NaN.

    With this penalty alone units come near zero and do not reach it: for that use :func:`group_lasso_proximal`.

    Args:
      params: a pytree of arrays.
      groups: from ``jc.trace.coupling``.
      members: which weights of a unit count, as for :func:`importance`: the filters by default, ``"producers"`` for
        biases and norms as well, ``"consumers"`` for the channels of the next layer.
      match: as for :func:`importance`.
      weighted: whether norms are multiplied by the root of the number of weights.

    Returns:
      A float32 scalar.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> from jcompress.prune import structured
      >>> params = {"a": jnp.array([[3.0, 0.0], [4.0, 0.0]])}
      >>> float(structured.group_lasso(params, {"hidden": jc.trace.Group(size=2, producers=(("a", 1),))}))
      5.0
    """
    found, total = units.leaves(params), jnp.zeros((), jnp.float32)
    for name, group in units.prunable(groups).items():
        picked = units.chosen(name, group, members, match, found)
        square, count = _squares(name, group, picked, found)
        # The root has no derivative at zero: there the branch that is not taken must be finite as well.
        norm = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
        total = total + jnp.sum(norm * (count**0.5 if weighted else 1))
    return total


def group_lasso_proximal(
    groups: Groups,
    strength: optax.ScalarOrSchedule,
    *,
    members: Members = "kernels",
    match: str = ".*",
    weighted: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """The proximal step of :func:`group_lasso`, an optax transform, last in the chain.

    After each step every unit shrinks, ``w_g <- w_g max(1 - strength / ||w_g||, 0)``, the minimum of
    ``||v - w_g||**2 / 2 + strength ||v||``. Small units become exactly zero, and a gradient can bring them back.

    Args:
      groups: from ``jc.trace.coupling``.
      strength: the learning rate times the penalty, or an optax schedule of that product.
      members: as for :func:`group_lasso`.
      match: as for :func:`group_lasso`.
      weighted: as for :func:`group_lasso`.

    Returns:
      A ``GradientTransformationExtraArgs``; ``update`` must be given ``params``.

    Raises:
      ValueError: if a weight would belong to two units, for then the step has no closed form, or ``update`` is called
        without ``params``.

    Example:
      >>> import jax.numpy as jnp, optax, jcompress as jc
      >>> from jcompress.prune import structured
      >>> params = {"a": jnp.array([[3.0, 0.1], [4.0, 0.0]])}
      >>> hidden = jc.trace.Group(size=2, producers=(("a", 1),))
      >>> tx = optax.chain(optax.sgd(0.1), structured.group_lasso_proximal({"hidden": hidden}, 2.5))
      >>> updates, state = tx.update({"a": jnp.zeros((2, 2))}, tx.init(params), params)
      >>> params = optax.apply_updates(params, updates)
      >>> params["a"].tolist()
      [[1.5, 0.0], [2.0, 0.0]]
      >>> size = jc.save("weights.jc", jc.nodes(params, state))  # masks of what is not zero
    """

    def shrink(new: dict[str, jax.Array], steps: jax.Array) -> dict[str, jax.Array]:
        threshold, factors = core.value_at(strength, steps), dict[str, jax.Array]()
        axes: dict[str, int] = {}
        for name, group in units.prunable(groups).items():
            picked = units.chosen(name, group, members, match, new)
            square, count = _squares(name, group, picked, new)
            factor = shrinkage.shrink_factor(jnp.sqrt(square), threshold * (count**0.5 if weighted else 1))
            for path, axis in picked:
                along = units.spread(factor, axis, group.maps[path, axis], new[path].ndim, 1.0)
                if axes.setdefault(path, axis) != axis:
                    raise ValueError(
                        f"{path}: found units on its axes {axes[path]} and {axis}, so weights belong to two; choose "
                        f"members other than {members!r}, or another match"
                    )
                factors[path] = factors.get(path, jnp.ones((), jnp.float32)) * along
        return {path: (new[path] * factor).astype(new[path].dtype) for path, factor in factors.items()}

    def paths(params: PyTree) -> list[str]:
        found = rules.leaves(params)
        picked = [m for name, g in units.prunable(groups).items() for m in units.chosen(name, g, members, match, found)]
        return sorted({path for path, _ in picked})

    return transforms.moving("group_lasso_proximal", paths, shrink)


def soft_filter(
    groups: Groups,
    sparsity: Any,
    every: int = 1,
    *,
    members: Members = "kernels",
    match: str = ".*",
) -> optax.GradientTransformationExtraArgs:
    """Soft filter pruning: weak filters are set to zero every so often and go on training (He et al. 2018, 1808.06866).

    An optax transform, last in the chain. After steps 0, ``every``, ``2 * every``, ... the filters of smallest norm in
    each group are exactly zero; in between all weights move as the optimizer says, so a filter can return. Only the
    kernels are set to zero by default: with a bias of exactly zero as well, a ReLU would pass no gradient back.

    :func:`jcompress.nodes` gives the parameters without the filters that the last cut chose, wherever training stands.

    Args:
      groups: from ``jc.trace.coupling``.
      sparsity: the fraction of filters, in [0, 1], or an optax schedule of it.
      every: the steps between two cuts; an epoch, in the paper.
      members: which weights of a unit are measured and set to zero, as for :func:`importance`.
      match: as for :func:`importance`.

    Returns:
      A ``GradientTransformationExtraArgs``; ``update`` must be given ``params``.

    Raises:
      ValueError: for a sparsity outside [0, 1], ``every`` below 1, or if ``update`` is called without ``params``.

    Example:
      >>> import jax.numpy as jnp, optax, jcompress as jc
      >>> from jcompress.prune import structured
      >>> params = {"a": jnp.array([[3.0, 1.0]])}
      >>> hidden = jc.trace.Group(size=2, producers=(("a", 1),))
      >>> tx = optax.chain(optax.sgd(1.0), structured.soft_filter({"hidden": hidden}, sparsity=0.5))
      >>> updates, state = tx.update({"a": jnp.array([[0.5, 0.5]])}, tx.init(params), params)
      >>> params = optax.apply_updates(params, updates)
      >>> params["a"].tolist()
      [[2.5, 0.0]]
      >>> size = jc.save("weights.jc", jc.nodes(params, state))
    """
    transforms.check_every("soft_filter", every)

    def masks(found: dict[str, jax.Array], fraction: Any) -> dict[str, jax.Array]:
        kept = dict[str, jax.Array]()
        for name, group in units.prunable(groups).items():
            picked = units.chosen(name, group, members, match, found)
            square, _ = _squares(name, group, picked, found)
            stays = choice.keep({name: square}, groups, fraction, at_least=0)[name]
            for path, axis in picked:
                along = units.spread(stays, axis, group.maps[path, axis], found[path].ndim, True)
                kept[path] = kept[path] & along if path in kept else along
        return kept

    def init(params: PyTree) -> FilterState:
        return FilterState(transforms.steps(), masks(rules.leaves(params), 0.0))

    def update(
        updates: PyTree, state: FilterState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, FilterState]:
        transforms.need("soft_filter", params)
        old, change = rules.leaves(params), rules.beside(params, updates)
        new = {path: optax.apply_updates(w, change[path]) for path, w in old.items()}
        due, found = transforms.is_due(state.steps, every), masks(new, core.value_at(sparsity, state.steps))
        cut = {path: jnp.where(due & ~mask, 0, new[path]).astype(new[path].dtype) for path, mask in found.items()}
        held = {path: jnp.where(due, mask, state.masks[path]) for path, mask in found.items()}
        return transforms.onto(params, updates, cut), FilterState(optax.safe_increment(state.steps), held)

    return optax.GradientTransformationExtraArgs(init, update)


def add_l1(strength: float, match: str = ".*scale") -> optax.GradientTransformationExtraArgs:
    """Add the subgradient of an l1 penalty, ``strength * sign(w)``, to gradients: first in the chain.

    Network slimming trains the scales of batch norm with it (Liu et al. 2017, arXiv:1708.06519). It leads near zero;
    :func:`jcompress.prune.penalties.proximal` leads there.

    Args:
      strength: of the penalty ``strength * sum |w|``.
      match: a regular expression for the whole paths of the parameters, by default the scales of norms.

    Returns:
      A ``GradientTransformationExtraArgs``; ``update`` must be given ``params``.

    Raises:
      ValueError: if nothing matches, or ``update`` is called without ``params``.

    Example:
      >>> import jax.numpy as jnp
      >>> from jcompress.prune import structured
      >>> params = {"scale": jnp.array([2.0, -3.0, 0.0])}
      >>> tx = structured.add_l1(0.5)
      >>> tx.update({"scale": jnp.zeros(3)}, tx.init(params), params)[0]["scale"].tolist()
      [0.5, -0.5, 0.0]
    """

    def init(params: PyTree) -> transforms.HoldsNothing:
        rules.matching(params, match, "add_l1: match")
        return transforms.HoldsNothing()

    def update(
        updates: PyTree, state: transforms.HoldsNothing, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, transforms.HoldsNothing]:
        transforms.need("add_l1", params)
        grads, found = rules.beside(params, updates), rules.matching(params, match, "add_l1: match")
        added = {path: grads[path] + (strength * jnp.sign(x)).astype(grads[path].dtype) for path, x in found.items()}
        return rules.rebuild(updates, added, like=params), state

    return optax.GradientTransformationExtraArgs(init, update)


def _squares(name: str, group: Group, picked: list[Member], found: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
    """The sum of squares of each unit's weights, and how many there are: (size,) each."""
    total, count = jnp.zeros(group.size, jnp.float32), jnp.zeros(group.size, jnp.float32)
    for path, axis in picked:
        w, index = units.leaf(found, path, name).astype(jnp.float32), group.maps[path, axis]
        total = total + units.totals(jnp.square(w), axis, index, group.size)
        count = count + units.totals(jnp.ones_like(w), axis, index, group.size)
    return total, count
