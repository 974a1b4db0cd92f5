"""The rules of primitives that compute entry by entry."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jcompress.trace.core import walk
from jcompress.trace.coupled import dims as terms
from jcompress.trace.coupled.building import Build, value_of
from jcompress.trace.coupled.dims import Dim, Dims
from jcompress.trace.coupled.frames import Rule, Site, site_bind
from jcompress.trace.coupled.states import Hold, State, free_leaves

Zero = Literal["any", "first", "cases", "computed"]


class Elementwise(Rule):
    """Operands of one shape, up to scalars and lengths of 1; each leaf of the result is that of the operands.

    Args:
      zero: when a slice of the result is zero: if one of ``any`` operand is (a product), if that of the ``first`` is (a
        quotient), if those of all ``cases`` are (a choice by the first operand); or what is ``computed`` from zeros and
        constants is.
    """

    reads = False

    def __init__(self, zero: Zero = "computed") -> None:
        self.zero = zero

    def dims(self, build: Build, site: Site) -> Sequence[Dims]:
        (out,) = site.eqn.outvars
        shape, found = walk.aval(out).shape, []
        for axis, n in enumerate(shape):
            meet = [v[axis] for v in site.ins if len(v) == len(shape) and v[axis].size == n]
            for d in meet[1:]:
                terms.unify(meet[0], d)
            found.append(meet[0] if meet else terms.Dim(n))
        # The result of one operand is still a weight if the operand is; that of several is not.
        return [tuple(found) if len(site.ins) == 1 else terms.alias(found)]

    def states(self, site: Site, ins: Sequence[State]) -> Sequence[State]:
        known = [s.constant for s in ins]
        if None not in known:
            return [State(_on_numbers(site, known))]
        return [State(held={leaf: self._held(site, ins, leaf) for leaf in free_leaves(site.outs[0])})]

    def _held(self, site: Site, ins: Sequence[State], leaf: Dim) -> Hold:
        held = [s.at(leaf) for s in ins]
        zero = [h is Hold.ZERO for h in held]
        if {"any": any(zero), "first": zero[0], "cases": all(zero[1:])}.get(self.zero, False):
            return Hold.ZERO
        if any(zero) and all(z or s.constant is not None for z, s in zip(zero, ins, strict=True)):
            numbers = [0 if z else s.constant for z, s in zip(zero, ins, strict=True)]
            return Hold.ZERO if _on_numbers(site, numbers) == 0 else Hold.SAME
        return Hold.VARIED if Hold.VARIED in held else Hold.SAME


class Equal(Elementwise):
    """Where a position that was chosen is compared with all of them, each of those stands for what is chosen."""

    def dims(self, build: Build, site: Site) -> Sequence[Dims]:
        (found,) = super().dims(build, site)
        for mine, other in ((0, 1), (1, 0)):
            known = site.known[other]
            if site.chosen[mine] and known is not None and (axis := _counted(value_of(known))) is not None:
                d = found[axis]
                build.experts += [(choice, d) for choice in site.chosen[mine] if choice.size == d.size]
        return [found]


def _counted(x: np.ndarray | None) -> int | None:
    """The axis along which an array counts from 0, if it does nothing else."""
    if x is None or x.size < 2 or x.size != max(x.shape):
        return None
    axis = x.shape.index(x.size)
    return axis if (x.reshape(-1) == np.arange(x.size)).all() else None


def _on_numbers(site: Site, numbers: Sequence[Any]) -> Any:
    """The value of an elementwise equation on scalars."""
    with jax.ensure_compile_time_eval():
        scalars = [jnp.asarray(x, walk.aval(v).dtype) for x, v in zip(numbers, site.eqn.invars, strict=True)]
        return np.asarray(site_bind(site, scalars)[0])[()]


class Identity(Rule):
    """Results that are the operands, or the operands of several devices together."""

    reads = False

    def dims(self, build: Build, site: Site) -> Sequence[Dims]:
        return site.ins

    def states(self, site: Site, ins: Sequence[State]) -> Sequence[State]:
        return ins
