"""Where a parameter meets an activation in a product: which axes are contracted, and the moments of what meets it."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core as jax_core

from jcompress.trace.core.layouts import regroup
from jcompress.trace.core.views import Atom, Atoms, View

OCTAVES = (-24, 16)
BINS_PER_OCTAVE = 8

Label = Atom | None
"""What an axis of an activation runs over: part of an axis of the parameter, or (None) positions."""


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
    """One product of a parameter.

    Attributes:
      use: where it is counted.
      x: the activation, its axes split so that each has one label.
      labels: of the axes of ``x``.
      y: the product, split alike.
      outputs: labels of its axes.
      part: the free atoms, if they are not all there are; else None.
      is_derived: whether ``x`` was made for this product, as patches are, and not only laid out anew.
    """

    use: Use
    x: Any
    labels: tuple[Label, ...]
    y: Any
    outputs: tuple[Label, ...]
    part: Atoms | None
    is_derived: bool = False


Meet = Callable[..., Meeting]
"""``(eqn, view, side, x, y)``: what meets the parameter in the product of an equation."""


class UnreadError(Exception):
    """A product that gives no statistic, and why."""


def _split(x: Any, dims: Sequence[tuple[Label, ...]]) -> tuple[Any, tuple[Label, ...]]:
    """Give every label an axis of its own. An axis without labels has one position and is dropped."""
    shape: list[int] = []
    labels: list[Label] = []
    for n, dim in zip(x.shape, dims, strict=True):
        for atom in dim:
            shape.append(n if atom is None else atom.size)
            # What a broadcast copied along a batch axis meets more positions.
            labels.append(None if atom is None or atom.axis < 0 else atom)
    return x.reshape(shape), tuple(labels)


def _in_order(atoms: Sequence[Atom]) -> Atoms:
    """Atoms in the C order of the parameter's own axes."""
    return tuple(sorted(atoms, key=lambda a: (a.axis, -a.step)))


def _size(atoms: Sequence[Atom], axis: int) -> int:
    return math.prod(a.size for a in atoms if a.axis == axis)


def _use(view: View, contracted: Sequence[Atom], batch: Sequence[Atom], free: Sequence[Atom]) -> tuple[Use, Any]:
    """Where a product is counted, and its free atoms if those are not all there are."""
    shape, ndim = view.shape, len(view.shape)
    if any(a.axis < 0 for a in (*contracted, *free)):
        raise UnreadError("copies of it that a broadcast made are contracted, or give outputs of their own")
    if not contracted:
        raise UnreadError("no axis of it is contracted")
    batch = [a for a in batch if a.axis >= 0]
    for axis in {a.axis for a in contracted}:
        if _size([*contracted, *batch], axis) != shape[axis]:
            raise UnreadError(f"a part of its axis {axis - ndim} is contracted")
    outputs = {a.axis for a in free}
    chosen = [a for a in view.fixed if a.axis in outputs]
    scanned = [a for _, atoms in view.scanned for a in atoms]
    lead = _in_order([*batch, *(a for a in view.fixed if a.axis not in outputs)])
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


def of_dot(eqn: jax_core.JaxprEqn, view: View, side: int, x: Any, y: Any) -> Meeting:
    """The meeting in a dot product whose operand ``side`` is the parameter."""
    contract, batch = eqn.params["dimension_numbers"]
    wc, xc, wb, xb = contract[side], contract[1 - side], batch[side], batch[1 - side]
    free_dims = [d for d in range(len(view.dims)) if d not in wc and d not in wb]
    contracted = [a for d in wc for a in view.dims[d]]
    lead = [a for d in wb for a in view.dims[d]]
    free = [a for d in free_dims for a in view.dims[d]]
    use, part = _use(view, contracted, lead, free)
    dims: list[tuple[Label, ...]] = [(None,)] * x.ndim
    for mine, other in zip((*wc, *wb), (*xc, *xb), strict=True):
        dims[other] = view.dims[mine]
    ours: list[tuple[Label, ...]] = [view.dims[d] for d in free_dims]
    theirs: list[tuple[Label, ...]] = [(None,)] * (x.ndim - len(xc) - len(xb))
    outputs = [view.dims[d] for d in wb] + (ours + theirs if side == 0 else theirs + ours)
    return Meeting(use, *_split(x, dims), *_split(y, outputs), part)


def of_convolution(eqn: jax_core.JaxprEqn, view: View, side: int, x: Any, y: Any) -> Meeting:
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
    lead, free = grouped
    contracted = [a for d in (*window, in_dim) for a in view.dims[d]]
    use, part = _use(view, contracted, lead, free)
    x = _patches(x, eqn, y.shape)
    positions: list[tuple[Label, ...]] = [(None,)] * (1 + len(window))
    dims = [*positions, *(view.dims[d] for d in window), (*lead, *view.dims[in_dim])]
    outputs: list[tuple[Label, ...]] = [(None,)] * y.ndim
    outputs[numbers.out_spec[1]] = (*lead, *free)
    return Meeting(use, *_split(x, dims), *_split(y, outputs), part, is_derived=True)


def _patches(x: Any, eqn: jax_core.JaxprEqn, out_shape: Sequence[int]) -> Any:
    """(batch, output positions..., window..., channels): what each output position of a convolution sees."""
    p = eqn.params
    numbers = p["dimension_numbers"]
    batch, channel, *space = numbers.lhs_spec
    x = x.transpose(batch, *space, channel)
    spread = [(low, high, d - 1) for (low, high), d in zip(p["padding"], p["lhs_dilation"], strict=True)]
    x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *spread, (0, 0, 0)])
    kernel: Any = eqn.invars[1].aval
    window = [kernel.shape[d] for d in numbers.rhs_spec[2:]]
    steps, out = p["window_strides"], [out_shape[d] for d in numbers.out_spec[2:]]
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


def of_gather(eqn: jax_core.JaxprEqn, view: View, indices: Any) -> tuple[Use, jax.Array]:
    """How often each row of an embedding is read."""
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    if len(numbers.start_index_map) != 1 or numbers.operand_batching_dims:
        raise UnreadError("it is indexed along several axes at once")
    (dim,) = numbers.start_index_map
    operand: Any = eqn.invars[0].aval
    shape = operand.shape
    if sizes[dim] != 1 or any(n != m for d, (n, m) in enumerate(zip(sizes, shape, strict=True)) if d != dim):
        raise UnreadError("windows of it are read, not rows")
    atoms = view.dims[dim]
    if len(atoms) != 1 or not view.is_whole(atoms[0]):
        raise UnreadError("a part of it is indexed")
    rows = indices.reshape(-1)
    if "CLIP" in str(eqn.params["mode"]).upper():
        rows = jnp.clip(rows, 0, shape[dim] - 1)
    counts = jnp.zeros(shape[dim], jnp.uint32).at[rows].add(1, mode="drop")
    return Use(view.path, view.shape, (atoms[0].axis,), _in_order(view.fixed), view.scanned), counts
