"""Loops and branches: where the inputs of their bodies come from, what their results are, and how they run anew."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

from jax import lax
from jax.extend import core as jax_core

from jcompress.trace.core.bodies import Add, Bodies, Run, listed_outputs, nothing
from jcompress.trace.core.kinds import Kinds, Reader
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
)

T = TypeVar("T")


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
        add: Add = nothing,
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
        add: Add = nothing,
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
        add: Add = nothing,
    ) -> tuple[list[Any], Any, Any]:
        outs, found = lax.switch(values[0], [listed_outputs(run) for run in runs], *values[1:])
        return outs, *add(totals, found)


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
