"""Runs a function equation by equation and records what meets each parameter in a product."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core as jax_core

from jcompress.trace import products, walk
from jcompress.trace.products import UnreadError, Use
from jcompress.trace.views import (
    Activation,
    Atoms,
    Derived,
    Joined,
    Kind,
    View,
    computed,
    depth,
    has_parameters,
    join,
    laid_out,
    local,
    peel,
    shards,
    spec_axes,
)

Moments = dict[str, jax.Array]
LARGEST = ("absmax", "output_absmax")
"""What is combined by the maximum; everything else is summed."""

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


def merge(a: Mapping[str, jax.Array], b: Mapping[str, jax.Array]) -> Moments:
    """The moments of both."""
    both = {name: jnp.maximum(a[name], b[name]) if name in LARGEST else a[name] + b[name] for name in a if name in b}
    return {**a, **b, **both}


@dataclasses.dataclass
class Found:
    """What is known when the function has been traced, whatever its values.

    Attributes:
      wanted: the names of the moments of each path; the others are followed and not recorded.
      constants: what closed-over arrays are: activations, where a function has no other arguments.
      largest: the most features of which a Gram matrix is kept, or None.
      unread: paths whose products cannot be read, each with the reason.
      met: paths that met an activation in a product or a lookup.
      notes: what was left out of a path's statistics.
      levels: for each path, how many products with parameters came before its first one in a row, counting from 1.
    """

    wanted: Mapping[str, frozenset[str]]
    constants: Activation | None = None
    largest: int | None = None
    unread: dict[str, str] = dataclasses.field(default_factory=dict)
    met: dict[str, None] = dataclasses.field(default_factory=dict)
    notes: dict[str, str] = dataclasses.field(default_factory=dict)
    levels: dict[str, int] = dataclasses.field(default_factory=dict)

    def cannot(self, path: str, reason: str) -> None:
        """Say that a path is unread; the first reason stays."""
        self.unread.setdefault(path, reason)


class Tape:
    """What was recorded in one body: moments by use."""

    def __init__(self, found: Found, loop: int = 0) -> None:
        self.found = found
        self.loop = loop
        self.moments: dict[Use, Moments] = {}
        self._parts: dict[Use, dict[Atoms, set[int]]] = {}
        self._same: dict[Any, tuple[Any, Moments]] = {}

    def add(self, use: Use, moments: Moments) -> None:
        """Count moments under a use."""
        self.moments[use] = merge(self.moments[use], moments) if use in self.moments else moments

    def product(self, eqn: jax_core.JaxprEqn, view: View, side: int, x: Any, kind: Kind, y: Any) -> Kind:
        """Record that a parameter meets ``x`` and gives ``y``; returns what ``y`` is."""
        path = view.path
        names = self.found.wanted.get(path, frozenset())
        level = depth([kind]) + (1 if path in self.found.wanted else 0)
        self.found.met[path] = None
        self.found.levels[path] = min(level, self.found.levels.get(path, level))
        try:
            if not jnp.issubdtype(x.dtype, jnp.floating):
                raise UnreadError(f"it meets an activation of dtype {x.dtype}, expected floating point")
            convolution = eqn.primitive.name == "conv_general_dilated"
            met = products.of_convolution(eqn, view, x, y) if convolution else products.of_dot(eqn, view, side, x, y)
            if names:
                use = dataclasses.replace(met.use, shards=tuple(sorted(shards([kind]))))
                self._count(x, met._replace(use=use), names, id(eqn) if convolution else 0)
        except UnreadError as reason:
            self.found.cannot(path, str(reason))
        return Activation(level, shards([kind, view]))

    def _count(self, x: Any, met: products.Meeting, names: frozenset[str], site: int) -> None:
        if met.part is not None:
            # Parts of the outputs that meet one activation (the gates of a cell) are one use, not several.
            parts = self._parts.setdefault(met.use, {})
            known = any(id(x) in ids for ids in parts.values())
            parts.setdefault(met.part, set()).add(id(x))
            self._same[id(x)] = (x, {})
            if known:
                return
        names = self._affordable(met, names)
        # Kernels that read one activation (queries, keys and values) share its moments.
        key = (id(x), site, met.labels, met.use.lead, names)
        if key not in self._same:
            self._same[key] = (x, products.moments(met.x, met.labels, met.use.lead, names))
        outputs = {}
        if met.part is None and "outputs" in names:
            outputs = products.of_outputs(met.y, met.outputs, met.use.lead)
        self.add(met.use, self._same[key][1] | outputs)

    def _affordable(self, met: products.Meeting, names: frozenset[str]) -> frozenset[str]:
        k = math.prod(a.size for a in met.labels if a is not None and a not in met.use.lead)
        if "gram" not in names or self.found.largest is None or k <= self.found.largest:
            return names
        self.found.notes[met.use.path] = f"no gram: {k} features, more than {self.found.largest}; ask for it by name"
        return names - {"gram"}

    def close(self) -> dict[Use, Moments]:
        """The moments; parts of one parameter that met different activations are no use of the whole."""
        for use, parts in self._parts.items():
            first, *rest = parts.values()
            if any(ids != first for ids in rest):
                self.found.cannot(use.path, "parts of its outputs meet different activations")
        return self.moments


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
        if name in _CONTROL:
            return _CONTROL[name](eqn, values, kinds, tape)
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
        for path in _paths(kinds, lookups=False):
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


def _paths(kinds: Sequence[Kind], lookups: bool) -> list[str]:
    """The paths of views and of what is derived from parameters."""
    found = [k.path for k in kinds if isinstance(k, View)]
    found += [part.path for k in kinds if isinstance(k, Joined) for part in k.parts]
    for kind in kinds:
        if isinstance(kind, Derived) and (lookups or not kind.lookup):
            found += [path for path, _ in kind.reasons]
    return found


def _is_activation(kind: Kind) -> bool:
    return isinstance(kind, Activation) or (isinstance(kind, Derived) and kind.lookup)


def _product(eqn: jax_core.JaxprEqn, values: Sequence[Any], kinds: Sequence[Kind], y: Any, tape: Tape) -> Kind:
    result = computed(eqn.primitive.name, kinds)
    for side in (0, 1):
        mine, other = kinds[side], kinds[1 - side]
        if isinstance(mine, Derived) and _meets(mine, other):
            for path, reason in mine.reasons:
                tape.found.cannot(path, f"it passes through {reason!r} before it meets an activation")
        if isinstance(mine, (View, Joined)) and isinstance(other, (Activation, Derived)):
            if side == 0 and eqn.primitive.name == "conv_general_dilated":
                for path in _paths([mine], lookups=True):
                    tape.found.cannot(path, "it is what a convolution slides over")
                continue
            made = [tape.product(eqn, part, side, values[1 - side], other, z) for part, z in _apart(eqn, mine, side, y)]
            if not made:
                for path in _paths([mine], lookups=True):
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
    return isinstance(other, Activation) if mine.lookup else _is_activation(other) or isinstance(other, (View, Joined))


def _lookup(eqn: jax_core.JaxprEqn, values: Sequence[Any], kinds: Sequence[Kind], tape: Tape) -> Kind:
    """Rows of a parameter, chosen by the other operands."""
    name, found = eqn.primitive.name, tape.found
    if not any(map(_is_activation, kinds[1:])):
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
        tuple((path, name) for path in _paths(kinds[:1], lookups=True)), level, lookup=True, shards=shards(kinds)
    )


def _body(
    closed: jax_core.ClosedJaxpr, kinds: Sequence[Kind], tape: Tape
) -> tuple[Callable[..., tuple[list[Any], dict[Use, Moments]]], list[list[Kind]]]:
    """A body as a function of its inputs that also gives the moments, and a place where its kinds are left."""
    left: list[list[Kind]] = []

    def run(*values: Any) -> tuple[list[Any], dict[Use, Moments]]:
        inner = Tape(tape.found, tape.loop + 1)
        outs, out_kinds = evaluate(closed.jaxpr, closed.consts, values, kinds, inner)
        left.append(out_kinds)
        return outs, inner.close()

    return run, left


def _abstract(run: Callable, left: list[list[Kind]], values: Sequence[Any]) -> tuple[dict[Use, Any], list[Kind]]:
    """The moments of a body by shape and dtype, and the kinds of its outputs; nothing is computed."""
    uses: list[Use] = []

    def listed(*xs: Any) -> list[Moments]:
        moments = run(*xs)[1]
        uses[:] = moments
        return list(moments.values())

    found = jax.eval_shape(listed, *values)
    return dict(zip(uses, found, strict=True)), left[-1]


def _zeros(uses: Mapping[Use, Any]) -> list[Moments]:
    return [jax.tree.map(_zero, moments) for moments in uses.values()]


def _zero(s: jax.ShapeDtypeStruct) -> jax.Array:
    zero, names = jnp.zeros(s.shape, s.dtype), _varying(s)
    if not names:
        return zero
    varied: Any = lax  # ``pcast`` was ``pvary`` before jax 0.8.
    return varied.pcast(zero, names, to="varying") if hasattr(lax, "pcast") else varied.pvary(zero, names)


def _aval(v: Any) -> jax.ShapeDtypeStruct:
    marks = {}
    if _varying(v.aval):
        # Inside shard_map a type says along which mesh axes its value varies; how, differs between versions.
        names = ("sharding", "manual_axis_type", "vma")
        marks = {name: getattr(v.aval, name) for name in names if hasattr(v.aval, name)}
    return jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype, **marks)


def _varying(x: Any) -> tuple[str, ...]:
    """The mesh axes along which a type says that its value varies, inside ``shard_map``."""
    return tuple(getattr(getattr(x, "manual_axis_type", None), "varying", None) or getattr(x, "vma", None) or ())


def _alike(a: Kind, b: Kind) -> bool:
    return a == b or (isinstance(a, Activation) and isinstance(b, Activation))


def _settle(
    closed: jax_core.ClosedJaxpr, before: list[Kind], carry: list[Kind], after: list[Kind], tape: Tape
) -> tuple[Callable, dict[Use, Any], list[Kind], list[Kind]]:
    """The kinds of a loop's carry once they stop changing: the body, its uses, the carry's kinds, the outputs'."""
    n, first = len(carry), len(before)
    outvars, invars = closed.jaxpr.outvars, closed.jaxpr.invars
    still = [outvars[i] is invars[first + i] for i in range(n)]
    carry = [
        k if s or not isinstance(k, (View, Joined)) else computed("carry", [k])
        for k, s in zip(carry, still, strict=True)
    ]
    while True:
        run, left = _body(closed, [*before, *carry, *after], tape)
        uses, outs = _abstract(run, left, [_aval(v) for v in invars])
        joined = [join("carry", pair) for pair in zip(carry, outs[:n], strict=True)]
        if all(map(_alike, joined, carry)):
            return run, uses, joined, outs
        carry = joined


