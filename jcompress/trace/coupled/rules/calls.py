"""The rules of primitives that call a function once, on its operands as they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jcompress.trace.core import bodies, walk
from jcompress.trace.coupled import dims as terms
from jcompress.trace.coupled.building import Build
from jcompress.trace.coupled.dims import Dims
from jcompress.trace.coupled.frames import (
    NOWHERE,
    At,
    Cut,
    Frame,
    Rule,
    Site,
    Value,
    Versions,
    read_states,
    run,
    site_bind,
)
from jcompress.trace.coupled.states import Hold, State, free_leaves


def demoted(states: Sequence[State], dims: Sequence[Dims]) -> list[State]:
    """For values of which only what stays crosses a call: a cut slice that is not zero is not known inside."""
    found = []
    for state, value in zip(states, dims, strict=True):
        held = {x: Hold.ZERO if state.at(x) is Hold.ZERO else Hold.VARIED for x in free_leaves(value)}
        found.append(State(0 if state.constant is not None and state.constant == 0 else None, held))
    return found


def unknown(at: At) -> Any:
    """What a slice is that did not cross a call."""
    raise AssertionError(f"a slice of {set(at)} was asked for across a call; it should have been pinned")


def run_arrays(cut: Cut, frame: Frame, arrays: Sequence[Any]) -> list[Any]:
    """Run a frame on what stays of its inputs, and give what stays of its outputs."""
    ins = [Value(cut, d, s, unknown) for d, s in zip(frame.ins, frame.states, strict=True)]
    for value, x in zip(ins, arrays, strict=True):
        value.known[NOWHERE] = x
    return [v.at(NOWHERE) for v in run(cut, frame, ins)]


class Call(Rule):
    """A call without a meaning of its own, such as that of a compiled function: its equations are taken in."""

    reads = False

    def __init__(self, bodies: bodies.Call) -> None:
        self.bodies = bodies

    def dims(self, build: Build, site: Site) -> Sequence[Dims]:
        (closed,) = self.bodies.closed(site.eqn)
        site.frames = [self.body(build, site, closed)]
        site.made, site.choices = site.frames[0].known, site.frames[0].chosen
        return site.frames[0].outs

    def body(self, build: Build, site: Site, closed: Any) -> Frame:
        """What is called, on the operands."""
        return build.frame(closed, site.ins, site.known, site.trained, site.chosen)

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
    """``remat`` with its policy, around the smaller function."""

    def call(self, cut: Cut, site: Site, crossing: Versions, at: At) -> list[Any]:
        def again(*arrays: Any) -> list[Any]:
            return [v.at(at) for v in run(cut, site.frames[0], crossing.values(arrays))]

        return self.bodies.around(site.eqn, crossing.arrays, [again])


class Observed(Rule):
    """An effect without results, such as printing or logging: it sees what stays."""

    def dims(self, build: Build, site: Site) -> Sequence[Dims]:
        return [terms.fresh(walk.aval(v).shape, "an effect gives it") for v in site.eqn.outvars]

    def values(self, cut: Cut, site: Site, ins: Sequence[Value]) -> list[Value]:
        found = site_bind(site, [v.at(NOWHERE) for v in ins])
        outs = [Value(cut, d, s, unknown) for d, s in zip(site.outs, site.states, strict=True)]
        for value, x in zip(outs, found, strict=True):
            value.known[NOWHERE] = x
        return outs


class Callback(Observed):
    """A callback that gives something back works on what it was written for; one that gives nothing observes."""

    def dims(self, build: Build, site: Site) -> Sequence[Dims]:
        return Rule.dims(self, build, site) if site.eqn.outvars else super().dims(build, site)
