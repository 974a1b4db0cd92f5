"""What stays of each group, from any of the forms in which it may be told: names, scores, masks, or zeros."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jcompress.core import PyTree
from jcompress.layers.groups import Groups
from jcompress.trace.core import walk


def from_mask(params: PyTree, groups: Groups, *, strict: bool = False) -> dict[str, np.ndarray]:
    """What a masked tree keeps: an index of a group is cut where all of its slices are zero in every member.

    Args:
      params: concrete parameters or masks, some of whose slices are zero.
      groups: from :func:`jcompress.trace.coupling`.
      strict: whether all members must agree, as where masks were given: parameters may have zeros by chance.

    Raises:
      ValueError: if a group is cut unevenly: an index is zero in all that writes it, or, if strict, in any member, but
        not in the rest.
    """
    arrays = {path: _values(path, x) for path, x in walk.leaves(params)}
    found = {}
    for name, group in groups.prunable.items():
        alive = {}
        for (path, axis), index in group.maps.items():
            used = (arrays[path] != 0).any(axis=tuple(i for i in range(arrays[path].ndim) if i != axis))
            alive[path, axis] = np.array([used[index == i].any() for i in range(group.size)])
        cut = ~np.any(list(alive.values()), axis=0)
        writers = [alive[m] for m in group.members if m in group.producers and arrays[m[0]].ndim > 1]
        if strict:
            uneven = ~np.all(list(alive.values()), axis=0) & ~cut
        else:
            uneven = ~np.any(writers, axis=0) & ~cut if writers else np.zeros(group.size, bool)
        if uneven.any():
            whole = [f"  {p} axis {a}" for p, a in group.members if (alive[p, a] & uneven).any()]
            where = "some of the members" if strict else "what writes them"
            raise ValueError(
                f"{name}: indices {np.flatnonzero(uneven)[:8].tolist()} are zero in {where}, but not in\n"
                + "\n".join(whole)
                + "\nthese must change together: zero them too, with jc.trace.mask(params, groups, keep)"
            )
        if cut.any():
            found[name] = ~cut
    return found


def _values(path: str, x: Any) -> np.ndarray:
    if isinstance(x, jax.ShapeDtypeStruct):
        raise ValueError(
            f"{path}: found a shape, expected values, which say what stays; pass arrays, or keep= by groups"
        )
    return np.asarray(x)


def rounded(params: PyTree, groups: Groups, keep: Mapping[str, np.ndarray], multiple: int) -> dict[str, np.ndarray]:
    """Keep more, the largest first, until the sizes are multiples."""
    found, arrays = {}, dict(walk.leaves(params))
    for name, kept in keep.items():
        group = groups[name]
        wanted = min(-(-int(kept.sum()) // multiple) * multiple, group.size)
        score = np.zeros(group.size)
        for (path, axis), index in group.maps.items():
            x = np.abs(_values(path, arrays[path])).astype(np.float64)
            energy = (x**2).sum(axis=tuple(i for i in range(x.ndim) if i != axis))
            np.add.at(score, index[index >= 0], energy[index >= 0])
        order = np.lexsort((-score, ~kept))
        found[name] = np.isin(np.arange(group.size), order[:wanted])
    return found


def wanted(params: PyTree, groups: Groups, keep: Any, sparsity: float | None) -> dict[str, np.ndarray]:
    """What stays, from any of the forms in which it may be given."""
    if keep is None:
        return from_mask(params, groups)
    named = isinstance(keep, Mapping) and not set(keep).isdisjoint(groups)
    if not named and str(jax.tree.structure(keep)) == str(jax.tree.structure(params)):
        return from_mask(keep, groups, strict=all(jnp.result_type(x) == jnp.bool_ for x in jax.tree.leaves(keep)))
    scored = [name for name, x in keep.items() if jnp.issubdtype(jnp.result_type(x), jnp.floating)]
    if not scored:
        return groups.checked(keep)
    if sparsity is None:
        raise ValueError(
            f"{scored[0]}: found scores; say with sparsity= what fraction of each group goes, or pass bools"
        )
    return groups.checked({name: _largest(x, sparsity) if name in scored else x for name, x in keep.items()})


def _largest(scores: Any, sparsity: float) -> np.ndarray:
    """The largest scores; ties go to the lower index, and one stays at least."""
    scores = np.asarray(scores, np.float64).reshape(-1)
    order = np.argsort(-scores, kind="stable")
    return np.isin(np.arange(scores.size), order[: max(1, scores.size - round(sparsity * scores.size))])
