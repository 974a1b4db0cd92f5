"""The rules of primitives whose results are slices of their one operand."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp

from jcompress.trace.core import walk
from jcompress.trace.coupled import dims as terms
from jcompress.trace.coupled.building import Build
from jcompress.trace.coupled.dims import Dim, Dims
from jcompress.trace.coupled.frames import At, Cut, Rule, Site, Value, restored, site_bind
from jcompress.trace.coupled.states import Hold, State, free_leaves


class Moves(Rule):
    """Results whose slices are slices of the one operand."""

    reads = False

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
    """Axes that are split become products, axes that are merged are products; first they may change places."""

    def dims(self, build: Build, site: Site) -> Sequence[Dims]:
        order = site.params["dimensions"]
        dims = site.ins[0] if order is None else tuple(site.ins[0][a] for a in order)
        return [_reshaped(dims, tuple(map(terms.whole, site.params["new_sizes"])))]

    def run(self, cut: Cut, site: Site, ins: Sequence[Value], at: At) -> list[Any]:
        x, order = ins[0].at(at), site.params["dimensions"]
        return [jnp.reshape(x if order is None else jnp.transpose(x, order), cut.shape(site.outs[0], at))]


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
        try:
            while (have := math.prod(d.size for d in block)) != (want := math.prod(targets)):
                block.append(left.pop(0)) if terms.is_shorter(have, want) else targets.append(wanted.pop(0))
        except terms.ClashError as clash:
            terms.pin(dims, str(clash))
            return terms.fresh(sizes, str(clash))
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


class Trailing(Moves):
    """The axes of the operand, but for the last ones, which stay: bits of numbers, and data of keys."""

    def dims(self, build: Build, site: Site) -> Sequence[Dims]:
        (dims,), shape = site.ins, walk.aval(site.eqn.outvars[0]).shape
        n, reason = min(len(dims), len(shape)), f"{site.eqn.primitive.name} runs along it"
        terms.pin(dims[n:], reason)
        return [(*dims[:n], *terms.fresh(shape[n:], reason))]

    def states(self, site: Site, ins: Sequence[State]) -> Sequence[State]:
        return [State(held={x: ins[0].at(x) for x in free_leaves(site.outs[0])})]


Axes = str | Callable[[Any], Any]
"""The parameter of an equation that names axes, or a function of its parameters."""


class Along(Moves):
    """Something that happens along some axes, whose length must stay, and to each slice of the others alike.

    Args:
      axes: the parameter of the equation that names them; without it, the last. Or a function of the parameters.
      drops: whether they go.
      holds_zero: whether a slice of zeros gives zeros.
    """

    reads = True

    def __init__(self, axes: Axes, drops: bool = False, holds_zero: bool = True) -> None:
        self.axes, self.drops, self.holds_zero = axes, drops, holds_zero

    def dims(self, build: Build, site: Site) -> Sequence[Dims]:
        named = site.params.get(self.axes, -1) if isinstance(self.axes, str) else self.axes(site.params)
        named = named if isinstance(named, (tuple, list, range)) else (named,)
        dims, axes = site.ins[0], {a % len(site.ins[0]) for a in named}
        terms.unify_all(*(v for v in site.ins if len(v) == len(dims)))
        reason = f"{site.eqn.primitive.name} runs along it"
        self.stay(build, site, [dims[a] for a in axes], reason)
        outs = []
        for v in site.eqn.outvars:
            if self.drops:
                outs.append(tuple(d for i, d in enumerate(dims) if i not in axes))
            else:
                outs.append(
                    tuple(Dim(n, pinned=reason) if i in axes else dims[i] for i, n in enumerate(walk.aval(v).shape))
                )
        return outs

    def stay(self, build: Build, site: Site, dims: Sequence[Dim], reason: str) -> None:
        """What holds of the axes along which it happens."""
        terms.pin(dims, reason)

    def states(self, site: Site, ins: Sequence[State]) -> Sequence[State]:
        found = []
        for i, out in enumerate(site.outs):
            own = ins[i] if len(ins) > 1 and i < len(ins) else ins[0]
            held = {}
            for leaf in free_leaves(out):
                same = max(s.at(leaf) for s in ins) is not Hold.VARIED
                is_zero = self.holds_zero and own.at(leaf) is Hold.ZERO and (i == 0 or len(ins) > 1)
                held[leaf] = Hold.ZERO if is_zero else Hold.SAME if same else Hold.VARIED
            found.append(State(held=held))
        return found


class Choice(Along):
    """The places of the largest along one axis. What is cut there takes part as it is, and places keep their numbers.

    So a router's columns go with the experts that they choose; what chooses anything else stays.
    """

    def stay(self, build: Build, site: Site, dims: Sequence[Dim], reason: str) -> None:
        (d,) = dims
        build.choices.append((d, reason))
        site.note = [terms.find(x) for x in site.ins[0]].index(terms.find(d))
        site.choices = [frozenset([d])] * len(site.eqn.outvars)

    def states(self, site: Site, ins: Sequence[State]) -> Sequence[State]:
        for leaf in free_leaves((site.ins[0][site.note],)):
            if ins[0].at(leaf) is Hold.VARIED:
                terms.pin([leaf], f"{site.eqn.primitive.name} runs along it, and its slices differ")
        return super().states(site, ins)

    def run(self, cut: Cut, site: Site, ins: Sequence[Value], at: At) -> list[Any]:
        return site_bind(site, [restored(cut, ins[0], site.note).at(at)])


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


class Unstack(Moves):
    """The slices along one axis."""

    def dims(self, build: Build, site: Site) -> Sequence[Dims]:
        axis = site.params["axis"]
        terms.pin([site.ins[0][axis]], "its slices are taken apart")
        return [(*site.ins[0][:axis], *site.ins[0][axis + 1 :])] * len(site.eqn.outvars)


class Tile(Moves):
    """An axis repeated: a product with the count."""

    def dims(self, build: Build, site: Site) -> Sequence[Dims]:
        def tiled(d: Dim, n: int) -> Dim:
            return terms.product([Dim(n, pinned="it is repeated"), d]) if n != 1 else d

        return [tuple(tiled(d, int(n)) for d, n in zip(site.ins[0], site.params["reps"], strict=True))]


def _windows(site: Site) -> list[Any]:
    names = ("window_dimensions", "window_strides", "base_dilation", "window_dilation", "padding")
    return [site.params[name] for name in names]


class Window(Moves):
    """Pooling: windows of length 1 leave an axis alone, along the others nothing can be cut."""

    reads = True

    def dims(self, build: Build, site: Site) -> Sequence[Dims]:
        reason, found = f"{site.eqn.primitive.name} slides along it", []
        (dims,), shape = site.ins, walk.aval(site.eqn.outvars[0]).shape
        plain = [all(x in (1, (0, 0)) for x in own) for own in zip(*_windows(site), strict=True)]
        for d, n, alone in zip(dims, shape, plain, strict=True):
            if alone and n == d.size:
                found.append(d)
            else:
                terms.pin([d], reason)
                found.append(Dim(n, pinned=reason))
        return [tuple(found)]

    def states(self, site: Site, ins: Sequence[State]) -> Sequence[State]:
        # Padding takes no part in a maximum, and adds zeros to a sum.
        return [State(held={x: ins[0].at(x) for x in free_leaves(site.outs[0])})]
