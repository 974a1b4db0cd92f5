"""One file that holds a tree, bit for bit and at exactly the size that its nodes claim.

The first line is ``jcompress <format version> <manifest bytes> <checksum> <payload bytes> <checksum>``, the second
the manifest (see :mod:`jcompress.io.manifest`), and the rest is the payload: one stream of bits.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

import jax
import numpy as np

from jcompress.core import Part, PyTree
from jcompress.io import manifest
from jcompress.io.manifest import Formats, StorageError
from jcompress.io.restore import fill
from jcompress.numeric import packing
from jcompress.version import __version__

FORMAT_VERSION = 1
_HEADER = re.compile(rb"jcompress (\d+) (\d+) ([0-9a-f]{16}) (\d+) ([0-9a-f]{16})\n")
_LONGEST_HEADER = 128


class _MissingFileError(StorageError, FileNotFoundError):
    """So that ``except FileNotFoundError`` works too."""


def save(
    path: str | os.PathLike[str],
    tree: PyTree,
    *,
    plan: Mapping[str, Any] | None = None,
    metadata: Any = None,
) -> int:
    """Write a tree to one file of ``ceil(jc.nbits(tree) / 8)`` bytes and a readable manifest.

    Codes take their own number of bits, and of what a mask hides nothing is stored. Writing is atomic: the file is
    the old one or the new one, whatever happens. Arrays on several devices are gathered.

    Args:
      path: the file. An existing one is replaced.
      tree: nodes, arrays of any dtype, PRNG keys and Python scalars in dictionaries, lists, tuples, named tuples
        or any other pytree.
      plan: the plan that the tree was compressed by, kept as text.
      metadata: anything that JSON can hold.

    Returns:
      The number of bytes written.

    Raises:
      StorageError: for a leaf that cannot be stored; the message names its path. No file is touched then.

    Example:
      >>> import os, tempfile, jax.numpy as jnp, jcompress as jc
      >>> params = {"kernel": jnp.ones((64, 32)), "bias": jnp.zeros(32)}
      >>> small = jc.compress(params, jc.plan(params, [("kernel", jc.quantize.Int(bits=4))]))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = os.path.join(folder, "model.jc")
      ...     size = jc.save(path, small, metadata={"epochs": 3})
      ...     again = jc.load(path)
      >>> bool((again["kernel"].materialize() == 1).all()), size - jc.nbits(small) // 8 < 400
      (True, True)
    """
    stored: list[Part] = []
    described = manifest.encode(tree, "", stored)
    writer = packing.BitWriter()
    for part in stored:
        writer.write(*_integers(part))
    payload = writer.getvalue()
    text = _dumps({**_about(plan, metadata), "tree": described})
    header = f"jcompress {FORMAT_VERSION} {len(text)} {_checksum(text)} {len(payload)} {_checksum(payload)}\n".encode()
    _replace_file(os.path.realpath(path), header, text, payload)
    return len(header) + len(text) + len(payload)


def _about(plan: Mapping[str, Any] | None, metadata: Any) -> dict[str, Any]:
    about: dict[str, Any] = {"jcompress": __version__, "jax": jax.__version__}
    if metadata is not None:
        about["metadata"] = metadata
    if plan is not None:
        methods: dict[str, list[str]] = {}
        about["plan"] = methods
        for path, method in plan.items():
            if method is not None:
                methods.setdefault(repr(method), []).append(path)
    return about


def _dumps(value: Any) -> bytes:
    try:
        return json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode() + b"\n"
    except (TypeError, ValueError) as error:
        raise StorageError(f"metadata: JSON cannot hold it ({error}); convert it to numbers and texts") from None


def _checksum(data: bytes | memoryview) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def _integers(part: Part) -> tuple[np.ndarray, int]:
    """The values of one part as they are written, and how many bits each takes."""
    x = part.array
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
        raise StorageError(
            f"{part.name}: some shards lie on other processes; gather it with "
            "jax.experimental.multihost_utils.process_allgather(tree, tiled=True), or use jcompress.io.Checkpoints"
        )
    values = np.asarray(x)
    if part.code is not None:
        return packing.encode_mask(values, part.code), part.width
    if part.where is not None:
        values = values[part.where]
    if values.dtype == np.complex128:
        return np.ascontiguousarray(values).view(np.float64), part.width // 2
    _check_fits(part, values)
    return values, part.width


def _check_fits(part: Part, values: np.ndarray) -> None:
    dtype = values.dtype
    if not np.issubdtype(dtype, np.integer) or part.width >= 8 * dtype.itemsize or not values.size:
        return
    half = 1 << part.width >> 1
    low, high = (-half, max(half - 1, 0)) if np.issubdtype(dtype, np.signedinteger) else (0, (1 << part.width) - 1)
    if int(values.min()) < low or int(values.max()) > high:
        raise StorageError(
            f"{part.name}: found values from {values.min()} to {values.max()}, expected {low} to {high}, which fit in "
            f"{part.width} bits; fit the node anew, or give it more bits"
        )


def _replace_file(path: str, *pieces: bytes) -> None:
    """Write beside ``path``, then rename: other readers see the old file or the new one, never half of one."""
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f".{name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    _sync_folder(folder)


def _sync_folder(folder: str) -> None:
    """Make the renaming last through a power cut, where the system can open folders."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def load(path: str | os.PathLike[str], *, like: PyTree | None = None, formats: Formats | None = None) -> PyTree:
    """Read the tree that :func:`save` wrote; no template is needed.

    Dictionaries, lists, tuples, named tuples (of a class of the same name and fields), nodes and scalars come back
    as they were; any other container, such as an NNX state, as nested dictionaries by path. Codes and values that a
    mask hides come back as 0. Arrays come back as JAX arrays, except that arrays of 64 bits stay NumPy arrays
    where JAX has those off.

    Args:
      path: the file.
      like: a tree whose structure to give, with arrays, ``jax.ShapeDtypeStruct`` or nodes as leaves. Nothing is
        ever cast. A leaf that is sharded over devices says where its array goes.
      formats: classes of your own by name, beside those of :mod:`jcompress.formats`.

    Raises:
      StorageError: if there is no such file, it is no file of jcompress, of another version, cut short, damaged,
        has a format that is not known, or differs from ``like``. The message says what was found and expected.

    Example:
      >>> import os, tempfile, jax.numpy as jnp, jcompress as jc
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = os.path.join(folder, "model.jc")
      ...     size = jc.save(path, {"w": jnp.ones(3, jnp.bfloat16), "layers": [1, (2.5, None)]})
      ...     tree = jc.load(path)
      >>> tree["w"].dtype.name, tree["layers"]
      ('bfloat16', [1, (2.5, None)])
    """
    with _open(path) as file:
        about, payload_bytes, checksum = _read_manifest(path, file)
        payload = file.read()
    if len(payload) != payload_bytes or _checksum(payload) != checksum:
        raise StorageError(f"{path}: the payload is damaged; restore the file from a copy")
    tree = _decode(path, about["tree"], payload, formats or {})
    return tree if like is None else fill(like, tree)


