"""The rules of functions with derivatives of their own, which are traced, read and run at the new sizes too."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jax.extend import core as jax_core

from jcompress.numeric import meshes
from jcompress.trace.core import walk
from jcompress.trace.coupled import dims as terms
from jcompress.trace.coupled.building import Build
from jcompress.trace.coupled.dims import Dim, Dims
from jcompress.trace.coupled.frames import NOWHERE, At, Cut, Frame, Site, Value, Versions, read_states, run
from jcompress.trace.coupled.rules.calls import Wrapped, demoted, run_arrays
from jcompress.trace.coupled.states import Hold, State, all_hold, free_leaves

ORDERS = 3
"""Of derivatives that are read: a rule may call its function with other constants, and so on for ever."""


def _is_float(aval: Any) -> bool:
    return jnp.issubdtype(aval.dtype, jnp.inexact)


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0][:120]


def _float0(x: Any) -> Any:
    return np.zeros(np.shape(x), jax.dtypes.float0)


class _Derivative:
    """The operands and results of an equation that have derivatives, and the equation as a function of them.

    Attributes:
      refused: operands that it was not read for, so that nobody may ask for a derivative with respect to them.
    """

    def __init__(self, eqn: jax_core.JaxprEqn, refused: Sequence[int] = ()) -> None:
        self.eqn, self.avals, self.refused = eqn, [walk.aval(v) for v in eqn.invars], tuple(refused)
        self.ins = [i for i, aval in enumerate(self.avals) if _is_float(aval) and i not in refused]
        self.outs = [i for i, v in enumerate(eqn.outvars) if _is_float(walk.aval(v))]

    @property
    def key(self) -> Any:
        """What it is traced for."""
        return id(self.eqn), self.refused

    def check(self, asked: Iterable[int]) -> None:
        """Refuse what was not read."""
        for i in sorted(set(asked).intersection(self.refused)):
            raise ValueError(
                f"{self.eqn.primitive.name}: its rule is told which operands need no derivative, so it was read for "
                f"those that depend on parameters; found a derivative with respect to operand {i}, of shape "
                f"{self.avals[i].shape}: pass what it is made of as a parameter"
            )

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

        shapes = [meshes.struct(a) for a in self.avals]
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

        shapes = [meshes.struct(a) for a in self.avals]
        first, shown = jax.make_jaxpr(forward, return_shape=True)(shapes)
        out, remembered = jax.tree.unflatten(jax.tree.structure(shown), map(meshes.struct, first.out_avals))

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
        key = f"{site.eqn.primitive.name} {self.bodies.closed(site.eqn)[0]}"
        if key in build.open:
            return self._within(build.open[key], site)
        outs = super().dims(build, site)
        if len(build.open) == ORDERS:
            return outs
        site.outs = list(outs)
        build.open[key] = site
        error = self._derived(build, site)
        if error is not None:
            name = site.eqn.primitive.name
            site.rule, reason = build.default, f"{name} has a derivative that cannot be read here: {_told(error)}"
            build.unread[name] += 1
            for value in (*site.ins, *outs):
                terms.pin(value, reason)
        del build.open[key]
        return outs

    def body(self, build: Build, site: Site, closed: Any) -> Frame:
        # The derivative has constants among its operands as well, so they are what they are in both.
        return build.frame(closed, site.ins, trained=site.trained, chosen=site.chosen)

    def _derived(self, build: Build, site: Site) -> Exception | None:
        """Read the derivative; what its author's code raises, or JAX of types that name devices, comes back.

        A rule that is told which operands need no derivative may refuse one with respect to data, as those of solvers
        do. It is read with respect to the rest: once it has raised, JAX cannot trace the author's function again.
        """
        floats = [i for i, v in enumerate(site.eqn.invars) if _is_float(walk.aval(v))]
        data = [i for i in floats if not site.trained[i]]
        is_told = site.params.get("symbolic_zeros") and len(data) < len(floats)
        site.note = _Derivative(site.eqn, data if is_told else ())
        try:
            self.derivative(build, site)
        except Exception as error:
            return error
        return None

    def traced(self, build: Build, note: _Derivative) -> Any:
        """The derivative of an equation, traced once."""
        if note.key not in build.traced:
            build.traced[note.key] = self.trace(note)
        return build.traced[note.key]

    def trace(self, note: _Derivative) -> Any:
        """Trace the derivative."""
        raise NotImplementedError

    def derivative(self, build: Build, site: Site) -> None:
        """Add the frames of the derivative."""
        raise NotImplementedError

    def _within(self, outer: Site, site: Site) -> Sequence[Dims]:
        """A derivative that calls the function it belongs to shares its frames."""
        for a, b in zip(site.ins, outer.ins, strict=True):
            terms.unify_all(a, b)
        site.frames, site.note = outer.frames, outer.note
        return [terms.alias(d) for d in outer.outs]

    def states(self, site: Site, ins: Sequence[State]) -> Sequence[State]:
        if site.note is None:
            return self.read(site, ins)
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
    """Slices that share a value cross with their tangents."""

    def trace(self, note: _Derivative) -> Any:
        return note.jvp()

    def derivative(self, build: Build, site: Site) -> None:
        note: _Derivative = site.note
        frame = build.frame(self.traced(build, note), [*site.ins, *(site.ins[i] for i in note.ins)])
        for a, b in zip([*site.outs, *(site.outs[i] for i in note.outs)], frame.outs, strict=True):
            terms.unify_all(a, b)
        site.frames.append(frame)

    def read_derivative(self, site: Site, ins: Sequence[State]) -> None:
        # What is cut stays zero, so its tangents are zero where it is.
        read_states(site.frames[1], [*ins, *(State(held=_table(ins[i], site.ins[i])) for i in site.note.ins)])

    def call(self, cut: Cut, site: Site, crossing: Versions, at: At) -> list[Any]:
        primal, *derivative = site.frames
        note: _Derivative | None = site.note

        @jax.custom_jvp
        def again(*arrays: Any) -> list[Any]:
            return [v.at(at) for v in run(cut, primal, crossing.values(arrays))]

        def rule(primals: tuple, tangents: tuple) -> Any:
            if note is None:
                raise _too_deep(site)
            note.check(i for (i, _), x in zip(crossing.layout, tangents, strict=True) if not _is_no_change(x))
            tangents = tuple(_instantiated(x) for x in tangents)
            values, changes = crossing.values(primals), crossing.values(tangents)
            floats = [changes[i] for i in note.ins]
            for value in floats:
                value.state = State(held=_table(value.state, value.dims))
            found = [v.at(at) for v in run(cut, derivative[0], [*values, *floats])]
            out = found[: len(site.outs)]
            change = dict(zip(note.outs, found[len(site.outs) :], strict=True))
            return out, [change[i] if i in change else _float0(x) for i, x in enumerate(out)]

        again.defjvp(rule, symbolic_zeros=bool(note and note.refused))
        return again(*crossing.arrays)


def _too_deep(site: Site) -> Exception:
    return ValueError(
        f"{site.eqn.primitive.name}: found a derivative of order {ORDERS + 1}, expected at most {ORDERS} of a shrunk "
        "function whose derivatives call functions with derivatives of their own"
    )


def _is_no_change(x: Any) -> bool:
    return isinstance(x, SymbolicZero) or jax.dtypes.float0 == jnp.result_type(x)


def _instantiated(x: Any) -> Any:
    if not isinstance(x, SymbolicZero):
        return x
    return _float0(x) if x.dtype == jax.dtypes.float0 else jnp.zeros(x.shape, x.dtype)


def _table(state: State, dims: Dims) -> dict[Dim, Hold]:
    return {leaf: state.at(leaf) for leaf in free_leaves(dims)}


class CustomVJP(Custom):
    """Only what stays crosses: the cotangents of what was cut are not known."""

    def trace(self, note: _Derivative) -> Any:
        return note.vjp()

    def derivative(self, build: Build, site: Site) -> None:
        note: _Derivative = site.note
        first, second = self.traced(build, note)
        forward = build.frame(first, site.ins)
        for a, b in zip(site.outs, forward.outs, strict=False):
            terms.unify_all(a, b)
        kept = forward.outs[len(site.outs) :]
        backward = build.frame(second, [*kept, *(terms.alias(site.outs[i]) for i in note.outs)])
        for i, b in zip(note.ins, backward.outs, strict=True):
            terms.unify_all(site.ins[i], b)
        site.frames += [forward, backward]

    def read(self, site: Site, ins: Sequence[State]) -> Sequence[State]:
        return demoted(read_states(site.frames[0], demoted(ins, site.ins)), site.outs)

    def read_derivative(self, site: Site, ins: Sequence[State]) -> None:
        _, forward, backward = site.frames
        kept = read_states(forward, demoted(ins, site.ins))[len(site.outs) :]
        cotangents = [all_hold(d, Hold.VARIED) for d in backward.ins[len(kept) :]]
        read_states(backward, [*demoted(kept, backward.ins[: len(kept)]), *cotangents])

    def run(self, cut: Cut, site: Site, ins: Sequence[Value], at: At) -> list[Any]:
        primal, *derivative = site.frames
        note: _Derivative | None = site.note

        @jax.custom_vjp
        def again(*arrays: Any) -> list[Any]:
            return run_arrays(cut, primal, arrays)

        def first(*arrays: Any) -> Any:
            if note is None:
                raise _too_deep(site)
            if note.refused:
                note.check(i for i, x in enumerate(arrays) if x.perturbed)
                arrays = tuple(x.value for x in arrays)
            found = run_arrays(cut, derivative[0], arrays)
            return found[: len(site.outs)], found[len(site.outs) :]

        def second(kept: Sequence[Any], cotangents: Sequence[Any]) -> Any:
            assert note is not None
            changes = [_instantiated(cotangents[i]) for i in note.outs]
            found = run_arrays(cut, derivative[1], [*kept, *changes])
            known = dict(zip(note.ins, found, strict=True))
            return tuple(known.get(i) for i in range(len(ins)))

        again.defvjp(first, second, symbolic_zeros=bool(note and note.refused))
        return again(*[v.at(NOWHERE) for v in ins])
