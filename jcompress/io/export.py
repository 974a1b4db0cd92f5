"""Nodes in ``jax.export``: how the static half of a format is written into an exported function, and read back."""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import Any

from jax import export

from jcompress import formats
from jcompress.core import Compressed
from jcompress.io.decoding import decode_static
from jcompress.io.encoding import encode_static, is_default


def register_export(*classes: type[Compressed]) -> None:
    """Let ``jax.export`` serialize functions whose arguments or results hold nodes of your own formats.

    The library's formats are known to it from the start: a process that imports jcompress can serialize a function of
    nodes and deserialize it. A format of your own is named once in either process, before it does.

    Args:
      *classes: formats, registered with ``jax.tree_util.register_dataclass``. Naming one again does nothing.

    Raises:
      ValueError: for a class that is no format, or one of the name of another.

    Example:
      >>> import dataclasses, jax, jcompress as jc
      >>> @jax.tree_util.register_dataclass
      ... @dataclasses.dataclass(frozen=True, repr=False)
      ... class Doubled(jc.Compressed):
      ...     half: jax.Array
      ...
      ...     def materialize(self, *, key=None):
      ...         return 2 * self.half
      >>> jc.io.register_export(Doubled)
    """
    for cls in classes:
        if not (isinstance(cls, type) and issubclass(cls, Compressed) and dataclasses.is_dataclass(cls)):
            raise ValueError(f"register_export: found {cls!r}, expected a format: a dataclass under jc.Compressed")
        name = f"{cls.__module__}.{cls.__qualname__}"
        try:
            export.register_pytree_node_serialization(
                cls,
                serialized_name=name,
                serialize_auxdata=functools.partial(to_bytes, cls),
                deserialize_auxdata=functools.partial(from_bytes, cls),
            )
        except ValueError as error:
            if f"for type `{cls}`" not in str(error):
                raise ValueError(f"register_export: {error}") from None


def to_bytes(cls: Any, values: tuple[Any, ...]) -> bytes:
    """The static fields of a node, in their order, as JSON; those that have their default are left out."""
    pairs = zip(_statics(cls), values, strict=True)
    told = [(f, x) for f, x in pairs if f.metadata.get("saved", True) and not is_default(x, f)]
    return json.dumps({f.name: encode_static(x, f"{cls.__name__}/{f.name}") for f, x in told}).encode()


def from_bytes(cls: Any, data: bytes) -> tuple[Any, ...]:
    """What :func:`to_bytes` wrote. Fields that a later version adds have their default."""
    found = json.loads(data)
    return tuple(decode_static(found[f.name]) if f.name in found else f.default for f in _statics(cls))


def _statics(cls: Any) -> list[dataclasses.Field]:
    return [f for f in dataclasses.fields(cls) if f.metadata.get("static")]


# Beside their registration as pytrees, which their modules do at import: a process that only deserializes makes no node
# before, at which it could be done.
register_export(*(getattr(formats, name) for name in formats.__all__))
