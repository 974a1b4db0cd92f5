"""The rules of primitives that move values, combine them one by one, or make them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jcompress.trace.core import walk
from jcompress.trace.coupled import dims as terms
from jcompress.trace.coupled.dims import Dim, Dims
from jcompress.trace.coupled.frames import (
    At,
    Build,
    Cut,
    Hold,
    Rule,
    Site,
    State,
    Value,
    free_leaves,
    joined,
    site_bind,
)

UNARY = [
    "abs", "acos", "acosh", "asin", "asinh", "atan", "atanh", "bessel_i0e", "bessel_i1e", "cbrt", "ceil", "clz",
    "conj", "convert_element_type", "cos", "cosh", "digamma", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1",
    "floor", "imag", "integer_pow", "is_finite", "lgamma", "log", "log1p", "logistic", "neg", "not",
    "population_count", "real", "reduce_precision", "round", "rsqrt", "sign", "sin", "sinh", "sqrt", "square",
    "tan", "tanh",
]  # fmt: skip
IDENTITY = [
    "copy", "copy_p", "device_put", "mesh_cast", "name", "optimization_barrier", "pbroadcast", "pcast", "pmax",
    "pmin", "ppermute", "psum", "psum2", "psum_invariant", "pvary", "reshard", "sharding_constraint",
    "stop_gradient",
]  # fmt: skip
FIXED = [
    "random_seed", "random_wrap", "random_unwrap", "random_fold_in", "threefry2x32", "debug_callback",
    "debug_print", "cholesky", "eigh", "triangular_solve", "lu", "qr", "svd", "axis_index", "create_token",
]  # fmt: skip
NARY = [
    "add", "add_any", "and", "atan2", "clamp", "complex", "div", "eq", "eq_to", "ge", "gt", "igamma", "igammac",
    "le", "le_to", "lt", "lt_to", "max", "min", "mul", "ne", "nextafter", "or", "pow", "rem", "select_n",
    "shift_left", "shift_right_arithmetic", "shift_right_logical", "sub", "xor",
]  # fmt: skip


class Elementwise(Rule):
    """Operands of one shape, up to scalars and lengths of 1; each leaf of the result is that of the operands."""

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
        name, held = site.eqn.primitive.name, [s.at(leaf) for s in ins]
        zero = [h is Hold.ZERO for h in held]
        if (name in ("mul", "and") and any(zero)) or (name == "div" and zero[0]):
            return Hold.ZERO
        if name == "select_n" and all(zero[1:]):
            return Hold.ZERO
        if any(zero) and all(z or s.constant is not None for z, s in zip(zero, ins, strict=True)):
            numbers = [0 if z else s.constant for z, s in zip(zero, ins, strict=True)]
            return Hold.ZERO if _on_numbers(site, numbers) == 0 else Hold.SAME
        if name in ("add", "add_any", "sub", "or") and all(zero):
            return Hold.ZERO
        return Hold.VARIED if Hold.VARIED in held else Hold.SAME


def _on_numbers(site: Site, numbers: Sequence[Any]) -> Any:
    """The value of an elementwise equation on scalars."""
    with jax.ensure_compile_time_eval():
        scalars = [jnp.asarray(x, walk.aval(v).dtype) for x, v in zip(numbers, site.eqn.invars, strict=True)]
        return np.asarray(site_bind(site, scalars)[0])[()]


class Identity(Rule):
    """Results that are the operands, or the operands of several devices together."""

    def dims(self, build: Build, site: Site) -> Sequence[Dims]:
        return site.ins

    def states(self, site: Site, ins: Sequence[State]) -> Sequence[State]:
        return ins


class Moves(Rule):
    """Results whose slices are slices of the one operand."""

    def states(self, site: Site, ins: Sequence[State]) -> Sequence[State]:
        return [State(ins[0].constant, {x: ins[0].at(x) for x in free_leaves(out)}) for out in site.outs]


class Broadcast(Moves):
    """New axes, and axes of length 1 made longer: leaves of their own until something meets them."""

    def dims(self, build: Build, site: Site) -> Sequence[Dims]:
        found = list(terms.fresh(site.params["shape"]))
        for d, axis in zip(site.ins[0], site.params["broadcast_dimensions"], strict=True):
            if d.size == found[axis].size:
                found[axis] = d
        return [tuple(found)]

    def run(self, cut: Cut, site: Site, ins: Sequence[Value], at: At) -> list[Any]:
        return site_bind(site, [v.at(at) for v in ins], shape=cut.shape(site.outs[0], at))


class Reshape(Moves):
    """Axes that are split become products, axes that are merged are products."""

    def dims(self, build: Build, site: Site) -> Sequence[Dims]:
        return [_reshaped(site.ins[0], tuple(map(int, site.params["new_sizes"])))]

    def run(self, cut: Cut, site: Site, ins: Sequence[Value], at: At) -> list[Any]:
        return [jnp.reshape(ins[0].at(at), cut.shape(site.outs[0], at))]


def _reshaped(dims: Dims, sizes: Sequence[int]) -> Dims:
    """The dimensions after a reshape: runs of equal length are factored, one against the other."""
    if math.prod(sizes) == 0:
        terms.pin(dims, "an empty array is reshaped")
        return terms.fresh(sizes, "an empty array is reshaped")
    found: list[Dim] = []
    left, wanted = [d for d in dims if d.size != 1], list(sizes)
    while wanted:
        if wanted[0] == 1:
            found.append(Dim(wanted.pop(0)))
            continue
        block, targets = [left.pop(0)], [wanted.pop(0)]
        while (have := math.prod(d.size for d in block)) != (want := math.prod(targets)):
            block.append(left.pop(0)) if have < want else targets.append(wanted.pop(0))
        found += _factored(block, targets)
    return tuple(found)


def _factored(block: list[Dim], targets: list[int]) -> list[Dim]:
    if len(block) == len(targets) == 1:
        return block
    try:
        return terms.as_product(terms.product(block), targets)
    except terms.ClashError as clash:
        terms.pin(block, str(clash))
        return list(terms.fresh(targets, str(clash)))


class Transpose(Moves):
    """The same axes in another order."""

    def dims(self, build: Build, site: Site) -> Sequence[Dims]:
        return [tuple(site.ins[0][axis] for axis in site.params["permutation"])]


class Squeeze(Moves):
    """Axes of length 1 go."""

    def dims(self, build: Build, site: Site) -> Sequence[Dims]:
        gone = {a % len(site.ins[0]) for a in site.params["dimensions"]}
        return [tuple(d for axis, d in enumerate(site.ins[0]) if axis not in gone)]


class Along(Moves):
    """Something that happens along some axes, whose length must stay, and to each slice of the others alike.

    Args:
      axes: of an equation.
    """

    def __init__(self, axes: Callable[[Site], Sequence[int]], drops: bool = False) -> None:
        self.axes, self.drops = axes, drops

    def dims(self, build: Build, site: Site) -> Sequence[Dims]:
        dims, axes = site.ins[0], {a % len(site.ins[0]) for a in self.axes(site)}
        terms.unify_all(*site.ins)
        reason = f"{site.eqn.primitive.name} runs along it"
        terms.pin([dims[a] for a in axes], reason)
        outs = []
        for v in site.eqn.outvars:
            if self.drops:
                outs.append(tuple(d for i, d in enumerate(dims) if i not in axes))
            else:
                outs.append(
                    tuple(Dim(n, pinned=reason) if i in axes else dims[i] for i, n in enumerate(walk.aval(v).shape))
                )
        return outs

    def states(self, site: Site, ins: Sequence[State]) -> Sequence[State]:
        zero = site.eqn.primitive.name not in ("cumlogsumexp", "argmax", "argmin")
        found = []
        for i, out in enumerate(site.outs):
            own = ins[i] if len(ins) > 1 and i < len(ins) else ins[0]
            held = {}
            for leaf in free_leaves(out):
                same = max(s.at(leaf) for s in ins) is not Hold.VARIED
                is_zero = zero and own.at(leaf) is Hold.ZERO and (i == 0 or len(ins) > 1)
                held[leaf] = Hold.ZERO if is_zero else Hold.SAME if same else Hold.VARIED
            found.append(State(held=held))
        return found


class Slice(Moves):
    """Consecutive positions split an axis; steps over all of it factor it."""

    def dims(self, build: Build, site: Site) -> Sequence[Dims]:
        starts, limits = site.params["start_indices"], site.params["limit_indices"]
        strides = site.params["strides"] or (1,) * len(starts)
        found = [_sliced(*x) for x in zip(site.ins[0], starts, limits, strides, strict=True)]
        site.note = [before for before, _ in found]
        return [tuple(d for _, d in found)]

    def run(self, cut: Cut, site: Site, ins: Sequence[Value], at: At) -> list[Any]:
        x, sizes = ins[0].at(at), cut.sizes(at)
        strides = site.params["strides"] or (1,) * x.ndim
        starts, limits = [], []
        for axis, (before, out) in enumerate(zip(site.note, site.outs[0], strict=True)):
            # A strided slice keeps its start; one of consecutive positions starts where those before it end.
            start = site.params["start_indices"][axis] if strides[axis] > 1 else terms.size(before, sizes)
            starts.append(start)
            limits.append(x.shape[axis] if strides[axis] > 1 else start + terms.size(out, sizes))
            if strides[axis] > 1 and not cut.leaves((site.ins[0][axis],)):
                limits[-1] = site.params["limit_indices"][axis]
        return site_bind(site, [x], start_indices=tuple(starts), limit_indices=tuple(limits))


def _sliced(d: Dim, start: int, limit: int, stride: int) -> tuple[Dim, Dim]:
    """What lies before a slice, and the slice."""
    try:
        if stride == 1:
            before, found, _ = terms.as_concat(d, [start, limit - start, d.size - limit]) if d.size else [d, d, d]
            return before, found
        length = max(0, -(-(limit - start) // stride))
        if d.size % stride == 0 and start < stride and length == d.size // stride:
            outer, inner = terms.as_product(d, [length, stride])
            terms.pin([inner], "a slice steps over it")
            return Dim(0), outer
        raise terms.ClashError(f"a slice from {start} to {limit} steps by {stride}")
    except terms.ClashError as clash:
        terms.pin([d], str(clash))
        before = terms.fresh([start], str(clash))[0]
        return before, Dim(len(range(start, limit, stride)), pinned=str(clash))


class Split(Moves):
    """Consecutive pieces of an axis."""

    def dims(self, build: Build, site: Site) -> Sequence[Dims]:
        dims, axis, sizes = site.ins[0], site.params["axis"], [int(n) for n in site.params["sizes"]]
        try:
            pieces = terms.as_concat(dims[axis], sizes)
        except terms.ClashError as clash:
            terms.pin([dims[axis]], str(clash))
            pieces = list(terms.fresh(sizes, str(clash)))
        return [(*dims[:axis], piece, *dims[axis + 1 :]) for piece in pieces]

    def run(self, cut: Cut, site: Site, ins: Sequence[Value], at: At) -> list[Any]:
        axis = site.params["axis"]
        return site_bind(site, [ins[0].at(at)], sizes=tuple(cut.shape(out, at)[axis] for out in site.outs))


class Joins(Rule):
    """Results whose slices are slices of several operands."""

    def states(self, site: Site, ins: Sequence[State]) -> Sequence[State]:
        return [joined(ins, out) for out in site.outs]


class Concatenate(Joins):
    """One array after the other."""

    def dims(self, build: Build, site: Site) -> Sequence[Dims]:
        axis = site.params["dimension"]
        rest = [(*v[:axis], *v[axis + 1 :]) for v in site.ins]
        terms.unify_all(*rest)
        found = list(terms.alias(site.ins[0]))
        found[axis] = terms.concat(terms.alias([v[axis] for v in site.ins]))
        return [tuple(found)]

    def states(self, site: Site, ins: Sequence[State]) -> Sequence[State]:
        held = {}
        for leaf in free_leaves(site.outs[0]):
            own = [s for s, v in zip(ins, site.ins, strict=True) if any(leaf in terms.leaves(d) for d in v)]
            held[leaf] = max((s.at(leaf) for s in own), default=Hold.SAME)
        return [State(held=held)]

    def run(self, cut: Cut, site: Site, ins: Sequence[Value], at: At) -> list[Any]:
        return [jnp.concatenate([v.at(at) for v in ins], axis=site.params["dimension"])]


class Stack(Joins):
    """Arrays beside one another, along a new axis."""

    def dims(self, build: Build, site: Site) -> Sequence[Dims]:
        terms.unify_all(*site.ins)
        found = list(terms.alias(site.ins[0]))
        found.insert(site.params["axis"], Dim(len(site.ins), pinned="arrays are stacked along it"))
        return [tuple(found)]


class Tile(Moves):
    """An axis repeated: a product with the count."""

    def dims(self, build: Build, site: Site) -> Sequence[Dims]:
        def tiled(d: Dim, n: int) -> Dim:
            return terms.product([Dim(n, pinned="it is repeated"), d]) if n != 1 else d

        return [tuple(tiled(d, int(n)) for d, n in zip(site.ins[0], site.params["reps"], strict=True))]


class Pad(Rule):
    """A concatenation with leaves of its own before and after."""

    def dims(self, build: Build, site: Site) -> Sequence[Dims]:
        found, site.note = [], []
        for d, (low, high, interior) in zip(site.ins[0], site.params["padding_config"], strict=True):
            simple = interior == 0 and low >= 0 and high >= 0
            if not simple:
                terms.pin([d], "it is padded")
                found.append(Dim(d.size + low + high + interior * max(d.size - 1, 0), pinned="it is padded"))
                site.note.append((None, None))
                continue
            before, after = terms.fresh([low, high])
            found.append(terms.concat([before, d, after]) if low or high else d)
            site.note.append((before, after))
        return [tuple(found)]

    def states(self, site: Site, ins: Sequence[State]) -> Sequence[State]:
        own, held = set(free_leaves(site.ins[0])), {}
        for leaf in free_leaves(site.outs[0]):
            held[leaf] = max(ins[1].at(leaf), ins[0].at(leaf)) if leaf in own else ins[1].at(leaf)
        return [State(held=held)]

    def run(self, cut: Cut, site: Site, ins: Sequence[Value], at: At) -> list[Any]:
        sizes, config = cut.sizes(at), []
        for (before, after), (low, high, interior) in zip(site.note, site.params["padding_config"], strict=True):
            if before is not None:
                low, high = terms.size(before, sizes), terms.size(after, sizes)
            config.append((low, high, interior))
        return site_bind(site, [v.at(at) for v in ins], padding_config=tuple(config))


class Iota(Rule):
    """Positions: those that stay keep their numbers."""

    def dims(self, build: Build, site: Site) -> Sequence[Dims]:
        return [terms.fresh(walk.aval(site.eqn.outvars[0]).shape)]

    def states(self, site: Site, ins: Sequence[State]) -> Sequence[State]:
        counted = free_leaves((site.outs[0][site.params["dimension"]],))
        return [State(held={x: Hold.VARIED if x in counted else Hold.SAME for x in free_leaves(site.outs[0])})]

    def run(self, cut: Cut, site: Site, ins: Sequence[Value], at: At) -> list[Any]:
        axis, dims = site.params["dimension"], site.outs[0]
        positions = jnp.asarray(terms.kept_positions(dims[axis], cut.kept), site.params["dtype"])
        return [jax.lax.broadcast_in_dim(positions, cut.shape(dims, at), (axis,))]


class Drawn(Rule):
    """Random numbers: drawn for the full shape, so that those that stay are those that would have been drawn."""

    def dims(self, build: Build, site: Site) -> Sequence[Dims]:
        return [terms.fresh(walk.aval(v).shape) for v in site.eqn.outvars]

    def run(self, cut: Cut, site: Site, ins: Sequence[Value], at: At) -> list[Any]:
        found = []
        for x, dims in zip(site_bind(site, [v.at(at) for v in ins]), site.outs, strict=True):
            for axis, d in enumerate(dims):
                if cut.leaves((d,)):
                    x = jnp.take(x, terms.kept_positions(d, cut.kept), axis=axis)
            found.append(x)
        return found


class Window(Moves):
    """Pooling: windows of length 1 leave an axis alone, along the others nothing can be cut."""

    def dims(self, build: Build, site: Site) -> Sequence[Dims]:
        reason, found = f"{site.eqn.primitive.name} slides along it", []
        (dims,), shape = site.ins, walk.aval(site.eqn.outvars[0]).shape
        for d, n, window in zip(dims, shape, site.params["window_dimensions"], strict=True):
            if window == 1 and n == d.size:
                found.append(d)
            else:
                terms.pin([d], reason)
                found.append(Dim(n, pinned=reason))
        return [tuple(found)]

    def states(self, site: Site, ins: Sequence[State]) -> Sequence[State]:
        # Padding takes no part in a maximum, and adds zeros to a sum.
        return [State(held={x: ins[0].at(x) for x in free_leaves(site.outs[0])})]
