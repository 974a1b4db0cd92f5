"""The rules of primitives that call a function once.

What is called keeps its kind: ``remat`` and ``shard_map`` stay what they were.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jax.extend import core as jax_core

from jcompress.trace.core import walk
from jcompress.trace.coupled import dims as terms
from jcompress.trace.coupled.dims import Dim, Dims
from jcompress.trace.coupled.frames import (
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
    free_leaves,
    read_states,
    run,
)  # fmt: skip


def demoted(states: Sequence[State], dims: Sequence[Dims]) -> list[State]:
    """For values of which only what stays crosses a call: a cut slice that is not zero is not known inside."""
    found = []
    for state, value in zip(states, dims, strict=True):
        held = {x: Hold.ZERO if state.at(x) is Hold.ZERO else Hold.VARIED for x in free_leaves(value)}
        found.append(State(0 if state.constant is not None and state.constant == 0 else None, held))
    return found


def run_arrays(cut: Cut, frame: Frame, arrays: Sequence[Any]) -> list[Any]:
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
    """``remat`` with its policy, around the smaller function."""

    def call(self, cut: Cut, site: Site, crossing: Versions, at: At) -> list[Any]:
        params = site.params
        keep = {name: params[name] for name in ("policy", "prevent_cse") if name in params}

        def again(*arrays: Any) -> list[Any]:
            return [v.at(at) for v in run(cut, site.frames[0], crossing.values(arrays))]

        return jax.checkpoint(again, **keep)(*crossing.arrays)


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
        return demoted(read_states(site.frames[0], demoted(ins, site.ins)), site.outs)

    def run(self, cut: Cut, site: Site, ins: Sequence[Value], at: At) -> list[Any]:
        if not site.frames:
            return super().run(cut, site, ins, at)
        p = site.params
        names = frozenset(p.get("newly_manual_axes") or p["mesh"].axis_names)
        mapped = jax.shard_map(
            lambda *arrays: run_arrays(cut, site.frames[0], arrays),
            mesh=p["mesh"],
            in_specs=tuple(p["in_specs"]),
            out_specs=list(p["out_specs"]),
            axis_names=names,
            check_vma=p.get("check_vma", True),
        )
        return list(mapped(*[v.at(NOWHERE) for v in ins]))
