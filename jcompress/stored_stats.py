"""Statistics of calibration in a folder, a file for each leaf: one leaf's are in memory at a time."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from typing import Any

from jcompress import io
from jcompress.core import Layout
from jcompress.io import files, tensors
from jcompress.trace import Outputs, Stats

_INDEX = "index.jc"
_OTHERS = ("unread", "notes", "levels")


def save_stats(folder: str | os.PathLike[str], stats: Mapping[str, Stats]) -> None:
    """Write the statistics of calibration to a folder, a file for each leaf.

    Calibration needs a model that runs, compression from file to file one array at a time: between the two, on another
    machine or another day, the statistics are stored. Each file is written whole or not at all; the index, which makes
    them statistics, comes last.

    Args:
      folder: where; made if it does not exist. What an earlier call stored there is replaced.
      stats: ``{path: statistics}``, from :func:`jcompress.calibrate` or :func:`load_stats`.

    Raises:
      StorageError: where no file can be written, as an ``OSError`` too.

    Example:
      >>> import os, tempfile, jax.numpy as jnp, jcompress as jc
      >>> params = {"w": jnp.ones((2, 3))}
      >>> stats = jc.calibrate(lambda p, x: x @ p["w"], params, [jnp.array([[1.0, 2.0]])])
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     jc.save_stats(folder, stats)
      ...     again = jc.load_stats(folder)
      ...     plan = jc.plan(params, [("w", jc.quantize.GPTQ(bits=4))])
      ...     small = jc.compress(params, plan, stats=again)
      ...     print(list(again), again["w"].gram.tolist())
      ['w'] [[1.0, 2.0], [2.0, 4.0]]
    """
    folder = os.fspath(folder)
    with files.told(folder, "writing"):
        os.makedirs(folder, exist_ok=True)
    names = {path: f"{number}.jc" for number, path in enumerate(stats)}
    for path, name in names.items():
        io.save(os.path.join(folder, name), _packed(stats[path]))
    about = {name: dict(getattr(stats, name, {})) for name in _OTHERS}
    io.save(os.path.join(folder, _INDEX), {}, metadata={"files": names, **about})


def load_stats(folder: str | os.PathLike[str]) -> StoredStats:
    """The statistics that :func:`save_stats` wrote; each leaf's are read when they are asked for, and not kept.

    Args:
      folder: where they are.

    Returns:
      ``{path: statistics}``, for ``jc.compress(stats=...)`` and ``jc.compress_file(stats=...)``.

    Raises:
      StorageError: if there are none, or they are damaged; a file of a leaf is read when it is asked for.

    Example:
      >>> import tempfile, jax.numpy as jnp, jcompress as jc
      >>> stats = jc.calibrate(lambda p, x: x @ p["w"], {"w": jnp.ones((2, 3))}, [jnp.ones((4, 2))])
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     jc.save_stats(folder, stats)
      ...     int(jc.load_stats(folder)["w"].count)
      4
    """
    return StoredStats(os.fspath(folder))


class StoredStats(Mapping):
    """``{path: Stats}`` in a folder, from :func:`load_stats`. ``jc.trace.Calibration(stats)`` reads all of them.

    Attributes:
      stamp: what tells them from others.
      unread: as :class:`jcompress.trace.Calibration` has it; ``notes`` and ``levels`` too.

    Raises:
      StorageError: if the folder holds no such statistics, or one of its files is damaged.

    Example:
      >>> import tempfile, jax.numpy as jnp, jcompress as jc
      >>> stats = jc.calibrate(lambda p, x: x @ p["w"], {"w": jnp.ones((2, 3))}, [jnp.ones((4, 2))])
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     jc.save_stats(folder, stats)
      ...     print(jc.load_stats(folder))
      StoredStats(1 parameters)
    """

    def __init__(self, folder: str) -> None:
        about = io.inspect(os.path.join(folder, _INDEX)).get("metadata")
        if not isinstance(about, dict) or not isinstance(about.get("files"), dict):
            raise io.StorageError(f"{folder}: found no statistics that jc.save_stats wrote; check the path")
        self._folder, self._files = folder, about["files"]
        self.unread, self.notes, self.levels = (about.get(name, {}) for name in _OTHERS)
        with files.told(folder, "reading"):
            self.stamp = tensors.stamp([self._file(path) for path in self._files])

    def _file(self, path: str) -> str:
        return os.path.join(self._folder, os.path.basename(self._files[path]))

    def __getitem__(self, path: str) -> Stats:
        return _unpacked(Stats, io.load(self._file(path)))

    def __contains__(self, path: object) -> bool:
        return path in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def __repr__(self) -> str:
        return f"StoredStats({len(self)} parameters)"


def _packed(x: Any) -> Any:
    """Statistics as dictionaries of what is known."""
    if isinstance(x, (Stats, Outputs, Layout)):
        fields = {f.name: getattr(x, f.name) for f in dataclasses.fields(x)}
        return {name: _packed(y) for name, y in fields.items() if y is not None}
    return [_packed(y) for y in x] if isinstance(x, tuple) else x


def _unpacked(kind: type, found: Any) -> Any:
    fields = {f.name for f in dataclasses.fields(kind)}
    if not isinstance(found, dict) or not set(found) <= fields:
        raise io.StorageError(f"found other fields than those of {kind.__name__}; restore the file from a copy")
    inner = {"outputs": Outputs, "layout": Layout}
    values = {}
    for name, x in found.items():
        if name == "others":
            values[name] = tuple(_unpacked(Stats, y) for y in x)
        elif name in inner and isinstance(x, dict):
            values[name] = _unpacked(inner[name], x)
        else:
            values[name] = tuple(x) if isinstance(x, list) else x
    return kind(**values)
