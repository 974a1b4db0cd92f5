"""One file that holds a tree, bit for bit and at exactly the size that its nodes claim.

The first line is ``jcompress <format version> <manifest bytes> <checksum> <payload bytes> <checksum>``, the second
the manifest (see :mod:`jcompress.io.manifest`), by zlib where arrays are entropy-coded, and the rest is the payload:
one stream of bits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO

import jax
import numpy as np

from jcompress.core import PyTree
from jcompress.io import files, parallel, placing
from jcompress.io.decoding import Decoder, decode
from jcompress.io.encoding import encode
from jcompress.io.manifest import Formats, StorageError, placeholder, too_deep
from jcompress.io.restore import fill
from jcompress.io.streams import CodedReader, MissingCoderError, PlainReader, Store, needing_coder
from jcompress.version import __version__

FORMAT_VERSION = 1
_HEADER = re.compile(rb"jcompress (\d{1,9}) (\d{1,18}) ([0-9a-f]{16}) (\d{1,18}) ([0-9a-f]{16})\n")
_LONGEST_HEADER, _LONGEST_TEXT = 128, 1 << 20
_LEAST, _RATIO = 1 << 26, 256
"""A tree may take 64 MiB in memory, and 256 times its file: as with three weights kept among a thousand."""


def save(
    path: str | os.PathLike[str],
    tree: PyTree,
    *,
    plan: Mapping[str, Any] | None = None,
    metadata: Any = None,
    coded: bool = False,
) -> int:
    """Write a tree to one file of ``ceil(jc.nbits(tree) / 8)`` bytes and a readable manifest.

    Codes take their own number of bits, and of what a mask hides nothing is stored. Writing is atomic: the file is
    the old one or the new one, whatever happens, and what a save that was killed left beside it is removed by the
    next. Arrays on several devices are gathered, one at a time: beside the tree, memory holds copies of one leaf.

    Where arrays lie on the devices of several processes, all processes call this with one path, on a file system that
    they share: each writes its own shards, at the same time, and the file is the one that a single process would
    write. Masks alone are sent to all, by one bit an entry, since what is stored where follows from all of a mask; with
    ``coded=True`` every array is. What fails on one process raises on all.

    With ``coded=True`` everything is entropy-coded besides, without loss: codes, indices, masks and gaps, and the
    exponents of floats. Each array is coded by the model that takes the fewest bits, its tables of frequencies
    reckoned in, and the file takes ``jc.nbits(tree, coded=True) / 8`` bytes and the manifest, which is compressed too.
    Writing and reading it needs the extra ``jcompress[coded]``.

    Args:
      path: the file. An existing one is replaced, and its permissions are kept.
      tree: nodes, arrays of any dtype and byte order, PRNG keys and Python scalars in dictionaries, lists, tuples,
        named tuples or any other pytree, of at most 256 levels.
      plan: the plan that the tree was compressed by, kept as text.
      metadata: anything that JSON can hold. Tuples come back as lists.
      coded: whether to entropy-code the arrays.

    Returns:
      The number of bytes written.

    Raises:
      StorageError: for a leaf that cannot be stored, the message names its path; for a directory or a device where a
        file should be; for a disk that is full, as an ``OSError`` too; without the package that codes, as an
        ``ImportError`` too. The old file stays as it was then.

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
    store = Store(coded=coded)
    try:
        with needing_coder(path):
            described = encode(tree, "", store)
    except RecursionError:
        raise too_deep() from None
    if store.spans:
        text = _text(described, plan, metadata, coded)
        return parallel.save(path, store, lambda checksum: _header(text, store.nbytes, checksum) + text)
    return seal(path, described, store.nbytes, store.write, plan=plan, metadata=metadata, coded=coded)


def seal(
    path: str | os.PathLike[str],
    described: Any,
    nbytes: int,
    payload: Callable[[Callable[[bytes], Any]], Any],
    *,
    plan: Mapping[str, Any] | None = None,
    metadata: Any = None,
    coded: bool = False,
) -> int:
    """Write a file whose tree is described; ``payload`` hands its ``nbytes`` bytes to what it is called with."""
    text = _text(described, plan, metadata, coded)

    def write(file: BinaryIO) -> int:
        start = file.write(_header(text, nbytes, _checksum(b"")) + text)
        digest = hashlib.blake2b(digest_size=8)

        def sink(piece: bytes) -> None:
            digest.update(piece)
            file.write(piece)

        payload(sink)
        file.seek(0)
        file.write(_header(text, nbytes, digest.hexdigest()))
        return start + nbytes

    return files.replace(path, write)


def _text(described: Any, plan: Mapping[str, Any] | None, metadata: Any, coded: bool) -> bytes:
    try:
        text = _dumps({**_about(plan, metadata), **({"coded": True} if coded else {}), "tree": described})
    except RecursionError:
        raise too_deep() from None
    return zlib.compress(text, 9) if coded else text


