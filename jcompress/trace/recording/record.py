"""Runs a function equation by equation and records what meets each parameter in a product."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

from jax import lax
from jax.extend import core as jax_core

from jcompress.trace.core import walk
from jcompress.trace.core.views import (
    Activation,
    Derived,
    Joined,
    Kind,
    View,
    computed,
    depth,
    has_parameters,
    is_activation,
    laid_out,
    parameters,
    shards,
)
from jcompress.trace.recording import loops, products
from jcompress.trace.recording.products import UnreadError
from jcompress.trace.recording.tape import Tape

ELEMENTWISE = {
    "add", "add_any", "sub", "mul", "div", "max", "min", "pow", "rem", "atan2", "nextafter", "select_n", "clamp",
    "and", "or", "xor", "eq", "ne", "lt", "le", "gt", "ge", "complex", "concatenate", "stack", "pad", "sort",
    "gather", "dynamic_slice", "dynamic_update_slice", "scatter", "scatter-add", "scatter-mul", "scatter-min",
    "scatter-max", "scatter_add", "scatter_mul", "scatter_min", "scatter_max", "optimization_barrier", "shift_left",
    "shift_right_logical", "shift_right_arithmetic", "random_fold_in", "random_bits", "threefry2x32", "reduce_and",
    "reduce_or",
}  # fmt: skip
"""Primitives in which a parameter may meet an activation without a product over one of its axes."""


COLLECTIVES = {
    "psum", "psum2", "psum_invariant", "pmax", "pmin", "all_gather", "all_gather_invariant", "all_to_all", "ppermute",
    "reduce_scatter", "psum_scatter", "axis_index", "pgather",
}  # fmt: skip
SAME_AFTER = {"psum", "psum2", "psum_invariant", "pmax", "pmin", "all_gather", "all_gather_invariant"}
"""Those after which devices hold the same values."""


def evaluate(
    jaxpr: jax_core.Jaxpr, consts: Sequence[Any], values: Sequence[Any], kinds: Sequence[Kind], tape: Tape
) -> tuple[list[Any], list[Kind]]:
    """The outputs of a jaxpr and their kinds, with every product of a parameter recorded on the tape."""
    env: dict[Any, tuple[Any, Kind]] = {}

    def read(v: Any) -> tuple[Any, Kind]:
        return (v.val, None) if isinstance(v, jax_core.Literal) else env[v]

    env.update((v, (c, tape.found.constants)) for v, c in zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, zip(values, kinds, strict=True), strict=True))
    for eqn in jaxpr.eqns:
        known = list(map(read, eqn.invars))
        outs, out_kinds = _equation(eqn, [x for x, _ in known], [k for _, k in known], tape)
        env.update(zip(eqn.outvars, zip(outs, out_kinds, strict=True), strict=True))
    results = list(map(read, jaxpr.outvars))
    return [x for x, _ in results], [k for _, k in results]


def _equation(
    eqn: jax_core.JaxprEqn, values: Sequence[Any], kinds: Sequence[Kind], tape: Tape
) -> tuple[list[Any], list[Kind]]:
    name = eqn.primitive.name
    if any(map(has_parameters, kinds)):
        called = walk.called(eqn)
        if called is not None:
            return evaluate(called.jaxpr, called.consts, values, kinds, tape)
        if name in loops.CONTROL:
            return loops.CONTROL[name](evaluate, eqn, values, kinds, tape)
    outs = walk.bind(eqn, values)
    if not any(map(has_parameters, kinds)):
        return outs, [computed(name, kinds)] * len(outs)
    return outs, _kinds(eqn, values, kinds, outs, tape)


def _kinds(
    eqn: jax_core.JaxprEqn, values: Sequence[Any], kinds: Sequence[Kind], outs: Sequence[Any], tape: Tape
) -> list[Kind]:
    """What the results of a plain equation are; products and lookups are recorded."""
    name = eqn.primitive.name
    if name in ("dot_general", "conv_general_dilated"):
        return [_product(eqn, values, kinds, outs[0], tape)]
    if name in ("gather", "dynamic_slice") and has_parameters(kinds[0]):
        return [_lookup(eqn, values, kinds, tape)]
    if name in COLLECTIVES:
        return [_collected(eqn, kinds)] * len(outs)
    found = laid_out(eqn, kinds)
    if found is not None:
        return found
    if name not in ELEMENTWISE and any(isinstance(k, Activation) for k in kinds):
        for path in parameters(kinds, lookups=False):
            tape.found.cannot(path, f"it meets an activation in {name!r}, which is not read")
    return [computed(name, kinds)] * len(outs)


def _collected(eqn: jax_core.JaxprEqn, kinds: Sequence[Kind]) -> Kind:
    """What a collective makes of values."""
    kind = computed(eqn.primitive.name, kinds)
    names = eqn.params.get("axes", eqn.params.get("axis_name", ()))
    names = frozenset(names if isinstance(names, (tuple, list, frozenset)) else (names,))
    if not isinstance(kind, (Activation, Derived)):
        return kind
    same = eqn.primitive.name in SAME_AFTER and not eqn.params.get("axis_index_groups")
    return dataclasses.replace(kind, shards=kind.shards - names if same else kind.shards | names)


def _product(eqn: jax_core.JaxprEqn, values: Sequence[Any], kinds: Sequence[Kind], y: Any, tape: Tape) -> Kind:
    result = computed(eqn.primitive.name, kinds)
    for side in (0, 1):
        mine, other = kinds[side], kinds[1 - side]
        if isinstance(mine, Derived) and _meets(mine, other):
            for path, reason in mine.reasons:
                tape.found.cannot(path, f"it passes through {reason!r} before it meets an activation")
        if isinstance(mine, (View, Joined)) and isinstance(other, (Activation, Derived)):
            if side == 0 and eqn.primitive.name == "conv_general_dilated":
                for path in parameters([mine], lookups=True):
                    tape.found.cannot(path, "it is what a convolution slides over")
                continue
            made = [tape.product(eqn, part, side, values[1 - side], other, z) for part, z in _apart(eqn, mine, side, y)]
            if not made:
                for path in parameters([mine], lookups=True):
                    tape.found.cannot(path, "it is joined with others along an axis that is contracted or grouped")
            result = Activation(depth([*made, result]), shards([*made, result]))
    return result


def _apart(eqn: jax_core.JaxprEqn, kind: View | Joined, side: int, y: Any) -> list[tuple[View, Any]]:
    """Each parameter of a product with what it gives; none where they are not side by side in the result."""
    if isinstance(kind, View):
        return [(kind, y)]
    axis = products.outputs_of(eqn, side, kind.dim)
    if axis is None:
        return []
    ends = list(itertools.accumulate(kind.sizes))
    pieces = [lax.slice_in_dim(y, end - n, end, axis=axis) for n, end in zip(kind.sizes, ends, strict=True)]
    return list(zip(kind.parts, pieces, strict=True))


def _meets(mine: Derived, other: Kind) -> bool:
    """Whether a product of these is one of a parameter that cannot be read."""
    return isinstance(other, Activation) if mine.lookup else is_activation(other) or isinstance(other, (View, Joined))


def _lookup(eqn: jax_core.JaxprEqn, values: Sequence[Any], kinds: Sequence[Kind], tape: Tape) -> Kind:
    """Rows of a parameter, chosen by the other operands."""
    name, found = eqn.primitive.name, tape.found
    if not any(map(is_activation, kinds[1:])):
        return computed(name, kinds)
    level = depth(kinds)
    if isinstance(kinds[0], View) and name == "gather":
        path = kinds[0].path
        level += 1 if path in found.wanted else 0
        found.met[path] = None
        found.levels[path] = min(level, found.levels.get(path, level))
        if "counts" in found.wanted.get(path, frozenset()):
            try:
                use, counts = products.of_gather(eqn, kinds[0], values[1])
                use = dataclasses.replace(use, shards=tuple(sorted(shards(kinds[1:]))))
                tape.add(use, {"counts": counts.reshape(*[1] * len(use.lead), -1)})
            except UnreadError as reason:
                found.notes[path] = f"no counts: {reason}"
    return Derived(
        tuple((path, name) for path in parameters(kinds[:1], lookups=True)), level, lookup=True, shards=shards(kinds)
    )
