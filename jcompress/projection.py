"""Keeping dense parameters on the compressed set, after every optimizer step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jcompress import core, rules, transforms
from jcompress.apply import check_paths, check_plan, contexts_of, fit, fit_unit
from jcompress.core import Context, PyTree
from jcompress.numeric.surrogates import straight_through
from jcompress.rules import Plan


class ProjectState(NamedTuple):
    """State of :func:`project`.

    Attributes:
      steps: the steps taken.
      held: ``{path: node}``: what the last refit fixed, trainable leaves left out; nodes whose projection does not cost
        linear time are whole.
      strayed: -1, or the number, in the order of their names, of the first held leaf that was found off the set.
      key: the PRNG key, if any.
      inner: the state of the wrapped optimizer, if any.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> params = {"w": jnp.array([1.0, 2.0])}
      >>> jc.project(jc.plan(params, [("w", jc.prune.Magnitude(sparsity=0.5))])).init(params).held["w"].mask.tolist()
      [False, True]
    """

    steps: jax.Array
    held: PyTree
    strayed: jax.Array
    key: jax.Array | None = None
    inner: PyTree = None

    def nodes(self, params: Mapping[str, jax.Array], /) -> dict[str, Any]:
        """What is held, its trainable leaves fitted to the parameters.

        Raises:
          ValueError: if the parameters were found off the set during training.
        """
        _check_strayed(self.strayed, self.held)
        return {path: _nearest(node, params[path]) for path, node in self.held.items()}


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

    Inside ``optax.masked`` or ``partition`` the plan may be that of the whole tree: leaves that are not shown are left
    out, and a global threshold is that of the others. Something behind it in the chain, which would move pruned weights
    again, is found out on steps 1, 2, 4, 8, ...; the state remembers it, and :func:`jcompress.nodes` says so.

    Args:
      plan: from :func:`jcompress.plan`. Schedules are read at the number of steps taken.
      every: steps between refits.
      inner: the optimizer, to wrap it in place of being chained to it. Steps without a refit are a little cheaper then:
        a chained transform must have the updates of a leaf written out for a refit that may be due, a wrapped
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
      >>> trained = optax.apply_updates(params, updates)
      >>> trained["w"].tolist()
      [[2.5, 0.0]]
      >>> size = jc.save("weights.jc", jc.nodes(trained, state))

      The same, wrapped around the optimizer:

      >>> tx = jc.project(plan, inner=optax.sgd(0.5))
      >>> updates, state = tx.update({"w": jnp.array([[1.0, 1.0]])}, tx.init(params), params)
      >>> optax.apply_updates(params, updates)["w"].tolist()
      [[2.5, 0.0]]
    """
    check_plan("project", plan)
    transforms.check_every("project", every)
    optimizer = None if inner is None else optax.with_extra_args_support(inner)

    def init(params: PyTree) -> ProjectState:
        grads = jax.tree.map(jnp.zeros_like, params) if _needs(plan, "grad") else None
        leaves, steps = rules.leaves(params), transforms.steps()
        nodes = fit(leaves, transforms.shown(plan, params), contexts_of(params, steps, key, stats, grads))
        started = None if optimizer is None else optimizer.init(params)
        return ProjectState(steps, _fixed(nodes), jnp.full((), -1, jnp.int32), transforms.copied(key), started)

    def update(
        updates: PyTree, state: ProjectState, params: PyTree | None = None, *, grads: PyTree = None, **extra: Any
    ) -> tuple[PyTree, ProjectState]:
        transforms.need("project", params)
        leaves, here = rules.leaves(params), transforms.shown(plan, params)
        check_paths(leaves, here)
        if optimizer is not None and grads is None:
            grads = updates
        contexts = contexts_of(params, state.steps, state.key, stats, grads)
        state = state._replace(strayed=_strayed(state, leaves, every))
        if optimizer is None:
            change, held, after = *_chained(here, every, state, params, updates, contexts), None
        else:
            change, held, after = _around(optimizer, here, every, state, params, updates, contexts, extra)
        updates = rules.rebuild(updates, change, like=params)
        return updates, ProjectState(optax.safe_increment(state.steps), held, state.strayed, state.key, after)

    return optax.GradientTransformationExtraArgs(init, update)


def _needs(plan: Plan, name: str) -> bool:
    return any(need.split(".")[0] == name for need in core.needs(*plan.values()))


