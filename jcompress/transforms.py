"""What all optax transforms of the library share, and the verb that reads their states: :func:`nodes`.

They have one interface: the optimizer first, where one is wrapped, then what is done (a plan, masks, groups, a rule, a
penalty), then ``every`` and ``key``, then options. What a transform does every so often it does on steps 0, ``every``,
``2 * every``, ... of its own count. A state says by a method ``nodes(params)`` what it holds.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax

from jcompress import core, rules
from jcompress.core import PyTree
from jcompress.formats import Masked
from jcompress.rules import Plan


@runtime_checkable
class Holder(Protocol):
    """A state of an optax transform that knows which parameters it holds compressed: a ``NamedTuple`` with a method."""

    def nodes(self, params: Mapping[str, jax.Array], /) -> dict[str, Any]:
        """``{path: node}`` of what is held, for the parameters by their paths."""
        ...


def nodes(params: PyTree, state: PyTree) -> PyTree:
    """The tree of nodes that an optimizer's state holds: from training to a file.

    Finds the states of all transforms of the library, wherever they stand in a state: in ``optax.chain``, ``masked``,
    ``partition``, ``inject_hyperparams``, ``MultiSteps``, ``apply_if_finite``, or in one another. What is held, masks,
    codes and assignments, is as the last refit left it; what trains is fitted to the parameters. Parameters that lie
    on the set, as they do after each step, keep their values: those under a mask exactly, others to rounding. Others,
    such as a moving average of the parameters, are moved to the nearest point of the set: their average has the zeros
    of the parameters. Factors of low rank, which the parameters leave between refits, are those of the last refit or,
    if they are nearer, new ones of the same rank. The two copies of ``optax.lookahead`` get what is held of one inside.

    Args:
      params: a pytree of arrays, those that the transform was given, or others of their shapes.
      state: the optimizer's state, or a part of it.

    Returns:
      A tree like ``params`` with nodes where something is held, and copies of the arrays elsewhere; ready for
      :func:`jcompress.save`.

    Raises:
      ValueError: if no state of the library is found, two of them hold one leaf, a leaf that is held is not among the
        parameters, or, outside ``jit``, something behind :func:`jcompress.project` in the chain moved the parameters
        off the set, so that nothing was held in training. The message names the path and the fix.

    Example:
      >>> import jax, jax.numpy as jnp, optax, jcompress as jc
      >>> params = {"w": jnp.array([[3.0, 0.1], [0.2, 4.0]]), "bias": jnp.zeros(2)}
      >>> ramp = optax.linear_schedule(0.0, 0.5, transition_steps=3)
      >>> tx = optax.chain(optax.adam(0.1), jc.project(jc.plan(params, [("w", jc.prune.Magnitude(sparsity=ramp))])))
      >>> state = tx.init(params)
      >>> for _ in range(5):
      ...     updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> small = jc.nodes(params, state)
      >>> small["w"], jc.nbits(small["w"])
      (Masked(values=float32[2,2], mask=bool[2,2]), 66)
      >>> bool((jc.materialize(small)["w"] == params["w"]).all())
      True
      >>> size = jc.save("weights.jc", small)
    """
    if isinstance(params, optax.LookaheadParams):
        with contextlib.suppress(_NotThereError):
            return _nodes(params, state)
        return type(params)(nodes(params.fast, state), nodes(params.slow, state))
    return _nodes(params, state)


def _nodes(params: PyTree, state: PyTree) -> PyTree:
    leaves = rules.leaves(params)
    found: dict[str, tuple[str, Any]] = {}
    states = list(holders(_unboxed(state)))
    if not states:
        raise ValueError(
            f"nodes: found no transform of jcompress in a state of type {type(state).__name__}; expected the state of "
            "an optimizer with jc.project or its kin: jc.nodes(params, opt_state)"
        )
    for holder in states:
        name = type(holder).__name__
        for path, node in holder.nodes(_Named(leaves, name)).items():
            if path in found:
                raise ValueError(
                    f"{path}: found in a {found[path][0]} and in a {name}, expected one; give the part of the state "
                    "that decides, such as jc.nodes(params, state[1]), or put both methods into one plan with jc.chain"
                )
            found[path] = name, node
    return rules.rebuild(params, {path: _copied(found[path][1] if path in found else x) for path, x in leaves.items()})


class _NotThereError(ValueError):
    """The parameters lack what a state holds."""


class _Named(dict):
    """Parameters by path, for one state: a path that is missing is an error with the fix."""

    def __init__(self, leaves: Mapping[str, Any], holder: str) -> None:
        super().__init__(leaves)
        self.holder = holder

    def __missing__(self, path: str) -> Any:
        raise _NotThereError(
            f"{path}: held in a {self.holder}, but the parameters do not have it; "
            f"{rules.closest(path, self)}. Give the tree that the optimizer's init was given"
        )


def _copied(x: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.copy(leaf) if isinstance(leaf, jax.Array) else leaf, x)


def _unboxed(state: PyTree) -> PyTree:
    """The state with plain arrays where Flax NNX keeps variables."""
    return jax.tree.map(
        lambda x: jax.tree.leaves(x)[0] if rules.is_variable(x) else x, state, is_leaf=rules.is_variable
    )


def holders(state: PyTree) -> Iterator[Holder]:
    """The states of the library's transforms in a state, the outer ones first."""
    if _holds(state):
        yield state
    for x in jax.tree.leaves(state, is_leaf=lambda x: x is not state and _holds(x)):
        if x is not state and _holds(x):
            yield from holders(x)


