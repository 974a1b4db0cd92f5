"""Rules of what holds a body of equations: loops, branches and devices, run again around the recorded body."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core as jax_core

from jcompress.trace.core import walk
from jcompress.trace.core.views import (
    Activation,
    Derived,
    Joined,
    Kind,
    View,
    computed,
    is_activation,
    join,
    local,
    parameters,
    peel,
    shards,
    spec_axes,
)
from jcompress.trace.recording.products import Use
from jcompress.trace.recording.tape import LARGEST, Moments, Tape, merge

Evaluate = Callable[..., tuple[list[Any], list[Kind]]]
"""Runs the equations of a body: ``evaluate(jaxpr, consts, values, kinds, tape)``."""


def _body(
    evaluate: Evaluate, closed: jax_core.ClosedJaxpr, kinds: Sequence[Kind], tape: Tape
) -> tuple[Callable[..., tuple[list[Any], dict[Use, Moments]]], list[list[Kind]]]:
    """A body as a function of its inputs that also gives the moments, and a place where its kinds are left."""
    left: list[list[Kind]] = []

    def run(*values: Any) -> tuple[list[Any], dict[Use, Moments]]:
        inner = Tape(tape.found, tape.loop + 1)
        outs, out_kinds = evaluate(closed.jaxpr, closed.consts, values, kinds, inner)
        left.append(out_kinds)
        return outs, inner.close()

    return run, left


def _abstract(run: Callable, left: list[list[Kind]], values: Sequence[Any]) -> tuple[dict[Use, Any], list[Kind]]:
    """The moments of a body by shape and dtype, and the kinds of its outputs; nothing is computed."""
    uses: list[Use] = []

    def listed(*xs: Any) -> list[Moments]:
        moments = run(*xs)[1]
        uses[:] = moments
        return list(moments.values())

    found = jax.eval_shape(listed, *values)
    return dict(zip(uses, found, strict=True)), left[-1]


def _zeros(uses: Mapping[Use, Any]) -> list[Moments]:
    return [jax.tree.map(_zero, moments) for moments in uses.values()]


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


def _alike(a: Kind, b: Kind) -> bool:
    return a == b or (isinstance(a, Activation) and isinstance(b, Activation) and a.shards == b.shards)


def _settle(
    evaluate: Evaluate,
    closed: jax_core.ClosedJaxpr,
    before: list[Kind],
    carry: list[Kind],
    after: list[Kind],
    tape: Tape,
) -> tuple[Callable, dict[Use, Any], list[Kind], list[Kind]]:
    """The kinds of a loop's carry once they stop changing: the body, its uses, the carry's kinds, the outputs'."""
    n, first = len(carry), len(before)
    outvars, invars = closed.jaxpr.outvars, closed.jaxpr.invars
    still = [outvars[i] is invars[first + i] for i in range(n)]
    carry = [
        k if s or not isinstance(k, (View, Joined)) else computed("carry", [k])
        for k, s in zip(carry, still, strict=True)
    ]
    while True:
        run, left = _body(evaluate, closed, [*before, *carry, *after], tape)
        uses, outs = _abstract(run, left, [_aval(v) for v in invars])
        joined = [join("carry", pair) for pair in zip(carry, outs[:n], strict=True)]
        if all(map(_alike, joined, carry)):
            return run, uses, joined, outs
        carry = joined


