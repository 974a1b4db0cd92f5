"""What was recorded of a body of equations: sums by use, and what is known beside them."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jcompress.core import Layout
from jcompress.numeric.meshes import on_any_mesh
from jcompress.trace.core import places, walk
from jcompress.trace.core.flow import Step
from jcompress.trace.core.kinds import Contraction
from jcompress.trace.core.views import Activation, Atoms, Derived, Kind, View, depth, shards
from jcompress.trace.recording import meetings, roles, weighing
from jcompress.trace.recording.meetings import Meeting, UnreadError, Use
from jcompress.trace.recording.sites import Sites

Moments = dict[str, jax.Array]
LARGEST = ("absmax", "output_absmax")
"""What is combined by the maximum; everything else is summed."""


def merge(a: Mapping[str, jax.Array], b: Mapping[str, jax.Array]) -> Moments:
    """The moments of both."""
    both = {name: jnp.maximum(a[name], b[name]) if name in LARGEST else a[name] + b[name] for name in a if name in b}
    return {**a, **b, **both}


@dataclasses.dataclass
class Found:
    """What is known when the function has been traced, whatever its values.

    Attributes:
      wanted: the names of the moments of each path; the others are followed and not recorded.
      largest: the most features of which a Gram matrix is kept, or None.
      unread: paths whose products cannot be read, each with the reason.
      met: paths that met an activation in a product or a lookup.
      notes: what was left out of a path's statistics.
      layouts: what the axes of a parameter are, by its path and the axes that are contracted.
      mask: booleans or weights of positions, or None where all count alike.
      sites: arrays by product, instead of a mask: what each position of it counts, or marks on it.
      turns: of each loop around, the number of the turn.
      looked_up: masks that were looked up as activations were, by the names that their positions have.
      levels: for each path, how many products with parameters came before its first one in a row, counting from 1.
    """

    wanted: Mapping[str, frozenset[str]]
    largest: int | None = None
    mask: Any = None
    sites: Sites | None = None
    turns: dict[int, Any] = dataclasses.field(default_factory=dict)
    looked_up: dict[str, Any] = dataclasses.field(default_factory=dict)
    unread: dict[str, str] = dataclasses.field(default_factory=dict)
    met: dict[str, None] = dataclasses.field(default_factory=dict)
    notes: dict[str, str] = dataclasses.field(default_factory=dict)
    layouts: dict[tuple[str, tuple[int, ...]], Layout] = dataclasses.field(default_factory=dict)
    levels: dict[str, int] = dataclasses.field(default_factory=dict)

    def meets(self, view: View, *others: Kind) -> None:
        """Say that a parameter meets an activation in a product or a lookup."""
        self.met[view.path] = None
        level = depth(others) + view.level
        self.levels[view.path] = min(level, self.levels.get(view.path, level))

    def reads(self, met: Meeting, contracted: Atoms) -> None:
        """Remember what the axes of a parameter are in the first product that contracts these."""
        key = met.view.path, tuple(sorted({a.axis for a in contracted}))
        if key not in self.layouts:
            with contextlib.suppress(UnreadError):
                self.layouts[key] = roles.of_meeting(met)

    def weight(self, kind: Kind) -> Any:
        """How much each position of a value counts; None where all count alike."""
        if self.mask is None:
            return None
        view = kind.places if isinstance(kind, (Activation, Derived)) else None
        mask = self.mask if view is None or view.path == "where" else self.looked_up.get(view.path)
        return weighing.of_places(None if mask is None else view, self.mask if mask is None else mask, self.turns)

    def look_up(self, step: Step, values: Sequence[Any]) -> None:
        """Look up the weights of positions as the positions themselves are."""
        (out,), kind = step.outs, step.ins[0]
        if not isinstance(out, Activation) or out.places is None or out.places.path == "where":
            return
        with contextlib.suppress(UnreadError):
            weight = jnp.broadcast_to(self.weight(kind), values[0].shape)
            (found,) = walk.bind(step.eqn, [weight, *values[1:]], **_of_weights(step, weight))
            copies = [d for d, atoms in enumerate(out.places.dims) if places.is_free(atoms)]
            self.looked_up[out.places.path] = meetings.first(found, copies)

    def cannot(self, path: str, reason: str) -> None:
        """Say that a path is unread; the first reason stays."""
        self.unread.setdefault(path, reason)


def _of_weights(step: Step, weight: Any) -> dict[str, Any]:
    """What changes of a lookup where weights are looked up: nothing counts that is not there."""
    return {"fill_value": weight.dtype.type(0)} if step.eqn.params.get("fill_value") is not None else {}


@dataclasses.dataclass(frozen=True)
class Recorded:
    """One product of which moments are taken.

    Attributes:
      met: how the parameter stands in it.
      use: where it is counted.
      part: the free atoms, if they are not all there are.
      names: of the moments.
      x: the activation.
      y: the product.
      weight: how much each position counts, of the rank of ``y``; or None.
      sizes: of the groups that its rows are in, one for each position of the leading axis; or None.
    """

    met: Meeting
    use: Use
    part: Atoms | None
    names: frozenset[str]
    x: Any
    y: Any
    weight: Any = None
    sizes: Any = None

    def moments(self) -> Moments:
        """Of the activation."""
        return self._on_any_mesh(Recorded._of_activation, lambda x, *_: x)

    def _of_activation(self) -> Moments:
        x = self.met.laid_out(self.x)
        seen, labels = meetings.split(x, self.met.x, jnp.sum)

        def once(lead: Atoms, weight: Any) -> Moments:
            if weight is not None:
                weight, _ = meetings.split(meetings.spread(self.met, weight, x), self.met.x, jnp.max)
            return meetings.moments(seen, labels, lead, self.names, weight)

        return self._each(once)

    def outputs(self) -> Moments:
        """Of the product."""
        return self._on_any_mesh(Recorded._of_product, lambda x, y, *_: y)

    def _on_any_mesh(self, call: Callable[[Recorded], Moments], like: Callable[..., Any]) -> Moments:
        def made(x: Any, y: Any, weight: Any, sizes: Any) -> Moments:
            return call(dataclasses.replace(self, x=x, y=y, weight=weight, sizes=sizes))

        return on_any_mesh(made, like)(self.x, self.y, self.weight, self.sizes)

    def _of_product(self) -> Moments:
        if self.part is not None or "outputs" not in self.names:
            return {}
        seen, labels = meetings.split(self.y, self.met.y, meetings.first)

        def once(lead: Atoms, weight: Any) -> Moments:
            if weight is not None:
                weight, _ = meetings.split(jnp.broadcast_to(weight, self.y.shape), self.met.y, meetings.first)
            return meetings.of_outputs(seen, labels, lead, weight)

        return self._each(once)

    def _each(self, once: Callable[[Atoms, Any], Moments]) -> Moments:
        """Once, or for each group of rows: one after the other, so that no activation is copied for each."""
        row = self.met.rows
        if row is None:
            return once(self.use.lead, self.weight)
        ends = jnp.cumsum(self.sizes)
        group = jnp.searchsorted(ends, jnp.arange(self.y.shape[row]), side="right")
        group = group.reshape([-1 if d == row else 1 for d in range(self.y.ndim)])

        def of_group(i: Any) -> Moments:
            return once((), group == i if self.weight is None else jnp.where(group == i, self.weight, 0))

        return jax.lax.map(of_group, jnp.arange(len(self.sizes)))


class Tape:
    """What was recorded in one body: moments by use."""

    def __init__(self, found: Found) -> None:
        self.found = found
        self.moments: dict[Use, Moments] = {}
        self._parts: dict[Use, dict[Atoms, set[int]]] = {}
        self._same: dict[Any, tuple[Any, Moments]] = {}

    def add(self, use: Use, moments: Moments) -> None:
        """Count moments under a use."""
        self.moments[use] = merge(self.moments[use], moments) if use in self.moments else moments

    def product(self, step: Step, view: View, side: int, values: Sequence[Any], y: Any) -> Any:
        """Record that a parameter, operand ``side`` of the values, meets the other operand and gives ``y``.

        Returns:
          ``y``, marked if marks are asked for.
        """
        path, flow, other, x = view.path, step.flow, step.ins[1 - side], values[1 - side]
        assert isinstance(flow, Contraction)
        names = self.found.wanted.get(path, frozenset())
        self.found.meets(view, other)
        try:
            if not jnp.issubdtype(x.dtype, jnp.inexact):
                raise UnreadError(f"it meets an activation of dtype {x.dtype}, expected floating point or complex")
            met = flow.meeting(step.eqn, view, side)
            use, part = meetings.use_of(met)
            self.found.reads(met, met.contracted)
            sites, turns = self.found.sites, self.found.turns
            if names:
                use = dataclasses.replace(use, shards=tuple(sorted(shards([other]))))
                weight = self.found.weight(step.outs[0]) if sites is None else sites.at(met, step, side, y, turns)
                of = Recorded(met, use, part, self._affordable(met, use, names), x, y, weight, *values[2:])
                self._count(of, id(step.eqn) if met.is_derived else 0)
            return y if sites is None else sites.marked(met, step, side, y, turns)
        except UnreadError as reason:
            self.found.cannot(path, str(reason))
            return y

    def _count(self, of: Recorded, site: int) -> None:
        x, use = of.x, of.use
        if of.part is not None:
            # Parts of the outputs that meet one activation (the gates of a cell) are one use, not several.
            parts = self._parts.setdefault(use, {})
            known = any(id(x) in ids for ids in parts.values())
            parts.setdefault(of.part, set()).add(id(x))
            self._same[id(x)] = (x, {})
            if known:
                return
        # Kernels that read one activation (queries, keys and values) share its moments.
        own = None if self.found.sites is None else len(self._same)  # weights of its own: nothing is shared
        key = (id(x), site, of.met.x, use.lead, of.names, own)
        if key not in self._same:
            self._same[key] = (x, of.moments())
        self.add(use, self._same[key][1] | of.outputs())

    def _affordable(self, met: Meeting, use: Use, names: frozenset[str]) -> frozenset[str]:
        k = math.prod(a.size for a in met.contracted if a not in use.lead)
        if "gram" not in names or self.found.largest is None or k <= self.found.largest:
            return names
        self.found.notes[use.path] = f"no gram: {k} features, more than {self.found.largest}; ask for it by name"
        return names - {"gram"}

    def close(self) -> dict[Use, Moments]:
        """The moments; parts of one parameter that met different activations are no use of the whole."""
        for use, parts in self._parts.items():
            first, *rest = parts.values()
            if any(ids != first for ids in rest):
                self.found.cannot(use.path, "parts of its outputs meet different activations")
        return self.moments
