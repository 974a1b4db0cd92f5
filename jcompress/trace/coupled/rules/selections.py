"""The rules of primitives that take positions along axes in an order that is known when the function is traced."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jcompress.trace.core import walk
from jcompress.trace.coupled import dims as terms
from jcompress.trace.coupled import orders
from jcompress.trace.coupled.building import Build
from jcompress.trace.coupled.dims import Dim, Dims
from jcompress.trace.coupled.frames import At, Cut, Site, Value, site_bind
from jcompress.trace.coupled.rules.moves import Moves


def selected(d: Dim, index: np.ndarray) -> Dim:
    """The positions of a dimension that an index takes, where that is a term: an order, a run, or copies.

    Raises:
      ClashError: where it is none of these.
    """
    n, every = len(index), np.arange(len(index))
    if orders.is_permutation(index, d.size):
        return terms.reordered(d, index)
    if n and (index == index[0] + every).all():
        start = int(index[0])
        return terms.as_concat(d, [start, n, d.size - start - n])[1]
    copies, rest = divmod(n, d.size)
    if not rest and (index == every // copies).all():
        return terms.product([d, Dim(copies, pinned="it is repeated")])
    if not rest and (index == every % d.size).all():
        return terms.product([Dim(copies, pinned="it is repeated"), d])
    raise terms.ClashError("positions along it are chosen by an index")


def take_selected(cut: Cut, x: Any, before: Dim, after: Dim, index: np.ndarray, axis: int, at: At) -> Any:
    """What ``index`` takes along an axis, at other sizes of its leaves."""
    kept = cut.kept_at(at)
    there = terms.kept_positions(before, kept)
    return walk.take(x, np.searchsorted(there, index[terms.kept_positions(after, kept)]), axis)


class Reverse(Moves):
    """Axes backwards: their parts in another order."""

    def dims(self, build: Build, site: Site) -> Sequence[Dims]:
        found = list(site.ins[0])
        for axis in site.params["dimensions"]:
            found[axis] = terms.reordered(found[axis], np.arange(found[axis].size)[::-1])
        return [tuple(found)]

    def run(self, cut: Cut, site: Site, ins: Sequence[Value], at: At) -> list[Any]:
        # What stays in a leaf is as much in order backwards as forwards.
        return site_bind(site, [ins[0].at(at)])
