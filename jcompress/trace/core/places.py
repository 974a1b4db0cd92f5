"""Where the positions of an activation stand among those of a mask or of weights that a caller gives.

What is known of an activation is a :class:`~jcompress.trace.core.views.View` of the mask: the axes of the activation
run over positions of the mask, over copies of it, or over positions that could not be followed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from jax.extend import core as jax_core

from jcompress.trace.core import walk
from jcompress.trace.core.views import Atom, Atoms, View

COPIES, LOST = -1, -3
"""The axes of atoms that run over copies of the mask, and over positions that could not be followed."""

Places = View | None
"""None where nothing is known."""


def nowhere(shape: Sequence[int]) -> View:
    """Of a value that has nothing to do with the mask."""
    return View("where", (), tuple(map(_copies, shape)))


def _shape(v: Any) -> tuple[int, ...]:
    return walk.aval(v).shape


def _copies(n: int) -> Atoms:
    return (Atom(COPIES, 1, n),) if n > 1 else ()


def lost(n: int) -> Atoms:
    """An axis whose positions could not be followed."""
    return (Atom(LOST, 1, n),) if n > 1 else ()


def of_argument(shape: Sequence[int], mask: Sequence[int]) -> View:
    """Of an argument: its leading axes are those of the mask if they are as long."""
    n = min(len(shape), len(mask))
    if not n or tuple(shape[:n]) != tuple(mask[:n]):
        return dataclasses.replace(nowhere(shape), shape=tuple(mask))
    own = [(Atom(axis, 1, size),) for axis, size in enumerate(mask[:n])]
    return View("where", tuple(mask), (*own, *map(_copies, shape[n:])))


def is_free(atoms: Atoms) -> bool:
    """Whether an axis has nothing to do with the mask."""
    return all(a.axis == COPIES for a in atoms)


def is_nowhere(view: Places) -> bool:
    """Whether nothing of a value has to do with the mask."""
    return view is not None and all(map(is_free, view.dims)) and not view.fixed and not view.scanned


def _both(n: int, found: Sequence[Atoms | None]) -> Atoms:
    """An axis of what is computed entry by entry: at the positions that one operand has, if no other differs."""
    known = {atoms for atoms in found if atoms and any(a.axis >= 0 for a in atoms) and length(atoms) == n}
    if len(known) == 1:
        return known.pop()
    return lost(n) if known or any(atoms is None or not is_free(atoms) for atoms in found) else _copies(n)


def length(atoms: Atoms) -> int:
    """How many positions an axis has."""
    return math.prod(a.size for a in atoms)


def around(views: Sequence[Places], dims: Sequence[Atoms]) -> View:
    """A view with these axes, and all that is chosen by an index or a loop around in any of the others."""
    known = [v for v in views if v is not None]
    fixed: dict[int, Atom] = {}
    for atom in (a for v in known for a in v.fixed):
        if fixed.setdefault(atom.axis, atom) != atom:
            fixed[atom.axis] = dataclasses.replace(atom, axis=LOST)
    taken = {a.axis for atoms in dims for a in atoms}
    kept = tuple(a for axis, a in fixed.items() if a.axis >= 0 and axis not in taken)
    scanned = {loop: atoms for v in known for loop, atoms in v.scanned}
    path, shape = next(((v.path, v.shape) for v in known if not is_nowhere(v)), ("where", ()))
    return View(path, shape, tuple(dims), kept, tuple(scanned.items()))


def entry_by_entry(eqn: jax_core.JaxprEqn, views: Sequence[Places]) -> list[Places]:
    """Of results that are computed entry by entry."""
    return [together(_shape(v), views) for v in eqn.outvars]


def together(shape: Sequence[int], views: Sequence[Places]) -> View:
    """Of a value of this shape, computed entry by entry from others of as many axes, or of none."""
    views = _of_one_mask(views)
    same = [v for v in views if v is None or len(v.dims) == len(shape)]
    columns = [[None if v is None else v.dims[d] for v in same] for d in range(len(shape))]
    return around(views, [_both(n, column) for n, column in zip(shape, columns, strict=True)])


def _of_one_mask(views: Sequence[Places]) -> list[Places]:
    """The views of one mask: of the caller's if there are several; of the others nothing is known."""
    masks = {v.path for v in views if v is not None and not is_nowhere(v)}
    if len(masks) < 2:
        return list(views)
    return [v if v is not None and (is_nowhere(v) or v.path == "where") else None for v in views]


def looked_up(view: View, name: str) -> View:
    """Of what is looked up at places that are computed: of a mask of its own, looked up alike."""
    own = [d for d, atoms in enumerate(view.dims) if not is_free(atoms)]
    dims = list(view.dims)
    for axis, d in enumerate(own):
        dims[d] = (Atom(axis, 1, length(view.dims[d])),)
    return View(name, tuple(length(view.dims[d]) for d in own), tuple(dims))


def outside(view: Places) -> Places:
    """Of a value that leaves a branch or a loop: masks that are made inside stay there."""
    return view if view is None or view.path == "where" else None


