"""A traced function with the dimensions of every value as terms, one frame for each call of a jaxpr.

Building a frame ties dimensions together; reading its states says what the cut slices of every value hold; running
it computes the function at other sizes. What an equation means for each of the three is a rule of its primitive.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.extend import core as jax_core

from jcompress.trace.core import walk
from jcompress.trace.coupled import dims as terms
from jcompress.trace.coupled.dims import Dim, Dims
from jcompress.trace.coupled.states import Hold, State, all_hold, settled, state_of

At = frozenset[Dim]
NOWHERE: At = frozenset()


@dataclasses.dataclass
class Site:
    """An equation at one call of the jaxpr that it is in.

    Attributes:
      eqn: the equation.
      rule: what its primitive means.
      ins: the dimensions of its operands.
      outs: the dimensions of its results.
      states: of its results, as they were read.
      note: what the rule wants to remember.
      frames: the calls inside it.
    """

    eqn: jax_core.JaxprEqn
    rule: Rule
    ins: list[Dims]
    outs: list[Dims] = dataclasses.field(default_factory=list)
    states: list[State] = dataclasses.field(default_factory=list)
    note: Any = None
    frames: list[Frame] = dataclasses.field(default_factory=list)

    @property
    def params(self) -> dict[str, Any]:
        """Of the equation."""
        return self.eqn.params


@dataclasses.dataclass
class Frame:
    """One call of a jaxpr: the dimensions of its inputs, its constants and its outputs, and its equations."""

    closed: jax_core.ClosedJaxpr
    ins: list[Dims]
    constants: list[Dims]
    sites: list[Site] = dataclasses.field(default_factory=list)
    outs: list[Dims] = dataclasses.field(default_factory=list)
    states: list[State] = dataclasses.field(default_factory=list)


class Build:
    """What is gathered while frames are built.

    Args:
      rule: that of an equation.
      default: that of an equation whose primitive cannot be read.

    Attributes:
      unread: primitives without a rule, and how often each was met.
      contracted: the dimensions over which products sum, as their operands wrote them.
      traced: derivatives of custom rules, by equation.
      open: functions with custom derivatives whose derivative is being built; a rule may call its own function.
    """

    def __init__(self, rule: Callable[[jax_core.JaxprEqn], Rule], default: Rule) -> None:
        self.rule, self.default = rule, default
        self.unread: Counter[str] = Counter()
        self.contracted: list[Dim] = []
        self.traced: dict[int, Any] = {}
        self.open: dict[str, Site] = {}

    def frame(self, closed: jax_core.ClosedJaxpr, ins: Sequence[Dims]) -> Frame:
        """A call of ``closed`` on values of these dimensions."""
        frame = Frame(closed, list(ins), [terms.fresh(np.shape(c)) for c in closed.consts])
        known: dict[Any, Dims] = dict(zip(closed.jaxpr.invars, frame.ins, strict=True))
        known.update(zip(closed.jaxpr.constvars, frame.constants, strict=True))
        for eqn in closed.jaxpr.eqns:
            rule = self.rule(eqn)
            if rule is self.default:
                self.unread[eqn.primitive.name] += 1
            site = Site(eqn, rule, [_dims(x, known) for x in eqn.invars])
            site.outs = [tuple(d) for d in rule.dims(self, site)]
            known.update(zip(eqn.outvars, site.outs, strict=True))
            frame.sites.append(site)
        frame.outs = [_dims(x, known) for x in closed.jaxpr.outvars]
        return frame


def _dims(x: Any, known: Mapping[Any, Dims]) -> Dims:
    return terms.fresh(np.shape(x.val)) if isinstance(x, jax_core.Literal) else known[x]


def read_states(frame: Frame, states: Sequence[State]) -> list[State]:
    """The states of a frame's outputs, given those of its inputs; pins what could not be cut."""
    frame.states, jaxpr = list(states), frame.closed.jaxpr
    known: dict[Any, State] = dict(zip(jaxpr.invars, states, strict=True))
    for v, x, dims in zip(jaxpr.constvars, frame.closed.consts, frame.constants, strict=True):
        known[v] = state_of(x, dims)

    def state(x: Any) -> State:
        return state_of(np.asarray(x.val), ()) if isinstance(x, jax_core.Literal) else known[x]

    for site in frame.sites:
        found = site.rule.states(site, [state(x) for x in site.eqn.invars])
        site.states = [settled(s, d) for s, d in zip(found, site.outs, strict=True)]
        known.update(zip(site.eqn.outvars, site.states, strict=True))
    return [state(x) for x in jaxpr.outvars]


