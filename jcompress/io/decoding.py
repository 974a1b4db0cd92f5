"""From a manifest to its tree. What it claims is weighed before anything is allocated; then it is read."""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jcompress import core, formats
from jcompress.core import Compressed, Layout, Part
from jcompress.io.encoding import in_order
from jcompress.io.manifest import (
    DEPTH,
    Formats,
    Place,
    StorageError,
    check_nest,
    is_name,
    key_impl,
    key_shape,
    placeholder,
    too_deep,
)
from jcompress.io.streams import Reader
from jcompress.numeric import packing
from jcompress.numeric.processes import placed

_COUNTS = {"axes", "axis", "bits", "ndim", "window"}
"""Static fields that count axes or bits. Formats loop over them, so that no file may name many."""


def decode(spec: Any, leaf: Callable[[Any], Any], depth: int = 0) -> Any:
    """The tree that ``spec`` describes; ``leaf`` gives what stands for the text of an array or the object of a node.

    Raises:
      StorageError: if ``spec`` describes nothing, or too many levels.
    """
    if depth > DEPTH:
        raise too_deep(f"more than {DEPTH}")
    if isinstance(spec, str) or (isinstance(spec, dict) and "$" in spec):
        return leaf(spec)
    if isinstance(spec, list):
        return _list(spec, leaf, depth)
    if not isinstance(spec, dict):
        return spec
    if not any(key.startswith("$") for key in spec):
        return _dict(spec.items(), leaf, depth)
    if len(spec) != 1:
        raise StorageError(f"the manifest has {list(spec)[:4]} in one object, which this version does not know")
    ((kind, value),) = spec.items()
    if kind == "$tuple" and isinstance(value, list):
        return tuple(_list(value, leaf, depth))
    if kind == "$dict" and isinstance(value, list) and all(_is_item(pair) for pair in value):
        if len({key for key, _ in value}) != len(value):
            raise StorageError("the manifest has a dictionary in which a key occurs twice")
        return _dict(value, leaf, depth)
    if kind == "$namedtuple" and isinstance(value, list) and len(value) == 2 and isinstance(value[1], dict):
        name, fields = value
        return _namedtuple(name, tuple(fields))(*_list(list(fields.values()), leaf, depth))
    return _decode_scalar(kind, value)


def _is_item(pair: Any) -> bool:
    return isinstance(pair, list) and len(pair) == 2 and type(pair[0]) in (str, int)


def _list(specs: list, leaf: Callable[[Any], Any], depth: int) -> list:
    found = []
    for x in specs:
        found.append(decode(x, leaf, depth + 1))
    return found


def _dict(items: Any, leaf: Callable[[Any], Any], depth: int) -> dict:
    found = {}
    for key, x in items:
        found[key] = decode(x, leaf, depth + 1)
    return found


def _decode_scalar(kind: str, value: Any) -> Any:
    if kind == "$text" and isinstance(value, str):
        return value
    if kind == "$float" and value in ("nan", "inf", "-inf"):
        return float(value)
    if kind == "$complex" and isinstance(value, list) and len(value) == 2:
        return complex(*(_decode_scalar(*next(iter(x.items()))) if isinstance(x, dict) else float(x) for x in value))
    raise StorageError(f"the manifest has {kind!r}, which this version does not know; install a newer jcompress")


@functools.lru_cache(1024)
def _namedtuple(name: str, fields: tuple[str, ...]) -> Any:
    """One class for each name and fields, so that trees loaded twice have one structure."""
    try:
        return collections.namedtuple(name, fields)
    except (TypeError, ValueError) as error:
        raise StorageError(f"the manifest has a named tuple that Python refuses: {error}") from None


@dataclasses.dataclass(frozen=True)
class _Sketch:
    """A node with placeholders for arrays.

    Attributes:
      node: the node.
      parts: the placeholders by name.
      nbytes: what the arrays will take in memory.
      nbits: what they take in the payload at least; what masks hide is not counted.
    """

    node: Compressed
    parts: dict[str, Part]
    nbytes: int
    nbits: int


