"""Masks by path: where they come from, and how they are laid on parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jcompress import apply, rules
from jcompress.core import PyTree
from jcompress.formats import Masked
from jcompress.rules import Plan

Masks = Mapping[str, jax.Array]


def initial(params: PyTree, source: Plan | Masks, key: jax.Array | None) -> dict[str, jax.Array]:
    """The masks that training starts with: given, or as a plan's methods choose them.

    Raises:
      ValueError: if a method gives something other than a mask, or a mask fits no parameter.
    """
    if not isinstance(source, Plan):
        _check(dict(rules.paths(params)), source)
        return {path: jnp.copy(mask) for path, mask in source.items()}
    nodes = dict(rules.paths(apply.compress(params, source, key=key)))
    found = {}
    for path, method in source.items():
        if method is None:
            continue
        node = nodes[path]
        if not isinstance(node, Masked):
            raise ValueError(
                f"{path}: found {method!r}, which gives a {type(node).__name__}; sparse training expects a method that "
                "gives a Masked, such as jc.prune.Random(sparsity=0.9)"
            )
        found[path] = jnp.broadcast_to(node.mask, nodes[path].materialize().shape)
    return found


def _check(found: Mapping[str, Any], given: Masks) -> None:
    for path, mask in given.items():
        if path not in found:
            raise ValueError(f"{path}: a mask is given but there is no such parameter; there are {sorted(found)[:5]}")
        if jnp.shape(mask) != jnp.shape(found[path]) or jnp.result_type(mask) != jnp.bool_:
            raise ValueError(
                f"{path}: found a mask of shape {jnp.shape(mask)} and dtype {jnp.result_type(mask)}, expected "
                f"a boolean one of shape {jnp.shape(found[path])}; True keeps"
            )


def lay(params: PyTree, masks: Masks) -> PyTree:
    """The parameters, or anything of their structure, with 0.0 where a mask is False.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> jc.prune.dynamic.lay({"w": jnp.ones(3)}, {"w": jnp.array([True, False, True])})["w"].tolist()
      [1.0, 0.0, 1.0]
    """
    leaves, treedef = jax.tree.flatten(params)
    named = zip([path for path, _ in rules.paths(params)], leaves, strict=True)
    return jax.tree.unflatten(
        treedef, [jnp.where(masks[p], x, jnp.zeros_like(x)) if p in masks else x for p, x in named]
    )


def masks(state: PyTree) -> dict[str, jax.Array]:
    """The masks held in the state of an optimizer, however deep :func:`sparse` or its kin stand in it.

    Raises:
      ValueError: if the state holds none.
    """
    for x in jax.tree.leaves(state, is_leaf=_holds_masks):
        if _holds_masks(x):
            return dict(x.masks)
    raise ValueError("found no masks in this state; expected the state of an optimizer made with jc.prune.dynamic")


def _holds_masks(x: Any) -> bool:
    return isinstance(x, tuple) and "masks" in getattr(x, "_fields", ())


def moved(params: PyTree, updates: PyTree, new: Mapping[str, jax.Array]) -> PyTree:
    """The updates with those of some leaves replaced."""
    leaves, treedef = jax.tree.flatten(updates)
    named = zip([path for path, _ in rules.paths(params)], leaves, strict=True)
    return jax.tree.unflatten(treedef, [new.get(path, x) for path, x in named])
