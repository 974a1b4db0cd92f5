"""The rules of linear algebra: matrices stay, and what they are stacked along, or solved for, can be cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jax import lax

from jcompress.trace.core import walk
from jcompress.trace.coupled import dims as terms
from jcompress.trace.coupled.building import Build
from jcompress.trace.coupled.dims import Dims
from jcompress.trace.coupled.frames import NOWHERE, At, Cut, Rule, Site, Value, read_states
from jcompress.trace.coupled.rules.calls import demoted, run_arrays
from jcompress.trace.coupled.states import Hold, State, all_hold, free_leaves


class Matrices(Rule):
    """One matrix after the other: the axes in front pass, those of a matrix stay.

    Args:
      trailing: how many axes of the first operand belong to one matrix.
    """

    def __init__(self, trailing: int = 2) -> None:
        self.trailing = trailing

    def dims(self, build: Build, site: Site) -> Sequence[Dims]:
        n, reason = len(site.ins[0]) - self.trailing, f"{site.eqn.primitive.name} works on it"
        terms.unify_all(*(v[:n] for v in site.ins))
        site.note = n
        for value in site.ins:
            terms.pin(value[n:], reason)
        shapes = [walk.aval(v).shape for v in site.eqn.outvars]
        return [(*terms.alias(site.ins[0][:n]), *terms.fresh(shape[n:], reason)) for shape in shapes]

    def states(self, site: Site, ins: Sequence[State]) -> Sequence[State]:
        return [State(held={x: max(Hold.SAME, *(s.at(x) for s in ins)) for x in free_leaves(v)}) for v in site.outs]


class Solve(Matrices):
    """The last operand is solved for: its columns (or its rows, from the right) pass, and zeros are solved by zeros."""

    def dims(self, build: Build, site: Site) -> Sequence[Dims]:
        *matrices, b = site.ins
        n, reason = len(matrices[0]) - self.trailing, f"{site.eqn.primitive.name} works on it"
        terms.unify_all(*(v[:n] for v in site.ins))
        free = n + 1 if site.params.get("left_side", True) else n
        for value in matrices:
            terms.pin(value[n:], reason)
        terms.pin([d for i, d in enumerate(b) if i >= n and i != free], reason)
        return [terms.alias(b)]

    def states(self, site: Site, ins: Sequence[State]) -> Sequence[State]:
        held = {}
        for leaf in free_leaves(site.outs[0]):
            zero = ins[-1].at(leaf) is Hold.ZERO
            held[leaf] = Hold.ZERO if zero else max(Hold.SAME, *(s.at(leaf) for s in ins))
        return [State(held=held)]


class LinearSolve(Rule):
    """A solve with derivatives of its own: its functions are read and run at the new sizes, and it stays one."""

    reads = False

    def dims(self, build: Build, site: Site) -> Sequence[Dims]:
        bodies, consts, b = _parts(site, site.ins)
        frames = {name: build.frame(body, [*consts[name], *b]) for name, body in bodies.items()}
        n = len(b)
        for frame in frames.values():
            # What is solved for, what it is solved by and what the matrix makes of either are alike in every column.
            for x, y in zip(frame.outs[:n], b, strict=True):
                _alike(x, y)
        site.frames, site.note = list(frames.values()), list(frames)
        return [terms.alias(d) for d in frames["solve"].outs]

    def states(self, site: Site, ins: Sequence[State]) -> Sequence[State]:
        _, consts, b = _parts(site, demoted(ins, site.ins))
        found: list[State] = []
        for name, frame in zip(site.note, site.frames, strict=True):
            free = b if name == "solve" else [all_hold(d, Hold.VARIED) for d in frame.ins[-len(b) :]]
            outs = demoted(read_states(frame, [*consts[name], *free]), frame.outs)
            found = outs if name == "solve" else found
        return found

    def run(self, cut: Cut, site: Site, ins: Sequence[Value], at: At) -> list[Any]:
        _, consts, b = _parts(site, [v.at(NOWHERE) for v in ins])
        frames = dict(zip(site.note, site.frames, strict=True))

        def body(name: str) -> Any:
            return lambda xs: run_arrays(cut, frames[name], [*consts[name], *xs])

        extra = len(frames["solve"].outs) > len(b)

        def solve(_: Any, xs: Any) -> Any:
            found = body("solve")(xs)
            return (found[: len(b)], found[len(b) :]) if extra else found

        back = (lambda _, xs: body("transpose_solve")(xs)) if "transpose_solve" in frames else None
        is_symmetric = site.params["jaxprs"].vecmat is site.params["jaxprs"].matvec
        found = lax.custom_linear_solve(body("matvec"), list(b), solve, back, symmetric=is_symmetric, has_aux=extra)
        return [*found[0], *found[1]] if extra else list(found)


def _parts(site: Site, values: Sequence[Any]) -> tuple[dict[str, Any], dict[str, Sequence[Any]], Sequence[Any]]:
    """The functions of a solve by name, what each closes over, and what is solved for."""
    bodies: dict[str, Any] = {}
    consts: dict[str, Sequence[Any]] = {}
    left = list(values)
    for name, n in site.params["const_lengths"]._asdict().items():
        consts[name], left = left[:n], left[n:]
        body = getattr(site.params["jaxprs"], name)
        if body is not None and name != "vecmat":
            bodies[name] = body
    return bodies, consts, left


def _alike(a: Dims, b: Dims) -> None:
    """Tie two values axis by axis where they are as long."""
    for x, y in zip(a, b, strict=True):
        if x.size == y.size:
            terms.unify(x, y)
