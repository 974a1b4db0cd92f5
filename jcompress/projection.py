"""Keeping dense parameters on the compressed set, after every optimizer step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jcompress import core, rules, transforms
from jcompress.apply import check_paths, check_plan, contexts_of, fit, fit_units
from jcompress.core import Context, PyTree
from jcompress.numeric.alike import each, room_among
from jcompress.numeric.surrogates import straight_through
from jcompress.rules import Plan

_NOBODY: Any = np.int32(-1)


class ProjectState(NamedTuple):
    """State of :func:`project`.

    Attributes:
      steps: the steps taken.
      held: ``{path: node}``: what the last refit fixed, trainable leaves left out; nodes whose projection does not cost
        linear time are whole.
      strayed: -1, or the number, in the order of their names, of the first held leaf that was found off the set; a
        number n found once, which the next step may take back, is -2 - n.
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
        return nearest(self.held, params)


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
    out, and a global threshold is that of the others; if all that it compresses is hidden, that is an error.

    Something behind it in the chain, which would move pruned weights again, is found out on steps 1, 2, 4, 8, ..., if
    the step after finds it too; the state remembers it, and :func:`jcompress.nodes` says so. Optimizers that keep two
    copies (schedule-free, lookahead) or move parameters by themselves go in front of it, and what they average is read
    by :func:`jcompress.nodes`.

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
        grads = jax.tree.map(jnp.zeros_like, params) if needs(plan, "grad") else None
        leaves, steps = rules.leaves(params), transforms.steps()
        nodes = fit(leaves, transforms.shown(plan, params), contexts_of(params, steps, key, stats, grads))
        started = None if optimizer is None else optimizer.init(params)
        return ProjectState(steps, fixed(nodes), jnp.asarray(_NOBODY), transforms.copied(key), started)

    def update(
        updates: PyTree, state: ProjectState, params: PyTree | None = None, *, grads: PyTree = None, **extra: Any
    ) -> tuple[PyTree, ProjectState]:
        transforms.need("project", params)
        leaves, here = rules.leaves(params), transforms.shown(plan, params)
        check_paths(leaves, here)
        if optimizer is not None and grads is None:
            grads = updates
        contexts = contexts_of(params, state.steps, state.key, stats, grads)
        step = _Step(here, every, state.steps, leaves, state.held, state.strayed, contexts)
        if optimizer is None:
            change, held, strayed, after = *_chained(step, params, updates), None
        else:
            change, held, strayed, after = _around(optimizer, step, state.inner, params, updates, extra)
        updates = rules.rebuild(updates, change, like=params)
        return updates, ProjectState(optax.safe_increment(state.steps), held, strayed, state.key, after)

    return optax.GradientTransformationExtraArgs(init, update)


def needs(plan: Plan, name: str) -> bool:
    """Whether a method of the plan needs this of its context."""
    return any(need.split(".")[0] == name for need in core.needs(*plan.values()))


def is_linear(node: Any) -> bool:
    """Whether the projection of a node, nested ones too, costs linear time."""
    return all(x.linear for x in _nested(node))


def _nested(node: Any) -> Iterator[Any]:
    """A node and those in it."""
    if core.is_node(node):
        yield node
        fields = [getattr(node, f.name) for f in dataclasses.fields(node)]
        yield from (y for x in jax.tree.leaves(fields, is_leaf=core.is_node) for y in _nested(x))


def _linked(nodes: dict[str, Any]) -> dict[str, Any]:
    """Nodes that have parts in common."""
    owners = [x.owner for node in nodes.values() for x in core.references(node)]
    return {p: x for p, x in nodes.items() if core.references(x) or any(owner.startswith(f"{p}/") for owner in owners)}


def fixed(nodes: dict[str, Any]) -> dict[str, Any]:
    """What is held of nodes between refits."""
    return {path: core.split(node)[1] if is_linear(node) else node for path, node in nodes.items()}


def nearest(nodes: Mapping[str, Any], arrays: Mapping[str, jax.Array]) -> dict[str, Any]:
    """The points of the sets that are nearest to arrays: the projections, or a node of the last refit as it is."""
    found = core.projected({path: node for path, node in nodes.items() if is_linear(node)}, arrays)
    return {path: found[path] if path in found else _nearer(node, arrays[path]) for path, node in nodes.items()}


def _nearer(node: Any, w: jax.Array) -> Any:
    """The nearer of two points of a set to which there is no cheap way: a projection, and the node as it is."""
    if core.references(node):
        return node  # what others own is theirs to change
    found = node.project(w)
    # What is held inside factors fits these factors alone: others, as good, may differ from them by a rotation.
    nearer = _distance(node, w) <= _distance(found, w)
    return jax.tree.map(lambda old, new: jnp.where(nearer, old, new), node, found)


