"""Where a parameter meets an activation in a product: which axes are contracted, and the moments of what meets it."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core as jax_core

from jcompress.trace.core import walk
from jcompress.trace.core.layouts import forward, regroup
from jcompress.trace.core.views import Atom, Atoms, View

OCTAVES = (-24, 16)
BINS_PER_OCTAVE = 8

Label = Atom | None
"""What an axis of an activation runs over: part of an axis of the parameter, or (None) positions."""
COPIES = -2
"""The axis of atoms that run over copies of a parameter which meet the parts of one sum, or give equal outputs."""


@dataclasses.dataclass(frozen=True)
class Use:
    """What statistics are kept apart by; uses that agree are summed.

    Attributes:
      path: the parameter.
      shape: of the whole parameter.
      axes: those that are contracted.
      lead: what has statistics of its own: stacked layers, experts, groups of a convolution.
      loops: the loops around and the atoms they run over, which have not become leading axes yet.
      embed: axes of ``lead`` of which one position or slice is used here.
      shards: mesh axes along which the devices inside ``shard_map`` meet different positions.
    """

    path: str
    shape: tuple[int, ...]
    axes: tuple[int, ...]
    lead: Atoms = ()
    loops: tuple[tuple[int, Atoms], ...] = ()
    embed: tuple[int, ...] = ()
    shards: tuple[str, ...] = ()


class Meeting(NamedTuple):
    """One product of a parameter, told from shapes alone.

    Attributes:
      view: the parameter.
      window: for each spatial dimension of a convolution, the atoms that its kernel runs over.
      inputs: atoms that are contracted beside the window.
      lead: atoms each position of which has a product of its own: experts, groups of a convolution.
      free: atoms of the outputs.
      x: labels of the axes of the activation, once it is laid out.
      y: labels of the axes of the product.
      laid_out: the activation with axes as ``x`` says, from itself.
      places: for each axis of the activation, once it is laid out, the axis of the product at the same positions.
      rows: the axis of the product whose positions are in groups, each of which meets another position of ``lead``.
      is_derived: whether it was made for this product, as patches are.
    """

    view: View
    window: tuple[Atoms, ...]
    inputs: Atoms
    lead: Atoms
    free: Atoms
    x: tuple[Atoms | None, ...]
    y: tuple[Atoms | None, ...]
    places: tuple[int | None, ...]
    rows: int | None = None
    laid_out: Callable[[Any], Any] = lambda x: x
    is_derived: bool = False

    @property
    def contracted(self) -> Atoms:
        """All atoms that are summed over."""
        return (*(a for atoms in self.window for a in atoms), *self.inputs)


Meet = Callable[..., Meeting]
"""``(eqn, view, side)``: how the parameter stands in the product of an equation."""


class UnreadError(Exception):
    """A product that gives no statistic, and why."""


def split(x: Any, dims: Sequence[Atoms | None], over_copies: Callable[..., Any]) -> tuple[Any, tuple[Label, ...]]:
    """Give every label an axis of its own, its positions rising. An axis without labels has one position, and goes."""
    shape: list[int] = []
    labels: list[Label] = []
    for n, dim in zip(x.shape, dims, strict=True):
        for atom in (None,) if dim is None else dim:
            shape.append(n if atom is None else atom.size)
            # What a broadcast copied along a batch axis meets more positions.
            labels.append(None if atom is None or atom.axis == -1 else atom)
    x = x.reshape(shape)
    backward = [i for i, a in enumerate(labels) if a is not None and a.step < 0]
    copies = [i for i, a in enumerate(labels) if a is not None and a.axis == COPIES]
    x = jnp.flip(x, backward) if backward else x
    x = over_copies(x, copies) if copies else x
    return x, tuple(a if a is None else forward(a) for i, a in enumerate(labels) if i not in copies)


def first(x: Any, axes: Sequence[int]) -> Any:
    """The first position along some axes."""
    return x[tuple(0 if i in axes else slice(None) for i in range(x.ndim))]


def _of_copies(dims: Sequence[Atoms]) -> list[Atoms | None]:
    """Labels of axes where copies of the parameter are no positions of their own."""
    return [tuple(dataclasses.replace(a, axis=COPIES) if a.axis < 0 else a for a in atoms) for atoms in dims]


def _own(atoms: Sequence[Atom]) -> Atoms:
    """The atoms of a parameter's own axes, rising."""
    return tuple(forward(a) for a in atoms if a.axis >= 0)