def _scan(
    eqn: jax_core.JaxprEqn, values: Sequence[Any], kinds: Sequence[Kind], tape: Tape
) -> tuple[list[Any], list[Kind]]:
    p = eqn.params
    closed, consts, carries = p["jaxpr"], p["num_consts"], p["num_carry"]
    loop, split = tape.loop, consts + carries
    slices = [peel(k, loop) for k in kinds[split:]]
    run, uses, carry, outs = _settle(closed, list(kinds[:consts]), list(kinds[consts:split]), slices, tape)
    summed = [use for use in uses if not _runs_over(use, loop)]
    stacked = [use for use in uses if _runs_over(use, loop)]

    def body(state: tuple[list[Any], list[Moments]], xs: list[Any]) -> tuple[Any, Any]:
        values_now, totals = state
        results, moments = run(*values[:consts], *values_now, *xs)
        totals = [merge(total, moments[use]) for use, total in zip(summed, totals, strict=True)]
        return (results[:carries], totals), (results[carries:], [moments[use] for use in stacked])

    init = (list(values[consts:split]), _zeros({use: uses[use] for use in summed}))
    (final, totals), (ys, layers) = lax.scan(
        body, init, list(values[split:]), length=p["length"], reverse=p["reverse"], unroll=p["unroll"]
    )
    for use, moments in zip(summed, totals, strict=True):
        tape.add(use, moments)
    for use, moments in zip(stacked, layers, strict=True):
        tape.add(*_unrolled(use, moments))
    return [*final, *ys], [*carry, *(computed("scan", [k]) for k in outs[carries:])]


