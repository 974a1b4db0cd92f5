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
      is_derived: whether it was made for this product, as patches are.
    """

    view: View
    window: tuple[Atoms, ...]
    inputs: Atoms
    lead: Atoms
    free: Atoms
    x: tuple[Atoms | None, ...]
    y: tuple[Atoms | None, ...]
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
    return Meeting(view, (), _atoms(view, wc), _atoms(view, wb), _atoms(view, free), tuple(x), y)


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
    *places, inputs = _of_copies([view.dims[d] for d in (*window, in_dim)])
    x = (*[None] * (1 + len(window)), *places, (*lead, *(inputs or ())))
    y: list[Atoms | None] = [None] * len(view.dims)
    y[numbers.out_spec[1]] = (*lead, *(_of_copies([free])[0] or ()))
    dims, laid_out = tuple(_atoms(view, [d]) for d in window), functools.partial(_patches, eqn)
    return Meeting(view, dims, _atoms(view, [in_dim]), _own(lead), _own(free), x, tuple(y), laid_out, is_derived=True)


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


def moments(x: Any, labels: Sequence[Label], lead: Atoms, names: frozenset[str]) -> dict[str, jax.Array]:
    """Sums over all positions of an activation, each with the leading axes ``lead`` and then ``k`` or nothing."""
    x, batch, positions, k = _arranged(x, labels, lead)
    wide = x.astype(jnp.float32)
    head = tuple(a.size for a in lead)
    found: dict[str, Any] = {"count": jnp.full(head, math.prod(x.shape[i] for i in positions), jnp.uint32)}
    if "gram" in names:
        dims = ((positions, positions), (batch, batch))
        gram = lax.dot_general(
            wide,
            wide,
            dims,
            precision=lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
            **_out_sharding(x, batch, positions),
        )
        found["gram"] = gram.reshape(*head, k, k)
    each = {
        "sum": lambda: wide.sum(positions),
        "square": lambda: jnp.square(wide).sum(positions),
        "absmax": lambda: jnp.abs(wide).max(positions, initial=0),
        "zeros": lambda: (x == 0).sum(positions, dtype=jnp.uint32),
    }
    found |= {name: make().reshape(*head, k) for name, make in each.items() if name in names}
    if "histogram" in names:
        found["histogram"] = _histogram(wide.reshape(math.prod(head), -1)).reshape(*head, -1)
    return found


def _out_sharding(x: Any, batch: list[int], positions: list[int]) -> dict[str, Any]:
    """With explicit mesh axes: the features of one side stay sharded as they are."""
    sharding = getattr(jax.typeof(x), "sharding", None) if hasattr(jax, "typeof") else None
    if sharding is None or all(entry is None for entry in sharding.spec):
        return {}
    spec = sharding.spec
    features = [i for i in range(x.ndim) if i not in batch and i not in positions]
    kept = [spec[i] for i in (*batch, *features)]
    out = jax.sharding.PartitionSpec(*kept, *[None] * len(features))
    return {"out_sharding": jax.sharding.NamedSharding(sharding.mesh, out)}


def _histogram(x: jax.Array) -> jax.Array:
    """How many magnitudes (rows, n) fall into each bin (rows, bins); zeros fall into none."""
    low, high = OCTAVES
    bins = (high - low) * BINS_PER_OCTAVE
    place = jnp.floor((jnp.log2(jnp.abs(x)) - low) * BINS_PER_OCTAVE)
    place = jnp.where(x == 0, bins, jnp.clip(place, 0, bins - 1)).astype(jnp.int32)
    rows = jnp.arange(x.shape[0])[:, None]
    counts = jnp.zeros((x.shape[0], bins), jnp.uint32).at[rows, place].add(1, mode="drop")
    return counts.astype(jnp.float32)


def of_outputs(y: Any, labels: Sequence[Label], lead: Atoms) -> dict[str, jax.Array]:
    """Sums over all positions of a product, by output channel."""
    y, _, positions, n = _arranged(y, labels, lead)
    wide, shape = y.astype(jnp.float32), (*(a.size for a in lead), n)
    return {
        "output_sum": wide.sum(positions).reshape(shape),
        "output_square": jnp.square(wide).sum(positions).reshape(shape),
        "output_absmax": jnp.abs(wide).max(positions, initial=0).reshape(shape),
    }


def of_gather(eqn: jax_core.JaxprEqn, view: View) -> Meeting:
    """The meeting of an embedding with the rows that are read of it: a product with one-hot vectors."""
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    if len(numbers.start_index_map) != 1 or numbers.operand_batching_dims:
        raise UnreadError("it is indexed along several axes at once")
    (dim,) = numbers.start_index_map
    operand: Any = eqn.invars[0].aval
    shape = operand.shape
    if sizes[dim] != 1 or any(n != m for d, (n, m) in enumerate(zip(sizes, shape, strict=True)) if d != dim):
        raise UnreadError("windows of it are read, not rows")
    atoms = view.dims[dim]
    if len(atoms) != 1 or not view.is_whole(atoms[0]) or atoms[0].step < 0:
        raise UnreadError("a part of it is indexed")
    free = _atoms(view, [d for d in range(len(shape)) if d != dim])
    return Meeting(view, (), atoms, (), free, (), ())


def rows_read(eqn: jax_core.JaxprEqn, met: Meeting, indices: Any) -> tuple[Use, jax.Array]:
    """How often each row of an embedding is read."""
    view, (atom,) = met.view, met.inputs
    rows = indices.reshape(-1)
    if "CLIP" in str(eqn.params["mode"]).upper():
        rows = jnp.clip(rows, 0, atom.size - 1)
    counts = jnp.zeros(atom.size, jnp.uint32).at[rows].add(1, mode="drop")
    return Use(view.path, view.shape, (atom.axis,), _in_order(_own(view.fixed)), view.scanned), counts