def _is_linear(node: Any) -> bool:
    if not core.is_node(node):
        return True
    fields = [getattr(node, f.name) for f in dataclasses.fields(node)]
    return node.linear and all(_is_linear(x) for x in jax.tree.leaves(fields, is_leaf=core.is_node))


def _fixed(nodes: dict[str, Any]) -> dict[str, Any]:
    """What is held of nodes between refits."""
    return {path: core.split(node)[1] if _is_linear(node) else node for path, node in nodes.items()}


def _nearest(node: Any, w: jax.Array) -> Any:
    """The point of the set that is nearest to an array: the projection, or the node of the last refit as it is."""
    found = node.project(w)
    if _is_linear(node):
        return found
    # What is held inside factors fits these factors alone: others, as good, may differ from them by a rotation.
    nearer = _distance(node, w) <= _distance(found, w)
    return jax.tree.map(lambda old, new: jnp.where(nearer, old, new), node, found)


def _distance(node: Any, w: jax.Array) -> jax.Array:
    return _squares(_single(node.materialize()) - _single(w))


def _squares(x: jax.Array) -> jax.Array:
    return jnp.square(jnp.abs(x)).sum()


def _single(x: jax.Array) -> jax.Array:
    return x.astype(jnp.complex64 if jnp.iscomplexobj(x) else jnp.float32)


def _strayed(state: ProjectState, params: dict[str, jax.Array], every: int) -> jax.Array:
    """Whether the parameters left the set since the last step, and which: looked at on steps 1, 2, 4, 8, ...

    So a transform behind this one is found out at next to no cost, under a ramp that starts at nothing too.
    """
    held = dict(sorted(state.held.items()))
    look = (state.steps > 0) & (state.steps & (state.steps - 1) == 0) & (state.strayed < 0)

    def first() -> jax.Array:
        fresh = transforms.is_due(state.steps - 1, every)
        off = jnp.stack([_is_off(node, params[path], fresh) for path, node in held.items()])
        return jnp.where(off.any(), jnp.argmax(off), -1).astype(jnp.int32)

    if not held:
        return state.strayed
    held, params = jax.lax.stop_gradient((held, params))
    return jax.lax.cond(look, first, lambda: state.strayed)


def _is_off(node: Any, w: jax.Array, fresh: jax.Array) -> jax.Array:
    """Whether an array is farther from the set than rounding makes it; ``fresh`` is True in the step after a refit."""
    found = node.project(w) if _is_linear(node) else node
    coarsest = max(float(jnp.finfo(x.dtype).eps) for x in (w, *jax.tree.leaves(found)) if core.is_trainable(x))
    limit = max(1e-4, 4 * coarsest) ** 2 * _squares(_single(w))
    far = _distance(found, w) > limit
    # Between refits a projection that is not linear lets the parameters leave the set.
    return far if _is_linear(node) else far & fresh


def _check_strayed(strayed: jax.Array, held: PyTree) -> None:
    if core.is_concrete(strayed) and (number := int(strayed)) >= 0:
        raise ValueError(
            f"{sorted(held)[number]}: the parameters left the compressed set after a step of jc.project, so nothing "
            "holds them there; let it be the last link, optax.chain(optimizer, jc.project(plan)), and change "
            "parameters by it alone"
        )


def _chained(
    plan: Plan, every: int, state: ProjectState, params: PyTree, updates: PyTree, contexts: dict[str, Context]
) -> tuple[dict[str, jax.Array], dict[str, Any]]:
    """The updates onto the set, and what is held, given the updates of the optimizer."""
    leaves = rules.paths(params)
    arrays, change = dict(leaves), rules.beside(params, updates)
    held: dict[str, Any] = {}
    values: dict[str, jax.Array] = {}
    # Behind the look at the parameters, which would be copied for it if they were written over meanwhile.
    due, nothing = transforms.is_due(state.steps, every), _zero(state.strayed + 1)
    # One unit behind the other, so that the updates of the whole model need not be in memory at once: of 5 million
    # parameters these would be so large that on a CPU every step would fetch its memory anew.
    for unit in plan.units():
        change |= {path: _tied(change[path], nothing) for path in unit}
        if all(_is_linear(state.held[path]) for path in unit):
            now, moved, nothing = _looped(unit, plan, due, state, arrays, change, nothing, contexts)
            change |= moved
        else:
            new = {path: optax.apply_updates(arrays[path], change[path]) for path in unit}
            now, more, nothing = _refitted([unit], plan, due, state, partial(_given, new), nothing, contexts)
            values |= more
        held |= now
        change |= _onto(now, values, arrays, change)
    return change, held


