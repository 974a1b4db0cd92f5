"""Leaves that stand for other leaves."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from jcompress import core, rules
from jcompress.core import PyTree
from jcompress.formats import Reference


def tie(
    params: PyTree,
    shared: Mapping[str, str],
    transpose: Iterable[str] | Mapping[str, tuple[int, ...]] = (),
) -> PyTree:
    r"""Let leaves stand for others: stored once, counted once, trained once, with the gradient of all uses.

    The first gives its array up for that of the second, its owner (Press & Wolf 2017, arXiv:1608.05859, for the
    embedding and the head of a language model). Layers are shared as in ALBERT (Lan et al. 2020, arXiv:1909.11942) by a
    pattern: ``{r"layer/[1-9]\d*/(.*)": r"layer/0/\1"}``. With ``jc.factorize.SVD`` for the owner of a tied embedding,
    a table of V x D becomes V x r and r x D, ALBERT's other half.

    Every verb sees through the reference: ``compress`` and ``project`` leave it alone and change its owner,
    ``materialize`` gives the owner's array in its place, optimizers and files have the owner's only.

    Args:
      params: a pytree of arrays and nodes: a dictionary, a linen or an NNX state.
      shared: ``{path: owner's path}``. A path may be a regular expression, matched as in :func:`jcompress.plan`, and
        its owner a template of it; a leaf that is its own owner stays.
      transpose: paths, or patterns, of leaves that are the transposed of their owners, their last two axes exchanged;
        or ``{path: axes}``, where ``axes`` is the order of the owner's axes, as for ``jnp.transpose``.

    Returns:
      The tree, a :class:`jcompress.formats.Reference` in place of each leaf that gave up its array.

    Raises:
      ValueError: for a path that is not there, leaves of different shapes or dtypes, one that stands for another
        already, an owner that does, or a transposed leaf that is not tied. The message names both ends and the fix.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> params = {"embed": {"embedding": jnp.ones((10, 4))}, "head": {"kernel": jnp.zeros((4, 10))}}
      >>> tied = jc.tie(params, {"head/kernel": "embed/embedding"}, transpose=("head/kernel",))
      >>> jc.nbits(tied) // 32, float(jc.materialize(tied)["head"]["kernel"].sum())
      (40, 40.0)
    """
    leaves = rules.leaves(params)
    found = owners(leaves, shared, "tie")
    turned = transpose if isinstance(transpose, Mapping) else dict.fromkeys(transpose, (-1, -2))
    orders = {
        path: tuple(axes) for pattern, axes in turned.items() for path in _matching(pattern, found, "tie: transpose")
    }
    return rules.rebuild(
        params, {path: _reference(path, owner, orders.get(path, ()), leaves) for path, owner in found.items()}
    )


def _matching(pattern: str, known: Iterable[str], name: str) -> list[str]:
    known = list(known)
    found = [pattern] if pattern in known else [path for path in known if re.fullmatch(pattern, path)]
    if not found:
        raise ValueError(f"{name} {pattern!r} matches no leaf of those; {rules.closest(pattern, known)}")
    return found


def owners(leaves: Mapping[str, Any], shared: Mapping[str, str], verb: str) -> dict[str, str]:
    """The owner of each leaf that gets one: ``shared`` with its patterns resolved, for the verb that errors name."""
    found: dict[str, str] = {}
    for pattern, template in shared.items():
        for path in _matching(pattern, leaves, f"{verb}: leaf"):
            match = None if pattern in leaves else re.fullmatch(pattern, path)
            owner = match.expand(template) if match else template
            if owner not in leaves:
                raise ValueError(f"{path}: its owner {owner!r} is not in the tree; {rules.closest(owner, leaves)}")
            if owner != path and found.setdefault(path, owner) != owner:
                raise ValueError(f"{path}: found two owners, {found[path]} and {owner}, expected one; leave one out")
    for path, owner in found.items():
        if owner in found:
            raise ValueError(
                f"{path}: its owner {owner} is to stand for {found[owner]} itself; {verb} {path} to {found[owner]} too"
            )
    return found


def _reference(path: str, owner: str, axes: tuple[int, ...], leaves: Mapping[str, Any]) -> Reference:
    old, new = leaves[path], leaves[owner]
    for name, x in ((path, old), (owner, new)):
        if isinstance(x, Reference):
            raise ValueError(
                f"{name}: stands for {x.owner} already, found in tying {path} to {owner}; tie {path} to {x.owner}, or "
                "take the old tie off with jc.untie"
            )
    mine, theirs = (jax.eval_shape(core.dense, x) for x in (old, new))
    made = Reference(owner, _from_behind(path, owner, axes, theirs.shape), tuple(mine.shape))
    shape = jax.eval_shape(made.turned, theirs).shape
    if shape != mine.shape or mine.dtype != theirs.dtype:
        turn = "pass transpose=" if not axes and mine.shape == theirs.shape[::-1] else "tie leaves that are alike"
        raise ValueError(
            f"{path}: found {mine.dtype}{list(mine.shape)}, and its owner {owner} is {theirs.dtype}{list(theirs.shape)}"
            f"{', transposed' * bool(axes)}; {turn}"
        )
    return made


def _from_behind(path: str, owner: str, axes: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """The order of the last axes, as negative numbers."""
    found = tuple(a - len(axes) if a >= 0 else a for a in axes)
    if sorted(found) != list(range(-len(axes), 0)) or len(axes) > len(shape):
        raise ValueError(
            f"{path}: found transpose={axes} for its owner {owner} of shape {shape}, expected an order of its last "
            "axes, such as (1, 0)"
        )
    return found
