"""Files of safetensors, read and written without that package: a length, a header in JSON, and the bytes of arrays.

Whoever wrote a file need not be trusted: what its header claims is checked against its size before anything is read.
"""

from __future__ import annotations

import functools
import json
import math
import os
import sys
from collections.abc import Mapping
from typing import Any, BinaryIO, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jcompress.io import files
from jcompress.io.manifest import StorageError
from jcompress.io.tensors import Tensors, from_file, parsed, stamp

_MOST_HEADER = 100_000_000  # bytes, as others have it
_MOST_ELEMENTS = 1 << 60
_INDEX = ".safetensors.index.json"


@functools.cache
def _dtypes() -> dict[str, np.dtype]:
    names = {"BOOL": "bool", "BF16": "bfloat16", "C64": "complex64", "F16": "float16", "F32": "float32"}
    names |= {"F64": "float64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu"}
    names |= {"F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz"}
    names |= {f"{kind}{bits}": f"{name}{bits}" for kind, name in (("I", "int"), ("U", "uint")) for bits in _BITS}
    return {kind: np.dtype(jnp.dtype(name)) for kind, name in names.items() if hasattr(jnp, name) or kind == "BOOL"}


_BITS = (8, 16, 32, 64)


class _Entry(NamedTuple):
    """Where one array lies."""

    file: str
    kind: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


def read_safetensors(path: str | os.PathLike[str]) -> Tensors:
    """The arrays of a safetensors file, or of a folder of them, each read when it is asked for.

    Reads the header alone; no package is needed. A folder is read by its ``*.safetensors.index.json``, or else whole.

    Args:
      path: a file, or a folder as models are published in.

    Returns:
      :class:`Tensors`, in the order of the file. Their ``metadata`` is the file's, ``{text: text}``.

    Raises:
      StorageError: if there is no such file, or its header is damaged or made to harm: longer than the file, no JSON,
        a name twice, a dtype that is not known, sizes that disagree with shapes, bytes that belong to two arrays or to
        none. The message names the file and the array.

    Example:
      >>> import os, tempfile, numpy as np, jcompress as jc
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = os.path.join(folder, "model.safetensors")
      ...     size = jc.io.write_safetensors(path, {"w": np.ones((4, 2), np.float32)})
      ...     tensors = jc.io.read_safetensors(path)
      ...     total = tensors["w"].sum()
      >>> tensors.shapes["w"].shape, float(total)
      ((4, 2), 8.0)
    """
    path = os.fspath(path)
    if os.path.isdir(path):
        entries, metadata = _folder(path)
    else:
        entries, metadata = _header(path)

    def read(name: str, start: int, stop: int) -> np.ndarray:
        entry = entries[name]
        row = entry.nbytes // (entry.shape[0] if entry.shape and entry.shape[0] else 1)
        data = from_file(entry.file, entry.start + start * row, (stop - start) * row)
        shape = (stop - start, *entry.shape[1:]) if entry.shape else ()
        x = data.view(_dtypes()[entry.kind])  # of this very type: "<f4" is equal to float32, but another for JAX
        return (x if sys.byteorder == "little" else x.byteswap()).reshape(shape)

    shapes = {name: jax.ShapeDtypeStruct(x.shape, _dtypes()[x.kind]) for name, x in entries.items()}
    kinds, sizes = {name: x.kind for name, x in entries.items()}, {name: x.nbytes for name, x in entries.items()}
    return Tensors(shapes, read, metadata, kinds, sizes, stamp({x.file for x in entries.values()}))