def _given(new: dict[str, jax.Array], nothing: jax.Array) -> dict[str, jax.Array]:
    return new


def _looped(
    unit: list[str],
    plan: Plan,
    due: jax.Array,
    state: ProjectState,
    arrays: dict[str, jax.Array],
    change: dict[str, jax.Array],
    nothing: jax.Array,
    contexts: dict[str, Context],
) -> tuple[dict[str, Any], dict[str, jax.Array], jax.Array]:
    """What leaves of linear projections hold after a step, their updates, and a zero, by a loop of no turn or one.

    The result of a loop stands where its operand stood: on steps without a turn the updates are written and read once.
    A conditional would have the new values written out beside them.
    """
    # What is held has no derivative, and a loop none in reverse mode: only the updates pass theirs by.
    arrays, contexts, held, operand = jax.lax.stop_gradient(
        ({path: arrays[path] for path in unit}, {path: contexts[path] for path in unit},
         {path: state.held[path] for path in unit}, {path: change[path] for path in unit})
    )  # fmt: skip

    def turn(carry: tuple) -> tuple:
        _, held, moved, _ = carry
        new = {path: optax.apply_updates(arrays[path], moved[path]) for path in unit}
        nodes, zero = _anew([unit], plan, held, new, contexts), _zero(state.steps)
        # Touched, or XLA would take the updates from before the loop, and compute them again after it.
        return jnp.zeros_like(due), _fixed(nodes), {path: _tied(x, zero) for path, x in moved.items()}, zero

    _, held, moved, zero = jax.lax.while_loop(lambda carry: carry[0], turn, (due, held, operand, nothing))
    return held, {path: straight_through(change[path], moved[path]) for path in unit}, zero


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
    # Behind the look at the parameters, which would be copied for it if they were written over meanwhile.
    due, nothing = transforms.is_due(state.steps, every), _zero(state.strayed + 1)

    @jax.jit  # traced once, for all conditionals
    def stepped(nothing: jax.Array) -> tuple[PyTree, PyTree]:
        return optimizer.update(jax.tree.map(lambda g: _tied(g, nothing), grads), state.inner, params, **extra)

    def moved(nothing: jax.Array) -> dict[str, jax.Array]:
        change = rules.beside(params, stepped(nothing)[0])
        return {path: optax.apply_updates(x, change[path]) for path, x in leaves}

    for units in _batches(plan.units(), arrays):
        now, more, nothing = _refitted(units, plan, due, state, moved, nothing, contexts)
        held, values = held | now, values | more
    # Behind the conditionals, which read the state that the optimizer writes over: else it would be copied.
    updates, after = stepped(nothing)
    change = rules.beside(params, updates)
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
    """A zero that the compiler cannot know to be one: what it is added to comes behind the loop that gave it."""
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
    rest = [path for path in unit if not _is_linear(held[path])]

    def fitted(nothing: jax.Array) -> tuple[dict, dict, jax.Array]:
        nodes = _anew(units, plan, held, moved(nothing), contexts)
        values = {path: nodes[path].materialize() for path in rest}
        return _fixed(nodes), values, _zero(state.steps)

    def kept(nothing: jax.Array) -> tuple[dict, dict, jax.Array]:
        new = moved(nothing) if rest else {}
        return held, {path: new[path] for path in rest}, _zero(state.steps)

    return jax.lax.cond(due, fitted, kept, nothing)


def _anew(
    units: list[list[str]], plan: Plan, held: dict[str, Any], new: dict[str, jax.Array], contexts: dict[str, Context]
) -> dict[str, Any]:
    """The nodes of units of leaves, fitted to new values."""
    previous = {path: node.project(new[path]) for path, node in held.items() if _is_linear(node)}
    known = {path: dataclasses.replace(contexts[path], previous=previous.get(path)) for path in held}
    nodes: dict[str, Any] = {}
    for unit in units:
        nodes |= fit_unit(unit, plan, new, known)
    return nodes


def _onto(held: dict[str, Any], values: dict[str, jax.Array], params: dict, change: dict) -> dict[str, jax.Array]:
    """The updates that lead onto the set."""
    found = {}
    for path in held:
        new = optax.apply_updates(params[path], change[path])
        value = values[path] if path in values else held[path].project(new).materialize()
        found[path] = transforms.towards(value, new, params[path], change[path])
    return found
