"""Records inside loops, branches and meshes: they run again around bodies that also give what they recorded."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jcompress.trace.core import walk
from jcompress.trace.core.bodies import Bodies, ShardMap
from jcompress.trace.core.flow import Body, Step
from jcompress.trace.core.layouts import forward
from jcompress.trace.core.loops import Scan, While
from jcompress.trace.core.views import parameters
from jcompress.trace.recording.meetings import Use
from jcompress.trace.recording.tape import LARGEST, Moments, Tape, merge

Evaluate = Callable[[Body, Sequence[Any], Tape], list[Any]]
"""Runs the equations of a body: ``evaluate(body, values, tape)``."""
Found = dict[Use, Moments]


def record(evaluate: Evaluate, step: Step, values: Sequence[Any], tape: Tape) -> list[Any]:
    """The results of an equation that holds bodies; what they recorded is summed over turns and branches."""
    flow = step.flow
    assert isinstance(flow, Bodies)
    if isinstance(flow, ShardMap):
        return _on_devices(evaluate, flow, step, values, tape)
    runs = [_run(evaluate, body, tape) for body in step.bodies]
    loop, turns = step.bodies[0].loop - 1, tape.found.turns
    turns[loop] = 0
    if tape.found.sites is not None:
        tape.found.sites.lengths[loop] = flow.times(step.eqn)
    found = [_abstract(run, body) for run, body in zip(runs, step.bodies, strict=True)]
    if isinstance(flow, While):
        for use in found.pop(0):
            tape.found.cannot(use.path, "it meets an activation in the condition of a 'while' loop")
    uses = {use: shapes for of_body in found for use, shapes in of_body.items()}
    summed = [use for use in uses if not _runs_over(use, step.bodies[0])]
    stacked = [use for use in uses if _runs_over(use, step.bodies[0])]
    n, order = len(summed), [*summed, *stacked]

    def add(totals: list[Moments], moments: list[Moments]) -> tuple[list[Moments], list[Moments]]:
        return [merge(*pair) for pair in zip(totals, moments[:n], strict=True)], moments[n:]

    def listed(run: Callable[..., tuple[list[Any], Found]]) -> Callable[..., tuple[list[Any], list[Moments]]]:
        def body(*xs: Any) -> tuple[list[Any], list[Moments]]:
            outs, moments = run(*xs)
            return outs, [moments[use] if use in moments else _zeros(uses[use]) for use in order]

        return body

    start = [_zeros(uses[use]) for use in summed]
    told = (
        {"told": functools.partial(turns.__setitem__, loop)} if isinstance(flow, Scan) and _counts_turns(tape) else {}
    )
    outs, totals, left = flow.again(step.eqn, values, list(map(listed, runs)), start, add, **told)
    del turns[loop]
    for use, moments in zip(summed, totals, strict=True):
        tape.add(use, moments)
    for use, moments in zip(stacked, left or [], strict=True):
        tape.add(*_unrolled(use, moments))
    return outs


def _counts_turns(tape: Tape) -> bool:
    return tape.found.mask is not None or tape.found.sites is not None


def _run(evaluate: Evaluate, body: Body, tape: Tape) -> Callable[..., tuple[list[Any], Found]]:
    """A body as a function of its inputs that also gives the moments."""

    def run(*values: Any) -> tuple[list[Any], Found]:
        inner = Tape(tape.found)
        return evaluate(body, values, inner), inner.close()

    return run


def _abstract(run: Callable[..., tuple[list[Any], Found]], body: Body) -> dict[Use, Any]:
    """The moments of a body by shape and dtype; nothing is computed."""
    uses: list[Use] = []

    def listed(*xs: Any) -> list[Moments]:
        moments = run(*xs)[1]
        uses[:] = moments
        return list(moments.values())

    return dict(zip(uses, jax.eval_shape(listed, *map(_aval, body.closed.jaxpr.invars)), strict=True))


def _zeros(moments: Mapping[str, jax.ShapeDtypeStruct]) -> Moments:
    return {name: _zero(s) for name, s in moments.items()}


def _zero(s: jax.ShapeDtypeStruct) -> jax.Array:
    zero, names = jnp.zeros(s.shape, s.dtype), _varying(s)
    if not names:
        return zero
    varied: Any = lax  # ``pcast`` was ``pvary`` before jax 0.8.
    return varied.pcast(zero, names, to="varying") if hasattr(lax, "pcast") else varied.pvary(zero, names)


def _aval(v: Any) -> jax.ShapeDtypeStruct:
    marks = {}
    if _varying(v.aval):
        # Inside shard_map a type says along which mesh axes its value varies; how, differs between versions.
        names = ("sharding", "manual_axis_type", "vma")
        marks = {name: getattr(v.aval, name) for name in names if hasattr(v.aval, name)}
    return jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype, **marks)


def _varying(x: Any) -> tuple[str, ...]:
    """The mesh axes along which a type says that its value varies, inside ``shard_map``."""
    return tuple(getattr(getattr(x, "manual_axis_type", None), "varying", None) or getattr(x, "vma", None) or ())


def _runs_over(use: Use, body: Body) -> bool:
    """Whether the loop around a body runs over an axis of the parameter."""
    return bool(use.loops) and use.loops[-1][0] == body.loop - 1


def _unrolled(use: Use, moments: Moments) -> tuple[Use, Moments]:
    """The axis that a loop ran over, put among the leading axes."""
    *loops, (_, runs) = use.loops
    atoms, backward = tuple(map(forward, runs)), [i for i, a in enumerate(runs) if a.step < 0]
    order = sorted(range(len(atoms) + len(use.lead)), key=lambda i: _place((*atoms, *use.lead)[i]))
    lead = tuple((*atoms, *use.lead)[i] for i in order)

    def moved(x: jax.Array) -> jax.Array:
        x = x.reshape(*(a.size for a in atoms), *x.shape[1:])
        x = jnp.flip(x, backward) if backward else x
        return x.transpose(*order, *range(len(order), x.ndim))

    outer = dataclasses.replace(use, lead=lead, loops=tuple(loops))
    return outer, {name: moved(x) for name, x in moments.items()}


def _place(atom: Any) -> tuple[int, int]:
    return atom.axis, -atom.step


def _on_devices(evaluate: Evaluate, flow: ShardMap, step: Step, values: Sequence[Any], tape: Tape) -> list[Any]:
    """The same body on every device; what devices met along the mesh axes of the activation is summed."""
    if not flow.is_read(step.eqn):
        for path in parameters(step.ins, lookups=False):
            tape.found.cannot(path, "it meets an activation in 'shard_map', which is not read in this version of jax")
        return walk.bind(step.eqn, values)
    run, manual = _run(evaluate, step.bodies[0], tape), flow.manual(step.eqn)
    uses: list[Use] = []

    def sharded(*xs: Any) -> tuple[list[Any], list[Moments]]:
        outs, moments = run(*xs)
        uses[:] = moments
        return outs, [_over(use.shards, m) for use, m in moments.items()]

    outs, found, _ = flow.again(step.eqn, values, [sharded], None, lambda _, found: (found, None))
    for use, moments in zip(uses, found, strict=True):
        tape.add(dataclasses.replace(use, shards=tuple(n for n in use.shards if n not in manual)), moments)
    return outs


def _over(names: tuple[str, ...], moments: Moments) -> Moments:
    """The moments of all devices along the mesh axes."""
    if names:
        moments = {n: lax.pmax(x, names) if n in LARGEST else lax.psum(x, names) for n, x in moments.items()}
    # A value may be marked as varying along an axis along which it is the same.
    return {n: lax.pmax(x, marked) if (marked := _varying(jax.typeof(x))) else x for n, x in moments.items()}