def _distance(node: Any, w: jax.Array) -> jax.Array:
    return _squares(_single(node.materialize()) - _single(w))


def _squares(x: jax.Array) -> jax.Array:
    return jnp.square(jnp.abs(x)).sum()


def _single(x: jax.Array) -> jax.Array:
    return x.astype(jnp.complex64 if jnp.iscomplexobj(x) else jnp.float32)


def _is_off(node: Any, w: jax.Array, fresh: jax.Array, found: Any = None) -> jax.Array:
    """Whether an array is farther from the set than rounding makes it; ``fresh`` is True in the step after a refit.

    ``found`` is the nearest point, where it is known. Of what is fitted only nearly that cannot be told.
    """
    if not all(x.exact for x in _nested(node)):
        return jnp.zeros((), jnp.bool_)
    if found is None:
        found = node.project(w) if is_linear(node) else node
    coarsest = max(float(jnp.finfo(x.dtype).eps) for x in (w, *jax.tree.leaves(found)) if core.is_trainable(x))
    limit = max(1e-4, 4 * coarsest) ** 2 * _squares(_single(w))
    far = _distance(found, w) > limit
    # Between refits a projection that is not linear lets the parameters leave the set.
    return far if is_linear(node) else far & fresh


def _check_strayed(strayed: jax.Array, held: PyTree) -> None:
    if core.is_concrete(strayed) and (number := int(strayed)) >= 0:
        raise ValueError(
            f"{sorted(held)[number]}: the parameters left the compressed set after a step of jc.project, so nothing "
            "holds them there; let it be the last link, optax.chain(optimizer, jc.project(plan)), behind an optimizer "
            "that wraps others too, and change parameters by it alone"
        )


class _Step(NamedTuple):
    """What a step is done with: the parameters and what was held as they were before it, and what is due in it."""

    plan: Plan
    every: int
    steps: jax.Array
    arrays: dict[str, jax.Array]
    held: dict[str, Any]
    strayed: jax.Array
    contexts: dict[str, Context]

    @property
    def refits(self) -> jax.Array:
        """Whether what is held is fitted anew."""
        return transforms.is_due(self.steps, self.every)

    @property
    def looks(self) -> jax.Array:
        """Whether parameters are looked at that left the set since the last step: steps 1, 2, 4, 8, ... and the next.

        So a transform behind this one is found out at next to no cost, under a ramp that starts at nothing too.
        """
        return (self.steps > 0) & (_is_power(self.steps) | self.looks_again) & (self.strayed < 0)

    @property
    def looks_again(self) -> jax.Array:
        """Whether it is looked at a second time: what moves parameters every few steps only is no fault."""
        return (self.steps > 2) & _is_power(self.steps - 1)

    def judged(self, number: jax.Array) -> jax.Array:
        """What is known of strayed parameters after a step that found this one, or -1.

        An optimizer around, such as lookahead, sets parameters anew every few steps, the first time after two or more.
        """
        seen = (self.steps == 1) | (self.strayed < -1)
        found = jnp.where(seen | (number < 0), number, -2 - number)
        return jnp.where(self.looks, found, self.strayed)

    def still(self) -> _Step:
        """The same without derivatives."""
        return _Step(self.plan, self.every, *jax.lax.stop_gradient(self[2:]))

    def batches(self) -> list[list[list[str]]]:
        """The units of leaves, those that are refitted together: as much as may be in memory twice, or a larger unit.

        Units whose projections are all linear stand apart from others, leaves that are alike next to one another.
        """
        order: dict[Any, list[list[str]]] = {}
        for unit in self.plan.units():
            first = self.arrays[unit[0]]
            order.setdefault((self.is_linear(unit), self.plan.kind(unit[0]), first.shape, first.dtype), []).append(unit)
        room = room_among(x.size for x in self.arrays.values())
        found: list[list[list[str]]] = []
        left, last = 0, None
        for (linear, *_), units in order.items():
            for unit in units:
                size = sum(self.arrays[path].size for path in unit)
                if size > left or linear is not last:
                    found.append([])
                    left, last = room, linear
                found[-1].append(unit)
                left -= size
        return found

    def is_linear(self, unit: list[str]) -> bool:
        """Whether the projections of all leaves of a unit cost linear time."""
        return all(is_linear(self.held[path]) for path in unit)

    def found_off(self, strayed: jax.Array, paths: list[str]) -> jax.Array:
        """The least number of a leaf that is off the set, of those that are found now and the one found before."""
        fresh, names = transforms.is_due(self.steps - 1, self.every), sorted(self.held)
        linked = _linked({path: self.held[path] for path in paths})
        linear = {path: node for path, node in linked.items() if is_linear(node)}
        points = core.untie(linked | core.projected(linear, self.arrays))
        alone = [path for path in paths if path not in linked]
        items: list[Any] = [(self.held[path], self.arrays[path]) for path in alone]
        off = each(lambda i, item: _is_off(item[0], item[1], fresh), items, list(map(self.plan.kind, alone)), long=1)
        off += [_is_off(node, self.arrays[path], fresh, points[path]) for path, node in linked.items()]
        paths = [*alone, *linked]
        # As unsigned integers, of which -1 is the largest.
        numbers = jnp.where(jnp.stack(off), np.array([names.index(path) for path in paths], np.uint32), ~np.uint32(0))
        return jnp.minimum(strayed.astype(jnp.uint32), numbers.min()).astype(jnp.int32)

    def anew(self, units: list[list[str]], new: dict[str, tuple[jax.Array, ...]]) -> dict[str, Any]:
        """The nodes of units of leaves, fitted to new values: arrays, or the old ones and their updates."""

        def prepare(w: tuple[jax.Array, ...], context: Context) -> tuple[jax.Array, Context]:
            array, last = optax.apply_updates(*w) if len(w) > 1 else w[0], context.previous
            is_whole = is_linear(last) and not core.references(last)
            return array, dataclasses.replace(context, previous=last.project(array) if is_whole else None)

        known = {path: dataclasses.replace(self.contexts[path], previous=self.held[path]) for path in _paths(units)}
        return fit_units(units, self.plan, new, known, prepare)