def _in_order(atoms: Sequence[Atom]) -> Atoms:
    """Atoms in the C order of the parameter's own axes."""
    return tuple(sorted(atoms, key=lambda a: (a.axis, -a.step)))


def _size(atoms: Sequence[Atom], axis: int) -> int:
    return math.prod(a.size for a in atoms if a.axis == axis)


def use_of(met: Meeting) -> tuple[Use, Atoms | None]:
    """Where a product is counted, and its free atoms if those are not all there are."""
    view, contracted, batch, free = met.view, met.contracted, met.lead, met.free
    shape, ndim = view.shape, len(view.shape)
    if not contracted:
        raise UnreadError("no axis of it is contracted")
    for axis in {a.axis for a in contracted}:
        if _size([*contracted, *batch], axis) != shape[axis]:
            raise UnreadError(f"a part of its axis {axis - ndim} is contracted")
    outputs = {a.axis for a in free}
    fixed = _own(view.fixed)
    chosen = [a for a in fixed if a.axis in outputs]
    scanned = [a for _, atoms in view.scanned for a in atoms]
    lead = _in_order([*batch, *(a for a in fixed if a.axis not in outputs)])
    is_part = bool(chosen) or any(_size([*free, *batch, *scanned], axis) != shape[axis] for axis in outputs)
    if is_part and any(a.axis in outputs for a in (*batch, *scanned)):
        raise UnreadError("a part of its outputs is split again")
    axes = {a.axis for a in contracted}
    partial = {a.axis for a in (*lead, *scanned)} - axes - outputs
    embed = tuple(sorted(axis for axis in partial if _size([*lead, *scanned], axis) != shape[axis]))
    if any(sum(a.axis == axis for a in (*lead, *scanned)) > 1 for axis in embed):
        raise UnreadError("a slice of its layers is split again")
    if embed and view.shards:
        raise UnreadError("its layers or experts are spread over devices")
    use = Use(view.path, shape, tuple(sorted(axes)), lead, view.scanned, embed)
    return use, _in_order([*free, *chosen]) if is_part else None


def of_dot(eqn: jax_core.JaxprEqn, view: View, side: int) -> Meeting:
    """The meeting in a dot product whose operand ``side`` is the parameter."""
    contract, batch = eqn.params["dimension_numbers"]
    wc, xc, wb, xb = contract[side], contract[1 - side], batch[side], batch[1 - side]
    free = [d for d in range(len(view.dims)) if d not in wc and d not in wb]
    other: Any = eqn.invars[1 - side].aval
    x: list[Atoms | None] = [None] * other.ndim
    for mine, its in zip(wb, xb, strict=True):
        x[its] = view.dims[mine]
    for labels, its in zip(_of_copies([view.dims[d] for d in wc]), xc, strict=True):
        x[its] = labels
    ours = _of_copies([view.dims[d] for d in free])
    theirs: list[Atoms | None] = [None] * (other.ndim - len(xc) - len(xb))
    y = (*(view.dims[d] for d in wb), *(ours + theirs if side == 0 else theirs + ours))
    kept = [d for d in range(other.ndim) if d not in xc and d not in xb]
    before = len(wb) + (len(ours) if side == 0 else 0)
    at = dict(zip((*xb, *kept), (*range(len(wb)), *range(before, before + len(kept))), strict=True))
    places = tuple(at.get(d) for d in range(other.ndim))
    return Meeting(view, (), _atoms(view, wc), _atoms(view, wb), _atoms(view, free), tuple(x), y, places)