def _holds(x: Any) -> bool:
    return isinstance(x, tuple) and callable(getattr(type(x), "nodes", None))


def masked(params: Mapping[str, jax.Array], masks: Mapping[str, jax.Array]) -> dict[str, Masked]:
    """The parameters under masks, exactly 0.0 where these are False."""
    return {
        path: Masked(jnp.where(mask, params[path], 0).astype(params[path].dtype), mask) for path, mask in masks.items()
    }


def by_zeros(params: Mapping[str, jax.Array], paths: Iterable[str]) -> dict[str, Masked]:
    """Some parameters under masks of what is not zero in them."""
    return {path: Masked(params[path], params[path] != 0) for path in paths}


class HoldsNothing(NamedTuple):
    """The state of a transform that has none."""

    def nodes(self, params: Mapping[str, jax.Array], /) -> dict[str, Any]:
        """Nothing."""
        return {}


class ZerosState(NamedTuple):
    """The steps taken, and the paths of the parameters that the transform may set to zero."""

    steps: jax.Array
    paths: dict[str, None]

    def nodes(self, params: Mapping[str, jax.Array], /) -> dict[str, Masked]:
        """Masks of what is not zero in the parameters."""
        return by_zeros(params, self.paths)


def steps() -> jax.Array:
    """The count that a state starts with."""
    return jnp.zeros((), jnp.int32)


def check_every(name: str, every: Any) -> None:
    """Raise unless ``every`` is a positive number of steps, as far as is known now."""
    if core.is_concrete(every) and (every < 1 or every != int(every)):
        raise ValueError(f"{name}: every={every} must be a positive number of steps")


def is_due(steps: jax.Array, every: Any) -> jax.Array:
    """Whether what happens every so often happens now: on steps 0, ``every``, ``2 * every``, ..."""
    return steps % every == 0


def need(name: str, params: PyTree) -> None:
    """Raise if ``update`` was called without parameters."""
    if params is None:
        raise ValueError(f"{name} needs the parameters: call tx.update(grads, state, params)")


def copied(key: Any) -> Any:
    """A key for a state: a training step that donates its state must not delete the caller's."""
    return None if key is None else jnp.copy(key)


def is_hidden(path: str, params: PyTree) -> bool:
    """Whether ``optax.masked`` or ``partition`` keeps a leaf from this transform."""
    return _lies_in(path, _hidden(params))


def _hidden(params: PyTree) -> set[str]:
    def stop(x: Any) -> bool:
        return isinstance(x, optax.MaskedNode)

    return {path for path, x in rules.paths(params, is_leaf=stop) if stop(x)}


def _lies_in(path: str, places: set[str]) -> bool:
    return path in places or any(path[:i] in places for i, c in enumerate(path) if c == "/")


def shown(plan: Plan, params: PyTree) -> Plan:
    """The plan without the leaves that ``optax.masked`` or ``partition`` keeps from this transform.

    Raises:
      ValueError: if these are all that it compresses.
    """
    hidden = _hidden(params)
    if not hidden:
        return plan
    kept = {path: method for path, method in plan.items() if not _lies_in(path, hidden)}
    named = [path for path, method in plan.items() if method is not None]
    if named and not any(kept.values()):
        seen = [path for path, _ in rules.paths(params)]
        raise ValueError(
            f"{named[0]}: optax.masked or optax.partition hides it from this transform, and all else that the plan "
            f"compresses; what it is shown is {seen[:3]}. Put the transform into the branch of these leaves, or plan "
            "for those of this branch"
        )
    shapes = {path: shape for path, shape in plan.shapes.items() if path in kept}
    return Plan(kept, {path: plan.groups[path] for path in kept}, shapes, plan.notes, plan.layouts, plan.shardings)


def onto(params: PyTree, updates: PyTree, values: Mapping[str, jax.Array]) -> PyTree:
    """The updates, those at some paths replaced by what leads from the parameters to new values."""
    old, change = rules.leaves(params), rules.beside(params, updates)
    moved = {
        path: towards(value, optax.apply_updates(old[path], change[path]), old[path], change[path])
        for path, value in values.items()
    }
    return rules.rebuild(updates, moved, like=params)


def towards(value: jax.Array, new: jax.Array, old: jax.Array, change: jax.Array) -> jax.Array:
    """The update from ``old`` to ``value``; the old update, to the last bit, wherever that leads there already.

    In the update's dtype, or in that of the parameter where that is wider: so a value of zero is reached exactly.
    """
    dtype = jnp.promote_types(change.dtype, old.dtype)
    return jnp.where(value == new, change.astype(dtype), value.astype(dtype) - old.astype(dtype))


Moved = Callable[[dict[str, jax.Array], jax.Array], dict[str, jax.Array]]


def moving(name: str, paths: Callable[[PyTree], Iterable[str]], moved: Moved) -> optax.GradientTransformationExtraArgs:
    """A transform that replaces some of the parameters that the updates lead to.

    Args:
      name: of the transform, for error messages.
      paths: those of the parameters that it may set to zero.
      moved: of where the updates lead, by path, and the steps taken: the new values at these paths.
    """

    def init(params: PyTree) -> ZerosState:
        return ZerosState(steps(), dict.fromkeys(paths(params)))

    def update(
        updates: PyTree, state: ZerosState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, ZerosState]:
        need(name, params)
        old, change = rules.leaves(params), rules.beside(params, updates)
        new = {path: optax.apply_updates(w, change[path]) for path, w in old.items()}
        return onto(params, updates, moved(new, state.steps)), state._replace(steps=optax.safe_increment(state.steps))

    return optax.GradientTransformationExtraArgs(init, update)
