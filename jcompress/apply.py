"""Putting a plan to work: once, on every forward pass, or after every optimizer step."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jcompress import core, rules
from jcompress.core import Context, PyTree
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
    nodes = _fit(leaves, plan, _contexts(params, leaves, step, key, stats, grads, previous))
    treedef = jax.tree.structure(params, is_leaf=core.is_node)
    return jax.tree.unflatten(treedef, [nodes[path] if path in nodes else _copy(x) for path, x in leaves])


def _copy(x: Any) -> Any:
    return jax.tree.map(jnp.copy, x) if core.is_node(x) else jnp.copy(x)


def _fit(leaves: list[tuple[str, Any]], plan: Plan, contexts: dict[str, Context]) -> dict[str, Any]:
    """The nodes of all leaves that the plan names."""
    _check_paths(leaves, plan)
    arrays = dict(leaves)
    nodes: dict[str, Any] = {}
    for unit in _units(plan):
        nodes |= _fit_unit(unit, plan, arrays, contexts)
    return nodes


def _fit_unit(unit: list[str], plan: Plan, arrays: dict[str, Any], contexts: dict[str, Context]) -> dict[str, Any]:
    """The nodes of leaves that are decided together."""
    for path in unit:
        _check_array(path, arrays[path])
    method = plan[unit[0]]
    assert method is not None
    return dict(zip(unit, core.fit(method, [arrays[p] for p in unit], [contexts[p] for p in unit]), strict=True))


def _units(plan: Plan) -> list[list[str]]:
    """The paths that are decided together: all of a rule where its method decides for all at once, else each alone."""
    units: dict[Any, list[str]] = {}
    for path, method in plan.items():
        if method is not None:
            units.setdefault((plan.groups[path], id(method)) if core.is_joint(method) else path, []).append(path)
    return list(units.values())


def _check_paths(leaves: list[tuple[str, Any]], plan: Plan) -> None:
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


def _contexts(
    params: PyTree, leaves: list[tuple[str, Any]], step: Any, key: Any, stats: Any, grads: PyTree, previous: PyTree
) -> dict[str, Context]:
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


@jax.custom_jvp
def straight_through(w: jax.Array, value: jax.Array) -> jax.Array:
    """``value`` forward, exactly; backward the identity in ``w`` (Bengio et al. 2013, arXiv:1308.3432)."""
    return value


@straight_through.defjvp
def _straight_through_jvp(primals: tuple, tangents: tuple) -> tuple:
    return straight_through(*primals), tangents[0]


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
    nodes = _fit(still, plan, _contexts(params, still, step, key, stats, None, None))
    values = core.materialize(nodes, key=key)
    return jax.tree.unflatten(
        treedef,
        [
            straight_through(w, values[path]) if path in values else w
            for (path, _), w in zip(still, leaves, strict=True)
        ],
    )


class ProjectState(NamedTuple):
    """State of :func:`project`: the steps taken, what the nodes hold fixed, and the key and inner state, if any."""

    steps: jax.Array
    held: PyTree
    key: jax.Array | None = None
    inner: PyTree = None


def project(
    plan: Plan,
    every: int = 1,
    *,
    inner: optax.GradientTransformation | None = None,
    key: jax.Array | None = None,
    stats: Mapping[str, Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """An optax transform, last in the chain, that keeps dense parameters on the compressed set.

    After each step the parameters are moved to the nearest point of the set that the held leaves (masks, codes,
    assignments) describe, and on steps 0, ``every``, ``2 * every``, ... the held leaves are fitted anew. A pruned
    weight is exactly 0.0 after any optimizer, momentum and weight decay included; a kept weight moves exactly as
    it would have moved. Formats whose projection does not cost linear time (low rank) are projected at refits only.

    Args:
      plan: from :func:`jcompress.plan`. Schedules are read at the number of steps taken.
      every: steps between refits.
      inner: the optimizer, to wrap it in place of being chained to it. Steps without a refit are a little cheaper then:
        a chained transform must have the new values of a leaf written out for a refit that may be due, a wrapped
        optimizer is asked again for its updates when one is. ``grads`` are then known without being passed.
      key: for methods that draw random numbers. It is the same at every refit; a method that should draw anew folds
        the step in.
      stats: ``{path: statistics}`` from calibration.

    Returns:
      A ``GradientTransformationExtraArgs``. ``update`` must be given ``params``, and takes ``grads=``, the raw
      gradients, for methods that grow by gradient.

    Raises:
      ValueError: if ``every`` is not positive, or ``update`` is called without ``params``.

    Example:
      >>> import jax.numpy as jnp, optax, jcompress as jc
      >>> params = {"w": jnp.array([[3.0, 0.1]])}
      >>> plan = jc.plan(params, [("w", jc.prune.Magnitude(sparsity=0.5))])
      >>> tx = optax.chain(optax.sgd(0.5), jc.project(plan))
      >>> updates, state = tx.update({"w": jnp.array([[1.0, 1.0]])}, tx.init(params), params)
      >>> optax.apply_updates(params, updates)["w"].tolist()
      [[2.5, 0.0]]

      The same, wrapped around the optimizer:

      >>> tx = jc.project(plan, inner=optax.sgd(0.5))
      >>> updates, state = tx.update({"w": jnp.array([[1.0, 1.0]])}, tx.init(params), params)
      >>> optax.apply_updates(params, updates)["w"].tolist()
      [[2.5, 0.0]]
    """
    if every < 1:
        raise ValueError(f"project: every={every} must be a positive number of steps")

    optimizer = None if inner is None else optax.with_extra_args_support(inner)

    def init(params: PyTree) -> ProjectState:
        grads = jax.tree.map(jnp.zeros_like, params) if _needs(plan, "grad") else None
        leaves, steps = rules.paths(params), jnp.zeros((), jnp.int32)
        nodes = _fit(leaves, plan, _contexts(params, leaves, steps, key, stats, grads, None))
        started = None if optimizer is None else optimizer.init(params)
        # A copy: a training step that donates its state must not delete the caller's key.
        return ProjectState(steps, core.split(nodes)[1], None if key is None else jnp.copy(key), started)

    def update(
        updates: PyTree, state: ProjectState, params: PyTree | None = None, *, grads: PyTree = None, **extra: Any
    ) -> tuple[PyTree, ProjectState]:
        if params is None:
            raise ValueError("project needs the parameters: call tx.update(grads, state, params)")
        leaves = rules.paths(params)
        _check_paths(leaves, plan)
        if optimizer is not None and grads is None:
            grads = updates
        contexts = _contexts(params, leaves, state.steps, state.key, stats, grads, None)
        if optimizer is None:
            change, held, after = *_chained(plan, every, state, params, updates, contexts), None
        else:
            change, held, after = _around(optimizer, plan, every, state, params, updates, contexts, extra)
        updates = jax.tree.unflatten(jax.tree.structure(updates), list(change.values()))
        return updates, ProjectState(optax.safe_increment(state.steps), held, state.key, after)

    return optax.GradientTransformationExtraArgs(init, update)


def _by_path(leaves: list[tuple[str, Any]], tree: PyTree) -> dict[str, Any]:
    return dict(zip([path for path, _ in leaves], jax.tree.leaves(tree), strict=True))


def _needs(plan: Plan, name: str) -> bool:
    return any(need.split(".")[0] == name for method in plan.values() for need in getattr(method, "needs", ()))


def _is_linear(node: Any) -> bool:
    if not core.is_node(node):
        return True
    fields = [getattr(node, f.name) for f in dataclasses.fields(node)]
    return node.linear and all(_is_linear(x) for x in jax.tree.leaves(fields, is_leaf=core.is_node))


def _chained(
    plan: Plan, every: int, state: ProjectState, params: PyTree, updates: PyTree, contexts: dict[str, Context]
) -> tuple[dict[str, jax.Array], dict[str, Any]]:
    """The updates onto the set, and what is held, given the updates of the optimizer."""
    leaves = rules.paths(params)
    arrays, change = dict(leaves), _by_path(leaves, updates)
    held: dict[str, Any] = {}
    due, nothing = state.steps % every == 0, _zero(state.steps)
    # What a conditional reads must be written out first. One for each unit, each behind the one before, so that the
    # new values of the whole model need not be in memory at once: of 5 million parameters these would be so large
    # that on a CPU every step would fetch its memory anew.
    for unit in _units(plan):
        change |= {path: _tied(change[path], nothing) for path in unit}
        new = {path: optax.apply_updates(arrays[path], change[path]) for path in unit}
        now, values, nothing = _refitted([unit], plan, due, state, partial(_given, new), nothing, contexts)
        held |= now
        change |= _onto(now, values, arrays, change)
    return change, held


def _given(new: dict[str, jax.Array], nothing: jax.Array) -> dict[str, jax.Array]:
    return new


def _around(
    optimizer: optax.GradientTransformationExtraArgs,
    plan: Plan,
    every: int,
    state: ProjectState,
    params: PyTree,
    grads: PyTree,
    contexts: dict[str, Context],
    extra: dict[str, Any],
) -> tuple[dict[str, jax.Array], dict[str, Any], PyTree]:
    """As :func:`_chained`, given the optimizer; and the optimizer's new state."""
    leaves = rules.paths(params)
    arrays = dict(leaves)
    held: dict[str, Any] = {}
    values: dict[str, jax.Array] = {}
    due, nothing = state.steps % every == 0, _zero(state.steps)

    @jax.jit  # traced once, for all conditionals
    def stepped(nothing: jax.Array) -> tuple[PyTree, PyTree]:
        return optimizer.update(jax.tree.map(lambda g: _tied(g, nothing), grads), state.inner, params, **extra)

    def moved(nothing: jax.Array) -> dict[str, jax.Array]:
        change = _by_path(leaves, stepped(nothing)[0])
        return {path: optax.apply_updates(x, change[path]) for path, x in leaves}

    for units in _batches(_units(plan), arrays):
        now, more, nothing = _refitted(units, plan, due, state, moved, nothing, contexts)
        held, values = held | now, values | more
    # Behind the conditionals, which read the state that the optimizer writes over: else it would be copied.
    updates, after = stepped(nothing)
    change = _by_path(leaves, updates)
    return change | _onto(held, values, arrays, change), held, after


