"""Runs a function equation by equation and records what meets each parameter in a product."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

from jax import lax

from jcompress.trace.core import walk
from jcompress.trace.core.bodies import Bodies, Call
from jcompress.trace.core.flow import Body, Step
from jcompress.trace.core.kinds import Contraction, Lookup
from jcompress.trace.core.views import (
    Activation,
    Derived,
    Joined,
    Kind,
    View,
    is_activation,
    parameters,
    shards,
)
from jcompress.trace.recording import loops, meetings
from jcompress.trace.recording.meetings import UnreadError
from jcompress.trace.recording.tape import Tape


def evaluate(body: Body, values: Sequence[Any], tape: Tape) -> list[Any]:
    """The outputs of a body, with every product of a parameter recorded on the tape."""
    return body.run(values, lambda step, known: _equation(step, known, tape))


def _equation(step: Step, values: list[Any], tape: Tape) -> list[Any]:
    if step.has_parameters and isinstance(step.flow, Call):
        return evaluate(step.bodies[0], values, tape)
    if step.has_parameters and isinstance(step.flow, Bodies):
        return loops.record(evaluate, step, values, tape)
    outs = walk.bind(step.eqn, values)
    if step.has_parameters:
        _recorded(step, values, outs, tape)
    return outs


def _recorded(step: Step, values: list[Any], outs: list[Any], tape: Tape) -> None:
    if isinstance(step.flow, Contraction):
        _product(step, values, outs[0], tape)
    elif isinstance(step.flow, Lookup):
        _lookup(step, values, tape)
    elif not step.flow.meets and any(isinstance(k, Activation) for k in step.ins):
        for path in parameters(step.ins, lookups=False):
            tape.found.cannot(path, f"it meets an activation in {step.eqn.primitive.name!r}, which is not read")


def _product(step: Step, values: list[Any], y: Any, tape: Tape) -> None:
    for side in (0, 1):
        mine, other = step.ins[side], step.ins[1 - side]
        if isinstance(mine, Derived) and _meets(mine, other):
            for path, reason in mine.reasons:
                tape.found.cannot(path, f"it passes through {reason!r} before it meets an activation")
        if isinstance(mine, (View, Joined)) and isinstance(other, (Activation, Derived)):
            parts = _apart(step, mine, side, y)
            for view, z in parts:
                tape.product(step, view, side, values[1 - side], z)
            if not parts:
                for path in parameters([mine], lookups=True):
                    tape.found.cannot(path, "it is joined with others along an axis that is contracted or grouped")


def _apart(step: Step, kind: View | Joined, side: int, y: Any) -> list[tuple[View, Any]]:
    """Each parameter of a product with what it gives; none where they are not side by side in the result."""
    if isinstance(kind, View):
        return [(kind, y)]
    assert isinstance(step.flow, Contraction)
    axis = step.flow.of(step.eqn, side).outputs(kind.dim)
    if axis is None:
        return []
    ends = list(itertools.accumulate(kind.sizes))
    pieces = [lax.slice_in_dim(y, end - n, end, axis=axis) for n, end in zip(kind.sizes, ends, strict=True)]
    return list(zip(kind.parts, pieces, strict=True))


def _meets(mine: Derived, other: Kind) -> bool:
    """Whether a product of these is one of a parameter that cannot be read."""
    return isinstance(other, Activation) if mine.lookup else is_activation(other) or isinstance(other, (View, Joined))


def _lookup(step: Step, values: list[Any], tape: Tape) -> None:
    """Rows of a parameter, chosen by the other operands."""
    view, found = step.ins[0], tape.found
    assert isinstance(step.flow, Lookup)
    if not (step.flow.counts and isinstance(view, View) and any(map(is_activation, step.ins[1:]))):
        return
    found.meets(view, *step.ins)
    if "counts" in found.wanted.get(view.path, frozenset()):
        try:
            use, counts = meetings.of_gather(step.eqn, view, values[1])
            use = dataclasses.replace(use, shards=tuple(sorted(shards(step.ins[1:]))))
            tape.add(use, {"counts": counts.reshape(*[1] * len(use.lead), -1)})
        except UnreadError as reason:
            found.notes[view.path] = f"no counts: {reason}"
