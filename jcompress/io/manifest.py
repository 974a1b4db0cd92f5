"""The readable half of a file: what a tree consists of, as JSON, in the order in which its arrays are stored.

A dictionary is an object, a list an array, ``None`` null, and an array a text such as ``"float32[784,300]"``. What
JSON has no word for is an object whose first key starts with ``$``: ``{"$tuple": [...]}``, and for a node
``{"$": "Quantized", "codes": "int8[8,4]", "scale": "float32[1,4]", "bits": 4}``. Static fields that have their
default are left out. No offsets: they follow from the order.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jcompress import core, formats, rules
from jcompress.core import Compressed, Part
from jcompress.numeric import packing

Formats = Mapping[str, type[Compressed]]
Reader = Callable[[Part], np.ndarray]

_ARRAY = re.compile(r"(?P<dtype>\w+)(?:<(?P<impl>\w+)>)?\[(?P<shape>[\d,]*)\](?: (?P<code>.+))?")
_CODE = re.compile(
    r"(?P<scheme>bits|gaps|choice)(?: (?P<first>\d+)(?:x(?P<count>\d+)|:(?P<m>\d+)))?(?: of \[(?P<shape>[\d,]*)\])?"
)


class StorageError(ValueError):
    """A tree that cannot be saved, or a file that cannot be loaded as asked."""


def encode(x: Any, path: str, stored: list[Part]) -> Any:
    """The JSON value that describes ``x``; the arrays that go with it are appended to ``stored``.

    Raises:
      StorageError: for a leaf that is no array, node or Python scalar.
    """
    if core.is_node(x):
        return _encode_node(x, path, stored)
    if isinstance(x, dict):
        return _encode_dict(x, path, stored)
    if isinstance(x, (list, tuple)):
        names = getattr(x, "_fields", range(len(x)))
        items = [encode(y, join(path, name), stored) for name, y in zip(names, x, strict=True)]
        if hasattr(x, "_fields"):
            return {"$namedtuple": [type(x).__name__, dict(zip(names, items, strict=True))]}
        return items if isinstance(x, list) else {"$tuple": items}
    if x is None or isinstance(x, (bool, int, float, complex, str)):
        return _encode_scalar(x, path)
    if not jax.tree_util.treedef_is_leaf(jax.tree.structure(x)):
        return _encode_custom(x, path, stored)
    part = array_part(x, path)
    stored.append(part)
    return array_spec(x, part)


def join(path: str, name: Any) -> str:
    """The path of an entry of the container at ``path``."""
    return f"{path}/{name}" if path else str(name)


def array_part(x: Any, path: str) -> Part:
    """A plain array as it is stored: keys as their data, the rest bit for bit."""
    if not isinstance(x, (jax.Array, np.ndarray, np.generic)) or not core.is_concrete(x):
        raise StorageError(
            f"{path}: found {type(x).__name__}, expected an array with values, a node or a Python scalar; "
            "leave it out, or put what describes the model into metadata="
        )
    if is_key(x):
        x = jax.random.key_data(x)  # type: ignore[arg-type]  # keys are JAX arrays
    elif x.dtype.kind not in "biufcV" or x.dtype.names:
        raise StorageError(f"{path}: found dtype {x.dtype}, expected numbers; put texts into metadata=")
    return Part(path, x, core.dtype_bits(x.dtype))


def is_key(x: Any) -> bool:
    """Whether ``x`` is an array of PRNG keys."""
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def array_spec(x: Any, part: Part | None = None) -> str:
    """The text that stands for an array, such as ``"bool[784,300] gaps 5x1234"``."""
    name = f"key<{jax.random.key_impl(x)}>" if is_key(x) else np.dtype(x.dtype).name
    text = f"{name}[{','.join(map(str, x.shape))}]"
    code = None if part is None else part.code
    if code is None or (code.scheme, code.shape) == ("bits", tuple(x.shape)):
        return text
    detail = {
        "bits": "",
        "gaps": f" {code.width}x{code.nbits // code.width if code.width else 0}",
        "choice": f" {code.n}:{code.m}",
    }[code.scheme]
    smaller = f" of [{','.join(map(str, code.shape))}]" if code.shape != tuple(x.shape) else ""
    return f"{text} {code.scheme}{detail}{smaller}"


def _encode_scalar(x: Any, path: str) -> Any:
    if type(x) not in (type(None), bool, int, float, complex, str):
        raise StorageError(f"{path}: found {type(x).__name__}, expected a plain Python scalar; convert it first")
    if isinstance(x, str):
        return {"$text": x}
    if isinstance(x, complex):
        return {"$complex": [_encode_scalar(x.real, path), _encode_scalar(x.imag, path)]}
    return {"$float": repr(x)} if isinstance(x, float) and not math.isfinite(x) else x


def _encode_dict(x: dict, path: str, stored: list[Part]) -> dict[str, Any]:
    for key in x:
        if type(key) not in (str, int):
            raise StorageError(f"{path}: found the key {key!r}, expected text or an integer; rename it")
    items = [(key, encode(y, join(path, key), stored)) for key, y in x.items()]
    if all(isinstance(key, str) and not key.startswith("$") for key in x):
        return dict(items)
    return {"$dict": [list(item) for item in items]}


def _encode_custom(x: Any, path: str, stored: list[Part]) -> Any:
    """Any other pytree, by the paths of its leaves, as nested dictionaries."""
    nested: dict[str, Any] = {}
    for inner, leaf in rules.paths(x):
        if not inner:
            return encode(leaf, path, stored)
        *outer, last = inner.split("/")
        at = nested
        for name in outer:
            at = at.setdefault(name, {})
        if not isinstance(at, dict) or last in at:
            raise StorageError(f"{join(path, inner)}: two leaves of this {type(x).__name__} have one path; rename one")
        at[last] = leaf
    return encode(nested, path, stored)


def in_order(node: Compressed) -> list[Part]:
    """The parts of a node as they are stored: first those stored whole, then what their masks leave of the rest."""
    return sorted(core.parts(node), key=lambda part: part.where is not None)


def _encode_node(node: Compressed, path: str, stored: list[Part]) -> dict[str, Any]:
    parts = in_order(node)
    stored += [dataclasses.replace(part, name=join(path, part.name)) for part in parts]
    return node_spec(node, path, {part.name: part for part in parts})


def node_spec(node: Compressed, path: str, parts: Mapping[str, Part], prefix: str = "") -> dict[str, Any]:
    """The JSON value that describes a node: its format, its arrays, and the static fields that are not the default."""
    cls = type(node)
    if getattr(formats, cls.__name__, cls) is not cls:
        raise StorageError(f"{path}: this {cls.__name__} is not jcompress.formats.{cls.__name__}; rename the class")
    spec: dict[str, Any] = {"$": cls.__name__}
    for field in dataclasses.fields(node):  # type: ignore[arg-type]  # every format is a dataclass
        x = getattr(node, field.name)
        if field.metadata.get("static"):
            if not _is_default(x, field):
                spec[field.name] = _encode_static(x, join(path, field.name))
        elif not (x is None and field.default is None):
            spec[field.name] = _encode_field(x, path, parts, prefix + field.name)
    return spec


def _encode_field(x: Any, path: str, parts: Mapping[str, Part], name: str) -> Any:
    if core.is_node(x):
        return node_spec(x, path, parts, name + "/")
    if isinstance(x, tuple):
        return [_encode_field(y, path, parts, f"{name}/{i}") for i, y in enumerate(x)]
    return None if x is None else array_spec(x, parts.get(name))


def _is_default(x: Any, field: dataclasses.Field) -> bool:
    return type(x) is type(field.default) and repr(x) == repr(field.default)


def _encode_static(x: Any, path: str) -> Any:
    if isinstance(x, tuple):
        return [_encode_static(y, path) for y in x]
    if x is None or isinstance(x, (bool, int, float, str)):
        return x if isinstance(x, str) else _encode_scalar(x, path)
    try:
        return {"$dtype": jnp.dtype(x).name}
    except TypeError:
        raise StorageError(
            f"{path}: found the static value {x!r}, expected numbers, texts, dtypes and tuples of them; "
            "keep code out of nodes"
        ) from None


def decode(spec: Any, read: Reader, known: Formats) -> Any:
    """The tree that ``spec`` describes; ``read`` gives the stored values of each part in turn.

    Raises:
      ValueError: if ``spec`` describes nothing.
    """
    if isinstance(spec, str):
        return _to_jax(_read(placeholder(spec), read), spec)
    if isinstance(spec, list):
        return [decode(x, read, known) for x in spec]
    if not isinstance(spec, dict) or not any(key.startswith("$") for key in spec):
        return {k: decode(x, read, known) for k, x in spec.items()} if isinstance(spec, dict) else spec
    if "$" in spec:
        return _decode_node(spec, read, known)
    ((kind, value),) = spec.items()
    if kind == "$tuple":
        return tuple(decode(x, read, known) for x in value)
    if kind == "$dict":
        return {key: decode(x, read, known) for key, x in value}
    if kind == "$namedtuple":
        name, fields = value
        return _namedtuple(name, tuple(fields))(*(decode(x, read, known) for x in fields.values()))
    return _decode_scalar(kind, value)


def _decode_scalar(kind: str, value: Any) -> Any:
    if kind == "$text":
        return str(value)
    if kind == "$float":
        return float(value)
    if kind == "$complex":
        return complex(*(x if isinstance(x, (int, float)) else _decode_scalar(*x.popitem()) for x in value))
    raise StorageError(f"the manifest has {kind!r}, which this version does not know; install a newer jcompress")


@functools.cache
def _namedtuple(name: str, fields: tuple[str, ...]) -> Any:
    """One class for each name and fields, so that trees loaded twice have one structure."""
    return collections.namedtuple(name, fields)


def placeholder(spec: str) -> Part:
    """An array of zeros that takes no memory, as ``spec`` describes it."""
    match = _ARRAY.fullmatch(spec)
    if match is None:
        raise StorageError(f"the manifest has {spec!r}, which describes no array")
    shape = _shape(match["shape"])
    if match["impl"]:
        shape += key_shape(match["impl"])
    dtype = jnp.dtype("uint32" if match["impl"] else match["dtype"])
    code = None if match["code"] is None else _code(match["code"], shape)
    return Part(spec, np.broadcast_to(np.zeros((), dtype), shape), core.dtype_bits(dtype), code=code)


def key_shape(impl: str) -> tuple[int, ...]:
    """The trailing axes of the data of a PRNG key."""
    return jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0, impl=impl))).shape


def _shape(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(",")) if text else ()


def _code(text: str, shape: tuple[int, ...]) -> packing.MaskCode:
    match = _CODE.fullmatch(text)
    if match is None:
        raise StorageError(f"the manifest has {text!r}, which describes no code of a mask")
    shape = shape if match["shape"] is None else _shape(match["shape"])
    first = int(match["first"] or 0)
    if match["scheme"] == "bits":
        return packing.MaskCode("bits", shape, math.prod(shape))
    if match["scheme"] == "gaps":
        return packing.MaskCode("gaps", shape, first * int(match["count"]), width=first)
    m = int(match["m"])
    width = (math.comb(m, first) - 1).bit_length()
    return packing.MaskCode("choice", shape, width * (math.prod(shape) // m), width=width, n=first, m=m)


def _read(part: Part, read: Reader) -> np.ndarray:
    values = read(part)
    if part.code is not None:
        return packing.decode_mask(values, part.code, part.array.shape)
    if part.where is None:
        return values.reshape(part.array.shape)
    out = np.zeros(part.array.shape, part.array.dtype)
    out[part.where] = values
    return out


def _to_jax(x: np.ndarray, spec: str) -> Any:
    """A JAX array, or a NumPy one where JAX would change the dtype (64 bits, when those are off)."""
    match = _ARRAY.fullmatch(spec)
    if match is not None and match["impl"]:
        return jax.random.wrap_key_data(jnp.asarray(x), impl=match["impl"])
    return jnp.asarray(x) if jax.dtypes.canonicalize_dtype(x.dtype) == x.dtype else x


def _decode_node(spec: dict[str, Any], read: Reader, known: Formats) -> Compressed:
    """Masks come first, since they say how much of the rest was stored."""
    found: dict[str, Part] = {}
    values: dict[str, np.ndarray] = {}

    def empty(name: str, text: str) -> np.ndarray:
        found[name] = placeholder(text)
        return found[name].array

    node = _build(spec, empty, known)
    values |= {name: part.array for name, part in found.items()}
    for hidden in (False, True):
        for part in core.parts(node):
            if (part.where is not None) == hidden:
                width = found[part.name].width if part.code else part.width
                values[part.name] = _read(dataclasses.replace(part, width=width, code=found[part.name].code), read)
        node = _build(spec, lambda name, _: values[name], known)
    return _build(spec, lambda name, text: _to_jax(values[name], text), known)


def _build(spec: dict[str, Any], leaf: Callable[[str, str], Any], known: Formats, prefix: str = "") -> Compressed:
    """The node that ``spec`` describes, its arrays given by name."""
    cls = _format(spec["$"], known)
    statics = {f.name for f in dataclasses.fields(cls) if f.metadata.get("static")}  # type: ignore[arg-type]
    fields = {
        name: _decode_static(x) if name in statics else _build_field(x, leaf, known, prefix + name)
        for name, x in spec.items()
        if name != "$"
    }
    return cls(**fields)


def _format(name: str, known: Formats) -> type[Compressed]:
    cls = known.get(name, getattr(formats, name, None))
    if not (isinstance(cls, type) and issubclass(cls, Compressed) and dataclasses.is_dataclass(cls)):
        raise StorageError(f"the format {name!r} is unknown; pass formats={{{name!r}: its class}}")
    return cls


def _build_field(x: Any, leaf: Callable[[str, str], Any], known: Formats, name: str) -> Any:
    if isinstance(x, dict):
        return _build(x, leaf, known, name + "/")
    if isinstance(x, list):
        return tuple(_build_field(y, leaf, known, f"{name}/{i}") for i, y in enumerate(x))
    return None if x is None else leaf(name, x)


def _decode_static(x: Any) -> Any:
    if isinstance(x, list):
        return tuple(map(_decode_static, x))
    if isinstance(x, dict):
        ((kind, value),) = x.items()
        return np.dtype(jnp.dtype(value)) if kind == "$dtype" else _decode_scalar(kind, value)
    return x