def inspect(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a file holds, without reading its payload.

    Args:
      path: a file that :func:`save` wrote.

    Returns:
      The manifest: ``tree``, ``jcompress``, ``jax``, ``metadata`` and ``plan`` where given, and ``format_version``
      and ``payload_bytes``.

    Raises:
      StorageError: as for :func:`load`.

    Example:
      >>> import os, tempfile, jax.numpy as jnp, jcompress as jc
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = os.path.join(folder, "model.jc")
      ...     size = jc.save(path, {"w": jnp.ones((3, 2))}, metadata="a test")
      ...     found = jc.io.inspect(path)
      >>> found["tree"], found["metadata"], found["payload_bytes"]
      ({'w': 'float32[3,2]'}, 'a test', 24)
    """
    with _open(path) as file:
        about, payload_bytes, _ = _read_manifest(path, file)
    return {"format_version": FORMAT_VERSION, **about, "payload_bytes": payload_bytes}


def _open(path: str | os.PathLike[str]) -> BinaryIO:
    try:
        return open(path, "rb")
    except FileNotFoundError:
        raise _MissingFileError(f"{path}: there is no such file; check the path") from None


def _read_manifest(path: Any, file: BinaryIO) -> tuple[dict[str, Any], int, str]:
    """The manifest, and the size and checksum of the payload that follows."""
    header = file.readline(_LONGEST_HEADER)
    version = re.match(rb"jcompress (\d+) ", header)
    if version is None:
        raise StorageError(f"{path}: found no header, expected a file that jc.save wrote; check the path")
    if int(version[1]) != FORMAT_VERSION:
        raise StorageError(
            f"{path}: found format version {int(version[1])}, expected {FORMAT_VERSION}; "
            "install the jcompress that wrote it"
        )
    match = _HEADER.fullmatch(header)
    if match is None:
        raise StorageError(f"{path}: the header is damaged; restore the file from a copy")
    text_bytes, payload_bytes = int(match[2]), int(match[4])
    found, expected = os.fstat(file.fileno()).st_size, len(header) + text_bytes + payload_bytes
    if found != expected:
        raise StorageError(
            f"{path}: found {found} bytes, expected {expected}; the file was cut short, or something added"
        )
    text = file.read(text_bytes)
    if _checksum(text) != match[3].decode():
        raise StorageError(f"{path}: the manifest is damaged; restore the file from a copy")
    about = _parse(path, text)
    return about, payload_bytes, match[5].decode()


def _parse(path: Any, text: bytes) -> dict[str, Any]:
    try:
        about = json.loads(text)
    except ValueError as error:
        raise StorageError(f"{path}: the manifest is no JSON: {error}") from None
    if not isinstance(about, dict) or "tree" not in about:
        raise StorageError(f"{path}: the manifest has no 'tree'; restore the file from a copy")
    return about


def _decode(path: Any, spec: Any, payload: bytes, known: Formats) -> PyTree:
    reader = packing.BitReader(payload)
    try:
        tree = manifest.decode(spec, _reading(reader), known)
    except StorageError as error:
        raise StorageError(f"{path}: {error}") from None
    except (ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError, ValueError) as error:
        raise StorageError(f"{path}: the manifest disagrees with the payload: {error}") from error
    if -(-reader.nbits // 8) != len(payload):
        raise StorageError(
            f"{path}: the manifest disagrees with the payload: it describes {reader.nbits} bits of {8 * len(payload)}"
        )
    return tree


def _reading(reader: packing.BitReader) -> Callable[[Part], np.ndarray]:
    def read(part: Part) -> np.ndarray:
        if part.code is not None:
            count, width = packing.mask_count(part.code)
            return reader.read(count, width, np.dtype(np.uint32))
        count = part.array.size if part.where is None else int(part.where.sum())
        if part.array.dtype == np.complex128:
            return reader.read(2 * count, part.width // 2, np.dtype(np.float64)).view(np.complex128)
        return reader.read(count, part.width, part.array.dtype)

    return read
