"""The rules of primitives that call functions.

What is called keeps its kind: a loop stays a loop, ``remat`` and custom derivatives stay what they were.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jax_core

from jcompress.trace import dims as terms
from jcompress.trace import walk
from jcompress.trace.dims import Dim, Dims
from jcompress.trace.frames import (
    NOWHERE,
    At,
    Build,
    Cut,
    Frame,
    Hold,
    Rule,
    Site,
    State,
    Value,
    Versions,
    all_hold,
    free_leaves,
    joined,
    read_states,
    run,
)  # fmt: skip


def _demoted(states: Sequence[State], dims: Sequence[Dims]) -> list[State]:
    """For values of which only what stays crosses a call: a cut slice that is not zero is not known inside."""
    found = []
    for state, value in zip(states, dims, strict=True):
        held = {x: Hold.ZERO if state.at(x) is Hold.ZERO else Hold.VARIED for x in free_leaves(value)}
        found.append(State(0 if state.constant is not None and state.constant == 0 else None, held))
    return found


def _arrays(cut: Cut, frame: Frame, arrays: Sequence[Any]) -> list[Any]:
    """Run a frame on what stays of its inputs, and give what stays of its outputs."""

    def unknown(at: At) -> Any:
        raise AssertionError(f"a slice of {set(at)} was asked for across a call; it should have been pinned")

    ins = [Value(cut, d, s, unknown) for d, s in zip(frame.ins, frame.states, strict=True)]
    for value, x in zip(ins, arrays, strict=True):
        value.known[NOWHERE] = x
    return [v.at(NOWHERE) for v in run(cut, frame, ins)]


class Call(Rule):
    """A call without a meaning of its own, ``jit`` among them: its equations are taken in."""

    def dims(self, build: Build, site: Site) -> Sequence[Dims]:
        closed = walk.called(site.eqn)
        assert closed is not None
        site.frames = [build.frame(closed, site.ins)]
        return site.frames[0].outs

    def states(self, site: Site, ins: Sequence[State]) -> Sequence[State]:
        return read_states(site.frames[0], ins)

    def values(self, cut: Cut, site: Site, ins: Sequence[Value]) -> list[Value]:
        return run(cut, site.frames[0], ins)


class Wrapped(Call):
    """A call that stays one: the arrays that its inside needs cross its border."""

    def run(self, cut: Cut, site: Site, ins: Sequence[Value], at: At) -> list[Any]:
        return self.call(cut, site, Versions(cut, ins, at), at)

    def call(self, cut: Cut, site: Site, crossing: Versions, at: At) -> list[Any]:
        """Apply the wrapped function to what crosses."""
        raise NotImplementedError

    values = Rule.values


class Remat(Wrapped):
    def call(self, cut: Cut, site: Site, crossing: Versions, at: At) -> list[Any]:
        params = site.params
        keep = {name: params[name] for name in ("policy", "prevent_cse") if name in params}

        def again(*arrays: Any) -> list[Any]:
            return [v.at(at) for v in run(cut, site.frames[0], crossing.values(arrays))]

        return jax.checkpoint(again, **keep)(*crossing.arrays)


def _is_float(aval: Any) -> bool:
    return jnp.issubdtype(aval.dtype, jnp.inexact)


def _float0(x: Any) -> Any:
    return np.zeros(np.shape(x), jax.dtypes.float0)


class _Derivative:
    """The operands and results of an equation that have derivatives, and the equation as a function of them."""

    def __init__(self, eqn: jax_core.JaxprEqn) -> None:
        self.eqn, self.avals = eqn, [walk.aval(v) for v in eqn.invars]
        self.ins = [i for i, aval in enumerate(self.avals) if _is_float(aval)]
        self.outs = [i for i, v in enumerate(eqn.outvars) if _is_float(walk.aval(v))]

    def function(self, operands: Sequence[Any]) -> Callable[..., list[Any]]:
        def fn(*floats: Any) -> list[Any]:
            values = list(operands)
            for i, x in zip(self.ins, floats, strict=True):
                values[i] = x
            return walk.bind(self.eqn, values)

        return fn

    def jvp(self) -> jax_core.ClosedJaxpr:
        """Operands and the tangents of those that have one -> results, and the tangents of those that have one."""

        def both(operands: Sequence[Any], tangents: Sequence[Any]) -> Any:
            floats = tuple(operands[i] for i in self.ins)
            out, change = jax.jvp(self.function(operands), floats, tuple(tangents))
            return out, [change[i] for i in self.outs]

        shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in self.avals]
        return jax.make_jaxpr(both)(shapes, [shapes[i] for i in self.ins])

    def vjp(self) -> tuple[jax_core.ClosedJaxpr, jax_core.ClosedJaxpr]:
        """Operands -> results and what the backward pass remembers; that and cotangents -> cotangents."""
        tree: Any = None

        def forward(operands: Sequence[Any]) -> Any:
            nonlocal tree
            floats = tuple(operands[i] for i in self.ins)
            out, back = jax.vjp(self.function(operands), *floats)
            remembered, tree = jax.tree.flatten(back)
            return out, remembered

        shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in self.avals]
        first, (out, remembered) = jax.make_jaxpr(forward, return_shape=True)(shapes)

        def backward(remembered: Sequence[Any], cotangents: Sequence[Any]) -> Any:
            full = [_float0(x) for x in out]
            for i, x in zip(self.outs, cotangents, strict=True):
                full[i] = x
            return jax.tree.unflatten(tree, remembered)(full)

        second = jax.make_jaxpr(backward)(remembered, [out[i] for i in self.outs])
        return first, second


class Custom(Wrapped):
    """A function with derivatives of its own; they are traced, read and run at the new sizes as it is."""

    def dims(self, build: Build, site: Site) -> Sequence[Dims]:
        key = f"{site.eqn.primitive.name} {walk.called(site.eqn)}"
        if key in build.open:
            return self._within(build.open[key], site)
        outs, site.note = super().dims(build, site), _Derivative(site.eqn)
        site.outs = list(outs)
        build.open[key] = site
        try:
            self.derivative(build, site)
        except TypeError:  # inside shard_map its types name devices that it cannot be traced without
            site.rule, reason = build.default, f"{site.eqn.primitive.name} has a derivative that cannot be read here"
            build.unread[site.eqn.primitive.name] += 1
            for value in (*site.ins, *outs):
                terms.pin(value, reason)
        finally:
            del build.open[key]
        return outs

    def derivative(self, build: Build, site: Site) -> None:
        """Trace the derivative and add its frames."""
        raise NotImplementedError

    def _within(self, outer: Site, site: Site) -> Sequence[Dims]:
        """A derivative that calls the function it belongs to shares its frames."""
        for a, b in zip(site.ins, outer.ins, strict=True):
            terms.unify_all(a, b)
        site.frames, site.note = outer.frames, outer.note
        return [terms.alias(d) for d in outer.outs]

    def states(self, site: Site, ins: Sequence[State]) -> Sequence[State]:
        if getattr(site.note, "reading", False):
            return [
                all_hold(d, Hold.VARIED) if s is None else s for d, s in zip(site.outs, site.note.found, strict=True)
            ]
        site.note.reading = True
        site.note.found = list(self.read(site, ins))
        self.read_derivative(site, ins)
        site.note.reading = False
        return site.note.found

    def read(self, site: Site, ins: Sequence[State]) -> Sequence[State]:
        """The states of the results."""
        return read_states(site.frames[0], ins)

    def read_derivative(self, site: Site, ins: Sequence[State]) -> None:
        """Read the states of the derivative's frames."""
        raise NotImplementedError


