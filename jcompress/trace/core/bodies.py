"""What holds bodies of equations: calls, loops, branches and meshes; where their inputs come from, and how they run.

Each says once which operands each body takes, what its results are made of, how often it runs, and how it runs anew
around other bodies. All readings go by that.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
from jax import lax
from jax.extend import core as jax_core

from jcompress.trace.core.kinds import Flow, Kinds, Reader
from jcompress.trace.core.layouts import local
from jcompress.trace.core.views import (
    Activation,
    Derived,
    Joined,
    Kind,
    View,
    computed,
    is_activation,
    join,
    peel,
    shards,
    spec_axes,
)

T = TypeVar("T")
Run = Callable[..., tuple[list[Any], Any]]
"""A body on values: its outputs, and whatever else was found while it ran."""
Add = Callable[[Any, Any], tuple[Any, Any]]
"""Totals and what one run found -> new totals, and what is left of that run."""


def _nothing(totals: Any, found: Any) -> tuple[None, None]:
    return None, None


class Bodies(Flow):
    """An equation that runs bodies of equations.

    Attributes:
      is_choice: whether one of the bodies runs, and not all of them.
    """

    is_choice = False

    def closed(self, eqn: jax_core.JaxprEqn) -> list[jax_core.ClosedJaxpr]:
        """The bodies."""
        raise NotImplementedError

    def times(self, eqn: jax_core.JaxprEqn) -> int | None:
        """How often they run; None if that is not known."""
        return 1

    def again(
        self,
        eqn: jax_core.JaxprEqn,
        values: Sequence[Any],
        runs: Sequence[Run],
        totals: Any = None,
        add: Add = _nothing,
    ) -> tuple[list[Any], Any, Any]:
        """The equation around other bodies: its results, the totals, and what was left (stacked, of a loop)."""
        raise NotImplementedError

    def around(self, eqn: jax_core.JaxprEqn, values: Sequence[Any], bodies: Sequence[Callable[..., Any]]) -> list[Any]:
        """The results of the equation around other bodies."""
        runs = [lambda *xs, body=body: (list(body(*xs)), None) for body in bodies]
        return self.again(eqn, values, runs, None, _nothing)[0]


class Call(Bodies):
    """A call of one function on the operands as they are."""

    def closed(self, eqn: jax_core.JaxprEqn) -> list[jax_core.ClosedJaxpr]:
        found = next(eqn.params[name] for name in ("jaxpr", "call_jaxpr", "fun_jaxpr") if name in eqn.params)
        return [found if isinstance(found, jax_core.ClosedJaxpr) else jax_core.ClosedJaxpr(found, ())]

    def bodies(self, eqn: jax_core.JaxprEqn, kinds: Sequence[Kind], reader: Reader) -> list[Any]:
        return [reader.body(self.closed(eqn)[0], kinds)]

    def results(self, eqn: jax_core.JaxprEqn, kinds: Sequence[Kind], bodies: Sequence[Any]) -> Kinds:
        return bodies[0].outs


class Custom(Call):
    """A function with derivatives of its own."""


class Remat(Call):
    """A function that is computed again in the backward pass."""

    def around(self, eqn: jax_core.JaxprEqn, values: Sequence[Any], bodies: Sequence[Callable[..., Any]]) -> list[Any]:
        keep = {name: eqn.params[name] for name in ("policy", "prevent_cse") if name in eqn.params}
        return jax.checkpoint(bodies[0], **keep)(*values)


class Scan(Bodies):
    """A loop over slices: constants, a carry, and what is scanned over."""

    def closed(self, eqn: jax_core.JaxprEqn) -> list[jax_core.ClosedJaxpr]:
        return [eqn.params["jaxpr"]]

    def times(self, eqn: jax_core.JaxprEqn) -> int | None:
        return eqn.params["length"]

    def parts(self, eqn: jax_core.JaxprEqn, values: Sequence[T]) -> tuple[Sequence[T], Sequence[T], Sequence[T]]:
        """Constants, carry, and what is scanned over."""
        if "num_consts" in eqn.params:
            consts, carry = eqn.params["num_consts"], eqn.params["num_carry"]
        else:  # since jax 0.12
            consts, carry = (len(list(part)) for part in eqn.params["ft_in"].unpack()[:2])
        return values[:consts], values[consts : consts + carry], values[consts + carry :]

    def bodies(self, eqn: jax_core.JaxprEqn, kinds: Sequence[Kind], reader: Reader) -> list[Any]:
        consts, carry, xs = self.parts(eqn, kinds)
        return [_settled(self.closed(eqn)[0], consts, carry, [peel(k, reader.loop) for k in xs], reader.deeper())]

    def results(self, eqn: jax_core.JaxprEqn, kinds: Sequence[Kind], bodies: Sequence[Any]) -> Kinds:
        (body,) = bodies
        carry = _after(self.parts(eqn, body.ins)[1], body.outs)
        return [*carry, *(computed(eqn.primitive.name, [k]) for k in body.outs[len(carry) :])]

    def again(
        self,
        eqn: jax_core.JaxprEqn,
        values: Sequence[Any],
        runs: Sequence[Run],
        totals: Any = None,
        add: Add = _nothing,
    ) -> tuple[list[Any], Any, Any]:
        (consts, carry, xs), p = self.parts(eqn, values), eqn.params

        def turn(state: Any, slices: Any) -> Any:
            now, so_far = state
            outs, found = runs[0](*consts, *now, *slices)
            so_far, left = add(so_far, found)
            return (list(outs[: len(now)]), so_far), (list(outs[len(now) :]), left)

        (last, totals), (ys, left) = lax.scan(
            turn, (list(carry), totals), list(xs), length=p["length"], reverse=p["reverse"], unroll=p["unroll"]
        )
        return [*last, *ys], totals, left


class While(Bodies):
    """A loop: constants of its condition, those of its body, and a carry."""

    def closed(self, eqn: jax_core.JaxprEqn) -> list[jax_core.ClosedJaxpr]:
        """The condition and the body."""
        return [eqn.params["cond_jaxpr"], eqn.params["body_jaxpr"]]

    def times(self, eqn: jax_core.JaxprEqn) -> int | None:
        return None

    def parts(self, eqn: jax_core.JaxprEqn, values: Sequence[T]) -> tuple[Sequence[T], Sequence[T], Sequence[T]]:
        """Constants of the condition, those of the body, and the carry."""
        test = eqn.params["cond_nconsts"]
        both = test + eqn.params["body_nconsts"]
        return values[:test], values[test:both], values[both:]

    def bodies(self, eqn: jax_core.JaxprEqn, kinds: Sequence[Kind], reader: Reader) -> list[Any]:
        (test, consts, carry), inner = self.parts(eqn, kinds), reader.deeper()
        condition, turn = self.closed(eqn)
        body = _settled(turn, consts, carry, [], inner)
        return [inner.body(condition, [*test, *_after(body.ins[len(consts) :], body.outs)]), body]

    def results(self, eqn: jax_core.JaxprEqn, kinds: Sequence[Kind], bodies: Sequence[Any]) -> Kinds:
        return _after(bodies[1].ins[len(self.parts(eqn, kinds)[1]) :], bodies[1].outs)

    def again(
        self,
        eqn: jax_core.JaxprEqn,
        values: Sequence[Any],
        runs: Sequence[Run],
        totals: Any = None,
        add: Add = _nothing,
    ) -> tuple[list[Any], Any, Any]:
        """What the condition finds is lost."""
        test, consts, carry = self.parts(eqn, values)

        def turn(state: Any) -> Any:
            outs, found = runs[1](*consts, *state[0])
            return list(outs), add(state[1], found)[0]

        last, totals = lax.while_loop(lambda state: runs[0](*test, *state[0])[0][0], turn, (list(carry), totals))
        return list(last), totals, None


class Cond(Bodies):
    """One of several branches."""

    is_choice = True

    def closed(self, eqn: jax_core.JaxprEqn) -> list[jax_core.ClosedJaxpr]:
        return list(eqn.params["branches"])

    def bodies(self, eqn: jax_core.JaxprEqn, kinds: Sequence[Kind], reader: Reader) -> list[Any]:
        return [reader.deeper().body(branch, kinds[1:]) for branch in self.closed(eqn)]

    def results(self, eqn: jax_core.JaxprEqn, kinds: Sequence[Kind], bodies: Sequence[Any]) -> Kinds:
        columns = zip(*(body.outs for body in bodies), strict=True)
        return [self._chosen(join(eqn.primitive.name, column), kinds[0], eqn) for column in columns]

    def _chosen(self, kind: Kind, index: Kind, eqn: jax_core.JaxprEqn) -> Kind:
        """What an activation chose is looked up; a parameter that every branch gives stays one."""
        if not is_activation(index) or isinstance(kind, (View, Joined)):
            return kind
        if isinstance(kind, Derived):
            return dataclasses.replace(kind, lookup=True)
        return computed(eqn.primitive.name, [kind, index])

    def again(
        self,
        eqn: jax_core.JaxprEqn,
        values: Sequence[Any],
        runs: Sequence[Run],
        totals: Any = None,
        add: Add = _nothing,
    ) -> tuple[list[Any], Any, Any]:
        outs, found = lax.switch(values[0], [_listed(run) for run in runs], *values[1:])
        return outs, *add(totals, found)


class ShardMap(Bodies):
    """A body on every device, each with its part of the operands."""

    def is_read(self, eqn: jax_core.JaxprEqn) -> bool:
        """Whether this version of jax can run it anew."""
        return "in_specs" in eqn.params and hasattr(jax, "shard_map")

    def closed(self, eqn: jax_core.JaxprEqn) -> list[jax_core.ClosedJaxpr]:
        return [jax_core.ClosedJaxpr(getattr(eqn.params["jaxpr"], "jaxpr", eqn.params["jaxpr"]), ())]

    def times(self, eqn: jax_core.JaxprEqn) -> int | None:
        """Once on each device."""
        return math.prod(eqn.params["mesh"].shape.values())

    def manual(self, eqn: jax_core.JaxprEqn) -> frozenset[str]:
        """The mesh axes that it maps over."""
        return frozenset(eqn.params.get("newly_manual_axes") or eqn.params["mesh"].axis_names)

    def bodies(self, eqn: jax_core.JaxprEqn, kinds: Sequence[Kind], reader: Reader) -> list[Any]:
        (closed,), name = self.closed(eqn), eqn.primitive.name
        specs = eqn.params.get("in_specs", [()] * len(kinds))
        held = [_held(k, spec, v, name) for k, spec, v in zip(kinds, specs, closed.jaxpr.invars, strict=True)]
        return [reader.deeper().body(closed, held)]

    def results(self, eqn: jax_core.JaxprEqn, kinds: Sequence[Kind], bodies: Sequence[Any]) -> Kinds:
        found, manual = [computed(eqn.primitive.name, [k]) for k in bodies[0].outs], self.manual(eqn)
        return [
            dataclasses.replace(k, shards=shards([k]) - manual) if isinstance(k, (Activation, Derived)) else None
            for k in found
        ]

    def again(
        self,
        eqn: jax_core.JaxprEqn,
        values: Sequence[Any],
        runs: Sequence[Run],
        totals: Any = None,
        add: Add = _nothing,
    ) -> tuple[list[Any], Any, Any]:
        """What is found must be the same on all devices."""
        p = eqn.params
        mapped = jax.shard_map(
            _listed(runs[0]),
            mesh=p["mesh"],
            in_specs=tuple(p["in_specs"]),
            out_specs=(list(p["out_specs"]), jax.sharding.PartitionSpec()),
            axis_names=self.manual(eqn),
            check_vma=p.get("check_vma", True),
        )
        outs, found = mapped(*values)
        return outs, *add(totals, found)


def _listed(run: Run) -> Run:
    """A body whose outputs come as a list."""

    def listed(*xs: Any) -> tuple[list[Any], Any]:
        outs, found = run(*xs)
        return list(outs), found

    return listed


def _held(kind: Kind, spec: Any, v: Any, name: str) -> Kind:
    """What one device holds of a value."""
    if isinstance(kind, View):
        part = local(kind, spec, v.aval.shape)
        return computed(name, [kind]) if part is None else part
    if isinstance(kind, Joined):
        return computed(kind.name, [kind])
    return kind if kind is None else dataclasses.replace(kind, shards=kind.shards | spec_axes(spec))


def _after(carry: Sequence[Kind], outs: Sequence[Kind]) -> Kinds:
    """The kinds of a carry, before or after a turn."""
    return [join("carry", pair) for pair in zip(carry, outs, strict=False)]


def _settled(
    closed: jax_core.ClosedJaxpr,
    before: Sequence[Kind],
    carry: Sequence[Kind],
    after: Sequence[Kind],
    reader: Reader,
) -> Any:
    """The body of a loop, with kinds of the carry that no turn changes; a parameter must be carried on as it is."""
    outvars, invars = closed.jaxpr.outvars, closed.jaxpr.invars
    still = [outvars[i] is invars[len(before) + i] for i in range(len(carry))]
    now = [
        k if s or not isinstance(k, (View, Joined)) else computed("carry", [k])
        for k, s in zip(carry, still, strict=True)
    ]
    while True:
        body = reader.body(closed, [*before, *now, *after])
        joined = _after(now, body.outs)
        if all(map(_alike, joined, now)):
            return body
        now = joined


def _alike(a: Kind, b: Kind) -> bool:
    """Whether two kinds differ at most in how many products came before."""
    if isinstance(a, Derived) and isinstance(b, Derived):
        return dataclasses.replace(a, depth=b.depth) == b
    return a == b or (isinstance(a, Activation) and isinstance(b, Activation) and a.shards == b.shards)
