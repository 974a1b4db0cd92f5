"""Explicit mesh axes: code that was written for whole arrays runs where types say how arrays are sharded.

With explicit axes every operation must say how its result is sharded, and one whose operands leave that open (a gather,
a reshape, a decomposition) raises. Inside :func:`on_any_mesh` the compiler decides, as with automatic axes, and what
comes out gets its type by one rule.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

_Call = TypeVar("_Call", bound=Callable[..., Any])

# Where jax has no public names for these, explicit axes are not the default either: there functions run as they are.
_ENTER: Any = getattr(jax.sharding, "use_abstract_mesh", None)
_RESHARD: Any = getattr(jax.sharding, "reshard", None)


def on_any_mesh(call: _Call, like: Callable[..., Any] | None = None) -> _Call:
    """A function that runs on arrays with explicit mesh axes, and whose results are sharded like its arguments.

    A result has the sharding of the first argument of its shape; without one, each of its axes that of an axis of the
    same length in the same place, counted from the last, or of the only one of that length. One that is at least half
    as large as an argument is sharded along any axis that divides, rather than not at all. A node with a method
    ``placed`` says itself what its fields are sharded like.

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
        given = jax.tree.leaves((args, kwargs))
        mesh = next((mesh_of(x) for x in given if is_explicit(x)), None)
        if mesh is None or _ENTER is None or _RESHARD is None:
            return call(*args, **kwargs)
        with _ENTER(mesh.update_axis_types(dict.fromkeys(mesh.explicit_axes, jax.sharding.AxisType.Auto))):
            found = call(*_freed(args), **_freed(kwargs))
        known = (args, kwargs) if like is None else like(*args, **kwargs)
        devices = next((x.sharding.mesh for x in given if mesh_of(x) and not isinstance(x, jax.core.Tracer)), None)
        if not isinstance(known, dict):
            return _typed(found, known, mesh, devices)
        return {name: _typed(x, known[name], mesh, devices) for name, x in found.items()}

    return wrapped  # type: ignore[return-value]  # the same arguments and results


def mesh_of(x: Any) -> Any:
    """The mesh of an array's or a shape's type if it has explicit axes, else None."""
    mesh = getattr(_sharding_of(x), "mesh", None)
    return mesh if getattr(mesh, "explicit_axes", ()) else None


def _sharding_of(x: Any) -> Any:
    """The sharding that is part of a type; None where there is none."""
    if isinstance(x, jax.Array):
        return getattr(jax.typeof(x), "sharding", None) if hasattr(jax, "typeof") else None
    return getattr(x, "sharding", None) if isinstance(x, (jax.ShapeDtypeStruct, jax.core.ShapedArray)) else None


def is_explicit(x: Any) -> bool:
    """Whether the type of ``x`` says how it is sharded, so that to split an axis of it is an error."""
    return mesh_of(x) is not None and any(names is not None for names in spec_of(x))


def spec_of(x: Any) -> tuple[Any, ...]:
    """The mesh axes of each axis of an array whose mesh has explicit axes."""
    spec = tuple(_sharding_of(x).spec)
    return spec + (None,) * (len(x.shape) - len(spec))


def struct(x: Any, shape: tuple[int, ...] | None = None) -> jax.ShapeDtypeStruct:
    """The shape and dtype of an array, a shape or a type, and its sharding where that is part of the type.

    Args:
      x: of which.
      shape: other lengths of its axes; those that no longer divide are not sharded.
    """
    shape = tuple(jnp.shape(x)) if shape is None else shape
    mesh = mesh_of(x)
    marks = {} if mesh is None else {"sharding": NamedSharding(mesh, _fitted(spec_of(x), shape, mesh))}
    return jax.ShapeDtypeStruct(shape, jnp.result_type(x), **marks)


