"""What the slices of a value hold that are cut: zeros, one value for all, or anything."""

from __future__ import annotations

import dataclasses
import enum
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jcompress.trace.coupled import dims as terms
from jcompress.trace.coupled.dims import Dim, Dims


class Hold(enum.IntEnum):
    """What the cut slices of a value hold: zeros, one value that all of them share, or anything."""

    ZERO = 0
    SAME = 1
    VARIED = 2


@dataclasses.dataclass(frozen=True)
class State:
    """What the slices of a value hold that are cut, for each leaf of its dimensions.

    Attributes:
      constant: the number that the whole value equals, where it is known.
      held: for each leaf of the value that may be cut, unless ``constant`` tells.
    """

    constant: Any = None
    held: Mapping[Dim, Hold] = dataclasses.field(default_factory=dict)

    def at(self, leaf: Dim) -> Hold:
        """What the slices of this leaf hold; a value without the leaf has one slice for all."""
        if self.constant is not None:
            return Hold.ZERO if self.constant == 0 else Hold.SAME
        return self.held.get(leaf, Hold.SAME)


def free_leaves(dims: Dims) -> list[Dim]:
    """The leaves of a value that may be cut, each once."""
    return list(dict.fromkeys(leaf for d in dims for leaf in terms.leaves(d) if not leaf.pinned))


def all_hold(dims: Dims, hold: Hold) -> State:
    """The state of a value in which all that is cut holds the same."""
    return State(held=dict.fromkeys(free_leaves(dims), hold))


def state_of(x: Any, dims: Dims) -> State:
    """Of an array that is known when the function is traced."""
    known = isinstance(x, (np.ndarray, np.generic, jax.Array)) and not isinstance(x, jax.core.Tracer)
    plain = known and not jax.dtypes.issubdtype(x.dtype, jax.dtypes.extended) and x.dtype != jax.dtypes.float0
    if plain and 0 < x.size <= 1 << 16:
        array = np.asarray(x)
        if (array == array.flat[0]).all():
            return State(constant=array.flat[0])
    return all_hold(dims, Hold.VARIED)


def joined(states: Sequence[State], dims: Dims) -> State:
    """The state of a value that may be any of several."""
    constants = {s.constant for s in states}
    if len(constants) == 1 and None not in constants:
        return states[0]
    return State(held={leaf: max(s.at(leaf) for s in states) for leaf in free_leaves(dims)})


def settled(state: State, dims: Dims) -> State:
    """Where a leaf lies on two axes, one slice of it tells nothing of the others unless all are zero."""
    often = Counter(leaf for d in dims for leaf in set(terms.leaves(d)))
    held = {x: Hold.VARIED if often[x] > 1 and h is not Hold.ZERO else h for x, h in state.held.items()}
    return State(state.constant, held)


def of_use(state: State, own: Dims, dims: Dims) -> State:
    """The state of a constant under the dimensions of one use, axis by axis."""
    if state.constant is not None:
        return state
    often, held = Counter(leaf for d in own for leaf in terms.leaves(d)), {}
    for d, used in zip(own, dims, strict=True):
        leaves = list(terms.leaves(d))
        is_same = all(often[x] == 1 and not x.pinned and state.at(x) is not Hold.VARIED for x in leaves)
        held.update(dict.fromkeys(terms.leaves(used), Hold.SAME if is_same else Hold.VARIED))
    return State(held=held)
