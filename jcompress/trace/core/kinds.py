"""What the results of a primitive have to do with the parameters, by what the primitive does with its operands."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeGuard

from jax.extend import core as jax_core

from jcompress.trace.core import places, walk
from jcompress.trace.core.contraction import Convolution, Dot
from jcompress.trace.core.views import (
    Activation,
    Derived,
    Joined,
    Kind,
    View,
    computed,
    depth,
    has_parameters,
    is_activation,
    parameters,
    shards,
)

Kinds = list[Kind]
Placed = Callable[[jax_core.JaxprEqn, Sequence[places.Places]], list[places.Places]]


class Reader(Protocol):
    """Reads the bodies inside an equation."""

    @property
    def loop(self) -> int:
        """How many loops, branches and meshes are around."""
        ...

    def body(self, closed: jax_core.ClosedJaxpr, kinds: Sequence[Kind]) -> Any:
        """A body whose inputs have these kinds."""
        ...

    def deeper(self) -> Reader:
        """The reader of what is inside one more of them."""
        ...


class Flow:
    """Results computed from the operands, entry by entry or not: made of parameters if all operands are.

    Args:
      placed: where the positions of the results stand in a mask, from those of the operands.

    Attributes:
      meets: whether a parameter and an activation may meet in it without a product over an axis of the parameter.
    """

    meets = True

    def __init__(self, placed: Placed = places.any_how) -> None:
        self.placed = placed

    def bodies(self, eqn: jax_core.JaxprEqn, kinds: Sequence[Kind], reader: Reader) -> list[Any]:
        """The bodies of equations inside, read."""
        return []

    def results(self, eqn: jax_core.JaxprEqn, kinds: Sequence[Kind], bodies: Sequence[Any]) -> Kinds:
        """The kinds of the results."""
        return [computed(eqn.primitive.name, kinds)] * len(eqn.outvars)

    def places(self, eqn: jax_core.JaxprEqn, views: Sequence[places.Places]) -> list[places.Places]:
        """Where the positions of the results stand in a mask, from those of the operands."""
        return self.placed(eqn, views)


class Linear(Flow):
    """Computed entry by entry, and linear in some of the operands: a parameter scaled, masked or added to stays one.

    Args:
      operands: those in which it is linear, one at a time.
      together: whether it is linear in several at once, as a choice between them is.
    """

    def __init__(self, operands: slice = slice(None), together: bool = False) -> None:
        super().__init__(places.entry_by_entry)
        self.operands, self.together = operands, together

    def results(self, eqn: jax_core.JaxprEqn, kinds: Sequence[Kind], bodies: Sequence[Any]) -> Kinds:
        kept = None if any(map(is_activation, kinds)) else self._kept(eqn, kinds)
        return super().results(eqn, kinds, bodies) if kept is None else [kept]

    def _kept(self, eqn: jax_core.JaxprEqn, kinds: Sequence[Kind]) -> Kind:
        """The parameter that the result is linear in; None where there is none, or several."""
        found = [k for k in kinds[self.operands] if isinstance(k, (View, Joined)) and _is_full(k, eqn)]
        if not found or any(k != found[0] for k in found) or (len(found) > 1 and not self.together):
            return None
        kind, others = found[0], [k for k in kinds if k is not found[0] and k != found[0]]
        if any(path in parameters(others, lookups=True) for path in parameters([kind], lookups=True)):
            return None
        name = eqn.primitive.name
        told = computed(name, others)
        beside = told.reasons if isinstance(told, Derived) else ()
        if isinstance(kind, Joined):
            return dataclasses.replace(kind, parts=tuple(_with(part, name, beside) for part in kind.parts))
        assert isinstance(kind, View)
        return _with(kind, name, beside)


def _with(view: View, name: str, beside: Sequence[tuple[str, str]]) -> View:
    return dataclasses.replace(view, changed=name, beside=tuple(dict([*view.beside, *beside]).items()))


def operands(kinds: Sequence[Kind]) -> Kinds:
    """The two operands of a product; a parameter that was scaled first is computed where it meets no activation."""
    pair = list(kinds[:2])
    if any(map(is_activation, pair)):
        return pair
    return [computed(k.changed, [k]) if isinstance(k, View) and k.changed else k for k in pair]


def _is_full(kind: Kind, eqn: jax_core.JaxprEqn) -> bool:
    """Whether a parameter fills the result, and is not spread over it."""
    dims = [atoms for view in _views(kind) for atoms in view.dims]
    if any(a.axis < 0 for atoms in dims for a in atoms):
        return False
    sizes = [math.prod(a.size for a in atoms) for atoms in dims]
    return isinstance(kind, Joined) or tuple(sizes) == walk.aval(eqn.outvars[0]).shape


class Opaque(Flow):
    """Nothing is known of what it does with a parameter that meets an activation."""

    meets = False


class Lookup(Flow):
    """Entries of the first operand at places that the others tell.

    Args:
      counts: whether it reads rows, as embeddings are read, which is a level of its own.
    """

    def __init__(self, counts: bool = False) -> None:
        super().__init__(places.of_gather if counts else places.resized)
        self.counts = counts

    def results(self, eqn: jax_core.JaxprEqn, kinds: Sequence[Kind], bodies: Sequence[Any]) -> Kinds:
        name, (first, *at) = eqn.primitive.name, kinds
        if not has_parameters(first) or not any(map(is_activation, at)):
            return [computed(name, kinds)] * len(eqn.outvars)
        level = depth(kinds) + (first.level if self.counts and isinstance(first, View) else 0)
        reasons = tuple((path, name) for path in parameters([first], lookups=True))
        return [Derived(reasons, level, lookup=True, shards=shards(kinds))] * len(eqn.outvars)


class Collective(Flow):
    """The values of several devices together.

    Args:
      same: whether devices hold the same values afterwards.
    """

    def __init__(self, same: bool = False) -> None:
        super().__init__()
        self.same = same

    def results(self, eqn: jax_core.JaxprEqn, kinds: Sequence[Kind], bodies: Sequence[Any]) -> Kinds:
        kind = computed(eqn.primitive.name, kinds)
        names = eqn.params.get("axes", eqn.params.get("axis_name", ()))
        names = frozenset(names if isinstance(names, (tuple, list, frozenset)) else (names,))
        if isinstance(kind, (Activation, Derived)):
            same = self.same and not eqn.params.get("axis_index_groups")
            kind = dataclasses.replace(kind, shards=kind.shards - names if same else kind.shards | names)
        return [kind] * len(eqn.outvars)


@dataclasses.dataclass(frozen=True)
class Contraction(Flow):
    """Sums of products over axes of two operands.

    Attributes:
      of: the product of an equation whose operand 0 or 1 is the weight.
      meeting: what meets the weight in it, with its axes told apart: ``meeting(eqn, view, side, x, y)``.
    """

    of: Callable[[jax_core.JaxprEqn, int], Dot | Convolution]
    meeting: Callable[..., Any]

    def results(self, eqn: jax_core.JaxprEqn, kinds: Sequence[Kind], bodies: Sequence[Any]) -> Kinds:
        made, side = computed(eqn.primitive.name, kinds), weight_side(kinds)
        if side is None:
            return [made]
        weight, x = kinds[side], kinds[1 - side]
        level = depth([x]) + max((part.level for part in _views(weight)), default=0)
        return [Activation(max(level, depth([made])), shards([*kinds, made]))]

    def places(self, eqn: jax_core.JaxprEqn, views: Sequence[places.Places]) -> list[places.Places]:
        made = self.of(eqn, 0)
        if isinstance(made, Convolution):
            return places.of_convolution(eqn, views)
        return places.of_dot(made.numbers, made.grouped, eqn, views)


def weight_side(kinds: Sequence[Kind]) -> int | None:
    """Which of two operands of a product is the weight, or None: what is counted, recorded and multiplied as one.

    A weight is made of parameters, and not looked up in them. It meets an activation; or it is a parameter as it is,
    and meets what was computed from parameters (learned queries after a norm).
    """
    kinds = operands(kinds)
    for side in (1, 0):
        if is_weight(kinds[side]) and is_activation(kinds[1 - side]):
            return side
    for side in (1, 0):
        if isinstance(kinds[side], (View, Joined)) and isinstance(kinds[1 - side], Derived):
            return side
    return None


def is_weight(kind: Kind) -> bool:
    """Whether a value is made of parameters, and not looked up in them."""
    return has_parameters(kind) and not is_activation(kind)


def _views(kind: Kind) -> tuple[View, ...]:
    return kind.parts if isinstance(kind, Joined) else (kind,) if isinstance(kind, View) else ()


def places_of(kind: Kind, shape: Sequence[int]) -> places.Places:
    """Where the positions of a value stand in a mask."""
    return kind.places if isinstance(kind, Activation) or is_looked_up(kind) else places.nowhere(shape)


def is_looked_up(kind: Kind) -> TypeGuard[Derived]:
    """Whether a value is rows of a parameter that an activation chose."""
    return isinstance(kind, Derived) and kind.lookup


def at_places(kind: Kind, view: places.Places) -> Kind:
    """A value whose positions stand there in a mask."""
    if isinstance(kind, Activation) or is_looked_up(kind):
        return dataclasses.replace(kind, places=view)
    return kind