def agreed(views: Sequence[Places]) -> Places:
    """Of a value that may be any of these, as the carry of a loop is."""
    known = [v for v in map(outside, views) if v is not None]
    if not known or len(known) < len(views):
        return None
    first, dims = known[0], list[Atoms]()
    for column in zip(*(v.dims for v in known), strict=True):
        own = {atoms for atoms in column if not is_free(atoms)}
        dims.append(own.pop() if len(own) == 1 else lost(length(column[0])) if own else column[0])
    fixed = tuple(a for a in first.fixed if all(a in v.fixed for v in known))
    scanned = tuple(x for x in first.scanned if all(x in v.scanned for v in known))
    shape = next((v.shape for v in known if v.shape), ())
    return View("where", shape, tuple(dims), fixed, scanned)


def any_how(eqn: jax_core.JaxprEqn, views: Sequence[Places]) -> list[Places]:
    """Of results of which nothing is known but that they have nothing to do with the mask if no operand has."""
    free = all(map(is_nowhere, views))
    return [around(views, nowhere(_shape(v)).dims) if free else None for v in eqn.outvars]


def reduced(eqn: jax_core.JaxprEqn, views: Sequence[Places]) -> list[Places]:
    """Of sums and the like, whose axes go."""
    (view, *_), axes = views, eqn.params["axes"]
    dims = None if view is None else [atoms for d, atoms in enumerate(view.dims) if d not in axes]
    return [None if dims is None else around([view], dims) for _ in eqn.outvars]


def along(axis: str, keeps: bool) -> Any:
    """Of what runs along an axis and gives as many positions, the same ones (``keeps``) or others."""

    def places(eqn: jax_core.JaxprEqn, views: Sequence[Places]) -> list[Places]:
        view, d = views[0], eqn.params[axis]
        if view is None:
            return [None] * len(eqn.outvars)
        d %= len(view.dims)
        return [_changed(view, _shape(v), [] if keeps else [d]) for v in eqn.outvars]

    return places


def _changed(view: View, shape: Sequence[int], axes: Sequence[int]) -> View:
    """With other positions along some axes, as long as the shape says."""
    dims = [
        (lost(n) if not is_free(atoms) else _copies(n)) if d in axes else atoms
        for d, (n, atoms) in enumerate(zip(shape, view.dims, strict=True))
    ]
    return around([view], dims)


def resized(eqn: jax_core.JaxprEqn, views: Sequence[Places]) -> list[Places]:
    """Of results as the first operand, but along axes that have another length."""
    view, (out, *_) = views[0], eqn.outvars
    if view is None or len(view.dims) != len(_shape(out)):
        return any_how(eqn, views)
    axes = [d for d, (n, m) in enumerate(zip(_shape(eqn.invars[0]), _shape(out), strict=True)) if n != m]
    return [_changed(view, _shape(v), axes) for v in eqn.outvars]


def padded(eqn: jax_core.JaxprEqn, views: Sequence[Places]) -> list[Places]:
    """Of a value with more, or less, before, between and behind its positions."""
    (out,), view = eqn.outvars, views[0]
    axes = [d for d, config in enumerate(eqn.params["padding_config"]) if any(config)]
    return [None if view is None else _changed(view, _shape(out), axes)]


def joined(eqn: jax_core.JaxprEqn, views: Sequence[Places]) -> list[Places]:
    """Of values side by side."""
    (out,), dim = eqn.outvars, eqn.params["dimension"]
    whole = together(_shape(out), [_changed(v, _shape(out), [dim]) if v is not None else None for v in views])
    return [whole]


def of_dot(numbers: Any, grouped: Sequence[int], eqn: jax_core.JaxprEqn, views: Sequence[Places]) -> list[Places]:
    """Of a dot product; axes ``grouped`` of the second operand, which count experts, go too."""
    (contract, batch), shape = numbers, _shape(eqn.outvars[0])
    dims: list[Atoms | None] = []
    for pair in zip(*batch, strict=True):
        found = [None if v is None else v.dims[d] for v, d in zip(views, pair, strict=False)]
        dims.append(_both(shape[len(dims)], found))
    for side, view in enumerate(views[:2]):
        gone = (*contract[side], *batch[side], *(grouped if side else ()))
        ndim = len(_shape(eqn.invars[side]))
        dims += [None if view is None else view.dims[d] for d in range(ndim) if d not in gone]
    dims = dims[: len(shape)] if len(dims) == len(shape) else [None] * len(shape)
    return [around(views[:2], [lost(n) if atoms is None else atoms for n, atoms in zip(shape, dims, strict=True)])]


