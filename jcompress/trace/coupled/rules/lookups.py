"""The rules of primitives that read and write at places that are computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jcompress.trace.core import walk
from jcompress.trace.coupled import dims as terms
from jcompress.trace.coupled.dims import Dim, Dims
from jcompress.trace.coupled.frames import At, Build, Cut, Rule, Site, Value, site_bind
from jcompress.trace.coupled.rules.joins import Joins
from jcompress.trace.coupled.states import State, free_leaves, joined


class Gather(Rule):
    """Rows that are looked up: the axes that are taken whole pass through, the others stay."""

    def dims(self, build: Build, site: Site) -> Sequence[Dims]:
        (x, indices), numbers, sizes = site.ins, site.params["dimension_numbers"], site.params["slice_sizes"]
        hidden = {*numbers.collapsed_slice_dims, *getattr(numbers, "operand_batching_dims", ())}
        whole = [a for a in range(len(x)) if a not in hidden and sizes[a] == x[a].size]
        terms.pin([d for a, d in enumerate(x) if a not in whole], "rows are looked up in it")
        found = list(terms.fresh(walk.aval(site.eqn.outvars[0]).shape, "rows are looked up in it"))
        passing = [a for a in range(len(x)) if a not in hidden]
        for axis, a in zip(numbers.offset_dims, passing, strict=True):
            if a in whole:
                found[axis] = x[a]
        rest = [i for i in range(len(found)) if i not in numbers.offset_dims]
        for axis, d in zip(rest, indices[:-1], strict=True):
            terms.unify(found[axis], d)
        site.note = whole
        return [tuple(found)]

    def states(self, site: Site, ins: Sequence[State]) -> Sequence[State]:
        return [State(held={leaf: ins[0].at(leaf) for leaf in free_leaves(site.outs[0])})]

    def run(self, cut: Cut, site: Site, ins: Sequence[Value], at: At) -> list[Any]:
        sizes, shape = list(site.params["slice_sizes"]), cut.shape(site.ins[0], at)
        for a in site.note:
            sizes[a] = shape[a]
        return site_bind(site, [v.at(at) for v in ins], slice_sizes=tuple(sizes))


class Scatter(Joins):
    """Updates at looked-up rows: as :class:`Gather`, the axes that are taken whole pass through."""

    def dims(self, build: Build, site: Site) -> Sequence[Dims]:
        (x, indices, updates), numbers = site.ins, site.params["dimension_numbers"]
        hidden = {*numbers.inserted_window_dims, *getattr(numbers, "operand_batching_dims", ())}
        passing = [a for a in range(len(x)) if a not in hidden]
        terms.pin([x[a] for a in hidden], "rows are written into it")
        terms.pin(indices, "rows are written into it")
        for axis, a in zip(numbers.update_window_dims, passing, strict=True):
            if updates[axis].size == x[a].size:
                terms.unify(updates[axis], x[a])
            else:
                terms.pin([updates[axis], x[a]], "rows are written into it")
        terms.pin([d for i, d in enumerate(updates) if i not in numbers.update_window_dims], "rows are written into it")
        return [terms.alias(x)]

    def states(self, site: Site, ins: Sequence[State]) -> Sequence[State]:
        return [joined([ins[0], ins[2]], site.outs[0])]


class DynamicSlice(Rule):
    """Axes taken whole pass through, the others stay."""

    def dims(self, build: Build, site: Site) -> Sequence[Dims]:
        sizes, found = site.params["slice_sizes"], []
        for d, n in zip(site.ins[0], sizes, strict=True):
            if n != d.size:
                terms.pin([d], "a slice moves along it")
            found.append(d if n == d.size else Dim(n, pinned="a slice moves along it"))
        return [tuple(found)]

    def states(self, site: Site, ins: Sequence[State]) -> Sequence[State]:
        return [State(ins[0].constant, {leaf: ins[0].at(leaf) for leaf in free_leaves(site.outs[0])})]

    def run(self, cut: Cut, site: Site, ins: Sequence[Value], at: At) -> list[Any]:
        return site_bind(site, [v.at(at) for v in ins], slice_sizes=cut.shape(site.outs[0], at))


class DynamicUpdateSlice(Rule):
    """Axes written whole pass through, the others stay."""

    def dims(self, build: Build, site: Site) -> Sequence[Dims]:
        for a, b in zip(site.ins[0], site.ins[1], strict=True):
            if a.size == b.size:
                terms.unify(a, b)
            else:
                terms.pin([a, b], "a slice is written along it")
        return [terms.alias(site.ins[0])]

    def states(self, site: Site, ins: Sequence[State]) -> Sequence[State]:
        return [joined(ins[:2], site.outs[0])]