def _batches(units: list[list[str]], arrays: dict[str, jax.Array]) -> list[list[list[str]]]:
    """The units, those of a conditional together: an eighth of the parameters, or a single larger unit."""
    sizes = [sum(arrays[path].size for path in unit) for unit in units]
    found: list[list[list[str]]] = []
    room = 0
    for unit, size in zip(units, sizes, strict=True):
        if size > room:
            found.append([])
            room = sum(sizes) // 8
        found[-1].append(unit)
        room -= size
    return found


def _zero(steps: jax.Array) -> jax.Array:
    """A zero that the compiler cannot know to be one. From a conditional, it puts what is added to it behind that."""
    return (steps < 0).astype(jnp.float32)


def _tied(x: jax.Array, nothing: jax.Array) -> jax.Array:
    return x + nothing.astype(x.dtype)


def _refitted(
    units: list[list[str]],
    plan: Plan,
    due: jax.Array,
    state: ProjectState,
    moved: Callable[[jax.Array], dict[str, jax.Array]],
    nothing: jax.Array,
    contexts: dict[str, Context],
) -> tuple[dict[str, Any], dict[str, jax.Array], jax.Array]:
    """What units of leaves hold after a step, the values of those whose projection is not linear, and a zero."""
    unit = [path for some in units for path in some]
    held = {path: state.held[path] for path in unit}
    linear = [path for path in unit if _is_linear(held[path])]

    def fitted(nothing: jax.Array) -> tuple[dict, dict, jax.Array]:
        new = moved(nothing)
        previous = {path: held[path].project(new[path]) for path in linear}
        known = {path: dataclasses.replace(contexts[path], previous=previous.get(path)) for path in unit}
        nodes: dict[str, Any] = {}
        for some in units:
            nodes |= _fit_unit(some, plan, new, known)
        values = {path: nodes[path].materialize() for path in unit if path not in linear}
        return core.split(nodes)[1], values, _zero(state.steps)

    def kept(nothing: jax.Array) -> tuple[dict, dict, jax.Array]:
        rest = [path for path in unit if path not in linear]
        new = moved(nothing) if rest else {}
        return held, {path: new[path] for path in rest}, _zero(state.steps)

    return jax.lax.cond(due, fitted, kept, nothing)


def _onto(held: dict[str, Any], values: dict[str, jax.Array], params: dict, change: dict) -> dict[str, jax.Array]:
    """The updates that lead onto the set."""
    found = {}
    for path in held:
        new = optax.apply_updates(params[path], change[path])
        value = values[path] if path in values else held[path].project(new).materialize()
        found[path] = _towards(value, new, params[path], change[path])
    return found


def _towards(value: jax.Array, new: jax.Array, old: jax.Array, change: jax.Array) -> jax.Array:
    """The update from ``old`` to ``value``; the old update wherever that leads there already."""
    return jnp.where(value == new, change, (value - old).astype(change.dtype))