class CustomJVP(Custom):
    def derivative(self, build: Build, site: Site) -> None:
        note = site.note
        if id(site.eqn) not in build.traced:
            build.traced[id(site.eqn)] = note.jvp()
        frame = build.frame(build.traced[id(site.eqn)], [*site.ins, *(site.ins[i] for i in note.ins)])
        for a, b in zip([*site.outs, *(site.outs[i] for i in note.outs)], frame.outs, strict=True):
            terms.unify_all(a, b)
        site.frames.append(frame)

    def read_derivative(self, site: Site, ins: Sequence[State]) -> None:
        # What is cut stays zero, so its tangents are zero where it is.
        read_states(site.frames[1], [*ins, *(State(held=_table(ins[i], site.ins[i])) for i in site.note.ins)])

    def call(self, cut: Cut, site: Site, crossing: Versions, at: At) -> list[Any]:
        primal, derivative = site.frames

        @jax.custom_jvp
        def again(*arrays: Any) -> list[Any]:
            return [v.at(at) for v in run(cut, primal, crossing.values(arrays))]

        @again.defjvp
        def rule(primals: tuple, tangents: tuple) -> Any:
            values, changes = crossing.values(primals), crossing.values(tangents)
            floats = [changes[i] for i in site.note.ins]
            for value in floats:
                value.state = State(held=_table(value.state, value.dims))
            found = [v.at(at) for v in run(cut, derivative, [*values, *floats])]
            out = found[: len(site.outs)]
            change = dict(zip(site.note.outs, found[len(site.outs) :], strict=True))
            return out, [change[i] if i in change else _float0(x) for i, x in enumerate(out)]

        return again(*crossing.arrays)