def _folder(path: str) -> tuple[dict[str, _Entry], dict[str, str]]:
    """All files of a folder, as its index tells or without one."""
    with files.told(path, "reading"):
        names = sorted(os.listdir(path))
    indices = [name for name in names if name.endswith(_INDEX)]
    if len(indices) > 1:
        raise StorageError(f"{path}: found the indices {indices[:4]}, expected one; name one of the files")
    named = _index(os.path.join(path, indices[0])) if indices else None
    shards = sorted(set(named.values())) if named else [name for name in names if name.endswith(".safetensors")]
    if not shards:
        raise StorageError(f"{path}: found no file *.safetensors; check the path")
    entries: dict[str, _Entry] = {}
    metadata: dict[str, str] = {}
    for shard in shards:
        found, said = _header(os.path.join(path, shard))
        metadata |= said
        for name, entry in found.items():
            if named is None and name in entries:
                raise StorageError(f"{path}: found {name!r} in {shard} and in {os.path.basename(entries[name].file)}")
            if named is None or named.get(name) == shard:
                entries[name] = entry
    if missing := [name for name in named or () if name not in entries]:
        raise StorageError(f"{path}: {named[missing[0]]} has no {missing[0]!r}, which the index says; fetch it anew")  # type: ignore[index]
    return entries, metadata


def _index(path: str) -> dict[str, str]:
    """``{name of an array: file}``; files outside the folder are refused."""
    with files.reading(path) as file:
        found = parsed(path, file.read(_MOST_HEADER), "the index")
    names = found.get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(x, str) for x in names.values()):
        raise StorageError(f"{path}: found no 'weight_map' of names to files; fetch it anew")
    for x in set(names.values()):
        if os.path.basename(x) != x or x in ("", ".", ".."):
            raise StorageError(f"{path}: found the file {x!r}, expected a name in this folder; do not trust it")
    return names


def _header(path: str) -> tuple[dict[str, _Entry], dict[str, str]]:
    """What the header of one file says, all of it checked."""
    with files.reading(path) as file:
        length, size = _length(path, file)
        found = parsed(path, file.read(length), "the header")
    metadata = found.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(x, str) for x in metadata.values()):
        raise StorageError(f"{path}: found __metadata__ that is no texts by name; write the file anew")
    entries = {name: _entry(path, name, about, 8 + length) for name, about in found.items()}
    at, before = 8 + length, "the header"
    for name, entry in sorted(entries.items(), key=lambda pair: (pair[1].start, pair[1].nbytes)):
        if entry.start != at:
            what = "shares bytes with" if entry.start < at else "leaves bytes between it and"
            raise StorageError(f"{path}: {name} {what} {before}; the file is damaged, fetch it anew")
        at, before = at + entry.nbytes, name
    if at != size:
        raise StorageError(f"{path}: found {size} bytes, expected {at}; the file was cut short, or something added")
    return entries, metadata


def _length(path: str, file: BinaryIO) -> tuple[int, int]:
    size, head = os.fstat(file.fileno()).st_size, file.read(8)
    if len(head) < 8:
        raise StorageError(f"{path}: found {size} bytes, expected a safetensors file; check the path")
    length = int.from_bytes(head, "little")
    if length > min(size - 8, _MOST_HEADER):
        raise StorageError(
            f"{path}: found a header of {length} bytes in a file of {size}, expected at most "
            f"{min(size - 8, _MOST_HEADER)}; it is no safetensors file, or damaged"
        )
    return length, size


def _entry(path: str, name: str, about: Any, base: int) -> _Entry:
    """One array's claims, checked against one another."""
    if not isinstance(about, dict) or set(about) != {"dtype", "shape", "data_offsets"}:
        raise StorageError(f"{path}: {name}: found {str(about)[:60]}, expected dtype, shape and data_offsets")
    kind, shape, offsets = about["dtype"], about["shape"], about["data_offsets"]
    if not isinstance(kind, str) or kind not in _dtypes():
        raise StorageError(f"{path}: {name}: found dtype {str(kind)[:40]!r}, expected one of {', '.join(_dtypes())}")
    if not _are_counts(shape) or len(shape) > 32 or math.prod(n or 1 for n in shape) > _MOST_ELEMENTS:
        raise StorageError(
            f"{path}: {name}: found shape {str(shape)[:60]}, expected at most 32 lengths that fit memory"
        )
    if not _are_counts(offsets) or len(offsets) != 2:
        raise StorageError(f"{path}: {name}: found data_offsets {str(offsets)[:60]}, expected a first and a last byte")
    nbytes = math.prod(shape) * _dtypes()[kind].itemsize
    if offsets[1] - offsets[0] != nbytes:
        raise StorageError(
            f"{path}: {name}: found {offsets[1] - offsets[0]} bytes, expected {nbytes} for {kind} of shape {shape}"
        )
    return _Entry(path, kind, tuple(shape), base + offsets[0], nbytes)