def _header(text: bytes, payload_bytes: int, checksum: str) -> bytes:
    return f"jcompress {FORMAT_VERSION} {len(text)} {_checksum(text)} {payload_bytes} {checksum}\n".encode()


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


def _dumps(about: dict[str, Any]) -> bytes:
    try:
        metadata = json.dumps(about.get("metadata"), allow_nan=False)
        json.loads(metadata, object_pairs_hook=_unique)
    except (TypeError, ValueError) as error:
        raise StorageError(f"metadata: JSON cannot hold it ({error}); convert it to numbers and texts") from None
    text = json.dumps(about, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode(errors="surrogatepass") + b"\n"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError(f"one object has two entries of one name, among {sorted(found)[:4]}")
    return found


def _checksum(data: bytes | memoryview) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def load(
    path: str | os.PathLike[str],
    *,
    like: PyTree | None = None,
    sharding: placing.Rule | None = None,
    formats: Formats | None = None,
    max_bytes: int | None = None,
) -> PyTree:
    """Read the tree that :func:`save` wrote; no template is needed.

    Dictionaries, lists, tuples, named tuples (of a class of the same name and fields), nodes and scalars come back
    as they were; any other container, such as an NNX state, as a dictionary of its children, whose keys are integers
    where they were, so that ``nnx.update(model, jc.materialize(jc.load(path)))`` restores a model with lists. Boxes of
    metadata, such as linen's ``nn.Partitioned``, are left out. Codes and values that a mask hides come back as 0.
    Arrays come back as JAX arrays, except that arrays of 64 bits stay NumPy arrays where JAX has those off.

    A file need not be trusted: no code in it is run, and what it claims is weighed before anything is allocated.

    Args:
      path: the file.
      like: a tree whose structure to give, with arrays, ``jax.ShapeDtypeStruct`` or nodes as leaves. Where it has an
        array, the file may have a node that stands for one of that shape and dtype, or, where that is of floats of 8
        or 4 bits, of bfloat16, as which they are fitted. Nothing is ever cast. A leaf that is sharded over devices says
        where its array goes, or the arrays of the node that stands for it: as it along the axes they have in common.
      sharding: the same by a rule, for leaves of which ``like`` does not say it: of a path and the
        ``jax.ShapeDtypeStruct`` of the dense array gives a ``jax.sharding.Sharding``, or None. An array that goes to
        several devices is read shard by shard, of several processes by each its own, and never whole in memory, but
        masks and what is entropy-coded.
      formats: classes of your own by name, beside those of :mod:`jcompress.formats`.
      max_bytes: how many bytes of memory the arrays of the tree may take; by default 64 MiB and 256 times the size
        of the file.

    Returns:
      The tree.

    Raises:
      StorageError: if there is no such file, it is no file of jcompress, of another version, cut short, damaged,
        has a format that is not known, takes more than ``max_bytes``, or differs from ``like``. The message names the
        file or the path, and says what was found and expected. A sharding that does not divide its array, too.

    Example:
      >>> import os, tempfile, jax.numpy as jnp, jcompress as jc
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = os.path.join(folder, "model.jc")
      ...     size = jc.save(path, {"w": jnp.ones(3, jnp.bfloat16), "layers": [1, (2.5, None)]})
      ...     tree = jc.load(path)
      >>> tree["w"].dtype.name, tree["layers"]
      ('bfloat16', [1, (2.5, None)])
    """
    with files.reading(path) as file, _naming(path):
        found, most = _read_manifest(file, max_bytes)
        tree = _decoded(file, found, Decoder(formats or {}, most), like, sharding)
    return tree if like is None else fill(like, tree)


def inspect(path: str | os.PathLike[str], *, max_bytes: int | None = None) -> dict[str, Any]:
    """What a file holds, without reading its payload.

    Args:
      path: a file that :func:`save` wrote.
      max_bytes: how long the manifest may be in bytes; by default as long as the file.

    Returns:
      The manifest: ``tree``, ``jcompress``, ``jax``, ``coded``, ``metadata`` and ``plan`` where given, and
      ``format_version`` and ``payload_bytes``.

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
    with files.reading(path) as file, _naming(path):
        found, _ = _read_manifest(file, max_bytes)
        decode(found.about["tree"], lambda spec: placeholder(spec) if isinstance(spec, str) else None)
    return {"format_version": FORMAT_VERSION, **found.about, "payload_bytes": found.payload_bytes}


@dataclasses.dataclass(frozen=True)
class _Manifest:
    """What stands before the payload."""

    about: dict[str, Any]
    payload_bytes: int
    checksum: str


@contextlib.contextmanager
def _naming(path: Any) -> Iterator[None]:
    """Errors of a file name it, and none comes bare from what its claims are given to."""
    try:
        yield
    except StorageError as error:
        raise StorageError(f"{path}: {error}") from None
    except RecursionError:
        raise StorageError(f"{path}: {too_deep()}") from None
    except OSError:
        raise
    except ImportError as error:
        raise MissingCoderError(f"{path}: {error}") from None
    except Exception as error:
        told = f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
        raise StorageError(f"{path}: the manifest disagrees with the payload ({told})") from error


def _read_manifest(file: BinaryIO, max_bytes: int | None) -> tuple[_Manifest, int]:
    """The manifest, and how many bytes of memory may be taken."""
    header = file.readline(_LONGEST_HEADER)
    version = re.match(rb"jcompress (\d{1,9}) ", header)
    if version is None:
        raise StorageError("found no header, expected a file that jc.save wrote; check the path")
    if int(version[1]) != FORMAT_VERSION:
        raise StorageError(
            f"found format version {int(version[1])}, expected {FORMAT_VERSION}; install the jcompress that wrote it"
        )
    match = _HEADER.fullmatch(header)
    if match is None:
        raise StorageError("the header is damaged; restore the file from a copy")
    text_bytes, payload_bytes = int(match[2]), int(match[4])
    found, expected = os.fstat(file.fileno()).st_size, len(header) + text_bytes + payload_bytes
    if found != expected:
        raise StorageError(f"found {found} bytes, expected {expected}; the file was cut short, or something added")
    most = _LEAST + _RATIO * found if max_bytes is None else max_bytes
    if text_bytes > most:
        raise StorageError(f"found a manifest of {text_bytes} bytes, expected at most {most}; raise max_bytes=")
    text = file.read(text_bytes)
    if _checksum(text) != match[3].decode():
        raise StorageError("the manifest is damaged; restore the file from a copy")
    return _Manifest(_parsed(_inflated(text)), payload_bytes, match[5].decode()), most


def _inflated(text: bytes) -> bytes:
    """The manifest of a coded file, which is compressed too; never more than 64 times as long, or 1 MiB."""
    if text[:1] != b"x":
        return text
    most, stream = max(_LONGEST_TEXT, 64 * len(text)), zlib.decompressobj()
    try:
        found = stream.decompress(text, most)
    except zlib.error as error:
        raise StorageError(f"the manifest is damaged ({error}); restore the file from a copy") from None
    if not stream.eof or stream.unused_data:
        raise StorageError(f"found a manifest of more than {most} bytes, or what is none behind it; do not trust it")
    return found


def _parsed(text: bytes) -> dict[str, Any]:
    try:
        about = json.loads(text.decode(errors="surrogatepass"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except ValueError as error:
        raise StorageError(f"the manifest is no JSON: {error}") from None
    if not isinstance(about, dict) or "tree" not in about:
        raise StorageError("the manifest has no 'tree'; restore the file from a copy")
    plan = about.get("plan", {})
    lists = isinstance(plan, dict) and all(isinstance(paths, list) for paths in plan.values())
    texts = lists and all(isinstance(path, str) for paths in plan.values() for path in paths)
    if not isinstance(about.get("coded", False), bool):
        raise StorageError("the manifest has no truth value for 'coded'; restore the file from a copy")
    if not texts or not all(isinstance(about.get(name), str) for name in ("jcompress", "jax")):
        raise StorageError("the manifest has no texts for 'jcompress', 'jax' or 'plan'; restore the file from a copy")
    return about


def _no_constant(name: str) -> None:
    raise ValueError(f"found {name}")


def _payload(file: BinaryIO, found: _Manifest) -> files.Bytes:
    payload = files.Bytes(file, found.payload_bytes)
    if payload.checksum() != found.checksum:
        raise StorageError("the payload is damaged; restore the file from a copy")
    return payload


def opened(path: str | os.PathLike[str]) -> tuple[dict[str, Any], np.ndarray]:
    """The manifest of a file and its payload as they are, not decoded."""
    with files.reading(path) as file, _naming(path):
        found, _ = _read_manifest(file, None)
        return found.about, _payload(file, found)[:]


def _decoded(file: BinaryIO, found: _Manifest, decoder: Decoder, like: PyTree, rule: placing.Rule | None) -> PyTree:
    spec = found.about["tree"]
    decode(spec, decoder.weigh)
    coded = found.about.get("coded", False)
    if decoder.nbits > 8 * found.payload_bytes and not coded:
        raise StorageError(
            f"the manifest disagrees with the payload: it describes at least {decoder.nbits} bits "
            f"of {8 * found.payload_bytes}"
        )
    payload = _payload(file, found)
    reader = CodedReader(payload) if coded else PlainReader(payload)
    known = like is not None or rule is not None
    places = iter(placing.places(spec, like, rule, decoder.dense)) if known else itertools.repeat(placing.anywhere)
    tree = decode(spec, lambda leaf: decoder.read(leaf, reader, next(places)))
    if -(-reader.nbits // 8) != payload.size:
        raise StorageError(
            f"the manifest disagrees with the payload: it describes {reader.nbits} bits of {8 * payload.size}"
        )
    return tree