def _table(state: State, dims: Dims) -> dict[Dim, Hold]:
    return {leaf: state.at(leaf) for leaf in free_leaves(dims)}


class CustomVJP(Custom):
    """Only what stays crosses: the cotangents of what was cut are not known."""

    def derivative(self, build: Build, site: Site) -> None:
        note = site.note
        if id(site.eqn) not in build.traced:
            build.traced[id(site.eqn)] = note.vjp()
        first, second = build.traced[id(site.eqn)]
        forward = build.frame(first, site.ins)
        for a, b in zip(site.outs, forward.outs, strict=False):
            terms.unify_all(a, b)
        kept = forward.outs[len(site.outs) :]
        backward = build.frame(second, [*kept, *(terms.alias(site.outs[i]) for i in note.outs)])
        for i, b in zip(note.ins, backward.outs, strict=True):
            terms.unify_all(site.ins[i], b)
        site.frames += [forward, backward]

    def read(self, site: Site, ins: Sequence[State]) -> Sequence[State]:
        return _demoted(read_states(site.frames[0], _demoted(ins, site.ins)), site.outs)

    def read_derivative(self, site: Site, ins: Sequence[State]) -> None:
        _, forward, backward = site.frames
        kept = read_states(forward, _demoted(ins, site.ins))[len(site.outs) :]
        cotangents = [all_hold(d, Hold.VARIED) for d in backward.ins[len(kept) :]]
        read_states(backward, [*_demoted(kept, backward.ins[: len(kept)]), *cotangents])

    def run(self, cut: Cut, site: Site, ins: Sequence[Value], at: At) -> list[Any]:
        primal, forward, backward = site.frames
        note = site.note

        @jax.custom_vjp
        def again(*arrays: Any) -> list[Any]:
            return _arrays(cut, primal, arrays)

        def first(*arrays: Any) -> Any:
            found = _arrays(cut, forward, arrays)
            return found[: len(site.outs)], found[len(site.outs) :]

        def second(kept: Sequence[Any], cotangents: Sequence[Any]) -> Any:
            found = _arrays(cut, backward, [*kept, *(cotangents[i] for i in note.outs)])
            known = dict(zip(note.ins, found, strict=True))
            return tuple(known.get(i) for i in range(len(ins)))

        again.defvjp(first, second)
        return again(*[v.at(NOWHERE) for v in ins])