def _scan(
    evaluate: Evaluate, eqn: jax_core.JaxprEqn, values: Sequence[Any], kinds: Sequence[Kind], tape: Tape
) -> tuple[list[Any], list[Kind]]:
    p = eqn.params
    closed, (consts, carries) = p["jaxpr"], walk.scan_parts(eqn)
    loop, split = tape.loop, consts + carries
    slices = [peel(k, loop) for k in kinds[split:]]
    run, uses, carry, outs = _settle(evaluate, closed, list(kinds[:consts]), list(kinds[consts:split]), slices, tape)
    summed = [use for use in uses if not _runs_over(use, loop)]
    stacked = [use for use in uses if _runs_over(use, loop)]

    def body(state: tuple[list[Any], list[Moments]], xs: list[Any]) -> tuple[Any, Any]:
        values_now, totals = state
        results, moments = run(*values[:consts], *values_now, *xs)
        totals = [merge(total, moments[use]) for use, total in zip(summed, totals, strict=True)]
        return (results[:carries], totals), (results[carries:], [moments[use] for use in stacked])

    init = (list(values[consts:split]), _zeros({use: uses[use] for use in summed}))
    (final, totals), (ys, layers) = lax.scan(
        body, init, list(values[split:]), length=p["length"], reverse=p["reverse"], unroll=p["unroll"]
    )
    for use, moments in zip(summed, totals, strict=True):
        tape.add(use, moments)
    for use, moments in zip(stacked, layers, strict=True):
        tape.add(*_unrolled(use, moments))
    return [*final, *ys], [*carry, *(computed("scan", [k]) for k in outs[carries:])]


def _runs_over(use: Use, loop: int) -> bool:
    return bool(use.loops) and use.loops[-1][0] == loop


def _unrolled(use: Use, moments: Moments) -> tuple[Use, Moments]:
    """The axis that a loop ran over, put among the leading axes."""
    *loops, (_, atoms) = use.loops
    order = sorted(range(len(atoms) + len(use.lead)), key=lambda i: _place((*atoms, *use.lead)[i]))
    lead = tuple((*atoms, *use.lead)[i] for i in order)

    def moved(x: jax.Array) -> jax.Array:
        x = x.reshape(*(a.size for a in atoms), *x.shape[1:])
        return x.transpose(*order, *range(len(order), x.ndim))

    outer = dataclasses.replace(use, lead=lead, loops=tuple(loops))
    return outer, {name: moved(x) for name, x in moments.items()}


def _place(atom: Any) -> tuple[int, int]:
    return atom.axis, -atom.step


def _while(
    evaluate: Evaluate, eqn: jax_core.JaxprEqn, values: Sequence[Any], kinds: Sequence[Kind], tape: Tape
) -> tuple[list[Any], list[Kind]]:
    p = eqn.params
    tests, split = p["cond_nconsts"], p["cond_nconsts"] + p["body_nconsts"]
    condition = p["cond_jaxpr"]
    run, uses, carry, _ = _settle(evaluate, p["body_jaxpr"], list(kinds[tests:split]), list(kinds[split:]), [], tape)
    test, left = _body(evaluate, condition, [*kinds[:tests], *carry], tape)
    for use in _abstract(test, left, [_aval(v) for v in condition.jaxpr.invars])[0]:
        tape.found.cannot(use.path, "it meets an activation in the condition of a 'while' loop")

    def proceed(state: tuple[list[Any], list[Moments]]) -> Any:
        return test(*values[:tests], *state[0])[0][0]

    def body(state: tuple[list[Any], list[Moments]]) -> tuple[list[Any], list[Moments]]:
        results, moments = run(*values[tests:split], *state[0])
        return results, [merge(total, moments[use]) for use, total in zip(uses, state[1], strict=True)]

    final, totals = lax.while_loop(proceed, body, (list(values[split:]), _zeros(uses)))
    for use, moments in zip(uses, totals, strict=True):
        tape.add(use, moments)
    return list(final), carry


def _cond(
    evaluate: Evaluate, eqn: jax_core.JaxprEqn, values: Sequence[Any], kinds: Sequence[Kind], tape: Tape
) -> tuple[list[Any], list[Kind]]:
    index, *operands = values
    bodies = [_body(evaluate, branch, kinds[1:], tape) for branch in eqn.params["branches"]]
    found = [_abstract(run, left, [_aval(v) for v in eqn.invars[1:]]) for run, left in bodies]
    uses = {use: shapes for branch_uses, _ in found for use, shapes in branch_uses.items()}

    def with_all(run: Callable) -> Callable:
        def branch(*xs: Any) -> tuple[list[Any], list[Moments]]:
            outs, moments = run(*xs)
            return outs, [moments.get(use, zero) for use, zero in zip(uses, _zeros(uses), strict=True)]

        return branch

    outs, moments = lax.switch(index, [with_all(run) for run, _ in bodies], *operands)
    for use, found_moments in zip(uses, moments, strict=True):
        tape.add(use, found_moments)
    columns = zip(*(out_kinds for _, out_kinds in found), strict=True)
    return list(outs), [_chosen(join("cond", column), kinds[0]) for column in columns]