def of_ragged(eqn: jax_core.JaxprEqn, view: View, side: int) -> Meeting:
    """The meeting in a dot product of rows in groups with a kernel for each group."""
    numbers, offset = eqn.params["ragged_dot_dimension_numbers"], eqn.params["group_offset"]
    contract, batch = numbers.dot_dimension_numbers
    groups = numbers.rhs_group_dimensions
    sizes: Any = eqn.invars[2].aval
    is_plain = side == 1 and len(groups) == 1 and not batch[0] and offset is None and sizes.ndim == 1
    if not is_plain:
        raise UnreadError("it is in a ragged product of another kind than rows in groups, each with its own kernel")
    (row,), (expert,), other = numbers.lhs_ragged_dimensions, groups, walk.aval(eqn.invars[0])
    x: list[Atoms | None] = [None] * other.ndim
    for labels, its in zip(_of_copies([view.dims[d] for d in contract[1]]), contract[0], strict=True):
        x[its] = labels
    free = [d for d in range(len(view.dims)) if d != expert and d not in contract[1]]
    kept = [d for d in range(other.ndim) if d not in contract[0]]
    y = (*[None] * len(kept), *_of_copies([view.dims[d] for d in free]))
    lead, places = _atoms(view, [expert]), tuple(kept.index(d) if d in kept else None for d in range(other.ndim))
    inputs, outputs = _atoms(view, contract[1]), _atoms(view, free)
    return Meeting(view, (), inputs, lead, outputs, tuple(x), y, places, rows=kept.index(row), is_derived=True)


def _atoms(view: View, dims: Sequence[int]) -> Atoms:
    return _own([a for d in dims for a in view.dims[d]])


def of_convolution(eqn: jax_core.JaxprEqn, view: View, side: int) -> Meeting:
    """The meeting in a convolution whose kernel is the parameter: the activation becomes patches."""
    p = eqn.params
    if side == 0:
        raise UnreadError("it is what a convolution slides over")
    if p["batch_group_count"] != 1:
        raise UnreadError("its convolution groups the batch")
    numbers, groups = p["dimension_numbers"], p["feature_group_count"]
    out_dim, in_dim, *window = numbers.rhs_spec
    out = view.dims[out_dim]
    grouped = regroup(out, (groups, math.prod(a.size for a in out) // groups))
    if grouped is None:
        raise UnreadError(f"its {groups} groups do not divide the runs of its output axis")
    lead, free = grouped if groups > 1 else ((), out)
    *taps, inputs = _of_copies([view.dims[d] for d in (*window, in_dim)])
    x = (*[None] * (1 + len(window)), *taps, (*lead, *(inputs or ())))
    y: list[Atoms | None] = [None] * len(view.dims)
    y[numbers.out_spec[1]] = (*lead, *(_of_copies([free])[0] or ()))
    dims, laid_out = tuple(_atoms(view, [d]) for d in window), functools.partial(_patches, eqn)
    places = (numbers.out_spec[0], *numbers.out_spec[2:], *[None] * (1 + len(window)))
    return Meeting(
        view, dims, _atoms(view, [in_dim]), _own(lead), _own(free), x, tuple(y), places, None, laid_out, is_derived=True
    )


def _patches(eqn: jax_core.JaxprEqn, x: Any) -> Any:
    """(batch, output positions..., window..., channels): what each output position of a convolution sees."""
    p = eqn.params
    numbers = p["dimension_numbers"]
    batch, channel, *space = numbers.lhs_spec
    x = x.transpose(batch, *space, channel)
    spread = [(low, high, d - 1) for (low, high), d in zip(p["padding"], p["lhs_dilation"], strict=True)]
    x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *spread, (0, 0, 0)])
    kernel: Any = eqn.invars[1].aval
    made: Any = eqn.outvars[0].aval
    window = [kernel.shape[d] for d in numbers.rhs_spec[2:]]
    steps, out = p["window_strides"], [made.shape[d] for d in numbers.out_spec[2:]]
    found = []
    for offset in itertools.product(*map(range, window)):
        starts = [o * d for o, d in zip(offset, p["rhs_dilation"], strict=True)]
        limits = [a + (n - 1) * s + 1 for a, n, s in zip(starts, out, steps, strict=True)]
        found.append(lax.slice(x, (0, *starts, 0), (x.shape[0], *limits, x.shape[-1]), (1, *steps, 1)))
    stacked = jnp.stack(found, axis=-2)
    return stacked.reshape(*stacked.shape[:-2], *window, x.shape[-1])