def _is_power(steps: jax.Array) -> jax.Array:
    """Whether a positive number is a power of two."""
    return steps & (steps - 1) == 0


class _Carry(NamedTuple):
    """What goes from one refit to the next: which parameter was found off the set, and a zero that orders them.

    So the updates of the whole model need not be in memory at once: of 5 million parameters these would be so large
    that on a CPU every step would fetch its memory anew.
    """

    strayed: jax.Array
    nothing: jax.Array

    @classmethod
    def of(cls, strayed: jax.Array, steps: jax.Array) -> _Carry:
        """With a zero that the compiler cannot know to be one: what it is added to comes behind what gave it."""
        return cls(strayed, (steps < 0).astype(jnp.float32))

    def behind(self, x: jax.Array) -> jax.Array:
        """The array, not before this is known."""
        return x + self.nothing.astype(x.dtype)


def _paths(units: list[list[str]]) -> list[str]:
    return [path for unit in units for path in unit]


def _chained(step: _Step, params: PyTree, updates: PyTree) -> tuple[dict[str, jax.Array], dict[str, Any], jax.Array]:
    """The updates onto the set, what is held, and what strayed, given the updates of the optimizer."""
    change = rules.beside(params, updates)
    held: dict[str, Any] = {}
    values: dict[str, jax.Array] = {}
    carry = _Carry.of(_NOBODY, step.steps)
    for units in step.batches():
        change |= {path: carry.behind(change[path]) for path in _paths(units)}
        if step.is_linear(_paths(units)):
            now, moved, carry = _looped(units, step, change, carry)
            change |= moved
        else:
            new = {path: optax.apply_updates(step.arrays[path], change[path]) for path in _paths(units)}
            now, more, carry = _refitted(units, step, partial(_given, new), carry)
            values |= more
        held |= now
        change |= _onto(now, values, step.arrays, change)
    return change, held, step.judged(carry.strayed)


def _given(new: dict[str, jax.Array], carry: _Carry) -> dict[str, jax.Array]:
    return new


def _looped(
    units: list[list[str]], step: _Step, change: dict[str, jax.Array], carry: _Carry
) -> tuple[dict[str, Any], dict[str, jax.Array], _Carry]:
    """What leaves of linear projections hold after a step, and their updates, by a loop of no turn or one.

    The result of a loop stands where its operand stood: on steps without a turn the updates are written and read once.
    A conditional would have the new values written out beside them.
    """
    # What is held has no derivative, and a loop none in reverse mode: only the updates pass theirs by.
    still, carry, paths = step.still(), jax.lax.stop_gradient(carry), _paths(units)
    held, operand = {path: still.held[path] for path in paths}, {path: change[path] for path in paths}

    def turn(loop: tuple) -> tuple:
        _, held, moved, carry = loop
        now = still._replace(held=still.held | held)
        strayed = jax.lax.cond(still.looks, lambda: now.found_off(carry.strayed, paths), lambda: carry.strayed)

        def fitted() -> dict[str, Any]:
            return fixed(now.anew(units, {path: (still.arrays[path], moved[path]) for path in paths}))

        held = jax.lax.cond(still.refits, fitted, lambda: held)
        # Held back, or XLA would take the updates from before the loop, and compute them again after it.
        return jnp.array(False), held, jax.lax.optimization_barrier(moved), _Carry.of(strayed, still.steps)

    due = still.refits | still.looks
    loop = due, held, jax.lax.stop_gradient(operand), carry
    _, held, moved, carry = jax.lax.while_loop(lambda loop: loop[0], turn, loop)
    return held, {path: straight_through(change[path], moved[path]) for path in paths}, carry


