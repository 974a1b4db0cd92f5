"""What a value inside a function has to do with the parameters: a parameter laid out anew, or something else."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True, order=True)
class Atom:
    """A run of positions along one axis of a parameter: ``offset + step * i`` for ``i < size``.

    Attributes:
      axis: the axis of the parameter, or -1 for copies that a broadcast made.
      step: the distance between positions, negative where they are reversed. Atoms of one axis, in order of falling
        step, are its C order.
      size: how many.
      offset: the first position.
    """

    axis: int
    step: int
    size: int
    offset: int = 0


Atoms = tuple[Atom, ...]


@dataclasses.dataclass(frozen=True)
class View:
    """A parameter with its entries laid out anew; scaled, masked or added to, where it says so, and else unchanged.

    Attributes:
      path: the parameter.
      shape: of the whole parameter.
      dims: for each axis of the value, the atoms it runs over, slowest first.
      fixed: atoms of one position, whose axes are gone: ``w[2]``.
      scanned: for each loop around, the loop and the atoms that it runs over.
      shards: inside ``shard_map``, the mesh axes along which devices hold different parts.
      level: how many products a product with it counts as: 1, or 0 where nobody asked for the parameter.
      changed: the primitive that did so last.
      beside: other parameters that scale it, mask it or are added to it, each with the primitive that does so.
    """

    path: str
    shape: tuple[int, ...]
    dims: tuple[Atoms, ...]
    fixed: Atoms = ()
    scanned: tuple[tuple[int, Atoms], ...] = ()
    shards: frozenset[str] = frozenset()
    level: int = 1
    changed: str = ""
    beside: tuple[tuple[str, str], ...] = ()

    def is_whole(self, atom: Atom) -> bool:
        """Whether the atom is all of its axis."""
        return atom.axis >= 0 and atom.size == self.shape[atom.axis]


@dataclasses.dataclass(frozen=True)
class Derived:
    """Computed from parameters and constants alone.

    Attributes:
      reasons: pairs of a path and the primitive that changed its values.
      depth: as in :class:`Activation`.
      lookup: entries of a parameter chosen by an activation: what is computed from them is an activation.
      places: as in :class:`Activation`.
    """

    reasons: tuple[tuple[str, str], ...]
    depth: int = 0
    lookup: bool = False
    shards: frozenset[str] = frozenset()
    places: View | None = None


@dataclasses.dataclass(frozen=True)
class Activation:
    """Depends on the arguments, after at most ``depth`` products with parameters in a row.

    Inside ``shard_map``, ``shards`` are the mesh axes along which devices hold different values. ``places`` says where
    its positions stand in the mask that a caller gave; None where nothing is known.
    """

    depth: int = 0
    shards: frozenset[str] = frozenset()
    places: View | None = None


@dataclasses.dataclass(frozen=True)
class Joined:
    """Parameters side by side along one axis, as where gates are multiplied in one product.

    Attributes:
      parts: the parameters.
      dim: the axis.
      sizes: the length of each along it.
      name: of the primitive that joined them.
    """

    parts: tuple[View, ...]
    dim: int
    sizes: tuple[int, ...]
    name: str


Kind = View | Joined | Derived | Activation | None
"""What a value is; None for constants."""


def whole(path: str, shape: Sequence[int], level: int = 1) -> View:
    """The view of a parameter as it is."""
    return View(path, tuple(shape), tuple((Atom(axis, 1, n),) for axis, n in enumerate(shape)), level=level)


def depth(kinds: Iterable[Kind]) -> int:
    """The largest depth among values."""
    return max((k.depth for k in kinds if isinstance(k, (Activation, Derived))), default=0)


def shards(kinds: Iterable[Kind]) -> frozenset[str]:
    """The mesh axes along which any of the values differ."""
    parts = [p for k in kinds for p in (k.parts if isinstance(k, Joined) else (k,))]
    return frozenset().union(*(p.shards for p in parts if isinstance(p, (View, Activation, Derived))))


def has_parameters(kind: Kind) -> bool:
    """Whether a value is made of parameters alone."""
    return isinstance(kind, (View, Joined, Derived))


def parameters(kinds: Sequence[Kind], lookups: bool) -> list[str]:
    """The paths of views and of what is derived from parameters."""
    views = [part for k in kinds for part in (k.parts if isinstance(k, Joined) else (k,)) if isinstance(part, View)]
    found = [path for view in views for path in (view.path, *dict(view.beside))]
    for kind in kinds:
        if isinstance(kind, Derived) and (lookups or not kind.lookup):
            found += [path for path, _ in kind.reasons]
    return found


def is_activation(kind: Kind) -> bool:
    """Whether a value depends on the arguments."""
    return isinstance(kind, Activation) or (isinstance(kind, Derived) and kind.lookup)


def computed(name: str, kinds: Sequence[Kind]) -> Kind:
    """What the primitive ``name`` makes of values of these kinds."""
    if any(map(is_activation, kinds)):
        return Activation(depth(kinds), shards(kinds))
    reasons: dict[str, str] = {}
    for kind in kinds:
        if isinstance(kind, View):
            reasons = {kind.path: name, **dict(kind.beside)} | reasons
        elif isinstance(kind, Joined):
            reasons = {p: kind.name for part in kind.parts for p in (part.path, *dict(part.beside))} | reasons
        elif isinstance(kind, Derived):
            reasons |= dict(kind.reasons)
    return Derived(tuple(reasons.items()), depth(kinds), shards=shards(kinds)) if reasons else None


def join(name: str, kinds: Sequence[Kind]) -> Kind:
    """What a value is that may be any of these, such as the result of a branch."""
    first, *rest = kinds
    return first if all(k == first for k in rest) else computed(name, kinds)


def peel(view: Kind, loop: int) -> Kind:
    """One slice along the leading axis, as the body of a loop sees it."""
    if isinstance(view, Joined):
        parts = tuple(p for p in (peel(part, loop) for part in view.parts) if isinstance(p, View))
        is_kept = view.dim > 0 and len(parts) == len(view.parts)
        return Joined(parts, view.dim - 1, view.sizes, view.name) if is_kept else computed(view.name, [view])
    if not isinstance(view, View):
        return view
    first, *rest = view.dims
    if all(a.axis < 0 for a in first):
        return dataclasses.replace(view, dims=tuple(rest))
    if any(a.axis < 0 for a in first):
        return computed("broadcast along a loop", [view])
    return dataclasses.replace(view, dims=tuple(rest), scanned=(*view.scanned, (loop, first)))


def spec_axes(spec: Sequence[Any]) -> frozenset[str]:
    """The mesh axes that a partition spec names."""
    return frozenset(name for entry in spec if entry for name in (entry if isinstance(entry, tuple) else (entry,)))