def _chosen(kind: Kind, index: Kind) -> Kind:
    """A result of a branch that an activation chose; a parameter that every branch gives stays one."""
    return kind if isinstance(kind, (View, Joined)) or not is_activation(index) else _picked(kind, index)


def _picked(kind: Kind, index: Kind) -> Kind:
    return dataclasses.replace(kind, lookup=True) if isinstance(kind, Derived) else computed("cond", [kind, index])


def _shard_map(
    evaluate: Evaluate, eqn: jax_core.JaxprEqn, values: Sequence[Any], kinds: Sequence[Kind], tape: Tape
) -> tuple[list[Any], list[Kind]]:
    """The same body on every device; what devices met along the mesh axes of the activation is summed."""
    p = eqn.params
    if "in_specs" not in p or not hasattr(jax, "shard_map"):
        for path in parameters(kinds, lookups=False):
            tape.found.cannot(path, "it meets an activation in 'shard_map', which is not read in this version of jax")
        outs = walk.bind(eqn, values)
        return outs, [computed("shard_map", kinds)] * len(outs)
    mesh, body = p["mesh"], p["jaxpr"]
    manual = frozenset(p.get("newly_manual_axes") or mesh.axis_names)
    inner = [_held(k, spec, v) for k, spec, v in zip(kinds, p["in_specs"], body.invars, strict=True)]
    run, left = _body(evaluate, jax_core.ClosedJaxpr(body, ()), inner, tape)
    uses: list[Use] = []

    def sharded(*xs: Any) -> tuple[list[Any], list[Moments]]:
        outs, moments = run(*xs)
        uses[:] = moments
        return outs, [_over(use.shards, m) for use, m in moments.items()]

    mapped = jax.shard_map(
        sharded,
        mesh=mesh,
        in_specs=tuple(p["in_specs"]),
        out_specs=(list(p["out_specs"]), jax.sharding.PartitionSpec()),
        axis_names=manual,
        check_vma=p["check_vma"],
    )
    outs, moments = mapped(*values)
    for use, found in zip(uses, moments, strict=True):
        tape.add(dataclasses.replace(use, shards=tuple(n for n in use.shards if n not in manual)), found)
    return list(outs), [_outside(k, manual) for k in left[-1]]


def _held(kind: Kind, spec: Any, v: Any) -> Kind:
    """What one device holds of a value."""
    if isinstance(kind, View):
        return local(kind, spec, v.aval.shape)
    if isinstance(kind, Joined):
        return computed("concatenate", [kind])
    return kind if kind is None else dataclasses.replace(kind, shards=kind.shards | spec_axes(spec))


def _outside(kind: Kind, manual: frozenset[str]) -> Kind:
    kind = computed("shard_map", [kind])
    return (
        dataclasses.replace(kind, shards=shards([kind]) - manual) if isinstance(kind, (Activation, Derived)) else None
    )


def _over(names: tuple[str, ...], moments: Moments) -> Moments:
    """The moments of all devices along the mesh axes."""
    if names:
        moments = {n: lax.pmax(x, names) if n in LARGEST else lax.psum(x, names) for n, x in moments.items()}
    # A value may be marked as varying along an axis along which it is the same.
    return {n: lax.pmax(x, marked) if (marked := _varying(jax.typeof(x))) else x for n, x in moments.items()}


CONTROL: dict[str, Callable[..., tuple[list[Any], list[Kind]]]] = {
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "shard_map": _shard_map,
}