def _runs_over(use: Use, loop: int) -> bool:
    return bool(use.loops) and use.loops[-1][0] == loop


def _unrolled(use: Use, moments: Moments) -> tuple[Use, Moments]:
    """The axis that a loop ran over, put among the leading axes."""
    *loops, (_, atoms) = use.loops
    order = sorted(range(len(atoms) + len(use.lead)), key=lambda i: _place((*atoms, *use.lead)[i]))
    lead = tuple((*atoms, *use.lead)[i] for i in order)

    def moved(x: jax.Array) -> jax.Array:
        x = x.reshape(*(a.size for a in atoms), *x.shape[1:])
        return x.transpose(*order, *range(len(order), x.ndim))

    outer = dataclasses.replace(use, lead=lead, loops=tuple(loops))
    return outer, {name: moved(x) for name, x in moments.items()}


def _place(atom: Any) -> tuple[int, int]:
    return atom.axis, -atom.step


def _while(
    eqn: jax_core.JaxprEqn, values: Sequence[Any], kinds: Sequence[Kind], tape: Tape
) -> tuple[list[Any], list[Kind]]:
    p = eqn.params
    tests, split = p["cond_nconsts"], p["cond_nconsts"] + p["body_nconsts"]
    condition = p["cond_jaxpr"]
    run, uses, carry, _ = _settle(p["body_jaxpr"], list(kinds[tests:split]), list(kinds[split:]), [], tape)
    test, left = _body(condition, [*kinds[:tests], *carry], tape)
    for use in _abstract(test, left, [_aval(v) for v in condition.jaxpr.invars])[0]:
        tape.found.cannot(use.path, "it meets an activation in the condition of a 'while' loop")

    def proceed(state: tuple[list[Any], list[Moments]]) -> Any:
        return test(*values[:tests], *state[0])[0][0]

    def body(state: tuple[list[Any], list[Moments]]) -> tuple[list[Any], list[Moments]]:
        results, moments = run(*values[tests:split], *state[0])
        return results, [merge(total, moments[use]) for use, total in zip(uses, state[1], strict=True)]

    final, totals = lax.while_loop(proceed, body, (list(values[split:]), _zeros(uses)))
    for use, moments in zip(uses, totals, strict=True):
        tape.add(use, moments)
    return list(final), carry


