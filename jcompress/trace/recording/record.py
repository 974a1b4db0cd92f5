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
    Joined,
    View,
    parameters,
    shards,
)
from jcompress.trace.recording import loops, meetings, roles
from jcompress.trace.recording.meetings import UnreadError
from jcompress.trace.recording.tape import Tape


def evaluate(body: Body, values: Sequence[Any], tape: Tape) -> list[Any]:
    """The outputs of a body, with every product of a parameter recorded on the tape."""
    return body.run(values, lambda step, known: _equation(step, known, tape))


def _equation(step: Step, values: list[Any], tape: Tape) -> list[Any]:
    is_masked = tape.found.mask is not None
    if (step.has_parameters or is_masked) and isinstance(step.flow, Call):
        return evaluate(step.bodies[0], values, tape)
    if step.has_parameters and isinstance(step.flow, Bodies):
        return loops.record(evaluate, step, values, tape)
    outs = walk.bind(step.eqn, values)
    if is_masked and isinstance(step.flow, Lookup):
        tape.found.look_up(step, values)
    if step.has_parameters and isinstance(step.flow, Contraction):
        return [_product(step, values, outs[0], tape)]
    if step.has_parameters:
        _recorded(step, values, tape)
    return outs


def _recorded(step: Step, values: list[Any], tape: Tape) -> None:
    if isinstance(step.flow, Lookup):
        _lookup(step, values, tape)
    elif not step.flow.meets and any(isinstance(k, Activation) for k in step.ins):
        for path in parameters(step.ins, lookups=False):
            tape.found.cannot(path, f"it meets an activation in {step.eqn.primitive.name!r}, which is not read")


def _product(step: Step, values: list[Any], y: Any, tape: Tape) -> Any:
    """Record a product; gives it back, marked if marks are asked for."""
    for path, reason in roles.unread_weights(step):
        tape.found.cannot(path, reason)
    for side in (0, 1):
        views = [view for view, its in roles.weights(step) if its == side]
        if views:
            parts, axis = _apart(step, side, y)
            parts = [tape.product(step, view, side, values, z) for view, z in zip(views, parts, strict=True)]
            y = _together(parts, axis, y, tape)
    return y


def _apart(step: Step, side: int, y: Any) -> tuple[list[Any], int]:
    """What each of the parameters of a product gives, and the axis along which they stand."""
    kind = step.ins[side]
    if not isinstance(kind, Joined):
        return [y], 0
    assert isinstance(step.flow, Contraction)
    axis = step.flow.of(step.eqn, side).outputs(kind.dim)
    assert axis is not None
    ends = list(itertools.accumulate(kind.sizes))
    parts = [lax.slice_in_dim(y, end - n, end, axis=axis) for n, end in zip(kind.sizes, ends, strict=True)]
    return parts, axis


def _together(parts: list[Any], axis: int, y: Any, tape: Tape) -> Any:
    if tape.found.sites is None or tape.found.sites.mark is None:
        return y
    return parts[0] if len(parts) == 1 else lax.concatenate(parts, axis)


def _lookup(step: Step, values: list[Any], tape: Tape) -> None:
    """Rows of a parameter, chosen by the other operands."""
    view, found = step.ins[0], tape.found
    if not roles.is_lookup(step):
        return
    assert isinstance(view, View)
    found.meets(view, *step.ins)
    if "counts" in found.wanted.get(view.path, frozenset()):
        try:
            met = meetings.of_gather(step.eqn, view)
            found.reads(met, met.inputs)
            weight = found.weight(step.ins[1])
            use, counts = meetings.rows_read(step.eqn, met, values[1], weight)
            use = dataclasses.replace(use, shards=tuple(sorted(shards(step.ins[1:]))))
            tape.add(use, {"counts": counts.reshape(*[1] * len(use.lead), -1)})
        except UnreadError as reason:
            found.notes[view.path] = f"no counts: {reason}"
