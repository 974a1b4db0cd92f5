"""Groups of coupled axes, and the units inside them: which entries of which parameters are one neuron or channel."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jcompress import core, rules
from jcompress.core import PyTree
from jcompress.layers.groups import Group, Member, closest

Members = Literal["kernels", "producers", "consumers", "all"]


def leaves(tree: PyTree) -> dict[str, Any]:
    """The leaves of a tree by their paths."""
    return dict(rules.paths(tree))


def replace(tree: PyTree, changes: Mapping[str, Any]) -> PyTree:
    """The tree with other leaves at some paths."""
    treedef = jax.tree.structure(tree, is_leaf=core.is_node)
    return jax.tree.unflatten(treedef, [changes.get(path, x) for path, x in rules.paths(tree)])


def prunable(groups: Mapping[str, Group]) -> dict[str, Group]:
    """The groups that may be cut."""
    return {name: group for name, group in groups.items() if group.prunable}


def find(groups: Mapping[str, Group], name: str) -> Group:
    """The group of this name, which must be there and be prunable."""
    if name not in groups:
        raise ValueError(f"{name}: there is no such group; {closest(name, groups)}")
    if not groups[name].prunable:
        raise ValueError(
            f"{name}: found a group that cannot be cut ({groups[name].reason}); leave it out of the scores"
        )
    return groups[name]


def leaf(found: Mapping[str, Any], path: str, name: str) -> Any:
    """The parameter at a path that a group names."""
    if path not in found:
        raise ValueError(
            f"{path}: the group {name!r} names it, but the parameters do not hold it; {closest(path, found)}. Use the "
            "tree of parameters that the groups were made from"
        )
    return core.dense(found[path])


def chosen(name: str, group: Group, members: Members, match: str, found: Mapping[str, Any]) -> list[Member]:
    """The members that a score or a penalty looks at.

    Args:
      name: of the group, for error messages.
      group: the group.
      members: ``"all"``, ``"producers"``, ``"consumers"``, or ``"kernels"``: producers of two axes or more,
        or all such members where no producer has them.
      match: a regular expression that must match the whole path.
      found: the parameters by their paths.
    """
    if members not in ("kernels", "producers", "consumers", "all"):
        raise ValueError(f"members={members!r} is unknown; use 'kernels', 'producers', 'consumers' or 'all'")
    listed = {"all": group.members, "consumers": group.consumers}.get(members, group.producers)
    picked = [(path, axis) for path, axis in listed if re.fullmatch(match, path)]
    if members == "kernels":
        # Channels of heads are made by queries and keys, and summed over where these meet: all of them count.
        every = [(path, axis) for path, axis in group.members if re.fullmatch(match, path)]
        kernels = ([x for x in part if np.ndim(leaf(found, x[0], name)) > 1] for part in (picked, every))
        picked = next(filter(None, kernels), [])
    if not picked:
        raise ValueError(
            f"{name}: none of its {len(group.members)} members {list(group.members)[:4]} is among members={members!r} "
            f"with match={match!r}; choose others, or leave the group out"
        )
    return picked


def totals(x: jax.Array, axis: int, index: np.ndarray, size: int, largest: bool = False) -> jax.Array:
    """The sum, or the largest, of all entries of each unit: shape (size,)."""
    others = tuple(i for i in range(x.ndim) if i != axis % x.ndim)
    target = np.where(index < 0, size, index)
    if largest:
        return jnp.full(size, -jnp.inf, x.dtype).at[target].max(jnp.max(x, axis=others), mode="drop")
    return jnp.zeros(size, x.dtype).at[target].add(jnp.sum(x, axis=others), mode="drop")


def spread(values: jax.Array, axis: int, index: np.ndarray, ndim: int, fill: Any) -> jax.Array:
    """A value for each unit, laid along the axis of an array of ``ndim`` axes; ``fill`` where no unit is."""
    along = jnp.where(index < 0, fill, values[np.maximum(index, 0)])
    return jnp.expand_dims(along, tuple(i for i in range(ndim) if i != axis % ndim))


def positions(index: np.ndarray, size: int) -> np.ndarray:
    """Where each unit lies on an axis: shape (size, most occurrences), with the axis' length for none."""
    index = np.asarray(index)
    order = np.argsort(index, kind="stable")
    order = order[index[order] >= 0]
    units = index[order]
    counts = np.bincount(units, minlength=size)
    rank = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    table = np.full((size, counts.max(initial=0)), len(index))
    table[units, rank] = order
    return table


def gather(w: jax.Array, axis: int, index: np.ndarray, size: int) -> jax.Array:
    """The entries of each unit as a row: shape (size, occurrences, the other axes), zero where a unit has fewer."""
    return jnp.moveaxis(w, axis, 0).at[positions(index, size)].get(mode="fill", fill_value=0)


def scatter(w: jax.Array, axis: int, index: np.ndarray, units: jax.Array) -> jax.Array:
    """The array with the entries of all units replaced: the inverse of :func:`gather`."""
    placed = jnp.moveaxis(w, axis, 0).at[positions(index, units.shape[0])].set(units.astype(w.dtype), mode="drop")
    return jnp.moveaxis(placed, 0, axis)


def movable(group: Group) -> bool:
    """Whether the units of a group may change places: each occurs as often as any other, and only in parameters."""
    whole = ((positions(index, group.size) < len(index)).all() for index in group.maps.values())
    return not group.arguments and all(whole)


def reordered(found: Mapping[str, Any], group: Group, order: np.ndarray) -> dict[str, Any]:
    """The members of a group with its units in another order: at each place that which ``order`` names."""
    changed: dict[str, Any] = {}
    for path, axis in group.members:
        index, table = np.arange(len(group.maps[path, axis])), positions(group.maps[path, axis], group.size)
        index[table] = table[order]  # occurrences of a unit keep their order
        changed[path] = jnp.take(changed.get(path, found[path]), jnp.asarray(index), axis=axis)
    return changed


def rows(name: str, group: Group, picked: Iterable[Member], found: Mapping[str, Any]) -> jax.Array:
    """All entries of each unit in all picked members, as float32 rows: shape (size, features)."""
    parts = []
    for path, axis in picked:
        w = leaf(found, path, name).astype(jnp.float32)
        parts.append(gather(w, axis, group.maps[path, axis], group.size).reshape(group.size, -1))
    return jnp.concatenate(parts, axis=1)


def distances(units: jax.Array) -> jax.Array:
    """Squared Euclidean distances of all pairs of rows, exactly zero for equal ones: shape (size, size)."""
    return jax.lax.map(lambda row: jnp.sum(jnp.square(units - row), axis=1), units)