def typed_like(x: Any, like: Any) -> jax.ShapeDtypeStruct:
    """The shape of a result with the sharding that it has where it is made from arrays."""
    known = [y for y in jax.tree.leaves(like) if mesh_of(y) is not None]
    if not known:
        return jax.ShapeDtypeStruct(x.shape, x.dtype)
    sharding = NamedSharding(mesh_of(known[0]), PartitionSpec(*_spec_like(tuple(x.shape), known)))
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def spread(shape: Sequence[int], dtype: Any, spec: Sequence[Any], mesh: Any) -> jax.ShapeDtypeStruct:
    """A shape with the mesh axes of each of its axes, where their number divides it."""
    sharding = NamedSharding(mesh, _fitted(spec, tuple(shape), mesh))
    return jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=sharding)


def divides(names: Any, length: int, mesh: Any) -> bool:
    """Whether an axis of some length can be sharded over mesh axes."""
    return length % _parts(names, mesh) == 0


def is_freed(sharding: Any) -> bool:
    """Whether an equation's sharding names mesh axes that are explicit no longer where it is run."""
    if _ENTER is None or not isinstance(sharding, NamedSharding):
        return False
    here = jax.sharding.get_abstract_mesh()
    return not here.empty and not here.explicit_axes and bool(getattr(sharding.mesh, "explicit_axes", ()))


def sharded_like(x: jax.Array, like: jax.Array) -> jax.Array:
    """An array of other lengths sharded as another one, along the axes whose lengths allow it."""
    is_known = isinstance(like, jax.Array) and not isinstance(like, jax.core.Tracer)
    sharding = like.sharding if is_known else _sharding_of(like) if mesh_of(like) else None
    if not isinstance(sharding, NamedSharding) or (isinstance(x, jax.core.Tracer) and mesh_of(x) is None):
        return x
    there = NamedSharding(sharding.mesh, _fitted(sharding.spec, x.shape, sharding.mesh))
    return jax.device_put(x, there) if mesh_of(x) is None else _RESHARD(x, there)


def sharding_like(shape: tuple[int, ...], sharding: NamedSharding, of: tuple[int, ...]) -> NamedSharding:
    """The sharding of an array made from another one, by the rule of :func:`on_any_mesh`, whatever the mesh axes are.

    Args:
      shape: of the array.
      sharding: of the other one.
      of: the shape of that.
    """
    like: Any = jax.ShapeDtypeStruct(of, jnp.float32, sharding=sharding)
    return NamedSharding(sharding.mesh, PartitionSpec(*_spec_like(shape, [like])))


def by_outputs(w: jax.Array) -> jax.Array:
    """A matrix (inputs, outputs) whose inputs every device has whole, for its share of the outputs.

    So what goes input by input moves the matrix once, there and back. Known is the mesh inside ``jax.set_mesh`` and
    inside :func:`on_its_mesh` only; elsewhere the matrix is left as it is.
    """
    mesh = None if _ENTER is None else jax.sharding.get_abstract_mesh()
    if mesh is None or mesh.empty or mesh.explicit_axes or getattr(mesh, "manual_axes", ()):
        return w
    names: tuple[str, ...] = ()
    for name in mesh.axis_names:
        names = (*names, name) if divides((*names, name), w.shape[-1], mesh) else names
    return jax.lax.with_sharding_constraint(w, PartitionSpec(None, names)) if names else w


def on_its_mesh(x: Any) -> contextlib.AbstractContextManager[Any]:
    """The mesh that an array is spread over, known to what is compiled inside; nothing where another one is known."""
    sharding = x.sharding if isinstance(x, jax.Array) and _is_concrete(x) else None
    if _ENTER is None or not isinstance(sharding, NamedSharding) or sharding.is_fully_replicated:
        return contextlib.nullcontext()
    known = not jax.sharding.get_abstract_mesh().empty or sharding.mesh.explicit_axes
    return contextlib.nullcontext() if known else _ENTER(sharding.mesh.abstract_mesh)


