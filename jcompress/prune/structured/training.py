"""Optimizers that drive whole units to zero: optax transforms and a penalty."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jcompress import core, rules
from jcompress.core import PyTree
from jcompress.layers import units
from jcompress.layers.groups import Group, Groups, Member
from jcompress.layers.units import Members
from jcompress.numeric import shrinkage
from jcompress.prune.structured import choice


class StepState(NamedTuple):
    """The steps taken."""

    steps: jax.Array


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
    found, total = units.leaves(params), jnp.zeros(())
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
    members: Members = "kernels",
    match: str = ".*",
    weighted: bool = False,
) -> optax.GradientTransformation:
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
      A ``GradientTransformation``; ``update`` must be given ``params``.

    Raises:
      ValueError: if a weight would belong to two units, for then the step has no closed form, or ``update`` is called
        without ``params``.

    Example:
      >>> import jax.numpy as jnp, optax, jcompress as jc
      >>> from jcompress.prune import structured
      >>> params = {"a": jnp.array([[3.0, 0.1], [4.0, 0.0]])}
      >>> hidden = jc.trace.Group(size=2, producers=(("a", 1),))
      >>> tx = optax.chain(optax.sgd(0.1), structured.group_lasso_proximal({"hidden": hidden}, 2.5))
      >>> updates, _ = tx.update({"a": jnp.zeros((2, 2))}, tx.init(params), params)
      >>> optax.apply_updates(params, updates)["a"].tolist()
      [[1.5, 0.0], [2.0, 0.0]]
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
                factors[path] = factors.get(path, jnp.ones(())) * along
        return {path: (new[path] * factor).astype(new[path].dtype) for path, factor in factors.items()}

    return moving("group_lasso_proximal", shrink)


def soft_filter(
    groups: Groups,
    sparsity: Any,
    every: int = 1,
    members: Members = "kernels",
    match: str = ".*",
) -> optax.GradientTransformation:
    """Soft filter pruning: weak filters are set to zero every so often and go on training (He et al. 2018, 1808.06866).

    An optax transform, last in the chain. After steps ``every``, ``2 * every``, ... the filters of smallest norm in
    each group are exactly zero; in between all weights move as the optimizer says, so a filter can return. Only the
    kernels are set to zero by default: with a bias of exactly zero as well, a ReLU would pass no gradient back.

    Args:
      groups: from ``jc.trace.coupling``.
      sparsity: the fraction of filters, in [0, 1], or an optax schedule of it.
      every: the steps between two times; an epoch, in the paper.
      members: which weights of a unit are measured and set to zero, as for :func:`importance`.
      match: as for :func:`importance`.

    Returns:
      A ``GradientTransformation``; ``update`` must be given ``params``.

    Raises:
      ValueError: for a sparsity outside [0, 1], ``every`` below 1, or if ``update`` is called without ``params``.

    Example:
      >>> import jax.numpy as jnp, optax, jcompress as jc
      >>> from jcompress.prune import structured
      >>> params = {"a": jnp.array([[3.0, 1.0]])}
      >>> hidden = jc.trace.Group(size=2, producers=(("a", 1),))
      >>> tx = optax.chain(optax.sgd(1.0), structured.soft_filter({"hidden": hidden}, sparsity=0.5))
      >>> updates, state = tx.update({"a": jnp.array([[0.5, 0.5]])}, tx.init(params), params)
      >>> optax.apply_updates(params, updates)["a"].tolist()
      [[2.5, 0.0]]
    """
    if every < 1:
        raise ValueError(f"soft_filter: every={every} must be a positive number of steps")

    def cut(new: dict[str, jax.Array], steps: jax.Array) -> dict[str, jax.Array]:
        due, changed = (steps + 1) % every == 0, dict[str, jax.Array]()
        for name, group in units.prunable(groups).items():
            picked = units.chosen(name, group, members, match, new)
            square, _ = _squares(name, group, picked, new)
            fraction = core.value_at(sparsity, steps)
            stays = choice.keep({name: square}, groups, fraction, at_least=0)[name] | ~due
            for path, axis in picked:
                along = units.spread(stays, axis, group.maps[path, axis], new[path].ndim, True)
                changed[path] = jnp.where(along, changed.get(path, new[path]), 0)
        return changed

    return moving("soft_filter", cut)


def l1_proximal(strength: optax.ScalarOrSchedule, match: str = ".*scale") -> optax.GradientTransformation:
    """Soft thresholding after each step: the proximal form of an l1 penalty, an optax transform, last in the chain.

    ``w <- sign(w) max(|w| - strength, 0)``. Scales of batch norm become exactly zero, where the subgradient of
    :func:`add_l1` leaves them near it (Liu et al. 2017, arXiv:1708.06519, name both).

    Args:
      strength: the learning rate times the penalty, or an optax schedule of that product.
      match: a regular expression for the paths of the parameters, by default the scales of norms.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from jcompress.prune import structured
      >>> params = {"norm": {"scale": jnp.array([1.0, -0.05]), "bias": jnp.array([0.01, 0.01])}}
      >>> tx = structured.l1_proximal(0.25)
      >>> updates, _ = tx.update({"norm": {"scale": jnp.zeros(2), "bias": jnp.zeros(2)}}, tx.init(params), params)
      >>> optax.apply_updates(params, updates)["norm"]["scale"].tolist()
      [0.75, 0.0]
    """

    def shrink(new: dict[str, jax.Array], steps: jax.Array) -> dict[str, jax.Array]:
        limit = core.value_at(strength, steps)
        return {path: shrinkage.soft_threshold(x, limit) for path, x in matching("l1_proximal", new, match).items()}

    return moving("l1_proximal", shrink)


def add_l1(strength: float, match: str = ".*scale") -> optax.GradientTransformation:
    """Add the subgradient of an l1 penalty, ``strength * sign(w)``, to gradients: first in the chain.

    Network slimming trains the scales of batch norm with it (Liu et al. 2017, arXiv:1708.06519).

    Args:
      strength: of the penalty ``strength * sum |w|``.
      match: a regular expression for the paths of the parameters, by default the scales of norms.

    Example:
      >>> import jax.numpy as jnp
      >>> from jcompress.prune import structured
      >>> params = {"scale": jnp.array([2.0, -3.0, 0.0])}
      >>> tx = structured.add_l1(0.5)
      >>> tx.update({"scale": jnp.zeros(3)}, tx.init(params), params)[0]["scale"].tolist()
      [0.5, -0.5, 0.0]
    """

    def update(updates: PyTree, state: Any, params: PyTree | None = None) -> tuple[PyTree, Any]:
        found, changes = _both("add_l1", updates, params)
        chosen = matching("add_l1", found, match)
        added = {
            path: changes[path] + (strength * jnp.sign(x)).astype(changes[path].dtype) for path, x in chosen.items()
        }
        return units.replace(updates, added), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def matching(name: str, found: dict[str, Any], match: str) -> dict[str, Any]:
    """The parameters whose paths match; raises if there are none, in the name of what asked."""
    chosen = {path: x for path, x in found.items() if re.fullmatch(match, path)}
    if not chosen:
        raise ValueError(f"{name}: match={match!r} matches no parameter; {units.closest(match, found)}")
    return chosen


def _both(name: str, updates: PyTree, params: PyTree | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """The parameters and their updates by path."""
    if params is None:
        raise ValueError(f"{name} needs the parameters: call tx.update(grads, state, params)")
    return dict(rules.paths(params)), dict(rules.paths(updates))


def moving(
    name: str, moved: Callable[[dict[str, jax.Array], jax.Array], dict[str, jax.Array]]
) -> optax.GradientTransformation:
    """A transform that replaces some of the parameters that the updates lead to."""

    def init(params: PyTree) -> StepState:
        return StepState(jnp.zeros((), jnp.int32))

    def update(updates: PyTree, state: StepState, params: PyTree | None = None) -> tuple[PyTree, StepState]:
        found, changes = _both(name, updates, params)
        new = {path: optax.apply_updates(found[path], change) for path, change in changes.items()}
        for path, value in moved(new, state.steps).items():
            # Where nothing moved the update stays as it was, to the last bit; a zero is reached exactly.
            step = (value - found[path]).astype(changes[path].dtype)
            changes[path] = jnp.where(value == new[path], changes[path], step)
        return units.replace(updates, changes), StepState(optax.safe_increment(state.steps))

    return optax.GradientTransformation(init, update)


def _squares(name: str, group: Group, picked: list[Member], found: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
    """The sum of squares of each unit's weights, and how many there are: (size,) each."""
    total, count = jnp.zeros(group.size), jnp.zeros(group.size)
    for path, axis in picked:
        w, index = units.leaf(found, path, name).astype(jnp.float32), group.maps[path, axis]
        total = total + units.totals(jnp.square(w), axis, index, group.size)
        count = count + units.totals(jnp.ones_like(w), axis, index, group.size)
    return total, count
