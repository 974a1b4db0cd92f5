"""The rules of loops and branches. A loop stays a loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax

from jcompress.trace.core import walk
from jcompress.trace.coupled import dims as terms
from jcompress.trace.coupled.dims import Dim, Dims
from jcompress.trace.coupled.frames import (
    NOWHERE,
    At,
    Build,
    Cut,
    Rule,
    Site,
    State,
    Value,
    free_leaves,
    joined,
    read_states,
)  # fmt: skip
from jcompress.trace.coupled.rules.calls import demoted, run_arrays


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


class Scan(Rule):
    """The carry keeps its dimensions from turn to turn; what is scanned over loses its first."""

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
        (frame,), (consts, carry, xs) = site.frames, self._parts(site, demoted(ins, site.ins))
        n = len(carry)

        def read(now: list[State]) -> Sequence[State]:
            return read_states(frame, [*consts, *now, *xs])[:n]

        carry = _fixpoint(read, list(carry), frame.ins[len(consts) : len(consts) + n])
        outs = read_states(frame, [*consts, *carry, *xs])
        return demoted([*carry, *outs[n:]], site.outs)

    def run(self, cut: Cut, site: Site, ins: Sequence[Value], at: At) -> list[Any]:
        consts, carry, xs = self._parts(site, [v.at(NOWHERE) for v in ins])
        n, params = len(carry), site.params

        def body(now: Sequence[Any], x: Sequence[Any]) -> Any:
            outs = run_arrays(cut, site.frames[0], [*consts, *now, *x])
            return outs[:n], outs[n:]

        last, ys = jax.lax.scan(
            body, list(carry), list(xs), length=params["length"], reverse=params["reverse"], unroll=params["unroll"]
        )
        return [*last, *ys]


class While(Rule):
    """The carry keeps its dimensions from turn to turn."""

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
        test, body, carry = self._parts(site, demoted(ins, site.ins))
        found = _fixpoint(lambda now: read_states(site.frames[1], [*body, *now]), list(carry), site.outs)
        read_states(site.frames[1], [*body, *found])
        read_states(site.frames[0], [*test, *found])
        return demoted(found, site.outs)

    def run(self, cut: Cut, site: Site, ins: Sequence[Value], at: At) -> list[Any]:
        test, body, carry = self._parts(site, [v.at(NOWHERE) for v in ins])
        return jax.lax.while_loop(
            lambda now: run_arrays(cut, site.frames[0], [*test, *now])[0],
            lambda now: run_arrays(cut, site.frames[1], [*body, *now]),
            list(carry),
        )


class Cond(Rule):
    """All branches give values of the same dimensions."""

    def dims(self, build: Build, site: Site) -> Sequence[Dims]:
        site.frames = [build.frame(branch, site.ins[1:]) for branch in site.params["branches"]]
        for outs in zip(*(frame.outs for frame in site.frames), strict=True):
            terms.unify_all(*outs)
        return [terms.alias(d) for d in site.frames[0].outs]

    def states(self, site: Site, ins: Sequence[State]) -> Sequence[State]:
        ins = demoted(ins[1:], site.ins[1:])
        found = [read_states(frame, ins) for frame in site.frames]
        return demoted([joined(s, d) for s, d in zip(zip(*found, strict=True), site.outs, strict=True)], site.outs)

    def run(self, cut: Cut, site: Site, ins: Sequence[Value], at: At) -> list[Any]:
        index, *arrays = (v.at(NOWHERE) for v in ins)
        branches = [lambda *x, frame=frame: run_arrays(cut, frame, x) for frame in site.frames]
        return jax.lax.switch(index, branches, *arrays)
