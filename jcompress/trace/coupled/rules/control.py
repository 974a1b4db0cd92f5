"""The rules of loops, branches and meshes. A loop stays a loop; only what stays crosses its border."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jcompress.trace.core import bodies, loops, walk
from jcompress.trace.coupled import dims as terms
from jcompress.trace.coupled.building import Build
from jcompress.trace.coupled.dims import Dim, Dims
from jcompress.trace.coupled.frames import NOWHERE, At, Cut, Rule, Site, Value, read_states
from jcompress.trace.coupled.rules.calls import demoted, run_arrays
from jcompress.trace.coupled.states import State, free_leaves, joined


class Holds(Rule):
    """An equation that runs bodies, and stays what it is around the smaller ones."""

    reads = False

    def __init__(self, bodies: bodies.Bodies) -> None:
        self.bodies = bodies

    def run(self, cut: Cut, site: Site, ins: Sequence[Value], at: At) -> list[Any]:
        smaller = [lambda *xs, frame=frame: run_arrays(cut, frame, xs) for frame in site.frames]
        return self.bodies.around(site.eqn, [v.at(NOWHERE) for v in ins], smaller)


def _fixpoint(read: Callable[[list[State]], Sequence[State]], carry: list[State], dims: Sequence[Dims]) -> list[State]:
    """The states of a loop's carry that hold before and after each turn."""
    while True:
        after = [joined(pair, d) for *pair, d in zip(carry, read(carry), dims, strict=True)]
        after = demoted(after, dims)
        if [_key(s, d) for s, d in zip(after, dims, strict=True)] == [
            _key(s, d) for s, d in zip(carry, dims, strict=True)
        ]:
            return carry
        carry = after


def _key(state: State, dims: Dims) -> Any:
    return state.constant is not None, [state.at(leaf) for leaf in free_leaves(dims)]


class Scan(Holds):
    """The carry keeps its dimensions from turn to turn; what is scanned over loses its first."""

    bodies: loops.Scan

    def dims(self, build: Build, site: Site) -> Sequence[Dims]:
        consts, carry, xs = self.bodies.parts(site.eqn, site.ins)
        length = Dim(site.params["length"], pinned="a scan runs along it")
        terms.unify_all((length,), *(x[:1] for x in xs))
        (closed,) = self.bodies.closed(site.eqn)
        frame = build.frame(closed, [*consts, *carry, *(x[1:] for x in xs)])
        site.frames = [frame]
        n = len(carry)
        for a, b in zip(carry, frame.outs[:n], strict=True):
            terms.unify_all(a, b)
        outs = [terms.alias(d) for d in carry]
        return [*outs, *((Dim(length.size, "link", (length,)), *y) for y in frame.outs[n:])]

    def states(self, site: Site, ins: Sequence[State]) -> Sequence[State]:
        (frame,), (consts, carry, xs) = site.frames, self.bodies.parts(site.eqn, demoted(ins, site.ins))
        n = len(carry)

        def read(now: list[State]) -> Sequence[State]:
            return read_states(frame, [*consts, *now, *xs])[:n]

        carry = _fixpoint(read, list(carry), frame.ins[len(consts) : len(consts) + n])
        outs = read_states(frame, [*consts, *carry, *xs])
        return demoted([*carry, *outs[n:]], site.outs)


class While(Holds):
    """The carry keeps its dimensions from turn to turn."""

    bodies: loops.While

    def dims(self, build: Build, site: Site) -> Sequence[Dims]:
        test, body, carry = self.bodies.parts(site.eqn, site.ins)
        condition, turn = self.bodies.closed(site.eqn)
        site.frames = [build.frame(condition, [*test, *carry]), build.frame(turn, [*body, *carry])]
        for a, b in zip(carry, site.frames[1].outs, strict=True):
            terms.unify_all(a, b)
        return [terms.alias(d) for d in carry]

    def states(self, site: Site, ins: Sequence[State]) -> Sequence[State]:
        test, body, carry = self.bodies.parts(site.eqn, demoted(ins, site.ins))
        found = _fixpoint(lambda now: read_states(site.frames[1], [*body, *now]), list(carry), site.outs)
        read_states(site.frames[1], [*body, *found])
        read_states(site.frames[0], [*test, *found])
        return demoted(found, site.outs)


class Cond(Holds):
    """All branches give values of the same dimensions."""

    def dims(self, build: Build, site: Site) -> Sequence[Dims]:
        site.frames = [build.frame(branch, site.ins[1:]) for branch in self.bodies.closed(site.eqn)]
        for outs in zip(*(frame.outs for frame in site.frames), strict=True):
            terms.unify_all(*outs)
        return [terms.alias(d) for d in site.frames[0].outs]

    def states(self, site: Site, ins: Sequence[State]) -> Sequence[State]:
        ins = demoted(ins[1:], site.ins[1:])
        found = [read_states(frame, ins) for frame in site.frames]
        return demoted([joined(s, d) for s, d in zip(zip(*found, strict=True), site.outs, strict=True)], site.outs)


class ShardMap(Holds):
    """The body sees the axes that are not divided; those that are stay."""

    bodies: bodies.ShardMap

    def dims(self, build: Build, site: Site) -> Sequence[Dims]:
        if not self.bodies.is_read(site.eqn):
            return super().dims(build, site)
        (closed,) = self.bodies.closed(site.eqn)
        ins = self._across(site.ins, site.params["in_specs"], closed.jaxpr.invars)
        site.frames = [build.frame(closed, ins)]
        return self._across(site.frames[0].outs, site.params["out_specs"], site.eqn.outvars)

    def _across(self, values: Sequence[Dims], specs: Sequence[Any], variables: Sequence[Any]) -> list[Dims]:
        """The dimensions on the other side of the border; those that are divided are others there."""
        reason, found = "shard_map divides it", []
        for value, spec, v in zip(values, specs, variables, strict=True):
            divided = [i < len(spec) and spec[i] is not None for i in range(len(value))]
            terms.pin([d for d, yes in zip(value, divided, strict=True) if yes], reason)
            sizes = zip(walk.aval(v).shape, value, divided, strict=True)
            found.append(tuple(Dim(n, pinned=reason) if yes else d for n, d, yes in sizes))
        return found

    def states(self, site: Site, ins: Sequence[State]) -> Sequence[State]:
        if not site.frames:
            return super().states(site, ins)
        return demoted(read_states(site.frames[0], demoted(ins, site.ins)), site.outs)

    def run(self, cut: Cut, site: Site, ins: Sequence[Value], at: At) -> list[Any]:
        return super().run(cut, site, ins, at) if site.frames else Rule.run(self, cut, site, ins, at)
