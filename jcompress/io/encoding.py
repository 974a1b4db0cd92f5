"""From a tree to its manifest, and the arrays to store in order."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jcompress import core, formats, rules
from jcompress.core import Compressed, Part
from jcompress.io.manifest import DEPTH, StorageError, array_spec, check_nest, is_key, is_number, join, too_deep
from jcompress.io.streams import Store

_MOST_DIGITS = 4000  # of an integer; Python reads no text of more than 4300


def encode(x: Any, path: str, store: Store, depth: int = 0) -> Any:
    """The JSON value that describes ``x``; the arrays that go with it are added to ``store``.

    Raises:
      StorageError: for a leaf that is no array, node or Python scalar, or a tree of too many levels.
    """
    if depth > DEPTH:
        raise too_deep(depth + _levels(x))
    if core.is_node(x):
        return _encode_node(x.opened(), path, store)
    if isinstance(x, dict):
        return _encode_dict(x, path, store, depth)
    if isinstance(x, (list, tuple)):
        return _encode_sequence(x, path, store, depth)
    if not isinstance(x, np.generic) and (x is None or isinstance(x, (bool, int, float, complex, str))):
        return _encode_scalar(x, path)
    if not jax.tree_util.treedef_is_leaf(jax.tree.structure(x)):
        return _encode_custom(x, path, store, depth)
    return array_spec(x, store.add(array_part(x, path)))


def _levels(x: Any) -> int:
    """The levels of containers in ``x``, however many: counted without recursion, up to where the error is sure."""
    level, at = 0, [x]
    while (at := [z for y in at for z in _children(y)]) and level < 100 * DEPTH:
        level += 1
    return level


def _children(x: Any) -> list[Any]:
    if isinstance(x, (jax.Array, np.ndarray, np.generic, bool, int, float, complex, str)) or core.is_node(x):
        return []
    if isinstance(x, (dict, list, tuple)):
        return list(x.values() if isinstance(x, dict) else x)
    inner = jax.tree.leaves(x, is_leaf=lambda y: y is not x)
    return [] if len(inner) == 1 and inner[0] is x else inner


def array_part(x: Any, path: str) -> Part:
    """A plain array as it is stored: keys as their data, the rest bit for bit."""
    if not isinstance(x, (jax.Array, np.ndarray, np.generic)) or not core.is_concrete(x):
        raise StorageError(
            f"{path}: found {type(x).__name__}, expected an array with values, a node or a Python scalar; "
            "leave it out, or put what describes the model into metadata="
        )
    check_array(x, path)
    if is_key(x):
        x = jax.random.key_data(x)  # type: ignore[arg-type]  # keys are JAX arrays
    return Part(path, x, core.dtype_bits(x.dtype))


def check_array(x: Any, path: str) -> None:
    """Raise for an array that no file holds."""
    if isinstance(x, np.ma.MaskedArray):
        raise StorageError(f"{path}: found a masked array of NumPy, expected values; give it values with .filled(...)")
    if not is_key(x) and not is_number(x.dtype):
        raise StorageError(
            f"{path}: found dtype {x.dtype}, expected numbers of at most 64 bits; convert it; texts go into metadata="
        )


def _encode_scalar(x: Any, path: str) -> Any:
    if type(x) not in (type(None), bool, int, float, complex, str):
        raise StorageError(f"{path}: found {type(x).__name__}, expected a plain Python scalar; convert it first")
    if isinstance(x, str):
        return {"$text": x}
    if isinstance(x, complex):
        return {"$complex": [_encode_scalar(x.real, path), _encode_scalar(x.imag, path)]}
    if isinstance(x, int) and x.bit_length() > _MOST_DIGITS * math.log2(10):
        raise StorageError(f"{path}: found an integer of {x.bit_length()} bits, expected at most {_MOST_DIGITS} digits")
    return {"$float": repr(x)} if isinstance(x, float) and not math.isfinite(x) else x


def _encode_dict(x: dict, path: str, store: Store, depth: int) -> dict[str, Any]:
    items = []
    for key, y in x.items():
        if type(key) not in (str, int):
            raise StorageError(f"{path}: found the key {key!r}, expected text or an integer; rename it")
        items.append((key, encode(y, join(path, key), store, depth + 1)))
    if all(isinstance(key, str) and not key.startswith("$") for key in x):
        return dict(items)
    return {"$dict": [list(item) for item in items]}


def _encode_sequence(x: Any, path: str, store: Store, depth: int) -> Any:
    names = getattr(x, "_fields", range(len(x)))
    items = []
    for name, y in zip(names, x, strict=True):
        items.append(encode(y, join(path, name), store, depth + 1))
    if hasattr(x, "_fields"):
        return {"$namedtuple": [type(x).__name__, dict(zip(names, items, strict=True))]}
    return items if isinstance(x, list) else {"$tuple": items}


def _encode_custom(x: Any, path: str, store: Store, depth: int) -> Any:
    """Any other pytree as a dictionary of its children, integer keys as integers; a box as what lies in it."""
    children = [(_key(key), y) for key, y in rules.children(x) if y is not None]
    if rules.is_box(x) and len(children) == 1:
        return encode(children[0][1], path, store, depth)
    names = [str(key) for key, _ in children]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise StorageError(f"{join(path, twice)}: two leaves of this {type(x).__name__} have one path; rename one")
    return _encode_dict(dict(children), path, store, depth)


def _key(key: Any) -> str | int:
    """What stands for the key of a child: integers are kept, as an NNX state has them for lists."""
    value = getattr(key, "key", getattr(key, "idx", None))
    return value if type(value) is int else jax.tree_util.keystr((key,), simple=True)


def unique_paths(tree: Any, path: str = "") -> list[tuple[str, Any]]:
    """:func:`jcompress.paths`, its errors with the path of the tree in a larger one."""
    # Before JAX meets the tree: where it gives up, it leaves the interpreter's count of recursions as it was there.
    if (found := _levels(tree)) > DEPTH:
        raise too_deep(found)
    try:
        return rules.paths(tree)
    except (RecursionError, SystemError):  # JAX wraps the first into the second
        raise too_deep() from None
    except ValueError as error:
        raise StorageError(join(path, error)) from None


def in_order(node: Compressed, *, coded: bool = True) -> list[Part]:
    """The parts of a node as they are stored: first those stored whole, then what their masks leave of the rest."""
    return sorted(core.parts(node, coded=coded), key=lambda part: part.where is not None)


def _encode_node(node: Compressed, path: str, store: Store) -> dict[str, Any]:
    for name, x in inner_leaves(node):
        if not isinstance(x, (jax.Array, np.ndarray, np.generic)) or not core.is_concrete(x):
            raise StorageError(f"{join(path, name)}: found {type(x).__name__}, expected an array with values")
        check_array(x, join(path, name))
    named = {part.name: dataclasses.replace(part, name=join(path, part.name)) for part in in_order(node)}
    return node_spec(node, path, {name: store.add(part) for name, part in named.items()})


def inner_leaves(node: Any) -> list[tuple[str, Any]]:
    """The arrays of a node by name, such as ``values/codes``."""
    flat = jax.tree_util.tree_flatten_with_path(node)[0]
    return [(jax.tree_util.keystr(keys, simple=True, separator="/"), x) for keys, x in flat]


def node_spec(node: Compressed, path: str, parts: Mapping[str, Part], prefix: str = "") -> dict[str, Any]:
    """The JSON value that describes a node: its format, its arrays, and the static fields that are not the default."""
    check_nest(prefix)
    cls = type(node)
    if getattr(formats, cls.__name__, cls) is not cls:
        raise StorageError(f"{path}: this {cls.__name__} is not jcompress.formats.{cls.__name__}; rename the class")
    spec: dict[str, Any] = {"$": cls.__name__}
    for field in dataclasses.fields(node):  # type: ignore[arg-type]  # every format is a dataclass
        x = getattr(node, field.name)
        if field.metadata.get("static"):
            if field.metadata.get("saved", True) and not is_default(x, field):
                spec[field.name] = encode_static(x, join(path, field.name))
        elif not (x is None and field.default is None):
            spec[field.name] = _encode_field(x, path, parts, prefix + field.name)
    return spec


def _encode_field(x: Any, path: str, parts: Mapping[str, Part], name: str) -> Any:
    if core.is_node(x):
        return node_spec(x, path, parts, name + "/")
    if isinstance(x, tuple):
        return [_encode_field(y, path, parts, f"{name}/{i}") for i, y in enumerate(x)]
    return None if x is None else array_spec(x, parts.get(name))


def is_default(x: Any, field: dataclasses.Field) -> bool:
    """Whether a static field has its default."""
    return type(x) is type(field.default) and repr(x) == repr(field.default)


def encode_static(x: Any, path: str) -> Any:
    """The JSON value of a static field."""
    if isinstance(x, tuple):
        return [encode_static(y, path) for y in x]
    if isinstance(x, core.Layout):
        fields = [(f.name, getattr(x, f.name)) for f in dataclasses.fields(x)]
        return {"$layout": {name: list(y) if isinstance(y, tuple) else y for name, y in fields if y not in ((), 1)}}
    if x is None or isinstance(x, (bool, int, float, str)):
        return x if isinstance(x, str) else _encode_scalar(x, path)
    try:
        return {"$dtype": jnp.dtype(x).name}
    except TypeError:
        raise StorageError(
            f"{path}: found the static value {x!r}, expected numbers, texts, dtypes and tuples of them; "
            "keep code out of nodes"
        ) from None