def kept(tree: Any, like: Any) -> Any:
    """Results sharded as the array they were made from, by the rule of :func:`on_any_mesh`.

    Outside ``jit`` and with automatic axes the compiler spreads them as it likes, and what is made of them then.
    """
    sharding = getattr(like, "sharding", None) if isinstance(like, jax.Array) and _is_concrete(like) else None
    if not isinstance(sharding, NamedSharding) or sharding.is_fully_replicated or mesh_of(like) is not None:
        return tree

    def place(x: Any) -> Any:
        if not isinstance(x, jax.Array) or not _is_concrete(x) or not x.ndim:
            return x
        there = sharding_like(x.shape, sharding, like.shape)
        moves = not x.sharding.is_equivalent_to(there, x.ndim)
        known = x.sharding.device_set == there.device_set and not there.is_fully_replicated
        return jax.device_put(x, there) if moves and known else x

    return jax.tree.map(place, tree)


def _is_concrete(x: Any) -> bool:
    return not isinstance(x, jax.core.Tracer)


def _fitted(spec: Iterable[Any], shape: tuple[int, ...], mesh: Any) -> PartitionSpec:
    """The spec for other lengths: of axes that are divisible, each mesh axis for the first one that names it."""
    found: list[Any] = []
    for names, n in zip(spec, shape, strict=False):
        taken = names is None or n % _parts(names, mesh) or set(_names(names)) & set(_used(found))
        found.append(None if taken else names)
    return PartitionSpec(*found)


def _parts(names: Any, mesh: Any) -> int:
    sizes = dict(mesh.shape)
    return math.prod(sizes[name] for name in _names(names))


def _spec_like(shape: tuple[int, ...], like: Sequence[jax.Array]) -> list[Any]:
    same = sorted((x for x in like if x.shape == shape), key=is_explicit, reverse=True)
    if same:
        return list(spec_of(same[0]))
    spec: list[Any] = [None] * len(shape)
    for x in like:
        for i in range(1, min(len(x.shape), len(shape)) + 1):
            if x.shape[-i] == shape[-i]:
                _place(spec, len(shape) - i, spec_of(x)[-i])
    for x in like:
        for length, names in zip(x.shape, spec_of(x), strict=True):
            if len(shape) > 1 and x.shape.count(length) == shape.count(length) == 1:  # nothing else that it could be
                _place(spec, shape.index(length), names)
    largest = max(like, key=lambda x: math.prod(x.shape))
    if 2 * math.prod(shape) >= math.prod(largest.shape):
        _spread(spec, shape, largest)
    return spec


def _place(spec: list[Any], axis: int, names: Any) -> None:
    """Shard an axis over mesh axes that no other one has."""
    if spec[axis] is None and names is not None and not set(_names(names)) & set(_used(spec)):
        spec[axis] = names


def _spread(spec: list[Any], shape: tuple[int, ...], like: jax.Array) -> None:
    """Shard a large result over the mesh axes that it lacks still, as if axes had been moved, split or merged."""
    changed = [i for i, n in enumerate(shape) if shape.count(n) > like.shape.count(n)]
    for length, names in zip(like.shape, spec_of(like), strict=True):
        if names is None or set(_names(names)) & set(_used(spec)):
            continue
        parts = _parts(names, _sharding_of(like).mesh)
        fits = [i for i, n in enumerate(shape) if spec[i] is None and n and n % parts == 0]
        if fits:
            moved = length in shape and like.shape.count(length) == shape.count(length)
            spec[max(fits, key=lambda i: (moved and shape[i] == length, i in changed, shape[i], -i))] = names


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


def _typed(tree: Any, like: Any, mesh: Any, devices: Any) -> Any:
    """Results with explicit axes."""
    known = [x for x in jax.tree.leaves(like) if mesh_of(x) is not None]

    def typed(x: Any) -> Any:
        if hasattr(x, "placed"):
            return x.placed(known, lambda part, like: _typed(part, like, mesh, devices))
        if not isinstance(x, jax.Array):
            return x
        if not isinstance(x, jax.core.Tracer) and devices is None:
            return x  # a constant: without devices there is no place to bring it to
        spec = _spec_like(x.shape, known) if known else ()
        return _RESHARD(x, NamedSharding(devices or mesh, PartitionSpec(*spec)))

    return jax.tree.map(typed, tree, is_leaf=lambda x: hasattr(x, "placed"))
