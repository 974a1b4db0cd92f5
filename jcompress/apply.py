"""Putting a plan to work: once, or on every forward pass."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jcompress import core, rules
from jcompress.core import Context, PyTree
from jcompress.numeric.surrogates import straight_through
from jcompress.rules import Plan


def compress(
    params: PyTree,
    plan: Plan,
    step: Any = 0,
    key: jax.Array | None = None,
    stats: Mapping[str, Any] | None = None,
    *,
    grads: PyTree = None,
    previous: PyTree = None,
) -> PyTree:
    """Replace every array that the plan names by a compressed node.

    Works under ``jit``, ``vmap`` and sharding. What is not compressed is copied, so ``params`` may be donated.

    Args:
      params: a pytree of arrays.
      plan: from :func:`jcompress.plan`, made for the same structure.
      step: the step at which hyperparameters that are schedules are read.
      key: for methods that draw random numbers; each leaf gets its own, which depends on its path only.
      stats: ``{path: statistics}`` from calibration.
      grads: gradients, of the structure of ``params``.
      previous: the tree of nodes of the last time, for methods that start from it.

    Returns:
      A pytree like ``params``, with nodes.

    Raises:
      ValueError: if the plan was made for other paths, a leaf is compressed already, something that a method
        needs is missing, or, outside ``jit``, a leaf that is to be compressed holds NaN or infinity. Under ``jit``
        values cannot be checked: there NaN counts as the largest magnitude.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> params = {"kernel": jnp.arange(8.0).reshape(4, 2), "bias": jnp.zeros(2)}
      >>> plan = jc.plan(params, [("kernel", jc.prune.Magnitude(sparsity=0.5))])
      >>> jc.compress(params, plan)["kernel"]
      Masked(values=float32[4,2], mask=bool[4,2])
    """
    leaves = rules.paths(params)
    nodes = fit(leaves, plan, contexts_of(params, leaves, step, key, stats, grads, previous))
    treedef = jax.tree.structure(params, is_leaf=core.is_node)
    return jax.tree.unflatten(treedef, [nodes[path] if path in nodes else _copy(x) for path, x in leaves])


def _copy(x: Any) -> Any:
    return jax.tree.map(jnp.copy, x) if core.is_node(x) else jnp.copy(x)


def fit(leaves: list[tuple[str, Any]], plan: Plan, contexts: dict[str, Context]) -> dict[str, Any]:
    """The nodes of all leaves that the plan names."""
    check_paths(leaves, plan)
    arrays = dict(leaves)
    nodes: dict[str, Any] = {}
    for unit in units_of(plan):
        nodes |= fit_unit(unit, plan, arrays, contexts)
    return nodes


def fit_unit(unit: list[str], plan: Plan, arrays: dict[str, Any], contexts: dict[str, Context]) -> dict[str, Any]:
    """The nodes of leaves that are decided together."""
    for path in unit:
        _check_array(path, arrays[path])
    method = plan[unit[0]]
    assert method is not None
    return dict(zip(unit, core.fit(method, [arrays[p] for p in unit], [contexts[p] for p in unit]), strict=True))


def units_of(plan: Plan) -> list[list[str]]:
    """The paths that are decided together: all of a rule where its method decides for all at once, else each alone."""
    units: dict[Any, list[str]] = {}
    for path, method in plan.items():
        if method is not None:
            units.setdefault((plan.groups[path], id(method)) if core.is_joint(method) else path, []).append(path)
    return list(units.values())


def check_paths(leaves: list[tuple[str, Any]], plan: Plan) -> None:
    """Raise unless the plan was made for these leaves."""
    found, planned = {path for path, _ in leaves}, set(plan)
    if found != planned:
        extra, missing = sorted(found - planned), sorted(planned - found)
        raise ValueError(
            f"the plan was made for other parameters: not in the plan {extra[:3]}, "
            f"not in the parameters {missing[:3]}; make it anew with jc.plan(params, rules)"
        )


def _check_array(path: str, x: Any) -> None:
    if core.is_node(x):
        raise ValueError(
            f"{path}: found a {type(x).__name__} node where an array was expected; materialize it first, or compose "
            "methods with jc.chain"
        )
    finite = jnp.isfinite(x).sum()
    if core.is_concrete(finite) and int(finite) != jnp.size(x):
        bad = jnp.size(x) - int(finite)
        raise ValueError(
            f"{path}: found {bad} NaN or infinite values, expected finite ones; mend them, or keep the leaf dense"
        )


def _like(treedef: Any, tree: PyTree) -> list[Any]:
    """The subtrees of ``tree`` that stand where ``treedef`` has leaves."""
    return treedef.flatten_up_to(tree)


def contexts_of(
    params: PyTree, leaves: list[tuple[str, Any]], step: Any, key: Any, stats: Any, grads: PyTree, previous: PyTree
) -> dict[str, Context]:
    """What each leaf's method is told, by path."""
    treedef = jax.tree.structure(params, is_leaf=core.is_node)
    none = [None] * len(leaves)
    grad_leaves = none if grads is None else _like(treedef, grads)
    previous_leaves = none if previous is None else _like(treedef, previous)
    return {
        path: Context(
            step=step,
            key=None if key is None else jax.random.fold_in(key, zlib.crc32(path.encode()) & 0x7FFFFFFF),
            stats=None if stats is None else stats.get(path),
            grad=grad,
            previous=node,
            path=path,
        )
        for (path, _), grad, node in zip(leaves, grad_leaves, previous_leaves, strict=True)
    }


def simulate(
    params: PyTree,
    plan: Plan,
    step: Any = 0,
    key: jax.Array | None = None,
    stats: Mapping[str, Any] | None = None,
) -> PyTree:
    """Dense parameters with the values that compression would give, and the gradients of the originals.

    The forward pass sees exactly ``materialize(compress(params, plan))``; the backward pass is the identity, so
    ``params`` can be trained while the network meets the compressed values (quantization-aware training; Jacob et
    al. 2018, arXiv:1712.05877).

    Args:
      params: a pytree of arrays.
      plan: from :func:`jcompress.plan`.
      step: as in :func:`compress`.
      key: as in :func:`compress`; also drawn from by nodes that sample.
      stats: as in :func:`compress`.

    Returns:
      A pytree like ``params``, of arrays.

    Example:
      >>> import jax, jax.numpy as jnp, jcompress as jc
      >>> params = {"w": jnp.array([[0.1, 1.0]])}
      >>> plan = jc.plan(params, [("w", jc.prune.Magnitude(sparsity=0.5))])
      >>> jax.grad(lambda p: jc.simulate(p, plan)["w"].sum())(params)["w"].tolist()
      [[1.0, 1.0]]
    """
    leaves, treedef = jax.tree.flatten(params, is_leaf=core.is_node)
    still = [(path, jax.lax.stop_gradient(x)) for path, x in rules.paths(params)]
    nodes = fit(still, plan, contexts_of(params, still, step, key, stats, None, None))
    values = core.materialize(nodes, key=key)
    return jax.tree.unflatten(
        treedef,
        [
            straight_through(w, values[path]) if path in values else w
            for (path, _), w in zip(still, leaves, strict=True)
        ],
    )
