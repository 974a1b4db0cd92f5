"""Arrays by name from any file that is known here, told apart by what they hold."""

from __future__ import annotations

import os
from typing import Any

import jax
import numpy as np

from jcompress import core, rules
from jcompress.io import files, orbax, storage
from jcompress.io.gguf import read_gguf
from jcompress.io.manifest import StorageError
from jcompress.io.safetensors import read_safetensors
from jcompress.io.tensors import Tensors, stamp


def kind_of(path: str | os.PathLike[str]) -> str:
    """``"jcompress"``, ``"gguf"``, ``"safetensors"`` or ``"orbax"``, by what stands at the beginning, or in the folder.

    Raises:
      StorageError: if it is none of these.
    """
    path = os.fspath(path)
    if os.path.isdir(path):
        with files.told(path, "reading"):
            names = os.listdir(path)
        if any(name.endswith(".safetensors") for name in names):
            return "safetensors"
        if orbax.find(path):
            return "orbax"
        raise StorageError(f"{path}: found no safetensors file and no Orbax checkpoint in this folder; name the file")
    with files.reading(path) as file:
        head = file.read(16)
    if head.startswith(b"jcompress "):
        return "jcompress"
    if head.startswith(b"GGUF"):
        return "gguf"
    if head[8:9] == b"{" or path.endswith(".safetensors"):
        return "safetensors"
    raise StorageError(f"{path}: found no file of jcompress, safetensors or GGUF; check the path")


def read_tensors(path: str | os.PathLike[str]) -> Tensors:
    """The arrays of a safetensors file or folder, a GGUF file, an Orbax checkpoint or a file of ``jc.save``, by name.

    Which it is, is told by what it holds. Arrays are read when they are asked for; a file of ``jc.save`` is read whole,
    and its nodes are made dense.

    Args:
      path: a file or a folder.

    Returns:
      :class:`Tensors`, named by their paths.

    Raises:
      StorageError: if it is none of these, or damaged.

    Example:
      >>> import os, tempfile, jax.numpy as jnp, jcompress as jc
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = os.path.join(folder, "model.jc")
      ...     size = jc.save(path, {"block": {"w": jc.quantize.Int(bits=4)(jnp.ones((8, 2)))}})
      ...     tensors = jc.io.read_tensors(path)
      >>> list(tensors), tensors["block/w"].shape
      (['block/w'], (8, 2))
    """
    kind = kind_of(path)
    if kind == "gguf":
        return read_gguf(path)
    if kind == "safetensors":
        return read_safetensors(path)
    return orbax.read_orbax(os.fspath(path)) if kind == "orbax" else _own(path)


def _own(path: Any) -> Tensors:
    """The leaves of a file of the library's own; those that are no arrays are left out."""
    found = {name: x for name, x in rules.paths(core.untie(storage.load(path))) if hasattr(x, "shape")}
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in found.items()}

    def read(name: str, start: int, stop: int) -> np.ndarray:
        x = np.asarray(core.dense(found[name]))
        return x[start:stop] if x.ndim else x

    sizes = {name: -(-core.leaf_nbits(x) // 8) for name, x in found.items()}
    kinds = {name: type(x).__name__ if core.is_node(x) else np.dtype(x.dtype).name for name, x in found.items()}
    return Tensors(shapes, read, {}, kinds, sizes, stamp([os.fspath(path)]))
