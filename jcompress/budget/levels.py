"""How sparse each leaf should be, under one budget for all: functions that take a plan and give a plan."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jcompress.budget import shares
from jcompress.budget.shares import Counts, Leaf
from jcompress.core import PyTree
from jcompress.rules import Plan


def uniform(plan: Plan, sparsity: float, dense: str | Iterable[str] = ()) -> Plan:
    """The same sparsity for every leaf, with one total that is exact.

    Args:
      plan: from :func:`jcompress.plan`. Its methods, or those they wrap, must have a ``sparsity``; what it is now does
        not matter.
      sparsity: the fraction of zeros, in [0, 1], of all leaves that the plan compresses and of those in ``dense``.
      dense: ``re.fullmatch`` patterns of paths to keep dense; their weights count, so the others become sparser.

    Returns:
      A plan with a method of its own for each leaf. Kept counts come from the largest remainder, so that they sum to
      ``n - round(sparsity * n)``; where patterns cut whole blocks, as near as these allow.

    Raises:
      ValueError: for a sparsity outside [0, 1], a pattern that matches nothing, a method without a sparsity or one
        that a pattern fixes, or a budget that cannot be met because too much is kept dense.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> params = {"a": jnp.ones((3, 5)), "b": jnp.ones((7, 3))}
      >>> plan = jc.plan(params, [(".*", jc.prune.Magnitude(sparsity=0))])
      >>> small = jc.compress(params, jc.budget.uniform(plan, 0.5))
      >>> [int(small[name].mask.sum()) for name in "ab"]
      [8, 10]
    """
    return _by_density("uniform", plan, sparsity, dense, lambda shape: ())


def erdos_renyi(plan: Plan, sparsity: float, dense: str | Iterable[str] = ()) -> Plan:
    """Densities in proportion to ``(n_in + n_out) / (n_in * n_out)``: wide layers become sparser (Mocanu et al. 2018).

    Sparse evolutionary training, arXiv:1707.04780. Sizes of a convolution's window do not count; vectors come out
    densest. Layers whose density would pass one stay dense, and the rest is solved anew, so the total is exact.

    Args:
      plan: as for :func:`uniform`.
      sparsity: as for :func:`uniform`.
      dense: as for :func:`uniform`.

    Returns:
      As :func:`uniform`.

    Raises:
      ValueError: as :func:`uniform`.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> params = {"wide": jnp.ones((64, 64)), "narrow": jnp.ones((16, 16))}
      >>> plan = jc.budget.erdos_renyi(jc.plan(params, [(".*", jc.prune.Magnitude(sparsity=0))]), 0.9)
      >>> {path: round(1 - method.sparsity, 2) for path, method in plan.items()}
      {'narrow': 0.34, 'wide': 0.08}
    """
    return _by_density("erdos_renyi", plan, sparsity, dense, lambda shape: shape[-2:])


def erk(plan: Plan, sparsity: float, dense: str | Iterable[str] = ()) -> Plan:
    """Erdos-Renyi-kernel: densities in proportion to the sum of all axes over their product (Evci et al. 2020).

    RigL, arXiv:1911.11134. For (in, out) kernels it is :func:`erdos_renyi`; of convolutions the window counts too.
    Layers whose density would pass one stay dense, and the rest is solved anew, so the total is exact.

    Args:
      plan: as for :func:`uniform`.
      sparsity: as for :func:`uniform`.
      dense: as for :func:`uniform`.

    Returns:
      As :func:`uniform`.

    Raises:
      ValueError: as :func:`uniform`.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> params = {"conv": jnp.ones((3, 3, 16, 32)), "head": jnp.ones((32, 10))}
      >>> plan = jc.budget.erk(jc.plan(params, [(".*", jc.prune.Magnitude(sparsity=0))]), 0.8)
      >>> {path: round(1 - method.sparsity, 2) for path, method in plan.items()}
      {'conv': 0.14, 'head': 1.0}
    """
    return _by_density("erk", plan, sparsity, dense, lambda shape: shape)


def global_(plan: Plan, scores: PyTree, sparsity: float, dense: str | Iterable[str] = ()) -> Plan:
    """The sparsity that each leaf has where one threshold cuts the scores of all: global pruning, fixed in a plan.

    Args:
      plan: as for :func:`uniform`.
      scores: of all weights, larger is kept: a tree like the parameters, such as their magnitudes, or ``{path:
        scores}``.
      sparsity: as for :func:`uniform`.
      dense: as for :func:`uniform`.

    Returns:
      As :func:`uniform`.

    Raises:
      ValueError: as :func:`uniform`, or if scores are missing or of another shape.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> params = {"a": jnp.array([1.0, 2.0, 3.0, 4.0]), "b": jnp.array([0.1, 0.2, 0.3, 5.0])}
      >>> plan = jc.budget.global_(jc.plan(params, [(".*", jc.prune.Magnitude(sparsity=0))]), params, 0.5)
      >>> [method.sparsity for method in plan.values()]
      [0.25, 0.75]
    """
    leaves = shares.leaves("global_", plan, sparsity, dense)
    return shares.spent("global_", plan, leaves, sparsity, shares.ranked(shares.values("global_", leaves, scores)))


def lamp(plan: Plan, params: PyTree, sparsity: float, dense: str | Iterable[str] = ()) -> Plan:
    """The sparsity of each leaf by layer-adaptive magnitude: one threshold for ``w**2 / sum of v**2 >= w**2``.

    Each weight's square is divided by the sum of the squares of its leaf that are no smaller, so that what a layer
    would lose is measured against what it has left (Lee et al. 2021, arXiv:2010.07611). No leaf is emptied while
    another has two weights. The masks are then those of magnitude. Computed on the host, with a sort for each leaf.

    Args:
      plan: as for :func:`uniform`.
      params: the parameters.
      sparsity: as for :func:`uniform`.
      dense: as for :func:`uniform`.

    Returns:
      As :func:`uniform`.

    Raises:
      ValueError: as :func:`uniform`, or if a leaf is missing or of another shape.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> params = {"a": jnp.array([1.0, 2.0, 3.0, 4.0]), "b": jnp.array([0.1, 0.1, 0.1, 0.1])}
      >>> plan = jc.budget.lamp(jc.plan(params, [(".*", jc.prune.Magnitude(sparsity=0))]), params, 0.5)
      >>> [method.sparsity for method in plan.values()]
      [0.5, 0.5]
    """
    leaves = shares.leaves("lamp", plan, sparsity, dense)
    values = shares.values("lamp", leaves, params)
    return shares.spent(
        "lamp", plan, leaves, sparsity, shares.ranked({path: shares.adaptive(x) for path, x in values.items()})
    )


def scan(
    evaluate: Callable[[Plan], Any], plan: Plan, levels: Iterable[float] = (0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 1.0)
) -> dict[str, dict[float, float]]:
    """The loss of the model with one leaf pruned at a time, at several sparsities: ``{path: {sparsity: loss}}``.

    A loop on the host over leaves and levels (Han et al. 2015, arXiv:1506.02626).

    Args:
      evaluate: ``evaluate(plan)``, the loss of the model compressed by a plan in which one leaf is not dense.
      plan: as for :func:`uniform`.
      levels: sparsities in [0, 1].

    Returns:
      ``{path: {sparsity: loss}}``, for :func:`by_sensitivity`.

    Raises:
      ValueError: for a level outside [0, 1], or a method without a sparsity.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> params = {"a": jnp.array([1.0, 2.0]), "b": jnp.array([3.0, 5.0])}
      >>> plan = jc.plan(params, [(".*", jc.prune.Magnitude(sparsity=0))])
      >>> lost = lambda p: sum((p[k] - params[k]).__pow__(2).sum() for k in p)
      >>> jc.budget.scan(lambda one: lost(jc.materialize(jc.compress(params, one))), plan, (0.0, 0.5, 1.0))
      {'a': {0.0: 0.0, 0.5: 1.0, 1.0: 5.0}, 'b': {0.0: 0.0, 0.5: 9.0, 1.0: 34.0}}
    """
    found: dict[str, dict[float, float]] = {}
    levels = tuple(levels)
    for level in levels:
        shares.check_sparsity("scan", level)
    for leaf in shares.leaves("scan", plan, 0.0, ()):
        found[leaf.path] = {}
        for level in levels:
            alone = dict.fromkeys(plan) | {leaf.path: shares.with_sparsity(leaf.method, level)}
            found[leaf.path][level] = float(evaluate(plan.replace(alone)))
    return found


def by_sensitivity(
    plan: Plan, losses: Mapping[str, Mapping[float, float]], sparsity: float, dense: str | Iterable[str] = ()
) -> Plan:
    """The sparsities that cost least, if losses add up over leaves: cut where the next weight costs least.

    Each leaf's loss is taken as the convex curve under its measured points, straight between them. Segments of all
    leaves are then cut in order of their slope, loss for each weight, until the budget is met, which minimises the
    sum of the curves.

    Args:
      plan: as for :func:`uniform`.
      losses: ``{path: {sparsity: loss}}`` for each leaf, from :func:`scan` or of any other measure, such as the sum of
        the scores that are cut. At least two sparsities each, the smallest and the largest are limits.
      sparsity: as for :func:`uniform`.
      dense: as for :func:`uniform`.

    Returns:
      As :func:`uniform`.

    Raises:
      ValueError: as :func:`uniform`, if losses are missing or not finite, or the budget lies outside their range.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> params = {"a": jnp.ones((4, 5)), "b": jnp.ones((4, 5))}
      >>> plan = jc.plan(params, [(".*", jc.prune.Magnitude(sparsity=0))])
      >>> losses = {"a": {0.0: 0.0, 0.5: 1.0, 1.0: 9.0}, "b": {0.0: 0.0, 0.5: 3.0, 1.0: 5.0}}
      >>> [method.sparsity for method in jc.budget.by_sensitivity(plan, losses, 0.5).values()]
      [0.5, 0.5]
    """
    leaves = shares.leaves("by_sensitivity", plan, sparsity, dense)
    curves = {leaf.path: shares.hull(leaf, losses.get(leaf.path)) for leaf in leaves if not leaf.dense}
    return shares.spent("by_sensitivity", plan, leaves, sparsity, shares.cheapest(curves))


def _by_density(
    name: str,
    plan: Plan,
    sparsity: float,
    dense: str | Iterable[str],
    axes: Callable[[tuple[int, ...]], tuple[int, ...]],
) -> Plan:
    """Densities in proportion to the sum of some axes over their product, none above one."""

    def share(free: list[Leaf], kept: int) -> Counts:
        chosen = {leaf.path: axes(leaf.shape) or (1,) for leaf in free}
        raw = {leaf.path: leaf.size * sum(x := chosen[leaf.path]) / max(math.prod(x), 1) for leaf in free}
        return shares.capped(raw, free, kept)

    return shares.spent(name, plan, shares.leaves(name, plan, sparsity, dense), sparsity, share)
