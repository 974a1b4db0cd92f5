"""Explicit mesh axes: code that was written for whole arrays runs where types say how arrays are sharded.

With explicit axes every operation must say how its result is sharded, and one whose operands leave that open (a gather,
a reshape, a decomposition) raises. Inside :func:`on_any_mesh` the compiler decides, as with automatic axes, and what
comes out gets its type by one rule.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
from jax.sharding import NamedSharding, PartitionSpec

_Call = TypeVar("_Call", bound=Callable[..., Any])

# Where jax has no public names for these, explicit axes are not the default either: there functions run as they are.
_ENTER: Any = getattr(jax.sharding, "use_abstract_mesh", None)
_RESHARD: Any = getattr(jax.sharding, "reshard", None)


def on_any_mesh(call: _Call, like: Callable[..., Any] | None = None) -> _Call:
    """A function that runs on arrays with explicit mesh axes, and whose results are sharded like its arguments.

    A result has the sharding of the first argument of its shape; without one, each of its axes that of an axis of the
    same length in the same place, counted from the last, or of the only one of that length. One that is at least half
    as large as an argument is sharded along any axis that divides, rather than not at all.

    Args:
      call: a function of pytrees, and of methods whose hyperparameters may be arrays. Arrays that it closes over lie on
        no mesh with explicit axes.
      like: of the arguments gives those that results are sharded like, for each entry of a dict its own; all by
        default.

    Returns:
      The function. It calls ``call`` as it is where no axis of an argument is explicit.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> mesh = jax.make_mesh((1,), ("model",))
      >>> rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("model", None))
      >>> on_any_mesh(jnp.sort)(jax.device_put(jnp.ones((4, 2)), rows)).sharding == rows
      True
    """

    @functools.wraps(call)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        mesh = next((mesh_of(x) for x in jax.tree.leaves((args, kwargs)) if is_explicit(x)), None)
        if mesh is None or _ENTER is None or _RESHARD is None:
            return call(*args, **kwargs)
        with _ENTER(mesh.update_axis_types(dict.fromkeys(mesh.explicit_axes, jax.sharding.AxisType.Auto))):
            found = call(*_freed(args), **_freed(kwargs))
        known = (args, kwargs) if like is None else like(*args, **kwargs)
        if not isinstance(known, dict):
            return _typed(found, known, mesh)
        return {name: _typed(x, known[name], mesh) for name, x in found.items()}

    return wrapped  # type: ignore[return-value]  # the same arguments and results


def mesh_of(x: Any) -> Any:
    """The mesh of an array's type if it has explicit axes, else None."""
    sharding = getattr(jax.typeof(x), "sharding", None) if isinstance(x, jax.Array) and hasattr(jax, "typeof") else None
    mesh = getattr(sharding, "mesh", None)
    return mesh if getattr(mesh, "explicit_axes", ()) else None


def is_explicit(x: Any) -> bool:
    """Whether the type of ``x`` says how it is sharded, so that to split an axis of it is an error."""
    return mesh_of(x) is not None and any(names is not None for names in spec_of(x))


def spec_of(x: Any) -> tuple[Any, ...]:
    """The mesh axes of each axis of an array whose mesh has explicit axes."""
    return tuple(jax.typeof(x).sharding.spec)


def sharding_like(shape: tuple[int, ...], like: Sequence[jax.Array]) -> NamedSharding:
    """The sharding that a result of this shape gets from arguments on a mesh with explicit axes."""
    mesh: Any = _mesh_of_devices(like) or mesh_of(like[0])
    return NamedSharding(mesh, PartitionSpec(*_spec_like(shape, like)))


def _mesh_of_devices(like: Sequence[jax.Array]) -> Any:
    return next((x.sharding.mesh for x in like if not isinstance(x, jax.core.Tracer)), None)  # type: ignore[attr-defined]


def _spec_like(shape: tuple[int, ...], like: Sequence[jax.Array]) -> list[Any]:
    same = sorted((x for x in like if x.shape == shape), key=is_explicit, reverse=True)
    if same:
        return list(spec_of(same[0]))
    spec: list[Any] = [None] * len(shape)
    for x in like:
        for i in range(1, min(x.ndim, len(shape)) + 1):
            if x.shape[-i] == shape[-i]:
                _place(spec, len(shape) - i, spec_of(x)[-i])
    for x in like:
        for length, names in zip(x.shape, spec_of(x), strict=True):
            if len(shape) > 1 and x.shape.count(length) == shape.count(length) == 1:  # nothing else that it could be
                _place(spec, shape.index(length), names)
    largest = max(like, key=lambda x: x.size)
    if 2 * math.prod(shape) >= largest.size:
        _spread(spec, shape, largest)
    return spec


def _place(spec: list[Any], axis: int, names: Any) -> None:
    """Shard an axis over mesh axes that no other one has."""
    if spec[axis] is None and names is not None and not set(_names(names)) & set(_used(spec)):
        spec[axis] = names


def _spread(spec: list[Any], shape: tuple[int, ...], like: jax.Array) -> None:
    """Shard a large result over the mesh axes that it lacks still, along axes of the same length if it has any."""
    sizes = dict(mesh_of(like).shape)
    for length, names in zip(like.shape, spec_of(like), strict=True):
        if names is None or set(_names(names)) & set(_used(spec)):
            continue
        parts = math.prod(sizes[name] for name in _names(names))
        fits = [i for i, n in enumerate(shape) if spec[i] is None and n and n % parts == 0]
        if fits:
            spec[max(fits, key=lambda i: (shape[i] == length, shape[i]))] = names


def _names(names: Any) -> tuple[str, ...]:
    return names if isinstance(names, tuple) else (names,)


def _used(spec: Sequence[Any]) -> Iterator[str]:
    return (name for names in spec if names is not None for name in _names(names))


def _freed(x: Any) -> Any:
    """Arguments whose mesh axes are explicit no longer: arrays in pytrees, and hyperparameters of methods."""
    return jax.tree.map(_freed_leaf, x)


def _freed_leaf(x: Any) -> Any:
    if mesh_of(x) is not None:
        return _RESHARD(x, PartitionSpec())
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        fields = {f.name: getattr(x, f.name) for f in dataclasses.fields(x) if f.init}
        freed = {name: _freed(value) for name, value in fields.items()}
        changed = {name: value for name, value in freed.items() if value is not fields[name]}
        return dataclasses.replace(x, **changed) if changed else x
    return x


def _typed(tree: Any, like: Any, mesh: Any) -> Any:
    """Results with explicit axes."""
    known = [x for x in jax.tree.leaves(like) if mesh_of(x) is not None]

    def typed(x: Any) -> Any:
        if not isinstance(x, jax.Array):
            return x
        if not isinstance(x, jax.core.Tracer) and _mesh_of_devices(known) is None:
            return x  # a constant: without devices there is no place to bring it to
        return _RESHARD(x, sharding_like(x.shape, known) if known else NamedSharding(mesh, PartitionSpec()))

    return jax.tree.map(typed, tree)