def _fixpoint(read: Callable[[list[State]], Sequence[State]], carry: list[State], dims: Sequence[Dims]) -> list[State]:
    """The states of a loop's carry that hold before and after each turn."""
    while True:
        after = [joined(pair, d) for *pair, d in zip(carry, read(carry), dims, strict=True)]
        after = _demoted(after, dims)
        if [_key(s, d) for s, d in zip(after, dims, strict=True)] == [
            _key(s, d) for s, d in zip(carry, dims, strict=True)
        ]:
            return carry
        carry = after


def _key(state: State, dims: Dims) -> Any:
    return state.constant is not None, [state.at(leaf) for leaf in free_leaves(dims)]


class Scan(Rule):
    def dims(self, build: Build, site: Site) -> Sequence[Dims]:
        consts, carry, xs = self._parts(site, site.ins)
        length = Dim(site.params["length"], pinned="a scan runs along it")
        terms.unify_all((length,), *(x[:1] for x in xs))
        frame = build.frame(site.params["jaxpr"], [*consts, *carry, *(x[1:] for x in xs)])
        site.frames = [frame]
        n = len(carry)
        for a, b in zip(carry, frame.outs[:n], strict=True):
            terms.unify_all(a, b)
        outs = [terms.alias(d) for d in carry]
        return [*outs, *((Dim(length.size, "link", (length,)), *y) for y in frame.outs[n:])]

    def _parts(self, site: Site, values: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any], Sequence[Any]]:
        consts, carry = walk.scan_parts(site.eqn)
        return values[:consts], values[consts : consts + carry], values[consts + carry :]

    def states(self, site: Site, ins: Sequence[State]) -> Sequence[State]:
        (frame,), (consts, carry, xs) = site.frames, self._parts(site, _demoted(ins, site.ins))
        n = len(carry)

        def read(now: list[State]) -> Sequence[State]:
            return read_states(frame, [*consts, *now, *xs])[:n]

        carry = _fixpoint(read, list(carry), frame.ins[len(consts) : len(consts) + n])
        outs = read_states(frame, [*consts, *carry, *xs])
        return _demoted([*carry, *outs[n:]], site.outs)

    def run(self, cut: Cut, site: Site, ins: Sequence[Value], at: At) -> list[Any]:
        consts, carry, xs = self._parts(site, [v.at(NOWHERE) for v in ins])
        n, params = len(carry), site.params

        def body(now: Sequence[Any], x: Sequence[Any]) -> Any:
            outs = _arrays(cut, site.frames[0], [*consts, *now, *x])
            return outs[:n], outs[n:]

        last, ys = jax.lax.scan(
            body, list(carry), list(xs), length=params["length"], reverse=params["reverse"], unroll=params["unroll"]
        )
        return [*last, *ys]


class While(Rule):
    def dims(self, build: Build, site: Site) -> Sequence[Dims]:
        test, body, carry = self._parts(site, site.ins)
        site.frames = [
            build.frame(site.params["cond_jaxpr"], [*test, *carry]),
            build.frame(site.params["body_jaxpr"], [*body, *carry]),
        ]
        for a, b in zip(carry, site.frames[1].outs, strict=True):
            terms.unify_all(a, b)
        return [terms.alias(d) for d in carry]

    def _parts(self, site: Site, values: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any], Sequence[Any]]:
        a = site.params["cond_nconsts"]
        b = a + site.params["body_nconsts"]
        return values[:a], values[a:b], values[b:]

    def states(self, site: Site, ins: Sequence[State]) -> Sequence[State]:
        test, body, carry = self._parts(site, _demoted(ins, site.ins))
        found = _fixpoint(lambda now: read_states(site.frames[1], [*body, *now]), list(carry), site.outs)
        read_states(site.frames[1], [*body, *found])
        read_states(site.frames[0], [*test, *found])
        return _demoted(found, site.outs)

    def run(self, cut: Cut, site: Site, ins: Sequence[Value], at: At) -> list[Any]:
        test, body, carry = self._parts(site, [v.at(NOWHERE) for v in ins])
        return jax.lax.while_loop(
            lambda now: _arrays(cut, site.frames[0], [*test, *now])[0],
            lambda now: _arrays(cut, site.frames[1], [*body, *now]),
            list(carry),
        )


