"""Scores of units, from scores of weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jcompress import core, rules
from jcompress.core import Context, PyTree
from jcompress.layers import units
from jcompress.layers.groups import Group
from jcompress.layers.units import Members
from jcompress.prune import scores

Reduce = Literal["sum", "mean", "max", "norm", "signed"]


def importance(
    params: PyTree,
    groups: Mapping[str, Group],
    score: scores.Score = scores.magnitude,
    reduce: Reduce = "sum",
    *,
    members: Members = "all",
    match: str = ".*",
    grads: PyTree = None,
    stats: Mapping[str, Any] | None = None,
    key: jax.Array | None = None,
) -> dict[str, jax.Array]:
    """The importance of each unit of each prunable group: the scores of its weights, reduced.

    Args:
      params: a pytree of arrays.
      groups: ``{name: group}``, from ``jc.trace.coupling``.
      score: of single weights, as in :mod:`jcompress.prune.scores`; evaluated in float32.
      reduce: over all entries that belong to a unit, on every chosen member: ``"sum"``, ``"mean"``, ``"max"``,
        ``"norm"`` (the root of the sum of squares) or ``"signed"`` (the magnitude of the sum, for scores with a sign).
      members: which axes count: ``"all"``, ``"producers"`` (those that compute the unit: kernel, bias, norm),
        ``"consumers"`` (those that read it), or ``"kernels"``: producers of two axes or more.
      match: a regular expression for the whole path, to narrow the choice.
      grads: gradients, of the structure of ``params``. By default ``stats[path].grad`` where it is known.
      stats: ``{path: statistics}`` from calibration.
      key: for scores that draw random numbers.

    Returns:
      ``{name: float32 (size,)}``; larger is more important.

    Raises:
      ValueError: for an unknown choice, a group without such members, or if what the score reads is missing.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> from jcompress.prune import structured
      >>> params = {"a": jnp.array([[1.0, -2.0, 0.5]]), "b": jnp.array([[1.0], [1.0], [3.0]])}
      >>> hidden = jc.trace.Group(size=3, producers=(("a", 1),), consumers=(("b", 0),))
      >>> structured.importance(params, {"hidden": hidden})["hidden"].tolist()
      [2.0, 3.0, 3.5]
    """
    if reduce not in ("sum", "mean", "max", "norm", "signed"):
        raise ValueError(f"reduce={reduce!r} is unknown; use 'sum', 'mean', 'max', 'norm' or 'signed'")
    found, wanted = units.leaves(params), units.prunable(groups)
    picked = {name: units.chosen(name, group, members, match, found) for name, group in wanted.items()}
    contexts = _contexts(found, grads, stats, key)
    scored = {
        path: scores.evaluate(score, _wide(units.leaf(found, path, name)), contexts[path])
        for name, pairs in picked.items()
        for path in dict.fromkeys(path for path, _ in pairs)
    }
    return {
        name: _reduced(
            [(scored[path].astype(jnp.float32), axis, wanted[name].maps[path, axis]) for path, axis in pairs],
            wanted[name].size,
            reduce,
        )
        for name, pairs in picked.items()
    }


def _wide(w: jax.Array) -> jax.Array:
    return w.astype(jnp.complex64 if jnp.iscomplexobj(w) else jnp.float32)


def _contexts(found: Mapping[str, Any], grads: PyTree, stats: Any, key: Any) -> dict[str, Context]:
    known = {} if grads is None else units.leaves(grads)
    contexts = {}
    for path in found:
        stat = None if stats is None else stats.get(path)
        grad = known.get(path, getattr(stat, "grad", None))
        own = rules.key_of(key, path)
        grad = None if grad is None else core.dense(grad).astype(jnp.float32)
        contexts[path] = Context(key=own, stats=stat, grad=grad, path=path)
    return contexts


def _reduced(parts: list[tuple[jax.Array, int, np.ndarray]], size: int, reduce: Reduce) -> jax.Array:
    """One number for each unit from the scores of all its entries."""
    if reduce == "max":
        return jnp.stack([units.totals(x, axis, index, size, largest=True) for x, axis, index in parts]).max(axis=0)
    power = jnp.square if reduce == "norm" else jnp.asarray
    total = sum((units.totals(power(x), axis, index, size) for x, axis, index in parts), jnp.zeros(size, jnp.float32))
    if reduce == "mean":
        entries = sum(
            np.bincount(index[index >= 0], minlength=size) * (x.size // max(x.shape[axis], 1))
            for x, axis, index in parts
        )
        return total / np.maximum(entries, 1).astype(np.float32)
    return {"norm": jnp.sqrt, "signed": jnp.abs}.get(reduce, jnp.asarray)(total)


def random(groups: Mapping[str, Group], key: jax.Array) -> dict[str, jax.Array]:
    """Uniform scores of units: a control for methods that claim to choose well.

    Each group's scores depend on the key and the group's name only.

    Args:
      groups: from ``jc.trace.coupling``.
      key: a random key.

    Returns:
      ``{name: float32 (size,)}``, in [0, 1).

    Example:
      >>> import jax, jcompress as jc
      >>> from jcompress.prune import structured
      >>> structured.random({"hidden": jc.trace.Group(size=3)}, jax.random.key(0))["hidden"].shape
      (3,)
    """
    keys = {name: rules.key_of(key, name) for name in units.prunable(groups)}
    sizes = {name: (groups[name].size,) for name, own in keys.items() if own is not None}
    return {name: jax.random.uniform(keys[name], size, jnp.float32) for name, size in sizes.items()}


def l1(
    params: PyTree, groups: Mapping[str, Group], members: Members = "kernels", match: str = ".*"
) -> dict[str, jax.Array]:
    """The sum of magnitudes of each unit's weights, ``s_j = sum |W[..., j]|``.

    By default of the kernels that compute the unit, as for filters (Li et al. 2017, arXiv:1608.08710).

    Args:
      params: a pytree of arrays.
      groups: from ``jc.trace.coupling``.
      members: which weights count, as for :func:`importance`.
      match: as for :func:`importance`.

    Returns:
      ``{name: float32 (size,)}``; larger is more important.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> from jcompress.prune import structured
      >>> params = {"a": jnp.array([[1.0, -2.0], [3.0, 0.0]]), "b": jnp.ones((2, 1))}
      >>> hidden = jc.trace.Group(size=2, producers=(("a", 1),), consumers=(("b", 0),))
      >>> structured.l1(params, {"hidden": hidden})["hidden"].tolist()
      [4.0, 2.0]
    """
    return importance(params, groups, scores.magnitude, members=members, match=match)


def l2(
    params: PyTree, groups: Mapping[str, Group], members: Members = "kernels", match: str = ".*"
) -> dict[str, jax.Array]:
    """The Euclidean norm of each unit's weights, ``s_j = ||W[..., j]||``.

    With ``members="all"`` it is the norm of everything that would be cut (Fang et al. 2023, arXiv:2301.12900).

    Args:
      params: a pytree of arrays.
      groups: from ``jc.trace.coupling``.
      members: which weights count, as for :func:`importance`.
      match: as for :func:`importance`.

    Returns:
      ``{name: float32 (size,)}``; larger is more important.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> from jcompress.prune import structured
      >>> hidden = jc.trace.Group(size=2, producers=(("a", 1),))
      >>> structured.l2({"a": jnp.array([[3.0, 1.0], [4.0, 0.0]])}, {"hidden": hidden})["hidden"].tolist()
      [5.0, 1.0]
    """
    return importance(params, groups, scores.magnitude, "norm", members=members, match=match)


def slimming(params: PyTree, groups: Mapping[str, Group], match: str = ".*scale") -> dict[str, jax.Array]:
    """The magnitude of each channel's scale in batch norm, ``s_j = |gamma_j|`` (Liu et al. 2017, arXiv:1708.06519).

    Meant for scales that were trained with :func:`add_l1` or :func:`jcompress.prune.penalties.proximal`, and for one
    threshold over all groups: ``keep(..., scope="global")``. Where a group has several norms, their mean counts.

    Args:
      params: a pytree of arrays.
      groups: from ``jc.trace.coupling``.
      match: a regular expression for the paths of the scales.

    Returns:
      ``{name: float32 (size,)}``; larger is more important.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> from jcompress.prune import structured
      >>> hidden = jc.trace.Group(size=2, producers=(("kernel", 1), ("scale", 0)))
      >>> params = {"kernel": jnp.ones((3, 2)), "scale": jnp.array([-2.0, 0.5])}
      >>> structured.slimming(params, {"hidden": hidden})["hidden"].tolist()
      [2.0, 0.5]
    """
    return importance(params, groups, scores.magnitude, "mean", members="producers", match=match)


def taylor(
    params: PyTree,
    groups: Mapping[str, Group],
    grads: PyTree,
    members: Members = "consumers",
    match: str = ".*",
    signed: bool = True,
) -> dict[str, jax.Array]:
    """The squared change of the loss, to first order, if a unit were cut: ``(sum g w)**2`` (Molchanov et al. 2019).

    Summed over the weights that read a unit, ``g w`` is exactly the derivative of the loss by a gate on the unit's
    output, with or without batch norm before it; summed over a kernel that batch norm follows it would be zero.

    Args:
      params: a pytree of arrays.
      groups: from ``jc.trace.coupling``.
      grads: gradients of the loss, of the structure of ``params``. To average the squares over batches, call this for
        the gradients of each, under ``vmap`` if you like, and average what it gives.
      members: which weights are summed over, as for :func:`importance`.
      match: as for :func:`importance`.
      signed: False gives ``sum |g w|``, in which opposite changes do not cancel.

    Returns:
      ``{name: float32 (size,)}``; larger is more important.

    Papers: Molchanov et al. 2017, arXiv:1611.06440; Molchanov et al. 2019, arXiv:1906.10771.

    Example:
      >>> import jax, jax.numpy as jnp, jcompress as jc
      >>> from jcompress.prune import structured
      >>> params = {"a": jnp.array([[1.0, -2.0]]), "b": jnp.array([[3.0], [1.0]])}
      >>> hidden = jc.trace.Group(size=2, producers=(("a", 1),), consumers=(("b", 0),))
      >>> grads = jax.grad(lambda p: (jnp.ones((1, 1)) @ p["a"] @ p["b"]).sum())(params)
      >>> structured.taylor(params, {"hidden": hidden}, grads)["hidden"].tolist()
      [9.0, 4.0]
    """
    if not signed:
        return importance(params, groups, scores.taylor, members=members, match=match, grads=grads)
    total = importance(params, groups, scores.signed_taylor, "signed", members=members, match=match, grads=grads)
    return {name: jnp.square(x) for name, x in total.items()}


def hessian(
    params: PyTree,
    groups: Mapping[str, Group],
    stats: Mapping[str, Any],
    members: Members = "kernels",
    match: str = ".*",
) -> dict[str, jax.Array]:
    """The change of the loss, to second order at a minimum, if a unit were cut: ``sum h w**2 / 2``.

    The saliency of optimal brain damage summed over units (LeCun et al. 1990).

    Args:
      params: a pytree of arrays.
      groups: from ``jc.trace.coupling``.
      stats: ``{path: statistics}``; of these ``hessian_diagonal`` is read.
      members: which weights are summed over, as for :func:`importance`.
      match: as for :func:`importance`.

    Returns:
      ``{name: float32 (size,)}``; larger is more important.

    Example:
      >>> import types, jax.numpy as jnp, jcompress as jc
      >>> from jcompress.prune import structured
      >>> hidden = jc.trace.Group(size=2, producers=(("a", 1),))
      >>> stats = {"a": types.SimpleNamespace(hessian_diagonal=jnp.array([[2.0, 4.0]]))}
      >>> structured.hessian({"a": jnp.array([[3.0, 1.0]])}, {"hidden": hidden}, stats)["hidden"].tolist()
      [9.0, 2.0]
    """
    return importance(params, groups, scores.hessian, members=members, match=match, stats=stats)
