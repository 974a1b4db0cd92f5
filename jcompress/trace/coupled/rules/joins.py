"""The rules of primitives that put arrays beside one another, or make them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jcompress.trace.core import walk
from jcompress.trace.coupled import dims as terms
from jcompress.trace.coupled.building import Build
from jcompress.trace.coupled.dims import Dim, Dims
from jcompress.trace.coupled.frames import At, Cut, Rule, Site, Value, site_bind
from jcompress.trace.coupled.states import Hold, State, free_leaves, joined


class Joins(Rule):
    """Results whose slices are slices of several operands."""

    def states(self, site: Site, ins: Sequence[State]) -> Sequence[State]:
        return [joined(ins, out) for out in site.outs]


class Concatenate(Joins):
    """One array after the other."""

    reads = False

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

    reads = False

    def dims(self, build: Build, site: Site) -> Sequence[Dims]:
        terms.unify_all(*site.ins)
        found = list(terms.alias(site.ins[0]))
        found.insert(site.params["axis"], Dim(len(site.ins), pinned="arrays are stacked along it"))
        return [tuple(found)]


class Pad(Rule):
    """A concatenation with leaves of its own before and after."""

    reads = False

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
        if not cut.leaves((dims[axis],)):
            return site_bind(site, [], shape=cut.shape(dims, at))
        positions = jnp.asarray(terms.kept_positions(dims[axis], cut.kept), site.params["dtype"])
        return [jax.lax.broadcast_in_dim(positions, cut.shape(dims, at), (axis,))]


class Drawn(Rule):
    """Random numbers: drawn for the full shape, so that those that stay are those that would have been drawn.

    Each key of an array of keys has numbers of its own.
    """

    def dims(self, build: Build, site: Site) -> Sequence[Dims]:
        keys = [v for v, x in zip(site.ins, site.eqn.invars, strict=True) if _is_key(x)]
        (lead,) = keys or [()]
        terms.pin([d for v in site.ins if v is not lead for d in v], "random numbers are drawn from it")
        shapes = [walk.aval(v).shape for v in site.eqn.outvars]
        site.note = len(lead)
        return [(*terms.alias(lead), *terms.fresh(shape[len(lead) :])) for shape in shapes]

    def run(self, cut: Cut, site: Site, ins: Sequence[Value], at: At) -> list[Any]:
        found = []
        for x, dims in zip(site_bind(site, [v.at(at) for v in ins]), site.outs, strict=True):
            for axis, d in enumerate(dims):
                if axis >= site.note and cut.leaves((d,)):
                    x = jnp.take(x, terms.kept_positions(d, cut.kept), axis=axis)
            found.append(x)
        return found


def _is_key(x: Any) -> bool:
    return bool(jnp.issubdtype(walk.aval(x).dtype, jax.dtypes.prng_key))
