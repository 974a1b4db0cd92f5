"""What each value of a function has to do with the parameters, read off its equations; nothing is run."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from jax.extend import core as jax_core

from jcompress.trace.core import walk
from jcompress.trace.core.views import (
    Activation,
    Derived,
    Joined,
    Kind,
    View,
    computed,
    has_parameters,
    join,
    laid_out,
    peel,
)

Kinds = list[Kind]


def of_jaxpr(jaxpr: jax_core.Jaxpr, kinds: Sequence[Kind]) -> Kinds:
    """The kinds of the outputs, given those of the inputs."""
    env: dict = dict.fromkeys(jaxpr.constvars)
    env.update(zip(jaxpr.invars, kinds, strict=True))
    for eqn in jaxpr.eqns:
        env.update(zip(eqn.outvars, of_equation(eqn, [_read(env, v) for v in eqn.invars]), strict=True))
    return [_read(env, v) for v in jaxpr.outvars]


def _read(env: dict, v: object) -> Kind:
    return None if isinstance(v, jax_core.Literal) else env[v]


def of_equation(eqn: jax_core.JaxprEqn, kinds: Sequence[Kind]) -> Kinds:
    """The kinds of an equation's results."""
    name, n = eqn.primitive.name, len(eqn.outvars)
    if not any(map(has_parameters, kinds)):
        return [computed(name, kinds)] * n
    if (called := walk.called(eqn)) is not None:
        return of_jaxpr(called.jaxpr, kinds)
    if name == "scan":
        consts, carry, xs = scanned(eqn, kinds)
        outs = of_jaxpr(eqn.params["jaxpr"].jaxpr, [*consts, *carry, *xs])
        return [*carry, *(computed(name, [k]) for k in outs[len(carry) :])]
    if name == "while":
        return looped(eqn, kinds)[2]
    if name == "cond":
        columns = zip(*(of_jaxpr(b.jaxpr, kinds[1:]) for b in eqn.params["branches"]), strict=True)
        return [chosen(join(name, column), kinds[0]) for column in columns]
    if name in ("gather", "dynamic_slice") and has_parameters(kinds[0]):
        made = computed(name, kinds[:1])
        return [chosen(made, computed(name, kinds[1:]))] * n
    return laid_out(eqn, kinds) or [computed(name, kinds)] * n


def chosen(kind: Kind, index: Kind) -> Kind:
    """What an index picks: entries of a parameter that an activation chose are looked up."""
    if not isinstance(index, Activation) or isinstance(kind, (View, Joined)):
        return kind
    return dataclasses.replace(kind, lookup=True) if isinstance(kind, Derived) else computed("cond", [kind, index])


def scanned(eqn: jax_core.JaxprEqn, kinds: Sequence[Kind]) -> tuple[Kinds, Kinds, Kinds]:
    """What the body of a ``scan`` sees: constants, carry, and slices."""
    n, carried = walk.scan_parts(eqn)
    split = n + carried
    slices = [peel(k, 0) for k in kinds[split:]]
    consts = list(kinds[:n])
    return consts, _settled(eqn.params["jaxpr"].jaxpr, consts, list(kinds[n:split]), slices), slices


def looped(eqn: jax_core.JaxprEqn, kinds: Sequence[Kind]) -> tuple[Kinds, Kinds, Kinds]:
    """What a ``while`` sees: constants of its condition, those of its body, and the carry."""
    a = eqn.params["cond_nconsts"]
    b = a + eqn.params["body_nconsts"]
    consts = list(kinds[a:b])
    return list(kinds[:a]), consts, _settled(eqn.params["body_jaxpr"].jaxpr, consts, list(kinds[b:]), [])


def _settled(body: jax_core.Jaxpr, before: Kinds, carry: Kinds, after: Kinds) -> Kinds:
    """The kinds of a carry that hold before and after each turn; a parameter carried on is no view of it."""
    carry = [computed("carry", [k]) if isinstance(k, (View, Joined)) else k for k in carry]
    while True:
        outs = of_jaxpr(body, [*before, *carry, *after])
        joined = [join("carry", pair) for pair in zip(carry, outs[: len(carry)], strict=True)]
        if joined == carry:
            return carry
        carry = joined