def _arranged(x: Any, labels: Sequence[Label], lead: Atoms) -> tuple[Any, list[int], list[int], int]:
    """Axes in the order lead, positions, contracted (or free); the first two as lists, and the size of the last."""
    places = {a: i for i, a in enumerate(labels) if a is not None}
    rest = _in_order([a for a in places if a not in lead])
    positions = [i for i, a in enumerate(labels) if a is None]
    x = x.transpose(*(places[a] for a in lead if a in places), *positions, *(places[a] for a in rest))
    batch = sum(a in places for a in lead)
    return x, list(range(batch)), list(range(batch, batch + len(positions))), math.prod(a.size for a in rest)


def moments(
    x: Any, labels: Sequence[Label], lead: Atoms, names: frozenset[str], weight: Any = None
) -> dict[str, jax.Array]:
    """Sums over all positions of an activation, each with the leading axes ``lead`` and then ``k`` or nothing.

    A weight has the shape of ``x``, and is the same for all features of a position.
    """
    x, batch, positions, k = _arranged(x, labels, lead)
    counts = None if weight is None else _arranged(weight, labels, lead)[0]
    wide, head = _counted(x, counts), tuple(a.size for a in lead)
    found: dict[str, Any] = {"count": jnp.full(head, math.prod(x.shape[i] for i in positions), jnp.uint32)}
    if counts is not None:
        one = counts[(..., *[0] * (x.ndim - len(batch) - len(positions)))]
        found["count"] = jnp.broadcast_to(_sum_of(True, one, positions), head)
    if "gram" in names:
        dims = ((positions, positions), (batch, batch))
        gram = lax.dot_general(
            jnp.conj(_times(wide, counts)),
            wide,
            dims,
            precision=lax.Precision.HIGHEST,
            preferred_element_type=wide.dtype,
        )
        found["gram"] = gram.reshape(*head, k, k)
    each = {
        "sum": lambda: _times(wide, counts).sum(positions),
        "square": lambda: _times(_squared(wide), counts).sum(positions),
        "absmax": lambda: jnp.abs(wide).max(positions, initial=0),
        "zeros": lambda: _sum_of(x == 0, counts, positions),
    }
    found |= {name: make().reshape(*head, k) for name, make in each.items() if name in names}
    if "histogram" in names:
        rows = (math.prod(head), -1)
        weights = None if counts is None else counts.reshape(rows)
        found["histogram"] = _histogram(wide.reshape(rows), weights).reshape(*head, -1)
    return found


def _counted(x: Any, counts: Any) -> Any:
    """An activation in float32 or complex64, 0 where it does not count, whatever stands there."""
    wide = x.astype(jnp.complex64 if jnp.iscomplexobj(x) else jnp.float32)
    return wide if counts is None else jnp.where(counts > 0, wide, 0)


def _squared(x: Any) -> Any:
    return jnp.real(x) ** 2 + jnp.imag(x) ** 2 if jnp.iscomplexobj(x) else jnp.square(x)


def _times(x: Any, counts: Any) -> Any:
    return x if counts is None or counts.dtype == bool else x * counts


def _sum_of(hits: Any, counts: Any, axes: Sequence[int]) -> Any:
    """How many there are, or what those weigh that count: uint32 of positions, float32 of weights."""
    hits = hits if counts is None else jnp.where(hits, counts, 0)
    return hits.sum(axes, dtype=jnp.float32 if jnp.issubdtype(hits.dtype, jnp.floating) else jnp.uint32)


def _histogram(x: jax.Array, counts: jax.Array | None) -> jax.Array:
    """How many magnitudes (rows, n) fall into each bin (rows, bins); zeros fall into none."""
    low, high = OCTAVES
    bins = (high - low) * BINS_PER_OCTAVE
    place = jnp.floor((jnp.log2(jnp.abs(x)) - low) * BINS_PER_OCTAVE)
    place = jnp.where(x == 0, bins, jnp.clip(place, 0, bins - 1)).astype(jnp.int32)
    rows, each = jnp.arange(x.shape[0])[:, None], jnp.uint32(1) if counts is None else counts * 1
    found = jnp.zeros((x.shape[0], bins), each.dtype).at[rows, place].add(each, mode="drop")
    return found.astype(jnp.float32)


