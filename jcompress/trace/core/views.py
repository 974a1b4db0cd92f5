"""What a value inside a function has to do with the parameters: a parameter laid out anew, or something else."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from jax.extend import core as jax_core


@dataclasses.dataclass(frozen=True, order=True)
class Atom:
    """A run of positions along one axis of a parameter: ``offset + step * i`` for ``i < size``.

    Attributes:
      axis: the axis of the parameter, or -1 for copies that a broadcast made.
      step: the distance between positions. Atoms of one axis, in order of falling step, are its C order.
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
    """A parameter with its entries laid out anew and otherwise unchanged.

    Attributes:
      path: the parameter.
      shape: of the whole parameter.
      dims: for each axis of the value, the atoms it runs over, slowest first.
      fixed: atoms of one position, whose axes are gone: ``w[2]``.
      scanned: for each loop around, the loop and the atoms that it runs over.
      shards: inside ``shard_map``, the mesh axes along which devices hold different parts.
    """

    path: str
    shape: tuple[int, ...]
    dims: tuple[Atoms, ...]
    fixed: Atoms = ()
    scanned: tuple[tuple[int, Atoms], ...] = ()
    shards: frozenset[str] = frozenset()

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
    """

    reasons: tuple[tuple[str, str], ...]
    depth: int = 0
    lookup: bool = False
    shards: frozenset[str] = frozenset()


@dataclasses.dataclass(frozen=True)
class Activation:
    """Depends on the arguments, after at most ``depth`` products with parameters in a row.

    Inside ``shard_map``, ``shards`` are the mesh axes along which devices hold different values.
    """

    depth: int = 0
    shards: frozenset[str] = frozenset()


@dataclasses.dataclass(frozen=True)
class Joined:
    """Parameters side by side along one axis, as where gates are multiplied in one product.

    Attributes:
      parts: the parameters.
      dim: the axis.
      sizes: the length of each along it.
    """

    parts: tuple[View, ...]
    dim: int
    sizes: tuple[int, ...]


Kind = View | Joined | Derived | Activation | None
"""What a value is; None for constants."""


def whole(path: str, shape: Sequence[int]) -> View:
    """The view of a parameter as it is."""
    return View(path, tuple(shape), tuple((Atom(axis, 1, n),) for axis, n in enumerate(shape)))


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
    found = [k.path for k in kinds if isinstance(k, View)]
    found += [part.path for k in kinds if isinstance(k, Joined) for part in k.parts]
    for kind in kinds:
        if isinstance(kind, Derived) and (lookups or not kind.lookup):
            found += [path for path, _ in kind.reasons]
    return found


def is_activation(kind: Kind) -> bool:
    """Whether a value depends on the arguments."""
    return isinstance(kind, Activation) or (isinstance(kind, Derived) and kind.lookup)


def computed(name: str, kinds: Sequence[Kind]) -> Kind:
    """What the primitive ``name`` makes of values of these kinds."""
    if any(isinstance(k, Activation) or (isinstance(k, Derived) and k.lookup) for k in kinds):
        return Activation(depth(kinds), shards(kinds))
    reasons: dict[str, str] = {}
    for kind in kinds:
        if isinstance(kind, View):
            reasons.setdefault(kind.path, name)
        elif isinstance(kind, Joined):
            reasons |= {part.path: "concatenate" for part in kind.parts if part.path not in reasons}
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
        return Joined(parts, view.dim - 1, view.sizes) if is_kept else computed("concatenate", [view])
    if not isinstance(view, View):
        return view
    first, *rest = view.dims
    if all(a.axis < 0 for a in first):
        return dataclasses.replace(view, dims=tuple(rest))
    if any(a.axis < 0 for a in first):
        return computed("broadcast_in_dim", [view])
    return dataclasses.replace(view, dims=tuple(rest), scanned=(*view.scanned, (loop, first)))


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


def _reshape(view: View, shape: Sequence[int]) -> View | None:
    if math.prod(shape) == 0:
        return None
    dims = regroup([a for dim in view.dims for a in dim], shape)
    # Axes of one position leave; a position chosen by a slice is remembered.
    gone = tuple(a for dim in view.dims for a in dim if _is_chosen(view, a))
    return None if dims is None else dataclasses.replace(view, dims=tuple(dims), fixed=(*view.fixed, *gone))


def _is_chosen(view: View, atom: Atom) -> bool:
    """Whether the atom is one position of a longer axis."""
    return atom.size == 1 and atom.axis >= 0 and not view.is_whole(atom)


def split(atom: Atom, major: int) -> tuple[Atom, Atom]:
    """An atom as ``major`` runs, and one run."""
    minor = atom.size // major
    return Atom(atom.axis, atom.step * minor, major, atom.offset), Atom(atom.axis, atom.step, minor)


def _slice(view: View, starts: Sequence[int], limits: Sequence[int], strides: Sequence[int] | None) -> View | None:
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


def local(view: View, spec: Sequence[Any], sizes: Sequence[int]) -> Kind:
    """The part of a parameter that one device holds, as the body of ``shard_map`` sees it."""
    names = spec_axes(spec)
    part = _slice(view, [0] * len(sizes), sizes, None)
    return computed("shard_map", [view]) if part is None else dataclasses.replace(part, shards=view.shards | names)


def spec_axes(spec: Sequence[Any]) -> frozenset[str]:
    """The mesh axes that a partition spec names."""
    return frozenset(name for entry in spec if entry for name in (entry if isinstance(entry, tuple) else (entry,)))


def _broadcast(view: View, shape: Sequence[int], dimensions: Sequence[int]) -> View:
    dims: list[Atoms] = [(Atom(-1, 1, n),) if n > 1 else () for n in shape]
    gone: list[Atom] = []
    for atoms, d in zip(view.dims, dimensions, strict=True):
        if math.prod(a.size for a in atoms) == shape[d]:
            dims[d] = atoms
        else:
            gone += [a for a in atoms if _is_chosen(view, a)]
    return dataclasses.replace(view, dims=tuple(dims), fixed=(*view.fixed, *gone))


def _squeeze(view: View, dimensions: Sequence[int]) -> View:
    gone = tuple(a for d in dimensions for a in view.dims[d] if _is_chosen(view, a))
    dims = tuple(atoms for d, atoms in enumerate(view.dims) if d not in dimensions)
    return dataclasses.replace(view, dims=dims, fixed=(*view.fixed, *gone))


def _pieces(view: View, sizes: Sequence[int], axis: int) -> list[View | None]:
    found, start = [], 0
    for n in map(int, sizes):
        starts = [0] * len(view.dims)
        limits = [math.prod(a.size for a in atoms) for atoms in view.dims]
        starts[axis], limits[axis] = start, start + n
        found.append(_slice(view, starts, limits, None))
        start += n
    return found


def _cast(view: View, eqn: jax_core.JaxprEqn) -> View | None:
    # Between floats of 16 bits or more; anything narrower is a compression of its own.
    before, after = (_aval(v).dtype for v in (eqn.invars[0], eqn.outvars[0]))
    return view if before.kind in "fV" and after.kind in "fV" and min(before.itemsize, after.itemsize) > 1 else None


def _same(view: View, eqn: jax_core.JaxprEqn) -> View:
    return view


def _aval(v: Any) -> Any:
    return v.aval


def _joined(eqn: jax_core.JaxprEqn, kinds: Sequence[Kind]) -> Joined | None:
    dim = eqn.params["dimension"]
    parts = tuple(k for k in kinds if isinstance(k, View))
    sizes = tuple(_aval(v).shape[dim] for v in eqn.invars)
    return Joined(parts, dim, sizes) if len(parts) == len(kinds) else None


def _together(joined: Joined, eqn: jax_core.JaxprEqn) -> Joined | None:
    """Parameters side by side, all laid out anew in one way."""
    name, dim = eqn.primitive.name, joined.dim
    if name not in ("transpose", "convert_element_type") and _LAYOUTS[name] is not _same:
        return None
    parts = tuple(p for p in (_LAYOUTS[name](part, eqn) for part in joined.parts) if p is not None)
    dim = eqn.params["permutation"].index(dim) if name == "transpose" else dim
    return Joined(parts, dim, joined.sizes) if len(parts) == len(joined.parts) else None


_LAYOUTS: dict[str, Callable[[View, jax_core.JaxprEqn], View | None]] = {
    "transpose": lambda v, e: dataclasses.replace(v, dims=tuple(v.dims[d] for d in e.params["permutation"])),
    "reshape": lambda v, e: _reshape(v, e.params["new_sizes"]),
    "squeeze": lambda v, e: _squeeze(v, e.params["dimensions"]),
    "expand_dims": lambda v, e: _reshape(v, _aval(e.outvars[0]).shape),
    "broadcast_in_dim": lambda v, e: _broadcast(v, e.params["shape"], e.params["broadcast_dimensions"]),
    "slice": lambda v, e: _slice(v, e.params["start_indices"], e.params["limit_indices"], e.params["strides"]),
    "convert_element_type": _cast,
    **dict.fromkeys(
        (
            "copy", "copy_p", "stop_gradient", "sharding_constraint", "mesh_cast", "reshard", "pvary", "pcast",
            "name", "device_put", "optimization_barrier",
        ),
        _same,
    ),
}  # fmt: skip


def laid_out(eqn: jax_core.JaxprEqn, kinds: Sequence[Kind]) -> list[Kind] | None:
    """The results of an equation that only lays its operands out anew, or None if it does more."""
    name = eqn.primitive.name
    if name == "split" and isinstance(kinds[0], View):
        pieces = _pieces(kinds[0], eqn.params["sizes"], eqn.params["axis"])
        return [p or computed(name, kinds) for p in pieces]
    if name == "concatenate" and (joined := _joined(eqn, kinds)):
        return [joined]
    if name not in _LAYOUTS or len(eqn.outvars) != len(kinds):
        return None
    # Entries that were looked up stay such through a change of layout.
    return [_moved(k, eqn) for k in kinds]


def _moved(kind: Kind, eqn: jax_core.JaxprEqn) -> Kind:
    name = eqn.primitive.name
    if isinstance(kind, Joined):
        return _together(kind, eqn) or computed(name, [kind])
    return (_LAYOUTS[name](kind, eqn) or computed(name, [kind])) if isinstance(kind, View) else kind
