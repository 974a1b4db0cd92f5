"""The order of units in which one network is most like another."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import scipy.optimize

from jcompress.core import PyTree
from jcompress.layers import units
from jcompress.layers.groups import Group


def match_units(
    params: PyTree, like: PyTree, groups: Mapping[str, Group], *, sweeps: int = 50
) -> tuple[PyTree, dict[str, np.ndarray]]:
    """Reorder the units of a network so that its parameters are most like those of another one.

    Networks of one architecture that were trained apart have their units in any order. Each group is matched with the
    other network's by the products of all that its units hold, the best assignment found, and the groups take turns
    until none changes, which no sum of products outlives (Ainsworth et al. 2023, arXiv:2209.04836). The function stays
    what it is. Afterwards the two may be averaged, distilled unit by unit, or share columns
    (:func:`jcompress.share.zipped`).

    Works on concrete arrays, outside ``jit``. Groups that may not be cut, or whose units are told apart by arguments,
    stay as they are.

    Args:
      params: a pytree of arrays; its units move.
      like: the other network, a tree of the same structure and shapes.
      groups: from ``jc.trace.coupling``, of either.
      sweeps: over all groups, at most.

    Returns:
      ``(new_params, orders)``: parameters of the same shapes, and ``{name: (size,)}``, for each place the unit that was
      taken for it.

    Raises:
      ValueError: for a parameter of a group that one of the trees does not hold, or holds in another shape, or that is
        not finite.

    Example:
      >>> import jax, jax.numpy as jnp, jcompress as jc
      >>> fn = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]
      >>> keys = jax.random.split(jax.random.key(0))
      >>> like = {"a": jax.random.normal(keys[0], (3, 4)), "b": jax.random.normal(keys[1], (4, 2))}
      >>> params = {"a": like["a"][:, ::-1], "b": like["b"][::-1]}
      >>> groups = jc.trace.coupling(fn, params, jnp.ones((1, 3)))
      >>> new, orders = jc.rewrite.match_units(params, like, groups)
      >>> bool((new["a"] == like["a"]).all()), orders["a[1]"].tolist()
      (True, [3, 2, 1, 0])
    """
    found, other = units.leaves(params), units.leaves(like)
    movable = {name: group for name, group in units.prunable(groups).items() if units.movable(group)}
    orders = {name: np.arange(group.size) for name, group in movable.items()}
    for name, group in movable.items():
        for path, _ in group.members:
            mine, theirs = (np.shape(units.leaf(tree, path, name)) for tree in (found, other))
            if mine != theirs:
                raise ValueError(f"{path}: found shape {mine}, and {theirs} in like; match networks of equal shapes")
            if not all(np.isfinite(np.asarray(units.leaf(x, path, name), np.float32)).all() for x in (found, other)):
                raise ValueError(f"{path}: found NaN or infinity, expected finite parameters in both networks")
    for _ in range(sweeps):
        changed = False
        for name, group in movable.items():
            own, wanted = (np.asarray(units.rows(name, group, group.members, t), np.float64) for t in (found, other))
            alike = wanted @ own.T
            order = scipy.optimize.linear_sum_assignment(alike, maximize=True)[1]
            gain = alike[np.arange(group.size), order].sum() - np.trace(alike)
            if gain > 1e-9 * np.abs(alike).sum():
                orders[name], changed = orders[name][order], True
                found = found | units.reordered(found, group, order)
        if not changed:
            break
    return units.replace(params, found), orders
