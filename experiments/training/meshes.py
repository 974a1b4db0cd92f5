"""Meshes, and how parameters and all that belongs to them are spread: rules by regular expressions on paths."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

import jcompress as jc

PyTree = Any
Axis = str | tuple[str, ...] | None
Rules = Sequence[tuple[str, Sequence[Axis]]]
BATCH = ("data", "fsdp")
"""The axes of a mesh that examples are spread over; parameters may be spread over the second as well."""


def make_mesh(sizes: Mapping[str, int], devices: int | None = None) -> Mesh | AbstractMesh:
    """A mesh of all devices of all processes, or of so many that are not there.

    Args:
      sizes: ``{axis: devices}``, such as ``{"data": 1, "fsdp": -1, "tensor": 2}``; one may be -1, for the devices that
        are left. ``data`` copies the parameters, ``fsdp`` spreads them with the examples, ``tensor`` splits products.
      devices: for a trial without devices, how many; shapes and shardings are all that the mesh is good for.

    Raises:
      ValueError: if the sizes do not multiply to the number of devices.
    """
    sizes, abstract, devices = dict(sizes), devices is not None, devices or jax.device_count()
    shown = " x ".join(f"{name}={size}" for name, size in sizes.items())
    free = [name for name, size in sizes.items() if size == -1]
    known = math.prod(size for size in sizes.values() if size != -1)
    if len(free) > 1 or any(size < 1 for size in sizes.values() if size != -1):
        raise ValueError(f"config.mesh: found {shown}, expected positive sizes, of which one may be -1")
    if not set(sizes) <= {*BATCH, "tensor"}:
        raise ValueError(f"config.mesh: found the axes {', '.join(sizes)}, expected some of data, fsdp and tensor")
    if devices % known or (not free and devices != known):
        raise ValueError(
            f"config.mesh: {shown} needs {'a multiple of ' * bool(free)}{known} devices, found {devices}; change a "
            "size, or let one be -1"
        )
    sizes |= dict.fromkeys(free, devices // known)
    if abstract:
        return AbstractMesh(tuple(sizes.values()), tuple(sizes))
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def of_params(params: PyTree, rules: Rules, mesh: Mesh | AbstractMesh) -> dict[str, NamedSharding]:
    """``{path: sharding}``: the first rule whose pattern matches the whole path wins, as in :func:`jcompress.plan`.

    Args:
      params: the parameters, or their shapes.
      rules: pairs of a pattern and what the last axes of a leaf are spread over, each an axis of the mesh, several, or
        None. So one rule serves layers that are stacked for ``scan`` and others. A leaf that no rule matches is copied.
      mesh: from :func:`make_mesh`. Axes that it does not have split nothing.

    Raises:
      ValueError: if a rule matches nothing, has more axes than a leaf, or a length is no multiple of the devices.
    """
    leaves, used = jc.rules.leaves(params), set()
    found = {}
    for path, leaf in leaves.items():
        number = next((i for i, (pattern, _) in enumerate(rules) if re.fullmatch(pattern, path)), None)
        used.add(number)
        spec = () if number is None else rules[number][1]
        found[path] = NamedSharding(mesh, _spec(path, leaf.shape, spec, mesh))
    for number, (pattern, _) in enumerate(rules):
        if number not in used:
            raise ValueError(
                f"config.sharding: rule {number} {pattern!r} spreads no parameter; {jc.rules.closest(pattern, leaves)}"
            )
    return found


def _spec(path: str, shape: tuple[int, ...], spec: Sequence[Axis], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """The axes of a leaf, known to divide it."""
    if len(spec) > len(shape):
        raise ValueError(
            f"{path}: found shape {shape}, expected {len(spec)} axes or more for config.sharding's {tuple(spec)}"
        )
    axes: list[Axis] = [None] * (len(shape) - len(spec))
    for place, (length, names) in enumerate(zip(shape[len(axes) :], spec, strict=True), len(axes)):
        known = tuple(name for name in _names(names) if name in mesh.shape)
        devices = math.prod(mesh.shape[name] for name in known)
        if length % devices:
            raise ValueError(
                f"{path}: axis {place} of shape {shape} is no multiple of the {devices} devices along "
                f"{' x '.join(known)}; choose another config.mesh, or None for this axis in config.sharding"
            )
        axes.append(known[0] if len(known) == 1 else known or None)
    return PartitionSpec(*axes)


def _names(axis: Axis) -> tuple[str, ...]:
    return () if axis is None else (axis,) if isinstance(axis, str) else tuple(axis)


def of_state(
    state: PyTree, params: Mapping[str, NamedSharding], shapes: Mapping[str, Any], mesh: Mesh | AbstractMesh
) -> PyTree:
    """A sharding for every array of a training state: moments, masks, codes, factors, and the parameters themselves.

    What belongs to a parameter has its path within its own, and is spread as the parameter along each axis, counted
    from the last, that has the parameter's length. All else is copied.

    Args:
      state: shapes, as ``jax.eval_shape`` gives them.
      params: from :func:`of_params`.
      shapes: ``{path: array or shape}`` of the parameters.
      mesh: of all of them.
    """

    def one(keys: tuple, leaf: Any) -> NamedSharding:
        path = f"/{jax.tree_util.keystr(keys, simple=True, separator='/')}/"
        owner = max((name for name in params if f"/{name}/" in path), key=len, default=None)
        if owner is None:
            return NamedSharding(mesh, PartitionSpec())
        whole, axes = shapes[owner].shape, (*params[owner].spec,)
        axes = (*axes, *[None] * (len(whole) - len(axes)))
        pairs = zip(leaf.shape[::-1], whole[::-1], axes[::-1], strict=False)
        spec = [axis if length == full else None for length, full, axis in pairs][::-1]
        return NamedSharding(mesh, PartitionSpec(*[None] * (len(leaf.shape) - len(spec)), *spec))

    return jax.tree_util.tree_map_with_path(one, state)


def of_batch(mesh: Mesh) -> NamedSharding:
    """Of arrays (accumulation, examples, ...)."""
    return NamedSharding(mesh, PartitionSpec(None, tuple(name for name in BATCH if name in mesh.shape) or None))


def check_batch(size: int, parts: int, mesh: Mesh | AbstractMesh) -> None:
    """Raise unless a batch can be cut into so many parts, and each for all devices."""
    cut = parts * examples_of(mesh)
    if size % cut:
        raise ValueError(
            f"config.batch_size={size} is no multiple of {cut} = config.accumulate x the devices along data and fsdp; "
            f"use {max(size // cut, 1) * cut}"
        )


def examples_of(mesh: Mesh | AbstractMesh) -> int:
    """How many parts a batch is cut into."""
    return math.prod(mesh.shape.get(name, 1) for name in BATCH)


def reader(mesh: Mesh) -> tuple[int, int]:
    """Which part of every batch this process reads, and of how many: processes that split products read the same.

    Raises:
      ValueError: if processes share a part of their examples.
    """
    place = np.indices(mesh.devices.shape)
    along = [place[i] for i, name in enumerate(mesh.axis_names) if name in BATCH]
    parts: dict[int, set[tuple[int, ...]]] = {}
    for device, where in zip(mesh.devices.flat, zip(*(x.flat for x in along), strict=True), strict=True):
        parts.setdefault(device.process_index, set()).add(tuple(map(int, where)))
    groups = sorted({tuple(sorted(part)) for part in parts.values()})
    if sum(map(len, groups)) != len(set().union(*groups)):
        raise ValueError(
            "config.mesh: processes share some of their examples; let the devices of a process along tensor divide "
            "evenly, or tensor be a multiple of them"
        )
    return groups.index(tuple(sorted(parts[jax.process_index()]))), len(groups)


def abstract(shapes: PyTree, shardings: PyTree) -> PyTree:
    """Shapes that say where they lie, for a checkpoint to be restored into."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def bytes_on_a_device(shapes: PyTree, shardings: PyTree) -> int:
    """What one device holds of a tree."""
    sizes = jax.tree.map(lambda x, s: math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize, shapes, shardings)
    return sum(jax.tree.leaves(sizes))