def of_outputs(y: Any, labels: Sequence[Label], lead: Atoms, weight: Any = None) -> dict[str, jax.Array]:
    """Sums over all positions of a product, by output channel."""
    y, _, positions, n = _arranged(y, labels, lead)
    counts = None if weight is None else _arranged(weight, labels, lead)[0]
    wide, shape = _counted(y, counts), (*(a.size for a in lead), n)
    return {
        "output_sum": _times(wide, counts).sum(positions).reshape(shape),
        "output_square": _times(_squared(wide), counts).sum(positions).reshape(shape),
        "output_absmax": jnp.abs(wide).max(positions, initial=0).reshape(shape),
    }


def spread(met: Meeting, weight: Any, x: Any) -> Any:
    """The weight of each position, of 1 or more along the axes of a product, as one of the activation laid out."""
    order = [place for place in met.places if place is not None]
    moved = weight.transpose(*order, *(d for d in range(weight.ndim) if d not in order))
    sizes = iter(moved.shape)
    shape = [1 if place is None else next(sizes) for place in met.places]
    return jnp.broadcast_to(moved.reshape(shape), x.shape)


def of_gather(eqn: jax_core.JaxprEqn, view: View) -> Meeting:
    """The meeting of an embedding with the rows that are read of it: a product with one-hot vectors."""
    operand: Any = eqn.invars[0].aval
    shape, sizes = operand.shape, eqn.params["slice_sizes"]
    column = _column(eqn)
    if column is None or eqn.params["dimension_numbers"].operand_batching_dims:
        raise UnreadError("it is indexed along several axes at once")
    dim = eqn.params["dimension_numbers"].start_index_map[column]
    if sizes[dim] != 1 or any(n != m for d, (n, m) in enumerate(zip(sizes, shape, strict=True)) if d != dim):
        raise UnreadError("windows of it are read, not rows")
    atoms = view.dims[dim]
    if len(atoms) != 1 or not view.is_whole(atoms[0]) or atoms[0].step < 0:
        raise UnreadError("a part of it is indexed")
    free = _atoms(view, [d for d in range(len(shape)) if d != dim])
    return Meeting(view, (), atoms, (), free, (), (), ())


def _column(eqn: jax_core.JaxprEqn) -> int | None:
    """Which of the indices of a lookup says the row, or None where several do.

    ``vmap`` of ``table[i]`` indexes all axes. A start along an axis that is read whole is kept inside, and so is 0.
    """
    indexed = eqn.params["dimension_numbers"].start_index_map
    columns = list(range(len(indexed)))
    if len(columns) > 1 and "FILL" not in str(eqn.params["mode"]).upper():
        shape, sizes = eqn.invars[0].aval.shape, eqn.params["slice_sizes"]  # type: ignore[attr-defined]
        columns = [column for column, dim in enumerate(indexed) if sizes[dim] != shape[dim]]
    return columns[0] if len(columns) == 1 else None


def rows_read(eqn: jax_core.JaxprEqn, met: Meeting, indices: Any, weight: Any = None) -> tuple[Use, jax.Array]:
    """How often each row of an embedding is read, or what the positions weigh that read it."""
    view, (atom,) = met.view, met.inputs
    rows = indices[..., _column(eqn)].reshape(-1)
    if "FILL" not in str(eqn.params["mode"]).upper():  # XLA keeps starts inside, also where they are said to be
        rows = jnp.clip(rows, 0, atom.size - 1)
    rows = jnp.where(rows < 0, atom.size, rows)  # below the first row there is none, as there is none behind the last
    each = jnp.uint32(1)
    if weight is not None:
        each = jnp.broadcast_to(weight * 1, indices.shape)[..., 0].reshape(-1)
        each = each.astype(jnp.float32 if jnp.issubdtype(weight.dtype, jnp.floating) else jnp.uint32)
    counts = jnp.zeros(atom.size, each.dtype).at[rows].add(each, mode="drop")
    return Use(view.path, view.shape, (atom.axis,), _in_order(_own(view.fixed)), view.scanned), counts