def _are_counts(x: Any) -> bool:
    return isinstance(x, list) and all(type(n) is int and 0 <= n < 1 << 63 for n in x)


def write_safetensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Any], *, metadata: Mapping[str, str] | None = None
) -> int:
    """Write arrays by name to one safetensors file; no package is needed.

    The file is the old one or the new one, whatever happens. Of :class:`Tensors` one array at a time is in memory.

    Args:
      path: the file. An existing one is replaced.
      tensors: ``{name: array}``; of a tree ``dict(jc.paths(tree))``.
      metadata: texts by name.

    Returns:
      The number of bytes written.

    Raises:
      StorageError: for a node, a dtype that the format does not have, or a name or metadata that are no text; for a
        full disk, as an ``OSError`` too, and nothing is written.

    Example:
      >>> import os, tempfile, jax.numpy as jnp, jcompress as jc
      >>> tree = {"block": {"kernel": jnp.ones((4, 2), jnp.bfloat16)}}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = os.path.join(folder, "model.safetensors")
      ...     size = jc.io.write_safetensors(path, dict(jc.paths(tree)))
      ...     names = list(jc.io.read_safetensors(path))
      >>> names
      ['block/kernel']
    """
    known = {dtype: kind for kind, dtype in _dtypes().items()}
    shapes = tensors.shapes if isinstance(tensors, Tensors) else tensors
    kinds = {name: _kind(name, x, known) for name, x in shapes.items()}
    said = dict(metadata or {})
    if not all(isinstance(x, str) for pair in said.items() for x in pair):
        raise StorageError(f"metadata: found {said!r}, expected texts by name; convert the values with json.dumps")
    # Wide dtypes first, so that every array begins at a multiple of its own width.
    order = sorted(shapes, key=lambda name: (-_dtypes()[kinds[name]].itemsize, name))
    header: dict[str, Any] = {"__metadata__": said} if said else {}
    at = 0
    for name in order:
        nbytes = math.prod(shapes[name].shape) * _dtypes()[kinds[name]].itemsize
        header[name] = {"dtype": kinds[name], "shape": list(shapes[name].shape), "data_offsets": [at, at + nbytes]}
        at += nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)

    def write(file: BinaryIO) -> int:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            x = np.ascontiguousarray(tensors[name], _dtypes()[kinds[name]].newbyteorder("<"))
            file.write(x.reshape(-1).view(np.uint8).data)
        return 8 + len(text) + at

    return files.replace(path, write)


def _kind(name: Any, x: Any, known: Mapping[np.dtype, str]) -> str:
    if not isinstance(name, str) or name == "__metadata__":
        raise StorageError(f"found the name {name!r}, expected a text other than '__metadata__'; rename the array")
    dtype = getattr(x, "dtype", None)
    if not isinstance(dtype, np.dtype) or not hasattr(x, "shape") or hasattr(x, "materialize"):
        raise StorageError(f"{name}: found {type(x).__name__}, expected an array; materialize nodes, or export them")
    if (native := dtype.newbyteorder("=")) not in known:
        raise StorageError(f"{name}: found dtype {dtype}, expected one of {', '.join(map(str, known))}; cast it")
    return known[native]
