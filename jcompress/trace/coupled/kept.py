"""What a cut kept, axis by axis: enough beside the small parameters to read the full model again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jcompress.core import PyTree
from jcompress.layers.groups import Groups
from jcompress.numeric import meshes
from jcompress.trace.core import walk

Kept = Mapping[str, Mapping[int, Any]]
"""``{path: {axis: bool (length before,)}}``."""


def is_kept(keep: Any, params: PyTree) -> bool:
    """Whether ``keep`` is what :attr:`Shrunk.kept` gives, and no tree of masks like ``params``."""
    by_axis = isinstance(keep, Mapping) and all(
        isinstance(axes, Mapping) and all(isinstance(axis, int) for axis in axes) for axes in keep.values()
    )
    structures: list[Any] = [jax.tree.structure(tree) for tree in (keep, params)]
    return by_axis and structures[0] != structures[1]


def full_shapes(params: PyTree, kept: Kept) -> PyTree:
    """The shapes before the cut, of parameters that were cut or that were not.

    Raises:
      ValueError: for a path that ``params`` has not, or a length that is neither the one before nor the one after.
    """
    leaves = walk.leaves(params)
    if unknown := [path for path in kept if path not in dict(leaves)]:
        raise ValueError(f"{unknown[0]}: cut, but not among the parameters; pass those that were cut with it")
    found = [_full_shape(path, x, kept.get(path, {})) for path, x in leaves]
    return jax.tree.unflatten(jax.tree.structure(params), found)


def _full_shape(path: str, x: Any, axes: Mapping[int, Any]) -> jax.ShapeDtypeStruct:
    shape = list(jnp.shape(x))
    for axis, mask in axes.items():
        before, after = np.size(mask), int(np.sum(mask))
        if not 0 <= axis < len(shape) or shape[axis] not in (before, after):
            raise ValueError(f"{path}: found shape {jnp.shape(x)}, expected length {before} or {after} on axis {axis}")
        shape[axis] = before
    return meshes.struct(x, tuple(shape))


def by_group(groups: Groups, kept: Kept) -> dict[str, np.ndarray]:
    """The same cut by the names of groups: an index stays if any of its positions does."""
    found: dict[str, np.ndarray] = {}
    for name, group in groups.items():
        for (path, axis), index in group.maps.items():
            if (mask := kept.get(path, {}).get(axis)) is not None:
                alive = np.zeros(group.size, np.bool_)
                alive[index[np.asarray(mask) & (index >= 0)]] = True
                found[name] = found.get(name, False) | alive
    return found
