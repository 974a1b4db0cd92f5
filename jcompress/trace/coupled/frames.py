"""A traced function with the dimensions of every value as terms, one frame for each call of a jaxpr.

Building a frame ties dimensions together; reading its states says what the cut slices of every value hold; running
it computes the function at other sizes. What an equation means for each of the three is a rule of its primitive.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from jax.extend import core as jax_core

from jcompress.trace.core import walk
from jcompress.trace.coupled import dims as terms
from jcompress.trace.coupled.dims import Dim, Dims
from jcompress.trace.coupled.states import Hold, State, all_hold, of_use, settled, state_of

if TYPE_CHECKING:
    from jcompress.trace.coupled.building import Build

At = frozenset[Dim]
NOWHERE: At = frozenset()
Chosen = frozenset[Dim]
NO_CHOICE: Chosen = frozenset()


@dataclasses.dataclass(eq=False)
class Known:
    """A constant: its value, or the equation that makes it from others.

    Attributes:
      dims: its dimensions, which no use of it shares.
      value: of one that the function closes over.
      eqn: of one that is made.
      operands: of that equation: constants, and literals.
      index: which of its results it is.
      state: as it was read.
    """

    dims: Dims
    value: Any = None
    eqn: jax_core.JaxprEqn | None = None
    operands: Sequence[Any] = ()
    index: int = 0
    state: State = State()


@dataclasses.dataclass
class Site:
    """An equation at one call of the jaxpr that it is in.

    Attributes:
      eqn: the equation.
      rule: what its primitive means.
      ins: the dimensions of its operands.
      sources: where its operands stand in the frame, literals as they are.
      places: where its results stand.
      known: how those operands are made that are constants.
      trained: which operands depend on parameters.
      chosen: for each operand, the dimensions along which its numbers are positions that were chosen.
      outs: the dimensions of its results.
      states: of its results, as they were read.
      note: what the rule wants to remember.
      frames: the calls inside it.
      made: how those results are made that are constants.
      choices: what ``chosen`` is of the results, where the rule says it.
    """

    eqn: jax_core.JaxprEqn
    rule: Rule
    ins: list[Dims]
    sources: list[Any]
    places: list[Any]
    known: list[Known | None]
    trained: list[bool]
    chosen: list[Chosen]
    outs: list[Dims] = dataclasses.field(default_factory=list)
    states: list[State] = dataclasses.field(default_factory=list)
    note: Any = None
    frames: list[Frame] = dataclasses.field(default_factory=list)
    made: list[Known | None] = dataclasses.field(default_factory=list)
    choices: list[Chosen] | None = None

    @property
    def params(self) -> dict[str, Any]:
        """Of the equation."""
        return self.eqn.params


@dataclasses.dataclass
class Frame:
    """One call of a jaxpr: the dimensions of its inputs and its outputs, its constants, and its equations.

    Attributes:
      closed: the jaxpr.
      ins: of its inputs.
      constants: what it closes over.
      given: which of its inputs are constants.
      fixed: its equations of constants alone.
      uses: where each use of a constant stands, and its dimensions.
      sites: its other equations.
      results: where its outputs stand, literals as they are.
      outs: of its outputs.
      states: of its inputs, as they were read.
      known: how those outputs are made that are constants.
      chosen: what it is of the outputs.
    """

    closed: jax_core.ClosedJaxpr
    ins: list[Dims]
    constants: list[Known] = dataclasses.field(default_factory=list)
    given: list[tuple[int, Known]] = dataclasses.field(default_factory=list)
    fixed: list[Site] = dataclasses.field(default_factory=list)
    uses: list[tuple[Any, Known, Dims]] = dataclasses.field(default_factory=list)
    sites: list[Site] = dataclasses.field(default_factory=list)
    results: list[Any] = dataclasses.field(default_factory=list)
    outs: list[Dims] = dataclasses.field(default_factory=list)
    states: list[State] = dataclasses.field(default_factory=list)
    known: list[Known | None] = dataclasses.field(default_factory=list)
    chosen: list[Chosen] = dataclasses.field(default_factory=list)


def read_leaves(frame: Frame) -> set[Dim]:
    """The leaves that something reads in a frame and in what it calls, so without parts that are sliced away."""
    found: set[Dim] = set()
    left, seen = [frame], {id(frame)}
    while left:
        for site in left.pop().sites:
            if site.rule.reads:
                found.update(leaf for value in site.ins for d in value for leaf in terms.leaves(d))
            inside = [f for f in site.frames if id(f) not in seen]
            seen.update(map(id, inside))
            left += inside
    return found


def read_states(frame: Frame, states: Sequence[State]) -> list[State]:
    """The states of a frame's outputs, given those of its inputs; pins what could not be cut."""
    frame.states, jaxpr = list(states), frame.closed.jaxpr
    known: dict[Any, State] = dict(zip(jaxpr.invars, states, strict=True))
    for constant in frame.constants:
        constant.state = state_of(constant.value, constant.dims)

    def state(x: Any) -> State:
        if isinstance(x, jax_core.Literal):
            return state_of(np.asarray(x.val), ())
        return x.state if isinstance(x, Known) else known[x]

    def read(site: Site) -> None:
        found = site.rule.states(site, [state(x) for x in site.sources])
        site.states = [settled(s, d) for s, d in zip(found, site.outs, strict=True)]

    for site in frame.fixed:
        read(site)
        for constant, found in zip(site.places, site.states, strict=True):
            constant.state = found
    known.update({place: of_use(k.state, k.dims, dims) for place, k, dims in frame.uses})
    for site in frame.sites:
        read(site)
        known.update(zip(site.places, site.states, strict=True))
    return [state(x) for x in frame.results]


