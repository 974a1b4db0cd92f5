"""Arrays by name that are read when they are asked for, whatever file they lie in."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from jcompress.io import files
from jcompress.io.manifest import StorageError

Read = Callable[[str, int, int], np.ndarray]


class Tensors(Mapping[str, np.ndarray]):
    """The arrays of a file by name; each is read when it is asked for, and nothing of it is kept.

    What :func:`read_safetensors` and :func:`read_gguf` give, and :func:`write_safetensors` takes. ``dict(tensors)``
    reads all of them; ``tensors.shapes`` is what a plan for them is made from.

    Args:
      shapes: ``{name: jax.ShapeDtypeStruct}``, of the arrays that reading gives.
      read: of a name, and the first row and the one behind the last; gives those rows of the first axis.
      metadata: what else the file says.
      kinds: ``{name: what the file calls its numbers}``, such as ``"BF16"`` or ``"Q4_0"``; by default the dtypes.
      sizes: ``{name: bytes in the file}``; by default those of the arrays.

      stamp: what tells the files from others, and from what they are after a change.

    Example:
      >>> import jax, numpy as np, jcompress as jc
      >>> rows = np.arange(6.0, dtype=np.float32).reshape(3, 2)
      >>> shapes = {"w": jax.ShapeDtypeStruct(rows.shape, rows.dtype)}
      >>> tensors = jc.io.Tensors(shapes, lambda name, start, stop: rows[start:stop])
      >>> tensors["w"].shape, tensors.rows("w", 1, 2).tolist()
      ((3, 2), [[2.0, 3.0]])
    """

    def __init__(
        self,
        shapes: Mapping[str, jax.ShapeDtypeStruct],
        read: Read,
        metadata: Mapping[str, Any] | None = None,
        kinds: Mapping[str, str] | None = None,
        sizes: Mapping[str, int] | None = None,
        stamp: str = "",
    ) -> None:
        self.shapes = dict(shapes)
        self.metadata = dict(metadata or {})
        self.kinds = dict(kinds or {name: np.dtype(x.dtype).name for name, x in self.shapes.items()})
        self.sizes = dict(sizes or {name: x.size * np.dtype(x.dtype).itemsize for name, x in self.shapes.items()})
        self.stamp = stamp
        self._read = read

    def __getitem__(self, name: str) -> np.ndarray:
        return self.rows(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def __repr__(self) -> str:
        return f"Tensors({len(self)} arrays, {sum(self.sizes.values())} bytes)"

    @property
    def tree(self) -> dict[str, Any]:
        """The shapes as dictionaries in dictionaries, for names such as ``block/0/kernel``: what a plan is made of."""
        return nested(self.shapes)

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Some rows of the first axis, without reading the others; a scalar has one.

        Args:
          name: of the array.
          start: the first row.
          stop: the one behind the last; all by default.
        """
        shape = self.shapes[name].shape  # a KeyError for what is not there
        count = shape[0] if shape else 1
        start, stop, _ = slice(start, stop).indices(count)
        return self._read(name, start, max(start, stop))


def from_file(path: Any, at: int, nbytes: int) -> np.ndarray:
    """Bytes of a file, read anew: it may have shrunk since its header was, under a memory map to the process's end."""
    space = np.empty(nbytes + _ALIGNED, np.uint8)
    data = space[-space.ctypes.data % _ALIGNED :][:nbytes]
    with files.reading(path) as file, files.told(path, "reading"):
        file.seek(at)
        found = file.readinto(data.data)
    if found != nbytes:
        raise StorageError(f"{path}: found {found} bytes at {at}, expected {nbytes}; the file was cut short")
    return data


_ALIGNED = 64
"""Where memory must begin that JAX takes as it is on a CPU."""


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Dictionaries in dictionaries for names such as ``block/0/kernel``; as it is, where one name is a part of another.

    ``jc.paths`` gives the same paths of both.
    """
    tree: dict[str, Any] = {}
    for name, x in flat.items():
        *above, last = name.split("/")
        at = tree
        for key in above:
            at = at.setdefault(key, {})
            if not isinstance(at, dict):
                return dict(flat)
        if last in at:
            return dict(flat)
        at[last] = x
    return tree


def parsed(path: str, data: bytes, what: str) -> dict[str, Any]:
    """A JSON object that names nothing twice.

    Raises:
      StorageError: for anything else.
    """
    try:
        found = json.loads(data.decode(), object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        raise StorageError(f"{path}: {what} is no UTF-8 ({error.reason} at byte {error.start})") from None
    except ValueError as error:
        raise StorageError(f"{path}: {what} is no JSON: {error}") from None
    except RecursionError:
        raise StorageError(f"{path}: {what} is nested too deep; do not trust the file") from None
    if not isinstance(found, dict):
        raise StorageError(f"{path}: {what} is a {type(found).__name__}, expected an object of names")
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"found {next(name for name in found if names.count(name) > 1)!r} twice")
    return found


def stamp(paths: Iterable[str]) -> str:
    """Names, sizes and times of files."""
    found = [(path, os.stat(path)) for path in sorted(paths)]
    return "; ".join(f"{path} {x.st_size} {x.st_mtime_ns}" for path, x in found)
