"""Groups of coupled axes, and the units inside them: which entries of which parameters are one neuron or channel."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jcompress import core, rules
from jcompress.core import PyTree

Member = tuple[str, int]
Members = Literal["kernels", "producers", "consumers", "all"]


class Group(Protocol):
    """What is read of a group that :func:`jcompress.trace.coupling` found."""

    @property
    def size(self) -> int:
        """The number of units."""

    @property
    def members(self) -> tuple[Member, ...]:
        """The axes that are cut together, as (path, axis)."""

    @property
    def maps(self) -> Mapping[Member, np.ndarray]:
        """For each member, the unit that each entry of the axis belongs to, or -1."""

    @property
    def producers(self) -> tuple[Member, ...]:
        """Members whose axis is the output of a layer."""

    @property
    def consumers(self) -> tuple[Member, ...]:
        """Members whose axis is contracted by the next layer."""

    @property
    def prunable(self) -> bool:
        """Whether the group may be cut."""


Groups = Mapping[str, Group]


@dataclasses.dataclass(frozen=True)
class ManualGroup:
    """A group written by hand, for a function that cannot be read; ``jc.trace.coupling`` gives them otherwise.

    Attributes:
      size: the number of units.
      producers: (path, axis) pairs whose axis is the output of a layer: kernels, biases, norms.
      consumers: (path, axis) pairs whose axis the next layer contracts.
      others: further axes that are cut with them.
      index: for members whose axis is not simply ``0 ... size - 1``: the unit of each of its entries, or -1.
      prunable: whether the group may be cut.

    Example:
      >>> from jcompress.prune import structured
      >>> group = structured.ManualGroup(size=3, producers=(("a", 1),), consumers=(("b", 0),))
      >>> group.maps["b", 0].tolist()
      [0, 1, 2]
    """

    size: int
    producers: tuple[Member, ...] = ()
    consumers: tuple[Member, ...] = ()
    others: tuple[Member, ...] = ()
    index: Mapping[Member, np.ndarray] = dataclasses.field(default_factory=dict)
    prunable: bool = True

    @property
    def members(self) -> tuple[Member, ...]:
        """All axes that are cut together."""
        return (*self.producers, *self.consumers, *self.others)

    @property
    def maps(self) -> dict[Member, np.ndarray]:
        """For each member, the unit that each entry of the axis belongs to, or -1."""
        return {member: np.asarray(self.index.get(member, np.arange(self.size))) for member in self.members}


def within(groups: Groups, prefix: str) -> dict[str, ManualGroup]:
    """The groups as a subtree sees them, such as the ``params`` of Flax variables, which an optimizer gets alone.

    Args:
      groups: of the whole tree.
      prefix: the path of the subtree. Members outside it are left out, and groups that have none in it.

    Example:
      >>> from jcompress.prune import structured
      >>> group = structured.ManualGroup(size=2, producers=(("params/scale", 0), ("batch_stats/mean", 0)))
      >>> structured.within({"hidden": group}, "params")["hidden"].members
      (('scale', 0),)
    """
    start = prefix.rstrip("/") + "/"

    def inside(members: Iterable[Member]) -> tuple[Member, ...]:
        return tuple((path.removeprefix(start), axis) for path, axis in members if path.startswith(start))

    seen = {}
    for name, group in groups.items():
        others = [m for m in group.members if m not in group.producers and m not in group.consumers]
        index = {
            (path.removeprefix(start), axis): x for (path, axis), x in group.maps.items() if path.startswith(start)
        }
        parts = (inside(group.producers), inside(group.consumers), inside(others))
        seen[name] = ManualGroup(group.size, *parts, index, group.prunable)
    return {name: group for name, group in seen.items() if group.members}


def leaves(tree: PyTree) -> dict[str, Any]:
    """The leaves of a tree by their paths."""
    return dict(rules.paths(tree))


def replace(tree: PyTree, changes: Mapping[str, Any]) -> PyTree:
    """The tree with other leaves at some paths."""
    treedef = jax.tree.structure(tree, is_leaf=core.is_node)
    return jax.tree.unflatten(treedef, [changes.get(path, x) for path, x in rules.paths(tree)])


def prunable(groups: Groups) -> dict[str, Group]:
    """The groups that may be cut."""
    return {name: group for name, group in groups.items() if group.prunable}


def find(groups: Groups, name: str) -> Group:
    """The group of this name, which must be there and be prunable."""
    if name not in groups:
        raise ValueError(f"{name}: there is no such group; {closest(name, groups)}")
    if not groups[name].prunable:
        reason = getattr(groups[name], "reason", "") or "an input, an output or a fixed axis hangs on it"
        raise ValueError(f"{name}: found a group that cannot be cut ({reason}); leave it out of the scores")
    return groups[name]


def closest(name: str, known: Iterable[str]) -> str:
    """The known names most like this one, for an error message."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.3) or known[:3]
    return f"there are {len(known)}, such as {', '.join(map(repr, near))}" if known else "there are none"


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
      members: ``"all"``, ``"producers"``, ``"consumers"``, or ``"kernels"``: producers of two axes or more.
      match: a regular expression that must match the whole path.
      found: the parameters by their paths.
    """
    if members not in ("kernels", "producers", "consumers", "all"):
        raise ValueError(f"members={members!r} is unknown; use 'kernels', 'producers', 'consumers' or 'all'")
    listed = {"all": group.members, "consumers": group.consumers}.get(members, group.producers)
    picked = [(path, axis) for path, axis in listed if re.fullmatch(match, path)]
    if members == "kernels":
        picked = [(path, axis) for path, axis in picked if np.ndim(leaf(found, path, name)) > 1]
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
