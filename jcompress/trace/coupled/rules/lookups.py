"""The rules of primitives that read and write at places that are computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import jax.numpy as jnp
from jax import lax

from jcompress.trace.core import walk
from jcompress.trace.coupled import dims as terms
from jcompress.trace.coupled.building import Build
from jcompress.trace.coupled.dims import Dim, Dims
from jcompress.trace.coupled.frames import At, Cut, Rule, Site, Value, restored, site_bind
from jcompress.trace.coupled.rules.joins import Joins
from jcompress.trace.coupled.rules.selections import Chosen, Placed
from jcompress.trace.coupled.states import Hold, State, free_leaves, joined

By = Literal["one", "sum", "product", "extremum"]
"""What an entry is afterwards: one of the update and what stood there, or both together."""


def _batching(numbers: Any, of: str) -> list[tuple[int, int]]:
    """Pairs of an axis of the operand and one of the indices that go together."""
    names = ("operand_batching_dims", of)
    return list(zip(*(getattr(numbers, name, ()) for name in names), strict=True))


class Gather(Rule):
    """Rows that are looked up: the axes that are taken whole pass through, the others stay.

    Where the places are known and only put an axis in another order, that axis passes too.
    """

    tells = True

    def dims(self, build: Build, site: Site) -> Sequence[Dims]:
        (x, indices), numbers, sizes = site.ins, site.params["dimension_numbers"], site.params["slice_sizes"]
        if (chosen := Chosen.of(site)) is not None:
            site.rule = chosen
            return chosen.dims(build, site)
        batch = dict(_batching(numbers, "start_indices_batching_dims"))
        hidden = {*numbers.collapsed_slice_dims, *batch}
        whole = [a for a in range(len(x)) if a not in hidden and sizes[a] == x[a].size]
        site.note = (whole, self._own(site))
        stay = [d for a, d in enumerate(x) if a not in whole and a not in batch and a not in site.note[1]]
        terms.pin(stay, "rows are looked up in it")
        for a, i in batch.items():
            terms.unify(x[a], indices[i])
        found = list(terms.fresh(walk.aval(site.eqn.outvars[0]).shape, "rows are looked up in it"))
        passing = [a for a in range(len(x)) if a not in hidden]
        for axis, a in zip(numbers.offset_dims, passing, strict=True):
            if a in whole:
                found[axis] = x[a]
        rest = [i for i in range(len(found)) if i not in numbers.offset_dims]
        for (i, d), axis in zip(enumerate(indices[:-1]), rest, strict=True):
            if i in batch.values():
                found[axis] = Dim(d.size, "link", (d,))
            else:
                terms.unify(found[axis], d)
        return [tuple(found)]

    def _own(self, site: Site) -> list[int]:
        """The axes in which those positions are looked up that were chosen along them."""
        own = [terms.find(choice) for choice in site.chosen[1]]
        hidden = map(int, site.params["dimension_numbers"].collapsed_slice_dims)
        return [a for a in hidden if terms.find(site.ins[0][a]) in own]

    def states(self, site: Site, ins: Sequence[State]) -> Sequence[State]:
        batch = _batching(site.params["dimension_numbers"], "start_indices_batching_dims")
        apart = {leaf for _, i in batch for leaf in terms.leaves(site.ins[1][i])}
        least, held = self._filled(site), {}
        for leaf in free_leaves(tuple(site.ins[0][a] for a in site.note[1])):
            if ins[0].at(leaf) is Hold.VARIED:
                terms.pin([leaf], "rows are looked up in it, and its slices differ")
        for leaf in free_leaves(site.outs[0]):
            found = max(ins[0].at(leaf), least)
            held[leaf] = max(found, ins[1].at(leaf)) if leaf in apart and found is not Hold.ZERO else found
        return [State(held=held)]

    def _filled(self, site: Site) -> Hold:
        """What a slice of zeros gives, where places outside are filled; a NaN stands in what stays as well."""
        value, kind = site.params["fill_value"], walk.aval(site.eqn.outvars[0]).dtype
        is_filled = site.params["mode"] == lax.GatherScatterMode.FILL_OR_DROP
        is_plain = jnp.issubdtype(kind, jnp.inexact) if value is None else bool(value == 0)
        return Hold.SAME if is_filled and not is_plain else Hold.ZERO

    def run(self, cut: Cut, site: Site, ins: Sequence[Value], at: At) -> list[Any]:
        numbers = site.params["dimension_numbers"]
        sizes, shape = list(site.params["slice_sizes"]), cut.shape(site.ins[0], at)
        for a in site.note[0]:
            sizes[a] = shape[a]
        for a, _ in _batching(numbers, "start_indices_batching_dims"):
            sizes[a] = min(sizes[a], 1)
        x = ins[0]
        for axis in site.note[1]:
            x = restored(cut, x, axis)
        return site_bind(site, [x.at(at), ins[1].at(at)], slice_sizes=tuple(sizes))


class Scatter(Joins):
    """Updates at looked-up rows: as :class:`Gather`, the axes that are taken whole pass through.

    Args:
      by: what an entry is afterwards.
    """

    tells = True

    def __init__(self, by: By) -> None:
        self.by = by

    def dims(self, build: Build, site: Site) -> Sequence[Dims]:
        (x, indices, updates), numbers = site.ins, site.params["dimension_numbers"]
        batch = dict(_batching(numbers, "scatter_indices_batching_dims"))
        hidden = {*numbers.inserted_window_dims, *batch}
        passing = [a for a in range(len(x)) if a not in hidden]
        if self.by == "one" and (placed := Placed.of(site)) is not None:
            site.rule = placed
            return placed.dims(build, site)
        site.note = self._chosen(build, site)
        terms.pin([x[a] for a in numbers.inserted_window_dims if a not in site.note], "rows are written into it")
        terms.pin([d for i, d in enumerate(indices) if i not in batch.values()], "rows are written into it")
        for axis, a in zip(numbers.update_window_dims, passing, strict=True):
            if updates[axis].size == x[a].size:
                terms.unify(updates[axis], x[a])
            else:
                terms.pin([updates[axis], x[a]], "rows are written into it")
        rest = [d for i, d in enumerate(updates) if i not in numbers.update_window_dims]
        for a, i in batch.items():
            terms.unify_all((x[a], x[a]), (indices[i], rest[i]))
        terms.pin([d for i, d in enumerate(rest) if i not in batch.values()], "rows are written into it")
        return [terms.alias(x)]

    def _chosen(self, build: Build, site: Site) -> list[int]:
        """The axes along which something is written where it was chosen: those may be of what is chosen."""
        found = []
        for a in map(int, site.params["dimension_numbers"].inserted_window_dims):
            pairs = [(c, site.ins[0][a]) for c in site.chosen[1] if c.size == site.ins[0][a].size]
            if pairs and site.known[0] is not None:
                build.experts += pairs
                build.choices.append((site.ins[0][a], "rows are written into it"))
                found.append(a)
        return found

    def run(self, cut: Cut, site: Site, ins: Sequence[Value], at: At) -> list[Any]:
        x = ins[0]
        for axis in site.note:
            x = restored(cut, x, axis)
        (found,) = site_bind(site, [x.at(at), *(v.at(at) for v in ins[1:])])
        for axis in site.note:
            found = walk.take(found, terms.kept_positions(site.outs[0][axis], cut.kept_at(at)), axis)
        return [found]

    def states(self, site: Site, ins: Sequence[State]) -> Sequence[State]:
        (x, places, updates), dims = ins, site.outs[0]
        written = {leaf for a in site.note for leaf in terms.leaves(site.ins[0][a])}
        for leaf in written.intersection(free_leaves(dims)):
            if x.at(leaf) is Hold.VARIED:
                terms.pin([leaf], "rows are written into it, and its slices differ")
        batch = _batching(site.params["dimension_numbers"], "scatter_indices_batching_dims")
        apart = {leaf for a, _ in batch for leaf in terms.leaves(site.ins[0][a])}
        found = joined([x, updates], dims)
        if found.constant is not None and (self.by in ("one", "extremum") or found.constant == 0):
            return [found]
        held = {leaf: max(x.at(leaf), updates.at(leaf)) for leaf in free_leaves(dims)}
        held.update(dict.fromkeys(written.intersection(held), Hold.VARIED))
        for leaf in apart.intersection(held):
            held[leaf] = max(held[leaf], places.at(leaf)) if held[leaf] is not Hold.ZERO else Hold.ZERO
        return [State(held=held)]


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