def _cond(
    eqn: jax_core.JaxprEqn, values: Sequence[Any], kinds: Sequence[Kind], tape: Tape
) -> tuple[list[Any], list[Kind]]:
    index, *operands = values
    bodies = [_body(branch, kinds[1:], tape) for branch in eqn.params["branches"]]
    found = [_abstract(run, left, [_aval(v) for v in eqn.invars[1:]]) for run, left in bodies]
    uses = {use: shapes for branch_uses, _ in found for use, shapes in branch_uses.items()}

    def with_all(run: Callable) -> Callable:
        def branch(*xs: Any) -> tuple[list[Any], list[Moments]]:
            outs, moments = run(*xs)
            return outs, [moments.get(use, zero) for use, zero in zip(uses, _zeros(uses), strict=True)]

        return branch

    outs, moments = lax.switch(index, [with_all(run) for run, _ in bodies], *operands)
    for use, found_moments in zip(uses, moments, strict=True):
        tape.add(use, found_moments)
    columns = zip(*(out_kinds for _, out_kinds in found), strict=True)
    return list(outs), [_chosen(join("cond", column), kinds[0]) for column in columns]


def _chosen(kind: Kind, index: Kind) -> Kind:
    """A result of a branch that an activation chose; a parameter that every branch gives stays one."""
    return kind if isinstance(kind, (View, Joined)) or not _is_activation(index) else _picked(kind, index)


