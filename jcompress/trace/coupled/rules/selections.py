"""The rules of primitives that take positions along axes in an order that is known when the function is traced."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jcompress.trace.core import walk
from jcompress.trace.coupled import dims as terms
from jcompress.trace.coupled import orders
from jcompress.trace.coupled.building import Build, value_of
from jcompress.trace.coupled.dims import Dim, Dims
from jcompress.trace.coupled.frames import At, Cut, Site, Value, site_bind
from jcompress.trace.coupled.rules.moves import Moves
from jcompress.trace.coupled.states import State


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
        return terms.product([d, Dim(copies)])
    if not rest and (index == every % d.size).all():
        return terms.product([Dim(copies), d])
    raise terms.ClashError("positions along it are chosen by an index")


class Chosen(Moves):
    """A lookup of known positions along one axis, where what they take is a term.

    Args:
      axis: of the operand.
      place: of the result, where that axis stands.
      index: the positions.
      chosen: what they take.
    """

    def __init__(self, axis: int, place: int, index: np.ndarray, chosen: Dim) -> None:
        self.axis, self.place, self.index, self.chosen = axis, place, index, chosen

    @classmethod
    def of(cls, site: Site) -> Chosen | None:
        """That of a lookup, or None if it is another kind."""
        x, numbers, known = site.ins[0], site.params["dimension_numbers"], site.known[1]
        axes = tuple(map(int, numbers.start_index_map))
        alone = len(axes) == 1 and tuple(map(int, numbers.collapsed_slice_dims)) == axes
        if known is None or not alone or len(known.dims) != 2 or numbers.operand_batching_dims:
            return None
        (axis,), sizes = axes, site.params["slice_sizes"]
        is_rest_whole = all(n == d.size for i, (n, d) in enumerate(zip(sizes, x, strict=True)) if i != axis)
        index = value_of(known) if is_rest_whole else None
        if index is None or index.size == 0 or index.min() < 0 or index.max() >= x[axis].size:
            return None
        (place,) = (i for i in range(len(x)) if i not in numbers.offset_dims)
        index = index[:, 0].astype(np.int64)
        try:
            return cls(axis, place, index, selected(x[axis], index))
        except terms.ClashError:
            return None

    def dims(self, build: Build, site: Site) -> Sequence[Dims]:
        rest = [d for i, d in enumerate(site.ins[0]) if i != self.axis]
        return [(*rest[: self.place], self.chosen, *rest[self.place :])]

    def run(self, cut: Cut, site: Site, ins: Sequence[Value], at: At) -> list[Any]:
        kept, x = cut.kept_at(at), ins[0].at(at)
        there = terms.kept_positions(site.ins[0][self.axis], kept)
        wanted = self.index[terms.kept_positions(site.outs[0][self.place], kept)]
        return [jnp.moveaxis(walk.take(x, np.searchsorted(there, wanted), self.axis), self.axis, self.place)]


class Placed(Moves):
    """Values written over a whole axis at known positions: the axis of the values in another order.

    Args:
      axis: of the result.
      place: of the values, where that axis stands.
      order: where each position of the result is taken from.
    """

    def __init__(self, axis: int, place: int, order: np.ndarray) -> None:
        self.axis, self.place, self.order = axis, place, order

    @classmethod
    def of(cls, site: Site) -> Placed | None:
        """That of a write, or None if it is another kind."""
        (x, _, updates), numbers, known = site.ins, site.params["dimension_numbers"], site.known[1]
        axes = tuple(map(int, numbers.scatter_dims_to_operand_dims))
        alone = len(axes) == 1 and tuple(map(int, numbers.inserted_window_dims)) == axes
        if known is None or not alone or len(known.dims) != 2 or numbers.operand_batching_dims:
            return None
        rest = [d.size for i, d in enumerate(x) if i != axes[0]]
        index = value_of(known) if rest == [updates[i].size for i in numbers.update_window_dims] else None
        if index is None or not orders.is_permutation(index[:, 0], x[axes[0]].size):
            return None
        (place,) = (i for i in range(len(updates)) if i not in numbers.update_window_dims)
        return cls(axes[0], place, np.argsort(index[:, 0]))

    def _moved(self, updates: Dims) -> Dims:
        rest = [d for i, d in enumerate(updates) if i != self.place]
        return (*rest[: self.axis], updates[self.place], *rest[self.axis :])

    def dims(self, build: Build, site: Site) -> Sequence[Dims]:
        found = list(self._moved(site.ins[2]))
        try:
            found[self.axis] = terms.reordered(found[self.axis], self.order)
        except terms.ClashError as clash:
            terms.pin([found[self.axis]], str(clash))
            found[self.axis] = Dim(found[self.axis].size, pinned=str(clash))
        return [tuple(found)]

    def states(self, site: Site, ins: Sequence[State]) -> Sequence[State]:
        return super().states(site, ins[2:])

    def run(self, cut: Cut, site: Site, ins: Sequence[Value], at: At) -> list[Any]:
        kept, x = cut.kept_at(at), jnp.moveaxis(ins[2].at(at), self.place, self.axis)
        there = terms.kept_positions(site.ins[2][self.place], kept)
        wanted = self.order[terms.kept_positions(site.outs[0][self.axis], kept)]
        return [walk.take(x, np.searchsorted(there, wanted), self.axis)]


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