class Cut:
    """Which indices of which leaves stay, and the shapes that follow. Leaves that are not cut are not named."""

    def __init__(self, kept: Mapping[Dim, np.ndarray]) -> None:
        self.kept = {leaf: index for leaf, index in kept.items() if len(index) < leaf.size}

    def sizes(self, at: At) -> dict[Dim, int]:
        """The sizes with the leaves in ``at`` reduced to one slice of those that are cut."""
        return {leaf: 1 if leaf in at else len(index) for leaf, index in self.kept.items()}

    def kept_at(self, at: At) -> dict[Dim, np.ndarray]:
        """The indices that :meth:`sizes` counts."""
        return {x: _one_cut(x.size, index) if x in at else index for x, index in self.kept.items()}

    def leaves(self, dims: Dims) -> At:
        """The leaves of a value that are cut."""
        return frozenset(leaf for d in dims for leaf in terms.leaves(d) if leaf in self.kept)

    def count(self, leaves: At) -> int:
        """How many combinations of slices are cut."""
        return int(np.prod([leaf.size - len(self.kept[leaf]) for leaf in leaves]))

    def shape(self, dims: Dims, at: At) -> tuple[int, ...]:
        """The shape of a value of these dimensions."""
        return terms.shape(dims, self.sizes(at))

    def ran(self, site: Site, at: At, summed: At = NOWHERE) -> None:
        """An equation is computed at some slices that were cut, and sums over the one of ``summed``."""


def _one_cut(size: int, kept: np.ndarray) -> np.ndarray:
    return np.setdiff1d(np.arange(size), kept)[:1]


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


def restored(cut: Cut, x: Value, axis: int) -> Value:
    """A value with the slices put back that were cut from an axis, which is one leaf."""
    leaf = terms.find(x.dims[axis])
    if leaf not in cut.kept:
        return x
    kept = cut.kept[leaf]
    source = np.full(leaf.size, len(kept))
    source[kept] = np.arange(len(kept))
    dims = (*x.dims[:axis], Dim(leaf.size), *x.dims[axis + 1 :])

    def get(at: At) -> Any:
        return jnp.take(jnp.concatenate([x.at(at), x.at(at | {leaf})], axis), source, axis=axis)

    return Value(cut, dims, x.state, get)


def constant(cut: Cut, x: Any, dims: Dims, state: State) -> Value:
    """A constant with the positions that stay."""

    def get(at: At) -> Any:
        found = x
        for axis, d in enumerate(dims):
            if cut.leaves((d,)):
                # One slice is asked for only where all of them hold the same.
                kept = {leaf: index[:1] if leaf in at else index for leaf, index in cut.kept.items()}
                found = jnp.take(found, terms.kept_positions(d, kept), axis=axis)
        return found

    return Value(cut, dims, state, get)


def run(cut: Cut, frame: Frame, ins: Sequence[Value]) -> list[Value]:
    """The outputs of a frame at the new sizes; slices that were cut are computed where something asks for them."""
    known: dict[Any, Value] = dict(zip(frame.closed.jaxpr.invars, ins, strict=True))
    fixed = _constants(frame, ins)
    known.update({place: constant(cut, fixed(k), d, of_use(k.state, k.dims, d)) for place, k, d in frame.uses})

    def value(x: Any) -> Value:
        if not isinstance(x, jax_core.Literal):
            return known[x]
        dims = terms.fresh(np.shape(x.val))
        return constant(cut, x.val, dims, state_of(x.val, dims))

    for site in frame.sites:
        outs = site.rule.values(cut, site, [value(x) for x in site.sources])
        for out in outs:
            out.at(NOWHERE)
        known.update(zip(site.places, outs, strict=True))
    return [value(x) for x in frame.results]


def _constants(frame: Frame, ins: Sequence[Value]) -> Callable[[Any], Any]:
    """The constants of a frame, whole, and those that the calls in it give back."""
    found = {k: k.value for k in frame.constants} | {k: ins[i].at(NOWHERE) for i, k in frame.given}

    def array(x: Any) -> Any:
        if not isinstance(x, Known):
            return x.val
        if x not in found:
            found[x] = x.value if x.eqn is None else walk.bind(x.eqn, list(map(array, x.operands)))[x.index]
        return found[x]

    for site in frame.fixed:
        found.update(zip(site.places, walk.bind(site.eqn, list(map(array, site.sources))), strict=True))
    return array


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

    Attributes:
      reads: whether it makes something of the slices that it meets, or only passes them on.
      tells: whether its results are positions that were chosen, if an operand is.
    """

    reads = True
    tells = False

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
                cut.ran(site, at)
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
