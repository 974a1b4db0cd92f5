"""The rules of sums, products and convolutions: what was cut takes part in them by its share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jcompress.trace.core import walk
from jcompress.trace.coupled import dims as terms
from jcompress.trace.coupled.building import Build
from jcompress.trace.coupled.dims import Dim, Dims
from jcompress.trace.coupled.frames import At, Cut, Rule, Site, Value, restored, site_bind, subsets
from jcompress.trace.coupled.states import Hold, State, free_leaves


def _region(cut: Cut, x: Any, dims: Dims, axes: Sequence[int], at: At, leaves: At) -> Any:
    """Of ``x`` at ``at``, the part along ``axes`` where the slices of ``leaves`` stand that were cut."""
    for axis in axes:
        own = [leaf for leaf in leaves if any(leaf is d for d in terms.leaves(dims[axis]))]
        inside = np.ones(x.shape[axis], bool)
        for leaf in own:
            inside &= terms.index_of(dims[axis], leaf, cut.sizes(at)) >= 0
        if not inside.all():
            x = jnp.take(x, np.flatnonzero(inside), axis=axis)
    return x


Combine = Callable[[Any, Any, int], Any]
"""What stays, one slice of what was cut, and how often it was there -> both together."""


def _check_one_axis(dims: Dims, axes: Sequence[int]) -> None:
    """A leaf that is summed over and also stays cannot be cut: the two would be cut apart."""
    rest = {leaf for i, d in enumerate(dims) if i not in axes for leaf in terms.leaves(d)}
    both = [leaf for a in axes for leaf in terms.leaves(dims[a]) if leaf in rest]
    terms.pin(both, "it lies on two axes of an array, of which one is summed over")


class Reduce(Rule):
    """Sums and the like over some axes: what was cut takes part with one slice, as often as it was there.

    Args:
      combine: puts both together.
      neutral: whether zeros take no part.
    """

    def __init__(self, combine: Combine, neutral: bool) -> None:
        self.combine, self.neutral = combine, neutral

    def dims(self, build: Build, site: Site) -> Sequence[Dims]:
        axes = site.params["axes"]
        return [terms.alias([d for i, d in enumerate(site.ins[0]) if i not in axes])]

    def states(self, site: Site, ins: Sequence[State]) -> Sequence[State]:
        (dims,), axes, name = site.ins, site.params["axes"], site.eqn.primitive.name
        for leaf in free_leaves(tuple(dims[a] for a in axes)):
            if ins[0].at(leaf) is Hold.VARIED:
                terms.pin([leaf], f"{name} runs over it, and its slices differ")
            elif not (ins[0].at(leaf) is Hold.ZERO and self.neutral):
                _check_one_axis(dims, axes)
        if ins[0].constant == 0:
            return [State(0)]
        return [State(held={x: ins[0].at(x) for x in free_leaves(site.outs[0])})]

    def run(self, cut: Cut, site: Site, ins: Sequence[Value], at: At) -> list[Any]:
        (x,), axes = ins, site.params["axes"]
        (total,) = site_bind(site, [x.at(at)])
        for leaves in subsets(cut.leaves(tuple(x.dims[a] for a in axes)))[1:]:
            if self.neutral and x.zero_at(leaves):
                continue
            part = _region(cut, x.at(at | leaves), x.dims, axes, at | leaves, leaves)
            if part.size:
                total = self.combine(total, site_bind(site, [part])[0], cut.count(leaves))
        return [total]


class Dot(Rule):
    """Products over shared axes: zero slices drop out, equal ones count as often as they were there."""

    def numbers(self, site: Site) -> Any:
        """Which axes are summed over, and which are shared."""
        return site.params["dimension_numbers"]

    def dims(self, build: Build, site: Site) -> Sequence[Dims]:
        (left, right), ((lc, rc), (lb, rb)) = site.ins[:2], self.numbers(site)
        build.contracted += [left[a] for a in lc] + [right[a] for a in rc]
        for a, b in zip((*lc, *lb), (*rc, *rb), strict=True):
            terms.unify(left[a], right[b])
        free = [d for i, d in enumerate(left) if i not in (*lc, *lb)]
        free += [d for i, d in enumerate(right) if i not in (*rc, *rb)]
        return [terms.alias([*(left[a] for a in lb), *free])]

    def states(self, site: Site, ins: Sequence[State]) -> Sequence[State]:
        (left, right), (a, b) = ins[:2], site.ins[:2]
        (lc, rc), (lb, rb) = self.numbers(site)
        site.note = []
        for leaf in free_leaves(tuple(a[i] for i in lc)):
            pair = (left.at(leaf), right.at(leaf))
            if Hold.ZERO in pair:
                continue
            site.note.append(leaf)
            if Hold.VARIED in pair:
                terms.pin([leaf], "a product sums over it, and its slices differ")
            _check_one_axis(a, lc)
            _check_one_axis(b, rc)
        in_batch = {x for i in lb for x in terms.leaves(a[i])}
        in_left = {x for i, d in enumerate(a) if i not in (*lc, *lb) for x in terms.leaves(d)}
        in_right = {x for i, d in enumerate(b) if i not in (*rc, *rb) for x in terms.leaves(d)}
        held: dict[Dim, Hold] = {}
        for leaf in free_leaves(site.outs[0]):
            meets = [s.at(leaf) for s, own in ((left, in_left), (right, in_right)) if leaf in own]
            if leaf in in_batch:
                both = (left.at(leaf), right.at(leaf))
                meets.append(Hold.ZERO if Hold.ZERO in both else max(both))
            held[leaf] = max(meets, default=Hold.SAME)
        return [State(0) if 0 in (left.constant, right.constant) else State(held=held)]

    def run(self, cut: Cut, site: Site, ins: Sequence[Value], at: At) -> list[Any]:
        (left, right, *rest), ((lc, rc), _) = ins, self.numbers(site)
        others = [v.at(at) for v in rest]
        (total,) = site_bind(site, [left.at(at), right.at(at), *others])
        for leaves in subsets(cut.leaves(tuple(left.dims[a] for a in lc)))[1:]:
            if left.zero_at(leaves) or right.zero_at(leaves):
                continue
            a = _region(cut, left.at(at | leaves), left.dims, lc, at | leaves, leaves)
            b = _region(cut, right.at(at | leaves), right.dims, rc, at | leaves, leaves)
            cut.ran(site, at | leaves, leaves)
            (part,) = site_bind(site, [a, b, *others])
            total = total + part * jnp.asarray(cut.count(leaves), part.dtype)
        return [total]


class RaggedDot(Dot):
    """Products of runs of rows, each with its own matrix: rows and matrices stay, what is summed over can be cut."""

    def numbers(self, site: Site) -> Any:
        return site.params["ragged_dot_dimension_numbers"].dot_dimension_numbers

    def dims(self, build: Build, site: Site) -> Sequence[Dims]:
        (left, right, sizes), numbers = site.ins, site.params["ragged_dot_dimension_numbers"]
        (found,) = super().dims(build, site)
        terms.pin([left[a] for a in numbers.lhs_ragged_dimensions], "its rows are divided among the experts")
        reason, experts = "its experts are told apart by how many rows each gets", numbers.rhs_group_dimensions
        terms.pin(sizes, reason)
        for a in experts:
            chosen = [(c, right[a]) for c in self._choices(build, site) if c.size == right[a].size]
            build.experts += chosen
            build.choices.append((right[a], reason))
        (_, rc), (_, rb) = numbers.dot_dimension_numbers
        if not experts:  # rows are what is summed over, or shared: each expert has a product of its own
            lead = terms.fresh(walk.aval(site.eqn.outvars[0]).shape[:1], "its experts are told apart")
            return [found if len(found) == len(walk.aval(site.eqn.outvars[0]).shape) else (*lead, *found)]
        free = [i for i in range(len(right)) if i not in (*rc, *rb)]
        behind = len(found) - len(free)
        gone = {behind + free.index(a) for a in numbers.rhs_group_dimensions}
        return [tuple(d for i, d in enumerate(found) if i not in gone)]

    def _choices(self, build: Build, site: Site) -> list[Dim]:
        """The dimensions along which experts were chosen, by what counts the rows of each."""
        sizes = [terms.find(d) for d in site.ins[2]]
        return [*site.chosen[2], *(choice for choice, d in build.experts if terms.find(d) in sizes)]

    def states(self, site: Site, ins: Sequence[State]) -> Sequence[State]:
        experts = site.params["ragged_dot_dimension_numbers"].rhs_group_dimensions
        for leaf in free_leaves(tuple(site.ins[1][a] for a in experts)):
            if ins[1].at(leaf) is not Hold.ZERO:
                terms.pin([leaf], "rows are divided among its experts, and the slices of those are not zero")
        return super().states(site, ins)

    def run(self, cut: Cut, site: Site, ins: Sequence[Value], at: At) -> list[Any]:
        left, right, sizes = ins
        for axis in site.params["ragged_dot_dimension_numbers"].rhs_group_dimensions:
            right = restored(cut, right, axis)  # rows of an expert that was cut meet zeros
        return super().run(cut, site, [left, right, sizes], at)


class Convolution(Rule):
    """Features in and out are cut, groups among them; places and windows stay."""

    def dims(self, build: Build, site: Site) -> Sequence[Dims]:
        numbers, groups = site.params["dimension_numbers"], site.params["feature_group_count"]
        (x, kernel), (lhs, rhs, out) = site.ins, (numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec)
        if site.params["batch_group_count"] > 1:
            return super().dims(build, site)
        terms.pin([x[a] for a in lhs[2:]], "a convolution slides along it")
        terms.pin([kernel[a] for a in rhs[2:]], "it is the window of a convolution")
        features = self._features(build, site, x[lhs[1]], kernel[rhs[1]], kernel[rhs[0]], groups)
        found = list(terms.fresh(walk.aval(site.eqn.outvars[0]).shape, "a convolution slides along it"))
        found[out[0]], found[out[1]] = terms.alias([x[lhs[0]], features])
        return [tuple(found)]

    def _features(self, build: Build, site: Site, inside: Dim, window: Dim, outside: Dim, groups: int) -> Dim:
        build.contracted.append(window)
        site.note = Dim(groups, pinned="it is the number of groups of a convolution")
        try:
            if groups == 1:
                terms.unify(inside, window)
                return outside
            a, b = terms.as_product(inside, [groups, inside.size // groups])
            c, _ = terms.as_product(outside, [groups, outside.size // groups])
            terms.unify(a, c)
            terms.unify(b, window)
            site.note = c
        except terms.ClashError as clash:
            terms.pin([inside, window, outside], str(clash))
        return outside

    def states(self, site: Site, ins: Sequence[State]) -> Sequence[State]:
        numbers, (x, kernel) = site.params["dimension_numbers"], ins
        for leaf in free_leaves((site.ins[1][numbers.rhs_spec[1]],)):
            if Hold.ZERO not in (x.at(leaf), kernel.at(leaf)):
                terms.pin([leaf], "a convolution sums over it, and its slices are not zero")
        batch, features = (site.outs[0][a] for a in numbers.out_spec[:2])
        held = {}
        for leaf in free_leaves(site.outs[0]):
            grouped = leaf in terms.leaves(site.note)
            if leaf in terms.leaves(features):
                zero = kernel.at(leaf) is Hold.ZERO or (grouped and x.at(leaf) is Hold.ZERO)
            else:
                zero = leaf in terms.leaves(batch) and x.at(leaf) is Hold.ZERO
            held[leaf] = Hold.ZERO if zero else Hold.VARIED
        return [State(held=held)]

    def run(self, cut: Cut, site: Site, ins: Sequence[Value], at: At) -> list[Any]:
        groups = terms.size(site.note, cut.sizes(at))
        return site_bind(site, [v.at(at) for v in ins], feature_group_count=groups)