def of_convolution(eqn: jax_core.JaxprEqn, views: Sequence[Places]) -> list[Places]:
    """Of a convolution: positions stay where it gives as many as it takes."""
    p, view, shape = eqn.params, views[0], _shape(eqn.outvars[0])
    numbers = p["dimension_numbers"]
    if view is None:
        return [None]
    dims, before = [_copies(n) for n in shape], _shape(eqn.invars[0])
    for i, (old, new) in enumerate(zip(numbers.lhs_spec, numbers.out_spec, strict=True)):
        atoms, n = view.dims[old], shape[new]
        stays = i == 0 and p["batch_group_count"] == 1
        stays |= i > 1 and n == before[old] and p["window_strides"][i - 2] == p["lhs_dilation"][i - 2] == 1
        dims[new] = atoms if stays else _copies(n) if is_free(atoms) else lost(n)
    return [around([view], dims)]


def of_gather(eqn: jax_core.JaxprEqn, views: Sequence[Places]) -> list[Places]:
    """Of what is looked up: at the positions of the indices, and of the axes that are taken whole or index by index."""
    numbers, (out,), (operand, indices, *_) = eqn.params["dimension_numbers"], eqn.outvars, views
    if operand is None or indices is None:
        return [None]
    shape, sizes, before = _shape(out), eqn.params["slice_sizes"], _shape(eqn.invars[0])
    alike = dict(zip(numbers.start_indices_batching_dims, numbers.operand_batching_dims, strict=True))
    whole = [d for d in range(len(sizes)) if d not in (*numbers.collapsed_slice_dims, *alike.values())]
    # Where the axis that is looked into has positions, those of the result are others.
    moves = not all(is_free(operand.dims[d]) for d in numbers.start_index_map if sizes[d] != before[d])
    dims: list[Atoms] = [()] * len(shape)
    for d, new in zip(whole, numbers.offset_dims, strict=True):
        kept = sizes[d] == before[d] or is_free(operand.dims[d])
        dims[new] = (operand.dims[d] if sizes[d] == before[d] else _copies(shape[new])) if kept else lost(shape[new])
    for d, new in enumerate(i for i in range(len(shape)) if i not in numbers.offset_dims):
        both = [indices.dims[d], operand.dims[alike[d]]] if d in alike else [indices.dims[d]]
        dims[new] = lost(shape[new]) if moves and d not in alike else _both(shape[new], both)
    return [around([operand, indices], dims)]


def of_update(eqn: jax_core.JaxprEqn, views: Sequence[Places]) -> list[Places]:
    """Of a value a part of which is written over: axes that are written whole keep their positions."""
    n = len(_shape(eqn.outvars[0]))
    return _written(eqn, views[0], views[1], {d: d for d in range(n)}, _shape(eqn.invars[1]))


def of_scatter(eqn: jax_core.JaxprEqn, views: Sequence[Places]) -> list[Places]:
    """Of a value that is written to or added to at places that are computed."""
    numbers, shape = eqn.params["dimension_numbers"], _shape(eqn.invars[2])
    taken, alike = numbers.inserted_window_dims, numbers.operand_batching_dims
    whole = [d for d in range(len(_shape(eqn.invars[0]))) if d not in (*taken, *alike)]
    rows = [d for d in range(len(shape)) if d not in numbers.update_window_dims]
    at = dict(zip(whole, numbers.update_window_dims, strict=True))
    at |= dict(zip(alike, (rows[i] for i in numbers.scatter_indices_batching_dims), strict=True))
    return _written(eqn, views[0], views[2], at, shape)


def _written(
    eqn: jax_core.JaxprEqn, view: Places, update: Places, at: dict[int, int], sizes: Sequence[int]
) -> list[Places]:
    """By the axis of the update that each axis stands for; what is written as a part of one is at other positions."""
    (out,) = eqn.outvars
    if view is None or update is None:
        return any_how(eqn, [view, update])
    dims, free = [], all(map(is_free, update.dims))
    for d, n in enumerate(_shape(out)):
        if d in at and sizes[at[d]] == n:
            dims.append(_both(n, [view.dims[d], update.dims[at[d]]]))
        else:
            still = is_free(view.dims[d]) and (is_free(update.dims[at[d]]) if d in at else free)
            dims.append(view.dims[d] if still else lost(n))
    return [around(_of_one_mask([view, update]), dims)]


def peeled(view: Places, loop: int) -> Places:
    """Of one slice along the leading axis, as the body of a loop sees it."""
    if view is None:
        return None
    first, *rest = view.dims
    scanned = view.scanned if is_free(first) else (*view.scanned, (loop, first))
    return dataclasses.replace(view, dims=tuple(rest), scanned=scanned)


def turn(loop: int, atoms: Atoms) -> View:
    """Of a number that has the positions of a loop's turn."""
    return View("where", (), (), scanned=((loop, atoms),))


def stacked(view: Places, loop: int, n: int) -> Places:
    """Of what a loop gives slice by slice."""
    view = outside(view)
    if view is None:
        return None
    first = dict(view.scanned).get(loop, _copies(n))
    return dataclasses.replace(left(view, loop), dims=(first, *view.dims))


def left(view: View, loop: int) -> View:
    """Of a value outside of a loop."""
    return dataclasses.replace(view, scanned=tuple(x for x in view.scanned if x[0] != loop))
