"""Checkpoints of Orbax as arrays by name, each read when it is asked for."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from jcompress.io import files
from jcompress.io.manifest import StorageError
from jcompress.io.tensors import Tensors, stamp

METADATA = "_METADATA"


def find(path: str) -> list[str]:
    """The folders of trees that a checkpoint holds: itself, or the items of its latest step."""
    if os.path.isfile(os.path.join(path, METADATA)):
        return [path]
    with files.told(path, "reading"):
        names = [name for name in sorted(os.listdir(path)) if os.path.isdir(os.path.join(path, name))]
    if steps := [name for name in names if name.isdecimal()]:
        return find(os.path.join(path, max(steps, key=int)))
    return [folder for name in names if os.path.isfile(os.path.join(folder := os.path.join(path, name), METADATA))]


def read_orbax(path: str) -> Tensors:
    """The arrays of a checkpoint; of a folder of steps those of the latest.

    Raises:
      StorageError: if it holds several trees, or none that can be read.
    """
    found = find(path)
    if len(found) != 1:
        told = [os.path.relpath(x, path) for x in found]
        raise StorageError(f"{path}: found the trees {told}, expected one; add its name to the path")
    folder = os.path.abspath(found[0])
    tree = _described(path, folder)
    leaves = dict(_leaves(tree))
    names = {keys: "/".join(map(str, keys)) for keys in leaves}
    if len(set(names.values())) < len(names):
        raise StorageError(f"{path}: found two arrays of one path; rename one")
    places = {name: keys for keys, name in names.items()}
    shapes = {name: jax.ShapeDtypeStruct(leaves[keys].shape, leaves[keys].dtype) for keys, name in names.items()}

    def read(name: str, start: int, stop: int) -> np.ndarray:
        x = _restored(path, folder, tree, places[name])
        return x[start:stop] if x.ndim else x

    return Tensors(shapes, read, stamp=stamp([os.path.join(folder, METADATA)]))


def _described(path: str, folder: str) -> Any:
    import orbax.checkpoint as ocp

    with _quiet(path), ocp.PyTreeCheckpointer() as reader:
        about: Any = reader.metadata(folder).item_metadata
        if about is None:
            raise ValueError("it has no description of its arrays")
        return getattr(about, "tree", about)


@contextlib.contextmanager
def _quiet(path: str) -> Iterator[None]:
    """What goes wrong below is told in one sentence; Orbax warns of files that some checkpoints do not have."""
    logger, before = logging.getLogger("absl"), logging.getLogger("absl").level
    logger.setLevel(logging.ERROR)
    try:
        yield
    except Exception as error:  # of Orbax, of the store beneath it, or of the system
        told = f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
        raise StorageError(f"{path}: Orbax cannot read this checkpoint ({told}); restore it from a copy") from None
    finally:
        logger.setLevel(before)


def _leaves(tree: Any, keys: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Arrays and scalars, with the keys that lead to them."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, (list, tuple)) else None
    if items is not None:
        for key, x in items:
            yield from _leaves(x, (*keys, key))
    elif isinstance(getattr(tree, "shape", None), tuple) and tree.dtype is not None:
        yield keys, tree


def _restored(path: str, folder: str, tree: Any, keys: tuple[Any, ...]) -> np.ndarray:
    """One array; what the others are is said by placeholders."""
    import orbax.checkpoint as ocp

    item = _mapped(tree, keys, ocp.PLACEHOLDER)
    args = _mapped(tree, keys, ocp.PLACEHOLDER, ocp.RestoreArgs(restore_type=np.ndarray))
    with _quiet(path), ocp.PyTreeCheckpointer() as reader:
        found = reader.restore(folder, args=ocp.args.PyTreeRestore(item=item, restore_args=args))
    for key in keys:
        found = found[key]
    return np.asarray(found)


def _mapped(tree: Any, keys: tuple[Any, ...] | None, other: Any, this: Any = 0) -> Any:
    """The tree with ``this`` where the keys lead, and ``other`` in all other places."""
    if isinstance(tree, dict):
        return {key: _mapped(x, _below(keys, key), other, this) for key, x in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(_mapped(x, _below(keys, i), other, this) for i, x in enumerate(tree))
    return this if keys == () else other


def _below(keys: tuple[Any, ...] | None, key: Any) -> tuple[Any, ...] | None:
    return keys[1:] if keys and keys[0] == key else None
