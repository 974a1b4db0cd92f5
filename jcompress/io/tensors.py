"""Arrays by name that are read when they are asked for, whatever file they lie in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
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
    ) -> None:
        self.shapes = dict(shapes)
        self.metadata = dict(metadata or {})
        self.kinds = dict(kinds or {name: np.dtype(x.dtype).name for name, x in self.shapes.items()})
        self.sizes = dict(sizes or {name: x.size * np.dtype(x.dtype).itemsize for name, x in self.shapes.items()})
        self._read = read

    def __getitem__(self, name: str) -> np.ndarray:
        return self.rows(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def __repr__(self) -> str:
        return f"Tensors({len(self)} arrays, {sum(self.sizes.values())} bytes)"

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
    with files.reading(path) as file, files.told(path, "reading"):
        file.seek(at)
        data = np.fromfile(file, np.uint8, nbytes)
    if data.size != nbytes:
        raise StorageError(f"{path}: found {data.size} bytes at {at}, expected {nbytes}; the file was cut short")
    return data