class Cond(Rule):
    def dims(self, build: Build, site: Site) -> Sequence[Dims]:
        site.frames = [build.frame(branch, site.ins[1:]) for branch in site.params["branches"]]
        for outs in zip(*(frame.outs for frame in site.frames), strict=True):
            terms.unify_all(*outs)
        return [terms.alias(d) for d in site.frames[0].outs]

    def states(self, site: Site, ins: Sequence[State]) -> Sequence[State]:
        ins = _demoted(ins[1:], site.ins[1:])
        found = [read_states(frame, ins) for frame in site.frames]
        return _demoted([joined(s, d) for s, d in zip(zip(*found, strict=True), site.outs, strict=True)], site.outs)

    def run(self, cut: Cut, site: Site, ins: Sequence[Value], at: At) -> list[Any]:
        index, *arrays = (v.at(NOWHERE) for v in ins)
        branches = [lambda *x, frame=frame: _arrays(cut, frame, x) for frame in site.frames]
        return jax.lax.switch(index, branches, *arrays)


class ShardMap(Rule):
    """The body sees the axes that are not divided; those that are stay."""

    def dims(self, build: Build, site: Site) -> Sequence[Dims]:
        p, reason = site.params, "shard_map divides it"
        if "in_specs" not in p:
            return super().dims(build, site)
        body, ins = jax_core.ClosedJaxpr(p["jaxpr"], ()), []
        for value, spec, v in zip(site.ins, p["in_specs"], p["jaxpr"].invars, strict=True):
            divided = [i < len(spec) and spec[i] is not None for i in range(len(value))]
            terms.pin([d for d, yes in zip(value, divided, strict=True) if yes], reason)
            shape = walk.aval(v).shape
            inner = [Dim(n, pinned=reason) if yes else d for n, d, yes in zip(shape, value, divided, strict=True)]
            ins.append(tuple(inner))
        site.frames = [build.frame(body, ins)]
        outs = []
        for value, spec, v in zip(site.frames[0].outs, p["out_specs"], site.eqn.outvars, strict=True):
            divided = [i < len(spec) and spec[i] is not None for i in range(len(value))]
            terms.pin([d for d, yes in zip(value, divided, strict=True) if yes], reason)
            shape = walk.aval(v).shape
            outs.append([Dim(n, pinned=reason) if yes else d for n, d, yes in zip(shape, value, divided, strict=True)])
        return [tuple(x) for x in outs]

    def states(self, site: Site, ins: Sequence[State]) -> Sequence[State]:
        if not site.frames:
            return super().states(site, ins)
        return _demoted(read_states(site.frames[0], _demoted(ins, site.ins)), site.outs)

    def run(self, cut: Cut, site: Site, ins: Sequence[Value], at: At) -> list[Any]:
        if not site.frames:
            return super().run(cut, site, ins, at)
        p = site.params
        names = frozenset(p.get("newly_manual_axes") or p["mesh"].axis_names)
        mapped = jax.shard_map(
            lambda *arrays: _arrays(cut, site.frames[0], arrays),
            mesh=p["mesh"],
            in_specs=tuple(p["in_specs"]),
            out_specs=list(p["out_specs"]),
            axis_names=names,
            check_vma=p.get("check_vma", True),
        )
        return list(mapped(*[v.at(NOWHERE) for v in ins]))


CALLS: dict[str, Rule] = {
    **dict.fromkeys(walk.CALLS, Call()),
    **dict.fromkeys(walk.REMAT, Remat()),
    "custom_jvp_call": CustomJVP(),
    "custom_vjp_call": CustomVJP(),
    "custom_vjp_call_jaxpr": CustomVJP(),
    "scan": Scan(),
    "while": While(),
    "cond": Cond(),
    "shard_map": ShardMap(),
}