class Decoder:
    """Weighs what a manifest claims, then reads its arrays: :meth:`weigh` every leaf, then :meth:`read` them in order.

    Args:
      known: formats beside those of :mod:`jcompress.formats`.
      most: how many bytes the arrays may take in memory.

    Attributes:
      nbytes: how many they take.
      nbits: how many bits of payload they need at least.
    """

    def __init__(self, known: Formats, most: int) -> None:
        self._known, self._most = known, most
        self._sketches: dict[str, _Sketch] = {}
        self.nbytes = self.nbits = 0

    def weigh(self, spec: Any) -> None:
        """Count one leaf.

        Raises:
          StorageError: if the leaves so far take more memory than they may, or the parts of a node do not fit together.
        """
        if isinstance(spec, str):
            part = placeholder(spec)
            nbytes, nbits = part.array.nbytes, part.nbits
        else:
            sketch = self._sketch(spec)
            nbytes, nbits = sketch.nbytes, sketch.nbits
        self._check_room(nbytes)
        self.nbytes, self.nbits = self.nbytes + nbytes, self.nbits + nbits

    def _check_room(self, nbytes: int) -> None:
        if self.nbytes + nbytes > self._most:
            raise StorageError(
                f"the manifest describes arrays of at least {self.nbytes + nbytes} bytes in memory, expected at most "
                f"{self._most} by the size of the file; if you trust it, pass max_bytes="
            )

    def _sketch(self, spec: dict[str, Any]) -> _Sketch:
        text = json.dumps(spec)
        if text not in self._sketches:
            parts: dict[str, Part] = {}

            def empty(name: str, text: str) -> np.ndarray:
                parts[name] = placeholder(text)
                return parts[name].array

            node = _build(spec, empty, self._known)
            nbytes = sum(part.array.nbytes for part in parts.values())
            self._check_room(nbytes)
            _check_fit(node)
            whole = [_stored(part, parts) for part in core.parts(node, coded=False) if part.where is None]
            self._sketches[text] = _Sketch(node, parts, nbytes, sum(part.nbits for part in whole))
        return self._sketches[text]

    def dense(self, spec: Any) -> jax.ShapeDtypeStruct:
        """The shape and dtype of the array that a leaf is or stands for."""
        x: Any = placeholder(spec).array if isinstance(spec, str) else self._sketch(spec).node
        struct = jax.ShapeDtypeStruct(x.shape, x.dtype)
        impl = key_impl(spec) if isinstance(spec, str) else None
        return (
            struct if impl is None else jax.eval_shape(lambda data: jax.random.wrap_key_data(data, impl=impl), struct)
        )

    def read(self, spec: Any, reader: Reader, place: Place = lambda name, shape: None) -> Any:
        """One leaf that was weighed.

        Args:
          spec: its description.
          reader: gives the stored values of each of its parts in turn.
          place: says on which devices they go.
        """
        if isinstance(spec, str):
            part = placeholder(spec)
            return _to_jax(_read(part, reader, _goes(place, part, spec)), spec, _goes(place, part, spec))
        sketch = self._sketch(spec)
        goes = {name: _goes(place, part, part.name, name) for name, part in sketch.parts.items()}
        values = {name: part.array for name, part in sketch.parts.items()}
        hidden = any(part.where is not None for part in in_order(sketch.node, coded=False))
        found = _read_parts(sketch.node, sketch, reader, False, {} if hidden else goes)
        if hidden:  # masks come first, since they say how much of the rest was stored
            node = _build(spec, lambda name, _: found.get(name, values[name]), self._known)
            found |= _read_parts(node, sketch, reader, True, goes)
        return _build(spec, lambda name, text: _to_jax(found[name], text, goes[name]), self._known)


def _goes(place: Place, part: Part, spec: str, name: str = "") -> jax.sharding.Sharding | None:
    """Where an array goes; keys as their data, whose last axis is none of the keys'."""
    impl = key_impl(spec)
    ndim = part.array.ndim - (0 if impl is None else len(key_shape(impl)))
    sharding = place(name, part.array.shape[:ndim])
    if impl is None or sharding is None:
        return sharding
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec)) if isinstance(sharding, NamedSharding) else None


def _read_parts(
    node: Compressed, sketch: _Sketch, reader: Reader, hidden: bool, goes: Mapping[str, Any]
) -> dict[str, Any]:
    """Read what masks hide, or the rest."""
    due = [part for part in in_order(node, coded=False) if (part.where is not None) == hidden]
    return {part.name: _read(_stored(part, sketch.parts), reader, goes.get(part.name)) for part in due}


def _stored(part: Part, texts: dict[str, Part]) -> Part:
    """The part in the code that the manifest names."""
    code = texts[part.name].code
    if code is None:
        return part
    if part.where is not None:
        raise StorageError(f"the manifest has a code for {part.name}, of which a mask hides some")
    return dataclasses.replace(part, width=packing.mask_count(code)[1], code=code)


def _read(part: Part, reader: Reader, sharding: Any = None) -> Any:
    if sharding is not None and (later := reader.later(part)) is not None:
        return later
    values = reader.read(part)
    if part.code is not None:
        return packing.decode_mask(values, part.code, part.array.shape)
    if part.where is None:
        return values.reshape(part.array.shape)
    out = np.zeros(part.array.shape, part.array.dtype)
    out[part.where] = values
    return out


