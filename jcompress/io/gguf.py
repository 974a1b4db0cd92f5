"""Files of GGUF, read and written without a package: typed metadata, descriptions of arrays, and their bytes.

Whoever wrote a file need not be trusted: every length is compared with what is left of the file before it is used.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any, BinaryIO, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jcompress.io import blocks, files
from jcompress.io.manifest import StorageError
from jcompress.io.tensors import Tensors, from_file, stamp

_MAGIC, _VERSION, _ALIGNMENT = b"GGUF", 3, 32
_NUMBERS = {
    0: np.uint8,
    1: np.int8,
    2: np.uint16,
    3: np.int16,
    4: np.uint32,
    5: np.int32,
    6: np.float32,
    10: np.uint64,
    11: np.int64,
    12: np.float64,
}
_BOOL, _TEXT, _ARRAY = 7, 8, 9
_MOST_ELEMENTS = 1 << 60
_NAMES = {kind.number: name for name, kind in blocks.KINDS.items()}


class _Entry(NamedTuple):
    """Where one array lies."""

    kind: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


def read_gguf(path: str | os.PathLike[str]) -> Tensors:
    """The arrays of a GGUF file, each read and made dense when it is asked for.

    Reads what stands before the arrays alone; no package is needed. Arrays of F32, F16, BF16, F64 and integers come
    back as they are, those in blocks (Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K) as float32. Axes are those of
    NumPy, the last one that along which numbers are stored: a kernel is (out, in).

    Args:
      path: the file.

    Returns:
      :class:`Tensors`. Their ``metadata`` has the file's types, so that :func:`write_gguf` writes the same again:
      NumPy scalars and arrays, texts, lists of texts, bools; ``kinds`` says ``"Q4_0"`` and the like.

    Raises:
      StorageError: if there is no such file, or it is damaged or made to harm: cut short, a length beyond the file,
        huge shapes, unknown types, a name twice, arrays that share bytes. The message names the file and the array. On
        reading an array of a kind that is not known here.

    Example:
      >>> import os, tempfile, numpy as np, jcompress as jc
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = os.path.join(folder, "model.gguf")
      ...     size = jc.io.write_gguf(path, {"w": np.ones((2, 3), np.float32)}, metadata={"general.name": "small"})
      ...     tensors = jc.io.read_gguf(path)
      >>> tensors.shapes["w"].shape, tensors.kinds["w"], tensors.metadata["general.name"]
      ((2, 3), 'F32', 'small')
    """
    path = os.fspath(path)
    with files.reading(path) as file:
        metadata, entries = _header(path, _Cursor(path, file))

    def read(name: str, start: int, stop: int) -> np.ndarray:
        entry = entries[name]
        if entry.kind not in blocks.PLAIN and entry.kind not in blocks.DECODED:
            known = ", ".join([*blocks.PLAIN, *blocks.DECODED])
            raise StorageError(
                f"{path}: {name}: found {entry.kind}, expected one of {known}; convert it with llama.cpp"
            )
        row = entry.nbytes // (entry.shape[0] if entry.shape and entry.shape[0] else 1)
        data = from_file(path, entry.start + start * row, (stop - start) * row)
        shape = (stop - start, *entry.shape[1:]) if entry.shape else ()
        return blocks.decode(data, entry.kind).reshape(shape)

    shapes = {name: jax.ShapeDtypeStruct(x.shape, _dtype(x.kind)) for name, x in entries.items()}
    kinds, sizes = {name: x.kind for name, x in entries.items()}, {name: x.nbytes for name, x in entries.items()}
    return Tensors(shapes, read, metadata, kinds, sizes, stamp([path]))


def _dtype(kind: str) -> np.dtype:
    return np.dtype(jnp.dtype(blocks.PLAIN.get(kind, "float32")))


class _Cursor:
    """Reads numbers and texts in order, never beyond the end."""

    def __init__(self, path: str, file: BinaryIO) -> None:
        self.path, self._file = path, file
        self.size, self.at = os.fstat(file.fileno()).st_size, 0

    def take(self, count: int, what: str, least: int = 1) -> bytes:
        """The next bytes: ``count`` things of at least so many bytes each."""
        nbytes = count * least
        if nbytes > self.size - self.at:
            raise StorageError(
                f"{self.path}: found {what} of {nbytes} bytes or more at byte {self.at} of {self.size}; the file was "
                "cut short, or is damaged"
            )
        data = self._file.read(nbytes)
        if len(data) != nbytes:
            raise StorageError(f"{self.path}: the file was cut short while it was read")
        self.at += nbytes
        return data

    def check(self, count: int, what: str, least: int) -> None:
        """Raise if so many things cannot follow."""
        if count * least > self.size - self.at:
            self.take(count, what, least)

    def number(self, dtype: Any, what: str) -> Any:
        """One number of some type."""
        dtype = np.dtype(dtype).newbyteorder("<")
        return np.frombuffer(self.take(1, what, dtype.itemsize), dtype)[0].astype(dtype.newbyteorder("="))

    def count(self, what: str) -> int:
        """A length."""
        return int.from_bytes(self.take(8, what), "little")

    def text(self, what: str) -> str:
        """A text, its length in front."""
        data = self.take(self.count(what), what)
        try:
            return data.decode()
        except UnicodeDecodeError:
            raise StorageError(f"{self.path}: found {what} that is no UTF-8: {data[:40]!r}") from None


def _header(path: str, cursor: _Cursor) -> tuple[dict[str, Any], dict[str, _Entry]]:
    if cursor.size < 24 or cursor.take(4, "a name") != _MAGIC:
        raise StorageError(f"{path}: found no GGUF at its beginning, expected a GGUF file; check the path")
    version = int(cursor.number(np.uint32, "a version"))
    if version not in (2, _VERSION):
        hint = "convert it to little-endian" if version in (2 << 24, 3 << 24) else "convert it with llama.cpp"
        raise StorageError(f"{path}: found version {version} of GGUF, expected 2 or {_VERSION}; {hint}")
    arrays, pairs = cursor.count("a number of arrays"), cursor.count("a number of metadata")
    cursor.check(pairs, f"{pairs} metadata", 13)
    metadata: dict[str, Any] = {}
    for _ in range(pairs):
        name = cursor.text("a name of metadata")
        if name in metadata:
            raise StorageError(f"{path}: found the metadata {name!r} twice; do not trust the file")
        metadata[name] = _value(cursor, f"{name[:60]!r}", int(cursor.number(np.uint32, "a type")))
    cursor.check(arrays, f"{arrays} arrays", 24)
    told: dict[str, tuple[str, tuple[int, ...], int]] = {}
    for _ in range(arrays):
        name, about = _described(cursor)
        if name in told:
            raise StorageError(f"{path}: found the array {name!r} twice; do not trust the file")
        told[name] = about
    return metadata, _placed(path, cursor, metadata.get("general.alignment", _ALIGNMENT), told)


def _value(cursor: _Cursor, what: str, kind: int, depth: int = 0) -> Any:
    """Metadata of some type."""
    if kind in _NUMBERS:
        return cursor.number(_NUMBERS[kind], what)
    if kind == _BOOL:
        return bool(cursor.number(np.uint8, what))
    if kind == _TEXT:
        return cursor.text(what)
    if kind != _ARRAY or depth > 4:
        raise StorageError(f"{cursor.path}: found {what} of type {kind}, which is none of GGUF, or nested too deep")
    inner, count = int(cursor.number(np.uint32, what)), cursor.count(what)
    if inner in _NUMBERS or inner == _BOOL:
        dtype = np.dtype(np.bool_ if inner == _BOOL else _NUMBERS[inner])
        data = np.frombuffer(cursor.take(count, what, dtype.itemsize), dtype.newbyteorder("<"))
        return data.astype(dtype)
    cursor.check(count, what, 8)
    return [_value(cursor, what, inner, depth + 1) for _ in range(count)]


def _described(cursor: _Cursor) -> tuple[str, tuple[str, tuple[int, ...], int]]:
    """Name, kind, shape and place of one array."""
    name = cursor.text("a name of an array")
    told = f"{cursor.path}: {name[:200]}"
    ndim = int(cursor.number(np.uint32, "axes"))
    if ndim > 8:
        raise StorageError(f"{told}: found {ndim} axes, expected at most 8; the file is damaged")
    shape = tuple(cursor.count("an axis") for _ in range(ndim))[::-1]
    number, offset = int(cursor.number(np.uint32, "a type")), cursor.count("a place")
    if number not in _NAMES:
        raise StorageError(f"{told}: found numbers of type {number}, which this version does not know")
    if math.prod(n or 1 for n in shape) > _MOST_ELEMENTS:
        raise StorageError(f"{told}: found shape {shape}, which is larger than any memory; the file is damaged")
    kind = _NAMES[number]
    if (shape[-1] if shape else 1) % blocks.KINDS[kind].block:
        raise StorageError(f"{told}: found shape {shape}, expected rows of whole blocks of {blocks.KINDS[kind].block}")
    return name, (kind, shape, offset)


def _placed(
    path: str, cursor: _Cursor, alignment: Any, told: Mapping[str, tuple[str, tuple[int, ...], int]]
) -> dict[str, _Entry]:
    """The arrays with their places in the file, each inside it and none in another."""
    if not isinstance(alignment, (int, np.integer)) or not 1 <= alignment <= 1 << 20:
        raise StorageError(f"{path}: found general.alignment {str(alignment)[:40]}, expected a small positive number")
    base = -(-cursor.at // int(alignment)) * int(alignment)
    entries = {}
    for name, (kind, shape, offset) in told.items():
        nbytes = math.prod(shape) // blocks.KINDS[kind].block * blocks.KINDS[kind].nbytes
        if nbytes and base + offset + nbytes > cursor.size:
            raise StorageError(
                f"{path}: {name}: found {nbytes} bytes at {base + offset} in a file of {cursor.size}; it was cut "
                "short, or is damaged"
            )
        if offset % int(alignment):
            raise StorageError(f"{path}: {name}: found place {offset}, expected a multiple of {alignment}")
        entries[name] = _Entry(kind, shape, base + offset, nbytes)
    at, before = base, ""
    for name, entry in sorted(entries.items(), key=lambda pair: (pair[1].start, pair[1].nbytes)):
        if entry.nbytes and entry.start < at:
            raise StorageError(f"{path}: {name} shares bytes with {before}; the file is damaged, fetch it anew")
        at, before = (entry.start + entry.nbytes, name) if entry.nbytes else (at, before)
    return entries


def write_gguf(
    path: str | os.PathLike[str], tensors: Mapping[str, Any], *, metadata: Mapping[str, Any] | None = None
) -> int:
    """Write arrays by name to one GGUF file; no package is needed.

    The file is the old one or the new one, whatever happens. Arrays of float32, float16, bfloat16, float64 and integers
    of 8 to 64 bits are written as they are; for nodes and blocks see :func:`jcompress.io.export_gguf`.

    Args:
      path: the file. An existing one is replaced.
      tensors: ``{name: array}``, kernels as (out, in). Of :class:`Tensors` one array at a time is in memory.
      metadata: by name, as :func:`read_gguf` gives them: NumPy numbers with their types, bools, texts, and lists and
        arrays of these. Python integers are written as 32 bits without a sign, where they fit, and floats as 32 bits.

    Returns:
      The number of bytes written.

    Raises:
      StorageError: for what the format does not have, the message names it; for a full disk, as an ``OSError`` too, and
        nothing is written.

    Example:
      >>> import os, tempfile, numpy as np, jcompress as jc
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = os.path.join(folder, "model.gguf")
      ...     size = jc.io.write_gguf(path, {"w": np.ones((2, 32), np.float16)}, metadata={"layers": 2})
      ...     found = jc.io.read_gguf(path)["w"].dtype
      >>> found
      dtype('float16')
    """
    shapes = tensors.shapes if isinstance(tensors, Tensors) else tensors
    kinds = {name: _plain_kind(name, x) for name, x in shapes.items()}
    about = {name: (kinds[name], tuple(x.shape)) for name, x in shapes.items()}

    def data(name: str) -> np.ndarray:
        dtype = _dtype(kinds[name]).newbyteorder("<")
        return np.ascontiguousarray(tensors[name], dtype).reshape(-1).view(np.uint8)

    return write_blocks(path, about, data, metadata or {})


def _plain_kind(name: Any, x: Any) -> str:
    dtype = getattr(x, "dtype", None)
    if not isinstance(dtype, np.dtype) or not hasattr(x, "shape") or hasattr(x, "materialize"):
        raise StorageError(f"{name}: found {type(x).__name__}, expected an array; use jc.io.export_gguf for nodes")
    known = {np.dtype(jnp.dtype(dtype)): kind for kind, dtype in blocks.PLAIN.items()}
    if (native := dtype.newbyteorder("=")) not in known:
        raise StorageError(f"{name}: found dtype {dtype}, expected one of {', '.join(map(str, known))}; cast it")
    return known[native]


def write_blocks(
    path: Any, about: Mapping[str, tuple[str, tuple[int, ...]]], data: Any, metadata: Mapping[str, Any]
) -> int:
    """Write arrays whose bytes are given.

    Args:
      path: the file.
      about: ``{name: (kind, shape)}``.
      data: of a name, gives its bytes as uint8.
      metadata: as in :func:`write_gguf`.
    """
    alignment = int(metadata.get("general.alignment", _ALIGNMENT))
    head = _MAGIC + _packed(np.uint32, _VERSION) + _packed(np.uint64, len(about)) + _packed(np.uint64, len(metadata))
    head += b"".join(_text(name) + _typed(name, value) for name, value in metadata.items())
    at = 0
    for name, (kind, shape) in about.items():
        if len(shape) > 4 or not isinstance(name, str) or len(name.encode()) > 63:
            raise StorageError(f"{name}: found shape {shape}, expected at most 4 axes and a name of at most 63 bytes")
        axes = b"".join(_packed(np.uint64, n) for n in shape[::-1])
        head += _text(name) + _packed(np.uint32, len(shape)) + axes
        head += _packed(np.uint32, blocks.KINDS[kind].number) + _packed(np.uint64, at)
        at += -(-_nbytes(kind, shape) // alignment) * alignment
    head += bytes(-len(head) % alignment)

    def write(file: BinaryIO) -> int:
        file.write(head)
        for name, (kind, shape) in about.items():
            found, nbytes = data(name), _nbytes(kind, shape)
            if found.nbytes != nbytes:
                raise StorageError(f"{name}: found {found.nbytes} bytes of {kind}, expected {nbytes} for shape {shape}")
            file.write(found.data)
            file.write(bytes(-nbytes % alignment))
        return len(head) + at

    return files.replace(path, write)


def _nbytes(kind: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) // blocks.KINDS[kind].block * blocks.KINDS[kind].nbytes


def _packed(dtype: Any, value: Any) -> bytes:
    return np.asarray(value, np.dtype(dtype).newbyteorder("<")).tobytes()


def _text(text: str) -> bytes:
    data = text.encode()
    return _packed(np.uint64, len(data)) + data


def _typed(name: Any, value: Any) -> bytes:
    """A type, and the value in it."""
    kind, data = _encoded(name, value)
    return _packed(np.uint32, kind) + data


def _encoded(name: Any, value: Any) -> tuple[int, bytes]:
    numbers = {np.dtype(dtype): kind for kind, dtype in _NUMBERS.items()} | {np.dtype(np.bool_): _BOOL}
    if isinstance(value, str):
        return _TEXT, _text(value)
    if isinstance(value, (bool, int, float, np.generic)):
        x = _number(name, value)
        if x.dtype in numbers:
            return numbers[x.dtype], _packed(x.dtype, x)
    if isinstance(value, np.ndarray) and value.ndim == 1 and value.dtype in numbers:
        return _ARRAY, _packed(np.uint32, numbers[value.dtype]) + _packed(np.uint64, value.size) + _packed(
            value.dtype, value
        )
    if isinstance(value, (list, tuple)):
        items = [_encoded(name, x) for x in value]
        kinds = {kind for kind, _ in items}
        if len(kinds) < 2:
            kind = next(iter(kinds), _TEXT)
            return _ARRAY, _packed(np.uint32, kind) + _packed(np.uint64, len(items)) + b"".join(x for _, x in items)
    raise StorageError(f"metadata {name!r}: found {str(value)[:60]!r}, expected numbers, texts or lists of one type")


def _number(name: Any, value: Any) -> np.ndarray:
    if isinstance(value, (bool, np.generic)):
        return np.asarray(value)
    if isinstance(value, float):
        return np.asarray(value, np.float32)
    for dtype in (np.uint32, np.int32, np.uint64, np.int64):
        if np.iinfo(dtype).min <= value <= np.iinfo(dtype).max:
            return np.asarray(value, dtype)
    raise StorageError(f"metadata {name!r}: found {value}, expected an integer of at most 64 bits")