class Cut:
    """Which indices of which leaves stay, and the shapes that follow. Leaves that are not cut are not named."""

    def __init__(self, kept: Mapping[Dim, np.ndarray]) -> None:
        self.kept = {leaf: index for leaf, index in kept.items() if len(index) < leaf.size}

    def sizes(self, at: At) -> dict[Dim, int]:
        """The sizes with the leaves in ``at`` reduced to one slice of those that are cut."""
        return {leaf: 1 if leaf in at else len(index) for leaf, index in self.kept.items()}

    def leaves(self, dims: Dims) -> At:
        """The leaves of a value that are cut."""
        return frozenset(leaf for d in dims for leaf in terms.leaves(d) if leaf in self.kept)

    def count(self, leaves: At) -> int:
        """How many combinations of slices are cut."""
        return int(np.prod([leaf.size - len(self.kept[leaf]) for leaf in leaves]))

    def shape(self, dims: Dims, at: At) -> tuple[int, ...]:
        """The shape of a value of these dimensions."""
        return terms.shape(dims, self.sizes(at))


class Value:
    """A value at the new sizes, and, where something asks, one of the slices that were cut.

    ``at(S)`` is the array in which each leaf of ``S`` has one slice, standing for those that were cut, and every
    other leaf has those that stay.
    """

    def __init__(self, cut: Cut, dims: Dims, state: State, get: Callable[[At], Any]) -> None:
        self.cut, self.dims, self.state, self._get = cut, dims, state, get
        self.leaves = cut.leaves(dims)
        self.known: dict[At, Any] = {}

    def zero_at(self, at: Iterable[Dim]) -> bool:
        """Whether one of the leaves holds zeros where it is cut."""
        return any(leaf in self.leaves and self.state.at(leaf) is Hold.ZERO for leaf in at)

    def at(self, at: At) -> Any:
        """The array; see the class."""
        at = at & self.leaves
        if at not in self.known:
            zero = [leaf for leaf in at if self.state.at(leaf) is Hold.ZERO]
            self.known[at] = self._with_zeros(at, zero[0]) if zero else self._get(at)
        return self.known[at]

    def _with_zeros(self, at: At, leaf: Dim) -> Any:
        """The slice of ``leaf`` is zero; what stands beside it in a concatenation is taken from the rest."""
        base = self.at(at - {leaf})
        for axis, d in enumerate(self.dims):
            if all(x is not leaf for x in terms.leaves(d)):
                continue
            new = terms.index_of(d, leaf, self.cut.sizes(at))
            old = terms.index_of(d, leaf, self.cut.sizes(at - {leaf}))
            source = np.full(len(new), base.shape[axis])
            source[new < 0] = np.flatnonzero(old < 0)
            padding = [(0, int(axis == i)) for i in range(base.ndim)]
            base = jnp.take(jnp.pad(base, padding), source, axis=axis)
        return base


def constant(cut: Cut, x: Any, dims: Dims) -> Value:
    """A constant with the positions that stay."""

    def get(at: At) -> Any:
        found = x
        for axis, d in enumerate(dims):
            if cut.leaves((d,)):
                # One slice is asked for only where all of them hold the same.
                kept = {leaf: index[:1] if leaf in at else index for leaf, index in cut.kept.items()}
                found = jnp.take(found, terms.kept_positions(d, kept), axis=axis)
        return found

    return Value(cut, dims, state_of(x, dims), get)


