"""Loops and branches: where the inputs of their bodies come from, what their results are, and how they run anew."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax.numpy as jnp
from jax import lax
from jax.extend import core as jax_core

from jcompress.trace.core import places
from jcompress.trace.core.bodies import Add, Bodies, Run, listed_outputs, nothing
from jcompress.trace.core.kinds import Kinds, Reader, at_places, places_of
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
        slices = [_slice(k, reader.loop) for k in xs]
        return [_settled(self.closed(eqn)[0], consts, carry, slices, reader.deeper())]

    def results(self, eqn: jax_core.JaxprEqn, kinds: Sequence[Kind], bodies: Sequence[Any]) -> Kinds:
        (body,), name, n = bodies, eqn.primitive.name, eqn.params["length"]
        carry = _after(self.parts(eqn, body.ins)[1], body.outs, body.loop - 1)
        ys = [
            at_places(computed(name, [k]), places.stacked(places_of(k, v.aval.shape), body.loop - 1, n))
            for k, v in zip(body.outs[len(carry) :], body.closed.jaxpr.outvars[len(carry) :], strict=True)
        ]
        return [*carry, *ys]

    def again(
        self,
        eqn: jax_core.JaxprEqn,
        values: Sequence[Any],
        runs: Sequence[Run],
        totals: Any = None,
        add: Add = nothing,
        told: Callable[[Any], None] | None = None,
    ) -> tuple[list[Any], Any, Any]:
        """As for all; ``told`` is called inside with the number of the turn."""
        (consts, carry, xs), p = self.parts(eqn, values), eqn.params

        def turn(state: Any, sliced: Any) -> Any:
            (now, so_far), (slices, i) = state, sliced
            if told is not None:
                told(i)
            outs, found = runs[0](*consts, *now, *slices)
            so_far, left = add(so_far, found)
            return (list(outs[: len(now)]), so_far), (list(outs[len(now) :]), left)

        (last, totals), (ys, left) = lax.scan(
            turn,
            (list(carry), totals),
            (list(xs), None if told is None else jnp.arange(p["length"])),
            length=p["length"],
            reverse=p["reverse"],
            unroll=p["unroll"],
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
        return [inner.body(condition, [*test, *_after(body.ins[len(consts) :], body.outs, body.loop)]), body]

    def results(self, eqn: jax_core.JaxprEqn, kinds: Sequence[Kind], bodies: Sequence[Any]) -> Kinds:
        return _after(bodies[1].ins[len(self.parts(eqn, kinds)[1]) :], bodies[1].outs, bodies[1].loop)

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
        return [self._chosen(_either(eqn.primitive.name, column), kinds[0], eqn) for column in columns]

    def _chosen(self, kind: Kind, index: Kind, eqn: jax_core.JaxprEqn) -> Kind:
        """What an activation chose is looked up; a parameter that every branch gives stays one."""
        if not is_activation(index) or isinstance(kind, (View, Joined)):
            return kind
        if isinstance(kind, Derived):
            return dataclasses.replace(kind, lookup=True)
        made = computed(eqn.primitive.name, [kind, index])
        return at_places(made, kind.places) if isinstance(kind, Activation) else made

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


def _slice(kind: Kind, loop: int) -> Kind:
    """One slice of a value, as the body of a loop sees it."""
    found = peel(kind, loop)
    return at_places(found, places.peeled(found.places, loop)) if isinstance(found, (Activation, Derived)) else found


def _either(name: str, kinds: Sequence[Kind]) -> Kind:
    """What a value is that may be any of these."""
    found = join(name, kinds)
    views = [k.places for k in kinds if isinstance(k, (Activation, Derived)) and is_activation(k)]
    return at_places(found, places.agreed(views))


def _after(carry: Sequence[Kind], outs: Sequence[Kind], loop: int) -> Kinds:
    """The kinds of a carry, before or after a turn."""
    pairs = [(k, _left(out, loop)) for k, out in zip(carry, outs, strict=False)]
    return [_either("carry", pair) for pair in pairs]


def _in_turn(kind: Kind, slices: Sequence[Kind], loop: int) -> Kind:
    """What a loop over positions carries stands, in a turn, at the position of the turn's slice."""
    found = [k.places for k in slices if isinstance(k, (Activation, Derived)) and k.places is not None]
    atoms = next((dict(view.scanned)[loop] for view in found if loop in dict(view.scanned)), None)
    if atoms is None or not isinstance(kind, (Activation, Derived)) or kind.places is None:
        return kind
    return at_places(kind, places.around([places.left(kind.places, loop), places.turn(loop, atoms)], kind.places.dims))


def _left(kind: Kind, loop: int) -> Kind:
    """A value outside of a loop."""
    if not isinstance(kind, (Activation, Derived)) or kind.places is None:
        return kind
    return at_places(kind, places.left(kind.places, loop))


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
    loop = reader.loop - 1
    now = [
        k if s or not isinstance(k, (View, Joined)) else computed("carry", [k])
        for k, s in zip(carry, still, strict=True)
    ]
    now = [_in_turn(k, after, loop) for k in now]
    while True:
        body = reader.body(closed, [*before, *now, *after])
        joined = [_in_turn(k, after, loop) for k in _after([_left(k, loop) for k in now], body.outs, loop)]
        if all(map(_alike, joined, now)):
            return body
        now = joined


def _alike(a: Kind, b: Kind) -> bool:
    """Whether two kinds differ at most in how many products came before."""
    if isinstance(a, Derived) and isinstance(b, Derived):
        return dataclasses.replace(a, depth=b.depth) == b
    if isinstance(a, Activation) and isinstance(b, Activation):
        return a.shards == b.shards and a.places == b.places
    return a == b