def _picked(kind: Kind, index: Kind) -> Kind:
    return dataclasses.replace(kind, lookup=True) if isinstance(kind, Derived) else computed("cond", [kind, index])


def _shard_map(
    eqn: jax_core.JaxprEqn, values: Sequence[Any], kinds: Sequence[Kind], tape: Tape
) -> tuple[list[Any], list[Kind]]:
    """The same body on every device; what devices met along the mesh axes of the activation is summed."""
    p = eqn.params
    if "in_specs" not in p or not hasattr(jax, "shard_map"):
        for path in _paths(kinds, lookups=False):
            tape.found.cannot(path, "it meets an activation in 'shard_map', which is not read in this version of jax")
        outs = walk.bind(eqn, values)
        return outs, [computed("shard_map", kinds)] * len(outs)
    mesh, body = p["mesh"], p["jaxpr"]
    manual = frozenset(p.get("newly_manual_axes") or mesh.axis_names)
    inner = [_held(k, spec, v) for k, spec, v in zip(kinds, p["in_specs"], body.invars, strict=True)]
    run, left = _body(jax_core.ClosedJaxpr(body, ()), inner, tape)
    uses: list[Use] = []

    def sharded(*xs: Any) -> tuple[list[Any], list[Moments]]:
        outs, moments = run(*xs)
        uses[:] = moments
        return outs, [_over(use.shards, m) for use, m in moments.items()]

    mapped = jax.shard_map(
        sharded,
        mesh=mesh,
        in_specs=tuple(p["in_specs"]),
        out_specs=(list(p["out_specs"]), jax.sharding.PartitionSpec()),
        axis_names=manual,
        check_vma=p["check_vma"],
    )
    outs, moments = mapped(*values)
    for use, found in zip(uses, moments, strict=True):
        tape.add(dataclasses.replace(use, shards=tuple(n for n in use.shards if n not in manual)), found)
    return list(outs), [_outside(k, manual) for k in left[-1]]


def _held(kind: Kind, spec: Any, v: Any) -> Kind:
    """What one device holds of a value."""
    if isinstance(kind, View):
        return local(kind, spec, v.aval.shape)
    if isinstance(kind, Joined):
        return computed("concatenate", [kind])
    return kind if kind is None else dataclasses.replace(kind, shards=kind.shards | spec_axes(spec))


def _outside(kind: Kind, manual: frozenset[str]) -> Kind:
    kind = computed("shard_map", [kind])
    return (
        dataclasses.replace(kind, shards=shards([kind]) - manual) if isinstance(kind, (Activation, Derived)) else None
    )


def _over(names: tuple[str, ...], moments: Moments) -> Moments:
    """The moments of all devices along the mesh axes."""
    if names:
        moments = {n: lax.pmax(x, names) if n in LARGEST else lax.psum(x, names) for n, x in moments.items()}
    # A value may be marked as varying along an axis along which it is the same.
    return {n: lax.pmax(x, marked) if (marked := _varying(jax.typeof(x))) else x for n, x in moments.items()}


_CONTROL: dict[str, Callable[..., tuple[list[Any], list[Kind]]]] = {
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "shard_map": _shard_map,
}