def run(cut: Cut, frame: Frame, ins: Sequence[Value]) -> list[Value]:
    """The outputs of a frame at the new sizes; slices that were cut are computed where something asks for them."""
    jaxpr = frame.closed.jaxpr
    known: dict[Any, Value] = dict(zip(jaxpr.invars, ins, strict=True))
    for v, x, dims in zip(jaxpr.constvars, frame.closed.consts, frame.constants, strict=True):
        known[v] = constant(cut, x, dims)

    def value(x: Any) -> Value:
        return constant(cut, x.val, terms.fresh(np.shape(x.val))) if isinstance(x, jax_core.Literal) else known[x]

    for site in frame.sites:
        outs = site.rule.values(cut, site, [value(x) for x in site.eqn.invars])
        for out in outs:
            out.at(NOWHERE)
        known.update(zip(site.eqn.outvars, outs, strict=True))
    return [value(x) for x in jaxpr.outvars]


def subsets(leaves: Iterable[Dim]) -> list[At]:
    """All subsets, the empty one first."""
    leaves = list(leaves)
    return [frozenset(s) for n in range(len(leaves) + 1) for s in itertools.combinations(leaves, n)]


class Versions:
    """The arrays of several values that cross a call: each as it is, and at the slices that may be asked for."""

    def __init__(self, cut: Cut, values: Sequence[Value], at: At = NOWHERE) -> None:
        same = {leaf for v in values for leaf in v.leaves if v.state.at(leaf) is Hold.SAME}
        self.cut, self.dims, self.states = cut, [v.dims for v in values], [v.state for v in values]
        self.layout = [
            (i, s) for i, v in enumerate(values) for s in subsets((at | same) & v.leaves) if not v.zero_at(s)
        ]
        self.arrays = [values[i].at(s) for i, s in self.layout]

    def values(self, arrays: Sequence[Any]) -> list[Value]:
        """Values again, on the other side of the call."""

        def unknown(at: At) -> Any:
            raise AssertionError(f"a slice of {set(at)} was asked for across a call; it should have been pinned")

        found = [Value(self.cut, d, s, unknown) for d, s in zip(self.dims, self.states, strict=True)]
        for (i, s), x in zip(self.layout, arrays, strict=True):
            found[i].known[s] = x
        return found


class Rule:
    """What a primitive means: for dimensions, for the slices that are cut, and at other sizes.

    This one is for a primitive that nothing is known of: it pins all that it meets.
    """

    def dims(self, build: Build, site: Site) -> Sequence[Dims]:
        """The dimensions of the results; ties what must be cut together."""
        reason = f"the primitive {site.eqn.primitive.name} cannot be read"
        for value in site.ins:
            terms.pin(value, reason)
        return [terms.fresh(walk.aval(v).shape, reason) for v in site.eqn.outvars]

    def states(self, site: Site, ins: Sequence[State]) -> Sequence[State]:
        """What the cut slices of the results hold; pins what cannot be cut."""
        return [all_hold(d, Hold.VARIED) for d in site.outs]

    def values(self, cut: Cut, site: Site, ins: Sequence[Value]) -> list[Value]:
        """The results at the new sizes."""
        done: dict[At, list[Any]] = {}

        def get(i: int, at: At) -> Any:
            if at not in done:
                done[at] = self.run(cut, site, ins, at)
            return done[at][i]

        def value(i: int) -> Value:
            return Value(cut, site.outs[i], site.states[i], lambda at: get(i, at))

        return [value(i) for i in range(len(site.outs))]

    def run(self, cut: Cut, site: Site, ins: Sequence[Value], at: At) -> list[Any]:
        """The results as arrays, each leaf of ``at`` reduced to one slice."""
        return site_bind(site, [v.at(at) for v in ins])


def site_bind(site: Site, arrays: Sequence[Any], **changed: Any) -> list[Any]:
    """Apply the equation with some of its parameters changed."""
    return walk.bind(site.eqn, arrays, **changed)
