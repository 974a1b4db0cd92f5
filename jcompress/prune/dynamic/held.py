"""Masks by path: where they come from, and how they are laid on parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jcompress import apply, rules, transforms
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
        given = {path: mask for path, mask in source.items() if not transforms.is_hidden(path, params)}
        _check(rules.leaves(params), given)
        return {path: jnp.copy(mask) for path, mask in given.items()}
    source = transforms.shown(source, params)
    nodes = rules.leaves(apply.compress(params, source, step=0, key=key))
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


def lay(params: PyTree, masks: Masks, like: PyTree = None) -> PyTree:
    """The parameters, or anything of their structure, with 0.0 where a mask is False.

    Args:
      params: a pytree of arrays.
      masks: ``{path: boolean array}`` that broadcasts; other leaves stay as they are.
      like: the parameters, where the paths of the first tree are not theirs.

    Returns:
      A tree like the first.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> jc.prune.dynamic.lay({"w": jnp.ones(3)}, {"w": jnp.array([True, False, True])})["w"].tolist()
      [1.0, 0.0, 1.0]
    """
    found = rules.beside(params if like is None else like, params)
    laid = {path: jnp.where(mask, found[path], jnp.zeros_like(found[path])) for path, mask in masks.items()}
    return rules.rebuild(params, laid, like=like)


def masks_of(state: PyTree) -> dict[str, jax.Array]:
    """The masks held in the state of an optimizer, however deep they stand in it.

    Args:
      state: of :func:`sparse` or its kin, or of :func:`jcompress.project` where its plan gives masks.

    Returns:
      ``{path: boolean array}``. For the nodes themselves see :func:`jcompress.nodes`.

    Raises:
      ValueError: if the state holds none.

    Example:
      >>> import jax.numpy as jnp, optax, jcompress as jc
      >>> params = {"w": jnp.array([1.0, 2.0])}
      >>> tx = optax.chain(optax.sgd(0.1), jc.project(jc.plan(params, [("w", jc.prune.Magnitude(sparsity=0.5))])))
      >>> jc.prune.dynamic.masks_of(tx.init(params))["w"].tolist()
      [False, True]
    """
    found: dict[str, jax.Array] = {}
    for x in transforms.holders(state):
        found |= getattr(x, "masks", {})
        held = getattr(x, "held", {})
        found |= {path: node.mask for path, node in held.items() if isinstance(node, Masked)}
    if not found:
        raise ValueError("found no masks in this state; expected that of jc.project or of a transform of jc.prune")
    return found
