"""The readable half of a file: what a tree consists of, as JSON, in the order in which its arrays are stored.

A dictionary is an object, a list an array, ``None`` null, and an array a text such as ``"float32[784,300]"``. What
JSON has no word for is an object whose first key starts with ``$``: ``{"$tuple": [...]}``, and for a node
``{"$": "Quantized", "codes": "int8[8,4]", "scale": "float32[1,4]", "bits": 4}``. Static fields that have their
default are left out. No offsets: they follow from the order.

This module has the texts of arrays; :mod:`jcompress.io.encoding` writes manifests, :mod:`jcompress.io.decoding`
reads them.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jcompress import core
from jcompress.core import Compressed, Part
from jcompress.numeric import packing

Formats = Mapping[str, type[Compressed]]
Place = Callable[[str, tuple[int, ...]], jax.sharding.Sharding | None]
"""Of the arrays of one leaf, by the name that they have in a node and their shape, the devices they go to; or None."""

DEPTH = 256
"""Levels of containers and nodes in a tree. The interpreter's own limit on recursion is not far above."""
NEST = 32
"""Levels of nodes in one another."""

_SHAPE = r"(?:[0-9]{1,18}(?:,[0-9]{1,18})*)?"
_ARRAY = re.compile(rf"(?P<dtype>\w+)(?:<(?P<impl>\w+)>)?\[(?P<shape>{_SHAPE})\](?: (?P<code>.+))?", re.ASCII)
_CODE = re.compile(
    r"(?P<scheme>bits|gaps|choice)(?: (?P<first>[0-9]{1,18})(?:x(?P<count>[0-9]{1,18})|:(?P<m>[0-9]{1,18})))?"
    rf"(?: of \[(?P<shape>{_SHAPE})\])?"
)
_MOST_ELEMENTS = 1 << 60


class StorageError(ValueError):
    """A tree that cannot be saved, or a file that cannot be loaded as asked.

    Example:
      >>> import pathlib, tempfile, jcompress as jc
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = pathlib.Path(folder) / "noise.jc"
      ...     size = path.write_bytes(b"no model")
      ...     try:
      ...         tree = jc.load(path)
      ...     except jc.io.StorageError as error:
      ...         print("noise.jc" in str(error))
      True
    """


def too_deep(found: Any = None) -> StorageError:
    """The error for a tree of too many levels."""
    what = "a tree nested too deep for Python" if found is None else f"{found} levels"
    return StorageError(f"found {what}, expected at most {DEPTH}; flatten it, as into a dictionary by path")


def check_nest(prefix: str) -> None:
    """Raise for a node whose name among those around it shows too many levels."""
    if prefix.count("/") > NEST:
        raise StorageError(
            f"found nodes in nodes, {prefix.count('/')} levels, expected at most {NEST}; materialize some"
        )


def join(path: str, name: Any) -> str:
    """The path of an entry of the container at ``path``."""
    return f"{path}/{name}" if path else str(name)


def is_key(x: Any) -> bool:
    """Whether ``x`` is an array of PRNG keys."""
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def is_number(dtype: np.dtype) -> bool:
    """Whether arrays of this dtype have a text here: truth values, and numbers of at most 64 bits a part."""
    return is_name(dtype.name) and dtype == jnp.dtype(dtype.name).newbyteorder(dtype.byteorder)


def is_name(dtype: str) -> bool:
    """Whether this names such a dtype."""
    return dtype in _names()


@functools.cache
def _names() -> frozenset[str]:
    """The numbers that JAX or NumPy has on every machine: long doubles differ between them."""
    plain = ["bool", "float16", "float32", "float64", "complex64", "complex128"]
    plain += [f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)]
    narrow = [f"{kind}{bits}" for kind in ("int", "uint") for bits in (1, 2, 4) if hasattr(jnp, f"{kind}{bits}")]
    narrow += [name for name in dir(jnp) if name.startswith(("bfloat", "float4_", "float6_", "float8_"))]
    return frozenset([*plain, *narrow])


def dtype_name(x: Any) -> str:
    """The name of an array's dtype, without its byte order."""
    return str(x.dtype) if is_key(x) else np.dtype(x.dtype).name


def array_spec(x: Any, part: Part | None = None) -> str:
    """The text that stands for an array, such as ``"bool[784,300] gaps 5x1234"``."""
    name = f"key<{jax.random.key_impl(x)}>" if is_key(x) else dtype_name(x)
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


def placeholder(spec: Any) -> Part:
    """An array of zeros that takes no memory, as ``spec`` describes it.

    Raises:
      StorageError: if it describes none, or one that no memory holds.
    """
    match = _ARRAY.fullmatch(spec) if isinstance(spec, str) else None
    if match is None or (match["impl"] is None and not is_name(match["dtype"])):
        raise StorageError(f"the manifest has {_shown(spec)}, which describes no array")
    shape = _shape(match["shape"])
    if match["impl"]:
        shape += key_shape(match["impl"])
    dtype = jnp.dtype("uint32" if match["impl"] else match["dtype"])
    if math.prod(n or 1 for n in shape) > _MOST_ELEMENTS or len(shape) > 32:
        raise StorageError(f"the manifest has {_shown(spec)}, which is larger than any memory")
    code = None if match["code"] is None else _code(match["code"], shape, dtype)
    return Part(spec, np.broadcast_to(np.zeros((), dtype), shape), core.dtype_bits(dtype), code=code)


def _shown(spec: Any) -> str:
    text = repr(spec)
    return text if len(text) < 80 else f"{text[:60]}..."


@functools.cache
def key_shape(impl: str) -> tuple[int, ...]:
    """The trailing axes of the data of a PRNG key."""
    return jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0, impl=impl))).shape


def key_impl(spec: str) -> str | None:
    """The name of the generator, if ``spec`` describes keys."""
    match = _ARRAY.fullmatch(spec)
    return None if match is None else match["impl"]


def _shape(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(",")) if text else ()


def _code(text: str, whole: tuple[int, ...], dtype: np.dtype) -> packing.MaskCode:
    match = _CODE.fullmatch(text)
    if match is None or dtype != np.bool_:
        raise StorageError(f"the manifest has {_shown(text)}, which describes no code of a mask")
    shape = whole if match["shape"] is None else _shape(match["shape"])
    if len(shape) != len(whole) or any(n not in (1, m) for n, m in zip(shape, whole, strict=True)):
        raise StorageError(f"the manifest has {_shown(text)}, which describes no mask of shape {whole}")
    scheme, first, count, m = (match["scheme"], *(int(match[name] or 0) for name in ("first", "count", "m")))
    if scheme == "bits" and match["first"] is None:
        return packing.MaskCode("bits", shape, math.prod(shape))
    if scheme == "gaps" and match["count"] and 1 <= first <= 16:
        return packing.MaskCode("gaps", shape, first * count, width=first)
    rows = shape[-2] if len(shape) > 1 else 1
    if scheme == "choice" and m in packing.GROUP_SIZES and first <= m and rows % m == 0:
        width = (math.comb(m, first) - 1).bit_length()
        return packing.MaskCode("choice", shape, width * (math.prod(shape) // m), width=width, n=first, m=m)
    raise StorageError(f"the manifest has {_shown(text)}, which describes no code of a mask of shape {whole}")
