"""Changes of layout: where the entries of a parameter stand after an equation that only moves them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from jax.extend import core as jax_core

from jcompress.trace.core import walk
from jcompress.trace.core.kinds import Flow, Kinds
from jcompress.trace.core.places import Places, joined
from jcompress.trace.core.views import Atom, Atoms, Joined, Kind, View, computed, spec_axes


def regroup(atoms: Sequence[Atom], shape: Sequence[int]) -> list[Atoms] | None:
    """The same positions under axes of other sizes, or None if an axis would take part of a run."""
    rest = [a for a in atoms if a.size > 1]
    dims: list[Atoms] = []
    for n in shape:
        found: list[Atom] = []
        while n > 1:
            atom = rest.pop(0)
            if n % atom.size == 0:
                found.append(atom)
                n //= atom.size
            elif atom.size % n == 0:
                major, minor = split(atom, n)
                found.append(major)
                rest.insert(0, minor)
                n = 1
            else:
                return None
        dims.append(tuple(found))
    return dims


def reshaped(view: View, shape: Sequence[int]) -> View | None:
    """A parameter under axes of other sizes, or None if an axis would take part of a run."""
    if math.prod(shape) == 0:
        return None
    dims = regroup([a for dim in view.dims for a in dim], shape)
    # Axes of one position leave; a position chosen by a slice is remembered.
    gone = tuple(a for dim in view.dims for a in dim if _is_chosen(view, a))
    return None if dims is None else dataclasses.replace(view, dims=tuple(dims), fixed=(*view.fixed, *gone))


def _is_chosen(view: View, atom: Atom) -> bool:
    """Whether the atom is one position of a longer axis."""
    return atom.size == 1 and atom.axis >= 0 and not view.is_whole(atom)


def permuted(view: View, order: Sequence[int] | None) -> View:
    """A parameter with its axes in another order."""
    return view if order is None else dataclasses.replace(view, dims=tuple(view.dims[d] for d in order))


def flipped(view: View, dimensions: Sequence[int]) -> View:
    """A parameter with the positions along some axes in reverse."""
    dims = [tuple(map(_turned, atoms)) if d in dimensions else atoms for d, atoms in enumerate(view.dims)]
    return dataclasses.replace(view, dims=tuple(dims))


def _turned(atom: Atom) -> Atom:
    """The same positions from the last to the first; copies are all alike."""
    if atom.axis < 0:
        return atom
    return dataclasses.replace(atom, step=-atom.step, offset=atom.offset + atom.step * (atom.size - 1))


def forward(atom: Atom) -> Atom:
    """The same positions, rising."""
    return _turned(atom) if atom.step < 0 else atom


def tiled(view: View, repeats: Sequence[int]) -> View:
    """A parameter that is repeated along its axes."""
    dims = [(Atom(-1, 1, n), *atoms) if n > 1 else atoms for n, atoms in zip(repeats, view.dims, strict=True)]
    return dataclasses.replace(view, dims=tuple(dims))


def split(atom: Atom, major: int) -> tuple[Atom, Atom]:
    """An atom as ``major`` runs, and one run."""
    minor = atom.size // major
    return Atom(atom.axis, atom.step * minor, major, atom.offset), Atom(atom.axis, atom.step, minor)


def sliced(view: View, starts: Sequence[int], limits: Sequence[int], strides: Sequence[int] | None) -> View | None:
    """Positions from start to limit along every axis, or None if they are no run of one atom."""
    dims: list[Atoms] = []
    for atoms, start, limit, stride in zip(view.dims, starts, limits, strides or [1] * len(starts), strict=True):
        n, size = math.prod(a.size for a in atoms), -(-(limit - start) // stride)
        if size == n:
            dims.append(atoms)
        elif len(atoms) == 1 and size > 0:
            (a,) = atoms
            dims.append((Atom(a.axis, a.step * stride, size, a.offset + a.step * start),))
        else:
            return None
    return dataclasses.replace(view, dims=tuple(dims))


def local(view: View, spec: Sequence[Any], sizes: Sequence[int]) -> View | None:
    """The part of a parameter that one device of a mesh holds."""
    part = sliced(view, [0] * len(sizes), sizes, None)
    return None if part is None else dataclasses.replace(part, shards=view.shards | spec_axes(spec))


def broadcast(view: View, shape: Sequence[int], dimensions: Sequence[int]) -> View:
    """A parameter with copies along new axes."""
    dims: list[Atoms] = [(Atom(-1, 1, n),) if n > 1 else () for n in shape]
    gone: list[Atom] = []
    for atoms, d in zip(view.dims, dimensions, strict=True):
        if math.prod(a.size for a in atoms) == shape[d]:
            dims[d] = atoms
        else:
            gone += [a for a in atoms if _is_chosen(view, a)]
    return dataclasses.replace(view, dims=tuple(dims), fixed=(*view.fixed, *gone))


def squeezed(view: View, dimensions: Sequence[int]) -> View:
    """A parameter without some axes of one position."""
    gone = tuple(a for d in dimensions for a in view.dims[d] if _is_chosen(view, a))
    dims = tuple(atoms for d, atoms in enumerate(view.dims) if d not in dimensions)
    return dataclasses.replace(view, dims=dims, fixed=(*view.fixed, *gone))


def _pieces(view: View, sizes: Sequence[int], axis: int) -> list[View | None]:
    found, start = [], 0
    for n in map(int, sizes):
        starts = [0] * len(view.dims)
        limits = [math.prod(a.size for a in atoms) for atoms in view.dims]
        starts[axis], limits[axis] = start, start + n
        found.append(sliced(view, starts, limits, None))
        start += n
    return found


class Moved(Flow):
    """Each result is an operand laid out anew.

    Args:
      view: of a parameter; None where it would not be one any more.
      place: where an axis stands afterwards; None where it cannot be told.
    """

    def __init__(
        self,
        view: Callable[[View, jax_core.JaxprEqn], View | None],
        place: Callable[[jax_core.JaxprEqn, int], int | None] = lambda eqn, axis: None,
    ) -> None:
        super().__init__()
        self.view, self.place = view, place

    def places(self, eqn: jax_core.JaxprEqn, views: Sequence[Places]) -> list[Places]:
        if len(eqn.outvars) != len(views):
            return super().places(eqn, views)
        return [None if view is None else self.view(view, eqn) for view in views]

    def results(self, eqn: jax_core.JaxprEqn, kinds: Sequence[Kind], bodies: Sequence[Any]) -> Kinds:
        if len(eqn.outvars) != len(kinds):
            return super().results(eqn, kinds, bodies)
        return [self._moved(kind, eqn) for kind in kinds]

    def _moved(self, kind: Kind, eqn: jax_core.JaxprEqn) -> Kind:
        if isinstance(kind, Joined):
            return self._together(kind, eqn) or computed(eqn.primitive.name, [kind])
        if isinstance(kind, View):
            return self.view(kind, eqn) or computed(eqn.primitive.name, [kind])
        return kind  # entries that were looked up stay such

    def _together(self, joined: Joined, eqn: jax_core.JaxprEqn) -> Joined | None:
        """Parameters side by side, all laid out anew in one way."""
        dim = self.place(eqn, joined.dim)
        if dim is None:
            return None
        parts = tuple(p for p in (self.view(part, eqn) for part in joined.parts) if p is not None)
        return dataclasses.replace(joined, parts=parts, dim=dim) if len(parts) == len(joined.parts) else None


class Cast(Moved):
    """Another dtype."""

    def __init__(self) -> None:
        super().__init__(self._kept, lambda eqn, axis: axis)

    def places(self, eqn: jax_core.JaxprEqn, views: Sequence[Places]) -> list[Places]:
        return list(views)

    def _kept(self, view: View, eqn: jax_core.JaxprEqn) -> View | None:
        # To floats of 16 bits or more, as from a float8 checkpoint, or to complex numbers; to anything narrower is a
        # compression of its own.
        before, after = (walk.aval(v).dtype for v in (eqn.invars[0], eqn.outvars[0]))
        widens = after.kind == "c" or (before.kind in "fV" and after.kind in "fV")
        return view if before.kind in "fVc" and widens and after.itemsize > 1 else None


class Permutation(Moved):
    """The same axes in another order."""

    def __init__(self) -> None:
        super().__init__(
            lambda view, eqn: permuted(view, eqn.params["permutation"]),
            lambda eqn, axis: eqn.params["permutation"].index(axis),
        )


class Pieces(Flow):
    """Consecutive pieces of one axis."""

    def results(self, eqn: jax_core.JaxprEqn, kinds: Sequence[Kind], bodies: Sequence[Any]) -> Kinds:
        (kind,) = kinds
        plain = super().results(eqn, kinds, bodies)
        if not isinstance(kind, View):
            return plain
        pieces = _pieces(kind, eqn.params["sizes"], eqn.params["axis"])
        return [piece or other for piece, other in zip(pieces, plain, strict=True)]

    def places(self, eqn: jax_core.JaxprEqn, views: Sequence[Places]) -> list[Places]:
        (view,) = views
        return _pieces(view, eqn.params["sizes"], eqn.params["axis"]) if view else [None] * len(eqn.outvars)


class SideBySide(Flow):
    """Operands one after the other along an axis."""

    def __init__(self) -> None:
        super().__init__(joined)

    def results(self, eqn: jax_core.JaxprEqn, kinds: Sequence[Kind], bodies: Sequence[Any]) -> Kinds:
        dim, parts = eqn.params["dimension"], tuple(k for k in kinds if isinstance(k, View))
        if len(parts) < len(kinds):
            return super().results(eqn, kinds, bodies)
        return [Joined(parts, dim, tuple(walk.aval(v).shape[dim] for v in eqn.invars), eqn.primitive.name)]


SAME = Moved(lambda view, eqn: view, lambda eqn, axis: axis)
RESHAPE = Moved(
    lambda view, eqn: reshaped(permuted(view, eqn.params.get("dimensions")), walk.aval(eqn.outvars[0]).shape)
)
REVERSE = Moved(lambda view, eqn: flipped(view, eqn.params["dimensions"]), lambda eqn, axis: axis)
TILE = Moved(lambda view, eqn: tiled(view, eqn.params["reps"]))
SQUEEZE = Moved(lambda view, eqn: squeezed(view, eqn.params["dimensions"]))
BROADCAST = Moved(lambda view, eqn: broadcast(view, eqn.params["shape"], eqn.params["broadcast_dimensions"]))
SLICE = Moved(
    lambda view, eqn: sliced(view, eqn.params["start_indices"], eqn.params["limit_indices"], eqn.params["strides"])
)