def _around(
    optimizer: optax.GradientTransformationExtraArgs,
    step: _Step,
    inner: PyTree,
    params: PyTree,
    grads: PyTree,
    extra: dict[str, Any],
) -> tuple[dict[str, jax.Array], dict[str, Any], jax.Array, PyTree]:
    """As :func:`_chained`, given the optimizer and its state; and the optimizer's new state."""
    held: dict[str, Any] = {}
    values: dict[str, jax.Array] = {}
    carry = _Carry.of(_NOBODY, step.steps)

    @jax.jit  # traced once, for all conditionals
    def stepped(carry: _Carry) -> tuple[PyTree, PyTree]:
        return optimizer.update(jax.tree.map(carry.behind, grads), inner, params, **extra)

    def moved(carry: _Carry) -> dict[str, jax.Array]:
        change = rules.beside(params, stepped(carry)[0])
        return {path: optax.apply_updates(x, change[path]) for path, x in step.arrays.items()}

    for units in step.batches():
        refit = _held_in_turn if step.is_linear(_paths(units)) else _refitted
        now, more, carry = refit(units, step, moved, carry)
        held, values = held | now, values | more
    # Behind the conditionals, which read the state that the optimizer writes over: else it would be copied.
    updates, after = stepped(carry)
    change = rules.beside(params, updates)
    return change | _onto(held, values, step.arrays, change), held, step.judged(carry.strayed), after


_Refit = tuple[dict[str, Any], dict[str, jax.Array], _Carry]
_Moved = Callable[[_Carry], dict[str, jax.Array]]


def _held_in_turn(units: list[list[str]], step: _Step, moved: _Moved, carry: _Carry) -> _Refit:
    """As :func:`_refitted`, of linear projections: by a loop of no turn or one, so that what is held is not copied."""

    def turn(loop: tuple) -> tuple:
        _, held, carry = loop
        found, _, carry = _due(units, step._replace(held=step.held | held), moved, carry)
        return jnp.array(False), found, carry

    held = {path: step.held[path] for path in _paths(units)}
    _, held, carry = jax.lax.while_loop(lambda loop: loop[0], turn, (step.refits | step.looks, held, carry))
    return held, {}, carry


def _refitted(units: list[list[str]], step: _Step, moved: _Moved, carry: _Carry) -> _Refit:
    """What units of leaves hold after a step, and the values of those whose projection is not linear."""

    def ordinary(carry: _Carry) -> _Refit:
        return *_kept(units, step, moved, carry), _Carry.of(carry.strayed, step.steps)

    return jax.lax.cond(step.refits | step.looks, partial(_due, units, step, moved), ordinary, carry)


def _due(units: list[list[str]], step: _Step, moved: _Moved, carry: _Carry) -> _Refit:
    """The same of a step on which a refit or a look is due."""
    paths, still = _paths(units), step.still()

    def fitted(carry: _Carry) -> tuple[dict, dict]:
        nodes = step.anew(units, {path: (x,) for path, x in moved(carry).items()})
        rest = [path for path in paths if not is_linear(step.held[path])]
        dense = core.materialize(nodes) if rest else {}
        return fixed(nodes), {path: dense[path] for path in rest}

    strayed = jax.lax.cond(step.looks, lambda: still.found_off(carry.strayed, paths), lambda: carry.strayed)
    found = jax.lax.cond(step.refits, fitted, partial(_kept, units, step, moved), carry)
    return *found, _Carry.of(strayed, step.steps)


def _kept(units: list[list[str]], step: _Step, moved: _Moved, carry: _Carry) -> tuple[dict, dict]:
    """The same of a step without a refit."""
    held = {path: step.held[path] for path in _paths(units)}
    rest = [path for path, node in held.items() if not is_linear(node)]
    new = moved(carry) if rest else {}
    return held, {path: new[path] for path in rest}


def _onto(held: dict[str, Any], values: dict[str, jax.Array], params: dict, change: dict) -> dict[str, jax.Array]:
    """The updates that lead onto the set."""
    new = {path: optax.apply_updates(params[path], change[path]) for path in held}
    points = core.projected({path: node for path, node in held.items() if path not in values}, new)
    found = core.materialize(points) | values
    return {path: transforms.towards(found[path], new[path], params[path], change[path]) for path in held}