def _to_jax(x: Any, spec: str, sharding: jax.sharding.Sharding | None) -> Any:
    """A JAX array, or a NumPy one where JAX would change the dtype (64 bits, when those are off)."""
    if jax.dtypes.canonicalize_dtype(x.dtype) != x.dtype:
        return x if isinstance(x, np.ndarray) else x[(slice(None),) * len(x.shape)]
    array = jnp.asarray(x) if sharding is None else placed(x, sharding)
    impl = key_impl(spec)
    return array if impl is None else jax.random.wrap_key_data(array, impl=impl)


def _build(spec: dict[str, Any], leaf: Callable[[str, str], Any], known: Formats, prefix: str = "") -> Compressed:
    """The node that ``spec`` describes, its arrays given by name."""
    check_nest(prefix)
    cls = _format(spec.get("$"), known)
    statics = {f.name: bool(f.metadata.get("static")) for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    fields = {}
    for name, x in spec.items():
        if name != "$":
            if name not in statics:
                raise StorageError(f"the manifest has a {spec['$']} with the field {name!r}, which it has not here")
            fields[name] = _static(name, x) if statics[name] else _build_field(x, leaf, known, prefix + name)
    return cls(**fields)


def _format(name: Any, known: Formats) -> type[Compressed]:
    cls = known.get(name, getattr(formats, name, None)) if isinstance(name, str) else None
    if not (isinstance(cls, type) and issubclass(cls, Compressed) and dataclasses.is_dataclass(cls)):
        raise StorageError(f"the format {name!r} is unknown; pass formats={{{name!r}: its class}}")
    return cls


def _build_field(x: Any, leaf: Callable[[str, str], Any], known: Formats, name: str) -> Any:
    if isinstance(x, dict):
        return _build(x, leaf, known, name + "/")
    if isinstance(x, list):
        return tuple(_build_field(y, leaf, known, f"{name}/{i}") for i, y in enumerate(x))
    return None if x is None else leaf(name, x)


def _static(name: str, value: Any) -> Any:
    x = decode_static(value)
    if name in _COUNTS and any(isinstance(n, int) and abs(n) > 64 for n in (x if isinstance(x, tuple) else (x,))):
        raise StorageError(f"the manifest has {name}={value}, expected at most 64")
    return x


def decode_static(x: Any) -> Any:
    """The value of a static field."""
    if isinstance(x, list):
        return tuple(map(decode_static, x))
    if isinstance(x, dict) and len(x) == 1:
        ((kind, value),) = x.items()
        if kind == "$layout":
            return _layout(value)
        return _dtype(value) if kind == "$dtype" else _decode_scalar(kind, value)
    if isinstance(x, dict) or (isinstance(x, int) and abs(x) >= 1 << 63):
        raise StorageError(f"the manifest has a static value that this version does not know: {str(x)[:40]}")
    return x


def _layout(value: Any) -> Layout:
    try:
        groups, axes = value.get("groups", 1), {name: tuple(x) for name, x in value.items() if name != "groups"}
        if sum(map(len, axes.values())) > 64 or not isinstance(groups, int):
            raise ValueError("expected at most 64 axes, and a number of groups")
        return Layout(**axes, groups=groups)
    except (AttributeError, TypeError, ValueError) as error:
        raise StorageError(f"the manifest has the layout {str(value)[:80]}, which is none: {error}") from None


def _dtype(name: Any) -> np.dtype:
    if not (isinstance(name, str) and is_name(name)):
        raise StorageError(f"the manifest has the dtype {str(name)[:40]!r}, which this version does not know")
    return np.dtype(jnp.dtype(name))


def _check_fit(node: Compressed) -> None:
    """Raise if the parts of a node of the library's own do not fit together; halves of nodes are not checked."""
    leaves = jax.tree.leaves(node, is_leaf=lambda x: x is None)
    if any(x is None for x in leaves) or not _is_own(node):
        return
    try:
        shape = node.shape
    except AttributeError as error:
        raise StorageError(f"the manifest describes parts that do not fit together: {error}") from None
    for name in node.elementwise:
        for x in _entries(getattr(node, name)):
            if x.shape != shape:
                raise StorageError(
                    f"the manifest describes parts that do not fit together: {node!r} stands for an array of shape "
                    f"{shape}, and its {name} for one of {x.shape}"
                )
    for x in _inner(node):
        _check_fit(x)


def _is_own(node: Compressed) -> bool:
    """Whether all formats of a nest are the library's own. What others materialize may need more than is stored."""
    return getattr(formats, type(node).__name__, None) is type(node) and all(map(_is_own, _inner(node)))


def _inner(node: Compressed) -> list[Compressed]:
    values = [getattr(node, field.name) for field in dataclasses.fields(node)]  # type: ignore[arg-type]
    return [x for value in values for x in _entries(value) if core.is_node(x)]


def _entries(x: Any) -> tuple:
    return x if isinstance(x, tuple) else (x,)
